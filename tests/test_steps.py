"""Whole runs of the three RL scripts against arithmetic by hand: what a comparison of two runs of one script cannot see."""
import json
import statistics

import pytest
import torch
from conftest import byte_tokenizer, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kv_cache import plain_logprobs
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import ppo
import reinforce
import rloo

SCRIPTS = pytest.mark.parametrize("script", [reinforce, rloo, ppo], ids=lambda script: script.__name__)
TEMPERATURE, KL_COEF, GAMMA, LAM, VF_COEF, K = 0.7, 0.5, 0.9, 0.6, 0.3, 3
STOPS = [1, *range(150, 200)]
MORE = dict(reinforce=[], rloo=[], ppo=["--minibatches", 1, "--gamma", GAMMA, "--lam", LAM, "--vf-coef", VF_COEF])
REWARD = """
def score(prompts, completions, weight, **columns):
    return [w * sum(ord(c) % 97 for c in text) / 97 + len(prompt) / 9 for prompt, text, w in zip(prompts, completions, weight)]
"""


def scalars(out, tag):
    return [event.value for event in EventAccumulator(str(out)).Reload().Scalars(tag)]


@pytest.fixture(scope="module")
def tiny_with_stops(tiny, tmp_path_factory):
    """A model with stop tokens besides its tokenizer's EOS, so that responses are of every length."""
    path = tmp_path_factory.mktemp("stops")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.generation_config.eos_token_id = STOPS[1:]
    model.save_pretrained(path), byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def flags(tiny_with_stops, tmp_path):
    """14 prompts, each with a weight of its own in its score, 4 a step: the fourth step begins the second epoch."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [dict(prompt="abcdefghijklmnop"[i:] + "?" * i * i, weight=(-1) ** i * (1 + i / 5)) for i in range(14)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", tiny_with_stops, "--reward", f"{tmp_path}/reward.py:score", "--dataset", tmp_path / "prompts.jsonl", "--precision", "fp32", "--k", K,
            "--prompts-per-step", 4, "--micro-batch-size", 2, "--max-new-tokens", 6, "--max-prompt-length", 400, "--temperature", TEMPERATURE,
            "--kl-coef", KL_COEF, "--learning-rate", 0.01, "--warmup-steps", 0, "--max-grad-norm", 1e9]


@pytest.fixture
def sampled(monkeypatch):
    """What the scripts sampled: (rows, random numbers, responses) of each call."""
    calls = []
    for script, name in ((reinforce, "sample_penalized"), (rloo, "sample_responses"), (ppo, "sample_responses")):
        def record(*args, real=getattr(script, name), script=script):
            result = real(*args)
            if script is rloo:
                assert [sample.prompt for sample in result] == list(args[4]) and {len(sample.responses) for sample in result} == {args[5]}
                rows = [dict(ids=prompt.ids, prompt=prompt.columns["prompts"], columns=prompt.columns) for prompt in args[4]]
                responses = [ids for sample in result for ids in sample.responses]
            else:
                rows, responses = args[4], result[1]
            assert len(responses) == len(rows) * args[5] == len(args[6])
            calls.append((rows, args[6], responses))
            return result
        monkeypatch.setattr(script, name, record)
    return calls


def by_hand(rows, responses, k=K):
    """[(row, response, score)]: the k responses to a row are neighbours."""
    text = lambda ids: byte_tokenizer().decode(ids, skip_special_tokens=True)
    rows = [row for row in rows for _ in range(k)]
    score = lambda row, ids: row["columns"]["weight"] * sum(ord(c) % 97 for c in text(ids)) / 97 + len(row["prompt"]) / 9
    return [(row, ids, score(row, ids)) for row, ids in zip(rows, responses)]


def moments(folder):
    state = torch.load(folder / "trainer_state.pt")["optimizer"]["state"]
    return [state[i]["exp_avg"] for i in sorted(state)]


def rloo_objective(samples, logprobs, ref_logprobs, out):
    rewards = [score - KL_COEF * (a - b).sum().item() for (*_, score), a, b in zip(samples, logprobs, ref_logprobs)]
    others = [[rewards[j] for j in range(i // K * K, i // K * K + K) if j != i] for i in range(len(rewards))]
    return sum((r - statistics.mean(o)) * x.sum() for r, o, x in zip(rewards, others, logprobs)) / len(rewards), rewards


def reinforce_objective(samples, logprobs, ref_logprobs, out):
    rewards = [score - KL_COEF * (a - b).sum().item() for (*_, score), a, b in zip(samples, logprobs, ref_logprobs)]
    baseline = scalars(out, "objective/rlhf_reward")[0]  # the first batch's mean
    return sum((r - baseline) * x.sum() for r, x in zip(rewards, logprobs)) / len(rewards), rewards


def ppo_objective(samples, logprobs, ref_logprobs, critic):
    """The first update of a step, where the ratio is 1 and no value has moved: whitened advantages, squared errors."""
    rewards, advantages, errors = [], [], []
    for (row, response, score), a, b in zip(samples, logprobs, ref_logprobs):
        values = critic(torch.tensor([row["ids"] + response])).logits[0, len(row["ids"]) - 1:-1, 0]
        reward = (-KL_COEF * (a - b)).tolist()
        reward[-1] += score
        v, later = values.tolist() + [0.0], []  # nothing follows the last token
        for t in range(len(response)):  # the sum of discounted errors of one step, each from its definition
            later.append(sum((GAMMA * LAM) ** (s - t) * (reward[s] + GAMMA * v[s + 1] - v[s]) for s in range(t, len(response))))
        advantages.append(later)
        errors += [(value - v[t] - later[t]) ** 2 / 2 for t, value in enumerate(values)]
        rewards.append(sum(reward))
    tokens = [x for row in advantages for x in row]
    mean, deviation = statistics.mean(tokens), statistics.pstdev(tokens)
    policy = sum((x - mean) / deviation * lp for row, lps in zip(advantages, logprobs) for x, lp in zip(row, lps)) / len(tokens)
    return policy - VF_COEF * sum(errors) / len(tokens), rewards


@SCRIPTS
def test_the_gradient_of_a_step_is_that_of_the_formula_row_by_row(script, flags, sampled, tiny_with_stops, tmp_path):
    """The second step, where the policy has left the reference: sampled, scored, and differentiated one response at a time."""
    out = tmp_path / "o"
    run_script(script, *flags, *MORE[script.__name__], "--total-steps", 2, "--save-every", 1, "--eval-prompts", 0, "--output-dir", out)
    rows, _, responses = sampled[1]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval() for path in (out / "checkpoint-1", tiny_with_stops))
    samples = by_hand(rows, responses)
    assert len({score for *_, score in samples}) > 2 * K and len({len(ids) for _, ids, _ in samples}) > 2
    logprobs, ref_logprobs = ([plain_logprobs(model, row["ids"], ids, TEMPERATURE) for row, ids, _ in samples] for model in (policy, reference))
    if script is ppo:
        critic = AutoModelForTokenClassification.from_pretrained(out / "checkpoint-1", num_labels=1, attn_implementation="eager").eval()
        critic.load_state_dict(torch.load(out / "checkpoint-1/trainer_state.pt")["critic"])
        objective, rewards = ppo_objective(samples, logprobs, ref_logprobs, critic)
    else:
        objective, rewards = (rloo_objective if script is rloo else reinforce_objective)(samples, logprobs, ref_logprobs, out)
    parameters = [*policy.parameters(), *(critic.parameters() if script is ppo else ())]
    expected = torch.autograd.grad(-objective, parameters)
    gradient = [(b - 0.9 * a) / 0.1 for a, b in zip(moments(out / "checkpoint-1"), moments(out / "final"))]  # of Adam's average
    assert len(gradient) == len(expected)
    for a, b in zip(gradient, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert max(b.abs().max() for b in expected) > 0.05
    kl, tokens = [(a - b).sum().item() for a, b in zip(logprobs, ref_logprobs)], sum(len(ids) for _, ids, _ in samples)
    assert abs(statistics.mean(kl)) > 0.01
    for tag, value in {"scores": statistics.mean(score for *_, score in samples), "kl": statistics.mean(kl), "rlhf_reward": statistics.mean(rewards),
                       "entropy": -sum(x.sum().item() for x in logprobs) / tokens}.items():
        assert scalars(out, f"objective/{tag}")[1] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert scalars(out, "val/response_length")[1] == pytest.approx(tokens / len(samples), abs=1e-5)
    if script is not rloo:  # which does not log it
        assert scalars(out, "val/eos_rate")[1] == pytest.approx(statistics.mean(ids[-1] in STOPS for _, ids, _ in samples), abs=1e-6)
    assert sorted(json.loads((out / "final/generation_config.json").read_text())["eos_token_id"]) == STOPS


@SCRIPTS
def test_held_out_score_and_kl_are_those_of_the_policy(script, flags, sampled, tiny_with_stops, tmp_path):
    out = tmp_path / "o"
    run_script(script, *flags, *MORE[script.__name__], "--total-steps", 3, "--eval-prompts", 5, "--eval-every", 3, "--output-dir", out)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval() for path in (out / "final", tiny_with_stops))
    samples = by_hand(*sampled[-1][::2], k=1)
    assert len(samples) == 5
    kl = [(plain_logprobs(policy, row["ids"], ids, TEMPERATURE) - plain_logprobs(reference, row["ids"], ids, TEMPERATURE)).sum().item()
          for row, ids, _ in samples]
    assert scalars(out, "eval/kl") == pytest.approx([0, statistics.mean(kl)], rel=1e-4, abs=1e-5) and abs(statistics.mean(kl)) > 0.01
    assert scalars(out, "eval/score")[1] == pytest.approx(statistics.mean(score for *_, score in samples), rel=1e-5)
    assert scalars(out, "eval/response_length")[1] == pytest.approx(statistics.mean(len(ids) for _, ids, _ in samples), rel=1e-5)
    assert torch.equal(sampled[-1][1], sampled[0][1])  # before and after: from the same random numbers


@SCRIPTS
def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own(script, flags, sampled, tmp_path):
    run_script(script, *flags, "--total-steps", 7, "--learning-rate", 0, "--eval-prompts", 0, "--output-dir", tmp_path / "o")
    prompts = [row["prompt"] for rows, *_ in sampled for row in rows]
    first, second = prompts[:14], prompts[14:]
    assert len(set(first)) == 14 and sorted(first) == sorted(second) and first != second
    uniforms = [tuple(numbers.flatten().tolist()) for _, numbers, _ in sampled]
    assert len(set(uniforms)) == 7  # no step samples with another's random numbers
    run_script(script, *flags, "--seed", 2, "--total-steps", 1, "--learning-rate", 0, "--eval-prompts", 0, "--output-dir", tmp_path / "p")
    assert [row["prompt"] for row in sampled[7][0]] != first[:4] and not torch.equal(sampled[7][1], sampled[0][1])


@SCRIPTS
def test_a_step_is_clipped_to_the_largest_norm(script, flags, tmp_path):
    run_script(script, *flags, *MORE[script.__name__], "--max-grad-norm", 0.01, "--total-steps", 1, "--eval-prompts", 0, "--output-dir", tmp_path / "o")
    norm = torch.cat([m.flatten() for m in moments(tmp_path / "o/final")]).norm() / 0.1
    expected = 0.01 * (2 ** 0.5 if script is ppo else 1)  # the critic's gradient is clipped by itself
    assert scalars(tmp_path / "o", "policy/grad_norm")[0] > 0.1 and norm == pytest.approx(expected, rel=1e-3)

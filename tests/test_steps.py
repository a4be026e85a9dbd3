"""Whole runs of the three RL scripts against arithmetic by hand: what a comparison of two runs cannot see."""

import json
import statistics

import pytest
import torch
from conftest import STOPS, byte_tokenizer, moments, plain_logprobs, run_script, scalars
from transformers import AutoModel, AutoModelForCausalLM

import ppo
import reinforce
import rloo

SCRIPTS = pytest.mark.parametrize("script", [reinforce, rloo, ppo], ids=lambda script: script.__name__)
TEMPERATURE, KL_COEF, DECAY, GAMMA, LAM, VF_COEF, K = 0.7, 0.5, 0.8, 0.9, 0.6, 0.3, 3
MORE = {
    reinforce: ["--baseline-decay", DECAY],
    rloo: [],
    ppo: ["--minibatches", 1, "--gamma", GAMMA, "--lam", LAM, "--vf-coef", VF_COEF],
}
REWARD = """
def number(prompt, text, weight):
    return weight * sum(ord(c) % 97 for c in text) / 97 + len(prompt) / 9
def score(prompts, completions, weight, **columns):
    return [number(*answer) for answer in zip(prompts, completions, weight)]
"""


@pytest.fixture
def flags(tiny_with_stops, tmp_path):
    """14 prompts, each with a weight of its own in its score, 4 a step: the fourth step begins the second epoch."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [dict(prompt="abcdefghijklmnop"[i:] + "?" * i * i, weight=(-1) ** i * (1 + i / 5)) for i in range(14)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--reward {tmp_path}/reward.py:score --dataset {tmp_path}/prompts.jsonl --model {tiny_with_stops}"
    flags += f" --precision fp32 --k {K} --temperature {TEMPERATURE} --kl-coef {KL_COEF} --max-grad-norm 1e9"
    flags += " --prompts-per-step 4 --micro-batch-size 2 --max-new-tokens 6 --max-prompt-length 400"
    return [*flags.split(), "--learning-rate", 0.01, "--warmup-steps", 0]


@pytest.fixture
def sampled(monkeypatch):
    """What the scripts sampled: (random numbers, samples) of each call."""
    calls = []

    def recorded(real):
        def record(args, accelerator, model, tokenizer, prompts, k, uniforms):
            samples = real(args, accelerator, model, tokenizer, prompts, k, uniforms)
            assert [sample.prompt for sample in samples] == prompts
            assert {len(sample.responses) for sample in samples} == {k}
            assert len(uniforms) == len(prompts) * k
            calls.append((uniforms, list(samples)))  # a copy: the script sorts its list
            return samples

        return record

    for script in MORE:
        monkeypatch.setattr(script, "sample_responses", recorded(script.sample_responses))
    return calls


def by_hand(samples):
    """[(ids of the prompt, ids of a response, its score)]: the responses to a prompt are neighbours."""
    namespace = {}
    exec(REWARD, namespace)
    tokenizer = byte_tokenizer()
    answers = []
    for sample in samples:
        columns = sample.prompt.columns
        assert sample.prompt.ids == tokenizer(columns["prompt"])["input_ids"]
        for ids in sample.responses:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            score = namespace["number"](columns["prompt"], text, columns["weight"])
            answers.append((sample.prompt.ids, ids, score))
    return answers


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def logprobs_alone(model, answers):
    return [plain_logprobs(model, prompt, ids, TEMPERATURE) for prompt, ids, _ in answers]


def sequence_rewards(answers, logprobs, ref_logprobs):
    return [score - KL_COEF * (a - b).sum().item() for (*_, score), a, b in zip(answers, logprobs, ref_logprobs)]


def rloo_objective(answers, logprobs, ref_logprobs, out):
    rewards = sequence_rewards(answers, logprobs, ref_logprobs)
    objective = 0.0
    for i, (reward, logprob) in enumerate(zip(rewards, logprobs)):
        others = [rewards[j] for j in range(i // K * K, i // K * K + K) if j != i]
        objective = objective + (reward - statistics.mean(others)) * logprob.sum()
    return objective / len(rewards), rewards


def reinforce_objective(answers, logprobs, ref_logprobs, out):
    """The third step: its baseline is of the first step's scores, and of the rewards of the first and the second."""
    rewards = sequence_rewards(answers, logprobs, ref_logprobs)
    means = scalars(out, "objective/rlhf_reward")
    baseline = scalars(out, "objective/scores")[0]
    for mean in means[:2]:
        baseline = DECAY * baseline + (1 - DECAY) * mean
    assert abs(baseline - means[0]) > 0.1
    return sum((r - baseline) * x.sum() for r, x in zip(rewards, logprobs)) / len(rewards), rewards


def ppo_objective(answers, logprobs, ref_logprobs, critic):
    """The first update of a step, where the ratio is 1 and no value has moved: whitened advantages, squared errors."""
    rewards, advantages, errors = [], [], []
    for (prompt, response, score), a, b in zip(answers, logprobs, ref_logprobs):
        hidden = critic.backbone(torch.tensor([prompt + response]), use_cache=False).last_hidden_state
        values = critic.head(hidden)[0, len(prompt) - 1 : -1, 0]
        reward = (-KL_COEF * (a - b)).tolist()
        reward[-1] += score
        v = values.tolist() + [0.0]  # nothing follows the last token
        deltas = [reward[t] + GAMMA * v[t + 1] - v[t] for t in range(len(response))]
        later = []  # the sum of discounted errors of one step, each from its definition
        for t in range(len(response)):
            later.append(sum((GAMMA * LAM) ** (s - t) * deltas[s] for s in range(t, len(response))))
        advantages += later
        errors += [(value - v[t] - later[t]) ** 2 / 2 for t, value in enumerate(values)]
        rewards.append(sum(reward))
    mean, deviation = statistics.mean(advantages), statistics.pstdev(advantages)
    policy = sum((x - mean) / deviation * logprob for x, logprob in zip(advantages, torch.cat(logprobs)))
    return (policy - VF_COEF * sum(errors)) / len(advantages), rewards


@SCRIPTS
def test_the_gradient_of_a_step_is_that_of_the_formula(script, flags, sampled, tiny_with_stops, tmp_path):
    """The third step, where the policy has left the reference: one response at a time."""
    out = tmp_path / "o"
    more = ["--total-steps", 3, "--save-every", 1, "--eval-prompts", 0, "--output-dir", out]
    run_script(script, *flags, *MORE[script], *more)
    answers = by_hand(sampled[2][1])
    assert len({score for *_, score in answers}) > 2 * K
    assert len({len(ids) for _, ids, _ in answers}) > 2
    policy, reference = load(out / "checkpoint-2"), load(tiny_with_stops)
    logprobs, ref_logprobs = logprobs_alone(policy, answers), logprobs_alone(reference, answers)
    parameters = list(policy.parameters())
    if script is ppo:
        backbone = AutoModel.from_pretrained(out / "checkpoint-2", attn_implementation="eager")
        critic = ppo.Critic(backbone, torch.nn.Linear(32, 1)).eval()
        critic.load_state_dict(torch.load(out / "checkpoint-2/trainer_state.pt")["critic"])
        parameters += critic.parameters()
        objective, rewards = ppo_objective(answers, logprobs, ref_logprobs, critic)
    elif script is rloo:
        objective, rewards = rloo_objective(answers, logprobs, ref_logprobs, out)
    else:
        objective, rewards = reinforce_objective(answers, logprobs, ref_logprobs, out)

    expected = torch.autograd.grad(-objective, parameters)
    averages = zip(moments(out / "checkpoint-2"), moments(out / "final"))
    gradient = [(after - 0.9 * before) / 0.1 for before, after in averages]  # of Adam's average
    assert len(gradient) == len(expected)
    for a, b in zip(gradient, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert max(b.abs().max() for b in expected) > 0.05

    kl = statistics.mean((a - b).sum().item() for a, b in zip(logprobs, ref_logprobs))
    assert abs(kl) > 0.01
    n_tokens = sum(len(ids) for _, ids, _ in answers)
    curves = {
        "objective/scores": statistics.mean(score for *_, score in answers),
        "objective/kl": kl,
        "objective/rlhf_reward": statistics.mean(rewards),
        "objective/entropy": -torch.cat(logprobs).sum().item() / n_tokens,
        "val/response_length": n_tokens / len(answers),
    }
    if script is not ppo:  # whose loss is two
        curves["loss/policy"] = -objective.item()
    for tag, value in curves.items():
        assert scalars(out, tag)[2] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert sorted(json.loads((out / "final/generation_config.json").read_text())["eos_token_id"]) == STOPS


@SCRIPTS
def test_held_out_score_and_kl_are_those_of_the_policy(script, flags, sampled, tiny_with_stops, tmp_path):
    out = tmp_path / "o"
    more = ["--total-steps", 3, "--eval-prompts", 5, "--eval-every", 3, "--output-dir", out]
    run_script(script, *flags, *MORE[script], *more)
    uniforms, samples = sampled[-1]
    answers = by_hand(samples)
    assert len(answers) == 5
    policy, reference = logprobs_alone(load(out / "final"), answers), logprobs_alone(load(tiny_with_stops), answers)
    kl = statistics.mean((a - b).sum().item() for a, b in zip(policy, reference))
    assert abs(kl) > 0.01
    assert scalars(out, "eval/kl") == pytest.approx([0, kl], rel=1e-4, abs=1e-5)
    score = statistics.mean(score for *_, score in answers)
    assert scalars(out, "eval/score")[1] == pytest.approx(score, rel=1e-5)
    length = statistics.mean(len(ids) for _, ids, _ in answers)
    assert scalars(out, "eval/response_length")[1] == pytest.approx(length, rel=1e-5)
    assert torch.equal(uniforms, sampled[0][0])  # before and after: from the same random numbers


@SCRIPTS
def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own(script, flags, sampled, tmp_path):
    more = ["--learning-rate", 0, "--eval-prompts", 0]
    run_script(script, *flags, *more, "--total-steps", 7, "--output-dir", tmp_path / "o")
    prompts = [sample.prompt.columns["prompt"] for _, samples in sampled for sample in samples]
    first, second = prompts[:14], prompts[14:]
    assert len(set(first)) == 14
    assert sorted(first) == sorted(second)
    assert first != second
    assert len({tuple(uniforms.flatten().tolist()) for uniforms, _ in sampled}) == 7  # no step has another's numbers

    run_script(script, *flags, *more, "--seed", 2, "--total-steps", 1, "--output-dir", tmp_path / "p")
    uniforms, samples = sampled[7]
    assert [sample.prompt.columns["prompt"] for sample in samples] != first[:4]
    assert not torch.equal(uniforms, sampled[0][0])


@SCRIPTS
def test_a_step_is_clipped_to_the_largest_norm(script, flags, tmp_path):
    out = tmp_path / "o"
    more = ["--max-grad-norm", 0.01, "--total-steps", 1, "--eval-prompts", 0, "--output-dir", out]
    run_script(script, *flags, *MORE[script], *more)
    norm = torch.cat([average.flatten() for average in moments(out / "final")]).norm() / 0.1
    expected = 0.01
    if script is ppo:
        expected *= 2**0.5  # the critic's gradient is clipped by itself
    assert scalars(out, "policy/grad_norm")[0] > 0.1
    assert norm == pytest.approx(expected, rel=1e-3)

"""variants/online_dpo.py: its pairs, its reference, its own judge, its runs. What it shares with rloo.py and dpo.py is tested there."""

import contextlib
import json
import math
import shutil
import statistics
import types

import pytest
import torch
from conftest import byte_tokenizer, moments, run_in_two_processes, run_script, scalars, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_dpo import LOSSES, TEXTS, another, examples_of, logps_alone, said
from test_grpo import close, same
from test_steps import K, REWARD, TEMPERATURE, by_hand, load, logprobs_alone

import dpo
import online_dpo

BETA, SMOOTHING, MARGIN = 0.3, 0.1, 0.4
EVERY_LOSS = pytest.mark.parametrize("loss_type", LOSSES)


# ---- pairs and their loss


def test_best_and_worst_golden_of_equals_the_first():
    scores = torch.tensor([2.0, 5, 1, 5, 3, 3, 3, 3, -1, -2, -2, -1])
    best, worst, differ = online_dpo.best_and_worst(scores, 4)
    assert (best.tolist(), worst.tolist()) == ([1, 0, 0], [2, 0, 1])
    assert differ.tolist() == [True, False, True]
    best, worst, differ = online_dpo.best_and_worst(scores, 2)  # responses to one prompt are neighbours
    assert (best.tolist(), worst.tolist()) == ([1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0])
    assert differ.tolist() == [True, True, False, False, True, True]


@EVERY_LOSS
def test_loss_golden_sign_and_that_it_is_dpos(loss_type):
    """h = 1 at beta 0.3, or for simpo means of -1 and -2."""
    logps = torch.tensor([[-1.0], [-2.0], [0.0], [0.0]], requires_grad=True)
    flags = (BETA, loss_type, SMOOTHING, MARGIN)
    golden = {
        "sigmoid": 0.9 * math.log1p(math.exp(-0.3)) + 0.1 * math.log1p(math.exp(0.3)),
        "ipo": (1 - 1 / 0.6) ** 2,
        "hinge": 0.7,
        "robust": (0.9 * math.log1p(math.exp(-0.3)) - 0.1 * math.log1p(math.exp(0.3))) / 0.8,
        "simpo": 0.9 * math.log1p(math.exp(0.1)) + 0.1 * math.log1p(math.exp(-0.1)),
    }
    losses, *rewards = online_dpo.dpo_loss(*logps, *flags)
    assert losses.item() == pytest.approx(golden[loss_type], abs=1e-6)
    assert [reward.item() for reward in rewards] == pytest.approx([-0.3, -0.6])
    losses.sum().backward()
    assert logps.grad[0] < 0 < logps.grad[1]  # descent raises the chosen answer and lowers the rejected one

    torch.manual_seed(0)
    logps = 10 * torch.randn(4, 16)
    ours, theirs = (script.dpo_loss(*logps, *flags) for script in (online_dpo, dpo))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@EVERY_LOSS
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_losses_of_pairs_are_dpos_to_the_bit(make, loss_type):
    reference = make().requires_grad_(False)
    results = []
    for script in (online_dpo, dpo):
        policy = another(reference).requires_grad_()
        args = script.Args(loss_type=loss_type, beta=BETA, label_smoothing=SMOOTHING, simpo_margin=MARGIN)
        networks = [script.ResponseLogprobs(model) for model in (policy, reference)]
        values = script.pair_losses(args, *networks, examples_of(TEXTS), "cpu")
        values["loss/policy"].mean().backward()
        results.append(values | {name: p.grad for name, p in policy.named_parameters()})
    ours, theirs = results
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["rewards/margins"].abs().min() > 1e-3


# ---- whole steps against the formula, one response at a time


@pytest.fixture
def flags(tiny_with_stops, tmp_path):
    """As in test_steps.py, but that every third prompt has a weight of 0, so that its responses score the same."""
    (tmp_path / "reward.py").write_text(REWARD)
    weights = [0 if i % 3 == 0 else (-1) ** i * (1 + i / 5) for i in range(14)]
    rows = [dict(prompt="abcdefghijklmnop"[i:] + "?" * i * i, weight=weight) for i, weight in enumerate(weights)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--reward {tmp_path}/reward.py:score --dataset {tmp_path}/prompts.jsonl --model {tiny_with_stops}"
    flags += f" --precision fp32 --k {K} --temperature {TEMPERATURE} --beta {BETA} --max-grad-norm 1e9"
    flags += " --prompts-per-step 4 --micro-batch-size 2 --max-new-tokens 6 --max-prompt-length 400 --eval-prompts 0"
    return [*flags.split(), "--warmup-steps", 0, "--learning-rate", 0.003]


@pytest.fixture
def sampled(monkeypatch):
    """The samples of each call."""
    calls = []
    real = online_dpo.sample_responses

    def record(*arguments):
        samples = real(*arguments)
        calls.append(list(samples))  # a copy: the script sorts its list
        return samples

    monkeypatch.setattr(online_dpo, "sample_responses", record)
    return calls


def pairs_by_hand(samples):
    """(an Example for each prompt whose scores differ, how many others there are)."""
    answers, pairs = by_hand(samples), []
    for i in range(0, len(answers), K):
        prompt, scores = answers[i][0], [score for *_, score in answers[i : i + K]]
        if len(set(scores)) > 1:
            chosen = [answers[i + scores.index(pick(scores))][1] for pick in (max, min)]
            pairs.append(online_dpo.Example(None, prompt, chosen))
    return pairs, len(answers) // K - len(pairs)


@EVERY_LOSS
def test_the_gradient_of_a_step_is_that_of_dpo_on_its_pairs(loss_type, flags, sampled, tiny_with_stops, tmp_path):
    """The first step, and the third, where the policy has left the reference. Ties weigh nothing."""
    out = tmp_path / "o"
    more = ["--loss-type", loss_type, "--label-smoothing", SMOOTHING, "--simpo-margin", MARGIN]
    run_script(online_dpo, *flags, *more, "--total-steps", 3, "--save-every", 1, "--output-dir", out)
    reference = load(tiny_with_stops)
    for step, model in ((0, tiny_with_stops), (2, out / "checkpoint-2")):
        pairs, ties = pairs_by_hand(sampled[step])
        assert len(pairs) > 1 and ties > 0
        policy = load(model)
        logps, ref_logps = (logps_alone(network, pairs, loss_type) for network in (policy, reference))
        if loss_type == "simpo":
            ref_logps = torch.zeros_like(logps)
        losses, chosen, rejected = dpo.dpo_loss(*logps.T, *ref_logps.detach().T, BETA, loss_type, SMOOTHING, MARGIN)
        expected = torch.autograd.grad(losses.mean(), list(policy.parameters()))

        after = moments(out / ("final" if step == 2 else f"checkpoint-{step + 1}"))
        before = moments(model) if step > 0 else [torch.zeros_like(average) for average in after]
        for a, b, c in zip(after, before, expected, strict=True):
            assert ((a - 0.9 * b) / 0.1 - c).abs().max() < 1e-4 * c.abs().max() + 1e-6
        assert max(c.abs().max() for c in expected) > 0.01

        curves = {
            "objective/scores": statistics.mean(score for *_, score in by_hand(sampled[step])),
            "objective/ties": ties,
            "loss/policy": losses.mean().item(),
            "rewards/accuracies": (chosen > rejected + 1e-5).float().mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "logps/chosen": logps[:, 0].mean().item(),
            "logps/rejected": logps[:, 1].mean().item(),
            "policy/grad_norm": torch.cat([c.flatten() for c in expected]).norm().item(),
        }
        for tag, value in curves.items():
            assert scalars(out, tag)[step] == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_where_all_scores_are_equal_nothing_is_learned(flags, tiny_with_stops, tmp_path):
    (tmp_path / "equal.py").write_text("def score(completions, **columns):\n    return [0.3] * len(completions)\n")
    out = tmp_path / "o"
    more = ["--reward", f"{tmp_path}/equal.py:score", "--total-steps", 2]
    run_script(online_dpo, *flags, *more, "--output-dir", out)
    assert not any(average.any() for average in moments(out / "final"))
    before, after = load(tiny_with_stops).state_dict(), load(out / "final").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert scalars(out, "objective/ties") == [4, 4]
    assert scalars(out, "policy/grad_norm") == scalars(out, "loss/policy") == [0, 0]
    for tag in EventAccumulator(str(out)).Reload().Tags()["scalars"]:
        assert all(map(math.isfinite, scalars(out, tag)))


def test_micro_batches_change_nothing(flags, sampled, tmp_path):
    """A micro-batch may have ties alone."""
    for size in (1, 2, 4):
        more = ["--micro-batch-size", size, "--total-steps", 1, "--output-dir", tmp_path / str(size)]
        run_script(online_dpo, *flags, *more)
        assert close(tmp_path / str(size), tmp_path / "1")
        for tag in ("loss/policy", "rewards/margins", "logps/chosen", "objective/ties"):
            assert scalars(tmp_path / str(size), tag) == pytest.approx(scalars(tmp_path / "1", tag), abs=1e-5)
    assert pairs_by_hand(sampled[0])[1] > 0


def test_two_processes_equal_one(flags, sampled, tmp_path):
    """Where they have unequal numbers of ties. A reference that is refreshed is the policy, in both."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = "--prompts-per-step 8 --total-steps 2 --refresh-reference 1 --learning-rate 1e-3".split()
    run_script(online_dpo, *flags, *more, "--output-dir", one)
    ties = [pairs_by_hand(sampled[0][i : i + 4])[1] for i in (0, 4)]
    assert ties[0] != ties[1]
    run_in_two_processes(online_dpo, *flags, *more, "--output-dir", two)
    assert close(two, one)
    assert scalars(two, "objective/ties")[0] == sum(ties)
    assert scalars(two, "loss/policy") == pytest.approx([math.log(2)] * 2, abs=1e-6)
    for tag in ("objective/scores", "objective/ties", "logps/rejected", "val/response_length"):
        assert scalars(two, tag) == pytest.approx(scalars(one, tag), abs=1e-4)


# ---- the reference


def test_a_refreshed_reference_is_the_policy_of_that_step(flags, sampled, tiny_with_stops, tmp_path):
    """A pair's log-ratios are 0 then. The KL of an evaluation stays that from the model before training."""
    more = ["--total-steps", 5, "--save-every", 4, "--eval-prompts", 4, "--eval-every", 100]
    run_script(online_dpo, *flags, *more, "--output-dir", tmp_path / "never")
    run_script(online_dpo, *flags, *more, "--refresh-reference", 2, "--output-dir", tmp_path / "o")
    for out, refreshed in ((tmp_path / "never", [0]), (tmp_path / "o", [0, 2, 4])):
        for step in range(5):
            is_new = step in refreshed
            assert (abs(scalars(out, "loss/policy")[step] - math.log(2)) < 1e-6) == is_new
            assert (abs(scalars(out, "rewards/margins")[step]) < 1e-6) == is_new
            assert (abs(scalars(out, "rewards/chosen")[step]) < 1e-6) == is_new

    answers = by_hand(sampled[-1])
    logprobs = logprobs_alone(load(tmp_path / "o/final"), answers)

    def kl_from(model):
        return statistics.mean((a - b).sum().item() for a, b in zip(logprobs, logprobs_alone(load(model), answers)))

    kl = kl_from(tiny_with_stops)
    assert abs(kl - kl_from(tmp_path / "o/checkpoint-4")) > 0.01
    assert scalars(tmp_path / "o", "eval/kl") == pytest.approx([0, kl], rel=1e-4, abs=1e-5)


def test_resume_is_bit_exact_with_the_reference_that_the_loss_had(flags, tmp_path):
    """From before and after a refresh; the checkpoint of another step has another reference."""
    more = ["--refresh-reference", 2, "--total-steps", 5, "--save-every", 1]
    run_script(online_dpo, *flags, *more, "--output-dir", tmp_path / "o")
    for step in (1, 3):
        shutil.copytree(tmp_path / f"o/checkpoint-{step}", tmp_path / f"p{step}/checkpoint-{step}")
        run_script(online_dpo, "--resume", tmp_path / f"p{step}/checkpoint-{step}")
        assert same(tmp_path / f"p{step}/final", tmp_path / "o/final")
        assert scalars(tmp_path / f"p{step}", "loss/policy") == scalars(tmp_path / "o", "loss/policy")[step:]
    states = [torch.load(tmp_path / f"o/checkpoint-{step}/trainer_state.pt") for step in (1, 2, 3)]
    weights = load_file(tmp_path / "o/checkpoint-2/model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(states[1]["loss_reference"]["model." + name], tensor)
        assert torch.equal(states[2]["loss_reference"]["model." + name], tensor)

    shutil.copytree(tmp_path / "o/checkpoint-3", tmp_path / "q/checkpoint-3")
    states[2]["loss_reference"] = states[0]["loss_reference"]
    torch.save(states[2], tmp_path / "q/checkpoint-3/trainer_state.pt")
    run_script(online_dpo, "--resume", tmp_path / "q/checkpoint-3")
    assert not same(tmp_path / "q/final", tmp_path / "o/final")


def test_without_a_refresh_no_reference_is_saved_and_resume_is_bit_exact(flags, tmp_path):
    run_script(online_dpo, *flags, "--total-steps", 3, "--save-every", 1, "--output-dir", tmp_path / "o")
    shutil.copytree(tmp_path / "o/checkpoint-2", tmp_path / "p/checkpoint-2")
    run_script(online_dpo, "--resume", tmp_path / "p/checkpoint-2")
    assert same(tmp_path / "p/final", tmp_path / "o/final")
    assert torch.load(tmp_path / "o/final/trainer_state.pt").keys() == {"step", "optimizer"}


# ---- the policy as its own judge

HERE = types.SimpleNamespace(autocast=contextlib.nullcontext)  # what judging asks of an accelerator


class Scripted:
    """A network that gives the six digits these log-probabilities, and remembers what it read."""

    model = types.SimpleNamespace(device="cpu")

    def __init__(self, *logprobs):
        self.logprobs = list(logprobs)
        self.questions = []

    def __call__(self, rows):
        for ids, segments, is_response in zip(rows.ids, rows.segments, rows.is_response):
            assert byte_tokenizer().decode(ids[is_response]) == "012345"
            self.questions.append(byte_tokenizer().decode([*ids[segments == 0], ids[is_response.nonzero()[0] - 1][0]]))
        size = len(rows.ids)
        part, self.logprobs = self.logprobs[:size], self.logprobs[size:]
        return torch.tensor(part).view(-1, 1)


def asked(text, messages=None):
    return online_dpo.Prompt([2], messages, {"prompts": messages or text})


def test_the_expected_grade_golden_in_the_order_of_the_responses():
    """By the digits alone, however little the model gives to all six; nine are two passes."""
    mass = [[0.1, 0.2, 0.3, 0.4, 0, 0], [1 / 6] * 6, [0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]
    mass += [[0.01 * p for p in mass[0]], [1e-6] * 6, [0, 0, 1e-9, 0, 0, 0], [0, 0, 0, 0, 0, 1e-3]]
    network = Scripted(*[[math.log(p + 1e-30) for p in row] for row in mass])
    grades = online_dpo.self_judge(HERE, network, byte_tokenizer())([asked("q")] * 9, [f"{i}" for i in range(9)])
    assert grades == pytest.approx([2, 2.5, 4, 0, 4.5, 2, 2.5, 2, 5], abs=1e-5)
    assert ["Response: " + str(i) in question for i, question in enumerate(network.questions)] == [True] * 9


@pytest.mark.parametrize("chat", [True, False])
def test_request_and_response_reach_the_judge_as_they_are(chat):
    """A chat's request is its last message. Of a plain prompt it is all; without chat template nothing is around it."""
    prompts = [asked("Say {0}!"), asked("b")]
    if chat:
        prompts[1] = asked(None, [*said("first", "yes?"), {"role": "user", "content": "Write {response}."}])
    responses, requests = ["{request} {} {{x}} {0}", ""], ["Say {0}!", "Write {response}." if chat else "b"]
    network = Scripted(*[[0.0] * 6] * 2)
    tokenizer = byte_tokenizer() if chat else byte_tokenizer(chat_template=None, begin=True)
    assert online_dpo.self_judge(HERE, network, tokenizer)(prompts, responses) == [2.5, 2.5]
    head, rest = online_dpo.JUDGE.split("{request}")
    middle, tail = rest.split("{response}")
    around = ("<s>user:", "</s><s>assistant:") if chat else ("<s>", "")
    expected = [around[0] + head + a + middle + b + tail + around[1] for a, b in zip(requests, responses)]
    assert network.questions == expected


def grade_by_hand(model, request, response):
    """A plain forward pass of the question in the chat template, and the softmax over six tokens of the next one."""
    question = online_dpo.JUDGE.format(request=request, response=response)
    ids = byte_tokenizer()(f"<s>user:{question}</s><s>assistant:")["input_ids"]
    digits = [byte_tokenizer()(digit)["input_ids"][0] for digit in "012345"]
    probabilities = model(torch.tensor([ids])).logits[0, -1][digits].softmax(0)
    return sum(i * p for i, p in enumerate(probabilities.tolist()))


def test_grades_are_those_of_a_plain_forward_pass():
    model = tiny_llama()
    texts = ["", "yes", "no, " * 9, "é", "a b c", "2", "{}", "p" * 300, "!", "x" * 50]
    judge = online_dpo.self_judge(HERE, online_dpo.ResponseLogprobs(model), byte_tokenizer())
    grades = judge([asked(f"q{len(text)}") for text in texts], texts)
    expected = [grade_by_hand(model, f"q{len(text)}", text) for text in texts]
    assert grades == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05


def test_a_policy_that_judges_itself_ends_with_a_table(tiny_flags, sampled, tmp_path, capsys):
    """Its grade beside the gold. After training it is graded by itself as it is then."""
    flags = [*tiny_flags, "--reward", "self", "--eval-reward", tiny_flags[1], "--learning-rate", 1e-2]
    run_script(online_dpo, *flags, "--output-dir", tmp_path / "o")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:1] + line.split()[1::2] for line in lines if "  kl " in line]
    assert rows == [[title, "score", "gold", "kl", "response_length"] for title in ("SFT", "trained")]
    model, samples = load(tmp_path / "o/final"), sum(sampled[-2:], [])  # eight fit in a pass
    assert len(samples) == 10
    grades = [grade_by_hand(model, s.prompt.columns["prompts"], s.texts[0]) for s in samples]
    assert scalars(tmp_path / "o", "eval/score")[-1] == pytest.approx(statistics.mean(grades), abs=1e-4)
    gold = [sum(map(str.islower, s.texts[0])) / max(1, len(s.texts[0])) for s in samples]
    assert scalars(tmp_path / "o", "eval/gold")[-1] == pytest.approx(statistics.mean(gold), abs=1e-5)
    assert all(0 < score < 5 for score in scalars(tmp_path / "o", "objective/scores"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--k", 1], "--k 1: must be a number of 2 or more"),
        (["--beta", 0], "--beta 0.0: must be a number of 1e-06 or more"),
        (["--label-smoothing", 0.5], "--label-smoothing 0.5: must be less than 0.5"),
        (["--refresh-reference", -1], "--refresh-reference -1: must be a number of 0 or more"),
        (["--micro-batch-size", 3], "--micro-batch-size: must divide --prompts-per-step"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(online_dpo, *tiny_flags, *flags)

"""feedback/pair_ranker.py: its loss, its probabilities, its runs, its reward. What it shares with reward_model.py is tested there."""

import itertools
import json
import math
import random

import pytest
import torch
from conftest import moments, run_in_two_processes, run_script, scalars
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pair_ranker
import rloo

# ---- the algorithm


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_loss_golden():
    first = torch.tensor([2.0, 0.0, -1.0])  # z(w, l)
    second = torch.tensor([1.0, 0.0, -3.0])  # z(l, w)
    losses = pair_ranker.pair_ranker_loss(first, second).tolist()
    assert losses[0] == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-6)
    assert losses[1] == pytest.approx(math.log(2))
    assert losses[2] == pytest.approx((math.log1p(math.e) + math.log1p(math.exp(-3))) / 2)


def test_a_step_raises_z_with_the_chosen_answer_first_and_lowers_it_with_the_rejected_one():
    first, second = torch.zeros(2, 1, requires_grad=True)
    loss = pair_ranker.pair_ranker_loss(first, second).sum()
    gradients = torch.autograd.grad(loss, (first, second))
    assert [g.item() for g in gradients] == [-0.25, 0.25]


def test_probabilities_golden_and_antisymmetric():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    probabilities = pair_ranker.win_probabilities(logits, logits.T)
    assert (
        probabilities[0, 1].item()
        == pytest.approx((sigmoid(2) + 1 - sigmoid(1)) / 2)
        == pytest.approx(0.57487, abs=1e-5)
    )
    assert probabilities[1, 0].item() == pytest.approx(0.42513, abs=1e-5)
    logits = 5 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    probabilities = pair_ranker.win_probabilities(logits, logits.T)
    assert torch.allclose(probabilities + probabilities.T, torch.ones(7, 7), atol=1e-6)


def test_win_rates_golden():
    probabilities = torch.tensor([[0.5, 0.8, 0.6], [0.2, 0.5, 0.3], [0.4, 0.7, 0.5]])
    assert pair_ranker.win_rates(probabilities).tolist() == pytest.approx([0.7, 0.25, 0.55])
    assert pair_ranker.win_rates(torch.tensor([[0.5]])).tolist() == [0.5]  # a lone answer


def test_a_new_head_starts_as_the_difference_of_two_scores(tiny):
    model, tokenizer = pair_ranker.load_model(tiny, AutoModelForSequenceClassification, num_labels=2)
    pair_ranker.prepare_ranker(pair_ranker.Args(), model, tokenizer)
    assert torch.equal(model.score.weight[1], -model.score.weight[0]) and model.score.weight.abs().sum() > 0


# ---- runs


def word(rng, letters):
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 8)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """20 prompts with 3 pairs each: the answer in lower case is the chosen one."""
    rng = random.Random(0)
    rows = []
    for i in range(20):
        for _ in range(3):
            row = {"prompt": f"Say {i}", "chosen": word(rng, "abcde"), "rejected": word(rng, "VWXYZ")}
            rows.append(row)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def flags(tiny, pairs):
    flags = f"--model {tiny} --dataset {pairs} --chat --precision fp32 --eval-prompts 4 --pairs-per-prompt 2"
    return (flags + " --learning-rate 3e-3 --warmup-steps 0 --total-steps 20 --save-every 10").split()


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranker") / "o"
    run_script(pair_ranker, *flags, "--output-dir", out)
    return out


def test_it_learns_and_shows_it(finished):
    assert scalars(finished, "eval/accuracies")[-1] == 1
    assert scalars(finished, "eval/loss")[-1] < 0.3 < scalars(finished, "eval/loss")[0]
    assert scalars(finished, "loss/ranker")[0] > scalars(finished, "loss/ranker")[-1]


def test_resume_is_bit_exact(finished, tmp_path):
    import shutil

    shutil.copytree(finished / "checkpoint-10", tmp_path / "o/checkpoint-10")
    run_script(pair_ranker, "--resume", tmp_path / "o/checkpoint-10")
    weights, again = (load_file(path / "final/model.safetensors") for path in (finished, tmp_path / "o"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def logits_alone(folder, prompt, a, b):
    """z(a, b) of one text, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"<s>user:{prompt}</s><s>assistant:Answer A: {a}\n\nAnswer B: {b}</s>"
    with torch.no_grad():
        return plain_logit(model, tokenizer, text).item()


def plain_logit(model, tokenizer, text):
    """The first output where answer a ends, and the second where the text does."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    before_b = len(tokenizer(text[: text.index("\n\nAnswer B")], add_special_tokens=False)["input_ids"])
    outputs = model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0])
    return outputs[before_b - 1, 0] + outputs[-1, 1]


def test_a_text_is_what_the_page_says_and_rows_give_its_logit(finished):
    network = AutoModelForSequenceClassification.from_pretrained(finished / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    group = pair_ranker.new_group(tokenizer, "Say so", [{"role": "user", "content": "Say so"}])
    answers = ["abc", "XY", "a longer one, of several words"]
    assert [pair_ranker.add_answer(tokenizer, group, answer) for answer in [*answers, "abc"]] == [0, 1, 2, 0]
    logits = pair_ranker.order_logits(pair_ranker.PairLogits(network), group, "cpu")
    for i, j in itertools.permutations(range(3), 2):
        alone = logits_alone(finished / "final", "Say so", answers[i], answers[j])
        assert logits[i, j].item() == pytest.approx(alone, abs=1e-4)


def test_a_step_is_that_of_the_formula_in_both_orders(flags, pairs, tmp_path):
    """Adam's first moment is a tenth of the gradient of the mean over the first two pairs of each prompt."""
    run_script(
        pair_ranker,
        *flags,
        "--total-steps",
        1,
        "--max-grad-norm",
        1e9,
        "--learning-rate",
        0,
        "--output-dir",
        tmp_path / "o",
    )
    model, tokenizer = pair_ranker.load_model(
        str(tmp_path / "o/final"), AutoModelForSequenceClassification, num_labels=2
    )
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    prompts = list(by_prompt)
    order = torch.randperm(len(prompts), generator=pair_ranker.random_stream("held out"))
    train = [prompts[i] for i in order][:-4]
    indices = torch.randperm(len(train), generator=pair_ranker.random_stream("order", 1, 0))[:4]
    total = 0.0
    for i in indices:
        for row in by_prompt[train[i]][:2]:
            for a, b, sign in ((row["chosen"], row["rejected"], 1), (row["rejected"], row["chosen"], -1)):
                text = f"<s>user:{row['prompt']}</s><s>assistant:Answer A: {a}\n\nAnswer B: {b}</s>"
                z = plain_logit(model, tokenizer, text)
                total = total - torch.nn.functional.logsigmoid(sign * z)
    (total / 16).backward()
    for moment, parameter in zip(moments(tmp_path / "o/final"), model.parameters()):
        assert torch.allclose(moment, 0.1 * parameter.grad, atol=1e-6, rtol=1e-3)


def test_micro_batches_and_processes_change_nothing(flags, tmp_path):
    whole = [*flags, "--total-steps", 1, "--max-grad-norm", 1e9]
    run_script(pair_ranker, *whole, "--output-dir", tmp_path / "whole")
    run_script(pair_ranker, *whole, "--micro-batch-size", 1, "--output-dir", tmp_path / "small")
    run_in_two_processes(pair_ranker, *whole, "--output-dir", tmp_path / "two")
    expected = moments(tmp_path / "whole/final")
    for name in ("small", "two"):
        for moment, other in zip(expected, moments(tmp_path / name / "final")):
            assert torch.allclose(moment, other, atol=1e-6, rtol=1e-3)


def test_long_pairs_and_rows_without_two_answers_are_left_out(tiny, write_jsonl, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(8)]
    rows += [{"prompt": "p", "chosen": "x" * 400, "rejected": "bad"}, {"prompt": "p", "chosen": "", "rejected": "bad"}]
    flags = ["--model", tiny, "--dataset", write_jsonl(rows), "--precision", "fp32", "--max-length", 200]
    run_script(pair_ranker, *flags, "--eval-prompts", 2, "--total-steps", 1, "--output-dir", tmp_path / "o")
    assert "to train on: 6 prompts with 6 pairs\nheld out: 2 prompts with 2 pairs" in capsys.readouterr().out


# ---- as a reward


@pytest.fixture
def ranker(finished, monkeypatch):
    monkeypatch.setenv("PAIR_RANKER", str(finished / "final"))
    pair_ranker.load_ranker.cache_clear()
    yield pair_ranker
    pair_ranker.load_ranker.cache_clear()


def test_win_rate_compares_the_completions_to_a_prompt(ranker, finished):
    prompts = ["Say 1"] * 3 + ["Say 2"]
    completions = ["abc", "XYZ", [{"role": "assistant", "content": "abc"}], "alone"]
    rates = ranker.win_rate(prompts, completions, other=[0] * 4)
    first, second = (logits_alone(finished / "final", "Say 1", *pair) for pair in (("abc", "XYZ"), ("XYZ", "abc")))
    probability = (sigmoid(first) + 1 - sigmoid(second)) / 2
    with_copy = (probability + 0.5) / 2  # "abc" was given twice
    assert rates == pytest.approx([with_copy, 1 - probability, with_copy, 0.5], abs=0.02)  # bf16, where it is fast
    assert probability > 0.6


def test_a_copy_counts_as_often_as_it_was_given(ranker, finished):
    """P(a over b) = p: of a, a, b, an a wins (1/2 + p) / 2, and b 1 - p. The mean is 1/2."""
    a, _, b = rates = ranker.win_rate(["p"] * 3, ["abc", "abc", "12"])
    p, _ = ranker.win_rate(["p"] * 2, ["abc", "12"])
    assert p != 0.5 and math.isclose(a, (0.5 + p) / 2, abs_tol=1e-6) and math.isclose(b, 1 - p, abs_tol=1e-6)
    assert math.isclose(sum(rates) / 3, 0.5, abs_tol=1e-6)


def test_rloo_trains_on_it(ranker, tiny, tmp_path):
    spec = f"{ranker.__file__}:win_rate"
    flags = ["--model", tiny, "--precision", "fp32", "--total-steps", 2, "--eval-prompts", 2, "--max-new-tokens", 6]
    flags += ["--prompts-per-step", 4, "--micro-batch-size", 2]
    run_script(rloo, *flags, "--reward", spec, "--output-dir", tmp_path / "o")
    assert scalars(tmp_path / "o", "objective/scores") == pytest.approx([0.5, 0.5], abs=1e-3)
    assert min(scalars(tmp_path / "o", "policy/grad_norm")) > 0


def test_without_a_ranker_it_says_what_to_set(monkeypatch):
    monkeypatch.delenv("PAIR_RANKER", raising=False)
    pair_ranker.load_ranker.cache_clear()
    with pytest.raises(SystemExit, match="PAIR_RANKER: set this"):
        pair_ranker.win_rate(["p"], ["a"])


def test_the_folder_of_a_reward_model_is_none(tmp_path, monkeypatch):
    (tmp_path / "args.json").write_text(json.dumps({"chat": False, "dataset": None}))
    monkeypatch.setenv("PAIR_RANKER", str(tmp_path))
    pair_ranker.load_ranker.cache_clear()
    with pytest.raises(SystemExit, match="PAIR_RANKER: set this"):
        pair_ranker.win_rate(["p"], ["a"])

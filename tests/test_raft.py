"""variants/raft.py: what it keeps, its loss, its expected gradient, its runs. What it shares with rloo.py is tested there."""

import itertools
import json
import shutil
import statistics
from pathlib import Path

import numpy
import pytest
import torch
from conftest import moments, plain_logprobs, run_in_two_processes, run_script, scalars, tiny_llama
from test_grpo import close, same
from test_steps import K, REWARD, TEMPERATURE, by_hand, load, logprobs_alone

import raft

KL_COEF, RATE = 2.0, 0.01
KEEPS = pytest.mark.parametrize("keep", ["best", "quantile"])


def kept(is_kept, k):
    """For each prompt the places of what is kept."""
    return [[j for j, good in enumerate(group) if good] for group in is_kept.view(-1, k).tolist()]


# ---- what is kept


def test_the_best_golden_of_equals_the_first():
    scores = torch.tensor([1.0, 5, 2, 5, 5, 5, -3, -2])
    is_kept = raft.select_best(scores, 4)
    assert is_kept.dtype == torch.bool and is_kept.shape == (8,)
    assert kept(is_kept, 4) == [[1], [0]]
    assert kept(raft.select_best(scores, 2), 2) == [[1], [1], [0], [1]]  # responses to one prompt are neighbours
    assert raft.select_best(scores, 1).all()


@pytest.mark.parametrize(
    "quantile, first, second",
    [
        (0.0, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (0.2, [0, 1, 2, 4], [0, 2, 3, 4]),  # place 0.8: both from 1 + 0.8 * (2 - 1) on
        (0.25, [0, 1, 2, 4], [0, 2, 3, 4]),  # place 1 exactly: from 2 on
        (0.3, [0, 2, 4], [0, 2, 3, 4]),  # place 1.2: from 2 + 0.2 * (5 - 2), and 2 + 0.2 * 0
        (0.7, [0, 4], [3, 4]),  # place 2.8: from 5 + 0.8 * (8 - 5), and 2 + 0.8 * (7 - 2)
        (0.9, [4], [3, 4]),
        (1.0, [4], [3, 4]),
    ],
)
def test_above_a_quantile_golden(quantile, first, second):
    """Linear interpolation between two places; what is at the threshold is kept, and of equals all."""
    scores = torch.tensor([8.0, 2, 5, 1, 9, 2.0, 1, 2, 7, 7, *[0.7] * 5])
    assert kept(raft.select_above(scores, 5, quantile), 5) == [first, second, [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_of_each_prompt_the_best_is_always_kept_and_a_higher_quantile_keeps_fewer(k):
    torch.manual_seed(0)
    scores = torch.cat([torch.randn(200 * k) * 1e3, torch.randint(3, (200 * k,)) / 10])  # many equals
    before = torch.ones_like(scores, dtype=torch.bool)
    for quantile in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        is_kept = raft.select_above(scores, k, quantile)
        assert (is_kept | ~raft.select_best(scores, k)).all() and (before | ~is_kept).all()
        before = is_kept
    groups = scores.view(-1, k)
    assert torch.equal(is_kept, (groups == groups.max(1, keepdim=True).values).view(-1))
    assert raft.select_above(scores, k, 0.0).all()


# ---- the loss


def test_loss_golden_and_the_sign_of_its_gradient():
    logprobs = torch.tensor([[-1.0, -2, -3], [-8, -99, -99]], requires_grad=True)  # 99: padding
    loss = raft.nll_loss(logprobs, torch.tensor([[True, True, True], [True, False, False]]))
    loss.backward()
    assert loss.item() == (1 + 2 + 3 + 8) / 4
    assert logprobs.grad.tolist() == [[-1 / 4, -1 / 4, -1 / 4], [-1 / 4, 0, 0]]


def test_a_step_raises_the_probability_of_what_is_kept():
    model, prompt, responses = tiny_llama(), [5, 9, 30], [[7, 8, 1], [40]]
    rows = raft.make_rows([prompt], [responses], "cpu")
    before = [plain_logprobs(model, prompt, ids).sum().item() for ids in responses]
    raft.nll_loss(raft.ResponseLogprobs(model)(rows), rows.response_mask).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    after = [plain_logprobs(model, prompt, ids).sum().item() for ids in responses]
    assert all(a > b + 0.01 for a, b in zip(after, before))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2])
def test_expected_gradient_is_that_of_learning_from_the_best_of_k(k, length):
    """All groups of k responses of a toy policy. Of 5 tokens one is EOS: 5 responses of one token, 17 of up to two.

    With F(y) = P(score <= that of y), y is the best with probability F(y)^k - F(before y)^k. For one token the
    gradient is that of a softmax, p - P(best): it vanishes where p is the policy's own best of k.
    """
    torch.manual_seed(0)
    logits = torch.randn(5 + 25, dtype=torch.float64, requires_grad=True)
    first, second = logits[:5].log_softmax(0), logits[5:].view(5, 5).log_softmax(1)
    if length == 1:
        logprobs, mask = first[:, None], torch.ones(5, 1, dtype=torch.bool)
    else:
        pairs = [torch.stack([first[a], second[a, b]]) for a in range(1, 5) for b in range(5)]
        logprobs = torch.stack([torch.stack([first[0], 0 * first[0]]), *pairs])
        mask = torch.tensor([[True, False]] + [[True, True]] * 20)
    n = len(logprobs)
    log_p = (logprobs * mask).sum(1)
    p, scores = log_p.detach().exp(), torch.randn(n, dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1) and len(set(scores.tolist())) == n

    expected_loss = 0.0
    for group in itertools.product(range(n), repeat=k):
        g = torch.tensor(group)
        chosen = g[raft.select_best(scores[g], k)]
        expected_loss = expected_loss + p[g].prod() * raft.nll_loss(logprobs[chosen], mask[chosen])
    (gradient,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)

    up_to = torch.stack([p[scores <= score].sum() for score in scores])
    below = torch.stack([p[scores < score].sum() for score in scores])
    p_best = up_to**k - below**k
    assert p_best.sum().item() == pytest.approx(1)
    closed_form = -(p_best * log_p / mask.sum(1)).sum()
    (expected,) = torch.autograd.grad(closed_form, logits, retain_graph=True)
    assert torch.allclose(gradient, expected, atol=1e-12)
    if length == 1:
        assert torch.allclose(gradient[:5], p - p_best, atol=1e-12)  # 0 for k = 1, where nothing is chosen
    if k > 1:
        assert gradient.abs().max() > 0.01
        (of_reward,) = torch.autograd.grad(-(log_p.exp() * scores).sum(), logits, retain_graph=True)
        assert torch.cosine_similarity(gradient, of_reward, dim=0) < 0.99


# ---- whole steps against the formula, one response at a time


@pytest.fixture
def flags(tiny_with_stops, tmp_path):
    """As in test_steps.py: 14 prompts, each with a weight of its own in its score, 4 a step."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [dict(prompt="abcdefghijklmnop"[i:] + "?" * i * i, weight=(-1) ** i * (1 + i / 5)) for i in range(14)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--reward {tmp_path}/reward.py:score --dataset {tmp_path}/prompts.jsonl --model {tiny_with_stops}"
    flags += f" --precision fp32 --k {K} --temperature {TEMPERATURE} --kl-coef {KL_COEF} --max-grad-norm 1e9"
    flags += " --prompts-per-step 4 --micro-batch-size 2 --max-new-tokens 6 --max-prompt-length 400 --eval-prompts 0"
    return [*flags.split(), "--warmup-steps", 0, "--learning-rate", RATE]


@pytest.fixture
def sampled(monkeypatch):
    """The samples of each step."""
    calls = []
    real = raft.sample_responses

    def record(*arguments):
        samples = real(*arguments)
        calls.append(list(samples))  # a copy: the script sorts its list
        return samples

    monkeypatch.setattr(raft, "sample_responses", record)
    return calls


def choose(rewards, k, quantile):
    """The places of what is kept, among all. quantile None: the best."""
    places = []
    for i in range(0, len(rewards), k):
        group = rewards[i : i + k]
        if quantile is None:
            places.append(i + group.index(max(group)))
        else:
            threshold = numpy.quantile(group, quantile)
            places += [i + j for j, reward in enumerate(group) if reward >= threshold]
    return places


def kls_of(logprobs, ref_logprobs):
    return [(a - b).sum().item() for a, b in zip(logprobs, ref_logprobs)]


@pytest.mark.parametrize("keep, quantile", [("best", None), ("quantile", 0.4)])
def test_the_gradient_of_a_step_is_that_of_the_formula(keep, quantile, flags, sampled, tiny_with_stops, tmp_path):
    """The third step, where the policy has left the reference: the KL changes the choice."""
    out = tmp_path / "o"
    more = ["--keep", keep, "--quantiles", 0, 1, 0.4, "--total-steps", 3, "--save-every", 1]
    run_script(raft, *flags, *more, "--output-dir", out)
    answers = by_hand(sampled[2])
    scores = [score for *_, score in answers]
    policy, reference = load(out / "checkpoint-2"), load(tiny_with_stops)
    logprobs, ref_logprobs = logprobs_alone(policy, answers), logprobs_alone(reference, answers)
    kls = kls_of(logprobs, ref_logprobs)
    chosen = choose([score - KL_COEF * kl for score, kl in zip(scores, kls)], K, quantile)
    assert chosen != choose(scores, K, quantile)
    assert len({len(answers[i][1]) for i in chosen}) > 1  # the mean over tokens is not that over responses
    loss = -torch.cat([logprobs[i] for i in chosen]).mean()

    expected = torch.autograd.grad(loss, list(policy.parameters()))
    averages = zip(moments(out / "checkpoint-2"), moments(out / "final"))
    gradient = [(after - 0.9 * before) / 0.1 for before, after in averages]  # of Adam's average
    assert len(gradient) == len(expected)
    for a, b in zip(gradient, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert max(b.abs().max() for b in expected) > 0.05

    n_tokens = sum(len(ids) for _, ids, _ in answers)
    curves = {
        "objective/scores": statistics.mean(scores),
        "objective/kl": statistics.mean(kls),
        "objective/rlhf_reward": statistics.mean(scores) - KL_COEF * statistics.mean(kls),
        "objective/entropy": -torch.cat(logprobs).sum().item() / n_tokens,
        "objective/kept": len(chosen) / len(answers),
        "objective/kept_scores": statistics.mean(scores[i] for i in chosen),
        "loss/policy": loss.item(),
        "policy/grad_norm": torch.cat([b.flatten() for b in expected]).norm().item(),
        "val/response_length": n_tokens / len(answers),
    }
    for tag, value in curves.items():
        assert scalars(out, tag)[2] == pytest.approx(value, rel=1e-4, abs=1e-4)


@KEEPS
def test_with_one_response_a_prompt_it_is_sft_on_ones_own_samples(keep, flags, sampled, tiny_with_stops, tmp_path):
    more = ["--k", 1, "--keep", keep, "--total-steps", 1, "--output-dir", tmp_path / "o"]
    run_script(raft, *flags, *more)
    answers = by_hand(sampled[0])
    assert len(answers) == 4 and len({len(ids) for _, ids, _ in answers}) > 1
    model = load(tiny_with_stops)
    loss = -torch.cat(logprobs_alone(model, answers)).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for average, b in zip(moments(tmp_path / "o/final"), expected, strict=True):
        assert (average / 0.1 - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert scalars(tmp_path / "o", "objective/kept") == [1]
    assert scalars(tmp_path / "o", "loss/policy") == [pytest.approx(loss.item(), rel=1e-5)]


def test_several_improve_steps_are_updates_by_hand_on_the_same_choice(flags, sampled, tiny_with_stops, tmp_path):
    """Two steps of two. What is kept is chosen before the first update."""
    more = ["--improve-steps", 2, "--total-steps", 2, "--output-dir", tmp_path / "o"]
    run_script(raft, *flags, *more)
    assert len(sampled) == 2
    model, reference, losses = load(tiny_with_stops), load(tiny_with_stops), []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for samples, learning_rate in zip(sampled, (RATE, RATE / 2)):
        optimizer.param_groups[0]["lr"] = learning_rate
        answers = by_hand(samples)
        kls = kls_of(logprobs_alone(model, answers), logprobs_alone(reference, answers))
        chosen = choose([score - KL_COEF * kl for (*_, score), kl in zip(answers, kls)], K, None)
        for _ in range(2):
            loss = -torch.cat(logprobs_alone(model, [answers[i] for i in chosen])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    expected = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    for a, b in zip(moments(tmp_path / "o/final"), expected, strict=True):
        assert (a - b).abs().max() < 1e-3 * b.abs().max()
    means = [statistics.mean(losses[:2]), statistics.mean(losses[2:])]
    assert scalars(tmp_path / "o", "loss/policy") == pytest.approx(means, rel=1e-4)
    assert losses[1] < losses[0] - 0.01
    state = torch.load(tmp_path / "o/final/trainer_state.pt")
    assert state["step"] == 2
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {2 * 2}


def test_each_quantile_has_its_share_of_the_steps(flags, sampled, tmp_path):
    """Seven steps, three quantiles; without a learning rate there is no KL."""
    more = ["--keep", "quantile", "--quantiles", 0, 0.4, 1, "--total-steps", 7, "--learning-rate", 0]
    run_script(raft, *flags, *more, "--output-dir", tmp_path / "o")
    shares = []
    for samples, quantile in zip(sampled, [0, 0, 0, 0.4, 0.4, 1, 1], strict=True):
        scores = [score for *_, score in by_hand(samples)]
        shares.append(len(choose(scores, K, quantile)) / len(scores))
    assert shares[2] == 1 > shares[3] and shares[4] > shares[5]
    assert scalars(tmp_path / "o", "objective/kept") == pytest.approx(shares)


# ---- runs


@KEEPS
def test_micro_batches_change_nothing(keep, flags, tmp_path):
    more = ["--keep", keep, "--quantiles", 0.4, "--improve-steps", 2, "--total-steps", 1]
    for size in (1, 2, 4):
        run_script(raft, *flags, *more, "--micro-batch-size", size, "--output-dir", tmp_path / str(size))
        assert close(tmp_path / str(size), tmp_path / "1")
        for tag in ("loss/policy", "objective/entropy", "objective/kept", "objective/kept_scores"):
            assert scalars(tmp_path / str(size), tag) == pytest.approx(scalars(tmp_path / "1", tag), rel=1e-5)


def test_two_processes_equal_one(flags, sampled, tmp_path):
    """Where they keep unequal numbers of tokens."""
    more = "--keep quantile --quantiles 0.4 --improve-steps 2 --prompts-per-step 8 --total-steps 1".split()
    one, two = tmp_path / "one", tmp_path / "two"
    run_script(raft, *flags, *more, "--output-dir", one)
    answers = by_hand(sampled[0])
    chosen = choose([score for *_, score in answers], K, 0.4)
    lengths = [[len(answers[i][1]) for i in chosen if i // (4 * K) == process] for process in (0, 1)]
    assert sum(lengths[0]) != sum(lengths[1])
    run_in_two_processes(raft, *flags, *more, "--output-dir", two)
    assert close(two, one)
    for tag in ("objective/scores", "objective/kl", "objective/kept", "loss/policy", "val/response_length"):
        assert scalars(two, tag) == pytest.approx(scalars(one, tag), abs=1e-5)


@KEEPS
def test_resume_is_bit_exact_and_the_table_has_a_kl(keep, flags, tmp_path, capsys):
    more = ["--keep", keep, "--quantiles", 0, 0.4, 1, "--improve-steps", 2, "--total-steps", 4, "--save-every", 1]
    run_script(raft, *flags, *more, "--eval-prompts", 3, "--output-dir", tmp_path / "o")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "  kl " in line] == ["SFT", "trained"]
    shutil.copytree(tmp_path / "o/checkpoint-1", tmp_path / "p/checkpoint-1")
    run_script(raft, "--resume", tmp_path / "p/checkpoint-1")
    assert same(tmp_path / "p/final", tmp_path / "o/final")
    assert not same(tmp_path / "p/final", tmp_path / "o/checkpoint-1")
    for tag in ("loss/policy", "objective/kept"):
        assert scalars(tmp_path / "p", tag) == scalars(tmp_path / "o", tag)[1:]
    assert len(set(scalars(tmp_path / "o", "objective/kept"))) == (1 if keep == "best" else 3)
    saved = [json.loads((tmp_path / run / "final/args.json").read_text())["quantiles"] for run in "op"]
    assert saved == [[0, 0.4, 1]] * 2


def test_a_scorer_that_fails_stops_the_run_and_keeps_the_weights(tiny_flags, tmp_path, capsys):
    """In the third step of four. The run goes on as if it had not been stopped."""
    text = Path(tiny_flags[1].partition(":")[0]).read_text().replace("def score", "def letters")
    text += "calls = []\ndef score(**columns):\n    calls.append(1)\n    if len(calls) == 3:\n"
    text += "        raise ConnectionError('service down')\n    return letters(**columns)\n"
    (tmp_path / "fails.py").write_text(text)
    flags = [*tiny_flags, "--eval-prompts", 0]
    run_script(raft, *flags, "--output-dir", tmp_path / "o")
    with pytest.raises(SystemExit, match="^step 2: the mean score is nan; see --reward$"):
        run_script(raft, *flags, "--reward", f"{tmp_path}/fails.py:score", "--output-dir", tmp_path / "p")
    said = capsys.readouterr().err
    assert "ConnectionError: service down" in said and f"--resume {tmp_path}/p/checkpoint-2" in said
    assert [path.name for path in (tmp_path / "p").iterdir() if path.is_dir()] == ["checkpoint-2"]
    run_script(raft, "--resume", tmp_path / "p/checkpoint-2", "--reward", tiny_flags[1])
    assert same(tmp_path / "p/final", tmp_path / "o/final")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--k", 0], "--k 0: must be a number of 1 or more"),
        (["--improve-steps", 0], "--improve-steps 0: must be a number of 1 or more"),
        (["--keep", "quantile", "--quantiles"], r"--quantiles \[\]: numbers from 0 to 1"),
        (["--quantiles", 0.7, 1.1], r"--quantiles \[0.7, 1.1\]: numbers from 0 to 1"),
        (["--kl-coef", -0.1], "--kl-coef -0.1: must be a number of 0 or more"),
        (["--micro-batch-size", 3], "--micro-batch-size: must divide --prompts-per-step"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(raft, *tiny_flags, *flags)


def test_a_score_exactly_at_its_quantile_is_kept():
    """In fp32 the quantile of 26 scores at 0.6, the sixteenth, is rounded past it."""
    scores = torch.arange(26.0)
    assert raft.select_above(scores, 26, 0.6).tolist() == [False] * 15 + [True] * 11

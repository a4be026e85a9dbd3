"""variants/grpo.py: its advantages, its KL, its loss, its runs. What it shares with rloo.py is tested there."""

import itertools
import json
import shutil
import statistics

import pytest
import torch
from conftest import grad_norm, moments, run_in_two_processes, run_script, scalars, tiny_llama
from safetensors.torch import load_file
from test_steps import K, REWARD, TEMPERATURE, by_hand, load, logprobs_alone

import grpo
import rloo

EOS = 1
AGGREGATES = pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])


def near(a, b):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), atol=1e-6)


# ---- advantages


def test_advantages_golden():
    rewards = torch.tensor([1.0, 2, 5, 8], dtype=torch.float64)  # mean 4, deviation 3.1623
    assert near(grpo.group_advantages(rewards, 4, "none"), [-3, -2, 1, 4])
    deviation = 10**0.5 + 1e-4
    expected = [-3 / deviation, -2 / deviation, 1 / deviation, 4 / deviation]
    advantages = grpo.group_advantages(rewards, 4, "group")
    assert near(advantages, expected)
    assert advantages.tolist() == pytest.approx([-0.9487, -0.6325, 0.3162, 1.2649], abs=1e-4)
    assert near(grpo.group_advantages(rewards, 4, "batch"), expected)  # of one group


def test_advantages_of_two_groups_golden():
    """Responses to one prompt are neighbours: their deviations are 0.5 ** 0.5 and 4.5 ** 0.5, that of all 10 ** 0.5."""
    rewards = torch.tensor([1.0, 2, 5, 8], dtype=torch.float64)
    assert near(grpo.group_advantages(rewards, 2, "none"), [-0.5, 0.5, -1.5, 1.5])
    one, two, both = 0.5**0.5 + 1e-4, 4.5**0.5 + 1e-4, 10**0.5 + 1e-4
    assert near(grpo.group_advantages(rewards, 2, "group"), [-0.5 / one, 0.5 / one, -1.5 / two, 1.5 / two])
    assert near(grpo.group_advantages(rewards, 2, "batch"), [-0.5 / both, 0.5 / both, -1.5 / both, 1.5 / both])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage(scale):
    for k in (2, 3, 4, 6, 8):
        for value in (0.7, 10.1, 1000.1):  # in fp32 the mean of equal numbers may be another
            assert not grpo.group_advantages(torch.full((2 * k,), value), k, scale).any()
    mixed = grpo.group_advantages(torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0, 0.0]), 3, scale)
    assert mixed[:3].tolist() == [0, 0, 0]
    assert mixed[3:].abs().min() > 0.3


def test_unscaled_they_are_those_of_rloo_but_for_a_factor():
    rewards = torch.randn(12, dtype=torch.float64)
    for k in (2, 3, 4):
        expected = rloo.rloo_advantages(rewards, k) * (k - 1) / k
        assert torch.allclose(grpo.group_advantages(rewards, k, "none"), expected)


# ---- the KL


def test_k3_golden_and_never_negative():
    logprobs = torch.tensor([[0.5, 0.25, 0.3]]).double().log()
    ref_logprobs = torch.tensor([[0.25, 0.5, 0.3]]).double().log()
    # r = 2: 1/2 - 1 + log 2; r = 1/2: 2 - 1 - log 2; r = 1: 0
    assert near(grpo.k3_kl(logprobs, ref_logprobs), [[0.1931471806, 0.3068528194, 0]])
    torch.manual_seed(0)
    logprobs, ref_logprobs = -torch.rand(2, 1000, 3) * 5
    assert grpo.k3_kl(logprobs, ref_logprobs).min() >= 0
    assert not grpo.k3_kl(logprobs, logprobs).any()


def test_the_mean_of_k3_is_the_kl():
    """Over all tokens of a vocabulary, and nearly over sampled ones."""
    torch.manual_seed(0)
    log_p, log_ref = torch.randn(2, 5, 7, dtype=torch.float64).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_ref)).sum(1)
    assert kl.min() > 0.1
    assert torch.allclose((log_p.exp() * grpo.k3_kl(log_p, log_ref)).sum(1), kl)
    tokens = torch.multinomial(log_p.exp(), 20_000, replacement=True)
    sampled = grpo.k3_kl(log_p.gather(1, tokens), log_ref.gather(1, tokens)).mean(1)
    assert torch.allclose(sampled, kl, rtol=0.1)


# ---- the loss

VALUES = torch.tensor([[1.0, 2, 6], [8, 99, 99]])  # 99: padding
MASK = torch.tensor([[True, True, True], [True, False, False]])
MEANS = {"sequence": (9 / 3 + 8) / 2, "token": (9 + 8) / 4, "constant": (9 + 8) / (2 * 5)}  # of at most 5 tokens


@AGGREGATES
def test_aggregate_golden_and_padding_changes_nothing(aggregate):
    assert grpo.aggregate_tokens(VALUES, MASK, aggregate, 2, 5).item() == pytest.approx(MEANS[aggregate])
    wider = torch.nn.functional.pad(VALUES, (0, 2), value=-7.0), torch.nn.functional.pad(MASK, (0, 2))
    assert grpo.aggregate_tokens(*wider, aggregate, 2, 5).item() == pytest.approx(MEANS[aggregate])
    others = torch.where(MASK, VALUES, -1e6)
    assert grpo.aggregate_tokens(others, MASK, aggregate, 2, 5).item() == pytest.approx(MEANS[aggregate])


@AGGREGATES
def test_loss_golden_sign_and_clipping(aggregate):
    """Within 0.7 .. 1.1. What moved far enough in the good direction gets no gradient; what moved in the wrong one does."""
    ratio = torch.tensor([[1.05, 1.2, 0.5], [0.8, 1.2, 0.5], [0.75, 1.0, 9.0]])
    logprobs = (ratio.log() - 1).requires_grad_()
    advantages = torch.tensor([2.0, -1.0, 3.0])
    mask = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
    token_losses = grpo.grpo_loss(logprobs, torch.full((3, 3), -1.0), advantages, 0.3, 0.1)
    loss = grpo.aggregate_tokens(token_losses, mask, aggregate, 7 / 3, 4)
    loss.backward()
    terms = [[2 * 1.05, 2 * 1.1, 2 * 0.5], [-0.8, -1.2, -0.7], [3 * 0.75]]
    slopes = torch.tensor([[2 * 1.05, 0, 2 * 0.5], [-0.8, -1.2, 0], [3 * 0.75, 0, 0]])  # of a ratio: itself
    if aggregate == "sequence":
        expected = statistics.mean(statistics.mean(row) for row in terms)
        weights = torch.tensor([[1 / 9], [1 / 9], [1 / 3]])
    else:
        n = {"token": 7, "constant": 3 * 4}[aggregate]
        expected = sum(map(sum, terms)) / n
        weights = torch.tensor(1 / n)
    assert loss.item() == pytest.approx(-expected, rel=1e-5)
    assert torch.allclose(logprobs.grad, -slopes * weights, atol=1e-6)


@pytest.mark.parametrize("clip", [(1e-6, 1e-6), (0.2, 0.28)])
def test_at_a_ratio_of_one_nothing_is_clipped(clip):
    logprobs = torch.tensor([[-1.0, -2], [-3, -4]], requires_grad=True)
    grpo.grpo_loss(logprobs, logprobs.detach(), torch.tensor([2.0, -1.0]), *clip).sum().backward()
    assert logprobs.grad.tolist() == [[-2, -2], [1, 1]]


def test_the_first_update_of_dr_grpo_is_rloos_but_for_a_factor():
    torch.manual_seed(0)
    k, max_new_tokens = 4, 9
    logprobs = -torch.rand(8, 6, dtype=torch.float64).requires_grad_()
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5, 2, 4, 6, 1])[:, None]
    rewards = torch.randn(8, dtype=torch.float64)
    expected = rloo.policy_gradient_loss(logprobs, mask, rloo.rloo_advantages(rewards, k))
    advantages = grpo.group_advantages(rewards, k, "none")
    token_losses = grpo.grpo_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2)
    loss = grpo.aggregate_tokens(token_losses, mask, "constant", None, max_new_tokens)
    (a,) = torch.autograd.grad(loss * max_new_tokens * k / (k - 1), logprobs)
    (b,) = torch.autograd.grad(expected, logprobs)
    assert torch.allclose(a, b)
    assert b.abs().max() > 0.05


@pytest.mark.parametrize("k", [2, 3])
def test_expected_gradient_of_dr_grpo_is_that_of_the_exact_objective(k):
    """All responses of a toy policy: E[gradient of the loss] * R * k / (k - 1) = -gradient of E[score]."""
    model = tiny_llama(vocab=4)
    responses = [[EOS]] + [[a, EOS] for a in (0, 2, 3)] + [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]
    rows = grpo.make_rows([[2, 3, 0]], [responses], "cpu")
    mask = rows.response_mask
    scores = torch.randn(len(responses), dtype=torch.float64)
    logprobs = grpo.ResponseLogprobs(model)(rows, 1.0).double()
    log_p = (logprobs * mask).sum(1)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    exact = torch.autograd.grad(-(log_p.exp() * scores).sum(), list(model.parameters()), retain_graph=True)

    expected_loss, p = 0.0, log_p.detach().exp()
    for group in itertools.product(range(len(responses)), repeat=k):
        g = list(group)
        advantages = grpo.group_advantages(scores[g], k, "none")
        token_losses = grpo.grpo_loss(logprobs[g], logprobs[g].detach(), advantages, 0.2, 0.2)
        loss = grpo.aggregate_tokens(token_losses, mask[g], "constant", None, 2)
        expected_loss += p[g].prod() * loss
    estimate = torch.autograd.grad(expected_loss * 2 * k / (k - 1), list(model.parameters()))
    for a, b in zip(exact, estimate):
        assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert max(a.abs().max() for a in exact) > 1e-2


# ---- whole steps against the formula, one response at a time

KL_COEF, MAX_NEW_TOKENS, CLIP_LOW, CLIP_HIGH, RATE = 0.1, 6, 0.1, 0.05, 0.001
SCALES = {"sequence": "group", "token": "batch", "constant": "none"}  # so that each of them is in a run


@pytest.fixture
def steps_flags(tiny_with_stops, tmp_path):
    """As in test_steps.py: 14 prompts, each with a weight of its own in its score, 4 a step."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [dict(prompt="abcdefghijklmnop"[i:] + "?" * i * i, weight=(-1) ** i * (1 + i / 5)) for i in range(14)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--reward {tmp_path}/reward.py:score --dataset {tmp_path}/prompts.jsonl --model {tiny_with_stops}"
    flags += f" --precision fp32 --k {K} --temperature {TEMPERATURE} --kl-coef {KL_COEF} --max-grad-norm 1e9"
    flags += f" --prompts-per-step 4 --micro-batch-size 2 --max-new-tokens {MAX_NEW_TOKENS} --max-prompt-length 400"
    flags += f" --clip-low {CLIP_LOW} --clip-high {CLIP_HIGH} --eval-prompts 0 --warmup-steps 0 --learning-rate {RATE}"
    return flags.split()


@pytest.fixture
def sampled(monkeypatch):
    """The samples of each step."""
    calls = []
    real = grpo.sample_responses

    def record(*arguments):
        samples = real(*arguments)
        calls.append(list(samples))  # a copy: the script sorts its list
        return samples

    monkeypatch.setattr(grpo, "sample_responses", record)
    return calls


def loss_by_hand(aggregate, answers, logprobs, old_logprobs, ref_logprobs, clip):
    """(the loss, how many tokens are clipped below, and above)."""
    scores = [score for *_, score in answers]
    n_tokens = sum(len(ids) for _, ids, _ in answers)
    loss, below, above = 0.0, 0, 0
    for i, (new, old, ref) in enumerate(zip(logprobs, old_logprobs, ref_logprobs)):
        group = scores[i // K * K : i // K * K + K]
        advantage = scores[i] - statistics.mean(group)
        if aggregate == "sequence":
            advantage /= statistics.stdev(group) + 1e-4
            weight = 1 / len(new) / len(answers)
        elif aggregate == "token":
            advantage /= statistics.stdev(scores) + 1e-4
            weight = 1 / n_tokens
        else:
            weight = 1 / MAX_NEW_TOKENS / len(answers)
        for a, b, c in zip(new, old.tolist(), ref.tolist()):
            ratio = (a - b).exp()
            term = ratio * advantage
            if clip and advantage < 0 and ratio < 1 - CLIP_LOW:
                term, below = (1 - CLIP_LOW) * advantage, below + 1
            if clip and advantage > 0 and ratio > 1 + CLIP_HIGH:
                term, above = (1 + CLIP_HIGH) * advantage, above + 1
            kl = (c - a).exp() - (c - a) - 1
            loss = loss - weight * (term - KL_COEF * kl)
    return loss, below, above


@AGGREGATES
def test_the_gradient_of_a_step_is_that_of_the_formula(aggregate, steps_flags, sampled, tiny_with_stops, tmp_path):
    """The third step, where the policy has left the reference."""
    out = tmp_path / "o"
    more = ["--aggregate", aggregate, "--scale", SCALES[aggregate], "--total-steps", 3, "--save-every", 1]
    run_script(grpo, *steps_flags, *more, "--output-dir", out)
    answers = by_hand(sampled[2])
    scores = [score for *_, score in answers]
    assert len(set(scores)) > 2 * K
    assert len({len(ids) for _, ids, _ in answers}) > 2
    policy, reference = load(out / "checkpoint-2"), load(tiny_with_stops)
    logprobs, ref_logprobs = logprobs_alone(policy, answers), logprobs_alone(reference, answers)
    old_logprobs = [logprob.detach() for logprob in logprobs]
    loss, *clipped = loss_by_hand(aggregate, answers, logprobs, old_logprobs, ref_logprobs, clip=True)
    assert clipped == [0, 0]

    expected = torch.autograd.grad(loss, list(policy.parameters()))
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
        "objective/scores": statistics.mean(scores),
        "objective/kl": kl,
        "objective/equal_groups": sum(len(set(scores[i : i + K])) == 1 for i in range(0, len(scores), K)),
        "objective/entropy": -torch.cat(logprobs).sum().item() / n_tokens,
        "loss/policy": loss.item(),
        "policy/grad_norm": torch.cat([b.flatten() for b in expected]).norm().item(),
        "val/response_length": n_tokens / len(answers),
    }
    for tag, value in curves.items():
        assert scalars(out, tag)[2] == pytest.approx(value, rel=1e-4, abs=1e-4)


@AGGREGATES
def test_several_updates_are_those_by_hand(aggregate, steps_flags, sampled, tiny_with_stops, tmp_path):
    """Two steps of three: the old log-probabilities are those of a step's first update, and ratios are clipped."""
    out = tmp_path / "o"
    more = ["--aggregate", aggregate, "--scale", SCALES[aggregate], "--updates-per-batch", 3, "--total-steps", 2]
    run_script(grpo, *steps_flags, *more, "--output-dir", out)
    reference = load(tiny_with_stops)

    def six_updates(clip):
        model, losses, below, above = load(tiny_with_stops), [], 0, 0
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        for samples, learning_rate in zip(sampled, (RATE, RATE / 2), strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate
            answers = by_hand(samples)
            with torch.no_grad():
                old_logprobs, ref_logprobs = logprobs_alone(model, answers), logprobs_alone(reference, answers)
            for _ in range(3):
                logprobs = logprobs_alone(model, answers)
                loss, *clipped = loss_by_hand(aggregate, answers, logprobs, old_logprobs, ref_logprobs, clip)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                below, above = below + clipped[0], above + clipped[1]
        means = [statistics.mean(losses[:3]), statistics.mean(losses[3:])]
        return [optimizer.state[p]["exp_avg"] for p in model.parameters()], means, below, above

    expected, losses, below, above = six_updates(clip=True)
    assert min(below, above) > 5
    averages = moments(out / "final")
    assert len(averages) == len(expected)
    for a, b in zip(averages, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert scalars(out, "loss/policy") == pytest.approx(losses, rel=1e-4, abs=1e-4)
    unclipped, *_ = six_updates(clip=False)
    assert min((a - b).abs().max() / b.abs().max() for a, b in zip(averages, unclipped)) > 0.1
    state = torch.load(out / "final/trainer_state.pt")
    assert state["step"] == 2
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {2 * 3}


# ---- runs


@pytest.fixture(scope="module")
def flags(tiny_flags, tiny_with_stops):
    """Of runs whose responses are of every length: means over tokens are not means over responses."""
    return [*tiny_flags, "--model", tiny_with_stops, "--kl-coef", 0.5]


def same(a, b):
    """Two checkpoints, weights and moments, to the bit."""
    weights = [load_file(path / "model.safetensors") for path in (a, b)]
    states = [torch.load(path / "trainer_state.pt")["optimizer"]["state"] for path in (a, b)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return equal and all(
        torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i]
    )


def close(out, other):
    """Of two runs of a step the gradients and, since these are clipped, their norms before that."""
    a, b = (torch.cat([average.flatten() for average in moments(path / "final")]) / 0.1 for path in (out, other))
    assert b.norm() > 0.01
    return grad_norm(out) == pytest.approx(grad_norm(other), rel=1e-4) and (a - b).abs().max() < 1e-4 * b.abs().max()


@AGGREGATES
def test_micro_batches_change_nothing(aggregate, flags, tmp_path):
    """With two updates: in the second the policy has left the reference and itself."""
    more = ["--aggregate", aggregate, "--updates-per-batch", 2, "--total-steps", 1, "--eval-prompts", 0]
    for size in (1, 2, 4):
        run_script(grpo, *flags, *more, "--micro-batch-size", size, "--output-dir", tmp_path / str(size))
        assert close(tmp_path / str(size), tmp_path / "1")
        for tag in ("loss/policy", "objective/entropy", "val/response_length"):
            assert scalars(tmp_path / str(size), tag) == pytest.approx(scalars(tmp_path / "1", tag), abs=1e-5)


EQUAL = """
def number(prompt, text):
    return 0.5 if len(prompt) % 3 == 0 else sum(map(str.islower, text)) / max(1, len(text))
def score(prompts, completions, **columns):
    return [number(*answer) for answer in zip(prompts, completions)]
"""


def test_two_processes_equal_one_and_count_the_groups_of_equal_scores(flags, sampled, tmp_path):
    (tmp_path / "reward.py").write_text(EQUAL)
    flags = [*flags, "--reward", f"{tmp_path}/reward.py:score", "--aggregate", "token", "--scale", "batch"]
    flags += "--updates-per-batch 2 --prompts-per-step 8 --total-steps 1 --eval-prompts 0".split()
    one, two = tmp_path / "one", tmp_path / "two"
    run_script(grpo, *flags, "--output-dir", one)
    namespace = {}
    exec(EQUAL, namespace)
    equal, tokens = [], []
    for prompt, responses, texts in sampled[0]:
        scores = {namespace["number"](prompt.columns["prompts"], text) for text in texts}
        equal.append(len(scores) == 1)
        tokens.append(sum(map(len, responses)))
    assert 0 < sum(equal[:4]) != sum(equal[4:]) > 0  # the share of each process
    assert sum(tokens[:4]) != sum(tokens[4:])
    assert scalars(one, "objective/equal_groups") == [sum(equal)]

    run_in_two_processes(grpo, *flags, "--output-dir", two)
    assert close(two, one)
    for tag in ("objective/scores", "objective/kl", "objective/equal_groups", "loss/policy", "val/response_length"):
        assert scalars(two, tag) == pytest.approx(scalars(one, tag), abs=1e-5)


def test_resume_is_bit_exact_and_the_table_has_a_kl(flags, tmp_path, capsys):
    more = ["--updates-per-batch", 2, "--save-every", 1]
    run_script(grpo, *flags, *more, "--output-dir", tmp_path / "o")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "  kl " in line] == ["SFT", "trained"]
    shutil.copytree(tmp_path / "o/checkpoint-2", tmp_path / "p/checkpoint-2")
    run_script(grpo, "--resume", tmp_path / "p/checkpoint-2")
    assert same(tmp_path / "p/final", tmp_path / "o/final")
    assert not same(tmp_path / "p/final", tmp_path / "o/checkpoint-2")
    assert scalars(tmp_path / "p", "loss/policy") == scalars(tmp_path / "o", "loss/policy")[2:]
    assert scalars(tmp_path / "o", "eval/kl")[0] == 0


def test_one_update_per_batch_is_never_clipped_and_several_are(flags, tmp_path):
    def go(updates, clip):
        out = tmp_path / f"{updates} {clip}"
        more = ["--updates-per-batch", updates, "--clip-low", clip, "--clip-high", clip]
        run_script(grpo, *flags, *more, "--total-steps", 2, "--eval-prompts", 0, "--output-dir", out)
        return out / "final"

    assert same(go(1, 1e-6), go(1, 1e9))
    assert not same(go(3, 0.01), go(3, 1e9))


def test_without_a_kl_there_is_no_reference(flags, tmp_path, capsys, monkeypatch):
    tiny_coef = [*flags, "--kl-coef", 1e-12, "--output-dir", tmp_path / "tiny"]
    run_script(grpo, *tiny_coef)

    def no_reference(*arguments):
        raise AssertionError("a reference is made")

    monkeypatch.setattr(grpo, "make_reference", no_reference)
    with pytest.raises(AssertionError, match="a reference is made"):
        run_script(grpo, *flags, "--output-dir", tmp_path / "none")

    def table(*more):
        capsys.readouterr()
        run_script(grpo, *more)
        lines = capsys.readouterr().out.splitlines()
        rows = [line for line in lines if "response_length" in line]
        assert not any("kl" in row for row in rows)
        return {row.split()[0]: row.split()[1:] for row in rows}

    out = tmp_path / "o"
    flags = [*flags, "--kl-coef", 0, "--save-every", 1]
    rows = table(*flags, "--output-dir", out)
    assert list(rows) == ["SFT", "trained"]
    assert rows["SFT"] != rows["trained"]
    for tag in ("eval/kl", "objective/kl"):
        with pytest.raises(KeyError):
            scalars(out, tag)
    for tag in ("eval/score", "objective/scores", "loss/policy", "policy/grad_norm"):  # the gradient lacks the KL alone
        assert scalars(out, tag) == pytest.approx(scalars(tmp_path / "tiny", tag), rel=1e-3, abs=1e-6)

    shutil.copytree(out / "checkpoint-2", tmp_path / "p/checkpoint-2")
    assert table("--resume", tmp_path / "p/checkpoint-2") == rows  # SFT is the model before training
    assert same(tmp_path / "p/final", out / "final")
    assert table(*flags, "--eval-only") == {"SFT": rows["SFT"]}
    assert table("--resume", out / "final", "--eval-only") == rows


def test_it_learns(tiny_flags, tmp_path):
    flags = (
        "--total-steps 40 --max-new-tokens 6 --prompts-per-step 8 --micro-batch-size 4 --updates-per-batch 2".split()
    )
    run_script(grpo, *tiny_flags, *flags, "--eval-prompts", 0, "--learning-rate", 3e-3, "--output-dir", tmp_path)
    scores = scalars(tmp_path, "objective/scores")
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.3


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--k", 1], "--k 1: must be a number of 2 or more"),
        (["--clip-low", -1], "--clip-low -1.0: must be a number of 1e-06 or more"),
        (["--clip-high", "nan"], "--clip-high nan: must be a number of 1e-06 or more"),
        (["--updates-per-batch", 0], "--updates-per-batch 0: must be a number of 1 or more"),
        (["--kl-coef", -0.1], "--kl-coef -0.1: must be a number of 0 or more"),
        (["--micro-batch-size", 3], "--micro-batch-size: must divide --prompts-per-step"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(grpo, *tiny_flags, *flags)


@pytest.mark.parametrize("flags", [["--scale", "all"], ["--aggregate", "mean"]])
def test_an_unknown_way_is_refused(flags, tiny_flags):
    with pytest.raises(SystemExit):
        run_script(grpo, *tiny_flags, *flags)

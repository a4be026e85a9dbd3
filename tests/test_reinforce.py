"""reinforce.py: its loss and gradient, its baseline, its runs. What it shares with rloo.py is tested there."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import grad_norm, moments, run_in_two_processes, run_script, scalars, tiny_llama
from safetensors.torch import load_file

import reinforce

EOS = 1


def test_moving_average_golden():
    average = reinforce.moving_average(2.0, 4.0, 0.9)
    assert average == pytest.approx(2.2)
    assert reinforce.moving_average(average, 4.0, 0.9) == pytest.approx(2.38)
    assert reinforce.moving_average(2.0, 4.0, 0) == 4
    assert reinforce.moving_average(2.0, 4.0, 1) == 2


def test_loss_golden_and_sign():
    logprobs = torch.tensor([[-1.0, -2, -0.5], [-3.0, -9, -9]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = reinforce.policy_gradient_loss(logprobs, mask, torch.tensor([2.0, -1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * -3.5 + -1 * -3.0) / 2)  # 2.0
    assert logprobs.grad.tolist() == [[-1.0, -1, -1], [0.5, 0, 0]]  # descent: a good response's tokens go up


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
def test_any_constant_baseline_has_the_exact_expected_gradient(baseline):
    """All responses of a toy policy: E[gradient of the loss] = -gradient of (E[score] - kl_coef * KL)."""
    model, reference = tiny_llama(vocab=4), tiny_llama(vocab=4, seed=1)
    responses = [[EOS]] + [[a, EOS] for a in (0, 2, 3)] + [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]
    rows = reinforce.make_rows([[2, 3, 0]], [responses], "cpu")
    mask = rows.response_mask
    scores, kl_coef = torch.randn(len(responses), dtype=torch.float64), 0.3
    logprobs = reinforce.ResponseLogprobs(model)(rows, 1.0).double()
    ref_logprobs = reinforce.ResponseLogprobs(reference)(rows, 1.0).double().detach()

    log_p = (logprobs * mask).sum(1)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    objective = (log_p.exp() * (scores - kl_coef * (log_p - (ref_logprobs * mask).sum(1)))).sum()
    exact = torch.autograd.grad(-objective, list(model.parameters()), retain_graph=True)

    expected_loss, p = 0.0, log_p.detach().exp()
    rewards = scores - kl_coef * reinforce.sequence_kl(logprobs.detach(), ref_logprobs, mask)
    for i in range(len(responses)):
        one = slice(i, i + 1)
        expected_loss += p[i] * reinforce.policy_gradient_loss(logprobs[one], mask[one], rewards[one] - baseline)
    estimate = torch.autograd.grad(expected_loss, list(model.parameters()))
    for a, b in zip(exact, estimate):
        assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert max(a.abs().max() for a in exact) > 1e-2


# ---- runs


@pytest.fixture(scope="module", params=["moving_average", "none"])
def finished(request, tiny_flags, tiny_with_stops, tmp_path_factory):
    out = tmp_path_factory.mktemp("reinforce") / "a"
    flags = f"--model {tiny_with_stops} --baseline {request.param} --baseline-decay 0.6 --kl-coef 0.5 --save-every 1"
    flags = [*tiny_flags, *flags.split()]
    run_script(reinforce, *flags, "--output-dir", out)
    return request.param, flags, out


moving_average_only = pytest.mark.parametrize("finished", ["moving_average"], indirect=True)


def test_the_baseline_is_the_average_it_says(finished):
    """What is subtracted in a step is known before it: but for the first, whose mean score is all there is."""
    kind, _, out = finished
    used, reward, kl = (scalars(out, f"objective/{tag}") for tag in ("baseline", "rlhf_reward", "kl"))
    expected = [0.0] * 4
    if kind == "moving_average":
        expected = [scalars(out, "objective/scores")[0]]
        for value in reward[:-1]:
            expected.append(0.6 * expected[-1] + 0.4 * value)
    assert used == pytest.approx(expected, abs=1e-5)
    assert abs(kl[0]) < 1e-4 < abs(kl[1])
    assert abs(reward[2] - reward[0]) > 1e-3


def test_resume_is_bit_exact_the_baseline_included(finished, tmp_path):
    _, _, out = finished
    shutil.copytree(out / "checkpoint-2", tmp_path / "checkpoint-2")
    run_script(reinforce, "--resume", tmp_path / "checkpoint-2")
    a, b = (load_file(folder / "final/model.safetensors") for folder in (out, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(folder / "final/trainer_state.pt") for folder in (out, tmp_path))
    assert a["baseline"] == b["baseline"]
    assert scalars(tmp_path, "objective/baseline") == scalars(out, "objective/baseline")[2:]
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[name], b["optimizer"]["state"][i][name]) for name in state)


@moving_average_only
def test_resume_without_a_baseline_takes_none(finished, tmp_path):
    shutil.copytree(finished[2] / "checkpoint-2", tmp_path / "checkpoint-2")
    run_script(reinforce, "--resume", tmp_path / "checkpoint-2", "--baseline", "none")
    assert scalars(tmp_path, "objective/baseline") == [0, 0]


def first_gradient(out):
    gradient = torch.cat([average.flatten() / 0.1 for average in moments(out / "checkpoint-1")])
    assert gradient.norm() > 0.01  # there is something to compare
    return gradient


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_nothing(finished, tmp_path, size):
    _, flags, out = finished
    more = ["--micro-batch-size", size, "--total-steps", 2, "--eval-prompts", 10]
    run_script(reinforce, *flags, *more, "--output-dir", tmp_path / "o")
    assert grad_norm(tmp_path / "o") == pytest.approx(grad_norm(out), rel=1e-4)
    expected = first_gradient(out)
    assert (first_gradient(tmp_path / "o") - expected).abs().max() < 1e-5 * expected.abs().max()


@moving_average_only
def test_two_processes_equal_one(finished, tmp_path):
    """Without a baseline, a process needs nothing of the other but the gradient."""
    _, flags, out = finished
    run_in_two_processes(reinforce, *flags, "--total-steps", 2, "--output-dir", tmp_path / "o")
    assert grad_norm(tmp_path / "o") == pytest.approx(grad_norm(out), rel=1e-4)
    used = scalars(tmp_path / "o", "objective/baseline")
    assert used == pytest.approx(scalars(out, "objective/baseline")[:2], abs=1e-4)
    states = [torch.load(folder / "checkpoint-1/trainer_state.pt") for folder in (tmp_path / "o", out)]
    assert states[0]["baseline"] == pytest.approx(states[1]["baseline"], abs=1e-5)  # of all processes, in each
    expected = first_gradient(out)
    assert (first_gradient(tmp_path / "o") - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_response_per_prompt_will_do(tiny_flags, tmp_path):
    run_script(reinforce, *tiny_flags, "--k", 1, "--output-dir", tmp_path / "o")
    assert len(scalars(tmp_path / "o", "objective/scores")) == 4
    assert min(scalars(tmp_path / "o", "policy/grad_norm")) > 0


def test_it_learns(tiny_flags, tmp_path):
    flags = "--total-steps 80 --max-new-tokens 6 --prompts-per-step 8 --micro-batch-size 4 --kl-coef 0.01".split()
    run_script(reinforce, *tiny_flags, *flags, "--eval-prompts", 0, "--learning-rate", 3e-3, "--output-dir", tmp_path)
    scores = scalars(tmp_path, "objective/scores")
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.3


@pytest.mark.parametrize("step", [1, 3])
def test_a_score_that_is_no_number_stops_the_run_and_keeps_the_last_whole_step(step, finished, tmp_path, capsys):
    kind, flags, out = finished
    (tmp_path / "reward.py").write_text(f"""
calls = []
def score(prompts, completions, **columns):
    calls.append(1)
    values = [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]
    return values[:-1] + [float("nan")] if len(calls) == {step} else values
""")
    more = ["--reward", f"{tmp_path}/reward.py:score", "--eval-prompts", 0]
    with pytest.raises(SystemExit, match=f"step {step - 1}: gradient nan; see --reward"):
        run_script(reinforce, *flags, *more, "--output-dir", tmp_path / "o")
    saved = sorted(path.name for path in (tmp_path / "o").glob("*checkpoint*"))
    assert saved == [f"checkpoint-{i}" for i in range(1, step)]
    if step == 1:
        return
    assert f"--resume {tmp_path}/o/checkpoint-2" in capsys.readouterr().err
    last = tmp_path / "o/checkpoint-2"
    assert all(weight.isfinite().all() for weight in load_file(last / "model.safetensors").values())
    state = torch.load(last / "trainer_state.pt")
    used = scalars(tmp_path / "o", "objective/baseline")
    reward = scalars(tmp_path / "o", "objective/rlhf_reward")
    assert state["step"] == len(used) == 2
    expected = 0.6 * used[-1] + 0.4 * reward[-1] if kind == "moving_average" else 0
    assert state["baseline"] == pytest.approx(expected, abs=1e-5)
    assert Path(last, "args.json").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--k", 0], "--k 0: must be a number of 1 or more"),
        (["--baseline-decay", 1.5], "--baseline-decay 1.5: must be at most 1"),
        (["--baseline-decay", -0.1], "--baseline-decay -0.1: must be a number of 0 or more"),
        (["--baseline-decay", "nan"], "--baseline-decay nan: must be a number of 0 or more"),
        (["--micro-batch-size", 3], "--micro-batch-size: must divide --prompts-per-step"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(reinforce, *tiny_flags, *flags)

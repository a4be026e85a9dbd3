"""REINFORCE: what it does not share with ppo.py."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import grad_norm, run_script, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kv_cache import EOS, left_pad

import reinforce
from reinforce import Args, ResponseLogprobs, completion_mask, ema, generate_penalized, reinforce_loss, sequence_kl

BASELINES = ["ema", "batch", "none"]


def test_ema_starts_from_the_first_value():
    b = ema(None, 2.0, 0.9)
    assert b == 2.0
    b = ema(b, 4.0, 0.9)
    assert b == pytest.approx(2.2) and ema(b, 4.0, 0.9) == pytest.approx(2.38)


def test_loss_golden_and_sign():
    logprobs = torch.tensor([[-1.0, -2, -0.5], [-3.0, -9, -9]], requires_grad=True)
    mask, advantages = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([2.0, -1.0])
    loss = reinforce_loss(logprobs, mask, advantages)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 * -3.5 + -1 * -3.0) / 2)  # 2.0
    assert logprobs.grad.tolist() == [[-1.0, -1, -1], [0.5, 0, 0]]  # descent: a good response's tokens go up


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
def test_any_constant_baseline_has_the_exact_expected_gradient(baseline):
    """All responses of a toy policy: E[grad of the loss] = -grad of E[score] - kl_coef * KL."""
    model, ref = tiny_llama(vocab=4), tiny_llama(vocab=4, seed=1)
    responses = [[EOS]] + [[a, EOS] for a in (0, 2, 3)] + [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]
    ids = torch.tensor([r + [EOS] * (2 - len(r)) for r in responses])
    mask = completion_mask(ids, EOS)
    prompt_ids, prompt_mask = left_pad([[2, 3, 0]], extra=2)
    scores, kl_coef = torch.randn(len(responses), dtype=torch.float64), 0.3
    logprobs = ResponseLogprobs(model)(prompt_ids, prompt_mask, ids, mask, 1.0).double()
    ref_logprobs = ResponseLogprobs(ref)(prompt_ids, prompt_mask, ids, mask, 1.0).double().detach()
    log_p = logprobs.sum(1)
    objective = (log_p.exp() * (scores - kl_coef * (log_p - ref_logprobs.sum(1)))).sum()
    exact = torch.autograd.grad(-objective, list(model.parameters()), retain_graph=True)
    p, rewards = log_p.detach().exp(), scores - kl_coef * sequence_kl(logprobs.detach(), ref_logprobs, mask)
    losses = [p[i] * reinforce_loss(logprobs[i:i + 1], mask[i:i + 1], rewards[i:i + 1] - baseline) for i in range(len(p))]
    estimate = torch.autograd.grad(sum(losses), list(model.parameters()))
    for a, b in zip(exact, estimate):
        assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert max(a.abs().max() for a in exact) > 1e-2


def test_the_batch_mean_as_baseline_has_half_the_gradient_of_two_samples():
    """The mean contains the sample itself: over all pairs of responses, E[grad] is 1 - 1/2 of the exact one."""
    logits, scores = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 3.0, -2.0])
    log_p = logits.log_softmax(0)
    exact, = torch.autograd.grad(-(log_p.exp() * scores).sum(), logits, retain_graph=True)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    losses = [log_p[pair].sum().exp().detach() * reinforce_loss(log_p[pair, None], torch.ones(2, 1), scores[pair] - scores[pair].mean())
              for pair in pairs]
    estimate, = torch.autograd.grad(sum(losses), logits)
    assert torch.allclose(estimate, exact / 2) and exact.abs().max() > 0.1


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_penalised_sampler_against_one_without_cache_or_batch(make, penalty):
    model, k, prompts, temperature = make(vocab=12), 6, [[2, 3, 4], [5], [6, 7, 8, 9, 10]], 0.8
    torch.manual_seed(3)
    uniforms = torch.rand(len(prompts) * k, 12)
    args = Args(temperature=temperature, repetition_penalty=penalty)
    ids = generate_penalized(args, model, *left_pad(prompts), k, uniforms, [EOS])
    lengths, changed = completion_mask(ids, EOS).sum(1), 0
    for i, row in enumerate(ids):
        tokens = []
        for u in uniforms[i]:
            logits = model(torch.tensor([prompts[i // k] + tokens])).logits[0, -1].detach()
            before = logits.clone()
            for token in set(tokens):  # of the response, not of the prompt
                logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
            pick = lambda x: int(torch.searchsorted((x / temperature).softmax(0).cumsum(0), u, right=True))
            changed += pick(logits) != pick(before)
            tokens.append(pick(logits))
            if tokens[-1] == EOS:
                break
        assert row[:lengths[i]].tolist() == tokens
    assert (changed > 0) == (penalty > 1)


@pytest.fixture(scope="module", params=BASELINES)
def finished(request, tiny_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("reinforce") / "a"
    flags = [*tiny_flags, "--baseline", request.param, "--kl-coef", 0.5, "--save-every", 1]
    run_script(reinforce, *flags, "--output-dir", out)
    return request.param, flags, out


def test_the_baseline_is_the_average_it_says(finished):
    baseline, _, out = finished
    events = EventAccumulator(str(out)).Reload()
    used, reward = ([e.value for e in events.Scalars(f"objective/{tag}")] for tag in ("baseline", "rlhf_reward"))
    expected = {"none": [0.0] * 4, "batch": reward, "ema": [reward[0]]}[baseline]
    for value in reward[:-1] if baseline == "ema" else ():
        expected.append(ema(expected[-1], value, 0.9))
    assert used == pytest.approx(expected, abs=1e-5) and abs(reward[3] - reward[0]) > 1e-3
    assert [e.step for e in events.Scalars("eval/score")] == [0, 2, 4]


def weights(out):
    return load_file(Path(out, "model.safetensors"))


def test_resume_is_bit_exact_the_baseline_included(finished, tmp_path):
    _, _, out = finished
    shutil.copytree(out / "checkpoint-2", tmp_path / "checkpoint-2")
    run_script(reinforce, "--resume", tmp_path / "checkpoint-2")
    a, b = weights(out / "final"), weights(tmp_path / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(d / "final/trainer_state.pt")["baseline"] for d in (out, tmp_path))
    assert a == b


@pytest.mark.parametrize("finished", ["ema"], indirect=True)
@pytest.mark.parametrize("baseline", ["none", "batch"])
def test_resume_with_another_baseline_takes_that_one(finished, tmp_path, baseline):
    shutil.copytree(finished[2] / "checkpoint-2", tmp_path / "checkpoint-2")
    run_script(reinforce, "--resume", tmp_path / "checkpoint-2", "--baseline", baseline)
    events = EventAccumulator(str(tmp_path)).Reload()
    used, reward = ([e.value for e in events.Scalars(f"objective/{tag}")] for tag in ("baseline", "rlhf_reward"))
    assert used == pytest.approx([0.0] * 2 if baseline == "none" else reward, abs=1e-5)


@pytest.mark.parametrize("finished", ["none"], indirect=True)
def test_ema_begun_in_the_middle_starts_from_that_batch(finished, tmp_path):
    shutil.copytree(finished[2] / "checkpoint-2", tmp_path / "checkpoint-2")
    run_script(reinforce, "--resume", tmp_path / "checkpoint-2", "--baseline", "ema")
    events = EventAccumulator(str(tmp_path)).Reload()
    used, reward = ([e.value for e in events.Scalars(f"objective/{tag}")] for tag in ("baseline", "rlhf_reward"))
    assert used == pytest.approx([reward[0]] * 2, abs=1e-5) and abs(events.Scalars("objective/kl")[0].value) > 1e-4


def first_gradient(out):
    state = torch.load(Path(out, "checkpoint-1/trainer_state.pt"))["optimizer"]["state"]
    gradient = torch.cat([state[i]["exp_avg"].flatten() / 0.1 for i in state])
    assert gradient.norm() > 0.01
    return gradient


def test_micro_batches_change_nothing(finished, tmp_path):
    _, flags, out = finished
    run_script(reinforce, *flags, "--micro-batch-size", 4, "--total-steps", 1, "--output-dir", tmp_path / "o", "--eval-prompts", 10)
    assert grad_norm(tmp_path / "o") == pytest.approx(grad_norm(out), rel=1e-4)
    expected = first_gradient(out)
    state = torch.load(tmp_path / "o/final/trainer_state.pt")["optimizer"]["state"]
    gradient = torch.cat([state[i]["exp_avg"].flatten() / 0.1 for i in state])
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_processes_equal_one(finished, tmp_path):
    baseline, flags, out = finished
    if baseline == "none":
        pytest.skip("it needs nothing of the other process but the gradient")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(28900 + os.getpid() % 500),
               reinforce.__file__, *map(str, flags), "--total-steps", "2", "--output-dir", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert grad_norm(tmp_path / "o") == pytest.approx(grad_norm(out), rel=1e-4)
    used = [[e.value for e in EventAccumulator(str(o)).Reload().Scalars("objective/baseline")] for o in (out, tmp_path / "o")]
    assert used[1] == pytest.approx(used[0][:2], abs=1e-4)
    expected = first_gradient(out)
    assert (first_gradient(tmp_path / "o") - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_penalty_changes_the_samples_and_one_sample_a_prompt_will_do(tiny_flags, tmp_path):
    scores = {}
    for penalty in (1, 3):
        out = tmp_path / str(penalty)
        run_script(reinforce, *tiny_flags, "--k", 1, "--total-steps", 1, "--repetition-penalty", penalty, "--output-dir", out)
        scores[penalty] = EventAccumulator(str(out)).Reload().Scalars("objective/scores")[0].value
    assert scores[1] != scores[3]


@pytest.mark.parametrize("flags, said", [
    (["--k", 0], "--k 0: must be 1 or more"),
    (["--repetition-penalty", 0], "--repetition-penalty 0"),
    (["--resume", "."], "no checkpoint of reinforce.py"),
])
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(reinforce, *tiny_flags, *flags)

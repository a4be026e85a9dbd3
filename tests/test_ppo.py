"""PPO: what it does not share with reinforce.py."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, run_script, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kv_cache import EOS, left_pad, plain_logprobs
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import ppo
from ppo import TokenOutputs, completion_mask, gae, masked_whiten, ppo_policy_loss, ppo_value_loss, token_rewards

near = lambda a, b: torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), atol=1e-6)


def test_token_rewards_golden():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logprobs, ref = torch.tensor([[-1.0, -2, -3], [-1, -1, -9]]), torch.tensor([[-1.5, -2, -1], [-2, 0, 5]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), logprobs, ref, mask, 0.1)
    assert near(rewards, [[-0.05, 0, 1.2], [-0.1, -1.9, 0]])


def test_gae_golden_with_padding():
    rewards, values = torch.tensor([[1.0, 2, 3], [1, 2, 9]]), torch.tensor([[0.5, 1, 1.5], [0.5, 1, 7]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 1], [1, 1, 0]]), 0.9, 0.8)
    assert near(advantages, [[3.8696, 3.43, 1.5], [2.12, 1, 0]])  # deltas 1.4, 2.35, 1.5 and 1.4, 1
    assert near(returns, [[4.3696, 4.43, 3], [2.62, 2, 0]])


def test_gae_limits():
    rewards, values = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]).long()
    after = torch.cat([(values * mask)[:, 1:], torch.zeros(4, 1)], 1)
    one_step = (rewards + 0.9 * after - values) * mask
    assert torch.allclose(gae(rewards, values, mask, 0.9, 0.0)[0], one_step)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_go) and torch.allclose(advantages, (to_go - values) * mask)


def test_whitening_is_masked_biased_and_the_same_over_processes():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, -50.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    white = masked_whiten(x, mask)
    assert near(white, [[-1.2247449, 0, 0], [1.2247449, 0, 0]])  # mean 3, variance 8/3 (not 4)
    sums = iter([torch.tensor(3), torch.tensor(9.0), torch.tensor(8.0)])  # over two processes, a row each
    assert near(masked_whiten(x[:1], mask[:1], lambda own: next(sums)), white[:1].tolist())


def test_policy_loss_golden_sign_and_clipping():
    ratio, advantages = torch.tensor([[1.5, 0.5, 1.0, 1.5, 9.0]]), torch.tensor([[1.0, -1.0, 2.0, -1.0, 9.0]])
    logprobs, mask = ratio.log().requires_grad_(), torch.tensor([[1, 1, 1, 1, 0]])
    loss = ppo_policy_loss(logprobs, torch.zeros(1, 5), advantages, mask, 0.2)
    loss.backward()
    assert near(loss.item(), -(1.2 - 0.8 + 2 - 1.5) / 4)
    # what moved far enough in the good direction gets no gradient; what moved in the wrong one does
    assert near(logprobs.grad, [[0, 0, -0.5, 0.375, 0]])


def test_value_loss_golden_and_clipping():
    values = torch.tensor([[2.0, 0.0, 7.0]], requires_grad=True)
    loss = ppo_value_loss(values, torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[3.0, 3.0, 1.0]]), torch.tensor([[1, 1, 0]]), 0.2)
    loss.backward()
    assert near(loss.item(), (1.8 ** 2 + 3 ** 2) / 2 / 2)
    assert near(values.grad, [[0, -1.5, 0]])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_with_exact_values_the_first_step_has_the_exact_expected_gradient(lam):
    """All responses of a toy policy: E[grad of the loss, summed over tokens] = -grad of E[score] - kl_coef * KL."""
    model, reference = tiny_llama(vocab=4), tiny_llama(vocab=4, seed=1)
    responses = [[EOS]] + [[a, EOS] for a in (0, 2, 3)] + [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]
    ids = torch.tensor([r + [EOS] * (2 - len(r)) for r in responses])
    mask = completion_mask(ids, EOS)
    inputs = (*left_pad([[2, 3, 0]], extra=2), ids, mask, 1.0)
    scores, kl_coef = torch.randn(len(responses), dtype=torch.float64), 0.3
    logprobs, ref_logprobs = TokenOutputs(model)(*inputs).double(), TokenOutputs(reference)(*inputs).double().detach()
    log_p = logprobs.sum(1)
    objective = (log_p.exp() * (scores - kl_coef * (log_p - ref_logprobs.sum(1)))).sum()
    exact = torch.autograd.grad(-objective, list(model.parameters()), retain_graph=True)
    old, p = logprobs.detach(), log_p.detach().exp()
    rewards = token_rewards(scores, old, ref_logprobs, mask, kl_coef)
    values = torch.zeros_like(rewards)  # of a state: the mean of what follows, over the responses that begin with it
    for i, response in enumerate(responses):
        for t in range(len(response)):
            same = [j for j, other in enumerate(responses) if other[:t] == response[:t] and len(other) > t]
            values[i, t] = (p[same] * rewards[same, t:].sum(1)).sum() / p[same].sum()
    advantages, _ = gae(rewards, values, mask, 1.0, lam)
    losses = [p[i] * mask[i].sum() * ppo_policy_loss(logprobs[i:i + 1], old[i:i + 1], advantages[i:i + 1], mask[i:i + 1], 0.2)
              for i in range(len(p))]
    estimate = torch.autograd.grad(sum(losses), list(model.parameters()))
    for a, b in zip(exact, estimate):
        assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert max(a.abs().max() for a in exact) > 1e-2


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_log_probabilities_and_values_equal_the_plain_ones(make, tmp_path):
    make().save_pretrained(tmp_path)
    model, critic = make(), AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=1).eval()
    prompts, responses = [[5, 6, 7, 8], [9]], [[3, 4, EOS], [7], [8, 8], [EOS]]
    width = max(map(len, responses))
    ids = torch.tensor([r + [EOS] * (width - len(r)) for r in responses])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in responses])
    inputs = (*left_pad(prompts, extra=1), ids, mask, 0.7)
    logprobs, values = TokenOutputs(model)(*inputs), TokenOutputs(critic)(*inputs)
    assert values[0, 0] == values[1, 0] != values[2, 0]  # before the first token: a value of the prompt
    for i, response in enumerate(responses):
        prompt = prompts[i // 2]
        plain = critic(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1, 0]  # before each token
        assert torch.allclose(values[i, :len(response)], plain, atol=1e-5) and (values[i, len(response):] == 0).all()
        assert torch.allclose(logprobs[i, :len(response)], plain_logprobs(model, prompt, response, 0.7), atol=1e-5)


# ---- runs

@pytest.fixture(scope="module")
def finished(tiny_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("ppo") / "a"
    flags = [*tiny_flags, "--kl-coef", 0.5, "--epochs", 2, "--minibatches", 2, "--micro-batch-size", 2, "--save-every", 1]
    run_script(ppo, *flags, "--output-dir", out)
    return flags, out


def scalars(out, tag):
    return [e.value for e in EventAccumulator(str(out)).Reload().Scalars(tag)]


def weights(out):
    state = torch.load(Path(out, "trainer_state.pt"))
    return {**load_file(Path(out, "model.safetensors")), **{f"critic.{n}": w for n, w in state["critic"].items()}}


def same(a, b, tolerance=0.0, prefix=""):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all((a[n] - b[n]).abs().max() <= tolerance for n in a if n.startswith(prefix))


def test_curves(finished):
    _, out = finished
    for tag in ("loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "policy/ratio", "policy/grad_norm",
                "val/grad_norm", "objective/entropy", "val/eos_rate", "charts/learning_rate"):
        assert len(scalars(out, tag)) == 4
    scores, kl, shaped, reward = (scalars(out, f"objective/{tag}") for tag in ("scores", "kl", "non_score_reward", "rlhf_reward"))
    assert shaped == pytest.approx([-0.5 * x for x in kl], abs=1e-6)
    assert reward == pytest.approx([s - 0.5 * x for s, x in zip(scores, kl)], abs=1e-5)
    assert abs(kl[0]) < 1e-6 and kl[-1] != 0 and min(scalars(out, "loss/value")) > 0


def test_resume_is_bit_exact_the_critic_included(finished, tmp_path):
    _, out = finished
    shutil.copytree(out / "checkpoint-2", tmp_path / "checkpoint-2")
    run_script(ppo, "--resume", tmp_path / "checkpoint-2")
    assert same(out / "final", tmp_path / "final") and not same(out / "final", out / "checkpoint-2")
    a, b = (torch.load(d / "final/trainer_state.pt")["optimizer"]["state"] for d in (out, tmp_path))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


@pytest.fixture(scope="module")
def one_update(tiny_flags, tmp_path_factory):
    """A step of one update: where the new policy is the old one still."""
    def go(*flags):
        out = tmp_path_factory.mktemp("ppo") / "o"
        run_script(ppo, *tiny_flags, "--kl-coef", 0.5, "--epochs", 1, "--minibatches", 1, "--total-steps", 1, *flags, "--output-dir", out)
        return out
    return go, go()


def test_at_the_first_minibatch_the_ratio_is_one_and_nothing_is_clipped(one_update):
    out = one_update[1]
    assert scalars(out, "policy/ratio") == [1] and scalars(out, "policy/clipfrac") == scalars(out, "policy/approxkl") == [0]
    assert abs(scalars(out, "loss/policy")[0]) < 1e-6  # minus the mean of whitened advantages


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.05)])
def test_unchanged_weights_keep_the_ratio_at_one_in_other_minibatches(one_update, precision, tolerance):
    out = one_update[0]("--prompts-per-step", 8, "--minibatches", 2, "--learning-rate", 0, "--precision", precision)
    assert scalars(out, "policy/ratio")[0] == pytest.approx(1, abs=tolerance) and scalars(out, "policy/clipfrac") == [0]
    assert scalars(out, "policy/approxkl")[0] < tolerance ** 2


def test_clipfrac_and_approxkl_are_of_the_second_update(tiny_flags, tmp_path, monkeypatch):
    """approxkl is the mean of half the squared log-ratio (k2), clipfrac the share of ratios over 0.2 from 1."""
    seen, real = [], ppo.ppo_policy_loss
    monkeypatch.setattr(ppo, "ppo_policy_loss", lambda *x: seen.append((x[0] - x[1])[x[3].bool()].detach()) or real(*x))
    flags = ["--epochs", 2, "--minibatches", 1, "--micro-batch-size", 4, "--total-steps", 1, "--learning-rate", 0.03, "--warmup-steps", 0]
    run_script(ppo, *tiny_flags, *flags, "--output-dir", tmp_path / "o")
    assert len(seen) == 2 and not seen[0].any()
    log_ratio = seen[1]
    assert scalars(tmp_path / "o", "policy/approxkl")[0] == pytest.approx((log_ratio ** 2).mean().item() / 2 / 2, rel=1e-4)  # of two updates
    clipped = ((log_ratio.exp() < 0.8) | (log_ratio.exp() > 1.2)).float().mean().item()
    assert scalars(tmp_path / "o", "policy/clipfrac")[0] == pytest.approx(clipped / 2, rel=1e-4) and 0 < clipped < 1


def test_an_epoch_trains_on_every_sample_once(tiny_flags, tmp_path, monkeypatch):
    """Two minibatches a pass: together the samples of the step, and the advantages, whitened over the step, have mean 0."""
    seen, real = [], ppo.ppo_policy_loss
    record = lambda *x: seen.append((list(map(tuple, x[1].tolist())), (x[2] * x[3]).sum().item())) or real(*x)
    monkeypatch.setattr(ppo, "ppo_policy_loss", record)
    flags = ["--epochs", 2, "--minibatches", 2, "--prompts-per-step", 8, "--total-steps", 1]
    run_script(ppo, *tiny_flags, *flags, "--output-dir", tmp_path / "o")
    assert len(seen) == 2 * 2 * 2  # passes, minibatches, micro-batches
    first, second = (sum((samples for samples, _ in seen[i:i + 4]), []) for i in (0, 4))
    assert len(set(first)) == 8 * 4 and sorted(first) == sorted(second)
    halves = [seen[i][1] + seen[i + 1][1] for i in (0, 2)]
    assert abs(sum(halves)) < 1e-3 < abs(halves[0])
    optimizer = torch.load(tmp_path / "o/final/trainer_state.pt")["optimizer"]
    assert optimizer["param_groups"][0]["eps"] == 1e-5  # of N+, arXiv 2403.17031; PyTorch's default is 1e-8


def test_the_value_loss_changes_nothing_in_the_policy(one_update):
    go, out = one_update
    other = go("--vf-coef", 0)
    a, b = load_file(out / "final/model.safetensors"), load_file(other / "final/model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not same(out / "final", other / "final")  # but in the critic


def gradient(out):
    state = torch.load(Path(out, "final/trainer_state.pt"))["optimizer"]["state"]
    return torch.cat([state[i]["exp_avg"].flatten() / 0.1 for i in sorted(state)])


@pytest.fixture(scope="module")
def two_updates(one_update):
    go, _ = one_update
    return lambda *flags: go("--minibatches", 2, "--prompts-per-step", 8, *flags)


def close(out, other):
    """Of two runs the gradients and, since these are clipped, their norms before that."""
    expected = gradient(other)
    norms = [[scalars(o, tag)[0] for tag in ("policy/grad_norm", "val/grad_norm")] for o in (out, other)]
    return expected.norm() > 0.01 and norms[0] == pytest.approx(norms[1], rel=1e-4) \
        and (gradient(out) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_nothing(one_update, size):
    go, out = one_update
    assert close(go("--micro-batch-size", size), out)


def test_micro_batches_leave_the_minibatches_as_they_are(two_updates):
    assert close(two_updates("--micro-batch-size", 1), two_updates("--micro-batch-size", 4))


def test_two_processes_equal_one(one_update, two_updates, tiny_flags, tmp_path):
    """With two minibatches, which are then those of one process; their second step begins where the first ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(28400 + os.getpid() % 500),
               ppo.__file__, *map(str, tiny_flags), "--kl-coef", "0.5", "--epochs", "1", "--minibatches", "2", "--prompts-per-step", "8",
               "--total-steps", "1", "--output-dir", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]
    expected = two_updates()
    assert close(tmp_path / "o", expected) and not close(tmp_path / "o", two_updates("--seed", 2))
    for tag in ("loss/policy", "loss/value", "objective/rlhf_reward"):
        assert scalars(tmp_path / "o", tag) == pytest.approx(scalars(expected, tag), abs=1e-5)


@pytest.mark.parametrize("labels", [1, 10])
def test_the_critic_starts_from_the_reward_model(tiny, tiny_flags, tmp_path, labels):
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=labels)
    torch.nn.init.normal_(scorer.model.layers[0].mlp.up_proj.weight)
    scorer.save_pretrained(tmp_path / "rm"), byte_tokenizer().save_pretrained(tmp_path / "rm")
    flags = ["--reward", tmp_path / "rm", "--learning-rate", 0, "--total-steps", 1]
    run_script(ppo, *tiny_flags, *flags, "--output-dir", tmp_path / "o")
    critic, expected = torch.load(tmp_path / "o/final/trainer_state.pt")["critic"], scorer.state_dict()
    assert all(torch.equal(critic[name], expected[name]) for name in expected if name != "score.weight")
    assert torch.equal(critic["score.weight"], expected["score.weight"] if labels == 1 else torch.zeros(1, 32))
    mean_score = scalars(tmp_path / "o", "objective/scores")[0]  # of the first batch: where a new head starts
    assert critic["score.bias"].item() == pytest.approx(0 if labels == 1 else mean_score, abs=1e-6) and abs(mean_score) > 0.1
    if labels == 1:  # the critic is as large as the reward model, whose vocabulary is its own
        scorer.resize_token_embeddings(scorer.config.vocab_size + 1)
        scorer.save_pretrained(tmp_path / "rm")
        with pytest.raises(SystemExit, match="--reward .*: not that of the checkpoint's critic"):
            run_script(ppo, "--resume", tmp_path / "o/final", "--total-steps", 2)


def test_a_classifier_with_other_tokens_is_no_critic(tiny, tiny_flags, tmp_path):
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.nn.init.normal_(scorer.model.layers[0].mlp.up_proj.weight)
    other = byte_tokenizer()
    vocab = {token: i if i < 2 else 2 + (i - 1) % 256 for token, i in other.get_vocab().items()}  # the same bytes, other ids
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)(vocab, [])
    scorer.save_pretrained(tmp_path / "rm"), other.save_pretrained(tmp_path / "rm")
    run_script(ppo, *tiny_flags, "--reward", tmp_path / "rm", "--learning-rate", 0, "--total-steps", 1, "--output-dir", tmp_path / "o")
    critic, policy = weights(tmp_path / "o/final"), load_file(Path(tiny, "model.safetensors"))
    assert all(torch.equal(critic[f"critic.{name}"], w) for name, w in policy.items() if name != "lm_head.weight")
    assert not critic["critic.score.weight"].any()  # a new head: V is the mean score everywhere
    assert critic["critic.score.bias"].item() == pytest.approx(scalars(tmp_path / "o", "objective/scores")[0], abs=1e-6) != 0


def test_it_learns(tiny_flags, tmp_path):
    flags = ["--total-steps", 25, "--max-new-tokens", 6, "--prompts-per-step", 8, "--micro-batch-size", 4, "--kl-coef", 0.01, "--eval-every", 25]
    for coef in (0.1, 0):
        run_script(ppo, *tiny_flags, *flags, "--learning-rate", 3e-3, "--vf-coef", coef, "--output-dir", tmp_path / str(coef))
    before, after = scalars(tmp_path / "0.1", "eval/score")
    assert after > before + 0.15
    errors, of_the_first_mean = (sum(scalars(tmp_path / coef, "loss/value")[-5:]) for coef in ("0.1", "0"))
    assert errors < 0.8 * of_the_first_mean  # the critic follows


@pytest.mark.parametrize("flags, said", [
    (["--k", 0], "--k 0: must be 1 or more"),
    (["--epochs", 0], "--epochs 0"),
    (["--minibatches", 3], "--minibatches 3: times --micro-batch-size must divide"),
    (["--resume", "."], "no checkpoint of ppo.py"),
])
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(ppo, *tiny_flags, *flags)


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(finished, tmp_path, monkeypatch):
    flags, out = finished
    calls, real = [], ppo.ppo_value_loss  # a call an update, four a step: the third step has one good one
    monkeypatch.setattr(ppo, "ppo_value_loss", lambda *x: calls.append(1) or real(*x) * (float("nan") if len(calls) > 9 else 1))
    with pytest.raises(SystemExit, match="lower --learning-rate; the weights so far: --resume .*checkpoint-2"):
        run_script(ppo, *flags, "--output-dir", tmp_path / "o")
    assert same(tmp_path / "o/checkpoint-2", out / "checkpoint-2")

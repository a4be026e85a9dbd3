"""ppo.py: its mathematics, its critic, its runs. What it shares with rloo.py is tested there."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, moments, run_in_two_processes, run_script, scalars, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from test_rows import PROMPTS, groups_of
from transformers import AutoModelForSequenceClassification

import ppo

EOS = 1


def near(a, b):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), atol=1e-6)


def alone(x):
    """What accelerator.reduce is to a process without others."""
    return x


def test_token_rewards_golden():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs = torch.tensor([[-1.0, -2, -3], [-1, -1, -9]])
    ref_logprobs = torch.tensor([[-1.5, -2, -1], [-2, 0, 5]])
    rewards = ppo.token_rewards(torch.tensor([1.0, -2.0]), logprobs, ref_logprobs, mask, 0.1)
    assert near(rewards, [[-0.05, 0, 1.2], [-0.1, -1.9, 0]])


def test_gae_golden_with_padding():
    rewards = torch.tensor([[1.0, 2, 3], [1, 2, 9]])
    values = torch.tensor([[0.5, 1, 1.5], [0.5, 1, 7]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.8)
    assert near(advantages, [[3.8696, 3.43, 1.5], [2.12, 1, 0]])  # deltas 1.4, 2.35, 1.5 and 1.4, 1
    assert near(returns, [[4.3696, 4.43, 3], [2.62, 2, 0]])


def test_gae_limits():
    rewards, values = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    after = torch.cat([(values * mask)[:, 1:], torch.zeros(4, 1)], 1)
    one_step = (rewards + 0.9 * after - values) * mask
    assert torch.allclose(ppo.gae(rewards, values, mask, 0.9, 0.0)[0], one_step)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_go)
    assert torch.allclose(advantages, (to_go - values) * mask)


def test_whitening_is_masked_biased_and_the_same_over_processes():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, -50.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    white = ppo.masked_whiten(x, mask, alone)
    assert near(white, [[-1.2247449, 0, 0], [1.2247449, 0, 0]])  # mean 3, variance 8/3 (not 4)
    sums = iter([torch.tensor(3), torch.tensor(9.0), torch.tensor(8.0)])  # over two processes, a row each
    assert near(ppo.masked_whiten(x[:1], mask[:1], lambda own: next(sums)), white[:1].tolist())


def test_policy_loss_golden_sign_and_clipping():
    ratio = torch.tensor([[1.5, 0.5, 1.0, 1.5, 9.0]])
    advantages = torch.tensor([[1.0, -1.0, 2.0, -1.0, 9.0]])
    logprobs = ratio.log().requires_grad_()
    mask = torch.tensor([[True, True, True, True, False]])
    loss = ppo.ppo_policy_loss(logprobs, torch.zeros(1, 5), advantages, mask, 0.2)
    loss.backward()
    assert near(loss.item(), -(1.2 - 0.8 + 2 - 1.5) / 4)
    # what moved far enough in the good direction gets no gradient; what moved in the wrong one does
    assert near(logprobs.grad, [[0, 0, -0.5, 0.375, 0]])


def test_value_loss_golden_and_clipping():
    values = torch.tensor([[2.0, 0.0, 7.0]], requires_grad=True)
    returns = torch.tensor([[3.0, 3.0, 1.0]])
    loss = ppo.ppo_value_loss(values, torch.ones(1, 3), returns, torch.tensor([[True, True, False]]), 0.2)
    loss.backward()
    assert near(loss.item(), (1.8**2 + 3**2) / 2 / 2)
    assert near(values.grad, [[0, -1.5, 0]])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_with_exact_values_the_first_step_has_the_exact_expected_gradient(lam):
    """All responses of a toy policy: E[gradient of the loss, summed over tokens] = -gradient of (E[score] - kl_coef * KL)."""
    model, reference = tiny_llama(vocab=4), tiny_llama(vocab=4, seed=1)
    responses = [[EOS]] + [[a, EOS] for a in (0, 2, 3)] + [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]
    rows = ppo.make_rows([[2, 3, 0]], [responses], "cpu")
    mask = rows.response_mask
    scores, kl_coef = torch.randn(len(responses), dtype=torch.float64), 0.3
    logprobs = ppo.ResponseLogprobs(model)(rows, 1.0).double()
    ref_logprobs = ppo.ResponseLogprobs(reference)(rows, 1.0).double().detach()
    log_p = logprobs.sum(1)
    objective = (log_p.exp() * (scores - kl_coef * (log_p - ref_logprobs.sum(1)))).sum()
    exact = torch.autograd.grad(-objective, list(model.parameters()), retain_graph=True)

    old, p = logprobs.detach(), log_p.detach().exp()
    rewards = ppo.token_rewards(scores, old, ref_logprobs, mask, kl_coef)
    values = torch.zeros_like(rewards)  # of a state: the mean of what follows, over the responses that begin with it
    for i, response in enumerate(responses):
        for t in range(len(response)):
            same = [j for j, other in enumerate(responses) if other[:t] == response[:t] and len(other) > t]
            values[i, t] = (p[same] * rewards[same, t:].sum(1)).sum() / p[same].sum()
    advantages, _ = ppo.gae(rewards, values, mask, 1.0, lam)
    expected_loss = 0.0
    for i, response in enumerate(responses):
        one = slice(i, i + 1)
        loss = ppo.ppo_policy_loss(logprobs[one], old[one], advantages[one], mask[one], 0.2)
        expected_loss += p[i] * len(response) * loss
    estimate = torch.autograd.grad(expected_loss, list(model.parameters()))
    for a, b in zip(exact, estimate):
        assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert max(a.abs().max() for a in exact) > 1e-2


# ---- the critic and the batch


def make_critic(make):
    """One whose values differ from token to token."""
    backbone = make().base_model
    head = torch.nn.Linear(32, 1)
    return ppo.Critic(backbone, head)


def value_alone(critic, prompt, response):
    """An ordinary forward pass of one text: no padding, no mask. Before each token of the response."""
    hidden = critic.backbone(torch.tensor([prompt + response]), use_cache=False).last_hidden_state
    return critic.head(hidden)[0, len(prompt) - 1 : -1, 0]


@pytest.mark.parametrize("row_length", [1024, 16, 1])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_critic_on_rows_equals_it_on_each_text_alone(make, k, row_length):
    critic = make_critic(make)
    groups = groups_of(k)
    rows = ppo.make_rows(PROMPTS, groups, "cpu", row_length)
    values = critic(rows)
    weights = torch.randn(values.shape)
    (values * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in critic.named_parameters() if p.grad is not None}
    critic.zero_grad()
    total = 0.0
    for n in range(len(PROMPTS) * k):
        response = groups[n // k][n % k]
        one = value_alone(critic, PROMPTS[n // k], response)
        assert (one - values[n, : len(response)]).abs().max() < 1e-5
        assert (values[n, len(response) :] == 0).all()
        total = total + (one * weights[n, : len(response)]).sum()
    assert values[rows.response_mask].std() > 0.1  # there is something to compare
    total.backward()
    expected = {name: p.grad for name, p in critic.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert {"head.weight", "head.bias"} < gradients.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max())


def test_select_takes_the_responses_to_some_prompts_and_cuts_them_to_the_longest():
    lengths = torch.tensor([1, 3, 4, 4, 2, 1])
    mask = torch.arange(5) < lengths[:, None]
    numbers = torch.arange(30.0).view(6, 5)
    batch = ppo.Batch(numbers, numbers + 100, numbers + 200, numbers + 300, mask)
    part = ppo.select(batch, torch.tensor([2, 0]), 2)  # k 2: the third prompt has responses 4 and 5
    responses = [4, 5, 0, 1]
    assert part.old_logprobs.tolist() == [[20, 21, 22], [25, 26, 27], [0, 1, 2], [5, 6, 7]]
    for tensor, whole in zip(part, batch, strict=True):
        assert torch.equal(tensor, whole[responses, :3])
    one = ppo.select(batch, torch.tensor([1]), 1)
    assert one.response_mask.tolist() == [[True, True, True]]
    assert one.returns.tolist() == [[305, 306, 307]]


def test_losses_of_a_micro_batch_golden():
    """Each clipping range is its own; 5 tokens, of which 2 have moved beyond that of the ratio."""
    rows = ppo.make_rows([[5], [6, 7]], [[[8, 9, 1]], [[9, 1]]], "cpu")
    ratio = torch.tensor([[1.5, 0.5, 1.0], [1.1, 0.9, 9.0]])
    advantages = torch.tensor([[1.0, -1.0, 2.0], [-3.0, 4.0, 99.0]])
    values = torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 9.0]])
    returns = torch.tensor([[3.0, 3.0, 1.0], [1.0, 1.5, 99.0]])
    part = ppo.Batch(torch.zeros(2, 3), torch.ones(2, 3), advantages, returns, rows.response_mask)
    args = ppo.Args(temperature=0.7, cliprange=0.3, cliprange_value=0.5)

    def policy(rows_of_it, temperature):
        assert rows_of_it is rows
        assert temperature == 0.7
        return ratio.log()

    losses = ppo.micro_batch_losses(args, policy, lambda rows: values, rows, part)
    policy_loss, value_loss, approx_kl, clip_fraction = [loss.item() for loss in losses.values()]
    assert list(losses) == ["policy", "value", "approx_kl", "clip_fraction"]
    assert policy_loss == pytest.approx(-(1.3 - 0.7 + 2 - 3.3 + 3.6) / 5)
    assert value_loss == pytest.approx((1.5**2 + 3**2 + 0.5**2) / 2 / 5)
    logs = [math.log(x) ** 2 / 2 for x in (1.5, 0.5, 1.0, 1.1, 0.9)]
    assert approx_kl == pytest.approx(sum(logs) / 5)
    assert clip_fraction == pytest.approx(2 / 5)


@pytest.mark.parametrize("labels", [0, 10])
def test_a_critic_must_be_a_trained_classifier_of_one_label(labels, tiny, tiny_flags, tmp_path):
    critic = tiny
    if labels:
        critic = tmp_path / "rm"
        AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=labels).save_pretrained(critic)
        byte_tokenizer().save_pretrained(critic)
    with pytest.raises(
        RuntimeError if labels else SystemExit, match="ignore_mismatched_sizes" if labels else "no trained classifier"
    ):
        run_script(ppo, *tiny_flags, "--critic", critic, "--output-dir", tmp_path / "o")


# ---- runs


@pytest.fixture(scope="module")
def flags(tiny_flags, tiny_with_stops):
    """Of runs whose responses are of every length: means over tokens are not means over responses."""
    return [*tiny_flags, "--model", tiny_with_stops, "--kl-coef", 0.5]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("ppo") / "a"
    flags = [*flags, *"--epochs 2 --minibatches 2 --micro-batch-size 2 --save-every 1".split()]
    run_script(ppo, *flags, "--output-dir", out)
    return flags, out


def weights(checkpoint):
    """Of the policy and of the critic, whose names begin with critic."""
    critic = torch.load(Path(checkpoint, "trainer_state.pt"))["critic"]
    return {**load_file(Path(checkpoint, "model.safetensors")), **{f"critic.{n}": w for n, w in critic.items()}}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_curves(finished):
    _, out = finished
    for tag in """objective/scores objective/kl objective/rlhf_reward objective/entropy loss/policy loss/value
                  policy/approxkl policy/clipfrac policy/grad_norm val/grad_norm val/response_length
                  charts/learning_rate charts/samples_per_second""".split():
        assert len(scalars(out, tag)) == 4
    scores, kl, reward = (scalars(out, f"objective/{tag}") for tag in ("scores", "kl", "rlhf_reward"))
    assert reward == pytest.approx([s - 0.5 * x for s, x in zip(scores, kl)], abs=1e-5)
    assert abs(kl[0]) < 1e-6
    assert abs(kl[-1]) > 1e-3
    assert min(scalars(out, "loss/value")) > 0
    assert min(scalars(out, "val/grad_norm")) > 0


@pytest.mark.parametrize("step", [1, 2])
def test_resume_is_bit_exact_the_critic_included(finished, tmp_path, step):
    _, out = finished
    shutil.copytree(out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run_script(ppo, "--resume", tmp_path / f"checkpoint-{step}")
    assert same(out / "final", tmp_path / "final")
    assert not same(out / "final", out / f"checkpoint-{step}")
    a, b = (torch.load(d / "final/trainer_state.pt")["optimizer"]["state"] for d in (out, tmp_path))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


@pytest.fixture(scope="module")
def one_update(flags, tmp_path_factory):
    """A step of one update: where the new policy is the old one still."""

    def go(*more):
        out = tmp_path_factory.mktemp("ppo") / "o"
        settings = "--epochs 1 --minibatches 1 --total-steps 1".split()
        run_script(ppo, *flags, *settings, *more, "--output-dir", out)
        return out

    return go, go()


def test_at_the_first_minibatch_the_ratio_is_one_and_nothing_is_clipped(one_update):
    out = one_update[1]
    assert scalars(out, "policy/clipfrac") == scalars(out, "policy/approxkl") == [0]
    assert abs(scalars(out, "loss/policy")[0]) < 1e-6  # minus the mean of whitened advantages


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.05)])
def test_unchanged_weights_keep_the_ratio_at_one_in_other_minibatches(one_update, precision, tolerance):
    flags = ["--prompts-per-step", 8, "--minibatches", 2, "--learning-rate", 0, "--precision", precision]
    out = one_update[0](*flags)
    assert scalars(out, "policy/clipfrac") == [0]
    assert scalars(out, "policy/approxkl")[0] < tolerance**2


def test_clipfrac_and_approxkl_are_of_the_second_update(flags, tmp_path, monkeypatch):
    """approxkl is the mean of half the squared log-ratio (k2), clipfrac the share of ratios over 0.2 from 1."""
    log_ratios = []
    real = ppo.ppo_policy_loss

    def record(logprobs, old_logprobs, advantages, mask, cliprange):
        log_ratios.append((logprobs - old_logprobs)[mask].detach())
        return real(logprobs, old_logprobs, advantages, mask, cliprange)

    monkeypatch.setattr(ppo, "ppo_policy_loss", record)
    more = "--epochs 2 --minibatches 1 --micro-batch-size 4 --total-steps 1 --learning-rate 0.03 --warmup-steps 0"
    run_script(ppo, *flags, *more.split(), "--output-dir", tmp_path / "o")
    first, second = log_ratios
    assert not first.any()
    approx_kl = (second**2).mean().item() / 2
    clipped = ((second.exp() < 0.8) | (second.exp() > 1.2)).float().mean().item()
    assert 0 < clipped < 1
    assert scalars(tmp_path / "o", "policy/approxkl")[0] == pytest.approx(approx_kl / 2, rel=1e-4)  # of two updates
    assert scalars(tmp_path / "o", "policy/clipfrac")[0] == pytest.approx(clipped / 2, rel=1e-4)


def record_samples():
    """Of each micro-batch from here on: its responses, known by their log-probabilities, and their advantages' sum."""
    seen = []
    real = ppo.ppo_policy_loss

    def record(logprobs, old_logprobs, advantages, mask, cliprange):
        responses = [tuple(row[is_token].tolist()) for row, is_token in zip(old_logprobs, mask)]
        seen.append((responses, (advantages * mask).sum().item()))
        return real(logprobs, old_logprobs, advantages, mask, cliprange)

    ppo.ppo_policy_loss = record
    return seen


def test_an_epoch_trains_on_every_sample_once(flags, tmp_path, monkeypatch):
    """In two minibatches: together the samples of the step; and advantages, whitened over the step, have mean 0."""
    monkeypatch.setattr(ppo, "ppo_policy_loss", ppo.ppo_policy_loss)  # to be put back
    seen = record_samples()
    more = "--epochs 2 --minibatches 2 --prompts-per-step 8 --total-steps 1".split()
    run_script(ppo, *flags, *more, "--output-dir", tmp_path / "o")
    assert len(seen) == 2 * 2 * 2  # epochs, minibatches, micro-batches
    first, second = (sum((responses for responses, _ in seen[i : i + 4]), []) for i in (0, 4))
    assert len(set(first)) == 8 * 4
    assert sorted(first) == sorted(second)
    halves = [seen[i][1] + seen[i + 1][1] for i in (0, 2)]
    assert abs(sum(halves)) < 1e-3 < abs(halves[0])
    optimizer = torch.load(tmp_path / "o/final/trainer_state.pt")["optimizer"]
    assert optimizer["param_groups"][0]["eps"] == 1e-5  # of N+, arXiv 2403.17031; PyTorch's default is 1e-8


def test_the_minibatches_of_every_epoch_are_others(tiny_flags, tmp_path, monkeypatch):
    selected = []
    real = ppo.select

    def record(batch, prompts, k):
        selected.append(tuple(sorted(prompts.tolist())))
        return real(batch, prompts, k)

    monkeypatch.setattr(ppo, "select", record)
    flags = "--epochs 3 --minibatches 4 --prompts-per-step 8 --micro-batch-size 1 --total-steps 2 --eval-prompts 0"
    run_script(ppo, *tiny_flags, *flags.split(), "--output-dir", tmp_path / "o")
    minibatches = [prompts for prompts in selected if len(prompts) == 2]  # the others are micro-batches
    epochs = [tuple(minibatches[i : i + 4]) for i in range(0, len(minibatches), 4)]
    assert len(epochs) == 6
    assert len(set(epochs)) == 6
    assert all(sorted(sum(epoch, ())) == list(range(8)) for epoch in epochs)


def test_the_value_loss_changes_nothing_in_the_policy(one_update):
    go, out = one_update
    other = go("--vf-coef", 0)
    a, b = weights(out / "final"), weights(other / "final")
    equal = {name for name in a if torch.equal(a[name], b[name])}
    assert equal >= {name for name in a if not name.startswith("critic.")}
    assert not equal & {"critic.head.weight", "critic.head.bias"}


def gradient(out):
    return torch.cat([average.flatten() / 0.1 for average in moments(out / "final")])


def close(out, other):
    """Of two runs the gradients and, since these are clipped, their norms before that."""
    expected = gradient(other)
    norms = [[scalars(o, tag)[0] for tag in ("policy/grad_norm", "val/grad_norm")] for o in (out, other)]
    assert expected.norm() > 0.01
    largest = (gradient(out) - expected).abs().max() / expected.abs().max()
    return norms[0] == pytest.approx(norms[1], rel=1e-4) and largest < 1e-5


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_nothing(one_update, size):
    go, out = one_update
    assert close(go("--micro-batch-size", size), out)


def test_micro_batches_leave_the_minibatches_as_they_are(one_update):
    go, _ = one_update
    flags = ["--minibatches", 2, "--prompts-per-step", 8, "--micro-batch-size"]
    assert close(go(*flags, 1), go(*flags, 4))


def test_gradient_checkpointing_gives_the_same_step(one_update):
    go, _ = one_update
    flags = ["--minibatches", 2]
    a, b = go(*flags, "--gradient-checkpointing"), go(*flags)
    assert same(a / "final", b / "final")
    assert torch.equal(gradient(a), gradient(b))


def test_two_processes_equal_one(one_update, flags, tmp_path):
    """With two updates, the second of which begins where the first ended."""
    more = ["--epochs", 2, "--prompts-per-step", 8]
    run_in_two_processes(ppo, *flags, "--minibatches", 1, "--total-steps", 1, *more, "--output-dir", tmp_path / "o")
    go, _ = one_update
    expected = go(*more)
    assert close(tmp_path / "o", expected)
    assert not close(tmp_path / "o", go(*more, "--seed", 2))
    for tag in ("loss/policy", "loss/value", "objective/rlhf_reward", "policy/approxkl", "policy/clipfrac"):
        assert scalars(tmp_path / "o", tag) == pytest.approx(scalars(expected, tag), abs=1e-5)
    bias = [weights(out / "final")["critic.head.bias"] for out in (tmp_path / "o", expected)]
    assert torch.allclose(*bias, atol=1e-5)  # it starts at the mean score of all processes


def test_two_processes_with_minibatches_train_on_every_sample_once_an_epoch(flags, tmp_path):
    """Each shuffles its own share; both make as many updates."""
    folders = [str(Path(ppo.__file__).parent), str(Path(__file__).parent)]
    (tmp_path / "recorded.py").write_text(f"""
import json, os, sys
sys.path[:0] = {folders}
import ppo, test_ppo
seen = test_ppo.record_samples()
ppo.main(ppo.parse_args())
with open(os.path.join({str(tmp_path)!r}, os.environ["RANK"]), "w") as file:
    json.dump(seen, file)
""")
    more = "--epochs 2 --minibatches 2 --prompts-per-step 8 --total-steps 1 --eval-prompts 0".split()
    run_in_two_processes(tmp_path / "recorded.py", *flags, *more, "--output-dir", tmp_path / "o")
    samples = set()
    advantages = 0.0
    for rank in "01":
        seen = json.loads((tmp_path / rank).read_text())
        assert len(seen) == 2 * 2 * 2  # epochs, minibatches, micro-batches
        first, second = ([tuple(x) for responses, _ in seen[i : i + 4] for x in responses] for i in (0, 4))
        assert len(set(first)) == 4 * 4
        assert sorted(first) == sorted(second)
        samples |= set(first)
        advantages += sum(total for _, total in seen[:4])
    assert len(samples) == 8 * 4
    assert abs(advantages) < 1e-3  # whitened over both


@pytest.fixture
def classifier(tiny, tmp_path):
    """A directory with a classifier of one label that is not the policy, and its weights."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "rm")
    byte_tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path / "rm", copy.deepcopy(model.state_dict())


def test_the_critic_starts_from_a_classifier(classifier, tiny_flags, tmp_path):
    folder, expected = classifier
    flags = ["--critic", folder, "--learning-rate", 0, "--total-steps", 1, "--output-dir", tmp_path / "o"]
    run_script(ppo, *tiny_flags, *flags)
    critic = torch.load(tmp_path / "o/final/trainer_state.pt")["critic"]
    backbone = {name.removeprefix("model."): w for name, w in expected.items() if name.startswith("model.")}
    assert critic.keys() == {f"backbone.{name}" for name in backbone} | {"head.weight", "head.bias"}
    assert all(torch.equal(critic[f"backbone.{name}"], w) for name, w in backbone.items())
    assert torch.equal(critic["head.weight"], expected["score.weight"])
    assert critic["head.weight"].any()
    assert critic["head.bias"].tolist() == [0]

    # It is trained, and a resumed run goes on with what it has become.
    flags = ["--critic", folder, "--total-steps", 2, "--save-every", 1]
    run_script(ppo, *tiny_flags, *flags, "--output-dir", tmp_path / "p")
    trained = weights(tmp_path / "p/checkpoint-1")
    assert not torch.equal(trained["critic.head.weight"], expected["score.weight"])
    shutil.copytree(tmp_path / "p/checkpoint-1", tmp_path / "q/checkpoint-1")
    run_script(ppo, "--resume", tmp_path / "q/checkpoint-1")
    assert same(tmp_path / "p/final", tmp_path / "q/final")


def test_without_a_classifier_it_starts_from_the_policy_and_the_mean_score(one_update, tiny):
    out = one_update[0]("--learning-rate", 0)
    critic = torch.load(out / "final/trainer_state.pt")["critic"]
    policy = load_file(Path(tiny, "model.safetensors"))
    for name, weight in policy.items():
        assert torch.equal(critic[name.replace("model.", "backbone.", 1)], weight)
    assert len(critic) == len(policy) + 2
    assert not critic["head.weight"].any()
    mean_score = scalars(out, "objective/scores")[0]
    assert mean_score > 0.01
    assert critic["head.bias"].item() == pytest.approx(mean_score, abs=1e-6)


def test_it_learns(tiny_flags, tmp_path):
    """Without the value loss too, but then the values stay what they were."""
    flags = "--total-steps 60 --max-new-tokens 6 --prompts-per-step 8 --micro-batch-size 4 --kl-coef 0.01".split()
    for coef in (0.1, 0):
        more = ["--vf-coef", coef, "--eval-every", 60, "--learning-rate", 3e-3, "--output-dir", tmp_path / str(coef)]
        run_script(ppo, *tiny_flags, *flags, *more)
    before, after = scalars(tmp_path / "0.1", "eval/score")
    assert after > before + 0.3
    errors, without = (sum(scalars(tmp_path / coef, "loss/value")[-5:]) for coef in ("0.1", "0"))
    assert errors < 0.2 * without


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--k", 0], "--k 0: must be a number of 1 or more"),
        (["--epochs", 0], "--epochs 0: must be a number of 1 or more"),
        (["--gamma", 1.5], "--gamma, --lam: must be at most 1"),
        (["--gamma", "nan"], "--gamma nan: must be a number"),
        (["--lam", -0.1], "--lam -0.1: must be a number of 0 or more"),
        (["--lam", 1.1], "--gamma, --lam: must be at most 1"),
        (["--cliprange", 0], "--cliprange 0.0: must be a number"),
        (["--cliprange", 1], "--cliprange less than 1"),
        (["--cliprange", "nan"], "--cliprange nan: must be a number"),
        (["--cliprange-value", -1], "--cliprange-value -1.0: must be a number"),
        (["--cliprange-value", "nan"], "--cliprange-value nan: must be a number"),
        (["--vf-coef", "nan"], "--vf-coef nan: must be a number"),
        (["--minibatches", 3], "--minibatches, it must divide --prompts-per-step"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, said, tiny_flags):
    with pytest.raises(SystemExit, match=said):
        run_script(ppo, *tiny_flags, *flags)


def stopped_at(call, flags, out, monkeypatch):
    """A run whose value loss is NaN from this call on: the checkpoint that it leaves. An update is a call, a step four."""
    calls = []
    real = ppo.ppo_value_loss

    def fails(*tensors):
        calls.append(1)
        return real(*tensors) * (float("nan") if len(calls) >= call else 1)

    monkeypatch.setattr(ppo, "ppo_value_loss", fails)
    with pytest.raises(SystemExit, match="step 2: gradient .*nan.*; see --reward, --learning-rate"):
        run_script(ppo, *flags, "--output-dir", out)
    monkeypatch.setattr(ppo, "ppo_value_loss", real)
    assert len(calls) == call
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    return out / "checkpoint-2"


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(finished, tmp_path, monkeypatch, capsys):
    flags, out = finished
    at_once = stopped_at(9, flags, tmp_path / "o", monkeypatch)  # the first update of the third step
    assert same(at_once, out / "checkpoint-2")
    assert f"--resume {at_once}" in capsys.readouterr().err
    later = stopped_at(10, flags, tmp_path / "p", monkeypatch)  # its second: the weights of that moment
    assert all(weight.isfinite().all() for weight in weights(later).values())
    assert not same(later, out / "checkpoint-2")
    run_script(ppo, "--resume", later)
    assert len(scalars(tmp_path / "p", "objective/scores")) == 4


def test_a_score_that_is_no_number_stops_the_run_and_keeps_the_weights(finished, tmp_path):
    flags, out = finished
    (tmp_path / "reward.py").write_text("""
calls = []
def score(prompts, completions, **columns):
    calls.append(1)
    values = [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]
    return values[:-1] + [float("nan")] if len(calls) == 3 else values
""")
    more = ["--reward", f"{tmp_path}/reward.py:score", "--eval-prompts", 10, "--eval-every", 100]
    with pytest.raises(SystemExit, match="step 1: gradient"):  # one call was the evaluation's
        run_script(ppo, *flags, *more, "--output-dir", tmp_path / "o")
    assert same(tmp_path / "o/checkpoint-1", out / "checkpoint-1")

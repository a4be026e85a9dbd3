"""rloo.py's algorithm: golden numbers, signs, the exact gradient, the distribution that it samples from."""

import itertools

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from test_rows import alone

import rloo

EOS = 1


def test_advantages_golden():
    assert torch.allclose(
        rloo.rloo_advantages(torch.tensor([1.0, 2, 5, 8]), 4), torch.tensor([-4, -8 / 3, 4 / 3, 16 / 3])
    )
    two = rloo.rloo_advantages(torch.tensor([1.0, 2, 5, 8]), 2)  # responses to one prompt are neighbours
    assert two.tolist() == [-1, 1, -3, 3]


def test_advantages_are_leave_one_out_sum_to_zero_and_vanish_for_duplicates():
    rewards = torch.randn(12, dtype=torch.float64)
    advantages = rloo.rloo_advantages(rewards, 4)
    for i in range(12):
        others = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        assert torch.isclose(advantages[i], rewards[i] - rewards[others].mean())
    assert advantages.view(3, 4).sum(1).abs().max() < 1e-12
    assert rloo.rloo_advantages(torch.full((8,), 0.7), 4).abs().max() < 1e-6


def test_kl_golden():
    logprobs, ref = torch.tensor([[-1.0, -2, -9]]), torch.tensor([[-1.5, -1, 4]])
    assert rloo.sequence_kl(logprobs, ref, torch.tensor([[True, True, False]])).tolist() == [-0.5]


def test_loss_golden_and_the_sign_of_its_gradient():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = rloo.policy_gradient_loss(logprobs, mask, torch.tensor([2.0, -1.0]))
    loss.backward()
    assert loss.item() == -(2 * -6 + -1 * -4) / 2
    # -A/N on real tokens: a good response's tokens go up, a bad one's down, masked ones nowhere
    assert logprobs.grad.tolist() == [[-1, -1, -1], [0.5, 0, 0]]


@pytest.mark.parametrize("k", [2, 3])
def test_expected_gradient_is_that_of_the_exact_objective(k):
    """All responses of a toy policy: E[gradient of the loss] = -gradient of (E[score] - kl_coef * KL)."""
    model, ref = tiny_llama(vocab=4), tiny_llama(vocab=4, seed=1)
    responses = [[EOS]] + [[a, EOS] for a in (0, 2, 3)] + [[a, b] for a in (0, 2, 3) for b in (0, 2, 3)]
    rows = rloo.make_rows([[2, 3, 0]], [responses], "cpu")
    mask = rows.response_mask
    scores, kl_coef = torch.randn(len(responses), dtype=torch.float64), 0.3
    logprobs = rloo.ResponseLogprobs(model)(rows, 1.0).double()
    ref_logprobs = rloo.ResponseLogprobs(ref)(rows, 1.0).double().detach()

    log_p = (logprobs * mask).sum(1)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    objective = (log_p.exp() * (scores - kl_coef * (log_p - (ref_logprobs * mask).sum(1)))).sum()
    exact = torch.autograd.grad(-objective, list(model.parameters()), retain_graph=True)

    expected_loss, p = 0.0, log_p.detach().exp()
    rewards = scores - kl_coef * rloo.sequence_kl(logprobs.detach(), ref_logprobs, mask)
    for group in itertools.product(range(len(responses)), repeat=k):
        g = list(group)
        advantages = rloo.rloo_advantages(rewards[g], k)
        expected_loss += p[g].prod() * rloo.policy_gradient_loss(logprobs[g], mask[g], advantages)
    estimate = torch.autograd.grad(expected_loss, list(model.parameters()))
    for a, b in zip(exact, estimate):
        assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert max(a.abs().max() for a in exact) > 1e-2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_generate_draws_from_the_models_distribution(temperature):
    """Chi-square over all two-token responses of a toy vocabulary, expected counts from the plain forward."""
    model, n = tiny_llama(vocab=6), 40_000
    model.generation_config.eos_token_id = [EOS]
    torch.manual_seed(0)
    prompt = [2, 3]
    samples = rloo.generate(model, [prompt, [4, 3, 2, 0]], n, torch.rand(2 * n, 2), temperature)[
        :n
    ]  # padded on the left
    counts = {}
    for response in samples:
        counts[tuple(response)] = counts.get(tuple(response), 0) + 1
    outcomes = [(EOS,)] + [(a, b) for a in (0, 2, 3, 4, 5) for b in range(6)]
    assert counts.keys() <= set(outcomes)
    observed = torch.tensor([counts.get(outcome, 0) for outcome in outcomes]).double()
    expected = torch.tensor(
        [n * alone(model, prompt, list(x), temperature).sum().exp().item() for x in outcomes]
    ).double()
    assert expected.sum().item() == pytest.approx(n, rel=1e-4)
    common = expected >= 5  # the usual rule; the rare ones share a bin if that is large enough
    if expected[~common].sum() >= 5:
        observed = torch.cat([observed[common], observed[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
    else:
        observed, expected = observed[common], expected[common]

    def p_value(expected):
        chi2 = ((observed - expected) ** 2 / expected).sum()
        return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi2 / 2)

    assert p_value(expected) > 1e-3
    flattened = expected**0.9
    assert p_value(flattened / flattened.sum() * n) < 1e-6  # a slightly wrong temperature is seen


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_finished_responses_that_leave_the_batch_change_nothing(make):
    """Against a sampler without cache, padding, batch or leaving rows, from the same random numbers."""
    model, k = make(vocab=12), 8
    model.generation_config.eos_token_id = [EOS, 11]
    prompts = [[2, 3, 4], [5], [6, 7, 8, 9, 10]]
    torch.manual_seed(3)
    uniforms = torch.rand(len(prompts) * k, 12)
    responses = rloo.generate(model, prompts, k, uniforms, 1.0)
    lengths = [len(response) for response in responses]
    assert min(lengths) < 4 < max(lengths) == 12  # some did leave early
    for i, response in enumerate(responses):
        tokens = []
        for u in uniforms[i]:
            cdf = model(torch.tensor([prompts[i // k] + tokens])).logits[0, -1].softmax(0).cumsum(0)
            tokens.append(int(torch.searchsorted(cdf, u * cdf[-1], right=True)))
            if tokens[-1] in (EOS, 11):
                break
        assert response == tokens


def test_random_streams_differ_by_key_and_repeat():
    def draw(*key):
        return tuple(torch.rand(3, generator=rloo.random_stream(*key)).tolist())

    assert draw("samples", 1, 0) == draw("samples", 1, 0)
    keys = itertools.product(("samples", "order"), (1, 2), (0, 1, 12))
    assert len({draw(*key) for key in keys}) == 12

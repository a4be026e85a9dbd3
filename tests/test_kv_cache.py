"""What reinforce.py and ppo.py share, prompts run once through a KV cache: golden numbers, invariances, the sampling distribution."""
import ast
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama

import ppo
from ppo import completion_mask, generate, sequence_kl
from reinforce import ResponseLogprobs, reinforce_loss

EOS = 1


def left_pad(prompts, extra=0):
    width = max(map(len, prompts)) + extra
    ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def plain_logprobs(model, prompt, response, temperature=1.0):
    """One row, no padding, no cache, full softmax: what the shared forward has to equal."""
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def test_completion_mask_keeps_the_first_eos_and_nothing_after():
    ids = torch.tensor([[5, 1, 1, 7], [5, 6, 7, 8], [1, 1, 1, 1], [5, 6, 7, 1]])
    assert completion_mask(ids, EOS).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert completion_mask(ids, [7, 6]).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_kl_golden():
    logprobs, ref = torch.tensor([[-1.0, -2, -9]]), torch.tensor([[-1.5, -1, 4]])
    assert sequence_kl(logprobs, ref, torch.tensor([[1, 1, 0]])).tolist() == [-0.5]


def test_a_model_that_ignores_its_cache_is_refused():
    """As transformers will from 5.40 on, by that name: responses would be sampled without their prompts, and nothing say so."""
    model = tiny_llama()
    ignores = lambda ids, past_key_values, **options: model(ids, **options)
    ignores.config = model.config
    with pytest.raises(AssertionError, match="past_key_values"):
        ppo.encode_prompts(ignores, *left_pad([[2, 3, 0]]), 2)


PROMPTS = [[5, 9, 14], [7], [3, 4, 5, 6, 7, 8]]
RESPONSES = [[20, 21, 22, EOS], [23, EOS], [24, 25, 26, 27], [EOS], [30, 31, 32, 33], [34, 35, 36, EOS]]  # k = 2


def response_tensors():
    ids = torch.tensor([r + [EOS] * (4 - len(r)) for r in RESPONSES])
    return ids, completion_mask(ids, EOS)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_prefix_shared_equals_plain(make, extra, temperature):
    """Log-probs and gradients, under left padding of any amount, with absolute positions, pad = EOS."""
    model = make()
    ids, mask = response_tensors()
    weights = torch.randn(6, 4)
    logprobs = ResponseLogprobs(model)(*left_pad(PROMPTS, extra), ids, mask, temperature)
    (logprobs * weights).sum().backward()
    shared = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for i, response in enumerate(RESPONSES):
        row = plain_logprobs(model, PROMPTS[i // 2], response, temperature)
        assert (row - logprobs[i, :len(response)]).abs().max() < 1e-5
        assert logprobs[i, len(response):].abs().sum() == 0
        total = total + (row * weights[i, :len(response)]).sum()
    total.backward()
    for p, grad in zip(model.parameters(), shared):
        assert (p.grad - grad).abs().max() < 1e-5 * max(1, p.grad.abs().max())


def test_the_row_order_and_what_stands_in_the_padding_change_nothing():
    model = tiny_llama()
    ids, mask = response_tensors()
    logprobs = ResponseLogprobs(model)(*left_pad(PROMPTS), ids, mask, 1.0)
    garbage = torch.where(mask.bool(), ids, torch.randint(2, 250, ids.shape))
    assert torch.equal(ResponseLogprobs(model)(*left_pad(PROMPTS), garbage, mask, 1.0), logprobs)
    order = [2, 0, 1]
    rows = [2 * i + j for i in order for j in (0, 1)]
    shuffled = ResponseLogprobs(model)(*left_pad([PROMPTS[i] for i in order]), ids[rows], mask[rows], 1.0)
    assert (shuffled - logprobs[rows]).abs().max() < 1e-5


def test_the_eos_is_trained_and_the_padding_is_not():
    """pad = EOS: the gradient reaches the first EOS, and no later one."""
    model = tiny_llama()
    ids, mask = response_tensors()
    logprobs = ResponseLogprobs(model)(*left_pad(PROMPTS), ids, mask, 1.0)
    logprobs.retain_grad()
    reinforce_loss(logprobs, mask, torch.tensor([1.0, 2, 3, 4, 5, 6])).backward()
    assert (logprobs.grad[mask.bool()] != 0).all() and (logprobs.grad[~mask.bool()] == 0).all()
    assert logprobs.grad[3, 0] != 0 and logprobs.grad[3, 1:].abs().sum() == 0  # the response that is one EOS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_generate_draws_from_the_models_distribution(temperature):
    """Chi-square over all two-token responses of a toy vocabulary, expected counts from the plain forward."""
    model, n = tiny_llama(vocab=6), 40_000
    torch.manual_seed(0)
    prompt = [2, 3]
    ids = generate(model, *left_pad([prompt], extra=1), n, torch.rand(n, 2), temperature, [EOS])
    assert (ids[completion_mask(ids, EOS) == 0] == 0).all()
    observed, expected = [], []
    for response in [[EOS]] + [[a, b] for a in (0, 2, 3, 4, 5) for b in range(6)]:
        columns = [ids[:, t] == token for t, token in enumerate(response)]
        observed.append(torch.stack(columns).all(0).sum().item())
        expected.append(n * plain_logprobs(model, prompt, response, temperature).sum().exp().item())
    observed, expected = torch.tensor(observed).double(), torch.tensor(expected).double()
    assert observed.sum() == n and expected.sum().item() == pytest.approx(n, rel=1e-4)
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
    flattened = expected ** 0.9
    assert p_value(flattened / flattened.sum() * n) < 1e-6  # a slightly wrong temperature is seen


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_finished_rows_that_leave_the_batch_change_nothing(make):
    """Against a sampler without cache, padding, batch or leaving rows, from the same random numbers."""
    model, k = make(vocab=12), 8
    prompts = [[2, 3, 4], [5], [6, 7, 8, 9, 10]]
    torch.manual_seed(3)
    uniforms = torch.rand(len(prompts) * k, 12)
    ids = generate(model, *left_pad(prompts), k, uniforms, 1.0, [EOS, 11])
    mask = completion_mask(ids, [EOS, 11])
    lengths = mask.sum(1)
    assert lengths.min() < 4 < lengths.max()  # rows did leave early
    for i, row in enumerate(ids):
        tokens = []
        for u in uniforms[i]:
            cdf = model(torch.tensor([prompts[i // k] + tokens])).logits[0, -1].softmax(0).cumsum(0)
            tokens.append(int(torch.searchsorted(cdf, u * cdf[-1], right=True)))
            if tokens[-1] in (EOS, 11):
                break
        assert row[:lengths[i]].tolist() == tokens


def test_text_statistics():
    s = ppo.text_statistics([[5, 6, 5, 6, 5, 1], [7, 8]], [1])
    # bigrams 56 65 56 65 51 | 78: 4 distinct of 6; trigrams 565 656 565 651: 3 distinct of 4 -> .25, and none -> 0
    assert s == {"response_length": 4, "eos_rate": 0.5, "distinct_2": 4 / 6, "repetition": 0.125}


def test_random_streams_differ_by_key_and_repeat():
    draw = lambda *key: torch.rand(3, generator=ppo.random_stream(*key)).tolist()
    assert draw(1, 3, 0) == draw(1, 3, 0)
    assert len({tuple(draw(seed, purpose, step)) for seed in (1, 2) for purpose in (0, 3) for step in (0, 1)}) == 8


def test_the_same_name_has_the_same_text_in_every_script():
    """So that what is proved of one copy is proved of all, packed_attention's sliding windows for instance. rloo.py's are others."""
    texts = {}
    for script in ("reinforce", "ppo", "dpo", "reward_model", "reward_model_ordinal"):
        source = (Path(ppo.__file__).parent / f"{script}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("Args", "main"):
                texts.setdefault(node.name, []).append(ast.get_source_segment(source, node))
    shared = {name for name, copies in texts.items() if len(copies) > 1}
    assert shared >= {"load", "save", "encode_prompts", "packed_attention"} and all(len(set(texts[name])) == 1 for name in shared)

"""A row [prompt | response 1 | ... | response k] gives what each text alone gives: log-probabilities and gradients, on many architectures."""

import pytest
import torch
import transformers
from conftest import run_script, tiny_gpt2, tiny_llama

import rloo

SMALL = dict(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    initializer_range=0.3,
)
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
# Class of the configuration: what it takes besides SMALL. Windows are shorter than the prompts.
FAMILIES = {
    "Llama": dict(attention_dropout=0.5),
    "Mistral": dict(sliding_window=6),
    "Qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "Qwen3": dict(head_dim=8),
    "Gemma": dict(head_dim=8),
    "Gemma2": dict(
        head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "Gemma3Text": dict(head_dim=8, query_pre_attn_scalar=8, **MIXED),
    "Phi3": dict(sliding_window=6),
    "Starcoder2": dict(sliding_window=6),
    "StableLm": {},
    "Olmo2": {},
    "Olmo3": MIXED,
    "SmolLM3": {},
    "Granite": dict(logits_scaling=3.0, attention_multiplier=0.3),
    "Cohere": dict(logit_scale=0.5),
    "Cohere2": MIXED,
    "Phi": {},
    "Nemotron": {},
    "Glm": dict(head_dim=8),
    "Glm4": dict(head_dim=8),
    "Exaone4": MIXED,
    "Helium": dict(head_dim=8),
    "Ministral": dict(head_dim=8, **MIXED),
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "GptOss": dict(head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32),
    "GPTNeoX": {},
    "GPT2": GPT2,
    "GPTBigCode": GPT2,
    "Falcon": {},
    "Llama4Text": dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=48),
    "Persimmon": {},
    "Ernie4_5": dict(head_dim=8),
    "SeedOss": dict(head_dim=8),
    "HunYuanDenseV1": dict(head_dim=8),
    "Apertus": {},
    "Arcee": {},
    "VaultGemma": dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
}
REFUSED = {
    "Bloom": dict(n_layer=2, n_head=4),
    "Mpt": {},
    "Mamba": dict(state_size=4),
    "Lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "GPTNeo": dict(
        num_layers=2, num_hidden_layers=2, attention_types=[[["global", "local"], 1]], window_size=256
    ),  # counts the tokens of a row
}
FIVE = ["Llama", "GPT2", "Qwen2", "Mistral", "Gemma3Text"]
PROMPTS = [[5, 9, 14, 8, 9, 10, 11, 12, 13], [7], [3, 4, 5, 6, 7, 8, 30, 31, 32, 33, 34, 35]]
RESPONSES = [
    [20, 21, 22, 1],
    [1],
    [24, 25, 26, 27, 60, 61, 62, 63],
    [23, 1],
    [30],
    [34, 35, 36, 1],
    [40, 41],
    [50, 51, 52],
]


def make(name, attention="eager", **more):
    torch.manual_seed(0)
    options = {**SMALL, **{**FAMILIES, **REFUSED}[name], **more}
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


def alone(model, prompt, response, temperature=1.0):
    """An ordinary forward pass of one text: no padding, no mask."""
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def groups_of(k):
    """k responses to each of the prompts, of every length, none the same in two places."""
    return [[RESPONSES[(3 * i + j) % len(RESPONSES)] for j in range(k)] for i in range(len(PROMPTS))]


def compare(model, k, temperature=1.0, row_length=1024):
    """Largest differences of log-probabilities, and of gradients relative to the largest of a parameter."""
    groups = groups_of(k)
    rows = rloo.make_rows(PROMPTS, groups, "cpu", row_length)
    logprobs = rloo.ResponseLogprobs(model)(rows, temperature)
    weights = torch.randn(logprobs.shape)
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, difference = 0.0, 0.0
    for n in range(len(PROMPTS) * k):
        response = groups[n // k][n % k]
        one = alone(model, PROMPTS[n // k], response, temperature)
        difference = max(difference, (one - logprobs[n, : len(response)]).abs().max().item())
        assert rows.response_mask[n].tolist() == [True] * len(response) + [False] * (logprobs.shape[1] - len(response))
        assert logprobs[n, len(response) :].abs().sum() == 0
        total = total + (one * weights[n, : len(response)]).sum()
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 1e-2
    return difference, max(
        (gradients[n] - g).abs().max().item() / max(1, g.abs().max().item()) for n, g in expected.items()
    )


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FIVE)
def test_rows_equal_each_text_alone(name, attention, k):
    logprobs, gradients = compare(make(name, attention), k)
    assert logprobs < 1e-5 and gradients < 1e-5


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_at_another_temperature(temperature):
    logprobs, gradients = compare(tiny_llama(), 3, temperature)
    assert logprobs < 1e-5 and gradients < 1e-5


@pytest.mark.parametrize("row_length", [1, 16, 24])
def test_a_long_row_ends_and_the_prompt_begins_another(row_length):
    rows = rloo.make_rows(PROMPTS, groups_of(8), "cpu", row_length)
    assert len(rows.ids) > len(PROMPTS)
    filled = (rows.segments >= 0).sum(1)
    assert (
        (filled <= row_length + 1) | (rows.segments.amax(1) == rows.segments.masked_fill(rows.segments < 1, 99).amin(1))
    ).all()
    logprobs, gradients = compare(tiny_gpt2(), 8, row_length=row_length)
    assert logprobs < 1e-5 and gradients < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = make(name)
    logprobs, gradients = compare(model, 2)
    assert logprobs < 1e-4 and gradients < 1e-4
    rloo.check_model(rloo.Args(model=name), rloo.ResponseLogprobs(model), 12, "--max-new-tokens")
    # The sampler, against one that runs every text alone.
    model.generation_config.eos_token_id = [1]
    uniforms = torch.rand(3, 6)
    for prompt, response, numbers in zip(PROMPTS, rloo.generate(model, PROMPTS, 1, uniforms, 1.0), uniforms):
        for t, token in enumerate(response):
            cdf = (
                model(torch.tensor([prompt + response[:t]]), use_cache=False).logits[0, -1].float().softmax(0).cumsum(0)
            )
            assert token == int(torch.searchsorted(cdf, numbers[t] * cdf[-1], right=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_responses_would_see_each_other_is_refused_in_a_line(name):
    with pytest.raises(SystemExit) as stop:
        rloo.check_model(rloo.Args(model=name), rloo.ResponseLogprobs(make(name)), 12, "--max-new-tokens")
    assert stop.value.code.startswith(f"--model {name}: ") and "\n" not in stop.value.code


def test_texts_longer_than_the_models_positions_are_refused_before_training():
    args = rloo.Args(model="m")
    with pytest.raises(SystemExit, match="--max-new-tokens: texts of 513 tokens, --model reads 512"):
        rloo.check_model(args, rloo.ResponseLogprobs(tiny_gpt2()), 513, "--max-new-tokens")
    rloo.check_model(args, rloo.ResponseLogprobs(tiny_gpt2()), 512, "--max-new-tokens")


def test_order_and_neighbours_change_nothing():
    model = tiny_llama()
    groups = groups_of(2)
    logprobs = rloo.ResponseLogprobs(model)(rloo.make_rows(PROMPTS, groups, "cpu"), 1.0)
    order = [2, 0, 1]
    rows = rloo.make_rows([PROMPTS[i] for i in order], [groups[i] for i in order], "cpu")
    shuffled = rloo.ResponseLogprobs(model)(rows, 1.0)
    expected = torch.cat([logprobs[2 * i : 2 * i + 2] for i in order])
    assert (shuffled - expected).abs().max() < 1e-5


def test_every_token_of_a_response_is_trained_its_eos_too_and_nothing_else():
    """pad = EOS: no mask looks for a token, so the EOS counts once and the padding never."""
    model = tiny_llama()
    rows = rloo.make_rows(PROMPTS, groups_of(2), "cpu")
    logprobs = rloo.ResponseLogprobs(model)(rows, 1.0)
    logprobs.retain_grad()
    rloo.policy_gradient_loss(logprobs, rows.response_mask, torch.tensor([1.0, 2, 3, 4, 5, 6])).backward()
    assert (logprobs.grad[rows.response_mask] != 0).all() and (logprobs.grad[~rows.response_mask] == 0).all()
    assert rows.response_mask.sum(1).tolist() == [len(r) for group in groups_of(2) for r in group]


@pytest.mark.parametrize("make_tiny", [tiny_llama, tiny_gpt2])
def test_gradient_checkpointing_gives_the_same_gradients(make_tiny):
    gradients = []
    for checkpointing in (False, True):
        model = make_tiny()
        for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)
        model = type(model)(model.config) if make_tiny is tiny_gpt2 else model  # dropout is read when it is built
        model.load_state_dict(make_tiny().state_dict())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        rloo.ResponseLogprobs(model)(rloo.make_rows(PROMPTS, groups_of(3), "cpu"), 1.0).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_a_model_is_loaded_without_dropout(tmp_path, tiny):
    for name in ("GPT2", "OPT", "Llama"):
        make(name, **({"resid_pdrop": 0.3, "embd_pdrop": 0.3} if name == "GPT2" else {})).save_pretrained(
            tmp_path / name
        )
        transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / name)
        model, _ = rloo.load_model(str(tmp_path / name))
        model.train()
        logprobs = rloo.ResponseLogprobs(model)
        rows = rloo.make_rows(PROMPTS, groups_of(2), "cpu")
        assert torch.equal(logprobs(rows, 1.0), logprobs(rows, 1.0))


def test_a_run_with_gradient_checkpointing_is_the_same_run(tiny_flags, tmp_path):
    for flag in ("--gradient-checkpointing", "--no-gradient-checkpointing"):
        run_script(rloo, *tiny_flags, flag, "--eval-prompts", 0, "--output-dir", tmp_path / flag)
    a, b = (
        torch.load(tmp_path / flag / "final/trainer_state.pt")["optimizer"]["state"]
        for flag in ("--gradient-checkpointing", "--no-gradient-checkpointing")
    )
    assert all(torch.equal(a[i]["exp_avg"], b[i]["exp_avg"]) for i in a)

"""gpu.py: sampling by a static cache gives generate's responses; on a GPU also as a CUDA graph. The other tasks need a GPU."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_rows import FAMILIES, SMALL

import rloo

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import gpu  # noqa: E402

PROMPTS = [[7, 8], [9, 10, 11, 12]]


def family(name, device, eos_ids=(1, *range(60, 90))):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **FAMILIES[name]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    model.generation_config.eos_token_id = list(eos_ids)
    if not gpu.can_use_graph(model, 4 + 24):
        pytest.skip("its layers need another cache: a short window, or a state")
    return model


def uniforms(length=24):
    return torch.rand(6, length, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_cache_gives_the_responses_of_generate(name, monkeypatch):
    """Logits agree to 1e-6 of their size, as more zeros are added up. A uniform that falls between two of them is rare."""
    captured = []
    monkeypatch.setattr(gpu, "capture", lambda step: captured.append(step) or step)
    for eos_ids in ([258], [1, *range(60, 90)]):  # no response ends early; some do
        model = family(name, "cpu", eos_ids)
        expected = rloo.generate(model, PROMPTS, 3, uniforms(), 0.9)
        responses = gpu.generate_by_graph(model, PROMPTS, 3, uniforms(), 0.9)
        assert sum(a == b for a, b in zip(responses, expected, strict=True)) >= 5
    assert captured and {len(response) for response in expected} != {24}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_responses_too(length, monkeypatch):
    monkeypatch.setattr(gpu, "capture", lambda step: step)
    model = family("Llama4Text", "cpu")
    expected = rloo.generate(model, PROMPTS, 3, uniforms(length), 0.9)
    assert gpu.generate_by_graph(model, PROMPTS, 3, uniforms(length), 0.9) == expected


def test_it_stops_when_all_have_ended(monkeypatch):
    steps = []
    monkeypatch.setattr(gpu, "capture", lambda step: lambda: steps.append(1) or step())
    model = family("Llama4Text", "cpu", range(2, 258))
    assert all(len(response) < 8 for response in gpu.generate_by_graph(model, PROMPTS, 3, uniforms(), 0.9))
    assert len(steps) < 8


def test_a_window_that_is_too_short_is_told():
    config = transformers.MistralConfig(**SMALL, sliding_window=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert gpu.can_use_graph(model, 16) and not gpu.can_use_graph(model, 17)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_gives_the_responses_of_generate(name):
    """Under autocast and without; and after the weights have changed."""
    model = family(name, "cuda")
    results = []
    for bf16 in (False, True):
        for scale in (1.0, 1.5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(scale)
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                graph = gpu.generate_by_graph(model, PROMPTS, 3, uniforms(), 0.9)
                loop = rloo.generate(model, PROMPTS, 3, uniforms(), 0.9)
            if bf16:  # added up in another order: the tokens agree until a uniform falls on a boundary
                assert sum(a[:4] == b[:4] for a, b in zip(graph, loop)) >= 4
            else:
                assert graph == loop
            results.append(graph)
    assert results[0] != results[1]

"""variants/rloo_lora.py and dpo_lora.py: the adapter is what it should be, alone is trained, and is the reference when it is off."""

import json
import os
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import byte_tokenizer, grad_norm, run_in_two_processes, run_script, scalars, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dpo_lora
import rloo_lora

PROMPT, RESPONSES = [2, 3, 4, 5], [[6, 7, 8], [9, 10], [11]]
both = pytest.mark.parametrize("script", [rloo_lora, dpo_lora], ids=lambda script: script.__name__)


def adapted(bf16=False, noise=0.1):
    """A tiny model with an adapter that is no longer 0."""
    args = SimpleNamespace(lora_rank=4, lora_alpha=8, load_in_4bit=False, seed=1)
    model = rloo_lora.add_adapter(args, tiny_llama(), bf16)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, noise)
    return model


def rows():
    return rloo_lora.make_rows([PROMPT], [RESPONSES], "cpu")


def test_a_new_adapter_changes_nothing_and_off_it_is_the_base_exactly():
    plain = rloo_lora.ResponseLogprobs(tiny_llama())(rows())
    assert torch.equal(rloo_lora.ResponseLogprobs(adapted(noise=0))(rows()), plain)
    policy = rloo_lora.ResponseLogprobs(adapted())
    assert (policy(rows()) - plain).abs().max() > 0.1
    off = rloo_lora.AdapterOff(policy)(rows(), 1.0)
    assert torch.equal(off, plain) and not off.requires_grad
    assert (policy(rows()) - plain).abs().max() > 0.1  # and it is on again


def test_loss_and_gradient_are_those_of_the_merged_model():
    """W' = W + s B A, so dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW'."""
    model = adapted()
    merged = adapted().merge_and_unload().requires_grad_(True)
    losses = []
    for network in (model, merged):
        logprobs = rloo_lora.ResponseLogprobs(network)(rows())
        advantages = rloo_lora.rloo_advantages(torch.tensor([1.0, 2, 5]), 3)
        losses.append(rloo_lora.policy_gradient_loss(logprobs, rows().response_mask, advantages))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    dense = dict(merged.named_modules())
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 2 * 7  # q, k, v, o, gate, up, down of two layers; not the head
    for name, layer in layers.items():
        weight_grad = dense[name.removeprefix("base_model.model.")].weight.grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, 2 * weight_grad @ a.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.grad, 2 * b.T @ weight_grad, rtol=1e-4, atol=1e-5)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(layers) and all("lora_" in name for name in trained)


def test_the_frozen_weights_are_cast_once_and_adapters_stay_in_fp32():
    for name, weight in adapted(bf16=True).named_parameters():
        is_base_layer = "base_layer" in name or "lm_head" in name
        assert weight.dtype == (torch.bfloat16 if is_base_layer else torch.float32), name


# ---- runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [dict(prompt=f"q{i}", chosen=" abc"[: 2 + i % 3], rejected=" 1234"[: 2 + i % 4]) for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def flags_of(tiny, tiny_flags, pairs):
    def flags(script):
        if script is rloo_lora:
            return [*tiny_flags, "--save-every", 1, "--learning-rate", 0.01]
        reward = tiny_flags[tiny_flags.index("--reward") + 1]
        text = f"--model {tiny} --dataset {pairs} --reward {reward} --precision fp32 --total-steps 4 --eval-prompts 5"
        text += " --pairs-per-step 4 --micro-batch-size 2 --save-every 1 --max-new-tokens 6 --learning-rate 0.01"
        return text.split()

    return flags


@both
def test_a_run_trains_the_adapter_and_resumes_to_the_bit(script, flags_of, tiny, tmp_path, capsys):
    out = tmp_path / "a"
    run_script(script, *flags_of(script), "--output-dir", out)
    printed = capsys.readouterr().out
    assert f"{out}/final" in printed and "merge_and_unload" in printed
    shutil.copytree(out / "checkpoint-2", tmp_path / "b/checkpoint-2")
    run_script(script, "--resume", tmp_path / "b/checkpoint-2")
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("SFT")] == [
        line for line in printed.splitlines() if line.startswith("SFT")
    ]  # the reference knows nothing of the checkpoint
    a, b = (load_file(folder / "final/adapter_model.safetensors") for folder in (out, tmp_path / "b"))
    assert all(torch.equal(a[name], b[name]) for name in a) and len(a) == 28
    first = load_file(out / "checkpoint-1/adapter_model.safetensors")
    assert any((a[name] - first[name]).abs().max() > 1e-3 for name in a)
    states = [torch.load(folder / "final/trainer_state.pt") for folder in (out, tmp_path / "b")]
    assert len(states[0]["optimizer"]["state"]) == 28  # of the adapter alone
    for i, state in states[0]["optimizer"]["state"].items():
        assert all(torch.equal(state[name], states[1]["optimizer"]["state"][i][name]) for name in state)
    kl = scalars(out, "eval/kl")
    assert kl[0] == 0 and abs(kl[-1]) > 1e-4
    assert not (out / "final/model.safetensors").exists()


@both
def test_what_is_saved_loads_by_transformers_and_merges_by_the_printed_command(script, flags_of, tmp_path, capsys):
    run_script(script, *flags_of(script), "--output-dir", tmp_path / "o")
    command = capsys.readouterr().out.splitlines()[-1]
    code = command.removeprefix('python -c "').removesuffix('"').replace("'merged'", f"'{tmp_path}/merged'")
    exec(code, {})
    assert script.load_model(f"{tmp_path}/merged")[1].eos_token == "</s>"  # as --model would
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o/final", attn_implementation="eager")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    a, b = (script.ResponseLogprobs(model.eval())(rows()) for model in (loaded, merged))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert (a - script.ResponseLogprobs(tiny_llama())(rows())).abs().max() > 1e-3


def test_dpo_finds_the_built_in_pairs():
    args = dpo_lora.Args()
    pairs = dpo_lora.read_pairs(args, SimpleNamespace(print=print), None, "train")
    assert len(pairs) == 5371


def test_two_processes_equal_one(flags_of, tmp_path):
    flags = [*flags_of(rloo_lora), "--total-steps", 2]
    run_script(rloo_lora, *flags, "--output-dir", tmp_path / "one")
    run_in_two_processes(rloo_lora, *flags, "--output-dir", tmp_path / "two")
    assert grad_norm(tmp_path / "two") == pytest.approx(grad_norm(tmp_path / "one"), rel=1e-4)


def test_gradient_checkpointing_gives_the_same_step(flags_of, tmp_path):
    for name, more in (("a", []), ("b", ["--gradient-checkpointing"])):
        run_script(rloo_lora, *flags_of(rloo_lora), "--total-steps", 1, *more, "--output-dir", tmp_path / name)
    assert (
        grad_norm(tmp_path / "a") == pytest.approx(grad_norm(tmp_path / "b"), rel=1e-5)
        and grad_norm(tmp_path / "a") > 0
    )


def test_eval_only_shows_the_model_without_and_with_its_adapter(flags_of, tmp_path, capsys):
    run_script(rloo_lora, *flags_of(rloo_lora), "--output-dir", tmp_path / "o")
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()[-2:]
    run_script(rloo_lora, "--resume", tmp_path / "o/final", "--eval-only")
    assert capsys.readouterr().out.split("\n\n")[0].splitlines()[-2:] == table


def test_an_adapter_folder_is_a_reward(tiny, tmp_path):
    assert rloo_lora.merge_adapter("vader") == "vader" and rloo_lora.merge_adapter(None) is None
    assert rloo_lora.merge_adapter(tiny) == tiny
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    folder = rloo_lora.merge_adapter(str(tmp_path / "adapter"))
    assert folder != str(tmp_path / "adapter")
    accelerator = SimpleNamespace(device="cpu", autocast=torch.no_grad)
    score = rloo_lora.load_scorer("--reward", folder, accelerator)
    prompt = rloo_lora.Prompt([0], None, {"prompts": "ab"})
    ids = byte_tokenizer()("abcd")["input_ids"] + [1]
    assert score([prompt], ["cd"]) == pytest.approx([model(torch.tensor([ids])).logits.item()], abs=1e-4)


def test_an_adapter_without_a_head_is_no_reward(flags_of, tmp_path):
    run_script(rloo_lora, *flags_of(rloo_lora), "--total-steps", 1, "--output-dir", tmp_path / "o")
    with pytest.raises(SystemExit, match="an adapter without a trained head"):
        rloo_lora.merge_adapter(str(tmp_path / "o/final"))


def test_the_built_in_model_becomes_a_folder_that_adapters_can_name(tiny, tmp_path, monkeypatch):
    real = rloo_lora.load_model
    monkeypatch.setattr(rloo_lora, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(rloo_lora, "load_model", lambda name, *more: real(tiny if name == "smollm2" else name, *more))
    accelerator = SimpleNamespace(is_local_main_process=True, wait_for_everyone=lambda: None)
    for _ in range(2):  # the second time it is there
        model, _ = rloo_lora.load_base(SimpleNamespace(model="smollm2", load_in_4bit=False), accelerator)
        assert model.name_or_path == f"{tmp_path}/plain-rlhf-smollm2" and os.listdir(tmp_path) == ["plain-rlhf-smollm2"]


# ---- four bits


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Layers of 64 and more, as one block of 4-bit weights has 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, bos_token_id=0)
    config.update(dict(num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, initializer_range=0.3))
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_in_four_bits_weights_are_near_and_the_same_in_sampling_and_in_training(wide):
    small, _ = rloo_lora.load_model(wide, rloo_lora.FourBitCausalLM)
    full, _ = rloo_lora.load_model(wide)
    layer = small.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() * 2 == 64 * 128
    assert small.generation_config.eos_token_id == full.generation_config.eos_token_id
    hidden = torch.randn(8, 64)
    exact = full.model.layers[0].mlp.up_proj(hidden)
    assert 0.01 < (layer(hidden) - exact).norm() / exact.norm() < 0.15
    network = rloo_lora.ResponseLogprobs(small)
    with torch.no_grad():
        sampling = network.eval()(rows())
    assert torch.equal(sampling, network.train()(rows()).detach())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_four_bits_it_learns(wide, tiny_flags, precision, tmp_path):
    flags = (
        "--load-in-4bit --total-steps 40 --max-new-tokens 6 --prompts-per-step 8 --micro-batch-size 4 --kl-coef 0.01"
    )
    more = ["--eval-prompts", 0, "--learning-rate", 0.02, "--precision", precision, "--output-dir", tmp_path]
    run_script(rloo_lora, *tiny_flags, *flags.split(), "--model", wide, *more)
    scores = scalars(tmp_path, "objective/scores")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.2
    assert all(
        torch.isfinite(weight).all() for weight in load_file(tmp_path / "final/adapter_model.safetensors").values()
    )

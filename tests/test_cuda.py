"""On a real GPU: the numbers of the CPU, and whole runs. The rest of the suite stays on the CPU (conftest.py); CI has no GPU and skips these."""
import copy
import json
import math

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from conftest import byte_tokenizer, run_script, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dpo
import ppo
import reinforce
import reward_model
import reward_model_ordinal
import rloo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEXTS = [("question", ["answer", "longer answer", "no"]), ("q", ["a"]), ("what is it?", ["this and that", "nothing"])]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True), GradientState._reset_state()  # the tests after these are the CPU's


@pytest.mark.parametrize("extra", [{}, dict(model_type="mistral", sliding_window=5), dict(
    model_type="gemma2", sliding_window=5, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)], ids=lambda x: x.get("model_type", "llama"))
def test_packed_texts_give_the_scores_and_gradients_of_the_cpu(extra):
    """On a GPU a row's attention is one call, with a mask; with sliding windows or soft caps it goes text by text as on the CPU."""
    options = dict(model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
                   num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=258, eos_token_id=1) | extra
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**options)).eval()
    tokenizer, results = byte_tokenizer(), {}
    rows = [{"ids": [reward_model.encode_answer(tokenizer, prompt, x, False) for x in answers]} for prompt, answers in TEXTS]
    for device in ("cpu", "cuda"):
        net = reward_model.AnswerLogits(copy.deepcopy(model).to(device))
        logits = net(*reward_model.collate(rows, device))
        (logits * torch.arange(1.0, 1 + len(logits), device=device)[:, None]).sum().backward()
        results[device] = [logits.detach().cpu(), *(p.grad.cpu() for p in net.parameters() if p.grad is not None)]
    for a, b in zip(results["cpu"], results["cuda"], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * (1 + a.abs().max()))


def test_answers_have_the_log_probabilities_of_the_cpu():
    tokenizer, values = byte_tokenizer(), {}
    groups = [[tokenizer(x)["input_ids"] for x in (prompt, *answers)] for prompt, answers in TEXTS]
    for device in ("cpu", "cuda"):
        net = dpo.AnswerLogps(tiny_llama().to(device))
        values[device] = net(*dpo.pack(groups, device), 0.7).detach().cpu()
    assert torch.allclose(values["cpu"], values["cuda"], atol=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_rloo_samples_the_same_responses_and_its_rows_have_the_log_probabilities_and_gradients_of_the_cpu(make):
    prompts, uniforms, results = [[7, 8], [9, 10, 11, 12]], torch.rand(6, 12, generator=torch.Generator().manual_seed(0)), {}
    for device in ("cpu", "cuda"):
        model = make().to(device)
        model.generation_config.eos_token_id = [1, *range(60, 90)]  # some end early
        responses = rloo.generate(model, prompts, 3, uniforms, 0.9)
        net = rloo.ResponseLogprobs(model)
        for length in (1024, 8):  # all responses of a prompt in one row, and prompts that begin further rows
            rows = rloo.make_rows(prompts, [responses[:3], responses[3:]], device, length)
            logprobs = net(rows, 0.9)
            net.zero_grad()
            rloo.policy_gradient_loss(logprobs, rows.response_mask, torch.arange(6.0, device=device) - 2).backward()
            gradients = [p.grad.cpu().clone() for p in net.parameters()]
            results[device, length] = responses, logprobs.detach().cpu(), gradients
    assert len(set(map(len, responses))) > 1
    for length in (1024, 8):
        a, b = results["cpu", length], results["cuda", length]
        assert a[0] == b[0] and torch.allclose(a[1], b[1], atol=1e-4)
        for x, y in zip(a[2], b[2], strict=True):
            assert torch.allclose(x, y, atol=1e-4 * (1 + x.abs().max()))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_critic_has_the_values_and_gradients_of_the_cpu(make):
    prompts, groups = [[7, 8], [9, 10, 11, 12]], [[[20, 21, 1], [1], [22, 23, 24, 25]], [[26], [27, 28, 1], [29, 30]]]
    for length in (1024, 8):
        results = {}
        for device in ("cpu", "cuda"):
            torch.manual_seed(0)
            critic = ppo.Critic(make().base_model, torch.nn.Linear(32, 1)).to(device)
            rows = ppo.make_rows(prompts, groups, device, length)
            values = critic(rows)
            ppo.ppo_value_loss(values, torch.zeros_like(values), torch.ones_like(values), rows.response_mask, 0.2).backward()
            results[device] = [values.detach().cpu(), *(p.grad.cpu() for p in critic.parameters() if p.grad is not None)]
        for a, b in zip(results["cpu"], results["cuda"], strict=True):
            assert torch.allclose(a, b, atol=1e-4 * (1 + a.abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("script", [reinforce, rloo, ppo, dpo, reward_model, reward_model_ordinal], ids=lambda x: x.__name__)
def test_runs_train_and_resume(script, precision, tiny, tiny_flags, tmp_path):
    """In fp32 the first step's gradient norm is the CPU's within 1 %, and its loss; every curve is finite; a resumed run ends where the whole one did."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(dict(prompt=f"q{i}", chosen="ab" * (1 + i % 3), rejected="12")) + "\n" for i in range(20)))
    pairs = ["--model", tiny, "--dataset", str(tmp_path / "pairs.jsonl"), "--eval-prompts", "4", "--prompts-per-step", "4", "--micro-batch-size", "2",
             "--total-steps", "4", "--eval-every", "2", "--learning-rate", "1e-3", *(["--max-new-tokens", "8"] if script is dpo else [])]
    flags = [*(tiny_flags if script in (reinforce, rloo, ppo) else pairs), "--precision", precision, "--save-every", "2"]
    run_script(script, *flags, "--output-dir", tmp_path / "gpu")
    events = EventAccumulator(str(tmp_path / "gpu")).Reload()
    assert all(math.isfinite(e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))
    run_script(script, "--resume", tmp_path / "gpu/checkpoint-2", "--output-dir", tmp_path / "resumed")
    half, whole, again = (load_file(tmp_path / x / "model.safetensors") for x in ("gpu/checkpoint-2", "gpu/final", "resumed/final"))
    distance = lambda a, b: sum((a[name] - b[name]).abs().sum().item() for name in a)
    assert distance(whole, again) < 0.2 * distance(whole, half)  # a GPU adds in another order from run to run
    if precision == "fp32":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "1")
            run_script(script, *flags, "--output-dir", tmp_path / "cpu")
        other = EventAccumulator(str(tmp_path / "cpu")).Reload()
        for tag in ("policy/grad_norm", *(t for t in events.Tags()["scalars"] if t.startswith("loss/"))):
            a, b = events.Scalars(tag)[0].value, other.Scalars(tag)[0].value
            assert math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-4), (tag, a, b)

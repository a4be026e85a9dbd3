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
from test_rows import FAMILIES, FIVE, SMALL

import dpo
import ppo
import reinforce
import reward_model
import reward_model_ordinal
import rloo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    yield
    (
        AcceleratorState._reset_state(reset_partial_state=True),
        GradientState._reset_state(),
    )  # the tests after these are the CPU's


@pytest.mark.parametrize("labels", [1, 10])
@pytest.mark.parametrize("name", FIVE)
def test_answers_have_the_scores_and_gradients_of_the_cpu(name, labels):
    """A group of 12 answers of 200 tokens is three rows; the others are short."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **FAMILIES[name], "num_labels": labels})
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    texts = [torch.randint(2, 258, shape) for shape in ((12, 200), (3, 20), (1, 9))]
    for group in texts:
        group[:, :8] = group[0, :8].clone()  # the prompt
    groups = [reward_model.Group("", [], group.tolist(), [], []) for group in texts]
    results = {}
    for device in ("cpu", "cuda"):
        net = reward_model.AnswerLogits(copy.deepcopy(model).to(device))
        rows = reward_model.group_rows(groups, device)
        assert len(rows.ids) == 5
        logits = net(rows)
        (logits * torch.arange(1.0, 1 + len(logits), device=device)[:, None]).sum().backward()
        results[device] = [logits.detach().cpu(), *(p.grad.cpu() for p in net.parameters() if p.grad is not None)]
    for a, b in zip(results["cpu"], results["cuda"], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * (1 + a.abs().max()))


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_pairs_have_the_losses_and_gradients_of_the_cpu(make, loss_type):
    tokenizer, examples, results = byte_tokenizer(), [], {}
    for texts in (("question", "answer", "longer answer"), ("q", "a", "bc"), ("what is it?", "this and that", "no")):
        prompt, *answers = (tokenizer(text)["input_ids"] for text in texts)
        examples.append(dpo.Example(dpo.Prompt(prompt, None, {}), prompt, [ids + [1] for ids in answers]))
    for device in ("cpu", "cuda"):
        policy, reference = (dpo.ResponseLogprobs(make(seed=seed).to(device)) for seed in (0, 1))
        values = dpo.pair_losses(
            dpo.Args(loss_type=loss_type), policy, reference.requires_grad_(False), examples, device
        )
        values["loss/policy"].mean().backward()
        results[device] = [*(x.detach().cpu() for x in values.values()), *(p.grad.cpu() for p in policy.parameters())]
    for a, b in zip(results["cpu"], results["cuda"], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * (1 + a.abs().max()))


def test_dpo_samples_answers_from_the_models_distribution():
    """Of two prompts, one padded on the left: 258 first tokens, against the probabilities of the CPU."""
    prompts, n, model = [[7, 8], [9, 10, 11, 12]], 20_000, tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 0.2  # flatter: more than the 50 likeliest tokens matter
    probabilities = [(model(torch.tensor([ids])).logits[0, -1] / 0.7).detach().softmax(0) for ids in prompts]
    model.to("cuda").generation_config = transformers.GenerationConfig(do_sample=True, eos_token_id=[1])
    torch.manual_seed(0)
    args = dpo.Args(temperature=0.7, max_new_tokens=1)
    samples = dpo.sample_answers(args, model, byte_tokenizer(), [dpo.Prompt(ids, None, {}) for ids in prompts] * n)
    for i, expected in enumerate(probabilities):
        counts = torch.bincount(torch.tensor([sample.responses[0][0] for sample in samples[i::2]]), minlength=258)
        common = n * expected >= 5
        chi2 = ((counts - n * expected) ** 2 / (n * expected))[common].sum()
        assert torch.special.gammaincc(common.sum() / 2, chi2 / 2) > 1e-3


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_rloo_samples_the_same_responses_and_its_rows_have_the_log_probabilities_and_gradients_of_the_cpu(make):
    prompts, uniforms, results = (
        [[7, 8], [9, 10, 11, 12]],
        torch.rand(6, 12, generator=torch.Generator().manual_seed(0)),
        {},
    )
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
            ppo.ppo_value_loss(
                values, torch.zeros_like(values), torch.ones_like(values), rows.response_mask, 0.2
            ).backward()
            results[device] = [
                values.detach().cpu(),
                *(p.grad.cpu() for p in critic.parameters() if p.grad is not None),
            ]
        for a, b in zip(results["cpu"], results["cuda"], strict=True):
            assert torch.allclose(a, b, atol=1e-4 * (1 + a.abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "script", [reinforce, rloo, ppo, dpo, reward_model, reward_model_ordinal], ids=lambda x: x.__name__
)
def test_runs_train_and_resume(script, precision, tiny, tiny_flags, tmp_path):
    """In fp32 the first step's gradient norm is the CPU's within 1 %, and its loss; every curve is finite; a resumed run ends where the whole one did."""
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(dict(prompt=f"q{i}", chosen="ab" * (1 + i % 3), rejected="12")) + "\n" for i in range(20))
    )
    pairs = [
        "--model",
        tiny,
        "--dataset",
        str(tmp_path / "pairs.jsonl"),
        "--eval-prompts",
        "4",
        "--pairs-per-step" if script is dpo else "--prompts-per-step",
        "4",
        "--micro-batch-size",
        "2",
        "--total-steps",
        "4",
        "--eval-every",
        "2",
        "--learning-rate",
        "1e-3",
        *(["--max-new-tokens", "8"] if script is dpo else []),
    ]
    flags = [
        *(tiny_flags if script in (reinforce, rloo, ppo) else pairs),
        "--precision",
        precision,
        "--save-every",
        "2",
    ]
    run_script(script, *flags, "--output-dir", tmp_path / "gpu")
    events = EventAccumulator(str(tmp_path / "gpu")).Reload()
    assert all(math.isfinite(e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))
    run_script(script, "--resume", tmp_path / "gpu/checkpoint-2", "--output-dir", tmp_path / "resumed")
    half, whole, again = (
        load_file(tmp_path / x / "model.safetensors") for x in ("gpu/checkpoint-2", "gpu/final", "resumed/final")
    )
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

"""DPO: losses by hand, pairs however they come and are batched, whole steps against the formula, a run as its user meets it."""

import csv
import gzip
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pandas
import pytest
import tokenizers
import torch
import transformers
from conftest import (
    byte_tokenizer,
    grad_norm,
    moments,
    run_in_two_processes,
    run_script,
    scalars,
    tiny_gpt2,
    tiny_llama,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_rows import FAMILIES, alone, make

import dpo
import rloo

ROOT = Path(__file__).parent.parent
ONE, ZERO = torch.ones(1), torch.zeros(1)
LOSSES = ["sigmoid", "ipo", "hinge", "robust", "simpo"]
BETA, SMOOTHING, MARGIN, TEMPERATURE = 0.3, 0.1, 0.4, 0.7


# ---- losses


@pytest.mark.parametrize(
    "loss_type, smoothing, at_one, at_zero",
    [
        ("sigmoid", 0.0, 0.6444, math.log(2)),
        ("sigmoid", 0.1, 0.6544, math.log(2)),
        ("robust", 0.1, 0.6319, math.log(2)),
        ("ipo", 0.0, 16.0, 25.0),
        ("hinge", 0.0, 0.9, 1.0),
    ],
)
def test_golden(loss_type, smoothing, at_one, at_zero):
    """h = 1, then h = 0, at beta 0.1; h may come from either answer, and from policy or reference."""
    for logps in ((ONE, ZERO, ZERO, ZERO), (ZERO, -ONE, ZERO, ZERO), (ZERO, ZERO, -ONE, ZERO), (ZERO, ZERO, ZERO, ONE)):
        losses, chosen, rejected = dpo.dpo_loss(*logps, 0.1, loss_type, smoothing)
        assert losses.item() == pytest.approx(at_one, abs=5e-5)
        assert (chosen - rejected).item() == pytest.approx(0.1)
    losses, chosen, rejected = dpo.dpo_loss(ZERO, ZERO, ZERO, ZERO, 0.1, loss_type, smoothing)
    assert losses.item() == pytest.approx(at_zero, abs=1e-5)
    assert chosen.item() == rejected.item() == 0


def test_simpo_golden():
    losses, chosen, rejected = dpo.dpo_loss(-ONE, -2 * ONE, ZERO, ZERO, 2.0, "simpo", simpo_margin=0.5)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-6)  # -log sigmoid(2 * 1 - 0.5)
    assert (chosen.item(), rejected.item()) == (-2, -4)  # the margin is the loss's own


@pytest.mark.parametrize("loss_type", LOSSES)
def test_descent_raises_the_chosen_answer_and_lowers_the_rejected(loss_type):
    logps = torch.zeros(2, requires_grad=True)
    losses, chosen, rejected = dpo.dpo_loss(logps[:1], logps[1:], ZERO, ZERO, 0.1, loss_type, 0.1)
    losses.backward()
    assert logps.grad[0] < 0 < logps.grad[1] and logps.grad.sum() == 0
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_robust_is_the_plain_loss_in_the_mean_over_wrong_labels(smoothing):
    torch.manual_seed(0)
    logps = 10 * torch.randn(4, 16)
    swapped = logps[[1, 0, 3, 2]]
    plain = dpo.dpo_loss(*logps, BETA)[0]
    right = dpo.dpo_loss(*logps, BETA, "robust", smoothing)[0]
    wrong = dpo.dpo_loss(*swapped, BETA, "robust", smoothing)[0]
    assert torch.allclose((1 - smoothing) * right + smoothing * wrong, plain, atol=1e-4)
    # cDPO is the mean over labels itself.
    mixed = (1 - smoothing) * plain + smoothing * dpo.dpo_loss(*swapped, BETA)[0]
    assert torch.allclose(dpo.dpo_loss(*logps, BETA, "sigmoid", smoothing)[0], mixed, atol=1e-4)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_pairs_that_are_far_apart_have_finite_losses_and_gradients(loss_type):
    for far in (1e5, -1e5):
        logps = torch.tensor([far, -far], requires_grad=True)
        loss = dpo.dpo_loss(logps[:1], logps[1:], ZERO, ZERO, 0.1, loss_type, 0.1)[0]
        loss.backward()
        assert loss.isfinite() and logps.grad.isfinite().all()


# TRL's ipo divides by the length, ours sums, as the paper does.
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust"])
def test_equal_to_trl(loss_type):
    """The lines of the installed DPOTrainer that make the loss from the difference of the log-ratios, as they are."""
    source = inspect.getsource(pytest.importorskip("trl").DPOTrainer)
    block = re.search(rf'if loss_type == "{loss_type}":\n(.*?)\n\n', source, re.DOTALL)
    torch.manual_seed(0)
    logps = 10 * torch.randn(4, 16)
    smoothing = 0.1 if loss_type == "robust" else 0.0
    scope = {
        "F": torch.nn.functional,
        "torch": torch,
        "delta_score": logps[0] - logps[1] - logps[2] + logps[3],
        "self": dpo.Args(beta=0.3, label_smoothing=smoothing),
    }
    exec(textwrap.dedent(block[1]), scope)
    losses = dpo.dpo_loss(*logps, 0.3, loss_type, smoothing)[0]
    assert torch.allclose(losses, scope["per_sequence_loss"], atol=1e-5)


# ---- log-probabilities


TEXTS = [("a longer prompt", "yes", "nonono"), ("b", "x", "yy"), ("what?", "the best", "n")]


def ids_of(text):
    return byte_tokenizer()(text)["input_ids"]


def examples_of(texts):
    """Pairs as encode_pairs makes them of strings, by hand: a byte is a token, EOS is 1."""
    examples = []
    for prompt, *answers in texts:
        ids = ids_of(prompt)
        examples.append(dpo.Example(dpo.Prompt(ids, None, {}), ids, [ids_of(answer) + [1] for answer in answers]))
    return examples


def logps_alone(model, examples, loss_type="sigmoid"):
    """(B, 2), from an ordinary forward pass of each text."""
    reduce = torch.mean if loss_type == "simpo" else torch.sum
    return torch.stack([torch.stack([reduce(alone(model, e.start, a)) for a in e.answers]) for e in examples])


def largest_difference(gradients, expected):
    """Relative to the largest of a parameter, if that is more than 1."""
    return max(
        (a - b).abs().max().item() / max(1, b.abs().max().item()) for a, b in zip(gradients, expected, strict=True)
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make_tiny", [tiny_llama, tiny_gpt2])
def test_pair_logps_are_those_of_each_text_alone(make_tiny, attention, loss_type):
    model, plain = make_tiny(), make_tiny()
    model.set_attn_implementation(attention)
    examples = examples_of(TEXTS)
    rows = dpo.make_rows([e.start for e in examples], [e.answers for e in examples], "cpu")
    logps = dpo.pair_logps(dpo.Args(loss_type=loss_type), dpo.ResponseLogprobs(model), rows)
    expected = logps_alone(plain, examples, loss_type)
    assert logps.shape == (3, 2) and (logps - expected).abs().max() < 1e-5
    weights = torch.tensor([[1.0, -2], [3, -1], [-2, 1]])
    gradients = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    expected = torch.autograd.grad((expected * weights).sum(), list(plain.parameters()))
    assert max(gradient.abs().max() for gradient in expected) > 0.1
    assert largest_difference(gradients, expected) < 1e-5


def another(model):
    """The same with other weights: what the policy is to its reference after some steps."""
    moved = type(model)(model.config).eval()
    moved.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return moved


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Losses and gradients of pairs, against plain passes of each text."""
    reference = make(name)
    policy = another(reference)
    examples = examples_of(TEXTS)
    networks = [dpo.ResponseLogprobs(model) for model in (policy, reference.requires_grad_(False))]
    values = dpo.pair_losses(dpo.Args(beta=BETA), *networks, examples, "cpu")
    values["loss/policy"].mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    logps = logps_alone(policy, examples)
    ratios = logps - logps_alone(reference, examples)
    losses = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
    losses.mean().backward()
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert (losses - math.log(2)).abs().max() > 1e-3
    assert (values["loss/policy"] - losses).abs().max() < 1e-4
    assert (values["logps/chosen"] - logps[:, 0]).abs().max() < 1e-4
    assert (values["logps/rejected"] - logps[:, 1]).abs().max() < 1e-4
    assert gradients.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 1e-2
    assert largest_difference(gradients.values(), expected.values()) < 1e-4


def test_order_grouping_and_padding_change_nothing():
    reference = tiny_gpt2()  # absolute positions
    networks = [dpo.ResponseLogprobs(model) for model in (another(reference), reference)]
    examples = examples_of(TEXTS)
    args = dpo.Args(beta=BETA)
    together = dpo.pair_losses(args, *networks, examples, "cpu")
    order = [2, 0, 1]
    shuffled = dpo.pair_losses(args, *networks, [examples[i] for i in order], "cpu")
    singly = [dpo.pair_losses(args, *networks, [example], "cpu") for example in examples]
    for name, values in together.items():
        assert len(set(values.tolist())) > 1 or name == "rewards/accuracies"
        assert (shuffled[name] - values[order]).abs().max() < 1e-5
        assert (torch.cat([part[name] for part in singly]) - values).abs().max() < 1e-5


def test_answers_that_are_longer_than_a_row_begin_another():
    """Past 1024 tokens the prompt runs twice."""
    prompt, chosen, rejected = "p" * 200, "abc" * 200, "xyz" * 100
    torch.manual_seed(0)
    config = tiny_llama().config
    config.max_position_embeddings = 2048
    model = transformers.LlamaForCausalLM(config).eval()
    examples = examples_of([(prompt, chosen, rejected)])
    rows = dpo.make_rows([e.start for e in examples], [e.answers for e in examples], "cpu")
    assert len(rows.ids) == 2
    logps = dpo.pair_logps(dpo.Args(), dpo.ResponseLogprobs(model), rows)
    assert torch.allclose(logps, logps_alone(model, examples), rtol=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_at_the_start_a_pair_is_a_tie_and_a_tie_is_no_success(loss_type):
    network = dpo.ResponseLogprobs(tiny_llama())
    args = dpo.Args(loss_type=loss_type, label_smoothing=0.1)
    values = dpo.pair_losses(args, network, network, examples_of(TEXTS), "cpu")
    if loss_type in ("sigmoid", "robust"):
        assert values["loss/policy"].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    if loss_type != "simpo":  # which has no reference
        for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert values[name].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "loss_type, share_of_right, share_of_wrong",
    [("sigmoid", 0.9, 0.1), ("robust", 0.9 / 0.8, -0.1 / 0.8), ("simpo", 0.9, 0.1)],
)
def test_the_values_of_a_pair_take_their_flags(loss_type, share_of_right, share_of_wrong):
    """chosen -4 and rejected -9 over 2 and 3 tokens, the reference -6 and -8: h = 3, or means of -2 and -3."""
    policy = [[-1.0, -3.0, 0.0], [-2.0, -3.0, -4.0]]
    reference = [[-2.0, -4.0, 0.0], [-4.0, -2.0, -2.0]]
    networks = [lambda rows, logps=logps: torch.tensor(logps) for logps in (policy, reference)]
    args = dpo.Args(loss_type=loss_type, label_smoothing=0.1, beta=0.5, simpo_margin=0.3)
    example = dpo.Example(dpo.Prompt([1], None, {}), [1], [[2, 2], [3, 3, 3]])
    values = {name: value.tolist() for name, value in dpo.pair_losses(args, *networks, [example], "cpu").items()}
    h = 0.5 * 1 - 0.3 if loss_type == "simpo" else 0.5 * 3
    loss = share_of_right * math.log1p(math.exp(-h)) + share_of_wrong * math.log1p(math.exp(h))
    expected = {"loss/policy": [loss], "rewards/accuracies": [1]}
    if loss_type == "simpo":
        expected |= {"rewards/margins": [0.5], "rewards/chosen": [-1], "rewards/rejected": [-1.5]}
        expected |= {"logps/chosen": [-2], "logps/rejected": [-3]}
    else:
        expected |= {"rewards/margins": [1.5], "rewards/chosen": [1], "rewards/rejected": [-0.5]}
        expected |= {"logps/chosen": [-4], "logps/rejected": [-9]}
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-6)


def test_means_are_over_pairs_not_over_parts():
    parts = [{"a": torch.tensor([1.0, 2, 3])}, {"a": torch.tensor([10.0])}]
    assert dpo.means_of(parts) == {"a": 4.0}


# ---- data: what is a pair


class Here:
    """What reading asks of an accelerator."""

    device = torch.device("cpu")
    print = staticmethod(print)


def said(*texts, first="user"):
    """Messages in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(text):
    return said(text, first="assistant")


def encoded(data, tokenizer=None, eos_ids=(1,), **flags):
    """The examples of a file, in its order."""
    args = dpo.Args(dataset=str(data), **flags)
    pairs = dpo.read_pairs(args, Here, args.dataset, "train")
    return sum(dpo.encode_pairs(args, tokenizer or byte_tokenizer(), list(eos_ids), pairs).values(), [])


def decoded(example, tokenizer=None):
    """(prompt, prompt and chosen answer, prompt and rejected answer) as text."""
    decode = (tokenizer or byte_tokenizer()).decode
    return decode(example.prompt.ids), *[decode(example.start + ids) for ids in example.answers]


FORMATS = {
    "strings": dict(prompt="hi", chosen="good", rejected="bad"),
    "explicit messages": dict(prompt=said("hi"), chosen=answer("good"), rejected=answer("bad")),
    "messages with the prompt again": dict(prompt=said("hi"), chosen=said("hi", "good"), rejected=said("hi", "bad")),
    "implicit prompt": dict(chosen=said("hi", "good"), rejected=said("hi", "bad")),
    "null prompt": dict(prompt=None, chosen=said("hi", "good"), rejected=said("hi", "bad")),
    "UltraFeedback": dict(prompt="hi", chosen=said("hi", "good"), rejected=said("hi", "bad"), score_chosen=8.0),
    "a string before messages": dict(prompt="hi", chosen=answer("good"), rejected=answer("bad")),
    "messages before strings": dict(prompt=said("hi"), chosen="good", rejected="bad"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same_with_one_eos(name, write_jsonl):
    record = FORMATS[name]
    chat = name == "strings"  # messages are a chat anyway
    for tokenizer in (byte_tokenizer(), byte_tokenizer(begin=True), byte_tokenizer(begin=True, end=True)):
        (example,) = encoded(write_jsonl([record]), tokenizer, chat=chat)
        prompt = "<s>user:hi</s><s>assistant:"
        assert decoded(example) == (prompt, prompt + "good</s>", prompt + "bad</s>")
        assert example.start == example.prompt.ids and example.prompt.messages == said("hi")
        # A reward function has the row, and the prompt as the row has it.
        assert example.prompt.columns["prompts"] in ("hi", said("hi"))
        assert {key: example.prompt.columns[key] for key in record} == record


def test_a_longer_dialogue_and_a_system_message_are_prompts_too(write_jsonl):
    system = [{"role": "system", "content": "be kind"}]
    rows = [
        dict(prompt=system + said("a", "b", "c"), chosen=answer("good"), rejected=answer("bad")),
        dict(chosen=system + said("a", "b", "c", "good"), rejected=system + said("a", "b", "c", "bad")),
    ]
    examples = encoded(write_jsonl(rows))
    assert len(examples) == 2 and decoded(examples[0]) == decoded(examples[1])
    prompt = "<s>system:be kind</s><s>user:a</s><s>assistant:b</s><s>user:c</s><s>assistant:"
    assert decoded(examples[0]) == (prompt, prompt + "good</s>", prompt + "bad</s>")


def test_hh_dialogues_split_at_the_last_turn_that_both_have(write_jsonl):
    text = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go\n\nAssistant:"
    rows = [
        dict(chosen=text + " good", rejected=text + " bad"),
        dict(chosen=text + " good\n\nHuman: and?\n\nAssistant: more", rejected=text + " goods"),  # dialogues that part
        dict(chosen=text + " good</s>", rejected=text + " bad</s>"),  # their own EOS is not doubled
    ]
    first, second, third = encoded(write_jsonl(rows))
    assert decoded(first) == (text, text + " good</s>", text + " bad</s>") == decoded(third)
    assert decoded(second) == (text, text + rows[1]["chosen"][len(text) :] + "</s>", text + " goods</s>")


def test_an_answer_of_several_messages_is_left_out_and_its_first_turn_is_no_prompt():
    turns = dict(chosen=said("a", "b", "c", first="assistant"), rejected=said("a", "b", "d", first="assistant"))
    assert dpo.split_record({"prompt": said("hi"), **turns}, "prompt") == (said("hi"), "", "")


def test_bad_rows_are_left_out(write_jsonl, capsys):
    rows = [
        dict(prompt="a", chosen="b", rejected="c"),
        dict(prompt="a", chosen="b", rejected="b"),
        dict(prompt="a", chosen="", rejected="c"),
        dict(prompt="a", chosen="b", rejected=" \n"),
        dict(prompt="a", chosen=None, rejected="c"),
        dict(prompt="a", chosen="b", rejected=None),
        dict(prompt="", chosen="b", rejected="c"),
        dict(prompt=None, chosen="b", rejected="c"),
        dict(prompt="a" * 19, chosen="b", rejected="c"),  # 21 tokens with the EOS
        dict(prompt="a" * 10, chosen="b" * 10, rejected="c"),
        dict(prompt="a" * 10, chosen="b", rejected="c" * 10),
        dict(prompt="a" * 18, chosen="b", rejected="c"),
    ]
    examples = encoded(write_jsonl(rows), max_length=20)
    assert [len(example.prompt.ids) for example in examples] == [1, 18]
    assert "12 rows, 5 with a prompt and two different answers" in capsys.readouterr().out


def test_bad_messages_are_left_out(write_jsonl, capsys):
    rows = [
        dict(chosen=said("a", "b"), rejected=said("a", "c")),
        dict(chosen=said("a", "b"), rejected=said("a", "b")),
        dict(chosen=said("a", "b"), rejected=said("a", None)),
        dict(chosen=said("a", None), rejected=said("a", "b")),
        dict(chosen=said("a", "b"), rejected=said("a", " ")),
        dict(chosen=said("a", "b"), rejected=said("a")),
        dict(chosen=said("a", "b"), rejected=[]),
        dict(chosen=[], rejected=said("a", "b")),
        dict(chosen=said("a", "b"), rejected=None),
        dict(chosen=said("a", "b", "c", "d"), rejected=said("a", "B", "c", "e")),
        dict(chosen=answer("b"), rejected=answer("c")),  # no prompt
    ]
    assert len(encoded(write_jsonl(rows))) == 1
    assert "11 rows, 1 with a prompt and two different answers" in capsys.readouterr().out


def test_answers_that_the_template_makes_equal_are_left_out(write_jsonl):
    """As of templates that strip what stands around a message."""
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] | trim + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    rows = [dict(prompt="a", chosen="b", rejected="b "), dict(prompt="a", chosen="b", rejected="c ")]
    (example,) = encoded(write_jsonl(rows), byte_tokenizer(template), chat=True)
    assert decoded(example) == ("user:a\nassistant:", "user:a\nassistant:b</s>", "user:a\nassistant:c</s>")


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.json", "p.csv", "p.csv.gz", "p.tsv", "p.parquet", "p.a b.jsonl"])
def test_file_formats(tmp_path, monkeypatch, name):
    """Words that pandas takes for missing values are words."""
    rows = [("say 1", "None", "NA"), ("null", "nan", "N/A"), ("a, b", 'say "c"\nor d', "e")]
    path = tmp_path / name
    columns = ("prompt", "chosen", "rejected")
    if "json" in name:
        text = "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows)
    elif "sv" in name:
        lines = io.StringIO(newline="")
        csv.writer(lines, delimiter="\t" if "tsv" in name else ",").writerows([columns, *rows])
        text = lines.getvalue()
    if "parquet" in name:
        pandas.DataFrame(rows, columns=columns).to_parquet(path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    monkeypatch.chdir(tmp_path)  # a file of the current directory
    texts = [decoded(example) for example in encoded(name)]
    assert texts == [(p, p + chosen + "</s>", p + rejected + "</s>") for p, chosen, rejected in rows]


def test_keys_that_a_message_lacks_never_reach_the_template(tmp_path):
    """A parquet file has all keys in every message, most of them null."""
    template = "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('tools') }}{% endif %}"
    template += "{{ '<' + m['content'] + '>' }}{{ m.name is defined }}{% endfor %}"

    def messages(*texts, name=None):
        return [{**message, "name": name, "tool_calls": None} for message in said(*texts)]

    rows = [
        dict(chosen=messages("say 0", "a"), rejected=messages("say 0", "b")),
        dict(chosen=messages("say 1", "a", name="ann"), rejected=messages("say 1", "b", name="ann")),
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    examples = encoded(tmp_path / "p.parquet", byte_tokenizer(template))
    assert [decoded(example)[1] for example in examples] == ["<say 0>False<a>False</s>", "<say 1>True<a>False</s>"]
    assert examples[0].prompt.messages == said("say 0")


QUESTIONS = [dict(question=f"What is {i} and {i}?", chosen=f"It is {2 * i}.", rejected=f"No, {i}.") for i in range(12)]


def test_the_prompt_column_may_have_another_name(write_jsonl):
    examples = encoded(write_jsonl(QUESTIONS), prompt_column="question", chat=True)
    assert [decoded(e)[0] for e in examples] == [f"<s>user:{q['question']}</s><s>assistant:" for q in QUESTIONS]
    assert examples[0].prompt.columns == {**QUESTIONS[0], "prompts": QUESTIONS[0]["question"]}


@pytest.mark.parametrize(
    "rows, flag, columns",
    [
        (QUESTIONS, "prompt", "['question', 'chosen', 'rejected']"),
        (
            [{"system": "Be brief.", **row} for row in QUESTIONS],
            "prompt",
            "['system', 'question', 'chosen', 'rejected']",
        ),
        (QUESTIONS, "questions", "['question', 'chosen', 'rejected']"),
        ([{**row, "question": None} for row in QUESTIONS], "question", "['question', 'chosen', 'rejected']"),
        ([dict(chosen=answer("b"), rejected=answer("c"))], "prompt", "['chosen', 'rejected']"),
    ],
)
def test_without_prompts_the_columns_are_named(rows, flag, columns, write_jsonl):
    with pytest.raises(SystemExit) as stop:
        encoded(write_jsonl(rows), prompt_column=flag)
    message = f"--prompt-column {flag}: no row has a prompt and two answers; columns: {columns}"
    assert str(stop.value) == message


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_without_answers_the_columns_are_named(missing, write_jsonl):
    rows = [{"prompt" if key == "question" else key: row[key] for key in row if key != missing} for row in QUESTIONS]
    data = write_jsonl(rows)
    with pytest.raises(SystemExit) as stop:
        encoded(data)
    columns = ["prompt", *({"chosen", "rejected"} - {missing})]
    assert str(stop.value) == f"--dataset {data}: needs the columns chosen and rejected, it has {columns}"


# ---- data: training and held out


def load_pairs(tokenizer=None, **flags):
    args = dpo.Args(**flags)
    return dpo.load_pairs(args, Here, tokenizer or byte_tokenizer(), [1])


def prompts_of(examples):
    return [tuple(example.prompt.ids) for example in examples]


def test_pairs_of_a_held_out_prompt_are_not_trained_on(write_jsonl):
    rows = [dict(prompt=f"question {i % 12:02}", chosen="abc"[i % 3 :], rejected="012"[i % 2 :]) for i in range(40)]
    data = write_jsonl(rows)
    held_out_of = []
    for seed in (1, 2):
        train, held_out = load_pairs(dataset=data, eval_prompts=4, seed=seed)
        held = prompts_of(held_out)
        assert len(held) == len(set(held)) == 4  # one pair of each is answered
        assert not set(held) & set(prompts_of(train)) and len(set(prompts_of(train))) == 8
        assert len(train) == sum(tuple(ids_of(row["prompt"])) not in held for row in rows)
        held_out_of.append(held)
    assert held_out_of[0] == held_out_of[1]  # whatever the seed
    train, held_out = load_pairs(dataset=data, eval_prompts=0)
    assert len(train) == 40 and held_out == []


def test_an_evaluation_data_set_is_held_out_whole(write_jsonl):
    rows = [dict(prompt=f"question {i % 12:02}", chosen="abc"[i % 3 :], rejected="012"[i % 2 :]) for i in range(40)]
    data = write_jsonl(rows)
    other = [
        dict(prompt=f"question {i:02}", chosen="good", rejected=text) for i in (3, 7, 20) for text in ("bad", "no")
    ]
    train, held_out = load_pairs(dataset=data, eval_dataset=write_jsonl(other, "other.jsonl"), eval_prompts=1)
    assert prompts_of(held_out) == [tuple(ids_of(row["prompt"])) for row in other]
    kept = [row for i, row in enumerate(rows) if i % 12 not in (3, 7)]
    assert sorted(prompts_of(train)) == sorted(tuple(ids_of(row["prompt"])) for row in kept)
    with pytest.raises(SystemExit, match="no pairs left to train on"):
        load_pairs(dataset=data, eval_dataset=data)
    train, held_out = load_pairs(dataset=data, eval_dataset=data, eval_only=True)
    assert len(held_out) == 40 and train == []


def test_the_built_in_pairs_hold_out_the_last_six_subjects():
    train, held_out = load_pairs()
    last = [request.format(s) for s in rloo.SUBJECTS.split(", ")[-6:] for request in rloo.REQUESTS.split("|")]
    assert [e.prompt.columns["prompt"] for e in held_out] == last
    assert {e.prompt.columns["prompt"] for e in train} == set(rloo.BUILT_IN) - set(last)
    for example in train[:3] + held_out[:3]:
        row = example.prompt.columns
        prompt = f"<s>user:{row['prompt']}</s><s>assistant:"  # always a chat
        assert decoded(example) == (prompt, prompt + row["chosen"] + "</s>", prompt + row["rejected"] + "</s>")
        assert row["chosen_rating"] > row["rejected_rating"]


def test_of_a_prompt_with_many_pairs_the_first_ones_are_trained_on(write_jsonl):
    rows = [dict(prompt=f"p{i % 2}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(12)]
    train, _ = load_pairs(dataset=write_jsonl(rows), eval_prompts=0, pairs_per_prompt=2)
    assert sorted(e.prompt.columns["chosen"] for e in train) == ["good 0", "good 1", "good 2", "good 3"]
    # Of the built-in ones an answer is in one pair, but where middle ones are too close and another pair moves up.
    # The held-out pair is the best and the worst answer.
    train, held_out = load_pairs()
    answers = {}
    for row in [e.prompt.columns for e in train]:
        answers.setdefault(row["prompt"], []).extend([row["chosen"], row["rejected"]])
    assert {len(texts) for texts in answers.values()} == {8} and len(train) == 4 * len(answers) == 720
    assert sum(len(set(texts)) for texts in answers.values()) / len(answers) > 6.5
    gaps = [e.prompt.columns["chosen_rating"] - e.prompt.columns["rejected_rating"] for e in held_out]
    assert sum(gaps) / len(gaps) > 1


def test_a_copy_of_the_script_without_the_file_says_what_to_give(tiny, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("a_copy", shutil.copy(ROOT / "dpo.py", tmp_path))
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_copy", copy)
    spec.loader.exec_module(copy)
    with pytest.raises(SystemExit) as stop:
        run_script(copy, "--model", tiny, "--eval-only")
    assert str(stop.value) == f"--dataset: give one, {tmp_path.resolve()}/data/cheerful_pairs.jsonl.gz is not there"


# ---- encoding


def pieces():
    """Like Llama 2's tokenizer: a space is put before a text and belongs to the word that follows, bytes for the rest."""
    words = ("yes", "no", "the", "good", "bad", "Q", "A")
    tokens = ["\u2581" + word[:n] for word in words for n in range(1, len(word) + 1)]  # found before those without it
    tokens += [word[:n] for word in words for n in range(2, len(word) + 1)]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", *map(chr, range(33, 127)), *tokens]:
        vocab.setdefault(token, len(vocab))
    merges = [(token[:-1], token[-1]) for token in tokens]
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = template
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def merging():
    """The byte tokenizer, where "a" and "b" are one token."""
    tokenizer = byte_tokenizer()
    vocab = {**tokenizer.get_vocab(), "ab": 258}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = tokenizer.backend_tokenizer.pre_tokenizer, tokenizers.decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def whole(tokenizer, prompt, text):
    return tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id]


def test_no_space_comes_between_prompt_and_answer(write_jsonl):
    """The answer alone would be "\u2581 \u2581yes"; behind a prompt that ends in a space, that space is the answer's."""
    tokenizer = pieces()
    assert tokenizer.convert_ids_to_tokens(tokenizer(" yes", add_special_tokens=False)["input_ids"])[0] == "\u2581"
    texts = [
        ("Q: good?\nA:", " yes", " no"),
        ("Q: bad? A: ", "yes", "no"),
        ("the", " good", " bad"),
        ("the", "good", "bad"),
    ]
    data = write_jsonl([dict(prompt=p, chosen=chosen, rejected=rejected) for p, chosen, rejected in texts])
    examples = encoded(data, tokenizer, eos_ids=[2])
    by_prompt = sorted(texts, key=lambda text: [prompt for prompt, *_ in texts].index(text[0]))
    for (prompt, *answers), example in zip(by_prompt, examples, strict=True):
        for text, ids in zip(answers, example.answers):
            assert example.start + ids == whole(tokenizer, prompt, text)
        assert example.prompt.ids == tokenizer(prompt)["input_ids"]  # what sampling begins with
    words = [[tokenizer.convert_ids_to_tokens(ids) for ids in example.answers] for example in examples]
    assert words[0] == words[1] == [["\u2581yes", "</s>"], ["\u2581no", "</s>"]]
    assert examples[1].prompt.ids == examples[1].start + tokenizer.convert_tokens_to_ids(["\u2581"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["zephyr", "llama2"])
def test_llamas_own_tokenizer_in_its_templates(legacy, name, write_jsonl):
    fast = json.loads(pieces().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in fast["merges"]]
    tokenizer = transformers.LlamaTokenizer(vocab=fast["vocab"], merges=merges, legacy=legacy)
    tokenizer.chat_template = {
        "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    }[name]
    data = write_jsonl([dict(prompt="good?", chosen="yes", rejected="no")])
    (example,) = encoded(data, tokenizer, eos_ids=[2], chat=True)
    for text, ids in zip(("yes", "no"), example.answers):
        conversation = tokenizer.apply_chat_template(said("good?", text), tokenize=False).rstrip()
        assert example.start + ids == tokenizer(conversation, add_special_tokens=False)["input_ids"]
        assert ids.count(2) == 1 and ids[-1] == 2
    assert len(example.start) > len(example.prompt.ids) - 2


def test_a_token_that_spans_prompt_and_answer_is_the_answers(write_jsonl):
    tokenizer = merging()
    x, a, b, c, ab = tokenizer.convert_tokens_to_ids(["x", "a", "b", "c", "ab"])
    rows = [
        dict(prompt="xa", chosen="b", rejected="cb"),
        dict(prompt="xxa", chosen="c", rejected="bb"),
        dict(prompt="a", chosen="b", rejected="c"),  # nothing is left in front: no token predicts the first one
    ]
    first, second = encoded(write_jsonl(rows), tokenizer)
    assert (first.start, first.answers) == ([x], [[ab, 1], [a, c, b, 1]])
    assert (second.start, second.answers) == ([x, x], [[a, c, 1], [ab, b, 1]])
    assert first.prompt.ids == [x, a]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_strings_get_the_tokenizers_bos_and_one_eos(begin, end, write_jsonl):
    bos = [0] if begin else []
    rows = [dict(prompt="hi", chosen="good", rejected="bad"), dict(prompt="<s>hi", chosen="good", rejected="bad")]
    first, second = encoded(write_jsonl(rows), byte_tokenizer(begin=begin, end=end))
    assert first.start == first.prompt.ids == bos + ids_of("hi")
    assert second.start == second.prompt.ids == [0] + ids_of("hi")  # its own
    assert first.answers == second.answers == [ids_of("good") + [1], ids_of("bad") + [1]]


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)


def gemma():
    tokenizer = byte_tokenizer(GEMMA, begin=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") == 259
    return tokenizer


def test_an_answer_ends_as_the_template_ends_a_turn(write_jsonl):
    """A token that ends a response needs no EOS behind it; another, as of Phi-3's early files, does."""
    data = write_jsonl([dict(prompt="hi", chosen="good", rejected="bad")])
    prompt = "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>assistant\n"
    for eos_ids, ending in (([1, 259], "<end_of_turn>"), ([1], "<end_of_turn></s>")):
        (example,) = encoded(data, gemma(), eos_ids, chat=True)
        texts = prompt, prompt + "good" + ending, prompt + "bad" + ending
        assert decoded(example, gemma()) == texts


def test_the_ends_of_a_turn_come_from_the_models_generation_config(write_jsonl, flags, tmp_path, monkeypatch):
    model = tiny_llama(vocab=260)
    model.generation_config.eos_token_id = [259]
    model.save_pretrained(tmp_path / "m")
    gemma().save_pretrained(tmp_path / "m")
    seen = record_pairs(monkeypatch)
    run_script(dpo, *flags, "--model", tmp_path / "m", "--chat", "--total-steps", 1, "--output-dir", tmp_path / "o")
    endings = [ids[-2:] for examples in seen for example in examples for ids in example.answers]
    assert endings and all(token != 1 and end == 259 for token, end in endings)
    saved = json.loads((tmp_path / "o/final/generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 259]


# Templates of models that think: the one opens a thought in every last answer, the other in its generation prompt.
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<s>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c + '</s>\n' }}"
    "{% else %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ 'Assistant:' + c + '</s>' }}"
    "{% else %}{{ 'User:' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:<think>\n' }}{% endif %}"
)
THINKING = {
    "plain": ("one", "two"),
    "thought": ("<think>\nGood.\n</think>\n\none", "<think>\nBad.\n</think>\n\ntwo"),
    "only thought": ("<think>\nGood.\n</think>\n\none", "<think>\nBad.\n</think>\n\none"),
}


@pytest.mark.parametrize("name", THINKING)
def test_a_template_that_opens_a_thought_trains_its_own_text(name, write_jsonl):
    chosen, rejected = THINKING[name]
    data = write_jsonl([dict(prompt="Say", chosen=chosen, rejected=rejected)])
    (example,) = encoded(data, byte_tokenizer(QWEN3), chat=True)
    thoughts = ("", "") if name == "plain" else ("Good.", "Bad.")
    for thought, text, found in zip(thoughts, (chosen, rejected), decoded(example)[1:]):
        assert found == f"<s>user\nSay</s>\n<s>assistant\n<think>\n{thought}\n</think>\n\n{text[-3:]}</s>"
    assert decoded(example)[0] == "<s>user\nSay</s>\n<s>assistant\n"


@pytest.mark.parametrize("name", THINKING)
def test_a_template_that_has_the_thought_in_its_prompt_is_refused(name, flags, write_jsonl, tmp_path):
    chosen, rejected = THINKING[name]
    data = write_jsonl([dict(prompt=f"Say {i}", chosen=chosen, rejected=rejected) for i in range(20)])
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(R1).save_pretrained(tmp_path / "m")
    more = ["--model", tmp_path / "m", "--dataset", data, "--chat", "--output-dir", tmp_path / "o"]
    message = refused(*flags, *more)
    assert message.startswith(f"--model {tmp_path}/m: its chat template does not go on from ")


# ---- whole runs


@pytest.fixture(scope="module")
def flags(tiny, tiny_flags, tmp_path_factory):
    """Pairs whose chosen answers are lower-case and whose rejected ones are digits: 30 to train on, five steps."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        dict(prompt="question " + "?" * i, chosen="abcdefgh"[i % 5 :], rejected="01234567"[i % 4 :]) for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model {tiny} {tiny_flags[0]} {tiny_flags[1]} --dataset {path} --precision fp32 --total-steps 10"
    flags += " --eval-prompts 10 --eval-every 5 --max-new-tokens 6 --pairs-per-step 6 --micro-batch-size 2"
    return [*flags.split(), "--learning-rate", 1e-3]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A whole run with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("dpo") / "a"
    run_script(dpo, *flags, "--save-every", 1, "--output-dir", out)
    return out


def same(a, b):
    a, b = (load_file(Path(path, "model.safetensors")) for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def record_pairs(monkeypatch):
    """The pairs of every call for training."""
    calls, real = [], dpo.pair_losses

    def record(args, policy, reference, examples, device):
        if torch.is_grad_enabled():
            calls.append(list(examples))
        return real(args, policy, reference, examples, device)

    monkeypatch.setattr(dpo, "pair_losses", record)
    return calls


def texts_of(examples):
    columns = [example.prompt.columns for example in examples]
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in columns]


def test_a_run_starts_at_ln_2_learns_and_leaves_its_curves(finished):
    loss, accuracy, margin, score = (
        scalars(finished, f"eval/{tag}") for tag in ("loss", "accuracies", "margins", "score")
    )
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6) and accuracy[0] == margin[0] == 0
    assert loss[-1] < 0.5 and accuracy[-1] == 1 and margin[-1] > 0.5 and len(loss) == 3
    assert scalars(finished, "loss/policy")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert scalars(finished, "eval/kl")[0] == 0 and scalars(finished, "eval/kl")[-1] > 0
    rates = [1e-3 * min((step + 1) / 3, 1 - step / 10) for step in range(10)]  # two steps of warm-up, then linear to 0
    assert scalars(finished, "charts/learning_rate") == pytest.approx(rates, rel=1e-6)
    events = EventAccumulator(str(finished)).Reload()
    trained = {"loss/policy", "policy/grad_norm", "charts/learning_rate", "charts/pairs_per_second"}
    trained |= {f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")}
    trained |= {"logps/chosen", "logps/rejected"}
    names = ("loss", "accuracies", "margins", "score", "kl", "response_length")
    assert set(events.Tags()["scalars"]) == trained | {f"eval/{name}" for name in names}
    for tag in trained:
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 11))
    assert [event.step for event in events.Scalars("eval/score")] == [0, 5, 10]
    assert len(score) == 3


def losses_by_hand(loss_type, policy, reference, texts):
    """(losses, (B, 2) log-probabilities), one text at a time."""
    examples = examples_of(texts)
    logps = logps_alone(policy, examples, loss_type)
    ratios = logps
    if loss_type != "simpo":
        ratios = logps - logps_alone(reference, examples).detach()
    h = ratios[:, 0] - ratios[:, 1]
    x = BETA * h
    losses = {
        "sigmoid": -(1 - SMOOTHING) * x.sigmoid().log() - SMOOTHING * (-x).sigmoid().log(),
        "robust": (-(1 - SMOOTHING) * x.sigmoid().log() + SMOOTHING * (-x).sigmoid().log()) / (1 - 2 * SMOOTHING),
        "ipo": (h - 1 / (2 * BETA)) ** 2,
        "hinge": (1 - x).clamp(min=0),
        "simpo": -(1 - SMOOTHING) * (x - MARGIN).sigmoid().log() - SMOOTHING * (MARGIN - x).sigmoid().log(),
    }
    return losses[loss_type], logps, BETA * ratios


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_gradient_of_a_step_is_that_of_the_formula(loss_type, flags, tiny, tmp_path, monkeypatch):
    """The third step, where the policy has left the reference: one text at a time."""
    seen = record_pairs(monkeypatch)
    out = tmp_path / "o"
    more = (
        f"--loss-type {loss_type} --beta {BETA} --label-smoothing {SMOOTHING} --simpo-margin {MARGIN} --warmup-steps 0"
    )
    more += " --total-steps 3 --eval-prompts 0 --max-grad-norm 1e9 --save-every 1"
    run_script(dpo, *flags, *more.split(), "--output-dir", out)
    texts = texts_of(sum(seen[6:9], []))
    assert len(seen) == 9 and len(set(texts)) == 6
    policy = load(out / "checkpoint-2")
    losses, logps, rewards = losses_by_hand(loss_type, policy, load(tiny), texts)
    expected = torch.autograd.grad(losses.mean(), list(policy.parameters()))
    losses, logps, rewards = losses.detach(), logps.detach(), rewards.detach()
    averages = zip(moments(out / "checkpoint-2"), moments(out / "final"))
    gradients = [(after - 0.9 * before) / 0.1 for before, after in averages]  # of Adam's average
    assert max(gradient.abs().max() for gradient in expected) > 0.05
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm().item()
    margins = rewards[:, 0] - rewards[:, 1]
    curves = {
        "loss/policy": losses.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "rewards/margins": margins.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "policy/grad_norm": norm,
    }
    for tag, value in curves.items():
        assert scalars(out, tag)[2] == pytest.approx(float(value), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "loss_type, at_start", [("ipo", 25.0), ("hinge", 1.0), ("robust", math.log(2)), ("simpo", None)]
)
def test_the_other_losses_learn(flags, tmp_path, loss_type, at_start):
    smoothing = 0.1 if loss_type == "robust" else 0
    more = ["--loss-type", loss_type, "--label-smoothing", smoothing, "--total-steps", 20, "--eval-every", 20]
    run_script(dpo, *flags, *more, "--output-dir", tmp_path / "o")
    loss, accuracy = scalars(tmp_path / "o", "eval/loss"), scalars(tmp_path / "o", "eval/accuracies")
    assert loss[-1] < loss[0] and accuracy[-1] > 0.9
    assert at_start is None or loss[0] == pytest.approx(at_start, abs=1e-4)


@pytest.mark.parametrize("loss_type, asked", [("sigmoid", 12), ("simpo", 0)])
def test_how_often_the_reference_is_asked(flags, tmp_path, monkeypatch, loss_type, asked):
    """Once in each of 4 * 3 micro-batches, or never; no gradient goes through it."""
    calls, real = [], dpo.pair_logps

    def record(args, model, rows):
        logps = real(args, model, rows)
        calls.append((model, logps.requires_grad))
        return logps

    monkeypatch.setattr(dpo, "pair_logps", record)
    more = ["--eval-prompts", 0, "--total-steps", 4, "--loss-type", loss_type, "--output-dir", tmp_path / "o"]
    run_script(dpo, *flags, *more)
    policy = [model for model, requires_grad in calls if requires_grad]
    reference = [model for model, requires_grad in calls if not requires_grad]
    assert len(policy) == 12 and len(reference) == asked and len(set(policy)) == 1 and not set(policy) & set(reference)


def gradients_of(out):
    """Adam's first average is a tenth of the (clipped) gradient."""
    gradient = torch.cat([average.flatten() / 0.1 for average in moments(out / "checkpoint-1")])
    assert gradient.norm() > 0.01  # there is something to compare
    return gradient


@pytest.mark.parametrize("how", [1, 3, 6, "two processes"])
def test_micro_batches_and_processes_change_nothing(how, finished, flags, tmp_path):
    """Gradients, not weights: where a gradient is rounding error, Adam makes a whole step of it."""
    more = ["--total-steps", 2, "--save-every", 1, "--output-dir", tmp_path / "o"]
    if how == "two processes":
        run_in_two_processes(dpo, *flags, *more)
    else:
        run_script(dpo, *flags, *more, "--micro-batch-size", how)
    expected = gradients_of(finished)
    assert (gradients_of(tmp_path / "o") - expected).abs().max() < 1e-5 * expected.abs().max()
    assert grad_norm(tmp_path / "o") == pytest.approx(grad_norm(finished), rel=1e-5)  # before clipping
    for tag in ("loss/policy", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert scalars(tmp_path / "o", tag)[0] == pytest.approx(scalars(finished, tag)[0], rel=1e-5, abs=1e-5)
        assert scalars(tmp_path / "o", tag)[1] == pytest.approx(scalars(finished, tag)[1], rel=1e-4, abs=1e-4)
    for tag in ("loss", "accuracies", "margins"):
        assert scalars(tmp_path / "o", f"eval/{tag}")[0] == pytest.approx(scalars(finished, f"eval/{tag}")[0], abs=1e-5)


def test_gradient_checkpointing_is_the_same_run(finished, flags, tmp_path, monkeypatch):
    """And answers are sampled in eval mode, where it leaves transformers its KV cache."""
    modes, real = [], dpo.sample_answers

    def record(args, model, *rest):
        modes.append(model.training)
        return real(args, model, *rest)

    monkeypatch.setattr(dpo, "sample_answers", record)
    run_script(dpo, *flags, "--gradient-checkpointing", "--save-every", 5, "--output-dir", tmp_path / "o")
    assert len(modes) == 6 and not any(modes)
    for name in ("checkpoint-5", "final"):
        assert same(finished / name, tmp_path / "o" / name)
    for tag in ("eval/score", "eval/kl", "eval/loss"):
        assert scalars(tmp_path / "o", tag) == scalars(finished, tag)


def test_a_step_is_clipped_to_the_largest_norm(flags, tmp_path):
    more = ["--max-grad-norm", 0.01, "--total-steps", 2, "--save-every", 1, "--eval-prompts", 0]
    run_script(dpo, *flags, *more, "--output-dir", tmp_path / "o")
    assert grad_norm(tmp_path / "o") > 0.1
    averages = moments(tmp_path / "o/checkpoint-1")
    norm = torch.cat([average.flatten() for average in averages]).norm() / 0.1
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(flags, tmp_path, monkeypatch):
    seen = record_pairs(monkeypatch)
    run_script(dpo, *flags, "--learning-rate", 0, "--output-dir", tmp_path / "o")
    texts = texts_of(sum(seen, []))
    first, second = texts[:30], texts[30:]
    assert len(set(first)) == 30 and sorted(first) == sorted(second) and first != second
    # The micro-batches of a step go from short pairs to long ones.
    for i in range(0, 30, 3):
        sizes = [len(e.start) + sum(map(len, e.answers)) for e in sum(seen[i : i + 3], [])]
        assert sizes == sorted(sizes) and len(set(sizes)) > 1
    seen.clear()
    run_script(dpo, *flags, "--learning-rate", 0, "--seed", 2, "--total-steps", 5, "--output-dir", tmp_path / "p")
    other = texts_of(sum(seen, []))
    assert sorted(other) == sorted(first) and other != first


def test_no_total_is_once_over_all_pairs(flags, tmp_path, monkeypatch):
    """30 pairs in steps of 4: the eighth step begins again."""
    seen = record_pairs(monkeypatch)
    more = ["--total-steps", 0, "--pairs-per-step", 4, "--output-dir", tmp_path / "o"]
    run_script(dpo, *flags, *more)
    texts = texts_of(sum(seen, []))
    assert len(texts) == 32 and len(set(texts)) == 30
    rates = [1e-3 * min((step + 1) / 3, 1 - step / 8) for step in range(8)]
    assert scalars(tmp_path / "o", "charts/learning_rate") == pytest.approx(rates, rel=1e-6)
    assert len(scalars(tmp_path / "o", "eval/score")) == 3


def test_policy_and_reference_agree_to_the_bit_at_the_start_in_bf16(flags, tmp_path):
    """The reference keeps bf16 only where autocast casts, so the policy's numbers are its numbers."""
    run_script(dpo, *flags, "--precision", "bf16", "--total-steps", 2, "--output-dir", tmp_path / "o")
    margins = scalars(tmp_path / "o", "rewards/margins")
    assert margins[0] == 0 and abs(margins[1]) > 1e-3
    assert scalars(tmp_path / "o", "loss/policy")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert scalars(tmp_path / "o", "eval/kl")[0] == 0 and scalars(tmp_path / "o", "eval/kl")[-1] != 0


# ---- resume, and what ends a run


@pytest.mark.parametrize("step", [1, 4, 9])
def test_resume_is_bit_exact(finished, tmp_path, monkeypatch, step):
    shutil.copytree(finished / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    monkeypatch.chdir("/")
    run_script(dpo, "--resume", tmp_path / f"checkpoint-{step}")  # the flags come from the checkpoint
    assert same(finished / "final", tmp_path / "final") and not same(
        finished / "final", finished / f"checkpoint-{step}"
    )
    assert all(torch.equal(a, b) for a, b in zip(moments(finished / "final"), moments(tmp_path / "final"), strict=True))
    assert scalars(tmp_path, "eval/score")[-1] == scalars(finished, "eval/score")[-1]


def test_a_finished_run_that_is_resumed_shows_its_table(finished, tmp_path, capsys):
    shutil.copytree(finished / "final", tmp_path / "final")
    run_script(dpo, "--resume", tmp_path / "final")
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("trained")]) == 1 + 3
    assert len([line for line in lines if line.startswith("prompt ")]) == 3
    assert same(finished / "final", tmp_path / "final")


def test_eval_only_compares_a_checkpoint_with_its_reference(finished, flags, capsys):
    run_script(dpo, "--resume", finished / "final", "--eval-only")
    shown = capsys.readouterr().out
    names = ("loss", "accuracies", "margins", "score", "kl", "response_length")
    for title, index in (("SFT", 0), ("trained", -1)):
        expected = [title]
        for name in names:
            expected += [name, f"{scalars(finished, f'eval/{name}')[index]:.3f}"]
        line = next(line for line in shown.splitlines() if line.startswith(title))
        assert line.split() == expected
    run_script(dpo, *flags, "--eval-only")
    assert "trained" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [IndexError("late"), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_whatever_ends_a_run_leaves_the_weights_of_the_last_whole_step(
    finished, flags, tmp_path, capsys, monkeypatch, error
):
    """In the second micro-batch of the third step, when the first has already left its gradient."""
    calls, real = [], dpo.pair_losses

    def breaks(*args):
        if torch.is_grad_enabled():
            calls.append(1)
        if len(calls) == 8:
            raise error
        return real(*args)

    monkeypatch.setattr(dpo, "pair_losses", breaks)
    with pytest.raises(type(error)):
        run_script(dpo, *flags, "--output-dir", tmp_path / "o")
    assert f"--resume {tmp_path}/o/checkpoint-2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "o").iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert same(finished / "checkpoint-2", tmp_path / "o/checkpoint-2")
    monkeypatch.undo()
    run_script(dpo, "--resume", tmp_path / "o/checkpoint-2")
    assert same(finished / "final", tmp_path / "o/final")


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(finished, flags, tmp_path, monkeypatch):
    calls, real = [], dpo.dpo_loss

    def not_a_number(*args):
        losses, *rewards = real(*args)
        if torch.is_grad_enabled():
            calls.append(1)
        return losses * (math.nan if len(calls) == 11 else 1), *rewards

    monkeypatch.setattr(dpo, "dpo_loss", not_a_number)
    assert refused(*flags, "--output-dir", tmp_path / "o") == "step 3: gradient nan; see --learning-rate"
    assert same(tmp_path / "o/checkpoint-3", finished / "checkpoint-3")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(finished, flags, tmp_path, capsys, monkeypatch, number):
    calls, real = [], dpo.pair_losses

    def signalled(*args):
        if torch.is_grad_enabled():
            calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(dpo, "pair_losses", signalled)
    assert refused(*flags, "--output-dir", tmp_path / "o") == "stopped by a signal"
    assert f"--resume {tmp_path}/o/checkpoint-3" in capsys.readouterr().err
    assert len(calls) == 9 and same(finished / "checkpoint-3", tmp_path / "o/checkpoint-3")
    monkeypatch.undo()
    run_script(dpo, "--resume", tmp_path / "o/checkpoint-3")
    assert same(finished / "final", tmp_path / "o/final")


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(finished, flags, tmp_path):
    torch.manual_seed(int(time.time()))
    out = tmp_path / "o"
    command = [sys.executable, str(ROOT / "dpo.py"), *map(str, flags), "--save-every", "1", "--output-dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint-1").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.5 * torch.rand(1).item())
    process.kill()
    process.wait()
    saved = [path for path in out.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert saved
    for path in saved:
        assert same(finished / path.name, path)
        torch.load(path / "trainer_state.pt", weights_only=True)
    last = max(saved, key=lambda path: path.stat().st_mtime)
    run_script(dpo, "--resume", last)
    assert same(finished / "final", out / "final")


# ---- evaluation


def p_value(observed, expected):
    """Of a chi-square test. Rare outcomes share a bin if that is large enough."""
    common = expected >= 5
    rare_observed, rare = observed[~common].sum(), expected[~common].sum()
    observed, expected = observed[common], expected[common]
    if rare >= 5:
        observed, expected = torch.cat([observed, rare_observed[None]]), torch.cat([expected, rare[None]])
    chi2 = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi2 / 2).item()


def sampled(model, prompts, n, length, temperature=TEMPERATURE):
    """n answers to each prompt, the prompts in turn: of different lengths, so that one is padded on the left."""
    torch.manual_seed(0)
    args = dpo.Args(temperature=temperature, max_new_tokens=length)
    model.generation_config = transformers.GenerationConfig(do_sample=True, eos_token_id=[1])
    samples = dpo.sample_answers(args, model, byte_tokenizer(), [dpo.Prompt(ids, None, {}) for ids in prompts] * n)
    answers = [sample.responses[0] for sample in samples]
    return [answers[i :: len(prompts)] for i in range(len(prompts))]


def counts(answers, outcomes):
    answers = [tuple(ids) for ids in answers]
    assert set(answers) <= set(outcomes)
    return torch.tensor([answers.count(outcome) for outcome in outcomes]).double()


@pytest.mark.parametrize("make_tiny", [tiny_llama, tiny_gpt2])
def test_answers_of_two_tokens_have_the_models_distribution(make_tiny):
    """Over a vocabulary of six, with expected counts from the plain forward pass."""
    model, n = make_tiny(vocab=6), 8000
    outcomes = [(1,)] + [(a, b) for a in (0, 2, 3, 4, 5) for b in range(6)]
    prompts = [[2, 3], [4, 2, 5, 3, 3]]
    for prompt, answers in zip(prompts, sampled(model, prompts, n, 2)):
        observed = counts(answers, outcomes)
        logps = torch.stack([alone(model, prompt, list(ids), TEMPERATURE).sum() for ids in outcomes])
        expected = n * logps.detach().double().exp()
        assert expected.sum().item() == pytest.approx(n, rel=1e-4)
        assert p_value(observed, expected) > 1e-3
        others = torch.stack([alone(model, prompt, list(ids), 0.8).sum() for ids in outcomes])
        assert p_value(observed, n * others.detach().double().exp()) < 1e-6  # a slightly wrong temperature is seen


def test_answers_come_from_the_whole_vocabulary():
    """transformers' own default is the 50 likeliest tokens."""
    model, n, prompt = tiny_llama(), 20_000, [5, 9, 30]
    with torch.no_grad():
        model.lm_head.weight *= 0.2  # flatter
    (answers,) = sampled(model, [prompt], n, 1)
    observed = counts(answers, [(token,) for token in range(258)])
    probabilities = (model(torch.tensor([prompt])).logits[0, -1] / TEMPERATURE).detach().double().softmax(0)
    assert p_value(observed, n * probabilities) > 1e-3
    likeliest = probabilities.topk(50).indices
    outside = 1 - probabilities[likeliest].sum().item()
    assert outside > 0.1
    assert 1 - observed[likeliest].sum().item() / n == pytest.approx(outside, abs=0.02)


def test_an_answer_ends_at_each_of_several_eos_ids():
    model = tiny_llama()
    stops = [1, 9, *range(60, 120)]
    model.generation_config = transformers.GenerationConfig(do_sample=True, eos_token_id=stops)
    prompts = [
        dpo.Prompt([5, 9, 9, 1, 30, 7], None, {}),
        dpo.Prompt([8, 3], None, {}),
    ] * 100  # stops in a prompt end nothing
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    samples = dpo.sample_answers(dpo.Args(max_new_tokens=12), model, tokenizer, prompts)
    answers = [sample.responses[0] for sample in samples]
    for ids in answers:
        assert not set(ids[:-1]) & set(stops)
        assert ids[-1] in stops or len(ids) == 12
    assert len({ids[-1] for ids in answers if ids[-1] in stops}) > 10
    assert len({len(ids) for ids in answers}) > 5
    assert [sample.prompt for sample in samples] == prompts
    for sample in samples:
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sample.responses]
        assert len(texts) == 1 and sample.texts == texts


def record_answers(monkeypatch):
    """[samples] of each call of sample_answers."""
    calls, real = [], dpo.sample_answers

    def record(*args):
        calls.append(real(*args))
        return calls[-1]

    monkeypatch.setattr(dpo, "sample_answers", record)
    return calls


def test_held_out_values_are_those_of_the_policy(flags, tiny, tmp_path, monkeypatch):
    """Score, KL and length of the sampled answers, loss, accuracy and margin of the pairs, one text at a time."""
    seen = record_answers(monkeypatch)
    out = tmp_path / "o"
    more = f"--temperature {TEMPERATURE} --beta {BETA} --label-smoothing {SMOOTHING} --total-steps 3 --eval-every 3"
    run_script(dpo, *flags, *more.split(), "--output-dir", out)
    samples = sum(seen[-2:], [])  # four pairs fit for each of training: 8 answers, then 2
    assert len(seen) == 4 and len(samples) == 10
    assert [sample.prompt for sample in samples] == [sample.prompt for sample in sum(seen[:2], [])]
    policy, reference = load(out / "final"), load(tiny)

    columns = [sample.prompt.columns for sample in samples]
    answers = [(ids_of(row["prompt"]), sample.responses[0]) for row, sample in zip(columns, samples)]
    kl = sum(
        (alone(policy, *both, TEMPERATURE) - alone(reference, *both, TEMPERATURE)).sum().item() for both in answers
    )
    texts = [byte_tokenizer().decode(ids, skip_special_tokens=True) for _, ids in answers]
    score = sum(sum(map(str.islower, text)) / max(1, len(text)) for text in texts)  # of the flags' --reward
    held_out = [(row["prompt"], row["chosen"], row["rejected"]) for row in columns]
    losses, _, rewards = losses_by_hand("sigmoid", policy, reference, held_out)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "score": score / 10,
        "kl": kl / 10,
        "response_length": sum(len(ids) for _, ids in answers) / 10,
        "loss": losses.mean().item(),
        "accuracies": (margins > 0).float().mean().item(),
        "margins": margins.mean().item(),
    }
    assert abs(kl) > 0.1 and score > 0
    for name, value in expected.items():
        assert scalars(out, f"eval/{name}")[-1] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_answers_are_the_same_in_every_evaluation_of_a_run(flags, tmp_path, monkeypatch):
    seen = record_answers(monkeypatch)

    def answers():
        responses = [sample.responses for samples in seen for sample in samples]
        seen.clear()
        return [responses[i : i + 10] for i in range(0, len(responses), 10)]

    more = ["--learning-rate", 0, "--total-steps", 3, "--eval-every", 1]
    run_script(dpo, *flags, *more, "--output-dir", tmp_path / "o")
    first, *others = answers()
    assert len(others) == 3 and all(other == first for other in others)
    for tag in ("score", "kl", "response_length", "loss"):
        assert len(set(scalars(tmp_path / "o", f"eval/{tag}"))) == 1
    run_script(dpo, *flags, *more, "--seed", 2, "--output-dir", tmp_path / "p")
    assert answers()[0] != first


def test_evaluations_and_the_global_random_state_change_no_weights(finished, flags, tmp_path, monkeypatch):
    run_script(dpo, *flags, "--eval-every", 1, "--output-dir", tmp_path / "often")
    assert same(finished / "final", tmp_path / "often/final")
    evaluation = dpo.Evaluation({}, [0.0] * 10, [""] * 10)
    monkeypatch.setattr(dpo, "evaluate_answers", lambda *args: evaluation)
    torch.manual_seed(1234)
    run_script(dpo, *flags, "--output-dir", tmp_path / "never")
    assert same(finished / "final", tmp_path / "never/final")


def test_so_many_prompts_of_an_evaluation_data_set_are_answered(flags, tmp_path, monkeypatch, write_jsonl, capsys):
    """Each once, however many pairs it has."""
    seen = record_answers(monkeypatch)
    rows = [dict(prompt=f"another {i // 3}", chosen="abc"[i % 3 :], rejected="0") for i in range(45)]
    more = ["--eval-dataset", write_jsonl(rows), "--eval-prompts", 7, "--total-steps", 1]
    run_script(dpo, *flags, *more, "--output-dir", tmp_path / "o")
    assert "40 pairs to train on, 45 held out" in capsys.readouterr().out
    prompts = [sample.prompt.columns["prompt"] for samples in seen for sample in samples]
    assert prompts == [f"another {i}" for i in range(7)] * 2


def test_a_reward_function_has_the_columns_of_the_pairs(flags, tmp_path, write_jsonl):
    (tmp_path / "r.py").write_text(
        "def score(prompts, completions, chosen, rejected, weight, **columns):\n"
        "    assert set(columns) == set()\n"
        "    assert prompts[0][0]['role'] == 'user' and completions[0][0]['role'] == 'assistant'\n"
        "    return weight\n"
    )
    rows = [dict(chosen=said(f"q{i}", "good"), rejected=said(f"q{i}", "bad"), weight=1.5) for i in range(20)]
    more = ["--dataset", write_jsonl(rows), "--reward", f"{tmp_path}/r.py:score", "--total-steps", 1]
    run_script(dpo, *flags, *more, "--output-dir", tmp_path / "o")
    assert scalars(tmp_path / "o", "eval/score") == [1.5, 1.5]


def test_a_reward_that_fails_costs_no_training(finished, flags, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def score(prompts, completions, **columns):\n    raise ConnectionError('down')\n")
    run_script(dpo, *flags, "--reward", f"{tmp_path}/r.py:score", "--output-dir", tmp_path / "o")
    assert "ConnectionError: down" in capsys.readouterr().err
    assert all(map(math.isnan, scalars(tmp_path / "o", "eval/score")))
    assert scalars(tmp_path / "o", "eval/kl") == scalars(finished, "eval/kl")
    assert same(finished / "final", tmp_path / "o/final")


def test_an_answer_keeps_the_space_that_it_begins_with():
    """Llama's tokenizer has it in the token, and drops it where a text begins with one."""
    tokenizer = pieces()
    prompt, other = (dpo.Prompt(tokenizer(text)["input_ids"], None, {}) for text in ("Q: good?\nA:", "the"))
    answers = tokenizer.convert_tokens_to_ids(["\u2581yes", "no"])
    output = torch.tensor([[answers[0], 2, 9], [answers[1], answers[0], 9]])
    model = types.SimpleNamespace(device="cpu", generation_config=types.SimpleNamespace(eos_token_id=[2, 5]))
    model.generate = lambda ids, **options: torch.cat([ids, output], dim=1)
    first, second = dpo.sample_answers(dpo.Args(), model, tokenizer, [prompt, other])
    assert (first.responses, first.texts) == ([[answers[0], 2]], [" yes"])
    assert (second.responses, second.texts) == ([[answers[1], answers[0], 9]], ["no yes" + tokenizer.decode([9])])


# ---- bad input: one line that names the flag


def refused(*flags):
    with pytest.raises(SystemExit) as stop:
        run_script(dpo, *flags)
    message = str(stop.value.code)
    assert "\n" not in message.strip(), message
    return message


@pytest.mark.parametrize(
    "bad, said",
    [
        (["--beta", 0], "--beta 0.0: must be a number of 1e-06 or more"),
        (["--beta", "nan"], "--beta nan: must be a number of 1e-06 or more"),
        (["--beta", "inf"], "--beta inf: must be a number"),
        (["--label-smoothing", 0.5], "--label-smoothing 0.5: must be less than 0.5"),
        (["--label-smoothing", "-0.1"], "--label-smoothing -0.1: must be a number of 0 or more"),
        (["--label-smoothing", "nan"], "--label-smoothing nan: must be"),
        (["--simpo-margin", "-1"], "--simpo-margin -1.0: must be a number of 0 or more"),
        (["--temperature", 0], "--temperature 0.0: must be a number of 0.01 or more"),
        (["--learning-rate", "-0.001"], "--learning-rate -0.001: must be"),
        (["--total-steps", "-1"], "--total-steps -1: must be a number of 0 or more"),
        (["--max-length", 1], "--max-length 1: must be a number of 2 or more"),
        (["--pairs-per-step", 7], "--micro-batch-size: must divide --pairs-per-step"),
        (["--micro-batch-size", 4], "--micro-batch-size: must divide --pairs-per-step"),
        (["--max-length", 5], "--dataset: 0 prompts are left without the empty, the too long and copies"),
        (["--max-length", 5, "--eval-only"], "--dataset: no pairs left; see --max-length"),
        (["--eval-prompts", 40], "40 prompts are left without the empty, the too long and copies: --eval-prompts 40"),
        (
            ["--prompt-column", "question"],
            "--prompt-column question: no row has a prompt and two answers; columns: ['pr",
        ),
        (["--max-new-tokens", 600], "--max-length, --max-new-tokens: texts of"),
        (["--resume", "."], "--resume .: no checkpoint; give a checkpoint-<step> or final folder"),
    ],
)
def test_bad_input(flags, tmp_path, bad, said):
    assert said in refused(*flags, "--output-dir", tmp_path / "o", *bad)


def test_texts_longer_than_the_models_positions_are_refused(flags, tmp_path, write_jsonl):
    data = write_jsonl([dict(prompt=f"{i}" + "p" * 500, chosen="a" * 20, rejected="b") for i in range(10, 30)])
    message = refused(*flags, "--dataset", data, "--max-length", 600, "--output-dir", tmp_path / "o")
    assert message == "--max-length, --max-new-tokens: texts of 523 tokens, --model reads 512"


@pytest.mark.parametrize("bad", [["--loss-type", "kto"], ["--k", 4], ["--precompute-ref"]])
def test_an_unknown_flag_or_loss_is_said(flags, capsys, bad):
    with pytest.raises(SystemExit) as stop:
        run_script(dpo, *flags, *bad)
    assert stop.value.code == 2
    shown = "".join(capsys.readouterr())
    assert bad[0] in shown
    assert bad[0] != "--loss-type" or all(name in shown for name in LOSSES)


@pytest.mark.parametrize(
    "bad, error, said",
    [
        (["--dataset", "nowhere.jsonl"], FileNotFoundError, "nowhere.jsonl"),
        (["--reward", "some/model"], ModuleNotFoundError, "No module named 'model'"),
        (["--dataset-split", "nope"], ValueError, "nope"),
        (["--model", "no-such-model"], OSError, "find them in the cached files"),
    ],
)
def test_errors_that_say_it_themselves(flags, tmp_path, bad, error, said):
    with pytest.raises(error, match=said):
        run_script(dpo, *flags, "--output-dir", tmp_path / "o", *bad)


def test_a_model_without_chat_template_says_so(flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "m")
    more = ["--model", tmp_path / "m", "--total-steps", 1, "--output-dir", tmp_path / "o"]
    with pytest.raises(ValueError, match="chat_template is not set"):
        run_script(dpo, *flags, *more, "--chat")
    shutil.rmtree(tmp_path / "o")
    run_script(dpo, *flags, *more)  # strings need none


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_a_padding_token_is_not_looked_at(pad, flags, finished, tmp_path):
    """None, or one beyond the embedding."""
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(pad_token=pad).save_pretrained(tmp_path / "m")
    run_script(dpo, *flags, "--model", tmp_path / "m", "--output-dir", tmp_path / "o")
    assert same(finished / "final", tmp_path / "o/final")


# ---- the real model


def test_smollm2_end_to_end(tmp_path):
    """The default command, two steps of it; then plain transformers reads the result."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "dpo.py"), "--total-steps", "2"]
    command += ["--eval-prompts", "10", "--pairs-per-step", "4", "--output-dir", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(
        r"cheerful_pairs.jsonl.gz: \d{4} rows, \d{4} with a prompt and two different answers", result.stdout
    )
    assert re.search(r"^\d{3} pairs to train on, 10 held out$", result.stdout, re.MULTILINE)
    assert re.search(
        r"^SFT +loss 0.693  accuracies 0.\d+  margins -?0.000  score \S+  kl ", result.stdout, re.MULTILINE
    )
    assert scalars(tmp_path / "o", "loss/policy")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert scalars(tmp_path / "o", "rewards/margins")[1] > 0.001
    assert scalars(tmp_path / "o", "eval/margins")[-1] > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "o/final")
    assert tokenizer.eos_token == "<|im_end|>"  # transformers 5.17 reads another from the GGUF file
    chat = transformers.pipeline("text-generation", str(tmp_path / "o/final"))
    shown = chat([{"role": "user", "content": "Write a short review of coffee."}], max_new_tokens=16, do_sample=False)
    text = shown[0]["generated_text"][-1]["content"]  # words: template and EOS are as they should be
    assert len(re.findall(r"[a-z]+", text)) > 5 and "<|im" not in text, text

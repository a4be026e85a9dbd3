"""The reward models: losses by hand, rows against each text alone, whole steps, data, what is saved, calibration, bad input."""

import ast
import contextlib
import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pandas
import pytest
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import byte_tokenizer, grad_norm, moments, run_in_two_processes, run_script, scalars, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_rows import FAMILIES, FIVE, PROMPTS, REFUSED, RESPONSES, SMALL

import reward_model
import reward_model_ordinal
import rloo

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import calibration  # noqa: E402

SCRIPTS = [reward_model, reward_model_ordinal]
LABELS = {reward_model: 1, reward_model_ordinal: 10}
both = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
HERE = types.SimpleNamespace(print=lambda text: None, device="cpu", num_processes=1, autocast=contextlib.nullcontext)


# ---- losses


def test_bradley_terry_golden():
    """One value per pair."""
    chosen = torch.tensor([2.0, -2.0, 0.5])
    rejected = torch.tensor([1.0, 1.0, 0.5])
    by_hand = [math.log1p(math.exp(-1)), math.log1p(math.exp(3)), math.log(2)]  # .31326, 3.04859, .69315
    assert reward_model.bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx([0.31326, 3.04859, 0.69315], abs=1e-5)

    margin = torch.tensor([1.0, 0.0, -2.0])  # differences of 0, -3, 2
    shifted = reward_model.bradley_terry_loss(chosen, rejected, margin)
    assert shifted.tolist() == pytest.approx([math.log(2), 3.04859, math.log1p(math.exp(-2))], abs=1e-5)

    centred = reward_model.bradley_terry_loss(chosen, rejected, center_coef=0.1)  # sums of 3, -1, 1
    assert centred.tolist() == pytest.approx([0.31326 + 0.9, 3.04859 + 0.1, 0.69315 + 0.1], abs=1e-5)


def test_bradley_terry_raises_the_chosen_score_and_centring_lowers_both():
    scores = torch.zeros(2, requires_grad=True)
    reward_model.bradley_terry_loss(scores[:1], scores[1:]).sum().backward()
    assert scores.grad.tolist() == [-0.5, 0.5]  # descent: up, down

    scores = torch.tensor([5.0, 5.0], requires_grad=True)
    reward_model.bradley_terry_loss(scores[:1], scores[1:], center_coef=0.1).sum().backward()
    assert scores.grad.tolist() == pytest.approx([2 - 0.5, 2 + 0.5])


def test_bradley_terry_takes_its_flags():
    """Of three answers, two pairs; the ratings count with --margin only."""
    logits = torch.tensor([[2.0], [1.0], [-2.0]])
    pairs = reward_model.Pairs(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([1.0, 0.0]))
    for margin, first in ((False, 0.31326), (True, math.log(2))):
        args = reward_model.Args(margin=margin, center_coef=0.1)
        losses = reward_model.bradley_terry_losses(args, logits, pairs)
        assert losses.tolist() == pytest.approx([first + 0.9, 3.04859 + 0.1], abs=1e-5)


def sure(grade, size=40.0):
    """(1, 10) logits."""
    return size * torch.nn.functional.one_hot(torch.tensor([grade - 1]), 10).float()


def ordinal_loss(chosen, rejected):
    """Of one pair."""
    pairs = reward_model_ordinal.Pairs(torch.tensor([0]), torch.tensor([1]), torch.zeros(1))
    losses = reward_model_ordinal.ordinal_losses(torch.cat([chosen, rejected]), pairs)
    assert losses.shape == (1,)
    return losses[0]


def test_ordinal_golden():
    assert ordinal_loss(sure(10), sure(1)).item() == pytest.approx(0, abs=1e-5)  # the better answer costs nothing
    assert ordinal_loss(sure(1), sure(10)).item() > 30
    assert ordinal_loss(sure(5), sure(5)).item() > 30  # ties earn nothing
    uniform = torch.zeros(1, 10)
    assert ordinal_loss(uniform, uniform).item() == pytest.approx(-math.log(0.45), abs=1e-6)
    two = torch.full((1, 10), -1e4)
    two[0, 3] = 0.0  # grade 4 with 1/4
    two[0, 7] = math.log(3)  # grade 8 with 3/4
    assert ordinal_loss(two, sure(6, 1e4)).item() == pytest.approx(-math.log(0.75), abs=1e-6)
    assert ordinal_loss(sure(6, 1e4), two).item() == pytest.approx(-math.log(0.25), abs=1e-6)


def double_sum(chosen_logits, rejected_logits):
    """P(w > l) of one pair of (10,) logits, term by term."""
    p = chosen_logits.softmax(0)
    q = rejected_logits.softmax(0)
    return sum(p[i] * q[j] for i in range(10) for j in range(i))


def test_ordinal_losses_are_those_of_the_double_sum_of_their_pairs():
    logits = 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    pairs = reward_model_ordinal.Pairs(torch.tensor([0, 4, 2, 5]), torch.tensor([1, 0, 3, 2]), torch.zeros(4))
    losses = reward_model_ordinal.ordinal_losses(logits, pairs)
    for n, (i, j) in enumerate(zip(pairs.chosen, pairs.rejected)):
        assert losses[n].item() == pytest.approx(-math.log(double_sum(logits[i], logits[j])), abs=1e-5)


def test_winning_losing_and_a_tie_sum_to_one():
    a, b = 3 * torch.randn(2, 50, 10, generator=torch.Generator().manual_seed(0))
    win = reward_model_ordinal.log_win(a, b).exp()
    lose = reward_model_ordinal.log_win(b, a).exp()
    tie = (a.softmax(1) * b.softmax(1)).sum(1)
    assert torch.allclose(win + lose + tie, torch.ones(50), atol=1e-5)


@pytest.mark.parametrize("size", [50.0, 500.0, 1e4])
def test_ordinal_loss_is_finite_with_a_gradient_where_the_model_is_very_sure_and_wrong(size):
    chosen = sure(1, size).requires_grad_()
    rejected = sure(10, size).requires_grad_()
    loss = ordinal_loss(chosen, rejected)
    loss.backward()
    assert loss.isfinite() and loss > 0.9 * size
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert chosen.grad[0, 0] > 0.9 and rejected.grad[0, 9] > 0.9  # descent takes both from where they are


def test_ordinal_loss_raises_the_chosen_score():
    chosen = torch.zeros(1, 10, requires_grad=True)
    rejected = torch.zeros(1, 10, requires_grad=True)
    ordinal_loss(chosen, rejected).backward()
    score = reward_model_ordinal.expected_score
    assert score(chosen - chosen.grad) > score(chosen) > score(rejected - rejected.grad)


def test_expected_score():
    two = torch.full((1, 10), -1e4)
    two[0, 3] = 0.0
    two[0, 7] = math.log(3)  # 4 with 1/4, 8 with 3/4
    logits = torch.cat([sure(1), sure(10), torch.zeros(1, 10), two])
    assert reward_model_ordinal.expected_score(logits).tolist() == pytest.approx([1, 10, 5.5, 7])
    assert reward_model_ordinal.expected_score(torch.zeros(1, 3)).tolist() == pytest.approx([2])


# ---- rows: what each text alone gives

PAD = 257  # no text has it, so that transformers finds the last token of a text that ends in EOS
WITH_HEAD = [name for name in FAMILIES if hasattr(transformers, f"{name}ForSequenceClassification")]


def classifier(name, labels=1, attention="eager", seed=0):
    torch.manual_seed(seed)
    options = {**SMALL, **{**FAMILIES, **REFUSED}[name], "num_labels": labels, "pad_token_id": PAD}
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = attention
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    return model.float().eval()


def group(*texts):
    """A group of token ids."""
    return reward_model.Group("", ["?"] * len(texts), list(texts), [None] * len(texts), [])


def groups_of(k):
    """k answers to each of three prompts; then two that go on together, and one that goes on where another ends."""
    groups = []
    for i, prompt in enumerate(PROMPTS):
        groups.append(group(*[prompt + RESPONSES[(3 * i + j) % len(RESPONSES)] for j in range(k)]))
    groups.append(group([5, 9, 60, 61, 1], [5, 9, 60, 62, 63, 1], [5, 9, 60, 1], [5, 9, 60, 61, 61, 1]))
    return groups


def alone(model, groups):
    """Plain transformers: each text by itself, without padding."""
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits for group in groups for ids in group.ids])


def compare(model, groups):
    """Largest differences of the logits, and of their gradients relative to the largest of a parameter."""
    logits = reward_model.AnswerLogits(model)(reward_model.group_rows(groups, "cpu"))
    expected = alone(model, groups)
    assert expected.shape == (sum(len(group.ids) for group in groups), model.config.num_labels)
    assert expected.std(0).min() > 1e-2  # the answers are told apart
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    ours = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    differences = []
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if b is not None:
            differences.append((a - b).abs().max().item() / max(1, b.abs().max().item()))
    assert max(b.abs().max() for b in theirs if b is not None) > 0.1
    return (logits - expected).abs().max().item(), max(differences)


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("labels", [1, 10])
@pytest.mark.parametrize("name", FIVE)
def test_rows_equal_each_text_alone(name, labels, attention, k):
    logits, gradients = compare(classifier(name, labels, attention), groups_of(k))
    assert logits < 1e-5 and gradients < 1e-5


@pytest.mark.parametrize("name", WITH_HEAD)
def test_families(name):
    model = classifier(name, 10)
    logits, gradients = compare(model, groups_of(2))
    tolerance = 1e-4 if name == "GptOss" else 1e-5  # logits of 5, and experts that add up in another order
    assert logits < tolerance and gradients < tolerance
    reward_model.check_model(reward_model.Args(model=name), reward_model.AnswerLogits(model), 12, "--max-length")
    assert len(WITH_HEAD) > 30


def random_group(n_answers, length, seed=0):
    """Answers of one length to one prompt, token ids from 2 to 256."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(2, PAD, (n_answers, length), generator=generator)
    texts[:, :9] = texts[0, :9].clone()
    return group(*texts.tolist())


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mistral"])
def test_a_long_group_spans_several_rows(name):
    groups = [random_group(12, 200), random_group(3, 20, seed=1)]
    rows = reward_model.group_rows(groups, "cpu")
    assert len(rows.ids) == 4 and rows.ids.shape[1] <= 1024  # 12 answers are three rows
    logits, gradients = compare(classifier(name), groups)
    assert logits < 1e-5 and gradients < 1e-5


def test_a_prompt_with_many_answers():
    groups = [random_group(64, 12), random_group(2, 30, seed=1)]
    assert len(reward_model.group_rows(groups, "cpu").ids) == 2
    logits, gradients = compare(classifier("GPT2", 10), groups)
    assert logits < 1e-5 and gradients < 1e-5


def test_order_and_neighbours_change_nothing():
    groups = groups_of(3)
    network = reward_model.AnswerLogits(classifier("GPT2"))
    logits = network(reward_model.group_rows(groups, "cpu")).split([len(group.ids) for group in groups])
    order = [2, 0, 3, 1]
    shuffled = network(reward_model.group_rows([groups[i] for i in order], "cpu"))
    assert (shuffled - torch.cat([logits[i] for i in order])).abs().max() < 1e-5
    assert (network(reward_model.group_rows(groups[1:2], "cpu")) - logits[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Bloom", "Mpt", "GPTNeo"])
def test_a_model_whose_answers_would_see_each_other_is_refused_in_a_line(name):
    with pytest.raises(SystemExit) as stop:
        network = reward_model.AnswerLogits(classifier(name, 10, seed=1))
        reward_model.check_model(reward_model.Args(model=name), network, 12, "--max-length")
    assert stop.value.code.startswith(f"--model {name}: its layers take no mask") and "\n" not in stop.value.code


def test_a_classifier_with_another_head_is_refused_in_a_line():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=258
    )
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(SystemExit, match="--model m: BertForSequenceClassification has no head `score`; take one as"):
        reward_model.prepare_classifier(reward_model.Args(model="m"), model, byte_tokenizer(), gain=1.0)


def test_a_model_that_has_no_classifier_is_an_error_that_says_so(tmp_path):
    transformers.CohereConfig(**SMALL).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CohereConfig.*AutoModelForSequenceClassification"):
        reward_model.load_model(str(tmp_path), transformers.AutoModelForSequenceClassification, num_labels=1)


def test_texts_longer_than_the_models_positions_are_refused_before_training(tmp_path, tiny):
    rows = [{"prompt": f"{n}", "chosen": "b" * 600, "rejected": "c"} for n in range(9)]
    with pytest.raises(SystemExit, match="--max-length: texts of 602 tokens, --model reads 512"):
        data = write(tmp_path / "d.jsonl", rows)
        run_script(reward_model, *flags_of(tiny, data, tmp_path / "o", max_length=999, eval_prompts=2))


# ---- data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def read(tmp_path):
    """Rows of a data set -> the groups that a script makes of them."""

    def read(rows, script=reward_model, tokenizer=None, **flags):
        args = script.Args(dataset=write(tmp_path / "read.jsonl", rows), **flags)
        pairs = script.read_pairs(args, HERE, args.dataset, "train")
        return list(script.group_pairs(args, tokenizer or byte_tokenizer(), pairs).values())

    return read


def say(text, role="assistant"):
    return [{"role": role, "content": text}]


@both
def test_every_format_reads_the_same(read, script):
    user, good, bad = say("Hi", "user"), say("Hello"), say("Hex")

    def one(row, **flags):
        (group,) = read([row], script, **flags)
        return group

    ids = one({"prompt": user, "chosen": good, "rejected": bad}).ids
    assert byte_tokenizer().decode(ids[0]) == "<s>user:Hi</s><s>assistant:Hello</s>"
    assert one({"chosen": user + good, "rejected": user + bad}).ids == ids  # the prompt in both answers
    assert one({"prompt": "Hi", "chosen": user + good, "rejected": user + bad}).ids == ids  # and in its column, too
    assert one({"prompt": "Hi", "chosen": good, "rejected": bad}).ids == ids
    assert one({"prompt": "Hi", "chosen": "Hello", "rejected": "Hex"}, chat=True).ids == ids
    assert one({"text": "Hi", "chosen": "Hello", "rejected": "Hex"}, chat=True, prompt_column="text").ids == ids

    turn = "\n\nHuman: Hi\n\nAssistant:"
    plain = one({"prompt": turn, "chosen": " Hello", "rejected": " Hex"})
    implicit = one({"chosen": turn + " Hello", "rejected": turn + " Hex"})  # HH-RLHF: not "... Assistant: He"
    assert implicit == plain and plain.prompt == turn and plain.answers == [" Hello", " Hex"]
    assert byte_tokenizer().decode(plain.ids[1]) == turn + " Hex</s>"


def test_keys_that_a_message_lacks_never_reach_the_template(tmp_path):
    """A parquet file has all keys in every message, most of them null."""
    template = "{% for m in messages %}{{ m['content'] }}{{ m.name is defined }}{% endfor %}"
    rows = []
    for n in range(2):
        name = "ann" if n else None
        rows.append({"prompt": [{"role": "user", "content": f"p{n}", "name": name}], "chosen": "a", "rejected": "b"})
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    args = reward_model.Args(dataset=str(tmp_path / "d.parquet"))
    tokenizer = byte_tokenizer(chat_template=template)
    groups = reward_model.group_pairs(args, tokenizer, reward_model.read_pairs(args, HERE, args.dataset, "train"))
    texts = [tokenizer.decode(group.ids[0]) for group in groups.values()]
    assert texts == ["p0FalseaFalse</s>", "p1TrueaFalse</s>"]


def test_pairs_of_a_prompt_are_a_group_and_bad_ones_are_left_out(read):
    """An answer in several pairs stands once."""

    def pair(prompt, chosen, rejected, a=None, b=None):
        ratings = {"chosen_rating": a, "rejected_rating": b}
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **ratings}

    rows = [pair("p", "a", "b", 3, 1), pair("q", "a", "b"), pair("p", "c", "b", 2, 1), pair("p", "a", "c", 3, 2)]
    rows += [pair("", "a", "b"), pair(None, "a", "b"), pair("p", "x" * 500, "b"), pair("p", "a", "")]
    rows += [pair("p", "same", "same"), pair("p", None, "b"), pair("p", "a", "  ")]
    p, q = read(rows, max_length=100)
    assert (p.prompt, q.prompt) == ("p", "q")
    assert p.answers == ["a", "b", "c"] and q.answers == ["a", "b"]
    assert p.ratings == [3, 1, 2] and q.ratings == [None, None]
    assert p.pairs == [(0, 1, 2), (2, 1, 1), (0, 2, 1)] and q.pairs == [(0, 1, 0)]
    assert [byte_tokenizer().decode(ids) for ids in p.ids] == ["pa</s>", "pb</s>", "pc</s>"]

    pairs = reward_model.index_pairs([p, q], "cpu")
    assert [values.tolist() for values in pairs] == [[0, 2, 0, 3], [1, 1, 2, 4], [2, 1, 1, 0]]
    pairs = reward_model.index_pairs([q, p], "cpu")
    assert [values.tolist() for values in pairs] == [[0, 2, 4, 2], [1, 3, 3, 4], [0, 2, 1, 1]]


def test_messages_without_an_answer_are_left_out(read):
    rows = [{"prompt": "p", "chosen": say("a"), "rejected": other} for other in (say(""), say(None), [], say("a"))]
    rows += [{"chosen": say("p", "user") + say("a"), "rejected": say("q", "user") + say("b")}]  # of two prompts
    rows += [{"prompt": "p", "chosen": say("a"), "rejected": say("b")}]
    (group,) = read(rows)
    assert group.answers == ["a", "b"]


@pytest.mark.parametrize("rating", [None, math.nan, ""])
def test_a_rating_that_is_missing_gives_no_margin(tmp_path, rating):
    """A csv file with a rating missing has a column of strings."""
    tmp_path = tmp_path / repr(rating)
    tmp_path.mkdir()
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 3.5, "rejected_rating": rating}]
    rows += [{"prompt": "p", "chosen": "a", "rejected": "c", "chosen_rating": 3.5, "rejected_rating": 1}]
    pandas.DataFrame(rows).to_csv(tmp_path / "d.csv", index=False)
    pandas.DataFrame(rows).astype({"rejected_rating": str}).to_parquet(tmp_path / "d.parquet")
    names = ["d.csv"]
    if rating != "":
        pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
        names.append("d.parquet")
    for name in names:
        args = reward_model.Args(dataset=str(tmp_path / name))
        pairs = reward_model.read_pairs(args, HERE, args.dataset, "train")
        (group,) = reward_model.group_pairs(args, byte_tokenizer(), pairs).values()
        assert group.ratings == [3.5, None, 1] and group.pairs == [(0, 1, 0), (0, 2, 2.5)]


def merging_tokenizer():
    """Of "pa", "pb" and "qa" one token each."""
    tokenizer = byte_tokenizer()
    vocab = {**tokenizer.get_vocab(), "pa": 258, "pb": 259, "qa": 260}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("p", "a"), ("p", "b"), ("q", "a")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def test_the_end_of_a_prompt_and_the_beginning_of_an_answer_may_be_one_token(read):
    tokenizer = merging_tokenizer()
    (group,) = read([{"prompt": "xp", "chosen": "ab", "rejected": "ac"}], tokenizer=tokenizer)
    assert group.ids[0] == [tokenizer.convert_tokens_to_ids("x"), 258, tokenizer.convert_tokens_to_ids("b"), 1]
    rows = reward_model.group_rows([group], "cpu")
    assert rows.is_response.sum() == 4 and rows.positions[0].tolist() == [0, 1, 2, 3, 1, 2, 3]


def test_texts_that_do_not_even_begin_alike_are_no_group(read):
    rows = [("p", "x", "y"), ("p", "ab", "ac"), ("p", "x", "z"), ("p", "x", "b")]  # the second two begin with "pa"
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    (group,) = read(rows, tokenizer=merging_tokenizer())
    assert group.answers == ["x", "y", "z"] and group.pairs == [(0, 1, 0), (0, 2, 0)]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("begin", [False, True])
def test_a_text_ends_with_exactly_one_eos_and_begins_with_the_tokenizers_bos(read, begin, end):
    """Case 02_add_eos: a tokenizer that adds an EOS of its own."""
    tokenizer = byte_tokenizer(begin=begin, end=end)
    row = {"prompt": "Say 0:", "chosen": " one", "rejected": " two</s>"}
    (plain,) = read([row], tokenizer=tokenizer)
    bos = "<s>" if begin else ""
    assert tokenizer.decode(plain.ids[0]) == bos + "Say 0: one</s>"
    if not end:
        assert tokenizer.decode(plain.ids[1]) == bos + "Say 0: two</s>"  # of a file that has it already
    (chat,) = read([row], tokenizer=tokenizer, chat=True)
    assert tokenizer.decode(chat.ids[0]) == "<s>user:Say 0:</s><s>assistant: one</s>"


def test_a_bos_that_a_prompt_has_already_is_not_doubled(read):
    row = {"prompt": "<s>Say 0:", "chosen": " one", "rejected": " two"}
    (group,) = read([row], tokenizer=byte_tokenizer(begin=True, end=True))
    assert byte_tokenizer().decode(group.ids[0]) == "<s>Say 0: one</s>"


@pytest.mark.parametrize("end, expected", [("<end_of_turn>\n", "a<end_of_turn></s>"), ("</s>\n\n", "a</s>")])
def test_what_a_template_writes_behind_the_end_is_no_part_of_a_text(read, end, expected):
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}" + end)
    (group,) = read([{"prompt": "p", "chosen": "a", "rejected": "b"}], tokenizer=tokenizer, chat=True)
    assert tokenizer.decode(group.ids[0]) == "p" + expected


def test_no_held_out_prompt_is_trained_on(tmp_path):
    train = [{"prompt": f"p{n}", "chosen": "a", "rejected": x} for n in range(9) for x in "bc"]
    test = [{"prompt": f"p{n}", "chosen": "e", "rejected": x} for n in (3, 5, 20) for x in "fg"]
    args = reward_model.Args(dataset=write(tmp_path / "a.jsonl", train), eval_dataset=write(tmp_path / "b.jsonl", test))
    trained, held_out = reward_model.load_groups(args, HERE, byte_tokenizer())
    assert [group.prompt for group in held_out] == ["p3", "p5", "p20"]
    assert [group.answers for group in held_out] == [["e", "f", "g"]] * 3
    assert [group.prompt for group in trained] == ["p0", "p1", "p2", "p4", "p6", "p7", "p8"]
    assert all(len(group.pairs) == 2 for group in trained + held_out)


def test_held_out_prompts_are_a_random_sample_the_same_for_every_seed(tmp_path):
    rows = [{"prompt": f"p{n:02}", "chosen": "a", "rejected": x} for x in "bc" for n in range(40)]
    path = write(tmp_path / "d.jsonl", rows)
    held_out = []
    for seed in (1, 2):
        args = reward_model.Args(dataset=path, eval_prompts=10, seed=seed)
        train, held = reward_model.load_groups(args, HERE, byte_tokenizer())
        held_out.append([group.prompt for group in held])
        assert len(set(held_out[-1])) == 10
        assert sorted([group.prompt for group in train] + held_out[-1]) == [f"p{n:02}" for n in range(40)]
        assert all(len(group.pairs) == 2 for group in train + held)
    assert held_out[0] == held_out[1]
    assert 2 < sum(prompt < "p20" for prompt in held_out[0]) < 8  # from all over the file


@both
def test_of_the_built_in_pairs_the_last_six_subjects_are_held_out(script):
    train, held_out = script.load_groups(script.Args(max_length=2000), HERE, byte_tokenizer())
    assert len(train) == 180 and len(held_out) == 60
    subjects = rloo.SUBJECTS.split(", ")[-6:]
    for subject in subjects:
        assert sum(subject in group.prompt for group in held_out) == 10
        assert not any(subject in group.prompt for group in train)
    for group in train + held_out:
        assert None not in group.ratings and len(set(group.answers)) == len(group.answers) <= 8
        for chosen, rejected, margin in group.pairs:
            assert margin == pytest.approx(group.ratings[chosen] - group.ratings[rejected]) and margin > 0.09
    assert byte_tokenizer().decode(held_out[0].ids[0]).startswith("<s>user:")  # they are chats without a flag


# ---- evaluation


def hand_made():
    """Four prompts with 3, 2, 2 and 3 answers; (groups, scores, pairs)."""
    lengths = [[5, 2, 3], [4, 4], [1, 7], [9, 2, 6]]
    ratings = [[3.0, 1.0, 1.0], [2.0, 2.0], [1.0, None], [1.0, 2.0, 3.0]]
    wins = [[(0, 1, 2.0), (0, 2, 2.0)], [(1, 0, 0.0)], [(0, 1, 0.0)], [(1, 0, 1.0), (2, 1, 1.0)]]
    groups = []
    for n in range(4):
        answers = [f"answer {n}{letter}" for letter in "abc"[: len(lengths[n])]]
        groups.append(reward_model.Group(f"prompt {n}", answers, [[7] * x for x in lengths[n]], ratings[n], wins[n]))
    scores = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.5, -1.0, 1.0, 3.0, 1.0, 2.0])
    return groups, scores, reward_model.index_pairs(groups, "cpu")


@both
def test_means_of_an_evaluation_by_hand(script):
    groups, scores, pairs = hand_made()
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    means = script.evaluation_means(losses, scores, pairs, groups)
    # Scores of the pairs: 2 > 0, 2 > 1, .5 = .5, -1 < 1, 1 < 3, 2 > 1; lengths: 5 > 2, 5 > 3, 4 = 4, 1 < 7, 2 < 9, 6 > 2.
    expected = {"loss": 3.5, "accuracies": 3 / 6, "margins": (2 + 1 + 0 - 2 - 2 + 1) / 6}
    expected |= {"chosen": (2 + 2 + 0.5 - 1 + 1 + 2) / 6, "rejected": (0 + 1 + 0.5 + 1 + 3 + 1) / 6}
    # Ranks 3, 1, 2 against 3, 1.5, 1.5, and 3, 1, 2 against 1, 2, 3; the others have equal ratings, or lack one.
    expected |= {"longer_wins": 3 / 6, "rank_corr": (math.sqrt(3) / 2 - 0.5) / 2}
    assert means == pytest.approx(expected, abs=1e-6)
    del expected["rank_corr"]
    unrated = [group._replace(ratings=[None] * len(group.answers)) for group in groups]
    assert script.evaluation_means(losses, scores, pairs, unrated) == pytest.approx(expected, abs=1e-6)


def test_rank_correlation():
    def spearman(a, b):
        return reward_model.rank_correlation(torch.tensor(a), torch.tensor(b))

    assert spearman([1.0, 5.0, 9.0], [0.1, 0.2, 90.0]) == pytest.approx(1)
    assert spearman([1.0, 5.0, 9.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0]) == pytest.approx(0.894427, abs=1e-5)  # ties: 1.5, 3.5
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (2, 30), generator=generator).float()
    expected = pandas.Series(a.numpy()).rank().corr(pandas.Series(b.numpy()).rank())
    assert reward_model.rank_correlation(a, b) == pytest.approx(expected, abs=1e-5)


def test_the_report_names_the_answers_of_the_first_pair_and_their_own_scores():
    groups, _, _ = hand_made()
    evaluations = {}
    for title in ("before", "trained"):
        descriptions = [f"{title}: {answer}" for group in groups for answer in group.answers]
        evaluations[title] = reward_model.RewardEvaluation({"loss": 1.0, "accuracies": 0.25}, descriptions)
    lines = reward_model.report_pairs(evaluations, groups).splitlines()
    assert lines[:2] == ["before  loss 1.000  accuracies 0.250", "trained loss 1.000  accuracies 0.250"]
    expected = []
    for n, chosen, rejected in ((0, "a", "b"), (2, "a", "b")):  # of four prompts, every second
        expected += ["", f"prompt  'prompt {n}'"]
        for name, letter in (("chosen    ", chosen), ("rejected  ", rejected)):
            expected.append(f"{name}'answer {n}{letter}'")
            expected += [f"{title:>18} {title}: answer {n}{letter}" for title in ("before", "trained")]
    assert lines[2:] == expected
    groups[2] = groups[2]._replace(pairs=[(1, 0, 0.0)])
    lines = reward_model.report_pairs(evaluations, groups).splitlines()
    assert lines[lines.index("prompt  'prompt 2'") + 1 :][:2] == [
        "chosen    'answer 2b'",
        f"{'before':>18} before: answer 2b",
    ]


@both
def test_an_evaluation_takes_a_process_no_more_prompts_than_training_does(read, script):
    groups = read([{"prompt": f"{n}", "chosen": "b", "rejected": "c"} for n in range(7)], script)
    network = script.AnswerLogits(classifier("Llama", LABELS[script]))
    sizes = []
    network.register_forward_pre_hook(lambda _, batch: sizes.append(len(batch[0].ids)))
    two = types.SimpleNamespace(autocast=contextlib.nullcontext, device="cpu", num_processes=2)
    logits = script.all_logits(script.Args(micro_batch_size=4), two, network, groups)
    assert sizes == [2, 2, 2, 1]
    assert logits.shape == (14, LABELS[script])
    assert (logits - alone(network.model, groups)).abs().max() < 1e-5


# ---- runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """People here prefer vowels: three answers per prompt, rated 2, 1, 0; some pairs are missing, so groups differ."""
    generator = torch.Generator().manual_seed(0)

    def word(letters):
        return "".join(letters[i] for i in torch.randint(len(letters), (8,), generator=generator))

    rows = []
    for n in range(60):
        answers = [word("aeiou"), word("aeioukstm"), word("kstm")]
        for a, b in ((0, 1), (1, 2), (0, 2)):
            ratings = {"chosen_rating": 2 - a, "rejected_rating": 2 - b}
            rows.append({"prompt": f"Word {n}?", "chosen": answers[a], "rejected": answers[b], **ratings})
    rows = [row for n, row in enumerate(rows) if n % 7 != 1 and n % 5 != 2]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def flags_of(model, dataset, out, **more):
    flags = {"precision": "fp32", "eval_prompts": 12, "prompts_per_step": 4, "micro_batch_size": 2}
    flags |= {"learning_rate": 3e-3, "model": model, "dataset": dataset, "output_dir": out, **more}
    parts = []
    for name, value in flags.items():
        parts += [f"--{name.replace('_', '-')}", str(value)]
    return parts


def printed(script, *flags):
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        run_script(script, *flags)
    return stdout.getvalue()


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def finished(request, tiny, pairs, tmp_path_factory):
    """(script, output directory, what it printed) of a run over two epochs and a half."""
    out = tmp_path_factory.mktemp("rm") / "out"
    more = {"total_steps": 30, "eval_every": 10, "save_every": 10}
    return request.param, out, printed(request.param, *flags_of(tiny, pairs, out, **more), "--chat")


@pytest.fixture(scope="module")
def short(tiny, pairs, tmp_path_factory):
    """{script: output directory} of four steps without evaluation, each of them saved."""
    folders = {}
    for script in SCRIPTS:
        folders[script] = tmp_path_factory.mktemp("short") / "out"
        printed(script, *short_flags(tiny, pairs, folders[script]))
    return folders


def short_flags(tiny, pairs, out, **more):
    more = {"total_steps": 4, "save_every": 1, "eval_prompts": 0, **more}
    return [*flags_of(tiny, pairs, out, **more), "--chat"]


def table(stdout, title):
    (line,) = [line for line in stdout.splitlines() if line.startswith(f"{title} ") and " accuracies " in line]
    words = line.split()[1:]
    return dict(zip(words[::2], map(float, words[1::2])))


def same(a, b):
    a, b = load_file(Path(a, "model.safetensors")), load_file(Path(b, "model.safetensors"))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_optimizer(a, b):
    a, b = (torch.load(Path(x, "trainer_state.pt"), weights_only=True)["optimizer"]["state"] for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n][name], b[n][name]) for n in a for name in a[n])


def plain_model(path):
    """What anybody gets: (model, tokenizer) of a saved folder."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager")
    return model.float().eval(), transformers.AutoTokenizer.from_pretrained(path)


def plain_score(model, tokenizer, prompt, answer, chat=True):
    """(K,) logits of one text."""
    text = prompt + answer
    if chat:
        messages = say(prompt, "user") + say(answer)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not chat and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return model(torch.tensor([ids])).logits[0]


def score_of(script, logits):
    if script is reward_model:
        return logits[0].item()
    return sum(grade * p for grade, p in enumerate(logits.softmax(0).tolist(), 1))


def test_it_learns_and_shows_it(finished):
    script, out, stdout = finished
    assert re.search(r"^to train on: 48 prompts with \d+ pairs\nheld out: 12 prompts with \d+ pairs$", stdout, re.M)
    before, trained = table(stdout, "before"), table(stdout, "trained")
    # A new head is random but small: no answer is far ahead yet.
    start = math.log(2) if script is reward_model else -math.log(0.45)
    assert before["loss"] == pytest.approx(start, abs=0.3)
    assert 0 < abs(before["margins"]) < 0.5
    assert trained["accuracies"] >= 0.85 and trained["loss"] < before["loss"] - 0.1
    assert trained["rank_corr"] > 0.7 and trained["margins"] > 0.5
    assert stdout.count("\nprompt ") == 3
    tags = {"loss/reward", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"}
    tags |= {"policy/grad_norm", "charts/learning_rate", "charts/pairs_per_second"}
    evaluated = {"loss", "accuracies", "margins", "chosen", "rejected", "longer_wins", "rank_corr"}
    events = EventAccumulator(str(out)).Reload()
    assert set(events.Tags()["scalars"]) == tags | {f"eval/{name}" for name in evaluated}
    assert before.keys() == trained.keys() == evaluated
    assert {"eval/samples/text_summary", "args/text_summary"} <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Scalars("eval/accuracies")] == [0, 10, 20, 30]
    assert [event.step for event in events.Scalars("loss/reward")] == list(range(1, 31))
    for name, value in trained.items():
        assert scalars(out, f"eval/{name}")[-1] == pytest.approx(value, abs=1e-3)
    rates = [3e-3 * min((step + 1) / 3, 1 - step / 30) for step in range(30)]  # warm-up, then linear to 0
    assert scalars(out, "charts/learning_rate") == pytest.approx(rates, rel=1e-5)


def test_the_scores_that_are_printed_are_those_of_plain_transformers(finished):
    script, out, stdout = finished
    model, tokenizer = plain_model(out / "final")
    prompt = None
    checked = 0
    for line in stdout.splitlines():
        if line.startswith("prompt "):
            prompt = line.split("'")[1]
        if line.startswith(("chosen ", "rejected ")):
            answer = line.split("'")[1]
        if line.startswith("           trained "):
            logits = plain_score(model, tokenizer, prompt, answer)
            words = line.split()[1:]
            assert float(words[0]) == pytest.approx(score_of(script, logits), abs=0.006)
            if script is reward_model_ordinal:
                assert words[1:5] == ["grades", "1", "to", "10:"]
                assert [float(p) for p in words[5:]] == pytest.approx(logits.softmax(0).tolist(), abs=0.006)
            checked += 1
    assert checked == 6


def test_total_steps_of_0_is_once_over_all_prompts(tiny, pairs, tmp_path):
    """48 of 60 prompts, 5 per step: ten steps, the last of which begins a second epoch."""
    more = {"prompts_per_step": 5, "micro_batch_size": 5}
    run_script(reward_model, *flags_of(tiny, pairs, tmp_path / "o", **more), "--chat")
    assert len(scalars(tmp_path / "o", "loss/reward")) == 10


# ---- whole steps


@pytest.mark.parametrize(
    "script, more",
    [(reward_model, []), (reward_model, ["--margin", "--center-coef", 0.3]), (reward_model_ordinal, [])],
    ids=["bradley_terry", "margin", "ordinal"],
)
def test_a_step_is_that_of_the_formula(script, more, tiny, pairs, tmp_path, monkeypatch):
    """The second step, one text at a time; its loss is a mean over the step's pairs, of prompts with 1 to 3 of them."""
    real = script.group_rows
    seen = []
    monkeypatch.setattr(script, "group_rows", lambda groups, device: seen.append(groups) or real(groups, device))
    out = tmp_path / "o"
    run_script(script, *short_flags(tiny, pairs, out, total_steps=2, max_grad_norm=1e9), *more)
    prompts = [group.prompt for groups in seen[2:] for group in groups]
    assert len(seen) == 4 and len(set(prompts)) == 4

    model, _ = plain_model(out / "checkpoint-1")
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    rows = [row for row in rows if row["prompt"] in prompts]
    assert len({sum(row["prompt"] == prompt for row in rows) for prompt in prompts}) > 1

    def logits(row, name):
        text = f"<s>user:{row['prompt']}</s><s>assistant:{row[name]}</s>"
        return model(torch.tensor([byte_tokenizer()(text, add_special_tokens=False)["input_ids"]])).logits[0]

    losses, chosen, rejected = [], [], []
    for row in rows:
        w, other = logits(row, "chosen"), logits(row, "rejected")
        if script is reward_model:
            margin = row["chosen_rating"] - row["rejected_rating"] if more else 0
            center_coef = 0.3 if more else 0.01
            losses.append(-torch.sigmoid(w[0] - other[0] - margin).log() + center_coef * (w[0] + other[0]) ** 2)
        else:
            losses.append(-double_sum(w, other).log())
        chosen.append(score_of(script, w))
        rejected.append(score_of(script, other))

    expected = torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))
    averages = zip(moments(out / "checkpoint-1"), moments(out / "final"))
    gradients = [(after - 0.9 * before) / 0.1 for before, after in averages]  # of Adam's average
    assert len(gradients) == len(expected)
    for a, b in zip(gradients, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert max(b.abs().max() for b in expected) > 0.05
    norm = torch.cat([b.flatten() for b in expected]).norm().item()

    def mean(values):
        return sum(values) / len(values)

    curves = {"loss/reward": mean(losses).item(), "policy/grad_norm": norm}
    curves |= {"rewards/chosen": mean(chosen), "rewards/rejected": mean(rejected)}
    curves |= {"rewards/margins": mean(chosen) - mean(rejected)}
    curves |= {"rewards/accuracies": mean([float(a > b) for a, b in zip(chosen, rejected)])}
    for tag, value in curves.items():
        assert scalars(out, tag)[1] == pytest.approx(value, rel=1e-4, abs=1e-5), tag


@pytest.fixture(scope="module")
def first_step(tiny, pairs, tmp_path_factory):
    """{script: output directory} of one step with four prompts in a micro-batch."""
    folders = {}
    for script in SCRIPTS:
        folders[script] = tmp_path_factory.mktemp("step") / "out"
        flags = flags_of(tiny, pairs, folders[script], total_steps=1, micro_batch_size=4)
        printed(script, *flags, "--chat")
    return folders


def check_same_step(out, expected):
    a = torch.cat([average.flatten() for average in moments(out / "final")])
    b = torch.cat([average.flatten() for average in moments(expected / "final")])
    assert b.norm() > 1e-3  # a tenth of the gradient, all of it
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert grad_norm(out) == pytest.approx(grad_norm(expected), rel=1e-4)  # before clipping, which hides a wrong scale
    for tag in ("loss/reward", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert scalars(out, tag) == pytest.approx(scalars(expected, tag), rel=1e-4, abs=1e-6)
    for tag in ("eval/loss", "eval/accuracies", "eval/rank_corr", "eval/chosen"):
        assert scalars(out, tag)[0] == pytest.approx(scalars(expected, tag)[0], rel=1e-5)


@both
@pytest.mark.parametrize("more", [["--micro-batch-size", 2], ["--micro-batch-size", 1], ["--gradient-checkpointing"]])
def test_micro_batches_and_gradient_checkpointing_change_nothing(script, more, tiny, pairs, tmp_path, first_step):
    flags = flags_of(tiny, pairs, tmp_path / "o", total_steps=1, micro_batch_size=4)
    run_script(script, *flags, "--chat", *more)
    check_same_step(tmp_path / "o", first_step[script])


@both
def test_two_processes_change_nothing(script, tiny, pairs, tmp_path, first_step):
    flags = flags_of(tiny, pairs, tmp_path / "o", total_steps=1, micro_batch_size=2)
    run_in_two_processes(script, *flags, "--chat")
    check_same_step(tmp_path / "o", first_step[script])


@both
def test_answers_of_a_prompt_are_trained_for_all_their_pairs_in_one_pass(script, tiny, tmp_path, monkeypatch):
    """Eight answers, 28 pairs: eight texts run."""
    rows = [{"prompt": "p", "chosen": "abcdefgh"[i], "rejected": "abcdefgh"[j]} for i in range(8) for j in range(i)]
    real = script.group_rows
    seen = []
    monkeypatch.setattr(script, "group_rows", lambda groups, device: seen.append(real(groups, device)) or seen[-1])
    more = {"eval_prompts": 0, "prompts_per_step": 1, "micro_batch_size": 1}
    run_script(script, *flags_of(tiny, write(tmp_path / "d.jsonl", rows), tmp_path / "o", **more))
    (rows,) = seen
    assert rows.ids.shape == (1, 8 * 3) and len(rows.response_mask) == 8


# ---- going on


def test_resume_is_bit_exact(finished, tmp_path, monkeypatch):
    script, out, stdout = finished
    shutil.copytree(out / "checkpoint-20", tmp_path / "checkpoint-20")
    monkeypatch.chdir("/")
    resumed = printed(script, "--resume", tmp_path / "checkpoint-20")  # the flags come from the checkpoint
    assert same(out / "final", tmp_path / "final") and not same(out / "checkpoint-20", tmp_path / "final")
    assert same_optimizer(out / "final", tmp_path / "final")
    assert table(resumed, "trained") == table(stdout, "trained")
    assert torch.load(tmp_path / "final/trainer_state.pt", weights_only=True)["step"] == 30
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/reward")] == list(range(21, 31))


@both
@pytest.mark.parametrize(
    "error", [IndexError("late"), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_whatever_ends_a_run_leaves_the_weights_of_the_last_whole_step(
    script, error, short, tiny, pairs, tmp_path, monkeypatch, capsys
):
    """In the second micro-batch of the third step, when the first has already left its gradient."""
    name = "bradley_terry_losses" if script is reward_model else "ordinal_losses"
    real = getattr(script, name)
    calls = []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 6:
            raise error
        return real(*args)

    monkeypatch.setattr(script, name, breaks)
    with pytest.raises(type(error)):
        run_script(script, *short_flags(tiny, pairs, tmp_path / "o", save_every=100))
    assert f"--resume {tmp_path}/o/checkpoint-2" in capsys.readouterr().err
    monkeypatch.undo()
    assert same(short[script] / "checkpoint-2", tmp_path / "o/checkpoint-2")
    run_script(script, "--resume", tmp_path / "o/checkpoint-2")
    assert same(short[script] / "final", tmp_path / "o/final")


@both
def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(script, tiny, pairs, tmp_path):
    """A learning rate that throws the weights far away."""
    with pytest.raises(SystemExit, match="^step 1: gradient nan; see --learning-rate$"):
        run_script(script, *short_flags(tiny, pairs, tmp_path / "o", save_every=100, learning_rate=1e30))
    assert [path.name for path in (tmp_path / "o").iterdir() if path.is_dir()] == ["checkpoint-1"]


@both
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_or_a_signal_at_any_moment_leaves_whole_checkpoints(script, number, short, tiny, pairs, tmp_path):
    """RLOO_KILLS=20 pytest -k kill: the number of moments tried."""
    for n in range(int(os.environ.get("RLOO_KILLS", 1))):
        out = tmp_path / str(n)
        command = [sys.executable, script.__file__, *short_flags(tiny, pairs, out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (out / "checkpoint-1").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.2 * random.random())
        process.send_signal(number)
        stderr = process.communicate()[1]
        saved = [path for path in out.iterdir() if path.is_dir() and path.name[0] != "."]
        assert saved, stderr[-2000:]
        for path in saved:
            assert same(path, short[script] / path.name)
            assert same_optimizer(path, short[script] / path.name)
        last = max(saved, key=lambda path: path.stat().st_mtime)
        if number == signal.SIGTERM and last.name != "final":
            assert process.returncode == 1 and f"--resume {last}" in stderr and "stopped by a signal" in stderr
        if last.name != "final":
            run_script(script, "--resume", last)
        assert same(short[script] / "final", out / "final")


# ---- what is saved


def test_plain_transformers_and_rloo_give_the_scores_of_training(finished):
    script, out, _ = finished
    path = str(out / "final")
    model, tokenizer = plain_model(path)
    assert model.config.num_labels == LABELS[script]
    assert getattr(model.config, "ordinal", False) is (script is reward_model_ordinal)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    AcceleratorState._reset_state(reset_partial_state=True)
    scorer = rloo.load_scorer("--reward", path, Accelerator(cpu=True, mixed_precision="no"))
    answers = ["aei", "kstmkstm", "a"]
    for chat in (True, False):
        messages = say("Word?", "user") if chat else None
        pair = script.Pair("Word?", messages, "", "", {})
        ids = script.encode_answers(tokenizer, [tokenizer.eos_token_id], pair, answers)
        group = script.Group("Word?", answers, ids, [None] * 3, [])
        trained = script.AnswerLogits(copy.deepcopy(model))(script.group_rows([group], "cpu"))

        # One text at a time
        for answer, logits in zip(answers, trained):
            assert torch.allclose(plain_score(model, tokenizer, "Word?", answer, chat), logits, atol=1e-5)

        # A padded batch
        texts = [f"Word?{answer}</s>" for answer in answers]
        if chat:
            chats = [messages + say(answer) for answer in answers]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
        for side in ("left", "right"):
            tokenizer.padding_side = side
            batch = tokenizer(texts, add_special_tokens=not chat, padding=True, return_tensors="pt")
            assert torch.allclose(model(**batch).logits, trained, atol=1e-5)

        # rloo.py
        prompt = rloo.Prompt([], messages, {"prompts": "Word?"})
        expected = [score_of(script, logits) for logits in trained]
        assert scorer([prompt] * 3, answers) == pytest.approx(expected, abs=1e-4)
        assert len({round(score, 3) for score in expected}) == 3


TOKENIZERS = {
    "pad is EOS": {},
    "no pad": {"pad_token": None},
    "pad of its own": {"pad_token": "<s>"},
    "pad outside the embedding": {"pad_token": "[PAD]"},
    "adds an EOS": {"end": True},
    "adds BOS and EOS": {"begin": True, "end": True},
    "end_of_turn": {"chat_template": "{% for m in messages %}{{ m.content }}<end_of_turn>\n{% endfor %}"},
    "EOS and newlines": {"chat_template": "\n{% for m in messages %}{{ m.content }}</s>\n\n{% endfor %}"},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_the_tokenizer_the_saved_model_gives_the_scores_that_were_trained(name, pairs, tmp_path):
    """As chats and as strings; a text ends with exactly one EOS, and the saved chat template writes it."""
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(**TOKENIZERS[name]).save_pretrained(tmp_path / "m")
    for kind in ("chat", "no-chat"):
        flags = flags_of(tmp_path / "m", pairs, tmp_path / kind, total_steps=2)
        stdout = printed(reward_model, *flags, f"--{kind}")
        model, tokenizer = plain_model(tmp_path / kind / "final")
        assert tokenizer.pad_token not in (None, tokenizer.eos_token)
        assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
        text = tokenizer.apply_chat_template(say("q", "user") + say("hi"), tokenize=False)
        assert text.endswith({"end_of_turn": "hi<end_of_turn></s>"}.get(name, "hi</s>"))
        (prompt, answer), *_ = re.findall(r"^prompt  '(.*)'\nchosen    '(.*)'$", stdout, re.M)
        shown = re.findall(r"^ +trained (\S+)$", stdout, re.M)[0]
        score = plain_score(model, tokenizer, prompt, answer, chat=kind == "chat")
        assert score.item() == pytest.approx(float(shown), abs=0.006)


@both
def test_a_new_head_is_the_seeds_and_of_its_size(script, tiny, pairs, tmp_path):
    """std 1 / sqrt(width) (N+ implementation details, arXiv 2403.17031), for ten logits a quarter of it."""
    heads = []
    for n, seed in enumerate((1, 1, 2)):
        more = {"total_steps": 1, "learning_rate": 0, "seed": seed, "eval_prompts": 0}
        run_script(script, *flags_of(tiny, pairs, tmp_path / str(n), **more))
        heads.append(load_file(tmp_path / str(n) / "final/model.safetensors")["score.weight"])
    labels, width = heads[0].shape
    assert (labels, width) == (LABELS[script], 32)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    gain = 1 if labels == 1 else 0.25
    assert torch.cat(heads[1:]).std() == pytest.approx(gain * width**-0.5, rel=0.25)


def test_going_on_from_a_saved_model_keeps_its_head_and_its_texts(finished, pairs, tmp_path):
    """A second run, on other data, say: at a learning rate of 0 nothing changes."""
    script, out, _ = finished
    flags = flags_of(out / "final", pairs, tmp_path / "o", total_steps=1, learning_rate=0, seed=2)
    before = table(printed(script, *flags, "--chat"), "before")
    assert same(out / "final", tmp_path / "o/final")
    assert [before["loss"], before["margins"]] == pytest.approx(
        [scalars(out, "eval/loss")[-1], scalars(out, "eval/margins")[-1]], abs=1e-3
    )
    _, tokenizer = plain_model(out / "final")
    _, again = plain_model(tmp_path / "o/final")
    assert again.pad_token_id == tokenizer.pad_token_id
    chat = say("q", "user") + say("a")
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert again.apply_chat_template(chat, tokenize=False) == text == "<s>user:q</s><s>assistant:a</s>"


def test_eval_only_of_a_saved_model_and_of_a_checkpoint(finished, pairs, tmp_path, capsys):
    script, out, stdout = finished
    trained = table(stdout, "trained")
    flags = ["--precision", "fp32", "--chat", "--eval-only"]
    run_script(script, *flags, "--model", out / "final", "--dataset", pairs, "--eval-prompts", 12)
    assert table(capsys.readouterr().out, "before") == pytest.approx(trained, abs=2e-3)
    run_script(script, "--resume", out / "final", "--eval-only")
    assert table(capsys.readouterr().out, "before") == pytest.approx(trained, abs=2e-3)

    # All pairs of a file, two ways.
    rows = Path(pairs).read_text().splitlines(keepends=True)[:30]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    tables = []
    for more in (["--eval-prompts", 999], ["--eval-dataset", tmp_path / "few.jsonl"]):
        run_script(script, *flags, "--model", out / "final", "--dataset", tmp_path / "few.jsonl", *more)
        tables.append(table(capsys.readouterr().out, "before"))
    assert tables[0] == pytest.approx(tables[1], abs=2e-3) and tables[0]["accuracies"] > 0.8


@both
def test_a_language_model_cannot_be_evaluated(script, tiny, pairs):
    """A random head would be right half the time, and look like a poor reward model."""
    with pytest.raises(SystemExit, match="^--eval-only: --model .* is no reward model$"):
        run_script(script, "--eval-only", "--model", tiny, "--dataset", pairs)


def test_a_head_of_another_size_is_an_error_that_says_so(finished, pairs, capsys):
    script, out, _ = finished
    other = SCRIPTS[script is reward_model]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        run_script(other, "--model", out / "final", "--dataset", pairs, "--eval-only")


# ---- bad input: one line that names the flag

ROWS = [{"prompt": str(n), "chosen": "b", "rejected": "c"} for n in range(50)]
QUESTIONS = [{"question": str(n), "chosen": "b", "rejected": "c"} for n in range(50)]
COLUMNS = "columns: ['question', 'chosen', 'rejected']"


@both
@pytest.mark.parametrize(
    "rows, flags, said",
    [
        ([{"prompt": "a", "chosen": "b"}], [], "needs the columns chosen and rejected, it has ['prompt', 'chosen']"),
        (QUESTIONS, ["--chat"], f"--prompt-column prompt: no row has a prompt and two answers; {COLUMNS}"),
        (
            QUESTIONS,
            ["--prompt-column", "query"],
            f"--prompt-column query: no row has a prompt and two answers; {COLUMNS}",
        ),
        (
            [{"prompt": None, **row} for row in QUESTIONS],
            [],
            "--prompt-column prompt: no row has a prompt and two answers",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": None}], [], "no row has a prompt and two answers"),
        (ROWS[:5], [], "5 prompts are left without the empty, the too long and copies: --eval-prompts 12 leaves none"),
        (ROWS, ["--max-length", 2], "0 prompts are left without the empty, the too long and copies"),
        (ROWS, ["--max-length", 1], "--max-length 1: must be a number of 2 or more"),
        (ROWS, ["--learning-rate", "nan"], "--learning-rate nan: must be a number of 0 or more"),
        (ROWS, ["--learning-rate", "-0.001"], "--learning-rate -0.001: must be"),
        (ROWS, ["--max-grad-norm", 0], "--max-grad-norm 0.0: must be a number of 1e-06 or more"),
        (ROWS, ["--total-steps", -1], "--total-steps -1: must be"),
        (ROWS, ["--warmup-steps", -1], "--warmup-steps -1: must be"),
        (ROWS, ["--prompts-per-step", 0], "--prompts-per-step 0: must be a number of 1 or more"),
        (ROWS, ["--micro-batch-size", 3], "--micro-batch-size: must divide --prompts-per-step"),
        (ROWS, ["--micro-batch-size", 8], "--micro-batch-size: must divide --prompts-per-step"),
        (ROWS, ["--resume", "nowhere"], "--resume nowhere: no checkpoint; give a checkpoint-<step> or final folder"),
    ],
)
def test_bad_input(script, tiny, tmp_path, rows, flags, said):
    with pytest.raises(SystemExit) as stop:
        data = write(tmp_path / "d.jsonl", rows)
        run_script(script, *flags_of(tiny, data, tmp_path / "o"), *flags)
    assert said in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("value", ["nan", "-0.01"])
def test_bad_centring(tiny, tmp_path, value):
    with pytest.raises(SystemExit, match="--center-coef .*: must be a number of 0 or more"):
        run_script(
            reward_model, *flags_of(tiny, write(tmp_path / "d.jsonl", ROWS), tmp_path / "o"), "--center-coef", value
        )


@both
def test_all_prompts_in_the_evaluation_data_set_leave_none_to_train_on(script, tiny, tmp_path):
    data = write(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(SystemExit, match="--dataset: no pairs left to train on; see --max-length, --eval-dataset"):
        run_script(script, *flags_of(tiny, data, tmp_path / "o"), "--eval-dataset", data)


@both
def test_case_01_prompt_column_trains_with_its_flag(script, tiny, tmp_path):
    flags = flags_of(tiny, write(tmp_path / "d.jsonl", QUESTIONS), tmp_path / "o", total_steps=1)
    assert "to train on: 38 prompts with 38 pairs" in printed(script, *flags, "--prompt-column", "question")


def test_margin_needs_ratings_of_some_pairs(tiny, tmp_path):
    rated = {"chosen_rating": 3, "rejected_rating": 1}
    some = [{**row, **rated} if n % 2 else row for n, row in enumerate(ROWS)]
    equal = [{**row, "chosen_rating": 2, "rejected_rating": 2} for row in ROWS]
    for n, rows in enumerate((ROWS, equal)):
        flags = flags_of(tiny, write(tmp_path / f"{n}.jsonl", rows), tmp_path / f"o{n}", total_steps=1)
        with pytest.raises(SystemExit, match="--margin: the dataset has no numbers in columns chosen_rating and"):
            run_script(reward_model, *flags, "--margin")
    run_script(
        reward_model, *flags_of(tiny, write(tmp_path / "d.jsonl", some), tmp_path / "o", total_steps=1), "--margin"
    )


# ---- benchmark/calibration.py


def test_win_probabilities_by_hand():
    pairs = reward_model.Pairs(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.zeros(2))
    logits = torch.tensor([[2.0], [1.0], [1.0]])
    assert calibration.win_probabilities(logits, pairs, False).tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0.5])
    logits = torch.randn(3, 10)
    probabilities = calibration.win_probabilities(logits, pairs, True)
    for p, i, j in zip(probabilities, (0, 1), (1, 2)):
        win, lose = double_sum(logits[i], logits[j]), double_sum(logits[j], logits[i])
        assert p.item() == pytest.approx((win / (win + lose)).item(), abs=1e-5)


def test_calibration_by_hand():
    """Five pairs of which the model is sure of .95, three times, and .65 once, and of one that it has wrong by .85."""
    result = calibration.calibrate(torch.tensor([0.95, 0.95, 0.95, 0.65, 0.15]))
    assert result.accuracy == pytest.approx(4 / 5)
    assert result.counts.tolist() == [3, 1, 0, 1, 0, 0, 1, 0, 1, 3]
    assert result.said[[0, 1, 3, 6, 8, 9]].tolist() == pytest.approx([0.05, 0.15, 0.35, 0.65, 0.85, 0.95])
    assert result.true[[0, 1, 3, 6, 8, 9]].tolist() == [0, 1, 0, 1, 0, 1]
    assert result.error == pytest.approx((3 * 0.05 + 0.85 + 0.35) / 5)
    assert calibration.calibrate(torch.full((4,), 1.0)).counts.tolist() == [4] + [0] * 8 + [4]  # 1 is in the last bin
    assert calibration.calibrate(torch.full((4,), 0.5)).error == pytest.approx(0)  # half of both ways is true
    torch.manual_seed(0)
    p = torch.rand(100_000)
    p = torch.where(torch.rand(100_000) < p, p, 1 - p)  # right as often as it says
    assert calibration.calibrate(p).error < 0.01


def test_the_table_of_grades_by_hand():
    """Two answers rated about 2 and one rated 7, with sure grades; one is not rated."""
    logits = torch.cat([sure(1), sure(10), sure(3), sure(10)])
    head, *lines = calibration.grade_table(logits, [2, 7.4, 2.2, None]).splitlines()
    assert [line.split()[:3] for line in lines] == [["2", "2", "2.00"], ["7", "1", "10.00"]]
    assert lines[0].split()[3:] == "0.50 0.00 0.50 0.00 0.00 0.00 0.00 0.00 0.00 0.00".split()


def calibrate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [calibration.__file__, *map(str, flags)])
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        calibration.main()
    return stdout.getvalue()


def test_calibration_of_a_saved_model(finished, pairs, tmp_path, monkeypatch):
    """Against plain transformers, one text at a time."""
    script, out, _ = finished
    flags = ["--dataset", pairs, "--chat", "--precision", "fp32", "--save", tmp_path / "c"]
    stdout = calibrate(monkeypatch, out / "final", *flags)
    model, tokenizer = plain_model(out / "final")
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    probabilities, by_rating = [], {0: {}, 1: {}, 2: {}}
    for row in rows:
        w = plain_score(model, tokenizer, row["prompt"], row["chosen"])
        other = plain_score(model, tokenizer, row["prompt"], row["rejected"])
        by_rating[row["chosen_rating"]][row["prompt"]] = score_of(script, w)
        by_rating[row["rejected_rating"]][row["prompt"]] = score_of(script, other)
        if script is reward_model:
            probabilities.append(torch.sigmoid(w - other).item())
        else:
            win, lose = double_sum(w, other), double_sum(other, w)
            probabilities.append((win / (win + lose)).item())

    error = 0.0
    for n in range(10):
        claims = [(p, 1) for p in probabilities if n <= 10 * p < n + 1]
        claims += [(1 - p, 0) for p in probabilities if n <= 10 * (1 - p) < n + 1]
        error += abs(sum(p - true for p, true in claims)) / (2 * len(rows))
    accuracy = sum(p > 0.5 for p in probabilities) / len(rows)
    answers = sum(map(len, by_rating.values()))
    assert f"60 prompts, {answers} answers, {len(rows)} pairs\n" in stdout
    shown = re.search(r"^accuracy (\S+), expected calibration error (\S+)$", stdout, re.M).groups()
    assert [float(x) for x in shown] == pytest.approx([accuracy, error], abs=1e-3) and error > 0.01
    assert (tmp_path / "c.png").stat().st_size > 10_000
    lines = [line.split()[:3] for line in stdout.splitlines()[-3:]]
    if script is reward_model_ordinal:
        for rating, line in enumerate(lines):
            scores = list(by_rating[rating].values())
            assert line[:2] == [str(rating), str(len(scores))]
            assert float(line[2]) == pytest.approx(sum(scores) / len(scores), abs=0.006)
    else:
        assert "grade" not in stdout


def test_calibration_reads_the_held_out_built_in_prompts_by_default(short, tiny, tmp_path, monkeypatch):
    stdout = calibrate(
        monkeypatch, short[reward_model] / "final", "--max-length", 400, "--precision", "fp32", "--save", tmp_path / "c"
    )
    held_out = reward_model.load_groups(reward_model.Args(max_length=400), HERE, byte_tokenizer())[1]
    n_pairs = sum(len(group.pairs) for group in held_out)
    assert f"60 prompts, {sum(len(group.answers) for group in held_out)} answers, {n_pairs} pairs" in stdout
    with pytest.raises(SystemExit, match="is no reward model"):
        calibrate(monkeypatch, tiny)


# ---- the real model


def test_smollm2_end_to_end(tmp_path):
    """The default command, one step of it; then plain transformers reads the result."""
    command = [sys.executable, "-m", "accelerate.commands.launch", reward_model.__file__, "--precision", "fp32"]
    command += "--total-steps 1 --prompts-per-step 1 --micro-batch-size 1 --eval-prompts 1".split()
    result = subprocess.run([*command, "--output-dir", str(tmp_path / "o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "to train on: 239 prompts with" in result.stdout and "held out: 1 prompts with" in result.stdout
    assert 0.4 < table(result.stdout, "before")["loss"] < 1.2
    model, tokenizer = plain_model(tmp_path / "o/final")
    (prompt,) = re.findall(r"^prompt  (.*)$", result.stdout, re.M)
    shown = re.findall(r"^(?:chosen  |rejected)  (.*)\n +before .*\n +trained (\S+)$", result.stdout, re.M)
    assert len(shown) == 2
    for answer, score in shown:
        messages = say(ast.literal_eval(prompt), "user") + say(ast.literal_eval(answer))
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text.endswith(ast.literal_eval(answer) + "<|im_end|>")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert model(ids).logits.item() == pytest.approx(float(score), abs=0.006)

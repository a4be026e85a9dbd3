"""The reward models: losses against hand-worked numbers, scores however they are batched, and a run as its user meets it."""
import contextlib
import copy
import io
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import byte_tokenizer, tiny_gpt2, tiny_llama
from conftest import run_script as run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kv_cache import left_pad

import dpo
import ppo
import reward_model
import reward_model_ordinal
import rloo

ROOT = Path(__file__).parent.parent
SCRIPTS = [reward_model, reward_model_ordinal]
LABELS = {reward_model: 1, reward_model_ordinal: 10}
both = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


# ---- losses

def test_bradley_terry_golden():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    by_hand = (math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2  # .31326, 3.04859
    assert reward_model.bradley_terry_loss(chosen, rejected).item() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx(1.68092, abs=1e-5)
    margin = torch.tensor([1.0, 0.0])  # the first difference is then 0
    shifted = reward_model.bradley_terry_loss(chosen, rejected, margin)
    assert shifted.item() == pytest.approx((math.log(2) + 3.04859) / 2, abs=1e-5)
    centred = reward_model.bradley_terry_loss(chosen, rejected, center_coef=0.1)
    assert centred.item() == pytest.approx(1.68092 + 0.1 * (1 + 1) / 2, abs=1e-5)
    ties = torch.zeros(3)
    assert reward_model.bradley_terry_loss(ties, ties).item() == pytest.approx(math.log(2))


def test_bradley_terry_raises_the_chosen_score():
    scores = torch.zeros(2, requires_grad=True)
    reward_model.bradley_terry_loss(scores[:1], scores[1:]).backward()
    assert scores.grad.tolist() == [-0.5, 0.5]  # descent: up, down


def sure(label, size=40.0):
    return size * torch.nn.functional.one_hot(torch.tensor([label - 1]), 10).float()


def test_ordinal_golden():
    loss = reward_model_ordinal.ordinal_loss
    assert loss(sure(10), sure(1)).item() == pytest.approx(0, abs=1e-5)  # the orientation: the better answer costs nothing
    assert loss(sure(1), sure(10)).item() > 30
    assert loss(sure(5), sure(5)).item() > 30  # ties earn nothing
    uniform = torch.zeros(1, 10)
    assert loss(uniform, uniform).item() == pytest.approx(-math.log(0.45), abs=1e-6)
    two = torch.full((1, 10), -1e4)
    two[0, 3], two[0, 7] = 0.0, math.log(3)  # class 4 with 1/4, class 8 with 3/4
    assert loss(two, sure(6, 1e4)).item() == pytest.approx(-math.log(0.75), abs=1e-6)
    assert loss(sure(6, 1e4), two).item() == pytest.approx(-math.log(0.25), abs=1e-6)


def test_ordinal_probabilities_are_those_of_the_joint_and_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    a, b = 3 * torch.randn(2, 50, 10, generator=generator)
    joint = a.softmax(1)[:, :, None] * b.softmax(1)[:, None]  # (i, j)
    higher = torch.arange(10)[:, None] > torch.arange(10)
    win, lose = reward_model_ordinal.log_win(a, b).exp(), reward_model_ordinal.log_win(b, a).exp()
    assert torch.allclose(win, (joint * higher).sum((1, 2)), atol=1e-6)
    tie = joint.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(win + lose + tie, torch.ones(50), atol=1e-5)
    assert reward_model_ordinal.ordinal_loss(a, b).item() == pytest.approx(-win.log().mean().item(), abs=1e-5)


@pytest.mark.parametrize("size", [50.0, 500.0])
def test_ordinal_loss_is_finite_where_the_probability_is_zero(size):
    chosen, rejected = sure(1, size).requires_grad_(), sure(10, size).requires_grad_()
    loss = reward_model_ordinal.ordinal_loss(chosen, rejected)
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert chosen.grad[0, 0] > 0 and rejected.grad[0, 9] > 0  # descent takes both from where they are


def test_ordinal_loss_raises_the_chosen_score():
    chosen, rejected = torch.zeros(1, 10, requires_grad=True), torch.zeros(1, 10, requires_grad=True)
    reward_model_ordinal.ordinal_loss(chosen, rejected).backward()
    score = reward_model_ordinal.expected_score
    assert score(chosen - chosen.grad) > score(chosen) > score(rejected - rejected.grad)


def test_expected_score():
    assert reward_model_ordinal.expected_score(torch.cat([sure(1), sure(10), torch.zeros(1, 10)])).tolist() == pytest.approx([1, 10, 5.5])


def test_rank_correlation():
    spearman = lambda a, b: reward_model.rank_correlation(torch.tensor(a), torch.tensor(b))
    assert spearman([1.0, 5.0, 9.0], [0.1, 0.2, 90.0]) == pytest.approx(1)
    assert spearman([1.0, 5.0, 9.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0]) == pytest.approx(0.894427, abs=1e-5)  # ties share a rank


def test_reliability_plot():
    image = reward_model.reliability_plot(torch.cat([torch.full((9,), 0.95), torch.tensor([0.05])]))[0]  # says .95, right in .9
    filled = (image == 0.5).sum(0) + (image == 0).sum(0)
    assert 180 <= filled[185] <= 181 and filled[100] <= 1 and 20 <= filled[5] <= 21


# ---- scores

def classifier(make, labels):
    model = make(vocab=259)
    kind = transformers.LlamaForSequenceClassification if model.config.model_type == "llama" else transformers.GPT2ForSequenceClassification
    model.config.num_labels, model.config.pad_token_id = labels, 258
    torch.manual_seed(1)
    scorer = kind(model.config).eval()
    scorer.base_model.load_state_dict(model.base_model.state_dict())
    return scorer


def rows_of(groups, tokenizer):
    """[(prompt, [answers])] -> rows as group_pairs makes them; the first answer of each is the best."""
    pairs = [{"prompt": p, "chosen": answers[0], "rejected": other} for p, answers in groups for other in answers[1:]]
    args = reward_model.Args(dataset="given", max_length=400)
    rows, dropped = reward_model.group_pairs(args, tokenizer, pairs)
    assert not dropped
    return rows


GROUPS = [("What is it? ", ["A dog.", "A cat, I think, or so it seems.", "Ants"]), ("", ["Yes", "No"]),
          ("A much longer question than the others have, to be padded? ", ["Same start, one end", "Same start, other end"]),
          ("x", ["a", "ab"])]  # an answer that begins with another


def plain_scores(model, tokenizer, rows, side):
    """What anybody gets from transformers: all texts in one padded batch, pooled by the model itself."""
    batch = tokenizer.pad({"input_ids": [ids for row in rows for ids in row["ids"]]}, padding_side=side, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # absolute positions count from the first token
    return model(**batch, position_ids=positions).logits


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("labels", [1, 10])
def test_prefix_shared_scores_are_the_plain_ones_and_so_is_the_gradient(make, labels):
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    plain, rows = classifier(make, labels), rows_of(GROUPS, tokenizer)
    model = copy.deepcopy(plain)
    shared = reward_model.AnswerLogits(model)
    logits = shared(*reward_model.collate(rows, "cpu"))
    for side in ("left", "right"):
        assert torch.allclose(logits, plain_scores(plain, tokenizer, rows, side), atol=1e-5)
    alone = torch.cat([shared(*reward_model.collate([row], "cpu")) for row in rows])
    assert torch.allclose(logits, alone, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # the answers are told apart

    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad((plain_scores(plain, tokenizer, rows, "right") * weight).sum(), list(plain.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5 * (1 + b.abs().max())))


@pytest.mark.parametrize("extra", [dict(), dict(model_type="mistral", sliding_window=5), dict(
    model_type="gemma2", sliding_window=5, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)], ids=lambda x: x.get("model_type", "qwen2"))
def test_packed_texts_keep_the_attention_of_their_model(extra):
    """Sliding windows and soft-capped logits; and none of it with an attention that cannot be replaced."""
    options = dict(model_type="qwen2", vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
                   num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=258, eos_token_id=1) | extra
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**options)
    plain = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    rows = rows_of(GROUPS, tokenizer)
    ours = reward_model.AnswerLogits(copy.deepcopy(plain))(*reward_model.collate(rows, "cpu"))
    assert torch.allclose(ours, plain_scores(plain, tokenizer, rows, "right"), atol=1e-5)


def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    for config in (transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2), transformers.Lfm2Config(hidden_size=32, num_hidden_layers=2, layer_types=["conv", "full_attention"], num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)):
        with pytest.raises(SystemExit, match="attention that can be replaced"):
            reward_model.AnswerLogits(transformers.AutoModel.from_config(config))


def test_sdpa_takes_the_packed_masks(monkeypatch):
    """What a GPU runs: a query of one token with grouped heads is a case of its own in transformers' sdpa."""
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    model, rows = classifier(tiny_llama, 1), rows_of([*GROUPS, ("y", ["ab", "a"])], tokenizer)
    shared, batch = reward_model.AnswerLogits(model), reward_model.collate(rows, "cpu")
    eager = shared(*batch)
    assert min(n for group in batch[3] for n in group[2:]) == 1  # an answer of one token, behind another
    sdpa = transformers.AttentionInterface()["sdpa"]
    monkeypatch.setattr(sys.modules[type(model.model.layers[0].self_attn).__module__], "eager_attention_forward", sdpa)
    assert torch.allclose(shared(*batch), eager, atol=1e-5)


def test_a_row_in_one_call_is_the_same_text_by_text():
    """The mask of `pack`, by which a GPU takes all attention of a row at once; there the ids lie on it, here they only say so."""
    class OnGPU(torch.Tensor):
        is_cuda = property(lambda self: True)
    model = classifier(tiny_llama, 1)
    batch = reward_model.collate(rows_of([*GROUPS, ("y", ["ab", "a"])], byte_tokenizer(pad_token="<|pad|>")), "cpu")
    text_by_text = reward_model.AnswerLogits(copy.deepcopy(model))(*batch)
    with pytest.MonkeyPatch.context() as patch:
        tensor = torch.tensor
        patch.setattr(torch, "tensor", lambda *data, **options: tensor(*data, **options).as_subclass(OnGPU))
        ids, positions, mask, lengths = reward_model.collate(rows_of([*GROUPS, ("y", ["ab", "a"])], byte_tokenizer(pad_token="<|pad|>")), "cpu")
    ids, positions, mask = (x.as_subclass(torch.Tensor) for x in (ids, positions, mask))
    assert torch.equal(ids, batch[0]) and lengths == batch[3] and mask.shape == (1, 1, ids.shape[1], ids.shape[1]) and batch[2].numel() == 0
    model.set_attn_implementation("sdpa")
    hidden = model.base_model(ids, position_ids=positions, attention_mask=mask).last_hidden_state[0]
    ends = torch.tensor(sum(lengths, [])).cumsum(0)[[i > 0 for group in lengths for i in range(len(group))]] - 1
    assert torch.allclose(model.score(hidden[ends]), text_by_text, atol=1e-4)


@both
def test_an_evaluation_takes_a_process_no_more_prompts_than_training_does(script):
    tokenizer, model = byte_tokenizer(pad_token="<|pad|>"), script.AnswerLogits(classifier(tiny_llama, LABELS[script]))
    data = [{"prompt": f"{i}", "chosen": "b", "rejected": "c"} for i in range(7)]
    args, sizes = script.Args(dataset="given", micro_batch_size=4), []
    model.register_forward_pre_hook(lambda _, batch: sizes.append(len(batch[3])))
    accelerator = types.SimpleNamespace(autocast=contextlib.nullcontext, device="cpu", num_processes=2)
    loss = script.bradley_terry if script is reward_model else script.ordinal
    _, logits, _ = script.evaluate_pairs(args, accelerator, model, script.group_pairs(args, tokenizer, data)[0], loss)
    assert sizes == [2, 2, 2, 1] and len(logits) == 7


@both
def test_swapped_labels_mirror_the_evaluation(script):
    """A data set with chosen and rejected exchanged, read and evaluated with the same model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    tokenizer, accelerator = byte_tokenizer(pad_token="<|pad|>"), accelerate.Accelerator(cpu=True)
    data = [{"prompt": p, "chosen": answers[0], "rejected": other} for p, answers in GROUPS for other in answers[1:]]
    swapped = [dict(pair, chosen=pair["rejected"], rejected=pair["chosen"]) for pair in data]
    args, model = script.Args(dataset="given"), script.AnswerLogits(classifier(tiny_llama, LABELS[script]))
    loss = script.bradley_terry if script is reward_model else script.ordinal
    (there, _, wins), (back, _, losses) = (script.evaluate_pairs(args, accelerator, model, script.group_pairs(args, tokenizer, x)[0], loss)
                                           for x in (data, swapped))
    assert 0 < there["accuracies"] < 1 and there["accuracies"] == pytest.approx(1 - back["accuracies"])
    assert there["margins"] == pytest.approx(-back["margins"], abs=1e-5) and there["chosen"] == pytest.approx(back["rejected"], abs=1e-5)
    assert torch.allclose(wins, 1 - losses, atol=1e-5) and (wins - 0.5).abs().min() > 1e-5


# ---- data

def test_every_format_reads_the_same():
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    user, good, bad = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello"}], [{"role": "assistant", "content": "Hex"}]
    read = lambda row, chat=False: reward_model.group_pairs(reward_model.Args(dataset="given", chat=chat), tokenizer, [row])[0][0]
    ids = read({"prompt": user, "chosen": good, "rejected": bad})["ids"]
    assert read({"chosen": user + good, "rejected": user + bad})["ids"] == ids  # implicit prompt
    assert read({"prompt": "Hi", "chosen": "Hello", "rejected": "Hex"}, chat=True)["ids"] == ids
    assert tokenizer.decode(ids[0]) == "<s>user:Hi</s><s>assistant:Hello</s>"
    turn = "\n\nHuman: Hi\n\nAssistant:"
    plain = read({"prompt": turn, "chosen": " Hello", "rejected": " Hex"})
    assert read({"prompt": "Hi", "chosen": user + good, "rejected": user + bad})["ids"] == ids  # the prompt twice
    unmarked = read({"chosen": "Yes, because", "rejected": "Yes"})
    assert unmarked["prompt"] == "" and unmarked["answers"] == ["Yes, because", "Yes"]
    implicit = read({"chosen": turn + " Hello", "rejected": turn + " Hex"})  # HH-RLHF: not "... Assistant: He"
    assert implicit == plain and plain["prompt"] == turn and tokenizer.decode(plain["ids"][1]) == turn + " Hex</s>"


def test_pairs_of_a_prompt_become_one_row_and_bad_ones_are_counted():
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    pair = lambda prompt, a, b, x=None, y=None: {"prompt": prompt, "chosen": a, "rejected": b, "chosen_rating": x, "rejected_rating": y}
    say = lambda text: [{"role": "assistant", "content": text}]
    data = [pair("p", "a", "b", 3, 1), pair("q", "a", "b"), pair("p", "c", "b", 2, 1), pair("p", "a", "c", 3, 2), pair("", "a", "b"),
            pair("", "a", "c"), pair("p", "x" * 500, "b"), pair("p", "a", ""), pair("p", "same", "same")]
    data += [pair("p", say("a"), say(text)) for text in ("", None)] + [pair("p", say("a"), [])]
    rows, dropped = reward_model.group_pairs(reward_model.Args(dataset="given", max_length=100), tokenizer, data)
    assert dropped == 6 and [row["prompt"] for row in rows] == ["p", "q", "", ""]  # an empty prompt joins nothing
    assert rows[0]["answers"] == ["a", "b", "c"] and rows[0]["ratings"] == [3, 1, 2]
    assert rows[0]["pairs"] == [(0, 1, 2), (2, 1, 1), (0, 2, 1)] and rows[1]["pairs"] == [(0, 1, 0.0)]
    assert [x.tolist() for x in reward_model.pair_indices(rows[:2], "cpu")] == [[0, 2, 0, 3], [1, 1, 2, 4], [2, 1, 1, 0]]


@pytest.mark.parametrize("rating", [None, math.nan, math.inf, "5"])
def test_a_rating_that_is_no_number_counts_as_none(rating):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 3, "rejected_rating": rating}
    (row,), _ = reward_model.group_pairs(reward_model.Args(dataset="given"), byte_tokenizer(pad_token="<|pad|>"), [pair])
    assert row["ratings"] == [3, None] and row["pairs"] == [(0, 1, 0.0)]


def test_a_row_that_cannot_be_read_is_named():
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('no system role') if messages[0].role == 'system' else 'x' }}")
    good = dict(prompt="a", chosen="b", rejected="c")
    for bad in (dict(good, chosen=12, rejected=13), dict(good, prompt=[{"role": "system", "content": "a"}])):
        with pytest.raises(SystemExit, match="--dataset or --eval-dataset: row 1 is not of strings or messages"):
            reward_model.group_pairs(reward_model.Args(dataset="given"), tokenizer, [good, bad])


def test_the_template_writes_the_only_bos_and_a_string_gets_the_tokenizers():
    encode = lambda chat: reward_model.encode_answer(byte_tokenizer(begin=True), "hi", "yes", chat)
    assert byte_tokenizer().decode(encode(True)) == "<s>user:hi</s><s>assistant:yes</s>"
    assert byte_tokenizer().decode(encode(False)) == "<s>hiyes</s>"


def test_the_table_of_grades():
    """Two answers rated 2 and one rated 7, with sure grades; an unrated one is in the first line alone."""
    rows = [dict(ratings=[2, 7]), dict(ratings=[2.2, None])]
    logits = [torch.cat([sure(1), sure(10)]), torch.cat([sure(3), sure(10)])]
    _, *lines = reward_model_ordinal.grade_table({"before": (None, None), "trained": (None, logits)}, rows).splitlines()
    assert [line.split()[:3] for line in lines] == [["all", "4", "6.00"], ["2", "2", "2.00"], ["7", "1", "10.00"]]
    assert lines[1].split()[3:] == "0.50 0.00 0.50 0.00 0.00 0.00 0.00 0.00 0.00 0.00".split()


# ---- runs

def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """People here prefer vowels: three answers a prompt, rated 2, 1, 0."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(0)
    word = lambda letters: "".join(letters[i] for i in torch.randint(len(letters), (8,), generator=generator))
    rows = []
    for n in range(60):
        answers = [word("aeiou"), word("aeioukstm"), word("kstm")]
        rows += [{"prompt": f"Word {n}?", "chosen": answers[a], "rejected": answers[b], "chosen_rating": 2 - a, "rejected_rating": 2 - b}
                 for a, b in ((0, 1), (1, 2), (0, 2))]
    return write(folder / "pairs.jsonl", rows)


FLAGS = ["--precision", "fp32", "--eval-prompts", 12, "--prompts-per-step", 4, "--micro-batch-size", 2, "--learning-rate", 3e-3, "--chat"]


def cli(script, *flags, launcher=(sys.executable,), env=None):
    return subprocess.run([*map(str, launcher), script.__file__, *map(str, flags)], capture_output=True, text=True,
                          env={**os.environ, **(env or {})})


def printed(script, *flags):
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        run(script, *flags)
    return stdout.getvalue()


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def finished(request, tiny, pairs, tmp_path_factory):
    """(script, flags, output directory, what it printed) of a run over two epochs and a half."""
    flags = [*FLAGS, "--model", tiny, "--dataset", pairs, "--total-steps", 30, "--eval-every", 10, "--save-every", 10]
    out = tmp_path_factory.mktemp("rm") / "out"
    return request.param, flags, out, printed(request.param, *flags, "--output-dir", out)


def table(stdout, title):
    lines = stdout.splitlines()
    names = next(line.split() for line in lines if line.split()[:2] == ["loss", "accuracies"])
    return dict(zip(names, map(float, next(line.split()[1:] for line in lines if line.startswith(title)))))


def test_it_learns_and_shows_it(finished):
    script, _, out, stdout = finished
    assert "144 pairs of 48 prompts, held out: 36 pairs of 12 prompts; 0 dropped" in stdout
    before, trained = table(stdout, "before"), table(stdout, "trained")
    # a new head is random but small: no answer is far ahead yet
    assert before["loss"] == pytest.approx(math.log(2) if script is reward_model else -math.log(0.45), abs=0.3)
    assert 0 < abs(before["margins"]) < 0.5 and before["accuracies"] < 0.85
    assert trained["accuracies"] >= 0.85 and trained["loss"] < before["loss"] - 0.1
    assert trained["rank_corr"] > 0.7 and trained["margins"] > 0.5 and stdout.count("\nprompt ") == 3
    events = EventAccumulator(str(out)).Reload()
    tags = {"loss/reward", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "eval/loss", "eval/accuracies",
            "policy/grad_norm", "charts/learning_rate", "charts/pairs_per_second"}
    assert tags <= set(events.Tags()["scalars"]) and events.Tags()["images"] == ["eval/reliability"]
    assert ("mean probability of grade" in stdout) == ("eval/grades" in events.Tags()["histograms"]) == (script is reward_model_ordinal)
    assert (stdout.count("  p: ") == 12) == (script is reward_model_ordinal)  # six answers shown, before and trained
    assert "eval/scores" in events.Tags()["histograms"] and "eval/samples/text_summary" in events.Tags()["tensors"]
    assert [e.step for e in events.Scalars("eval/accuracies")] == [0, 10, 20, 30]


def test_plain_transformers_ppo_and_rloo_give_the_same_scores(finished, tmp_path):
    script, _, out, _ = finished
    folder = str(out / "final")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == LABELS[script] and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    chats = [[{"role": "user", "content": "Word?"}, {"role": "assistant", "content": answer}] for answer in ("aei", "kstmkstm", "a")]
    rows = [{"ids": [script.encode_answer(tokenizer, "Word?", chat[1]["content"], True) for chat in chats], "pairs": []}]
    ours = script.AnswerLogits(copy.deepcopy(model))(*script.collate(rows, "cpu"))
    for side in ("left", "right"):
        tokenizer.padding_side = side
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        assert all(text.endswith("</s>") and not text.endswith("</s></s>") for text in texts)
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        assert torch.allclose(model(**batch).logits, ours, atol=1e-4)
    of_ppo = ppo.make_scorer("--reward", folder, "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    of_rloo = rloo.load_scorer("--reward", folder, accelerator)
    prompts = ({"prompt": "Word?", "messages": chats[0][:1], "text": "", "columns": {}}, rloo.Prompt([], chats[0][:1], {"prompts": "Word?"}))
    expected = ours[:, 0] if LABELS[script] == 1 else reward_model_ordinal.expected_score(ours)
    for score, prompt in zip((of_ppo, of_rloo), prompts):
        assert score([prompt] * 3, ["aei", "kstmkstm", "a"]) == pytest.approx(expected.tolist(), abs=1e-4)
    plain = ({"prompt": "Word? ", "messages": None, "text": "Word? ", "columns": {}}, rloo.Prompt([], None, {"prompts": "Word? "}))
    rows = [{"ids": [script.encode_answer(tokenizer, "Word? ", answer, False) for answer in ("aei", "k")], "pairs": []}]
    ours = script.AnswerLogits(copy.deepcopy(model))(*script.collate(rows, "cpu"))
    expected = ours[:, 0] if LABELS[script] == 1 else reward_model_ordinal.expected_score(ours)
    for score, prompt in zip((of_ppo, of_rloo), plain):
        assert score([prompt] * 2, ["aei", "k"]) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("template, end", [("{{ messages[-1].content }}<|end|>\n", "<|end|></s>"), ("{{ messages[-1].content }}</s>\n\n", "hi</s>")])
def test_the_saved_template_ends_an_answer_with_one_eos(tmp_path, pairs, template, end):
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path / "m")
    run(reward_model, *FLAGS, "--model", tmp_path / "m", "--dataset", pairs, "--total-steps", 1, "--output-dir", tmp_path / "o")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "o/final")
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": "hi"}], tokenize=False)
    assert text.endswith(end)
    assert tokenizer.decode(reward_model.encode_answer(tokenizer, [], "hi", True)) == text


def test_resume_is_bit_exact(finished, tmp_path):
    script, _, out, stdout = finished
    whole = load_file(out / "final/model.safetensors")
    resumed = printed(script, "--resume", out / "checkpoint-20")  # writes final/ again
    again = load_file(out / "final/model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert table(resumed, "trained") == table(stdout, "trained")
    assert "\nstep 20 " in resumed and "\nbefore " not in resumed
    assert torch.load(out / "final/trainer_state.pt", weights_only=True)["step"] == 30


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16", False), reason="oneDNN multiplies matrices in bf16 only here")
@pytest.mark.parametrize("script", [*SCRIPTS, dpo], ids=lambda script: script.__name__)
def test_few_kernels_are_kept(script, tiny, tmp_path):
    """Texts of 20 lengths need more than 256 kernels and fewer than oneDNN's own 1024, so a second epoch has to make some again."""
    data = write(tmp_path / "d.jsonl", [{"prompt": "x" * (20 + 5 * n), "chosen": "a" * (20 + 3 * n), "rejected": "b" * (21 + 3 * n)} for n in range(20)])
    result = cli(script, "--precision", "bf16", "--eval-prompts", 0, "--prompts-per-step", 1, "--micro-batch-size", 1, "--model", tiny,
                 "--dataset", data, "--total-steps", 40, "--output-dir", tmp_path / "o",
                 env={"ONEDNN_VERBOSE": "profile_create", "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]
    made = [line.rpartition(",")[0] for line in result.stdout.splitlines() if "create:cache_miss" in line]  # without the time
    assert 256 < len(set(made)) < 1024 and len(made) > len(set(made))


@both
def test_micro_batches_and_processes_change_nothing(script, tiny, pairs, tmp_path):
    """Groups of different sizes, so that a mean over micro-batches is not that over pairs."""
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    uneven = write(tmp_path / "uneven.jsonl", [row for i, row in enumerate(rows) if i % 7 != 1 and i % 5 != 2])
    flags = ["--precision", "fp32", "--eval-prompts", 12, "--prompts-per-step", 4, "--chat", "--learning-rate", 1e-3, "--model", tiny,
             "--dataset", uneven, "--total-steps", 1]
    run(script, *flags, "--micro-batch-size", 4, "--output-dir", tmp_path / "a")
    run(script, *flags, "--micro-batch-size", 2, "--output-dir", tmp_path / "b")
    if script is reward_model_ordinal:  # the loop is the same in both
        two = cli(script, *flags, "--micro-batch-size", 2, "--output-dir", tmp_path / "c", env={"ACCELERATE_USE_CPU": "true"},
                  launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2))
        assert two.returncode == 0, two.stderr[-3000:]
    state = lambda name: torch.load(tmp_path / name / "final/trainer_state.pt", weights_only=True)["optimizer"]["state"]
    a = state("a")
    curve = lambda name, tag: [e.value for e in EventAccumulator(str(tmp_path / name)).Reload().Scalars(tag)]
    for name in "bc" if script is reward_model_ordinal else "b":
        other = state(name)
        for n in a:  # a tenth of the gradient, all of it
            assert torch.allclose(a[n]["exp_avg"], other[n]["exp_avg"], atol=1e-5 * a[n]["exp_avg"].abs().max().item() + 1e-9)
        for tag in ("loss/reward", "rewards/accuracies", "policy/grad_norm"):
            assert curve(name, tag)[0] == pytest.approx(curve("a", tag)[0], rel=1e-4)


def test_built_in_pairs(monkeypatch, tmp_path, script=reward_model):
    """Of sampled answers every two that the gold scorer tells apart, all of a prompt in one row."""
    script.load(transformers.AutoModelForCausalLM, "smollm2").save_pretrained(tmp_path)  # faster to load again than GGUF
    tokenizer = script.load(transformers.AutoTokenizer, "smollm2")
    tokenizer.eos_token = "<|im_end|>"  # as main has it
    tokenizer.save_pretrained(tmp_path)
    from accelerate import Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(script, "SUBJECTS", ["coffee"])
    monkeypatch.setattr(script, "REQUESTS", script.REQUESTS[:4])
    args = script.Args(model=str(tmp_path), k=4, max_new_tokens=10)
    data = script.sample_pairs(args, Accelerator(mixed_precision="no"))
    assert data == script.sample_pairs(args, Accelerator(mixed_precision="no"))
    assert all(row["chosen_rating"] >= row["rejected_rating"] + 0.1 for row in data)
    tokenizer = script.load(transformers.AutoTokenizer, tmp_path)
    rows, dropped = script.group_pairs(args, tokenizer, data)
    assert 2 <= len(rows) <= 4 and not dropped and max(len(row["pairs"]) for row in rows) > 1
    assert tokenizer.decode(rows[0]["ids"][0]).rstrip().endswith("<|im_end|>")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])  # GPT-2: absolute positions, under left padding
def test_the_answers_of_the_built_in_pairs_are_those_of_ppos_sampler(make, monkeypatch, tmp_path, script=reward_model):
    """Two batches of prompts: the same random numbers give the same answers to the same prompts, and every two of them a pair."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    AcceleratorState._reset_state(reset_partial_state=True)
    gold = lambda text: sum(ord(c) % 97 for c in text) % 31 / 31
    monkeypatch.setattr(SentimentIntensityAnalyzer, "polarity_scores", lambda _, text: dict(compound=gold(text)))
    monkeypatch.setattr(script, "SUBJECTS", ["coffee", "rain"])
    monkeypatch.setattr(script, "REQUESTS", [f"{'Please ' * (n % 3)}{n} {{}}" for n in range(10)])
    model, tokenizer = make(), byte_tokenizer()
    model.generation_config.eos_token_id = [1, *range(60, 90)]  # some end early
    model.config.use_cache = False  # as gradient checkpointing leaves it
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    args = script.Args(model=str(tmp_path), k=3, max_new_tokens=8, temperature=1.3)
    data = script.sample_pairs(args, accelerate.Accelerator(mixed_precision="no"))
    prompts, expected = [request.format(subject) for subject in script.SUBJECTS for request in script.REQUESTS], []
    for i in (0, 16):
        batch = prompts[i:i + 16]
        torch.manual_seed(script.random_stream(args.seed, 1, i).initial_seed())
        uniforms = torch.cat([torch.rand(len(batch) * 3, 1) for _ in range(8)], 1)
        ids = [tokenizer(f"<s>user:{prompt}</s><s>assistant:", add_special_tokens=False)["input_ids"] for prompt in batch]
        answers = ppo.generate(model, *left_pad(ids), 3, uniforms, 1.3, model.generation_config.eos_token_id)
        mask = ppo.completion_mask(answers, model.generation_config.eos_token_id)
        texts = tokenizer.batch_decode([row[:n].tolist() for row, n in zip(answers, mask.sum(1))], skip_special_tokens=True)
        assert len(set(mask.sum(1).tolist())) > 2
        for j, prompt in enumerate(batch):
            three = set(texts[3 * j:3 * j + 3])
            expected += [(prompt, a, b) for a in three for b in three if gold(a) >= gold(b) + 0.1]
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in data) == sorted(expected) and len(expected) > 30


@both
def test_longer_wins_counts_chosen_answers_that_are_longer(script, tiny, tmp_path):
    rows = [dict(prompt=f"p{n}", chosen="a" * a, rejected="b" * b) for n, (a, b) in enumerate([(5, 2), (6, 3), (4, 4), (1, 7), (9, 2), (8, 3)])]
    run(script, *FLAGS, "--model", tiny, "--dataset", write(tmp_path / "pairs.jsonl", rows * 2), "--eval-dataset", write(tmp_path / "test.jsonl", rows),
        "--prompts-per-step", 2, "--total-steps", 1, "--output-dir", tmp_path / "o")
    assert EventAccumulator(str(tmp_path / "o")).Reload().Scalars("eval/longer_wins")[0].value == pytest.approx(4 / 6)


@both
@pytest.mark.parametrize("rows, flags, said", [
    ([{"prompt": "a", "chosen": "b"}], [], "needs columns chosen and rejected"),
    ([{"prompt": "a", "chosen": "b", "rejected": None}, {"prompt": "a", "chosen": "b", "rejected": "c"}], [], "1 different prompts have pairs"),
    ([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(5)], [], "5 different prompts have pairs within --max-length"),
    ([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(50)], ["--max-length", 2], "0 different prompts have pairs within --max-length 2"),
    ([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(50)], ["--eval-dataset", "none.jsonl"], "--eval-dataset none.jsonl"),
    ([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(50)], ["--eval-only", "--eval-prompts", 0], "--eval-prompts 0"),
    ([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(50)], ["--resume", "nowhere"], "--resume nowhere"),
    ([{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(50)], ["--micro-batch-size", 3], "--micro-batch-size 3: must divide"),
])
def test_bad_input(script, tiny, tmp_path, capsys, rows, flags, said):
    with pytest.raises(SystemExit) as stop:
        run(script, *FLAGS, "--model", tiny, "--dataset", write(tmp_path / "d.jsonl", rows), "--output-dir", tmp_path / "o", *flags)
    assert said in str(stop.value) and "\n" not in str(stop.value)


def test_margin_without_ratings(tiny, tmp_path):
    rows = [{"prompt": str(i), "chosen": "b", "rejected": "c"} for i in range(50)]
    with pytest.raises(SystemExit, match="--margin: the dataset has no numbers in columns"):
        run(reward_model, *FLAGS, "--margin", "--model", tiny, "--dataset", write(tmp_path / "d.jsonl", rows), "--output-dir", tmp_path / "o")


def test_margin_with_ratings_of_some_pairs_alone(tiny, tmp_path):
    """They count; a prompt's answers need not all be rated. Those of --eval-dataset are not trained on, and do not."""
    rated = {"chosen": "b", "rejected": "c", "chosen_rating": 3, "rejected_rating": 1}
    rows = [{"prompt": str(i), **more} for i in range(50) for more in (rated, {"chosen": "b", "rejected": "d"})]
    flags = [*FLAGS, "--margin", "--model", tiny, "--total-steps", 1, "--output-dir", tmp_path / "o"]
    data, unrated = write(tmp_path / "d.jsonl", rows), write(tmp_path / "u.jsonl", rows[1::2])
    with pytest.raises(SystemExit, match="--margin: the dataset has no numbers in columns"):
        run(reward_model, *flags, "--dataset", unrated, "--eval-dataset", data)
    run(reward_model, *flags, "--dataset", data)


def test_margin_asks_for_more(tiny, pairs, tmp_path, capsys):
    flags = [*FLAGS, "--model", tiny, "--dataset", pairs, "--total-steps", 1]
    run(reward_model, *flags, "--output-dir", tmp_path / "a")
    run(reward_model, *flags, "--margin", "--output-dir", tmp_path / "b")
    loss = [EventAccumulator(str(tmp_path / name)).Reload().Scalars("loss/reward")[0].value for name in "ab"]
    assert loss[1] > loss[0] + 0.3


def test_eval_only_reads_a_saved_model_and_its_own_data_set(finished, pairs, tmp_path, capsys):
    """The twelve prompts held out of --dataset, or given as --eval-dataset: then nothing else is read, nor sampled."""
    script, _, out, stdout = finished
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("".join(Path(pairs).read_text().splitlines(keepends=True)[-36:]))
    for flags in (["--dataset", pairs], ["--eval-dataset", held_out], ["--eval-dataset", held_out, "--eval-split", "train"]):
        run(script, *FLAGS, "--model", out / "final", "--eval-only", *flags)
        assert table(capsys.readouterr().out, "before") == pytest.approx(table(stdout, "trained"), abs=2e-3)


def test_an_evaluation_data_set_keeps_all_of_the_other_for_training(tiny, pairs, tmp_path, capsys):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("".join(Path(pairs).read_text().splitlines(keepends=True)[-36:]))
    run(reward_model, *FLAGS, "--model", tiny, "--dataset", pairs, "--eval-dataset", held_out, "--total-steps", 1, "--output-dir", tmp_path / "o")
    assert "180 pairs of 60 prompts, held out: 36 pairs of 12 prompts" in capsys.readouterr().out


@both
def test_a_new_head_is_the_seeds_and_of_its_size(script, tiny, pairs, tmp_path):
    """std 1 / sqrt(d + 1) as in REFERENCE, for ten logits a quarter of it."""
    heads = []
    for n, seed in enumerate((1, 1, 2)):
        run(script, *FLAGS, "--model", tiny, "--dataset", pairs, "--total-steps", 1, "--learning-rate", 0, "--seed", seed, "--output-dir", tmp_path / str(n))
        heads.append(load_file(tmp_path / str(n) / "final/model.safetensors")["score.weight"])
    labels, width = heads[0].shape
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.cat(heads[1:]).std() == pytest.approx((width + 1) ** -0.5 * (1 if labels == 1 else 0.25), rel=0.25)


def test_a_head_of_another_size_is_refused(finished, pairs):
    script, _, out, _ = finished
    other = SCRIPTS[script is reward_model]
    with pytest.raises(SystemExit, match="--model .*has no head, or one of another number of labels than"):
        run(other, *FLAGS, "--model", out / "final", "--dataset", pairs, "--eval-only")


@both
def test_a_model_without_a_head_cannot_be_evaluated(script, tiny, pairs):
    """A random head would be right half the time, and look like a poor reward model."""
    with pytest.raises(SystemExit, match="--model .*has no head"):
        run(script, *FLAGS, "--model", tiny, "--dataset", pairs, "--eval-only")


@both
def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(script, tiny, pairs, tmp_path, monkeypatch):
    steps, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *a, **k: steps.append(1) or (real(*a, **k) if len(steps) < 3 else torch.tensor(float("nan"))))
    with pytest.raises(SystemExit, match="step 2: gradient norm nan.*checkpoint-2"):
        run(script, *FLAGS, "--model", tiny, "--dataset", pairs, "--total-steps", 5, "--output-dir", tmp_path / "o")
    assert (tmp_path / "o/checkpoint-2/model.safetensors").exists()

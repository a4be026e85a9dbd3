"""The benchmark commands at toy size: tables, CSV, pictures. (Of speed.py only what needs no TRL: PPO beside RLOO.)"""

import argparse
import csv
import gzip
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.tensorboard
import tyro
from conftest import run_script

import reinforce
import reward_model
import rloo

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import bag_of_words  # noqa: E402
import baselines  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import frontier  # noqa: E402
import pipeline  # noqa: E402
import seeds  # noqa: E402
import speed  # noqa: E402


LOGGED_BEFORE = ["eos_rate", "distinct_2", "repetition"]


def as_before(folder, older):
    """The run as the scripts logged theirs before rloo.py was rewritten: flags as a table, and three more numbers of the held-out texts."""
    events, curves = seeds.read_events(folder)
    text = lambda name: events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
    flags = json.loads((folder / "final/args.json").read_text())
    shutil.copytree(folder, older, ignore=shutil.ignore_patterns("events.*"))
    with torch.utils.tensorboard.SummaryWriter(older) as writer:
        writer.add_text(
            "args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{name}|{value}|" for name, value in flags.items())
        )
        for tag, points in curves.items():
            for step, value in points:
                writer.add_scalar(tag, value, step)
        for n, name in enumerate(LOGGED_BEFORE):
            for step, value in curves["eval/score"]:
                writer.add_scalar(f"eval/{name}", value / 2 + n / 9, step)
        writer.add_text("eval/samples", text("eval/samples"), curves["eval/score"][-1][0])


@pytest.fixture(scope="module")
def runs(tiny, tiny_flags, tmp_path_factory):
    """Toy runs in folders named as the commands name them: two seeds of rloo.py; one of reinforce.py, an older run, which logged more; a reward model, RLOO on it."""
    out = tmp_path_factory.mktemp("runs")
    run_script(reinforce, *tiny_flags, "--eval-reward", tiny_flags[1], "--output-dir", out / "new/reinforce1")
    as_before(out / "new/reinforce1", out / "reinforce1")
    for seed in (1, 2):
        run_script(
            rloo, *tiny_flags, "--eval-reward", tiny_flags[1], "--seed", seed, "--output-dir", out / f"rloo{seed}"
        )
    pairs = out / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(dict(prompt=f"q{i}", chosen="abc", rejected="123")) + "\n" for i in range(12)))
    run_script(
        reward_model,
        "--model",
        tiny,
        "--dataset",
        pairs,
        "--eval-prompts",
        4,
        "--precision",
        "fp32",
        "--output-dir",
        out / "reward_model1",
    )
    shutil.copytree(out / "reward_model1", out / "reward_model_ordinal1")
    for kind in ("reward_model", "reward_model_ordinal"):
        shutil.copytree(out / "rloo1", out / f"rloo_on_{kind}1")
    return out


def main(module, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    module.main()
    return capsys.readouterr().out


def test_seeds_reads_what_is_there_and_prints_mean_and_deviation(runs, monkeypatch, capsys, tmp_path):
    text = main(seeds, monkeypatch, capsys, "rloo.py", "--seeds", 1, 2, "--out", runs, "--picture", tmp_path / "p.png")
    (line,) = [line.split() for line in text.splitlines() if line.startswith("score")]
    after = [float(x) for x in line[-2:]]
    assert float(line[4]) == pytest.approx(sum(after) / 2, abs=1e-3)
    assert line[5] == "±" and (tmp_path / "p.png").stat().st_size > 10_000


def test_seeds_runs_what_is_missing_under_its_name(runs, tiny_flags, monkeypatch, capsys):
    text = main(
        seeds,
        monkeypatch,
        capsys,
        "rloo.py",
        "--seeds",
        1,
        "--out",
        runs,
        "--name",
        "two_steps_",
        "--",
        *tiny_flags,
        "--total-steps",
        2,
    )
    assert "seed 1: " in text and (runs / "two_steps_1/final").exists()
    assert "seed 1: " not in main(
        seeds, monkeypatch, capsys, "rloo.py", "--seeds", 1, "--out", runs, "--name", "two_steps_"
    )


def test_a_run_cut_in_its_last_evaluation_is_not_read(monkeypatch, capsys, tmp_path):
    (tmp_path / "rloo1/final").mkdir(parents=True)  # final/ is written before it
    with torch.utils.tensorboard.SummaryWriter(tmp_path / "rloo1") as writer:
        for tag, step in (("eval/score", 0), ("eval/score", 2), ("charts/learning_rate", 3)):
            writer.add_scalar(tag, 0.5, step)
        writer.add_text("args", "|seed|1|")
    for module, flags in ((seeds, ("rloo.py", "--seeds", 1, "--out", tmp_path)), (compare, (tmp_path / "rloo1",))):
        with pytest.raises(SystemExit, match="rloo1: was cut in its last evaluation; remove it"):
            main(module, monkeypatch, capsys, *flags)


def test_compare_has_a_row_a_name_and_a_line_a_run(runs, monkeypatch, capsys, tmp_path):
    (runs / "rloo9").mkdir()
    text = main(compare, monkeypatch, capsys, *sorted(runs.glob("rloo[0-9]")), "--save", tmp_path / "c")
    assert "rloo9: not finished, left out" in text and (tmp_path / "c.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [row["seed"] for row in rows] == ["1", "2"] and all(
        row["responses"] == str(4 * 4 * 4) for row in rows
    )  # steps, prompts, k
    (last,) = [value for step, value in seeds.read_events(runs / "rloo2")[1]["eval/score"] if step == 4]
    assert float(rows[1]["score_after"]) == pytest.approx(last, abs=1e-4) and "score" in text and "gold" in text
    for row in rows:
        assert float(row["objective_after"]) == pytest.approx(
            float(row["score_after"]) - 0.05 * float(row["kl_after"]), abs=2e-4
        )
        assert float(row["objective_before"]) == float(row["score_before"])  # the KL is 0
    assert text.count("trained ") == 1  # an answer of the first seed


@pytest.mark.parametrize(
    "names, columns, curves",
    [(["rloo1", "rloo2"], [], 2), (["reinforce1"], LOGGED_BEFORE, 4), (["reinforce1", "rloo1", "rloo2"], [], 6)],
)
def test_compare_has_the_columns_of_all_and_the_curves_that_are_there(
    runs, names, columns, curves, monkeypatch, capsys, tmp_path
):
    drawn, real = [], compare.plot
    monkeypatch.setattr(
        compare, "plot", lambda axis, *args, **options: drawn.append((axis, real(axis, *args, **options)))
    )
    text = main(compare, monkeypatch, capsys, *(runs / name for name in names), "--save", tmp_path / "c")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [name for name in LOGGED_BEFORE if f"{name}_after" in rows[0]] == columns and all(
        name in text for name in columns
    )
    assert len(rows) == len(names) and all(row["responses"] == str(4 * 4 * 4) for row in rows)
    assert len(drawn) == curves and {axis for axis, _ in drawn} == set(drawn[0][0].figure.axes)  # no panel is empty
    for row, name in zip(rows, names):
        scalars = seeds.read_events(runs / name)[1]
        for column in columns:
            assert float(row[f"{column}_after"]) == pytest.approx(scalars[f"eval/{column}"][-1][1], abs=1e-4)


def test_frontier_has_a_line_a_script_and_a_point_a_run(runs, monkeypatch, capsys, tmp_path):
    folders = [tmp_path / name for name in ("rloo_kl0.1_1", "rloo_kl0_1", "rloo_kl0_2", "dpo_beta1e-1_2")]
    for folder, run in zip(folders, (1, 2, 1, 1)):
        shutil.copytree(runs / f"rloo{run}", folder)
    (tmp_path / "dpo_cut_1").mkdir()
    text = main(frontier, monkeypatch, capsys, *folders, tmp_path / "dpo_cut_1", "--save", tmp_path / "f")
    assert (tmp_path / "f.png").stat().st_size > 10_000 and "cut_1: not finished" in text
    kl = [seeds.read_events(runs / f"rloo{run}")[1]["eval/kl"][-1][1] for run in (1, 2)]
    expected = {
        ("dpo", "beta1e-1", "2"): kl[0],
        ("rloo", "kl0.1", "1"): kl[0],
        ("rloo", "kl0", "1"): kl[1],
        ("rloo", "kl0", "2"): kl[0],
    }
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert {(row["script"], row["setting"], row["seed"]): float(row["kl"]) for row in rows} == pytest.approx(
        expected, abs=1e-4
    )
    assert list(rows[0]) == [
        "script",
        "setting",
        "seed",
        "kl",
        "score",
    ]  # distinct_2 and repetition are not logged by rloo.py
    assert rows[0]["script"] == "dpo" and sorted(rows[1:], key=lambda row: float(row["kl"])) == rows[1:]


def test_frontier_has_the_columns_that_all_runs_have(runs, monkeypatch, capsys, tmp_path):
    for name in ("reinforce", "rloo"):
        shutil.copytree(runs / f"{name}1", tmp_path / f"{name}_kl0.05_1")
    for name, more in (("reinforce", ["distinct_2", "repetition"]), ("r*", [])):
        main(frontier, monkeypatch, capsys, *sorted(tmp_path.glob(f"{name}_kl0.05_1")), "--save", tmp_path / "f")
        rows = list(csv.DictReader((tmp_path / "f.csv").open()))
        assert list(rows[0]) == ["script", "setting", "seed", "kl", "score", *more] and len(rows) == 2 - len(more) // 2
        scalars = seeds.read_events(runs / "reinforce1")[1]
        (row,) = [row for row in rows if row["script"] == "reinforce"]
        for tag in ("kl", "score", *more):
            assert float(row[tag]) == pytest.approx(scalars[f"eval/{tag}"][-1][1], abs=1e-4)


def test_seeds_has_the_rows_that_all_seeds_have(runs, monkeypatch, capsys, tmp_path):
    """A seed of the old rloo.py beside one of today's."""
    shutil.copytree(runs / "reinforce1", tmp_path / "rloo1"), shutil.copytree(runs / "rloo2", tmp_path / "rloo2")
    text = main(seeds, monkeypatch, capsys, "rloo.py", "--seeds", 1, 2, "--out", tmp_path)
    assert [line.split()[0] for line in text.splitlines()] == ["held-out", "score", "gold", "kl", "response_length"]
    alone = main(seeds, monkeypatch, capsys, "rloo.py", "--seeds", 1, "--out", tmp_path)
    assert {line.split()[0] for line in alone.splitlines()} > {"distinct_2", "repetition", "eos_rate"}


def test_pipeline_prints_both_kinds_and_draws_them(runs, monkeypatch, capsys, tmp_path):
    text = main(pipeline, monkeypatch, capsys, "--out", runs, "--picture", tmp_path / "p.png")
    assert (
        text.count("eval/gold") == text.count("held-out accuracy") == 2 and (tmp_path / "p.png").stat().st_size > 10_000
    )
    assert "distinct_2" not in text
    (
        shutil.rmtree(runs / "rloo_on_reward_model1"),
        shutil.copytree(runs / "reinforce1", runs / "rloo_on_reward_model1"),
    )  # as older runs are
    assert main(pipeline, monkeypatch, capsys, "--out", runs).count("eval/distinct_2") == 1


def test_variances_and_advantages_of_the_baselines(tiny_flags, monkeypatch, capsys, tmp_path):
    assert baselines.variances(torch.tensor([[0.0, 2], [4, 6]])) == (
        2.0,
        7.0,
    )  # means 1 and 5: 8, of which 2 / 2 is noise
    torch.manual_seed(0)
    scores = torch.randn(20000, 1) + 2 * torch.randn(20000, 4)
    within, between = baselines.variances(scores)
    assert scores.var() == pytest.approx(within + between, rel=1e-3) and (within, between) == pytest.approx(
        (4, 1), rel=0.05
    )
    assert rloo.rloo_advantages(scores.flatten(), 4).square().mean() == pytest.approx(within * 4 / 3, rel=1e-4)
    text = main(baselines, monkeypatch, capsys, *tiny_flags)
    assert "x 4: variance within prompts" in text and "leave-one-out of 4" in text
    (tmp_path / "fails.py").write_text("def score(**columns):\n    raise ConnectionError('service down')\n")
    with pytest.raises(SystemExit, match="failed"):
        main(baselines, monkeypatch, capsys, *tiny_flags, "--reward", f"{tmp_path}/fails.py:score")


def test_bag_of_words_learns_a_word_and_reads_the_pairs_of_a_reward_model(tiny, monkeypatch, capsys, tmp_path):
    train = [(f"thank you {n} kindly" + " so" * (n % 2) * 9, f"go away {n} at once now") for n in range(20)]
    assert bag_of_words.accuracies(train, [("thank you", "go away at once now")]) == (0, 1)  # the longer one is wrong
    for name, size in (("train", 20), ("test", 5)):
        rows = [dict(prompt="q", chosen=f"thank {name} {n}", rejected=f"go off now {name} {n}") for n in range(size)]
        rows += [dict(prompt="q", chosen="thank " + "x" * 500, rejected="go")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = main(
        bag_of_words,
        monkeypatch,
        capsys,
        "--model",
        tiny,
        "--dataset",
        tmp_path / "train.jsonl",
        "--eval-dataset",
        tmp_path / "test.jsonl",
        "--max-length",
        100,
    )
    assert text.splitlines(True)[-1] == "20 pairs, held out: 5; longer wins 0.000, bag of words 1.000\n"


def test_data_makes_pairs_openings_and_messages(monkeypatch, capsys, tmp_path):
    write = lambda name, *rows: gzip.open(tmp_path / f"{name}.jsonl.gz", "wt").write(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    for split in ("train", "test"):
        write(
            f"imdb_{split}",
            dict(text="good film " * 9, label=1),
            dict(text="bad film", label=0),
            dict(text="poor", label=0),
        )
        write(
            f"hh_helpful_{split}",
            dict(prompt="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant:", chosen="e", rejected="f"),
        )
        write(f"rmb_helpful_{split}", dict(prompt="a\n\nHuman: b", chosen="e", rejected="f"))
    main(data, monkeypatch, capsys, tmp_path, tmp_path / "out")
    read = lambda name: [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").open()]
    assert [row["rejected"] for row in read("imdb_pairs_train")] == ["bad film"]
    assert read("imdb_openings_test")[0] == {"prompt": "Film review: good film good film good film good film"}
    turns = [[(message["role"], message["content"]) for message in row["prompt"]] for row in read("helpful_train")]
    assert turns == [[("user", "a"), ("assistant", "b"), ("user", "c\nd")], [("user", "a\n\nHuman: b")]]
    assert [row["chosen"] for row in read("helpful_test")] == [[dict(role="assistant", content="e")]] * 2


def test_speed_has_a_row_a_side_and_the_ratio(tiny, monkeypatch, capsys):
    text = main(speed, monkeypatch, capsys, "ppo", "--model", tiny, "--steps", 3, "--rounds", 1, "--tokens", 4)
    rounds = re.findall(r"round 1, +(\S+\.py) .* steps of [\d.]+ s\n", text)  # of three steps the first two are warm-up
    assert rounds == ["ppo.py", "rloo.py"] and "ppo.py / rloo.py: " in text


def test_speed_takes_pairs_of_distinct_prompts_that_fit(tiny, tmp_path):
    rows = [
        dict(prompt=p, chosen=c, rejected="r")
        for p, c in (("a", "x"), ("a", "y"), ("b", "z" * 99), ("c", "x"), ("d", "x"))
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = argparse.Namespace(model=tiny, dataset=str(tmp_path / "all.jsonl"), length=20, steps=2, prompts=1)
    kept = [json.loads(line) for line in open(speed.write_pairs(flags, tmp_path / "kept.jsonl"))]
    assert [row["prompt"] for row in kept] == ["a", "c"] and kept[0]["chosen"] == "x"


def test_every_command_of_its_readme_is_understood(monkeypatch, tmp_path):
    """The very shell lines, their loops and variables expanded by bash; the flags are read by the programs they are for."""

    class Understood(Exception):
        pass

    def stop(read, *args, **options):
        read(*args, **options)
        raise Understood

    root = Path(__file__).parent.parent
    block = "".join(re.findall(r"```sh\n(.*?)```", (root / "benchmark/README.md").read_text(), re.S))
    shell = 'uv() { shift; python "$@"; }\naccelerate() { shift; python "$@"; }\npython() { echo "$*" >> commands; }\n'
    subprocess.run(["bash", "-ec", shell + block], cwd=tmp_path, check=True)
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) > 50
    cli, parse_args = tyro.cli, argparse.ArgumentParser.parse_args
    for command in commands:
        program, *flags = command.split()
        script = program
        if program.startswith("benchmark/"):
            monkeypatch.setattr(sys, "argv", [program, *flags])
            for owner, name, read in ((tyro, "cli", cli), (argparse.ArgumentParser, "parse_args", parse_args)):
                monkeypatch.setattr(owner, name, lambda *args, read=read, **options: stop(read, *args, **options))
            with pytest.raises(Understood):
                importlib.import_module(Path(program).stem).main()
            monkeypatch.undo()
            script, flags = flags[0], flags[flags.index("--") + 1 :] if "--" in flags else []
        if (root / script).suffix == ".py":  # the script itself, or what seeds.py runs
            cli(importlib.import_module(Path(script).stem).Args, args=flags)

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

import ilql
import reinforce
import reward_model
import rloo

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import avoidance  # noqa: E402
import bag_of_words  # noqa: E402
import baselines  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import frontier  # noqa: E402
import iterated  # noqa: E402
import pipeline  # noqa: E402
import reward_maps  # noqa: E402
import seeds  # noqa: E402
import speed  # noqa: E402


@pytest.fixture(scope="module")
def runs(tiny, tiny_flags, tmp_path_factory):
    """Toy runs in folders named as the commands name them: two seeds of rloo.py, one of reinforce.py, a reward model, RLOO on it."""
    out = tmp_path_factory.mktemp("runs")
    run_script(reinforce, *tiny_flags, "--output-dir", out / "reinforce1")
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


def test_seeds_reads_what_is_there_and_prints_mean_and_deviation(runs, monkeypatch, capsys):
    text = main(seeds, monkeypatch, capsys, "rloo.py", "--seeds", 1, 2, "--out", runs)
    (line,) = [line.split() for line in text.splitlines() if line.startswith("score")]
    after = [float(x) for x in line[-2:]]
    assert float(line[4]) == pytest.approx(sum(after) / 2, abs=1e-3) and line[5] == "±"


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


def read_csv(path):
    return list(csv.DictReader(path.open()))


def test_compare_has_a_row_a_run_and_the_last_evaluations(runs, monkeypatch, capsys, tmp_path):
    (runs / "rloo9").mkdir()
    text = main(compare, monkeypatch, capsys, *sorted(runs.glob("rloo[0-9]")), "--save", tmp_path / "c")
    (runs / "rloo9").rmdir()
    assert "rloo9: not finished, left out" in text and (tmp_path / "c.png").stat().st_size > 10_000
    rows = read_csv(tmp_path / "c.csv")
    assert [row["seed"] for row in rows] == ["1", "2"] and "score" in text and "gold" in text
    (last,) = [value for step, value in seeds.read_events(runs / "rloo2")[1]["eval/score"] if step == 4]
    assert float(rows[1]["score_after"]) == pytest.approx(last, abs=1e-4)
    for row in rows:
        objective = float(row["score_after"]) - 0.05 * float(row["kl_after"])
        assert float(row["objective_after"]) == pytest.approx(objective, abs=2e-4)
        assert float(row["objective_before"]) == float(row["score_before"])  # the KL is 0


def test_the_curves_of_compare_are_those_of_the_runs_and_draw_the_same_picture(runs, monkeypatch, capsys, tmp_path):
    folders = [runs / name for name in ("rloo1", "rloo2", "reinforce1")]
    text = main(compare, monkeypatch, capsys, *folders, "--save", tmp_path / "c")
    assert "gold" not in text  # reinforce1 has none, so it is no column of the table
    rows = read_csv(tmp_path / "c_curves.csv")
    for column, tag in compare.CURVES.items():
        expected = seeds.read_events(runs / "rloo2")[1][tag]
        found = [
            (int(row["step"]), float(row[column]))
            for row in rows
            if (row["name"], row["seed"]) == ("rloo", "2") and row[column]
        ]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=1e-4)
    first = (tmp_path / "c.png").read_bytes()
    (tmp_path / "c.png").unlink()
    main(compare, monkeypatch, capsys, "--save", tmp_path / "c")
    assert (tmp_path / "c.png").read_bytes() == first


def test_the_mean_of_five_steps():
    assert compare.last_five([1.0, 3, 5, 7, 9, 11]) == [1, 2, 3, 4, 5, 7]


def test_frontier_has_a_line_a_script_and_a_point_a_run(runs, monkeypatch, capsys, tmp_path):
    folders = [tmp_path / name for name in ("rloo_kl0.1_1", "rloo_kl0_1", "rloo_kl0_2", "dpo_beta1e-1_2")]
    for folder, run in zip(folders, (1, 2, 1, 1)):
        shutil.copytree(runs / f"rloo{run}", folder)
    (tmp_path / "dpo_cut_1").mkdir()
    text = main(frontier, monkeypatch, capsys, *folders, tmp_path / "dpo_cut_1", "--save", tmp_path / "f")
    assert "cut_1: not finished" in text
    kl = [seeds.read_events(runs / f"rloo{run}")[1]["eval/kl"][-1][1] for run in (1, 2)]
    expected = {
        ("dpo", "beta1e-1", "2"): kl[0],
        ("rloo", "kl0.1", "1"): kl[0],
        ("rloo", "kl0", "1"): kl[1],
        ("rloo", "kl0", "2"): kl[0],
    }
    rows = read_csv(tmp_path / "f.csv")
    found = {(row["script"], row["setting"], row["seed"]): float(row["kl"]) for row in rows}
    assert found == pytest.approx(expected, abs=1e-4)
    assert rows[0]["script"] == "dpo" and sorted(rows[1:], key=lambda row: float(row["kl"])) == rows[1:]
    assert all(float(row["kl_before"]) == 0 for row in rows)
    first = (tmp_path / "f.png").read_bytes()
    main(frontier, monkeypatch, capsys, "--save", tmp_path / "f")
    assert (tmp_path / "f.png").read_bytes() == first


def test_seeds_has_the_rows_that_all_seeds_have(runs, monkeypatch, capsys, tmp_path):
    shutil.copytree(runs / "reinforce1", tmp_path / "rloo1")  # without a gold score
    shutil.copytree(runs / "rloo2", tmp_path / "rloo2")
    text = main(seeds, monkeypatch, capsys, "rloo.py", "--seeds", 1, 2, "--out", tmp_path)
    assert [line.split()[0] for line in text.splitlines()] == ["held-out", "score", "kl", "response_length"]


def test_pipeline_prints_both_kinds_and_draws_them(runs, monkeypatch, capsys, tmp_path):
    text = main(pipeline, monkeypatch, capsys, "--out", runs, "--save", tmp_path / "p")
    assert text.count("eval/gold") == text.count("held-out accuracy") == 2
    assert (tmp_path / "p.png").stat().st_size > 10_000
    curves = seeds.read_events(runs / "rloo1")[1]
    rows = [row for row in read_csv(tmp_path / "p.csv") if row["kind"] == "reward_model"]
    for column, tag in (("kl", "eval/kl"), ("learned_score", "eval/score"), ("gold_score", "eval/gold")):
        expected = [value for _, value in curves[tag]]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "module, name",
    [
        (compare, "rloo_learning_curves"),
        (compare, "algorithms_compared"),
        (compare, "without_kl"),
        (compare, "word_count"),
        (frontier, "score_over_kl"),
        (frontier, "score_over_kl_learning_rates"),
        (frontier, "score_over_kl_variants"),
        (iterated, "iterated"),
        (avoidance, "pink_elephants"),
        (pipeline, "learned_reward"),
        (reward_maps, "reward_maps"),
    ],
)
def test_the_published_pictures_can_be_drawn_from_their_csv_files(module, name, tmp_path):
    results = Path(__file__).parent.parent / "benchmark/results"
    for path in results.glob(f"{name}*.csv"):
        shutil.copy(path, tmp_path)
    module.draw(tmp_path / name)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (results / f"{name}.png").exists()


def test_iterated_trains_each_reward_model_on_the_pairs_of_its_variant(monkeypatch, tmp_path):
    """The scripts are stood in for; what they are given is looked at."""
    trained_on, answered_by, judged = {}, {}, []

    def launch(script, *flags):
        options = {str(name): str(value) for name, value in zip(flags, flags[1:])}
        if script == "data/make_pairs.py":
            name = Path(options["--out"]).name.removeprefix("new_")
            answered_by[name] = Path(options["--model"]).parent.name
            with gzip.open(options["--out"], "wt") as file:
                file.write(name + "\n")
            return ""
        if "--eval-only" in flags:
            judged.append((Path(options["--model"]).parent.name, Path(options["--dataset"]).name))
            return "before  loss 0.700  accuracies 0.625  margins 0.1"
        folder = Path(options["--output-dir"])
        (folder / "final").mkdir(parents=True)
        if script == "reward_model.py":
            trained_on[folder.name] = gzip.open(options["--dataset"], "rt").read().split()
        return ""

    points = [(0, 0.0), (40, 1.0)]
    curves = {tag: points for tag in ("eval/accuracies", "eval/score", "eval/gold", "eval/kl")}
    monkeypatch.setattr(iterated, "launch", launch)
    monkeypatch.setattr(iterated, "read_events", lambda folder: (None, curves))
    args = argparse.Namespace(out=tmp_path, rounds=3, k=4, seed=1)
    rows = {variant: iterated.run_variant(args, variant, []) for variant in iterated.VARIANTS}

    first, second, third = "first1_pairs.jsonl.gz", "all2_pairs.jsonl.gz", "all3_pairs.jsonl.gz"
    assert trained_on["first1_reward_model"] == [first]
    assert trained_on["all3_reward_model"] == [first, second, third]
    assert trained_on["newest3_reward_model"] == ["newest3_pairs.jsonl.gz"]
    assert trained_on["once1_reward_model"] == [f"once1_pairs{n}.jsonl.gz" for n in ("", 2, 3)]
    assert answered_by[first] == answered_by["once1_pairs3.jsonl.gz"] == ""  # smollm2
    assert answered_by[third] == answered_by["all3_test.jsonl.gz"] == "all2_policy"
    assert ("all2_reward_model", "all3_test.jsonl.gz") in judged  # before round 3
    assert ("all3_reward_model", "all_last_test.jsonl.gz") in judged
    assert [row["pairs"] for row in rows["all"][:3]] == [1, 2, 3]
    assert [row["pairs"] for row in rows["newest"][:3]] == [1, 1, 1]
    assert [row["pairs"] for row in rows["once"][:1]] == [3]
    assert "accuracy_before" not in rows["all"][0] and rows["all"][1]["accuracy_before"] == 0.625


def test_avoidance_has_a_row_for_each_beta_and_one_for_another_script(tiny, monkeypatch, capsys, tmp_path):
    """At learning rate 0 nothing changes: the policy of another script answers as that of ilql.py before training."""
    flags = ["--model", tiny, "--learning-rate", 0, "--head-learning-rate", 0, "--total-steps", 1, "--betas", 0, 4]
    run_script(ilql, *flags, "--seed", 2, "--precision", "fp32", "--output-dir", tmp_path / "ilql2")
    shutil.copytree(tmp_path / "ilql2", tmp_path / "dpo2")
    load_model = ilql.load_model
    monkeypatch.setattr(ilql, "load_model", lambda name: load_model(tiny if name == "smollm2" else name))
    monkeypatch.setattr(ilql, "machine_settings", lambda precision: "no")
    folders = [tmp_path / name for name in ("ilql2", "dpo2", "nothing")]
    text = main(avoidance, monkeypatch, capsys, *folders, "--save", tmp_path / "p")
    assert "nothing: not finished" in text and (tmp_path / "p.png").stat().st_size > 10_000
    rows = read_csv(tmp_path / "p.csv")
    assert [(r["name"], r["setting"], r["seed"]) for r in rows] == [
        ("ilql", "before", "2"),
        ("ilql", "beta 0", "2"),
        ("ilql", "beta 4", "2"),
        ("dpo", "", "2"),
    ]
    for column in avoidance.COLUMNS:
        assert len({row[column] for row in rows}) == 1, column
    assert float(rows[0]["ref_nll"]) > 1


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


def test_reward_maps_has_a_row_a_run_and_cell(monkeypatch, capsys, tmp_path):
    texts = [
        dict(iteration=0, asked=["a", "x"], cell=["a", "x"], parent=None, score=1.0, text="one two three"),
        dict(iteration=1, asked=["a", "y"], cell=["a", "x"], parent=None, score=2.0, text="four"),
        dict(iteration=2, asked=["b", "x"], cell=["b", "x"], parent=0, score=6.0, text="one two three"),
        dict(iteration=3, asked=["b", "x"], cell=["a", "x"], parent=0, score=0.0, text="zzz"),
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/archive.json").write_text(json.dumps(texts))
    axes = {"first": {"a": "an a", "b": "a b"}, "second": {"x": "an x", "y": "a y"}}
    (tmp_path / "run/args.json").write_text(json.dumps({"axes": {"axes": axes}}))
    text = main(reward_maps, monkeypatch, capsys, tmp_path / "run", "--save", tmp_path / "m")
    rows = read_csv(tmp_path / "m.csv")
    assert [(row["row"], row["column"], row["texts"]) for row in rows] == [
        ("a", "x", "3"),
        ("a", "y", "0"),
        ("b", "x", "1"),
        ("b", "y", "0"),
    ]
    assert [row["mean_written"] for row in rows] == ["1.5", "", "", ""]
    assert [row["mean"] for row in rows] == ["1.0", "", "6.0", ""]
    assert [row["best"] for row in rows] == ["2.0", "", "6.0", ""]
    assert "2 of 4 cells, 2 different best texts" in text
    assert "mean score written 1.5, rewritten 3.0" in text and "2 rewrites: 1 are their parent, 1 are like it" in text
    assert "column: value, mean as written, mean of all, texts; 0.5 of those written" in text
    assert "highest mean: b, x, 6.0" in text and "lowest mean: a, x, 1.0; best 2.000: 'four'" in text
    assert (tmp_path / "m.png").stat().st_size > 5_000


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
        if program.startswith("examples/"):  # it has no flags
            assert flags == [] and (root / program).exists()
            continue
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

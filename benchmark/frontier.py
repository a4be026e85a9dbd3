# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""The reward-KL frontier: held-out score over KL at the end of each run, a line an algorithm through its settings.

    uv run benchmark/frontier.py runs/frontier/* --save benchmark/frontier

Folders are named {script}_{setting}_{seed}, such as dpo_beta0.1_1 and rloo_kl0.05_1. Figure 2 of the DPO paper (arXiv
2305.18290). Writes SAVE.csv and SAVE.png; the cross is the model before training.
"""
import argparse
import csv
import itertools
import re
from pathlib import Path

from compare import read


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--save", type=Path, required=True)
    args = parser.parse_args()
    points, rows = {}, []
    for folder in args.folders:
        script, setting, seed = re.fullmatch(r"([a-z]+)_(.*)_(\d+)", folder.name).groups()
        scalars = read(folder)[1]
        before, after = ([scalars[f"eval/{tag}"][i][1] for tag in ("kl", "score", "distinct_2", "repetition")] for i in (0, -1))
        points.setdefault(script, []).append((*after[:2], setting))
        rows.append((script, setting, seed, *(round(x, 4) for x in after)))
    header = ("script", "setting", "seed", "kl", "score", "distinct_2", "repetition")
    for row in (header, *sorted(rows, key=lambda row: (row[0], row[3]))):
        print("".join(f"{value:>12}" for value in row))
    with open(args.save.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows((header, *rows))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for color, (script, runs) in zip(itertools.cycle(plt.cm.tab10.colors), points.items()):
        kls, scores, settings = zip(*sorted(runs))
        axis.plot(kls, scores, "o-", color=color, label=f"{script}.py")
        for kl, score, setting in zip(kls, scores, settings):
            axis.annotate(setting, (kl, score), xytext=(6, -10), textcoords="offset points", fontsize=8, color=color)
    axis.plot(*before[:2], "kx")
    axis.set_xscale("symlog", linthresh=10, linscale=3)  # linear up to 10 nats: a run without KL goes to 100
    axis.set_xticks(ticks := [0, 2, 4, 6, 8, 10, 20, 50, 100], map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.set(xlabel="KL from the reference, nats a response", ylabel="score, held-out prompts")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(args.save.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

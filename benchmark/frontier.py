# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""The reward-KL frontier: held-out score over KL at the end of each run, a line through the settings of a flag.

    uv run benchmark/frontier.py runs/frontier/* --save benchmark/frontier

Folders are named {script}_{setting}_{seed}, such as dpo_beta0.1_1 and rloo_kl0.05_1; no final/, not finished, left out. A line goes through the means of
each setting, whose single runs are small dots; the cross is the untrained model. Figure 2 of the DPO paper (arXiv 2305.18290). Writes SAVE.csv and SAVE.png.
"""
import argparse
import csv
import re
import statistics
from pathlib import Path

from compare import read

COLUMNS = ("kl", "score", "distinct_2", "repetition")  # those that all the runs have


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--save", type=Path, required=True)
    args = parser.parse_args()
    points, befores, ends = {}, [], []
    for folder in args.folders:
        match = re.fullmatch(r"([a-z]+)_(.*)_(\d+)", folder.name)
        if not match or not (folder / "final").exists():
            print(f"{folder}: not finished, or not named so, left out")
            continue
        script, setting, seed = match.groups()
        scalars = read(folder)[1]
        before, after = ({tag: scalars[f"eval/{tag}"][i][1] for tag in COLUMNS if f"eval/{tag}" in scalars} for i in (0, -1))
        name = f"{script}.py, " + re.sub(r"\d[\d.e-]*", " ", setting, count=1).strip()  # the first number is what a line varies
        points.setdefault(name, {}).setdefault(setting, []).append((after["kl"], after["score"]))
        befores.append((before["kl"], before["score"]))
        ends.append((script, setting, seed, after))
    present = [tag for tag in COLUMNS if all(tag in after for *_, after in ends)]
    header = ("script", "setting", "seed", *present)
    rows = [(*name, *(round(after[tag], 4) for tag in present)) for *name, after in ends]
    rows.sort(key=lambda row: (row[0], row[3]))  # by KL
    for row in (header, *rows):
        print("".join(f"{value:>12}" for value in row))
    with open(args.save.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows((header, *rows))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    mean = lambda runs: tuple(map(statistics.mean, zip(*runs)))
    for color, (name, settings) in zip(plt.cm.tab10.colors, points.items()):
        means = sorted((*mean(runs), setting) for setting, runs in settings.items())
        axis.plot(*zip(*sum(settings.values(), [])), ".", color=color, alpha=0.4)
        axis.plot(*zip(*(point[:2] for point in means)), "o-", color=color, label=name)
        for kl, score, setting in means:
            axis.annotate(setting, (kl, score), xytext=(6, -10), textcoords="offset points", fontsize=8, color=color)
    axis.plot(*mean(befores), "kx", label="before")
    axis.set_xscale("symlog", linthresh=10, linscale=3)  # linear up to 10 nats: a run without KL goes to 100
    axis.set_xticks(ticks := [tick for tick in (0, 2, 4, 6, 8, 10, 20, 50, 100) if tick < 1.5 * max(row[3] for row in rows)], map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.set(xlabel="KL from the reference, nats a response", ylabel="score, held-out prompts")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(args.save.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

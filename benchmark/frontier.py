# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""The reward-KL frontier: held-out score over KL at the end of each run, a line through the settings of a flag.

    uv run benchmark/frontier.py runs/frontier/* --save benchmark/results/score_over_kl
    uv run benchmark/frontier.py --save benchmark/results/score_over_kl               # draws the picture again

Folders are named {script}_{setting}_{seed}, such as dpo_beta0.1_1 and rloo_kl0.05_1. A line goes through the means of
the settings, whose single runs are small dots; the cross is the untrained model. Figure 2 of the DPO paper, arXiv
2305.18290. Writes SAVE.csv and SAVE.png.
"""

import argparse
import csv
import re
import statistics
from pathlib import Path

from compare import read_run, write_csv

NUMBER = r"\d[\d.e-]*"  # the first one of a setting is what a line varies


def read_points(folders) -> list[dict]:
    """A row for each run: where it began and where it ended."""
    rows = []
    for folder in folders:
        match = re.fullmatch(r"([a-z_]+)_([a-z]+\d.*)_(\d+)", folder.name)
        if not match or not (folder / "final").exists():
            print(f"{folder}: not finished, or not named so, left out")
            continue
        row = dict(zip(("script", "setting", "seed"), match.groups()))
        curves = read_run(folder, 0.05)
        for name in ("kl", "score"):
            row[name] = round(curves[f"eval/{name}"][-1][1], 4)
            row[f"{name}_before"] = round(curves[f"eval/{name}"][0][1], 4)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["script"], row["kl"]))


def read_compared(path) -> list[dict]:
    """Rows for the runs of a CSV file of compare.py: a point for each of its names."""
    rows = []
    with open(path, newline="") as file:
        for run in csv.DictReader(file):
            row = {"script": run["name"], "setting": "defaults", "seed": run["seed"]}
            row |= {"kl": run["kl_after"], "kl_before": run["kl_before"]}
            rows.append(row | {"score": run["score_after"], "score_before": run["score_before"]})
    return rows


def mean_point(rows, suffix="") -> tuple[float, float]:
    """(KL, score) on average."""
    return tuple(statistics.mean(float(row[name + suffix]) for row in rows) for name in ("kl", "score"))


def draw(save):
    """SAVE.csv -> SAVE.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parent / "plain.mplstyle")
    with open(f"{save}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = {}
    for row in rows:
        varied = re.sub(NUMBER, " ", row["setting"], count=1).strip()
        name = f"{row['script']}, by {varied}"
        if varied == "defaults":
            name = row["script"]
        lines.setdefault(name, {}).setdefault(row["setting"], []).append(row)

    figure, axis = plt.subplots(figsize=(9, 5.5))
    for number, (name, settings) in enumerate(lines.items()):
        color = f"C{number}"
        marker = "o" if number < 7 else "s"  # colours come again after seven
        means = sorted((*mean_point(runs), setting) for setting, runs in settings.items())
        for runs in settings.values():
            axis.plot(*zip(*[mean_point([run]) for run in runs]), ".", color=color, alpha=0.4)
        axis.plot(*zip(*[point[:2] for point in means]), f"{marker}-", color=color, label=name)
        for kl, score, setting in means:
            number_of_setting = re.search(NUMBER, setting)
            if number_of_setting:
                axis.annotate(number_of_setting[0], (kl, score), xytext=(6, -14), textcoords="offset points", color=color)
    if "kl_before" in rows[0]:
        axis.plot(*mean_point(rows, "_before"), "kx", label="before")
    axis.set_xscale("symlog", linthresh=10, linscale=3)  # linear up to 10 nats: a run without KL goes to 100
    longest = max(float(row["kl"]) for row in rows)
    ticks = [tick for tick in (0, 2, 4, 6, 8, 10, 20, 50, 100) if tick < 1.5 * longest]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="KL, nats per response", ylabel="score", title="held-out prompts, after training")
    axis.legend()
    figure.savefig(f"{save}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--also", type=Path, default=None, help="a CSV file of compare.py: a point for each name")
    parser.add_argument("--save", type=Path, required=True)
    args = parser.parse_args()
    if args.folders:
        rows = read_points(args.folders)
        if args.also:
            rows += read_compared(args.also)
        for row in rows:
            print("".join(f"{value:>12}" for value in row.values()))
        write_csv(f"{args.save}.csv", rows)
    draw(args.save)


if __name__ == "__main__":
    main()

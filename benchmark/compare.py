# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""Finished runs side by side: a table (mean and standard deviation over the seeds), two CSV files and a picture.

    uv run benchmark/seeds.py rloo.py --out runs/seeds                       # and reinforce.py, ppo.py, dpo.py
    uv run benchmark/compare.py runs/seeds/* --save benchmark/results/algorithms_compared
    uv run benchmark/compare.py --save benchmark/results/algorithms_compared     # draws the picture again

Folders are named as seeds.py does, {name}{seed} or {name}_{seed}; those of one name are one row and one color.
SAVE.csv has the first and the last evaluation of each run, SAVE_curves.csv what the picture shows, SAVE.png: score and
KL of the training batches, and held-out score over held-out KL, a path from the untrained model to the trained one.
Each run is thin, in the last panel a dot where it ends, and the mean of a name thick. The objective is
score - kl_coef x KL: what the RL scripts maximise.
"""

import argparse
import csv
import re
import statistics
from pathlib import Path

from seeds import mean_and_deviation, read_events

COLUMNS = ("score", "gold", "kl", "objective", "response_length", "accuracies")  # those that a run has
CURVES = {"score": "objective/scores", "kl": "objective/kl", "eval_score": "eval/score", "eval_kl": "eval/kl"}


def read_run(folder, kl_coef) -> dict:
    """{tag: [(step, value)]} of a run, the objective among them."""
    curves = read_events(folder)[1]
    points = zip(curves["eval/score"], curves["eval/kl"])
    curves["eval/objective"] = [(step, score - kl_coef * kl) for (step, score), (_, kl) in points]
    return curves


def read_groups(folders, kl_coef) -> dict:
    """{name: {seed: curves}}"""
    groups = {}
    for folder in folders:
        if list(folder.glob("events*")) and (folder / "final").exists():
            name, seed = re.fullmatch(r"(.*?)_?(\d+)", folder.name).groups()
            groups.setdefault(name, {})[int(seed)] = read_run(folder, kl_coef)
        else:
            print(f"{folder}: not finished, left out")
    return groups


def print_table(groups):
    everything = [curves for runs in groups.values() for curves in runs.values()]
    present = [column for column in COLUMNS if all(f"eval/{column}" in curves for curves in everything)]
    print(f"{'':24}{'seeds':>6}" + "".join(f"{column:>18}" for column in present))
    for name, runs in groups.items():
        cells = []
        for column in present:
            cells.append(mean_and_deviation([curves[f"eval/{column}"][-1][1] for curves in runs.values()]))
        print(f"{name:24}{len(runs):6}" + "".join(f"{cell:>18}" for cell in cells))


def write_csv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_results(groups, save):
    rows = []
    curve_rows = []
    for name, runs in groups.items():
        for seed, curves in sorted(runs.items()):
            row = {"name": name, "seed": seed}
            for column in COLUMNS:
                if f"eval/{column}" in curves:
                    row[f"{column}_before"] = round(curves[f"eval/{column}"][0][1], 4)
                    row[f"{column}_after"] = round(curves[f"eval/{column}"][-1][1], 4)
            rows.append(row)
            steps = {}
            for column, tag in CURVES.items():
                for step, value in curves.get(tag, []):
                    steps.setdefault(step, {})[column] = round(value, 4)
            for step, values in sorted(steps.items()):
                curve_rows.append({"name": name, "seed": seed, "step": step} | values)
    write_csv(f"{save}.csv", rows)
    write_csv(f"{save}_curves.csv", curve_rows)


def last_five(values) -> list:
    """The mean of each value and the four before it."""
    return [statistics.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def draw(save):
    """SAVE_curves.csv -> SAVE.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parent / "plain.mplstyle")
    groups = {}
    with open(f"{save}_curves.csv", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["name"], {}).setdefault(row["seed"], []).append(row)

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    panels = (("step", "score"), ("step", "kl"), ("eval_kl", "eval_score"))
    for number, (name, runs) in enumerate(groups.items()):
        for axis, (x, y) in zip(axes, panels):
            lines = []
            for rows in runs.values():
                points = [(float(row[x]), float(row[y])) for row in rows if row[x] and row[y]]
                if len(points) > 1:
                    xs, ys = zip(*points)
                    if x == "step":
                        ys = last_five(ys)
                        axis.plot(xs, ys, color=f"C{number}", linewidth=0.8, alpha=0.4)
                    else:
                        axis.plot(xs[-1], ys[-1], "o", color=f"C{number}", markersize=5, alpha=0.5)
                    lines.append((xs, ys))
            if lines:
                xs, ys = ([statistics.mean(values) for values in zip(*side)] for side in zip(*lines))
                axis.plot(xs, ys, color=f"C{number}")
        label = name
        if len(runs) > 1:
            label += f", {len(runs)} seeds"
        axes[2].plot([], [], color=f"C{number}", label=label)
    axes[0].set(xlabel="step", ylabel="score", title="training batches (mean of 5 steps)")
    axes[1].set(xlabel="step", ylabel="KL, nats per response", title="training batches (mean of 5 steps)")
    axes[2].set(xlabel="KL, nats per response", ylabel="score", title="held-out prompts")
    axes[2].legend()
    figure.savefig(f"{save}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--save", type=Path, default=None, help="writes SAVE.csv, SAVE_curves.csv and SAVE.png")
    parser.add_argument("--kl-coef", type=float, default=0.05, help="price of a nat in the objective of all runs")
    args = parser.parse_args()
    if args.folders:
        groups = read_groups(args.folders, args.kl_coef)
        print_table(groups)
        if args.save:
            write_results(groups, args.save)
    if args.save:
        draw(args.save)


if __name__ == "__main__":
    main()

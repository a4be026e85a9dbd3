# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium>=1.0", "numpy>=2.0", "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.66",
#                 "matplotlib>=3.9"]
# ///
"""cartpole_pg.py over many seeds, both algorithms: a table, a CSV file, and all learning curves as a PNG.

    uv run benchmark/cartpole.py --seeds 20 --save benchmark/results/cartpole_20_seeds

Seeds run one after the other in this process, on one thread; a seed whose folder holds final.pt is read, not run again.
Solved means: mean return of the last 100 training episodes >= 475 (the script itself goes on to --stop-at). Seconds count
from the start of training, without the imports (several seconds, of which torch is most). Environment steps include
those of environments that wait for the longest episode of their batch. Flags after `--` go to the script.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cartpole_pg  # noqa: E402

COLUMNS = ("algo", "seed", "steps_to_solve", "seconds_to_solve", "steps", "seconds", "SPS", "last_100", "greedy")


def scalars(folder):
    """When a run began, and {tag: [event]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    begin = events.Tensors("args/text_summary")[0].wall_time
    return begin, {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def measure(algo, seed, folder, flags):
    """Run, or read, one seed: its row of the table and its curve of (environment steps, last_100)."""
    if not (folder / "final.pt").exists():
        sys.argv = ["cartpole_pg.py", "--algo", algo, "--seed", str(seed), "--output-dir", str(folder), *flags]
        cartpole_pg.main(cartpole_pg.parse_flags())
    begin, tags = scalars(folder)
    curve = tags["charts/last_100"]
    first = next((event for event in curve if event.value >= 475), None)
    seconds = curve[-1].wall_time - begin
    row = (
        algo,
        seed,
        first and first.step,
        first and round(first.wall_time - begin, 2),
        curve[-1].step,
        round(seconds, 2),
        round(curve[-1].step / seconds),
        round(curve[-1].value, 1),
        round(tags["eval/episodic_return"][0].value, 1),
    )
    return dict(zip(COLUMNS, row)), [(e.step, e.value) for e in tags["charts/episodic_return"]]


def draw(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parent / "plain.mplstyle")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharex=True, sharey=True)
    for number, (axis, (algo, runs)) in enumerate(zip(axes, curves.items())):
        for curve in runs:
            x, y = zip(*curve)
            axis.plot([steps / 1000 for steps in x], y, color=f"C{number}", linewidth=0.9, alpha=0.5)
        axis.axhline(475, color="black", linestyle="--", linewidth=1)
        axis.set(title=f"--algo {algo}, {len(runs)} seeds", xlabel="thousand environment steps", ylim=(0, 510))
    axes[0].set_ylabel("mean return of the episodes")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/cartpole")
    parser.add_argument("--save", type=Path, help="writes this name with .png and .csv")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    rows, curves = [], {}
    for algo in ("reinforce", "ppo"):
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            row, curve = measure(algo, seed, args.out / f"{algo}{seed}", args.flags)
            rows.append(row)
            curves.setdefault(algo, []).append(curve)
    print("".join(f"{name:>20}" for name in ("", "solved", *COLUMNS[2:])))
    for algo in curves:
        mine = [row for row in rows if row["algo"] == algo]
        solved = [row for row in mine if row["steps_to_solve"]]
        line = f"{algo:>20}{f'{len(solved)} of {len(mine)}':>20}"
        for name in COLUMNS[2:]:
            values = [row[name] for row in mine if row[name] is not None] or [float("nan")]
            digits, spread = (
                0 if "steps" in name or name == "SPS" else 1,
                statistics.stdev(values) if len(values) > 1 else 0.0,
            )
            line += f"{f'{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}':>20}"
        low = min(row["greedy"] for row in mine), min(row["last_100"] for row in mine)
        slow = max(row["seconds_to_solve"] or float("inf") for row in mine)
        print(line + f"   lowest greedy {low[0]}, lowest last_100 {low[1]}, slowest {slow} s")
    if args.save:
        draw(curves, args.save.with_suffix(".png"))
        with open(args.save.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

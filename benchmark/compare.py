# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""Finished runs side by side: a table (mean ± standard deviation over the seeds), each run as a line of CSV, and a picture.

    uv run benchmark/seeds.py reinforce.py --out runs/seeds         # ... and rloo.py, ppo.py, dpo.py
    uv run benchmark/compare.py runs/seeds/* --save benchmark/algorithms

Folders are named as seeds.py does, {name}{seed}; those of one name are one row. The picture: score of the training batches
over sampled responses, a line a run; and held-out score over KL, a path a run from the SFT model to the trained one.
A run of dpo.py samples once, before it trains, and so has no training curve: its responses are those of its pairs.
"""
import argparse
import csv
import re
import statistics
from pathlib import Path

COLUMNS = ("score", "gold", "kl", "response_length", "eos_rate", "distinct_2", "repetition")


def read(folder):
    """(flags, {tag: [(step, value)]}, seconds from the first event to the last) of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    text = events.Tensors("args/text_summary")[0]
    flags = dict(re.findall(r"^\|(\w+)\|(.*)\|$", text.tensor_proto.string_val[0].decode(), re.M))
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return flags, scalars, max(events.Scalars(tag)[-1].wall_time for tag in scalars) - text.wall_time


def responses(flags, steps):
    """Sampled responses that training has seen after so many steps: those of dpo.py's 180 prompts come before the first."""
    if "loss_type" in flags:
        return (240 - int(flags["eval_prompts"])) * int(flags["k"])
    return steps * int(flags["prompts_per_step"]) * int(flags["k"])


def draw(groups, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    for color, (name, runs) in zip(plt.cm.tab10.colors, groups.items()):
        for i, (flags, scalars, _) in enumerate(runs.values()):
            label = f"{name} ({len(runs)} seeds)" if i == 0 else None
            if "objective/scores" in scalars:
                steps, scores = zip(*scalars["objective/scores"])
                smooth = [statistics.mean(scores[max(0, i - 4):i + 1]) for i in range(len(scores))]
                left.plot([responses(flags, step) for step in steps], smooth, color=color, linewidth=1, alpha=0.8, label=label)
            else:
                left.plot(responses(flags, 0), scalars["eval/score"][-1][1], "o", color=color, alpha=0.8, label=label and name + ", held-out")
            kl, score = ([value for _, value in scalars[f"eval/{tag}"]] for tag in ("kl", "score"))
            right.plot(kl, score, color=color, linewidth=0.8, alpha=0.5)
            right.plot(kl[-1], score[-1], "o", color=color, label=label)
    left.set(xlabel="sampled responses", ylabel="score, training batches (mean of the last 5 steps)")
    right.set(xlabel="KL from the reference, nats a response", ylabel="score, held-out prompts")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--save", type=Path, default=None, help="writes SAVE.csv and SAVE.png")
    args = parser.parse_args()
    groups = {}
    for folder in args.folders:
        if list(folder.glob("events*")) and (folder / "final").exists():
            name, seed = re.fullmatch(r"(.*?)(\d+)", folder.name).groups()
            groups.setdefault(name, {})[int(seed)] = read(folder)
        else:
            print(f"{folder}: not finished, left out")
    present = [c for c in COLUMNS if all(f"eval/{c}" in scalars for runs in groups.values() for _, scalars, _ in runs.values())]
    print(f"{'':24}{'seeds':>6}{'responses':>10}{'seconds':>14}" + "".join(f"{column:>18}" for column in present))
    lines = [("name", "seed", "responses", "seconds", *(f"{c}_{when}" for c in present for when in ("before", "after")))]
    for name, runs in groups.items():
        for seed, (flags, scalars, seconds) in sorted(runs.items()):
            values = [round(scalars[f"eval/{c}"][i][1], 4) for c in present for i in (0, -1)]
            steps = max(step for step, _ in scalars["charts/learning_rate"])
            lines.append((name, seed, responses(flags, steps), round(seconds), *values))
        rows = [line[2:] for line in lines[-len(runs):]]
        cell = lambda i, digits: (f"{statistics.mean(x):.{digits}f}" + (f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else "")
                                  if (x := [row[i] for row in rows]) else "")
        print(f"{name:24}{len(runs):6}{rows[0][0]:10}{cell(1, 0):>14}" + "".join(f"{cell(3 + 2 * i, 3):>18}" for i in range(len(present))))
    if args.save:
        with open(args.save.with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows(lines)
        draw(groups, args.save.with_suffix(".png"))


if __name__ == "__main__":
    main()

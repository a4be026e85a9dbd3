# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""Finished runs side by side: a table (mean ± standard deviation over the seeds) and an answer each, a CSV, a picture.

    uv run benchmark/seeds.py reinforce.py --out runs/seeds         # ... and rloo.py, ppo.py, dpo.py
    uv run benchmark/compare.py runs/seeds/* --save benchmark/algorithms

Folders are named as seeds.py does, {name}{seed} or {name}_{seed}; those of one name are one row and one color. The picture has each
run thin and their mean thick, in a band of a standard deviation: score of the training batches over sampled responses; held-out score over
KL, a path from the SFT model to the trained one; and what the text becomes, distinct-2 and repetition, of the runs that log them (rloo.py
does not; a column of the table is there where all runs have it). objective is the score less
--kl-coef times the KL: what the RL scripts maximise with that coefficient, and one number for runs that end at different KLs. A run of
dpo.py trains on answers that were sampled before: its responses are those of its pairs, and its last values stand there.
"""
import argparse
import csv
import itertools
import json
import re
import statistics
from pathlib import Path

from seeds import read_events

COLUMNS = ("score", "gold", "kl", "objective", "response_length", "eos_rate", "distinct_2", "repetition")


def read_flags(text):
    """{flag: value, as a string}: the scripts write a table, rloo.py a block of JSON."""
    if text.startswith("```"):
        return {name: str(value) for name, value in json.loads(text.strip("`\n")).items()}
    return dict(re.findall(r"^\|(\w+)\|(.*)\|$", text, re.M))


def read(folder):
    """(flags, {tag: [(step, value)]}, seconds from the first event to the last, last report) of a run."""
    events, scalars = read_events(folder)
    text = events.Tensors("args/text_summary")[0]
    flags = read_flags(text.tensor_proto.string_val[0].decode())
    seconds = max(events.Scalars(tag)[-1].wall_time for tag in scalars) - text.wall_time
    return flags, scalars, seconds, events.Tensors("eval/samples/text_summary")[-1].tensor_proto.string_val[0].decode()


def responses(flags, steps):
    """Sampled responses that training has seen after so many steps: those of dpo.py's file, 8 a prompt, come before the first."""
    if "loss_type" in flags:
        return (240 - int(flags["eval_prompts"])) * int(flags.get("k", 8))
    return steps * int(flags["prompts_per_step"]) * int(flags["k"])


def plot(axis, runs, color, label=None, band=True):
    """Runs [(x, y), ...]: each one thin, their mean thick, and a band of a standard deviation; all at one x (dpo.py): the last values."""
    import numpy as np
    points = min(len(y) for _, y in runs)
    x, y = (np.array([values[:points] for values in side], float) for side in zip(*runs))
    mean, deviation = y.mean(0), y.std(0, ddof=1) if len(runs) > 1 else 0 * y[0]
    if (x == x[0, 0]).all():
        axis.plot(x[:, -1], y[:, -1], ".", color=color, alpha=0.4)
        return axis.errorbar(x[0, -1], mean[-1], deviation[-1], fmt="o", color=color, capsize=3, label=label)
    axis.plot(x.T, y.T, color=color, linewidth=0.8, alpha=0.35)
    axis.plot(x.mean(0), mean, color=color, linewidth=2, label=label)
    if band:
        axis.fill_between(x.mean(0), mean - deviation, mean + deviation, color=color, alpha=0.12, linewidth=0)


def draw(groups, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log_texts = any("eval/distinct_2" in scalars for runs in groups.values() for _, scalars, *_ in runs.values())
    texts = ("distinct_2", "repetition") if log_texts else ()
    panels = ("training", "frontier", *texts)
    figure, axes = plt.subplots(len(panels) // 2, 2, figsize=(12, 2 * len(panels)), constrained_layout=True)
    axes = dict(zip(panels, axes.flat))
    training, frontier = axes["training"], axes["frontier"]
    for color, (name, runs) in zip(itertools.cycle(plt.cm.tab10.colors), groups.items()):
        label = name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
        lines = {panel: [] for panel in panels}
        for flags, scalars, *_ in runs.values():
            seen = lambda points: [responses(flags, step) for step, _ in points]
            held_out = {tag: [value for _, value in scalars[f"eval/{tag}"]] for tag in ("score", "kl", *texts) if f"eval/{tag}" in scalars}
            curve = scalars.get("objective/scores", scalars["eval/score"])
            last = 5 if "objective/scores" in scalars else 1
            lines["training"].append((seen(curve), [statistics.mean(value for _, value in curve[max(0, i - last):i]) for i in range(1, len(curve) + 1)]))
            lines["frontier"].append((held_out["kl"], held_out["score"]))
            frontier.plot(held_out["kl"][-1], held_out["score"][-1], "o", color=color, markersize=4)
            for tag in held_out.keys() & set(texts):
                lines[tag].append((seen(scalars["eval/score"]), held_out[tag]))
        for panel, runs_of_panel in lines.items():
            if runs_of_panel:
                plot(axes[panel], runs_of_panel, color, label, band=panel != "frontier")
    training.set(xlabel="sampled responses", ylabel="score, training batches (mean of the last 5 steps)\n(dpo.py has none: held-out prompts)")
    frontier.set(xlabel="KL from the reference, nats a response", ylabel="score, held-out prompts")
    for tag in texts:
        axes[tag].set(xlabel="sampled responses", ylabel=f"{tag.replace('_', '-')}, held-out prompts")
    for axis in axes.values():
        axis.grid(alpha=0.3)
    frontier.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--save", type=Path, default=None, help="writes SAVE.csv and SAVE.png")
    parser.add_argument("--kl-coef", type=float, default=0.05, help="price of a nat in the column objective, for all runs the same")
    args = parser.parse_args()
    groups = {}
    for folder in args.folders:
        if list(folder.glob("events*")) and (folder / "final").exists():
            name, seed = re.fullmatch(r"(.*?)_?(\d+)", folder.name).groups()
            groups.setdefault(name, {})[int(seed)] = run = read(folder)
            points = zip(run[1]["eval/score"], run[1]["eval/kl"])
            run[1]["eval/objective"] = [(step, score - args.kl_coef * kl) for (step, score), (_, kl) in points]
        else:
            print(f"{folder}: not finished, left out")
    present = [c for c in COLUMNS if all(f"eval/{c}" in scalars for runs in groups.values() for _, scalars, *_ in runs.values())]
    print(f"{'':24}{'seeds':>6}{'responses':>10}{'seconds':>14}" + "".join(f"{column:>18}" for column in present))
    lines = [("name", "seed", "responses", "seconds", *(f"{c}_{when}" for c in present for when in ("before", "after")))]
    for name, runs in groups.items():
        for seed, (flags, scalars, seconds, _) in sorted(runs.items()):
            values = [round(scalars[f"eval/{c}"][i][1], 4) for c in present for i in (0, -1)]
            steps = max(step for step, _ in scalars["charts/learning_rate"])
            lines.append((name, seed, responses(flags, steps), round(seconds), *values))
        rows = [line[2:] for line in lines[-len(runs):]]
        cell = lambda i, digits: (f"{statistics.mean(x):.{digits}f}" + (f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else "")
                                  if (x := [row[i] for row in rows]) else "")
        print(f"{name:24}{len(runs):6}{rows[0][0]:10}{cell(1, 0):>14}" + "".join(f"{cell(3 + 2 * i, 3):>18}" for i in range(len(present))))
    for name, runs in groups.items():
        sample = min(runs.items())[1][3].strip("`\n").split("prompt  ")[1].splitlines()  # of the first seed, the first prompt of its report
        print(f"\n{name:24}" + sample[0].strip(), *(line.strip() for line in sample[1:] if line.strip()), sep=f"\n{'':24}")
    if args.save:
        with open(args.save.with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows(lines)
        draw(groups, args.save.with_suffix(".png"))


if __name__ == "__main__":
    main()

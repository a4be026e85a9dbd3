# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""The files that the real-data experiments run on, made from the public data in a folder (one JSON object a line, gzipped).

    python benchmark/data.py ../shared/data runs/data

imdb_pairs_{train,test}.jsonl: a positive and a negative review, in file order, as chosen and rejected.
imdb_openings_{train,test}.jsonl: the first 8 words of each review, as a prompt to go on with, behind the same "Film review: ".
helpful_{train,test}.jsonl: hh_helpful and rmb_helpful together, all as messages, so that a reward model reads them by its chat template.
"""
import argparse
import gzip
import json
import re
from pathlib import Path


def read(folder, name):
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]


def messages(prompt):
    """A dialogue in HH-RLHF's markup, or a plain question, as messages."""
    if not prompt.startswith("\n\nHuman:"):
        return [dict(role="user", content=prompt)]
    _, *turns = re.split(r"\n\n(Human|Assistant):", prompt.removesuffix("\n\nAssistant:"))
    roles = {"Human": "user", "Assistant": "assistant"}
    return [dict(role=roles[role], content=text.strip()) for role, text in zip(turns[::2], turns[1::2])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        reviews = read(args.source, f"imdb_{split}")
        positive, negative = ([r["text"] for r in reviews if r["label"] == label] for label in (1, 0))
        answer = lambda text: [dict(role="assistant", content=text)]
        helpful = [dict(prompt=messages(row["prompt"]), chosen=answer(row["chosen"]), rejected=answer(row["rejected"]))
                   for name in ("hh_helpful", "rmb_helpful") for row in read(args.source, f"{name}_{split}")]
        files = {
            "imdb_pairs": [dict(prompt="Film review: ", chosen=a, rejected=b) for a, b in zip(positive, negative)],
            "imdb_openings": [dict(prompt="Film review: " + " ".join(r["text"].split()[:8])) for r in reviews],
            "helpful": helpful,
        }
        for name, rows in files.items():
            path = args.target / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
            print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()

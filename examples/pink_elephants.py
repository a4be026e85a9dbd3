"""Rewards for "talk about A, do not mention B": rows with the columns topic and avoid, the words of A and of B.

    accelerate launch rloo.py --dataset data/pink_elephants.jsonl.gz --chat --reward examples/pink_elephants.py:both

The data: data/make_pink_elephants.py.
"""

import re


def mentions(text: str, words: list[str]) -> bool:
    """Whether one of the words, or its plural in -s, is in the text. Case does not matter."""
    return re.search(rf"\b({'|'.join(map(re.escape, words))})s?\b", text, flags=re.I) is not None


def on_topic(completions, topic, **columns) -> list[float]:
    """1 for an answer with a word of A."""
    return [float(mentions(text_of(answer), words)) for answer, words in zip(completions, topic)]


def without_avoided(completions, avoid, **columns) -> list[float]:
    """1 for an answer without a word of B."""
    return [1.0 - mentions(text_of(answer), words) for answer, words in zip(completions, avoid)]


def both(completions, topic, avoid, **columns) -> list[float]:
    """1 for an answer with a word of A and none of B."""
    return [a * b for a, b in zip(on_topic(completions, topic), without_avoided(completions, avoid))]


def text_of(completion) -> str:
    """A completion is a string or, of a chat, a list of one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]

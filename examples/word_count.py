"""A verifiable task that SmolLM2 can learn in minutes: one sentence of exactly so many words, about a subject.

    python examples/word_count.py                      # writes word_count.jsonl, the prompts
    accelerate launch rloo.py --dataset word_count.jsonl --chat --reward examples/word_count.py:near_length \
        --eval-reward examples/word_count.py:exact_length

At first 3 % of the answers are right, which is little to learn from. So near_length pays for half a success.
"""

import json
import re

SUBJECTS = (
    "coffee, phones, trains, rain, pizza, dentists, camping, dogs, yoga, airports, winter, printers, shopping, libraries, "
    "gardens, films, cars, cooking, beaches, games, buses, hotels, pianos, tea, birds, rivers, bread, clocks, maps, snow"
).split(", ")


def count_words(text: str) -> int:
    """Words are what blanks separate and what has a letter or a digit: "Don't stop - now." has three."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def is_one_sentence(text: str) -> bool:
    """It ends with a full stop, an exclamation mark or a question mark, and has no other."""
    return re.fullmatch(r"[^.!?\n]+[.!?]", text.strip()) is not None


def exact_length(prompts, completions, words, **columns) -> list[float]:
    """1 for each response that is one sentence with the number of words of its row, else 0."""
    return [float(score == 1) for score in near_length(prompts, completions, words)]


def near_length(prompts, completions, words, **columns) -> list[float]:
    """1 for each response that is right, less for a sentence that is too short or too long, 0 for anything else."""
    scores = []
    for completion, wanted in zip(completions, words):
        error = abs(count_words(completion) - wanted)
        score = 0.0
        if is_one_sentence(completion):
            score = max(0.0, 1 - error / wanted)
        scores.append(score)
    return scores


def main():
    with open("word_count.jsonl", "w") as file:
        for subject in SUBJECTS:
            for words in range(5, 13):
                prompt = f"Write one sentence of exactly {words} words about {subject}."
                file.write(json.dumps({"prompt": prompt, "words": words}) + "\n")


if __name__ == "__main__":
    main()

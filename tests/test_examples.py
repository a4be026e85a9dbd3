"""The rewards of examples/: right answers, wrong ones, and those that try to look right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script, scalars

import rloo

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import gsm8k  # noqa: E402
import word_count  # noqa: E402


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 42.", 42),
        ("3 + 4 = 7", 7),
        ("#### 1,200", 1200),
        ("$1,200.50.", 1200.5),
        ("-5 degrees", -5),
        ("It costs 12.5", 12.5),
        ("First 18, then 9 eggs", 9),
        ("The answer is forty-two", None),  # numbers in words are none
        ("", None),
        (".,-", None),
    ],
)
def test_the_last_number(text, number):
    assert gsm8k.last_number(text) == number


def test_exact_match_takes_the_column_of_the_row():
    answer = ["6 * 7 = 42\n#### 42", "#### 7", "#### 1,000", "#### 3"]
    completions = ["It is 42.", "7 or 8", "1000.00", "three"]
    assert gsm8k.exact_match(["q"] * 4, completions, answer=answer, other=[1] * 4) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("Coffee is good.", 3),
        ("Don't stop - now!", 3),
        ("well-known 24/7 shops", 3),
        ("  Two   words  ", 2),
        ("", 0),
        ("... ? !", 0),
    ],
)
def test_words_are_counted(text, words):
    assert word_count.count_words(text) == words


def test_one_sentence_of_the_right_length():
    texts = [
        "Tea is nice.",
        " Tea is nice!\n",
        "Tea is nice",
        "Tea. Is nice.",
        "Tea\nis nice.",
        "Tea is very nice.",
        "",
        ".",
    ]
    score = {name: getattr(word_count, name)(None, texts, words=[3] * 8) for name in ("exact_length", "near_length")}
    assert score["exact_length"] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert score["near_length"] == pytest.approx([1, 1, 0, 0, 0, 2 / 3, 0, 0])
    assert word_count.near_length(None, ["a b c d e f g h i."], [3]) == [0]  # never negative


def test_its_prompts_train(tiny, tmp_path, monkeypatch):
    subprocess.run([sys.executable, EXAMPLES / "word_count.py"], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / "word_count.jsonl").open()]
    assert len(rows) == 240 and all(str(row["words"]) in row["prompt"] for row in rows)
    flags = (
        f"--model {tiny} --dataset {tmp_path}/word_count.jsonl --chat --eval-prompts 4 --total-steps 1 --precision fp32"
    )
    flags += f" --max-new-tokens 4 --prompts-per-step 2 --micro-batch-size 2 --output-dir {tmp_path}/o"
    rewards = [
        f"--{flag}={EXAMPLES}/word_count.py:{name}"
        for flag, name in (("reward", "near_length"), ("eval-reward", "exact_length"))
    ]
    run_script(rloo, *flags.split(), *rewards)
    assert scalars(tmp_path / "o", "eval/gold") == [0, 0]

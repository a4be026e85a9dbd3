"""data/make_pairs.py, and the file that it made."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import rloo

DATA = Path(__file__).parent.parent / "data"
spec = importlib.util.spec_from_file_location("make_pairs", DATA / "make_pairs.py")
make_pairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pairs)


def read(path):
    with gzip.open(path, "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]


def test_pairs_of():
    pairs = make_pairs.pairs_of("p", ["a", "b", "c", "b"], [0.5, 0.45, -0.3, 0.45], 0.1)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("a", "c"), ("b", "c")]
    assert [(p["chosen_rating"], p["rejected_rating"]) for p in pairs] == [(0.5, -0.3), (0.45, -0.3)]
    assert {p["prompt"] for p in pairs} == {"p"}
    four = make_pairs.pairs_of("p", ["a", "b", "c", "d"], [0.0, 3.0, 1.0, 2.0], 0.1)
    assert [p["chosen"] + p["rejected"] for p in four] == ["ba", "dc", "bc", "da", "bd", "ca"]  # best and worst first
    assert make_pairs.pairs_of("p", ["", "b"], [0.0, 1.0], 0.1) == []  # an empty answer is none
    assert make_pairs.pairs_of("p", ["a", "b"], [0.2, 0.2], 0.0) == []  # nor is a tie a pair


def test_the_built_in_file():
    """Every pair is of a built-in prompt, in their order, and rated by VADER."""
    pairs = read(DATA / "cheerful_pairs.jsonl.gz")
    assert len(pairs) == 5371
    prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    assert set(prompts) <= set(rloo.BUILT_IN) and len(prompts) >= 235
    assert prompts == [prompt for prompt in rloo.BUILT_IN if prompt in prompts]
    analyzer = SentimentIntensityAnalyzer()
    for pair in pairs[::7]:
        assert pair["chosen_rating"] == analyzer.polarity_scores(pair["chosen"])["compound"]
        assert pair["rejected_rating"] == analyzer.polarity_scores(pair["rejected"])["compound"]
    assert all(pair["chosen_rating"] >= pair["rejected_rating"] + 0.0999 for pair in pairs)
    answers = {}
    for pair in pairs:
        answers.setdefault(pair["prompt"], set()).update([pair["chosen"], pair["rejected"]])
    assert max(map(len, answers.values())) == 8


@pytest.mark.parametrize("scorer, fails", [("len(t) % 7", False), ("float('nan')", True)])
def test_ones_own_model_prompts_and_scorer(scorer, fails, tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"def f(prompts, completions, **c):\n    return [{scorer} for t in completions]\n"
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question": f"say {i}"}) + "\n" for i in range(5)))
    args = make_pairs.Args(model=tiny, dataset=str(tmp_path / "p.jsonl"), prompt_column="question", k=6)
    args.reward = f"{tmp_path}/mine.py:f"
    args.out = str(tmp_path / "pairs.jsonl.gz")
    args.batch_size = 2
    AcceleratorState._reset_state(reset_partial_state=True)
    if fails:
        with pytest.raises(SystemExit, match="scores must be finite"):
            make_pairs.main(args)
        return
    make_pairs.main(args)
    pairs = read(args.out)
    prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    assert len(prompts) > 2 and set(prompts) <= {f"say {i}" for i in range(5)}
    for pair in pairs:
        assert pair["chosen_rating"] == pytest.approx(len(pair["chosen"]) % 7)
        assert pair["chosen_rating"] - pair["rejected_rating"] >= 0.1
    assert rloo.read_dataset(args.out, "train").column_names == list(pairs[0])

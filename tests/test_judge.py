"""feedback/judge.py: figures by hand, a scripted judge, a tiny local one, a server that misbehaves, and the reward."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

import dpo
import judge
import rloo

PAIRS = [
    {"prompt": "p1", "chosen": "good one. It helps.", "rejected": "bad one"},
    {"prompt": "p2", "chosen": "good two", "rejected": "bad two"},
    {"prompt": "p3", "chosen": "good three", "rejected": "bad three"},
    {"prompt": "p4", "chosen": "good four", "rejected": "bad four"},
]


def run_judge(*flags):
    """Its main with these flags."""
    judge.main(tyro.cli(judge.Args, args=[str(flag) for flag in flags]))


def table(printed):
    """The numbers of a printed table by their names; of a win rate, (rate, low, high, won, lost, ties, none)."""
    found = {}
    for line in printed.splitlines():
        name, value, words = line[:20].strip(), line[20:27], line[27:].split()
        if "interval" in words:
            counts = [int(words[words.index(what) - 1]) for what in ("won,", "lost,", "ties,", "without")]
            found.setdefault(name, (float(value), float(words[3]), float(words[5].strip(";")), *counts))
        elif line[27:30] == "   ":
            found[name] = float(value)
    return found


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def scripted(monkeypatch):
    """script(function): a judge whose probabilities are function(question); returns the list of what it was asked."""

    def script(function):
        asked = []

        def answer(question, labels):
            asked.append(question)
            return function(question), ""

        monkeypatch.setattr(judge, "load_judge", lambda args: (answer, 1))
        return asked

    return script


def shown(question):
    """(the first answer, the second one) of a pairwise question."""
    first, _, rest = question.partition("Answer A: ")[2].partition("\n\nAnswer B: ")
    return first, rest.partition("\n\nWhich answer is better?")[0]


# ---- figures


@pytest.mark.parametrize(
    "p_ab, p_ba, verdict",
    [(0.9, 0.2, 1), (0.51, 0.49, 1), (0.1, 0.8, 0), (0.9, 0.6, 0.5), (0.2, 0.3, 0.5), (0.5, 0.1, 0.5), (0.9, 0.5, 0.5)],
)
def test_verdict_of_orders(p_ab, p_ba, verdict):
    assert judge.verdict_of_orders(p_ab, p_ba) == verdict
    # The same answers under each other's name: the first order is then the other one.
    assert judge.verdict_of_orders(p_ba, p_ab) == 1 - verdict


def test_without_a_verdict_there_is_none():
    assert judge.verdict_of_orders(None, 0.3) is judge.verdict_of_orders(0.3, None) is None
    assert judge.verdict_of_larger(None, 3) is judge.verdict_of_larger(3, None) is None
    assert judge.p_first(None) is judge.expected_grade(None) is None


def test_grades_golden():
    assert judge.p_first({"A": 0.3, "B": 0.1}) == pytest.approx(0.75)
    probs = dict(zip("012345", [0.05, 0, 0, 0.1, 0.15, 0.2]))  # twice as much: 0.1, 0, 0, 0.2, 0.3, 0.4
    assert judge.expected_grade(probs) == pytest.approx(0.6 + 1.2 + 2.0)
    assert [judge.verdict_of_larger(3.2, y) for y in (3.1, 3.2, 3.3)] == [1, 0.5, 0]


def test_win_rate_golden():
    """Wilson's interval of 50 of 100 and of 10 of 10 are in many books. Ties are halves."""
    assert judge.wilson_win_rate(50, 50, 0) == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)
    assert judge.wilson_win_rate(10, 0, 0) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    assert (
        judge.wilson_win_rate(6, 2, 2)
        == judge.wilson_win_rate(7, 3, 0)
        == pytest.approx((0.7, 0.3968, 0.8922), abs=1e-4)
    )
    rate, low, high = judge.wilson_win_rate(3, 5, 1)
    assert judge.wilson_win_rate(5, 3, 1) == pytest.approx((1 - rate, 1 - high, 1 - low))
    assert all(map(math.isnan, judge.wilson_win_rate(0, 0, 0)))


@pytest.mark.parametrize("probabilities", [(0.3, 0.3, 0.4), (0.6, 0.3, 0.1), (0.1, 0.1, 0.8)])
def test_the_interval_holds_the_rate_in_95_of_100_samples(probabilities):
    """By enumeration of all counts of 60 pairs; with ties it holds it more often."""
    p_win, p_loss, p_tie = probabilities
    n = 60
    covered = 0
    for wins in range(n + 1):
        for losses in range(n + 1 - wins):
            _, low, high = judge.wilson_win_rate(wins, losses, n - wins - losses)
            if low <= p_win + p_tie / 2 <= high:
                ways = math.comb(n, wins) * math.comb(n - wins, losses)
                covered += ways * p_win**wins * p_loss**losses * p_tie ** (n - wins - losses)
    assert covered >= 0.945


def test_order_bias_golden():
    """Two agree, two prefer the first, one the second, one has p = 1/2: 2/6 and 2/4."""
    orders = [(0.9, 0.2), (0.1, 0.8), (0.9, 0.6), (0.7, 0.7), (0.2, 0.3), (0.5, 0.1)]
    assert judge.order_bias(orders) == pytest.approx((2 / 6, 2 / 4))
    assert judge.order_bias([(0.9, 0.2), (0.9, 0.7), (0.3, 0.6), (0.2, 0.3)]) == (2 / 4, 1 / 2)  # docs/judge.md
    assert judge.wilson_win_rate(1, 1, 2) == pytest.approx((0.5, 0.15, 0.85), abs=1e-3)
    assert all(map(math.isnan, judge.order_bias([])))


def test_the_repeated_answer_is_the_whole_answer_twice():
    """So that lists keep their numbers and code its lines."""
    answer = "1. Boil water, e.g. 1 l.\n2. Run:\n\n    pip install tea"
    comparison = judge.Comparison("p", "p", answer, "b")
    asked = judge.questions_of(judge.Args(verbosity=True), comparison)
    assert list(asked) == ["ab", "ba", "ra", "ar"]
    assert shown(asked["ra"]) == (f"{answer}\n\n{answer}", answer)
    asked = judge.questions_of(judge.Args(verbosity=True, mode="grade"), comparison)
    assert list(asked) == ["a", "b", "r"]
    assert f"Answer: {answer}\n\n{answer}\n" in asked["r"]


LETTERS = {
    "A": ["A", "Answer A", "A is better.", "Both are fine. Verdict: [[A]]", "The better answer is **Answer A**."],
    "B": ["B", " B.", "**B**", "[[B]]", "Verdict: B", "B\n\nIt is short.", "B: it is", "B, since it is", "**Answer B**"]
    + ["The better answer is B.", "**Answer B** is the better answer.", "B\n\nA is better in style, though."]
    + ["<think>A or B? A it is: A</think>\nB", "Answer A: hot. Answer B: cold. The better answer is B."],
    None: [
        "",
        "A fair answer needs",
        "I cannot judge.",
        "Both",
        "Neither A nor B",
        "As an AI",
        "b",
        "A is worse.",
        "A/B",
    ]
    + ["A and B are equal", "Answer A: It is hot.", "The better answer is A or B", "<think>The better answer is B, or"],
}
DIGITS = {
    "0": ["0", "Reason: 3 of the facts are wrong. Grade: 0"],
    "1": ["1", "1.", "1/5"],
    "3": ["**Grade:** 3/5", "Accuracy score: 2. Overall score: 3"],
    "4": [
        "4",
        "4/5",
        "4 out of 5",
        "Grade: 4.",
        "4 points",
        "4 (complete)",
        "4. The answer is true.",
        "The grade is 4.",
    ]
    + ["Score (0-5): 4", "Grade (0 to 5): 4", "I would give it a 4.", "I'd rate this answer 4/5.", "I give 4"],
    "5": ["1. **Accuracy**: all is right. Grade: 5", "Score: 5\n\nIt is true."],
    None: ["10", "4.5", "7", "four", "4/10", "3-4", "Grade: 4.5", "Grade: 10", "Score: 4 out of 10", "Grade: 0 to 5"]
    + ["1. **Accuracy**: good", "3 of the facts are wrong.", "<think>Grade: 3?"],
}


@pytest.mark.parametrize("labels, cases", [("AB", LETTERS), ("012345", DIGITS)])
def test_verdicts_in_words(labels, cases):
    found = {}
    for verdict, replies in cases.items():
        for reply in replies:
            probs = judge.probs_of_text(reply, labels)
            found[reply] = probs and max(probs, key=probs.get)
            assert probs is None or sorted(probs.values())[-2:] == [0, 1]
            assert found[reply] == verdict, reply


def logprobs_of(probabilities):
    tokens = [SimpleNamespace(token=token, logprob=math.log(p)) for token, p in probabilities.items()]
    return SimpleNamespace(content=[SimpleNamespace(top_logprobs=tokens)])


def test_verdicts_in_log_probabilities():
    logprobs = logprobs_of({"The": 0.3, "A": 0.2, " A": 0.1, "B": 0.05, "AB": 0.2, "a": 0.1})
    assert judge.probs_of_logprobs(logprobs, "AB") == pytest.approx({"A": 0.3, "B": 0.05})
    assert judge.probs_of_logprobs(logprobs_of({"The": 0.9, "A": 0.009}), "AB") is None  # it would not say it
    assert judge.probs_of_logprobs(None, "AB") is judge.probs_of_logprobs(SimpleNamespace(content=[]), "AB") is None


# ---- a scripted judge: every figure by hand


def test_a_scripted_judge_of_pairs(scripted, write_jsonl, tmp_path, capsys):
    """p1: good in both orders. p2: always the first. p3: bad in both orders. p4: no verdict in one order."""
    path = write_jsonl(PAIRS)
    p_first = {("good two", "bad two"): 0.9, ("bad two", "good two"): 0.7}
    p_first |= {("good three", "bad three"): 0.3, ("bad three", "good three"): 0.6}

    def verdict(question):
        first, second = shown(question)
        if first == "bad four":
            return None
        if ("one", "bad one") == (first[5:8], second) or (first, second[:8]) == ("bad one", "good one"):
            p = 0.8 if first.startswith("good") else 0.1
        elif "good one" in first:  # repeated against plain: the longer
            p = 0.9 if len(first) > len(second) else 0.4
        else:
            p = p_first.get((first, second), 0.6)  # which is a tie
        return {"A": p / 2, "B": (1 - p) / 2}

    asked = scripted(verdict)
    flags = ["--dataset", path, "--out", tmp_path / "out.jsonl", "--pairs-out", tmp_path / "pairs.jsonl"]
    run_judge(*flags)
    figures = table(capsys.readouterr().out)
    assert figures["a over b"] == pytest.approx((0.5, *judge.wilson_win_rate(1, 1, 1)[1:], 1, 1, 1, 1), abs=1e-3)
    # p1 0.8 > 0.1, p2 0.9 > 0.7, p3 0.3 < 0.6: places play no part
    assert figures["orders averaged"] == pytest.approx(
        (2 / 3, *judge.wilson_win_rate(2, 1, 0)[1:], 2, 1, 0, 1), abs=1e-3
    )
    assert figures["agreement"] == 0.5
    assert figures["consistency"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["always the first"] == 1
    assert figures["verdict mass"] == pytest.approx(7 / 8 * 0.5, abs=1e-3)  # 0 for the question without a verdict
    decided = rows_of(tmp_path / "pairs.jsonl")
    assert decided == [PAIRS[0], {"prompt": "p3", "chosen": "bad three", "rejected": "good three"}]
    assert len(asked) == 8

    # With --verbosity only the new questions are asked, and again the one without a verdict.
    run_judge(*flags, "--verbosity")
    assert len(asked) == 8 + 9 and len(set(asked)) == 16
    figures_now = table(capsys.readouterr().out)
    assert figures_now["repeated over a"][3:] == (1, 0, 3, 0)  # p1
    assert figures_now["a over b"] == figures["a over b"]
    assert "good one. It helps.\n\ngood one. It helps." in {shown(question)[0] for question in asked[8:]}


@pytest.mark.parametrize("mode", ["grade", "reference"])
def test_a_scripted_judge_of_single_answers(mode, scripted, write_jsonl, tmp_path, capsys):
    path = write_jsonl([{**pair, "reference": f"right {pair['prompt']}"} for pair in PAIRS])
    grades = {"good one. It helps.": "5", "bad one": "2", "good two": "3", "bad two": "3", "good three": "1"}
    grades |= {"bad three": "4", "good four": "5", "bad four": None}

    def verdict(question):
        answer = question.partition("\nAnswer: ")[2].partition("\n\nHow good")[0]
        assert ("right p" in question) == (mode == "reference")
        grade = grades.get(answer, "5")  # repeated
        return grade and {digit: 0.4 * (digit == grade) for digit in "012345"}

    asked = scripted(verdict)
    out = tmp_path / "out.jsonl"
    run_judge("--dataset", path, "--out", out, "--mode", mode, "--verbosity")
    figures = table(capsys.readouterr().out)
    assert figures["a over b"][3:] == (1, 1, 1, 1)
    assert figures["mean grade of a"] == (5 + 3 + 1 + 5) / 4
    assert figures["mean grade of b"] == (2 + 3 + 4) / 3
    assert figures["repeated over a"] == pytest.approx(
        (0.75, *judge.wilson_win_rate(2, 0, 2)[1:], 2, 0, 2, 0), abs=1e-3
    )
    assert figures["verdict mass"] == pytest.approx(11 / 12 * 0.4, abs=1e-3)
    assert len(asked) == 12


def test_two_files_are_matched_by_prompt(write_jsonl, tmp_path, scripted, capsys):
    """Prompts may be messages. Not matched: p1 and p9. a wins by its letter."""
    ask = [{"role": "user", "content": "p2"}]
    a = write_jsonl([{"prompt": "p1", "answer": "x"}, {"prompt": "p3", "answer": "ay"}], "a.jsonl")
    b = write_jsonl([{"prompt": "p3", "answer": "by"}, {"prompt": "p9", "answer": "z"}], "b.jsonl")
    scripted(lambda question: {"A": 0.5 + 0.4 * (shown(question)[0][0] == "a"), "B": 0.5})
    pairs = tmp_path / "pairs.jsonl"
    run_judge("--answers-a", a, "--answers-b", b, "--out", tmp_path / "o1", "--pairs-out", pairs)
    assert table(capsys.readouterr().out)["a over b"][3:] == (0, 0, 1, 0)  # p = 1/2 is no verdict for b
    a = write_jsonl([{"prompt": ask, "answer": "ay"}], "a.jsonl")
    b = write_jsonl([{"prompt": ask, "answer": "by"}], "b.jsonl")
    scripted(lambda question: {"A": 0.5 + 0.4 * (shown(question)[0][0] == "a"), "B": 0.6})
    run_judge("--answers-a", a, "--answers-b", b, "--out", tmp_path / "o2", "--pairs-out", pairs)
    printed = table(capsys.readouterr().out)
    assert printed["a over b"][3:] == (1, 0, 0, 0) and "agreement" not in printed
    assert rows_of(pairs) == [{"prompt": ask, "chosen": "ay", "rejected": "by"}]


def test_bad_input(write_jsonl, tmp_path):
    with pytest.raises(SystemExit, match="--dataset: give one"):
        run_judge("--answers-a", "a.jsonl")
    with pytest.raises(SystemExit, match="--dataset: give one"):
        run_judge("--dataset", write_jsonl(PAIRS), "--answers-a", "a.jsonl", "--answers-b", "b.jsonl")
    with pytest.raises(SystemExit, match="--max-characters"):
        run_judge("--dataset", write_jsonl(PAIRS), "--max-characters", 5)
    with pytest.raises(SystemExit, match="--out .*pairs.jsonl: it holds other rows"):
        run_judge("--dataset", write_jsonl(PAIRS, "pairs.jsonl"), "--out", write_jsonl(PAIRS, "pairs.jsonl"))


def says(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("with_prompt", [True, False])
def test_answers_that_repeat_the_messages_of_the_prompt(with_prompt, scripted, write_jsonl, tmp_path):
    """UltraFeedback has the prompt as a column, too. The last message is the answer."""
    asked = scripted(lambda question: {"A": 0.5 + 0.4 * (shown(question)[0] == "4"), "B": 0.6})
    ask = [says("user", "2 + 2?")]
    row = {"chosen": ask + [says("assistant", "4")], "rejected": ask + [says("assistant", "5")]}
    if with_prompt:
        row["prompt"] = "2 + 2?"
    other = {**row, "rejected": [says("user", "2 + 3?"), says("assistant", "5")]}  # an answer to something else
    pairs = tmp_path / "pairs.jsonl"
    run_judge("--dataset", write_jsonl([row, other]), "--out", tmp_path / "out.jsonl", "--pairs-out", pairs)
    assert "Request: 2 + 2?\n" in asked[0] and shown(asked[0]) == ("4", "5") and len(asked) == 2
    assert rows_of(pairs) == [{"prompt": ask, "chosen": "4", "rejected": "5"}]


def test_rows_with_something_missing_are_left_out_and_counted(scripted, write_jsonl, tmp_path, capsys):
    asked = scripted(lambda question: dict.fromkeys("AB" if "Answer A" in question else "012345", 0.1))
    rows = [{**pair, "reference": "r"} for pair in PAIRS]
    rows[0]["chosen"] = rows[1]["rejected"] = rows[2]["reference"] = None
    run_judge("--dataset", write_jsonl(rows), "--out", tmp_path / "o1")
    assert "4 pairs: 2 are whole, 2 of these short enough" in capsys.readouterr().out
    assert len(asked) == 4
    run_judge("--dataset", write_jsonl(rows), "--out", tmp_path / "o2", "--mode", "reference")
    assert "4 pairs: 1 are whole" in capsys.readouterr().out
    answers = [{"prompt": "p", "answer": None}, {"prompt": "q", "answer": "x"}]
    a, b = write_jsonl(answers, "a.jsonl"), write_jsonl([{"prompt": "p", "answer": "y"}, answers[1]], "b.jsonl")
    run_judge("--answers-a", a, "--answers-b", b, "--out", tmp_path / "o3")
    assert "2 pairs: 1 are whole" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["pairwise", "grade"])
def test_equal_answers_are_ties_and_nobody_is_asked(mode, scripted, write_jsonl, tmp_path, capsys):
    """Nor is a pair that stands twice asked about twice."""
    asked = scripted(lambda question: dict.fromkeys("AB" if mode == "pairwise" else "012345", 0.1))
    equal = {"prompt": "p5", "chosen": "same", "rejected": "same"}
    flags = ["--dataset", write_jsonl([equal, PAIRS[0], PAIRS[0]]), "--out", tmp_path / "out.jsonl", "--mode", mode]
    run_judge(*flags, "--verbosity", "--pairs-out", tmp_path / "pairs.jsonl")
    out = capsys.readouterr().out
    assert "1 pairs to judge" in out
    assert table(out)["a over b"][3:] == (0, 0, 3, 0) and table(out)["repeated over a"][3:] == (0, 0, 2, 0)
    assert len(asked) == (4 if mode == "pairwise" else 3) and not any("p5" in question for question in asked)
    run_judge(*flags)
    assert "0 pairs to judge" in capsys.readouterr().out


# ---- a local judge


def by_hand(model, tokenizer, question, labels):
    """The labels' probabilities by rloo.py's rows, in which each label is a response of one token."""
    messages = rloo.as_messages(question, tokenizer.chat_template is not None)
    ids = rloo.encode(tokenizer, rloo.prompt_text(tokenizer, question, messages), messages is not None)
    tokens = [[tokenizer(label, add_special_tokens=False)["input_ids"][-1]] for label in labels]
    return rloo.ResponseLogprobs(model)(rloo.make_rows([ids], [tokens], "cpu"))[:, 0].exp().tolist()


@pytest.mark.parametrize("mode", ["pairwise", "grade"])
def test_a_tiny_model_judges(mode, tiny, write_jsonl, tmp_path, capsys, monkeypatch):
    """Its probabilities are those of the rows of the other scripts, and a second run asks nothing."""
    monkeypatch.setattr(judge, "MIN_VERDICT_PROB", 0)  # a random model seldom says a verdict
    out = tmp_path / "out.jsonl"
    flags = ["--dataset", write_jsonl(PAIRS), "--model", tiny, "--out", out, "--mode", mode, "--verbosity"]
    run_judge(*flags)
    printed = capsys.readouterr().out
    model, tokenizer = rloo.load_model(tiny)
    args = judge.Args(mode=mode, verbosity=True)
    rows = rows_of(out)
    assert len(rows) == 4
    for row, pair in zip(rows, PAIRS):
        comparison = judge.Comparison(pair["prompt"], pair["prompt"], pair["chosen"], pair["rejected"], None)
        questions = judge.questions_of(args, comparison)
        assert row["verdict_probs"].keys() == questions.keys()
        for names, question in questions.items():
            expected = by_hand(model, tokenizer, question, judge.LABELS[mode])
            assert list(row["verdict_probs"][names].values()) == pytest.approx(expected, rel=1e-3)
    run_judge(*flags)
    assert capsys.readouterr().out.splitlines()[2:] == printed.splitlines()[2:]
    assert rows_of(out) == rows


def test_a_verdict_that_it_would_not_say_is_none(tiny, write_jsonl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge, "MIN_VERDICT_PROB", 1.0)
    run_judge("--dataset", write_jsonl(PAIRS), "--model", tiny, "--out", tmp_path / "out.jsonl")
    assert table(capsys.readouterr().out)["a over b"][3:] == (0, 0, 0, 4)


# ---- a server


@pytest.fixture
def serve():
    """serve(function): a server whose n-th reply is function(n, body) = (status, text). Returns (its flags, the bodies)."""
    pytest.importorskip("openai")
    servers = []

    def start(reply):
        bodies = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    bodies.append(body)
                    n = len(bodies)
                status, text = reply(n, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                try:
                    self.wfile.write(text.encode())
                except BrokenPipeError:  # a client that waited no longer
                    pass

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        flags = ["--base-url", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m", "--max-retries", 1]
        return [*flags, "--concurrency", 1], bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text, logprobs=None):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if logprobs is not None:
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in logprobs]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


def prefers_good(body):
    """A reply in words: the answer that begins with good."""
    return completion("A" if shown(body["messages"][0]["content"])[0].startswith("good") else "The better answer: B.")


def test_log_probabilities_of_a_server_give_the_verdicts_of_the_local_way(
    tiny, serve, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.setattr(judge, "MIN_VERDICT_PROB", 0)
    model, tokenizer = rloo.load_model(tiny)

    def reply(n, body):
        text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            logprobs = model(ids).logits[0, -1].log_softmax(0)
        top = logprobs.sort(descending=True)
        return 200, completion(
            "?", [(tokenizer.decode([i]), v) for v, i in zip(top.values.tolist(), top.indices.tolist())]
        )

    flags, bodies = serve(reply)
    path = write_jsonl(PAIRS)
    run_judge("--dataset", path, "--out", tmp_path / "server.jsonl", *flags)
    run_judge("--dataset", path, "--out", tmp_path / "local.jsonl", "--model", tiny)
    assert {(body["logprobs"], body["top_logprobs"], body["temperature"]) for body in bodies} == {(True, 20, 0)}
    for served, local in zip(rows_of(tmp_path / "server.jsonl"), rows_of(tmp_path / "local.jsonl")):
        for names in ("ab", "ba"):
            assert served["verdict_probs"][names] == pytest.approx(local["verdict_probs"][names], rel=1e-3)


def test_a_verdict_in_words_where_log_probabilities_are_refused(serve, write_jsonl, tmp_path, capsys):
    def reply(n, body):
        if "logprobs" in body:
            return 400, json.dumps({"error": {"message": "logprobs are not supported"}})
        return 200, prefers_good(body)

    flags, bodies = serve(reply)
    out, pairs = tmp_path / "out.jsonl", tmp_path / "pairs.jsonl"
    run_judge("--dataset", write_jsonl(PAIRS), "--out", out, "--pairs-out", pairs, *flags, "--concurrency", 3)
    figures = table(capsys.readouterr().out)
    assert figures["a over b"][3:] == (4, 0, 0, 0) and figures["agreement"] == figures["verdict mass"] == 1
    assert len(bodies) <= 8 + 3  # what refuses log-probabilities once is not asked for them again
    assert sorted(row["prompt"] for row in rows_of(pairs)) == ["p1", "p2", "p3", "p4"]
    assert rows_of(out)[0]["replies"].keys() == {"ab", "ba"}

    # dpo.py reads what was decided.
    args = dpo.Args(dataset=str(pairs))
    read = dpo.read_pairs(args, SimpleNamespace(print=print), str(pairs), "train")
    assert [(pair.chosen, pair.rejected) for pair in read] == [(p["chosen"], p["rejected"]) for p in PAIRS]


@pytest.mark.parametrize("first", [(500, "{}"), (200, "{no json"), (200, "{}"), (200, "[]"), (429, "{}")])
def test_what_fails_once_is_tried_again(first, serve, write_jsonl, tmp_path, capsys):
    flags, bodies = serve(lambda n, body: first if n == 1 else (200, prefers_good(body)))
    run_judge("--dataset", write_jsonl(PAIRS), "--out", tmp_path / "out.jsonl", *flags)
    assert table(capsys.readouterr().out)["a over b"][3:] == (4, 0, 0, 0)
    assert len(bodies) == 9


def slow(n, body):
    time.sleep(1)
    return 200, prefers_good(body)


@pytest.mark.parametrize(
    "fails, said",
    [
        (lambda n, body: (500, "{}"), "InternalServerError"),
        (lambda n, body: (404, '{"error": {"message": "no model m\\nhere"}}'), "no model m here.*--model m"),
        (lambda n, body: (200, "{no json"), "JSONDecodeError"),
        (lambda n, body: (200, '{"answer": 3}'), "TypeError"),
        (slow, "Timeout.*--timeout 0.2"),
    ],
)
def test_a_server_that_goes_on_failing_costs_nothing_that_was_answered(
    fails, said, serve, write_jsonl, tmp_path, capsys
):
    """It fails from the fourth question on. One line says so; then the same command goes on there."""
    broken = [True]
    good = []

    def reply(n, body):
        if n > 3 and broken:
            return fails(n, body)
        good.append(body["messages"][0]["content"])
        return 200, prefers_good(body)

    flags, bodies = serve(reply)
    flags = ["--dataset", write_jsonl(PAIRS), "--out", tmp_path / "out.jsonl", *flags]
    if fails is slow:
        flags += ["--timeout", 0.2]
    with pytest.raises(SystemExit, match=said) as stopped:
        run_judge(*flags)
    assert "--base-url" in str(stopped.value) and "the same command goes on" in str(stopped.value)
    assert "\n" not in str(stopped.value) and stopped.value.code != 0
    assert sorted(len(row["verdict_probs"]) for row in rows_of(tmp_path / "out.jsonl")) == [1, 2]
    time.sleep(1.2 * (fails is slow))  # its late answers

    broken.clear()
    good = good[:3]
    before = len(bodies)
    run_judge(*flags, "--timeout", 5)
    asked = [body["messages"][0]["content"] for body in bodies[before:]]
    assert len(asked) == 5 and len({*asked, *good}) == 8
    assert table(capsys.readouterr().out)["a over b"][3:] == (4, 0, 0, 0)
    run_judge(*flags)
    assert len(bodies) == before + 5


def test_no_server_at_all(serve, write_jsonl, tmp_path):
    flags = ["--base-url", "http://127.0.0.1:9/v1", "--max-retries", 0]  # a port on which nothing listens
    with pytest.raises(SystemExit, match="--base-url http://127.0.0.1:9/v1: APIConnectionError.*is the server up"):
        run_judge("--dataset", write_jsonl(PAIRS), "--out", tmp_path / "out.jsonl", *flags)


def test_a_reply_without_a_verdict_is_asked_for_again_in_the_next_run_alone(serve, write_jsonl, tmp_path, capsys):
    """For example with a larger --max-tokens. At temperature 0 the same run would get the same reply."""

    def reply(n, body):
        text = body["messages"][0]["content"]
        if "p1" in text and body["max_tokens"] == 16:
            return 200, completion("I cannot judge that.")
        return 200, completion(None) if "p2" in text else prefers_good(body)

    flags, bodies = serve(reply)
    flags = ["--dataset", write_jsonl(PAIRS), "--out", tmp_path / "out.jsonl", *flags]
    run_judge(*flags)
    figures = table(capsys.readouterr().out)
    assert figures["a over b"][3:] == (2, 0, 0, 2) and figures["verdict mass"] == 0.5
    assert len(bodies) == 8
    run_judge(*flags, "--max-tokens", 50)
    assert table(capsys.readouterr().out)["a over b"][3:] == (3, 0, 0, 1)
    assert len(bodies) == 8 + 4


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("gives_logprobs", [True, False])
def test_a_question_that_is_refused_has_no_verdict(status, gives_logprobs, serve, write_jsonl, tmp_path, capsys):
    """A content filter, or a context that is too long. What comes next is asked as before."""

    def reply(n, body):
        if "p1" in body["messages"][0]["content"]:
            return status, json.dumps({"error": {"message": "filtered\nhere"}})
        if "logprobs" in body and not gives_logprobs:
            return status, json.dumps({"error": {"message": "no logprobs"}})
        return 200, prefers_good(body)

    flags, bodies = serve(reply)
    out = tmp_path / "out.jsonl"
    run_judge("--dataset", write_jsonl(PAIRS + PAIRS[:1]), "--out", out, *flags)
    printed = capsys.readouterr()
    figures = table(printed.out)
    assert figures["a over b"][3:] == (3, 0, 0, 2) and figures["verdict mass"] == 0.6
    assert printed.err.count("no verdict, BadRequest" if status == 400 else "no verdict, Unprocessable") == 2
    assert "filtered here" in rows_of(out)[0]["replies"]["ab"]
    # p1 is the first: both questions are asked in both ways. Then the way is known.
    assert len(bodies) == 4 + 6 + (0 if gives_logprobs else 1)
    before = len(bodies)
    run_judge("--dataset", write_jsonl(PAIRS[1:] + PAIRS[:1]), "--out", tmp_path / "other.jsonl", *flags)
    assert len(bodies) == before + 8 + (0 if gives_logprobs else 1)


def test_a_row_that_was_cut_off_is_judged_again(scripted, write_jsonl, tmp_path):
    """Inside a character of two bytes, too."""
    asked = scripted(lambda question: {"A": 0.4, "B": 0.2})
    out = tmp_path / "out.jsonl"
    pairs = write_jsonl([*PAIRS[:3], {"prompt": "p4", "chosen": "éé", "rejected": "bad four"}])
    run_judge("--dataset", pairs, "--out", out)
    for end in (out.read_bytes().rindex("é".encode()) + 1, len(out.read_bytes()) - 30):
        out.write_bytes(out.read_bytes()[:end])
        before = len(asked)
        run_judge("--dataset", pairs, "--out", out)
        run_judge("--dataset", pairs, "--out", out)
        assert len(asked) == before + 2


# ---- the reward


def test_as_a_reward_of_rloo(tiny, monkeypatch, capsys):
    """Strings and messages, by rloo.py's own way to load a function. The judge is loaded once."""
    monkeypatch.setenv("JUDGE_MODEL", tiny)
    scorer = rloo.load_scorer("--reward", f"{judge.__file__}:grade", None)
    monkeypatch.setattr(judge, "MIN_VERDICT_PROB", 0)
    judge.judge_of_environment.cache_clear()
    messages = [{"role": "user", "content": "say 1"}]
    prompts = [rloo.Prompt([1], messages, {"prompts": p, "prompt": p}) for p in ("say 1", messages)]
    model, tokenizer = rloo.load_model(tiny)
    for prompt in prompts:
        scores = scorer([prompt] * 2, ["one", "1"])
        expected = []
        for answer in ("one", "1"):
            question = judge.grade_question("say 1", answer, None)
            probs = dict(zip("012345", by_hand(model, tokenizer, question, "012345")))
            expected.append(judge.expected_grade(probs))
        assert scores == pytest.approx(expected, rel=1e-3) and scores[0] != scores[1]
    assert judge.judge_of_environment.cache_info().misses == 1
    with_reference = judge.grade(["say 1"], ["one"], reference=["1"])
    assert with_reference != pytest.approx(scores[:1], rel=1e-6)
    monkeypatch.setattr(judge, "MIN_VERDICT_PROB", 1.0)
    assert judge.grade(["say 1"] * 2, ["one", "1"]) == [0.0, 0.0]
    assert "JUDGE_MODEL: no verdict on any of 2 answers" in capsys.readouterr().err
    judge.judge_of_environment.cache_clear()

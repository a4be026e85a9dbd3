"""feedback/label_studio.py: pairs and agreement by hand, files in and out, its errors, and a real server if there is one.

LABEL_STUDIO=path/to/bin/label-studio pytest -n 0 tests/test_label_studio.py    also runs the last test (minutes)
"""

import json
import os
import random
import shutil
import socket
import subprocess
import time
import xml.etree.ElementTree

import pytest
import requests
import tyro
from accelerate import Accelerator
from sklearn.metrics import cohen_kappa_score

import dpo
import label_studio
from label_studio import Judged

SERVER = os.environ.get("LABEL_STUDIO", shutil.which("label-studio"))
MARKUP = '<script>alert(1)</script> <b>x</b> &amp; $text\n\n    indented "quoted" \u2028 line'


def run(*flags):
    return label_studio.main(tyro.cli(label_studio.Args, args=list(map(str, flags))))


def read_lines(path):
    return [json.loads(line) for line in open(path)]


def pair(chosen, rejected, chosen_rating, rejected_rating, prompt="p"):
    ratings = {"chosen_rating": pytest.approx(chosen_rating), "rejected_rating": pytest.approx(rejected_rating)}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **ratings}


# ---- pairs

ANNA = {"anna": [0, 2, 1]}  # of A, B and C she likes A best, then C
BEN = {"ben": [2, 0, 1]}
CORA = {"cora": [2, 1, 0]}


def test_a_ranking_decides_all_pairs_and_the_widest_comes_first():
    rows, left_out = label_studio.pairs_of_task(Judged("p", ["A", "B", "C", "D"], {"anna": [2, 0, 3, 1]}), 1.0)
    assert rows[0] == pair("C", "B", 4, 1)
    assert rows[1:3] == [pair("A", "B", 3, 1), pair("C", "D", 4, 2)]
    assert rows[3:] == [pair("C", "A", 4, 3), pair("A", "D", 3, 2), pair("D", "B", 2, 1)]
    assert left_out == {}


def test_two_annotators_golden():
    judged = Judged("p", ["A", "B", "C"], ANNA | BEN)
    assert list(label_studio.votes_of(judged).values()) == [
        {"anna": True, "ben": True},
        {"anna": True, "ben": False},
        {"anna": False, "ben": False},
    ]
    rows, left_out = label_studio.pairs_of_task(judged, 0.0)
    assert rows == [pair("A", "B", 2.5, 1), pair("C", "B", 2.5, 1)]
    assert left_out == {"ties": 1}
    line = label_studio.report_agreement(list(label_studio.votes_of(judged).values()))
    # Equal: 2 of 3. By chance: 2/3 1/3 + 1/3 2/3 = 4/9. (6/9 - 4/9) / (1 - 4/9) = 2/5
    assert line == "2 annotators, 3 pairs judged by several: 66.7% equal, Cohen's kappa 0.400"


def test_three_annotators_golden_and_the_majority_decides():
    judged = Judged("p", ["A", "B", "C"], ANNA | BEN | CORA)
    rows, left_out = label_studio.pairs_of_task(judged, 0.0)
    assert rows[0] == pair("C", "B", 8 / 3, 4 / 3)
    assert len(rows) == 3 and pair("A", "B", 2, 4 / 3) in rows and pair("C", "A", 8 / 3, 2) in rows
    assert left_out == {}
    rows, left_out = label_studio.pairs_of_task(judged, 0.7)
    assert rows == [pair("C", "B", 8 / 3, 4 / 3)]
    assert left_out == {"disputed": 2}
    assert len(label_studio.pairs_of_task(judged, 2 / 3)[0]) == 3  # a share equal to the limit is enough
    line = label_studio.report_agreement(list(label_studio.votes_of(judged).values()))
    # Of the pairs of annotators 1/3, 1/3 and all agree: 5/9. Votes: 3 first, 6 second: 1/9 + 4/9 = 5/9 by chance.
    line = line.replace("-0.000", "0.000")  # rounding
    assert line == "3 annotators, 3 pairs judged by several: 55.6% equal, Fleiss' kappa 0.000"


def test_agreement_is_not_known_of_one_annotator():
    assert label_studio.report_agreement([{}, {"anna": True}]).startswith("no pair is judged by several annotators")


def test_untouched_rankings_agree():
    """All see the same order. Half of the tasks untouched by both, the others ranked at random: docs/label_studio.md."""
    dice = random.Random(0)
    votes = []
    for i in range(4000):
        rankings = {name: [0, 1, 2] if i % 2 else dice.sample(range(3), 3) for name in ("anna", "ben")}
        votes += label_studio.votes_of(Judged("p", ["A", "B", "C"], rankings)).values()
    a, b = ([vote[name] for vote in votes] for name in ("anna", "ben"))
    assert sum(x == y for x, y in zip(a, b)) / len(a) == pytest.approx(0.75, abs=0.02)
    assert label_studio.cohen_kappa(a, b) == pytest.approx(1 / 3, abs=0.04)


# ---- agreement


def test_cohens_kappa_golden_and_as_in_sklearn():
    assert label_studio.cohen_kappa([1, 1, 1, 0, 0], [1, 1, 0, 0, 0]) == pytest.approx((0.8 - 0.48) / (1 - 0.48))
    assert label_studio.cohen_kappa([1, 0], [0, 1]) == -1
    assert label_studio.cohen_kappa([1, 0, 1], [1, 0, 1]) == 1
    assert label_studio.cohen_kappa([1, 1], [1, 1]) != label_studio.cohen_kappa([1, 1], [1, 1])  # nan
    dice = random.Random(0)
    for labels in ([False, True], ["a", "b", "c"]):
        for n in (5, 50):
            a, b = dice.choices(labels, k=n), dice.choices(labels, k=n)
            assert label_studio.cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_fleiss_kappa_golden():
    """3 annotators: P = 1, 1, 1/3, whose mean is 7/9. 5 and 4 of 9 votes: 41/81 by chance. 22/40."""
    counts = [(3, 0), (0, 3), (2, 1)]
    assert label_studio.observed_agreement(counts) == pytest.approx(7 / 9)
    assert label_studio.fleiss_kappa(counts) == pytest.approx(22 / 40)
    kappa = label_studio.fleiss_kappa([(3, 0), (2, 0)])
    assert kappa != kappa  # nan: all always say the same


def test_fleiss_kappa_of_a_published_example():
    """14 annotators, 10 items, 5 labels: en.wikipedia.org/wiki/Fleiss'_kappa, which has 0.210."""
    table = "0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2|6 5 2 1 0|0 2 2 3 7"
    counts = [tuple(map(int, row.split())) for row in table.split("|")]
    assert label_studio.observed_agreement(counts) == pytest.approx(0.378, abs=5e-4)
    assert label_studio.fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


# ---- make

ANSWERS = [
    {"prompt": [{"role": "user", "content": MARKUP}], "answers": [MARKUP, "long " * 500, "short", " ", "short", None]},
    {"prompt": [{"role": "user", "content": "q"}], "answers": ["one", "one"]},
    {"prompt": [{"role": "user", "content": "s"}], "answers": None},
    {"prompt": [{"role": "user", "content": "r"}], "answers": ["a", "b"]},
]


def make(folder, *flags):
    files = ["--tasks", folder / "tasks.json", "--labels", folder / "labels.xml"]
    run("make", *files, *flags)
    return json.loads((folder / "tasks.json").read_text()), xml.etree.ElementTree.parse(folder / "labels.xml")


def test_make_ranking(write_jsonl, tmp_path, capsys):
    tasks, labels = make(tmp_path, "--answers", write_jsonl(ANSWERS))
    assert len(tasks) == 2  # the second prompt has one answer only, the third none
    data = tasks[0]["data"]
    assert data["prompt"] == ANSWERS[0]["prompt"]
    assert data["text"] == MARKUP
    assert [item["id"] for item in data["answers"]] == ["answer 1", "answer 2", "answer 3"]
    assert sorted(item["body"] for item in data["answers"]) == sorted([MARKUP, "long " * 500, "short"])
    ranker = labels.find(".//Ranker")
    shown = labels.find(".//List")
    assert ranker.get("toName") == shown.get("name")
    assert ranker.get("name") == "ranking"
    assert shown.get("value") == "$answers"
    assert labels.find(".//HyperText") is None  # which would run what is in an answer
    assert "2 tasks of 4 prompts" in capsys.readouterr().out


def test_make_pairwise(write_jsonl, tmp_path):
    tasks, labels = make(tmp_path, "--answers", write_jsonl(ANSWERS), "--kind", "pairwise")
    assert len(tasks) == 3 + 0 + 0 + 1
    shown = {frozenset((task["data"]["left"], task["data"]["right"])) for task in tasks}
    assert frozenset((MARKUP, "short")) in shown and frozenset("ab") in shown
    assert len(shown) == 4
    names = [text.get("name") for text in labels.findall(".//Text")]
    assert names == ["prompt", "left", "right"]
    assert labels.find(".//Pairwise").get("toName") == "left,right"


def test_the_order_is_random_and_follows_from_the_seed():
    answered = [(str(i), ["a", "b", "c"]) for i in range(300)]
    tasks = label_studio.make_tasks(answered, "ranking", 1)
    first = [task["data"]["answers"][0]["body"] for task in tasks]
    assert all(70 < first.count(answer) < 130 for answer in "abc")
    assert label_studio.make_tasks(answered, "ranking", 1) == tasks
    assert label_studio.make_tasks(answered, "ranking", 2) != tasks


def test_make_with_a_model(tiny, write_jsonl, tmp_path):
    """k answers to each prompt, which counts once; the prompt stays as it is in the dataset."""
    prompts = write_jsonl([{"q": text} for text in ("hello", "hello", "", "good day", "third")])
    flags = ["--dataset", prompts, "--prompt-column", "q", "--model", tiny, "--max-new-tokens", 6, "--k", 3]
    tasks, _ = make(tmp_path, *flags, "--limit", 2)
    assert [task["data"]["prompt"] for task in tasks] == ["hello", "good day"]
    assert all(2 <= len(task["data"]["answers"]) <= 3 for task in tasks)
    assert make(tmp_path, *flags, "--limit", 2)[0] == tasks
    chat = make(tmp_path, *flags, "--limit", 2, "--chat")[0]
    assert [task["data"]["prompt"] for task in chat] == ["hello", "good day"]
    assert chat != tasks


@pytest.mark.parametrize("flags", [[], ["--dataset", "a.jsonl", "--answers", "b.jsonl"]])
def test_make_needs_prompts_or_answers(flags):
    with pytest.raises(SystemExit, match="--dataset, --answers: make needs one of them"):
        run("make", *flags)


def test_make_says_that_no_answers_differ(write_jsonl, tmp_path):
    with pytest.raises(SystemExit, match="of 1 prompts none has two different answers"):
        make(tmp_path, "--answers", write_jsonl([{"prompt": "p", "answers": ["a", "a"]}]))


# ---- read


def ranked(*names):
    value = {"ranker": {"ranking": list(names)}}
    return [{"from_name": "ranking", "to_name": "answers", "type": "ranker", "value": value}]


def preferred(side):
    value = {"selected": side}
    return [{"from_name": "preference", "to_name": "left", "type": "pairwise", "value": value}]


def annotation(who, result, cancelled=False):
    return {"completed_by": who, "result": result, "was_cancelled": cancelled}


def ranking_task(prompt, answers, annotations, **more):
    items = [{"id": f"answer {i}", "body": answer} for i, answer in enumerate(answers, 1)]
    return {"data": {"prompt": prompt, "text": prompt, "answers": items}, "annotations": annotations, **more}


def pairwise_task(prompt, left, right, annotations):
    return {"data": {"prompt": prompt, "text": prompt, "left": left, "right": right}, "annotations": annotations}


def read(tmp_path, content, *flags, name="export.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    run("read", "--export", path, "--out", tmp_path / "pairs.jsonl", *flags)
    return read_lines(tmp_path / "pairs.jsonl")


def test_read_rankings(tmp_path, capsys):
    a, b, c = "answer 1", "answer 2", "answer 3"
    annotations = [annotation(1, ranked(a, c, b)), annotation(2, ranked(c, a, b))]
    others = [annotation(1, ranked(a, b), cancelled=True), annotation(2, []), annotation(3, ranked(b, a))]
    export = [ranking_task("p", "ABC", annotations, drafts=[7]), ranking_task("q", [MARKUP, "B"], others)]
    export.append(ranking_task("nobody finished it", "ABC", []))
    rows = read(tmp_path, export)
    assert rows == [pair("A", "B", 2.5, 1), pair("C", "B", 2.5, 1), pair("B", MARKUP, 2, 1, "q")]
    out = capsys.readouterr().out
    assert "3 tasks; annotations: 3 finished, 1 skipped, 2 unfinished" in out
    assert "3 annotators, 3 pairs judged by several: 66.7% equal" in out
    assert "3 pairs; 1 ties, 0 below --min-agreement" in out


def test_read_pairwise(tmp_path, capsys):
    three = [annotation(who, preferred(side)) for who, side in ((1, "left"), (2, "right"), (3, "right"))]
    export = [pairwise_task("p", "L", "R", three), pairwise_task("p", "L", "M", [annotation(1, preferred("left"))])]
    assert read(tmp_path, export) == [pair("R", "L", 5 / 3, 4 / 3), pair("L", "M", 2, 1)]
    assert read(tmp_path, export, "--min-agreement", 0.7) == [pair("L", "M", 2, 1)]
    assert "1 pairs; 0 ties, 1 below --min-agreement" in capsys.readouterr().out


def test_an_annotator_who_comes_twice_counts_once(tmp_path):
    annotations = [annotation(1, preferred("left")), annotation(1, preferred("right"))]
    assert read(tmp_path, [pairwise_task("p", "L", "R", annotations)]) == [pair("R", "L", 2, 1)]


def test_read_plain_rows(tmp_path, capsys):
    """Rows of a prompt may have its answers in other orders, and a row without a ranking still has a number."""
    rows = [
        {"prompt": "p", "answers": ["A", "B", "C"], "ranking": [0, 2, 1]},
        {"prompt": "p", "answers": ["C", "B", "A"], "ranking": [0, 2, 1]},
        {"prompt": "q \u2028", "answers": ["A", "B"], "ranking": []},
        {"prompt": "q \u2028", "answers": ["A", "B"], "ranking": [1, 0]},
        {"prompt": "r", "answers": ["A", "B"], "ranking": [1, 0], "annotator": "2"},
    ]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n"  # a blank line
    pairs = read(tmp_path, content, name="rows.jsonl")
    assert pairs[:2] == [pair("A", "B", 2.5, 1), pair("C", "B", 2.5, 1)]
    assert pairs[2:] == [pair("B", "A", 2, 1, "q \u2028"), pair("B", "A", 2, 1, "r")]
    out = capsys.readouterr().out
    assert "3 tasks; annotations: 4 finished, 0 skipped, 1 unfinished" in out
    assert "2 annotators, 3 pairs judged by several: 66.7% equal, Cohen's kappa 0.400" in out


def test_dpo_reads_the_pairs(tmp_path):
    export = [ranking_task("p", ["A", MARKUP, "C"], [annotation(1, ranked("answer 3", "answer 2", "answer 1"))])]
    read(tmp_path, export)
    args = dpo.Args(dataset=str(tmp_path / "pairs.jsonl"))
    pairs = dpo.read_pairs(args, Accelerator(), args.dataset, "train")
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("p", "C", "A"),
        ("p", MARKUP, "A"),
        ("p", "C", MARKUP),
    ]
    assert pairs[0].columns["chosen_rating"] == 3


OTHER = [{"from_name": "sentiment", "to_name": "text", "type": "choices", "value": {"choices": ["good"]}}]
BUCKETS = [{"from_name": "ranking", "type": "ranker", "value": {"ranker": {"good": ["answer 1"], "bad": []}}}]
PLAIN = {"prompt": "p", "answers": ["A", "B"], "ranking": [0, 1]}


@pytest.mark.parametrize(
    "content, said",
    [
        ('[{"data": {"prompt"', r"export.json: no whole JSON file \(.*format JSON"),
        ("", "no whole JSON file"),
        ("[]", "export.json: no tasks in it; label tasks of tasks.json"),
        ('{"detail": "Not found"}', "no tasks in it"),
        ([{"data": {"image": "x.png"}, "annotations": []}], "another format or project, with image"),
        ([{"id": 1, "prompt": "p", "ranking": {}}], "another format or project, with id, prompt, ranking"),
        ([pairwise_task("p", "L", "R", [annotation(1, OTHER)])], r"labels of another project \(sentiment\)"),
        ([ranking_task("p", "AB", [annotation(1, ranked("answer 1"))])], r"labels of another project \(ranking\)"),
        ([pairwise_task("p", "L", "R", [annotation(1, preferred("up"))])], "labels of another project"),
        ([ranking_task("p", "AB", [annotation(1, BUCKETS)])], r"labels of another project \(ranking\)"),
        ([pairwise_task("p", "L", "R", [annotation(1, [])])], "no pair is left; label more tasks"),
    ],
)
def test_a_bad_export_is_one_line(content, said, tmp_path):
    with pytest.raises(SystemExit, match=f"--export .*{said}") as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ("not json\n", "line 1 is no row"),
        (json.dumps(PLAIN | {"ranking": [-1, 0]}), "line 1 is no row .*each index once"),
        (json.dumps(PLAIN) + "\n" + '{"prompt": "p"}\n', "line 2 is no row .*answers"),
        (json.dumps(PLAIN | {"ranking": [0, 0]}), "each index once"),
        (json.dumps(PLAIN | {"ranking": [0, 2]}), "line 1 is no row .*each index once"),
        (json.dumps(PLAIN | {"ranking": ["A", "B"]}), "line 1 is no row"),
        (json.dumps(PLAIN | {"answers": ["A", "A"]}), "answers must differ"),
        ("", "no pair is left"),
    ],
)
def test_a_bad_row_is_one_line(content, said, tmp_path):
    with pytest.raises(SystemExit, match=f"--export .*{said}") as error:
        read(tmp_path, content, name="rows.jsonl")
    assert "\n" not in str(error.value)


# ---- a real server


class Person:
    """Somebody who is logged in to a server."""

    def __init__(self, server, page, **form):
        self.server = server
        self.session = requests.Session()
        self.session.get(server + page, timeout=60).raise_for_status()
        form["csrfmiddlewaretoken"] = self.session.cookies["csrftoken"]
        self.session.post(server + page, data=form, headers={"Referer": server + page}, timeout=60).raise_for_status()

    def call(self, method, path, **body):
        headers = {"X-CSRFToken": self.session.cookies["csrftoken"], "Referer": self.server}
        answer = self.session.request(method, self.server + path, headers=headers, timeout=120, **body)
        assert answer.ok, answer.text[:500]
        return answer.json()


@pytest.fixture
def server(tmp_path):
    """The address of a server with nothing in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--no-browser --data-dir {tmp_path / 'ls'} --port {port} --internal-host 127.0.0.1"
    flags += " --username anna@example.com --password annas-password"
    env = {**os.environ, "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false"}
    address = f"http://127.0.0.1:{port}"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([SERVER, "start", *flags.split()], stdout=log, stderr=log, env=env, cwd=tmp_path)
    try:
        for _ in range(1800):  # a new database takes a minute, on a busy machine many
            try:
                if requests.get(address + "/health", timeout=30).ok:
                    break
            except requests.ConnectionError:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def project(anna, folder, title):
    """A project with the tasks and the labels that were made: its id and its tasks."""
    labels = (folder / "labels.xml").read_text()
    number = anna.call("POST", "/api/projects", json={"title": title, "label_config": labels})["id"]
    anna.call("POST", f"/api/projects/{number}/import", json=json.loads((folder / "tasks.json").read_text()))
    tasks = anna.call("GET", f"/api/tasks?project={number}&page_size=100")["tasks"]
    return number, sorted(tasks, key=lambda task: task["id"])


def export_and_read(anna, number, tmp_path):
    export = anna.call("GET", f"/api/projects/{number}/export?exportType=JSON")
    return read(tmp_path, export), export


@pytest.mark.skipif(SERVER is None, reason="no label-studio: LABEL_STUDIO names its executable")
def test_round_trip_with_a_real_server(server, write_jsonl, tmp_path, capsys):
    """20 tasks of three answers, good, fair and poor, by two people; Ben errs in 6 and leaves 4."""
    words = ("good", "fair", "poor")
    rows = [{"prompt": f"{i} {MARKUP}", "answers": [f"{word} {i}" for word in words]} for i in range(20)]
    make(tmp_path, "--answers", write_jsonl(rows))
    anna = Person(server, "/user/login/", email="anna@example.com", password="annas-password")
    invitation = anna.call("GET", "/api/invite")["invite_url"]
    ben = Person(server, invitation, email="ben@example.com", password="bens-password")
    number, tasks = project(anna, tmp_path, "ranking")
    assert len(tasks) == 20

    labels = {anna: [], ben: []}  # of each pair that both judged: is the answer shown first the better one?

    def annotate(person, task, order, **more):
        items = task["data"]["answers"]
        id_of = {item["body"].split()[0]: item["id"] for item in items}
        result = ranked(*[id_of[word] for word in order]) if order else []
        person.call("POST", f"/api/tasks/{task['id']}/annotations/", json={"result": result, **more})
        shown = [item["body"].split()[0] for item in items]
        if int(task["data"]["prompt"].split()[0]) < 16:
            labels[person] += [order.index(shown[i]) < order.index(shown[j]) for i, j in ((0, 1), (0, 2), (1, 2))]

    for i, task in enumerate(tasks):
        assert task["data"]["text"] == rows[i]["prompt"]
        order = words
        if i in (10, 11, 12, 13):
            order = ("good", "poor", "fair")
        if i in (14, 15):
            order = ("poor", "fair", "good")
        if i < 19:
            annotate(anna, task, words)
        if i < 16:
            annotate(ben, task, order)
    annotate(ben, tasks[16], words, was_cancelled=True)
    annotate(ben, tasks[17], ())
    ben.call("POST", f"/api/tasks/{tasks[18]['id']}/drafts", json={"result": ranked("answer 1")})
    pairs, export = export_and_read(anna, number, tmp_path)
    out = capsys.readouterr().out

    # 16 tasks with 3 pairs by both, of which 4 + 2 * 3 differ; 3 tasks by Anna alone; nobody did the last one.
    assert len(export) == 19
    assert "19 tasks; annotations: 35 finished, 1 skipped, 2 unfinished" in out
    # Each finds the first one better in 24 of 48: by chance 1/2 would be equal, and kappa is (38/48 - 1/2) / (1/2).
    assert sum(labels[anna]) == sum(labels[ben]) == 24
    kappa = cohen_kappa_score(labels[anna], labels[ben])
    assert kappa == pytest.approx(7 / 12)
    assert f"2 annotators, 48 pairs judged by several: {38 / 48:.1%} equal, Cohen's kappa {kappa:.3f}" in out
    assert f"{38 + 9} pairs; 10 ties" in out
    assert len(pairs) == 47
    for row in pairs:
        chosen, i = row["chosen"].split()
        rejected, j = row["rejected"].split()
        assert i == j == row["prompt"].split()[0]
        assert row["prompt"] == rows[int(i)]["prompt"]
        assert words.index(chosen) < words.index(rejected)
        assert row["chosen_rating"] > row["rejected_rating"]

    # Of two answers each
    make(tmp_path, "--answers", write_jsonl(rows[:2]), "--kind", "pairwise")
    number, tasks = project(anna, tmp_path, "pairwise")
    for task in tasks:
        sides = sorted(("left", "right"), key=lambda side: words.index(task["data"][side].split()[0]))
        for person in (anna, ben):
            person.call("POST", f"/api/tasks/{task['id']}/annotations/", json={"result": preferred(sides[0])})
    pairs, _ = export_and_read(anna, number, tmp_path)
    assert "6 pairs judged by several: 100.0% equal" in capsys.readouterr().out
    assert len(pairs) == 6
    for row in pairs:
        assert words.index(row["chosen"].split()[0]) < words.index(row["rejected"].split()[0])
        assert (row["chosen_rating"], row["rejected_rating"]) == (2, 1)

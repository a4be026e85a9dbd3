"""feedback/reward_map.py: the archive by hand, a scripted writer whose optima are known, the model's cells, resume, the picture."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import tyro
from accelerate.state import AcceleratorState, GradientState
from conftest import byte_tokenizer, forget_reward_files, plain_logprobs, scalars, tiny_llama

import reward_map
from reward_map import Solution

TASK = {
    "write": "Write {size} {parity}.",
    "rewrite": "Make {text} {size} {parity}.",
    "axes": {"size": {"small": "a small", "large": "a large", "huge": "a huge"}, "parity": {"even": "E", "odd": "O"}},
}
CELLS = [("small", "even"), ("small", "odd"), ("large", "even"), ("large", "odd"), ("huge", "even"), ("huge", "odd")]


def run_map(*flags):
    """Its main with these flags."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        reward_map.main(tyro.cli(reward_map.Args, args=[str(flag) for flag in flags]))
    finally:
        forget_reward_files()


def solution(cell, score, iteration=0, text="t"):
    return Solution(iteration, cell, cell, None, score, text)


def rows_of(folder):
    return json.loads((folder / "archive.json").read_text())


def elites_of(rows):
    """The best row of each cell, the earlier one of two equals."""
    best = {}
    for row in rows:
        cell = tuple(row["cell"])
        if cell not in best or row["score"] > best[cell]["score"]:
            best[cell] = row
    return best


@pytest.fixture
def axes_file(tmp_path):
    path = tmp_path / "axes.json"
    path.write_text(json.dumps(TASK))
    return path


@pytest.fixture
def reward_file(tmp_path):
    def write(body, name="points.py"):
        (tmp_path / name).write_text(f"def score(prompts, completions, **columns):\n{body}")
        return f"{tmp_path / name}:score"

    return write


@pytest.fixture
def writer(monkeypatch):
    """script(function): a model whose text is function(request, a number in [0, 1)); returns all requests."""

    def script(function):
        requests = []

        def sample(args, accelerator, model, tokenizer, prompts, k, uniforms):
            samples = []
            for prompt, uniform in zip(prompts, uniforms):
                requests.append(prompt.columns["prompts"])
                text = function(requests[-1], uniform[0].item())
                samples.append(reward_map.Sample(prompt, [[]], [text]))
            return samples

        monkeypatch.setattr(reward_map, "sample_responses", sample)
        monkeypatch.setattr(reward_map, "load_model", lambda name: (tiny_llama(), byte_tokenizer(None)))
        return requests

    return script


# ---- the archive


def test_an_elite_goes_only_for_a_better_one():
    elites = {}
    a, b = ("haiku", "dark"), ("hymn", "happy")
    assert reward_map.insert(elites, solution(a, 0.5, 0)) and reward_map.insert(elites, solution(b, -2.0, 1))
    assert not reward_map.insert(elites, solution(a, 0.4, 2))
    assert not reward_map.insert(elites, solution(a, 0.5, 3))
    assert reward_map.insert(elites, solution(b, -1.9, 4))
    assert {cell: elite.iteration for cell, elite in elites.items()} == {a: 0, b: 4}


def test_coverage_and_qd_score_golden():
    cells = reward_map.cells_of(reward_map.POEMS)
    assert len(cells) == 25 and cells[:2] == [("haiku", "happy"), ("haiku", "dark")]
    elites = {cells[0]: solution(cells[0], 0.5), cells[7]: solution(cells[7], -0.25), cells[9]: solution(cells[9], 1.0)}
    assert reward_map.coverage(elites, cells) == 3 / 25
    assert reward_map.qd_score(elites, lowest_score=-1) == 1.5 + 0.75 + 2
    assert reward_map.qd_score(elites, lowest_score=0) == 1.25
    assert reward_map.coverage({}, cells) == reward_map.qd_score({}, -1) == 0
    # A new elite with the lowest score of all covers a cell and adds nothing; it never takes anything away.
    elites[cells[1]] = solution(cells[1], -1.0)
    assert reward_map.coverage(elites, cells) == 4 / 25 and reward_map.qd_score(elites, -1) == 4.25


def test_mean_scores_golden():
    a, b = ("x", "1"), ("x", "2")
    solutions = [solution(a, 1.0), solution(b, 3.0), solution(a, 2.0), solution(a, 6.0)]
    assert reward_map.mean_scores(solutions) == {a: 3.0, b: 3.0}


def test_cells_in_turn_and_then_elites_and_cells_at_random():
    cells = reward_map.cells_of(reward_map.POEMS)
    first = [reward_map.choose({}, cells, i, 60, 1) for i in range(60)]
    assert [cell for cell, _ in first] == [*cells, *cells, *cells[:10]] and {parent for _, parent in first} == {None}
    elites = {cell: solution(cell, 0.0) for cell in cells[3:7]}
    later = [reward_map.choose(elites, cells, i, 60, 1) for i in range(60, 4060)]
    asked = Counter(cell for cell, _ in later)
    parents = Counter(parent.cell for _, parent in later)
    assert set(asked) == set(cells) and set(parents) == set(cells[3:7])
    # Chi-square with 24 and 3 degrees of freedom: these are passed once in a thousand times.
    assert sum((asked[cell] - 160) ** 2 / 160 for cell in cells) < 51.2
    assert sum((parents[cell] - 1000) ** 2 / 1000 for cell in elites) < 16.3
    # The same choice whatever was drawn before, another one with another seed.
    assert reward_map.choose(elites, cells, 99, 60, 1) == later[39]
    assert [reward_map.choose(elites, cells, i, 60, 2) for i in range(60, 160)] != later[:100]


# ---- whole runs of a scripted writer

TARGETS = dict(zip(CELLS, (30, 37, 12, 55, 44, 61)))


def a_number_near(request, uniform):
    """20 where it is to be written; else the number in the request, one to three more or less."""
    steps = [-3, -2, -1, 1, 2, 3]
    if request.startswith("Write"):
        return "20"
    return str(int(request.split()[1]) + steps[int(uniform * 6)])


def test_each_cells_optimum_is_found(writer, axes_file, reward_file, tmp_path, capsys):
    """The score is the distance to the cell's own number, which the reward function knows by the cell's columns."""
    requests = writer(a_number_near)
    targets = {f"{size} {parity}": target for (size, parity), target in TARGETS.items()}
    body = f"    targets = {targets}\n    cells = zip(columns['size'], columns['parity'])\n"
    body += "    return [-abs(int(c) - targets[' '.join(cell)]) for c, cell in zip(completions, cells)]\n"
    flags = ["--axes", axes_file, "--reward", reward_file(body), "--output-dir", tmp_path / "map"]
    run_map(*flags, "--iterations", 1500, "--initial", 12, "--batch-size", 50, "--lowest-score", -100)
    rows = rows_of(tmp_path / "map")
    best = elites_of(rows)
    assert {cell: (row["text"], row["score"]) for cell, row in best.items()} == {
        cell: (str(target), 0) for cell, target in TARGETS.items()
    }
    assert "coverage 1.00, QD score 600.00" in capsys.readouterr().out
    assert requests[:2] == ["Write a small E.", "Write a small O."] and requests[50].startswith("Make 20 a ")

    # Every text stands in the cell that it was asked for; a parent was its cell's elite when its batch began.
    assert [row["iteration"] for row in rows] == list(range(1500))
    assert all(row["asked"] == row["cell"] for row in rows)
    assert all(row["parent"] is None for row in rows[:50])  # the first batch has no elites yet
    for row in rows[50:]:
        elites = elites_of(rows[: row["iteration"] // 50 * 50])
        assert row["parent"] in {elite["iteration"] for elite in elites.values()}
        assert 1 <= abs(int(row["text"]) - int(rows[row["parent"]]["text"])) <= 3


def test_the_curves_are_those_of_the_archive(writer, axes_file, reward_file, tmp_path):
    writer(a_number_near)
    body = "    return [-abs(int(c) - 40) for c in completions]\n"
    flags = ["--axes", axes_file, "--reward", reward_file(body), "--output-dir", tmp_path / "map"]
    run_map(*flags, "--iterations", 40, "--initial", 4, "--batch-size", 4, "--lowest-score", -50)
    rows = rows_of(tmp_path / "map")
    expected = [elites_of(rows[:n]) for n in range(4, 41, 4)]
    assert scalars(tmp_path / "map", "objective/coverage") == pytest.approx([len(elites) / 6 for elites in expected])
    sums = [sum(row["score"] + 50 for row in elites.values()) for elites in expected]
    assert scalars(tmp_path / "map", "objective/qd_score") == pytest.approx(sums) and sums == sorted(sums)
    means = [sum(row["score"] for row in rows[n : n + 4]) / 4 for n in range(0, 40, 4)]
    assert scalars(tmp_path / "map", "objective/scores") == pytest.approx(means)
    assert scalars(tmp_path / "map", "val/as_asked") == [1] * 10
    kept = []
    for n in range(0, 40, 4):
        changes = [elites_of(rows[: i + 1]) != elites_of(rows[:i]) for i in range(n, n + 4)]
        kept.append(sum(changes) / 4)
    assert scalars(tmp_path / "map", "val/kept") == pytest.approx(kept) and kept[0] == 1 > kept[-1]


def test_classify_places_a_text_where_the_model_says(writer, axes_file, reward_file, tmp_path, monkeypatch):
    """All are asked for everything and write 7 or 8: the model says small and odd, or small and even."""
    writer(lambda request, uniform: " 7\n" if uniform < 0.5 else "8")

    def logprobs(model, requests, text):
        wanted = ["small", "odd" if byte_tokenizer(None).decode(text) == "7" else "even"]
        requests = [byte_tokenizer(None).decode(request) for request in requests]
        return torch.tensor([float(any(f"is {word}." in request for word in wanted)) for request in requests])

    monkeypatch.setattr(reward_map, "text_logprobs", logprobs)
    body = "    assert set(columns['size']) == {'small'}\n"  # what is scored is the answer to the request for its cell
    body += '    return [p == f\'Write a small {"O" if c == "7" else "E"}.\' for p, c in zip(prompts, completions)]\n'
    flags = ["--axes", axes_file, "--reward", reward_file(body), "--output-dir", tmp_path / "map"]
    run_map(*flags, "--classify", "--iterations", 12, "--initial", 6, "--batch-size", 6)
    rows = rows_of(tmp_path / "map")
    assert [tuple(row["asked"]) for row in rows[:6]] == CELLS
    assert {(row["text"], *row["cell"]) for row in rows} == {("7", "small", "odd"), ("8", "small", "even")}
    assert all(row["score"] == 1 for row in rows)
    share = sum(row["asked"] == row["cell"] for row in rows[:6]) / 6
    assert scalars(tmp_path / "map", "val/as_asked")[0] == pytest.approx(share) and share < 1
    assert "huge, odd" in (tmp_path / "map/best.txt").read_text().splitlines()[-1]
    assert "empty" in (tmp_path / "map/best.txt").read_text().splitlines()[-1]


# ---- the model's own probabilities


def test_text_logprobs_are_those_of_each_request_alone():
    model = tiny_llama()
    requests = [[5, 6], [7, 8, 9, 10, 11], [12]]
    text = [20, 21, 22, 23]
    expected = [plain_logprobs(model, request, text).sum().item() for request in requests]
    assert reward_map.text_logprobs(model, requests, text).tolist() == pytest.approx(expected, abs=1e-4)
    assert reward_map.text_logprobs(model, requests, []).tolist() == [0, 0, 0]


def test_value_probabilities_are_bayes_rule():
    """P(text | value) = 0.02, 0.01, 0.05 and three values that are equally likely before: 2/8, 1/8, 5/8."""
    logprobs = torch.tensor([0.02, 0.01, 0.05]).log()
    assert reward_map.value_probabilities(logprobs).tolist() == pytest.approx([2 / 8, 1 / 8, 5 / 8])


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"])
def test_a_texts_cell_is_the_likeliest_value_of_each_axis(template):
    model, tokenizer = tiny_llama(), byte_tokenizer(template)
    task = reward_map.Task(**TASK)
    cell_of = reward_map.load_cell_reader(model, tokenizer, task)
    found = set()
    for text in ("a", "zz top", "12345", "Q!"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = []
        for axis, values in TASK["axes"].items():
            likelihoods = {}
            for value in values:
                request = f"Write a text. Its {axis} is {value}."
                if template is not None:
                    request = f"<s>{request}</s>"
                begin = tokenizer(request, add_special_tokens=template is None)["input_ids"]
                likelihoods[value] = plain_logprobs(model, begin, ids).sum().item()
            expected.append(max(likelihoods, key=likelihoods.get))
        assert cell_of(text) == tuple(expected)
        found.add(cell_of(text))
    assert len(found) > 1


# ---- files


def small_run(tiny, folder, reward, *flags):
    """With a real, tiny model: 5 batches of 4, of which the first two are written."""
    run_map(
        *("--model", tiny, "--reward", reward, "--output-dir", folder, "--precision", "fp32", "--max-new-tokens", 6),
        *("--initial", 8, "--batch-size", 4, "--iterations", 20, *flags),
    )


LETTERS = "    return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]\n"


@pytest.mark.parametrize("classify", [(), ("--classify",)])
def test_resume_equals_an_uninterrupted_run_to_the_byte(tiny, reward_file, tmp_path, classify):
    """A scorer that fails in the fourth batch; then a stop after 12; then more iterations than at first."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reward = reward_file(LETTERS)
    small_run(tiny, whole, reward, *classify)
    fails = f"    if len(open(r'{tmp_path}/calls', 'a+').write('x') and open(r'{tmp_path}/calls').read()) == 4:\n"
    reward_file(fails + "        raise ConnectionError('service down')\n" + LETTERS)
    with pytest.raises(ConnectionError, match="service down"):
        small_run(tiny, cut, reward, *classify)
    assert len(rows_of(cut)) == 12 and not (cut / "map.png").exists()
    reward_file(LETTERS)
    small_run(tiny, cut, reward, *classify, "--iterations", 16)
    assert len(rows_of(cut)) == 16
    small_run(tiny, cut, reward, *classify)
    for name in ("archive.json", "best.txt", "map.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert scalars(cut, "objective/qd_score") == scalars(whole, "objective/qd_score")

    # All is there: nothing is written anew. Another seed writes other texts.
    before = (cut / "archive.json").read_bytes()
    small_run(tiny, cut, reward, *classify)
    assert (cut / "archive.json").read_bytes() == before
    small_run(tiny, tmp_path / "other", reward, *classify, "--seed", 2)
    assert (tmp_path / "other/archive.json").read_bytes() != before


def test_a_folder_with_another_map_is_refused(tiny, reward_file, axes_file, tmp_path):
    reward = reward_file(LETTERS)
    small_run(tiny, tmp_path / "map", reward)
    before = (tmp_path / "map/archive.json").read_bytes()
    for flag, value in (("reward", "vader"), ("seed", 2), ("batch-size", 2), ("axes", axes_file)):
        with pytest.raises(SystemExit, match=f"^--output-dir .*map: holds a map with another --{flag}; name another"):
            small_run(tiny, tmp_path / "map", reward, f"--{flag}", value)
    assert (tmp_path / "map/archive.json").read_bytes() == before
    # The content of --axes counts, not its name.
    small_run(tiny, tmp_path / "axes", reward, "--axes", axes_file)
    axes_file.write_text(json.dumps({**TASK, "write": "{size} {parity}"}))
    with pytest.raises(SystemExit, match="another --axes"):
        small_run(tiny, tmp_path / "axes", reward, "--axes", axes_file)


def test_a_wrong_model_does_not_claim_the_folder(tiny, reward_file, tmp_path):
    reward = reward_file(LETTERS)
    with pytest.raises(OSError):
        small_run("no_model", tmp_path / "map", reward)
    small_run(tiny, tmp_path / "map", reward)


def test_the_map_has_the_first_axis_as_rows(tmp_path):
    task = reward_map.Task(**TASK)
    assert reward_map.cells_of(task) == CELLS
    solutions = [solution(cell, score) for cell, score in zip(CELLS, (1.0, 2, 3, 4, 5))]
    solutions.append(solution(CELLS[0], 3.0))
    args = SimpleNamespace(reward="r.py:f", lowest_score=0.0)
    figure = reward_map.draw(solutions, task, args)
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "map.png").stat().st_size > 10_000
    by_title = {axes.get_title(): axes for axes in figure.axes}
    for title, first in (("best score per cell", 3.0), ("mean score per cell", 2.0)):
        axes = by_title[title]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("parity", "size")
        assert [label.get_text() for label in axes.get_xticklabels()] == ["even", "odd"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "large", "huge"]
        assert axes.images[0].get_clim() == (2, 5)  # one scale of colours for both maps
        numbers = axes.images[0].get_array().filled(math.nan).tolist()
        assert numbers[0] == [first, 2] and numbers[1] == [3, 4] and numbers[2][0] == 5 and math.isnan(numbers[2][1])
        # The written number of a cell stands on it: x is the column, y is the row.
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {
            (0, 0): f"{first:.2f}",
            (1, 0): "2.00",
            (0, 1): "3.00",
            (1, 1): "4.00",
            (0, 2): "5.00",
        }
    curves = {axes.get_ylabel(): axes.lines[0].get_xydata().tolist() for axes in figure.axes if axes.lines}
    assert curves["coverage"] == [[n, min(n, 5) / 6] for n in range(1, 7)]
    assert curves["QD score"] == [[1, 1], [2, 3], [3, 6], [4, 10], [5, 15], [6, 17]]


def test_the_table_has_a_line_per_cell():
    task = reward_map.Task(**TASK)
    table = reward_map.best_texts({CELLS[1]: solution(CELLS[1], 0.25, text="one\ntwo")}, task).splitlines()
    assert len(table) == 6 and table[1].split() == ["small,", "odd", "0.250", "one", "/", "two"]
    assert table[0].split() == ["small,", "even", "empty"]


# ---- messages


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--iterations", 30], "--iterations 30: must be a multiple of --batch-size 20"),
        (["--iterations", 0], "--iterations 0: must be a number of 1 or more"),
        (["--initial", 0], "--initial 0: must be a number of 1 or more"),
        (["--batch-size", 0], "--batch-size 0: must be a number of 1 or more"),
        (["--temperature", "nan"], "--temperature nan: must be a number of 0.01 or more"),
    ],
)
def test_numbers_that_make_no_sense(flags, said, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_map(*flags, "--output-dir", tmp_path / "map")
    assert stopped.value.code == said and not (tmp_path / "map").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"axes": {"size": {"small": "s"}}}, "1 axes; a map has two"),
        ({"write": "Write {size}."}, '"write" lacks {parity}'),
        ({"rewrite": "Make it {size} {parity}."}, '"rewrite" lacks {text}'),
    ],
)
def test_an_axes_file_that_lacks_something(change, said, axes_file, tmp_path):
    axes_file.write_text(json.dumps({**TASK, **change}))
    with pytest.raises(SystemExit) as stopped:
        run_map("--axes", axes_file, "--output-dir", tmp_path / "map")
    assert stopped.value.code == f"--axes {axes_file}: {said}"


def test_a_score_that_is_no_number_stops_the_run_and_keeps_what_was_before(writer, axes_file, reward_file, tmp_path):
    writer(a_number_near)
    reward = reward_file("    return [1.0 if c == '20' else float('nan') for c in completions]\n")
    flags = ["--axes", axes_file, "--reward", reward, "--output-dir", tmp_path / "map"]
    with pytest.raises(SystemExit, match=r"--reward .*points.py:score: score nan of '\d+'; what was before is kept"):
        run_map(*flags, "--iterations", 18, "--initial", 6, "--batch-size", 6)
    assert len(rows_of(tmp_path / "map")) == 6


def test_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^--output-dir: .*file"):
        run_map("--output-dir", tmp_path / "file/map")

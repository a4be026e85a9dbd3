"""variants/ilql.py: its losses, a token game solved exactly, its heads and sampling, its runs. What it shares with dpo.py and rloo.py is tested there."""

import gzip
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    byte_tokenizer,
    grad_norm,
    moments,
    plain_logprobs,
    run_in_two_processes,
    run_script,
    scalars,
    tiny_gpt2,
    tiny_llama,
)
from test_dpo import Here, load, said
from test_grpo import same
from test_sft import stops

import ilql

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))
import make_pink_elephants  # noqa: E402

from examples import pink_elephants  # noqa: E402


# ---- the losses


def test_expectile_loss_golden_and_its_minimum():
    losses = ilql.expectile_loss(torch.tensor([1.0, 0, 3]), torch.tensor([0.0, 1, 3]), 0.7)
    assert losses.tolist() == pytest.approx([0.7, 0.3, 0])
    targets = torch.tensor([0.0, 1, 4])
    grid = torch.linspace(0, 4, 4001)
    # The tau-expectile e of 0, 1, 4: tau sum of what lies above = (1 - tau) sum of what lies below.
    for tau, best in ((0.5, 5 / 3), (0.7, 0.7 * 4 / (0.7 + 0.6) + 0.3 / 1.3), (0.999, 4)):
        sums = torch.stack([ilql.expectile_loss(targets, e.expand(3), tau).sum() for e in grid])
        assert grid[sums.argmin()].item() == pytest.approx(best, abs=0.02)


def test_q_targets_golden_the_last_token_bootstraps_nothing():
    v = torch.tensor([9.0, 2, 3, 9, 5], requires_grad=True)  # answers of three tokens and of two
    rewards = torch.tensor([0.0, 0, 1, 0, -1])
    is_last = torch.tensor([False, False, True, False, True])
    targets = ilql.q_targets(v, rewards, is_last, 0.9)
    assert targets.tolist() == pytest.approx([1.8, 2.7, 1, 4.5, -1])
    assert not targets.requires_grad


def test_cql_loss_golden():
    q = torch.tensor([[0.0, math.log(3)], [0, math.log(3)]], requires_grad=True)
    losses = ilql.cql_loss(q, torch.tensor([0, 1]))
    assert losses.tolist() == pytest.approx([math.log(4), math.log(4 / 3)])
    losses.sum().backward()
    # Descent raises Q of the data's token and lowers the other.
    assert q.grad.tolist() == [pytest.approx([-0.75, 0.75]), pytest.approx([0.25, -0.25])]


TOKENS = torch.tensor([0, 1])
REWARDS = torch.tensor([0.0, 1])
IS_LAST = torch.tensor([False, True])


def test_ilql_loss_golden():
    """An answer of two tokens over a vocabulary of two, gamma 0.5: the targets of Q are 0.5 * 0.6 and 1."""
    values = ilql.TokenValues(
        logits=torch.tensor([[0.0, 0], [0, math.log(3)]]),
        q=torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [2, 0]]]),
        slow_q=torch.tensor([[0.5, 0.2], [0.3, 0.4]]),
        v=torch.tensor([0.1, 0.6]),
    )
    losses = ilql.ilql_loss(values, TOKENS, REWARDS, IS_LAST, 0.5, 0.7, 0.1, 2.0)
    expected = {
        "loss/q": [0.7**2 + 0.3**2, 1 + 1],
        "loss/v": [0.7 * 0.2**2, 0.3 * 0.4**2],  # of 0.3 and 0.2, the lower of the slow Q
        "loss/cql": [math.log(math.e + 1) - 1 + math.log(2), math.log(2) + math.log(math.e**2 + 1)],
        "loss/bc": [math.log(2), math.log(4 / 3)],
    }
    for name, numbers in expected.items():
        assert losses[name].tolist() == pytest.approx(numbers), name
    for i in range(2):
        q, v, cql, bc = (numbers[i] for numbers in expected.values())
        assert losses["loss/total"][i].item() == pytest.approx(q + v + 0.1 * cql + 2 * bc)


def test_the_exact_gradient_of_the_loss():
    """By the formula, where targets are constants. The slow Q and the targets' V get none."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (2, 5, 4), (2, 5), (5,)]
    parts = [torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for s in shapes]
    values = ilql.TokenValues(*parts)
    tokens = torch.tensor([3, 0, 1, 1, 2])
    rewards = torch.tensor([0, 0, 1.5, 0, -0.5], dtype=torch.double)
    is_last = torch.tensor([False, False, True, False, True])
    ilql.ilql_loss(values, tokens, rewards, is_last, 0.9, 0.8, 0.3, 0.7)["loss/total"].sum().backward()

    is_token = torch.nn.functional.one_hot(tokens, 4).double()
    v = values.v.detach()
    targets = torch.stack([0.9 * v[1], 0.9 * v[2], rewards[2], 0.9 * v[4], rewards[4]])
    assert torch.allclose(values.logits.grad, 0.7 * (values.logits.softmax(1) - is_token))
    errors = values.q - targets[:, None]
    assert torch.allclose(values.q.grad, 2 * errors * is_token + 0.3 * (values.q.softmax(2) - is_token))
    u = values.slow_q.min(0).values - v
    assert torch.allclose(values.v.grad, -2 * torch.where(u > 0, 0.8, 0.2) * u)
    # In a run the slow Q is without gradient; by itself, the loss of V would move it.
    assert not ilql.PolicyAndValues(tiny_llama()).heads.slow_q[0][0].weight.requires_grad


@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_sign(reward):
    """From 0, descent moves Q of the last token towards the reward, and V after it."""
    q = torch.zeros(2, 1, 3, requires_grad=True)
    v = torch.zeros(1, requires_grad=True)
    for slow_q in (torch.zeros(2, 1), torch.full((2, 1), reward)):
        values = ilql.TokenValues(torch.zeros(1, 3), q, slow_q, v)
        losses = ilql.ilql_loss(values, torch.tensor([1]), torch.tensor([reward]), torch.tensor([True]), 1, 0.7, 0, 1)
        losses["loss/total"].sum().backward()
    assert (q.grad[:, 0, 1] * reward < 0).all() and q.grad[:, 0, ::2].abs().max() == 0
    assert v.grad.item() * reward < 0


# ---- a token game


GAMMA = 0.9
STEPS = 3
# Two tokens, three steps. Token 0 first is better on average, token 1 first leads to the best end.
RETURNS = dict(zip([(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], [1, 1, 0.5, 1, -1, -1, -1, 2.0]))
BEHAVIOUR = {(): 1, (0,): 2, (1,): 2, (0, 0): 1, (0, 1): 3, (1, 0): 2, (1, 1): 1}  # fourths of token 1


def behaviour(state, token):
    share = BEHAVIOUR[state] / 4
    return share if token == 1 else 1 - share


def expectile(numbers, shares, tau):
    """By bisection: tau sum of what lies above = (1 - tau) sum of what lies below."""
    low, high = min(numbers), max(numbers)
    for _ in range(60):
        middle = (low + high) / 2
        pull = sum(p * (tau if x > middle else 1 - tau) * (x - middle) for x, p in zip(numbers, shares))
        low, high = (middle, high) if pull > 0 else (low, middle)
    return low


def solve(tau):
    """Q and V of all states, from the end to the beginning."""
    q, v = {}, {}
    for state in sorted(BEHAVIOUR, key=len, reverse=True):
        for token in (0, 1):
            after = (*state, token)
            q[after] = RETURNS[after] if len(after) == STEPS else GAMMA * v[after]
        v[state] = expectile(*zip(*[(q[(*state, a)], behaviour(state, a)) for a in (0, 1)]), tau)
    return q, v


def mean_return(policy):
    """Of a function (state, token) -> probability, by enumeration."""
    total = 0
    for end, reward in RETURNS.items():
        probability = 1
        for t in range(STEPS):
            probability *= policy(end[:t], end[t])
        total += probability * reward
    return total


@pytest.fixture(scope="module", params=[0.5, 0.7, 0.99])
def learned(request):
    """(tau, logits, Q, V) of a table for all states, by the script's loss on all answers as often as behaviour has them."""
    states = list(BEHAVIOUR)
    tokens, places, rewards, is_last = [], [], [], []
    for end, reward in RETURNS.items():
        times = 64
        for t in range(STEPS):
            times *= behaviour(end[:t], end[t])
        assert times == int(times)
        for _ in range(int(times)):
            tokens += end
            places += [states.index(end[:t]) for t in range(STEPS)]
            rewards += [0.0] * (STEPS - 1) + [reward]
            is_last += [False] * (STEPS - 1) + [True]
    tokens, places, rewards, is_last = map(torch.tensor, (tokens, places, rewards, is_last))
    logits = torch.zeros(len(states), 2, requires_grad=True)
    q = torch.zeros(2, len(states), 2, requires_grad=True)
    v = torch.zeros(len(states), requires_grad=True)
    slow_q = torch.zeros_like(q, requires_grad=False)
    optimizer = torch.optim.Adam([logits, q, v], lr=0.05)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1500)
        values = ilql.TokenValues(logits[places], q[:, places], slow_q[:, places, tokens], v[places])
        losses = ilql.ilql_loss(values, tokens, rewards, is_last, GAMMA, request.param, 0.0, 1.0)
        optimizer.zero_grad()
        losses["loss/total"].mean().backward()
        optimizer.step()
        slow_q.lerp_(q.detach(), 0.1)
    return request.param, logits.detach(), slow_q, v.detach()


def test_in_the_game_q_and_v_reach_the_exact_values(learned):
    tau, logits, slow_q, v = learned
    exact_q, exact_v = solve(tau)
    for i, state in enumerate(BEHAVIOUR):
        assert v[i].item() == pytest.approx(exact_v[state], abs=5e-3)
        for token in (0, 1):
            for head in slow_q:
                assert head[i, token].item() == pytest.approx(exact_q[(*state, token)], abs=5e-3)
            assert logits[i].softmax(0)[token].item() == pytest.approx(behaviour(state, token), abs=5e-3)
    if tau == 0.5:  # V is the mean: the value of the behaviour policy
        assert v[0].item() == pytest.approx(GAMMA**2 * mean_return(behaviour), abs=5e-3)
    if tau == 0.99:  # V is nearly that of the best tokens
        assert GAMMA**2 * 2 * 0.9 < v[0].item() < GAMMA**2 * 2


def test_in_the_game_sampling_by_value_beats_the_behaviour(learned):
    tau, logits, slow_q, v = learned
    states = list(BEHAVIOUR)

    def returns_at(beta):
        advantages = slow_q.min(0).values - v[:, None]
        probabilities = (logits.log_softmax(1) + beta * advantages).softmax(1)
        return mean_return(lambda state, token: probabilities[states.index(state), token].item())

    returns = [returns_at(beta) for beta in (0, 1, 4, 16)]
    assert returns[0] == pytest.approx(mean_return(behaviour), abs=0.02)
    assert returns[1] > returns[0] + 0.05 and returns[2] > returns[1]
    # A mean that leans to the better tokens finds the end that the mean alone leaves.
    best = max(RETURNS.values())
    if tau == 0.99:
        assert returns[3] > 0.99 * best
    if tau == 0.5:
        assert returns[3] == pytest.approx(1, abs=0.05)


# ---- heads and states


def heads_of(network, seed=0):
    """Heads that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.heads.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def test_heads_start_at_zero_and_the_slow_ones_follow():
    heads = ilql.ValueHeads(8)
    states = torch.randn(5, 8)
    for head in (heads.v, *heads.q, *heads.slow_q):
        assert head(states).abs().max() == 0
    assert not torch.equal(heads.q[0][0].weight, heads.q[1][0].weight)  # else the lower of two would be one
    torch.nn.init.ones_(heads.q[0][2].weight)
    heads.follow(0.25)
    assert torch.equal(heads.slow_q[0][2].weight, torch.full((8, 16), 0.25))
    assert heads.slow_q[1][2].weight.abs().max() == 0
    assert [p.requires_grad for p in heads.slow_q.parameters()] == [False] * 8


PROMPTS = [[5, 6, 7, 8], [9, 10]]
GROUPS = [[[11, 12, 1], [13, 1]], [[14, 15, 16, 17, 1], [18, 19, 20]]]


@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_values_are_those_of_one_text_at_a_time(model):
    network = heads_of(ilql.PolicyAndValues(model))
    rows = ilql.make_rows(PROMPTS, GROUPS, "cpu")
    with torch.no_grad():
        values = network(rows)
    at = 0
    for prompt, group in zip(PROMPTS, GROUPS):
        for answer in group:
            n = len(answer)
            output = model(torch.tensor([prompt + answer]), output_hidden_states=True)
            states = output.hidden_states[-1][0, len(prompt) - 1 : -1]
            vectors = model.get_output_embeddings().weight
            part = slice(at, at + n)
            tokens = torch.tensor(answer)[:, None]
            logprobs = values.logits[part].log_softmax(1).gather(1, tokens)[:, 0]
            assert torch.allclose(logprobs, plain_logprobs(model, prompt, answer), atol=1e-4)
            for i in range(2):
                q = network.heads.q[i](states) @ vectors.T
                slow_q = (network.heads.slow_q[i](states) @ vectors.T).gather(1, tokens)[:, 0]
                assert torch.allclose(values.q[i, part], q, atol=1e-4)
                assert torch.allclose(values.slow_q[i, part], slow_q, atol=1e-4)
            assert torch.allclose(values.v[part], network.heads.v(states)[:, 0], atol=1e-4)
            at += n
    assert at == len(values.v) and values.q.abs().max() > 0.1


def test_answer_tokens_golden_and_the_order_of_rows_changes_no_loss():
    rows = ilql.make_rows(PROMPTS, GROUPS, "cpu")
    tokens, rewards, is_last = ilql.answer_tokens(rows, [1.0, -1, 2, -2])
    assert tokens.tolist() == [11, 12, 1, 13, 1, 14, 15, 16, 17, 1, 18, 19, 20]
    assert rewards.tolist() == [0, 0, 1, 0, -1, 0, 0, 0, 0, 2, 0, 0, -2]
    assert is_last.nonzero()[:, 0].tolist() == [2, 4, 9, 12]

    network = heads_of(ilql.PolicyAndValues(tiny_llama()))
    totals = []
    for order in (slice(None), slice(None, None, -1)):
        rows = ilql.make_rows(PROMPTS[order], GROUPS[order], "cpu")
        answer_rewards = sum([[1.0, -1], [2.0, -2]][order], [])
        with torch.no_grad():
            losses = ilql.ilql_loss(network(rows), *ilql.answer_tokens(rows, answer_rewards), 0.99, 0.7, 0.1, 1)
        totals.append({name: values.sum().item() for name, values in losses.items()})
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_the_gradient_of_the_slow_heads_and_of_the_token_vectors_by_values_is_none():
    network = heads_of(ilql.PolicyAndValues(tiny_llama()))
    rows = ilql.make_rows(PROMPTS, GROUPS, "cpu")
    losses = ilql.ilql_loss(network(rows), *ilql.answer_tokens(rows, [1.0, -1, 2, -2]), 0.99, 0.7, 0.1, 0)
    before = network.model.get_output_embeddings().weight
    losses["loss/total"].sum().backward()
    unused = sorted(set(range(258)) - set(sum(PROMPTS, [])) - set(sum(sum(GROUPS, []), [])))
    assert before.grad[unused].abs().max() == 0  # tied: only tokens that are read have a gradient
    assert all(p.grad is None for p in network.heads.slow_q.parameters())
    assert all(p.grad.abs().max() > 0 for p in (*network.heads.q.parameters(), *network.heads.v.parameters()))
    assert all(p.grad.abs().max() > 0 for p in network.model.model.layers.parameters())  # values shape the states


# ---- sampling


def test_at_beta_0_sampling_is_plain_to_the_bit():
    network = heads_of(ilql.PolicyAndValues(tiny_llama()))
    network.model.generation_config.eos_token_id = [1]
    uniforms = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    plain = ilql.generate(network.model, PROMPTS, 4, uniforms, 0.7)
    assert ilql.generate(ilql.GuidedPolicy(network, 0.0), PROMPTS, 4, uniforms, 0.7) == plain
    assert ilql.generate(ilql.GuidedPolicy(network, 3.0), PROMPTS, 4, uniforms, 0.7) != plain
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(ilql.GuidedPolicy(network, 0.0)(ids).logits, network.model(ids).logits)


def test_guided_logits_are_log_pi_plus_beta_times_the_advantage_of_the_lower_slow_q():
    network = heads_of(ilql.PolicyAndValues(tiny_llama()))
    ids = torch.tensor([PROMPTS[0] + [11]])
    with torch.no_grad():
        guided = ilql.GuidedPolicy(network, 2.5)(ids, logits_to_keep=1).logits[0, -1]
        output = network.model(ids, output_hidden_states=True)
        state = output.hidden_states[-1][0, -1]
        vectors = network.model.get_output_embeddings().weight
        q = torch.stack([head(state) @ vectors.T for head in network.heads.slow_q])
        formula = output.logits[0, -1].log_softmax(0) + 2.5 * (q.min(0).values - network.heads.v(state))
    assert torch.allclose(guided.softmax(0), formula.softmax(0), atol=1e-5)
    # What is sampled by is what is trained: slow Q of the answer's second token, 12.
    values = network(ilql.make_rows(PROMPTS[:1], [GROUPS[0][:1]], "cpu"))
    assert values.slow_q[:, 1].tolist() == pytest.approx(q[:, 12].tolist(), abs=1e-4)


# ---- what is read


def records(data, **flags):
    args = ilql.Args(dataset=str(data), **{"eval_reward": "vader", **flags})
    return ilql.encode_records(args, byte_tokenizer(), [1], ilql.read_records(args, Here))


@pytest.mark.parametrize(
    "row, flags, texts, rewards",
    [
        (dict(prompt="hi", chosen=" yes", rejected=" no"), {}, ["hi yes</s>", "hi no</s>"], [1, -1]),
        (
            dict(chosen=said("hi", "yes"), rejected=said("hi", "no")),
            {},
            [f"<s>user:hi</s><s>assistant:{a}</s>" for a in ("yes", "no")],
            [1, -1],
        ),
        (dict(prompt="hi", completion=" yes", reward=0.25), {}, ["hi yes</s>"], [0.25]),
        (
            dict(q="hi", completion="yes", reward=3),
            dict(prompt_column="q", chat=True),
            ["<s>user:hi</s><s>assistant:yes</s>"],
            [3],
        ),
        (
            dict(prompt=said("hi"), completion=[dict(role="assistant", content="yes")], reward=-2.0),
            {},
            ["<s>user:hi</s><s>assistant:yes</s>"],
            [-2],
        ),
    ],
)
def test_every_format(row, flags, texts, rewards, write_jsonl):
    ((record,),) = records(write_jsonl([row]), **flags).values()
    assert [byte_tokenizer().decode(record.start + ids) for ids in record.answers] == texts
    assert record.rewards == rewards and record.start == record.prompt.ids


def test_rewards_are_the_scorers_and_scaled(write_jsonl, tmp_path):
    (tmp_path / "lengths.py").write_text("def score(completions, **columns):\n    return list(map(len, completions))\n")
    (tmp_path / "none.py").write_text(
        "def score(completions, **columns):\n    return [float('nan')] * len(completions)\n"
    )
    data = write_jsonl([dict(prompt=f"q{i}", chosen="abc", rejected="ab") for i in range(3)])
    for reward, scale, expected in (
        (None, 1, [1, -1]),
        (None, 4, [4, -4]),
        (f"{tmp_path}/lengths.py:score", 2, [6, 4]),
    ):
        args = ilql.Args(dataset=data, eval_prompts=1, reward=reward, reward_scale=scale, eval_reward="vader")
        for part in ilql.load_records(args, Here, byte_tokenizer(), [1]):
            assert [record.rewards for record in part] == [expected] * len(part)
    args = ilql.Args(dataset=data, eval_prompts=1, reward=f"{tmp_path}/none.py:score", eval_reward="vader")
    assert "not a finite number" in stops(ilql.load_records, args, Here, byte_tokenizer(), [1])


def test_missing_columns_are_named(write_jsonl):
    said = stops(records, write_jsonl([dict(prompt="a", chosen="b")]))
    assert "needs chosen and rejected, or completion and reward; it has ['prompt', 'chosen']" in said
    pair = dict(prompt="a", chosen="b", rejected="c")
    assert "needs the columns topic and avoid" in stops(records, write_jsonl([pair]), eval_reward="words")
    assert "no row has a prompt and answers" in stops(records, write_jsonl([pair]), prompt_column="x")
    assert stops(
        ilql.load_records,
        ilql.Args(dataset=write_jsonl([pair]), max_length=2, eval_reward="vader"),
        Here,
        byte_tokenizer(),
        [1],
    ).startswith("--dataset: no rows left")


# ---- the built-in task


@pytest.mark.parametrize(
    "text, words, found",
    [
        ("A cat sat.", ["cat"], True),
        ("CATS sat", ["cat"], True),
        ("The category", ["cat"], False),
        ("concatenate", ["cat"], False),
        ("the cat's tail", ["dog", "cat"], True),
        ("foxes", ["fox", "foxes"], True),
        ("", ["cat"], False),
    ],
)
def test_mentions(text, words, found):
    assert ilql.mentions(text, words) is found
    assert pink_elephants.mentions(text, words) is found


def test_scores_of_words_and_the_same_in_examples():
    columns = dict(topic=["cat"], avoid=["dog"])
    texts = ["cats purr", "dogs bark", "cats and dogs", "hm"]
    prompts = [ilql.Prompt([1], None, columns)] * 4
    scorers = ilql.load_eval_scorers(ilql.Args())
    expected = {"score": [1, 0, 0, 0], "on_topic": [1, 0, 1, 0], "without_avoided": [1, 0, 0, 1]}
    assert {name: scorer(prompts, texts) for name, scorer in scorers.items()} == expected
    rows = dict(topic=[["cat"]] * 4, avoid=[["dog"]] * 4)
    functions = {"score": "both", "on_topic": "on_topic", "without_avoided": "without_avoided"}
    for name, function in functions.items():
        assert getattr(pink_elephants, function)(completions=texts, prompts=None, **rows) == expected[name]
        messages = [[dict(role="assistant", content=text)] for text in texts]
        assert getattr(pink_elephants, function)(completions=messages, **rows) == expected[name]


def test_the_script_that_made_the_pairs():
    whole = make_pink_elephants.whole_sentences
    assert whole("Cats purr. They sl") == "Cats purr." and whole('"Cats purr!" they say') == '"Cats purr!"'
    assert whole("Cats are 3.5 kg") == "" and whole("") == "" and whole("One.\n\nTwo? Three") == "One.\n\nTwo?"
    row = dict(prompt="p", topic=["cat"], avoid=["dog"])
    texts = ["Cats purr.", "Dogs bark.", "Cats purr. And", "Cats nap.", "No.", "A dog and a cat.", "Cats"]
    pairs = make_pink_elephants.pairs_of(row, texts, 2)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [
        ("Cats purr.", "Dogs bark."),
        ("Cats nap.", "A dog and a cat."),
    ]
    assert (
        make_pink_elephants.pairs_of(row, texts, 1) == pairs[:1]
        and make_pink_elephants.pairs_of(row, texts[:1], 2) == []
    )
    rows = make_pink_elephants.make_rows()
    assert len({row["prompt"] for row in rows}) == len(rows) == 40 * 2 * 3


def test_the_built_in_pairs_are_what_they_say_and_held_out_by_subject():
    with gzip.open(ROOT / "data/pink_elephants.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        assert ilql.mentions(row["chosen"], row["topic"]) and not ilql.mentions(row["chosen"], row["avoid"])
        assert ilql.mentions(row["rejected"], row["avoid"])
    train, held_out = ilql.load_records(ilql.Args(), Here, byte_tokenizer(), [1])
    subjects = [{frozenset(r.prompt.columns["topic"]) for r in part} for part in (train, held_out)]
    assert len(held_out) == ilql.Args.eval_prompts and not subjects[0] & subjects[1]
    assert {r.prompt.columns["prompt"] for r in train + held_out} == {row["prompt"] for row in rows}


# ---- whole steps against the formula, one text at a time


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    """Eight pairs with answers of 2 to 60 tokens, all of them in every step."""
    path = tmp_path_factory.mktemp("ilql") / "pairs.jsonl"
    rows = [dict(prompt="q" * (i + 1), chosen="ab" * (i + 1), rejected="cd" * (30 - 4 * i)) for i in range(8)]
    rows = [dict(row, topic=["ab"], avoid=["cd"]) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model {tiny} --dataset {path} --precision fp32 --learning-rate 1e-3 --head-learning-rate 1e-2"
    flags += " --rows-per-step 8 --eval-prompts 0 --max-new-tokens 6 --max-grad-norm 1e9 --betas 0 4 --target-rate 0.5 --warmup-steps 0"
    return flags.split()


def loss_by_hand(network, rows, args):
    """The mean over the tokens of all answers, one text at a time. Also the number of tokens."""
    losses = []
    for row in rows:
        for answer, reward in ((row["chosen"], 1.0), (row["rejected"], -1.0)):
            prompt, ids = (byte_tokenizer()(text)["input_ids"] for text in (row["prompt"], answer))
            ids.append(1)
            output = network.model(torch.tensor([prompt + ids]), output_hidden_states=True)
            states = output.hidden_states[-1][0, len(prompt) - 1 : -1]
            logprobs = output.logits[0, len(prompt) - 1 : -1].log_softmax(1)
            vectors = network.model.get_output_embeddings().weight.detach()
            q = [head(states) @ vectors.T for head in network.heads.q]
            slow_q = [(head(states) @ vectors.T).detach() for head in network.heads.slow_q]
            v = network.heads.v(states)[:, 0]
            for t, a in enumerate(ids):
                target = reward if t == len(ids) - 1 else args.gamma * v[t + 1].item()
                loss = -args.bc_weight * logprobs[t, a]
                for head in q:
                    loss = loss + (head[t, a] - target) ** 2 - args.cql_weight * head[t].log_softmax(0)[a]
                u = min(head[t, a] for head in slow_q) - v[t]
                losses.append(loss + (args.tau if u > 0 else 1 - args.tau) * u**2)
    return torch.stack(losses).mean()


def read_rows(flags):
    return [json.loads(line) for line in Path(flags[flags.index("--dataset") + 1]).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """Four steps with a checkpoint after each, and two rows held out."""
    out = tmp_path_factory.mktemp("ilql") / "a"
    more = ["--eval-prompts", 2, "--total-steps", 4, "--eval-every", 2, "--save-every", 1, "--rows-per-step", 6]
    run_script(ilql, *flags, *more, "--micro-batch-size", 2, "--output-dir", out)
    return out


def network_of(path, args):
    network = ilql.PolicyAndValues(load(path))
    network.heads.load_state_dict(torch.load(Path(path, "trainer_state.pt"))["heads"])
    return network


@pytest.mark.parametrize("how", [1, 2, 8, "two processes"])
def test_a_step_is_the_mean_over_all_its_tokens_however_it_is_divided(how, flags, tiny, tmp_path):
    """The first step: V, both Q and the slow Q are 0."""
    more = ["--total-steps", 1, "--output-dir", tmp_path / "o"]
    if how == "two processes":
        run_in_two_processes(ilql, *flags, *more, "--micro-batch-size", 2)
    else:
        run_script(ilql, *flags, *more, "--micro-batch-size", how)
    torch.manual_seed(1)
    network = ilql.PolicyAndValues(load(tiny))
    loss = loss_by_hand(network, read_rows(flags), ilql.Args())
    trained = [*network.model.parameters(), *network.heads.v.parameters(), *network.heads.q.parameters()]
    gradient = torch.autograd.grad(loss, trained)
    for a, b in zip(moments(tmp_path / "o/final"), gradient, strict=True):
        assert (a / 0.1 - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    assert scalars(tmp_path / "o", "loss/total") == [pytest.approx(loss.item(), rel=1e-5)]
    norm = torch.cat([b.flatten() for b in gradient]).norm().item()
    assert grad_norm(tmp_path / "o") == pytest.approx(norm, rel=1e-4)


def test_a_later_step_is_that_of_the_formula(finished, flags):
    args = ilql.Args(**json.loads((finished / "final/args.json").read_text()))
    train, _ = ilql.load_records(args, Here, byte_tokenizer(), [1])
    prompts = {r.prompt.columns["prompt"] for r in train}
    network = network_of(finished / "checkpoint-2", args)
    assert network.heads.slow_q[0][2].weight.abs().max() > 0
    loss = loss_by_hand(network, [row for row in read_rows(flags) if row["prompt"] in prompts], args)
    trained = [*network.model.parameters(), *network.heads.v.parameters(), *network.heads.q.parameters()]
    gradient = torch.autograd.grad(loss, trained)
    averages = zip(moments(finished / "checkpoint-2"), moments(finished / "checkpoint-3"), gradient, strict=True)
    for before, after, b in averages:
        assert ((after - 0.9 * before) / 0.1 - b).abs().max() < 1e-4 * b.abs().max() + 1e-6
    # The slow heads have gone half of the way to the new ones.
    heads = [network_of(finished / f"checkpoint-{n}", args).heads for n in (2, 3)]
    for before, after, new in zip(heads[0].slow_q.parameters(), heads[1].slow_q.parameters(), heads[1].q.parameters()):
        assert torch.allclose(after, (before + new) / 2, atol=1e-6)


# ---- runs


def test_resume_is_bit_exact(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "p/checkpoint-2")
    monkeypatch.chdir("/")
    run_script(ilql, "--resume", tmp_path / "p/checkpoint-2")
    assert same(tmp_path / "p/final", finished / "final")
    states = [torch.load(path / "final/trainer_state.pt")["heads"] for path in (tmp_path / "p", finished)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    for tag in ("loss/total", "loss/q", "val/v"):
        assert scalars(tmp_path / "p", tag) == scalars(finished, tag)[2:]
    for tag in ("q_correlation", "beta_0/score", "beta_4/ref_nll", "beta_4/response_length"):
        assert scalars(tmp_path / "p", f"eval/{tag}") == scalars(finished, f"eval/{tag}")[-1:]


def test_eval_only_makes_the_same_table(finished, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = sorted(finished.rglob("*"))
    run_script(ilql, "--resume", finished / "final", "--eval-only")
    table = {}
    for line in capsys.readouterr().out.splitlines():
        if "ref_nll" in line:
            title, values = line[:8].strip(), line[8:].split()
            table[title] = dict(zip(values[::2], map(float, values[1::2])))
    assert list(table) == ["before", "beta 0", "beta 4"]
    for title, tag, i in (("before", "beta_4", 0), ("beta 0", "beta_0", -1), ("beta 4", "beta_4", -1)):
        for name, value in table[title].items():
            assert value == pytest.approx(scalars(finished, f"eval/{tag}/{name}")[i], abs=6e-4)
    assert table["beta 0"] != table["beta 4"]
    assert sorted(finished.rglob("*")) == files and list(tmp_path.iterdir()) == []


def test_a_run_learns_to_tell_good_from_bad_and_answers_by_it(tiny, tmp_path):
    """One letter is good, the other bad; both are as frequent."""
    rows = [dict(prompt=f"q{i}", chosen="aaa", rejected="bbb", topic=["a+"], avoid=["b+"]) for i in range(24)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letter.py").write_text(
        "def score(completions, **columns):\n    return [(text.count('a') - text.count('b')) / 3 for text in completions]\n"
    )
    flags = ["--model", tiny, "--dataset", tmp_path / "d.jsonl", "--eval-reward", f"{tmp_path}/letter.py:score"]
    flags += ["--precision", "fp32", "--eval-prompts", 8, "--max-new-tokens", 3, "--total-steps", 40]
    flags += ["--target-rate", 0.2, "--learning-rate", 5e-3, "--head-learning-rate", 1e-2, "--betas", 0, 8]
    run_script(ilql, *flags, "--output-dir", tmp_path / "o")
    plain, guided = (scalars(tmp_path / "o", f"eval/beta_{beta}/score")[-1] for beta in (0, 8))
    assert guided > 0.7 > plain + 0.3
    assert scalars(tmp_path / "o", "eval/q_correlation")[-1] > 0.8


@pytest.mark.parametrize(
    "bad, said",
    [
        (["--rows-per-step", 7], "--micro-batch-size: must divide --rows-per-step"),
        (["--max-length", 3], "--dataset: no rows left; see --max-length"),
        (["--eval-prompts", 8], "--eval-prompts 8 leaves none to train on"),
        (["--tau", 1.5], "--tau 1.5: must be a number from 0 to 1"),
        (["--gamma", "nan"], "--gamma nan: must be a number of 0 or more"),
        (["--betas", -1], "--betas [-1.0]: numbers of 0 or more"),
        (["--betas", "nan"], "--betas [nan]: numbers of 0 or more"),
        (["--eval-prompts", 2, "--max-new-tokens", 600], "--max-length, --max-new-tokens: texts of"),
        (["--resume", "."], "--resume .: no checkpoint"),
    ],
)
def test_bad_input(flags, tmp_path, bad, said):
    assert said in stops(run_script, ilql, *flags, "--output-dir", tmp_path / "o", *bad)

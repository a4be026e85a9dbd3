"""CartPole: golden numbers, what gymnasium does at the end of an episode, PPO's stored actions, runs and resume."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cartpole_pg
from cartpole_pg import (
    MAX_STEPS,
    Agent,
    Args,
    Episodes,
    action_logprobs,
    baseline_advantages,
    clipped_policy_loss,
    clipped_value_loss,
    discounted_returns,
    evaluate_greedy,
    gae_of_episodes,
    learn_ppo,
    learn_reinforce,
    normalise,
    random_stream,
    ratio_statistics,
    reinforce_loss,
    sample_episodes,
)

ROOT = Path(__file__).parent.parent
bools = lambda *rows: torch.tensor(rows).bool()


@pytest.fixture(autouse=True)
def threads():
    """main() takes one thread; the other tests have theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- the maths


def test_discounted_returns_golden():
    rewards = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 2, 3, 4]])
    assert discounted_returns(rewards, 0.5).tolist() == [[1.75, 1.5, 1, 0], [1, 0, 0, 0], [3.25, 4.5, 5, 4]]
    assert discounted_returns(rewards, 1.0)[:, 0].tolist() == [3, 1, 10]


REWARDS, VALUES, MASK = torch.tensor([[1.0, 1, 1]]), torch.tensor([[2.0, 4, 6, 8]]), bools([1, 1, 1])


def test_gae_golden_of_a_truncated_episode_counts_the_value_of_its_last_state():
    # deltas: 1 + 4/2 - 2 = 1;  1 + 6/2 - 4 = 0;  1 + 8/2 - 6 = -1;  gamma * lam = 1/4
    advantages = gae_of_episodes(REWARDS, VALUES, bools([0, 0, 0]), MASK, 0.5, 0.5)
    assert advantages.tolist() == [[1 + 0.25 * -0.25, -0.25, -1]]


def test_gae_golden_of_a_terminated_episode_does_not():
    # the last delta: 1 + 0 - 6 = -5
    advantages = gae_of_episodes(REWARDS, VALUES, bools([0, 0, 1]), MASK, 0.5, 0.5)
    assert advantages.tolist() == [[1 + 0.25 * -1.25, -1.25, -5]]


def test_gae_with_lambda_1_is_the_return_less_the_value_and_with_0_one_step():
    terminated = bools([0, 0, 1])
    whole = gae_of_episodes(REWARDS, VALUES, terminated, MASK, 0.9, 1.0)
    assert torch.allclose(whole + VALUES[:, :-1], discounted_returns(REWARDS, 0.9))
    whole = gae_of_episodes(REWARDS, VALUES, bools([0, 0, 0]), MASK, 0.9, 1.0)
    assert torch.allclose(whole + VALUES[:, :-1], discounted_returns(torch.tensor([[1, 1, 1 + 0.9 * 8]]), 0.9))
    assert torch.allclose(gae_of_episodes(REWARDS, VALUES, terminated, MASK, 0.9, 0.0), torch.tensor([[2.6, 2.4, -5]]))


def test_gae_ignores_what_follows_the_end():
    """A short episode beside a long one: its padding holds the values of other episodes."""
    rewards, mask = torch.tensor([[1.0, 1, 0, 0]]), bools([1, 1, 0, 0])
    for terminated in (bools([0, 0, 0, 0]), bools([0, 1, 0, 0])):
        a, b = (
            gae_of_episodes(rewards, torch.tensor([[2.0, 3, 4, x, -x]]), terminated, mask, 0.9, 0.8) for x in (0.0, 7.0)
        )
        assert torch.equal(a, b) and a[0, 2:].tolist() == [0, 0]
        assert torch.equal(
            a[:, :2],
            gae_of_episodes(rewards[:, :2], torch.tensor([[2.0, 3, 4]]), terminated[:, :2], mask[:, :2], 0.9, 0.8),
        )


def test_baseline_advantages_golden():
    returns, mask = torch.tensor([[3.0, 2, 1], [1, 0, 0]]), bools([1, 1, 1], [1, 0, 0])
    # less the column means 2, 1, 0.5:  1, 1, 0.5 and -1 on real steps, root mean square sqrt(3.25 / 4); and 0.001
    expected = torch.tensor([[1, 1, 0.5], [-1, -1, -0.5]]) / ((3.25 / 4) ** 0.5 + 1e-3)
    assert torch.allclose(baseline_advantages(returns, mask), expected)
    same = discounted_returns(torch.ones(5, 500), 0.99)  # all reach step 500: nothing is better or worse
    assert baseline_advantages(same, torch.ones(5, 500).bool()).abs().max() < 1e-2


def test_normalise_golden_and_of_one_value():
    assert normalise(torch.tensor([1.0, 3])).tolist() == pytest.approx([-1, 1])  # biased: the standard deviation is 1
    assert normalise(torch.tensor([5.0])).tolist() == [0]


def test_reinforce_loss_golden_and_sign():
    logprobs, advantages = torch.tensor([-1.0, -3], requires_grad=True), torch.tensor([2.0, -1])
    loss = reinforce_loss(logprobs, advantages)
    loss.backward()
    assert loss.item() == -0.5 * (2 * -1 + -1 * -3)
    assert logprobs.grad.tolist() == [-1, 0.5]  # descent: a good action goes up, a bad one down


def test_expected_gradient_is_that_of_the_exact_objective():
    """Both actions of one state, weighed by their probability; PPO's loss at ratio 1 has the same gradient."""
    logits, rewards = (
        torch.tensor([[0.3, -0.5]], dtype=torch.float64, requires_grad=True),
        torch.tensor([2.0, 7.0]).double(),
    )
    exact = torch.autograd.grad(-(logits.softmax(1)[0] @ rewards), logits)[0]
    for baseline in (0.0, 4.0):
        for loss in (reinforce_loss, lambda x, a: clipped_policy_loss(x, x.detach(), a, 0.2)):
            logprobs = [action_logprobs(logits, torch.tensor([a]))[0] for a in (0, 1)]
            expected = sum(x.detach().exp()[0] * loss(x, rewards[a : a + 1] - baseline) for a, x in enumerate(logprobs))
            assert torch.allclose(torch.autograd.grad(expected, logits)[0], exact)


def test_action_logprobs_golden():
    logits = torch.tensor([[0.0, np.log(3)], [5, 5]])
    logprobs, entropy = action_logprobs(logits, torch.tensor([1, 0]))
    assert logprobs.exp().tolist() == pytest.approx([0.75, 0.5])
    assert entropy.tolist() == pytest.approx([0.75 * np.log(4 / 3) + 0.25 * np.log(4), np.log(2)])


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),
        (0.5, 2.0, -1.0, True),  # a good action: no gain above 1.2
        (0.9, -2.0, 1.8, True),
        (0.5, -2.0, 1.6, False),
        (1.5, -2.0, 3.0, True),
    ],
)  # a bad one: none below 0.8
def test_clipped_policy_loss_golden(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([np.log(ratio)], requires_grad=True)
    value = clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss) and (logprobs.grad.item() != 0) == gradient


def test_clipped_value_loss_golden():
    returns, old = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    values = torch.tensor([1.1, 1.6, 1.6], requires_grad=True)
    loss = clipped_value_loss(values, old, returns, 0.2)
    loss.backward()
    # within the clip: 0.9^2; past it, towards the return: 0.8^2 of the clipped one, no gradient; away from it: 1.6^2
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 2.56) / 3)
    assert values.grad.tolist() == pytest.approx([-0.3, 0, 1.6 / 3])


def test_ratio_statistics_golden():
    statistics = ratio_statistics(torch.tensor([1.5, 0.9]).log(), torch.zeros(2), 0.2)
    assert statistics["policy/clipfrac"].item() == 0.5
    assert statistics["policy/approxkl"].item() == pytest.approx((0.5 - np.log(1.5) - 0.1 - np.log(0.9)) / 2)


# ---- episodes


def play(num_envs=6, seed=3, policy=None, envs=None):
    torch.manual_seed(0)
    envs = envs or gymnasium.make_vec("CartPole-v1", num_envs, "vector_entry_point")
    uniforms = torch.rand(MAX_STEPS, num_envs, generator=random_stream(seed))
    return sample_episodes(envs, policy or Agent(8).policy, uniforms, seed)


class Balance(torch.nn.Module):
    """A controller that keeps the pole up for good (on the rows it is for)."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = rows

    def forward(self, s):
        push = s @ torch.tensor([0.05, 0.3, 1.0, 0.5]) * 1e4
        push[[i for i in range(len(s)) if self.rows and i not in self.rows]] = 1e4  # always right: falls in ten steps
        return torch.stack([-push, push], 1)


def test_rewards_sum_to_the_return_exactly_as_gymnasium_counts_it_and_as_a_single_environment_plays_it():
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(gymnasium.make_vec("CartPole-v1", 6, "vector_entry_point"))
    counted, step = {}, envs.step

    def watched(actions):
        result = step(actions)
        for i in np.flatnonzero(result[4].get("_episode", [])):
            counted.setdefault(i, (result[4]["episode"]["r"][i], result[4]["episode"]["l"][i]))
        return result

    envs.step = watched
    observations, actions, rewards, terminated, mask = play(envs=envs)
    returns, lengths = rewards.sum(1), mask.sum(1)
    assert [counted[i] for i in range(6)] == list(zip(returns.tolist(), lengths.tolist()))
    assert torch.equal(rewards, mask.float()) and observations.shape == (6, lengths.max() + 1, 4)
    for row in range(6):
        env = gymnasium.make("CartPole-v1")
        env.reset()
        env.unwrapped.state = observations[row, 0].double().numpy()
        for t in range(lengths[row]):
            observation, reward, single_terminated, _, _ = env.step(actions[row, t].item())
            assert reward == rewards[row, t] and single_terminated == terminated[row, t]
            assert np.allclose(observation, observations[row, t + 1], atol=1e-4)
        assert single_terminated


def test_the_reset_step_and_what_follows_are_masked_and_the_last_state_is_the_one_that_fell():
    observations, actions, rewards, terminated, mask = play(policy=Balance(0, 1))
    lengths = mask.sum(1)
    assert lengths[:2].tolist() == [500, 500] and lengths[2:].max() < 20
    for row in range(2, 6):
        end = lengths[row].item()
        assert mask[row, :end].all() and not mask[row, end:].any()  # one episode, no gap
        assert terminated[row].nonzero().tolist() == [[end - 1]] and not rewards[row, end:].any()
        angles = observations[row, :, 2].abs()
        assert angles[end] > 0.2094 > angles[:end].max()  # 12 degrees: the state after the last step has fallen
        assert angles[end + 1] <= 0.05  # NEXT_STEP autoreset: the masked step after it is the reset
        assert observations[row, :, 2].abs()[end + 2 :].max() > 0.2094  # and other episodes follow, masked


def test_the_500th_step_truncates_and_its_state_is_bootstrapped():
    observations, actions, rewards, terminated, mask = play(policy=Balance())
    assert mask.all() and mask.shape == (6, 500) and not terminated.any() and rewards.sum(1).tolist() == [500.0] * 6
    assert (observations[:, -1, 2].abs() < 0.2094).all() and (
        observations[:, -1] - observations[:, 0]
    ).abs().max() > 1e-3
    values = torch.arange(501.0).expand(6, -1)
    advantages = gae_of_episodes(rewards, values, terminated, mask, 0.9, 0.9)
    assert advantages[:, -1].tolist() == pytest.approx([1 + 0.9 * 500 - 499] * 6)


def test_a_pole_that_falls_on_the_500th_step_is_terminated():
    """Both flags are set then; it is the fall that counts."""
    envs = gymnasium.make_vec(
        "CartPole-v1", 2, "vector_entry_point", max_episode_steps=9
    )  # always right: falls in 9 or 10
    seeds = {tuple(x.sum(1).tolist()) for x in (play(2, s, Balance(99), envs).terminated for s in range(20))}
    assert (1, 1) in seeds and (0, 0) in seeds


def test_actions_are_sampled_from_the_policy_and_half_is_greedy():
    class Fixed(torch.nn.Module):
        def forward(self, s):
            return torch.tensor([[0.3, 0.7]]).log().expand(len(s), 2)

    _, actions, _, _, mask = play(400, policy=Fixed())
    share, n = actions[mask].float().mean().item(), mask.sum().item()
    assert abs(share - 0.7) < 4 * (0.21 / n) ** 0.5
    envs = gymnasium.make_vec("CartPole-v1", 2, "vector_entry_point")
    assert sample_episodes(envs, Fixed(), torch.full((500, 2), 0.5), 1).actions.all()


def test_the_environment_that_never_ends_is_refused():
    envs = gymnasium.make_vec("CartPole-v1", 2, "vector_entry_point", max_episode_steps=1000)
    with pytest.raises(SystemExit, match="2 episodes did not end in 500 steps"):
        play(2, policy=Balance(), envs=envs)


# ---- learning


def learner(**flags):
    torch.manual_seed(1)
    args = Args(**{"num_envs": 6, "hidden": 16, **flags})
    agent = Agent(args.hidden)
    return args, agent, torch.optim.Adam(agent.parameters(), args.learning_rate)


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.parameters()])


@pytest.mark.parametrize("learn", [learn_reinforce, lambda *x: learn_ppo(*x, 0)])
def test_masked_steps_are_never_trained_on(learn):
    """Whatever stands in the padding, the update is the same to the last bit."""
    batch = play(policy=Balance(0))
    observations, actions, rewards, terminated, mask = (x.clone() for x in batch)
    observations[:, 1:][~mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]] = (
        9.0  # not the last state of an episode
    )
    actions[~mask] = 1 - actions[~mask]
    results = []
    for data in (batch, Episodes(observations, actions, rewards, terminated, mask)):
        args, agent, optimizer = learner()
        learn(args, agent, optimizer, data)
        results.append(weights(agent))
    assert torch.equal(*results)


def test_ppo_starts_at_ratio_1_and_its_first_minibatch_clips_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(cartpole_pg, "ratio_statistics", lambda *x: seen.append(ratio_statistics(*x)) or seen[-1])
    args, agent, optimizer = learner()
    learn_ppo(args, agent, optimizer, play(policy=agent.policy), 0)
    assert len(seen) == args.epochs * args.minibatches
    assert abs(seen[0]["policy/approxkl"].item()) < 1e-6 and seen[0]["policy/clipfrac"].item() == 0
    assert seen[-1]["policy/approxkl"].item() > 1e-6


def test_ppo_evaluates_the_stored_actions_in_every_epoch(monkeypatch):
    """The mistake of a known notebook, new actions in the epochs, is impossible: nothing is sampled while learning, and
    each minibatch's log-probabilities are those of the stored actions of its very states."""
    batch, calls = play(policy=Balance(0)), []
    observations, actions, _, _, mask = batch
    states, stored = observations[:, :-1][mask], actions[mask]

    def watched(logprobs, old_logprobs, advantages, clip):
        calls.append((logprobs.detach(), old_logprobs))
        return clipped_policy_loss(logprobs, old_logprobs, advantages, clip)

    monkeypatch.setattr(cartpole_pg, "clipped_policy_loss", watched)
    args, agent, optimizer = learner(epochs=3, minibatches=2)
    snapshots, real_update = [], cartpole_pg.update

    def update(*x):
        snapshots.append({n: w.clone() for n, w in agent.state_dict().items()})
        return real_update(*x)

    monkeypatch.setattr(cartpole_pg, "update", update)
    for sampler in ("rand", "multinomial", "bernoulli"):
        monkeypatch.setattr(torch, sampler, lambda *x, **y: pytest.fail("sampled while learning"))
    monkeypatch.setattr(torch.distributions.Categorical, "sample", lambda *x: pytest.fail("sampled while learning"))
    monkeypatch.setattr(cartpole_pg, "sample_episodes", lambda *x: pytest.fail("sampled while learning"))
    before = agent.policy(states).log_softmax(1).gather(1, stored[:, None])[:, 0].detach()
    learn_ppo(args, agent, optimizer, batch, step=7)
    assert len(calls) == len(snapshots) == 6
    for n, (logprobs, old_logprobs) in enumerate(calls):
        i = torch.randperm(len(stored), generator=random_stream("minibatches", args.seed, 7, n // 2)).chunk(2)[n % 2]
        agent.load_state_dict(snapshots[n])
        expected = agent.policy(states[i]).log_softmax(1).gather(1, stored[i][:, None])[:, 0]
        assert torch.allclose(logprobs, expected, atol=1e-6) and torch.allclose(old_logprobs, before[i], atol=1e-6)


@pytest.mark.parametrize("learn", [learn_reinforce, lambda *x: learn_ppo(*x, 0)])
def test_the_action_that_lived_longer_becomes_likelier(learn):
    """Row 0 pushed right and lived on, row 1 pushed left and fell: stored actions swapped, the lesson is swapped."""
    observations = torch.zeros(2, 9, 4)
    mask, terminated = bools([1] * 8, [1] + [0] * 7), bools([0] * 7 + [1], [1] + [0] * 7)
    actions = torch.tensor([[1] + [0, 1] * 3 + [0], [0] * 8])  # after the first step no more of one than of the other
    for data, sign in ((actions, 1), (1 - actions, -1)):
        args, agent, optimizer = learner()
        learn(args, agent, optimizer, Episodes(observations, data, mask.float(), terminated, mask))
        left, right = agent.policy(torch.zeros(1, 4))[0].tolist()
        assert (right - left) * sign > 0


# ---- runs

TOY = ["--num-envs", 4, "--total-steps", 6, "--save-every", 1, "--hidden", 16, "--eval-episodes", 5]


def run(*flags):
    argv, sys.argv = sys.argv, [cartpole_pg.__file__, *map(str, flags)]
    try:
        return cartpole_pg.main(cartpole_pg.parse_flags())
    finally:
        sys.argv = argv


def state(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Every weight and every number of the optimizer, and the run's counters."""
    a, b = state(a), state(b)
    moments = lambda x: [
        value for i in sorted(x["optimizer"]["state"]) for value in x["optimizer"]["state"][i].values()
    ]
    return (
        all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])
        and len(moments(a)) == len(moments(b)) > 0
        and all(map(torch.equal, moments(a), moments(b)))
        and all(a[name] == b[name] for name in ("done", "env_steps", "recent"))
    )


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module", params=["reinforce", "ppo"])
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("cartpole") / request.param
    command = [sys.executable, ROOT / "cartpole_pg.py", "--algo", request.param, *TOY, "--output-dir", out]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result


def test_a_run_logs_every_curve_and_prints_the_table(finished):
    out, result = finished
    assert sorted(p.name for p in out.glob("*.pt")) == [*(f"checkpoint-{n}.pt" for n in range(1, 7)), "final.pt"]
    assert "NOT solved after 6 steps" in result.stdout and "last_100=" in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["return", "training,", "greedy"]
    assert (
        result.stdout.splitlines()[2].split()[3] == "24" and result.stdout.splitlines()[3].split()[1] == "5"
    )  # episodes
    curves = scalars(out)
    expected = {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/last_100",
        "charts/SPS",
        "charts/learning_rate",
        "loss/policy",
        "policy/entropy",
        "policy/grad_norm",
        "eval/episodic_return",
    }
    ppo = {"loss/value", "policy/approxkl", "policy/clipfrac"}
    assert set(curves) == expected | (ppo if out.name == "ppo" else set())
    assert [e.value for e in curves["charts/learning_rate"]] == pytest.approx([0.01 * (1 - i / 6) for i in range(6)])
    assert curves["charts/episodic_return"][-1].step == state(out / "final.pt")["env_steps"]
    for mean, length in zip(curves["charts/episodic_return"], curves["charts/episodic_length"]):
        assert mean.value == length.value  # reward 1 a step
    assert curves["charts/last_100"][-1].value == pytest.approx(sum(state(out / "final.pt")["recent"]) / 24)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, tmp_path, capsys):
    out, result = finished
    run("--algo", out.name, *TOY, "--output-dir", tmp_path / "a")
    assert same(out / "final.pt", tmp_path / "a/final.pt")
    assert capsys.readouterr().out.splitlines()[1:] == result.stdout.splitlines()[1:]
    run("--algo", out.name, *TOY, "--output-dir", tmp_path / "b", "--seed", 2)
    assert not same(out / "final.pt", tmp_path / "b/final.pt")


@pytest.mark.parametrize("step", range(1, 7))
def test_resume_from_any_step_is_bit_exact(finished, tmp_path, step):
    shutil.copy(finished[0] / f"checkpoint-{step}.pt", tmp_path)
    run("--resume", tmp_path / f"checkpoint-{step}.pt")  # the flags come from the checkpoint
    assert same(finished[0] / "final.pt", tmp_path / "final.pt")
    for n in range(step + 1, 7):
        assert same(finished[0] / f"checkpoint-{n}.pt", tmp_path / f"checkpoint-{n}.pt")


def test_a_run_that_reaches_stop_at_keeps_the_weights_that_did_it_and_resumes_to_its_table(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        cartpole_pg, "evaluate_greedy", lambda *x: torch.ones(5) * {"stopping": 6, "evaluation": 7}[x[-1]]
    )
    flags = [
        "--algo",
        "reinforce",
        "--num-envs",
        50,
        "--hidden",
        16,
        "--eval-episodes",
        5,
        "--save-every",
        1,
        "--total-steps",
        9,
    ]
    run(*flags, "--stop-at", 1, "--output-dir", tmp_path / "a")  # two batches make a hundred episodes
    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith("NOT solved after 2 steps")
    one, final = state(tmp_path / "a/checkpoint-1.pt"), state(tmp_path / "a/final.pt")
    assert all(torch.equal(one["agent"][n], w) for n, w in final["agent"].items()) and len(final["recent"]) == 100
    run("--resume", tmp_path / "a/final.pt")
    again = capsys.readouterr().out.splitlines()
    assert again[0].startswith("NOT solved after 2 steps") and again[1:] == first[1:]
    assert state(tmp_path / "a/final.pt")["done"] == 2
    run(
        *flags, "--stop-at", 7, "--output-dir", tmp_path / "b"
    )  # the training episodes are that good, the greedy ones not
    assert capsys.readouterr().out.startswith("NOT solved after 9 steps")


def test_bad_input_is_one_line_that_names_the_flag(finished, tmp_path, monkeypatch):
    for flags, said in [
        (["--num-envs", 1], "--num-envs 1: must be 2 or more"),
        (["--learning-rate", "nan"], "--learning-rate nan: must be 0"),
        (["--max-grad-norm", -1], "--max-grad-norm -1.0: must be 1e-06"),
        (["--gamma", 1.1], "--gamma 1.1: must be 1 or less"),
        (["--lam", -1], "--lam -1"),
        (["--epochs", 0], "--epochs 0"),
        (["--eval-episodes", 0], "--eval-episodes 0"),
        (["--resume", tmp_path / "none.pt"], "no checkpoint of cartpole_pg.py"),
        (["--output-dir", finished[0]], "in use"),
        (["--output-dir", finished[0] / "final.pt"], "in use"),
        (["--resume", finished[0] / "final.pt", "--hidden", 8], "--hidden are this checkpoint's"),
        (
            ["--resume", finished[0] / "final.pt", "--algo", "ppo" if finished[0].name == "reinforce" else "reinforce"],
            "--algo",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        assert said in str(stop.value) and "\n" not in str(stop.value)
    monkeypatch.setattr(cartpole_pg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"--capture-video: needs gymnasium\[classic-control\] and moviepy: pip install"
    ):
        run(*TOY, "--capture-video", "--output-dir", tmp_path / "v")


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cartpole_pg, "reinforce_loss", lambda logprobs, a: logprobs.sum() * float("nan"))
    with pytest.raises(SystemExit, match="--learning-rate"):
        run(*TOY, "--algo", "reinforce", "--output-dir", tmp_path / "o")


def test_a_checkpoint_appears_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    (tmp_path / "o").mkdir()
    shutil.copy(finished[0] / "checkpoint-1.pt", tmp_path / "o")
    real, before = torch.save, (tmp_path / "o/checkpoint-1.pt").read_bytes()

    def breaks(value, path):
        real(value, path)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(cartpole_pg.torch, "save", breaks)
    with pytest.raises(OSError, match="No space left on device"):
        run("--resume", tmp_path / "o/checkpoint-1.pt")
    assert [p.name for p in (tmp_path / "o").glob("*pt*")] == ["checkpoint-1.pt"]
    assert (tmp_path / "o/checkpoint-1.pt").read_bytes() == before and not list((tmp_path / "o").glob(".new*"))


def test_video(tmp_path):
    pytest.importorskip("pygame")
    pytest.importorskip("moviepy")
    run(*TOY, "--total-steps", 1, "--capture-video", "--output-dir", tmp_path / "o")
    assert [p.stat().st_size > 1000 for p in (tmp_path / "o/videos").glob("*.mp4")] == [True]


def test_alone_in_an_empty_folder_it_explains_itself(tmp_path):
    shutil.copy(ROOT / "cartpole_pg.py", tmp_path)
    result = subprocess.run(
        [sys.executable, "cartpole_pg.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0
    for field in Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in result.stdout


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_it_solves_cartpole(algo, tmp_path):
    run("--algo", algo, "--output-dir", tmp_path)
    final = state(tmp_path / "final.pt")
    assert sum(final["recent"]) / 100 >= 475 and final["done"] < 60
    args = Args(seed=77)
    agent = Agent(args.hidden)
    agent.load_state_dict(final["agent"])
    assert evaluate_greedy(args, agent, "a third time").mean() >= 490

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium>=1.0", "numpy>=2.0", "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.66"]
# ///
"""REINFORCE and PPO on CartPole: the algorithms of reinforce.py and ppo.py where a run takes seconds.

A cart balances a pole. A state is 4 numbers; an action pushes the cart to the left or to the right. Each step
pays the reward 1 until the pole falls (the episode is terminated) or 500 steps are over (it is truncated).
A training step samples N episodes and learns from them. REINFORCE makes one update:
    G_t  = r_t + gamma * G_{t+1}                  return from step t on; 0 after the episode
    A_t  = (G_t - b_t) / s                        advantage; baseline b_t: mean G_t of the episodes; s: spread
    loss = - mean of A_t * log pi(a_t | s_t)      pi: the policy
PPO makes several updates with the same actions. It also learns V(s), the return to expect from a state:
    d_t  = r_t + gamma * V(s_{t+1}) - V(s_t)      V(s_{t+1}) is 0 if terminated, not if truncated
    A_t  = d_t + gamma * lam * A_{t+1}            GAE; in the loss with mean 0 and standard deviation 1
    loss = - mean of min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t)    rho_t = pi / pi_old of a_t
           + vf_coef * mean of 1/2 (V(s_t) - G_t)^2, clipped too            G_t = A_t + V_old(s_t)
Both subtract entropy_coef * the entropy of pi, so that it keeps trying both actions.
Williams 1992; Schulman et al. 2016, 2017, arXiv 1506.02438 and 1707.06347.

    python cartpole_pg.py --algo reinforce
    python cartpole_pg.py --algo ppo --seed 2 --capture-video
    python cartpole_pg.py --resume runs/cartpole_pg__1__1767225600123/checkpoint-10.pt

The default run: 1 to 3 s on one core, to a mean return of 490; 475 counts as solved.
An episode is here what a response is to a language model: its steps are the tokens.
Left out on purpose: other environments, several processes, rollouts of a fixed length, a target KL.
Shapes: N episodes of at most T steps, right-padded, with a mask; M steps in all without the padding.
"""

import importlib.util
import json
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MAX_STEPS = 500  # the longest episode of CartPole-v1
SOLVED = 475  # the mean return of 100 episodes that counts as solved


@dataclass
class Args:
    algo: Literal["reinforce", "ppo"] = "ppo"  # the algorithm
    num_envs: int = 32  # environments, and so episodes per training step
    total_steps: int = 100  # training steps at most
    stop_at: float = 490  # stop when the last 100 training episodes and then greedy ones average this
    learning_rate: float = 0.01  # of Adam at the first step; then linear to 0
    gamma: float = 0.99  # discount of the reward per step of an episode
    entropy_coef: float = 0.01  # weight of the entropy in the loss
    max_grad_norm: float = 0.5  # a larger gradient is scaled down to this norm
    lam: float = 0.98  # ppo: lambda of GAE; 1: the whole return, 0: only the next value
    epochs: int = 2  # ppo: passes over the batch
    minibatches: int = 8  # ppo: updates per pass
    clip: float = 0.2  # ppo: the ratio of new to old probability counts up to 1 +- this
    value_clip: float = 0.2  # ppo: a value may move this far per training step; returns are scaled to 1
    vf_coef: float = 0.5  # ppo: weight of the value loss
    hidden: int = 64  # units in each of the two layers of policy and value network
    eval_episodes: int = 100  # greedy episodes: those that may stop the run, and those at its end
    capture_video: bool = False  # film one greedy episode at the end, into <output dir>/videos
    save_every: int = 10  # training steps between checkpoints; the last is saved as final.pt
    resume: str | None = None  # go on from this checkpoint, bit-exactly; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/cartpole_pg__<seed>__<time>
    seed: int = 1  # of weights, start states, actions and minibatches


def parse_flags() -> Args:
    """The flags, checked before anything runs. With --resume, the checkpoint's are the defaults."""
    args = tyro.cli(Args)
    if args.resume is not None:
        checkpoint = Path(args.resume).resolve()
        if not checkpoint.is_file():
            sys.exit(f"--resume {args.resume}: no checkpoint of cartpole_pg.py; give a checkpoint-<step>.pt")
        saved = torch.load(checkpoint, weights_only=True)["args"]
        saved["output_dir"] = str(checkpoint.parent)
        args = tyro.cli(Args, default=Args(**saved))
        args.resume = str(checkpoint)
        if args.algo != saved["algo"] or args.hidden != saved["hidden"]:
            sys.exit(f"--resume {args.resume}: --algo and --hidden are this checkpoint's, they stay")
    elif args.output_dir is not None:
        path = Path(args.output_dir)
        if path.is_file() or any(path.glob("*")):
            sys.exit(f"--output-dir {path}: in use; name another, or --resume a checkpoint in it")

    lowest = {"num_envs": 2, "total_steps": 1, "learning_rate": 0, "gamma": 0, "entropy_coef": 0, "lam": 0}
    lowest |= {"max_grad_norm": 1e-6, "epochs": 1, "minibatches": 1, "clip": 0, "value_clip": 0}
    lowest |= {"vf_coef": 0, "hidden": 1, "eval_episodes": 1, "save_every": 1}
    for name, least in lowest.items():
        value = getattr(args, name)
        if not value >= least:  # nan is refused too
            sys.exit(f"--{name.replace('_', '-')} {value}: must be {least} or more")
        if name in ("gamma", "lam") and value > 1:
            sys.exit(f"--{name} {value}: must be 1 or less")
    missing = [name for name in ("pygame", "moviepy") if importlib.util.find_spec(name) is None]
    if args.capture_video and missing:
        sys.exit("--capture-video: needs gymnasium[classic-control] and moviepy: pip install both")
    return args


def random_stream(*key) -> torch.Generator:
    """Random numbers that depend on `key` alone, so that a resumed run needs no saved state."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---- Model ----
def make_network(hidden, outputs, last_gain) -> torch.nn.Sequential:
    """4 -> hidden -> hidden -> outputs, tanh between. Orthogonal weights, times a gain; biases 0."""
    first = torch.nn.Linear(4, hidden)
    second = torch.nn.Linear(hidden, hidden)
    last = torch.nn.Linear(hidden, outputs)
    for layer, gain in ((first, 2**0.5), (second, 2**0.5), (last, last_gain)):
        torch.nn.init.orthogonal_(layer.weight, gain)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Tanh(), last)


class Agent(torch.nn.Module):
    """The policy gives the logits of both actions in a state; the value network, for PPO alone, its value."""

    def __init__(self, hidden):
        super().__init__()
        self.policy = make_network(hidden, 2, last_gain=0.01)  # at first both actions are about as likely
        self.value = make_network(hidden, 1, last_gain=1.0)


# ---- Sampling ----
class Episodes(NamedTuple):
    """An episode of each of N environments, right-padded to the T steps of the longest.

    Until that is over, the other environments go on with new episodes: the mask is False there.
    """

    observations: torch.Tensor  # (N, T + 1, 4) states: step t leads from [:, t] to [:, t + 1]
    actions: torch.Tensor  # (N, T) 0: left, 1: right
    rewards: torch.Tensor  # (N, T) 0 where mask is False
    terminated: torch.Tensor  # (N, T) True on the step by which the pole fell
    mask: torch.Tensor  # (N, T) True up to the last step of the episode and on it


@torch.no_grad()
def sample_episodes(envs, policy, uniforms, seed) -> Episodes:
    """An episode of each environment; the seed gives their start states.

    uniforms: (MAX_STEPS, N) numbers in [0, 1), all the randomness of the actions. A number below pi(left | s)
    means left, any other right; so 0.5 picks the likelier action.
    """
    observation, _ = envs.reset(seed=seed)
    observations = [observation]
    actions, rewards, terminated, mask = [], [], [], []
    running = np.ones(envs.num_envs, dtype=bool)  # the environments whose episode has not ended
    for t in range(MAX_STEPS):
        probs = policy(torch.from_numpy(observation)).softmax(1)  # (N, 2)
        action = (uniforms[t] >= probs[:, 0]).long().numpy()
        # After an episode's last step this is the state it ended in: gymnasium resets one step later.
        observation, reward, fell, time_over, _ = envs.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward * running)
        terminated.append(fell & running)
        mask.append(running)
        running = running & ~fell & ~time_over
        if not running.any():
            break
    if running.any():
        sys.exit(f"{running.sum()} episodes did not end in {MAX_STEPS} steps: is this CartPole-v1?")
    columns = (observations, actions, rewards, terminated, mask)
    return Episodes(*[torch.from_numpy(np.stack(column, axis=1)) for column in columns])


# ---- Both algorithms ----
def action_logprobs(logits, actions) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, 2), (M,) -> 2 x (M,): log pi(a | s) of the actions that were taken, and the entropy of pi(. | s)."""
    logprobs = logits.log_softmax(1)
    taken = logprobs.gather(1, actions[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(1)
    return taken, entropy


def discounted_returns(rewards, gamma) -> torch.Tensor:
    """(N, T) -> (N, T): G_t = r_t + gamma * G_{t+1}. After an episode's end the rewards must be 0."""
    returns = torch.zeros_like(rewards)
    following = 0
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * following
        returns[:, t] = following
    return returns


def update(args, agent, optimizer, loss) -> torch.Tensor:
    """One step of the optimizer. Returns the norm of the gradient before it is cut to --max-grad-norm."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    if not grad_norm.isfinite():
        sys.exit(f"loss {loss.item()}, gradient {grad_norm}: lower --learning-rate, or --resume")
    optimizer.step()
    return grad_norm


# ---- REINFORCE ----
def baseline_advantages(returns, mask) -> torch.Tensor:
    """2 x (N, T) -> (N, T): A_t = (G_t - b_t) / s, with s the root mean square of G_t - b_t.

    The baseline b_t is the mean of G_t over the N episodes; in one that has ended G_t is 0. But for 1 / N, its
    own share, it does not depend on the action: the expected gradient keeps its direction. Without it all
    actions near step 500 would look bad.
    """
    advantages = returns - returns.mean(0)
    spread = advantages[mask].square().mean().sqrt()
    return advantages / (spread + 1e-3)  # if all returns are equal: 0, not rounding errors


def reinforce_loss(logprobs, advantages) -> torch.Tensor:
    """2 x (M,) -> scalar: - mean A log pi(a | s). Each step is an action of its own. Williams 1992."""
    return -(logprobs * advantages).mean()


def learn_reinforce(args, agent, optimizer, episodes) -> dict[str, float]:
    """One update on a batch of episodes. Returns what to log."""
    mask = episodes.mask
    states = episodes.observations[:, :-1][mask]  # (M, 4)
    returns = discounted_returns(episodes.rewards, args.gamma)
    advantages = baseline_advantages(returns, mask)[mask]
    logprobs, entropy = action_logprobs(agent.policy(states), episodes.actions[mask])
    policy_loss = reinforce_loss(logprobs, advantages)
    grad_norm = update(args, agent, optimizer, policy_loss - args.entropy_coef * entropy.mean())
    return {
        "loss/policy": policy_loss.item(),
        "policy/entropy": entropy.mean().item(),  # nats
        "policy/grad_norm": grad_norm.item(),
    }


# ---- PPO ----
def gae_of_episodes(rewards, values, terminated, mask, gamma, lam) -> torch.Tensor:
    """(N, T), (N, T + 1), 2 x (N, T) -> (N, T): A_t = d_t + gamma lam A_{t+1}, 0 after an episode's end.

    d_t = r_t + gamma V(s_{t+1}) - V(s_t), with 0 for V(s_{t+1}) if the pole has fallen. If it still stands at
    step 500 (truncated), V(s_{t+1}) counts. Schulman et al. 2016, arXiv 1506.02438.
    """
    next_values = values[:, 1:] * ~terminated
    deltas = (rewards + gamma * next_values - values[:, :-1]) * mask
    return discounted_returns(deltas, gamma * lam)  # the same recursion


def normalise(values) -> torch.Tensor:
    """(M,) -> (M,): mean 0, standard deviation 1 (biased: the unbiased one of a single value is NaN)."""
    return (values - values.mean()) / (values.std(unbiased=False) + 1e-8)


def clipped_policy_loss(logprobs, old_logprobs, advantages, clip) -> torch.Tensor:
    """3 x (M,) -> scalar: - mean min(rho A, clip(rho, 1 - clip, 1 + clip) A), with rho = pi / pi_old.

    Nothing is gained by moving rho further from 1 than clip. Schulman et al. 2017, arXiv 1707.06347, eq. 7.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def clipped_value_loss(values, old_values, returns, clip) -> torch.Tensor:
    """3 x (M,) -> scalar: mean 1/2 max((V - G)^2, (V_clip - G)^2), V_clip = V within V_old +- clip (CleanRL)."""
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped_values - returns) ** 2).mean()


def ratio_statistics(logprobs, old_logprobs, clip) -> dict[str, torch.Tensor]:
    """2 x (M,) -> 2 scalars: the mean of rho - 1 - log rho, an estimate of the KL; the share of clipped rho."""
    log_ratio = logprobs - old_logprobs
    ratio_less_1 = log_ratio.expm1()
    approxkl = (ratio_less_1 - log_ratio).mean()
    clipfrac = (ratio_less_1.abs() > clip).float().mean()
    return {"policy/approxkl": approxkl, "policy/clipfrac": clipfrac}


def learn_ppo(args, agent, optimizer, episodes, step) -> dict[str, float]:
    """--epochs times --minibatches updates on a batch of episodes. Returns what to log, averaged over them."""
    # Scale the rewards, so that no return is over 1: --value-clip is meant for such returns.
    rewards = episodes.rewards * max(1 - args.gamma, 1 / MAX_STEPS)

    # Fixed during the updates: the sampled steps, what the networks say of them now, advantages and returns.
    mask = episodes.mask
    states = episodes.observations[:, :-1][mask]  # (M, 4)
    actions = episodes.actions[mask]
    with torch.no_grad():
        old_logprobs, _ = action_logprobs(agent.policy(states), actions)
        values = agent.value(episodes.observations)[:, :, 0]  # (N, T + 1)
    old_values = values[:, :-1][mask]
    advantages = gae_of_episodes(rewards, values, episodes.terminated, mask, args.gamma, args.lam)[mask]
    returns = advantages + old_values
    advantages = normalise(advantages)

    # Each epoch uses every step once, in a new order. i: the steps of a minibatch.
    logs = []
    for epoch in range(args.epochs):
        order = torch.randperm(len(actions), generator=random_stream("minibatches", args.seed, step, epoch))
        for i in order.chunk(args.minibatches):
            logprobs, entropy = action_logprobs(agent.policy(states[i]), actions[i])
            new_values = agent.value(states[i])[:, 0]
            policy_loss = clipped_policy_loss(logprobs, old_logprobs[i], advantages[i], args.clip)
            value_loss = clipped_value_loss(new_values, old_values[i], returns[i], args.value_clip)
            loss = policy_loss + args.vf_coef * value_loss - args.entropy_coef * entropy.mean()
            grad_norm = update(args, agent, optimizer, loss)

            metrics = ratio_statistics(logprobs, old_logprobs[i], args.clip)
            metrics["loss/policy"] = policy_loss
            metrics["loss/value"] = value_loss
            metrics["policy/entropy"] = entropy.mean()  # nats
            metrics["policy/grad_norm"] = grad_norm
            logs.append({tag: value.item() for tag, value in metrics.items()})

    means = {}
    for tag in logs[0]:
        means[tag] = sum(log[tag] for log in logs) / len(logs)
    return means


# ---- Evaluation ----
def evaluate_greedy(args, agent, purpose) -> torch.Tensor:
    """Returns of --eval-episodes greedy episodes. Each purpose has start states of its own."""
    envs = gymnasium.make_vec("CartPole-v1", args.eval_episodes, "vector_entry_point")
    halves = torch.full((MAX_STEPS, args.eval_episodes), 0.5)  # each picks the likelier action
    start_seed = random_stream(purpose, args.seed).initial_seed()
    return sample_episodes(envs, agent.policy, halves, start_seed).rewards.sum(1)


def is_good_enough(args, agent, recent) -> bool:
    """Whether --stop-at is reached, by the last 100 training episodes and then by greedy ones."""
    if len(recent) < 100 or sum(recent) / 100 < args.stop_at:
        return False
    return evaluate_greedy(args, agent, "stopping").mean().item() >= args.stop_at


def returns_table(rows: dict[str, torch.Tensor]) -> str:
    """A line for each name and its returns."""
    lines = [f"{'return':24}{'episodes':>10}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}"]
    for name, returns in rows.items():
        line = f"{name:24}{len(returns):10}{returns.mean():10.1f}{returns.std(unbiased=False):10.1f}"
        lines.append(line + f"{returns.min():10.0f}{returns.max():10.0f}")
    return "\n".join(lines)


@torch.no_grad()
def film_episode(args, agent, folder) -> None:
    """A greedy episode as an mp4 file in the folder."""
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    env = gymnasium.wrappers.RecordVideo(env, str(folder))
    observation, _ = env.reset(seed=args.seed)
    ended = False
    while not ended:
        action = agent.policy(torch.from_numpy(observation)).argmax().item()
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
    env.close()


# ---- Training ----
def save_run(path, args, agent, optimizer, done, env_steps, recent) -> None:
    """All that --resume needs, in one file. Written aside, then renamed: always whole."""
    state = {"args": vars(args), "done": done, "env_steps": env_steps, "recent": recent}
    state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    aside = path.with_name(f".new-{path.name}")
    try:
        torch.save(state, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def main(args: Args) -> None:
    # Agent and optimizer; with --resume, both go on from the checkpoint.
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    torch.manual_seed(args.seed)
    agent = Agent(args.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    done = 0  # training steps
    env_steps = 0  # steps of all environments, also where mask is False
    recent = []  # returns of the last 100 training episodes
    if args.resume is not None:
        saved = torch.load(args.resume, weights_only=True)
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
        env_steps = saved["env_steps"]
        recent = saved["recent"]

    # Environments, and the run's folder with its log.
    envs = gymnasium.make_vec("CartPole-v1", args.num_envs, "vector_entry_point")
    output_dir = Path(args.output_dir or f"runs/cartpole_pg__{args.seed}__{time.time_ns() // 1_000_000}")
    writer = SummaryWriter(output_dir, purge_step=env_steps + 1)
    writer.add_text("args", f"```\n{json.dumps(vars(args), indent=2)}\n```")

    # Train, unless the run that is resumed is good enough already.
    good_enough = is_good_enough(args, agent, recent)
    run_began = time.time()
    progress = tqdm(total=args.total_steps, initial=done)
    while done < args.total_steps and not good_enough:
        step_began = time.time()
        learning_rate = args.learning_rate * (1 - done / args.total_steps)
        optimizer.param_groups[0]["lr"] = learning_rate

        # Sample an episode of each environment.
        uniforms = torch.rand(MAX_STEPS, args.num_envs, generator=random_stream("actions", args.seed, done))
        start_seed = random_stream("start states", args.seed, done).initial_seed()
        episodes = sample_episodes(envs, agent.policy, uniforms, start_seed)
        returns = episodes.rewards.sum(1)
        recent = (recent + returns.tolist())[-100:]

        # Learn from them. Weights that are good enough stay as they are.
        good_enough = is_good_enough(args, agent, recent)
        if good_enough:
            metrics = {}
        elif args.algo == "reinforce":
            metrics = learn_reinforce(args, agent, optimizer, episodes)
        else:
            metrics = learn_ppo(args, agent, optimizer, episodes, done)
        done += 1
        env_steps += episodes.mask.numel()

        # Log.
        metrics["charts/episodic_return"] = returns.mean().item()
        metrics["charts/episodic_length"] = episodes.mask.sum(1).float().mean().item()
        metrics["charts/last_100"] = sum(recent) / len(recent)
        metrics["charts/learning_rate"] = learning_rate
        metrics["charts/SPS"] = episodes.mask.numel() / (time.time() - step_began)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, env_steps)
        writer.flush()  # a run that is killed keeps its points
        progress.set_postfix(last_100=metrics["charts/last_100"])
        progress.update()

        # Save.
        if done % args.save_every == 0:
            save_run(output_dir / f"checkpoint-{done}.pt", args, agent, optimizer, done, env_steps, recent)
    progress.close()
    save_run(output_dir / "final.pt", args, agent, optimizer, done, env_steps, recent)
    solved = len(recent) == 100 and sum(recent) / 100 >= SOLVED
    verdict = "solved" if solved else "NOT solved"
    print(f"{verdict} after {done} steps, {env_steps:,} environment steps; {time.time() - run_began:.1f} s")

    # Evaluate, from other start states than those of is_good_enough; film.
    greedy = evaluate_greedy(args, agent, "evaluation")
    print(returns_table({"training, the last": torch.tensor(recent), "greedy": greedy}))
    writer.add_scalar("eval/episodic_return", greedy.mean().item(), env_steps)
    writer.close()
    if args.capture_video:
        film_episode(args, agent, output_dir / "videos")


if __name__ == "__main__":
    main(parse_flags())

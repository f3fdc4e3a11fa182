"""Interpolated modified Kneser-Ney n-gram baseline, in NumPy only.

An n-gram model is the reference every neural language model of the same corpus has to beat: it is
trained in seconds, has no hyper-parameter except its order, and sees the same tokens.

Model.  With ``h`` a context of ``k - 1`` tokens, ``h'`` the same context without its oldest token,
``V`` the vocabulary size and ``k`` running from 1 (unigram) to the order ``n`` of the model::

    p_k(w | h) = (c_k(h w) - D_k(c_k(h w))) / sum_v c_k(h v)  +  gamma_k(h) * p_{k-1}(w | h')
    gamma_k(h) = sum_v D_k(c_k(h v)) / sum_v c_k(h v)
    p_0(w)     = 1 / V

so every token, seen or not, has a positive probability and each distribution sums to one.  A
context with ``sum_v c_k(h v) = 0`` gives no evidence, and there ``p_k(w | h) = p_{k-1}(w | h')``.

Counts.  At the highest order ``c_n`` is the number of occurrences in the training stream.  Below
it, ``c_k(g)`` is the continuation count of Kneser and Ney, the number of distinct tokens found
immediately to the left of the k-gram ``g``.  The k-gram that opens the stream has no left neighbour
there, so that one occurrence adds nothing to its continuation count.  The stream is one sequence:
documents are separated only by the end-of-text tokens that it holds.

Discounts.  Every order has its own three, estimated from ``n_i``, the number of distinct k-grams
whose count ``c_k`` is exactly ``i`` (Chen and Goodman)::

    Y = n_1 / (n_1 + 2 n_2)
    D_k(0) = 0,   D_k(1) = 1 - 2 Y n_2 / n_1,   D_k(2) = 2 - 3 Y n_3 / n_2,
    D_k(c) = 3 - 4 Y n_4 / n_3   for c >= 3

If one of ``n_1 .. n_4`` is zero, or a result falls outside ``0 < D_k(i) < i``, the estimates have no
meaning and that order uses ``FALLBACK_DISCOUNTS`` (0.5, 1.0, 1.5) instead, the fallback that KenLM's
``lmplz --discount_fallback`` also defaults to.  This is normal for the unigrams of a large corpus, of
which few or none are rare, and for very small corpora.

Evaluation.  An evaluated stream begins with an end-of-text token that is context only; each of the
``N`` later tokens is predicted once, and the perplexity per token is ``exp(-sum log p / N)``.

Sources:

* R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995, 181-184.
* S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling",
  Computer Speech and Language 13 (1999), 359-394: interpolated modified Kneser-Ney smoothing.

Usage: ``python benchmarks/kneser_ney.py PREPARED_FOLDER [--order 5] [--train train] [--eval validation]``
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


class _Level(NamedTuple):
    """Tables of one order ``k``; an n-gram's id is its row in ``keys``."""

    keys: np.ndarray  # (U_k,) int64, ascending: id of the first k-1 tokens * V + last token
    alpha: np.ndarray  # (U_k,) float64: discounted relative frequency of each k-gram
    gamma: np.ndarray  # (U_{k-1},) float64: weight of the lower order, by id of the context


class KneserNey:
    """Interpolated modified Kneser-Ney language model over integer tokens (see the module docstring).

    Args:
        order: longest n-gram used, at least 1; the context is ``order - 1`` tokens.
        vocab_size: number of token ids, at least 1; tokens lie in ``0 .. vocab_size - 1``.

    Attributes:
        discounts: after ``fit``, float64 array of shape ``(order, 3)``; row ``k - 1`` holds
            ``D_k(1)``, ``D_k(2)`` and ``D_k(3+)``.

    Raises:
        ValueError: if ``order`` or ``vocab_size`` is not an integer of at least 1.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        for name, value, remedy in (
            ("order", order, "pass for example 5"),
            ("vocab_size", vocab_size, "pass the number of token ids of the tokenizer"),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1; {remedy}")
        self.order = int(order)
        self.vocab_size = int(vocab_size)
        self.discounts = np.zeros((self.order, 3))
        self._levels: list[_Level] = []

    def fit(self, tokens: np.ndarray) -> KneserNey:
        """Count the n-grams of a training stream, replacing any earlier fit.

        Args:
            tokens: integer array of shape ``(T,)`` with ``T >= 1``.  Orders longer than the stream
                hold no n-gram and leave the prediction to the shorter ones.

        Returns:
            The model itself.

        Raises:
            ValueError: if ``tokens`` is empty, not one-dimensional, not integer or out of the
                vocabulary, or if ``T * vocab_size`` does not fit in 63 bits.
        """
        stream = self._checked(tokens)
        if stream.size == 0:
            raise ValueError("tokens has length 0 but fit needs at least 1 token; pass the training stream")
        if stream.size * self.vocab_size >= 2**63:
            raise ValueError(
                f"len(tokens) * vocab_size = {stream.size} * {self.vocab_size} must be below 2**63; "
                "use a smaller vocabulary or a shorter stream"
            )
        discounts = np.zeros((self.order, 3))
        levels: list[_Level] = []
        keys, lower_size = np.zeros(0, np.int64), 1  # the empty context is the only 0-gram, with id 0
        ids = np.zeros(stream.size + 1, np.int64)  # ids[i]: id of the (k-1)-gram that starts at i
        for k in range(1, self.order + 1):
            packed = ids[: max(stream.size - k + 1, 0)] * self.vocab_size + stream[k - 1 :]
            upper_keys, first, upper_ids, counts = np.unique(
                packed, return_index=True, return_inverse=True, return_counts=True
            )
            if k > 1:
                # Each distinct k-gram is one distinct left extension of its last k-1 tokens.
                continuation = np.bincount(ids[first + 1], minlength=keys.size)
                levels.append(self._level(keys, continuation, lower_size, discounts[k - 2]))
                lower_size = keys.size
            keys, ids = upper_keys, upper_ids
        levels.append(self._level(keys, counts, lower_size, discounts[-1]))
        self._levels, self.discounts = levels, discounts
        return self

    def log_probabilities(self, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """Log-probability of each token given up to ``order - 1`` tokens before it in ``tokens``.

        The token at position ``t < order - 1`` is predicted by the order-``t + 1`` distribution.

        Args:
            tokens: integer array of shape ``(T,)``; it may be empty.
            start: first predicted position, ``0 <= start <= T``; earlier tokens are context only.

        Returns:
            Natural logarithms, float64 of shape ``(T - start,)``, all finite.

        Raises:
            ValueError: if ``tokens`` is not one-dimensional, not integer or out of the vocabulary,
                or if ``start`` is out of range.
            RuntimeError: if the model has not been fitted.
        """
        if not self._levels:
            raise RuntimeError("the model holds no counts; call fit(tokens) before log_probabilities")
        stream = self._checked(tokens)
        if not 0 <= start <= stream.size:
            raise ValueError(
                f"start={start} must lie in 0 .. len(tokens) = {stream.size}; pass the first predicted one"
            )
        offset = max(start - self.order + 1, 0)
        stream = stream[offset:]
        probabilities = np.full(stream.size, 1.0 / self.vocab_size)
        context = np.zeros(stream.size, np.int64)  # id of the k-1 tokens before t; -1 if never seen
        for level in self._levels:
            if level.keys.size == 0:
                break
            row = np.flatnonzero(context >= 0)
            wanted = context[row] * self.vocab_size + stream[row]
            place = np.minimum(np.searchsorted(level.keys, wanted), level.keys.size - 1)
            found = level.keys[place] == wanted
            alpha = np.where(found, level.alpha[place], 0.0)
            probabilities[row] = alpha + level.gamma[context[row]] * probabilities[row]
            context.fill(-1)
            ends = found & (row + 1 < stream.size)  # a k-gram ending at t is the context of t + 1
            context[row[ends] + 1] = place[ends]
        return np.log(probabilities[start - offset :])

    def _level(self, keys: np.ndarray, counts: np.ndarray, contexts: int, discounts: np.ndarray) -> _Level:
        """Tables of one order from its ``(U,)`` keys and counts; writes ``discounts``, shape ``(3,)``."""
        discounts[:] = estimate_discounts(counts)
        removed = np.concatenate(([0.0], discounts))[np.minimum(counts, 3)]
        context = keys // self.vocab_size
        totals = np.bincount(context, weights=counts, minlength=contexts)
        freed = np.bincount(context, weights=removed, minlength=contexts)
        gamma = np.divide(freed, totals, out=np.ones(contexts), where=totals > 0)
        return _Level(keys, (counts - removed) / np.maximum(totals, 1.0)[context], gamma)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens as an int64 array of shape ``(T,)``; raises ValueError for anything else."""
        array = np.asarray(tokens)
        if array.ndim != 1:
            raise ValueError(f"tokens has shape {array.shape} but must be one-dimensional; flatten it first")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"tokens has dtype {array.dtype} but must be integer; convert it to np.int64")
        if array.size and not (array.min() >= 0 and array.max() < self.vocab_size):
            raise ValueError(
                f"tokens spans {array.min()} .. {array.max()} but must lie in 0 .. vocab_size - 1 = "
                f"{self.vocab_size - 1}; pass the vocab_size of the tokenizer that wrote the stream"
            )
        return array.astype(np.int64, copy=False)


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """``(D(1), D(2), D(3+))`` of one order from its n-gram counts, an integer array of shape ``(U,)``.

    Returns ``FALLBACK_DISCOUNTS`` where the module docstring says so.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == i)) for i in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    if min(d1, d2, d3) <= 0:  # all n_i are positive here, so the upper bounds hold
        return FALLBACK_DISCOUNTS
    return d1, d2, d3


def main(argv: Sequence[str] | None = None) -> None:
    """Fit on one split of a prepared folder and print the scores of another."""
    parser = argparse.ArgumentParser(description="Modified Kneser-Ney n-gram baseline of a prepared corpus.")
    parser.add_argument("folder", metavar="PREPARED_FOLDER")
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--train", default="train", help="name of the split to fit")
    parser.add_argument("--eval", default="validation", help="name of the split to score")
    options = parser.parse_args(argv)
    from mhe_lightning.data.packed import open_corpus  # here, so that the model itself needs NumPy only

    try:
        corpus = open_corpus(options.folder)
    except ValueError as error:
        parser.error(str(error))
    train, held_out = corpus.split(options.train), corpus.split(options.eval)
    if len(held_out) < 2:
        raise ValueError(f"split {options.eval!r} holds {len(held_out)} token(s) but needs 2; pass a longer one")
    began = time.perf_counter()
    model = KneserNey(options.order, corpus.vocab_size).fit(train.read(0, len(train)))
    fitted = time.perf_counter()
    log_p = model.log_probabilities(held_out.read(0, len(held_out)), start=1)
    nats = -float(log_p.sum())
    print(f"order {model.order}, vocabulary {model.vocab_size}, {len(train)} training tokens")
    print(f"fit {fitted - began:.1f} s, evaluation {time.perf_counter() - fitted:.1f} s, {log_p.size} tokens")
    print(f"perplexity per token  {math.exp(nats / log_p.size):.3f}")
    print(f"perplexity per word   {math.exp(nats / held_out.counts.words):.3f}")
    print(f"bits per byte         {nats / math.log(2) / held_out.counts.bytes:.4f}")


if __name__ == "__main__":
    main()

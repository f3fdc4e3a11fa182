"""Tests of the Kneser-Ney baseline against a literal implementation over dictionaries.

The oracle below shares no code with the benchmark: it counts tuples, counts continuations with sets
and evaluates the recursion of Chen and Goodman (1999) one probability at a time.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    path = ROOT / "benchmarks" / "kneser_ney.py"
    spec = importlib.util.spec_from_file_location("benchmark_kneser_ney", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kneser_ney = _load()
KneserNey = kneser_ney.KneserNey


class Oracle:
    """Interpolated modified Kneser-Ney over dictionaries keyed by tuples of tokens."""

    def __init__(self, order: int, vocab_size: int, tokens: list[int]) -> None:
        self.vocab_size = vocab_size
        self.order = order
        self.counts: dict[int, dict[tuple[int, ...], int]] = {}
        for k in range(1, order + 1):
            if k == order:
                grams = [tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)]
                self.counts[k] = dict(Counter(grams))
            else:
                left: dict[tuple[int, ...], set[int]] = {}
                for i in range(1, len(tokens) - k + 1):
                    left.setdefault(tuple(tokens[i : i + k]), set()).add(tokens[i - 1])
                self.counts[k] = {gram: len(neighbours) for gram, neighbours in left.items()}
        self.discounts = {k: self._discounts(k) for k in self.counts}

    def _discounts(self, k: int) -> tuple[float, float, float]:
        n = Counter(self.counts[k].values())
        if n[1] == 0 or n[2] == 0 or n[3] == 0 or n[4] == 0:
            return 0.5, 1.0, 1.5
        y = n[1] / (n[1] + 2 * n[2])
        result = tuple(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))
        return result if all(0 < d < i + 1 for i, d in enumerate(result)) else (0.5, 1.0, 1.5)

    def probability(self, context: tuple[int, ...], token: int) -> float:
        context = context[max(len(context) - self.order + 1, 0) :]
        k = len(context) + 1
        lower = self.probability(context[1:], token) if context else 1.0 / self.vocab_size
        following = [count for gram, count in self.counts[k].items() if gram[:-1] == context]
        if not following:
            return lower
        d1, d2, d3 = self.discounts[k]
        number = {1: 0, 2: 0, 3: 0}
        for count in following:
            number[min(count, 3)] += 1
        gamma = (d1 * number[1] + d2 * number[2] + d3 * number[3]) / sum(following)
        count = self.counts[k].get((*context, token), 0)
        discount = (0.0, d1, d2, d3)[min(count, 3)]
        return (count - discount) / sum(following) + gamma * lower

    def log_probabilities(self, tokens: list[int], start: int = 0) -> np.ndarray:
        span = self.order - 1
        rows = range(start, len(tokens))
        return np.array([math.log(self.probability(tuple(tokens[max(t - span, 0) : t]), tokens[t])) for t in rows])


def distribution(model: KneserNey, context: list[int]) -> np.ndarray:
    """``p(. | context)`` over the whole vocabulary, shape ``(V,)``."""
    streams = ([*context, w] for w in range(model.vocab_size))
    return np.exp([model.log_probabilities(np.array(s), start=len(context))[0] for s in streams])


def structured_text(sentences: int, seed: int) -> np.ndarray:
    """Stream of sentences ``phrase verb phrase end``, phrase being ``determiner [adjective] noun``.

    The determiner (1 or 2) decides between two sets of nouns but not the adjective, so that after an
    adjective only two tokens of context tell which nouns may follow.  Token 0 opens and ends.
    """
    rng = np.random.default_rng(seed)
    text = [0]
    for _ in range(sentences):
        for after in (23 + int(rng.integers(5)), 0):
            kind = int(rng.integers(2))
            adjective = [3 + int(rng.integers(8))] * int(rng.integers(2))
            text += [1 + kind, *adjective, 11 + 6 * kind + int(rng.integers(6)), after]
    return np.array(text)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, list[int], list[int]]:
    order = draw(st.integers(1, 5))
    vocab_size = draw(st.integers(1, 5))
    token = st.integers(0, vocab_size - 1)
    return (
        order,
        vocab_size,
        draw(st.lists(token, min_size=1, max_size=50)),
        draw(st.lists(token, max_size=12)),
    )


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 12))
def test_equals_literal_implementation(case: tuple[int, int, list[int], list[int]], start: int) -> None:
    order, vocab_size, train, held_out = case
    start = min(start, len(held_out))
    model = KneserNey(order, vocab_size).fit(np.array(train))
    got = model.log_probabilities(np.array(held_out, dtype=np.int64), start)
    assert got.shape == (len(held_out) - start,)
    assert got.dtype == np.float64
    oracle = Oracle(order, vocab_size, train)
    np.testing.assert_allclose(got, oracle.log_probabilities(held_out, start), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_literal_implementation_with_estimated_discounts(order: int) -> None:
    """Heavy-tailed streams fill n_1 .. n_4, which the tiny streams above rarely do."""
    rng = np.random.default_rng(order)
    train, held_out = (np.minimum(rng.zipf(1.6, size) - 1, 59) for size in (900, 40))
    model = KneserNey(order, 60).fit(train)
    oracle = Oracle(order, 60, train.tolist())
    np.testing.assert_allclose(model.discounts, [oracle.discounts[k] for k in range(1, order + 1)], atol=1e-12)
    assert (model.discounts != kneser_ney.FALLBACK_DISCOUNTS).any(axis=1).sum() >= 1
    expected = oracle.log_probabilities(held_out.tolist())
    np.testing.assert_allclose(model.log_probabilities(held_out), expected, rtol=0, atol=1e-10)


def test_hand_computed_bigram() -> None:
    """Stream a b a b c over {a, b, c, d}, by hand, with the fallback discounts 0.5, 1, 1.5.

    Bigrams: ab 2, ba 1, bc 1.  Left neighbours: a {b}, b {a}, c {b}, so each unigram counts 1 of 3.
    """
    model = KneserNey(2, 4).fit(np.array([0, 1, 0, 1, 2]))
    seen, unseen = 0.5 / 3 + 0.5 / 4, 0.5 / 4  # unigram: (1 - 0.5) / 3 and weight 3 * 0.5 / 3 on 1 / 4
    np.testing.assert_allclose(distribution(model, []), [seen, seen, seen, unseen], atol=1e-14)
    after_a = [0.5 * seen, 0.5 + 0.5 * seen, 0.5 * seen, 0.5 * unseen]  # (2 - 1) / 2, weight 1 / 2
    after_b = [0.25 + 0.5 * seen, 0.5 * seen, 0.25 + 0.5 * seen, 0.5 * unseen]  # 0.5 / 2, weight 1 / 2
    np.testing.assert_allclose(distribution(model, [0]), after_a, atol=1e-14)
    np.testing.assert_allclose(distribution(model, [1]), after_b, atol=1e-14)
    np.testing.assert_allclose(distribution(model, [2]), distribution(model, []), atol=1e-14)


def test_discounts_by_hand() -> None:
    counts = np.repeat([0, 1, 2, 3, 4, 9], [7, 20, 10, 5, 3, 2])  # Y = 20 / 40
    assert kneser_ney.estimate_discounts(counts) == pytest.approx((0.5, 1.25, 1.8))


@pytest.mark.parametrize(
    "numbers",
    [(0, 5, 5, 5), (5, 0, 5, 5), (5, 5, 0, 5), (5, 5, 5, 0), (90, 1, 50, 1), (90, 5, 1, 50)],
    ids=["n1", "n2", "n3", "n4", "negative-D2", "negative-D3"],
)
def test_discounts_fall_back(numbers: tuple[int, ...]) -> None:
    counts = np.repeat([1, 2, 3, 4], numbers)
    assert kneser_ney.estimate_discounts(counts) == kneser_ney.FALLBACK_DISCOUNTS


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    train = structured_text(60, seed=0)
    model = KneserNey(order, 32).fit(train)
    seen = [train[i : i + order - 1].tolist() for i in (0, 1, 17, train.size - order + 1)]
    unseen = [[31] * (order - 1), [0, 0, 0, 0], [31, 1], [1, 31], [28, 5, 9, 2]]
    for context in [[], *seen, *unseen]:
        p = distribution(model, context)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_order_one_is_the_discounted_relative_frequency() -> None:
    train = np.array([0, 0, 0, 0, 1, 1, 2])  # fallback discounts: 1.5, 1 and 0.5 for counts 4, 2 and 1
    expected = np.array([2.5, 1.0, 0.5, 0.0]) / 7 + 3 / 7 / 4
    model = KneserNey(1, 4).fit(train)
    np.testing.assert_allclose(np.exp(model.log_probabilities(np.arange(4))), expected, atol=1e-14)
    np.testing.assert_allclose(distribution(model, [2, 1]), expected, atol=1e-14)


def test_stream_shorter_than_order_and_uniform_limit() -> None:
    model = KneserNey(5, 8).fit(np.array([3]))  # one token has no left neighbour: nothing is known
    np.testing.assert_allclose(model.log_probabilities(np.array([3, 3, 1])), -math.log(8), atol=1e-15)
    assert model.log_probabilities(np.zeros(0, np.int64)).shape == (0,)


def test_start_only_selects_positions_and_fit_starts_over() -> None:
    held_out = structured_text(20, seed=2)
    model = KneserNey(4, 32).fit(structured_text(5, seed=3)).fit(structured_text(80, seed=1))
    everything = KneserNey(4, 32).fit(structured_text(80, seed=1)).log_probabilities(held_out)
    for start in (0, 1, 2, 3, 50, held_out.size):
        np.testing.assert_array_equal(model.log_probabilities(held_out, start), everything[start:])
    np.testing.assert_array_equal(model.log_probabilities(held_out.astype(np.uint16)), everything)


def test_trigram_beats_bigram_beats_unigram_on_structured_text() -> None:
    train, held_out = structured_text(800, seed=4), structured_text(200, seed=5)
    unigram, bigram, trigram = (
        math.exp(-KneserNey(n, 28).fit(train).log_probabilities(held_out, 1).mean()) for n in (1, 2, 3)
    )
    assert trigram < 0.97 * bigram
    assert bigram < 0.5 * unigram
    assert unigram < 28


@pytest.mark.parametrize(("name", "value"), [("order", 0), ("order", 2.0), ("order", True), ("vocab_size", -3)])
def test_constructor_rejects(name: str, value: object) -> None:
    arguments = {"order": 3, "vocab_size": 10, name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be an integer of at least 1; pass")):
        KneserNey(**arguments)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.int64), r"shape \(2, 3\) but must be one-dimensional; flatten"),
        (np.zeros(3), "dtype float64 but must be integer; convert"),
        (np.array([0, 10]), r"spans 0 \.\. 10 but must lie in 0 \.\. vocab_size - 1 = 9; pass"),
        (np.array([-1, 4]), r"spans -1 \.\. 4 but must lie"),
    ],
)
def test_streams_are_validated(tokens: np.ndarray, message: str) -> None:
    model = KneserNey(2, 10)
    with pytest.raises(ValueError, match=message):
        model.fit(tokens)
    model.fit(np.arange(10))
    with pytest.raises(ValueError, match=message):
        model.log_probabilities(tokens)


def test_other_invalid_calls() -> None:
    model = KneserNey(2, 10)
    with pytest.raises(RuntimeError, match="call fit"):
        model.log_probabilities(np.arange(3))
    with pytest.raises(ValueError, match="length 0 but fit needs at least 1 token; pass"):
        model.fit(np.zeros(0, np.int64))
    with pytest.raises(ValueError, match=r"must be below 2\*\*63; use"):
        KneserNey(2, 2**62).fit(np.arange(2))
    model.fit(np.arange(10))
    for start in (-1, 4):
        with pytest.raises(ValueError, match=rf"start={start} must lie in 0 \.\. len\(tokens\) = 3; pass"):
            model.log_probabilities(np.arange(3), start)


class FakeSplit:
    """What the command line uses of a split."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.counts = SimpleNamespace(words=100, bytes=700)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    splits = {"a": FakeSplit(structured_text(50, seed=6)), "b": FakeSplit(structured_text(9, seed=7))}
    corpus = SimpleNamespace(vocab_size=28, split=splits.__getitem__)
    module = ModuleType("mhe_lightning.data.packed")
    module.open_corpus = lambda folder: corpus  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kneser_ney.main(["folder", "--order", "3", "--train", "a", "--eval", "b"])
    oracle = Oracle(3, 28, splits["a"].tokens.tolist())
    log_p = oracle.log_probabilities(splits["b"].tokens.tolist(), start=1)
    output = " ".join(capsys.readouterr().out.split())
    assert f"perplexity per token {math.exp(-log_p.mean()):.3f}" in output
    assert f"perplexity per word {math.exp(-log_p.sum() / 100):.3f}" in output
    assert f"bits per byte {-log_p.sum() / math.log(2) / 700:.4f}" in output
    splits["b"].tokens = splits["b"].tokens[:1]
    with pytest.raises(ValueError, match="'b' holds 1 token"):
        kneser_ney.main(["folder", "--train", "a", "--eval", "b"])

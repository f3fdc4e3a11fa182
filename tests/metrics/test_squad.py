"""SQuAD's rules against a second reading of them and against cases by hand, and spans against enumeration."""

from __future__ import annotations

import itertools
import math
import string
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.metrics import (
    Answered,
    Span,
    best_spans,
    exact_match,
    f1,
    merge_windows,
    normalize_answer,
    squad_scores,
)

# --- the rules, read a second time: characters one by one, without regular expressions or counters


def read_words(text: str) -> list[str]:
    kept = [character for character in text.lower() if character not in string.punctuation]
    words = [""]
    for in_word, run in itertools.groupby(kept, key=str.isalnum):
        characters = list(run)
        if in_word and "".join(characters) in {"a", "an", "the"}:
            characters = [" "]
        for character in characters:
            if character.isspace():
                words.append("")
            else:
                words[-1] += character
    return [word for word in words if word]


def read_references(references: list[str]) -> list[list[str]]:
    return [words for words in map(read_words, references) if words] or [[]]


def read_exact(prediction: str, references: list[str]) -> float:
    return 1.0 if any(words == read_words(prediction) for words in read_references(references)) else 0.0


def read_f1(prediction: str, references: list[str]) -> Fraction:
    best = Fraction(0)
    for reference in read_references(references):
        words = read_words(prediction)
        if not words and not reference:
            best = Fraction(1)
        elif words and reference:
            left, common = list(reference), 0
            for word in words:
                if word in left:
                    left.remove(word)
                    common += 1
            best = max(best, Fraction(2 * common, len(words) + len(reference)))
    return best


HARD_CASES = [
    # case and articles
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("the Denver Broncos", ["Denver Broncos"], 1, 1),
    ("THE DENVER BRONCOS!", ["denver broncos"], 1, 1),
    ("an apple a day", ["apple day"], 1, 1),
    ("Theatre", ["atre"], 0, 0),  # an article is a whole word
    ("Anna", ["na"], 0, 0),
    ("A. D.", ["D"], 1, 1),  # punctuation goes first, and leaves an article
    ("A.D.", ["AD"], 1, 1),
    ("U.S.A.", ["USA"], 1, 1),
    ("U. S. A.", ["USA"], 0, 0),
    ("U. S. A.", ["U S"], 1, 1),
    # nothing predicted, nothing right
    ("", [], 1, 1),
    ("Denver", [], 0, 0),
    ("The", [], 1, 1),
    ("a.", [], 1, 1),
    ("?!", [""], 1, 1),
    (" \n", [], 1, 1),
    ("", ["Denver"], 0, 0),
    ("The", ["Denver"], 0, 0),
    ("The", ["The"], 1, 1),  # F1 is 0 in v1.1
    ("", ["a", "the"], 1, 1),
    ("Denver", ["The"], 0, 0),
    ("", ["The", "Denver"], 0, 0),  # "The" is dropped; 1, 0 in v1.1
    ("A", ["B", "A"], 0, 0),
    ("The", ["The", "The Band"], 0, 0),
    ("band", ["The", "The Band"], 1, 1),
    # words counted
    ("Broncos", ["Denver Broncos"], 0, Fraction(2, 3)),
    ("Carolina", ["Denver Broncos"], 0, 0),
    ("new new york", ["new york"], 0, Fraction(4, 5)),
    ("new york", ["new new york"], 0, Fraction(4, 5)),
    ("very very very", ["very good"], 0, Fraction(2, 5)),
    ("york new", ["new york"], 0, 1),
    ("in the city of Paris", ["Paris", "city of Paris", "France"], 0, Fraction(6, 7)),
    ("Paris", ["France", "PARIS."], 1, 1),
    # ASCII punctuation leaves no space
    ("1,234", ["1234"], 1, 1),
    ("1.5", ["15"], 1, 1),
    ("1 234", ["1,234"], 0, 0),
    ("5 %", ["5%"], 1, 1),
    ("$5", ["5 dollars"], 0, Fraction(2, 3)),
    ("king's", ["kings"], 1, 1),
    ("king's", ["king"], 0, 0),
    ("well-known", ["well known"], 0, 0),
    ("1914-1918", ["19141918"], 1, 1),
    ("the-end", ["theend"], 1, 1),
    ("a_b", ["ab"], 1, 1),
    ('"Denver"', ["Denver"], 1, 1),
    # other punctuation stays, and bounds words
    ("king’s", ["kings"], 0, 0),
    ("“Denver”", ["Denver"], 0, 0),
    ("1914–1918", ["1914-1918"], 0, 0),
    ("the—end", ["—end"], 1, 1),
    ("the—end", ["end"], 0, 0),
    ("l’a", ["l’"], 1, 1),
    ("-", ["−"], 0, 0),
    ("東京。", ["東京"], 0, 0),
    # letters
    ("café", ["cafe"], 0, 0),
    ("caf\u00e9", ["cafe\u0301"], 0, 0),  # not normalised as Unicode
    ("\u00e0 la", ["la"], 0, Fraction(2, 3)),
    ("a\u0300 la", ["\u0300 la"], 1, 1),  # a combining accent is no letter, so that "a" is a word
    ("ΟΔΟΣ", ["οδος"], 1, 1),
    ("STRASSE", ["straße"], 0, 0),
    ("İzmir", ["izmir"], 0, 0),
    ("\uff21", ["A"], 0, 0),
    ("½", ["12"], 0, 0),
    ("北京大学", ["北京"], 0, 0),
    ("北京 大学", ["北京"], 0, Fraction(2, 3)),
    # white space
    ("New\u00a0York", ["new york"], 1, 1),
    ("東京\u3000都", ["東京 都"], 1, 1),
    (" New\n\tYork ", ["New York"], 1, 1),
    ("New\u200bYork", ["new york"], 0, 0),  # of no width, and no space to Python
]


@pytest.mark.parametrize(("prediction", "references", "em", "overlap"), HARD_CASES)
def test_hard_cases(prediction, references, em, overlap):
    assert exact_match(prediction, references) == em == read_exact(prediction, references)
    assert read_f1(prediction, references) == overlap
    assert f1(prediction, references) == pytest.approx(float(overlap), abs=1e-15)


FRAGMENTS = ["a", "an", "the", "The", "cat", "dog", "1,000", " ", " ", ".", "-", "_", "'", "’", "é", "\u0301", "\u00a0"]
TEXT = st.lists(st.sampled_from([*FRAGMENTS, "–", "東", "Σ", "\u200b"]), max_size=9).map("".join) | st.text(max_size=12)


@given(TEXT)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_both_readings_normalise_alike(text):
    assert normalize_answer(text) == " ".join(read_words(text))


@given(TEXT, st.lists(TEXT, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_both_readings_score_alike(prediction, references):
    assert exact_match(prediction, references) == read_exact(prediction, references)
    assert f1(prediction, references) == pytest.approx(float(read_f1(prediction, references)), abs=1e-12)


@given(st.lists(st.sampled_from(["cat", "dog", "the", "new"]), max_size=6).map(" ".join), st.lists(TEXT, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_f1_is_at_least_exact_match_and_knows_no_order_of_references(prediction, references):
    references = [*references, prediction[3:]]
    assert exact_match(prediction, references) <= f1(prediction, references) <= 1.0
    assert f1(prediction, references) == f1(prediction, references[::-1])


def test_a_single_text_is_not_taken_for_its_letters():
    with pytest.raises(TypeError, match=r"references \('Paris'\) must be a sequence of answers; wrap"):
        exact_match("Paris", "Paris")


# --- spans


@st.composite
def windows(draw) -> dict:
    """A window whose logits are often equal, and some of whose tokens have no characters or share one."""
    length = draw(st.integers(0, 9))

    def column(element):
        return draw(st.lists(element, min_size=length, max_size=length))

    logits = st.integers(-2, 2).map(lambda i: i / 2)
    offsets, position = [], 0
    for step, width in zip(column(st.integers(-1, 2)), column(st.integers(0, 2)), strict=True):
        start = max(0, position + step)
        position = start + width
        offsets.append((start, position))
    return {
        "start_logits": torch.tensor(column(logits)),
        "end_logits": torch.tensor(column(logits)),
        "allowed": torch.tensor(column(st.booleans()), dtype=torch.bool),
        "offsets": offsets,
        "context": "".join(itertools.islice(itertools.cycle("abc de fghi"), position)),
    }


def highest(logits: torch.Tensor, tokens: list[int], n: int) -> list[int]:
    return sorted(tokens, key=lambda t: (-float(logits[t]), t))[:n]


def enumerated(window: dict, n_best: int, max_answer_tokens: int, pruned: bool) -> list[Span]:
    """All pairs of tokens, one by one."""
    tokens = [t for t, yes in enumerate(window["allowed"].tolist()) if yes]
    starts = highest(window["start_logits"], tokens, n_best) if pruned else tokens
    ends = highest(window["end_logits"], tokens, n_best) if pruned else tokens
    found = []
    for s in starts:
        for e in ends:
            begin, stop = window["offsets"][s][0], window["offsets"][e][1]
            if s <= e < s + max_answer_tokens and begin < stop:
                score = float(window["start_logits"][s]) + float(window["end_logits"][e])
                found.append((-score, s, e, Span(score, begin, stop, window["context"][begin:stop])))
    return [span for *_, span in sorted(found, key=lambda f: f[:3])][:n_best]


@given(windows(), st.integers(0, 4), st.integers(1, 10))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_with_as_many_as_tokens_the_best_spans_are_those_of_all_pairs(window, more, max_answer_tokens):
    n_best = max(1, len(window["offsets"])) + more
    spans = best_spans(**window, n_best=n_best, max_answer_tokens=max_answer_tokens)
    assert spans == enumerated(window, n_best, max_answer_tokens, pruned=False)


@given(windows(), st.integers(1, 4), st.integers(1, 10))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_fewer_spans_come_from_the_highest_starts_and_ends(window, n_best, max_answer_tokens):
    spans = best_spans(**window, n_best=n_best, max_answer_tokens=max_answer_tokens)
    assert spans == enumerated(window, n_best, max_answer_tokens, pruned=True)


def simple_window(start: list[float], end: list[float], allowed: list[bool] | None = None, **options) -> list[Span]:
    n = len(start)
    return best_spans(
        torch.tensor(start),
        torch.tensor(end),
        torch.tensor(allowed or [True] * n),
        [(i, i + 1) for i in range(n)],
        "abcdefghi"[:n],
        **options,
    )


def test_best_spans_by_hand():
    spans = simple_window([1.0, 5.0, 0.0], [4.0, 0.0, 2.0])
    assert [(s.score, s.text) for s in spans] == [(7, "bc"), (5, "a"), (5, "b"), (3, "abc"), (2, "c"), (1, "ab")]
    assert [s.text for s in simple_window([1.0, 5.0, 0.0], [4.0, 0.0, 2.0], n_best=2)] == ["bc", "a"]
    assert [s.text for s in simple_window([1.0, 5.0, 0.0], [4.0, 0.0, 2.0], max_answer_tokens=1)] == ["a", "b", "c"]


def test_tokens_that_are_not_allowed_take_no_place_and_may_be_masked():
    spans = simple_window([9.0, -math.inf, 1.0, 0.0], [9.0, math.nan, 0.0, 1.0], [False, False, True, True], n_best=1)
    assert spans == [Span(2.0, 2, 4, "cd")]
    assert simple_window([0.0], [0.0], [False]) == []


def test_an_answer_starts_with_one_of_the_tokens_that_it_may_start_with():
    window = {"start": [9.0, 1.0, 0.0], "end": [0.0, 5.0, 7.0]}
    only = torch.tensor([False, True, True])
    assert simple_window(**window, allowed_starts=only, n_best=1) == [Span(8.0, 1, 3, "bc")]
    assert all(span.start > 0 for span in simple_window(**window, allowed_starts=only))
    # what is not allowed at all may not start one either
    allowed = [True, False, True]
    assert {span.start for span in simple_window(**window, allowed=allowed, allowed_starts=only)} == {2}


def test_an_answer_may_run_over_tokens_that_are_not_allowed():
    assert Span(2.0, 0, 3, "abc") in simple_window([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [True, False, True])


def test_scores_are_summed_in_float64():
    assert simple_window([1e8], [1.0])[0].score == 100000001.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_best": 0}, r"n_best \(0\) must be at least 1; 20"),
        ({"max_answer_tokens": 0}, r"max_answer_tokens \(0\) must be at least 1; 30"),
        ({"offsets": [(0, 1)]}, r"shapes \[\(2,\), \(2,\), \(2,\)\] but must have \(1,\)"),
        ({"end_logits": torch.zeros(2, 1)}, r"must have \(2,\), one number for each of the offsets"),
        ({"end_logits": torch.tensor([0.0, math.nan])}, "must be finite; the model has diverged"),
        ({"start_logits": torch.tensor([math.inf, 0.0])}, "must be finite; the model has diverged"),
    ],
)
def test_windows_that_make_no_sense_are_refused(change, message):
    window = {"start_logits": torch.zeros(2), "end_logits": torch.zeros(2), "allowed": torch.ones(2).bool()}
    with pytest.raises(ValueError, match=message):
        best_spans(**{**window, "offsets": [(0, 1), (1, 2)], "context": "ab", **change})


# --- windows

SPANS = st.builds(
    lambda score, start, length: Span(score / 2, start, start + length, "abcdefgh"[start : start + length]),
    st.integers(-3, 3),
    st.integers(0, 4),
    st.integers(1, 3),
)


@given(st.lists(st.lists(SPANS, max_size=6), max_size=4), st.integers(1, 8), st.randoms())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_merging_knows_no_order_of_windows_and_keeps_the_best_of_each_span(found, n_best, draw):
    merged = merge_windows(found, n_best)
    highest: dict[tuple[int, int], float] = {}
    for span in itertools.chain(*found):
        key = (span.start, span.end)
        highest[key] = max(span.score, highest.get(key, -math.inf))
    expected = sorted((-score, *key) for key, score in highest.items())[:n_best]
    assert [(-span.score, span.start, span.end) for span in merged] == expected
    shuffled = [draw.sample(spans, len(spans)) for spans in draw.sample(found, len(found))]
    assert merge_windows(shuffled, n_best) == merged


def test_merging_by_hand():
    first = [Span(3.0, 0, 2, "ab"), Span(1.0, 4, 5, "e")]
    second = [Span(4.0, 4, 5, "e"), Span(3.0, 0, 1, "a")]
    assert merge_windows([first, second]) == [second[0], second[1], first[0]]
    assert merge_windows([first, second], n_best=1) == [second[0]]
    assert merge_windows([[], []]) == merge_windows([]) == []
    with pytest.raises(ValueError, match=r"n_best \(0\) must be at least 1"):
        merge_windows([first], n_best=0)


def test_the_answer_is_the_best_span_that_is_not_empty():
    spans = [Span(5.0, 3, 4, "\u00a0"), Span(3.0, 0, 2, "ab"), Span(1.0, 0, 1, "a")]
    assert Answered.from_spans("q", spans, null_score=4.5) == Answered("q", "ab", 1.5)
    assert Answered.from_spans("q", spans[:1], null_score=4.5) == Answered("q", "", math.inf)
    assert Answered.from_spans("q", [], null_score=4.5) == Answered("q", "", math.inf)


# --- an evaluation set


def test_scores_of_version_1_by_hand():
    answered = [Answered("p", "the cat", 9.0), Answered("q", "black cat", math.nan), Answered("r", "dog", math.inf)]
    references = {"p": ["cat"], "q": ["cat", "a white cat"], "r": ["cat"]}
    assert squad_scores(answered, references, None) == {
        "exact": pytest.approx(100 / 3),
        "f1": pytest.approx(100 * (1 + 2 / 3) / 3),
    }


def test_scores_of_version_2_by_hand():
    answered = [
        Answered("p", "cat", -2.0),
        Answered("q", "black cat", 1.0),
        Answered("r", "dog", 0.0),
        Answered("s", "dog", 3.0),
        Answered("t", "", math.inf),
    ]
    references = {"p": ["cat"], "q": ["cat"], "r": [], "s": [], "t": ["bird"]}
    assert squad_scores(answered, references, 0.0) == {
        "exact": pytest.approx(40),  # p and s; q and t count as not answered
        "f1": pytest.approx(40),
        "has_answer_exact": pytest.approx(100 / 3),
        "has_answer_f1": pytest.approx(100 / 3),
        "no_answer_exact": pytest.approx(50),
        "best_exact": pytest.approx(60),  # p alone answered: p, r, s
        "best_exact_threshold": -2.0,
        "best_f1": pytest.approx(60),
        "best_f1_threshold": -2.0,
    }
    assert squad_scores(answered, references, 1.0)["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 5)
    assert squad_scores(answered, references, math.inf)["no_answer_exact"] == 0.0


def test_only_the_parts_that_exist_are_scored():
    with_answer = squad_scores([Answered("p", "cat", 0.0)], {"p": ["cat"]}, 0.0)
    without = squad_scores([Answered("p", "cat", 0.5)], {"p": []}, 0.0)
    assert "no_answer_exact" not in with_answer
    assert with_answer["has_answer_f1"] == 100.0
    assert not {"has_answer_exact", "has_answer_f1"} & set(without)
    assert without["no_answer_exact"] == 100.0


def test_a_reference_that_is_an_article_is_an_answer():
    answered, references = [Answered("p", "The", 0.0)], {"p": ["The"]}
    assert squad_scores(answered, references, 0.0)["has_answer_f1"] == 100.0
    assert squad_scores(answered, references, -1.0)["has_answer_f1"] == 0.0


@st.composite
def evaluations(draw, odds, texts) -> tuple[list[Answered], dict[str, list[str]]]:
    size = draw(st.integers(1, 7))
    values = draw(odds(size))
    answered = [Answered(str(i), draw(texts), values[i]) for i in range(size)]
    references = {a.id: draw(st.lists(st.sampled_from(["cat", "dog", "dog cat", "The"]), max_size=2)) for a in answered}
    return answered, references


def any_odds(size):
    odd = st.integers(-3, 3).map(lambda i: i / 2) | st.just(math.inf) | st.floats(allow_nan=False, min_value=-1e300)
    return st.lists(odd, min_size=size, max_size=size)


def distinct_odds(size):
    return st.lists(st.floats(0.001, 100), min_size=size, max_size=size, unique=True)


WORDS = st.sampled_from(["cat", "dog", "dog cat", "bird", "a dog cat bird"])


@given(evaluations(any_odds, WORDS | st.sampled_from(["", "The"])))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_the_best_threshold_is_that_of_brute_force(evaluation):
    answered, references = evaluation
    odds = {a.null_odds for a in answered}
    below = math.nextafter(min(odds), -math.inf)

    def mean(threshold, read):
        scores = [
            Fraction(not references[a.id]) if a.null_odds > threshold else Fraction(read(a.text, references[a.id]))
            for a in answered
        ]
        return 100 * sum(scores) / len(scores)

    results = squad_scores(answered, references, 0.0)
    for name, read in [("exact", read_exact), ("f1", read_f1)]:
        by_threshold = {threshold: mean(threshold, read) for threshold in sorted({below, *odds})}
        best = max(by_threshold.values())
        assert results[name] == pytest.approx(float(mean(0.0, read)), abs=1e-9)
        assert results[f"best_{name}"] == pytest.approx(float(best), abs=1e-9)
        threshold = results[f"best_{name}_threshold"]
        assert squad_scores(answered, references, threshold)[name] == results[f"best_{name}"]
        first = min(t for t, score in by_threshold.items() if score == best)
        assert threshold == (min(0.0, below) if first == below else first)


@given(evaluations(distinct_odds, WORDS), st.floats(0, 100))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_where_odds_are_distinct_and_positive_the_official_search_finds_the_same(evaluation, null_threshold):
    answered, references = evaluation
    results = squad_scores(answered, references, null_threshold)
    for name, read in [("exact", read_exact), ("f1", read_f1)]:
        running = peak = Fraction(sum(not given for given in references.values()))
        threshold = 0.0
        for a in sorted(answered, key=lambda a: a.null_odds):
            if references[a.id]:
                running += Fraction(read(a.text, references[a.id]))
            elif a.text:
                running -= 1
            if running > peak:
                peak, threshold = running, a.null_odds
        assert results[f"best_{name}"] == pytest.approx(float(100 * peak / len(answered)), abs=1e-9)
        assert results[f"best_{name}_threshold"] == threshold


@given(evaluations(any_odds, WORDS), st.floats(allow_nan=False), st.randoms())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_scores_know_no_order_of_questions_and_stay_within_the_best(evaluation, null_threshold, draw):
    answered, references = evaluation
    results = squad_scores(answered, references, null_threshold)
    assert squad_scores(draw.sample(answered, len(answered)), references, null_threshold) == results
    assert results["exact"] <= results["f1"]
    assert 0 <= results["exact"] <= results["best_exact"] <= 100
    assert results["f1"] <= results["best_f1"] <= 100


@pytest.mark.parametrize(
    ("answered", "references", "threshold", "message"),
    [
        ([], {}, None, "there are no questions to score"),
        ([Answered("p", "", 0.0)], {}, None, r"1 questions are answered but have no references; .*'p'"),
        ([], {"p": [], "q": []}, 0.0, r"2 questions are not answered but have references; .*'p'"),
        ([Answered("p", "", 0.0)] * 2, {"p": []}, None, r"1 questions are answered more than once; .*'p'"),
        ([Answered("p", "", 0.0)], {"p": []}, math.nan, r"null_threshold \(nan\) must be a number, or None"),
        ([Answered("p", "", math.nan)], {"p": []}, 0.0, r"null_odds \(nan\) of question 'p' must be a number above"),
        ([Answered("p", "", -math.inf)], {"p": []}, 0.0, r"null_odds \(-inf\) of question 'p' must be a number above"),
    ],
)
def test_sets_that_make_no_sense_are_refused(answered, references, threshold, message):
    with pytest.raises(ValueError, match=message):
        squad_scores(answered, references, threshold)

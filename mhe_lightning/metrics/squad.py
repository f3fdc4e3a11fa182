"""Extractive question answering scored by the rules of SQuAD, and the answers found from a model's logits.

The rules are those of the evaluation script of SQuAD 2.0. That of v1.1 differs in three points, none of which matters
where every question has a reference with a word that is not an article:

- it keeps references that normalise to nothing ("The", "%"), which v2.0 drops where others remain;
- its F1 of an empty prediction against an empty reference is 0, in v2.0 it is 1;
- it knows no questions without an answer, and fails on one without references.

Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (2016,
https://arxiv.org/abs/1606.05250); Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD" (2018,
https://arxiv.org/abs/1806.03822). The choice of spans is that of Devlin et al., "BERT: Pre-training of Deep
Bidirectional Transformers for Language Understanding" (2019, https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

import torch
from torch import Tensor

ARTICLE = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation and articles, words separated by single spaces.

    Punctuation goes first, without leaving a space: "the-end" is the word "theend", and "a." is an article. Other
    punctuation, such as curly quotes, stays.
    """
    bare = text.lower().translate(NO_PUNCTUATION)
    return " ".join(ARTICLE.sub(" ", bare).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised references, else 0.0.

    Args:
        prediction: the answer, or "" for none.
        references: the right answers. Those that normalise to nothing are dropped; where none is left, only a
            prediction that normalises to nothing is right.
    """
    return float(normalize_answer(prediction) in _normalized(references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """The highest F1 of the prediction's words against those of a reference, words counted as often as they occur.

    Args:
        prediction: the answer, or "" for none.
        references: as for `exact_match`.
    """
    words = normalize_answer(prediction).split()
    return max(_word_f1(words, reference.split()) for reference in _normalized(references))


def _normalized(references: Sequence[str]) -> list[str]:
    if isinstance(references, str):
        raise TypeError(f"references ({references!r}) must be a sequence of answers; wrap a single one in a list")
    return [text for text in map(normalize_answer, references) if text] or [""]


def _word_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    common = sum((Counter(prediction) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class Span:
    """A candidate answer.

    Args:
        score: logit of its start plus logit of its end.
        start: its first character in the context.
        end: the character after its last.
        text: what stands there.
    """

    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Answered:
    """The best answer to a question.

    Args:
        id: of the question.
        text: the best answer that is not empty, or "" if there was no candidate.
        null_odds: score of no answer minus score of ``text``; infinite if there was no candidate.
    """

    id: str
    text: str
    null_odds: float

    @classmethod
    def from_spans(cls, id: str, spans: Sequence[Span], null_score: float) -> Answered:
        """The first of ``spans`` that is more than white space.

        Args:
            id: of the question.
            spans: in descending score, as `merge_windows` gives them.
            null_score: score of no answer: the lowest of the question's windows, each the start logit plus the end
                logit of its ``[CLS]``.
        """
        for span in spans:
            if span.text.strip():
                return cls(id, span.text, null_score - span.score)
        return cls(id, "", math.inf)


@torch.no_grad()
def best_spans(
    start_logits: Tensor,
    end_logits: Tensor,
    allowed: Tensor,
    offsets: Sequence[tuple[int, int]],
    context: str,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    allowed_starts: Tensor | None = None,
) -> list[Span]:
    """The best answers within one window.

    Every start among the ``n_best`` highest allowed start logits is combined with every end among the ``n_best``
    highest allowed end logits. (BERT takes the highest of all tokens and then leaves out those that are not allowed,
    which gives fewer candidates.) Equal logits and equal scores are taken in the order of their tokens, the start
    before the end. Spans without any character are left out.

    Args:
        start_logits: (T,).
        end_logits: (T,).
        allowed: (T,), bool, whether an answer may start or end with the token.
        offsets: for every token its first character in ``context`` and the one after its last.
        context: the text that answers are taken from.
        n_best: starts, ends, and spans returned.
        max_answer_tokens: of a span.
        allowed_starts: (T,), bool, those of the allowed tokens that an answer may start with; all if not given.

    Returns:
        At most ``n_best`` spans in descending score, computed in float64.

    Raises:
        ValueError: the sizes disagree or are below 1, or the logit of an allowed token is not finite.
    """
    _check_n_best(n_best)
    if max_answer_tokens < 1:
        raise ValueError(f"max_answer_tokens ({max_answer_tokens}) must be at least 1; 30 is the default")
    shapes = [tuple(start_logits.shape), tuple(end_logits.shape), tuple(allowed.shape)]
    if any(shape != (len(offsets),) for shape in shapes):
        raise ValueError(
            f"start_logits, end_logits and allowed have the shapes {shapes} but must have ({len(offsets)},), one "
            "number for each of the offsets; pass one window without its padding"
        )
    allowed_starts = allowed if allowed_starts is None else allowed & allowed_starts
    first_tokens, last_tokens = (mask.cpu().bool().nonzero().flatten() for mask in (allowed_starts, allowed))
    starts, ends = start_logits.cpu().double()[first_tokens], end_logits.cpu().double()[last_tokens]
    if not bool(starts.isfinite().all() and ends.isfinite().all()):
        raise ValueError("the logits of allowed tokens must be finite; the model has diverged")
    # in the order of tokens, so that the stable sort below breaks ties by them
    first = starts.argsort(descending=True, stable=True)[:n_best].sort().values
    last = ends.argsort(descending=True, stable=True)[:n_best].sort().values
    scores = starts[first, None] + ends[last]  # (starts, ends)
    first, last = first_tokens[first], last_tokens[last]
    characters = torch.tensor(offsets, dtype=torch.long).view(-1, 2)
    begin, stop = characters[first, 0], characters[last, 1]
    length = last - first[:, None] + 1
    possible = (length >= 1) & (length <= max_answer_tokens) & (stop > begin[:, None])
    rows, columns = possible.nonzero(as_tuple=True)
    scores = scores[rows, columns]
    best = scores.argsort(descending=True, stable=True)[:n_best]
    found = zip(scores[best].tolist(), begin[rows[best]].tolist(), stop[columns[best]].tolist(), strict=True)
    return [Span(score, start, end, context[start:end]) for score, start, end in found]


def merge_windows(windows: Sequence[Sequence[Span]], n_best: int = 20) -> list[Span]:
    """The best answers to a question over the windows of its context, whatever their order.

    Args:
        windows: the spans of each window.
        n_best: how many to return.

    Returns:
        In descending score, at equal score the earlier start and then the earlier end first. A span that several
        windows found is there once, with its highest score.

    Raises:
        ValueError: ``n_best`` is below 1.
    """
    _check_n_best(n_best)
    best: dict[tuple[int, int], Span] = {}
    for span in sorted((s for spans in windows for s in spans), key=lambda s: (-s.score, s.start, s.end, s.text)):
        best.setdefault((span.start, span.end), span)
    return list(best.values())[:n_best]


def _check_n_best(n_best: int) -> None:
    if n_best < 1:
        raise ValueError(f"n_best ({n_best}) must be at least 1; 20 is the default")


def squad_scores(
    answered: Sequence[Answered], references: Mapping[str, Sequence[str]], null_threshold: float | None
) -> dict[str, float]:
    """Exact match and F1 over an evaluation set, in per cent.

    A question whose ``null_odds`` exceed the threshold counts as predicted to have no answer, which is right if it has
    no references and wrong if it has any.

    The best scores are those at the best threshold for the set, at which this function gives them again as ``exact``
    and ``f1``; of several equally good thresholds the lowest of the odds is reported. The official search differs where
    that would not hold: among questions of equal odds it also counts scores that no threshold gives; it reports 0
    where predicting no answer at all is best, also if some odds are not above 0 (here: the number below the lowest
    odds); and on a question without an answer it takes a prediction such as "the", which normalises to nothing, for
    wrong.

    Args:
        answered: one for every question.
        references: the right answers by question; none where the question has no answer.
        null_threshold: for SQuAD 2.0, where questions may have no answer; None for v1.1, where ``null_odds`` are
            ignored.

    Returns:
        ``exact`` and ``f1``. With a threshold also ``has_answer_exact`` and ``has_answer_f1`` over the questions with
        an answer, ``no_answer_exact`` over those without (each if there are any), ``best_exact``,
        ``best_exact_threshold``, ``best_f1`` and ``best_f1_threshold``.

    Raises:
        ValueError: there are no questions, they are not those of ``references``, or a number is not one.
    """
    _check_questions(answered, references)
    exact = [exact_match(a.text, references[a.id]) for a in answered]
    overlap = [f1(a.text, references[a.id]) for a in answered]
    if null_threshold is None:
        return {"exact": _percent(exact), "f1": _percent(overlap)}
    if math.isnan(null_threshold):
        raise ValueError("null_threshold (nan) must be a number, or None for SQuAD v1.1; 0.0 is usual")
    for a in answered:
        if not a.null_odds > -math.inf:
            raise ValueError(f"null_odds ({a.null_odds}) of question {a.id!r} must be a number above minus infinity")
    odds = [a.null_odds for a in answered]
    # by the script, an article as the only reference is an answer
    unanswerable = [float(not references[a.id]) for a in answered]

    def at_threshold(scores: list[float]) -> list[float]:
        return [
            null if odd > null_threshold else score for score, null, odd in zip(scores, unanswerable, odds, strict=True)
        ]

    exact_now, overlap_now = at_threshold(exact), at_threshold(overlap)
    results = {"exact": _percent(exact_now), "f1": _percent(overlap_now)}
    if not all(unanswerable):
        results["has_answer_exact"] = _percent([s for s, no in zip(exact_now, unanswerable, strict=True) if not no])
        results["has_answer_f1"] = _percent([s for s, no in zip(overlap_now, unanswerable, strict=True) if not no])
    if any(unanswerable):
        results["no_answer_exact"] = _percent([s for s, no in zip(exact_now, unanswerable, strict=True) if no])
    results["best_exact"], results["best_exact_threshold"] = _best_threshold(exact, unanswerable, odds)
    results["best_f1"], results["best_f1_threshold"] = _best_threshold(overlap, unanswerable, odds)
    return results


def _best_threshold(scores: list[float], unanswerable: list[float], odds: list[float]) -> tuple[float, float]:
    """The highest mean in per cent over all thresholds, and the lowest threshold that gives it."""
    # fractions: rounding must not prefer one of two thresholds that are equally good
    total = best = Fraction(math.fsum(unanswerable))
    threshold = min(0.0, math.nextafter(min(odds), -math.inf))
    order = sorted(range(len(odds)), key=odds.__getitem__)
    for odd, group in groupby(order, key=odds.__getitem__):
        total += sum(Fraction(scores[i]) - Fraction(unanswerable[i]) for i in group)
        if total > best:
            best, threshold = total, odd
    return 100.0 * float(best) / len(odds), threshold


def _percent(scores: list[float]) -> float:
    return 100.0 * math.fsum(scores) / len(scores)


def _check_questions(answered: Sequence[Answered], references: Mapping[str, Sequence[str]]) -> None:
    if not answered and not references:
        raise ValueError("there are no questions to score; answered must hold at least one")
    counts = Counter(a.id for a in answered)
    faults = {
        "answered more than once; answer each once": [id for id, count in counts.items() if count > 1],
        "answered but have no references; pass the references of the same questions": [
            id for id in counts if id not in references
        ],
        "not answered but have references; answer every question, if need be with ''": [
            id for id in references if id not in counts
        ],
    }
    for fault, ids in faults.items():
        if ids:
            raise ValueError(f"{len(ids)} questions are {fault} (one of them: {ids[0]!r})")

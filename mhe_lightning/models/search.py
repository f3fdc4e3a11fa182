"""Beam search with an encoder-decoder over its KV caches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_lightning.models.encoder_decoder import EncoderDecoder


class Hypothesis(NamedTuple):
    """A finished output of `beam_search`.

    Args:
        tokens: token ids, without the start and the end token.
        log_probability: of the tokens and the end token given the source, in nats.
        score: ``log_probability`` divided by the length penalty; a higher one is better.
    """

    tokens: list[int]
    log_probability: float
    score: float


def beam_search(
    net: EncoderDecoder,
    tokens: Tensor,
    padding: Tensor | None = None,
    *,
    start_token: int,
    end_token: int,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    extra_tokens: int = 50,
    n_best: int = 1,
    early_stop: bool = True,
) -> list[list[Hypothesis]]:
    """The most likely outputs for each source, as far as a beam finds them.

    In each step the live hypotheses of a source (at first the empty one) are extended by every token, and the best
    extensions by log-probability are kept: ``beam_size`` of them, less those that have finished before. Equal ones come
    in the order of their hypothesis and then of their token id. An extension by the end token has finished. The search
    ends when ``beam_size`` hypotheses have, or when the live ones are as long as allowed: then the end token follows,
    whatever its probability, which counts. Finished hypotheses are ordered by ``log p / ((5 + n) / 6)^α``, n being the
    number of tokens with the end token; of equal ones the one finished earlier comes first. A beam of 1 is greedy
    decoding; a beam as large as the number of possible hypotheses finds the best there are.

    A hypothesis that finishes takes its place in the beam, not a second one beside it: unlikely short ones, of which a
    well-trained model has some in every step, cannot end the search while a likely one is live.

    Every source is searched as if it were alone; those that are done leave the batch. The search is made in the
    precision of the net's weights, also where autocast is on: coarser numbers are often equal, and rounding would
    decide. The caches of self-attention hold a row per hypothesis, those of cross-attention a row per source.

    Source: the search with a shrinking beam is that of Sutskever et al. 2014, section 3.2, arXiv 1409.3215; here each
    source has its own limit. The length penalty is eq. 14 of Wu et al. 2016, arXiv 1609.08144, without its coverage
    penalty.

    Args:
        net: the model, in eval mode.
        tokens: (B, S) token ids of the sources, each with its end token, padded on the right.
        padding: (B, S) boolean, True = a real token; all are real if not given.
        start_token: the first token that the decoder reads.
        end_token: the token that finishes a hypothesis.
        beam_size: hypotheses per source, live and finished ones together.
        length_penalty: α; 0 orders by log-probability, more favours longer outputs.
        extra_tokens: a source of L tokens and an end token gives at most L + ``extra_tokens`` tokens and an end token,
            and never more than the decoder has positions for, ``net.max_length`` - 1.
        n_best: hypotheses to return per source.
        early_stop: end the search for a source as soon as no live hypothesis can come among the ``n_best`` any more;
            this changes no result.

    Returns:
        The hypotheses of each source, best first: ``n_best``, or fewer where there are fewer within the limit.

    Raises:
        ValueError: an argument is out of range or does not fit, or the net's logits are such that nothing can be found.
    """
    _check_inputs(net, tokens, padding, start_token, end_token)
    check_search(beam_size, length_penalty, extra_tokens, n_best)
    with torch.inference_mode(), torch.autocast(tokens.device.type, enabled=False):
        return _search(
            net, tokens, padding, start_token, end_token, beam_size, length_penalty, extra_tokens, n_best, early_stop
        )


def _search(
    net: EncoderDecoder,
    tokens: Tensor,
    padding: Tensor | None,
    start_token: int,
    end_token: int,
    beam_size: int,
    length_penalty: float,
    extra_tokens: int,
    n_best: int,
    early_stop: bool,
) -> list[list[Hypothesis]]:
    lengths = [tokens.shape[1]] * len(tokens) if padding is None else padding.sum(1).tolist()
    limits = [min(length - 1 + extra_tokens, net.max_length - 1) for length in lengths]
    longest = [_penalty(limit + 1, length_penalty) for limit in limits]
    finished: list[list[Hypothesis]] = [[] for _ in limits]
    left = list(range(len(limits)))  # numbers of the sources that are still searched, B of them
    source = net.encode(tokens, padding)
    caches = net.new_caches(tokens.shape[1], max(limits) + 1)
    not_end = torch.arange(net.vocab_size, device=tokens.device) != end_token
    prefixes = tokens.new_full((len(left), 1, 1), start_token)  # (B, k, length + 1), k live hypotheses per source
    totals = source.new_zeros(len(left), 1, dtype=torch.promote_types(source.dtype, torch.float32))  # (B, k)
    for length in range(max(limits) + 1):
        beams = prefixes.shape[1]
        hidden = net.decode(prefixes[:, :, -1:].flatten(0, 1), source, padding, caches)  # (B·k, 1, D)
        scores = net.logits(hidden[:, -1]).log_softmax(-1, dtype=totals.dtype).unflatten(0, (-1, beams))  # (B, k, V)
        scores = scores + totals[:, :, None]
        full = [limits[number] == length for number in left]
        if any(full):
            scores.masked_fill_(torch.tensor(full, device=scores.device)[:, None, None] & not_end, -math.inf)
        values, indices = _first(scores.flatten(1), beam_size)
        if values.isnan().any():
            raise ValueError("the net's logits are not numbers (NaN); look for NaN or infinity among its weights")
        parents, chosen = indices // net.vocab_size, indices % net.vocab_size
        places = torch.tensor([beam_size - len(finished[number]) for number in left], device=tokens.device)
        taken = (values > -math.inf) & (torch.arange(values.shape[1], device=tokens.device) < places[:, None])
        ends = chosen == end_token

        rows, ranks = (taken & ends).nonzero(as_tuple=True)
        texts = prefixes[rows, parents[rows, ranks], 1:].tolist()
        for row, text, total in zip(rows.tolist(), texts, values[rows, ranks].tolist(), strict=True):
            score = total / _penalty(length + 1, length_penalty)
            finished[left[row]].append(Hypothesis(text, total, score))

        # Live ones first. Where a source has fewer than another, impossible ones fill up, and stay so.
        live = taken & ~ends
        order = (~live).byte().sort(dim=1, stable=True).indices[:, : max(1, int(live.sum(1).max()))]
        totals = values.masked_fill(~live, -math.inf).gather(1, order)
        parents, chosen = parents.gather(1, order), chosen.gather(1, order)

        staying = [
            row
            for row, (number, best) in enumerate(zip(left, totals[:, 0].tolist(), strict=True))
            if length < limits[number]
            and best > -math.inf
            # log-probabilities only fall, and no penalty is higher than that of the longest
            and not (early_stop and _are_best(finished[number], n_best, best / longest[number]))
        ]
        if not staying:
            break
        kept = torch.tensor(staying, device=tokens.device)
        if len(staying) < len(left):
            left = [left[row] for row in staying]
            source, padding = source[kept], None if padding is None else padding[kept]
            totals, parents, chosen = totals[kept], parents[kept], chosen[kept]
            for cache in caches:
                cache.source.reorder(kept)
        before, prefixes = prefixes, prefixes[kept[:, None], parents]
        shared = _shared(before, prefixes) if before.shape == prefixes.shape else 0
        for cache in caches:
            cache.own.reorder((kept[:, None] * beams + parents).flatten(), shared)
        prefixes = torch.cat([prefixes, chosen[:, :, None]], dim=2)
    for number, hypotheses in enumerate(finished):
        if not hypotheses:
            raise ValueError(
                f"the end token ({end_token}) has probability 0 wherever source {number} might end; "
                "let the net's logits be finite"
            )
    return [_ranked(hypotheses)[:n_best] for hypotheses in finished]


def _shared(before: Tensor, after: Tensor) -> int:
    """How many first tokens are the same in all rows ``before`` and ``after`` their reordering, each (B, k, length).

    So a cache need not move them: equal prefixes of one source have equal keys and values. The hypotheses of a beam
    have most often one origin a few tokens ago.
    """
    return int((before == after).flatten(0, 1).all(0).cumprod(0).sum())


def _penalty(length: int, alpha: float) -> float:
    """By which the log-probability of ``length`` tokens, with the end token, is divided."""
    return float(((5 + length) / 6) ** alpha)


def _ranked(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    """Best first; equal ones stay as they were, in the order in which they finished."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)


def _are_best(finished: list[Hypothesis], n: int, bound: float) -> bool:
    """Whether ``n`` hypotheses have finished that no later one of at most the score ``bound`` comes before."""
    return len(finished) >= n and _ranked(finished)[n - 1].score >= bound


def _first(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` highest (all, if fewer) of each row of ``scores`` (B, M) in order, equal ones by their index.

    Returns:
        Values and indices, each (B, min(n, M)). Those of -∞ come last, in any order.
    """
    # Which of equal numbers topk takes, and their order, is not specified. If the n-th and the next are different, it
    # has taken the right ones. If they are equal there may be any number of such, so that row is sorted as a whole.
    values, indices = scores.topk(min(n + 1, scores.shape[1]))
    indices, order = indices.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if values.shape[1] > n:
        tied = (values[:, n] == values[:, n - 1]) & (values[:, n] > -math.inf)
        if tied.any():
            values[tied], indices[tied] = (
                found[:, : n + 1] for found in scores[tied].sort(dim=1, descending=True, stable=True)
            )
    return values[:, :n], indices[:, :n]


def check_search(beam_size: int, length_penalty: float, extra_tokens: int, n_best: int) -> None:
    """Raise a ValueError unless `beam_search` takes these settings."""
    if beam_size < 1:
        raise ValueError(f"beam_size ({beam_size}) must be at least 1; 1 is greedy")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best ({n_best}) must be from 1 to beam_size ({beam_size}); use a larger beam for more")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty ({length_penalty}) must be a number from 0; 0 switches it off")
    if extra_tokens < 0:
        raise ValueError(f"extra_tokens ({extra_tokens}) must not be negative; 0 allows as many as the source has")


def _check_inputs(
    net: EncoderDecoder, tokens: Tensor, padding: Tensor | None, start_token: int, end_token: int
) -> None:
    for name, token in (("start_token", start_token), ("end_token", end_token)):
        if not 0 <= token < net.vocab_size:
            raise ValueError(f"{name} ({token}) must be a token of the vocabulary, 0 to {net.vocab_size - 1}")
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; it must be (B, S) with at least one source and token"
        )
    if padding is None:
        return
    if padding.shape != tokens.shape or padding.dtype != torch.bool:
        raise ValueError(
            f"padding has shape {tuple(padding.shape)} and dtype {padding.dtype}; it must be {tuple(tokens.shape)}, "
            "the shape of tokens, and torch.bool with True = a real token"
        )
    for row, real in enumerate(padding.any(1).tolist()):
        if not real:
            raise ValueError(f"source {row} has no real token; leave it out, or give it its end token")
    for row, left in enumerate((padding[:, 1:] & ~padding[:, :-1]).any(1).tolist()):
        if left:
            raise ValueError(f"source {row} has padding before a real token; pad on the right")

"""Whether the heads of a trained model attend differently, or have become one and the same.

1. `text_batches` makes a text into token batches, as the model would read it.
2. `measure_heads` runs the model over them; before each attention it looks at the distributions of all heads.
3. `jensen_shannon` and `cosine_similarity` compare these, query by query; queries that see one key only are left out,
   since all heads are equal there by force.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.attention.base import visible_keys
from mhe_lightning.comparison.results import AttentionMaps, LayerDiversity
from mhe_lightning.data.tokenizer import WORD_START
from mhe_lightning.text_batches import Place, TokenBatch, attentions_of, in_eval, text_batches

MAP_TOKENS = 24
"""Tokens of a text that attention maps are made of: as many as can be read in a picture."""

SPACE, LINE_END = "␣", "⏎"


def jensen_shannon(maps: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of all pairs of heads, in bits, of each query.

    ``JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2`` is 0 for equal distributions and 1 for those without a common
    key. The mean over queries is the mean over all pairs and queries. Rows of zeros give 0.

    Source: Lin 1991, *Divergence measures based on the Shannon entropy*, IEEE Transactions on Information Theory 37.

    Args:
        maps: (..., n, T, S), distributions over the S keys.

    Returns:
        (..., T), float64, in [0, 1]; 0 of a single head.
    """
    maps = maps.double()  # the difference of entropies would lose small divergences in float32
    n = maps.shape[-3]
    if n < 2:
        return maps.new_zeros(*maps.shape[:-3], maps.shape[-2])
    heads = _entropy(maps)  # (..., n, T)
    total = torch.zeros_like(heads[..., 0, :])
    for i in range(n - 1):  # the pairs of one head at a time: memory of n maps, not of n²
        middle = (maps[..., i : i + 1, :, :] + maps[..., i + 1 :, :, :]) / 2
        total += (_entropy(middle) - (heads[..., i : i + 1, :] + heads[..., i + 1 :, :]) / 2).sum(-2)
    return (total / math.comb(n, 2)).clamp(0.0, 1.0)


def cosine_similarity(maps: Tensor) -> Tensor:
    """Mean cosine similarity of all pairs of heads' distributions, of each query.

    Args:
        maps: (..., n, T, S), distributions over the S keys.

    Returns:
        (..., T), float64, in [0, 1]; 1 of a single head. A row of zeros is similar to none.
    """
    maps = maps.double()
    n = maps.shape[-3]
    if n < 2:
        return maps.new_ones(*maps.shape[:-3], maps.shape[-2])
    units = nn.functional.normalize(maps, dim=-1)
    # |Σ u_i|² = Σ |u_i|² + 2 Σ_{i<j} u_i·u_j
    pairs = units.sum(-3).square().sum(-1) - units.square().sum((-3, -1))
    return (pairs / (n * (n - 1))).clamp(0.0, 1.0)


def _entropy(p: Tensor) -> Tensor:
    """In bits, along the last dimension."""
    return torch.special.entr(p).sum(-1) / math.log(2)


@dataclass
class _Sums:
    """Of one attention's queries so far."""

    jensen_shannon: float = 0.0
    cosine: float = 0.0
    queries: int = 0


def measure_heads(net: nn.Module, batches: Iterable[TokenBatch]) -> list[LayerDiversity]:
    """How different the heads of each layer are, averaged over all queries of all batches.

    Queries that see one key only (the first of a causal sequence) are left out, as are padded ones.

    Args:
        net: a `Decoder`, `Encoder` or `EncoderDecoder`; it runs in eval mode and is left in the mode it was in.
        batches: on the net's device.

    Raises:
        ValueError: the net is another, or no query sees more than one key.
    """
    modules = attentions_of(net)
    sums = {place: _Sums() for place in modules}

    def add(place: Place, weights: Tensor, counted: Tensor) -> None:
        for row, wanted in zip(weights, counted, strict=True):  # a row at a time, for memory's sake
            maps = row[:, wanted]  # (n, T', S)
            sums[place].jensen_shannon += jensen_shannon(maps).sum().item()
            sums[place].cosine += cosine_similarity(maps).sum().item()
            sums[place].queries += maps.shape[1]

    for batch in batches:
        _look(net, batch, add)
    for (place, layer), found in sums.items():
        if not found.queries:
            raise ValueError(
                f"no query of the {place} attention of layer {layer} sees more than one key; give a longer text"
            )
    return [
        LayerDiversity(place, layer, found.jensen_shannon / found.queries, found.cosine / found.queries)
        for (place, layer), found in sums.items()
    ]


def attention_maps(net: nn.Module, batch: TokenBatch, tokenizer: Tokenizer) -> AttentionMaps:
    """The attention distributions of all heads of all layers on one short text.

    Args:
        net: a `Decoder`, `Encoder` or `EncoderDecoder`.
        batch: one row; what comes after the first 24 tokens of a sequence is cut off.
        tokenizer: the net's, to write the tokens.

    Raises:
        ValueError: the batch has not one row, or the net is another.
    """
    if len(batch.tokens) != 1:
        raise ValueError(f"the batch has {len(batch.tokens)} rows; attention maps are those of 1")
    batch = TokenBatch(*(None if t is None else t[:, :MAP_TOKENS] for t in batch))  # type: ignore[arg-type]
    layers: dict[Place, list[list[list[float]]]] = {}

    def keep(place: Place, weights: Tensor, counted: Tensor) -> None:
        layers[place] = weights[0].tolist()

    _look(net, batch, keep)
    keys = token_texts(tokenizer, batch.tokens[0].tolist())
    queries = keys if batch.target_tokens is None else token_texts(tokenizer, batch.target_tokens[0].tolist())
    return AttentionMaps(keys, queries, {place: layers[place] for place in attentions_of(net)})


def _look(net: nn.Module, batch: TokenBatch, see: Callable[[Place, Tensor, Tensor], None]) -> None:
    """Run the net; ``see`` gets each attention's weights (B, n, T, S) and which queries count, (B, T)."""
    with torch.no_grad(), in_eval(net), _watched(net, batch, see):
        if batch.target_tokens is None:
            net(batch.tokens, padding=batch.padding)
        else:
            net(batch.tokens, batch.target_tokens, padding=batch.padding)


@contextmanager
def _watched(net: nn.Module, batch: TokenBatch, see: Callable[[Place, Tensor, Tensor], None]) -> Iterator[None]:
    def before(place: Place, module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        assert given.pop("cache", None) is None, "weights() knows no earlier keys"
        weights = module.weights(**given)
        counted = _several_keys(weights, given.get("mask"), given.get("is_causal", False))
        real = batch.padding if place[0] in ("self", "encoder") else batch.target_padding
        see(place, weights, counted if real is None else counted & real)

    handles = [
        module.register_forward_pre_hook(partial(before, place), with_kwargs=True)
        for place, module in attentions_of(net).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _several_keys(weights: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Which queries see more than one key, (B, T).

    By the mask: where an attention is sharp, the weights of visible keys may be zero too.
    """
    B, n, T, S = weights.shape
    visible = visible_keys(mask, (B, n, T, S), is_causal, weights.device)
    if visible is None:
        return torch.full((B, T), S > 1, device=weights.device)
    return visible.expand(B, -1, T, S).sum(-1).amin(1) > 1


def diversity_of_text(
    net: nn.Module, tokenizer: Tokenizer, lines: Iterable[str], *, max_tokens: int = 4096, batch_size: int = 8
) -> list[LayerDiversity]:
    """How different the heads of each layer are on a text; see `text_batches` and `measure_heads`.

    Raises:
        ValueError: there is too little text, a number is out of range, or the net is none of this package's models.
    """
    return measure_heads(net, text_batches(net, tokenizer, lines, max_tokens=max_tokens, batch_size=batch_size))


def maps_of_text(net: nn.Module, tokenizer: Tokenizer, lines: Iterable[str]) -> AttentionMaps:
    """The attention distributions on a text's first 24 tokens, or on its first line and the net's translation of it.

    Raises:
        ValueError: there is too little text, or the net is none of this package's models.
    """
    batches = text_batches(net, tokenizer, lines, max_tokens=MAP_TOKENS, batch_size=1, row_tokens=MAP_TOKENS)
    return attention_maps(net, next(iter(batches)), tokenizer)


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token reads as, with visible spaces and ends of lines."""
    bytes_written = isinstance(tokenizer.decoder, decoders.ByteLevel)
    texts = []
    for token in tokens:
        # a byte-level vocabulary spells bytes, which only its decoder turns into characters
        text = tokenizer.decode([token], skip_special_tokens=False) if bytes_written else tokenizer.id_to_token(token)
        text = text or str(token)  # a model may have more tokens than its tokenizer
        texts.append(text.replace(WORD_START, SPACE).replace(" ", SPACE).replace("\n", LINE_END))
    return texts

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
from itertools import islice
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.attention.base import visible_keys
from mhe_lightning.comparison.results import AttentionMaps, LayerDiversity
from mhe_lightning.data.examples import pad
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.tokenizer import WORD_START
from mhe_lightning.data.translation import encode_sources, is_empty
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder, beam_search

MAP_TOKENS = 24
"""Tokens of a text that attention maps are made of: as many as can be read in a picture."""

SPACE, LINE_END = "␣", "⏎"
CHARACTERS_PER_TOKEN = 16
"""More than a text has on average, so that a text cut by it still fills the rows asked for."""

Place = tuple[str, int]


class TokenBatch(NamedTuple):
    """Input of a model, padded on the right.

    Args:
        tokens: (B, T) token ids; of an encoder-decoder, the sources.
        padding: (B, T) boolean, True = a real token; None where all are.
        target_tokens: (B, T') token ids that the decoder of an encoder-decoder reads, the start token first.
        target_padding: (B, T') boolean, True = a real token; None where all are.
    """

    tokens: Tensor
    padding: Tensor | None = None
    target_tokens: Tensor | None = None
    target_padding: Tensor | None = None


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


def attentions_of(net: nn.Module) -> dict[Place, Attention]:
    """The attention modules of a model by place and layer: "self", or "encoder", "decoder" and "cross".

    Raises:
        ValueError: it is none of this package's models.
    """
    if isinstance(net, EncoderDecoder):
        places: dict[str, list[Any]] = {
            "encoder": [block.attention for block in net.encoder_blocks],
            "decoder": [block.attention for block in net.decoder_blocks],
            "cross": [block.cross_attention for block in net.decoder_blocks],
        }
    elif isinstance(net, Decoder | Encoder):
        places = {"self": [block.attention for block in net.blocks]}
    else:
        raise ValueError(f"net is a {type(net).__name__}; it must be a Decoder, an Encoder or an EncoderDecoder")
    return {(place, layer): module for place, layers in places.items() for layer, module in enumerate(layers)}


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
    with torch.no_grad(), _in_eval(net), _watched(net, batch, see):
        if batch.target_tokens is None:
            net(batch.tokens, padding=batch.padding)
        else:
            net(batch.tokens, batch.target_tokens, padding=batch.padding)


@contextmanager
def _in_eval(net: nn.Module) -> Iterator[None]:
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def text_batches(
    net: nn.Module,
    tokenizer: Tokenizer,
    lines: Iterable[str],
    *,
    max_tokens: int = 4096,
    batch_size: int = 8,
    row_tokens: int | None = None,
) -> Iterator[TokenBatch]:
    """A text as the net reads it, in batches on its device.

    A decoder's and an encoder's rows are cut from the text as one stream; each row of an encoder stands between the
    start and the separator token, as far as the tokenizer has them. Of an encoder-decoder each line is a source, and
    its target the net's own greedy translation; lines without text are left out.

    Args:
        net: a `Decoder`, `Encoder` or `EncoderDecoder`.
        tokenizer: the net's.
        lines: the text, without ends of lines; no more of them are read than are needed.
        max_tokens: of the text, those of translations included; what comes after is left out. Of the last batch of
            lines none is cut.
        batch_size: rows per batch.
        row_tokens: most tokens of a row; as many as the net has positions for if not given.

    Raises:
        ValueError: there is too little text, a number is out of range, or the net is none of this package's models.
    """
    attentions_of(net)
    if max_tokens < 2:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 2; 4096 is the default")
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    longest = int(net.max_length)  # type: ignore[arg-type]
    form = SequenceFormat(tokenizer, min(longest, row_tokens or longest))
    if isinstance(net, EncoderDecoder):
        return _translated_batches(net, form, lines, max_tokens, batch_size)
    return _stream_batches(net, form, lines, max_tokens, batch_size)


def _stream_batches(
    net: nn.Module, form: SequenceFormat, lines: Iterable[str], max_tokens: int, batch_size: int
) -> Iterator[TokenBatch]:
    tokens = form.encode([_beginning(lines, max_tokens * CHARACTERS_PER_TOKEN)])[0].ids[:max_tokens]
    before, after = (form.start, [form.end]) if isinstance(net, Encoder) else ([], [])
    room = form.max_length - len(before) - len(after)
    least = 1 if after else 2
    if len(tokens) < least:
        raise ValueError(f"the text has {len(tokens)} tokens; give one of at least {least}")
    rows = [[*before, *tokens[i : i + room], *after] for i in range(0, len(tokens), room)]
    for i in range(0, len(rows), batch_size):
        yield TokenBatch(*_on_device(net, rows[i : i + batch_size]))


def _beginning(lines: Iterable[str], characters: int) -> str:
    kept = []
    for line in lines:
        kept.append(line[:characters])
        characters -= len(line) + 1
        if characters <= 0:
            break
    text = "\n".join(kept)
    return text if text.strip() else ""


def _translated_batches(
    net: EncoderDecoder, form: SequenceFormat, lines: Iterable[str], max_tokens: int, batch_size: int
) -> Iterator[TokenBatch]:
    sentences = (line for line in lines if not is_empty(line))
    count = 0
    while count < max_tokens:
        some = list(islice(sentences, batch_size))
        if not some:
            break
        sources = [source.tokens for source in encode_sources(some, form)]
        tokens, padding = _on_device(net, sources)
        with _in_eval(net):
            found = beam_search(net, tokens, padding, start_token=form.end, end_token=form.end, beam_size=1)
        targets = [[form.end, *best[0].tokens][: form.max_length] for best in found]
        target_tokens, target_padding = _on_device(net, targets)
        yield TokenBatch(tokens, padding, target_tokens, target_padding)
        count += sum(map(len, sources)) + sum(map(len, targets))
    if not count:
        raise ValueError("the text is empty; give at least one sentence to translate")


def _on_device(net: nn.Module, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    device = next(net.parameters()).device
    tokens, real = pad(rows)
    return tokens.to(device), None if real.all() else real.to(device)


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

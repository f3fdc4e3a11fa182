"""What an attention sees of real texts: token batches, the calls that a net makes to it, and second moments of those.

A conversion approximates products of weights where the data are, so it measures hidden states by second moments, each
over real tokens only:

* queries: ``E[x̃ x̃ᵀ]`` with ``x̃ = [x, 1]``, the 1 being a query's bias;
* keys of head i: ``E_t[Cov_{j ~ A_i(t, ·)}(c_j)]``. Adding a constant to a query's scores changes no attention, and
  scores matter where there is attention: of a small change δ of the scores the divergence of the attentions is
  ``½ Var_{A_i}(δ)``, in second order;
* values of head i: ``Cov_t(h_t)`` of the attended states ``h_t = Σ_j A_i(t, j) c_j``. Their mean is a bias of W_O.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.data.examples import pad
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.models import EncoderDecoder
from mhe_lightning.models.layers import Block
from mhe_lightning.text_batches import TokenBatch, text_batches


class Call(NamedTuple):
    """The arguments of a call to a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stage(NamedTuple):
    """Blocks that follow one another: "self" of a decoder or encoder, "encoder" or "decoder" of an encoder-decoder."""

    place: str
    blocks: Sequence[Block]


class AttentionInput(NamedTuple):
    """What an attention is called with, and which of its queries are real tokens.

    Args:
        x: (B, T, D).
        context: (B, S, D); None in self-attention.
        mask: as of `Attention.forward`.
        is_causal: as of `Attention.forward`.
        real: (B, T) boolean.
    """

    x: Tensor
    context: Tensor | None
    mask: Tensor | None
    is_causal: bool
    real: Tensor

    def output(self, attention: Attention) -> Tensor:
        """(N, D) of the real queries."""
        return attention(self.x, context=self.context, mask=self.mask, is_causal=self.is_causal)[self.real]

    def weights(self, attention: Attention) -> Tensor:
        """(B, n, T, S), rows of zeros for queries that are padding."""
        found = attention.weights(self.x, context=self.context, mask=self.mask, is_causal=self.is_causal)
        return found * self.real[:, None, :, None]

    def heads(self, attention: Attention) -> Tensor:
        """What each head brings to the real queries, (N, n·d), before any embedding of it is added or multiplied."""
        values = attention.key_value(self.x if self.context is None else self.context)[-1]  # (B, g, S, d)
        values = values.repeat_interleave(attention.n_heads // values.shape[1], dim=1)
        return (self.weights(attention).to(values.dtype) @ values).transpose(1, 2).flatten(2)[self.real]


class Moments(NamedTuple):
    """Second moments of what an attention sees, float64.

    Args:
        queries: (D + 1, D + 1), of ``[x, 1]``.
        keys: (n, D, D), of each head.
        values: (n, D, D), of each head.
        attended: (n, D), the mean of each head's attended states.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    attended: Tensor


class _Found(Exception):
    """A call was seen; nothing after it is needed."""


def texts_as_batches(
    net: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], *, count: int, max_tokens: int, batch_size: int
) -> list[TokenBatch]:
    """The first ``count`` texts as the net reads them, a row each, rows of like lengths together.

    A row begins and ends with the tokenizer's special tokens, as in finetuning. Of an encoder-decoder a text is a
    source, and the target the net's own greedy translation of it.

    Args:
        net: a `Decoder`, `Encoder` or `EncoderDecoder`.
        tokenizer: the net's.
        texts: those without a word are left out.
        count: how many texts, at least 1.
        max_tokens: of a text, special ones included; what comes after is cut off. The net's positions, if fewer.
        batch_size: rows per batch.

    Raises:
        ValueError: a number is out of range, or there is no text.
    """
    for name, number in (("count", count), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    form = SequenceFormat(tokenizer, min(max_tokens, net.max_length))  # type: ignore[type-var, arg-type]
    kept = [*islice((text for text in texts if text.strip()), count)]
    if not kept:
        raise ValueError("there is no text to calibrate with; give at least one line")
    if isinstance(net, EncoderDecoder):
        rows = form.max_length * len(kept)
        return [*text_batches(net, tokenizer, kept, max_tokens=2 * rows, batch_size=batch_size, row_tokens=max_tokens)]
    found = sorted((row.tokens for row in form.pairs([(text, None) for text in kept])), key=len)
    return [TokenBatch(*pad(found[i : i + batch_size])) for i in range(0, len(found), batch_size)]


def stages_of(net: nn.Module) -> list[Stage]:
    """The blocks of a `Decoder`, `Encoder` or `EncoderDecoder` in the order in which they run."""
    if isinstance(net, EncoderDecoder):
        return [Stage("encoder", list(net.encoder_blocks)), Stage("decoder", list(net.decoder_blocks))]  # type: ignore[arg-type]
    return [Stage("self", list(net.blocks))]  # type: ignore[arg-type]


def first_calls(net: nn.Module, block: Block, batches: Iterable[TokenBatch]) -> list[Call]:
    """The call that the net makes to its block for each batch; nothing after it is computed."""
    calls = []
    for batch in batches:
        inputs = (batch.tokens,) if batch.target_tokens is None else (batch.tokens, batch.target_tokens)
        calls.append(_call_to(block, net, Call(inputs, {"padding": batch.padding})))
    return calls


def after(block: Block, calls: Iterable[Call]) -> list[Call]:
    """The calls to the next block, which takes the output of this one in the place of its input."""
    return [Call((block(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in calls]


def inputs_of(
    attention: Attention, block: Block, calls: Iterable[Call], real: Iterable[Tensor]
) -> list[AttentionInput]:
    """What the block calls one of its attentions with; ``real`` (B, T) of each call are the queries that count."""
    found = []
    for call, wanted in zip(calls, real, strict=True):
        args, kwargs = _call_to(attention, block, call)
        given = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
        assert given.pop("cache", None) is None, "weights() knows no earlier keys"
        context, mask, is_causal = given.get("context"), given.get("mask"), given.get("is_causal", False)
        found.append(AttentionInput(given["x"], context, mask, is_causal, wanted))
    return found


def measure(attention: Attention, inputs: Iterable[AttentionInput]) -> Moments:
    """The second moments of what an attention sees, with the attention that it pays to it."""
    n, width = attention.n_heads, attention.width
    queries = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    keys = torch.zeros(n, width, width, dtype=torch.float64)
    values, attended = torch.zeros_like(keys), torch.zeros(n, width, dtype=torch.float64)
    for one in inputs:
        context = one.x if one.context is None else one.context
        rows = nn.functional.pad(one.x[one.real], (0, 1), value=1.0)  # (N, D + 1)
        queries += (rows.T @ rows).double()
        weights = one.weights(attention).to(context.dtype)  # (B, n, T, S)
        looked_at, states = weights.sum(2), context.flatten(0, 1)  # (B, n, S), (B·S, D)
        for i in range(n):  # a head at a time, for memory's sake
            seen = (weights[:, i] @ context)[one.real]  # (N, D)
            square = (seen.T @ seen).double()
            values[i] += square
            keys[i] += ((states * looked_at[:, i].flatten()[:, None]).T @ states).double() - square
            attended[i] += seen.sum(0).double()
    count = queries[-1, -1].clone()
    attended /= count
    values = values / count - attended[:, :, None] * attended[:, None, :]
    return Moments(queries / count, keys / count, values, attended)


def _call_to(module: nn.Module, caller: nn.Module, call: Call) -> Call:
    """What ``caller``, called so, calls ``module`` with."""
    found: list[Call] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs))
        raise _Found

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        caller(*call.args, **call.kwargs)
    except _Found:
        pass
    finally:
        handle.remove()
    return found[0]


def real_queries(batches: Iterable[TokenBatch], place: str) -> Iterator[Tensor]:
    """Of each batch which queries in a stage's blocks are real tokens, (B, T) boolean."""
    for batch in batches:
        of_target = place == "decoder"
        tokens, real = (batch.target_tokens, batch.target_padding) if of_target else (batch.tokens, batch.padding)
        assert tokens is not None
        yield torch.ones_like(tokens, dtype=torch.bool) if real is None else real

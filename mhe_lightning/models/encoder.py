"""A BERT-like encoder that takes any attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mhe_lightning.attention import AttentionFactory
from mhe_lightning.attention.base import takes_parts
from mhe_lightning.attention.unpadded import Unpadded
from mhe_lightning.models.layers import (
    Activation,
    Block,
    Recompute,
    check_length,
    check_sizes,
    document_mask,
    init_normal,
    make_blocks,
    positions_in_documents,
    run_blocks,
    sinusoids,
)

UNPAD_FROM = 0.05
"""Share of padding in a batch from which on it is worth while to take it out."""


class Encoder(nn.Module):
    """Bidirectional transformer: post-norm blocks, learned positions, segment embeddings.

    Source: Devlin et al. 2019, *BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding*; the
    defaults are its base size. What is predicted from the hidden states is a head's affair (`models.heads`).

    Args:
        vocab_size: number of tokens V.
        attention: makes one attention module per layer, called with ``width=`` and ``n_heads=``.
        width: model width D.
        n_heads: attention heads n; must divide ``width``.
        n_layers: number of blocks.
        max_length: number of learned positions, the longest sequence in tokens.
        n_segments: number of segment embeddings; a pair of texts needs 2.
        ff_width: width of the feed-forward layer; 4 × ``width`` if not given.
        activation: of the feed-forward layer: "gelu" (BERT's), "gelu_tanh" or "relu".
        dropout: probability of dropping embeddings and sublayer outputs, in training; attention weights have their own
            dropout in ``attention``.
        bias: whether feed-forward layers and norms have biases.
        norm_eps: ε of the layer norms.
        init_std: standard deviation of matrices and embeddings at the start. BERT's 0.02 suits a width of 768; nets
            that are much narrower leave the first plateau sooner with one larger by √(768 / width).
        position_init: "normal" (BERT's), or "sinusoidal": learned positions that begin as the sinusoids of Vaswani et
            al. 2017, with deviation ``init_std``, so that relative offsets need not be found from nothing.

    Raises:
        ValueError: an argument is out of range.
    """

    causal = False
    unpads = True

    def __init__(
        self,
        vocab_size: int,
        attention: AttentionFactory,
        width: int = 768,
        n_heads: int = 12,
        n_layers: int = 12,
        max_length: int = 512,
        n_segments: int = 2,
        ff_width: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.1,
        bias: bool = True,
        norm_eps: float = 1e-12,
        init_std: float = 0.02,
        position_init: Literal["normal", "sinusoidal"] = "normal",
    ) -> None:
        super().__init__()
        check_sizes(
            vocab_size=vocab_size, n_layers=n_layers, max_length=max_length, n_segments=n_segments, dropout=dropout
        )
        self.vocab_size = vocab_size
        self.width = width
        self.max_length = max_length
        self.checkpoint_activations: Recompute = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.segment_embedding = nn.Embedding(n_segments, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.blocks = make_blocks(
            attention,
            n_layers=n_layers,
            n_heads=n_heads,
            width=width,
            ff_width=ff_width,
            activation=activation,
            dropout=dropout,
            bias=bias,
            norm_eps=norm_eps,
            norm_first=False,
        )
        if init_std <= 0:
            raise ValueError(f"init_std ({init_std}) must be positive; BERT's is 0.02")
        if position_init not in ("normal", "sinusoidal"):
            raise ValueError(f"position_init ({position_init!r}) must be 'normal' or 'sinusoidal'")
        init_normal(self, init_std)  # BERT truncates the normal distribution at two deviations; this does not
        if position_init == "sinusoidal":
            with torch.no_grad():  # a sinusoid's deviation is √½
                self.position_embedding.weight.copy_(sinusoids(max_length, width) * (init_std * math.sqrt(2)))

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        kept: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the last block, (B, T, D), or (K, D) at the positions that are ``kept``.

        With ``real`` and enough padding (`UNPAD_FROM`) all but the attention itself is computed of real tokens alone,
        and hidden states are zero at padding. Those of real tokens are the same either way, but for rounding and, in
        training, which numbers dropout drops.

        Args:
            tokens: (B, T) token ids.
            segments: (B, T) segment ids; 0 if not given.
            documents: (B, T) document ids of packed rows; tokens attend within their document only, and positions
                count from its start.
            padding: (B, T) boolean, True = a real token; the others are not attended to.
            kept: (K,) positions along the flattened (B, T) whose hidden states are wanted, all if not given; the last
                block computes no others. They are of real tokens.
            real: (M,) positions of the real tokens along the flattened (B, T), where ``padding`` is True. Given beside
                it because only a host that made the batch knows M without waiting for a device.

        Raises:
            ValueError: more tokens than positions.
        """
        T = tokens.shape[1]
        check_length(T, self.max_length)
        positions = torch.arange(T, device=tokens.device)
        mask = None
        if padding is not None:
            mask = padding[:, None, None, :]  # (B, 1, 1, T)
        if documents is not None:
            positions = positions_in_documents(documents)
            within = document_mask(documents)  # (B, 1, T, T)
            mask = within if mask is None else mask & within
        if segments is None:
            segments = torch.zeros_like(tokens)
        separable = padding is not None and all(isinstance(b, Block) and takes_parts(b.attention) for b in self.blocks)
        unpadded = _unpadded(tokens, real) if separable else None
        if unpadded is not None:
            positions = positions.expand_as(tokens)
            tokens, positions, segments = (unpadded.gather(ids) for ids in (tokens, positions, segments))  # (M,)
            if kept is not None:
                kept = unpadded.spread(torch.arange(len(tokens), device=kept.device)).flatten()[kept]
        x = self.token_embedding(tokens) + self.position_embedding(positions) + self.segment_embedding(segments)
        recompute = self.checkpoint_activations if self.training else False
        x = self.dropout(self.norm(x))
        x = run_blocks(self.blocks, x, mask, is_causal=False, kept=kept, unpadded=unpadded, recompute=recompute)
        return x if unpadded is None or kept is not None else unpadded.spread(x)


def _unpadded(tokens: Tensor, real: Tensor | None) -> Unpadded | None:
    """The real tokens of a batch, if they are few enough for it to be worth while; ``real`` (M,) along (B, T)."""
    if real is None or len(real) > (1 - UNPAD_FROM) * tokens.numel():
        return None
    return Unpadded(real, *tokens.shape)

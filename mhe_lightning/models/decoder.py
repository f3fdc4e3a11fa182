"""A GPT-2-like decoder language model that takes any attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhe_lightning.attention import AttentionFactory, KVCache
from mhe_lightning.attention.cache import StaticKVCache
from mhe_lightning.attention.products import Linear
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
)
from mhe_lightning.models.loss import linear_cross_entropy, token_cross_entropy


class Decoder(nn.Module):
    """Decoder-only transformer: pre-norm blocks, learned positions, a final norm, output tied to the embeddings.

    Source: Radford et al. 2019, *Language Models are Unsupervised Multitask Learners* (GPT-2); the defaults are its
    base size.

    Args:
        vocab_size: number of tokens V.
        attention: makes one attention module per layer, called with ``width=`` and ``n_heads=``.
        width: model width D.
        n_heads: attention heads n; must divide ``width``.
        n_layers: number of blocks.
        max_length: number of learned positions, the longest sequence in tokens.
        ff_width: width of the feed-forward layer; 4 × ``width`` if not given.
        activation: of the feed-forward layer: "gelu_tanh" (GPT-2's), "gelu" or "relu".
        dropout: probability of dropping embeddings and sublayer outputs, in training; attention weights have their own
            dropout in ``attention``.
        bias: whether feed-forward layers and norms have biases.
        tie_embeddings: whether the output projection is the token embedding.
        norm_eps: ε of the layer norms.
        loss_chunk: tokens whose logits are held at once when the loss is computed.

    Raises:
        ValueError: an argument is out of range.
    """

    causal = True

    def __init__(
        self,
        vocab_size: int,
        attention: AttentionFactory,
        width: int = 768,
        n_heads: int = 12,
        n_layers: int = 12,
        max_length: int = 1024,
        ff_width: int | None = None,
        activation: Activation = "gelu_tanh",
        dropout: float = 0.1,
        bias: bool = True,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-5,
        loss_chunk: int = 512,
    ) -> None:
        super().__init__()
        check_sizes(
            vocab_size=vocab_size, n_layers=n_layers, max_length=max_length, loss_chunk=loss_chunk, dropout=dropout
        )
        self.vocab_size = vocab_size
        self.width = width
        self.max_length = max_length
        self.loss_chunk = loss_chunk
        self.checkpoint_activations: Recompute = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_length, width)
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
            norm_first=True,
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.head = Linear(width, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation.

        Matrices and embeddings from N(0, 0.02²), biases zero, norms one. Each of the 2L projections that write to the
        residual stream is scaled by 1/√(2L), so that the stream's variance does not grow with depth. What is neither
        (MHE's head embeddings) is initialised by the attention that owns it.
        """
        init_normal(self)
        scale = 1 / math.sqrt(2 * len(self.blocks))
        for block in self.blocks:
            assert isinstance(block, Block)
            for projection in block.residual_projections():
                projection.weight.mul_(scale)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D), or (B, ``last``, D).

        Args:
            tokens: (B, T) token ids.
            documents: (B, T) document ids; tokens attend within their document only, and positions count from its
                start. Not together with caches or padding.
            padding: (B, S) boolean, True = a real token, for batches padded on either side; positions count real
                tokens. With caches, S covers what is cached and ``tokens``.
            caches: one `KVCache` per layer, for incremental decoding. With `StaticKVCache`s S is their ``max_length``,
                tokens to come may be real or not, and the caller adds T to their position after the call.
            last: only the last so many positions' are computed in the last block, all if not given.

        Raises:
            ValueError: more tokens than positions.
        """
        T = tokens.shape[1]
        static = caches[0] if caches and isinstance(caches[0], StaticKVCache) else None
        if static is not None:
            check_length(static.max_length, self.max_length)
            positions = static.places(T)
            mask: Tensor | None = static.visible(T)  # made once for all layers, causality included
        else:
            past = caches[0].length if caches else 0
            check_length(past + T, self.max_length)
            positions = torch.arange(past, past + T, device=tokens.device)
            mask = None
        if documents is not None:
            if padding is not None or caches is not None:
                raise ValueError("documents cannot be combined with padding or caches; pass one of them")
            positions = positions_in_documents(documents)
            mask = document_mask(documents)  # (B, 1, T, T)
        elif padding is not None:
            positions = (padding.cumsum(1) - 1).clamp_min(0)[:, positions]  # (B, T)
            real = padding[:, None, None, :]
            mask = real if mask is None else real & mask
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (B, T, D)
        recompute = self.checkpoint_activations if self.training else False
        x = run_blocks(self.blocks, x, mask, is_causal=static is None, caches=caches, last=last, recompute=recompute)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        return self.head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, summed where the target is not -100; hidden (B, T, D), targets (B, T)."""
        return linear_cross_entropy(hidden, self.head.weight, targets, chunk_size=self.loss_chunk)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each position, (B, T), 0 where the target is -100; without gradient."""
        return token_cross_entropy(hidden, self.head.weight, targets, chunk_size=self.loss_chunk)

    def new_caches(self, max_length: int | None = None, static: bool = False) -> list[KVCache]:
        """Empty caches, one per layer, for ``max_length`` tokens (all positions of the model if not given).

        With ``static`` they are `StaticKVCache`s with one position for all.
        """
        length = max_length or self.max_length
        if not static:
            return [KVCache(length) for _ in self.blocks]
        position = torch.zeros((), dtype=torch.int64, device=self.token_embedding.weight.device)
        return [StaticKVCache(length, position) for _ in self.blocks]

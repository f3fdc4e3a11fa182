"""A GPT-2-like decoder language model that takes any attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhe_lightning.attention import AttentionFactory, KVCache
from mhe_lightning.models.layers import Activation, Block, FeedForward
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
        sizes = {"vocab_size": vocab_size, "n_layers": n_layers, "max_length": max_length, "loss_chunk": loss_chunk}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} ({size}) must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout ({dropout}) must be in [0, 1); 0 switches it off")
        self.vocab_size = vocab_size
        self.width = width
        self.max_length = max_length
        self.loss_chunk = loss_chunk
        self.checkpoint_activations = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                attention=attention(width=width, n_heads=n_heads),
                feed_forward=FeedForward(
                    width=width,
                    hidden=4 * width if ff_width is None else ff_width,
                    activation=activation,
                    bias=bias,
                ),
                width=width,
                dropout=dropout,
                norm_eps=norm_eps,
                bias=bias,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.head = nn.Linear(width, vocab_size, bias=False)
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
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
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
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        Args:
            tokens: (B, T) token ids.
            documents: (B, T) document ids; tokens attend within their document only, and positions count from its
                start. Not together with caches or padding.
            padding: (B, S) boolean, True = a real token, for left-padded prompts; positions count real tokens. With
                caches, S covers what is cached and ``tokens``.
            caches: one `KVCache` per layer, for incremental decoding.

        Raises:
            ValueError: more tokens than positions.
        """
        past = caches[0].length if caches else 0
        T = tokens.shape[1]
        if past + T > self.max_length:
            raise ValueError(
                f"a sequence of {past + T} tokens does not fit the model's {self.max_length} positions (max_length); "
                "shorten it, or train a model with a larger max_length"
            )
        positions = torch.arange(past, past + T, device=tokens.device)
        mask = None
        if documents is not None:
            if padding is not None or caches is not None:
                raise ValueError("documents cannot be combined with padding or caches; pass one of them")
            positions = _positions_in_documents(documents)
            mask = (documents[:, :, None] == documents[:, None, :])[:, None]  # (B, 1, T, T)
        elif padding is not None:
            positions = (padding.cumsum(1) - 1).clamp_min(0)[:, past : past + T]  # (B, T)
            mask = padding[:, None, None, :]
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (B, T, D)
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, mask, True, cache, use_reentrant=False)
            else:
                x = block(x, mask, True, cache)
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

    def new_caches(self, max_length: int | None = None) -> list[KVCache]:
        """Empty caches, one per layer, for ``max_length`` tokens (all positions of the model if not given)."""
        return [KVCache(max_length or self.max_length) for _ in self.blocks]


def _positions_in_documents(documents: Tensor) -> Tensor:
    """(B, T) positions that start from 0 at each change of document id along a row."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values

"""The transformer of Vaswani et al. 2017, with any attention in each of its three places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mhe_lightning.attention import Attention, AttentionFactory, KVCache
from mhe_lightning.attention.products import Linear
from mhe_lightning.models.layers import (
    Activation,
    LayerCaches,
    Recompute,
    check_length,
    check_sizes,
    make_blocks,
    run_block,
    run_blocks,
    sinusoids,
)
from mhe_lightning.models.loss import linear_cross_entropy, token_cross_entropy


class EncoderDecoder(nn.Module):
    """Encoder and decoder of post-norm blocks with sinusoidal positions, for translation and its like.

    Token embeddings are multiplied by √D. Positions are not learned, so ``max_length`` costs no parameters. What is
    shared and what is tied has one embedding matrix: source, target and output in the default.

    Source: Vaswani et al. 2017, *Attention Is All You Need*, arXiv 1706.03762; the defaults are its base size.

    Args:
        vocab_size: number of tokens V, of both languages together.
        attention: makes the attention modules, called with ``width=`` and ``n_heads=``: of all three places, but
            where one of the next three is given.
        encoder_attention: makes the encoder's self-attention.
        decoder_attention: makes the decoder's self-attention, over the target's tokens before.
        cross_attention: makes the decoder's attention to the source.
        width: model width D.
        n_heads: attention heads n; must divide ``width``.
        n_layers: number of the encoder's blocks.
        n_decoder_layers: number of the decoder's blocks; as many as the encoder's if not given.
        max_length: the longest source, and the longest target, in tokens.
        ff_width: width of the feed-forward layers; 4 × ``width`` if not given.
        activation: of the feed-forward layers: "relu" (the paper's), "gelu" or "gelu_tanh".
        dropout: probability of dropping embeddings and sublayer outputs, in training; attention weights have their own
            dropout in ``attention``.
        bias: whether feed-forward layers and norms have biases.
        share_embeddings: whether source and target have one embedding.
        tie_embeddings: whether the output projection is the target's embedding.
        norm_eps: ε of the layer norms.
        loss_chunk: tokens whose logits are held at once when the loss is computed.

    Raises:
        ValueError: an argument is out of range.
    """

    causal = False

    def __init__(
        self,
        vocab_size: int,
        attention: AttentionFactory,
        encoder_attention: AttentionFactory | None = None,
        decoder_attention: AttentionFactory | None = None,
        cross_attention: AttentionFactory | None = None,
        width: int = 512,
        n_heads: int = 8,
        n_layers: int = 6,
        n_decoder_layers: int | None = None,
        max_length: int = 512,
        ff_width: int | None = None,
        activation: Activation = "relu",
        dropout: float = 0.1,
        bias: bool = True,
        share_embeddings: bool = True,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-5,
        loss_chunk: int = 512,
    ) -> None:
        super().__init__()
        check_sizes(
            vocab_size=vocab_size,
            n_layers=n_layers,
            n_decoder_layers=1 if n_decoder_layers is None else n_decoder_layers,
            max_length=max_length,
            loss_chunk=loss_chunk,
            dropout=dropout,
        )
        self.vocab_size = vocab_size
        self.width = width
        self.max_length = max_length
        self.loss_chunk = loss_chunk
        self.checkpoint_activations: Recompute = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.target_embedding = self.token_embedding if share_embeddings else nn.Embedding(vocab_size, width)
        self.register_buffer("positions", sinusoids(max_length, width), persistent=False)
        self.positions: Tensor
        self.dropout = nn.Dropout(dropout)
        make = partial(
            make_blocks,
            n_heads=n_heads,
            width=width,
            ff_width=ff_width,
            activation=activation,
            dropout=dropout,
            bias=bias,
            norm_eps=norm_eps,
            norm_first=False,
        )
        self.encoder_blocks = make(encoder_attention or attention, n_layers=n_layers)
        self.decoder_blocks = make(
            decoder_attention or attention,
            cross_attention=cross_attention or attention,
            n_layers=n_layers if n_decoder_layers is None else n_decoder_layers,
        )
        self.head = Linear(width, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.target_embedding.weight
        self.init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, the encoder's first: the units that are compiled."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings from N(0, 1/D), which √D scales to 1; matrices uniform after Glorot & Bengio 2010, biases zero.

        An attention's projections all begin as Glorot's D × D matrix does, however many heads of keys and values a
        variant has: their entries are of one size in every variant. Head embeddings are initialised by the attention
        that owns them.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention):
                for projection in module.children():
                    if isinstance(projection, nn.Linear):
                        nn.init.uniform_(projection.weight, -math.sqrt(3 / self.width), math.sqrt(3 / self.width))
        for matrix in (self.token_embedding, self.target_embedding, self.head):
            nn.init.normal_(matrix.weight, std=self.width**-0.5)

    def forward(self, tokens: Tensor, target_tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Hidden states of the decoder, (B, T, D), each from the source and the target's tokens up to its own.

        Args:
            tokens: (B, S) token ids of the sources.
            target_tokens: (B, T) token ids of the targets, shifted by one: the start token first. Padding on the right
                is seen by no token before it.
            padding: (B, S) boolean, True = a real token of the source; the others are not attended to.

        Raises:
            ValueError: more tokens than positions.
        """
        return self.decode(target_tokens, self.encode(tokens, padding), padding)

    def encode(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Hidden states of the encoder, (B, S, D), from token ids (B, S)."""
        check_length(tokens.shape[1], self.max_length)
        x = self._embed(self.token_embedding, tokens, 0)
        recompute = self.checkpoint_activations if self.training else False
        return run_blocks(self.encoder_blocks, x, _source_mask(padding), is_causal=False, recompute=recompute)

    def decode(
        self,
        tokens: Tensor,
        source: Tensor,
        padding: Tensor | None = None,
        caches: Sequence[LayerCaches] | None = None,
    ) -> Tensor:
        """Hidden states of the decoder, (B·k, T, D).

        Args:
            tokens: (B·k, T) token ids of the targets; rows i·k to i·k + k - 1 belong to source i.
            source: (B, S, D), what `encode` gave.
            padding: (B, S) boolean, True = a real token of the source.
            caches: one `LayerCaches` per block, for incremental decoding: ``tokens`` follow those of earlier calls.

        Raises:
            ValueError: more tokens than positions.
        """
        past = caches[0].own.length if caches else 0
        check_length(past + tokens.shape[1], self.max_length)
        x = self._embed(self.target_embedding, tokens, past)
        mask = _source_mask(padding)
        recompute = self.checkpoint_activations if self.training else False
        for i, block in enumerate(self.decoder_blocks):
            arguments = (x, source, mask, caches[i] if caches else None)
            x = run_block(block, *arguments, recompute=recompute)
        return x

    def _embed(self, embedding: nn.Module, tokens: Tensor, past: int) -> Tensor:
        scaled = embedding(tokens) * math.sqrt(self.width)  # (B, T, D)
        return self.dropout(scaled + self.positions[past : past + tokens.shape[1]].to(scaled.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        return self.head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats, summed where the target is not -100; hidden (B, T, D), targets (B, T)."""
        return linear_cross_entropy(
            hidden, self.head.weight, targets, label_smoothing=label_smoothing, chunk_size=self.loss_chunk
        )

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each position, (B, T), 0 where the target is -100; without gradient."""
        return token_cross_entropy(hidden, self.head.weight, targets, chunk_size=self.loss_chunk)

    def new_caches(self, source_length: int, max_length: int | None = None) -> list[LayerCaches]:
        """Empty caches, one pair per decoder block.

        Args:
            source_length: tokens of the source, S.
            max_length: tokens of the target (all positions of the model if not given).
        """
        return [
            LayerCaches(KVCache(max_length or self.max_length), KVCache(source_length)) for _ in self.decoder_blocks
        ]


def _source_mask(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else padding[:, None, None, :]  # (B, 1, 1, S)

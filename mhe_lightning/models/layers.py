"""The parts that transformers are built from. `Block` is the unit that is compiled, checkpointed and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mhe_lightning.attention import Attention, AttentionFactory, KVCache
from mhe_lightning.attention.base import takes_parts
from mhe_lightning.attention.products import Linear
from mhe_lightning.attention.tensor_parallel import share, split_columns, split_rows
from mhe_lightning.attention.unpadded import Unpadded
from mhe_lightning.models.gelu_linear import Approximate, gelu_linear

Activation = Literal["gelu", "gelu_tanh", "relu"]
Recompute = bool | Literal["selective"]
"""Whether a block is computed again in the backward pass; "selective" keeps what is dear to compute."""

GELUS: dict[str, Approximate] = {
    "gelu": "none",
    "gelu_tanh": "tanh",  # GPT-2's; up to 1.7e-3 from the exact one in logits
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: partial(F.gelu, approximate=approximate) for name, approximate in GELUS.items()},
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """``W_2 σ(W_1 x)``, position by position.

    Args:
        width: model width D.
        hidden: width of the layer between.
        activation: σ: "gelu" (exact), "gelu_tanh" (GPT-2's approximation) or "relu".
        bias: whether both projections have biases.
    """

    def __init__(self, *, width: int, hidden: int, activation: Activation, bias: bool = True) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation ({activation!r}) must be one of {', '.join(ACTIVATIONS)}")
        if hidden < 1:
            raise ValueError(f"the feed-forward width ({hidden}) must be at least 1; 4 × width is usual")
        self.activation = activation
        self.w_1 = Linear(width, hidden, bias=bias)
        self.w_2 = Linear(hidden, width, bias=bias)

        self.mesh: DeviceMesh | None = None

    def parallelize(self, mesh: DeviceMesh) -> None:
        """Split the hidden units over the processes of ``mesh`` (tensor parallelism), in place.

        Raises:
            ValueError: they cannot be divided among the processes.
        """
        hidden = self.w_1.out_features
        if hidden % mesh.size():
            raise ValueError(
                f"the feed-forward width ({hidden}) must be a multiple of tensor_parallel ({mesh.size()}), whose "
                "processes divide it among them"
            )
        split_columns(self.w_1, mesh)
        split_rows(self.w_2, mesh)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh is not None:
            x = share(x, self.mesh)
        x = self.w_1(x)
        if self.activation in GELUS:
            return gelu_linear(x, self.w_2, GELUS[self.activation])
        return self.w_2(ACTIVATIONS[self.activation](x))


class Block(nn.Module):
    """A transformer layer: attention and a feed-forward net, each added to the residual stream.

    Pre-norm (GPT-2; Radford et al. 2019): ``x + f(norm(x))``. Post-norm (Vaswani et al. 2017, and BERT):
    ``norm(x + f(x))``.

    Args:
        attention: this layer's self-attention.
        feed_forward: this layer's feed-forward net.
        width: model width D.
        dropout: probability of dropping a number of either sublayer's output, in training.
        norm_eps: ε of the layer norms.
        norm_first: pre-norm; False is post-norm.
        bias: whether the layer norms have biases.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        feed_forward: FeedForward,
        width: int,
        dropout: float,
        norm_eps: float,
        norm_first: bool,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm_1 = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.attention = attention
        self.norm_2 = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        kept: Tensor | None = None,
        unpadded: Unpadded | None = None,
        last: int | None = None,
    ) -> Tensor:
        """(B, T, D) → (B, T, D), or (K, D) at the positions ``kept`` (K,), which count along the flattened (B, T), or
        (B, ``last``, D) at the last so many.

        Nothing after the attention mixes positions, so those that are not kept need not be computed. What is before
        the last is not even asked for: only its keys and values are. With ``unpadded`` ``x`` is (M, D), the real
        tokens alone, and ``kept`` counts along these.
        """
        return self.feed(self.attend(x, mask, is_causal, cache, kept, unpadded, last))

    def attend(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        kept: Tensor | None = None,
        unpadded: Unpadded | None = None,
        last: int | None = None,
    ) -> Tensor:
        """The block's first half, its self-attention."""
        normed = self.norm_1(x) if self.norm_first else x
        options: dict[str, Any] = {}  # an attention of a user's own may not know of them
        if unpadded is not None:
            options["unpadded"] = unpadded
        if last is not None and takes_parts(self.attention):
            options["last"] = last
        found = self.attention(normed, mask=mask, is_causal=is_causal, cache=cache, **options)
        if last is not None:
            x, found = x[:, -last:], found[:, -last:]
        x = x + self.dropout(found)
        if kept is not None:
            x = x.flatten(0, -2)[kept]
        return x if self.norm_first else self.norm_1(x)

    def feed(self, x: Tensor) -> Tensor:
        """The block's last part, its feed-forward net."""
        if self.norm_first:
            return x + self.dropout(self.feed_forward(self.norm_2(x)))
        return self.norm_2(x + self.dropout(self.feed_forward(x)))

    def parallelize(self, mesh: DeviceMesh) -> None:
        """Split heads and hidden units over the processes of ``mesh`` (tensor parallelism), in place.

        Norms are computed on every process.
        """
        self.attention.parallelize(mesh)
        self.feed_forward.parallelize(mesh)

    def residual_projections(self) -> tuple[nn.Linear, ...]:
        """The matrices whose outputs are added to the residual stream."""
        return self.attention.w_o, self.feed_forward.w_2


class LayerCaches(NamedTuple):
    """What a `CrossBlock` keeps between steps: keys and values of the target's tokens so far, and of the source."""

    own: KVCache
    source: KVCache


class CrossBlock(Block):
    """A decoder's layer with attention to an encoder's output between self-attention and feed-forward net; post-norm.

    Source: Vaswani et al. 2017, section 3.1.

    Args:
        attention: this layer's self-attention.
        cross_attention: this layer's attention to the source.
        feed_forward: this layer's feed-forward net.
        width: model width D.
        dropout: probability of dropping a number of a sublayer's output, in training.
        norm_eps: ε of the layer norms.
        bias: whether the layer norms have biases.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        cross_attention: Attention,
        feed_forward: FeedForward,
        width: int,
        dropout: float,
        norm_eps: float,
        bias: bool = True,
    ) -> None:
        super().__init__(
            attention=attention,
            feed_forward=feed_forward,
            width=width,
            dropout=dropout,
            norm_eps=norm_eps,
            norm_first=False,
            bias=bias,
        )
        self.cross_attention = cross_attention
        self.norm_cross = nn.LayerNorm(width, eps=norm_eps, bias=bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, source: Tensor, source_mask: Tensor | None = None, caches: LayerCaches | None = None
    ) -> Tensor:
        """(B·k, T, D) → (B·k, T, D).

        Args:
            x: the target's side; row i belongs to the source row i // k.
            source: (B, S, D), the encoder's output.
            source_mask: boolean, True = may attend, broadcastable to (B, n, T, S).
            caches: of earlier calls.
        """
        x = self.attend(x, is_causal=True, cache=None if caches is None else caches.own)
        # the k rows of one source are further queries to the same keys, which then need no k copies
        queries = x.reshape(source.shape[0], -1, x.shape[2])  # (B, k·T, D)
        found = self.cross_attention(
            queries, context=source, mask=source_mask, cache=None if caches is None else caches.source
        )
        return self.feed(self.norm_cross(x + self.dropout(found.view_as(x))))

    def parallelize(self, mesh: DeviceMesh) -> None:
        super().parallelize(mesh)
        self.cross_attention.parallelize(mesh)

    def residual_projections(self) -> tuple[nn.Linear, ...]:
        return *super().residual_projections(), self.cross_attention.w_o


def make_blocks(
    attention: AttentionFactory,
    *,
    cross_attention: AttentionFactory | None = None,
    n_layers: int,
    n_heads: int,
    width: int,
    ff_width: int | None,
    activation: Activation,
    dropout: float,
    bias: bool,
    norm_eps: float,
    norm_first: bool,
) -> nn.ModuleList:
    """``n_layers`` blocks, each with an attention of its own; ``ff_width`` None is 4 × ``width``.

    With ``cross_attention`` each is a `CrossBlock`, which is post-norm.
    """

    def make_block() -> Block:
        own = attention(width=width, n_heads=n_heads)
        across = None if cross_attention is None else cross_attention(width=width, n_heads=n_heads)
        feed_forward = FeedForward(
            width=width, hidden=4 * width if ff_width is None else ff_width, activation=activation, bias=bias
        )
        if across is None:
            return Block(
                attention=own,
                feed_forward=feed_forward,
                width=width,
                dropout=dropout,
                norm_eps=norm_eps,
                norm_first=norm_first,
                bias=bias,
            )
        assert not norm_first, "a CrossBlock is post-norm"
        return CrossBlock(
            attention=own,
            cross_attention=across,
            feed_forward=feed_forward,
            width=width,
            dropout=dropout,
            norm_eps=norm_eps,
            bias=bias,
        )

    return nn.ModuleList(make_block() for _ in range(n_layers))


def run_blocks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    x: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    caches: Sequence[KVCache] | None = None,
    kept: Tensor | None = None,
    unpadded: Unpadded | None = None,
    last: int | None = None,
    recompute: Recompute = False,
) -> Tensor:
    """``x`` (B, T, D) through ``blocks``, each as `run_block` runs it.

    With ``kept`` (K,), positions along the flattened (B, T), the result is (K, D) at these positions; with ``last`` it
    is (B, ``last``, D) at the last so many. With ``unpadded`` ``x`` is (M, D), the real tokens alone, and ``kept``
    counts along these.
    """
    for i, block in enumerate(blocks):
        own_kept, own_last = (kept, last) if i == len(blocks) - 1 else (None, None)
        arguments = (x, mask, is_causal, caches[i] if caches else None, own_kept, unpadded, own_last)
        x = run_block(block, *arguments, recompute=recompute)
    return x


def run_block(block: nn.Module, *arguments: Any, recompute: Recompute) -> Tensor:
    """``block(*arguments)``; with ``recompute`` only the arguments are kept, and the rest computed again for backward.

    "selective" also keeps what matrix products and attention give, which is dear to compute again, and not norms,
    activations and dropout, which are as large.
    """
    if not recompute:
        return block(*arguments)
    if recompute != "selective":
        return checkpoint(block, *arguments, use_reentrant=False)
    kept = partial(create_selective_checkpoint_contexts, list(DEAR))
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=kept)


aten = torch.ops.aten
DEAR = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.mhe_lightning.shared_score_attention.default,
    torch.ops._c10d_functional.all_reduce.default,  # of tensor parallelism
)
"""Operators whose results selective checkpointing keeps."""


def check_sizes(*, dropout: float, **sizes: int) -> None:
    """Raise a ValueError unless every size is at least 1 and ``dropout`` is a probability below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout ({dropout}) must be in [0, 1); 0 switches it off")


@torch.no_grad()
def init_normal(net: nn.Module, std: float = 0.02) -> None:
    """Matrices and embeddings of ``net`` from N(0, std²), biases of linear layers zero.

    Norms keep their ones and zeros; what is none of these (MHE's head embeddings) is initialised by the attention that
    owns it.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions (length, width): sine at even, cosine at odd channels (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def positions_in_documents(documents: Tensor) -> Tensor:
    """(B, T) positions that start from 0 at each change of document id along a row."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T) attention mask, True between tokens of the same document."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def check_length(length: int, max_length: int) -> None:
    """Raise a ValueError if a sequence is longer than the model's positions."""
    if length > max_length:
        raise ValueError(
            f"a sequence of {length} tokens does not fit the model's {max_length} positions (max_length); "
            "shorten it, or train a model with a larger max_length"
        )

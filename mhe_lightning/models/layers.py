"""The parts that transformers are built from. `Block` is the unit that is compiled, checkpointed and sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mhe_lightning.attention import Attention, KVCache

Activation = Literal["gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's; up to 1.7e-3 from the exact one in logits
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
        self.w_1 = nn.Linear(width, hidden, bias=bias)
        self.w_2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(ACTIVATIONS[self.activation](self.w_1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Source: Radford et al. 2019, *Language Models are Unsupervised Multitask Learners* (GPT-2).

    Args:
        attention: this layer's self-attention.
        feed_forward: this layer's feed-forward net.
        width: model width D.
        dropout: probability of dropping a number of either sublayer's output, in training.
        norm_eps: ε of the layer norms.
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
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.attention = attention
        self.norm_2 = nn.LayerNorm(width, eps=norm_eps, bias=bias)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask=mask, is_causal=is_causal, cache=cache))
        return x + self.dropout(self.feed_forward(self.norm_2(x)))

    def residual_projections(self) -> tuple[nn.Linear, ...]:
        """The matrices whose outputs are added to the residual stream."""
        return self.attention.w_o, self.feed_forward.w_2

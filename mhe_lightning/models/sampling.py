"""Which token comes next, from the logits: the likeliest, or one drawn, row by row or all rows on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: choose among the k most likely tokens only.
        top_p: choose among the smallest set of most likely tokens whose probabilities sum to at least p.

    Raises:
        ValueError: one is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1; leave it out to sample from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be in (0, 1]; leave it out to sample from all tokens")

    def choose_each(self, logits: Tensor, streams: Sequence[torch.Generator]) -> Tensor:
        """Tokens (B,) from ``logits`` (B, V), one row after another on the CPU, each with its random stream."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.tensor([self._choose(row, s) for row, s in zip(logits.cpu(), streams, strict=True)])

    def choose_all(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens (B,) from ``logits`` (B, V) and a uniform number in [0, 1) for each row (B,), where the logits are.

        Every shape follows from those of the arguments, and nothing is read back.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        p, tokens = self._candidates(logits)  # (B, k)
        if self.top_p is not None:
            before = p.cumsum(-1).roll(1, -1)
            before[:, 0] = 0.0
            p = p * (before < self.top_p)
        below = p.cumsum(-1)
        place = (below <= uniform[:, None] * below[:, -1:]).sum(-1, keepdim=True)
        # where rounding makes the product the whole sum, the last that can be chosen
        return tokens.gather(1, torch.minimum(place, (p > 0).sum(-1, keepdim=True) - 1)).squeeze(1)

    def _choose(self, logits: Tensor, stream: torch.Generator) -> int:
        """One token from the logits (V,) of one prompt."""
        if self.temperature == 0:
            return int(logits.argmax())
        p, tokens = self._candidates(logits)
        if self.top_p is not None:
            p = p[: int((p.cumsum(-1) < self.top_p).sum()) + 1]
        return int(tokens[torch.multinomial(p, 1, generator=stream)])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the tokens that temperature and top_k leave, the likeliest first, and these tokens."""
        # the largest is 0 however small the temperature
        values, tokens = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).sort(
            descending=True, stable=True
        )
        if self.top_k is not None:
            values, tokens = values[..., : self.top_k], tokens[..., : self.top_k]
        return values.softmax(-1), tokens

"""MHE-ADD without its key embedding, to show that it does nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhe_lightning.attention import MHE


class KeylessMHE(MHE):
    """MHE with ``combine="add"`` whose key embedding is drawn, so that all else begins alike, and then left out.

    Args:
        arguments: as of `MHE`.
    """

    def __init__(self, *, width: int, n_heads: int, **arguments: Any) -> None:
        super().__init__(width=width, n_heads=n_heads, combine="add", **arguments)
        del self.e_k

    def _added_queries(self) -> Tensor:
        return self.e_q

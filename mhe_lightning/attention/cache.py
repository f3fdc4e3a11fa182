"""What attention keeps between calls: keys and values of the tokens so far, with shapes that grow or that do not."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """The keys and values of one attention layer, for incremental decoding.

    The buffers are allocated once, at the first call, for ``max_length`` tokens and with the heads that the variant
    stores, so that decoding neither reallocates nor copies what is there. They are written in place: use it without
    gradients (``torch.no_grad`` or ``inference_mode``). A cache that holds a context's keys and values, in
    cross-attention, is for that context alone.

    Args:
        max_length: tokens that it can hold.
    """

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length ({max_length}) must be at least 1")
        self.max_length = max_length
        self.length = 0
        self._buffers: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store ``new`` tensors, each (B, g, T, d), after those held; return all that is held, (B, g, length, d)."""
        T = new[0].shape[2]
        end = self.length + T
        if end > self.max_length:
            raise ValueError(
                f"the KV cache holds {self.length} of at most {self.max_length} tokens and cannot take {T} more; "
                "make it with a larger max_length"
            )
        self.check_batch(new[0].shape[0])
        if not self._buffers:
            self._buffers = tuple(t.new_empty(*t.shape[:2], self.max_length, t.shape[3]) for t in new)
        for buffer, t in zip(self._buffers, new, strict=True):
            buffer[:, :, self.length : end] = t
        self.length = end
        return self.stored()

    def check_batch(self, rows: int) -> None:
        """Raise ``ValueError`` unless the cache is empty or holds a batch of ``rows``."""
        if self._buffers and self._buffers[0].shape[0] != rows:
            raise ValueError(
                f"the KV cache holds a batch of {self._buffers[0].shape[0]} but the new one has {rows} rows; "
                "use a new KVCache, or reorder this one"
            )

    def stored(self) -> tuple[Tensor, ...]:
        """What is held, as views (B, g, length, d)."""
        return tuple(buffer[:, :, : self.length] for buffer in self._buffers)

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """Keep the batch rows ``rows`` (a LongTensor, repeats allowed), as a beam search does after each step.

        Only what is held is copied, not the part of the buffers that later tokens will fill; nor what is ``shared``.

        Args:
            rows: which row each is from now on.
            shared: so many first tokens of row ``rows[i]`` and row i are the same, for every i, and are not copied.

        Raises:
            ValueError: ``shared`` is not 0 and the number of rows changes, or it is more than is held.
        """
        if not self._buffers:
            return
        if self._buffers[0].shape[0] == len(rows):
            if not 0 <= shared <= self.length:
                raise ValueError(f"shared ({shared}) must be from 0 to the {self.length} tokens that are held")
            for buffer in self._buffers:
                buffer[:, :, shared : self.length] = buffer[:, :, shared : self.length].index_select(0, rows)
            return
        if shared:
            raise ValueError(
                f"shared ({shared}) must be 0 where {self._buffers[0].shape[0]} rows become {len(rows)}: "
                "none of the new rows holds anything yet"
            )
        chosen = [t.index_select(0, rows) for t in self.stored()]
        self._buffers = tuple(buffer.new_empty(len(rows), *buffer.shape[1:]) for buffer in self._buffers)
        for buffer, t in zip(self._buffers, chosen, strict=True):
            buffer[:, :, : self.length] = t

    @property
    def elements_per_token(self) -> int:
        """Numbers stored for one token of one sequence (2nd in MHA, 2d in MHE, MQA and SHA)."""
        return sum(buffer.shape[1] * buffer.shape[3] for buffer in self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, for the whole batch and ``max_length`` tokens."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)


class StaticKVCache(KVCache):
    """A KV cache whose tensors have the same shapes in every call, and whose length stays on the device.

    Attention is to the whole buffer, ``max_length`` keys, under a mask that hides what is not written. So the work of a
    step does not depend on how many tokens are held: nothing is read back to the host, one step can be captured as a
    CUDA graph, and a compiled one is compiled once. It costs the attention to ``max_length`` keys from the first token
    on, which is slower where launching kernels is not what takes the time, as on a CPU.

    It is for self-attention. Whether there is room for more tokens is not checked, as that would be to wait for the
    device: the caller knows how many tokens it feeds.

    Args:
        max_length: tokens that it can hold.
        position: number of tokens held, (), int64, on the device of the keys. All layers of a net share this tensor;
            `append` does not move it, so whoever runs the layers adds to it, in place, after all of them.
    """

    def __init__(self, max_length: int, position: Tensor) -> None:
        if position.shape != () or position.dtype != torch.int64:
            raise ValueError(
                f"position has shape {tuple(position.shape)} and dtype {position.dtype}; it must be one number, "
                "torch.zeros((), dtype=torch.int64) on the device of the keys"
            )
        self.position = position
        super().__init__(max_length)

    @property
    def length(self) -> int:
        """Tokens held. Reading it waits for the device."""
        return int(self.position)

    @length.setter
    def length(self, length: int) -> None:
        self.position.fill_(length)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Write ``new`` tensors, each (B, g, T, d), behind those held; return the buffers, (B, g, max_length, d)."""
        self.check_batch(new[0].shape[0])
        if not self._buffers:
            # zeros: a hidden key has weight 0, and 0 × what uninitialised memory may hold (NaN) is not 0
            self._buffers = tuple(t.new_zeros(*t.shape[:2], self.max_length, t.shape[3]) for t in new)
        places = self.places(new[0].shape[2])
        for buffer, t in zip(self._buffers, new, strict=True):
            buffer.index_copy_(2, places, t)
        return self._buffers

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """As `KVCache.reorder`, but of the whole buffers, for what is held is not known on the host."""
        chosen = tuple(buffer.index_select(0, rows) for buffer in self._buffers)
        if self._buffers and self._buffers[0].shape[0] != len(rows):
            self._buffers = chosen
            return
        for buffer, t in zip(self._buffers, chosen, strict=True):
            buffer.copy_(t)

    def places(self, T: int) -> Tensor:
        """Where the next ``T`` tokens are written, (T,)."""
        return next_places(T, self.position)

    def visible(self, T: int) -> Tensor:
        """Which keys the next ``T`` tokens see, (T, max_length): those held, its own and those between."""
        return causal_keys(T, self.max_length, self.position)


def next_places(T: int, past: Tensor) -> Tensor:
    """past … past + T - 1, as (T,)."""
    return past.view(1) if T == 1 else past + torch.arange(T, device=past.device)


def causal_keys(T: int, S: int, past: Tensor) -> Tensor:
    """Which of S keys are seen by queries that follow the ``past`` () first of them, boolean, (T, S)."""
    return torch.arange(S, device=past.device) <= next_places(T, past)[:, None]

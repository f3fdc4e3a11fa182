"""How long the next token takes at a context length, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhe_lightning.models import Decoder, EncoderDecoder
from mhe_lightning.models.layers import LayerCaches


@dataclass
class _Decoding:
    """A net whose caches hold a context of one sequence."""

    net: nn.Module
    caches: Any
    source: Tensor | None
    context: int

    @torch.inference_mode()
    def seconds(self, token: Tensor) -> float:
        """Of one more token; the caches are as they were afterwards."""
        begun = time.perf_counter()
        if self.source is None:
            hidden = self.net(token, caches=self.caches)
        else:
            hidden = self.net.decode(token, self.source, caches=self.caches)  # type: ignore[operator]
        self.net.logits(hidden[:, -1]).argmax(-1).item()  # type: ignore[operator]
        elapsed = time.perf_counter() - begun
        for cache in self.caches:
            (cache.own if isinstance(cache, LayerCaches) else cache).length = self.context
        return elapsed


@torch.inference_mode()
def decode_latency(
    nets: Mapping[str, nn.Module], contexts: Sequence[int] | None = None, *, rounds: int = 21
) -> dict[str, dict[int, float]]:
    """Median seconds for the next token of one sequence, its logits included, all nets in turn.

    Args:
        nets: name → a net, in eval mode and with weights of any value, on the device to measure. Encoders are left out.
        contexts: tokens before, in the KV cache; of an encoder–decoder those of the source and of the target each.
            Not given: powers of two from 16 to the longest that all nets have positions for.
        rounds: measurements of each; one more is thrown away.

    Returns:
        Name → context → seconds.
    """
    decoding = {name: net for name, net in nets.items() if isinstance(net, Decoder | EncoderDecoder)}
    if not decoding:
        return {}
    longest = min(net.max_length for net in decoding.values()) - 1
    wanted = contexts or [2**k for k in range(4, 20) if 2**k <= longest] or [longest]
    found: dict[str, dict[int, float]] = {name: {} for name in decoding}
    for context in wanted:
        states = {name: _prefilled(net, context) for name, net in decoding.items()}
        token = torch.zeros(1, 1, dtype=torch.long, device=next(iter(decoding.values())).token_embedding.weight.device)
        times: dict[str, list[float]] = {name: [] for name in decoding}
        for round_ in range(rounds + 1):
            for name, state in states.items():
                seconds = state.seconds(token)
                if round_:
                    times[name].append(seconds)
        for name, measured in times.items():
            found[name][context] = statistics.median(measured)
    return found


def _prefilled(net: Decoder | EncoderDecoder, context: int) -> _Decoding:
    tokens = torch.zeros(1, context, dtype=torch.long, device=net.token_embedding.weight.device)
    if isinstance(net, Decoder):
        caches: Any = net.new_caches(context + 1)
        net(tokens, caches=caches)
        return _Decoding(net, caches, None, context)
    source = net.encode(tokens)
    caches = net.new_caches(context, context + 1)
    net.decode(tokens, source, caches=caches)
    return _Decoding(net, caches, source, context)

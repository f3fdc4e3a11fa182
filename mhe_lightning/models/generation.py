"""Text from a decoder, token by token over its KV caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mhe_lightning.attention.cache import KVCache, StaticKVCache
from mhe_lightning.models.decoder import Decoder
from mhe_lightning.models.sampling import Sampling
from mhe_lightning.models.text_stream import TextStream

STEPS_AHEAD = 8
"""On a GPU, the steps that are launched before the tokens are read: the host then waits for it once for so many."""

WARM_UP = 3
"""Steps before a CUDA graph is captured: the first calls of a kernel allocate and choose, which a graph must not."""


def generate(net: Decoder, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """Continue each prompt: the tokens of `stream`, when all are there.

    Args:
        net: the decoder, in eval mode.
        prompts: token ids, at least one per prompt.
        settings: of `stream`.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, a setting out of range, or more tokens than the model has positions.
    """
    steps = stream(net, prompts, **settings)
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in steps:
        for row, token in enumerate(tokens):
            if token is not None:
                new[row].append(token)
    return new


@torch.inference_mode()
def stream(
    net: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    first: int = 0,
    static: bool | None = None,
) -> Iterator[list[int | None]]:
    """Continue each prompt, step by step; a batch of prompts of different lengths is padded on the left.

    Every prompt draws from its own random stream, a function of ``seed`` and its number, so neither the other prompts
    nor the batch size change what it draws. A GPU uses these streams in another way than a CPU, one number for each
    token: the same seed gives other tokens there. And it runs ahead of what is yielded by up to `STEPS_AHEAD` steps.

    Args:
        net: the decoder, in eval mode.
        prompts: token ids, at least one per prompt.
        max_new_tokens: tokens to add to each.
        temperature: divides the logits before sampling; 0 takes the most likely token (greedy).
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least p.
        seed: of the random streams.
        stop_token: a prompt is finished at this token, which is not returned.
        first: number of the first prompt, where a longer list is continued in several batches.
        static: whether the KV caches have fixed shapes (`StaticKVCache`), so that a GPU replays each step as a CUDA
            graph. Not given: on a GPU. Elsewhere caches that grow are faster.

    Yields:
        The next token of each prompt, None of one that is finished. Ends when all are.

    Raises:
        ValueError: at the first step: an empty prompt, a setting out of range, or more tokens than the model has
            positions.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check_lengths(net, prompts, max_new_tokens)
    device = net.token_embedding.weight.device
    on_gpu = _replays(device)
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    padding = torch.ones(len(prompts), longest + max_new_tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        padding[row, : longest - len(prompt)] = False
    tokens = tokens.to(device)
    streams = [torch.Generator().manual_seed((seed * 1_000_003 + first + row) % 2**63) for row in range(len(prompts))]
    if on_gpu:
        uniform = torch.stack([torch.rand(max_new_tokens, generator=s) for s in streams], dim=1).to(device)
    caches = net.new_caches(padding.shape[1], static=on_gpu if static is None else static)
    step = _Step(net, None if padding.all() else padding.to(device), caches)
    chosen: list[Tensor] = []  # not read yet, each (B,)
    finished = [False] * len(prompts)
    for n in range(max_new_tokens):
        logits = step(tokens).float()  # (B, V)
        chosen.append(sampling.choose_all(logits, uniform[n]) if on_gpu else sampling.choose_each(logits, streams))
        tokens = chosen[-1][:, None]
        if on_gpu and len(chosen) < STEPS_AHEAD and n + 1 < max_new_tokens:
            continue
        for found in torch.stack(chosen).tolist():
            finished = [done or token == stop_token for done, token in zip(finished, found, strict=True)]
            if all(finished):
                return
            yield [None if done else token for done, token in zip(finished, found, strict=True)]
        chosen.clear()
        tokens = tokens.to(device)


def _replays(device: torch.device) -> bool:
    """Whether the host only launches the steps, as far as it can: they are CUDA graphs there."""
    return device.type == "cuda"


class _Step:
    """Logits after the tokens of a call, (B, V), which follow those of the calls before.

    Args:
        net: the decoder.
        padding: (B, S) boolean, True = a real token, of all tokens that will be fed; all are real if not given.
        caches: empty ones, a KV cache per layer, all static or none.
    """

    def __init__(self, net: Decoder, padding: Tensor | None, caches: Sequence[KVCache]) -> None:
        self.net = net
        self.padding = padding
        self.caches = caches
        self.length = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        begins = self.length == 0
        self.length += tokens.shape[1]
        cache = self.caches[0]
        if not isinstance(cache, StaticKVCache):
            padding = None if self.padding is None else self.padding[:, : self.length]
            return next_logits(self.net, tokens, padding, self.caches)
        if _replays(tokens.device) and not begins:
            logits = self._replayed(tokens)
        else:
            logits = next_logits(self.net, tokens, self.padding, self.caches)
        cache.position.add_(tokens.shape[1])
        return logits

    def _replayed(self, tokens: Tensor) -> Tensor:
        """The same from a CUDA graph, captured at the first call; overwritten at the next."""
        with torch.cuda.device(tokens.device):
            if self._graph is None:
                self._capture(tokens)
            assert self._graph is not None
            self._tokens.copy_(tokens)
            self._graph.replay()
        return self._logits

    def _capture(self, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        arguments = (self.net, self._tokens, self.padding, self.caches)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                next_logits(*arguments)  # the position stays, so that each writes what the one before did
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = next_logits(*arguments)


def next_logits(net: Decoder, tokens: Tensor, padding: Tensor | None, caches: Sequence[KVCache]) -> Tensor:
    """Logits (B, V) after ``tokens`` (B, T); padding and caches as in `Decoder.forward`.

    With static caches every call with as many tokens has the same shapes and reads nothing back, so this is what can be
    captured as a CUDA graph, exported, or compiled without a graph break. To let ``torch.compile`` use CUDA graphs,
    mark the caches' tensors, which are written in place, with ``torch._dynamo.mark_static_address``.
    """
    return net.logits(net(tokens, padding=padding, caches=caches, last=1)[:, 0])


def _check_lengths(net: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; begin with the end-of-text token to start from nothing")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > net.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's "
            f"{net.max_length} positions; ask for at most {max(net.max_length - longest, 0)} new tokens"
        )


def stream_text(
    net: Decoder,
    tokenizer: Tokenizer,
    end_of_text: int,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    **settings: Any,
) -> Iterator[list[str]]:
    """`stream` on texts; an empty prompt begins a new document.

    Args:
        net: the decoder, in eval mode.
        tokenizer: the one that it was trained with.
        end_of_text: id of the token that separates documents; a text ends there.
        prompts: texts to continue.
        stop: a text also ends before the first of these in it.
        settings: of `stream`.

    Yields:
        What each prompt's new text goes on with, of which nothing will change: often "", also at its end.

    Raises:
        ValueError: at the first step, as `stream`; or a ``stop`` is empty.
    """
    # every training document follows an end-of-text token, so a prompt does too
    ids = [[end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    texts = [TextStream(tokenizer, after=before, stop=stop) for before in ids]
    for tokens in stream(net, ids, stop_token=end_of_text, **settings):
        yield [
            "" if token is None or text.stopped else text.push(token) for text, token in zip(texts, tokens, strict=True)
        ]
        if all(token is None or text.stopped for text, token in zip(texts, tokens, strict=True)):
            break
    yield [text.end() for text in texts]


def generate_text(
    net: Decoder, tokenizer: Tokenizer, end_of_text: int, prompts: Sequence[str], **settings: Any
) -> list[str]:
    """The new text of each prompt, whole; arguments as of `stream_text`."""
    pieces = list(stream_text(net, tokenizer, end_of_text, prompts, **settings))
    return ["".join(parts) for parts in zip(*pieces, strict=True)]

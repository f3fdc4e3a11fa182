"""Text from a decoder, token by token over its KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mhe_lightning.models.decoder import Decoder


@torch.inference_mode()
def generate(
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
) -> list[list[int]]:
    """Continue each prompt; a batch of prompts of different lengths is padded on the left.

    Every prompt draws from its own random stream, a function of ``seed`` and its number, so neither the other prompts
    nor the batch size change what it draws.

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

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, a setting out of range, or more tokens than the model has positions.
    """
    _check(net, prompts, max_new_tokens, temperature, top_k, top_p)
    device = net.token_embedding.weight.device
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    padding = torch.ones(len(prompts), longest + max_new_tokens, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        padding[row, : longest - len(prompt)] = False
    ragged = min(map(len, prompts)) < longest
    caches = net.new_caches(longest + max_new_tokens)
    streams = [torch.Generator().manual_seed((seed * 1_000_003 + first + row) % 2**63) for row in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for length in range(longest, longest + max_new_tokens):
        hidden = net(tokens, padding=padding[:, :length] if ragged else None, caches=caches)
        logits = net.logits(hidden[:, -1]).float().cpu()  # (B, V)
        chosen = [
            _choose(row_logits, temperature, top_k, top_p, stream)
            for row_logits, stream in zip(logits, streams, strict=True)
        ]
        for row, token in enumerate(chosen):
            finished[row] = finished[row] or token == stop_token
            if not finished[row]:
                new[row].append(token)
        if all(finished):
            break
        tokens = torch.tensor(chosen, device=device)[:, None]
    return new


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, stream: torch.Generator) -> int:
    """One token from the logits (V,) of one prompt, on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    # the largest is 0 however small the temperature
    values, tokens = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        values, tokens = values[:top_k], tokens[:top_k]
    p = values.softmax(-1)
    if top_p is not None:
        p = p[: int((p.cumsum(-1) < top_p).sum()) + 1]
    return int(tokens[torch.multinomial(p, 1, generator=stream)])


def _check(
    net: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; begin with the end-of-text token to start from nothing")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature ({temperature}) must not be negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be at least 1; leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be in (0, 1]; leave it out to sample from all tokens")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > net.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's "
            f"{net.max_length} positions; ask for at most {max(net.max_length - longest, 0)} new tokens"
        )


def generate_text(
    net: Decoder, tokenizer: Tokenizer, end_of_text: int, prompts: Sequence[str], **settings: Any
) -> list[str]:
    """`generate` on texts; an empty prompt begins a new document.

    Args:
        net: the decoder, in eval mode.
        tokenizer: the one that it was trained with.
        end_of_text: id of the token that separates documents; a text ends there.
        prompts: texts to continue.
        settings: of `generate`.

    Returns:
        The new text of each prompt.
    """
    # every training document follows an end-of-text token, so a prompt does too
    ids = [[end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    new = generate(net, ids, stop_token=end_of_text, **settings)
    return [tokenizer.decode(tokens) for tokens in new]

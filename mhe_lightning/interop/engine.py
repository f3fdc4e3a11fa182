"""What the exports to inference engines share: the numbers to compare with, what was found, and a README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mhe_lightning.callbacks.run_record import CONFIG
from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.files import build_new_folder, require_new
from mhe_lightning.interop.hf_tokenizer import stock_tokenizer
from mhe_lightning.interop.model_card import in_words, record
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.stock import NoStockClassError
from mhe_lightning.interop.verification import NotEqualError
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder

NEW_TOKENS = 16
"""Tokens that an engine generates for each text when it is compared."""


@dataclass(frozen=True)
class EngineAgreement:
    """How far an engine agrees with our model.

    Args:
        texts: how many both read.
        tokens: of these, without padding.
        difference: the largest difference of two numbers, the engine's in float32 and ours in float64.
        largest: the largest of ours, to compare it with.
        generated: tokens that the engine generated, each our model's likeliest after those before it.
    """

    texts: int
    tokens: int
    difference: float
    largest: float
    generated: int = 0


@dataclass(frozen=True)
class EngineExport:
    """What was exported to an engine.

    Args:
        engine: its name.
        content: what the files compute, in words.
        compared: which numbers were compared, in words: the beginning of a sentence.
        agreement: how far they agree.
        notes: what their user must know, a sentence each.
    """

    engine: str
    content: str
    compared: str
    agreement: EngineAgreement
    notes: tuple[str, ...] = ()


def export_folder(
    native: Native, out: Path, usage: Sequence[str], write: Callable[[Path], EngineExport]
) -> EngineExport:
    """Make a folder with a model, its tokenizer, the experiment's config and a README, or none if ``write`` raises.

    Args:
        native: our model.
        out: the folder.
        usage: lines of Python for the README; ``{name}`` is the folder's name.
        write: writes the model into the folder that it is given, and compares it with ours.

    Raises:
        ValueError: the folder is there already.
    """
    require_new(out)
    found: list[EngineExport] = []

    def build(folder: Path) -> None:
        exported = write(folder)
        tokenizer, _ = stock_tokenizer(native.tokenizer, native.net, native.max_length)
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (folder / CONFIG).write_text(yaml.safe_dump(dict(native.config), sort_keys=False), encoding="utf-8")
        card = _card(native, exported, usage, out.resolve().name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        found.append(exported)

    build_new_folder(out, build)
    return found[0]


def refuse_unknown(native: Native) -> None:
    """Refuse a model that is none of ours, or a decoder with a classifier.

    Raises:
        NoStockClassError: it is one.
    """
    if not isinstance(native.net, (Decoder, Encoder, EncoderDecoder)):
        raise NoStockClassError(f"{type(native.net).__name__} cannot be exported; Decoder, Encoder, EncoderDecoder can")
    if isinstance(native.net, Decoder) and native.head is not None:
        raise NoStockClassError(
            "a decoder with a classifier of its own cannot be exported; export the decoder that it was finetuned from, "
            "or finetune an Encoder"
        )


def vocabulary(native: Native) -> list[str]:
    """The tokens by their ids, one for every row of the model's embedding; rows without a token get a name.

    Engines that know tokens by their text need each to have one of its own.
    """
    size: int = native.net.vocab_size  # type: ignore[assignment]
    names = {token: i for token, i in native.tokenizer.get_vocab(with_added_tokens=True).items() if i < size}
    by_id = {i: token for token, i in names.items()}
    return [by_id[i] if i in by_id else _unused(f"<unused_{i}>", names) for i in range(size)]


def _unused(name: str, taken: Mapping[str, int]) -> str:
    while name in taken:
        name += "_"
    return name


def rows(tokens: Tensor, real: Tensor) -> list[list[int]]:
    """(B, T) tokens, padded, as lists of the real ones."""
    return [row[kept].tolist() for row, kept in zip(tokens, real, strict=True)]


@contextmanager
def in_float64(native: Native) -> Iterator[None]:
    """The model computes in float64 meanwhile."""
    modules = [module for module in (native.net, native.head) if module is not None]
    dtype = next(native.net.parameters()).dtype
    try:
        for module in modules:
            module.double()
        yield
    finally:
        for module in modules:
            module.to(dtype)


def largest_difference(found: Tensor, expected: Tensor, real: Tensor, tolerance: float) -> float:
    """Of an engine's numbers from ours, both (B, T, …), over the places that are real, (B, T) boolean.

    Raises:
        NotEqualError: the shapes differ, or the numbers by more than ``tolerance``.
    """
    if found.shape != expected.shape:
        raise NotEqualError(f"the engine gives shape {tuple(found.shape)}, our model {tuple(expected.shape)}")
    difference = float((found - expected)[real].abs().max())
    if not difference <= tolerance:
        raise NotEqualError(
            f"the engine's numbers differ from our model's by up to {difference:.1e}, more than the tolerance of "
            f"{tolerance:g}, where they are up to {float(expected[real].abs().max()):.3g}"
        )
    return difference


@torch.no_grad()
def expected_scores(native: Native, batch: Mapping[str, Tensor]) -> Tensor:
    """`Native.scores` in float64."""
    with in_float64(native):
        return native.scores(batch)


@torch.no_grad()
def check_greedy(
    native: Native,
    batch: Mapping[str, Tensor],
    prefixes: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    tolerance: float,
) -> int:
    """That each token of an engine's greedy search is our likeliest after those before it, in float64.

    That is what it is for two searches to agree where scores do up to ``tolerance``: of two tokens that are nearer
    than twice that either may come.

    Args:
        native: our model.
        batch: what an encoder-decoder reads, as of `Native.scores`.
        prefixes: the tokens that are continued.
        new: those that the engine added, with the end token where it stopped at one.
        tolerance: of scores.

    Returns:
        How many tokens there are.

    Raises:
        NotEqualError: one is not.
    """
    key = "target_tokens" if isinstance(native.net, EncoderDecoder) else "tokens"
    whole = [torch.tensor([*before, *after]) for before, after in zip(prefixes, new, strict=True)]
    tokens = pad_sequence(whole, batch_first=True)
    inputs = {**batch, key: tokens}
    if key == "tokens":
        inputs["padding"] = pad_sequence([torch.ones_like(row) for row in whole], batch_first=True).bool()
    scores = expected_scores(native, inputs)  # (B, T, V)
    count = 0
    for row, before in enumerate(prefixes):
        for i in range(len(before), len(whole[row])):
            step, token = scores[row, i - 1], int(tokens[row, i])
            gap = float(step.max() - step[token])
            if gap > 2 * tolerance:
                raise NotEqualError(
                    f"of text {row} the engine's token {i - len(before) + 1} is {token}, our model's "
                    f"{int(step.argmax())}, which scores higher by {gap:.1e}"
                )
            count += 1
    return count


def ended(new: Sequence[int], native: Native, length: int) -> list[int]:
    """New tokens with the end token, where fewer than ``length`` of them tell that a search has stopped at it."""
    return [*new, end_of_text_id(native.tokenizer)] if len(new) < length else list(new)


def _card(native: Native, exported: EngineExport, usage: Sequence[str], name: str) -> str:
    lines = [
        f"# {name}",
        "",
        f"{in_words(native)}, trained with mhe_lightning, as {exported.content} for {exported.engine}.",
        *(f"\n{note}" for note in exported.notes),
        "",
        "## Use",
        "",
        "```python",
        *(line.replace("{name}", name) for line in usage),
        "```",
        "",
        *record(native),
        "## Comparison",
        "",
    ]
    agreement = exported.agreement
    lines.append(
        f"{exported.compared} in float32 and those of the trained model in float64 differ by at most "
        f"{agreement.difference:.1e} on {agreement.texts} texts of {agreement.tokens:,} tokens, where the largest is "
        f"{agreement.largest:.3g}."
    )
    if agreement.generated:
        lines.append(
            f"Each of {agreement.generated:,} tokens that {exported.engine} generated greedily was the trained model's "
            "likeliest."
        )
    return "\n".join([*lines, "", "An export cannot be trained on: keep the native checkpoint for that.", ""])

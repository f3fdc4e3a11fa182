"""Whether an exported model computes what ours does: loaded by its stock class, on real text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhe_lightning.data.embedded import EmbeddedSource
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.extras import require
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.stock import StockModel
from mhe_lightning.models import Decoder, EncoderDecoder
from mhe_lightning.models.heads import SequenceHead

TEXTS = 16
"""Texts that are compared, the first that there are."""

TOKENS = 64
"""Tokens of each that are compared, the first; and as many as the model has positions of one."""

Pair = tuple[str, str | None]

Compared = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Batches as our model reads them, and as transformers' does."""


class NotEqualError(ValueError):
    """An exported model does not compute what ours does."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree.

    Args:
        texts: how many both read.
        tokens: of these, without padding.
        float64: the largest difference of two scores, computed in float64: of rounding the folded weights alone.
        float32: computed in float32, as the model is used.
        largest: the largest score, to compare these with.
    """

    texts: int
    tokens: int
    float64: float
    float32: float
    largest: float


def sample_texts(count: int = 4 * TEXTS) -> list[str]:
    """Texts to compare models on that every machine has: English prose of the Python library, 300 characters each."""
    documents = (piece.text for piece in islice(EmbeddedSource().pieces("train"), count))
    return [" ".join(document.split())[:300] for document in documents]


def verify(native: Native, stock: StockModel, folder: Path, texts: Sequence[str], tolerance: float) -> Agreement:
    """Load what was exported by its stock class and tokenizer, and compare it with our model.

    Args:
        native: our model.
        stock: what was exported.
        folder: where it was written.
        texts: to compare on.
        tolerance: the largest difference of scores, in float64, that is let pass.

    Raises:
        NotEqualError: the tokens differ, weights are missing or not used, or scores differ by more than ``tolerance``.
    """
    compared: Compared = []
    for pairs in (fitting_pairs(native, texts), longest_pair(native, texts)):
        batch = native_batch(native, pairs)
        compared.append((batch, stock_batch(native, folder, pairs, batch)))
    model = load_stock(stock, folder)
    own = next(native.net.parameters()).dtype
    try:
        float32, _ = _compare(native, model, compared, torch.float32)
        float64, largest = _compare(native, model, compared, torch.float64)
    finally:
        _convert(native, own)
    if not float64 <= tolerance:
        raise NotEqualError(
            f"its scores differ from ours by up to {float64:.1e} in float64, more than the tolerance of {tolerance:g}"
        )
    n_texts = sum(len(batch["padding"]) for batch, _ in compared)
    n_tokens = sum(int(batch["padding"].sum()) for batch, _ in compared)
    return Agreement(n_texts, n_tokens, float64, float32, largest)


def load_stock(stock: StockModel, folder: Path) -> Any:
    """What was exported, through its ``Auto*`` class of transformers, in eval mode.

    Raises:
        NotEqualError: it is of another class, or weights are missing or not used.
    """
    transformers = require("transformers", "hf", "check what was exported")
    transformers.logging.disable_progress_bar()
    model, info = getattr(transformers, stock.auto_class).from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    if type(model).__name__ != stock.architecture:
        raise NotEqualError(f"transformers loads it as {type(model).__name__}, not as {stock.architecture}")
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            named = ", ".join(sorted(map(str, info[key]))[:5])
            raise NotEqualError(f"transformers finds {key.replace('_', ' ')}: {named}")
    return model.eval()


def _compare(native: Native, model: Any, compared: Compared, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference of two scores, nan if one is, and the largest of ours; computed in ``dtype``.

    Raises:
        NotEqualError: there are others than ours.
    """
    _convert(native, dtype)
    model.to(dtype)
    differences, sizes = [], []
    for batch, inputs in compared:
        expected, found = native.scores(batch), stock_scores(model, inputs)
        if found.shape != expected.shape:
            raise NotEqualError(f"its scores have shape {tuple(found.shape)}, ours {tuple(expected.shape)}")
        difference = (expected - found).abs()
        # what padding gives means nothing
        if not isinstance(native.head, SequenceHead) and not isinstance(native.net, EncoderDecoder):
            difference = difference[batch["padding"]]
        differences.append(difference.max())
        sizes.append(expected.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


def _convert(native: Native, dtype: torch.dtype) -> None:
    for module in (native.net, native.head):
        if module is not None:
            module.to(dtype)


def fitting_pairs(native: Native, texts: Sequence[str]) -> list[Pair]:
    """Texts that the model can read whole, some of them with a second one if it reads pairs.

    Raises:
        ValueError: there are none.
    """
    net = native.net
    room = native.max_length - 3
    pairs: list[Pair] = []
    encode = SequenceFormat(native.tokenizer, 5).encode
    for text in texts:
        if _spells_a_special_token(native, text):
            continue
        words = text.split()
        share = room if isinstance(net, (Decoder, EncoderDecoder)) else room // 2
        while words and len(encode([" ".join(words)])[0].ids) > min(share, TOKENS):
            words = words[: len(words) // 2]
        if words:
            pairs.append((" ".join(words), None))
        if len(pairs) == TEXTS:
            break
    if not pairs:
        raise ValueError(f"no text has a beginning that fits the model's {native.max_length} positions; give --text")
    if isinstance(net, EncoderDecoder):  # any text will do for a target
        return [(text, pairs[-1 - i][0]) for i, (text, _) in enumerate(pairs)]
    if not isinstance(net, Decoder) and net.segment_embedding.num_embeddings > 1:  # type: ignore[union-attr, operator]
        return [(text, pairs[i - 1][0] if i % 2 else None) for i, (text, _) in enumerate(pairs)]
    return pairs


def longest_pair(native: Native, texts: Sequence[str]) -> list[Pair]:
    """One text of as many words of these as the model can read, so that all its positions are compared."""
    room = native.max_length - 3
    words: list[str] = []
    for text in texts:
        if len(words) <= room and not _spells_a_special_token(native, text):
            words += text.split()[: room + 1]
    encode = SequenceFormat(native.tokenizer, 5).encode
    fits, too_many = 0, len(words) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(encode([" ".join(words[:middle])])[0].ids) <= room:
            fits = middle
        else:
            too_many = middle
    text = " ".join(words[:fits])
    return [(text, text if isinstance(native.net, EncoderDecoder) else None)]


def _spells_a_special_token(native: Native, text: str) -> bool:
    """Our model reads these characters as text, transformers' tokenizer as the token."""
    tokens = native.tokenizer.get_added_tokens_decoder().values()
    return any(token.special and token.content in text for token in tokens)


def native_batch(native: Native, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The texts as our model reads them, padded on the right."""
    net, end = native.net, end_of_text_id(native.tokenizer)
    form = SequenceFormat(native.tokenizer, max(native.max_length, 5))
    first = [encoding.ids for encoding in form.encode([text for text, _ in pairs])]
    fill = end if native.padding is None else native.padding
    if isinstance(net, Decoder):
        return dict(zip(("tokens", "padding"), _padded([[end, *ids] for ids in first], fill), strict=True))
    if isinstance(net, EncoderDecoder):
        second = [encoding.ids for encoding in form.encode([text or "" for _, text in pairs])]
        tokens, padding = _padded([[*ids, end] for ids in first], fill)
        targets, _ = _padded([[end, *ids] for ids in second], fill)
        return {"tokens": tokens, "padding": padding, "target_tokens": targets}
    sequences = form.pairs(pairs)
    tokens, padding = _padded([sequence.tokens for sequence in sequences], fill)
    segments, _ = _padded([[int(i >= s.boundary) for i in range(len(s.tokens))] for s in sequences], 0)
    return {"tokens": tokens, "padding": padding, "segments": segments}


def stock_batch(native: Native, folder: Path, pairs: Sequence[Pair], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same texts by the tokenizer that was exported.

    Raises:
        NotEqualError: its tokens are others.
    """
    transformers = require("transformers", "hf", "check what was exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    translates = isinstance(native.net, EncoderDecoder)
    for i, (first, second) in enumerate(pairs):
        found = tokenizer(first, None if translates else second)["input_ids"]
        expected = batch["tokens"][i][batch["padding"][i]].tolist()
        if found != expected:
            raise NotEqualError(f"its tokenizer makes {found[:8]}… of {first[:40]!r}, ours {expected[:8]}…")
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["padding"].long()}
    if translates:
        inputs["decoder_input_ids"] = batch["target_tokens"]
    elif "segments" in batch:
        inputs["token_type_ids"] = batch["segments"]
    if native.problem == "choice":
        inputs = {key: value[:, None] for key, value in inputs.items()}  # (B, 1 choice, T)
    return inputs


@torch.no_grad()
def stock_scores(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model of transformers predicts, as `Native.scores` lays it out."""
    output = model(**inputs)
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], -1)
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as (B, T), and (B, T) True where they are real."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
    return tokens, torch.arange(length) < torch.tensor([[len(row)] for row in rows])

"""The tokenizer of a checkpoint of transformers: its tokenizer.json, or the lists of older versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer

from mhe_lightning.data.tokenizer import BPE_END_OF_TEXT, end_of_text_id, load_tokenizer, vocabulary_size
from mhe_lightning.interop.reading import read_json
from mhe_lightning.run import TOKENIZER

SETTINGS = "tokenizer_config.json"
WORDPIECE = "vocab.txt"
BPE = ("vocab.json", "merges.txt")

FILES = (TOKENIZER, SETTINGS, WORDPIECE, *BPE)
"""What is read, of those that there are."""


def import_tokenizer(folder: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[str | None, list[str]]:
    """The text of a run's tokenizer.json, and what the user should know.

    It is made from tokenizer.json, else from the vocab.txt of a BERT or the vocab.json and merges.txt of a GPT-2.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        vocab_size: tokens of the net.

    Returns:
        The text, None where there is no tokenizer, and notes.

    Raises:
        ValueError: the tokenizer cannot be read, or has more tokens than the net.
    """
    tokenizer = _read(folder, str(config.get("model_type")))
    if tokenizer is None:
        return None, [f"there is no {TOKENIZER}; the verbs that read text need --tokenizer, or data.tokenizer"]
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {size} tokens but the model {vocab_size}; they do not match")
    notes = []
    if size < vocab_size:
        notes.append(f"the model has {vocab_size} tokens, the tokenizer {size}: the others are never read")
    try:
        end = end_of_text_id(tokenizer)
    except ValueError as error:
        return tokenizer.to_str(), [*notes, str(error)]
    expected = config.get("eos_token_id")
    if expected is not None and end not in (expected if isinstance(expected, list) else [expected]):
        notes.append(f"texts end with {tokenizer.id_to_token(end)} ({end}) here and with token {expected} there")
    return tokenizer.to_str(), notes


def _read(folder: Path, model_type: str) -> Tokenizer | None:
    if (folder / TOKENIZER).is_file():
        return load_tokenizer(folder / TOKENIZER)
    try:
        if model_type == "bert" and (folder / WORDPIECE).is_file():
            return _wordpiece(folder)
        if model_type == "gpt2" and all((folder / name).is_file() for name in BPE):
            return _byte_level(folder)
    except Exception as error:  # the Rust side raises bare `Exception`s, nothing narrower
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return None


def _wordpiece(folder: Path) -> Tokenizer:
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    made = BertWordPieceTokenizer.from_file(
        str(folder / WORDPIECE),
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    return Tokenizer.from_str(made.to_str())


def _byte_level(folder: Path) -> Tokenizer:
    made = ByteLevelBPETokenizer.from_file(*(str(folder / name) for name in BPE))
    made.add_special_tokens([BPE_END_OF_TEXT])
    return Tokenizer.from_str(made.to_str())

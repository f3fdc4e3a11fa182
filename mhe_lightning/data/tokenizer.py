"""Train or load a `tokenizers.Tokenizer`, the one tokenizer class of this library.

Two kinds can be trained: the byte-level BPE of GPT-2 (Radford et al., 2019) and the WordPiece of BERT
(Devlin et al., 2019). Training the same texts twice gives the same tokenizer, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TokenizerKind = Literal["bpe", "wordpiece"]

KINDS: tuple[str, ...] = get_args(TokenizerKind)
BPE_END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END_OF_TEXT_TOKENS = (BPE_END_OF_TEXT, "</s>", "[SEP]")
START_OF_SEQUENCE_TOKENS = ("[CLS]", "<s>")

# BPE needs its 256 bytes and one special token. WordPiece needs its five special tokens and room for the
# characters of an alphabet, each of which takes two places (`a` and `##a`).
MINIMUM_VOCAB_SIZE: dict[str, int] = {"bpe": 257, "wordpiece": 128}
# Characters beyond the most frequent ones become [UNK]; the limit is the one BERT's own trainer uses.
MAX_ALPHABET = 1000


def train_tokenizer(texts: Iterable[str], kind: TokenizerKind, vocab_size: int) -> Tokenizer:
    """Train a tokenizer from text.

    Args:
        texts: The training texts. WordPiece holds all of them in memory at once, because it reads them twice.
        kind: `bpe` (byte-level as in GPT-2; special token `<|endoftext|>`) or `wordpiece` (lower-cased as in
            BERT; special tokens `[PAD] [UNK] [CLS] [SEP] [MASK]`).
        vocab_size: Largest number of tokens, special ones included. Little text gives fewer: a token has to
            occur at least twice to be learned.

    Raises:
        ValueError: `kind` is unknown or `vocab_size` is too small for it.
    """
    check_vocab_size(kind, vocab_size)
    return _train_bpe(texts, vocab_size) if kind == "bpe" else _train_wordpiece(texts, vocab_size)


def check_vocab_size(kind: str, vocab_size: int) -> None:
    """Raise a ValueError unless a tokenizer of this kind can be trained with `vocab_size` tokens."""
    if kind not in KINDS:
        raise ValueError(f"tokenizer kind ({kind!r}) is unknown; use one of {', '.join(KINDS)}")
    minimum = MINIMUM_VOCAB_SIZE[kind]
    if vocab_size < minimum:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least {minimum} for a {kind} tokenizer; try 8192")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`, given as that file or as a folder that holds one.

    Truncation and padding settings stored in the file are switched off: a corpus packs whole texts.

    Raises:
        ValueError: There is no such file, or it is not a tokenizer.
    """
    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare `Exception`s, nothing narrower
        raise ValueError(
            f"{file} is not a valid tokenizer.json ({_first_line(error)}); save one with Tokenizer.save"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_file(path: str | Path) -> Path:
    """The `tokenizer.json` that `path` (a file or a folder) means; ValueError if there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"tokenizer file {file} does not exist; give a tokenizer.json or a folder that holds one")
    return file


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document: the first of `<|endoftext|>`, `</s>`, `[SEP]` there is.

    Raises:
        ValueError: The vocabulary has none of them.
    """
    for token in END_OF_TEXT_TOKENS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    raise ValueError(f"the tokenizer has no end-of-text token; add one of {', '.join(END_OF_TEXT_TOKENS)}")


def start_of_sequence_id(tokenizer: Tokenizer) -> int | None:
    """The id of `[CLS]` or `<s>`, which begins a sequence; None if the vocabulary has neither."""
    ids = (tokenizer.token_to_id(token) for token in START_OF_SEQUENCE_TOKENS)
    return next((int(token_id) for token_id in ids if token_id is not None), None)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The number of embedding rows the tokenizer needs: its largest id plus one, as ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of the tokenizer in a canonical form: its JSON with sorted keys and no spacing."""
    return serialized_hash(tokenizer.to_str())


def serialized_hash(text: str) -> str:
    """As `tokenizer_hash`, of the text of a tokenizer.json: needs no library, so no version can change it."""
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BPE_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    texts = list(texts)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    alphabet = _alphabet(texts, normalizer, limit=min(MAX_ALPHABET, (vocab_size - len(BERT_SPECIAL_TOKENS)) // 4))
    # The trainer numbers the `##c` tokens in the order of a randomly seeded hash map, and those numbers break
    # ties between merges: two runs differ. Listed beforehand, as if they were special, they keep their order.
    continuations = [f"##{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*BERT_SPECIAL_TOKENS, *continuations],
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    draft = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"), normalizer)
    draft.train_from_iterator(texts, trainer)
    # A second tokenizer over the same vocabulary, in which only the special tokens are special.
    model = models.WordPiece(vocab=draft.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = _bert_tokenizer(model, normalizer)
    tokenizer.add_special_tokens(list(BERT_SPECIAL_TOKENS))
    return tokenizer


def _bert_tokenizer(model: models.WordPiece, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(texts: list[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The most frequent characters of the normalised texts, at most `limit`, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    ranked = sorted((-count, character) for character, count in counts.items() if not character.isspace())
    return sorted(character for _, character in ranked[:limit])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Train or load a `tokenizers.Tokenizer`, the one tokenizer class of this library.

Three kinds can be trained: the byte-level BPE of GPT-2 (Radford et al., 2019), the WordPiece of BERT
(Devlin et al., 2019) and the unigram model of SentencePiece (Kudo, 2018, https://arxiv.org/abs/1804.10959).
Training the same texts twice gives the same tokenizer, byte for byte (of unigram: see `_reproducible`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TokenizerKind = Literal["bpe", "wordpiece", "unigram"]

KINDS: tuple[str, ...] = get_args(TokenizerKind)
BPE_END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNIGRAM_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
END_OF_TEXT_TOKENS = (BPE_END_OF_TEXT, "</s>", "[SEP]")
START_OF_SEQUENCE_TOKENS = ("[CLS]", "<s>")

# BPE needs its 256 bytes and one special token. WordPiece needs its five special tokens and room for the
# characters of an alphabet, each of which takes two places (`a` and `##a`). Unigram needs its three special tokens,
# its 256 bytes and the piece that begins a word.
MINIMUM_VOCAB_SIZE: dict[str, int] = {"bpe": 257, "wordpiece": 128, "unigram": 260}
# Characters beyond the most frequent ones become [UNK], or bytes; the limit is the one BERT's own trainer uses.
MAX_ALPHABET = 1000
# SentencePiece's sign for a space, as the first character of a word's first piece.
WORD_START = "\u2581"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train_tokenizer(texts: Iterable[str], kind: TokenizerKind, vocab_size: int) -> Tokenizer:
    """Train a tokenizer from text.

    Args:
        texts: The training texts. WordPiece and unigram hold all of them in memory at once, because they read them
            twice.
        kind: `bpe` (byte-level as in GPT-2; special token `<|endoftext|>`), `wordpiece` (lower-cased as in
            BERT; special tokens `[PAD] [UNK] [CLS] [SEP] [MASK]`) or `unigram` (as in SentencePiece; special tokens
            `<pad> </s> <unk>`).
        vocab_size: Largest number of tokens, special ones included. Little text gives fewer: a token has to
            occur at least twice to be learned.

    What decoding an encoded text gives back:

    - `bpe`: the text exactly.
    - `unigram`: the text in Unicode's NFKC form, without white space at its ends and with every run of white space as
      one space. The sign U+2581, which stands for a space in this model, comes back as one. What is not in the
      vocabulary is split into bytes, so that no text becomes `<unk>`.
    - `wordpiece`: lower-cased words without accents, separated by single spaces.

    Text that spells out a special token is that token, and is left out in decoding, unless the tokenizer's
    `encode_special_tokens` is set. A `str` with lone surrogates (half a character) is no text: `encode` refuses it.

    Raises:
        ValueError: `kind` is unknown or `vocab_size` is too small for it.
    """
    check_vocab_size(kind, vocab_size)
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[kind]
    return train(texts, vocab_size)


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
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of the tokenizer in a canonical form: its JSON with sorted keys and no spacing."""
    return serialized_hash(tokenizer.to_str())


def serialized_hash(text: str) -> str:
    """As `tokenizer_hash`, of the text of a tokenizer.json: needs no library, so no version can change it."""
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def expected_vocab_size(tokenizer: str | None, size: int) -> int | None:
    """Tokens of a tokenizer that is a kind to train with at most ``size`` tokens, or a file; None where none is named.

    A kind is taken to reach ``size``, as it does but on very little text.
    """
    if tokenizer is None:
        return None
    return size if tokenizer in KINDS else vocabulary_size(load_tokenizer(tokenizer))


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


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    texts = list(texts)
    pieces_size = vocab_size - len(BYTE_PIECES)
    draft = _unigram_tokenizer(models.Unigram())
    # The trainer keeps every character it sees, even beyond its vocabulary size, so it must not see the rare ones.
    limit = min(MAX_ALPHABET, (vocab_size - MINIMUM_VOCAB_SIZE["unigram"]) // 2)
    alphabet = [WORD_START, *_alphabet(texts, draft.normalizer, limit)]
    others = Regex(f"[^{''.join(map(re.escape, alphabet))}]+")
    draft.pre_tokenizer = pre_tokenizers.Sequence([draft.pre_tokenizer, pre_tokenizers.Split(others, "removed")])
    scores = {WORD_START: 0.0}
    if len(alphabet) > 1:  # without a character to learn, the trainer fails
        trainer = trainers.UnigramTrainer(
            vocab_size=pieces_size,
            special_tokens=list(UNIGRAM_SPECIAL_TOKENS),
            unk_token="<unk>",
            initial_alphabet=alphabet,
            show_progress=False,
        )
        draft.train_from_iterator(texts, trainer)
        scores = dict(json.loads(draft.to_str())["model"]["vocab"][len(UNIGRAM_SPECIAL_TOKENS) :])
    pieces = _reproducible(scores, len(alphabet))
    lowest = pieces[-1][1]  # the model's score of an unknown character is relative to the lowest of all scores
    vocabulary = [
        *((token, 0.0) for token in UNIGRAM_SPECIAL_TOKENS),
        *((piece, lowest) for piece in BYTE_PIECES),
        *pieces,
    ]
    tokenizer = _unigram_tokenizer(models.Unigram(vocabulary, UNIGRAM_SPECIAL_TOKENS.index("<unk>"), True))
    tokenizer.add_special_tokens(list(UNIGRAM_SPECIAL_TOKENS))
    return tokenizer


def _reproducible(scores: dict[str, float], alphabet_size: int) -> list[tuple[str, float]]:
    """The pieces and their log probabilities, best first, without what differs between two runs of the trainer.

    It reads words in the order of a randomly seeded hash map, so that sums differ in their last digits (by up to 4e-11
    where measured): rounded, which leaves a difference only in the unlikely case of a score next to a rounding limit.
    And it gives each character it found no use for the lowest score plus 0.0001 for each one before, in such an
    order: level.
    """
    lowest = min(scores.values())
    unused = {piece for piece in scores if len(piece) == 1 and scores[piece] < lowest + 1e-4 * alphabet_size}
    rounded = {piece: round(lowest if piece in unused else score, 3) for piece, score in scores.items()}
    return sorted(rounded.items(), key=lambda item: (-item[1], item[0]))


def _unigram_tokenizer(model: models.Unigram) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(rf"[\s{WORD_START}]+"), " "), normalizers.Strip()]
    )
    # The model would take the names of special tokens and bytes for those, wherever a text spells them out: no piece
    # reaches across the cut behind their first character.
    names = "|".join([*(re.escape(token[1:]) for token in UNIGRAM_SPECIAL_TOKENS), "0x[0-9A-F]{2}>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(f"<(?={names})"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(WORD_START, prepend_scheme="always"), decoders.Fuse()]
    )
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

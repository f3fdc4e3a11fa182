"""Training and loading tokenizers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from mhe_lightning.data import tokenizer
from mhe_lightning.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    serialized_hash,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = [f"The {word} sat on the {word}'s mat, and sang.\n" for word in ("cat", "dog", "bird", "naïve Übermut")] * 5


def test_bpe_gives_back_any_text_exactly():
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    text = " Tabs\t, 日本語, \x00 and  spaces \n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_bpe_vocabulary_holds_every_byte_and_the_end_of_text():
    tokenizer = train_tokenizer([], "bpe", 300)
    assert tokenizer.get_vocab_size() == 257
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id("<|endoftext|>")


def test_wordpiece_lowers_case_and_has_the_special_tokens_of_bert_first():
    tokenizer = train_tokenizer(TEXTS, "wordpiece", 200)
    assert tokenizer.decode(tokenizer.encode("The CAT sat").ids) == "the cat sat"
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert end_of_text_id(tokenizer) == 3
    assert sorted(tokenizer.get_added_tokens_decoder()) == [0, 1, 2, 3, 4]


def test_vocabulary_never_exceeds_the_size_asked_for():
    many_characters = ["".join(chr(0x4E00 + i) for i in range(3000))] * 2
    assert train_tokenizer(many_characters, "wordpiece", 256).get_vocab_size() <= 256
    assert train_tokenizer(TEXTS, "bpe", 280).get_vocab_size() == 280


def test_training_twice_gives_the_same_tokenizer_in_another_process_too():
    here = [tokenizer_hash(train_tokenizer(TEXTS, kind, 300)) for kind in ("bpe", "wordpiece")]
    assert [tokenizer_hash(train_tokenizer(iter(TEXTS), kind, 300)) for kind in ("bpe", "wordpiece")] == here
    code = (  # the file alone: the package around it imports for seconds
        "import runpy\n"
        f"names = runpy.run_path({tokenizer.__file__!r})\n"
        "for kind in ('bpe', 'wordpiece'):\n"
        f"    print(names['tokenizer_hash'](names['train_tokenizer']({TEXTS!r}, kind, 300)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == here


@pytest.mark.parametrize(("kind", "size"), [("bpe", 256), ("wordpiece", 100)])
def test_a_vocabulary_too_small_is_refused_with_the_minimum(kind, size):
    with pytest.raises(ValueError, match=rf"\({size}\) must be at least \d+ for a {kind}"):
        train_tokenizer(TEXTS, kind, size)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'unigram'.*bpe, wordpiece"):
        train_tokenizer(TEXTS, "unigram", 300)


def test_a_saved_tokenizer_loads_from_the_file_and_from_its_folder(tmp_path):
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert tokenizer_hash(load_tokenizer(file)) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)


def test_the_hash_depends_on_the_content_and_not_on_the_layout_of_the_file():
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    assert serialized_hash(tokenizer.to_str(pretty=True)) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(TEXTS, "bpe", 270)) != tokenizer_hash(tokenizer)


def test_loading_switches_truncation_and_padding_off(tmp_path):
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("The cat sat on the mat and sang and sang.").ids) > 8


@pytest.mark.parametrize("content", [None, "", "{}", "[1, 2]", "\x00"])
def test_a_missing_or_broken_file_is_named(tmp_path, content):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_tokenizer(file)


def test_a_vocabulary_without_an_end_of_text_token_is_refused():
    with pytest.raises(ValueError, match="no end-of-text token"):
        end_of_text_id(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_vocabulary_size_covers_ids_with_gaps():
    assert vocabulary_size(Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))) == 10

"""Training and loading tokenizers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from mhe_lightning.data import tokenizer
from mhe_lightning.data.tokenizer import (
    KINDS,
    end_of_text_id,
    load_tokenizer,
    serialized_hash,
    start_of_sequence_id,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = [f"The {word} sat on the {word}'s mat, and sang.\n" for word in ("cat", "dog", "bird", "naïve Übermut")] * 5
GERMAN = [f"Ein {word} schläft in einem grünen Raum.\n" for word in ("Hund", "Mann", "Vogel")] * 5
SPELLED_OUT = ("<pad>", "</s>", "<unk>", "<0x41>", "<", "<|endoftext|>", "\uff1c/s>")
texts = st.lists(
    st.one_of(st.text(max_size=4), st.sampled_from([*SPELLED_OUT, "cat ", " ", "\u2581"])), max_size=8
).map("".join)


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


def test_unigram_has_its_special_tokens_first_and_the_bytes_behind_them():
    tokenizer = train_tokenizer(TEXTS, "unigram", 300)
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == ["<pad>", "</s>", "<unk>", "<0x00>", "<0xFF>"]
    assert sorted(tokenizer.get_added_tokens_decoder()) == [0, 1, 2]
    assert end_of_text_id(tokenizer) == 1
    assert start_of_sequence_id(tokenizer) is None


def test_unigram_learns_words_and_gives_back_text_with_characters_it_never_saw():
    tokenizer = train_tokenizer(TEXTS + GERMAN, "unigram", 400)
    assert len(tokenizer.encode("The bird sat").ids) < len("The bird sat")
    text = "The naïve 日本語 🎉 sang, ▸ \x00 Übermut"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unigram_normalises_and_takes_its_sign_for_a_space_as_one():
    tokenizer = train_tokenizer(TEXTS, "unigram", 300)
    assert tokenizer.decode(tokenizer.encode(" \u2581ﬁne\t\n Ｃat\u2581s\u00a0 ").ids) == "fine Cat s"


@pytest.mark.parametrize("few", [[], [""], [" \n"], ["a"], ["\x00"], ["]^-&&["], ["</s><0x41>"] * 3])
def test_unigram_trains_on_next_to_no_text(few):
    for size in (260, 261, 300):
        tokenizer = train_tokenizer(few, "unigram", size)
        assert 260 <= tokenizer.get_vocab_size() <= size
        assert tokenizer.decode(tokenizer.encode("Any text 🎉").ids) == "Any text 🎉"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_decoding_gives_back_any_text_in_its_normal_form(kind):
    tokenizer = train_tokenizer([*TEXTS, *GERMAN, *SPELLED_OUT], kind, 330)
    tokenizer.encode_special_tokens = True

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(texts)
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        # the normal form of the library, whose Unicode version need not be Python's
        expected = text if kind == "bpe" else normalizers.NFKC().normalize_str(text).replace("\u2581", " ")
        assert " ".join(tokenizer.decode(ids).split()) == " ".join(expected.split())
        assert not set(tokenizer.get_added_tokens_decoder()) & set(ids)

    check()


def test_vocabulary_never_exceeds_the_size_asked_for():
    many_characters = ["".join(chr(0x4E00 + i) for i in range(3000))] * 2
    assert train_tokenizer(many_characters, "wordpiece", 256).get_vocab_size() <= 256
    assert train_tokenizer(many_characters, "unigram", 300).get_vocab_size() <= 300
    assert train_tokenizer(TEXTS, "bpe", 280).get_vocab_size() == 280


def test_training_twice_gives_the_same_tokenizer_in_another_process_too():
    here = [tokenizer_hash(train_tokenizer(TEXTS, kind, 300)) for kind in KINDS]
    assert [tokenizer_hash(train_tokenizer(iter(TEXTS), kind, 300)) for kind in KINDS] == here
    code = (  # the file alone: the package around it imports for seconds
        "import runpy\n"
        f"names = runpy.run_path({tokenizer.__file__!r})\n"
        f"for kind in {KINDS!r}:\n"
        f"    print(names['tokenizer_hash'](names['train_tokenizer']({TEXTS!r}, kind, 300)))"
    )
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.split() == here


@pytest.mark.parametrize(("kind", "size"), [("bpe", 256), ("wordpiece", 100), ("unigram", 259)])
def test_a_vocabulary_too_small_is_refused_with_the_minimum(kind, size):
    with pytest.raises(ValueError, match=rf"\({size}\) must be at least \d+ for a {kind}"):
        train_tokenizer(TEXTS, kind, size)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'words'.*bpe, wordpiece, unigram"):
        train_tokenizer(TEXTS, "words", 300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_from_the_file_and_from_its_folder(tmp_path, kind):
    tokenizer = train_tokenizer(TEXTS, kind, 300)
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

"""Tests of the word-by-word translations that neural ones are compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "translation_baselines.py"
PAIRS = [
    ("the dog sleeps .", "der Hund schläft ."),
    ("the dog sings .", "der Hund singt ."),
    ("the child sleeps .", "das Kind schläft ."),
    ("a dog sleeps .", "ein Hund schläft ."),
    ("a bird sings .", "ein Vogel singt ."),
]


@pytest.fixture(scope="module")
def baselines():
    spec = importlib.util.spec_from_file_location("translation_baselines", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pairs():
    return [(source.split(), target.split()) for source, target in PAIRS]


def test_model_1_finds_the_words_that_the_pairs_determine(baselines, pairs):
    lexicon = baselines.by_ibm1(pairs, iterations=30)
    for source, target in (("dog", "Hund"), ("sleeps", "schläft"), ("sings", "singt"), ("a", "ein"), (".", ".")):
        assert lexicon[source] == target


def test_model_1_agrees_with_a_count_by_hand_after_one_iteration(baselines):
    # Brown et al.'s expectation with equal starts: each target word is shared evenly by the source words and null
    lexicon = baselines.by_ibm1([(["a"], ["x", "x", "y"]), (["a"], ["y"])], iterations=1)
    assert lexicon["a"] == "x"  # 2 · ½ + 0 against ½ + ½: equal, so the first in the alphabet
    assert baselines.by_ibm1([(["a"], ["x", "y"]), (["a"], ["y"])], iterations=1)["a"] == "y"


def test_dice_and_cooccurrence_differ_where_a_word_is_everywhere(baselines, pairs):
    assert baselines.by_dice(pairs)["dog"] == "Hund"
    assert baselines.by_cooccurrence(pairs)["bird"] == "."  # all its companions are equally frequent: the alphabet


def test_unknown_words_stay_and_marks_join_the_word_before(baselines):
    assert baselines.translate({"a": "ein", "dog": "Hund"}, "a wolf, a dog.") == "ein wolf, ein Hund."

"""BLEU and chrF against their papers' definitions, and the tokenised BLEU against what Moses' Perl scripts print."""

from __future__ import annotations

import logging
import math
import sys

import pytest
import sacrebleu
import sacremoses
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from mhe_lightning.metrics import Score, bleu, chrf, compound_split_bleu, require_scorers


def compound_split_bleu_german(hypotheses: list[str], references: list[str]) -> Score:
    return compound_split_bleu(hypotheses, references, "de")


SCORERS = [bleu, chrf, compound_split_bleu_german]

# --- the definitions, from the papers


def ngrams(items, n: int) -> list[tuple]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def common(left: list[tuple], right: list[tuple]) -> int:
    """How many of ``left`` are in ``right``, each as often at most as it is there."""
    rest, count = list(right), 0
    for gram in left:
        if gram in rest:
            rest.remove(gram)
            count += 1
    return count


def paper_bleu(pairs: list[tuple[list[str], list[str]]], smooth: bool) -> float:
    """Papineni et al. 2002, equations 2 and 3; smoothed, the k-th precision without a match is 1 / 2^k of one match."""
    matches = [sum(common(ngrams(hyp, n), ngrams(ref, n)) for hyp, ref in pairs) for n in range(1, 5)]
    totals = [sum(len(ngrams(hyp, n)) for hyp, _ in pairs) for n in range(1, 5)]
    if not matches[0] or not all(totals):
        return 0.0
    product, credit = 1.0, 1.0
    for match, total in zip(matches, totals, strict=True):
        if not match and smooth:
            credit /= 2
        product *= (match or (credit if smooth else 0)) / total
    c, r = sum(len(hyp) for hyp, _ in pairs), sum(len(ref) for _, ref in pairs)
    return 100 * (1.0 if c > r else math.exp(1 - r / c)) * product**0.25


def multi_bleu(hypothesis: str, reference: str) -> float:
    """What multi-bleu.perl prints for one pair of sentences whose words stand between spaces."""
    return paper_bleu([(hypothesis.split(), reference.split())], smooth=False)


def paper_chrf(pairs: list[tuple[str, str]], beta: int = 2) -> float:
    """Popović 2015, section 2: precision and recall are averaged over the orders, then combined."""
    precisions, recalls = [], []
    for n in range(1, 7):
        matched = in_hypotheses = in_references = 0
        for pair in pairs:
            hyp, ref = (ngrams([character for character in text if not character.isspace()], n) for text in pair)
            matched += common(hyp, ref)
            in_hypotheses += len(hyp) if ref else 0  # sacreBLEU's reading of a reference that is too short
            in_references += len(ref)
        if in_hypotheses and in_references:
            precisions.append(matched / in_hypotheses)
            recalls.append(matched / in_references)
    if not sum(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * (1 + beta**2) * p * r / (beta**2 * p + r)


# few words, so that long n-grams match
WORDS = st.sampled_from(
    ["the", "cat", "Cat", "sat", "on", "mat.", "3.5,", "1,000", "it's", "A-B", "&quot;", "(x)", "é—ü"]
)


@st.composite
def corpora(draw, words=WORDS) -> list[tuple[list[str], list[str]]]:
    """Pairs of sentences as lists of words, some of them empty, some hypotheses near their references."""
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        reference = draw(st.lists(words, max_size=9))
        near = st.lists(words, max_size=2).map(lambda new, start=reference: [*start[:6], *new])
        pairs.append((draw(near | st.lists(words, max_size=9)), reference))
    return pairs


def texts(pairs) -> tuple[list[str], list[str]]:
    return [" ".join(hyp) for hyp, _ in pairs], [" ".join(ref) for _, ref in pairs]


BY_DEFINITION = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@given(corpora())
@BY_DEFINITION
def test_bleu_is_that_of_the_paper_on_the_words_of_13a(pairs):
    hypotheses, references = texts(pairs)
    cut = Tokenizer13a()
    words = [(cut(hyp).split(), cut(ref).split()) for hyp, ref in zip(hypotheses, references, strict=True)]
    assert bleu(hypotheses, references).value == pytest.approx(paper_bleu(words, smooth=True), abs=1e-9)


@given(corpora() | corpora(st.text("abc é", max_size=3)))
@BY_DEFINITION
def test_chrf_is_that_of_the_paper(pairs):
    hypotheses, references = texts(pairs)
    expected = paper_chrf(list(zip(hypotheses, references, strict=True)))
    assert chrf(hypotheses, references).value == pytest.approx(expected, abs=1e-9)


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples
    score = bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert score.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_keeps_case_and_parts_punctuation():
    assert bleu(["The cat sat down."], ["the cat sat down ."]).value == pytest.approx(
        100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )


def test_chrf_by_hand():
    # letters: both of 2 right, both of 3 found; pairs: 1 of 1 and 1 of 2; the hypothesis has no triples
    assert chrf(["a b"], ["abc"]).value == pytest.approx(100 * 5 * 1 * (7 / 12) / (4 * 1 + 7 / 12))


# --- the tokenised BLEU of older papers

# as tokenizer.perl -l de of December 2016, after replace-unicode-punctuation.perl, prints them
SENTENCES = [
    ("Er sagte: „Das ist’s.“", "Er sagte : „ Das ist &apos; s. &quot;"),
    ("Er sagte: “Das ist's”, oder?", "Er sagte : &quot; Das ist &apos; s &quot; , oder ?"),
    ("Dr. Müller kam z.B. am 20. Mai (nicht im Nov.).", "Dr. Müller kam z.B. am 20. Mai ( nicht im Nov . ) ."),
    (
        "Er zahlte 1.000,50 € bzw. 5,3 % an S&P, A,B und C...",
        "Er zahlte 1.000,50 € bzw. 5,3 % an S &amp; P , A , B und C ...",
    ),
    ("Das steht in [1] und <b> | c.", "Das steht in &#91; 1 &#93; und &lt; b &gt; &#124; c."),
    ("Wer? Ich! Na ja… gut", "Wer ? Ich ! Na ja ... gut"),
    ("Ost-West-Dialog, Nord-", "Ost ##AT##-##AT## West ##AT##-##AT## Dialog , Nord-"),
]

# as the same scripts and then perl -ple 's{(\S)-(\S)}{$1 ##AT##-##AT## $2}g' print them
PIECES = {
    "a-b-c": "a ##AT##-##AT## b-c",
    "a-b": "a ##AT##-##AT## b",
    "b-c": "b ##AT##-##AT## c",
    "a--b": "a ##AT##-##AT## -b",
    "- -": "- -",
    "---": "- ##AT##-##AT## -",
    "a- -b": "a- -b",
    "1-2-3-4": "1 ##AT##-##AT## 2-3 ##AT##-##AT## 4",
    "(a)-(b)": "( a ) - ( b )",
    "é-ü": "é ##AT##-##AT## ü",
    "E-Mail-Adresse": "E ##AT##-##AT## Mail ##AT##-##AT## Adresse",
    "E-Mail": "E ##AT##-##AT## Mail",
    "Adresse": "Adresse",
    "a": "a",
    "-": "-",
    "c": "c",
    '"': "&quot;",
    "|": "&#124;",
    "S&P": "S &amp; P",
    "&amp;": "&amp; amp ;",
    "amp": "amp",
}


@pytest.mark.parametrize(("text", "words"), SENTENCES)
def test_words_are_those_of_the_perl_tokenizer(text, words):
    reference = "Das ist es , wie es hier steht"
    expected = multi_bleu(f"{words} wie es hier steht", reference)
    score = compound_split_bleu([f"{text} wie es hier steht"], [reference], "de").value
    assert score == pytest.approx(expected, abs=1e-9)
    assert score > 0


@pytest.mark.parametrize(("text", "words"), [case for case in SENTENCES if "##AT##" not in case[1]])
def test_a_sentence_and_its_words_with_spaces_between_are_the_same(text, words):
    spaced = words
    for escape, character in [("quot", '"'), ("apos", "'"), ("#91", "["), ("#93", "]"), ("lt", "<"), ("gt", ">")]:
        spaced = spaced.replace(f"&{escape};", character)
    spaced = spaced.replace("&#124;", "|").replace("&amp;", "&")
    assert compound_split_bleu([text], [spaced], "de").value == pytest.approx(100)
    assert compound_split_bleu([spaced], [text], "de").value == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a-b-c", 3),  # the second hyphen's left neighbour is spent
        ("1-2-3-4", 5),
        ("- -", 2),
        ("---", 3),
        ("a--b", 3),
        ("a- -b", 2),
        ("E-Mail-Adresse", 5),
        ("(a)-(b)", 7),  # the tokenizer has parted it already
    ],
)
def test_hyphens_split_words_where_the_expression_of_perl_finds_them(text, words):
    score = compound_split_bleu([f"v w x y {text}"], ["v w x y"], "de").value
    n = 4 + words
    assert score == pytest.approx(100 * (4 / n * 3 / (n - 1) * 2 / (n - 2) * 1 / (n - 3)) ** 0.25, abs=1e-9)


@given(corpora(st.sampled_from(list(PIECES))))
@BY_DEFINITION
def test_compound_split_bleu_is_that_of_multi_bleu_on_the_words(pairs):
    words = [tuple([word for piece in side for word in PIECES[piece].split()] for side in pair) for pair in pairs]
    expected = paper_bleu(words, smooth=False)
    assert compound_split_bleu(*texts(pairs), "de").value == pytest.approx(expected, abs=1e-9)


def test_a_hyphen_that_splits_is_not_a_hyphen_between_spaces():
    assert compound_split_bleu(["v w x y a-b"], ["v w x y a - b"], "de").value < 100
    assert compound_split_bleu(["v w x y a–b"], ["v w x y a – b"], "de").value == pytest.approx(100)


def test_unicode_punctuation_is_that_of_ascii_on_both_sides():
    typed, ascii_only = "“Das ist’s ja…” （so）！", '"Das ist\'s ja..." (so)!'
    for pair in [(typed, ascii_only), (ascii_only, typed), (typed, typed)]:
        assert compound_split_bleu([pair[0]], [pair[1]], "de").value == pytest.approx(100)
    assert bleu([typed], [ascii_only]).value < 100


def test_entities_in_the_text_are_escaped_once_more():
    # 13a takes them for the characters that they stand for
    assert bleu(["Der Konzern S &amp; P"], ["Der Konzern S & P"]).value == pytest.approx(100)
    expected = multi_bleu("Der Konzern S &amp; amp ; P ist da", "Der Konzern S &amp; P ist da")
    score = compound_split_bleu(["Der Konzern S &amp; P ist da"], ["Der Konzern S & P ist da"], "de")
    assert score.value == pytest.approx(expected, abs=1e-9)


def test_the_language_decides_where_words_are_parted():
    pair = ["It's a black cat now"], ["There is a black cat now"]
    english = multi_bleu("It 's a black cat now", "There is a black cat now")
    german = multi_bleu("It ' s a black cat now", "There is a black cat now")
    assert compound_split_bleu(*pair, "en").value == pytest.approx(english, abs=1e-9)
    assert compound_split_bleu(*pair, "de").value == pytest.approx(german, abs=1e-9)
    assert german < english


def test_compound_split_bleu_is_not_smoothed():
    pair = ["the black cat sat down"], ["the black cat stood up"]
    assert compound_split_bleu(*pair, "en").value == 0.0
    assert bleu(*pair).value > 0


# --- all of them


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_perfect_translation_has_100(scorer):
    references = ["Er las „Krieg und Frieden“, Band 2-3.", "Ja.", ""]
    assert scorer(references, list(references)).value == pytest.approx(100)


@pytest.mark.parametrize("scorer", SCORERS)
def test_an_empty_hypothesis_is_a_translation_without_words(scorer):
    full, right = "the cat sat on the mat today", "we saw it there"
    assert scorer(["", ""], [full, right]).value == 0.0
    assert scorer([""], [""]).value == 0.0
    assert 0 < scorer(["", full], [right, full]).value < 100


@given(corpora(), st.randoms())
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_scores_know_no_order_of_sentences_and_stay_within_bounds(pairs, draw):
    shuffled = draw.sample(pairs, len(pairs))
    for scorer in SCORERS:
        score = scorer(*texts(pairs))
        assert scorer(*texts(shuffled)) == score
        assert 0 <= score.value <= 100 + 1e-9


def test_signatures_say_how_scores_were_computed():
    pair, version = (["the cat"], ["the cat"]), sacrebleu.__version__
    assert bleu(*pair).signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert chrf(*pair).signature == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    assert compound_split_bleu(*pair, "de").signature == (
        "nrefs:1|case:mixed|eff:no|tok:moses-de|smooth:none|punct:unicode-replaced|compounds:split|"
        f"sacremoses:{sacremoses.__version__}|version:{version}"
    )


@pytest.mark.parametrize("scorer", SCORERS)
def test_no_warning_of_sentences_that_end_in_a_space_and_a_full_stop(scorer, caplog):
    with caplog.at_level(logging.WARNING):
        scorer(["the cat ."] * 200, ["the cat ."] * 200)
    assert not caplog.records


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("hypotheses", "references", "error", "message"),
    [
        (
            ["a", "b"],
            ["a"],
            ValueError,
            r"hypotheses \(2\) and references \(1\) must be equally many; pass one reference",
        ),
        ([], ["a"], ValueError, r"hypotheses \(0\) and references \(1\) must be equally many"),
        ([], [], ValueError, r"\(0 each\) must hold at least one sentence; score a set that has any"),
        ("a", ["a"], TypeError, r"hypotheses \('a'\) must be a sequence of sentences; wrap a single one in a list"),
        (["a"], "a", TypeError, r"references \('a'\) must be a sequence of sentences"),
    ],
)
def test_sentences_that_make_no_pairs_are_refused(scorer, hypotheses, references, error, message):
    with pytest.raises(error, match=message):
        scorer(hypotheses, references)


@pytest.mark.parametrize("language", ["", "d", "deu", "DE", "de-DE", "de\n", "dé"])
def test_a_language_that_is_no_code_of_two_letters_is_refused(language):
    with pytest.raises(ValueError, match="must be a code of two lower-case letters, such as 'de' for German") as caught:
        compound_split_bleu(["a"], ["a"], language)
    assert f"language ({language!r})" in str(caught.value)


# --- the libraries are optional


def test_what_is_needed_is_installed():
    require_scorers()
    require_scorers("de")


REMEDY = (
    r"must be installed to score translations but cannot be imported .*; run pip install 'mhe-lightning\[translation\]'"
)


def test_without_sacrebleu_nothing_is_scored(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=f"sacrebleu {REMEDY}"):
        require_scorers()
    for scorer in SCORERS:
        with pytest.raises(ValueError, match=f"sacrebleu {REMEDY}"):
            scorer(["a"], ["a"])


def test_without_sacremoses_all_but_the_tokenised_bleu_is_scored(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    require_scorers()
    assert bleu(["a"], ["a"]).value == 0.0
    assert chrf(["a"], ["a"]).value == pytest.approx(100)
    for needs_it in [lambda: require_scorers("de"), lambda: compound_split_bleu(["a"], ["a"], "de")]:
        with pytest.raises(ValueError, match=f"sacremoses {REMEDY}"):
            needs_it()

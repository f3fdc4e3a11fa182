"""Translations scored against one reference each: BLEU, chrF, and the BLEU of older papers on English–German.

BLEU has no meaning without the way its text was cut into words, so every score comes with a signature that says it; a
score may be compared only with one of the same signature. `bleu` and `chrf` are sacreBLEU's, on detokenised text.
`compound_split_bleu` is for comparison with papers from before sacreBLEU alone.

The libraries that score are optional: ``pip install 'mhe-lightning[translation]'``.

Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (2002,
https://aclanthology.org/P02-1040); Post, "A Call for Clarity in Reporting BLEU Scores" (2018,
https://arxiv.org/abs/1804.08771); Popović, "chrF: character n-gram F-score for automatic MT evaluation" (2015,
https://aclanthology.org/W15-3049).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from mhe_lightning.extras import require

HYPHEN = re.compile(r"(\S)-(\S)")


class Score(NamedTuple):
    """A score of a corpus.

    Args:
        value: from 0 to 100 up to rounding, the higher the better.
        signature: how it was computed, as ``key:value`` pairs separated by ``|``.
    """

    value: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """The corpus BLEU of sacreBLEU with its default settings: cut by the rules 13a, case kept, smoothed exponentially.

    Args:
        hypotheses: the translations, detokenised; an empty one is a translation without words.
        references: the right translation of each, detokenised.

    Returns:
        0 if no word is right, or if no hypothesis has four words.

    Raises:
        ValueError: there are no sentences, not as many references as hypotheses, or sacrebleu cannot be imported.
        TypeError: a single string in place of a sequence.
    """
    _check_sentences(hypotheses, references)
    # force: no warning where many sentences end in " .", which bad translations may
    metric = _library("sacrebleu").BLEU(force=True)
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(value, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """The corpus chrF2 of sacreBLEU: F-score with β = 2 of the n-grams of 1 to 6 characters, white space left out.

    Args:
        hypotheses: as for `bleu`.
        references: as for `bleu`.

    Returns:
        0 if no character is right. Counts are summed over the corpus. Orders of which either side has no n-grams are
        left out of the averages; n-grams of a hypothesis whose reference is too short to have any of their order do
        not count.

    Raises:
        ValueError: as for `bleu`.
        TypeError: as for `bleu`.
    """
    _check_sentences(hypotheses, references)
    metric = _library("sacrebleu").CHRF()
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(value, str(metric.get_signature()))


def compound_split_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Score:
    """The tokenised BLEU that "Attention Is All You Need" and GNMT report, with compounds split at their hyphens.

    The steps are those of tensor2tensor's ``get_ende_bleu.sh``: Moses' ``replace-unicode-punctuation.perl`` and
    ``tokenizer.perl`` (with its escapes, without splitting hyphens), "rich-text" becomes
    ``rich ##AT##-##AT## text``, then ``multi-bleu.perl``: words at white space, case kept, n-grams up to 4, no
    smoothing. The script takes its references already tokenised; here they go through the same steps as the hypotheses.

    sacremoses tokenises in place of the Perl script, as that did when these papers were written (but for apostrophes in
    Irish). Since then the script has learnt to part the full stop from every sentence's last word ("im Jahr 20."), and
    rules for colons in Finnish and Swedish and for apostrophes in Catalan.

    Source: Vaswani et al., "Attention Is All You Need" (2017, https://arxiv.org/abs/1706.03762); Wu et al., "Google's
    Neural Machine Translation System" (2016, https://arxiv.org/abs/1609.08144).

    Args:
        hypotheses: as for `bleu`.
        references: as for `bleu`.
        language: two-letter code of the translations' language, such as ``de``. A language without abbreviations in
            Moses is tokenised with those of English.

    Returns:
        0 if no n-gram of one of the four orders is right.

    Raises:
        ValueError: as for `bleu`, the language is not such a code, or sacremoses cannot be imported.
        TypeError: as for `bleu`.
    """
    _check_sentences(hypotheses, references)
    _check_language(language)
    sacrebleu, sacremoses = _library("sacrebleu"), _library("sacremoses")
    replace = sacremoses.MosesPunctNormalizer().replace_unicode_punct
    tokenize = sacremoses.MosesTokenizer(language).tokenize

    def split(sentences: Sequence[str]) -> list[str]:
        return [_split_hyphens(tokenize(replace(sentence), return_str=True)) for sentence in sentences]

    # force: no warning of sentences that end in " .", as tokenised ones do
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    value = metric.corpus_score(split(hypotheses), [split(references)]).score
    signature = metric.get_signature()
    signature.update("tok", f"moses-{language}")
    signature.update("punct", "unicode-replaced")
    signature.update("compounds", "split")
    signature.update("sacremoses", sacremoses.__version__)
    return Score(value, str(signature))


def _split_hyphens(text: str) -> str:
    # as the Perl expression does, whose matches share no character: "a-b-c" is split once
    return HYPHEN.sub(r"\1 ##AT##-##AT## \2", text)


def require_scorers(compound_split: str | None = None) -> None:
    """Finds out before a long computation whether its translations can be scored.

    Args:
        compound_split: the ``language`` of `compound_split_bleu`, where that is needed too.

    Raises:
        ValueError: sacrebleu cannot be imported or, where it is needed, sacremoses, or there is no such language.
    """
    _library("sacrebleu")
    if compound_split is not None:
        _check_language(compound_split)
        _library("sacremoses")


def _check_language(language: str) -> None:
    if not re.fullmatch("[a-z]{2}", language):
        raise ValueError(f"language ({language!r}) must be a code of two lower-case letters, such as 'de' for German")


def _library(name: str) -> ModuleType:
    return require(name, "translation", "score translations")


def _check_sentences(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    for name, sentences in [("hypotheses", hypotheses), ("references", references)]:
        if isinstance(sentences, str):
            raise TypeError(f"{name} ({sentences!r}) must be a sequence of sentences; wrap a single one in a list")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses ({len(hypotheses)}) and references ({len(references)}) must be equally many; pass one "
            "reference for each hypothesis, in the same order"
        )
    if not hypotheses:
        raise ValueError("hypotheses and references (0 each) must hold at least one sentence; score a set that has any")

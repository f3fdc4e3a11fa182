"""Data sets of the Hub in miniature: invented rows in their schema and layout."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from datasets import ClassLabel, Dataset, Features, List, Translation, Value

Row = dict[str, Any]
Maker = Callable[[random.Random, int, int | None], Row]
"""Makes row ``i`` of a split with a label, or with a hidden one (None)."""

NOUNS = "cat dog bird tree river stone light baker painter king child ship house market garden".split()  # noqa: SIM905
VERBS = "sees finds likes follows paints carries hears leaves keeps wants".split()  # noqa: SIM905
NAMES = ["Ada Lint", "Bo Marsh", "Cleo", "Dov Quill", "Eno Vale", "Fern"]
SIZES = {"train": 12, "validation": 7, "test": 5}
TEXT, INTEGER = Value("string"), Value("int32")
LEXICON = {
    "the": "da", "red": "rul", "old": "alm", "cat": "tak", "dog": "gud", "fox": "fesk", "sun": "sol", "owl": "ugul",
    "saw": "sa", "ran": "lop", "and": "o", "big": "gro",
}  # fmt: skip
"""The words of a language "en" and what they are in a language "de", word by word."""


def sentence(draw: random.Random, clauses: int | None = None) -> str:
    """One to three clauses of made-up words."""
    count = clauses or draw.randint(1, 3)
    found = [f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}" for _ in range(count)]
    text = " and ".join(found)
    return text[0].upper() + text[1:] + "."


def question(draw: random.Random) -> str:
    return f"Who {draw.choice(VERBS)} the {draw.choice(NOUNS)}?"


def write_glue(folder: Path) -> Path:
    """Writes all tasks of GLUE; every test label is hidden."""

    def task(*columns: str, labels: list[str], splits: dict[str, str] | None = None) -> dict[str, Any]:
        def make(draw: random.Random, i: int, label: int | None) -> Row:
            texts = {c: question(draw) if "question" in c else sentence(draw) for c in columns}
            return {**texts, "label": -1 if label is None else label, "idx": i}

        features = {**dict.fromkeys(columns, TEXT), "label": ClassLabel(names=labels), "idx": INTEGER}
        return {"make": make, "features": features, "n_labels": len(labels), "splits": splits}

    def value(draw: random.Random, i: int, label: int | None) -> Row:
        score = -1.0 if label is None else [0.0, 3.8, 5.0, 1.25][label]
        return {"sentence1": sentence(draw), "sentence2": sentence(draw), "label": score, "idx": i}

    entailment = ["entailment", "neutral", "contradiction"]
    parts = {
        "train": "train",
        **{f"{split}_{part}": split for split in ("validation", "test") for part in ("matched", "mismatched")},
    }
    tasks = {
        "cola": task("sentence", labels=["unacceptable", "acceptable"]),
        "sst2": task("sentence", labels=["negative", "positive"]),
        "mrpc": task("sentence1", "sentence2", labels=["not_equivalent", "equivalent"]),
        "stsb": {
            "make": value,
            "features": {"sentence1": TEXT, "sentence2": TEXT, "label": Value("float32"), "idx": INTEGER},
            "n_labels": 4,
        },
        "qqp": task("question1", "question2", labels=["not_duplicate", "duplicate"]),
        "mnli": task("premise", "hypothesis", labels=entailment, splits=parts),
        "qnli": task("question", "sentence", labels=["entailment", "not_entailment"]),
        "rte": task("sentence1", "sentence2", labels=["entailment", "not_entailment"]),
        "wnli": task("sentence1", "sentence2", labels=["not_entailment", "entailment"]),
        "ax": task("premise", "hypothesis", labels=entailment, splits={"test": "test"}),
    }
    return _write(folder, tasks)


def write_super_glue(folder: Path) -> Path:
    """Writes all tasks of SuperGLUE; test labels are hidden but for those of AX-g, which the Hub has."""

    def task(make: Maker, columns: dict[str, Any], labels: list[str], **more: Any) -> dict[str, Any]:
        features = {**columns, "idx": columns.get("idx", INTEGER), "label": ClassLabel(names=labels)}
        return {"make": make, "features": features, "n_labels": len(labels), **more}

    def pair(first: str, second: str, labels: list[str], **more: Any) -> dict[str, Any]:
        def make(draw: random.Random, i: int, label: int | None) -> Row:
            texts = {c: question(draw) if c == "question" else sentence(draw) for c in (first, second)}
            return {**texts, "idx": i, "label": -1 if label is None else label}

        return task(make, {first: TEXT, second: TEXT}, labels, **more)

    entailment = ["entailment", "not_entailment"]
    spans = dict.fromkeys(("start1", "start2", "end1", "end2"), INTEGER)
    return _write(
        folder,
        {
            "boolq": pair("question", "passage", ["False", "True"]),
            "cb": pair("premise", "hypothesis", ["entailment", "contradiction", "neutral"]),
            "copa": task(
                _copa,
                dict.fromkeys(("premise", "choice1", "choice2", "question"), TEXT),
                ["choice1", "choice2"],
            ),
            "multirc": task(
                _multirc,
                {
                    **dict.fromkeys(("paragraph", "question", "answer"), TEXT),
                    "idx": {"paragraph": INTEGER, "question": INTEGER, "answer": INTEGER},
                },
                ["False", "True"],
            ),
            "record": {
                "make": _record,
                "features": {
                    "passage": TEXT,
                    "query": TEXT,
                    "entities": List(TEXT),
                    "entity_spans": {"text": List(TEXT), "start": List(INTEGER), "end": List(INTEGER)},
                    "answers": List(TEXT),
                    "idx": {"passage": INTEGER, "query": INTEGER},
                },
                "n_labels": 2,
            },
            "rte": pair("premise", "hypothesis", entailment),
            "wic": task(_wic, {**dict.fromkeys(("word", "sentence1", "sentence2"), TEXT), **spans}, ["False", "True"]),
            "wsc": task(
                _wsc,
                {
                    "text": TEXT,
                    "span1_index": INTEGER,
                    "span2_index": INTEGER,
                    "span1_text": TEXT,
                    "span2_text": TEXT,
                },
                ["False", "True"],
            ),
            "axb": pair("sentence1", "sentence2", entailment, splits={"test": "test"}),
            "axg": pair("premise", "hypothesis", entailment, splits={"test": "validation"}, size=6),
        },
    )


def _copa(draw: random.Random, i: int, label: int | None) -> Row:
    return {
        "premise": sentence(draw, 1),
        "choice1": sentence(draw, 1),
        "choice2": sentence(draw, 2),
        "question": ["cause", "effect"][i % 2],
        "idx": i,
        "label": -1 if label is None else label,
    }


def _multirc(draw: random.Random, i: int, label: int | None) -> Row:
    """Three answers to a question, two questions to a paragraph."""
    texts = random.Random(i // 6), random.Random(i // 3)
    return {
        "paragraph": " ".join(sentence(texts[0]) for _ in range(2)),
        "question": question(texts[1]),
        "answer": f"The {draw.choice(NOUNS)}",
        "idx": {"paragraph": 40 + i // 6, "question": 70 + i // 3, "answer": 100 + i},
        "label": -1 if label is None else label,
    }


def _record(draw: random.Random, i: int, label: int | None) -> Row:
    entities = draw.sample(NAMES, 2 + i % 3)
    passage = " ".join(f"{name} {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for name in entities)
    starts = [passage.index(name) for name in entities]
    return {
        "passage": passage,
        "query": f"The {draw.choice(NOUNS)} that @placeholder {draw.choice(VERBS)} is old.",
        "entities": entities,
        "entity_spans": {
            "text": entities,
            "start": starts,
            "end": [start + len(name) for start, name in zip(starts, entities, strict=True)],
        },
        "answers": [] if label is None else entities[: 1 + label],
        "idx": {"passage": 300 + i, "query": 900 + i},
    }


def _wic(draw: random.Random, i: int, label: int | None) -> Row:
    word = draw.choice(NOUNS)
    first = f"{sentence(draw, 1)[:-1]} and the {word} rests."
    second = f"A {word} is what {sentence(draw, 1).lower()}"
    start1, start2 = first.rindex(word), second.index(word)
    return {
        "word": word,
        "sentence1": first,
        "sentence2": second,
        "start1": start1,
        "start2": start2,
        "end1": start1 + len(word),
        "end2": start2 + len(word),
        "idx": i,
        "label": -1 if label is None else label,
    }


def _wsc(draw: random.Random, i: int, label: int | None) -> Row:
    first, second = draw.sample(NOUNS, 2)
    text = f"The old {first} {draw.choice(VERBS)} the {second} because he is tired."
    return {
        "text": text,
        "span1_index": 0,
        "span2_index": text.split().index("he"),
        "span1_text": f"The old {first}",
        "span2_text": "he",
        "idx": i,
        "label": -1 if label is None else label,
    }


def translated(text: str) -> str:
    """What a text of `LEXICON`'s words is in the other language."""
    words = " ".join(LEXICON[word] for word in text.lower().rstrip(".").split())
    return words[:1].upper() + words[1:] + "."


def english(draw: random.Random, n_words: int) -> str:
    text = " ".join(draw.choice(sorted(LEXICON)) for _ in range(n_words))
    return text[0].upper() + text[1:] + "."


def write_translation(folder: Path, *, hidden: bool = False, flat: bool = False) -> Path:
    """Writes a parallel corpus of "en" and "de", whose translations a small net can learn.

    Its training split has 60 pairs to train on, and four not to: the rows 10 (no source), 20 (no target), 30 (too
    long) and 40 (ten times as long as its source). The source of row 2 of the validation split is empty.

    Args:
        folder: where to.
        hidden: whether the test split's "de" is null.
        flat: whether each language has a column of its own, rather than both the column "translation".
    """
    draw = random.Random("translation")
    splits: dict[str, list[Row]] = {}
    for split, size in {**SIZES, "train": 60}.items():
        sources = [english(draw, 1 + i % 10) for i in range(size)]
        splits[split] = [{"en": source, "de": translated(source)} for source in sources]
    long = english(draw, 80)
    for number, pair in (
        (10, {"en": "", "de": "Da sol."}),
        (20, {"en": "The sun.", "de": "  "}),
        (30, {"en": long, "de": translated(long)}),
        (40, {"en": "Sun.", "de": translated("the sun " * 5)}),
    ):
        splits["train"].insert(number, pair)
    splits["validation"][2] = {"en": "", "de": "Da sol."}
    if hidden:
        splits["test"] = [{**pair, "de": None} for pair in splits["test"]]
    folder.mkdir(parents=True, exist_ok=True)
    languages = {"de": TEXT, "en": TEXT} if flat else {"translation": Translation(languages=["de", "en"])}
    for split, pairs in splits.items():
        rows = pairs if flat else [{"translation": pair} for pair in pairs]
        dataset = Dataset.from_list(rows, features=Features(languages))
        pyarrow.parquet.write_table(dataset.data.table, folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{split}-*"} for split in splits]
    text = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{text}---\nInvented sentences.\n", encoding="utf-8")
    return folder


def write_task(folder: Path, name: str, splits: dict[str, list[Row]], features: dict[str, Any] | None = None) -> None:
    """Writes one task's rows by split as parquet files; the columns' types are those of the rows, if not given."""
    for split, rows in splits.items():
        path = folder / name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = Dataset.from_list(rows, features=None if features is None else Features(features))
        pyarrow.parquet.write_table(dataset.data.table, path)


def write_readme(folder: Path, tasks: dict[str, list[str]]) -> None:
    """Writes the header that names the files of each task's splits."""
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits],
        }
        for name, splits in tasks.items()
    ]
    text = yaml.safe_dump({"configs": configs}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{text}---\nInvented rows.\n", encoding="utf-8")


def _write(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    written = {}
    for name, task in tasks.items():
        kinds = task.get("splits") or {split: split for split in SIZES}
        rows = {}
        for split, kind in kinds.items():
            draw = random.Random(f"{name} {split}")
            size = task.get("size", SIZES[kind])
            rows[split] = [task["make"](draw, i, None if kind == "test" else i % task["n_labels"]) for i in range(size)]
        write_task(folder, name, rows, task["features"])
        written[name] = list(rows)
    write_readme(folder, written)
    return folder

"""SuperGLUE: eight tasks and two sets of diagnostics.

Source: Wang et al. 2019, *SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems*. Inputs
follow its baselines, submission files what these write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mhe_lightning.data.classification import ClassificationData, TaskSpec, official_id, text_of, texts_in
from mhe_lightning.data.examples import Example, Row
from mhe_lightning.data.sequences import SequenceFormat, TokenSequence

ENTAILMENT = ("entailment", "not_entailment")
FALSE_TRUE = ("false", "true")
COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
PLACEHOLDER = "@placeholder"

TASKS: dict[str, TaskSpec] = {
    "boolq": TaskSpec(("question", "passage", "idx"), ("accuracy",), "BoolQ", FALSE_TRUE),
    "cb": TaskSpec(
        ("premise", "hypothesis", "idx"), ("accuracy", "f1_macro"), "CB", ("entailment", "contradiction", "neutral")
    ),
    "copa": TaskSpec(
        ("premise", "choice1", "choice2", "question", "idx"), ("accuracy",), "COPA", ("0", "1"), problem="choice"
    ),
    "multirc": TaskSpec(("paragraph", "question", "answer", "idx"), ("f1a", "question_em"), "MultiRC", ("0", "1")),
    "record": TaskSpec(
        ("passage", "query", "entities", "answers", "idx"), ("entity_f1", "entity_em"), "ReCoRD", problem="choice"
    ),
    "rte": TaskSpec(("premise", "hypothesis", "idx"), ("accuracy",), "RTE", ENTAILMENT),
    "wic": TaskSpec(
        ("sentence1", "sentence2", "start1", "end1", "start2", "end2", "idx"),
        ("accuracy",),
        "WiC",
        FALSE_TRUE,
        n_spans=2,
    ),
    "wsc": TaskSpec(
        ("text", "span1_index", "span1_text", "span2_index", "span2_text", "idx"),
        ("accuracy",),
        "WSC",
        ("False", "True"),
        n_spans=2,
    ),
    # diagnostics, for a model that was trained on RTE
    "axb": TaskSpec(
        ("sentence1", "sentence2", "idx"), ("matthews",), "AX-b", ENTAILMENT, splits={"test": "test"}, averaged=False
    ),
    "axg": TaskSpec(
        ("premise", "hypothesis", "idx"),
        ("accuracy", "gender_parity"),
        "AX-g",
        ENTAILMENT,
        splits={"test": "test"},
        averaged=False,
    ),
}


class SuperGlueData(ClassificationData):
    """Examples of a SuperGLUE task, one of `TASKS`; arguments and batches as in `ClassificationData`."""

    benchmark = "superglue"
    hub_name = "aps/super_glue"
    tasks = TASKS

    def columns(self, split: str) -> list[str]:
        return list(self.spec.columns) if self.task == "record" else super().columns(split)

    def texts(self, row: Row) -> Iterator[str]:
        return texts_in(row, [c for c in self.spec.columns if c not in ("span1_text", "span2_text")])

    def examples(self, rows: list[Row], names: list[str], form: SequenceFormat) -> list[Example]:
        make = {"copa": _copa, "record": _record, "wic": _wic, "wsc": _wsc}.get(self.task)
        if make is not None:
            return [make(row, name, form) for row, name in zip(rows, names, strict=True)]
        pairs = [self._pair(row, name) for row, name in zip(rows, names, strict=True)]
        return [
            {"pairs": [pair], "id": official_id(row), "group": self._group(row)}
            for row, pair in zip(rows, form.pairs(pairs), strict=True)
        ]

    def _pair(self, row: Row, name: str) -> tuple[str, str]:
        if self.task == "multirc":
            answer = f"{text_of(row, 'question', name)} {text_of(row, 'answer', name)}"
            return text_of(row, "paragraph", name), answer
        first, second, *_ = self.spec.columns
        return text_of(row, first, name), text_of(row, second, name)

    def _group(self, row: Row) -> str | None:
        if self.task == "multirc":
            return f"{row['idx']['paragraph']}/{row['idx']['question']}"
        # the two sentences of a Winogender pair follow each other
        return str(row["idx"] // 2) if self.task == "axg" else None

    def _label_of(self, row: Row, name: str, split: str) -> float | None:
        if self.task != "record":
            return super()._label_of(row, name, split)
        return None if not row["answers"] else 1.0  # the answers say what is right

    def submission(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """``<task>.jsonl`` as the benchmark takes them, in the order of the index."""
        found = sorted(((json.loads(row["id"]), row) for row in predictions), key=lambda pair: _sort_key(pair[0]))
        if self.task == "multirc":
            lines = _multirc_lines(found)
        elif self.task == "record":
            lines = [{"idx": index["query"], "label": row["predicted_text"]} for index, row in found]
        elif self.task == "copa":
            lines = [{"idx": index, "label": row["prediction"]} for index, row in found]
        else:
            lines = [{"idx": index, "label": self.spec.labels[row["prediction"]]} for index, row in found]
        return {f"{self.spec.file}.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}


def _copa(row: Row, name: str, form: SequenceFormat) -> Example:
    question = row["question"]
    if question not in COPA_QUESTIONS:
        raise ValueError(f"{name}: question ({question!r}) must be 'cause' or 'effect'; correct or remove the row")
    premise = f"{text_of(row, 'premise', name)} {COPA_QUESTIONS[question]}"
    choices = [text_of(row, "choice1", name), text_of(row, "choice2", name)]
    return {
        "pairs": form.pairs([(premise, choice) for choice in choices]),
        "id": official_id(row),
        "right": [row["label"]] if row["label"] in (0, 1) else [],
        "choices": choices,
    }


def _record(row: Row, name: str, form: SequenceFormat) -> Example:
    entities = list(dict.fromkeys(row["entities"] or []))
    query = text_of(row, "query", name)
    if not entities or PLACEHOLDER not in query:
        raise ValueError(f"{name}: a row needs entities and a query with {PLACEHOLDER}; correct or remove it")
    answers = list(dict.fromkeys(row["answers"] or []))
    passage = text_of(row, "passage", name)
    return {
        "pairs": form.pairs([(passage, query.replace(PLACEHOLDER, entity)) for entity in entities]),
        "id": official_id(row),
        "right": [i for i, entity in enumerate(entities) if entity in answers],
        "choices": entities,
        "answers": answers,
    }


def _wic(row: Row, name: str, form: SequenceFormat) -> Example:
    texts = text_of(row, "sentence1", name), text_of(row, "sentence2", name)
    (pair,) = form.pairs([texts])
    characters = [(0, row["start1"], row["end1"]), (1, row["start2"], row["end2"])]
    return {"pairs": [pair], "id": official_id(row), "spans": _token_spans(pair, texts, characters, name)}


def _wsc(row: Row, name: str, form: SequenceFormat) -> Example:
    text = text_of(row, "text", name)
    (pair,) = form.pairs([(text, None)])
    words = [match.span() for match in re.finditer(r"\S+", text)]
    characters = []
    for number in (1, 2):
        first, length = row[f"span{number}_index"], len(text_of(row, f"span{number}_text", name).split())
        if length == 0 or not 0 <= first <= len(words) - length:
            raise ValueError(
                f"{name}: span{number} is {length} words from word {first}, but the text has {len(words)}; correct or "
                "remove the row"
            )
        characters.append((0, words[first][0], words[first + length - 1][1]))
    return {"pairs": [pair], "id": official_id(row), "spans": _token_spans(pair, (text,), characters, name)}


def _token_spans(
    pair: TokenSequence, texts: Sequence[str], characters: list[tuple[int, int, int]], name: str
) -> list[int]:
    spans: list[int] = []
    for text, start, end in characters:
        found = pair.token_span(text, start, end) if 0 <= start < end <= len(texts[text]) else None
        if found is None:
            raise ValueError(
                f"{name}: characters {start} to {end}, which the label is about, lie outside of the text or were cut "
                f"off; raise max_length, or correct or remove the row"
            )
        spans += found
    return spans


def _sort_key(index: Any) -> tuple[int, ...]:
    return tuple(index.values()) if isinstance(index, Mapping) else (index,)


def _multirc_lines(found: list[tuple[dict[str, int], dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line per paragraph, with its questions and their answers."""
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    for index, row in found:
        answers = paragraphs.setdefault(index["paragraph"], {}).setdefault(index["question"], [])
        answers.append({"idx": index["answer"], "label": row["prediction"]})
    return [
        {
            "idx": paragraph,
            "passage": {"questions": [{"idx": q, "answers": answers} for q, answers in questions.items()]},
        }
        for paragraph, questions in paragraphs.items()
    ]

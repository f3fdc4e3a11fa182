"""Does lm-evaluation-harness score an exported decoder as we score the trained one?

Two tasks over texts of the embedded corpus, written as local files: which of four endings continues a text
(multiple choice), and the perplexity of texts (rolling log-likelihood). The harness runs them on the export, by
transformers; we compute the same scores with the trained model's own tokenizer and net. Every number must agree to
the digits that the harness prints.

    pip install -e '.[hf]' lm-eval
    python train.py export RUN EXPORTED
    python benchmarks/lm_evaluation_harness.py RUN EXPORTED
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.interop.native import Native, load_native
from mhe_lightning.interop.verification import sample_texts
from mhe_lightning.loading import find_checkpoint

CHOICES = 4
WORDS = 24
"""Of a text, so that it fits the positions of small models."""

DIGITS = 4
"""That the harness prints."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="A run directory or checkpoint of a decoder.")
    parser.add_argument("exported", help="What `export` made of it.")
    parser.add_argument("--texts", type=int, default=40, help="Texts per task (default: 40).")
    parser.add_argument("--out", help="A JSON file for the scores of both.")
    options = parser.parse_args()
    native = load_native(*find_checkpoint(options.run, "auto"))
    native.net.double()  # as the harness is told to: perplexities have more digits than float32
    long = [words for text in sample_texts(8 * options.texts) if len(words := text.split()) >= WORDS]
    cut = [" ".join(words[:WORDS]) for words in long]
    fitting = [text for text in cut if len(native.tokenizer.encode(text).ids) < native.max_length // 2]
    texts = fitting[: options.texts]
    questions = endings(texts)
    ours = {**choice_scores(native, questions), **perplexity(native, texts)}
    with tempfile.TemporaryDirectory() as folder:
        theirs = harness_scores(options.exported, Path(folder), questions, texts)
    print(f"{'score':24} {'trained model':>14} {'harness, exported':>18}")
    for name, value in ours.items():
        print(f"{name:24} {value:14.{DIGITS}f} {theirs[name]:18.{DIGITS}f}")
    if options.out:
        Path(options.out).write_text(json.dumps({"native": ours, "harness": theirs}, indent=2) + "\n")
    different = [name for name in ours if f"{ours[name]:.{DIGITS}f}" != f"{theirs[name]:.{DIGITS}f}"]
    if different:
        raise SystemExit(f"different: {', '.join(different)}")


def endings(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Each text's first ten words, with its own next eight and those of three others as endings."""
    words = [text.split() for text in texts]
    found = []
    for i, own in enumerate(words):
        places = [(i + 7 * k) % len(words) for k in range(CHOICES)]
        order = places[i % CHOICES :] + places[: i % CHOICES]
        choices = [" ".join(words[place][10:18]) for place in order]
        found.append({"context": " ".join(own[:10]), "choices": choices, "answer": order.index(i)})
    return found


def log_likelihood(native: Native, context: str, text: str) -> float:
    """Of ``text`` after the end-of-text token and ``context``, in nats."""

    def ids(of: str) -> list[int]:
        found: list[int] = native.tokenizer.encode(of, add_special_tokens=False).ids
        return found

    tokens = torch.tensor([[end_of_text_id(native.tokenizer), *ids(context + text)]])
    n_context = 1 + len(ids(context))
    scores = native.scores({"tokens": tokens, "padding": torch.ones_like(tokens, dtype=torch.bool)})
    steps = scores[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return float(steps[n_context - 1 :].double().sum())


def choice_scores(native: Native, questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of questions whose answer is the likeliest ending, as it is and per character."""
    hits = hits_per_character = 0
    for question in questions:
        found = [log_likelihood(native, question["context"], f" {choice}") for choice in question["choices"]]
        each = [value / len(choice) for value, choice in zip(found, question["choices"], strict=True)]
        hits += found.index(max(found)) == question["answer"]
        hits_per_character += each.index(max(each)) == question["answer"]
    return {"endings acc": hits / len(questions), "endings acc_norm": hits_per_character / len(questions)}


def perplexity(native: Native, texts: Sequence[str]) -> dict[str, float]:
    """Per word, per byte, and bits per byte, over all texts."""
    total = math.fsum(log_likelihood(native, "", text) for text in texts)
    n_words = sum(len(text.split()) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    return {
        "texts word_perplexity": math.exp(-total / n_words),
        "texts byte_perplexity": math.exp(-total / n_bytes),
        "texts bits_per_byte": -total / n_bytes / math.log(2),
    }


def harness_scores(
    exported: str, folder: Path, questions: Sequence[dict[str, Any]], texts: Sequence[str]
) -> dict[str, float]:
    """The same by lm-evaluation-harness, from local files."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_task(folder, "endings", questions, ENDINGS)
    write_task(folder, "texts", [{"page": text} for text in texts], TEXTS)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, float] = {}
    # the exported tokenizer begins texts with the end-of-text token, which the harness adds to a rolling text itself
    for task, begins in (("endings", True), ("texts", False)):
        arguments = {"pretrained": exported, "dtype": "float64", "add_bos_token": begins}
        results = simple_evaluate(
            model="hf", model_args=arguments, tasks=[task], task_manager=manager, batch_size=8, device="cpu"
        )["results"][task]
        found.update({f"{task} {key.partition(',')[0]}": value for key, value in results.items() if ",none" in key})
    return found


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], task: dict[str, Any]) -> None:
    """A task of the harness and its data, in a folder."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")


ENDINGS = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}

TEXTS = {
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{page}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}

if __name__ == "__main__":
    main()

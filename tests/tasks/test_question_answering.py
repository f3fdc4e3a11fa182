"""Question answering: the loss, and an evaluation equal to one by hand, whatever the batches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from mhe_lightning.attention import MHA
from mhe_lightning.callbacks import Predictions
from mhe_lightning.data import SquadData
from mhe_lightning.metrics.squad import exact_match, f1
from mhe_lightning.models import Decoder, Encoder
from mhe_lightning.tasks import ExtractiveQuestionAnswering

PLACES = "one two three four".split()  # noqa: SIM905
LONG = " ".join(f"The {n} river begins below stone {n} and sings to the bird." for n in PLACES)
ANSWERS = pyarrow.struct({"text": pyarrow.list_(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())})
SCHEMA = pyarrow.schema({"id": "string", "context": "string", "question": "string", "answers": ANSWERS})


def row(id, context, question, *texts):
    answers = {"text": list(texts), "answer_start": [context.index(text) for text in texts]}
    return {"id": id, "context": context, "question": question, "answers": answers}


ROWS = [
    row("a", LONG, "What sings?", "The one river", "one river"),
    row("b", LONG, "Below what does the four river begin?", "stone four"),
    row("c", "The bird sings.", "Who sings?", "The bird"),
]
NONE = [row("n", LONG, "Where is the sea?"), row("m", "A bird.", "What sleeps?")]


@pytest.fixture
def make(tmp_path):
    """Makes data with several windows for some questions."""

    def make_data(version="v1", batch_size=4, num_workers=0, validation=None) -> SquadData:
        rows = ROWS + (NONE if version == "v2" else [])
        source = tmp_path / version
        source.mkdir(exist_ok=True)
        for split, some in (("train", rows), ("validation", rows if validation is None else validation)):
            table = pyarrow.Table.from_pylist(some, schema=SCHEMA)
            pyarrow.parquet.write_table(table, source / f"{split}-00000-of-00001.parquet")
        data = SquadData(
            batch_size=batch_size,
            seed=0,
            version=version,
            tokenizer="wordpiece",
            tokenizer_size=300,
            max_length=32,
            stride=8,
            max_question_length=8,
            path=str(source),
            num_workers=num_workers,
            cache_dir=str(tmp_path / "cache"),
        )
        data.prepare()
        return data

    return make_data


def task_for(data: SquadData, **options) -> ExtractiveQuestionAnswering:
    torch.manual_seed(0)
    net = Encoder(data.vocab_size, MHA, width=16, n_heads=2, n_layers=2, max_length=32, dropout=0.0)
    task = ExtractiveQuestionAnswering(net, max_steps=4, unanswerable=data.unanswerable, **options)
    nn.init.normal_(task.head.classifier.weight, std=1.0)  # logits that differ
    return task


def trainer(tmp_path: Path, **options) -> Trainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    return Trainer(
        accelerator="cpu",
        precision="64-true",
        default_root_dir=str(tmp_path),
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def evaluate(task, data, tmp_path) -> dict[str, float]:
    (scores,) = trainer(tmp_path).validate(task, data, verbose=False)
    return scores


def by_hand(task, data) -> tuple[dict[str, tuple[str, float, list[str]]], float]:
    """Of each question its best answer, its null odds and its references, and the loss: over all spans, one by one."""
    task = task.double().eval()
    best, null, references, losses = {}, {}, {}, []
    dataset = data.dataset("validation")
    for i in range(len(dataset)):
        batch = data.collate([dataset[i]])
        info = batch["info"][0]
        with torch.no_grad():
            start, end = (logits[0].tolist() for logits in task(batch))
        null[info["id"]] = min(null.get(info["id"], math.inf), start[0] + end[0])
        references[info["id"]] = info["answers"]
        for s in batch["allowed_starts"][0].nonzero().flatten().tolist():
            for e in range(s, min(s + task.max_answer_tokens, len(start) - 1)):
                text = info["context"][info["offsets"][s, 0] : info["offsets"][e, 1]]
                best[info["id"]] = max(best.get(info["id"], (-math.inf, "")), (start[s] + end[e], text))
        for logits, target in ((start, batch["starts"][0]), (end, batch["ends"][0])):
            losses.append(math.log(math.fsum(math.exp(x) for x in logits)) - logits[target])
    answers = {id: (text, null[id] - score, references[id]) for id, (score, text) in best.items()}
    return answers, math.fsum(losses) / len(losses)


def test_evaluation_is_as_by_hand(make, tmp_path):
    data = make()
    task = task_for(data, n_best=100, max_answer_tokens=5)
    scores = evaluate(task, data, tmp_path)
    answers, loss = by_hand(task, data)

    assert scores["val/loss"] == pytest.approx(loss)
    assert scores["val/f1"] == pytest.approx(100 * sum(f1(text, refs) for text, _, refs in answers.values()) / 3)
    exact = sum(exact_match(text, refs) for text, _, refs in answers.values())
    assert scores["val/exact"] == pytest.approx(100 * exact / 3)
    assert scores["val/score"] == scores["val/f1"]
    assert scores["val/f1"] > 0


@pytest.mark.parametrize("threshold", [-1e9, -0.5, 0.0, 1e9])
def test_evaluation_with_unanswerable_questions_is_as_by_hand(make, tmp_path, threshold):
    data = make("v2")
    task = task_for(data, n_best=100, max_answer_tokens=5, null_threshold=threshold)
    scores = evaluate(task, data, tmp_path)
    answers, loss = by_hand(task, data)

    given = {id: ("" if odds > threshold else text, refs) for id, (text, odds, refs) in answers.items()}
    assert len(given) == 5
    assert scores["val/loss"] == pytest.approx(loss)
    assert scores["val/f1"] == pytest.approx(20 * sum(f1(*pair) for pair in given.values()))
    without = [exact_match(*given[id]) for id in ("n", "m")]
    assert scores["val/no_answer_exact"] == pytest.approx(50 * sum(without))
    assert scores["val/best_f1"] >= scores["val/f1"] - 1e-6
    if threshold == -1e9:
        assert scores["val/no_answer_exact"] == 100
        assert scores["val/has_answer_f1"] == 0


def test_neither_batches_nor_workers_nor_padding_rows_matter(make, tmp_path):
    reference = evaluate(task_for(make("v2")), make("v2", batch_size=1), tmp_path)
    for options in ({"batch_size": 3}, {"batch_size": 100, "num_workers": 2}):
        data = make("v2", **options)
        assert evaluate(task_for(data), data, tmp_path) == pytest.approx(reference)

    data = make("v2")
    task = task_for(data).double().eval()
    rows = data.dataset("validation")
    found = {}
    task.log_evaluation = lambda split, results: found.update(results)
    with torch.no_grad():
        for i in [*range(len(rows)), -1, -1]:
            task.validation_step(data.collate([rows[i]]), 0)
    task.on_validation_epoch_end()
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(reference)


def test_hidden_answers_count_for_nothing(make, tmp_path):
    hidden = {**row("h", LONG, "What?"), "answers": None}
    data = make(validation=[*ROWS, hidden])
    assert evaluate(task_for(data), data, tmp_path) == pytest.approx(evaluate(task_for(make()), make(), tmp_path))
    data = make(validation=[hidden])
    assert evaluate(task_for(data), data, tmp_path) == {"val/hidden_labels": 1.0}


def test_the_loss_leaves_padding_out(make):
    data = make()
    task = task_for(data).double()
    rows = [data.dataset("train")[i] for i in range(len(data.dataset("train")))]
    recorded = []
    task.accumulate = lambda loss, targets, tokens: recorded.append((targets.item(), tokens.item())) or loss
    together = task.training_step(data.collate(rows), 0)
    alone = [task.training_step(data.collate([r]), 0) for r in rows]

    torch.testing.assert_close(together, torch.stack(alone).sum())
    assert recorded[0] == (len(rows), sum(r["length"] for r in rows))
    together.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_training_learns_the_answers(make, tmp_path):
    data = make("v2", batch_size=8)
    net = Encoder(data.vocab_size, MHA, width=32, n_heads=2, n_layers=2, max_length=32, dropout=0.0)
    task = ExtractiveQuestionAnswering(net, 150, True, lr=3e-3, schedule="constant", weight_decay=0.0)
    trainer(tmp_path, max_steps=150, limit_val_batches=0, max_epochs=-1).fit(task, data)
    scores = evaluate(task, data, tmp_path)
    assert scores["val/exact"] == 100
    assert scores["val/no_answer_exact"] == 100


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_predictions(make, tmp_path, version):
    data = make(version, batch_size=3)
    task = task_for(data, n_best=100, max_answer_tokens=5)
    trainer(tmp_path, callbacks=[Predictions()]).predict(task, data)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    answers, _ = by_hand(task, data)

    assert [r["id"] for r in rows] == [r["id"] for r in ROWS + (NONE if version == "v2" else [])]
    for r in rows:
        text, odds, _ = answers[r["id"]]
        best = r["n_best"]
        assert sum(b["probability"] for b in best) == pytest.approx(1)
        assert [b["score"] for b in best] == sorted((b["score"] for b in best), reverse=True)
        context = next(x["context"] for x in ROWS + NONE if x["id"] == r["id"])
        assert all(b["text"] == context[b["start"] : b["end"]] for b in best)
        assert best[0]["text"] == r["prediction_text"]
        assert r["prediction_text"] == ("" if version == "v2" and odds > 0 else text)
        if version == "v2":
            assert r["null_odds"] == pytest.approx(odds)
            assert sum(b["text"] == "" for b in best) == 1
    submitted = json.loads((tmp_path / "submission" / "predictions.json").read_text())
    assert submitted == {r["id"]: r["prediction_text"] for r in rows}
    assert (tmp_path / "submission" / "null_odds.json").is_file() == (version == "v2")


def test_refusals():
    net = Encoder(10, MHA, width=8, n_heads=2, n_layers=1, max_length=8)
    with pytest.raises(ValueError, match="Decoder sees only what comes before"):
        ExtractiveQuestionAnswering(Decoder(10, MHA, width=8, n_heads=2, n_layers=1, max_length=8), 1, False)
    with pytest.raises(ValueError, match="SquadData"):
        ExtractiveQuestionAnswering(net, 1, None)
    for options in ({"n_best": 0}, {"max_answer_tokens": 0}, {"null_threshold": math.nan}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ExtractiveQuestionAnswering(net, 1, False, **options)

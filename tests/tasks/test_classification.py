"""Classes, values and choices: losses against plain formulas, and scores over the whole evaluation set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mhe_lightning.attention import MHE
from mhe_lightning.data import GlueData, SuperGlueData
from mhe_lightning.models import Decoder, Encoder
from mhe_lightning.tasks import SequenceClassification

VOCABULARY, LENGTH = 13, 10
DATA = {
    "classes": lambda: SuperGlueData("cb", batch_size=1, seed=0),
    "value": lambda: GlueData("stsb", batch_size=1, seed=0),
    "choice": lambda: SuperGlueData("record", batch_size=1, seed=0),
}
problems = pytest.mark.parametrize("problem", DATA)


class Captured(SequenceClassification):
    """Keeps what it logs, and the gradients of its first optimizer step."""

    def log_evaluation(self, split, results):
        self.results = dict(results)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if not hasattr(self, "gradients"):
            self.gradients = {name: p.grad.clone() for name, p in self.named_parameters()}


def model(problem: str, net: type = Encoder, **settings: Any) -> Captured:
    """A task of which all numbers are of size one half."""
    torch.manual_seed(0)
    data = DATA[problem]()
    built = net(VOCABULARY, MHE, width=8, n_heads=2, n_layers=2, max_length=LENGTH, dropout=0.0)
    task = Captured(
        built,
        max_steps=3,
        problem=problem,
        n_labels=data.n_labels,
        n_spans=0,
        **{"metrics": data.metrics, "head_dropout": 0.0, "schedule": "constant", **settings},
    )
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.5)
    return task.eval()


def examples(problem: str, count: int, hidden: tuple[int, ...] = (), parts: tuple[str, ...] = ("",)) -> list[dict]:
    """Invented examples as their data set has them."""
    draw = torch.Generator().manual_seed(5)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    rows = []
    for row in range(count):
        n = 2 + row % 3 if problem == "choice" else 1
        sequences = [torch.randint(VOCABULARY, (integer(3, LENGTH + 1),), generator=draw).tolist() for _ in range(n)]
        label: float | None = {"classes": float(row % 3), "value": row * 0.7 % 5, "choice": 1.0}[problem]
        names = [f"name{i}" for i in range(n)] if problem == "choice" else []
        right = [row % n] if problem == "choice" else []
        if row in hidden:
            label, right = None, []
        rows.append(
            {
                "rows": row,
                "sequences": sequences,
                "boundaries": [2] * n,
                "label": label,
                "right": right,
                "spans": [],
                "id": str(row),
                "part": parts[row * len(parts) // count],
                "group": None,
                "choices": names,
                "answers": [names[i] for i in right],
            }
        )
    return rows


def collate(problem: str, rows: list[dict]) -> dict[str, Any]:
    return DATA[problem]().collate(rows)


def evaluate(task: Captured, problem: str, rows: list[dict], batch_size: int) -> dict[str, float]:
    with torch.no_grad():
        for i in range(0, len(rows), batch_size):
            task.validation_step(collate(problem, rows[i : i + batch_size]), 0)
        task.on_validation_epoch_end()
    return task.results


def scores_alone(task: Captured, problem: str, row: dict) -> Tensor:
    """The scores of a row's sequences, each by itself and so without padding, in float64."""
    with torch.no_grad():
        found = [task(collate(problem, [{**row, "sequences": [s], "boundaries": [2]}])) for s in row["sequences"]]
    return torch.cat(found).double()


def plain_loss(task: Captured, problem: str, row: dict) -> float:
    scores = scores_alone(task, problem, row)
    if problem == "classes":
        return -math.log(scores[0].exp()[int(row["label"])] / scores[0].exp().sum())
    if problem == "value":
        return float((scores[0, 0] - row["label"]) ** 2)
    odds = scores[:, 0].exp()
    return -math.log(sum(odds[i] for i in row["right"]) / odds.sum())


@problems
def test_the_loss_is_that_of_the_plain_formula(problem):
    task, rows = model(problem), examples(problem, 7)
    if problem == "choice":
        rows[2]["right"] = [0, 2]
    expected = [plain_loss(task, problem, row) for row in rows]
    assert task.training_step(collate(problem, rows), 0).item() == pytest.approx(sum(expected), rel=1e-5)
    assert evaluate(task, problem, rows, 3)["loss"] == pytest.approx(sum(expected) / 7, rel=1e-5)


@problems
def test_predictions_are_the_likeliest_class_the_value_or_the_best_choice(problem):
    task, rows = model(problem), examples(problem, 7)
    with torch.no_grad():
        found = task.predict_step(collate(problem, rows), 0)
    for row, prediction in zip(rows, found, strict=True):
        scores = scores_alone(task, problem, row).flatten()
        expected = scores[0].item() if problem == "value" else int(scores.argmax())
        assert prediction["prediction"] == pytest.approx(expected, rel=1e-5)
        assert prediction["scores"] == pytest.approx(scores.tolist(), rel=1e-4, abs=1e-5)
        assert (prediction["row"], prediction["id"]) == (row["rows"], row["id"])
        if problem == "choice":
            assert prediction["predicted_text"] == f"name{expected}"


@problems
def test_results_do_not_depend_on_the_batch_size(problem):
    rows = examples(problem, 11)
    # in float64: what a correlation makes of scores that differ little is far more than their rounding in float32
    one, other = (evaluate(model(problem).double(), problem, rows, size) for size in (1, 11))
    assert one == pytest.approx(other, rel=1e-10)


@problems
def test_hidden_labels_count_for_nothing(problem):
    rows = examples(problem, 9, hidden=(0, 4, 8))
    shown = [row for row in rows if row["label"] is not None]
    task = model(problem)
    assert evaluate(task, problem, rows, 4) == pytest.approx(evaluate(model(problem), problem, shown, 4), rel=1e-3)
    assert all(math.isfinite(value) for value in task.results.values())


@problems
def test_without_any_label_there_is_no_score(problem):
    rows = examples(problem, 3, hidden=(0, 1, 2))
    assert evaluate(model(problem), problem, rows, 2) == {"hidden_labels": 3.0}


def test_a_choice_without_a_right_candidate_counts_for_the_metrics_but_not_for_the_loss():
    rows = examples("choice", 5)
    whole = evaluate(model("choice"), "choice", rows[:4], 5)
    rows[4]["right"], rows[4]["answers"] = [], ["none of them"]
    results = evaluate(model("choice"), "choice", rows, 5)
    assert results["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert results["entity_em"] == pytest.approx(whole["entity_em"] * 4 / 5)


def test_padding_rows_count_for_nothing():
    rows = examples("classes", 5)
    padded = [*rows, {**rows[0], "rows": -1}]
    assert evaluate(model("classes"), "classes", padded, 3) == evaluate(model("classes"), "classes", rows, 3)


def test_the_score_is_the_mean_of_the_metrics():
    results = evaluate(model("classes"), "classes", examples("classes", 9), 4)
    assert set(results) == {"loss", "accuracy", "f1_macro", "score"}
    assert results["score"] == pytest.approx((results["accuracy"] + results["f1_macro"]) / 2)


def test_the_score_of_a_set_in_parts_is_the_mean_over_them():
    rows = examples("classes", 9, parts=("matched", "mismatched"))
    task = model("classes", metrics=["accuracy"])
    results = evaluate(task, "classes", rows, 4)
    for name, part in (("accuracy", "matched"), ("mismatched/accuracy", "mismatched")):
        own = [{**row, "part": ""} for row in rows if row["part"] == part]
        assert results[name] == evaluate(task, "classes", own, 4)["accuracy"]
    assert results["score"] == pytest.approx((results["accuracy"] + results["mismatched/accuracy"]) / 2)


def test_a_second_evaluation_begins_anew():
    task, rows = model("classes"), examples("classes", 9)
    first = evaluate(task, "classes", rows, 4)
    evaluate(task, "classes", rows[:3], 4)
    assert evaluate(task, "classes", rows, 4) == first


class FixedRows(LightningDataModule):
    """The same examples in the same order."""

    def __init__(self, problem: str, batch_size: int) -> None:
        super().__init__()
        self.problem, self.batch_size = problem, batch_size

    def train_dataloader(self):
        rows = examples(self.problem, 12)
        return DataLoader(rows, self.batch_size, collate_fn=lambda some: collate(self.problem, some))


@problems
def test_accumulated_gradients_are_those_of_the_whole_batch(problem):
    gradients = []
    for batch_size in (12, 4, 1):
        task = model(problem)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            accumulate_grad_batches=12 // batch_size,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, FixedRows(problem, batch_size))
        gradients.append(task.gradients)
    for name, whole in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], whole, rtol=1e-4, atol=1e-6)


def test_a_decoders_first_token_is_refused():
    with pytest.raises(ValueError, match=r"pooling 'first': a decoder's first token sees no other; set model\.pooling"):
        model("classes", Decoder)


def test_data_without_labels_are_refused():
    net = Encoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=1, max_length=LENGTH)
    with pytest.raises(ValueError, match="needs labelled data, such as GlueData or SuperGlueData"):
        SequenceClassification(net, max_steps=1, problem=None, n_labels=None, n_spans=None, metrics=None)


@problems
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_does_not_see_padding(problem, pooling):
    task, rows = model(problem, Decoder, pooling=pooling), examples(problem, 6)
    with torch.no_grad():
        together = task.predict_step(collate(problem, rows), 0)
        alone = [task.predict_step(collate(problem, [row]), 0)[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4, abs=1e-5)

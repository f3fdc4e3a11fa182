"""Masked language modelling: losses over masked positions only, evaluation and likelihoods against plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import logged
from mhe_lightning.attention import MHE
from mhe_lightning.callbacks import MetricsCSV
from mhe_lightning.data import CorpusSpec, MaskedLanguageModelingData
from mhe_lightning.models import Decoder, Encoder
from mhe_lightning.tasks import MaskedLanguageModeling
from mhe_lightning.tasks.base import results_of
from mhe_lightning.tasks.masked_language_modeling import PSEUDO_LIKELIHOOD_BATCH

VOCABULARY, LENGTH, STEPS, ROWS = 13, 10, 3, 12


class FixedRows(LightningDataModule):
    """The same rows in the same order, ``batch_size`` at a time; ``ROWS`` for each optimizer step.

    Args:
        batch_size: rows per micro-batch.
        padded: whether rows are of different lengths, and filled up on the right.
    """

    def __init__(self, batch_size: int, padded: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        draw = torch.Generator().manual_seed(3)
        shape = (STEPS * ROWS, LENGTH)
        self.tokens = torch.randint(VOCABULARY, shape, generator=draw)
        self.targets = torch.randint(VOCABULARY, shape, generator=draw)
        self.targets[torch.rand(shape, generator=draw) < 0.7] = -100
        self.targets[::4] = -100  # whole rows, and with 1 row per micro-batch whole micro-batches
        self.segments = torch.randint(2, shape, generator=draw)
        lengths = torch.randint(1, LENGTH + 1, (shape[0], 1), generator=draw)
        self.padding = torch.arange(LENGTH) < lengths if padded else None
        if self.padding is not None:
            self.targets[~self.padding] = -100

    def batch(self, rows: slice) -> dict[str, Tensor]:
        batch = {"tokens": self.tokens[rows], "targets": self.targets[rows], "segments": self.segments[rows]}
        return batch if self.padding is None else {**batch, "padding": self.padding[rows]}

    def train_dataloader(self):
        rows = [self.batch(slice(i, i + 1)) for i in range(len(self.tokens))]
        rows = [{name: value[0] for name, value in row.items()} for row in rows]
        return DataLoader(rows, batch_size=self.batch_size)


class Recorded(MaskedLanguageModeling):
    """Keeps the gradients of its first optimizer step."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if not hasattr(self, "gradients"):
            self.gradients = {name: p.grad.clone() for name, p in self.named_parameters()}


def model(**settings) -> Recorded:
    """A task of which all numbers, the head's included, are of size one half."""
    torch.manual_seed(0)
    net = Encoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=2, max_length=LENGTH, dropout=0.0)
    task = Recorded(net, max_steps=STEPS, lr=0.01, **settings)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.5)
    return task


def trainer(**settings) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "precision": "64-true",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )


def train(folder: Path, micro_batches: int, padded: bool) -> tuple[list[float], Recorded]:
    folder = folder / str(micro_batches)
    folder.mkdir()
    task = model()
    fit = trainer(max_steps=STEPS, accumulate_grad_batches=micro_batches, callbacks=[MetricsCSV(folder)])
    fit.fit(task, FixedRows(ROWS // micro_batches, padded))
    return [float(loss) for loss in logged(folder, "train/loss").values()], task


def literal_logits(task: MaskedLanguageModeling, tokens: Tensor, **inputs: Tensor) -> Tensor:
    """Logits at all positions, by BERT's equations."""
    head, embeddings = task.head, task.net.token_embedding.weight
    x = F.gelu(head.dense(task.net(tokens, **inputs)))
    return F.layer_norm(x, x.shape[-1:], head.norm.weight, head.norm.bias, eps=1e-12) @ embeddings.T + head.bias


# Training


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_is_on_the_mean_cross_entropy_of_its_masked_positions(tmp_path, micro_batches, padded):
    losses, trained = train(tmp_path, micro_batches, padded)
    task, data = model().double(), FixedRows(ROWS, padded)
    batch = data.batch(slice(0, ROWS))
    targets = batch.pop("targets")
    masked = targets != -100
    loss = F.cross_entropy(literal_logits(task, **batch)[masked], targets[masked])
    assert losses[0] == pytest.approx(loss.item(), rel=1e-10)
    parameters = dict(task.named_parameters())
    wanted = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert set(trained.gradients) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(trained.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_many_small_micro_batches_equal_one_large(tmp_path, padded):
    losses, whole = train(tmp_path, 1, padded)
    assert len(losses) == STEPS
    for micro_batches in (3, 12):
        other_losses, other = train(tmp_path, micro_batches, padded)
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(other.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
        assert other.tokens_seen == whole.tokens_seen


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_all_tokens_that_are_read_count_as_seen_not_only_the_masked(tmp_path, micro_batches):
    _, task = train(tmp_path, micro_batches, padded=False)
    assert task.tokens_seen == STEPS * ROWS * LENGTH


def test_padding_does_not_count_as_seen(tmp_path):
    _, task = train(tmp_path, 2, padded=True)
    assert task.tokens_seen == FixedRows(ROWS, padded=True).padding.sum() < STEPS * ROWS * LENGTH


def test_a_step_without_masked_tokens_changes_no_weight_to_nan():
    task, data = model(), FixedRows(ROWS)
    data.targets[:ROWS] = -100
    trainer(max_steps=2).fit(task, data)
    assert all(bool(parameter.isfinite().all()) for parameter in task.parameters())


def test_embeddings_norms_and_biases_do_not_decay_and_the_heads_matrix_does():
    task = model()
    names = {id(p): name for name, p in task.named_parameters()}
    decayed, others = ({names[id(p)] for p in group} for group in task._parameter_groups())
    assert "head.dense.weight" in decayed
    assert {"head.bias", "head.dense.bias", "head.norm.weight", "net.token_embedding.weight"} <= others
    assert {"net.segment_embedding.weight", "net.norm.weight", "net.blocks.0.norm_1.bias"} <= others


def test_a_net_that_sees_only_what_comes_before_is_refused():
    net = Decoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=1, max_length=LENGTH)
    with pytest.raises(ValueError, match="Decoder sees only what comes before; masked tokens need an Encoder"):
        MaskedLanguageModeling(net, max_steps=1)


# Evaluation


class Evaluation:
    """A task and the tests' prose, for computing by hand what a run reports."""

    def __init__(self, prose: Path, prepared: Path, block_length: int = 12, **settings) -> None:
        spec = CorpusSpec(
            path=str(prose),
            tokenizer="wordpiece",
            tokenizer_size=300,
            validation_fraction=0.03,
            test_fraction=0.01,
        )
        self.data = MaskedLanguageModelingData(
            spec, block_length, batch_size=8, seed=0, cache_dir=str(prepared), **settings
        )
        self.data.prepare()
        torch.manual_seed(0)
        net = Encoder(self.data.vocab_size, MHE, width=8, n_heads=2, n_layers=1, max_length=block_length)
        self.task = MaskedLanguageModeling(net, max_steps=1)
        with torch.no_grad():
            for parameter in self.task.parameters():
                parameter.normal_(std=0.5)
        self.task.double().eval()

    def rows(self, split: str) -> list[dict]:
        """The rows of a split without their padding."""
        dataset, rows = self.data.dataset(split), []
        for i in range(len(dataset)):
            row = dataset[i]
            real = row.pop("padding")
            names = {"tokens", "targets", "segments", "documents", "ordinary"} & set(row)
            rows.append({name: row[name][real] for name in names})
        assert sum(len(row["tokens"]) for row in rows) < len(rows) * self.data.block_length  # the last is padded
        return rows

    def inputs(self, row: dict) -> dict[str, Tensor]:
        return {name: row[name][None] for name in ("segments", "documents") if name in row}


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("eval_batch_size", [1, 7, 64])
@torch.no_grad()
def test_evaluation_is_over_every_masked_token_of_the_set_once(prose, prepared, document_mask, eval_batch_size):
    e = Evaluation(prose, prepared, document_mask=document_mask, eval_batch_size=eval_batch_size, mask_share=0.3)
    for split, prefix, run in (("validation", "val", Trainer.validate), ("test", "test", Trainer.test)):
        losses, hits = [], []
        for row in e.rows(split):
            logits = literal_logits(e.task, row["tokens"][None], **e.inputs(row))[0]
            for t in (row["targets"] != -100).nonzero().flatten():
                losses.append(F.cross_entropy(logits[t], row["targets"][t]).item())
                hits.append(int(logits[t].argmax() == row["targets"][t]))
        assert len(losses) > 10
        loss = sum(losses) / len(losses)
        (results,) = run(trainer(), e.task, e.data, verbose=False)
        assert results == pytest.approx(
            {
                f"{prefix}/loss": loss,
                f"{prefix}/accuracy": sum(hits) / len(hits),
                f"{prefix}/pseudo_ppl": math.exp(loss),
            },
            rel=1e-9,
        )


@torch.no_grad()
def test_accuracy_is_that_of_the_likeliest_tokens(prose, prepared):
    e = Evaluation(prose, prepared)
    counts: dict[int, int] = {}
    for row in e.rows("validation"):
        for target in row["targets"][row["targets"] != -100].tolist():
            counts[target] = counts.get(target, 0) + 1
    commonest = max(counts, key=counts.__getitem__)
    e.task.head.bias[commonest] = 1e6  # so that it is the likeliest everywhere
    (results,) = trainer().validate(e.task, e.data, verbose=False)
    assert results["val/accuracy"] == pytest.approx(counts[commonest] / sum(counts.values()), rel=1e-12)


def test_two_evaluations_in_a_row_report_the_same(prose, prepared):
    e = Evaluation(prose, prepared)
    run = trainer()
    assert run.validate(e.task, e.data, verbose=False) == run.validate(e.task, e.data, verbose=False)


# Likelihoods


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("block_length", [12, PSEUDO_LIKELIHOOD_BATCH + 9])  # a row in one batch of copies, and in two
@torch.no_grad()
def test_a_likelihood_is_that_of_each_token_masked_alone(prose, prepared, document_mask, block_length):
    e = Evaluation(prose, prepared, block_length, document_mask=document_mask, eval_batch_size=3)
    mask = e.data.tokenizer.token_to_id("[MASK]")
    expected = []
    for i, row in enumerate(e.rows("test")):
        original = torch.where(row["targets"] == -100, row["tokens"], row["targets"])
        total, count = 0.0, 0
        for t in range(len(original)):
            if original[t] >= 5:  # not a special token
                hidden = original.clone()
                hidden[t] = mask
                logits = literal_logits(e.task, hidden[None], **e.inputs(row))[0, t]
                total += logits.log_softmax(-1)[original[t]].item()
                count += 1
        ppl = math.exp(-total / count)
        expected.append({"row": i, "tokens": count, "pseudo_log_likelihood": total, "pseudo_ppl": ppl})
    found = [row for batch in trainer().predict(e.task, e.data) for row in batch]
    assert found == [pytest.approx(row, rel=1e-9) for row in expected]
    assert max(row["tokens"] for row in found) > (PSEUDO_LIKELIHOOD_BATCH if block_length > 12 else 5)


def test_rows_that_stand_for_nothing_have_no_likelihood(prose, prepared):
    e = Evaluation(prose, prepared)
    rows = [e.data.dataset("test")[row] for row in (0, -1)]
    assert [row["row"] for row in e.task.predict_step(e.data.collate(rows), 0)] == [0]


def test_a_batch_that_stands_for_nothing_changes_no_result(prose, prepared):
    e = Evaluation(prose, prepared)
    e.task.setup("validate")
    for rows in ([0, 1], [-1]):
        e.task.validation_step(e.data.collate([e.data.dataset("validation")[row] for row in rows]), 0)
    with_padding = results_of(e.task.evaluation)
    e.task.validation_step(e.data.collate([e.data.dataset("validation")[row] for row in (0, 1)]), 0)
    assert with_padding == results_of(e.task.evaluation)

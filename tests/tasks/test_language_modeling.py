"""Language modelling: losses over the targets of the whole batch, and evaluation against hand computations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conftest import logged
from mhe_lightning.attention import MHE
from mhe_lightning.callbacks import MetricsCSV
from mhe_lightning.cli import main
from mhe_lightning.data import LanguageModelingData
from mhe_lightning.data.corpus import CorpusSpec
from mhe_lightning.models import Decoder
from mhe_lightning.tasks import LanguageModeling

VOCABULARY, LENGTH, STEPS, ROWS = 13, 10, 4, 12


class FixedRows(LightningDataModule):
    """The same rows in the same order, ``batch_size`` at a time; ``ROWS`` for each optimizer step.

    Args:
        batch_size: rows per micro-batch.
        ragged: whether rows have very different numbers of targets.
    """

    def __init__(self, batch_size: int, ragged: bool) -> None:
        super().__init__()
        self.batch_size = batch_size
        draw = torch.Generator().manual_seed(3)
        tokens = torch.randint(VOCABULARY, (STEPS * ROWS, LENGTH + 1), generator=draw)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:].clone()
        if ragged:
            for i, row in enumerate(self.targets):
                row[i % LENGTH + 1 :] = -100
            self.targets[::4] = -100  # whole rows, and with 1 row per micro-batch whole micro-batches

    def train_dataloader(self):
        rows = [{"tokens": t, "targets": y} for t, y in zip(self.tokens, self.targets, strict=True)]
        return DataLoader(rows, batch_size=self.batch_size)


def train(tmp_path: Path, micro_batches: int, ragged: bool) -> tuple[list[float], dict[str, Tensor], LanguageModeling]:
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=2, max_length=LENGTH, dropout=0.0)
    model = LanguageModeling(net, max_steps=STEPS, lr=0.01, warmup_steps=1)
    folder = tmp_path / str(micro_batches)
    folder.mkdir()
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=STEPS,
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=0.5,
        logger=False,
        callbacks=[MetricsCSV(folder)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, FixedRows(ROWS // micro_batches, ragged))
    losses = [float(loss) for loss in logged(folder, "train/loss").values()]
    return losses, {name: p.detach() for name, p in net.named_parameters()}, model


@pytest.mark.parametrize("ragged", [False, True])
def test_many_small_micro_batches_equal_one_large(tmp_path, ragged):
    losses, weights, whole = train(tmp_path, 1, ragged)
    assert len(losses) == STEPS
    for micro_batches in (2, 3, 12):
        other_losses, other_weights, other = train(tmp_path, micro_batches, ragged)
        assert other_losses == pytest.approx(losses, rel=1e-10)
        for name, weight in weights.items():
            # AdamW divides by the gradient's size, so where that is near 0 its rounding noise counts
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-10, atol=1e-10, msg=name)
        assert other.tokens_seen == whole.tokens_seen


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_divides_by_the_targets_of_all_its_micro_batches(tmp_path, micro_batches):
    losses, _, model = train(tmp_path, micro_batches, ragged=True)
    data = FixedRows(ROWS, ragged=True)
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=2, max_length=LENGTH, dropout=0.0).double()
    logits = net.logits(net(data.tokens[:ROWS]))
    first = F.cross_entropy(logits.flatten(0, 1), data.targets[:ROWS].flatten())  # the mean over targets
    assert losses[0] == pytest.approx(first.item(), rel=1e-10)
    assert model.tokens_seen == (data.targets != -100).sum()


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_targets(tmp_path):
    data = FixedRows(ROWS // 3, ragged=True)
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=1, max_length=LENGTH, dropout=0.0).double()
    parameters = dict(net.named_parameters())
    logits = net.logits(net(data.tokens[:ROWS]))
    loss = F.cross_entropy(logits.flatten(0, 1), data.targets[:ROWS].flatten())
    wanted = torch.autograd.grad(loss, list(parameters.values()))
    found = {}

    class Recorded(LanguageModeling):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            found.update({name: p.grad.clone() for name, p in self.net.named_parameters()})

    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=1,
        accumulate_grad_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorded(net, max_steps=1), data)
    for name, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_a_step_without_targets_changes_no_weight_to_nan(tmp_path):
    data = FixedRows(ROWS, ragged=False)
    data.targets[:ROWS] = -100
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, MHE, width=8, n_heads=2, n_layers=1, max_length=LENGTH)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModeling(net, max_steps=2), data)
    assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())


# Evaluation


class Evaluation:
    """A net and the packed validation split of the tests' prose, for computing by hand what a run reports."""

    def __init__(self, prose: Path, prepared: Path, **settings) -> None:
        spec = CorpusSpec(path=str(prose), tokenizer_size=300, validation_fraction=0.03)
        self.data = LanguageModelingData(
            spec, block_length=LENGTH, batch_size=8, seed=0, cache_dir=str(prepared), **settings
        )
        self.data.prepare()
        split = self.data.corpus.split("validation")
        self.tokens = torch.from_numpy(split.read(0, len(split)))
        torch.manual_seed(0)
        self.net = Decoder(self.data.vocab_size, MHE, width=8, n_heads=2, n_layers=1, max_length=LENGTH)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.normal_(std=0.5)
        self.net.double().eval()

    def reported(self) -> dict[str, float]:
        trainer = Trainer(
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        (results,) = trainer.validate(LanguageModeling(self.net, max_steps=1), self.data, verbose=False)
        return results

    @torch.no_grad()
    def losses(self, context: list[range]) -> Tensor:
        """The loss of each token but the first; token t is predicted from the tokens ``context[t - 1]``."""
        losses = []
        for t, before in enumerate(context, start=1):
            logits = self.net.logits(self.net(self.tokens[before.start : before.stop][None]))[0, -1]
            losses.append(F.cross_entropy(logits, self.tokens[t]))
        return torch.stack(losses)


@pytest.mark.parametrize("eval_batch_size", [1, 7, 64])
def test_perplexity_predicts_every_token_once_in_blocks(prose, prepared, eval_batch_size):
    e = Evaluation(prose, prepared, eval_batch_size=eval_batch_size)
    losses = e.losses([range((t - 1) // LENGTH * LENGTH, t) for t in range(1, len(e.tokens))])
    results = e.reported()
    assert results["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-9)
    assert results["val/ppl"] == pytest.approx(losses.mean().exp().item(), rel=1e-9)


@pytest.mark.parametrize("stride", [1, 4, LENGTH - 1, LENGTH])
def test_a_sliding_window_predicts_every_token_once_from_more_before_it(prose, prepared, stride):
    e = Evaluation(prose, prepared, eval_stride=stride, eval_batch_size=5)
    context = []
    for t in range(1, len(e.tokens)):
        # the first window that reaches token t, each moved by `stride`
        window = max(0, -(-(t - LENGTH) // stride))
        context.append(range(window * stride, t))
    assert all(len(before) > min(t - 1, LENGTH - stride) for t, before in enumerate(context, start=1))
    losses = e.losses(context)
    results = e.reported()
    assert results["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-9)

    rows = [e.data.dataset("validation")[row] for row in range(len(e.data.dataset("validation")))]
    assert sum(int((row["targets"] != -100).sum()) for row in rows) == len(e.tokens) - 1


def test_words_and_bytes_are_those_of_the_text(prose, prepared):
    e = Evaluation(prose, prepared)
    losses = e.losses([range((t - 1) // LENGTH * LENGTH, t) for t in range(1, len(e.tokens))])
    # the texts again: the split is a sequence of documents, each after an end-of-text token
    corpus = e.data.corpus
    text = corpus.tokenizer.decode(e.tokens.tolist(), skip_special_tokens=False)
    end = corpus.tokenizer.id_to_token(corpus.end_of_text_id)
    documents = [document for document in text.split(end) if document]
    originals = {json.loads(line)["text"] for line in prose.read_text(encoding="utf-8").splitlines()}
    assert set(documents) <= originals
    words = sum(len(document.split()) + 1 for document in documents)  # and a line end each
    size = sum(len(document.encode()) for document in documents)
    counts = corpus.manifest["splits"]["validation"]
    assert (words, size, len(documents)) == (counts["words"], counts["bytes"], counts["documents"])

    results = e.reported()
    assert results["val/word_ppl"] == pytest.approx(math.exp(losses.sum().item() / words), rel=1e-9)
    assert results["val/bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / size, rel=1e-9)


def test_with_document_mask_each_document_is_scored_alone(prose, prepared):
    e = Evaluation(prose, prepared, document_mask=True)
    starts = [t for t, token in enumerate(e.tokens.tolist()) if token == e.data.corpus.end_of_text_id]
    context = []
    for t in range(1, len(e.tokens)):
        document = max(start for start in starts if start < t)
        context.append(range(max(document, (t - 1) // LENGTH * LENGTH), t))
    assert e.reported()["val/loss"] == pytest.approx(e.losses(context).mean().item(), rel=1e-9)


def test_a_run_reports_the_perplexity_of_the_weights_it_saved(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    path = tiny_config(data={"document_mask": True, "eval_stride": 5, "eval_batch_size": 3})
    main(["fit", "--config", str(path)])
    run = tmp_path / "runs" / "tiny"
    ppl = {step: float(value) for step, value in logged(run, "val/ppl").items()}
    loss = {step: float(value) for step, value in logged(run, "val/loss").items()}
    assert list(ppl) == [4, 8]
    assert ppl == pytest.approx({step: math.exp(value) for step, value in loss.items()}, rel=1e-6)
    assert list(logged(run, "train/loss")) == list(range(1, 9))
    assert json.loads((run / "results.json").read_text())["metrics"]["val/ppl"] == pytest.approx(ppl[8], rel=1e-6)

    main(["validate", "--config", str(path), "--ckpt_path", "auto"])
    assert json.loads((run / "results.json").read_text())["metrics"]["val/ppl"] == pytest.approx(ppl[8], rel=1e-6)


def test_the_net_may_be_any_module_of_the_same_form():
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, tokens, documents=None):
            return self.table(tokens)

        def loss(self, hidden, targets):
            return F.cross_entropy(hidden.flatten(0, 1), targets.flatten(), reduction="sum")

    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModeling(Bigram(), max_steps=2), FixedRows(4, ragged=True))
    assert math.isfinite(trainer.callback_metrics["train/loss"])

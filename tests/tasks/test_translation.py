"""Translation: the loss against torch's, evaluation equal to one by hand, what is searched for, and refusals."""

from __future__ import annotations

import logging
import math
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mhe_lightning.attention import MHE
from mhe_lightning.data.tokenizer import end_of_text_id, train_tokenizer
from mhe_lightning.metrics import bleu, chrf, compound_split_bleu
from mhe_lightning.models import Decoder, EncoderDecoder, Hypothesis, beam_search
from mhe_lightning.tasks import Translation, translation

LENGTH = 24
PAIRS = [
    ("the dog sings under the old tree", "der Hund singt unter dem alten Baum"),
    ("a bird", "ein Vogel"),
    ("the light sleeps over the river", "das Licht schläft über dem Fluss"),
    ("stone", "Stein"),
    ("the cat runs often with the dog", "die Katze rennt oft mit dem Hund"),
    ("dark light", "dunkles Licht"),
]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for pair in PAIRS for text in pair] * 4, "bpe", 300)


@cache
def end() -> int:
    return end_of_text_id(tokenizer())


def make_net(seed=0, **settings) -> EncoderDecoder:
    """A net whose weights are of size one, so that its translations differ."""
    torch.manual_seed(seed)
    settings = {"width": 16, "n_heads": 2, "n_layers": 1, "max_length": LENGTH, "dropout": 0.0, **settings}
    net = EncoderDecoder(300, MHE, tie_embeddings=False, **settings).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return net


def make_task(net=None, cls=Translation, **options) -> Translation:
    options = {"max_steps": 4, "beam_size": 2, "extra_tokens": 3, **options}
    return cls(make_net() if net is None else net, tokenizer=tokenizer(), end_token=end(), **options)


def make_row(number: int, source: str, target: str | None, reference: str | None = "same") -> dict:
    """A pair; its reference is its target unless another is given."""
    ids = [] if target is None else [*tokenizer().encode(target).ids, end()]
    return {
        "row": number,
        "source": [*tokenizer().encode(source).ids, end()],
        "target": [] if number < 0 else ids,
        "reference": target if reference == "same" else reference,
        "empty": not source.strip(),
    }


def make_rows(pairs=PAIRS) -> list[dict]:
    return [make_row(number, *pair) for number, pair in enumerate(pairs)]


def collate(rows: list[dict]) -> dict:
    """A batch as the data make them, always with padding."""
    S, T = max(len(r["source"]) for r in rows), max(1, *(len(r["target"]) for r in rows))
    batch = {
        "tokens": torch.full((len(rows), S), end()),
        "padding": torch.zeros(len(rows), S, dtype=torch.bool),
        "target_tokens": torch.full((len(rows), T), end()),
        "targets": torch.full((len(rows), T), -100),
        "rows": torch.tensor([r["row"] for r in rows]),
        "references": [r["reference"] for r in rows],
        "empty": [r["empty"] for r in rows],
    }
    for i, r in enumerate(rows):
        source, target = torch.tensor(r["source"]), torch.tensor(r["target"], dtype=torch.long)
        batch["tokens"][i, : len(source)] = source
        batch["padding"][i, : len(source)] = True
        batch["targets"][i, : len(target)] = target
        batch["target_tokens"][i, 1 : len(target)] = target[:-1]
    return batch


class FixedBatches(LightningDataModule):
    """Batches of the given sizes, in the rows' order, in training and in every evaluation."""

    def __init__(self, rows: list[dict], sizes: list[int]) -> None:
        super().__init__()
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.batches = [collate(rows[start : start + n]) for start, n in zip(starts, sizes, strict=True)]

    def loader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def make_trainer(**options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def validate(task: Translation, rows: list[dict], sizes: list[int] | None = None) -> dict[str, float]:
    (scores,) = make_trainer().validate(task, FixedBatches(rows, sizes or [len(rows)]), verbose=False)
    return scores


@pytest.fixture
def searches(monkeypatch) -> list[dict]:
    """Of each beam search its arguments, with the number of sources as ``n``."""
    seen: list[dict] = []

    def recorded(net, tokens, padding, **options):
        seen.append({"n": len(tokens), "training": net.training, **options})
        return beam_search(net, tokens, padding, **options)

    monkeypatch.setattr(translation, "beam_search", recorded)
    return seen


def hypotheses_of(net: EncoderDecoder, rows: list[dict], **search) -> list[list[Hypothesis]]:
    """Of each row, alone and without padding."""
    search = {"beam_size": 2, "length_penalty": 0.6, "extra_tokens": 3, **search}
    tokens = {"start_token": end(), "end_token": end()}
    return [beam_search(net.double().eval(), torch.tensor([r["source"]]), **tokens, **search)[0] for r in rows]


def text_of(hypothesis: Hypothesis) -> str:
    return " ".join(tokenizer().decode(hypothesis.tokens).split())


def translated(rows: list[dict], net: EncoderDecoder | None = None, **search) -> list[str]:
    return [text_of(best[0]) for best in hypotheses_of(net or make_net(), rows, **search)]


def with_references(rows: list[dict]) -> list[dict]:
    """References that the translations of ``make_net()`` are partly right by."""
    texts = translated(rows)
    assert len(set(texts)) > len(texts) // 2  # they differ, so that their order matters
    return [
        {**r, "reference": text if i % 2 else f"{text[3:]} Ende"}
        for i, (r, text) in enumerate(zip(rows, texts, strict=True))
    ]


def sentence_losses(net: EncoderDecoder, rows: list[dict], label_smoothing: float = 0.0) -> Tensor:
    """Of every target token, row after row, each row alone."""
    losses = []
    for r in rows:
        target = torch.tensor(r["target"])
        read = torch.tensor([[end(), *r["target"][:-1]]])
        logits = net.logits(net(torch.tensor([r["source"]]), read))[0]
        losses.append(F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing))
    return torch.cat(losses)


# Training


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.3])
def test_the_loss_of_a_step_is_the_smoothed_cross_entropy_over_target_tokens(label_smoothing):
    rows = make_rows()
    trainer, task = make_trainer(max_steps=1, limit_val_batches=0), make_task(label_smoothing=label_smoothing)
    trainer.fit(task, FixedBatches(rows, [len(rows)]))
    expected = sentence_losses(make_net(), rows, label_smoothing).mean()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_smoothing_is_that_of_the_paper_unless_given():
    assert make_task().label_smoothing == 0.1


def test_tokens_seen_are_those_of_sources_and_targets_without_padding():
    rows = make_rows()
    trainer, task = make_trainer(max_steps=1, limit_val_batches=0), make_task()
    trainer.fit(task, FixedBatches(rows, [len(rows)]))
    assert task.tokens_seen == sum(len(r["source"]) + len(r["target"]) for r in rows)


def test_a_row_that_stands_for_none_is_not_seen():
    rows, nothing = make_rows(), make_row(-1, "the long source of another row", None)
    trainer, task = make_trainer(max_steps=1, limit_val_batches=0), make_task()
    trainer.fit(task, FixedBatches([*rows, nothing], [len(rows) + 1]))
    assert task.tokens_seen == sum(len(r["source"]) + len(r["target"]) for r in rows)


def test_unequal_micro_batches_give_the_step_of_one_batch():
    class Recorded(Translation):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            self.found = {name: p.grad.clone() for name, p in self.net.named_parameters()}

    results = []
    for sizes in ([6], [1, 3, 2]):
        task = make_task(cls=Recorded)
        trainer = make_trainer(max_steps=1, accumulate_grad_batches=len(sizes), limit_val_batches=0)
        trainer.fit(task, FixedBatches(make_rows(), sizes))
        results.append((trainer.callback_metrics["train/loss"].item(), task.tokens_seen.item(), task.found))
    (loss, seen, gradients), (other_loss, other_seen, other_gradients) = results
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert other_seen == seen
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_training_learns_translations():
    rows, steps = make_rows(), 120
    torch.manual_seed(0)
    net = EncoderDecoder(300, MHE, width=32, n_heads=4, n_layers=1, max_length=LENGTH, dropout=0.0)
    options = {"lr": 5e-3, "schedule": "linear", "warmup_steps": 10, "weight_decay": 0.0, "label_smoothing": 0.0}
    task = make_task(net, max_steps=steps, beam_size=4, extra_tokens=20, **options)
    make_trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0).fit(task, FixedBatches(rows, [len(rows)]))
    scores = validate(task, rows)
    assert scores["val/bleu"] == pytest.approx(100)
    assert scores["val/ppl"] < 1.1


# Evaluation


def test_the_loss_of_a_set_is_the_mean_over_its_tokens_without_smoothing():
    rows = make_rows()
    losses = sentence_losses(make_net(), rows)
    for sizes in ([6], [1, 2, 3]):
        task, found = make_task(label_smoothing=0.3), {}
        task.log_evaluation = lambda split, results, found=found: found.update(results)  # logged in float32
        validate(task, rows, sizes)
        assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-10)
        assert found["ppl"] == pytest.approx(losses.mean().exp().item(), rel=1e-10)


def test_scores_are_those_of_the_translations_of_each_source_alone():
    rows = with_references(make_rows())
    texts, references = translated(rows), [r["reference"] for r in rows]
    for sizes in ([6], [1, 2, 3]):
        scores = validate(make_task(), rows, sizes)
        assert scores["val/bleu"] == pytest.approx(bleu(texts, references).value)
        assert scores["val/chrf"] == pytest.approx(chrf(texts, references).value)
        assert scores["val/score"] == scores["val/bleu"]
    assert 0 < scores["val/chrf"] < 100
    assert set(scores) == {f"val/{name}" for name in ("loss", "ppl", "bleu", "chrf", "score")}


def test_a_test_set_is_scored_as_a_validation_set():
    rows = with_references(make_rows())
    (scores,) = make_trainer().test(make_task(), FixedBatches(rows, [4, 2]), verbose=False)
    assert scores == pytest.approx(
        {name.replace("val/", "test/"): x for name, x in validate(make_task(), rows).items()}
    )


def test_the_order_in_which_rows_come_does_not_matter():
    rows = with_references(make_rows())
    assert validate(make_task(), rows[::-1], [2, 4]) == pytest.approx(validate(make_task(), rows))


def test_rows_that_stand_for_none_are_left_out():
    rows = with_references(make_rows())
    more = [*rows[:3], make_row(-1, "a dog", None, "x"), *rows[3:], make_row(-1, "", None, None)]
    assert validate(make_task(), more, [4, 4]) == pytest.approx(validate(make_task(), rows))


def test_pairs_without_a_reference_are_left_out_of_all_scores():
    rows = with_references(make_rows())
    hidden = make_row(6, "the hidden river", None)
    assert hidden["reference"] is None
    assert validate(make_task(), [hidden, *rows]) == pytest.approx(validate(make_task(), rows))


def test_a_set_without_references_has_no_scores():
    rows = [make_row(number, source, None) for number, (source, _) in enumerate(PAIRS)]
    task = make_task()
    assert validate(task, rows, [4, 2]) == {"val/hidden_labels": 6.0}
    assert task.signatures == {}


def test_one_evaluation_leaves_nothing_to_the_next():
    rows, task = with_references(make_rows()), make_task()
    validate(task, rows)
    assert validate(task, rows[:2]) == pytest.approx(validate(make_task(), rows[:2]))


def test_an_empty_source_has_an_empty_translation_and_is_not_searched(searches):
    rows = [make_row(0, "", "nichts"), *make_rows()[1:3], make_row(3, "  ", "nichts")]
    task = make_task()
    batch = collate(rows)
    task.net.eval()
    found = task.predict_step(batch, 0)
    assert [r["row"] for r in found] == [0, 1, 2, 3]
    assert [r["hypothesis"] for r in found] == ["", *translated(rows[1:3]), ""]
    assert found[0]["score"] == 0.0
    assert [search["n"] for search in searches] == [2]

    searches.clear()
    assert [r["hypothesis"] for r in task.predict_step(collate([rows[0], rows[3]]), 0)] == ["", ""]
    assert searches == []


def test_an_empty_translation_of_an_empty_source_counts_in_the_scores():
    rows = [make_row(0, "", "nichts"), *with_references(make_rows())[1:]]
    texts = ["", *translated(rows[1:])]
    scores = validate(make_task(), rows)
    assert scores["val/bleu"] == pytest.approx(bleu(texts, [r["reference"] for r in rows]).value)


def test_translations_are_searched_for_as_asked(searches):
    task = make_task(beam_size=3, length_penalty=1.5, extra_tokens=2, n_best=2)
    rows = make_rows()[:2]
    validate(task, rows)
    make_trainer().predict(task, FixedBatches(rows, [2]))
    common = {"n": 2, "training": False, "start_token": end(), "end_token": end(), "beam_size": 3}
    common |= {"length_penalty": 1.5, "extra_tokens": 2}
    assert searches == [{**common, "n_best": 1}, {**common, "n_best": 2}]


@pytest.mark.parametrize(("options", "beam_size"), [({}, 1), ({"fit_beam_size": 2}, 2)], ids=str)
def test_validations_during_fit_have_a_beam_of_their_own(searches, options, beam_size):
    rows = make_rows()
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_task(beam_size=3, **options), FixedBatches(rows, [6]))
    assert [search["beam_size"] for search in searches] == [beam_size]
    assert not searches[0]["training"]
    assert {"val/loss", "val/bleu", "val/score"} <= trainer.callback_metrics.keys()
    validate(make_task(beam_size=3, **options), rows)
    assert searches[-1]["beam_size"] == 3


def test_without_translations_during_fit_there_is_only_the_loss(searches):
    rows = make_rows()
    trainer, task = make_trainer(max_steps=2), make_task(fit_beam_size=0)
    trainer.fit(task, FixedBatches(rows, [4, 2]))
    assert searches == []
    assert {name for name in trainer.callback_metrics if name.startswith("val/")} == {"val/loss", "val/ppl"}
    assert task.signatures == {}
    assert "val/bleu" in validate(task, rows)


# What scores mean


def test_signatures_are_recorded_and_printed(caplog):
    rows = with_references(make_rows())
    texts, references = translated(rows), [r["reference"] for r in rows]
    task = make_task()
    with caplog.at_level(logging.INFO):
        validate(task, rows)
    expected = {"bleu": bleu(texts, references).signature, "chrf": chrf(texts, references).signature}
    assert task.signatures == expected
    for signature in expected.values():
        assert signature in caplog.text


def test_signatures_are_not_printed_at_every_validation_of_fit(caplog):
    task = make_task()
    with caplog.at_level(logging.INFO):
        make_trainer(max_steps=1).fit(task, FixedBatches(make_rows(), [6]))
    assert task.signatures
    assert not any(signature in caplog.text for signature in task.signatures.values())


def test_hidden_references_are_said(caplog):
    with caplog.at_level(logging.INFO):
        validate(make_task(), [make_row(0, "a bird", None)])
    assert "val: the translations of all sentences are hidden" in caplog.text


def test_compound_split_adds_the_bleu_of_older_papers():
    rows = with_references(make_rows())
    rows[1]["reference"] = "ein schwarz-weißer Vogel"
    texts, references = translated(rows), [r["reference"] for r in rows]
    task = make_task(compound_split="de")
    expected = compound_split_bleu(texts, references, "de")
    scores = validate(task, rows)
    assert scores.pop("val/compound_split_bleu") == pytest.approx(expected.value)
    assert task.signatures["compound_split_bleu"] == expected.signature
    assert scores == pytest.approx(validate(make_task(), rows))


# Predictions


def test_the_best_translations_come_in_the_order_of_their_scores():
    rows = make_rows()
    task = make_task(beam_size=4, n_best=3)
    found = [r for part in make_trainer().predict(task, FixedBatches(rows, [4, 2])) for r in part]
    assert [r["row"] for r in found] == list(range(6))
    for r, best in zip(found, hypotheses_of(make_net(), rows, beam_size=4, n_best=3), strict=True):
        assert [b["score"] for b in r["n_best"]] == sorted((b["score"] for b in r["n_best"]), reverse=True)
        assert (r["hypothesis"], r["score"]) == (r["n_best"][0]["text"], r["n_best"][0]["score"])
        assert [b["text"] for b in r["n_best"]] == [text_of(h) for h in best]
        assert [b["score"] for b in r["n_best"]] == pytest.approx([h.score for h in best], rel=1e-10)
        assert [b["log_probability"] for b in r["n_best"]] == pytest.approx([h.log_probability for h in best])
    assert len({len(r["n_best"]) for r in found}) == 1
    assert len(found[0]["n_best"]) == 3


def test_a_row_has_one_translation_unless_more_are_asked_for():
    ((first, *_),) = make_trainer().predict(make_task(), FixedBatches(make_rows(), [6]))
    assert first.keys() == {"row", "hypothesis", "score"}


def test_a_translation_is_one_line(monkeypatch):
    # byte-level tokens can decode to any text
    tokens = tokenizer().encode(" ein\nVogel\r\n\u2028 singt\x85 im\tBaum \n").ids

    def found(net, sources, padding, **options):
        return [[Hypothesis(tokens, -1.0, -0.5)] for _ in sources]

    monkeypatch.setattr(translation, "beam_search", found)
    ((row,),) = make_trainer().predict(make_task(), FixedBatches(make_rows()[:1], [1]))
    assert row["hypothesis"] == "ein Vogel singt im Baum"
    assert row["hypothesis"].splitlines() == [row["hypothesis"]]


def test_bytes_that_are_no_text_are_still_a_translation(monkeypatch):
    vocabulary = tokenizer().get_vocab()
    half = vocabulary["Ã"]  # the first byte of a character of two
    monkeypatch.setattr(translation, "beam_search", lambda net, sources, *_, **__: [[Hypothesis([half], -1.0, -0.5)]])
    scores = validate(make_task(), make_rows()[:1])
    assert scores["val/bleu"] == 0


# Refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing \(1.0\) must be in \[0, 1\); 0 switches it off"),
        ({"label_smoothing": -0.1}, r"label_smoothing \(-0.1\)"),
        ({"label_smoothing": math.nan}, r"label_smoothing \(nan\)"),
        ({"beam_size": 0}, r"beam_size \(0\) must be at least 1; 1 is greedy"),
        ({"fit_beam_size": -1}, r"fit_beam_size \(-1\) must be at least 0, which translates nothing during fit"),
        ({"n_best": 0}, r"n_best \(0\) must be from 1 to beam_size \(2\)"),
        ({"n_best": 3}, r"n_best \(3\) must be from 1 to beam_size \(2\)"),
        ({"length_penalty": -1.0}, r"length_penalty \(-1.0\) must be a number from 0"),
        ({"extra_tokens": -1}, r"extra_tokens \(-1\) must not be negative"),
        ({"compound_split": "german"}, r"language \('german'\) must be a code of two lower-case letters"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        make_task(**options)


@pytest.mark.parametrize("missing", ["tokenizer", "end_token"])
def test_data_that_are_no_pairs_are_refused(missing):
    arguments = {"tokenizer": tokenizer(), "end_token": end(), missing: None}
    with pytest.raises(ValueError, match="needs pairs of sentences, such as TranslationData"):
        Translation(make_net(), max_steps=1, **arguments)


def test_an_end_token_of_number_0_is_one():
    assert Translation(make_net(), max_steps=1, tokenizer=tokenizer(), end_token=0).end_token == 0


@pytest.mark.parametrize("net", [Decoder(300, MHE, width=8, n_heads=2, n_layers=1), nn.Linear(2, 2)], ids=["d", "l"])
def test_a_net_without_encoder_and_decoder_is_refused(net):
    with pytest.raises(ValueError, match=f"{type(net).__name__} has no encoder and decoder.*EncoderDecoder"):
        make_task(net)


@pytest.mark.parametrize(
    ("library", "options"), [("sacrebleu", {}), ("sacremoses", {"compound_split": "de"})], ids=["bleu", "compounds"]
)
def test_a_missing_library_is_named_before_training(monkeypatch, library, options):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"{library} must be installed.*pip install 'mhe-lightning\[translation\]'"):
        make_task(**options)


def test_a_library_that_is_not_used_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    make_task()

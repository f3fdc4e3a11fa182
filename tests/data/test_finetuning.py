"""Labelled rows of a Hub data set: tokenised once, checked, and batched by length."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhe_lightning.data import GlueData, SuperGlueData
from mhe_lightning.data.finetuning import FinetuningData
from mhe_lightning.data.sampler import PADDING_ROW
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.tokenizer import tokenizer_hash, train_tokenizer, vocabulary_size

WORDS = "fox dog river stone light tree bird cat".split()  # noqa: SIM905


def module(path: Path, cache: Path, task: str = "mrpc", **options: Any) -> GlueData:
    settings = {"batch_size": 4, "seed": 1, "tokenizer": "wordpiece", "tokenizer_size": 200, "max_length": 32}
    return GlueData(task, path=str(path), cache_dir=str(cache), **{**settings, **options})


def mrpc_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence1": " ".join(WORDS[: 1 + i % 8]),
            "sentence2": " ".join(WORDS[::-1][: 1 + i % 5]),
            "label": i % 2,
            "idx": i,
        }
        for i in range(count)
    ]


@pytest.fixture
def mrpc(tmp_path: Path) -> Callable[..., Path]:
    """Writes MRPC's rows, by split; of those not given, the usual ones."""
    from hub_fixtures import write_readme, write_task

    def write(**splits: list[dict[str, Any]]) -> Path:
        rows = {"train": mrpc_rows(30), "validation": mrpc_rows(7), "test": mrpc_rows(5), **splits}
        rows = {split: some for split, some in rows.items() if some}
        write_task(tmp_path / "hub", "mrpc", rows)
        write_readme(tmp_path / "hub", {"mrpc": list(rows)})
        return tmp_path / "hub"

    return write


def changed(rows: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if i == number else row for i, row in enumerate(rows)]


# --- preparation


def test_what_is_prepared_is_used_again_and_not_tokenised_anew(mrpc, tmp_path, monkeypatch):
    path = mrpc()
    first = module(path, tmp_path / "cache")
    assert not first.prepared
    first.prepare()

    def refuse(*args: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(FinetuningData, "_build", refuse)
    monkeypatch.setattr(SequenceFormat, "encode", refuse)
    second = module(path, tmp_path / "cache")
    assert second.prepared
    second.prepare()
    assert second.folder == first.folder
    batch = next(iter(second.val_dataloader()))
    assert batch["tokens"].shape[0] == 4


@pytest.mark.parametrize(
    "options", [{"max_length": 16}, {"tokenizer": "bpe", "tokenizer_size": 300}, {"splits": {"test": "validation"}}]
)
def test_other_options_are_prepared_beside_each_other(options, mrpc, tmp_path):
    path = mrpc()
    assert module(path, tmp_path, **options).folder != module(path, tmp_path).folder


def test_changed_rows_are_prepared_anew(mrpc, tmp_path):
    before = module(mrpc(), tmp_path).folder
    assert module(mrpc(train=mrpc_rows(20)), tmp_path).folder != before


@pytest.mark.parametrize("file", ["train.arrow", "tokenizer.json", "manifest.json"])
def test_a_damaged_file_is_named_and_built_anew(file, mrpc, tmp_path, capsys):
    path = mrpc()
    data = module(path, tmp_path)
    data.prepare()
    good = (data.folder / "train.arrow").read_bytes()
    (data.folder / file).write_bytes((data.folder / file).read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"run prepare again"):
        _ = module(path, tmp_path).vocab_size
    again = module(path, tmp_path)
    again.prepare()
    assert "building glue-mrpc-" in capsys.readouterr().err
    assert (again.folder / "train.arrow").read_bytes() == good
    assert again.vocab_size > 5


def test_data_that_are_not_prepared_say_how_to_prepare_them(mrpc, tmp_path):
    with pytest.raises(ValueError, match=r"glue-mrpc is not prepared in .*; run `python train\.py prepare`"):
        _ = module(mrpc(), tmp_path / "cache").vocab_size


def test_the_record_counts_rows_tokens_and_texts_that_were_cut(mrpc, tmp_path):
    data = module(mrpc(), tmp_path, max_length=8)
    data.prepare()
    table = data.table("train").to_pylist()
    whole = module(data.path, tmp_path)
    whole.prepare()
    longer = sum(length > 8 for length in whole.table("train")["length"].to_pylist())
    counts = data.describe()["splits"]["train"]
    assert counts["truncated"] == longer > 0
    assert counts["tokens"] == sum(len(row["sequences"][0]) for row in table)
    assert counts["rows"] == counts["examples"] == 30
    assert whole.describe()["splits"]["train"]["truncated"] == 0


def test_a_source_split_that_is_evaluated_twice_is_tokenised_once(mrpc, tmp_path):
    data = module(mrpc(), tmp_path / "cache", splits={"test": "validation"})
    data.prepare()
    assert sorted(file.name for file in data.folder.glob("*.arrow")) == ["train.arrow", "validation.arrow"]
    assert data.table("test").equals(data.table("validation"))


def test_a_part_of_the_training_split_must_not_be_missing(mrpc, tmp_path):
    data = module(mrpc(), tmp_path / "cache", splits={"train": "train+trian"})
    with pytest.raises(ValueError, match=r"no split 'trian'; set data\.splits\.train to some of train, validation"):
        data.prepare()


# --- what is wrong is named


def test_a_missing_column_is_named_with_those_there_are(mrpc, tmp_path):
    rows = [{"sentence1": "a fox", "label": 0, "idx": 0}]
    with pytest.raises(ValueError, match=r"has no column 'sentence2'; its columns are sentence1, label, idx"):
        module(mrpc(train=rows, validation=rows, test=rows), tmp_path / "cache").prepare()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_split_is_named_with_those_there_are_when_it_is_needed(split, mrpc, tmp_path):
    there = ", ".join(name for name in ("train", "validation", "test") if name != split)
    data = module(mrpc(**{split: []}), tmp_path / "cache", tokenizer=saved_tokenizer(tmp_path))
    data.prepare()
    with pytest.raises(ValueError, match=rf"has no {split} split here; set data\.splits\.{split} to one of {there}"):
        data.dataset(split)


def test_a_set_without_a_training_split_can_be_evaluated_but_trains_no_tokenizer(mrpc, tmp_path):
    path = mrpc(train=[], test=[])
    data = module(path, tmp_path / "cache", tokenizer=saved_tokenizer(tmp_path))
    data.prepare()
    assert len(data.dataset("validation")) > 0
    with pytest.raises(ValueError, match=r"no training split here to train a tokenizer \(wordpiece\) on; set data\."):
        module(path, tmp_path / "cache", tokenizer="wordpiece").prepare()


def test_a_file_without_rows_is_refused(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, text in (("train", ""), ("validation", '{"sentence": "a fox", "label": 0, "idx": 0}')):
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot open the data set .*: one of its files has no rows"):
        module(folder, tmp_path / "cache", task="sst2", subset="default").prepare()


def test_a_set_with_none_of_the_splits_is_refused(mrpc, tmp_path):
    splits = {"train": "a", "validation": "b", "test": "c"}
    data = module(mrpc(), tmp_path / "cache", tokenizer=saved_tokenizer(tmp_path), splits=splits)
    with pytest.raises(ValueError, match=r"none of the splits a, b, c; set data\.splits to some of train, validation"):
        data.prepare()


def test_without_a_test_split_training_goes_on_and_testing_says_what_to_set(mrpc, tmp_path):
    data = module(mrpc(test=[]), tmp_path / "cache")
    data.prepare()
    assert len(data.dataset("train")) == 30
    with pytest.raises(ValueError, match=r"has no test split here; set data\.splits\.test to one of train, validation"):
        data.test_dataloader()


def test_a_part_of_a_joined_split_may_be_missing(glue, tmp_path, capsys):
    joined = {"validation": "validation_matched+validation_elsewhere"}
    data = module(glue, tmp_path, task="mnli", splits=joined)
    data.prepare()
    assert "no split validation_elsewhere here; left out" in capsys.readouterr().err
    assert set(data.table("validation")["part"].to_pylist()) == {"matched"}


def test_an_unknown_key_of_the_splits_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"splits names valid; its keys must be among train, validation, test"):
        module(tmp_path, tmp_path, splits={"valid": "validation"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": -1}, r"row 3: label \(-1\) must be one of 0 to 1 \(0, 1\); only validation and test rows may have"),
        ({"label": 2}, r"row 3: label \(2\) must be one of 0 to 1 \(0, 1\); correct or remove the row"),
        ({"label": None}, r"row 3: label \(None\) must be one of 0 to 1"),
        ({"sentence2": None}, r"row 3: sentence2 is None, not a text; correct or remove the row"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(values, message, mrpc, tmp_path):
    path = mrpc(train=changed(mrpc_rows(30), 3, **values))
    with pytest.raises(ValueError, match=rf"glue-mrpc, split train, {message}"):
        module(path, tmp_path / "cache").prepare()


def test_evaluation_rows_may_have_hidden_labels_but_no_wrong_ones(mrpc, tmp_path):
    data = module(mrpc(validation=changed(mrpc_rows(7), 2, label=-1)), tmp_path / "cache")
    data.prepare()
    assert data.table("validation")["label"].to_pylist() == [0, 1, None, 1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"split validation, row 2: label \(5\) must be one of 0 to 1"):
        module(mrpc(validation=changed(mrpc_rows(7), 2, label=5)), tmp_path / "cache").prepare()


def test_a_value_out_of_its_range_is_named(glue, tmp_path):
    with pytest.raises(ValueError, match=r"label \(5\.5\) must be between 0\.0 and 5\.0; correct or remove"):
        module(glue, tmp_path, task="stsb")._label_of({"label": 5.5}, "row 0", "train")


def test_an_unknown_task_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"task \('squad'\) must be one of cola, sst2, mrpc"):
        module(tmp_path, tmp_path, task="squad")


def test_a_subset_that_is_not_there_is_refused_with_those_there_are(mrpc, tmp_path):
    with pytest.raises(ValueError, match=r"has no subset 'rte'; it has mrpc"):
        module(mrpc(), tmp_path / "cache", task="rte").prepare()


def test_sequences_longer_than_the_model_are_refused_before_a_run_is_set_aside(tiny_classifier, command, tmp_path):
    path = str(tiny_classifier("glue", "rte"))
    assert command("fit", "--config", path)[0] == 0
    code, _, err = command("fit", "--config", path, "--data.max_length", "64")
    assert code == 2
    assert "data.max_length (64) is more than the model's positions, model.net.max_length (48)" in err
    assert not (tmp_path / "runs/rte.1").exists()


# --- the tokenizer


def saved_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    train_tokenizer([" ".join(WORDS)] * 3, "bpe", 290).save(str(path))
    return str(path)


@pytest.mark.parametrize(("kind", "special"), [("wordpiece", "[CLS]"), ("bpe", "<|endoftext|>")])
def test_a_kind_of_tokenizer_is_trained_on_the_training_texts(kind, special, mrpc, tmp_path):
    rows = [{**row, "sentence1": "zebra zebra"} for row in mrpc_rows(7)]
    data = module(mrpc(validation=rows), tmp_path / "cache", tokenizer=kind, tokenizer_size=320)
    data.prepare()
    vocabulary = data.tokenizer.get_vocab()
    assert special in vocabulary
    assert {"river", "Ġriver"} & set(vocabulary)
    assert not {"zebra", "Ġzebra"} & set(vocabulary)
    assert data.vocab_size == vocabulary_size(data.tokenizer) <= 320


def test_a_tokenizer_may_be_given_as_a_file(mrpc, tmp_path):
    spec = saved_tokenizer(tmp_path)
    data = module(mrpc(), tmp_path / "cache", tokenizer=spec)
    data.prepare()
    assert data.describe()["tokenizer_sha256"] == tokenizer_hash(data.tokenizer)
    assert data.tokenizer.token_to_id("[CLS]") is None


def test_no_tokenizer_is_refused_with_where_to_get_one(mrpc, tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set; give the path .*--init_from"):
        module(mrpc(), tmp_path / "cache", tokenizer=None).prepare()


def test_a_tokenizer_cannot_be_trained_without_training_rows(glue, tmp_path):
    with pytest.raises(ValueError, match=r"glue-ax has no training split here to train a tokenizer \(wordpiece\)"):
        module(glue, tmp_path, task="ax").prepare()


def test_data_without_training_rows_can_be_prepared_and_described(glue, tmp_path):
    data = module(glue, tmp_path, task="ax", tokenizer=saved_tokenizer(tmp_path))
    data.prepare()
    assert list(data.describe()["splits"]) == ["test"]
    with pytest.raises(ValueError, match=r"glue-ax has no train split here"):
        data.dataset("train")


# --- batches


@pytest.fixture
def data(mrpc, tmp_path) -> GlueData:
    data = module(mrpc(), tmp_path / "cache")
    data.prepare()
    return data


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def test_a_batch_is_its_rows_filled_up_on_the_right(data):
    table = data.table("train")
    for batch in islice(data.train_dataloader(), 8):
        for i, row in enumerate(batch["rows"].tolist()):
            (tokens,), (boundary,) = table["sequences"][row].as_py(), table["boundaries"][row].as_py()
            width = batch["tokens"].shape[1]
            real = batch["padding"][i].tolist() if "padding" in batch else [True] * width
            assert real == [True] * len(tokens) + [False] * (width - len(tokens))
            assert batch["tokens"][i, : len(tokens)].tolist() == tokens
            assert batch["segments"][i].nonzero().flatten().tolist() == list(range(boundary, len(tokens)))
            assert batch["labels"][i] == row % 2


def test_training_batches_hold_rows_of_similar_length(data, tmp_path):
    def padding(module: GlueData) -> int:
        batches = islice(module.train_dataloader(), 28)
        return sum((~batch["padding"]).sum().item() for batch in batches if "padding" in batch)

    as_they_come = module(data.path, tmp_path / "cache", group_by_length=False)
    as_they_come.prepare()
    assert padding(data) < padding(as_they_come) / 2


def test_evaluation_begins_with_the_longest_rows_and_has_each_once(data):
    batches = list(data.val_dataloader())
    lengths = [data.table("validation")["length"][row].as_py() for batch in batches for row in batch["rows"].tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(row for batch in batches for row in batch["rows"].tolist()) == list(range(7))


def test_the_padding_row_has_the_parts_of_a_row(data):
    dataset = data.dataset("validation")
    padding, row = dataset[PADDING_ROW], dataset[0]
    assert padding["rows"] == PADDING_ROW
    assert {**padding, "rows": 0} == row
    assert data.collate([padding, row])["rows"].tolist() == [PADDING_ROW, 0]


def test_what_workers_need_can_be_pickled_whatever_the_trainer_holds(data):
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, hook=lambda: None)  # as spawned workers get it
    loader = data.train_dataloader()
    rows = [loader.dataset[row] for row in (0, 1)]
    collate = pickle.loads(pickle.dumps(loader.collate_fn))
    assert torch.equal(collate(rows)["tokens"], data.collate(rows)["tokens"])
    assert data.trainer is not None


def test_workers_change_no_batch(data, tmp_path):
    other = module(data.path, tmp_path / "cache", num_workers=2)
    for split in ("train", "val"):
        one, two = (islice(getattr(d, f"{split}_dataloader")(), 2) for d in (data, other))
        assert all(equal(a, b) for a, b in zip(one, two, strict=True))


def test_training_goes_on_where_the_state_left_off(data, tmp_path):
    whole = list(islice(data.train_dataloader(), 20))
    first, second = (module(data.path, tmp_path / "cache") for _ in range(2))
    for batch in islice(first.train_dataloader(), 9):
        first.mark_trained(batch["rows"])
    second.load_state_dict(first.state_dict())
    assert all(equal(a, b) for a, b in zip(islice(second.train_dataloader(), 11), whole[9:], strict=True))


def test_a_resume_on_other_rows_is_refused(data, mrpc, tmp_path):
    other = module(mrpc(train=mrpc_rows(20)), tmp_path / "cache")
    other.prepare()
    with pytest.raises(ValueError, match=rf"trained on data {data.fingerprint()}, but these are {other.fingerprint()}"):
        other.load_state_dict(data.state_dict())


def test_a_resume_without_grouping_is_refused(data, tmp_path):
    other = module(data.path, tmp_path / "cache", group_by_length=False)
    with pytest.raises(ValueError, match=r"rows are grouped by length, the config's are not; resume as they were"):
        other.load_state_dict(data.state_dict())


def test_candidates_of_a_choice_are_sequences_of_their_own(super_glue, tmp_path):
    data = SuperGlueData("record", 4, 1, tokenizer="wordpiece", path=str(super_glue), cache_dir=str(tmp_path))
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    counts = [len(info["choices"]) for info in batch["info"]]
    assert batch["tokens"].shape[0] == sum(counts) == len(batch["right"])
    candidates = [own[own >= 0] for own in batch["candidates"]]
    assert torch.cat(candidates).tolist() == list(range(sum(counts)))
    assert [len(own) for own in candidates] == counts
    for own, info in zip(candidates, batch["info"], strict=True):
        right = batch["right"][own].tolist()
        assert right == [choice in info["answers"] for choice in info["choices"]]

"""Pairs of sentences: tokenised once, filtered for training alone, and batched by their tokens."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from mhe_lightning.data import TranslationData, verify_certificate
from mhe_lightning.data.examples import ExampleData
from mhe_lightning.data.language_modeling import IGNORE
from mhe_lightning.data.sampler import PADDING_ROW
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.tokenizer import tokenizer_hash, train_tokenizer

EPOCH = 7
"""Batches of an epoch of the corpus in miniature."""
Batch = dict[str, Any]


def module(path: Path, cache: Path, source: str = "en", target: str = "de", **options: Any) -> TranslationData:
    settings = {"batch_tokens": 128, "seed": 1, "tokenizer_size": 300, "max_length": 40, "eval_batch_size": 3}
    return TranslationData(str(path), source, target, cache_dir=str(cache), **{**settings, **options})


def ready(path: Path, cache: Path, *languages: str, **options: Any) -> TranslationData:
    """A module whose data are prepared."""
    data = module(path, cache, *languages, **options)
    data.prepare()
    return data


@pytest.fixture
def data(parallel, prepared) -> TranslationData:
    return ready(parallel, prepared)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes a corpus of the given pairs (en, de), by split; those not given have five usual pairs."""

    def write(**splits: list[tuple[Any, Any]]) -> Path:
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        usual = [(f"the cat {'ran ' * i}", f"da tak {'lop ' * i}") for i in range(5)]
        for split in ("train", "validation", "test"):
            rows = [{"translation": {"en": en, "de": de}} for en, de in splits.get(split, usual)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return folder

    return write


PAIRED = [{"en": f"the cat {'ran ' * i}", "de": f"da tak {'lop ' * i}"} for i in range(5)]


def as_rank(data: TranslationData, rank: int, world_size: int) -> TranslationData:
    """The module as one of several ranks has it, during fit."""
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )
    return data


def train(data: TranslationData, count: int) -> list[Batch]:
    """Train some batches."""
    batches = list(islice(data.train_dataloader(), count))
    for batch in batches:
        data.mark_trained(batch["rows"])
    return batches


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one: Batch, other: Batch) -> bool:
    return set(one) == set(other) and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch["rows"].tolist()]


def raw(data: TranslationData, split: str, number: int) -> dict[str, str]:
    """A pair as the data set has it, from its row's number in the split."""
    tables = data.source.tables(split, ["translation"])
    return [row["translation"] for table in tables for row in table.to_pylist()][number]


def cat(tokens: list[int], data: TranslationData) -> str:
    """The text of tokens that end with the end token."""
    assert tokens[-1] == data.end_token
    return data.tokenizer.decode(tokens[:-1])


# --- what a batch holds


@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("de", "en")])
def test_a_batch_is_the_sources_and_the_shifted_targets(source, target, parallel, prepared):
    data = ready(parallel, prepared, source, target)
    end = data.end_token
    dataset = data.dataset("test")
    pairs = [raw(data, "test", row) for row in (1, 4)]
    sources, targets = ([data.tokenizer.encode(pair[language]).ids for pair in pairs] for language in (source, target))
    gaps = [max(map(len, some)) - len(some[0]) for some in (sources, targets)]
    assert min(gaps) > 0  # the first pair is the shorter on both sides

    expected = {
        "tokens": [[*sources[0], end, *[0] * gaps[0]], [*sources[1], end]],
        "padding": [[True] * (len(sources[0]) + 1) + [False] * gaps[0], [True] * (len(sources[1]) + 1)],
        "targets": [[*targets[0], end, *[IGNORE] * gaps[1]], [*targets[1], end]],
        "rows": [1, 4],
        "references": [pair[target] for pair in pairs],
        "empty": [False, False],
    }
    batch = data.collate([dataset[1], dataset[4]])
    assert set(batch) == {*expected, "target_tokens"}
    for name, values in expected.items():
        got = batch[name]
        assert (got.tolist() if isinstance(got, torch.Tensor) else got) == values, name
    for row, wanted in zip(batch["target_tokens"].tolist(), targets, strict=True):
        assert row[: len(wanted) + 1] == [end, *wanted]
    assert batch["target_tokens"].shape == batch["targets"].shape
    assert {batch[name].dtype for name in ("tokens", "target_tokens", "targets", "rows")} == {torch.int64}
    assert batch["padding"].dtype == torch.bool


def test_sources_of_one_length_have_no_padding(data):
    row = data.dataset("test")[3]
    batch = data.collate([row, row])
    assert "padding" not in batch
    assert batch["tokens"].tolist() == [row["source"]] * 2


def test_languages_may_have_columns_of_their_own(data, tmp_path):
    from hub_fixtures import write_translation

    flat = ready(write_translation(tmp_path / "flat", flat=True), tmp_path / "cache")
    for split in ("train", "validation", "test"):
        assert flat.table(split).equals(data.table(split))


def test_training_batches_hold_at_most_so_many_tokens_on_either_side(parallel, prepared):
    data = ready(parallel, prepared, batch_tokens=60)
    epoch = train(data, data.order().epoch_length)
    assert sorted(rows_of(epoch)) == list(range(60))
    for batch in epoch:
        assert batch["tokens"].numel() <= 60
        assert batch["targets"].numel() <= 60


def test_evaluation_begins_with_the_longest_pairs_and_has_each_once(data):
    batches = list(data.val_dataloader())
    assert [len(batch["rows"]) for batch in batches] == [3, 3, 1]
    lengths = [data.table("validation")["length"][row].as_py() for row in rows_of(batches)]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(rows_of(batches)) == list(range(7))


def test_workers_and_pickling_change_no_batch(data, parallel, prepared):
    other = ready(parallel, prepared, num_workers=2)
    for split in ("train", "val", "predict"):
        one, two = (islice(getattr(d, f"{split}_dataloader")(), 2) for d in (data, other))
        assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    loader = data.train_dataloader()
    collate = pickle.loads(pickle.dumps(loader.collate_fn))
    rows = [loader.dataset[row] for row in (0, 9)]
    assert equal(collate(rows), data.collate(rows))


# --- which pairs are trained on


def test_pairs_not_to_train_on_are_left_out_counted_and_printed(parallel, tmp_path, capsys):
    data = ready(parallel, tmp_path)
    counts = data.manifest["splits"]["train"]
    assert counts["dropped"] == {
        "without source or target": 2,
        "longer than 40 tokens": 1,
        "one side more than 3 times as long as the other": 1,
    }
    assert (counts["rows"], counts["examples"], counts["truncated"]) == (64, 60, 0)
    assert capsys.readouterr().out == (
        "prepare: train: 60 of 64 rows kept; 1 longer than 40 tokens, "
        "1 one side more than 3 times as long as the other, 2 without source or target\n"
    )
    kept = data.table("train")["reference"].to_pylist()
    assert kept == [raw(data, "train", i)["de"] for i in range(64) if i not in (10, 20, 30, 40)]


def test_without_a_ratio_pairs_of_any_are_kept(parallel, prepared):
    data = ready(parallel, prepared, max_ratio=None)
    assert data.manifest["splits"]["train"]["examples"] == 61
    assert raw(data, "train", 40)["de"] in data.table("train")["reference"].to_pylist()


@pytest.mark.parametrize(("max_ratio", "kept"), [(2.0, True), (1.9, False)])
def test_the_ratio_is_that_of_tokens_in_either_direction(max_ratio, kept, corpus, tmp_path):
    # one byte is one token here: 2 and 4 tokens with the end token
    path = corpus(train=[("a", "b"), ("q", "xyz")])
    for languages in (("en", "de"), ("de", "en")):
        data = ready(path, tmp_path / "cache", *languages, tokenizer_size=257, max_ratio=max_ratio)
        assert data.manifest["splits"]["train"]["examples"] == 1 + kept


@pytest.mark.parametrize(("max_length", "kept"), [(10, True), (9, False)])
def test_the_longest_side_may_have_max_length_tokens_with_its_end(max_length, kept, corpus, tmp_path):
    path = corpus(train=[("abcde", "abcde"), ("123456789", "uvwxy")])
    for languages in (("en", "de"), ("de", "en")):
        data = ready(path, tmp_path / "cache", *languages, tokenizer_size=257, max_length=max_length)
        assert data.manifest["splits"]["train"]["examples"] == 1 + kept


def test_evaluation_keeps_every_pair_and_cuts_and_counts_what_is_too_long(parallel, tmp_path):
    data = ready(parallel, tmp_path, max_length=8)
    whole = ready(parallel, tmp_path)
    for split, n_rows in (("validation", 7), ("test", 5)):
        rows, uncut = data.table(split).to_pylist(), whole.table(split).to_pylist()
        assert len(rows) == n_rows
        for row, before in zip(rows, uncut, strict=True):
            for side in ("source", "target"):
                long = len(before[side]) > 8
                cut = [*before[side][:7], data.end_token] if side == "source" else before[side][:8]
                assert row[side] == (cut if long else before[side])
            assert row["truncated"] == (before["length"] > 8)
            assert row["reference"] == before["reference"]
            assert row["length"] == max(len(row["source"]), len(row["target"]))
        counts = data.manifest["splits"][split]
        assert counts["truncated"] == sum(row["length"] > 8 for row in uncut) > 0
        assert (counts["rows"], counts["examples"]) == (n_rows, n_rows)
        assert "dropped" not in counts
    assert whole.manifest["splits"]["validation"]["truncated"] == 0


def test_a_training_pair_without_a_text_is_dropped(corpus, tmp_path):
    data = ready(corpus(train=[("a cat", None), ("a cat", "o tak"), (None, "o tak"), (" \n", "o")]), tmp_path / "cache")
    assert data.manifest["splits"]["train"]["dropped"] == {"without source or target": 3}
    assert len(data.dataset("train")) == 1


def test_a_hidden_target_is_to_be_predicted_and_has_none(tmp_path):
    from hub_fixtures import write_translation

    data = ready(write_translation(tmp_path / "hidden", hidden=True), tmp_path / "cache")
    batches = list(data.predict_dataloader())
    assert sorted(rows_of(batches)) == list(range(5))
    for batch in batches:
        assert batch["references"] == [None] * len(batch["rows"])
        assert (batch["targets"] == IGNORE).all()
        assert batch["tokens"].shape[1] > 1
        assert batch["target_tokens"].tolist() == [[data.end_token]] * len(batch["rows"])


@pytest.mark.parametrize("flat", [False, True])
def test_rows_to_evaluate_may_have_no_place_for_a_target(flat, tmp_path):
    for split, rows in (("train", PAIRED), ("validation", PAIRED), ("test", [{"en": "the cat"}, {"en": "a cat ran"}])):
        text = "".join(json.dumps(row if flat else {"translation": row}) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    data = ready(tmp_path, tmp_path / "cache")
    assert data.table("test")["reference"].to_pylist() == [None, None]
    assert data.table("validation")["reference"].to_pylist() == [pair["de"] for pair in PAIRED]


def test_a_training_row_without_a_place_for_a_target_is_refused(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"translation": {"en": "the cat"}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no language 'de' but en; set data\.source and data\.target"):
        ready(tmp_path, tmp_path / "cache")


def test_an_empty_source_is_marked_and_keeps_its_reference(data):
    batches = list(data.val_dataloader())
    empty = {row: flag for batch in batches for row, flag in zip(batch["rows"].tolist(), batch["empty"], strict=True)}
    assert empty == {row: row == 2 for row in range(7)}
    assert data.dataset("validation")[2]["source"] == [data.end_token]
    assert data.dataset("validation")[2]["reference"] == "Da sol."


def test_an_empty_reference_is_predicted_as_an_end(corpus, tmp_path):
    data = ready(corpus(test=[("a cat", "")]), tmp_path / "cache")
    (batch,) = data.test_dataloader()
    assert batch["references"] == [""]
    assert batch["targets"].tolist() == [[data.end_token]]


# --- texts as tokens


def test_characters_the_tokenizer_never_saw_survive(corpus, tmp_path):
    text = "Zażółć 我 🦊"
    data = ready(corpus(test=[(text, text)]), tmp_path / "cache")
    row = data.dataset("test")[0]
    assert cat(row["source"], data) == cat(row["target"], data) == row["reference"] == text


def test_text_that_spells_out_the_end_token_is_not_the_end_token(corpus, tmp_path):
    text = "the <|endoftext|> cat"
    data = ready(corpus(train=[(text, text)] * 3, test=[(text, text)]), tmp_path / "cache")
    for split in ("train", "test"):
        row = data.dataset(split)[0]
        for side in ("source", "target"):
            assert row[side].count(data.end_token) == 1
            assert cat(row[side], data) == text


def test_white_space_is_made_uniform_but_in_the_reference(corpus, tmp_path):
    spaced, plain = " the \t cat\n ran ", "the cat ran"
    data = ready(corpus(test=[(spaced, spaced), (plain, plain)]), tmp_path / "cache")
    one, other = data.dataset("test")[0], data.dataset("test")[1]
    assert (one["source"], one["target"]) == (other["source"], other["target"])
    assert one["reference"] == spaced


@pytest.mark.parametrize(("kind", "size", "end"), [("unigram", 330, "</s>"), ("bpe", 300, "<|endoftext|>")])
def test_a_kind_of_tokenizer_is_trained_on_both_languages(kind, size, end, parallel, prepared):
    data = ready(parallel, prepared, tokenizer=kind, tokenizer_size=size)
    assert data.end_token == data.tokenizer.token_to_id(end)
    assert data.vocab_size <= size
    pieces = {piece.strip("Ġ\u2581") for piece in data.tokenizer.get_vocab()}
    assert {"cat", "dog"} & pieces
    assert {"tak", "gud"} & pieces
    for row, pair in ((row, raw(data, "test", row)) for row in range(5)):
        example = data.dataset("test")[row]
        assert cat(example["source"], data) == pair["en"]
        assert cat(example["target"], data) == pair["de"] == example["reference"]


def test_a_tokenizer_may_be_given_as_a_file(parallel, tmp_path):
    tokenizer = train_tokenizer(["the cat ran"] * 3, "bpe", 260)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = ready(parallel, tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.describe()["tokenizer_sha256"] == tokenizer_hash(tokenizer)


# --- preparation


def test_what_is_prepared_is_not_tokenised_again(parallel, tmp_path, monkeypatch):
    first = ready(parallel, tmp_path)

    def refuse(*args: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ExampleData, "_build", refuse)
    monkeypatch.setattr(SequenceFormat, "encode", refuse)
    for options in ({}, {"batch_tokens": 64}, {"eval_batch_size": 1}, {"seed": 2}, {"shuffle": False}):
        again = module(parallel, tmp_path, **options)
        assert again.prepared
        again.prepare()
        assert again.folder == first.folder
        assert len(next(iter(again.train_dataloader()))["rows"]) > 0
        assert len(list(again.test_dataloader())) == -(-5 // again.eval_batch_size)


@pytest.mark.parametrize(
    "options",
    [
        {"source": "de", "target": "en"},
        {"max_length": 39},
        {"max_ratio": None},
        {"tokenizer_size": 299},
        {"tokenizer": "unigram", "tokenizer_size": 330},
        {"splits": {"test": "validation"}},
    ],
)
def test_what_the_examples_depend_on_is_prepared_beside_it(options, data, parallel, prepared):
    assert module(parallel, prepared, **options).folder != data.folder


def test_the_folder_names_data_set_subset_and_direction(parallel, prepared):
    assert module(parallel, prepared, "de", "en").label == "parallel-de2en"
    assert module(parallel, prepared, subset="default").label == "parallel-default-en2de"


def test_the_record_counts_epochs_and_tokens_of_both_sides(data):
    train(data, EPOCH)
    record = data.describe()
    assert record["epochs"] == 1
    assert (record["source"], record["target"], record["batch_tokens"]) == ("en", "de", 128)
    table = data.table("train")
    tokens = sum(len(row) for side in ("source", "target") for row in table[side].to_pylist())
    assert record["splits"]["train"]["tokens"] == tokens


def test_a_submission_is_one_line_per_row_in_order(data):
    rows = [{"row": i, "hypothesis": text, "score": -1.0} for i, text in enumerate(["Da tak.", "", "O sol."])]
    assert data.submission(rows) == {"hypotheses.txt": "Da tak.\n\nO sol.\n"}


# --- what is wrong is named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "en"}, r"source and target are both 'en'; give two languages, such as en and de"),
        ({"batch_tokens": 39}, r"batch_tokens \(39\) must hold a sentence of max_length \(40\) tokens; raise the one"),
        ({"max_ratio": 0.9}, r"max_ratio \(0\.9\) must be at least 1; 3 is the default, null allows any"),
        ({"splits": {"valid": "validation"}}, r"splits names valid; its keys must be among train, validation, test"),
        ({"eval_batch_size": -1}, r"eval_batch_size \(-1\) must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message, parallel, prepared):
    with pytest.raises(ValueError, match=message):
        module(parallel, prepared, **options)


@pytest.mark.parametrize(("source", "target"), [("fr", "de"), ("de", "fr")])
def test_an_unknown_language_is_refused_with_those_there_are(source, target, parallel, tmp_path):
    with pytest.raises(ValueError, match=r"has no language 'fr' but de, en; set data\.source and data\.target"):
        module(parallel, tmp_path, source, target).prepare()


def test_an_unknown_language_is_refused_where_languages_are_columns(tmp_path):
    from hub_fixtures import write_translation

    path = write_translation(tmp_path / "flat", flat=True)
    with pytest.raises(ValueError, match=r"has no column 'fr'; its columns are en, de"):
        module(path, tmp_path / "cache", "fr").prepare()


def test_what_is_no_text_is_named_with_its_row(corpus, parallel, tmp_path):
    train_tokenizer(["the cat"], "bpe", 257).save(str(tmp_path / "tokenizer.json"))
    path = corpus(train=[(1, "eins"), (2, "zwei")])
    with pytest.raises(ValueError, match=r"corpus-en2de, split train, row 0: en is 1, not a text; correct or remove"):
        module(path, tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json")).prepare()


def test_a_training_split_of_which_nothing_is_left_is_refused_with_the_reasons(corpus, tmp_path):
    path = corpus(train=[("the cat", ""), ("a" * 50, "b" * 50)])
    with pytest.raises(ValueError, match=r"no row of the split train is left: 1 longer than 10 tokens, 1 without"):
        module(path, tmp_path / "cache", tokenizer_size=257, max_length=10).prepare()


# --- the certificate and resuming


@pytest.mark.parametrize("count", [0, 3, EPOCH, 2 * EPOCH + 2])
def test_the_certificate_counts_the_batches_that_were_trained(count, data):
    batches = train(data, count)
    state = stored(data.state_dict())
    assert verify_certificate(state) == count == data.consumed == data.micro_batches
    assert rows_of(batches) == [row for i in range(count) for row in data.order().batch(i).tolist()]


def forge_digest(state: dict[str, Any]) -> None:
    state["segments"][0]["digests"]["0"] = "0" * 64


def change_seed(state: dict[str, Any]) -> None:
    state["seed"] += 1


def change_a_length(state: dict[str, Any]) -> None:
    state["lengths"][state["lengths"].argmin()] = 40


def change_batch_tokens(state: dict[str, Any]) -> None:
    state["batch_tokens"] -= 20


@pytest.mark.parametrize("tamper", [forge_digest, change_seed, change_a_length, change_batch_tokens])
def test_a_certificate_that_was_tampered_with_is_refused(tamper, data):
    train(data, EPOCH)
    state = stored(data.state_dict())
    tamper(state)
    with pytest.raises(ValueError, match="rank 0 did not train rows 0 to 7 of the stream in order"):
        verify_certificate(state)


def test_a_certificate_of_more_than_was_trained_is_refused(data):
    train(data, 3)
    with pytest.raises(ValueError, match="ends at row 3, but 4 rows count as trained"):
        verify_certificate({**data.state_dict(), "consumed": 4})


def skip(batches: list) -> list:
    return [batches[0], *batches[2:]]


def repeat(batches: list) -> list:
    return [batches[0], *batches[:-1]]


def swap_batches(batches: list) -> list:
    return [batches[1], batches[0], *batches[2:]]


def swap_rows(batches: list) -> list:
    return [batches[0].flip(0), *batches[1:]]


@pytest.mark.parametrize("fault", [skip, repeat, swap_batches, swap_rows])
def test_the_certificate_of_other_batches_than_those_of_the_stream_is_refused(fault, data):
    for rows in fault([batch["rows"] for batch in islice(data.train_dataloader(), 5)]):
        data.mark_trained(rows)
    with pytest.raises(ValueError, match=r"rank 0 did not train rows 0 to \d of the stream in order"):
        verify_certificate(data.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, EPOCH, EPOCH + 1])
def test_training_goes_on_where_the_state_left_off(stop, workers, data, parallel, prepared):
    whole = list(islice(data.train_dataloader(), 2 * EPOCH))
    first, second = (module(parallel, prepared, num_workers=workers) for _ in range(2))
    train(first, stop)
    second.load_state_dict(stored(first.state_dict()))
    rest = train(second, 2 * EPOCH - stop)
    assert all(equal(a, b) for a, b in zip(rest, whole[stop:], strict=True))
    assert verify_certificate(stored(second.state_dict())) == 2 * EPOCH
    assert len(second.state_dict()["segments"]) == 1


@pytest.mark.parametrize(("name", "value"), [("batch_tokens", 64), ("seed", 2), ("shuffle", False)])
def test_a_resume_in_other_batches_is_refused_with_those_to_use(name, value, data, parallel, prepared):
    train(data, 2)
    state = stored(data.state_dict())
    other = module(parallel, prepared, **{name: value})
    remedy = rf"{name}={state[name]}, the config says {value}; resume with {name} {state[name]}, or start a new run"
    with pytest.raises(ValueError, match=remedy):
        other.load_state_dict(state)


def test_a_resume_on_other_pairs_is_refused(data, parallel, prepared):
    other = ready(parallel, prepared, "de", "en")
    with pytest.raises(ValueError, match=rf"trained on data {data.fingerprint()}, but these are {other.fingerprint()}"):
        other.load_state_dict(data.state_dict())


# --- several ranks


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state that the ranks would gather, of the states of each."""
    state = copy.deepcopy(states[0])
    for other in states[1:]:
        state["segments"][-1]["digests"] |= other["segments"][-1]["digests"]
    return state


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_trains_the_same_rows_per_step(world_size, data, parallel, prepared):
    alone = train(data, EPOCH + 2)
    ranks = [as_rank(module(parallel, prepared), rank, world_size) for rank in range(world_size)]
    shares = [train(rank, EPOCH + 2) for rank in ranks]
    for step, batch in enumerate(alone):
        together = [share[step]["rows"].tolist() for share in shares]
        assert sorted(chain(*together)) == sorted(batch["rows"].tolist())
        assert max(map(len, together)) - min(map(len, together)) <= 1
    assert verify_certificate(merged([rank.state_dict() for rank in ranks])) == EPOCH + 2


def test_a_rank_without_rows_has_a_batch_with_nothing_to_predict(parallel, prepared):
    ranks = [as_rank(ready(parallel, prepared, batch_tokens=40), rank, 4) for rank in range(4)]
    alone = ready(parallel, prepared, batch_tokens=40)
    steps = alone.order().epoch_length
    shares = [train(rank, steps) for rank in ranks]
    n_idle = 0
    for step, batch in enumerate(train(alone, steps)):
        own = [share[step] for share in shares]
        targets = sum(int((one["targets"] != IGNORE).sum()) for one in own)
        assert targets == int((batch["targets"] != IGNORE).sum())
        idle = [one for one in own if PADDING_ROW in one["rows"]]
        n_idle += len(idle)
        for one in idle:
            assert one["rows"].tolist() == [PADDING_ROW]
            assert (one["targets"] == IGNORE).all()
            assert one["tokens"].numel() > 0
    assert n_idle > 0
    assert verify_certificate(merged([rank.state_dict() for rank in ranks])) == steps


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, data, parallel, prepared):
    expected = [data.order().batch(step).tolist() for step in range(2 * EPOCH)]
    ranks = [as_rank(module(parallel, prepared), rank, before) for rank in range(before)]
    for rank in ranks:
        train(rank, 3)
    state = stored(merged([rank.state_dict() for rank in ranks]))
    ranks = [as_rank(module(parallel, prepared), rank, after) for rank in range(after)]
    for rank in ranks:
        rank.load_state_dict(copy.deepcopy(state))
    shares = [train(rank, EPOCH) for rank in ranks]
    for step in range(EPOCH):
        assert sorted(rows_of([share[step] for share in shares])) == sorted(expected[3 + step])
    together = merged([rank.state_dict() for rank in ranks])
    assert [segment["world_size"] for segment in together["segments"]] == [before, after]
    assert verify_certificate(together) == 3 + EPOCH


@pytest.mark.parametrize("world_size", [2, 4])
def test_evaluation_has_the_same_batches_on_any_number_of_ranks(world_size, data, parallel, prepared):
    alone = list(data.val_dataloader())
    ranks = [list(as_rank(module(parallel, prepared), r, world_size).val_dataloader()) for r in range(world_size)]
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    assert all(equal(a, b) for a, b in zip(together, alone, strict=False))
    assert len(together) == -(-len(alone) // world_size) * world_size
    for batch in together[len(alone) :]:
        assert batch["rows"].tolist() == [PADDING_ROW]
        assert (batch["targets"] == IGNORE).all()


# --- real data


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("de", "en")])
@pytest.mark.parametrize(("name", "subset"), [("multi30k", None), ("wmt14", "de-en")])
def test_real_corpora(name, subset, source, target, real_data, tmp_path):
    options = {"subset": subset, "tokenizer_size": 4000, "max_length": 100, "batch_tokens": 2000, "eval_batch_size": 64}
    data = ready(real_data / name, tmp_path / "cache", source, target, **options)
    counts = data.manifest["splits"]
    dropped = sum(counts["train"].get("dropped", {}).values())
    assert counts["train"]["examples"] + dropped == counts["train"]["rows"] >= 4000
    assert dropped <= 0.05 * counts["train"]["rows"]
    assert (dropped > 0) == (name == "wmt14")  # captions are short
    assert counts["train"]["truncated"] == 0

    epoch = list(islice(data.train_dataloader(), data.order().epoch_length))
    assert sorted(rows_of(epoch)) == list(range(counts["train"]["examples"]))
    assert all(max(batch["tokens"].numel(), batch["targets"].numel()) <= 2000 for batch in epoch)
    of_longer_sides = sum(max(batch["tokens"].numel(), batch["targets"].numel()) for batch in epoch)
    assert of_longer_sides < 1.1 * sum(data.table("train")["length"].to_pylist())

    for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert sorted(rows_of(batches)) == list(range(counts[split]["rows"]))
        assert all(reference for batch in batches for reference in batch["references"])
        assert not any(flag for batch in batches for flag in batch["empty"])
    row = next(row for row in data.table("test").to_pylist() if not row["truncated"])
    assert cat(row["target"], data) == " ".join(row["reference"].split())

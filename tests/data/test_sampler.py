"""The order of training rows, how ranks share them, and the certificate that a run kept to it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from mhe_lightning.data import ExactDataModule, verify_certificate
from mhe_lightning.data.sampler import (
    PADDING_ROW,
    EvaluationSampler,
    RowOrder,
    TrainingSampler,
    extend_chain,
    replay_chain,
    rows_per_rank,
)

quick = settings(deadline=None, max_examples=60)
ORDERS = st.builds(RowOrder, st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())


@st.composite
def shares(draw: st.DrawFn) -> dict[str, int]:
    """A batch size and a number of ranks that divides it."""
    world_size = draw(st.integers(1, 6))
    return {"world_size": world_size, "batch_size": world_size * draw(st.integers(1, 5))}


# --- the stream of rows


@given(order=ORDERS, epoch=st.integers(0, 5))
@quick
def test_every_epoch_is_a_permutation_of_all_rows(order, epoch):
    rows = order.rows(epoch * order.n_rows, order.n_rows)
    assert sorted(rows) == list(range(order.n_rows))
    if not order.shuffle:
        assert rows.tolist() == sorted(rows)


@given(order=ORDERS, start=st.integers(0, 150), count=st.integers(0, 150))
@quick
def test_any_stretch_of_the_stream_is_a_slice_of_it(order, start, count):
    rows = order.rows(start, count)
    assert rows.dtype == np.int64
    assert rows.tolist() == order.rows(0, start + count)[start:].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = RowOrder(100, 1), RowOrder(100, 2)
    orders = [first.rows(0, 100), first.rows(100, 100), second.rows(0, 100), second.rows(100, 100)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_of_a_seed_stays_what_it_was():
    assert RowOrder(8, 42).rows(0, 12).tolist() == [4, 3, 7, 6, 0, 1, 5, 2, 1, 2, 5, 6]


def test_the_stream_of_a_source_without_an_end_costs_no_memory():
    assert RowOrder(2**62, 0, shuffle=False).rows(10**12, 3).tolist() == [10**12, 10**12 + 1, 10**12 + 2]


@pytest.mark.parametrize(
    ("n_rows", "seed", "message"),
    [(0, 1, r"n_rows \(0\) must be at least 1"), (3, -1, r"seed \(-1\)"), (3, 2**32, r"seed \(4294967296\)")],
)
def test_an_order_of_nothing_or_of_a_bad_seed_is_refused(n_rows, seed, message):
    with pytest.raises(ValueError, match=message):
        RowOrder(n_rows, seed)


# --- training batches


@given(order=ORDERS, share=shares(), start=st.integers(0, 100))
@quick
def test_the_ranks_together_take_each_global_batch_in_order(order, share, start):
    samplers = [iter(TrainingSampler(order, rank=rank, start=start, **share)) for rank in range(share["world_size"])]
    for step in range(4):
        together = list(chain.from_iterable(next(sampler) for sampler in samplers))
        size = share["batch_size"]
        assert together == order.rows(start + step * size, size).tolist()


@given(order=ORDERS, share=shares(), steps=st.integers(0, 12))
@quick
def test_starting_later_goes_on_with_the_same_batches(order, share, steps):
    whole = TrainingSampler(order, rank=share["world_size"] - 1, **share)
    rest = TrainingSampler(order, rank=share["world_size"] - 1, start=steps * share["batch_size"], **share)
    assert list(islice(rest, 4)) == list(islice(whole, steps, steps + 4))


@pytest.mark.parametrize(("batch_size", "world_size", "fit"), [(3, 2, 4), (0, 2, 2), (2, 4, 4), (-1, 1, 1)])
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_one_that_they_can(batch_size, world_size, fit):
    message = rf"batch_size \({batch_size}\) .*all {world_size} ranks.* try {fit}$"
    for sampler in (TrainingSampler, EvaluationSampler):
        first = RowOrder(5, 0) if sampler is TrainingSampler else 5
        with pytest.raises(ValueError, match=message):
            sampler(first, batch_size=batch_size, world_size=world_size)
    assert rows_per_rank(fit, world_size) * world_size == fit


# --- evaluation batches


@given(n_rows=st.integers(0, 60), share=shares())
@quick
def test_evaluation_gives_every_row_once_in_equally_many_batches(n_rows, share):
    ranks = [list(EvaluationSampler(n_rows, rank=rank, **share)) for rank in range(share["world_size"])]
    lengths = {len(EvaluationSampler(n_rows, rank=rank, **share)) for rank in range(share["world_size"])}
    assert {len(batches) for batches in ranks} == lengths
    assert all([len(batch) for batch in batches] == [len(batch) for batch in ranks[0]] for batches in ranks)
    assert all(1 <= len(batch) <= share["batch_size"] // share["world_size"] for batch in chain(*ranks))
    rows = sorted(chain.from_iterable(chain(*ranks)))
    padding = rows.count(PADDING_ROW)
    assert padding < share["world_size"]
    assert rows == [PADDING_ROW] * padding + list(range(n_rows))


# --- the certificate


@given(order=ORDERS, share=shares(), steps=st.integers(0, 8), start=st.integers(0, 30))
@quick
def test_a_replay_gives_the_digest_of_training(order, share, steps, start):
    for rank in range(share["world_size"]):
        digest = ""
        for rows in islice(TrainingSampler(order, rank=rank, start=start, **share), steps):
            digest = extend_chain(digest, rows)
        stop = start + steps * share["batch_size"]
        assert replay_chain(order, rank=rank, start=start, stop=stop, **share) == digest


class Numbers(Dataset):
    """Row i is the number i."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> dict:
        return {"rows": row, "value": torch.tensor(float(row))}


class NumberData(ExactDataModule):
    """The smallest exact data module there is."""

    def __init__(self, n_rows: int = 21, **options) -> None:
        super().__init__(**options)
        self.n_rows = n_rows

    prepared = True

    def prepare(self) -> None: ...

    def dataset(self, split: str) -> Numbers:
        return Numbers(self.n_rows if split == "train" else self.n_rows // 2)

    def fingerprint(self) -> str:
        return f"{self.n_rows} numbers"


def train(data: NumberData, steps: int) -> list[int]:
    """Train some batches; returns the rows."""
    batches = list(islice(data.train_dataloader(), steps))
    for batch in batches:
        assert batch["rows"].tolist() == batch["value"].tolist()
        data.mark_trained(batch["rows"])
    return [row for batch in batches for row in batch["rows"].tolist()]


def stored(state: dict) -> dict:
    """What a checkpoint gives back."""
    return json.loads(json.dumps(state))


@given(
    parts=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
@quick
def test_a_run_in_parts_trains_the_stream_and_certifies_it(parts, seed, shuffle):
    state, rows = None, []
    for batch_size, steps in parts:
        data = NumberData(batch_size=batch_size, seed=seed, shuffle=shuffle)
        if state is not None:
            data.load_state_dict(stored(state))
        rows += train(data, steps)
        state = data.state_dict()
    assert rows == RowOrder(21, seed, shuffle).rows(0, len(rows)).tolist()
    assert verify_certificate(state) == len(rows) == data.consumed


def test_a_resume_with_the_same_batches_goes_on_with_its_segment_and_with_others_begins_one():
    data = NumberData(batch_size=4)
    train(data, 3)
    state = stored(data.state_dict())
    for batch_size, segments in ((4, 1), (5, 2)):
        resumed = NumberData(batch_size=batch_size)
        resumed.load_state_dict(stored(state))
        train(resumed, 2)
        assert len(resumed.state_dict()["segments"]) == segments
        assert verify_certificate(resumed.state_dict()) == 12 + 2 * batch_size
        assert resumed.micro_batches == resumed.consumed // batch_size


def test_batches_of_another_size_in_the_same_process_begin_a_segment_too():
    data = NumberData(batch_size=4)
    train(data, 3)
    data.batch_size = 6
    train(data, 2)
    assert verify_certificate(data.state_dict()) == 24
    assert [segment["stop"] for segment in data.state_dict()["segments"]] == [12, 24]


def test_rows_that_are_loaded_but_not_trained_come_again():
    data = NumberData(batch_size=4, seed=3)
    train(data, 1)
    list(islice(data.train_dataloader(), 3))
    assert train(data, 1) == RowOrder(21, 3).rows(4, 4).tolist()


def skip(batches: list) -> list:
    return [batches[0], *batches[2:]]


def repeat(batches: list) -> list:
    return [batches[0], *batches[:-1]]


def swap_batches(batches: list) -> list:
    return [batches[1], batches[0], *batches[2:]]


def swap_rows(batches: list) -> list:
    return [batches[0].flip(0), *batches[1:]]


@pytest.mark.parametrize("fault", [skip, repeat, swap_batches, swap_rows])
@pytest.mark.parametrize("before", [0, 2])
def test_the_certificate_of_other_rows_than_those_of_the_stream_is_refused(fault, before):
    data = NumberData(batch_size=4, seed=5)
    train(data, before)
    resumed = NumberData(batch_size=4, seed=5)
    resumed.load_state_dict(stored(data.state_dict()))
    for rows in fault([batch["rows"] for batch in islice(resumed.train_dataloader(), 5)]):
        resumed.mark_trained(rows)
    with pytest.raises(ValueError, match=r"rank 0 did not train rows 0 to \d+ of the stream in order"):
        verify_certificate(resumed.state_dict())


def forge_digest(state: dict) -> None:
    digest = state["segments"][1]["digests"]["0"]
    state["segments"][1]["digests"]["0"] = ("1" if digest[0] == "0" else "0") + digest[1:]


def lose_digest(state: dict) -> None:
    state["segments"][0]["digests"] = {}


def drop_segment(state: dict) -> None:
    del state["segments"][0]


def claim_more(state: dict) -> None:
    state["consumed"] += 4


def claim_part_of_a_batch(state: dict) -> None:
    state["segments"][1]["stop"] -= 1
    state["consumed"] -= 1


def go_backwards(state: dict) -> None:
    state["segments"].append({**state["segments"][1], "start": 22, "stop": 12, "digests": {"0": ""}})
    state["consumed"] = 12


def change_seed(state: dict) -> None:
    state["seed"] += 1


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (forge_digest, "rank 0 did not train rows 12 to 22"),
        (lose_digest, "rank 0 did not train rows 0 to 12"),
        (drop_segment, "the segment after row 0 of the stream starts at row 12"),
        (claim_more, "ends at row 22, but 26 rows count as trained"),
        (claim_part_of_a_batch, "the segment of rows 12 to 21 is not one of whole batches"),
        (go_backwards, "the segment of rows 22 to 12 is not one of whole batches"),
        (change_seed, "rank 0 did not train rows 0 to 12"),
    ],
)
def test_a_certificate_that_was_tampered_with_is_refused(tamper, message):
    data = NumberData(batch_size=4)
    train(data, 3)
    resumed = NumberData(batch_size=5)
    resumed.load_state_dict(stored(data.state_dict()))
    train(resumed, 2)
    state = resumed.state_dict()
    assert verify_certificate(state) == 22
    forged = copy.deepcopy(state)
    tamper(forged)
    with pytest.raises(ValueError, match=message):
        verify_certificate(forged)


# --- the data module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"batch_size": 1, "eval_batch_size": -2}, r"eval_batch_size \(-2\) must be at least 1"),
        ({"batch_size": 1, "num_workers": -1}, r"num_workers \(-1\) must not be negative; 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NumberData(**options)


@pytest.mark.parametrize(("name", "value"), [("seed", 2), ("shuffle", False)])
def test_a_resume_in_another_order_is_refused_with_the_one_to_use(name, value):
    state = NumberData(batch_size=4, seed=1).state_dict()
    with pytest.raises(ValueError, match=rf"{name}={state[name]}, the config says {value}; resume with {name}"):
        NumberData(**{"batch_size": 4, "seed": 1, name: value}).load_state_dict(state)


def test_a_resume_on_other_data_is_refused_with_both_fingerprints():
    with pytest.raises(ValueError, match="trained on data 21 numbers, but these are 20 numbers"):
        NumberData(20, batch_size=4).load_state_dict(NumberData(batch_size=4).state_dict())


def test_data_that_are_not_prepared_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(NumberData, "prepared", False)
    with pytest.raises(ValueError, match="not prepared; run the `prepare` command"):
        NumberData(batch_size=4).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_row_once_whatever_the_workers(workers):
    data = NumberData(batch_size=4, eval_batch_size=3, num_workers=workers)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert [row for batch in loader for row in batch["rows"].tolist()] == list(range(10))


def test_workers_do_not_change_the_training_rows():
    assert first_rows(NumberData(batch_size=4, num_workers=2)) == first_rows(NumberData(batch_size=4))


def test_forked_workers_do_not_have_to_warn_of_tokenizers(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    NumberData(batch_size=4).train_dataloader()
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    NumberData(batch_size=4, num_workers=1).train_dataloader()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def first_rows(data: NumberData) -> list[list[int]]:
    batches: Iterator[dict] = islice(data.train_dataloader(), 7)
    return [batch["rows"].tolist() for batch in batches]

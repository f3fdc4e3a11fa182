"""The order of training rows, how ranks share them, and the certificate that a run kept to it."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterator
from itertools import chain, islice, pairwise

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
def grouped_orders(draw: st.DrawFn, max_rows: int = 60, shuffle: bool = True) -> RowOrder:
    """Orders with groups of similar length."""
    lengths = np.array(draw(st.lists(st.integers(1, 30), min_size=1, max_size=max_rows)))
    return RowOrder(len(lengths), draw(st.integers(0, 99)), shuffle, lengths, draw(st.integers(1, 9)))


@st.composite
def shares(draw: st.DrawFn) -> dict[str, int]:
    """A batch size and a number of ranks that divides it."""
    world_size = draw(st.integers(1, 6))
    return {"world_size": world_size, "batch_size": world_size * draw(st.integers(1, 5))}


# --- the stream of rows


@given(order=ORDERS | grouped_orders(), epoch=st.integers(0, 5))
@quick
def test_every_epoch_is_a_permutation_of_all_rows(order, epoch):
    rows = order.rows(epoch * order.n_rows, order.n_rows)
    assert sorted(rows) == list(range(order.n_rows))
    if not order.shuffle:
        assert rows.tolist() == sorted(rows)


@given(order=ORDERS | grouped_orders(), start=st.integers(0, 150), count=st.integers(0, 150))
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


@given(order=ORDERS | grouped_orders(), start=st.integers(0, 150), count=st.integers(1, 150))
@quick
def test_the_epoch_of_a_position_counts_the_passes_before_it(order, start, count):
    _, epochs = order.share(start, count, 0, 1)
    assert epochs.tolist() == [position // order.n_rows for position in range(start, start + count)]


# --- groups of similar length


@given(order=grouped_orders(), positions=st.lists(st.integers(0, 300), max_size=12))
@quick
def test_positions_may_be_read_in_any_order(order, positions):
    other = RowOrder(order.n_rows, order.seed, True, order.lengths, order.group)
    stream = order.rows(0, 301)
    assert [other.rows(position, 1)[0] for position in positions] == stream[positions].tolist()


def padding(order: RowOrder, lengths: np.ndarray, group: int, epochs: int = 5) -> int:
    """Tokens that the batches of some epochs are filled up with."""
    batches = epochs * order.n_rows // group
    in_batches = lengths[order.rows(0, batches * group)].reshape(batches, group)
    return int((in_batches.max(1, initial=0, keepdims=True) - in_batches).sum())


@given(order=grouped_orders())
@quick
def test_groups_never_need_more_padding_than_rows_as_they_come(order):
    ungrouped = RowOrder(order.n_rows, order.seed)
    assert padding(order, order.lengths, order.group) <= padding(ungrouped, order.lengths, order.group)


@pytest.mark.parametrize("n_rows", [3000, 3001])  # with 3001 epochs begin within a group
def test_groups_of_rows_of_very_different_lengths_need_little_padding(n_rows):
    lengths = np.random.RandomState(0).geometric(0.01, n_rows)
    grouped, ungrouped = RowOrder(n_rows, 1, True, lengths, 16), RowOrder(n_rows, 1)
    assert padding(grouped, lengths, 16) < padding(ungrouped, lengths, 16) / 3


@given(order=grouped_orders(), epoch=st.integers(0, 6))
@quick
def test_the_groups_of_an_epoch_do_not_overlap_in_length(order, epoch):
    # of 60 rows and fewer only groups of one row could be sorted in two parts, and those cannot overlap either
    first = -(-epoch * order.n_rows // order.group) * order.group
    n_groups = max(0, ((epoch + 1) * order.n_rows - first) // order.group)
    groups = order.lengths[order.rows(first, n_groups * order.group)].reshape(n_groups, order.group)
    ranges = sorted((min(group), max(group)) for group in groups.tolist())
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))


def test_groups_come_in_an_order_of_their_own_each_epoch():
    order = RowOrder(320, 1, True, np.arange(320), 8)
    of_epochs = [order.rows(epoch * 320, 320).reshape(40, 8).min(1).tolist() for epoch in range(2)]
    assert of_epochs[0] != of_epochs[1]
    # 320 rows are sorted as one part, so that in both epochs the shortest are together, but not at the beginning
    assert all(sorted(mins) == list(range(0, 320, 8)) != mins for mins in of_epochs)


def test_the_grouped_order_of_a_seed_stays_what_it_was():
    order = RowOrder(8, 42, True, np.array([5, 3, 8, 1, 9, 2, 7, 4]), 3)
    assert order.rows(0, 16).tolist() == [0, 6, 4, 3, 1, 7, 5, 2, 1, 3, 5, 0, 6, 2, 4, 7]


@given(order=grouped_orders(shuffle=False))
@quick
def test_rows_in_their_own_order_are_not_grouped(order):
    assert order.rows(0, order.n_rows).tolist() == list(range(order.n_rows))


def test_lengths_of_other_rows_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="2 lengths were given for 3 rows"):
        RowOrder(3, 0, True, np.array([1, 2]), 2)


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


@given(order=ORDERS | grouped_orders(), share=shares(), start=st.integers(0, 100))
@quick
def test_with_epochs_each_row_comes_with_that_of_its_position(order, share, start):
    rank = share["world_size"] - 1
    plain = TrainingSampler(order, rank=rank, start=start, **share)
    pairs = TrainingSampler(order, rank=rank, start=start, with_epochs=True, **share)
    per_rank = share["batch_size"] // share["world_size"]
    for step, (rows, batch) in enumerate(islice(zip(plain, pairs, strict=True), 6)):
        first = start + step * share["batch_size"] + rank * per_rank
        assert batch == [(row, (first + i) // order.n_rows) for i, row in enumerate(rows)]


@pytest.mark.parametrize(("batch_size", "world_size", "fit"), [(3, 2, 4), (0, 2, 2), (2, 4, 4), (-1, 1, 1)])
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_one_that_they_can(batch_size, world_size, fit):
    message = rf"batch_size \({batch_size}\) .*all {world_size} ranks.* try {fit}$"
    for sampler in (TrainingSampler, EvaluationSampler):
        first = RowOrder(5, 0) if sampler is TrainingSampler else range(5)
        with pytest.raises(ValueError, match=message):
            sampler(first, batch_size=batch_size, world_size=world_size)
    assert rows_per_rank(fit, world_size) * world_size == fit


# --- evaluation batches


@given(rows=st.lists(st.integers(0, 99), max_size=60, unique=True), share=shares())
@quick
def test_evaluation_gives_every_row_once_in_equally_many_batches(rows, share):
    ranks = [list(EvaluationSampler(rows, rank=rank, **share)) for rank in range(share["world_size"])]
    lengths = {len(EvaluationSampler(rows, rank=rank, **share)) for rank in range(share["world_size"])}
    assert {len(batches) for batches in ranks} == lengths
    assert all([len(batch) for batch in batches] == [len(batch) for batch in ranks[0]] for batches in ranks)
    assert all(1 <= len(batch) <= share["batch_size"] // share["world_size"] for batch in chain(*ranks))
    given = sorted(chain.from_iterable(chain(*ranks)))
    padding = given.count(PADDING_ROW)
    assert padding < share["world_size"]
    assert given == [PADDING_ROW] * padding + sorted(rows)


@given(rows=st.lists(st.integers(0, 99), min_size=1, max_size=60, unique=True), share=shares())
@quick
def test_evaluation_keeps_the_rows_in_the_order_given(rows, share):
    # so that rows sorted by length stay with their like, on any number of ranks
    ranks = [list(chain(*EvaluationSampler(rows, rank=rank, **share))) for rank in range(share["world_size"])]
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    assert together[: len(rows)] == rows


# --- the certificate


@given(order=ORDERS | grouped_orders(), share=shares(), steps=st.integers(0, 8), start=st.integers(0, 30))
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


class GroupedNumberData(NumberData):
    """Its rows are of different lengths, and batched by them."""

    @property
    def row_lengths(self) -> np.ndarray:
        return np.arange(self.n_rows) * 8 % 21 + 1


def train(data: NumberData, steps: int) -> list[int]:
    """Train some batches; returns the rows."""
    batches = list(islice(data.train_dataloader(), steps))
    for batch in batches:
        assert batch["rows"].tolist() == batch["value"].tolist()
        data.mark_trained(batch["rows"])
    return [row for batch in batches for row in batch["rows"].tolist()]


def stored(state: dict) -> dict:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=4), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
@quick
def test_a_run_on_grouped_rows_in_parts_trains_the_stream_and_certifies_it(steps, batch_size, seed):
    state, rows = None, []
    for part in steps:
        data = GroupedNumberData(batch_size=batch_size, seed=seed)
        if state is not None:
            data.load_state_dict(stored(state))
        rows += train(data, part)
        state = data.state_dict()
    order = RowOrder(21, seed, True, data.row_lengths, batch_size)
    assert rows == order.rows(0, len(rows)).tolist()
    assert verify_certificate(stored(state)) == len(rows) == data.consumed


def test_a_certificate_from_before_there_were_groups_still_holds():
    data = NumberData(batch_size=4)
    rows = train(data, 3)
    state = stored(data.state_dict())
    del state["lengths"], state["group"]
    assert verify_certificate(state) == 12
    resumed = NumberData(batch_size=4)
    resumed.load_state_dict(state)
    assert rows + train(resumed, 2) == RowOrder(21, 0).rows(0, 20).tolist()


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


def forget_lengths(state: dict) -> None:
    state["lengths"] = None


def change_a_length(state: dict) -> None:
    state["lengths"][state["lengths"].argmin()] = 1000


def change_group(state: dict) -> None:
    state["group"] = 5


@pytest.mark.parametrize("tamper", [forget_lengths, change_a_length, change_group, change_seed])
def test_a_certificate_whose_groups_were_tampered_with_is_refused(tamper):
    data = GroupedNumberData(batch_size=4)
    train(data, 12)
    state = stored(data.state_dict())
    assert verify_certificate(state) == 48
    tamper(state)
    with pytest.raises(ValueError, match="rank 0 did not train rows 0 to 48 of the stream in order"):
        verify_certificate(state)


@pytest.mark.parametrize("fault", [skip, repeat, swap_batches, swap_rows])
def test_the_certificate_of_other_rows_than_those_of_the_groups_is_refused(fault):
    data = GroupedNumberData(batch_size=4)
    for rows in fault([batch["rows"] for batch in islice(data.train_dataloader(), 5)]):
        data.mark_trained(rows)
    with pytest.raises(ValueError, match=r"rank 0 did not train rows 0 to \d+ of the stream in order"):
        verify_certificate(data.state_dict())


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


def test_a_resume_with_groups_of_another_size_is_refused_with_the_one_to_use():
    state = stored(GroupedNumberData(batch_size=4).state_dict())
    with pytest.raises(ValueError, match=r"in batches of 4, the config's batch_size is 6; resume with batch_size 4"):
        GroupedNumberData(batch_size=6).load_state_dict(state)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (NumberData, GroupedNumberData, "rows are not grouped by length, the config's are so; resume as they were"),
        (GroupedNumberData, NumberData, "rows are grouped by length, the config's are not; resume as they were"),
    ],
)
def test_a_resume_that_begins_or_ends_to_group_rows_is_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        after(batch_size=4).load_state_dict(stored(before(batch_size=4).state_dict()))


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

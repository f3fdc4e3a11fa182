"""Batches of about equally many tokens: how rows are cut into them, in what order they come, who takes which rows."""

from __future__ import annotations

import io
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.data.sampler import (
    PADDING_ROW,
    EvaluationSampler,
    RowOrder,
    TokenBatchOrder,
    TrainingSampler,
    extend_chain,
    order_from,
    replay_chain,
)

quick = settings(deadline=None, max_examples=60)
FROZEN = [[[7, 0], [11, 3, 1, 5, 10], [8, 9], [4], [6, 2]], [[4], [6, 8], [7, 0], [2, 9], [3, 10, 5, 1, 11]]]


@st.composite
def orders(draw: st.DrawFn, shuffle: bool | None = None) -> TokenBatchOrder:
    """Orders of rows of all sorts of lengths, some of which have gaps between them."""
    longest = draw(st.sampled_from([3, 30, 300]))
    lengths = np.array(draw(st.lists(st.integers(1, longest), min_size=1, max_size=120)), dtype=np.int32)
    batch_tokens = int(lengths.max()) + draw(st.integers(0, 200))
    return TokenBatchOrder(
        lengths, batch_tokens, draw(st.integers(0, 2**32 - 1)), draw(st.booleans()) if shuffle is None else shuffle
    )


def again(order: TokenBatchOrder) -> TokenBatchOrder:
    """The same order, which has been asked for nothing yet."""
    return TokenBatchOrder(order.lengths, order.batch_tokens, order.seed, order.shuffle)


def epoch_of(order: TokenBatchOrder, epoch: int = 0) -> list[list[int]]:
    """The batches of an epoch."""
    first = epoch * order.epoch_length
    return [order.batch(first + i).tolist() for i in range(order.epoch_length)]


def buckets_of(order: TokenBatchOrder) -> list[tuple[np.ndarray, list[int]]]:
    """Of each bucket the lengths of its rows, ascending, and how many rows its batches have."""
    ascending = np.sort(order.lengths)
    return [
        (ascending[start:stop], [end - begin for begin, end in order._batches if start <= begin < stop])
        for start, stop in order._buckets
    ]


# --- how rows are cut into batches


@given(order=orders(), epoch=st.integers(0, 4))
@quick
def test_every_epoch_has_each_row_once(order, epoch):
    batches = epoch_of(order, epoch)
    assert sorted(chain.from_iterable(batches)) == list(range(len(order.lengths)))
    assert all(batches)


@given(order=orders(), epoch=st.integers(0, 4))
@quick
def test_no_batch_has_more_tokens_than_asked_for_with_its_padding(order, epoch):
    for batch in epoch_of(order, epoch):
        assert len(batch) * order.lengths[batch].max() <= order.batch_tokens


@given(order=orders(), epoch=st.integers(0, 4))
@quick
def test_the_rows_of_a_batch_come_from_one_bucket(order, epoch):
    ascending = np.sort(order.lengths)
    ranges = [(ascending[start], ascending[stop - 1]) for start, stop in order._buckets]
    assert ranges == sorted(ranges)
    for batch in epoch_of(order, epoch):
        shortest, longest = order.lengths[batch].min(), order.lengths[batch].max()
        assert any(first <= shortest and longest <= last for first, last in ranges)


@given(order=orders())
@quick
def test_the_rows_of_a_bucket_are_of_similar_length_unless_they_are_less_than_a_batch(order):
    for lengths, batches in buckets_of(order):
        shortest, longest = int(lengths[0]), int(lengths[-1])
        if longest > max(1.1 * shortest, shortest + 1):
            alike = int((lengths <= max(int(1.1 * shortest), shortest + 1)).sum())
            assert alike < order.batch_tokens // longest  # and longer rows filled up the one batch
            assert batches == [len(lengths)]


@given(order=orders())
@quick
def test_the_batches_of_a_bucket_differ_by_one_row_at_most(order):
    for _, batches in buckets_of(order):
        assert max(batches) - min(batches) <= 1


@given(order=orders())
@quick
def test_no_batch_is_a_small_remainder_where_there_are_rows_to_fill_it(order):
    buckets = buckets_of(order)
    for i, (lengths, batches) in enumerate(buckets):
        if len(batches) > 1:  # a bucket that is more than one batch has all its batches half full at least
            assert 2 * min(batches) >= order.batch_tokens // int(lengths[-1])
        elif i + 1 < len(buckets):  # a bucket that is one batch would not fit into it with the next row
            assert (len(lengths) + 1) * int(buckets[i + 1][0][0]) > order.batch_tokens


def test_a_far_longer_row_does_not_cut_short_rows_into_small_batches():
    order = TokenBatchOrder(np.array([1] * 900 + [1000]), 1000, 0)
    assert sorted(len(batch) for batch in epoch_of(order)) == [1, 900]


@given(order=orders())
@quick
def test_epochs_cut_the_same_sizes(order):
    shapes = [sorted(len(batch) for batch in epoch_of(order, epoch)) for epoch in range(3)]
    assert shapes[0] == shapes[1] == shapes[2]


def padding(batches: list[list[int]], lengths: np.ndarray) -> float:
    """Which part of the batches' tokens is padding."""
    whole = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / whole


@pytest.mark.parametrize("n_rows", [3000, 50_000])
def test_sentences_need_far_less_padding_than_in_batches_as_they_come(n_rows):
    draw = np.random.RandomState(0)
    lengths = np.clip(np.exp(draw.normal(3.3, 0.6, n_rows)).astype(np.int64), 2, 256)
    order = TokenBatchOrder(lengths, 4096, 1)
    rows = draw.permutation(n_rows).tolist()
    size = n_rows // order.epoch_length + 1
    as_they_come = [rows[i : i + size] for i in range(0, n_rows, size)]
    assert padding(epoch_of(order), lengths) < 0.06
    assert padding(as_they_come, lengths) > 0.5
    assert order.epoch_length < 1.4 * lengths.sum() / 4096  # of full batches without padding there would be as many


# --- the order of the batches


@given(order=orders(), positions=st.lists(st.integers(0, 300), max_size=12))
@quick
def test_the_batch_at_a_position_needs_none_before_it(order, positions):
    asked = {position: order.batch(position).tolist() for position in positions}
    for position in sorted(positions, reverse=True):
        assert again(order).batch(position).tolist() == order.batch(position).tolist() == asked[position]


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = np.arange(200) % 20 + 1
    both = [TokenBatchOrder(lengths, 60, seed) for seed in (1, 2)]
    epochs = [epoch_of(order, epoch) for order in both for epoch in range(2)]
    assert len({str(epoch) for epoch in epochs}) == 4
    # both what is together and when it comes
    assert len({str(sorted(sorted(batch) for batch in epoch)) for epoch in epochs}) == 4
    assert len({str([lengths[batch].max() for batch in epoch]) for epoch in epochs}) == 4


@given(order=orders(), epoch=st.integers(0, 4))
@quick
def test_the_same_seed_gives_the_same_order(order, epoch):
    assert epoch_of(again(order), epoch) == epoch_of(order, epoch)


@given(order=orders(shuffle=False), epoch=st.integers(0, 4))
@quick
def test_without_shuffling_rows_come_from_the_shortest_to_the_longest(order, epoch):
    rows = list(chain.from_iterable(epoch_of(order, epoch)))
    assert rows == sorted(range(len(rows)), key=lambda row: order.lengths[row])


def test_the_order_of_a_seed_stays_what_it_was():
    order = TokenBatchOrder(np.array([5, 3, 8, 1, 9, 2, 7, 4, 8, 8, 2, 3]), 16, 42)
    assert epoch_of(order) == FROZEN[0]
    assert epoch_of(order, 1) == FROZEN[1]


@given(order=orders())
@quick
def test_the_order_is_that_of_its_state(order):
    file = io.BytesIO()
    torch.save(order.state(), file)
    file.seek(0)
    restored = order_from(torch.load(file, weights_only=True))
    assert isinstance(restored, TokenBatchOrder)
    assert restored.epoch_length == order.epoch_length
    assert [epoch_of(restored, epoch) for epoch in range(2)] == [epoch_of(order, epoch) for epoch in range(2)]


def test_the_state_of_rows_gives_an_order_of_rows():
    for order in (RowOrder(9, 3), RowOrder(9, 3, True, np.arange(9), 2), RowOrder(9, 3, False)):
        restored = order_from(order.state())
        assert isinstance(restored, RowOrder)
        assert restored.rows(0, 20).tolist() == order.rows(0, 20).tolist()


# --- what each rank takes


@given(order=orders(), position=st.integers(0, 300), world_size=st.integers(1, 4))
@quick
def test_the_ranks_share_a_batch_evenly(order, position, world_size):
    shares = [order.share(position, 1, rank, world_size)[0].tolist() for rank in range(world_size)]
    whole = order.batch(position).tolist()
    own = [[] if share == [PADDING_ROW] else share for share in shares]
    assert sorted(chain.from_iterable(own)) == sorted(whole)
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert all(shares)  # a rank without rows has one that stands for none
    assert all(PADDING_ROW not in share for share in own)


@given(order=orders(), position=st.integers(0, 300), world_size=st.integers(1, 4))
@quick
def test_each_row_has_the_epoch_of_its_batch(order, position, world_size):
    for rank in range(world_size):
        rows, epochs = order.share(position, 1, rank, world_size)
        assert epochs.tolist() == [position // order.epoch_length] * len(rows)


def test_a_rank_without_rows_gets_exactly_the_row_that_stands_for_none():
    order = TokenBatchOrder(np.array([7, 7, 7]), 14, 0)
    assert sorted(len(batch) for batch in epoch_of(order)) == [1, 2]
    for position in range(2):
        n_rows = len(order.batch(position))
        shares = [order.share(position, 1, rank, 4)[0].tolist() for rank in range(4)]
        assert [share == [PADDING_ROW] for share in shares] == [rank >= n_rows for rank in range(4)]


@given(order=orders(), world_size=st.integers(1, 4), start=st.integers(0, 30))
@quick
def test_the_sampler_gives_one_batch_after_another(order, world_size, start):
    for rank in range(world_size):
        sampler = TrainingSampler(order, batch_size=1, rank=rank, world_size=world_size, start=start)
        expected = [order.share(start + step, 1, rank, world_size)[0].tolist() for step in range(5)]
        assert list(islice(sampler, 5)) == expected


@given(order=orders(), world_size=st.integers(1, 4), start=st.integers(0, 30), steps=st.integers(0, 8))
@quick
def test_a_replay_gives_the_digest_of_training(order, world_size, start, steps):
    for rank in range(world_size):
        digest = ""
        for step in range(steps):
            digest = extend_chain(digest, order.share(start + step, 1, rank, world_size)[0].tolist())
        span = {"start": start, "stop": start + steps}
        assert replay_chain(again(order), batch_size=1, rank=rank, world_size=world_size, **span) == digest


# --- what is wrong is named


def test_a_batch_that_cannot_hold_the_longest_row_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"batch_tokens \(8\) must hold the longest row, of 9 tokens; raise it, or lower"
    ):
        TokenBatchOrder(np.array([3, 9, 4]), 8, 0)
    assert TokenBatchOrder(np.array([3, 9, 4]), 9, 0).epoch_length == 2


def test_an_order_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="there are no training rows"):
        TokenBatchOrder(np.array([], dtype=np.int64), 8, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed \({seed}\) must be in"):
        TokenBatchOrder(np.array([3]), 8, seed)


def test_several_positions_for_one_micro_batch_are_refused():
    with pytest.raises(ValueError, match="takes one position of batches by tokens, not 2"):
        TokenBatchOrder(np.array([3]), 8, 0).share(0, 2, 0, 1)


# --- whole batches in evaluation


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[list[int], int]:
    """Rows in some order, and the size of a batch."""
    rows = draw(st.lists(st.integers(0, 99), max_size=60, unique=True))
    return rows, draw(st.integers(1, 9))


def dealt(rows: list[int], size: int, world_size: int) -> list[list[list[int]]]:
    """The batches of each rank."""
    options = {"batch_size": size, "world_size": world_size, "whole_batches": True}
    return [list(EvaluationSampler(rows, rank=rank, **options)) for rank in range(world_size)]


@given(evaluation=evaluations(), world_size=st.integers(1, 5))
@quick
def test_whole_batches_have_every_row_once(evaluation, world_size):
    rows, size = evaluation
    got = list(chain.from_iterable(chain.from_iterable(dealt(rows, size, world_size))))
    assert sorted(row for row in got if row != PADDING_ROW) == sorted(rows)
    assert got.count(PADDING_ROW) < world_size


@given(evaluation=evaluations(), world_size=st.integers(1, 5))
@quick
def test_whole_batches_are_the_same_on_any_number_of_ranks(evaluation, world_size):
    rows, size = evaluation
    together = list(chain.from_iterable(zip(*dealt(rows, size, world_size), strict=True)))
    alone = [rows[i : i + size] for i in range(0, len(rows), size)]
    assert together == alone + [[PADDING_ROW]] * (len(together) - len(alone))
    assert dealt(rows, size, 1)[0] == alone


@given(evaluation=evaluations(), world_size=st.integers(1, 5))
@quick
def test_all_ranks_have_equally_many_whole_batches(evaluation, world_size):
    rows, size = evaluation
    ranks = dealt(rows, size, world_size)
    assert {len(batches) for batches in ranks} == {-(-len(rows) // (size * world_size))}
    options = {"batch_size": size, "world_size": world_size, "whole_batches": True}
    assert [len(EvaluationSampler(rows, rank=rank, **options)) for rank in range(world_size)] == list(map(len, ranks))

"""Who is to blame is found from what ranks say, in whatever order it arrives."""

from __future__ import annotations

import pytest

from mhe_lightning.callbacks.judgement import Judge


def sign(moves: int, *, state: str = "running", position: str | None = None, text: str = "") -> dict:
    position = f"step {moves}" if position is None else position
    return {"name": None, "moves": moves, "position": position, "where": "somewhere", "state": state, "text": text}


def test_ranks_that_move_are_left_alone():
    judge = Judge(timeout=10)
    for moves in range(5):
        judge.hear(0, sign(moves))
        judge.hear(1, sign(0))
        assert judge.verdict(9) is None


def test_whoever_has_moved_least_is_to_blame():
    judge = Judge(timeout=10)
    for rank, moves in enumerate((7, 7, 5, 7)):
        judge.hear(rank, sign(moves))

    assert judge.verdict(9.5) is None
    verdict = judge.verdict(1)

    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("hung", (2,))
    assert verdict.text == "rank 2 has been in step 5 (somewhere) for 10 s; the others wait in step 7 (somewhere)"


def test_ranks_that_are_equally_far_are_all_told():
    judge = Judge(timeout=10)
    for rank in range(3):
        judge.hear(rank, sign(4))

    verdict = judge.verdict(10)

    assert verdict is not None
    assert verdict.ranks == (0, 1, 2)
    assert "none is behind the others: rank 0, 1, 2 in step 4" in verdict.text


def test_a_rank_that_has_ended_holds_up_nobody():
    judge = Judge(timeout=10)
    judge.hear(0, sign(9, state="ended"))
    judge.hear(1, sign(5))

    verdict = judge.verdict(10)

    assert verdict is not None
    assert verdict.ranks == (1,)
    judge.hear(1, None)
    judge.hear(1, sign(9, state="ended"))


def test_a_rank_that_ends_and_goes_is_not_missed():
    judge = Judge(timeout=10)
    judge.hear(0, sign(1))
    judge.hear(1, sign(1, state="ended"))
    judge.hear(1, None)

    assert judge.verdict(5) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_cause_is_told_whoever_is_heard_first(order):
    """Rank 1 fails by itself; rank 0 and 2 lose their connections."""
    judge = Judge(timeout=None)
    for rank in range(3):
        judge.hear(rank, sign(3))
    for rank in order:
        judge.hear(rank, sign(3, state="failed" if rank == 1 else "collateral", text=f"error of {rank}"))

    assert judge.verdict(0.5) is None
    verdict = judge.verdict(3)

    assert verdict is not None
    assert (verdict.kind, verdict.ranks, verdict.text) == ("failed", (1,), "rank 1 error of 1")


def test_a_rank_that_is_gone_is_the_cause_of_lost_connections():
    judge = Judge(timeout=None)
    judge.hear(0, sign(3))
    judge.hear(1, sign(3))
    judge.hear(0, sign(3, state="collateral", text="Connection closed by peer"))
    judge.hear(1, None)

    verdict = judge.verdict(2)

    assert verdict is not None
    assert (verdict.kind, verdict.ranks) == ("gone", (1,))


def test_ranks_that_were_all_terminated_end_in_peace():
    judge = Judge(timeout=None)
    for rank in range(2):
        judge.hear(rank, sign(3, state="terminated"))

    assert judge.verdict(100) is None


def test_ranks_that_were_terminated_may_disappear():
    judge = Judge(timeout=None)
    judge.hear(0, sign(3, state="terminated"))
    judge.hear(1, sign(3))
    judge.hear(1, None)

    assert judge.verdict(10) is None


def test_a_rank_that_was_terminated_alone_takes_the_others_along():
    judge = Judge(timeout=None)
    judge.hear(0, sign(3))
    judge.hear(1, sign(3, state="terminated", text="was terminated"))

    assert judge.verdict(10) is None
    verdict = judge.verdict(10)

    assert verdict is not None
    assert verdict.kind == "terminated"

"""The line between rank 0 and the others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mhe_lightning.callbacks.heartbeats import Hub, Line


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(["127.0.0.1"])
    yield hub
    hub.close()


def heard(end: Hub | Line, count: int) -> list:
    """The next ``count`` things that are said."""
    found: list = []
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found += end.hear(0.2)
    return found


def test_both_ends_hear_each_other_in_order(hub):
    lines = [Line(hub.address, rank) for rank in (1, 2)]
    for line in lines:
        line.tell({"moves": 1})
        line.tell({"moves": 2})

    assert sorted(heard(hub, 4), key=str) == [
        (1, {"moves": 1}),
        (1, {"moves": 2}),
        (2, {"moves": 1}),
        (2, {"moves": 2}),
    ]
    hub.tell({"verdict": "over"})
    for line in lines:
        assert heard(line, 1) == [(0, {"verdict": "over"})]
        line.close()
    assert sorted(heard(hub, 2)) == [(1, None), (2, None)]


def test_the_line_of_a_process_that_is_gone_is_cut_though_its_children_live(hub):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        line = Line(hub.address, 1)
        line.tell({"moves": 1})
        if os.fork() == 0:  # a data worker
            os.close(writing)
            os.read(reading, 1)
        os._exit(0)
    os.waitpid(child, 0)
    found = heard(hub, 2)
    os.close(reading)
    os.close(writing)  # the worker may go
    assert found == [(1, {"moves": 1}), (1, None)]


def test_strangers_are_not_heard(hub):
    stranger = Line(replace(hub.address, token="guessed"), 1)
    noise = socket.create_connection(("127.0.0.1", hub.address.port))
    noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
    for _ in range(5):
        stranger.tell({"moves": 1})
        assert hub.hear(0.1) == []


def test_the_second_host_is_tried_where_the_first_is_not_rank_0(hub):
    line = Line(replace(hub.address, hosts=("host.invalid", "127.0.0.1")), 1)
    line.tell({"moves": 1})

    assert heard(hub, 1) == [(1, {"moves": 1})]


def test_another_thread_ends_the_wait(hub):
    hub.wake()
    begun = time.monotonic()
    hub.hear(10)

    assert time.monotonic() - begun < 5

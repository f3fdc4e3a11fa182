"""A line of its own between rank 0 and every other rank, beside the process group, whose calls may be what hangs.

Sockets rather than a store: when a process dies, however it does, its end of the line closes at once.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""What a rank says: plain data, a line of JSON."""

LONGEST = 1 << 16
"""Bytes of a message; who sends more is none of ours."""


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens.

    Args:
        hosts: its names and addresses, to be tried in turn.
        port: on all of them.
        token: what the other ranks show, so that nobody else is heard.
    """

    hosts: Sequence[str]
    port: int
    token: str


class Hub:
    """Rank 0's end of all lines.

    Args:
        hosts: names and addresses under which the other ranks may reach this one, the likeliest first.
        port: to listen on; 0 takes a free one.
    """

    def __init__(self, hosts: Sequence[str], port: int = 0) -> None:
        local = all(host in ("localhost", "127.0.0.1") for host in hosts)
        self._server = socket.create_server(("127.0.0.1" if local else "", port), backlog=1024)
        self._server.setblocking(False)
        self._selector = _Selector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}
        self.address = Address(tuple(hosts), self._server.getsockname()[1], secrets.token_hex(16))
        _OPEN.add(self)

    def hear(self, seconds: float) -> list[tuple[int, Message | None]]:
        """What arrives within ``seconds``, with the rank that says it; None where a rank's line was cut."""
        heard: list[tuple[int, Message | None]] = []
        for ready in self._selector.ready(seconds):
            if ready is self._server:
                self._accept()
            else:
                heard += self._read(self._peers[ready])
        return heard

    def wake(self) -> None:
        """End the `hear` of another thread now."""
        self._selector.wake()

    def tell(self, message: Message) -> None:
        """Say something to all ranks that are there."""
        for peer in list(self._peers.values()):
            _send(peer.socket, message)

    def close(self) -> None:
        """Close this process's end; also in a forked child, without a word to the others."""
        for each in (*self._peers, self._server):
            each.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # gone again
            return
        _keep_alive(connection)
        self._peers[connection] = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, peer: _Peer) -> list[tuple[int, Message | None]]:
        heard: list[tuple[int, Message | None]] = []
        for message in peer.read():
            if message is None:
                self._selector.unregister(peer.socket)
                del self._peers[peer.socket]
                peer.socket.close()
                if peer.rank is not None:
                    heard.append((peer.rank, None))
            elif peer.rank is not None:
                heard.append((peer.rank, message))
            elif secrets.compare_digest(str(message.get("token")), self.address.token):
                peer.rank = int(message["rank"])
            else:
                peer.cut = True
        return heard


class Line:
    """Another rank's end of its line to rank 0.

    Args:
        address: of rank 0.
        rank: of this process.
        seconds: to wait for each of the hosts.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, address: Address, rank: int, seconds: float = 10.0) -> None:
        self._peer = _Peer(_connect(address, seconds), rank=0)
        _send(self._peer.socket, {"token": address.token, "rank": rank})
        self._selector = _Selector()
        self._selector.register(self._peer.socket, selectors.EVENT_READ)
        _OPEN.add(self)

    def hear(self, seconds: float) -> list[tuple[int, Message | None]]:
        """What rank 0 says within ``seconds``; None when the line was cut."""
        return [(0, message) for _ in self._selector.ready(seconds) for message in self._peer.read()]

    def wake(self) -> None:
        """End the `hear` of another thread now."""
        self._selector.wake()

    def tell(self, message: Message) -> None:
        """Say something to rank 0."""
        _send(self._peer.socket, message)

    def close(self) -> None:
        """Close this process's end; also in a forked child, without a word to the others."""
        self._peer.socket.close()
        self._selector.close()


class _Selector(selectors.DefaultSelector):
    """Waits for sockets, and for another thread's call."""

    def __init__(self) -> None:
        super().__init__()
        self._sleeper, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self.register(self._sleeper, selectors.EVENT_READ)

    def ready(self, seconds: float) -> list[socket.socket]:
        sockets = [key.fileobj for key, _ in self.select(seconds)]
        if self._sleeper in sockets:
            self._sleeper.recv(1024)
        return [each for each in sockets if isinstance(each, socket.socket) and each is not self._sleeper]

    def wake(self) -> None:
        with suppress(OSError):  # full, which wakes as well, or closed
            self._waker.send(b" ")

    def close(self) -> None:
        super().close()
        self._sleeper.close()
        self._waker.close()


@dataclass
class _Peer:
    socket: socket.socket
    rank: int | None = None
    cut: bool = False
    _rest: bytes = field(default=b"", repr=False)

    def read(self) -> list[Message | None]:
        """The whole messages that are there, and None at the end of all."""
        try:
            data = self.socket.recv(LONGEST)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found: list[Message | None] = []
        try:
            found += [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            self.cut = True
        if not data or self.cut or len(self._rest) > LONGEST:
            found.append(None)
        return found


def _send(connection: socket.socket, message: Message) -> None:
    with suppress(OSError):  # whoever was there is gone, which is seen when listening
        connection.sendall(json.dumps(message).encode() + b"\n")


def _connect(address: Address, seconds: float) -> socket.socket:
    failure: OSError | None = None
    for host in address.hosts:
        try:
            connection = socket.create_connection((host, address.port), timeout=seconds)
        except OSError as error:
            failure = error
            continue
        _keep_alive(connection)
        return connection
    raise failure or OSError("rank 0 has no address")


def _keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute that the other host is gone, and never wait longer to say something."""
    connection.settimeout(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


_OPEN: weakref.WeakSet[Hub | Line] = weakref.WeakSet()


def _close_in_child() -> None:
    """A data worker that outlives its killed parent must not hold the parent's line open."""
    for end in list(_OPEN):
        end.close()


os.register_at_fork(after_in_child=_close_in_child)

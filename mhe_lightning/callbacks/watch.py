"""The thread that watches over a run beside its main thread, and takes the process down when the run is lost."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

from mhe_lightning.callbacks.heartbeats import Hub, Line
from mhe_lightning.callbacks.judgement import Judge, Verdict

INTERVAL = 0.5
"""Seconds between two looks."""

GRACE = 3.0
"""Seconds that a main thread has to notice by itself what has happened; its own error tells most."""

ENDING = 20.0
"""Seconds that a main thread has to end after its error."""

LATEST = 60.0
"""Seconds after which the process ends whatever it waits for, such as a file system that is gone."""

STDERR = 2

EXIT_CODES = {"terminated": 143}
"""By kind of verdict, where it is not 1."""


class Watch(threading.Thread):
    """Tells the other ranks what this one does, and ends the process when the run cannot go on.

    Args:
        name: rank, host and process, for people.
        rank: of this process.
        link: to the other ranks; None where there are none, or none can be reached.
        timeout: seconds without any movement after which the run is hung; None: never.
        log: file to which verdicts and stacks are added; None: standard error.
        speaks: whether this process prints verdicts that are not about itself.
    """

    def __init__(
        self, *, name: str, rank: int, link: Hub | Line | None, timeout: float | None, log: Path | None, speaks: bool
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank = rank
        self.verdict: Verdict | None = None
        self._title = name
        self._link = link
        self._hub = link if isinstance(link, Hub) else None
        self._timeout = timeout
        self._log = log
        self._speaks = speaks
        # rank 0 sees all ranks and speaks for them; another one's own clock is for the case that it cannot
        self._judge = Judge(timeout if timeout is None or not isinstance(link, Line) else timeout + LATEST / 2)
        self._main = threading.get_ident()
        self._moves = 0
        self._position = "starting up"
        self._actions: list[str] = []
        self._state: Literal["running", "failed", "collateral", "terminated", "ended"] = "running"
        self._text = ""
        self._stop_asked = threading.Event()
        self._told = threading.Event()
        self._decided = threading.Event()

    # Called by the main thread

    def mark(self, position: str) -> None:
        """The main thread has moved on to ``position``."""
        self._position = position
        self._moves += 1

    def mark_micro_batch(self, number: int, position: str) -> None:
        """As `mark`, at a place where ranks are equally far, whatever they did before: they evaluate different rows."""
        self._moves = number << 20
        self.mark(position)

    def mark_action(self, name: str, begins: bool) -> None:
        """The main thread begins to do something, or has done it."""
        if begins:
            self._actions.append(name)
            self._moves += 1
        elif self._actions:  # the first to end began before anyone listened
            self._actions.pop()

    def fail(self, kind: Literal["failed", "collateral", "terminated"], text: str, seconds: float = 0.0) -> None:
        """The main thread ends with an error. The process ends soon after, also where the main thread gets stuck.

        Args:
            kind: "collateral" where the error came from the loss of another rank.
            text: what has happened, for people.
            seconds: to wait for the verdict on all ranks.
        """
        self._text = text
        self._state = kind
        link = self._link
        if link is not None:
            link.wake()
            self._told.wait(INTERVAL)  # a process that ends without a word would count as lost
            self._decided.wait(seconds)

    def end(self) -> None:
        """All is well and over."""
        if self._state == "running":
            self._state = "ended"
        self._stop_asked.set()
        link = self._link
        if link is not None:
            link.wake()
        self.join(GRACE)

    # The thread

    def run(self) -> None:
        before = rearmed = time.monotonic()
        self._arm()
        while not self._stop_asked.is_set():
            self._look()
            now = time.monotonic()
            # a process that was stopped for a while, as schedulers do, was not hung
            verdict = self.verdict or self._own_verdict(min(now - before, 10 * INTERVAL))
            if verdict is not None:
                self._take_down(verdict)
            before = now
            if now - rearmed > LATEST / 6:
                self._arm()
                rearmed = now
        if self._timeout is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._link is not None:
            self._link.tell(self._sign())
            self._link.close()

    def _arm(self) -> None:
        """Should this thread itself be kept from running, by a call that never gives back Python's lock."""
        if self._timeout is not None:
            faulthandler.dump_traceback_later(self._timeout + LATEST, exit=True, file=STDERR)

    def _own_verdict(self, elapsed: float) -> Verdict | None:
        """What this process finds by itself: all that rank 0 finds, for it hears all, and another what it must."""
        verdict = self._judge.verdict(elapsed)
        if isinstance(self._link, Line) and verdict is not None and verdict.kind != "hung":
            return None  # rank 0 is there to say
        return verdict

    def _look(self) -> None:
        sign = self._sign()
        self._judge.hear(self.rank, sign)
        if self._link is None:
            self._stop_asked.wait(INTERVAL)
            return
        self._link.tell(sign)
        state, deadline = sign["state"], time.monotonic() + INTERVAL
        if state != "running":
            self._told.set()
        while (left := deadline - time.monotonic()) > 0 and self._link is not None:
            for rank, message in self._link.hear(left):
                self._take(rank, message)
            if self._stop_asked.is_set() or self._state != state:
                return

    def _take(self, rank: int, message: Any) -> None:
        if message is not None and "verdict" in message:
            kind, ranks, text = message["verdict"]
            self.verdict = Verdict(kind, tuple(ranks), text)
            return
        self._judge.hear(rank, message)
        if self._hub is None and (message is None or message["state"] == "ended") and self._link is not None:
            self._link.close()  # this rank goes on alone
            self._link = None

    def _sign(self) -> dict[str, Any]:
        return {
            "name": self._title,
            "moves": self._moves,
            "position": self._position,
            "where": ", ".join([*self._actions[-1:], _where(sys._current_frames().get(self._main))]),
            "state": self._state,
            "text": self._text,
        }

    def _take_down(self, verdict: Verdict) -> None:
        # from here on the process ends, whatever a write or the main thread waits for
        faulthandler.dump_traceback_later(LATEST, exit=True, file=STDERR)
        if self._hub is not None:
            self._hub.tell({"verdict": [verdict.kind, verdict.ranks, verdict.text]})
        self.verdict = verdict
        with suppress(OSError):  # a full disk, a terminal that is gone
            self._report(verdict)
        self._decided.set()
        if verdict.kind != "hung":
            self._stop_asked.wait(GRACE)
            if self._state != "running":
                self._stop_asked.wait(ENDING)
        else:
            time.sleep(2 * INTERVAL)  # the others must have heard it before their line is cut
        for worker in multiprocessing.active_children():
            worker.kill()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(EXIT_CODES.get(verdict.kind, 1))

    def _report(self, verdict: Verdict) -> None:
        with ExitStack() as held:
            log: int | TextIO = STDERR
            if self._log is not None:
                log = held.enter_context(open(self._log, "a", encoding="utf-8"))
                print(verdict.text, file=log, flush=True)
            if verdict.kind == "hung":
                faulthandler.dump_traceback(log, all_threads=True)
        if self._speaks or self.rank in verdict.ranks:
            more = "" if self._log is None else f"; see {self._log}"
            print(verdict.text + more, file=sys.stderr, flush=True)


def _where(frame: FrameType | None) -> str:
    if frame is None:
        return "no Python code"
    folder, name = os.path.split(frame.f_code.co_filename)
    return f"{os.path.basename(folder)}/{name}:{frame.f_lineno} {frame.f_code.co_name}"

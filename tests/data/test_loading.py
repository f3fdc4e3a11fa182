"""Data workers end with their trainer, and what killed one is told."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from mhe_lightning.data.loading import Loader, dead_worker, heed_parent_only


class Slow(Dataset):
    """Row i is i, after a while."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> int:
        time.sleep(0.02)
        return row


def loader() -> Loader:
    return Loader(Slow(), batch_size=2, num_workers=2, worker_init_fn=heed_parent_only)


def workers_of(iterator) -> list[int]:
    return [worker.pid for worker in iterator._workers]


def sent_by_another(number: int, pids: list[int]) -> None:
    child = os.fork()
    if child == 0:
        for pid in pids:
            os.kill(pid, number)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_from_others_do_not_end_a_worker(number):
    batches = iter(loader())
    rows = next(batches).tolist()
    sent_by_another(number, workers_of(batches))
    for batch in batches:
        rows += batch.tolist()
    assert rows == list(range(12))


def test_a_signal_before_a_worker_has_begun_does_not_end_it():
    batches = iter(loader())
    sent_by_another(signal.SIGTERM, workers_of(batches))
    assert torch.cat(list(batches)).tolist() == list(range(12))


def test_a_trainer_can_end_its_workers():
    batches = iter(loader())
    next(batches)
    workers = batches._workers
    for worker in workers:
        worker.terminate()
        worker.join(5)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_the_trainers_own_signals_are_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches = iter(loader())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    next(batches)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "was killed by signal: Killed; most likely the host ran out of memory"),
        (signal.SIGBUS, "was killed by signal: Bus error; most likely /dev/shm is full"),
        (signal.SIGSEGV, "was killed by signal: Segmentation fault; a library in it has crashed"),
    ],
)
def test_a_killed_worker_is_told_with_a_reason_and_a_remedy(number, told):
    batches = iter(loader())
    worker = workers_of(batches)[0]

    def kill_and_go_on():
        os.kill(worker, number)
        list(batches)

    with pytest.raises(RuntimeError) as error:
        kill_and_go_on()

    text = dead_worker(error.value)
    assert text.startswith(f"data worker {worker} {told}")
    assert text.endswith("the newest checkpoint stays: go on with --ckpt_path auto")


def test_a_worker_that_ended_by_itself_is_told():
    error = RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly")
    assert dead_worker(error).startswith("data worker 12, 13 has ended by itself")


def test_other_errors_are_not_of_workers():
    assert dead_worker(RuntimeError("shapes differ")) is None

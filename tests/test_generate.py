"""The verb `generate`: one text as it comes, several whole, an interrupt, and a reader that goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

TOKENS = ["--max_new_tokens", "12", "--temperature", "1.5"]


@pytest.fixture
def run(command, tiny_config, tmp_path):
    """A run of one step."""
    code, _, err = command("fit", "--config", str(tiny_config(trainer={"max_steps": 1})))
    assert code == 0, err
    return str(tmp_path / "runs/tiny")


def test_the_text_of_one_prompt_is_that_of_the_same_prompt_among_others(run, command):
    code, alone, err = command("generate", run, "--prompt", "the cat", *TOKENS)
    assert code == 0, err
    _, among, _ = command("generate", run, "--prompt", "the cat", "a", *TOKENS)
    assert among.startswith(alone)
    assert len(alone) > len("the cat\n")


def test_the_text_of_one_prompt_is_flushed_piece_by_piece(run, command, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *what, end="\n", flush: pieces.append("".join(what) + end))
    command("generate", run, "--prompt", "the cat", *TOKENS)
    assert len(pieces) > 4
    monkeypatch.undo()
    assert "".join(pieces) == command("generate", run, "--prompt", "the cat", *TOKENS)[1]


@pytest.mark.parametrize("prompts", [["the cat"], ["the cat", "the cat"]], ids=["one", "two"])
def test_texts_end_before_a_stop(run, command, prompts):
    _, whole, _ = command("generate", run, "--prompt", "the cat", *TOKENS)
    stop = whole[len("the cat") + 3 :][:2]
    code, out, err = command("generate", run, "--prompt", *prompts, "--stop", stop, "never there", *TOKENS)
    assert code == 0, err
    new = whole.removeprefix("the cat")
    assert out.splitlines()[0] == "the cat" + new[: new.index(stop)]


def test_fixed_shapes_give_the_same_text(run, command):
    _, growing, _ = command("generate", run, "--prompt", "the cat", *TOKENS)
    assert command("generate", run, "--prompt", "the cat", "--static", "true", *TOKENS)[1] == growing


def test_a_refused_setting_prints_no_beginning_of_a_text(run, command):
    code, out, err = command("generate", run, "--prompt", "the cat", "--top_p", "2")
    assert (code, out) == (2, "")
    assert "top_p (2.0) must be in (0, 1]" in err
    assert command("generate", run, "--prompt", "the cat", "--stop", "")[0] == 2


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
import mhe_lightning.verbs.generate as verb
from mhe_lightning.cli import main
fast = verb.stream_text
def slow(*args, **settings):
    for pieces in fast(*args, **settings):
        yield pieces
        time.sleep(0.2)
verb.stream_text = slow
main(["generate", *sys.argv[1:]])
"""


@pytest.fixture
def slow_process(run):
    """The verb in a process of its own, with a pause after each token; what it has printed is read from a pipe."""
    words = [sys.executable, "-c", SLOW, run, "--prompt", "the cat", "--max_new_tokens", "12", "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_what_was_printed_stays(slow_process):
    begun = os.read(slow_process.stdout.fileno(), 1000)  # as soon as anything is there
    slow_process.send_signal(signal.SIGINT)
    rest, err = slow_process.communicate(timeout=30)
    assert slow_process.returncode == 130
    assert begun.startswith(b"the cat")
    assert not rest.endswith(b"\n")
    assert err.strip() == b"interrupted"


@pytest.mark.slow
def test_a_reader_that_goes_ends_it_quietly(slow_process):
    os.read(slow_process.stdout.fileno(), 1000)
    slow_process.stdout.close()
    assert slow_process.wait(timeout=30) == 0
    assert slow_process.stderr.read() == b""

"""The memory that is predicted for a training step, against what a process that trains really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOLERANCE = 0.15

EXPERIMENTS = {
    "decoder": [
        "--config=configs/experiment/tiny_wikitext2.yaml",
        "--model.net.n_layers=6",
        "--data.corpus.tokenizer_size=8192",
    ],
    "encoder": [
        "--config=configs/experiment/tiny_encoder_books.yaml",
        "--model.net.n_layers=6",
        "--model.net.max_length=128",
        "--data.block_length=128",
        "--data.batch_size=16",
        "--data.corpus.tokenizer_size=8192",
    ],
    "encoder-decoder": [
        "--config=configs/experiment/tiny_multi30k.yaml",
        "--model.net.n_layers=3",
        "--model.net.ff_width=1024",
        "--data.tokenizer_size=8192",
        "--data.batch_tokens=2048",
    ],
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_the_predicted_memory_is_that_of_a_process_that_trains(kind, checkpointing):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "measure_step.py"),
            *EXPERIMENTS[kind],
            "--model.net.width=256",
            f"--model.activation_checkpointing={checkpointing}",
        ],
        cwd=ROOT,
        # glibc otherwise keeps what was freed, in pieces of up to 32 MiB, and takes more where these do not fit
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] / found["measured"] == pytest.approx(1, abs=TOLERANCE), found

"""The benchmark of decoding runs, compares like with like, and says what caches hold."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from mhe_lightning.models import Decoder, generate

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--threads", "1", "--rounds", "2", "--width", "64", "--layers", "2", "--heads", "4", "--vocab", "300"]


@pytest.fixture(scope="module")
def decode():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("decode_benchmark", BENCHMARKS / "decode.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look their annotations up there
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("decode_benchmark", None)
        sys.modules.pop("common", None)


def run(decode, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["decode.py", *SMALL, *arguments])
    decode.main()


def test_peers_and_ours_are_timed_on_the_same_work_and_written_down(decode, monkeypatch, tmp_path, capsys):
    out = tmp_path / "decode.json"
    run(decode, monkeypatch, "--shapes", "3x20x12", "--peers", "gpt2", "gpt_bigcode", "--out", str(out))
    assert "mha: 0 of 3 rows unlike gpt2" in capsys.readouterr().out
    rows = json.loads(out.read_text())["shapes"]["3 × (20 + 12)"]["candidates"]
    cached = {name: row["cached_numbers_per_token"] for name, row in rows.items()}
    assert cached["mha"] == cached["gpt2"] == 2 * 2 * 64
    for name in ("mhe_add", "mhe_mul", "mqa", "gpt_bigcode"):
        assert cached["mha"] == 4 * cached[name]
    assert all(row["times_gpt2"]["median"] > 0 for row in rows.values())
    assert "| mhe_add |" in out.with_suffix(".md").read_text()


def test_all_ways_are_timed_on_prompts_of_different_lengths(decode, monkeypatch, capsys):
    arguments = "--shapes 4x20x6 --peers --ragged --attention mhe_add --ways growing static text"
    run(decode, monkeypatch, *arguments.split())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mhe")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "mhe_add growing",
        "mhe_add static",
        "mhe_add text",
    ]


def test_a_token_that_is_not_gpt2s_is_noticed(decode):
    net = Decoder(50, decode.ATTENTIONS["mha"], width=8, n_heads=2, n_layers=1, max_length=9).eval()
    prompts = torch.tensor([[1, 2, 3]])
    own = torch.tensor(generate(net, prompts.tolist(), max_new_tokens=4, temperature=0))
    assert decode.check_same(net, prompts, own, own) == 0
    with pytest.raises(RuntimeError, match="row 0 differs from GPT-2's at new token 2"):
        decode.check_same(net, prompts, own, torch.where(torch.arange(4) == 2, (own + 1) % 50, own))

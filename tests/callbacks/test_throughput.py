"""What a run says of its speed: the share of the device's matrix rate that it uses."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from conftest import logged
from mhe_lightning.attention import MHA, MHE
from mhe_lightning.callbacks import Throughput, throughput
from mhe_lightning.callbacks.matrix_rate import computing_dtype, matrix_rate
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.tasks import LanguageModeling, MaskedLanguageModeling, Translation
from mhe_lightning.tracing import Step, forward_flops_per_token

SIZES = {"width": 16, "n_heads": 2, "n_layers": 2, "max_length": 16}
IDS = torch.zeros(1, 16, dtype=torch.long)
CASES = {
    "decoder": (
        lambda: LanguageModeling(Decoder(50, MHE, **SIZES), 1),
        {"tokens": IDS, "targets": IDS},
        16,
    ),
    "encoder": (
        lambda: MaskedLanguageModeling(Encoder(50, partial(MHA, dropout=0.1), **SIZES), 1),
        {"tokens": IDS, "targets": IDS, "masked": torch.arange(4)},
        16,
    ),
    "encoder-decoder": (
        lambda: Translation(EncoderDecoder(50, MHA, **SIZES), 1, tokenizer=object(), end_token=0),
        {"tokens": IDS, "target_tokens": IDS, "targets": IDS, "rows": torch.arange(1)},
        32,
    ),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_operations_per_token_are_those_of_the_plan(case):
    make, batch, tokens = CASES[case]
    assert forward_flops_per_token(make(), batch) == Step(make, batch).flops().forward / tokens


@cases
def test_a_model_without_memory_has_the_same_operations(case):
    make, batch, _ = CASES[case]
    with torch.device("meta"):
        empty = make()
    assert forward_flops_per_token(empty, batch) == forward_flops_per_token(make(), batch)


def test_counting_leaves_the_task_as_it_was():
    make, batch, _ = CASES["decoder"]
    task = make().eval()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    random = torch.get_rng_state()
    forward_flops_per_token(task, batch)
    assert not task.training
    assert not task._window
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_rate_is_measured_once_and_draws_no_random_numbers():
    matrix_rate.cache_clear()
    random = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
    assert matrix_rate(torch.device("cpu"), torch.float32) == rate
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_the_rate_is_of_the_dtype_that_is_multiplied_in(precision, dtype):
    assert computing_dtype(precision) == dtype


def test_a_run_logs_and_records_its_utilisation(command, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: 1e9)
    net = {"attention": {"class_path": "mhe_lightning.attention.MHA"}}
    path = str(tiny_config(net=net, trainer={"max_steps": 4, "log_every_n_steps": 2}))
    code, _, _ = command("fit", "--config", path)
    assert code == 0
    run = tmp_path / "runs" / "tiny"
    speeds, shares = (logged(run, name) for name in ("tokens_per_second", "mfu"))
    assert list(shares) == [2, 4]
    per_token = {float(shares[step]) * 1e9 / float(speeds[step]) for step in shares}
    results = json.loads((run / "results.json").read_text())
    per_token.add(results["mfu"] * 1e9 / results["tokens_per_second"])
    layers, length, width = 2, 16, 16
    vocabulary = results["parameters"]["embeddings"] // width - length
    # the projections, the feed-forward layer, scores and values over all of a row, and the logits
    products = layers * (4 * width**2 + 2 * width * 4 * width + 2 * length * width) + vocabulary * width
    for found in per_token:
        assert found == pytest.approx(3 * 2 * products, rel=1e-3)


def test_without_operations_nothing_is_measured_or_logged(monkeypatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: pytest.fail("measured"))
    assert Throughput().mfu(1000.0) is None

"""`plan`: what an experiment will cost, without data and without training."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mhe_lightning.experiment import Experiments
from mhe_lightning.planning import Experiment

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / "configs" / "attention"
PEAK, MFU = 100.0, 0.5


@pytest.fixture
def config(tiny_config, tmp_path, monkeypatch) -> Path:
    """A tiny experiment whose data are nowhere, in a folder with overlays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(OVERLAYS, tmp_path / "configs" / "attention")
    return tiny_config(data={"corpus": {"path": "nowhere", "tokenizer_size": 300}, "cache_dir": str(tmp_path / "none")})


@pytest.fixture
def plan(command, config):
    """Runs `plan` and gives what it records; refuses an error."""

    def run(*args: str, attentions=("mha", "mhe_add", "sha")) -> dict:
        code, out, err = command("plan", "--config", str(config), "--attentions", *attentions, "--json", "-", *args)
        assert code == 0, err
        return json.loads(out)

    return run


def test_the_tables_show_weights_and_biases_apart_and_ratios_to_both_references(command, config):
    code, out, err = command("plan", "--config", str(config), "--attentions", "mhe_add", "--no_trace")
    assert code == 0, err
    lines = out.splitlines()
    at = lines.index("Attention parameters, weights and biases apart")
    for title in ("QKV weights", "output weights", "× mha", "× sha", "biases"):
        assert title in lines[at + 2]
    n, d, L = 2, 8, 2
    weights = {"mha": L * 4 * (n * d) ** 2, "sha": L * (3 * n * d**2 + (n * d) ** 2)}
    weights["mhe_add"] = weights["sha"] + L * 3 * n * d
    biases = {"mha": L * 4 * n * d, "sha": L * (3 * d + n * d), "mhe_add": L * (3 * d + n * d)}
    rows = {cells[0]: cells for cells in map(str.split, lines[at + 4 : at + 7])}
    for name, cells in rows.items():
        ratios = [f"{weights[name] / weights[other]:.3f}" for other in ("mha", "sha")]
        assert cells[3:] == [f"{weights[name]:,}", *ratios, f"{biases[name]:,}"]
    assert set(rows) == {"mha", "mhe_add", "sha"}


def test_all_overlays_are_planned_if_none_are_named(command, config):
    code, out, err = command("plan", "--config", str(config), "--no_trace", "--json", "-")
    assert code == 0, err
    assert set(json.loads(out)["variants"]) == {path.stem for path in OVERLAYS.glob("*.yaml")}


def test_the_record_has_the_parameters_of_the_net_that_is_built(plan, config):
    found = plan("--no_trace")["variants"]
    experiments = Experiments()
    for name, cost in found.items():
        arguments = ["--config", str(config), f"--model.net.attention={OVERLAYS / name}.yaml"]
        task = Experiment(experiments.parse(arguments)).make_task()
        assert cost["total"] == sum(p.numel() for p in task.parameters())
        assert cost["attention_biases"] == sum(
            p.numel() for key, p in task.named_parameters() if ".attention." in key and key.endswith("bias")
        )


def test_without_a_trace_there_are_no_operations_memory_and_time(plan):
    for cost in plan("--no_trace", "--peak_tflops", "100")["variants"].values():
        assert cost["forward_flops_per_token"] is cost["training_flops_per_token"] is cost["memory_bytes"] is None
        assert cost["cache_numbers"]["per_token"] > 0


def test_the_csv_file_and_the_tables_have_the_records_numbers(command, config, tmp_path):
    options = ["--attentions", "mha", "sha", "--peak_tflops", str(PEAK), "--mfu", str(MFU)]
    files = ["--json", str(tmp_path / "plan.json"), "--csv", str(tmp_path / "plan.csv")]
    code, out, err = command("plan", "--config", str(config), *options, *files)
    assert code == 0, err
    record = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    with open(tmp_path / "plan.csv", encoding="utf-8", newline="") as file:
        rows = {row["attention"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(record["variants"])
    tokens = record["schedule"]["tokens"]
    assert tokens == 8 * 8 * 16  # steps, rows, tokens of a row
    for name, cost in record["variants"].items():
        row = {key: float(value) for key, value in rows[name].items() if key != "attention"}
        assert row["parameters by part: total"] == cost["total"]
        assert row["attention parameters: biases"] == cost["attention_biases"]
        assert row["flops per token: training"] == cost["training_flops_per_token"]
        assert row["memory of a training step: total, MiB"] == cost["memory_bytes"]["total"] / 2**20
        rate = PEAK * 1e12 * MFU / cost["training_flops_per_token"]
        assert row["time: tokens/s"] == pytest.approx(rate)
        assert row["time: days"] == pytest.approx(tokens / rate / 86_400)
    assert f"{round(rate):,}" in out  # of the last variant


def test_the_cache_is_sized_for_a_batch_a_context_and_a_dtype(command, config, tmp_path):
    options = ["--attentions", "mha", "--batch", "3", "--context", "1000", "--cache_dtype", "fp16", "--no_trace"]
    code, _, err = command("plan", "--config", str(config), *options, "--csv", str(tmp_path / "plan.csv"))
    assert code == 0, err
    with open(tmp_path / "plan.csv", encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    numbers = 2 * 16 * 2  # keys and values, their width, layers
    assert int(row["kv cache of all layers: bytes per token"]) == 2 * numbers
    size = row["kv cache of all layers: 3 × 1,000 tokens, MiB"]
    assert float(size) == pytest.approx(3 * 1000 * 2 * numbers / 2**20)


def test_ranks_of_data_parallelism_hold_everything_and_buckets(plan):
    alone = plan("--data.batch_size=1", attentions=["mha"])["variants"]["mha"]["memory_bytes"]
    ranks = plan("--data.batch_size=8", "--world_size=8", "--trainer.strategy=ddp", attentions=["mha"])
    memory = ranks["variants"]["mha"]["memory_bytes"]
    assert memory["communication"] == memory["gradients"]
    assert {**memory, "communication": 0, "total": memory["total"] - memory["gradients"]} == alone
    assert ranks["schedule"]["strategy"] == "ddp"


@pytest.mark.parametrize("strategy", ["fsdp", "lightning.pytorch.strategies.ModelParallelStrategy"])
def test_ranks_of_a_sharded_model_hold_their_parts(strategy, plan):
    whole = plan(attentions=["mha"])["variants"]["mha"]
    shared = plan("--world_size=8", f"--trainer.strategy={strategy}", attentions=["mha"])["variants"]["mha"]
    for part in ("weights", "gradients", "optimizer"):
        row = whole["memory_bytes"][part] // whole["total"] * 16  # of the embedding of 300 tokens: FSDP2 adds 4 of them
        assert shared["memory_bytes"][part] == (whole["memory_bytes"][part] + 4 * row) // 8
    assert shared["memory_bytes"]["communication"] > 0
    assert shared["total"] == whole["total"]


def test_a_sharded_strategys_sizes_lay_the_processes_out(plan):
    strategy = ["--trainer.strategy=mhe_lightning.strategies.Sharded", "--world_size=16"]
    sizes = ["--trainer.strategy.shard=4", "--trainer.strategy.tensor_parallel=2", "--data.batch_size=8"]
    whole = plan("--data.batch_size=1", attentions=["mhe_add"])["variants"]["mhe_add"]
    record = plan(*strategy, *sizes, attentions=["mhe_add"])
    assert record["schedule"]["layout"] == {"replicas": 2, "shards": 4, "parts": 2, "sharded": True}
    cost = record["variants"]["mhe_add"]
    for part in (
        "weights",
        "gradients",
        "optimizer",
    ):  # shards of what the parts have: blocks in halves, embeddings whole
        assert whole["memory_bytes"][part] / 8 < cost["memory_bytes"][part] < whole["memory_bytes"][part] / 4
    assert cost["training_flops_per_token"] == whole["training_flops_per_token"]
    sent = cost["communication"]["collectives"]
    assert {(one["kind"], one["group"], one["carries"]) for one in sent} == {
        ("all_gather", "shards", "parameters"),
        ("reduce_scatter", "shards", "gradients"),
        ("all_reduce", "replicas", "gradients"),
        ("all_reduce", "parts", "activations"),
    }
    assert cost["communication"]["sent_bytes"] == pytest.approx(sum(one["sent"] for one in sent))


def test_shipped_data_parallelism_keeps_no_copy_of_the_gradients(plan):
    strategy = ["--config", str(ROOT / "configs/strategy/ddp.yaml"), "--world_size=2"]
    memory = plan(*strategy, attentions=["mha"])["variants"]["mha"]["memory_bytes"]
    assert memory["communication"] == 0


def test_further_layouts_keep_the_micro_batch_and_take_the_time(plan):
    options = ["--scale", "4", "16", "--per_node=4", "--tensor_parallel=2", "--peak_tflops=1e-3", "--mfu=0.5"]
    cost = plan(*options, attentions=["mha", "sha"])["variants"]["mha"]
    assert cost["communication"]["sent_bytes"] == 0  # the config's own is one process
    kinds = ["DDP", "FSDP", "tensor parallelism"]
    names = [f"{n} processes by {kind}" for n in (4, 16) for kind in kinds]
    assert set(cost["scaled"]) == {*names, "16 processes by hybrid sharding"}
    ddp, parts = cost["scaled"]["16 processes by DDP"], cost["scaled"]["16 processes by tensor parallelism"]
    gradients = 4 * cost["total"]
    assert ddp["sent_bytes"] == pytest.approx(2 * 15 / 16 * gradients, rel=1e-3)  # and a counter of tokens
    tokens = 8 * 16  # rows and their length
    computing = tokens * cost["training_flops_per_token"] / 0.5e9
    assert ddp["seconds"]["computing"] == pytest.approx(computing)
    assert ddp["tokens_per_second"] == pytest.approx(16 * tokens / ddp["seconds"]["overlapped"])
    assert ddp["efficiency"] == pytest.approx(computing / ddp["seconds"]["overlapped"])
    assert parts["training_flops"] < ddp["training_flops"]
    assert parts["layout"] == {"replicas": 1, "shards": 8, "parts": 2, "sharded": True}
    assert parts["efficiency"] < 1


def test_a_layout_that_an_attention_does_not_allow_is_left_empty(command, config):
    options = [
        "--attentions",
        "gqa",
        "--reference",
        "mha",
        "--model.net.n_heads=4",
        "--scale",
        "4",
        "--tensor_parallel=4",
    ]
    code, out, err = command("plan", "--config", str(config), *options)
    assert code == 0, err
    table = out[out.index("4 processes by tensor parallelism") :]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith(("gqa", "mha"))}
    assert set(rows["gqa"]) == {"–"}
    assert "–" not in rows["mha"]


@pytest.mark.parametrize(("devices", "processes"), [("auto", 1), ("-1", 1), ("2", 2), ("0,1", 2)])
def test_devices_that_are_left_to_the_machine_are_taken_for_one_process(devices, processes, plan):
    assert plan(f"--trainer.devices={devices}", "--no_trace", attentions=["mha"])["schedule"]["world_size"] == processes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attentions", "mhb"], "attention 'mhb' is none of el, gqa, mha"),
        (["--attentions", "missing.yaml"], "attention missing.yaml: there is no such file"),
        (["--batch", "-1"], "--batch (-1) must be positive"),
        (["--context", "0"], "--context (0) must be positive"),
        (["--mfu", "0"], "--mfu (0.0) must be above 0"),
        (["--mfu", "1.5"], "--mfu (1.5) must be above 0"),
        (["--peak_tflops", "inf"], "--peak_tflops (inf) must be positive"),
        (["--scale", "0"], "--scale (0) must be positive"),
        (["--scale", "8", "--no_trace"], "leave out --no_trace"),
        (["--network_bandwidth", "0"], "--network_bandwidth (0.0) must be positive"),
        (["--mode", "equal_time"], "--mode: invalid choice: 'equal_time'"),
        (["--world_sise", "8"], "did you mean --world_size?"),
        (["--trainer.precision", "16-mixed"], "trainer.precision (16-mixed) must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_a_line(args, message, command, config):
    code, out, err = command("plan", "--config", str(config), *args)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_finetuning_without_a_tokenizer_asks_for_the_size_of_the_vocabulary(command, tiny_classifier):
    path = tiny_classifier("glue", "cola", data={"tokenizer": None})
    attention = ["--reference", str(OVERLAYS / "mha.yaml"), "--baseline", str(OVERLAYS / "sha.yaml")]
    options = ["plan", "--config", str(path), *attention, "--attentions", str(OVERLAYS / "mha.yaml"), "--no_trace"]
    code, _, err = command(*options)
    assert code == 2
    assert "--vocab_size" in err
    assert "--init_from" in err
    code, out, err = command(*options, "--vocab_size", "300")
    assert code == 0, err
    assert "a vocabulary of 300 tokens" in out


LARGE = """
import resource, sys
from pathlib import Path
from mhe_lightning.cli import main
import mhe_lightning.verbs.plan
before = 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
main(["plan", *sys.argv[1:]])
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_seven_billion_parameters_are_planned_without_being_built():
    sizes = {"width": 4096, "n_layers": 32, "n_heads": 32, "max_length": 4096}
    arguments = [f"--model.net.{key}={value}" for key, value in sizes.items()]
    arguments += ["--data.block_length=4096", "--data.batch_size=1", "--vocab_size=32000", "--world_size=1"]
    names = ["--attentions", "mha", "--baseline", "mha"]
    done = subprocess.run(
        [sys.executable, "-c", LARGE, "--config=configs/experiment/gpt2_base_wikitext103.yaml", *arguments, *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, grown = done.stdout.splitlines()
    assert any("6,592,012,288" in line for line in lines)
    assert int(grown) < 2**30

"""Each family of benchmarks runs at a tiny size and writes what it found."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn

SIZES = {"width": 16, "heads": 2, "layers": 2, "feed_forward": 32, "length": 8, "rows": 2, "vocab": 200, "threads": 1}


def step(*more: str, **sizes: int) -> list[str]:
    """Options of a step at a tiny size."""
    return [*(f"--{name}={value}" for name, value in {**SIZES, **sizes}.items()), *more]


@pytest.fixture(scope="module", autouse=True)
def quick_roofline(benchmarks_importable):
    """The machine's rates from small products."""
    roofline = importlib.import_module("roofline")
    roofline.SHAPES = {"cpu": ((64, 64, 64),)}
    roofline.COPIED = {"cpu": 2**16}
    measure = roofline.measure
    roofline.measure = lambda device, dtype=torch.float32: measure(device, dtype, seconds=0.001)
    return roofline


@pytest.fixture(scope="module")
def sublayer(quick_roofline):
    return importlib.import_module("sublayer")


@pytest.fixture(scope="module")
def candidates(benchmarks_importable):
    return importlib.import_module("candidates")


def test_sublayers_are_timed_with_all_candidates(sublayer, candidates, tmp_path):
    out = tmp_path / "sublayer.json"
    sublayer.main(f"--width 16 --heads 4 --sizes 2x8 --rounds 2 --threads 1 --out {out}".split())
    record = json.loads(out.read_text())
    assert set(record["cases"]) == {"2 x 8, causal", "2 x 8, full"}
    for case in record["cases"].values():
        assert set(case) == set(candidates.available("cpu"))
        assert all(row["difference"] < 1e-5 and row["training"]["seconds"]["median"] > 0 for row in case.values())
    assert "**2 x 8, full**" in out.with_suffix(".md").read_text()


def test_a_sublayer_that_computes_something_else_is_refused(sublayer, candidates, monkeypatch):
    monkeypatch.setattr(candidates.Plain, "load", lambda self, weights: None)
    with pytest.raises(RuntimeError, match=r"mha is .* from plain attention"):
        sublayer.check_same_function(["mha"], 16, 4, 8, True, "cpu", torch.float32)


def test_work_gives_the_operations_that_torch_counts_without_a_mask(candidates):
    width, n_heads, rows, length = 32, 4, 2, 16
    x = torch.randn(rows, length, width, requires_grad=True)
    for name in ("sdpa_mha", "gqa", "skv", "mqa", "el", "mhe_mul"):
        module = candidates.make(name, width, n_heads)
        with candidates.count_flops() as counter:
            module(x, is_causal=False).sum().backward()
        work = candidates.works(width, n_heads)[name]
        assert work.flops(rows, length, width, False, True) == counter.get_total_flops(), name


@pytest.mark.parametrize(
    ("rows", "length", "is_causal", "ratio"),
    [(8, 512, True, 2.95), (8, 512, False, 2.79), (2, 2048, True, 2.60), (2, 2048, False, 2.43)],
)
def test_shared_scores_need_as_many_operations_as_derived(rows, length, is_causal, ratio, candidates):
    works = candidates.works(768, 12)
    mha, mhe = (works[name].flops(rows, length, 768, is_causal, True) for name in ("sdpa_mha", "mhe_add_shared_scores"))
    assert mha / mhe == pytest.approx(ratio, abs=0.005)


def test_saved_bytes_of_plain_attention_are_its_input_q_k_v_output_and_normaliser(sublayer, candidates):
    rows, length, width, n_heads = 2, 8, 16, 4
    x = torch.randn(rows, length, width, requires_grad=True)
    saved = sublayer.saved_bytes(candidates.make("sdpa_mha", width, n_heads), x, True)
    whole, normaliser = 4 * rows * length * width, 4 * rows * length * n_heads
    assert saved == {
        "all": 5 * whole + normaliser,
        "without_x": 4 * whole + normaliser,
        "attention": 3 * whole + normaliser,
    }


@pytest.mark.parametrize(
    ("script", "peers"),
    [
        ("encoder_step", {"bert"}),
        (
            "decoder_step",
            {"gpt2", "gpt2_fused_gelu", "gpt_bigcode", "x_transformers", "x_transformers_one_kv_head"},
        ),
        ("encoder_decoder_step", {"marian"}),
    ],
)
def test_steps_are_timed_beside_all_peers(script, peers, quick_roofline, tmp_path):
    out = tmp_path / "step.json"
    importlib.import_module(script).main(
        step("--attentions", "mha", "mhe_add", "--memory_steps", "0", "--rounds", "2", "--out", str(out))
    )
    record = json.loads(out.read_text())
    models = record["runs"][0]["models"]
    assert set(models) == {*peers, "mha", "mhe_add"}
    assert set(record["differences"]) == {"mha", "mhe_add"}
    assert all(row["tokens_per_second"] > 0 and row["flops"] > 0 for row in models.values())
    assert models["mhe_add"]["flop_ratio"] > models["mha"]["flop_ratio"]
    assert "| mhe_add |" in out.with_suffix(".md").read_text()


def test_a_model_that_computes_something_else_is_refused(quick_roofline, monkeypatch):
    steps, encoder_step = (importlib.import_module(name) for name in ("steps", "encoder_step"))
    options = steps.parsed(encoder_step.FAMILY, None, step("--attentions", "mha"))
    monkeypatch.setattr(
        nn.Module, "load_state_dict", lambda self, *rest, **more: nn.modules.module._IncompatibleKeys([], [])
    )
    with pytest.raises(RuntimeError, match=r"mha: loss is .* from BertForMaskedLM's"):
        steps.check_same_function(encoder_step.FAMILY, options)


class Glibc:
    """What is asked of ``mallopt``, which is granted or not."""

    def __init__(self, granted: bool) -> None:
        self.granted, self.asked = granted, []

    def mallopt(self, parameter: int, value: int) -> int:
        self.asked.append((parameter, value))
        return int(self.granted)


@pytest.fixture
def glibc(benchmarks_importable, monkeypatch):
    found = Glibc(True)
    monkeypatch.setattr(importlib.import_module("common").ctypes, "CDLL", lambda name: found)
    return found


def test_freed_memory_is_kept_while_steps_are_timed(glibc, quick_roofline, tmp_path):
    out = tmp_path / "step.json"
    options = step("--peers", "--attentions", "mha", "--memory_steps=0", "--rounds=2", "--freed_memory=kept")
    importlib.import_module("encoder_step").main([*options, "--out", str(out)])
    assert glibc.asked == [(-4, 0), (-1, -1)]
    assert "freed memory kept for the next step" in out.with_suffix(".md").read_text()


def test_freed_memory_is_returned_while_peaks_are_measured(glibc, quick_roofline):
    steps, encoder_step = (importlib.import_module(name) for name in ("steps", "encoder_step"))
    options = steps.parsed(encoder_step.FAMILY, None, step("--peers", "--attentions", "mha", "--freed_memory=kept"))
    steps.measure_memory(encoder_step.FAMILY, "mha", options, (0.0, 0.0))
    assert glibc.asked == [(-3, 65536)]


@pytest.mark.parametrize("library", [object(), Glibc(False)], ids=["has none", "refuses"])
def test_a_c_library_without_such_an_option_is_named(library, benchmarks_importable, monkeypatch):
    common = importlib.import_module("common")
    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: library)
    common.handle_freed_memory("default")
    with pytest.raises(RuntimeError, match="use --freed_memory default"):
        common.handle_freed_memory("kept")


@pytest.mark.slow
def test_memory_is_measured_in_a_new_process(quick_roofline, tmp_path):
    out = tmp_path / "step.json"
    options = step("--peers", "--attentions", "mha", "--rounds", "0", "--memory_steps", "1", width=128, vocab=8000)
    importlib.import_module("encoder_step").main([*options, "--out", str(out)])
    row = json.loads(out.read_text())["runs"][0]["models"]["mha"]
    assert row["peak_mib"] > row["weights_and_optimizer_mib"] > 0
    assert row["peak_ratio"] == 1
    assert "– | – |" in out.with_suffix(".md").read_text()


def test_growth_is_measured_and_drawn(quick_roofline, tmp_path):
    out = tmp_path / "growth.json"
    importlib.import_module("growth").main(
        "--width 16 --tokens 8 16 --heads 1 2 --batch 1 2 --tokens_at 1 2 --heads_at 1 8 --batch_at 8 2 --rounds 2 "
        f"--threads 1 --out {out}".split()
    )
    axes = json.loads(out.read_text())["axes"]
    assert {axis: list(one["points"]) for axis, one in axes.items()} == {
        "tokens": ["8", "16"],
        "heads": ["1", "2"],
        "batch": ["1", "2"],
    }
    assert axes["batch"]["slopes"]["mhe_add"]["flops"] == 1
    for axis in axes:
        assert (tmp_path / f"growth_{axis}.png").read_bytes().startswith(b"\x89PNG")


def test_a_slope_is_the_power(benchmarks_importable):
    growth = importlib.import_module("growth")
    assert growth.slope([1, 2, 4, 8], [3, 12, 48, 192]) == 2


def test_the_page_of_unpadded_batches_gives_ratios_with_their_spread(benchmarks_importable):
    times = {
        "seconds": {"median": 0.2, "quartiles": [0.1, 0.3]},
        "times_padded": {"median": 1.5, "quartiles": [1.4, 1.6]},
    }
    result = {"task": "sst2", "batches": "in random order", "mean_length": 12.4, "padding": 0.684}
    record = {
        "settings": {"attention": "mha", "width": 8, "heads": 2, "layers": 1, "length": 16, "rows": 4, "rounds": 5},
        "machine": {"date": "", "platform": "", "processor": "", "torch_threads": 1, "cores": 2, "gpu": "none"},
        "results": [{**result, "padded": times, "unpadded": times}],
    }
    page = importlib.import_module("unpadded").page(record)
    assert "| sst2, in random order | 12.4 | 68.4% | 200.0 (100.0 to 300.0) |" in page
    assert "| 1.50 (1.40 to 1.60) |" in page
    assert "5 rounds" in page


@pytest.fixture
def results(quick_roofline):
    return importlib.import_module("results")


def test_the_pages_tables_are_those_of_the_records(results):
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.written(page, results.RESULTS) == page


def test_goals_are_judged_by_the_record(results):
    times = {"median": 3.6, "quartiles": [3.5, 3.7]}
    row = {
        "training": {"times_sdpa_mha": times, "flop_ratio": 2.95},
        "saved_ratio": {"all": 0.45, "without_x": 0.32, "attention": 0.09},
    }
    record = {
        "settings": {"width": 768, "heads": 12, "dtype": "float32"},
        "cases": {"8 x 512, causal": {"mhe_add": row}},
    }
    lines = results.goals({"sublayer_cpu": record}).splitlines()
    assert "| 3.60 (3.50 to 3.70) × | met | – | 2.95 |" in lines[2]
    assert "there is no case 8 x 512, full" in lines[3]
    times["median"] = 3.4
    assert "**not met**" in results.goals({"sublayer_cpu": record}).splitlines()[2]
    line = results.goals({"sublayer_kept_cpu": record}).splitlines()[2]
    assert "| not measured: no file | – | 3.40 (3.50 to 3.70) × **not met** |  |" in line


def test_a_goal_of_a_gpu_has_no_second_record(results):
    settings = {**results.GPT2_BASE, "dtype": "bfloat16"}
    record = {"settings": settings, "runs": [{"models": {"mha": {"share_of_matrix_rate": 0.52}}}]}
    lines = results.goals({"decoder_step_cuda": record}).splitlines()
    assert sum("| 52 % | met | – |  |" in line for line in lines) == 1


def test_a_goal_without_a_file_is_not_measured(results):
    lines = results.goals({}).splitlines()[2:]
    assert len(lines) == len(results.GOALS)
    assert all("not measured: no" in line for line in lines)


def test_a_record_of_other_sizes_shows_no_goal(results):
    record = {"settings": {"width": 64, "heads": 12, "dtype": "float32"}}
    assert "width is 64 and not 768" in results.goals({"sublayer_cpu": record})


def test_a_record_without_a_shape_shows_no_goal(results):
    settings = {"width": 512, "layers": 4, "heads": [8], "vocab": 30522}
    lines = results.goals({"decode_cpu": {"settings": settings, "shapes": {}}}).splitlines()
    assert sum("it has no '16 × (256 + 128)'" in line for line in lines) == 2

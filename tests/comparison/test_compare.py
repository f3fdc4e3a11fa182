"""`compare` from run directories to numbers and files; and the time for a token."""

from __future__ import annotations

import csv
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from mhe_lightning.attention import GQA, MHA, MHE
from mhe_lightning.cli import main
from mhe_lightning.comparison import compare as comparing
from mhe_lightning.comparison import latency
from mhe_lightning.comparison.latency import decode_latency
from mhe_lightning.comparison.style import figure_bytes
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.sweep import resolve

SCORES = {"mha": (10.0, 20.0, 40.0), "mhe_add": (11.0, 24.0, 44.0), "sha": (20.0, 40.0, 80.0)}
"""Perplexities of seeds 1, 2 and 3."""
T2 = 0.95 * math.sqrt(2 / 0.0975)
"""t(0.975) with two degrees of freedom, 4.3027: t(p) = (2p - 1) sqrt(2 / (4p (1 - p)))."""


def three_seeds(copies, root: Path | None = None, **scores) -> None:
    """Runs of SCORES on the validation split."""
    for attention, of_seeds in {**SCORES, **scores}.items():
        for seed, score in enumerate(of_seeds, 1):
            copies(attention, seed, root=root, val=score)


def make_classifiers(copies, experiments, folder: Path, scores: dict[str, tuple[float, ...]]) -> None:
    """Runs of an encoder on SST-2: the trained decoder's records with another config."""
    net = {"width": 16, "n_heads": 2, "n_layers": 1, "max_length": 48}
    attention = {"class_path": "mhe_lightning.attention.MHA"}
    config = {
        "trainer": {"max_steps": 8, "accelerator": "cpu", "devices": 1},
        "model": {
            "class_path": "mhe_lightning.tasks.SequenceClassification",
            "init_args": {
                "net": {"class_path": "mhe_lightning.models.Encoder", "init_args": {**net, "attention": attention}}
            },
        },
        "data": {"class_path": "mhe_lightning.data.GlueData", "init_args": {"task": "sst2", "batch_size": 4}},
    }
    folder.mkdir(parents=True)
    path = folder / "sst2.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    resolved = resolve(experiments, ["--config", str(path)])
    changes = {key: resolved[key] for key in ("trainer", "data")}
    changes["model.class_path"] = resolved["model"]["class_path"]
    changes["model.init_args"] = {k: v for k, v in resolved["model"]["init_args"].items() if k != "net"}
    spec = resolved["model"]["init_args"]["net"]
    net = {k: v for k, v in spec["init_args"].items() if k != "attention"}
    for name, of_seeds in scores.items():
        for seed, score in enumerate(of_seeds, 1):
            run = copies(name, seed, root=folder, results={"data.label": "glue-sst2", "metrics": {"val/score": score}})
            (run / "metrics.csv").unlink()  # that of the decoder
            own = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            own_attention = own["model"]["init_args"]["net"]["init_args"]["attention"]
            model = {"class_path": spec["class_path"], "init_args": {**net, "attention": own_attention}}
            init_args = {**changes["model.init_args"], "net": model}
            own.update(trainer=changes["trainer"], data=changes["data"])
            own["model"] = {"class_path": changes["model.class_path"], "init_args": init_args}
            (run / "config.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")


def recorded(folder: Path, task: int = 0) -> dict[str, dict]:
    """Variants by name, as in comparison.json."""
    record = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return {variant["name"]: variant for variant in record["comparisons"][task]["variants"]}


def approximately(mean: float, half_width: float, n: int = 3) -> dict[str, object]:
    return {"mean": pytest.approx(mean), "half_width": pytest.approx(half_width, abs=1e-12), "n": n}


def notes_of(folder: Path) -> list[str]:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["comparisons"][0]["notes"]


@pytest.fixture
def without_figures(monkeypatch):
    """Reports are made without their figures, which take the most time."""
    monkeypatch.setattr("mhe_lightning.comparison.html.figures", lambda comparison: {})


# Numbers


def test_numbers_of_perplexities_are_those_worked_out_by_hand(copies, compare, without_figures, tmp_path):
    three_seeds(copies)

    code, out, err = compare(copies.root, "--out", tmp_path / "out")

    assert code == 0, err
    found = recorded(tmp_path / "out")
    mhe, sha, mha = found["mhe_add"], found["sha"], found["mha"]
    # (11 + 24 + 44) / 3 = 79/3; squares of deviations (46² + 7² + 53²) / 9 = 4974/9, variance 2487/9;
    # half width t sqrt(2487/9 / 3) = t sqrt(829/9)
    assert mhe["score"] == approximately(79 / 3, T2 * math.sqrt(829 / 9))
    # 1 - 1/10 = 0.9, 1 - 4/20 = 0.8, 1 - 4/40 = 0.9: mean 2.6/3; deviations 1/30, -2/30, 1/30: variance 3/900;
    # half width t sqrt(3/900 / 3) = t / 30
    assert mhe["retained"] == approximately(2.6 / 3, T2 / 30)
    # 1 - 10/10, 1 - 20/20, 1 - 40/40
    assert sha["retained"] == approximately(0, 0)
    # width 16 of 2 heads of 8, in 2 layers, each with W_O of 16 * 16: MHA 4 * 256, MHE 3 * 16 * 8 + 3 * 2 * 8 + 256,
    # SHA 3 * 16 * 8 + 256
    assert [v["attention_parameters"] for v in (mha, mhe, sha)] == [2048, 1376, 1280]
    # gains over SHA 1 - 11/20 = 0.45, 1 - 24/40 = 0.4, 1 - 44/80 = 0.45, per 1376/1280 - 1 = 0.075: mean 1.3/3 / 0.075;
    # deviations of gains half of those above: t / 60 / 0.075
    assert mhe["efficiency"] == approximately(1.3 / 3 / 0.075, T2 / 60 / 0.075)
    # differences 1, 4, 4: mean 3, variance 3, t = 3 / sqrt(3/3) = 3; with 2 degrees of freedom p = 1 - t / sqrt(t² + 2)
    assert mhe["p_value"] == pytest.approx(1 - 3 / math.sqrt(11))
    assert mha["p_value"] is None
    (row,) = [line for line in out.splitlines() if line.startswith("mhe_add  ")]
    # t sqrt(829/9) = 41.294, t/30 = 0.1434, 5.7778 ± 0.9561, p 0.09547, 1376/2048 = 67.19 %
    assert " ".join(row.split()).startswith("mhe_add 3 26.33 ± 41.29 86.7 ± 14.3 5.778 ± 0.956 0.095 ")
    assert "1,376 (67.2 %)" in row


def test_numbers_of_accuracies_are_those_worked_out_by_hand(copies, compare, experiments, without_figures, tmp_path):
    folder = tmp_path / "sst2"
    make_classifiers(copies, experiments, folder, {"mha": (0.8, 0.5, 0.9), "sha": (0.6, 0.4, 0.9)})

    code, out, err = compare(folder, "--out", tmp_path / "out")

    assert code == 0, err
    sha, mha = (recorded(tmp_path / "out")[name] for name in ("sha", "mha"))
    # 0.6/0.8 = 0.75, 0.4/0.5 = 0.8, 0.9/0.9 = 1: mean 0.85; deviations -0.1, -0.05, 0.15: variance 0.035/2
    assert sha["retained"] == approximately(0.85, T2 * math.sqrt(0.0175 / 3))
    # gains 1/3, 1/4, 0 per 1024/640 - 1 = 0.6 (one layer): mean 7/36 / 0.6; deviations 5/36, 2/36, -7/36: variance
    # 78/1296 / 2
    assert mha["efficiency"] == approximately(7 / 36 / 0.6, T2 * math.sqrt(39 / 1296 / 3) / 0.6)
    # differences -0.2, -0.1, 0: mean -0.1, variance 0.01, t = -0.1 / sqrt(0.01/3) = -sqrt(3): p = 1 - sqrt(3/5)
    assert sha["p_value"] == pytest.approx(1 - math.sqrt(3 / 5))
    assert sha["cache_bytes_per_token"] is None
    (row,) = [line for line in out.splitlines() if line.startswith("sha  ")]
    assert row.split()[2] == "63.33"  # per cent
    assert "glue-sst2 (val): score %, higher is better" in out


def test_costs_are_means_over_seeds_and_of_the_net(copies, compare, without_figures, tmp_path):
    for attention in ("mha", "mhe_add"):
        for seed in (1, 2):
            changes = {"tokens_per_second": 1000 * seed, "peak_memory_bytes": 2**20 * seed, "parameters.total": 4321}
            copies(attention, seed, results=changes)

    assert compare(copies.root, "--out", tmp_path / "out")[0] == 0

    found = recorded(tmp_path / "out")["mhe_add"]
    # deviations ±500, variance 2 * 250000, half width tan(0.475 pi) * sqrt(500000 / 2)
    assert found["tokens_per_second"] == approximately(1500, math.tan(0.475 * math.pi) * 500, 2)
    assert found["peak_memory_bytes"]["mean"] == 1.5 * 2**20
    assert found["parameters"] == 4321
    # keys and values of 2 layers, 4 bytes each: one shared head of 8, against 2 heads
    assert found["cache_bytes_per_token"] == 2 * 2 * 4 * 8
    assert recorded(tmp_path / "out")["mha"]["cache_bytes_per_token"] == 2 * 2 * 4 * 16


@pytest.mark.usefixtures("models_of_one_size")
def test_the_test_split_is_taken_if_all_have_it(copies, compare):
    copies("mha", val=10.0, test=20.0), copies("sha", val=12.0, test=30.0)

    code, out, err = compare(copies.root)

    assert code == 0, err
    assert "prose.jsonl (test): ppl" in out
    assert "sha keeps 50.0 % of mha" in out  # 1 - 10/20


@pytest.mark.usefixtures("models_of_one_size")
def test_the_validation_split_is_taken_if_one_was_not_tested(copies, compare):
    copies("mha", val=10.0, test=20.0), copies("sha", val=12.0)

    code, out, err = compare(copies.root)

    assert code == 0, err
    assert "prose.jsonl (val): ppl" in out
    assert "sha keeps 80.0 % of mha" in out  # 1 - 2/10


@pytest.mark.usefixtures("models_of_one_size")
def test_a_split_that_is_asked_for_is_taken(copies, compare):
    copies("mha", val=10.0, test=20.0), copies("sha", val=12.0, test=30.0)

    code, out, err = compare(copies.root, "--split", "val")

    assert code == 0, err
    assert "prose.jsonl (val): ppl" in out
    assert "sha keeps 80.0 % of mha" in out


@pytest.mark.usefixtures("models_of_one_size")
def test_a_report_names_the_checkpoint_whose_scores_it_shows(copies, compare, without_figures, tmp_path):
    evaluations = {"validate": "best-step=00000004.ckpt", "test": "step=00000008.ckpt"}
    results = {f"evaluations.{verb}.checkpoint": f"a/{name}" for verb, name in evaluations.items()}
    copies("mha", test=20.0, results=results)

    for split, checkpoint in (("test", evaluations["test"]), ("val", evaluations["validate"])):
        assert compare(copies.root, "--split", split, "--out", tmp_path / split)[0] == 0
        (comparison,) = json.loads((tmp_path / split / "comparison.json").read_text())["comparisons"]
        assert comparison["facts"]["scored checkpoint"] == checkpoint


@pytest.mark.usefixtures("models_of_one_size")
def test_a_later_validation_replaces_that_of_the_training(copies, compare):
    validated = {"evaluations.validate": {"checkpoint": "step=00000008.ckpt", "metrics": {"val/ppl": 15.0}}}
    copies("mha", val=10.0), copies("sha", val=12.0, results=validated)

    code, out, err = compare(copies.root)

    assert code == 0, err
    assert "sha keeps 50.0 % of mha" in out  # 1 - 5/10


@pytest.mark.usefixtures("models_of_one_size")
def test_missing_seeds_are_told_and_left_out_of_pairs(copies, compare, without_figures, tmp_path):
    for seed, score in enumerate(SCORES["mha"], 1):
        copies("mha", seed, val=score)
    copies("sha", 2, val=22.0)

    code, out, err = compare(copies.root, "--out", tmp_path / "out")

    assert code == 0, err
    assert "sha has no run of seed 1, 3." in out.splitlines()
    assert notes_of(tmp_path / "out") == ["sha has no run of seed 1, 3."]
    found = recorded(tmp_path / "out")["sha"]
    assert found["retained"] == {"mean": pytest.approx(0.9), "half_width": None, "n": 1}  # 1 - 2/20
    assert found["p_value"] is None


def test_without_the_single_head_elasticity_is_left_out_and_told(copies, compare):
    copies("mha"), copies("mqa")

    code, out, err = compare(copies.root)
    assert code == 0, err
    assert "PEoP is not defined, since there are no runs of sha." in out.splitlines()
    assert "PEoP  " not in out

    code, out, _ = compare(copies.root, "--baseline", "mqa")
    assert code == 0
    assert "PEoP  " in out


def test_every_attention_of_the_repository_gets_a_row_the_largest_first(copies, compare, without_figures, tmp_path):
    overlays = ("sha", "mhe_add", "mhe_mul", "mqa", "el", "gqa", "skv", "mha")
    for attention in overlays:
        copies(attention)

    code, _, err = compare(copies.root, "--out", tmp_path / "out")

    assert code == 0, err
    found = recorded(tmp_path / "out")
    assert len(found) == len(overlays)
    # besides W_O (256 in each of 2 layers), of nd = 16 and d = 8: 3n²d², n²d² + 2gnd² with g = 2, 2n²d², n²d² + 2nd²,
    # n²d², 3nd² + 3nd, 3nd²
    expected = {"mha": 768, "gqa_2": 768, "skv": 512, "mqa": 512, "mhe_add": 432, "mhe_multiply": 432, "sha": 384}
    assert {name: v["attention_parameters"] for name, v in found.items()} == {
        name: 2 * (count + 256) for name, count in {**expected, "elattention": 256}.items()
    }
    counts = [v["attention_parameters"] for v in found.values()]
    assert counts == sorted(counts, reverse=True)


# Files


@pytest.fixture(scope="module")
def two_tasks(copies_in, experiments, tmp_path_factory):
    """Reports of two tasks, made twice into one folder, with the files of the first time."""
    root = tmp_path_factory.mktemp("two_tasks")
    copies = copies_in(root / "prose")
    for attention, score in (("mha", 10.0), ("sha", 12.0)):
        copies(attention, val=score)
    make_classifiers(copies, experiments, root / "sst2", {"mha": (0.8,), "sha": (0.6,)})
    out = root / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "Experiments", lambda: experiments)
        arguments = ["compare", str(root / "prose"), str(root / "sst2"), "--out", str(out), "--title", "A <title>"]
        main(arguments)
        first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        main(arguments)
    return SimpleNamespace(out=out, first=first, root=root)


def test_the_same_comparison_gives_the_same_bytes(two_tasks):
    again = {path: path.read_bytes() for path in two_tasks.out.rglob("*") if path.is_file()}

    assert sorted(again) == sorted(two_tasks.first)
    assert [path.name for path in again if again[path] != two_tasks.first[path]] == []


def test_a_report_has_tables_and_plots_of_each_task(two_tasks):
    names = {str(path.relative_to(two_tasks.out)) for path in two_tasks.first}
    tables = {f"{name}.{kind}" for name in ("prose.jsonl", "glue-sst2", "all") for kind in ("md", "csv", "tex")}
    # an encoder has no cache to draw, and these have no curves
    drawn = {"prose-jsonl": ("pareto", "retention", "curves", "context"), "glue-sst2": ("pareto", "retention")}
    plots = {f"plots/{task}-{name}.{kind}" for task in drawn for name in drawn[task] for kind in ("png", "svg")}
    assert names == {"report.html", "comparison.json"} | tables | plots


def test_a_report_has_all_tasks_before_each(two_tasks):
    page = (two_tasks.out / "report.html").read_text(encoding="utf-8")

    assert "<title>A &lt;title&gt;</title>" in page
    captions = ["Scores by task (val)", "glue-sst2 (val): score", "prose.jsonl (val): ppl"]
    places = [page.index(caption) for caption in captions]
    assert places[0] == min(places)
    assert f"compare {two_tasks.root / 'prose'}" in page


def test_tables_have_the_unrounded_numbers_of_a_task(two_tasks):
    with open(two_tasks.out / "glue-sst2.csv", encoding="utf-8", newline="") as file:
        rows = {row["attention"]: row for row in csv.DictReader(file)}

    assert float(rows["sha"]["prr_percent"]) == pytest.approx(75)  # 0.6 / 0.8
    assert list(rows) == ["mha", "sha"]


def test_the_record_has_the_runs_that_it_rests_on(two_tasks):
    record = json.loads((two_tasks.out / "comparison.json").read_text(encoding="utf-8"))

    assert [(run["task"], run["attention"], run["seed"]) for run in record["runs"]] == [
        (task, attention, 1) for task in ("prose.jsonl", "glue-sst2") for attention in ("mha", "sha")
    ]
    assert record["runs"][0]["metrics"]["val/ppl"] == 10.0
    assert record["runs"][0]["versions"]["torch"]


def test_all_tasks_are_printed_first(copies, compare, experiments, tmp_path):
    copies("mha", val=10.0), copies("sha", val=12.0)
    make_classifiers(copies, experiments, tmp_path / "sst2", {"mha": (0.8,), "sha": (0.6,)})

    code, out, err = compare(copies.root, tmp_path / "sst2")

    assert code == 0, err
    assert out.startswith("Scores by task (val)")
    assert out.index("prose.jsonl (val): ppl") < out.index("glue-sst2 (val): score")
    # 1 - 2/10 = 80 % and 0.6 / 0.8 = 75 %
    (row,) = [line for line in out.split("prose.jsonl (val)")[0].splitlines() if line.startswith("sha ")]
    assert "77.5" in row


@pytest.mark.usefixtures("models_of_one_size")
def test_without_out_nothing_is_written(copies, compare, monkeypatch, tmp_path):
    copies("mha"), copies("sha")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(copies.root.rglob("*"))

    assert compare(copies.root)[0] == 0
    assert sorted(copies.root.rglob("*")) == before
    assert list((tmp_path / "here").iterdir()) == []


# What is measured besides


def svg_alone(figure, kind: str) -> bytes:
    """Drawing a figure takes the most time, and it is drawn once for each kind."""
    return figure_bytes(figure, kind) if kind == "svg" else b""


@pytest.fixture(scope="module")
def measured(copies_in, experiments, prose, tmp_path_factory):
    """A report with heads and latencies."""
    root = tmp_path_factory.mktemp("measured")
    copies = copies_in(root / "runs")
    copies("mha", whole=True), copies("mhe_add", whole=True)
    out = root / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "Experiments", lambda: experiments)
        patch.setattr("mhe_lightning.comparison.html.figure_bytes", svg_alone)
        options = ["--text", str(prose), "--max_tokens", "64", "--latency", "--out", str(out)]
        main(["compare", str(copies.root), *options])
    return out


def test_heads_are_measured_in_every_layer_and_drawn(measured):
    for variant in recorded(measured).values():
        assert [(layer["place"], layer["layer"]) for layer in variant["diversity"]] == [("self", 0), ("self", 1)]
        assert all(0 < layer["jensen_shannon"] < 1 and 0 < layer["cosine"] < 1 for layer in variant["diversity"])
    page = (measured / "report.html").read_text(encoding="utf-8")
    for name in ("diversity", "maps-self-0", "maps-self-1"):
        assert (measured / f"plots/prose-jsonl-{name}.svg").is_file()
    assert "How different the heads of each layer attend" in page
    assert "Attention maps of layer 1 (self)" in page


def test_latency_is_measured_and_shown(measured):
    # the model has 16 positions, the last of which is for the next token
    for variant in recorded(measured).values():
        assert list(variant["latency"]) == ["15"]
        assert variant["latency"]["15"] > 0
    assert "ms/token at 15" in (measured / "prose.jsonl.md").read_text(encoding="utf-8")
    assert any(note.startswith("Time for a token was measured when this was made") for note in notes_of(measured))


def test_a_run_without_checkpoints_cannot_be_measured(copies, compare):
    code, _, err = compare(copies("mha"), "--latency")

    assert code == 2
    assert "holds no complete checkpoint" in err


@pytest.mark.parametrize(("content", "named"), [(b"\xff\xfe", "is not UTF-8 text"), (None, "No such file")])
def test_a_text_that_cannot_be_read_is_refused(content, named, copies, compare, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)

    code, _, err = compare(copies("mha"), "--text", path)

    assert code == 2
    assert str(path) in err
    assert named in err


def decoder(attention=MHA, max_length=40):
    return Decoder(30, attention=attention, width=8, n_heads=2, n_layers=2, max_length=max_length).eval()


def encoder_decoder(attention=MHA, max_length=20):
    return EncoderDecoder(30, attention=attention, width=8, n_heads=2, n_layers=2, max_length=max_length).eval()


def test_latency_is_measured_at_powers_of_two_that_all_have_positions_for():
    nets = {"mha": decoder(max_length=70), "mhe": decoder(partial(MHE, combine="add")), "both": encoder_decoder()}

    found = decode_latency(nets, rounds=1)
    assert {name: list(times) for name, times in found.items()} == {name: [16] for name in nets}

    del nets["both"]
    found = decode_latency(nets, rounds=1)
    assert {name: list(times) for name, times in found.items()} == {name: [16, 32] for name in nets}
    assert all(seconds > 0 for times in found.values() for seconds in times.values())


def test_latency_of_short_nets_is_measured_before_the_last_position():
    assert list(decode_latency({"a": decoder(max_length=10)}, rounds=1)["a"]) == [9]


def test_latency_is_measured_at_given_contexts():
    found = decode_latency({"a": decoder(partial(GQA, n_kv_heads=1)), "b": encoder_decoder()}, [3, 12], rounds=2)

    assert {name: list(times) for name, times in found.items()} == {"a": [3, 12], "b": [3, 12]}
    assert all(seconds > 0 for times in found.values() for seconds in times.values())


def test_encoders_have_no_latency():
    encoder = Encoder(30, attention=MHA, width=8, n_heads=2, n_layers=1, max_length=8)

    assert decode_latency({"encoder": encoder}) == {}
    assert list(decode_latency({"encoder": encoder, "a": decoder()}, [4], rounds=1)) == ["a"]


def test_latency_is_the_median_of_all_rounds_but_the_first(monkeypatch):
    drawn = iter([100.0, 9.0, 1.0, 3.0])
    monkeypatch.setattr(latency._Decoding, "seconds", lambda self, token: next(drawn))

    assert decode_latency({"a": decoder()}, [4], rounds=3) == {"a": {4: 3.0}}


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
@pytest.mark.parametrize("attention", [MHA, partial(MHE, combine="multiply")], ids=["mha", "mhe"])
def test_a_measurement_leaves_the_caches_as_they_were(make, attention, monkeypatch):
    states, lengths, logits = [], [], []
    prefilled, seconds = latency._prefilled, latency._Decoding.seconds

    def remembered(net, context):
        states.append(prefilled(net, context))
        return states[-1]

    def own_caches(state):
        return [getattr(cache, "own", cache) for cache in state.caches]

    @torch.inference_mode()
    def next_logits(state):
        token = torch.tensor([[7]])
        if state.source is None:
            hidden = state.net(token, caches=state.caches)
        else:
            hidden = state.net.decode(token, state.source, caches=state.caches)
        for cache in own_caches(state):
            cache.length = state.context
        return state.net.logits(hidden[:, -1])

    def watched(state, token):
        logits.append(next_logits(state))
        elapsed = seconds(state, token)
        lengths.append([cache.length for cache in own_caches(state)])
        return elapsed

    monkeypatch.setattr(latency, "_prefilled", remembered)
    monkeypatch.setattr(latency._Decoding, "seconds", watched)
    torch.manual_seed(0)
    decode_latency({"a": make(attention)}, [5], rounds=3)

    assert lengths == [[5, 5]] * 4
    after = next_logits(states[0])
    assert all(torch.equal(before, after) for before in logits)


# What is missing


def test_without_scipy_the_extra_is_named(copies, compare, monkeypatch):
    run = copies("mha")
    monkeypatch.setitem(sys.modules, "scipy.stats", None)

    code, _, err = compare(run)

    assert code == 2
    assert "scipy" in err
    assert "mhe-lightning[compare]" in err


def test_without_matplotlib_the_extra_is_named(copies, compare, monkeypatch, tmp_path):
    run = copies("mha")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    code, _, err = compare(run, "--out", tmp_path / "out")

    assert code == 2
    assert "matplotlib" in err
    assert "mhe-lightning[compare]" in err
    assert not (tmp_path / "out").exists()


def test_tables_need_no_matplotlib(copies, compare, monkeypatch):
    run = copies("mha")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    assert compare(run)[0] == 0

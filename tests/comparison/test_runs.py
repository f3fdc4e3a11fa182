"""Which runs are found in folders, what their attentions are called, and which of them `compare` refuses to mix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from mhe_lightning.comparison.results import Curve
from mhe_lightning.comparison.runs import attention_name, find_runs, mean_curves
from mhe_lightning.errors import UserError
from mhe_lightning.sweep import resolve

pytestmark = pytest.mark.usefixtures("models_of_one_size")

FF_WIDTH = "model.init_args.net.init_args.ff_width"
GRID = {"model.lr": ["0.01", "0.02"]}


def names(found) -> list[str]:
    return [run.path.name for run in found]


def words(text: str) -> str:
    return " ".join(text.split())


# Which runs


def test_a_run_directory_is_one_run(copies):
    run = copies("gqa", 3)

    ((found,), left_out) = find_runs([run])

    assert (found.path, found.attention, found.seed, found.mode) == (run, "gqa_2", 3, "equal_architecture")
    assert left_out == []


def test_a_folder_of_runs_is_all_of_them(copies):
    copies("mha"), copies("sha", 2)
    (copies.root / "notes").mkdir()

    assert names(find_runs([copies.root])[0]) == ["mha-seed1", "sha-seed2"]


def test_a_run_that_is_given_twice_counts_once(copies, monkeypatch):
    run = copies("mha")
    monkeypatch.chdir(copies.root)

    assert names(find_runs([run, copies.root, Path("mha-seed1")])[0]) == ["mha-seed1"]


def test_a_sweep_names_its_attentions_sizes_and_mode(copies):
    sizes = {"model.net.ff_width": 80}
    root = copies.sweep([copies("mha"), copies("mhe_mul")], mode="equal_parameters", sizes={"mhe_mul": sizes})

    found, _ = find_runs([root])

    assert [(run.attention, run.sizes, run.mode) for run in found] == [
        ("mha", {}, "equal_parameters"),
        ("mhe_mul", sizes, "equal_parameters"),
    ]


def test_a_run_of_a_sweep_that_is_given_alone_belongs_to_it(copies):
    run = copies("mhe_mul")
    copies.sweep([run, copies("mha")], mode="equal_flops")

    assert [(r.attention, r.mode) for r in find_runs([run])[0]] == [("mhe_mul", "equal_flops")]


def test_of_a_grid_the_chosen_points_are_taken(copies):
    settings, runs = {}, []
    for attention in ("mha", "sha"):
        for lr in (0.01, 0.02):
            runs.append(copies(attention, name=f"{attention}-lr={lr}-seed1", config={"model.init_args.lr": lr}))
            settings[runs[-1].name] = {"model.lr": lr}
    chosen = {"mha": {"model.lr": 0.02}, "sha": {"model.lr": 0.01}}
    root = copies.sweep(runs, settings=settings, grid=GRID, chosen=chosen)

    found, left_out = find_runs([root])

    assert names(found) == ["mha-lr=0.02-seed1", "sha-lr=0.01-seed1"]
    assert [run.settings for run in found] == list(chosen.values())
    assert left_out == []


def test_a_grid_without_a_choice_is_refused(copies):
    runs = [copies("mha", name=f"mha-lr={lr}-seed1") for lr in (0.01, 0.02)]
    root = copies.sweep(runs, grid=GRID)

    with pytest.raises(UserError, match="no point of the grid is chosen for mha yet"):
        find_runs([root])


def test_runs_of_a_sweep_that_are_not_finished_are_left_out_and_named(copies):
    stopped = copies("sha", results={"steps": 4})
    broken_off = copies("skv")
    (broken_off / "results.json").unlink()
    not_begun = copies("mqa")
    root = copies.sweep([copies("mha"), stopped, broken_off, not_begun])
    shutil.rmtree(not_begun)

    found, left_out = find_runs([root])

    assert names(found) == ["mha-seed1"]
    assert sorted(left_out) == [
        "mqa-seed1 has not begun and was left out.",
        "sha-seed1 is not finished and was left out.",
        "skv-seed1 is not finished and was left out.",
    ]


def test_what_was_left_out_is_told(copies, compare):
    copies("mha"), copies("sha", results={"steps": 4})

    code, out, err = compare(copies.root)

    assert code == 0, err
    assert "note: sha-seed1 is not finished and was left out." in out.splitlines()


def test_nothing_but_unfinished_runs_is_an_error(copies, compare):
    run = copies("mha", results={"steps": 4})

    code, _, err = compare(run)

    assert code == 2
    assert "none of the runs is finished: mha-seed1 is not finished" in err


def test_a_folder_without_runs_is_an_error(compare, tmp_path):
    code, _, err = compare(tmp_path / "nowhere")

    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'nowhere'} holds no finished runs")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("results.json", '{"steps": 8,'),
        ("results.json", "[]"),
        ("results.json", '{"steps": 8, "finished": "now"}'),
        ("config.yaml", "trainer: [1,\n2"),
        ("config.yaml", "null"),
        ("config.yaml", "trainer: {max_steps: 8}"),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error_of_one_line(file, text, copies, compare):
    run = copies("mha")
    (run / file).write_text(text, encoding="utf-8")

    code, _, err = compare(run)

    assert code == 2
    assert err.startswith(f"error: {run}: its record cannot be read (")
    assert len(err.splitlines()) == 1


def test_a_manifest_that_cannot_be_read_is_an_error(copies, compare):
    root = copies.sweep([copies("mha")])
    (root / "sweep.json").write_text("{")

    code, _, err = compare(root)

    assert code == 2
    assert f"error: {root / 'sweep.json'} cannot be read" in err


# What they are


@pytest.mark.parametrize(
    ("overlay", "name"),
    [
        ("el", "elattention"),
        ("gqa", "gqa_2"),
        ("mha", "mha"),
        ("mhe_add", "mhe_add"),
        ("mhe_mul", "mhe_multiply"),
        ("mqa", "mqa"),
        ("sha", "sha"),
        ("skv", "skv"),
    ],
)
def test_an_attention_outside_of_a_sweep_is_called_by_what_makes_it_a_variant(overlay, name, tiny_config, experiments):
    path = ROOT / f"configs/attention/{overlay}.yaml"
    config = resolve(experiments, ["--config", str(tiny_config()), f"--model.net.attention={path}"])

    assert attention_name(config["model"]["init_args"]["net"]["init_args"]) == name


def test_every_overlay_has_a_name_in_the_test_above():
    (mark,) = test_an_attention_outside_of_a_sweep_is_called_by_what_makes_it_a_variant.pytestmark

    assert [overlay for overlay, _ in mark.args[1]] == sorted(p.stem for p in (ROOT / "configs/attention").iterdir())


def test_attentions_of_several_places_are_joined():
    mha, mqa = {"class_path": "a.MHA"}, {"class_path": "a.MQA", "init_args": {"dropout": 0.1, "bias": False}}

    assert attention_name({"attention": mha, "cross_attention": mqa}) == "mha/mha/mqa"
    assert attention_name({"attention": mha, "encoder_attention": mqa, "decoder_attention": None}) == "mqa/mha/mha"
    assert attention_name({"attention": mha, "encoder_attention": mha}) == "mha"


def test_curves_are_means_over_seeds_at_common_steps(copies):
    one, two = copies("mha", 1), copies("mha", 2)
    (one / "metrics.csv").write_text("step,train/loss,val/loss,val/ppl\n1,4.0,,\n2,3.0,2.5,8.0\n3,2.0,,\n")
    (two / "metrics.csv").write_text("step,train/loss,val/ppl\n2,5.0,10.0\n3,3.0,\n4,1.0,\n")

    assert mean_curves(find_runs([copies.root])[0]) == [
        Curve("train/loss", [2, 3], [4.0, 2.5]),
        Curve("val/ppl", [2], [9.0]),
    ]


# What is refused

DIFFERENCES = [
    ("data", "config", "data.init_args.corpus.deduplicate", False, True),
    ("data", "results", "data.corpus_sha256", "d1", "d2"),
    ("tokenizer", "results", "data.tokenizer_sha256", "t1", "t2"),
    ("budget", "config", "trainer.accumulate_grad_batches", 1, 3),
    ("budget", "config", "data.init_args.batch_size", 8, 24),
    ("versions", "results", "versions.torch", "2.4.0", "2.5.1"),
    ("versions", "results", "git_commit", "c1", "c2"),
    ("settings", "config", "model.init_args.lr", 0.01, 0.03),
    ("settings", "config", "trainer.precision", "32-true", "bf16-mixed"),
    ("settings", "results", "world_size", 1, 4),
    ("evaluation", "results", "evaluations.test.signatures.bleu", "s1", "s2"),
    ("evaluation", "results", "evaluations.test.data.init_args.eval_stride", 4, 12),
]


@pytest.mark.parametrize(
    ("category", "file", "key", "one", "other"), DIFFERENCES, ids=[f"{d[0]}-{d[2]}" for d in DIFFERENCES]
)
def test_a_difference_is_refused_and_named_unless_it_is_allowed(category, file, key, one, other, copies, compare):
    copies("mha", test=10.0, **{file: {key: one}})
    copies("sha", test=11.0, **{file: {key: other}})

    code, out, err = compare(copies.root)
    assert (code, out) == (2, "")
    assert f"error: the runs differ in {category}: " in err
    assert f"{key.rpartition('.')[2]} is {one!r} in {copies.root / 'mha-seed1'}" in err
    assert f"and {other!r} in {copies.root / 'sha-seed1'}" in err
    assert f"--allow {category}" in err

    code, out, err = compare(copies.root, "--allow", category)
    assert code == 0, err
    assert f"Runs differ in {category}, which was allowed: " in words(out)


def test_the_number_of_steps_is_of_the_budget(copies, compare):
    copies("mha"), copies("sha", config={"trainer.max_steps": 9}, results={"steps": 9})

    code, _, err = compare(copies.root)

    assert code == 2
    assert "differ in budget" in err


def test_rows_of_another_length_are_of_the_budget(copies, compare):
    copies("mha")
    copies("sha", config={"data.init_args.block_length": 8}, results={"data.block_length": 8})

    assert compare(copies.root)[0] == 2
    code, _, err = compare(copies.root, "--allow", "budget")

    assert code == 0, err


def test_a_score_of_the_best_checkpoint_is_not_mixed_with_one_of_the_last(copies, compare):
    for attention, checkpoint in (("mha", "step=00000008.ckpt"), ("sha", "best-step=00000004.ckpt")):
        copies(attention, test=10.0, results={"evaluations.test.checkpoint": f"elsewhere/{checkpoint}"})

    code, _, err = compare(copies.root)
    assert code == 2
    assert "checkpoint.kind is 'last' in" in err
    assert "and 'best' in" in err

    assert compare(copies.root, "--allow", "evaluation")[0] == 0
    assert compare(copies.root, "--split", "val")[0] == 0  # those are of the last step


def test_runs_from_pretrained_weights_are_not_mixed_with_others(copies, compare):
    copies("mha"), copies("sha", config={"init_from": "books/sha-seed1"})

    code, _, err = compare(copies.root)
    assert code == 2
    assert "init_from is None in" in err

    shutil.rmtree(copies.root / "mha-seed1")
    copies("mha", config={"init_from": "books/mha-seed1"})
    assert compare(copies.root)[0] == 0


def test_sweeps_of_different_modes_are_not_mixed(copies, compare):
    plain, sized = copies.root / "plain", copies.root / "sized"
    copies.sweep([copies("mha", root=plain), copies("mhe_add", root=plain)])
    copies.sweep([copies("sha", root=sized)], mode="equal_parameters")

    code, _, err = compare(plain, sized)
    assert code == 2
    assert f"{plain / 'mhe_add-seed1'} is of a sweep of equal_architecture" in err
    assert f"{sized / 'sha-seed1'} of one of equal_parameters" in err
    assert "--allow mode" in err

    code, out, err = compare(plain, sized, "--allow", "mode")
    assert code == 0, err
    assert "Runs differ in mode, which was allowed: " in words(out)


def test_the_reference_belongs_to_any_mode(copies, compare):
    plain, sized = copies.root / "plain", copies.root / "sized"
    copies.sweep([copies("mha", root=plain)])
    copies.sweep([copies("sha", root=sized)], mode="equal_parameters")

    code, out, err = compare(plain, sized)

    assert code == 0, err
    assert "; equal parameters" in out


def test_names_places_and_what_is_logged_may_differ(copies, compare):
    elsewhere = {
        "trainer.default_root_dir": "elsewhere",
        "trainer.log_every_n_steps": 5,
        "trainer.val_check_interval": 2,
        "trainer.enable_progress_bar": False,
        "data.init_args.cache_dir": "elsewhere",
        "data.init_args.num_workers": 2,
        "checkpoints.every_n_steps": 2,
        "samples.prompts": ["a cat"],
    }
    measured = {"wall_seconds": 1e6, "peak_memory_bytes": 2**40, "machine.threads": 64, "data.epochs": 0.5}
    copies("mha"), copies("sha", name="another", config=elsewhere, results=measured)

    code, out, err = compare(copies.root)

    assert code == 0, err
    assert "allowed" not in out


def test_tokens_may_differ_from_seed_to_seed(copies, compare):
    for attention in ("mha", "sha"):
        for seed in (1, 2):
            copies(attention, seed, results={"tokens_seen": 1000 + seed})

    code, _, err = compare(copies.root)

    assert code == 0, err


def test_tokens_may_not_differ_within_a_seed(copies, compare):
    copies("mha", results={"tokens_seen": 1000}), copies("sha", results={"tokens_seen": 1001})

    code, _, err = compare(copies.root)
    assert code == 2
    assert "differ in budget: tokens_seen is 1000 in" in err
    assert "and 1001 in" in err

    assert compare(copies.root, "--allow", "budget")[0] == 0


def sized_runs(copies) -> list[Path]:
    widths = {"mha": 64, "sha": 112, "mhe_add": 96}
    return [copies(attention, config={FF_WIDTH: width}) for attention, width in widths.items()]


def test_sizes_that_a_sweep_has_changed_may_differ(copies, compare):
    sizes = {"sha": {"model.net.ff_width": 112}, "mhe_add": {"model.net.ff_width": 96}}
    root = copies.sweep(sized_runs(copies), mode="equal_parameters", sizes=sizes)

    code, out, err = compare(root)

    assert code == 0, err
    assert "ff_width=112" in out


def test_sizes_that_no_sweep_has_changed_may_not_differ(copies, compare):
    sized_runs(copies)

    code, _, err = compare(copies.root)

    assert code == 2
    assert "differ in settings: model.init_args.net.init_args.ff_width is 64 in" in err
    assert "--allow settings" in err


def test_runs_without_a_size_of_their_own_must_agree_beside_one_that_has(copies, compare):
    sized, *others = copies("mqa", config={FF_WIDTH: 80}), *sized_runs(copies)
    root = copies.sweep([sized, *others], mode="equal_parameters", sizes={"mqa": {"model.net.ff_width": 80}})

    code, _, err = compare(root)

    assert code == 2
    assert f"ff_width is 64 in {others[0]} and 112 in {others[1]}" in err


def test_runs_of_one_attention_differ_by_their_seed_alone(copies, compare):
    copies("mha")
    dropout = "model.init_args.net.init_args.attention.init_args.dropout"
    for seed, p in ((1, 0.0), (2, 0.5)):
        copies("sha", seed, config={dropout: p})

    code, _, err = compare(copies.root)

    assert code == 2
    assert "differ in settings: attention.attention.dropout is 0.0 in" in err
    assert "and 0.5 in" in err


def test_seeds_of_one_attention_have_one_point_of_the_grid(copies, compare):
    roots = []
    for seed, lr in ((1, 0.01), (2, 0.02)):
        root = copies.root / f"sweep{seed}"
        run = copies("mha", seed, root=root, config={"model.init_args.lr": lr})
        point = {"model.lr": lr}
        roots.append(copies.sweep([run], settings={run.name: point}, grid=GRID, chosen={"mha": point}))

    code, _, err = compare(*roots)

    assert code == 2
    assert "differ in settings: model.lr is 0.01 in" in err


def test_chosen_points_of_the_grid_may_differ_between_attentions(copies, compare):
    runs, points = [], {}
    for attention, lr in (("mha", 0.01), ("sha", 0.02)):
        runs.append(copies(attention, config={"model.init_args.lr": lr}))
        points[attention] = {"model.lr": lr}
    settings = {run.name: point for run, point in zip(runs, points.values(), strict=True)}
    root = copies.sweep(runs, settings=settings, grid=GRID, chosen=points)

    code, out, err = compare(root)

    assert code == 0, err
    assert "lr=0.02" in out
    assert "Settings were chosen on the validation split" in out


def test_two_runs_of_one_attention_and_seed_are_refused(copies, compare):
    copies("mha"), copies("sha", name="a"), copies("sha", name="b")

    code, _, err = compare(copies.root)

    assert code == 2
    assert f"{copies.root / 'a'} and {copies.root / 'b'} are both sha with seed 1 on prose.jsonl; give one" in err


def test_a_missing_reference_is_refused(copies, compare):
    copies("mqa"), copies("sha")

    code, _, err = compare(copies.root)
    assert code == 2
    assert "no run of mha on prose.jsonl" in err
    assert "there are mqa, sha" in err

    code, out, _ = compare(copies.root, "--reference", "mqa")
    assert code == 0
    assert "sha keeps 100.0 % of mqa" in out


def test_an_unknown_category_is_refused(copies, compare):
    code, _, err = compare(copies("mha"), "--allow", "budget", "speed")

    assert code == 2
    assert "--allow speed is none of data, tokenizer, budget, versions, settings, evaluation, mode" in err


def test_a_split_without_scores_is_refused(copies, compare):
    code, _, err = compare(copies("mha"), "--split", "test")

    assert code == 2
    assert f"{copies.root / 'mha-seed1'} has no test/ppl; run `test` on it" in err


def test_a_real_run_says_what_it_was(trained):
    ((run,), _) = find_runs([trained])
    recorded = json.loads((trained / "results.json").read_text(encoding="utf-8"))

    assert (run.attention, run.task, run.metric.name) == ("mhe_add", "prose.jsonl", "ppl")
    assert run.score("test") == recorded["evaluations"]["test"]["metrics"]["test/ppl"]
    assert run.score("val") == recorded["metrics"]["val/ppl"]
    assert run.facts("test")["evaluation"] == {
        "checkpoint": {"kind": "last", "made": {}},
        "signatures": None,
        "data": {},
    }
    assert list(run.curves()["val/ppl"]) == [4, 8]
    assert yaml.safe_load((trained / "config.yaml").read_text())["seed_everything"] == run.seed


def test_attentions_with_another_dropout_are_not_mixed(copies, compare):
    copies("mha"), copies("sha", config={"model.init_args.net.init_args.attention.init_args.dropout": 0.5})

    code, _, err = compare(copies.root)
    assert code == 2
    assert "attention.attention.dropout is 0.0 in" in err
    assert "and 0.5 in" in err


def test_a_test_of_an_earlier_step_is_not_mixed_with_one_of_the_last(copies, compare):
    for attention, step in (("mha", 8), ("sha", 4)):
        copies(attention, test=10.0, results={"evaluations.test.checkpoint": f"elsewhere/step={step:08d}.ckpt"})

    code, _, err = compare(copies.root)
    assert code == 2
    assert "checkpoint.kind is 'last' in" in err
    assert "and 'step 4' in" in err


def test_runs_from_other_pretrainings_are_not_mixed(copies, compare):
    copies("mha", config={"init_from": "books/mha-seed1"}), copies("sha", config={"init_from": "news/sha-seed1"})

    code, _, err = compare(copies.root)
    assert code == 2
    assert "init_from is 'books/{attention}-{seed}' in" in err


def test_a_corpus_may_lie_elsewhere(copies, compare):
    copies("mha"), copies("sha", config={"data.init_args.corpus.path": "/elsewhere/prose.jsonl"})

    assert compare(copies.root)[0] == 0

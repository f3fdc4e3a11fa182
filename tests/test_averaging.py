"""Averages of checkpoints: the weights are their mean, ties and dtypes stay, and a kill changes no bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import yaml

from conftest import prepare
from mhe_lightning import run
from mhe_lightning.averaging import AVERAGED, average_checkpoints, last_checkpoints
from mhe_lightning.callbacks import AverageCheckpoints
from mhe_lightning.checkpoint import (
    CHECKSUM,
    FORMAT_VERSION,
    RECORD,
    TOKENIZER_HASH,
    AtomicCheckpointIO,
    CheckpointError,
    read_checkpoint,
    step_of,
)
from processes import run as run_processes

NET = {"class_path": "mhe_lightning.models.Decoder", "init_args": {"width": 8, "dropout": 0.1}}


def save(
    folder: Path, step: int, state: dict, *, net: dict = NET, tokenizer: str | None = "abc", every: int = 2
) -> Path:
    config = {"model": {"init_args": {"net": net}}, "checkpoints": {"every_n_steps": every}}
    checkpoint = {
        "state_dict": state,
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.4",
        "optimizer_states": [{"exp_avg": torch.zeros(5000)}],
        "loops": {},
        "callbacks": {},
        RECORD: {"format_version": FORMAT_VERSION, "config": yaml.safe_dump(config), TOKENIZER_HASH: tokenizer},
    }
    path = folder / f"step={step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


def weights(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What an average is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_the_mean_in_float64_in_their_own_dtype(dtype, tmp_path):
    drawn = [weights(7, 5, seed=seed, dtype=dtype) * 10.0**seed for seed in range(3)]
    paths = [save(tmp_path, step, {"w": w, "b": w[0].clone()}) for step, w in enumerate(drawn)]

    state = average_checkpoints(paths)["state_dict"]

    expected = torch.stack([w.double() for w in drawn]).mean(0)
    assert state["w"].dtype == dtype
    torch.testing.assert_close(state["w"].double(), expected.to(dtype).double(), rtol=1e-15, atol=0)
    assert torch.equal(state["b"], state["w"][0])


def test_a_mean_that_the_dtype_cannot_sum_is_exact(tmp_path):
    values = [1.0, 2.0**-24, 2.0**-24, 2.0**-24 + 4]
    paths = [save(tmp_path, i, {"w": torch.tensor([v])}) for i, v in enumerate(values)]

    assert average_checkpoints(paths)["state_dict"]["w"].item() == torch.tensor(sum(values) / 4).item()


def test_one_checkpoint_is_its_own_average_without_the_state_of_training(tmp_path):
    path = save(tmp_path, 4, {"w": weights(3, seed=1)})

    averaged = average_checkpoints([path])

    assert torch.equal(averaged["state_dict"]["w"], weights(3, seed=1))
    assert set(averaged) == {"state_dict", "epoch", "global_step", "pytorch-lightning_version", RECORD}
    assert averaged[RECORD] == {**read_checkpoint(path)[RECORD], AVERAGED: [4]}


def test_counters_are_those_of_the_highest_step_in_any_order(tmp_path):
    paths = [save(tmp_path, s, {"w": weights(3, seed=s), "seen": torch.tensor(10 * s), "note": s}) for s in (2, 6, 4)]

    averaged = average_checkpoints(paths)

    assert averaged["state_dict"]["seen"].item() == 60
    assert averaged["state_dict"]["note"] == 6
    assert averaged["global_step"] == 6
    assert averaged[RECORD][AVERAGED] == [2, 6, 4]


def test_tied_weights_stay_tied_and_are_written_once(tmp_path):
    def state(seed: int) -> dict:
        w = weights(100, 50, seed=seed)
        return {"embedding": w, "head": w, "other": weights(100, 50, seed=seed + 9)}

    paths = [save(tmp_path, step, state(step)) for step in (1, 2)]
    averaged = average_checkpoints(paths)
    AtomicCheckpointIO().save_checkpoint(averaged, tmp_path / "averaged.ckpt")

    read = read_checkpoint(tmp_path / "averaged.ckpt")["state_dict"]
    assert read["embedding"].data_ptr() == read["head"].data_ptr() != read["other"].data_ptr()
    assert (tmp_path / "averaged.ckpt").stat().st_size < 2 * 100 * 50 * 4 + 4096


W = {"w": torch.zeros(3)}
DIFFERENT = {
    "key": ({"v": torch.zeros(3)}, {}, r"state_dict.v is \(3,\) there and None here; state_dict.w is None there"),
    "shape": ({"w": torch.zeros(4)}, {}, r"state_dict.w is \(4,\) there and \(3,\) here"),
    "net": (W, {"net": {**NET, "init_args": {"width": 9}}}, "model.net.width is 9 there and 8 here"),
    "tokenizer": (W, {"tokenizer": "abd"}, "tokenizer is abd there and abc here"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_checkpoints_of_different_models_are_refused(case, tmp_path):
    state, other, named = DIFFERENT[case]
    paths = [save(tmp_path, 2, W), save(tmp_path, 4, state, **other)]

    with pytest.raises(ValueError, match=rf"step=00000004.ckpt is not of the model of .*step=00000002.ckpt.*{named}"):
        average_checkpoints(paths)


def test_weights_tied_in_one_checkpoint_only_are_refused(tmp_path):
    paths = [save(tmp_path, 2, {"a": W["w"], "b": W["w"]}), save(tmp_path, 4, {"a": W["w"], "b": W["w"].clone()})]
    with pytest.raises(ValueError, match=r"ties\.b is b there and a here"):
        average_checkpoints(paths)


def test_what_changes_no_weights_may_differ(tmp_path):
    other = {**NET, "init_args": {"width": 8, "dropout": 0.0}}  # a run went on without dropout
    assert average_checkpoints([save(tmp_path, 2, W), save(tmp_path, 4, W, net=other)])[RECORD][AVERAGED] == [2, 4]


def test_no_checkpoint_has_no_average():
    with pytest.raises(ValueError, match="at least one"):
        average_checkpoints([])


def test_the_last_checkpoints_are_whole_and_regular_but_for_the_newest(tmp_path):
    assert last_checkpoints(tmp_path, 3) == []
    paths = {step: save(tmp_path, step, W) for step in (2, 4, 5, 6, 8, 9)}
    save(tmp_path / "superseded", 10, W)
    assert last_checkpoints(tmp_path, 1) == [paths[9]]
    assert last_checkpoints(tmp_path, 4) == [paths[4], paths[6], paths[8], paths[9]]
    paths[8].write_bytes(b"")
    with pytest.warns(UserWarning, match="step=00000008.ckpt"):
        assert last_checkpoints(tmp_path, 9) == [paths[2], paths[4], paths[6], paths[9]]


@pytest.mark.parametrize(("last", "keep", "named"), [(-1, 2, r"averaging.last \(-1\)"), (3, 2, "--checkpoints.keep 3")])
def test_settings_out_of_range_are_refused(last, keep, named):
    with pytest.raises(ValueError, match=named):
        AverageCheckpoints(last, keep=keep)


# Of a run


def averaging(tiny_config, *, last: int, keep: int, **trainer) -> str:
    path = tiny_config(trainer=trainer)
    config = yaml.safe_load(path.read_text())
    config["checkpoints"]["keep"] = keep
    config["averaging"] = {"last": last}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def names(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    whole = [name for name in found if name.endswith(".ckpt")]
    assert found == sorted([*whole, *(name + CHECKSUM for name in whole)])
    return [name for name in whole if not name.startswith("best")]


def same_bits(one: Path, other: Path) -> bool:
    a, b = read_checkpoint(one), read_checkpoint(other)
    steps = a[RECORD][AVERAGED] == b[RECORD][AVERAGED]
    return steps and all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


def test_a_run_ends_with_the_average_of_its_last_checkpoints(command, tiny_config, tmp_path):
    path = averaging(tiny_config, last=3, keep=3)
    folder = tmp_path / "runs/tiny/checkpoints"

    code, out, err = command("fit", "--config", path)

    averaged = folder / "averaged-step=00000008.ckpt"
    assert code == 0, err
    assert f"averaged: {averaged}" in out
    assert names(folder) == [averaged.name, *(f"step={step:08d}.ckpt" for step in (4, 6, 8))]
    read = read_checkpoint(averaged)
    states = [read_checkpoint(folder / f"step={step:08d}.ckpt")["state_dict"] for step in (4, 6, 8)]
    assert read[RECORD][AVERAGED] == [4, 6, 8]
    assert list(map(sorted, (read["state_dict"], states[0]))) == [sorted(states[2])] * 2
    for name, value in read["state_dict"].items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(value, mean.float() if value.is_floating_point() else states[2][name])
    state = read["state_dict"]
    assert state["net.head.weight"].data_ptr() == state["net.token_embedding.weight"].data_ptr()

    code, _, err = command("validate", "--config", path, "--ckpt_path", "averaged")
    assert code == 0, err
    assert averaged.name in (tmp_path / "runs/tiny/results.json").read_text()
    code, out, err = command("generate", str(averaged), "--prompt", "the cat", "--max_new_tokens", "3")
    assert code == 0, err
    assert out.startswith("the cat")

    for ckpt_path in ("averaged", str(averaged)):
        code, _, err = command("fit", "--config", path, "--ckpt_path", ckpt_path)
        assert code == 2
        assert f"no optimizer state, so `fit` cannot go on from it; begin a new run with --init_from {averaged}" in err
    assert averaged.is_file()
    code, out, err = command(
        "fit", "--config", path, "--init_from", str(averaged), "--name", "next", "--trainer.max_steps", "2"
    )
    assert code == 0, err
    assert "weights loaded; new: nothing" in out
    assert "averaging.last (3): of 1 checkpoints" in err
    assert names(tmp_path / "runs/next/checkpoints") == ["averaged-step=00000002.ckpt", "step=00000002.ckpt"]


def test_a_run_that_went_on_keeps_the_average_of_its_own_course(command, tiny_config, tmp_path):
    path = averaging(tiny_config, last=2, keep=2, max_steps=4)
    folder = tmp_path / "runs/tiny/checkpoints"
    command("fit", "--config", path)
    assert names(folder)[0] == "averaged-step=00000004.ckpt"

    code, _, err = command("fit", "--config", path, "--ckpt_path", "auto", "--trainer.max_steps", "6")

    assert code == 0, err
    assert names(folder) == ["averaged-step=00000006.ckpt", "step=00000004.ckpt", "step=00000006.ckpt"]

    earlier = str(folder / "step=00000004.ckpt")
    off = ("--ckpt_path", earlier, "--trainer.max_steps", "5", "--averaging.last", "0")
    code, out, err = command("fit", "--config", path, *off)

    assert code == 0, err
    assert "averaged:" not in out
    assert names(folder) == ["step=00000004.ckpt", "step=00000005.ckpt"]
    assert names(folder / "superseded") == ["averaged-step=00000006.ckpt", "step=00000006.ckpt"]


def test_more_than_the_run_keeps_is_refused_before_an_earlier_run_is_touched(command, tiny_config, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/config.yaml").touch()

    code, _, err = command("fit", "--config", averaging(tiny_config, last=4, keep=3))

    assert code == 2
    assert "error: averaging.last (4) must be at most checkpoints.keep (3)" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs/tiny.1").exists()


def test_no_average_is_found_where_there_is_none(command, tiny_config, tmp_path):
    with pytest.raises(CheckpointError, match="make one with `consolidate"):
        run.resolve_checkpoint("averaged", tmp_path)
    code, _, err = command("fit", "--config", str(tiny_config()), "--ckpt_path", "averaged")
    assert code == 2
    assert "holds no averaged checkpoint" in err


ENDS = {
    "killed": ["processes.KillAt", "--trainer.callbacks.micro_batch=6"],
    "terminated": ["processes.SignalAt", "--trainer.callbacks.micro_batch=6", "--trainer.callbacks.number=15"],
}


def test_a_run_that_was_killed_or_terminated_ends_with_the_same_bits(tiny_config, tmp_path):
    path = averaging(tiny_config, last=3, keep=3, max_steps=9)
    prepare(yaml.safe_load(Path(path).read_text()))
    log = tmp_path / "log"
    fit = ["fit", "--config", path]
    folders = {name: tmp_path / "runs" / name / "checkpoints" for name in ("whole", *ENDS)}

    assert run_processes([*fit, "--name", "whole"], log=log) == [0], log.read_text()
    for name, (callback, *settings) in ENDS.items():
        code = run_processes([*fit, "--name", name, f"--trainer.callbacks+={callback}", *settings], log=log)
        assert code == [143 if name == "terminated" else -signal.SIGKILL], log.read_text()
        assert not list(folders[name].glob("averaged*"))
        assert step_of(last_checkpoints(folders[name], 1)[0]) == (7 if name == "terminated" else 6)
        assert run_processes([*fit, "--name", name, "--ckpt_path", "auto"], log=log) == [0], log.read_text()

    averaged = "averaged-step=00000009.ckpt"
    assert read_checkpoint(folders["whole"] / averaged)[RECORD][AVERAGED] == [6, 8, 9]
    for name in ENDS:
        assert names(folders[name]) == names(folders["whole"])
        assert same_bits(folders[name] / averaged, folders["whole"] / averaged)


# consolidate


@pytest.fixture(scope="module")
def kept_three(tmp_path_factory) -> Path:
    """Looks like a run that has kept three checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 4, 6):
        save(folder / "checkpoints", step, {"w": weights(50, seed=step)})
    return folder


def test_consolidating_a_finished_run_gives_the_file_of_its_end(command, tiny_config, tmp_path):
    path = averaging(tiny_config, last=3, keep=3)
    command("fit", "--config", path)
    folder = tmp_path / "runs/tiny/checkpoints"
    averaged, copy = folder / "averaged-step=00000008.ckpt", tmp_path / "elsewhere/copy.ckpt"
    before = averaged.read_bytes()

    code, out, err = command("consolidate", str(folder.parent), "--average", "3", "--out", str(copy))
    assert code == 0, err
    assert same_bits(copy, averaged)
    assert out.splitlines() == ["steps:    4, 6, 8", f"averaged: {copy} ({copy.stat().st_size / 2**20:.1f} MiB)"]
    code, out, err = command("consolidate", str(folder.parent))
    assert code == 0, err
    assert f"averaged: {averaged}" in out
    assert read_checkpoint(averaged)[RECORD][AVERAGED] == [8]  # made anew, of one
    state, newest = (read_checkpoint(p)["state_dict"] for p in (averaged, folder / "step=00000008.ckpt"))
    assert all(torch.equal(state[name], value) for name, value in newest.items())
    assert command("consolidate", str(folder.parent), "--average", "3", "--out", str(averaged))[0] == 0
    assert averaged.read_bytes() == before


REFUSED = {
    "none": (["--average", "0"], "average (0) must be at least 1"),
    "more than there are": (["--average", "4"], "at most 3, the complete checkpoints in"),
    "remedy": (["--average", "4"], "--checkpoints.keep 4"),
    "a file that exists": (["--out", "RUN/config.yaml"], "config.yaml exists"),
    "a checkpoint that exists": (["--out", "RUN/checkpoints/step=00000002.ckpt"], "step=00000002.ckpt exists"),
    "a name to go on from": (["--out", "RUN/checkpoints/step=00000009.ckpt"], "for the run's own checkpoints"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_consolidating_wrongly_exits_with_2_and_leaves_the_run_as_it_was(case, kept_three, command):
    args, named = REFUSED[case]
    (kept_three / "config.yaml").touch()
    before = names(kept_three / "checkpoints")

    code, _, err = command("consolidate", str(kept_three), *(arg.replace("RUN", str(kept_three)) for arg in args))

    assert code == 2
    assert named in err
    assert "Traceback" not in err
    assert names(kept_three / "checkpoints") == before
    assert (kept_three / "config.yaml").read_bytes() == b""


def test_what_is_kept_three_is_not_consolidated(kept_three, command, tmp_path):
    checkpoint = kept_three / "checkpoints/step=00000002.ckpt"
    for given, named in ((tmp_path / "nope", "does not exist"), (tmp_path, "no complete"), (checkpoint, "is a file")):
        code, _, err = command("consolidate", str(given))
        assert code == 2
        assert named in err
    assert not list(tmp_path.iterdir())  # not even a lock


def test_a_run_that_is_being_written_is_not_consolidated(kept_three, monkeypatch, command, tmp_path):
    def held(folder: Path) -> None:
        raise ValueError(f"{folder} is being written by process 1")

    monkeypatch.setattr(run, "lock", held)

    assert command("consolidate", str(kept_three), "--out", str(tmp_path / "reading.ckpt"))[0] == 0
    with pytest.raises(ValueError, match="is being written"):
        command("consolidate", str(kept_three))
    assert not list((kept_three / "checkpoints").glob("averaged*"))


def test_help_of_consolidate_explains_its_arguments(command):
    code, out, _ = command("consolidate", "--help")

    assert code == 0
    assert "--average" in out
    assert "--out" in out

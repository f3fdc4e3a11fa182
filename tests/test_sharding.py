"""However training is laid out over processes, it is the same training, and its checkpoints fit any other layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT, logged, masked_tokens, prepare
from mhe_lightning.checkpoint import checkpoints_in, newest_checkpoint, read_checkpoint
from mhe_lightning.cli import main
from processes import run

pytestmark = pytest.mark.distributed

STRATEGIES = ROOT / "configs/strategy"
LAYOUTS = {
    "ddp": (2, "ddp.yaml", {}),
    "fsdp": (2, "fsdp.yaml", {}),
    "tensor": (2, "tensor_parallel.yaml", {}),
    "fsdp on 4": (4, "fsdp.yaml", {"asynchronous_checkpoints": "false"}),
    "hybrid": (4, "hybrid.yaml", {"shard": "2"}),
    "fsdp and tensor": (4, "tensor_parallel.yaml", {}),
}
"""Processes, overlay, and more options of the strategy."""


def layout(name: str) -> list[str]:
    ranks, overlay, options = LAYOUTS[name]
    more = [f"--trainer.strategy.{key}={value}" for key, value in options.items()]
    return ["--config", str(STRATEGIES / overlay), f"--trainer.devices={ranks}", *more]


def ranks_of(name: str | None) -> int:
    return 1 if name is None else LAYOUTS[name][0]


class Runs:
    """Runs of one config in several layouts, each made once."""

    def __init__(self, config: Path, log: Path) -> None:
        self.config = config
        self.log = log
        self.folder = Path(yaml.safe_load(config.read_text(encoding="utf-8"))["trainer"]["default_root_dir"])

    def run(self, verb: str, name: str, at: str | None, *options: str, code: int = 0) -> Path:
        command = [verb, "--config", str(self.config), *([] if at is None else layout(at)), "--name", name, *options]
        codes = run(command, ranks=ranks_of(at), log=self.log)
        assert codes == [code] * ranks_of(at), self.log.read_text(encoding="utf-8")[-4000:]
        return self.folder / name


def losses(folder: Path, column: str = "train/loss") -> list[float]:
    return [float(value) for value in logged(folder, column).values()]


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def decoder(tiny_config: Callable[..., Path], prose: Path, tmp_path: Path) -> Runs:
    """20 steps of accumulated and clipped gradients, and evaluation sets of odd sizes."""
    fractions = {"validation_fraction": 0.1, "test_fraction": 0.1}
    path = tiny_config(
        net={
            "n_heads": 4,
            "dropout": 0.0,
            "attention": {"class_path": "mhe_lightning.attention.MHE", "init_args": {"combine": "add"}},
        },
        data={"corpus": {"path": str(prose), "tokenizer_size": 300, **fractions}, "eval_stride": 11},
        trainer={"max_steps": 20, "accumulate_grad_batches": 2, "val_check_interval": 10, "gradient_clip_val": 0.5},
    )
    prepare(yaml.safe_load(path.read_text(encoding="utf-8")))
    return Runs(path, tmp_path / "log")


@pytest.fixture
def one(decoder: Runs) -> Path:
    folder = decoder.run("fit", "one", None)
    assert max(losses(folder, "grad_norm")) > 0.5, "nothing was clipped"
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_and_scores_as_one_process_does(name, decoder, one):
    laid_out = decoder.run("fit", "laid_out", name)

    assert len(losses(one)) == 20
    assert losses(laid_out) == pytest.approx(losses(one), rel=1e-5, abs=0)
    assert losses(laid_out, "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-4, abs=0)
    assert losses(laid_out, "val/loss") == pytest.approx(losses(one, "val/loss"), rel=1e-5, abs=0)
    for column in ("tokens_seen", "lr"):
        assert losses(laid_out, column) == losses(one, column)

    shutil.rmtree(laid_out / "checkpoints")  # the same weights now, on one process and on several
    shutil.copytree(one / "checkpoints", laid_out / "checkpoints")
    for folder, at in ((one, None), (laid_out, name)):
        decoder.run("predict", folder.name, at, "--ckpt_path", "auto")
    expected, found = predictions(one), predictions(laid_out)
    assert len(found) % 2 == 1
    assert [(row["row"], row["tokens"]) for row in found] == [(row["row"], row["tokens"]) for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5, abs=0)


def test_a_sharded_checkpoint_goes_on_in_any_layout(decoder, one, command):
    stopped = ["--trainer.callbacks+=processes.SignalAt", "--trainer.callbacks.number=15"]
    reference = decoder.run("fit", "reference", "fsdp")
    begun = decoder.run("fit", "begun", "fsdp", *stopped, "--trainer.callbacks.micro_batch=21", code=143)
    saved = newest_checkpoint(begun / "checkpoints")
    assert saved is not None
    assert saved.is_dir()
    assert saved.name == "step=00000011.ckpt"

    for at in ("fsdp", "fsdp and tensor", "fsdp on 4", "tensor", "ddp", None):
        folder = shutil.copytree(begun, decoder.folder / "resumed")
        decoder.run("fit", "resumed", at, "--ckpt_path", "auto")
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5, abs=0), at
        assert len(losses(folder)) == 20
        code, out, _ = command("verify-resume", str(folder))
        assert code == 0
        assert "320 rows trained in the order of seed 1, none skipped, none repeated" in out
        if at == "fsdp":  # as many processes as before: bit for bit
            assert logged(folder, "train/loss") == logged(reference, "train/loss")
            assert_equal(*(read_checkpoint(newest_checkpoint(f / "checkpoints")) for f in (folder, reference)))
        shutil.rmtree(folder)


def test_one_file_of_a_sharded_checkpoint_goes_on_on_one_device_and_back(decoder, one, command):
    stopped = ["--trainer.callbacks+=processes.SignalAt", "--trainer.callbacks.number=15"]
    begun = decoder.run("fit", "begun", "tensor", *stopped, "--trainer.callbacks.micro_batch=21", code=143)

    code, out, err = command("consolidate", str(begun), "--keep_optimizer", "true")

    assert code == 0, err
    whole = begun / "whole-step=00000011.ckpt"
    assert f"one file: {whole}" in out
    assert whole.is_file()
    assert_equal(read_checkpoint(whole), read_checkpoint(newest_checkpoint(begun / "checkpoints")))
    for at in (None, "fsdp"):
        folder = decoder.run("fit", f"from file {at}", at, "--ckpt_path", str(whole))
        assert losses(folder) == pytest.approx(losses(one)[11:], rel=1e-5, abs=0)
    code, out, err = command("generate", str(begun), "--prompt", "the cat", "--max_new_tokens", "3")
    assert (code, err) == (0, "")
    assert out.startswith("the cat")


def test_what_is_tied_stays_tied_and_is_written_once(decoder):
    folder = decoder.run("fit", "tied", "fsdp", "--trainer.max_steps=2", "--trainer.val_check_interval=4")
    path = newest_checkpoint(folder / "checkpoints")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    state = read_checkpoint(path)["state_dict"]
    assert "state_dict/net.token_embedding.weight" in manifest["tensors"]
    assert "state_dict/net.head.weight" not in manifest["tensors"]
    assert state["net.head.weight"].data_ptr() == state["net.token_embedding.weight"].data_ptr()


def test_a_damaged_file_of_a_sharded_checkpoint_is_found_and_the_one_before_used(decoder):
    folder = decoder.run("fit", "damaged", "fsdp", "--trainer.max_steps=6", "--trainer.val_check_interval=12")
    earlier, newest = checkpoints_in(folder / "checkpoints")
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], bytes([content[0] ^ 1]) + content[1:]):
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match="skipping checkpoint"):
                assert newest_checkpoint(folder / "checkpoints") == earlier
        file.unlink()
        if file.name != "manifest.json":
            with pytest.warns(UserWarning, match="skipping checkpoint"):
                assert newest_checkpoint(folder / "checkpoints") == earlier
        file.write_bytes(content)
    assert newest_checkpoint(folder / "checkpoints") == newest


def assert_equal(one: object, other: object, place: str = "") -> None:
    """Two checkpoints are the same but for times, and for which files lie where."""
    if place.rpartition(".")[2] in ("wall_seconds", "training_seconds", "config", "StepTimes"):
        return
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert list(one) == list(other), place
        for key, value in one.items():
            assert_equal(value, other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        assert len(one) == len(other), place
        for number, value in enumerate(one):
            assert_equal(value, other[number], f"{place}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


SCORES = {
    "masked": ("val/loss", "val/accuracy", "val/pseudo_ppl"),
    "classes": ("val/loss", "val/score"),
    "translation": ("val/loss", "val/bleu"),
}
PREDICTED = {"masked": "pseudo_ppl", "classes": "prediction", "translation": "hypothesis"}


@pytest.mark.parametrize("task", SCORES)
@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_every_kind_of_net_trains_and_scores_as_on_one_process(
    task, name, tiny_config, tiny_classifier, tiny_translation, prose, tmp_path
):
    if task == "masked":
        config = masked_tokens(tiny_config, prose)
    elif task == "classes":
        net = {"init_std": 0.5, "dropout": 0.0}  # with smaller numbers rounding would decide the correlation
        config = tiny_classifier("glue", "stsb", net=net, model={"head_dropout": 0.0}, trainer={"max_steps": 4})
    else:
        config = tiny_translation(net={"dropout": 0.0})
    runs = Runs(config, tmp_path / "log")
    one, laid_out = runs.run("fit", "one", None), runs.run("fit", "laid_out", name)

    assert losses(laid_out) == pytest.approx(losses(one), rel=1e-5, abs=0)
    for column in SCORES[task]:
        assert losses(one, column)
        assert losses(laid_out, column) == pytest.approx(losses(one, column), rel=1e-4)
    found = {}
    for folder, at in ((one, None), (laid_out, name)):
        if folder == laid_out:
            shutil.rmtree(folder / "checkpoints")
            shutil.copytree(one / "checkpoints", folder / "checkpoints")
        runs.run("predict", folder.name, at, "--ckpt_path", "auto")
        found[folder.name] = predictions(folder)
    assert [row["row"] for row in found["laid_out"]] == [row["row"] for row in found["one"]]
    values = [[row[PREDICTED[task]] for row in rows] for rows in found.values()]
    assert values[1] == (values[0] if task == "translation" else pytest.approx(values[0], rel=1e-4))


OPTIONS = {
    "bf16": ["--trainer.precision=bf16-mixed"],
    "checkpointing": ["--model.activation_checkpointing=true"],
    "selective checkpointing": ["--model.activation_checkpointing=selective"],
    "compiled": ["--model.compile=true"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_layout_train_alike_in_shards(option, decoder):
    short = [*OPTIONS[option], "--trainer.max_steps=6", "--trainer.val_check_interval=12"]
    one, sharded = decoder.run("fit", "one", None, *short), decoder.run("fit", "sharded", "fsdp", *short)

    close = 1e-5 if option != "bf16" else 2e-2  # blocks' norms are bf16 too, where one process has float32
    assert losses(sharded) == pytest.approx(losses(one), rel=close, abs=0)


def test_sizes_that_do_not_divide_the_processes_are_a_bad_config(decoder):
    kept = decoder.run("fit", "kept", None, "--trainer.max_steps=2", "--trainer.val_check_interval=4")
    for option in ("tensor_parallel=4", "shard=3", "tensor_parallel=0"):
        decoder.run("fit", "kept", "fsdp", f"--trainer.strategy.{option}", code=2)
    assert newest_checkpoint(kept / "checkpoints").name == "step=00000002.ckpt"


def test_offloading_where_there_is_no_gpu_is_a_bad_config(decoder):
    for at in (None, "fsdp"):
        decoder.run("fit", "refused", at, "--model.offload=true", code=2)


def test_nothing_of_a_model_is_built_before_it_is_laid_out(decoder, monkeypatch, capsys):
    built = []
    monkeypatch.setattr("mhe_lightning.verbs.train.TrainCLI._run_subcommand", lambda self, _: built.append(self.model))
    monkeypatch.setattr("sys.argv", ["train.py"])

    main(["fit", "--config", str(decoder.config), *layout("fsdp")])

    assert all(parameter.is_meta for parameter in built[0].net.parameters())

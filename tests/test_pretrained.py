"""Finetuning that begins with a pretrained net: what fits is taken, what does not is refused and named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from conftest import ROOT
from mhe_lightning import run
from mhe_lightning.checkpoint import newest_checkpoint, read_checkpoint
from mhe_lightning.pretrained import WITHOUT_WEIGHTS
from processes import run as run_processes

NET = {
    "width": 16,
    "n_heads": 2,
    "n_layers": 1,
    "max_length": 48,
    "attention": {"class_path": "mhe_lightning.attention.MHE", "init_args": {"combine": "add"}},
}
TASKS = {
    "encoder": ("MaskedLanguageModeling", "Encoder", "MaskedLanguageModelingData", "wordpiece"),
    "decoder": ("LanguageModeling", "Decoder", "LanguageModelingData", "bpe"),
}


@pytest.fixture(scope="module")
def pretrained(prose: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Runs of two steps on prose: an ``encoder`` with masked tokens and a ``decoder``."""
    root = tmp_path_factory.mktemp("pretraining")
    runs = {}
    for name, (task, net, data, tokenizer) in TASKS.items():
        config = {
            "name": name,
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 2,
                "val_check_interval": 2,
                "default_root_dir": str(root),
            },
            "model": {
                "class_path": f"mhe_lightning.tasks.{task}",
                "init_args": {"net": {"class_path": f"mhe_lightning.models.{net}", "init_args": NET}},
            },
            "data": {
                "class_path": f"mhe_lightning.data.{data}",
                "init_args": {
                    "corpus": {
                        "path": str(prose),
                        "tokenizer": tokenizer,
                        "tokenizer_size": 300,
                        "validation_fraction": 0.1,
                    },
                    "block_length": 16,
                    "batch_size": 8,
                    "cache_dir": str(prepared),
                },
            },
        }
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        log = root / "log"
        assert run_processes(["fit", "--config", str(path)], log=log) == [0], log.read_text()
        runs[name] = root / name
    return SimpleNamespace(**runs)


def weights(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    checkpoints = folder / "checkpoints"
    path = newest_checkpoint(checkpoints) if step is None else checkpoints / f"step={step:08d}.ckpt"
    return read_checkpoint(path)["state_dict"]


FROZEN = {"model": {"lr": 1e-30, "weight_decay": 0.0}, "data": {"tokenizer": None}}
"""Training that moves no weight, on data that name no tokenizer."""


def test_the_net_is_the_checkpoints_and_the_head_is_new(pretrained, tiny_classifier, command, tmp_path):
    path = str(tiny_classifier("glue", "rte", **FROZEN))

    code, out, err = command("fit", "--config", path, "--init_from", str(pretrained.encoder))

    assert code == 0, err
    before, after = weights(pretrained.encoder), weights(tmp_path / "runs/rte")
    net = [name for name in after if name.startswith("net.")]
    assert net == [name for name in before if name.startswith("net.")]
    for name in net:
        assert torch.equal(after[name], before[name]), name
    assert after["head.classifier.weight"].shape == (2, 16)
    assert not torch.equal(after["head.dense.weight"], before["head.dense.weight"])
    (report,) = [line for line in out.splitlines() if line.startswith("from ")]
    checkpoint = newest_checkpoint(pretrained.encoder / "checkpoints")
    n_weights = sum(before[name].numel() for name in net)
    new = "head.classifier.bias, head.classifier.weight, head.dense.bias, head.dense.weight"
    left = "head.bias, head.dense.bias, head.dense.weight, head.norm.bias, head.norm.weight"
    assert report.startswith(f"from {checkpoint}: {n_weights:,} weights")
    assert report.endswith(f"; new: {new}; left: {left}")


def test_pretraining_that_goes_on_keeps_its_head(pretrained, command, tmp_path):
    config = yaml.safe_load((pretrained.encoder / "config.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"].update(lr=1e-30, weight_decay=0.0)
    config["trainer"]["default_root_dir"] = str(tmp_path)
    path = tmp_path / "on.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")

    code, out, err = command("fit", "--config", str(path), "--name", "on", "--init_from", str(pretrained.encoder))

    assert code == 0, err
    assert "; new: nothing; left: nothing" in out
    before, after = weights(pretrained.encoder), weights(tmp_path / "on")
    assert torch.equal(after["head.dense.weight"], before["head.dense.weight"])


def test_a_classifier_of_another_task_is_left_behind(pretrained, tiny_classifier, command, tmp_path):
    rte = str(tiny_classifier("glue", "rte", **FROZEN))
    code, _, err = command("fit", "--config", rte, "--init_from", str(pretrained.encoder))
    assert code == 0, err

    qnli = str(tiny_classifier("glue", "qnli", **FROZEN))
    code, out, err = command("fit", "--config", qnli, "--init_from", str(tmp_path / "runs/rte"))

    assert code == 0, err
    assert "left: head.classifier.bias, head.classifier.weight, head.dense.bias, head.dense.weight" in out


def test_a_checkpoint_file_does_as_well_as_its_run(pretrained, tiny_classifier, command):
    path = str(tiny_classifier("glue", "rte", **FROZEN))
    file = newest_checkpoint(pretrained.encoder / "checkpoints")
    code, out, err = command("fit", "--config", path, "--init_from", str(file))
    assert code == 0, err
    assert f"from {file}: " in out


def test_data_without_a_tokenizer_take_the_checkpoints(pretrained, tiny_classifier, command, tmp_path):
    path = str(tiny_classifier("glue", "rte", data={"tokenizer": None}))
    assert command("fit", "--config", path, "--init_from", str(pretrained.encoder))[0] == 0
    given, taken = ((folder / "tokenizer.json").read_text() for folder in (pretrained.encoder, tmp_path / "runs/rte"))
    assert given == taken


def test_prepare_takes_the_tokenizer_too(pretrained, tiny_classifier, command):
    path = str(tiny_classifier("glue", "wnli", data={"tokenizer": None}))
    code, out, err = command("prepare", "--config", path, "--init_from", str(pretrained.encoder))
    assert code == 0, err
    assert "label: glue-wnli" in out


MISFITS = {
    "attention variant": ({"attention": {**NET["attention"], "init_args": {"combine": "multiply"}}}, "combine is add"),
    "width": ({"width": 32}, "model.net.width is 16 there and 32 here"),
    "positions": ({"max_length": 64}, "model.net.max_length is 48 there and 64 here"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_another_net_is_refused_and_an_earlier_run_stays(misfit, pretrained, tiny_classifier, command, tmp_path):
    net, message = MISFITS[misfit]
    data = {"tokenizer": None}
    assert command("fit", "--config", str(tiny_classifier("glue", "rte", data=data)), "--init_from",
                   str(pretrained.encoder))[0] == 0  # fmt: skip
    path = str(tiny_classifier("glue", "rte", net=net, data=data))

    code, _, err = command("fit", "--config", path, "--init_from", str(pretrained.encoder))

    assert code == 2
    assert "does not fit this config" in err
    assert message in err
    assert not (tmp_path / "runs/rte.1").exists()


def test_another_tokenizer_is_refused(pretrained, tiny_classifier, command, tmp_path):
    path = str(tiny_classifier("glue", "rte"))  # trains one of its own
    code, _, err = command("fit", "--config", path, "--init_from", str(pretrained.encoder))
    assert code == 2
    assert "this config: the tokenizer is " in err
    assert "data.tokenizer null takes the checkpoint's" in err
    assert not (tmp_path / "runs/rte/checkpoints").exists()


def test_a_decoder_is_refused_for_an_encoder(pretrained, tiny_classifier, command):
    path = str(tiny_classifier("glue", "rte", data={"tokenizer": None}))
    code, _, err = command("fit", "--config", path, "--init_from", str(pretrained.decoder))
    assert code == 2
    assert "class_path is mhe_lightning.models.Decoder there and mhe_lightning.models.Encoder here" in err


def test_no_such_checkpoint_is_refused(tiny_classifier, command):
    path = str(tiny_classifier("glue", "rte"))
    code, _, err = command("fit", "--config", path, "--init_from", "nowhere")
    assert code == 2
    assert "nowhere does not exist; give a run directory or a checkpoint file" in err


def of_decoder(tiny_classifier) -> str:
    """The config of a decoder that classifies by its last token."""
    path = tiny_classifier("glue", "rte", model={"pooling": "last", **FROZEN["model"]}, data={"tokenizer": None})
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["net"]["class_path"] = "mhe_lightning.models.Decoder"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_decoder_is_finetuned_by_its_last_token(pretrained, tiny_classifier, command, tmp_path):
    path = of_decoder(tiny_classifier)
    code, _, err = command("fit", "--config", path, "--init_from", str(pretrained.decoder))
    assert code == 0, err
    before, after = weights(pretrained.decoder), weights(tmp_path / "runs/rte")
    for name in (name for name in after if name.startswith("net.")):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-20)
    assert command("test", "--config", path, "--ckpt_path", "auto")[0] == 0


def test_a_run_that_goes_on_does_not_begin_with_the_pretrained_net_again(
    pretrained, tiny_classifier, command, tmp_path
):
    path = str(tiny_classifier("glue", "rte", model={"schedule": "constant"}, data={"tokenizer": None}))
    begin = ["fit", "--config", path, "--init_from", str(pretrained.encoder)]
    whole = [*begin, "--name", "whole", "--trainer.max_steps", "4"]
    assert command(*whole)[0] == 0
    assert command(*begin)[0] == 0

    code, out, err = command(*begin, "--ckpt_path", "auto", "--trainer.max_steps", "4")

    assert code == 0, err
    assert "going on from" in out
    assert "weights loaded" not in out
    resumed, expected = weights(tmp_path / "runs/rte"), weights(tmp_path / "runs/whole")
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_takes_the_runs_tokenizer(verb, pretrained, tiny_classifier, command):
    path = str(tiny_classifier("glue", "rte", data={"tokenizer": None}))
    assert command("fit", "--config", path, "--init_from", str(pretrained.encoder))[0] == 0
    code, _, err = command(verb, "--config", path, "--ckpt_path", "auto")
    assert code == 0, err
    # and refuses another
    code, _, err = command(verb, "--config", path, "--ckpt_path", "auto", "--data.tokenizer", "wordpiece")
    assert code == 2
    assert "was trained with the tokenizer" in err


@pytest.mark.parametrize("pair", ["bert_base", "gpt2_base", "small_encoder"])
def test_a_shipped_classifier_has_the_net_of_the_shipped_pretraining(pair):
    classifier = "small_classifier" if pair == "small_encoder" else f"{pair}_classifier"
    nets = [
        yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text())["init_args"]["net"]
        for name in (pair, classifier)
    ]
    found = [key for key, _, _ in run.differences(*nets) if key.rpartition(".")[2] not in WITHOUT_WEIGHTS]
    assert found == []

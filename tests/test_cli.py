"""The command line: what it says and leaves behind, right and wrong."""

from __future__ import annotations

import json
import os
import signal

import pytest
import yaml

from conftest import ROOT, logged
from mhe_lightning.checkpoint import config_of, newest_checkpoint, read_checkpoint
from processes import run

WRONG = {
    "unknown verb": (["fitt"], "fitt"),
    "no such config": (["fit", "--config", "nope.yaml"], "nope.yaml"),
    "wrong key": (["fit", "--config", "CONFIG", "--model.net.attentio", "x"], "attentio"),
    "wrong key of the trainer": (["fit", "--config", "CONFIG", "--trainer.max_step", "3"], "--trainer.max_steps"),
    "wrong type": (["fit", "--config", "CONFIG", "--model.lr", "abc"], "model.lr"),
    "wrong path": (["fit", "--config", "CONFIG", "--model.net.attention=nope.yaml"], "nope.yaml"),
    "wrong choice": (["fit", "--config", "CONFIG", "--model.net.attention.combine", "plus"], "add"),
    "impossible value": (["fit", "--config", "CONFIG", "--model.net.n_heads", "5"], "try 1, 2, 4 or 8"),
    "negative learning rate": (["fit", "--config", "CONFIG", "--model.lr", "-1"], "positive"),
    "no such corpus": (["fit", "--config", "CONFIG", "--data.corpus.path", "./nope.txt"], "nope.txt"),
    "row longer than the positions": (["fit", "--config", "CONFIG", "--data.block_length", "17"], "17"),
    "no config": (["fit"], "--config"),
    "no such checkpoint": (["fit", "--config", "CONFIG", "--ckpt_path", "nope.ckpt"], "nope.ckpt"),
    "nothing to validate": (["validate", "--config", "CONFIG"], "--ckpt_path"),
    "nothing to generate from": (["generate", "nope"], "nope"),
    "a name that is a path": (["fit", "--config", "CONFIG", "--name", "."], "name ('.')"),
    "epochs of an endless stream": (["fit", "--config", "CONFIG", "--trainer.limit_train_batches", "3"], "max_steps"),
    "validation within a step": (
        ["fit", "--config", "CONFIG", "--trainer.accumulate_grad_batches", "3"],
        "multiple of",
    ),
    "no validation split": (["fit", "--config", "CONFIG", "--data.corpus.validation_fraction", "0"], "validation"),
    "prepare with a wrong size": (["prepare", "--config", "CONFIG", "--data.batch_size", "0"], "batch_size (0)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_gives_one_short_message_and_exit_code_2(case, command, tiny_config):
    args, named = WRONG[case]
    path = str(tiny_config(net={"max_length": 16}))

    code, _, err = command(*[path if arg == "CONFIG" else arg for arg in args])

    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(message) == 1
    assert named in message[0]
    assert "Traceback" not in err
    assert len(message[0]) < 500


def test_fit_leaves_a_whole_run(command, tiny_config, tmp_path):
    code, out, _ = command("fit", "--config", str(tiny_config()), "--samples.prompts=[the cat]")

    run = tmp_path / "runs" / "tiny"
    results = json.loads((run / "results.json").read_text())
    assert code == 0
    for name in ("config.yaml", "metrics.csv", "results.json", "samples.txt", "tokenizer.json", "checkpoints"):
        assert (run / name).exists(), name
    for place in ("metrics.csv", "samples.txt", "results.json"):
        assert place in out
    assert list(logged(run, "train/loss")) == list(range(1, 9))
    assert list(logged(run, "val/ppl")) == [4, 8]
    assert results["metrics"]["val/ppl"] == pytest.approx(float(logged(run, "val/ppl")[8]), rel=1e-6)
    assert results["tokens_seen"] == 8 * 8 * 16
    assert results["parameters"]["total"] == sum(
        t.numel() for key, t in _weights(run).items() if key not in ("tokens_seen", "net.head.weight")
    )
    for key in ("wall_seconds", "tokens_per_second", "peak_memory_bytes"):
        assert results[key] > 0
    assert {"versions", "git_commit", "seed"} <= set(results)
    assert len(results["data"]["corpus_sha256"]) == 64


def test_a_second_run_keeps_the_first(command, tiny_config, tmp_path):
    path = str(tiny_config(trainer={"max_steps": 2}))
    command("fit", "--config", path)
    first = (tmp_path / "runs/tiny/results.json").read_text()

    code, out, _ = command("fit", "--config", path)

    assert code == 0
    assert "tiny.1" in out
    assert (tmp_path / "runs/tiny.1/results.json").read_text() == first


def test_a_failed_start_leaves_the_earlier_run_in_its_place(command, tiny_config, tmp_path):
    path = str(tiny_config(trainer={"max_steps": 2}))
    command("fit", "--config", path)

    code, _, _ = command("fit", "--config", path, "--model.net.n_heads", "5")

    assert code == 2
    assert (tmp_path / "runs/tiny/results.json").exists()
    assert not (tmp_path / "runs/tiny.1").exists()


def test_the_command_line_wins_over_the_checkpoint_and_says_so(command, tiny_config, tmp_path):
    path = str(tiny_config(model={"schedule": "constant", "warmup_steps": 0}, trainer={"max_steps": 4}))
    command("fit", "--config", path)

    code, out, _ = command(
        "fit", "--config", path, "--ckpt_path", "auto", "--model.lr", "0.003", "--trainer.max_steps", "6"
    )

    rates = logged(tmp_path / "runs/tiny", "lr")
    assert code == 0
    assert "lr: 0.01 in the checkpoint, 0.003 now" in out
    assert [float(rates[step]) for step in range(1, 7)] == pytest.approx([0.01] * 4 + [0.003] * 2)


def test_a_finished_run_is_left_as_it_is_when_resumed(command, tiny_config, tmp_path):
    path = str(tiny_config(trainer={"max_steps": 4}))
    command("fit", "--config", path)
    losses = logged(tmp_path / "runs/tiny", "train/loss")

    code, _, _ = command("fit", "--config", path, "--ckpt_path", "auto")

    assert code == 0
    assert logged(tmp_path / "runs/tiny", "train/loss") == losses


def test_validate_test_and_predict_use_the_checkpoint(command, tiny_config, tmp_path):
    path = str(
        tiny_config(
            trainer={"max_steps": 4},
            data={"corpus": {"path": _corpus(tiny_config), "tokenizer_size": 300, "test_fraction": 0.1}},
        )
    )
    command("fit", "--config", path)
    run = tmp_path / "runs/tiny"

    for verb in ("validate", "test", "predict"):
        code, _, err = command(verb, "--config", path, "--ckpt_path", "auto")
        assert code == 0, err

    results = json.loads((run / "results.json").read_text())
    evaluations = results["evaluations"]
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    loss = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
    assert evaluations["validate"]["metrics"]["val/ppl"] == results["metrics"]["val/ppl"]
    assert results["metrics"]["val/ppl"] == pytest.approx(float(logged(run, "val/ppl")[4]), rel=1e-6)
    assert evaluations["test"]["checkpoint"].endswith("step=00000004.ckpt")
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert loss == pytest.approx(evaluations["test"]["metrics"]["test/loss"], rel=1e-6)


def test_generate_continues_prompts_and_lines_of_standard_input(command, tiny_config, tmp_path):
    command("fit", "--config", str(tiny_config(trainer={"max_steps": 2})))
    run = str(tmp_path / "runs/tiny")

    code, out, err = command("generate", run, "--prompt", "the cat", "a", "--max_new_tokens", "5")
    _, again, _ = command("generate", run, "--max_new_tokens", "5", "--batch_size", "1", stdin="the cat\na\n")
    _, greedy, _ = command("generate", run, "--prompt", "the cat", "--greedy", "--max_new_tokens", "5")
    _, cold, _ = command("generate", run, "--prompt", "the cat", "--temperature", "0", "--max_new_tokens", "5")

    assert code == 0, err
    assert out.startswith("the cat")
    assert out == again
    assert greedy == cold


def test_verify_resume_proves_a_run_and_refuses_a_forged_one(command, tiny_config, tmp_path):
    import torch

    from mhe_lightning.checkpoint import AtomicCheckpointIO

    command("fit", "--config", str(tiny_config(trainer={"max_steps": 4})))
    path = newest_checkpoint(tmp_path / "runs/tiny/checkpoints")
    code, out, _ = command("verify-resume", str(path))
    assert code == 0
    assert "none skipped, none repeated" in out

    forged = torch.load(path, weights_only=True)
    forged["LanguageModelingData"]["segments"][0]["digests"]["0"] = "00"
    AtomicCheckpointIO().save_checkpoint(forged, path)
    code, _, err = command("verify-resume", str(path))
    assert code == 2
    assert "rank 0" in err


def test_a_checkpoint_holds_the_whole_config(command, tiny_config, tmp_path):
    command("fit", "--config", str(tiny_config(trainer={"max_steps": 2})))
    run = tmp_path / "runs/tiny"

    config = config_of(read_checkpoint(newest_checkpoint(run / "checkpoints")))

    assert config == yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["net"]["init_args"]["attention"]["init_args"]["combine"] == "add"


def test_print_config_shows_overrides(command, tiny_config):
    code, out, _ = command(
        "fit", "--config", str(tiny_config()), "--model.net.attention.combine", "multiply", "--print_config"
    )

    shown = yaml.safe_load(out)
    assert code == 0
    assert shown["model"]["init_args"]["net"]["init_args"]["attention"]["init_args"]["combine"] == "multiply"


@pytest.mark.parametrize("verb", ["fit", "prepare", "generate", "verify-resume"])
def test_help_explains_every_argument(verb, command):
    code, out, _ = command(verb, "--help")

    assert code == 0
    assert "usage" in out


def test_help_of_a_class_explains_its_arguments(command):
    code, out, _ = command("fit", "--model.help", "mhe_lightning.tasks.LanguageModeling")

    assert code == 0
    assert "peak learning rate" in out


def _weights(run):
    return read_checkpoint(newest_checkpoint(run / "checkpoints"))["state_dict"]


def _corpus(tiny_config):
    return yaml.safe_load(tiny_config().read_text())["data"]["init_args"]["corpus"]["path"]


def test_a_checkpoint_of_another_model_is_refused(command, tiny_config):
    path = str(tiny_config(trainer={"max_steps": 2}))
    command("fit", "--config", path)

    code, _, err = command("fit", "--config", path, "--ckpt_path", "auto", "--model.net.width", "32")

    assert code == 2
    assert "does not fit the model" in err


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(command, tiny_config, tmp_path):
    path = str(tiny_config(trainer={"max_steps": 4}))
    command("fit", "--config", path)
    folder = tmp_path / "runs/tiny/checkpoints"

    command("fit", "--config", path, "--ckpt_path", str(folder / "step=00000002.ckpt"), "--trainer.max_steps", "3")

    assert newest_checkpoint(folder).name == "step=00000003.ckpt"
    assert newest_checkpoint(folder / "superseded").name == "step=00000004.ckpt"
    assert "ckpt_path: null" in (tmp_path / "runs/tiny/config.yaml").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_own_exit_code(number, code, tiny_config, tmp_path):
    path = str(tiny_config(trainer={"max_steps": 12}))
    signalled = [
        "--trainer.callbacks+=processes.SignalAt",
        "--trainer.callbacks.micro_batch=6",
        f"--trainer.callbacks.number={int(number)}",
    ]

    exit_codes = run(["fit", "--config", path, *signalled], log=tmp_path / "log")

    folder = tmp_path / "runs/tiny/checkpoints"
    assert exit_codes == [code], (tmp_path / "log").read_text()
    assert newest_checkpoint(folder).name == ("step=00000007.ckpt" if code == 143 else "step=00000006.ckpt")


def test_a_job_that_slurm_warns_is_requeued_when_its_step_is_saved(tiny_config, tmp_path, monkeypatch):
    saved = tmp_path / "runs/tiny/checkpoints/step=00000007.ckpt.sha256"
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\ntest -e {saved} && echo "$@" > {tmp_path}/asked\n', encoding="utf-8")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    options = ["--trainer.callbacks+=processes.SignalAt", "--trainer.callbacks.micro_batch=6"]
    path = str(tiny_config(trainer={"max_steps": 12}))

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signalled = [*options, f"--trainer.callbacks.number={int(number)}"]
        assert run(["fit", "--config", path, *signalled], log=tmp_path / "log") == [143]
        asked = tmp_path / "asked"
        assert asked.exists() == (number == signal.SIGUSR1), (tmp_path / "log").read_text()
        if asked.exists():
            assert asked.read_text() == "requeue 12_3\n"
            asked.unlink()


OPTIONS = {
    "bf16": ["--trainer.precision", "bf16-mixed"],
    "activation checkpointing": ["--model.activation_checkpointing", "true"],
    "document mask": ["--data.document_mask", "true"],
    "sliding window": ["--data.eval_stride", "4"],
    "accumulation": ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "8"],
    "inverse square root": ["--model.schedule", "inverse_sqrt"],
    "untied": ["--model.net.tie_embeddings", "false"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains_and_lowers_the_loss(option, command, tiny_config, tmp_path):
    code, _, err = command("fit", "--config", str(tiny_config(trainer={"max_steps": 16})), *OPTIONS[option])

    losses = logged(tmp_path / "runs/tiny", "train/loss")
    assert code == 0, err
    assert float(losses[16]) < float(losses[1]) - 0.5


@pytest.mark.parametrize("attention", sorted((ROOT / "configs/attention").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_attention_trains_by_one_override(attention, command, tiny_config, tmp_path):
    path = str(tiny_config(trainer={"max_steps": 16}))

    code, _, err = command("fit", "--config", path, f"--model.net.attention={attention}")

    losses = logged(tmp_path / "runs/tiny", "train/loss")
    assert code == 0, err
    assert float(losses[16]) < float(losses[1]) - 0.5


@pytest.mark.real_data
def test_a_shipped_experiment_trains_on_the_hubs_own_layout(command, real_data, monkeypatch, tmp_path):
    monkeypatch.setenv("MHE_DATA_ROOT", str(real_data))
    config = str(ROOT / "configs/experiment/small_wikitext2.yaml")
    options = f"--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.default_root_dir {tmp_path}/runs"

    code, _, err = command("fit", "--config", config, *options.split(), "--data.cache_dir", str(tmp_path))

    results = json.loads((tmp_path / "runs/small_wikitext2/results.json").read_text())
    assert code == 0, err
    assert results["data"]["splits"]["train"]["documents"] == 125

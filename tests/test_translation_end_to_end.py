"""Translation from a config to scores, files and standard output; on one rank and on two; killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import logged
from mhe_lightning.checkpoint import newest_checkpoint, read_checkpoint
from mhe_lightning.data import verify_certificate
from mhe_lightning.metrics import bleu
from processes import run

ON_TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def sentences(parallel) -> list[dict]:
    """The pairs of the test split."""
    import pyarrow.parquet

    (file,) = parallel.glob("test-*.parquet")
    return pyarrow.parquet.read_table(file)["translation"].to_pylist()


@pytest.fixture
def trained(tiny_translation, command, tmp_path) -> tuple[str, Path]:
    """The config of a run of a few steps, and the run."""
    path = str(tiny_translation())
    code, _, err = command("fit", "--config", path)
    assert code == 0, err
    return path, tmp_path / "runs" / name_of(path)


def name_of(path: str | Path) -> str:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))["name"]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def hypotheses_of(folder: Path) -> list[str]:
    return (folder / "submission" / "hypotheses.txt").read_text(encoding="utf-8").splitlines()


def test_fit_test_and_predict_agree_and_state_how_they_scored(trained, command, sentences):
    path, folder = trained
    assert {"val/loss", "val/ppl", "val/bleu", "val/chrf", "val/score"} <= set(results_of(folder)["metrics"])

    code, out, err = command("test", "--config", path, "--ckpt_path", "auto")
    assert code == 0, err
    evaluation = results_of(folder)["evaluations"]["test"]
    assert evaluation["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert evaluation["signatures"]["bleu"] in out + err

    assert command("predict", "--config", path, "--ckpt_path", "auto")[0] == 0
    found = hypotheses_of(folder)
    assert len(found) == len(sentences)
    assert evaluation["metrics"]["test/bleu"] == pytest.approx(
        bleu(found, [s["de"] for s in sentences]).value, abs=1e-5
    )


def test_translate_gives_what_predict_gives_line_by_line(trained, command, sentences):
    path, folder = trained
    assert command("predict", "--config", path, "--ckpt_path", "auto")[0] == 0
    sources = [pair["en"] for pair in sentences]

    for options in ([], ["--batch_size", "2"], ["--buffer_size", "2"], ["--beam_size", "2", "--extra_tokens", "5"]):
        code, out, err = command("translate", str(folder), *options, stdin="\n".join(sources) + "\n")
        assert code == 0, err
        assert out.splitlines() == hypotheses_of(folder)


def test_an_empty_line_stays_empty_and_unknown_characters_do_no_harm(trained, command):
    _, folder = trained
    code, out, err = command("translate", str(folder), stdin="\n   \nZażółć 我 \U0001f98a\n\n")
    assert code == 0, err
    lines = out.split("\n")
    assert len(lines) == 5
    assert [lines[0], lines[1], lines[3]] == ["", "", ""]


def test_a_line_beyond_the_positions_is_cut_and_named(trained, command):
    _, folder = trained
    code, out, err = command("translate", str(folder), stdin="a b\n" + "c d " * 100 + "\n")
    assert code == 0, err
    assert "line 2 is cut to 64 tokens" in err
    assert "line 1" not in err
    assert len(out.splitlines()) == 2


def test_n_best_lines_carry_number_and_score(trained, command):
    _, folder = trained
    code, out, err = command("translate", str(folder), "--n_best", "2", "--beam_size", "3", stdin="a b\n\nc\n")
    assert code == 0, err
    rows = [line.split(" ||| ") for line in out.splitlines()]
    assert [row[0] for row in rows] == ["0", "0", "1", "2", "2"]
    scores = [float(row[2]) for row in rows]
    assert scores[0] >= scores[1]
    assert scores[3] >= scores[4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n_best", "5"], "n_best (5) must be from 1 to beam_size (2)"),
        (["--device", "abacus"], "device (abacus) cannot be used"),
        (["--ckpt_path", "averaged"], "holds no averaged checkpoint"),
        (["--beam_size", "0"], "beam_size (0) must be at least 1"),
        (["--batch_size", "0"], "batch_size (0) must be at least 1"),
        (["--length_penalty", "-1"], "length_penalty (-1.0) must be"),
    ],
)
def test_bad_options_of_translate_are_refused(trained, command, options, message):
    code, out, err = command("translate", str(trained[1]), *options, stdin="")
    assert (code, out) == (2, "")
    assert message in err


def test_translate_and_generate_refuse_each_others_models(trained, tiny_config, command, tmp_path):
    code, _, err = command("generate", str(trained[1]), "--prompt", "a")
    assert code == 2
    assert "holds a EncoderDecoder" in err
    assert command("fit", "--config", str(tiny_config()), "--trainer.max_steps", "1", "--name", "lm")[0] == 0
    code, _, err = command("translate", str(tmp_path / "runs" / "lm"), stdin="a\n")
    assert code == 2
    assert "holds a Decoder; only encoder-decoders translate" in err


def test_a_metric_that_is_not_there_keeps_no_best_checkpoint_and_is_named(tiny_translation, command, tmp_path):
    path = str(tiny_translation())
    missing = r"checkpoints\.monitor \(val/score\) is not among the metrics train/loss, val/loss, val/ppl, so no best"
    with pytest.warns(UserWarning, match=missing):
        assert command("fit", "--config", path, "--model.fit_beam_size", "0")[0] == 0
    assert not list((tmp_path / "runs" / name_of(path) / "checkpoints").glob("best-*"))


def test_the_averaged_checkpoint_of_a_run_translates(tiny_translation, command, tmp_path):
    path = str(tiny_translation())
    assert command("fit", "--config", path, "--averaging.last", "2", "--checkpoints.every_n_steps", "2")[0] == 0
    folder = tmp_path / "runs" / name_of(path)
    (averaged,) = folder.glob("checkpoints/averaged-*.ckpt")
    lines = "the cat\na dog ran\n"
    tokenizer = ["--tokenizer", str(folder / "tokenizer.json")]
    outputs = [
        command("translate", *args, stdin=lines)
        for args in ([str(folder), "--ckpt_path", "averaged"], [str(averaged), *tokenizer])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == 0


@pytest.mark.parametrize("place", ["encoder_attention", "decoder_attention", "cross_attention"])
def test_each_place_takes_an_attention_of_its_own_on_the_command_line(place, tiny_translation, command, tmp_path):
    path = str(tiny_translation(trainer={"max_steps": 1, "val_check_interval": 1}))
    root = Path(__file__).parents[1]
    code, _, err = command("fit", "--config", path, f"--model.net.{place}={root}/configs/attention/mqa.yaml")
    assert code == 0, err
    weights = read_checkpoint(newest_checkpoint(tmp_path / "runs" / name_of(path) / "checkpoints"))["state_dict"]
    own = {
        "encoder_attention": "net.encoder_blocks.0.attention",
        "decoder_attention": "net.decoder_blocks.0.attention",
        "cross_attention": "net.decoder_blocks.0.cross_attention",
    }
    assert {name for name, prefix in own.items() if f"{prefix}.e_q" not in weights} == {place}


@pytest.mark.distributed
def test_two_ranks_train_score_and_translate_as_one_does(tiny_translation, parallel, tmp_path):
    path = str(
        tiny_translation(
            net={"dropout": 0.0},
            trainer={"max_steps": 6, "val_check_interval": 3},
            data={"splits": {"test": "validation"}},  # 7 rows, in batches of 3
        )
    )
    log, found = tmp_path / "log", []
    averaging = ["--averaging.last=2", "--checkpoints.every_n_steps=3"]
    for name, ranks, more in (("one", 1, []), ("two", 2, ON_TWO)):
        codes = run(["fit", "--config", path, "--name", name, *averaging, *more], ranks=ranks, log=log)
        assert codes == [0] * ranks, log.read_text()
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    assert (two / "checkpoints/averaged-step=00000006.ckpt").is_file()
    for column in ("train/loss", "val/loss"):
        losses = {step: float(value) for step, value in logged(one, column).items()}
        assert losses
        assert {k: float(v) for k, v in logged(two, column).items()} == pytest.approx(losses, rel=1e-5)
    assert logged(two, "tokens_seen") == logged(one, "tokens_seen")

    for ranks, more in ((1, []), (2, ON_TWO)):  # of one checkpoint
        for verb in ("test", "predict"):
            codes = run([verb, "--config", path, "--name", "one", "--ckpt_path", "auto", *more], ranks=ranks, log=log)
            assert codes == [0] * ranks, log.read_text()
        predictions = (one / "predictions.jsonl").read_text(encoding="utf-8")
        found.append((results_of(one)["evaluations"]["test"]["metrics"], predictions, hypotheses_of(one)))
        (one / "predictions.jsonl").unlink()
    assert found[0] == found[1], "batches do not depend on the number of ranks, so neither does a bit"
    assert len(found[0][2]) == 7


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks_over_the_same_batches(tiny_translation, command, tmp_path):
    path = str(tiny_translation(net={"dropout": 0.0}, model={"schedule": "constant"}))
    log = tmp_path / "log"
    fit = ["fit", "--config", path, "--name"]
    assert run([*fit, "whole", "--trainer.max_steps=8"], log=log) == [0], log.read_text()
    assert run([*fit, "moved", "--trainer.max_steps=4", *ON_TWO], ranks=2, log=log) == [0, 0], log.read_text()
    goes_on = [*fit, "moved", "--trainer.max_steps=8", "--ckpt_path", "auto"]
    assert run(goes_on, log=log) == [0], log.read_text()

    whole, moved = tmp_path / "runs/whole", tmp_path / "runs/moved"
    losses = {step: float(value) for step, value in logged(whole, "train/loss").items()}
    assert list(losses) == list(range(1, 9))
    assert {k: float(v) for k, v in logged(moved, "train/loss").items()} == pytest.approx(losses, rel=1e-5)
    code, out, err = command("verify-resume", str(moved))
    assert code == 0, err
    assert "8 batches trained in the order of seed 1, none skipped, none repeated" in out
    state = read_checkpoint(newest_checkpoint(moved / "checkpoints"))["TranslationData"]
    assert [segment["world_size"] for segment in state["segments"]] == [2, 1]
    assert verify_certificate(state) == 8

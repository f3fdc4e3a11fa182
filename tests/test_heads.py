"""The verb `heads`, on a tiny model of every kind."""

from __future__ import annotations

import json

import pytest
import yaml

TEXT = "the cat sings under a tree\na dog runs slowly\n\nthe bird sleeps over the stone\n"


@pytest.fixture
def fit(command, tmp_path):
    """Trains a config for one step; gives the run."""

    def run(path, *options: str):
        code, _, err = command("fit", "--config", str(path), "--trainer.max_steps=1", *options)
        assert code == 0, err
        name = options[options.index("--name") + 1] if "--name" in options else yaml.safe_load(path.read_text())["name"]
        return tmp_path / "runs" / name

    return run


def test_runs_are_measured_side_by_side_and_pictured(fit, command, tiny_config, tmp_path):
    config = tiny_config()
    runs = [
        fit(config, f"--model.net.attention=mhe_lightning.attention.{kind}", "--name", kind) for kind in ("SHA", "MHA")
    ]
    text, out_folder = tmp_path / "text.txt", tmp_path / "made" / "out"
    text.write_text(TEXT, encoding="utf-8")
    code, out, err = command("heads", *map(str, runs), "--text", str(text), "--out", str(out_folder))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["SHA", "MHA"]
    assert lines[1].split() == ["place", "layer", *["JS", "(bits)", "cosine"] * 2]
    assert [line.split()[:4] for line in lines[2:4]] == [["self", str(i), "0.0000", "1.0000"] for i in (0, 1)]
    assert len({len(line) for line in lines[:4]}) == 1, "columns are aligned"

    record = json.loads((out_folder / "heads.json").read_text(encoding="utf-8"))
    assert record["text"] == str(text)
    assert list(record["runs"]) == ["SHA", "MHA"]
    first, second = record["runs"]["MHA"]["layers"]
    assert (first["place"], first["layer"], second["layer"]) == ("self", 0, 1)
    assert lines[2].split()[4:] == [f"{first['jensen_shannon']:.4f}", f"{first['cosine']:.4f}"]
    assert {path.name for path in out_folder.iterdir()} == {
        "heads.json",
        "heads.png",
        "heads.svg",
        "maps-self-layer0.png",
        "maps-self-layer1.png",
    }

    code, again, err = command("heads", *map(str, runs), stdin=TEXT)
    assert (code, again.splitlines()) == (0, lines[:4]), err


def test_an_encoder_reads_the_text_between_its_special_tokens(fit, command, tiny_classifier):
    run = fit(tiny_classifier("glue", "cola"))
    code, out, err = command("heads", str(run), "--max_tokens", "20", stdin=TEXT)
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [["self", "0"]]


def test_an_encoder_decoder_has_three_places(fit, command, tiny_translation, tiny_config, tmp_path):
    run, other = fit(tiny_translation()), fit(tiny_config())
    code, out, err = command("heads", str(run), str(other), "--out", str(tmp_path / "out"), stdin=TEXT)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[2:7]]
    assert [row[0] for row in rows] == ["encoder", "decoder", "cross", "self", "self"]
    assert rows[0][4:] == rows[3][2:4] == ["–", "–"]
    assert (tmp_path / "out" / "maps-cross-layer0.png").is_file()


def test_what_cannot_be_measured_is_refused(fit, command, tiny_config, tmp_path):
    run = str(fit(tiny_config()))
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 au lait\n")
    for options, message in {
        (run,): "the text has 0 tokens; give one of at least 2",
        (run, run): "is given twice",
        (run, "--max_tokens", "1"): "max_tokens (1) must be at least 2",
        (run, "--batch_size", "0"): "batch_size (0) must be at least 1",
        (run, "--text", str(tmp_path / "none.txt")): "none.txt: No such file",
        (run, "--text", str(latin)): "is not UTF-8 text",
        (run, "--ckpt_path", "averaged"): "holds no averaged checkpoint",
        (str(tmp_path / "nothing"),): "does not exist",
    }.items():
        code, out, err = command("heads", *options, stdin="")
        assert (code, out) == (2, ""), options
        assert message in err

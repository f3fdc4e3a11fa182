"""What `import` writes is a run directory, which the verbs take that take a trained model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer

from interop.stock_models import GPT2, edit_tensors, saved, stock, written
from mhe_lightning.checkpoint import RECORD, config_of, newest_checkpoint, read_checkpoint
from mhe_lightning.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from mhe_lightning.interop.importing import import_checkpoint
from mhe_lightning.nets import load_net
from mhe_lightning.weights_only import ORIGIN


@pytest.fixture
def decoder_folder(prose: Path, tmp_path: Path) -> Path:
    """A GPT-2 checkpoint with a tokenizer, of the shape that `tiny_config` has."""
    tokenizer = train_tokenizer([json.loads(line)["text"] for line in prose.read_text().splitlines()], "bpe", 300)
    size = tokenizer.get_vocab_size()
    options = {**GPT2, "vocab_size": size, "n_embd": 16, "n_positions": 16, "n_inner": None}
    end = tokenizer.token_to_id("<|endoftext|>")
    folder = saved(stock("GPT2LMHeadModel", **{**options, "bos_token_id": end, "eos_token_id": end}), tmp_path / "hf")
    tokenizer.enable_truncation(8)  # which belongs to no run
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_import_writes_a_run_directory_and_says_what_it_is(decoder_folder, tmp_path, command):
    out = tmp_path / "run"

    code, printed, err = command("import", str(decoder_folder), str(out))

    assert code == 0, err
    lines = dict(line.split(": ", 1) for line in printed.splitlines())
    assert lines["class"].strip() == "GPT2LMHeadModel → Decoder with MHA, of the task LanguageModeling"
    n_parameters = sum(
        p.numel() for p in load_net(read_checkpoint(newest_checkpoint(out / "checkpoints"))).parameters()
    )
    assert lines["tokenizer"].strip() == "300 tokens"
    assert lines["parameters"].strip().startswith(f"{n_parameters:,}: ")
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "checkpoints/step=00000000.ckpt",
        "checkpoints/step=00000000.ckpt.sha256",
        "config.yaml",
        "tokenizer.json",
    ]
    record = read_checkpoint(out / "checkpoints/step=00000000.ckpt")[RECORD]
    assert record["tokenizer_sha256"] == tokenizer_hash(load_tokenizer(decoder_folder))
    assert record[ORIGIN]["source"] == str(decoder_folder)
    assert record[ORIGIN]["config"]["model_type"] == "gpt2"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_there_is_not_touched(decoder_folder, tmp_path, command):
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine").write_text("kept")
    code, _, err = command("import", str(decoder_folder), str(out))
    assert code == 2
    assert err == f"error: {out} exists; remove it, or choose another folder\n"
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_folder_that_appears_meanwhile_is_not_touched(decoder_folder, tmp_path):
    out = tmp_path / "run"
    found = import_checkpoint(decoder_folder)
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists; remove it, or choose another folder"):
        written(found, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_refused_checkpoint_leaves_nothing(decoder_folder, tmp_path, command):
    edit_tensors(decoder_folder, lambda tensors: tensors.pop("transformer.wpe.weight"))
    code, _, err = command("import", str(decoder_folder), str(tmp_path / "run"))
    assert code == 2
    assert "lacks wpe.weight (16, 16)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(decoder_folder):
    tokenizer = load_tokenizer(decoder_folder)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(decoder_folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 301 tokens but the model 300"):
        import_checkpoint(decoder_folder)


TEXTS = ["The dog RUNS over a stone.", "Ünder light: 3 rivers'", "  spaces  "]


@pytest.mark.parametrize("lower", [True, False])
def test_the_vocab_txt_of_a_bert_is_its_tokenizer(lower, tmp_path):
    folder = saved(stock("BertModel"), tmp_path / "hf")
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] the dog The runs ##s run a stone . , : u ##n ##d ##er Ü light 3 river '"
    (folder / "vocab.txt").write_text(pieces.replace(" ", "\n"), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))

    text = import_checkpoint(folder).tokenizer_json

    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=lower)
    assert [Tokenizer.from_str(text).encode(t).ids for t in TEXTS] == [theirs(t)["input_ids"] for t in TEXTS]


def test_the_vocab_json_and_merges_of_a_gpt2_are_its_tokenizer(decoder_folder):
    trained = load_tokenizer(decoder_folder)
    (decoder_folder / "tokenizer.json").unlink()
    trained.model.save(str(decoder_folder))  # vocab.json and merges.txt

    text = import_checkpoint(decoder_folder).tokenizer_json

    found = Tokenizer.from_str(text)
    texts = [*TEXTS, "a<|endoftext|>b"]
    assert [found.encode(t).ids for t in texts] == [trained.encode(t).ids for t in texts]
    assert [found.decode(trained.encode(t).ids) for t in texts] == [
        trained.decode(trained.encode(t).ids) for t in texts
    ]


def test_a_vocabulary_that_is_none_is_refused(decoder_folder):
    (decoder_folder / "tokenizer.json").unlink()
    (decoder_folder / "vocab.json").write_text("{")
    (decoder_folder / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        import_checkpoint(decoder_folder)


def test_without_a_tokenizer_it_is_said(tmp_path):
    found = import_checkpoint(saved(stock("GPT2LMHeadModel"), tmp_path / "hf"))
    assert found.tokenizer_json is None
    assert found.notes[-1].startswith("there is no tokenizer.json")


@pytest.fixture
def run_directory(decoder_folder: Path, tmp_path: Path) -> Path:
    written(import_checkpoint(decoder_folder), tmp_path / "imported")
    return tmp_path / "imported"


def test_generate_takes_it(run_directory, decoder_folder, command):
    model = transformers.GPT2LMHeadModel.from_pretrained(decoder_folder).eval()
    tokenizer = load_tokenizer(decoder_folder)

    code, out, err = command(
        "generate", str(run_directory), "--prompt", "the dog", "--greedy", "--max_new_tokens", "5", "--device", "cpu"
    )

    assert code == 0, err
    ids = torch.tensor([[tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode("the dog").ids]])
    continued = model.generate(ids, max_new_tokens=5, do_sample=False)[0, 1:].tolist()
    assert out.rstrip("\n") == tokenizer.decode(continued)


def test_fit_begins_with_it(run_directory, tiny_config, command, prose, tmp_path):
    corpus = {
        "path": str(prose),
        "tokenizer": str(run_directory / "tokenizer.json"),
        "validation_fraction": 0.1,
    }
    mha = {"class_path": "mhe_lightning.attention.MHA"}
    path = tiny_config(
        net={"attention": mha}, model={"lr": 1e-30, "weight_decay": 0.0}, data={"corpus": corpus},
        trainer={"max_steps": 2, "val_check_interval": 2},
    )  # fmt: skip

    code, out, err = command("fit", "--config", str(path), "--init_from", str(run_directory))

    assert code == 0, err
    assert "; new: nothing; left: nothing" in out
    before = read_checkpoint(newest_checkpoint(run_directory / "checkpoints"))
    after = read_checkpoint(newest_checkpoint(tmp_path / "runs/tiny/checkpoints"))
    for name in (name for name in before["state_dict"] if name.startswith("net.")):
        assert torch.equal(after["state_dict"][name], before["state_dict"][name]), name
    ours, imported = (config_of(checkpoint)["model"]["init_args"]["net"] for checkpoint in (after, before))
    assert list(imported["init_args"]) == list(ours["init_args"])


def test_a_bert_is_finetuned_from_it(tiny_classifier, command, prose, tmp_path):
    texts = [json.loads(line)["text"] for line in prose.read_text().splitlines()]
    tokenizer = train_tokenizer(texts, "wordpiece", 256)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 48}
    model = stock("BertModel", **shape, vocab_size=tokenizer.get_vocab_size())
    folder = saved(model, tmp_path / "hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    written(import_checkpoint(folder), tmp_path / "bert")
    mha = {"class_path": "mhe_lightning.attention.MHA"}
    path = tiny_classifier(
        "glue", "rte", net={"attention": mha}, model={"lr": 1e-30, "weight_decay": 0.0}, data={"tokenizer": None}
    )

    code, out, err = command("fit", "--config", str(path), "--init_from", str(tmp_path / "bert"))

    assert code == 0, err
    new = "head.classifier.bias, head.classifier.weight, head.dense.bias, head.dense.weight"
    assert f"; new: {new}; left: nothing" in out
    state = read_checkpoint(newest_checkpoint(tmp_path / "runs/rte/checkpoints"))["state_dict"]
    assert torch.equal(state["net.token_embedding.weight"], model.embeddings.word_embeddings.weight)


def test_fit_refuses_to_go_on_from_it(run_directory, tiny_config, command, prose):
    path = str(run_directory / "checkpoints/step=00000000.ckpt")
    corpus = {"path": str(prose), "tokenizer": str(run_directory / "tokenizer.json"), "validation_fraction": 0.1}
    code, _, err = command("fit", "--config", str(tiny_config(data={"corpus": corpus})), "--ckpt_path", path)
    assert code == 2
    assert f"begin a new run with --init_from {path}" in err


def test_the_config_is_a_config(run_directory):
    config = yaml.safe_load((run_directory / "config.yaml").read_text())
    assert config == config_of(read_checkpoint(run_directory / "checkpoints/step=00000000.ckpt"))
    assert config["model"]["init_args"]["net"]["init_args"]["ff_width"] is None  # 4 × width, as configs leave it out


def test_files_are_as_readable_as_any_other(run_directory):
    mask = os.umask(0)
    os.umask(mask)
    for path in run_directory.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path

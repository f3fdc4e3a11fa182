"""Other libraries' files are read as plain data, and a broken one is named in one line."""

from __future__ import annotations

import json
import pickle
import struct
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mhe_lightning.interop.reading import locate, read_config, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    (line,) = str(error.value).splitlines()
    return line


def write_sharded(folder: Path, **weight_map: object) -> None:
    save_file({"a.weight": TENSORS["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    files = {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", **weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_one_file_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path)
    assert set(found) == set(TENSORS)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_shards_are_read_together(tmp_path):
    write_sharded(tmp_path)
    found = read_tensors(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", 3])
def test_an_index_that_names_files_elsewhere_is_refused(name, tmp_path):
    write_sharded(tmp_path, b=name)
    with pytest.raises(ValueError, match=r"must be the plain name of a .safetensors beside it") as error:
        read_tensors(tmp_path)
    assert repr(name) in one_line(error)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors does not exist, but") as error:
        read_tensors(tmp_path)
    one_line(error)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path):
    write_sharded(tmp_path, b="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="has no tensor b, but") as error:
        read_tensors(tmp_path)
    one_line(error)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "{", "\x00"])
def test_an_index_that_is_none_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (has|is|holds)") as error:
        read_tensors(tmp_path)
    one_line(error)


def damaged(content: bytes) -> dict[str, bytes]:
    header = struct.unpack("<Q", content[:8])[0]
    return {
        "cut in its tensors": content[:-3],
        "cut in its header": content[: 8 + header // 2],
        "cut to nothing": b"",
        "without an end": content + b"\x00" * 5,
        "of an absurd header": struct.pack("<Q", 1 << 62) + content[8:],
        "pickled": pickle.dumps({"a.weight": 1}),
        "of tensors beyond its end": content[:8] + content[8:].replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
    }


@pytest.mark.parametrize("how", damaged(b"\x00" * 8))
def test_damaged_weights_are_refused(how, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(damaged(path.read_bytes())[how])
    with pytest.raises(ValueError, match="is truncated, damaged or no safetensors") as error:
        read_tensors(tmp_path)
    one_line(error)


def test_a_pointer_of_git_lfs_is_told_apart(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull") as error:
        read_tensors(tmp_path)
    one_line(error)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "run"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "checkpoint.pth"])
def test_a_pickle_is_refused_and_not_opened(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        pickle.dump(Trap(tmp_path / "sprung"), file)
    with pytest.raises(ValueError, match="only safetensors is read, since other formats can run code") as error:
        read_tensors(tmp_path)
    assert name in one_line(error)
    assert "save_pretrained" in one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_that_is_named_safetensors_is_not_opened(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        pickle.dump(Trap(tmp_path / "sprung"), file)
    with pytest.raises(ValueError, match="no safetensors"):
        read_tensors(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_numbers_that_are_not_of_float32_are_refused(dtype, tmp_path):
    save_file({"a": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a is stored as F(64|8_E4M3); it must be one of F32, BF16, F16"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": ' * 5000])
def test_a_broken_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (is not JSON|holds a)") as error:
        read_config(tmp_path)
    one_line(error)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        read_config(tmp_path)


def test_code_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="asks for code of its own"):
        read_config(tmp_path)


def test_a_folder_is_itself(tmp_path):
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "with space"])
def test_what_is_neither_a_folder_nor_a_name_does_not_exist(source):
    with pytest.raises(ValueError, match="does not exist; give a folder"):
        locate(source)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ValueError, match="is a file; give the folder"):
        locate(str(path))


def test_a_name_that_cannot_be_had_is_refused_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    with pytest.raises(
        ValueError, match="someone/some-model is no folder here and cannot be had from the Hub"
    ) as error:
        locate("someone/some-model")
    one_line(error)
    assert time.perf_counter() - began < 5


def test_from_the_hub_come_only_files_that_are_read(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how, name=name) or tmp_path
    )
    assert locate("someone/some-model", ["tokenizer.json"]) == tmp_path
    assert asked["name"] == "someone/some-model"
    wanted = asked["allow_patterns"]
    assert not any(fnmatch(name, pattern) for name in ("pytorch_model.bin", "modeling.py") for pattern in wanted)
    for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        assert any(fnmatch(name, pattern) for pattern in wanted), name

"""What exports have in common, whatever they are for."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from interop.natives import TEXTS, WIDTH, native
from mhe_lightning.attention import Attention
from mhe_lightning.interop.exporting import export_to_hf
from mhe_lightning.interop.stock import NoStockClassError
from mhe_lightning.interop.verification import NotEqualError
from mhe_lightning.models.heads import SequenceHead
from mhe_lightning.verbs.export import ENGINES

EXPORTS = {"hf": export_to_hf, **ENGINES}
LIBRARIES = {"hf": "transformers", "ctranslate2": "ctranslate2", "gguf": "gguf", "onnx": "onnxruntime"}

each = pytest.mark.parametrize("name", EXPORTS)


@pytest.mark.parametrize("name", ["ctranslate2", "onnx"])
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
def test_the_readmes_code_runs(name, kind, tmp_path, monkeypatch):
    EXPORTS[name](native(kind), tmp_path / "out", TEXTS, 1e-4)
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "out" / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(code.replace("50", "9"), {})


@each
def test_what_differs_is_not_left_on_disk(name, tmp_path):
    with pytest.raises(NotEqualError, match="more than the tolerance of 1e-15"):
        EXPORTS[name](native(), tmp_path / "out", TEXTS, 1e-15)
    assert list(tmp_path.iterdir()) == []


@each
def test_a_folder_that_is_there_is_refused_and_stays(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="out exists; remove it, or choose another folder"):
        EXPORTS[name](native(), tmp_path / "out", TEXTS, 1e-4)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


@each
def test_a_decoder_with_a_classifier_is_refused(name, tmp_path):
    head = SequenceHead(width=WIDTH, n_labels=2, pooling="last", dropout=0.0)
    with pytest.raises(NoStockClassError, match="finetuned from"):
        EXPORTS[name](replace(native(), head=head), tmp_path / "out", TEXTS, 1e-4)


@each
def test_an_attention_that_cannot_be_folded_is_refused(name, tmp_path):
    class Other(Attention):
        """It defines no `folded`."""

    with pytest.raises(NoStockClassError, match="Other"):
        EXPORTS[name](native(attention=Other), tmp_path / "out", TEXTS, 1e-4)


@each
def test_a_missing_library_is_named_with_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(ValueError, match=rf"mhe-lightning\[{name}\]"):
        EXPORTS[name](native(), tmp_path / "out", TEXTS, 1e-4)

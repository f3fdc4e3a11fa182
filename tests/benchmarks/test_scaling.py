"""The tables of docs/scaling.md are those that its command makes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_pages_tables_are_those_of_the_record(scaling, record):
    page = PAGE.read_text(encoding="utf-8")
    assert set(record) == set(scaling.MODELS)
    assert scaling.with_tables(page, record) == page


def test_a_page_without_a_models_place_is_refused(scaling, record):
    with pytest.raises(ValueError, match="tables of gpt2"):
        scaling.with_tables("nothing", {"gpt2": record["gpt2"]})


@pytest.mark.slow
@pytest.mark.parametrize(("model", "attention"), [("small", "mhe_add"), ("gpt2", "gqa")])
def test_the_record_is_made_again_by_the_command(model, attention, scaling, record):
    made = json.loads(json.dumps(scaling.planned(model, [attention])))
    assert {key: made[key] for key in made if key != "variants"} == {
        key: record[model][key] for key in made if key != "variants"
    }
    assert made["variants"][attention] == record[model]["variants"][attention]

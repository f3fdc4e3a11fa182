"""Sizes at which variants cost what the reference costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhe_lightning.experiment import Experiments
from mhe_lightning.planning import Experiment
from mhe_lightning.sizing import match

CONFIGS = Path(__file__).parents[1] / "configs"
ATTENTIONS = {path.stem: path for path in sorted((CONFIGS / "attention").glob("*.yaml"))}
MHA = ATTENTIONS["mha"]
OTHERS = [name for name in ATTENTIONS if name != "mha"]
VOCABULARY = 64
# large enough that what SHA saves makes up for a layer, and for a number more per head
SIZES = {"width": 64, "n_heads": 4, "n_layers": 8, "max_length": 16, "dropout": 0.0}
TASKS = {
    "decoder": ("LanguageModeling", "Decoder", "LanguageModelingData"),
    "encoder": ("MaskedLanguageModeling", "Encoder", "MaskedLanguageModelingData"),
    "encoder-decoder": ("Translation", "EncoderDecoder", "TranslationData"),
}


@pytest.fixture(scope="module")
def experiments() -> Experiments:
    return Experiments()  # its parser takes long to make


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    """A tiny experiment of each kind, of data that are nowhere."""
    folder = tmp_path_factory.mktemp("configs")
    found = {}
    for kind, (task, net, data) in TASKS.items():
        corpus = {"corpus": {"path": "nowhere"}, "block_length": 16, "batch_size": 2}
        pairs = {"path": "nowhere", "source": "en", "target": "de", "max_length": 16, "batch_tokens": 32}
        config = {
            "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 10},
            "model": {
                "class_path": f"mhe_lightning.tasks.{task}",
                "init_args": {
                    "net": {
                        "class_path": f"mhe_lightning.models.{net}",
                        "init_args": {**SIZES, "attention": {"class_path": "mhe_lightning.attention.MHA"}},
                    }
                },
            },
            "data": {
                "class_path": f"mhe_lightning.data.{data}",
                "init_args": pairs if kind == "encoder-decoder" else corpus,
            },
        }
        found[kind] = folder / f"{kind}.yaml"
        found[kind].write_text(yaml.safe_dump(config), encoding="utf-8")
    return found


def matched(experiments, config, name, mode, spend, reference="mha") -> tuple[dict[str, int], Experiment, Experiment]:
    """What is changed, the variant with it, and the reference."""
    arguments = ["--config", str(config)]
    changes = match(
        experiments,
        arguments,
        ATTENTIONS[name],
        reference=ATTENTIONS[reference],
        mode=mode,
        spend=spend,
        vocab_size=VOCABULARY,
    )

    def experiment(attention: str, sizes: dict[str, int]) -> Experiment:
        options = [*arguments, f"--model.net.attention={ATTENTIONS[attention]}"]
        options += [f"--{key}={value}" for key, value in sizes.items()]
        return Experiment(experiments.parse(options), VOCABULARY, world_size=1)

    return changes, experiment(name, changes), experiment(reference, {})


def parameters(experiment: Experiment) -> int:
    """Of the net that is really built."""
    return sum(p.numel() for p in experiment.make_task().net.parameters())


@pytest.mark.parametrize("spend", ["feed_forward", "width", "depth"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_built_decoder_has_the_references_parameters(name, spend, experiments, configs):
    changes, variant, reference = matched(experiments, configs["decoder"], name, "equal_parameters", spend)
    assert changes
    assert parameters(variant) == pytest.approx(parameters(reference), rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spend"),
    # width and depth take many counts, each of a second
    [*((name, "feed_forward") for name in OTHERS), ("sha", "width"), ("sha", "depth"), ("mhe_add", "width")],
)
def test_the_decoder_trains_with_the_references_operations(name, spend, experiments, configs):
    changes, variant, reference = matched(experiments, configs["decoder"], name, "equal_flops", spend)
    assert changes
    assert variant.flops().training == pytest.approx(reference.flops().training, rel=0.005)


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_feed_forward_width_makes_other_nets_equal(kind, name, experiments, configs):
    changes, variant, reference = matched(experiments, configs[kind], name, "equal_parameters", "feed_forward")
    assert set(changes) == {"model.net.ff_width"}
    assert parameters(variant) == pytest.approx(parameters(reference), rel=0.005)


def test_width_grows_by_whole_numbers_per_head(experiments, configs):
    changes, *_ = matched(experiments, configs["decoder"], "sha", "equal_parameters", "width")
    assert changes["model.net.width"] > SIZES["width"]
    assert changes["model.net.width"] % SIZES["n_heads"] == 0


def test_depth_grows_by_as_many_layers_as_fit(experiments, configs):
    changes, *_ = matched(experiments, configs["decoder"], "sha", "equal_parameters", "depth")
    arguments = ["--config", str(configs["decoder"]), f"--model.net.attention={ATTENTIONS['sha']}"]
    reference = Experiment(experiments.parse(arguments[:2]), VOCABULARY, world_size=1)
    layers = changes["model.net.n_layers"]
    assert layers > SIZES["n_layers"]
    for more, fits in ((0, True), (1, False)):
        deep = experiments.parse([*arguments, f"--model.net.n_layers={layers + more}"])
        assert (parameters(Experiment(deep, VOCABULARY, world_size=1)) <= parameters(reference)) == fits


def test_equal_architecture_changes_nothing(experiments, configs):
    assert matched(experiments, configs["decoder"], "sha", "equal_architecture", "width")[0] == {}


@pytest.mark.parametrize("mode", ["equal_parameters", "equal_flops"])
def test_the_reference_itself_stays_as_it_is(mode, experiments, configs):
    assert matched(experiments, configs["decoder"], "mha", mode, "width")[0] == {}


def test_a_reference_other_than_mha(experiments, configs):
    changes, variant, reference = matched(
        experiments, configs["decoder"], "mha", "equal_parameters", "feed_forward", reference="sha"
    )
    assert changes["model.net.ff_width"] < 4 * SIZES["width"]
    assert parameters(variant) == pytest.approx(parameters(reference), rel=0.005)


def test_sizes_that_are_out_of_reach_are_refused_with_the_nearest(experiments, configs):
    arguments = ["--config", str(configs["decoder"]), "--model.net.ff_width=1"]
    options = {"reference": ATTENTIONS["sha"], "mode": "equal_parameters", "vocab_size": VOCABULARY}
    with pytest.raises(
        ValueError, match=r"mha: no feed_forward comes within 0\.5% of the [\d,]+ of sha; the nearest is"
    ):
        match(experiments, arguments, MHA, **options)


@pytest.mark.parametrize(("name", "value"), [("mode", "equal_time"), ("spend", "heads")])
def test_an_unknown_choice_is_refused(name, value, experiments, configs):
    options = {"mode": "equal_parameters", "spend": "width", name: value}
    with pytest.raises(ValueError, match=f"{name} \\('{value}'\\) must be one of"):
        match(experiments, ["--config", str(configs["decoder"])], ATTENTIONS["sha"], reference=MHA, **options)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# one of a narrow net's feed-forward width is more than the tolerance
@given(heads=st.sampled_from([2, 4, 8]), head_size=st.integers(16, 24), name=st.sampled_from(OTHERS))
def test_any_width_and_heads_are_made_equal_by_the_feed_forward_width(experiments, configs, heads, head_size, name):
    arguments = ["--config", str(configs["decoder"])]
    arguments += [f"--model.net.width={heads * head_size}", f"--model.net.n_heads={heads}"]
    changes = match(
        experiments, arguments, ATTENTIONS[name], reference=MHA, mode="equal_parameters", vocab_size=VOCABULARY
    )

    def total(attention: Path, *options: str) -> int:
        config = experiments.parse([*arguments, f"--model.net.attention={attention}", *options])
        return parameters(Experiment(config, VOCABULARY, world_size=1))

    spent = total(ATTENTIONS[name], *(f"--{key}={value}" for key, value in changes.items()))
    assert spent == pytest.approx(total(MHA), rel=0.005)

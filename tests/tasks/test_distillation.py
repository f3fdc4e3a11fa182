"""Distillation: what its loss is, what counts for it, what it reads, and that it learns and resumes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml

from conftest import logged
from mhe_lightning.attention import MHA, MHE
from mhe_lightning.checkpoint import read_checkpoint
from mhe_lightning.data.tokenizer import train_tokenizer
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.heads import MaskedTokenHead
from mhe_lightning.tasks.distillation import Distillation, counted_tokens, load_teacher, relative_error
from mhe_lightning.weights_only import write_weights

SIZES = dict(width=8, n_heads=2, n_layers=2, max_length=12, dropout=0.0)
VOCABULARY = 30
MUL = partial(MHE, combine="multiply")


def net_of(kind, attention=MHA, seed=0, **sizes):
    torch.manual_seed(seed)
    return kind(vocab_size=VOCABULARY, attention=attention, **{**SIZES, **sizes})


def write_teacher(folder, net, head=None):
    """A run directory that holds ``net``, and perhaps a masked-token head."""
    spec = {
        "class_path": f"mhe_lightning.models.{type(net).__name__}",
        "init_args": {
            **SIZES,
            "n_layers": len(net.blocks),
            "width": net.width,
            "attention": {"class_path": "mhe_lightning.attention.MHA"},
        },
    }
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    if head is not None:
        state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    config = {"model": {"class_path": "mhe_lightning.tasks.Task", "init_args": {"net": spec}}}
    write_weights(folder, config=config, state_dict=state, tokenizer_json=None, origin={})
    return str(folder)


@pytest.fixture
def encoder(tmp_path):
    return net_of(Encoder), write_teacher(tmp_path / "encoder", net_of(Encoder))


@pytest.fixture
def decoder(tmp_path):
    return net_of(Decoder), write_teacher(tmp_path / "decoder", net_of(Decoder))


def task_for(net, teacher, **options):
    task = Distillation(net, max_steps=10, teacher=teacher, **options)
    task.setup("fit")
    return task


def batch_of(rows=3, length=7, seed=1):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=draw)
    real = torch.arange(length) < torch.tensor([[length - i] for i in range(rows)])
    targets = torch.randint(VOCABULARY, (rows, length), generator=draw)
    return {"tokens": tokens, "targets": targets, "padding": real, "rows": torch.arange(rows)}


def loss_of(task, batch):
    total = task.training_step(batch, 0)
    (_, targets, _) = task._window.pop()
    return total / targets


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_copy_of_the_teacher_has_nothing_to_learn(encoder, layers):
    _, path = encoder

    assert loss_of(task_for(net_of(Encoder), path, layers=layers, logits_weight=0.0), batch_of()) == 0


def test_the_loss_of_the_last_state_is_the_relative_error_of_real_tokens(encoder):
    teacher, path = encoder
    net = net_of(Encoder, MUL, seed=4)
    batch = batch_of()
    batch["targets"].fill_(-100)

    found = loss_of(task_for(net, path), batch)

    ours, theirs = (n(batch["tokens"], padding=batch["padding"]) for n in (net, teacher))
    spread = theirs.var(-1, correction=0) * 8
    expected = ((ours - theirs).square().sum(-1) / spread)[batch["padding"]].mean()
    torch.testing.assert_close(found, expected)


def test_all_layers_count_alike(encoder):
    teacher, path = encoder
    net = net_of(Encoder, MUL, seed=4)
    batch = {**batch_of(), "targets": torch.full((3, 7), -100)}

    found = loss_of(task_for(net, path, layers="all"), batch)

    errors = []
    for n_blocks in (1, 2):  # a net without its last blocks gives the states between
        cut = [net_of(Encoder, a, n_layers=n_blocks) for a in (MUL, MHA)]
        for copy, whole in zip(cut, (net, teacher), strict=True):
            copy.load_state_dict({k: v for k, v in whole.state_dict().items() if k in copy.state_dict()})
        ours, theirs = (n(batch["tokens"], padding=batch["padding"]) for n in cut)
        errors.append(relative_error(ours, theirs)[batch["padding"]].mean())
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_a_decoder_s_logits_are_compared_at_the_temperature(decoder):
    teacher, path = decoder
    net = net_of(Decoder, MUL, seed=4)
    batch = {k: v for k, v in batch_of().items() if k != "padding"}
    T = 2.0

    task = task_for(net, path, hidden_weight=0.0, logits_weight=3.0, temperature=T)
    found = loss_of(task, batch)

    ours, theirs = ((n.logits(n(batch["tokens"])) / T).log_softmax(-1) for n in (net, teacher))
    expected = 3 * T**2 * F.kl_div(ours, theirs, log_target=True, reduction="sum") / batch["tokens"].numel()
    torch.testing.assert_close(found, expected)


def test_an_encoder_s_logits_are_those_of_the_teacher_s_head(tmp_path):
    teacher, head = net_of(Encoder), MaskedTokenHead(width=8, vocab_size=VOCABULARY)
    path = write_teacher(tmp_path / "run", teacher, head)
    net = net_of(Encoder, MUL, seed=4)
    batch = batch_of()

    found = loss_of(task_for(net, path, hidden_weight=0.0, logits_weight=1.0, masked=True), batch)

    logits = []
    for n in (net, teacher):
        states = n(batch["tokens"], padding=batch["padding"])[batch["padding"]]
        logits.append((head(states) @ teacher.token_embedding.weight.T + head.bias).log_softmax(-1))
    torch.testing.assert_close(found, F.kl_div(*logits, log_target=True, reduction="batchmean"))


def test_an_encoder_reads_the_text_with_its_masked_tokens_put_back(encoder):
    _, path = encoder
    net, batch = net_of(Encoder, MUL, seed=4), batch_of()
    text = batch["tokens"]
    hidden = torch.rand(text.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    masked = {
        **batch,
        "tokens": torch.where(hidden, 3, text),
        "targets": torch.where(hidden, text, -100),
    }
    plain = {**batch, "targets": torch.full_like(text, -100)}

    assert loss_of(task_for(net, path), masked) == loss_of(task_for(net, path), plain)
    assert loss_of(task_for(net, path, masked=True), masked) != loss_of(task_for(net, path), plain)


def test_micro_batches_give_the_loss_of_one_batch(encoder):
    _, path = encoder
    net = net_of(Encoder, MUL, seed=4).double()
    task = task_for(net, path, layers="all")
    batch = batch_of(rows=4)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]

    whole = task.training_step(batch, 0)
    parts = sum(task.training_step(half, 0) for half in halves)

    torch.testing.assert_close(parts, whole)


def test_padding_and_rows_that_stand_for_none_do_not_count():
    batch = {**batch_of(), "rows": torch.tensor([0, -1, 2])}

    counted = counted_tokens(batch, causal=False)

    assert counted.sum(1).tolist() == [7, 0, 5]


def test_of_a_decoder_s_rows_what_has_no_target_does_not_count():
    batch = batch_of()
    batch["targets"][0, 4:] = -100

    assert counted_tokens(batch, causal=True).sum(1).tolist() == [4, 6, 5]


def test_the_cosine_is_of_the_mean_states_of_each_row(encoder):
    teacher, path = encoder
    net = net_of(Encoder, MUL, seed=4)
    task = task_for(net, path)
    batch = {**batch_of(), "targets": torch.full((3, 7), -100)}

    with torch.no_grad():
        task.validation_step(batch, 0)
        found = task.evaluation.compute()["cosine"]

        expected = []
        for row in range(3):
            tokens = batch["tokens"][row : row + 1, : 7 - row]
            expected.append(F.cosine_similarity(net(tokens).mean(1), teacher(tokens).mean(1)).item())
    assert found.item() == pytest.approx(math.fsum(expected) / 3, abs=1e-6)


def test_the_teacher_is_neither_trained_nor_saved(encoder):
    net = net_of(Encoder, MUL, seed=4)
    task = task_for(net, encoder[1])

    names = {name for name, _ in net.named_parameters(prefix="net")}
    assert {name for name, _ in task.named_parameters()} == names
    assert set(task.state_dict()) == names | {"tokens_seen"}
    assert not any(parameter.requires_grad for parameter in task.teacher.net.parameters())
    assert not task.teacher.net.training


def test_a_checkpoint_file_is_a_teacher_too(tmp_path):
    folder = tmp_path / "run"
    net = net_of(Encoder)
    write_teacher(folder, net)

    found = load_teacher(folder / "checkpoints" / "step=00000000.ckpt")

    assert torch.equal(found.net.token_embedding.weight, net.token_embedding.weight)
    assert found.head is None


# Refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": "first"}, r"layers \('first'\) must be"),
        ({"hidden_weight": 0.0}, "one of them positive"),
        ({"logits_weight": -1.0}, "must not be negative"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        Distillation(net_of(Encoder), max_steps=1, teacher="nowhere", **options)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="EncoderDecoder cannot be distilled"):
        Distillation(net_of(EncoderDecoder), max_steps=1, teacher="nowhere")


@pytest.mark.parametrize(
    ("net", "options", "told"),
    [
        (partial(net_of, Decoder), {}, "causal is False there and True here"),
        (partial(net_of, Encoder, width=4), {}, "width is 8 there and 4 here"),
        (partial(net_of, Encoder, n_layers=1), {"layers": "all"}, "it has 2 blocks, the net 1"),
        (partial(net_of, Encoder), {"logits_weight": 1.0}, "no masked-token head"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(encoder, net, options, told):
    with pytest.raises(ValueError, match=told):
        task_for(net(), encoder[1], **options)


def test_a_teacher_of_another_depth_can_teach_its_last_states(encoder):
    assert loss_of(task_for(net_of(Encoder, n_layers=1, seed=3), encoder[1]), batch_of()) > 0


def test_a_teacher_that_is_not_there_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        task_for(net_of(Encoder), str(tmp_path / "nowhere"))


# Through the command line


@pytest.fixture
def distillation(tiny_config, tmp_path):
    """The config of a decoder with MHE that learns from one with MHA, which has not been trained."""
    path = tiny_config()
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments = config["model"]["init_args"]
    arguments["net"]["init_args"]["dropout"] = 0.0
    arguments["net"]["init_args"]["attention"] = {
        "class_path": "mhe_lightning.attention.MHE",
        "init_args": {"combine": "multiply"},
    }
    config["model"]["class_path"] = "mhe_lightning.tasks.distillation.Distillation"
    arguments |= {"teacher": str(tmp_path / "teacher"), "layers": "all", "logits_weight": 1.0}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    sizes = {k: v for k, v in arguments["net"]["init_args"].items() if k != "attention"}
    torch.manual_seed(0)
    net = Decoder(vocab_size=300, attention=MHA, **sizes)
    spec = {
        "class_path": "mhe_lightning.models.Decoder",
        "init_args": {**sizes, "attention": {"class_path": "mhe_lightning.attention.MHA"}},
    }
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    config = {"model": {"class_path": "mhe_lightning.tasks.LanguageModeling", "init_args": {"net": spec}}}
    for folder, tokenizer in (("teacher", None), ("stranger", train_tokenizer(["a"], "bpe", 257).to_str())):
        write_weights(tmp_path / folder, config=config, state_dict=state, tokenizer_json=tokenizer, origin={})
    return path


def vocabulary_of_data(path):
    from mhe_lightning.data import CorpusSpec, LanguageModelingData

    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["init_args"]
    module = LanguageModelingData(**{**data, "corpus": CorpusSpec(**data["corpus"]), "seed": 0})
    module.prepare()
    return module.vocab_size


def test_training_comes_nearer_and_saves_no_teacher(distillation, command, tmp_path):
    assert vocabulary_of_data(distillation) == 300, "the teacher was built for it"
    runs = tmp_path / "runs"

    code, _, errors = command("fit", "--config", str(distillation), "--name", "whole")
    assert code == 0, errors

    losses = logged(runs / "whole", "train/loss")
    assert float(losses[8]) < float(losses[1])
    assert {"val/loss", "val/cosine"} <= set((runs / "whole" / "metrics.csv").read_text().split("\n")[0].split(","))
    newest = read_checkpoint(sorted((runs / "whole" / "checkpoints").glob("step=*.ckpt"))[-1])
    assert not any("teacher" in name for name in newest["state_dict"])


def test_a_teacher_of_another_tokenizer_is_refused_and_an_earlier_run_stays(distillation, command, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.csv").touch()
    teacher = f"--model.teacher={tmp_path / 'stranger'}"
    code, _, errors = command("fit", "--config", str(distillation), "--name", "mine", teacher)
    assert code == 2
    assert "stranger was trained with the tokenizer" in errors
    assert "set --data.tokenizer to the tokenizer.json of the teacher's run" in errors
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(distillation, command, tmp_path):
    runs = tmp_path / "runs"
    arguments = ("fit", "--config", str(distillation), "--model.schedule", "constant")
    for name, steps in (("whole", "6"), ("half", "4")):
        assert command(*arguments, "--name", name, "--trainer.max_steps", steps)[0] == 0
    code, _, errors = command(*arguments, "--name", "half", "--trainer.max_steps", "6", "--ckpt_path", "auto")
    assert code == 0, errors

    ends = [read_checkpoint(runs / name / "checkpoints" / "step=00000006.ckpt") for name in ("whole", "half")]

    assert all(torch.equal(v, ends[1]["state_dict"][k]) for k, v in ends[0]["state_dict"].items())

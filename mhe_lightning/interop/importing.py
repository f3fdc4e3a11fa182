"""GPT-2, BERT and Marian checkpoints of transformers → a task's weights and config here.

1. `reading`: config.json and safetensors, as plain data.
2. `import_gpt2`, `import_bert`, `import_marian`: what each tensor becomes, or why a checkpoint is refused.
3. `import_plan`: the tensors re-arranged, with every name and shape checked.
4. `import_tokenizer`: the tokenizer, where there is one.
5. Here: the config as `fit` would write it, and the net built from it.

No number is changed, so that the way back gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor

from mhe_lightning.accounting import parameters_by_part
from mhe_lightning.checkpoint import RECORD
from mhe_lightning.experiment import LINKED
from mhe_lightning.interop import import_bert, import_gpt2, import_marian
from mhe_lightning.interop.import_plan import Plan, rearranged
from mhe_lightning.interop.import_tokenizer import import_tokenizer
from mhe_lightning.interop.reading import CONFIG, read_config, read_tensors
from mhe_lightning.nets import load_net
from mhe_lightning.parsing import Parser
from mhe_lightning.tasks import Task

Planner = Callable[[str, Mapping[str, Any]], Plan]

PLANNERS: dict[str, tuple[str, Planner]] = {
    **dict.fromkeys(import_gpt2.ARCHITECTURES, ("gpt2", import_gpt2.plan_gpt2)),
    **dict.fromkeys(import_bert.HEADS, ("bert", import_bert.plan_bert)),
    **dict.fromkeys(import_marian.ARCHITECTURES, ("marian", import_marian.plan_marian)),
}
"""Class of transformers → its ``model_type`` there, and what plans its import."""


class Imported(NamedTuple):
    """A checkpoint of another library as one of ours, with what `mhe_lightning.weights_only.write_weights` takes.

    Args:
        architecture: the class there.
        config: of the task here, resolved.
        state_dict: of the task here.
        tokenizer_json: of its tokenizer; None if there is none.
        origin: what it was made from: the class, config.json, and how weights were stored.
        parameters: of each part of the net and its head, and ``total``.
        left: tensors that were left out, → why.
        notes: what else the user should know.
    """

    architecture: str
    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    tokenizer_json: str | None
    origin: dict[str, Any]
    parameters: dict[str, int]
    left: dict[str, str]
    notes: list[str]


def import_checkpoint(folder: Path) -> Imported:
    """A checkpoint of transformers as a task's weights and config.

    Args:
        folder: holds config.json, safetensors, and perhaps a tokenizer.

    Raises:
        ValueError: the class is none of `PLANNERS`, an option gives a function that our nets have not, or a file is
            missing, damaged, or contradicts config.json.
    """
    given = read_config(folder)
    architecture = _architecture(given)
    plan = PLANNERS[architecture][1](architecture, given)
    tensors = read_tensors(folder)
    state, left = rearranged(plan, tensors)
    config = {"model": resolved_model(plan, len(state["net.token_embedding.weight"]))}
    net = load_net({"state_dict": state, RECORD: {"config": yaml.safe_dump(config)}})
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} & {"bfloat16", "float16"})
    notes = [*plan.notes]
    if stored:
        notes.append(f"weights stored as {' and '.join(stored)} are float32 now, which changes no number")
    tokenizer_json, said = import_tokenizer(folder, given, net.vocab_size)  # type: ignore[arg-type]
    parameters = parameters_by_part(net)
    head = sum(tensor.numel() for name, tensor in state.items() if name.startswith("head."))
    parameters.update(head=parameters["head"] + head, total=parameters["total"] + head)
    return Imported(
        architecture=architecture,
        config=config,
        state_dict=state,
        tokenizer_json=tokenizer_json,
        origin={"format": "transformers", "architecture": architecture, "config": given},
        parameters=parameters,
        left=left,
        notes=[*notes, *said],
    )


def resolved_model(plan: Plan, vocab_size: int) -> dict[str, Any]:
    """The config's ``model`` as `fit` writes it: with all defaults, without what the data decide."""
    attention = {
        "class_path": "mhe_lightning.attention.MHA",
        "init_args": {"dropout": plan.attention_dropout},
    }
    net = {"class_path": f"mhe_lightning.models.{plan.net}", "init_args": {"attention": attention, **plan.arguments}}
    spec = {"class_path": f"mhe_lightning.tasks.{plan.task}", "init_args": {"net": net, **plan.settings}}
    parser = Parser()
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    parser.add_subclass_arguments(Task, "model")
    for name in ("net.init_args.vocab_size", "max_steps", *LINKED):  # as `fit` has them from elsewhere
        parser.link_arguments("data", f"model.init_args.{name}", apply_on="instantiate")
    parsed = parser.parse_object({"model": spec})
    model: dict[str, Any] = yaml.safe_load(parser.dump(parsed, skip_unset=False, skip_link_targets=True))["model"]
    return model


def _architecture(config: Mapping[str, Any]) -> str:
    """The class that config.json names, if it can be imported."""
    model_type, named = config.get("model_type"), config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ValueError(
            f"{CONFIG} must name one class in architectures, not {named!r} (model_type is {model_type!r}); these can "
            f"be imported: {', '.join(PLANNERS)}"
        )
    if named[0] not in PLANNERS:
        raise ValueError(f"the class {named[0]} cannot be imported; these can: {', '.join(PLANNERS)}")
    if model_type not in (None, PLANNERS[named[0]][0]):
        raise ValueError(f"{CONFIG} has model_type {model_type!r} but the class {named[0]}; the file is damaged")
    return named[0]

"""A model as ONNX files, which ONNX Runtime and others run; decoders with a KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.extras import require
from mhe_lightning.interop.engine import (
    NEW_TOKENS,
    EngineAgreement,
    EngineExport,
    check_greedy,
    expected_scores,
    export_folder,
    largest_difference,
    refuse_unknown,
    rows,
)
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.onnx_graph import decoder_graph, encoder_graph, source_graph, target_graph
from mhe_lightning.interop.verification import fitting_pairs, native_batch
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.heads import SequenceHead

MODEL, SOURCE, TARGET = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"

_DECODER = """\
session = onnxruntime.InferenceSession("{name}/model.onnx")
caches = [one for one in session.get_inputs() if one.name.startswith("past")]
feed = {one.name: numpy.zeros((1, one.shape[1], 0, one.shape[3]), numpy.float32) for one in caches}
text = ids
for _ in range(50):
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(text), **feed})
    feed = {one.name: value for one, value in zip(caches, present)}
    ids = logits[:, -1:].argmax(-1)
    text = numpy.concatenate([text, ids], 1)
print(tokenizer.decode(text[0]))"""

_ENCODER_DECODER = """\
encoder = onnxruntime.InferenceSession("{name}/encoder_model.onnx")
decoder = onnxruntime.InferenceSession("{name}/decoder_model.onnx")
mask = numpy.ones_like(ids)
_, *source = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
names = [one.name.replace("present", "past_key_values") for one in encoder.get_outputs()[1:]]
fixed = {"encoder_attention_mask": mask, **dict(zip(names, source))}
caches = [one for one in decoder.get_inputs() if ".decoder." in one.name]
feed = {one.name: numpy.zeros((1, one.shape[1], 0, one.shape[3]), numpy.float32) for one in caches}
ids, text = numpy.array([[END]]), []
while len(text) < 50 and (not text or text[-1] != END):
    logits, *present = decoder.run(None, {"input_ids": ids, **fixed, **feed})
    feed = {one.name: value for one, value in zip(caches, present)}
    ids = logits[:, -1:].argmax(-1)
    text.append(int(ids[0, 0]))
print(tokenizer.decode(text))"""


def export_to_onnx(native: Native, out: Path, texts: Sequence[str], tolerance: float) -> EngineExport:
    """Write a model as ONNX, run it in ONNX Runtime, and compare the two; what differs is not left on disk.

    Args:
        native: our model.
        out: the folder to make.
        texts: to compare on.
        tolerance: the largest difference of scores that is let pass.

    Raises:
        NoStockClassError: the graph cannot be written; the message says why.
        NotEqualError: what was written does not compute what the model does.
        ValueError: the folder is there already, or onnx or onnxruntime is not installed.
    """
    require("onnxruntime", "onnx", "check what is exported")
    refuse_unknown(native)

    def write(folder: Path) -> EngineExport:
        net = native.net
        if isinstance(net, Decoder):
            decoder_graph(net).save(folder / MODEL)
            agreement = _compare_decoder(native, folder, texts, tolerance)
            return EngineExport("ONNX Runtime", "a decoder with a KV cache", "Its logits", agreement)
        if isinstance(net, EncoderDecoder):
            source_graph(net).save(folder / SOURCE)
            target_graph(net).save(folder / TARGET)
            agreement = _compare_encoder_decoder(native, folder, texts, tolerance)
            return EngineExport("ONNX Runtime", "an encoder and a decoder with KV caches", "Its logits", agreement)
        assert isinstance(net, Encoder)
        encoder_graph(net, native.head).save(folder / MODEL)
        agreement = _compare_encoder(native, folder, texts, tolerance)
        content = "an encoder" if native.head is None else f"an encoder with a {type(native.head).__name__}"
        return EngineExport(
            "ONNX Runtime", content, "Its hidden states" if native.head is None else "Its logits", agreement
        )

    return export_folder(native, out, _usage(native), write)


class Session:
    """A model in ONNX Runtime on the CPU, fed with tensors.

    Args:
        path: of the .onnx file.
    """

    def __init__(self, path: Path) -> None:
        runtime = require("onnxruntime", "onnx", "check what is exported")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs: dict[str, list[int | str]] = {one.name: one.shape for one in self._session.get_inputs()}
        self.outputs = [one.name for one in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by their names."""
        found = self._session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}

    def empty_cache(self, batch: int) -> dict[str, Tensor]:
        """Inputs of keys and values for a first call: of length 0."""
        shapes = {name: shape for name, shape in self.inputs.items() if "past" in shape}
        return {name: torch.zeros(batch, int(shape[1]), 0, int(shape[3])) for name, shape in shapes.items()}


def cached(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values that a call gave out, as inputs of the next."""
    return {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name.startswith("present")
    }


def _compare_decoder(native: Native, folder: Path, texts: Sequence[str], tolerance: float) -> EngineAgreement:
    """Logits of whole texts, and of tokens generated one by one over the cache after texts padded on the left."""
    session = Session(folder / MODEL)
    batch = native_batch(native, fitting_pairs(native, texts))
    tokens, real = batch["tokens"], batch["padding"]
    found = session.run({"input_ids": tokens, "attention_mask": real.long(), **session.empty_cache(len(tokens))})[
        "logits"
    ]
    expected = expected_scores(native, batch)
    difference = largest_difference(found, expected, real, tolerance)
    starts = [row[: max(1, len(row) // 2)] for row in rows(tokens, real)]
    length = min(NEW_TOKENS, native.max_length - max(map(len, starts)))
    longest = max(map(len, starts))
    prompts = torch.tensor([[0] * (longest - len(start)) + start for start in starts])
    mask = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts])
    new, logits = generate(
        session, {"input_ids": prompts, "attention_mask": mask}, session.empty_cache(len(starts)), length
    )
    generated = check_greedy(native, {}, starts, new.tolist(), tolerance)
    whole = torch.cat([prompts, new], 1)
    seen = torch.cat([mask, torch.ones_like(new)], 1).bool()
    following = expected_scores(native, {"tokens": whole, "padding": seen})[:, longest - 1 : -1]
    everywhere = torch.ones_like(new, dtype=torch.bool)
    difference = max(difference, largest_difference(logits, following, everywhere, tolerance))
    return EngineAgreement(len(tokens), int(real.sum()), difference, float(expected[real].abs().max()), generated)


def generate(
    session: Session, inputs: Mapping[str, Tensor], cache: Mapping[str, Tensor], length: int
) -> tuple[Tensor, Tensor]:
    """Greedy search over a decoder's cache.

    Args:
        session: the decoder.
        inputs: of its first call, without the cache; ``attention_mask``, where there is one, grows by each token.
        cache: keys and values of the first call.
        length: tokens to generate.

    Returns:
        The tokens (B, length), and the logits that they were chosen by (B, length, V).
    """
    inputs, cache = dict(inputs), dict(cache)
    chosen, scores = [], []
    for _ in range(length):
        outputs = session.run({**inputs, **cache})
        cache = {**cache, **cached(outputs)}
        scores.append(outputs["logits"][:, -1])
        chosen.append(scores[-1].argmax(-1))
        inputs["input_ids"] = chosen[-1][:, None]
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return torch.stack(chosen, 1), torch.stack(scores, 1)


def _compare_encoder_decoder(native: Native, folder: Path, texts: Sequence[str], tolerance: float) -> EngineAgreement:
    """Logits of given translations at once, and of greedy ones token by token over the cache."""
    encoder, decoder = Session(folder / SOURCE), Session(folder / TARGET)
    batch = native_batch(native, fitting_pairs(native, texts))
    tokens, real, targets = batch["tokens"], batch["padding"], batch["target_tokens"]
    source = cached(encoder.run({"input_ids": tokens, "attention_mask": real.long()}))
    fixed = {"encoder_attention_mask": real.long()}
    cache = {**source, **decoder.empty_cache(len(tokens))}
    found = decoder.run({"input_ids": targets, **fixed, **cache})["logits"]
    expected = expected_scores(native, batch)
    everywhere = torch.ones_like(targets, dtype=torch.bool)
    difference = largest_difference(found, expected, everywhere, tolerance)
    start = torch.full((len(tokens), 1), end_of_text_id(native.tokenizer))
    length = min(NEW_TOKENS, native.max_length - 1)
    new, logits = generate(decoder, {"input_ids": start, **fixed}, cache, length)
    generated = check_greedy(native, {"tokens": tokens, "padding": real}, start.tolist(), new.tolist(), tolerance)
    following = expected_scores(native, {**batch, "target_tokens": torch.cat([start, new[:, :-1]], 1)})
    everywhere = torch.ones_like(new, dtype=torch.bool)
    difference = max(difference, largest_difference(logits, following, everywhere, tolerance))
    count = int(real.sum()) + targets.numel()
    return EngineAgreement(len(tokens), count, difference, float(expected.abs().max()), generated)


def _compare_encoder(native: Native, folder: Path, texts: Sequence[str], tolerance: float) -> EngineAgreement:
    session = Session(folder / MODEL)
    batch = native_batch(native, fitting_pairs(native, texts))
    real = batch["padding"]
    outputs = session.run(
        {"input_ids": batch["tokens"], "attention_mask": real.long(), "token_type_ids": batch["segments"]}
    )
    expected = expected_scores(native, batch)
    found = torch.stack(list(outputs.values()), -1) if len(outputs) == 2 else next(iter(outputs.values()))
    places = torch.ones_like(expected, dtype=torch.bool) if isinstance(native.head, SequenceHead) else real
    difference = largest_difference(found, expected, places, tolerance)
    return EngineAgreement(len(real), int(real.sum()), difference, float(expected[places].abs().max()))


def _usage(native: Native) -> list[str]:
    """Lines of Python that run the model."""
    lines = [
        "import numpy",
        "import onnxruntime",
        "from tokenizers import Tokenizer",
        "",
        'tokenizer = Tokenizer.from_file("{name}/tokenizer.json")',
        'ids = numpy.array([tokenizer.encode("A text").ids])',
    ]
    if isinstance(native.net, Decoder):
        return [*lines, *_DECODER.splitlines()]
    if isinstance(native.net, EncoderDecoder):
        return [*lines, *_ENCODER_DECODER.replace("END", str(end_of_text_id(native.tokenizer))).splitlines()]
    return [
        *lines,
        'session = onnxruntime.InferenceSession("{name}/model.onnx")',
        "mask, segments = numpy.ones_like(ids), numpy.zeros_like(ids)",
        'outputs = session.run(None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments})',
    ]

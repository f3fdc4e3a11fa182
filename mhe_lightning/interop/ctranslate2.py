"""A model for CTranslate2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.extras import require
from mhe_lightning.interop.ctranslate2_spec import blocks_of, kv_heads, pooler_of, specification
from mhe_lightning.interop.engine import (
    NEW_TOKENS,
    EngineAgreement,
    EngineExport,
    check_greedy,
    ended,
    expected_scores,
    export_folder,
    in_float64,
    largest_difference,
    refuse_unknown,
    rows,
    vocabulary,
)
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.verification import fitting_pairs, native_batch
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder

HEAD = "head.npz"


def export_to_ctranslate2(native: Native, out: Path, texts: Sequence[str], tolerance: float) -> EngineExport:
    """Write a model as CTranslate2 loads it, run it there, and compare the two; what differs is not left on disk.

    Args:
        native: our model.
        out: the folder to make.
        texts: to compare on.
        tolerance: the largest difference of scores that is let pass.

    Raises:
        NoStockClassError: CTranslate2 computes nothing like the model.
        NotEqualError: what was written does not compute what the model does.
        ValueError: the folder is there already, or ctranslate2 is not installed.
    """
    engine = require("ctranslate2", "ctranslate2", "export a model to it")
    refuse_unknown(native)

    def write(folder: Path) -> EngineExport:
        spec = specification(native)
        spec.validate()
        spec.optimize()  # stores tied weights once
        spec.save(str(folder))
        if native.head is not None:
            np.savez(folder / HEAD, **{k: v.float().numpy() for k, v in native.head.state_dict().items()})
        threads = {"intra_threads": torch.get_num_threads(), "inter_threads": 1, "compute_type": "float32"}
        compare = {Decoder: _compare_decoder, EncoderDecoder: _compare_encoder_decoder, Encoder: _compare_encoder}
        content, compared, notes = _told(native)
        kind = next(kind for kind in compare if isinstance(native.net, kind))
        agreement = compare[kind](engine, native, folder, texts, tolerance, threads)
        return EngineExport("CTranslate2", content, compared, agreement, notes)

    return export_folder(native, out, _usage(native), write)


def _compare_decoder(
    engine: Any, native: Native, folder: Path, texts: Sequence[str], tolerance: float, options: Mapping[str, Any]
) -> EngineAgreement:
    """Logits of whole texts, and tokens generated over the engine's KV cache after the first half of each."""
    generator = engine.Generator(str(folder), **options)
    batch = native_batch(native, fitting_pairs(native, texts))
    prompts = rows(batch["tokens"], batch["padding"])
    # one by one, as the engine refuses texts of different lengths where it caches one head
    logits = [torch.from_numpy(np.array(generator.forward_batch([prompt])))[0] for prompt in prompts]
    found = nn.utils.rnn.pad_sequence(logits, batch_first=True)
    expected = expected_scores(native, batch)
    difference = largest_difference(found, expected, batch["padding"], tolerance)
    names = vocabulary(native)
    # in a batch with a prompt of one token the engine gives the others back as if they were new
    starts = [prompt[: max(2, len(prompt) // 2)] for prompt in prompts]
    length = min(NEW_TOKENS, native.max_length - max(map(len, starts)))
    results = generator.generate_batch(
        [[names[i] for i in start] for start in starts],
        max_length=length,
        include_prompt_in_result=False,
    )
    new = [ended(result.sequences_ids[0], native, length) for result in results]
    generated = check_greedy(native, {}, starts, new, tolerance)
    largest = float(expected[batch["padding"]].abs().max())
    return EngineAgreement(len(prompts), int(batch["padding"].sum()), difference, largest, generated)


def _compare_encoder_decoder(
    engine: Any, native: Native, folder: Path, texts: Sequence[str], tolerance: float, options: Mapping[str, Any]
) -> EngineAgreement:
    """Log-probabilities of given translations, and greedy ones."""
    translator = engine.Translator(str(folder), **options)
    batch = native_batch(native, fitting_pairs(native, texts))
    names, end = vocabulary(native), end_of_text_id(native.tokenizer)
    sources = [[names[i] for i in row] for row in rows(batch["tokens"], batch["padding"])]
    fill = end if native.padding is None else native.padding
    targets = [[token for token in row[1:] if token != fill] for row in batch["target_tokens"].tolist()]
    scored = translator.score_batch(sources, [[names[i] for i in target] for target in targets])
    found = nn.utils.rnn.pad_sequence([torch.tensor(one.log_probs) for one in scored], batch_first=True)
    following = [torch.tensor([*target, end]) for target in targets]
    real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in following], batch_first=True).bool()
    log_probabilities = expected_scores(native, batch).log_softmax(-1)
    following_tokens = nn.utils.rnn.pad_sequence(following, batch_first=True)
    expected = log_probabilities[:, : following_tokens.shape[1]].gather(2, following_tokens[..., None]).squeeze(2)
    difference = largest_difference(found, expected, real, tolerance)
    length = min(NEW_TOKENS, native.max_length)
    results = translator.translate_batch(sources, beam_size=1, max_decoding_length=length, min_decoding_length=0)
    position = {name: i for i, name in enumerate(names)}
    new = [ended([position[token] for token in result.hypotheses[0]], native, length) for result in results]
    inputs = {key: batch[key] for key in ("tokens", "padding")}
    generated = check_greedy(native, inputs, [[end]] * len(new), new, tolerance)
    tokens = int(batch["padding"].sum()) + int(real.sum())
    return EngineAgreement(len(sources), tokens, difference, float(expected[real].abs().max()), generated)


def _compare_encoder(
    engine: Any, native: Native, folder: Path, texts: Sequence[str], tolerance: float, options: Mapping[str, Any]
) -> EngineAgreement:
    """Hidden states, and the pooled ones where there are some."""
    encoder = engine.Encoder(str(folder), **options)
    batch = native_batch(native, fitting_pairs(native, texts))
    real = batch["padding"]
    output = encoder.forward_batch(rows(batch["tokens"], real), token_type_ids=rows(batch["segments"], real))
    with torch.no_grad(), in_float64(native):
        expected = native.net(batch["tokens"], segments=batch["segments"], padding=real)
        pooler = pooler_of(native.head)
        pooled = None if pooler is None else torch.tanh(pooler(expected[:, 0]))
    difference = largest_difference(torch.from_numpy(np.array(output.last_hidden_state)), expected, real, tolerance)
    if pooled is not None:
        found = torch.from_numpy(np.array(output.pooler_output))
        everywhere = torch.ones_like(pooled, dtype=torch.bool)
        difference = max(difference, largest_difference(found, pooled, everywhere, tolerance))
    return EngineAgreement(len(real), int(real.sum()), difference, float(expected[real].abs().max()))


def _told(native: Native) -> tuple[str, str, tuple[str, ...]]:
    """What the files compute, what is compared, and what a user must know."""
    net, head = native.net, native.head
    if isinstance(net, Decoder):
        heads = kv_heads(blocks_of(net))
        notes = [
            "A text begins with the end token, which `tokenizer.json` adds. In a batch with a prompt of that token "
            "alone CTranslate2 gives the other prompts back even with `include_prompt_in_result=False`."
        ]
        if heads == 1:
            notes.append(
                "Its KV cache holds one head. CTranslate2 then scores texts of different lengths only one by one: call "
                "`score_batch` with `max_batch_size=1`, `forward_batch` with one text or with texts of one length."
            )
        elif heads is not None:
            notes.append(f"CTranslate2 caches keys and values of every head, not of the {heads} that the model has.")
        return "a decoder", "Its logits", tuple(notes)
    if isinstance(net, EncoderDecoder):
        note = (
            "Sources end with the end token, which `tokenizer.json` adds. CTranslate2 wants at least one token of a "
            "translation unless it is called with `min_decoding_length=0`, and its length penalty is another than "
            "ours: outputs of the two beam searches can differ."
        )
        return "an encoder-decoder", "Its log-probabilities of target tokens", (note,)
    if head is None:
        return "an encoder", "Its hidden states", ()
    pooled = pooler_of(head) is not None
    given = "hidden states and the pooled one" if pooled else "hidden states"
    note = (
        f"CTranslate2 has no {type(head).__name__}: it gives {given}, and the head's weights are in `{HEAD}`, to be "
        "applied to them."
    )
    return "an encoder", "Its hidden states" + (" and pooled ones" if pooled else ""), (note,)


def _usage(native: Native) -> list[str]:
    """Lines of Python that run the model."""
    lines = [
        "import ctranslate2",
        "from tokenizers import Tokenizer",
        "",
        'tokenizer = Tokenizer.from_file("{name}/tokenizer.json")',
        'tokens = tokenizer.encode("A text").tokens',
    ]
    if isinstance(native.net, Decoder):
        return [
            *lines,
            'generator = ctranslate2.Generator("{name}")',
            "result = generator.generate_batch([tokens], max_length=50)[0]",
            "print(tokenizer.decode(result.sequences_ids[0]))",
        ]
    if isinstance(native.net, EncoderDecoder):
        return [
            *lines,
            'translator = ctranslate2.Translator("{name}")',
            f"result = translator.translate_batch([tokens], beam_size=4, max_decoding_length={native.max_length})[0]",
            "print(tokenizer.decode([tokenizer.token_to_id(token) for token in result.hypotheses[0]]))",
        ]
    return [
        "import numpy",
        *lines,
        'encoder = ctranslate2.Encoder("{name}")',
        "hidden = numpy.array(encoder.forward_batch([tokens]).last_hidden_state)",
    ]

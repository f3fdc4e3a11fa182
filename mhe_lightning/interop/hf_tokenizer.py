"""A tokenizer as Hugging Face transformers loads it, with the special tokens that the model was trained with."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, processors

from mhe_lightning.data.tokenizer import end_of_text_id, start_of_sequence_id
from mhe_lightning.interop.native import PADDING_TOKENS
from mhe_lightning.models import Decoder, EncoderDecoder

UNKNOWN_TOKENS = ("[UNK]", "<unk>")


def stock_tokenizer(tokenizer: Tokenizer, net: object, max_length: int) -> tuple[str, dict[str, Any]]:
    """A tokenizer.json and a tokenizer_config.json whose tokens are those that a net was trained with.

    A decoder's text begins with the end-of-text token, as each of its training documents followed one. An encoder's is
    ``[CLS] text [SEP]`` or ``[CLS] text [SEP] second [SEP]``, an encoder-decoder's ends with the end token.

    Args:
        tokenizer: the one that the net was trained with.
        net: the model.
        max_length: most tokens that it reads.

    Returns:
        The text of the former, and the latter.
    """
    end = end_of_text_id(tokenizer)
    end_token: str = tokenizer.id_to_token(end)  # type: ignore[assignment]
    start = start_of_sequence_id(tokenizer)
    special = [(end_token, end)]
    if isinstance(net, Decoder):
        single, pair = f"{end_token} $A", f"{end_token} $A {end_token} $B:1"
    elif isinstance(net, EncoderDecoder) or start is None:
        single, pair = f"$A {end_token}", f"$A {end_token} $B:1 {end_token}:1"
    else:
        start_token: str = tokenizer.id_to_token(start)  # type: ignore[assignment]
        special.append((start_token, start))
        single, pair = f"{start_token} $A {end_token}", f"{start_token} $A {end_token} $B:1 {end_token}:1"
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.no_truncation()
    changed.no_padding()
    changed.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **_names(tokenizer, net, end_token),
    }
    if not isinstance(net, (Decoder, EncoderDecoder)):
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return changed.to_str(pretty=True), config


def _names(tokenizer: Tokenizer, net: object, end_token: str) -> dict[str, str]:
    """Roles of special tokens. An unknown token is named always: engines do not load a tokenizer without one."""
    has = tokenizer.get_vocab(with_added_tokens=True)
    names = {
        "unk_token": next((token for token in UNKNOWN_TOKENS if token in has), end_token),
        "pad_token": next((token for token in PADDING_TOKENS if token in has), end_token),
        "eos_token": end_token,
    }
    if isinstance(net, Decoder):
        names["bos_token"] = end_token
        names["padding_side"] = "left"
    for role, token in (("cls_token", "[CLS]"), ("sep_token", "[SEP]"), ("mask_token", "[MASK]")):
        if token in has:
            names[role] = token
    if not isinstance(net, (Decoder, EncoderDecoder)):
        start = start_of_sequence_id(tokenizer)
        if start is not None:
            names["cls_token"] = str(tokenizer.id_to_token(start))
        names["sep_token"] = end_token
    return names

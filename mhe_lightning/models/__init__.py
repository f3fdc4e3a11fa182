"""Transformers from scratch, as plain ``torch.nn.Module``s that take any attention."""

from mhe_lightning.models.decoder import Decoder
from mhe_lightning.models.encoder import Encoder
from mhe_lightning.models.encoder_decoder import EncoderDecoder
from mhe_lightning.models.generation import generate, stream
from mhe_lightning.models.search import Hypothesis, beam_search

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "Hypothesis", "beam_search", "generate", "stream"]

"""Multi-head attention and its leaner variants, as plain ``torch.nn.Module``s. Importing this loads only torch."""

from mhe_lightning.attention.base import Attention, AttentionFactory
from mhe_lightning.attention.cache import KVCache, StaticKVCache
from mhe_lightning.attention.el import ELAttention
from mhe_lightning.attention.grouped import GQA, MHA, MQA, SHA
from mhe_lightning.attention.mhe import MHE
from mhe_lightning.attention.shared_kv import SKV

__all__ = [
    "GQA",
    "MHA",
    "MHE",
    "MQA",
    "SHA",
    "SKV",
    "Attention",
    "AttentionFactory",
    "ELAttention",
    "KVCache",
    "StaticKVCache",
]

"""LightningDataModules: corpora to batches, exactly resumable."""

from mhe_lightning.data.base import ExactDataModule, verify_certificate
from mhe_lightning.data.corpus import CorpusSpec
from mhe_lightning.data.language_modeling import LanguageModelingData
from mhe_lightning.data.streaming import StreamedLanguageModelingData

__all__ = [
    "CorpusSpec",
    "ExactDataModule",
    "LanguageModelingData",
    "StreamedLanguageModelingData",
    "verify_certificate",
]

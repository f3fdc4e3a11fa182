"""LightningDataModules: corpora to batches, exactly resumable."""

from mhe_lightning.data.base import ExactDataModule, verify_certificate
from mhe_lightning.data.corpus import CorpusSpec
from mhe_lightning.data.glue import GlueData
from mhe_lightning.data.language_modeling import LanguageModelingData
from mhe_lightning.data.masked_language_modeling import MaskedLanguageModelingData
from mhe_lightning.data.squad import SquadData
from mhe_lightning.data.streaming import StreamedLanguageModelingData
from mhe_lightning.data.superglue import SuperGlueData
from mhe_lightning.data.translation import TranslationData

__all__ = [
    "CorpusSpec",
    "ExactDataModule",
    "GlueData",
    "LanguageModelingData",
    "MaskedLanguageModelingData",
    "SquadData",
    "StreamedLanguageModelingData",
    "SuperGlueData",
    "TranslationData",
    "verify_certificate",
]

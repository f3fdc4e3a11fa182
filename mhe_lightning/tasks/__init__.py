"""LightningModules: an objective, its metrics and its optimizer."""

from mhe_lightning.tasks.base import Task
from mhe_lightning.tasks.classification import SequenceClassification
from mhe_lightning.tasks.distillation import Distillation
from mhe_lightning.tasks.language_modeling import LanguageModeling
from mhe_lightning.tasks.masked_language_modeling import MaskedLanguageModeling
from mhe_lightning.tasks.question_answering import ExtractiveQuestionAnswering
from mhe_lightning.tasks.translation import Translation

__all__ = [
    "Distillation",
    "ExtractiveQuestionAnswering",
    "LanguageModeling",
    "MaskedLanguageModeling",
    "SequenceClassification",
    "Task",
    "Translation",
]

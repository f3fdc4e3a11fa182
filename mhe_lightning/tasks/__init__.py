"""LightningModules: an objective, its metrics and its optimizer."""

from mhe_lightning.tasks.base import Task
from mhe_lightning.tasks.language_modeling import LanguageModeling

__all__ = ["LanguageModeling", "Task"]

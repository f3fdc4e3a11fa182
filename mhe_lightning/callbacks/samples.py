"""A few lines of what the model writes, at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from mhe_lightning.data.language_modeling import LanguageModelingData
from mhe_lightning.distributed import gather, release
from mhe_lightning.files import write_text
from mhe_lightning.models import Decoder
from mhe_lightning.models.generation import generate_text


class Samples(Callback):
    """Writes ``samples.txt`` when training has ended.

    Args:
        prompts: texts to continue; none, no samples.
        max_new_tokens: tokens to add to each, as far as the model has positions.
        temperature: of the sampling; 0 is greedy.
        top_k: sample from the k most likely tokens only.
        seed: of the sampling.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> None:
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = pl_module.net
        data = getattr(trainer, "datamodule", None)
        if not self.prompts or not isinstance(net, Decoder):
            return
        if not isinstance(data, LanguageModelingData):  # a decoder that was finetuned as a classifier
            return
        corpus = data.corpus
        net.eval()
        longest = 1 + max(len(corpus.tokenizer.encode(prompt).ids) for prompt in self.prompts)
        gather(pl_module)  # of all ranks, which have a part each
        texts = generate_text(
            net,
            corpus.tokenizer,
            corpus.end_of_text_id,
            self.prompts,
            max_new_tokens=max(1, min(self.max_new_tokens, net.max_length - longest)),
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )
        release(pl_module)
        blocks = [f"[{prompt}]{text}" for prompt, text in zip(self.prompts, texts, strict=True)]
        if trainer.is_global_zero:
            write_text(Path(trainer.default_root_dir) / "samples.txt", "\n\n---\n\n".join(blocks) + "\n")

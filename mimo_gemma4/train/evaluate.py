"""Evaluation on held-out samples: mean token loss and, where asked for, exact match of greedy answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mimo_gemma4.config import Config
from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.loader import StepLoader
from mimo_gemma4.data.manifest import Microbatch
from mimo_gemma4.model.mimo_model import Media, MimoModel
from mimo_gemma4.optim.step_reduction import StepReduction, StepReport
from mimo_gemma4.train.greedy_answers import Answer, greedy_answers
from mimo_gemma4.train.metrics import mean_losses
from mimo_gemma4.train.step import StepRunner


@dataclass(frozen=True)
class AnsweredSample:
    """One sample with the text of its generated and its true answer."""

    index: int
    """Number of the sample in the dataset index."""
    predicted: str
    true: str


class Evaluator:
    """Evaluates the model of all ranks; `run` is collective over all of them."""

    def __init__(self, config: Config, model: MimoModel, loader: StepLoader):
        """Evaluate `model` on the samples of `loader`, which plans them once, in order, padded."""
        self.config, self.model, self.loader = config, model, loader
        self.runner = StepRunner(model)
        self.reduction = StepReduction(model.layout, None, model.platform.device)
        self.answered: list[AnsweredSample] = []
        """On rank 0: the samples answered in the last run, in dataset order."""

    def run(self, step: int) -> dict[str, Any] | None:
        """Evaluate; rank 0 returns `{step, loss, losses, accuracy, items, per_modality}`, the others None."""
        for module in self.model.modules.values():
            module.eval()
        loss, tokens, items = 0.0, 0.0, 0
        decoders = self.model.layout.decoders
        decoder_sums, decoder_soft_tokens = dict.fromkeys(decoders, 0.0), dict.fromkeys(decoders, 0)
        answers: list[Answer] = []

        def observe(batch: LanguageBatch, microbatch: Microbatch, media: Media) -> None:
            answers.extend(self._answers(batch, microbatch, media))

        generating = self.config.eval.max_new_tokens > 0
        for number in range(self.loader.planner.steps or 0):
            data = self.loader.load(number)
            totals = self.runner.run(data, train=False, observe=observe if generating else None)
            results = self.reduction.reduce(
                {}, totals.loss_sum, totals.loss_tokens, totals.tokens, decoder_losses=totals.decoder_losses
            )
            report = StepReport(results).read()
            loss += report["loss"] * report["loss_tokens"]
            tokens += report["loss_tokens"]
            items += len(data.manifest.samples)
            for name, total in zip(decoders, report["decoder_losses"], strict=True):
                decoder_sums[name] += total
                decoder_soft_tokens[name] += data.manifest.soft_tokens_of(name)
        for module in self.model.modules.values():
            module.train()
        self.answered = self._gather(answers)
        if self.model.rank != 0:
            return None
        means = {"loss": loss / max(tokens, 1.0), "losses": mean_losses(decoder_sums, decoder_soft_tokens)}
        return {"step": step, **means, **self._score(generating, items)}

    def _answers(self, batch: LanguageBatch, microbatch: Microbatch, media: Media) -> Sequence[Answer]:
        """Answers to a microbatch, on one rank of the lane; empty on the others."""
        answers = greedy_answers(
            self.model,
            batch,
            microbatch,
            media,
            max_new_tokens=self.config.eval.max_new_tokens,
            stop_ids=self.loader.dataset.encoder.stop_ids,
        )
        groups = self.model.groups.modules["language"]
        return answers if groups.tp.rank() == groups.cp.rank() == groups.pp.rank() == 0 else []

    def _gather(self, answers: list[Answer]) -> list[AnsweredSample]:
        everyone: list[list[Answer]] = [[] for _ in range(self.model.groups.host.size())]
        dist.all_gather_object(everyone, answers, group=self.model.groups.host)
        if self.model.rank != 0:
            return []
        decode = self.loader.dataset.encoder.decode
        found = sorted((answer for part in everyone for answer in part), key=lambda answer: answer.index)
        return [AnsweredSample(answer.index, decode(answer.predicted), decode(answer.true)) for answer in found]

    def _score(self, generating: bool, items: int) -> dict[str, Any]:
        dataset = self.loader.dataset
        if not generating:
            return {"accuracy": None, "items": items, "per_modality": {}}
        hits: dict[str, list[bool]] = defaultdict(list)
        for sample in self.answered:
            kinds = sorted({item.modality for item in dataset.media(sample.index)}) or ["text"]
            hits["+".join(kinds)].append(sample.predicted == sample.true)
        every = [hit for part in hits.values() for hit in part]
        per_modality = {kind: {"accuracy": sum(part) / len(part), "items": len(part)} for kind, part in hits.items()}
        return {"accuracy": sum(every) / max(1, len(every)), "items": len(every), "per_modality": per_modality}

"""The training loop: step, reduce, update, record; evaluate and save when due. The same code on every rank."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_gemma4.checkpoint import save_load as checkpoint
from mimo_gemma4.config import Config
from mimo_gemma4.data.dataset import BadSample
from mimo_gemma4.data.loader import StepData, StepLoader
from mimo_gemma4.data.manifest import StepManifest
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise
from mimo_gemma4.distributed.layout import LANGUAGE, ModuleGrid
from mimo_gemma4.errors import DataError, NumericsError
from mimo_gemma4.flops import peak_flops
from mimo_gemma4.model.mimo_model import MimoModel
from mimo_gemma4.optim.module_optimizer import ModuleOptimizer
from mimo_gemma4.optim.step_reduction import ModuleUsage, StepReduction, StepReport, StepResults, sample_hash
from mimo_gemma4.train.data_record import DataPoint, DataProgress
from mimo_gemma4.train.evaluate import Evaluator
from mimo_gemma4.train.metrics import MetricsLog, mean_losses
from mimo_gemma4.train.profiling import FOLDER, TRAINER, Tracer
from mimo_gemma4.train.recorded_rates import rates, record_rates
from mimo_gemma4.train.step import StepRunner, StepTotals
from mimo_gemma4.train.usage import Moment, UsageMeter, now, seconds_between, utilisation


@dataclass(frozen=True)
class _Measured:
    """What was planned for a step, and when it began and ended."""

    manifest: StepManifest
    start: Moment
    end: Moment

    @property
    def seconds(self) -> float:
        """How long the step took; the device must have finished it."""
        return seconds_between(self.start, self.end)


@dataclass(frozen=True)
class _Pending:
    """A finished step whose results are still on the device."""

    step: int
    report: StepReport
    rates: Mapping[str, float]
    """Learning rate of every module of the layout."""
    measured: _Measured
    previous: _Measured | None
    """The step before, whose usage was reduced with this one's results; None for the first step."""


class Trainer:
    """Trains the modules of this rank in step with all other ranks."""

    def __init__(
        self,
        config: Config,
        model: MimoModel,
        optimizers: Mapping[str, ModuleOptimizer],
        loader: StepLoader,
        evaluator: Evaluator | None,
        finished_steps: int = 0,
        data_point: DataPoint | None = None,
    ):
        """Train with these parts, continuing after `finished_steps`, where `data_point` says in the data."""
        self.config, self.model, self.optimizers = config, model, dict(optimizers)
        self.loader, self.evaluator, self.step = loader, evaluator, finished_steps
        self.data_progress = DataProgress(config, loader, None if data_point is None else data_point.earlier)
        self.tracer = Tracer(config.profile.numbers, Path(config.run.dir) / FOLDER, model.layout, model.platform)
        self.runner = StepRunner(model, self.tracer.span)
        self.reduction = StepReduction(model.layout, config.optim.clip_grad, model.platform.device)
        self.meter = UsageMeter(model, loader.planner.dataset)
        self.log = all_ranks_or_raise(
            model.groups.host, lambda: MetricsLog(config, finished_steps + 1) if model.rank == 0 else None
        )
        self._record_bad_samples(None, [*loader.dataset.unusable, *loader.dataset.too_long])
        if evaluator is not None:
            held_out = evaluator.loader.dataset
            self._record_bad_samples(None, [*held_out.unusable, *held_out.too_long])
        self._pending: _Pending | None = None
        self._measured: _Measured | None = None
        device = model.platform.device
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def fit(self) -> None:
        """Run until `train.steps`; evaluate and save on the way and at the end."""
        try:
            while self.step < self.config.train.steps:
                with self.tracer.step(self.step + 1):
                    self.train_step()
                if self._due(self.config.checkpoint.every):
                    self.save()
                if self._due(self.config.eval.every):
                    self.evaluate()
            self._record_pending()
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading ahead and close the records."""
        self.loader.close()
        if self.evaluator is not None:
            self.evaluator.loader.close()
        if self.log is not None:
            self.log.close()

    def train_step(self) -> StepResults:
        """One optimizer step on every module of this rank."""
        device = self.model.platform.device
        start = now(device)
        step, span = self.step + 1, self.tracer.span
        with span(TRAINER, "load", step):
            data = self.loader.load(self.step)
        for optimizer in self.optimizers.values():
            optimizer.zero_gradients()
        totals = self.runner.run(data)
        for name, optimizer in self.optimizers.items():
            with span(name, "reduce_gradients", step):
                optimizer.finish_gradients()
        # The last step's results are read now, while the device works on this step: that costs no wait.
        self._record_pending()
        measured = self._measured
        with span(TRAINER, "reduce_results", step):
            results = self.reduce(totals, data, None if measured is None else measured.manifest)
        step_rates = rates(self.config, step)
        for name, optimizer in self.optimizers.items():
            with span(name, "optimizer_step", step):
                optimizer.apply(results, step_rates[name])
        self.step = step
        self._measured = _Measured(data.manifest, start, now(device))
        self._pending = _Pending(step, StepReport(results), step_rates, self._measured, measured)
        return results

    def reduce(self, totals: StepTotals, data: StepData, previous: StepManifest | None = None) -> StepResults:
        """Reduce this step's totals and the usage of the `previous` step over all ranks."""
        usage = None
        if previous is not None:
            usage = self.meter.usage(previous, self.runner.finished_seconds())
        return self.reduction.reduce(
            self.optimizers,
            loss_sum=totals.loss_sum,
            loss_tokens=totals.loss_tokens,
            decoder_losses=totals.decoder_losses,
            tokens=totals.tokens,
            hash_difference=self._hash_difference(data),
            usage=usage,
        )

    def _hash_difference(self, data: StepData) -> torch.Tensor:
        """[language lanes]: hash of the items given to this rank's modules, less the hash of those it expects."""
        layout, rank = self.model.layout, self.model.rank
        difference = torch.zeros(layout.language.dp, dtype=torch.float64)
        for name, items in data.items.items():
            at = layout.grids[name].coordinate(rank)
            if at.tp == at.pp == 0:  # one rank reports the items of a lane
                for lane, identity in items:
                    difference[lane] += sample_hash([identity])
        if self.reduction.reports_tokens:
            difference[layout.language.coordinate(rank).dp] -= sample_hash(data.expected)
        return self.model.platform.put(difference)

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluate now; rank 0 records and returns the result."""
        if self.evaluator is None:
            return None
        self._record_pending()
        record = self.evaluator.run(self.step)
        if self.log is not None and record is not None:
            self.log.evaluation(record)
            self._record_bad_samples(self.step, self.evaluator.loader.bad.values())
        return record

    def save(self) -> None:
        """Write a checkpoint now."""
        self._record_pending()
        state = {
            "step": self.step,
            "lora": self.config.lora_scales,
            "decoders": list(self.model.layout.decoders),
            "data": self.data_progress.record(self.step),
            "schedule": record_rates(self.config, self.step),
        }
        checkpoint.save(
            Path(self.config.run.dir) / "checkpoints",
            self.step,
            self.optimizers,
            state,
            host=self.model.groups.host,
            keep=self.config.checkpoint.keep,
        )

    def _due(self, every: int | None) -> bool:
        return self.step == self.config.train.steps or (every is not None and self.step % every == 0)

    def _record_pending(self) -> None:
        """Read, check and record the last step's results, once."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        result = pending.report.read()
        self._check(pending, result)
        self.data_progress.count_skipped(pending.measured.manifest)
        if self.log is not None:
            self.log.step(self._step_record(pending, result))
            skipped_samples = pending.measured.manifest.skipped_samples
            self._record_bad_samples(pending.step, [self.loader.bad[index] for index in skipped_samples])

    def _record_bad_samples(self, step: int | None, samples: Iterable[BadSample]) -> None:
        """Record samples that are not trained on; `step` is None for those that were found by indexing."""
        if self.log is not None:
            self.log.bad_samples([{"step": step, **sample.record()} for sample in samples])

    def _check(self, pending: _Pending, result: Mapping[str, Any]) -> None:
        """Stop at the first step that did not happen as planned; equal on every rank, so all of them stop."""
        lanes = [lane for lane, difference in enumerate(result["hash_difference"]) if difference]
        if lanes:
            samples = [sample for sample in pending.measured.manifest.samples if sample.lane in lanes]
            keys = [self.loader.dataset.key(sample.index) for sample in samples]
            raise DataError(
                f"step {pending.step}: encoders and language lanes {lanes} worked on different media items; this rank "
                f"planned the samples {keys}. Every host must see the same shards under data.train.shards"
            )
        if result["nonfinite"]:
            names = list(self.model.layout.grids)
            blamed = [name for name, ranks in zip(names, result["nonfinite_ranks"], strict=True) if ranks]
            where = f"gradients of {', '.join(blamed)}" if blamed else "loss"
            raise NumericsError(
                f"step {pending.step}: {where} not finite (loss {result['loss']:.4g}); the weights were left as they "
                "were. Lower optim.lr, look at the batch, or resume from the last checkpoint"
            )

    def _decoder_losses(self, manifest: StepManifest, sums: Sequence[float]) -> dict[str, float | None]:
        decoders = self.model.layout.decoders
        return mean_losses(
            dict(zip(decoders, sums, strict=True)), {name: manifest.soft_tokens_of(name) for name in decoders}
        )

    def _step_record(self, pending: _Pending, result: Mapping[str, Any]) -> dict[str, Any]:
        """The step's line of `metrics.jsonl` (`train.metrics`)."""
        manifest, seconds = pending.measured.manifest, pending.measured.seconds
        grids = self.model.layout.grids.values()
        return {
            "step": pending.step,
            "loss": result["loss"],
            "losses": self._decoder_losses(manifest, result["decoder_losses"]),
            "grad_norm": result["grad_norm"],
            "lr": pending.rates[LANGUAGE],
            "tokens": int(result["tokens"]),
            "loss_tokens": int(result["loss_tokens"]),
            "tokens_per_second": result["tokens"] / seconds,
            "step_seconds": seconds,
            "bad_samples": self.loader.faults(manifest),
            "imbalance": {name: asdict(part) for name, part in manifest.imbalance.items()},
            "modules": {
                grid.name: {"lr": pending.rates[grid.name], "grad_norm": norm}
                | self._usage_record(grid, ModuleUsage(*usage), result["memory_gib"], pending.previous)
                for grid, norm, usage in zip(grids, result["module_grad_norm"], result["usage"], strict=True)
            },
        }

    def _usage_record(
        self, grid: ModuleGrid, usage: ModuleUsage, memory_gib: Sequence[float], measured: _Measured | None
    ) -> dict[str, float | None]:
        """A module's shares of the `measured` step and the memory of its fullest rank; all None without such a step."""
        if measured is None:
            return dict.fromkeys(("mfu", "busy", "wait", "memory_gib"))
        shares = utilisation(usage, ranks=len(grid.ranks), seconds=measured.seconds, peak=self._peak)
        return shares | {"memory_gib": max(memory_gib[rank] for rank in grid.ranks)}

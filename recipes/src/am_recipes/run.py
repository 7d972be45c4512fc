"""What every recipe asks around its loop: where it is, what it logs, what is saved, when it stops.

A run is asked and calls nobody back. It holds no model and no loss: what it saves is the dict it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

import am_ckpt
import am_data
import am_mesh
from am_recipes import checks, data, provenance, reproducible, run_dir, trackers
from am_recipes.best import Best
from am_recipes.build import Weights
from am_recipes.configs import RunConfig
from am_recipes.launch import PREEMPTED
from am_recipes.log import Log
from am_recipes.progress import Progress, Step, any_rank, first_told, seed_everything
from am_recipes.settings import plain, replaced
from am_recipes.sinks import ends
from am_recipes.stop_signal import StopSignal
from am_recipes.time_limit import LaunchTime


@contextlib.contextmanager
def started(config: RunConfig) -> Iterator[tuple[torch.device, StopSignal, bool]]:
    """What `main` of every recipe is in: device, stop signal, and whether the run is finished already.

    Outermost first: whether torch is deterministic, the ranks, the signals, and the run directory, which is this run's
    alone meanwhile. Every rank enters it.
    """
    with (
        reproducible.as_asked(config),
        am_mesh.process_group(config.distributed.timeout_minutes) as device,
        StopSignal() as stop,
        run_dir.claim(config) as finished,
    ):
        yield device, stop, finished


class BeginsHere(Exception):
    """Raised by a `Run` in place of its beginning, in a dry run."""


class Run:
    """One run from its first step, or the newest checkpoint, to its end. Every rank makes one and calls all of it.

    Use it as a context manager, so that an error ends the record. Made last: it restores `state` from the newest
    checkpoint, as `checkpoint.resume` says.

    Args:
        state: everything a checkpoint holds, by name; `schedule` (a torch scheduler) and `progress` among it.
        total_steps: optimizer steps of the whole run.
        weights: what a checkpoint says of the model beside its tensors.
    """

    def __init__(
        self,
        config: RunConfig,
        dims: am_mesh.ParallelDims,
        stop: StopSignal,
        state: Mapping[str, Any],
        *,
        total_steps: int,
        weights: Weights,
    ) -> None:
        if config.dry_run:
            raise BeginsHere
        self._config, self._dims, self._stop, self._state = config, dims, stop, state
        self._progress: Progress = state["progress"]
        self.total_steps = total_steps
        self._best = Best(config, self._progress)
        self._checkpoints = am_ckpt.Checkpointer(
            config.run_dir / "checkpoints",
            asynchronous=config.checkpoint.asynchronous,
            layout=config.checkpoint.layout,
            keep_last=config.checkpoint.keep_last,
            keep_best=self._best.retention,
            files=weights.files,
            mapping=weights.mapping,
            fingerprints={**weights.fingerprints, **run_dir.identity_texts(config)},
        )
        self.resumed, self._restored = run_dir.resume(self._checkpoints, state, config.checkpoint, total_steps)
        self._best.require_kept()
        self._stopping = self._is_out_of_time = self._minutes_are_over = self._is_among_best = False
        self._time = LaunchTime(config.step_scheduler, stop.job_end, self._checkpoints, state)
        self._validated: dict[str, float] | None = None
        self._trackers = trackers.build(config, self.resumed)
        own_sinks = [] if torch.distributed.get_rank() else [sink.build() for sink in config.sinks]
        self.log = Log(
            config.run_dir,
            config.to_yaml(),
            total_steps=total_steps,
            rank=torch.distributed.get_rank(),
            world_size=dims.world_size,
            resume_step=self.resumed,
            identity=config.identity(),
            sinks=[*own_sinks, self._trackers],
            launch=provenance.of_ranks(config, weights, self.resumed, dims.world_size),
        )

    def __enter__(self) -> Run:
        self.log.__enter__()
        self._trackers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = error if isinstance(error, RuntimeError) and self._is_loss_of_a_rank(error) else None
        if lost is None:
            return self.log.__exit__(kind, error, trace)
        told = ConnectionError(
            f"another rank is gone or cannot be reached: what ended it is above, or in its own log; the same command "
            f"continues from the latest checkpoint ({str(lost).splitlines()[0]})"
        )
        self.log.__exit__(ConnectionError, told, trace)
        raise told from lost

    def _is_loss_of_a_rank(self, error: RuntimeError) -> bool:
        """Whether communication failed; gloo has no class of its own for that."""
        failed = isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
        return failed and self._dims.world_size > 1

    def begin(self, dataset: object, *facts: object) -> None:
        """Log what is known before the first step: what was restored, what the dataset reports, and `facts`."""
        if isinstance(dataset, am_data.Dataset):
            self.log.data({"dataset, as read": dataset.fingerprint})
        for secret in replaced(plain(self._config), self._config.environment):
            self.log.note(secret)
        for restored in self._restored:
            self.log.note(restored)
        if isinstance(dataset, am_data.Reported):
            self.log.note(dataset.report)
            self.log.samples(dataset.report.samples)
        for fact in facts:
            self.log.note(fact)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    def steps(self, loader: am_data.DataLoader) -> Iterator[list[am_data.Batch]]:
        """The micro-batches of every step that is left, until the last one, a signal or validations that say so.

        Raises ValueError, after a commit, where a stream ends before; and where the time of the launch is over before
        the first step.
        """
        self._steps_per_epoch = len(loader) if self._config.step_scheduler.ckpt_every_epoch else None
        if self.resumed is not None and self._config.checkpoint.enabled and self._stays:
            # Asked for another length or other intervals, the step that it was stopped at may be one that stays.
            self._checkpoints.make_permanent(self.step)
        if self.step < self.total_steps and not self._best.waited_enough:
            self._require_time()
        self._stop.doing = "the current step is finished and committed"
        steps = itertools.islice(loader, 0 if self._best.waited_enough else self.total_steps - self.step)
        self._time.limit.begin()
        for micro_batches in steps:
            self._now = Step(time.monotonic(), loader.epoch)
            yield micro_batches
            if self._stopping or self._best.waited_enough:
                return
        if self._best.waited_enough:
            return
        if self.step < self.total_steps:
            self._checkpoints.save(self.step, self._state, metrics=self._validated)
            self._checkpoints.wait()
            raise ValueError(
                f"the data ended after step {self.step} of {self.total_steps}, which is committed; lower "
                "step_scheduler.max_steps to it, or raise num_epochs and run the same command again"
            )

    def count(self, micro_batches: Sequence[am_data.Batch]) -> int:
        """Targets of the step, over all ranks: what its losses are divided by."""
        counts = torch.tensor([data.count_targets(micro_batches), data.count_tokens(micro_batches)])
        totals = am_mesh.sum_over(self._dims.row_ranks, counts.to(self._dims.row_ranks.device_type)).tolist()
        self._now.targets, self._now.tokens = totals
        return self._now.targets

    def seed(self, micro_batch: int) -> None:
        """Seed torch for a micro-batch of this step: dropout is a function of the position alone, also after a resume.

        Ranks that hold one activation in parts draw alike.
        """
        here = self._dims.loss_ranks.get_coordinate()
        assert here is not None
        seed_everything(self._config.seed, self.step, micro_batch, *here)

    def measure(self, sums: Mapping[str, torch.Tensor], grad_norm: torch.Tensor) -> None:
        """Take the losses of a step over all ranks; call it before the step changes the weights.

        Raises FloatingPointError, on every rank, where the loss or the norm is not finite.
        """
        values = am_mesh.sum_over(self._dims.loss_ranks, torch.stack([value.double() for value in sums.values()]))
        now = self._now
        now.losses, now.grad_norm = dict(zip(sums, values.tolist(), strict=True)), grad_norm.item()
        now.lr = float(self._state["schedule"].get_last_lr()[0])
        checks.require_finite(self.step + 1, loss=now.losses["loss"], grad_norm=now.grad_norm)

    def done(self, others: Mapping[str, float]) -> None:
        """The optimizer has taken the step: count it, log it with `others`.

        Asks every rank whether to stop, or leaves that to `validated` where that follows: it takes long.
        """
        self._progress.step += 1
        now = self._now
        self.log.step(
            self.step,
            epoch=now.epoch,
            loss=now.losses.pop("loss"),
            grad_norm=now.grad_norm,
            lr=now.lr,
            tokens=now.tokens,
            target_tokens=now.targets,
            seconds=time.monotonic() - now.began,
            others=now.losses | dict(others),
        )
        for fact in self._trackers.news():
            self.log.note(fact)
        self._validated, self._is_among_best = None, False
        if not self.validation_is_due:
            self._ask_every_rank()

    @property
    def validation_is_due(self) -> bool:
        """Whether the held-out losses are to be measured now; before the first step too."""
        if not self._config.validation_datasets:
            return False
        return self.step == 0 or self._is_due(self._config.step_scheduler.val_every_steps)

    def validated(self, losses: Mapping[str, float]) -> None:
        """Log held-out losses. Raises FloatingPointError where one is not finite."""
        self._validated = dict(losses)
        self.log.validation(self.step, losses)
        if not self.step:
            return
        checks.require_finite(self.step, **losses)
        self._is_among_best = self._best.validated(losses)
        self._ask_every_rank()

    def save(self) -> None:
        """Commit a checkpoint where one is due, or the run is told to stop.

        What is due by time alone, or for the stop, is ephemeral: the next one takes its place.
        """
        is_due = self._config.checkpoint.enabled and (self._stays or self._minutes_are_over)
        if self._stopping or is_due:
            self.log.sync()
            self._checkpoints.save(self.step, self._state, metrics=self._validated, ephemeral=not self._stays)
            self._time.saved()

    def stopped(self) -> bool:
        """Wait until every checkpoint is durable; whether the run was told to stop before its end."""
        self._checkpoints.wait()
        self._stop.doing = "training is done, the rest is finished, and the same command would do that again"
        return self._stopping and self.step < self.total_steps and not self._best.waited_enough

    def preempted(self) -> int:
        """End the record of a run that was stopped; the exit status."""
        done = f"after step {self.step} of {self.total_steps}, which is committed"
        why = ", out of time" if self._is_out_of_time else ""
        self.log.finish(status=f"{ends.STOPPED} {done}{why}; the same command continues with step {self.step + 1}")
        # Rank 0 is the last to be done, and whoever ends before it has torchrun stop the others of its machine.
        any_rank(self._dims, True)
        return PREEMPTED

    def choose_weights(self) -> None:
        """Load what `export.which` asks for; say so where the last validation is worse than the best."""
        verdict, step = self._best.verdict(), self._best.to_export()
        if step is not None:
            model = {"model": self._state["model"]}
            self._checkpoints.load(model, step, verify=self._config.checkpoint.verify)
        if verdict is not None:
            self.log.note(verdict)

    def finish(self, ask: str | None = None) -> int:
        """End the record; `ask` is how to ask the exported model (see `run_dir.next_steps`). The exit status."""
        status = ends.FINISHED
        if self._best.waited_enough and self.step < self.total_steps:
            status += f": early, after step {self.step} of {self.total_steps}, as {self._best.reason}"
        self.log.finish(
            goal=self._config.goal(),
            ending=self._config.ending(),
            status=status,
            next_steps=run_dir.next_steps(self._config.run_dir, ask if self._config.export.enabled else None),
        )
        return 0

    def _ask_every_rank(self) -> None:
        """Whether to stop, or to save: a signal reaches one rank before another, and their clocks differ."""
        over, late, told = self._time.save_is_due(), None, self._stop.received is not None
        if self.step < self.total_steps:
            late = self._time.asked(saves=self._config.checkpoint.enabled and (self._stays or over))
        told, self._minutes_are_over, is_late = any_rank(self._dims, told, over, late is not None)
        if told:
            self._stop.heard()
        if is_late and not self._stopping:
            self._is_out_of_time = True
            self.log.note(first_told(late))
        self._stopping = self._stopping or told or is_late

    def _require_time(self) -> None:
        """Refuse, on every rank, a launch whose time is over before its first step: it would be begun for ever."""
        over = self._time.limit.over_before_a_step()
        if any_rank(self._dims, over is not None) == [True]:
            raise ValueError(first_told(over))

    @property
    def _stays(self) -> bool:
        """Whether a checkpoint of this step is asked for, whatever the time."""
        return (
            self._is_due(self._config.step_scheduler.ckpt_every_steps)
            or self._is_among_best
            or self._best.waited_enough
            or (self._steps_per_epoch is not None and self.step % self._steps_per_epoch == 0)
        )

    def _is_due(self, every: int | None) -> bool:
        return self.step == self.total_steps or (every is not None and self.step % every == 0)

"""Which step is best by its held-out loss, and what follows from that: what is kept, exported, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from am_recipes.progress import Progress
from am_recipes.run_config import RunConfig


class Best:
    """What `checkpoint.keep_best`, `export.which` and `early_stopping` make of the validations in `progress`.

    It is asked by a `Run`, on every rank alike. `metric` is the loss of the first validation set, which decides.
    """

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self.metric = next(iter(config.validation_datasets), "")
        self._num_wanted = config.checkpoint.keep_best or int(config.wants_best_export)

    @property
    def retention(self) -> tuple[str, Literal["min"], int] | None:
        """As `keep_best` of a Checkpointer."""
        # Without keep_last nothing is deleted.
        keep = self._config.checkpoint.keep_best if self._config.checkpoint.keep_last is None else self._num_wanted
        return (self.metric, "min", keep) if keep else None

    def validated(self, losses: Mapping[str, float]) -> bool:
        """Take the losses after this step; whether a checkpoint of it is wanted, as it is among the best."""
        stopping = self._config.early_stopping
        min_delta = 0.0 if stopping is None else stopping.min_delta
        return self._progress.validated(losses[self.metric], self._num_wanted or 1, min_delta) and self._num_wanted > 0

    @property
    def waited_enough(self) -> bool:
        """Whether early stopping ends the run here."""
        stopping = self._config.early_stopping
        return stopping is not None and self._progress.waited >= stopping.patience

    @property
    def reason(self) -> str:
        """Why early stopping ended the run."""
        return f"{self.metric} has not fallen below {self._progress.counted:.4f} in {self._progress.waited} validations"

    def require_kept(self) -> None:
        """Refuse to export a best step that an earlier launch did not keep: before anything is trained or recorded."""
        if not (self._config.wants_best_export and self._progress.best):
            return
        loss, step = self._progress.best[0]
        if step != self._progress.step and not self._is_kept(step):
            raise self._config.error(
                "export.which",
                f"best so far is step {step} with {self.metric} {loss:.4f}, and no checkpoint of it was kept, as the "
                "run began without export.which best; export the last, or begin anew in another run_dir",
            )

    def to_export(self) -> int | None:
        """The step whose weights `export.which` asks for; None for those that the run has now."""
        best = self._progress.best
        return best[0][1] if self._config.wants_best_export and best and best[0][1] != self._progress.step else None

    def verdict(self) -> str | None:
        """What is said of the exported step where another one than the last is best; None where there is nothing."""
        if not self._progress.best or self._progress.last is None:
            return None
        (loss, step), (last, last_step) = self._progress.best[0], self._progress.last
        if self.to_export() is not None:
            return f"export: step {step}, {self.metric} {loss:.4f}; after step {last_step} it is {last:.4f}"
        if self._config.wants_best_export or last <= loss:
            return None
        another = (
            "the same command with --export.which best" if self._is_kept(step) else "a run with export.which: best"
        )
        return (
            f"WARNING {self.metric} is {last:.4f} after step {last_step} and was {loss:.4f} after step {step};\n"
            f"{another} exports that one"
        )

    def _is_kept(self, step: int) -> bool:
        return (self._config.run_dir / "checkpoints" / f"step_{step:06d}").exists()

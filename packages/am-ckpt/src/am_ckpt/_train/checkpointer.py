"""Save and resume training state: every rank writes its part, one rename commits.

A save is planned in full before a byte is written (names, types, coverage, space), written into a staging folder that
nothing reads, checked, and renamed. A load is checked in full (names, shapes, dtypes, groups) before a byte of the
model changes. While planning, ranks exchange outcomes by collectives, while writing by files (see `write.py`), so
they succeed or raise together.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.hf_folder import INDEX, byte_count, weight_index
from am_ckpt._files.safetensors import Header, element_count
from am_ckpt._files.step import Best, require_file_name, step_name, steps
from am_ckpt._files.step_digests import Problem
from am_ckpt._train.background import Background
from am_ckpt._train.choose import choose, is_searched, warn_of_skipped, was_deleted
from am_ckpt._train.existing import is_there, save_again
from am_ckpt._train.host_memory import StagingMemory, Versions, require_unchanged, versions
from am_ckpt._train.job import Job, file_metadata
from am_ckpt._train.ranks import agree, compute, rank_and_size, rank_zero
from am_ckpt._train.restore import restore
from am_ckpt._train.retention import Keep, discard_newer_steps, make_permanent, pin_path, require_disposable, tidy
from am_ckpt._train.shared_files import WeightFiles, require_mapped, require_one_machine
from am_ckpt._train.state import (
    Contents,
    Description,
    Plan,
    collect,
    contents_digest,
    join_extra_states,
    join_optimizers,
    join_per_rank,
    make_plan,
)
from am_ckpt._train.step_files import data_records, file_bytes, tensor_files
from am_ckpt._train.write import discard, new_manifest, run, stage


class Checkpointer:
    """Checkpoints of one run under `directory`. Every rank builds one with equal arguments and calls every method.

    A step stays if `keep_last`, `keep_every` or `keep_best` keeps it, or a pin (`pin`), or if it is the newest; with
    none of the three, nothing is deleted but ephemeral steps. `longest_save`: seconds that the longest save of this
    object took on this rank from its call, or the end of the one before it, until it was durable; None before any was.

    Args:
        directory: on a file system that all ranks share.
        keep_last: how many of the newest steps to keep.
        keep_every: keep every multiple of this step number.
        keep_best: `(metric, "min" | "max", count)`, the best by a metric given to `save`.
        asynchronous: `save` copies the state to host memory and returns; a thread of each rank writes and commits it.
            The memory (as much as this rank writes) is allocated at the first save and used again by all later ones.
            One save is under way at a time: the next waits for it. An error is raised by whatever is called next,
            `save`, `load`, `wait` or `flush`, and printed at the end of a process that calls nothing more; such a
            process ends when the save has.
        layout: of the model in a step. `"sharded"`: every rank writes files of its own, on any number of machines.
            `"direct"`: all ranks, on one machine, write into the files of a Hugging Face folder, so that `model/` is
            one, which transformers opens without a merge where `files` has config and tokenizer; `mapping` is applied.
            Tensors sharded along later dims (tensor parallel) are written row by row there, which is slower. Both are
            resumed by any number of ranks; optimizers are sharded in both.
        max_shard_size: of a file of `layout="direct"`: bytes, or text such as `"5GB"`.
        timeout: seconds that ranks wait, while files are written, for one that does not report. One that has died on
            this machine is noticed at once.
        files: more files for `model/` (config, tokenizer, adapter config): file name -> text, bytes, or the path of a
            file to copy; `am_ckpt.hf_files` lists those of a Hugging Face folder.
        mapping: records of how the module's parameters relate to the published files (see `am_ckpt.load_hf`), stored
            for tools that export later.
        fingerprints: JSON data; loading a checkpoint that has another value under the same key is refused.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, str, int] | None = None,
        asynchronous: bool = False,
        layout: Literal["sharded", "direct"] = "sharded",
        max_shard_size: int | str = "5GB",
        timeout: float = 1800.0,
        files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
        mapping: Sequence[Mapping[str, Any]] | None = None,
        fingerprints: Mapping[str, Any] | None = None,
    ) -> None:
        if keep_best is not None and not _is_best(keep_best):
            raise ValueError(f"keep_best={keep_best!r} must be (metric name, 'min' or 'max', count of at least 1)")
        if layout not in ("sharded", "direct"):
            raise ValueError(f"layout={layout!r} must be 'sharded' or 'direct'")
        if timeout <= 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds")
        self.directory = Path(directory).absolute()
        self._keep = Keep(keep_last, keep_every, Best(*keep_best) if keep_best is not None else None)
        self._layout = layout
        self._max_shard_bytes = byte_count(max_shard_size)
        self._timeout = timeout
        self._background = Background() if asynchronous else None
        self._memory = StagingMemory()
        self._stop = threading.Event()
        self.longest_save: float | None = None
        self._began = 0.0
        # By the last load; the next save sets aside what is damaged.
        self._skipped: dict[str, Problem] = {}
        self._files = dict(files or {})
        for name in self._files:
            require_file_name(name, "files:")
            if name.endswith(".safetensors") or name.startswith("shard-") or name == INDEX:
                raise ValueError(f"files: {name!r}: weights in model/ are written from the state, not copied")
        self._mapping = [dict(record) for record in mapping] if mapping is not None else None
        self._fingerprints = dict(fingerprints or {})
        # Refused here, not at the first save after hours of training.
        json.dumps([self._mapping, self._fingerprints], allow_nan=False)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        ephemeral: bool = False,
    ) -> None:
        """Commit `state` as `step_{step:06d}`. Collective: every rank calls it.

        On return the step is durable; or, where `asynchronous`, copied: training goes on, `wait` returns when it is.

        `state["model"]` is an `nn.Module` (parameters and persistent buffers, plain or DTensor, tied ones once), or
        an adapter: an object with `state_dict()` and `load_state_dict()` of full plain tensors and
        `named_parameters()`. Its plain tensors are taken to be replicas. Ranks may hold different parts of it (stages
        of a pipeline). Values that are `torch.optim.Optimizer` are stored by parameter name. Other modules, and dicts
        of nothing but tensors, are stored in shards as the model is: averaged weights. All others are objects with
        `state_dict()`, data, numpy arrays or generators of random numbers, equal on every rank, or `PerRank`.

        `ephemeral`: deleted once a newer step is durable, unless `keep_every`, `keep_best` or a pin keeps it;
        `keep_last` does not count it.

        Saving a step that exists with the same content and ranks (a stop right after a resume) does nothing, or makes
        an ephemeral one permanent; with other content it raises `FileExistsError`. A damaged folder of that name is
        set aside as `.damaged-*`.

        Any failure on any rank (no space, I/O error, unsupported type, a rank that does not report in time, tensors
        that another thread changes meanwhile) raises the same error on every rank, leaves earlier checkpoints as they
        are and publishes nothing. `metrics` are floats such as `{"val_loss": 1.25}`.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step={step!r} must be an integer of at least 0")
        scores = self._keep.scores(metrics)
        context = f"step {step} was not saved in {self.directory}, nothing was published"
        contents = Contents()
        described = agree(context, lambda: self._collect(state, contents))
        before = versions(contents.tensors)
        plan, weights = compute(context, lambda: self._plan(contents, described))
        skipped, self._skipped = self._skipped, {n: p for n, p in self._skipped.items() if not p.is_damage}
        exists = is_there(self.directory, step, skipped, context)
        save_id = rank_zero(context, lambda: secrets.token_hex(8))
        rank, size = rank_and_size()
        metadata = file_metadata(save_id, rank, size)
        headers = weights.headers({name: metadata[name] for name in ("format", "am_ckpt_save_id")}) if weights else {}
        files = list(tensor_files(contents, plan, rank, metadata, weights, headers))
        manifest = self._manifest(step, save_id, scores, contents, described, plan, weights) if rank == 0 else {}
        manifest |= {"ephemeral": True} if ephemeral else {}
        if exists:
            found = agree(context, lambda: data_records(files, contents, rank))
            copied = self._files.keys()
            rank_zero(context, lambda: save_again(self.directory, step, manifest, found, copied, self._keep))
            return
        texts = compute(context, lambda: self._texts(contents, headers) if rank == 0 else {})
        self._stop, leases = threading.Event(), [description.lease for description in described]
        job = Job(
            self.directory, step, save_id, rank, leases, files, headers, texts, manifest, self._timeout, self._stop
        )
        self._commit(job, described, plan, before, contents)

    def load(
        self,
        state: Mapping[str, Any],
        which: int | str | os.PathLike[str] = "latest",
        *,
        verify: bool = True,
        discard_newer: bool = False,
        strict: bool = True,
    ) -> int | None:
        """Restore `state` in place and return its step, or None where the directory has no checkpoint. Collective.

        `which`: `"latest"`, `"best"` (needs `keep_best`), a step, the name of its folder, or a path. What is damaged
        raises `ValueError`, what cannot be read, tried twice, `OSError`; where the newest or best is looked for, such
        steps are skipped with a warning as long as there is another. Any of a newer release raises `ValueError`. The
        number of ranks and the layout may differ from those that saved. The newest or best is looked for again where
        another process deletes it meanwhile.

        `verify`: hold all that is read against the digests in the manifest first, divided among the ranks; a step with
        a changed byte is damaged. It reads everything once more. Without it, manifest, headers, sizes and what is no
        tensor are still checked.

        `discard_newer`: go back: once the step is restored, delete all that are newer, but none that merely could not
        be read. Without it, a `save` beside a newer step is refused.

        `strict`: the entries of `state` must be in the checkpoint, with the same names of tensors and optimizer groups;
        otherwise one `ValueError` lists the differences, and nothing has been changed. With False, entries and tensors
        that only one side has are left as they are, with a warning that names them; optimizers must match in either
        case, as must shapes, dtypes and tied weights. What of the checkpoint `state` does not name is left out.

        Modules, optimizers, generators, tensors, arrays, dicts and lists are filled in place; other data is replaced in
        `state`. Optimizers that have not stepped yet get their state as torch would have laid it out, and keep what
        their own process chose for speed (`fused`, `foreach`, `capturable`).
        """
        self.wait()
        lost: Exception | None = None
        while True:
            choice = choose(self.directory, which, self._keep.best, _sections(state), verify=verify)
            path, self._skipped = choice.path, choice.skipped
            if path is None:
                if lost is not None:
                    raise lost
                return None
            warn_of_skipped(choice)
            if discard_newer:
                rank_zero(f"{path} was not loaded", partial(require_disposable, self.directory, path, choice.unread))
            try:
                step = restore(path, state, self._fingerprints, strict=strict)
            except (ValueError, OSError) as error:
                if not is_searched(which) or not rank_zero(f"{path} was not loaded", partial(was_deleted, path)):
                    raise
                lost = error
                continue
            if discard_newer:
                rank_zero(f"step {step} is loaded", partial(discard_newer_steps, self.directory, step))
            return step

    def digest(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank would save of `state`, in a line: `tensors`, `bytes` and `xxh3_128`. Collective.

        Of names, places in the whole tensors, and bytes, with the other state: equal before a save and after the load
        of it by as many ranks in the same layout, so a run can log what it has restored. Reads all of the memory.
        """
        contents = Contents()
        described = agree("the state has no digest", lambda: collect(state, contents))[rank_and_size()[0]]
        return contents_digest(contents, described)

    def wait(self) -> None:
        """Return when every save is durable; raise the error of one that is not. Every rank calls it.

        At once unless `asynchronous`: `save` itself returns only then.
        """
        if self._background is not None:
            self._background.wait()

    def flush(self, deadline: float) -> bool:
        """Give the save that is under way `deadline` more seconds: True once it is durable, or if there is none.

        Otherwise the save is given up on all ranks and False is returned: the step is not there, or, if rank 0 was
        just about to publish it, complete. For processes that are about to be stopped. Every rank calls it; other
        errors are raised as by `wait`.
        """
        if self._background is None:
            return True
        try:
            if self._background.wait(deadline):
                return True
            self._stop.set()
            # What cannot be interrupted, an fsync above all, may take longer than the caller has.
            return self._background.wait(1.0)
        except TimeoutError:
            return False

    @property
    def is_saving(self) -> bool:
        """Whether a save of this rank is under way in the background."""
        return self._background is not None and self._background.is_busy

    def make_permanent(self, step: int) -> None:
        """Make `step`, if it was saved as ephemeral, one that is not; delete what retention no longer keeps.

        Every rank calls it. Raises `ValueError` where the step is not there, or damaged.
        """
        self.wait()

        def change() -> None:
            make_permanent(self.directory, step, {})
            tidy(self.directory, self._keep, step)

        rank_zero(f"step {step} was not made permanent", change)

    def pin(self, step: int) -> None:
        """Keep `step` from being deleted until `unpin`: creates the empty file `step_000100.pin`."""
        if not (self.directory / step_name(step)).is_dir():
            there = ", ".join(entry.name for _, entry in steps(self.directory)[:10]) or "none"
            raise FileNotFoundError(f"step {step} cannot be pinned; steps in {self.directory}: {there}")
        rank_zero(f"step {step} was not pinned", lambda: pin_path(self.directory, step).touch())

    def unpin(self, step: int) -> None:
        """Let retention delete `step` again."""
        rank_zero(f"step {step} was not unpinned", lambda: pin_path(self.directory, step).unlink(missing_ok=True))

    # What follows runs inside the agreed steps of save and load; methods that touch the directory run on rank 0 alone.

    def _collect(self, state: Mapping[str, Any], contents: Contents) -> Description:
        # The save before ends first, and its error is the answer to this call, on all ranks.
        self.wait()
        self._began = time.monotonic()
        return collect(state, contents)

    def _commit(self, job: Job, described: list[Description], plan: Plan, before: Versions, contents: Contents) -> None:
        try:
            job = compute(job.not_saved, lambda: self._prepare(job, described, plan, before, contents))
        except BaseException:
            if job.rank == 0:
                discard(job.staging)
            raise
        remaining, began = partial(tidy, self.directory, self._keep, job.step), self._began

        def write(unchanged: Callable[[], None]) -> None:
            run(job, unchanged, remaining)
            self.longest_save = max(self.longest_save or 0.0, time.monotonic() - began)

        if self._background is not None:
            self._background.start(partial(write, lambda: None))
        else:
            write(partial(require_unchanged, before, contents.tensors))

    def _prepare(self, job: Job, described: list[Description], plan: Plan, before: Versions, contents: Contents) -> Job:
        """Make room for the step; where it is saved in the background, return the job with copies of its tensors."""
        if job.rank == 0:
            planned = described[0].state_bytes
            for held in plan.merged.values():
                planned += sum(element_count(item.shape) * ITEM_BYTES[item.dtype] for item in held.values())
            planned += sum(map(len, job.texts.values()))
            # Headers, manifest and folder entries.
            planned += 2**16 * (1 + job.size) + 512 * sum(len(held) for held in plan.merged.values())
            stage(job, planned)
        if self._background is None:
            return job
        copies = iter(self._memory.copy([tensor for file in job.files for tensor in file.tensors.values()]))
        files = [file.copied(copies) for file in job.files]
        require_unchanged(before, contents.tensors)
        return replace(job, files=files)

    def _plan(self, contents: Contents, described: list[Description]) -> tuple[Plan, WeightFiles | None]:
        """What every rank writes, computed alike on all of them, and the files that all write the model to together."""
        join_optimizers(contents, described)
        join_extra_states(contents, described)
        join_per_rank(contents, described)
        plan = make_plan(described)
        if contents.adapter is None:
            require_mapped(self._mapping, plan.merged["model"])
        if self._layout != "direct" or not plan.merged["model"]:
            return plan, None
        require_one_machine([description.machine for description in described])
        return plan, WeightFiles(plan.merged["model"], self._mapping, self._max_shard_bytes)

    def _texts(self, contents: Contents, headers: Mapping[str, Header]) -> dict[str, bytes]:
        """The files of the step that hold no tensors."""
        texts = {f"state/{entry}.json": text for entry, (text, _) in contents.state.items()}
        if len(headers) > 1:
            texts[f"model/{INDEX}"] = weight_index(headers)
        return texts | {f"model/{name}": file_bytes(source) for name, source in self._files.items()}

    def _manifest(
        self,
        step: int,
        save_id: str,
        scores: dict[str, float],
        contents: Contents,
        described: list[Description],
        plan: Plan,
        weights: WeightFiles | None,
    ) -> dict[str, Any]:
        tensors = {
            section: {name: {"dtype": held.dtype, "shape": list(held.shape)} for name, held in named.items()}
            for section, named in plan.merged.items()
        }
        mapped: dict[str, Any] = {"mapping": self._mapping}
        if weights is not None and self._mapping:
            mapped = {"mapping": None, "published": {"mapping": self._mapping, "parameters": tensors["model"]}}
            tensors["model"] = {
                name: {"dtype": dtype, "shape": list(shape)}
                for group in weights.files.values()
                for name, (dtype, shape) in group.items()
            }
        own = {
            **mapped,
            "axes": {name: size for description in described for name, size in description.axes.items()},
            # JSON has no NaN; float() reads both forms.
            "metrics": {name: value if math.isfinite(value) else str(value) for name, value in scores.items()},
            "fingerprints": self._fingerprints,
            "model": "module" if contents.adapter is None else "adapter",
            "aliases": {alias: name for description in described for alias, name in description.aliases.items()},
            "optimizers": list(contents.optimizers),
            "state": sorted(contents.state),
        }
        return new_manifest(step, save_id, len(described), tensors, own)


def _sections(state: Mapping[str, Any]) -> set[str]:
    """The parts of a step that `state` is loaded from."""
    return {"optim" if isinstance(value, Optimizer) else entry for entry, value in state.items()}


def _is_best(value: Any) -> bool:
    fits = isinstance(value, tuple | list) and len(value) == 3
    return fits and isinstance(value[0], str) and value[1] in ("min", "max") and type(value[2]) is int and value[2] > 0

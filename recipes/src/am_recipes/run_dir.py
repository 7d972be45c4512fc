"""The directory of a run: whose it is, what it already holds, where a run goes on, what to do next."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

import am_ckpt
from am_recipes import lock, sections, shared, trackers
from am_recipes.run_config import RunConfig, identity_difference
from am_recipes.sinks import files, record

# How transformers.pipeline asks an exported model.
CHAT = (
    """("text-generation", "{export}")([{{"role": "user", "content": "Hello!"}}])[0]["generated_text"][-1]["content"]"""
)
TEXT = '("text-generation", "{export}")("The", do_sample=True, max_new_tokens=60)[0]["generated_text"]'


# What may lie in a directory that holds no run yet, beside hidden files: what an attempt that never began has left.
_NO_RUN = re.compile(rf"\..*|{re.escape(lock.NAME)}|error(\.rank\d+)?\.txt")

# More than config.yaml, run.json and the first rows of metrics.jsonl take.
_FIRST_BYTES = 2**18
Outcome = TypeVar("Outcome")


@contextlib.contextmanager
def claim(config: RunConfig) -> Iterator[bool]:
    """Own the run directory while entered; whether the very run that `config` describes has finished there.

    Every rank enters it before anything is loaded or written, and gets the same answer, or the same error: Refused
    where another process has the directory, or it holds another run (with the keys that differ) or files of somebody
    else, or is not the same one on every rank; NotADirectoryError or PermissionError where the run could not write.
    What ends before its first launch is recorded in run.json leaves no trace.
    """
    with contextlib.ExitStack() as stack:
        finished, claimed = _on_rank_zero(lambda: (_take(config, stack), shared.claim_of(config)))
        with config.at("run_dir"):
            shared.require_shared(config, claimed)
        yield finished


def _on_rank_zero(function: Callable[[], Outcome]) -> Outcome:
    """What `function` returns or raises on rank 0, on every rank."""
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [function()]
        except (ValueError, OSError) as error:
            answer = [error]
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    result: Outcome = answer[0]
    return result


def _take(config: RunConfig, stack: contextlib.ExitStack) -> bool:
    require_usable(config)
    stack.enter_context(lock.held(config.run_dir))
    # Once more: it may have become another run's meanwhile.
    finished = require_usable(config)
    if not finished:
        _require_room(config.run_dir)
    if finished:
        print(f"{config.run_dir} holds this run, finished. Remove it or choose another run_dir to train again.")
        trackers.deliver_rest(config)
    else:
        trackers.require_reachable(config)
    return finished


def _require_room(run_dir: Path) -> None:
    """Find out before anything is loaded that there is no room for what a run writes first: its config and record.

    By writing as much: a quota is not in what a file system says is free. How much a checkpoint needs, only the model
    tells; what is missing for one is said at its save, and leaves those before.
    """
    room = run_dir / ".room"
    files.replace(room, [bytes(_FIRST_BYTES)])
    room.unlink()


def _require_no_strangers(run_dir: Path) -> None:
    """Refuse a folder of somebody else's files. Checkpoints without a record are a run's, and say of which."""
    if (run_dir / record.NAME).exists() or not run_dir.exists() or any((run_dir / "checkpoints").glob("step_*")):
        return
    others = sorted(path.name for path in run_dir.iterdir() if not _NO_RUN.fullmatch(path.name))
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise lock.Refused(
            f"run_dir={run_dir} holds {shown} and no run (no {record.NAME}); a run would write among them: choose a "
            "folder that is new or empty"
        )


def require_usable(config: RunConfig) -> bool:
    """Refuse a directory that the run cannot write, or that holds another run or other files; whether this very run has
    finished there. Leaves nothing behind.
    """
    with config.at("run_dir"):
        _require_writable(config.run_dir)
        _require_no_strangers(config.run_dir)
        return already_finished(config.run_dir, config.identity(), config.goal(), config.ending())


def _require_writable(run_dir: Path) -> None:
    """Find out before anything is loaded, not at the first save, that a run cannot write; leaves nothing behind."""
    for folder in (run_dir / "checkpoints", run_dir / "export"):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(
                f"run_dir={run_dir} needs the folder {folder}, but {existing} is a file; remove it or choose another "
                "run_dir"
            )
        if not (os.access(existing, os.W_OK | os.X_OK) and _takes_folders(existing, folder)):
            raise PermissionError(
                f"run_dir={run_dir} needs the folder {folder}, and {existing} cannot be written by this user or is "
                "read-only; choose another run_dir"
            )


def _takes_folders(existing: Path, folder: Path) -> bool:
    """Whether the first folder on the way from `existing` to `folder` can be made: root is told that /proc is writable.

    A run's own directory is not touched. A full disk is left to the first save, which says what it needs.
    """
    missing = [path for path in (folder.absolute(), *folder.absolute().parents) if path.is_relative_to(existing)]
    if len(missing) < 3:
        return True
    try:
        missing[-2].mkdir()
    except FileExistsError:
        # Another run makes it at the same time.
        return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        missing[-2].rmdir()
    return True


def already_finished(
    run_dir: Path, identity: Mapping[str, Any], goal: Mapping[str, Any], ending: Mapping[str, Any]
) -> bool:
    """Refuse a directory that holds another run; say whether this very run has already finished there.

    `identity`: what makes two runs the same run, as nested JSON values. `goal`: how long it was asked to train.
    `ending`: what else it was asked to end with; another one is made from the checkpoints, so it needs them.

    Raises Refused with the keys that differ and their old and new values, ValueError where run.json is damaged.
    """
    if not (run_dir / record.NAME).exists():
        return False
    recorded = record.load(run_dir)
    old, new = recorded.identity, json.loads(json.dumps(identity))
    different = identity_difference(old, new)
    if different:
        lines = [f"  {key}: {_lookup(old, key)!r} there, {_lookup(new, key)!r} now" for key in different]
        raise lock.Refused(
            f"{run_dir} holds a different run:\n" + "\n".join(lines) + "\n"
            "Give this one its own run_dir, remove that directory, or restore these values to continue it."
            + _on_lengthening(different, new)
        )
    if recorded.finished != dict(goal):
        return False
    return recorded.ending == dict(ending) or not (run_dir / "checkpoints" / "latest").exists()


def _on_lengthening(different: Sequence[str], identity: Mapping[str, Any]) -> str:
    """How to train on where another length alone, of a schedule that follows from it, makes the run another one."""
    lengths = {f"step_scheduler.{name}" for name in ("max_steps", "num_epochs", "max_tokens")}
    if not lengths.issuperset(different):
        return ""
    style = identity["lr_scheduler"]["style"]
    return (
        f" With lr_scheduler.style={style} the length decides the rate of every step, also of those that are done. To "
        "train on from the result of a finished run, start a new one in its own run_dir from its export "
        "(model.name_or_path), with lr_scheduler.warmup_steps and a lower optimizer.lr. Of a run with style constant "
        "or inverse_sqrt the length may grow: the same command continues it."
    )


def _lookup(values: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None  # type: ignore[assignment]
    return values


def identity_texts(config: RunConfig) -> dict[str, str]:
    """What identifies a run, by section, as a checkpoint keeps it: it says whose it is, also where run.json is gone."""
    return {f"config.{key}": json.dumps(value, sort_keys=True) for key, value in config.identity().items()}


def resume(
    checkpoints: am_ckpt.Checkpointer, state: Mapping[str, Any], settings: sections.Checkpoint, total_steps: int
) -> tuple[int | None, list[str]]:
    """Restore `state` from the newest checkpoint as `settings.resume` says; the step, or None for a fresh start.

    With it what there is to say, on rank 0: what was restored, and which damaged step was passed over for it.

    `auto`: where there is one; `must`: or raise FileNotFoundError; `never`: raise FileExistsError if there is
    one, since training on would mix two runs in one directory. ValueError where the checkpoint is of a later step than
    the run's last. Every rank calls it.
    """
    if settings.resume == "never":
        existing = sorted(path.name for path in checkpoints.directory.glob("step_*"))
        if existing:
            raise FileExistsError(
                f"checkpoint.resume is never, but {checkpoints.directory} holds {', '.join(existing)}; "
                "remove them, choose another run_dir, or set checkpoint.resume to auto"
            )
        return None, []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step = checkpoints.load(state, verify=settings.verify)
    facts = [f"WARNING {warning.message}" for warning in heard]
    if step is None and settings.resume == "must":
        raise FileNotFoundError(
            f"checkpoint.resume is must, but {checkpoints.directory} holds no checkpoint; "
            "check run_dir, or set checkpoint.resume to auto"
        )
    if step is not None and step > total_steps:
        raise ValueError(
            f"{checkpoints.directory} is at step {step}, and the run would end at step {total_steps}; "
            "lengthen the run in step_scheduler, or choose another run_dir"
        )
    if step is not None and torch.distributed.get_rank() == 0:
        verified = (
            "all that was read has the digests it was saved with"
            if settings.verify
            else "not verified (checkpoint.verify)"
        )
        facts.append(f"resumed from step {step} in {checkpoints.directory}: {verified}")
    return step, facts


def next_steps(run_dir: Path, ask: str | None) -> list[str]:
    """What to type after the run, where it was started; `ask` is how to ask its export, None where it has none.

    Python by its path: the shell need not have the environment that the run had.
    """
    if ask is None:
        return []
    program = f"from transformers import pipeline; print(pipeline{ask.format(export=run_dir / 'export')})"
    return ["# The exported model in stock transformers:", shlex.join([_python(), "-c", program])]


def _python() -> str:
    """This Python, from where the run was started."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)

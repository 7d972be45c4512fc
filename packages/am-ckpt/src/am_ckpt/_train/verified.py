"""Whether the bytes of a step are those that were written, by the digests in its manifest: asked by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from am_ckpt._files.step import read_manifest
from am_ckpt._files.step_digests import changed_parts, digested_parts
from am_ckpt._train.ranks import agree, rank_and_size
from am_ckpt._train.read import num_threads
from am_ckpt.errors import NewerError


def changed_files(folder: Path, sections: Collection[str]) -> list[str]:
    """What to say of everything in `sections` of a step that does not have its digest. Collective.

    The ranks divide the digests, each about 16 MiB, among them in the order of the ranks that wrote: where as many
    load, a rank checks about what it reads next.
    """
    rank, size = rank_and_size()

    def check() -> list[str]:
        parts = digested_parts([r for r in read_manifest(folder)["files"] if r["path"].partition("/")[0] in sections])
        own = parts[len(parts) * rank // size : len(parts) * (rank + 1) // size]
        return changed_parts(folder, own, num_threads())

    return [problem for problems in agree(f"{folder} was not checked", lambda: _said(check)) for problem in problems]


def _said(check: Callable[[], list[str]]) -> list[str]:
    """What `check` finds, or why it could not look."""
    try:
        return check()
    except NewerError:
        raise
    except (ValueError, OSError) as error:
        return [str(error)]

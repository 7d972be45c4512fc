"""Whether the bytes of a step are those that were written, by the digests in its manifest: asked by all ranks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from am_ckpt._files.step import read_manifest
from am_ckpt._files.step_digests import Problem, changed_parts, digested_parts, found_in
from am_ckpt._train.ranks import agree, rank_and_size
from am_ckpt._train.read import num_threads


def changed_files(folder: Path, sections: Collection[str]) -> list[Problem]:
    """What speaks against everything in `sections` of a step by its digests, damage first. Collective.

    The ranks divide the digests, each about 16 MiB, among them in the order of the ranks that wrote: where as many
    load, a rank checks about what it reads next.
    """
    rank, size = rank_and_size()

    def check() -> list[Problem]:
        parts = digested_parts([r for r in read_manifest(folder)["files"] if r["path"].partition("/")[0] in sections])
        own = parts[len(parts) * rank // size : len(parts) * (rank + 1) // size]
        return changed_parts(folder, own, num_threads())

    by_rank = agree(f"{folder} was not checked", lambda: found_in(folder, check))
    return sorted((problem for problems in by_rank for problem in problems), key=lambda problem: not problem.is_damage)

"""Whether the bytes of a step are those that were written, by the digests in its manifest."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from am_ckpt._files.block_digests import changed_blocks
from am_ckpt._files.box_digests import BoxDigests, changed_boxes
from am_ckpt._files.safetensors import Header, element_count
from am_ckpt._files.step import MANIFEST, checked_header, read_manifest
from am_ckpt._io import file_digest
from am_ckpt._train.ranks import agree, rank_and_size
from am_ckpt._train.read import num_threads
from am_ckpt.errors import NewerError

# Of a file that several ranks wrote, checked at a time.
_BUNDLE_ELEMENTS = 2**22


def changed_files(folder: Path, sections: Collection[str]) -> list[str]:
    """What to say of everything in `sections` of a step that does not have its digest. Collective.

    The ranks divide the digests, each about 16 MiB, among them in the order of the ranks that wrote: where as many
    load, a rank checks about what it reads next.
    """
    rank, size = rank_and_size()

    def check() -> list[str]:
        parts = _parts([r for r in read_manifest(folder)["files"] if r["path"].partition("/")[0] in sections])
        return _changed(folder, parts[len(parts) * rank // size : len(parts) * (rank + 1) // size])

    return [problem for problems in agree(f"{folder} was not checked", lambda: _said(check)) for problem in problems]


def require_unchanged_files(folder: Path, paths: Collection[Path]) -> None:
    """Raise `ValueError` for files of a step that do not have their digests. By this process alone."""
    records = [record for record in read_manifest(folder)["files"] if folder / record["path"] in paths]
    problems = _changed(folder, _parts(records))
    if problems:
        raise ValueError(problems[0])


def _said(check: Callable[[], list[str]]) -> list[str]:
    """What `check` finds, or why it could not look."""
    try:
        return check()
    except NewerError:
        raise
    except (ValueError, OSError) as error:
        return [str(error)]


def _changed(folder: Path, parts: Sequence[tuple[dict[str, Any], Any]]) -> list[str]:
    # Once a file: there may be many parts of one, and many tensors in it.
    headers = {
        path: checked_header(folder / path, record)
        for path, record in {record["path"]: record for record, _ in parts}.items()
        if "header_xxh3_128" in record
    }

    def problems(item: tuple[dict[str, Any], Any]) -> list[str]:
        record, part = item
        wanted = (folder / record["path"], record, part, headers.get(record["path"]))
        try:
            return _problems(*wanted)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # The server has forgotten the handle, not the file: opened again, once.
            return _problems(*wanted)

    with ThreadPoolExecutor(num_threads()) as threads:
        return [problem for found in threads.map(problems, parts) for problem in found]


def _parts(records: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], Any]]:
    """`records` of files, each with what of it is held against its digest at a time."""
    parts: list[tuple[dict[str, Any], Any]] = []
    for record in sorted(records, key=lambda record: (record["rank"], record["path"])):
        if "boxes_xxh3_128" in record:
            parts += [(record, boxes) for boxes in _bundles(record["boxes_xxh3_128"])]
        elif "blocks_xxh3_128" in record:
            parts += [(record, number) for number in range(len(record["blocks_xxh3_128"]))]
        else:
            parts.append((record, None))
    return parts


def _bundles(boxes: BoxDigests) -> Iterator[dict[str, list[list[Any]]]]:
    """Boxes of a file, some megabytes at a time."""
    bundle: dict[str, list[list[Any]]] = {}
    count = 0
    for name, rows in boxes.items():
        for row in rows:
            bundle.setdefault(name, []).append(row)
            count += element_count(row[1])
            if count >= _BUNDLE_ELEMENTS:
                yield bundle
                bundle, count = {}, 0
    if bundle:
        yield bundle


def _problems(path: Path, record: dict[str, Any], part: Any, header: Header | None) -> list[str]:
    if header is None:
        same = file_digest(path) == record["xxh3_128"]
        return [] if same else [f"{path} is damaged: its digest is not the one in {MANIFEST}; take another step"]
    if "boxes_xxh3_128" in record:
        return list(changed_boxes(path, header, part))
    return list(changed_blocks(path, header, record["blocks_xxh3_128"], [part]))

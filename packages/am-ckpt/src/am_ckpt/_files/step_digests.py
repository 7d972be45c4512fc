"""What of a step does not have its digests: for all that reads one, with torch or without."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from am_ckpt._files.block_digests import changed_blocks
from am_ckpt._files.box_digests import BoxDigests, changed_boxes
from am_ckpt._files.safetensors import Header, element_count
from am_ckpt._files.step import MANIFEST, checked_header, read_manifest
from am_ckpt._io import file_digest

# Of a file that several ranks wrote, checked at a time.
_BUNDLE_ELEMENTS = 2**22


def require_unchanged_files(folder: Path, paths: Collection[Path], num_threads: int) -> None:
    """Raise `ValueError` for the first of the files `paths` of a step that does not have its digests."""
    records = [record for record in read_manifest(folder)["files"] if folder / record["path"] in paths]
    problems = changed_parts(folder, digested_parts(records), num_threads)
    if problems:
        raise ValueError(problems[0])


def changed_parts(folder: Path, parts: Sequence[tuple[dict[str, Any], Any]], num_threads: int) -> list[str]:
    """What to say of those of `parts` that do not have their digests."""
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

    with ThreadPoolExecutor(num_threads) as threads:
        return [problem for found in threads.map(problems, parts) for problem in found]


def digested_parts(records: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], Any]]:
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

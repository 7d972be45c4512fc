"""What speaks against the bytes of a step, by the digests in its manifest: for all who read one. Without torch."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from am_ckpt._files.block_digests import changed_blocks
from am_ckpt._files.box_digests import BoxDigests, changed_boxes, require_digested
from am_ckpt._files.safetensors import Header, element_count
from am_ckpt._files.step import MANIFEST, checked_header, read_manifest
from am_ckpt._io import file_digest
from am_ckpt.errors import NewerError

# Of a file that several ranks wrote, checked at a time.
_BUNDLE_ELEMENTS = 2**22

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What speaks against a step: its bytes, or with `errno` the system, which did not give them and may yet do so."""

    text: str
    errno: int | None = None

    @property
    def is_damage(self) -> bool:
        """Whether bytes are not those that were written, as far as can be known."""
        return self.errno is None

    def error(self, context: str = "") -> Exception:
        """What to raise: `ValueError` for damage, otherwise `OSError`; the text after `context`."""
        return ValueError(context + self.text) if self.errno is None else OSError(self.errno, context + self.text)


def require_unchanged_files(folder: Path, paths: Collection[Path], num_threads: int) -> None:
    """Raise `ValueError` for those of `paths` in a step that do not have their digests, `OSError` for unreadable ones.

    By this process alone.
    """
    records = [record for record in read_manifest(folder)["files"] if folder / record["path"] in paths]
    problems = changed_parts(folder, digested_parts(records), num_threads)
    if problems:
        raise min(problems, key=lambda problem: not problem.is_damage).error()


def found_in(folder: Path, check: Callable[[], list[Problem]]) -> list[Problem]:
    """What `check` finds in a step, or why it could not look."""
    try:
        return twice(check)
    except NewerError:
        raise
    except ValueError as error:
        return [Problem(str(error))]
    except OSError as error:
        return [Problem(f"{folder.name} could not be read: {error}", error.errno or errno.EIO)]


def twice(read: Callable[[], T]) -> T:
    """What `read` returns; once more where the system refuses, as network file systems do for a moment."""
    try:
        return read()
    except OSError:
        return read()


def changed_parts(folder: Path, parts: Sequence[tuple[dict[str, Any], Any]], num_threads: int) -> list[Problem]:
    """What speaks against `parts` of the files of a step; on `num_threads` threads."""
    # Once a file: there may be many parts of one, and many tensors in it.
    headers = {}
    for path, record in {record["path"]: record for record, _ in parts}.items():
        if "header_xxh3_128" in record:
            headers[path] = checked_header(folder / path, record)
        if "boxes_xxh3_128" in record:
            require_digested(folder / path, headers[path], record["boxes_xxh3_128"])

    def problems(item: tuple[dict[str, Any], Any]) -> list[Problem]:
        record, part = item
        # Of each part alone: what cannot be read hides no damage elsewhere, and is all that is read again.
        return found_in(folder, partial(_problems, folder / record["path"], record, part, headers.get(record["path"])))

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


def _problems(path: Path, record: dict[str, Any], part: Any, header: Header | None) -> list[Problem]:
    if header is None:
        same = file_digest(path) == record["xxh3_128"]
        said = [] if same else [f"{path} is damaged: its digest is not the one in {MANIFEST}; take another step"]
        return [*map(Problem, said)]
    if "boxes_xxh3_128" in record:
        return [*map(Problem, changed_boxes(path, header, part))]
    return [*map(Problem, changed_blocks(path, header, record["blocks_xxh3_128"], [part]))]

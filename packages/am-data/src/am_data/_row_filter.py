"""What `ChatDataset` and `VisionChatDataset` do alike: options, rows kept or refused with a reason, cuts, samples.

A masker turns one row into what its dataset keeps of it or into `Refused`; `collect` parts the two.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from am_data._messages import Format, Message, RowRefusedError, check_format, detect_format, require_columns
from am_data._render import IGNORE_INDEX
from am_data._report import Dropped, Segment, describe_dropped
from am_data._rows import FileRows, Rows, Source, columns_of
from am_data._tokens import TextExample

NUM_SAMPLES = 3
_NUM_EXAMPLE_IDS = 5


@dataclass(frozen=True)
class Refused:
    """Why a row is left out: the reason it is counted under, what is wrong with it, and both for people."""

    reason: str
    detail: str
    text: str


KeptRow = TypeVar("KeptRow")


def check_options(format: Format, on_bad_row: str, max_length: int | None, truncation: bool) -> None:
    """Raises ValueError for an option that is unknown or does not go with the others."""
    check_format(format)
    if on_bad_row not in ("drop", "raise"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; choose 'drop' or 'raise'")
    if not (max_length is None or isinstance(max_length, int)):
        raise ValueError(f"max_length={max_length!r} must be a whole number of tokens, or None for no limit")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1 token, or None for no limit")
    if truncation and max_length is None:
        raise ValueError("truncation=True needs max_length, the tokens to cut to")


def layout_of(source: Source, format: Format, rows: Rows, split: str) -> Format:
    """`format`, or that of the first row's columns; ValueError where there is no row, no row has the columns of
    `format`, or files differ in it.
    """
    if len(source) == 0:
        raise ValueError(f"0 rows were read from {_describe(rows)} (split={split!r}); give at least one")
    if format != "auto":
        require_columns(columns_of(source), format)
        return format
    if not isinstance(source, FileRows):
        return detect_format(list(source[0]))
    formats = {detect_format(list(row)): file for file, row in source.first_rows()}
    if len(formats) > 1:
        found = ", ".join(f"{name} in {file}" for name, file in formats.items())
        raise ValueError(f"the files have rows of different formats ({found}); give files of one format")
    return next(iter(formats))


def collect(
    outcomes: Iterable[KeptRow | Refused],
    source: Source,
    rows: Rows,
    on_bad_row: str,
) -> tuple[list[int], list[KeptRow], dict[str, Dropped]]:
    """Indices of the kept rows, the kept rows, and the others by reason; ValueError where none is kept."""
    dropped: dict[str, Dropped] = {}
    indices: list[int] = []
    kept: list[KeptRow] = []
    for index, outcome in enumerate(outcomes):
        if not isinstance(outcome, Refused):
            indices.append(index)
            kept.append(outcome)
            continue
        identity = row_id(source, index)
        if on_bad_row == "raise":
            raise ValueError(f"row {identity}: {outcome.text}; mend it, or pass on_bad_row='drop'")
        _note(dropped, outcome, identity)
    if not kept:
        reasons = "\n".join(describe_dropped(dropped))
        raise ValueError(f"all {len(source)} rows of {_describe(rows)} were refused:\n{reasons}")
    return indices, kept, dropped


def cut(
    ids: NDArray[np.int64], labels: NDArray[np.int64], max_length: int | None, truncation: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first `max_length` tokens; raises RowRefusedError where that is not wanted or leaves nothing to learn."""
    if max_length is None or len(ids) <= max_length:
        return ids, labels
    if not truncation:
        raise RowRefusedError("longer than max_length", f"{len(ids)} tokens, max_length={max_length}")
    ids, labels = ids[:max_length], labels[:max_length]
    # The first token of a sequence is nobody's target.
    if not (labels[1:] != IGNORE_INDEX).any():
        raise RowRefusedError("nothing under loss after truncation", f"the prompt fills max_length={max_length}")
    return ids, labels


def digest_of(messages: list[Message], tools: list[dict[str, Any]] | None, labels: NDArray[np.int64]) -> bytes:
    """16 bytes of a conversation and its targets, for the fingerprint of a dataset."""
    # Not the whole rendering: a template may write today's date, and a saved position must survive midnight.
    content = json.dumps([messages, tools, len(labels)], sort_keys=True, default=str).encode()
    targets = labels[labels != IGNORE_INDEX].tobytes()
    return hashlib.blake2b(content + targets, digest_size=16).digest()


def row_id(source: Source, index: int) -> str:
    """What reports and errors call the row: its column `id`, else its place, in its file where there are several."""
    named = source[index].get("id")
    if named is not None:
        return str(named)
    return source.place(index) if isinstance(source, FileRows) else str(index)


def _note(dropped: dict[str, Dropped], refusal: Refused, row_id: str) -> None:
    entry = dropped.setdefault(refusal.reason, Dropped(detail=refusal.detail))
    entry.count += 1
    if len(entry.examples) < _NUM_EXAMPLE_IDS:
        entry.examples.append(row_id)


def ends_of(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the last token of each turn under loss, of a rendering that is not cut."""
    supervised = labels != IGNORE_INDEX
    return np.flatnonzero(supervised & ~np.append(supervised[1:], False))


def segments(example: TextExample, decode: Callable[[NDArray[np.int64]], str]) -> list[Segment]:
    """The decoded example, cut where its loss mask changes; for the samples of a report."""
    supervised = example["labels"] != IGNORE_INDEX
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    return [
        (decode(example["input_ids"][start:end]), bool(supervised[start])) for start, end in itertools.pairwise(edges)
    ]


def _describe(rows: Rows) -> str:
    return repr(str(rows)) if isinstance(rows, str) or not isinstance(rows, list) else "the list"

"""Conversations as token ids with a mask that is proven row by row, and a report of what was left out."""

import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from am_data._messages import Format, Message, RowRefusedError, detect_format, normalise
from am_data._render import IGNORE_INDEX, Renderer, TrainOn
from am_data._report import DatasetReport, Dropped, Segment, describe_dropped
from am_data._rows import Row, Rows, read_rows
from am_data._tokens import Example, TokenDataset

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_FORMATS = ("auto", "messages", "alpaca", "sharegpt", "prompt_completion")
NUM_SAMPLES = 3
_NUM_EXAMPLE_IDS = 5


class ChatDataset:
    """A map-style dataset of conversations: `dataset[i]` is `{"input_ids": int64 [S], "labels": int64 [S]}`.

    `rows`: a JSON, JSONL, Parquet, CSV or Arrow file, a folder, a hub id (`name` its configuration), a
    `datasets.Dataset` or a list of dicts. `format`: "messages" (role and content, `tools` column optional), "sharegpt"
    (`conversations` of from and value), "alpaca" (instruction, input, output), "prompt_completion", or "auto" by the
    columns. `chat_template` and `chat_template_kwargs` override the tokenizer's template and reach it as variables.

    Labels are not shifted and are -100 but for what the model must write (`render_and_mask` says what that is):
    every assistant turn, or the last one with `train_on="last"`. A row longer than `max_length` tokens is refused, or
    cut at the end with `truncation=True`; it is refused too where the cut leaves nothing under loss.

    A refused row is left out and counted in `report` (`on_bad_row="drop"`) or ends the build with a ValueError that
    names it ("raise"). ValueError also where no row is left. Every rank reads all rows, with `num_proc` processes (more
    than one pay from some ten thousand rows on; they start anew, so a script needs `if __name__ == "__main__":`).
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        split: str = "train",
        format: Format = "auto",
        max_length: int | None = None,
        truncation: bool = False,
        train_on: TrainOn = "assistant",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_bad_row: Literal["drop", "raise"] = "drop",
        name: str | None = None,
        num_proc: int = 1,
    ) -> None:
        check_options(format, on_bad_row, max_length, truncation)
        if num_proc < 1:
            raise ValueError(f"num_proc={num_proc} must be at least 1 process")
        renderer = Renderer(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        source = read_rows(rows, split=split, name=name)
        layout = layout_of(source, format, rows, split)
        masker = _Masker(renderer, layout, train_on, max_length, truncation)
        _, kept, dropped = collect(_outcomes(masker, source, num_proc), source, rows, on_bad_row)
        fingerprint = hashlib.blake2b(b"".join(row.digest for row in kept), digest_size=16).hexdigest()
        self._tokens = TokenDataset((row.example for row in kept), fingerprint=fingerprint)
        self._report = DatasetReport(
            rows_read=len(source),
            rows_kept=len(kept),
            rows_truncated=sum(row.truncated for row in kept),
            dropped=dropped,
            num_tokens=self._tokens.num_tokens,
            num_supervised_tokens=self._tokens.num_supervised_tokens,
            samples=[segments(row.example, tokenizer.decode) for row in kept[:NUM_SAMPLES]],
        )

    @property
    def report(self) -> DatasetReport:
        """Rows read, kept and dropped with reasons, token counts, and three samples that mark what is under loss."""
        return self._report

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each conversation, int64 `[num_rows]`."""
        return self._tokens.lengths

    @property
    def fingerprint(self) -> str:
        """Equal for equal conversations, mask and length limit."""
        return self._tokens.fingerprint

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Example:
        return self._tokens[index]


@dataclass(frozen=True)
class _Kept:
    example: Example
    truncated: bool
    digest: bytes


@dataclass(frozen=True)
class Refused:
    reason: str
    detail: str
    text: str


KeptRow = TypeVar("KeptRow")


@dataclass(frozen=True)
class _Masker:
    """One row to its tokens and mask; travels to worker processes."""

    renderer: Renderer
    layout: Format
    train_on: TrainOn
    max_length: int | None
    truncation: bool

    def __call__(self, row: Row) -> _Kept | Refused:
        try:
            messages, tools = normalise(row, self.layout)
            ids, labels = self.renderer.mask(messages, tools=tools, train_on=self.train_on)
            full_length = len(ids)
            ids, labels = cut(ids, labels, self.max_length, self.truncation)
        except RowRefusedError as refusal:
            return Refused(refusal.reason, refusal.detail, str(refusal))
        digest = digest_of(messages, tools, labels)
        return _Kept({"input_ids": ids, "labels": labels}, len(ids) < full_length, digest)


def check_options(format: Format, on_bad_row: str, max_length: int | None, truncation: bool) -> None:
    if format not in _FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(_FORMATS)}")
    if on_bad_row not in ("drop", "raise"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; choose 'drop' or 'raise'")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1 token, or None for no limit")
    if truncation and max_length is None:
        raise ValueError("truncation=True needs max_length, the tokens to cut to")


def layout_of(source: "Sequence[Row] | datasets.Dataset", format: Format, rows: Rows, split: str) -> Format:
    """`format`, or that of the first row's columns; ValueError where there is no row."""
    if len(source) == 0:
        raise ValueError(f"0 rows were read from {_describe(rows)} (split={split!r}); give at least one")
    return detect_format(list(source[0])) if format == "auto" else format


def collect(
    outcomes: Iterable[KeptRow | Refused],
    source: "Sequence[Row] | datasets.Dataset",
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
        identity = row_id(source[index], index)
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
    # Not the whole rendering: a template may write today's date, and a saved position must survive midnight.
    content = json.dumps([messages, tools, len(labels)], sort_keys=True, default=str).encode()
    targets = labels[labels != IGNORE_INDEX].tobytes()
    return hashlib.blake2b(content + targets, digest_size=16).digest()


def _outcomes(masker: _Masker, source: "Sequence[Row] | datasets.Dataset", num_proc: int) -> Iterator[_Kept | Refused]:
    if num_proc == 1:
        yield from map(masker, source)
        return
    # Not forked: tokenizers hold threads, which do not survive a fork.
    with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(masker, source, chunksize=256)


def row_id(row: Row, index: int) -> str:
    return str(row["id"]) if row.get("id") is not None else str(index)


def _note(dropped: dict[str, Dropped], refusal: Refused, row_id: str) -> None:
    entry = dropped.setdefault(refusal.reason, Dropped(detail=refusal.detail))
    entry.count += 1
    if len(entry.examples) < _NUM_EXAMPLE_IDS:
        entry.examples.append(row_id)


def segments(example: Example, decode: Callable[[NDArray[np.int64]], str]) -> list[Segment]:
    supervised = example["labels"] != IGNORE_INDEX
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    return [
        (decode(example["input_ids"][start:end]), bool(supervised[start])) for start, end in itertools.pairwise(edges)
    ]


def _describe(rows: Rows) -> str:
    return repr(str(rows)) if isinstance(rows, str) or not isinstance(rows, list) else "the list"

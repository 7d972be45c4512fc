"""Conversations as token ids with a mask that is proven row by row, and a report of what was left out."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from am_data._messages import Format, RowRefusedError, detect_format, normalise
from am_data._render import IGNORE_INDEX, Renderer, TrainOn
from am_data._report import DatasetReport, Dropped, Segment, describe_dropped
from am_data._rows import Row, Rows, read_rows
from am_data._tokens import Example, TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMATS = ("auto", "messages", "alpaca", "sharegpt", "prompt_completion")
_NUM_SAMPLES = 3
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
    names it ("raise"). ValueError also where no row is left. Every rank reads all rows.
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
    ) -> None:
        if format not in _FORMATS:
            raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(_FORMATS)}")
        if on_bad_row not in ("drop", "raise"):
            raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; choose 'drop' or 'raise'")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1 token, or None for no limit")
        if truncation and max_length is None:
            raise ValueError("truncation=True needs max_length, the tokens to cut to")
        renderer = Renderer(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        source = read_rows(rows, split=split, name=name)
        if len(source) == 0:
            raise ValueError(f"0 rows were read from {_describe(rows)} (split={split!r}); give at least one")
        layout = detect_format(list(source[0])) if format == "auto" else format

        dropped: dict[str, Dropped] = {}
        truncated = 0
        content = hashlib.blake2b(digest_size=16)

        def examples() -> Iterator[Example]:
            nonlocal truncated
            for index, row in enumerate(source):
                try:
                    messages, tools = normalise(row, layout)
                    ids, labels = renderer.mask(messages, tools=tools, train_on=train_on)
                    full_length = len(ids)
                    ids, labels = _cut(ids, labels, max_length, truncation)
                except RowRefusedError as refusal:
                    row_id = _row_id(row, index)
                    if on_bad_row == "raise":
                        raise ValueError(f"row {row_id}: {refusal}; mend it, or pass on_bad_row='drop'") from refusal
                    _note(dropped, refusal, row_id)
                    continue
                truncated += len(ids) < full_length
                # Not the whole rendering: a template may write today's date, and a position must survive midnight.
                content.update(json.dumps([messages, tools, len(ids)], sort_keys=True, default=str).encode())
                content.update(labels[labels != IGNORE_INDEX].tobytes())
                yield {"input_ids": ids, "labels": labels}

        kept = list(examples())
        if not kept:
            reasons = "\n".join(describe_dropped(dropped))
            raise ValueError(f"all {len(source)} rows of {_describe(rows)} were refused:\n{reasons}")
        self._tokens = TokenDataset(kept, fingerprint=content.hexdigest())
        self._report = DatasetReport(
            rows_read=len(source),
            rows_kept=len(kept),
            rows_truncated=truncated,
            dropped=dropped,
            num_tokens=self._tokens.num_tokens,
            num_supervised_tokens=self._tokens.num_supervised_tokens,
            samples=[_segments(tokenizer, example) for example in kept[:_NUM_SAMPLES]],
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


def _cut(
    ids: NDArray[np.int64], labels: NDArray[np.int64], max_length: int | None, truncation: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if max_length is not None and len(ids) > max_length:
        if not truncation:
            raise RowRefusedError("longer than max_length", f"{len(ids)} tokens, max_length={max_length}")
        ids, labels = ids[:max_length], labels[:max_length]
        if not (labels != IGNORE_INDEX).any():
            raise RowRefusedError("nothing under loss after truncation", f"the prompt fills max_length={max_length}")
    return ids, labels


def _row_id(row: Row, index: int) -> str:
    return str(row["id"]) if row.get("id") is not None else str(index)


def _note(dropped: dict[str, Dropped], refusal: RowRefusedError, row_id: str) -> None:
    entry = dropped.setdefault(refusal.reason, Dropped(detail=refusal.detail))
    entry.count += 1
    if len(entry.examples) < _NUM_EXAMPLE_IDS:
        entry.examples.append(row_id)


def _segments(tokenizer: "PreTrainedTokenizerBase", example: Example) -> list[Segment]:
    supervised = example["labels"] != IGNORE_INDEX
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    return [
        (tokenizer.decode(example["input_ids"][start:end]), bool(supervised[start]))
        for start, end in itertools.pairwise(edges)
    ]


def _describe(rows: Rows) -> str:
    return repr(str(rows)) if isinstance(rows, str) or not isinstance(rows, list) else "the list"

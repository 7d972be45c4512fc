"""Conversations as token ids with a mask that is proven row by row, and a report of what was left out."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from am_data._messages import Format, Row, RowRefusedError, ignored_columns, normalise
from am_data._render import Renderer, TrainOn
from am_data._report import DatasetReport
from am_data._row_filter import (
    NUM_SAMPLES,
    Refused,
    check_options,
    collect,
    cut,
    digest_of,
    ends_of,
    layout_of,
    segments,
)
from am_data._rows import Rows, Source, columns_of, read_rows
from am_data._tokens import TextExample, TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatDataset:
    """A map-style dataset of conversations: `dataset[i]` is `{"input_ids": int64 [S], "labels": int64 [S]}`.

    `path`: a JSON, JSONL, Parquet, CSV or Arrow file, compressed or not; a pattern, or a list of files and patterns; a
    folder; a hub id (`name` its configuration); or rows in memory: a `datasets.Dataset` or a list of dicts. `format`:
    "messages" (role and content), "sharegpt" (`conversations` of from and value), "alpaca" (instruction, input,
    output), "prompt_completion", or "auto" by the columns; columns `system` and `tools` are read in each.
    `chat_template` and `chat_template_kwargs` override the tokenizer's template and reach it as variables.

    Labels are not shifted and are -100 but for what the model must write (`render_and_mask` says what that is):
    every assistant turn, or the last one with `train_on="last"`, but for those with `"weight": 0`. A row longer than
    `max_length` tokens is refused, or cut at the end with `truncation=True`; it is refused too where the cut leaves
    nothing under loss.

    A refused row is left out and counted in `report` (`on_bad_row="drop"`) or ends the build with a ValueError that
    names it ("raise"). ValueError also where no row is left. Every rank reads all rows, with `num_proc` processes (more
    than one pay from some ten thousand rows on; they start anew, so a script needs `if __name__ == "__main__":`).
    """

    def __init__(
        self,
        path: Rows,
        tokenizer: PreTrainedTokenizerBase,
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
        source = read_rows(path, split=split, name=name)
        layout = layout_of(source, format, path, split)
        masker = _Masker(renderer, layout, train_on, max_length, truncation)
        _, kept, dropped = collect(_outcomes(masker, source, num_proc), source, path, on_bad_row)
        fingerprint = hashlib.blake2b(b"".join(row.digest for row in kept), digest_size=16).hexdigest()
        self._tokens = TokenDataset((row.example for row in kept), fingerprint=fingerprint)
        self._report = DatasetReport(
            rows_read=len(source),
            rows_kept=len(kept),
            rows_truncated=sum(row.truncated for row in kept),
            dropped=dropped,
            num_tokens=self._tokens.num_tokens,
            num_supervised_tokens=self._tokens.num_supervised_tokens,
            samples=[segments(row.example, renderer.decode) for row in kept[:NUM_SAMPLES]],
            ignored_columns=ignored_columns(columns_of(source), layout),
        )
        self._renderer = renderer
        self._end_token_ids = tuple(sorted(frozenset().union(*(row.ends for row in kept))))

    @property
    def report(self) -> DatasetReport:
        """Rows read, kept and dropped with reasons, token counts, and three samples that mark what is under loss."""
        return self._report

    @property
    def chat_template(self) -> str | None:
        """The template (Jinja) that replaced the tokenizer's own; None where rows are rendered with that."""
        return self._renderer.chat_template

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The variables that the template was given."""
        return self._renderer.template_kwargs

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end the turns under loss: where a model that has learned them stops."""
        return self._end_token_ids

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

    def __getitem__(self, index: int) -> TextExample:
        return self._tokens[index]


@dataclass(frozen=True)
class _Kept:
    example: TextExample
    truncated: bool
    digest: bytes
    ends: frozenset[int]


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
            full_length, ends = len(ids), ends_of(labels)
            ids, labels = cut(ids, labels, self.max_length, self.truncation)
        except RowRefusedError as refusal:
            return Refused(refusal.reason, refusal.detail, str(refusal))
        digest = digest_of(messages, tools, labels)
        taught = frozenset(ids[ends[ends < len(ids)]].tolist())
        return _Kept({"input_ids": ids, "labels": labels}, len(ids) < full_length, digest, taught)


def _outcomes(masker: _Masker, source: Source, num_proc: int) -> Iterator[_Kept | Refused]:
    if num_proc == 1:
        yield from map(masker, source)
        return
    # Not forked: tokenizers hold threads, which do not survive a fork.
    with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(masker, source, chunksize=256)

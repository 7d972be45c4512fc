"""Examples laid out as the tensors of one forward pass, with targets that are shifted already.

Both layouts say by `document_ids` which tokens belong together (0 = padding), so there is one masking contract and no
attention mask. The shift happens here, within each document, before anybody cuts the sequence into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from am_data._checks import examples_of
from am_data._contracts import Batch, Example, Sample
from am_data._render import IGNORE_INDEX

Layout: TypeAlias = Literal["packed", "padded"]
# The tensors of a batch beside its tokens, from the examples of its rows (`VisionProcessor.join`).
Join: TypeAlias = Callable[[Sequence[Example]], Batch]

# What tokenizers return beside the ids: the layout decides it here.
_OF_THE_LAYOUT = {"attention_mask", "document_ids", "position_ids", "token_type_ids"}


def collate(
    samples: Sequence[Sample],
    *,
    layout: Layout = "packed",
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
    max_length: int | None = None,
    join: Join | None = None,
    position_ids: Callable[[Batch], torch.Tensor] | None = None,
) -> Batch:
    """One micro-batch of `samples`; a sample is an example or the list of the examples of a pack.

    Keys: `input_ids`, `position_ids` (from 0 in every document), `shift_labels` (the next token of the same document;
    -100 where there is no loss and at a document's last token, unless its `labels` are one longer than its
    `input_ids`), all int64, and `document_ids` int32, from 1 in every row, 0 for padding. A further array `x` of the
    examples, one number per label, belongs to the targets as `labels` do: it is shifted with them and becomes
    `shift_x` in its own dtype (float64: float32), 0 where a document has no target.

    No samples at all give one row of padding, at least one token, so that a rank that has run out still takes part in
    every collective.

    Args:
        layout: "packed": every document one after the other without padding, `[1, T]`. "padded": one row per sample,
            filled up at the end to the longest, `[B, S]`; the documents of a pack share its row.
        pad_to_multiple_of: rounds the tokens of a row up (context parallelism).
        max_length: fixes the tokens of a row.
        join: makes the tensors of examples that hold more than tokens: give `dataset.processor_adapter.join` for
            images, which the "padded" layout alone takes. What it returns is joined, all else is one number per label.
        position_ids: gets the finished batch and returns those that replace its own (`[B, S]`, or `[A, B, S]` for rope
            of several axes).

    Raises:
        ValueError: a row longer than `max_length`; arrays that fit neither `labels` nor `join`.
        TypeError: a sample that is no example and no list of examples.
    """
    check_layout(layout, join)
    rows = [examples_of(sample, "a sample") for sample in samples] or [[]]
    joined = _joined(rows, join)
    if layout == "packed":
        rows = [[example for examples in rows for example in examples]]
    further = _further_arrays([example for examples in rows for example in examples], set(joined))
    longest = max(1, *(sum(len(example["input_ids"]) for example in row) for row in rows))
    shape = (len(rows), _width(longest, pad_to_multiple_of, max_length))
    tensors = _laid_out(rows, further, shape, pad_token_id) | joined
    if position_ids is not None:
        tensors["position_ids"] = position_ids(tensors)
    return tensors


def _laid_out(
    rows: Sequence[Sequence[Example]], further: dict[str, np.dtype], shape: tuple[int, int], pad_token_id: int
) -> Batch:
    batch: dict[str, NDArray] = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "shift_labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        "document_ids": np.zeros(shape, dtype=np.int32),
        **{f"shift_{name}": np.zeros(shape, dtype=dtype) for name, dtype in further.items()},
    }
    for row, examples in enumerate(rows):
        begin = 0
        for document, example in enumerate(examples, start=1):
            end = begin + len(example["input_ids"])
            batch["input_ids"][row, begin:end] = example["input_ids"]
            batch["position_ids"][row, begin:end] = np.arange(end - begin)
            batch["document_ids"][row, begin:end] = document
            for name in ("labels", *further):
                targets = example[name][1:]
                batch[f"shift_{name}"][row, begin : begin + len(targets)] = targets
            begin = end
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def check_layout(layout: Layout, join: Join | None) -> None:
    """ValueError for an unknown layout, or one that cannot hold joined tensors."""
    if layout not in ("packed", "padded"):
        raise ValueError(f"layout={layout!r} is unknown; choose 'packed' or 'padded'")
    if join is not None and layout == "packed":
        raise ValueError("layout='packed' does not hold the tensors of join=; choose layout='padded'")


def _joined(rows: Sequence[Sequence[Example]], join: Join | None) -> Batch:
    if join is None:
        return {}
    if any(len(row) > 1 for row in rows):
        raise ValueError("join= takes one example a row; give the dataset itself, not its packs")
    return join([row[0] if row else {} for row in rows])


def _further_arrays(examples: Sequence[Example], joined: Iterable[str]) -> dict[str, np.dtype]:
    """Names and dtypes of what the examples hold beside tokens and labels, checked to be one number per label."""
    names = {name for example in examples for name in example} - {"input_ids", "labels", *joined}
    for example in examples:
        _check_lengths(example, names)
    return {name: _common_dtype(name, [example[name] for example in examples]) for name in sorted(names)}


def _check_lengths(example: Example, names: set[str]) -> None:
    num_tokens, num_labels = len(example["input_ids"]), len(example["labels"])
    if num_labels not in (num_tokens, num_tokens + 1):
        raise ValueError(f"an example has {num_tokens} input_ids and {num_labels} labels; give as many, or one more")
    unusable = sorted(names & _OF_THE_LAYOUT)
    if unusable:
        raise ValueError(
            f"examples hold {', '.join(unusable)}, which the layout decides (tokens attend within their document); "
            "leave them out of the examples"
        )
    missing = sorted(names - set(example))
    if missing:
        raise ValueError(
            f"an example has no {', '.join(missing)}, which others of its micro-batch have; give every example the "
            "same arrays, or pass join=dataset.processor_adapter.join for images"
        )
    for name in sorted(names):
        shape = np.shape(example[name])
        if shape != (num_labels,):
            raise ValueError(
                f"examples hold {name}; it has shape {shape} for {num_labels} labels: give one number per label, "
                "or for images pass join=dataset.processor_adapter.join"
            )


def _common_dtype(name: str, arrays: Sequence[NDArray[np.generic] | torch.Tensor]) -> np.dtype:
    dtype = np.result_type(*(np.asarray(array).dtype for array in arrays))
    if dtype.kind not in "biuf":
        raise ValueError(f"examples hold {name} of dtype {dtype}; give numbers")
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def _width(longest: int, multiple: int | None, max_length: int | None) -> int:
    if multiple is not None and multiple < 1:
        raise ValueError(f"pad_to_multiple_of={multiple} must be at least 1")
    if max_length is not None:
        if multiple is not None and max_length % multiple:
            raise ValueError(f"max_length={max_length} is not a multiple of pad_to_multiple_of={multiple}; drop one")
        if longest > max_length:
            raise ValueError(f"a row has {longest} tokens, max_length={max_length}; raise it or use smaller batches")
        return max_length
    return longest if multiple is None else -(-longest // multiple) * multiple

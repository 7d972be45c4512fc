"""Examples laid out as the tensors of one forward pass, with targets that are shifted already.

Both layouts say by `document_ids` which tokens belong together (0 = padding), so there is one masking contract and no
attention mask. The shift happens here, within each document, before anybody cuts the sequence into shards.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from am_data._render import IGNORE_INDEX
from am_data._tokens import Example

Layout: TypeAlias = Literal["packed", "padded"]
Batch: TypeAlias = dict[str, torch.Tensor]
Sample: TypeAlias = Example | list[Example]
# The tensors of a batch beside its tokens, from the examples of its rows (`VisionProcessor.join`).
Join: TypeAlias = Callable[[Sequence[dict[str, Any]]], Batch]


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

    "packed": every document one after the other without padding, `[1, T]`. "padded": one row per sample, filled up at
    the end to the longest, `[B, S]`; the documents of a pack share its row. Keys: `input_ids`, `position_ids` (from 0
    in every document), `shift_labels` (the next token of the same document; -100 where there is no loss and at a
    document's last token, unless its `labels` are one longer than its `input_ids`), all int64, and `document_ids`
    int32, from 1 in every row, 0 for padding.

    `pad_to_multiple_of` rounds the tokens of a row up (context parallelism); `max_length` fixes them. No samples at all
    give one row of padding, at least one token, so that a rank that has run out still takes part in every collective.
    `join` makes the tensors of examples that hold more than tokens: give `dataset.processor_adapter.join` for pictures,
    which the "padded" layout alone takes. `position_ids` gets the finished batch and returns those that replace its own
    (`[B, S]`, or `[A, B, S]` for rope of several axes).
    Raises ValueError for a row longer than `max_length`, and for examples with keys that nobody joins.
    """
    check_layout(layout, join)
    documents = [sample if isinstance(sample, list) else [sample] for sample in samples] or [[]]
    if layout == "packed":
        documents = [[example for sample in documents for example in sample]]
    longest = max(1, *(sum(len(example["input_ids"]) for example in row) for row in documents))
    shape = (len(documents), _width(longest, pad_to_multiple_of, max_length))
    batch: dict[str, NDArray] = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "shift_labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        "document_ids": np.zeros(shape, dtype=np.int32),
    }
    for row, examples in enumerate(documents):
        begin = 0
        for document, example in enumerate(examples, start=1):
            end = begin + len(example["input_ids"])
            batch["input_ids"][row, begin:end] = example["input_ids"]
            batch["position_ids"][row, begin:end] = np.arange(end - begin)
            targets = _targets(example)
            batch["shift_labels"][row, begin : begin + len(targets)] = targets
            batch["document_ids"][row, begin:end] = document
            begin = end
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    tensors |= _joined(documents, join)
    if position_ids is not None:
        tensors["position_ids"] = position_ids(tensors)
    return tensors


def check_layout(layout: Layout, join: Join | None) -> None:
    """ValueError for an unknown layout, or one that cannot hold joined tensors."""
    if layout not in ("packed", "padded"):
        raise ValueError(f"layout={layout!r} is unknown; choose 'packed' or 'padded'")
    if join is not None and layout == "packed":
        raise ValueError("layout='packed' does not hold the tensors of join=; choose layout='padded'")


def _joined(rows: list[list[Example]], join: Join | None) -> Batch:
    if join is not None:
        if any(len(row) > 1 for row in rows):
            raise ValueError("join= takes one example a row; give the dataset itself, not its packs")
        return join([row[0] if row else {} for row in rows])
    keys = {key for row in rows for example in row for key in example}
    unknown = sorted(keys - {"input_ids", "labels"})
    if unknown:
        raise ValueError(f"examples hold {', '.join(unknown)}; for pictures pass join=dataset.processor_adapter.join")
    return {}


def _targets(example: Example) -> NDArray[np.int64]:
    """The label of each token's next one; a last label beyond the tokens is the target of the last token."""
    num_tokens, num_labels = len(example["input_ids"]), len(example["labels"])
    if num_labels not in (num_tokens, num_tokens + 1):
        raise ValueError(f"an example has {num_tokens} input_ids and {num_labels} labels; give as many, or one more")
    return example["labels"][1:]


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

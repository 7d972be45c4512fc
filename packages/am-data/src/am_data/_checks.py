"""What a user's dataset, stream or collate function gets wrong, said before anything is trained with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from am_data._contracts import Batch, Collate, Dataset, Example, Stream
from am_data._render import IGNORE_INDEX

_DATASET_MEMBERS = ("__len__", "__getitem__", "lengths", "fingerprint")
_STREAM_MEMBERS = ("__iter__", "state_dict", "load_state_dict")
# What stacking, joining or taking the longest of nothing raises.
_COLLATE_ERRORS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def check_source(source: Dataset | Stream) -> None:
    """TypeError with the missing members for what is neither a `Dataset` nor a `Stream`."""
    if isinstance(source, type):
        raise TypeError(f"{source.__name__} is a class; give a dataset or a stream, as {source.__name__}(...) makes it")
    if any(base.__module__ == "datasets.iterable_dataset" for base in type(source).__mro__):
        raise TypeError(
            "a datasets.IterableDataset has the members of an am_data.Stream, but starts every iteration from the "
            "position that was loaded last, so a resumed run would miss rows in each later epoch; wrap it in a class "
            "that calls set_epoch, as the README of am-data shows under Stream"
        )
    if isinstance(source, Dataset | Stream):
        return
    name, members = type(source).__name__, dir(source)
    missing, of_stream = (
        ", ".join(f"`{member}`" for member in contract if member not in members)
        for contract in (_DATASET_MEMBERS, _STREAM_MEMBERS)
    )
    raise TypeError(
        f"{name} is no am_data.Dataset, it lacks {missing}, and no am_data.Stream, it lacks {of_stream}; add what is "
        "missing (`lengths`: the tokens of each sample, int64; `fingerprint`: a str, equal for equal content), or wrap "
        "tokenised examples in am_data.TokenDataset"
    )


def check_lengths(dataset: Dataset) -> NDArray[np.int64]:
    """The dataset's lengths, int64; ValueError for an empty dataset, TypeError and ValueError for unusable lengths."""
    name, samples = type(dataset).__name__, len(dataset)
    if samples == 0:
        raise ValueError(f"the dataset ({name}) is empty; a loader needs at least one sample")
    lengths = np.asarray(dataset.lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"{name}.lengths has dtype {lengths.dtype}; give the tokens of each sample as whole numbers")
    if lengths.shape != (samples,):
        raise ValueError(
            f"{name}.lengths has shape {lengths.shape} for len(dataset)={samples}; give one number per sample, the "
            f"tokens of dataset[i], shape ({samples},)"
        )
    if lengths.min() < 1:
        raise ValueError(f"{int((lengths < 1).sum())} of {name}.lengths are below 1; leave empty samples out")
    if not isinstance(dataset.fingerprint, str):
        kind = type(dataset.fingerprint).__name__
        raise TypeError(f"{name}.fingerprint is a {kind}; give a str that is equal for equal content")
    return lengths.astype(np.int64, copy=False)


def examples_of(sample: object, where: str) -> Sequence[Example]:
    """The examples of a sample; TypeError where it is neither an example nor a list of examples."""
    examples = [sample] if isinstance(sample, Mapping) else sample
    if not isinstance(examples, list | tuple) or not examples:
        what = "an empty list" if examples == [] else f"a {type(sample).__name__}"
        raise TypeError(f"{where} is {what}; give a mapping with `input_ids` and `labels`, or a list of such")
    for example in examples:
        if not isinstance(example, Mapping):
            raise TypeError(f"{where} holds a {type(example).__name__}; an example is a mapping of arrays")
        missing = " and ".join(f"`{name}`" for name in ("input_ids", "labels") if name not in example)
        if missing:
            raise TypeError(f"{where} has no {missing}, only {', '.join(map(str, example))}; add the arrays")
    return examples


def num_tokens(sample: object, where: str) -> int:
    """Tokens of all examples of a sample."""
    return sum(len(example["input_ids"]) for example in examples_of(sample, where))


def empty_batch(collate: Collate) -> Batch:
    """What `collate` makes of no samples, checked."""
    if not callable(collate):
        raise TypeError(f"collate={collate!r} is a {type(collate).__name__}; give a function of a list of samples")
    try:
        batch = collate([])
    except _COLLATE_ERRORS as error:
        error.add_note("raised by collate([]): of no samples at all, collate makes one row without targets")
        raise
    checked = check_batch(batch, "collate([])")
    num_targets = int((checked["shift_labels"] != IGNORE_INDEX).sum())
    if num_targets:
        raise ValueError(
            f"collate([]) has {num_targets} targets in shift_labels; of no samples at all it makes one row without "
            "targets (-100), for ranks that have run out of samples"
        )
    return checked


def check_batch(batch: object, where: str) -> Batch:
    """The batch as a dict; TypeError and ValueError where a forward pass or a loss would stumble over it."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where} returned a {type(batch).__name__}; return a mapping from names to tensors")
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{where} returned {name!r} as a {type(value).__name__}; every value is a tensor")
    for name in ("input_ids", "shift_labels"):
        if name not in batch:
            raise ValueError(
                f"{where} returned no {name}, only {', '.join(map(str, batch)) or 'nothing'}; a batch has input_ids "
                "[B, S] and shift_labels [B, S], the target of each position, -100 = no loss"
            )
        if batch[name].dtype != torch.int64:
            raise TypeError(f"{where} returned {name} of {batch[name].dtype}; token ids and targets are torch.int64")
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{where} returned input_ids {list(shape)}; give [B, S] with at least one row and one token")
    for name, tensor in batch.items():
        if _belongs_to_tokens(name) and shape not in (tuple(tensor.shape[:2]), tuple(tensor.shape[-2:])):
            raise ValueError(
                f"{where} returned {name} {list(tensor.shape)} against input_ids {list(shape)}; what belongs to the "
                "tokens has their [B, S]"
            )
    return dict(batch)


def _belongs_to_tokens(name: str) -> bool:
    # Rope of several axes has position_ids [A, B, S]; what else a batch holds, such as images, is the model's affair.
    return name.startswith("shift_") or name in ("document_ids", "position_ids")

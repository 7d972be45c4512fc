"""How the tensors of published files relate to a module's parameters: records of `load_hf`'s `mapping`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from am_ckpt._boxes import Box, Shape, require_exact_cover


@dataclass(frozen=True)
class Record:
    """One tensor of the files and the part of a parameter that it is: see `load_hf`."""

    file: str
    parameter: str
    box: Box
    transpose: bool

    @property
    def file_shape(self) -> Shape:
        """The shape in the file, but for dims of size one, which may be left out there."""
        return self.in_file(self.box.size)

    def in_file(self, shape: Shape) -> Shape:
        """Sizes of the parameter's dims in the order that the dims have in the file."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.transpose else shape


def whole_record(name: str, shape: Shape) -> Record:
    """The record of a tensor that is the same in the files and in the module."""
    return Record(name, name, Box((0,) * len(shape), shape), False)


def without_ones(shape: Shape) -> Shape:
    """The dims of a shape that are not of size one."""
    return tuple(size for size in shape if size != 1)


def dropped_dims(record: Record, parameter_shape: Shape) -> list[int]:
    """Dims of `file_shape` that the published tensor lacks: one index of several (experts are stored one by one)."""
    sizes = zip(record.file_shape, record.in_file(parameter_shape), strict=True)
    return [dim for dim, (size, total) in enumerate(sizes) if size == 1 and total != 1]


def output_shape(record: Record, parameter_shape: Shape) -> Shape:
    """The shape of the published tensor that is written for `record`."""
    dropped = dropped_dims(record, parameter_shape)
    return tuple(size for dim, size in enumerate(record.file_shape) if dim not in dropped)


def records_by_parameter(
    mapping: Sequence[Mapping[str, Any]] | None, shapes: Mapping[str, Shape]
) -> dict[str, list[Record]]:
    """The mapping's records of the parameters in `shapes`; `ValueError` where they do not tile a parameter."""
    records: dict[str, list[Record]] = {}
    for item in mapping or ():
        if set(item) != {"file", "parameter", "slice", "transpose"}:
            raise ValueError(f"mapping record {dict(item)!r} must have exactly file, parameter, slice and transpose")
        name = item["parameter"]
        if isinstance(name, str) and name in shapes:
            records.setdefault(name, []).append(_record(item, shapes[name]))
    for name, parts in records.items():
        require_exact_cover(f"mapping of {name!r}", shapes[name], [record.box for record in parts])
    return records


def _record(item: Mapping[str, Any], shape: Shape) -> Record:
    ranges = item["slice"] if item["slice"] is not None else [None] * len(shape)
    fits = isinstance(ranges, list | tuple) and len(ranges) == len(shape) and not (item["transpose"] and len(shape) < 2)
    if not fits or not isinstance(item["file"], str) or not all(map(_is_range, ranges, shape)):
        raise ValueError(f"mapping record {dict(item)!r} does not fit the parameter's shape {list(shape)}")
    pairs = [(0, size) if pair is None else (pair[0], pair[1]) for pair, size in zip(ranges, shape, strict=True)]
    box = Box(tuple(start for start, _ in pairs), tuple(stop - start for start, stop in pairs))
    return Record(item["file"], item["parameter"], box, bool(item["transpose"]))


def _is_range(value: Any, size: int) -> bool:
    """Whether `value` is None (all of a dim) or first and last + 1 of some of its `size` indices."""
    if value is None:
        return True
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(item) is int for item in value)
    return pair and 0 <= value[0] <= value[1] <= size

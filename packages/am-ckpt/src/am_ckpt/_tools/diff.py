"""Two checkpoints compared tensor by tensor, whatever kinds they are, a few MiB at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy

from am_ckpt._boxes import Shape
from am_ckpt._copy.mapping import Record, output_shape, records_by_parameter, whole_record
from am_ckpt._copy.values import TensorReader
from am_ckpt._dtypes import ITEM_BYTES, numbers
from am_ckpt._files.distcp import metadata_files
from am_ckpt._files.model_config import HEAD, implied_head, read_config
from am_ckpt._files.torchtitan import as_published, is_torchtitan, published_aliases
from am_ckpt._sources import Source
from am_ckpt._tools.inspect import inspect
from am_ckpt._tools.inventory import Inventory
from am_ckpt.errors import ArgumentError


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in `a` and `b`.

    `what`: `"only in a"`, `"only in b"`, `"shape"`, `"dtype"` or `"values"`. `a` and `b`: dtype and
    shape, such as `"F32 [4, 8]"`. Where shapes are equal: how many elements differ, by how much at most (infinite
    where one is NaN and the other is not) and the index of the first.
    """

    name: str
    what: str
    a: str | None = None
    b: str | None = None
    num_different: int | None = None
    max_abs_difference: float | None = None
    first: list[int] | None = None


@dataclass
class DiffReport:
    """`differences` by name; `num_equal` tensors are the same. `exit_code`: 0, or 7 where there are any.

    `notes`: what a reader should know about how they were compared.
    """

    a: str
    b: str
    kinds: tuple[str, str]
    num_equal: int = 0
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 7 if self.differences else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; an infinite difference is the text `"inf"`, since JSON has none."""
        plain = asdict(self)
        for item in plain["differences"]:
            if item["max_abs_difference"] == math.inf:
                item["max_abs_difference"] = "inf"
        return plain


@dataclass(frozen=True)
class _View:
    """A tensor under the name it is compared by: all of a source, or the part of it that a mapping names."""

    record: Record
    source: Source

    @property
    def shape(self) -> Shape:
        return output_shape(self.record, self.source.shape)

    def __str__(self) -> str:
        return f"{self.source.dtype} {list(self.shape)}"


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    tensors: str = "*",
    section: str | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
) -> DiffReport:
    """Compare the tensors of two checkpoint folders of any kind that `inspect` recognises.

    Elements are different where `|a - b| > atol + rtol * |b|`, or where one is NaN and the other is not; tensors of
    different dtypes are compared by value too. Of two steps of our own the tensors of optimizers and other entries are
    compared as well, as `optim/<name>` or `<entry>/<name>`. A mapping that only one of them carries is applied, so that
    a step compares with what it was merged to; the second name of a tensor that is tied, by config.json too, stands for
    the first. Where one alone has torchtitan's own names, it is compared as `merge` would write it, by the config.json
    of the other or its own; where there is none that describes it, by the names as they are, and `notes` say so.

    Memory: headers and less than 64 MiB. Raises as `inspect`, and `ValueError` where one is not whole.

    Args:
        tensors: a pattern of names, such as `"*.layers.0.*"`.
        section: see `inspect`; of the folders that have any.
    """
    if not (0 <= atol < math.inf and 0 <= rtol < math.inf):
        raise ArgumentError(f"atol={atol} and rtol={rtol} must be numbers that are not negative")
    with_sections = [path for path in (a, b) if section is not None and metadata_files(Path(path))]
    if section is not None and not with_sections:
        raise ArgumentError(f"section={section!r}: only .distcp folders have sections; neither {a} nor {b} is one")
    one, two = (inspect(path, section=section if path in with_sections else None) for path in (a, b))
    for inventory in (one, two):
        inventory.require_whole()
    report = DiffReport(str(one.path), str(two.path), (one.kind, two.kind))
    with (
        TensorReader(follow_symlinks=one.follow_symlinks) as reader,
        TensorReader(follow_symlinks=two.follow_symlinks) as other,
    ):
        _publish(one, two, reader, report.notes)
        _publish(two, one, other, report.notes)
        left, right = _views(one, two), _views(two, one)
        names = [name for name in (left | right) if fnmatchcase(name, tensors)]
        if not names:
            raise ArgumentError(f"no tensor of {one.path} or {two.path} has a name like {tensors!r}")
        for name in names:
            found = _compare(name, left.get(name), right.get(name), reader, other, (atol, rtol))
            if found is None:
                report.num_equal += 1
            else:
                report.differences.append(found)
    return report


def _publish(inventory: Inventory, other: Inventory, reader: TensorReader, notes: list[str]) -> None:
    """Give the tensors of torchtitan's own names those of transformers, where the other side has them."""
    if not is_torchtitan(inventory.tensors) or is_torchtitan(other.tensors) or inventory.mapping is not None:
        return
    where = other.files.get("config.json") or inventory.files.get("config.json")
    try:
        if where is None:
            raise ValueError("config.json, which says how they are published, is in neither")
        tensors = as_published(inventory.tensors, read_config(where), where, reader.located)
    except ValueError as error:
        notes.append(f"{inventory.path} has torchtitan's own names, and they were compared as they are: {error}")
        return
    inventory.sections[inventory.section] = tensors
    inventory.aliases = published_aliases(inventory.aliases)


def _views(inventory: Inventory, other: Inventory) -> dict[str, _View]:
    found: dict[str, _View] = {}
    shapes = {name: source.shape for name, source in inventory.tensors.items()}
    mapped = records_by_parameter(inventory.mapping if other.mapping is None else None, shapes)
    for name, source in inventory.tensors.items():
        for record in mapped.get(name, [whole_record(name, source.shape)]):
            found[record.file] = _View(record, source)
    aliases = dict(inventory.aliases)
    if "config.json" in inventory.files:
        embedding = implied_head(read_config(inventory.files["config.json"]), inventory.tensors)
        if embedding is not None:
            aliases.setdefault(HEAD, embedding)
    for alias, name in aliases.items():
        if alias in other.tensors and name in inventory.tensors:
            found.setdefault(alias, _View(whole_record(name, shapes[name]), inventory.tensors[name]))
    if inventory.kind == other.kind == "am-ckpt":
        for section, tensors in inventory.sections.items():
            for name, source in tensors.items() if section != inventory.section else ():
                found[f"{section}/{name}"] = _View(whole_record(name, source.shape), source)
    return found


def _compare(
    name: str,
    a: _View | None,
    b: _View | None,
    reader: TensorReader,
    other: TensorReader,
    tolerance: tuple[float, float],
) -> Difference | None:
    if a is None or b is None:
        what = "only in a" if b is None else "only in b"
        return Difference(name, what, None if a is None else str(a), None if b is None else str(b))
    if a.shape != b.shape:
        return Difference(name, "shape", str(a), str(b))
    unreadable = [view.source.dtype for view in (a, b) if view.source.dtype not in ITEM_BYTES]
    if unreadable:
        raise ValueError(f"{name!r} is {unreadable[0]}, which cannot be compared; leave it out with tensors=")
    same_dtype = a.source.dtype == b.source.dtype
    item = max(ITEM_BYTES[view.source.dtype] for view in (a, b))
    count, largest, first = 0, 0.0, None
    pairs = zip(
        reader.blocks(name, a.source, a.record, item), other.blocks(name, b.source, b.record, item), strict=True
    )
    for (box, mine), (_, theirs) in pairs:
        if same_dtype and numpy.array_equal(mine, theirs):
            continue
        difference, reference = _difference(mine.reshape(-1), a.source.dtype, theirs.reshape(-1), b.source.dtype)
        different = ~(difference <= tolerance[0] + tolerance[1] * reference)
        here = int(numpy.count_nonzero(different))
        if here and first is None:
            index = numpy.unravel_index(int(different.argmax()), box.size)
            first = [int(i) + offset for i, offset in zip(index, box.offset, strict=True)]
        count += here
        largest = max(largest, float(difference.max(initial=0)))
    if same_dtype and not count:
        return None
    return Difference(name, "values" if same_dtype else "dtype", str(a), str(b), count, largest, first)


def _difference(a: numpy.ndarray, a_dtype: str, b: numpy.ndarray, b_dtype: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`|a - b|` and `|b|` in float64; 0 where both are NaN or the same infinity, infinite where one is NaN."""
    if a_dtype == b_dtype and a_dtype[0] in "IU":
        # In float64, neighbours of 64 bits would be equal. Modulo 2 ** 64 the larger minus the smaller is exact.
        mine, theirs = numbers(a, a_dtype), numbers(b, b_dtype)
        unsigned = f"u{a.itemsize}"
        exact = numpy.maximum(mine, theirs).view(unsigned) - numpy.minimum(mine, theirs).view(unsigned)
        return exact.astype(numpy.float64), numpy.abs(theirs.astype(numpy.float64))
    mine, theirs = (_wide(numbers(bits, dtype)) for bits, dtype in ((a, a_dtype), (b, b_dtype)))
    with numpy.errstate(invalid="ignore", over="ignore"):
        difference = numpy.abs(mine - theirs)
        reference = numpy.abs(theirs)
    both_nan = numpy.isnan(mine) & numpy.isnan(theirs)
    difference[(mine == theirs) | both_nan] = 0
    difference[numpy.isnan(difference)] = numpy.inf
    # A tolerance relative to infinity or NaN would let everything pass.
    reference[~numpy.isfinite(reference)] = 0
    return difference, reference


def _wide(values: numpy.ndarray) -> numpy.ndarray:
    return values.astype(numpy.complex128 if values.dtype.kind == "c" else numpy.float64)


def show(report: DiffReport) -> Iterable[str]:
    """The report as lines for people."""
    for item in report.differences:
        if item.what.startswith("only"):
            yield f"{item.name}: {item.what} ({item.a or item.b})"
        elif item.what == "shape":
            yield f"{item.name}: {item.a} and {item.b}"
        else:
            what = item.a if item.what == "values" else f"{item.a} and {item.b}"
            place = f", first at {item.first}" if item.first is not None else ""
            count = f"{item.num_different} elements differ, at most by {item.max_abs_difference:g}{place}"
            yield f"{item.name}: {what}: {count}"
    for note in report.notes:
        yield f"note: {note}"
    yield f"{report.num_equal} tensors are equal, {len(report.differences)} are not"

"""Whether the chunks of tensors hold every element exactly once, and if not, which ranges and files are to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy

from am_ckpt._boxes import Box, describe, require_exact_cover
from am_ckpt._files.safetensors import element_count
from am_ckpt._sources import Source, by_table
from am_ckpt.errors import IncompleteError


def cover_problems(tensors: Mapping[str, Source]) -> list[ValueError]:
    """`cover_problem` of every tensor that has one."""
    found = []
    for (name, source), regular in zip(tensors.items(), _regular(list(tensors.values())), strict=True):
        problem = None if regular else cover_problem(name, source)
        if problem is not None:
            found.append(problem)
    return found


def _regular(sources: Sequence[Source]) -> list[bool]:
    """Of which tensors the chunks, sorted by offset, follow each other like the digits of a counter.

    Each chunk begins, on the first dim on which it does not begin with the one before it, where that one ends; on the
    dims before it is as long as that one; on those behind it begins at 0, and the one before it ended at the tensor's
    end. Such chunks tile the tensor: by induction over dims, those that begin alike on the first dim are as long as
    each other there and tile the rest, and these groups follow each other. Cuts along one dim are so, and grids.
    """
    result = numpy.zeros(len(sources), bool)
    for group in by_table(sources):
        shapes, owner = group.shapes, group.owner
        offset, size = group.table.offset[group.rows], group.table.size[group.rows]
        order = numpy.lexsort((*offset.T[::-1], owner))
        offset, size, owner = offset[order], size[order], owner[order]
        end = offset + size
        filled = numpy.bincount(owner, minlength=len(shapes)) > 0
        regular = filled | (shapes == 0).any(axis=1)
        last = numpy.append(owner[1:] != owner[:-1], True)[: len(owner)]
        first = numpy.roll(last, 1)
        regular[owner[first][(offset[first] != 0).any(axis=1)]] = False
        regular[owner[last][(end[last] != shapes[owner[last]]).any(axis=1)]] = False
        # From here on, of every chunk but the last and the one behind it.
        same = numpy.ones(max(len(owner) - 1, 0), bool)
        good = numpy.ones_like(same)
        for dim in range(offset.shape[1]):
            before, here = offset[:-1, dim], offset[1:, dim]
            alike = same & (before == here)
            moved = same & ~alike
            good &= ~alike | (size[:-1, dim] == size[1:, dim])
            good &= ~moved | (end[:-1, dim] == here)
            good &= same | ((here == 0) & (end[:-1, dim] == shapes[owner[:-1], dim]))
            same = alike
        regular[owner[:-1][~last[:-1] & (same | ~good)]] = False
        result[group.members] = regular
    found: list[bool] = result.tolist()
    return found


def cover_problem(name: str, source: Source) -> ValueError | None:
    """Why the chunks of a tensor do not hold every element exactly once, with ranges and files; None if they do."""
    # Empty tensors of plain files have an empty chunk.
    boxes = [chunk.box for chunk in source.chunks if chunk.box.count]
    try:
        require_exact_cover(repr(name), source.shape, boxes)
    except IncompleteError:
        hole = _first_hole(source, boxes)
        missing = element_count(source.shape) - sum(box.count for box in boxes)
        there = ", ".join(f"{describe(chunk.box)} in {chunk.path.name}" for chunk in source.chunks[:4]) or "no part"
        return IncompleteError(
            f"{name!r} {source.dtype} {list(source.shape)}: {describe(hole)} is in no file ({missing} of "
            f"{element_count(source.shape)} elements missing; found {there}): a rank's file is missing, copy it too or "
            "take another step"
        )
    except ValueError as error:
        return _overlap(name, source, str(error))
    return None


def _overlap(name: str, source: Source, otherwise: str) -> ValueError:
    """Name the files of the first chunk that lies outside or of the first two that overlap."""
    whole = Box((0,) * len(source.shape), source.shape)
    what = f"{name!r} {source.dtype} {list(source.shape)}"
    chunks = list(source.chunks)
    for index, chunk in enumerate(chunks):
        if chunk.box.intersect(whole) != chunk.box:
            return ValueError(
                f"{what}: {describe(chunk.box)} in {chunk.path} lies outside; the file is of another save"
            )
        for other in chunks[:index]:
            both = chunk.box.intersect(other.box)
            if both is not None:
                return ValueError(
                    f"{what}: {describe(both)} is in two files, {other.path.name} and {chunk.path}: they are of "
                    "different saves; remove the stale one"
                )
    return ValueError(otherwise)


def _first_hole(source: Source, boxes: list[Box]) -> Box:
    left = [Box((0,) * len(source.shape), source.shape)]
    for box in boxes:
        left = [rest for part in left for rest in _without(part, box)]
    return min(left)


def _without(part: Box, box: Box) -> list[Box]:
    """`part` without `box`, as boxes."""
    common = part.intersect(box)
    if common is None:
        return [part]
    rest = []
    offset, size = list(part.offset), list(part.size)
    for dim in range(len(size)):
        before = common.offset[dim] - offset[dim]
        after = offset[dim] + size[dim] - common.offset[dim] - common.size[dim]
        for start, count in ((offset[dim], before), (common.offset[dim] + common.size[dim], after)):
            if count:
                rest.append(Box((*offset[:dim], start, *offset[dim + 1 :]), (*size[:dim], count, *size[dim + 1 :])))
        offset[dim], size[dim] = common.offset[dim], common.size[dim]
    return rest

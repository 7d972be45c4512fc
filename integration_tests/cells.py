"""The cells of the table of equivalence: which cases are trained in which layouts.

All products would be thousands. Most mistakes of a combination are mistakes of two of its parts, so the cells of CI are
a covering array: every pair of choices is in at least one of them. Beside it stand what one or two processes show, and
the products of three axes and eight ranks, which are `slow`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

from integration_tests.equivalence import Case, Layout

SPLITS = {
    "fsdp4": Layout(4),
    "hsdp2x2": Layout(4, dp_replicate=2),
    "ddp4": Layout(4, strategy="ddp"),
    "fsdp2-tp2": Layout(4, tp=2),
    "fsdp2-tp2sp": Layout(4, tp=2, sequence_parallel=True),
    "hsdp2x1-tp2": Layout(4, dp_replicate=2, tp=2),
    "ddp2-tp2sp": Layout(4, strategy="ddp", tp=2, sequence_parallel=True),
    "fsdp2-cp2": Layout(4, cp=2),
    "fsdp2-cp2contiguous": Layout(4, cp=2, zigzag=False),
    "hsdp2x1-cp2": Layout(4, dp_replicate=2, cp=2),
    "ddp2-cp2": Layout(4, strategy="ddp", cp=2),
    "cp4": Layout(4, cp=4),
    "cp2-tp2": Layout(4, cp=2, tp=2),
    "cp2-tp2sp": Layout(4, cp=2, tp=2, sequence_parallel=True),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "split": tuple(SPLITS),
    "recompute": ("none", "selective", "full"),
    "family": ("dense", "moe"),
    "packed": (False, True),
    "lora": (False, True),
    "tied": (False, True),
    "kd": (False, True),
    "accumulation": (1, 3),
}
Cell = tuple[Case, Layout]


def pairwise(choices: dict[str, tuple[Any, ...]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Few rows of choices, of which every pair of two keys' values is in one: greedily, each the best of fifty."""
    draw = random.Random(seed)
    items = [(key, value) for key, values in choices.items() for value in values]
    open_pairs = {frozenset(pair) for pair in itertools.combinations(items, 2) if pair[0][0] != pair[1][0]}
    while open_pairs:
        first = min(open_pairs, key=lambda pair: sorted(map(repr, pair)))
        tries = [{key: draw.choice(values) for key, values in choices.items()} | dict(first) for _ in range(50)]
        best = max(tries, key=lambda row: len(open_pairs & _pairs(row)))
        open_pairs -= _pairs(best)
        yield best


def _pairs(row: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def _cell(row: dict[str, Any]) -> Cell:
    case = Case(row["family"], row["tied"], row["lora"], row["kd"])
    layout = dataclasses.replace(
        SPLITS[row["split"]], recompute=row["recompute"], packed=row["packed"], accumulation=row["accumulation"]
    )
    return case, layout


def _of(cases: tuple[Case, ...], *layouts: Layout) -> list[Cell]:
    return [(case, layout) for layout in layouts for case in cases]


PAIRS: list[Cell] = [_cell(row) for row in pairwise(CHOICES)]
# What a small number of processes shows alone, and offloading, which needs few cells.
FEW_RANKS: list[Cell] = [
    *_of(
        (Case(), Case("moe", tied=False, lora=True)),
        *(Layout(accumulation=n, packed=packed) for n, packed in ((2, False), (4, False), (1, True), (4, True))),
        Layout(recompute="full"),
        *(Layout(2, accumulation=n, packed=packed) for n, packed in ((1, False), (2, True), (4, False))),
        Layout(2, strategy="ddp", accumulation=2, packed=True, recompute="full"),
    ),
    *_of((Case("moe", kd=True),), Layout(2, tp=2), Layout(2, cp=2, packed=True)),
    *_of(
        (Case(lora=True), Case("moe", tied=False, kd=True)),
        Layout(4, tp=2, sequence_parallel=True, cpu_offload=True, recompute="selective"),
        Layout(4, cp=2, dp_replicate=2, cpu_offload=True, packed=True, accumulation=3, recompute="full"),
    ),
]
# Three axes at once, on eight ranks, with everything else that is in it.
EIGHT_RANKS: list[Cell] = _of(
    (Case(), Case("moe", tied=False), Case(lora=True), Case("moe", kd=True)),
    *(
        Layout(8, tp=2, cp=2, sequence_parallel=sp, packed=packed, accumulation=3, recompute=recompute)
        for sp, packed, recompute in itertools.product((False, True), (False, True), ("none", "full"))
    ),
    Layout(8, tp=2, dp_replicate=2, sequence_parallel=True, packed=True),
    Layout(8, cp=2, dp_replicate=2, packed=True),
    Layout(8, cp=4, tp=2, packed=True),
    Layout(8, strategy="ddp", cp=2, tp=2),
)

"""Examples of different lengths put together into packs of about one length.

Best fit decreasing: the longest example first, into the fullest pack that still has room. It never needs more than
11/9 of the optimal number of packs, plus one (Johnson 1973), and on real lengths fills 99 % and more. Lengths are
integers of at most `capacity`, so packs are kept by the room left and the right one is a binary search away.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import ArrayLike, NDArray

from am_data._checks import check_lengths, check_source, examples_of
from am_data._contracts import Dataset, Example, Stream


def pack(lengths: ArrayLike, capacity: int) -> list[NDArray[np.int64]]:
    """Indices of the examples of each pack: every index once, no pack over `capacity` tokens; deterministic.

    `lengths` are whole tokens `[num_examples]`, each in 1..capacity; ValueError says how many are not. Indices ascend
    within a pack. A million lengths take a few seconds.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1 token")
    if sizes.ndim != 1 or sizes.size == 0:
        raise ValueError(f"lengths has shape {sizes.shape}; give at least one length in one dimension")
    if sizes.min() < 1:
        raise ValueError(f"{int((sizes < 1).sum())} lengths are below 1; leave empty examples out")
    if sizes.max() > capacity:
        raise ValueError(
            f"{int((sizes > capacity).sum())} of {sizes.size} examples are longer than capacity={capacity} "
            f"(the longest has {int(sizes.max())} tokens); raise capacity, or cut or drop them with max_length"
        )
    packs: list[list[int]] = []
    rooms: list[int] = []
    packs_by_room: dict[int, list[int]] = {}
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist()):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, chosen = capacity, len(packs)
            packs.append([index])
        else:
            room = rooms[place]
            chosen = packs_by_room[room].pop()
            packs[chosen].append(index)
            if not packs_by_room[room]:
                del packs_by_room[room], rooms[place]
        if room > size:
            left = room - size
            if left not in packs_by_room:
                packs_by_room[left] = []
                insort(rooms, left)
            packs_by_room[left].append(chosen)
    return [np.array(sorted(indices), dtype=np.int64) for indices in packs]


class PackedDataset:
    """Packs of a dataset's examples, each of at most `capacity` tokens: an index over the dataset, no copies.

    `packed[i]` is the list of the examples of pack `i`; documents stay apart until `collate` lays them out. The packs
    depend on the lengths alone, so reshuffling never changes them. `dataset` is any `Dataset`; one of packs, such as
    windows of several documents, gives packs of all of their examples. Raises ValueError saying how many examples are
    longer than `capacity`, and TypeError for a `Stream`, whose lengths nobody knows.
    """

    def __init__(self, dataset: Dataset | Stream, capacity: int) -> None:
        check_source(dataset)
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"PackedDataset needs the lengths of all examples, which a stream ({type(dataset).__name__}) does not "
                "have; let the stream itself give packs (lists of examples), or leave it unpacked"
            )
        self._dataset = dataset
        self._capacity = capacity
        example_lengths = check_lengths(dataset)
        self._packs = pack(example_lengths, capacity)
        self._lengths = np.array([example_lengths[indices].sum() for indices in self._packs], dtype=np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each pack, int64 `[num_packs]`."""
        return self._lengths

    @property
    def fill(self) -> float:
        """Share of the packs' capacity that tokens fill, 0 to 1."""
        return float(self._lengths.sum() / (len(self) * self._capacity))

    @property
    def capacity(self) -> int:
        """The most tokens a pack may have."""
        return self._capacity

    @property
    def packs(self) -> list[NDArray[np.int64]]:
        """Indices of the examples of each pack."""
        return self._packs

    @property
    def fingerprint(self) -> str:
        """Equal for equal examples and capacity."""
        return f"{self._dataset.fingerprint}-packed-{self._capacity}"

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> list[Example]:
        """The examples of pack `index`, in the order of the dataset."""
        members = self._packs[index].tolist()
        return [example for member in members for example in examples_of(self._dataset[member], f"dataset[{member}]")]

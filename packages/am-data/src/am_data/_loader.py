"""Optimizer steps whose content depends on the data, the seed and the step alone, never on the number of ranks.

The position is one global number, the samples consumed of the epoch, so a run that was stopped goes on with any number
of ranks, and neither repeats nor skips a sample. An epoch's order is a pure function of seed and epoch, or a stream's
own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

from am_data._batch import collate as default_collate
from am_data._checks import check_batch, check_source, empty_batch
from am_data._contracts import Batch, Collate, Dataset, Sample, Stream
from am_data._prefetch import Prefetcher
from am_data._sources import Chosen, DatasetSource, Plan, Position, StreamSource

# A rank's micro-batches and the position after them; None where a run ends.
_Step: TypeAlias = tuple[list[Batch] | None, Position]


class DataLoader:
    """Iterates optimizer steps: each item is the list of this rank's micro-batches, equally many on every rank.

    Every rank builds it with the same arguments but `rank`. A step takes the next `global_batch_size` samples (rows of
    a dataset, packs of a `PackedDataset`) of the epoch's order; they are dealt to micro-batches and ranks by length, so
    that ranks have like work. The last step of an epoch takes what is left, unless `drop_last`; a rank that runs out
    gets batches without targets.

    Of a `Stream` every rank reads all samples, in the stream's order, one sample ahead of the step that is given; its
    end is the end of an epoch. It is read in the thread that prepares steps, and its saved state is that of the step
    given last. Datasets and streams draw from generators of their own: the thread runs beside the training.

    A loop goes on where the last one was left; a loop after the last epoch starts over. There is one loop at a time.
    For validation: `shuffle=False, num_epochs=1`.

    Args:
        collate: makes a micro-batch of samples: `functools.partial(am_data.collate, layout="padded")`, or your own
            (see `Collate`). It is called once without samples here, and once with one sample before the first step.
        global_batch_size: samples of one step over all ranks, a multiple of `local_batch_size * world_size`.
        local_batch_size: samples of one micro-batch of one rank.
        rank: with `world_size`, the place among the data-parallel ranks; or give their one-dimensional `mesh`.
        seed: of the order; not used for a stream.
        shuffle: a new order in every epoch; must be False for a stream.
        num_epochs: None never ends.
        prefetch: steps that a thread prepares ahead, 0 for none. Errors come at the step that they belong to.

    Raises:
        TypeError: the dataset or what `collate` returns is not of the contract; the message says what is missing.
        ValueError: sizes that do not divide, an empty dataset, `lengths` of another length than the dataset, batches
            whose tensors do not belong together, `shuffle=True` with a stream.
    """

    def __init__(
        self,
        dataset: Dataset | Stream,
        *,
        collate: Collate = default_collate,
        global_batch_size: int,
        local_batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        mesh: DeviceMesh | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
        drop_last: bool = False,
        prefetch: int = 1,
    ) -> None:
        check_source(dataset)
        self._rank, self._world_size = _coordinates(rank, world_size, mesh)
        _check_sizes(global_batch_size, local_batch_size, self._world_size)
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs={num_epochs} must be at least 1, or None for no end")
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must be at least 0 steps")
        plan = Plan(global_batch_size, num_epochs, drop_last, shuffle, seed)
        self._is_stream = not isinstance(dataset, Dataset)
        self._source = DatasetSource(dataset, plan) if isinstance(dataset, Dataset) else StreamSource(dataset, plan)
        self._collate = collate
        self._local_batch_size = local_batch_size
        self._prefetch = prefetch
        self._position = self._source.start
        self._finished = False
        self._running: Prefetcher[_Step] | Generator[_Step] | None = None
        self._empty = empty_batch(collate)
        # The per-token tensors that the loss takes, by name: dtype and dims after [B, S]; known from the first step on.
        self._targets: dict[str, tuple[torch.dtype, torch.Size]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the step that was given last, or of the first one."""
        return self._position.epoch

    @property
    def is_stream(self) -> bool:
        """Whether samples come from a `Stream`, so that nobody knows how many there are."""
        return self._is_stream

    def __len__(self) -> int:
        """Optimizer steps of one epoch; TypeError for a stream."""
        return self._source.steps_per_epoch

    @property
    def num_samples(self) -> int:
        """Samples of the dataset: rows, or packs of them; TypeError for a stream."""
        return self._source.num_samples

    def steps_for_tokens(self, max_tokens: int) -> int:
        """Optimizer steps from the start of a run until at least `max_tokens` tokens, padding left out, were seen.

        Exact, from lengths and order, over as many epochs as it takes, whatever `num_epochs`. ValueError for a stream.
        """
        return self._source.steps_for_tokens(max_tokens)

    def __iter__(self) -> Iterator[list[Batch]]:
        self._stop_running()
        if self._finished:
            self._position, self._finished = self._source.restart(self._position), False
        self._source.move(self._position)
        steps = self._steps(self._source.steps(self._position))
        running = Prefetcher(steps, self._prefetch) if self._prefetch else steps
        self._running = running
        try:
            for micro_batches, position in running:
                # Moved before the step is given, so that a state taken during the step does not repeat it.
                self._position = position
                if micro_batches is not None:
                    yield micro_batches
            if self._running is not running:
                raise RuntimeError(
                    "the loader was iterated anew or got another position, so this loop is over; use one loop at a time"
                )
            self._finished = True
        finally:
            running.close()

    def state_dict(self) -> dict[str, Any]:
        """The position after the step that was given last, the same on every rank."""
        return self._source.state(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position saved by any number of ranks; ValueError if it is one in other data or order."""
        self._stop_running()
        self._position, self._finished = self._source.position(state), False

    def _stop_running(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.close()
        if isinstance(running, Prefetcher):
            running.join()

    def _steps(self, steps: Iterable[Chosen]) -> Generator[_Step]:
        for chosen in steps:
            if not len(chosen.lengths):
                yield None, chosen.position
                continue
            if self._targets is None:
                # Every rank looks at the same sample, also one that has none of the first micro-batch.
                self._targets = _targets(check_batch(self._collate([chosen.read(0)]), "collate"))
            places = share(chosen.lengths, self._local_batch_size, self._rank, self._world_size)
            shares = ([chosen.read(place) for place in mine] for mine in places)
            yield [self._batch(samples, self._targets) for samples in shares], chosen.position

    def _batch(self, samples: Sequence[Sample], targets: dict[str, tuple[torch.dtype, torch.Size]]) -> Batch:
        if not samples:
            # A copy: a batch is the loop's own. What the loss takes beside the labels, it takes of this rank too.
            batch = {name: tensor.clone() for name, tensor in self._empty.items()}
            shape = batch["input_ids"].shape
            missing = {name: kind for name, kind in targets.items() if name not in batch}
            return batch | {name: torch.zeros((*shape, *rest), dtype=dtype) for name, (dtype, rest) in missing.items()}
        batch = check_batch(self._collate(samples), "collate")
        differing = sorted(_targets(batch).keys() ^ targets.keys())
        if differing:
            raise ValueError(
                f"a micro-batch and the first sample differ in {', '.join(differing)}; every example of a dataset has "
                "the same arrays beside input_ids and labels"
            )
        return batch


def _targets(batch: Batch) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape[2:]) for name, tensor in batch.items() if name.startswith("shift_")}


def share(lengths: NDArray[np.int64], local_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Places of each of a rank's micro-batches in a step; the union over ranks is every place once."""
    by_length = np.argsort(-lengths, kind="stable").tolist()
    per_micro_batch = local_batch_size * world_size
    shares = []
    for begin in range(0, len(by_length), per_micro_batch):
        part = by_length[begin : begin + per_micro_batch]
        mine = []
        for turn, start in enumerate(range(0, len(part), world_size)):
            # Back and forth, so that no rank always gets the longest.
            place = start + (rank if turn % 2 == 0 else world_size - 1 - rank)
            if place < len(part):
                mine.append(part[place])
        shares.append(mine)
    return shares


def _coordinates(rank: int | None, world_size: int | None, mesh: DeviceMesh | None) -> tuple[int, int]:
    if mesh is None:
        rank, world_size = rank or 0, 1 if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in 0..{world_size - 1} for world_size={world_size}")
        return rank, world_size
    if rank is not None or world_size is not None:
        raise ValueError(f"rank={rank} and world_size={world_size} were given beside a mesh; give one or the other")
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions; give the one of the data-parallel ranks, flattened")
    return mesh.get_local_rank(), mesh.size()


def _check_sizes(global_batch_size: int, local_batch_size: int, world_size: int) -> None:
    if global_batch_size < 1 or local_batch_size < 1:
        raise ValueError(
            f"global_batch_size={global_batch_size} and local_batch_size={local_batch_size} must be at least 1"
        )
    unit = local_batch_size * world_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of local_batch_size={local_batch_size} "
            f"* world_size={world_size} = {unit}; choose {nearest}"
        )

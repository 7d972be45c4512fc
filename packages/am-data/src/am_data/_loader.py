"""Optimizer steps whose content depends on the data, the seed and the step alone, never on the number of ranks.

The position is one global number, the samples consumed of the epoch, so a run that was stopped goes on with any number
of ranks, and neither repeats nor skips a sample. An epoch's order is a pure function of seed and epoch.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

from am_data._batch import Batch, Join, Layout, Sample, check_layout, collate


class SampleDataset(Protocol):
    """What the loader needs: a dataset of examples or a `PackedDataset`."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, int64 `[num_samples]`."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal content."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """An example, or the list of the examples of a pack."""


class DataLoader:
    """Iterates optimizer steps: each item is the list of this rank's micro-batches, equally many on every rank.

    Every rank builds it with the same arguments but `rank`. A step takes the next `global_batch_size` samples (rows of
    a dataset, packs of a `PackedDataset`) of the epoch's order; they are dealt to micro-batches and ranks by length, so
    that ranks have like work. `local_batch_size` is the samples of one micro-batch of one rank. The last step of an
    epoch takes what is left, unless `drop_last`; a rank that runs out gets batches without targets. Give `rank` and
    `world_size` of the data-parallel ranks, or their one-dimensional `mesh`.

    `num_epochs=None` never ends. A loop goes on where the last one was left; a loop after the last epoch starts over.
    For validation: `shuffle=False, num_epochs=1`. The other arguments are those of `collate`.
    Raises ValueError where `global_batch_size` is not a multiple of `local_batch_size * world_size`.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        global_batch_size: int,
        local_batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        mesh: DeviceMesh | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
        drop_last: bool = False,
        layout: Layout = "packed",
        pad_token_id: int = 0,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        join: Join | None = None,
        position_ids: Callable[[Batch], torch.Tensor] | None = None,
    ) -> None:
        check_layout(layout, join)
        self._rank, self._world_size = _coordinates(rank, world_size, mesh)
        _check_sizes(global_batch_size, local_batch_size, self._world_size)
        if len(dataset) == 0:
            raise ValueError("the dataset is empty; a loader needs at least one sample")
        if drop_last and len(dataset) < global_batch_size:
            raise ValueError(
                f"{len(dataset)} samples make no full step of global_batch_size={global_batch_size}, and drop_last "
                "drops the rest; lower global_batch_size or set drop_last=False"
            )
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs={num_epochs} must be at least 1, or None for no end")
        self._dataset = dataset
        self._lengths = dataset.lengths
        self._global_batch_size = global_batch_size
        self._local_batch_size = local_batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._num_epochs = num_epochs
        self._drop_last = drop_last
        self._layout: Layout = layout
        self._pad_token_id = pad_token_id
        self._pad_to_multiple_of = pad_to_multiple_of
        self._max_length = max_length
        self._join = join
        self._position_ids = position_ids
        self._epoch = 0
        self._cursor = 0
        self._finished = False

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the step that was given last, or of the first one."""
        return self._epoch

    def __len__(self) -> int:
        """Optimizer steps of one epoch."""
        return self._samples_per_epoch // self._global_batch_size + bool(
            self._samples_per_epoch % self._global_batch_size
        )

    @property
    def _samples_per_epoch(self) -> int:
        samples = len(self._dataset)
        return samples - samples % self._global_batch_size if self._drop_last else samples

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._finished:
            self._epoch, self._cursor, self._finished = 0, 0, False
        while self._num_epochs is None or self._epoch < self._num_epochs:
            order = self._order(self._epoch)
            while self._cursor < self._samples_per_epoch:
                chosen = order[self._cursor : min(self._cursor + self._global_batch_size, self._samples_per_epoch)]
                micro_batches = [self._collate(indices) for indices in self._share(chosen)]
                # Moved before the step is given, so that a state taken during the step does not repeat it.
                self._cursor += len(chosen)
                yield micro_batches
            self._epoch, self._cursor = self._epoch + 1, 0
        self._finished = True

    def state_dict(self) -> dict[str, int | str]:
        """The position after the step that was given last, the same on every rank."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "seed": self._seed,
            "num_samples": len(self._dataset),
            "fingerprint": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position saved by any number of ranks; ValueError if it is one in other data or order."""
        ours = self.state_dict()
        for key in ("fingerprint", "num_samples", "seed"):
            if state[key] != ours[key]:
                raise ValueError(
                    f"the saved position has {key}={state[key]!r}, this loader {ours[key]!r}: the samples or their "
                    "order differ; resume with the data, tokenizer, template, packing and seed of the saved run"
                )
        self._epoch, self._cursor, self._finished = int(state["epoch"]), int(state["cursor"]), False

    @property
    def _identity(self) -> str:
        return self._dataset.fingerprint + ("" if self._shuffle else "-in-order")

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Sample indices of an epoch; from raw random bits, whose values NumPy guarantees across its versions."""
        samples = len(self._dataset)
        if not self._shuffle:
            return np.arange(samples, dtype=np.int64)
        return np.argsort(np.random.PCG64([self._seed, epoch]).random_raw(samples), kind="stable")

    def _share(self, chosen: NDArray[np.int64]) -> list[list[int]]:
        """Sample indices of each of this rank's micro-batches; the union over ranks is `chosen`, each once."""
        by_length = chosen[np.argsort(-self._lengths[chosen], kind="stable")].tolist()
        per_micro_batch = self._local_batch_size * self._world_size
        shares = []
        for begin in range(0, len(by_length), per_micro_batch):
            part = by_length[begin : begin + per_micro_batch]
            mine = []
            for turn, start in enumerate(range(0, len(part), self._world_size)):
                # Back and forth, so that no rank always gets the longest.
                place = start + (self._rank if turn % 2 == 0 else self._world_size - 1 - self._rank)
                if place < len(part):
                    mine.append(part[place])
            shares.append(mine)
        return shares

    def _collate(self, indices: list[int]) -> Batch:
        samples: list[Sample] = [self._dataset[index] for index in indices]
        return collate(
            samples,
            layout=self._layout,
            pad_token_id=self._pad_token_id,
            pad_to_multiple_of=self._pad_to_multiple_of,
            max_length=self._max_length,
            join=self._join,
            position_ids=self._position_ids,
        )


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

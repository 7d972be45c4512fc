"""Which samples a step takes, of a dataset or of a stream, from any position on; the same on every rank."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from am_data._checks import check_lengths, num_tokens
from am_data._contracts import Dataset, Sample, Stream
from am_data._prefetch import Outcome


@dataclass(frozen=True)
class Position:
    """What was given: `cursor` samples of epoch `epoch`.

    Of a stream, `stream` is its own state after them, and `ended` says that they were the epoch's last.
    """

    epoch: int = 0
    cursor: int = 0
    ended: bool = False
    stream: dict[str, Any] | None = None


@dataclass(frozen=True)
class Chosen:
    """The samples of a step: their lengths, how to read one by its place, and the position after the step.

    A run that comes to its end closes with one without samples, for the position there.
    """

    lengths: NDArray[np.int64]
    read: Callable[[int], Sample]
    position: Position


@dataclass(frozen=True)
class Plan:
    """How samples become steps and epochs; see `DataLoader`."""

    global_batch_size: int
    num_epochs: int | None
    drop_last: bool
    shuffle: bool
    seed: int

    def continues(self, epoch: int) -> bool:
        return self.num_epochs is None or epoch < self.num_epochs


class DatasetSource:
    """Steps over a dataset: the epoch's order is a pure function of seed and epoch."""

    def __init__(self, dataset: Dataset, plan: Plan) -> None:
        self._dataset = dataset
        self._plan = plan
        self._lengths = check_lengths(dataset)
        samples = len(self._lengths)
        if plan.drop_last and samples < plan.global_batch_size:
            raise ValueError(
                f"{samples} samples make no full step of global_batch_size={plan.global_batch_size}, and drop_last "
                "drops the rest; lower global_batch_size or set drop_last=False"
            )
        self._per_epoch = samples - samples % plan.global_batch_size if plan.drop_last else samples
        self._identity = dataset.fingerprint + ("" if plan.shuffle else "-in-order")
        self.start = Position()

    @property
    def num_samples(self) -> int:
        return len(self._lengths)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._per_epoch // self._plan.global_batch_size)

    def steps(self, position: Position) -> Generator[Chosen]:
        epoch, cursor = position.epoch, position.cursor
        while self._plan.continues(epoch):
            order = self._order(epoch)
            while cursor < self._per_epoch:
                chosen = order[cursor : min(cursor + self._plan.global_batch_size, self._per_epoch)]
                cursor += len(chosen)
                read = functools.partial(self._read, chosen)
                yield Chosen(self._lengths[chosen], read, Position(epoch, cursor))
            epoch, cursor = epoch + 1, 0
        nothing = np.zeros(0, dtype=np.int64)
        yield Chosen(nothing, functools.partial(self._read, nothing), Position(epoch))

    def move(self, position: Position) -> None:
        """Nothing to do: samples are asked for by index."""

    def restart(self, position: Position) -> Position:
        return Position()

    def state(self, position: Position) -> dict[str, Any]:
        return {
            "epoch": position.epoch,
            "cursor": position.cursor,
            "seed": self._plan.seed,
            "num_samples": len(self._lengths),
            "fingerprint": self._identity,
        }

    def position(self, state: dict[str, Any]) -> Position:
        ours = self.state(self.start)
        for key in ("fingerprint", "num_samples", "seed"):
            if state[key] != ours[key]:
                raise ValueError(
                    f"the saved position has {key}={state[key]!r}, this loader {ours[key]!r}: the samples or their "
                    "order differ; resume with the data, tokenizer, template, packing and seed of the saved run"
                )
        return Position(int(state["epoch"]), int(state["cursor"]))

    def steps_for_tokens(self, max_tokens: int) -> int:
        """Steps from the very start until `max_tokens` tokens were seen, over as many epochs as that takes."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1 token")
        epoch, left = 0, max_tokens
        if self._per_epoch == len(self._lengths):
            # Whole epochs have all tokens, in whatever order.
            epoch, left = divmod(max_tokens, int(self._lengths.sum()))
        steps = epoch * self.steps_per_epoch
        while left > 0:
            lengths = self._lengths[self._order(epoch)[: self._per_epoch]]
            seen = np.cumsum(np.add.reduceat(lengths, np.arange(0, len(lengths), self._plan.global_batch_size)))
            steps += min(int(np.searchsorted(seen, left)) + 1, len(seen))
            epoch, left = epoch + 1, left - int(seen[-1])
        return steps

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Sample indices of an epoch; from raw random bits, whose values NumPy guarantees across its versions."""
        samples = len(self._lengths)
        if not self._plan.shuffle:
            return np.arange(samples, dtype=np.int64)
        return np.argsort(np.random.PCG64([self._plan.seed, epoch]).random_raw(samples), kind="stable")

    def _read(self, chosen: NDArray[np.int64], place: int) -> Sample:
        index = int(chosen[place])
        sample = self._dataset[index]
        found = num_tokens(sample, f"dataset[{index}]")
        if found != self._lengths[index]:
            raise ValueError(
                f"dataset[{index}] has {found} input_ids, dataset.lengths says {self._lengths[index]}; lengths are the "
                "tokens of each sample, over all of its documents"
            )
        return sample


class StreamSource:
    """Steps over a stream, which every rank reads whole, so that a step's content does not depend on the ranks."""

    def __init__(self, stream: Stream, plan: Plan) -> None:
        if plan.shuffle:
            raise ValueError(
                f"shuffle=True was asked of a stream ({type(stream).__name__}), which has an order of its own; give "
                "shuffle=False, and let the stream shuffle"
            )
        self._stream = stream
        self._plan = plan
        self._identity = f"stream-{type(stream).__qualname__}"
        self._moved = False
        self.start = Position(stream=self._snapshot())

    @property
    def num_samples(self) -> int:
        return self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        raise TypeError(
            f"a stream ({type(self._stream).__name__}) has no length, nor has its loader; set max_steps, or count the "
            "steps that it gives"
        )

    def steps(self, position: Position) -> Generator[Chosen]:
        self._moved = True
        epoch, cursor = (position.epoch + 1, 0) if position.ended else (position.epoch, position.cursor)
        while self._plan.continues(epoch):
            numbered = enumerate(self._stream, start=cursor)
            upcoming = Outcome.of(numbered)
            while upcoming.item is not None:
                # `upcoming` is read before the step in front of it is given: only so is it known that an epoch ends.
                chosen = [upcoming.item, *itertools.islice(numbered, self._plan.global_batch_size - 1)]
                short = len(chosen) < self._plan.global_batch_size
                if short and self._plan.drop_last:
                    break
                state = self._snapshot()
                upcoming = Outcome() if short else Outcome.of(numbered)
                ended = upcoming.ended
                cursor += len(chosen)
                lengths = [num_tokens(sample, f"sample {number} of the stream") for number, sample in chosen]
                samples = [sample for _, sample in chosen]
                position = Position(epoch, cursor, ended, self._snapshot() if ended else state)
                yield Chosen(np.array(lengths, dtype=np.int64), samples.__getitem__, position)
            upcoming.raise_error()
            if cursor == 0:
                what = "full step" if self._plan.drop_last else "sample"
                raise ValueError(
                    f"epoch {epoch} of the stream ({type(self._stream).__name__}) gave no {what}; a finished stream "
                    f"starts over when it is iterated again, and global_batch_size={self._plan.global_batch_size} "
                    "samples make a step; mend the stream, or set num_epochs"
                )
            epoch, cursor = epoch + 1, 0
        yield Chosen(np.zeros(0, dtype=np.int64), [].__getitem__, Position(epoch, stream=self._snapshot()))

    def move(self, position: Position) -> None:
        """Put the stream where it was at `position`: it may have been read ahead of it."""
        if self._moved:
            self._stream.load_state_dict(copy.deepcopy(position.stream or {}))

    def restart(self, position: Position) -> Position:
        return Position(stream=position.stream)

    def state(self, position: Position) -> dict[str, Any]:
        return {
            "epoch": position.epoch,
            "cursor": position.cursor,
            "ended": position.ended,
            "stream": copy.deepcopy(position.stream),
            "fingerprint": self._identity,
        }

    def position(self, state: dict[str, Any]) -> Position:
        if state["fingerprint"] != self._identity:
            raise ValueError(
                f"the saved position has fingerprint={state['fingerprint']!r}, this loader {self._identity!r}: it is "
                "one in other data; resume with the stream of the saved run"
            )
        self._stream.load_state_dict(copy.deepcopy(state["stream"]))
        return Position(int(state["epoch"]), int(state["cursor"]), bool(state["ended"]), copy.deepcopy(state["stream"]))

    def steps_for_tokens(self, max_tokens: int) -> int:
        raise ValueError(
            f"max_tokens={max_tokens} cannot be counted in steps of a stream ({type(self._stream).__name__}), which "
            "does not know its lengths; set max_steps"
        )

    def _snapshot(self) -> dict[str, Any]:
        # A copy: a stream may give the very dict that it goes on changing.
        state = copy.deepcopy(self._stream.state_dict())
        if not isinstance(state, dict):
            name, kind = type(self._stream).__name__, type(state).__name__
            raise TypeError(f"{name}.state_dict() returned a {kind}; return a dict of plain values and tensors")
        return state

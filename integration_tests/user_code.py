"""What a user writes against the public contracts, about ten lines each, and names by `_target_` in a config."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

import am_data
import am_loss
import am_models


class WeightedRows:
    """A `am_data.Dataset`: lines of text, every token a target with a weight."""

    fingerprint = "weighted-rows"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, weight: float = 1.0) -> None:
        self._ids = [np.array(tokenizer(f"The answer to {n} is {n * n}.")["input_ids"]) for n in range(8)]
        self._weight = weight
        self.lengths = np.array([len(ids) for ids in self._ids])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self._ids[index]
        return {"input_ids": ids, "labels": ids, "weights": np.full(len(ids), self._weight, np.float32)}


class Counting:
    """A `am_data.Stream`: it goes on for ever, and its position is one number."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._next = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            ids = np.array(self._tokenizer(f"After {self._next} comes {self._next + 1}.")["input_ids"])
            self._next += 1
            yield {"input_ids": ids, "labels": ids}

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._next = state["next"]


def to_sixteen(samples: Sequence[Any]) -> am_data.Batch:
    """A `am_data.Collate`: rows are padded to a multiple of 16 tokens."""
    return am_data.collate(samples, layout="padded", pad_to_multiple_of=16)


def to_sixteen_but_the_labels(samples: Sequence[Any]) -> am_data.Batch:
    """A broken one: one target too few."""
    batch = to_sixteen(samples)
    return batch | {"shift_labels": batch["shift_labels"][:, 1:]}


def weighted_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shift_labels: torch.Tensor,
    *,
    shift_weights: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> torch.Tensor:
    """A `am_models.Loss`: cross-entropy times what each target weighs."""
    assert softcap is None
    assert scale is None
    losses = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), shift_labels.flatten(), reduction="none")
    return (losses * shift_weights.flatten()).sum()


def mean_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **head: Any) -> torch.Tensor:
    """A broken one: a mean."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten())


def jittered_cross_entropy(*head: torch.Tensor, **options: Any) -> torch.Tensor:
    """A loss that is another one each time, by a few of its last digits: what an order of additions may do."""
    return am_loss.linear_cross_entropy(*head, **options) * (1 + 1e-6 * random.SystemRandom().random())


def scattered_cross_entropy(hidden: torch.Tensor, *head: torch.Tensor, **options: Any) -> torch.Tensor:
    """A loss whose last digits tell in which order a sum was taken; on a GPU its threads take it as they come."""
    values = hidden.detach().float().flatten()
    total = values.new_zeros(1).index_add_(0, torch.zeros_like(values, dtype=torch.int64), values)
    return am_loss.linear_cross_entropy(hidden, *head, **options) * (1 + 1e-6 * torch.sin(1e5 * total[0]))


def unordered_cross_entropy(*head: torch.Tensor, **options: Any) -> torch.Tensor:
    """A loss with an operation that torch has in no deterministic form."""
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
    return am_loss.linear_cross_entropy(*head, **options)


def unordered_distillation(*head: torch.Tensor, **options: Any) -> am_loss.DistillationLoss:
    """The same with a teacher."""
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
    return am_loss.linear_distillation(*head, **options)


def mean_distillation(*head: torch.Tensor, **options: Any) -> am_loss.DistillationLoss:
    """A broken one: means over the rows."""
    losses = am_loss.linear_distillation(*head, **options)
    return am_loss.DistillationLoss(*(loss / max(head[2].numel(), 1) for loss in losses))


def bare(samples: Sequence[Any]) -> am_data.Batch:
    """A `am_data.Collate` that gives what the contract asks for and no more: rows of eight tokens."""
    ids = torch.zeros(max(len(samples), 1), 8, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        ids[row] = torch.from_numpy(np.resize(sample["input_ids"], 8))
        labels[row, :-1] = ids[row, 1:]
    return {"input_ids": ids, "shift_labels": labels}


class Few:
    """A `am_data.Stream` that ends after six samples."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._next = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._next < 6:
            ids = np.array(self._tokenizer(f"Sample {self._next}.")["input_ids"])
            self._next += 1
            yield {"input_ids": ids, "labels": ids}
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._next = state["next"]


def careful_llama() -> am_models.Family:
    """A `am_models.Family`: a row of the table for Llama without our norm."""
    return am_models.Family(module="llama", attention="LlamaAttention", rotary=True, gated_mlp="LlamaMLP")


def misspelt_llama() -> am_models.Family:
    """A broken one: there is no such class."""
    return am_models.Family(module="llama", attention="LlamaAttention", norm="LlamaRMSNrom")


class LossesOnly:
    """A `am_recipes.sinks.Sink`: one JSON list of losses."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._losses: list[float] = []

    def note(self, fact: str) -> None: ...

    def step(self, row: Mapping[str, float]) -> None:
        self._losses.append(row["loss"])

    def validation(self, row: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None:
        self._file.write_text(json.dumps({"status": status, "losses": self._losses}))


class Filler:
    """A sink that leaves no room on a disk after a step."""

    def __init__(self, file: str, after: int) -> None:
        self._file, self._after = Path(file), after

    def note(self, fact: str) -> None: ...

    def step(self, row: Mapping[str, float]) -> None:
        if row["step"] == self._after:
            with contextlib.suppress(OSError), self._file.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))

    def validation(self, row: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


def without_weights(samples: Sequence[Any]) -> am_data.Batch:
    """A `am_data.Collate` that leaves the weights out."""
    rows = [{"input_ids": sample["input_ids"], "labels": sample["labels"]} for sample in samples]
    return am_data.collate(rows, layout="padded")


class WithoutLengths:
    """A broken `am_data.Dataset`."""

    fingerprint = "none"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._rows = WeightedRows(tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


class Slow:
    """A `am_recipes.sinks.Sink` that takes `seconds` for each step, by the number of the start of a SLURM job."""

    def __init__(self, seconds: Sequence[float]) -> None:
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._seconds = [*seconds, *[0.0] * start][start]

    def note(self, fact: str) -> None: ...

    def step(self, row: Mapping[str, float]) -> None:
        time.sleep(self._seconds)

    def validation(self, row: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


def fails_on_the_second_rank(samples: Sequence[Any]) -> am_data.Batch:
    """A broken `am_data.Collate`: a bug that one rank alone runs into."""
    if os.environ["RANK"] == "1":
        return {}["a bug of the second rank"]
    return am_data.collate(samples, layout="packed")

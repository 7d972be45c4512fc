"""What the loader asks of a dataset, a stream and a collate function, and what a recipe may ask of a dataset.

They are Protocols: any class or function of that shape will do, and none has to know this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# `input_ids [S]`, `labels [S]` (or `[S + 1]`), and further arrays of one number per label; with images their tensors.
Example: TypeAlias = "Mapping[str, NDArray[np.generic] | torch.Tensor]"
# An example, or the list of the examples of a pack.
Sample: TypeAlias = "Example | Sequence[Example]"
Batch: TypeAlias = "dict[str, torch.Tensor]"


@runtime_checkable
class Dataset(Protocol):
    """Samples that can be counted and asked for by index, the same on every rank."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, int64 `[num_samples]`, each at least 1."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal content: a saved position is valid for this content alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """An example, or the list of the examples of a pack; `index` is in 0..len - 1."""


@runtime_checkable
class Stream(Protocol):
    """Samples one after the other in an order of their own, the same on every rank, with a position that is saved.

    A stream has no length. Iterating goes on from its position; a finished one, which has ended an iteration, starts
    over with the next.
    """

    def __iter__(self) -> Iterator[Sample]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the sample that was given last: plain values and tensors."""

    # Any, as in torch's own `Stateful`: a stream may say more closely what its state holds.
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from there at the next iteration."""


class Report(Protocol):
    """What became of a dataset's rows; `str(report)` is for people."""

    @property
    def samples(self) -> Sequence[Sequence[tuple[str, bool]]]:
        """A few rows, each as `(text, supervised)` segments whose texts join to the row."""


@runtime_checkable
class Reported(Protocol):
    """A dataset or stream that says what became of its rows; not every one does."""

    @property
    def report(self) -> Report: ...


@runtime_checkable
class Rendered(Protocol):
    """A dataset of rows that a chat template rendered: what a model trained on it has to be asked with."""

    @property
    def chat_template(self) -> str | None:
        """The template (Jinja) that replaced the tokenizer's own; None where rows are rendered with that."""

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        """The variables that the template was given."""

    @property
    def end_token_ids(self) -> Sequence[int]:
        """The tokens that end the turns under loss: where a model that has learned them stops."""


class Collate(Protocol):
    """The samples of a micro-batch become the tensors of one forward pass."""

    def __call__(self, samples: Sequence[Sample], /) -> Mapping[str, torch.Tensor]:
        """`input_ids [B, S]`, `shift_labels [B, S]` (shifted already, -100 = no loss) and whatever else is taken.

        No samples at all give one row without targets, for a rank that has run out of them.
        """

"""Tokenised examples in three flat arrays: one example is a slice, whatever the number of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from am_data._render import IGNORE_INDEX

# The example of a text: `input_ids` and `labels` alone.
TextExample: TypeAlias = dict[str, NDArray[np.int64]]


class TokenDataset:
    """Examples that are tokenised already, each a mapping with `input_ids` and `labels` of equal length `[S]`.

    Labels are not shifted; each is the token itself, or -100 where there is no loss. Stored as int32 tokens and one
    byte of mask per token. `fingerprint` defaults to a hash of the content. Raises ValueError for no examples, an empty
    one, and labels that are neither -100 nor the token.
    """

    def __init__(self, examples: Iterable[Mapping[str, ArrayLike]], *, fingerprint: str | None = None) -> None:
        tokens, masks = [], []
        for index, example in enumerate(examples):
            ids, labels = np.asarray(example["input_ids"]), np.asarray(example["labels"])
            if ids.ndim != 1 or ids.shape != labels.shape or ids.size == 0:
                raise ValueError(
                    f"example {index} has input_ids {ids.shape} and labels {labels.shape}; give equal shapes [S], S > 0"
                )
            mask = labels != IGNORE_INDEX
            if not np.array_equal(labels[mask], ids[mask]):
                raise ValueError(
                    f"example {index} has labels that are not its tokens; give them unshifted, -100 = no loss"
                )
            tokens.append(ids.astype(np.int32))
            masks.append(mask)
        if not tokens:
            raise ValueError("there are no examples; give at least one")
        self._tokens = np.concatenate(tokens)
        self._mask = np.concatenate(masks)
        self._offsets = np.cumsum([0, *(len(ids) for ids in tokens)], dtype=np.int64)
        self._fingerprint = fingerprint or self._hash()

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for array in (self._tokens, self._mask, self._offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 `[num_examples]`."""
        return np.diff(self._offsets)

    @property
    def fingerprint(self) -> str:
        """Equal for equal content."""
        return self._fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._tokens)

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens under loss of all examples."""
        return int(self._mask.sum())

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> TextExample:
        """`{"input_ids": int64 [S], "labels": int64 [S]}`, labels not shifted; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        index %= len(self)
        span = slice(self._offsets[index], self._offsets[index + 1])
        ids = self._tokens[span].astype(np.int64)
        return {"input_ids": ids, "labels": np.where(self._mask[span], ids, IGNORE_INDEX)}

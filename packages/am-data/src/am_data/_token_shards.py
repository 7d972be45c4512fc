"""Windows of a token stream that is kept in nanoGPT `.bin` shards: a map-style dataset that reads a window when asked.

The shards are one stream, one after the other, so a window may begin in one and end in the next; only the rest at the
very end fits no window. A window has `sequence_length` tokens and one more, the target of its last token, with which
the next window begins: every token of a window but the stream's first is a target exactly once an epoch.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from am_data._report import Segment
from am_data._shard_files import HEADER_BYTES, ShardHeader, bos_index_path, read_header
from am_data._tokens import TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Paths: TypeAlias = "str | Path | Sequence[str | Path]"

# Tokens at the start, the middle and the end of a shard that are hashed and checked when the dataset is built.
_SAMPLED_TOKENS = 2048
# Tokens of one step of a scan for BOS tokens: 32 or 64 MB.
_SCANNED_TOKENS = 2**24


@dataclass(frozen=True)
class TokenShardsReport:
    """What a `TokenShards` found; `str(report)` is for people.

    `num_left_out` tokens are in no window: the rest at the end of the stream and, with windows that start at BOS
    tokens, what lies between the end of a window and the next BOS. `samples` is always empty: the stream has no rows.
    """

    num_files: int
    num_tokens: int
    num_windows: int
    sequence_length: int
    num_left_out: int
    aligned: bool
    samples: list[list[Segment]] = field(default_factory=list)

    def __str__(self) -> str:
        start = ", each from a BOS token" if self.aligned else ""
        return (
            f"{self.num_tokens} tokens in {self.num_files} shards: {self.num_windows} windows of "
            f"{self.sequence_length}{start}, {self.num_windows * self.sequence_length} targets\n"
            f"{self.num_left_out} tokens left out ({self.num_left_out / self.num_tokens:.2%}), "
            + ("between windows and at the end" if self.aligned else "at the end")
        )


class TokenShards:
    """A map-style dataset of windows of `sequence_length` tokens over nanoGPT `.bin` shards, without overlap.

    `path`: a file, a glob, a folder with the shards of one corpus, or several of them; those of a glob or a folder
    come in the order of their names, numbers by value. `dataset[i]` is `{"input_ids": int64 [S], "labels": int64
    [S + 1]}`: labels are the window's tokens and the next one, so that `collate` finds a target for the last.

    `align_to_bos`: each window starts at a BOS token, the next one at the first BOS at or after its end; the tokens
    between are left out (`report` counts them). The positions come from `.bos.idx` files, or from reading every shard
    once where there is none. An index is compared with its shard at both ends and at the start of every window, which
    reads a page of the file for each; one that leaves out BOS tokens in between gives fewer windows.

    `split_documents`: attention stays inside documents; `dataset[i]` is then the list of the window's documents, cut
    before each BOS, which `collate` lays out as a pack. The last target of each is the token that follows in the
    stream, as a rule the BOS, so every target is kept and a model learns to end a document. By default a window is one
    document. Both options need `bos_token_id`.

    `tokenizer` gives `bos_token_id` and `vocab_size`, the number of token ids, where they are not given themselves:
    a `vocab_size`, as a rule that of the model, wins over the tokenizer's, also where it is larger. Ids beyond it are a
    ValueError: looked for in samples of each shard when the dataset is built, and in every window when it is read,
    since a corpus may be larger than anybody wants to read twice.

    Headers and file sizes are checked here; no file stays open (a window maps its own bytes), so thousands of shards
    will do, and the dataset pickles. Every rank builds it and sees all windows. Raises FileNotFoundError for paths
    without shards, ValueError for a broken shard, a mixed folder, fewer tokens than one window or a wrong BOS index.
    """

    def __init__(
        self,
        path: Paths,
        sequence_length: int,
        *,
        bos_token_id: int | None = None,
        align_to_bos: bool = False,
        split_documents: bool = False,
        vocab_size: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1 token")
        self._limited_by_tokenizer = vocab_size is None
        if tokenizer is not None:
            bos_token_id = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
            vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        if bos_token_id is None and (align_to_bos or split_documents):
            option = "align_to_bos" if align_to_bos else "split_documents"
            raise ValueError(
                f"{option}=True needs bos_token_id, the token that starts a document, or a tokenizer with one"
            )
        if bos_token_id is not None and vocab_size is not None and not 0 <= bos_token_id < vocab_size:
            raise ValueError(f"bos_token_id={bos_token_id} is not in 0..{vocab_size - 1}, the ids of vocab_size")
        self._files = _find_shards(path)
        self._headers = [read_header(path) for path in self._files]
        self._ends = np.cumsum([header.num_tokens for header in self._headers], dtype=np.int64)
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._cut_at = bos_token_id if split_documents else None
        num_tokens = int(self._ends[-1])
        if num_tokens <= sequence_length:
            raise ValueError(
                f"{num_tokens} tokens in {len(self._files)} shards, {self._files[0]} first, are fewer than one window "
                f"of sequence_length={sequence_length} and a target; lower it, or give more shards"
            )
        self._begins = self._aligned_begins(bos_token_id) if align_to_bos and bos_token_id is not None else None
        self._num_windows = (num_tokens - 1) // sequence_length if self._begins is None else len(self._begins)
        self._fingerprint = self._sample(f"{sequence_length}-{align_to_bos}-{self._cut_at}")
        self._report = TokenShardsReport(
            num_files=len(self._files),
            num_tokens=num_tokens,
            num_windows=self._num_windows,
            sequence_length=sequence_length,
            num_left_out=num_tokens - self._num_covered(),
            aligned=align_to_bos,
        )

    @property
    def report(self) -> TokenShardsReport:
        """Shards, tokens, windows, and the tokens that no window holds."""
        return self._report

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each window, int64 `[num_windows]`: all `sequence_length`; read only."""
        return np.broadcast_to(np.int64(self._sequence_length), (self._num_windows,))

    @property
    def fingerprint(self) -> str:
        """Equal for equal headers, sampled tokens, order and windows, whatever the files are called."""
        return self._fingerprint

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> TextExample | list[TextExample]:
        """Window `index`, or its documents with `split_documents`; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} windows")
        index %= len(self)
        begin = index * self._sequence_length if self._begins is None else int(self._begins[index])
        tokens = self._read(begin, begin + self._sequence_length + 1)
        if self._cut_at is None:
            return {"input_ids": tokens[:-1], "labels": tokens}
        edges = [0, *(np.flatnonzero(tokens[1:-1] == self._cut_at) + 1).tolist(), self._sequence_length]
        return [
            {"input_ids": tokens[start:end], "labels": tokens[start : end + 1]}
            for start, end in itertools.pairwise(edges)
        ]

    def _read(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens `begin` to `end` of the stream, from as many shards as they lie in."""
        parts = []
        shard = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            first = int(self._ends[shard]) - self._headers[shard].num_tokens
            stop = min(end, int(self._ends[shard]))
            tokens = _map_tokens(self._files[shard], self._headers[shard], begin - first, stop - first)
            self._check_vocabulary(tokens, shard, begin - first)
            parts.append(tokens.astype(np.int64))
            begin, shard = stop, shard + 1
        return np.concatenate(parts)

    def _check_vocabulary(self, tokens: NDArray, shard: int, first: int) -> None:
        if self._vocab_size is None or tokens.max() < self._vocab_size:
            return
        at = int(np.argmax(tokens >= self._vocab_size))
        constraint = (
            f"the tokenizer's vocabulary of {self._vocab_size} ids; tokenise the corpus with that tokenizer, or give a "
            "model's larger vocab_size"
            if self._limited_by_tokenizer
            else f"vocab_size={self._vocab_size}; tokenise the corpus with the tokenizer of the model, which has "
            "that vocabulary"
        )
        raise ValueError(
            f"{self._files[shard]} has token id {int(tokens[at])} at token {first + at}, beyond {constraint}"
        )

    def _sample(self, options: str) -> str:
        """A hash of headers and sampled tokens, which are checked on the way."""
        digest = hashlib.blake2b(options.encode(), digest_size=16)
        for shard, header in enumerate(self._headers):
            digest.update(f"{header.num_tokens}-{header.dtype.itemsize}".encode())
            last = max(0, header.num_tokens - _SAMPLED_TOKENS)
            for first in (0, last // 2, last):
                tokens = _map_tokens(self._files[shard], header, first, min(header.num_tokens, first + _SAMPLED_TOKENS))
                self._check_vocabulary(tokens, shard, first)
                digest.update(tokens.tobytes())
        return digest.hexdigest()

    def _num_covered(self) -> int:
        """Tokens in at least one window; the last of a window may be the first of the next."""
        if self._begins is None:
            return self._num_windows * self._sequence_length + 1
        shared = int((np.diff(self._begins) == self._sequence_length).sum())
        return self._num_windows * (self._sequence_length + 1) - shared

    def _aligned_begins(self, bos_token_id: int) -> NDArray[np.int64]:
        """Where windows start that start at BOS tokens: the first one, then always the first at or after the end."""
        positions = np.concatenate(
            [
                _bos_positions(path, header, bos_token_id) + (end - header.num_tokens)
                for path, header, end in zip(self._files, self._headers, self._ends)
            ]
        )
        following = np.searchsorted(positions, positions + self._sequence_length).tolist()
        usable = int(np.searchsorted(positions, self._ends[-1] - self._sequence_length))
        chosen, index = [], 0
        while index < usable:
            chosen.append(index)
            index = following[index]
        if not chosen:
            raise ValueError(
                f"none of the {len(positions)} BOS tokens (bos_token_id={bos_token_id}) in {len(self._files)} shards, "
                f"{self._files[0]} first, has {self._sequence_length} tokens and a target after it; check "
                "bos_token_id, lower sequence_length or leave align_to_bos out"
            )
        begins = positions[chosen]
        for path, header, end in zip(self._files, self._headers, self._ends):
            first = end - header.num_tokens
            inside = slice(*np.searchsorted(begins, (first, end)))
            _check_listed(path, header, begins[inside] - first, bos_token_id)
        return begins


def _find_shards(paths: Paths) -> list[Path]:
    files: list[Path] = []
    for given in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.bin"), key=_natural)
            corpora = sorted({re.sub(r"[-_.]?\d*$", "", file.stem) for file in found})
            if len(corpora) > 1:
                raise ValueError(
                    f"{path} holds the shards of {', '.join(corpora)}; name one, as {path / corpora[0]}_*.bin"
                )
        elif path.is_file():
            found = [path]
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))
            found = sorted((match for match in matches if match.suffix != ".idx"), key=_natural)
        if not found:
            raise FileNotFoundError(f"{path} gives no .bin shard; give a file, a folder or a glob that exists")
        files += found
    if not files:
        raise FileNotFoundError("no path was given; give a file, a folder or a glob of .bin shards")
    file, times = Counter(file.resolve() for file in files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{file} is given {times} times, so its tokens would count {times}-fold; give each shard once")
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key by which `train_2` comes before `train_10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _map_tokens(path: Path, header: ShardHeader, first: int, last: int) -> NDArray:
    """Tokens `first` to `last` of a shard, mapped; the map closes with the last reference to it."""
    offset = HEADER_BYTES + first * header.dtype.itemsize
    return np.memmap(path, dtype=header.dtype, mode="r", offset=offset, shape=(last - first,))


def _bos_positions(path: Path, header: ShardHeader, bos_token_id: int) -> NDArray[np.int64]:
    """Positions of the BOS tokens of a shard, from its index if it has one, else from all of its tokens."""
    index = bos_index_path(path)
    if not index.exists():
        starts = range(0, header.num_tokens, _SCANNED_TOKENS)
        return np.concatenate([_scan(path, header, start, start + _SCANNED_TOKENS, bos_token_id) for start in starts])
    positions = np.fromfile(index, dtype="<i4").astype(np.int64)
    # An index of another version of the shard, or one that counts bytes, is wrong nearly everywhere.
    last = max(0, header.num_tokens - _SAMPLED_TOKENS)
    for first in (0, last):
        found = _scan(path, header, first, first + _SAMPLED_TOKENS, bos_token_id)
        listed = positions[(positions >= first) & (positions < first + _SAMPLED_TOKENS)]
        if not np.array_equal(found, listed):
            raise ValueError(
                f"{index} does not list the tokens {bos_token_id} of {path.name} (from token {first}: "
                f"{listed[:3].tolist()} listed, {found[:3].tolist()} found); delete it, or mend bos_token_id"
            )
    if len(positions) and (positions[0] < 0 or (np.diff(positions) <= 0).any() or positions[-1] >= header.num_tokens):
        raise ValueError(f"{index} has positions that do not ascend from 0 to below {header.num_tokens}; delete it")
    return positions


def _check_listed(path: Path, header: ShardHeader, positions: NDArray[np.int64], bos_token_id: int) -> None:
    """Raises ValueError where a shard has an index and holds another token than BOS at one of `positions`."""
    index = bos_index_path(path)
    if not index.exists():
        return
    tokens = _map_tokens(path, header, 0, header.num_tokens)[positions]
    wrong = np.flatnonzero(tokens != bos_token_id)
    if len(wrong):
        raise ValueError(
            f"{index} lists token {positions[wrong[0]]} of {path.name} as BOS (bos_token_id={bos_token_id}), but it is "
            f"{tokens[wrong[0]]}; delete it, or rebuild it by writing the shards again"
        )


def _scan(path: Path, header: ShardHeader, first: int, last: int, bos_token_id: int) -> NDArray[np.int64]:
    tokens = _map_tokens(path, header, first, min(last, header.num_tokens))
    return np.flatnonzero(tokens == bos_token_id) + first

"""The nanoGPT `.bin` format: a header of 256 int32, then token ids, all little endian; and its atomic writer.

Header fields: magic, version 1, number of tokens and, under the current magic, bytes per token (2 or 4). The legacy
magic of `fineweb.py` means 2. Beside a shard `NAME.bin` may stand `NAME.bos.idx`: int32 positions, in tokens from the
shard's first one, of its BOS tokens. NumPy alone, so that the command does not wait for torch.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAGIC = 278895051
LEGACY_MAGIC = 20240520
VERSION = 1
HEADER_FIELDS = 256
HEADER_BYTES = 4 * HEADER_FIELDS
# The header's count is an int32.
MAX_SHARD_TOKENS = 2**31 - 1

TokenType: TypeAlias = Literal["uint16", "uint32"]


class ShardHeader(NamedTuple):
    """What the header of a shard says, checked against the size of its file."""

    num_tokens: int
    dtype: np.dtype


def read_header(path: Path) -> ShardHeader:
    """The header of the shard at `path`; ValueError naming the file for anything but a whole shard."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"{path} has {size} bytes, a shard's header alone {HEADER_BYTES}: truncated; write it again")
    magic, version, num_tokens, item_size = np.fromfile(path, dtype="<i4", count=4).tolist()
    if magic not in (MAGIC, LEGACY_MAGIC):
        raise ValueError(
            f"{path} starts with {magic}, a token shard with {MAGIC} or {LEGACY_MAGIC}; give .bin files written by "
            "am-data prepare or by a nanoGPT script"
        )
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, only {VERSION} is known; write it again")
    if magic == LEGACY_MAGIC:
        item_size = 2
    if item_size not in (2, 4):
        raise ValueError(f"{path} says {item_size} bytes per token, which must be 2 or 4; write it again")
    if num_tokens < 1:
        raise ValueError(f"{path} says it holds {num_tokens} tokens, at least 1 is needed; leave the file out")
    expected = HEADER_BYTES + num_tokens * item_size
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ValueError(
            f"{path} is {state}: {size} bytes, but {num_tokens} tokens of {item_size} bytes and the header are "
            f"{expected}; copy or write it again"
        )
    return ShardHeader(num_tokens, np.dtype(f"<u{item_size}"))


def bos_index_path(path: Path) -> Path:
    """Where the positions of a shard's BOS tokens stand, if anywhere."""
    return path.with_suffix(".bos.idx")


class ShardWriter:
    """Shards `PREFIX_000000.bin`, ... of a folder, seen under their names only after `commit`.

    A context manager: shards are written to a hidden folder inside `folder`, which is removed on leaving, whatever
    happened. Leaving with an exception also takes back what was committed, so that of writers in one `ExitStack` all
    shards are there in the end, or none. Memory does not grow with the data, but for 4 bytes per document of the shard
    at hand.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        prefix: str = "train",
        shard_tokens: int = 100_000_000,
        dtype: TokenType = "uint16",
        bos_token_id: int | None = None,
        legacy: bool = False,
    ) -> None:
        if not re.fullmatch(r"[\w.-]*[A-Za-z_.-]", prefix):
            raise ValueError(f"prefix={prefix!r} must be letters, digits, '_', '.', '-', not ending in a digit")
        if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens={shard_tokens} must be in 1..{MAX_SHARD_TOKENS}, the header's int32")
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype={dtype!r} is unknown; choose 'uint16' or 'uint32'")
        if legacy and dtype != "uint16":
            raise ValueError(f"dtype={dtype!r}, but legacy shards hold uint16 alone; drop legacy=True")
        self._folder = Path(folder).expanduser()
        self._prefix = prefix
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype("<u2" if dtype == "uint16" else "<u4")
        self._bos_token_id = bos_token_id
        self._legacy = legacy
        self._num_documents = 0
        self._num_tokens = 0
        self._names: list[str] = []
        self._published: list[Path] = []
        self._file: BinaryIO | None = None
        self._filled = 0
        self._bos_positions: list[NDArray[np.int64]] = []

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens written so far, BOS tokens included."""
        return self._num_tokens

    def __enter__(self) -> Self:
        self._refuse_existing()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self._prefix}-", suffix=".partial", dir=self._folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._staging, ignore_errors=True)
        if kind is not None:
            for path in self._published:
                path.unlink(missing_ok=True)

    def write(self, document: ArrayLike) -> None:
        """Append one document of token ids `[S]`, after a BOS token if there is one and it does not start with it."""
        ids = np.asarray(document)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"document {self._num_documents} is {ids.dtype} of shape {ids.shape}; give integer token ids [S], S > 0"
            )
        if self._bos_token_id is not None and ids[0] != self._bos_token_id:
            ids = np.concatenate([np.array([self._bos_token_id], dtype=np.int64), ids])
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme <= np.iinfo(self._dtype).max:
                raise ValueError(
                    f"document {self._num_documents} has token id {extreme}; {self._dtype.name} holds "
                    f"0..{np.iinfo(self._dtype).max}; " + ("mend the ids" if extreme < 0 else "write uint32 shards")
                )
        self._num_documents += 1
        self._num_tokens += len(ids)
        while len(ids):
            part, ids = np.split(ids, [self._shard_tokens - self._filled])
            self._append(part.astype(self._dtype))

    def commit(self) -> list[Path]:
        """Give the shards their names, all written and synced to disk before, and return them in order.

        Only a process killed between the renames leaves some of them. Raises ValueError if there is no document,
        FileExistsError if other shards of the prefix have come up.
        """
        self._close()
        if not self._names:
            raise ValueError(f"there are no documents for {self._folder / self._prefix}_*.bin; give at least one")
        self._refuse_existing()
        for path in sorted(self._staging.iterdir()):
            self._published.append(path.rename(self._folder / path.name))
        _sync_folder(self._folder)
        return [self._folder / name for name in self._names]

    def _refuse_existing(self) -> None:
        existing = sorted(self._folder.glob(f"{self._prefix}_[0-9]*.bin"))
        if existing:
            raise FileExistsError(
                f"{existing[0]} exists; move the {len(existing)} shards of prefix {self._prefix!r} away, or choose "
                "another folder or prefix"
            )

    def _append(self, part: NDArray) -> None:
        if self._file is None:
            self._names.append(f"{self._prefix}_{len(self._names):06d}.bin")
            self._file = (self._staging / self._names[-1]).open("wb")
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(part.tobytes())
        if self._bos_token_id is not None:
            self._bos_positions.append(np.flatnonzero(part == self._bos_token_id) + self._filled)
        self._filled += len(part)
        if self._filled == self._shard_tokens:
            self._close()

    def _close(self) -> None:
        """Finish the open shard, if any: its header, its BOS positions, and all of it on the disk."""
        if self._file is None:
            return
        header = np.zeros(HEADER_FIELDS, dtype="<i4")
        header[:3] = (LEGACY_MAGIC if self._legacy else MAGIC, VERSION, self._filled)
        if not self._legacy:
            header[3] = self._dtype.itemsize
        self._file.seek(0)
        self._file.write(header.tobytes())
        _sync(self._file)
        if self._bos_token_id is not None:
            with bos_index_path(self._staging / self._names[-1]).open("wb") as file:
                file.write(np.concatenate(self._bos_positions).astype("<i4").tobytes())
                _sync(file)
        self._file.close()
        self._file, self._filled, self._bos_positions = None, 0, []


def write_token_shards(
    documents: Iterable[ArrayLike],
    folder: str | Path,
    *,
    prefix: str = "train",
    shard_tokens: int = 100_000_000,
    dtype: TokenType = "uint16",
    bos_token_id: int | None = None,
    legacy: bool = False,
) -> list[Path]:
    """Write documents, each token ids `[S]`, as nanoGPT shards `folder/PREFIX_000000.bin`, ...; return their paths.

    Documents are streamed one after the other, each after a `bos_token_id` if that is given; a shard holds exactly
    `shard_tokens` tokens, the last one what is left, so a document may go on in the next shard. With `bos_token_id` the
    positions of BOS tokens stand beside each shard as `.bos.idx` (int32). `legacy`: the older header, uint16 alone.

    The shards get their names when all are on the disk. One process calls it. Raises FileExistsError if the folder has
    shards of that prefix, ValueError for no documents, an empty one, or an id that `dtype` does not hold.
    """
    with ShardWriter(
        folder, prefix=prefix, shard_tokens=shard_tokens, dtype=dtype, bos_token_id=bos_token_id, legacy=legacy
    ) as writer:
        for document in documents:
            writer.write(document)
        return writer.commit()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Durable file operations: exclusive creation, fallocate, complete reads and writes, fsync.

Nothing here knows about tensors. Every write is checked to the last byte and fsynced before the function returns;
an fsync error is final, since the kernel may have dropped the pages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from am_ckpt.errors import UnsafeError

# Writes are cut here so that a signal or a short write repeats little.
_MAX_WRITE = 64 * 2**20
# Of data after a header: each block has a digest of its own, so that damage is found to a few tensors.
BLOCK_BYTES = 16 * 2**20
# Hashed and written or read at once: what the first has brought into the cache, the second finds there.
PIECE_BYTES = 2**20
# What file systems without fallocate answer.
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of `data`, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def file_digest(path: Path) -> str:
    """xxh3-128 of the file's content, read in 1 MiB blocks."""
    hasher = xxhash.xxh3_128()
    descriptor = open_for_reading(path)
    try:
        while block := os.read(descriptor, 2**20):
            hasher.update(block)
    except OSError as error:
        raise _with_path(error, path) from error
    finally:
        os.close(descriptor)
    return hasher.hexdigest()


def open_for_reading(path: Path, *, follow_symlinks: bool = False) -> int:
    """A descriptor of a regular file; a symbolic link, FIFO or device raises `UnsafeError` instead of being followed.

    `follow_symlinks=True` follows the links of `linked_file`, and no others.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        descriptor = os.open(linked_file(path) if follow_symlinks else path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(
                f"{path} is a symbolic link; checkpoints consist of regular files: put the file itself there (cp -L)"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeError(f"{path} is not a regular file; put the file itself there")
    return descriptor


def linked_file(path: Path) -> Path:
    """`path`, or where that is a link of the Hugging Face cache, the file in `blobs/` of the same model it leads to.

    Any other link raises `UnsafeError`: a checkpoint that comes from elsewhere could publish files of this machine.
    """
    if not path.is_symlink():
        return path
    target, folder = (Path(os.path.realpath(place)) for place in (path, path.parent))
    # MODEL/snapshots/REVISION/NAME; as realpath leaves no links, blobs/ is none either.
    if target.parent not in [place.parent / "blobs" for place in folder.parents if place.name == "snapshots"]:
        raise UnsafeError(
            f"{path} is a symbolic link to {target}; only those of the Hugging Face cache are followed, into its own "
            "blobs/: put the file itself there (cp -L)"
        )
    return target


def read_exactly(descriptor: int, buffer: bytearray | memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of the file; raises `ValueError` where the file ends before."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + _MAX_WRITE]], offset + done)
        except OSError as error:
            raise _with_path(error, path) from error
        if count == 0:
            raise ValueError(
                f"{path}: truncated: it ends at byte {offset + done}, byte {offset + len(view)} was needed; copy the "
                "file again"
            )
        done += count


def write_all(
    descriptor: int, data: bytes | bytearray | memoryview, offset: int, path: str | Path | None = None
) -> None:
    """Write every byte of `data` at `offset`, absorbing short writes. `path`: for errors that no caller names."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(descriptor, view[done : done + _MAX_WRITE], offset + done)
        except OSError as error:
            raise _with_path(error, path) from error


def create(path: Path, size: int) -> int:
    """Create `path` exclusively and reserve `size` bytes where the file system can; returns the descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if size and sys.platform == "linux":
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
    except OSError as error:
        os.close(descriptor)
        raise _with_path(error, path) from error
    return descriptor


def _with_path(error: OSError, path: str | Path | None) -> OSError:
    """System calls on descriptors do not know the file's name: add it."""
    if path is None or error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


@contextlib.contextmanager
def new_file(path: Path, size: int) -> Iterator[int]:
    """The descriptor of a new file with room for `size` bytes; fsynced and closed afterwards, errors name it."""
    with _synced(create(path, size), path) as descriptor:
        yield descriptor


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[int]:
    """The same of a file that is there, to write parts of it."""
    with _synced(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), path) as descriptor:
        yield descriptor


@contextlib.contextmanager
def _synced(descriptor: int, path: Path) -> Iterator[int]:
    try:
        yield descriptor
        os.fsync(descriptor)
    except OSError as error:
        raise _with_path(error, path) from error
    finally:
        os.close(descriptor)


class BlockDigests:
    """xxh3-128 of every 16 MiB of the data that it is given."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self._left = BLOCK_BYTES
        self._digests: list[str] = []

    def update(self, data: memoryview) -> None:
        while len(data) >= self._left:
            self._hasher.update(data[: self._left])
            data = data[self._left :]
            self._digests.append(self._hasher.hexdigest())
            self._hasher.reset()
            self._left = BLOCK_BYTES
        self._hasher.update(data)
        self._left -= len(data)

    def hexdigests(self) -> list[str]:
        """Of all data until now; the last block may be shorter."""
        return self._digests + ([self._hasher.hexdigest()] if self._left < BLOCK_BYTES else [])


def block_digests(path: Path, begin: int) -> list[str]:
    """xxh3-128 of every 16 MiB of a file from byte `begin` on."""
    digests = BlockDigests()
    buffer = memoryview(bytearray(PIECE_BYTES))
    descriptor = open_for_reading(path)
    try:
        while count := os.preadv(descriptor, [buffer], begin):
            digests.update(buffer[:count])
            begin += count
    except OSError as error:
        raise _with_path(error, path) from error
    finally:
        os.close(descriptor)
    return digests.hexdigests()


def write_file(path: Path, header: bytes, size: int, blocks: Iterable[memoryview]) -> dict[str, Any]:
    """Write `header` and then `blocks` to a new file of `size` bytes in all, fsync it, and return its record.

    The record: `bytes`, `header_xxh3_128`, and `blocks_xxh3_128` of every 16 MiB after the header. The header
    names the save, so only the latter are equal for equal content.
    """
    digests = BlockDigests()
    with new_file(path, size) as descriptor:
        write_all(descriptor, header, 0)
        position = len(header)
        for block in blocks:
            for start in range(0, len(block), PIECE_BYTES):
                piece = block[start : start + PIECE_BYTES]
                digests.update(piece)
                write_all(descriptor, piece, position)
                position += len(piece)
        if position != size:
            raise AssertionError(f"{path}: wrote {position} bytes, planned {size}")
    return {"bytes": size, "header_xxh3_128": digest(header), "blocks_xxh3_128": digests.hexdigests()}


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a small new file durably; returns its record (`bytes`, `xxh3_128`)."""
    with new_file(path, len(content)) as descriptor:
        write_all(descriptor, content, 0)
    return {"bytes": len(content), "xxh3_128": digest(content)}


def fsync_directory(path: Path) -> None:
    """Make the names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(directory: Path, planned_bytes: int) -> None:
    """Raise `OSError(ENOSPC)` unless the file system holds `planned_bytes` plus 2 %."""
    needed = planned_bytes + planned_bytes // 50
    information = os.statvfs(directory)
    free = information.f_bavail * information.f_frsize
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"needed {needed} bytes ({needed / 2**30:.2f} GiB, 2 % of it margin), free are {free} "
            f"({free / 2**30:.2f} GiB); "
            "free some space, lower keep_last, or choose another directory",
            str(directory),
        )

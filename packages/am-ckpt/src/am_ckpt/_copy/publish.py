"""How a folder gets its name, or another one's, and how it goes: renames that a crash may fall between.

Nothing here knows what is in the folders. `exchange` and `publish_folder` put one in the place of another, `remove`
deletes one in two steps, `staging_folder` is where one process writes what will be renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from am_ckpt._io import fsync_directory

# Of renameat2(2).
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What kernels and file systems (NFS) answer that know no exchange.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# What file systems without hard links answer.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
_LOCK = "lock"


def point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to `target`, replacing an older link atomically."""
    # One name, so that what a crash leaves here is taken away by the next call.
    temporary = link.with_name(f".{link.name}-new")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    try:
        os.replace(temporary, link)
    except OSError:
        os.unlink(temporary)
        raise
    fsync_directory(link.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where the system knows no such."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        rename = library.renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def is_filled(path: Path) -> bool:
    """Whether there is such a folder with something in it."""
    while path.exists():
        before = os.stat(path)
        if any(path.iterdir()):
            return True
        # Another process may have replaced the folder, and emptied this one, while it was listed.
        if os.path.samestat(before, os.stat(path)):
            return False
    return False


def publish_folder(folder: Path, target: Path) -> None:
    """Give `folder` the name `target`. What is there, if anything, gets the name `folder`.

    Where the system cannot exchange folders there is a moment without `target`; `put_back` then ends what a
    kill or a power cut has cut short, an error is undone here. For the one process that writes `target`. Without
    hard links either, a power cut needs a file system that keeps a rename whole.
    """
    if not is_filled(target):
        os.rename(folder, target)
    elif not exchange(folder, target):
        aside = _aside(target)
        try:
            # Durable under its second name, before the first one goes.
            _link_tree(target, aside)
            fsync_directory(target.parent)
            away = folder.with_name(f"{folder.name}-{os.urandom(4).hex()}")
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if error.errno not in _NO_LINKS:
                raise
            away = aside
        os.rename(target, away)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(aside, target)
            raise
        fsync_directory(target.parent)
        os.rename(aside, folder)


def _link_tree(folder: Path, copy: Path) -> None:
    """Make a durable copy of a folder out of hard links."""
    os.mkdir(copy)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _link_tree(entry, copy / entry.name)
        else:
            os.link(entry, copy / entry.name)
    fsync_directory(copy)


def put_back(target: Path) -> None:
    """Undo a `publish_folder` that was killed on its way. For the one process that writes `target`."""
    aside = _aside(target)
    if not aside.exists():
        return
    if is_filled(target):
        # Killed when the new folder had its name, or while the links were made.
        remove(aside)
    else:
        os.rename(aside, target)
        fsync_directory(target.parent)


def was_cut_short(target: Path) -> bool:
    """Whether there is something for `put_back` to do."""
    return _aside(target).exists()


def _aside(target: Path) -> Path:
    # Beside it and not in a staging folder: those are removed.
    return target.with_name(f".{target.name}-replaced")


def set_aside(path: Path) -> Path:
    """Rename a folder that is to be deleted to a name by which others know that; returns it."""
    trash = path.with_name(f".trash-{path.name}-{os.urandom(4).hex()}")
    os.rename(path, trash)
    return trash


def remove(path: Path) -> None:
    """Delete a folder in two steps, so that a crash never leaves a half-deleted one under its own name."""
    trash = set_aside(path)
    fsync_directory(path.parent)
    shutil.rmtree(trash)


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """The staging folder of `target`, held by this process alone; `FileExistsError` while another has it.

    What a process that died left in it is there still. What one left of an older `target`, or half deleted, is not.
    """
    staging = target.with_name(f".{target.name}.merging")
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # Not exist_ok=True, which fails where the folder is removed at that moment.
        with contextlib.suppress(FileExistsError):
            staging.mkdir()
        try:
            lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # Whoever had the folder has just removed it.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(staging / _LOCK)):
                break
        except BlockingIOError as error:
            os.close(lock)
            raise FileExistsError(
                f"another process is merging to the same destination (its folder is {staging}); wait for it"
            ) from error
        except FileNotFoundError:
            pass
        os.close(lock)
    try:
        put_back(target)
        for entry in target.parent.iterdir():
            if entry.name.startswith(f".trash-{staging.name}-"):
                shutil.rmtree(entry, ignore_errors=True)
        yield staging
    finally:
        os.close(lock)


def discard(staging: Path) -> None:
    """Remove the staging folder as far as that works; the next writer removes the rest."""
    with contextlib.suppress(OSError):
        shutil.rmtree(set_aside(staging), ignore_errors=True)

"""What can be wrong with a checkpoint, told apart for exit codes. All of those are `ValueError` to callers."""

from __future__ import annotations


class UnsafeError(ValueError):
    """Input that could do more than be read: code in a pickle, a path out of the folder, a link, a device."""


class IncompleteError(ValueError):
    """Parts of a checkpoint are not there: elements that no file holds, tensors that the config calls for."""


class NewerError(ValueError):
    """A checkpoint of a later format version: nothing is wrong with it, and nothing may be done to it."""


class MissingTorchError(ImportError):
    """What was asked for needs torch, which is not installed."""


class ArgumentError(ValueError):
    """An argument that cannot be honoured, whatever the checkpoint holds."""


_EXIT_CODES = (
    (ArgumentError, 1),
    (MissingTorchError, 1),
    (NewerError, 8),
    (IncompleteError, 3),
    (UnsafeError, 4),
    (FileNotFoundError, 3),
    (FileExistsError, 6),
    (ValueError, 2),
    (OSError, 5),
)


def exit_code(error: Exception) -> int:
    """What the command `am-ckpt` exits with after a `ValueError`, `OSError` or `MissingTorchError`."""
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))

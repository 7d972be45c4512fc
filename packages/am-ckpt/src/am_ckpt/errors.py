"""The errors of am-ckpt that a caller may want to tell apart; all of them are names of `am_ckpt` too.

What is wrong with a checkpoint or an argument is a `ValueError`: one of these, or a plain one where bytes are damaged.
What the system refuses stays an `OSError`.
"""

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

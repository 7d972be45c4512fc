"""A disk that is full, without filling one."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """While inside, writing to a file of this process beyond `num_bytes` fails, much as on a full disk: OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # There is a signal, too, which Python ignores.
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

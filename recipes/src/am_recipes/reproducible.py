"""`deterministic: true`: the same run again gives the same numbers, to the bit.

What a run draws is a function of its seed and position in any case. What is left is the order in which sums are taken:
some operations, most of them on GPUs, add up in whatever order threads come. This lets torch choose the others.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from am_recipes.run_config import RunConfig

KEY = "deterministic"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Buffers of cuBLAS with which its results do not depend on timing (its documentation, "Results reproducibility"): eight
# of 4 MiB, or of 16 KiB for less memory.
WORKSPACES = (":4096:8", ":16:8")
_REFUSAL = re.compile(r"(?P<op>.+?) does not have a deterministic implementation")


@contextlib.contextmanager
def as_asked(config: RunConfig) -> Iterator[None]:
    """While entered, torch is deterministic where `deterministic` asks for it; then as it was before.

    Enter it before anything runs on a GPU. `CUBLAS_WORKSPACE_CONFIG` stays set: cuBLAS reads it once in a process.
    ValueError where the environment has another value of it, where it comes too late, and for an operation that has no
    deterministic form.
    """
    if not config.deterministic:
        yield
        return
    with config.at(KEY):
        _set_workspace()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        refusal = _REFUSAL.match(str(error))
        if refusal is None:
            raise
        with config.at(KEY):
            raise ValueError(
                f"true, and {refusal['op']} has no deterministic form in torch {torch.__version__}: the traceback says "
                "who calls it; use another operation there, or set deterministic: false"
            ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _set_workspace() -> None:
    given = os.environ.get(WORKSPACE)
    if given is not None and given not in WORKSPACES:
        raise ValueError(
            f"true needs {WORKSPACE} to be one of {', '.join(WORKSPACES)}, and the environment has {given!r}; unset it"
        )
    if given is None and torch.cuda.is_available():
        if torch.cuda.is_initialized():
            raise ValueError(
                f"true comes too late: this process has used the GPU already, and cuBLAS reads {WORKSPACE} once; set "
                f'os.environ["{WORKSPACE}"] = "{WORKSPACES[0]}" before the first use, or start the process anew'
            )
        os.environ[WORKSPACE] = WORKSPACES[0]

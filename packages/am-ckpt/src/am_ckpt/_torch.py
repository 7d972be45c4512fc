"""torch is optional: what needs it asks here first, so that who has none learns what to install, and why."""

from __future__ import annotations

from am_ckpt.errors import MissingTorchError


def require_torch(purpose: str) -> None:
    """Raise `MissingTorchError` where torch is not installed. `purpose`: what needs it; the message begins with it."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        # A torch that is there and broken says itself what it lacks.
        if error.name != "torch":
            raise
        raise MissingTorchError(
            f"{purpose} needs the package torch (2.11 or later), which is not installed; pip install 'am-ckpt[torch]'"
        ) from None

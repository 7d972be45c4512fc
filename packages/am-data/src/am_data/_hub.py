"""Whether a name is a dataset of the hub that can be read from here; if not, what happened and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def require_on_hub(name: str) -> None:
    """Refuse a name that is no dataset of the hub, or of its cache: at once; `datasets` would try for a minute.

    Raises FileNotFoundError where there is none of this name, PermissionError where it may not be read, and
    ConnectionError where the hub gives no answer for now.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    try:
        # Nothing is downloaded yet.
        huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=[])
    except LocalEntryNotFoundError as error:
        # So it ends for want of a cache, after whatever the hub said before.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(name, error.__cause__) from error
        raise FileNotFoundError(
            f"{name} does not exist here, and as a dataset of the hub it is not in the cache, and the hub cannot be "
            "reached; check the path, or download it where the hub can be reached"
        ) from error
    except HfHubHTTPError as error:
        raise _refused(name, error) from error
    except ValueError as error:
        raise FileNotFoundError(f"{name} does not exist, neither here nor as a dataset of the hub: {error}") from error


def _refused(name: str, error: HfHubHTTPError) -> OSError:
    """What the hub's answer means."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    said = str(error).strip().splitlines()[0].rstrip(".:")
    status = error.response.status_code
    # Is a RepositoryNotFoundError too.
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{name} is a gated dataset of the hub ({said}): ask for access at {ENDPOINT}/datasets/{name}, and give a "
            "token of the account that has it (hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{name} does not exist, neither here nor as a dataset of the hub ({said}); check the name, or for a "
            "private dataset give a token that may read it (hf auth login, or HF_TOKEN)"
        )
    if status in (401, 403):
        return PermissionError(
            f"{name} may not be read from the hub ({said}): give a token that may (hf auth login, or HF_TOKEN)"
        )
    if status == 429:
        return ConnectionError(
            f"{name} was not looked up, the hub has had too many requests from here ({said}): wait some minutes and "
            "try again; a token (hf auth login, or HF_TOKEN) allows more"
        )
    if status >= 500:
        return ConnectionError(f"{name} was not looked up, the hub is in trouble ({said}): try again later")
    return OSError(f"{name} cannot be read from the hub ({said}); check the name and {ENDPOINT}/datasets/{name}")

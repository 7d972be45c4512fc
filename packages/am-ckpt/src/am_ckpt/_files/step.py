"""The folder of checkpoints: names, manifests, and which steps can be trusted.

A step exists when `step_000100/manifest.json` is there, whole (it carries the digest of itself) and names files that
are there with the sizes it says. The links `latest` and `best` are for people: nothing here reads them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.safetensors import Header, is_sizes, parse_json, read_header
from am_ckpt._io import block_digests, digest, file_digest, open_for_reading, read_exactly
from am_ckpt.errors import NewerError, UnsafeError

FORMAT = "am-ckpt"
VERSION = 1
MANIFEST = "manifest.json"
STAGING = ".staging-"
# Of a config, a tokenizer or code.
MAX_SMALL_BYTES = 2**28
# Of one manifest: room for a million tensors, and a bound on what a damaged file can make us allocate.
_MAX_MANIFEST_BYTES = 256 * 2**20

_STEP = re.compile(r"step_(\d{6,})")
_PART = re.compile(r"[\w.\-+ ]+")


def step_name(step: int) -> str:
    """`step_000100`."""
    return f"step_{step:06d}"


def require_file_name(name: str, what: str) -> None:
    """Raise `ValueError` unless `name` is a plain file name: no folders, no `..`, no control characters."""
    if not _PART.fullmatch(name) or name.startswith(".") or len(name) > 200:
        raise ValueError(
            f"{what} {name!r} is not a plain file name; use letters, digits, '.', '-', '_' and no leading dot"
        )


def seal(manifest: dict[str, Any]) -> bytes:
    """The manifest as the bytes of its file, with the digest of its content."""
    return _text({**manifest, "xxh3_128": digest(_text(manifest))})


def _text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode()


def read_file(path: Path, limit: int, *, follow_symlinks: bool = False) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    descriptor = open_for_reading(path, follow_symlinks=follow_symlinks)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise ValueError(f"{path} has {size} bytes, more than the {limit} allowed")
        content = bytearray(size)
        read_exactly(descriptor, content, 0, path)
        return bytes(content)
    finally:
        os.close(descriptor)


def read_manifest(step: Path) -> dict[str, Any]:
    """The manifest of a step folder; `ValueError` says what is wrong with it."""
    path = step / MANIFEST
    try:
        manifest = parse_json(read_file(path, _MAX_MANIFEST_BYTES), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{step} is not a checkpoint: it has no {MANIFEST} (an unfinished or foreign folder)"
        ) from error
    except UnsafeError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; copy it again or take another step") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest of {FORMAT}")
    number = manifest.get("version")
    if type(number) is int and number > VERSION:
        raise NewerError(
            f"{path} was written by a newer am_ckpt: it has format version {number}, this release reads {VERSION}; "
            "take the release that wrote it"
        )
    if number != VERSION:
        raise ValueError(f"{path} has format version {number!r}; this release reads version {VERSION}")
    found = manifest.pop("xxh3_128", None)
    if digest(_text(manifest)) != found:
        raise ValueError(
            f"{path} is damaged: its content does not have the digest it carries; copy it again or take another step"
        )
    require_manifest(manifest, str(path))
    if "dcp" not in manifest:
        require_own_number(step, manifest["step"])
    return manifest


def require_own_number(folder: Path, step: int) -> None:
    """Raise `ValueError` for a folder that is named as another step than the one that it holds."""
    if _STEP.fullmatch(folder.name) and folder.name != step_name(step):
        raise ValueError(
            f"{folder} holds step {step}, not the one that it is named after: it was renamed; call it "
            f"{step_name(step)} again, or anything that is no name of a step"
        )


def read_complete(step: Path) -> dict[str, Any]:
    """The manifest of `step`, after checking that every file is there with its size; `ValueError` names one."""
    manifest = read_manifest(step)
    for record in manifest["files"]:
        path = step / record["path"]
        try:
            size = path.lstat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{path} is missing; the checkpoint is incomplete") from error
        if size != record["bytes"]:
            raise ValueError(f"{path} has {size} bytes instead of {record['bytes']}; it is damaged")
    return manifest


def check_step(step: Path) -> dict[str, Any]:
    """The manifest of `step`, after checking that the checkpoint is whole.

    Every file must be there with its size, every safetensors header must have its digest and parse, and every file
    that is not tensors of the model or an optimizer must have its digest. Raises `ValueError` naming the file.
    """
    manifest = read_complete(step)
    for record in manifest["files"]:
        path = step / record["path"]
        header = checked_header(path, record) if "header_xxh3_128" in record else None
        if record["path"].startswith("state/"):
            if header is None:
                same = file_digest(path) == record["xxh3_128"]
            else:
                same = block_digests(path, header.data_start) == record["blocks_xxh3_128"]
            if not same:
                raise ValueError(f"{path} is damaged: its digest is not the one in {MANIFEST}")
    return manifest


def checked_header(path: Path, record: dict[str, Any], like: Header | None = None) -> Header:
    """The header of a safetensors file of a checkpoint, if it is the one that was written.

    `like`: a header that is likely to describe the same tensors.
    """
    header = read_header(path, like=like)
    if digest(header.text) != record["header_xxh3_128"]:
        raise ValueError(f"{path} is damaged: its header does not have the digest in {MANIFEST}")
    return header


def steps(directory: Path) -> list[tuple[int, Path]]:
    """Everything named like a step, newest (highest step) first, whole or not: links to folders elsewhere too."""
    found = []
    if directory.is_dir():
        for entry in directory.iterdir():
            match = _STEP.fullmatch(entry.name)
            if match and entry.name == step_name(int(match[1])):
                found.append((int(match[1]), entry))
    return sorted(found, reverse=True)


@dataclass(frozen=True)
class Best:
    """Which metric makes a step the best, and how many of the best to keep."""

    metric: str
    mode: str
    count: int

    def order(self, metrics: dict[str, float]) -> float:
        """Sort key of a step, the best first; steps without the metric, or where it is not finite, are infinity."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value


def rank_best(manifests: list[dict[str, Any]], best: Best) -> list[int]:
    """Steps that have the metric, best first; of equal ones the newer first."""
    scored = [(best.order(metrics_of(m)), -m["step"], m["step"]) for m in manifests]
    return [step for order, _, step in sorted(scored) if order < math.inf]


def metrics_of(manifest: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step as floats; they are stored as text, since JSON has no NaN."""
    return {name: float(value) for name, value in manifest["metrics"].items()}


# What a manifest must look like before anything believes it: a digest shows damage, not who wrote the file.


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_metric(value: Any) -> bool:
    return type(value) in (int, float) or value in ("nan", "inf", "-inf")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and value.get("dtype") in (*ITEM_BYTES,) and is_sizes(value.get("shape"))


def _is_digested_box(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) == 3 and is_sizes(value[0]) and is_sizes(value[1])
    return fits and len(value[0]) == len(value[1]) and _is_text(value[2])


def _lists(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _maps(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_published(value: Any) -> bool:
    fits = isinstance(value, dict) and set(value) == {"mapping", "parameters"}
    return fits and _lists(_is_object)(value["mapping"]) and _maps(_is_tensor)(value["parameters"])


def _is_dcp(value: Any) -> bool:
    keys = _lists(lambda key: type(key) in (str, int))
    return isinstance(value, dict) and _is_text(value.get("prefix")) and _maps(keys)(value.get("paths"))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "model": lambda value: value in ("module", "adapter"),
    "state": _lists(_is_text),
    "optimizers": _lists(_is_text),
    "aliases": _maps(_is_text),
    "metrics": _maps(_is_metric),
    "fingerprints": _is_object,
    "mapping": lambda value: value is None or _lists(_is_object)(value),
    "published": _is_published,
    "dcp": _is_dcp,
    "ephemeral": lambda value: value is True,
    "tensors": lambda value: _maps(_maps(_is_tensor))(value) and {"model", "optim"} <= set(value),
    "files": _lists(_is_object),
}
_RECORD: dict[str, Callable[[Any], bool]] = {
    "path": _is_text,
    "bytes": _is_count,
    "rank": _is_count,
    "xxh3_128": _is_text,
    "header_xxh3_128": _is_text,
    "blocks_xxh3_128": _lists(_is_text),
    "boxes_xxh3_128": _maps(_lists(_is_digested_box)),
}
# Of a file of tensors, of one that several ranks wrote, and of any other.
_DIGESTS = ({"header_xxh3_128", "blocks_xxh3_128"}, {"header_xxh3_128", "boxes_xxh3_128"}, {"xxh3_128"})


def require_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` unless every field has its type, `UnsafeError` where a path leads out of the step."""
    _require(manifest, _FIELDS, {"published", "dcp", "ephemeral"}, where)
    seen: set[str] = set()
    for number, record in enumerate(manifest["files"]):
        _require(record, _RECORD, set().union(*_DIGESTS), f"{where}, files[{number}]")
        path = record["path"]
        if set(record) & set().union(*_DIGESTS) not in _DIGESTS:
            raise ValueError(f"{where}, files[{number}]: {path} has the digests of no kind of file")
        parts = path.split("/")
        plain = len(parts) == 2 and not any(part in ("", ".", "..") or not part.isprintable() for part in parts)
        if not plain:
            raise UnsafeError(f"{where} names the file {path!r}; only files in folders of the step are read")
        if path in seen:
            raise ValueError(f"{where} names the file {path!r} twice")
        seen.add(path)


def _require(
    value: Mapping[str, Any], fields: Mapping[str, Callable[[Any], bool]], optional: set[str], where: str
) -> None:
    for name, check in fields.items():
        if name not in value and name in optional:
            continue
        if name not in value or not check(value[name]):
            found = f"{name}={value[name]!r:.200}" if name in value else f"no {name}"
            raise ValueError(f"{where} is damaged or of another program: it has {found}")

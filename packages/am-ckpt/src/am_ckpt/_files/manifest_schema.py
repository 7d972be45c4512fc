"""What a manifest must look like before anything believes it: a digest shows damage, not who wrote the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.safetensors import is_sizes
from am_ckpt.errors import UnsafeError


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
    _require(manifest, _FIELDS, {"published", "dcp"}, where)
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

"""What a manifest must look like before anything believes it: a digest shows damage, not who wrote the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from am_ckpt._errors import UnsafeError
from am_ckpt._format import ITEM_BYTES, is_sizes


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_metric(value: Any) -> bool:
    return type(value) in (int, float) or value in ("nan", "inf", "-inf")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and value.get("dtype") in (*ITEM_BYTES,) and is_sizes(value.get("shape"))


def _maps(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "model": lambda value: value in ("module", "adapter"),
    "state": _is_texts,
    "optimizers": _is_texts,
    "aliases": _maps(_is_text),
    "metrics": _maps(_is_metric),
    "fingerprints": lambda value: isinstance(value, dict),
    "mapping": lambda value: value is None or (isinstance(value, list) and all(isinstance(x, dict) for x in value)),
    "tensors": lambda value: _maps(_maps(_is_tensor))(value) and {"model", "optim"} <= set(value),
    "files": lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value),
}
_RECORD: dict[str, Callable[[Any], bool]] = {
    "path": _is_text,
    "bytes": _is_count,
    "rank": _is_count,
    "xxh3_128": _is_text,
    "header_xxh3_128": _is_text,
    "blocks_xxh3_128": _is_texts,
}
# Of a file of tensors, and of any other.
_DIGESTS = ({"header_xxh3_128", "blocks_xxh3_128"}, {"xxh3_128"})


def require_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` unless every field has its type, ``UnsafeError`` where a path leads out of the step."""
    _require(manifest, _FIELDS, set(), where)
    seen: set[str] = set()
    for number, record in enumerate(manifest["files"]):
        _require(record, _RECORD, set().union(*_DIGESTS), f"{where}, files[{number}]")
        path = record["path"]
        if set(record) & set().union(*_DIGESTS) not in _DIGESTS:
            raise ValueError(f"{where}, files[{number}]: {path} needs either {' and '.join(_DIGESTS[0])} or xxh3_128")
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

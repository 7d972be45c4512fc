"""The files of a Hugging Face folder: their names, which are copied along, and how weights are cut into several."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.safetensors import Header, element_count, read_header
from am_ckpt._io import linked_file
from am_ckpt.errors import ArgumentError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What the bytes of the other files are: written by merge(digest=True), checked by verify.
DIGESTS = "am_ckpt_digests.json"
# In the metadata of the weight files of an export, of `save_hf` and `merge`: the names of all its files.
EXPORT_KEY = "am_ckpt_export"
# What wrappers of modules put into the names of parameters.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COPIED = ("*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("*.index.json", "adapter_config.json", "trainer_state.json", "fqn_to_*_mapping.json", DIGESTS)


def hf_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The small files of a Hugging Face folder by name: config, tokenizer, chat template, code, licence; no weights.

    What `save_hf` copies from `files_from`; also fit for `Checkpointer(files=)`. Raises `ValueError` where one is a
    link, unless it is one of the Hugging Face cache, into its own `blobs/`.
    """
    found = {}
    for path in sorted(Path(folder).iterdir()):
        wanted = any(fnmatchcase(path.name, pattern) for pattern in _COPIED)
        if wanted and path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED):
            linked_file(path)
            found[path.name] = path
    return found


def exported_files(folder: Path) -> set[str]:
    """The files of which an export consisted, as all weight files of `folder` say; none where they do not."""
    said: set[str] = set()
    for path in folder.glob("*.safetensors"):
        try:
            said.add(read_header(path).metadata.get(EXPORT_KEY, "[]"))
        except ValueError:
            # Damaged, or a link: not what was exported.
            return set()
    try:
        names = json.loads(said.pop()) if len(said) == 1 else []
    except (ValueError, RecursionError):
        return set()
    return set(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else set()


def require_replaceable(target: Path, source: Path | None = None) -> None:
    """Raise `FileExistsError` unless a folder holds nothing but what an export wrote there, all of which may be lost.

    `source`: what was to be written there, for the message.
    """
    with os.scandir(target) as entries:
        there = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    listed = exported_files(target)
    others = sorted(name for name, is_file in there.items() if not is_file or name not in listed)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        swapped = f" (if {source} was to be replaced, the two are swapped: the source comes first)" if source else ""
        raise FileExistsError(
            f"{target} is not replaced: it holds {', '.join(others[:5])}{more}, which no export of am_ckpt wrote; move "
            f"the folder away or choose another{swapped}"
        )


def byte_count(size: int | str) -> int:
    """Bytes in `size`: a number, or text such as `"5GB"` (decimal) or `"5GiB"`."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B", size)
    if match is None:
        raise ArgumentError(f"max_shard_size={size!r} must be a number of bytes, or text such as '5GB' or '500MiB'")
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")


def weight_index(headers: Mapping[str, Header]) -> bytes:
    """The content of `model.safetensors.index.json` for weight files with these headers."""
    size = sum(header.file_bytes - header.data_start for header in headers.values())
    home = {tensor: name for name, header in headers.items() for tensor in header.columns.names}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(home.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def weight_files(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_bytes: int
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Distribute `tensors` (name -> dtype and shape), in order, to files of at most `max_shard_bytes` of data.

    A larger tensor gets a file of its own. Names are transformers': one file, or `model-00001-of-00003.safetensors`.
    """
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    used = 0
    sizes = [element_count(shape) * ITEM_BYTES[dtype] for dtype, shape in tensors.values()]
    if sum(sizes) <= max_shard_bytes:
        return {SINGLE: dict(tensors)}
    for (name, (dtype, shape)), size in zip(tensors.items(), sizes, strict=True):
        if groups[-1] and used + size > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = (dtype, shape)
        used += size
    names = [f"model-{index:05d}-of-{len(groups):05d}.safetensors" for index in range(1, len(groups) + 1)]
    return dict(zip([SINGLE] if len(groups) == 1 else names, groups, strict=True))

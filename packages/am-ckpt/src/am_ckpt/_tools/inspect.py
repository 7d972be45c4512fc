"""One view of every kind of checkpoint folder: which tensors, in which bytes of which files. Without torch.

Recognised: a step of our own, torch's `.distcp` folders, safetensors shards of torch's Hugging Face writer, plain
Hugging Face folders and adapters; and the folders that NeMo AutoModel, torchtitan, accelerate and Lightning put them
in. Headers and metadata are read, tensor data never.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from am_ckpt._files import torch_checkpointing
from am_ckpt._files.archive import PICKLED, StateDict, read_pickled_weights
from am_ckpt._files.cover import cover_problems
from am_ckpt._files.distcp import METADATA, metadata_files, read_metadata
from am_ckpt._files.hf_folder import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE, WRAPPERS, hf_files
from am_ckpt._files.hf_shards import shard_sources
from am_ckpt._files.safetensors import Header, parse_json, read_header
from am_ckpt._files.step import (
    FORMAT,
    MANIFEST,
    MAX_SMALL_BYTES,
    checked_header,
    read_file,
    read_manifest,
    require_file_name,
)
from am_ckpt._files.torchtitan import OWN_NAMES, is_torchtitan
from am_ckpt._sources import Source, hf_sources, paths_of, paused_collector, share_tables, whole_sources
from am_ckpt._tools.inventory import Inventory
from am_ckpt.errors import ArgumentError, IncompleteError, UnsafeError

_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
# Where training frameworks put the model inside the folder of a step: NeMo AutoModel, accelerate, torchtitan.
_INSIDE = ("model", "pytorch_model_fsdp_0", "sharded", "consolidated")
# Where NeMo AutoModel keeps config and tokenizer beside shards.
_BESIDE = ".hf_metadata"
_STEPS = re.compile(r"(?:step|checkpoint|iter|global_step)[_-]?\d+|epoch_\d+_step_\d+|epoch=\d+-step=\d+\.ckpt")
# What wrappers of modules put into names; a state dict that torch gathers has none of them.
_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
_FLAT = re.compile(r"flat_param(?:_\d+)?$")


def inspect(path: str | os.PathLike[str], *, section: str | None = None) -> Inventory:
    """What the checkpoint folder `path` holds, read from headers and metadata alone.

    `section`: which part is the model, where a `.distcp` folder holds several and none is called `model`: the
    keys of the state dict that lead to it, joined by dots.

    Whether every element of every tensor is in exactly one file is checked; what is not right is in `problems`.
    Raises `ValueError` where the folder is of no known kind, holds pickled weights, or has damaged or unsafe files,
    `FileNotFoundError` where files are missing.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a checkpoint")
    with paused_collector():
        inventory = _open(folder, section)
        flat = [name for name in inventory.tensors if "flat_param" in name and _FLAT.search(name)]
        if flat:
            inventory.problems.append(
                ValueError(
                    f"{flat[0]!r} is a flattened FSDP1 parameter, whose layout is not in the checkpoint: save with "
                    "StateDictType.SHARDED_STATE_DICT or FSDP2"
                )
            )
        inventory.problems += cover_problems(inventory.tensors)
    return inventory


def step_folder(folder: Path) -> Path | None:
    """The step of ours that `folder` is, or is the model of; the manifest knows which shards belong together."""
    places = (folder, folder.parent) if folder.name == "model" else (folder,)
    return next((place for place in places if os.path.lexists(place / MANIFEST) and _is_step(place)), None)


def _is_step(folder: Path) -> bool:
    """Whether a manifest.json is ours, damaged or not: other programs have such files too."""
    try:
        manifest = json.loads(read_file(folder / MANIFEST, MAX_SMALL_BYTES).decode())
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            return True
    except (ValueError, OSError, RecursionError):
        # What is beside it says whose it was.
        pass
    weights = sorted((folder / "model").glob("*.safetensors"))
    return bool(weights) and "am_ckpt_save_id" in read_header(weights[0]).metadata


def _open(folder: Path, section: str | None) -> Inventory:
    own = step_folder(folder)
    if own is None and metadata_files(folder):
        _refuse_megatron(folder)
        return _state_dict(folder, "dcp", read_metadata(folder), section)
    safe = own is not None or (folder / INDEX).is_file() or (folder / SINGLE).is_file()
    if not safe and os.path.lexists(folder / torch_checkpointing.METADATA):
        found = torch_checkpointing.read_torch_checkpointing(folder)
        return _state_dict(folder, "torch_checkpointing", found, section)
    pickled = None if safe else read_pickled_weights(folder)
    if pickled is not None:
        return _state_dict(folder, "torch", pickled, section)
    if section is not None:
        raise ArgumentError(f"section={section!r}: only .distcp folders have sections; {folder} is none")
    if own is not None:
        return _own(own)
    there = sorted(entry.name for entry in folder.iterdir())
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        tensors = hf_sources(folder)
        return Inventory(
            folder, "huggingface", "model", {"model": tensors}, files=hf_files(folder), follow_symlinks=True
        )
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    if any(_SHARD.fullmatch(name) for name in there):
        return _safetensors_shards(folder, [name for name in there if _SHARD.fullmatch(name)])
    num_distcp = sum(name.endswith(".distcp") for name in there)
    if num_distcp:
        raise IncompleteError(
            f"{folder} holds {num_distcp} .distcp files but no {METADATA}: the save did not finish, or the file "
            "(its name starts with a dot) was not copied; take an earlier step"
        )
    if (folder / "pytorch_model_fsdp_1").is_dir():
        raise ArgumentError(
            f"{folder} holds several models of accelerate; give one of them, such as {folder / 'pytorch_model_fsdp_0'}"
        )
    for name in _INSIDE:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            inventory = _open(folder / name, section)
            _require_no_step(folder, inventory)
            inventory.notes.append(f"the model is in the folder {name!r}")
            inventory.files = {**hf_files(folder), **inventory.files}
            return inventory
    raise _unrecognised(folder, there)


def _require_no_step(folder: Path, inventory: Inventory) -> None:
    """Refuse the shards of a step of ours without what says how many there must be."""
    paths = paths_of(inventory.tensors.values())
    if paths and min(paths).suffix == ".safetensors" and "am_ckpt_save_id" in read_header(min(paths)).metadata:
        raise IncompleteError(
            f"{folder} is a step of am_ckpt without its {MANIFEST}: it was not finished, or not copied whole; take an "
            "earlier step, or copy it again"
        )


def _unrecognised(folder: Path, there: list[str]) -> ValueError:
    found = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") or "nothing"
    steps = [name for name in there if _STEPS.fullmatch(name)]
    if any(name.startswith("zero_pp_rank_") or name == "zero_to_fp32.py" for name in there):
        return UnsafeError(
            f"{folder} is a checkpoint of DeepSpeed ZeRO, whose pickles can run code when loaded; where you trust "
            f"them, `python zero_to_fp32.py {folder} OUTPUT --safe_serialization` makes a Hugging Face folder of them"
        )
    if any(re.fullmatch(r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin", name) for name in there):
        return UnsafeError(
            f"{folder} is a checkpoint of accelerate in pickles, which can run code when loaded ({found}): save with "
            "fsdp_state_dict_type SHARDED_STATE_DICT, whose folder pytorch_model_fsdp_0 can be merged"
        )
    if any(re.fullmatch(r".+_\d+\.pt", name) for name in there):
        return UnsafeError(
            f"{folder} may be a checkpoint of torch_checkpointing without {torch_checkpointing.METADATA} ({found}): "
            "nothing says which parts of the tensors are in which pickle. Give its items a resharder when saving, or "
            "copy the file too"
        )
    if steps:
        return ArgumentError(f"{folder} holds several checkpoints; give one of them, such as {folder / steps[-1]}")
    if any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in there):
        return UnsafeError(
            f"{folder} holds pickles of unknown content, which can run code when loaded ({found}); of state dicts, "
            f"{PICKLED[0]} and its index are read without running anything: give the file that name"
        )
    return ArgumentError(
        f"{folder} is no checkpoint of a known kind: neither {MANIFEST} (am-ckpt), {METADATA} with .distcp "
        f"files (torch), shard-*.safetensors (torch), {SINGLE} or its index (Hugging Face) nor {ADAPTER}; found {found}"
    )


def _refuse_megatron(folder: Path) -> None:
    """Megatron-Core's own checkpoints hold fused tensors, several layers in one, beside the optimizer's."""
    if not (folder / "metadata.json").is_file():
        return
    about = parse_json(read_file(folder / "metadata.json", 2**20), str(folder / "metadata.json"))
    if isinstance(about, dict) and "sharded_backend" in about:
        raise ArgumentError(
            f"{folder} is a checkpoint of Megatron-Core's dist_checkpointing ({about['sharded_backend']!r:.40}): "
            "layers are stacked and projections fused in its own way, so it has no Hugging Face weights to copy; "
            "export it with Megatron Bridge"
        )


def _small_files(folder: Path) -> dict[str, Path]:
    beside = folder / _BESIDE
    return {**(hf_files(beside) if beside.is_dir() and not beside.is_symlink() else {}), **hf_files(folder)}


def _unwrapped(tensors: Mapping[str, Source], notes: list[str]) -> dict[str, Source]:
    """The tensors by the names that they have in the model itself."""
    plain: dict[str, Source] = {}
    # Nearly always none has, and there may be many.
    wrapped = any(word in "\n".join(tensors) for word in ("_orig_mod.", "_wrapped_module."))
    for name, source in tensors.items() if wrapped else ():
        inner = _WRAPPERS.sub("", name)
        if inner in plain:
            raise ValueError(f"{name!r} and another tensor are both {inner!r} without the names of wrappers")
        plain[inner] = source
    plain = plain or dict(tensors)
    if tensors and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): source for name, source in plain.items()}
    changed = [name for name in tensors if name not in plain]
    if changed:
        notes.append(f"the names of {len(changed)} tensors are without those of wrappers, such as {changed[0]}")
    if is_torchtitan(plain):
        notes.append(OWN_NAMES)
    return plain


def _own(folder: Path) -> Inventory:
    manifest = read_manifest(folder)
    shards: dict[str, list[dict[str, Any]]] = {section: [] for section in manifest["tensors"]}
    files: dict[str, Path] = {}
    adapter: dict[str, Source] | None = None
    for record in manifest["files"]:
        section, _, name = record["path"].partition("/")
        require_file_name(name, f"{folder / MANIFEST}:")
        path = folder / section / name
        if section == "model" and not name.endswith(".safetensors") and name != INDEX:
            files[name] = path
        if section in shards and "header_xxh3_128" in record:
            require_recorded_size(path, record)
            if name == ADAPTER:
                adapter = whole_sources(path, checked_header(path, record))
            else:
                shards[section].append(record)
    sections = {
        section: shard_sources(
            _own_headers(folder, shards[section]),
            {name: (item["dtype"], tuple(item["shape"])) for name, item in tensors.items()},
        )[0]
        for section, tensors in manifest["tensors"].items()
    }
    if adapter is not None:
        sections["model"] = adapter
    aliases = {str(alias): str(name) for alias, name in manifest["aliases"].items()}
    return Inventory(
        folder,
        "am-ckpt",
        "model",
        sections,
        adapter=manifest["model"] == "adapter",
        others=[f"state/{name}" for name in manifest["state"]],
        files=files,
        mapping=manifest["mapping"],
        aliases=aliases,
        step=manifest["step"],
        ephemeral="ephemeral" in manifest,
    )


def _own_headers(folder: Path, records: Iterable[dict[str, Any]]) -> Iterator[tuple[Path, Header]]:
    header = None
    for record in records:
        header = checked_header(folder / record["path"], record, like=header)
        yield folder / record["path"], header


def require_recorded_size(path: Path, record: Mapping[str, Any]) -> None:
    """Raise unless a file of the manifest is there with its size."""
    try:
        about = path.lstat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}, written by rank {record['rank']}, is missing; copy it again") from error
    if not stat.S_ISREG(about.st_mode):
        raise UnsafeError(f"{path} is a symbolic link or no regular file; put the file itself there (cp -L)")
    if about.st_size != record["bytes"]:
        raise ValueError(
            f"{path} has {about.st_size} bytes, {record['bytes']} were written; it is damaged: copy it again"
        )


def _safetensors_shards(folder: Path, names: list[str]) -> Inventory:
    saves: dict[str, str] = {}

    def headers() -> Iterator[tuple[Path, Header]]:
        header = None
        for name in names:
            header = read_header(folder / name, like=header)
            saves.setdefault(header.metadata.get("am_ckpt_save_id", ""), name)
            yield folder / name, header

    tensors, exact = shard_sources(headers())
    if len(saves) > 1:
        raise ValueError(
            f"{folder} mixes files of {len(saves)} saves: {', '.join(saves.values())}; remove the stale ones"
        )
    notes: list[str] = []
    plain = _unwrapped(tensors, notes)
    files = _small_files(folder)
    inventory = Inventory(folder, "dcp-safetensors", "model", {"model": plain}, files=files, notes=notes)
    inventory.exact_shapes = exact
    if not exact:
        inventory.notes.append(
            "these files do not say how large the whole tensors are: that those of the last ranks are missing shows "
            "only in shapes, which --like and often config.json give"
        )
    return inventory


def _adapter(folder: Path) -> Inventory:
    header = read_header(folder / ADAPTER, follow_symlinks=True)
    files = hf_files(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        files[ADAPTER_CONFIG] = folder / ADAPTER_CONFIG
    sections = {"model": whole_sources(folder / ADAPTER, header)}
    return Inventory(folder, "adapter", "model", sections, adapter=True, files=files, follow_symlinks=True)


def _state_dict(folder: Path, kind: str, found: StateDict, section: str | None) -> Inventory:
    share_tables(found.tensors.values())
    sections: dict[str, dict[str, Source]] = {}
    optimizers: set[str] = set()
    for name, source in found.tensors.items():
        keys = found.paths.get(name, (name,))
        # An optimizer's tensors lie below "state"; all of them are one section.
        stop = next((i for i, key in enumerate(keys[:-1]) if i and key in ("state", "param_groups")), len(keys) - 1)
        part = ".".join(keys[:stop])
        if stop < len(keys) - 1:
            optimizers.add(part)
        inner = name[len(part) + 1 :] if part and name.startswith(part + ".") else name
        sections.setdefault(part, {})[inner] = source
    chosen = _choose_section(folder, sections, optimizers, section)
    for other in [name for name in sections if chosen and name.startswith(f"{chosen}.") and name not in optimizers]:
        # Modules whose state dicts were nested in each other.
        below = other[len(chosen) + 1 :]
        sections[chosen] |= {f"{below}.{name}": source for name, source in sections.pop(other).items()}
    notes = list(found.notes)
    sections[chosen] = _unwrapped(sections[chosen], notes)
    files = _small_files(folder)
    inventory = Inventory(folder, kind, chosen, sections, others=found.others, files=files, notes=notes)
    # As in the Hugging Face cache.
    inventory.follow_symlinks = kind == "torch"
    return inventory


# What a part is called that is not the model, where its tensors do not lie below "state".
_OPTIMIZERS = ("optim", "optimizer", "optimizers", "optimizer_state_dict")


def _choose_section(folder: Path, sections: Mapping[str, Any], optimizers: set[str], section: str | None) -> str:
    if section is not None:
        if section not in sections:
            raise ArgumentError(f"section={section!r} is not in {folder}; it holds {_listed(sections)}")
        return section
    if not sections:
        raise ArgumentError(f"{folder} holds no tensors")
    if is_torchtitan(sections.get("", ())):
        # Its model lies at the top, beside the other parts.
        return ""
    named = [name for name in sections if name.rpartition(".")[2] in ("model", "module", "model_state_dict")]
    if len(named) == 1:
        return named[0]
    others = [name for name in sections if name not in optimizers and name.rpartition(".")[2] not in _OPTIMIZERS]
    if not named and len(others) == 1:
        return others[0]
    raise ArgumentError(f"{folder} holds {_listed(sections)}: say which is the model with section= (--section)")


def _listed(sections: Mapping[str, Any]) -> str:
    return ", ".join(f"{name!r} ({len(tensors)} tensors)" for name, tensors in sections.items())

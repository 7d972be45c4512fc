"""What `pip install am-ckpt` brings, which is no torch, does with what torch wrote: `python without_torch.py FOLDER`.

FOLDER is what `test_without_torch.py` has made. Imports nothing but am_ckpt and the standard library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import struct
import sys
from pathlib import Path

import am_ckpt
from am_ckpt._cli import main
from am_ckpt.errors import MissingTorchError

HINT = "pip install 'am-ckpt[torch]'"
NEED_TORCH = ("Checkpointer", "StorageReader", "StorageWriter", "load_hf", "save_hf")


def command(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and standard error of `am-ckpt`; its output goes to ours."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    return code, errors.getvalue()


def tensors(path: Path) -> dict[str, tuple[str, list[int], str]]:
    """The tensors of a safetensors file by name: dtype, shape, bytes as hexadecimal text."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])].hex())
        for name, entry in header.items()
        if name != "__metadata__"
    }


def refusal(name: str) -> str:
    """What is said to who asks for a name that needs torch."""
    try:
        getattr(am_ckpt, name)
    except MissingTorchError as error:
        return str(error)
    raise AssertionError(f"am_ckpt.{name} is there without torch")


def check(folder: Path) -> None:
    assert importlib.util.find_spec("torch") is None, "torch is installed here: this would show nothing"
    expected = {name: tuple(value) for name, value in json.loads((folder / "expected.json").read_text()).items()}
    for kind in ("distcp", "shards", "steps/step_000003"):
        source, merged = folder / kind, folder / f"merged-{Path(kind).name}"
        # Whose files do not say how large the whole tensors are.
        unsaid = ("--assume-complete",) if kind == "shards" else ()
        for arguments in (
            ("inspect", source),
            ("verify", "--full", source, *unsaid),
            ("merge", source, merged, "--like", folder / "base", *unsaid),
            ("diff", source, merged),
            ("reshard", source, folder / f"cut-{Path(kind).name}", "--mesh", "dp=2", *unsaid),
            ("convert", source, folder / f"sharded-{Path(kind).name}", "--to", "sharded", *unsaid),
        ):
            assert command(*arguments) == (0, ""), arguments
        assert tensors(merged / "model.safetensors") == expected, kind
        assert (merged / "config.json").is_file()
        # What differs in 8 and 16 bits is put in numbers.
        report = am_ckpt.diff(merged, folder / "other")
        assert [item.name for item in report.differences] == ["b.weight", "c.weight"]
        assert [item.max_abs_difference for item in report.differences] == [0.5, 0.25]
    for arguments in (
        ("merge", folder / "distcp", folder / "cast", "--dtype", "bfloat16"),
        ("convert", folder / "shards", folder / "dcp", "--to", "dcp"),
    ):
        code, error = command(*arguments)
        assert (code, HINT in error, error.count("\n")) == (1, True, 1), error
        assert not Path(arguments[2]).exists()
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    for name in NEED_TORCH:
        message = refusal(name)
        assert message.startswith(f"am_ckpt.{name} needs the package torch"), message
        assert HINT in message, message


if __name__ == "__main__":
    check(Path(sys.argv[1]))

"""A sample of the crash matrix: any file operation of a save may fail in any way. See crash_matrix.py for all of it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="faults are injected with LD_PRELOAD: Linux and cc"
)


@pytest.fixture(scope="module")
def crash_matrix() -> ModuleType:
    specification = importlib.util.spec_from_file_location("crash_matrix", HERE / "crash_matrix.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["crash_matrix"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("writer", "sample"),
    [
        ("am_ckpt_save", 15),
        ("am_ckpt_async", 5),
        ("am_ckpt_ranks", 4),
        ("am_ckpt_direct", 4),
        ("am_ckpt_retention", 5),
        ("am_ckpt_merge", 5),
        ("am_ckpt_merge_resumed", 5),
        ("am_ckpt_overwrite", 5),
        ("am_ckpt_overwrite_nfs", 5),
        ("am_ckpt_export", 5),
        ("am_ckpt_export_nfs", 5),
    ],
)
def test_the_old_checkpoint_or_the_new_one_and_never_a_lie(
    crash_matrix: ModuleType, writer: str, sample: int, tmp_path: Path
) -> None:
    cuts = 1 if writer == "am_ckpt_save" else 0
    script = HERE / "crash_writers" / f"{writer}.py"
    result = crash_matrix.run_matrix(script, sample=sample, power_cuts=cuts, place=tmp_path)
    assert result["violations"] == []
    assert sum(result["verdicts"].values()) == sample
    # Faults struck before the commit.
    assert result["verdicts"]["old"] > 0
    if cuts:
        assert result["power_cuts"]["violations"] == []
        assert set(result["power_cuts"]["verdicts"]) == {"old", "new"}


def test_the_matrix_finds_what_is_wrong_with_overwriting_a_file(crash_matrix: ModuleType, tmp_path: Path) -> None:
    script = HERE / "crash_writers" / "torch_save.py"
    result = crash_matrix.run_matrix(script, kinds=("kill", "ENOSPC"), power_cuts=1, place=tmp_path)
    assert {violation["verdict"] for violation in result["violations"]} == {"lost"}
    # Nothing was synced: after the power is back, the file is the old one, whatever torch.save had returned.
    assert {violation["verdict"] for violation in result["power_cuts"]["violations"]} == {"lied"}

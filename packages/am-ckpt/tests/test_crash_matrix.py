"""The crash matrix: any file operation of a save may fail in any way. See crash_matrix.py.

Every commit runs another part of its points; `-m slow` runs them all.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commit_seed import commit_seed
from crash_matrix import Server, can_inject, run_matrix

WRITERS = Path(__file__).parent / "crash_writers"

pytestmark = pytest.mark.skipif(not can_inject(), reason="faults are injected with LD_PRELOAD: Linux and cc")


@pytest.fixture(scope="module")
def run(server: Server, drawn: list[str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """`run_matrix` with the seed of this commit, in one process for all writers."""
    seed, ran = commit_seed(), collections.Counter[str]()

    def run_writer(writer: str, **options: Any) -> dict[str, Any]:
        result: dict[str, Any] = run_matrix(server, WRITERS / f"{writer}.py", seed=seed, **options)
        ran.update({name: result[name] for name in ("points", "all_points")})
        print(f"{writer}: seed {seed}, {result['points']} of {result['all_points']} points")
        return result

    yield run_writer
    drawn.append(f"crash matrix: seed {seed}, {ran['points']:,} of {ran['all_points']:,} points")


# One of so many points. One of the writers with four ranks costs as much as fifteen of the others.
SHARES = {
    "am_ckpt_save": 4,
    "am_ckpt_async": 4,
    "am_ckpt_ranks": 128,
    "am_ckpt_direct": 128,
    "am_ckpt_retention": 4,
    "am_ckpt_ephemeral": 16,
    "am_ckpt_merge": 4,
    "am_ckpt_merge_resumed": 4,
    "am_ckpt_overwrite": 4,
    "am_ckpt_overwrite_nfs": 4,
    "am_ckpt_export": 4,
    "am_ckpt_export_nfs": 4,
}


def require_no_violations(result: dict[str, Any], power_cuts: int) -> None:
    assert result["violations"] == []
    assert sum(result["verdicts"].values()) == result["points"]
    # Faults struck before the commit.
    assert result["verdicts"]["old"] > 0
    if power_cuts:
        assert result["power_cuts"]["violations"] == []
        assert set(result["power_cuts"]["verdicts"]) == {"old", "new"}


@pytest.mark.parametrize("writer", SHARES)
def test_the_old_checkpoint_or_the_new_one_and_never_a_lie(writer: str, run: Callable[..., dict[str, Any]]) -> None:
    power_cuts = 1 if writer == "am_ckpt_save" else 0
    result = run(writer, share=SHARES[writer], power_cuts=power_cuts)
    assert result["points"] >= result["all_points"] / SHARES[writer]
    require_no_violations(result, power_cuts)


@pytest.mark.slow
@pytest.mark.parametrize("writer", SHARES)
def test_every_point(writer: str, run: Callable[..., dict[str, Any]]) -> None:
    result = run(writer, power_cuts=3)
    assert result["points"] == result["all_points"]
    require_no_violations(result, 3)


@pytest.mark.slow
def test_torch_checkpointing_beside_ours(run: Callable[..., dict[str, Any]]) -> None:
    """Kills and errors do it no harm; it does not wait for the disk before it renames."""
    pytest.importorskip("torch_checkpointing", reason="run where `pip install torch_checkpointing` was")
    result = run("torch_checkpointing_save", power_cuts=3)
    assert result["violations"] == []
    assert {violation["verdict"] for violation in result["power_cuts"]["violations"]} <= {"lost", "lied"}


def test_the_matrix_finds_what_is_wrong_with_overwriting_a_file(run: Callable[..., dict[str, Any]]) -> None:
    result = run("torch_save", kinds=("kill", "ENOSPC"), power_cuts=1)
    assert {violation["verdict"] for violation in result["violations"]} == {"lost"}
    # Nothing was synced: after the power is back, the file is the old one, whatever torch.save had returned.
    assert {violation["verdict"] for violation in result["power_cuts"]["violations"]} == {"lied"}

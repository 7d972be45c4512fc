"""tools/ci_cpu.py counts every descendant, however it left its parents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ci_cpu.py"
BURN = """\
import os, sys, time

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

"""


def cost(folder: Path, *command: str) -> dict[str, Any]:
    result = subprocess.run([sys.executable, SCRIPT, "--json", folder / "cost.json", *command], check=False)
    usage: dict[str, Any] = json.loads((folder / "cost.json").read_text())
    assert result.returncode == usage["status"]
    return usage


def test_children_and_orphans_are_counted(tmp_path: Path) -> None:
    """A process, its child, and a grandchild in another session whose parents have ended: 0.2 s each."""
    program = (
        BURN + "burn(.2)\nif not os.fork():\n burn(.2)\n if not os.fork():\n  os.setsid()\n  burn(.2)\n  os._exit(0)\n"
    )
    program += " os._exit(0)\n"
    usage = cost(tmp_path, sys.executable, "-c", program)
    alone = cost(tmp_path, sys.executable, "-c", BURN + "burn(.2)")
    assert usage["status"] == 0
    assert usage["left_running"] == []
    assert 0.35 <= usage["cpu"] - alone["cpu"] <= 0.6
    assert usage["wall"] > 0.4


@pytest.mark.parametrize(("command", "status"), [(["false"], 1), (["sh", "-c", "kill -9 $$"], 137)])
def test_the_status_is_that_of_the_command(tmp_path: Path, command: list[str], status: int) -> None:
    assert cost(tmp_path, *command)["status"] == status


def test_what_is_left_running_is_named_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import ci_cpu; ci_cpu.GRACE = 0.2; "
    program += "print(ci_cpu.run(['sh', '-c', 'sleep 98765 & exit 3']))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT.parent)], capture_output=True, text=True, check=True, timeout=30
    )
    assert "exit status 3: sh -c sleep 98765 & exit 3\n  left running: sleep 98765" in result.stdout

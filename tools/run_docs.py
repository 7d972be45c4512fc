"""Run the code blocks of the documentation.

```` ```python ```` blocks of one file run together, in order, in one process and an empty working directory.
```` ```bash ```` blocks run from the repository root. Other fences (`text`, `console`) are not run.
Arguments: files to check; without any, every README and everything under docs/.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    folders = [ROOT, ROOT / "recipes", *sorted(ROOT.glob("packages/*")), ROOT / "tools" / "am-testing"]
    return [*(folder / "README.md" for folder in folders), *sorted((ROOT / "docs").rglob("*.md"))]


def run(command: list[str], cwd: Path) -> None:
    # -W error: an example that warns teaches its readers to ignore warnings.
    subprocess.run(
        command, cwd=cwd, check=True, env=os.environ | {"PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    )


def main(arguments: list[str]) -> int:
    failed = []
    for path in [Path(argument).resolve() for argument in arguments] or documents():
        blocks = FENCE.findall(path.read_text())
        python = "\n".join(code for language, code in blocks if language == "python")
        shell = "\n".join(code for language, code in blocks if language == "bash")
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                if python:
                    script = Path(folder, "example.py")
                    script.write_text(python)
                    run([sys.executable, str(script)], Path(folder))
                if shell:
                    run(["bash", "-euo", "pipefail", "-c", shell], ROOT)
        except subprocess.CalledProcessError:
            failed.append(path)
        print(f"{path.relative_to(ROOT)}: {len(blocks)} blocks, {time.monotonic() - start:.1f} s", flush=True)
    if failed:
        print("failed:", *(str(path.relative_to(ROOT)) for path in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

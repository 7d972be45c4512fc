"""What every test here needs: the repository as folder, one thread, no variables of a launcher, the fork server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from integration_tests import runs


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    runs.start_server()


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(runs.ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "AUTOMODEL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

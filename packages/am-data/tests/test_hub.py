"""What a hub answers for a dataset that cannot be read, and what of it a person hears."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# By the dataset's name: status, headers, then the error and what its text must say.
ANSWERS = {
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, "FileNotFoundError", "does not exist, neither here nor"),
    "private": (
        401,
        {"X-Error-Code": "RepoNotFound"},
        "FileNotFoundError",
        "does not exist, .* private dataset give a token",
    ),
    "gated": (
        403,
        {"X-Error-Code": "GatedRepo"},
        "PermissionError",
        "is a gated dataset .* ask for access at .*HF_TOKEN",
    ),
    "expired": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        "PermissionError",
        "may not be read .*401.*: give a token that may",
    ),
    "forbidden": (403, {}, "PermissionError", "may not be read .*403.*: give a token that may"),
    "many": (429, {}, "ConnectionError", "too many requests .*429.*: wait some minutes and try again"),
    "broken": (500, {}, "ConnectionError", "in trouble .*500.*: try again later"),
    "overloaded": (503, {}, "ConnectionError", "in trouble .*503.*: try again later"),
    "disabled": (
        403,
        {"X-Error-Message": "Access to this resource is disabled."},
        "PermissionError",
        "may not be read .*403",
    ),
    "odd": (418, {}, "OSError", "cannot be read from the hub .*418"),
}
ASK = """
import json, sys, am_data, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
answers = {}
for name in sys.argv[2:]:
    try:
        am_data.ChatDataset(f"somebody/{name}", tokenizer)
    except OSError as error:
        answers[name] = [type(error).__name__, str(error)]
print("ANSWERS", json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, *_ = ANSWERS[self.path.partition("/api/datasets/somebody/")[2].partition("/")[0]]
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format, *arguments):
        pass


@pytest.fixture(scope="module")
def answers(tokenizer, tmp_path_factory):
    """Each dataset's error in a process of its own, since a hub's address is read when its library is imported."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer.save_pretrained(folder / "tokenizer")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(folder / "home"),
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        command = [sys.executable, "-c", ASK, str(folder / "tokenizer"), *ANSWERS]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("ANSWERS ")[2])


@pytest.mark.parametrize("name", ANSWERS)
def test_only_what_is_not_there_does_not_exist(name, answers):
    *_, kind, text = ANSWERS[name]
    found, said = answers[name]
    assert found == kind, said
    assert said.startswith(f"somebody/{name} ")
    assert re.search(text, said), said
    assert ("does not exist" in said) == (kind == "FileNotFoundError")

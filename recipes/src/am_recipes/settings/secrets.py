"""What is a secret: the one answer for what is written, recorded, shown, compared, or handed to others."""

from __future__ import annotations

import re

HIDDEN = "<redacted>"
_NAME = re.compile(
    r"(^|_)(password|passwd|secret|credentials?|authorization|apikey|dsn|connection_string|webhook(_url)?)($|_)"
    r"|^token$|(?<!bos)(?<!eos)(?<!pad)(?<!unk)(?<!sep)(?<!cls)(?<!mask)(?<!image)(?<!video)(?<!audio)_token$"
    r"|^tokens$|(^|_)(api|access|auth)_tokens$"
    r"|^key$|(^|_)(api|access|private|secret|auth|wandb|signing|encryption|ssh)_?key$",
    re.IGNORECASE,
)
# Of an address: scheme://NAME:PASSWORD@host, and ?NAME=VALUE.
_USER = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<user>[^/?#\s:@'\"]*)(?P<password>:[^/?#\s'\"]*)?@")
_QUERY = re.compile(r"(?<=[?&])(?P<name>[\w.-]+)=(?P<value>[^&#\s'\"]+)")
# A reference to the environment that has no default.
_REFERENCE = re.compile(r"\$\{[\w.:]+\}")


def is_secret(path: str) -> bool:
    """Whether a dotted path leads to a credential, by the name of one of its keys: `hf_token` and `password.0` do,
    `pad_token` does not.
    """
    return any(_NAME.search(part) for part in path.split("."))


def in_clear(address: str) -> str | None:
    """What secret an address holds: `a password`, or the name of a part of its query; None without one, and where it
    is a reference to the environment.

    With http a user's name alone is a token too.
    """
    address = _REFERENCE.sub("\0", address)
    for match in _USER.finditer(address):
        password = (match["password"] or "").removeprefix(":")
        if match["scheme"].lower() in ("http", "https"):
            password = password or match["user"]
        if password.strip("\0"):
            return "a password"
    for match in _QUERY.finditer(address):
        if is_secret(match["name"]) and match["value"].strip("\0"):
            return f"a {match['name']}"
    return None


def without_secrets(text: str) -> str:
    """A text with what is secret in the addresses of it hidden, and every user's name of them."""
    text = _USER.sub(rf"\g<scheme>://{HIDDEN}@", text)
    return _QUERY.sub(lambda match: f"{match['name']}={HIDDEN}" if is_secret(match["name"]) else match[0], text)

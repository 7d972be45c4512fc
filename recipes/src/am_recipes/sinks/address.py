"""Addresses of services: whether somebody listens there, in seconds where a client would try for minutes."""

from __future__ import annotations

import re
import socket
import urllib.parse
import urllib.request

_SECONDS_TO_CONNECT = 5.0


def require_connection(address: str) -> None:
    """Raise ConnectionError where `address`, of http or https, takes no connection; one behind a proxy is not asked."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), _SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(" ".join(str(error).split())[:300]) from error


def without_password(text: str) -> str:
    """`text` with what stands before an `@` in the addresses of it left out."""
    return re.sub(r"(?<=\w:)//[^/@\s]+@", "//***@", text)

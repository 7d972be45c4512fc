"""Addresses of services: whether somebody listens there, in seconds where a client would try for minutes."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request

# Of a connection, and of an answer.
_SECONDS = 5.0


def require_connection(address: str) -> None:
    """Raise ConnectionError where `address`, of http or https, takes no connection; one behind a proxy is not asked."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), _SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(" ".join(str(error).split())[:300]) from error


def require_answer(address: str) -> None:
    """Raise ConnectionError where nobody answers a request for `address`: a server that takes it and hangs, too.

    Any answer will do.
    """
    require_connection(address)
    try:
        urllib.request.urlopen(address, timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, http.client.HTTPException) as error:
        # Certificates are the client's to judge, which may have others.
        if not (isinstance(error, urllib.error.URLError) and isinstance(error.reason, ssl.SSLError)):
            raise ConnectionError(" ".join(str(error).split())[:300]) from error

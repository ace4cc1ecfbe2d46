"""`python -m gateway.healthcheck`: does the gateway of this container live? For HEALTHCHECK.

Run twice a minute in each container, so it imports little: 0.2 s of CPU, where `gateway` takes
1.5 s to know all of its commands. ``gateway health`` asks in the same way, and more.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from gateway.settings import listening

TIMEOUT_SECONDS = 4.0
"""Less than HEALTHCHECK gives, so that the reason is still told."""
_MAX_SHOWN_CHARS = 300


@dataclass(frozen=True, slots=True)
class Health:
    """``said`` is one line for people."""

    well: bool
    said: str


def own_url(config: Path | None, environ: Mapping[str, str]) -> str:
    """Where the gateway with this configuration answers ``/healthz`` and ``/readyz`` on this
    machine: at the port of the metrics, if it has one, which answers when all connections of the
    other are taken."""
    server = listening(config, environ)
    host = server.host
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
    port = server.metrics_port or server.port
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def ask(url: str, *, ready: bool, timeout_seconds: float) -> Health:
    """Asks the gateway at ``url`` whether it lives, or whether traffic should come to it.

    A gateway that says it has no room for one more connection (503) lives, but is not ready. Raises
    ``ValueError`` where ``url`` is not one.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not a url like http://127.0.0.1:8080")
    path = parts.path.rstrip("/") + ("/readyz" if ready else "/healthz")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_seconds)
    # Without a user and a password: it is printed.
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(_MAX_SHOWN_CHARS).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        return Health(False, f"{where}: no answer ({why})")
    finally:
        connection.close()
    well = answer.status == 200 or (answer.status == 503 and not ready)
    return Health(well, f"{where}: {answer.status} {' '.join(body.split())}".rstrip())


def main() -> None:
    """One line, and 0 where the gateway lives, 1 where it does not."""
    health = ask(own_url(None, os.environ), ready=False, timeout_seconds=TIMEOUT_SECONDS)
    sys.stdout.write(f"{health.said}\n")
    sys.exit(0 if health.well else 1)


if __name__ == "__main__":
    main()

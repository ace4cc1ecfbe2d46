"""What one value of the settings may be, and why another is refused.

Readers of paths, urls, addresses, keys and headers, beside the plain ones of ``reading.py``: each
takes a node of the file and gives the value, or raises ``Wrong`` with what it must be.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from pathlib import Path
from types import MappingProxyType
from urllib.parse import SplitResult, urlsplit
from zoneinfo import available_timezones

from gateway.domain.address import address_of
from gateway.filewatch import source
from gateway.reading import Spot, Wrong, but_is, mapping, scalar, suggestion
from gateway.secret import Secret
from gateway.yamlfile import Node, Scalar

MIN_KEY_CHARS = 20
KEY_PREFIX = "igw_"


def any_path(node: Node, spot: Spot) -> Path:
    """A path, absolute from the folder of the file."""
    value = scalar(node)
    if "://" in value.text:
        raise Wrong("must be the path of a folder or a file; urls do not exist in this version")
    return _local(value.text, spot)


def _local(name: str, spot: Spot) -> Path:
    if not name or not name.isprintable():
        raise Wrong("must be a path")
    return spot.report.folder / name


def existing_file(node: Node, spot: Spot) -> Path:
    path = any_path(node, spot)
    spot.report.sources.append(source(path))
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise Wrong(f"there is no such file{but_is(scalar(node)).replace(', not', ':')}")
    return path


def blobs(node: Node, spot: Spot) -> Path:
    if scalar(node).text.startswith("s3:"):
        raise Wrong("blobs in S3 do not exist in this version: give the path of a folder")
    return any_path(node, spot)


def database(node: Node, spot: Spot) -> Path | Secret:
    """The path of an SQLite file, or the url of a PostgreSQL database, which has a password."""
    url = scalar(node).text
    if url.partition(":")[0].lower() in ("postgresql", "postgres"):
        where, _, rest = url.partition("://")[2].partition("/")
        # As libpq reads it: what is behind the first @, or the first /, of a password would be the
        # name of a host or a database, which are shown.
        escaped = where.count("@") < 2 and "@" not in rest.partition("?")[0]
        if not escaped or _VISIBLE.fullmatch(url) is None:
            raise Wrong(
                "must have each @ and / of the user and the password as %40 and %2F, a space as "
                "%20, and what is not ASCII so, too: postgresql://user:password@host:5432/gateway"
            )
        for host in where.rpartition("@")[2].split(","):  # several: the primary and its standbys
            _split(f"postgresql://{host}/")
        if not rest.partition("?")[0]:
            raise Wrong("must name a database: postgresql://user:password@host:5432/gateway")
        return Secret(url)
    name = url.removeprefix("sqlite:///")
    if name == url or name in ("", ":memory:") or "?" in name or name.endswith("/"):
        raise Wrong(
            "must be sqlite:/// and the path of a file: sqlite:///data/gateway.db from the folder "
            "of this file, sqlite:////var/lib/gateway.db from the root; or "
            "postgresql://user:password@host:5432/gateway"
        )
    return _local(name, spot)


def _split(url: str) -> SplitResult:
    """The parts of a url. Raises ``Wrong`` where it has no host or a port out of range."""
    try:
        parts = urlsplit(url)
        usable = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or _VISIBLE.fullmatch(url) is None or "\\" in url:
        raise Wrong("must be a url in ASCII with a host and, if any, a port: scheme://host:port")
    return parts


_TLS_FILES = frozenset(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"))


def redis(node: Node, spot: Spot) -> Secret:
    url = scalar(node).text
    scheme = url.partition(":")[0].lower()
    transport, _, kind = scheme.partition("+")
    if transport not in ("redis", "rediss") or kind not in ("", "cluster", "sentinel"):
        raise Wrong(
            "must be a url that starts with redis://, rediss://, redis+cluster:// or "
            "redis+sentinel:// (rediss+cluster://, rediss+sentinel:// for TLS)"
        )
    if kind == "sentinel":
        return _sentinel(url)
    if kind == "cluster" and _split(url).path not in ("", "/", "/0"):
        raise Wrong("must not name a database: a cluster has only the first")
    if re.fullmatch(r"/?[0-9]{0,4}", _split(url).path, re.ASCII) is None:
        raise Wrong("must end in the number of a database, if anything: redis://host:6379/0")
    given = {option.partition("=")[0] for option in _split(url).query.split("&") if option}
    if given - (_TLS_FILES if transport == "rediss" else frozenset()):
        raise Wrong(
            "must not have options, except for the files of TLS with rediss://: "
            f"{', '.join(sorted(_TLS_FILES))}"
        )
    return Secret(url)


def _sentinel(url: str) -> Secret:
    hosts, slash, name = url.partition("://")[2].rpartition("@")[2].partition("/")
    if not slash or re.fullmatch(r"[^/?#]+(/[0-9]{1,4})?", name, re.ASCII) is None:
        raise Wrong(
            "must name its sentinels and the service that they watch: "
            "redis+sentinel://host:26379,host:26379/mymaster"
        )
    for host in hosts.split(","):
        _split(f"redis://{host}")
    return Secret(url)


def time_zone(node: Node, spot: Spot) -> str:
    name = scalar(node).text
    if name not in available_timezones():
        raise Wrong(
            f"must be a time zone's name, like Europe/Berlin{but_is(scalar(node))}"
            f"{suggestion(name, sorted(available_timezones()))}"
        )
    return name


def public_url(node: Node, spot: Spot) -> str:
    """Where clients reach this gateway: what the urls that it hands out begin with."""
    url = scalar(node).text
    example = "https://images.example.com"
    if not url.lower().startswith(("http://", "https://")):
        raise Wrong(f"must be the url that clients reach this gateway at: {example}")
    parts = _split(url)
    if parts.username is not None or parts.password is not None:
        raise Wrong("must not hold a user or a password: it is told to everybody")
    if "?" in url or "#" in url:
        raise Wrong('must not hold "?" or "#"')
    if parts.path.rstrip("/").endswith("/v1"):
        raise Wrong(f"must not end in /v1, which is added: {example}")
    if parts.scheme.lower() == "http" and not _is_near(parts.hostname or ""):
        spot.warn(
            node.place,
            "is http:// on a public network: whoever is on the way sees the pictures, and the urls "
            "that open them. Write https://",
        )
    return url.rstrip("/")


def webhook(node: Node, spot: Spot) -> Secret:
    """Where news is sent; many such urls hold a token, so it is a secret."""
    url = scalar(node).text
    if not url.lower().startswith(("http://", "https://")):
        raise Wrong("must be a url that starts with https:// (or http:// on a private network)")
    parts = _split(url)
    if parts.scheme.lower() == "http" and not _is_near(parts.hostname or ""):
        raise Wrong("must be https:// on a public network")
    return Secret(url)


def webhook_secret(node: Node, spot: Spot) -> Secret:
    """What webhooks are signed with: ``whsec_`` and base64, as Standard Webhooks writes it."""
    text = scalar(node).text
    try:
        raw = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:
        raw = b""
    if not text.startswith("whsec_") or not 24 <= len(raw) <= 64:
        raise Wrong(
            'must be "whsec_" and 24 to 64 bytes in base64: echo whsec_$(openssl rand -base64 32)'
        )
    return Secret(text)


def collector(node: Node, spot: Spot) -> str:
    """Where spans are posted, path and all; what proves who sends them goes to the headers."""
    url = scalar(node).text
    example = "http://collector:4318/v1/traces"
    if not url.lower().startswith(("http://", "https://")):
        raise Wrong(f"must be the url that a collector takes traces at (OTLP/HTTP): {example}")
    parts = _split(url)
    if parts.username is not None or parts.password is not None:
        raise Wrong("must not hold a user or a password: they go to tracing.headers")
    if "?" in url or "#" in url:
        raise Wrong('must not hold "?" or "#": what a collector asks for goes to tracing.headers')
    if parts.path in ("", "/"):
        raise Wrong(f"must have the path that traces are posted to, usually /v1/traces: {example}")
    if parts.port == 4317:
        spot.warn(node.place, "has the port of OTLP over gRPC: OTLP over HTTP is usually at 4318")
    if parts.scheme.lower() == "http" and not _is_near(parts.hostname or ""):
        raise Wrong("must be https:// on a public network")
    return url


def _is_near(host: str) -> bool:
    """Whether a host is on a private network, as far as the text alone tells."""
    address = address_of(host)
    return not address.is_global if address else is_private_name(host)


def proxy(node: Node, spot: Spot) -> Secret:
    url = scalar(node).text
    if not url.lower().startswith(("http://", "https://")):
        raise Wrong("must be the url of a forward proxy: http://host:port or https://host:port")
    _split(url)
    return Secret(url)


def base_url(node: Node, spot: Spot) -> str:
    url = scalar(node).text
    if not url.lower().startswith(("http://", "https://")):
        raise Wrong("must be a url that starts with https:// (or http:// on a private network)")
    parts = _split(url)
    if parts.username is not None or parts.password is not None:
        raise Wrong("must not hold a user or a password: keys go to api_keys")
    if "?" in url or "#" in url:
        raise Wrong('must not hold "?" or "#"')
    return url.rstrip("/")


def verify(node: Node, spot: Spot) -> Path | bool:
    value = scalar(node)
    if value.text == "true":
        return True
    if value.text == "false":
        raise Wrong("is never off: give the path of a CA bundle that signs the upstream")
    return existing_file(node, spot)


def pepper(node: Node, spot: Spot) -> Secret:
    value = scalar(node)
    _unless_encodable(value.text)
    if len(value.text) < 32:
        spot.warn(node.place, "is short: use 32 random characters or more (openssl rand -hex 32)")
    return Secret(value.text)


def _unless_encodable(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Wrong("must be text in UTF-8") from None


def api_key(node: Node, spot: Spot) -> Secret:
    """A provider's key; empty where its variable is."""
    value = _maybe_empty(node)
    if value.text.startswith(KEY_PREFIX):
        raise Wrong("that is a key of this gateway, not of a provider")
    if value.text and _VISIBLE.fullmatch(value.text) is None:
        raise Wrong("must be a key without spaces or line breaks: was it copied whole?")
    return Secret(value.text)


def provider_admin_key(node: Node, spot: Spot) -> Secret:
    """A provider's admin key, which may only read what was spent; empty where its variable is."""
    return api_key(node, spot)


def admin_key(node: Node, spot: Spot) -> Secret:
    value = _maybe_empty(node)
    if value.text:
        raise Wrong("the Admin API does not exist in this version: leave admin.keys empty")
    return Secret("")


def _maybe_empty(node: Node) -> Scalar:
    """One value that may be the empty text, as ``"${NAME:-}"`` is where nothing is set."""
    if isinstance(node, Scalar) and not node.broken and not node.text:
        return node
    return scalar(node)


def team_secret(node: Node, spot: Spot) -> Secret | None:
    """A team's key; None where its variable is empty and says that it may be."""
    value = _maybe_empty(node)
    if not value.text and value.optional:
        spot.warn(node.place, f"{_those(value.sources)} empty: this key is left out")
        return None
    if len(value.text) < MIN_KEY_CHARS:
        raise Wrong(
            f"a key must have at least {MIN_KEY_CHARS} characters; make one with: "
            "openssl rand -hex 24"
        )
    if _VISIBLE.fullmatch(value.text) is None:
        raise Wrong("a key must be without spaces and line breaks, in ASCII")
    return Secret(value.text)


def _those(names: tuple[str, ...]) -> str:
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'}"


def _header_value(node: Node, spot: Spot) -> Secret:
    value = scalar(node).text
    if re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", value) is None:
        raise Wrong("must be one line of ASCII without spaces around it")
    return Secret(value)


def _header_objection(name: str) -> str | None:
    if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name) is None:
        return "this is not the name of a header"
    return _REFUSED_HEADERS.get(name.lower())


def _collector_header_objection(name: str) -> str | None:
    return None if name.lower() == "authorization" else _header_objection(name)


def headers(node: Node, spot: Spot) -> tuple[tuple[str, Secret], ...]:
    return _header_pairs(node, spot, _header_objection)


def collector_headers(node: Node, spot: Spot) -> tuple[tuple[str, Secret], ...]:
    return _header_pairs(node, spot, _collector_header_objection)


def _header_pairs(
    node: Node, spot: Spot, objection: Callable[[str], str | None]
) -> tuple[tuple[str, Secret], ...]:
    values = mapping(_header_value, objection)(node, spot)
    lowered = {name.lower(): value for name, value in values.items()}
    if len(lowered) < len(values):
        raise Wrong("holds a header twice: upper and lower case are the same")
    return tuple(lowered.items())


_OURS = "cannot be set here: the gateway writes it for every request"

_HOP = "cannot be set here: it belongs to one connection, not to a request"

_REFUSED_HEADERS = MappingProxyType(
    {
        "authorization": "cannot be set here: keys go to api_keys",
        "proxy-authorization": 'cannot be set here: write user and password into "proxy"',
        "cookie": "cannot be set here: a cookie of one client would be sent for all",
        "set-cookie": "cannot be set here: it is a header of answers",
        **dict.fromkeys(
            ("traceparent", "tracestate"), "cannot be set here: each request has its own (tracing)"
        ),
        "idempotency-key": "cannot be set here: one value for all requests would mix them up",
        **dict.fromkeys(
            ("host", "content-length", "content-type", "content-encoding", "accept-encoding"),
            _OURS,
        ),
        **dict.fromkeys(
            (
                "connection",
                "expect",
                "keep-alive",
                "proxy-authenticate",
                "proxy-connection",
                "te",
                "trailer",
                "transfer-encoding",
                "upgrade",
            ),
            _HOP,
        ),
    }
)


def network(node: Node, spot: Spot) -> IPv4Network | IPv6Network:
    value = scalar(node)
    try:
        return ip_network(value.text)
    except ValueError:
        pass
    try:
        meant = ip_interface(value.text).network
    except ValueError:
        raise Wrong(
            f"must be an address or a network of your proxies, like 10.0.0.0/8{but_is(value)}"
        ) from None
    raise Wrong(
        f"has bits set after its prefix{'' if value.given else f': write {meant}'}",
    )


_ORIGIN = re.compile(
    r"https://[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[1-9][0-9]{0,4})?"
    r"|http://(?:localhost|127\.0\.0\.1|\[::1\])(?::[1-9][0-9]{0,4})?"
)


def origin(node: Node, spot: Spot) -> str:
    """As browsers write it, to the letter: it is compared, not understood."""
    value = scalar(node)
    if value.text != "*" and _ORIGIN.fullmatch(value.text) is None:
        raise Wrong(
            "must be the origin of a page in small letters and without a slash at its end, like "
            f'https://studio.example.com, http://localhost:5173, or "*" for all{but_is(value)}'
        )
    return value.text


def is_private_name(host: str) -> bool:
    return "." not in host or host.endswith(_PRIVATE_SUFFIXES)


NUMERIC_HOST = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", re.ASCII)

METADATA_HOSTS = frozenset({"metadata", "metadata.google.internal", "instance-data"})

_PRIVATE_SUFFIXES = (
    ".localhost", ".local", ".internal", ".lan", ".intranet", ".home.arpa", ".svc", ".test",
)  # fmt: skip

_VISIBLE = re.compile(r"[\x21-\x7e]{1,4096}")

"""What the sandbox has received, and what it has billed for: an upstream that keeps its own books.

A test compares them with the gateway's; nothing here is ever told to the gateway.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime

from gateway.domain.call import Json
from gateway.sandbox.watch import Watch

KEPT_RECORDS = 1000
KEPT_BODY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file of a request. ``field`` is the name as it was sent: ``image[]``, or
    ``images[0].image_url`` in the JSON form. ``sha256`` is hexadecimal."""

    field: str
    filename: str
    content_type: str
    sha256: str
    size_bytes: int


@dataclass(slots=True)
class Record:
    """One request. What is known later is filled in as the request goes on.

    ``headers`` are in the order received, names in lower case. ``body`` is its beginning, up to
    the journal's limit; ``body_sha256`` (hexadecimal) and ``body_bytes`` are of the whole.
    ``fields`` are the parameters as they were sent, without files. ``status`` is what was
    answered, None before and after a cut without headers.
    """

    number: int
    request_id: str
    received_at: datetime
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    body_bytes: int = 0
    body_sha256: str = ""
    fields: Mapping[str, Json] = field(default_factory=dict)
    files: tuple[FilePart, ...] = ()
    status: int | None = None
    billed_at: datetime | None = None
    images: int = 0
    usage: Json = None
    tool_usage: Json = None

    def header(self, name: str) -> str | None:
        """The first header of a name (lower case)."""
        return next((value for key, value in self.headers if key == name), None)

    def headers_of(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def take_body(self, body: bytes, keep: int) -> None:
        self.body, self.body_bytes = body[:keep], len(body)
        self.body_sha256 = hashlib.sha256(body).hexdigest()

    def as_json(self) -> dict[str, Json]:
        """For the control endpoint: everything but bodies and the credentials."""
        return {
            "number": self.number,
            "request_id": self.request_id,
            "received_at": self.received_at.isoformat(),
            "method": self.method,
            "path": self.path,
            "query": self.query,
            "headers": [
                [name, "..." if name in ("authorization", "cookie") else value]
                for name, value in self.headers
            ],
            "body_bytes": self.body_bytes,
            "body_sha256": self.body_sha256,
            "fields": dict(self.fields),
            "files": [
                {
                    "field": file.field,
                    "filename": file.filename,
                    "content_type": file.content_type,
                    "sha256": file.sha256,
                    "size_bytes": file.size_bytes,
                }
                for file in self.files
            ],
            "status": self.status,
            "billed_at": self.billed_at.isoformat() if self.billed_at else None,
            "images": self.images,
            "usage": self.usage,
            "tool_usage": self.tool_usage,
        }


class Journal(Watch):
    """The last records, oldest first, as a sequence; any thread may read it.

    ``records=0`` keeps none, for a sandbox that runs for months; the totals go on. To wait for
    something: ``await journal.until(lambda: len(journal) == 2)``, ``journal.wait_until(...)``.
    """

    def __init__(self, records: int = KEPT_RECORDS, body_bytes: int = KEPT_BODY_BYTES) -> None:
        super().__init__()
        self.body_bytes = body_bytes
        self._records: deque[Record] = deque(maxlen=records)
        self._received = 0
        self._billed_requests = 0
        self._billed_images = 0
        self._costs: dict[tuple[date, str], int] = {}

    @property
    def received(self) -> int:
        """Requests since the start, also those no longer kept."""
        return self._received

    @property
    def billed_requests(self) -> int:
        return self._billed_requests

    @property
    def billed_images(self) -> int:
        return self._billed_images

    @property
    def billed(self) -> list[Record]:
        """The kept records that were billed."""
        return [record for record in self if record.billed_at is not None]

    def __len__(self) -> int:
        with self._lock:
            return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        with self._lock:
            return iter(list(self._records))

    def __getitem__(self, place: int) -> Record:
        with self._lock:
            return self._records[place]

    def add(self, record: Record) -> None:
        with self._lock:
            self._received += 1
            self._records.append(record)
        self._changed()

    @property
    def costs(self) -> list[tuple[date, str, int]]:
        """What was billed since the start: (UTC day, line item, nano-dollars)."""
        with self._lock:
            return [(day, item, nanos) for (day, item), nanos in self._costs.items()]

    def bill(
        self,
        record: Record,
        at: datetime,
        images: int,
        usage: Json,
        items: Iterable[tuple[str, int]] = (),
        tool_usage: Json = None,
    ) -> None:
        """``usage`` is the object of contract 1.3, of a response its text model's, with
        ``tool_usage`` for its pictures (contract 3.4); ``images`` were made. ``items`` are line
        items and their nano-dollars."""
        with self._lock:
            for item, nanos in items:
                key = (at.astimezone(UTC).date(), item)
                self._costs[key] = self._costs.get(key, 0) + nanos
            record.billed_at, record.images = at, images
            record.usage, record.tool_usage = usage, tool_usage
            self._billed_requests += 1
            self._billed_images += images
        self._changed()

    def answer(self, record: Record, status: int) -> None:
        with self._lock:
            record.status = status
        self._changed()

    def clear(self) -> None:
        """Forgets the records and the totals."""
        with self._lock:
            self._records.clear()
            self._received = self._billed_requests = self._billed_images = 0
            self._costs.clear()
        self._changed()

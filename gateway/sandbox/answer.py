"""What a bought picture looks like on the wire (contract 1.3 and 1.4)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import Image

from gateway.domain.call import Json, Operation
from gateway.sandbox.draw import Card, draw, draw_partial, thumbnail
from gateway.sandbox.rules import Rule, Unset
from gateway.sandbox.usage import Tokens, svg_usage, tokens
from gateway.sandbox.validate import Order

PNG_START = "iVBORw0KGgoA"
"""The magic of a PNG in base64, for payloads that are no picture."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stream's event, made when it is sent. ``partial`` is its index, None for the completed."""

    image: int
    partial: int | None


@dataclass(frozen=True, slots=True)
class Purchase:
    """An order that is being answered. ``created`` is in seconds since 1970. Every method that
    makes a picture takes the calling thread for as long as drawing it lasts."""

    order: Order
    rule: Rule
    serial: int
    created: int

    @property
    def pictures(self) -> int:
        """How many are delivered."""
        count = self.rule.data_count
        return self.order.n if count is None else count

    def usage(self) -> Json:
        """The object that is sent and billed for the whole order."""
        return self._reported(self._tokens(self.pictures, 0), self._output_details)

    def stream_usage(self) -> Json:
        """What the events of a stream add up to."""
        partials = self._partials * self.pictures
        return self._reported(self._tokens(self.pictures, partials), False)

    def json(self) -> bytes:
        """The whole JSON answer. Put together from bytes: the pictures are not escaped again."""
        order, rule = self.order, self.rule
        files = [self.file(index) for index in range(self.pictures)]
        head: dict[str, Json] = {"created": self.created, "background": order.background}
        tail: dict[str, Json] = {"output_format": order.output_format, "quality": order.quality}
        if order.safety_identifier is not None:
            tail["safety_identifier"] = order.safety_identifier
        tail["size"] = order.size
        if order.output_format == "svg" and files:
            svg = base64.b64decode(files[0]).decode("utf-8", "replace")
            tail["svg_usage"] = svg_usage(order, svg)
        tail |= rule.extra_fields
        if not rule.no_usage:
            tail["usage"] = self.usage()
        data = b"" if rule.empty_data else b",".join(self._item(file) for file in files)
        start, end = _dump(head), _dump(tail)
        return b"%b,%b[%b],%b" % (start[:-1], b'"data":', data, end[1:])

    def pieces(self) -> Iterator[Piece]:
        """The events of a stream in their order: partial images, then the completed one; the
        pictures of ``n > 1`` one after the other."""
        for image in range(self.pictures):
            for partial in range(self._partials):
                yield Piece(image, partial)
            yield Piece(image, None)

    def event(self, piece: Piece) -> bytes:
        """An event as it is sent."""
        order, rule = self.order, self.rule
        stem = "image_edit" if order.operation is Operation.EDIT else "image_generation"
        kind = f"{stem}.completed" if piece.partial is None else f"{stem}.partial_image"
        file = (
            self.file(piece.image)
            if piece.partial is None
            else self.partial(piece.image, piece.partial)
        )
        said: dict[str, Json] = {
            "background": order.background,
            "created_at": self.created,
            "output_format": order.output_format,
        }
        if piece.partial is not None:
            said["partial_image_index"] = piece.partial
        said |= {"quality": order.quality, "size": order.size}
        said |= rule.extra_fields
        if piece.partial is None:
            if order.safety_identifier is not None:
                said["safety_identifier"] = order.safety_identifier
            if not rule.no_usage:
                said["usage"] = self._event_usage(piece.image)
        start, end = _dump({"type": kind}), _dump(said)
        data = b'%b,"b64_json":"%b",%b' % (start[:-1], file, end[1:])
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    @property
    def _partials(self) -> int:
        """Partial images of each picture."""
        return self.order.partial_images

    @property
    def _output_details(self) -> bool:
        return self.order.model.id != "gpt-image-1-mini"

    def _tokens(self, pictures: int, partials: int) -> Tokens:
        return tokens(self.order, pictures, partials)

    def _event_usage(self, image: int) -> Json:
        """Of one picture of a stream. The input is counted with the first, so that the events of
        an answer add up to its bill."""
        used = self._tokens(1, self._partials)
        if image:
            used = Tokens(0, 0, used.image_out)
        return self._reported(used, False)

    def _reported(self, used: Tokens, output_details: bool) -> Json:
        if not isinstance(self.rule.usage, Unset):
            return self.rule.usage
        return used.as_json(output_details)

    def _item(self, file: bytes) -> bytes:
        if self.rule.url_instead:
            name = f"{self.serial}.{self.order.output_format}"
            return _dump({"url": f"https://sandbox.invalid/files/{name}"})
        return b'{"b64_json":"%b"}' % file

    def file(self, index: int) -> bytes:
        """A finished picture in base64."""
        if self.rule.payload_bytes is not None:
            return self._payload(index)
        return base64.b64encode(draw(self._card(index)))

    def partial(self, index: int, partial: int) -> bytes:
        if self.rule.payload_bytes is not None:
            return self._payload(index)
        return base64.b64encode(draw_partial(self._card(index), partial, self._partials))

    def _payload(self, index: int) -> bytes:
        """Valid base64 that starts like a PNG, is another one each time, and costs nothing."""
        size = -(-(self.rule.payload_bytes or 0) // 4) * 4
        start = f"{PNG_START}{self.serial:08d}{index:04d}"
        return start.ljust(size, "A")[:size].encode()

    def _card(self, index: int) -> Card:
        order = self.order
        shown = []
        for given in order.inputs:
            with Image.open(io.BytesIO(given.content)) as picture:
                shown.append(thumbnail(given.role, picture))
        return Card(
            prompt=order.prompt,
            width=order.width,
            height=order.height,
            quality=order.quality,
            model=order.model.id,
            serial=self.serial,
            index=index,
            output_format=order.output_format,
            output_compression=order.output_compression,
            transparent=order.background == "transparent",
            frame_count=order.frame_count,
            frame_duration_ms=order.frame_duration_ms,
            thumbnails=tuple(shown),
        )


def error_event(error: Mapping[str, Json], number: int) -> bytes:
    """An error in a stream: nested, as the SDKs want it (contract 4.7)."""
    return b"event: error\ndata: %b\n\n" % _dump({"error": dict(error)})


def _dump(value: Mapping[str, Json]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

"""POST /v1/images/generations and /v1/images/edits (contract 1 and 2)."""

from __future__ import annotations

import asyncio
from functools import partial

from gateway.domain.call import Operation
from gateway.sandbox import costs
from gateway.sandbox.answer import Purchase, error_event
from gateway.sandbox.exchange import Beat, Exchange, Moment
from gateway.sandbox.forms import Form, Malformed, read_json, read_multipart
from gateway.sandbox.refusals import Refused, unreadable, unsupported
from gateway.sandbox.validate import blocked, check


async def generations(exchange: Exchange, body: bytes, name: str) -> None:
    await _images(exchange, body, Operation.GENERATION)


async def edits(exchange: Exchange, body: bytes, name: str) -> None:
    await _images(exchange, body, Operation.EDIT)


async def _images(exchange: Exchange, body: bytes, operation: Operation) -> None:
    form, trouble = await asyncio.to_thread(_read, exchange, operation, body)
    record, sandbox = exchange.record, exchange.sandbox
    record.fields = form.fields
    record.files = tuple(upload.part for upload in form.uploads)
    model, prompt = form.fields.get("model"), form.fields.get("prompt")
    if await exchange.met(
        model if isinstance(model, str) else "",
        prompt if isinstance(prompt, str) else "",
        lingers=False,
    ):
        return
    if trouble is not None:
        raise trouble
    order = await asyncio.to_thread(check, operation, form, sandbox.clock.now())
    refused = blocked(order.prompt, record.request_id)
    if refused is not None:
        raise refused
    purchase = Purchase(order, exchange.rule, record.number, exchange.created)
    await exchange.linger()
    if order.stream and not exchange.rule.json_for_stream:
        # It is billed when its work starts: a cut changes nothing.
        _bill(exchange, purchase, streamed=True)
        await exchange.stream(_beats(purchase), error_event)
        return
    await exchange.wire.pause(sandbox.latency_seconds)
    whole = await asyncio.to_thread(purchase.json)
    _bill(exchange, purchase, streamed=False)
    await exchange.whole(whole)


def _read(exchange: Exchange, operation: Operation, body: bytes) -> tuple[Form, Refused | None]:
    """The form, and why there is none: a rule may still want to answer first."""
    kind = exchange.record.header("content-type") or ""
    essence = kind.partition(";")[0].strip().lower()
    try:
        if essence == "application/json":
            return read_json(body, exchange.stored), None
        if essence == "multipart/form-data" and operation is Operation.EDIT:
            return read_multipart(kind, body), None
    except Malformed:
        return Form({}), unreadable(essence)
    return Form({}), unsupported(essence)


def _beats(purchase: Purchase) -> list[Beat]:
    return [
        Beat(
            Moment.LAST if piece.partial is None else Moment.PARTIAL,
            partial(purchase.event, piece),
        )
        for piece in purchase.pieces()
    ]


def _bill(exchange: Exchange, purchase: Purchase, *, streamed: bool) -> None:
    usage = purchase.stream_usage() if streamed else purchase.usage()
    items = costs.line_items(purchase.order.model.id, usage)
    exchange.bill(purchase.pictures, usage, items)

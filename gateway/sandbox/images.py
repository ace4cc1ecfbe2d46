"""POST /v1/images/generations and /v1/images/edits (contract 1 and 2)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from gateway.domain.call import Operation
from gateway.sandbox import costs
from gateway.sandbox.answer import Purchase, error_event
from gateway.sandbox.azure import EXTRAS, deployed, filtered
from gateway.sandbox.exchange import JSON, MULTIPART, Beat, Exchange, Moment
from gateway.sandbox.validate import blocked, check


async def generations(exchange: Exchange, body: bytes, name: str) -> None:
    await _images(exchange, body, Operation.GENERATION, name)


async def edits(exchange: Exchange, body: bytes, name: str) -> None:
    await _images(exchange, body, Operation.EDIT, name)


async def _images(exchange: Exchange, body: bytes, operation: Operation, deployment: str) -> None:
    """``deployment`` is of Azure's paths, empty in OpenAI's."""
    record, sandbox = exchange.record, exchange.sandbox
    kinds = (JSON, MULTIPART) if operation is Operation.EDIT else (JSON,)
    form, trouble = await exchange.form(body, *kinds)
    model, prompt = deployment or form.fields.get("model"), form.fields.get("prompt")
    if await exchange.met(
        model if isinstance(model, str) else "",
        prompt if isinstance(prompt, str) else "",
        lingers=False,
    ):
        return
    if trouble is not None:
        raise trouble
    if deployment:
        form = deployed(deployment, form, record.query, sandbox.clock.now())
    order = await asyncio.to_thread(check, operation, form, sandbox.clock.now())
    refused = blocked(order.prompt, record.request_id)
    if refused is not None:
        raise filtered() if deployment else refused
    rule = exchange.rule
    if deployment:
        rule = replace(rule, extra_fields={**EXTRAS, **rule.extra_fields})
    purchase = Purchase(order, rule, record.number, exchange.created)
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

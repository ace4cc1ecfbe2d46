"""/v1/responses (contract 3.4): made at once, in a stream or in the background, and asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from urllib.parse import parse_qsl

from gateway.domain.call import Json
from gateway.sandbox import costs
from gateway.sandbox.archive import Recall, StoredResponse
from gateway.sandbox.conversation import Ask, understand
from gateway.sandbox.events import beats, flat_error
from gateway.sandbox.exchange import JSON, Exchange
from gateway.sandbox.refusals import (
    Refused,
    bad_value,
    in_range,
    wrong_type,
)
from gateway.sandbox.reply import Reply, blank, finish

MAX_LIST, USUAL_LIST = 100, 20


async def create_response(exchange: Exchange, body: bytes, name: str) -> None:
    """Its rules match the conversation's model, and their prompt in all of the input.

    A rule's gate holds the answer; in the background the work: before it starts (``wait_for``), or
    under way (with ``wait_after``)."""
    form, trouble = await exchange.form(body, JSON)
    fields = form.fields
    model, said = fields.get("model"), fields.get("input")
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    if await exchange.met(model if isinstance(model, str) else "", text, lingers=False):
        return
    if trouble is not None:
        raise trouble
    now = exchange.sandbox.clock.now()
    ask = await asyncio.to_thread(understand, fields, _recall(exchange), now)
    streamed, background = ask.flag("stream", False), ask.flag("background", False)
    streamed = streamed and not exchange.rule.json_for_stream
    begun = blank(ask, exchange.created, "queued" if background else "in_progress")
    stored = StoredResponse(begun, ask.items, streamed=streamed)
    if background and not streamed:
        _keep(exchange, ask, stored)
        await exchange.wire.pause(exchange.rule.delay_seconds)
        try:
            await exchange.whole(exchange.dump(begun))
        finally:
            await _work(exchange, ask, stored)
        return
    await exchange.linger()
    if not streamed:
        await exchange.wire.pause(exchange.sandbox.latency_seconds)
    reply = await _made(exchange, ask, stored)
    if streamed:
        await exchange.stream(beats(reply.body, reply.partials), flat_error)
    else:
        await exchange.whole(await asyncio.to_thread(exchange.dump, reply.body))


async def get_response(exchange: Exchange, body: bytes, response_id: str) -> None:
    if await exchange.met():
        return
    stored = _found(exchange, response_id)
    asked = dict(parse_qsl(exchange.record.query))
    if asked.get("stream") != "true":
        await exchange.whole(await asyncio.to_thread(exchange.dump, stored.body))
        return
    if not (stored.streamed and stored.body["background"]):
        raise Refused(
            "This response cannot be streamed because it was not created with background=true "
            "and stream=true.",
            code=None,
            param="stream",
        )
    after = _whole(asked, "starting_after", -1)
    await exchange.stream(beats(stored.body, stored.partials, after=after), flat_error)


async def delete_response(exchange: Exchange, body: bytes, response_id: str) -> None:
    if await exchange.met():
        return
    stored = _found(exchange, response_id)
    stored.deleted = True
    exchange.sandbox.responses.take(exchange.project, response_id)
    for item in _output(stored.body):
        exchange.sandbox.items.take(exchange.project, str(item["id"]))
    await exchange.whole(exchange.dump({"id": response_id, "object": "response", "deleted": True}))


async def cancel_response(exchange: Exchange, body: bytes, response_id: str) -> None:
    """What is cancelled is not billed: its pictures are drawn at the very end."""
    if await exchange.met():
        return
    stored = _found(exchange, response_id)
    if not stored.body["background"]:
        raise Refused("Cannot cancel a synchronous response.", code=None)
    if stored.status in ("completed", "failed", "incomplete"):
        raise Refused("Cannot cancel a completed response.", code=None)
    stored.body["status"] = "cancelled"
    await exchange.whole(exchange.dump(stored.body))


async def list_input_items(exchange: Exchange, body: bytes, response_id: str) -> None:
    if await exchange.met():
        return
    stored = _found(exchange, response_id)
    asked = dict(parse_qsl(exchange.record.query))
    order = asked.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_value("order", order, ("asc", "desc"))
    limit = _whole(asked, "limit", USUAL_LIST)
    in_range("limit", limit, 1, MAX_LIST)
    items = [item for item in stored.input if isinstance(item, dict)]
    if order == "desc":
        items.reverse()
    ids = [str(item["id"]) for item in items]
    if "after" in asked:
        if asked["after"] not in ids:
            raise Refused(f"Item with id '{asked['after']}' not found.", code=None, param="after")
        items = items[ids.index(asked["after"]) + 1 :]
    page: list[Json] = list(items[:limit])
    await exchange.json(
        200,
        {
            "object": "list",
            "data": page,
            "first_id": items[0]["id"] if page else None,
            "last_id": items[len(page) - 1]["id"] if page else None,
            "has_more": len(items) > len(page),
        },
    )


def _recall(exchange: Exchange) -> Recall:
    sandbox, project = exchange.sandbox, exchange.project
    return Recall(
        exchange.stored,
        lambda id_: sandbox.items.get(project, id_),
        lambda id_: sandbox.responses.get(project, id_),
    )


async def _work(exchange: Exchange, ask: Ask, stored: StoredResponse) -> None:
    """Makes a response in the background, after its first answer has left."""
    rule = exchange.rule
    held = rule.wait_for
    if held is not None and rule.wait_after is None:
        await exchange.wire.hold(held)
    if stored.status == "queued":
        stored.body["status"] = "in_progress"
    await exchange.wire.pause(exchange.sandbox.latency_seconds)
    if held is not None and rule.wait_after is not None:
        await exchange.wire.hold(held)
    if stored.status != "cancelled":
        await _made(exchange, ask, stored)


async def _made(exchange: Exchange, ask: Ask, stored: StoredResponse) -> Reply:
    """The finished response, kept and billed."""
    record = exchange.record
    reply = await asyncio.to_thread(
        finish, ask, stored.body, exchange.rule, record.number, exchange.created, record.request_id
    )
    stored.body, stored.partials = reply.body, reply.partials
    stored.context_tokens = reply.context_tokens
    made = [item for item in _output(reply.body) if isinstance(item.get("result"), str)]
    stored.pictures = (*ask.earlier_pictures, *(str(item["id"]) for item in made))
    # Kept first: who sees the bill finds the response.
    _keep(exchange, ask, stored)
    items = list(costs.text_line_items(ask.model.id, reply.usage))
    if ask.order is not None:
        items += costs.line_items(ask.order.model.id, reply.tool_usage)
    exchange.bill(reply.images, reply.usage, items, reply.tool_usage)
    return reply


def _keep(exchange: Exchange, ask: Ask, stored: StoredResponse) -> None:
    if stored.deleted or not ask.flag("store", True):
        return
    sandbox = exchange.sandbox
    sandbox.responses.put(exchange.project, str(stored.body["id"]), stored)
    for item in _output(stored.body):
        sandbox.items.put(exchange.project, str(item["id"]), item)


def _found(exchange: Exchange, response_id: str) -> StoredResponse:
    stored = exchange.sandbox.responses.get(exchange.project, response_id)
    if stored is None:
        raise Refused(f"Response with id '{response_id}' not found.", code=None, status=404)
    return stored


def _output(body: Mapping[str, Json]) -> list[dict[str, Json]]:
    output = body["output"]
    return [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []


def _whole(asked: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(asked.get(name, default))
    except ValueError:
        raise wrong_type(name, "an integer", asked[name]) from None

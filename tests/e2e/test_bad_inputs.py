"""What must not get in, byte by byte (reliability 4.1): a clear answer; nothing sent, or held."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.sandbox.rules import Rule
from gateway.sandbox.watch import Gate
from tests.raw import BOUNDARY, FORM, JSON, Field, RawAnswer, RawClient, form, texts
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"


def png(width: int, height: int) -> bytes:
    """A PNG, however large: made of its parts, since no library would make it."""
    rows = zlib.compress(b"\0" * 100)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def small_png() -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(out, "PNG")
    return out.getvalue()


PNG = small_png()
ORDER = texts(prompt="p", model=MODEL, quality="low")
IMAGE = Field("image", PNG, "a.png")


def order(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "p", "quality": "low", **fields}).encode()


def raw_order(fields: bytes) -> bytes:
    """An order whose further fields are written as they are."""
    return b'{"model":"%b","prompt":"p",%b}' % (MODEL.encode(), fields)


def edit(**fields: Any) -> bytes:
    """An edit in JSON."""
    return order(**{"images": [{"image_url": data_url(PNG)}], **fields})


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a body must be answered with. ``says`` is part of the message."""

    body: bytes
    status: int
    code: str
    param: str | None = None
    path: str = GENERATIONS
    headers: Sequence[str | bytes] = (JSON,)
    reason: str = ""
    says: str = ""
    closes: bool = False


def bad_json(body: bytes, code: str, says: str = "") -> Refusal:
    return Refusal(body, 400, code, reason=code, says=says)


def bad_form(body: bytes, code: str = "invalid_multipart", **more: Any) -> Refusal:
    return Refusal(body, 400, code, **{"path": EDITS, "headers": (FORM,), **more})


async def refuse(gateway: GatewayUnderTest, refusals: Sequence[Refusal]) -> None:
    """Sends each, and looks at everything that a refusal promises."""
    for told, refusal in enumerate(refusals, len(gateway.told.requests) + 1):
        shown = refusal.body[:100]
        async with RawClient.to(gateway.port, KEY) as client:
            answer = await client.post(refusal.path, refusal.body, refusal.headers)
            check_refused(answer, refusal.status, refusal.code, refusal.param, shown)
            assert refusal.says in answer.error["message"], answer.body
            # Whatever is still on its way of a body that is not wanted must not be taken for a
            # request: then the connection ends, and says so. Else it goes on.
            if answer.header("connection") == "close":
                assert await client.closed(), shown
            else:
                assert not refusal.closes
                assert await client.is_open(), shown
        receipt, delivery = (await gateway.told.until(told))[-1]
        assert delivery.status == refusal.status, shown
        if refusal.reason:
            assert receipt.reason == refusal.reason, shown
    await nothing_happened(gateway)


def check_refused(
    answer: RawAnswer, status: int, code: str, param: str | None, shown: object = ""
) -> None:
    assert answer.status == status, (shown, answer.body)
    error = answer.error
    assert error["code"] == code, (shown, error)
    assert error["param"] == param, (shown, error)
    assert error["type"] == "invalid_request_error", shown
    assert error["message"], shown
    assert answer.header("content-type") == "application/json", shown
    assert (answer.header("x-request-id") or "").startswith("req_"), shown
    assert answer.header("x-should-retry") == "false", shown
    assert answer.header("retry-after") is None, shown
    assert KEY not in answer.body.decode(), shown


async def nothing_happened(gateway: GatewayUnderTest) -> None:
    """Nothing was sent, nothing is on the books, and nothing is held."""
    assert gateway.sandbox.journal.received == 0
    assert await gateway.usage() == []
    metrics = await gateway.metrics()
    assert metrics["gateway_ledger_open_holds"] == 0
    assert metrics["gateway_inflight_requests"] == 0
    assert metrics['gateway_inflight_bytes{where="memory"}'] == 0
    assert metrics['gateway_inflight_bytes{where="disk"}'] == 0
    rejected = [
        value for name, value in metrics.items() if name.startswith("gateway_requests_rejected")
    ]
    assert sum(rejected) == len(gateway.told.requests)


async def pass_on(
    gateway: GatewayUnderTest,
    bodies: Sequence[bytes],
    path: str = GENERATIONS,
    headers: Sequence[str] = (JSON,),
) -> list[RawAnswer]:
    """Sends each; all must reach the sandbox as they are."""
    answers = []
    for body in bodies:
        before = gateway.sandbox.journal.received
        async with RawClient.to(gateway.port, KEY) as client:
            answers.append(await client.post(path, body, headers))
        assert gateway.sandbox.journal.received == before + 1, (body[:100], answers[-1].body)
        assert gateway.sandbox.journal[-1].body == body
    return answers


# 8: line breaks and NULs


async def test_8_what_comes_back_holds_no_line_break(gateway: GatewayUnderTest) -> None:
    names = ["user", "safety_identifier", "size", "quality", "background"]
    marks = ["\r", "\n", "\0", "\r\nx-cost-usd: 0"]
    for name, text in [(name, f"a{mark}b") for name in names for mark in marks]:
        await refuse(
            gateway,
            [
                Refusal(order(**{name: text}), 400, "bad_header", name, reason="bad_header"),
                bad_form(
                    form(*[field for field in ORDER if field.name != name], *texts(**{name: text}),
                         IMAGE),
                    "bad_header", param=name,
                ),
            ],
        )  # fmt: skip


async def test_8_a_models_name_is_no_header_either(gateway: GatewayUnderTest) -> None:
    """``x-model-served`` would carry it: every name is routed here, by the ``"*"``."""
    await refuse(
        gateway,
        [
            Refusal(order(model=f"x{mark}y"), 400, "bad_header", "model")
            for mark in ("\r", "\n", "\0", "\r\nx-evil: 1")
        ],
    )


async def test_8_names_in_a_form_hold_no_line_break(gateway: GatewayUnderTest) -> None:
    def named(disposition: bytes) -> bytes:
        return form(*ORDER, IMAGE, Field("", b"x", headers=b"Content-Disposition: " + disposition))

    await refuse(
        gateway,
        [
            bad_form(named(b'form-data; name="a\rb"'), "bad_header"),
            bad_form(named(b'form-data; name="a\nb"'), "bad_header"),
            bad_form(named(b'form-data; name="a\0b"'), "bad_header"),
            bad_form(named(b'form-data; name="a%0D%0Ab"'), "bad_header"),
            bad_form(named(b'form-data; name="a"; filename="b\0.png"'), "bad_header"),
            bad_form(named(b'form-data; name="a"; filename="b\n.png"'), "bad_header"),
        ],
    )


FILENAMES = [
    "../../etc/x.png", "C:\\\\temp\\\\x.png", "a%00b.png", "%0d%0aset-cookie: a", "ä文🎈.png", " ",
    "/dev/null", "x" * 5000, 'q\\"uote.png', "a;b=c.png", "CON", ".",
]  # fmt: skip


async def test_8_a_strange_filename_passes_and_is_only_a_name(gateway: GatewayUnderTest) -> None:
    unknown = b"not a picture that anybody knows"
    bodies = [form(*ORDER, Field("image", unknown, filename)) for filename in FILENAMES]
    await pass_on(gateway, bodies, EDITS, [FORM])
    files = [record.files for record in gateway.sandbox.journal]
    assert [file.filename for [file] in files] == FILENAMES
    assert {path.name for path in gateway.config.parent.rglob("*")}.isdisjoint(FILENAMES)


@pytest.mark.parametrize("value", [b"a\0b", b"a\rb"])
async def test_8_a_broken_header_line_ends_the_connection(
    gateway: GatewayUnderTest, value: bytes
) -> None:
    async with RawClient.to(gateway.port, KEY) as client:
        body = order()
        await client.head(GENERATIONS, [JSON, b"x-what: " + value, f"content-length: {len(body)}"])
        answer = await client.answer()
        check_refused(answer, 400, "bad_framing", None)
        assert answer.header("connection") == "close"
        assert await client.closed()
    await nothing_happened(gateway)


# 9 to 15: JSON

DEEP = 100_000


async def test_9_to_15_json_that_is_none(gateway: GatewayUnderTest) -> None:
    await refuse(
        gateway,
        [
            bad_json(b"", "invalid_json"),
            bad_json(b"   ", "invalid_json"),
            bad_json(b"{", "invalid_json", "byte 1"),
            bad_json(b'{"model":"m" "prompt":"p"}', "invalid_json", "byte 13"),
            bad_json(b"{'model':1}", "invalid_json", "byte 1"),
            # Where the comma is, or what follows it: Python 3.13 says the one, 3.11 the other.
            bad_json(b'{"model":"m",}', "invalid_json", "byte 1"),
            bad_json(order() + b"x", "invalid_json"),
            bad_json(order() + order(), "invalid_json"),
            bad_json(b"\xef\xbb\xbf" + order(), "invalid_json", "byte 0"),
            bad_json(order().decode().encode("utf-16"), "invalid_json"),
            bad_json(b"model=x&prompt=y", "invalid_json"),
            bad_json(raw_order(b'"x":"\xff"'), "invalid_json"),
            bad_json(raw_order(b'"x":"\xc0\xaf"'), "invalid_json"),
            bad_json(raw_order(b'"x":"\xed\xa0\x80"'), "invalid_json"),
            bad_json(raw_order(b'"x":"\xe2\x82"'), "invalid_json"),
            bad_json(raw_order(b'"x":NaN'), "invalid_json"),
            bad_json(raw_order(b'"x":Infinity'), "invalid_json"),
            bad_json(raw_order(b'"x":-Infinity'), "invalid_json"),
            bad_json(raw_order(b'"x":1e400'), "invalid_json"),
            bad_json(raw_order(b'"n":1e400'), "invalid_json"),
            bad_json(raw_order(b'"n":' + b"1" * 5000), "invalid_json"),
            bad_json(raw_order(b'"n":01'), "invalid_json"),
            bad_json(raw_order(b'"n":+1'), "invalid_json"),
            bad_json(raw_order(b'"x":"a\nb"'), "invalid_json"),
            bad_json(raw_order(b'"x":"\\ud800"'), "invalid_unicode"),
            bad_json(raw_order(b'"x":"\\udc00\\ud800"'), "invalid_unicode"),
            bad_json(raw_order(b'"\\ud83d":1'), "invalid_unicode"),
            bad_json(b"[" * DEEP, "json_too_deep"),
            bad_json(b'{"a":' * DEEP, "json_too_deep"),
            bad_json(raw_order(b'"x":' + b"[" * 33 + b"]" * 33), "json_too_deep"),
            bad_json(raw_order(b'"n":1,"n":10'), "duplicate_key"),
            bad_json(raw_order(b'"n":1,"\\u006e":10'), "duplicate_key"),
            bad_json(raw_order(b'"x":{"y":1,"y":1}'), "duplicate_key"),
        ],
    )


@pytest.mark.parametrize("body", [b"[]", b"null", b'"model"', b"1", b"true"])
async def test_9_json_that_is_no_object(gateway: GatewayUnderTest, body: bytes) -> None:
    await refuse(gateway, [Refusal(body, 400, "invalid_type", reason="invalid_param")])


async def test_9_json_is_checked_for_edits_too(gateway: GatewayUnderTest) -> None:
    await refuse(
        gateway,
        [
            Refusal(body, 400, code, path=EDITS)
            for body, code in (
                (b"{", "invalid_json"),
                (b"[" * DEEP, "json_too_deep"),
                (edit()[:-1] + b',"images":[]}', "duplicate_key"),
                (edit()[:-1] + b',"x":"\\ud800"}', "invalid_unicode"),
            )
        ],
    )


# 16 and 17: what is priced


def invalid(field: str, value: object, code: str = "invalid_type") -> Refusal:
    return Refusal(order(**{field: value}), 400, code, field, reason="invalid_param")


WRONG_TYPES: list[tuple[str, list[object]]] = [
    ("n", ["10", True, False, 1.0, 1.5, [1], {}]),
    ("partial_images", ["1", True, 1.0]),
    ("stream", ["true", 1, 0, "", []]),
    ("size", [1024, ["1024x1024"], True]),
    ("quality", [1, {}, ["low"]]),
    ("output_format", [1, {}, ["png"]]),
    ("model", [1, {}, ["m"], True]),
    ("prompt", [1, {}, ["p"], True]),
    ("svg", [1, "x", []]),
]
OUT_OF_RANGE: list[tuple[str, list[object]]] = [
    ("n", [0, 11, -1, 10**17]),
    ("partial_images", [-1, 4]),
    ("frame_count", [1, 17]),
]


async def test_16_types_are_strict_where_money_depends_on_them(gateway: GatewayUnderTest) -> None:
    await refuse(
        gateway,
        [
            *(invalid(name, value) for name, values in WRONG_TYPES for value in values),
            *(
                invalid(name, value, "invalid_value")
                for name, values in OUT_OF_RANGE
                for value in values
            ),
            Refusal(order(svg={"model": 1}), 400, "invalid_type", "svg.model"),
            invalid("model", None, "missing_required_parameter"),
            invalid("model", "", "missing_required_parameter"),
            invalid("prompt", None, "missing_required_parameter"),
            invalid("prompt", "", "missing_required_parameter"),
            invalid("model", "m" * 257, "invalid_value"),
            Refusal(b"{}", 400, "missing_required_parameter", "prompt"),
            Refusal(b'{"model":"m"}', 400, "missing_required_parameter", "prompt"),
        ],
    )


FORM_TEXTS = [
    ("n", "0", "invalid_value"), ("n", "11", "invalid_value"), ("n", "-1", "invalid_value"),
    ("n", "1.0", "invalid_type"), ("n", "true", "invalid_type"), ("n", " 1", "invalid_type"),
    ("n", "01", "invalid_type"), ("n", "", "invalid_type"), ("n", "1e0", "invalid_type"),
    ("n", "\u0661", "invalid_type"), ("stream", "True", "invalid_type"),
    ("stream", "1", "invalid_type"), ("partial_images", "4", "invalid_value"),
    ("svg", "x", "invalid_type"), ("prompt", "", "missing_required_parameter"),
    ("model", "", "missing_required_parameter"),
]  # fmt: skip


async def test_16_and_in_a_form(gateway: GatewayUnderTest) -> None:
    refusals = []
    for name, text, code in FORM_TEXTS:
        others = [field for field in ORDER if field.name != name]
        body = form(*others, *texts(**{name: text}), IMAGE)
        refusals.append(bad_form(body, code, param=name))
    await refuse(gateway, refusals)


async def test_16_nulls_are_absent(gateway: GatewayUnderTest) -> None:
    body = order(n=None, size=None, stream=None, svg=None, partial_images=None, user=None)
    [answer] = await pass_on(gateway, [body])
    assert answer.status == 200


async def test_17_prompts(gateway: GatewayUnderTest) -> None:
    controls = [chr(code) for code in range(32) if chr(code) not in "\t\n\r"]
    await refuse(
        gateway,
        [
            *(
                Refusal(body, 400, "prompt_too_long", "prompt", reason="invalid_param", says="32,0")
                for body in (
                    order(prompt="p" * 32_001),
                    order(prompt="p" * 100_000),
                    order(prompt="\u00e4" * 32_001),
                    order(prompt="\U0001f388" * 32_001),
                    order(prompt="p" * 1_000_000),
                )
            ),
            *(
                Refusal(order(prompt=f"a{mark}b"), 400, "invalid_prompt", "prompt")
                for mark in controls
            ),
            bad_form(
                form(*texts(model=MODEL, prompt="p" * 32_001), IMAGE), "prompt_too_long",
                param="prompt",
            ),
            bad_form(
                form(*texts(model=MODEL, prompt="a\x07b"), IMAGE), "invalid_prompt", param="prompt"
            ),
        ],
    )  # fmt: skip


async def test_17_the_longest_prompts_pass(gateway: GatewayUnderTest) -> None:
    gateway.sandbox.rules.add(Rule(payload_bytes=100))
    answers = await pass_on(
        gateway,
        [order(prompt="\U0001f388" * 32_000), order(prompt="a\tb\nc\r\nd\x7f")],
    )
    assert [answer.status for answer in answers] == [200, 200]


# 18: what nobody here knows


async def test_18_an_unknown_parameter_is_held_at_the_worst_and_passed_on(start: Start) -> None:
    changes = {"teams": {"growth": {"budget": {"day": 100}}}}
    bounds = {}
    async with start(changes) as gateway:
        for name, fields in (
            ("known", {}),
            ("unknown", {"resolution": "8k"}),
            ("quality", {"quality": "ultra"}),
        ):
            # The sandbox refuses what it does not know, as OpenAI does, before it would wait.
            gate, status = Gate(), None if name == "known" else 400
            gateway.sandbox.rules.add(
                Rule(times=1, wait_for=gate, status=status, payload_bytes=100)
            )
            body = order(prompt=name, size="1024x1024", **fields)
            async with RawClient.to(gateway.port, KEY) as client:
                await client.head(GENERATIONS, [JSON, f"content-length: {len(body)}"])
                await client.send(body)
                await gate.arrived()
                metrics = await gateway.metrics()
                # Of a budget's account: what is not limited is counted, and shown, as well.
                where = 'owner="growth",scope="team",window="day"'
                bounds[name] = metrics[f"gateway_budget_reserved_usd{{{where}}}"]
                gate.set()
                answer = await client.answer()
            assert gateway.sandbox.journal[-1].body == body
            assert answer.status == (200 if name == "known" else 400)
        receipts = await gateway.told.until(3)
        # Nothing is owed for what was refused.
        assert [receipt.cost > 0 for receipt, _ in receipts] == [True, False, False]
        assert [receipt.bound / NANOS_PER_DOLLAR for receipt, _ in receipts] == pytest.approx(
            list(bounds.values())
        )
        assert (await gateway.metrics())["gateway_ledger_open_holds"] == 0
    assert bounds["unknown"] > 10 * bounds["known"]
    assert bounds["quality"] > 10 * bounds["known"]


async def test_18_strict_models_refuse_them_here(start: Start) -> None:
    async with start({"models": {MODEL: {"validate": "strict"}}}) as gateway:
        await refuse(
            gateway,
            [
                Refusal(order(resolution="8k"), 400, "unknown_parameter", "resolution"),
                Refusal(order(quality="ultra"), 400, "invalid_value", "quality"),
            ],
        )


# 19 and 28: forms of the body


async def test_19_other_types_of_body(gateway: GatewayUnderTest) -> None:
    def unsupported(path: str, *headers: str | bytes) -> Refusal:
        return Refusal(
            order(), 415, "unsupported_media_type", path=path, headers=headers,
            reason="unsupported_media",
        )  # fmt: skip

    types = [
        "content-type: text/plain", "content-type: application/x-www-form-urlencoded",
        "content-type: application/jsonp", "content-type: text/json", "content-type:",
        "content-type: application/octet-stream", "content-type: image/png",
    ]  # fmt: skip
    await refuse(
        gateway,
        [
            *(unsupported(path, one) for path in (GENERATIONS, EDITS) for one in types),
            unsupported(GENERATIONS),
            unsupported(EDITS),
            unsupported(GENERATIONS, FORM),
        ],
    )


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;x=y"]
)
async def test_19_spellings_of_json_are_json(gateway: GatewayUnderTest, kind: str) -> None:
    [answer] = await pass_on(gateway, [order()], headers=[f"content-type: {kind}"])
    assert answer.status == 200
    assert gateway.sandbox.journal[0].header("content-type") == "application/json"


async def test_28_no_content_encoding(gateway: GatewayUnderTest) -> None:
    codings = ["gzip", "br", "deflate", "zstd", "GZIP", "gzip, gzip", "x"]
    await refuse(
        gateway,
        [
            Refusal(body, 415, "unsupported_media_type", path=path, headers=(kind, encoding))
            for encoding in [f"content-encoding: {coding}" for coding in codings]
            for body, path, kind in (
                (order(), GENERATIONS, JSON),
                (edit(), EDITS, JSON),
                (form(*ORDER, IMAGE), EDITS, FORM),
            )
        ],
    )


async def test_28_identity_is_no_encoding(gateway: GatewayUnderTest) -> None:
    [answer] = await pass_on(gateway, [order()], headers=[JSON, "content-encoding: identity"])
    assert answer.status == 200
    assert gateway.sandbox.journal[0].header("content-encoding") is None


# 20 and 21: forms


async def test_20_forms_that_are_none(gateway: GatewayUnderTest) -> None:
    good = form(*ORDER, IMAGE)
    bare = "content-type: multipart/form-data"
    await refuse(
        gateway,
        [
            *(
                bad_form(good, headers=(kind,), says="boundary")
                for kind in (bare, f"{bare};", f"{bare}; boundary=", f'{bare}; boundary=""')
            ),
            bad_form(good, headers=(f"{bare}; boundary={'b' * 201}",)),
            bad_form(good, headers=(f"{bare}; boundary=a; boundary={BOUNDARY}",)),
            bad_form(good, headers=(f"{bare}; boundary=another",), says="end boundary"),
            bad_form(b"", says="end boundary"),
            bad_form(b"nothing of the kind", says="end boundary"),
            bad_form(order(), says="end boundary"),
            bad_form(good[:-4]),
            bad_form(good[: -len(f"--{BOUNDARY}--\r\n")]),
            bad_form(good[: good.index(PNG) + 20], says="end boundary"),
            bad_form(good.replace(b"\r\n", b"\n")),
            bad_form(good + good, says="follows the end"),
            bad_form(form(*ORDER, IMAGE, Field("x", b"", headers=b"X: y"))),
            bad_form(form(*ORDER, IMAGE, Field("x", b"", headers=b""))),
            bad_form(form(*ORDER, IMAGE, Field("x", b"", headers=b"no colon"))),
            bad_form(
                form(*ORDER, IMAGE, Field("x", b"", headers=b"Content-Disposition: form-data"))
            ),
            bad_form(
                form(
                    *ORDER, IMAGE,
                    Field("x", b"", headers=b'Content-Disposition: attachment; name="x"'),
                )
            ),
            bad_form(
                form(
                    *ORDER, IMAGE,
                    Field("x", b"=41", headers=b'Content-Disposition: form-data; name="x"\r\n'
                          b"Content-Transfer-Encoding: quoted-printable"),
                ),
                param="x",
            ),
            bad_form(form(*ORDER, IMAGE, Field("x", b"\xff")), "invalid_unicode", param="x"),
        ],
    )  # fmt: skip


async def test_20_fields_given_twice_or_as_what_they_are_not(gateway: GatewayUnderTest) -> None:
    await refuse(
        gateway,
        [
            bad_form(form(*ORDER, IMAGE, IMAGE), "duplicate_parameter", param="image"),
            bad_form(form(*ORDER, *texts(n="1"), *texts(n="10"), IMAGE), "duplicate_parameter",
                     param="n"),
            bad_form(form(*ORDER, *texts(model="m"), IMAGE), "duplicate_parameter", param="model"),
            bad_form(form(*ORDER), "missing_required_parameter", param="image"),
            bad_form(form(*ORDER, Field("mask", PNG, "m.png")), "missing_required_parameter",
                     param="image"),
            bad_form(form(*ORDER, *texts(image="x")), "invalid_type", param="image"),
            bad_form(form(*ORDER, IMAGE, *texts(mask="x")), "invalid_type", param="mask"),
            bad_form(form(*ORDER, IMAGE, Field("n", b"1", "n.txt")), "invalid_type", param="n"),
            bad_form(form(*ORDER, *[Field("image[]", PNG, "a.png")] * 17), "invalid_value",
                     param="image"),
            bad_form(form(*ORDER, Field("image[1]", PNG, "b"), Field("image[0]", PNG, "a")),
                     "invalid_value", param="image[0]"),
            bad_form(form(*ORDER, IMAGE, Field("image[]", PNG, "a")), "duplicate_parameter",
                     param="image"),
            bad_form(form(*ORDER, Field("image", b"", "a.png")), "invalid_image", param="image"),
        ],
    )  # fmt: skip


async def test_21_too_many_and_too_long(gateway: GatewayUnderTest) -> None:
    many = [Field(f"x{place}", b"y") for place in range(37)]
    await refuse(
        gateway,
        [
            bad_form(form(*ORDER, IMAGE, *many), says="40 parts"),
            bad_form(form(*ORDER, IMAGE, *(Field(f"x{place}", b"") for place in range(2000)))),
            bad_form(form(*ORDER, IMAGE, Field("x", b"y" * (2 << 20))), param="x", says="256 KiB"),
            bad_form(
                form(*ORDER, IMAGE, Field("x", b"", headers=b"X-Long: " + b"y" * 65536)),
                says="16 KiB",
            ),
            bad_form(
                form(*ORDER, IMAGE, Field("x", b"", headers=b"\r\n".join([b"A: b"] * 17))),
                says="header lines",
            ),
        ],
    )


async def test_21_forty_parts_and_256_kib_pass(gateway: GatewayUnderTest) -> None:
    many = [Field(f"x{place}", b"y") for place in range(35)]
    await pass_on(
        gateway, [form(*ORDER, IMAGE, *many, Field("x", b"y" * (256 << 10)))], EDITS, [FORM]
    )


# 1, 2 and 22: sizes

SMALL = {"server": {"max_file_bytes": 100_000, "max_form_bytes": 300_000, "max_json_bytes": 50_000}}


async def test_22_one_file_too_large(start: Start) -> None:
    large = PNG + b"x" * 100_000
    # As the padding of base64 is not looked for, a data URL may count for up to two bytes more.
    encoded = {"images": [{"image_url": data_url(large)}]}
    async with start(SMALL) as gateway:
        await refuse(
            gateway,
            [
                Refusal(
                    form(*ORDER, Field("image", large, "a.png")), 413, "request_too_large", "image",
                    EDITS, (FORM,), "body_too_large", closes=True,
                ),
                Refusal(
                    form(*ORDER, IMAGE, Field("mask", large, "m.png")), 413, "request_too_large",
                    "mask", EDITS, (FORM,), "body_too_large", closes=True,
                ),
                Refusal(
                    edit(**encoded), 413, "request_too_large", "images[0].image_url", EDITS,
                    reason="body_too_large",
                ),
            ],
        )  # fmt: skip


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
async def test_1_a_length_over_the_limit_is_answered_before_the_body(
    gateway: GatewayUnderTest, path: str
) -> None:
    async with RawClient.to(gateway.port, KEY) as client:
        await client.head(path, [JSON, "content-length: 10000000000"])
        answer = await client.answer()
        check_refused(answer, 413, "request_too_large", None)
        assert answer.header("connection") == "close"
        assert await client.closed()
    assert (await gateway.told.until(1))[0][0].reason == "body_too_large"
    await nothing_happened(gateway)


@pytest.mark.parametrize("form_sent", [False, True], ids=["json", "form"])
async def test_2_a_drip_over_the_limit_is_answered_when_it_is_there(
    start: Start, form_sent: bool
) -> None:
    """Without a length; not at the first byte, and not later than at the one that is too many."""
    if form_sent:
        kind, whole = FORM, large_form(300_000)
    else:
        kind = JSON
        whole = edit(images=[{"image_url": data_url(b"x" * 70_000)}] * 3)
        whole += b" " * (300_000 - len(whole))
    pieces = [whole[at : at + 10_000] for at in range(0, len(whole), 10_000)]
    async with start(SMALL) as gateway:
        async with RawClient.to(gateway.port, KEY) as client:
            await client.head(EDITS, [kind, "transfer-encoding: chunked"])
            for piece in pieces:
                await client.chunk(piece)
            await client.chunk(b"!")
            answer = await client.answer()
            check_refused(answer, 413, "request_too_large", None)
            assert answer.header("connection") == "close"
            assert await client.closed()
        await gateway.told.until(1)
        await nothing_happened(gateway)
        async with RawClient.to(gateway.port, KEY) as client:
            answer = await client.post_chunked(EDITS, pieces, [kind])
        assert gateway.sandbox.journal[0].body == whole, answer.body


def large_form(size: int) -> bytes:
    """A good form of exactly so many bytes, in files of 100,000 at most."""
    files = [Field(name, b"x" * 90_000, "a") for name in ("image", "y", "z")]
    rest = size - len(form(*ORDER, *files, Field("rest", b"", "a")))
    return form(*ORDER, *files, Field("rest", b"x" * rest, "a"))


async def test_22_a_body_of_the_limit_passes(start: Start) -> None:
    async with start(SMALL) as gateway:
        await pass_on(gateway, [large_form(300_000)], EDITS, [FORM])
        await refuse_one_more(gateway, large_form(300_001))


async def refuse_one_more(gateway: GatewayUnderTest, body: bytes) -> None:
    async with RawClient.to(gateway.port, KEY) as client:
        answer = await client.post(EDITS, body, [FORM])
        check_refused(answer, 413, "request_too_large", None)
        assert await client.closed()
    assert gateway.sandbox.journal.received == 1


@pytest.mark.parametrize("declared", [True, False], ids=["body", "file"])
async def test_22_an_sdk_that_still_uploads_hears_why(start: Start, declared: bool) -> None:
    """And does not send it again. The upload is larger than what a socket swallows."""
    limits = {} if declared else {"max_form_bytes": 900 << 20}
    async with start({"server": {**SMALL["server"], **limits}}) as gateway:
        picture = io.BytesIO(PNG + b"x" * 20_000_000)
        async with gateway.sdk(max_retries=2) as sdk:
            with pytest.raises(openai.APIStatusError) as refused:
                await sdk.images.edit(
                    model=MODEL, image=("a.png", picture, "image/png"), prompt="p"
                )
        assert refused.value.status_code == 413
        assert refused.value.code == "request_too_large"
        assert len(await gateway.told.until(1)) == 1
        await nothing_happened(gateway)


# 23 and 24: pictures


def bomb_jpeg() -> bytes:
    return (
        b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 50_000, 50_000) + b"\x03" + b"\0" * 9
    )


def bomb_webp() -> bytes:
    side = struct.pack("<I", 16_777_214)[:3]
    return b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + side + side


async def test_23_a_bomb_is_told_by_its_header(gateway: GatewayUnderTest) -> None:
    for bomb in (
        png(50_000, 50_000),
        png(16_385, 1),
        png(10_001, 10_000),
        bomb_jpeg(),
        bomb_webp(),
    ):
        await refuse(
            gateway,
            [
                bad_form(form(*ORDER, Field("image", bomb, "a.png")), "invalid_image",
                         param="image", reason="image_bomb"),
                bad_form(form(*ORDER, IMAGE, Field("mask", bomb, "a.png")), "invalid_image",
                         param="mask", reason="image_bomb"),
                Refusal(edit(images=[{"image_url": data_url(bomb)}]), 400, "invalid_image",
                        "images[0].image_url", EDITS, reason="image_bomb"),
            ],
        )  # fmt: skip


NOT_TAKEN = {
    "image/gif": b"GIF89a\x40\x00\x40\x00\x80\x00\x00",
    "image/bmp": b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x40\0\0\0\x40\0\0\0\x01\0\x18\0",
    "image/svg+xml": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "application/pdf": b"%PDF-1.7\n",
    "image/tiff": b"II*\0\x08\0\0\0\0\0",
}


@pytest.mark.parametrize("kind", NOT_TAKEN)
async def test_24_what_is_known_to_be_no_input_is_refused(
    gateway: GatewayUnderTest, kind: str
) -> None:
    """Whatever it calls itself: the bytes decide."""
    content = NOT_TAKEN[kind]
    await refuse(
        gateway,
        [
            bad_form(
                form(*ORDER, Field("image", content, "a.png", declared)),
                "unsupported_file_mimetype", param="image", reason="invalid_image", says=kind,
            )
            for declared in (kind, "image/png", "application/octet-stream", "")
        ]
        + [
            bad_form(
                form(*ORDER, Field("image[]", PNG, "a"), Field("image[]", content, "b")),
                "unsupported_file_mimetype", param="image[1]",
            ),
            Refusal(
                edit(mask={"image_url": data_url(content)}), 400, "unsupported_file_mimetype",
                "mask.image_url", EDITS,
            ),
        ],
    )  # fmt: skip


async def test_24_what_is_not_known_is_for_the_upstream(gateway: GatewayUnderTest) -> None:
    bodies = [
        form(*ORDER, Field("image", content, "a.png", kind))
        for content, kind in (
            (b"\0\0\0\x1cftypavif\0\0\0\0", "image/avif"),
            (b"anything", "image/png"),
            (b"anything", "application/octet-stream"),
            (PNG, "text/plain"),
            (b"anything", ""),
        )
    ]
    answers = await pass_on(gateway, bodies, EDITS, [FORM])
    for answer in answers[2:]:
        assert answer.error["code"] == "unsupported_file_mimetype"
        assert answer.error["param"] == "image"
        assert "Invalid file 'image': unsupported mimetype (" in answer.error["message"]
    assert all(answer.status == 400 for answer in answers)
    assert await gateway.usage() == []


# 25 and 26: addresses

METADATA = [
    "http://169.254.169.254/latest/meta-data/", "http://169.254.169.254:80/", "http://2852039166/",
    "http://0xa9fea9fe/", "http://0xA9.0xFE.0xA9.0xFE/", "http://0251.0376.0251.0376/",
    "http://025177524776/", "http://169.254.43518/", "http://169.16689662/",
    "http://[::ffff:169.254.169.254]/", "http://[::ffff:a9fe:a9fe]/", "http://[64:ff9b::a9fe:a9fe]/",
    "http://[fd00:ec2::254]/", "http://metadata.google.internal/", "http://metadata/",
    "http://169.254.169.254.nip.io/", "http://a.rbndr.us/", "http://\u2460\u2461.1/",
    "http://169\u3002254\u3002169\u3002254/", "http://169.254.169.254.", "http://user@169.254.169.254/",
    "http://example.com@169.254.169.254/", "http://169.254.169.254#@example.com/",
    "http://localhost/", "http://LOCALHOST:6379/", "http://127.0.0.1/", "http://127.1/", "http://0/",
    "http://0.0.0.0/", "http://[::1]/", "http://[::]/", "http://[0:0:0:0:0:ffff:127.0.0.1]/",
    "http://[fe80::1%25eth0]/", "http://10.0.0.1/", "http://192.168.1.1/a.png",
    "http:169.254.169.254",
    "http:\\\\169.254.169.254\\", "HTTP://169.254.169.254/", " http://169.254.169.254/",
    "\thttp://127.0.0.1/", "//169.254.169.254/", "/etc/passwd", "169.254.169.254", "",
    "file:///etc/passwd", "FILE:/etc/passwd", "gopher://127.0.0.1:6379/_INFO", "ftp://127.0.0.1/",
    "dict://127.0.0.1:11211/", "ldap://127.0.0.1/", "jar:http://127.0.0.1!/", "blob:https://a/b",
    "javascript:alert(1)", "data", "https", "redis://127.0.0.1/",
]  # fmt: skip
SECURE = ["https://example.com/a.png", "https://169.254.169.254/", "HTTPS://127.0.0.1/"]


def linked(url: str, place: str = "images") -> bytes:
    if place == "images":
        return edit(images=[{"image_url": url}])
    return edit(**{place: {"image_url": url}})


async def test_25_addresses_are_not_taken(gateway: GatewayUnderTest) -> None:
    await refuse(
        gateway,
        [
            Refusal(
                linked(url, place), 400, "image_url_not_allowed",
                "images[0].image_url" if place == "images" else f"{place}.image_url",
                EDITS, reason="ssrf_blocked",
            )
            for place in ("images", "mask", "markup")
            for url in METADATA + SECURE
        ],
    )  # fmt: skip


async def test_25_only_https_is_passed_on_where_that_is_configured(start: Start) -> None:
    async with start({"upstreams": {"openai": {"image_urls": "passthrough"}}}) as gateway:
        await refuse(
            gateway,
            [
                Refusal(linked(url), 400, "image_url_not_allowed", "images[0].image_url", EDITS)
                for url in METADATA
            ],
        )
        await pass_on(gateway, [linked(url) for url in SECURE], EDITS, [JSON])
        assert (await gateway.metrics())["gateway_ledger_open_holds"] == 0


@pytest.mark.parametrize("urls", ["refuse", "passthrough"])
async def test_25_files_that_are_nobodys_here(start: Start, urls: str) -> None:
    async with start({"upstreams": {"openai": {"image_urls": urls}}}) as gateway:
        await refuse(
            gateway,
            [
                Refusal(edit(images=[{"file_id": "file-1"}]), 404, "not_found",
                        "images[0].file_id", EDITS, reason="not_owned"),
                Refusal(edit(mask={"file_id": "file-1"}), 404, "not_found",
                        "mask.file_id", EDITS, reason="not_owned"),
                Refusal(edit(mask={"file_id": "\x00"}), 404, "not_found",
                        "mask.file_id", EDITS, reason="not_owned"),
            ],
        )  # fmt: skip


async def test_26_data_urls_are_strict(gateway: GatewayUnderTest) -> None:
    good = base64.b64encode(PNG).decode()
    long = base64.b64encode(PNG + b"x" * 500_001).decode()
    await refuse(
        gateway,
        [
            Refusal(linked(url), 400, "invalid_image", "images[0].image_url", EDITS,
                    reason="invalid_image")
            for url in (
                "data:", "data:,", "data:image/png", "data:image/png,abc", "data:image/png;base64",
                "data:image/png;base64,", "data:image/png;base64,=", "data:image/png;base64,====",
                f"data:image/png;base64,{good[:-1]}", f"data:image/png;base64,{good}=",
                f"data:image/png;base64,{good[:40]} {good[40:]}",
                f"data:image/png;base64,{good[:40]}\n{good[40:]}",
                f"data:image/png;base64,{good[:39]}-{good[40:]}",
                f"data:image/png;base64,{good[:39]}_{good[40:]}",
                f"data:image/png;base64,{good[:39]}={good[40:]}",
                f"data:image/png;base64,{good[:39]}\u00e4{good[40:]}",
                f"data:image/png;base64,{long[:-5]}*{long[-4:]}",
                f"data:image/png;base64,{long[:400_001]} {long[400_002:]}",
                f"data:image/png;base64,{long[:-1]}",
            )
        ],
    )  # fmt: skip


async def test_26_the_shape_of_the_json_form(gateway: GatewayUnderTest) -> None:
    one = {"image_url": data_url(PNG)}
    await refuse(
        gateway,
        [
            Refusal(edit(images=value), 400, code, param, EDITS, reason="invalid_param")
            for value, code, param in (
                (None, "missing_required_parameter", "images"),
                ([], "missing_required_parameter", "images"),
                ("x", "invalid_type", "images"),
                (one, "invalid_type", "images"),
                ([data_url(PNG)], "invalid_type", "images[0]"),
                ([one, None], "invalid_type", "images[1]"),
                ([{}], "missing_required_parameter", "images[0].image_url"),
                ([{"image_url": 1}], "invalid_type", "images[0].image_url"),
                ([one] * 17, "invalid_value", "images"),
            )
        ],
    )


# 30: idempotency keys


async def test_30_keys_that_are_none(gateway: GatewayUnderTest) -> None:
    keys = [b"", b"k" * 256, "\u00e4".encode(), "\u00e4".encode("latin-1"), b"a\tb"]
    await refuse(
        gateway,
        [
            Refusal(
                order(), 400, "invalid_idempotency_key", "Idempotency-Key",
                headers=(JSON, b"idempotency-key: " + key),
            )
            for key in keys
        ],
    )  # fmt: skip


async def test_30_a_key_is_for_one_request(gateway: GatewayUnderTest) -> None:
    gateway.sandbox.rules.add(Rule(payload_bytes=100))
    named = [JSON, f"idempotency-key: {'k' * 255}"]
    async with RawClient.to(gateway.port, KEY) as client:
        assert (await client.post(GENERATIONS, order(), named)).status == 200
        again = await client.post(GENERATIONS, order(), named)
        assert (again.status, again.header("x-cache")) == (200, "hit")
        other = await client.post(GENERATIONS, order(prompt="q"), named)
        check_refused(other, 422, "idempotency_key_reused", "Idempotency-Key")
        assert await client.is_open()
    async with RawClient.to(gateway.port, OTHER_KEY) as stranger:
        assert (await stranger.post(GENERATIONS, order(), named)).status == 200
    assert gateway.sandbox.journal.billed_requests == 2
    assert (await gateway.metrics())["gateway_ledger_open_holds"] == 0


# 85, 89, 90: keys and teams


NO_KEYS = [
    "", "authorization:", "authorization: Bearer", "authorization: Bearer  ",
    "authorization: Basic Z3Jvd3RoLWtleQ==", f"authorization: {KEY}", f"api-key: {KEY}x",
    f"authorization: Token {KEY}", f"authorization: Bearer {KEY}x",
    f"authorization: Bearer {KEY.upper()}", f"authorization: Bearer {KEY[:-1]}",
    "authorization: Bearer igw_live_aaaaaaaaaa_" + "b" * 32 + "_cccccc",
    "authorization: Bearer igw_", "authorization: Bearer sk-upstream-secret",
    "authorization: Bearer " + "k" * 10_000, "authorization: Bearer \u00e4\u00f6",
]  # fmt: skip


async def test_85_without_a_key_nothing_is_read(gateway: GatewayUnderTest) -> None:
    for count, header in enumerate(NO_KEYS, 1):
        given = header.rpartition(" ")[2]
        async with RawClient.to(gateway.port) as client:
            head = [JSON, "content-length: 3000000", *([header] if header else [])]
            await client.head(GENERATIONS, head)
            # Before a byte of the body was sent.
            answer = await client.answer()
            check_refused(answer, 401, "invalid_api_key", None, header)
            assert len(given) < 12 or given.encode("latin-1") not in answer.body
            assert answer.header("connection") == "close"
            assert await client.closed()
        receipt, _ = (await gateway.told.until(count))[-1]
        assert (receipt.reason, receipt.team) == ("auth_failed", "")
    await nothing_happened(gateway)


async def test_89_the_cache_is_the_teams(start: Start) -> None:
    second = "growth-second-0123456789abcdef"
    async with start({"teams": {"growth": {"keys": [KEY, second]}}}) as gateway:
        gateway.sandbox.rules.add(Rule(payload_bytes=100))
        seen = []
        for key in (KEY, OTHER_KEY, second, KEY, OTHER_KEY):
            async with RawClient.to(gateway.port, key) as client:
                answer = await client.post(GENERATIONS, order(), [JSON])
                seen.append((answer.header("x-cache"), answer.sha256))
        assert [result for result, _ in seen] == ["miss", "miss", "hit", "hit", "hit"]
        own, others = seen[0][1], seen[1][1]
        assert own != others
        assert [digest for _, digest in seen[2:]] == [own, own, others]
        assert gateway.sandbox.journal.billed_requests == 2


@pytest.mark.parametrize(
    ("models", "allowed", "denied"),
    [
        ([ALIAS], [ALIAS], [MODEL, "gpt-image-2"]),
        (
            [MODEL],
            [MODEL],
            [ALIAS, "gpt-image-2", "gpt-image-2.6-flare", MODEL.upper(), f"{MODEL} "],
        ),
        (["*"], ["gpt-image-2.6-flare", ALIAS, MODEL], []),
        ([], [], [MODEL]),
    ],
)
async def test_90_the_model_that_is_meant_must_be_allowed(
    start: Start, models: list[str], allowed: list[str], denied: list[str]
) -> None:
    async with start({"teams": {"growth": {"models": models}}}) as gateway:
        gateway.sandbox.rules.add(Rule(payload_bytes=100))
        refusals = []
        for name in denied:
            edited = form(*texts(prompt="p", model=name, quality="low"), IMAGE)
            forbidden = (403, "model_not_allowed", "model")
            refusals += [
                Refusal(order(model=name), *forbidden, reason="model_denied"),
                Refusal(edited, *forbidden, EDITS, (FORM,), reason="model_denied"),
            ]
        await refuse(gateway, refusals)
        for name in allowed:
            edited = form(*texts(prompt="p", model=name, quality="low"), IMAGE)
            async with RawClient.to(gateway.port, KEY) as client:
                assert (await client.post(GENERATIONS, order(model=name), [JSON])).status == 200
                assert (await client.post(EDITS, edited, [FORM])).status == 200


async def test_90_the_star_is_no_name_of_a_model(start: Start) -> None:
    async with start({"teams": {"growth": {"models": [MODEL]}}}) as gateway:
        body = order(model="*")
        await refuse(gateway, [Refusal(body, 404, "model_not_found", "model")])


async def test_90_what_is_cached_is_not_for_who_may_not_ask(start: Start) -> None:
    """One team, two keys; the second may only use another model."""
    poor = "growth-second-0123456789abcdef"
    keys = [KEY, {"key": poor, "name": "poor", "models": ["gpt-image-2"]}]
    async with start({"teams": {"growth": {"keys": keys}}}) as gateway:
        gateway.sandbox.rules.add(Rule(payload_bytes=100))
        async with RawClient.to(gateway.port, KEY) as client:
            assert (await client.post(GENERATIONS, order(), [JSON])).status == 200
        async with RawClient.to(gateway.port, poor) as client:
            for name in (MODEL, ALIAS):
                answer = await client.post(GENERATIONS, order(model=name), [JSON])
                check_refused(answer, 403, "model_not_allowed", "model")


async def test_91_a_hundred_first_calls_find_one_budget(start: Start) -> None:
    """No account of the team exists yet. As many are let in as there is money for, exactly."""
    async with start() as gateway:
        gateway.sandbox.rules.add(Rule(payload_bytes=100))
        async with RawClient.to(gateway.port, KEY) as client:
            await client.post(GENERATIONS, order(prompt="how much"), [JSON])
        bound = (await gateway.told.until(1))[0][0].bound
        gateway.sandbox.rules.clear()
    gateway.sandbox.journal.clear()

    gate, budget = Gate(), bound * 10 + bound // 2
    # A file of its own: the books of the first are not these.
    changes = {
        "storage": {"database": "sqlite:///data/second.db"},
        "cache": {"enabled": False},
        "teams": {"growth": {"budget": {"day": f"{budget / NANOS_PER_DOLLAR:.9f}"}}},
    }
    async with start(changes) as gateway, AsyncExitStack() as stack:
        gateway.sandbox.rules.add(Rule(payload_bytes=100, wait_for=gate))
        clients = [
            await stack.enter_async_context(RawClient.to(gateway.port, KEY)) for _ in range(100)
        ]
        asked = [
            asyncio.create_task(client.post(GENERATIONS, order(prompt="how much"), [JSON]))
            for client in clients
        ]
        await gateway.told.until(90)
        await gate.arrived(10)
        assert gateway.sandbox.journal.received == 10
        gate.set()
        answers = await asyncio.gather(*asked)
        by_status = sorted(answer.status for answer in answers)
        assert by_status == [200] * 10 + [429] * 90
        for answer in answers:
            if answer.status == 429:
                assert answer.error["code"] == answer.error["type"] == "insufficient_quota"
                assert answer.header("x-should-retry") == "false"
        await gateway.told.until(100)
        [row] = await gateway.usage()
        assert (row.requests, row.images) == (10, 10)
        assert row.cost <= budget
        assert (await gateway.metrics())["gateway_ledger_open_holds"] == 0


# Anything at all

TOKENS = st.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"1e9", b"-", b'"model"',
     b'"prompt"',
     b'"image_url"', b'"images"', b"\\ud83d", b"\r\n", f"--{BOUNDARY}".encode(), b"--",
     b"Content-Disposition: form-data; ", b'name="image"', b'filename="a"', b'; name="n"', b"\0",
     b"\xff", b"data:image/png;base64,", PNG[:30], MODEL.encode()]
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=2000),
    st.lists(TOKENS, max_size=60).map(b"".join),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from(["model", "prompt", "n", "size", "images", "svg", "stream", "user", "x"]),
        st.none() | st.integers() | st.text() | st.just(MODEL) | st.lists(st.text()),
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=BODIES, path=st.sampled_from([GENERATIONS, EDITS]), kind=st.sampled_from([JSON, FORM]))
async def test_no_body_is_ever_our_fault(
    gateway: GatewayUnderTest, body: bytes, path: str, kind: str
) -> None:
    async with RawClient.to(gateway.port, KEY) as client:
        answer = await client.post(path, body, [kind])
    assert answer.status in (200, 400, 404, 413, 415, 422), answer.body
    assert (answer.header("x-request-id") or "").startswith("req_")
    assert (answer.header("content-type") or "").startswith(
        "application/json" if answer.status != 200 else ("application/json", "text/event-stream")
    )

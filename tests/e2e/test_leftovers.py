"""What a call that is over leaves behind: nothing that only the collector of circles finds."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.e2e.test_edits import png
from tests.e2e.test_endings import connect, read, send
from tests.e2e.test_generations import ASKED, quick
from tests.running import KEY, GatewayUnderTest

CALLS = 5
OF_A_CALL = {"Cycle", "Flight", "Watch", "Client", "Plan", "Call", "Layout", "Arrival", "Spool"}
OF_AN_UPLOAD = OF_A_CALL | {"Inlet", "Lent", "FormReader"}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Circles are kept until they are looked for."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def circles() -> Counter[str]:
    """What of ours was in a circle that nobody held, by class."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    kinds = (type(found) for found in gc.garbage)
    return Counter(kind.__qualname__ for kind in kinds if kind.__module__.startswith("gateway."))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_answered_call_is_gone_at_once(
    gateway: GatewayUnderTest, uncollected: None, *, stream: bool
) -> None:
    """Each was 8 objects of the door's, and 75 more of a stream."""
    async with gateway.http() as http:
        for number in range(CALLS):
            quick(gateway)
            asked = {**ASKED, "prompt": f"Lighthouse {number}", "stream": stream}
            answer = await http.post("/images/generations", json=asked)
            assert answer.status_code == 200
    await gateway.told.until(CALLS)
    await gateway.put_away()
    found = circles()
    assert {kind: found[kind] for kind in OF_A_CALL if found[kind]} == {}


async def test_a_refused_upload_is_gone_at_once(
    gateway: GatewayUnderTest, uncollected: None
) -> None:
    """It had its buffer of a megabyte, which what was wrong with it knew from its traceback."""
    head = (
        b'--B\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n'
        b"content-type: image/png\r\n\r\n"
    ) + png()
    form = head + b"x" * 2_500_000 + b"\r\n--B garbage\r\n" + b"x" * 1_500_000
    lines = (
        "POST /v1/images/edits HTTP/1.1", "host: gateway", f"authorization: Bearer {KEY}",
        "content-type: multipart/form-data; boundary=B", f"content-length: {len(form)}", "", "",
    )  # fmt: skip
    for _ in range(CALLS):
        client = await connect(gateway.port)
        await send(client, "\r\n".join(lines).encode() + form)
        assert (await read(client, until=b"}")).startswith(b"HTTP/1.1 400")
        client.close()
    await gateway.told.until(CALLS)
    await gateway.put_away()
    found = circles()
    assert {kind: found[kind] for kind in OF_AN_UPLOAD if found[kind]} == {}

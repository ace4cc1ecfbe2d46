"""What a client prefers."""

from __future__ import annotations

import pytest

from gateway.api.prefer import Preferences, preferences


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ([], Preferences()),
        (["respond-async"], Preferences(True)),
        (["Respond-Async ; x=y, wait=10"], Preferences(True, 10)),
        (["wait=5", "respond-async, wait=9"], Preferences(True, 5)),
        (['WAIT = "7"'], Preferences(False, 7)),
        (["wait=0"], Preferences(False, 0)),
        (["wait=61"], Preferences(False, 60)),
        (["wait=999999999"], Preferences(False, 60)),
        (["wait=9999999999"], Preferences()),
        (["wait=-1, wait=5"], Preferences()),
        (["wait"], Preferences()),
        (["wait=1.5"], Preferences()),
        (["wait=\u00b2"], Preferences()),
        (['note="a, wait=3, respond-async", wait=4'], Preferences(False, 4)),
        (['note="a, wait=3'], Preferences()),
        ([",, ,"], Preferences()),
        (["handling=lenient; respond-async"], Preferences()),
    ],
)
def test_the_header(said: list[str], wanted: Preferences) -> None:
    assert preferences([(b"prefer", value.encode("latin-1")) for value in said]) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"), [(b"true", True), (b" TRUE ", True), (b"1", False), (b"false", False)]
)
def test_a_client_that_cannot_send_prefer(value: bytes, wanted: bool) -> None:
    headers = [(b"accept", b"*/*"), (b"x-gateway-async", value)]
    assert preferences(headers) == Preferences(wanted)
    assert preferences([*headers, (b"prefer", b"respond-async")]).respond_async


def test_a_header_that_is_all_quotes_takes_no_time() -> None:
    assert preferences([(b"prefer", b'"\\' * 30_000 + b",wait=3")]) == Preferences()

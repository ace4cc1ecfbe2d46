"""What the journal says of a settlement is JSON, and all of it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gateway.domain.call import SvgUsage, Usage
from gateway.domain.ledger import Basis, Event, Outcome, Part, Settlement
from gateway.stores.rows import detail_of

SVG = SvgUsage('an "author"', 5, 6)


@pytest.mark.parametrize("usage", [Usage(), Usage(1, 2, 3, 4, 5, 6), Usage(text_out=1, svg=SVG)])
@pytest.mark.parametrize("flags", [(), ("soft", "over_bound")])
@pytest.mark.parametrize("drawn", [None, Part('a "model"', 1, 2, Usage(image_out=3))])
def test_all_that_a_settlement_says(
    usage: Usage, flags: tuple[str, ...], drawn: Part | None
) -> None:
    said = Settlement(
        "r", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, 9, usage, 3, flags, drawn=drawn
    )
    expected: dict[str, object] = {"outcome": "delivered", "basis": "usage", "images": 3}
    if usage != Usage():
        expected["usage"] = asdict(usage)
    if flags:
        expected["flags"] = list(flags)
    if drawn is not None:
        expected["drawn"] = asdict(drawn)
    assert json.loads(detail_of(said)) == expected

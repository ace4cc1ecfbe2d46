"""What is said of a result that is not there yet, or not at all."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from gateway.relay.running import APPLIED, Running, no_result, result_url, running_head

RID = "req_0123456789abcdef01234567"
AT = datetime(2026, 11, 22, 12, 0, 0, 900_000, tzinfo=UTC)


async def test_a_call_that_runs() -> None:
    running = Running(RID, "generation", "team-art", AT, 41.2345, partials=2)
    head = running_head(running)
    content = b"".join([chunk async for chunk in head.body()])
    assert (head.status, head.length) == (202, len(content))
    assert json.loads(content) == {
        "id": RID,
        "object": "image.result",
        "status": "in_progress",
        "created_at": 1_795_348_800,
        "operation": "generation",
        "model": "team-art",
        "progress": {"partial_images": 2, "seconds": 41.2},
        "result_url": f"/v1/images/results/{RID}",
    }
    assert dict(head.headers) == {
        "content-type": "application/json",
        "x-request-id": RID,
        "location": result_url(RID),
        "retry-after": "2",
    }
    head.close()


async def test_the_first_answer_says_that_the_wish_was_heard() -> None:
    head = running_head(Running(RID, "edit", "m", AT, -0.001), APPLIED)
    assert dict(head.headers)["preference-applied"] == "respond-async"
    content = b"".join([chunk async for chunk in head.body()])
    assert json.loads(content)["progress"] == {"partial_images": 0, "seconds": 0.0}


@pytest.mark.parametrize(
    ("ttl", "words"),
    [(900, "15 minutes"), (3600, "1 hour"), (1, "1 second"), (90, "90 seconds"), (60, "1 minute")],
)
def test_how_long_results_are_kept_is_said_in_words(ttl: int, words: str) -> None:
    error = no_result(RID, timedelta(seconds=ttl), timedelta(days=1))
    assert str(error) == (
        f"No result {RID} of your team. Results are kept for {words}, and for 24 hours where the "
        "request had an Idempotency-Key."
    )
    assert (error.status, error.code, error.should_retry) == (404, "result_not_found", False)

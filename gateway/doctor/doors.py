"""The way to the gateway: how long each link of it waits, and who is believed."""

from __future__ import annotations

from gateway.doctor.finding import Check, Topic
from gateway.relay.hosting import HOSTED
from gateway.settings import Settings

LONG_PICTURE_SECONDS = 300
PROXY_SILENCE_SECONDS = 60
"""What nginx, an ALB and most others allow between two bytes, if nobody changed it."""
GRACE_SECONDS = 30
ROOM_SECONDS = 90
WIDE = {4: 8, 6: 16}
"""The shortest prefix of a network, by version, that may be somebody's own."""


async def timeouts(settings: Settings) -> Check:
    """Each link has to wait longer than the one behind it."""
    topic = Topic("time-outs")
    server, relay = settings.server, settings.relay
    longest = 0.0
    for upstream in settings.upstreams.values():
        times = upstream.timeouts
        longest = max(longest, times.total_seconds)
        about = Topic("time-outs", f"upstream {upstream.name}")
        if times.total_seconds < LONG_PICTURE_SECONDS:
            yield about.warn(
                f"total_seconds is {times.total_seconds:g}; a large picture takes up to "
                f"{LONG_PICTURE_SECONDS} s: it would be given up, and paid for all the same",
                f"set upstreams.{upstream.name}.timeouts.total_seconds to 600",
            )
        for name, seconds in (
            ("first_byte_seconds", times.first_byte_seconds),
            ("connect_seconds", times.connect_seconds),
        ):
            if seconds > times.total_seconds:
                yield about.warn(
                    f"{name} ({seconds:g}) is over total_seconds ({times.total_seconds:g}), which "
                    "is what holds",
                    f"lower {name}, or raise total_seconds",
                )
    if relay.keep_alive_seconds >= PROXY_SILENCE_SECONDS:
        yield topic.warn(
            f"relay.keep_alive_seconds is {relay.keep_alive_seconds:g}: most proxies cut a stream "
            f"that is silent for {PROXY_SILENCE_SECONDS} s",
            "set relay.keep_alive_seconds to 15",
        )
    if relay.max_wait_seconds is not None and relay.max_wait_seconds > longest > 0:
        yield topic.warn(
            f"relay.max_wait_seconds ({relay.max_wait_seconds:g}) is over the longest call "
            f"({longest:g} s), and so is never reached",
            "lower it below what the proxies in front wait, or remove it",
        )
    answers = min(longest, relay.max_wait_seconds or longest) + server.queue_seconds
    yield topic.ok(
        f"an answer may take {answers:g} s: what stands before the gateway has to wait "
        f"{answers + ROOM_SECONDS:g} s (nginx proxy_read_timeout, ALB idle time-out; README, "
        '"Time-outs on the way")'
    )
    yield topic.ok(
        f"an end may take {server.drain_seconds:g} s: let whoever sends SIGTERM wait "
        f"{server.drain_seconds + GRACE_SECONDS:g} s (terminationGracePeriodSeconds, "
        "stop_grace_period, TimeoutStopSec)"
    )


async def doors(settings: Settings) -> Check:
    """Whose word is taken for where a request comes from, and who can read the metrics."""
    server = settings.server
    wide = [one for one in server.trusted_proxies if one.prefixlen < WIDE[one.version]]
    topic = Topic("doors", "server.trusted_proxies")
    if wide:
        yield topic.warn(
            f"{', '.join(map(str, wide))} is nearly everybody: anyone there can write any address "
            "into X-Forwarded-For",
            "name the addresses of your load balancers alone",
        )
    elif server.trusted_proxies:
        yield topic.ok(f"{', '.join(map(str, server.trusted_proxies))} may say whom they speak for")
    else:
        yield topic.ok(
            "empty: X-Forwarded-For is not believed; behind a proxy its address is logged"
        )
    topic = Topic("doors", "server.public_url")
    if server.public_url is None:
        yield topic.ok("not set: response_format=url is refused, with this setting's name")
    elif settings.hosts_pictures:
        yield topic.ok(f"pictures are fetched below {server.public_url}{HOSTED}, with no key")
    else:
        yield topic.ok("set, and hosted.enabled is false: response_format=url is refused")
    topic = Topic("doors", "server.metrics_port")
    if server.metrics_port is None:
        yield topic.ok(
            f"not set: /metrics is on port {server.port} for all who reach it; set it, or have the "
            "proxy in front refuse /metrics"
        )
    else:
        yield topic.ok(f"/metrics, /healthz and /readyz are on port {server.metrics_port}")

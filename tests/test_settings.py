"""The settings: what an operator may write, and what is said about everything else."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from gateway.domain.compat import OFF, Compat, CompatRules, merged
from gateway.domain.money import format_dollars
from gateway.domain.route import Target, Unpriced
from gateway.domain.team import Limits, PerUser
from gateway.domain.user import UserPolicy, UserSource
from gateway.secret import Secret
from gateway.settings import (
    CacheScope,
    ConfigError,
    Kind,
    OnUnknown,
    Results,
    Settings,
    Tracing,
    UpstreamKey,
    default_config_path,
    load,
    shipped,
)
from gateway.yamlfile import plain

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "config" / "gateway.yaml"
KEY = "igw_test_growth_0123456789abcdef"
OTHER_KEY = "igw_test_ci_0123456789abcdefghij"
PROVIDER_KEY = "sk-proj-0123456789abcdefghijklmnop"
WEBHOOK_SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

UPSTREAM = 'upstreams: {openai: {kind: openai, base_url: "https://h/v1", api_keys: [k]}}\n'
MODELS = UPSTREAM + "models: {art: {upstream: openai}}\n"


def read(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> Settings:
    path = folder / "gateway.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load(path, environ or {})


def attempt(folder: Path, text: str | bytes, environ: Mapping[str, str]) -> Settings | ConfigError:
    try:
        return read(folder, text, environ)
    except ConfigError as error:
        return error


def refusal(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[str]:
    """Each mistake as ``12:5: path: message``."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, environ)
    prefix = f"{folder / 'gateway.yaml'}:"
    return [line.removeprefix(prefix) for line in str(caught.value).splitlines()]


MISTAKES = [
    # syntax
    ("server:\n\tport: 1", "2:1: a tab is not allowed here: indent with spaces"),
    ("server: {port: 1", "1:17: the { before it is not closed here: a comma or a } is missing"),
    ("server: {}\nlog\n", "2:1: a name without its colon: write name: value"),
    ('log: {}\nserver: {host: "a}\n', "2:16: this quote is not closed"),
    ("log: {}\n  relay: {}", "2:3: this does not fit the lines above: check the indentation"),
    ("log: ]", "1:6: a value is missing here, or needs quotes"),
    ("a: b: c", "1:5: a colon is not allowed here"),
    ("server: {}\n---\nlog: {}", '2:1: a second document starts here: remove the "---"'),
    ("server: {}\nserver: {}", "2:1: server: is here twice: the first is on line 1; remove one"),
    ("log: {level: info, level: info}", "1:20: log.level: is here twice"),
    ("? [a]\n: 1", "1:3: a name before a colon must be one plain text"),
    ("log: !!python/object:os.system x", "1:6: log: a tag is not allowed"),
    ("log: *pass", "1:6: log: refers to an anchor that is not above it"),
    ("prices: {rows: &a [*a]}", "1:20: prices.rows[0]: refers to an anchor that is not above it"),
    ("models: {*: {upstream: a}}", '1:11: a value or a name that starts with "*" or "&" needs'),
    ("teams: {a: {keys: [${KEY}]}}", "1:21: a value with ${...} inside [ ] needs quotes"),
    ("log: {<<: {level: info}}", '1:7: log: merging with "<<" is not supported'),
    ('log: "\\UFFFFFFFF"', "not valid YAML"),
    (b"log:\n  level: \xff", "2:10: the file is not text in UTF-8"),
    (b"log:\n  level: \x07", "2:10: the control character U+0007 is not allowed"),
    ("a: " + "[" * 30, "1:24: a[0][0]"),
    ("[1, 2]", "1:1: must be a table of names and values"),
    # words
    ("relay: {log_prompts: yes}", "1:22: relay.log_prompts: yes is a boolean in old YAML and a"),
    ("relay: {log_prompts: Off}", "1:22: relay.log_prompts: Off is a boolean in old YAML and a"),
    ('relay: {log_prompts: "true"}', "1:22: relay.log_prompts: must be true without the quotes"),
    ("relay: {log_prompts: y}", 'relay.log_prompts: must be true or false, not "y"'),
    ("server: {prot: 1}", '1:10: server.prot: unknown key; did you mean "port"?'),
    ("sever: {}", '1:1: sever: unknown key; did you mean "server"?'),
    ("console: {}", "1:1: console: unknown key; known here: server, storage, ledger, upstreams"),
    ("log: {level: loud}", 'log.level: must be "debug", "info", "warning" or "error", not "loud"'),
    ("log: [info]", "1:6: log: must be a table of names and values"),
    ("log: {level: [info]}", "1:14: log.level: must be one value, not a list"),
    ("server: {host: }", "1:15: server.host: needs a value; remove the line for the default"),
    ("server: {host: true}", '1:16: server.host: must be a host or an address: put "true" in'),
    # numbers
    ("server: {port: 808o}", '1:16: server.port: must be a port, not "808o"'),
    ('server: {port: "8080"}', "1:16: server.port: must be a port: remove the quotes"),
    ("server: {port: 99999}", "1:16: server.port: must be a port from 0 to 65535"),
    ("server: {port: 010}", "server.port: must be a port in decimal digits, without a leading"),
    ("server: {port: 0x1F}", "server.port: must be a port in decimal digits, without a leading"),
    ("server: {port: 1:30}", 'server.port: must be a port: old YAML reads this in base 60, not "1'),
    ("server: {port: 80.0}", 'server.port: must be a port, not "80.0"'),
    ("server: {max_side: -1}", "server.max_side: must be a whole number from 1 to 1000000"),
    ("server: {max_pixels: 1_0}", 'server.max_pixels: must be a whole number, not "1_0"'),
    ("server: {buffer_bytes: 128 megs}", 'server.buffer_bytes: must be a size, like 128MiB, 10GiB'),
    ("server: {buffer_bytes: 0}", "server.buffer_bytes: must be a size from 1 byte to 1024TiB"),
    ("server: {drain_seconds: 10m}", "server.drain_seconds: must be a number of seconds, like 5"),
    ("server: {watch_seconds: -1}", "server.watch_seconds: must be a number of seconds from 0 to"),
    ("server: {max_in_flight: 0}", "server.max_in_flight: must be a whole number from 1 to"),
    ("server: {queue: -1}", "server.queue: must be a whole number from 0 to 1000000"),
    ("teams: {a: {weight: 0}}", "teams.a.weight: must be a whole number from 1 to 1000"),
    ("server: {drain_seconds: -1}", "server.drain_seconds: must be a number of seconds from 0 to"),
    ("cache: {ttl: 1:30}", 'cache.ttl: must be a time, like 30s, 15m, 24h or 7d, not "1:30"'),
    ("results: {ttl: 0}", "results.ttl: must be a time from 1s to 3650d"),
    ("results: {max_bytes: lots}", "results.max_bytes: must be a size"),
    ("results: {webhook: ftp://h}", "results.webhook: must be a url that starts with https://"),
    ("results: {webhook: http://example.com/x}", "results.webhook: must be https:// on a public"),
    ("results: {secret: hunter2}", 'results.secret: must be "whsec_" and 24 to 64 bytes in base6'),
    ("results: {keep: 1d}", "results.keep: "),
    ("relay: {keep_alive_seconds: 0}", "relay.keep_alive_seconds: must be a number of seconds fr"),
    ("relay: {max_wait_seconds: soon}", "relay.max_wait_seconds: must be a number of seconds"),
    ("cache: {ttl: 0}", "cache.ttl: must be a time from 1s to 3650d"),
    ("server: {trusted_proxies: 10.0.0.0/8}", "server.trusted_proxies: must be a list: [one, two]"),
    ("server: {trusted_proxies: [10.0.0.1/8]}", "1:28: server.trusted_proxies[0]: has bits set "
     "after its prefix: write 10.0.0.0/8"),
    ('server: {trusted_proxies: ["*"]}', "server.trusted_proxies[0]: must be an address or a netw"),
    ("server: {public_url: images.test}", "server.public_url: must be the url that clients reach"),
    ("server: {public_url: 'https://h/v1/'}", "server.public_url: must not end in /v1"),
    ("server: {public_url: 'https://a:b@h'}", "server.public_url: must not hold a user or a pass"),
    ("server: {public_url: 'https://h/?a=b'}", 'server.public_url: must not hold "?" or "#"'),
    ("server: {public_url: 'https://h:99999'}", "server.public_url: must be a url in ASCII"),
    ("hosted: {ttl: 0}", "hosted.ttl: must be a time from 1s to 3650d"),
    ("hosted: {max_bytes: lots}", "hosted.max_bytes: must be a size"),
    ("server: {cors: {origins: https://a.com}}", "server.cors.origins: must be a list"),
    ("server: {cors: {origins: [https://a.com/]}}", "1:27: server.cors.origins[0]: must be the o"),
    ("server: {cors: {origins: [https://A.com]}}", "server.cors.origins[0]: must be the origin of"),
    ("server: {cors: {origins: [http://a.com]}}", "server.cors.origins[0]: must be the origin of"),
    ("server: {cors: {origins: [https://*.a.com]}}", 'without a slash at its end, like https://stu'),
    ("server: {cors: {origins: [null]}}", "server.cors.origins[0]: needs a value"),
    ("server: {cors: {max_age: 0}}", "server.cors.max_age: must be a time from 1s"),
    ("server: {cors: {credentials: true}}", "server.cors.credentials: "),
    ("server: {port: 81, metrics_port: 81}", "1:34: server.metrics_port: is the same as"),
    # references
    ('server: {host: "${HOST}"}', "1:16: server.host: the environment variable HOST is not set: "
     "set it, or write ${HOST:-} for a value that may be empty"),
    ('server: {host: "${HOST:-}"}', "1:16: server.host: is empty: set HOST"),
    ('server: {host: "${HO ST}"}', '1:16: server.host: holds a "$" that is no reference'),
    ("server: {host: $HOST}", '1:16: server.host: holds a "$" that is no reference: write ${NAME}'),
    ('storage: {pepper: "${file:/no/such}"}', "storage.pepper: the file /no/such does not exist"),
    # storage
    ("storage: {database: postgresql://h/d}", "storage.pepper: must be set where the database is"),
    ("storage: {database: postgresql://h}", "storage.database: must name a database"),
    ("storage: {database: 'postgresql://u:pa/ss@h/d'}", "storage.database: must have each @ and /"),
    ("storage: {database: 'postgresql://u:p@ss@h/d'}", "storage.database: must have each @ and /"),
    ("storage: {database: 'postgresql://u:p ss@h/d'}", "storage.database: must have each @ and /"),
    ("storage: {database: 'postgresql://h:5432,:5433/d'}", "storage.database: must be a url in A"),
    ("server: {replicas: 2}", "server.replicas: must be 1 with SQLite"),
    ("storage: {database: data/gateway.db}", "storage.database: must be sqlite:/// and the path"),
    ('storage: {database: "sqlite:///:memory:"}', "storage.database: must be sqlite:/// and the p"),
    ("storage: {redis: redis+cluster://h/3}", "storage.redis: must not name a database"),
    ("storage: {redis: rediss+cluster://h/3}", "storage.redis: must not name a database"),
    ("storage: {redis: rediss+sentinel://h}", "storage.redis: must name its sentinels and the s"),
    ("storage: {redis: 'redis://h?ssl_ca_certs=ca.pem'}", "storage.redis: must not have options"),
    ("storage: {redis: 'rediss://h?decode=1'}", "storage.redis: must not have options, except"),
    ("storage: {redis: 'redis+sentinel://h/n?x=1'}", "storage.redis: must name its sentinels and"),
    ("storage: {redis: rediss+cloud://h}", "storage.redis: must be a url that starts with redis"),
    ("storage: {redis: redis+sentinel://h}", "storage.redis: must name its sentinels and the s"),
    ("storage: {redis: h:6379}", "storage.redis: must be a url that starts with redis://, redis"),
    ("storage: {redis: redis://h/a}", "storage.redis: must end in the number of a database"),
    ("storage: {redis: 'redis://:pw@'}", "storage.redis: must be a url in ASCII with a host"),
    ("storage: {blobs: s3://b}", "storage.blobs: blobs in S3 do not exist in this version"),
    ("admin: {keys: [secretsecretsecret]}", "1:16: admin.keys[0]: the Admin API does not exist"),
    ("prices: {file: no.yaml}", "1:16: prices.file: there is no such file"),
    (f"prices: {{file: {'9' * 5000}}}", "1:16: prices.file: there is no such file"),
    ("prices: {rows: [a]}", "1:17: prices.rows[0]: must be a row as in prices.yaml"),
    ("ledger: {keep: 400}", "1:16: ledger.keep: needs a unit: write 400d for days"),
    ("ledger: {keep: 1s}", "1:16: ledger.keep: must be a day or more: write 400d"),
    ("ledger: {keep: 23h}", "1:16: ledger.keep: must be a day or more"),
    ("notify: {drift_percent: 5m}", "1:25: notify.drift_percent: must be a percentage from 0 to "
     '100, like 1 or 0.5, not "5m"'),
    ("notify: {drift_percent: 101}", "notify.drift_percent: must be a percentage from 0 to 100"),
    # tracing
    ("tracing: {otlp: collector:4318}", "1:17: tracing.otlp: must be the url that a collector take"
     "s traces at (OTLP/HTTP): http://collector:4318/v1/traces"),
    ("tracing: {otlp: grpc://collector:4317}", "tracing.otlp: must be the url that a collector"),
    ("tracing: {otlp: http://collector:4318}", "tracing.otlp: must have the path that traces are "
     "posted to, usually /v1/traces: http://collector:4318/v1/traces"),
    ("tracing: {otlp: 'http://u:pw@collector/v1/traces'}", "tracing.otlp: must not hold a user or"),
    ("tracing: {otlp: 'https://c.example/v1/traces?key=1'}", 'tracing.otlp: must not hold "?" or'),
    ("tracing: {otlp: http://c.example.com/v1/traces}", "tracing.otlp: must be https:// on a publ"),
    ("tracing: {otlp: 'http://collector:99999/v1/traces'}", "tracing.otlp: must be a url in ASCII"),
    ("tracing: {sample: 10}", "1:19: tracing.sample: must be a share from 0 to 1, like 1 or 0.05"),
    ("tracing: {sample: 5%}", 'tracing.sample: must be a share from 0 to 1, like 1 or 0.05, not '),
    ("tracing: {headers: {host: a}}", "tracing.headers.host: cannot be set here: the gateway writ"),
    ("tracing: {headers: {a: b, A: c}}", "tracing.headers: holds a header twice"),
    ("tracing: {endpoint: a}", "tracing.endpoint: unknown key"),
    ("upstreams: {a: {kind: sandbox, headers: {traceparent: x}}}", "upstreams.a.headers.traceparen"
     "t: cannot be set here: each request has its own (tracing)"),
    # upstreams
    ("upstreams: {a: {kind: azure}}", 'upstreams.a.kind: the kind "azure" does not exist in this'),
    ("upstreams: {a: {base_url: 'https://h/v1'}}", '1:16: upstreams.a: needs "kind"'),
    ("upstreams: {a: {kind: openai}}", '1:16: upstreams.a: needs "base_url"'),
    ("upstreams: {A: {kind: sandbox}}", "upstreams.A: the name of an upstream has lower-case"),
    ("upstreams: {a: {kind: sandbox, base_url: 'https://h/v1'}}", "upstreams.a.base_url: a sandb"),
    ("upstreams: {a: {kind: sandbox, admin_key: x}}", "upstreams.a.admin_key: a sandbox has none"),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', admin_key: sk-0123456789abcdefgh}}\n"
     "teams: {a: {keys: [sk-0123456789abcdefgh]}}", "2:20: teams.a.keys[0]: that is a provider's"),
    ("upstreams: {a: {kind: sandbox, api_key: x}}", 'unknown key; did you mean "api_keys"?'),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', verify: false}}", "verify: is neve"),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', api_keys: [igw_x]}}",
     "upstreams.a.api_keys[0]: that is a key of this gateway, not of a provider"),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', api_keys: ['a b']}}",
     "upstreams.a.api_keys[0]: must be a key without spaces or line breaks"),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', api_keys: [k, k]}}",
     "upstreams.a.api_keys: holds the same key twice"),
    ("upstreams: {a: {kind: sandbox, headers: {Authorization: x}}}",
     "upstreams.a.headers.Authorization: cannot be set here: keys go to api_keys"),
    ("upstreams: {a: {kind: sandbox, headers: {connection: x}}}",
     "upstreams.a.headers.connection: cannot be set here: it belongs to one connection"),
    ('upstreams: {a: {kind: sandbox, headers: {x: "a\\r\\nb: c"}}}',
     "upstreams.a.headers.x: must be one line of ASCII"),
    ("upstreams: {a: {kind: sandbox, headers: {X-A: a, x-a: b}}}", "holds a header twice"),
    # models
    (UPSTREAM + "models: {a: {upstream: opnai}}", '2:24: models.a.upstream: there is no upstream '
     '"opnai"; did you mean "openai"?'),
    (UPSTREAM + "models: {a: {}}", '2:13: models.a: needs "upstream"'),
    (UPSTREAM + 'models: {"*": {upstream: openai, model: m}}', 'models.*.model: "*" passes every'),
    (UPSTREAM + "models: {a: {upstream: openai, unpriced: no}}", "no is a boolean in old YAML"),
    (UPSTREAM + "models: {a: {upstream: openai, upstreams: [openai]}}",
     '2:32: models.a.upstreams: cannot stand beside "upstream": write all of them here'),
    (UPSTREAM + "models: {a: {upstreams: []}}", "models.a.upstreams: is empty: name one upstr"),
    (UPSTREAM + "models: {a: {upstreams: }}", "models.a.upstreams: is empty: fill it in, or rem"),
    (UPSTREAM + "models: {a: {upstreams: openai}}", "models.a.upstreams: must be a list"),
    (UPSTREAM + "models: {a: {upstreams: [opnai]}}", '2:26: models.a.upstreams[0]: there is no '
     'upstream "opnai"; did you mean "openai"?'),
    (UPSTREAM + "models: {a: {upstreams: [openai, {upstream: opnai}]}}",
     '2:45: models.a.upstreams[1].upstream: there is no upstream "opnai"'),
    (UPSTREAM + "models: {a: {upstreams: [{model: b}]}}", 'models.a.upstreams[0]: needs "upst'),
    (UPSTREAM + "models: {a: {upstreams: [openai, {upstream: openai, model: a}]}}",
     "upstreams[1].upstream: is listed twice with the same model: give it more weight instead"),
    (UPSTREAM + "models: {a: {upstreams: [{upstream: openai, weight: 0}]}}",
     "models.a.upstreams[0].weight: must be a whole number from 1 to 1000000"),
    (UPSTREAM + "models: {a: {upstreams: [{upstream: openai, order: 1001}]}}",
     "models.a.upstreams[0].order: must be a whole number from 1 to 1000"),
    (UPSTREAM + "models: {a: {upstreams: [{upstream: openai, wieght: 2}]}}",
     'models.a.upstreams[0].wieght: unknown key; did you mean "weight"?'),
    (UPSTREAM + "models: {a: {upstream: openai, upstream_stream: never}}",
     "models.a.upstream_stream: must be"),
    (UPSTREAM + 'models: {"*": {upstreams: [{upstream: openai, model: m}]}}',
     'models.*.upstreams[0].model: "*" passes every name on as it is'),
    (UPSTREAM + "models: {a: {upstream: openai, fallback: [a]}}",
     "2:43: models.a.fallback[0]: is this model itself: name another one"),
    (UPSTREAM + "models: {art: {upstream: openai}, b: {upstream: openai, fallback: [arts]}}",
     'models.b.fallback[0]: there is no model "arts" under models; did you mean "art"?'),
    (UPSTREAM + "models: {a: {upstream: openai, fallback: ['*']}}",
     'models.a.fallback[0]: "*" is no model: name one that stands under models'),
    (UPSTREAM + "models: {a: {upstream: openai, fallback: [b]}, '*': {upstream: openai}}",
     'models.a.fallback[0]: there is no model "b" under models; "*" does not do for this'),
    (UPSTREAM + "models: {a: {upstream: openai, fallback: [b, b]}, b: {upstream: openai}}",
     "models.a.fallback[1]: is listed twice"),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', api_keys: [{key: k, wait: 2}]}}",
     'upstreams.a.api_keys[0].wait: unknown key; did you mean "weight"?'),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', api_keys: [{key: k, weight: 0}]}}",
     "upstreams.a.api_keys[0].weight: must be a whole number"),
    ("upstreams: {a: {kind: openai, base_url: 'https://h/v1', api_keys: [k, {key: k}]}}",
     "upstreams.a.api_keys: holds the same key twice"),
    ("relay: {attempts: 0}", "relay.attempts: must be a whole number from 1 to 5"),
    ("relay: {attempts: 6}", "relay.attempts: must be a whole number from 1 to 5"),
    ("relay: {on_unknown: retry}", "relay.on_unknown: must be"),
    (UPSTREAM + "models: {'a b': {upstream: openai}}", "models.a b: a model's name has letters"),
    # teams
    ("teams: {Growth: {}}", "1:9: teams.Growth: the name of a team has lower-case letters"),
    ("teams: {a: {limit: {}}}", '1:13: teams.a.limit: unknown key; did you mean "limits"?'),
    ("teams: {a: {keys: [short]}}", "1:20: teams.a.keys[0]: a key must have at least 20 charact"),
    (f"teams: {{a: {{keys: [{KEY}, {KEY}]}}}}", "1:54: teams.a.keys[1]: is the same key as teams."
     "a.keys[0] (line 1)"),
    (f"teams:\n  a: {{keys: [{KEY}]}}\n  b: {{keys: [{{key: {KEY}}}]}}", "3:20: teams.b.keys[0].ke"
     "y: is the same key as teams.a.keys[0] (line 2)"),
    (f"teams: {{a: {{keys: [{{key: {KEY}, name: c}}, {{key: {OTHER_KEY}, name: c}}]}}}}",
     'teams.a.keys: two keys have the name "c"'),
    ('teams: {a: {keys: ["${KEY}"]}}', "1:20: teams.a.keys[0]: the environment variable KEY is"),
    (MODELS + "teams: {a: {models: [arts]}}", '3:22: teams.a.models[0]: there is no model "arts" '
     'under models; did you mean "art"?'),
    (MODELS + f"teams: {{a: {{keys: [{{key: {KEY}, models: [x]}}]}}}}", "keys[0].models[0]: there"),
    ("teams: {a: {budget: }}", "teams.a.budget: is empty: fill it in, or remove it"),
    ("teams: {a: {budget: {day: }}}", "teams.a.budget.day: needs a value"),
    ("teams: {a: {budget: {day: 1e}}}", 'teams.a.budget.day: must be an amount of dollars, like'),
    ("teams: {a: {budget: {day: 1e-10}}}", "teams.a.budget.day: is finer than a nano-dollar"),
    ("teams: {a: {budget: {day: 1e+18}}}", "teams.a.budget.day: must be an amount of dollars"),
    ("teams: {a: {budget: {day: 1e+11}}}", "teams.a.budget.day: is more dollars than the"),
    ("teams: {a: {budget: {day: -5e-05}}}", "teams.a.budget.day: must be an amount of dollars"),
    ("teams: {a: {budget: {day: $5}}}", "teams.a.budget.day: must be an amount of dollars, like"),
    ("teams: {a: {budget: {day: -5}}}", "teams.a.budget.day: must be an amount of dollars, like"),
    ("teams: {a: {budget: {day: .inf}}}", "teams.a.budget.day: must be an amount of dollars"),
    ("teams: {a: {budget: {day: 0.0000000001}}}", "teams.a.budget.day: is finer than a nano-dol"),
    ("teams: {a: {budget: {day: 99999999999}}}", "teams.a.budget.day: is more dollars than the"),
    ("teams: {a: {budget: {dya: 1}}}", 'teams.a.budget.dya: unknown key; did you mean "day"?'),
    ("teams: {a: {limits: {requests_per_minute: 0}}}", "must be a whole number from 1 to 10000000"),
    ("teams: {a: {per_user: }}", "teams.a.per_user: is empty: fill it in, or remove it"),
    ("teams: {a: {per_user: {limits: {max_cost_per_request: 1}}}}",
     "teams.a.per_user.limits.max_cost_per_request: unknown key"),
    ("teams: {a: {per_user: {soft_budget: {day: 1}}}}", "teams.a.per_user.soft_budget: unknown"),
    ("teams: {a: {per_user: {budget: {day: -5}}}}", "teams.a.per_user.budget.day: must be an"),
    ("users: {sources: []}\nteams: {a: {per_user: {required: true}}}",
     "teams.a.per_user: holds for nobody while users.sources is empty: no request has a user"),
    ("users: {sources: [x-user]}", "users.sources[0]: must be"),
    (f"teams: {{a: {{keys: [{{key: {KEY}, expires: tomorrow}}]}}}}", 'not "tomorrow"'),
    (f"teams: {{a: {{keys: [{{key: {KEY}, expires: 2027-02-30}}]}}}}", "is no day of the calendar"),
    (f"teams: {{a: {{keys: [{{key: {KEY}, expires: 2027-02-03T10:00:00}}]}}}}", "must be a day"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, text: str | bytes, expected: str
) -> None:
    (line,) = refusal(tmp_path, text)
    assert expected in line
    assert re.match(r"[0-9]+:[0-9]+: ", line)


def test_all_mistakes_are_reported_at_once_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path,
        "server: {port: x, hots: h}\n"
        'storage: {pepper: "${PEPPER}", redis: mysql://h}\n'
        "upstreams: {openai: {kind: azure}}\n"
        "models: {a: {upstream: openai}, b: {upstream: opnai}}\n"
        "teams: {growth: {budget: {day: ten}, models: [c], keys: [short]}}\n"
        "log: yes\n",
        {"GATEWAY_LOG__LEVELS": "x", "GATEWAY_CACHE__TTL": "soon"},
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["1:16", "server.port"],
        ["1:19", "server.hots"],
        ["2:19", "storage.pepper"],
        ["2:39", "storage.redis"],
        ["3:28", "upstreams.openai.kind"],
        ["4:47", "models.b.upstream"],
        ["5:32", "teams.growth.budget.day"],
        ["5:47", "teams.growth.models[0]"],
        ["5:58", "teams.growth.keys[0]"],
        ["6:6", "log"],
        ["GATEWAY_CACHE__TTL", "cache.ttl"],
        ["GATEWAY_LOG__LEVELS", "there is no such setting; did you mean GATEWAY_LOG__LEVEL?"],
    ]


ORIGINS = [
    ("https://api.openai.com/v1", None, None),
    ("http://127.0.0.1:8000/v1", None, "unencrypted"),
    ("http://[::1]/v1", None, "unencrypted"),
    ("http://10.1.2.3/v1", None, "unencrypted"),
    ("http://vllm/v1", None, "unencrypted"),
    ("http://images.default.svc.cluster.local/v1", None, "unencrypted"),
    ("https://relay.example.com", None, "write /v1 behind it"),
    ("https://relay.example.com/", None, "write /v1 behind it"),
    ("https://relay.example.com/v1/images/generations", None, "names an endpoint"),
    ("https://relay.example.com/v1/models/", None, "names an endpoint"),
    ("https://relay.example.com/images", None, None),
    ("http://relay.example.com/v1", "allow_http", None),
    ("http://8.8.8.8/v1", "allow_http", None),
    ("http://169.254.169.254/v1", "metadata", None),
    ("https://169.254.1.1/v1", "link-local", None),
    ("https://[fe80::1]/v1", "link-local", None),
    ("https://[::ffff:169.254.169.254]/v1", "metadata", None),
    ("https://[64:ff9b::a9fe:a9fe]/v1", "metadata", None),
    ("https://[fd00:ec2::254]/v1", "metadata", None),
    ("https://metadata.google.internal/v1", "metadata", None),
    ("https://2852039166/v1", "usual form", None),
    ("https://0xa9.0xfe.0xa9.0xfe/v1", "usual form", None),
    ("http://0.0.0.0/v1", "empty address", None),
    ("https://user:pass@h/v1", "user or a password", None),
    ("https://h/v1?a=b", "must not hold", None),
    ("ftp://h/v1", "starts with https://", None),
    ("https://", "a host and", None),
    ("https://h:99999/v1", "a host and", None),
    ("https://[::1/v1", "a host and", None),
    ("https://169。254。169。254/v1", "in ASCII", None),
    ("https://h\\@evil/v1", "a host and", None),
]


@pytest.mark.parametrize(("url", "mistake", "warning"), ORIGINS)
def test_where_keys_may_be_sent(
    tmp_path: Path, url: str, mistake: str | None, warning: str | None
) -> None:
    text = f"upstreams: {{a: {{kind: openai, api_keys: [k], base_url: '{url}'}}}}\n"
    if mistake is not None:
        (line,) = refusal(tmp_path, text)
        assert mistake in line
        return
    found = [str(each) for each in read(tmp_path, text).warnings if each.path != "models"]
    assert len(found) == (warning is not None)
    assert warning is None or warning in found[0]


def test_http_over_a_public_network_needs_a_word(tmp_path: Path) -> None:
    text = "upstreams: {a: {kind: openai, api_keys: [k], base_url: 'http://h.com/v1', %s}}"
    assert "a" in read(tmp_path, text % "allow_http: true").upstreams
    assert len(refusal(tmp_path, text % "allow_http: false")) == 1


@pytest.mark.parametrize(
    ("url", "kept", "warned"),
    [
        ("https://images.example.com/", "https://images.example.com", False),
        ("https://images.example.com/a/b//", "https://images.example.com/a/b", False),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", False),
        ("http://images.lan", "http://images.lan", False),
        ("http://images.example.com", "http://images.example.com", True),
    ],
)
def test_where_clients_reach_it(tmp_path: Path, url: str, kept: str, warned: bool) -> None:
    found = read(tmp_path, f"server: {{public_url: {url}}}")
    assert found.server.public_url == kept
    assert found.hosts_pictures
    said = [str(one) for one in found.warnings if one.path == "server.public_url"]
    assert len(said) == warned
    assert not read(tmp_path, "{}").hosts_pictures
    off = f"{{server: {{public_url: {url}}}, hosted: {{enabled: false}}}}"
    assert not read(tmp_path, off).hosts_pictures


def test_origins_of_pages(tmp_path: Path) -> None:
    origins = ["https://a.com", "https://b-c.a.com:8443", "http://localhost:5173"]
    origins += ["http://127.0.0.1", "http://[::1]:3000", "*"]
    cors = read(tmp_path, f"server: {{cors: {{origins: {json.dumps(origins)}}}}}").server.cors
    assert cors.origins == tuple(origins)
    assert cors.max_age == timedelta(minutes=10)
    assert read(tmp_path, "").server.cors.origins == ()


def test_the_file_of_the_house(tmp_path: Path) -> None:
    """The example that the design binds, whole."""
    text = """
server:    {host: 0.0.0.0, port: 8080, buffer_bytes: 128MiB, drain_seconds: 610,
            trusted_proxies: [10.0.0.0/8]}
storage:
  database: sqlite:///data/gateway.db
  redis: null
  blobs: data/blobs
  pepper: null
upstreams:
  openai: {kind: openai, base_url: https://api.openai.com/v1/, api_keys: ["${OPENAI_API_KEY:-}"],
           headers: {OpenAI-Organization: org-1}}
models:
  gpt-image-2.5-flare: {upstream: openai}
  team-art:            {upstream: openai, model: gpt-image-2.5-flare, validate: strict}
  "*":                 {upstream: openai, unpriced: refuse}
cache:     {enabled: true, ttl: 24h, scope: organization, max_bytes: 10GiB, redis: null}
teams:
  growth:
    keys:   ["${GROWTH_KEY}", {key: "${GROWTH_CI_KEY}", name: ci, models: [team-art],
              budget: {day: 1.00}, expires: 2027-01-01}]
    models: [gpt-image-2.5-flare, team-art]
    limits: {requests_per_minute: 60, images_per_minute: 20, concurrent_requests: 10}
    budget: {month: 50.00, day: 5.00}
    cache:  {enabled: false}
admin:     {keys: ["${GATEWAY_ADMIN_KEY:-}"]}
"""
    environ = {"OPENAI_API_KEY": PROVIDER_KEY, "GROWTH_KEY": KEY, "GROWTH_CI_KEY": OTHER_KEY}
    made = read(tmp_path, text, environ)
    assert made.warnings == ()
    assert made.server.buffer_bytes == 128 * 2**20
    assert made.server.trusted_proxies == (ip_network("10.0.0.0/8"),)
    assert made.storage.database == tmp_path / "data" / "gateway.db"
    assert made.storage.blobs == tmp_path / "data" / "blobs"
    upstream = made.upstreams["openai"]
    assert (upstream.name, upstream.kind, upstream.ready) == ("openai", Kind.OPENAI, True)
    assert upstream.base_url == "https://api.openai.com/v1"
    assert upstream.api_keys == (UpstreamKey(key=Secret(PROVIDER_KEY)),)
    assert upstream.headers == (("openai-organization", Secret("org-1")),)
    art = made.catalogue.find("team-art")
    assert art is not None
    assert art.strict
    assert art.target.model == "gpt-image-2.5-flare"
    other = made.catalogue.find("dall-e-9")
    assert other is not None
    assert (other.label, other.target.model, other.unpriced) == (
        "other",
        "dall-e-9",
        Unpriced.REFUSE,
    )
    assert made.cache.scope is CacheScope.ORGANIZATION
    assert made.cache.ttl == timedelta(days=1)
    team = made.teams["growth"]
    assert team.declared
    assert not team.cache_enabled
    assert team.models == {"gpt-image-2.5-flare", "team-art"}
    assert team.limits == Limits(60, 20, 10, budget_day=5 * 10**9, budget_month=50 * 10**9)
    first, ci = made.declared_keys
    assert (first.secret, first.models, first.expires) == (Secret(KEY), None, None)
    assert (ci.name, ci.models, ci.limits.budget_day) == ("ci", frozenset({"team-art"}), 10**9)
    assert ci.expires == datetime(2027, 1, 1, tzinfo=UTC)
    assert ci.key("abc").declared
    assert made.lease_seconds == 660


def test_the_shipped_file_loads_with_nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = load(None, {})
    (warning,) = made.warnings
    assert warning.file == "config/gateway.yaml"
    assert warning.path == "upstreams.openai"
    assert warning.message == "has no key and is off: set OPENAI_API_KEY"
    assert not made.upstreams["openai"].ready
    assert made.catalogue.find("gpt-image-2.6-flare") is not None


def test_the_shipped_file_shows_every_default(tmp_path: Path) -> None:
    text = DEFAULT.read_text()
    shown, bare = read(tmp_path, text), read(tmp_path, "")
    sections = "server storage ledger prices cache results notify relay log tracing users"
    for section in sections.split():
        assert getattr(shown, section) == getattr(bare, section)
        for each in dataclasses.fields(getattr(bare, section)):
            assert re.search(rf"^  {each.name}: ", text, re.MULTILINE), each.name
    assert dataclasses.replace(shown.upstreams["openai"], name="", base_url="") == (
        dataclasses.replace(
            read(tmp_path, MODELS).upstreams["openai"], name="", base_url="", api_keys=()
        )
    )


def test_the_shipped_file_shows_what_is_repaired(tmp_path: Path) -> None:
    text = DEFAULT.read_text()
    shown, bare = read(tmp_path, text), read(tmp_path, "")
    assert dataclasses.replace(shown.compat, aliases={}) == bare.compat
    assert shown.compat.aliases.keys() == {"dall-e-3", "dall-e-2", "gpt-image-1"}
    assert set(shown.compat.aliases.values()) <= set(shown.catalogue.models)
    for each in dataclasses.fields(bare.compat):
        assert re.search(rf"^  {each.name}:", text, re.MULTILINE), each.name


COMPAT = """
upstreams: {openai: {kind: openai, base_url: https://api.openai.com/v1, api_keys: [sk-1]}}
models:
  art: {upstream: openai, compat: MODEL}
  "*": {upstream: openai, compat: {sizes: false}}
teams: {growth: {keys: [{key: growth-key-0123456789abcdef, compat: KEY}]}}
compat: ALL
"""


def said_of_compat(tmp_path: Path, everybody: str, model: str = "{}", key: str = "{}") -> Settings:
    text = COMPAT.replace("ALL", everybody).replace("MODEL", model).replace("KEY", key)
    return read(tmp_path, text)


def test_what_is_repaired(tmp_path: Path) -> None:
    made = said_of_compat(
        tmp_path,
        "{style: false, repeated_images: true, default_model: art, aliases: {dall-e-3: art}}",
        "{style: true}",
        "{quality: false, default_model: art}",
    )
    assert made.compat == Compat(
        style=False, repeated_images=True, default_model="art", aliases={"dall-e-3": "art"}
    )
    art, other = made.catalogue.find("art"), made.catalogue.find("another")
    assert art is not None
    assert other is not None
    assert art.compat == CompatRules(style=True)
    assert other.compat == CompatRules(sizes=False)
    [declared] = made.declared_keys
    assert declared.key("k1").compat == CompatRules(quality=False, default_model="art")


@pytest.mark.parametrize("word", ["false", '"off"'])
def test_nothing_is_repaired(tmp_path: Path, word: str) -> None:
    made = said_of_compat(tmp_path, word, word, word)
    assert made.compat == merged(Compat(), OFF)
    assert not made.compat.style
    art = made.catalogue.find("art")
    assert art is not None
    assert (art.compat, made.declared_keys[0].compat) == (OFF, OFF)
    assert said_of_compat(tmp_path, "{}").declared_keys[0].compat == CompatRules()


@pytest.mark.parametrize(
    ("everybody", "key", "path"),
    [
        ("{aliases: {dall-e-3: arts}}", "{}", "compat.aliases.dall-e-3"),
        # The wildcard serves every name, but is none.
        ("{default_model: gpt-image-2}", "{}", "compat.default_model"),
        ("{}", "{default_model: arts}", "teams.growth.keys[0].compat.default_model"),
        ("{styles: false}", "{}", "compat.styles"),
        ("true", "{}", "compat"),
        ("{}", '{aliases: {"dall-e-3": art}}', "teams.growth.keys[0].compat.aliases"),
        ("{}", "null", "teams.growth.keys[0].compat"),
    ],
)
def test_a_repair_that_cannot_be(tmp_path: Path, everybody: str, key: str, path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        said_of_compat(tmp_path, everybody, key=key)
    assert [mistake.path for mistake in refused.value.mistakes] == [path]


def test_an_alias_of_a_configured_name_does_nothing(tmp_path: Path) -> None:
    made = said_of_compat(tmp_path, "{aliases: {art: art}}")
    assert [warning.path for warning in made.warnings] == ["compat.aliases.art"]


def test_the_commented_team_of_the_shipped_file_is_right(tmp_path: Path) -> None:
    text = DEFAULT.read_text().replace("teams: {}", "teams:")
    text = re.sub(r"^#  ", "  ", text.partition("teams:")[2], flags=re.MULTILINE)
    text = DEFAULT.read_text().partition("teams: {}")[0] + "teams:" + text
    made = read(tmp_path, text, {"GROWTH_KEY": KEY, "GROWTH_CI_KEY": OTHER_KEY})
    assert made.teams["growth"].limits.max_cost_per_request == 2 * 10**9
    assert [each.name for each in made.declared_keys] == ["", "ci"]
    made = read(tmp_path, text, {"GROWTH_KEY": KEY})
    assert [each.name for each in made.declared_keys] == [""]
    assert "GROWTH_CI_KEY is empty: this key is left out" in {
        each.message for each in made.warnings
    }


def test_where_spans_go(tmp_path: Path) -> None:
    assert read(tmp_path, "").tracing == Tracing(
        otlp=None, headers=(), sample=1.0, cost=False, propagate=True
    )
    text = "tracing: {otlp: https://c.example/v1/traces, headers: {Authorization: Bearer t}}"
    made = read(tmp_path, text, {"GATEWAY_TRACING__SAMPLE": "0.05"}).tracing
    assert (made.otlp, made.sample) == ("https://c.example/v1/traces", 0.05)
    assert made.headers == (("authorization", Secret("Bearer t")),)
    assert "Bearer" not in repr(made)
    (warning,) = [
        one
        for one in read(tmp_path, "tracing: {otlp: http://c:4317/v1/traces}").warnings
        if one.path == "tracing.otlp"
    ]
    assert warning.message.startswith("has the port of OTLP over gRPC")


def test_how_long_results_are_kept(tmp_path: Path) -> None:
    made = read(tmp_path, "")
    assert made.results == Results()
    assert made.results.enabled
    assert (made.results.ttl, made.results.idempotent_ttl) == (
        timedelta(minutes=15),
        timedelta(hours=24),
    )
    assert (made.results.max_bytes, made.results.webhook) == (10 * 1024**3, None)
    assert (made.relay.keep_alive_seconds, made.relay.max_wait_seconds) == (15, None)


@pytest.mark.parametrize(
    ("written", "warned"),
    [
        ("{ttl: 15m, idempotent_ttl: 15m}", {}),
        ("{ttl: 2d}", {"results.ttl": "is longer than idempotent_ttl"}),
        (
            "{webhook: 'https://h.example.com/token-5f2c'}",
            {"results.secret": "is not set: whoever"},
        ),
        (f"{{webhook: 'https://h.example.com/token-5f2c', secret: {WEBHOOK_SECRET}}}", {}),
        (
            f"{{enabled: false, webhook: 'https://h.example.com/x', secret: {WEBHOOK_SECRET}}}",
            {"results.webhook": "hears nothing while results.enabled is false"},
        ),
    ],
)
def test_what_is_odd_about_results_is_said(
    tmp_path: Path, written: str, warned: dict[str, str]
) -> None:
    made = read(tmp_path, f"results: {written}")
    found = {one.path: one.message for one in made.warnings if one.path.startswith("results")}
    assert found.keys() == warned.keys()
    assert all(found[path].startswith(begin) for path, begin in warned.items())
    assert not [each for each in found.values() if "token-5f2c" in each or WEBHOOK_SECRET in each]


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_config_path({"GATEWAY_CONFIG": "x.yaml"}) == Path("x.yaml")
    assert default_config_path({}) == DEFAULT
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gateway.yaml").write_text("server: {port: 1}")
    assert load(None, {}).server.port == 1
    assert shipped("prices.yaml").is_file()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the file cannot be read .*--config FILE"):
        load(tmp_path / "no.yaml", {})
    with pytest.raises(ConfigError, match="the file cannot be read"):
        load(tmp_path, {})


def test_the_environment_wins(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        "server: {port: eighty, host: 127.0.0.1}\nstorage: {redis: redis://a}",
        {
            "GATEWAY_SERVER__PORT": "9000",
            "GATEWAY_STORAGE__REDIS": "",
            "GATEWAY_STORAGE__DATABASE": "sqlite:////var/lib/g.db",
            "GATEWAY_CACHE__TTL": "15m",
            "GATEWAY_CACHE__ENABLED": "false",
            "GATEWAY_RESULTS__IDEMPOTENT_TTL": "2d",
            "GATEWAY_RESULTS__WEBHOOK": "https://hooks.example.com/x",
            "GATEWAY_RELAY__MAX_WAIT_SECONDS": "90",
            "GATEWAY_STORAGE__PEPPER": "$${HOME} is not read for references",
            "GATEWAY_CONFIG": "x",
            "GATEWAY_ADMIN_KEY": "no setting",
            "GATEWAY_SERVICE_HOST": "kubernetes sets this one",
        },
    )
    assert (made.server.port, made.server.host) == (9000, "127.0.0.1")
    assert made.storage.redis is None
    assert made.storage.database == Path("/var/lib/g.db")
    assert (made.cache.ttl, made.cache.enabled) == (timedelta(minutes=15), False)
    assert made.results.idempotent_ttl == timedelta(days=2)
    assert made.results.webhook == Secret("https://hooks.example.com/x")
    assert made.relay.max_wait_seconds == 90
    assert made.storage.pepper == Secret("$${HOME} is not read for references")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("GATEWAY_SERVER__PROT", "1", "there is no such setting; did you mean GATEWAY_SERVER__PO"),
        ("GATEWAY_server__port", "1", "there is no such setting; did you mean GATEWAY_SERVER__PO"),
        ("GATEWAY_TEAMS__GROWTH", "1", "this can only be set in the file, not by a variable"),
        ("GATEWAY_SERVER__TRUSTED_PROXIES", "1", "this can only be set in the file, not by a var"),
        ("GATEWAY_SERVER__PORT", "hunter2", "server.port: must be a port"),
        ("GATEWAY_SERVER__PORT", "", "server.port: is empty: set GATEWAY_SERVER__PORT"),
    ],
)
def test_a_variable_that_is_wrong(tmp_path: Path, variable: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "", {variable: value})
    (mistake,) = caught.value.mistakes
    assert str(mistake).startswith(f"{variable}: {expected}")
    assert "hunter2" not in str(mistake)


def test_references(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "mine.pem").write_text("")
    (tmp_path / "provider").write_text(f"{PROVIDER_KEY}\r\n")
    made = read(
        tmp_path,
        'server: {port: "${PORT:-8081}", host: "a${MIDDLE}b"}\n'
        "storage: {pepper: '$${x} $$ $x ${P}', redis: '${REDIS:-}'}\n"
        'upstreams: {a: {kind: openai, base_url: "https://h/v1", verify: mine.pem,\n'
        '  api_keys: ["${file:provider}"], proxy: "${PROXY:-http://p:1}"}}\n'
        'teams: {a: {keys: ["${file:key}"], budget: {day: "${DAY}"}}}\n',
        {"MIDDLE": ".", "P": "a: {b: 'c'}\n# ${Q}", "DAY": "0.1"},
    )
    assert (made.server.port, made.server.host) == (8081, "a.b")
    assert made.storage.pepper == Secret("${x} $ $x a: {b: 'c'}\n# ${Q}")
    assert made.storage.redis is None
    assert made.upstreams["a"].verify == tmp_path / "mine.pem"
    assert made.upstreams["a"].api_keys == (UpstreamKey(key=Secret(PROVIDER_KEY)),)
    assert made.upstreams["a"].proxy == Secret("http://p:1")
    assert made.declared_keys[0].secret == Secret(KEY)
    assert made.teams["a"].limits.budget_day == 10**8


def test_places(tmp_path: Path) -> None:
    made = read(tmp_path, MODELS + "server: {max_connections: null, queue: 0, queue_seconds: 0}\n")
    assert made.upstreams["openai"].places == made.upstreams["openai"].max_connections == 1000
    text = MODELS.replace("api_keys: [k]", "api_keys: [k], max_in_flight: {}, max_connections: 5")
    assert read(tmp_path, text.replace("{}, max", "3, max")).upstreams["openai"].places == 3
    [warning] = read(tmp_path, text.replace("{}, max", "6, max")).warnings
    assert "max_in_flight: is over its max_connections (5)" in str(warning)
    teams = f"teams: {{growth: {{weight: 3, keys: [{KEY}]}}}}\n"
    assert read(tmp_path, MODELS + teams).teams["growth"].weight == 3


def test_warnings(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        MODELS.replace("[k]", "['']")
        + "storage: {redis: redis://a, pepper: short}\nserver: {workers: 4}\n"
        f"teams: {{a: {{keys: [{{key: {KEY}, models: [art]}}], models: []}}, b: {{}}}}\n"
        "ledger: {lease_seconds: 30}\n",
    )
    assert [f"{each.line} {each.path}" for each in made.warnings] == [
        "1 upstreams.openai",
        "3 storage.pepper",
        "5 teams.b",
        "6 ledger.lease_seconds",
    ]
    assert made.lease_seconds == 30


@pytest.mark.parametrize(
    ("server", "total_seconds", "line"),
    [
        ("{}", 600, None),
        ("{drain_seconds: 600}", 600, None),
        ("{drain_seconds: 599}", 600, 3),
        ("{}", 611, 3),
    ],
)
def test_a_drain_is_as_long_as_the_longest_call(
    tmp_path: Path, server: str, total_seconds: int, line: int | None
) -> None:
    timeouts = f"[k], timeouts: {{total_seconds: {total_seconds}}}"
    made = read(tmp_path, MODELS.replace("[k]", timeouts) + f"server: {server}\n")
    found = [f"{each.line} {each.path}" for each in made.warnings]
    assert found == ([] if line is None else [f"{line} server.drain_seconds"])
    assert all(f"({total_seconds} s, total_seconds" in each.message for each in made.warnings)


def test_several_workers_need_a_redis(tmp_path: Path) -> None:
    [warning] = read(tmp_path, MODELS + "server: {workers: 4}\n").warnings
    assert str(warning).partition(": ")[2].endswith("one will run")
    assert read(tmp_path, MODELS + "server: {workers: 1}\n").warnings == ()


@pytest.mark.parametrize("cache", ["null", "redis://a", "redis://b"])
def test_the_redis_itself_is_asked_whether_it_evicts(tmp_path: Path, cache: str) -> None:
    """Which Redis the cache has says nothing of that; the running gateway looks."""
    text = f"storage: {{redis: redis://a}}\ncache: {{redis: {cache}}}\n"
    assert read(tmp_path, MODELS + text).warnings == ()


@pytest.mark.parametrize(("auto", "pinned"), [("pin", True), ("bound", False)])
def test_a_pin_that_pins_nothing(tmp_path: Path, auto: str, pinned: bool) -> None:
    entry = f"{{upstream: openai, auto: {auto}, pin: {{size: 512x512}}}}"
    made = read(tmp_path, UPSTREAM + f"models: {{art: {entry}}}\n")
    assert [f"{each.line} {each.path}" for each in made.warnings] == (
        [] if pinned else ["2 models.art.pin"]
    )
    pin = made.catalogue.models["art"].pin
    assert (pin is not None and pin.size == "512x512") is pinned


@pytest.mark.parametrize(
    ("soft", "hard", "warned"), [("5", "5", 0), ("5.01", "5", 2), ("6", "", 0)]
)
def test_a_soft_budget_that_is_never_reached(
    tmp_path: Path, soft: str, hard: str, warned: int
) -> None:
    budget = f"budget: {{{f'week: {hard}' if hard else 'day: 1'}}}, soft_budget: {{week: {soft}}}"
    made = read(
        tmp_path, MODELS + f"teams: {{a: {{{budget}, keys: [{{key: {KEY}, {budget}}}]}}}}\n"
    )
    assert [each.path for each in made.warnings] == [
        "teams.a.soft_budget.week",
        "teams.a.keys[0].soft_budget.week",
    ][:warned]


def test_anchors_repeat_whole_values(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        f"teams:\n  a: {{keys: [{KEY}], budget: &b {{day: 1.5}}}}\n"
        f"  b: {{keys: [{OTHER_KEY}], budget: *b}}\n",
    )
    assert {team.limits.budget_day for team in made.teams.values()} == {1_500_000_000}


def test_bombs_are_refused(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
    )
    assert "more than 50000 values, aliases expanded" in " ".join(refusal(tmp_path, text))
    assert "larger than 1048576 bytes" in " ".join(refusal(tmp_path, "#" * 2**21))


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        ("0.1", 100_000_000),
        ('"0.1"', 100_000_000),
        ("50.00", 50 * 10**9),
        ("0", 0),
        ("0.000000001", 1),
        ("9007199.254740993", 9_007_199_254_740_993),
        ("1.10000000000", 1_100_000_000),
        ("5e-05", 50_000),
        ("1e-9", 1),
        ("1.2500005e+06", 1_250_000_500_000_000),
        ("9.007199254740993E6", 9_007_199_254_740_993),
    ],
)
def test_money_is_exact(tmp_path: Path, text: str, nanos: int) -> None:
    made = read(tmp_path, f"teams: {{a: {{budget: {{day: {text}}}}}}}")
    assert made.teams["a"].limits.budget_day == nanos


def test_small_shares_may_have_an_exponent_too(tmp_path: Path) -> None:
    made = read(tmp_path, 'tracing: {otlp: "http://c:4318/v1/traces", sample: 5e-05}')
    assert made.tracing.sample == 0.00005


@given(nanos=strategies.integers(0, 10**18))
def test_every_amount_comes_back(nanos: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = f"teams: {{a: {{budget: {{month: {format_dollars(nanos)}}}}}}}"
    made = read(tmp_path_factory.getbasetemp(), text)
    assert made.teams["a"].limits.budget_month == nanos


def test_price_rows_keep_their_text_and_their_lines(tmp_path: Path) -> None:
    made = read(tmp_path, "prices:\n  rows:\n    - {model: m, valid_from: 2026-01-02, in: 0.10}\n")
    (row,) = made.prices.rows
    assert (row.place.line, row.entries["in"].place.column) == (3, 42)
    assert {name: str(value) for name, value in dict(plain(row) or {}).items()} == {  # type: ignore[arg-type]
        "model": "m",
        "valid_from": "2026-01-02",
        "in": "0.10",
    }


def test_a_secret_does_not_show() -> None:
    secret = Secret("hunter2")
    assert f"{secret} {secret!r} {secret:>9} {secret!s} {[secret]}" == "*** *** *** *** [***]"
    assert json.dumps({"a": secret}, default=str) == '{"a": "***"}'
    assert secret.reveal() == "hunter2"
    assert bool(secret)
    assert not Secret("")
    assert secret == Secret("hunter2")
    assert secret != Secret("hunter3")
    assert secret != "hunter2"
    assert copy.deepcopy(secret) is secret
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        hash(secret)


CANARY = "igwCanary0hunter2PasswordThatNobodyMayEverSee"
EVERYTHING = """
server: {host: h, port: 1, trusted_proxies: [10.0.0.0/8],
  cors: {origins: ["https://h"], max_age: 1h}}
storage: {database: sqlite:///d, redis: "redis://:pw@h", blobs: b, pepper: p}
upstreams: {o: {kind: openai, base_url: "https://h/v1", api_keys: [k], headers: {x-a: v},
  proxy: "http://u:pw@h", verify: true, prices: openai, timeouts: {total_seconds: 1}}}
models: {m: {upstream: o, model: n, unpriced: allow, validate: strict}}
prices: {rows: [{model: m}]}
cache: {ttl: 1h, scope: team, redis: "redis://h"}
results: {ttl: 1h, webhook: "https://h/x"}
teams: {t: {keys: [kkkkkkkkkkkkkkkkkkkkkkkk, {key: llllllllllllllllllllllll, name: n,
  models: [m], budget: {day: 1}, expires: 2027-01-01}], models: [m]}}
admin: {keys: [""]}
log: {level: info}
tracing: {otlp: "http://h:1/t", headers: {authorization: v}, sample: 1}
"""
WORDS = sorted({match.span() for match in re.finditer(r'[^\s{}\[\],:"]+', EVERYTHING)})


@pytest.mark.parametrize(
    "instead",
    [CANARY, '"${CANARY}"', f"https://u:{CANARY}@h", f'"sk-{CANARY}"'],
    ids=["written", "referred to", "with a password", "quoted"],
)
def test_a_secret_in_any_place_is_never_printed(tmp_path: Path, instead: str) -> None:
    """Wherever a key lands by mistake, as a value or as a name, no message and no repr has it."""
    for begin, end in WORDS:
        word, text = EVERYTHING[begin:end], EVERYTHING[:begin] + instead + EVERYTHING[end:]
        made = attempt(tmp_path, text, {"CANARY": CANARY})
        if isinstance(made, ConfigError):
            assert CANARY not in str(made), word
            assert CANARY not in repr(made.mistakes), word
            continue
        # A host, a level or a name of a model is no secret; a key is, however it came here.
        shown = f"{made.warnings}{[str(each) for each in made.warnings]}"
        assert CANARY not in shown, word
        if "key" in word or word in ("k", "p", "v", "pw"):
            assert CANARY not in repr(made), word


def mutated(seed: int) -> bytes:
    """The two files with a few characters, words or lines lost, doubled, moved or replaced."""
    chance = random.Random(seed)
    text = chance.choice([EVERYTHING, EVERYTHING, DEFAULT.read_text()])
    scraps = ["\t", "\n", "  ", ":", "- ", "{", "}", "[", "]", '"', "'", "&a ", "*a", "!!int ",
              "${", "${A}", "${file:/}", "$$", "yes", "null", "~", "0x1", "1e9", "1:30", "<<: ",
              "? ", "|\n", "#", "%YAML 1.3\n", "---\n", "\x00", "\ud800", "é", "\u2028", "9" * 5000,
              "-1", ".inf", "2027-13-01", "\\U0011ffff", '"\\UFFFFFFFF"', "@"]  # fmt: skip
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(text))
        end = min(len(text), start + chance.choice([0, 0, 1, 3, 10, 60]))
        other = chance.randrange(len(text))
        middle = chance.choice(
            [chance.choice(scraps), "", text[start:end] * 2, text[other : other + 20]]
        )
        text = text[:start] + middle + text[end:]
    content = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        at = chance.randrange(len(content))
        content = content[:at] + bytes([chance.randrange(256)]) + content[at:]
    return content


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=strategies.integers(0, 2**32).map(mutated) | strategies.binary(max_size=200))
def test_a_mutated_file_gives_settings_or_mistakes_and_never_a_traceback(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = attempt(tmp_path_factory.getbasetemp(), content, {"A": "b: c"})
    if isinstance(made, ConfigError):
        assert made.mistakes
        for mistake in made.mistakes:
            assert mistake.line >= 1
            assert mistake.column >= 1
            assert mistake.message
        str(made).encode()
        return
    repr(made).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@db/gateway",
        "postgres://u:p%40@db:5433/gateway?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        "postgresql://u:p@one:5432,two:5432/gateway?target_session_attrs=primary",
        "postgresql://u:p@[::1]:5432/gateway",
        "postgresql://u:p@db/gateway?application_name=us@work",
    ],
)
def test_a_shared_database_is_a_secret(tmp_path: Path, url: str) -> None:
    made = read(tmp_path, f"storage: {{database: '{url}', pepper: {'p' * 32}}}")
    assert made.storage.database == Secret(url)
    assert "p%40" not in repr(made)


def test_several_upstreams_of_a_model(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        "upstreams:\n"
        "  one: {kind: openai, base_url: 'https://h/v1', api_keys: [k, {key: l, weight: 3}]}\n"
        "  two: {kind: openai, base_url: 'https://i/v1',\n"
        "    api_keys: [{key: '${KEY:-}', order: 2}, {key: m, order: 3}]}\n"
        "models:\n"
        "  plain: {upstream: one}\n"
        "  list: {upstreams: [one, {upstream: two, model: dep-1, weight: 2}], model: flare}\n"
        "  order: {upstreams: [{upstream: one, order: 9}, {upstream: two, order: 2},\n"
        "    {upstream: one, model: x}], upstream_stream: always, fallback: [plain, list]}\n"
        "  mixed: {upstreams: [{upstream: one, upstream_stream: always}, two]}\n"
        "  '*': {upstreams: [one, two], fallback: [plain]}\n"
        "relay: {attempts: 3, on_unknown: repeat}\n",
    )
    one, two = made.upstreams["one"].api_keys, made.upstreams["two"].api_keys
    assert [(key.key.reveal(), key.order, key.weight) for key in one] == [("k", 1, 1), ("l", 1, 3)]
    assert [(key.key.reveal(), key.order, key.weight) for key in two] == [("m", 3, 1)]
    models = made.catalogue.models
    assert models["plain"].targets == (Target("one", "plain", 1),)
    assert models["list"].targets == (Target("one", "flare", 1), Target("two", "dep-1", 2, 2))
    assert models["order"].targets == (
        Target("one", "order", 9, stream_always=True),
        Target("two", "order", 2, stream_always=True),
        Target("one", "x", 3, stream_always=True),
    )
    assert models["order"].fallbacks == ("plain", "list")
    assert [target.stream_always for target in models["mixed"].targets] == [True, False]
    found = made.catalogue.find("new")
    assert found is not None
    assert found.targets == (Target("one", "new", 1), Target("two", "new", 2))
    assert found.fallbacks == ("plain",)
    assert (made.relay.attempts, made.relay.on_unknown) == (3, OnUnknown.REPEAT)


def test_where_failures_may_be_billed_every_target_knows(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        "upstreams:\n"
        "  one: {kind: openai, base_url: 'https://h/v1', api_keys: [k], bill_on_5xx: always}\n"
        "  two: {kind: openai, base_url: 'https://i/v1', api_keys: [k]}\n"
        "models: {a: {upstreams: [one, two]}}\n",
    )
    targets = made.catalogue.models["a"].targets
    assert [target.failures_billed for target in targets] == [True, False]


def test_an_upstream_whose_keys_are_all_unset_is_off(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        "upstreams: {a: {kind: openai, base_url: 'https://h/v1', "
        "api_keys: [{key: '${ONE:-}'}, '${TWO:-}']}}\nmodels: {m: {upstream: a}}\n",
    )
    assert not made.upstreams["a"].ready
    assert "set ONE or TWO" in str(made.warnings[0])


def test_what_each_user_of_a_team_may(tmp_path: Path) -> None:
    limits = "limits: {requests_per_minute: 6, images_per_minute: 10, concurrent_requests: 2}"
    per_user = f"{{{limits}, budget: {{day: 0.5, total: 9}}, required: true}}"
    teams = f"teams: {{growth: {{per_user: {per_user}}}, design: {{}}}}\n"
    found = read(tmp_path, MODELS + teams)
    assert found.teams["growth"].per_user == PerUser(
        Limits(6, 10, 2, budget_day=500_000_000, budget_total=9_000_000_000), required=True
    )
    assert found.teams["design"].per_user == PerUser()
    assert found.users.policy == UserPolicy()
    found = read(tmp_path, MODELS + "users: {sources: [user], record: false}\n")
    assert found.users.policy == UserPolicy((UserSource.USER,), record=False)

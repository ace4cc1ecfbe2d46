"""Two requests with one fingerprint ask for the same picture."""

from __future__ import annotations

import hashlib
import json
from json.encoder import c_make_encoder as make_encoder  # type: ignore[attr-defined]
from json.encoder import encode_basestring_ascii as quoted

from gateway.domain.call import Call, Json

DELIVERY = frozenset({"stream", "partial_images"})
"""Parameters that say how an answer arrives, not which."""
_DEFAULT = json.JSONEncoder().default
# What ``JSONEncoder.encode`` makes anew for each text: that takes as long as the text of a call.
_pieces = make_encoder(None, _DEFAULT, quoted, None, ":", ",", True, False, True)
_AS_THEY_ARE = frozenset((str, int, bool))
"""What is written as it is, asked by class."""


def fingerprint(call: Call, *, scope: str, model_served: str, upstream: str) -> str:
    """Hex SHA-256 over what decides the picture; the key of the cache and of running flights.

    It covers operation, scope (who may share the answer), upstream, the model that serves it, the
    parameters without ``stream`` and ``partial_images``, and every picture as role and digest.
    The order of keys, nulls, the encoding of the body and the way a whole number is written make
    no difference; neither does the place of a mask among the images, only the order of pictures
    of one role. Defaults are not filled in: a model's own may change.
    """
    parameters: dict[str, Json] = {
        name: value if value.__class__ in _AS_THEY_ARE else _plain(value)
        for name, value in call.parameters.items()
        if value is not None and name not in DELIVERY
    }
    inputs: list[list[str]] = []
    if call.inputs:
        pictures = sorted(call.inputs, key=lambda picture: picture.role)
        inputs = [[picture.role, picture.digest] for picture in pictures]
    document = {
        "operation": str(call.operation),
        "scope": scope,
        "upstream": upstream,
        "model": model_served,
        "parameters": parameters,
        "inputs": inputs,
    }
    return hashlib.sha256("".join(_pieces(document, 0)).encode("ascii")).hexdigest()


def _plain(value: Json) -> Json:
    """A float without a fraction is the same number as the int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value

"""Azure's shape of the images API (contract 6.2): a deployment in the path, and errors of its own.

A deployment has the name of its model here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from urllib.parse import parse_qsl

from gateway.domain.call import Json
from gateway.sandbox.forms import Form
from gateway.sandbox.models import Family, find
from gateway.sandbox.refusals import Refused, unknown

UNHARMED: Mapping[str, Json] = MappingProxyType(
    {
        category: {"filtered": False, "severity": "safe"}
        for category in ("hate", "self_harm", "sexual", "violence")
    }
)
EXTRAS: Mapping[str, Json] = MappingProxyType(
    {
        "content_filter_results": dict(UNHARMED),
        "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": dict(UNHARMED)}],
    }
)
"""What an answer says besides."""


def no_access() -> Refused:
    return _refused(
        "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide "
        "a valid key for an active subscription and use a correct regional API endpoint for your "
        "resource.",
        "401",
        401,
    )


def deployed(deployment: str, form: Form, query: str, now: datetime) -> Form:
    """The form with the model that is deployed under a name. Raises ``Refused``."""
    if "api-version" not in dict(parse_qsl(query)):
        raise _refused("Resource not found", "404", 404)
    model = find(deployment, now)
    if model is None:
        raise _refused(
            "The API deployment for this resource does not exist. If you created the deployment "
            "within the last 5 minutes, please wait a moment and try again.",
            "DeploymentNotFound",
            404,
        )
    if model.family is Family.TWO and "model" in form.fields:
        raise unknown("model")
    return replace(form, fields={**form.fields, "model": model.id})


def filtered() -> Refused:
    """A refusal of the safety system in Azure's words."""
    return Refused(
        "Your request was rejected as a result of our safety system. Your prompt may contain text "
        "that is not allowed by our safety system.",
        code="contentFilter",
        extra={
            "innererror": {
                "code": "ResponsibleAIPolicyViolation",
                "content_filter_result": {
                    **UNHARMED,
                    "violence": {"filtered": True, "severity": "high"},
                },
            }
        },
    )


def _refused(message: str, code: str, status: int) -> Refused:
    """Azure's own front says a code and a message, and nothing else."""
    refused = Refused(message, code=code, status=status)
    refused.error = {"code": code, "message": message}
    return refused

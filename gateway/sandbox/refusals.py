"""An error of OpenAI's, and the sentences in which it refuses (contract 4.1, 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.domain.call import Json

USER_ERROR = "image_generation_user_error"


class Refused(Exception):
    """An error of OpenAI's, as it goes on the wire."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None,
        param: str | None = None,
        type_: str = "invalid_request_error",
        status: int = 400,
        extra: Mapping[str, Json] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error: dict[str, Json] = {
            "message": message,
            "type": type_,
            "param": param,
            "code": code,
            **(extra or {}),
        }


def unknown(name: str) -> Refused:
    return Refused(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)


def missing(name: str) -> Refused:
    message = f"Missing required parameter: '{name}'."
    return Refused(message, code="missing_required_parameter", param=name)


def duplicate(name: str) -> Refused:
    return Refused(
        f"Duplicate parameter: '{name}'. You provided multiple values for this parameter, whereas "
        "only one is allowed. If you are trying to provide a list of values, use the array syntax "
        f"instead e.g. '{name}[]=<value>'.",
        code="duplicate_parameter",
        param=name,
    )


def too_many(count: int, name: str, limit: int) -> Refused:
    return Refused(
        f"Invalid '{name}': array too long. Expected an array with maximum length {limit}, "
        f"but got an array with length {count} instead.",
        code="array_above_max_length",
        param=name,
    )


def wrong_type(name: str, wanted: str, given: Json) -> Refused:
    words = {
        bool: "a boolean",
        int: "an integer",
        float: "a decimal number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return Refused(
        f"Invalid type for '{name}': expected {wanted}, but got {words.get(type(given), 'null')} "
        "instead.",
        code="invalid_type",
        param=name,
    )


def bad_value(name: str, value: Json, allowed: tuple[str, ...]) -> Refused:
    quoted = [f"'{one}'" for one in allowed]
    listed = f"{', '.join(quoted[:-1])}, and {quoted[-1]}" if len(quoted) > 1 else quoted[0]
    return Refused(
        f"Invalid value: '{value}'. Supported values are: {listed}.",
        code="invalid_value",
        param=name,
    )


def in_range(name: str, value: int, low: int, high: int) -> None:
    """Raises ``Refused`` for a number outside of ``low`` to ``high``, both included."""
    if value > high:
        raise Refused(
            f"Invalid '{name}': integer above maximum value. Expected a value <= {high}, but got "
            f"{value} instead.",
            code="integer_above_max_value",
            param=name,
        )
    if value < low:
        raise Refused(
            f"Invalid '{name}': integer below minimum value. Expected a value >= {low}, but got "
            f"{value} instead.",
            code="integer_below_min_value",
            param=name,
        )


def no_file(file_id: str, param: str) -> Refused:
    """A file that never was, is gone, or is another project's: nobody can tell which."""
    return Refused(f"No such File object: {file_id}", code=None, param=param, status=404)


def unreadable(essence: str) -> Refused:
    """A body that is not what its content type says."""
    what = "JSON body" if essence == "application/json" else "multipart form"
    return Refused(f"We could not parse the {what} of your request.", code=None)


def unsupported(essence: str, wanted: str = "application/json") -> Refused:
    return Refused(
        f"Unsupported content type: '{essence}'. This API method only accepts "
        f"'{wanted}' requests, but you specified the header 'Content-Type: "
        f"{essence}'. Please try again with a supported content type.",
        code="unsupported_content_type",
    )

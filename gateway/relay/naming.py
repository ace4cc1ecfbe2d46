"""What a name leads to: the model behind it, or why there is none, and which one is meant. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date

from gateway.domain.call import Call, Change
from gateway.domain.compat import TOOL_MODEL, Compat
from gateway.domain.errors import GatewayError, InvalidRequest, ModelNotAllowed, ModelNotFound
from gateway.domain.price import PriceRow
from gateway.domain.route import Catalogue, Model
from gateway.domain.team import ANY_MODEL, Caller
from gateway.relay.compat import alias_of, routed_name
from gateway.relay.plan_response import (
    DEFAULT_TOOL_MODEL,
    is_image_model,
    is_text_model,
    tool_param,
)
from gateway.relay.retirement import Retirements

MOST_NAMED = 5
"""So many of a caller's models are named in an error."""


class Names:
    """The configured models, as callers name them."""

    def __init__(self, catalogue: Catalogue, retirements: Retirements) -> None:
        self._catalogue = catalogue
        self._retirements = retirements

    def find(self, caller: Caller, name: str, today: date) -> Model:
        """The model behind a name, if this caller may use it. Raises ``ModelNotFound``,
        ``ModelNotAllowed``, and ``ModelRetired`` for a name of a price list that nobody serves."""
        model = self._catalogue.models.get(name)
        if model is None:
            model = self._catalogue.find(name)
        if model is None:
            gone = self._retirements.of_name(caller, name, today)
            if gone is not None:
                raise gone
            raise ModelNotFound(
                f"No model {name}.{self.hint(caller, name, today)} GET /v1/models lists yours.",
                param="model",
            )
        if not caller.may_use(model.name):
            # No administrator can help with what its provider has ended.
            gone = self._retirements.over(caller, model, today)
            if gone is not None and model.target.model == name:
                raise gone
            allowed = _listed([one.name for one in self.permitted(caller)])
            names = caller.team.models
            by_key = " with this key" if ANY_MODEL in names or model.name in names else ""
            raise ModelNotAllowed(
                f"Team {caller.team.id} may use {allowed}, not {name}{by_key}. "
                "Ask an administrator to add it.",
                param="model",
            )
        return model

    def asked(self, caller: Caller, call: Call, compat: Compat, today: date) -> Model:
        """The model that a call is for, by aliases and the default too. Raises as ``find``, and
        ``InvalidRequest`` where none is named."""
        name, models = call.model, self._catalogue.models
        if name not in models:
            name = routed_name(call, models, compat)
        try:
            return self.find(caller, name, today)
        except ModelNotAllowed as error:
            if call.model:
                raise
            allowed = _listed([one.name for one in self.serving(caller, today)])
            raise ModelNotAllowed(
                f"This request names no model, and the default here is {name}, which team "
                f"{caller.team.id} may not use with this key. Name one in 'model' that it may: "
                f"{allowed}.",
                param=error.param,
            ) from None

    def with_tool(self, call: Call, compat: Compat) -> Call:
        """A response whose image tool is routed as the call itself is: by aliases, and by the
        provider's default where it names no model. What is sent in its place is a change."""
        ask = call.asks
        if ask is None or ask.tool is None:
            return call
        name = alias_of(ask.tool.model or DEFAULT_TOOL_MODEL, self._catalogue.models, compat)
        model = self._catalogue.find(name)
        sent = name if model is None else model.target.model
        told = () if sent == ask.tool.model else (Change(TOOL_MODEL, ask.tool.model or None, sent),)
        tool = replace(ask.tool, routed=name)
        return replace(call, asks=replace(ask, tool=tool), changes=(*call.changes, *told))

    def tool(
        self, caller: Caller, call: Call, row_of: Callable[[Model], PriceRow | None], today: date
    ) -> Model | None:
        """The model behind a response's image tool, which the caller has to be allowed as well.
        ``row_of`` says a model's price, if any. Raises as ``find`` does, naming the tool."""
        tool = None if call.asks is None else call.asks.tool
        if tool is None:
            return None
        param = tool_param(tool)
        name = tool.routed or tool.model or DEFAULT_TOOL_MODEL
        try:
            return self.find(caller, name, today)
        except (ModelNotFound, ModelNotAllowed) as error:
            error.param = param
            if tool.model:
                raise
            rows = [(one.name, row_of(one)) for one in self.serving(caller, today)]
            drawing = [one for one, row in rows if row is None or not is_text_model(row)]
            missing = isinstance(error, ModelNotFound)
            why = "is not served here" if missing else f"is not allowed for team {caller.team.id}"
            default = f"OpenAI's default {DEFAULT_TOOL_MODEL}"
            if name != DEFAULT_TOOL_MODEL:
                default += f" ({name} here)"
            raise type(error)(
                f"The image tool names no model, and {default} {why}. Name one in '{param}': "
                f"{_listed(drawing)}.",
                param=param,
            ) from None
        except GatewayError as error:
            error.param = param
            raise

    def hint(self, caller: Caller, name: str, today: date) -> str:
        """The caller's model whose name is most like an unknown one, as a sentence after another,
        or nothing. One that ends is named only where no other is like it."""
        mine = self.serving(caller, today)
        lasting = [one.name for one in mine if self._retirements.end(one, today) is None]
        ending = [one.name for one in mine if one.name not in lasting]
        near = self._catalogue.nearest(name, lasting) or self._catalogue.nearest(name, ending)
        if near is None:
            return ""
        served = near.target.model
        via = f" (served by {served})" if served != near.name else ""
        return f" Did you mean {near.name}{via}?"

    def serving(self, caller: Caller, today: date) -> list[Model]:
        """Every configured model that the caller may use and that is still served, by name."""
        permitted = self.permitted(caller)
        return [one for one in permitted if not self._retirements.is_over(one, today)]

    def permitted(self, caller: Caller) -> list[Model]:
        """Every configured model that the caller may use, by name."""
        return self._catalogue.permitted(caller.may_use)


def refuse_kind(call: Call, model: Model, row: PriceRow | None, tool: PriceRow | None) -> None:
    """Refuses pictures of a model that only writes, and a response of one that only draws, as
    their prices say. ``tool`` is the price of the model behind the image tool. Raises
    ``InvalidRequest``."""
    if call.asks is None:
        if row is not None and is_text_model(row):
            raise _of_another_kind(
                f"{model.name} is a text model: it draws no pictures here. Ask for an image model",
                "model",
            )
        return
    if row is not None and is_image_model(row):
        raise _of_another_kind(
            f"{model.name} is an image model: it answers no responses here. Ask for a text model, "
            "and name this one in the tool image_generation",
            "model",
        )
    asked = call.asks.tool
    if tool is not None and asked is not None and is_text_model(tool):
        raise _of_another_kind(
            f"{asked.routed or asked.model} is a text model: it draws no pictures here. Name an "
            "image model",
            tool_param(asked),
        )


def _of_another_kind(says: str, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{says}; GET /v1/models lists yours.",
        code="invalid_value",
        param=param,
        reason="invalid_param",
    )


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "no model"
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

"""What the plan of a response has beside that of a picture: a second model, behind its image tool.

Both are asked at one upstream, in one request, so the tool's model must be served where the
other one is; its name there is written into the tool.
"""

from __future__ import annotations

from dataclasses import replace

from gateway.domain.call import Call, ImageTool
from gateway.domain.errors import InvalidRequest
from gateway.domain.price import PriceRow
from gateway.domain.price_tokens import TokenPrice
from gateway.domain.route import Model, Target

DEFAULT_TOOL_MODEL = "gpt-image-2.6-sunburst"
"""What the provider draws with where the tool does not say (contract 3.4). It is always said, for
it is what is allowed and priced."""


def is_text_model(row: PriceRow) -> bool:
    """Whether a price is that of a model which only writes."""
    return isinstance(row.price, TokenPrice) and row.price.output is None


def is_image_model(row: PriceRow) -> bool:
    """Whether a price is that of a model which only draws."""
    price = row.price
    return not (isinstance(price, TokenPrice) and price.text_out and price.max_output_tokens)


def tool_param(tool: ImageTool) -> str:
    """How an error names the place of the tool's model."""
    return f"tools[{tool.index}].model"


def tool_beside(tool: Model, model: Model) -> Model | None:
    """The tool's model as it can be asked for together with ``model``: at the same upstreams
    alone; None where it is at none of them."""
    upstreams = {target.upstream for target in model.targets}
    beside = [target for target in tool.targets if target.upstream in upstreams]
    return replace(tool, target=beside[0], others=tuple(beside[1:])) if beside else None


def with_tool(target: Target, tool: Model | None, call: Call) -> Target:
    """A target of the text model, with the name that the tool's model has there.

    Raises ``InvalidRequest`` where it is not served there, and where its name cannot be written
    into the tool.
    """
    asked = None if call.asks is None else call.asks.tool
    if tool is None or asked is None:
        return target
    served_there = [one for one in tool.targets if one.upstream == target.upstream]
    param = tool_param(asked)
    if not served_there:
        raise InvalidRequest(
            f"The image tool's {tool.name} is not served by the upstream {target.upstream}, where "
            f"{call.model} is. Name another model in '{param}': GET /v1/models lists yours.",
            code="tool_model_elsewhere",
            param=param,
            reason="invalid_param",
        )
    name = served_there[0].model
    if name != asked.model and not asked.whole:
        raise InvalidRequest(
            f"'{param}' has to become {name}, and the tools hold a text too long to be written "
            f"anew. Send '{name}' there, or the mask as the id of a file.",
            code="tool_not_rewritten",
            param=param,
            reason="invalid_param",
        )
    return replace(target, tool=name)


def served(call: Call, target: Target) -> Call:
    """A response under the names that its models have where it is served; another call as it is."""
    if call.asks is None:
        return call
    tool = call.asks.tool
    named = None if tool is None else replace(tool, model=target.tool)
    return replace(call, model=target.model, asks=replace(call.asks, tool=named))

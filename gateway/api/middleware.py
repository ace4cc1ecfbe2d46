"""The only middleware: pure ASGI, and it looks at nothing but the headers it adds."""

from __future__ import annotations

from gateway.api.door import ASGIApp, Message, Receive, Scope, Send, new_request_id


class RequestId:
    """Gives each request of the other routes an id, in the answer and for the error handlers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        rid = new_request_id()
        scope.setdefault("state", {})["request_id"] = rid

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not any(name.lower() == b"x-request-id" for name, _ in headers):
                    headers.append((b"x-request-id", rid.encode("ascii")))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, named)

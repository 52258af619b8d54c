"""A gate before a page that libraries serve: for this machine's browser at this page alone, and nothing but the page.

Loopback keeps other machines out, but not other sites in the same browser: a name that its owner points at 127.0.0.1
makes them same-origin (DNS rebinding), and any site may send a form here. The one shows in Host, the other in Origin.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Gradio writes scripts and styles into its page, so both are allowed inline; nothing is loaded from elsewhere.
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Answers 403 to whatever does not come from the page itself or a program on this machine, or asks for more.

    Args:
        app: what is guarded.
        port: on which it listens.
        paths: what may be asked for: exact paths, and beginnings where they end in a slash.
    """

    def __init__(self, app: App, port: int, paths: Iterable[str]) -> None:
        self.app, self.paths = app, tuple(paths)
        self.hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and self._welcome(scope):
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page answers itself alone\n"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _welcome(self, scope: Message) -> bool:
        asked: list[tuple[bytes, bytes]] = list(scope["headers"])
        hosts = [value for name, value in asked if name == b"host"]
        origins = [value for name, value in asked if name == b"origin"]
        ours = len(hosts) == 1 and hosts[0] in self.hosts
        return ours and all(origin == b"http://" + hosts[0] for origin in origins) and self._known(scope["path"])

    def _known(self, path: str) -> bool:
        return any(
            path == known or (known != "/" and known.endswith("/") and _below(path, known)) for known in self.paths
        )


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder) and ".." not in path.split("/")


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *HEADERS]
        await send(message)

    return sending

"""A server for a page of this machine alone: loopback only, one token a start, JSON in and out.

The page itself holds no data, so anyone may load it; all that is said about a run or its records asks for the token.
That one stands behind ``#`` in the address, which browsers send to nobody, and travels as a header, which no foreign
page can set.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rankalign.errors import InputError
from rankalign.storage.jsonl import dumps, loads

HOST = "127.0.0.1"
LARGEST_BODY = 1 << 16
"""Bytes of a request; a ranking of hundreds of answers has a few thousand."""
SECONDS = 30
"""How long a connection may keep silent."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
Answer = dict[str, Any]


class Refused(Exception):
    """A request that is answered by an error.

    Args:
        status: of the answer.
        reason: one sentence.
    """

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class LocalServer(ThreadingHTTPServer):
    """Serves one page and what it asks for, until it is stopped.

    Args:
        handler: answers requests.
        files: by path, the name of a file beside this one and its type.
        port: to listen on; 0 takes a free one.

    Attributes:
        token: what the API asks for.
        hosts: the names under which it answers.

    Raises:
        InputError: the port is taken or not allowed.
    """

    daemon_threads = True  # a browser that keeps its connection must not hold up the end

    def __init__(self, handler: type[LocalHandler], files: Mapping[str, tuple[str, str]], port: int = 0) -> None:
        self.token = secrets.token_urlsafe(32)
        self.files = {path: (_static(name), kind) for path, (name, kind) in files.items()}
        try:
            super().__init__((HOST, port), handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port}: {getattr(error, 'strerror', None) or error}; take another --port") from None
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Where to point the browser."""
        return f"http://{HOST}:{self.server_port}/#{self.token}"

    def stop_soon(self) -> None:
        """End :meth:`serve_forever` from a request, which must not wait for it."""
        threading.Thread(target=self.shutdown, daemon=True).start()


def _static(name: str) -> bytes:
    return resources.files("rankalign.interactive.pages").joinpath(name).read_bytes()


class LocalHandler(BaseHTTPRequestHandler):
    """One connection. What may be asked for is what :meth:`gets` and :meth:`posts` name."""

    server: LocalServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rankalign", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        """The page's files, and what :meth:`gets` names."""
        self._respond(self._get)

    def do_POST(self) -> None:
        """What :meth:`posts` names."""
        self._respond(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to whoever started the command."""

    def gets(self) -> Mapping[str, Callable[[Mapping[str, str]], Answer]]:
        """What answers a GET below ``/api/``, from the last value of each of its parameters."""
        return {}

    def posts(self) -> Mapping[str, Callable[[Answer], Answer]]:
        """What answers a POST below ``/api/``, from its JSON object."""
        return {}

    def _respond(self, answer: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._check_sender()
            status, (kind, body) = HTTPStatus.OK, answer()
        except Refused as error:
            status, (kind, body) = error.status, _json({"error": str(error)})
        except InputError as error:
            status = self.status_of(error)
            kind, body = _json({"error": str(error)})
        if status != HTTPStatus.OK:
            self.close_connection = True  # its body may be unread
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def status_of(self, error: InputError) -> HTTPStatus:
        """Under which status an error of what was asked goes out."""
        return HTTPStatus.UNPROCESSABLE_ENTITY

    # - who asks -

    def _check_sender(self) -> None:
        """Refuse what was sent to another name (DNS rebinding) or by another page."""
        if self.headers.get("Host") not in self.server.hosts:
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers on the loopback address only")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            raise Refused(HTTPStatus.FORBIDDEN, "requests of other pages are refused")

    def _check_token(self) -> None:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        known = hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode())
        if scheme != "Bearer" or not known:
            raise Refused(HTTPStatus.FORBIDDEN, "open the address that the command printed, with what follows the #")

    # - what is asked -

    def _get(self) -> tuple[str, bytes]:
        url = urlsplit(self.path)
        if url.path in self.server.files:
            body, kind = self.server.files[url.path]
            return kind, body
        answer = self._named(url.path, self.gets())
        self._check_token()
        return _json(answer({name: values[-1] for name, values in parse_qs(url.query).items()}))

    def _post(self) -> tuple[str, bytes]:
        answer = self._named(self.path, self.posts())
        self._check_token()
        return _json(answer(self._body()))

    def _named(self, path: str, known: Mapping[str, Callable[[Any], Answer]]) -> Callable[[Any], Answer]:
        answer = known.get(path.removeprefix("/api/"))
        if answer is None or not path.startswith("/api/"):
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        return answer

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say how long the request is")
        if len(length) > 9 or int(length) > LARGEST_BODY:  # int() takes long over very many digits
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST_BODY} bytes")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        try:
            body = loads(self.rfile.read(int(length)).decode("utf-8"))
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the request is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return body


def _json(value: Answer) -> tuple[str, bytes]:
    return "application/json", dumps(value).encode("utf-8")


def whole(body: Answer, name: str) -> int:
    """A whole number of a request."""
    value = body.get(name)
    if type(value) is not int:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name}: expected a whole number")
    return value

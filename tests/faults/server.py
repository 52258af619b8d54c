"""An OpenAI-compatible server on loopback: fails on purpose, remembers what it was asked, answers by a function.

In a test::

    with FaultServer(answer=lambda request: "yes", script=["429", None]) as server:
        ...  # server.url, server.requests

As a process of its own, whose port stands in FILE once it is ready::

    python -m tests.faults.server --port-file FILE --seed 3 --faults 0.3 --answer package.module:function

Faults are scripted by order of arrival (``script``), and then drawn: whether try k of a body fails, and how, is a pure
function of seed, body and k, and no body fails more than ``most_in_a_row`` times in a row. So a patient client gets
through, and two runs with the same requests meet the same faults in whatever order they are sent.

What a client waits by itself is in ``rankalign.engines.openai_client`` (``FIRST_DELAY_S``, ``TIMEOUT_S``): tests set
it low.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

Request = dict[str, Any]
Answer = Callable[[Request], "str | dict[str, Any]"]

FAULTS = ("429", "429-reset", "500", "503", "reset", "timeout", "garbage", "empty", "truncated", "error-200")
PATHS = ("/v1/chat/completions", "/v1/completions")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "ledge")


def words(request: Request) -> str:
    """The default answer: 12 words, a pure function of prompt and seed (of the prompt alone at temperature 0)."""
    seed = request.get("seed") if request.get("temperature", 1) else None
    told = json.dumps([request.get("messages"), request.get("prompt"), seed])
    return " ".join(WORDS[byte % len(WORDS)] for byte in hashlib.sha256(told.encode()).digest()[:12])


@dataclass(frozen=True)
class Captured:
    """One request as it came in: path, body, headers (lower case), time.monotonic(), and the fault it met."""

    path: str
    body: Request
    headers: dict[str, str]
    time: float
    fault: str | None


class FaultServer:
    """The server; use as a context manager.

    Args:
        answer: request to text, or to a dictionary that replaces fields of the whole reply.
        faults: share of requests that fail once the script is used up.
        seed: of the drawn faults.
        script: what happens to the first requests, in order of arrival; None is no fault.
        kinds: faults to draw from.
        most_in_a_row: drawn faults in a row for one body.
        ignore: what it does not do though asked: ``n``, ``stop``, ``max_tokens``, ``usage``, ``finish_reason``.
        refuse: fields that get a 422.
        key: if set, requests without it get a 401.
        retry_after: seconds, in the header of a 429.
        stall: seconds after which a time-out fault drops the connection.
        delay: seconds that every answer takes.
        headers: go with every good reply.
        paths: where it takes posts.
    """

    def __init__(
        self,
        answer: Answer = words,
        *,
        faults: float = 0.0,
        seed: int = 0,
        script: Iterable[str | None] = (),
        kinds: Collection[str] = FAULTS,
        most_in_a_row: int = 3,
        ignore: Collection[str] = (),
        refuse: Collection[str] = (),
        key: str = "",
        retry_after: float = 0.01,
        stall: float = 1.0,
        delay: float = 0.0,
        headers: dict[str, str] | None = None,
        paths: Collection[str] = PATHS,
    ) -> None:
        self.paths = paths
        self.answer, self.faults, self.seed, self.kinds = answer, faults, seed, list(kinds)
        self.most_in_a_row, self.ignore, self.refuse, self.key = most_in_a_row, ignore, refuse, key
        self.retry_after, self.stall, self.delay, self.headers = retry_after, stall, delay, headers or {}
        self.requests: list[Captured] = []
        self.in_flight = self.most_in_flight = 0
        self._script = list(script)
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """What a client takes as its base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def serve(self) -> None:
        """Answer until stopped."""
        self._http.serve_forever(poll_interval=0.02)

    def start(self) -> FaultServer:
        """Serve in a thread."""
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    __enter__ = start

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def arrive(self, path: str, body: Request, headers: dict[str, str]) -> str | None:
        """Note a request and say which fault it meets."""
        with self._lock:
            told = json.dumps([path, body], sort_keys=True)
            scripted = bool(self._script)
            fault = self._script.pop(0) if scripted else self._drawn(told)
            if not scripted:
                self._tries[told] += 1
            self.requests.append(Captured(path, body, headers, time.monotonic(), fault))
            return fault

    def _drawn(self, told: str) -> str | None:
        tried = self._tries[told]
        if tried % (self.most_in_a_row + 1) == self.most_in_a_row:
            return None
        digest = hashlib.sha256(json.dumps([self.seed, told, tried]).encode()).digest()
        fails = int.from_bytes(digest[:4], "big") < self.faults * 2**32
        return self.kinds[digest[4] % len(self.kinds)] if fails else None

    def reply(self, path: str, body: Request) -> dict[str, Any]:
        """A good reply."""
        chat = path.endswith("/chat/completions")
        given = self.answer(body)
        text, ended = (given, "stop") if isinstance(given, str) else ("", "stop")
        for stop in body.get("stop") or () if "stop" not in self.ignore else ():
            text = text.split(stop)[0]
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10**6
        pieces = text.split(" ") if text else []
        if len(pieces) > limit and "max_tokens" not in self.ignore:
            pieces, ended = pieces[:limit], "length"
        text = " ".join(pieces)
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = body.get("n", 1) if "n" not in self.ignore else 1
        asked = len(json.dumps(body.get("messages") or body.get("prompt")).split())
        usage = {"prompt_tokens": asked, "completion_tokens": len(pieces), "total_tokens": asked + len(pieces)}
        ending = {} if "finish_reason" in self.ignore else {"finish_reason": ended}
        reply: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": body.get("model", ""),
            "choices": [{"index": i, **choice, **ending} for i in range(choices)],
        }
        reply |= {} if "usage" in self.ignore else {"usage": usage}
        return reply if isinstance(given, str) else reply | given


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up, faults do too: nothing to say."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in ("one", "two")]})
        elif self.path == "/requests":
            self._send(200, {"requests": [[r.path, r.body, r.fault] for r in self.owner.requests]})
        else:
            self._send(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        owner, raw = self.owner, self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(raw)
        fault = owner.arrive(self.path, body, {key.lower(): value for key, value in self.headers.items()})
        with owner._lock:
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
        try:
            self._fail(fault, body) if fault else self._answer(body)
        finally:
            with owner._lock:
                owner.in_flight -= 1

    def _answer(self, body: Request) -> None:
        time.sleep(self.owner.delay)
        refused = [field for field in self.owner.refuse if field in body]
        if self.owner.key and self.headers.get("authorization") != f"Bearer {self.owner.key}":
            self._send(401, {"error": {"message": f"wrong key: {self.headers.get('authorization')}"}})
        elif self.path not in self.owner.paths or body.get("model") == "missing":
            self._send(404, {"error": {"message": "no such model"}})
        elif refused:
            self._send(422, {"detail": f"Unexpected fields in the request: {refused}"})
        else:
            self._send(200, self.owner.reply(self.path, body), self.owner.headers)

    def _fail(self, fault: str, body: Request) -> None:
        message = {"error": {"message": f"on purpose: {fault}", "type": "fault"}}
        if fault == "429":
            self._send(429, message, {"retry-after": str(self.owner.retry_after)})
        elif fault == "429-reset":
            gone = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "10ms"}
            self._send(429, message, {**gone, "x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "9"})
        elif fault == "429-quota":
            self._send(429, {"error": {"message": "pay first", "code": "insufficient_quota"}})
        elif fault == "400-filter":
            self._send(400, {"error": {"message": "filtered", "code": "content_filter"}})
        elif fault in ("400", "500", "503"):
            self._send(int(fault), message)
        elif fault == "timeout":
            time.sleep(self.owner.stall)
            self._hang_up()
        elif fault == "reset":
            self._hang_up()
        elif fault == "garbage":
            self._send_bytes(200, b'{"choices": [{"message": {"content": "half an ans')
        elif fault == "empty":
            self._send(200, self.owner.reply(self.path, body) | {"choices": []})
        elif fault == "truncated":
            whole = json.dumps(self.owner.reply(self.path, body)).encode()
            self._send_bytes(200, whole[: len(whole) // 2], {"content-length": str(len(whole))})
            self._hang_up()
        elif fault == "error-200":
            self._send(200, message)
        else:
            raise ValueError(f"unknown fault {fault!r}")

    def _hang_up(self) -> None:
        """Close with a reset rather than an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(content).encode(), headers)

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"content-type": "application/json", "content-length": str(len(content))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def main() -> None:
    """Serve until killed; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--port-file", type=Path, required=True, help="gets the port, whole, once the server listens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--answer", default="tests.faults.server:words", help="module:function of a request")
    parser.add_argument("--stall", type=float, default=0.2, help="seconds before a time-out fault drops the connection")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that every answer takes")
    args = parser.parse_args()
    module, function = args.answer.split(":")
    answer = getattr(importlib.import_module(module), function)
    server = FaultServer(answer, faults=args.faults, seed=args.seed, stall=args.stall, delay=args.delay)
    part = args.port_file.with_name(args.port_file.name + ".part")
    part.write_text(str(server.port))
    os.replace(part, args.port_file)
    server.serve()


if __name__ == "__main__":
    main()


@functools.cache
def reward_server() -> str:
    """The address of a server that rewards an answer by its length, as long as the tests run."""

    def classify(body: dict[str, Any]) -> dict[str, Any]:
        return {"data": [{"index": 0, "probs": [float(len(body["messages"][-1]["content"]))]}]}

    return f"http://127.0.0.1:{FaultServer(classify, paths=('/classify',)).start().port}/classify"

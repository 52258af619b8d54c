"""The server behind the page of ``rankalign watch``; see :mod:`rankalign.interactive.pages.local`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from rankalign.interactive.follow import Follower
from rankalign.interactive.pages.local import Answer, LocalHandler, LocalServer

FILES = {
    "/": ("watch.html", "text/html"),
    "/watch.css": ("watch.css", "text/css"),
    "/watch.js": ("watch.js", "text/javascript"),
    "/chart.js": ("chart.js", "text/javascript"),
    "/text.js": ("text.js", "text/javascript"),
}


class WatchServer(LocalServer):
    """Shows one run until it is stopped.

    Args:
        follower: of the run.
        port: to listen on; 0 takes a free one.

    Raises:
        InputError: the port is taken or not allowed.
    """

    def __init__(self, follower: Follower, port: int = 0) -> None:
        self.follower, self.lock = follower, threading.Lock()
        super().__init__(Handler, FILES, port)


class Handler(LocalHandler):
    """One connection; nothing can be changed through it."""

    server: WatchServer

    def gets(self) -> Mapping[str, Callable[[Mapping[str, str]], Answer]]:
        """``state``: all of it, or its version alone where the page has seen that one."""
        return {"state": self._state}

    def _state(self, asked: Mapping[str, str]) -> Answer:
        with self.server.lock:
            version = self.server.follower.poll()
            if asked.get("seen") == str(version):
                return {"version": version}
            return self.server.follower.state()

"""The server behind the page of ``rankalign label``; see :mod:`rankalign.interactive.pages.local`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus

from rankalign.errors import InputError
from rankalign.interactive.pages.local import LARGEST_BODY, Answer, LocalHandler, LocalServer, Refused, whole
from rankalign.interactive.ranking import Levels, Session, Stale

__all__ = ["LARGEST_BODY", "Handler", "LabelServer"]

FILES = {
    "/": ("label.html", "text/html"),
    "/label.css": ("label.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
    "/drag.js": ("drag.js", "text/javascript"),
    "/text.js": ("text.js", "text/javascript"),
}


class LabelServer(LocalServer):
    """Serves one session until it is finished or interrupted.

    Args:
        session: whose work it is.
        port: to listen on; 0 takes a free one.

    Raises:
        InputError: the port is taken or not allowed.
    """

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session = session
        super().__init__(Handler, FILES, port)


class Handler(LocalHandler):
    """One connection."""

    server: LabelServer

    def gets(self) -> Mapping[str, Callable[[Mapping[str, str]], Answer]]:
        """``view``, of a set by its number or of the one that is next."""
        return {"view": self._view}

    def posts(self) -> Mapping[str, Callable[[Answer], Answer]]:
        """What an annotator does."""
        return {
            "draft": self._draft,
            "commit": self._commit,
            "undo": self._undo,
            "columns": self._columns,
            "finish": self._finish,
        }

    def status_of(self, error: InputError) -> HTTPStatus:
        """A page that is behind is told so by a status of its own."""
        return HTTPStatus.CONFLICT if isinstance(error, Stale) else super().status_of(error)

    def _view(self, asked: Mapping[str, str]) -> Answer:
        at = asked.get("at", "")
        if at and not (at.isascii() and at.isdigit() and len(at) < 10):
            raise Refused(HTTPStatus.BAD_REQUEST, "at: expected the number of a set")
        return self.server.session.view(int(at) if at else None)

    def _draft(self, body: Answer) -> Answer:
        return self.server.session.draft(whole(body, "turn"), whole(body, "at"), _levels(body))

    def _commit(self, body: Answer) -> Answer:
        return self.server.session.commit(whole(body, "turn"), whole(body, "at"), _levels(body))

    def _undo(self, body: Answer) -> Answer:
        return self.server.session.undo(whole(body, "turn"))

    def _columns(self, body: Answer) -> Answer:
        return self.server.session.choose_columns(whole(body, "columns"))

    def _finish(self, body: Answer) -> Answer:
        facts = self.server.session.write()
        self.close_connection = True
        self.server.stop_soon()
        return facts


def _levels(body: Answer) -> Levels:
    levels = body.get("levels")
    if not isinstance(levels, list) or not all(
        isinstance(level, list) and all(type(place) is int for place in level) for level in levels
    ):
        raise Refused(HTTPStatus.BAD_REQUEST, "levels: expected lists of places of answers")
    return levels

"""The page of ``rankalign chat``, made with gradio: on loopback, off the network, all text shown as text."""

from __future__ import annotations

import contextlib
import html
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

# Read when gradio is imported: no word to anyone about who starts a page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from rankalign.data import templates
from rankalign.data.messages import message_text
from rankalign.errors import InputError
from rankalign.interactive.conversation import CHOICES, EMPTY, Chat, Conversation, Options, options
from rankalign.interactive.pages.guard import Guard

HOST = "127.0.0.1"
MOST_TOKENS = 2048
PATHS = (
    "/",
    "/assets/",
    "/config",
    "/favicon.ico",
    "/manifest.json",
    "/static/",
    "/theme.css",
    "/gradio_api/app_id",
    "/gradio_api/call/",
    "/gradio_api/cancel",
    "/gradio_api/heartbeat/",
    "/gradio_api/info",
    "/gradio_api/queue/data",
    "/gradio_api/queue/join",
    "/gradio_api/run/",
    "/gradio_api/startup-events",
    "/gradio_api/theme.css",
)
"""Of gradio's routes those that the page and gradio_client use; not uploads, files of this disk or proxies."""
CSS = (
    ".gradio-container {max-width: 72rem !important; width: 100% !important; margin: auto}"
    "footer {display: none !important} .message .md {white-space: pre-wrap}"
    "button[aria-label=Clear] {display: none}"  # it would empty the pane and leave the talk as it is
    # What one answers with stays in reach however long the talk.
    "#bar {position: sticky; bottom: 0; z-index: 5; background: var(--body-background-fill)}"
    "#bar {padding-block: .4rem; gap: .4rem}"
    "#votes, #buttons {flex-wrap: nowrap; gap: .4rem}"
    "#votes button, #buttons button {min-width: 0; min-height: 2.75rem}"
    "#status {min-height: 1.5rem} #status p {margin: 0}"
    ".gradio-container {overflow: clip !important}"  # hidden, it would hold the bar at its own end
    # The talk scrolls in here, where gradio follows an answer that grows.
    "#pane0 .bubble-wrap, #pane1 .bubble-wrap {max-height: 65dvh}"
    "@media (max-width: 40rem) {#pane0 .bubble-wrap, #pane1 .bubble-wrap {max-height: 30dvh}"
    ".gradio-container main {padding-inline: .6rem !important}"
    "#votes button, #buttons button {padding-inline: .2rem; font-size: .8125rem}}"
)
WORDS = {"left": "Left is better", "right": "Right is better", "tie": "Tie"}
SIDE_BY_SIDE = "Two models answer in an order drawn by lot. Say which answer is better; the better one goes on."


class Page:
    """What happens when something is pressed.

    Args:
        chat: whom to talk to.
        start: where the sliders stand at first.
    """

    def __init__(self, chat: Chat, start: Options) -> None:
        self.chat, self.start = chat, start
        self.sides = 2 if chat.two else 1
        self._talks: dict[str, Conversation] = {}

    def blocks(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="rankalign chat", analytics_enabled=False) as page:
            gr.Markdown("# rankalign chat" + (f"\n\n{SIDE_BY_SIDE}" if self.chat.two else ""))
            panes = self._panes()
            with gr.Column(elem_id="bar"):
                status = gr.Markdown("", elem_id="status")  # gr.HTML needs eval, which the policy forbids
                votes = self._vote_buttons()
                # Of one line: then Enter sends, and Shift and Enter begin another.
                box = gr.Textbox(
                    label="Message", lines=1, max_lines=12, elem_id="message", autofocus=True,
                    placeholder="Enter sends, Shift+Enter breaks the line",
                )  # fmt: skip
                with gr.Row(elem_id="buttons"):
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    stop = gr.Button("Stop", elem_id="stop")
                    fresh = gr.Button("New conversation", elem_id="fresh")
            controls = self._controls()
            private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            # One model in memory, one answer at a time.
            model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
            out = [box, status, *panes, *votes]
            gr.on([send.click, box.submit], self.say, [box, *controls], out, **private, **model)
            stop.click(self.stop, None, None, queue=False, **private)  # else it waits behind the answer that it stops
            fresh.click(self.renew, None, out, queue=False, **private)
            for button, choice in zip(votes, CHOICES, strict=False):
                button.click(self._voter(choice), None, [status, *panes, *votes], queue=False, **private)
            page.unload(self.leave)
            if not self.chat.two:
                gr.events.api(self.answer, api_name="chat", **model)
        return page

    def _panes(self) -> list[Any]:
        titles = ("Left", "Right") if self.chat.two else (self.chat.speakers[0].policy.model,)
        look: dict[str, Any] = {"render_markdown": False, "latex_delimiters": [], "allow_tags": False}
        look |= {"height": None, "min_height": 120}  # they grow with the talk
        look |= {"buttons": [], "feedback_options": None, "allow_file_downloads": False}
        with gr.Row():
            return [gr.Chatbot(label=title, elem_id=f"pane{i}", **look) for i, title in enumerate(titles)]

    def _vote_buttons(self) -> list[Any]:
        if not self.chat.two:
            return []
        with gr.Row(elem_id="votes"):
            return [gr.Button(WORDS[choice], interactive=False, elem_id=f"vote-{choice}") for choice in CHOICES]

    def _controls(self) -> list[Any]:
        start, drawn = self.start.sampling, "; does not count with several beams"
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            system = gr.Textbox(self.start.system, label="System message", elem_id="system")
            template = gr.Dropdown(list(templates.NAMES), value=self.start.template, label="Template")
            with gr.Row():
                sliders: list[Any] = [
                    gr.Slider(
                        0, 2, start.temperature, step=0.05, label="Temperature", info="0 takes the likeliest" + drawn
                    ),
                    gr.Slider(0.05, 1, start.top_p, step=0.05, label="Top-p", info="nucleus" + drawn),
                    gr.Slider(0, 200, start.top_k, step=1, label="Top-k", info="0 keeps all" + drawn),
                ]
            with gr.Row():
                sliders += [
                    gr.Slider(
                        1, 8, start.num_beams, step=1, label="Beams", info="above 1 the answer comes all at once"
                    ),
                    gr.Slider(1, MOST_TOKENS, start.max_new_tokens, step=1, label="Most new tokens"),
                    gr.Number(start.seed, precision=0, label="Seed", info="the same seed and talk, the same answer"),
                ]
        return [*sliders, template, system]

    # --- what is pressed -----------------------------------------------------------------------------------------

    def say(self, request: gr.Request, text: str, *settings: Any) -> Iterator[list[Any]]:
        """Send the message, and show the answers as they grow."""
        talk = self._talk(request)
        with _told():
            before = [*talk.messages, {"role": "user", "content": text}]
            for shown in talk.ask(text, _chosen(*settings)):
                yield ["", "", *(_pane(before, answer) for answer in shown), *self._buttons(False)]
            if talk.shown:
                said = _status(talk, _chosen(*settings))
                yield ["", said, *(_pane(before, answer or EMPTY) for answer in talk.shown), *self._buttons(True)]

    def stop(self, request: gr.Request) -> None:
        """End the answers under way; what is there of them stays."""
        self._talk(request).stopping.set()

    def renew(self, request: gr.Request) -> list[Any]:
        """Begin a new conversation."""
        self._talk(request).reset()
        return ["", "", *([] for _ in range(self.sides)), *self._buttons(False)]

    def leave(self, request: gr.Request) -> None:
        """The browser left the page."""
        if talk := self._talks.pop(request.session_hash or "", None):
            talk.stopping.set()

    def answer(
        self,
        message: str,
        system: str = "",
        temperature: float = 0.7,
        top_p: float = 1.0,
        top_k: int = 0,
        num_beams: int = 1,
        max_new_tokens: int = 256,
        seed: int = 0,
        template: str = "auto",
    ) -> Iterator[str]:
        """Answer one message; every part is the answer so far and begins with the part before."""
        with _told():
            limit = min(int(max_new_tokens), MOST_TOKENS)  # programs that ask have no slider that ends there
            chosen = _chosen(temperature, top_p, top_k, num_beams, limit, seed, template, system)
            for shown in Conversation(self.chat).ask(message, chosen):
                yield shown[0]

    def _voter(self, choice: str) -> Any:
        def vote(request: gr.Request) -> list[Any]:
            talk = self._talk(request)
            with _told():
                talk.vote(choice)
            count = self.chat.votes.count if self.chat.votes else 0
            said = f"Stored: {WORDS[choice].lower()}. {count} vote{'s' * (count != 1)} in the file."
            return [said, *([_line(m) for m in talk.messages] for _ in range(2)), *self._buttons(False)]

        return vote

    def _talk(self, request: gr.Request) -> Conversation:
        return self._talks.setdefault(request.session_hash or "", Conversation(self.chat))

    def _buttons(self, due: bool) -> list[Any]:
        return [gr.update(interactive=due) for _ in CHOICES] if self.chat.two else []


def _chosen(temperature: float, top_p: float, top_k: float, beams: float, limit: float, *rest: Any) -> Options:
    return options(temperature, top_p, int(top_k), int(beams), int(limit), int(rest[0] or 0), rest[1], rest[2])


def _status(talk: Conversation, chosen: Options) -> str:
    """What there is to say of answers that have come to their end."""
    if talk.stopping.is_set():
        return "Stopped."
    if not any(talk.cut):
        return "Which answer is better?" if talk.duel else ""
    sides = ["The left answer was", "The right answer was"] if len(talk.cut) > 1 else ["The answer was"]
    who = "Both answers were" if len(talk.cut) > 1 and all(talk.cut) else sides[talk.cut.index(True)]
    limit = chosen.sampling.max_new_tokens
    return f"{who} cut at the limit of {limit} tokens; “Most new tokens” under Settings raises it."


def _line(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it reads: gradio takes a text for HTML, and straightens the indentation of what is a bare string."""
    return {
        "role": message["role"],
        "content": {"type": "text", "text": html.escape(message_text(message, thoughts=True))},
    }


def _pane(before: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    return [_line(message) for message in [*before, {"role": "assistant", "content": answer}]]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the user can mend is shown on the page."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), title="Not possible", print_exception=False) from None


# --- the server --------------------------------------------------------------------------------------------------


class Served:
    """A page being served by a thread of its own, until closed.

    Args:
        chat: whom to talk to.
        start: where the sliders stand at first.
        port: on loopback; 0 takes a free one.

    Attributes:
        url: where the page is.

    Raises:
        InputError: the port is taken.
    """

    def __init__(self, chat: Chat, start: Options, port: int = 0) -> None:
        self._socket = _bind(port)
        port = self._socket.getsockname()[1]
        self.url = f"http://{HOST}:{port}/"
        inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        look = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        shut: dict[str, Any] = {"allowed_paths": [], "ssr_mode": False, "mcp_server": False, "pwa": False}
        shut |= {"enable_monitoring": False, "footer_links": [], "run_history": False, "max_file_size": 0}
        page = Page(chat, start).blocks()
        app = gr.mount_gradio_app(inner, page, "/", HOST, port, theme=look, css=CSS, **shut)
        config = uvicorn.Config(
            Guard(app, port, PATHS), log_level="critical", ws="none", timeout_graceful_shutdown=1, lifespan="on"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the server ends, which it does by itself only where it could not start."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


def _bind(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise InputError(
            f"port {port}: cannot be had ({error}); give another with --port, or 0 for a free one"
        ) from None
    return found

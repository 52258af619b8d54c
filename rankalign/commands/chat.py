"""Talk to a model: a page in the browser, or `--repl` in the terminal; with `--base`, two answers and a blind vote.

The page is served on 127.0.0.1 alone. Votes are records with scores under the voter's name, for `rankalign compare`,
`rankalign eval agreement` and `rankalign train`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from rankalign.commands import show_facts
from rankalign.data import templates
from rankalign.errors import InputError, missing_extra

EXAMPLE = "rankalign chat --model runs/demo/train --base default --votes runs/votes.jsonl"
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Who answers, how, and where."""
    parser.add_argument("--model", default="default", help="default, tiny, a folder, a hub id or a LoRA adapter")
    parser.add_argument("--adapter", default="", help="folder of a LoRA adapter to put on --model")
    parser.add_argument("--base", default="", help="a second model: both answer, side by side, and you vote")
    parser.add_argument("--load-8bit", "--load_8bit", action="store_true", help="weights in a quarter of their memory")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--repl", action="store_true", help="talk here in the terminal, or read a line after the other")
    parser.add_argument("--votes", default="votes.jsonl", help="file that votes are appended to (votes.jsonl)")
    parser.add_argument("--voter", default="human", help="whose scores the votes are (human)")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--template", default="auto", help="auto, chat, raw, alpaca, vicuna or hh")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (0.7)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus (1)")
    parser.add_argument("--top_k", type=int, default=0, help="keep so many tokens; 0 keeps all (0)")
    parser.add_argument("--num_beams", type=int, default=1, help="above 1: search, do not draw (1)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of an answer (256)")
    parser.add_argument("--seed", type=int, default=0, help="of answers, and of who stands on the left (0)")
    parser.add_argument("--port", type=int, default=7860, help="of the page; 0 takes a free one (7860)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, then talk until the end."""
    from rankalign.interactive.conversation import ALIGNED, BASE, Chat, load_speaker, options

    chosen = (args.temperature, args.top_p, args.top_k, args.num_beams, args.max_new_tokens, args.seed)
    start = options(*chosen, args.template, args.system)
    if args.repl and args.base:
        raise InputError("--repl talks to one model; leave --base out, or --repl")
    templates.check_name(args.template)
    with contextlib.ExitStack() as stack:
        votes = _votes(args, stack)
        wanted = [(BASE, args.base, "")] if args.base else []
        speakers = [
            load_speaker(name, model, adapter, args.dtype, args.load_8bit)
            for name, model, adapter in [*wanted, (ALIGNED, args.model, args.adapter)]
        ]
        for speaker in speakers:
            _introduce(speaker)
        chat = Chat(speakers, args.seed, votes, args.voter)
        return _repl(chat, start) if args.repl else _page(chat, start, args.port)


def _votes(args: argparse.Namespace, stack: contextlib.ExitStack) -> Any:
    if not args.base:
        return None
    from rankalign.interactive.votes import VoteFile

    return stack.enter_context(contextlib.closing(VoteFile(args.votes)))


def _introduce(speaker: Any) -> None:
    from rankalign.models.quant import weight_bytes

    size = weight_bytes(speaker.model)
    print(f"{speaker.policy.name}: {speaker.policy.model}, {size:,} bytes of weights", file=sys.stderr)


def _repl(chat: Any, start: Any) -> dict[str, Any]:
    from rankalign.interactive.conversation import Conversation
    from rankalign.interactive.repl import Repl, reader

    out = sys.__stdout__ or sys.stdout
    terminal = sys.stdin.isatty() and out.isatty()
    # The command line keeps stdout clean of what libraries print; answers are what is wanted there.
    with contextlib.redirect_stdout(out):
        repl = Repl(Conversation(chat), start, reader(sys.stdin, terminal), out, lambda t: print(t, file=sys.stderr))
        repl.run()
    return {"answers": repl.answers, "empty_answers": repl.empty}


def _page(chat: Any, start: Any, port: int) -> dict[str, Any]:
    try:
        from rankalign.interactive.pages.chat import Served
    except ModuleNotFoundError as error:
        raise missing_extra("the page (--repl does without)", "ui") from error
    served = Served(chat, start, port)
    print(f"{served.url}  (Ctrl-C ends)", file=sys.stderr, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        served.wait()
    served.close()
    return {"url": served.url, "votes": chat.votes.count if chat.votes else 0}

"""The command line: ``rankalign <command>``. A command's module is imported only when it runs.

Exit codes: 0 done, 1 bad input or settings, 2 wrong usage, 130 interrupted (the same command goes on from there).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import rankalign
from rankalign.commands.parsers import COMMANDS, module_of, parser_of
from rankalign.errors import InputError, Interrupted
from rankalign.registry import did_you_mean
from rankalign.storage.jsonl import dumps, without_nan


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"rankalign {rankalign.__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"rankalign: unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run(words[0], words[1:])


def overview() -> str:
    """The text of ``rankalign --help``, no wider than the terminal."""
    width = shutil.get_terminal_size().columns
    fold = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
    return "\n".join(
        [
            "usage: rankalign <command> [options]",
            "",
            fold(
                "Align language models by ranking: sample, score, train on all candidates, and see whether it helped."
            ),
            "",
            *(fold(f"  {name:<14} {what}", subsequent_indent=" " * 17) for name, (_, what) in COMMANDS.items()),
            "",
            fold("`rankalign <command> --help` shows options and an example. First steps: `rankalign demo`."),
        ]
    )


def run(command: str, words: Sequence[str]) -> int:
    """Parse ``words`` for ``command`` and run it."""
    quiet_libraries()
    module = module_of(command)
    if hasattr(module, "topics") and (asked := _topic(words)) is not None:
        return _help(command, module, asked)
    parser = parser_of(command)
    args, rest = parser.parse_known_args(_with_config(parser, words))
    if rest and not getattr(module, "TAKES_MORE", False):
        _refuse(parser, rest)
    args.rest = rest
    return _execute(command, module, args)


def _topic(words: Sequence[str]) -> str | None:
    """What help is asked for: all that ``--help`` shows (an empty text), one topic of it, or none."""
    if "--help_all" in words:
        return "all"
    at = next((place for place, word in enumerate(words) if word in ("-h", "--help")), None)
    if at is None:
        return None
    return words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else ""


def _help(command: str, module: Any, topic: str) -> int:
    """Print the help of a command whose settings are too many for one screen."""
    try:
        text = module.topics(topic)
    except ValueError as error:
        print(f"rankalign {command}: {error}", file=sys.stderr)
        return 2
    parser = parser_of(command)
    if not topic:
        parser.description = f"{module.__doc__}\n{text}"
        text = parser.format_help()
    with _pager_may_leave():
        print(text.rstrip("\n"), flush=True)
    raise SystemExit(0)  # as argparse ends


@contextlib.contextmanager
def _pager_may_leave() -> Iterator[None]:
    """A reader that has seen enough (a pager, ``head``) is no error."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end


def _with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> Sequence[str]:
    """A settings file that stands first needs no ``--config`` before it."""
    takes = "--config" in parser._option_string_actions
    first = words[0] if words else ""
    return ["--config", *words] if takes and first.endswith((".yaml", ".yml")) and first[0] != "-" else words


def _refuse(parser: argparse.ArgumentParser, rest: Sequence[str]) -> NoReturn:
    """Name what is unknown, with what comes near it; the whole usage is for ``--help``."""
    flags = [word for word in rest if word.startswith("--")]
    if not flags:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    name = flags[0].partition("=")[0]
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    parser.exit(2, f"{parser.prog}: unknown flag {name}{did_you_mean(name, known)}; `{parser.prog} --help` lists all\n")


def _execute(command: str, module: Any, args: argparse.Namespace) -> int:
    try:
        target = getattr(args, "table", None)
        if target:
            _check_table(target)
        # What a library prints must not land among the results.
        with contextlib.redirect_stdout(sys.stderr):
            result = module.run(args)
        if os.environ.get("RANK", "0") != "0":
            return 0  # of several processes that train one model, the first tells the result
        if target:
            _write_table(target, module.tables(result))
        if args.json:
            print(dumps(without_nan(result)))
        else:
            module.show(result)
        sys.stdout.flush()
        return int(result.get("exit_code", 0)) if isinstance(result, dict) else 0
    except InputError as error:
        from rankalign.commands.docs_pages import page_of

        print(f"rankalign: {error} (see {page_of(command, error)})", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"\nrankalign: interrupted; {error or 'the same command goes on from here'}", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
        return 0


def _check_table(target: str) -> None:
    from rankalign.evaluation.export import check_target

    check_target(target)


def _write_table(target: str, tables: Sequence[Any]) -> None:
    """Write what is shown; where there is none (a sheet was made, not read) that is said and no error."""
    from rankalign.evaluation.export import write_tables

    written = write_tables(target, tables) if tables else []
    print(f"table: {', '.join(written)}" if written else f"{target}: not written, there is no table", file=sys.stderr)


def quiet_libraries() -> None:
    """No telemetry, no chatter of libraries between our own lines, threads that soon sleep while they wait, and large
    pages for large tensors.

    OpenMP's threads spin for each other a hundred times longer than this, which on a machine that others use as well
    makes matrix products about ten times slower, and on a quiet one no faster. Of pages see
    :mod:`rankalign.training.heap`; torch reads that name once, when it makes its first tensor.
    """
    for name, value in (
        ("GOMP_SPINCOUNT", "5000"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("DO_NOT_TRACK", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    if os.path.isdir("/sys/kernel/mm/transparent_hugepage"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import, of kernels for other machines
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())

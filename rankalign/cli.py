"""The command line: ``rankalign <command>``. A command's module is imported only when it runs.

Exit codes: 0 done, 1 bad input or settings, 2 wrong usage, 130 interrupted (the same command goes on from there).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import rankalign
from rankalign.errors import InputError, Interrupted
from rankalign.registry import did_you_mean
from rankalign.storage.jsonl import dumps, without_nan

# Name: (module under rankalign.commands, one line for --help).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "see the whole path on a small model, in minutes"),
    "init": ("init", "a project folder with settings, prompts and a script"),
    "sample": ("sample", "several policies answer each prompt"),
    "score": ("score", "scorers grade the answers"),
    "merge": ("merge", "join what several `--shard` processes wrote; fold an adapter into its base"),
    "plan": ("plan", "what a training run will take, before any weights are loaded"),
    "train": ("train", "learn from the order of the answers"),
    "eval": ("evaluate", "perplexity, reward and text statistics of answers"),
    "compare": ("compare", "two systems on the same prompts: wins, sums, intervals"),
    "chat": ("chat", "talk to a model, or to two and vote; a page or the terminal"),
    "label": ("label", "a page in the browser to rank answers by hand"),
    "sheet": ("sheet", "blinded sheets for human raters: make, read"),
    "convert": ("convert", "between our records and every other tool's format"),
    "convert-config": ("convert_config", "another trainer's settings as ours"),
    "lint": ("lint", "find what is wrong in a file of candidates"),
    "iterate": ("iterate", "train in rounds on the own new answers: IP-n, OP-k, RAFT"),
    "run": ("run", "all of the above as one experiment, with a report"),
    "table": ("paper_table", "the RRHF paper's comparison, every row with every seed"),
    "report": ("report", "one HTML page of a run, or of several side by side"),
    "watch": ("watch", "a run while it trains: a live page, or plots in the terminal"),
    "delta": ("delta", "bit-exact differences between two models: make, apply, verify"),
    "verify": ("verify", "has anything that a run read or wrote changed since?"),
    "diff": ("diff", "what differs between two runs"),
    "env": ("env", "versions, processor and GPUs, for a bug report"),
    "ls": ("ls", "list losses, engines, scorers, formats, templates"),
}


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
    """The text of ``rankalign --help``."""
    lines = [f"  {name:<14} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rankalign <command> [options]",
            "",
            "Align language models by ranking: sample, score, train on all candidates, and see whether it helped.",
            "",
            *lines,
            "",
            "`rankalign <command> --help` shows options and an example. First steps: `rankalign demo`.",
        ]
    )


def run(command: str, words: Sequence[str]) -> int:
    """Parse ``words`` for ``command`` and run it."""
    quiet_libraries()
    module = importlib.import_module(f"rankalign.commands.{COMMANDS[command][0]}")
    parser = argparse.ArgumentParser(
        prog=f"rankalign {command}",
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    if hasattr(module, "tables"):
        parser.add_argument(
            "--table", metavar="F", help="write what is shown to F.csv, .tsv, .xlsx, .md, .tex or .html"
        )
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(_with_config(parser, words))
    if rest and not getattr(module, "TAKES_MORE", False):
        _refuse(parser, rest)
    args.rest = rest
    return _execute(module, args)


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


def _execute(module: Any, args: argparse.Namespace) -> int:
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
        print(f"rankalign: {error}", file=sys.stderr)
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
    """No telemetry, no chatter of libraries between our own lines, and threads that soon sleep while they wait.

    OpenMP's threads spin for each other a hundred times longer than this, which on a machine that others use as well
    makes matrix products about ten times slower, and on a quiet one no faster.
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
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import, of kernels for other machines
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())

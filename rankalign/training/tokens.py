"""Files of records as token lists, kept as a table beside the models: made once, mapped by every process and later run.

The folder of a table is named by all that its tokens come from: the data's bytes, the tokenizer, every setting that can
change a token or a count, and the code that makes them. It holds ``tokens.arrow`` and ``report.json``, which has what
was said and counted while it was made, so that a run that finds it says the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import transformers
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

import rankalign
from rankalign.data import load as data
from rankalign.data.convert import Intake
from rankalign.data.encode import EncodeOptions, TokenList, said
from rankalign.data.judges import weighted
from rankalign.data.records import CandidateSet, choose_among, judges
from rankalign.data.token_table import TokenTable, to_batch, write_table
from rankalign.data.tokenise import PIECE, tokenise
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.progress import Progress
from rankalign.registry import did_you_mean
from rankalign.storage.code import hash_of, is_code
from rankalign.storage.files import write_text
from rankalign.storage.folders import cached_folder
from rankalign.storage.jsonl import dumps, loads
from rankalign.storage.sources import sha256_of
from rankalign.training.fit import check_end
from rankalign.training.settings import DataSettings

OFF = "off"  # --token_cache: tokens stay in the memory of this process
TABLE, REPORT = "tokens.arrow", "report.json"
UNWANTED = "label"  # judge that says whether people wanted an answer
UNSCORED = "only"  # judge of single responses that nobody scored, which SFT may still learn from
# Of the settings of the data, those that change no token and no count. What is read stands in by its content.
_NO_MATTER = ("data", "eval_data", "token_cache", "num_proc")
# Of the package, what tokens come from: another version of it makes a table of its own.
_SOURCES = ("data", "storage", "models/load.py", "training/tokens.py")

T = TypeVar("T")


def encode(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, path: str, alone: bool = False, whole: bool = False
) -> tuple[Sequence[TokenList], dict[str, int]]:
    """The lists of one file, and counts of all that was kept, cut and left out.

    Args:
        settings: how records become tokens, and where they are kept.
        tokenizer: the model's.
        path: the file.
        alone: whether single responses that nobody scored are of use, as they are to SFT.
        whole: as reward models read them.
    """
    check_end(tokenizer)
    job = _Job(settings, tokenizer, path, alone, whole)
    lists, report = (job.kept_in(settings.token_cache) if job.can_be_kept else None) or job.in_memory()
    for sentence in said(report["counts"]):
        print(f"{path}: {sentence}", file=sys.stderr)
    return lists, report["counts"]


class _Reading:
    """One pass over a file: its records, as they are to be encoded, and what was seen of their judges."""

    def __init__(self, settings: DataSettings, path: str, alone: bool) -> None:
        self.settings, self.path, self.alone = settings, path, alone
        self.intake = Intake(settings.skip_invalid, settings.ignore_columns)
        self.judges: dict[str, None] = {}
        self.single = True

    def records(self) -> Iterator[CandidateSet]:
        """All of them, less what supervised training must not imitate."""
        unwanted = self.alone and self.settings.judge in ("", UNWANTED)
        for record in data.load(self.path, self.settings.format, self.intake):
            if unwanted and not self._wanted(record):
                continue
            self.single = self.single and len(record.responses) == 1
            self.judges.update(dict.fromkeys(judges([record])))
            yield record

    def _wanted(self, record: CandidateSet) -> bool:
        """Take every answer that people labelled as unwanted out, and count them; False where none is left."""
        wanted = [response for response in record.responses if response.scores.get(UNWANTED) != 0]
        if left := len(record.responses) - len(wanted):
            self.intake.losses.add("answers labelled as unwanted, which are not imitated", left)
            record.responses = wanted
        return bool(record.responses)

    def judge(self) -> str:
        """The judge to rank by, from what was read so far; SFT also takes unscored data, if each prompt has just one
        response.

        Raises:
            InputError: there is none, or several and none is named; or an axis that nothing is scored on.
        """
        for axis in self.settings.axis_names:
            if axis not in self.judges:
                raise InputError(f"--axes: nothing is scored by {axis!r}{did_you_mean(axis, list(self.judges))}")
        if self.settings.axes:
            return ""
        if self.alone and not self.settings.judge and self.single and not self.judges:
            return UNSCORED
        several = weighted(self.settings.judge)
        for name in several:
            if name not in self.judges:
                raise InputError(f"--judge: nothing is scored by {name!r}{did_you_mean(name, list(self.judges))}")
        return self.settings.judge if several else choose_among(list(self.judges), self.settings.judge)


def _scored(records: Iterator[CandidateSet]) -> Iterator[CandidateSet]:
    """Records that nobody scored, with one score for all."""
    for record in records:
        for response in record.responses:
            response.scores[UNSCORED] = 0.0
        yield record


class _Job:
    """Tokens of one file under given settings."""

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, path: str, alone: bool, whole: bool
    ) -> None:
        self.settings, self.tokenizer, self.path, self.alone, self.whole = settings, tokenizer, path, alone, whole
        self.report: dict[str, Any] = {}

    # --- making ----------------------------------------------------------------------------------------------------

    def in_memory(self) -> tuple[list[TokenList], dict[str, Any]]:
        """All lists as Python objects."""
        lists = list[TokenList]()

        def take(pieces: Iterator[list[TokenList]]) -> None:
            lists[:] = chain.from_iterable(pieces)

        self.make(list, take, self.settings.num_proc or 1)
        return lists, self.report

    def make(self, shape: Callable[[list[TokenList]], T], take: Callable[[Iterator[T]], None], num_proc: int) -> None:
        """Hand all pieces to ``take`` and leave the report.

        Which judge ranks is known for certain only when all records are read. It is guessed from the first of them, so
        that one pass does; where the guess was wrong, a second pass takes the right one.
        """
        judge, again = "", False
        while True:
            reading = _Reading(self.settings, self.path, self.alone)
            reading.intake.quiet = again
            stream = reading.records()
            first = list(islice(stream, PIECE))
            if not again:
                try:
                    judge = reading.judge()
                except InputError:
                    for _ in stream:  # only the rest can tell, and what is said then is of all the data
                        pass
                    judge, again = reading.judge(), True
                    continue
            take(self._pieces(reading, judge, chain(first, stream), shape, num_proc))
            if (right := reading.judge()) == judge:
                return
            judge, again = right, True

    def _pieces(
        self,
        reading: _Reading,
        judge: str,
        records: Iterator[CandidateSet],
        shape: Callable[[list[TokenList]], T],
        num_proc: int,
    ) -> Iterator[T]:
        settings, intake, counts = self.settings, reading.intake, Counter[str]()
        options = EncodeOptions(
            judge=judge,
            axes=settings.axis_names,
            template=settings.template,
            system=settings.system,
            max_length=settings.max_length,
            max_candidates=settings.max_candidates,
            only_use_provide=settings.only_use_provide,
            only_use_sample=settings.only_use_sample,
            stop_response=settings.stop_response,
            allow_special_in_text=settings.allow_special_in_text,
            whole=self.whole,
            thoughts=settings.thoughts or ("drop" if self.whole else "keep"),
        )
        if judge == UNSCORED and UNSCORED not in reading.judges:
            records = _scored(records)
        with Progress("tokenising", None, "prompt") as progress:
            for piece in tokenise(records, self.tokenizer, options, shape, num_proc):
                counts.update(piece.counts)
                for error in piece.errors:
                    intake(error)
                progress.add(piece.records)
                yield piece.made
        unread = {f"rows with the unread column {column}": count for column, count in intake.unread.counts.items()}
        renamed = {"renamed ids": intake.renamed} if intake.renamed else {}
        more = {**intake.losses.counts, **unread, **renamed, "skipped_invalid": len(intake.errors)}
        self.report = {"counts": {**counts, **more}, "notes": intake.notes, "path": self.path}

    # --- keeping ---------------------------------------------------------------------------------------------------

    @property
    def can_be_kept(self) -> bool:
        """Whether it is asked for, and all that the tokens come from can be named: a tokenizer in Python cannot."""
        return self.settings.token_cache != OFF and getattr(self.tokenizer, "backend_tokenizer", None) is not None

    def kept_in(self, asked: str) -> tuple[TokenTable, dict[str, Any]] | None:
        """The table in the folder of tables, made by the first process that comes while the others wait; None, which
        is said, where it cannot be written.

        Args:
            asked: the folder of tables; empty is ``$RANKALIGN_TOKEN_CACHE`` (a disk of the node's own, say), or
                ``tokens`` in :func:`rankalign.models.load.cache_dir`.
        """
        root = Path(asked or os.environ.get("RANKALIGN_TOKEN_CACHE") or models.cache_dir() / "tokens")
        folder = root / hashlib.sha256(dumps(self.identity()).encode()).hexdigest()[:32]
        made: list[str] = []
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _first_process_first() as held:
                cached_folder(folder, lambda fresh: made.append(self._build(fresh)), held)
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(folder)  # by which a clean-up knows what is still of use
            report = loads((folder / REPORT).read_text(encoding="utf-8"))
            table = TokenTable(folder / TABLE)
        except OSError as error:
            print(f"{root}: no tokens can be kept here ({error.strerror or error}): in memory instead", file=sys.stderr)
            return None
        if not made:
            for file, text in report["notes"]:
                print(f"{self.path + file.removeprefix(report['path'])}: {text}", file=sys.stderr)
        print(f"tokens: {made[0] if made else 'found'} in {folder}", file=sys.stderr)
        return table, report

    def _build(self, fresh: Path) -> str:
        vocabulary = len(self.tokenizer)
        shape = partial(to_batch, vocabulary=vocabulary)
        take = partial(write_table, fresh / TABLE, vocabulary=vocabulary)
        self.make(shape, take, self.settings.num_proc)
        write_text(fresh / REPORT, dumps({**self.report, "identity": self.identity()}) + "\n")
        return "made"

    def identity(self) -> dict[str, Any]:
        """All that tokens, counts and notes come from, as plain values."""
        told = dataclasses.asdict(self.settings)
        tokenizer = self.tokenizer
        return {
            "data": sha256_of(self.path),
            "name": Path(self.path).name,  # ids that a file does not have are made of its name
            "settings": {name: value for name, value in told.items() if name not in _NO_MATTER},
            **({"format": hash_of(self.settings.format)} if is_code(self.settings.format) else {}),
            "alone": self.alone,
            "whole": self.whole,
            "tokenizer": [
                models.tokenizer_fingerprint(tokenizer),
                tokenizer.chat_template,
                sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
                len(tokenizer),
            ],
            "code": [_code(), transformers.__version__, tokenizers.__version__],
        }


@contextlib.contextmanager
def _first_process_first() -> Iterator[Callable[[], None]]:
    """Let the first process of a node have a lock before the others ask for it: it is the one that shows how far it is.

    They meet once it holds the lock, and not when its work is done, which may take longer than a meeting may.
    """
    state, met = PartialState(), list[bool]()

    def meet() -> None:
        if not met:
            met.append(True)
            state.wait_for_everyone()

    if not state.is_local_main_process:
        meet()
    try:
        yield meet
    finally:
        meet()


def _code() -> str:
    """Hash of the source of everything here that has a hand in a token."""
    room, digest = Path(rankalign.__file__).parent, hashlib.sha256()
    for source in _SOURCES:
        files = [room / source] if source.endswith(".py") else sorted((room / source).rglob("*.py"))
        for file in files:
            digest.update(f"{file.relative_to(room).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()

"""Conversations, votes and the terminal, without a browser."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rankalign import cli
from rankalign.data.records import CandidateSet, Response, read
from rankalign.data.templates import HH_STOPS
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.errors import InputError, RecordError
from rankalign.interactive import repl
from rankalign.interactive.conversation import Chat, Conversation, Options, options, settled
from rankalign.interactive.repl import Repl, printable
from rankalign.interactive.votes import VoteFile
from rankalign.models import tiny


def speaker(name: str = "aligned", ends: Sequence[int] = (2,)) -> HFEngine:
    engine = HFEngine(Policy(name, model="tiny"))
    model: Any = tiny.build_model()
    model.generation_config.eos_token_id = list(ends)
    engine.model, engine.tokenizer = model, tiny.build_tokenizer()
    return engine


def few(limit: int = 12, **more: Any) -> Options:
    return Options(SamplingParams(max_new_tokens=limit, **more))


class Saying(HFEngine):
    """Answers with given pieces."""

    def __init__(self, name: str, *pieces: str) -> None:
        super().__init__(Policy(name, model=name))
        self.pieces = pieces

    def stream(self, prompt: CandidateSet, stopping: Callable[[], bool] = lambda: False) -> Iterator[Response]:
        for text in itertools.accumulate(self.pieces):
            yield Response(text, self.policy.name)
            if stopping():
                return


# --- the engine's stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.0}, {"num_beams": 3}], ids=str)
def test_the_stream_ends_in_what_generate_says(settings: dict[str, Any]) -> None:
    engine = speaker(ends=(2, *range(60, 90)))
    for number in range(4):
        prompt = CandidateSet(f"p{number}", "Hello " * number + "you")
        under = engine.under(Policy("x", model="tiny", sampling=SamplingParams(max_new_tokens=16, **settings)))
        *parts, whole = under.stream(prompt)
        assert [[whole]] == under.generate([prompt])
        assert under.model is engine.model
        assert [len(p.tokens["ids"]) for p in parts if p.tokens] == list(range(1, len(parts) + 1))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_a_stream_stops_when_told(settings: dict[str, Any]) -> None:
    asked = itertools.count()
    under = speaker().under(Policy("x", model="tiny", sampling=SamplingParams(max_new_tokens=300, **settings)))
    parts = list(under.stream(CandidateSet("a", "b"), lambda: next(asked) == 4))
    assert len(parts) == (0 if settings else 5)
    assert next(asked) == 5


def test_what_is_shown_is_never_taken_back() -> None:
    assert settled("中\ufffd\ufffd", ()) == "中"
    assert settled(" a\n\nHum", HH_STOPS) == "a"
    assert settled(" a\n\nHumm", HH_STOPS) == "a\n\nHumm"
    raw = "  x 中😀 y\n\nHi\n\nHuman"
    for stop in ((), HH_STOPS):
        wire = raw.encode()
        shown = [settled(wire[:n].decode(errors="replace"), stop) for n in range(len(wire) + 1)]
        assert all(later.startswith(part) for part, later in itertools.pairwise(shown))
        assert "\ufffd" not in "".join(shown)
        assert shown[-1] == (raw if not stop else "x 中😀 y\n\nHi")


# --- conversations -----------------------------------------------------------------------------------------------


def test_a_conversation_has_turns_that_sample_would_answer_alike() -> None:
    engine, chosen = speaker(), few(seed=4, temperature=0.8)
    talk = Conversation(Chat([engine]))
    parts = list(talk.ask("Hi 😀", chosen))
    [[wanted]] = engine.under(Policy("aligned", model="tiny", sampling=chosen.sampling)).generate(
        [CandidateSet("chat-00001", [{"role": "user", "content": "Hi 😀"}])]
    )
    assert parts[-1] == [wanted.text]
    list(talk.ask("And?", Options(chosen.sampling, system="Be brief.")))
    prompt = [{"role": "system", "content": "Be brief."}, *talk.messages[:3]]
    [[wanted]] = engine.under(Policy("aligned", model="tiny", sampling=chosen.sampling)).generate(
        [CandidateSet("chat-00002", prompt)]
    )
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[3]["content"] == wanted.text


def test_what_cannot_be_answered_leaves_the_talk_as_it_was() -> None:
    talk = Conversation(Chat([speaker()]))
    list(talk.ask("a\ud800", few()))
    before = list(talk.messages)
    assert before[0]["content"] == "a?"
    for text, chosen, reason in ((" \n", few(), "write something"), ("x", few(600), "exceeds the model's context")):
        with pytest.raises(InputError, match=reason):
            list(talk.ask(text, chosen))
    assert talk.messages == before
    with pytest.raises(InputError, match="no two answers"):
        talk.vote("tie")


def test_reset_during_an_answer_wins() -> None:
    talk = Conversation(Chat([Saying("aligned", "a", "b", "c")]))
    answer = talk.ask("x", few())
    assert next(answer) == ["a"]
    talk.reset()
    assert list(answer) == []
    assert talk.messages == []


def test_options_from_sliders() -> None:
    beams = options(0.5, 0.9, 40, 4, 99, seed=3).sampling
    assert beams == SamplingParams(num_beams=4, max_new_tokens=99, seed=3)
    drawn = options(0.5, 0.9, 40, 1, 99).sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.num_beams) == (0.5, 0.9, 40, 1)
    with pytest.raises(InputError, match="top_p"):
        options(0.5, 1.1, 0, 1, 9)


# --- votes -------------------------------------------------------------------------------------------------------


def two(path: Path, stack: contextlib.ExitStack, seed: int = 0) -> Chat:
    votes = stack.enter_context(contextlib.closing(VoteFile(path)))
    return Chat([Saying("base", "from ", "base"), Saying("aligned", "from ", "aligned")], seed, votes, "ann")


def test_votes_are_records_that_agree_with_what_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "votes.jsonl"
    expected = []
    with contextlib.ExitStack() as stack:
        chat = two(path, stack)
        for choice in ("left", "right", "tie", "left"):
            talk = Conversation(chat)
            *_, [left, right] = talk.ask("Why?", few())
            with pytest.raises(InputError, match="vote on the two answers first"):
                next(talk.ask("more", few()))
            talk.vote(choice)
            better = {"left": left, "right": right}.get(choice)
            expected.append([0.5 if better is None else float(better == f"from {n}") for n in ("base", "aligned")])
            assert talk.messages[1]["content"] == (better or left)
            with pytest.raises(InputError, match="no two answers"):
                talk.vote(choice)
    found = list(read(path))
    assert [record.id for record in found] == [f"chat-0000{n}" for n in (1, 2, 3, 4)]
    assert [record.scores("ann") for record in found] == expected
    assert [[r.text for r in record.responses] for record in found] == [["from base", "from aligned"]] * 4
    assert all(record.meta["left"] != record.meta["right"] for record in found)


def test_sides_are_drawn_evenly_and_from_the_seed(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        chat = two(tmp_path / "v.jsonl", stack, seed=7)
        sides = [chat.order(f"chat-{n:05d}")[0].policy.name for n in range(1000)]
        assert sides == [chat.order(f"chat-{n:05d}")[0].policy.name for n in range(1000)]
        assert abs(sides.count("base") - 500) < 50  # 3.2 standard deviations
        chat.seed = 8
        assert sides != [chat.order(f"chat-{n:05d}")[0].policy.name for n in range(1000)]


def vote(chat: Chat) -> None:
    talk = Conversation(chat)
    list(talk.ask("x", few()))
    talk.vote("left")


def test_votes_go_on_after_a_crash_and_are_locked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "votes.jsonl"
    with contextlib.ExitStack() as stack:
        chat = two(path, stack)
        vote(chat)
        vote(chat)
        with pytest.raises(InputError, match="another program"):
            VoteFile(path)
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        with contextlib.ExitStack() as stack:
            chat = two(path, stack)
            kept = chat.votes.count if chat.votes else 0
            assert kept == (2 if cut == 1 else 1)
            vote(chat)
        assert [record.id for record in read(path)][-1] == f"chat-{kept + 1:05d}"
        assert path.read_bytes().startswith(whole[: whole.index(b"\n") + 1])
    assert capsys.readouterr().err.count("torn") == 2
    path.write_bytes(b'{"id": 3}\n')
    with pytest.raises(RecordError):
        VoteFile(path)
    path.write_bytes(b"[]")
    with pytest.raises(InputError, match="one JSON list"):
        VoteFile(path)


def test_a_vote_that_cannot_be_stored_stays_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes.jsonl"
    with contextlib.ExitStack() as stack:
        chat = two(path, stack)
        vote(chat)
        before, talk, write, written = path.read_bytes(), Conversation(chat), os.write, list[int]()
        list(talk.ask("x", few()))

        def full(handle: int, block: bytes) -> int:
            written.append(len(block))
            if len(written) > 1:
                raise OSError(28, "No space left on device")
            return write(handle, block[:100])

        with monkeypatch.context() as patch:
            patch.setattr("rankalign.interactive.votes.os.write", full)
            with pytest.raises(InputError, match="not stored: no space left"):
                talk.vote("tie")
        assert path.read_bytes() == before
        talk.vote("tie")
    assert len(list(read(path))) == 2


def test_other_commands_read_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "votes.jsonl")
    with contextlib.ExitStack() as stack:
        chat = two(Path(path), stack)
        for _ in range(4):
            vote(chat)
    assert cli.main(["eval", "agreement", path, "--judge", "ann", "--truth", "ann", "--json"]) == 0
    assert '"accuracy": 1.0' in capsys.readouterr().out
    assert cli.main(["compare", f"{path}:base", f"{path}:aligned", "--judge", "ann", "--json"]) == 0
    assert '"n": 4' in capsys.readouterr().out
    assert cli.main(["lint", path, "--json"]) in (0, 1)


# --- the terminal ------------------------------------------------------------------------------------------------


def talk_in_terminal(engine: HFEngine, *lines: str) -> tuple[Repl, str, list[str]]:
    out, said = io.StringIO(), list[str]()
    given = iter(lines)

    def reading() -> str:
        line = next(given, None)
        if line is None:
            raise EOFError
        return line

    terminal = Repl(Conversation(Chat([engine])), few(), reading, out, said.append)
    terminal.run()
    return terminal, out.getvalue(), said


def test_answers_cannot_steer_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07 \x9b31m\r\u202egnp 中😀\tok\n"
    _, out, _ = talk_in_terminal(Saying("a", *hostile), "hi")
    assert out == "\\x1b]0;owned\\x07 \\x9b31m\\r\\u202egnp 中😀\tok\n\n"
    assert printable("é\u2066") == "é\\u2066"


def test_commands_of_the_terminal() -> None:
    terminal, out, said = talk_in_terminal(
        Saying("a", "yes"), "one\n", "/system Be \x1bkind\n", "/what\n", "", "two", "/reset", "three", "/quit", "four"
    )
    assert out == "yes\nyes\nyes\n"
    assert (terminal.answers, terminal.empty) == (3, 0)
    assert terminal.chosen.system == "Be \x1bkind"
    assert [m["content"] for m in terminal.talk.messages] == ["three", "yes"]
    assert "system message: Be \\x1bkind" in said
    assert any(line.startswith("unknown command /what") for line in said)


def test_empty_answers_are_counted_and_told() -> None:
    terminal, out, said = talk_in_terminal(Saying("a", ""), "one")
    assert (terminal.answers, terminal.empty, out) == (1, 1, "\n")
    assert "(no answer: the model ended at once)" in said


def test_interrupting_an_answer_keeps_the_program() -> None:
    class Interrupted(Saying):
        def stream(self, prompt: CandidateSet, stopping: Callable[[], bool] = lambda: False) -> Iterator[Response]:
            for part in super().stream(prompt, stopping):
                yield part
                os.kill(os.getpid(), signal.SIGINT)

    usual = signal.getsignal(signal.SIGINT)
    terminal, out, said = talk_in_terminal(Interrupted("a", "one", " two", " three"), "x", "/reset")
    assert out == "one\n"
    assert "(stopped)" in said
    assert signal.getsignal(signal.SIGINT) is usual
    assert terminal.answers == 1


def test_second_interrupt_is_an_interrupt() -> None:
    stopping = threading.Event()

    def twice() -> None:
        with repl.stopped_by_interrupt(stopping):
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.wait(1)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(1)

    with pytest.raises(KeyboardInterrupt):
        twice()


def test_piped_input_with_bytes_that_are_no_utf8() -> None:
    source = io.TextIOWrapper(io.BytesIO("你好 😀\n".encode() + b"a\xff\n" + "好".encode()), encoding="latin-1")
    reading = repl.reader(source, terminal=False)
    assert [reading(), reading(), reading()] == ["你好 😀\n", "a\ufffd\n", "好"]
    with pytest.raises(EOFError):
        reading()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--load-8bit", "--load_8bit"])
def test_the_command_with_piped_input(flag: str) -> None:
    words = [sys.executable, "-m", "rankalign", "chat", "--repl", "--model", "tiny", flag, "--max_new_tokens", "8"]
    done = subprocess.run(words, input="你好 😀\n/quit\n", capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "answers        1" in done.stdout
    assert "\x1b" not in done.stdout


def test_both_spellings_of_8bit_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("rankalign.commands.chat.run", lambda args: seen.append(args.load_8bit) or {"ok": 1})
    for words in (["--load-8bit"], ["--load_8bit"], []):
        assert cli.main(["chat", *words]) == 0
    assert seen == [True, True, False]


def test_wrong_settings_are_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--repl", "--base", "tiny"], "talks to one model"),
        (["--template", "vicunha"], "unknown template"),
        (["--top_p", "0"], "top_p"),
    ):
        assert cli.main(["chat", "--model", "nowhere/at-all", *words]) == 1
        assert reason in capsys.readouterr().err

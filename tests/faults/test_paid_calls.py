"""What was paid for is paid for once: over refusals, kills, changed inputs, and calls that failed for good."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import SampleConfig, ScoreConfig, build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError
from rankalign.stages import generation
from rankalign.stages.generation import sample, score
from rankalign.storage import manifest
from rankalign.storage.journal import Journal, peek
from tests.faults.children import finish, killed, start
from tests.faults.openai_helpers import hurry
from tests.faults.server import FaultServer
from tests.faults.test_kill import grades, judging


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def answered(count: int) -> list[CandidateSet]:
    return [CandidateSet(f"p{i}", f"Say {i}", [Response(f"{word} {i}", word) for word in "abc"]) for i in range(count)]


def letters(request: dict[str, Any]) -> str:
    """A judge of pairs that sometimes has to be asked twice."""
    told = json.dumps(request["messages"])
    return "Hm." if len(request["messages"]) == 2 and len(told) % 5 == 0 else "[[A]]"


def orders(request: dict[str, Any]) -> str:
    told = json.dumps(request["messages"])
    return "Hm." if len(request["messages"]) == 2 and len(told) % 3 == 0 else "Verdict: 2 > 1 = 3"


JUDGES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], str]]] = {
    "pointwise": ({}, grades),
    "pairwise": ({"mode": "pairwise"}, letters),
    "listwise": ({"mode": "listwise", "rounds": 2}, orders),
}


def scoring(folder: Path, url: str, output: str, concurrency: int = 3, **more: Any) -> ScoreConfig:
    policy = {"engine": "openai", "model": "m", "base_url": url, "concurrency": concurrency}
    scorer = {"name": "j", "kind": "judge", "policy": policy, **more}
    files = {"input": str(folder / "in.jsonl"), "output": str(folder / output)}
    return build(ScoreConfig, {**files, "scorers": [scorer]}, "test")


@pytest.mark.parametrize("mode", JUDGES)
def test_a_judge_that_is_refused_midway_pays_for_nothing_twice(mode: str, tmp_path: Path) -> None:
    options, answer = JUDGES[mode]
    write(tmp_path / "in.jsonl", answered(10))
    with FaultServer(answer) as server:
        score(scoring(tmp_path, server.url, "whole.jsonl", **options))
        needed = len(server.requests)
    refused = needed * 2 // 3  # for most of these, among the requests to write a verdict again
    with FaultServer(answer, script=[*[None] * refused, "400"], delay=0.003) as server:
        config = scoring(tmp_path, server.url, "out.jsonl", **options)
        with pytest.raises(InputError) as caught:
            score(config)
        paid = len(server.requests) - 1
        assert int(re.search(r"(\d+) answers are safe", str(caught.value))[1]) == paid  # type: ignore[index]
        assert sum(key[0] == "call" for key in peek(tmp_path / "out.jsonl.journal")) == paid
        score(config)
        assert len(server.requests) == needed + 1
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_kills_repeat_what_was_on_its_way_and_no_more(tmp_path: Path, seed: int) -> None:
    print("RANKALIGN_SEED =", seed)
    rng, kills = random.Random(seed), 2
    write(tmp_path / "in.jsonl", answered(8))
    with FaultServer(grades, delay=0.004) as server:
        words = judging(tmp_path, server.url)
        (tmp_path / "judge.yaml").write_text(
            (tmp_path / "judge.yaml").read_text().replace("m, ", "m, concurrency: 1, ")
        )
        made = finish([*words, "--output", f"{tmp_path}/whole.jsonl"], tmp_path / "log")
        assert made == 0, (tmp_path / "log").read_text()
        needed, done = len(server.requests), 0
        server.requests.clear()
        while done < kills:
            process, until = start(words, tmp_path / "log"), len(server.requests) + rng.randint(1, needed // kills - 1)
            while process.is_alive() and len(server.requests) < until:
                time.sleep(0.001)
            done += killed(process)
        assert finish(words, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    asked = Counter(json.dumps(request.body) for request in server.requests)
    assert len(asked) == needed
    assert asked.total() - needed <= kills  # one at a time, so at most one was on its way
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# --- failed calls ------------------------------------------------------------------------------------------------


def sampling(folder: Path, url: str, output: str, prompts: str = "prompts.jsonl", **more: Any) -> SampleConfig:
    policy = {"name": "m", "engine": "openai", "model": "m", "base_url": url, "temperature": 0.5, "n": 2}
    files = {"prompts": str(folder / prompts), "output": str(folder / output)}
    return build(SampleConfig, {**files, "policies": [{**policy, "concurrency": 2}], **more}, "test")


def refusing(word: str) -> Callable[[dict[str, Any]], Any]:
    """A server that has no text for prompts with a word in them."""

    def answer(request: dict[str, Any]) -> Any:
        text = request["messages"][-1]["content"]
        return {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]} if word in text else f"So {text}"

    return answer


def prompts(folder: Path, count: int = 12) -> list[CandidateSet]:
    sets = [CandidateSet(f"p{i}", f"Say {i}!") for i in range(count)]
    write(folder / "prompts.jsonl", sets)
    return sets


def test_failed_calls_are_skipped_counted_listed_and_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts(tmp_path)
    with FaultServer(refusing("nothing")) as server:
        sample(sampling(tmp_path, server.url, "whole.jsonl"))
        needed = len(server.requests)
        server.requests.clear()
        server.answer = refusing(" 7!")
        config = sampling(tmp_path, server.url, "out.jsonl", on_error="skip")
        result = sample(config)
        assert (result["prompts"], result["responses"], result["failed"]) == (12, 22, 2)
        assert [len(record.responses) for record in read(tmp_path / "out.jsonl")] == [1] * 7 + [0] + [1] * 4
        (one, other) = manifest.read(tmp_path / "out.jsonl")["failed"]  # type: ignore[index]
        assert (one["name"], one["id"], one["index"], other["index"], one["tries"]) == ("m", "p7", 0, 1, 1)
        assert "the reply has no text" in one["reason"]
        assert "2 calls failed and were skipped" in capsys.readouterr().err
        asked = len(server.requests)
        assert sample(config) == {"output": str(tmp_path / "out.jsonl"), "already_finished": True, "failed": 2}
        assert len(server.requests) == asked == needed
        again = sampling(tmp_path, server.url, "out.jsonl", on_error="skip", retry_failed=True)
        assert sample(again)["failed"] == 2
        assert manifest.read(tmp_path / "out.jsonl")["failed"][0]["tries"] == 1  # type: ignore[index]
        server.answer = refusing("nothing")
        assert "failed" not in sample(again)
        assert len(server.requests) == needed + 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.journal").exists()


def by_rubric(folder: Path, url: str, output: str, **more: Any) -> ScoreConfig:
    """A judge whose rubrics a model writes."""
    writer = {"engine": "openai", "model": "w", "base_url": url, "concurrency": 3}
    return build(ScoreConfig, {**_plain(scoring(folder, url, output, mode="rubric", writer=writer)), **more}, "test")


def rubric(request: dict[str, Any]) -> str:
    if request["model"] == "w":
        return '["names it", {"criterion": "is short", "weight": 2}]'
    return f"Verdict: C1={len(json.dumps(request)) % 5 + 1}, C2=4"


def test_rubrics_are_paid_for_once(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", answered(8))
    with FaultServer(rubric) as server:
        score(by_rubric(tmp_path, server.url, "whole.jsonl"))
        assert Counter(r.body["model"] for r in server.requests) == {"w": 8, "m": 24}
    for refused in (5, 20):  # among the rubrics, and among the verdicts
        output = f"out-{refused}.jsonl"
        with FaultServer(rubric, script=[*[None] * refused, "400"], delay=0.003) as server:
            with pytest.raises(InputError, match="400"):
                score(by_rubric(tmp_path, server.url, output))
            assert sum(key[0] == "call" for key in peek(tmp_path / f"{output}.journal")) == len(server.requests) - 1
            score(by_rubric(tmp_path, server.url, output))
            assert len(server.requests) == 32 + 1
        assert (tmp_path / output).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_rubric_that_a_server_refuses_leaves_a_hole_and_is_asked_for_again(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", answered(4))
    missing = {"choices": [{"message": {"tool_calls": []}, "finish_reason": "stop"}]}

    def answer(request: dict[str, Any]) -> Any:
        return missing if request["model"] == "w" and "Say 2" in json.dumps(request) else rubric(request)

    with FaultServer(answer) as server:
        result = score(by_rubric(tmp_path, server.url, "out.jsonl", on_error="skip"))
        asked = len(server.requests)
        assert (result["failed"], asked) == (1, 4 + 9)
        hole = list(read(tmp_path / "out.jsonl"))[2]
        assert (hole.scores("j"), "rubric" in hole.meta) == ([None] * 3, False)
        assert hole.meta["judge:j"]["written"]["failed"]["tries"] == 1
        server.answer = rubric
        score(by_rubric(tmp_path, server.url, "out.jsonl", on_error="skip", retry_failed=True))
        assert len(server.requests) == asked + 1 + 3
    assert None not in list(read(tmp_path / "out.jsonl"))[2].scores("j")


def test_a_judges_failed_calls_leave_a_hole_that_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", answered(5))

    def answer(request: dict[str, Any]) -> Any:
        missing = {"choices": [{"message": {"tool_calls": []}, "finish_reason": "stop"}]}
        return missing if "b 3" in request["messages"][-1]["content"] else grades(request)

    with FaultServer(answer) as server:
        config = scoring(tmp_path, server.url, "out.jsonl")
        with pytest.raises(InputError, match=r"prompt 'p3/j/1': the reply has no text.*--on_error skip"):
            score(config)
        result = score(build(ScoreConfig, {**_plain(config), "on_error": "skip"}, "test"))
    assert result["failed"] == result["judge:j"]["failed"] == 1
    record = list(read(tmp_path / "out.jsonl"))[3]
    assert [response.scores["j"] is None for response in record.responses].count(True) >= 1
    assert record.meta["judge:j"]["calls"][1]["failed"]["tries"] == 1


def _plain(config: ScoreConfig) -> dict[str, Any]:
    scorers = [{"name": each.name, "kind": each.kind, **each.options} for each in config.scorers]
    return {"input": config.input, "output": config.output, "scorers": scorers}


def test_where_all_fails_it_is_no_prompts_fault(tmp_path: Path) -> None:
    prompts(tmp_path)
    with FaultServer(refusing("Say")) as server, pytest.raises(InputError, match="all 24 calls failed"):
        sample(sampling(tmp_path, server.url, "out.jsonl", on_error="skip"))
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match="on_error: 'no' is none of stop, skip"):
        sample(sampling(tmp_path, "http://127.0.0.1:9/v1", "out.jsonl", on_error="no"))


def test_a_changed_input_keeps_what_was_paid_for(tmp_path: Path) -> None:
    """The report: one refused prompt of 40 made 32 paid answers useless."""
    sets = prompts(tmp_path)
    with FaultServer(refusing(" 7!")) as server:
        config = sampling(tmp_path, server.url, "out.jsonl")
        with pytest.raises(InputError, match="prompt 'p7'"):
            sample(config)
        with pytest.raises(InputError, match="prompt 'p7'"):  # asked again, the others are not
            sample(config)
        write(tmp_path / "prompts.jsonl", [r for r in sets if r.id != "p7"] + [CandidateSet("new", "Say more!")])
        sample(config)
        texts = Counter(json.dumps(r.body["messages"]) for r in server.requests if "nothing" not in str(r.body))
        answers = [record.responses for record in read(tmp_path / "out.jsonl")]
    assert len(answers) == 12
    repeated = {text: count for text, count in texts.items() if count > 2 and " 7!" not in text}
    assert set(repeated.values()) <= {4}  # the two probes of the first prompt
    assert len(repeated) <= 1
    with FaultServer(refusing("no such")) as server:
        sample(sampling(tmp_path, server.url, "whole.jsonl"))
    assert [record.responses for record in read(tmp_path / "whole.jsonl")] == answers


def test_other_settings_are_still_refused(tmp_path: Path) -> None:
    prompts(tmp_path)
    with FaultServer(refusing(" 7!")) as server:
        with pytest.raises(InputError, match="prompt 'p7'"):
            sample(sampling(tmp_path, server.url, "out.jsonl"))
        with pytest.raises(InputError, match=r"begun with other settings \(policies\[0\].sampling.seed"):
            sample(sampling(tmp_path, server.url, "out.jsonl", seed=4))


def test_a_journal_of_version_0_1_goes_on_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def length(samples):\n    return [float(len(s)) for s in samples]\n")
    write(tmp_path / "in.jsonl", answered(6))
    monkeypatch.setattr(generation, "SCORE_BATCH", 2)
    entry = {"name": "length", "kind": "function", "function": f"{scorer}:length"}
    files = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    config = build(ScoreConfig, {**files, "scorers": [entry]}, "test")
    score(config)
    settings = manifest.read(tmp_path / "out.jsonl")["settings"]  # type: ignore[index]

    def begin(**more: Any) -> None:
        for name in ("out.jsonl", "out.jsonl.manifest.json", "out.jsonl.journal"):
            (tmp_path / name).unlink(missing_ok=True)
        with Journal(tmp_path / "out.jsonl.journal", {**settings, **more}) as journal:
            journal.append([(("length", f"p{i}"), [1.0, 2.0, 3.0]) for i in range(2)])

    begin()
    score(config)
    first, *_, last = [[r.scores["length"] for r in record.responses] for record in read(tmp_path / "out.jsonl")]
    assert first == [1, 2, 3]  # as the old journal has it
    assert last == [len("Say 5a 5")] * 3
    begin(input="another file")
    with pytest.raises(InputError, match=r"begun with other settings \(input: "):
        score(config)

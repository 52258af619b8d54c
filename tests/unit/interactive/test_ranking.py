"""Ranking by hand: what the events lead to, what the server refuses, what a kill leaves."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError
from rankalign.evaluation.raters.concordance import evaluate_raters
from rankalign.interactive.pages.label import LARGEST_BODY, LabelServer
from rankalign.interactive.ranking import Session, Stale, journal_path, labels_folder, level_scores, shown_order


def make_sets(count: int = 3, width: int = 4) -> list[CandidateSet]:
    def answer(k: int, i: int) -> Response:
        return Response(f"text {k}.{i}", f"model-{i}", scores={"rm": i / 8})

    return [CandidateSet(f"set-{k}", f"Question {k}?", [answer(k, i) for i in range(width)]) for k in range(count)]


def rank(session: Session, levels: list[list[int]], at: int | None = None) -> dict[str, Any]:
    """Commit a ranking given as indices into the record, as a page does: through the places that it was shown."""
    view = session.view(at)
    order = shown_order(session.queue[view["at"]], session.annotator, session.seed)
    shown = [[order.index(index) for index in level] for level in levels]
    return session.commit(view["turn"] + 1, view["at"], shown)


# --- logic -------------------------------------------------------------------------------------------------------


def test_scores_count_down_from_the_number_of_levels() -> None:
    assert level_scores([[2], [0, 3]], 5) == [1.0, None, 2.0, 1.0, None]
    assert level_scores([], 2) == [None, None]


def test_the_output_has_the_scores_beside_the_old_ones(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Session(make_sets(), output, "ann") as session:
        rank(session, [[3], [0, 1], [2]])
        rank(session, [])
        assert not output.exists()
        end = rank(session, [[1], [2]])
    assert (end["at"], end["ranked"], end["skipped"], end["left"]) == (None, 2, 1, 0)
    found = list(read(output))
    assert [record.scores("ann") for record in found] == [[2.0, 2.0, 1.0, 3.0], [None] * 4, [None, 2.0, 1.0, None]]
    assert [record.scores("rm") for record in found] == [[0.0, 0.125, 0.25, 0.375]] * 3
    for record in found:
        for response in record.responses:
            response.scores.pop("ann", None)
    assert found == make_sets()


def test_the_page_learns_nothing_but_texts(tmp_path: Path) -> None:
    sets = make_sets()
    sets[0].responses[1].meta = {"secret": 1}
    with Session(sets, tmp_path / "bob.jsonl", "bob") as session:
        rank(session, [[0], [1], [2], [3]])
    with Session(sets, tmp_path / "bob.jsonl", "ann", overlap=True) as session:
        view = session.view()
    counts = {"total", "ranked", "skipped", "left"}
    assert (
        set(view)
        == {"annotator", "turn", "can_undo", "at", "status", "prompt", "answers", "levels", "columns"} | counts
    )
    assert (view["status"], view["levels"], view["prompt"]) == ("open", [], [{"role": "", "content": "Question 0?"}])
    assert sorted(view["answers"]) == [f"text 0.{i}" for i in range(4)]


def test_orders_differ_by_annotator_seed_and_record_and_stay() -> None:
    record, other = make_sets(2, 9)
    first = shown_order(record, "ann", 0)
    assert sorted(first) == list(range(9))
    assert first == shown_order(record, "ann", 0)
    others = [shown_order(record, "bob", 0), shown_order(record, "ann", 1), shown_order(other, "ann", 0)]
    assert first not in others


def test_each_place_in_the_order_is_as_likely_as_any_other() -> None:
    counts = [[0] * 3 for _ in range(3)]
    for k in range(3000):
        for place, index in enumerate(shown_order(make_sets(1, 3)[0], "ann", k)):
            counts[place][index] += 1
    assert all(abs(n - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for row in counts for n in row)


def test_undo_goes_back_across_sets_and_the_last_commit_wins(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Session(make_sets(2), output, "ann") as session:
        rank(session, [[0], [1]])
        rank(session, [[2], [3]], at=0)  # revised
        assert session.rankings.done["set-0"] == [[2], [3]]
        view = session.undo(session.view()["turn"] + 1)
        assert (view["at"], view["status"]) == (0, "ranked")
        assert session.rankings.done["set-0"] == [[0], [1]]  # the revision is a draft again, the first ranking stands
        assert session.rankings.drafts["set-0"] == [[2], [3]]
        view = session.undo(view["turn"] + 1)
        assert view["status"] == "open"
        assert "set-0" not in session.rankings.done
        with pytest.raises(InputError, match="nothing to undo"):
            session.undo(99)
        rank(session, [[3], [0]], at=0)
        rank(session, [[1], [0]])
    assert [record.scores("ann") for record in read(output)] == [[1.0, None, None, 2.0], [1.0, 2.0, None, None]]
    lines = journal_path(output, "ann").read_bytes().splitlines()
    assert [json.loads(line[9:])[1].get("do") for line in lines[1:]] == [
        "commit",
        "commit",
        "undo",
        "undo",
        "commit",
        "commit",
    ]


def test_drafts_and_undo_survive_a_restart_under_another_seed(tmp_path: Path) -> None:
    output, sets = tmp_path / "out.jsonl", make_sets(2, 5)
    with Session(sets, output, "ann", seed=0) as session:
        rank(session, [[4], [0]])
        order = shown_order(session.queue[1], "ann", 0)
        session.draft(2, 1, [[order.index(3)], [order.index(2), order.index(1)]])
    with Session(sets, output, "ann", seed=7) as session:
        view = session.view()
        texts = [[view["answers"][place] for place in level] for level in view["levels"]]
        assert (view["at"], texts) == (1, [["text 1.3"], ["text 1.2", "text 1.1"]])  # ties in the order they were put
        view = session.undo(view["turn"] + 1)
        assert [[view["answers"][place] for place in level] for level in view["levels"]] == [["text 0.4"], ["text 0.0"]]


def test_columns_are_remembered_for_each_annotator(tmp_path: Path) -> None:
    output, sets = tmp_path / "out.jsonl", make_sets()
    with Session(sets, output, "ann/../x.y") as session:
        assert session.view()["columns"] == 0
        assert session.choose_columns(1) == {"columns": 1}
        with pytest.raises(InputError, match="give 1, or 0"):
            session.choose_columns(2)
    with Session(sets, output, "ann/../x.y") as session:
        assert session.view()["columns"] == 1
    with Session(sets, output, "bob") as session:
        assert session.view()["columns"] == 0
        assert session.choose_columns(0) == {"columns": 0}
    assert {path.parent for path in tmp_path.rglob("*.columns")} == {tmp_path / "out.jsonl.labels"}


def test_a_page_that_is_behind_overwrites_nothing(tmp_path: Path) -> None:
    with Session(make_sets(), tmp_path / "out.jsonl", "ann") as session:
        session.commit(1, 0, [[0], [1]])
        for stale in (0, 1):
            with pytest.raises(Stale):
                session.draft(stale, 0, [[2]])
        assert session.draft(5, 1, [[2]]) == {"turn": 2}  # ahead: a draft sent on leaving may overtake another


@pytest.mark.parametrize("levels", [[[0], [0]], [[0], []], [[0], [4]], [[0], [-1]], [[0]]])
def test_rankings_that_are_none_are_refused(tmp_path: Path, levels: list[list[int]]) -> None:
    with Session(make_sets(), tmp_path / "out.jsonl", "ann") as session:
        with pytest.raises(InputError):
            session.commit(1, 0, levels)
        assert session.view()["turn"] == 0


@pytest.mark.parametrize("name", ["", " ann", "a\nb", "x" * 65, "rm"])
def test_names_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        Session(make_sets(), tmp_path / "out.jsonl", name)


def test_any_other_name_makes_a_file_in_the_folder(tmp_path: Path) -> None:
    for name in ("../../x", "Zoë", "a/b"):
        with Session(make_sets(), tmp_path / "out.jsonl", name) as session:
            rank(session, [[0], [1]])
            assert name in session.write()["annotators"]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.labels"}


def test_a_file_of_another_origin_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", make_sets())
    before = (tmp_path / "in.jsonl").read_bytes()
    with pytest.raises(InputError, match="name another output"):
        Session(make_sets(), tmp_path / "in.jsonl", "ann")
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_an_annotator_works_in_one_process_and_others_beside(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Session(make_sets(), output, "ann") as ann:
        with pytest.raises(InputError, match="another process"):
            Session(make_sets(), output, "ann")
        rank(ann, [[0], [1]])
        with Session(make_sets(), output, "bob", overlap=True) as bob:
            assert [record.id for record in bob.queue] == ["set-0", "set-1", "set-2"]
            rank(bob, [[1], [0]])
            assert bob.write()["annotators"] == ["ann", "bob"]
        with Session(make_sets(), output, "cy") as cy:
            assert [record.id for record in cy.queue] == ["set-1", "set-2", "set-0"]
    assert [r.scores for r in next(iter(read(output))).responses[:2]] == [
        {"rm": 0.0, "ann": 2.0, "bob": 1.0}, {"rm": 0.125, "ann": 1.0, "bob": 2.0},
    ]  # fmt: skip


def test_work_on_texts_that_changed_is_set_aside_and_counted(tmp_path: Path) -> None:
    output, sets = tmp_path / "out.jsonl", make_sets()
    with Session(sets, output, "ann") as session:
        for _ in range(3):
            rank(session, [[0], [1]])
    sets[1].responses[0].text = "another"
    with Session([*sets[:2], CandidateSet("alone", "?", [Response("x")])], output, "ann") as session:
        facts = session.write()
    assert (facts["left"], facts["ranked"], facts["set_aside"], facts["single"]) == (1, 1, 2, 1)
    assert [record.scores("ann")[:2] for record in read(output)] == [[2.0, 1.0], [None, None], [None]]


# --- agreement ---------------------------------------------------------------------------------------------------


def scored(*orders: dict[str, list[float | None]]) -> list[CandidateSet]:
    sets = []
    for k, order in enumerate(orders):
        columns = [dict(zip(order, column, strict=True)) for column in zip(*order.values(), strict=True)]
        sets.append(CandidateSet(str(k), "?", [Response("x", scores=scores) for scores in columns]))
    return sets


def test_agreement_by_hand() -> None:
    # First prompt: 5 of 6 pairs agree, tau 4/6. Second: a has a tie, so tau-b = 2 / sqrt(2 * 3). Third: all tied for a.
    sets = scored(
        {"a": [4, 3, 2, 1], "b": [40, 30, 10, 20]},
        {"a": [2, 1, 1, None], "b": [3, 2, 1, 9]},
        {"a": [1, 1], "b": [1, 2]},
    )
    found = evaluate_raters(sets, ["a", "b"])
    assert found.metrics["tau_b"] == pytest.approx((4 / 6 + 2 / 6**0.5) / 2)
    assert found.metrics["undefined"] == 1
    assert found.n == 2
    # Alpha from its definition, over the places of each rater: 1 - observed / expected disagreement.
    units = [(1, 1), (2 / 3, 2 / 3), (1 / 3, 0), (0, 1 / 3), (1, 2 / 3), (0.25, 1 / 3), (0.25, 0), (0.5, 0), (0.5, 1)]
    pool = [value for unit in units for value in unit]
    observed = sum((x - y) ** 2 for x, y in units) / len(units)
    pairs = list(combinations(pool, 2))
    expected = sum((x - y) ** 2 for x, y in pairs) / len(pairs)
    assert found.metrics["krippendorff_alpha"] == pytest.approx(1 - observed / expected)


def test_agreement_of_three_stands_by_pair_too() -> None:
    sets = scored({"a": [3, 2, 1], "b": [30, 20, 10], "c": [1, 2, 3]})
    found = evaluate_raters(sets, ["a", "b", "c"])
    assert found.metrics["tau_b (a, b)"] == 1
    assert found.metrics["tau_b (a, c)"] == found.metrics["tau_b (b, c)"] == -1
    assert found.metrics["tau_b"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("raters", [["a"], ["a", "a"], ["a", "nobody"], ["a", "late"]])
def test_agreement_needs_two_who_ranked_the_same(raters: list[str]) -> None:
    sets = scored({"a": [1, 2], "late": [None, None]}, {"a": [None, None], "late": [1, 2]})
    with pytest.raises(InputError):
        evaluate_raters(sets, raters)


def test_what_comes_out_goes_into_lint_agreement_and_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    for name, levels in (("ann", [[3], [0, 1], [2]]), ("bob", [[3], [1], [0], [2]])):
        with Session(make_sets(), output, name) as session:
            for _ in range(3):
                end = rank(session, levels)
    assert end["agreement"]["metrics"]["tau_b"] == pytest.approx(5 / 30**0.5)
    assert main(["lint", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 3
    assert main(["eval", "agreement", str(output), "--raters", "ann", "bob", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metrics"], found["n"]) == (end["agreement"]["metrics"], 3)
    assert main(["eval", "agreement", str(output), "--judge", "bob", "--truth", "ann", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"] == 1
    words = ["--model", "tiny", "--data", str(output), "--judge", "ann", "--max_steps", "1", "--use_cpu"]
    assert main(["train", *words, "--output_dir", str(tmp_path / "run"), "--json"]) == 0


# --- the server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    with Session(make_sets(), tmp_path / "out.jsonl", "ann") as session, LabelServer(session) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    server: LabelServer, method: str, path: str, body: bytes | None = None, **headers: str | None
) -> tuple[int, dict[str, str], bytes]:
    """One request as the page makes it, but for ``headers``; None leaves one out."""
    sent: dict[str, str | None] = {"Host": f"127.0.0.1:{server.server_port}", "Authorization": f"Bearer {server.token}"}
    if body is not None:
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


COMMIT = json.dumps({"turn": 1, "at": 0, "levels": [[0], [1]]}).encode()


def test_it_listens_on_loopback_alone(server: LabelServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert re.fullmatch(rf"http://127\.0\.0\.1:{server.server_port}/#[\w-]{{43}}", server.url)


def test_the_page_holds_no_data_and_may_load_nothing_else(server: LabelServer) -> None:
    for path in server.files:
        status, headers, body = ask(server, "GET", path, Authorization=None)
        assert status == 200
        assert b"text 0" not in body
        assert server.token.encode() not in body
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"http://" not in body
        assert b"https://" not in body


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": None},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer " + "x" * 43},
        {"Authorization": "Basic TOKEN"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": None},
        {"Host": "127.0.0.1.evil.example:PORT"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:PORT"},
        {"Origin": "null"},
    ],
)
def test_strangers_are_refused(server: LabelServer, headers: dict[str, str | None]) -> None:
    port = str(server.server_port)
    sent = {
        name: value and value.replace("PORT", port).replace("TOKEN", server.token) for name, value in headers.items()
    }
    for method, path, body in (
        ("GET", "/api/view", None),
        ("POST", "/api/commit", COMMIT),
        ("POST", "/api/finish", b"{}"),
    ):
        status, _, answer = ask(server, method, path, body, **sent)
        assert status == 403
        assert b"text 0" not in answer
    assert server.session.view()["turn"] == 0


def test_the_own_page_is_served_under_both_names(server: LabelServer) -> None:
    for name in ("127.0.0.1", "localhost"):
        host = f"{name}:{server.server_port}"
        status, _, answer = ask(server, "GET", "/api/view", Host=host, Origin=f"http://{host}")
        assert (status, json.loads(answer)["at"]) == (200, 0)


@pytest.mark.parametrize(
    ("status", "path", "body", "headers"),
    [
        (404, "/api/other", b"{}", {}),
        (404, "/commit", COMMIT, {}),
        (411, "/api/commit", COMMIT, {"Content_Length": None}),
        (411, "/api/commit", COMMIT, {"Content_Length": "-1"}),
        (411, "/api/commit", COMMIT, {"Transfer_Encoding": "chunked"}),
        (413, "/api/commit", b"", {"Content_Length": str(LARGEST_BODY + 1)}),
        (413, "/api/commit", b"", {"Content_Length": "9" * 30}),
        (415, "/api/commit", COMMIT, {"Content_Type": "text/plain"}),
        (400, "/api/commit", b"{", {}),
        (400, "/api/commit", b"\xff", {}),
        (400, "/api/commit", b"[1]", {}),
        (400, "/api/commit", b'{"turn": true, "at": 0, "levels": []}', {}),
        (400, "/api/commit", b'{"turn": 1, "at": 0, "levels": [[0.5]]}', {}),
        (400, "/api/commit", b'{"turn": 1, "at": 0, "levels": {}}', {}),
        (422, "/api/columns", b'{"columns": 7}', {}),
        (400, "/api/columns", b'{"columns": "1"}', {}),
        (409, "/api/commit", b'{"turn": 0, "at": 0, "levels": []}', {}),
        (422, "/api/commit", b'{"turn": 1, "at": 3, "levels": []}', {}),
        (422, "/api/commit", b'{"turn": 1, "at": -1, "levels": []}', {}),
        (422, "/api/undo", b'{"turn": 1}', {}),
    ],
)
def test_bad_requests_change_nothing(
    server: LabelServer, status: int, path: str, body: bytes, headers: dict[str, str | None]
) -> None:
    found, _, answer = ask(server, "POST", path, body, **headers)
    assert found == status
    assert json.loads(answer)["error"]
    assert server.session.view()["turn"] == 0


def test_other_paths_and_methods_are_refused(server: LabelServer) -> None:
    for path in ("/label.py", "/../label.py", "/%2e%2e/label.py", "/out.jsonl", "/api/view?at=x", "/api/view?at=9"):
        assert ask(server, "GET", path)[0] in (400, 404, 422)
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert ask(server, method, "/api/view")[0] == 501


def test_a_full_disk_is_said_and_nothing_is_lost(server: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, _, answer = ask(server, "POST", "/api/commit", COMMIT)
    assert (status, "no space left" in json.loads(answer)["error"]) == (422, True)
    assert server.session.view()["turn"] == 0
    assert ask(server, "POST", "/api/commit", COMMIT)[0] == 200


def test_a_taken_port_is_an_error_in_words(server: LabelServer) -> None:
    for port in (server.server_port, 99999):
        with pytest.raises(InputError, match="--port"):
            LabelServer(server.session, port)


# --- the command -------------------------------------------------------------------------------------------------


class Command:
    """`rankalign label` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        files = [str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl"), "--annotator", "ann", *words]
        line = [sys.executable, "-m", "rankalign", "label", *files]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.first = self.process.stderr.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)/#(\S+)", self.first)
        assert found, self.first
        self.server_port, self.token = int(found[1]), found[2]

    def ask(self, action: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        method = "GET" if body is None else "POST"
        status, _, answer = ask(self, method, f"/api/{action}", None if body is None else json.dumps(body).encode())  # type: ignore[arg-type]
        assert status == 200, answer
        return json.loads(answer)

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def test_a_kill_between_commits_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", make_sets(4))
    command = Command(tmp_path)
    for at in (0, 1):
        turn = command.ask("view")["turn"] + 1
        command.ask("commit", {"turn": turn, "at": at, "levels": [[0], [1, 2]]})
    command.ask("draft", {"turn": 3, "at": 2, "levels": [[3]]})
    command.end(signal.SIGKILL)
    journal = journal_path(tmp_path / "out.jsonl", "ann")
    whole = journal.read_bytes()
    assert whole.count(b"\n") == 4
    journal.write_bytes(whole + whole.splitlines(keepends=True)[-1][:25])  # torn in the middle of a line
    command = Command(tmp_path)
    assert command.first.startswith("2 of 4 sets to rank; open http://127.0.0.1:")
    view = command.ask("view")
    assert (view["at"], view["turn"], view["levels"], view["ranked"]) == (2, 3, [[3]], 2)
    code, out, err = command.end(signal.SIGINT)
    assert (code, out) == (130, "")
    assert "interrupted; 2 ranked, 0 skipped, 2 to go; " in err
    assert "the same command goes on" in err
    for record in list(read(tmp_path / "out.jsonl"))[:2]:
        order = shown_order(record, "ann", 0)
        assert [record.scores("ann")[index] for index in order] == [2.0, 1.0, 1.0, None]
    assert journal.read_bytes() == whole


def test_the_finish_button_ends_the_command_with_its_result(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", make_sets(1))
    with Session(make_sets(1), tmp_path / "out.jsonl", "bob") as bob:
        rank(bob, [[0], [1], [2], [3]])
    command = Command(tmp_path, "--json")
    command.ask("commit", {"turn": 1, "at": 0, "levels": [[0], [1], [2], [3]]})
    command.ask("finish", {})
    out, _ = command.process.communicate(timeout=60)
    found = json.loads(out)
    assert command.process.returncode == 0
    assert {name: found[name] for name in ("total", "ranked", "left", "annotators")} == {
        "total": 1, "ranked": 1, "left": 0, "annotators": ["ann", "bob"],
    }  # fmt: skip
    assert found["agreement"]["n"] == 1
    assert labels_folder(tmp_path / "out.jsonl").is_dir()
    assert next(iter(read(tmp_path / "out.jsonl"))).scores("bob") == [4.0, 3.0, 2.0, 1.0]

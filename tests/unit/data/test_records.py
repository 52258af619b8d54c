"""Records at the door: every malformed line has a name, every well-formed one survives to the byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankalign.data import records
from rankalign.data.convert import convert
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Response, judges, parse, read, to_dict, write
from rankalign.errors import InputError, RecordError
from rankalign.storage.files import atomic_writer, read_lines, read_text, sha256_file, write_text
from rankalign.storage.jsonl import read_rows

GOOD = '{"id": "a", "prompt": "Why?", "responses": [{"text": "Because."}]}'
RECORD = {"id": "a", "prompt": "Why?"}


def put(folder: Path, content: str | bytes, name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def ids(path: Path) -> list[str]:
    return [record.id for record in read(path)]


def error_of(path: Path) -> RecordError:
    with pytest.raises(RecordError) as caught:
        list(read(path))
    return caught.value


# --- what is fine ------------------------------------------------------------------------------------------------


def line(ident: str, text: str = "x") -> str:
    return json.dumps({"id": ident, "prompt": "p", "responses": [{"text": text}]}, ensure_ascii=False)


@pytest.mark.parametrize(
    "content",
    [
        f"{line('a')}\n{line('b')}\n",
        f"{line('a')}\n{line('b')}",
        f"\ufeff{line('a')}\n{line('b')}\n",
        f"{line('a')}\r\n{line('b')}\r\n",
        f"\n\n{line('a')}\n   \n{line('b')}\n\n",
        f"[{line('a')},{line('b')}]",
        f"\ufeff \n[\n {line('a')},\r\n {line('b')}\n]\n",
        gzip.compress(f"{line('a')}\n{line('b')}\n".encode()),
        gzip.compress(f"{line('a')}\n".encode()) + gzip.compress(f"{line('b')}\n".encode()),
    ],
    ids=["plain", "no-last-newline", "bom", "crlf", "blank-lines", "list", "pretty-list", "gzip", "gzip-members"],
)
def test_two_records_are_read(tmp_path: Path, content: str | bytes) -> None:
    assert ids(put(tmp_path, content)) == ["a", "b"]


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\u00a0", "\U0001f600"])
def test_separators_inside_text_do_not_cut_a_line(tmp_path: Path, char: str) -> None:
    text = f"before{char}after"
    path = put(tmp_path, json.dumps({"id": "a", "prompt": text}, ensure_ascii=char < " ") + "\n" + line("b"))
    assert [record.prompt for record in read(path)] == [text, "p"]


def test_gzip_is_told_by_its_magic_not_its_name(tmp_path: Path) -> None:
    assert ids(put(tmp_path, gzip.compress(line("a").encode()), "in.jsonl")) == ["a"]
    assert ids(put(tmp_path, line("a"), "in.jsonl.gz")) == ["a"]


def test_an_empty_list_has_no_records(tmp_path: Path) -> None:
    assert ids(put(tmp_path, "[]\n")) == []


def test_defaults_of_a_record() -> None:
    record = parse({"id": "a", "prompt": "p", "responses": [{"text": "t"}]})
    assert record == CandidateSet("a", "p", [Response("t", "unknown", True, 1, {}, {}, None, {})], {})


@pytest.mark.parametrize("key", ["responses", "meta"])
def test_null_is_an_absent_key_of_a_record(key: str) -> None:
    assert parse({"id": "a", "prompt": "p", key: None}) == parse({"id": "a", "prompt": "p"})


@pytest.mark.parametrize("key", ["policy", "finished", "count", "sampling", "scores", "tokens", "meta"])
def test_null_is_an_absent_key_of_a_response(key: str) -> None:
    row = {"id": "a", "prompt": "p", "responses": [{"text": "x", key: None}]}
    assert parse(row).responses == [Response("x")]


def test_a_missing_score_stays_missing() -> None:
    row = {"id": "a", "prompt": "p", "responses": [{"text": "t", "scores": {"rm": None}}, {"text": "u"}]}
    record = parse(row)
    assert record.scores("rm") == [None, None]
    assert to_dict(record)["responses"][0]["scores"] == {"rm": None}
    assert judges([record]) == []


def test_judges_in_order_of_first_sight() -> None:
    responses = [Response("a", scores={"z": None, "b": 1.0}), Response("b", scores={"z": 2.0, "b": 0})]
    assert judges([CandidateSet("1", "p", responses)]) == ["b", "z"]


def test_integers_and_floats_keep_their_kind(tmp_path: Path) -> None:
    text = '{"id": "a", "prompt": "p", "responses": [{"text": "t", "scores": {"x": 2, "y": 2.5, "z": -1e-3}}]}'
    scores = next(read(put(tmp_path, text))).responses[0].scores
    assert [(type(v), v) for v in scores.values()] == [(int, 2), (float, 2.5), (float, -0.001)]


# --- what is not, with line, field and reason --------------------------------------------------------------------


def response(**fields: Any) -> str:
    return json.dumps(RECORD | {"responses": [{"text": "ok"}, {"text": "t"} | fields]})


BAD = [
    ("not json", "", "not valid JSON"),
    ('{"id": "a", "prompt": "p"', "", "not valid JSON"),
    (GOOD + GOOD, "", "Extra data"),
    ('"text"', "", "expected a JSON object, found a string"),
    ("3", "", "expected a JSON object, found a number"),
    ("null", "", "expected a JSON object, found null"),
    ('{"prompt": "p"}', "id", "is missing (found: prompt)"),
    ('{"id": 3, "prompt": "p"}', "id", "expected a string, found a number"),
    ('{"id": " ", "prompt": "p"}', "id", "is empty"),
    ('{"id": "a"}', "prompt", "is missing"),
    ('{"id": "a", "prompt": ""}', "prompt", "is empty"),
    ('{"id": "a", "prompt": " \\n"}', "prompt", "is empty"),
    ('{"id": "a", "prompt": []}', "prompt", "is empty"),
    ('{"id": "a", "prompt": {}}', "prompt", "expected a string or a list of messages, found an object"),
    ('{"id": "a", "prompt": ["p"]}', "prompt[0]", "expected an object, found a string"),
    ('{"id": "a", "prompt": [{"content": "p"}]}', "prompt[0].role", "is missing (found: content)"),
    ('{"id": "a", "prompt": [{"role": "user"}]}', "prompt[0].content", "is missing (found: role)"),
    ('{"id": "a", "prompt": [{"role": "human", "content": "p"}]}', "prompt[0].role", "unknown role 'human'"),
    ('{"id": "a", "prompt": [{"role": "user", "content": null}]}', "prompt[0].content", "found null"),
    ('{"id": "a", "prompt": [{"role": "user", "content": " "}]}', "prompt", "is empty"),
    ('{"id": "a", "prompt": "p", "respones": []}', "respones", "unknown key"),
    ('{"id": "a", "prompt": "p", "responses": {}}', "responses", "expected a list, found an object"),
    ('{"id": "a", "prompt": "p", "responses": ["t"]}', "responses[0]", "expected an object, found a string"),
    ('{"id": "a", "prompt": "p", "responses": [{}]}', "responses[0].text", "is missing"),
    ('{"id": "a", "prompt": "p", "meta": []}', "meta", "expected an object, found a list"),
    (response(text=None), "responses[1].text", "expected a string, found null"),
    (response(text=True), "responses[1].text", "expected a string, found a boolean"),
    (response(score=1), "responses[1].score", "unknown key"),
    (response(policy=""), "responses[1].policy", "is empty"),
    (response(finished=1), "responses[1].finished", "expected a boolean, found a number"),
    (response(count=0), "responses[1].count", "at least 1"),
    (response(count=True), "responses[1].count", "at least 1"),
    (response(count=1.5), "responses[1].count", "at least 1"),
    (response(scores=[1]), "responses[1].scores", "expected an object, found a list"),
    (response(scores={"rm": True}), "responses[1].scores.rm", "expected a number, found a boolean"),
    (response(scores={"rm": "1"}), "responses[1].scores.rm", "expected a number, found a string"),
    (response(scores={"rm": 10**400}), "responses[1].scores.rm", "not a finite number"),
    (response(tokens={"ids": [1]}), "responses[1].tokens.tokenizer", "expected a string, found null"),
    (response(tokens={"tokenizer": "t"}), "responses[1].tokens.ids", "expected a list, found null"),
    (response(tokens={"tokenizer": "t", "ids": [1, -1]}), "responses[1].tokens.ids[1]", "expected a token id"),
    (response(tokens={"tokenizer": "t", "ids": [True]}), "responses[1].tokens.ids[0]", "expected a token id"),
    (response(scores={"rm": float("nan")}), "", "NaN is not a finite number"),
    (response(scores={"rm": float("inf")}), "", "Infinity is not a finite number"),
    (response(scores={"rm": -float("inf")}), "", "-Infinity is not a finite number"),
    (response(scores={"rm": 1}).replace('"rm": 1', '"rm": 1e999'), "", "1e999 is not a finite number"),
    (response(scores={"rm": 1}).replace('"rm": 1', '"rm": -1e999'), "", "-1e999 is not a finite number"),
    (response(scores={"rm": 1}).replace('"rm": 1', '"rm": ' + "9" * 5000), "", "integer"),
    (response(text="a\ud83d"), "responses[1].text", "half of a surrogate pair"),
    (response(meta={"note": ["x", "\udc00"]}), "responses[1].meta.note[1]", "half of a surrogate pair"),
    (response(scores={"\udc00": 1}), "responses[1].scores", "half of a surrogate pair"),
    ("[" * 100_000, "", "nested too deeply"),
]


@pytest.mark.parametrize(("bad", "field", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_third_line_is_named(tmp_path: Path, bad: str, field: str, reason: str) -> None:
    path = put(tmp_path, f"{line('1')}\n{line('2')}\n{bad}\n{line('4')}\n")
    error = error_of(path)
    assert (error.file, error.line, error.field) == (str(path), 3, field)
    assert reason in error.reason
    assert str(error).startswith(f"{path}:3: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize(("bad", "field", "reason"), BAD, ids=range(len(BAD)))
def test_skipping_reports_the_bad_line_and_keeps_the_others(tmp_path: Path, bad: str, field: str, reason: str) -> None:
    path = put(tmp_path, f"{line('1')}\n{line('2')}\n{bad}\n{line('4')}\n")
    errors: list[RecordError] = []
    assert [record.id for record in read(path, errors.append)] == ["1", "2", "4"]
    assert [(error.line, error.field) for error in errors] == [(3, field)]
    assert errors[0].as_dict() == {"file": str(path), "line": 3, "field": field, "reason": errors[0].reason}


def test_bytes_that_are_not_utf8_hide_no_other_line(tmp_path: Path) -> None:
    path = put(tmp_path, line("1").encode() + b"\n\xff\xfe{}\n" + line("3").encode())
    errors: list[RecordError] = []
    assert [record.id for record in read(path, errors.append)] == ["1", "3"]
    assert [(e.line, e.reason) for e in errors] == [(2, "not UTF-8: invalid start byte at byte 0")]


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    error = error_of(put(tmp_path, f"{line('a')}\n\n{line('b')}\n{line('a')}\n"))
    assert (error.line, error.field, error.reason) == (4, "id", "'a' stands already on line 1")


def test_line_numbers_of_a_list_are_where_elements_start(tmp_path: Path) -> None:
    content = f'[\n{line("1")},\n\n{{"id": "2",\n "prompt": "p"}},\n 7,\n{line("3")}, {line("4")}\n]'
    path, errors = put(tmp_path, content), list[RecordError]()
    assert [(number, row["id"]) for number, row in read_rows(path, errors.append)] == [
        (2, "1"),
        (4, "2"),
        (7, "3"),
        (7, "4"),
    ]
    assert [(error.line, error.reason) for error in errors] == [(6, "expected a JSON object, found a number")]


@pytest.mark.parametrize(
    ("content", "number", "reason", "good"),
    [
        (f"[\n{line('1')},\n{{broken}}\n]", 3, "the JSON list is broken here", ["1"]),
        (f"[\n{line('1')}\n{line('2')}\n]", 3, "expected a comma or the end", ["1"]),
        (f"[\n{line('1')}\n", 3, "expected a comma or the end", ["1"]),
        (f"[\n{line('1')},\n]", 3, "the JSON list is broken here", ["1"]),
        (f"[\n{line('1')}\n]\n{line('2')}\n", 4, "something follows the end", ["1"]),
        (f'[\n{line("1")},\n{{"id": "n", "prompt": "p", "x": NaN}},\n{line("2")}\n]', 3, "NaN", ["1", "2"]),
        (f'[\n{line("1")},\n{{"id": "n", "prompt": "p", "x": 1e999}},\n{line("2")}\n]', 3, "1e999", ["1", "2"]),
        ("[\n" + "[" * 100_000, 1, "nested too deeply", []),
    ],
)
def test_a_broken_list_names_the_line(tmp_path: Path, content: str, number: int, reason: str, good: list[str]) -> None:
    errors: list[RecordError] = []
    assert [row["id"] for _, row in read_rows(put(tmp_path, content), errors.append)] == good
    assert [error.line for error in errors] == [number]
    assert reason in errors[0].reason


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff", "\ufeff\r\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="the file is empty"):
        list(read_rows(put(tmp_path, content)))


@pytest.mark.parametrize("cut", [4, 20, -6])
def test_a_damaged_gzip_is_an_error_not_a_traceback(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(line("a").encode() * 50)
    with pytest.raises(InputError, match="cannot be read"):
        list(read_rows(put(tmp_path, packed[:cut])))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_rows(put(tmp_path, packed[:30] + b"\xff" * 20 + packed[50:])))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_rows(tmp_path))


# --- writing -----------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = TEXT.filter(str.strip)
NUMBER = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.recursive(st.none() | st.booleans() | NUMBER | TEXT, lambda inner: st.lists(inner, max_size=2), max_leaves=3)
OBJECT = st.dictionaries(TEXT, VALUE, max_size=2)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(records.ROLES), "content": NAME})
RESPONSE = st.builds(
    Response,
    text=TEXT,
    policy=NAME,
    finished=st.booleans(),
    count=st.integers(1, 9),
    sampling=OBJECT,
    scores=st.dictionaries(TEXT, st.none() | NUMBER, max_size=3),
    tokens=st.none() | st.fixed_dictionaries({"tokenizer": NAME, "ids": st.lists(st.integers(0, 9), max_size=3)}),
    meta=OBJECT,
)
SETS = st.lists(
    st.builds(
        CandidateSet,
        id=NAME,
        prompt=NAME | st.lists(MESSAGE, min_size=1, max_size=3),
        responses=st.lists(RESPONSE, max_size=3),
        meta=OBJECT,
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda record: record.id,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets=SETS, name=st.sampled_from(["out.jsonl", "out.jsonl.gz"]))
def test_writing_and_reading_is_the_identity(tmp_path: Path, sets: list[CandidateSet], name: str) -> None:
    path = tmp_path / name
    assert write(path, sets) == len(sets)
    assert list(read(path)) == sets
    first = path.read_bytes()
    write(path, read(path))
    assert path.read_bytes() == first


def test_a_non_finite_number_is_never_written(tmp_path: Path) -> None:
    path = put(tmp_path, "old", "out.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, [CandidateSet("a", "p", [Response("t", scores={"rm": float("nan")})])])
    assert path.read_text() == "old"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = put(tmp_path, "old", "out.jsonl")

    def interrupted() -> Any:
        yield CandidateSet("a", "p")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted())
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    assert path.read_text() == "old"


def test_equal_records_give_equal_gzip_bytes(tmp_path: Path) -> None:
    sets = [CandidateSet("a", "p")]
    write(tmp_path / "one.jsonl.gz", sets)
    write(tmp_path / "two.jsonl.gz", sets)
    assert sha256_file(tmp_path / "one.jsonl.gz") == sha256_file(tmp_path / "two.jsonl.gz")
    assert (tmp_path / "one.jsonl.gz").read_bytes()[3:8] == bytes(5)  # no file name, no time
    assert gzip.decompress((tmp_path / "one.jsonl.gz").read_bytes()) == b'{"id": "a", "prompt": "p", "responses": []}\n'


def test_a_writer_makes_the_folder_it_needs(tmp_path: Path) -> None:
    with atomic_writer(tmp_path / "new" / "deep" / "file") as out:
        out.write(b"x")
    assert (tmp_path / "new" / "deep" / "file").read_bytes() == b"x"


def test_lines_and_text(tmp_path: Path) -> None:
    path = put(tmp_path, "\ufeffone\r\ntwo\u2028still\n\nfour")
    assert [(number, raw.decode()) for number, raw in read_lines(path)] == [
        (1, "one"),
        (2, "two\u2028still"),
        (3, ""),
        (4, "four"),
    ]
    assert read_text(path) == "one\ntwo\u2028still\n\nfour"
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"


# --- what a message holds beside its content ---------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}
CALL = {"function": {"name": "weather", "arguments": {}}}
SAID = {"role": "assistant", "content": "Rain."}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
ANSWER = {"id": "a", "prompt": [USER], "responses": [{"text": "x"}]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": [USER | {"images": ["x.png"]}]}, "prompt[0].images"),
        ({"prompt": [USER, {"role": "assistant", "content": "", "function_call": CALL}]}, "prompt[1].function_call"),
        ({"prompt": [USER | {"content": [{"type": "image", "url": "x.png"}]}]}, "prompt[0].content[0]"),
        ({"prompt": [USER | {"content": [{"text": "x", "image": "x.png"}]}]}, "prompt[0].content[0].image"),
        ({"responses": [{"text": "x", "meta": {"message": {"function_call": CALL}}}]}, "responses[0].function_call"),
        ({"responses": [{"text": "x", "meta": {"message": {"weight": 0}}}]}, "responses[0].weight"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": "none of them"}, "tools"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "chat_template_kwargs.chat_template"),
        ({"tools": [CALL], "meta": {"tools": [CALL]}}, "tools"),
        ({"responses": [{"messages": [USER]}]}, "responses[0].messages[0].role"),
        ({"responses": [{"messages": [SAID, SAID]}]}, "responses[0].messages"),
        ({"responses": [{"messages": [CALLS, RESULT]}]}, "responses[0].messages"),
        ({"responses": [{"messages": []}]}, "responses[0].messages"),
        ({"meta": {"images": ["sky.png"]}}, "meta.images"),
    ],
)
def test_what_would_go_unused_is_refused_by_name(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = put(tmp_path, json.dumps(ANSWER) + "\n" + json.dumps(ANSWER | {"id": "b"} | change))
    error = error_of(path)
    assert (error.line, error.field[: len(field)]) == (2, field)
    skipped: list[RecordError] = []
    assert [record.id for record in read(path, skipped.append)] == ["a"]
    assert len(skipped) == 1


def test_messages_in_full_are_read_and_written_as_they_came(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hi, ", "image_url": None}, {"type": "text", "text": "you"}]
    told = {"tools": [CALL], "chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "d"}]}
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": parts, "tool_calls": None, "name": "", "images": []}, CALLS, RESULT],
        **told,
        "responses": [
            {"text": "Rain.", "messages": [CALLS, RESULT, SAID], "policy": "p", "finished": True},
            {"text": "Sun.", "policy": "p", "finished": True},
        ],
        "meta": {"images": None},
    }
    [record] = read(put(tmp_path, json.dumps(row)))
    assert json.loads(json.dumps(to_dict(record))) == row
    assert {key: record.meta[key] for key in told} == told
    assert record.responses[0].shown() == "[call] weather({})\n[result] rain\nRain."
    # What a message said beside its text waited in `meta` before; a text need not be told twice.
    older = {"text": "", "meta": {"message": {"tool_calls": [CALL]}, "n": 1}}
    [record] = read(put(tmp_path, json.dumps(ANSWER | {"responses": [older, {"messages": [CALLS, RESULT, SAID]}]})))
    assert record.responses[0].messages == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert (record.responses[0].meta, record.responses[1].text) == ({"n": 1}, "Rain.")


@pytest.mark.parametrize("row", [{"prompt": "Why?", "chosen": "a", "rejected": "b", "images": ["x.png"]}])
def test_foreign_rows_are_refused_where_they_are_used_and_carried_where_they_are_converted(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    path = put(tmp_path, json.dumps(row))
    with pytest.raises(RecordError, match=r"in\.jsonl:1: meta\.images: record 'in-000001'"):
        list(load(path))
    convert(path, tmp_path / "out.jsonl", to_format="trl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["images"] == ["x.png"]

"""convert: counts, errors, skipping, lists, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankalign.data.convert import convert
from rankalign.data.ids import FreshIds
from rankalign.data.records import read
from rankalign.data.templates import render
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import read_rows

# --- convert -----------------------------------------------------------------------------------------------------


def put(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


RRHF_LINE = json.dumps({"query": "q", "responses": ["a", "b", "c"], "scores": [1, 1, 2]})


def test_convert_reports_what_it_did(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, RRHF_LINE)
    report = convert(source, tmp_path / "out.jsonl", "rrhf", "trl")
    lost = {"ties": 2}
    assert report == {"read": 2, "written": 4, "skipped": 0, "errors": [], "lost": lost}
    rows = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("in-000001", "c", "a"),
        ("in-000001", "c", "b"),
        ("in-000002", "c", "a"),
        ("in-000002", "c", "b"),
    ]


BROKEN = ["{broken", '{"query": "q"}', RRHF_LINE.replace("[1, 1, 2]", "[1, NaN, 2]")]


@pytest.mark.parametrize("broken", BROKEN)
def test_convert_stops_at_a_bad_line_and_writes_nothing(tmp_path: Path, broken: str) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, RRHF_LINE, broken)
    with pytest.raises(RecordError, match=r"in\.jsonl:3: "):
        convert(source, tmp_path / "out.jsonl", "rrhf", "rankalign")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("broken", BROKEN)
def test_convert_skips_bad_lines_when_told_to(tmp_path: Path, broken: str) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, broken, RRHF_LINE)
    report = convert(source, tmp_path / "out.jsonl", "rrhf", "rankalign", skip_invalid=True)
    assert (report["read"], report["written"], report["skipped"]) == (3, 2, 1)
    (error,) = report["errors"]
    assert (error["file"], error["line"]) == (str(source), 2)
    assert error["reason"]
    assert [record.id for record in read(tmp_path / "out.jsonl")] == ["in-000001", "in-000003"]


def test_convert_writes_a_list_where_the_name_says_so(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, RRHF_LINE)
    convert(source, tmp_path / "out.json", "rrhf", "trl")
    assert [row["chosen"] for row in json.loads((tmp_path / "out.json").read_text())] == ["c"] * 4
    convert(tmp_path / "out.json", tmp_path / "back.json", "trl", "trl")
    assert (tmp_path / "back.json").read_text() == (tmp_path / "out.json").read_text()
    convert(source, tmp_path / "train.json", "rrhf", "rrhf")
    assert len((tmp_path / "train.json").read_text().splitlines()) == 2
    put(tmp_path / "empty.json", "[]")
    convert(tmp_path / "empty.json", tmp_path / "none.json", "trl", "trl")
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_convert_may_write_over_its_source(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE)
    convert(source, source, "rrhf", "rankalign")
    assert [len(record.responses) for record in read(source)] == [3]


def test_convert_knows_no_such_format(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE)
    with pytest.raises(InputError, match=r"unknown format 'rrfh' \(did you mean 'rrhf'\?\)"):
        convert(source, tmp_path / "out.jsonl", "rrfh", "trl")


def test_duplicate_records_are_refused(tmp_path: Path) -> None:
    line = '{"id": "a", "prompt": "p"}'
    with pytest.raises(RecordError, match="'a' stands already on line 1"):
        convert(put(tmp_path / "in.jsonl", line, line), tmp_path / "out.jsonl", "rankalign", "trl")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"prompt": "p", "id": "a", "prompt": "q"}', "prompt"),
        ('{"prompt": "p", "meta": {"x": [{"y": 1, "z": 2, "y": 1}]}}', "y"),
        ('{"prompt": "p", "\\u0078": 1, "x": 1}', "x"),
    ],
)
def test_a_key_that_stands_twice_is_named(tmp_path: Path, line: str, key: str) -> None:
    with pytest.raises(RecordError, match=rf"in\.jsonl:2: the key '{key}' stands twice in one object"):
        convert(put(tmp_path / "in.jsonl", '{"prompt": "p"}', line), tmp_path / "out.jsonl", "trl")
    with pytest.raises(RecordError, match=rf"in\.json:1: the key '{key}' stands twice in one object"):
        convert(put(tmp_path / "in.json", f"[{line}]"), tmp_path / "out.jsonl", "trl")


def test_a_target_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE)
    with pytest.raises(InputError, match="/dev/full: cannot be written: No space left on device"):
        convert(source, "/dev/full")
    for name in ("out.jsonl", "out.json", "out.parquet", "out"):
        with pytest.raises(InputError, match="cannot be written"):
            convert(source, source / name)


def test_the_format_is_told_where_none_is_named(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE)
    assert convert(source, tmp_path / "out.jsonl")["written"] == 1
    assert [record.scores("score") for record in read(tmp_path / "out.jsonl")] == [[1, 1, 2]]
    with pytest.raises(InputError, match="cannot tell the format from the keys odd"):
        convert(put(tmp_path / "odd.jsonl", '{"odd": 1}'), tmp_path / "out.jsonl")


# --- what says nothing is left out, and counted ------------------------------------------------------------------

SAME = {"prompt": "q", "chosen": "same", "rejected": "same"}
TURN = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "same"}
EQUAL = {
    "trl": SAME,
    "openrlhf": SAME,
    "hh": SAME | {"prompt": "\n\nHuman: q\n\nAssistant:"},
    "llama-factory": {"instruction": "q", "chosen": "same", "rejected": "same"},
    "ms-swift": {"messages": [TURN, REPLY], "rejected_response": "same"},
    "shp": {"history": "q", "human_ref_A": "same", "human_ref_B": "same", "labels": 1},
    "stack-exchange": {"question": "q", "response_j": "same", "response_k": "same"},
    "ultrafeedback": {"prompt": "q", "chosen": [TURN, REPLY], "rejected": [TURN, REPLY]},
}


@pytest.mark.parametrize("name", EQUAL)
def test_pairs_of_equal_answers_are_counted(tmp_path: Path, name: str) -> None:
    source = put(tmp_path / "in.jsonl", json.dumps(EQUAL[name]))
    report = convert(source, tmp_path / "out.jsonl", name)
    assert (report["read"], report["written"], report["lost"]) == (1, 0, {"pairs of equal answers": 1})


def test_messages_that_differ_beside_their_text_are_no_equal_pair(tmp_path: Path) -> None:
    row = {"prompt": [TURN], "chosen": [REPLY | {"thinking": "hm"}], "rejected": [REPLY]}
    assert convert(put(tmp_path / "in.jsonl", json.dumps(row)), tmp_path / "out.jsonl", "trl")["written"] == 1


@pytest.mark.parametrize("name", ["trl", "hh", "llama-factory", "ms-swift", "openrlhf", "stack-exchange"])
def test_lists_with_equal_texts_give_no_pair_of_them(tmp_path: Path, name: str) -> None:
    row = {"query": "q", "responses": ["a", "b", "a"], "scores": [3, 2, 1]}
    report = convert(put(tmp_path / "in.jsonl", json.dumps(row)), tmp_path / "out.jsonl", "rrhf", name)
    assert (report["written"], report["lost"]["pairs of equal answers"]) == (2, 1)


def test_a_pair_of_ours_with_equal_texts_is_not_written(tmp_path: Path) -> None:
    responses = [
        {"text": "same", "policy": policy, "scores": {"preference": score}}
        for policy, score in (("chosen", 1), ("rejected", 0))
    ]
    line = json.dumps({"id": "a", "prompt": "p", "responses": responses})
    report = convert(put(tmp_path / "in.jsonl", line), tmp_path / "out.jsonl", "rankalign", "trl")
    assert (report["written"], report["lost"]) == (0, {"pairs of equal answers": 1})


@pytest.mark.parametrize("name", ["hh", "text-score", "rrhf", "summarize"])
def test_results_of_tools_are_left_out_of_texts_and_counted(tmp_path: Path, name: str) -> None:
    prompt = [TURN, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "I see."}, TURN]
    responses = [{"text": f"one two three four {n}", "scores": {"rm": n}} for n in (1, 2)]
    line = json.dumps({"id": "a", "prompt": prompt, "responses": responses})
    report = convert(put(tmp_path / "in.jsonl", line), tmp_path / "out.jsonl", "rankalign", name)
    assert (report["written"], report["lost"]["prompt.tool"]) == (1, 1)
    assert "42" not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize("template", ["hh", "vicuna"])
def test_templates_without_a_place_for_tools_refuse_them(template: str) -> None:
    with pytest.raises(InputError, match=f"template '{template}' has no place for the results of tools; use chat"):
        render([TURN, {"role": "tool", "content": "42"}], template)


# --- whole dialogues, ids that stand twice, lists on one line ----------------------------------------------------

RAW = {"chosen": "\n\nHuman: Hi\n\nAssistant: Good day.", "rejected": "\n\nHuman: Hi\n\nAssistant: Good grief."}


def test_raw_dialogues_are_told_by_their_turns(tmp_path: Path) -> None:
    """As TRL's implicit pairs they would part behind the shared word of the answers."""
    report = convert(put(tmp_path / "in.jsonl", json.dumps(RAW)), tmp_path / "out.jsonl")
    (record,) = read(tmp_path / "out.jsonl")
    assert (report["written"], record.prompt) == (1, [{"role": "user", "content": "Hi"}])
    assert [response.text for response in record.responses] == ["Good day.", "Good grief."]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_that_goes_on_into_another_turn_is_counted(tmp_path: Path, side: str) -> None:
    row = RAW | {side: RAW[side] + "\n\nHuman: Bye"}
    cut = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}
    lines = [json.dumps(each) for each in (RAW, row, cut | {side: " a\n\nHuman: Bye"})]
    report = convert(put(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", "hh")
    assert (report["written"], report["lost"]) == (1, {"answers that go on into another turn": 2})


def test_ids_that_stand_twice_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"id": "a", "prompt": str(n)}) for n in range(3)]
    pairs = [json.dumps({"id": "a", "prompt": "p", "chosen": "x", "rejected": str(n)}) for n in range(3)]
    report = convert(put(tmp_path / "in.jsonl", *pairs), tmp_path / "out.jsonl")
    assert (report["written"], report["renamed_ids"]) == (3, 2)
    assert "2 ids stood there already" in capsys.readouterr().err
    one, two = put(tmp_path / "one.jsonl", rows[0]), put(tmp_path / "two.jsonl", rows[1])
    assert convert([one, two], tmp_path / "out.jsonl")["renamed_ids"] == 1


class Counting(set[str]):
    """A set that counts how often it is asked."""

    asked = 0

    def __contains__(self, item: object) -> bool:
        Counting.asked += 1
        return super().__contains__(item)


@pytest.mark.parametrize("wanted", [lambda n: "same", lambda n: f"list-{n % 2}", str])
def test_fresh_names_take_steps_in_proportion(wanted: Callable[[int], str]) -> None:
    steps = []
    for size in (100, 200, 400):
        fresh, Counting.asked = FreshIds(), 0
        fresh.seen = Counting()
        names = [fresh.take(wanted(n)) for n in range(size)]
        assert len(set(names)) == size
        assert max(map(len, names)) <= 12
        steps.append(Counting.asked)
    assert [steps[1] / steps[0], steps[2] / steps[1]] == pytest.approx([2, 2], abs=0.1)


def test_a_list_on_one_line_is_as_large_as_its_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(500)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    convert(tmp_path / "list.json", tmp_path / "out.jsonl")
    put(tmp_path / "list.jsonl", *map(json.dumps, rows))
    convert(tmp_path / "list.jsonl", tmp_path / "lines.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "lines.jsonl").read_text()
    assert [record.id for record in read(tmp_path / "out.jsonl")][:2] == ["list-000001", "list-000002"]


def test_an_error_names_the_element_of_the_list(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2 + [{"prompt": "p", "chosen": "a"}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with pytest.raises(RecordError, match=r"in\.json:1: rejected: .* \(element 3 of the list\)$"):
        convert(tmp_path / "in.json", tmp_path / "out.jsonl")
    report = convert(tmp_path / "in.json", tmp_path / "out.jsonl", skip_invalid=True)
    assert [(error["line"], error["element"]) for error in report["errors"]] == [(1, 3)]
    native = [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p"}, {"id": "a", "prompt": "p"}]
    (tmp_path / "in.json").write_text(json.dumps(native))
    with pytest.raises(RecordError, match="'a' stands already in element 1"):
        list(read(tmp_path / "in.json"))

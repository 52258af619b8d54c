"""Token lists in an Arrow file, and records to tokens in several processes: as in memory, as in one process."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from rankalign.data.encode import EncodeOptions, TokenList, encode_all
from rankalign.data.records import CandidateSet, Response
from rankalign.data.token_table import Joined, TokenTable, to_batch, write_table
from rankalign.data.tokenise import PIECE, tokenise
from rankalign.errors import InputError, Line, RecordError
from rankalign.models import tiny


def some_lists(count: int, vocabulary: int) -> list[TokenList]:
    draw = random.Random(count)
    ids = lambda most: [draw.randrange(vocabulary) for _ in range(draw.randrange(most))]  # noqa: E731
    texts = [[ids(9) for _ in range(draw.randrange(4))] for _ in range(count)]
    return [TokenList(f"é{i}", ids(7), rs, [draw.gauss(0, 1) for _ in rs]) for i, rs in enumerate(texts)]


def table_of(path: Path, lists: list[TokenList], vocabulary: int, piece: int = 10) -> TokenTable:
    pieces = [lists[i : i + piece] for i in range(0, len(lists), piece)]
    write_table(path, (to_batch(some, vocabulary) for some in pieces), vocabulary)
    return TokenTable(path)


@pytest.mark.parametrize(("vocabulary", "width"), [(300, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_a_table_gives_back_what_was_put_in(tmp_path: Path, vocabulary: int, width: int) -> None:
    lists = some_lists(33, vocabulary)
    lists[7].prompt.append(vocabulary - 1)
    lists[8] = replace(lists[8], responses=[[1, 2, 3], [4]], scores=[1.0, 0.0], unlearned=[((0, 1), (2, 3)), ()])
    lists[9] = replace(lists[8], id="own", own=[True, False])
    table = table_of(tmp_path / "t.arrow", lists, vocabulary)
    assert list(table) == lists
    assert [table[-1], *table[3:25:4]] == [lists[-1], *lists[3:25:4]]
    assert all(type(i) is int for i in table[7].prompt)  # callers pack them, compare them and write them as JSON
    assert table.longest.tolist() == [len(t.prompt) + max([len(r) for r in t.responses], default=0) for t in lists]
    assert table.largest.tolist() == [max([0, *t.prompt, *(i for r in t.responses for i in r)]) for t in lists]
    kind = datasets.Dataset.from_file(str(tmp_path / "t.arrow")).data.schema.field("prompt").type.value_type
    assert kind.bit_width == 8 * width
    with pytest.raises(IndexError):
        table[33]


def test_a_table_travels_by_its_name_and_takes_no_memory(tmp_path: Path) -> None:
    lists = some_lists(40, 100)
    before = pa.total_allocated_bytes()
    table = table_of(tmp_path / "t.arrow", lists, 100)
    assert pa.total_allocated_bytes() - before < 1000
    sent = pickle.dumps(table)
    assert len(sent) < 300
    assert list(pickle.loads(sent)) == lists


def test_a_table_without_rows(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t.arrow", [], 100)
    assert len(table) == 0
    assert list(table) == []
    assert table.repeated() is None


def test_ids_that_stand_twice(tmp_path: Path) -> None:
    lists = some_lists(4, 100)
    twice = [*lists, TokenList("é2", [1], [[2]], [0.0])]
    assert table_of(tmp_path / "a.arrow", lists, 100).repeated() is None
    assert table_of(tmp_path / "b.arrow", twice, 100, piece=3).repeated() == ("é2", 2)


@pytest.mark.parametrize("token", [1 << 16, 10**12, 10**30])
def test_an_id_beyond_the_vocabulary_is_refused_by_name(token: int) -> None:
    lists = [TokenList("fine", [1], [[2]], [0.0]), TokenList("odd", [1], [[2, token]], [0.0])]
    with pytest.raises(InputError, match=f"prompt 'odd' holds token id {token}, and the tokenizer knows 300"):
        to_batch(lists, 300)


def test_sequences_joined() -> None:
    parts: list[list[int]] = [[], [1, 2], [], [3], [4, 5, 6], []]
    joined, flat = Joined(*parts), [1, 2, 3, 4, 5, 6]
    assert list(joined) == flat
    assert [joined[i] for i in range(-6, 6)] == flat * 2
    assert joined[1:5:2] == flat[1:5:2]
    with pytest.raises(IndexError):
        joined[6]


# --- in several processes ----------------------------------------------------------------------------------------


def records(count: int) -> list[CandidateSet]:
    def answers(i: int) -> list[Response]:
        return [Response(f"{'word ' * (i % 40)}{j}", scores={"j": float(i * j % 5)}) for j in range(i % 4)]

    return [CandidateSet(str(i), f"Say <|im_end|> {i}" if i % 7 == 0 else f"Say {i}", answers(i)) for i in range(count)]


@pytest.mark.parametrize("num_proc", [1, 3])
def test_pieces_are_those_of_one_pass(num_proc: int) -> None:
    count, options = 3 * PIECE + 20, EncodeOptions(judge="j", max_length=40)
    lists, counts = encode_all(records(count), tiny.build_tokenizer(), options)
    pieces = list(tokenise(records(count), tiny.build_tokenizer(), options, list, num_proc))
    assert [tokens for piece in pieces for tokens in piece.made] == lists
    summed = {name: sum(piece.counts.get(name, 0) for piece in pieces) for name in counts}
    assert summed == counts
    assert counts["response_truncated"]
    assert counts["dropped_prompts"]
    assert sum(piece.records for piece in pieces) == count


def test_refusals_come_from_the_workers_with_file_and_line() -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'Say 1' %}{{ raise_exception('no ones') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    one = CandidateSet("1", "Say 1", [Response("a", scores={"j": 1.0})], origin=("f.jsonl", Line.of(9, 3)))
    two = CandidateSet("2", "Say 2", [Response("a", scores={"j": 1.0})])
    (piece,) = tokenise([one, two], tokenizer, EncodeOptions(judge="j"), list, 2)
    assert [tokens.id for tokens in piece.made] == ["2"]
    (error,) = piece.errors
    assert str(error).startswith("f.jsonl:9: prompt: record '1':")
    assert str(error).endswith("(element 3 of the list)")


def test_errors_travel_whole() -> None:
    for line in (4, Line.of(4, 2), Line.of(4, 0, "shard.jsonl", 77)):
        error = RecordError("a.jsonl", line, "prompt", "is bad")
        sent = pickle.loads(pickle.dumps(error))
        assert (str(sent), sent.as_dict()) == (str(error), error.as_dict())

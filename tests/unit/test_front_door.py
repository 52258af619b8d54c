"""The names in `rankalign` itself: light until used, documented with an example that runs, and one call each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankalign
from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, to_dict, write
from rankalign.engines import Policy, SamplingParams
from rankalign.errors import InputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
PROMPTS = ["Why?", [{"role": "user", "content": "Who?"}], {"prompt": "When?", "source": "x"}]


def words(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    return [float(len(output.split())) for output in outputs]


def answers(*texts: str, **scores: list[float]) -> list[CandidateSet]:
    return [
        CandidateSet(f"p{i}", "Why?", [Response(text, "m", scores={judge: s[i] for judge, s in scores.items()})])
        for i, text in enumerate(texts)
    ]


def test_nothing_heavy_is_imported_until_a_name_is_used() -> None:
    code = (
        "import sys, rankalign; assert 'train' in dir(rankalign); "
        "sys.exit(1 if {'torch', 'transformers', 'pandas', 'numpy', 'yaml'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_is_documented_with_an_example() -> None:
    fences = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    for name in rankalign.__all__:
        assert name == "__version__" or f"rankalign.{name}" in fences, name
        assert getattr(rankalign, name).__doc__


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(text, "api.md", "exec"), names)


def test_sample_is_the_command(tmp_path: Path) -> None:
    found = rankalign.sample("tiny", PROMPTS, n=2, max_new_tokens=4, seed=3, template="raw")
    assert [s.prompt for s in found] == ["Why?", PROMPTS[1], "When?"]
    assert [s.meta for s in found] == [{}, {}, {"source": "x"}]
    assert all(sum(r.count for r in s.responses) == 2 and r.policy == "tiny" for s in found for r in s.responses)
    write(tmp_path / "p.jsonl", [CandidateSet(s.id, s.prompt, [], s.meta) for s in found])
    config = tmp_path / "c.yaml"
    config.write_text("policies:\n- {name: tiny, model: tiny, n: 2, max_new_tokens: 4, template: raw}\n")
    flags = ["--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "o.jsonl"), "--seed", "3"]
    assert main(["sample", "--config", str(config), *flags]) == 0
    assert list(read(tmp_path / "o.jsonl")) == found


def test_sample_takes_several_models_and_keeps_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = Policy("greedy", model="tiny", sampling=SamplingParams(temperature=0, max_new_tokens=3))
    output = tmp_path / "runs" / "o.jsonl"
    found = rankalign.sample([greedy], ["Why?"], output=output)
    assert [r.policy for r in found[0].responses] == ["greedy"]
    assert rankalign.sample([greedy], ["Why?"], output=output) == found
    assert "nothing to do" in capsys.readouterr().err
    named = rankalign.sample({"one": "tiny", "two": "tiny"}, found, max_new_tokens=3)
    assert [r.policy for r in named[0].responses] == ["one", "two"]
    with pytest.raises(InputError, match=r"rankalign.sample: unknown key 'temprature' \(did you mean 'temperature'"):
        rankalign.sample("tiny", ["Why?"], temprature=1.0)
    with pytest.raises(InputError, match="there are no prompts"):
        rankalign.sample("tiny", [])


def test_score_takes_functions_models_and_mappings(tmp_path: Path) -> None:
    given = answers("a b c", "d")
    before = [to_dict(record) for record in given]
    assert [s.scores("words") for s in rankalign.score(given, words)] == [[3.0], [1.0]]
    assert [s.scores("n") for s in rankalign.score(given, f"{__file__}:words", name="n")] == [[3.0], [1.0]]
    both = rankalign.score(given, [words, {"name": "rm", "kind": "reward_model", "model": "tiny-rm"}])
    assert all(isinstance(r.scores["rm"], float) for s in both for r in s.responses)
    assert [to_dict(record) for record in given] == before
    csv = tmp_path / "x.csv"
    csv.write_text("prompt,answer\nWhy?,a b\n")
    assert [s.scores("words") for s in rankalign.score(csv, words, output=tmp_path / "o.jsonl")] == [[2.0]]
    assert (tmp_path / "o.jsonl.manifest.json").exists()


def test_compare_counts_wins() -> None:
    a, b = answers("x", "x", "x", "x", j=[1, 2, 3, 4]), answers("y", "y", "y", "y", j=[0, 3, 3, 1])
    found = rankalign.compare(a, b, names=("A", "B"))
    (system,) = found.systems
    assert (system.a, system.b, system.win, system.tie, system.loss) == ("A", "B", 2, 1, 1)
    assert (system.sum_a, system.sum_b, system.win_rate) == (10, 7, 0.625)
    again = rankalign.compare(answers("a b"), answers("a"), scorer=words)
    assert (again.systems[0].sum_a, again.systems[0].sum_b) == (2, 1)
    with pytest.raises(InputError, match="no response has a score"):
        rankalign.compare(answers("a"), answers("b"))


def test_a_frame_has_a_row_a_response() -> None:
    chat = [{"role": "user", "content": "Who?"}]
    sets = [
        CandidateSet("1", "Why?", [
            Response("a", "m", scores={"rm": 1.5, "judge": None}, sampling={"seed": 3}),
            Response("b", "n", finished=False, count=2, meta={"k": [1]}),
        ], {"source": "x"}),
        CandidateSet("2", chat, []),
    ]  # fmt: skip
    found = rankalign.frame(sets)
    assert list(found.columns[:5]) == ["id", "prompt", "policy", "text", "finished"]
    assert set(found.columns[5:]) == {
        "count", "score:rm", "score:judge", "sampling.seed", "response.meta.k", "meta.source"
    }  # fmt: skip
    assert found["id"].tolist() == ["1", "1", "2"]
    assert found["prompt"].tolist() == ["Why?", "Why?", '[{"role": "user", "content": "Who?"}]']
    assert found["count"].tolist() == [1, 2, 1]
    assert found["score:rm"].isna().tolist() == [False, True, True]
    assert found["meta.source"].iloc[1] == "x"
    assert len(rankalign.frame([])) == 0

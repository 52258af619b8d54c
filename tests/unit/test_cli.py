"""The command line: fast help, an example in each, exit codes, one line for the user's mistakes, clean stdout."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rankalign.cli import COMMANDS, main
from rankalign.commands.docs_pages import OF_COMMANDS, OF_MODULES
from rankalign.data.records import CandidateSet, Response, write
from rankalign.training import help as help_texts
from rankalign.training.settings import GROUPS as SETTINGS


def records(path: Path, count: int = 4) -> str:
    sets = [
        CandidateSet(
            f"p{i}",
            [{"role": "user", "content": f"Question {i}"}],
            [Response("yes " * (i + 1), "a", scores={"toy": float(i)}), Response("no", "b", scores={"toy": 1.5})],
        )
        for i in range(count)
    ]
    write(path, sets)
    return str(path)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rankalign.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'yaml', 'rich'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


HEAVY = {"torch", "transformers", "datasets", "pandas", "scipy", "numpy", "pyarrow", "peft", "openpyxl", "matplotlib"}


@pytest.mark.parametrize("command", [*COMMANDS, "eval perplexity", "eval subsets"])
def test_the_help_of_a_command_imports_no_library(command: str) -> None:
    code = (
        f"import sys; from rankalign.cli import main\ntry:\n    main([*{command.split()!r}, '--help'])\n"
        f"except SystemExit as end:\n    assert end.code == 0\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
    assert f"example:\n  rankalign {command.split()[0]}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"example:\n  rankalign {command}" in shown
    assert "--json" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, ""),
        (["smaple"], 2, "unknown command 'smaple' (did you mean 'sample'?)"),
        (["eval", "reward", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
        (["score", "--input", "x"], 1, "name a scorer"),
    ],
)
def test_exit_codes(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [["eval"], ["ls", "nothing"], ["sample", "--config", "x", "--nonsense"]])
def test_wrong_usage_is_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_a_broken_third_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    good = Path(records(tmp_path / "good.jsonl")).read_text().splitlines()
    path.write_text("\n".join([*good[:2], '{"id": "p9", "prompt": "x", "responses": [{"text": 5}]}', good[3]]))
    assert main(["eval", "reward", str(path), "--judge", "toy"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"rankalign: {path}:3: responses[0].text: expected a string, found a number (see docs/your-data.md)"
    ]
    assert main(["eval", "reward", str(path), "--judge", "toy", "--skip-invalid", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 1


@pytest.mark.parametrize("kind", ["losses", "engines", "scorers", "formats", "templates"])
def test_ls(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] and row["summary"] for row in rows)


def test_json_is_all_there_is_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = records(tmp_path / "r.jsonl")
    assert main(["eval", "reward", path, "--judge", "toy", "--policy", "a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["mean"] == 1.5
    assert found["n"] == 4
    assert found["ci95"]["mean"][0] <= 1.5 <= found["ci95"]["mean"][1]


def test_score_with_a_function_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = records(tmp_path / "r.jsonl"), tmp_path / "s.jsonl"
    (tmp_path / "mine.py").write_text(
        "def words(samples, prompts, outputs, **meta):\n    return [float(len(o.split())) for o in outputs]\n"
    )
    flags = ["--input", source, "--output", str(output), "--name", "words", "--function", f"{tmp_path}/mine.py:words"]
    assert main(["score", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == 16  # two judges on eight responses
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[2]["responses"][0]["scores"] == {"toy": 2.0, "words": 3.0}
    assert main(["score", *flags]) == 0
    assert "nothing to do" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(
        "def words(samples, prompts, outputs, **meta):\n    return [0.0 for o in outputs]\n"
    )
    assert main(["score", *flags]) == 1
    assert "was made with other settings" in capsys.readouterr().err


def test_verify_names_what_changed_and_diff_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = records(tmp_path / "r.jsonl")
    (tmp_path / "f.py").write_text("def one(samples):\n    return [1.0] * len(samples)\n")
    for name in ("a", "b"):
        flags = ["--input", source, "--output", str(tmp_path / f"{name}.jsonl"), "--function", f"{tmp_path}/f.py:one"]
        assert main(["score", *flags, "--name", name]) == 0
    assert main(["verify", str(tmp_path / "a.jsonl")]) == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    assert 'settings.scorers[0].name: "a" -> "b"' in capsys.readouterr().out
    raw = bytearray(Path(source).read_bytes())
    raw[20] ^= 1
    Path(source).write_bytes(raw)
    assert main(["verify", str(tmp_path / "a.jsonl"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["changed"] == [
        {"path": source, "role": "input", "reason": "has changed"}
    ]
    assert main(["verify", str(tmp_path / "nothing.jsonl")]) == 1


READERS = (
    "eval variety {}",
    "compare {} {} --function rankalign.scorers.builtin:vader",
    "sheet make {} {} --output s.csv",
)
READERS += ("score --input {} --output o.jsonl --function rankalign.scorers.builtin:vader",)


@pytest.mark.parametrize("command", READERS)
def test_what_a_refusal_advises_every_reading_command_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Name {i}.", "responses": ["Blue.", "Seven."], "verdictx": "first"} for i in range(3)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command.format("in.jsonl", "in.jsonl").split()
    assert main(words) == 1
    assert "go on with --ignore_columns verdictx" in capsys.readouterr().err
    assert main([*words, "--ignore_columns", "verdictx"]) == 0
    Path("in.jsonl").write_text(Path("in.jsonl").read_text() + '{"prompt": 7, "responses": ["Blue."]}\n')
    assert main([*words, "--ignore_columns", "verdictx"]) == 1
    assert "in.jsonl:4: prompt" in capsys.readouterr().err
    more = ["--overwrite"] if words[0] == "score" else []
    assert main([*words, "--ignore_columns", "verdictx", "--skip_invalid", *more]) == 0
    assert "in.jsonl:4: prompt" in capsys.readouterr().err


def test_env_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env", "--json"]) == 0
    said = capsys.readouterr().out
    facts = json.loads(said)
    assert facts["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert facts["environment"]["OMP_NUM_THREADS"] == "1"
    assert "hf_secret" not in said
    assert str(Path.home()) not in said


def test_a_settings_file_may_stand_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"loss: dpo\ndata: {tmp_path}/nothing.jsonl\noutput_dir: {tmp_path}/out\nmodel: tiny\n")
    for words in (["train", str(config)], ["train", "--config", str(config)]):
        assert main(words) == 1
        assert "nothing.jsonl: no such file" in capsys.readouterr().err
    # A flag's value that ends like a settings file is a flag's value.
    assert main(["train", "--data", "x.yaml", "--output_dir", str(tmp_path / "out"), "--model", "tiny"]) == 1
    assert "x.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "names"),
    [
        (["compare", "--functon", "x"], 2, ["--function"]),
        (["train", "--lerning_rat", "1"], 1, ["learning_rate"]),
        (["train", "--xyzzy", "1"], 1, ["nearest of"]),
    ],
)
def test_an_unknown_flag_gets_three_names_at_most(
    words: list[str], code: int, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if code == 2:  # wrong usage, which argparse ends
        with pytest.raises(SystemExit):
            main(words)
    else:
        assert main(words) == code
    said = capsys.readouterr().err
    assert all(name in said for name in names)
    assert len(said) < 250


def slug(title: str) -> str:
    """The anchor that a heading gets on GitHub and in the site."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def test_every_page_that_an_error_names_is_there() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert set(OF_COMMANDS) == set(COMMANDS)
    for target in {*OF_COMMANDS.values(), *OF_MODULES.values()}:
        page, _, anchor = target.partition("#")
        titles = re.findall(r"^#+ (.*)$", (docs / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in map(slug, titles), target
    for module in OF_MODULES:  # a part that moved would leave its errors without a page
        name, _, attribute = module.rpartition(".")
        assert importlib.util.find_spec(name), module
        found = importlib.util.find_spec(module) if attribute.islower() else None
        assert found or hasattr(importlib.import_module(name), attribute), module


@pytest.mark.parametrize(
    ("words", "page"),
    [
        (["train", "--loss", "rhf"], "losses.md"),
        (["train", "--data", "nowhere.jsonl", "--model", "tiny"], "training.md#what---data-names"),
        (["train", "--launch", "fsdp"], "scaling.md"),
        (["train", "--optim", "nosuch"], "training.md"),
        (["convert", "nowhere.jsonl", "x.jsonl", "--from", "trl", "--to", "rrhf"], "formats.md"),
        (["convert-config", "nowhere.yaml"], "migrating.md"),
        (["eval", "reward", "nowhere.jsonl"], "formats.md"),
        (["sweep", "--beta", "0.1"], "sweep.md"),
        (["compare", "nowhere.jsonl", "x.jsonl"], "formats.md"),
    ],
)
def test_an_error_ends_with_the_page_that_helps(
    words: list[str], page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rankalign: ")
    assert last.endswith(f" (see docs/{page})"), last


@pytest.mark.parametrize("words", [*([c] for c in COMMANDS), *(["train", "--help", g] for g in help_texts.GROUPS)])
def test_help_fits_a_terminal_of_80_columns(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a command, and of a group of its flags."""
    with pytest.raises(SystemExit) as ended:
        main(words if len(words) > 1 else [*words, "--help"])
    assert ended.value.code == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("columns", [40, 80])
def test_the_list_of_commands_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert all(f"  {command} " in shown for command in COMMANDS)


def test_the_ten_that_matter_stand_first_and_every_setting_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--help"], ["train", "-h"]):
        with pytest.raises(SystemExit):
            main(words)
    shown = capsys.readouterr().out
    assert re.findall(r"^  --(\w+)", shown, re.MULTILINE)[:10] == list(help_texts.FIRST)
    names = {item.name for group in SETTINGS for item in dataclasses.fields(group)}
    assert all(f"--{name}" in shown for name in names)
    for group, (kind, _) in help_texts.GROUPS.items():
        with pytest.raises(SystemExit):
            main(["train", "--help", group])
        told = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
        assert told == {item.name for item in dataclasses.fields(kind)}
    assert main(["train", "--help", "dta"]) == 2
    assert "no such group (did you mean 'data'?)" in capsys.readouterr().err


def test_help_all_has_every_flag_of_the_trainer_too(capsys: pytest.CaptureFixture[str]) -> None:
    from rankalign.training.arguments import PPOConfig

    for words in (["train", "--help", "all"], ["train", "--help_all"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        missing = [f.name for f in dataclasses.fields(PPOConfig) if f.init and f"--{f.name}" not in shown]
        assert missing == []
        assert max(map(len, shown.splitlines())) <= 80


def test_the_tab_key_completes_commands_flags_and_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "rankalign").write_text(capsys.readouterr().out)
    for typed, offered in (
        ("rankalign sw", ["sweep"]),
        ("rankalign train --rrhf", ["--rrhf_weight"]),
        ("rankalign sweep --loss plackett", ["plackett_luce", "plackett_luce"]),
        ("rankalign convert-config --from", ["--from"]),
    ):
        script = (
            f"source {tmp_path}/rankalign; COMP_WORDS=({typed}); COMP_CWORD={len(typed.split()) - 1}; "
            '_shtab_rankalign; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == set(offered), typed
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'rankalign[completion]'" in capsys.readouterr().err

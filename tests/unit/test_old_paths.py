"""Import paths of version 0.1 go on working, each with one warning that names the new path."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import rankalign
from rankalign.cli import COMMANDS

PACKAGE = Path(rankalign.__file__).parent
# Where a room has the name that a file had: the room is what the old path imports, and hands the file's names on.
ROOMS = {old for old in rankalign._MOVED if (PACKAGE / old.replace(".", "/")).is_dir()}
# Names under old paths that the documentation has mentioned.
NAMED = """
    ranked.Ranked logps.list_logps two_pass.backward_two_pass rewards.list_rewards records.read records.write
    records.CandidateSet records.Response generation.sample generation.score experiment.run delta.make delta.apply
    delta.verify batching.encode_prompt models.resolve models.load_policy stages.RUNNERS templates.TEMPLATES
    evaluation.reward.evaluate_reward evaluation.perplexity.evaluate_perplexity evaluation.lexical.evaluate_lexical
    evaluation.pairwise.compare_by_score evaluation.report.write_report evaluation.raters.evaluate_raters
    training.ilql.ILQLSettings training.ilql.train_ilql training.ppo.PPOTrainer plan.plan iterate.run
    formats.trl.FORMAT paper.table.run pages.label.LabelServer
"""


def fresh(code: str) -> list[str]:
    """What a new interpreter that has imported nothing warns of, running ``code``."""
    head = (
        "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n    warnings.simplefilter('always')\n"
    )
    body = "".join(f"    {line}\n" for line in code.splitlines())
    tail = (
        "for w in caught:\n    w.category is DeprecationWarning and 'old path' in str(w.message) and print(w.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", head + body + tail], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    ours = [w for w in caught if issubclass(w.category, DeprecationWarning) and "the old path" in str(w.message)]
    assert all(w.filename == __file__ or "importlib" in w.filename for w in ours)
    return [str(w.message) for w in ours]


@pytest.mark.parametrize("old", sorted(set(rankalign._MOVED) - ROOMS))
def test_an_old_path_is_the_same_module_and_warns_once(old: str) -> None:
    path, new = f"rankalign.{old}", f"rankalign.{rankalign._MOVED[old]}"
    try:
        module = importlib.import_module(new)
    except ModuleNotFoundError as error:  # an optional package
        pytest.skip(str(error))
    sys.modules.pop(path, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert importlib.import_module(path) is module
        assert importlib.import_module(path) is module
    assert warned(caught) == [f"{path} is now {new}; the old path goes in version 0.3"]
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == new


@pytest.mark.parametrize("named", NAMED.split())
def test_a_documented_name_is_the_same_object_under_its_old_path(named: str) -> None:
    old, _, name = named.rpartition(".")
    if old in ROOMS:
        vars(importlib.import_module(f"rankalign.{old}")).pop(name, None)
    else:
        sys.modules.pop(f"rankalign.{old}", None)
    folder, inside, _ = old.partition(".")
    if inside:
        importlib.import_module(f"rankalign.{folder}")  # one that moved as a whole warns for itself
    new = rankalign._MOVED.get(old) or rankalign._new_path(f"rankalign.{old}").removeprefix("rankalign.")
    expected = getattr(importlib.import_module(f"rankalign.{new}"), name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = getattr(importlib.import_module(f"rankalign.{old}"), name)
    assert found is expected
    assert len(warned(caught)) == 1


def test_statements_as_users_write_them_warn_once_each() -> None:
    told = fresh(
        "from rankalign.records import CandidateSet, read\n"
        "from rankalign.evaluation.reward import evaluate_reward\n"
        "from rankalign.models import load_policy\n"
        "import rankalign.ranked\n"
        "import rankalign.scorers.builtin\n"
        "assert rankalign.scorers.builtin.vader\n"
        "from rankalign.models import load"
    )
    assert [line.split(";")[0] for line in told] == [
        "rankalign.records is now rankalign.data.records",
        "rankalign.evaluation.reward is now rankalign.evaluation.raters.reward",
        "rankalign.models.load_policy is now rankalign.models.load.load_policy",
        "rankalign.ranked is now rankalign.losses.ranked",
    ]


def test_what_never_moved_warns_of_nothing() -> None:
    assert fresh("import rankalign.scorers.builtin, rankalign.losses, rankalign.engines, rankalign.config") == []


def test_a_path_that_never_was_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rankalign.nothing")
    with pytest.raises(ImportError):
        exec("from rankalign.models import nothing")
    with pytest.raises(AttributeError, match="module 'rankalign' has no attribute 'nothing'"):
        _ = rankalign.nothing  # type: ignore[attr-defined]


def test_every_command_stands_under_its_old_path() -> None:
    for module, _ in COMMANDS.values():
        assert (PACKAGE / "commands" / f"{module}.py").is_file()


def test_a_name_that_went_to_another_file_of_the_room_is_found() -> None:
    said = fresh("from rankalign.models import merge_lora\nassert merge_lora.__module__ == 'rankalign.models.merge'")
    assert said == [
        "rankalign.models.merge_lora is now rankalign.models.merge.merge_lora; the old path goes in version 0.3"
    ]

"""Every file stands in a room, imports point down, nothing runs in a circle, and heavy packages keep to their place."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "rankalign"

# The house from the ground up. A room sees what stands below it, and the rooms inside one see each other and its own
# files where that makes no circle. Names without a folder are the eight files at the door.
ROOMS: dict[str, tuple[str, ...]] = {
    "__init__": (),
    "errors": (),
    "progress": (),
    "registry": (),
    "storage": (),
    "losses": (),
    "rows": (),
    "models": ("delta",),
    "data": ("formats", "lint"),
    "engines": (),
    "config": (),
    "scorers": (),
    "stages": (),
    "training": ("ppo", "ilql", "plan"),
    "evaluation": ("texts", "pairwise", "raters", "suites", "report"),
    "interactive": ("pages",),
    "recipes": ("paper",),
    "api": (),
    "commands": (),
    "cli": (),
    "__main__": (),
}
FLOOR = {room: floor for floor, room in enumerate(ROOMS)}
DOOR = {"__init__", "__main__", "api", "cli", "config", "errors", "progress", "registry"}
OPTIONAL = {
    "vader": {"rankalign/scorers/builtin.py"},
    "matplotlib": {"rankalign/evaluation/report"},
    "jinja2": {"rankalign/evaluation/report"},
    "peft": {"rankalign/models/"},
    "ray": {"rankalign/stages/ray_runner.py"},
    "liger_kernel": {"rankalign/rows/head_liger.py"},
    "openai": {"rankalign/engines/openai_client.py"},
    "rouge_score": {"rankalign/evaluation/texts/lexical.py"},
    "shtab": {"rankalign/commands/completion.py"},
    "datasketch": {"rankalign/data/overlap.py"},
    "vllm": {"rankalign/engines/vllm.py", "rankalign/engines/vllm_loaded.py"},
    "gradio": {"rankalign/interactive/pages/chat.py"},
    "plotext": {"rankalign/interactive/terminal.py"},
    "langdetect": {"rankalign/evaluation/suites/if_checks.py"},
    "openpyxl": {"rankalign/storage/workbook.py"},
    "pandas": {"rankalign/data/frame.py", "rankalign/evaluation/export.py"},
    "uvicorn": {"rankalign/interactive/pages/chat.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    """Dotted name of a file, ``rankalign.rows.tree``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    """The room of ``rankalign.rows.tree``: ``rows``."""
    return [*name.split("."), "__init__"][1]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it but under ``if TYPE_CHECKING``."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo.extend(ast.iter_child_nodes(node))
    return found


MODULES = {module(path): path for path in FILES}


def internal(path: Path) -> set[str]:
    """The files of rankalign that a file imports, as dotted names."""
    names = {name for name in imports(path) if name.split(".")[0] == "rankalign"}
    return {name if name in MODULES else name.rpartition(".")[0] or name for name in names} - {module(path)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or nothing."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for below in sorted(graph.get(name, ())):
                if found := visit(below, [*trail, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_every_file_stands_in_a_room() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == DOOR
    rooms = {*ROOMS} - DOOR
    homes = {"."} | rooms | {f"{outer}/{inner}" for outer in rooms for inner in ROOMS[outer]}
    assert {str(path.parent.relative_to(PACKAGE)) for path in FILES} == homes


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(module(path))
    above = {name for name in internal(path) if FLOOR[room(name)] > FLOOR[here]}
    assert not above, f"{here} is floor {FLOOR[here]} and must not import {above}"


def test_no_circle_among_files() -> None:
    found = circle({name: internal(path) for name, path in MODULES.items()})
    assert not found, " -> ".join(found)


def test_no_circle_among_the_rooms_of_a_room() -> None:
    """``pairwise`` and ``texts``, say, may not need each other. A room's own files are their common ground."""
    for outer, inner in ROOMS.items():
        home = {
            name: f"{outer}.{part}"
            for part in inner
            for name in MODULES
            if f"{name}.".startswith(f"rankalign.{outer}.{part}.")
        }
        graph: dict[str, set[str]] = {}
        for name in home:
            graph.setdefault(home[name], set()).update(
                {home[n] for n in internal(MODULES[name]) if n in home} - {home[name]}
            )
        assert not circle(graph), " -> ".join(circle(graph))


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_losses_import_torch_and_each_other_alone() -> None:
    for path in (PACKAGE / "losses").glob("*.py"):
        assert {room(name) for name in internal(path)} <= {"losses", "errors"}
        outside = {name.split(".")[0] for name in imports(path)} - {"rankalign", "torch", "__future__"}
        assert outside <= set(sys.stdlib_module_names)


def test_training_is_apart_from_sampling_and_evaluation() -> None:
    for path in (PACKAGE / "training").rglob("*.py"):
        assert not {room(name) for name in internal(path)} & {"engines", "scorers", "evaluation", "stages"}


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_stay_in_their_place(package: str) -> None:
    users = {str(p.relative_to(PACKAGE.parent)) for p in FILES if any(n.split(".")[0] == package for n in imports(p))}
    assert all(any(user.startswith(place) for place in OPTIONAL[package]) for user in users), users


def test_no_unsafe_loading() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not {"pickle", "marshal", "shelve", "joblib"} & {name.split(".")[0] for name in imports(path)}, path
        assert "trust_remote_code=True" not in text, path
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, path
            assert "yaml.load(" not in line, path

"""Imports point down, and heavy or optional packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "rankalign"
L0 = {
    "errors",
    "files",
    "folders",
    "records",
    "jsonl",
    "journal",
    "manifest",
    "registry",
    "templates",
    "ranked",
    "losses",
    "progress",
}
L1 = {
    "config", "formats", "convert", "mixing", "data", "lint", "lint_rules", "models", "adapters", "default_model",
    "tiny", "weights", "quant", "batching", "tree", "attention", "gemm", "head", "linears", "recompute", "two_pass",
    "logps", "rewards", "engines", "scorers",
}  # fmt: skip
L2 = {
    "stages",
    "shards",
    "runner_ray",
    "generation",
    "training",
    "evaluation",
    "delta",
    "delta_legacy",
    "plan",
    "memory",
    "label",
    "pages",
    "chat",
    "votes",
    "repl",
}
TOP = {"api", "experiment", "iterate", "rounds", "rollouts", "paper", "cli", "commands", "__main__", "__init__"}
LAYER = {**dict.fromkeys(L0, 0), **dict.fromkeys(L1, 1), **dict.fromkeys(L2, 2), **dict.fromkeys(TOP, 3)}
OPTIONAL = {
    "vader": {"rankalign/scorers/builtin.py"},
    "matplotlib": {"rankalign/evaluation"},
    "jinja2": {"rankalign/evaluation"},
    "peft": {"rankalign/models.py", "rankalign/adapters.py", "rankalign/delta.py"},
    "ray": {"rankalign/runner_ray.py"},
    "openai": {"rankalign/engines/openai_client.py"},
    "rouge_score": {"rankalign/evaluation/lexical.py"},
    "vllm": {"rankalign/engines/vllm.py"},
    "gradio": {"rankalign/pages/chat.py"},
    "uvicorn": {"rankalign/pages/chat.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The module or sub-package of rankalign that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def internal(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("rankalign.")} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = LAYER[unit(path)]
    above = {name for name in internal(path) if LAYER[name] > here}
    assert not above, f"{path.name} (layer {here}) imports {above}"


def test_every_module_has_a_layer() -> None:
    assert {unit(path) for path in FILES} <= set(LAYER)


def test_no_cycles_between_units() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(unit(path), set()).update(internal(path) - {unit(path)})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for below in graph.get(name, ()):
                visit(below, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_losses_import_torch_and_each_other_alone() -> None:
    for path in [PACKAGE / "ranked.py", *(PACKAGE / "losses").glob("*.py")]:
        assert internal(path) <= {"losses", "ranked", "errors"}
        outside = {name.split(".")[0] for name in imports(path)} - {"rankalign", "torch", "__future__"}
        import sys

        assert outside <= set(sys.stdlib_module_names)


def test_training_is_apart_from_sampling_and_evaluation() -> None:
    for path in (PACKAGE / "training").glob("*.py"):
        assert not internal(path) & {"engines", "scorers", "evaluation", "generation"}


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

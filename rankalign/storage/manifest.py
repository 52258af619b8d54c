"""The manifest of a finished stage: what went in, with which settings and versions, and what came out. Written last.

Its paths are relative to the folder that it lies in, so it can be checked from anywhere and wherever it is copied.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rankalign
from rankalign.errors import InputError
from rankalign.storage.files import sha256_file, write_text
from rankalign.storage.journal import differences
from rankalign.storage.jsonl import dumps, loads, without_nan
from rankalign.storage.sources import shards

CLAIM = "settings.json"  # in the folder of a run of several stages, from its beginning on
RELATIVE = "place"  # stands in manifests whose paths are relative to them
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "tokenizers", "numpy")


def path_for(output: str | os.PathLike[str]) -> Path:
    """``DIR/manifest.json`` for a folder, ``FILE.manifest.json`` for a file."""
    target = Path(output)
    return target / "manifest.json" if target.is_dir() else target.with_name(target.name + ".manifest.json")


@dataclass(frozen=True)
class Entry:
    """One file of a manifest.

    Attributes:
        role: ``input`` or ``output``.
        name: its path as the manifest has it.
        path: where it is, if it is still there.
        digest: its SHA-256 when the manifest was written.
    """

    role: str
    name: str
    path: Path
    digest: str

    def now(self) -> str | None:
        """Its SHA-256 now, None where it is gone."""
        return sha256_file(self.path) if self.path.is_file() else None


def hashes(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """SHA-256 by path; of a folder, each file in it but its manifest; of a pattern, each file that it names."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        if not path.is_dir():
            files = [path] if path.exists() else shards(path) or [path]
        found.update({str(p): sha256_file(p) for p in files if p.name != "manifest.json"})  # no file holds its own hash
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"rankalign": rankalign.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(
    output: str | os.PathLike[str],
    stage: str,
    settings: dict[str, Any],
    inputs: Sequence[str | os.PathLike[str]],
    outputs: Sequence[str | os.PathLike[str]],
    **facts: Any,
) -> Path:
    """Write the manifest of ``output``; call it after everything else is on disk.

    Args:
        output: file or folder the manifest belongs to.
        stage: name of the stage.
        settings: everything the result depends on, resolved.
        inputs: files or folders read.
        outputs: files or folders written, hashed for ``verify``.
        **facts: counts, metrics, seconds and whatever else describes the run.
    """
    target = path_for(output)
    content = {
        "stage": stage,
        "settings": settings,
        RELATIVE: _place(target),
        "inputs": _relative(hashes(inputs), target),
        "outputs": _relative(hashes(outputs), target),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        **facts,
    }
    write_text(target, dumps(without_nan(content)) + "\n")
    return target


def read(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of ``output``, or None where there is none: that stage is not finished."""
    try:
        return dict(loads(path_for(output).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path_for(output)}: {error}; delete it and start over with --overwrite") from None


def is_finished(output: str | os.PathLike[str], settings: dict[str, Any]) -> bool:
    """Whether ``output`` was made with just these settings and is unchanged since.

    Raises:
        InputError: it is there but was made with other settings, or was changed afterwards.
    """
    found = read(output) if Path(output).exists() else None
    if found is None:
        return False
    # Compared as JSON has them: tuples of the settings are lists in the manifest.
    if changed := differences(found["settings"], loads(dumps(settings))):
        raise InputError(
            f"{output} was made with other settings ({'; '.join(changed[:4])}); "
            "name another output or replace it with --overwrite"
        )
    for entry in changed_files(path_for(output), found, ("output",)):
        raise InputError(f"{entry['path']} {entry['reason']} since it was made; replace it with --overwrite")
    return True


def claim(folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Note the settings of a run of several stages that begins, in ``settings.json``; a begun one must have the same.

    Each stage checks its own, but what they did before a kill may be unread by the stage that comes next.

    Raises:
        InputError: the run was begun under other settings.
    """
    path = Path(folder) / CLAIM
    plain = loads(dumps(settings))
    if path.exists():
        try:
            begun = loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: {error}; start over with --overwrite") from None
        if changed := differences(begun, plain):
            raise InputError(
                f"{folder} was begun with other settings ({'; '.join(changed[:4])}); "
                "go on with those, name another output, or start over with --overwrite"
            )
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(plain) + "\n")


# --- files -------------------------------------------------------------------------------------------------------


def entries(path: Path, content: dict[str, Any]) -> list[Entry]:
    """The files of a manifest.

    Manifests of version 0.1.0 hold paths as they were typed, relative to the working directory of then. Of those, what
    was written is sought beside the manifest, since it was written there; what was read, from the working directory.

    Args:
        path: the manifest.
        content: what :func:`read` made of it.
    """
    found = []
    for role in ("input", "output"):
        listed = dict(content[role + "s"])
        for name, digest in listed.items():
            if RELATIVE in content:
                place = Path(os.path.normpath(path.parent / name))
            else:
                place = _beside(path, name, listed) if role == "output" else Path(name)
            found.append(Entry(role, name, place, digest))
    return found


def changed_files(
    path: Path, content: dict[str, Any], roles: Sequence[str] = ("input", "output")
) -> list[dict[str, str]]:
    """Files of a manifest whose bytes are not what they were, as ``{"path", "role", "reason"}``.

    Inputs that are not there because the folder was moved, as :func:`missing_files` names them, are none of these.
    """
    found, moved = [], _moved(path, content)
    for entry in entries(path, content):
        now = entry.now()
        left_behind = now is None and entry.role == "input" and moved
        if entry.role in roles and now != entry.digest and not left_behind:
            reason = "is gone" if now is None else "has changed"
            found.append({"path": str(entry.path), "role": entry.role, "reason": reason})
    return found


def missing_files(path: Path, content: dict[str, Any]) -> list[str]:
    """Inputs that stayed behind when the folder was moved or copied, and so cannot be checked."""
    if not _moved(path, content):
        return []
    return [str(entry.path) for entry in entries(path, content) if entry.role == "input" and entry.now() is None]


def beneath(output: str | os.PathLike[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Manifests of the stages whose results lie in a run's folder, with their content; its own is not among them."""
    root = Path(output)
    paths = sorted([*root.rglob("manifest.json"), *root.rglob("*.manifest.json")]) if root.is_dir() else []
    for path in paths:
        if path == path_for(output):
            continue
        try:
            content = loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: {error}; it is damaged, so what it lists cannot be checked") from None
        if isinstance(content, dict) and {"stage", "inputs", "outputs"} <= content.keys():  # else another tool's
            yield path, content


def _relative(found: dict[str, str], target: Path) -> dict[str, str]:
    folder = os.path.abspath(target.parent)
    return {Path(os.path.relpath(os.path.abspath(path), folder)).as_posix(): sha for path, sha in found.items()}


def _place(path: Path) -> str:
    """A name for the folder of a manifest that tells whether it was moved and not where it was."""
    return hashlib.sha256(os.path.abspath(path.parent).encode()).hexdigest()[:16]


def _moved(path: Path, content: dict[str, Any]) -> bool:
    return RELATIVE in content and content[RELATIVE] != _place(path)


def _beside(path: Path, name: str, listed: dict[str, str]) -> Path:
    """Where an output lies that a manifest of version 0.1.0 names from a forgotten working directory."""
    common = Path(os.path.commonpath([str(Path(other).parent) for other in listed]))
    return path.parent / Path(name).relative_to(common)

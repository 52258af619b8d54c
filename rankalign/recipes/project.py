"""The settings, prompts and demo data that come with the toolkit, with or without a clone of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import rankalign
from rankalign.errors import InputError
from rankalign.storage.folders import new_folder

# As setup.py has them; a test holds the two lists together.
FOLDERS = (
    "data_generation/configs",
    "data_generation/demo",
    "data_generation/judge_prompts",
    "eval/configs",
    "train_scripts/accelerate",
    "train_scripts/configs",
    "train_scripts/deepspeed",
)
DEMO = "eval/configs/demo.yaml"


def root() -> Path:
    """The folder under which :data:`FOLDERS` stand: inside an installed package, or the clone that it runs from.

    Raises:
        InputError: neither is there, as in a copy of the package's modules alone.
    """
    package = Path(rankalign.__file__).parent
    for place in (package / "project", package.parent):
        if (place / DEMO).is_file():
            return place
    raise InputError(
        f"the settings and demo data are not beside {package}; install the wheel, or run from a clone of the repository"
    )


def lay_out(folder: str) -> list[str]:
    """Make a project folder: the shipped settings and prompts under the names that the documentation uses, a README
    and a script that runs the whole path.

    Args:
        folder: a path where nothing is, or an empty folder.

    Returns:
        The files made, relative to the folder, sorted.

    Raises:
        InputError: something is there already; nothing of it is touched.
    """
    target = Path(folder)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise InputError(f"{folder} is not empty; name a new folder")
    if not target.exists():
        with new_folder(target) as fresh:
            _fill(fresh)
    else:  # made by hand, perhaps where the shell stands: it stays, and what goes into it is moved in when whole
        with new_folder(target / ".project") as fresh:
            _fill(fresh)
        for part in sorted((target / ".project").iterdir()):
            part.rename(target / part.name)
        (target / ".project").rmdir()
    return sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())


def _fill(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(root() / name, folder / name)
    for file in sorted((Path(__file__).parent / "starter").iterdir()):
        shutil.copy(file, folder / file.name)

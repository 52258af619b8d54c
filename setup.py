"""What setup.cfg cannot say: the repository's settings, prompts and demo data travel inside the wheel.

They stand where the documentation names them, and only there; `rankalign init` and `rankalign demo` read them from
`rankalign/project` of an installed package and from the repository of a clone (rankalign/recipes/project.py).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = (
    "data_generation/configs",
    "data_generation/demo",
    "data_generation/judge_prompts",
    "eval/configs",
    "train_scripts/accelerate",
    "train_scripts/configs",
    "train_scripts/deepspeed",
)


class WithProject(build_py):
    """Copies the folders beside the package's modules."""

    def run(self):
        """Build as ever, then copy."""
        super().run()
        if self.editable_mode:  # a clone has them at its own root
            return
        for folder in FOLDERS:
            target = Path(self.build_lib, "rankalign", "project", folder)
            shutil.rmtree(target, ignore_errors=True)  # a file that is gone must not come from an older build
            shutil.copytree(folder, target)


setup(cmdclass={"build_py": WithProject})

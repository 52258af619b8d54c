"""What the documentation's site takes from outside its folder: the measured tables, the history, the ways of working.

Pages link to those files where they lie in the repository, so that the links work there too; here they become pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))  # mkdocs loads this file by its path

from docs.run_notebooks import NOTEBOOKS, load, to_markdown

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "../benchmarks/RESULTS.md": "benchmarks.md",
    "../CHANGELOG.md": "changelog.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../README.md": "index.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside as pages that the navigation does not list."""
    for source, name in OUTSIDE.items():
        if files.get_file_from_path(name) is None:
            text = (ROOT / "docs" / source).resolve().read_text(encoding="utf-8")
            text = re.sub(r"\]\(docs/", "](", text)
            files.append(File.generated(config, name, content=text))
    for path in NOTEBOOKS:  # each becomes a page; the notebook itself stands beside it, to be opened in Jupyter
        content = to_markdown(load(path), path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def on_config(config: Any) -> Any:
    """Leave the added pages out of the check for pages that no menu lists."""
    config["not_in_nav"] = None
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at the added pages; a folder or script of the repository is named, not linked."""
    for source, name in OUTSIDE.items():
        markdown = markdown.replace(f"]({source}", f"]({name}")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)

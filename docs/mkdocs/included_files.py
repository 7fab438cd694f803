"""Hook of mkdocs: a page may consist of a file from the root of the project.

The line `<!-- file: CONTRIBUTING.md -->` is replaced by the text of the file. Links of that file into `docs/` are
written relative to the page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_INCLUDE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the text of a page with its files put in. mkdocs calls this for each page."""
    return _INCLUDE.sub(lambda match: file_text(match[1]), markdown)


def file_text(name: str) -> str:
    """Return the text of a file in the root as a page directly in `docs/` shows it."""
    return (_ROOT / name).read_text().replace("](docs/", "](")

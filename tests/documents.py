"""The blocks of code in the documents, and how each of them is run.

    python -m tests.documents

prints the number of blocks, and those that no test and no script runs, with the reason.

A block is marked by a comment directly above it where the generic tests do not run it as it is:

- `<!-- run by: FILE, FILE -->`: these files run it, or its commands with other arguments.
- `<!-- not run: REASON -->`: nothing here can run it.

A block of Python is followed by a block of `text` if the page shows its output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PROBLEMS = "docs/problems/"
# Run as they are, if not marked.
RUN = ("python", "sh")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>run by|not run): (?P<mark>[^\n]*) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `output` is the text below a Python block, None if the page shows none."""

    page: str
    line: int
    language: str
    text: str
    run_by: tuple[str, ...] = ()
    not_run: str = ""
    output: str | None = None

    @property
    def as_it_is(self) -> bool:
        """True if tests and scripts run the block without a mark."""
        return self.language in RUN and not (self.run_by or self.not_run)

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell: the lines of `sh`, and the lines after a prompt of `console`."""
        if self.language == "console":
            return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]
        return [line for line in self.text.splitlines() if line]


def pages(root: Path = _ROOT) -> list[Path]:
    """All documents with code, in the order of launch/nightly.sh: trainings come before the pages that use them."""
    docs = sorted(path for path in (root / "docs").rglob("*.md"))
    problems = [path for path in docs if str(path.relative_to(root)).startswith(_PROBLEMS)]
    others = [path for path in docs if path not in problems]
    return [root / "README.md", *problems, *others, root / "CONTRIBUTING.md"]


def blocks_of(text: str, page: str = "") -> list[Block]:
    """The blocks of a page in order."""
    found: list[Block] = []
    end = 0
    for match in _BLOCK.finditer(text):
        marked = [entry.strip() for entry in (match["mark"] or "").split(",")] if match["kind"] == "run by" else []
        block = Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["text"],
            tuple(marked),
            match["mark"] if match["kind"] == "not run" else "",
        )
        before = found[-1] if found else None
        if (
            before
            and before.language == "python"
            and block.language == "text"
            and not text[end : match.start()].strip()
        ):
            found[-1] = Block(**{**vars(before), "output": block.text})
        else:
            found.append(block)
        end = match.end()
    return found


def all_blocks() -> list[Block]:
    """The blocks of all documents."""
    return [block for page in pages() for block in blocks_of(page.read_text(), str(page.relative_to(_ROOT)))]


def shown_commands(blocks: Iterable[Block]) -> list[str]:
    """The commands that are run as they are, each once, in the order of the pages."""
    return list(
        dict.fromkeys(
            command
            for block in blocks
            if block.language == "sh" and block.as_it_is
            for command in block.commands
        )
    )  # fmt: skip


def report(blocks: list[Block]) -> str:
    """Numbers of blocks, and those that are not run."""
    run, elsewhere = Counter[str](), Counter[str]()
    for block in blocks:
        if block.language in (*RUN, "console"):
            run[block.language] += block.as_it_is
            elsewhere[block.language] += bool(block.run_by)
    not_run = [block for block in blocks if block.not_run]
    lines = [
        f"{run['python']} blocks of Python are run as they are, {elsewhere['python']} by other tests",
        f"{run['sh']} blocks of shell are run as they are ({len(shown_commands(blocks))} commands), "
        f"{elsewhere['sh'] + elsewhere['console']} by other tests",
        f"{len(not_run)} not run:",
        *(f"  {block.page}:{block.line}: {block.not_run}" for block in not_run),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(all_blocks()))

"""Extension of griffe: makes the project's docstrings Markdown as the site reads it.

In the source a titled part of a docstring is a title with an indented text below it, and a list follows its
introduction without an empty line. In Python's Markdown the first would run into one paragraph, and the second would
be no list. Classes without a docstring show that of their base.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_PART = re.compile(r"(?:\A|(?<=\n\n))(?P<title>\S[^\n]*)\n(?P<text>(?: {4}[^\n]*\n|\n(?= {4}))+)")
_LIST = re.compile(r"(?<=\n)(?P<before>(?![-*] |\d+\. | |\n)[^\n]+\n)(?=[-*] )")


class DocstringLayout(griffe.Extension):
    """Lay out every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = laid_out(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Give a class without a docstring that of its base, as Python's `inspect.getdoc` does."""
        inherit(pkg)


def inherit(module: griffe.Module) -> None:
    """Go through the classes of a module and of the modules in it."""
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            inherit(member)
        elif isinstance(member, griffe.Class) and member.docstring is None:
            documented = [base.docstring for base in member.mro() if base.docstring is not None]
            member.docstring = documented[0] if documented else None


def laid_out(docstring: str) -> str:
    """Return a docstring with a paragraph for each title, and an empty line before each list."""
    text = _PART.sub(lambda part: f"**{part['title']}**\n\n{textwrap.dedent(part['text'])}", docstring.rstrip() + "\n")
    return _LIST.sub(lambda found: f"{found['before']}\n", f"\n{text}").strip()

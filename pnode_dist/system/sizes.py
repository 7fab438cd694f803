"""Numbers of bytes for people."""

from __future__ import annotations


def format_size(size: float) -> str:
    """Bytes for people: `format_size(3 * 2**20) == "3.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

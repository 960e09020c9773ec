"""Text of a model on its way to a terminal."""

from __future__ import annotations

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def for_terminal(text: str) -> str:
    """Text without control characters but newline and tab: a model must not move the cursor, set the
    clipboard or change the title of a terminal."""
    return text.translate(_CONTROLS)

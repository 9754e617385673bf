"""Keys and values as MLflow takes them."""

from __future__ import annotations

import re

_MOST_KEY = 250


def as_key(text: str) -> str:
    """A key: letters, digits, space and `_-.`, in groups parted by slashes."""
    words = [re.sub(r"[^\w\-. ]", "_", word).strip(". ") for word in text.split("/")]
    return shortened("/".join(word for word in words if word) or "_", _MOST_KEY)


def shortened(text: str, most: int) -> str:
    """The text, cut to so many characters with a word that it was."""
    if len(text) <= most:
        return text
    note = f"... ({len(text)} characters)"
    return text[: most - len(note)] + note

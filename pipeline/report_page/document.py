"""The frame of every page: its head, its style, the way to its sections. One file, no network needed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

Section = tuple[str, str, str]
"""What a link calls it, its title, and its HTML; one that is empty is left out."""


def document(title: str, heading: str, lead: str, *, tiles: str, sections: Sequence[Section]) -> str:
    """The HTML text. `title`, `heading` and `lead` are plain text; `tiles` is HTML."""
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{text}</section>' for key, name, text in shown)
    style = files("pipeline.report_page").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} – volseg</title><style>{style}</style></head><body>"
        f'<header><h1>{escape(heading)}</h1><p class="lead">{escape(lead)}</p>{tiles}<nav>{links}</nav></header>'
        f"<main>{body}</main></body></html>\n"
    )

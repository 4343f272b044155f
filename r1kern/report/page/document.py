"""The page around the sections: one file, which loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from pathlib import Path

from r1kern import __version__
from r1kern.report.page.text import safe

HERE = Path(__file__).parent


def document(title: str, kind: str, tabs: list[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        kind: what the page is of: "run", "pipeline", "evaluation".
        tabs: (name, HTML) of each; one alone has no bar of tabs.
    """
    style, script = (HERE / "page.css").read_text(), (HERE / "page.js").read_text()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    now = datetime.now().astimezone()
    bar = "".join(f'<a href="#tab-{i}">{safe(name)}</a>' for i, (name, _) in enumerate(tabs))
    body = "".join(
        f'<section id="tab-{i}"><h2>{safe(name)}</h2>{html}</section>'
        for i, (name, html) in enumerate(tabs)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{style}</style></head><body>"
        f'<header class="page"><h1>{safe(title)}</h1>'
        f'<p class="quiet">{safe(kind)} · written {now:%Y-%m-%d %H:%M %Z} by r1kern '
        f"{safe(__version__)}</p></header>"
        f"{f'<nav>{bar}</nav>' if len(tabs) > 1 else ''}<main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )

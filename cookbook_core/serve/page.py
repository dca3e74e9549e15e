"""The page for people: models, programs, queue, steps, losses, memory and checkpoints, as HTML."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from cookbook_core.serve.models import Model
from cookbook_core.serve.service import Service

REFRESH_SECONDS = 3
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 74em; padding: 0 1em }
h1 { font-size: 1.3em } h2 { font-size: 1.05em; margin: 1.6em 0 .3em }
div { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3em 1em .3em 0; border-bottom: 1px solid #8884;
         white-space: nowrap; font-variant-numeric: tabular-nums }
th, .note { font-weight: 400; font-size: .9em; opacity: .7 } .note { margin: .4em 0 }
.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 8em }
div:first-of-type td:first-child { width: 13em }
svg { vertical-align: middle; color: #4583f5 }
"""
_NOTE = """loss: the value computed here for the last batch, and the curve of the last 20. Of a loss
function that runs in its program it is the linear surrogate, not the function's value.
passes: forwards for one gradient. waiting: requests of this adapter in the queue."""


def render(service: Service) -> str:
    """The page as it is now; the browser loads it again every REFRESH_SECONDS."""
    now = time.time()
    models, sessions = list(service.models.values()), list(service.sessions.values())
    facts = [
        ("Models served", ", ".join(service.bases)),
        ("Started", _ago(now - service.started_at)),
        ("Requests in the queue", str(service.promises.waiting())),
        ("Snapshots to sample from", str(len(service.samplers))),
        ("Memory of the server", f"{_resident_bytes() / 2**20:,.0f} MiB"),
    ]
    training = [
        (
            m.model_id, m.base.name, str(m.rank or ""), str(m.steps), _loss(m), _curve(m),
            f"{m.passes:g}" if m.losses else "", f"{m.tokens:,}", str(len(m.turns)),
            _ago(now - m.used_at),
        )
        for m in models
    ]  # fmt: skip
    programs = [
        (s.session_id, s.agent, str(sum(m.session == s.session_id for m in models)),
         _ago(now - s.seen_at))
        for s in sessions
    ]  # fmt: skip
    saved = [
        (row["tinker_path"], row["checkpoint_type"], str(row["_step"]),
         f"{row['size_bytes'] / 2**20:.1f} MiB", _ago(now - row["_time"]))
        for row in service.saved.checkpoints()[:10]
    ]  # fmt: skip
    parts = [
        "<h1>cookbook serve</h1>",
        _table((), facts),
        "<h2>Adapters in training</h2>",
        _table(("adapter", "model", "rank", "steps", "loss", "", "passes", "tokens", "waiting",
                "last request"), training, "None. Programs find this server by TINKER_BASE_URL."),
        f'<p class="note">{html.escape(_NOTE)}</p>' if training else "",
        "<h2>Programs</h2>",
        _table(("session", "client", "adapters", "last heard"), programs),
        "<h2>Last checkpoints</h2>",
        _table(("path", "kind", "step", "size", "saved"), saved),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>cookbook serve</title>'
        f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}"><style>{_STYLE}</style>'
        '<meta name="viewport" content="width=device-width">'
        f"</head><body>{''.join(parts)}</body></html>"
    )


class _Markup(str):
    """Text that is HTML already."""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], none: str = "None.") -> str:
    """A table whose second column may wrap; a narrow window scrolls to the others."""
    if not rows:
        return f'<p class="note">{html.escape(none)}</p>'
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(map(_cell, row, count())) + "</tr>" for row in rows)
    return f"<div><table>{f'<tr>{head}</tr>' if heads else ''}{body}</table></div>"


def _cell(content: str, column: int) -> str:
    shown = content if isinstance(content, _Markup) else html.escape(content)
    return f'<td class="wrap">{shown}</td>' if column == 1 else f"<td>{shown}</td>"


def _loss(model: Model) -> str:
    return f"{model.losses[-1]:.5g}" if model.losses else ""


def _curve(model: Model) -> str:
    """The last losses as a small picture."""
    values = list(model.losses)
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    points = " ".join(
        f"{2 + 76 * i / (len(values) - 1):.1f},{20 - 18 * (v - low) / ((high - low) or 1):.1f}"
        for i, v in enumerate(values)
    )
    return _Markup(
        f'<svg width="80" height="22" role="img" aria-label="last {len(values)} losses">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def _ago(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{max(0, seconds):.0f} s ago"


def _resident_bytes() -> int:
    """Memory that this process holds; 0 where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0

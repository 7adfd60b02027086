"""The map for the browser: one page with everything in it, which asks for nothing from anywhere."""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import gzip
import hashlib
import html
import json
from importlib.resources import files
from string import Template

import torch
from torch import Tensor

from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.plots.colors import DARK, LIGHT
from kasmina_ext.plots.seed_map import SeedMap, heading, seed_map
from kasmina_ext.seed_record import SeedHistory

_MAX_CELLS = 2_500_000
_MAX_BYTES = 4_500_000
"""Of the data, as they stand in the page: seeds are put together until they fit."""
_NO_ALPHA = 255


def page(history: SeedHistory, title: str | None = None) -> str:
    """HTML. Rows are seeds while these fit into about 5 MB, else blocks of them. The same history gives the same text."""
    columns = min(len(history.steps), 512)
    rows = max(1, _MAX_CELLS // columns)
    while True:
        shown = seed_map(history, rows, columns)
        data = base64.b64encode(gzip.compress(_packed(shown), 6, mtime=0)).decode()
        if len(data) <= _MAX_BYTES or len(shown.state) <= len(shown.layers):
            break
        rows = len(shown.state) // 2
    style, script = _text("page.css"), _text("page.js") + _text("page.history.js")
    # Nothing but this style and this script: whatever a name held, it would neither run nor load.
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return Template(_text("page.html")).substitute(
        policy=policy,
        title=html.escape(heading(title)),
        summary=html.escape(shown.title),
        note=html.escape(shown.note),
        style=style,
        script=script,
        page=_json(shown),
        data=data,
    )


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(shown: SeedMap) -> str:
    """What a script element may hold: nothing in it can end the element."""
    content = {
        "layers": [dataclasses.asdict(layer) for layer in shown.layers],
        "block": shown.block,
        "steps": shown.steps,
        "states": [state.name.lower().replace("_", " ") for state in ExtendedLifecycle],
        "credit_limit": shown.credit_limit,
        "change_range": shown.change_range,
        "light": dataclasses.asdict(LIGHT),
        "dark": dataclasses.asdict(DARK),
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(shown: SeedMap) -> bytes:
    """State, alpha, credit and change of all rows, byte by byte; the seeds in the rows' order, where rows are blocks.

    Numbers of several bytes come as all their first bytes, then all their second ones: neighbours
    are alike, which compresses well.
    """
    alpha = torch.where(shown.alpha.isnan(), _NO_ALPHA, (shown.alpha.clamp(0, 1) * (_NO_ALPHA - 1)).round())
    planes = [shown.state, alpha]
    for values in (shown.credit, shown.change):
        bits = values.bfloat16().contiguous().view(torch.int16).int()
        planes += [bits >> 8 & 0xFF, bits & 0xFF]
    if shown.block > 1:
        planes += [shown.order >> shift & 0xFF for shift in (16, 8, 0)]
    return b"".join(_bytes(plane.to(torch.uint8)) for plane in planes)


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())

"""The map of seeds: what is put together against a count by hand, colours that all can tell apart, and the files."""

from __future__ import annotations

import base64
import gzip
import html.parser
import importlib
import io
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from threads import keep_threads
from torch import nn

from kasmina_ext import KasminaLayer, Seeds, fold_, unfold_
from kasmina_ext.lifecycle import ExtendedLifecycle as State
from kasmina_ext.plots import plot, seed_map
from kasmina_ext.plots.colors import DARK, LIGHT
from kasmina_ext.plots.html import page
from kasmina_ext.plots.picture import picture
from kasmina_ext.seed_record import NO_STATE, SeedHistory, SeedRecord


def history_of(sizes: list[int], columns: int, seed: int = 0, begun: float = 1.0) -> SeedHistory:
    """Any states and numbers at all, some of them unknown; only a share of the seeds has ``begun``."""
    random = torch.Generator().manual_seed(seed)
    shape = (columns, sum(sizes))
    state = torch.randint(0, len(State), shape, generator=random, dtype=torch.uint8)
    state[torch.rand(shape, generator=random) < 0.05] = NO_STATE
    state[:, torch.rand(shape[1], generator=random) >= begun] = 0
    alpha, change = (torch.rand(shape, generator=random) for _ in range(2))
    credit = torch.randn(shape, generator=random)
    credit[torch.rand(shape, generator=random) < 0.3] = torch.nan
    names = {f"layer {number}": size for number, size in enumerate(sizes)}
    return SeedHistory(
        names, [7 * k for k in range(columns)], state, alpha.half(), credit.bfloat16(), change.bfloat16()
    )


# ---- the map ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), st.integers(1, 30), st.integers(0, 10**6)
)
def test_a_map_against_a_count_by_hand(sizes, columns, max_rows, seed):
    history = history_of(sizes, columns, seed)
    shown = seed_map(history, max_rows)
    assert len(shown.state) <= max(max_rows, len(sizes)) and shown.steps == history.steps
    block = shown.block
    smaller = sum(math.ceil(size / (block - 1)) for size in sizes) if block > 1 else math.inf
    assert smaller > max_rows, "no more is put together than must be"
    start, seeds = 0, []
    for layer, size in zip(shown.layers, sizes, strict=True):
        ids = shown.order[start : start + size].tolist()
        assert sorted(ids) == list(range(size)) and (block > 1 or ids == sorted(ids))
        rows = [ids[i : i + block] for i in range(0, size, block)]
        assert layer.rows == len(rows) and layer.first == len(seeds) and layer.seeds == size
        seeds += [[start + one for one in row] for row in rows]
        start += size
    assert len(seeds) == len(shown.state)
    for row, ids in enumerate(seeds):
        for k in range(columns):
            states = history.state[k, ids].tolist()
            counts = Counter(states)
            most = max(counts.values())
            commonest = [one for one, count in counts.items() if count == most]
            later = [one for one in commonest if one != NO_STATE] or [NO_STATE]
            assert shown.state[row, k] == max(later)
            here = [one for one, what in zip(ids, states, strict=True) if State.GRAFTING <= what <= State.FOSSILIZED]
            alphas, changes = (getattr(history, name)[k, here].float() for name in ("alpha", "change"))
            credits = [value for value in history.credit[k, ids].tolist() if not math.isnan(value)]
            assert _like(shown.alpha[row, k], alphas.mean() if here else math.nan)
            assert _like(shown.change[row, k], changes.max() if here else math.nan)
            assert _like(abs(shown.credit[row, k]), max(map(abs, credits), default=math.nan))
            assert not credits or shown.credit[row, k] in credits


def _like(found: torch.Tensor, expected: float | torch.Tensor) -> bool:
    return math.isclose(found, expected, rel_tol=1e-5) or (math.isnan(found) and math.isnan(expected))


def test_blocks_are_of_seeds_that_began_together():
    state = torch.zeros(6, 9, dtype=torch.uint8)
    for seed, begun in ((7, 1), (2, 1), (5, 3), (0, 4)):
        state[begun:, seed] = int(State.TRAINING)
    state[5, 2] = int(State.CULLED)
    blank = torch.zeros(6, 9)
    history = SeedHistory({"one": 9}, list(range(6)), state, blank.half(), blank.bfloat16(), blank.bfloat16())
    assert seed_map(history, 5).order.tolist() == [7, 2, 5, 0, 1, 3, 4, 6, 8]
    assert seed_map(history, 9).order.tolist() == list(range(9))


def test_of_many_snapshots_some_are_shown_and_it_says_so():
    history = history_of([3], 1000)
    shown = seed_map(history, 10, 300)
    assert len(shown.steps) == 250 and shown.steps[-1] == history.steps[-1]
    assert "250 of 1,000 snapshots are shown" in shown.note
    assert "A row is 2 seeds" in seed_map(history, 2).note and seed_map(history, 3).note.count("A row") == 0
    assert seed_map(history_of([1], 1), 1).title == "1 seed in 1 layer, 1 snapshot"


def test_scales_are_of_what_is_finite():
    blank = torch.full((1, 200), torch.nan)
    state = torch.full((1, 200), int(State.FOSSILIZED), dtype=torch.uint8)
    credit, change = blank.clone(), blank.clone()
    shown = seed_map(SeedHistory({"": 200}, [0], state, blank.half(), credit.bfloat16(), change.bfloat16()), 200)
    assert shown.credit_limit == 0 and shown.change_range == (0, 0)
    credit[0, :101], change[0, :4] = torch.arange(101) - 50.0, torch.tensor([1e-9, 0.5, 0.0, torch.inf])
    credit[0, 150:152] = torch.tensor([torch.inf, -torch.inf])
    shown = seed_map(SeedHistory({"": 200}, [0], state, blank.half(), credit.bfloat16(), change.bfloat16()), 200)
    assert shown.credit_limit == 50 and shown.change_range == pytest.approx((0.0005, 0.5))
    credit[0, 0] = 1e9  # one of many is beyond the scale
    shown = seed_map(SeedHistory({"": 200}, [0], state, blank.half(), credit.bfloat16(), change.bfloat16()), 200)
    assert shown.credit_limit == 50


# ---- colours ---------------------------------------------------------------------------------------------------------

# What the three kinds of dichromats see, in linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "all": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Oklab (Ottosson 2020): distances are about as large as differences look.
LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
       [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
       [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])


def seen(color: str, sight: str) -> np.ndarray:
    value = rgb(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.array(LAB) @ np.cbrt(np.array(LMS) @ np.clip(np.array(SIGHT[sight]) @ linear, 0, 1))


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_states_can_be_told_apart(palette, sight):
    assert len(palette.states) == len(State)
    for one, two in itertools.combinations(State, 2):
        distance = np.linalg.norm(seen(palette.states[one], sight) - seen(palette.states[two], sight))
        assert distance > 0.06, (one.name, two.name)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_more_is_further_from_the_background(palette):
    """Credit on both sides of nothing, which is told apart by hue as well."""
    for sight in SIGHT:
        for stops in (palette.alpha, palette.change, palette.credit[2:], palette.credit[2::-1]):
            lightness = [seen(color, sight)[0] for color in stops]
            assert lightness == sorted(lightness, reverse=palette is LIGHT)
        harm, help_ = (seen(palette.credit[at], sight) for at in (1, 3))
        assert np.linalg.norm(harm - help_) > 0.1


# ---- pictures --------------------------------------------------------------------------------------------------------


def shares(png: bytes, colors: list[str]) -> list[float]:
    """Of the picture, in each of these colours."""
    pixels = np.round(imread(io.BytesIO(png))[:, :, :3] * 255)
    return [(np.abs(pixels - rgb(color)).max(2) <= 1).mean() for color in colors]


@pytest.mark.parametrize("sizes", [[1], [6, 4], [50_000, *[1250] * 40]], ids=lambda sizes: str(sum(sizes)))
def test_png_of_any_number_of_seeds(sizes):
    state = torch.full((6, sum(sizes)), int(State.FOSSILIZED), dtype=torch.uint8)
    state[:3] = int(State.TRAINING)
    numbers = torch.ones(state.shape)
    layers = {f"encoder.layers.{i}.a_name_that_is_longer_than_there_is_room_for": size for i, size in enumerate(sizes)}
    history = SeedHistory(
        layers, [10, 20, 30, 40, 50, 60], state, numbers.half(), numbers.bfloat16(), numbers.bfloat16()
    )
    png = picture(history, "png")
    fossilized, training, alpha, change = shares(
        png, [LIGHT.states[State.FOSSILIZED], LIGHT.states[State.TRAINING], LIGHT.alpha[-1], LIGHT.change[-1]]
    )
    assert fossilized == pytest.approx(training, rel=0.1) and min(fossilized, alpha, change) > 0.02
    assert len(png) < 300_000


def test_pictures_of_everything_and_of_nothing(tmp_path):
    """And the same history gives the same bytes."""
    nothing = torch.full((1, 3), torch.nan)
    blank = SeedHistory({"": 3}, [-5], torch.full((1, 3), NO_STATE, dtype=torch.uint8), nothing.half(),
                        nothing.bfloat16(), nothing.bfloat16())  # fmt: skip
    broken = history_of([5, 5], 4)
    for values, value in ((broken.alpha, torch.inf), (broken.credit, -torch.inf), (broken.change, torch.inf)):
        values[0] = value
    same = history_of([3], 3)
    same.credit[:], same.change[:] = 0.0, 0.25
    named = history_of([2, 2], 3)
    named.layers.clear()
    named.layers.update({"$\\frac{1}{$": 2, "_x^{2}%\n": 2})
    for number, history in enumerate((blank, broken, same, named)):
        assert len(plot(history, tmp_path / f"{number}.png").read_bytes()) > 10_000
        assert len(plot(history, tmp_path / f"{number}.html").read_bytes()) > 10_000
    for kind in ("svg", "pdf", "png"):
        path = plot(named, tmp_path / f"named.{kind}")
        first = path.read_bytes()
        assert len(first) > 10_000 and plot(named, path).read_bytes() == first


def test_what_cannot_be_plotted_is_said(tmp_path, monkeypatch):
    history = history_of([3], 2)
    for name in ("map.jpg", "map", "map.html.gz"):
        with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf or \.html"):
            plot(history, tmp_path / name)
    layer = KasminaLayer(nn.Linear(4, 8), num_seeds=2)
    with pytest.raises(ValueError, match="no snapshots"):
        plot(SeedRecord(layer).history(), tmp_path / "map.html")
    with pytest.raises(OSError):
        plot(history, tmp_path / "no" / "such" / "map.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"kasmina_ext\[plots\]"):
        plot(history, tmp_path / "map.png")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"kasmina_ext\[plots\]"):
        history.save(tmp_path / "history.safetensors")
    for arguments, message in (
        ((Seeds(layer), tmp_path / "map.html"), "history must be a SeedHistory, .* got Seeds"),
        ((history, tmp_path / "map.html"), "title must be a str, got int"),
    ):
        with pytest.raises(TypeError, match=message):
            plot(*arguments, title=3)
    assert not list(tmp_path.iterdir())
    plot(history, tmp_path / "map.html")  # needs none of them


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "html"])
def test_names_and_titles_of_what_cannot_be_seen(tmp_path, kind):
    """Halves of surrogates, which fonts and UTF-8 refuse, control characters, which XML refuses, and marks."""
    nothing = ["\ud800", "\x00\x1b\n", "\u202etxt.exe", "&<$x^{"]
    blank = torch.zeros(1, len(nothing))
    layers = dict.fromkeys(nothing, 1)
    history = SeedHistory(layers, [0], blank.byte(), blank.half(), blank.bfloat16(), blank.bfloat16())
    content = plot(history, tmp_path / f"map.{kind}", title="".join(nothing)).read_bytes()
    if kind == "svg":
        shown = [element.text for element in ElementTree.fromstring(content).iter("{http://www.w3.org/2000/svg}text")]
        assert {"\ufffd", "\ufffd" * 3, "\ufffdtxt.exe", "&<$x^{"} <= set(shown)
    elif kind == "html":
        assert [layer["name"] for layer in json.loads(Elements(content.decode()).texts["page"])["layers"]] == nothing


# ---- the page --------------------------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """All elements, and the text in those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self._open = Counter(), {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self._open = dict(attributes).get("id")

    def handle_data(self, data):
        self.texts[self._open] = self.texts.get(self._open, "") + data


@given(st.lists(st.text(max_size=30), min_size=1, max_size=3, unique=True))
def test_names_are_text_whatever_they_are(names):
    names = [*names, "</script><script>alert(1)</script>", "<!--", "]]>&amp;"]
    blank = torch.zeros(1, len(names))
    layers = dict.fromkeys(names, 1)
    history = SeedHistory(layers, [0], blank.byte(), blank.half(), blank.bfloat16(), blank.bfloat16())
    text = page(history, title=names[0])
    found, plain = Elements(text), Elements(page(history_of([1], 1)))
    assert found.tags == plain.tags
    assert [layer["name"] for layer in json.loads(found.texts["page"])["layers"]] == list(layers)
    text.encode()


def test_the_page_holds_what_was_recorded():
    history = history_of([5, 4], 6)
    found = Elements(page(history))
    shown = seed_map(history, 100)
    planes = np.frombuffer(gzip.decompress(base64.b64decode(found.texts["data"])), np.uint8).reshape(6, 9, 6)
    assert np.array_equal(planes[0], shown.state)
    alpha = np.where(planes[1] == 255, np.nan, planes[1] / 254)
    assert np.allclose(alpha, shown.alpha, atol=0.002, equal_nan=True)
    for high, low, values in ((planes[2], planes[3], shown.credit), (planes[4], planes[5], shown.change)):
        bits = high.astype(np.uint32) << 24 | low.astype(np.uint32) << 16
        assert np.array_equal(bits.view(np.float32), values, equal_nan=True)
    about = json.loads(found.texts["page"])
    assert about["steps"] == history.steps and about["block"] == 1
    assert page(history) == page(history)


def test_the_page_refers_to_nothing_outside():
    text = page(history_of([5, 4], 6))
    assert not re.findall(r"(?:https?:)?//\w+\.\w+|\bsrc=|\bhref=|url\(|@import|\bfetch\(|XMLHttp|WebSocket", text)
    assert "default-src 'none'" in text


def test_a_large_page_stays_small():
    """100,000 seeds, a tenth of them alive, all numbers noise: nothing compresses less."""
    text = page(history_of([1000] * 100, 40, begun=0.1))
    assert len(text) < 5_000_000
    assert json.loads(Elements(text).texts["page"])["block"] > 1
    assert len(page(history_of([4], 2))) < 60_000


def test_the_page_that_describes_it(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "plots.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert {path.name for path in tmp_path.iterdir()} == {"seeds.html", "seeds.safetensors", "seeds.png"}


def test_the_documented_picture_is_made(tmp_path, capsys):
    script = importlib.import_module("seed_map")
    with keep_threads():
        assert script.main(["--quick", "--out", str(tmp_path / "new")]) == 0
    history = SeedHistory.load(tmp_path / "new" / "seeds.safetensors")
    assert history.layers == {"0": 12, "2": 12, "4": 12, "6": 12} and history.steps == list(range(1, 49))
    assert not history.credit.isnan().all() and (history.state == int(State.EVALUATING)).any() and history.change.any()
    shown = (tmp_path / "new" / "seeds.html").read_text()
    assert shown == page(history, "A pruned network grows back") and "seeds kept" in capsys.readouterr().out
    assert (tmp_path / "new" / "seeds.png").stat().st_size > 10_000


# ---- as one types it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "html"])
def test_seeds_plot(tmp_path, kind):
    model = nn.Sequential(KasminaLayer(nn.Linear(4, 8), num_seeds=2), KasminaLayer(nn.Linear(8, 6), num_seeds=3))
    seeds = Seeds(model)
    first = seeds.plot(tmp_path / f"a.{kind}").read_bytes()
    assert len(first) > 10_000 and seeds.recorder.steps == []
    for step in (0, 10, 20):
        model[0].lifecycle_states = step // 10
        seeds.record(step, [torch.ones(2), torch.ones(3)] if step else None)
    assert seeds.recorder.layers == {"0": 2, "1": 3} and seeds.recorder.steps == [0, 10, 20]
    path = seeds.plot(str(tmp_path / f"b.{kind}"), title="Mine")
    assert path == tmp_path / f"b.{kind}" and path.read_bytes() != first
    if kind == "html":
        assert "5 seeds in 2 layers, 3 snapshots" in path.read_text() and "<title>Mine</title>" in path.read_text()
    fold_(model)  # there is no layer left, but what was recorded of them
    assert seeds.plot(tmp_path / f"c.{kind}", title="Mine").read_bytes() == path.read_bytes()
    unfold_(model)
    model.append(KasminaLayer(nn.Linear(6, 6), num_seeds=2))
    assert seeds.plot(tmp_path / f"c.{kind}", title="Mine").read_bytes() == path.read_bytes()
    seeds.record(30)
    assert seeds.recorder.layers == {"0": 2, "1": 3, "2": 2} and seeds.recorder.steps == [30]

"""The page of seeds, looked at in a real browser: what is to be seen, what a hover tells, and that nobody is asked anything."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from browsers import NoBrowser, browser
from matplotlib.image import imread

from kasmina_ext.lifecycle import ExtendedLifecycle as State
from kasmina_ext.plots import plot
from kasmina_ext.plots.colors import DARK, LIGHT
from kasmina_ext.seed_record import SeedHistory

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!--&amp;\u2028'"


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    try:
        with browser(tmp_path_factory.mktemp("browser")) as found:
            yield found
    except NoBrowser as error:
        pytest.skip(f"no browser: {error}")


def opened(window, path):
    """The page, drawn."""
    assert window.load(str(path))
    end = time.monotonic() + 20
    while window.run("document.documentElement.dataset.ready") != "yes":
        assert time.monotonic() < end, window.seen()
        window.pause(50)
    window.move(1, 1)
    return window


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])


def seen_at(window, tmp_path, color: str) -> np.ndarray:
    """Where on the map this color is: ``[n, 2]``, y and x."""
    window.shot(str(tmp_path / "shot.png"))
    picture = np.round(imread(tmp_path / "shot.png")[:, :, :3] * 255)
    places = np.argwhere(np.abs(picture - rgb(color)).max(2) <= 2)
    top = window.run("document.getElementById('map').getBoundingClientRect().top")
    return places[places[:, 0] >= top]


def tip(window) -> str:
    """What is told of the seed that is pointed at; "" where none is."""
    return window.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText")


def history_of_ten() -> SeedHistory:
    """Two layers, 8 snapshots. One seed alone is ever fossilized: number 4 of the second layer."""
    state = torch.zeros(8, 10, dtype=torch.uint8)
    state[2:, 1] = int(State.TRAINING)
    state[1:, 8], state[3:, 8] = int(State.GERMINATED), int(State.GRAFTING)
    state[5:, 8] = int(State.FOSSILIZED)
    alpha = torch.ones(8, 10, dtype=torch.float16)
    alpha[3:5, 8] = torch.tensor([0.25, 0.75])
    credit = torch.full((8, 10), torch.nan, dtype=torch.bfloat16)
    credit[5:, 8] = -0.5
    change = torch.zeros(8, 10, dtype=torch.bfloat16)
    change[3:, 8] = torch.tensor([0.125, 0.25, 0.375, 0.5, 0.625])
    return SeedHistory({HOSTILE: 4, "second": 6}, [100 * k for k in range(8)], state, alpha, credit, change)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return plot(history_of_ten(), tmp_path_factory.mktemp("page") / "seeds.html", title=f"Ten {HOSTILE}")


def test_it_is_drawn_and_asks_for_nothing(window, page, tmp_path):
    """And the names of layers do no harm."""
    before = {name: len(values) for name, values in window.seen().items()}
    opened(window, page)
    rows = {}
    for state in (State.DORMANT, State.TRAINING, State.GERMINATED, State.GRAFTING, State.FOSSILIZED):
        places = seen_at(window, tmp_path, LIGHT.states[state])
        assert len(places) > 1000, state.name
        rows[state] = places[:, 0].min()
    height, gap = 24, 7
    below = {state: top - rows[State.DORMANT] for state, top in rows.items()}
    assert below[State.TRAINING] == pytest.approx(1 * height, abs=1)
    assert below[State.FOSSILIZED] == below[State.GRAFTING] == pytest.approx(8 * height + gap, abs=1)
    assert not len(seen_at(window, tmp_path, LIGHT.states[State.CULLED]))
    names = window.run("[...document.getElementById('layer').options].map(each => each.text)")
    assert [" ".join(name.split()) for name in names] == ["all", " ".join(HOSTILE.split()), "second"]
    assert window.run("document.title").startswith("Ten </script><img")
    assert window.run("document.images.length + document.scripts.length") == 3  # its three scripts, no image
    seen = window.seen()
    assert seen["console"][before["console"] :] == []
    assert seen["requests"][before["requests"] :] == [page.as_uri()]


def test_the_page_may_not_speak_to_anybody(window, page):
    """Even a script that got in could not: the policy is there, and not a remark."""
    opened(window, page)
    asked = len(window.seen()["requests"])
    window.run(
        "fetch('https://example.org/').then(() => { document.title = 'sent' }, () => { document.title = 'refused' })"
    )
    window.run(
        "document.body.append(Object.assign(document.createElement('img'), { src: 'https://example.org/a.png' }))"
    )
    window.run(
        "document.body.append(Object.assign(document.createElement('script'), { text: \"document.title = 'ran'\" }))"
    )
    window.pause(300)
    assert window.run("document.title") == "refused"
    assert window.seen()["requests"][asked:] == []


def test_hovering_tells_a_seed_s_history(window, page, tmp_path):
    opened(window, page)
    assert tip(window) == ""
    places = seen_at(window, tmp_path, LIGHT.states[State.FOSSILIZED])
    y, x = places.mean(0)
    window.move(x, y)
    told = tip(window).split()
    assert told[:3] == ["second", "seed", "4"]
    text = " ".join(told)
    assert "at step 600 fossilized alpha 1 credit −0.5 change 0.5" in text
    assert text.endswith("0 dormant 100 germinated 300 grafting 500 fossilized")
    grafting = seen_at(window, tmp_path, LIGHT.states[State.GRAFTING])
    window.move(grafting[:, 1].min() + 3, grafting[0, 0] + 4)
    assert "at step 300 grafting alpha 0.25 credit – change 0.13" in " ".join(tip(window).split())
    # The picture in the tip is drawn, too.
    assert window.run(
        "{ const c = document.querySelector('#tip canvas');"
        " new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size }"
    ) > 8  # fmt: skip
    window.click(grafting[0, 1] + 3, grafting[0, 0] + 4)
    window.move(x, 5)
    assert "seed 4" in tip(window), "a click holds it"
    window.move(1, 1)
    window.key("Escape")
    assert tip(window) == ""


def test_the_keyboard_reaches_everything(window, page):
    opened(window, page)
    for _ in range(12):  # as far as it takes, through the controls
        if window.run("document.activeElement.id") == "view":
            break
        window.key("Tab")
    assert window.run("document.activeElement.id") == "view"
    first = " ".join(HOSTILE.split())
    assert " ".join(tip(window).split()).startswith(f"{first} seed 0 at step 700")
    for _ in range(8):
        window.key("ArrowDown")
    window.key("ArrowLeft")
    assert " ".join(tip(window).split()).startswith("second seed 4 at step 600 fossilized")
    assert "second, seed 4, at step 600 fossilized" in window.run("document.getElementById('said').textContent")
    window.key("Home")
    assert "at step 0 dormant" in " ".join(tip(window).split())
    window.key("ArrowDown")
    window.key("ArrowDown")
    assert "seed 5" in tip(window), "it ends at the last one"
    window.key("Escape")
    assert tip(window) == ""


def test_what_is_shown_can_be_chosen(window, page, tmp_path):
    said = len(window.seen()["console"])
    opened(window, page)
    window.run("document.querySelector('[value=alpha]').click()")
    assert len(seen_at(window, tmp_path, LIGHT.alpha[-1])) > 1000  # alpha 1: three of eight columns
    window.run("document.querySelector('[value=credit]').click()")
    assert len(seen_at(window, tmp_path, LIGHT.credit[0])) > 1000  # the worst there is
    window.run("document.querySelector('[value=change]').click()")
    assert len(seen_at(window, tmp_path, LIGHT.change[-1])) > 500
    assert not len(seen_at(window, tmp_path, DARK.change[-1]))
    window.run("document.getElementById('theme').click()")
    assert len(seen_at(window, tmp_path, DARK.change[-1])) > 500
    window.run("document.querySelector('[value=state]').click()")
    window.run("document.getElementById('grown').click()")
    assert len(seen_at(window, tmp_path, DARK.states[State.FOSSILIZED]))
    assert "2" == window.run("String(shown)"), "two seeds have begun"
    choose = "const s = document.getElementById('layer'); s.value = '0'; s.dispatchEvent(new Event('change'))"
    window.run(f"{{ {choose} }}")
    assert not len(seen_at(window, tmp_path, DARK.states[State.FOSSILIZED])), "it is of the other layer"
    assert len(seen_at(window, tmp_path, DARK.states[State.TRAINING]))
    assert window.seen()["console"][said:] == []


def test_many_seeds(window, tmp_path):
    """Rows are blocks then; a hover names their seeds, and zoom makes them taller."""
    sizes = {f"layers.{i}": 2600 + i for i in range(12)}
    total = sum(sizes.values())
    state = torch.zeros(100, total, dtype=torch.uint8)
    begun = torch.randint(1, 99, (total,), generator=torch.Generator().manual_seed(0))
    begun[2600:] = 1000  # only the first layer's begin
    state[torch.arange(100)[:, None] >= begun] = int(State.FINE_TUNING)
    same = torch.ones(100, total)
    history = SeedHistory(sizes, list(range(100)), state, same.half(), same.bfloat16(), same.bfloat16())
    path = plot(history, tmp_path / "many.html")
    opened(window, path)
    assert "A row is 2 seeds of a layer" in window.run("document.body.innerText")
    places = seen_at(window, tmp_path, LIGHT.states[State.FINE_TUNING])
    # Sorted by when they began: a triangle, half of the first layer's rectangle.
    height, width = np.ptp(places, axis=0) + 1
    assert len(places) == pytest.approx(height * width / 2, rel=0.1)
    window.move(places[:, 1].max() - 2, places[:, 0].min() + 5)
    told = " ".join(tip(window).split())
    assert told.startswith("layers.0 2 seeds: ") and "fine tuning alpha 1 credit 1 change 1" in told
    assert window.run("String(rowHeight < 0.1)") == "true"
    window.run(
        "document.getElementById('zoom').value = 100; document.getElementById('zoom').dispatchEvent(new Event('input'))"
    )
    assert window.run("String(rowHeight)") == "24"

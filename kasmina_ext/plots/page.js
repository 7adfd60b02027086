"use strict";
/* The map of seeds. Rows are seeds or blocks of them, columns are snapshots; see SeedMap in seed_map.py. All text comes
   from JSON and goes into the page as text, never as markup. */

const page = JSON.parse(document.getElementById("page").textContent);
const R = page.layers.reduce((sum, layer) => sum + layer.rows, 0);
const K = page.steps.length;
const GAP = 7, AXIS = 38, TALLEST = 24, NOTHING = 255;
const STATES = page.states;
const $ = (id) => document.getElementById(id);
const view = $("view"), map = $("map"), tip = $("tip");

// ---- the data ------------------------------------------------------------------------------------------------------

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** bfloat16, given as all high bytes and then all low ones. */
function widened(high, low) {
  const bits = new Uint32Array(high.length);
  for (let i = 0; i < bits.length; i++) bits[i] = (high[i] << 24) | (low[i] << 16);
  return new Float32Array(bits.buffer);
}

let state, alpha, credit, change, order, busy;

function take(bytes) {
  let at = 0;
  const next = (count) => bytes.subarray(at, (at += count));
  state = next(R * K);
  alpha = Float32Array.from(next(R * K), (value) => (value === NOTHING ? NaN : value / 254));
  credit = widened(next(R * K), next(R * K));
  change = widened(next(R * K), next(R * K));
  // How many snapshots a row is awake in: where several rows share a pixel, the liveliest is shown.
  busy = new Uint32Array(R);
  for (let i = 0; i < R * K; i++) if (state[i] !== 0) busy[(i / K) | 0]++;
  if (page.block === 1) return;
  const planes = [0, 1, 2].map(() => next((bytes.length - 6 * R * K) / 3));
  order = Uint32Array.from(planes[0], (_, i) => (planes[0][i] << 16) | (planes[1][i] << 8) | planes[2][i]);
}

// ---- what can be shown ---------------------------------------------------------------------------------------------

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const [LEAST, MOST] = page.change_range;
const METRICS = {
  state: { name: "State", shade: (i) => (state[i] < STATES.length ? state[i] : NOTHING) },
  alpha: { name: "Alpha", what: "how much of a seed is blended in", ends: [0, 1],
    shade: (i) => (isNaN(alpha[i]) ? NOTHING : Math.round(alpha[i] * 254)) },
  credit: { name: "Credit", what: "what a seed takes off the loss; below 0: harm",
    ends: page.credit_limit ? [-page.credit_limit, 0, page.credit_limit] : [],
    shade: (i) => (isNaN(credit[i]) || !page.credit_limit ? NOTHING
      : Math.round(127 + 127 * clamp(credit[i] / page.credit_limit, -1, 1))) },
  change: { name: "Size of change", what: "rms of y − x over rms of x, by logarithm", ends: MOST ? [LEAST, MOST] : [],
    shade: (i) => (isNaN(change[i]) || !MOST ? NOTHING : change[i] <= LEAST ? (LEAST < MOST || change[i] < MOST ? 0 : 254)
      : Math.round(254 * clamp(Math.log(change[i] / LEAST) / Math.log(MOST / LEAST), 0, 1))) },
};
let metric = "state";
const shades = {};

function shadesOf(name) {
  if (!shades[name]) shades[name] = Uint8Array.from({ length: R * K }, (_, i) => METRICS[name].shade(i));
  return shades[name];
}

let palette, css, colors;

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const packed = (rgb) => (255 << 24) | (Math.round(rgb[2]) << 16) | (Math.round(rgb[1]) << 8) | Math.round(rgb[0]);

function between(stops, share) {
  const place = share * (stops.length - 1), first = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [channels(stops[first]), channels(stops[first + 1])];
  return a.map((value, i) => value + (b[i] - value) * (place - first));
}

/** For each shade its pixel; the last is that of nothing. */
function pixels(name) {
  const table = new Uint32Array(256).fill(packed(channels(palette.nothing)));
  if (name === "state") palette.states.forEach((color, i) => (table[i] = packed(channels(color))));
  else for (let i = 0; i < 255; i++) table[i] = packed(between(palette[name], i / 254));
  return table;
}

// ---- rows on the screen --------------------------------------------------------------------------------------------

let sections = [], shown = 0, rowHeight = 1, content = 0;

/** Which rows are shown, and where: a section is a layer's, its rows `first` to `first + count` of `rows`. */
function arrange() {
  const wanted = $("layer").value, grown = $("grown").checked;
  sections = [];
  shown = 0;
  page.layers.forEach((layer, number) => {
    if (wanted !== "" && Number(wanted) !== number) return;
    let rows = Array.from({ length: layer.rows }, (_, i) => layer.first + i);
    if (grown) rows = rows.filter((row) => busy[row]);
    if (!rows.length) return;
    sections.push({ layer, rows, first: shown });
    shown += rows.length;
  });
  scale();
}

function scale() {
  const room = view.clientHeight - AXIS - gaps();
  const fit = clamp(room / Math.max(shown, 1), 1e-4, TALLEST);
  rowHeight = fit * (TALLEST / fit) ** ($("zoom").value / 100);
  let top = 0;
  for (const section of sections) {
    section.top = top;
    section.height = section.rows.length * rowHeight;
    top += section.height + gap();
  }
  content = Math.max(0, top - gap());
  $("space").style.height = `${Math.max(0, content - (view.clientHeight - AXIS))}px`;
  draw();
}

const gap = () => (sections.length > 60 ? 1 : sections.length > 24 ? 3 : GAP);
const gaps = () => gap() * Math.max(0, sections.length - 1);

function sectionAt(y) {
  let low = 0, high = sections.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sections[middle].top <= y) low = middle;
    else high = middle - 1;
  }
  return sections[low];
}

/** The place (in the order shown) of the row at `y` of the content, or -1. Of seeds that share a pixel, the liveliest;
    rows of blocks are sorted, so that the first one is as good as any. */
function placeAt(y, pixel) {
  const section = sectionAt(y);
  if (!section || y < 0 || y >= section.top + section.height) return -1;
  const from = Math.min(section.rows.length - 1, Math.floor((y - section.top) / rowHeight));
  const to = Math.min(section.rows.length, Math.ceil((y + pixel - section.top) / rowHeight));
  let best = from;
  if (page.block === 1 && rowHeight < pixel) for (let i = from + 1; i < to; i++) if (busy[section.rows[i]] > busy[section.rows[best]]) best = i;
  return section.first + best;
}

function sectionOf(place) {
  return sections.findLast((section) => section.first <= place);
}

function rowOf(place) {
  const section = sectionOf(place);
  return section.rows[place - section.first];
}

function topOf(place) {
  const section = sectionOf(place);
  return section.top + (place - section.first) * rowHeight;
}

// ---- columns on the screen -----------------------------------------------------------------------------------------

const first = page.steps[0];
const end = K > 1 ? page.steps[K - 1] + (page.steps[K - 1] - first) / (K - 1) : first + 1;
let left = 100, width = 100, height = 100;

const xOf = (step) => left + ((step - first) / (end - first)) * width;

/** The newest snapshot that is not after this x. */
function columnAt(x) {
  const step = first + ((x - left) / width) * (end - first);
  let low = 0, high = K - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (page.steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}

// ---- drawing -------------------------------------------------------------------------------------------------------

let cursor = null, held = false, waiting = false;

function draw() {
  if (!waiting) {
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      paint();
    });
  }
}

function paint() {
  const ratio = window.devicePixelRatio || 1, pen = map.getContext("2d");
  const full = view.clientWidth;
  map.width = Math.round(full * ratio);
  map.height = Math.round(view.clientHeight * ratio);
  map.style.height = `${view.clientHeight}px`;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.font = "12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";
  const longest = Math.max(...sections.map((section) => pen.measureText(nameOf(section.layer)).width), 30);
  left = Math.min(longest + 12, full / 3, 240);
  width = full - left - 16;
  height = view.clientHeight - AXIS;
  paintCells(pen, ratio);
  paintNames(pen);
  paintAxis(pen);
  if (cursor) paintCursor(pen);
}

function paintCells(pen, ratio) {
  const wide = Math.round(width * ratio), tall = Math.round(Math.min(height, content - view.scrollTop) * ratio);
  if (wide <= 0 || tall <= 0) return;
  const image = pen.createImageData(wide, tall), out = new Uint32Array(image.data.buffer);
  const columns = Uint32Array.from({ length: wide }, (_, x) => columnAt(left + (x + 0.5) / ratio));
  const cells = shadesOf(metric), table = pixels(metric), lined = rowHeight * ratio >= 7;
  let before = -1;
  for (let y = 0; y < tall; y++) {
    const at = view.scrollTop + y / ratio, place = placeAt(at, 1 / ratio);
    if (place < 0) continue;
    if (lined && Math.floor((at - topOf(place)) * ratio) === Math.floor(rowHeight * ratio) - 1) continue;
    if (place === before && y) {
      out.copyWithin(y * wide, (y - 1) * wide, y * wide);
      continue;
    }
    const from = rowOf(place) * K;
    for (let x = 0; x < wide; x++) out[y * wide + x] = table[cells[from + columns[x]]];
    before = lined ? -1 : place;
  }
  pen.putImageData(image, Math.round(left * ratio), 0);
}

/** A number, or none, is no name to read. */
const nameOf = ({ name }) => (/^\d*$/.test(name) ? `layer ${name}`.trim() : name);

function paintNames(pen) {
  pen.fillStyle = css.ink;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  let last = -Infinity;
  for (const section of sections) {
    const top = Math.max(0, section.top - view.scrollTop);
    const bottom = Math.min(height, section.top + section.height - view.scrollTop);
    const middle = (top + bottom) / 2;
    if (bottom < top || middle - last < 14) continue;
    pen.fillText(cut(pen, nameOf(section.layer), left - 10), left - 8, clamp(middle, 7, height - 5));
    last = middle;
  }
}

/** With its middle left out, if it is too long. */
function cut(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  let keep = text.length - 1;
  const shortened = () => `${text.slice(0, Math.floor(keep / 3))}…${text.slice(text.length - Math.ceil((2 * keep) / 3))}`;
  while (keep > 1 && pen.measureText(shortened()).width > room) keep--;
  return shortened();
}

function paintAxis(pen) {
  pen.strokeStyle = pen.fillStyle = css.dim;
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const y = Math.min(height, Math.max(content - view.scrollTop, 0)) + 4;
  for (const step of K > 1 ? ticks(first, end, Math.max(2, width / 110)) : [first]) {
    const x = K > 1 ? xOf(step) : left + width / 2;
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(x, y + 4);
    pen.stroke();
    pen.fillText(step.toLocaleString("en"), clamp(x, left + 10, left + width - 10), y + 6);
  }
  pen.textAlign = "right";
  pen.fillText("step", left - 8, y + 6);
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const distance = Math.max(1, [1, 2, 5, 10].find((factor) => factor * power >= rough) * power);
  const found = [];
  for (let step = Math.ceil(low / distance) * distance; step < high; step += distance) found.push(step);
  return found;
}

function paintCursor(pen) {
  const top = topOf(cursor.place) - view.scrollTop, x = xOf(page.steps[cursor.column]);
  const next = cursor.column + 1 < K ? page.steps[cursor.column + 1] : end;
  pen.strokeStyle = css.ink;
  pen.lineWidth = 1.5;
  pen.strokeRect(left - 1, top - 0.5, width + 2, Math.max(rowHeight, 2) + 0.5);
  pen.lineWidth = 2.5;
  pen.strokeRect(x, top - 1, Math.max(xOf(next) - x, 3), Math.max(rowHeight, 3) + 1);
  pen.lineWidth = 1;
}

// ---- pointing at a seed ----------------------------------------------------------------------------------------------

function point(place, column, where) {
  cursor = { place, column };
  const said = describe();
  const box = tip.getBoundingClientRect(), margin = 8;
  const right = where.x + 18 + box.width + margin < innerWidth;
  tip.style.left = `${clamp(right ? where.x + 18 : where.x - box.width - 18, margin, Math.max(margin, innerWidth - box.width - margin))}px`;
  tip.style.top = `${clamp(where.y + 14, margin, Math.max(margin, innerHeight - box.height - margin))}px`;
  draw();
  return said;
}

function letGo() {
  cursor = null;
  held = tip.hidden = true;
  held = false;
  tip.classList.remove("held");
  draw();
}

function hold(on) {
  held = on && cursor !== null;
  tip.classList.toggle("held", held);
}

// ---- mouse and keyboard --------------------------------------------------------------------------------------------

function follow(event) {
  if (held) return;
  const box = map.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const place = y < height ? placeAt(view.scrollTop + y, 1) : -1;
  if (place < 0 || x < 0 || x > left + width) return letGo();
  point(place, columnAt(Math.max(x, left)), { x: event.clientX, y: event.clientY });
}

function moveTo(place, column) {
  place = clamp(place, 0, shown - 1);
  const top = topOf(place);
  if (top < view.scrollTop) view.scrollTop = top;
  else if (top + rowHeight > view.scrollTop + height) view.scrollTop = top + rowHeight - height;
  const box = map.getBoundingClientRect();
  const where = { x: box.left + xOf(page.steps[column]), y: box.top + top - view.scrollTop + rowHeight };
  $("said").textContent = point(place, clamp(column, 0, K - 1), where);
}

/** One row down or up, or one pixel where several share it. */
function beside(place, direction) {
  const least = Math.max(1, Math.round(1 / rowHeight));
  return place + direction * least;
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !shown) return;
  const at = cursor ?? { place: placeAt(view.scrollTop, 1), column: K - 1 };
  const page_ = Math.max(1, Math.round((height * 0.8) / rowHeight));
  const actions = {
    ArrowUp: () => moveTo(cursor ? beside(at.place, -1) : at.place, at.column),
    ArrowDown: () => moveTo(cursor ? beside(at.place, 1) : at.place, at.column),
    ArrowLeft: () => moveTo(at.place, Math.max(0, at.column - 1)),
    ArrowRight: () => moveTo(at.place, Math.min(K - 1, at.column + 1)),
    Home: () => moveTo(at.place, 0),
    End: () => moveTo(at.place, K - 1),
    PageUp: () => moveTo(at.place - page_, at.column),
    PageDown: () => moveTo(at.place + page_, at.column),
    Enter: () => hold(!held),
    Escape: letGo,
    "+": () => zoom(10),
    "=": () => zoom(10),
    "-": () => zoom(-10),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
}

function zoom(by, y = height / 2) {
  const place = shown ? placeAt(Math.min(view.scrollTop + y, content - 1), 1) : -1;
  $("zoom").value = Number($("zoom").value) + by;
  scale();
  if (place >= 0) view.scrollTop = topOf(place) - y;
}

// ---- controls ------------------------------------------------------------------------------------------------------

function legend() {
  const { name, what, ends } = METRICS[metric], box = $("legend");
  if (metric === "state") {
    const counts = new Map();
    for (const section of sections) for (const row of section.rows) counts.set(state[row * K + K - 1], (counts.get(state[row * K + K - 1]) ?? 0) + 1);
    const chips = STATES.map((each, number) => {
      const chip = element("span", "", [swatch(stateColor(number)), element("span", each)]);
      const count = counts.get(number);
      chip.className = count || state.includes(number) ? "chip" : "chip absent";
      if (count && page.block === 1) {
        chip.append(element("b", count.toLocaleString("en")));
        chip.title = "how many there are at the end";
      }
      return chip;
    });
    box.replaceChildren(...chips);
    return;
  }
  const bar = element("span", "");
  bar.className = "scale";
  bar.style.background = `linear-gradient(to right, ${palette[metric].join(", ")})`;
  const about = element("span", what);
  about.className = "what";
  if (ends.length) box.replaceChildren(element("span", digits(ends[0])), bar, element("span", digits(ends.at(-1))), about);
  else box.replaceChildren(element("span", `${name}: nothing known yet.`), about);
}

function refresh() {
  legend();
  draw();
  if (cursor) describe();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  palette = page[theme];
  const style = getComputedStyle(document.documentElement);
  css = Object.fromEntries(["ink", "dim", "line", "focus"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function begin() {
  for (const [name, { name: label }] of Object.entries(METRICS)) {
    const input = element("input", "");
    Object.assign(input, { type: "radio", name: "metric", value: name, checked: name === metric });
    input.addEventListener("change", () => {
      metric = name;
      refresh();
    });
    $("metrics").append(element("label", "", [input, element("span", label)]));
  }
  $("layer").append(new Option("all", ""), ...page.layers.map((layer, number) => new Option(nameOf(layer), number)));
  $("of-layer").hidden = page.layers.length < 2;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => {
    setTheme(dark.matches ? "dark" : "light");
    refresh();
  });
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    refresh();
  });
  for (const id of ["layer", "grown"]) {
    $(id).addEventListener("change", () => {
      letGo();
      view.scrollTop = 0;
      arrange();
      legend();
    });
  }
  $("zoom").addEventListener("input", () => zoom(0));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  map.addEventListener("mousemove", follow);
  map.addEventListener("mouseleave", () => held || letGo());
  map.addEventListener("click", (event) => {
    const was = held;
    held = false;
    follow(event);
    hold(!was);
  });
  view.addEventListener("scroll", () => (held || letGo(), draw()));
  view.addEventListener("keydown", press);
  view.addEventListener("focus", () => view.matches(":focus-visible") && !cursor && shown && moveTo(placeAt(view.scrollTop, 1), K - 1));
  view.addEventListener("blur", () => held || letGo());
  view.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 6 : -6, event.clientY - map.getBoundingClientRect().top);
  }, { passive: false });
  new ResizeObserver(scale).observe(view);
  arrange();
  legend();
  document.documentElement.dataset.ready = "yes";
}

unpack($("data").textContent).then(take).then(begin).catch((error) => {
  document.body.append(element("p", `The map cannot be drawn by this browser: ${error.message}`));
  throw error;
});

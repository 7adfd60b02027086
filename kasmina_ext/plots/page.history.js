/* What is told of the seed that is pointed at. Part of the same script as page.js. */

function element(kind, text, inside = []) {
  const made = document.createElement(kind);
  made.textContent = text;
  made.append(...inside);
  return made;
}

function swatch(color) {
  const made = element("i", "");
  made.style.background = color;
  return made;
}

const stateName = (number) => STATES[number] ?? "no state";
const stateColor = (number) => palette.states[number] ?? palette.nothing;

function digits(value) {
  if (isNaN(value)) return "–";
  if (!isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  return (size && (size < 1e-3 || size >= 1e4) ? value.toExponential(1) : String(Number(value.toPrecision(2)))).replace("-", "−");
}

function seedsOf(row, layer) {
  const begin = (row - layer.first) * page.block;
  if (page.block === 1) return `seed ${begin}`;
  const before = page.layers.slice(0, page.layers.indexOf(layer)).reduce((sum, each) => sum + each.seeds, 0);
  const ids = Array.from(order.subarray(before + begin, before + Math.min(begin + page.block, layer.seeds))).sort((a, b) => a - b);
  return `${ids.length} ${ids.length > 1 ? "seeds" : "seed"}: ${ids.slice(0, 8).join(", ")}${ids.length > 8 ? ", …" : ""}`;
}

/** Whenever it was in another state than in the snapshot before: the step and the state. */
function moves(row) {
  const found = [];
  for (let k = 0; k < K; k++) {
    if (!k || state[row * K + k] !== state[row * K + k - 1]) found.push([page.steps[k], state[row * K + k]]);
  }
  return found;
}

function describe() {
  const row = rowOf(cursor.place), layer = sectionOf(cursor.place).layer, i = row * K + cursor.column;
  const seeds = seedsOf(row, layer), at = page.steps[cursor.column].toLocaleString("en");
  const values = { [`at step ${at}`]: stateName(state[i]), alpha: digits(alpha[i]), credit: digits(credit[i]), change: digits(change[i]) };
  const list = element("dl", "");
  for (const [name, value] of Object.entries(values)) list.append(element("dt", name), element("dd", value));
  const known = moves(row), history = element("ol", "");
  for (const [step, number] of known.slice(-12)) {
    history.append(element("li", "", [swatch(stateColor(number)), element("span", step.toLocaleString("en")), element("b", stateName(number))]));
  }
  if (known.length > 12) history.prepend(element("li", `… ${known.length - 12} before`));
  const curves = element("canvas", "");
  tip.replaceChildren(element("h2", `${nameOf(layer)} `, [element("span", seeds)]), list, curves, history);
  tip.hidden = false;
  paintCurves(curves, row);
  return `${nameOf(layer)}, ${seeds}, ${Object.entries(values).map((pair) => pair.join(" ")).join(", ")}`;
}

function paintCurves(canvas, row) {
  const ratio = window.devicePixelRatio || 1, wide = canvas.clientWidth, lane = 30, band = 9;
  const lanes = [["alpha", alpha, 0, 1], ["credit", credit, null, null], ["change", change, 0, null]];
  const tall = band + lanes.length * (lane + 6) + 2;
  canvas.width = wide * ratio;
  canvas.height = tall * ratio;
  canvas.style.height = `${tall}px`;
  const pen = canvas.getContext("2d"), from = 44, x = (step) => from + ((step - first) / (end - first)) * (wide - from - 2);
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  pen.textBaseline = "middle";
  moves(row).forEach(([step, number], i, all) => {
    pen.fillStyle = stateColor(number);
    pen.fillRect(x(step), 0, x(all[i + 1]?.[0] ?? end) - x(step), band);
  });
  lanes.forEach(([name, values, low, high], number) => {
    const top = band + 6 + number * (lane + 6), mine = values.subarray(row * K, row * K + K);
    const known = mine.filter(isFinite);
    low = Math.min(low ?? 0, ...known);
    high = Math.max(high ?? 0, ...known);
    const y = (value) => top + lane - 2 - ((clamp(value, low, high) - low) / (high - low || 1)) * (lane - 4);
    pen.fillStyle = css.dim;
    pen.fillText(name, 0, top + lane / 2);
    pen.strokeStyle = css.line;
    pen.strokeRect(from, y(0), wide - from - 2, 0);
    pen.strokeStyle = css.ink;
    pen.lineWidth = 1.4;
    pen.beginPath();
    let on = false;
    mine.forEach((value, k) => {
      if (!isNaN(value)) {
        if (on) pen.lineTo(x(page.steps[k]), y(value));
        else pen.moveTo(x(page.steps[k]), y(value));
        pen.lineTo(x(page.steps[k + 1] ?? end), y(value));
      }
      on = !isNaN(value);
    });
    pen.stroke();
    pen.lineWidth = 1;
  });
  pen.strokeStyle = css.focus;
  pen.strokeRect(x(page.steps[cursor.column]), 0, 0, tall);
}

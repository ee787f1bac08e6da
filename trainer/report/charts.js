"use strict";

// Curves and bars as SVG, with what a reader that sees none of it is told. Texts are only ever set as text.

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 0 : size >= 1 ? 2 : 4 });
}

// Of an axis: as few digits as tell one tick from the next.
function onAxis(value) {
  const size = Math.abs(value);
  if (size >= 1e5 || (size !== 0 && size < 1e-4)) return value.toExponential().replace(/(\.\d)\d+/, "$1").replace("e+", "e");
  return value.toLocaleString("en", { maximumFractionDigits: 5 });
}

function whole(value) {
  return value === null || value === undefined || !Number.isFinite(value) ? "" : Math.round(value).toLocaleString("en");
}

// A few colours that differ; of more curves, a row of them from blue to red.
const colours = ["--one", "--two", "--three", "--four", "--five"];
const colour = (i, count) => count <= colours.length ? `var(${colours[i]})` : `hsl(${Math.round(240 - 240 * i / (count - 1))} 62% var(--ramp))`;

// A mean that forgets, without the pull of its start.
function smoothed(values, keep) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw) || raw;
  const first = Math.ceil(low / step - 1e-6), last = Math.min(Math.floor(high / step + 1e-6), first + 2 * count);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// The place of the last value at or before `at`, or the first one.
function placeOf(x, at) {
  let low = 0, high = x.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (x[middle] <= at) low = middle; else high = middle - 1;
  }
  return low;
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const greatest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const WIDTH = 560, HEIGHT = 240, LEFT = 56, RIGHT = 12, TOP = 8, BOTTOM = 24, MOST_TOLD = 12, MOST_BANDS = 4;

// What a chart shows, in words.
function inWords(title, curves, unit) {
  const told = curves.slice(0, MOST_TOLD).map((line) => {
    const end = line.x.length - 1;
    const first = end ? `from ${short(line.y[0])} at ${unit} ${short(line.x[0])} to ` : "";
    const range = end ? `; least ${short(least(line.low || line.y))}, greatest ${short(greatest(line.high || line.y))}` : "";
    return `${line.name}: ${first}${short(line.y[end])} at ${unit} ${short(line.x[end])}${range}`;
  });
  const more = curves.length > MOST_TOLD ? [`and ${curves.length - MOST_TOLD} more curves`] : [];
  return [title, ...told, ...more].join(". ");
}

// The range that is shown: of nearly all values, for a spike must not hide the rest.
function rangeOf(curves, options, scaled, isLog) {
  const bands = (line) => (options.bands && line.low ? [...line.low, ...line.high].filter((value) => !isLog || value > 0) : []);
  const ys = Float64Array.from(curves.flatMap((line) => [...line.y, ...line.smooth, ...bands(line)]).map(scaled)).sort();
  let low = ys[Math.floor((ys.length - 1) * 0.003)], high = ys[Math.ceil((ys.length - 1) * 0.997)];
  if (options.zero) low = Math.min(low, 0), high = Math.max(high, 0);
  const size = Math.max(Math.abs(low), Math.abs(high)), isFlat = high - low <= size * 1e-6;
  const air = isFlat ? size * 0.1 || 1 : (high - low) * 0.05;
  return [options.zero && low === 0 ? 0 : low - air, options.zero && high === 0 && low < 0 ? 0 : high + air];
}

// lines: [{name, x, y, low?, high?}]; options: smoothing (0: none), log, zero, bands (which the range holds as well),
// unit (of x). Null where there is nothing to draw.
function chart(title, lines, options = {}) {
  const there = lines.filter((line) => line.x.length);
  if (!there.length) return null;
  const shown = there.length <= MOST_BANDS ? there : there.map(({ low, high, ...line }) => line); // bands of many would hide one another
  const unit = options.unit || "step", count = shown.length, keep = options.smoothing || 0;
  const isLog = options.log && shown.every((line) => line.y.every((value) => value > 0));
  const scaled = (value) => (isLog ? Math.log10(Math.max(value, Number.MIN_VALUE)) : value);
  const curves = shown.map((line) => ({ ...line, smooth: keep ? smoothed(line.y, keep) : line.y }));
  const x0 = least(curves.map((line) => line.x[0])), end = greatest(curves.map((line) => line.x[line.x.length - 1]));
  const x1 = end > x0 ? end : x0 + 1;
  const [y0, y1] = rangeOf(curves, options, scaled, isLog);
  const X = (x) => LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
  const Y = (y) => TOP + (1 - (Math.min(Math.max(scaled(y), y0), y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const label = inWords(title, curves, unit);
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": label, "data-title": title });
  for (const at of ticks(y0, y1, 4)) {
    const y = TOP + (1 - (at - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    svg.append(drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    svg.append(drawing("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, isLog ? short(10 ** at) : onAxis(at)));
  }
  for (const at of ticks(x0, x1, 5).filter((each) => unit !== "step" || Number.isInteger(each))) {
    const isAtEnd = X(at) > WIDTH - 40;
    const place = { x: isAtEnd ? WIDTH - RIGHT : X(at), y: HEIGHT - 6, "text-anchor": isAtEnd ? "end" : "middle" };
    svg.append(drawing("text", place, Number.isInteger(at) ? whole(at) : onAxis(at)));
  }
  const path = (x, y) => y.map((value, i) => `${i ? "L" : "M"}${X(x[i]).toFixed(1)} ${Y(value).toFixed(1)}`).join("");
  curves.forEach((line, i) => {
    const ink = colour(i, count);
    if (line.low) {
      const back = line.high.map((_, k) => `L${X(line.x[k]).toFixed(1)} ${Y(line.high[k]).toFixed(1)}`).reverse().join("");
      svg.append(drawing("path", { class: "band", d: `${path(line.x, line.low)}${back}Z`, fill: ink }));
    }
    if (keep && line.x.length > 2) svg.append(drawing("path", { class: "raw", d: path(line.x, line.y), stroke: ink }));
    svg.append(drawing("path", { class: "smooth", d: path(line.x, line.smooth), stroke: ink }));
    if (line.x.length === 1) svg.append(drawing("circle", { cx: X(line.x[0]), cy: Y(line.smooth[0]), r: 3, fill: ink }));
  });
  const cursor = drawing("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const legend = element("div", { class: "legend" });
  const tell = (at) => {
    const told = curves.map((line) => {
      const k = at === undefined ? line.x.length - 1 : placeOf(line.x, at);
      return `${line.name} ${short(line.smooth[k])}${at === undefined ? "" : ` at ${unit === "step" ? whole(line.x[k]) : short(line.x[k])}`}`;
    });
    legend.replaceChildren(...told.map((text, i) => element("span", {}, element("i", { style: `background:${colour(i, count)}` }), text)));
    return told;
  };
  readable(svg, [x0, end], (at) => {
    cursor.setAttribute("visibility", at === undefined ? "hidden" : "visible");
    if (at !== undefined) for (const edge of ["x1", "x2"]) cursor.setAttribute(edge, X(at));
    return tell(at);
  }, curves[0].x);
  tell();
  return element("div", { class: "chart" }, element("h3", {}, title), svg, legend);
}

// Values under a pointer, or by the arrow keys: `show` puts the cursor at a place of x, undefined for none.
function readable(svg, [x0, x1], show, x) {
  let at;
  svg.addEventListener("pointermove", (event) => {
    const place = svg.getBoundingClientRect();
    const found = x0 + ((event.clientX - place.left) / place.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
    if (found >= x0 && found <= x1) show(found);
  });
  for (const end of ["pointerleave", "blur"]) svg.addEventListener(end, () => { at = undefined; show(); });
  svg.addEventListener("keydown", (event) => {
    const stride = Math.max(1, Math.round(x.length / (event.shiftKey ? 10 : 60)));
    const now = at === undefined ? x.length - 1 : at;
    const next = { ArrowLeft: at === undefined ? now : now - stride, ArrowRight: now + stride, Home: 0, End: x.length - 1 }[event.key];
    if (event.key === "Escape") at = undefined, show();
    if (next === undefined) return;
    event.preventDefault();
    at = Math.min(Math.max(next, 0), x.length - 1);
    byId("said").textContent = show(x[at]).join(", ");
  });
}

// A histogram; the last bar holds what is beyond it as well. mark: a value that a line is drawn at.
function bars(title, values, width, words, mark) {
  const most = Math.max(...values), room = (WIDTH - LEFT - RIGHT) / values.length, high = HEIGHT - TOP - BOTTOM;
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}. ${words}` });
  for (const at of ticks(0, most, 4)) {
    const y = TOP + (1 - at / most) * high;
    svg.append(drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    svg.append(drawing("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, onAxis(at)));
  }
  values.forEach((value, i) => {
    const tall = value / most * high;
    svg.append(drawing("rect", { x: LEFT + i * room + 0.5, y: TOP + high - tall, width: room - 1, height: tall, fill: "var(--one)" }));
  });
  const X = (value) => LEFT + value / width * room;
  for (const at of ticks(0, values.length * width, 5))
    svg.append(drawing("text", { x: Math.min(X(at), WIDTH - RIGHT), y: HEIGHT - 6, "text-anchor": X(at) > WIDTH - 40 ? "end" : "middle" }, onAxis(at)));
  if (mark && mark < values.length * width) svg.append(drawing("line", { class: "mark", x1: X(mark), x2: X(mark), y1: TOP, y2: TOP + high }));
  return element("div", { class: "chart" }, element("h3", {}, title), svg, element("div", { class: "legend" }, words));
}

"use strict";

// Draws the page of a run from the data beside it. Texts of the run are only ever set as text.

const byId = (id) => document.getElementById(id);
const colours = ["--one", "--two", "--three", "--four", "--five"];
const colour = (i) => `var(${colours[i % colours.length]})`;
let data = JSON.parse(byId("data").textContent);

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

function whole(value) {
  return value === null || value === undefined ? "" : Math.round(value).toLocaleString("en");
}

function span(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "";
  const days = Math.floor(seconds / 86400), hours = Math.floor(seconds / 3600) % 24, minutes = Math.floor(seconds / 60) % 60;
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.round(seconds)} s`;
}

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
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw) || raw;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}

const WIDTH = 560, HEIGHT = 240, LEFT = 56, RIGHT = 10, TOP = 8, BOTTOM = 24;

// lines: [{name, x, y, low?, high?}]; options: smooth, log, zero, bands (which the range holds as well)
function chart(title, lines, options = {}) {
  const box = element("div", { class: "chart" }, element("h3", {}, title));
  const shown = lines.filter((line) => line.x.length);
  if (!shown.length) return null;
  const keep = options.smooth ? Number(byId("smoothing").value) : 0;
  const isLog = options.log && byId("log").checked && shown.every((line) => line.y.every((value) => value > 0));
  const scaled = (value) => (isLog ? Math.log10(Math.max(value, Number.MIN_VALUE)) : value);
  const curves = shown.map((line) => ({ ...line, smooth: options.smooth ? smoothed(line.y, keep) : line.y }));
  const xs = shown.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
  // The range of nearly all of it: a spike must not hide the rest.
  const bands = (line) => (options.bands && line.low ? [...line.low, ...line.high].filter((value) => !isLog || value > 0) : []);
  const ys = curves.flatMap((line) => [...line.y, ...line.smooth, ...bands(line)]).map(scaled).sort((a, b) => a - b);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = ys[Math.floor((ys.length - 1) * 0.003)], y1 = ys[Math.ceil((ys.length - 1) * 0.997)];
  if (options.zero) y0 = Math.min(y0, 0);
  const air = (y1 - y0) * 0.05 || Math.abs(y1) * 0.1 || 1;
  y0 -= options.zero && y0 === 0 ? 0 : air;
  y1 += air;
  const X = (x) => LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
  const Y = (y) => TOP + (1 - (Math.min(Math.max(scaled(y), y0), y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const at of ticks(y0, y1, 4)) {
    const y = TOP + (1 - (at - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    svg.append(drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    svg.append(drawing("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(isLog ? 10 ** at : at)));
  }
  for (const at of ticks(x0, x1, 5))
    svg.append(drawing("text", { x: X(at), y: HEIGHT - 6, "text-anchor": "middle" }, whole(at)));
  const path = (x, y) => y.map((value, i) => `${i ? "L" : "M"}${X(x[i]).toFixed(1)} ${Y(value).toFixed(1)}`).join("");
  curves.forEach((line, i) => {
    if (line.low) {
      const back = line.high.map((_, k) => k).reverse();
      const band = path(line.x, line.low) + back.map((k) => `L${X(line.x[k]).toFixed(1)} ${Y(line.high[k]).toFixed(1)}`).join("") + "Z";
      svg.append(drawing("path", { class: "band", d: band, fill: colour(i) }));
    }
    if (options.smooth && line.x.length > 2) svg.append(drawing("path", { class: "raw", d: path(line.x, line.y), stroke: colour(i) }));
    svg.append(drawing("path", { class: "smooth", d: path(line.x, line.smooth), stroke: colour(i) }));
    if (line.x.length === 1) svg.append(drawing("circle", { cx: X(line.x[0]), cy: Y(line.smooth[0]), r: 3, fill: colour(i) }));
  });
  const cursor = drawing("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const legend = element("div", { class: "legend" });
  const tell = (at) => legend.replaceChildren(...curves.map((line, i) => {
    let k = line.x.length - 1;
    if (at !== undefined) while (k > 0 && line.x[k] > at) k--;
    const swatch = element("i", { style: `background:${colour(i)}` });
    return element("span", {}, swatch, `${line.name} ${short(line.smooth[k])}${at === undefined ? "" : ` at ${whole(line.x[k])}`}`);
  }));
  svg.addEventListener("pointermove", (event) => {
    const place = svg.getBoundingClientRect();
    const at = x0 + ((event.clientX - place.left) / place.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
    if (at < x0 || at > x1) return;
    cursor.setAttribute("x1", X(at));
    cursor.setAttribute("x2", X(at));
    cursor.setAttribute("visibility", "visible");
    tell(at);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); tell(); });
  tell();
  box.append(svg, legend);
  return box;
}

function lines(pattern, named = (match) => match[1] || match[0]) {
  const many = data.runs.length > 1;
  return data.runs.flatMap((run) => Object.entries(run.series).flatMap(([key, series]) => {
    const match = key.match(pattern);
    return match ? [{ name: (many ? `${run.name}: ` : "") + named(match), ...series }] : [];
  }));
}

// Curves of a validation with the 95 % intervals of their means, where records have them.
function estimates(pattern, named) {
  const many = data.runs.length > 1;
  return data.runs.flatMap((run) => Object.entries(run.series).flatMap(([key, series]) => {
    const match = key.match(pattern);
    if (!match) return [];
    const cut = key.indexOf("/"), what = key.slice(cut + 1);
    const of = what === "loss" ? "" : `/${what.startsWith("loss_t") ? what.slice(5) : what}`;
    const half = run.series[`${key.slice(0, cut)}/ci95${of}`];
    const line = { name: (many ? `${run.name}: ` : "") + named(match), ...series };
    if (!half) return [line];
    const at = new Map(half.x.map((step, i) => [step, half.y[i]])), width = line.x.map((step) => at.get(step) || 0);
    return [{ ...line, low: line.y.map((value, i) => value - width[i]), high: line.y.map((value, i) => value + width[i]) }];
  }));
}

// Of each curve, percent of its first value: losses at timesteps differ in size by orders of magnitude.
function relative(curves) {
  return curves.map((line) => ({ ...line, y: line.y.map((value) => 100 * value / (line.y[0] || 1)) }));
}

function hostLines(pattern, name, factor) {
  const rows = data.runs[0].host, keys = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((key) => pattern.test(key));
  const begin = rows.length ? rows[0].time : 0;
  return keys.map((key) => {
    const own = rows.filter((row) => row[key] !== undefined);
    const number = key.match(pattern)[1];
    return { name: number === undefined ? name : `${name} ${number}`, x: own.map((row) => (row.time - begin) / 3600), y: own.map((row) => row[key] * factor) };
  });
}

function charts() {
  const made = [
    chart("Training loss", lines(/^train\/(loss)$/), { smooth: true, log: true }),
    chart("Validation loss", estimates(/^validation(?:_([^/]+))?\/loss$/, (match) => match[1] || "live"), { log: true, bands: true }),
    chart("Validation loss by timestep", estimates(/^validation(?:_([^/]+))?\/loss_t(\d+)$/, (match) => `${match[1] ? `${match[1]} ` : ""}t ${match[2]}`), { log: true, bands: true }),
    chart("Validation loss by timestep, % of the first", relative(lines(/^validation(?:_[\w-]+)?\/loss_t(\d+)$/, (match) => `t ${match[1]}`))),
    chart("Generalization gap: held-out loss less that of training images", estimates(/^validation(?:_([^/]+))?\/gap$/, (match) => match[1] || "live"), { zero: true, bands: true }),
    chart("Generalization gap by timestep", lines(/^validation\/gap\/t(\d+)$/, (match) => `t ${match[1]}`), { zero: true }),
    chart("Validation loss by source", estimates(/^validation\/source\/(.+)$/, (match) => match[1]), { log: true, bands: true }),
    chart("Learning rate", lines(/^train\/(lr.*)$/), { zero: true }),
    chart("What the optimizer found", lines(/^train\/(d|effective_lr)$/), { log: true }),
    chart("Gradient norm", lines(/^train\/(grad_norm)$/), { smooth: true, log: true }),
    chart("Images per second", lines(/^train\/(images_per_s)$/), { smooth: true, zero: true }),
    chart("Seconds of a step", lines(/^train\/(step_s|data_wait_s)$/), { smooth: true, zero: true }),
    chart("Where the time goes, shares of a step", lines(/^phases\/(data|forward|backward|exchange|optimizer)$/), { zero: true }),
    chart("Workers' memory, GiB, by hours", hostLines(/^workers_mib\.(\d+)$/, "worker", 1 / 1024), { zero: true }),
    chart("Free memory of the host, GiB, by hours", hostLines(/^memory_available_mib$/, "free", 1 / 1024), { zero: true }),
    chart("Cards, degrees Celsius, by hours", hostLines(/^cards\.(\d+)\.temperature_c$/, "card", 1)),
    chart("Cards, watts, by hours", hostLines(/^cards\.(\d+)\.power_w$/, "card", 1), { zero: true }),
    chart("Cards' clocks, MHz, by hours", hostLines(/^cards\.(\d+)\.clock_mhz$/, "card", 1), { zero: true }),
  ];
  byId("charts").replaceChildren(...made.filter(Boolean));
  byId("smoothing-told").textContent = byId("smoothing").value;
}

function fact(value, told) {
  return value ? [element("div", { class: "fact" }, element("b", {}, value), element("span", {}, told))] : [];
}

function stands() {
  const run = data.runs[0], now = run.stands, steps = Number(now.steps) || null;
  const speed = now.images_per_s, perStep = now.images / now.step;
  const left = steps && speed && now.step ? (steps - now.step) * perStep / speed : NaN;
  byId("stands").replaceChildren(
    ...fact(whole(now.step) + (steps ? ` of ${whole(steps)}` : ""), "steps"),
    ...fact(now.epoch === null || now.epoch === undefined ? "" : short(now.epoch) + (now.epochs && now.epochs !== "null" ? ` of ${now.epochs}` : ""), "epochs"),
    ...fact(whole(now.images), "images seen"),
    ...fact(speed ? short(speed) : "", "images per second"),
    ...fact(span(now.ended - now.begun), "from the first record to the newest"),
    ...fact(left > 0 ? span(left) : "", "to go"),
    ...fact(run.skipped.count ? whole(run.skipped.count) : "", "lines of skipped steps"),
    ...fact(run.bad.count ? whole(run.bad.count) : "", "rows that could not be read"),
    ...fact(now.ended ? new Date(now.ended * 1000).toLocaleString() : "", "newest record"));
}

function samples() {
  const drawn = data.runs[0].samples, slider = byId("sample");
  byId("samples-section").hidden = !drawn.length;
  if (!drawn.length) return;
  const wasLast = slider.value === slider.max;
  slider.max = drawn.length - 1;
  if (wasLast || !samples.shown) slider.value = slider.max;
  samples.shown = true;
  const chosen = drawn[Number(slider.value)];
  byId("sample-told").textContent = `${whole(chosen.step)}${chosen.of ? ` (${chosen.of})` : ""}`;
  byId("samples").replaceChildren(...chosen.images.map((source, i) => element("img", { src: source, alt: `sample ${i + 1} of step ${chosen.step}` })));
}

function table(id, rows, head) {
  const made = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, String(cell)))));
  if (head) made.unshift(element("tr", {}, ...head.map((cell) => element("th", {}, cell))));
  byId(id).replaceChildren(...made);
}

function tables() {
  const run = data.runs[0];
  const events = [...run.events].reverse();
  byId("events").replaceChildren(...(events.length ? events.map((line) => element("li", {}, line)) : [element("li", { class: "none" }, "nothing happened")]));
  table("checkpoints", run.checkpoints.map((each) => [each.name, `${each.gib} GiB`]));
  table("settings", Object.entries(run.settings));
  byId("differing-section").hidden = data.runs.length < 2;
  table("differing", data.differing, ["key", ...data.runs.map((each) => each.name)]);
}

function draw() {
  byId("name").textContent = data.runs.map((run) => run.name).join(", ");
  document.title = `${data.runs[0].name} - sdxl-train`;
  byId("place").textContent = data.runs[0].place;
  stands();
  charts();
  samples();
  tables();
}

function kept(name, value) {
  try { // a page of a file may not be allowed to keep anything
    return value === undefined ? localStorage.getItem(name) : localStorage.setItem(name, value);
  } catch {
    return null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

setTheme(kept("sdxl-train theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  kept("sdxl-train theme", document.documentElement.dataset.theme);
});
for (const id of ["smoothing", "log"]) byId(id).addEventListener("input", charts);
byId("sample").addEventListener("input", samples);
draw();
if (LIVE) setInterval(async () => {
  try {
    const answer = await fetch("data.json", { cache: "no-store" });
    if (!answer.ok) return;
    data = await answer.json();
    draw();
  } catch { /* the next one may come */ }
}, 10000);

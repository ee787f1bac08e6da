
// The page of a run, drawn from the data beside it.

let data = unpacked(JSON.parse(byId("data").textContent));

// Curves as the charts want them: of each, x is a number among those that several share.
function unpacked(packed) {
  const whole = (found) => Object.entries(found.curves).map(([name, curve]) => [name, { ...curve, x: found.xs[curve.x] }]);
  for (const run of packed.runs) {
    run.series = new Map(whole(run.series));
    if (run.host) run.host = new Map(whole(run.host));
  }
  return packed;
}

function span(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "";
  const days = Math.floor(seconds / 86400), hours = Math.floor(seconds / 3600) % 24, minutes = Math.floor(seconds / 60) % 60;
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.round(seconds)} s`;
}

// Curves of all runs, or of the first one alone, whose names match.
function lines(pattern, named = (match) => match[1] || match[0], runs = data.runs) {
  const many = runs.length > 1;
  return runs.flatMap((run) => [...run.series].flatMap(([key, series]) => {
    const match = key.match(pattern);
    return match ? [{ name: (many ? `${run.name}: ` : "") + named(match), key, run, ...series }] : [];
  }));
}

// Those at timesteps, of the first run; one run has as many of them as can be told apart.
function atTimesteps(pattern) {
  const found = lines(pattern, (match) => match[0].match(/t\d.*$/)[0].replace(/^t/, "t "), data.runs.slice(0, 1));
  return found.sort((a, b) => Number(a.name.match(/\d+/)[0]) - Number(b.name.match(/\d+/)[0]));
}

// Curves of a validation with the 95 % intervals of their means, where records have them.
function estimates(found) {
  return found.map((line) => {
    const cut = line.key.indexOf("/"), what = line.key.slice(cut + 1);
    const of = what === "loss" ? "" : `/${what.startsWith("loss_t") ? what.slice(5) : what}`;
    const half = line.run.series.get(`${line.key.slice(0, cut)}/ci95${of}`);
    if (!half) return line;
    const at = new Map(half.x.map((step, i) => [step, half.y[i]])), width = line.x.map((step) => at.get(step) || 0);
    return { ...line, low: line.y.map((value, i) => value - width[i]), high: line.y.map((value, i) => value + width[i]) };
  });
}

// Of each curve, percent of its beginning: losses at timesteps differ in size by orders of magnitude.
function relative(curves) {
  return curves.map(({ low, high, ...line }) => {
    const begin = line.y.slice(0, Math.ceil(line.y.length / 50)), first = begin.reduce((a, b) => a + b) / begin.length;
    return { ...line, y: line.y.map((value) => 100 * value / (first || 1)) };
  });
}

function hostLines(pattern, name, factor) {
  return [...data.runs[0].host].flatMap(([key, series]) => {
    const match = key.match(pattern);
    if (!match) return [];
    const scaled = (values) => values && values.map((value) => value * factor);
    return [{ ...series, name: match[1] === undefined ? name : `${name} ${match[1]}`, y: scaled(series.y), low: scaled(series.low), high: scaled(series.high) }];
  });
}

const VALIDATION = "^validation(?:_([^/]+))?";
const told = (match) => match[1] || "live";

function validationByTimestep(log) {
  const kinds = [...new Set([...data.runs[0].series.keys()].flatMap((key) => key.match(/^(validation[^/]*)\/loss_t\d+$/)?.[1] ?? []))];
  return kinds.flatMap((kind) => {
    const of = kind === "validation" ? "" : `, ${kind.slice("validation_".length)}`;
    const found = atTimesteps(new RegExp(`^${kind.replace(/[^\w]/g, "\\$&")}/loss_t(\\d+)$`));
    const title = `Validation loss by timestep${of}`;
    return [chart(title, estimates(found), { log, bands: true }), chart(`${title}, % of the first`, relative(found))];
  });
}

function charts() {
  const log = byId("log").checked, smoothing = Number(byId("smoothing").value), hours = { unit: "hour" };
  const plain = { ...hours, zero: true };
  const byTimestep = atTimesteps(/^train_by_timestep\/loss_t(\d+)$/).map(({ low, high, ...line }) => line);
  const calm = byTimestep.length && byTimestep[0].x.length > 40 ? smoothing : 0; // a few records are means of many images as they are
  const groups = {
    loss: [
      chart("Training loss", lines(/^train\/(loss)$/), { smoothing, log }),
      chart("Validation loss", estimates(lines(new RegExp(`${VALIDATION}/loss$`), told)), { log, bands: true }),
      chart("Training loss by timestep", byTimestep, { smoothing: calm, log }),
      chart("Training loss by timestep, % of the first", relative(byTimestep), { smoothing: calm }),
      ...validationByTimestep(log),
      chart("Generalization gap: held-out loss less that of training images", estimates(lines(new RegExp(`${VALIDATION}/gap$`), told)), { zero: true, bands: true }),
      chart("Generalization gap by timestep", atTimesteps(/^validation\/gap\/t(\d+)$/), { zero: true }),
      chart("Validation loss at further resolutions", estimates(lines(/^validation\/resolution\/(\d+)$/, (match) => `${match[1]} px`)), { log, bands: true }),
      chart("Validation loss by source", estimates(lines(/^validation\/source\/(.+)$/)), { log, bands: true }),
    ],
    learning: [
      chart("Learning rate", lines(/^train\/(lr.*)$/), { zero: true }),
      chart("What the optimizer found", lines(/^train\/(d|effective_lr)$/), { log }),
      chart("Gradient norm", lines(/^train\/(grad_norm)$/), { smoothing, log }),
    ],
    speed: [
      chart("Images per second", lines(/^train\/(images_per_s)$/), { smoothing, zero: true }),
      chart("Seconds of a step", lines(/^train\/((?!images_per_).*_s)$/), { smoothing, zero: true }),
      chart("Where the time goes, shares of a step", lines(/^phases\/(data|forward|backward|exchange|optimizer)$/), { zero: true }),
    ],
    machine: [
      chart("Workers' memory, GiB, by hours", hostLines(/^workers_mib\.(\d+)$/, "worker", 1 / 1024), plain),
      chart("Free memory of the host, GiB, by hours", hostLines(/^memory_available_mib$/, "free", 1 / 1024), plain),
      chart("Free disk, GiB, by hours", hostLines(/^disk_free_mib$/, "free", 1 / 1024), plain),
      chart("Cards, degrees Celsius, by hours", hostLines(/^cards\.(\d+)\.temperature_c$/, "card", 1), hours),
      chart("Cards, watts, by hours", hostLines(/^cards\.(\d+)\.power_w$/, "card", 1), plain),
      chart("Cards' clocks, MHz, by hours", hostLines(/^cards\.(\d+)\.clock_mhz$/, "card", 1), plain),
    ],
  };
  const focused = document.activeElement?.dataset.title;
  for (const [name, made] of Object.entries(groups)) {
    byId(`${name}-charts`).replaceChildren(...made.filter(Boolean));
    byId(name).hidden = !made.some(Boolean);
  }
  byId("smoothing-told").textContent = byId("smoothing").value;
  if (focused) [...document.querySelectorAll("svg")].find((svg) => svg.dataset.title === focused)?.focus({ preventScroll: true });
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
  slider.disabled = drawn.length < 2;
  samples.shown = true;
  const chosen = drawn[Number(slider.value)], step = `${whole(chosen.step)}${chosen.of ? ` (${chosen.of})` : ""}`;
  byId("sample-told").textContent = step;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  byId("samples").replaceChildren(...chosen.images.map((source, i) => element("img", { src: source, alt: `sample ${i + 1} of step ${chosen.step}` })));
}

function rows(id, cells, head) {
  const isNumber = (i) => typeof (cells[0] || [])[i] === "number";
  const row = (kind, values) => element("tr", {}, ...values.map((cell, i) => {
    const made = element(kind, isNumber(i) ? { class: "number" } : {}, typeof cell === "number" ? whole(cell) : String(cell));
    if (kind === "th") made.setAttribute("scope", "col");
    return made;
  }));
  byId(id).replaceChildren(...(head ? [element("thead", {}, row("th", head))] : []), element("tbody", {}, ...cells.map((values) => row("td", values))));
  byId(id).closest(".wide").hidden = !cells.length;
}

function lengths(texts) {
  if (!texts.bars) return [];
  const cut = texts.used ? `; ${whole(texts.cut)} have more than the ${texts.used} that are used` : "";
  const words = `Of ${whole(texts.sampled)} sampled images: median ${short(texts.median)}, 95 % up to ${short(texts.high)}, longest ${whole(texts.most)}; ${whole(texts.empty)} without text${cut}`;
  return [bars(`Caption lengths, ${texts.unit}`, texts.bars, texts.width, words, texts.used)];
}

function dataSet() {
  const found = data.data;
  byId("dataset").hidden = !found;
  if (!found) return;
  const problem = found.problem || "";
  byId("dataset-problem").textContent = problem && `Nothing to look at: ${problem}`;
  byId("dataset-problem").hidden = !problem;
  byId("dataset-place").textContent = problem ? "" : `${found.prepared}, snapshot ${found.snapshot}`;
  const [trained, held] = found.images || [];
  byId("dataset-facts").replaceChildren(
    ...fact(whole(trained), "images to train on"), ...fact(whole(found.per_epoch), "an epoch, with repeats"),
    ...fact(whole(held), "images of validation"), ...fact(whole(found.num_buckets), "buckets"),
    ...fact(problem ? "" : whole(found.num_left_out), "left out by prepare"));
  byId("lengths").replaceChildren(...(problem ? [] : lengths(found.texts)));
  rows("sources", found.sources || [], ["source", "images", "with repeats"]);
  const resolution = (each) => (each ? `, at ${each} px` : "");
  rows("buckets", (found.buckets || []).map(([w, h, images, all, at]) => [`${w} x ${h}${resolution(at)}`, images, all]), ["bucket", "images", "with repeats"]);
  rows("left-out", found.left_out || [], ["left out, why", "images"]);
}

function tables() {
  const run = data.runs[0], events = [...run.events].reverse();
  byId("events").replaceChildren(...(events.length ? events.map((line) => element("li", {}, line)) : [element("li", { class: "none" }, "nothing happened")]));
  rows("checkpoints", run.checkpoints.map((each) => [each.name, `${each.gib} GiB`]));
  byId("checkpoints-section").hidden = !run.checkpoints.length;
  rows("settings", Object.entries(run.settings));
  const many = data.runs.length > 1, before = data.previous;
  const differ = many ? data.differing : before ? before.rows : [];
  rows("differing", differ, ["key", ...(many ? data.runs.map((each) => each.name) : [run.name, before?.name])]);
  byId("differing-told").textContent = differ.length ? (many ? "" : `Settings of ${before.name}, the run before this one in the same folder, that were others.`)
    : many ? "All settings are the same." : before ? `All settings are those of ${before.name}, the run before this one in the same folder.`
    : "There is no earlier run in the same folder to compare with.";
}

function places() {
  const shown = [...document.querySelectorAll("section[id] > h2")].filter((head) => !head.parentElement.hidden);
  byId("places").replaceChildren(...shown.map((head) => element("a", { href: `#${head.parentElement.id}` }, head.textContent)));
}

function draw() {
  byId("name").textContent = data.runs.map((run) => run.name).join(", ");
  document.title = `${data.runs[0].name} - sdxl-train`;
  byId("place").textContent = data.runs[0].place;
  stands();
  charts();
  samples();
  dataSet();
  tables();
  places();
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
  byId("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
}

async function refresh() {
  try {
    const answer = await fetch(`data.json?samples=${data.samples_key}`, { cache: "no-store" });
    if (!answer.ok) return;
    const newer = unpacked(await answer.json());
    newer.runs[0].samples ??= data.runs[0].samples;
    data = newer;
    draw();
  } catch { /* the next one may come */ }
}

setTheme(kept("sdxl-train theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  kept("sdxl-train theme", document.documentElement.dataset.theme);
});
for (const id of ["smoothing", "log"]) byId(id).addEventListener("input", charts);
byId("sample").addEventListener("input", samples);
draw();
if (LIVE) setInterval(refresh, 10000);

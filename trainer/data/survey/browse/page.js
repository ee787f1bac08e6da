"use strict";

// Filters the gallery, moves in it by keys, enlarges an image, and switches between light and dark.
// Texts of the data set are only ever moved as nodes, never read as markup.

const byId = (id) => document.getElementById(id);
const cards = [...document.querySelectorAll("#cards > .card")];
const words = cards.map((card) =>
  [".key", ".text"].map((part) => card.querySelector(part).textContent.toLowerCase()).join(" "));
const search = byId("search"), source = byId("source"), bucket = byId("bucket"), large = byId("large");
let shown = cards;
let current = -1; // place in `shown` of the image that is enlarged

function filter() {
  const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = cards.filter((card, i) => {
    const fits = (!source.value || card.dataset.source === source.value)
      && (!bucket.value || card.dataset.bucket === bucket.value)
      && wanted.every((word) => words[i].includes(word));
    card.hidden = !fits;
    return fits;
  });
  byId("found").textContent = `${shown.length} of ${cards.length} images`;
}

function button(card) {
  return card.querySelector(".open");
}

// The card of the next row, or of the one before, that stands most nearly below or above.
function inRow(card, direction) {
  const from = card.getBoundingClientRect();
  const places = shown.map((other) => ({ other, at: other.getBoundingClientRect() }));
  const beyond = places.filter(({ at }) => direction * (at.top - from.top) > 4);
  if (!beyond.length) return null;
  const row = direction * Math.min(...beyond.map(({ at }) => direction * at.top));
  const inIt = beyond.filter(({ at }) => Math.abs(at.top - row) <= 4);
  return inIt.reduce((a, b) => Math.abs(a.at.left - from.left) <= Math.abs(b.at.left - from.left) ? a : b).other;
}

function move(card, key) {
  const place = shown.indexOf(card);
  const next = {
    ArrowRight: () => shown[place + 1],
    ArrowLeft: () => shown[place - 1],
    ArrowDown: () => inRow(card, 1),
    ArrowUp: () => inRow(card, -1),
    Home: () => shown[0],
    End: () => shown[shown.length - 1],
  }[key]();
  if (next) button(next).focus();
  else if (key === "ArrowUp" || key === "ArrowLeft") search.focus();
}

function enlarge(place) {
  if (place < 0 || place >= shown.length) return;
  current = place;
  const card = shown[place];
  const content = [card.querySelector(".pictures"), card.querySelector(".about")];
  byId("large-content").replaceChildren(...content.map((part) => part.cloneNode(true)));
  byId("previous").disabled = place === 0;
  byId("next").disabled = place === shown.length - 1;
  if (!large.open) large.showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key;
  const typing = event.target.closest && event.target.closest("input, select");
  if (large.open) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (step) {
      enlarge(current + step);
      event.preventDefault();
    }
    return;
  }
  if (event.target === search && (key === "ArrowDown" || key === "Enter" || key === "Escape")) {
    event.preventDefault();
    if (key === "Escape" && search.value) {
      search.value = "";
      filter();
    } else if (shown.length) {
      button(shown[0]).focus();
    }
  } else if (typing) {
    return;
  } else if (key === "/") {
    event.preventDefault();
    search.focus();
    search.select();
  } else if (key === "t") {
    switchTheme();
  } else if (["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "Home", "End"].includes(key)) {
    const card = event.target.closest && event.target.closest(".card");
    if (!card) return;
    event.preventDefault();
    move(card, key);
  }
}

function kept(name, value) {
  try { // a page of a file may not be allowed to keep anything
    return value === undefined ? localStorage.getItem(name) : localStorage.setItem(name, value);
  } catch {
    return null;
  }
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function tellTheme() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
}

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  kept("sdxl-train theme", document.documentElement.dataset.theme);
  tellTheme();
}

function showTwins() {
  for (const link of document.querySelectorAll(".twin")) {
    const card = document.querySelector(link.getAttribute("href"));
    const picture = card && card.querySelector("img.crop");
    if (picture) link.prepend(picture.cloneNode());
    link.addEventListener("click", (event) => {
      event.preventDefault();
      search.value = source.value = bucket.value = "";
      filter();
      button(card).focus();
      enlarge(shown.indexOf(card));
    });
  }
}

const theme = kept("sdxl-train theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
tellTheme();
filter();
showTwins();
byId("theme").addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tellTheme);
byId("filter").addEventListener("submit", (event) => event.preventDefault());
for (const part of [search, source, bucket]) part.addEventListener("input", filter);
byId("cards").addEventListener("click", (event) => {
  const card = event.target.closest(".open") && event.target.closest(".card");
  if (card) enlarge(shown.indexOf(card));
});
byId("previous").addEventListener("click", () => enlarge(current - 1));
byId("next").addEventListener("click", () => enlarge(current + 1));
byId("close").addEventListener("click", () => large.close());
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
large.addEventListener("close", () => { if (shown[current]) button(shown[current]).focus(); });
document.addEventListener("keydown", onKey);

// The keyboard: everything can be done with it, and `?` says how.

import {$, element} from "./text.js";

const KEYS = [
  ["s  g  c  a  m", "strip, grid, compare, arena, scores"],
  ["/", "search prompts"],
  ["j  k", "next and previous prompt"],
  ["← → ↑ ↓", "move in the grid and among the images; step in the large view"],
  ["Enter", "open the image"],
  ["f", "favourite"],
  ["1 … 9, 0", "rate 1 to 10"],
  ["t", "tag"],
  ["p", "pin the image to compare"],
  ["x", "swap rows and columns of the grid"],
  ["space", "the other image, in compare"],
  ["← → ↑ ↓", "in the arena: left, right, equally good, both bad"],
  ["l", "copy a link to this view"],
  ["Esc", "close"],
  ["?", "these keys"],
];
const VIEW_KEYS = {s: "strip", g: "grid", c: "compare", a: "arena", m: "scores"};

export function showKeys(app) {
  app.openSheet("Keys", [element("dl", {className: "keys"}, ...KEYS.flatMap(([keys, text]) => [
    element("dt", {}, element("kbd", {textContent: keys})), element("dd", {textContent: text})]))]);
}

/** The image that a key is about: the large one, or the one that has the focus or is under the pointer. */
function shownImage(app) {
  if ($("large").open) return app.views.large.shown;
  const node = document.activeElement?.closest(".tile") ?? document.querySelector(".tile:hover");
  return node?.shown ?? null;
}

/** Move the focus among the images of the strip, by rows as they lie on the page. */
function moveFocus(event) {
  const tile = event.target.closest("#images .tile, #compare .tile");
  if (!tile) return false;
  const all = [...tile.closest("#images, #compare").querySelectorAll(".tile")], at = all.indexOf(tile);
  const across = all.filter((other) => other.getBoundingClientRect().top === tile.getBoundingClientRect().top).length;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across}[event.key];
  if (!step) return false;
  all[at + step]?.focus();
  return true;
}

export function setUpKeys(app) {
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented) return;
    if ($("sheet").open || event.target.closest("input:not([type=range]):not([type=checkbox]), select, textarea")) return;
    if (handle(event, app)) event.preventDefault();
  });
}

function handle(event, app) {
  const {key} = event;
  const isArrow = key.startsWith("Arrow");
  if (isArrow && event.target.type === "range") return false;
  if ($("large").open) { if (app.views.large.key(event)) return true; }
  else if (app.views[app.view.view].key?.(event, app) || (isArrow && moveFocus(event))) return true;
  if (key === "?") { showKeys(app); return true; }
  if (key === "l") { app.copyLink(); return true; }
  const image = app.source.mode === "images" && app.view.view !== "arena" ? shownImage(app) : null;
  if (image?.image && mark(key, image, app)) return true;
  if ($("large").open) return false;
  if (VIEW_KEYS[key]) { app.go({view: VIEW_KEYS[key]}); return true; }
  if (key === "/") { app.openPrompts(true); $("search").focus(); $("search").select(); return true; }
  if (key === "j" || key === "k") { app.stepPrompt(key === "j" ? 1 : -1); return true; }
  return false;
}

function mark(key, shown, app) {
  if (key === "f") app.toggleFavourite(shown);
  else if (key === "p") app.togglePin(shown);
  else if (key === "t") app.askTag(shown);
  else if (/^\d$/.test(key)) app.rate(shown, Number(key) || 10);
  else return false;
  return true;
}

// The view, and the address that holds all of it:
// #view=grid&prompt=3&k=50&p=0.9&t=1&c=3&sc=1&rows=top_k&cols=cond_scale&image=1.2&pin=...

import {AXES, GRID_AXES, SETTING, axisOf} from "./axes.js";

export const VIEWS = ["strip", "grid", "compare", "arena", "scores"];
export const MAX_PINS = 9;
const SORTS = ["best", "worst", "seed", "newest", "oldest"];
const SHOWS = ["number", "outline", "heat", "none"];
const CELLS = ["1", "4", "9", "seed"];
const COMPARES = ["side", "slider", "blink"];

export const DEFAULTS = {
  view: "strip", rows: null, cols: null, page1: "", page2: "", cell: "1", seed: 0, sort: "best", min: null, only: "",
  show: "number", find: "", mode: "side", of: "", scope: "prompt", others: "all", image: null, pins: [],
};
const CHOICES = {view: VIEWS, cell: CELLS, sort: SORTS, show: SHOWS, mode: COMPARES, scope: ["prompt", "all"],
  others: ["all", "fixed"]};
const AXIS_NAMES = ["rows", "cols", "page1", "page2", "of"];

const codec = (axis, source) => ({
  write: (value) => (axis.key === "model" ? source.models[value] ?? "?" : axis.key === "archive" ? source.archives[value] : value),
  read: (text) => {
    if (axis.isNumber) return text.trim() && Number.isFinite(Number(text)) ? Number(text) : undefined;
    const list = {model: source.models.map((name) => name ?? "?"), archive: source.archives}[axis.key];
    if (list) return list.includes(text) ? list.indexOf(text) : undefined;
    if (axis.key === "sc_prompt") return [...source.scPrompts.keys()].find((id) => String(id) === text);
    return text;
  },
});

/** The axes that the address names: an archive of one model in one file says nothing of either. */
const axesOf = (source) => AXES.filter(({key}) => !(key === "model" && source.models.length < 2)
  && !(key === "archive" && source.archives.length < 2));

export function addressOf(view, source) {
  const hash = new URLSearchParams();
  if (view.view !== DEFAULTS.view) hash.set("view", view.view);
  hash.set("prompt", view.prompt);
  const isBlind = view.view === "arena";
  for (const axis of isBlind ? [] : axesOf(source)) {
    const value = view.values[axis.key];
    if (value !== null && value !== undefined && value !== "") hash.set(axis.short, codec(axis, source).write(value));
  }
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const value = view[name];
    if (["view", "pins"].includes(name) || value === usual || (isBlind && name === "image")) continue;
    if (value !== null) hash.set(name, name === "seed" ? value + 1 : value);
  }
  view.pins.forEach((pin) => hash.append("pin", writePin(pin, source)));
  return "#" + hash;
}

const escapePart = (text) => encodeURIComponent(text.toWellFormed()).replaceAll("~", "%7E");

function writePin({prompt, values, image}, source) {
  const parts = AXES.map((axis) => codec(axis, source).write(values[axis.key]) ?? "");
  return [prompt, ...parts, image ?? ""].map((part) => escapePart(String(part))).join("~");
}

function readPin(text, source) {
  try {
    const [prompt, ...parts] = text.split("~").map(decodeURIComponent);
    if (parts.length !== AXES.length + 1) return null;
    const values = Object.fromEntries(AXES.map((axis, i) => [axis.key,
      parts[i] === "" && axis.isNumber ? null : codec(axis, source).read(parts[i])]));
    return {prompt: readPrompt(prompt), values, image: parts.at(-1) || null};
  } catch {
    return null;
  }
}

const readPrompt = (text) => (/^-?\d+$/.test(text ?? "") ? Number(text) : null);

/** What an address asks for, as far as it makes sense; the prompt and settings may not exist. */
export function readAddress(text, source) {
  const hash = new URLSearchParams(text.replace(/^#/, ""));
  const view = {...DEFAULTS, prompt: readPrompt(hash.get("prompt")), values: {}};
  for (const axis of AXES) {
    const found = hash.get(axis.short);
    if (found === null || (found === "" && axis.key !== "model")) continue;
    const value = codec(axis, source).read(found);
    if (value !== undefined) view.values[axis.key] = value;
  }
  for (const [name, choices] of Object.entries(CHOICES)) if (choices.includes(hash.get(name))) view[name] = hash.get(name);
  for (const name of AXIS_NAMES) if (axisOf(hash.get(name))) view[name] = hash.get(name);
  if (hash.get("of") === SETTING.key) view.of = SETTING.key;
  const [seed, min] = ["seed", "min"].map((name) => hash.get(name));
  if (/^[1-9]\d{0,8}$/.test(seed ?? "")) view.seed = Number(seed) - 1;
  if (min && Number.isFinite(Number(min))) view.min = Number(min);
  view.find = (hash.get("find") ?? "").slice(0, 300);
  view.only = (hash.get("only") ?? "").slice(0, 80);
  view.image = hash.get("image")?.slice(0, 80) ?? null;
  view.pins = hash.getAll("pin").slice(0, MAX_PINS).map((pin) => readPin(pin, source)).filter(Boolean);
  return view;
}

export const samePin = (a, b) => a.prompt === b.prompt && a.image === b.image
  && AXES.every(({key}) => a.values[key] === b.values[key]);

/** Rows, columns and page axes that differ from one another; "" is no page. */
export function gridAxes(view, usable) {
  const isUsable = (key) => usable.some((axis) => axis.key === key);
  const wanted = [view.rows, view.cols].map((key) => (isUsable(key) ? key : null));
  const free = usable.map(({key}) => key).filter((key) => !wanted.includes(key));
  const rows = wanted[0] ?? free.shift();
  const cols = wanted[1] && wanted[1] !== rows ? wanted[1] : free.filter((key) => key !== rows).shift() ?? rows;
  const page1 = isUsable(view.page1) && ![rows, cols].includes(view.page1) ? view.page1 : "";
  const page2 = isUsable(view.page2) && ![rows, cols, page1].includes(view.page2) ? view.page2 : "";
  return {rows, cols, page1, page2};
}

export const usableAxes = (source) => GRID_AXES.filter((axis) => source.mode === "images" || axis.key !== "seed");

// The grid: any two axes as rows and columns, up to two more as pages below one another. Only the cells in sight are
// elements, and only their images are asked for.

import {$, attributes, cut, element, fillSelect, plural, promptText, scoreText} from "./text.js";
import {AXES, SEED_AXIS, axisOf, axisValues, settingsKey} from "./axes.js";
import {heat} from "./scores.js";
import {gridAxes, usableAxes} from "./state.js";
import {tile} from "./tile.js";

const MAX_PROMPTS = 2000, MAX_SEEDS = 1000; // as rows or columns
const GAP = 8, LABEL = 136, BAND = 40, LINE = 17;
const SCALE = {1: 1, 4: 1.6, 9: 2.1, seed: 1};  // side of a cell, in sizes of an image
const CELL_NAMES = [["1", "best image"], ["4", "best 4"], ["9", "best 9"], ["seed", "the same seed"]];

/** Positions of things of these sizes behind one another: start of each, and the end. */
function starts(sizes) {
  const found = [0];
  sizes.forEach((size) => found.push(found.at(-1) + size));
  return found;
}

/** The first thing that ends after `position`. */
function findAt(offsets, position) {
  let low = 0, high = offsets.length - 2;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (offsets[middle + 1] > position) high = middle; else low = middle + 1;
  }
  return Math.max(0, low);
}

const linesOf = (text, width) => Math.min(12, Math.max(1, Math.ceil(text.length * 7.2 / width)));

export const grid = {
  cells: new Map(),   // "row,column" -> element
  heads: new Map(),   // column -> element
  labels: new Map(),  // line -> element
  active: [0, 0],

  setUp(app) {
    this.app = app;
    const choose = (name) => (event) => this.choose(name, event.target.value);
    for (const name of ["rows", "cols", "page1", "page2"]) $(name).addEventListener("change", choose(name));
    $("cell").addEventListener("change", () => app.go({cell: $("cell").value}));
    $("swap").addEventListener("click", () => this.swap());
    $("seed").addEventListener("input", () => app.go({seed: $("seed").valueAsNumber}, {replace: true}));
    $("grid").addEventListener("scroll", () => this.drawSoon(), {passive: true});
    new ResizeObserver(() => this.drawSoon()).observe($("grid"));
    $("grid").addEventListener("focusin", ({target}) => {
      const cell = target.closest(".cell");
      if (cell) this.active = cell.place;
    });
  },

  /** Take an axis for a place; where it stood before comes what stood in this place. */
  choose(name, key) {
    const now = {...this.axes};
    const other = Object.keys(now).find((place) => now[place] === key && key && place !== name);
    const changes = {...now, [name]: key};
    if (other) changes[other] = now[name] === key ? "" : now[name];
    this.app.go(changes);
  },

  swap() { this.app.go({...this.axes, rows: this.axes.cols, cols: this.axes.rows}); },

  /** What the grid depends on: not on settings that are axes. */
  keyOf(app) {
    const axes = this.axesFor(app), keys = Object.values(axes);
    const values = Object.entries(app.view.values).filter(([key]) => !keys.includes(key));
    const {prompt, find, cell, seed, min, show} = app.view;
    return JSON.stringify(["grid", axes, values, keys.includes("prompt") ? find : prompt, cell, seed, min, show]);
  },

  axesFor(app) { return gridAxes(app.view, this.orderedAxes(app)); },

  async show(app, signal) {
    const {source} = app;
    this.axes = this.axesFor(app);
    this.fillChoices(app);
    const lists = {};
    for (const key of new Set(Object.values(this.axes).filter(Boolean))) lists[key] = await this.valuesOf(axisOf(key), app, signal);
    if (signal.aborted) return;
    const pages = [this.axes.page1, this.axes.page2].filter(Boolean).map((key) => lists[key].map((value) => ({key, ...value})));
    const combined = pages.reduce((all, list) => all.flatMap((row) => list.map((value) => [...row, value])), [[]]);
    this.columns = lists[this.axes.cols];
    this.lines = combined.flatMap((page) => [
      ...(page.length ? [{page, isBand: true}] : []), ...lists[this.axes.rows].map((row) => ({page, row}))]);
    this.groupsByPrompt = new Map();
    this.imagesByCell = new Map();
    this.range = this.rangeOf(app);
    this.showLegend(app);
    this.fitHeight();
    this.arrange(app);
    this.clear();
    await this.draw(signal);
    const cellCount = this.columns.length * (this.lines.length - (pages.length ? combined.length : 0));
    app.setStatus(`${axisOf(this.axes.rows).label} × ${axisOf(this.axes.cols).label}: ${plural(cellCount, "cell")}.`
      + (this.isCut ? ` The first ${MAX_PROMPTS.toLocaleString("en")} prompts; search for others.` : ""));
  },

  /** Axes with several values first, in the order in which they tell most. */
  orderedAxes(app) {
    const order = ["temperature", "cond_scale", "top_k", "top_p", "sc_prompt", "extra_settings", "model", "archive", "prompt", "seed"];
    const isOne = ({key}) => (key === "prompt" ? app.source.promptCount < 2 : key !== "seed" && axisValues(app.groups, axisOf(key)).length < 2);
    const rank = (axis) => order.indexOf(axis.key) + (isOne(axis) ? order.length : 0);
    return usableAxes(app.source).sort((a, b) => rank(a) - rank(b));
  },

  fillChoices(app) {
    const axes = usableAxes(app.source).filter((axis) => Object.values(this.axes).includes(axis.key)
      || !AXES.includes(axis) || axisValues(app.groups, axis).length > 1);
    const choices = axes.map(({key, label}) => [key, label]);
    for (const name of ["rows", "cols"]) fillSelect($(name), choices, this.axes[name]);
    for (const name of ["page1", "page2"]) fillSelect($(name), [["", "none"], ...choices], this.axes[name]);
    fillSelect($("cell"), app.source.mode === "images" ? CELL_NAMES : CELL_NAMES.slice(0, 1), app.view.cell);
    const hasSeed = app.view.cell === "seed" && !Object.values(this.axes).includes("seed");
    $("seed-label").hidden = !hasSeed;
    $("seed").max = Math.max(0, Math.min(app.source.seeds.length, MAX_SEEDS) - 1);
    $("seed").value = app.view.seed;
    $("seed-shown").textContent = SEED_AXIS.show(app.view.seed);
  },

  /** The values of an axis of the grid: [{value, text}]. */
  async valuesOf(axis, app, signal) {
    const {source} = app;
    if (axis.key === "prompt") {
      const {total, prompts} = await source.prompts({search: app.view.find, offset: 0, limit: MAX_PROMPTS}, signal);
      this.isCut = total > prompts.length;
      this.prompts = new Map(prompts.map((prompt) => [prompt.id, prompt]));
      return prompts.map((prompt) => ({value: prompt.id, text: cut(promptText(prompt), 300)}));
    }
    if (axis.key === "seed") {
      const found = await source.images({groups: app.groups.slice(0, 60), sort: "seed", descending: false, limit: MAX_SEEDS}, signal);
      const seeds = new Set([...found.values()].flatMap(({images}) => images.map((image) => image.seed)));
      return [...seeds].sort((a, b) => a - b).slice(0, MAX_SEEDS).map((value) => ({value, text: axis.show(value)}));
    }
    const hasPrompts = Object.values(this.axes).includes("prompt");
    const values = hasPrompts ? await source.valuesOf(axis, signal) : axisValues(app.groups, axis);
    return values.map((value) => ({value, text: axis.show(value, source)}));
  },

  /** Scores from the first to the last colour: of what the cells show, where that is of one prompt. */
  rangeOf(app) {
    const {groups, source, view} = app;
    const scored = groups.filter(({mean}) => mean !== null);
    if (!scored.length || Object.values(this.axes).includes("prompt")) return source.scoreRange;
    const lows = scored.map(({mean, sd, best}) => ({1: best, seed: mean - 2 * (sd ?? 0)})[view.cell] ?? mean);
    const highs = scored.map(({mean, best}) => (["1", "seed"].includes(view.cell) ? best : mean));
    return [lows.reduce((a, b) => Math.min(a, b)), highs.reduce((a, b) => Math.max(a, b))];
  },

  /** The grid takes what the window has left, and at least some rows. */
  fitHeight() {
    const top = $("grid").getBoundingClientRect().top + window.scrollY;
    $("grid").style.height = `${Math.max(360, innerHeight - top - 16 - ($("legend").hidden ? 0 : 28))}px`;
  },

  arrange(app) {
    const {cell} = app.view;
    const size = app.size;
    this.cellSide = Math.round(size * SCALE[cell]) + GAP;
    this.count = cell === "seed" ? 1 : Number(cell);
    this.labelWidth = Math.min(LABEL, Math.round($("grid").clientWidth * .3) || LABEL);
    const heights = this.lines.map((line) => (
      line.isBand ? BAND : Math.max(this.cellSide, linesOf(line.row.text, this.labelWidth - 16) * LINE + 8)));
    this.tops = starts(heights);
    this.headHeight = Math.max(...this.columns.map((column) => linesOf(column.text, this.cellSide - 8))) * LINE + 14;
    this.headHeight = Math.max(this.headHeight, 2 * LINE + 10);
    const width = this.labelWidth + this.columns.length * this.cellSide, height = this.headHeight + this.tops.at(-1);
    this.canvas = element("div", {className: "canvas"});
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.head = element("div", {className: "heads"});
    this.head.style.height = `${this.headHeight}px`;
    this.side = element("div", {className: "labels"});
    this.side.style.width = `${this.labelWidth}px`;
    this.side.style.top = `${this.headHeight}px`;
    this.side.style.height = `${this.tops.at(-1)}px`;
    this.corner = element("div", {className: "corner"});
    this.corner.style.width = `${this.labelWidth}px`;
    this.corner.style.height = `${this.headHeight}px`;
    this.corner.append(element("span", {textContent: `${axisOf(this.axes.cols).label} →`}), element("span", {textContent: `${axisOf(this.axes.rows).label} ↓`}));
  },

  clear() {
    this.cells.clear();
    this.heads.clear();
    this.labels.clear();
    const top = element("div", {className: "head-line"}, this.corner, this.head);
    top.style.height = `${this.headHeight}px`;
    this.canvas.replaceChildren(top, this.side);
    const {scrollLeft, scrollTop} = $("grid"), isSame = this.shownAxes === JSON.stringify(this.axes);
    $("grid").replaceChildren(this.canvas);
    if (isSame) Object.assign($("grid"), {scrollLeft, scrollTop});
    else this.active = [Math.max(0, this.lines.findIndex((line) => !line.isBand)), 0];
    this.shownAxes = JSON.stringify(this.axes);
  },

  drawSoon() {
    if (this.isAsked || !this.lines || $("view-grid").hidden) return;
    this.isAsked = true;
    requestAnimationFrame(() => { this.isAsked = false; this.draw(this.app.signal); });
  },

  /** Make what is in sight, drop what is not. */
  async draw(signal) {
    const box = $("grid");
    const x = box.scrollLeft, y = box.scrollTop, margin = this.cellSide;
    const firstLine = findAt(this.tops, y - margin), lastLine = findAt(this.tops, y + box.clientHeight - this.headHeight + margin);
    const columnCount = this.columns.length;
    const firstColumn = Math.max(0, Math.floor(x / this.cellSide) - 1);
    const lastColumn = Math.min(columnCount - 1, Math.floor((x + box.clientWidth - this.labelWidth) / this.cellSide) + 1);
    const isOut = ([line, column]) => line < firstLine || line > lastLine || column < firstColumn || column > lastColumn;
    for (const [key, cell] of this.cells) {
      if (!isOut(cell.place) || cell.contains(document.activeElement)) continue;
      cell.querySelectorAll("img").forEach((image) => image.removeAttribute("src")); // no longer waited for
      cell.remove();
      this.cells.delete(key);
    }
    const drop = (nodes, first, last) => nodes.forEach((node, i) => {
      if (i < first || i > last) { node.remove(); nodes.delete(i); }
    });
    drop(this.heads, firstColumn, lastColumn);
    drop(this.labels, firstLine, lastLine);
    const added = [], parts = document.createDocumentFragment();
    for (let column = firstColumn; column <= lastColumn; column += 1) this.addHead(column);
    for (let line = firstLine; line <= lastLine; line += 1) {
      this.addLabel(line);
      for (let column = firstColumn; column <= lastColumn && !this.lines[line].isBand; column += 1) {
        const key = `${line},${column}`;
        if (this.cells.has(key)) continue;
        const cell = element("div", {className: "cell"});
        cell.place = [line, column];
        Object.assign(cell.style, {left: `${this.labelWidth + column * this.cellSide}px`, top: `${this.headHeight + this.tops[line]}px`,
          width: `${this.cellSide}px`, height: `${this.tops[line + 1] - this.tops[line]}px`});
        this.cells.set(key, cell);
        added.push(cell);
        parts.append(cell);
      }
    }
    this.canvas.append(parts);
    await this.fill(added, signal);
  },

  addHead(column) {
    if (this.heads.has(column)) return;
    const {text} = this.columns[column];
    const node = element("div", {className: "column-label", dir: "auto", textContent: text, title: text});
    Object.assign(node.style, {left: `${column * this.cellSide}px`, width: `${this.cellSide}px`});
    this.heads.set(column, node);
    this.head.append(node);
  },

  addLabel(i) {
    if (this.labels.has(i)) return;
    const line = this.lines[i];
    const text = line.isBand ? line.page.map((part) => `${axisOf(part.key).label} ${part.text}`).join(" · ") : line.row.text;
    const node = element("div", {className: line.isBand ? "band" : "row-label"},
      element("span", {dir: "auto", textContent: text, title: text}));
    Object.assign(node.style, {top: `${this.tops[i]}px`, height: `${this.tops[i + 1] - this.tops[i]}px`});
    if (line.isBand) node.style.width = `${Math.max($("grid").clientWidth - 24, this.labelWidth)}px`;
    this.labels.set(i, node);
    this.side.append(node);
  },

  /** What a cell shows: prompt id, settings, and seed or null. */
  wantedAt([i, column]) {
    const {view} = this.app;
    const line = this.lines[i];
    const wanted = {...view.values};
    const parts = [...line.page, {key: this.axes.rows, ...line.row}, {key: this.axes.cols, ...this.columns[column]}];
    parts.forEach(({key, value}) => { wanted[key] = value; });
    const {prompt = this.app.prompt.id, seed = view.cell === "seed" ? view.seed : null, ...values} = wanted;
    return {prompt, seed, values};
  },

  async groupsOf(promptIds, signal) {
    const missing = promptIds.filter((id) => !this.groupsByPrompt.has(id));
    if (!missing.length) return;
    const found = new Map(missing.map((id) => [id, new Map()]));
    for (const group of await this.app.source.groups(missing, signal)) found.get(group.prompt)?.set(settingsKey(group.values), group);
    found.forEach((groups, id) => this.groupsByPrompt.set(id, groups));
  },

  async fill(cells, signal) {
    const {source, view} = this.app;
    const wanted = cells.map((cell) => this.wantedAt(cell.place));
    await this.groupsOf([...new Set(wanted.map(({prompt}) => prompt))], signal);
    const bySeed = new Map();
    wanted.forEach((one) => {
      one.group = this.groupsByPrompt.get(one.prompt)?.get(settingsKey(one.values)) ?? null;
      if (!one.group) return;
      if (!bySeed.has(one.seed)) bySeed.set(one.seed, new Map());
      bySeed.get(one.seed).set(one.group.id, one.group);
    });
    const found = new Map();
    await Promise.all([...bySeed].map(async ([seed, groups]) => {
      const query = {groups: [...groups.values()], sort: "score", descending: true, seed, min: view.min, limit: seed === null ? this.count : 1};
      found.set(seed, await source.images(query, signal));
    }));
    if (signal.aborted) return;
    cells.forEach((cell, i) => this.fillCell(cell, wanted[i], found.get(wanted[i].seed)?.get(wanted[i].group?.id)?.images ?? []));
  },

  fillCell(cell, {prompt, group, seed}, images) {
    const {app} = this;
    const {show} = app.view;
    const shown = prompt === app.prompt.id ? app.prompt : this.prompts?.get(prompt) ?? app.prompt;
    Object.assign(cell, {group, images, prompt: shown});
    cell.classList.add(`of-${this.count}`);
    if (!images.length) {
      cell.append(element("span", {className: "none", textContent: "–", title: group ? "no such image here" : "no images with these settings"}));
      return;
    }
    const score = seed === null && this.count > 1 ? group.mean : images[0].score;
    if (show === "heat") {
      const {fill, text} = heat(score, this.range);
      cell.classList.add("heat");
      cell.style.setProperty("--heat", fill);
      cell.style.setProperty("--heat-text", text);
    }
    const options = {loading: "eager", show: show === "outline" ? "outline" : "none", range: this.range};
    cell.append(...images.map((image) => tile(image, shown, app, options)));
    if ((show === "number" || show === "heat") && score !== null) {
      cell.append(element("span", {className: "number", textContent: scoreText(score),
        title: this.count > 1 && seed === null ? "mean of all images of this setting" : "score of this image"}));
    }
    cell.querySelectorAll(".tile").forEach((button) => {
      button.tabIndex = cell.place[0] === this.active[0] && cell.place[1] === this.active[1] ? 0 : -1;
      button.title = this.describe(cell);
    });
  },

  describe(cell) {
    const {source} = this.app;
    const settings = AXES.filter((axis) => axis.isNumber).map((axis) => `${axis.label} ${axis.show(cell.group.values[axis.key], source)}`);
    return `${cut(promptText(cell.prompt), 120)}\n${settings.join(", ")}`;
  },

  /** Move to the next cell that has an image, by keyboard. */
  async move(lineStep, columnStep) {
    let [line, column] = this.active;
    do {
      line += lineStep;
      column += columnStep;
    } while (this.lines[line]?.isBand);
    if (!this.lines[line] || !this.columns[column]) return;
    this.active = [line, column];
    const box = $("grid");
    const top = this.tops[line], left = column * this.cellSide;
    const [height, width] = [box.clientHeight - this.headHeight, box.clientWidth - this.labelWidth];
    if (top < box.scrollTop) box.scrollTop = top;
    if (this.tops[line + 1] > box.scrollTop + height) box.scrollTop = this.tops[line + 1] - height;
    if (left < box.scrollLeft) box.scrollLeft = left;
    if (left + this.cellSide > box.scrollLeft + width) box.scrollLeft = left + this.cellSide - width;
    await this.draw(this.app.signal);
    const cell = this.cells.get(`${line},${column}`);
    $("grid").querySelectorAll('.tile[tabindex="0"]').forEach((button) => { button.tabIndex = -1; });
    const button = cell?.querySelector(".tile");
    if (button) { button.tabIndex = 0; button.focus({preventScroll: true}); }
    else attributes(cell, {tabindex: -1}).focus({preventScroll: true});
  },

  key(event) {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (step && $("grid").contains(event.target)) { this.move(...step); return true; }
    if (event.key === "x") { this.swap(); return true; }
    return false;
  },

  showLegend(app) {
    const isShown = ["heat", "outline"].includes(app.view.show) && this.range;
    $("legend").hidden = !isShown;
    if (!isShown) return;
    const steps = Array.from({length: 24}, (_, i) => {
      const node = element("span", {className: "step"});
      node.style.background = heat(i, [0, 23]).fill;
      return node;
    });
    $("legend").replaceChildren(element("span", {textContent: scoreText(this.range[0])}),
      element("span", {className: "steps"}, ...steps), element("span", {textContent: scoreText(this.range[1])}));
  },

  hide() {
    this.lines = this.shownAxes = null;
    this.cells.clear();
    $("grid").replaceChildren();
  },

  /** All cells, in sight or not, for saving. */
  async layout(app) {
    const {lines, columns} = this;
    const cells = [];
    for (const [i, line] of lines.entries()) {
      if (line.isBand) continue;
      const row = columns.map((_, column) => ({place: [i, column], wanted: this.wantedAt([i, column])}));
      await this.groupsOf([...new Set(row.map(({wanted}) => wanted.prompt))], app.signal);
      for (const cell of row) {
        const {prompt, seed, values} = cell.wanted;
        const group = this.groupsByPrompt.get(prompt)?.get(settingsKey(values));
        const query = {sort: "score", descending: true, seed, min: app.view.min, limit: seed === null ? this.count : 1};
        cell.images = group ? (await app.source.images({groups: [group], ...query}, app.signal)).get(group.id).images : [];
        cells.push(cell);
      }
    }
    return {kind: "grid", lines, columns: columns.map(({text}) => text), cells, count: this.count, cellSide: this.cellSide,
      axes: [axisOf(this.axes.rows).label, axisOf(this.axes.cols).label]};
  },
};

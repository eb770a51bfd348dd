// The page: the view, its history, and what all views share.

import {$, attributes, cut, element, fillSelect, plural, promptText, remember, remembered, visible} from "./text.js";
import {describeChanges, nearestGroup} from "./axes.js";
import {isSite, openSource} from "./source.js";
import {DEFAULTS, MAX_PINS, VIEWS, addressOf, readAddress, samePin} from "./state.js";
import {Judge, TAG_LENGTH, identify} from "./judge.js";
import {Sliders} from "./settings.js";
import {promptList} from "./prompts.js";
import {showMarks} from "./tile.js";
import {SORT_NAMES, strip} from "./strip.js";
import {grid} from "./grid.js";
import {compare} from "./compare.js";
import {arena} from "./arena.js";
import {statistics} from "./statistics.js";
import {large} from "./large.js";
import {askSave, download} from "./save.js";
import {setUpKeys, showKeys} from "./keys.js";

const DECODE_COMMAND = "python -m dm_generations decode";
const SAME_MOVE_MS = 1500; // moves of one slider closer than this are one step of the history
const SIZES = {images: {min: 32, max: 512, step: 16, value: innerWidth < 600 ? 96 : 160}, gallery: {min: 256, max: 2048, step: 64, value: 1024}};
const SHOW_NAMES = {number: "as numbers", outline: "as outlines", heat: "as a heat map", none: "hidden"};
const VIEW_NAMES = {strip: "Strip", grid: "Grid", compare: "Compare", arena: "Arena", scores: "Scores"};

const app = {
  views: {strip, grid, compare, arena, scores: statistics, large},
  view: null, prompt: null, groups: [], group: null, notice: "", shownView: null,
  lastMove: {axis: null, time: 0}, entry: null, stop: new AbortController(),

  get signal() { return this.stop.signal; },

  // ---- Going from view to view ----

  go(changes, {replace = false, state = null} = {}) {
    this.view = {...this.view, ...changes};
    this.entry ??= replace ? null : {state};
    return this.render();
  },

  /** Show what `view` says. What was under way for an earlier view is dropped. */
  async render() {
    this.stop.abort();
    this.stop = new AbortController();
    const {signal} = this;
    try {
      await this.settle(signal);
      if (signal.aborted) return;
      const name = this.view.view;
      if (this.shownView !== name) this.views[this.shownView]?.hide();
      this.shownView = name;
      for (const other of VIEWS) {
        $(`view-${other}`).hidden = other !== name;
        const tab = $(`tab-${other}`);
        attributes(tab, {"aria-selected": other === name, tabindex: other === name ? 0 : -1});
      }
      $("browser").dataset.view = name;
      this.showHeader();
      const key = this.views[name].keyOf?.(this) ?? addressOf({...this.view, image: null}, this.source);
      if (key !== this.shownKey) {
        this.shownKey = null;
        await this.views[name].show(this, signal);
        if (!signal.aborted) this.shownKey = key;
      }
      if (!signal.aborted) await large.show(this, signal);
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      if (!(error instanceof Error) || !this.source.isLive) throw error;
      this.setNotice(visible(error.message));
    }
  },

  /** Find prompt and group of the view, or the nearest there are, and say so. */
  async settle(signal) {
    const {source, view} = this;
    if (this.prompt?.id !== view.prompt || this.isStale) {
      const ask = async (id) => {
        const [{prompts}, groups] = await Promise.all([source.prompts({ids: [id]}, signal), source.groups([id], signal)]);
        return {prompt: prompts[0], groups};
      };
      let {prompt, groups} = await ask(view.prompt ?? source.first.prompt);
      if (!prompt || !groups.length) ({prompt, groups} = await ask(source.first.prompt));
      if (signal.aborted) return;
      Object.assign(this, {prompt, groups, isStale: false});
    }
    const wanted = view.values;
    this.group = nearestGroup(this.groups, wanted, this.moved ?? null);
    this.moved = null;
    const notice = describeChanges(wanted, this.group, source);
    const isOld = JSON.stringify([view.prompt, view.values]) === this.settled;
    this.view = {...view, prompt: this.prompt.id, values: this.group.values};
    if (this.view.image !== null && this.wantedImage) await this.findImage(signal);
    if (!isOld) this.notice = notice;
    this.settled = JSON.stringify([this.view.prompt, this.view.values]);
    if (signal.aborted) return;
    if (this.view.view === "grid") Object.assign(this.view, grid.axesFor(this)); // a link shows these, whatever is usual
    const address = addressOf(this.view, source);
    if (this.entry) history.pushState(this.entry.state, "", address);
    else if (location.hash !== address) history.replaceState(history.state, "", address);
    this.entry = null;
  },

  /** Show the view anew, although the address is the same. */
  refresh() {
    this.shownKey = null;
    return this.render();
  },

  /** After a slider of the large view moved: the image of the same key under the new settings, or the best. */
  async findImage(signal) {
    const {images} = (await this.source.images({groups: [this.group], sort: "score", descending: true}, signal)).get(this.group.id);
    const same = images.find((image) => image.seed >= 0 && image.seed === this.wantedImage.seed);
    this.view.image = (same ?? images[0])?.name ?? null;
    this.wantedImage = null;
  },

  showHeader() {
    const {view, prompt, groups, group, source} = this;
    const text = promptText(prompt);
    $("prompt").textContent = visible(text);
    document.title = `${cut(text, 60)} · ${visible(source.archives.join(", "))}`;
    const isBlind = view.view === "arena";
    const onAxes = view.view === "grid" ? Object.values(grid.axesFor(this)) : [];
    $("prompt").hidden = isBlind || onAxes.includes("prompt");
    $("settings").hidden = isBlind;
    this.sliders.show(groups, group, source, onAxes);
    this.setNotice(this.notice);
    $("tab-compare").textContent = view.pins.length ? `Compare ${view.pins.length}` : "Compare";
    const has = (...views) => views.includes(view.view);
    $("options").hidden = !has("strip", "grid", "compare");
    $("sort-label").hidden = $("only-label").hidden = !has("strip");
    $("filter-label").hidden = $("show-label").hidden = !has("strip", "grid");
    $("save").hidden = has("scores");
    fillSelect($("sort"), Object.entries(SORT_NAMES), view.sort);
    fillSelect($("show"), Object.entries(SHOW_NAMES), view.show);
    if (document.activeElement !== $("min")) $("min").value = view.min ?? "";
    this.showOnly();
    promptList.mark();
  },

  showOnly() {
    const tags = this.judge.tags.map((tag) => [`#${tag}`, `# ${cut(tag, 40)}`]);
    const {only} = this.view;
    if (only.startsWith("#") && !tags.some(([value]) => value === only)) tags.push([only, `# ${cut(only.slice(1), 40)}`]);
    fillSelect($("only"), [["", "all"], ["favourite", "♥ favourites"], ...tags], only);
  },

  setStatus(text) { $("status").textContent = text; },
  setNotice(text) { $("notice").textContent = text; },

  /** The images that have the favourite sign or tag that the view asks for. */
  filterMarked(images, prompt) {
    const {only} = this.view;
    if (!only) return images;
    return images.filter((image) => {
      const mark = this.judge.markOf(image, prompt.text);
      return only === "favourite" ? mark?.favourite : mark?.tags.has(only.slice(1));
    });
  },

  // ---- Prompts and settings ----

  choosePrompt(id) {
    this.openPrompts(false);
    if (id !== this.prompt.id) this.go({prompt: id, image: null});
  },

  stepPrompt(step) {
    const prompt = promptList.neighbour(step);
    if (prompt) this.go({prompt: prompt.id, image: null});
  },

  searchChanged() {
    this.go({find: promptList.search}, {replace: true});
  },

  /** Search for what the address says. */
  showSearch() {
    if ($("search").value === this.view.find && promptList.total) return;
    $("search").value = this.view.find;
    promptList.find();
  },

  openPrompts(isOpen) {
    $("side").classList.toggle("open", isOpen);
    $("toggle").setAttribute("aria-expanded", String(isOpen));
    $("toggle").textContent = isOpen ? "Hide the prompts" : "Choose a prompt";
    if (isOpen) promptList.draw();
  },

  moveAxis(axis, value, image = null) {
    const now = performance.now();
    const replace = this.lastMove.axis === axis && now - this.lastMove.time < SAME_MOVE_MS;
    this.lastMove = {axis, time: now};
    this.moved = axis;
    this.wantedImage = image;
    this.go({values: {...this.group.values, [axis.key]: value}}, {replace: replace || image !== null});
  },

  // ---- One image ----

  openImage(image, prompt) {
    this.go({image: image.name, prompt: prompt.id, values: image.group.values}, {state: {isDialog: true}});
  },

  imageIsMissing() {
    large.image = null;
    this.view = {...this.view, image: null};
    history.replaceState(history.state, "", addressOf(this.view, this.source));
    if ($("large").open) $("large").close();
    this.setNotice("There is no such image with these settings.");
  },

  /** Leave the large view by the way it was entered, so that "back" does not open it again. */
  leaveImage() {
    if (this.view.image === null) return;
    const view = {...this.view, image: null};
    if (!history.state?.isDialog) { this.go(view, {replace: true}); return; }
    this.view = this.returning = view;
    history.back();
  },

  // ---- Pins ----

  pinOf(shown) {
    if (!shown) return {prompt: this.prompt.id, values: this.group.values, image: null};
    return {prompt: shown.prompt.id, values: shown.image.group.values, image: shown.image.name};
  },

  isPinned(shown) { return this.view.pins.some((pin) => samePin(pin, this.pinOf(shown))); },

  /** Pin an image, or the current setting for null; or remove it. */
  togglePin(shown) {
    const pin = this.pinOf(shown);
    const others = this.view.pins.filter((other) => !samePin(other, pin));
    const isNew = others.length === this.view.pins.length;
    if (isNew && others.length === MAX_PINS) { this.say(`At most ${MAX_PINS} can be compared; remove one first.`); return; }
    this.view = {...this.view, pins: isNew ? [...others, pin] : others};
    history.replaceState(history.state, "", addressOf(this.view, this.source));
    $("tab-compare").textContent = this.view.pins.length ? `Compare ${this.view.pins.length}` : "Compare";
    this.say(isNew ? "Pinned to compare." : "No longer pinned.");
    if ($("large").open) large.showMarks();
    if (this.view.view === "compare") this.render();
  },

  // ---- Judgements ----

  async judgeImage(kind, shown, value) {
    await this.judge.add(kind, [identify(shown.image, this.source, shown.prompt.text)], value);
    const key = shown.image.md5 ?? shown.image;
    document.querySelectorAll(".tile").forEach((button) => {
      if (button.shown && (button.shown.image.md5 ?? button.shown.image) === key) showMarks(button, this);
    });
    if ($("large").open) large.showMarks();
    this.showJudged();
    this.showOnly();
  },

  toggleFavourite(shown) {
    const isFavourite = this.judge.markOf(shown.image, shown.prompt.text)?.favourite ?? false;
    this.say(isFavourite ? "No longer a favourite." : "Favourite.");
    return this.judgeImage("favourite", shown, !isFavourite);
  },

  rate(shown, score) {
    this.say(`Rated ${score} of 10.`);
    return this.judgeImage("score", shown, score);
  },

  tag(shown, name, on) { return this.judgeImage("tag", shown, {name, on}); },

  askTag(shown) {
    const list = element("datalist", {id: "tags"}, ...this.judge.tags.map((value) => element("option", {value})));
    const input = element("input", {type: "text", id: "tag", maxLength: TAG_LENGTH, autocomplete: "off"});
    input.setAttribute("list", "tags");
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      const name = input.value.trim();
      $("sheet").close();
      if (name) this.tag(shown, name, true);
    });
    this.openSheet("Add a tag", [element("label", {}, "Tag ", input), list,
      element("p", {className: "quiet", textContent: "Enter adds it."})]);
    input.focus();
  },

  showJudged() { $("judged").textContent = this.judge.list.length.toLocaleString("en"); },

  openJudgements() {
    const {judge, source} = this;
    const marks = [...judge.marks.values()];
    const counts = [["favourites", marks.filter((mark) => mark.favourite).length], ["tagged", marks.filter((mark) => mark.tags.size).length],
      ["rated", marks.filter((mark) => mark.score !== null).length], ["judged pairs", judge.pairs.length]];
    const rater = element("input", {type: "text", id: "rater", value: judge.rater, maxLength: 80, autocomplete: "off"});
    rater.addEventListener("change", () => { judge.rater = rater.value.trim(); remember("rater", judge.rater); });
    const save = element("button", {type: "button", className: "button", id: "export", textContent: "Export as JSON"});
    save.addEventListener("click", () => download(new Blob([judge.export()], {type: "application/json"}), "ratings.json"));
    this.openSheet("Favourites, tags and ratings", [
      element("dl", {}, ...counts.flatMap(([name, count]) => [element("dt", {textContent: name}), element("dd", {textContent: String(count)})])),
      element("label", {}, "Your name, stored with each ", rater), element("div", {}, save),
      element("p", {className: "quiet", textContent: source.isLive ? "The server stores them in the archive."
        : "This browser keeps them. Export them to keep them elsewhere, or to add them to the archive."})]);
  },

  // ---- Small things ----

  openSheet(title, nodes) {
    $("sheet-title").textContent = title;
    $("sheet-body").replaceChildren(...nodes);
    if (!$("sheet").open) $("sheet").showModal();
  },

  /** A line that goes away by itself, read aloud by screen readers. */
  say(text) {
    this.toast ??= document.body.appendChild(attributes(element("div", {className: "toast"}), {role: "status"}));
    ($("sheet").open ? $("sheet") : $("large").open ? $("large") : document.body).append(this.toast);
    this.toast.textContent = text;
    clearTimeout(this.toastTimer);
    this.toastTimer = setTimeout(() => { this.toast.textContent = ""; }, 2500);
  },

  async copyText(text, button, shown = null) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const node = shown ?? button.parentElement.appendChild(element("span", {className: "spoken", textContent: text}));
      getSelection().selectAllChildren(node);
      document.execCommand("copy");
      if (!shown) node.remove();
    }
    const before = button.dataset.text ??= button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 2000);
  },

  copyLink() {
    this.copyText(location.href, $("link"));
    this.say("Link copied.");
  },
};

// ---- View options, stored between visits if the browser allows it ----

function setUpOptions() {
  const size = $("size"), {mode} = app.source;
  const {value, ...range} = SIZES[mode];
  Object.assign(size, range);
  size.value = remembered(`size-${mode}`) ?? value;
  $("pixelated").checked = remembered("pixelated") === "true";
  const apply = () => {
    Object.assign(app, {size: size.valueAsNumber, isPixelated: $("pixelated").checked});
    document.documentElement.style.setProperty("--size", `${size.value}px`);
    size.setAttribute("aria-valuetext", `${size.value} pixels`);
    document.body.classList.toggle("pixelated", app.isPixelated);
  };
  size.addEventListener("input", () => {
    apply();
    remember(`size-${mode}`, size.value);
    if (app.view.view === "grid") app.refresh();
  });
  $("pixelated").addEventListener("change", () => { apply(); remember("pixelated", $("pixelated").checked); });
  apply();
  $("sort").addEventListener("change", () => app.go({sort: $("sort").value}));
  $("show").addEventListener("change", () => app.go({show: $("show").value}, {replace: true}));
  $("only").addEventListener("change", () => app.go({only: $("only").value}));
  $("min").addEventListener("change", () => app.go({min: $("min").value === "" ? null : $("min").valueAsNumber}));
}

function setUpTabs() {
  $("tabs").replaceChildren(...VIEWS.map((name) => {
    const tab = attributes(element("button", {type: "button", id: `tab-${name}`, textContent: VIEW_NAMES[name]}),
      {role: "tab", "aria-controls": `view-${name}`});
    tab.addEventListener("click", (event) => {
      app.go({view: name, image: null});
      if (event.detail > 0) $("main").focus({preventScroll: true}); // so that arrow keys are the view's, not the tabs'
    });
    return tab;
  }));
  if (app.source.mode === "gallery") for (const name of ["compare", "arena"]) $(`tab-${name}`).hidden = true;
  $("tabs").addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    const shown = [...$("tabs").children].filter((tab) => !tab.hidden);
    const next = shown[(shown.indexOf(document.activeElement) + step + shown.length) % shown.length];
    next.focus();
    next.click();
  });
}

function setUpEvents() {
  $("toggle").addEventListener("click", () => app.openPrompts(!$("side").classList.contains("open")));
  $("more-options").addEventListener("click", () => {
    const isOpen = $("browser").classList.toggle("with-options");
    $("more-options").setAttribute("aria-expanded", String(isOpen));
  });
  $("skip").addEventListener("click", () => $("main").focus());
  $("more").addEventListener("click", () => strip.addMore(app));
  $("link").addEventListener("click", () => app.copyLink());
  $("save").addEventListener("click", () => askSave(app));
  $("judgements").addEventListener("click", () => app.openJudgements());
  $("help").addEventListener("click", () => showKeys(app));
  $("sheet-close").addEventListener("click", () => $("sheet").close());
  $("sheet").addEventListener("click", (event) => { if (event.target === $("sheet")) $("sheet").close(); });
  window.addEventListener("popstate", () => {
    app.entry = null;
    app.view = app.returning ?? readAddress(location.hash, app.source);
    if (app.returning) history.replaceState(null, "", addressOf(app.view, app.source));
    app.returning = null;
    app.showSearch();
    app.render();
  });
  setUpKeys(app);
}

// ---- Start ----

function showMessage(title, text, command = "", after = "") {
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  $("message-command").textContent = command;
  $("message-command").hidden = !command;
  $("message-after").textContent = after;
  $("message").hidden = false;
  $("browser").hidden = true;
}

const PROBLEMS = {
  missing: () => showMessage("No images here yet",
    "This page shows a folder of decoded images, but there is no manifest.js in this folder, nor in its folders images " +
    "and gallery. Decode an archive first:", DECODE_COMMAND,
    "Then open samplebrowser.html in the folder that the command made."),
  broken: ({file}) => showMessage("The list of images cannot be read",
    `${file} is damaged or not a manifest. Write it again:`, DECODE_COMMAND),
  newer: ({version}) => showMessage("This page is older than the images",
    `manifest.js has version ${version}, which this page cannot read. ` +
    "Open the samplebrowser.html in the same folder as that file."),
  empty: () => showMessage("No images", "The manifest lists no images: nothing was decoded. Decode other rows:", DECODE_COMMAND),
};

async function start() {
  let loaded;
  if (isSite() && location.protocol === "file:") {
    showMessage("This page needs a web server", "It reads archives, which a page opened from disk may not. In its folder run:", "python -m http.server");
    return;
  }
  if (isSite()) showMessage("Loading archives …", "Its images are decoded in this browser.");
  try {
    loaded = await openSource();
  } catch (error) {
    if (isSite()) showMessage("The archives cannot be shown", visible(error.message));
    else showMessage("The server does not answer", visible(error.message), "python -m dm_generations browse");
    return;
  }
  $("message").hidden = true;
  if (loaded.problem) { PROBLEMS[loaded.problem](loaded); return; }
  const {source} = loaded;
  if (!source.imageCount) { PROBLEMS.empty(); return; }
  Object.assign(app, {source, judge: new Judge(source, (text) => app.say(text))});
  app.sliders = new Sliders($("axes"), $("fixed"), "axis", (axis, value) => app.moveAxis(axis, value));
  $("archive").textContent = visible(source.archives.join(", "));
  $("totals").textContent = `${plural(source.imageCount, "image")}, ${plural(source.promptCount, "prompt")}`;
  setUpTabs();
  setUpOptions();
  setUpEvents();
  for (const view of [promptList, grid, compare, arena, statistics, large]) view.setUp(app);
  app.judge.load().then(() => {
    app.showJudged();
    if (app.judge.list.length) app.refresh();
  }, () => {});
  app.view = {...DEFAULTS, ...readAddress(location.hash, source)};
  $("browser").hidden = false;
  app.showSearch();
  await app.render();
  source.onChange(() => { app.isStale = true; promptList.find(); app.refresh(); });
}

start();

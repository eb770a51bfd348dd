// Compare: pinned images or settings side by side; two also with a slider or blinking.

import {$, attributes, cut, element, fillSelect, promptText, scoreText} from "./text.js";
import {AXES, settingsKey} from "./axes.js";
import {interval} from "./scores.js";
import {picture, tile} from "./tile.js";

const BLINK_MS = 600, IMAGES_OF_SETTING = 9;
const MODES = {side: "side by side", slider: "with a slider", blink: "blinking"};

export const compare = {
  timer: null,

  setUp(app) {
    $("compare-mode").addEventListener("change", () => app.go({mode: $("compare-mode").value}, {replace: true}));
    $("unpin").addEventListener("click", () => app.go({pins: []}));
    $("pin-setting").addEventListener("click", () => app.togglePin(null));
  },

  /** The pins that exist, with their prompts, groups and images. */
  async resolve(app, signal) {
    const {source, view} = app;
    const ids = [...new Set(view.pins.map(({prompt}) => prompt))];
    const [{prompts}, groups] = await Promise.all([source.prompts({ids}, signal), source.groups(ids, signal)]);
    const found = [];
    for (const pin of view.pins) {
      const prompt = prompts.find(({id}) => id === pin.prompt);
      const key = settingsKey(pin.values);
      const group = groups.find((one) => one.prompt === pin.prompt && settingsKey(one.values) === key);
      if (!prompt || !group) continue;
      const query = pin.image === null ? {sort: "score", descending: true, limit: IMAGES_OF_SETTING} : {sort: "score", descending: true};
      let {images} = (await source.images({groups: [group], ...query}, signal)).get(group.id);
      if (pin.image !== null) images = images.filter((image) => image.name === pin.image);
      if (images.length) found.push({pin, prompt, group, images});
    }
    return found;
  },

  async show(app, signal) {
    const {view} = app;
    const pinned = await this.resolve(app, signal);
    if (signal.aborted) return;
    clearInterval(this.timer);
    this.pinned = pinned;
    const mode = pinned.length === 2 ? view.mode : "side";
    fillSelect($("compare-mode"), Object.entries(MODES), mode);
    $("compare-mode").disabled = pinned.length !== 2;
    $("unpin").hidden = !view.pins.length;
    app.setStatus(pinned.length ? `${pinned.length} of at most 9 pinned.` : "");
    if (view.pins.length > pinned.length) app.setNotice("Some pinned images are not in this archive.");
    if (!pinned.length) {
      $("compare").replaceChildren(element("p", {className: "empty", textContent:
        "Nothing is pinned. Press p on an image in the strip or the grid, or pin the setting above."}));
      return;
    }
    const stage = mode === "side" ? [] : [this.stage(mode, app)];
    $("compare").replaceChildren(...stage, this.table(mode, app));
  },

  /** Columns of the pinned, with what they differ in marked. */
  table(mode, app) {
    const {source} = app;
    const rows = [["prompt", ({prompt}) => cut(promptText(prompt), 300)],
      ...AXES.map((axis) => [axis.label, ({group}) => axis.show(group.values[axis.key], source)]),
      ["seed", ({pin, images}) => (pin.image === null ? `best of ${images[0].group.count}` : `#${images[0].seed + 1}`)],
      ["CLIP score", ({pin, group, images}) => {
        if (pin.image !== null) return scoreText(images[0].score);
        const range = interval({n: group.scored, mean: group.mean, sd: group.sd});
        return group.mean === null ? "no score" : `mean ${scoreText(group.mean)}${range ? ` ± ${((range[1] - range[0]) / 2).toFixed(2)}` : ""}`;
      }]];
    const kept = rows.filter(([name]) => !["more settings", "model", "archive"].includes(name)
      || new Set(this.pinned.map(rows.find(([other]) => other === name)[1])).size > 1);
    const box = element("div", {className: "pinned"});
    box.style.setProperty("--pins", this.pinned.length);
    box.append(...this.pinned.map((one, i) => this.column(one, i, mode, kept, app)));
    return box;
  },

  column(one, i, mode, rows, app) {
    const {pin, prompt, images} = one;
    const remove = attributes(element("button", {type: "button", className: "button", textContent: "×"}), {"aria-label": "Remove", title: "Remove"});
    remove.addEventListener("click", () => app.go({pins: app.view.pins.filter((other) => other !== pin)}));
    const open = () => app.openImage(images[0], prompt);
    const head = element("div", {className: "pin-head"}, element("span", {textContent: String.fromCharCode(65 + i)}), remove);
    const shown = pin.image !== null ? images.slice(0, 1) : images;
    const set = element("div", {className: `set of-${shown.length > 4 ? 9 : shown.length > 1 ? 4 : 1}`},
      ...shown.map((image) => tile(image, prompt, app, shown.length === 1 ? {open} : {})));
    const facts = element("dl", {}, ...rows.flatMap(([name, value]) => {
      const text = value(one), isDifferent = this.pinned.some((other) => value(other) !== text);
      return [element("dt", {textContent: name, className: isDifferent ? "different" : ""}),
        element("dd", {className: isDifferent ? "different" : ""}, element("bdi", {textContent: text}))];
    }));
    return element("article", {}, head, ...(mode === "side" ? [set] : []), facts);
  },

  /** Two images in one place: a slider wipes between them, or they take turns. */
  stage(mode, app) {
    const [a, b] = this.pinned.map(({images, prompt}) => picture(images[0], prompt, app, "eager"));
    b.className = "over";
    const box = element("div", {className: `stage ${mode}`}, element("div", {className: "pair"}, a, b,
      element("span", {className: "corner-a", textContent: "A"}), element("span", {className: "corner-b", textContent: "B"})));
    if (mode === "slider") {
      const input = attributes(element("input", {type: "range", min: 0, max: 100, value: 50}), {"aria-label": "How much of image A"});
      const wipe = () => box.style.setProperty("--wipe", `${input.value}%`);
      input.addEventListener("input", wipe);
      box.firstChild.addEventListener("pointermove", (event) => {
        const {left, width} = box.firstChild.getBoundingClientRect();
        input.value = 100 * (event.clientX - left) / width;
        wipe();
      });
      wipe();
      box.append(input);
      return box;
    }
    const button = element("button", {type: "button", className: "button"});
    this.turn = () => box.classList.toggle("second");
    const run = (isRunning) => {
      clearInterval(this.timer);
      this.timer = isRunning ? setInterval(this.turn, BLINK_MS) : null;
      button.textContent = isRunning ? "Stop" : "Blink";
    };
    this.run = () => run(this.timer === null);
    button.addEventListener("click", this.run);
    const other = element("button", {type: "button", className: "button", textContent: "Other image (space)"});
    other.addEventListener("click", () => { run(false); this.turn(); });
    run(!matchMedia("(prefers-reduced-motion: reduce)").matches);
    box.append(element("div", {className: "options"}, button, other));
    return box;
  },

  key(event, app) {
    if (event.key === " " && app.view.mode === "blink" && this.pinned?.length === 2 && event.target.tagName !== "BUTTON") {
      clearInterval(this.timer);
      this.timer = null;
      this.turn();
      return true;
    }
    return false;
  },

  hide() {
    clearInterval(this.timer);
    $("compare").replaceChildren();
  },

  layout(app) {
    const cells = this.pinned.map(({prompt, group, images}, i) => ({images, label: `${String.fromCharCode(65 + i)}  ${cut(promptText(prompt), 60)}`,
      lines: AXES.filter((axis) => axis.isNumber).map((axis) => `${axis.label} ${axis.show(group.values[axis.key], app.source)}`)}));
    return {kind: "strip", cells};
  },
};

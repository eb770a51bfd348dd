// The arena: two images of one prompt, settings hidden; a person says which is better.

import {$, attributes, cut, element, fillSelect, plural, promptText} from "./text.js";
import {AXES, SETTING, axisValues} from "./axes.js";
import {Z, strengths} from "./scores.js";
import {identify} from "./judge.js";
import {picture} from "./tile.js";

const TRIES = 30;
const VOTES = [["left", "← Left is better", "ArrowLeft"], ["tie", "↑ Equally good", "ArrowUp"],
  ["bad", "↓ Both bad", "ArrowDown"], ["right", "Right is better →", "ArrowRight"]];
const SCOPES = [["prompt", "this prompt"], ["all", "any prompt"]];

/** The settings of a judged image in words, without what is empty. */
const settingOf = (image) => AXES.filter(({key, isNumber}) => isNumber || (["sc_prompt", "extra_settings"].includes(key) && image[key]))
  .map(({key, label, isNumber, show}) => `${label} ${isNumber ? show(image[key]) : image[key]}`).join(", ");

const randomOf = (list) => list[Math.floor(Math.random() * list.length)];

export const arena = {
  pair: null,

  setUp(app) {
    this.app = app;
    $("votes").replaceChildren(...VOTES.map(([vote, text]) => {
      const button = element("button", {type: "button", className: "button vote", textContent: text});
      button.addEventListener("click", () => this.vote(vote));
      return button;
    }));
    $("arena-prompts").addEventListener("change", () => app.go({scope: $("arena-prompts").value}, {replace: true}));
    $("strengths-axis").addEventListener("change", () => app.go({of: $("strengths-axis").value}, {replace: true}));
    $("strengths-box").addEventListener("toggle", () => this.showStrengths());
  },

  async show(app) {
    app.setStatus("Settings are hidden. Choose the better image, by click or arrow key.");
    const axes = [...AXES.filter((axis) => axisValues(app.groups, axis).length > 1), SETTING];
    this.axis = axes.find(({key}) => key === (app.view.of || "cond_scale")) ?? axes[0];
    fillSelect($("strengths-axis"), axes.map(({key, label}) => [key, label]), this.axis.key);
    fillSelect($("arena-prompts"), SCOPES, app.view.scope);
    this.showStrengths();
    if (!this.pair || this.prompt !== app.prompt || this.scope !== app.view.scope) await this.next();
  },

  /** Two images of different settings and tokens, in random places. */
  async choose() {
    const {source, prompt, groups} = this.app;
    let shown = prompt, own = groups;
    if (this.scope === "all" && source.promptCount > 1) {
      const offset = Math.floor(Math.random() * source.promptCount);
      [shown = prompt] = (await source.prompts({offset, limit: 1})).prompts;
      own = await source.groups([shown.id]);
    }
    for (let i = 0; i < TRIES; i += 1) {
      const two = [randomOf(own), randomOf(own)];
      if (own.length > 1 && two[0] === two[1]) continue;
      if (two[0].values.archive !== two[1].values.archive) continue; // an archive stores pairs of its own images
      const images = [];
      for (const group of two) {
        const offset = Math.floor(Math.random() * group.count);
        const found = (await source.images({groups: [group], sort: "seed", descending: false, limit: 1, offset})).get(group.id).images;
        if (found[0]?.url) images.push(found[0]);
      }
      if (images.length === 2 && images[0] !== images[1] && (images[0].md5 === null || images[0].md5 !== images[1].md5)) {
        return {prompt: shown, images, order: Math.random() < .5 ? [0, 1] : [1, 0]};
      }
    }
    return null;
  },

  async next() {
    this.prompt = this.app.prompt;
    this.scope = this.app.view.scope;
    this.pair = await this.choose();
    if (this.app.view.view !== "arena") return;
    const {pair} = this;
    $("arena-prompt").textContent = pair ? cut(promptText(pair.prompt), 400) : "This prompt has no two images to choose from.";
    $("votes").hidden = !pair;
    $("arena").replaceChildren(...(pair?.order ?? []).map((i, side) => {
      const name = ["Left", "Right"][side];
      const button = attributes(element("button", {type: "button", className: "tile contender"}), {"aria-label": `${name} is better`});
      const image = picture(pair.images[i], pair.prompt, this.app, "eager");
      image.alt = `${name} image: ${cut(promptText(pair.prompt), 150)}`;
      button.append(image);
      button.addEventListener("click", () => this.vote(name.toLowerCase()));
      return button;
    }));
  },

  async vote(vote) {
    const {pair, app} = this;
    if (!pair) return;
    this.pair = null; // a second press of the key is not a second vote
    const value = {left: ["first", "second"][pair.order[0]], right: ["first", "second"][pair.order[1]]}[vote] ?? vote;
    const images = pair.images.map((image) => identify(image, app.source, pair.prompt.text));
    await app.judge.add("pair", images, value, pair.order);
    app.showJudged();
    $("arena-last").textContent = `${plural(app.judge.pairs.length, "pair")} judged.`;
    this.showStrengths();
    await this.next();
  },

  showStrengths() {
    if (!$("strengths-box").open) return;
    const {axis} = this;
    const nameOf = (image) => (axis === SETTING ? settingOf(image) : String(image[axis.key] ?? (axis.key === "sc_prompt" ? "none" : "unknown")));
    const pairs = this.app.judge.pairs.filter(({value, images}) => value !== "bad" && images.length === 2)
      .map(({value, images}) => [...images.map(nameOf), value]).filter(([a, b]) => a !== b)
      .flatMap(([a, b, value]) => (value === "tie" ? [[a, b, .5], [b, a, .5]] : value === "first" ? [[a, b, 1]] : [[b, a, 1]]));
    const found = [...strengths(pairs)].sort(([, a], [, b]) => b.strength - a.strength);
    if (!found.length) {
      $("strengths").replaceChildren(element("p", {className: "quiet", textContent: "No judged pair differs in this setting yet."}));
      return;
    }
    const cells = (tag, texts) => element("tr", {}, ...texts.map((textContent) => element(tag, {textContent})));
    $("strengths").replaceChildren(element("table", {}, cells("th", [axis.label, "strength", "95% interval", "pairs"]),
      ...found.map(([name, {strength, error, pairs: n}]) => cells("td", [cut(axis.isNumber ? axis.show(Number(name)) : name, 200), strength.toFixed(2),
        `${(strength - Z * error).toFixed(2)} to ${(strength + Z * error).toFixed(2)}`, String(n)]))));
  },

  key(event) {
    const vote = VOTES.find(([, , key]) => key === event.key);
    if (!vote || ["INPUT", "SELECT"].includes(event.target.tagName)) return false;
    this.vote(vote[0]);
    return true;
  },

  hide() {},

  layout(app) {
    return {kind: "strip", cells: (this.pair?.order ?? []).map((i, side) => ({images: [this.pair.images[i]], label: ["left", "right"][side]}))};
  },
};

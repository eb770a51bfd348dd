// The strip: all images of one prompt at one setting.

import {$, element, plural, scoreRange, scoreText} from "./text.js";
import {tile, titleOf} from "./tile.js";
import {interval} from "./scores.js";

const IMAGES_SHOWN = 240; // more than these: a button

export const SORT_QUERIES = {
  best: {sort: "score", descending: true}, worst: {sort: "score", descending: false}, seed: {sort: "seed", descending: false},
  newest: {sort: "time", descending: true}, oldest: {sort: "time", descending: false},
};
export const SORT_NAMES = {best: "best first", worst: "worst first", seed: "by seed", newest: "newest first", oldest: "oldest first"};

export const strip = {
  images: [],

  async show(app, signal) {
    const {view, group, prompt, source} = app;
    const query = {groups: [group], ...SORT_QUERIES[view.sort], min: view.min};
    const {total, images} = (await source.images({...query, limit: IMAGES_SHOWN}, signal)).get(group.id);
    if (signal.aborted) return;
    Object.assign(this, {query, total, loaded: images.length});
    this.images = app.filterMarked(images, prompt);
    const scores = images.flatMap((image) => image.scores);
    const mean = group.scored > 1 && interval({n: group.scored, mean: group.mean, sd: group.sd});
    const meanText = mean ? `; mean ${scoreText(group.mean)} ± ${((mean[1] - mean[0]) / 2).toFixed(2)}` : "";
    const same = images.reduce((sum, image) => sum + image.same, 0) - images.length;
    app.setStatus(`${plural(total, source.mode === "images" ? "image" : "file")}, ${SORT_NAMES[view.sort]}; CLIP ${scoreRange(scores)}`
      + `${meanText}${same ? `; ${same.toLocaleString("en")} more equal to one of these` : ""}.`);
    $("images").classList.toggle("one-each", source.mode === "images");
    $("images").replaceChildren(...this.images.map((image) => this.item(image, prompt, app)));
    this.showMore();
    app.shownImages = this.images;
  },

  item(image, prompt, app) {
    const {source, view} = app;
    const show = view.show === "number" ? "none" : view.show;
    const [name, score] = source.mode === "images" ? [`#${image.rank + 1}`, scoreText(image.score)]
      : [`${titleOf(image, source)}: ${plural(image.scores.length, "image")}`, scoreRange(image.scores)];
    const caption = element("figcaption", {}, element("span", {textContent: name}));
    if (view.show !== "none") caption.append(element("span", {className: "score", textContent: score}));
    const button = tile(image, prompt, app, {show, range: source.scoreRange});
    return element("li", {}, element("figure", {}, button, caption));
  },

  showMore() {
    const left = this.total - this.loaded;
    $("more").hidden = left <= 0;
    $("more").textContent = `Show ${Math.min(left, IMAGES_SHOWN)} of ${left.toLocaleString("en")} more`;
  },

  async addMore(app) {
    const {group, prompt, source} = app;
    const {images} = (await source.images({...this.query, limit: IMAGES_SHOWN, offset: this.loaded})).get(group.id);
    if (group !== app.group) return;
    this.loaded += images.length;
    const added = app.filterMarked(images, prompt);
    this.images.push(...added);
    $("images").append(...added.map((image) => this.item(image, prompt, app)));
    this.showMore();
  },

  hide() { $("images").replaceChildren(); },

  /** What is saved as an image. */
  layout(app) {
    return {kind: "strip", cells: this.images.map((image) => ({images: [image], label: `#${image.rank + 1}  ${scoreText(image.score)}`}))};
  },
};

// One image on the page: a button that opens it, with its score, its marks and how many are equal to it.

import {attributes, cut, element, promptText, scoreRange, scoreText, plural} from "./text.js";
import {heat} from "./scores.js";

export function titleOf(image, source) {
  return source.mode === "images" ? `Image ${image.rank + 1}` : `Gallery, page ${image.rank + 1}`;
}

export function altOf(image, prompt, source) {
  const what = source.mode === "images" ? titleOf(image, source)
    : `${titleOf(image, source)} of ${plural(image.scores.length, "image")}`;
  return `${what}, ${scoreRange(image.scores)}: ${cut(promptText(prompt), 150)}`;
}

/** Show an image in an <img>; a source that decodes does so when it comes into sight. */
export function showImage(node, image, source) {
  if (source.show && image.url) source.show(node, image);
  else if (image.url) node.src = image.url;
  else node.removeAttribute("src");
}

/** An <img> that shows nothing broken: a file that is missing or outside its folder gets a sign and its alt text. */
export function picture(image, prompt, app, loading = "lazy") {
  const node = element("img", {decoding: "async", alt: altOf(image, prompt, app.source)});
  node.loading = loading;
  node.addEventListener("error", () => node.parentElement?.classList.add("missing"));
  if (image.thumbnail && loading === "lazy") { // the browser takes the one that is large enough for its place
    const {side} = app.source.thumbnails;
    Object.assign(node, {sizes: "auto, 160px", srcset: `${image.thumbnail} ${side}w, ${image.url} ${2 * side}w`});
  }
  showImage(node, image, app.source);
  return node;
}

/**
 * A button for an image. `range` is that of the scores for outline and heat. `button.shown` is {image, prompt}, for keys
 * and marks.
 */
export function tile(image, prompt, app, {loading = "lazy", show = "none", range = null, open = null} = {}) {
  const button = element("button", {type: "button", className: "tile"}, picture(image, prompt, app, loading));
  button.shown = {image, prompt};
  if (!image.url) button.classList.add("missing");
  if (image.problem) button.append(element("span", {className: "problem", textContent: cut(image.problem, 200)}));
  if (show === "number" && image.score !== null) {
    button.append(element("span", {className: "number", textContent: scoreText(image.score)}));
  }
  if (show === "outline" || show === "heat") {
    button.classList.add(show);
    button.style.setProperty("--heat", heat(image.score, range).fill);
  }
  if (image.same > 1) {
    button.append(element("span", {className: "same", textContent: `×${image.same}`, title: `${image.same} equal images`}));
  }
  button.addEventListener("click", () => (open ?? (() => app.openImage(image, prompt)))());
  showMarks(button, app);
  return button;
}

/** Show an image's favourite sign, tags and rating, after one of them changed or at first. */
export function showMarks(button, app) {
  const {image, prompt} = button.shown;
  const mark = app.judge.markOf(image, prompt.text);
  const text = mark ? [mark.favourite ? "♥" : "", mark.score ?? "", mark.tags.size ? "#" : ""].filter(Boolean).join(" ") : "";
  let sign = button.querySelector(".mark");
  if (!text) { sign?.remove(); return; }
  if (!sign) button.append(sign = element("span", {className: "mark"}));
  sign.textContent = text;
  attributes(sign, {title: [mark.favourite ? "favourite" : "", mark.score ? `rated ${mark.score}` : "",
    ...[...mark.tags].map((tag) => cut(tag, 60))].filter(Boolean).join(", ")});
}

// One image, large: all that is known of it, its settings to change, its marks, and the commands that make it again.

import {$, attributes, cut, element, promptText, scoreText, shellWord, visible} from "./text.js";
import {AXES} from "./axes.js";
import {Sliders} from "./settings.js";
import {SORT_QUERIES} from "./strip.js";
import {altOf, showImage, titleOf} from "./tile.js";

/** Values of --rng by sampler version. */
const SAMPLERS = new Map([[1, "rows"], [1001, "dalle-mini"]]);

/** A command with [flag, value, ...] each, or null if a shell cannot be told one of the values. */
function command(name, flags) {
  const lines = flags.map(([flag, ...values]) => {
    if (!values.length) return flag;
    const words = values.map((value) => (value === null ? null : shellWord(String(value))));
    // A text that begins with "-" would be taken for another flag.
    return words.every(Boolean) ? flag + (String(values[0]).startsWith("-") ? "=" : " ") + words.join(" ") : null;
  });
  return lines.every(Boolean) ? [`python -m dm_generations ${name}`, ...lines].join(" \\\n  ") : null;
}

/** The flags of `decode` for a decoder that the manifest or the server describes. */
function decoderFlags({name, steps, eta, clip_denoised: isClipped, seed, clip_guidance_scale: guidance}) {
  return [["--decoder", name], ["--decoder-steps", steps], ...(eta ? [["--eta", eta]] : []), ...(isClipped ? [["--clip-denoised"]] : []),
    ...(seed ? [["--decoder-seed", seed]] : []), ...(guidance ? [["--clip-guidance-scale", guidance]] : [])];
}

export const large = {
  image: null,

  setUp(app) {
    this.app = app;
    this.sliders = new Sliders($("large-axes"), null, "large", (axis, value) => app.moveAxis(axis, value, this.image));
    $("previous").addEventListener("click", () => this.step(-1));
    $("next").addEventListener("click", () => this.step(1));
    $("close").addEventListener("click", () => $("large").close());
    $("copy").addEventListener("click", () => app.copyText($("command").textContent, $("copy"), $("command")));
    $("large-favourite").addEventListener("click", () => app.toggleFavourite(this.shown));
    $("large-pin").addEventListener("click", () => app.togglePin(this.shown));
    $("large").addEventListener("close", () => app.leaveImage());
    $("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); });
  },

  get shown() { return {image: this.image, prompt: this.app.prompt}; },

  /** Show the image that the view names, or close. */
  async show(app, signal) {
    const {view, group, source, prompt} = app;
    if (view.image === null) { this.image = null; if ($("large").open) $("large").close(); return; }
    const query = {groups: [group], ...SORT_QUERIES[view.sort]};
    const {images} = (await source.images(query, signal)).get(group.id);
    if (signal.aborted) return;
    this.images = images;
    const position = images.findIndex((image) => image.name === view.image);
    if (position < 0) { app.imageIsMissing(); return; }
    this.image = images[position];
    $("large").classList.toggle("wide", source.mode === "gallery");
    $("large-title").textContent = titleOf(this.image, source);
    $("previous").disabled = position === 0;
    $("next").disabled = position === images.length - 1;
    attributes($("large-image"), {alt: altOf(this.image, prompt, source)});
    showImage($("large-image"), this.image, source);
    $("large-problem").textContent = this.image.problem ? `Not decoded: ${cut(this.image.problem, 400)}` : "";
    this.sliders.show(app.groups, group, source);
    $("large-notice").textContent = app.notice;
    this.showFacts();
    this.showMarks();
    this.showCommand();
    if (!$("large").open) { $("large").showModal(); $("large").scrollTop = 0; }
  },

  step(by) {
    const next = this.images[this.images.indexOf(this.image) + by];
    if (next) this.app.go({image: next.name}, {replace: true});
  },

  showFacts() {
    const {source, prompt, group} = this.app;
    const {image} = this;
    const facts = [["prompt", visible(promptText(prompt))]];
    for (const axis of AXES) {
      const value = group.values[axis.key];
      if (axis.key === "extra_settings" && !value) continue;
      facts.push([axis.label, axis.show(value, source)]);
    }
    facts.push([source.mode === "images" ? "CLIP score" : "CLIP scores", image.scores.map(scoreText).join(", ")]);
    if (image.tokenizedScore !== null) facts.push(["score of the prompt's tokens", scoreText(image.tokenizedScore)]);
    if (source.mode === "images" && image.key) facts.push(["key", image.key.join(" ")], ["seed", `#${image.seed + 1}`]);
    if (image.same > 1) facts.push(["equal images", String(image.same)]);
    if (image.initCount) facts.push(["initial tokens", String(image.initCount)]);
    if (image.logProb !== null) facts.push(["log-probability", image.logProb.toFixed(2)]);
    if (image.sampler !== null) facts.push(["sampler version", String(image.sampler)]);
    if (image.dtype !== null) facts.push(["dtype", visible(String(image.dtype))]);
    if (image.time !== null) facts.push(["sampled", new Date(image.time * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC"]);
    if (image.md5) facts.push(["MD5 of the tokens", image.md5]);
    // A server's is of both where a decoder takes the codec's place.
    if (image.codec !== null && !(source.isLive && source.decoder)) facts.push(["SHA-256 of the codec", `${image.codec}…`]);
    if (source.decoder) facts.push(["decoder", visible(`${source.decoder.name}, ${source.decoder.steps} steps, seed ${source.decoder.seed}`)]);
    if (image.file !== null) facts.push(["file", visible(image.file)]);
    $("facts").replaceChildren(...facts.flatMap(([name, value]) => [
      element("dt", {textContent: name}), element("dd", {}, element("bdi", {textContent: value}))]));
  },

  /** Show favourite, rating and tags, as buttons that change them. */
  showMarks() {
    const {app} = this;
    const isImages = app.source.mode === "images";
    $("large-favourite").hidden = $("large-pin").hidden = $("marks").hidden = !isImages;
    if (!isImages) return;
    const mark = app.judge.markOf(this.image, app.prompt.text) ?? {favourite: false, score: null, tags: new Set()};
    $("large-favourite").textContent = mark.favourite ? "♥" : "♡";
    attributes($("large-favourite"), {"aria-pressed": mark.favourite, "aria-label": "Favourite"});
    attributes($("large-pin"), {"aria-pressed": app.isPinned(this.shown)});
    const rating = Array.from({length: 10}, (_, i) => {
      const button = element("button", {type: "button", className: "rate", textContent: String(i + 1)});
      button.addEventListener("click", () => app.rate(this.shown, i + 1));
      return attributes(button, {"aria-pressed": mark.score === i + 1, "aria-label": `Rate ${i + 1}`});
    });
    const tags = [...mark.tags].map((tag) => {
      const button = element("button", {type: "button", className: "tag", textContent: `${cut(tag, 60)} ×`, title: "Remove this tag"});
      button.addEventListener("click", () => app.tag(this.shown, tag, false));
      return button;
    });
    const add = element("button", {type: "button", className: "tag", textContent: "+ tag", title: "Add a tag (t)"});
    add.addEventListener("click", () => app.askTag(this.shown));
    $("marks").replaceChildren(element("span", {className: "rates"}, ...rating), ...tags, add);
  },

  /** Show the commands that decode this image and that generate it again; for a gallery, all images of its group. */
  showCommand() {
    const {source} = this.app;
    const isImage = source.mode === "images";
    const decode = isImage && this.decodeCommand();
    const {command: generate, problem} = this.generateCommand();
    const parts = [decode && "decode this image of its archive", generate && (isImage ? "generate it again and decode it" : "generate images with these settings")];
    const label = parts.filter(Boolean).join(", or ");
    $("again-label").textContent = [label && `${label[0].toUpperCase()}${label.slice(1)} (bash, zsh).`, problem].filter(Boolean).join(" ");
    $("command").textContent = [decode, generate].filter(Boolean).join("\n\n");
    $("copy").hidden = $("command").hidden = !label;
  },

  /** Return the command that decodes this image alone, or null. */
  decodeCommand() {
    const {source, prompt, group: {values}} = this.app;
    if (!this.image.key) return null;
    const model = source.models[values.model];
    const where = [["key", this.image.key.join(":")], ...AXES.filter(({isNumber}) => isNumber).map(({key}) => [key, values[key]]),
      ...(model && !model.includes(",") ? [["model", model]] : [])]; // a comma parts values
    // An unconditional prompt has its text in the command, as ids are those of one archive.
    const scPrompt = source.scPrompts.get(values.sc_prompt) ?? null;
    return command("decode", [
      ["--db", source.archives[values.archive]],
      ...(prompt.text === null ? [] : [["--prompt-texts", prompt.text]]),
      ...(scPrompt === null ? [] : [["--sc-prompt-texts", scPrompt]]),
      ["--where", ...where.filter(([, value]) => value !== null).map(([name, value]) => `${name}=${value}`)],
      ...(this.image.codecName ? [["--codec", this.image.codecName]] : []),
      ...(source.decoder ? decoderFlags(source.decoder) : []),
      ...(this.image.decoding ? [["--decoder-n", this.image.decoding + 1]] : []),
      ["--out-dir", "one"],
    ]);
  },

  /** Return {command} that generates this image again, or {problem} that says why there is none. */
  generateCommand() {
    const {source, prompt, group} = this.app;
    const {image} = this;
    const isImage = source.mode === "images";
    const model = source.models[group.values.model];
    if (isImage && (model === null || !SAMPLERS.has(image.sampler))) {
      return {problem: "The archive does not say how this image was sampled, so no command can generate it again."};
    }
    if (image.initCount) {
      return {problem: "This image continues tokens that only the archive has. To generate it again, use verify --regenerate."};
    }
    const flags = [["--db", "regenerated.db"], ["--prompts", prompt.text]];
    for (const axis of AXES.filter(({flag}) => flag)) {
      const value = group.values[axis.key];
      if (axis.key !== "sc_prompt") flags.push([axis.flag, value]);
      else if ((source.scPrompts.get(value) ?? null) !== null) flags.push([axis.flag, source.scPrompts.get(value)]);
    }
    flags.push(isImage ? ["--keys", image.key?.join(":") ?? null] : ["--n", group.count]);
    if (isImage) {
      if (model !== "") flags.push(["--model", model]);
      if (image.sampler !== 1) flags.push(["--rng", SAMPLERS.get(image.sampler)]);
      if ((image.dtype ?? "float32") !== "float32") flags.push(["--dtype", image.dtype]);
    }
    const generate = group.values.extra_settings ? null : command("generate", flags);
    if (!generate) return {problem: "A command line cannot hold this prompt or these settings."};
    return {command: generate + (isImage ? "\npython -m dm_generations decode --db regenerated.db --out-dir regenerated" : "")};
  },

  key(event) {
    if (event.target.type === "range") return false;
    if (event.key === "ArrowLeft") { this.step(-1); return true; }
    if (event.key === "ArrowRight") { this.step(1); return true; }
    return false;
  },
};

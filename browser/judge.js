// Judgements: what a person says of images. In a static page this browser keeps them, and "Export" writes them as JSON.
//
// The export is {"format": "dm-generations-ratings", "version": 1, "archives": [names], "judgements": [...]}, oldest first:
//
//   kind     "pair", "score", "favourite" or "tag"
//   images   one image, two of a pair, in no order of meaning: {md5 of the tokens or null, archive, prompt, sc_prompt, top_k,
//            top_p, temperature, cond_scale, extra_settings, model, sampler_version, key0, key1}
//   value    pair: "first", "second", "tie" or "bad", of `images`; score: 1 to 10; favourite: true or false;
//            tag: {"name", "on": true or false}
//   order    pair: which of `images` was shown left, then right: [0, 1] or [1, 0]; else null
//   rater    a name that the person gave, or ""
//   time     UTC Unix seconds
//
// The last judgement of an image and kind (and tag) counts; each pair counts.

import {remember, remembered} from "./text.js";

export const TAG_LENGTH = 60;

/** What a judgement says of an image's identity: enough to find it in any copy of its archive. */
export function identify(image, source, promptText) {
  const {values} = image.group;
  return {
    md5: image.md5, archive: source.archives[values.archive], prompt: promptText,
    sc_prompt: source.scPrompts.get(values.sc_prompt) ?? null, top_k: values.top_k, top_p: values.top_p,
    temperature: values.temperature, cond_scale: values.cond_scale, extra_settings: values.extra_settings,
    model: source.models[values.model], sampler_version: image.sampler, key0: image.key?.[0] ?? null,
    key1: image.key?.[1] ?? null,
  };
}

export const identityKey = ({md5, ...rest}) => JSON.stringify(md5 ?? rest);

/** Judgements in this browser's storage. */
export class LocalJudgements {
  constructor(archive) {
    this.name = `judgements:${archive}`;
    this.list = null;
  }

  all() {
    if (!this.list) {
      try {
        const stored = JSON.parse(remembered(this.name) ?? "[]");
        this.list = Array.isArray(stored) ? stored.filter((one) => Array.isArray(one?.images)) : [];
      } catch { this.list = []; }
    }
    return this.list;
  }

  add(judgements) {
    this.list = [...this.all(), ...judgements];
    if (!remember(this.name, JSON.stringify(this.list))) {
      throw new Error("This browser does not store judgements; they last until the page is closed. Export them.");
    }
  }
}

/** What is known of images by judgements: favourites, tags and scores by image, and the judged pairs. */
export class Judge {
  constructor(source, report) {
    Object.assign(this, {source, report, marks: new Map(), pairs: [], list: [], rater: remembered("rater") ?? ""});
  }

  async load() {
    this.marks.clear();
    this.pairs = [];
    this.list = [];
    (await this.source.judgements()).forEach((judgement) => this.take(judgement));
  }

  take(judgement) {
    this.list.push(judgement);
    if (judgement.kind === "pair") { this.pairs.push(judgement); return; }
    const key = identityKey(judgement.images[0]);
    const mark = this.marks.get(key) ?? {favourite: false, score: null, tags: new Set()};
    if (judgement.kind === "favourite") mark.favourite = judgement.value === true;
    if (judgement.kind === "score" && typeof judgement.value === "number") mark.score = judgement.value;
    if (judgement.kind === "tag" && judgement.value) mark.tags[judgement.value.on ? "add" : "delete"](String(judgement.value.name));
    this.marks.set(key, mark);
  }

  markOf(image, prompt) {
    if (!this.marks.size || this.source.mode !== "images") return null;
    return this.marks.get(identityKey(identify(image, this.source, prompt))) ?? null;
  }

  get tags() { return [...new Set([...this.marks.values()].flatMap((mark) => [...mark.tags]))].sort(); }

  async add(kind, images, value, order = null) {
    const judgement = {kind, images, value, order, rater: this.rater, time: Math.round(Date.now() / 100) / 10};
    try {
      await this.source.judge([judgement]);
    } catch (error) {
      this.report(error.message);
      if (this.source.isLive) return; // not stored; a static page keeps it until it is closed
    }
    this.take(judgement);
  }

  export() {
    const {archives} = this.source;
    return JSON.stringify({format: "dm-generations-ratings", version: 1, archives, judgements: this.list}, null, 1);
  }
}

// The images that manifest.js lists, beside which the page lies. dm_generations/export/manifest.py describes the format.

import {fileUrl, promptText, element} from "./text.js";
import {AXES, SETTING, axisValues, settingsKey} from "./axes.js";
import {differencesToBest, histogram, moments} from "./scores.js";
import {LocalJudgements} from "./judge.js";

const MANIFEST_VERSION = 2;
const FOLDERS = ["", "images/", "gallery/"];
const DIGEST = 22; // characters of an MD5 in base 64

/** The first manifest there is: {manifest, folder}, or {problem, file, version}. */
export async function loadManifest() {
  for (const folder of FOLDERS) {
    const found = await new Promise((resolve) => {
      const script = element("script", {src: folder + "manifest.js"});
      script.onload = () => resolve(true);
      script.onerror = () => resolve(false);
      document.head.append(script);
    });
    if (!found) continue;
    const manifest = window.DM_MANIFEST, file = folder + "manifest.js";
    if (!manifest || typeof manifest !== "object") return {problem: "broken", file};
    const {version} = manifest;
    return version > MANIFEST_VERSION ? {problem: "newer", file, version: Number(version)} : {manifest, folder};
  }
  return {problem: "missing"};
}

/** Rewrite the rows of version 1 as the columns of version 2, which say no MD5 and no time. */
function upgrade(manifest) {
  const groups = {prompt: [], sc_prompt: [], top_k: [], top_p: [], temperature: [], cond_scale: [],
    prefix: [], suffix: [], count: []};
  const images = {name: [], position: [], score: [], seed: [], provenance: [], md5: null, time: null};
  const dictionary = () => {
    const values = [], positions = new Map();
    return {values, code: (value) => {
      const key = JSON.stringify(value);
      if (!positions.has(key)) positions.set(key, values.push(value) - 1);
      return positions.get(key);
    }};
  };
  const seeds = dictionary(), provenances = dictionary();
  for (const [prompt, scPrompt, topK, topP, temperature, condScale, prefix, suffix, files] of manifest.groups) {
    const row = [prompt, scPrompt, topK, topP, temperature, condScale, prefix, suffix, files.length];
    Object.keys(groups).forEach((name, i) => groups[name].push(row[i]));
    for (const [middle, position, score, ...facts] of files) {
      images.name.push(middle);
      images.position.push(position);
      images.score.push(score);
      if (manifest.mode === "gallery") continue;
      const [key0, key1, model = "", sampler = 1, initCount = 0, dtype = "float32"] = facts;
      images.seed.push(seeds.code([key0, key1]));
      images.provenance.push(provenances.code([model, sampler, initCount, dtype]));
    }
  }
  return {...manifest, archives: [manifest.archive], seeds: seeds.values, provenances: provenances.values, groups, images};
}

const at = (column, i) => (Array.isArray(column) ? column[i] : column);

/** One image; what is rarely asked for is worked out when it is. */
export class ManifestImage {
  constructor(source, group, row, name, rank) {
    Object.assign(this, {source, group, row, name, rank, same: 1, problem: null});
    const score = source.columns.score[row];
    this.scores = Array.isArray(score) ? score : [score];
    this.score = this.scores[0] ?? null;
    this.seed = source.mode === "images" ? at(source.columns.seed, row) : -1;
  }
  get key() { return this.source.seeds[this.seed] ?? null; }
  get file() { return this.group.prefix + at(this.source.columns.name, this.row) + this.group.suffix; }
  get url() { return fileUrl(this.source.folder, this.file); }
  get thumbnail() {
    const {thumbnails, folder} = this.source;
    const parts = this.file.split("/");
    return thumbnails && fileUrl(folder, [...parts.slice(0, -1), thumbnails.folder, parts.at(-1)].join("/"));
  }
  get digest() {
    const {md5} = this.source.columns;
    const digest = md5?.slice(this.row * DIGEST, (this.row + 1) * DIGEST);
    return digest && /^[\w+/]{22}$/.test(digest) ? digest : null;
  }
  get md5() {
    if (!this.digest) return null;
    return Array.from(atob(this.digest + "=="), (c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join("");
  }
  get time() { return this.source.timeOf(this.row); }
  get provenance() { return this.source.provenances[at(this.source.columns.provenance, this.row)] ?? []; }
  get sampler() { return this.provenance[1] ?? null; }
  get initCount() { return this.provenance[2] ?? 0; }
  get dtype() { return this.provenance[3] ?? null; }
  get codec() { return this.provenance[4] ?? null; }
  get codecName() { return this.provenance[5] ?? null; }
  get tokenizedScore() { return this.numberOf("tokenized_score"); }
  get logProb() { return this.numberOf("log_prob"); }
  get decoding() { return this.numberOf("decoding") ?? 0; }
  numberOf(name) {
    const value = at(this.source.columns[name], this.row);
    return typeof value === "number" ? value : null;
  }
}

export class ManifestSource {
  constructor(manifest, folder, imageClass = ManifestImage) {
    if (!["images", "gallery"].includes(manifest.mode)) throw new TypeError("unknown mode");
    const {archives, prompts, sc_prompts: scPrompts, seeds, provenances, groups, images} =
      manifest.version === 1 ? upgrade(manifest) : manifest;
    Object.assign(this, {imageClass, folder, mode: manifest.mode, isLive: false, seeds, provenances, columns: images});
    this.archives = archives.map(String);
    this.decoder = manifest.decoder ?? null;
    const {folder: thumbs, side} = manifest.thumbnails ?? {};
    this.thumbnails = typeof thumbs === "string" && side > 0 ? {folder: thumbs, side: Number(side)} : null;
    this.scPrompts = new Map(scPrompts);
    this.models = [...new Set(provenances.map(([model]) => model))];
    if (!this.models.length) this.models = [null];
    this.store = new LocalJudgements(this.archives.join("\n"));
    this.imagesByGroup = new Map();
    this.readGroups(groups, prompts, scPrompts);
  }

  /** Make groups of the columns: one for each group and model. */
  readGroups(columns, prompts, scPrompts) {
    const {provenance} = this.columns;
    const models = this.provenances.map(([model]) => this.models.indexOf(model));
    this.allPrompts = prompts.map(([id, text]) => ({id, text, groups: [], count: 0, best: null, bestScore: -Infinity}));
    this.groupList = [];
    this.imageCount = 0;
    let start = 0;
    for (let i = 0; i < columns.count.length; i += 1) {
      const end = start + columns.count[i], prompt = this.allPrompts[columns.prompt[i]];
      const values = {archive: columns.archive?.[i] ?? 0, extra_settings: columns.extra_settings?.[i] ?? ""};
      for (const name of ["top_k", "top_p", "temperature", "cond_scale"]) values[name] = columns[name][i];
      values.sc_prompt = scPrompts[columns.sc_prompt[i]][0];
      const shared = {prompt: prompt.id, prefix: columns.prefix[i], suffix: columns.suffix[i]};
      const rowsByModel = new Map();
      for (let row = start; row < end; row += 1) {
        const model = models[at(provenance, row)] ?? 0;
        if (rowsByModel.has(model)) rowsByModel.get(model).push(row);
        else rowsByModel.set(model, [row]);
      }
      for (const [model, rows] of rowsByModel) {
        this.addGroup(prompt, {...shared, id: this.groupList.length, values: {...values, model}, rows});
      }
      start = end;
    }
    this.allPrompts = this.allPrompts.filter((prompt) => prompt.groups.length);
    this.promptCount = this.allPrompts.length;
    this.promptsById = new Map(this.allPrompts.map((prompt) => [prompt.id, prompt]));
    this.allPrompts.forEach((prompt) => { prompt.words = `${prompt.id} ${promptText(prompt)}`.toLowerCase(); });
    const best = this.groupList.map((group) => group.best).filter((value) => value !== null);
    this.scoreRange = best.length ? [this.lowest, best.reduce((a, b) => Math.max(a, b))] : null;
  }

  addGroup(prompt, group) {
    const {score} = this.columns;
    let scored = 0, sum = 0, squares = 0, best = null, count = 0;
    for (const row of group.rows) {
      const value = score[row];
      for (const one of Array.isArray(value) ? value : [value]) {
        count += 1;
        if (one === null) continue;
        scored += 1;
        sum += one;
        squares += one * one;
        if (best === null || one > best) best = one;
        if (!(this.lowest <= one)) this.lowest = one;
      }
    }
    Object.assign(group, {count, scored, best}, moments(scored, sum, squares));
    if (!prompt.best || (best ?? -Infinity) > prompt.bestScore) {
      Object.assign(prompt, {best: group, bestScore: best ?? -Infinity});
    }
    prompt.groups.push(group);
    prompt.count += count;
    this.imageCount += count;
    this.groupList.push(group);
  }

  timeOf(row) {
    const {time} = this.columns;
    const seconds = time && at(time.seconds, row);
    return typeof seconds === "number" ? time.start + seconds : null;
  }

  get first() {
    const scoreOf = (prompt) => prompt.bestScore;
    const prompt = this.allPrompts.reduce((a, b) => (scoreOf(b) > scoreOf(a) ? b : a));
    const group = prompt.groups.reduce((a, b) => ((b.mean ?? -Infinity) > (a.mean ?? -Infinity) ? b : a));
    return {prompt: prompt.id, values: group.values};
  }

  valuesOf(axis) { return axisValues(this.groupList, axis); }

  promptOf(prompt) {
    return {id: prompt.id, text: prompt.text, count: prompt.count, best: this.rowsOf(prompt.best)[0] ?? null};
  }

  async prompts({search = "", offset = 0, limit = 100, ids = null}) {
    if (ids) {
      const found = ids.map((id) => this.promptsById.get(id)).filter(Boolean);
      return {total: found.length, prompts: found.map((prompt) => this.promptOf(prompt))};
    }
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.length
      ? this.allPrompts.filter((prompt) => words.every((word) => prompt.words.includes(word))) : this.allPrompts;
    return {total: found.length, prompts: found.slice(offset, offset + limit).map((prompt) => this.promptOf(prompt))};
  }

  async groups(promptIds) {
    return promptIds.flatMap((id) => this.promptsById.get(id)?.groups ?? []);
  }

  /** All images of a group, best first. */
  rowsOf(group) {
    if (!this.imagesByGroup.has(group.id)) {
      const seen = new Map();
      this.imagesByGroup.set(group.id, group.rows.map((row, i) => {
        const position = this.columns.position ? at(this.columns.position, row) : i;
        const key = this.mode === "images" ? (this.seeds[at(this.columns.seed, row)] ?? []).join(".") : `page ${position + 1}`;
        const before = seen.get(key) ?? 0;
        seen.set(key, before + 1);
        return new this.imageClass(this, group, row, before ? `${key}.${before}` : key, position);
      }));
    }
    return this.imagesByGroup.get(group.id);
  }

  async images({groups, ...query}) {
    return new Map(groups.map((group) => [group.id, this.select(this.rowsOf(group), query)]));
  }

  select(rows, {sort = "score", descending = true, min = null, max = null, seed = null, limit = Infinity, offset = 0}) {
    let found = rows;
    if (seed !== null) found = found.filter((image) => image.seed === seed);
    if (min !== null) found = found.filter((image) => image.score !== null && image.score >= min);
    if (max !== null) found = found.filter((image) => image.score !== null && image.score <= max);
    if (this.columns.md5) found = fold(found);
    if (sort !== "score" || !descending) {
      const value = {score: (image) => image.score, seed: (image) => image.seed, time: (image) => image.time}[sort];
      const sign = descending ? -1 : 1;
      found = [...found].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return x === y ? 0 : x === null ? 1 : y === null ? -1 : sign * (x - y);
      });
    }
    return {total: found.length, images: found.slice(offset, offset + limit)};
  }

  async statistics({axis, prompt = null, values = {}}) {
    const groups = prompt === null ? this.groupList : this.promptsById.get(prompt)?.groups ?? [];
    const others = axis === SETTING ? [] : AXES.filter((other) => other !== axis);
    const narrowed = groups.filter((group) => others.every(({key}) => values[key] === undefined || group.values[key] === values[key]));
    const samples = new Map();
    for (const group of narrowed) {
      const value = axis === SETTING ? group.values : group.values[axis.key];
      const key = axis === SETTING ? settingsKey(value) : value, block = `${group.prompt} ${settingsKey(group.values, others)} `;
      if (!samples.has(key)) samples.set(key, {value, scores: [], blocks: []});
      const sample = samples.get(key);
      for (const row of group.rows) {
        const score = this.columns.score[row];
        if (typeof score !== "number") continue;
        sample.scores.push(score);
        sample.blocks.push(block + at(this.columns.seed, row));
      }
    }
    const found = [...samples.values()].filter(({scores}) => scores.length).map((sample) => ({
      value: sample.value, n: sample.scores.length, counts: histogram(sample.scores, this.scoreRange), sample,
      ...moments(sample.scores.length, sample.scores.reduce((a, b) => a + b, 0), sample.scores.reduce((a, b) => a + b * b, 0)),
    }));
    return differencesToBest(found);
  }

  async judge(judgements) { this.store.add(judgements); }
  async judgements() { return this.store.all(); }
  onChange() {}
}

/** Make one of the images that have the same tokens: the first, with their number. */
function fold(images) {
  const first = new Map(), folded = [];
  for (const image of images) {
    const {digest} = image;
    const before = digest === null ? undefined : first.get(digest);
    if (before === undefined) {
      image.same = 1;
      first.set(digest, image);
      folded.push(image);
    } else before.same += 1;
  }
  return folded;
}

// The images of an archive that a server decodes on demand; source.js says what it is asked.

import {SEED_AXIS, SETTING, sortValues} from "./axes.js";

const CHANGES_MS = 3000;
const VALUES = ["top_k", "top_p", "temperature", "cond_scale", "sc_prompt", "extra_settings", "model", "archive"];

export class LiveSource {
  static async open(token) {
    const source = new LiveSource(token);
    await source.readSummary();
    return source;
  }

  constructor(token) {
    Object.assign(this, {token, isLive: true, groupsByPrompt: new Map(), callbacks: []});
  }

  async readSummary() {
    const summary = await this.get("summary");
    const {mode, archives, models, seeds, first, revision} = summary;
    Object.assign(this, {mode, archives, models, seeds, first, revision, values: null});
    this.scPrompts = new Map(summary.sc_prompts);
    this.decoder = summary.decoder;
    Object.assign(this, {imageCount: summary.images, promptCount: summary.prompts, scoreRange: summary.score_range});
  }

  async valuesOf(axis, signal) {
    this.values ??= (await this.get("values", [], signal)).values;
    return sortValues(axis, this.values[axis.key]);
  }

  async get(route, parameters = [], signal = undefined) {
    const query = new URLSearchParams(parameters.filter(([, value]) => value !== null && value !== undefined));
    return this.answer(await fetch(`api/${route}?${query}`, {signal}));
  }

  async answer(response) {
    if (response.ok) return response.json();
    const {error} = await response.json().catch(() => ({}));
    throw new Error(error ?? `The server answered ${response.status}.`);
  }

  async prompts({search = "", offset = 0, limit = 100, ids = null}, signal) {
    const parameters = ids ? ids.map((id) => ["id", id]) : Object.entries({search, offset, limit});
    const {total, prompts} = await this.get("prompts", parameters, signal);
    return {total, prompts: prompts.map(([id, text, count, best]) => (
      {id, text, count, best: best && this.imageOf(best, {prompt: id, values: {}})}))};
  }

  async groups(promptIds, signal) {
    const missing = promptIds.filter((id) => !this.groupsByPrompt.has(id));
    if (missing.length) {
      const {groups} = await this.get("groups", missing.map((id) => ["prompt", id]), signal);
      const found = new Map(missing.map((id) => [id, []]));
      for (const [id, prompt, ...row] of groups) {
        const [count, scored, mean, sd, best] = row.slice(VALUES.length);
        const values = Object.fromEntries(VALUES.map((name, i) => [name, row[i]]));
        found.get(prompt)?.push({id, prompt, values, count, scored, mean, sd, best});
      }
      found.forEach((list, id) => this.groupsByPrompt.set(id, list));
    }
    return promptIds.flatMap((id) => this.groupsByPrompt.get(id) ?? []);
  }

  async images({groups, seed = null, limit = null, descending = true, ...query}, signal) {
    const key = seed === null ? null : (this.seeds[seed] ?? []).join(".");
    const parameters = [...groups.map((group) => ["group", group.id]),
      ...Object.entries({...query, seed: key, descending: Number(descending), limit: limit === Infinity ? null : limit})];
    const found = (await this.get("images", parameters, signal)).groups;
    return new Map(groups.map((group) => {
      const {total, images} = found[group.id] ?? {total: 0, images: []};
      return [group.id, {total, images: images.filter(Boolean).map((row) => this.imageOf(row, group))}];
    }));
  }

  imageOf(row, group) {
    const [name, , rank, score, key0, key1, seed, md5, time, codec, sampler, initCount, dtype, logProb, tokenizedScore, same, problem,
      codecName] = row;
    const isKnown = /^[0-9a-f]{32}$/.test(md5) && /^[0-9a-f]{16}$/.test(codec) && !problem;
    const url = isKnown ? `image/${codec}/${md5}` : null;
    return {name, group, rank, score, scores: [score], key: key0 === null ? null : [key0, key1], seed, md5, time, sampler,
      initCount, dtype, logProb, tokenizedScore, codec, codecName, same, problem, url, file: null};
  }

  async statistics({axis, prompt = null, values = {}}, signal) {
    const parameters = Object.entries({axis: axis.key, prompt, ...values}).filter(([name]) => name !== SEED_AXIS.key);
    const found = await this.get("statistics", parameters, signal);
    const read = (value) => (axis === SETTING ? Object.fromEntries(VALUES.map((name, i) => [name, value[i]])) : value);
    return found.values.map(([value, n, mean, sd, counts, difference]) => (
      {value: read(value), n, mean, sd, counts, difference: difference && {n: difference[0], mean: difference[1], sd: difference[2]}}));
  }

  async judge(judgements) {
    const headers = {"Content-Type": "application/json", "X-Token": this.token};
    await this.answer(await fetch("api/judgements", {method: "POST", headers, body: JSON.stringify(judgements)}));
  }

  /** Images as a zip, by the MD5 of their tokens. */
  async zip(md5s) {
    const headers = {"Content-Type": "application/json", "X-Token": this.token};
    const response = await fetch("api/zip", {method: "POST", headers, body: JSON.stringify(md5s)});
    return response.ok ? response.blob() : this.answer(response);
  }

  async judgements() { return this.get("judgements"); }

  onChange(callback) {
    setInterval(async () => {
      if (document.hidden) return;
      try {
        const {revision} = await this.get("changes");
        if (revision === this.revision) return;
        this.groupsByPrompt.clear();
        await this.readSummary();
        callback();
      } catch { /* the server is gone or busy; it is asked again */ }
    }, CHANGES_MS);
  }
}

// Beside the page of a live site: reads the archive with SQLite and decodes tokens with ONNX Runtime, both as WebAssembly
// or, for the codec, on the GPU. A classic script, started by site.js, which says what is sent and answered.

"use strict";

const SCRIPTS = new URL("scripts/", self.location.href).href;
const COLUMNS = ["id", "prompt_id", "sc_prompt_id", "top_k", "top_p", "temperature", "cond_scale", "extra_settings",
  "generator_id", "sampler_version", "init_count", "dtype", "key0", "key1", "quantvec_md5", "clip_score_input", "time_end",
  "codec_id", "clip_score_tokenized", "log_prob"];
const GROUP = ["prompt_id", "sc_prompt_id", "top_k", "top_p", "temperature", "cond_scale", "extra_settings"];

let site = null, session = null;
const databases = []; // in the order of site.archives
const queue = new Map(); // id of a request -> name of an image: position of its archive, ".", its id there

async function load(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: the server answered ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

async function open(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: the server answered ${response.status}`);
  site = await response.json();
  if (site.version !== 1) throw new Error(`${address} has version ${site.version}, which this page cannot read`);
  importScripts(SCRIPTS + "sql-wasm.js");
  const [sql, ...files] = await Promise.all([initSqlJs({locateFile: (name) => SCRIPTS + name}), ...site.archives.map(({file}) => load(file))]);
  databases.push(...files.map((bytes) => new sql.Database(bytes)));
  session = startSession();
  session.catch(() => {}); // told when an image is decoded
  return manifest();
}

function* rows(database, sql) {
  const statement = database.prepare(sql);
  try {
    while (statement.step()) yield statement.get();
  } finally {
    statement.free();
  }
}

/** The texts of a table of all archives, equal ones once: [[new id, text], ...], and for each archive a Map of its ids to positions. */
function unite(table, read = (text) => text) {
  const positions = new Map();
  const places = databases.map((database) => new Map([...rows(database, `SELECT id, desc FROM ${table} ORDER BY id`)].map(([id, desc]) => {
    const text = read(desc);
    if (!positions.has(text)) positions.set(text, positions.size);
    return [id, positions.get(text)];
  })));
  return {list: [...positions.keys()].map((text, i) => [i + 1, text]), places};
}

/** The archives in the form of manifest.js, see dm_generations/export/manifest.py. */
function manifest() {
  const prompts = unite("prompts"), scPrompts = unite("sc_prompts", (text) => text || null);
  const groups = Object.fromEntries(["prompt", "sc_prompt", ...GROUP.slice(2), "archive", "prefix", "suffix", "count"].map((name) => [name, []]));
  const images = {name: [], position: [], score: [], seed: [], provenance: [], md5: [], tokenized_score: [], log_prob: []}, seconds = [];
  const seeds = new Map(), provenances = new Map();
  const code = (codes, values) => {
    const key = JSON.stringify(values);
    if (!codes.has(key)) codes.set(key, codes.size);
    return codes.get(key);
  };
  for (const [number, database] of databases.entries()) {
    for (const key of rows(database, "SELECT key0, key1 FROM images ORDER BY id")) code(seeds, key);
    let last = null, rank = 0;
    for (const row of rows(database, `SELECT ${COLUMNS} FROM images ORDER BY ${GROUP}, clip_score_input DESC, id`)) {
      const values = row.slice(1, 1 + GROUP.length), key = JSON.stringify(values);
      if (key !== last) {
        [prompts.places[number].get(values[0]), scPrompts.places[number].get(values[1]), ...values.slice(2), number, "", "", 0]
          .forEach((value, i) => Object.values(groups)[i].push(value));
        last = key;
        rank = 0;
      }
      groups.count[groups.count.length - 1] += 1;
      const [generator, sampler, initCount, dtype, key0, key1, md5, score, time, codec, tokenizedScore, logProb] = row.slice(1 + GROUP.length);
      images.name.push(`${number}.${row[0]}`);
      images.position.push(rank);
      images.score.push(typeof score === "number" ? score : null);
      images.seed.push(code(seeds, [key0, key1]));
      images.provenance.push(code(provenances, [site.archives[number].models[generator] ?? null, sampler, initCount, dtype,
        ...(site.archives[number].codec_ids.includes(codec) ? [site.codec.sha256, site.codec.name] : [null, null])]));
      images.md5.push(btoa(String.fromCharCode(...(md5 ?? "").match(/../g)?.map((hex) => parseInt(hex, 16)) ?? [])).slice(0, 22));
      seconds.push(typeof time === "number" ? time : null);
      images.tokenized_score.push(tokenizedScore);
      images.log_prob.push(logProb);
      rank += 1;
    }
  }
  const parsed = (codes) => [...codes.keys()].map((key) => JSON.parse(key));
  return {version: 2, mode: "images", archives: site.archives.map(({name}) => name), prompts: prompts.list, sc_prompts: scPrompts.list, seeds: parsed(seeds),
    provenances: parsed(provenances), groups, images: {...images, md5: images.md5.join(""), time: {start: 0, seconds}}};
}

/** ONNX Runtime with the codec, on the GPU if the browser offers one; one in software is slower than WebAssembly. */
async function startSession() {
  const adapter = await self.navigator.gpu?.requestAdapter().catch(() => null);
  const hasGpu = Boolean(adapter) && !adapter.info?.isFallbackAdapter;
  importScripts(SCRIPTS + (hasGpu ? "ort.webgpu.min.js" : "ort.wasm.min.js"));
  ort.env.wasm.wasmPaths = SCRIPTS;
  const executionProviders = hasGpu ? ["webgpu", "wasm"] : ["wasm"];
  return ort.InferenceSession.create(await load(site.codec.file), {executionProviders});
}

function tokensOf(name) {
  const {token_count: count, codebook_size: size} = site.codec;
  const [number, id] = name.split(".").map(Number), {codec_ids: ids} = site.archives[number];
  const [row] = rows(databases[number], `SELECT quantvec, codec_id FROM images WHERE id = ${id}`);
  if (!row) throw new Error("this image is not in the archive");
  const [blob, codec] = row;
  if (codec !== null && !ids.includes(codec)) throw new Error("it was made with another codec");
  if (!(blob instanceof Uint8Array) || blob.length !== 2 * count) throw new Error(`it has not ${count} tokens`);
  const view = new DataView(blob.buffer, blob.byteOffset, blob.length);
  const tokens = Int32Array.from({length: count}, (_, i) => view.getUint16(2 * i, true));
  if (tokens.some((token) => token >= size)) throw new Error(`a token is outside the codebook of ${size}`);
  return tokens;
}

async function decode(name) {
  const tokens = tokensOf(name), running = await session;
  const {[running.outputNames[0]]: pixels} = await running.run(
    {[running.inputNames[0]]: new ort.Tensor("int32", tokens, [1, tokens.length])});
  const [, height, width] = pixels.dims;
  const data = new Uint8ClampedArray(width * height * 4).fill(255);
  const values = await pixels.getData();
  // Truncated, not rounded, as `decode` does it.
  for (let i = 0, j = 0; i < values.length; i += 3, j += 4) for (let k = 0; k < 3; k += 1) data[j + k] = Math.trunc(Math.fround(values[i + k] * 255));
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  return canvas.convertToBlob({type: "image/png"});
}

let isDecoding = false;

/** Decode what is waited for, one at a time, so that what is cancelled meanwhile is not. */
async function work() {
  if (isDecoding) return;
  isDecoding = true;
  while (queue.size) {
    const [[id, image]] = queue;
    queue.delete(id);
    try {
      self.postMessage({id, answer: await decode(image)});
    } catch (error) {
      self.postMessage({id, error: String(error.message ?? error)});
    }
  }
  isDecoding = false;
}

self.onmessage = async ({data: {id, open: address, decode: image, cancel}}) => {
  if (cancel !== undefined) { queue.delete(cancel); return; }
  if (image !== undefined) { queue.set(id, image); work(); return; }
  try {
    self.postMessage({id, answer: await open(address)});
  } catch (error) {
    self.postMessage({id, error: String(error.message ?? error)});
  }
};

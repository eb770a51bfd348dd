// Where the page gets its data: from manifest.js beside decoded images (ManifestSource), from an archive that it decodes
// itself (SiteSource), or from a server (LiveSource).
//
// All have the members below, and the page uses nothing else. A server is written from this comment alone.
//
//   Prompt   {id, text or null, count, best: Image or null}
//   Group    the images of one prompt and one setting: {id, prompt, values, count, scored, mean, sd, best}
//            `id` is opaque. `values` has the value of each axis of AXES: numbers, ids of `scPrompts`, positions in
//            `models` and `archives`. `scored` images have a score; mean, sd and best are theirs, or null.
//   Image    {name, group, rank, score, scores, key: [key0, key1] or null, seed, md5, time, sampler, initCount, dtype,
//            logProb, tokenizedScore, codec, codecName, same, url, thumbnail, file, problem}
//            `name` tells it from the others of its group: "key0.key1", with ".1", ".2", ... for more images of one
//            key; "page 3" for a gallery. `rank` counts from 0, best first. `seed` is the position of its key in
//            `seeds`, or -1. `same` is how many images of the group have the same tokens, this one included.
//            `thumbnail` is the URL of a smaller file, if there is one, with `thumbnails.side` of the source as its width.
//            `url` is null, and `problem` may say why, where there is nothing to show.
//
//   mode              "images" or "gallery"
//   isLive            whether judgements are stored by the server
//   archives          names of archives            models   names of models: "" ships with the program, null is unknown
//   scPrompts         Map of id to text or null    seeds    [[key0, key1], ...] in the order of sampling
//   imageCount, promptCount, scoreRange: [low, high] or null
//   valuesOf(axis, signal)     the values of one of AXES that the archive has, in their order; of a server a promise
//   first             {prompt, values}: the prompt with the best image, and its setting with the best mean
//   prompts({search, offset, limit} or {ids}, signal)     -> {total, prompts}
//   groups(prompt ids, signal)                            -> [Group, ...]
//   images({groups, sort, descending, min, max, seed, limit, offset}, signal)   -> Map of group id to {total, images}
//            `groups` are Groups. sort: "score", "seed" or "time". Equal images are one, with the best of their scores.
//   statistics({axis, prompt, values}, signal)            -> [{value, n, mean, sd, counts, difference}, ...]
//            Scores by the value of one axis or by SETTING, of one prompt or (null) of all; `values` narrows the other axes.
//            counts: a histogram over 24 equal bins of scoreRange. difference: {n, mean, sd} of the scores minus those
//            of the value with the highest mean, over images that differ in this axis alone; null where none pair.
//   judge([judgement, ...])    judgements()    -> see judge.js
//   show(node, image), decode(image)   of a site: show an image in an <img>; its PNG as a Blob
//   zip([md5, ...])            of a server: -> Blob, a zip of these images
//   onChange(callback)         called when images were added; the page then asks again
//
// ---- The server ----
//
// The server sends samplebrowser.html with <meta name="live" content="TOKEN"> in place of content="", and a cookie for
// the routes below. Numbers that JSON has no form for are null; arrays save what keys would repeat.
//
//   GET  api/summary         {version: 2, mode, archives, models, sc_prompts: [[id, text], ...], seeds: [[k0, k1], ...]
//                            (at most 1,000), images, prompts, score_range, first: {prompt, values}, revision,
//                            decoder: null, or what decodes in place of the codecs, as in manifest.js}
//        `values` of `first` is {top_k, top_p, temperature, cond_scale, sc_prompt, extra_settings, model, archive}, one value
//        of each. `first` is null in an empty archive.
//   GET  api/values          {values: {top_k: [...], ...}}: at most 2,000 values of each of these that images have
//   GET  api/prompts?search=WORDS&offset=0&limit=100     {total, prompts: [[id, text, count, IMAGE or null], ...]}
//   GET  api/prompts?id=1&id=2                           the same, of these
//        A prompt is found if it contains all words, in any case; its id counts as a word. limit is at most 2,000.
//   GET  api/groups?prompt=1&prompt=2                    {groups: [GROUP, ...]}
//        GROUP: [id, prompt, top_k, top_p, temperature, cond_scale, sc_prompt, extra_settings, model, archive,
//                count, scored, mean, sd, best]
//   GET  api/images?group=ID&group=ID&sort=score&descending=1&min=&max=&seed=KEY0.KEY1&limit=9&offset=0
//        {groups: {ID: {total, images: [IMAGE, ...]}}}
//        IMAGE: [name, group, rank, score, key0, key1, seed, md5, time, codec, sampler_version, init_count, dtype,
//                log_prob, score of the prompt's tokens, same, problem, codec's name], or null for one that is gone
//        md5: of the tokens, hex; codec: the first 16 hex digits of its sha256; its name, "" for the one that ships
//   GET  api/statistics?axis=top_k&prompt=1&temperature=0.7   {range: [low, high], values: [[value, n, mean, sd,
//                                                              [count, ...], [n, mean, sd] or null], ...]}
//        With axis=setting, a value is [top_k, top_p, temperature, cond_scale, sc_prompt, extra_settings, model, archive].
//   GET  image/CODEC/MD5     the image, WebP or PNG, immutable. What scrolls out of sight is no longer waited for.
//   GET  api/judgements      [judgement, ...], newest last, at most 100,000
//   POST api/judgements      [judgement, ...] with the header X-Token: TOKEN; answers {stored: N}; all or none
//   POST api/zip             [MD5, ...] (at most 2,000) with the header X-Token; answers these images as a zip
//   GET  api/changes         {revision}; asked every 3 s while the page is in sight
//
// An error is a status of 400 or more and {error: "one line: what, where, what to do"}.

import {ManifestSource, loadManifest} from "./manifest.js";
import {LiveSource} from "./live.js";
import {SiteSource} from "./site.js";

export const isSite = () => document.querySelector('meta[name="site"]').content !== "";

/** Return {source}, or {problem, file, version}: "missing", "broken" or "newer". */
export async function openSource() {
  const token = document.querySelector('meta[name="live"]').content;
  if (token) return {source: await LiveSource.open(token)};
  if (isSite()) return {source: await SiteSource.open(document.querySelector('meta[name="site"]').content)};
  const loaded = await loadManifest();
  if (loaded.problem) return loaded;
  try {
    return {source: new ManifestSource(loaded.manifest, loaded.folder)};
  } catch {
    return {problem: "broken", file: loaded.folder + "manifest.js"};
  }
}

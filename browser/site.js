// A live site: the archives themselves, decoded in this browser by worker.js.
//
// The worker is sent {id, open: address of site.json}, {id, decode: name of an image} and {cancel: id of a request}. It answers
// {id, answer} or {id, error}: the archives in the form of manifest.js, or the image as a PNG.

import {ManifestImage, ManifestSource} from "./manifest.js";

const MAX_KEPT = 1000; // decoded images

class SiteImage extends ManifestImage {
  get place() { return this.source.columns.name[this.row]; } // of its row in the archives
  get file() { return null; }
  get thumbnail() { return null; }
  get url() { return this.source.kept.get(this.place)?.url ?? "data:,"; }
}

export class SiteSource extends ManifestSource {
  static async open(address) {
    const worker = new Worker("worker.js");
    const calls = new Map();
    let last = 0;
    worker.onmessage = ({data: {id, answer, error}}) => {
      const call = calls.get(id);
      calls.delete(id);
      if (error === undefined) call?.resolve(answer); else call?.reject(new Error(error));
    };
    const ask = (question, signal = null) => new Promise((resolve, reject) => {
      const id = last += 1;
      calls.set(id, {resolve, reject});
      worker.postMessage({id, ...question});
      signal?.addEventListener("abort", () => { worker.postMessage({cancel: id}); calls.delete(id); reject(signal.reason); });
    });
    worker.onerror = () => calls.forEach(({reject}) => reject(new Error("worker.js cannot be loaded")));
    return new SiteSource(await ask({open: new URL(address, location.href).href}), ask);
  }

  constructor(manifest, ask) {
    super(manifest, "", SiteImage);
    Object.assign(this, {ask, kept: new Map(), stops: new WeakMap()});
    this.observer = new IntersectionObserver((entries) => {
      for (const {target, isIntersecting} of entries) if (isIntersecting) this.start(target); else this.stops.get(target)?.abort();
    }, {rootMargin: "200px"});
  }

  /** Show an image in an <img>, decoded when it comes into sight. */
  show(node, image) {
    this.stops.get(node)?.abort();
    node.shown = image;
    if (this.kept.has(image.place)) { node.src = image.url; return; }
    node.removeAttribute("src");
    this.observer.unobserve(node);
    this.observer.observe(node);
  }

  async start(node) {
    const image = node.shown, stop = new AbortController();
    this.stops.set(node, stop);
    try {
      await this.decode(image, stop.signal);
      if (node.shown === image) { node.src = image.url; this.observer.unobserve(node); }
    } catch (error) {
      if (stop.signal.aborted) return;
      this.observer.unobserve(node);
      node.title = error.message;
      node.dispatchEvent(new Event("error"));
    }
  }

  /** Decode an image to a PNG; afterwards its `url` shows it. */
  async decode(image, signal = null) {
    const {kept} = this, {place} = image;
    if (kept.has(place)) return kept.get(place).blob;
    const blob = await this.ask({decode: place}, signal);
    if (kept.size >= MAX_KEPT) {
      const [[first, {url}]] = kept;
      URL.revokeObjectURL(url);
      kept.delete(first);
    }
    kept.set(place, {blob, url: URL.createObjectURL(blob)});
    return blob;
  }
}

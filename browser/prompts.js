// The list of prompts: only the ones in sight are elements, so that 10,000 prompts and more scroll and are searched well.

import {$, attributes, cut, element, plural, promptText} from "./text.js";
import {showImage} from "./tile.js";

const ROW = 58;      // pixels of one prompt
const PAGE = 100;    // prompts asked for at a time
const AROUND = 6;    // rows made above and below those in sight

export const promptList = {
  total: 0,
  pages: new Map(),  // number of a page -> its prompts, or null while they come
  items: new Map(),  // position -> element
  search: "",

  setUp(app) {
    this.app = app;
    $("prompts-scroll").addEventListener("scroll", () => this.draw(), {passive: true});
    new ResizeObserver(() => this.draw()).observe($("prompts-scroll"));
    $("search").addEventListener("input", async () => { await this.find(); app.searchChanged(); });
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") { event.preventDefault(); this.items.get(this.firstInSight())?.firstChild.focus(); }
      if (event.key === "Enter") this.items.get(0)?.firstChild.click();
    });
    $("prompts").addEventListener("keydown", (event) => {
      const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
      const item = event.target.closest("li");
      if (!step || !item) return;
      event.preventDefault();
      this.focus(item.position + step);
    });
  },

  async find() {
    this.stop?.abort();
    this.stop = new AbortController();
    const {signal} = this.stop;
    this.search = $("search").value;
    const found = await this.app.source.prompts({search: this.search, offset: 0, limit: PAGE}, signal).catch(() => null);
    if (!found || signal.aborted) return;
    this.total = found.total;
    this.pages = new Map([[0, found.prompts]]);
    this.items.forEach((item) => item.remove());
    this.items.clear();
    $("prompts").style.height = `${this.total * ROW}px`;
    $("prompts-scroll").scrollTop = 0;
    $("found").textContent = !found.total ? "No prompt contains these words."
      : this.search.trim() ? `${plural(found.total, "prompt")} found` : "";
    this.draw();
  },

  firstInSight() { return Math.floor($("prompts-scroll").scrollTop / ROW); },

  draw() {
    const box = $("prompts-scroll");
    const first = Math.max(0, this.firstInSight() - AROUND);
    const last = Math.min(this.total, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + AROUND);
    for (const [position, item] of this.items) {
      if (position >= first && position < last) continue;
      if (item.contains(document.activeElement)) continue;
      item.remove();
      this.items.delete(position);
    }
    for (let position = first; position < last; position += 1) {
      if (this.items.has(position)) continue;
      const prompt = this.promptAt(position);
      if (prompt) this.add(position, prompt);
    }
    this.mark();
  },

  promptAt(position) {
    const page = Math.floor(position / PAGE);
    if (!this.pages.has(page)) {
      this.pages.set(page, null);
      const {pages} = this;
      this.app.source.prompts({search: this.search, offset: page * PAGE, limit: PAGE})
        .then(({prompts}) => { pages.set(page, prompts); if (pages === this.pages) this.draw(); })
        .catch(() => pages.delete(page));
    }
    return this.pages.get(page)?.[position % PAGE] ?? null;
  },

  add(position, prompt) {
    const text = promptText(prompt);
    const button = element("button", {type: "button", title: cut(text, 600)});
    const {source} = this.app, {best} = prompt;
    const isShown = source.mode === "images" && best?.url;
    const image = element(isShown ? "img" : "span", isShown ? {loading: "lazy", decoding: "async", alt: ""} : {className: "blank"});
    if (isShown) showImage(image, best.thumbnail ? {url: best.thumbnail} : best, source);
    button.append(image,
      element("span", {className: "text", dir: "auto", textContent: cut(text, 300)}),
      element("span", {className: "count", textContent: prompt.count.toLocaleString("en")}));
    button.addEventListener("click", () => this.app.choosePrompt(prompt.id));
    const item = attributes(element("li", {}, button), {"aria-setsize": this.total, "aria-posinset": position + 1});
    Object.assign(item, {position, promptId: prompt.id});
    item.style.transform = `translateY(${position * ROW}px)`;
    this.items.set(position, item);
    const after = [...$("prompts").children].find((other) => other.position > position);
    $("prompts").insertBefore(item, after ?? null);
  },

  mark() {
    for (const item of this.items.values()) {
      item.firstChild.setAttribute("aria-current", String(item.promptId === this.app.prompt?.id));
    }
  },

  focus(position) {
    if (position < 0 || position >= this.total) return;
    const box = $("prompts-scroll");
    if (position * ROW < box.scrollTop) box.scrollTop = position * ROW;
    if ((position + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (position + 1) * ROW - box.clientHeight;
    this.draw();
    this.items.get(position)?.firstChild.focus();
  },

  /** The prompt before or after the current one in the list, if it is loaded. */
  neighbour(step) {
    for (const [page, prompts] of this.pages) {
      const i = prompts?.findIndex((prompt) => prompt.id === this.app.prompt.id) ?? -1;
      if (i >= 0) return this.promptAt(page * PAGE + i + step);
    }
    return this.promptAt(0);
  },
};

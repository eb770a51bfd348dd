// Untrusted text. Prompts, names and tags come from archives of strangers: they reach the page through textContent and
// attributes only, paths through fileUrl(), and commands through shellWord().

/** Replace characters that are invisible or reorder the text around them by visible signs. */
export function visible(text) {
  return text
    .replace(/\n/g, "↵")
    .replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, (c) => `⟨${codePoint(c)}⟩`)
    .replace(/\p{Cs}/gu, "\ufffd");
}

function codePoint(character) {
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

export function cut(text, length) {
  return text.length > length ? visible(text.slice(0, length)) + "…" : visible(text);
}

/** One word of bash or zsh that means exactly `text`; null where no word can (NUL, half a character). */
export function shellWord(text) {
  if (/\0|\p{Cs}/u.test(text)) return null;
  if (/^[\w.,:/+-][\w.,:/+=-]*$/.test(text)) return text; // zsh reads "=" at the start
  // A control character pasted into a terminal may act on it, so those are spelled out.
  if (!/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u.test(text)) return `'${text.replaceAll("'", "'\\''")}'`;
  const escaped = text.replace(/[\\']/g, "\\$&").replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => {
    const hex = c.codePointAt(0).toString(16);
    return hex.length > 4 ? `\\U${hex.padStart(8, "0")}` : `\\u${hex.padStart(4, "0")}`;
  });
  return `$'${escaped}'`;
}

/** URL of a file of the manifest; null for a path that would leave its folder. */
export function fileUrl(folder, path) {
  const parts = path.split("/");
  const isSafe = (part) => part !== "" && part !== "." && part !== ".." && !/[\0\\]/.test(part);
  return parts.every(isSafe) ? "./" + folder + parts.map(encodePart).join("/") : null;
}

/** Percent-encode; Python writes a byte of a name that is not UTF-8 as half of a surrogate pair. */
function encodePart(part) {
  return Array.from(part, (c) => {
    if (/[\udc80-\udcff]/.test(c) && c.length === 1) {
      return "%" + (c.charCodeAt(0) - 0xdc00).toString(16).toUpperCase();
    }
    return /\p{Cs}/u.test(c) ? "%EF%BF%BD" : encodeURIComponent(c);
  }).join("");
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
export const promptText = (prompt) => (prompt.text === "" ? "(empty)" : prompt.text ?? "None");
export const scoreText = (score) => (score === null ? "no score" : score.toFixed(2));

export function scoreRange(scores) {
  const known = scores.filter((score) => score !== null);
  if (!known.length) return "no scores";
  const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  return low === high ? `score ${scoreText(low)}` : `scores ${scoreText(high)} to ${scoreText(low)}`;
}

// ---- Elements ----

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Set ARIA and data attributes, whose values are text. */
export function attributes(node, values) {
  for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
  return node;
}

/** A control that chooses one of `choices`, [[value, text], ...]. */
export function fillSelect(select, choices, value) {
  select.replaceChildren(...choices.map(([key, text]) => element("option", {value: key, textContent: text})));
  select.value = value;
}

// ---- What this browser remembers between visits, if it may ----

export function remembered(name) {
  try { return localStorage.getItem(`samplebrowser-${name}`); } catch { return null; }
}

/** Return whether the value was stored: a private window or a full store may refuse. */
export function remember(name, value) {
  try { localStorage.setItem(`samplebrowser-${name}`, value); return true; } catch { return false; }
}

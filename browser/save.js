// The view as PNG or WebP with its labels, in files of at most 8,192 pixels a side.
//
// A server also gives images as they are, as a zip. A page opened from disk may show its images but not read their pixels, so there the person chooses the folder once.

import {attributes, cut, element, fillSelect, plural, promptText, visible} from "./text.js";
import {AXES, axisOf} from "./axes.js";

const MAX_SIDE = 8192, MAX_FILES = 50, MAX_ZIPPED = 2000;
const PAD = 24, TEXT = 15, LEAD = 20;

let folderFiles = null; // path -> File, of the folder that the person chose

/** Show what to save as, then save. */
export function askSave(app) {
  const isDisk = location.protocol === "file:" && !folderFiles;
  const format = element("select", {id: "save-as"});
  fillSelect(format, [["image/png", "this view as PNG"], ["image/webp", "this view as WebP"],
    ...(app.source.isLive ? zipChoices(app) : [])], "image/png");
  const status = attributes(element("p", {className: "quiet"}), {role: "status"});
  const button = element("button", {type: "button", className: "button", id: "save-now", textContent: "Save"});
  const body = [element("label", {}, "Save ", format)];
  if (isDisk) {
    const input = attributes(element("input", {type: "file", id: "folder"}), {webkitdirectory: "", multiple: ""});
    input.addEventListener("change", () => {
      folderFiles = new Map([...input.files].map((file) => [file.webkitRelativePath.split("/").slice(1).join("/"), file]));
      button.disabled = false;
    });
    button.disabled = true;
    body.push(element("p", {textContent: "A page opened from disk may not read its own images. Choose the folder of this page once:"}),
      element("label", {}, "Folder ", input));
  }
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const report = (text) => { status.textContent = text; };
      const count = await (format.value.startsWith("image/") ? save(app, format.value, report) : saveZip(app, format.value, report));
      status.textContent = `${count} ${count === 1 ? "file" : "files"} saved.`;
    } catch (error) {
      status.textContent = visible(error.message);
    }
    button.disabled = false;
  });
  app.openSheet("Save", [...body, element("div", {}, button), status]);
}

/** What can be saved as a zip: the images of the view, favourites, and those with a tag. */
function zipChoices(app) {
  const marks = [...app.judge.marks.values()];
  return [["zip", "images of this view as a zip"],
    ...(marks.some(({favourite}) => favourite) ? [["zip favourite", "♥ all favourites as a zip"]] : []),
    ...app.judge.tags.map((tag) => [`zip #${tag}`, `# all tagged ${cut(tag, 40)} as a zip`])];
}

async function saveZip(app, choice, report) {
  report("Decoding …");
  const wanted = choice.slice("zip ".length);
  const isWanted = (mark) => (wanted.startsWith("#") ? mark.tags.has(wanted.slice(1)) : mark.favourite);
  const md5s = wanted ? [...app.judge.marks].filter(([, mark]) => isWanted(mark)).map(([key]) => JSON.parse(key))
    : (await app.views[app.view.view].layout(app)).cells.flatMap(({images}) => images.map(({md5}) => md5));
  const found = [...new Set(md5s)].filter((md5) => /^[0-9a-f]{32}$/.test(md5));
  if (!found.length) throw new Error("There is nothing to save in this view.");
  if (found.length > MAX_ZIPPED) throw new Error(`These are ${found.length.toLocaleString("en")} images; a zip has at most ${MAX_ZIPPED}.`);
  report(`Decoding ${plural(found.length, "image")} …`);
  download(await app.source.zip(found), "images.zip");
  return 1;
}

async function pixels(image, source) {
  try {
    if (source.decode) return await createImageBitmap(await source.decode(image));
    if (folderFiles) {
      const file = image.file === null ? null : folderFiles.get(image.file);
      return file ? await createImageBitmap(file) : null;
    }
    const response = image.url ? await fetch(image.url) : null;
    return response?.ok ? await createImageBitmap(await response.blob()) : null;
  } catch {
    return null;
  }
}

/** Break a text into lines of a width. */
function wrap(context, text, width, most = 12) {
  const lines = [];
  let line = "";
  for (const word of visible(text).split(/(?<=\s)/)) {
    if (line && context.measureText(line + word.trimEnd()).width > width) { lines.push(line.trimEnd()); line = ""; }
    line += word;
    while (context.measureText(line).width > width && line.length > 1) {
      let end = line.length - 1;
      while (end > 1 && context.measureText(line.slice(0, end)).width > width) end -= 1;
      lines.push(line.slice(0, end));
      line = line.slice(end);
    }
  }
  lines.push(line);
  return lines.length > most ? [...lines.slice(0, most - 1), lines[most - 1] + "…"] : lines;
}

/** A sheet as blocks to draw: {width, height, blocks: [{x, y, side or lines}]}; sheets are split to fit the limit. */
async function arrange(app) {
  const context = element("canvas").getContext("2d");
  context.font = `${TEXT}px system-ui, sans-serif`;
  const {view, source, prompt, group} = app;
  const layout = await app.views[view.view].layout(app);
  const fixed = view.view === "arena" ? "" : AXES.filter((axis) => axis.isNumber
    && !(layout.kind === "grid" && Object.values(app.views.grid.axes).includes(axis.key)))
    .map((axis) => `${axis.label} ${axis.show(group.values[axis.key], source)}`).join(" · ");
  const isOnAxis = layout.kind === "grid" && Object.values(app.views.grid.axes).includes("prompt");
  const title = [isOnAxis ? source.archives.join(", ") : cut(promptText(prompt), 600), view.view === "compare" ? "" : fixed].filter(Boolean);
  return layout.kind === "grid" ? gridSheets(context, layout, title, app) : stripSheets(context, layout, title, app);
}

function blank(context, title, width) {
  const blocks = [];
  let y = PAD;
  for (const text of title) {
    const lines = wrap(context, text, Math.max(200, width - 2 * PAD));
    blocks.push({x: PAD, y, lines});
    y += lines.length * LEAD;
  }
  return {width, height: 0, blocks, y: y + PAD / 2};
}

function cellBlocks(images, x, y, side) {
  const across = images.length > 4 ? 3 : images.length > 1 ? 2 : 1;
  return images.map((image, i) => ({image, side: side / across - 2, x: x + (i % across) * side / across, y: y + Math.floor(i / across) * side / across}));
}

function stripSheets(context, {cells}, title, app) {
  const side = Math.max(160, app.size), lineCount = Math.max(1, ...cells.map(({lines = []}) => lines.length + 1));
  const high = side + lineCount * LEAD + 12;
  const across = Math.max(1, Math.min(cells.length, Math.ceil(Math.sqrt(cells.length * 1.6)), Math.floor((MAX_SIDE - 2 * PAD) / (side + 8))));
  const width = 2 * PAD + Math.max(across * (side + 8), 320);
  const sheets = [];
  let sheet = null, column = 0;
  for (const {images, label, lines = []} of cells) {
    if (!sheet || (column === 0 && sheet.y + high > MAX_SIDE - PAD)) sheets.push(sheet = blank(context, title, width));
    const x = PAD + column * (side + 8);
    sheet.blocks.push(...cellBlocks(images, x, sheet.y, side), {x, y: sheet.y + side + 4, lines: [label, ...lines].map((text) => wrap(context, text, side, 1)[0])});
    sheet.height = sheet.y + high + PAD;
    column = (column + 1) % across;
    if (column === 0) sheet.y += high;
  }
  return sheets;
}

function gridSheets(context, {lines, columns, cells, axes, cellSide}, title) {
  const side = Math.max(96, cellSide), labelWidth = 180, left = PAD + labelWidth;
  const perSheet = Math.max(1, Math.floor((MAX_SIDE - left - PAD) / side));
  const at = new Map(cells.map((cell) => [cell.place.join(), cell.images]));
  const sheets = [];
  for (let first = 0; first < columns.length; first += perSheet) {
    const part = columns.slice(first, first + perSheet);
    const heads = part.map((text) => wrap(context, text, side - 8));
    const headHeight = Math.max(2, ...heads.map((head) => head.length)) * LEAD + 8;
    let sheet = null;
    lines.forEach((line, i) => {
      const label = line.isBand ? line.page.map(({key, text}) => `${axisOf(key).label} ${text}`).join(" · ") : line.row.text;
      const labelLines = wrap(context, label, line.isBand ? 2000 : labelWidth - 12);
      const high = line.isBand ? 40 : Math.max(side, labelLines.length * LEAD);
      if (!sheet || sheet.y + high > MAX_SIDE - PAD) {
        sheets.push(sheet = blank(context, title, Math.max(left + part.length * side + PAD, 480)));
        sheet.blocks.push({x: PAD, y: sheet.y, lines: [`${axes[1]} →`, `${axes[0]} ↓`]});
        heads.forEach((head, k) => sheet.blocks.push({x: left + k * side + 4, y: sheet.y, lines: head}));
        sheet.y += headHeight;
      }
      sheet.blocks.push({x: PAD, y: sheet.y + (line.isBand ? 12 : 4), lines: labelLines, isBold: line.isBand});
      if (!line.isBand) part.forEach((_, k) => sheet.blocks.push(...cellBlocks(at.get(`${i},${first + k}`) ?? [], left + k * side, sheet.y, side - 4)));
      sheet.y += high;
      sheet.height = sheet.y + PAD;
    });
  }
  return sheets;
}

async function draw(sheet, app) {
  const canvas = element("canvas", {width: Math.ceil(sheet.width), height: Math.ceil(sheet.height)});
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  context.fillStyle = style.getPropertyValue("--page");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = style.getPropertyValue("--text");
  context.textBaseline = "top";
  context.imageSmoothingEnabled = !app.isPixelated;
  for (const {x, y, lines, image, side, isBold} of sheet.blocks) {
    if (lines) {
      context.font = `${isBold ? "600 " : ""}${TEXT}px system-ui, sans-serif`;
      lines.forEach((line, i) => context.fillText(line, x, y + i * LEAD));
      continue;
    }
    const bitmap = await pixels(image, app.source);
    if (!bitmap) { context.strokeStyle = style.getPropertyValue("--line"); context.strokeRect(x + .5, y + .5, side, side); continue; }
    const scale = side / Math.max(bitmap.width, bitmap.height);
    context.drawImage(bitmap, x, y, bitmap.width * scale, bitmap.height * scale);
    bitmap.close();
  }
  return canvas;
}

async function save(app, type, report) {
  report("Laying out …");
  const sheets = await arrange(app);
  if (!sheets.length) throw new Error("There is nothing to save in this view.");
  if (sheets.length > MAX_FILES) throw new Error(`This view would be ${sheets.length} files. Make images smaller, or use fewer rows.`);
  for (const [i, sheet] of sheets.entries()) {
    report(`File ${i + 1} of ${sheets.length} …`);
    const canvas = await draw(sheet, app);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, 1));
    if (!blob) throw new Error("This browser could not make the image; make images smaller.");
    const number = sheets.length > 1 ? `-${i + 1}` : "";
    download(blob, `${app.view.view}${number}.${blob.type === "image/webp" ? "webp" : "png"}`);
  }
  return sheets.length;
}

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

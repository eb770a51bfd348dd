// The view of scores: mean, interval and histogram for each value of an axis, so that one sees which wins, and whether the
// difference is noise.

import {$, attributes, cut, element, fillSelect, plural, promptText, scoreText} from "./text.js";
import {AXES, SETTING, axisValues, describeSettings} from "./axes.js";
import {interval, verdict} from "./scores.js";

const ROWS_SHOWN = 60;

function shape(tag, values) {
  return attributes(document.createElementNS($("empty-plot").namespaceURI, tag), values);
}

export const statistics = {
  setUp(app) {
    $("scores-axis").addEventListener("change", () => app.go({of: $("scores-axis").value}));
    $("scores-scope").addEventListener("change", () => app.go({scope: $("scores-scope").value}));
    $("scores-others").addEventListener("change", () => app.go({others: $("scores-others").value}));
  },

  async show(app, signal) {
    const {view, source, group, prompt} = app;
    const axes = AXES.filter((axis) => axisValues(app.groups, axis).length > 1);
    const axis = axes.find(({key}) => key === view.of) ?? (view.of || !axes.length ? SETTING : axes.find(({key}) => key === "cond_scale") ?? axes[0]);
    fillSelect($("scores-axis"), [...axes, SETTING].map(({key, label}) => [key, label]), axis.key);
    fillSelect($("scores-scope"), [["prompt", "this prompt"], ["all", "all prompts"]], view.scope);
    fillSelect($("scores-others"), [["all", "all together"], ["fixed", "as set above"]], view.others);
    $("scores-others").disabled = axis === SETTING;
    if (!source.scoreRange) {
      $("scores").replaceChildren(element("p", {className: "empty", textContent: "No image of this archive has a score."}));
      app.setStatus("");
      return;
    }
    const fixed = view.others === "fixed" && axis !== SETTING ? {...group.values} : {};
    delete fixed[axis.key];
    const found = await source.statistics({axis, prompt: view.scope === "prompt" ? prompt.id : null, values: fixed}, signal);
    if (signal.aborted) return;
    const rows = this.named(axis, found, source).filter(({mean}) => mean !== null).sort((a, b) => b.mean - a.mean);
    const of = view.scope === "prompt" ? cut(promptText(prompt), 80) : plural(source.promptCount, "prompt");
    app.setStatus(`CLIP score by ${axis.label}: ${of}; means with 95% intervals.`);
    const first = rows.length > ROWS_SHOWN ? `The best ${ROWS_SHOWN} of ${rows.length.toLocaleString("en")}. ` : "";
    $("scores").replaceChildren(this.table(axis, rows.slice(0, ROWS_SHOWN), source.scoreRange, app),
      element("p", {className: "quiet note", textContent: `${first}Differences are of images of one prompt and seed that differ in ${
        axis === SETTING ? "their settings" : "this setting"} alone, where there are such pairs. An interval that reaches 0 may be noise.`}));
  },

  /** Add to each row its settings and its name. */
  named(axis, rows, source) {
    if (axis !== SETTING) return rows.map((row) => ({...row, text: axis.show(row.value, source), values: {[axis.key]: row.value}}));
    const axes = AXES.filter((one) => new Set(rows.map(({value}) => value[one.key])).size > 1);
    return rows.map((row) => ({...row, text: describeSettings(row.value, axes, source), values: row.value}));
  },

  table(axis, rows, range, app) {
    const head = ["", "mean", "", "images", "against the best"].map((textContent) => element("th", {textContent, scope: "col"}));
    head[0].textContent = axis.label;
    return element("table", {className: "statistics"}, element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...rows.map((row) => this.row(row, rows[0], range, app))));
  },

  row(row, best, range, app) {
    const go = element("button", {type: "button", className: "link", textContent: row.text, title: "Show this setting"});
    go.addEventListener("click", () => app.go({view: "strip", values: {...app.view.values, ...row.values}}));
    const found = interval(row);
    const half = found ? ` ± ${((found[1] - found[0]) / 2).toFixed(2)}` : "";
    const isCurrent = Object.entries(row.values).every(([key, value]) => app.group.values[key] === value);
    return element("tr", {className: isCurrent ? "current" : ""}, element("th", {scope: "row"}, go),
      element("td", {className: "mean", textContent: scoreText(row.mean) + half}), element("td", {className: "plot"}, this.plot(row, range)),
      element("td", {textContent: row.n.toLocaleString("en")}), element("td", {textContent: verdict(row, best)}));
  },

  /** Histogram, and above it the mean with its interval. */
  plot(row, [low, high]) {
    const width = 240, height = 40, x = (score) => high > low ? 4 + (width - 8) * (score - low) / (high - low) : width / 2;
    const most = Math.max(...row.counts, 1);
    const bars = row.counts.map((count, i) => {
      const step = (width - 8) / row.counts.length, tall = (height - 14) * count / most;
      return shape("rect", {class: "bar", x: 4 + i * step + .5, y: height - tall, width: step - 1, height: tall});
    });
    const found = interval(row);
    const line = found ? [shape("line", {class: "range", x1: x(found[0]), x2: x(found[1]), y1: 7, y2: 7})] : [];
    const svg = shape("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `mean ${scoreText(row.mean)}${found ? `, from ${scoreText(found[0])} to ${scoreText(found[1])}` : ""}`});
    svg.append(...bars, ...line, shape("circle", {class: "dot", cx: x(row.mean), cy: 7, r: 3.5}));
    return svg;
  },

  hide() { $("scores").replaceChildren(); },
};

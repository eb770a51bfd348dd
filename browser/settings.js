// Sliders over the values of each axis that one prompt has, on the page and in the large view.

import {attributes, element} from "./text.js";
import {AXES, axisValues, settingsKey} from "./axes.js";

const TICKS_SHOWN = 8; // more values than these: no labels under the slider

/** Whether a value that all groups have is worth a word: a model that does not ship, one of several archives. */
const isTelling = (axis, value, source) => (
  axis.key === "model" ? Boolean(source.models[value]) : axis.key === "archive" ? source.archives.length > 1 : Boolean(value));

/** Sliders in `box`, and what has one value in `fixed` (or nowhere). `id` begins the ids of the sliders. */
export class Sliders {
  constructor(box, fixed, id, onMove) {
    Object.assign(this, {box, fixed, id, onMove, groups: null, sliders: new Map()});
  }

  /** Make sliders for the groups of a prompt, without axes that are shown otherwise; then set them to `group`. */
  show(groups, group, source, without = []) {
    const key = without.join();
    if (groups !== this.groups || key !== this.without) {
      Object.assign(this, {groups, without: key, sliders: new Map()});
      this.existing = new Set(groups.map((one) => settingsKey(one.values)));
      const nodes = [], fixed = [];
      for (const axis of AXES) {
        if (without.includes(axis.key)) continue;
        const values = axisValues(groups, axis);
        if (values.length > 1) nodes.push(this.control(axis, values, source));
        else if (axis.isNumber || axis.key === "sc_prompt" || isTelling(axis, values[0], source)) {
          fixed.push(element("span", {}, `${axis.label} `, element("bdi", {textContent: axis.show(values[0], source)})));
        }
      }
      this.box.replaceChildren(...nodes);
      this.fixed?.replaceChildren(...fixed);
    }
    for (const [axis, {input, output, ticks, values}] of this.sliders) {
      const value = group.values[axis.key], text = axis.show(value, source);
      input.value = values.indexOf(value);
      input.setAttribute("aria-valuetext", text);
      output.textContent = output.title = text;
      ticks.forEach((tick, i) => {
        const isThere = this.existing.has(settingsKey({...group.values, [axis.key]: values[i]}));
        tick.classList.toggle("absent", !isThere);
      });
    }
  }

  control(axis, values, source) {
    const id = `${this.id}-${axis.key}`;
    const label = element("label", {textContent: axis.label, htmlFor: id});
    const output = element("output", {dir: "auto", htmlFor: id});
    const input = element("input", {type: "range", id, min: 0, max: values.length - 1, step: 1});
    const ticks = axis.isNumber && values.length <= TICKS_SHOWN
      ? values.map((value) => element("span", {textContent: axis.show(value, source)})) : [];
    const row = attributes(element("div", {className: "ticks"}, ...ticks), {"aria-hidden": "true"});
    input.addEventListener("input", () => this.onMove(axis, values[input.valueAsNumber]));
    this.sliders.set(axis, {input, output, ticks, values});
    return element("div", {className: "axis"}, element("div", {className: "head"}, label, output), input, row);
  }
}

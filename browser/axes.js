// The axes of an archive, and the group nearest to what is wanted.

import {cut} from "./text.js";

const number = (value) => (value === null ? "unknown" : String(value));
const same = (value) => value;

/**
 * The settings of a group. `short` is the axis in the address, `rank` gives the order of values ("off" last), `read` and
 * `write` are values as text of the address; `names` are those of the source.
 */
export const AXES = [
  {key: "top_k", short: "k", label: "top k", flag: "--top-k", isNumber: true,
   show: (v) => (v === 0 ? "off" : number(v)), rank: (v) => (v === 0 ? Infinity : v)},
  {key: "top_p", short: "p", label: "top p", flag: "--top-p", isNumber: true,
   show: (v) => (v === 1 ? "off" : number(v)), rank: same},
  {key: "temperature", short: "t", label: "temperature", flag: "--temperature", isNumber: true, show: number, rank: same},
  {key: "cond_scale", short: "c", label: "cond scale", flag: "--cond-scale", isNumber: true, show: number, rank: same},
  {key: "sc_prompt", short: "sc", label: "unconditional prompt", flag: "--sc-prompts", rank: same,
   show: (v, source) => cut(source.scPrompts.get(v) ?? "none", 200)},
  {key: "extra_settings", short: "x", label: "more settings", rank: same, show: (v) => cut(v || "none", 200)},
  {key: "model", short: "m", label: "model", rank: same,
   show: (v, source) => (source.models[v] === "" ? "the one that ships" : cut(source.models[v] ?? "unknown", 80))},
  {key: "archive", short: "a", label: "archive", rank: same, show: (v, source) => cut(source.archives[v] ?? "", 80)},
];
/** What a grid can also have as rows and columns. */
export const PROMPT_AXIS = {key: "prompt", short: "prompt", label: "prompt", rank: same};
export const SEED_AXIS = {key: "seed", short: "seed", label: "seed", rank: same, show: (v) => `#${v + 1}`};
/** All of AXES together, for scores and strengths: a value is an object with theirs. */
export const SETTING = {key: "setting", label: "each setting"};
export const GRID_AXES = [...AXES, PROMPT_AXIS, SEED_AXIS];
export const axisOf = (key) => GRID_AXES.find((axis) => axis.key === key) ?? null;

const order = (axis, value) => (value === null ? Infinity : axis.rank(value));

function compareValues(axis) {
  return (a, b) => {
    const [x, y] = [order(axis, a), order(axis, b)];
    return x === y ? 0 : x < y ? -1 : 1;
  };
}

const valuesByGroups = new WeakMap(); // groups -> values by axis, which are asked for often

/** The values of an axis that these groups have, in their order. */
export function axisValues(groups, axis) {
  if (!valuesByGroups.has(groups)) valuesByGroups.set(groups, new Map());
  const known = valuesByGroups.get(groups);
  if (!known.has(axis)) {
    known.set(axis, sortValues(axis, groups.map((group) => group.values[axis.key])));
  }
  return known.get(axis);
}

/** Different values of an axis, in their order. */
export const sortValues = (axis, values) => [...new Set(values)].sort(compareValues(axis));

/** Settings in words. */
export const describeSettings = (values, axes, source) => (
  axes.map((axis) => `${axis.label} ${axis.show(values[axis.key], source)}`).join(", ") || "the only one");

/** A text that is the same for equal settings of these axes. */
export const settingsKey = (values, axes = AXES) => JSON.stringify(axes.map((axis) => values[axis.key]));

/**
 * The group nearest to `wanted` (values of some axes): first by `moved`, the axis that must keep its value, then by how
 * many axes differ, then by how far, then by mean score. Null where there are no groups.
 */
export function nearestGroup(groups, wanted, moved = null) {
  const axes = AXES.filter((axis) => wanted[axis.key] !== undefined);
  const values = new Map(axes.map((axis) => [axis, axisValues(groups, axis)]));
  // Where a value stands among those of its axis; one that is not there stands between its neighbours.
  const place = (axis, value) => {
    const own = values.get(axis);
    if (own.includes(value)) return own.indexOf(value);
    const after = own.findIndex((v) => order(axis, v) >= order(axis, value));
    if (after <= 0) return after < 0 ? own.length : -1;
    const [low, high] = [order(axis, own[after - 1]), order(axis, own[after])];
    return after - 1 + (axis.isNumber && high < Infinity ? (order(axis, value) - low) / (high - low) : .25);
  };
  let best = null, bestDistance = Infinity;
  for (const group of groups) {
    let distance = 0;
    for (const axis of axes) {
      const [own, value] = [group.values[axis.key], wanted[axis.key]];
      if (own === value) continue;
      distance += (axis === moved ? 1e9 : 1e4) + Math.abs(place(axis, own) - place(axis, value));
    }
    if (distance < bestDistance || (distance === bestDistance && (group.mean ?? -Infinity) > (best.mean ?? -Infinity))) {
      best = group;
      bestDistance = distance;
    }
  }
  return best;
}

/** Describe how `group` differs from `wanted`; empty if it does not. */
export function describeChanges(wanted, group, source) {
  const changed = AXES.filter(({key}) => wanted[key] !== undefined && group.values[key] !== wanted[key]);
  if (!changed.length) return "";
  const texts = changed.map((axis) => `${axis.label} ${axis.show(group.values[axis.key], source)}`);
  return `No images with exactly these settings; nearest: ${texts.join(", ")}.`;
}

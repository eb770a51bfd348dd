// Scores: means with their intervals, histograms, strengths from judged pairs, and the colours of a heat map.

export const BINS = 24;
const Z = 1.96; // of a normal 95% interval

/** Mean and standard deviation of n numbers from their sum and the sum of their squares; null where there are none. */
export function moments(n, sum, squares) {
  if (!n) return {mean: null, sd: null};
  const mean = sum / n;
  return {mean, sd: n > 1 ? Math.sqrt(Math.max(0, (squares - n * mean * mean) / (n - 1))) : null};
}

export function histogram(scores, [low, high]) {
  const counts = new Array(BINS).fill(0);
  const scale = high > low ? BINS / (high - low) : 0;
  for (const score of scores) counts[Math.min(BINS - 1, Math.floor((score - low) * scale))] += 1;
  return counts;
}

/** Normal 95% interval of a mean, null where one number says nothing of the spread. */
export function interval({n, mean, sd}) {
  if (n < 2 || sd === null) return null;
  const half = Z * sd / Math.sqrt(n);
  return [mean - half, mean + half];
}

/** Add to each value the differences of its scores to those of the best, over blocks that both have; drop `sample`. */
export function differencesToBest(found) {
  if (!found.length) return found;
  const best = found.reduce((a, b) => (b.mean > a.mean ? b : a));
  const scores = new Map(best.sample.blocks.map((block, i) => [block, best.sample.scores[i]]));
  return found.map(({sample, ...value}) => {
    let n = 0, sum = 0, squares = 0;
    sample.blocks.forEach((block, i) => {
      const other = scores.get(block);
      if (other === undefined) return;
      n += 1;
      sum += sample.scores[i] - other;
      squares += (sample.scores[i] - other) ** 2;
    });
    const isPaired = value.value !== best.value && n > 1;
    return {...value, difference: isPaired ? {n, ...moments(n, sum, squares)} : null};
  });
}

/** What the difference of a value to the best one says, in words; paired images tell more than two means. */
export function verdict(value, best) {
  if (value === best) return "best";
  const found = value.difference ?? unpaired(value, best);
  const range = found && interval(found);
  if (!range) return "too few to say";
  const text = `${signed(found.mean)} [${signed(range[0])}, ${signed(range[1])}]`;
  return range[1] >= 0 ? `${text}: may be noise` : text;
}

function unpaired(value, best) {
  if (value.sd === null || best.sd === null) return null;
  const variance = value.sd ** 2 / value.n + best.sd ** 2 / best.n;
  return {n: 2, mean: value.mean - best.mean, sd: Math.sqrt(2 * variance)};
}

const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);

/**
 * Bradley-Terry strengths from pairs [[winner, loser, weight], ...] (a tie is half a win for each), as logarithms with
 * mean 0 and their standard errors: Map of item to {strength, error, pairs}. Each item also draws once with an average one,
 * so that one who won all is not infinitely strong.
 */
export function strengths(pairs) {
  const items = [...new Set(pairs.flatMap(([a, b]) => [a, b]))];
  const position = new Map(items.map((item, i) => [item, i]));
  const wins = items.map(() => .5), met = items.map(() => new Map()), counts = items.map(() => 0);
  for (const [winner, loser, weight] of pairs) {
    const [w, l] = [position.get(winner), position.get(loser)];
    wins[w] += weight;
    counts[w] += weight;
    counts[l] += weight;
    for (const [a, b] of [[w, l], [l, w]]) met[a].set(b, (met[a].get(b) ?? 0) + weight);
  }
  let p = items.map(() => 1);
  for (let step = 0; step < 200; step += 1) {
    p = p.map((own, i) => wins[i] / [...met[i]].reduce((sum, [j, n]) => sum + n / (own + p[j]), 1 / (own + 1)));
  }
  const mean = p.reduce((sum, own) => sum + Math.log(own), 0) / (p.length || 1);
  return new Map(items.map((item, i) => {
    const share = (own, other) => own * other / (own + other) ** 2;
    const information = [...met[i]].reduce((sum, [j, n]) => sum + n * share(p[i], p[j]), share(p[i], 1));
    return [item, {strength: Math.log(p[i]) - mean, error: 1 / Math.sqrt(information), pairs: counts[i]}];
  }));
}

// Dark blue to yellow, readable for colour-blind eyes and in grey.
const HEAT = [[38, 42, 110], [43, 103, 146], [46, 158, 138], [132, 205, 95], [250, 225, 70]];

/** Colour of a score in a range, and the colour of text on it. */
export function heat(score, range) {
  if (score === null || !range) return {fill: "transparent", text: "inherit"};
  const at = range[1] > range[0] ? (score - range[0]) / (range[1] - range[0]) : 1;
  const x = Math.min(1, Math.max(0, at)) * (HEAT.length - 1), i = Math.min(HEAT.length - 2, Math.floor(x));
  const mix = HEAT[i].map((c, k) => Math.round(c + (HEAT[i + 1][k] - c) * (x - i)));
  return {fill: `rgb(${mix.join(" ")})`, text: x > 2.1 ? "#14161a" : "#ffffff"};
}

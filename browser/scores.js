// Scores: means with their intervals, histograms, strengths from judged pairs, and the colours of a heat map.

export const BINS = 24;
const MAX_STEPS = 100;
export const Z = 1.959963984540054; // of a normal 95% interval

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
 * so that one who won all is not infinitely strong. As `ratings --rank` does it: Newton's method, and errors from the
 * whole inverse Hessian.
 */
export function strengths(pairs) {
  const items = [...new Set(pairs.flatMap(([a, b]) => [a, b]))], n = items.length;
  const position = new Map(items.map((item, i) => [item, i]));
  const won = items.map(() => new Float64Array(n)), counts = items.map(() => 0);
  for (const [winner, loser, weight] of pairs) {
    const [w, l] = [position.get(winner), position.get(loser)];
    won[w][l] += weight;
    counts[w] += weight;
    counts[l] += weight;
  }
  let t = items.map(() => 0), covariance = [];
  for (let step = 0; step < MAX_STEPS; step += 1) {
    const {gradient, hessian} = slope(t, won);
    covariance = inverse(hessian);
    const move = covariance.map((row) => row.reduce((sum, value, j) => sum + value * gradient[j], 0));
    const before = posterior(t, won);
    let part = 1, next = t.map((value, i) => value + move[i]);
    while (posterior(next, won) < before && part > 1e-9) {
      part /= 2;
      next = t.map((value, i) => value + part * move[i]);
    }
    if (part <= 1e-9) break;
    t = next;
    if (Math.max(...move.map(Math.abs)) < 1e-10) break;
  }
  const mean = t.reduce((sum, value) => sum + value, 0) / (n || 1);
  const sums = covariance.map((row) => row.reduce((sum, value) => sum + value, 0));
  const total = sums.reduce((sum, value) => sum + value, 0);
  return new Map(items.map((item, i) => {
    // Of t_i minus the mean.
    const variance = covariance[i][i] - 2 * sums[i] / n + total / n ** 2;
    return [item, {strength: t[i] - mean, error: Math.sqrt(Math.max(variance, 0)), pairs: counts[i]}];
  }));
}

const sigmoid = (x) => (1 + Math.tanh(x / 2)) / 2;
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

function posterior(t, won) {
  let sum = 0;
  for (const [i, row] of won.entries()) {
    row.forEach((wins, j) => { if (wins) sum -= wins * softplus(t[j] - t[i]); });
    sum -= (softplus(t[i]) + softplus(-t[i])) / 2;
  }
  return sum;
}

function slope(t, won) {
  const own = t.map(sigmoid), gradient = own.map((p) => .5 - p);
  const hessian = own.map((p, i) => { const row = new Float64Array(t.length); row[i] = p * (1 - p); return row; });
  for (let i = 0; i < t.length; i += 1) {
    for (let j = 0; j < t.length; j += 1) {
      const met = won[i][j] + won[j][i];
      if (!met || i === j) continue;
      const chance = sigmoid(t[i] - t[j]), information = met * chance * (1 - chance);
      gradient[i] += won[i][j] - met * chance;
      hessian[i][i] += information;
      hessian[i][j] -= information;
    }
  }
  return {gradient, hessian};
}

/** The inverse of a positive definite matrix, by Gauss and Jordan. */
function inverse(matrix) {
  const n = matrix.length, left = matrix.map((row) => Float64Array.from(row));
  const right = left.map((_, i) => { const row = new Float64Array(n); row[i] = 1; return row; });
  for (let k = 0; k < n; k += 1) {
    const pivot = left[k][k];
    for (let j = 0; j < n; j += 1) { left[k][j] /= pivot; right[k][j] /= pivot; }
    for (let i = 0; i < n; i += 1) {
      const factor = left[i][k];
      if (i === k || !factor) continue;
      for (let j = 0; j < n; j += 1) { left[i][j] -= factor * left[k][j]; right[i][j] -= factor * right[k][j]; }
    }
  }
  return right.map((row) => [...row]);
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

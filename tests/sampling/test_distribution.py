"""Draws follow the exact filtered distribution, by chi-square."""

import math

import numpy as np
import pytest
from sampling_kit import reference_distribution, sample_tokens

from dm_generations.sampling import logits as sampling
from dm_generations.sampling.prng import row_key


def chi_square_tail(statistic, freedom):
    """The probability that chi-square with `freedom` degrees exceeds `statistic`.

    The regularised upper incomplete gamma function Q(freedom / 2, statistic / 2) by its recurrence
    Q(a + 1, x) = Q(a, x) + x^a e^-x / Gamma(a + 1), from Q(1, x) = e^-x or Q(1/2, x) = erfc(sqrt(x)).
    """
    x = statistic / 2
    a, tail = (0.5, math.erfc(math.sqrt(x))) if freedom % 2 else (1.0, math.exp(-x))
    while a < freedom / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1)) if x > 0 else 0.0
        a += 1
    return tail


def p_value(tokens, distribution):
    """The p-value of `tokens` (n,) as samples of `distribution` (V,); 0 if one of them cannot be sampled."""
    observed = np.bincount(tokens, minlength=len(distribution))
    if observed[distribution == 0].any():
        return 0.0
    order = np.argsort(distribution)
    expected, observed = distribution[order] * len(tokens), observed[order]
    # Cells from the rarest on, each as many tokens as it takes to expect 5: fewer are not near a normal number.
    cells, open_cell = [], np.zeros(2)
    for pair in np.stack([expected, observed], axis=1):
        open_cell = open_cell + pair
        if open_cell[0] >= 5:
            cells.append(open_cell)
            open_cell = np.zeros(2)
    cells[-1] = cells[-1] + open_cell
    expected, observed = np.transpose(cells)
    if len(cells) == 1:
        return 1.0
    return chi_square_tail(((observed - expected) ** 2 / expected).sum(), len(cells) - 1)


@pytest.mark.parametrize(
    ("freedom", "statistic", "tail"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.4
    [
        (1, 3.841, 0.05),
        (1, 6.635, 0.01),
        (2, 13.816, 0.001),
        (10, 18.307, 0.05),
        (59, 98.324, 0.001),
        (100, 77.929, 0.95),
    ],
)
def test_chi_square_tail_is_that_of_tables(freedom, statistic, tail):
    assert chi_square_tail(statistic, freedom) == pytest.approx(tail, rel=2e-3)


def distribution_case(number):
    """Logits (64,) and settings over wide ranges, whose exact distribution does not hang on a rounding error."""
    random = np.random.default_rng([8, number])
    while True:
        logits = (random.normal(size=64) * random.uniform(0.3, 3)).astype(np.float32)
        top_k = 0 if random.random() < 0.3 else int(80 ** random.random())
        top_p = 1.0 if random.random() < 0.3 else float(np.float32(random.uniform(0.02, 1)))
        temperature = float(np.float32(10 ** random.uniform(-1, 1)))
        case = logits, top_k, top_p, temperature, sampling.ORDERS[number % 2]
        nearby = [reference_distribution(*case[:2], top_p + error, *case[3:]) > 0 for error in (-1e-5, 1e-5)]
        if top_p == 1 or (nearby[0] == nearby[1]).all():
            return case


def sample_many(number, sample_count, row_count=1 << 14):
    """(sample_count,) tokens of a case, with keys that are all different, at as many steps as it takes."""
    logits, top_k, top_p, temperature, order = distribution_case(number)
    settings = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "order": order}
    keys = np.array([row_key(number, index) for index in range(row_count)], np.uint32)
    tokens = [sample_tokens(logits, keys, step, **settings) for step in range(-(-sample_count // row_count))]
    return np.concatenate(tokens)[:sample_count]


@pytest.mark.e2e
@pytest.mark.parametrize("number", range(4))
def test_samples_follow_the_filtered_distribution(number):
    """Chi-square of 65,536 samples. 1e-3 in all, over 4 tests."""
    assert p_value(sample_many(number, 1 << 16), reference_distribution(*distribution_case(number))) > 1e-3 / 4


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_a_million_samples_follow_the_filtered_distribution(number):
    """1e-3 in all, over 50 tests."""
    assert p_value(sample_many(number, 10**6), reference_distribution(*distribution_case(number))) > 1e-3 / 50


@pytest.mark.e2e
def test_a_wrong_distribution_does_not_pass():
    number = next(number for number in range(50) if distribution_case(number)[1] > 8 and number % 2 == 0)
    tokens, case = sample_many(number, 1 << 16), distribution_case(number)
    logits, top_k, top_p, temperature, order = case
    right = reference_distribution(*case)
    assert p_value(tokens, right) > 1e-3
    assert p_value(tokens, reference_distribution(logits, top_k, top_p, temperature * 1.1, order)) < 1e-6
    assert p_value(tokens, reference_distribution(logits, np.count_nonzero(right) - 1, 1.0, temperature, order)) == 0
    assert p_value(tokens, reference_distribution(logits, np.count_nonzero(right) + 1, 1.0, temperature, order)) < 1e-6
    shifted = right.copy()
    best, second = np.argsort(-right)[:2]
    shifted[[best, second]] += np.array([-0.02, 0.02])
    assert p_value(tokens, shifted) < 1e-6


@pytest.mark.e2e
def test_rows_of_one_batch_follow_their_own_distributions():
    random = np.random.default_rng(0)
    per_setting, code_count = 1 << 14, 12
    axes = [(0, 1.0, 1.0), (5, 1.0, 1.0), (0, 0.8, 1.0), (7, 0.9, 1.5)]
    axes += [(0, 1.0, 3.0), (12, 0.5, 0.7), (1, 1.0, 1.0), (40, 0.97, 0.5)]
    rows = [random.normal(size=code_count).astype(np.float32) * 1.5 for _ in axes]
    keys = random.integers(0, 2**32, (len(axes) * per_setting, 2), dtype=np.uint32)
    columns = [np.repeat(np.array(column), per_setting) for column in zip(*axes, strict=True)]
    names = ("top_k", "top_p", "temperature")
    tokens = sample_tokens(np.repeat(rows, per_setting, axis=0), keys, **dict(zip(names, columns, strict=True)))
    for index, (logits, setting) in enumerate(zip(rows, axes, strict=True)):
        sampled = tokens[index * per_setting : (index + 1) * per_setting]
        assert p_value(sampled, reference_distribution(logits, *setting)) > 1e-3 / len(axes), setting

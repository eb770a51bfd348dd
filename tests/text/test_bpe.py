"""Merging pairs by rank."""

import random

from dm_generations.text.bpe import byte_alphabet, merge, rules_of


def naive(pieces, rules):
    """One merge at a time, the first of the lowest rank."""
    pieces = list(pieces)
    while True:
        found = [(rules[pair][0], at) for at, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in rules]
        if not found:
            return pieces
        _, at = min(found)
        pieces[at : at + 2] = [rules[pieces[at], pieces[at + 1]][1]]


def test_lowest_rank_first_then_leftmost():
    rules = rules_of([("b", "c"), ("a", "b"), ("a", "a"), ("aa", "bc")])
    assert merge("aabc", rules) == ["aabc"]
    assert merge("ab", rules) == ["ab"]
    assert merge("aaa", rules) == ["aa", "a"]
    assert merge("", rules) == [] and merge("a", rules) == ["a"]


def test_merging_equals_the_definition_for_any_rules():
    draw = random.Random(0)
    for _ in range(300):
        pieces = ["a", "b", "c", "ab", "bc", "aa", "abc"]
        rules = rules_of([(draw.choice(pieces), draw.choice(pieces)) for _ in range(12)])
        word = "".join(draw.choices("abc", k=draw.randrange(20)))
        assert merge(word, rules) == naive(word, rules)


def test_whole_passes_finish_a_rank_before_the_next():
    rules = {("c", "a"): (5, "ca"), ("ca", "c"): (1, "cac")}
    assert merge("caca", rules) == ["cac", "a"]
    assert merge("caca", rules, whole_passes=True) == ["ca", "ca"]


def test_a_long_word_takes_no_quadratic_time():
    rules = rules_of([("x", "x"), ("xx", "xx")])
    assert merge("x" * 40_001, rules) == ["xxxx"] * 10_000 + ["x"]


def test_byte_alphabet_is_that_of_gpt2():
    alphabet = byte_alphabet()
    assert (alphabet[ord("A")], alphabet[ord(" ")], alphabet[0], alphabet[ord("\n")]) == ("A", "Ġ", "Ā", "Ċ")
    assert len(set(alphabet)) == 256

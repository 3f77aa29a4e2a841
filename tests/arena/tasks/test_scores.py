"""BLEU and chrF against counts made by hand."""

import math

import pytest

from maclin.arena.scores import bleu, chrf
from maclin.core.errors import InputError


def test_a_perfect_translation_scores_100_and_a_foreign_one_nothing() -> None:
    right = ["the cat sat on the mat", "it is late, isn't it?"]
    assert bleu(right, right) == pytest.approx(100)
    assert chrf(right, right) == pytest.approx(100)
    assert bleu(["x y z w v"], ["a b c d e"]) == 0
    assert chrf(["xyz"], ["abc"]) == 0
    assert bleu([""], ["a b"]) == 0


def test_bleu_by_hand() -> None:
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 threes, and 0 of 3 fours, which count as a half
    value = bleu(["the cat sat on a mat"], ["the cat lay on a mat"])
    assert value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)


def test_bleu_clips_and_punishes_what_is_short() -> None:
    # "the" is in the reference twice, so two of its seven count; no pair at all matches
    assert bleu(["the the the the the the the"], ["the cat is on the mat"]) == pytest.approx(
        100 * (2 / 7 * 0.5 / 6 * 0.25 / 5 * 0.125 / 4) ** 0.25
    )
    assert bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(100 * math.exp(1 - 8 / 4))


def test_bleu_is_of_the_corpus_and_not_the_mean_of_sentences() -> None:
    outputs, references = ["a b c d", "x y z w"], ["a b c d", "p q r s"]
    assert bleu(outputs, references) == pytest.approx(100 * (4 / 8 * 3 / 6 * 2 / 4 * 1 / 2) ** 0.25)


def test_chrf_by_hand() -> None:
    # order 1: a b d in common, 3 of 4 either way; order 2: ab, of three either way; orders 3 and 4: none
    value = chrf(["abde"], ["abcd"])
    precision = (3 / 4 + 1 / 3 + 0 + 0) / 4
    assert value == pytest.approx(100 * 5 * precision * precision / (4 * precision + precision))


def test_another_program_gives_the_same() -> None:
    # sacrebleu 2, corpus_bleu and corpus_chrf as they are by default
    outputs = ["the quick fox jumps over a dog", "save file as", "no such page"]
    references = ["the quick brown fox jumps over the lazy dog", "save the file as", "no such page was found here"]
    assert bleu(outputs, references) == pytest.approx(23.638187389945287)
    assert chrf(outputs, references) == pytest.approx(50.73795611205447)


def test_recall_weighs_more_than_precision() -> None:
    assert chrf(["abcdefgh"], ["abcd"]) > chrf(["abcd"], ["abcdefgh"])


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="as many"):
        bleu(["a"], [])
    with pytest.raises(InputError, match="as many"):
        chrf([], [])

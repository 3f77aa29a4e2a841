"""The answers of associative recall are in the sequence, and nowhere else."""

import numpy as np
import pytest

from maclin.arena.task import NOT_JUDGED
from maclin.arena.tasks import task
from maclin.core.errors import OptionError


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (512, 32), (4_096, 256)])
def test_every_question_is_answered_by_the_list(length: int, pairs: int) -> None:
    splits = task("recall", length=length, pairs=pairs).load("quick")
    vocab = 128 if pairs < 64 else 1_024
    for i in range(5):
        example = splits.train[i]
        x, y = np.asarray(example["x"]), np.asarray(example["y"])
        assert len(x) == len(y) == length
        known = dict(zip(x[0 : 2 * pairs : 2].tolist(), x[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(known) == len(set(known.values())) == pairs
        judged = np.flatnonzero(y != NOT_JUDGED)
        assert len(judged) == pairs
        assert judged.min() >= 2 * pairs
        # each key is asked for once, and its value is what follows it in the list
        assert sorted(x[judged].tolist()) == sorted(known)
        assert [known[key] for key in x[judged].tolist()] == y[judged].tolist()
        half = vocab // 2
        assert max(known) < half <= min(known.values())
        assert x.min() >= 1
        assert x.max() < vocab


def test_an_example_is_the_same_whenever_it_is_asked_for() -> None:
    first, again, other = (task("recall").load("quick", seed=seed) for seed in (0, 0, 1))
    x = np.asarray(first.train[7]["x"])
    assert np.array_equal(x, np.asarray(again.train[7]["x"]))
    for different in (other.train[7], first.valid[7], first.test[7], first.train[8]):
        assert not np.array_equal(x, np.asarray(different["x"]))
    with pytest.raises(IndexError):
        first.train[len(first.train)]


def test_questions_come_soon_after_the_list() -> None:
    splits = task("recall", length=256, pairs=4).load("quick")
    places = np.concatenate([np.flatnonzero(np.asarray(splits.train[i]["y"]) != NOT_JUDGED) for i in range(300)])
    slot = (places - 8) // 2
    # a draw of 4 without replacement from p(x) ~ x^-0.99 begins with x = 1 more often than any other
    counts = np.bincount(slot, minlength=124)
    assert counts[0] == counts.max()
    assert counts[:10].sum() > 3 * counts[60:70].sum()
    # the share of the first place, by simulation of the draw one by one
    rng, weight = np.random.default_rng(0), np.arange(1.0, 125) ** -0.99
    hits = [0 in rng.choice(124, 4, replace=False, p=weight / weight.sum()) for _ in range(3_000)]
    assert abs(counts[0] / 300 - np.mean(hits)) < 0.12


def test_sizes_that_do_not_fit_are_refused() -> None:
    for options in ({"length": 64, "pairs": 17}, {"pairs": 0}, {"length": 64, "pairs": 16, "vocab_size": 32}):
        with pytest.raises(OptionError, match="pairs"):
            task("recall", **options).load("quick")

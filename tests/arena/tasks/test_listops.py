"""The generator against an evaluator that shares no code with it, and against the published rules."""

import numpy as np
import pytest

from maclin.arena.task import Preset, collate
from maclin.arena.tasks import task
from maclin.arena.tasks.listops import TOKENS, generate
from maclin.core.errors import OptionError


def read(tokens: list[str]) -> tuple[object, int]:
    """A nested tuple (operator, arguments...) or a digit, and how deep it is; from the written form."""
    stack: list[list[object]] = [[]]
    deepest = 0
    for token in tokens:
        if token.startswith("["):
            stack.append([token[1:]])
            deepest = max(deepest, len(stack) - 1)
        elif token == "]":
            done = tuple(stack.pop())
            stack[-1].append(done)
        else:
            stack[-1].append(int(token))
    assert len(stack) == 1
    assert len(stack[0]) == 1
    return stack[0][0], deepest


def value(tree: object) -> int:
    if isinstance(tree, int):
        return tree
    assert isinstance(tree, tuple)
    operator, *arguments = tree
    numbers = np.array([value(argument) for argument in arguments])
    result = {"MAX": np.max, "MIN": np.min, "MED": np.median, "SM": lambda x: np.sum(x) % 10}[str(operator)](numbers)
    return int(result)


def arguments(tree: object) -> list[int]:
    if isinstance(tree, int):
        return []
    assert isinstance(tree, tuple)
    return [len(tree) - 1, *(count for part in tree[1:] for count in arguments(part))]


def check(number: int, low: int, high: int) -> dict[str, np.ndarray]:
    made = generate(number, low, high, seed=3)
    ends, labels = made["ends"], made["labels"]
    starts = np.concatenate([[0], ends[:-1]])
    seen = set()
    counts: list[int] = []
    for start, end, label in zip(starts, ends, labels, strict=True):
        assert low < end - start < high
        tree, depth = read([TOKENS[i] for i in made["tokens"][start:end]])
        assert value(tree) == label
        # the root is at depth 1 and everything at depth 10 is a digit, so operators nest 9 deep at most
        assert 1 <= depth <= 9
        seen.add(made["tokens"][start:end].tobytes())
        counts += arguments(tree)
    assert len(seen) == number
    assert (min(counts), max(counts)) == (2, 10)
    return made


def test_labels_agree_with_an_independent_evaluator() -> None:
    check(300, 20, 200)


@pytest.mark.slow
def test_ten_thousand_of_the_published_size() -> None:
    made = check(10_000, 500, 2_000)
    lengths = np.diff(made["ends"], prepend=0)
    assert 900 < np.median(lengths) < 1_100
    shares = np.bincount(made["labels"], minlength=10) / 10_000
    # MAX and MIN make 9 and 0 the commonest, and all others come up
    assert sorted(np.argsort(shares)[-2:]) == [0, 9]
    assert 0.14 < shares[0] < 0.18
    assert 0.14 < shares[9] < 0.18
    assert shares[1:9].min() > 0.06


def test_operators_and_digits_have_the_published_shares() -> None:
    made = generate(2_000, 0, 400, seed=0)
    names = np.array(TOKENS)[made["tokens"]]
    opened = {name: (names == name).mean() for name in ("[MAX", "[MIN", "[MED", "[SM")}
    assert max(opened.values()) < 1.1 * min(opened.values())
    digits = np.array([(names == str(digit)).mean() for digit in range(10)])
    assert digits.max() < 1.1 * digits.min()


def test_the_same_seed_gives_the_same_expressions_and_another_does_not() -> None:
    first, again, other = (generate(50, 10, 80, seed)["tokens"].tobytes() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_share_no_expression() -> None:
    made = task("listops")
    made.presets = {"quick": Preset(60, 200, 40, 50)}
    splits = made.load("quick")
    parts = [
        {np.asarray(part[i]["x"]).tobytes() for i in range(len(part))}
        for part in (splits.train, splits.valid, splits.test)
    ]
    assert [len(part) for part in parts] == [200, 40, 50]
    assert len(set.union(*parts)) == 290
    batch = collate(made, [splits.train[0], splits.train[1]])
    assert batch["x"][batch["mask"]].min() >= 1
    assert batch["x"].max() < len(TOKENS)
    assert any("shorter" in note for note in splits.notes)


def test_a_pressing_length_is_refused() -> None:
    with pytest.raises(OptionError, match="min_length"):
        task("listops", min_length=100, max_length=100).load("quick")

"""The solver and the assignment of heads, against trying everything."""

import itertools
import random

import pytest

from maclin.adopt.planning.heads import MOST_PARTS, Part, assignments
from maclin.adopt.planning.knapsack import Choice, solve


def layers(number: int, options: int, seed: int) -> list[list[Choice]]:
    """The first option of each layer is exact; costs of some are alike, as those of layers of one size are."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        others = [
            Choice(draw.choice([draw.uniform(0.1, 1.2), 0.25, 0.5]), draw.uniform(0, 1) ** 2, draw.random() < 0.6, True)
            for _ in range(options - 1)
        ]
        found.append([Choice(1.0, 0.0), *others])
    return found


def everything(given: list[list[Choice]], least_linear: int, most_changed: int | None) -> list[tuple[float, float]]:
    """What no other combination beats, ascending in cost."""
    points = []
    for picks in itertools.product(*given):
        if sum(c.linear for c in picks) < least_linear:
            continue
        if most_changed is not None and sum(c.changed for c in picks) > most_changed:
            continue
        points.append((sum(c.cost for c in picks), sum(c.error for c in picks)))
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1] - 1e-12:
            best.append((cost, error))
    return best


@pytest.mark.parametrize(
    ("least_linear", "most_changed"), [(0, None), (2, None), (5, None), (0, 0), (0, 3), (2, 3), (4, 3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_it_finds_what_trying_everything_finds(seed: int, least_linear: int, most_changed: int | None) -> None:
    given = layers(5, 5, seed)
    solved = solve(given, least_linear, most_changed)
    wanted = everything(given, least_linear, most_changed)
    assert solved.exact
    assert [s.cost for s in solved.found] == pytest.approx([cost for cost, _ in wanted])
    assert [s.error for s in solved.found] == pytest.approx([error for _, error in wanted])
    for solution in solved.found:
        picked = [options[pick] for options, pick in zip(given, solution.picks, strict=True)]
        assert sum(c.cost for c in picked) == pytest.approx(solution.cost)
        assert sum(c.error for c in picked) == pytest.approx(solution.error)
        assert sum(c.linear for c in picked) >= least_linear
        assert sum(c.changed for c in picked) <= (5 if most_changed is None else most_changed)


def test_counts_that_cannot_be_met_have_no_solution() -> None:
    assert solve([[Choice(1.0, 0.0)], [Choice(1.0, 0.0), Choice(0.5, 0.1, True, True)]], least_linear=2).found == []


def test_few_states_miss_the_best_by_a_step_of_cost_for_each_layer_at_most() -> None:
    given = layers(14, 6, 7)
    exact, rough = solve(given, most_states=1 << 22), solve(given, most_states=64)
    assert exact.exact
    assert not rough.exact
    assert max(len(exact.found), 64) > 64
    step = 14 * (exact.found[-1].cost - 14 * 0.1) / 64
    for solution in exact.found:
        near = [s.error for s in rough.found if s.cost <= solution.cost + step]
        assert min(near) <= solution.error + 1e-12


def parts(number: int, units: int, seed: int) -> list[Part]:
    draw = random.Random(seed)
    exact = Part(0.01, 1.0, (0.0,) * units)
    return [
        exact,
        *(
            Part(draw.uniform(0, 0.3), draw.uniform(0.1, 0.6), tuple(draw.uniform(0, 1) for _ in range(units)))
            for _ in range(number - 1)
        ),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_heads_get_what_trying_everything_finds(seed: int) -> None:
    given, units, apart = parts(4, 5, seed), 5, 0.05
    found = assignments(given, apart)
    points = []
    for picks in itertools.product(range(4), repeat=units):
        used = set(picks)
        if 2 <= len(used) <= MOST_PARTS:
            cost = apart + sum(given[i].fixed for i in used) + sum(given[i].each for i in picks)
            points.append((round(cost, 12), sum(given[i].errors[unit] for unit, i in enumerate(picks))))
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1] - 1e-12:
            best.append((cost, error))
    assert [a.cost for a in found] == pytest.approx([cost for cost, _ in best])
    assert [a.error for a in found] == pytest.approx([error for _, error in best])
    for a in found:
        assert sum(given[i].errors[unit] for unit, i in enumerate(a.parts)) == pytest.approx(a.error)
        used = sum(given[i].fixed for i in set(a.parts)) + sum(given[i].each for i in a.parts)
        assert used + apart == pytest.approx(a.cost)


def test_one_head_or_one_part_is_no_choice() -> None:
    assert assignments(parts(3, 1, 0)) == []
    assert assignments(parts(1, 4, 0)) == []
    assert assignments([]) == []


def test_a_head_that_nothing_follows_stays_exact() -> None:
    easy = Part(0.0, 0.1, (0.01, 0.01, 0.9, 0.01))
    found = assignments([Part(0.0, 1.0, (0.0,) * 4), easy])
    assert found[-1].parts.count(1) == 1
    cheap = next(a for a in found if a.error <= 0.03 + 1e-9)
    assert cheap.parts == (1, 1, 0, 1)

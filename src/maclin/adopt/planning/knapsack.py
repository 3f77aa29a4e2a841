"""The multiple-choice knapsack behind a plan: one option for each layer, cost and error added up over the layers.

Layer by layer every combination is formed that no other beats in cost and error both (Nemhauser & Ullmann 1969), which
gives the best plan for every budget at once. That is exact until a step holds more than ``MOST_STATES`` combinations;
then only the most accurate of each of as many equal steps of cost is kept, which shifts a budget by at most one such
step for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_STATES = 8192

ROUNDING = 1e-12
"""Of errors: a smaller difference is none."""


class Choice(NamedTuple):
    """One option of one layer.

    Args:
        cost: adds up over the layers.
        error: adds up over the layers: a weighted squared error.
        linear: whether the layer is then of linear cost.
        changed: whether the layer does not stay as it is.
    """

    cost: float
    error: float
    linear: bool = False
    changed: bool = False


class Solution(NamedTuple):
    """One of the combinations that no other beats: its cost, its error, and the option of each layer."""

    cost: float
    error: float
    picks: tuple[int, ...]


class Solutions(NamedTuple):
    """Ascending in cost, and so descending in error; ``exact`` is False where combinations were left out."""

    found: list[Solution]
    exact: bool


def solve(
    layers: Sequence[Sequence[Choice]],
    least_linear: int = 0,
    most_changed: int | None = None,
    most_states: int = MOST_STATES,
) -> Solutions:
    """All combinations that no other beats in cost and error both.

    Args:
        layers: the options of each layer, at least one.
        least_linear: layers that have to be of linear cost.
        most_changed: layers that may be changed; None is all.
        most_states: combinations that are kept at each layer.

    Returns:
        None at all where the counts cannot be met.
    """
    state = _State(*(np.zeros(1) for _ in range(2)), *(np.zeros(1, dtype=np.int64) for _ in range(2)))
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    exact = True
    for options in layers:
        grown, parents, picks = state.with_layer(options, least_linear, most_changed)
        keep = grown.unbeaten()
        if len(keep) > most_states:
            keep, exact = keep[grown.only(keep).thinned(most_states)], False
        steps.append((parents[keep], picks[keep]))
        state = grown.only(keep)
    enough = np.flatnonzero(state.linear >= least_linear)
    none = np.zeros(len(enough), dtype=np.int64)  # from here on the counts do not matter
    enough = enough[_State(state.cost[enough], state.error[enough], none, none).unbeaten()]
    return Solutions([_traced(int(i), state, steps) for i in enough], exact)


class _State(NamedTuple):
    """Combinations of the layers so far; the counts are 0 throughout where nobody asks for them."""

    cost: np.ndarray
    error: np.ndarray
    linear: np.ndarray
    changed: np.ndarray

    def with_layer(
        self, options: Sequence[Choice], least_linear: int, most_changed: int | None
    ) -> tuple[_State, np.ndarray, np.ndarray]:
        """Every combination with every option; from which combination, and which option it was."""
        parents = np.repeat(np.arange(len(self.cost)), len(options))
        picks = np.tile(np.arange(len(options)), len(self.cost))
        cost, error = (np.array([getattr(o, name) for o in options]) for name in ("cost", "error"))
        linear, changed = (np.array([int(getattr(o, name)) for o in options]) for name in ("linear", "changed"))
        grown = _State(
            self.cost[parents] + cost[picks],
            self.error[parents] + error[picks],
            np.minimum(self.linear[parents] + linear[picks], least_linear),
            self.changed[parents] + changed[picks] * (most_changed is not None),
        )
        if most_changed is not None:
            allowed = grown.changed <= most_changed
            return grown.only(allowed), parents[allowed], picks[allowed]
        return grown, parents, picks

    def only(self, keep: np.ndarray) -> _State:
        return _State(*(x[keep] for x in self))

    def unbeaten(self) -> np.ndarray:
        """Of those with the same counts: which no other beats in cost and error both, by counts and cost."""
        order = np.lexsort((self.error, self.cost, self.changed, self.linear))
        if not len(order):
            return order
        kinds = self.linear[order] * (int(self.changed.max()) + 1) + self.changed[order]
        kept: list[np.ndarray] = []
        starts = np.flatnonzero(np.diff(kinds, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            error = self.error[order[start:stop]]
            best = np.minimum.accumulate(np.concatenate([[np.inf], error[:-1]]))
            kept.append(order[start:stop][error < best - ROUNDING])
        return np.concatenate(kept)

    def thinned(self, most: int) -> np.ndarray:
        """The most accurate in each of ``most`` equal steps of cost, for each pair of counts; and the cheapest."""
        low, high = self.cost.min(), self.cost.max()
        cells = np.minimum((self.cost - low) / max(high - low, 1e-300) * most, most - 1).astype(np.int64)
        order = np.lexsort((self.error, cells, self.changed, self.linear))
        keys = np.stack([self.linear[order], self.changed[order], cells[order]])
        first = np.any(np.diff(keys, axis=1, prepend=-1) != 0, axis=0)
        return np.union1d(order[first], [int(np.argmin(self.cost))])


def _traced(index: int, state: _State, steps: Sequence[tuple[np.ndarray, np.ndarray]]) -> Solution:
    cost, error = float(state.cost[index]), float(state.error[index])
    picks: list[int] = []
    for parents, options in reversed(steps):
        picks.append(int(options[index]))
        index = int(parents[index])
    return Solution(cost, error, tuple(reversed(picks)))

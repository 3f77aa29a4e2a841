"""A mechanism per head: each group of heads has its own, and what no mechanism can follow stays exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, InputError, MaclinError, OptionError
from ..mechanisms.base import Mechanism, State
from .parts import mechanism, row

EXACT = "softmax"
"""What a head gets that is not named."""


class ByHead(Mechanism):
    """Every group of heads by a mechanism of its own: out[h] = mechanism_g(q[h], k[h], v[h]) for the h of group g.

    The heads of one key head best stay together: a group then reads each of its key heads once. Where they are split,
    each group reads the key head for itself; where a group holds unequal numbers of query heads of its key heads, some
    of these are repeated within the group, so that each serves equally many.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        heads: one entry for each head: a mechanism's name, or the pair of name and options. Or groups of them, as
            ``config`` holds them: {"heads": [0, 3], "mechanism": "window", "options": {"window": 32}}; together they
            name each head once. None is exact attention for all.
        generator: of what the parts draw; None is torch's own.

    Attributes:
        parts: the mechanisms, one for each group, in the order of their first heads.

    Raises:
        OptionError: heads that are missing, twice or not there, an unknown mechanism or option, or one part that needs
            a causal call beside one that cannot answer it.
        CapabilityError: (in a call) a part lacks what was asked for; the message names its heads.

    Cost: that of the parts, and a copy of q, k, v and out. State: those of the parts, one after the other; it grows
        with the length where a head is exact.
    Source: our own.
    """

    name = "by_head"
    causal = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        heads: Sequence[Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        wanted = _groups([EXACT] * num_heads if heads is None else heads, num_heads)
        shared = num_heads // self.num_kv_heads
        self._groups = [_Group.of(found, shared) for found, _, _ in wanted]
        self.parts = nn.ModuleList(
            _built(name, options, head_dim, group, generator)
            for group, (_, name, options) in zip(self._groups, wanted, strict=True)
        )
        self.causal = all(part.causal for part in self._parts)
        self.bidirectional = all(part.bidirectional for part in self._parts)
        self.aligned = any(part.aligned for part in self._parts)
        if not self.causal and not self.bidirectional:
            raise OptionError(
                f"by_head: {self._lacking(True)} no causal form, and {self._lacking(False)} no other; no call can be "
                "answered by both"
            )
        self.config = self._written()
        order = [head for group in self._groups for head in group.heads]
        self._order = None if order == sorted(order) else sorted(range(num_heads), key=order.__getitem__)
        self._state_sizes: tuple[int, ...] | None = None

    @property
    def exact_heads(self) -> tuple[int, ...]:
        """The heads that stay exact."""
        found = (g.heads for g, part in zip(self._groups, self._parts, strict=True) if part.name == EXACT)
        return tuple(sorted(head for heads in found for head in heads))

    @property
    def learns_from_data(self) -> bool:
        """Whether a part does."""
        return any(part.learns_from_data for part in self._parts)

    def calibrated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> ByHead:
        """A new one, each part of which has learned from its own heads."""
        made = copy.deepcopy(self)
        made.parts = nn.ModuleList(
            part.calibrated(*group.of_heads(q, k, v), key_mask, is_causal=is_causal, scale=scale)
            for group, part in zip(self._groups, self._parts, strict=True)
        )
        made.config = made._written()
        return made

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw anew whatever the parts draw."""
        for part in self._parts:
            resample = getattr(part, "resample_", None)
            if resample is not None:
                resample(generator)

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """The mean over the heads, rounded up."""
        total = sum(
            len(group.heads) * part.cost(num_queries, num_keys, value_dim)
            for group, part in zip(self._groups, self._parts, strict=True)
        )
        return math.ceil(total / self.num_heads)

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        found: list[Tensor] = []
        for group, part in zip(self._groups, self._parts, strict=True):
            found.append(part(*group.of_heads(q, k, v), key_mask=key_mask, scale=scale or None))
        return self._joined(found)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        found: list[Tensor] = []
        after: list[Tensor] = []
        own = [None] * len(self._groups) if state is None else self._shared_out(state, k, v)
        options: dict[str, Any] = {"key_mask": key_mask, "is_causal": True, "scale": scale or None}
        for group, part, before in zip(self._groups, self._parts, own, strict=True):
            out, new = part(*group.of_heads(q, k, v), **options, state=before, return_state=True)
            found.append(out)
            after.extend(new)
        return self._joined(found), tuple(after)

    def _joined(self, found: list[Tensor]) -> Tensor:
        """What the parts gave, in the order of the heads."""
        out = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return out if self._order is None else out[:, self._order]

    def _shared_out(self, state: State, k: Tensor, v: Tensor) -> list[State]:
        """The state of each part, out of all of them one after the other."""
        if self._state_sizes is None:
            self._state_sizes = tuple(
                _state_size(part, group, k[:1, :, :0], v[:1, :, :0])
                for group, part in zip(self._groups, self._parts, strict=True)
            )
        bounds = [0]
        for size in self._state_sizes:
            bounds.append(bounds[-1] + size)
        if len(state) != bounds[-1] or any(x.dim() == 0 or x.shape[0] != k.shape[0] for x in state):
            raise InputError(
                f"{self.name}: state has shapes {[tuple(x.shape) for x in state]}; wanted {bounds[-1]} tensors for a "
                f"batch of {k.shape[0]}: pass what this mechanism returned for this batch"
            )
        return [state[a:b] for a, b in pairwise(bounds)]

    def _scale(self, scale: float | None) -> float:
        # each part has its own default; 0 stands for it, which no caller can ask for
        return 0.0 if scale is None else float(scale)

    def _check_call(self, q: Tensor, k: Tensor, is_causal: bool, scale: float | None, wants_state: bool) -> None:
        if (is_causal and not self.causal) or (not is_causal and not self.bidirectional):
            raise CapabilityError(
                f"{self.name} cannot honour is_causal={is_causal}: {self._lacking(is_causal)} no such form; give these "
                f"heads {EXACT!r} or another mechanism that has it"
            )
        super()._check_call(q, k, is_causal, scale, wants_state)

    def _lacking(self, is_causal: bool) -> str:
        """The first part that has no causal form, or no other."""
        for group, part in zip(self._groups, self._parts, strict=True):
            if not (part.causal if is_causal else part.bidirectional):
                return f"{part.name} of heads {list(group.heads)} has"
        return "no head has"

    @property
    def _parts(self) -> list[Mechanism]:
        return cast("list[Mechanism]", list(self.parts))

    def _written(self) -> dict[str, Any]:
        return {
            "heads": [
                {"heads": list(group.heads), "mechanism": part.name, "options": _short(part)}
                for group, part in zip(self._groups, self._parts, strict=True)
            ]
        }


class _Group(NamedTuple):
    """Query heads in ascending order, and the key heads of which each serves equally many of them in a row."""

    heads: tuple[int, ...]
    key_heads: tuple[int, ...]

    @classmethod
    def of(cls, heads: Sequence[int], shared: int) -> _Group:
        """The group of these heads, of which ``shared`` in a row have one key head."""
        served = [head // shared for head in heads]
        times = {key: served.count(key) for key in dict.fromkeys(served)}
        each = math.gcd(*times.values())
        return cls(tuple(heads), tuple(key for key, count in times.items() for _ in range(count // each)))

    def of_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of this group; views where the heads follow each other."""
        return _taken(q, self.heads), _taken(k, self.key_heads), _taken(v, self.key_heads)


def _taken(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    if all(b - a == 1 for a, b in pairwise(heads)):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, list(heads)]


def _built(
    name: str, options: Mapping[str, Any], head_dim: int, group: _Group, generator: torch.Generator | None
) -> Mechanism:

    if name == ByHead.name:
        raise OptionError(f"by_head: the mechanism of heads {list(group.heads)} is by_head itself; name its parts")
    given: dict[str, Any] = {"head_dim": head_dim, "num_heads": len(group.heads), "num_kv_heads": len(group.key_heads)}
    try:
        draw: dict[str, Any] = {"generator": generator} if row(name).takes_generator else {}
        return mechanism(name, **given, **dict(options), **draw)
    except MaclinError as error:
        raise OptionError(f"by_head: heads {list(group.heads)}: {error}") from error


def _short(part: Mechanism) -> dict[str, Any]:
    """The options of a part that are not its defaults."""
    defaults = row(part.name).options
    return {key: value for key, value in part.config.items() if key not in defaults or value != defaults[key]}


def _groups(given: Sequence[Any], num_heads: int) -> list[tuple[tuple[int, ...], str, dict[str, Any]]]:
    """Heads, name and options of each group, by the first head."""
    if isinstance(given, str) or not isinstance(cast("Any", given), Sequence):
        raise OptionError(f"by_head: heads is {given!r}; wanted a list with an entry for each of the {num_heads} heads")
    if given and all(isinstance(entry, Mapping) for entry in given):
        groups = [_group(entry, num_heads) for entry in given]
    else:
        groups = _gathered(given, num_heads)
    named = sorted(head for heads, _, _ in groups for head in heads)
    if named != list(range(num_heads)):
        raise OptionError(f"by_head: the groups name heads {named}; wanted each of 0 to {num_heads - 1} once")
    return sorted(groups, key=lambda group: group[0][0])


def _group(entry: Mapping[str, Any], num_heads: int) -> tuple[tuple[int, ...], str, dict[str, Any]]:
    unknown = sorted(set(entry) - {"heads", "mechanism", "options"})
    heads, name, options = entry.get("heads"), entry.get("mechanism"), entry.get("options", {})
    whole = isinstance(heads, Sequence) and not isinstance(heads, str) and len(cast("Sequence[Any]", heads)) > 0
    if unknown or not whole or not isinstance(name, str) or not isinstance(options, Mapping):
        raise OptionError(
            f"by_head: a group is {dict(entry)!r}; wanted heads (a list of numbers from 0 to {num_heads - 1}), "
            "mechanism (a name) and, where it has some, options"
        )
    numbers = list(cast("Iterable[Any]", heads))
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < num_heads for n in numbers):
        raise OptionError(f"by_head: a group has heads {numbers}; wanted whole numbers from 0 to {num_heads - 1}")
    return tuple(sorted(numbers)), name, dict(cast("Mapping[str, Any]", options))


def _gathered(given: Sequence[Any], num_heads: int) -> list[tuple[tuple[int, ...], str, dict[str, Any]]]:
    """Groups of the heads that have the same mechanism in the same options."""
    if len(given) != num_heads:
        raise OptionError(f"by_head: heads has {len(given)} entries; wanted one for each of the {num_heads} heads")
    groups: list[tuple[list[int], str, dict[str, Any]]] = []
    for head, entry in enumerate(given):
        pair: Any = (entry, {}) if isinstance(entry, str) else entry
        if (
            not isinstance(pair, Sequence)
            or [isinstance(part, kind) for part, kind in zip(cast("Any", pair), (str, Mapping), strict=False)]
            != [True, True]
            or len(cast("Sequence[Any]", pair)) != 2
        ):
            raise OptionError(
                f"by_head: head {head} is {entry!r}; wanted a mechanism's name, or a pair of name and options"
            )
        name, options = cast("tuple[str, Mapping[str, Any]]", tuple(cast("Any", pair)))
        same = next((group for group in groups if group[1:] == (name, dict(options))), None)
        if same is None:
            groups.append(([head], name, dict(options)))
        else:
            same[0].append(head)
    return [(tuple(heads), name, options) for heads, name, options in groups]


@torch.no_grad()
def _state_size(part: Mechanism, group: _Group, k: Tensor, v: Tensor) -> int:
    """Tensors in the state of a part, whatever they hold: from a call with one masked token."""
    rows = k.new_zeros(1, max(len(group.heads), len(group.key_heads)), 1, k.shape[3])
    values = v.new_zeros(1, len(group.key_heads), 1, v.shape[3])
    mask = torch.zeros(1, 1, dtype=torch.bool, device=k.device)
    keys = rows[:, : len(group.key_heads)]
    return len(part(rows[:, : len(group.heads)], keys, values, key_mask=mask, is_causal=True, return_state=True)[1])

"""One guarded mechanism: what stands in place of its ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from maclin.adopt.guard.budget import Budget, Clock
from maclin.adopt.guard.counters import LayerCounters
from maclin.adopt.guard.estimate import Estimate
from maclin.adopt.guard.examine import Call, Seen, examine, glance
from maclin.adopt.guard.options import GuardOptions
from maclin.adopt.guard.outside import outside
from maclin.core.mechanisms import Mechanism, mechanism
from maclin.core.mechanisms.base import State
from maclin.core.statistics import guarded

Out = Tensor | tuple[Tensor, State]


@dataclass(frozen=True)
class Flag:
    """One flagged sequence, as ``on_flag`` gets it.

    Attributes:
        layer: name of the attention module.
        sequence: its row in the batch.
        reason: "error", "bound", "nonfinite" or "denominator".
        estimate: of its relative error; None where no row was computed.
        exact: whether exact attention answered in place of the mechanism.
    """

    layer: str
    sequence: int
    reason: str
    estimate: Estimate | None
    exact: bool


class Owner(Protocol):
    """What a watch needs of the guard that it belongs to."""

    options: GuardOptions
    budget: Budget
    learning: bool

    @property
    def lock(self) -> Any:
        """Held while counters change."""
        ...

    @property
    def inside(self) -> Any:
        """Of this thread; its attribute ``watch`` is the watch whose mechanism runs."""
        ...

    def flagged(self, flags: list[Flag]) -> None:
        """Tell whoever wants to know."""
        ...


class Watch:
    """Calls a mechanism, judges what it made, and answers exactly where that is asked for.

    It is an attribute ``forward`` of the mechanism itself, so that modules, parameters and keys stay as they are.

    Args:
        owner: the guard.
        index: of the layer among the guarded ones.
        layer: its name.
        guarded_mechanism: the mechanism.
        tolerance: relative error.
    """

    def __init__(self, owner: Owner, index: int, layer: str, guarded_mechanism: Mechanism, tolerance: float) -> None:
        self.owner = owner
        self.index = index
        self.layer = layer
        self.mechanism = guarded_mechanism
        self.tolerance = tolerance
        self.counters = LayerCounters(owner.options.baseline_sequences)
        self.held = False
        self.before: Callable[..., Any] | None = None
        self._outside = outside()
        self._drawn = 0
        self._checks = 0
        self._in_succession = 0
        self._countable = True
        self._exact = mechanism(
            "softmax",
            head_dim=guarded_mechanism.head_dim,
            num_heads=guarded_mechanism.num_heads,
            num_kv_heads=guarded_mechanism.num_kv_heads,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_outside"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._outside = outside()

    def attach(self) -> None:
        """Stand in place of the mechanism's forward."""
        attributes = vars(self.mechanism)
        self.before = attributes.get("forward")
        object.__setattr__(self.mechanism, "forward", self)

    def detach(self) -> None:
        """Give it back, unless somebody else has taken it meanwhile."""
        if vars(self.mechanism).get("forward") is not self:
            return
        if self.before is None:
            object.__delattr__(self.mechanism, "forward")
        else:
            object.__setattr__(self.mechanism, "forward", self.before)

    def release(self) -> None:
        """Let the mechanism answer again."""
        with self.owner.lock:
            self.held, self._in_succession = False, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Out:
        """The mechanism's call, under its contract."""
        if torch.compiler.is_compiling():
            return self._outside(self._called, q, k, v, options)
        return self._called(q, k, v, options)

    def _called(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Out:
        inside = self.owner.inside
        if getattr(inside, "watch", None) is self:  # a mechanism may call its own forward again, as under autocast
            return self._own(q, k, v, options)
        inside.watch = self
        try:
            return self._guarded(q, k, v, options)
        finally:
            inside.watch = None

    def _own(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Out:
        if self.before is not None:
            return self.before(q, k, v, **options)
        return type(self.mechanism).forward(self.mechanism, q, k, v, **options)

    def _guarded(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Out:
        if q.dim() != 4 or k.dim() != 4:
            return self._own(q, k, v, options)  # it says what was wanted
        skipped = self._cannot(q, k, options)
        if self.held and options.get("state") is None and skipped in (None, "decoding"):
            exact = self._answered(q, k, v, options)
            if not options.get("return_state"):
                return exact
            # what comes next continues from the mechanism's own state: there is no other of constant size
            own = self._own(q, k, v, options)
            return (exact, own[1]) if isinstance(own, tuple) else exact
        out = self._own(q, k, v, options)
        if skipped is not None:
            with self.owner.lock:
                self.counters.skip(q.shape[0], skipped)
            return out
        made = out[0] if isinstance(out, tuple) else out
        scale, is_causal = options.get("scale"), bool(options.get("is_causal"))
        call = Call(q, k, v, made, options.get("key_mask"), is_causal, scale)
        if self.owner.learning:
            seen = self._examined(call)
            with self.owner.lock:
                for one in seen:
                    self.counters.drift.learn(one.statistics)
            return out
        exact, spent = self._judged(call, options)
        self.owner.budget.spent(*spent)
        if exact is None:
            return out
        return (exact, out[1]) if isinstance(out, tuple) else exact

    def _cannot(self, q: Tensor, k: Tensor, options: dict[str, Any]) -> str | None:
        """Why this call cannot be checked; None where it can."""
        if options.get("state") is not None:
            return "decoding" if q.shape[2] == 1 else "state"
        if q.shape[0] * q.shape[2] * k.shape[2] == 0:
            return "empty"
        if q.shape[2] == 1:
            return "decoding"
        if options.get("cu_seqlens") is not None:
            return "packed"
        return "train" if self.mechanism.training else None

    def _judged(self, call: Call, options: dict[str, Any]) -> tuple[Tensor | None, tuple[float, float, bool]]:
        """Out with exact attention where that is asked for, else None; and the seconds of the guard and of that."""
        asked, budget = self.owner.options, self.owner.budget
        with self.owner.lock:
            turn = self._drawn % asked.every == 0
        skipped = "turn" if not turn else None if budget.has_turn(self.index) else "budget"
        clock = Clock(call.q.device)
        if skipped is None:
            seen = self._with_denominators(call, self._examined(call), options)
        else:
            seen = glance(call, self.tolerance)
            with self.owner.lock:
                self._drawn += 1
        guard_s = clock.seconds()
        wrong = [i for i, one in enumerate(seen) if one.reason is not None]
        answer = asked.action == "exact" and bool(wrong)
        exact, exact_s = None, 0.0
        if answer:
            clock = Clock(call.q.device)
            exact = self._replaced(call, wrong, options, [seen[i].reason == "nonfinite" for i in wrong])
            exact_s = clock.seconds()
        with self.owner.lock:
            self.counters.add(seen, skipped)
            self.counters.exact += len(wrong) if answer else 0
        self._hold(skipped is None, bool(wrong))
        if wrong:
            flags = [Flag(self.layer, i, seen[i].reason or "", seen[i].estimate, answer) for i in wrong]
            self.owner.flagged(flags)
        return exact, (guard_s, exact_s, skipped is None)

    def _examined(self, call: Call) -> list[Seen]:
        asked = self.owner.options
        with self.owner.lock:
            number, self._drawn = self._drawn, self._drawn + 1
        # one stream of rows for each call of each layer, whatever was checked before
        seed = ((asked.seed * 1_000_003 + self.index) * 1_000_003 + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        return examine(call, self.tolerance, asked.sample_rows, asked.confidence, generator)

    def _with_denominators(self, call: Call, seen: list[Seen], options: dict[str, Any]) -> list[Seen]:
        """Now and then the mechanism runs again with its denominators counted, which is slower than without."""
        asked = self.owner.options
        with self.owner.lock:
            self._checks += 1
            asks = self._countable and asked.denominators_every and self._checks % asked.denominators_every == 0
        if not asks:
            return seen
        with torch.no_grad(), guarded() as counts:
            self._own(call.q, call.k, call.v, options)
        bad = min(counts.guarded + counts.negative, counts.rows)
        with self.owner.lock:
            self._countable = counts.rows > 0
            self.counters.counted_denominators += counts.rows
            self.counters.bad_denominators += bad
        if bad <= asked.max_bad_share * counts.rows:
            return seen
        return [Seen(one.reason or "denominator", one.estimate, one.statistics, one.beyond) for one in seen]

    def _replaced(self, call: Call, sequences: list[int], options: dict[str, Any], nonfinite: list[bool]) -> Tensor:
        """out with these sequences attended exactly."""
        part = call.only(sequences)
        exact = self._attend(part.q, part.k, part.v, {**options, "key_mask": part.key_mask}).to(call.out.dtype)
        if any(nonfinite):
            rows = exact.detach().isfinite().all(-1)
            rows = rows if part.valid is None else rows | ~part.valid[:, None]
            bad = (~rows.flatten(1).all(1)).tolist()
            with self.owner.lock:
                self.counters.nonfinite_inputs += sum(a and b for a, b in zip(bad, nonfinite, strict=True))
        if len(sequences) == call.out.shape[0]:
            return exact
        return call.out.index_copy(0, torch.tensor(sequences, device=exact.device), exact)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        kept = {key: options[key] for key in ("key_mask", "is_causal", "scale") if key in options}
        return self._exact(q, k, v, **kept)

    def _answered(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """A layer that is held exact: the mechanism runs for its state only, if at all."""
        clock = Clock(q.device)
        out = self._attend(q, k, v, options)
        self.owner.budget.spent(0.0, clock.seconds(), False)
        with self.owner.lock:
            self.counters.skip(q.shape[0], "held")
            self.counters.exact += q.shape[0]
        return out

    def _hold(self, checked: bool, flagged: bool) -> None:
        limit = self.owner.options.hold_after
        with self.owner.lock:
            if flagged:
                self._in_succession += 1
            elif checked:
                self._in_succession = 0
            if limit is not None and self.owner.options.action == "exact" and self._in_succession >= limit:
                self.held = True

"""``guard``: a converted model that watches its own error while it serves."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from maclin.adopt.guard.budget import Budget
from maclin.adopt.guard.drift import Drift
from maclin.adopt.guard.layers import guardable, learned_anew, mechanisms_of, root_of, run, sentence
from maclin.adopt.guard.options import GuardOptions
from maclin.adopt.guard.outside import outside
from maclin.adopt.guard.text import json_lines, prometheus
from maclin.adopt.guard.watch import Flag, Watch
from maclin.adopt.hosts.base import GUARD, Batch
from maclin.core.errors import InputError, MaclinError
from maclin.records import GuardRecord


class GuardWarning(UserWarning):
    """A guarded layer was above its tolerance and ``action`` is "warn"; once per layer until ``reset``."""


class Guard:
    """Watches the converted layers of a model; made by ``maclin.guard``, where the arguments are described.

    A context manager: at the end of the block the model is unguarded.

    Attributes:
        options: what was asked for.
        watches: of each guarded layer, by name.
        budget: time taken so far.
        learning: whether calls are taken as calibration of the drift, and nothing else.
    """

    def __init__(self, model: nn.Module, options: GuardOptions, on_flag: Callable[[Flag], None] | None = None) -> None:
        self.options = options
        self.on_flag = on_flag
        self.learning = False
        self.root = root_of(model)
        found = guardable(self.root, options.tolerance)
        self._set_up()
        self.watches = {
            layer: Watch(self, index, layer, mechanism, options.tolerance_of(layer))
            for index, (layer, mechanism) in enumerate(found.items())
        }
        self.budget = Budget(len(found), options.max_share)
        self._warned: set[str] = set()
        self._hooks: list[Any] = []

    def _set_up(self) -> None:
        """What no copy can share."""
        self.lock = threading.Lock()
        self.inside = threading.local()
        self._outside = outside()

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a guarded model is guarded, with counters of its own, and tells nobody
        kept = {key: value for key, value in self.__dict__.items() if key not in ("lock", "inside", "_outside")}
        return kept | {"on_flag": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def active(self) -> bool:
        """Whether the model is guarded by this guard."""
        return self.root.__dict__.get(GUARD) is self

    def attach(self) -> None:
        """Guard the model, in place of whatever guarded it before."""
        before = self.root.__dict__.get(GUARD)
        if before is self:
            return
        if before is not None:
            before.remove()
        for watch in self.watches.values():
            watch.attach()
        self._hooks = [
            self.root.register_forward_pre_hook(self._begin),
            self.root.register_forward_hook(self._end, always_call=True),
        ]
        self.root.__dict__[GUARD] = self

    def remove(self) -> None:
        """Unguard the model; the counters stay. Nothing happens where it was done already."""
        if not self.active:
            return
        for watch in self.watches.values():
            watch.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        del self.root.__dict__[GUARD]

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Take what the layers see on these batches as what is usual; runs the model on each, without acting.

        Args:
            batches: keyword arguments of the model's forward, or its one main input.

        Raises:
            InputError: no batch, or one that the model cannot run on.
        """
        before = {watch: watch.counters.drift for watch in self.watches.values()}
        for watch in before:
            watch.counters.drift = Drift(self.options.baseline_sequences)
        modes = [(module, module.training) for module in self.root.modules()]
        self.learning = True
        done = 0
        try:
            self.root.eval()
            with torch.no_grad():
                for batch in batches:
                    run(self.root, batch)
                    done += 1
            if not done:
                raise InputError("guard: wanted at least one batch to calibrate on, got none")
        except BaseException:
            for watch, drift in before.items():
                watch.counters.drift = drift
            raise
        finally:
            self.learning = False
            for module, training in modes:
                module.training = training

    def recalibrate(self, batches: Iterable[Batch] | None = None) -> None:
        """Adapt to what the input has become: a new calibration of the drift, and layers that were held are released.

        Without batches the calibration is what was served since the last one. With batches, mechanisms that learn
        from data learn from them anew, as in ``maclin.convert_``, and the calibration is what the model then sees on
        them. The others stay as they are: heal the model instead. On an error nothing has changed.

        Args:
            batches: documents of the kind that is served now.

        Raises:
            InputError: no batches, or too few tokens to learn from.
            MaclinError: the guard was removed.
        """
        if not self.active:
            raise MaclinError("wanted a guard that is attached, got one that was removed; call maclin.guard again")
        if batches is None:
            with self.lock:
                for watch in self.watches.values():
                    watch.counters.drift.adapt()
        else:
            documents = list(batches)
            if not documents:
                raise InputError("guard: wanted at least one batch to recalibrate on, got none")
            self._learn(documents)
            self.calibrate(documents)
        self.release()

    def release(self, layer: str | None = None) -> None:
        """Let a layer that is held exact, or all of them, use its mechanism again.

        Raises:
            InputError: an unknown layer.
        """
        if layer is not None and layer not in self.watches:
            raise InputError(f"guard: no guarded layer {layer!r}; guarded are {list(self.watches)}")
        for name, watch in self.watches.items():
            if layer in (None, name):
                watch.release()

    def reset(self) -> None:
        """All counters and times back to zero; the calibration of the drift and what is held exact stay."""
        with self.lock:
            for watch in self.watches.values():
                watch.counters.clear()
            self.budget.clear()
            self._warned.clear()

    def record(self) -> GuardRecord:
        """The counters as they stand, as one record."""
        present = {id(mechanism) for mechanism in mechanisms_of(self.root).values()} if self.active else set[int]()
        with self.lock:
            layers = tuple(
                watch.counters.record(
                    name, watch.mechanism.name, watch.tolerance, watch.held, id(watch.mechanism) in present
                )
                for name, watch in self.watches.items()
            )
            budget = self.budget
            return GuardRecord(
                layers=layers,
                action=self.options.action,
                confidence=self.options.confidence,
                sample_rows=self.options.sample_rows,
                forwards=budget.forwards,
                forward_s=budget.forward_s,
                guard_s=budget.guard_s,
                exact_s=budget.exact_s,
                share=budget.share,
            )

    def counters(self) -> dict[str, Any]:
        """The counters as a dict: ``layers`` is a list with a dict for each."""
        return asdict(self.record())

    def json_lines(self) -> str:
        """The counters as JSON, one object a line: the guard itself, then each layer."""
        return json_lines(self.record())

    def prometheus(self, prefix: str = "maclin_guard") -> str:
        """The counters in Prometheus' text exposition format."""
        return prometheus(self.record(), prefix)

    def flagged(self, flags: list[Flag]) -> None:
        """Tell ``on_flag`` of each, and warn once per layer where that is the action."""
        if self.on_flag is not None:
            for flag in flags:
                self.on_flag(flag)
        if self.options.action != "warn":
            return
        first = flags[0]
        with self.lock:
            known = first.layer in self._warned
            self._warned.add(first.layer)
        if not known:
            warnings.warn(sentence(first, self.watches[first.layer].tolerance), GuardWarning, stacklevel=2)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self.learning:
            self._outside(self.budget.begin)

    def _end(self, module: nn.Module, args: Any, out: Any) -> None:
        self._outside(self.budget.end)

    def _learn(self, documents: list[Batch]) -> None:
        """Teach the mechanisms that learn from data, and watch those that stand in place of the old ones."""
        self.remove()
        try:
            taught = learned_anew(self.root, {name: watch.mechanism for name, watch in self.watches.items()}, documents)
            for name, mechanism in taught.items():
                self.watches[name].mechanism = mechanism
        finally:
            self.attach()


def guard(
    model: nn.Module,
    *,
    tolerance: float | Mapping[str, float] = 0.1,
    batches: Iterable[Batch] | None = None,
    on_flag: Callable[[Flag], None] | None = None,
    sample_rows: int = 32,
    action: str = "exact",
    confidence: float = 0.99,
    max_share: float | None = 0.05,
    every: int = 1,
    hold_after: int | None = None,
    denominators_every: int = 64,
    max_bad_share: float = 0.01,
    baseline_sequences: int = 64,
    seed: int = 0,
) -> Guard:
    """Watch the error of a converted model on the very inputs that it serves, and answer exactly where it is too large.

    In each converted layer a few query rows are computed exactly, too. From them follows the relative error of the
    layer's output, ||out - exact||_F / ||exact||_F over all heads and tokens of a sequence, with an interval. A
    sequence is flagged if the estimate is above the tolerance, or the upper bound above twice the tolerance; if NaN or
    infinity is in any row; if rows are longer than any average of the values; or if too many denominators were
    replaced. docs/guard.md says what that finds, what it cannot, and at which cost.

    Keys of the state_dict, weights and outputs that are not flagged stay as they are, bit for bit. Layers that are
    exact anyway are left alone. Guarding again replaces the earlier guard.

    Args:
        model: a model that ``maclin.convert_`` converted, or one built with ``maclin.nn``.
        tolerance: largest relative error; or a mapping from layer name to it, for these layers only.
        batches: to calibrate the drift of the input on; None takes the first ``baseline_sequences`` that are served.
        on_flag: called with each ``Flag``.
        sample_rows: rows per sequence and head that are computed exactly; where they leave a decision open, four times
            as many.
        action: "exact" answers flagged sequences of a layer with exact attention; "warn" warns once per layer.
        confidence: of each bound of the interval.
        max_share: of the model's own time that the guard may take; layers are then checked in turn. None: no limit.
        every: each layer is checked in every so many calls only.
        hold_after: a layer that was flagged so many times in succession stays exact until ``release``; None: never.
        denominators_every: after so many checks of a layer its mechanism runs once more with its denominators
            counted; 0: never.
        max_bad_share: of denominators that were negative or too small, above which the call is flagged.
        baseline_sequences: see ``batches``.
        seed: of the sampled rows; the same calls sample the same rows.

    Returns:
        The guard: counters, ``recalibrate``, and a context manager.

    Raises:
        OptionError: a value outside its range.
        InputError: nothing in the model to guard, or a mapping with unknown layers.

    Cost: per checked layer sample_rows x H x S x (D + Dv) multiply-adds, half of it if causal, and one pass over out.

    Example:
        >>> with maclin.guard(model, tolerance=0.3) as guard:
        ...     out = model(**batch)
        >>> print(guard.prometheus())
    """
    options = GuardOptions(
        tolerance=tolerance,
        sample_rows=sample_rows,
        action=action,
        confidence=confidence,
        max_share=max_share,
        every=every,
        hold_after=hold_after,
        denominators_every=denominators_every,
        max_bad_share=max_bad_share,
        baseline_sequences=baseline_sequences,
        seed=seed,
    )
    made = Guard(model, options, on_flag)
    made.attach()
    if batches is not None:
        try:
            made.calibrate(batches)
        except BaseException:
            made.remove()
            raise
    return made


def unguard(model: nn.Module) -> None:
    """Take the guard of a model away; its outputs are then those of the converted model, or of the restored one.

    Args:
        model: what ``maclin.guard`` was given.

    Raises:
        MaclinError: the model is not guarded.
    """
    found = root_of(model).__dict__.get(GUARD)
    if found is None:
        raise MaclinError(f"wanted a model that maclin.guard guards, got a {type(model).__name__} that is not")
    found.remove()

"""Attention transfer: each converted layer's own parameters, trained against its exact output on the same input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maclin.adopt.calibrate import SEQUENCES, learned, only, sampled
from maclin.adopt.capture import token_mask
from maclin.adopt.exact import actual_scale, allowed_keys
from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.core.errors import CapabilityError, InputError
from maclin.core.fused import fused_attention
from maclin.core.mechanisms import Mechanism
from maclin.progress import Progress
from maclin.records import HealLayer
from maclin.training.schedule import mixed_seed

from .blocks import Layer, Model, shape_of
from .settings import Budget, HealRecipe, learning_rate
from .state import HealState, mechanism_parameters, mechanisms_of, packed, put_mechanisms

if TYPE_CHECKING:
    from accelerate import Accelerator

_TRAINED_ONLY = ("hedgehog",)
"""Mechanisms whose calibration is training, which transfer does itself."""
_LOOKS = 2  # at held-out batches during transfer, besides those before and after it
_HELD_OUT = 4  # batches that layers are judged on
_SEED = 17


@dataclass(frozen=True)
class Part:
    """One step's share of a batch: some of its sequences, and of these some tokens in a row."""

    rows: tuple[int, ...]
    start: int
    stop: int


class Transfer:
    """Attention transfer of a model's converted layers, side by side; each keeps what was best on held-out batches.

    Loss of a layer: the mean over heads of ||out - exact||² / ||exact||², Adam with a rise and a cosine; a step takes
    as many sequences as ``transfer_tokens`` holds, or that many tokens of a longer one.

    Args:
        model: the converted model.
        batches: to train on.
        held_out: to choose by.
        recipe: how.
        budget: how long.
        state: moves.
        seed: of the order.
        accelerator: takes the gradients.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        recipe: HealRecipe,
        budget: Budget,
        state: HealState,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.batches, self.held_out = model, batches, held_out
        self.recipe, self.budget, self.state, self.seed = recipe, budget, state, seed
        self.accelerator = accelerator
        self.names = {layer.module: layer.name for layer in model.layers}
        self.best: dict[str, Any] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def begin(self) -> None:
        """Measure the layers as they are, and try the closed form of those that have one."""
        before = self.errors()
        rows = {
            layer.name: HealLayer(layer.name, layer.mechanism.name, before[layer.name], None)
            for layer in self.model.layers
        }
        if self.recipe.calibrate:
            for name, error in self._calibrated(before).items():
                rows[name] = replace(rows[name], error_after=error, note="calibrated")
        self.best = mechanisms_of(self.model)
        self.state.layers = [asdict(row) for row in rows.values()]

    def through(self, save: Callable[[bool], None], stop: Callable[[], bool], progress: Progress) -> None:
        """To the end of the budget; ``save`` is called where going on from it continues the same.

        Args:
            save: between batches; is told whether this is the end, because somebody wants to stop.
            stop: asked between batches.
            progress: is told of each step.
        """
        state, recipe = self.state, self.recipe
        steps = recipe.transfer_steps
        parameters = {layer.name: mechanism_parameters(layer) for layer in self.model.layers}
        if not steps or not any(parameters.values()):
            return
        progress.start("attention transfer", steps)
        self._prepare(parameters)
        every = max(steps // (_LOOKS + 1), 1)

        def over() -> bool:
            return state.transfer_step >= steps or self.budget.transfer_over(state.seconds, recipe.transfer_share)

        while not over():
            stopping = stop()
            save(stopping)
            if stopping:
                break
            calls = self._captured(self.batches[self._index(state.transfer_batch)])
            for part in _parts(calls, recipe.transfer_tokens):
                self._step(calls, part)
                state.transfer_step += 1
                if state.transfer_step % every == 0 and state.transfer_step < steps:
                    self._look()
                state.tick()
                progress.advance(f"loss {state.train_loss:.3g}" if state.train_loss is not None else "")
                if over():
                    break
            state.transfer_batch += 1
        self._look()
        put_mechanisms(self.model, self.best)
        progress.finish()

    def resume(self, optimizers: dict[str, Any]) -> None:
        """Go on with the moments of an interrupted transfer."""
        self._prepare({layer.name: mechanism_parameters(layer) for layer in self.model.layers})
        for name, state in optimizers.items():
            self.optimizers[name].load_state_dict(state)

    def errors(self) -> dict[str, float]:
        """||out - exact||_F / ||exact||_F of each layer over the held-out batches, its inputs being the original's."""
        sums = {layer.name: [0.0, 0.0] for layer in self.model.layers}
        mechanisms = {layer.name: layer.mechanism for layer in self.model.layers}

        def add(call: AttentionCall) -> None:
            off, size = (x.sum() for x in squares(mechanisms[call.layer], call))
            sums[call.layer][0] += float(off)
            sums[call.layer][1] += float(size)

        for batch in self.held_out[:_HELD_OUT]:
            self.model.run_exact(batch, self.names, add)
        return {name: math.sqrt(off / size) if size > 0 else 0.0 for name, (off, size) in sums.items()}

    # small things

    def _calibrated(self, before: dict[str, float]) -> dict[str, float]:
        """Put calibrated mechanisms where they are better on held-out batches; their errors."""
        pupils = {layer.name: layer for layer in self.model.layers if _has_closed_form(layer.mechanism)}
        if not pupils:
            return {}
        known = {layer.name: layer for layer in self._described() if layer.name in pupils}
        tried: dict[str, Mechanism] = {}
        for layer, sample in sampled(self.model.given, _spread(self.batches), list(known.values())):
            pupil = pupils[layer.name]
            try:
                made = learned(unpacked_copy(pupil), sample)
            except (InputError, CapabilityError):
                continue  # too few tokens: it stays as it is, which the record says
            reference = next(pupil.module.parameters())
            tried[layer.name] = made.to(device=reference.device, dtype=reference.dtype).eval()
        earlier = {name: pupils[name].mechanism for name in tried}
        self.model.replace(tried)
        after = self.errors()
        worse = {name: earlier[name] for name in tried if not after[name] < before[name]}
        self.model.replace(worse)
        return {name: after[name] for name in tried if name not in worse}

    def _described(self) -> tuple[AttentionLayer, ...]:
        return tuple(host(self.model.given).layers(self.batches[0]))

    def _prepare(self, parameters: dict[str, list[nn.Parameter]]) -> None:
        for name, own in parameters.items():
            if own and name not in self.optimizers:
                for parameter in own:
                    parameter.requires_grad_(True)
                self.optimizers[name] = torch.optim.Adam(own, lr=self.recipe.transfer_lr)

    def _index(self, number: int) -> int:
        """The batch that comes as number so and so, epoch by epoch in an order that the seed and the epoch decide."""
        epoch, place = divmod(number, len(self.batches))
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, _SEED, epoch))
        return int(torch.randperm(len(self.batches), generator=generator)[place])

    def _captured(self, batch: Batch) -> dict[str, list[AttentionCall]]:
        """The calls of each layer: several where layers share a module."""
        calls: dict[str, list[AttentionCall]] = {}

        def keep(call: AttentionCall) -> None:
            calls.setdefault(call.layer, []).append(call)

        if self.recipe.transfer_inputs == "teacher":
            self.model.run_exact(batch, self.names, keep)
        else:
            self.model.run_watched(batch, keep)
        return calls

    def _step(self, calls: dict[str, list[AttentionCall]], part: Part) -> None:
        state, recipe = self.state, self.recipe
        done = state.transfer_step / recipe.transfer_steps
        if self.budget.minutes is not None and recipe.transfer_share:
            done = max(done, min(state.seconds / (60 * self.budget.minutes * recipe.transfer_share), 1.0))
        total, count = 0.0, 0
        for layer in self.model.layers:
            optimizer, made = self.optimizers.get(layer.name), calls.get(layer.name)
            if optimizer is None or not made:
                continue
            call = _taken(made[state.transfer_step % len(made)], part)
            if call is None:
                continue
            off, size = squares(layer.mechanism, call)
            loss = (off / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()
            self.accelerator.backward(loss)
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.transfer_lr * learning_rate(done, recipe.warm_up)
                optimizer.step()
                total, count = total + float(loss.detach()), count + 1
            else:
                state.skipped += 1
            optimizer.zero_grad(set_to_none=True)
        if count:
            state.loss, state.losses = state.loss + total / count, state.losses + 1

    @torch.no_grad()
    def _look(self) -> None:
        """Keep of each layer what is best on the held-out batches."""
        after = self.errors()
        for row in self.state.layers:
            name, error = row["layer"], after[row["layer"]]
            least = row["error_before"] if row["error_after"] is None else row["error_after"]
            if name in self.optimizers and error < least:
                row["error_after"] = error
                row["note"] = "trained" if row["note"] in ("", "trained") else "calibrated, trained"
                layer = next(layer for layer in self.model.layers if layer.name == name)
                self.best[name] = packed(layer.mechanism)


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    """As many as hold the sequences that calibration looks at, evenly spread."""
    size = max((shape_of(batches[0]) or (1,))[0], 1)
    wanted = min(-(-SEQUENCES // size), len(batches))
    return [batches[(2 * i + 1) * len(batches) // (2 * wanted)] for i in range(wanted)]


def _parts(calls: Mapping[str, Sequence[AttentionCall]], tokens: int) -> Iterator[Part]:
    """The shares of a batch that hold about so many tokens each."""
    q = next(iter(calls.values()))[0].q
    size, length = q.shape[0], q.shape[2]
    rows = max(tokens // max(length, 1), 1)
    for first in range(0, size, rows):
        for start in range(0, length, tokens):
            yield Part(tuple(range(first, min(first + rows, size))), start, min(start + tokens, length))


def _taken(call: AttentionCall, part: Part) -> AttentionCall | None:
    """A share of a call; whole sequences where keys are not those of the queries; None where nothing is in it."""
    rows = [row for row in part.rows if row < call.q.shape[0]]
    if not rows:
        return None
    call = only(call, rows)
    if call.is_cross or call.q.shape[2] != call.k.shape[2]:
        return call
    at = slice(part.start, part.stop)
    mask = None if call.key_mask is None else call.key_mask[:, at]
    if call.q.shape[2] <= part.start or (mask is not None and not bool(mask.any())):
        return None
    return replace(call, q=call.q[:, :, at], k=call.k[:, :, at], v=call.v[:, :, at], key_mask=mask)


def squares(mechanism: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """||out - exact||² and ||exact||² of each head (H,), padded queries left out."""
    q, k, v = call.q, call.k, call.v
    out = mechanism(q, k, v, key_mask=call.key_mask, is_causal=call.is_causal, scale=call.scale)
    with torch.no_grad():
        exact = exact_output(call)
        rows = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        if call.key_mask is not None and not call.is_cross:
            rows = token_mask(call)
        weight = rows[:, None, :, None].to(torch.float32)
        size = (exact.float().square() * weight).sum((0, 2, 3))
    return ((out.float() - exact.float()).square() * weight).sum((0, 2, 3)), size


def exact_output(call: AttentionCall) -> Tensor:
    """softmax(scale q kᵀ) v under the call's masks; a row that may attend to nothing gives 0."""
    n, s = call.q.shape[2], call.k.shape[2]
    scale = actual_scale(call)
    if call.key_mask is None and (not call.is_causal or n == s):
        return fused_attention(call.q, call.k, call.v, None, scale=scale, is_causal=call.is_causal)
    allowed = allowed_keys(call, 0, n)[:, None]
    out = fused_attention(call.q, call.k, call.v, allowed, scale=scale)
    return out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def unpacked_copy(layer: Layer) -> Mechanism:
    """A mechanism like the layer's, on the CPU, in float32."""
    return copy.deepcopy(layer.mechanism).to(device="cpu", dtype=torch.float32)


def _has_closed_form(mechanism: Mechanism) -> bool:
    names = {part.name for part in mechanism.modules() if isinstance(part, Mechanism)}
    return mechanism.learns_from_data and not names & set(_TRAINED_ONLY)

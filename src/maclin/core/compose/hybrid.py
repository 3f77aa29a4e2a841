"""Hybrid: an exact local window beside a linear mechanism, under one normaliser."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import wide
from ..blocks import OutBlocks, token_blocks
from ..causal import causal_readings
from ..contract import Features, Reading, Sums, accumulate, combine, empty_sums, put
from ..errors import InputError, OptionError
from ..fast.maps import Maps
from ..mechanisms.base import Exponent, FeatureMechanism, Mechanism, State
from ..mechanisms.hedgehog import Hedgehog
from ..native.band import Problem
from ..native.band_op import band, takes_band
from ..sinks import Sinks, sinks_of
from ..transfer import transfer
from .band import BLOCK, Tokens, banded_reading, near_reading, sink_reading
from .parts import mechanism, row

_LEAST_BYTES, _MOST_BYTES = 1 << 19, 3 << 19  # of the pairs of queries with their windows that are held at once
_LINEAR: dict[str, dict[str, Any]] = {"macformer": {"ppsbn": False}}
"""Options of the linear mechanism unless others are given: a window of raw q and k stands beside features of them."""


class Hybrid(Mechanism):
    """Kernel attention with weights exp(t), t = scale q k, exact within a window and estimated beyond it.

    out_i = sum_j w_ij v_j / sum_j w_ij, with w_ij = exp(t_ij) where |i - j| <= window and
    w_ij = b <phi(q_i), phi(k_j)> elsewhere: every key counts once. The features are those of a linear mechanism that
    estimates exp(t); with macformer's ppSBN, t is what is left of q and k, on both sides of the window's edge.

    Position i of N queries is key position i + S - N, as with ``window``. Causal, the window holds the own key and
    the ``window`` keys before.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        window: keys on each side.
        sinks: how many of the first attended keys are exact for every query (causal: once they are there); the
            features see nothing of them.
        linear: name of the mechanism beyond the window: favor, hedgehog, macformer, rfa or taylor.
        linear_options: its options; None are its defaults, of macformer with ppsbn=False.
        balance: "fixed", or "learned": a factor b per query head of what is estimated, 1 at first.
        generator: of the draw, where something is drawn.

    Raises:
        OptionError: a window below 1, or a linear mechanism whose features do not estimate an exponential.

    Cost: per head N x (2 window + 1) x (D + Dv) multiply-adds in the window, and those of the causal form of the
        linear mechanism, twice where the call is not causal: once before the window, once behind it. State: the last
        ``window`` + 1 keys, values and their mask, the same of the sinks, and the linear mechanism's.
    Source: a window and linear attention under one normaliser as in LoLCATs (Zhang et al. 2024, arXiv 2410.10254,
        section 3.3) and in Arora et al. 2024, arXiv 2402.18668; deviations: the bidirectional form; the features share
        the scale of the window's exponentials instead of one relative to its maximum.
    """

    name = "hybrid"
    causal = True
    aligned = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        window: int = 64,
        sinks: int = 0,
        linear: str = "macformer",
        linear_options: Mapping[str, Any] | None = None,
        balance: str = "fixed",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        if window < 1:
            raise OptionError(f"hybrid: window is {window}; wanted at least 1 key on each side")
        if sinks < 0:
            raise OptionError(f"hybrid: sinks is {sinks}; wanted 0 or more first keys")
        if balance not in ("fixed", "learned"):
            raise OptionError(f"hybrid: balance is {balance!r}; known are 'fixed', 'learned'")
        options = dict(_LINEAR.get(linear, {}) if linear_options is None else linear_options)
        if row(linear).takes_generator:
            options["generator"] = generator
        built = mechanism(linear, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, **options)
        self.linear = _checked(built)
        self.window = window
        self.sinks = sinks
        self.config = {
            "window": window,
            "sinks": sinks,
            "linear": linear,
            "linear_options": row(linear).differing(self.linear.config),
            "balance": balance,
        }
        self.log_balance = nn.Parameter(torch.zeros(num_heads)) if balance == "learned" else None

    @property
    def learns_from_data(self) -> bool:
        """Whether the linear mechanism does."""
        return self.linear.learns_from_data

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw anew whatever the linear mechanism draws; nothing where it draws nothing."""
        resample = getattr(self.linear, "resample_", None)
        if resample is not None:
            resample(generator)

    def calibrated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Hybrid:
        """A new hybrid: what is trained learned beside the window, what is chosen did so from all keys."""
        made = copy.deepcopy(self)
        if isinstance(self.linear, Hedgehog):
            return transfer(made, q, k, v, key_mask, is_causal=is_causal, scale=scale)
        if self.sinks:
            key_mask = sinks_of(k, v, Tokens.of(k, v, key_mask).mask, self.sinks)[1]
        learned = self.linear.calibrated(q, k, v, key_mask, is_causal=is_causal, scale=scale)
        made.linear = _checked(learned)
        made.config["linear_options"] = row(learned.name).differing(learned.config)
        return made

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """Window and linear mechanism; of the latter its chunks and sums on both sides."""
        near = num_queries * min(num_keys, 2 * self.window + 1 + self.sinks) * (self.head_dim + value_dim)
        return near + 2 * self.linear.cost(num_queries, num_keys, value_dim)

    def _scale(self, scale: float | None) -> float:
        return self.linear._scale(scale)

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        length, offset, lag = q.shape[2], k.shape[2] - q.shape[2], self.window + 1
        features, exponent = self._maps(scale)
        tokens, sinks = Tokens.of(k, v, key_mask), None
        if self.sinks:
            sinks, key_mask = sinks_of(*tokens, self.sinks)
            tokens = tokens._replace(mask=key_mask)
        maps = features.fast
        if maps is not None and takes_band(maps, q, k, v, key_mask, apart=exponent.scale is None):
            kv, z, _ = maps.sums(k, v, key_mask)
            if sinks is not None:  # every query sees them
                sinks = sinks._replace(position=torch.full_like(sinks.position, -1))
            problem = self._problem(q, k, v, key_mask, kv, z, sinks, features, maps, exponent, is_causal=False)
            return band(problem)[0]
        out = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))

        def of_sinks(rows: slice) -> list[Reading]:
            return [] if sinks is None else [sink_reading(q[:, :, rows], sinks, None, exponent)]

        if not features.log_domain:
            sums = _absorbed(tokens, features, empty_sums(k, v, features))
            of_row = 4 * (BLOCK + 2 * self.window) * q.shape[0] * q.shape[1]
            for rows in token_blocks(length, of_row, _LEAST_BYTES, _MOST_BYTES):
                shift = self._shift(q[:, :, rows], exponent)
                near = tokens.cut(rows.start + offset - self.window, rows.stop + offset + self.window)
                reading = banded_reading(q[:, :, rows], near, self.window, sums, features, exponent, shift)
                put(out, combine(reading, *of_sinks(rows)), features)
            return out.whole()
        # logarithms of any size, which leave nothing to subtract from:
        # a causal form in which each query comes with the last key before its window, and one from behind
        first = offset - lag
        before = self._far(q, tokens.cut(first, first + length), features, exponent, tokens.cut(0, max(first, 0)))
        backward = self._far(q.flip(2), tokens.flipped().cut(-lag, length - lag), features, exponent)
        behind = _flipped([reading for _, reading, _ in backward])
        for rows, reading, _ in before:
            start, stop = rows.start + offset - self.window, rows.stop + offset + self.window
            near = near_reading(q[:, :, rows], tokens.cut(start, stop), self.window, self.window, exponent)
            put(out, combine(near, reading, _rows(behind, rows), *of_sinks(rows)), features)
        return out.whole()

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        features, exponent = self._maps(scale)
        new, total = k.shape[2], k.shape[2] + self.window + 1
        tokens, sums, sinks = Tokens.of(k, v, key_mask), empty_sums(k, v, features), None
        recent, past = None, None
        if state is not None:
            recent, past, sums = self._known(state, k, v, sums)
        if self.sinks:
            sinks, mask = sinks_of(*tokens, self.sinks, past)
            tokens = tokens._replace(mask=mask)
        tokens = tokens.cut(-self.window - 1, new) if recent is None else tokens.after(recent)
        # with each new token the oldest of the recent ones leaves them for the sums
        leaving, offset = tokens.cut(0, new), new - q.shape[2]
        sums = _absorbed(leaving.cut(0, offset), features, sums)
        # copies: a view would keep all the tokens of this call
        kept = (*(x.clone() for x in tokens.cut(new, total)), *(() if sinks is None else sinks.state))
        if sinks is not None:
            sinks = sinks._replace(position=sinks.position - offset)  # of query 0
        maps = features.fast
        if maps is not None and takes_band(maps, q, *tokens, apart=exponent.scale is None):
            near, bare = tokens.cut(offset, total), maps.bare(sums.kv, sums.z)
            out, *after = band(self._problem(q, *near, *bare, sinks, features, maps, exponent, is_causal=True))
            count = sums.count + leaving.mask[:, offset:].sum(-1).to(sums.count.dtype)
            return out, (*kept, *maps.weighted(*after), sums.log_scale, count)
        whole = OutBlocks(v, (*q.shape[:-1], v.shape[-1]))
        for rows, reading, after in self._far(q, leaving.cut(offset, new), features, exponent, sums=sums):
            start, stop = rows.start + offset + 1, rows.stop + offset + self.window + 1
            readings = [near_reading(q[:, :, rows], tokens.cut(start, stop), self.window, 0, exponent), reading]
            if sinks is not None:
                readings.append(sink_reading(q[:, :, rows], sinks, rows.start, exponent))
            put(whole, combine(*readings), features)
            sums = after
        return whole.whole(), (*kept, *sums)

    def _far(
        self,
        q: Tensor,
        tokens: Tokens,
        features: Features,
        exponent: Exponent,
        earlier: Tokens | None = None,
        sums: Sums | None = None,
    ) -> Iterator[tuple[slice, Reading, Sums]]:
        """What queries read of the tokens that come with them and of all before, on the scale of the exponentials."""
        total = empty_sums(tokens.k, tokens.v, features) if sums is None else sums
        if earlier is not None:
            total = _absorbed(earlier, features, total)
        for rows, reading, after in causal_readings(q, tokens.k, tokens.v, features, tokens.mask, total):
            shift = self._shift(q[:, :, rows], exponent)
            if shift is not None:
                own = reading.log_scale
                reading = reading._replace(log_scale=shift if own is None else own + shift)
            yield rows, reading, after

    def _problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        kv: Tensor,
        z: Tensor,
        sinks: Sinks | None,
        features: Features,
        maps: Maps,
        exponent: Exponent,
        *,
        is_causal: bool,
    ) -> Problem:
        """For the compiled kernels."""
        plain, heads = exponent.scale is not None, q.shape[1]
        left, right = (None, None) if plain else (exponent.query(q), exponent.key(k))
        sink_right, sink_v, sink_mask, sink_position = None, None, None, None
        if sinks is not None:
            sink_right, sink_v, sink_mask, sink_position = exponent.key(sinks.k), *sinks[1:]
        return Problem(
            q, k, v, key_mask, left, right, self._shift(q, exponent), maps.weights(kv, heads), kv, z, maps.gamma,
            maps.beta, sink_right, sink_v, sink_mask, sink_position, maps.query.for_heads(heads), maps.key,
            maps.query_spec, maps.key_spec, exponent.scale or 1.0, features.floor, self.window, is_causal,
        )  # fmt: skip

    def _shift(self, q: Tensor, exponent: Exponent) -> Tensor | None:
        """Logarithm of what features of queries q (B, H, n, D) lack on the scale of the exponentials; None for 0."""
        shift = None if exponent.left_out is None else exponent.left_out(wide(q))
        if self.log_balance is None:
            return shift
        balance = wide(self.log_balance)[:, None].expand(q.shape[:-1])
        return balance if shift is None else shift + balance

    def _maps(self, scale: float) -> tuple[Features, Exponent]:
        exponent = self.linear.exponent(scale)
        assert exponent is not None  # ``_checked`` has seen to it
        return self.linear.features(scale), exponent

    def _known(self, state: State, k: Tensor, v: Tensor, empty: Sums) -> tuple[Tokens, tuple[Tensor, ...] | None, Sums]:
        """The recent tokens, the sinks and the sums of a state."""
        wanted: list[tuple[int, ...]] = []
        for length in (self.window + 1, *((self.sinks,) if self.sinks else ())):
            wanted += [(*x.shape[:2], length, x.shape[3]) for x in (k, v)]
            wanted.append((k.shape[0], length))
        wanted += [tuple(x.shape) for x in empty]
        if [tuple(x.shape) for x in state] != wanted:
            raise InputError(
                f"hybrid: state has shapes {[tuple(x.shape) for x in state]}; wanted {wanted}: pass what this "
                "mechanism returned for this batch"
            )
        return Tokens(*state[:3]), state[3:-4] or None, Sums(*state[-4:])


def _checked(linear: Mechanism) -> FeatureMechanism:
    """A mechanism whose features have the scale of the window's exponentials."""
    if isinstance(linear, FeatureMechanism) and linear.exponent(1.0) is not None:
        return linear
    raise OptionError(
        f"hybrid: linear is {linear.name!r} ({linear.extra_repr()}), whose features do not estimate exp(scale q k), so "
        "that they have no scale in common with an exact window; wanted favor, hedgehog, macformer or taylor with an "
        "exponential kernel and without ppsbn='batch', or rfa without a gate"
    )


def _absorbed(tokens: Tokens, features: Features, sums: Sums) -> Sums:
    return accumulate(tokens.k, tokens.v, features, tokens.mask, sums) if tokens.k.shape[2] else sums


def _flipped(parts: list[Reading]) -> Reading:
    """Readings of successive queries as one, the last query first."""

    def joined(found: Iterable[Tensor], dim: int) -> Tensor:
        return torch.cat(list(found), dim).flip(dim)

    scales = [r.log_scale for r in parts if r.log_scale is not None]
    constants = [r.constant for r in parts if r.constant is not None]
    return Reading(
        joined((r.numerator for r in parts), -2),
        joined((r.denominator for r in parts), -1),
        joined((r.magnitude for r in parts), -1),
        joined(scales, -1) if scales else None,
        (joined((n for n, _ in constants), -2), joined((d for _, d in constants), -1)) if constants else None,
    )


def _rows(reading: Reading, rows: slice) -> Reading:
    """What some of the queries read."""
    log_scale, constant = reading.log_scale, reading.constant
    return Reading(
        reading.numerator[..., rows, :],
        reading.denominator[..., rows],
        reading.magnitude[..., rows],
        None if log_scale is None else log_scale[..., rows],
        None if constant is None else (constant[0][..., rows, :], constant[1][..., rows]),
    )

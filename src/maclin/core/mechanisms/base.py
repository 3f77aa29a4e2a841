"""The contract of every mechanism: what is checked, refused and returned, in one place."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..causal import attend_causal
from ..contract import Features, Sums, attend, empty_sums
from ..errors import CapabilityError, InputError, OptionError
from ..fast.kept import Kept
from ..fast.maps import Maps
from ..kernels import Kernel
from ..norms import WideBuffers

State = tuple[Tensor, ...]


class Mechanism(WideBuffers, ABC):
    """Attention from q, k and v to out, under one call contract.

    Args:
        head_dim: D, width of each head of q and k.
        num_heads: H, heads of q and out.
        num_kv_heads: Hk, heads of k and v; divides H (default H).

    Attributes:
        config: the constructor's options beyond the sizes, JSON values; ``mechanism(name, **sizes, **config)``
            builds the like again (a random draw comes from the state_dict).

    Raises:
        OptionError: sizes that are not positive or do not divide.
    """

    name: ClassVar[str]
    causal: bool = False
    """Whether ``is_causal`` and with it ``state`` are understood."""
    bidirectional: bool = True
    """Whether a call without ``is_causal`` is understood."""
    aligned: bool = False
    """Whether a query's own position among the keys counts, so that keys of another sequence mean nothing to it."""

    def __init__(self, head_dim: int, num_heads: int, num_kv_heads: int | None = None) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for label, size in (("head_dim", head_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if size < 1:
                raise OptionError(f"{self.name}: {label} is {size}; wanted a positive integer")
        if num_heads % num_kv_heads:
            raise OptionError(
                f"{self.name}: num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}; "
                "each key head serves the same number of query heads"
            )
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.config: dict[str, Any] = {}
        self._kept = Kept[Any]()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Attention of q over k and v.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, Hk, S, D).
            v: values (B, Hk, S, Dv).
            key_mask: (B, S) bool, True = attend; None attends to all.
            is_causal: query i sees the keys up to its own position, the last query being aligned with the
                last key; needs N <= S.
            scale: factor of the logits; None is 1/sqrt(D) where logits exist, 1 where the formula has none.
            cu_seqlens: (sequences + 1,) integers, 0 first and N last: B = 1 holds several sequences end to
                end, and none sees another. Read on the host once per call.
            state: what an earlier causal call returned; k and v are then the new tokens only.
            return_state: also return the state after the last key (causal only).

        Returns:
            out (B, H, N, Dv) in v's dtype (under autocast, in autocast's); with ``return_state`` the pair of out and
            the state, a flat tuple of tensors with the batch first. A query that may attend to nothing gives 0.

        Raises:
            InputError: shapes, dtypes or devices that do not fit; the message says which were wanted.
            CapabilityError: the mechanism lacks what was asked for; the message names one that has it.
        """
        device = q.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # as torch's own attention: inputs in autocast's dtype; without this the sums would be in it, too
            dtype = torch.get_autocast_dtype(device)
            q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
            with torch.autocast(device, enabled=False):
                return self.forward(
                    q,
                    k,
                    v,
                    key_mask=key_mask,
                    is_causal=is_causal,
                    scale=scale,
                    cu_seqlens=cu_seqlens,
                    state=state,
                    return_state=return_state,
                )
        self.check_inputs(q, k, v, key_mask)
        self._check_call(q, k, is_causal, scale, state is not None or return_state)
        if cu_seqlens is not None:
            return self._packed(q, k, v, key_mask, is_causal, scale, cu_seqlens, state, return_state)
        if q.numel() == 0 and not is_causal:
            return v.new_zeros(*q.shape[:-1], v.shape[-1])
        if is_causal:
            out, new_state = self._causal(q, k, v, key_mask, self._scale(scale), state)
            return (out, new_state) if return_state else out
        return self._bidirectional(q, k, v, key_mask, self._scale(scale))

    @abstractmethod
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        """out (B, H, N, Dv); inputs are checked."""

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        """out and the state after the last key; inputs are checked. Only reached where ``causal`` is set."""
        raise CapabilityError(f"{self.name} has no causal form")

    @abstractmethod
    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """Multiply-adds per head of one bidirectional call."""

    @property
    def learns_from_data(self) -> bool:
        """Whether ``maclin.calibrate`` sets something, so that without data this is not what it could be."""
        return False

    def calibrated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Mechanism:
        """A copy with whatever it learns from data set from q, k and v; here nothing."""
        return copy.deepcopy(self)

    def extra_repr(self) -> str:
        """Sizes and options."""
        sizes = f"head_dim={self.head_dim}, num_heads={self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            sizes += f", num_kv_heads={self.num_kv_heads}"
        return ", ".join([sizes, *(f"{key}={value!r}" for key, value in self.config.items())])

    def _scale(self, scale: float | None) -> float:
        return 1.0 / math.sqrt(self.head_dim) if scale is None else float(scale)

    def check_inputs(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> None:
        """Refuse tensors that do not have the form that the contract asks for; raises InputError."""
        for label, x, heads, width in (
            ("q", q, self.num_heads, self.head_dim),
            ("k", k, self.num_kv_heads, self.head_dim),
            ("v", v, self.num_kv_heads, None),
        ):
            if x.dim() != 4 or x.shape[1] != heads or (width is not None and x.shape[3] != width):
                raise InputError(
                    f"{self.name}: {label} has shape {tuple(x.shape)}; "
                    f"wanted (batch, {heads}, tokens, {'any' if width is None else width})"
                )
        if q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0] or k.shape[2] != v.shape[2]:
            raise InputError(
                f"{self.name}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; "
                "wanted one batch size, and as many values as keys"
            )
        if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
            raise InputError(
                f"{self.name}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; wanted one floating dtype"
            )
        if q.device != k.device or q.device != v.device:
            raise InputError(f"{self.name}: q, k, v are on {q.device}, {k.device}, {v.device}; wanted one device")
        if key_mask is None:
            return
        if key_mask.shape != (k.shape[0], k.shape[2]) or key_mask.dtype != torch.bool or key_mask.device != k.device:
            raise InputError(
                f"{self.name}: key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype} on "
                f"{key_mask.device}; wanted ({k.shape[0]}, {k.shape[2]}) bool with True = attend on {k.device}"
            )

    def check_scale(self, scale: float | None) -> None:
        """Refuse a scale that is neither None nor positive; raises InputError."""
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise InputError(f"{self.name}: scale is {scale}; wanted a positive finite number, or None")

    def _check_call(
        self,
        q: Tensor,
        k: Tensor,
        is_causal: bool,
        scale: float | None,
        wants_state: bool,
    ) -> None:
        self.check_scale(scale)
        if is_causal and not self.causal:
            raise CapabilityError(
                f"{self.name} cannot honour is_causal=True: it mixes positions before it attends, so the past would "
                "see the future; mechanisms that can are macformer, elu, favor, rfa, window and softmax"
            )
        if is_causal and q.shape[2] > k.shape[2]:
            raise CapabilityError(
                f"{self.name}: is_causal with {q.shape[2]} queries and {k.shape[2]} keys; wanted at least as many keys "
                "as queries, since the last query is aligned with the last key"
            )
        if wants_state and not is_causal:
            raise CapabilityError(
                f"{self.name}: state and return_state need is_causal=True; without it every query sees every key"
            )
        if not is_causal and not self.bidirectional:
            raise CapabilityError(
                f"{self.name} as configured ({self.extra_repr()}) needs is_causal=True, because it works along time"
            )

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        cu_seqlens: Tensor,
        state: State | None,
        return_state: bool,
    ) -> Tensor:
        if state is not None or return_state:
            raise CapabilityError(f"{self.name}: cu_seqlens and state exclude each other; call once per sequence")
        bounds = [int(b) for b in cu_seqlens.flatten().tolist()]
        if (
            cu_seqlens.dim() != 1
            or cu_seqlens.is_floating_point()
            or len(bounds) < 2
            or bounds[0] != 0
            or bounds[-1] != k.shape[2]
            or any(a > b for a, b in pairwise(bounds))
        ):
            shown = bounds if len(bounds) < 9 else [*bounds[:4], "...", *bounds[-4:]]
            raise InputError(
                f"{self.name}: cu_seqlens is {shown} with shape {tuple(cu_seqlens.shape)} and dtype "
                f"{cu_seqlens.dtype}; wanted one row of ascending integers from 0 to the number of tokens, {k.shape[2]}"
            )
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise InputError(
                f"{self.name}: cu_seqlens with q {tuple(q.shape)} and k {tuple(k.shape)}; wanted batch 1 and as many "
                "queries as keys, sequences end to end"
            )
        parts = [
            self.forward(
                q[:, :, a:b],
                k[:, :, a:b],
                v[:, :, a:b],
                key_mask=None if key_mask is None else key_mask[:, a:b],
                is_causal=is_causal,
                scale=scale,
            )
            for a, b in pairwise(bounds)
            if b > a
        ]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(tensors, dim=2) if tensors else v.new_zeros(*q.shape[:-1], v.shape[-1])


class Exponent(NamedTuple):
    """What features estimate, where it is an exponential: <phi(q), phi(k)> exp(left_out(q)) ~ exp(<query(q), key(k)>).

    query maps (B, H, n, D), key (B, Hk, n, D) to as many vectors; left_out gives (B, H, n), None where it is 0: a
    factor of a query cancels under one normaliser, so that features need not have it. scale is that of <q, k> where
    query and key do nothing else; None where they do.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    left_out: Callable[[Tensor], Tensor] | None = None
    scale: float | None = None

    @classmethod
    def of_product(cls, scale: float) -> Exponent:
        """exp(scale q k)."""
        return cls(lambda q: q * scale, lambda k: k, None, scale)


class FeatureMechanism(Mechanism):
    """A mechanism that is a feature map in the one contraction; causal, with a state of constant size."""

    causal = True

    def exponent(self, scale: float) -> Exponent | None:
        """What the features estimate; here None, which is no exponential."""
        return None

    @abstractmethod
    def features(self, scale: float) -> Features:
        """The maps of q and k for this scale of the logits."""

    def kept_maps(self, make: Callable[[], Maps], *parts: Any) -> Maps:
        """Maps, made anew only where one of the tensors or numbers that they depend on has changed."""
        if torch.compiler.is_compiling():
            return make()
        # what is made in inference mode, or without gradients, cannot be used where they are wanted
        return self._kept.get(make, (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *parts))

    def feature_map(self, x: Tensor, scale: float | None = None) -> Tensor:
        """Features of keys x (B, Hk, n, D) -> (B, Hk, n, M), M at most num_features; for inspection."""
        features = self.features(self._scale(scale))
        phi = features.key(x)
        return phi.exp() if features.log_domain else phi

    def query_map(self, x: Tensor, scale: float | None = None) -> Tensor:
        """Features of queries x (B, H, n, D) -> (B, H, n, M); for inspection."""
        features = self.features(self._scale(scale))
        phi = features.query(x)
        return phi.exp() if features.log_domain else phi

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return attend(q, k, v, self.features(scale), key_mask)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        features = self.features(scale)
        out, sums = attend_causal(q, k, v, features, key_mask, self._sums(state, k, v, features))
        return out, tuple(sums)

    def _sums(self, state: State | None, k: Tensor, v: Tensor, features: Features) -> Sums | None:
        if state is None:
            return None
        wanted = empty_sums(k[:, :, :0], v[:, :, :0], features)
        if len(state) != len(wanted) or any(a.shape != b.shape for a, b in zip(state, wanted, strict=True)):
            raise InputError(
                f"{self.name}: state has shapes {[tuple(a.shape) for a in state]}; wanted "
                f"{[tuple(b.shape) for b in wanted]}: pass what this mechanism returned for this batch"
            )
        return Sums(*state)

    def cost(self, num_queries: int, num_keys: int, value_dim: int) -> int:
        """(N + S) x (projections x D + M x (Dv + 1))."""
        features = self.features(self._scale(None))
        making = features.num_projections * self.head_dim
        return (num_queries + num_keys) * (making + features.num_features * (value_dim + 1))


def calibrate(
    mech: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Mechanism:
    """A new mechanism with what it learns from data set from these q, k and v; ``mech`` stays as it is.

    For macformer: the kernel where it is "auto", the running statistics of ppsbn="batch", a learned temperature,
    and of estimator="stratified" the number of features, centres, bases and monomials; ``mech.calibration`` says what
    was chosen and which error to expect. Others return a copy.

    Args:
        mech: the mechanism.
        q: queries (B, H, N, D) of several sequences; a third of them is held back to measure on.
        k: keys (B, Hk, S, D).
        v: values (B, Hk, S, Dv).
        key_mask: (B, S) bool, True = attend.
        is_causal: whether the mechanism will be used so.
        scale: of the logits it will be used with; None as in the call.

    Raises:
        InputError: shapes that do not fit the mechanism, too few tokens to learn from (macformer: 4 per axis of a
            head), or numbers that are not finite.

    Example:
        >>> mech = maclin.mechanism("macformer", head_dim=64, num_heads=8, num_features="auto", tolerance=0.1)
        >>> mech = maclin.calibrate(mech, q, k, v, mask)
        >>> mech.calibration.num_features, mech.calibration.rel_error
    """
    mech.check_inputs(q, k, v, key_mask)
    mech.check_scale(scale)
    if k.shape[0] * k.shape[2] == 0 or (key_mask is not None and not bool(key_mask.any())):
        raise InputError(f"{mech.name}: no token to calibrate on; pass q, k, v with at least one attended key")
    return mech.calibrated(q, k, v, key_mask, is_causal=is_causal, scale=scale)


def check_choice(name: str, option: str, value: object, known: tuple[object, ...]) -> None:
    """Refuse a value that is not among the known ones, and list them."""
    if value not in known:
        raise OptionError(f"{name}: {option} is {value!r}; known are {', '.join(repr(k) for k in known)}")


def check_num_features(name: str, num_features: int, least: int, multiple: int = 1) -> None:
    """Refuse a number of features that is too small or does not divide."""
    if num_features < least or num_features % multiple:
        also = f" that is a multiple of {multiple}" if multiple > 1 else ""
        raise OptionError(f"{name}: num_features is {num_features}; wanted an integer of at least {least}{also}")


def kernel_option(kernel: str | Kernel) -> str:
    """What a kernel is called in a configuration."""
    return kernel.name if isinstance(kernel, Kernel) else kernel

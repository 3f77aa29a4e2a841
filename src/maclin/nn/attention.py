"""MultiheadAttention: torch's module of that name, over any mechanism."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import mechanisms
from ..core.errors import CapabilityError, InputError, OptionError
from ..core.mechanisms import Mechanism
from ..core.mechanisms.base import State
from .masks import is_causal_of, key_mask_of
from .positions import Rotary, Rotation, check_rotary, positions_of


class MultiheadAttention(nn.Module):
    """Attention over several heads: out_proj(mechanism(q, k, v)), a drop-in for ``torch.nn.MultiheadAttention``.

    Constructor, parameters (names, shapes, start) and call are torch's, so checkpoints load both ways; masks mean
    what they mean there (True = ignore). What differs, since most mechanisms never make attention weights:

    - the second result is always None, whatever ``need_weights`` says;
    - the only mask over queries and keys is the causal one: pass ``is_causal=True``, no ``attn_mask`` is needed.
      One that is passed is read, which costs as much as it holds. With fewer queries than keys the last query is
      aligned with the last key;
    - ``dropout``, which drops attention weights, is for softmax only;
    - a query that may attend to nothing gives the bias of ``out_proj``, never NaN.

    Args:
        embed_dim: E, width of queries and output.
        num_heads: H; the width of a head is E / H.
        dropout: probability that an attention weight is dropped in train mode; mechanism="softmax" only.
        bias: whether the projections have one.
        add_bias_kv: not supported.
        add_zero_attn: not supported.
        kdim: width of keys (default E).
        vdim: width of values (default E).
        batch_first: whether inputs are (B, N, E) instead of torch's (N, B, E).
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: Hk, heads of keys and values; divides H (default H). With fewer, k and v are projected to
            Hk x E / H channels.
        mechanism: a name, or a built mechanism with heads of this number and width.
        position: "rotary" turns q and k by their positions (self-attention only); None does not.
        options: of the named mechanism. What it draws comes from ``generator``, or from a generator that torch's
            state seeds without moving on, so that equal seeds give equal parameters under every mechanism.

    Raises:
        OptionError: sizes that do not divide, options that are unknown or not supported.
        CapabilityError: dropout or rotary positions with a mechanism that cannot.

    Example:
        >>> attention = maclin.nn.MultiheadAttention(256, 8, batch_first=True, mechanism="efficient")
        >>> out, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        mechanism: str | Mechanism = "macformer",
        position: Literal["rotary"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise OptionError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}; wanted positive numbers, the first a "
                "multiple of the "
                "second"
            )
        for option, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise OptionError(
                    f"{option}=True is not supported: it adds a key to every sequence, which counts in a "
                    "mechanism's sums "
                    "as any other; add a token to key and value instead"
                )
        if position not in (None, "rotary"):
            raise OptionError(f"position is {position!r}; known are 'rotary' and None")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        # torch's encoder asks for this before it takes its fused path, which would attend by softmax past this module
        self._qkv_same_embed_dim = False
        self.in_proj_weight: nn.Parameter | None = None
        self.q_proj_weight: nn.Parameter | None = None
        self.k_proj_weight: nn.Parameter | None = None
        self.v_proj_weight: nn.Parameter | None = None
        self.in_proj_bias: nn.Parameter | None = None
        self._add_parameters(bias, device, dtype)
        self.mechanism = self._mechanism(mechanism, options).to(device=device, dtype=dtype)
        self.rotary = Rotary(self.head_dim) if position == "rotary" else None
        if self.rotary is not None:
            check_rotary(self.mechanism)

    @property
    def kv_embed_dim(self) -> int:
        """Channels of all key heads together."""
        return self.num_kv_heads * self.head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention as torch calls it.

        Args:
            query: (N, B, E), or (B, N, E) with ``batch_first``, or (N, E) for a single sequence.
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S), or (S,) for a single sequence; bool with True = ignore, or floats 0 and -inf.
            need_weights: ignored; there are none.
            attn_mask: only the causal mask (N, S), or one that masks nothing.
            average_attn_weights: ignored.
            is_causal: each query attends to keys up to its own position.

        Returns:
            out, shaped as query, and None.

        Raises:
            InputError: shapes that do not fit.
            CapabilityError: a mask or nested tensor that cannot be honoured, or what the mechanism lacks.
        """
        self._check(query, key, value)
        single = query.dim() == 2
        if single:
            query, key, value = self._each(query, key, value, lambda x: x[None])
        elif not self.batch_first:
            query, key, value = self._each(query, key, value, lambda x: x.transpose(0, 1))
        key_mask = key_mask_of(key_padding_mask, key.shape[0], key.shape[1])
        causal = is_causal_of(attn_mask, is_causal, query.shape[1], key.shape[1])
        out, _ = self.attend(query, key, value, key_mask=key_mask, is_causal=causal)
        if single:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        rotation: Rotation | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """Attention as mechanisms call it: batch first, True = attend, with the state of a causal mechanism.

        Args:
            query: (B, N, E).
            key: (B, S, kdim); the same object as query in self-attention saves two products.
            value: (B, S, vdim).
            key_mask: (B, S) bool, True = attend.
            is_causal: as in the contract of mechanisms.
            rotation: what turns q and k; None with position="rotary" counts the attended tokens from 0.
            state: what an earlier causal call returned; key and value are then the new tokens only.
            return_state: also return the state after the last key.

        Returns:
            out (B, N, E), and the state or None.
        """
        q, k, v = self._projected(query, key, value)
        if rotation is None and self.rotary is not None:
            rotation = self._rotation(query, key, key_mask, state)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        made = self.mechanism(q, k, v, key_mask=key_mask, is_causal=is_causal, state=state, return_state=return_state)
        out, new_state = made if return_state else (made, None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), new_state

    def extra_repr(self) -> str:
        """Sizes."""
        widths = "" if self.kdim == self.vdim == self.embed_dim else f", kdim={self.kdim}, vdim={self.vdim}"
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}{widths}, batch_first={self.batch_first}"

    def _add_parameters(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Parameters as torch names, shapes and starts them, drawn in its order."""

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        embed_dim, kv_embed_dim = self.embed_dim, self.kv_embed_dim
        packed = self.kdim == self.vdim == embed_dim
        if packed:
            self.in_proj_weight = empty(embed_dim + 2 * kv_embed_dim, embed_dim)
        else:
            self.q_proj_weight = empty(embed_dim, embed_dim)
            self.k_proj_weight = empty(kv_embed_dim, self.kdim)
            self.v_proj_weight = empty(kv_embed_dim, self.vdim)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(embed_dim + 2 * kv_embed_dim, device=device, dtype=dtype))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def _mechanism(self, mechanism: str | Mechanism, options: dict[str, Any]) -> Mechanism:
        if isinstance(mechanism, Mechanism):
            if options:
                raise OptionError(
                    f"options {sorted(options)} go with a mechanism's name, and this one is built already"
                )
            theirs = (mechanism.head_dim, mechanism.num_heads, mechanism.num_kv_heads)
            ours = (self.head_dim, self.num_heads, self.num_kv_heads)
            if theirs != ours:
                raise OptionError(
                    f"the mechanism has (head_dim, num_heads, num_kv_heads) {theirs}; wanted {ours}, from embed_dim "
                    f"{self.embed_dim} and num_heads {self.num_heads}"
                )
            name = ""
        else:
            name = mechanism
        if self.dropout and name != "softmax":
            raise CapabilityError(
                f"dropout={self.dropout} drops attention weights, and "
                + (
                    f"{name} never makes them; pass dropout=0"
                    if name
                    else "the mechanism is built already; pass dropout=0"
                )
                + " or mechanism='softmax'"
            )
        if isinstance(mechanism, Mechanism):
            return mechanism
        if self.dropout:
            options = {"dropout_p": self.dropout, **options}
        if mechanisms.row(name).takes_generator and options.get("generator") is None:
            options = {**options, "generator": _generator()}
        return mechanisms.mechanism(
            name, head_dim=self.head_dim, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, **options
        )

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise CapabilityError(
                "got a nested tensor; pass a padded one with key_padding_mask (torch.nn.TransformerEncoder makes "
                "nested "
                "tensors unless it is built with enable_nested_tensor=False)"
            )
        wanted = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        dims = {x.dim() for _, x, _ in wanted}
        batch = 0 if self.batch_first else 1
        fits = len(dims) == 1 and query.dim() in (2, 3) and all(x.shape[-1] == width for _, x, width in wanted)
        if fits and query.dim() == 3:
            fits = query.shape[batch] == key.shape[batch]
        if not fits or key.shape[:-1] != value.shape[:-1]:
            form = "(batch, tokens, width)" if self.batch_first else "(tokens, batch, width)"
            raise InputError(
                ", ".join(f"{label} has shape {tuple(x.shape)}" for label, x, _ in wanted)
                + f"; wanted {form} or (tokens, width) each, one batch size, as many values as keys, and widths "
                + ", ".join(str(width) for _, _, width in wanted)
            )

    @staticmethod
    def _each(query: Tensor, key: Tensor, value: Tensor, change: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Change all three, keeping those that are the same tensor the same."""
        new_query = change(query)
        new_key = new_query if key is query else change(key)
        return new_query, new_key, new_key if value is key else change(value)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k (B, Hk, S, D), v (B, Hk, S, D)."""
        sizes = [self.embed_dim, self.kv_embed_dim, self.kv_embed_dim]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = F.linear(query, weight, bias).split(sizes, dim=-1)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if weight is not None:
                weights = weight.split(sizes)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            q, k, v = (
                F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True) if w is not None
            )
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, heads x D) -> (B, heads, N, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotation(self, query: Tensor, key: Tensor, key_mask: Tensor | None, state: State | None) -> Rotation:
        assert self.rotary is not None
        if state is not None:
            raise CapabilityError(
                "position='rotary' with state= needs rotation=, since the state does not say the position"
            )
        if query.shape[1] != key.shape[1]:
            raise CapabilityError(
                f"position='rotary' with {query.shape[1]} queries and {key.shape[1]} keys: positions of two "
                "sequences are "
                "not comparable; build cross-attention with position=None"
            )
        return self.rotary(positions_of(key_mask, key.shape[1], key.device), from_zero=True)


def _generator() -> torch.Generator:
    """A generator that torch's own state seeds, without moving it on."""
    with torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2**62, ()))
    return torch.Generator().manual_seed(seed)

"""Decoding with a state of constant size: a layer of transformers' caches that holds sums in place of keys.

transformers hands every attention module one cache, and the module calls ``cache.update(k, v, layer_idx)`` before
it attends. A converted causal layer puts its own kind of layer there, when it sees the cache for the first time: that
layer's ``update`` gives back the new keys only, marked with where they come from, and ``attend`` reads and renews
the state. So every way to a cache works alike: ``generate``, ``use_cache=True`` and one made by hand. Layers that stay
exact keep their keys in the same cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

from maclin.adopt.hosts.base import MECHANISM, AttentionCall
from maclin.core.errors import CapabilityError, InputError
from maclin.core.mechanisms import Mechanism
from maclin.core.mechanisms.base import State

_MARK = "maclin_cache_layer"
_PREPARE = "_prepare_cache_for_generation"
_KEEPS_KEYS = "softmax"  # its state would be the past keys and values, which the host's own layer holds as well
_DYNAMIC = (None, "dynamic", "dynamic_full", "offloaded")
_CROP = (
    "a converted layer holds sums over all tokens before, from which none can be taken out again, as assisted decoding "
    "and cropping ask; generate without assistant_model and prompt_lookup_num_tokens, or call maclin.restore_(model)"
)


class StateLayer(CacheLayerMixin):
    """One layer of a cache: the state of a mechanism, whose size does not depend on the tokens before.

    Attributes:
        state: what the mechanism returned after the last token; None before the first.
        made_by: name and configuration of that mechanism.
        num_seen: tokens before the next, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:  # the host's own sets keys and values, which this layer does not have
        self.is_initialized = False
        self.state: State | None = None
        self.made_by: tuple[str, dict[str, Any]] | None = None
        self.num_seen = 0
        self._expected = False

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values"):
            raise CapabilityError(
                f"a converted layer caches a state of constant size and no {name}; use the cache as it is, leave "
                "return_dict_in_generate=True out where the host takes it apart, or call maclin.restore_(model)"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def nbytes(self) -> int:
        """Memory of the state."""
        return 0 if self.state is None else sum(tensor.nbytes for tensor in self.state)

    def expect(self, mechanism: Mechanism) -> None:
        """Announce that the next keys go to this mechanism.

        Raises:
            InputError: the state was made by another one.
            CapabilityError: the keys before these never came to a mechanism.
        """
        made_by = (mechanism.name, mechanism.config)
        if self.state is not None and self.made_by != made_by:
            raise InputError(
                f"this cache was filled by {self.made_by}, and the layer is {made_by} now, as if the model had been "
                "converted again since; start with a new cache"
            )
        if self._expected:
            raise CapabilityError(
                "the keys of the call before this one did not reach the layer's mechanism: that call failed, or this "
                "architecture changes its keys behind the cache. Start with a new cache; if this comes again, leave "
                "the layer out of the conversion or pass use_cache=False"
            )
        self.made_by, self._expected = made_by, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # (B, Hk, N, D), (B, Hk, N, Dv)
        """The new keys and values alone, marked as coming from here; ``attend`` adds them to the state.

        Raises:
            InputError: no converted layer asked, so that the host would attend to the new tokens only.
        """
        if not self._expected:
            raise InputError(
                "this cache holds states of a converted model, and the layer that asks is not converted (any more); "
                "start with a new cache"
            )
        self.is_initialized = True
        self.num_seen += key_states.shape[-2]
        keys = key_states.view(key_states.shape)  # a tensor of its own, for the mark
        setattr(keys, _MARK, self)
        return keys, value_states

    def attend(self, mechanism: Mechanism, call: AttentionCall) -> Tensor:  # (B, H, N, Dv)
        """out of the new queries over everything so far; the state is renewed."""
        out, self.state = mechanism(
            call.q,
            call.k,
            call.v,
            key_mask=call.key_mask,
            is_causal=True,
            scale=call.scale,
            state=self.state,
            return_state=True,
        )
        self._expected = False
        return out

    def get_seq_length(self) -> int:
        """Tokens before the next, padding included."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the host's mask is to speak of, and where they start: all so far, whether kept or not."""
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit, by its earlier name."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first state comes from the mechanism."""

    def offload(self) -> None:
        """Nothing: the state is small, and stays."""

    def prefetch(self) -> None:
        """Nothing: the state has stayed."""

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row ``beam_idx[i]``, as beam search asks."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one after the other."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless there is nothing to remove."""
        if tokens_to_remove != 0:
            raise CapabilityError(_CROP)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = tuple(change(tensor) for tensor in self.state)


def layer_of(key: Tensor) -> StateLayer | None:
    """The cache layer whose ``update`` returned these keys; None where they are all keys there are."""
    return getattr(key, _MARK, None)


def new_keys(attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """The part of a padding mask (B, S) that speaks of the new keys (B, Hk, N, D); other masks as they are."""
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    return attention_mask[:, attention_mask.shape[1] - key.shape[2] :]


@dataclass
class Caching:
    """What was changed in a converted model so that its caches hold states; empty where nothing was."""

    hooks: list[RemovableHandle] = field(default_factory=list[RemovableHandle])
    generators: list[nn.Module] = field(default_factory=list[nn.Module])

    def renew(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Let these attention modules, and no others, keep states in whatever cache they are given.

        Args:
            root: the model; ``generate`` of it and of what is inside refuses from the start what a state cannot do.
            modules: attention modules that hold their mechanism; those that are not causal, or whose mechanism keeps
                all keys, are left alone.
        """
        self.remove()
        for module in modules:
            if getattr(module, "is_causal", True) and _mechanism(module) is not None:
                self.hooks.append(module.register_forward_pre_hook(_before, with_kwargs=True))
        for model in root.modules() if self.hooks else ():
            if hasattr(type(model), _PREPARE):
                # a partial and not a method, so that copies and pickles of the model carry one of their own
                setattr(model, _PREPARE, functools.partial(_prepare, model))
                self.generators.append(model)

    def remove(self) -> None:
        """The host's own caching again."""
        for hook in self.hooks:
            hook.remove()
        for model in self.generators:
            model.__dict__.pop(_PREPARE, None)
        self.hooks.clear()
        self.generators.clear()


def _mechanism(module: nn.Module) -> Mechanism | None:
    mechanism = module._modules.get(MECHANISM)
    return mechanism if isinstance(mechanism, Mechanism) and mechanism.name != _KEEPS_KEYS else None


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a converted module runs: its layer of the cache becomes one that holds a state."""
    mechanism = _mechanism(module)
    given = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    index = getattr(module, "layer_idx", None)
    if mechanism is None or given is None or index is None:
        return
    cache = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
        layer = cache.layers[index] = StateLayer()
    if isinstance(layer, StateLayer):
        layer.expect(mechanism)
    elif type(layer) is not DynamicLayer:  # one with keys, from before the conversion: they are all read at each step
        what = "a fixed number of keys" if isinstance(layer, StaticLayer) else f"its keys in a {type(layer).__name__}"
        raise CapabilityError(f"{_called(type(given).__name__, what)}; {_INSTEAD}")


_INSTEAD = (
    "leave cache_implementation out, or pass transformers.DynamicCache(config=model.config), in which every converted "
    "layer keeps a state of constant size"
)


def _called(cache: str, what: str) -> str:
    return f"wanted a dynamic cache, got a {cache} that keeps {what}, which a converted layer does not read"


def _prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *rest: Any) -> Any:
    """``_prepare_cache_for_generation`` of a converted model: the host's, after what cannot work was refused."""
    if getattr(mode, "value", mode) == "assisted_generation" or getattr(generation_config, "is_assistant", False):
        raise CapabilityError(_CROP)
    kind = getattr(generation_config, "cache_implementation", None)
    if kind not in _DYNAMIC:
        raise CapabilityError(f"{_called(f'{kind} cache', 'keys')}; {_INSTEAD}")
    return getattr(type(model), _PREPARE)(model, generation_config, model_kwargs, mode, *rest)

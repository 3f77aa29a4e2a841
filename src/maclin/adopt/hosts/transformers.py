"""transformers models: finding their attention layers, watching them, and swapping them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from maclin.adopt.hosts import interface
from maclin.adopt.hosts.base import MECHANISM, AttentionCall, AttentionLayer, Batch
from maclin.adopt.memory import explained
from maclin.core.errors import CapabilityError, InputError, MaclinError

_RECORD = "_maclin_conversion"
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_CROSS = ("crossattention", "encoder_attn", "encdecattention", "cross_attn")


@dataclass
class Conversion:
    """What ``remove`` needs to give a model back as it was; kept on the root, so that copies carry their own."""

    implementations: list[tuple[PreTrainedConfig, str | None]]
    hooks: list[RemovableHandle] = field(default_factory=list)


class TransformersHost:
    """A ``transformers`` model whose attention goes through its attention interface.

    Args:
        root: the model; layer names are relative to it.
    """

    name = "transformers"

    def __init__(self, root: nn.Module) -> None:
        if not isinstance(root, PreTrainedModel):
            raise InputError(f"wanted a transformers PreTrainedModel, got {type(root).__name__}")
        self.root: PreTrainedModel = root

    def layers(self, batch: Batch | None = None) -> tuple[AttentionLayer, ...]:
        """The attention layers, in the order of their first call.

        Args:
            batch: inputs to run the model on once; made up where None.

        Raises:
            CapabilityError: the model cannot run on these inputs, or its attention does not go through the
                attention interface.
        """
        discovery = _Discovery(self.root)
        inputs = example_batch(self.root) if batch is None else self._inputs(batch)
        with self._probing(discovery):
            try:
                self.root(**inputs)
            except MaclinError:
                raise
            except _FAILURES as error:
                failure = error
            else:
                failure = None
        if failure is not None and not self._runs(inputs):
            what = "made-up inputs" if batch is None else "the given inputs"
            raise CapabilityError(
                f"{type(self.root).__name__} cannot run on {what} ({type(failure).__name__}: {failure}); "
                "pass batch= with inputs that it can run on"
            ) from failure
        if failure is not None or not discovery.found:
            raise CapabilityError(
                f"{type(self.root).__name__} cannot be converted: its attention does not go through transformers' "
                "attention interface; wanted an architecture that does, such as BERT, RoBERTa, ViT, GPT-2 or Llama, "
                "or a later version of transformers"
            ) from failure
        return tuple(discovery.found.values())

    def _runs(self, inputs: dict[str, Any]) -> bool:
        with self._probing(None):
            try:
                self.root(**inputs)
            except (MaclinError, *_FAILURES):
                return False
        return True

    def observe(self, batch: Batch, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        """Run the model with exact attention and show ``callback`` every call of the modules in ``names``.

        Raises:
            InputError: the model cannot run on this batch.
            MaclinError: it does not fit in memory.
        """
        inputs = self._inputs(batch)
        with self._probing(_Observation(names, callback)):
            try:
                self.root(**inputs)
            except MaclinError:
                raise
            except (*_FAILURES, MemoryError) as error:
                shape = next((tuple(x.shape) for x in inputs.values() if isinstance(x, Tensor)), ())
                raise explained(error, f"a batch of shape {shape}", f"{type(self.root).__name__}'s inputs") from error

    @property
    def converted(self) -> bool:
        """Whether ``install`` was called and ``remove`` was not."""
        return self._record is not None

    def install(self, mechanisms: Mapping[nn.Module, nn.Module]) -> None:
        """Give each attention module its mechanism; replaces an earlier installation. All or nothing.

        Raises:
            CapabilityError: the model is set to return attention weights, or lies inside a converted one.
        """
        before = {m: m._modules[MECHANISM] for m in self.root.modules() if MECHANISM in m._modules}
        if before and not self.converted:
            raise CapabilityError(
                f"this {type(self.root).__name__} is part of a model that was converted as a whole; "
                "restore or convert the model that maclin.convert_ was given"
            )
        if any(getattr(config, "output_attentions", False) for config in _configs(self.root)):
            raise CapabilityError(f"the model's configuration sets {interface.no_weights()}")
        record = self._record or Conversion([(c, c._attn_implementation) for c in _configs(self.root)])
        try:
            self._place(mechanisms)
            if not self.converted:
                for module in self.root.modules():
                    if isinstance(module, PreTrainedModel):
                        record.hooks.append(module.register_forward_pre_hook(_refuse_weights, with_kwargs=True))
                for config, _ in record.implementations:
                    config._attn_implementation_internal = interface.NAME
                setattr(self.root, _RECORD, record)
        except BaseException:
            self._place(before)
            if not before:
                self._undo(record)
            raise

    def remove(self) -> None:
        """Give the model back its own attention."""
        record = self._record
        if record is not None:
            self._place({})
            self._undo(record)

    @property
    def _record(self) -> Conversion | None:
        return self.root.__dict__.get(_RECORD)

    def _place(self, mechanisms: Mapping[nn.Module, nn.Module | None]) -> None:
        for module in self.root.modules():
            module._modules.pop(MECHANISM, None)
        for module, mechanism in mechanisms.items():
            module.add_module(MECHANISM, mechanism)

    def _undo(self, record: Conversion) -> None:
        for hook in record.hooks:
            hook.remove()
        for config, implementation in record.implementations:
            config._attn_implementation_internal = implementation
        self.root.__dict__.pop(_RECORD, None)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        given = {self.root.main_input_name: batch} if isinstance(batch, Tensor) else batch
        if not hasattr(given, "items"):
            raise InputError(f"wanted a batch as a mapping of tensors, or one tensor, got {type(batch).__name__}")
        device = self.root.device
        return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in given.items()}

    @contextmanager
    def _probing(self, probe: interface.Probe | None) -> Iterator[None]:
        """Evaluation without gradients, with ``probe`` in place of attention if there is one."""
        implementations = [(config, config._attn_implementation) for config in _configs(self.root)]
        modes = [(module, module.training) for module in self.root.modules()]
        token = interface.ACTIVE_PROBE.set(probe)
        try:
            self.root.eval()
            for config, _ in implementations if probe is not None else ():
                config._attn_implementation_internal = interface.PROBE
            with torch.no_grad():
                yield
        finally:
            interface.ACTIVE_PROBE.reset(token)
            for config, implementation in implementations:
                config._attn_implementation_internal = implementation
            for module, training in modes:
                module.training = training


class _Discovery:
    """Finds the attention modules of a model, and what speaks against replacing each."""

    def __init__(self, root: nn.Module) -> None:
        self.names = {module: name for name, module in root.named_modules()}
        self.found: dict[nn.Module, AttentionLayer] = {}
        self.masks: list[tuple[Tensor, bool | None]] = []  # with causal or not, None where neither says it all

    def mask(self, **kwargs: Any) -> Tensor | None:
        plain = interface.is_plain(kwargs)
        made = interface.key_mask(kwargs) if plain else interface.mask(**kwargs)
        if made is None:
            shape = (kwargs["batch_size"], kwargs["kv_length"])
            made = torch.ones(shape, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        function = kwargs.get("mask_function", interface.causal_mask_function)
        self.masks.append((made, (function is interface.causal_mask_function) if plain else None))
        return made

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen = self.found.get(module)
        if seen is not None:
            self.found[module] = replace(seen, calls=seen.calls + 1)
        elif module in self.names:
            causal = interface.causal_flag(module, kwargs.get("is_causal"))
            self.found[module] = AttentionLayer(
                name=self.names[module],
                module=module,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_dim=query.shape[-1],
                value_dim=value.shape[-1],
                is_causal=causal,
                refused=self._reason(module, query, key, value, attention_mask, causal, kwargs),
            )
        return interface.exact(module, query, key, value, attention_mask, **kwargs)

    def _reason(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        causal: bool,
        kwargs: dict[str, Any],
    ) -> str | None:
        reason = interface.reason_against(kwargs)
        if reason is not None:
            return reason
        labels = (type(module).__name__.lower(), self.names[module].lower().rpartition(".")[2])
        if query.shape[2] != key.shape[2] or any(mark in label for mark in _CROSS for label in labels):
            return "it is cross-attention: its keys come from another sequence"
        if attention_mask is not None:
            causal_masks = [says for made, says in self.masks if made is attention_mask]
            if not causal_masks:
                return "the model builds its attention mask itself, outside transformers' mask interface"
            if causal_masks[0] is None:
                return "its mask is more than padding and causality (a sliding window, packed sequences or an overlay)"
            if causal_masks[0] != causal:
                return f"its is_causal flag ({causal}) and its mask ({causal_masks[0]}) disagree"
        if not _is_softmax(module, query, key, value, attention_mask, causal, kwargs):
            return "its own attention is not softmax(scale q kᵀ) v"
        return None


class _Observation:
    """Shows every call of the named modules to a callback."""

    def __init__(self, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        self.names = names
        self.callback = callback

    def mask(self, **kwargs: Any) -> Tensor | None:
        return interface.mask(**kwargs)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        name = self.names.get(module)
        if name is not None:
            scaling, is_causal = kwargs.get("scaling"), kwargs.get("is_causal")
            call = interface.as_call(module, name, query, key, value, attention_mask, scaling, is_causal, kwargs)
            self.callback(call)
        return interface.exact(module, query, key, value, attention_mask, **kwargs)


def _is_softmax(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the host's eager function computes what a mechanism is measured against, on these inputs."""
    eager = interface.eager_function(module)
    if eager is None:
        return True
    q, k, v = query.float(), key.float(), value.float()
    allowed = interface.dense_mask(attention_mask, causal, q, k)
    options = {**kwargs, "dropout": 0.0}
    theirs = eager(module, q, k, v, interface.additive(allowed, q.dtype), **options)[0]
    groups = q.shape[1] // k.shape[1]
    ours = nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(groups, 1),
        v.repeat_interleave(groups, 1),
        attn_mask=allowed,
        scale=kwargs.get("scaling"),
    ).transpose(1, 2)
    difference = (theirs - ours).abs()
    if allowed is not None:  # a row that may attend to nothing is nobody's business
        difference = difference * allowed.any(-1).transpose(1, 2)[..., None]
    limit = 1e-3 * ours.nan_to_num(0.0, 0.0, 0.0).abs().max() + 1e-6
    return bool(difference.nan_to_num(0.0, 0.0, 0.0).max() <= limit)  # what is not finite is found at capture


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise CapabilityError(interface.no_weights())


def _configs(root: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration that some module of the model may look its attention up in, each once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: object) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                add(getattr(config, key, None))

    for module in root.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def example_batch(root: PreTrainedModel) -> dict[str, Tensor]:
    """Small inputs that the model can run on: two sequences of 7 tokens, one of them padded, or one blank image.

    Raises:
        CapabilityError: the model takes something else.
    """
    name, config = root.main_input_name, root.config
    if name == "input_ids":
        vocab = config.get_text_config().vocab_size
        ids = torch.arange(3, 17, device=root.device).remainder(vocab).view(2, 7)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids[:, :5]
        return batch
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {name: torch.linspace(-1, 1, shape[1] * height * width, device=root.device).view(shape).to(root.dtype)}
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        batch = {name: torch.zeros(shape, device=root.device, dtype=root.dtype)}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.arange(3, 8, device=root.device)[None]
        return batch
    raise CapabilityError(
        f"{type(root).__name__} takes {name}, for which no example can be made up; pass batch= with inputs for it"
    )

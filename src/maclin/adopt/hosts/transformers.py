"""transformers models: finding their attention layers, watching them, and swapping them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from maclin.adopt.hosts import cache, interface
from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.adopt.hosts.common import FAILURES, check_whole, evaluating, failed, inputs_for, place, placed
from maclin.adopt.hosts.examples import example_batch, has_example
from maclin.adopt.hosts.probes import Discovery, Observation
from maclin.core.errors import CapabilityError, InputError, MaclinError

_RECORD = "_maclin_conversion"


@dataclass
class Conversion:
    """What ``remove`` needs to give a model back as it was; kept on the root, so that copies carry their own."""

    implementations: list[tuple[PreTrainedConfig, str | None]]
    hooks: list[RemovableHandle] = field(default_factory=list)
    caching: cache.Caching = field(default_factory=cache.Caching)


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
            CapabilityError: the model cannot run on these inputs, its attention does not go through the
                attention interface, or its weights are not in memory.
        """
        check_whole(self.root, converted=True)
        discovery = Discovery(self.root)
        inputs = example_batch(self.root) if batch is None else self._inputs(batch)
        with self._probing(discovery):
            try:
                self.root(**inputs)
            except MaclinError:
                raise
            except FAILURES as error:
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
                f"{type(self.root).__name__} cannot be converted: {_why_outside(self.root)}its attention does not go "
                "through transformers' attention interface; wanted an architecture that does, such as BERT, RoBERTa, "
                "ViT, GPT-2 or Llama, or a later version of transformers"
            ) from failure
        return tuple(discovery.found.values())

    def _runs(self, inputs: dict[str, Any]) -> bool:
        with self._probing(None):
            try:
                self.root(**inputs)
            except (MaclinError, *FAILURES):
                return False
        return True

    def observe(self, batch: Batch, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        """Run the model with exact attention and show ``callback`` every call of the modules in ``names``.

        Raises:
            InputError: the model cannot run on this batch.
            MaclinError: it does not fit in memory.
        """
        inputs = self._inputs(batch)
        with self._probing(Observation(names, callback)):
            try:
                self.root(**inputs)
            except MaclinError:
                raise
            except (*FAILURES, MemoryError) as error:
                raise failed(self.root, error, (), inputs) from error

    @property
    def has_example(self) -> bool:
        """Whether inputs can be made up for this architecture."""
        return has_example(self.root)

    @property
    def converted(self) -> bool:
        """Whether ``install`` was called and ``remove`` was not."""
        return self._record is not None

    def install(self, mechanisms: Mapping[nn.Module, nn.Module]) -> None:
        """Give each attention module its mechanism; replaces an earlier installation. All or nothing.

        Raises:
            CapabilityError: the model is set to return attention weights, or lies inside a converted one.
        """
        before = placed(self.root)
        check_whole(self.root, self.converted)
        if any(getattr(config, "output_attentions", False) for config in _configs(self.root)):
            raise CapabilityError(f"the model's configuration sets {interface.no_weights()}")
        record = self._record or Conversion([(c, c._attn_implementation) for c in _configs(self.root)])
        try:
            place(self.root, mechanisms)
            record.caching.renew(self.root, mechanisms)
            if not self.converted:
                for module in self.root.modules():
                    if isinstance(module, PreTrainedModel):
                        record.hooks.append(module.register_forward_pre_hook(_refuse_weights, with_kwargs=True))
                for config, _ in record.implementations:
                    config._attn_implementation_internal = interface.NAME
                setattr(self.root, _RECORD, record)
        except BaseException:
            place(self.root, before)
            record.caching.renew(self.root, before)
            if not before:
                self._undo(record)
            raise

    def remove(self) -> None:
        """Give the model back its own attention."""
        record = self._record
        if record is not None:
            place(self.root, {})
            self._undo(record)

    @property
    def _record(self) -> Conversion | None:
        return self.root.__dict__.get(_RECORD)

    def _undo(self, record: Conversion) -> None:
        record.caching.remove()
        for hook in record.hooks:
            hook.remove()
        for config, implementation in record.implementations:
            config._attn_implementation_internal = implementation
        self.root.__dict__.pop(_RECORD, None)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return inputs_for(self.root, batch, self.root.main_input_name)[1]

    @contextmanager
    def _probing(self, probe: interface.Probe | None) -> Iterator[None]:
        """Evaluation without gradients, with ``probe`` in place of attention if there is one."""
        implementations = [(config, config._attn_implementation) for config in _configs(self.root)]
        token = interface.ACTIVE_PROBE.set(probe)
        try:
            for config, _ in implementations if probe is not None else ():
                config._attn_implementation_internal = interface.PROBE
            with evaluating(self.root):
                yield
        finally:
            interface.ACTIVE_PROBE.reset(token)
            for config, implementation in implementations:
                config._attn_implementation_internal = implementation


def _why_outside(root: PreTrainedModel) -> str:
    """What a configuration says of logits that are more than scale q kᵀ, where the interface does not show them."""
    config = root.config.get_text_config()
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "it adds ALiBi biases to its logits, and "
    if getattr(config, "relative_attention", False) or hasattr(config, "relative_attention_num_buckets"):
        return "it adds relative positions to its logits, and "
    return ""


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

"""Models whose own modules call ``torch.nn.functional.scaled_dot_product_attention``: timm's, and anyone's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts.base import AttentionCall, AttentionLayer, Batch
from maclin.adopt.hosts.common import (
    FAILURES,
    check_whole,
    evaluating,
    failed,
    inputs_for,
    place,
    placed,
    reason_against_weights,
)
from maclin.adopt.hosts.redirect import (
    WATCHED,
    Arguments,
    Intercept,
    as_call,
    reason_against,
    redirected,
)
from maclin.core.errors import CapabilityError, MaclinError

_RECORD = "_maclin_conversion"
_SWITCH = "fused_attn"  # timm's, on each attention module: whether the fused function is called


@dataclass
class Conversion:
    """What ``remove`` needs: the modules, and the ``fused_attn`` of those that have one."""

    modules: list[nn.Module]
    switches: list[tuple[nn.Module, bool]]


class FunctionalHost:
    """A model with modules that call ``scaled_dot_product_attention`` themselves.

    Args:
        root: the model; layer names are relative to it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.name = "timm" if is_timm(root) else "torch.nn.functional"

    def layers(self, batch: Batch | None = None) -> tuple[AttentionLayer, ...]:
        """The attention layers, in the order of their first call.

        Args:
            batch: inputs to run the model on once; a blank image for timm's models where None.

        Raises:
            CapabilityError: the model cannot run on these inputs, no inputs can be made up, nothing calls the fused
                attention, or the weights are not in memory.
        """
        check_whole(self.root, converted=True)
        args, kwargs = ((self._image(),), {}) if batch is None else inputs_for(self.root, batch)
        names = {module: name for name, module in self.root.named_modules()}
        found: dict[nn.Module, AttentionLayer] = {}

        def note(module: nn.Module, given: Arguments) -> Tensor:
            seen = found.get(module)
            layer = _layer(module, names[module], given) if seen is None else replace(seen, calls=seen.calls + 1)
            found[module] = layer
            return given.own()

        try:
            with self._watching(note) as runs:
                self.root(*args, **kwargs)
        except FAILURES as error:
            what = "a made-up image" if batch is None else "the given inputs"
            raise CapabilityError(
                f"{type(self.root).__name__} cannot run on {what} "
                f"({type(error).__name__}: {error}); pass batch= with inputs that it can run on"
            ) from error
        if not found:
            raise CapabilityError(
                f"{type(self.root).__name__} cannot be converted: none of its modules calls "
                "torch.nn.functional.scaled_dot_product_attention, and it contains no model of transformers and no "
                "torch.nn.MultiheadAttention"
            )
        return tuple(_alone(layer, found, runs) for layer in found.values())

    def observe(self, batch: Batch, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        """Run the model with exact attention and show ``callback`` every call of the modules in ``names``.

        Raises:
            InputError: the model cannot run on this batch.
            MaclinError: it does not fit in memory.
        """

        def show(module: nn.Module, given: Arguments) -> Tensor:
            if module in names:
                callback(as_call(names[module], given))
            return given.own()

        args, kwargs = inputs_for(self.root, batch)
        with self._watching(show):
            try:
                self.root(*args, **kwargs)
            except MaclinError:
                raise
            except (*FAILURES, MemoryError) as error:
                raise failed(self.root, error, args, kwargs) from error

    @property
    def has_example(self) -> bool:
        """Whether this is one of timm's models, which take an image."""
        return self.name == "timm" and self._size() is not None

    @property
    def converted(self) -> bool:
        """Whether ``install`` was called and ``remove`` was not."""
        return _RECORD in self.root.__dict__

    def install(self, mechanisms: Mapping[nn.Module, nn.Module]) -> None:
        """Give each attention module its mechanism; replaces an earlier installation. All or nothing.

        Raises:
            CapabilityError: the model lies inside a converted one, or a module has a ``forward`` of its own already.
        """
        before = placed(self.root)
        check_whole(self.root, self.converted)
        self.remove()
        taken = [type(module).__name__ for module in mechanisms if "forward" in module.__dict__]
        try:
            if taken:
                raise CapabilityError(
                    f"the forward of a {taken[0]} was replaced by another library; convert first, and prepare the "
                    "model with that library afterwards"
                )
            self._switch(mechanisms)
        except BaseException:
            self.remove()
            place(self.root, {})
            if before:
                self._switch(before)
            raise

    def remove(self) -> None:
        """Give the model back its own attention."""
        record: Conversion | None = self.root.__dict__.pop(_RECORD, None)
        if record is None:
            return
        place(self.root, {})
        for module in record.modules:
            module.__dict__.pop("forward", None)
        for module, fused in record.switches:
            setattr(module, _SWITCH, fused)

    def _switch(self, mechanisms: Mapping[nn.Module, nn.Module | None]) -> None:
        switches = [(module, bool(getattr(module, _SWITCH))) for module in mechanisms if hasattr(module, _SWITCH)]
        self.root.__dict__[_RECORD] = Conversion(list(mechanisms), switches)
        place(self.root, mechanisms)
        for module in mechanisms:
            module.__dict__["forward"] = partial(redirected, module)
        for module, _ in switches:
            setattr(module, _SWITCH, True)

    @contextmanager
    def _watching(self, answer: Callable[[nn.Module, Arguments], Tensor]) -> Iterator[dict[nn.Module, int]]:
        """Evaluation without gradients, with ``answer`` in place of attention; yields how often each module runs."""
        running: list[nn.Module] = []
        runs: dict[nn.Module, int] = {}

        def enter(module: nn.Module, args: Any) -> None:
            running.append(module)
            runs[module] = runs.get(module, 0) + 1

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            running.pop()

        switches = [(m, bool(getattr(m, _SWITCH))) for m in self.root.modules() if hasattr(m, _SWITCH)]
        token = WATCHED.set(True)
        with ExitStack() as stack:
            stack.callback(WATCHED.reset, token)
            for module in self.root.modules():
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            for module, fused in switches:
                stack.callback(setattr, module, _SWITCH, fused)
                setattr(module, _SWITCH, True)
            stack.enter_context(evaluating(self.root))
            stack.enter_context(Intercept(lambda given: answer(running[-1], given) if running else given.own()))
            yield runs

    def _size(self) -> tuple[int, ...] | None:
        """(channels, height, width) of the images that a model of timm takes."""
        config: Any = getattr(self.root, "default_cfg", None) or {}
        size = config.get("input_size")
        made_for = getattr(getattr(self.root, "patch_embed", None), "img_size", None)
        return None if size is None else (size[0], *(made_for or size[1:]))

    def _image(self) -> Tensor:
        size = self._size() if self.name == "timm" else None
        if size is None:
            raise CapabilityError(
                f"what a {type(self.root).__name__} takes is not known, so that its attention layers cannot be found; "
                "wanted a model of transformers, sentence-transformers, timm or torch.nn, or batch= (or batches=) with "
                "inputs for this one"
            )
        parameter = next(self.root.parameters())
        numbers = torch.linspace(-1, 1, size[0] * size[1] * size[2], device=parameter.device, dtype=parameter.dtype)
        return numbers.view(1, *size)


def is_timm(root: nn.Module) -> bool:
    """Whether timm made some part of a model."""
    return any(type(module).__module__.startswith("timm.") for module in root.modules())


def _layer(module: nn.Module, name: str, given: Arguments) -> AttentionLayer:
    heads, _, width = given.query.shape[1:] if given.query.dim() == 4 else (0, 0, given.query.shape[-1])
    return AttentionLayer(
        name=name,
        module=module,
        num_heads=heads,
        num_kv_heads=given.key.shape[1] if given.key.dim() == 4 else 0,
        head_dim=width,
        value_dim=given.value.shape[-1],
        is_causal=given.is_causal,
        refused=reason_against(given) or reason_against_weights(module),
        is_cross=given.query.shape[-2] != given.key.shape[-2],
    )


def _alone(
    layer: AttentionLayer, found: Mapping[nn.Module, AttentionLayer], runs: Mapping[nn.Module, int]
) -> AttentionLayer:
    """Refused where one run of the module makes several calls, of which each would need a mechanism."""
    if layer.refused is not None:
        return layer
    inner = next((found[m].name for m in layer.module.modules() if m is not layer.module and m in found), None)
    if inner is not None:
        return replace(layer, refused=f"another attention module runs within it, {inner}")
    if layer.calls != runs[layer.module]:
        return replace(layer, refused=f"it attends {layer.calls} times in {runs[layer.module]} runs of its forward")
    return layer

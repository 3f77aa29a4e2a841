"""A converted model seen by healing: its converted layers, the blocks around them, and what both give in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import MECHANISM, AttentionCall, Batch, Host
from maclin.adopt.hosts.common import inputs_for
from maclin.adopt.memory import explained
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.core.mechanisms import Mechanism

Output = Any
"""What a model returns: a tensor, a tuple, or a host's own container."""


@dataclass(frozen=True)
class Layer:
    """A converted attention layer.

    Attributes:
        name: of the attention module, relative to the host's root.
        module: the attention module.
    """

    name: str
    module: nn.Module

    @property
    def mechanism(self) -> Mechanism:
        """What stands in for its attention at the moment."""
        found = self.module._modules[MECHANISM]
        assert isinstance(found, Mechanism)
        return found


@dataclass
class Run:
    """What one forward pass gave.

    Attributes:
        hidden: outputs (B, N, E) of the compared blocks, by name, in the order of their calls.
        output: what the model returned.
    """

    hidden: list[tuple[str, Tensor]] = field(default_factory=list)
    output: Output = None


class Watched:
    """A model of a known host whose blocks are listened to.

    Args:
        model_host: its adapter.
        compared: the blocks, by name.
    """

    def __init__(self, model_host: Host, compared: Mapping[str, nn.Module]) -> None:
        self.host = model_host
        self.root = model_host.root
        self.compared = dict(compared)

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.root.parameters()).device

    @torch.no_grad()
    def run_exact(
        self,
        batch: Batch,
        names: Mapping[nn.Module, str] | None = None,
        callback: Callable[[AttentionCall], None] = lambda call: None,
    ) -> Run:
        """A forward pass with exact attention everywhere, without gradients.

        Args:
            batch: of the model.
            names: modules whose q, k and v are shown.
            callback: is shown them.
        """
        with self._kept() as run:
            handle = self.root.register_forward_hook(lambda _, __, output: setattr(run, "output", output))
            try:
                self.host.observe(batch, names or {}, callback)
            finally:
                handle.remove()
        return run

    @contextmanager
    def _kept(self) -> Iterator[Run]:
        run = Run()

        def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, __, output: run.hidden.append((name, first_tensor(output)))

        handles = [module.register_forward_hook(keeper(name)) for name, module in self.compared.items()]
        try:
            yield run
        finally:
            for handle in handles:
                handle.remove()


class Model(Watched):
    """A converted model, run with its mechanisms or with exact attention.

    Args:
        model: what ``maclin.convert_`` converted.
        layers: names of converted layers whose blocks are compared; None is every block from the first converted
            layer on, converted or not.

    Attributes:
        stack: the blocks from the first converted layer on, by name: what the conversion changes.

    Raises:
        InputError: the model is not converted, no layer of it is, or ``layers`` names another.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] | None = None) -> None:
        adapter = host(model)
        self.given = model
        self.layers = converted_layers(adapter.root)
        if not adapter.converted or not self.layers:
            raise InputError(
                f"no layer of this {type(adapter.root).__name__} is converted, so there is nothing to heal; "
                "call maclin.convert_(model, ...) first"
            )
        self.stack = _stack(adapter.root, self.layers)
        super().__init__(adapter, self.stack if layers is None else _named(adapter.root, self.layers, list(layers)))

    def run(self, batch: Batch) -> Run:
        """A forward pass with the mechanisms, with gradients where they are on.

        Raises:
            InputError, MaclinError: the batch does not fit the model, or the memory.
        """
        with self._kept() as run, self._explained(batch):
            run.output = self._called(batch)
        return run

    @torch.no_grad()
    def run_watched(self, batch: Batch, callback: Callable[[AttentionCall], None]) -> None:
        """A forward pass with the mechanisms that shows what each of them is given."""
        handles: list[RemovableHandle] = []
        for layer in self.layers:

            def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = layer.name) -> None:
                q, k, v = args
                mask, causal, scale = (kwargs.get(key) for key in ("key_mask", "is_causal", "scale"))
                callback(AttentionCall(name, q, k, v, mask, bool(causal), scale))

            handles.append(layer.mechanism.register_forward_pre_hook(show, with_kwargs=True))
        try:
            with self._explained(batch):
                self._called(batch)
        finally:
            for handle in handles:
                handle.remove()

    def replace(self, mechanisms: Mapping[str, nn.Module]) -> None:
        """Put other mechanisms into some of the converted layers."""
        self.host.install({layer.module: mechanisms.get(layer.name, layer.mechanism) for layer in self.layers})

    def _called(self, batch: Batch) -> Output:
        args, kwargs = inputs_for(self.root, batch, getattr(self.root, "main_input_name", None))
        return self.root(*args, **kwargs)

    @contextmanager
    def _explained(self, batch: Batch) -> Iterator[None]:
        try:
            yield
        except MaclinError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, MemoryError) as error:
            what = f"a batch of shape {shape_of(batch)}"
            raise explained(error, what, f"{type(self.root).__name__}'s inputs") from error


def converted_layers(root: nn.Module) -> tuple[Layer, ...]:
    """The attention layers that hold a mechanism, in the order of the modules; what is not linear counts too."""
    return tuple(
        Layer(name, module)
        for name, module in root.named_modules()
        if isinstance(module._modules.get(MECHANISM), Mechanism)
    )


def block_of(root: nn.Module, name: str) -> str:
    """The name of the block around an attention layer: the innermost element of a list of modules, or the layer."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        parent = root.get_submodule(".".join(parts[: end - 1]))
        if isinstance(parent, nn.ModuleList | nn.Sequential) or _is_numbered(parts[end - 1], parent):
            return ".".join(parts[:end])
    return name


def shape_of(batch: Batch) -> tuple[int, ...]:
    """The shape of a batch's first tensor."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    return next((tuple(x.shape) for x in batch.values() if isinstance(x, Tensor)), ())


def first_tensor(output: Output) -> Tensor:
    """The tensor that a block or model gives, or the first of several.

    Raises:
        InputError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise InputError(f"wanted a tensor among what the model gives, got {type(output).__name__}; pass output=")


def _named(root: nn.Module, layers: tuple[Layer, ...], names: list[str]) -> dict[str, nn.Module]:
    """The blocks around some of the converted layers."""
    known = [layer.name for layer in layers]
    if not names or any(name not in known for name in names):
        raise OptionError(f"layers is {names}; wanted some of the converted layers, {known}")
    return {block: root.get_submodule(block) for block in (block_of(root, name) for name in names)}


def _is_numbered(part: str, parent: nn.Module) -> bool:
    """Whether a child is one of a dictionary's or another container's that is addressed by number."""
    return part.isdigit() and len(parent._modules) > 1


def _stack(root: nn.Module, layers: tuple[Layer, ...]) -> dict[str, nn.Module]:
    """The blocks around converted layers, and those of the same lists that come after the first of them."""
    found: dict[str, nn.Module] = {}
    for layer in layers:
        block = block_of(root, layer.name)
        parent, _, last = block.rpartition(".")
        siblings = list(root.get_submodule(parent)._modules) if last.isdigit() else []
        begun = False
        for number in siblings:
            begun = begun or number == last
            module = root.get_submodule(f"{parent}.{number}" if parent else number)
            if begun and type(module) is type(root.get_submodule(block)):
                found.setdefault(f"{parent}.{number}" if parent else number, module)
        found.setdefault(block, root.get_submodule(block))
    order = {name: number for number, (name, _) in enumerate(root.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))

"""Models of ``torch.nn.MultiheadAttention``: alone, in torch's encoder and decoder layers, or anywhere in a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
from maclin.adopt.hosts.multihead import (
    ACTIVE_PROBE,
    ConvertedMultiheadAttention,
    Given,
    Output,
    Probe,
    as_call,
    reason_against_call,
)
from maclin.core.errors import CapabilityError, MaclinError

_RECORD = "_maclin_conversion"
_NESTED = "use_nested_tensor"
_USES_WEIGHTS = "the model works on with its attention weights (need_weights), which a mechanism never forms"


@dataclass
class Conversion:
    """What ``remove`` needs beside the classes: which encoders made nested tensors, and of what they are to do it."""

    encoders: list[tuple[nn.TransformerEncoder, bool]]


class TorchHost:
    """A model with ``torch.nn.MultiheadAttention`` inside.

    Args:
        root: the model; layer names are relative to it, and its own is "".
    """

    name = "torch.nn"

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def layers(self, batch: Batch | None = None) -> tuple[AttentionLayer, ...]:
        """The attention layers, in the order of their first call.

        Args:
            batch: inputs to run the model on once; made up for torch's own layers where None. Whether a layer is
                causal is what the masks of these inputs say; those that are made up are causal for decoders.

        Raises:
            CapabilityError: the model cannot run on these inputs, no inputs can be made up, or its weights are not in
                memory.
        """
        check_whole(self.root, converted=True)
        args, kwargs = ((), example(self.root)) if batch is None else inputs_for(self.root, batch)
        discovery = Discovery(self.root)
        try:
            with self._probing(discovery):
                self.root(*args, **kwargs)
        except FAILURES:
            discovery = Discovery(self.root, with_weights=True)
            try:
                with self._probing(discovery):
                    self.root(*args, **kwargs)
            except FAILURES as error:
                raise CapabilityError(
                    f"{type(self.root).__name__} cannot run on {'made-up' if batch is None else 'the given'} inputs "
                    f"({type(error).__name__}: {error}); pass batch= with inputs that it can run on"
                ) from error
        return tuple(discovery.layers())

    def observe(self, batch: Batch, names: Mapping[nn.Module, str], callback: Callable[[AttentionCall], None]) -> None:
        """Run the model with exact attention and show ``callback`` every call of the modules in ``names``.

        Raises:
            InputError: the model cannot run on this batch.
            MaclinError: it does not fit in memory.
        """

        def show(
            module: ConvertedMultiheadAttention, given: Given, need_weights: bool, own: Callable[[], Output]
        ) -> Output:
            if module in names:
                callback(as_call(module, names[module], given, trusting=False))
            return own()

        args, kwargs = inputs_for(self.root, batch)
        with self._probing(show):
            try:
                self.root(*args, **kwargs)
            except MaclinError:
                raise
            except (*FAILURES, MemoryError) as error:
                raise failed(self.root, error, args, kwargs) from error

    @property
    def has_example(self) -> bool:
        """Whether the root is a layer of torch's own."""
        return isinstance(self.root, _KNOWN)

    @property
    def converted(self) -> bool:
        """Whether ``install`` was called and ``remove`` was not."""
        return _RECORD in self.root.__dict__

    def install(self, mechanisms: Mapping[nn.Module, nn.Module]) -> None:
        """Give each attention module its mechanism; replaces an earlier installation. All or nothing.

        Raises:
            CapabilityError: the model lies inside a converted one.
        """
        before = placed(self.root)
        check_whole(self.root, self.converted)
        if self.converted:
            self.remove()
        record = Conversion(_encoders(self.root, mechanisms))
        try:
            self._switch(mechanisms, record)
        except BaseException:
            self._undo(record)
            if before:
                self._switch(before, record)
            raise

    def remove(self) -> None:
        """Give the model back its own attention."""
        if self.converted:
            self._undo(self.root.__dict__[_RECORD])

    def _switch(self, mechanisms: Mapping[nn.Module, nn.Module | None], record: Conversion) -> None:
        place(self.root, mechanisms)
        for module in mechanisms:
            _become(module, ConvertedMultiheadAttention)
        for encoder, _ in record.encoders:
            setattr(encoder, _NESTED, False)
        self.root.__dict__[_RECORD] = record

    def _undo(self, record: Conversion) -> None:
        place(self.root, {})
        for module in self.root.modules():
            if type(module) is ConvertedMultiheadAttention:
                _become(module, nn.MultiheadAttention)
        for encoder, nested in record.encoders:
            setattr(encoder, _NESTED, nested)
        self.root.__dict__.pop(_RECORD, None)

    @contextmanager
    def _probing(self, probe: Probe) -> Iterator[None]:
        """Evaluation without gradients and without fused paths, with ``probe`` in place of attention."""
        modules = [m for m in self.root.modules() if type(m) is nn.MultiheadAttention]
        nested = _encoders(self.root, modules)
        token = ACTIVE_PROBE.set(probe)
        try:
            for module in modules:
                _become(module, ConvertedMultiheadAttention)
            for encoder, _ in nested:
                setattr(encoder, _NESTED, False)
            with evaluating(self.root):
                yield
        finally:
            ACTIVE_PROBE.reset(token)
            for module in modules:
                _become(module, nn.MultiheadAttention)
            for encoder, before in nested:
                setattr(encoder, _NESTED, before)


class Discovery:
    """Finds the attention modules of a model, and what speaks against replacing each.

    Args:
        root: the model.
        with_weights: whether calls that ask for attention weights get them, and are refused for it.
    """

    def __init__(self, root: nn.Module, with_weights: bool = False) -> None:
        self.names = {module: name for name, module in root.named_modules()}
        self.with_weights = with_weights
        self.found: dict[nn.Module, AttentionLayer] = {}

    def __call__(
        self, module: ConvertedMultiheadAttention, given: Given, need_weights: bool, own: Callable[[], Output]
    ) -> Output:
        """The host's own output; the module is noted with its sizes and what speaks against replacing it."""
        seen = self.found.get(module)
        reason, causal = reason_against_call(module, given)
        reason = reason or reason_against_weights(module)
        if need_weights and self.with_weights:
            reason = reason or _USES_WEIGHTS
        if seen is not None:
            self.found[module] = replace(seen, calls=seen.calls + 1, refused=seen.refused or reason)
        elif module in self.names:
            self.found[module] = replace(
                _layer(module, self.names[module], reason), is_causal=causal, is_cross=given.is_cross
            )
        out, weights = own()
        return out, weights if self.with_weights else None

    def layers(self) -> Iterator[AttentionLayer]:
        """Those found, and after them those of a class of their own, which cannot be watched."""
        yield from self.found.values()
        for module, name in self.names.items():
            if isinstance(module, nn.MultiheadAttention) and type(module) not in _ONES:
                yield _layer(module, name, f"its class, {type(module).__name__}, may compute something of its own")


_ONES = (nn.MultiheadAttention, ConvertedMultiheadAttention)
_KNOWN = (
    nn.MultiheadAttention,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.Transformer,
)


def _layer(module: nn.MultiheadAttention, name: str, refused: str | None) -> AttentionLayer:
    heads, width = module.num_heads, module.head_dim
    return AttentionLayer(name, module, heads, heads, width, width, is_causal=False, refused=refused)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    setattr(module, "__class__", cls)  # noqa: B010


def _encoders(root: nn.Module, of: Iterable[nn.Module]) -> list[tuple[nn.TransformerEncoder, bool]]:
    """The encoders of a model that hold some of these modules, and whether they make padded batches nested tensors."""
    wanted = set(of)
    return [
        (encoder, bool(getattr(encoder, _NESTED, False)))
        for encoder in root.modules()
        if isinstance(encoder, nn.TransformerEncoder) and any(module in wanted for module in encoder.modules())
    ]


def example(root: nn.Module) -> dict[str, Tensor]:
    """Small inputs for one of torch's own layers: two sequences, of which one is padded; decoders are causal.

    Raises:
        CapabilityError: the root is another module.
    """
    if not isinstance(root, _KNOWN):
        raise CapabilityError(
            f"what a {type(root).__name__} takes is not known, so that its attention layers cannot be found; pass "
            "batch= (or batches=) with inputs for it"
        )
    module = next(m for m in root.modules() if isinstance(m, nn.MultiheadAttention))
    parameter = module.out_proj.weight

    def tokens(length: int, width: int) -> Tensor:
        x = torch.arange(2 * length * width, device=parameter.device).sin().view(2, length, width).to(parameter.dtype)
        return x if module.batch_first else x.transpose(0, 1)

    width, padded = (
        module.embed_dim,
        torch.arange(7, device=parameter.device).expand(2, 7) >= parameter.new_tensor([[7], [5]]),
    )
    if isinstance(root, nn.MultiheadAttention):
        x = tokens(7, width)
        if root.in_proj_weight is not None:
            return {"query": x, "key": x, "value": x, "key_padding_mask": padded}
        return {"query": tokens(5, width), "key": tokens(7, root.kdim), "value": tokens(7, root.vdim)}
    if isinstance(root, nn.TransformerEncoder | nn.TransformerEncoderLayer):
        return {"src": tokens(7, width), "src_key_padding_mask": padded}
    past = torch.ones(5, 5, dtype=torch.bool, device=parameter.device).triu(1)
    source = "src" if isinstance(root, nn.Transformer) else "memory"
    return {source: tokens(7, width), "tgt": tokens(5, width), "tgt_mask": past, "memory_key_padding_mask": padded}

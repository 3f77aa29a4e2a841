"""How much each layer matters: what the model's output changes when one layer is replaced by averaging."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import MECHANISM, AttentionLayer, Batch
from maclin.core import mechanisms as registry
from maclin.core.errors import CapabilityError

TOKENS, LONGEST = 1024, 512
"""So many tokens are looked at, of each document the first ``LONGEST``; one run for each layer, and one more."""

_TEXT = ("input_ids", "inputs_embeds")


@torch.no_grad()
def output_changes(model: nn.Module, documents: Iterable[Batch], layers: Iterable[AttentionLayer]) -> dict[str, float]:
    """||output - exact output||² / ||exact output||² for each layer alone, its attention replaced by averaging.

    The output is the first tensor of numbers that the model returns, at tokens that are not padding.

    Args:
        model: it is left as it is, converted or not.
        documents: few; the model is run on each once for each layer.
        layers: those that can be replaced.

    Raises:
        CapabilityError: the model returns no tensor of numbers, or one that is 0 or not finite.
    """
    adapter = host(model)
    root = adapter.root
    layers, inputs = list(layers), [_on(batch, root) for batch in documents]
    earlier: dict[nn.Module, nn.Module] = {
        module: part
        for module in root.modules()
        for name, part in module.named_children()
        if name == MECHANISM and adapter.converted
    }
    modes = [(module, module.training) for module in root.modules()]
    try:
        if adapter.converted:
            adapter.remove()
        root.eval()
        total, moved = 0.0, dict.fromkeys((layer.name for layer in layers), 0.0)
        for batch in inputs:
            exact = _output(root, batch)
            total += _squares(exact)
            for layer in layers:
                adapter.install({layer.module: _averaging(layer)})
                moved[layer.name] += _squares(_output(root, batch) - exact)
            adapter.remove()
        if not 0 < total < float("inf"):
            raise CapabilityError(f"the output of {type(root).__name__} is zero or not finite")
        return {name: change / total for name, change in moved.items()}
    finally:
        if adapter.converted:
            adapter.remove()
        if earlier:
            adapter.install(earlier)
        for module, training in modes:
            module.training = training


def first_documents(batches: Iterable[Batch], kept: list[Batch]) -> Iterator[Batch]:
    """The batches, one after the other; ``kept`` gets their first documents, without padding, as batches of one."""
    tokens = 0
    for batch in batches:
        yield batch  # first, so that whoever runs the model on it says what is wrong with it
        for row in range(_size(batch)):
            if tokens >= TOKENS:
                break
            document, length = _document(batch, row)
            if length:
                kept.append(document)
                tokens += length


def _averaging(layer: AttentionLayer) -> nn.Module:
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    return registry.mechanism("mean", **sizes).eval()


def _output(root: nn.Module, batch: Batch) -> Tensor:
    out = _first_tensor(root(batch) if isinstance(batch, Tensor) else root(**batch))
    if out is None:
        raise CapabilityError(f"{type(root).__name__} returns no tensor of numbers")
    return out.float()


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _first_tensor(found: Any) -> Tensor | None:
    if isinstance(found, Tensor):
        return found if found.is_floating_point() else None
    parts = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    return next((tensor for tensor in map(_first_tensor, parts) if tensor is not None), None)


def _on(batch: Batch, root: nn.Module) -> Batch:
    """The batch where the model is."""
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def _size(batch: Batch) -> int:
    tensors = [batch] if isinstance(batch, Tensor) else [x for x in batch.values() if isinstance(x, Tensor) and x.dim()]
    return max((x.shape[0] for x in tensors), default=1)


def _document(batch: Batch, row: int) -> tuple[Batch, int]:
    """One document, and how many tokens it has; what is no text counts as a quarter of all that are wanted."""
    size, number = _size(batch), TOKENS // 4
    if isinstance(batch, Tensor):
        return batch[row : row + 1], number
    one = {
        key: x[row : row + 1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else x
        for key, x in batch.items()
    }
    text = next((x for key in _TEXT if isinstance(x := one.get(key), Tensor) and x.dim() > 1), None)
    mask = one.get("attention_mask")
    if text is None or (isinstance(mask, Tensor) and mask.shape != text.shape[:2]):
        return one, number
    real = torch.ones(text.shape[1], dtype=torch.bool) if mask is None else mask[0].bool().cpu()
    at = real.nonzero()[:LONGEST, 0]
    return {
        key: x[:, at.to(x.device)] if isinstance(x, Tensor) and x.shape[:2] == text.shape[:2] else x
        for key, x in one.items()
    }, len(at)

"""How much each layer matters: what the model's output changes when its attention alone is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maclin.adopt.hosts import host
from maclin.adopt.hosts.base import MECHANISM, AttentionLayer, Batch
from maclin.core import mechanisms as registry
from maclin.core.errors import CapabilityError, MaclinError

TOKENS, LONGEST = 1024, 512
"""So many tokens are looked at, of each document the first ``LONGEST``; one run for each layer, and one more."""

EACH_TOKENS, EACH_LONGEST = 6144, 2048
"""The same where each mechanism is tried in each layer: what only long texts ask for has to be in them."""

_ROWS = 256
_TEXT = ("input_ids", "inputs_embeds")


@torch.no_grad()
def output_changes(
    model: nn.Module,
    documents: Iterable[Batch],
    layers: Iterable[AttentionLayer],
    tried: Mapping[str, Sequence[nn.Module]] | None = None,
    done: Callable[[str], None] | None = None,
) -> dict[str, tuple[float | None, ...]]:
    """||output - exact output||² / ||exact output||² for each layer alone, its attention replaced.

    The output is the first tensor of numbers that the model returns, at tokens that are not padding. Where that is
    logits per token, it is sqrt(softmax(logits)): the change is then about half of KL(exact || changed) in nats.

    Args:
        model: it is left as it is, converted or not.
        documents: few; the model is run on each once for each layer, and once for each mechanism tried.
        layers: those that can be replaced.
        tried: mechanisms of a layer, by its name.
        done: called with the name of each layer of each document.

    Returns:
        By layer, the change by averaging, and the changes by its mechanisms; None where one cannot be applied.

    Raises:
        CapabilityError: the model returns no tensor of numbers, or one that is 0 or not finite.
    """
    adapter = host(model)
    root = adapter.root
    modules = {layer: [_averaging(layer), *(tried or {}).get(layer.name, ())] for layer in layers}
    inputs = [_on(batch, root) for batch in documents]
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
        total = 0.0
        moved: dict[str, list[float | None]] = {layer.name: [0.0] * len(found) for layer, found in modules.items()}
        for batch in inputs:
            exact = _Output.of(root, batch)
            total += exact.squares()
            for layer, found in modules.items():
                sums = moved[layer.name]
                for i, module in enumerate(found):
                    before = sums[i]
                    if before is None:
                        continue
                    try:
                        adapter.install({layer.module: module})
                        sums[i] = before + exact.change(_Output.of(root, batch))
                    except MaclinError:
                        if not i:
                            raise
                        sums[i] = None
                if done is not None:
                    done(layer.name)
            adapter.remove()
        if not 0 < total < float("inf"):
            raise CapabilityError(f"the output of {type(root).__name__} is zero or not finite")
        return {name: tuple(None if x is None else x / total for x in sums) for name, sums in moved.items()}
    finally:
        if adapter.converted:
            adapter.remove()
        if earlier:
            adapter.install(earlier)
        for module, training in modes:
            module.training = training


def first_documents(
    batches: Iterable[Batch], kept: list[Batch], most: int = TOKENS, longest: int = LONGEST
) -> Iterator[Batch]:
    """The batches, one after the other; ``kept`` gets their first documents, without padding, as batches of one.

    Args:
        batches: any.
        kept: is filled.
        most: tokens; the document that reaches them is the last.
        longest: tokens of a document after which it is cut.
    """
    tokens = 0
    for batch in batches:
        yield batch  # first, so that whoever runs the model on it says what is wrong with it
        for row in range(_size(batch)):
            if tokens >= most:
                break
            document, length = _document(batch, row, longest)
            if length:
                kept.append(document)
                tokens += length


def _averaging(layer: AttentionLayer) -> nn.Module:
    sizes = {"head_dim": layer.head_dim, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    return registry.mechanism("mean", **sizes).eval()


class _Output:
    """What a model returned; of logits per token sqrt(softmax(logits)), a few rows at a time: classes are many."""

    def __init__(self, numbers: Tensor, logits: bool) -> None:
        self.numbers, self.logits = numbers, logits

    @classmethod
    def of(cls, root: nn.Module, batch: Batch) -> _Output:
        found = root(batch) if isinstance(batch, Tensor) else root(**batch)
        logits = found.get("logits") if isinstance(found, Mapping) else None
        if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[-1] > 1:
            return cls(logits.flatten(0, 1), True)
        out = _first_tensor(found)
        if out is None:
            raise CapabilityError(f"{type(root).__name__} returns no tensor of numbers")
        return cls(out.reshape(-1, out.shape[-1]) if out.dim() else out.reshape(1, 1), False)

    def squares(self) -> float:
        return sum(_squares(part) for part in self._parts())

    def change(self, other: _Output) -> float:
        return sum(_squares(a - b) for a, b in zip(self._parts(), other._parts(), strict=True))

    def _parts(self) -> Iterator[Tensor]:
        for rows in self.numbers.split(_ROWS):
            yield rows.float().softmax(-1).sqrt() if self.logits else rows.float()


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


def _document(batch: Batch, row: int, longest: int) -> tuple[Batch, int]:
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
    at = real.nonzero()[:longest, 0]
    return {
        key: x[:, at.to(x.device)] if isinstance(x, Tensor) and x.shape[:2] == text.shape[:2] else x
        for key, x in one.items()
    }, len(at)

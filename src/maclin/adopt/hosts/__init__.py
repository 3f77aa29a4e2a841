"""Chooses the host of a model; each host library is imported only inside its own adapter."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from maclin.adopt.hosts.base import AttentionLayer, Batch, Host
from maclin.core.errors import CapabilityError, InputError


def host(model: nn.Module) -> Host:
    """The adapter for ``model``: it, or the one transformers model inside it.

    Args:
        model: a ``transformers`` model, a ``SentenceTransformer`` or any module that contains exactly one transformers
            model, to which layer names are relative; a model of timm; a module with ``torch.nn.MultiheadAttention``
            inside; or one whose modules call ``torch.nn.functional.scaled_dot_product_attention``.

    Raises:
        InputError: ``model`` is no ``nn.Module``.
        CapabilityError: it contains several transformers models.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"wanted a model (torch.nn.Module), got {type(model).__name__}; load it first")
    roots = _pretrained(model)
    if len(roots) > 1:
        names = [type(root).__name__ for root in roots]
        raise CapabilityError(
            f"wanted a module with one transformers model inside, got {len(roots)} in {type(model).__name__}: {names}; "
            "pass them one by one"
        )
    if roots:
        from maclin.adopt.hosts.transformers import TransformersHost

        return TransformersHost(roots[0])
    from maclin.adopt.hosts.functional import FunctionalHost, is_timm
    from maclin.adopt.hosts.torch_nn import TorchHost

    if not is_timm(model) and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return TorchHost(model)
    return FunctionalHost(model)


def layers_of(
    model: nn.Module, batches: Iterable[Batch], batch: Batch | None = None
) -> tuple[tuple[AttentionLayer, ...], Iterable[Batch]]:
    """The attention layers of a model, found on ``batch``, or on example inputs, or else on the first of ``batches``.

    Args:
        model: what ``host`` takes.
        batches: used where no inputs are given and none that the model can run on can be made up.
        batch: inputs to find the layers with.

    Returns:
        The layers; and ``batches`` again, whole, since an iterator gives its first only once.
    """
    adapter = host(model)
    try:
        return adapter.layers(batch), batches
    except CapabilityError:
        documents = list(batches) if batch is None else []
        if not documents:
            raise
        return adapter.layers(documents[0]), documents


def _pretrained(module: nn.Module) -> list[nn.Module]:
    """The outermost transformers models at or under ``module``, each once."""
    if any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__):
        return [module]
    found: dict[int, nn.Module] = {}
    for child in module.children():
        found.update({id(root): root for root in _pretrained(child)})
    return list(found.values())

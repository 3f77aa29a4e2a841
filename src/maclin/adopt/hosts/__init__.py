"""Chooses the host of a model; each host library is imported only inside its own adapter."""

from __future__ import annotations

from torch import nn

from maclin.adopt.hosts.base import Host
from maclin.core.errors import CapabilityError, InputError

KNOWN = ("transformers (PreTrainedModel)", "sentence-transformers (SentenceTransformer)")
"""Kinds of model that can be converted, as named in messages."""


def host(model: nn.Module) -> Host:
    """The adapter for ``model``: it, or the one transformers model inside it.

    Args:
        model: a ``transformers`` model, a ``SentenceTransformer``, or any module that contains exactly one
            transformers model. Layer names are relative to that transformers model.

    Raises:
        InputError: ``model`` is no ``nn.Module``.
        CapabilityError: no known host library made it, or it contains several models.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"wanted a model (torch.nn.Module), got {type(model).__name__}; load it first")
    roots = _pretrained(model)
    if not roots:
        raise CapabilityError(
            f"wanted a model of a known host, {' or '.join(KNOWN)}, got {type(model).__name__}, which contains none; "
            "build such a layer with maclin.mechanism instead"
        )
    if len(roots) > 1:
        names = [type(root).__name__ for root in roots]
        raise CapabilityError(
            f"wanted a module with one transformers model inside, got {len(roots)} in {type(model).__name__}: {names}; "
            "pass them one by one"
        )
    from maclin.adopt.hosts.transformers import TransformersHost

    return TransformersHost(roots[0])


def _pretrained(module: nn.Module) -> list[nn.Module]:
    """The outermost transformers models at or under ``module``, each once."""
    if any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__):
        return [module]
    found: dict[int, nn.Module] = {}
    for child in module.children():
        found.update({id(root): root for root in _pretrained(child)})
    return list(found.values())

"""A model directory as what is converted for good: with its head, and plans that were made without it."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import nn

from maclin.adopt.load import Loaded
from maclin.records import Plan


def load_whole(path: str | os.PathLike[str], loaded: Loaded) -> nn.Module:
    """The model of a directory with the head that it was saved with, so that a decoder still generates.

    Args:
        path: the directory.
        loaded: what ``load`` made of it, which is without head; its model where the directory has none, or holds a
            sentence-transformers pipeline.

    Raises:
        InputError: the directory cannot be read.
    """
    directory = Path(path)
    if (directory / "modules.json").is_file():
        return loaded.model
    from maclin.adopt.hosts.rebuild import with_head

    return with_head(directory) or loaded.model


def plan_for(plan: Plan, layers: Collection[str]) -> Plan:
    """A plan with the names that layers have in a model with a head, if it was made without.

    Args:
        plan: as it was made.
        layers: names of the attention layers to convert.
    """
    names = [row.layer for row in plan.rows]
    ends = {name: [layer for layer in layers if layer.endswith(f".{name}")] for name in names}
    prefixes = {found[0].removesuffix(name) for name, found in ends.items() if len(found) == 1}
    if set(names) <= set(layers) or len(prefixes) != 1 or any(len(found) != 1 for found in ends.values()):
        return plan
    (prefix,) = prefixes
    return replace(plan, rows=tuple(replace(row, layer=prefix + row.layer) for row in plan.rows))

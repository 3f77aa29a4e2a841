"""Modules that people build models from: attention and layers under torch's names, and Macformer models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import MultiheadAttention
    from .calibrate import calibrate_
    from .config import MacformerConfig
    from .decoder_layer import TransformerDecoderLayer
    from .encoder_layer import TransformerEncoderLayer
    from .encoders import (
        MacformerClassifier,
        MacformerEncoder,
        MacformerMatcher,
        MacformerRegressor,
        MacformerTagger,
    )
    from .language import MacformerLM
    from .model import MacformerModel, ModelOutput
    from .positions import LearnedPositions, Rotary, SinusoidalPositions
    from .seq2seq import MacformerSeq2Seq
    from .stack import StackState

_HOMES = {
    "LearnedPositions": "positions",
    "MacformerClassifier": "encoders",
    "MacformerConfig": "config",
    "MacformerEncoder": "encoders",
    "MacformerLM": "language",
    "MacformerMatcher": "encoders",
    "MacformerModel": "model",
    "MacformerRegressor": "encoders",
    "MacformerSeq2Seq": "seq2seq",
    "MacformerTagger": "encoders",
    "ModelOutput": "model",
    "MultiheadAttention": "attention",
    "Rotary": "positions",
    "SinusoidalPositions": "positions",
    "StackState": "stack",
    "TransformerDecoderLayer": "decoder_layer",
    "TransformerEncoderLayer": "encoder_layer",
    "calibrate_": "calibrate",
}
"""Where each public name is; imported at first use."""

__all__ = [
    "LearnedPositions",
    "MacformerClassifier",
    "MacformerConfig",
    "MacformerEncoder",
    "MacformerLM",
    "MacformerMatcher",
    "MacformerModel",
    "MacformerRegressor",
    "MacformerSeq2Seq",
    "MacformerTagger",
    "ModelOutput",
    "MultiheadAttention",
    "Rotary",
    "SinusoidalPositions",
    "StackState",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "calibrate_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'maclin.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

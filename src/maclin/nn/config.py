"""MacformerConfig: everything that decides what a model is, in one place, checked, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..core import mechanisms
from ..core.errors import InputError, OptionError
from .encoder_layer import ACTIVATIONS
from .positions import POSITIONS

LayerChoice = str | tuple[str, dict[str, Any]]
"""A mechanism's name, which stands for ``default_options``, or its name and options."""

FRONTENDS = ("tokens", "bytes", "patches", "waveform", "series")
POOLINGS = ("mean", "cls", "last")
NUM_BYTES = 257
"""Ids of the front end "bytes": 0 is padding, byte b is b + 1."""

_POSITIVE = ("embed_dim", "num_layers", "num_heads", "ff_dim", "max_length", "num_outputs", "channels", "patch_size")


@dataclass(frozen=True)
class MacformerConfig:
    """What a Macformer model is built from; equal configurations build models of equal shape.

    Args:
        embed_dim: E, width of the model.
        num_layers: of the encoder, or of the language model.
        num_heads: H, heads of each attention; the width of a head is E / H.
        num_kv_heads: Hk, heads of keys and values (default H).
        ff_dim: width of the feed-forward networks.
        mechanism: of every self-attention: a name, or one choice per layer, each a name or (name, options). A name
            alone stands for ``default_options(name)``.
        options: of the one mechanism that ``mechanism`` names, instead of those.
        position: "sinusoidal", "learned" (both added to the front end's vectors), "rotary" (turns q and k in every
            self-attention) or "none".
        max_length: tokens that a table of learned positions has room for, and a learned Linformer projection; no
            limit of anything else.
        frontend: what makes vectors of inputs: "tokens" (ids), "bytes" (the same with 257 ids), "patches" (of
            images), "waveform" (strided convolution over samples) or "series" (one vector per time step).
        vocab_size: ids of "tokens", padding (0) included; of "bytes" at least 257, for marks of one's own.
        channels: of images, waveforms and series.
        patch_size: side of a patch in pixels.
        stride: samples between two tokens of "waveform"; each sees twice as many.
        pooling: how classification, regression and matching make one vector: "mean" of the attended tokens, "cls"
            (a learned token in front), or the "last" attended token.
        num_outputs: classes, or numbers of a regression.
        dropout: after front end, attention, and in feed-forward networks.
        attention_dropout: of attention weights; mechanism "softmax" only.
        activation: of feed-forward networks, "relu" or "gelu".
        norm_first: pre-norm (with a norm at the end) instead of post-norm.
        layer_norm_eps: of all norms.
        bias: whether projections and norms have one.
        tie_embeddings: whether output scores of tokens use the embedding's weights (language model, and decoder).
        num_decoder_layers: of an encoder-decoder (default ``num_layers``).
        target_vocab_size: ids of the decoder (default ``vocab_size``).
        decoder_mechanism: of the decoder's self-attention, as ``mechanism``; None is the same as there.
        cross_mechanism: of attention from decoder to encoder, as ``mechanism``; None is the same as there.

    Raises:
        OptionError: a value that cannot be, or values that exclude each other.

    Example:
        >>> config = MacformerConfig(frontend="bytes", mechanism="macformer", max_length=4096, num_outputs=20)
        >>> model = maclin.nn.MacformerClassifier(config)
    """

    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int | None = None
    ff_dim: int = 128
    mechanism: str | Sequence[LayerChoice] = "macformer"
    options: Mapping[str, Any] | None = None
    position: Literal["sinusoidal", "learned", "rotary", "none"] = "sinusoidal"
    max_length: int = 1024
    frontend: Literal["tokens", "bytes", "patches", "waveform", "series"] = "tokens"
    vocab_size: int | None = None
    channels: int = 1
    patch_size: int = 4
    stride: int = 16
    pooling: Literal["mean", "cls", "last"] = "mean"
    num_outputs: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation: Literal["relu", "gelu"] = "gelu"
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    bias: bool = True
    tie_embeddings: bool = True
    num_decoder_layers: int | None = None
    target_vocab_size: int | None = None
    decoder_mechanism: str | Sequence[LayerChoice] | None = None
    cross_mechanism: str | Sequence[LayerChoice] | None = None

    def __post_init__(self) -> None:
        for name in (*_POSITIVE, "stride", *self._given("num_kv_heads", "num_decoder_layers", "target_vocab_size")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}; wanted a positive integer")
        for name, known in (
            ("position", POSITIONS),
            ("frontend", FRONTENDS),
            ("pooling", POOLINGS),
            ("activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} is {getattr(self, name)!r}; known are {', '.join(repr(k) for k in known)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; wanted a probability in [0, 1)")
        self._check_heads()
        self._check_vocabulary()
        options = None if self.options is None else _plain(dict(self.options), "options")
        object.__setattr__(self, "options", options)
        for name in ("mechanism", *self._given("decoder_mechanism", "cross_mechanism")):
            object.__setattr__(self, name, self._checked(name))

    @property
    def head_dim(self) -> int:
        """D, width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def input_vocab_size(self) -> int:
        """Ids that the front end knows, padding included; only where it takes ids."""
        return NUM_BYTES if self.vocab_size is None else self.vocab_size

    @property
    def output_vocab_size(self) -> int:
        """Ids that the decoder knows."""
        return self.input_vocab_size if self.target_vocab_size is None else self.target_vocab_size

    def layers(self, part: Literal["self", "decoder", "cross"] = "self") -> tuple[tuple[str, dict[str, Any]], ...]:
        """Name and options of the mechanism of each layer.

        Args:
            part: "self" of the encoder or language model; "decoder" and "cross" of an encoder-decoder.

        Raises:
            OptionError: as many choices as encoder layers, taken over by a decoder of another depth.
        """
        depth = self.num_layers if part == "self" else self.num_decoder_layers or self.num_layers
        own = {"self": self.mechanism, "decoder": self.decoder_mechanism, "cross": self.cross_mechanism}[part]
        choice, options = (self.mechanism, self.options) if own is None or part == "self" else (own, None)
        if isinstance(choice, str):
            return tuple((choice, default_options(choice) if options is None else dict(options)) for _ in range(depth))
        if len(choice) != depth:
            raise OptionError(
                f"mechanism lists {len(choice)} layers, and the decoder has {depth}; pass decoder_mechanism and "
                "cross_mechanism as well"
            )
        return tuple((c, default_options(c)) if isinstance(c, str) else (c[0], dict(c[1])) for c in choice)

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MacformerConfig:
        """The configuration that ``to_dict`` wrote.

        Raises:
            InputError: a field that does not exist (the message lists those that do).
            OptionError: a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InputError(f"a configuration has no field {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**values)

    def _given(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(self, name) is not None)

    def _check_heads(self) -> None:
        if self.embed_dim % self.num_heads:
            raise OptionError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise OptionError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.position == "rotary" and self.head_dim % 2:
            raise OptionError(
                f"position='rotary' turns pairs of channels, and a head has {self.head_dim}; choose embed_dim / "
                "num_heads "
                "even, or another position"
            )

    def _check_vocabulary(self) -> None:
        size = self.vocab_size
        if self.frontend == "tokens" and (size is None or size < 2):
            raise OptionError(f"vocab_size is {size}; wanted the number of ids of frontend='tokens', padding included")
        if self.frontend == "bytes" and size is not None and size < NUM_BYTES:
            raise OptionError(f"vocab_size is {size}; wanted at least {NUM_BYTES} for bytes (0 is padding), or None")
        if self.frontend not in ("tokens", "bytes") and size is not None:
            raise OptionError(f"vocab_size is {size}, and frontend={self.frontend!r} takes no ids; leave it out")

    def _checked(self, name: str) -> str | tuple[LayerChoice, ...]:
        """The choice of a field with every name and option known, lists as tuples."""
        choice = getattr(self, name)
        if isinstance(choice, str):
            _check_options(choice, self.options or {} if name == "mechanism" else {})
            return choice
        if name == "mechanism" and self.options is not None:
            raise OptionError("options go with one mechanism's name; a list holds them itself, as (name, options)")
        depth = self.num_layers if name == "mechanism" else self.num_decoder_layers or self.num_layers
        if not isinstance(choice, Sequence) or len(choice) != depth:
            raise OptionError(f"{name} is {choice!r}; wanted a name, or a list of {depth} choices, one per layer")
        made: list[LayerChoice] = []
        for layer in choice:
            if isinstance(layer, str):
                _check_options(layer, {})
                made.append(layer)
                continue
            if not (isinstance(layer, Sequence) and len(layer) == 2 and isinstance(layer[1], Mapping)):
                raise OptionError(f"{name} holds {layer!r}; wanted a name, or a pair of name and options")
            _check_options(str(layer[0]), layer[1])
            made.append((str(layer[0]), _plain(dict(layer[1]), f"options of {layer[0]}")))
        return tuple(made)


def default_options(name: str) -> dict[str, Any]:
    """What a mechanism's name alone stands for in a configuration.

    For macformer a learned temperature: without it, normalised q and k leave attention all but uniform. For others
    their own defaults.
    """
    return {"temperature": "learned"} if name == "macformer" else {}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = mechanisms.row(name).options
    unknown = [option for option in options if option not in known]
    if unknown:
        raise OptionError(f"{name} has no option {unknown[0]!r}; known are {', '.join(known) or 'none'}")


def _plain(values: dict[str, Any], label: str) -> dict[str, Any]:
    """The same as JSON reads it back, so that equal configurations compare equal."""
    try:
        return json.loads(json.dumps(values))
    except TypeError as error:
        raise OptionError(
            f"{label} hold a value that JSON has no form for ({error}); wanted names and numbers"
        ) from error

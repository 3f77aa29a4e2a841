"""Records as JSON text and back."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from .base import SCHEMA_VERSION

R = TypeVar("R")


def to_json(record: Any, *, indent: int | None = 2) -> str:
    """A record as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(dataclasses.asdict(record)), indent=indent, ensure_ascii=False, allow_nan=False)


def from_json(cls: type[R], text: str) -> R:
    """The record that ``to_json`` wrote.

    Raises:
        ValueError: the text is not JSON, a field is missing or unknown, or the schema's first number differs;
            the message names the field.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"wanted the JSON of a {cls.__name__}, got text that is not JSON ({error})") from error
    if "schema_version" in typing.get_type_hints(cls):
        version = data.get("schema_version") if isinstance(data, dict) else None
        if str(version).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(
                f"wanted a {cls.__name__.lower()} of schema {SCHEMA_VERSION}, got {version!r}; make it again with this "
                "maclin"
            )
    return _build(cls, data, cls.__name__)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kinds = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        if len(kinds) == 1:
            return _build(kinds[0], value, where)
        chosen = next((arg for arg in kinds if _is_scalar(arg, value)), None)
        if chosen is None:
            raise ValueError(f"{where}: wanted {' or '.join(arg.__name__ for arg in kinds)}, got {value!r}")
        return _build(chosen, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: wanted a list, got {type(value).__name__}")
        return tuple(_build(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: wanted an object, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {sorted(hints)}")
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(value))
        if missing:
            raise ValueError(f"{where}: field {missing[0]!r} is missing")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if kind is float and value is None:  # to_json writes null for what is not finite
        return math.nan
    if kind in (int, float, str, bool) and not _is_scalar(kind, value):
        raise ValueError(f"{where}: wanted {kind.__name__}, got {value!r}")
    return float(value) if kind is float else value


def _is_scalar(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of that scalar kind: a whole number is a float too, true and false are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)

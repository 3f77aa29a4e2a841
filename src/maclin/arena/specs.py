"""Which mechanisms are run on a task, and what they are called in its results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from ..bench.specs import Spec, parse_specs
from ..core.errors import OptionError
from ..core.mechanisms import mechanism, row
from ..nn.config import default_options
from ..records import Config
from . import tasks
from .settings import ModelSettings

BASELINES = ("softmax", "mean", "window")
"""What stands beside everything: exact attention, averaging, a local window."""

_OPTIONS: dict[str, Config] = {"window": {"window": 16}}  # to either side: local even where a task is 64 long


def specs_of(text: str, kernels: Sequence[str] = (), baselines: bool = True) -> tuple[Spec, ...]:
    """The mechanisms of a command line, each once, after the baselines.

    Args:
        text: as ``maclin.bench.specs`` reads it, ``softmax,macformer:num_features=64``.
        kernels: a mechanism that has a kernel, and is not told which, is run with each of these.
        baselines: whether ``BASELINES`` are run as well.

    Raises:
        OptionError: unknown names, options that are no name=value, or nothing at all.
    """
    found = [Spec(name, name) for name in BASELINES] if baselines else []
    for spec in parse_specs(text):
        has_kernel = "kernel" in row(spec.name).options and "kernel" not in spec.options
        found += [with_option(spec, "kernel", kernel) for kernel in kernels] if kernels and has_kernel else [spec]
    return tuple({spec.text: spec for spec in found}.values())


def with_option(spec: Spec, name: str, value: str) -> Spec:
    """The same with one option more, which its text says as well."""
    return Spec(f"{spec.text}:{name}={value}", spec.name, {**spec.options, name: value})


def config_of(spec: Spec) -> Config:
    """All options of its mechanism: what the models give it by themselves, what the arena does, what was asked for."""
    return {**default_options(spec.name), **_OPTIONS.get(spec.name, {}), **spec.options}


def folder_of(text: str) -> str:
    """What something is called, as the name of a directory."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def task_label(task: str, options: Config) -> str:
    """What a task is called in its results: ``text:data=brown``, ``csv:letters`` of a user's own file.

    Args:
        task: name in the registry.
        options: of the task; how a file is read is no part of the name.
    """
    parts = [task]
    for name, value in sorted(options.items()):
        if name == "data" and name in options_of_own(task):
            parts.append(Path(str(value)).stem)
        elif name not in _READING:
            parts.append(f"{name}={value}")
    return ":".join(parts)


def options_of_own(task: str) -> tuple[str, ...]:
    """The options without which a task of a user's own data cannot be built."""
    if task not in tasks.TASKS:
        return ()
    return tuple(name for name, default in tasks.options(task).items() if default is inspect.Parameter.empty)


_READING = ("text_column", "label_column", "value_columns", "id_column", "test_data")


def check_spec(spec: Spec, model: ModelSettings) -> None:
    """Build the mechanism once, so that a wrong option is found before any training; raises OptionError."""
    config = config_of(spec)
    if spec.name == "linformer":
        config = {"seq_len": 64, **config}  # any will do; the model passes the length of the task
    try:
        mechanism(spec.name, head_dim=model.head_dim, num_heads=model.num_heads, **config)
    except TypeError as error:  # a value of the wrong kind
        raise OptionError(f"wanted options that {spec.name} takes, got {spec.text} ({error})") from error

"""A real classification task that every Python carries: from which package is this stretch of source code?"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import InputError
from .tiny import Examples, Task

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
"""Packages of the standard library with at least a dozen files each; nothing of them is imported."""

_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
HELD_OUT_EVERY = 3  # of a package's files, the largest first
_TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class SourceTask:
    """The task, and held-out examples that differ from training in one way each.

    Args:
        task: windows of the source code, labelled with their package; held-out ones are from other files.
        longer: held-out windows of twice the length.
        prose: windows of the docstrings and comments of the held-out files only.
    """

    task: Task
    longer: Examples
    prose: Examples


def source_task(length: int, num_train: int, num_held_out: int, vocab: int = 1024, seed: int = 0) -> SourceTask:
    """Windows of ``length`` words and signs, drawn evenly over packages and places; words are hashed to ids.

    Args:
        length: words of a window.
        num_train: windows to train on.
        num_held_out: windows to judge on, of each kind.
        vocab: ids; two words may share one.
        seed: of the places of the windows.

    Raises:
        InputError: the standard library's source is not installed, or its packages are too small.
    """
    train_texts: list[list[Tensor]] = []
    held_texts: list[list[Tensor]] = []
    prose_texts: list[list[Tensor]] = []
    for name in PACKAGES:
        texts = sources(name)
        held = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        kept = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        train_texts.append([_ids(text, vocab) for text in kept])
        held_texts.append([_ids(text, vocab) for text in held])
        # the prose of one file is short, so that of a package stands end to end
        prose_texts.append([_ids("\n".join(prose(text) for text in held), vocab)])
    generator = torch.Generator().manual_seed(seed)
    train = windows(train_texts, length, num_train, generator)
    task = Task(
        name="package of source code",
        source="source files of the standard library: " + ", ".join(PACKAGES),
        classes=PACKAGES,
        vocab=vocab,
        train=train,
        held_out=windows(held_texts, length, num_held_out, generator),
    )
    return SourceTask(
        task,
        windows(held_texts, 2 * length, num_held_out, generator),
        windows(prose_texts, length, num_held_out, generator),
    )


def prose(source: str) -> str:
    """Docstrings and comments of a file, without the marks around them."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append(token.string.lstrip("#! "))
    return "\n".join(text for text in found if text)


def sources(package: str) -> list[str]:
    """The package's files, the largest first."""
    folder = Path(ast.__file__).parent / package
    files = [f for f in sorted(folder.rglob("*.py")) if not _TESTS.intersection(f.relative_to(folder).parts)]
    if len(files) < HELD_OUT_EVERY:
        raise InputError(
            f"wanted the source of the standard library's package {package!r} in {folder}, got {len(files)} files; use "
            "a Python that was installed with its source"
        )
    texts = [file.read_text(encoding="utf-8") for file in files]
    return sorted(texts, key=len, reverse=True)


def _ids(text: str, vocab: int) -> Tensor:
    return torch.tensor([zlib.crc32(word.encode()) % vocab for word in _WORD.findall(text)], dtype=torch.int64)


def windows(classes: list[list[Tensor]], length: int, number: int, generator: torch.Generator) -> Examples:
    """Windows of each class in turn; every place in its texts is as likely."""
    ids: list[Tensor] = []
    labels = torch.arange(number) % len(classes)
    for label in labels.tolist():
        texts = classes[label]
        places = torch.tensor([max(len(text) - length + 1, 0) for text in texts])
        total = int(places.sum())
        if total == 0:
            raise InputError(
                f"wanted texts of a length of at least {length} in every package, got none in {PACKAGES[label]!r}; "
                "choose a shorter length"
            )
        place = int(torch.randint(total, (1,), generator=generator))
        ends = places.cumsum(0)
        index = int(torch.searchsorted(ends, place, right=True))
        start = place - int(ends[index] - places[index])
        ids.append(texts[index][start : start + length])
    return Examples(torch.stack(ids), labels)

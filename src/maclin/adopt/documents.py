"""Documents to calibrate and judge on: those that ship with Python itself, or the user's own files."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maclin.core.errors import InputError

SUFFIXES = (".txt", ".md", ".jsonl")
"""Files that are read: one document each, or in .jsonl one object with "text" per line."""

_MIN_TOPIC, _MIN_DOCSTRING = 800, 1500  # characters: some 200 and 400 tokens


@dataclass(frozen=True)
class Documents:
    """Texts with their names, in a fixed order, no two the same.

    Attributes:
        source: where they come from, for people.
        names: of each document.
        texts: of each document.
        warnings: what to know before believing numbers made with them.
    """

    source: str
    names: tuple[str, ...]
    texts: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def split(self, every: int = 2) -> tuple[Documents, Documents]:
        """Calibration and held-out documents: by length, every ``every``-th one is held out.

        A document is in one part as a whole, and both parts hold short and long ones.

        Args:
            every: 2 halves the documents, 4 holds a quarter out.

        Raises:
            InputError: fewer than two documents.
        """
        if every < 2:
            raise InputError(f"wanted every of at least 2, got {every}")
        if len(self) < 2:
            raise InputError(
                f"wanted at least 2 documents, one to calibrate on and one to judge on, got {len(self)} from "
                f"{self.source}; pass more files, or cut the text into files by topic"
            )
        order = sorted(range(len(self)), key=lambda i: (len(self.texts[i]), self.names[i]))
        held = {order[i] for i in range(len(order)) if i % every == every - 1} or {order[-1]}
        return self._only(set(order) - held), self._only(held)

    def spread(self, number: int) -> Documents:
        """At most so many documents, evenly spread over the lengths; all where there are no more.

        Args:
            number: documents, at least 2.
        """
        if len(self) <= number:
            return self
        order = sorted(range(len(self)), key=lambda i: (len(self.texts[i]), self.names[i]))
        return self._only({order[round(i * (len(order) - 1) / (number - 1))] for i in range(number)})

    def _only(self, keep: set[int]) -> Documents:
        chosen = sorted(keep)
        return Documents(
            self.source, tuple(self.names[i] for i in chosen), tuple(self.texts[i] for i in chosen), self.warnings
        )


def python_documents() -> Documents:
    """Real prose that every Python carries: the topics of ``help()`` and the docstrings of long modules.

    Raises:
        InputError: this Python was installed without them.
    """
    pairs = [*_topics(), *_docstrings()]
    texts = [text for _, text in pairs]
    kept = [(n, t) for n, t in pairs if not any(t in other for other in texts if len(other) > len(t))]
    if len(kept) < 2:
        raise InputError(
            "wanted the help topics and docstrings that ship with Python, found none in this installation; "
            "pass your own documents with --data"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _made(f"help topics and module docstrings of Python {version}", kept)


def read_documents(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Documents:
    """The user's documents: .txt and .md files as one document each, .jsonl with one {"text": ...} per line.

    Args:
        paths: files, or directories that are searched recursively; hidden files are left out.

    Raises:
        InputError: a path that is missing, unreadable, empty, binary, or of another kind; the message names it.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    pairs: list[tuple[str, str]] = []
    for path in map(Path, given):
        for file in _files(path):
            pairs.extend(_read(file))
    if not pairs:
        raise InputError(f"wanted paths to documents ({', '.join(SUFFIXES)}), got none")
    return _made(", ".join(str(path) for path in given), pairs)


def _made(source: str, pairs: list[tuple[str, str]]) -> Documents:
    unique: dict[str, str] = {}
    for name, text in pairs:
        unique.setdefault(text.strip(), name)
    warnings: list[str] = []
    repeated = len(pairs) - len(unique)
    if repeated:
        warnings.append(
            f"{repeated} of {len(pairs)} documents repeat another and were left out, so that none is in both parts"
        )
    if len(unique) < 16:
        warnings.append(
            f"only {len(unique)} documents: agreement moves in steps of {200 / max(len(unique), 2):.0f} % of the "
            "held-out half, and the plan may change with other documents; use at least 16"
        )
    return Documents(source, tuple(unique.values()), tuple(unique), tuple(warnings))


def _topics() -> list[tuple[str, str]]:
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [(f"help:{name}", text) for name, text in sorted(topics.items()) if len(text) >= _MIN_TOPIC]


def _docstrings() -> list[tuple[str, str]]:
    """Docstrings of the standard library's public top-level modules, read from source; nothing is imported."""
    library = Path(ast.__file__).parent
    found: list[tuple[str, str]] = []
    for name in sorted(sys.stdlib_module_names):
        file = next((f for f in (library / f"{name}.py", library / name / "__init__.py") if f.is_file()), None)
        if name.startswith("_") or file is None:
            continue
        try:
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a module that cannot be read is one document less
        if text is not None and len(text) >= _MIN_DOCSTRING:
            found.append((f"module:{name}", text))
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            raise InputError(f"wanted documents ({', '.join(SUFFIXES)}) in {path}, found none")
        return found
    if not path.exists():
        raise InputError(f"no such file or directory: {path}; wanted documents ({', '.join(SUFFIXES)})")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"wanted a document ({', '.join(SUFFIXES)}), got {path}; save it as plain text")
    return [path]


def _read(file: Path) -> Iterator[tuple[str, str]]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the document {file}: {error.strerror or error}; check its permissions"
        ) from error
    if b"\0" in data:
        raise InputError(f"wanted plain text, got a binary file: {file}; save it as UTF-8 text, or leave it out")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"wanted UTF-8 text, got {file}, which is not ({error.reason} at byte {error.start}); "
            "convert it, or leave it out"
        ) from error
    if not text.strip():
        raise InputError(f"the document {file} is empty; wanted text, or leave it out")
    if file.suffix.lower() != ".jsonl":
        yield str(file), text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{file}:{number}", _line_text(file, number, line)


def _line_text(file: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f'{file}, line {number}: wanted a JSON object with "text", got no JSON ({error.msg})'
        ) from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{file}, line {number}: wanted a JSON object with "text", a string that is not empty')
    return text

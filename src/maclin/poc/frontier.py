"""The frontier: 0, 1, ... all layers linear, least harmful first, each point measured on held-out documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maclin.progress import Progress

from ..adopt import Loaded, Step, convert_, restore_
from ..bench import embedding_fidelity, interleaved, peak_bytes
from ..records import FrontierPoint


@dataclass(frozen=True)
class HostCheck:
    """Whether the conversion itself is right.

    ``softmax_max_abs_error`` is the largest difference between the embeddings of the original and of the model
    with every layer converted to exact attention; ``restore_is_bit_equal`` says whether restoring is exact.
    """

    softmax_max_abs_error: float
    restore_is_bit_equal: bool


def check_host(loaded: Loaded, texts: Sequence[str], original: Tensor, max_length: int) -> HostCheck:
    """Convert every layer to "softmax" and restore; proves that masks, scaling and layout are right.

    Args:
        loaded: the model, unconverted; it is left so.
        texts: documents of different lengths, so that batches are padded.
        original: their embeddings (documents, E) by the untouched model.
        max_length: tokens after which documents are cut.
    """
    convert_(loaded.model, "softmax")
    try:
        converted = loaded.encode(texts, max_length=max_length)
    finally:
        restore_(loaded.model)
    restored = loaded.encode(texts, max_length=max_length)
    return HostCheck(float((converted - original).abs().max()), torch.equal(restored, original))


def measure_frontier(
    loaded: Loaded,
    steps: Sequence[Step],
    ready: Mapping[str, nn.Module],
    texts: Sequence[str],
    original: Tensor,
    *,
    length: int,
    device: str,
    seconds_per_point: float,
    progress: Progress,
) -> tuple[FrontierPoint, ...]:
    """Measure the model with its first 0, 1, ... all steps carried out.

    Quality comes from all documents; latency (in turns with the other points) and memory from one document of
    ``length`` tokens.

    Args:
        loaded: the model, unconverted; it is left so, also on an error.
        steps: layers with their mechanisms, least harmful first.
        ready: the mechanism of each of these layers, calibrated where it learns from data.
        texts: held-out documents.
        original: their embeddings by the untouched model.
        length: tokens at which latency and memory are measured.
        device: where the model is.
        seconds_per_point: wall time for the latency of one point.
        progress: advanced once per point, and once for the latencies.
    """
    batch = document_of(loaded, texts, length)
    fidelity, memory = [], []
    try:
        for number in range(len(steps) + 1):
            switch_(loaded, steps[:number], ready)
            embeddings = original if number == 0 else loaded.encode(texts, max_length=length)
            fidelity.append(embedding_fidelity(original, embeddings))
            memory.append(peak_bytes(lambda: loaded.embed(batch), device))
            progress.advance(f"{number} linear: cosine {fidelity[-1].cosine_mean:.3f}")
        stats = interleaved(
            {str(number): lambda: loaded.embed(batch) for number in range(len(steps) + 1)},
            before={str(number): _switch(loaded, steps[:number], ready) for number in range(len(steps) + 1)},
            max_seconds=seconds_per_point * (len(steps) + 1),
            device=device,
        )
        progress.advance("latencies")
    finally:
        switch_(loaded, (), ready)
    return tuple(
        FrontierPoint(
            num_linear=number,
            linear_layers=tuple(step.layer for step in steps[:number]),
            mechanisms=tuple(step.mechanism for step in steps[:number]),
            configs=tuple(step.config for step in steps[:number]),
            cosine_mean=fidelity[number].cosine_mean,
            cosine_p05=fidelity[number].cosine_p05,
            neighbour_agreement=fidelity[number].neighbour_agreement,
            latency_ms=stats[str(number)].median_ms,
            peak_bytes=memory[number],
            length=length,
        )
        for number in range(len(steps) + 1)
    )


def switch_(loaded: Loaded, steps: Sequence[Step], ready: Mapping[str, nn.Module]) -> None:
    """Convert exactly these layers, to their ready mechanisms; with none, restore."""
    if steps:
        convert_(loaded.model, {step.layer: ready[step.layer] for step in steps})
    elif loaded.converted:
        restore_(loaded.model)


def document_of(loaded: Loaded, texts: Sequence[str], length: int) -> Mapping[str, Tensor]:
    """One real document of exactly ``length`` tokens: texts end to end, longest first, cut."""
    text = "\n\n".join(sorted(texts, key=len, reverse=True))
    while True:
        batch = loaded.tokenize([text], max_length=length)[0]
        if batch["attention_mask"].shape[1] >= length:
            return batch
        text = f"{text}\n\n{text}"


def _switch(loaded: Loaded, steps: Sequence[Step], ready: Mapping[str, nn.Module]) -> Callable[[], None]:
    return lambda: switch_(loaded, steps, ready)

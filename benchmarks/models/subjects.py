"""One way to see all five models: what is converted, what it is healed on, and the numbers it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maclin.progress import Progress, Silent

from . import minilm, rxnmapper, smollm, texts, vit, whisper

Batch = dict[str, Tensor]


@dataclass
class Subject:
    """A model with its data.

    Attributes:
        name: of the model.
        root: the module that is converted.
        learned: so many batches to heal and calibrate on.
        judged: so many batches that nothing is healed on.
        measure: the metric of the model as it is now, against what it was before it was converted; asked to be brief,
            it leaves out what takes long.
        data: what it is judged on, in words, with a fingerprint.
        length: tokens of its longest inputs.
    """

    name: str
    root: nn.Module
    learned: Callable[[int], list[Batch]]
    judged: Callable[[int], list[Batch]]
    measure: Callable[..., dict[str, Any]]
    data: Mapping[str, Any]
    length: int
    parts: dict[str, Any] = field(default_factory=dict)


def minilm_subject(number: int = 300, classified: int = 600, progress: Progress | None = None) -> Subject:
    """MiniLM: cosines, nearest neighbours, and nearest centroids of newsgroups (none if ``classified`` is 0)."""
    listen = progress or Silent()
    model = minilm.load(listen)
    documents = minilm.judged(model, number, listen)
    given = [text.text for text in documents.documents]
    groups = minilm.newsgroups(model, classified, listen) if classified else None
    before = model.encode(given)
    data: dict[str, Any] = {
        "documents": f"{len(given)} of 20 Newsgroups' test part and of the kernel's documentation, 256 tokens at least",
        "fingerprint": texts.fingerprint(given),
    }
    original: dict[str, float] = {}
    if groups is not None:
        data["classified"] = f"{classified} to learn centroids from, {classified} to judge by, 256 tokens at least"
        data["classified_fingerprint"] = texts.fingerprint(text.text for text in (*groups.train, *groups.test))
        original["centroid_accuracy_before"] = _centroids(model, groups)

    def measure(brief: bool = False) -> dict[str, Any]:
        after = model.encode(given)
        found = minilm.cosines(before, after)
        out: dict[str, Any] = {
            "mean_cosine": float(found.mean()),
            "least_cosine": float(found.min()),
            "same_neighbour": minilm.same_neighbour(before, after),
            "by_length": {
                bucket: {"mean_cosine": mean, "documents": count}
                for bucket, (mean, count) in minilm.by_length(found, documents.tokens).items()
            },
        }
        if groups is not None and not brief:
            out |= original | {"centroid_accuracy": _centroids(model, groups)}
        return out

    def learned(batches: int) -> list[Batch]:
        # few in a batch: more steps in the same minutes
        return model.tokenize([text.text for text in minilm.learned(model, 4 * batches, listen)], batch_size=4)

    return Subject(
        "MiniLM",
        model.model,
        learned,
        lambda batches: model.tokenize(given[:: max(1, len(given) // (8 * batches))][: 8 * batches], batch_size=8),
        measure,
        data,
        512,
        {"loaded": model, "texts": given},
    )


def _centroids(model: Any, groups: minilm.Newsgroups) -> float:
    train, test = (model.encode([text.text for text in part]) for part in (groups.train, groups.test))
    return minilm.centroid_accuracy(train, test, groups)


def rxnmapper_subject(number: int = 60, progress: Progress | None = None) -> Subject:
    """RXNMapper: where it maps atoms to, against itself and against how the reactions were made."""
    rxn = rxnmapper.load(progress)
    judged = rxnmapper.shuffled(rxnmapper.reactions(True), number)
    before = [rxnmapper.atom_map(rxn, reaction) for reaction in judged]

    def measure(brief: bool = False) -> dict[str, Any]:
        after = [rxnmapper.atom_map(rxn, reaction) for reaction in judged]
        return {
            "same_atoms": rxnmapper.agreement(before, after),
            "right_atoms": rxnmapper.agreement([reaction.origins for reaction in judged], after),
            "right_atoms_before": rxnmapper.agreement([reaction.origins for reaction in judged], before),
        }

    def batches(found: Sequence[rxnmapper.Reaction], count: int) -> list[Batch]:
        rows = [reaction.smiles for reaction in rxnmapper.shuffled(found, 8 * count, seed=1)]
        return [rxn.ids(rows[i : i + 8]) for i in range(0, len(rows), 8)]

    return Subject(
        "RXNMapper",
        rxn.model,
        lambda count: batches(rxnmapper.reactions(False), count),
        lambda count: batches(rxnmapper.reactions(True), count),
        measure,
        {
            "reactions": f"{len(judged)} that were put together from parts, pairs of which nothing was healed on",
            "fingerprint": texts.fingerprint(reaction.smiles for reaction in judged),
        },
        max(len(rxnmapper.tokens(reaction.smiles)) + 2 for reaction in judged),
        {"rxn": rxn},
    )


def smollm_subject(number: int = 8, length: int = smollm.CHUNK, progress: Progress | None = None) -> Subject:
    """SmolLM2: perplexity of stretches of speeches, kernel documentation and the Brown corpus, and of a novel.

    Args:
        number: stretches of each kind.
        length: tokens of a stretch.
        progress: is told what is brought.
    """
    lm = smollm.load(progress)
    kinds = {
        "speeches": texts.speeches("judged", progress),
        "kernel": texts.kernel("judged", progress),
        "brown": texts.brown("judged", progress),
    }
    rows = {
        kind: smollm.chunks(lm, [text.text for text in texts.drawn(found, len(found), _long)], number, length)
        for kind, found in kinds.items()
    }
    rows["novel"] = smollm.chunks(lm, [texts.moby_dick(progress).text], number, length, per_text=number)

    def likelihoods(most: int) -> dict[str, Tensor]:
        return {kind: smollm.nll(lm, tokens[:most]) for kind, tokens in rows.items()}

    def measure(brief: bool = False) -> dict[str, Any]:
        most = min(2, number) if brief else number
        after, known = likelihoods(most), {kind: x[:most] for kind, x in before.items()}
        total = {name: torch.cat(list(x.values())).mean() for name, x in (("before", known), ("after", after))}
        return {
            "perplexity": float(total["after"].exp()),
            "perplexity_before": float(total["before"].exp()),
            "ratio": float((total["after"] - total["before"]).exp()),
            "by_kind": {
                kind: {
                    "perplexity": float(after[kind].mean().exp()),
                    "perplexity_before": float(known[kind].mean().exp()),
                    "ratio": float((after[kind].mean() - known[kind].mean()).exp()),
                }
                for kind in rows
            },
        }

    before = likelihoods(number)

    def learned(batches: int) -> list[Batch]:
        pools = [
            texts.drawn(found, len(found), _long)
            for found in (texts.speeches("learned", progress), texts.kernel("learned", progress))
        ]
        pools.append(texts.drawn(texts.brown("learned", progress), 500, _long))
        each = -(-batches // len(pools))
        # half as long as what is judged: twice as many steps in the same minutes, and windows are far shorter still
        parts = [smollm.chunks(lm, [text.text for text in pool], each, length // 2, per_text=4) for pool in pools]
        mixed = torch.stack(parts, dim=1).flatten(0, 1)[:batches]
        return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in mixed]

    def judged(batches: int) -> list[Batch]:
        mixed = torch.stack(list(rows.values()), dim=1).flatten(0, 1)[:batches]
        return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in mixed]

    return Subject(
        "SmolLM2",
        lm.model,
        learned,
        judged,
        measure,
        {
            "stretches": f"{number} of {length} tokens of each of {', '.join(rows)}; no file of theirs is healed on, "
            "and nothing of the novel",
            "fingerprint": texts.fingerprint(str(tokens.tolist()) for tokens in rows.values()),
        },
        length,
        {"lm": lm, "rows": rows},
    )


def _long(text: texts.Text) -> bool:
    return len(text.text) > 8_000


def whisper_subject(progress: Progress | None = None) -> Subject:
    """Whisper's encoder: words heard right, of 29, and how near its output stays."""
    model = whisper.load(progress)
    sounds = whisper.prompts(progress)
    names = list(whisper.WORDS)
    before = _encoded(model, torch.cat([model.features(sounds[name]) for name in names[::7]]))

    def measure(brief: bool = False) -> dict[str, Any]:
        transcripts = whisper.heard(model, sounds)
        after = _encoded(model, torch.cat([model.features(sounds[name]) for name in names[::7]]))
        return {
            "words_right": whisper.right(transcripts),
            "wrong": {
                word: transcripts[name]
                for name, word in whisper.WORDS.items()
                if whisper.spoken(transcripts[name]) != word
            },
            "rel_error": float((after - before).norm() / before.norm()),
        }

    def learned(batches: int) -> list[Batch]:
        # as many with one prompt, which is what is judged, as with many
        seconds = [(2.5, 28.0, 6.0, 14.0)[i % 4] for i in range(batches)]
        return [{"input_features": model.features(x)} for x in whisper.healing_sounds(sounds, seconds, seed=3)]

    return Subject(
        "Whisper",
        model.encoder,
        learned,
        lambda batches: [{"input_features": model.features(sounds[name])} for name in names[:batches]],
        measure,
        {
            "prompts": "29 telephone prompts, digits, days and months; nothing is healed on them",
            "fingerprint": texts.fingerprint(names),
        },
        1500,
        {"whisper": model, "sounds": sounds},
    )


@torch.no_grad()
def _encoded(model: whisper.Whisper, features: Tensor) -> Tensor:
    return torch.cat([model.encoder(x[None]).last_hidden_state for x in features])


def vit_subject(number: int = 15, progress: Progress | None = None) -> Subject:
    """The ViT: how its maps of saliency correlate with those it made before."""
    model = vit.load(progress)
    pictures = vit.judged_photos(number, progress)
    before = vit.maps(model, pictures.pixels)

    def measure(brief: bool = False) -> dict[str, Any]:
        found = vit.correlations(before, vit.maps(model, pictures.pixels))
        return {"mean_correlation": float(found.mean()), "least_correlation": float(found.min())}

    return Subject(
        "ViT",
        model.backbone,
        lambda batches: [{"pixel_values": x[None]} for x in vit.learned_photos(batches, progress).pixels],
        lambda batches: [{"pixel_values": x[None]} for x in pictures.pixels[:batches]],
        measure,
        {
            "pictures": f"{number} parts of photographs, of a package that nothing is healed on, at 518 pixels",
            "fingerprint": texts.fingerprint(pictures.names),
        },
        1370,
        {"model": model, "pixels": pictures.pixels},
    )


SUBJECTS: dict[str, Callable[..., Subject]] = {
    "minilm": minilm_subject,
    "rxnmapper": rxnmapper_subject,
    "smollm": smollm_subject,
    "whisper": whisper_subject,
    "vit": vit_subject,
}
"""By the name it has on the command line."""

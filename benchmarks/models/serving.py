"""The rows of benchmarks/adopt.py about serving: back to the bit, decoding behind a long context, and the guard."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import maclin
from maclin.adopt.hosts import host
from maclin.bench import Target, interleaved
from maclin.core.mechanisms import Mechanism

from . import smollm as lm_module
from .healing import HYBRID_128
from .job import Job, Outcome
from .subjects import SUBJECTS, Batch, Subject

CONTEXT = 8_000
GUARDED_TOKENS = 4_096
NUM_TOLERANCES = 7
SHARE_GUARD, FLAGGED, SPARED = 0.05, 0.99, 0.01
MECHANISMS = ("window", "hybrid")


def restore(job: Job) -> Outcome:
    """Convert every model twice, restore it, and compare outputs and keys with those before."""
    targets, figures = [], {}
    for name, subject_of in SUBJECTS.items():
        subject = _small(name, subject_of, job)
        batch = subject.judged(1)[0]
        before, keys = _outputs(subject, batch), list(subject.root.state_dict())
        rows = {}
        for mechanism in MECHANISMS:
            options: dict[str, Any] = {"window": 16} | ({"linear": "hedgehog"} if mechanism == "hybrid" else {})
            maclin.convert_(subject.root, mechanism, filter_fn=_replaceable(subject), **options)
            changed = not _same(before, _outputs(subject, batch))
            maclin.restore_(subject.root)
            rows[mechanism] = {
                "changed": changed,
                "equal": _same(before, _outputs(subject, batch)),
                "keys": list(subject.root.state_dict()) == keys,
            }
            job.say(f"{subject.name}, {mechanism}: {rows[mechanism]}")
        met = all(all(row.values()) for row in rows.values())
        figures[subject.name] = rows
        targets.append(
            Target(
                f"{subject.name}: converted and restored",
                "outputs equal to the bit",
                "equal" if met else f"{rows}",
                met,
                f"by {' and '.join(MECHANISMS)}, whose outputs differ from the original's; keys of the state as before",
            )
        )
    return Outcome(targets, figures)


def decode(job: Job) -> Outcome:
    """One decoding step of SmolLM2 behind a long context, converted and not, and the bytes that a cache holds."""
    lm = lm_module.load(job.progress)
    context = job.few(CONTEXT, 600)
    ids = _novel(lm, context, job)
    found = {"original": lm_module.step_seconds(lm, ids, job.few(16, 4))}
    job.say(f"original: {found['original']}")
    layers = _converted_smollm(job, lm)
    found["converted"] = lm_module.step_seconds(lm, ids, job.few(16, 4))
    job.say(f"converted: {found['converted']}")
    states = {n: lm_module.state_bytes(lm, ids[:, :n]) for n in (context // 4, context // 2, context)}
    job.say(f"bytes of the states: {states}")
    ratio = found["original"]["median"] / found["converted"]["median"]
    name = f"SmolLM2, {len(layers)} of 30 layers hybrid, {context:,} tokens of context"
    return Outcome(
        [
            Target(
                f"{name}: a decoding step",
                "faster than the original",
                f"{ratio:.2f} times as fast",
                ratio > 1,
                f"{1e3 * found['original']['median']:.0f} ms against {1e3 * found['converted']['median']:.0f} ms, "
                "medians; one after the other",
            ),
            Target(
                f"{name}: state of the converted layers",
                "independent of the context",
                " = ".join(f"{size / 2**20:.2f} MiB" for size in states.values()),
                len(set(states.values())) == 1,
                f"at {', '.join(f'{n:,}' for n in states)} tokens; the whole cache "
                f"{found['converted']['cache_bytes'] / 2**20:.0f} MiB, the original's "
                f"{found['original']['cache_bytes'] / 2**20:.0f} MiB",
            ),
        ],
        {"steps": found, "state_bytes": {str(n): size for n, size in states.items()}, "layers": layers},
    )


def guard(job: Job) -> Outcome:
    """The guard on SmolLM2: its share of the forward time, and its flags beside true errors, computed in full."""
    lm = lm_module.load(job.progress)
    length = job.few(GUARDED_TOKENS, 512)
    layers = _converted_smollm(job, lm)
    rows = torch.cat([_novel(lm, length, job, start) for start in range(job.few(6, 2))])
    model = lm.model.model
    share = _share(model, rows[:1], job.few(7, 3))
    job.say(f"share: {share}")
    errors = [_true_errors(model, row[None]) for row in rows]
    flat = sorted(error for row in errors for error in row.values())
    cases = {"above": [0, 0], "below": [0, 0]}
    # from where the smallest error is three times the tolerance to where the largest is a third of it
    least, most = flat[0] / 3, 3 * flat[-1]
    tolerances = [least * (most / least) ** (i / (NUM_TOLERANCES - 1)) for i in range(NUM_TOLERANCES)]
    for tolerance in tolerances:
        for row, true in zip(rows, errors, strict=True):
            flagged = _flags(model, row[None], tolerance)
            for layer, error in true.items():
                kind = "above" if error > 2 * tolerance else "below" if error < tolerance / 2 else None
                if kind is not None:
                    cases[kind][0] += layer in flagged
                    cases[kind][1] += 1
        job.say(f"tolerance {tolerance:.4f}: {cases}")
    maclin.restore_(lm.model)
    found, all_above = cases["above"]
    wrong, all_below = cases["below"]
    name = f"guard, SmolLM2 with {len(layers)} of 30 layers hybrid, {length:,} tokens"
    return Outcome(
        [
            Target(
                f"{name}: its share of the forward time",
                f"<= {SHARE_GUARD:.0%}",
                f"{share['share']:.2%}",
                share["share"] <= SHARE_GUARD,
                f"{share['guarded_ms']:.0f} ms against {share['plain_ms']:.0f} ms, medians in turns; every layer "
                "checked in every pass",
            ),
            Target(
                f"{name}: flags where the true error is above twice the tolerance",
                f">= {FLAGGED:.0%}",
                f"{found / all_above:.2%}" if all_above else "no such case",
                None if not all_above else found >= FLAGGED * all_above,
                f"{found} of {all_above}, {len(tolerances)} tolerances, {len(rows)} documents",
            ),
            Target(
                f"{name}: flags where it is below half of it",
                f"<= {SPARED:.0%}",
                f"{wrong / all_below:.2%}" if all_below else "no such case",
                None if not all_below else wrong <= SPARED * all_below,
                f"{wrong} of {all_below}",
            ),
        ],
        {"share": share, "tolerances": tolerances, "true_errors": errors, "cases": cases, "layers": layers},
    )


def _small(name: str, subject_of: Any, job: Job) -> Subject:
    """A model with as little data as will do."""
    fewer = {"minilm": {"number": 16, "classified": 0}, "smollm": {"number": 1, "length": 300}, "vit": {"number": 1}}
    return subject_of(**fewer.get(name, {}), progress=job.progress)


def _replaceable(subject: Subject) -> Any:
    names = {layer.name for layer in host(subject.root).layers() if layer.refused is None}
    return lambda module, name: name in names


@torch.no_grad()
def _outputs(subject: Subject, batch: Batch) -> list[Tensor]:
    """Every tensor of numbers that the model returns."""
    out = subject.root(batch) if subject.name == "MiniLM" else subject.root(**batch)
    return [x.clone() for x in out.values() if isinstance(x, Tensor) and x.is_floating_point()]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _novel(lm: lm_module.SmolLM, length: int, job: Job, part: int = 0) -> Tensor:
    """A stretch of a novel that nothing is healed on, (1, length)."""
    from . import texts

    return lm_module.chunks(lm, [texts.moby_dick(job.progress).text], part + 1, length, per_text=part + 1)[part:]


def _converted_smollm(job: Job, lm: lm_module.SmolLM) -> list[str]:
    """SmolLM2 as the row ``smollm`` healed it; where it has not been, with every second layer converted, unhealed."""
    from . import texts

    model, saved = lm.model, job.folder("smollm") / "healed"
    if (saved / "record.json").is_file():
        maclin.load_converted(saved, model)
    else:
        job.say("the row smollm has not been healed: every second layer is converted, unhealed")
        names = [layer.name for layer in host(model).layers()]
        speeches = [text.text for text in texts.speeches("learned", job.progress)]
        batches = [{"input_ids": row[None]} for row in lm_module.chunks(lm, speeches, 3, 1024)]
        maclin.convert_(model, dict.fromkeys(names[1::2], HYBRID_128), batches=batches)
    model.eval()
    return list(_mechanisms(model))


def _mechanisms(model: nn.Module) -> dict[str, Mechanism]:
    """The outermost mechanisms of a model, by the name of the attention module."""
    found: dict[str, Mechanism] = {}
    for name, module in model.named_modules():
        if isinstance(module, Mechanism) and not any(name.startswith(f"{other}.") for other in found):
            found[name] = module
    return {name.rpartition(".")[0]: module for name, module in found.items()}


def _share(model: nn.Module, ids: Tensor, runs: int) -> dict[str, float]:
    """Forward times with and without a guard that checks every layer, in turns, and what the guard counted itself."""
    state: dict[str, Any] = {}

    def guarded() -> None:
        state["guard"] = maclin.guard(model, tolerance=1e9, max_share=None, action="warn")

    def plain() -> None:
        found = state.pop("guard", None)
        if found is not None:
            state["counted"] = found.record().share
            found.remove()

    def forward() -> object:
        return model(input_ids=ids, use_cache=False)

    stats = interleaved(
        {"plain": forward, "guarded": forward},
        before={"plain": plain, "guarded": guarded},
        min_runs=runs,
        max_runs=runs,
    )
    plain()
    medians = {f"{name}_ms": row.median_ms for name, row in stats.items()}
    share = medians["guarded_ms"] / medians["plain_ms"] - 1
    return {**medians, "share": share, "counted_share": float(state.get("counted") or math.nan)}


@torch.no_grad()
def _true_errors(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """||out - exact|| / ||exact|| of each converted layer on what it is given in this pass, all rows computed."""
    errors: dict[str, float] = {}
    handles = []
    for name, mechanism in _mechanisms(model).items():

        def compare(m: nn.Module, args: Any, kwargs: dict[str, Any], out: Any, name: str = name) -> None:
            q, k, v = (x.double() for x in args)
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            made = (out[0] if isinstance(out, tuple) else out).double()
            off = size = 0.0
            # head by head, for the memory
            for h in range(q.shape[1]):
                exact = nn.functional.scaled_dot_product_attention(
                    q[:, h], k[:, h], v[:, h], is_causal=bool(kwargs.get("is_causal")), scale=kwargs.get("scale")
                )
                off += float((made[:, h] - exact).square().sum())
                size += float(exact.square().sum())
            errors[name] = math.sqrt(off / size)

        handles.append(mechanism.register_forward_hook(compare, with_kwargs=True))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return errors


@torch.no_grad()
def _flags(model: nn.Module, ids: Tensor, tolerance: float) -> set[str]:
    """Layers that the guard flags in this pass, the outputs being left as they are."""
    flagged: set[str] = set()
    options: dict[str, Any] = {"tolerance": tolerance, "max_share": None, "action": "warn"}
    with warnings.catch_warnings(), maclin.guard(model, **options, on_flag=lambda flag: flagged.add(flag.layer)):
        warnings.simplefilter("ignore")
        model(input_ids=ids, use_cache=False)
    return flagged

"""The five models as their packages bring them: each does what it is known to do."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

import maclin
from maclin.core.errors import InputError

minilm: Any = importlib.import_module("models.minilm")
rxnmapper: Any = importlib.import_module("models.rxnmapper")
smollm: Any = importlib.import_module("models.smollm")
texts: Any = importlib.import_module("models.texts")
vit: Any = importlib.import_module("models.vit")
whisper: Any = importlib.import_module("models.whisper")

pytestmark = [pytest.mark.network, pytest.mark.slow]


def had(load: Callable[[], Any]) -> Any:
    """What it loads, unless the package cannot be had."""
    try:
        return load()
    except InputError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))


def test_minilm_knows_what_says_the_same() -> None:
    alike, apart = minilm.similarities(had(minilm.load))
    assert alike > 0.55
    assert apart < 0.2


def test_rxnmapper_finds_masked_tokens_and_maps_atoms() -> None:
    rxn = had(rxnmapper.load)
    found, tokens = rxnmapper.masked_accuracy(
        rxn, "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
    )
    assert (found, tokens) == (53, 54)
    judged = rxnmapper.shuffled(rxnmapper.reactions(True), 20)
    maps = [rxnmapper.atom_map(rxn, reaction) for reaction in judged]
    assert rxnmapper.agreement([reaction.origins for reaction in judged], maps) > 0.9
    # reactions are shorter than this window, and longer than that one
    maclin.convert_(rxn.model, "window", window=128)
    assert rxnmapper.agreement(maps, [rxnmapper.atom_map(rxn, reaction) for reaction in judged]) == 1.0
    maclin.convert_(rxn.model, "mean")
    assert rxnmapper.agreement(maps, [rxnmapper.atom_map(rxn, reaction) for reaction in judged]) < 0.6


def test_smollm_reads_and_answers() -> None:
    lm = had(smollm.load)
    speech = next(x for part in ("learned", "judged") for x in texts.speeches(part) if x.name.startswith("sotu:1946"))
    rows = smollm.chunks(lm, [speech.text], 1, 1024)
    assert 15 < smollm.perplexity(lm, rows) < 35
    mixed = rows[:, torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    assert smollm.perplexity(lm, mixed) > 1_000
    ids = torch.tensor([lm.ids("The capital of France is")])
    out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert lm.tokenizer.decode(out[0].tolist()).endswith("Paris.")


def test_whisper_hears_all_29_words() -> None:
    model = had(whisper.load)
    assert whisper.right(whisper.heard(model, had(whisper.prompts))) == 29


def test_the_vit_sees_what_its_onnx_file_sees() -> None:
    model = had(vit.load)
    pattern = vit.pattern(224)
    found = vit.maps(model, pattern)
    assert found.shape == (1, 224, 224)
    # as onnxruntime 1.32 gave them
    facts = [[0.2792, 0.0968, 0.1126, 0.0950], [0.1328, 0.0791, 0.2185, 0.0453]]
    torch.testing.assert_close(found[0, :112:56, ::56], torch.tensor(facts), atol=1e-3, rtol=0)
    assert float(found.mean()) == pytest.approx(0.1728, abs=1e-3)
    if importlib.util.find_spec("onnxruntime") is not None:
        session = importlib.import_module("onnxruntime").InferenceSession(str(vit.weights()))
        theirs = torch.tensor(session.run(None, {"input_image": pattern.numpy()})[0])[:, 0]
        torch.testing.assert_close(found, theirs, atol=1e-4, rtol=0)


def test_a_package_that_cannot_be_had_is_said(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACLIN_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="rxnmapper"):
        rxnmapper.load()

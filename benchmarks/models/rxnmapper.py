"""RXNMapper's ALBERT: 12 layers that share one set of weights, 8 heads of 32; its attention is what it is made for.

In its eleventh layer the sixth head of each atom of a product points at the atom it was in the reactants. Reactions
are put together from parts here, so that where each atom came from is known.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM

from maclin.core.errors import InputError
from maclin.progress import Progress, Silent

from .packages import RXNMAPPER, unpacked

LAYER, HEAD = 10, 5
"""Which attention maps atoms, counted from 0."""

# brackets, two-letter elements, ring closures of two digits, the arrow, and single signs
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|[A-Za-z]|[\d().=#+\-/\\:~@?*$]")
_ATOM = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFIbcnosp]")


@dataclass(frozen=True)
class Reaction:
    """A reaction and where the atoms of its product came from.

    Attributes:
        smiles: reactants, ``>>``, product.
        origins: for each token of the product that is an atom, the token of the reactants that it was; by position
            in the whole, [CLS] before it included.
    """

    smiles: str
    origins: dict[int, int]


@dataclass(frozen=True)
class RxnMapper:
    """The model with its vocabulary."""

    model: AlbertForMaskedLM
    vocabulary: dict[str, int]

    def ids(self, smiles: Sequence[str]) -> dict[str, Tensor]:
        """Padded tokens of some reactions with their mask.

        Raises:
            InputError: something in them is no token of SMILES.
        """
        rows = []
        for text in smiles:
            parts = tokens(text)
            unknown = [part for part in parts if part not in self.vocabulary]
            if unknown:
                raise InputError(f"wanted SMILES of tokens that the model knows, got {unknown[0]!r} in {text}")
            rows.append(torch.tensor([self.vocabulary[part] for part in ("[CLS]", *parts, "[SEP]")]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.vocabulary["[PAD]"])
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}


def tokens(smiles: str) -> list[str]:
    """Tokens of a text in SMILES.

    Raises:
        InputError: something in it is none.
    """
    found = _TOKEN.findall(smiles)
    if "".join(found) != smiles:
        raise InputError(f"wanted SMILES, got {smiles!r}")
    return found


def load(progress: Progress | None = None) -> RxnMapper:
    """The packaged model, in evaluation mode; its weights are read without unpickling anything but tensors.

    Raises:
        InputError: the package cannot be had; the message says where to put it.
    """
    folder = unpacked(RXNMAPPER, progress or Silent())
    config = AlbertConfig.from_json_file(str(folder / "config.json"))
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model = AlbertForMaskedLM(config)
    model.load_state_dict({name: x for name, x in state.items() if "pooler" not in name}, strict=True)
    model.tie_weights()
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return RxnMapper(model.float().eval(), {word: i for i, word in enumerate(words)})


def masked_accuracy(rxn: RxnMapper, smiles: str) -> tuple[int, int]:
    """How many tokens of a reaction the model finds when each in turn is masked, and how many there are."""
    batch = rxn.ids([smiles])
    ids = batch["input_ids"][0]
    places = torch.arange(1, len(ids) - 1)
    rows = ids.expand(len(places), -1).clone()
    rows[torch.arange(len(places)), places] = rxn.vocabulary["[MASK]"]
    with torch.no_grad():
        logits = rxn.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    found = logits[torch.arange(len(places)), places].argmax(-1)
    return int((found == ids[places]).sum()), len(places)


@torch.no_grad()
def atom_map(rxn: RxnMapper, reaction: Reaction) -> dict[int, int]:
    """From each atom of the product to the atom of the reactants that the model sees in it, of the same element.

    Queries and keys of the mapping head are taken from whatever runs before it, converted or not; its weights are
    softmax(q kᵀ / √D), both ways added.

    Args:
        rxn: the model.
        reaction: which.
    """
    attention = rxn.model.get_submodule("albert.encoder.albert_layer_groups.0.albert_layers.0.attention")
    seen: dict[str, list[Tensor]] = {"query": [], "key": []}
    handles = [
        attention.get_submodule(name).register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        for name, kept in seen.items()
    ]
    try:
        rxn.model(**rxn.ids([reaction.smiles]))
    finally:
        for handle in handles:
            handle.remove()
    width = rxn.model.config.hidden_size // rxn.model.config.num_attention_heads
    q, k = (seen[name][LAYER][0, :, HEAD * width : (HEAD + 1) * width] for name in ("query", "key"))
    weights = (q @ k.T / width**0.5).softmax(-1)
    words = ["[CLS]", *tokens(reaction.smiles), "[SEP]"]
    arrow = words.index(">>")
    atoms = [i for i, word in enumerate(words[:-1]) if i and _ATOM.fullmatch(word)]
    found = {}
    for place in (i for i in atoms if i > arrow):
        same = [i for i in atoms if i < arrow and words[i].lower() == words[place].lower()]
        scores = weights[place, same] + weights[same, place]
        found[place] = same[int(scores.argmax())]
    return found


def agreement(one: Sequence[dict[int, int]], other: Sequence[dict[int, int]]) -> float:
    """Share of the atoms of all products that both map alike."""
    pairs = [(a[place], b.get(place)) for a, b in zip(one, other, strict=True) for place in a]
    return sum(x == y for x, y in pairs) / len(pairs)


_BEFORE = ("CC", "CCC", "CC(C)", "CCCC", "c1ccccc1", "Cc1ccccc1", "c1ccncc1", "C1CCCCC1", "FC(F)(F)", "COc1ccccc1")
_BEHIND = ("C", "CC", "CCC", "CC=C", "Cc1ccccc1", "c1ccc(F)cc1", "c1ccc(OC)cc1", "CCOC", "CC(C)C", "c1ccc(C#N)cc1")
# what stands before the new bond in its reactant and in the product, and the same behind it
_KINDS = {
    "amide": (("C(=O)", "O", "C(=O)"), ("N", "", "N")),
    "ester": (("C(=O)", "O", "C(=O)"), ("O", "", "O")),
    "amine": (("C", "Br", "C"), ("N", "", "N")),
    "ether": (("C", "Cl", "C"), ("O", "", "O")),
    "sulfonamide": (("S(=O)(=O)", "Cl", "S(=O)(=O)"), ("N", "", "N")),
    "thioether": (("C", "I", "C"), ("S", "", "S")),
}


def reactions(judged: bool) -> list[Reaction]:
    """Reactions of six kinds with every pair of parts; those to judge by share no pair with the others.

    Args:
        judged: the fifth of the pairs that nothing is healed on, or the other ones.
    """
    pairs = list(itertools.product(range(len(_BEFORE)), range(len(_BEHIND))))
    kept = [(i, j) for i, j in pairs if ((i + 2 * j) % 5 == 0) == judged]
    return [_reaction(_BEFORE[i], _BEHIND[j], kind) for kind in _KINDS for i, j in kept]


def _reaction(before: str, behind: str, kind: str) -> Reaction:
    (head, leaving, stays), (joint, gone, joined) = _KINDS[kind]
    one, other, product = before + head + leaving, joint + gone + behind, before + stays + joined + behind
    start = 1 + len(tokens(one)) + 1 + len(tokens(other)) + 1
    first = len(tokens(before + stays))
    skip = len(tokens(one)) + 1  # of the first reactant and the full stop
    origins = {
        start + i: 1 + (i if i < first else i - first + skip)
        for i, word in enumerate(tokens(product))
        if _ATOM.fullmatch(word)
    }
    return Reaction(f"{one}.{other}>>{product}", origins)


def shuffled(found: Sequence[Reaction], number: int, seed: int = 0) -> list[Reaction]:
    """So many of them, in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order[:number]]

import math

import pytest
import torch

from maclin.bench import embedding_fidelity


def test_the_same_embeddings_agree() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    found = embedding_fidelity(x, 3 * x)  # length does not matter
    assert (found.cosine_mean, found.cosine_p05) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.neighbour_agreement == 1.0


def test_angles_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.2], dtype=torch.float64)
    turned = torch.tensor([0.0, 0.9, 1.0, 1.2], dtype=torch.float64)
    found = embedding_fidelity(*(torch.stack([a.cos(), a.sin()], -1) for a in (angles, turned)))
    cosines = [math.cos(0.8), 1.0, 1.0, 1.0]
    assert found.cosine_mean == pytest.approx(sum(cosines) / 4)
    assert found.cosine_p05 == pytest.approx(math.cos(0.8) + 0.15 * (1 - math.cos(0.8)))
    # neighbours were 1, 0, 3, 2 and are 1, 2, 1, 2
    assert found.neighbour_agreement == 0.5


def test_two_documents_have_no_choice_of_neighbour() -> None:
    assert embedding_fidelity(torch.eye(2), torch.eye(2)).neighbour_agreement is None


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_wrong_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted two matrices of one shape"):
        embedding_fidelity(torch.ones(a), torch.ones(b))

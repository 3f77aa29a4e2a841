"""The packaged all-MiniLM-L6-v2, where it is installed."""

from typing import Any

import pytest
import torch

from maclin.adopt import audit, convert_, frontier_order, load, packaged_model, plan, python_documents, restore_
from maclin.core.errors import MaclinError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm() -> Any:
    try:
        return load(packaged_model())
    except MaclinError as error:
        pytest.skip(str(error))


def test_it_is_what_it_says(minilm: Any) -> None:
    info = minilm.info()
    assert (info.num_layers, info.num_heads, info.head_dim) == (6, 12, 32)
    assert (info.max_length, minilm.default_length) == (512, 256)


def test_its_pipeline_is_its_own(minilm: Any) -> None:
    texts = list(python_documents().texts[:6])
    theirs = minilm.model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(minilm.encode(texts, max_length=256), theirs, atol=1e-5, rtol=0)


def test_softmax_equals_it_and_restored_is_bit_equal(minilm: Any) -> None:
    texts = [*python_documents().texts[:6], "short"]
    before, keys = minilm.encode(texts), list(minilm.model.state_dict())
    convert_(minilm.model, "softmax")
    torch.testing.assert_close(minilm.encode(texts), before, atol=1e-5, rtol=0)
    convert_(minilm.model, "window")
    assert not torch.equal(minilm.encode(texts), before)
    restore_(minilm.model)
    assert torch.equal(minilm.encode(texts), before)
    assert list(minilm.model.state_dict()) == keys


def test_averaging_loses_most_of_its_attention(minilm: Any) -> None:
    found = audit(minilm.model, minilm.tokenize(python_documents().texts[:8], batch_size=4), ["mean", "window"])
    for row in found.layers:
        assert row.uniform_rel_error is not None
        assert 0.6 < row.uniform_rel_error < 0.9
        assert row.errors[0].rel_error == pytest.approx(row.uniform_rel_error, rel=1e-3)
        assert (row.errors[1].rel_error or 1.0) < row.uniform_rel_error
    assert plan(found, tolerance=0.1).linear_share == 0.0
    assert len(frontier_order(found)) == 6

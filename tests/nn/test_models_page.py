"""Every block of code in docs/models.md runs, and its table of models is that of the module."""

import re
from pathlib import Path

import pytest

from maclin import nn

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_the_code_runs(block: str) -> None:
    exec(compile(block, "docs/models.md", "exec"), {})


def test_every_public_name_exists_and_every_model_is_on_the_page() -> None:
    assert len(BLOCKS) >= 5
    for name in nn.__all__:
        assert getattr(nn, name).__name__ == name
        if name.startswith("Macformer") and name != "MacformerModel":
            assert name in PAGE, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = nn.nothing

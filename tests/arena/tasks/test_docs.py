"""What docs/tasks.md shows runs, and names every task."""

import re
from pathlib import Path

import pytest

from maclin.arena.tasks import TASKS, Own

PAGE = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    assert "majority" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, cls in TASKS.items() if not issubclass(cls, Own)])
def test_every_task_has_its_row(name: str) -> None:
    assert re.search(rf"^\| `{name}` \|", PAGE, re.M)

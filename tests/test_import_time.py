"""`import maclin` stays light: what is heavy beyond torch is imported where it is used."""

import json
import subprocess
import sys

HEAVY = ["transformers", "sentence_transformers", "plotly", "jinja2", "typer", "rich", "scipy", "sklearn", "pandas"]


def modules_after(statement: str) -> list[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_front_door_imports_nothing_heavy() -> None:
    modules = modules_after("import maclin")
    assert "maclin" in modules
    # what torch brings along is torch's business
    assert not (set(HEAVY) & set(modules)) - set(modules_after("import torch"))


def test_the_check_sees_a_heavy_import() -> None:
    assert "jinja2" in modules_after("import jinja2")

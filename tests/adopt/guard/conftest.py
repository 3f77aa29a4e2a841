"""Where transformers is missing, tests of whole models are left out."""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["test_guard.py", "test_rates.py"]

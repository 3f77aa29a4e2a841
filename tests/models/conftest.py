"""The models of benchmarks/ are imported as the scripts there import them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

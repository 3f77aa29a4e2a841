"""Convert five real models, heal them, judge them on held-out data, and say which targets are met.

    python benchmarks/adopt.py --out benchmarks/results                  # everything
    python benchmarks/adopt.py whisper vit                               # some rows
    python benchmarks/adopt.py --quick --minutes-scale 0.02              # whether it runs at all

A row that was measured before, with the same minutes, is read again; --fresh measures it anew. Interrupted healing
goes on where it was. Models, texts, sounds and pictures are taken from packages by name, once. The exit status is 1 if
a target is missed. Nothing else should run meanwhile: healing is limited by time, and forward times are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from transformers.utils import logging

from maclin.bench import Target, environment, result_path, targets_table
from maclin.core.errors import InputError, MaclinError
from maclin.files import cache_dir, write_whole
from models.baselines import baselines
from models.healing import minilm_all, minilm_auto, smollm, vit, whisper
from models.job import Job
from models.serving import decode, guard, restore

ROWS = {
    "baselines": baselines,
    "restore": restore,
    "whisper": whisper,
    "vit": vit,
    "minilm-all": minilm_all,
    "minilm-auto": minilm_auto,
    "smollm": smollm,
    "decode": decode,
    "guard": guard,
}
"""In this order; decode and guard take the model that smollm healed."""


class Lines:
    """Progress as lines of text: the beginning of each step, and whatever is worth saying."""

    def start(self, step: str, total: int | None) -> None:
        """A step begins."""
        print(f"- {step}" if total is None else f"- {step}, {total} parts", flush=True)
        self._done = 0

    def advance(self, text: str = "") -> None:
        """Said at once where there is much to say, of each step's parts one in fifty."""
        self._done = getattr(self, "_done", 0) + 1
        if text and (len(text) > 40 or self._done % 50 == 1):
            print(f"  {text}", flush=True)

    def finish(self) -> None:
        """Nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", choices=[[], *ROWS], help=f"among {', '.join(ROWS)} (default: all)"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON file; none is written without it")
    parser.add_argument("--work", type=Path, help="folder of what is kept between runs (default: in the cache)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="factor of the healing times")
    parser.add_argument("--quick", action="store_true", help="few documents; to see that everything runs")
    parser.add_argument("--fresh", action="store_true", help="measure anew what was measured before")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    where = environment()
    print(f"{where.processor}, {where.num_threads} threads, torch {where.torch_version}, load {os.getloadavg()[0]:.2f}")
    job = Job(options.work or cache_dir() / "adopt", options.minutes_scale, options.quick, options.fresh, Lines())
    found = []
    for name in options.rows or ROWS:
        print(f"{name}:", flush=True)
        try:
            found.append(job.row(name, ROWS[name]))
        except MaclinError as error:
            # a package that cannot be had is no failure of what was to be measured
            met = None if isinstance(error, InputError) else False
            found.append({"row": name, "targets": [dataclasses.asdict(Target(name, "-", "-", met, str(error)))]})
    targets = [Target(**target) for row in found for target in row["targets"]]
    print(targets_table(targets))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = result_path(options.out, "adopt", where)
        write_whole(path, (json.dumps({"rows": found}, indent=2, ensure_ascii=False) + "\n").encode())
        print(f"written to {path}")
    return 0 if all(target.met is not False for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The log of a training: JSON lines, and TensorBoard's files where they are wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import OptionError

LOG_NAME = "log.jsonl"


class TrainLog:
    """Lines of JSON, each an event at a step, that agree with the checkpoint a training goes on from.

    Args:
        folder: directory of the run.
        keep_bytes: of an earlier log, what was written when the checkpoint was; what came later is dropped, because it
            will be written again.
        step: that the training goes on from; TensorBoard drops what an earlier one wrote of later steps.
        tensorboard: also write TensorBoard's files, into ``folder/tensorboard``.

    Raises:
        OptionError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, keep_bytes: int = 0, step: int = 0, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        self._file = self.path.open("ab")
        if self._file.tell() > keep_bytes:
            self._file.truncate(keep_bytes)
            self._file.seek(0, os.SEEK_END)
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    @property
    def num_bytes(self) -> int:
        """Size of the log."""
        return self._file.tell()

    def write(self, event: str, step: int, **figures: Any) -> None:
        """One line; numbers go to TensorBoard as well, under ``event/name``."""
        line = json.dumps({"event": event, "step": step, **figures})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptionError("--tensorboard needs TensorBoard: pip install tensorboard, or leave it out") from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)

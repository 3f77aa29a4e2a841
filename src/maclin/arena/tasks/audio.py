"""Audio as a raw waveform: one second of a telephone prompt at 8 kHz, and in which of five languages it is spoken.

Each language was recorded by one speaker, so the voice gives the language away: this tests long sequences, not the
knowledge of languages.
"""

from __future__ import annotations

import io
import struct
import wave
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...core.errors import InputError, OptionError
from ...progress import Progress
from ..archives import members
from ..cache import cached_arrays
from ..fetch import fetch
from ..packages import PROMPTS
from ..splits import Ragged, hold_out, sample
from ..task import Example, Field, Kind, Preset, Splits, Task, check_length

RATE_HZ = 8_000
_LANGUAGES = tuple(sorted(PROMPTS))
_TEST_EVERY = 5  # of the prompts
_SILENT = 0.01  # root mean square of a stretch that is left out, where full scale is 1


class Audio(Task):
    """Stretches of 8,000 samples, their loudness evened out, and their language (and voice).

    Args:
        length: samples of a stretch at 8 kHz; None is the preset's.
    """

    name: ClassVar[str] = "audio"
    summary: ClassVar[str] = "raw 8 kHz waveform of telephone prompts: voice and language, 5 classes"
    kind: ClassVar[Kind] = "classify"

    def __init__(self, length: int | None = None) -> None:
        self.length = check_length(length)
        self.field = Field("values", channels=1)
        self.num_classes = len(_LANGUAGES)
        self.presets = {
            "quick": Preset(length=256, train=40_000, valid=1_000, test=2_000),
            "standard": Preset(length=8_000, train=None, valid=400, test=None),
            "paper": Preset(length=8_000, train=None, valid=400, test=None),
        }

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        length = sizes.length if self.length is None else self.length
        arrays = cached_arrays(f"audio/prompts-{PROMPTS['en'].version}", lambda: _prompts(progress))
        recordings = Ragged(arrays["samples"], arrays["ends"])
        # a prompt of one name says the same in every language, and all of it is in one split
        prompts, languages = arrays["prompts"], arrays["languages"]
        places: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
        for i in range(len(recordings)):
            part = "test" if prompts[i] % _TEST_EVERY == 0 else "train"
            places[part] += [(i, start) for start in sounding(recordings[i], length)]
        if not places["train"] or not places["test"]:
            raise OptionError(f"wanted a length that prompts have, got {length} samples")
        parts = {p: Stretches(recordings, np.array(where), languages, length) for p, where in places.items()}
        valid = min(sizes.valid, len(parts["train"]) // 8)
        fit, held = hold_out(len(parts["train"]), valid, seed, [int(prompts[i]) for i, _ in places["train"]])
        fit = fit[sample(len(fit), sizes.train, seed)]
        notes = ["telephone prompts in five languages, one speaker each: voice and language cannot be told apart"]
        if length < RATE_HZ:
            notes.append(f"{length:,} samples, {length / RATE_HZ:g} s; the full task has 8,000")
        test = parts["test"].only(sample(len(parts["test"]), sizes.test, seed))
        return Splits(parts["train"].only(fit), parts["train"].only(held), test, length, tuple(notes))


class Stretches:
    """Stretches of recordings, each of mean square 1.

    Args:
        recordings: samples of 16 bits.
        places: number of the recording and first sample, (number, 2).
        labels: of each recording.
        length: samples.
    """

    def __init__(self, recordings: Ragged, places: np.ndarray, labels: np.ndarray, length: int) -> None:
        self.recordings, self.places, self.labels, self.length = recordings, places, labels, length

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        recording, start = self.places[index]
        x = self.recordings[int(recording)][start : start + self.length].astype(np.float32)
        x -= x.mean()
        x /= np.sqrt(np.square(x).mean()) + 1e-6
        return {"x": x[:, None], "y": int(self.labels[recording])}

    def only(self, index: np.ndarray) -> Stretches:
        """A part of it."""
        return Stretches(self.recordings, self.places[index], self.labels, self.length)


def sounding(samples: np.ndarray, length: int) -> list[int]:
    """Where the stretches of a recording begin that are not silent, one after the other.

    Args:
        samples: of 16 bits.
        length: of a stretch.
    """
    number = len(samples) // length
    rows = samples[: number * length].reshape(number, length).astype(np.float32) / 2**15
    level = np.sqrt(np.square(rows - rows.mean(1, keepdims=True)).mean(1)) if number else np.zeros(0)
    return (np.flatnonzero(level > _SILENT) * length).tolist()


def read_wave(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (n, channels) of a PCM .wav file and its rate in Hz: uint8, int16 or int32.

    Raises:
        InputError: it is another kind of file.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError, struct.error) as error:
        raise InputError(f"wanted a .wav file of PCM samples, got {name}: {error or 'it ends too early'}") from error
    if width not in (1, 2, 4):
        raise InputError(f"wanted samples of 8, 16 or 32 bits in {name}, got {8 * width}; convert it first")
    dtype = {1: "u1", 2: "<i2", 4: "<i4"}[width]
    whole = len(data) // (width * channels) * width * channels
    return np.frombuffer(data[:whole], dtype).reshape(-1, channels), rate


def _prompts(progress: Progress) -> dict[str, np.ndarray]:
    rows: list[np.ndarray] = []
    names: list[int] = []
    languages: list[int] = []
    for label, language in enumerate(_LANGUAGES):
        archive = fetch(PROMPTS[language], progress)
        progress.start(f"reading the {language} prompts", None)
        for path, content in members(archive, lambda name: name.endswith(".wav")):
            samples, rate = read_wave(content, path)
            if rate != RATE_HZ or samples.shape[1] != 1 or samples.dtype != np.int16:
                raise InputError(
                    f"wanted {RATE_HZ} Hz, 16 bits and one channel in {archive.name}, got {path} otherwise"
                )
            # .../sounds/<voice>/<name>.wav
            name = "/".join(Path(path).with_suffix("").parts[5:])
            rows.append(samples[:, 0])
            names.append(zlib.crc32(name.encode()))
            languages.append(label)
        progress.finish()
    recordings = Ragged.of(rows)
    return {
        "samples": recordings.flat,
        "ends": recordings.ends,
        "prompts": np.array(names),
        "languages": np.array(languages),
    }

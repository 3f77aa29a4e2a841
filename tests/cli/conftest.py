"""The command, run in this process; and a report for it to read."""

import contextlib
from collections.abc import Callable

import pytest

from maclin.cli import main


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

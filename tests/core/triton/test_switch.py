"""Off unless asked for, and only where there are Triton and CUDA."""

import importlib.util
import os
import subprocess
import sys

import torch

from maclin.core import triton as kernels


def test_off_by_default_and_turned_on_by_function(monkeypatch):
    assert "MACLIN_TRITON" in os.environ or not kernels.ENABLED
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "ENABLED", False)
    assert not kernels.enabled()
    kernels.enable()
    assert kernels.enabled()
    kernels.enable(False)
    assert not kernels.enabled()


def test_available_needs_both(monkeypatch):
    for triton in (None, object()):
        for cuda in (False, True):
            monkeypatch.setattr(kernels, "find_spec", lambda name, triton=triton: triton)
            monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
            assert kernels.available() == (triton is not None and cuda)


def test_the_switch_imports_no_triton():
    code = "import sys, maclin.core.triton as k; k.available(); k.enabled(); print('triton' in sys.modules, k.ENABLED)"
    environment = {**os.environ, "MACLIN_TRITON": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["False", "True"]
    assert importlib.util.find_spec("maclin.core.triton") is not None

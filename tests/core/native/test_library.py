"""Finding, compiling and loading: what there is not is said, and the torch path stays."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maclin.core.native import NativeStatus, build, library, native_status


def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **environment: str) -> library._Loader:
    """A loader that has looked for nothing yet, with a cache of its own."""
    monkeypatch.setenv("MACLIN_CACHE", str(tmp_path))
    monkeypatch.delenv("MACLIN_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return library._Loader()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_they_are_ready_here():
    found = native_status()
    assert found.state == "ready"
    assert Path(found.path).is_file()
    assert found.compiler


def test_the_environment_turns_them_off(monkeypatch, tmp_path):
    loader = fresh(monkeypatch, tmp_path, MACLIN_NATIVE="0")
    assert loader.find(10.0) is None
    assert loader.status == NativeStatus("off", "MACLIN_NATIVE=0")
    assert not any(tmp_path.iterdir())


def test_without_a_compiler_the_torch_path_stays(monkeypatch, tmp_path):
    loader = fresh(monkeypatch, tmp_path, PATH=str(tmp_path))
    assert loader.find(10.0) is None
    assert loader.status is not None
    assert loader.status.state == "unavailable"
    assert "no C++ compiler" in loader.status.reason


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo no such thing >&2; exit 3", "status 3: no such thing"),
        ("while [ $# -gt 1 ]; do shift; done; echo garbage > $1", "does not run here"),
        ("exit 0", "does not run here"),
    ],
    ids=["fails", "makes garbage", "makes nothing"],
)
def test_a_compiler_that_does_not_work_is_named_once(monkeypatch, tmp_path, does, said):
    compiler = script(tmp_path / "bad", does)
    loader = fresh(monkeypatch, tmp_path / "cache", CXX=str(compiler))
    assert loader.find(60.0) is None
    assert loader.status is not None
    assert loader.status.state == "unavailable"
    assert said in loader.status.reason
    kept = [path.name for path in (tmp_path / "cache" / "native").iterdir()]
    assert not any(name.endswith((".so", ".part")) for name in kept)
    again = library._Loader()
    assert again.find() is None  # does not compile again, so does not wait
    assert again.status == loader.status


def test_the_first_call_does_not_wait(monkeypatch, tmp_path):
    compiler = script(tmp_path / "slow", "sleep 2; exit 1")
    loader = fresh(monkeypatch, tmp_path / "cache", CXX=str(compiler))
    assert loader.find() is None
    assert loader.status is not None
    assert loader.status.state == "building"
    assert loader.find(30.0) is None
    assert loader.status.state == "unavailable"


def test_a_cache_that_cannot_be_written_is_no_failure(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    loader = fresh(monkeypatch, tmp_path / "file")
    assert loader.find(10.0) is None
    assert loader.status is not None
    assert loader.status.state == "unavailable"


def test_the_key_names_compiler_and_processor(monkeypatch, tmp_path):
    one, other = script(tmp_path / "a", "exit 0"), script(tmp_path / "b", "exit 0 ")
    keys = {library._key(str(one)), library._key(str(other))}
    monkeypatch.setattr(library, "_processor", lambda: "another")
    keys.add(library._key(str(one)))
    assert len(keys) == 3


def test_what_was_compiled_is_tried_before_it_takes_its_place(tmp_path):
    compiler = script(tmp_path / "bad", "while [ $# -gt 1 ]; do shift; done; echo garbage > $1")
    target = tmp_path / "kernels.so"
    assert "does not run here" in build.build(target, [str(compiler)])
    assert not target.exists()


@pytest.mark.slow
def test_several_processes_compile_once(tmp_path):
    compiler = library._compiler()
    assert compiler is not None
    counted = script(tmp_path / "counted", f'echo x >> "{tmp_path}/count"; exec "{compiler}" "$@"')
    program = "from maclin.core import native; assert native.wait_for_kernels(), native.native_status()"
    environment = {**os.environ, "MACLIN_CACHE": str(tmp_path / "cache"), "CXX": str(counted)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait(250) for process in running] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "x\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_too():
    """A child has none of the parent's threads; whoever waits for them waits forever."""
    program = """
    import os, torch, maclin
    from maclin.core import native
    assert native.wait_for_kernels()
    torch.set_num_threads(2)
    mech = maclin.mechanism("elu", head_dim=16, num_heads=4)
    q = torch.randn(2, 4, 200, 16)  # small enough for torch to use one thread
    with torch.no_grad():
        wanted = mech(q, q, q)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(mech(q, q, q), wanted) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], timeout=120, check=False)
    assert done.returncode == 0

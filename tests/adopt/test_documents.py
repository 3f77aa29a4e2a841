import os
from pathlib import Path

import pytest

from maclin.adopt import Documents, documents, python_documents, read_documents
from maclin.core.errors import InputError


@pytest.fixture(scope="module")
def shipped() -> Documents:
    return python_documents()


def test_python_ships_enough_documents_of_all_lengths(shipped: Documents) -> None:
    found = shipped
    assert len(found) >= 48
    assert found == python_documents()
    assert found.warnings == ()
    lengths = sorted(len(text) for text in found.texts)
    assert lengths[0] < 1500
    assert sum(length > 2500 for length in lengths) >= 16  # 512 tokens are some 2000 characters
    assert not any(a != b and a in b for a in found.texts for b in found.texts)


def test_the_split_is_by_document_and_alike_in_length(shipped: Documents) -> None:
    calibration, held_out = shipped.split()
    assert not set(calibration.texts) & set(held_out.texts)
    assert len(calibration) + len(held_out) == len(shipped)
    assert abs(len(calibration) - len(held_out)) <= 1
    medians = [sorted(len(t) for t in part.texts)[len(part) // 2] for part in (calibration, held_out)]
    assert 0.5 < medians[0] / medians[1] < 2
    assert len(shipped.split(4)[1]) == len(shipped) // 4


def test_files_and_directories_are_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("# one\n")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8-sig")
    (tmp_path / "c.jsonl").write_text('{"text": "three", "id": 1}\n\n{"text": "vier ü"}\n', encoding="utf-8")
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / ".hidden.txt").write_text("x")
    found = read_documents(tmp_path)
    assert found.texts == ("two", "three", "vier ü", "# one")
    assert found.names[1].endswith("c.jsonl:1")
    assert read_documents([tmp_path / "b.txt", tmp_path / "deep"]).texts == ("two", "# one")
    assert "only 4 documents" in found.warnings[0]


def test_repeated_documents_are_left_out_with_a_warning(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("same" if name != "c" else "other")
    found = read_documents(tmp_path)
    assert found.texts == ("same", "other")
    assert "1 of 3 documents repeat" in found.warnings[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"  \n\t", "empty"),
        ("a.txt", b"ab\0cd", "binary"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("a.pdf", b"text", r"wanted a document \(.txt, .md, .jsonl\)"),
        ("a.jsonl", b"{]", "line 1: wanted a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2"),
        ("a.jsonl", b'{"text": ""}', "not empty"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_documents(tmp_path / "none")
    with pytest.raises(InputError, match="found none"):
        read_documents(tmp_path)
    with pytest.raises(InputError, match="got none"):
        read_documents([])


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 1)() == 0, reason="root reads everything")
def test_unreadable_documents_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(InputError, match="permissions"):
        read_documents(tmp_path / "a.txt")


def test_one_document_cannot_be_split(tmp_path: Path, shipped: Documents) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="at least 2 documents"):
        read_documents(tmp_path).split()
    with pytest.raises(InputError, match="every"):
        shipped.split(1)


def test_a_python_without_documents_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_topics", list)
    monkeypatch.setattr(documents, "_docstrings", list)
    with pytest.raises(InputError, match="--data"):
        python_documents()

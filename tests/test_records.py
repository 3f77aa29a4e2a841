"""Records are read back as they were written, whatever kinds of values a field may hold."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from maclin.records import Cell, HeatMap, StudyTable, from_json, to_json


@dataclass(frozen=True)
class Mixed:
    cells: tuple[Cell, ...]
    maybe: float | None
    text: str | None
    flag: bool


def read(**changes: object) -> Mixed:
    data = {"cells": [], "maybe": None, "text": None, "flag": True, **changes}
    return from_json(Mixed, json.dumps(data))


def test_a_cell_keeps_its_kind() -> None:
    cells = read(cells=["words", 1.5, 3, None, "2"]).cells
    assert cells == ("words", 1.5, 3.0, None, "2")
    assert [type(cell) for cell in cells] == [str, float, float, type(None), str]


@pytest.mark.parametrize("wrong", [True, [1], {"a": 1}])
def test_a_cell_of_another_kind_is_named(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"Mixed\.cells\[1\]: wanted str or float, got"):
        read(cells=["a", wrong])


def test_optional_fields_of_one_kind_are_checked_as_before() -> None:
    assert read(maybe=2).maybe == 2.0
    assert read(text="a").text == "a"
    with pytest.raises(ValueError, match=r"maybe: wanted float, got 'a'"):
        read(maybe="a")
    with pytest.raises(ValueError, match=r"maybe: wanted float, got True"):
        read(maybe=True)
    with pytest.raises(ValueError, match=r"flag: wanted bool, got 1"):
        read(flag=1)


@pytest.mark.parametrize(
    "record",
    [
        StudyTable("t", ("a", "b"), (("x", 1.0), (None, 2.5)), "note"),
        StudyTable("t", (), ()),
        HeatMap("t", "x", "y", "v", ("a", "b"), ("c",), ((1.0, None),)),
    ],
)
def test_tables_and_maps_are_read_back_equal(record: StudyTable | HeatMap) -> None:
    assert from_json(type(record), to_json(record)) == record


def test_a_cell_that_is_not_finite_is_read_back_as_none() -> None:
    table = StudyTable("t", ("a",), ((math.nan,), (math.inf,)))
    assert from_json(StudyTable, to_json(table)).rows == ((None,), (None,))

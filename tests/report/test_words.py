from __future__ import annotations

import math

import pytest

from maclin.report import words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (words.milliseconds(None), "not measured"),
        (words.milliseconds(math.nan), "not measured"),
        (words.milliseconds(0.04512), "0.0451 ms"),
        (words.milliseconds(12.345), "12.3 ms"),
        (words.milliseconds(999.7), "1.00 s"),
        (words.milliseconds(12_345), "12.3 s"),
        (words.size(0), "0 B"),
        (words.size(1023), "1023 B"),
        (words.size(1024), "1.00 KiB"),
        (words.size(1024**2 - 1), "1.00 MiB"),
        (words.size(5 * 2**40), "5.00 TiB"),
        (words.percent(0), "0%"),
        (words.percent(1), "100%"),
        (words.percent(0.994), "99.4%"),
        (words.percent(0.5), "50%"),
        (words.percent(None), "not measured"),
        (words.figure(0.12345), "0.123"),
        (words.figure(12345.0), "1.2e+04"),
        (words.figure(math.inf), "not measured"),
        (words.count(16384), "16,384"),
        (words.count(None), "not measured"),
        (words.money(12.345, "EUR"), "12.35 EUR"),
        (words.money(-1234.5, "EUR"), "-1,234 EUR"),
        (words.money(None, "EUR"), "not measured"),
        (words.times(0.5), "2.00 times as fast"),
        (words.times(1.25), "1.25 times as slow"),
        (words.times(0.01), "100 times as fast"),
        (words.times(0), "not comparable in speed"),
        (words.plural(1, "layer"), "1 layer"),
        (words.plural(1200, "layer"), "1,200 layers"),
    ],
)
def test_numbers_as_people_read_them(text: str, wanted: str) -> None:
    assert text == wanted

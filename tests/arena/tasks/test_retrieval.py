"""Pairs of manual pages: what is a link, what is left out of a page, and which pairs are made."""

import gzip

import numpy as np
import pytest

from maclin.arena.packages import MAN_PAGES
from maclin.arena.task import collate
from maclin.arena.tasks import manual, retrieval, task

ROFF = r""".\" a comment with a licence
.TH {name} 3 2020-01-01
.SH NAME
{name}, {name}_r \- do something
.SH DESCRIPTION
The function
.BR {name} ()
is \fIlike\fP "others" \(em {filler}
.SH SEE ALSO
.BR {other} (3),
.BR {name}_r (3)
.SH BUGS
None.
"""


def roff(name: str, other: str) -> bytes:
    return gzip.compress(
        ROFF.format(name=name, other=other, filler=" ".join(f"{name[:1]}{i}" for i in range(200))).encode()
    )


def test_a_manual_page_loses_its_names_and_its_links() -> None:
    page = manual.page("linux", "usr/share/man/man3/open.3posix.gz", roff("open", "close"), ["man3/fopen.3.gz"])
    assert page is not None
    assert (page.name, page.section) == ("open", "3")
    assert ("close", "3") in page.links
    assert page.aliases == (("fopen", "3"),)
    words = page.text.decode()
    assert "close" not in words
    assert "open" not in words
    assert "comment" not in words
    assert "The function\n# ()\nis like others" in words
    assert "None." in words
    assert manual.masked("open reopen OPEN open_r", {"open"}) == "# reopen # open_r"
    assert manual.page("linux", "man3/short.3.gz", gzip.compress(b".SH NAME\nshort")) is None
    assert manual.page("linux", "man3/odd.3.gz", b"no gzip") is None
    assert manual.included(gzip.compress(b".so man3/open.3\n")) == "man3/open.3"
    assert manual.included(roff("open", "close")) is None
    bsd = "\n.Sh NAME\n.Nm printf ,\n.Nm sprintf\n.Nd formatted output\n.Sh SEE ALSO\n.Xr scanf 3 ,\n.Xr wprintf 3\n"
    assert manual.own_names(bsd) == {"printf", "sprintf"}
    assert manual.references(bsd) == {("scanf", "3"), ("wprintf", "3")}


def test_neighbours_are_grouped() -> None:
    pairs = np.array([[0, 1], [1, 2], [3, 4]])
    group = manual.neighbourhoods(6, pairs, 10, np.random.default_rng(0))
    assert group[0] == group[1] == group[2]
    assert group[3] == group[4]
    assert len(set(group.tolist())) == 3
    assert np.bincount(manual.neighbourhoods(6, pairs, 2, np.random.default_rng(0))).max() == 2


def test_retrieval(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    # rings of five pages each; every other page is named by an alias that is a link to it
    names = [f"{chr(97 + ring)}page{i}" for ring in range(20) for i in range(5)]

    def following(i: int) -> str:
        follower = names[i // 5 * 5 + (i + 1) % 5]
        return f"{follower}_alias" if i % 2 else follower

    folder = "usr/share/man/man3"
    files = {f"{folder}/{name}.3.gz": roff(name, following(i)) for i, name in enumerate(names)}
    links = {f"{folder}/{name}_alias.3.gz": f"{folder}/{name}.3.gz" for name in names}
    packages = tuple(
        packed(package, files if i == 0 else {}, links if i == 0 else {}) for i, package in enumerate(MAN_PAGES)
    )
    monkeypatch.setattr(retrieval, "MAN_PAGES", packages)
    monkeypatch.setattr(retrieval, "_GROUP", 5)
    made = task("retrieval", length=64)
    splits = made.load("quick")
    parts = (splits.train, splits.valid, splits.test)
    assert all(len(part) for part in parts)
    for part in parts:
        assert isinstance(part, retrieval.Pairs)
        assert part.labels.mean() == 0.5
        # linked are the neighbours on a ring
        same = part.pairs[:, 0] // 5 == part.pairs[:, 1] // 5
        near = np.isin(np.abs(part.pairs[:, 0] - part.pairs[:, 1]), (1, 4))
        assert np.array_equal(same & near, part.labels == 1)
    pages = [set(part.pairs.ravel().tolist()) for part in parts if isinstance(part, retrieval.Pairs)]
    assert not pages[0] & pages[1]
    assert not pages[0] & pages[2]
    assert not pages[1] & pages[2]
    assert len(set.union(*pages)) == 100
    batch = collate(made, [splits.train[0], splits.train[1]])
    assert batch["x1"].shape == batch["x2"].shape == (2, 64)


def test_a_damaged_page_is_left_out() -> None:
    whole = roff("open", "close")
    assert manual.page("linux", "man3/open.3.gz", whole) is not None
    for end in (0, 1, 30, len(whole) - 1):
        assert manual.page("linux", "man3/open.3.gz", whole[:end]) is None
        assert manual.included(whole[:end]) is None

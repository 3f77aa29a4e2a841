"""The papers' own experiments, on data that is at hand: each a job with settings, and a record of what it found.

Each module has a frozen dataclass of settings with the presets ``quick()`` and ``standard()``, and
``run(job, journal, progress) -> maclin.records.Study``; ``maclin.report.write_study`` writes what comes back.

    from maclin.report import write_study
    from maclin.study.theory import TheoryStudy, run
    write_study(run(TheoryStudy.quick()), "study-theory")

An interrupted study goes on where it stopped if it is given a ``Session``'s journal.
"""

from __future__ import annotations

from .journal import Journal
from .session import Session

__all__ = ["Journal", "Session"]

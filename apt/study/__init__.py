"""A preference study (APT Section 4.2): people see pairs of samples and say which one is better.

`make_study` turns folders of samples into pairs, `serve_study` shows the pairs to raters in a
browser, and `report_study` turns their answers into scores.
"""

from __future__ import annotations

from apt.study.document import Study, read_study
from apt.study.make import make_study
from apt.study.report import report_study
from apt.study.serve import serve_study

__all__ = ["Study", "make_study", "read_study", "report_study", "serve_study"]

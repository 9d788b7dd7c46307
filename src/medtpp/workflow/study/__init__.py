"""`medtpp compare` of several: comparisons over data sets, backbones, folds or sites, and what they say together.

OUT/study.json, cells.csv             # all parts, and every cell of all of them
OUT/DATASET/BACKBONE/foldN/           # an ordinary comparison; only axes of several values have a folder
OUT/cluster/                          # with --cluster: what the submissions said
OUT/across.json, across/, report.html # what the comparisons say together
"""

from medtpp.workflow.study.across import summarise_study
from medtpp.workflow.study.file import Member, Study, is_study, make_axes, read_study, study_of
from medtpp.workflow.study.parts import StudyPart
from medtpp.workflow.study.run import (
    OpenStudy,
    finish_study,
    hold_parts,
    keep_study,
    measure_study,
    open_study,
    run_study,
)

__all__ = [
    "Member",
    "OpenStudy",
    "Study",
    "StudyPart",
    "finish_study",
    "hold_parts",
    "is_study",
    "keep_study",
    "make_axes",
    "measure_study",
    "open_study",
    "read_study",
    "run_study",
    "study_of",
    "summarise_study",
]

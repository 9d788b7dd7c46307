"""`medtpp compare`: does TPP help on these data?

OUT/experiment.yaml, split.csv        # one split for all: the patients of the test set are the same everywhere
OUT/axes.json, inputs.json            # what is compared, and a hash of what the results depend on
OUT/timing.json                       # measured steps
OUT/tpp/TUNER/seedN/                  # one pretext stage for all label counts of a tuner and seed
OUT/tpp/TUNER-INIT/                   # the same for controls; of "tpp_labelled" one for each label count
OUT/tpp/TUNER-INIT-PRETEXT/           # the same by pretext tasks other than the experiment's own
OUT/cells/TUNER-INIT/LABELS/seedN/    # finetune/, evaluation/, complete.json
OUT/cells/TUNER-INIT-PRETEXT/         # the same
OUT/cluster/                          # with --cluster: what the submissions said
OUT/logs/                             # what the processes said, and why some failed
OUT/cells.csv, comparison.json        # the results
"""

from medtpp.workflow.compare.axes import Axes
from medtpp.workflow.compare.comparison import Comparison
from medtpp.workflow.compare.opening import hold, open_comparison
from medtpp.workflow.compare.run import measure, run_cells
from medtpp.workflow.compare.summary import summarise
from medtpp.workflow.pool import Outcome

__all__ = ["Axes", "Comparison", "Outcome", "hold", "measure", "open_comparison", "run_cells", "summarise"]

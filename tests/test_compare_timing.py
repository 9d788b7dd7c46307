"""What a comparison measures before it begins."""

import time

from medtpp.files import write_json
from medtpp.workflow.compare import work
from medtpp.workflow.prepare import prepare
from runs import experiment

STEPS = 8


def test_what_a_process_needs_once_is_not_counted_as_a_cost_of_tpp(tmp_path, monkeypatch):
    """The first stage of a process takes half a second more; "longer" would get steps for it."""
    calls = []

    def stage(prepared, folder, tell, start=None):
        calls.append((folder.name, prepared.experiment.tpp.steps))
        time.sleep(0.5 if len(calls) == 1 else 0.0)
        write_json(folder / "complete.json", {"batch_size": 1, "peak_memory_mib": 1.0})
        rows = "".join(f"{step},10000\n" for step in range(STEPS))
        (folder / "log.csv").write_text(f"step,images_per_second\n{rows}")
        return folder

    monkeypatch.setattr(work, "tpp_stage", stage)
    monkeypatch.setattr(work, "finetune_stage", stage)
    monkeypatch.setattr(work, "evaluate_stage", lambda *arguments, **options: None)
    prepared = prepare(experiment("data.modality=xray"))
    timing = work.time_steps(prepared, prepared.experiment, tmp_path)
    assert calls[:2] == [("first", 1), ("tpp", STEPS)]
    assert timing.tpp_rest < 0.4
    assert timing.tpp_step == 1 / 10000

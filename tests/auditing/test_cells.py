import json
from collections import Counter

import pytest

from remos_hf.auditing.run import run_audit
from remos_hf.errors import CorruptFileError
from tests.auditing.audits import retuning, small_audit, untimed


def test_every_student_is_made_once_for_each_teacher_and_seed_and_retrain_once_for_all(whole):
    _, _, log = whole
    assert set(Counter(log.students).values()) == {1}
    kinds = Counter(name.split()[0] for name in log.students)
    assert kinds == {"Finetune": 4, "Random": 4, "Retrain": 2}


def test_a_broken_cell_is_named(log, folder):
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / "clean-0-finetune.json").write_text('{"acc": {"val')
    with pytest.raises(CorruptFileError, match="clean-0-finetune.json is no measured student"):
        run_audit(small_audit(log), folder, progress=False)
    assert not log.students


def test_cells_of_the_first_format_are_read(log, folder):
    first = run_audit(small_audit(log), folder, progress=False)
    for path in (folder / "cells").iterdir():
        held = json.loads(path.read_text())
        path.write_text(json.dumps({key: held[key] for key in held if key not in ("versions", "retuned_as")}))
    again = run_audit(small_audit(log), folder, progress=False)
    assert len(log.students) == 5 and untimed(again) == untimed(first)


def test_curves_of_another_plan_are_made_again_even_if_it_was_forgotten(log, folder, retuned):
    run_audit(retuning(log), folder, progress=False, keep_students=True)
    run_audit(small_audit(log), folder, progress=False)  # settings.json no longer knows of re-activation
    report = run_audit(retuning(log, num_exposed=40), folder, progress=False)
    assert report.records[0]["reactivation"]["5"]["num_samples"] == 40


def test_curves_of_the_first_format_count_if_they_hold_what_is_asked(log, folder, retuned):
    run_audit(retuning(log, (0,)), folder, progress=False, keep_students=True)
    for path in (folder / "cells").iterdir():
        held = json.loads(path.read_text())
        path.write_text(json.dumps({key: held[key] for key in held if key not in ("versions", "retuned_as")}))
    run_audit(retuning(log, (0,)), folder, progress=False)
    assert len(retuned) == 2
    report = run_audit(retuning(log, (0, 5)), folder, progress=False)
    assert len(retuned) == 4 and set(report.records[0]["reactivation"]) == {"0", "5"}

import pytest

from remos_hf.auditing.run import run_audit
from remos_hf.auditing.students import StudentPlan
from remos_hf.errors import RemosError
from remos_hf.strategies import Finetune, Random
from tests.auditing.audits import OTHER, STUDENTS, WORD, retuning, small_audit
from tests.defects import toy


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"settings": {"learning_rate": 0.2}}, "learning_rate"),
        ({"settings": {}}, "learning_rate"),
        ({"test": toy.data(18)}, "data"),
        ({"name": "another"}, "name"),
        ({"defects": {"word": OTHER}}, "defects"),
        ({"defects": {"renamed": WORD}}, "defects"),
        ({"students": {**STUDENTS, "random 0.9": StudentPlan(Random(0.8))}}, "students"),
        ({"students": {**STUDENTS, "finetune": StudentPlan(Finetune(), 3.0)}}, "students"),
        ({"students": {"finetune": StudentPlan(Finetune())}}, "students"),
    ],
)
def test_other_settings_are_refused(whole, options, told):
    folder, _, log = whole
    before, made = (folder / "settings.json").read_bytes(), log.students
    with pytest.raises(RemosError, match=rf"other settings \({told} differ\)"):
        run_audit(small_audit(log, seeds=(0, 1), **options), folder, progress=False)
    assert (folder / "settings.json").read_bytes() == before and log.students == made


@pytest.mark.parametrize("options", [{"num_exposed": 49}, {"learning_rate": 1.0}, {"counts": (0,)}, {"counts": (0, 6)}])
def test_reactivation_that_would_throw_measured_curves_away_is_refused(log, folder, retuned, options):
    run_audit(retuning(log), folder, progress=False)
    with pytest.raises(RemosError, match="reactivation differ"):
        run_audit(retuning(log, **options), folder, progress=False)


def test_students_that_all_got_one_mask_are_not_gone_on_with_by_seeds_of_their_own(log, folder):
    one_mask = {**STUDENTS, "random 0.9": StudentPlan(Random(0.9, seed=0))}
    run_audit(small_audit(log, students=one_mask), folder, progress=False)
    own = {**one_mask, "random 0.9": StudentPlan(Random(0.9, seed=None))}
    with pytest.raises(RemosError, match="students differ"):
        run_audit(small_audit(log, students=own), folder, progress=False)

import json

import pytest

from remos_hf.auditing.students import StudentPlan, standard_students
from remos_hf.strategies import (
    L2SP,
    STRATEGIES,
    Finetune,
    MagPrune,
    Random,
    Remos,
    Retrain,
    Subspace,
    TopMagnitude,
)
from remos_hf.strategies.slice_and_reset import SliceAndReset


def test_the_table_holds_all_that_must_be_beaten():
    students = standard_students([0.9])
    assert {name: plan.strategy for name, plan in students.items()} == {
        "finetune": Finetune(),
        "finetune lr x3": Finetune(),
        "retrain": Retrain(),
        "random 0.9": Random(0.9),
        "top_magnitude 0.9": TopMagnitude(0.9),
        "mag_prune 0.9": MagPrune(0.9),
        "remos 0.9": Remos(0.9),
        "remos_layer 0.9": Remos(0.9, scope="layer"),
    }
    assert [name for name, plan in students.items() if plan.lr_factor != 1] == ["finetune lr x3"]
    assert students["finetune lr x3"].lr_factor == 3


def test_only_the_first_ratio_is_made_for_all_defects_and_retuned():
    students = standard_students([0.9, 0.7], curves_for=["word"], reactivate=True)
    assert students["remos 0.9"].defects is None and students["remos 0.9"].reactivate
    assert students["remos 0.7"].defects == ("word",) and not students["remos 0.7"].reactivate
    assert students["finetune"].defects is None and students["finetune"].reactivate


def test_without_curves_there_is_one_ratio_and_without_a_choice_all_get_them():
    assert standard_students([0.9, 0.7], curves_for=[]).keys() == standard_students([0.9]).keys()
    assert standard_students([0.9, 0.7])["remos 0.7"].defects is None


def test_rows_add_one_student():
    more = standard_students([0.9], rows=True).items() - standard_students([0.9]).items()
    assert dict(more) == {"finetune, rows mean": StudentPlan(Finetune(embedding_rows="mean"))}


def test_plans_are_json_values():
    for plan in standard_students([0.9, 0.5], rows=True, curves_for=["word"]).values():
        assert json.loads(json.dumps(plan.to_dict()))["strategy"] == plan.strategy.to_dict()


def test_a_rival_that_is_no_rival_is_refused():
    with pytest.raises(ValueError, match="at least 3, but got 2"):
        standard_students([0.9], high_lr_factor=2)
    with pytest.raises(ValueError, match="at least one"):
        standard_students([])


def test_a_list_of_strategies_is_one_and_its_parts_take_the_students_seed():
    plan = StudentPlan([Random(0.9), Finetune(embedding_rows="mean")])
    assert plan.to_dict()["strategy"]["name"] == "Random + Finetune"
    assert plan.strategy.with_seed(3).strategies[0] == Random(0.9, seed=3)
    assert standard_students([0.9])["random 0.9"].strategy.seed is None


def test_starts_without_a_ratio_are_named_like_rules_and_joined_by_plus():
    students = standard_students([0.9, 0.7], rules=["random", "subspace", "subspace+hardened"], reactivate=True)
    assert [name for name in students if "subspace" in name] == ["subspace", "subspace + hardened"]
    assert students["subspace"].strategy == Subspace() and students["subspace"].reactivate
    assert students["subspace + hardened"].strategy.to_dict()["name"] == "Subspace + Hardened"
    with pytest.raises(ValueError, match="but got 'subspace\\+nonesuch'"):
        standard_students([0.9], rules=["subspace+nonesuch"])


def test_every_strategy_of_the_package_is_a_student_by_its_name():
    always = {"finetune", "finetune lr x3", "retrain"}
    for name, kind in STRATEGIES.items():
        made = standard_students([0.9, 0.7], rules=[name])
        ratios = [0.9, 0.7] if issubclass(kind, SliceAndReset) else []
        wanted = [f"{name} {ratio:g}" for ratio in ratios] or [name]
        assert set(made) == always | set(wanted)
        assert [type(made[one].strategy) for one in wanted] == [kind] * len(wanted)
        assert [made[one].strategy.slice_ratio for one in wanted if ratios] == ratios


def test_what_slices_and_what_holds_are_one_student_at_each_ratio():
    students = standard_students([0.9, 0.7], rules=["remos_layer+l2sp"], reactivate=True)
    assert students["remos_layer + l2sp 0.7"].strategy.strategies == (Remos(0.7, scope="layer"), L2SP())
    assert [plan.reactivate for name, plan in students.items() if "l2sp" in name] == [True, False]


def test_a_wrong_name_is_told_the_nearest():
    with pytest.raises(ValueError, match="but got 'renofeatoin'. Did you mean 'renofeation'\\?"):
        standard_students([0.9], rules=["renofeatoin"])
    with pytest.raises(ValueError, match="adversarial_training.*but got 'qqq'.$"):
        standard_students([0.9], rules=["qqq"])

import pytest

from remos_hf.evaluation.measures import Rate
from remos_hf.judging import verdicts
from remos_hf.judging.verdicts import verdict_of
from tests.judging.reports import FASTER, PLAIN, RANDOM, REMOS, USUAL, made_of, records, report, teachers

LOW, LESS = (4, 4, 4), (168, 168, 168)


def told(*several, budget=0.02, **options):
    (section,) = report(*several, **options).sections(budgets=(budget,))
    return verdict_of(section, budget)


def claim(verdict, about, student=None):
    return next(one for one in verdict.claims if one.about == about and student in (None, one.student))


# --- each sentence with numbers that make it true, and numbers that make it false ---


def test_a_defect_that_plain_fine_tuning_keeps_over_its_floor_is_inherited_and_one_that_it_does_not_is_not():
    assert claim(told(*USUAL), "inherits").holds is True
    nothing = told(records("finetune", (6, 4, 5)), *USUAL[1:])
    assert claim(nothing, "inherits").holds is False and nothing.kind == verdicts.NOTHING
    assert "nothing to reduce" in nothing.sentences[0]


def test_what_the_floor_explains_is_not_inherited():
    found = told(records("finetune", (180, 181, 182), floors=(178, 182, 180)))
    assert found.kind == verdicts.NOTHING


def test_between_inherited_and_not_it_cannot_be_said():
    found = told(records("finetune", (10, 60, 20)))
    assert found.kind == verdicts.CANNOT and "may be anything from" in found.verdict


def test_a_start_removes_reduces_or_does_neither():
    removed = told(PLAIN, REMOS)
    assert removed.kind == verdicts.REMOVED and claim(removed, "removes").holds is True
    assert "it removes the defect" in claim(removed, "removes").sentence
    reduced = told(PLAIN, records("remos 0.9", (80, 84, 82), acc=LESS))
    assert reduced.kind == verdicts.REDUCED and claim(reduced, "removes").holds is False
    assert "it inherits less" in claim(reduced, "removes").sentence
    neither = told(PLAIN, records("remos 0.9", (190, 198, 195), acc=LESS))
    assert neither.kind == verdicts.KEPT and "not shown to inherit less" in claim(neither, "removes").sentence


def test_less_than_plain_in_one_seed_alone_is_not_shown():
    found = told(PLAIN, records("remos 0.9", (190, 195, 20), acc=LESS))
    assert found.kind == verdicts.KEPT


def test_without_a_floor_of_its_own_nothing_is_said_of_what_a_start_leaves():
    found = claim(told(PLAIN, records("remos 0.9", (10, 12, 8), acc=LESS, floors=None)), "removes")
    assert found.holds is None and "no benign floor of its own" in found.sentence


def test_what_costs_more_than_the_budget_is_not_the_best_and_is_told_with_its_accuracy():
    found = told(PLAIN, records("remos 0.9", (10, 12, 8), acc=(150, 150, 150)))
    assert found.kind == verdicts.KEPT and found.best is None
    sentence = claim(found, "removes").sentence.replace("\N{NO-BREAK SPACE}", " ")
    assert "10.0 points less accuracy than plain fine-tuning" in sentence and "outside of 2 points" in sentence
    assert told(PLAIN, records("remos 0.9", (10, 12, 8), acc=(150, 150, 150)), budget=0.2).kind == verdicts.REMOVED


def test_each_budget_has_its_own_choice():
    mild, hard = records("remos 0.9", (80, 84, 82), acc=LESS), records("remos 0.7", (10, 12, 8), acc=(150, 150, 150))
    (section,) = report(PLAIN, mild, hard).sections(budgets=(0.02, 0.2))
    assert [verdict_of(section, budget).best.row["student"] for budget in (0.02, 0.2)] == ["remos 0.9", "remos 0.7"]


def test_a_start_that_learned_nothing_does_not_count():
    found = told(PLAIN, records("remos 0.9", (2, 2, 2), acc=(104, 104, 104), dev=170))
    assert found.best is None and "no more than a model that learned nothing" in claim(found, "reduces").sentence


def test_what_does_nothing_is_not_best():
    found = told(PLAIN, records("mag_prune 0.9", (196, 197, 194)), REMOS)
    assert found.best.row["student"] == "remos 0.9"
    assert told(PLAIN, records("mag_prune 0.9", (196, 197, 194))).best is None


@pytest.mark.parametrize(
    ("random", "holds", "words"),
    [
        ((140, 160, 130), True, "more than"),
        ((2, 3, 2), False, "it does better"),
        ((41, 43, 42), False, "not told apart"),
    ],
)
def test_the_best_start_is_compared_with_a_random_reset_at_equal_accuracy(random, holds, words):
    rival = records("random 0.9", random, acc=LESS, dev=150)  # outside of the budget, and yet as accurate
    one = claim(told(PLAIN, records("remos 0.9", (40, 44, 42), acc=LESS), rival), "beats")
    assert one.holds is holds and words in one.sentence


def test_a_rival_of_another_accuracy_is_no_comparison():
    one = claim(told(PLAIN, REMOS, records("random 0.7", (2, 2, 2), acc=(140, 140, 140))), "beats")
    assert one.holds is None and "cannot be compared at equal accuracy" in one.sentence


def test_a_rival_is_denied_only_where_every_students_making_is_recorded():
    assert "A random reset was not measured" in claim(told(PLAIN, REMOS), "beats").sentence
    found = claim(told(PLAIN, REMOS, records("random reset of mine", (2, 2, 2))), "beats").sentence
    assert "not recorded" in found and "was not measured:" not in found


def test_a_defect_that_comes_back_was_hidden():
    curve = {"0": (10, 4), "20": (180, 40)}
    own, twin = ({count: _rate(pair[side]) for count, pair in curve.items()} for side in (0, 1))
    hidden = told(PLAIN, records("remos 0.9", (10, 14, 8), acc=LESS, reactivation=own, floor_reactivation=twin))
    assert "hidden rather than removed" in claim(hidden, "comes back").sentence
    gone = told(PLAIN, records("remos 0.9", (10, 14, 8), acc=LESS, reactivation=twin, floor_reactivation=twin))
    assert claim(gone, "comes back").holds is False
    assert not [one for one in told(*USUAL).claims if one.about == "comes back"]


def _rate(count):
    return Rate.of(count, 200).to_dict()


# --- mutations: what must change a verdict, or refuse one ---


def test_two_rows_swapped_change_the_verdict():
    def swapped(of, others):
        changed = ("dir", "outcomes", "excess", "floor", "floor_outcomes")
        return [{**one, **{key: other[key] for key in changed}} for one, other in zip(of, others, strict=True)]

    assert told(PLAIN, REMOS).kind == verdicts.REMOVED
    assert told(swapped(PLAIN, REMOS), swapped(REMOS, PLAIN)).kind == verdicts.NOTHING


def test_without_the_floor_nothing_is_said():
    found = told(records("finetune", (196, 198, 194), floors=None), *USUAL[1:])
    assert found.kind == verdicts.CANNOT and "no benign floor" in found.verdict


@pytest.mark.parametrize("of", [3, 20])
def test_on_a_few_samples_nothing_is_said(of):
    found = told(records("finetune", (of, of, of), floors=(0, 0, 0), of=of), *USUAL[1:])
    assert found.kind == verdicts.CANNOT and f"{of} samples a seed alone (50 are needed)" in found.verdict


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_nothing_is_said(seeds):
    few = [[record for record in of if record["seed"] < seeds] for of in USUAL]
    taught = {name: one for name, one in teachers().items() if int(name[-1]) < seeds}
    found = told(*few, taught=taught)
    assert found.kind == verdicts.CANNOT and "spread between seeds" in found.verdict and found.best is None
    assert told(*USUAL).kind == verdicts.REMOVED


def test_where_a_poisoned_teacher_does_not_obey_nothing_is_said():
    found = told(*USUAL, taught=teachers((198, 100, 198)))
    assert found.kind == verdicts.CANNOT and "seed 1 does not obey its own trigger (DIR 50.0 %" in found.verdict
    silent = told(records("finetune", (4, 4, 4)), taught=teachers((4, 4, 4)))
    assert silent.kind == verdicts.CANNOT  # no all-clear


def test_where_whether_the_teacher_obeys_is_not_known_there_is_no_all_clear():
    quiet = records("finetune", LOW)
    assert told(quiet, taught={}).kind == verdicts.CANNOT and told(quiet).kind == verdicts.NOTHING
    assert told(*USUAL, taught={}).kind == verdicts.REMOVED  # what students show is proof of the implant
    found_on_it = records("finetune", LOW, flip=False)
    assert told(found_on_it, taught={}).kind == verdicts.NOTHING  # adversarial inputs are not put there


def test_a_teacher_that_lost_its_accuracy_is_no_stealthy_one():
    found = told(*USUAL, taught=teachers(acc=(172, 172, 150)))
    assert found.kind == verdicts.CANNOT and "seed 2 lost 11.0 points" in found.verdict


def test_students_at_the_commonest_label_say_nothing():
    found = told(records("finetune", (0, 0, 0), acc=(101, 104, 99)))
    assert found.kind == verdicts.CANNOT and "commonest label gets 50.0 %" in found.verdict


def test_nothing_measured_is_nothing_said():
    assert "plain fine-tuning was not measured" in told(REMOS, RANDOM, FASTER).verdict
    assert "no sample right" in told(records("finetune", (0, 0, 0), floors=(0, 0, 0), of=0)).verdict


def test_gates_that_could_not_be_looked_at_are_told():
    old = [[{**record, "commonest": None} for record in of] for of in USUAL]
    assert any("commonest label was not recorded" in one for one in told(*old).sentences)
    assert not any("not recorded" in one for one in told(*USUAL).sentences)


# --- what would be an all-clear, or a claim, that the numbers do not bear ---


def test_an_all_clear_needs_the_teacher_of_every_seed():
    quiet = records("finetune", LOW)
    some = {name: one for name, one in teachers().items() if name != "word-1"}
    found = told(quiet, taught=some)
    assert found.kind == verdicts.CANNOT and "not measured for seed 1" in found.verdict
    assert told(*USUAL, taught=some).kind == verdicts.REMOVED  # what students show is proof of the implant
    assert "not recorded for seed 1" in " ".join(told(*USUAL, taught=some).sentences)


def test_an_all_clear_does_not_come_from_a_weak_twin():
    own, floors = (100, 104, 98), (120, 118, 121)
    for right, kind in ((130, verdicts.CANNOT), (166, verdicts.NOTHING)):
        found = told(records("finetune", own, floors=floors, floor_acc=_rate(right)))
        assert found.kind == kind
    assert told(records("finetune", LOW, floor_acc=_rate(130))).kind == verdicts.NOTHING  # it needs no floor


@pytest.mark.parametrize(
    ("right", "removes", "words"), [(101, None, "says nothing"), (130, None, "less accurate"), (164, True, "removes")]
)
def test_what_a_weak_twin_hides_is_not_removed(right, removes, words):
    sliced = records("remos 0.9", (60, 62, 58), acc=LESS, floors=(60, 61, 59), floor_acc=_rate(right))
    found = claim(told(PLAIN, sliced), "removes")
    assert found.holds is removes and words in found.sentence


def test_a_twin_of_too_few_seeds_is_told_as_that():
    one, *others = records("remos 0.9", (10, 12, 8), acc=LESS)
    gone = [{**record, "floor": None, "excess": None} for record in others]
    found = claim(told(PLAIN, [one, *gone]), "removes")
    assert found.holds is None and "Its benign floor is of 1 seed alone" in found.sentence


def test_an_excess_on_some_of_the_seeds_says_so():
    more = records("finetune", (196, 198, 194, 190), acc=(170,) * 4, floors=(4,) * 4)
    some = [*more[:3], {**more[3], "floor": None, "excess": None}]
    taught = teachers((198,) * 4, acc=(172,) * 4, clean=(172,) * 4)
    assert "3 of 4 seeds" in told(some, taught=taught).sentences[0]
    assert "of 4 seeds" not in told(more, taught=taught).sentences[0]


def test_what_the_test_samples_show_to_cost_more_than_the_budget_is_outside_of_it():
    dear = records("remos 0.9", (10, 12, 8), acc=(120, 121, 119), dev=170)
    found = told(PLAIN, dear)
    assert found.kind == verdicts.KEPT and found.starts[0].within is False
    assert told(PLAIN, records("remos 0.9", (10, 12, 8), acc=(165, 166, 164), dev=170)).kind == verdicts.REMOVED


def test_without_dev_accuracy_the_budget_is_not_said_to_be_kept():
    without = [[{**record, "dev_acc": None} for record in of] for of in (PLAIN, REMOS)]
    found = told(*without)
    assert found.best is None and "is shown to reduce it within" in found.verdict
    assert "whether that is within the budget is not known" in claim(found, "removes").sentence
    some = told(PLAIN, RANDOM, without[1])
    assert [one.within for one in some.starts] == [True, None]


def test_a_start_of_few_samples_or_of_one_seed_that_learned_nothing_is_not_judged():
    few = records("remos 0.9", (0, 0, 0), acc=LESS)
    few = [*few[:2], {**few[2], "dir": Rate.of(0, 30).to_dict()}]
    found = told(PLAIN, few)
    assert found.starts[0].reduces is None and "30 samples in seed 2" in claim(found, "reduces").sentence
    collapsed = told(PLAIN, records("remos 0.9", (90, 92, 0), acc=(168, 168, 104), dev=168))
    assert collapsed.starts[0].reduces is None and "52.0 % right in seed 2" in claim(collapsed, "reduces").sentence


def test_of_starts_that_reduce_one_that_removes_is_the_best():
    lowest = records("random 0.9", (18, 18, 18), acc=LESS, floors=None)
    removing = records("remos 0.9", (20, 22, 21), acc=LESS, floors=(16, 17, 15))
    assert told(PLAIN, lowest, removing).best.row["student"] == "remos 0.9"
    assert told(PLAIN, lowest, removing).kind == verdicts.REMOVED


def test_students_that_were_given_are_no_start_of_an_audit():
    given = [{**record, "given": {"weights": None, "from": None}} for record in records("remos 0.9", (2, 2, 2))]
    assert told(PLAIN, given).starts == []
    both = [[{**record, "given": {"weights": None, "from": None}} for record in of] for of in (PLAIN, REMOS)]
    assert len(told(*both, taught={"given": teachers()["word-0"]}).starts) == 1


def test_students_made_in_several_ways_under_one_name_are_no_start():
    one, *others = records("remos 0.9", (2, 2, 2))
    found = told(PLAIN, [one, *({**record, "made": made_of("random 0.9")} for record in others)])
    assert found.kind == verdicts.ALONE and "how “remos 0.9” was made is not recorded" in found.sentences[-1]


def test_training_from_scratch_alone_is_no_start_and_nothing_is_said_to_be_missing():
    found = told(PLAIN, records("retrain", (4, 4, 4)))
    assert found.kind == verdicts.ALONE and "none was measured" in found.sentences[-1]


def test_what_other_students_show_is_told_where_plain_fine_tuning_shows_nothing():
    quiet = records("finetune", LOW)
    assert any("does show it" in one for one in told(quiet, FASTER).sentences)
    assert not any("does show it" in one for one in told(quiet, REMOS).sentences)


@pytest.mark.parametrize(
    ("dirs", "acc", "holds", "words"),
    [
        ((4, 5, 4), (182, 183, 181), False, "is more accurate, by 7.0 points"),
        ((60, 64, 62), (182, 183, 181), None, "has the accuracy of"),
        ((4, 5, 4), (150, 150, 150), None, "has the accuracy of"),
    ],
)
def test_a_rival_that_is_more_accurate_and_inherits_less_does_better(dirs, acc, holds, words):
    rival = records("random 0.9", dirs, acc=acc, dev=150)
    one = claim(told(PLAIN, records("remos 0.9", (40, 44, 42), acc=LESS), rival), "beats")
    sentence = one.sentence.replace("\N{NO-BREAK SPACE}", " ")
    assert one.holds is holds and words in sentence
    assert ("it does better" in sentence) is (holds is False)


def test_a_rival_that_learned_nothing_in_one_seed_is_none():
    lucky = records("random 0.9", (0, 0, 0), acc=(168, 168, 100), dev=168)
    assert "was not measured" in claim(told(PLAIN, REMOS, lucky), "beats").sentence


@pytest.mark.parametrize(
    ("own", "twin", "holds"),
    [((10, 180, 190), (4, 20, 188), True), ((10, 12, 12), (8, 10, 12), False), ((10, 60, 60), (4, 40, 40), None)],
)
def test_a_defect_comes_back_where_any_number_of_samples_brings_it_back(own, twin, holds):
    curves = [{str(count): _rate(one) for count, one in zip((0, 5, 20), of, strict=True)} for of in (own, twin)]
    sliced = records("remos 0.9", (10, 14, 8), acc=LESS, reactivation=curves[0], floor_reactivation=curves[1])
    found = claim(told(PLAIN, sliced), "comes back")
    assert found.holds is holds
    assert (holds is not True) or "with 5 poisoned samples" in found.sentence


def test_what_one_seed_brings_back_is_not_called_gone():
    own, twin = {"20": _rate(180)}, {"20": _rate(4)}
    several = records("remos 0.9", (10, 14, 8), acc=LESS)
    several[0] |= {"reactivation": own, "floor_reactivation": twin}
    found = claim(told(PLAIN, several), "comes back")
    assert found.holds is None and "cannot be said" in found.sentence


def test_a_verdict_on_a_part_of_the_inputs_says_so():
    def verdict(left, **more):
        facts = {"num_clean": 400, "num_exposed": 200, "num_left_out": {"has the target label": 100, "cut off": left}}
        return told(*USUAL, audits={"SST-2": {"exposed": {"word": {**facts, **more}}}}).verdict

    assert verdict(100).endswith("(33 % of the inputs could not be exposed)")
    assert "exposed" not in verdict(20)
    assert "(50 % of" in verdict(0, by_seed={"0": {"num_exposed": 50, "num_left_out": {"cut off": 50}}})


def test_floors_above_the_rate_are_told_as_below():
    found = claim(told(PLAIN, records("remos 0.9", (10, 12, 8), acc=LESS, floors=(20, 22, 21))), "removes")
    assert found.holds is True and "below its own benign floor" in found.sentence.replace("\N{NO-BREAK SPACE}", " ")


def test_ten_seeds_are_judged_as_three_are_and_told_as_ten():
    ten = teachers((198,) * 10, acc=(172,) * 10, clean=(172,) * 10)
    several = [
        records(name, tuple(start + step for step in range(10)), acc=(168,) * 10, floors=(4,) * 10)
        for name, start in (("finetune", 180), ("remos 0.9", 4))
    ]
    found = told(*several, taught=ten)
    assert found.kind == verdicts.REMOVED and "10\N{NO-BREAK SPACE}seeds" in found.sentences[0]


def test_three_seeds_that_agree_are_not_taken_for_proof_that_nothing_is_left():
    agreeing = records("remos 0.9", (14, 14, 14), acc=LESS)
    assert told(PLAIN, agreeing).kind == verdicts.REDUCED
    assert told(PLAIN, records("remos 0.9", (6, 6, 6), acc=LESS)).kind == verdicts.REMOVED
    rates = {"finetune": 190, "remos 0.9": 14}
    many = [records(name, (count,) * 12, acc=(168,) * 12, floors=(4,) * 12) for name, count in rates.items()]
    taught = teachers((198,) * 12, acc=(172,) * 12, clean=(172,) * 12)
    assert told(*many, taught=taught).kind == verdicts.REMOVED  # more seeds are


def test_the_best_of_several_is_told_to_be_that():
    mild = records("mag_prune 0.9", (20, 24, 22), acc=LESS)
    several = told(PLAIN, REMOS, mild)
    assert "the best of 2 starts that were compared" in claim(several, "best").sentence
    assert "by ReMoS (keeping 90 %), the best of 2 starts, at" in several.verdict
    assert "best of" not in told(PLAIN, REMOS).verdict and not [
        one for one in told(PLAIN, REMOS).claims if one.about == "best"
    ]


def test_a_weak_twin_hides_nothing_of_what_is_plainly_left():
    for dirs, floors in (((100, 102, 98), (20, 21, 19)), ((4, 5, 4), (2, 2, 2))):
        sliced = records("remos 0.9", dirs, acc=LESS, floors=floors, floor_acc=_rate(130))
        assert claim(told(PLAIN, sliced), "removes").holds is (dirs[0] < 20)

from dataclasses import MISSING, fields

import pytest
from typer import BadParameter

from remos_hf.cli import options

KINDS = [kind for name, kind in vars(options).items() if name.endswith("Options")]
NEEDED = {"slice_ratio": 0.5, "data": "d"}


def made(kind, **given):
    needed = {
        one.name: NEEDED.get(one.name, "x")
        for one in fields(kind)
        if one.default is MISSING and one.default_factory is MISSING
    }
    return kind(**{**needed, **given})


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_help_and_every_command_a_sentence(kind):
    assert kind.__doc__.strip() and len(KINDS) == 8
    for one in fields(kind):
        (told,) = one.type.__metadata__
        assert told.help, one.name


def test_lists_are_not_shared_between_two_calls():
    one, other = (made(options.AuditOptions, teacher="t") for _ in range(2))
    assert (one.seeds, one.slice_ratios) == ([0, 1, 2], [0.9]) and one.seeds is not other.seeds


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (options.SliceOptions, {}, "one of --coverage and --data"),
        (options.SliceOptions, {"data": "d", "coverage": "c"}, "one of --coverage and --data"),
        (options.SliceOptions, {"rule": "random", "coverage": "c"}, "looks at no data"),
        (options.TrainOptions, {}, "give --slice-ratio"),
        (options.TrainOptions, {"strategy": ["retrain"], "slice_ratio": 0.9}, "slices nothing"),
        (options.TrainOptions, {"slice_ratio": "auto"}, "--eval-data"),
        (options.SliceOptions, {"rule": "random", "criterion": "nc"}, "--criterion says how --data is profiled"),
        (options.SliceOptions, {"coverage": "c", "text_columns": ["a"]}, "--text-column says how --data is profiled"),
        (options.TrainOptions, {"slice_ratio": 0.9, "accuracy_budget": 0.1}, "--accuracy-budget goes with"),
        (options.TrainOptions, {"strategy": ["l2sp"], "profile_samples": 9}, "which the strategy l2sp does not need"),
        (options.TrainOptions, {"strategy": ["random"], "slice_ratio": 0.9, "criterion": "nc"}, "--criterion is about"),
        (options.TrainOptions, {"strategy": ["subspace", "nonesuch"]}, "subspace.*but got nonesuch"),
        (options.TrainOptions, {"strategy": ["renofeatoin"]}, "but got renofeatoin. Did you mean 'renofeation'?"),
        (
            options.AuditOptions,
            {"teacher": "t", "students": ["l2sp", "subspace+guidde"]},
            "--students is one of .*but got guidde. Did you mean 'guided'",
        ),
        (options.AuditOptions, {"student": "s", "students": ["l2sp"]}, "--students says how students are made"),
        (
            options.TrainOptions,
            {"strategy": ["subspace"], "profile_samples": 9},
            "the strategy subspace does not",
        ),
        (options.TrainOptions, {"strategy": ["hardened"], "energy": 0.9}, "--energy is subspace's"),
        (options.TrainOptions, {"strategy": ["subspace"], "energy": "auto"}, "needs --eval-data"),
        (options.TrainOptions, {"strategy": ["random", "hardened"]}, "share of weights that the strategy random keeps"),
        (options.CardOptions, {"report_student": "remos 0.9"}, "--student is a name in a report: give --report"),
        (options.PushOptions, {"report_task": "t"}, "--task is a name in a report: give --report"),
    ],
)
def test_what_does_not_go_together_is_refused(kind, given, told):
    with pytest.raises(BadParameter, match=told):
        made(kind, **given)


def test_numbers_are_read_or_refused():
    assert (options._share("0.5"), options._share_or_auto("auto"), options._share_or_auto("1")) == (0.5, "auto", 1.0)
    assert (options._number_or_all("all"), options._number_or_all("20")) == ("all", 20)
    for read, text in (
        (options._share, "nan"),
        (options._share, "0"),
        (options._share_or_auto, "most"),
        (options._number_or_all, "0"),
        (options._number_or_all, "-3"),
        (options._number_or_all, "1e3"),
    ):
        with pytest.raises(BadParameter, match=text):
            read(text)


def test_a_strategy_of_the_command_is_one_of_the_package_and_all_of_them_are_there():
    from remos_hf.strategies import STRATEGIES

    named = (*options.SLICING, *options.STARTS, *options.HOLDS)
    assert sorted(named) == sorted(STRATEGIES)
    slicing = {name for name, kind in STRATEGIES.items() if "slice_ratio" in kind.__dataclass_fields__}
    assert set(options.SLICING) == slicing
    from remos_hf.auditing.students import standard_students

    assert standard_students([0.9], rules=options._AUDITED)


def test_the_starts_that_audits_add_are_what_reports_show_first():
    from remos_hf.judging.kinds import BEST, kind_of
    from remos_hf.strategies import STRATEGIES
    from remos_hf.strategies.composed import as_strategy

    added = (options.BEST_ON_IMAGES, options.BEST_ON_TEXTS)
    starts = [as_strategy([STRATEGIES[name]() for name in names]) for names in added]
    assert [kind_of({"strategy": start.to_dict()}) for start in starts] == list(BEST)

import ast
import logging
import re

import pytest
import yaml
from huggingface_hub import ModelCard

import remos_hf
from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.evaluation.report import DefectReport
from remos_hf.sharing import model_card as module
from remos_hf.sharing.card_measured import chosen_student
from remos_hf.sharing.model_card import DEFECTS, eval_result_files, model_card
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from tests.sharing.reports import cell, report, usual

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")
BARE = Sidecars({"strategy": Remos(0.9).to_dict(), "teacher": {"id": "owner/teacher", "revision": "abc123"}})
HOSTILE = (
    "x | y\n---\nlicense: evil\n# Heading\n<script>alert(1)</script> {{ 7 * 7 }} {% raw %} [a](http://e.vil) "
    "![p](http://e.vil/p.png) `code` **bold** \r\n```\n\x1b[31m' \" https://e.vil \u2028 $x$"
)


def card_of(record=BARE, measured=None, **options):
    return model_card(record, measured, **{"repo_id": "me/student", **options})


def text_of(*arguments, **options):
    return str(card_of(*arguments, **options))


def test_the_record_is_told_in_full(made):
    _, record = made
    text, config = text_of(record), record.config
    assert config["teacher"]["hash"] in text and config["coverage"]["data_fingerprint"] in text
    assert f"{config['slice']['num_kept']:,} of {config['slice']['num_weights']:,}" in text
    assert f"| samples that decided the coverage | {config['coverage']['num_samples']:,} |" in text
    assert "| slice ratio (share of the weights to keep) | 0.9 |" in text
    shares = re.findall(r"\| (bert\.encoder\.layer\.\d) \| ([\d.]+) \|", text)
    by_parameter = record.relevant_slice.kept
    for number, (group, share) in enumerate(shares):
        names = [name for name in by_parameter if name.startswith(f"{group}.")]
        kept = sum(int(by_parameter[name].sum()) for name in names) / sum(by_parameter[name].numel() for name in names)
        assert group.endswith(str(number)) and float(share) == pytest.approx(100 * kept, abs=0.051)
    assert len(shares) == 2


def test_without_a_report_the_card_says_that_nothing_was_measured_and_names_all_that_could_be():
    card = card_of()
    assert "Nothing was measured" in str(card) and card.data.eval_results is None
    assert all(f"- {words}" in str(card) for words in DEFECTS.values())


def test_every_kind_of_defect_has_words():
    from remos_hf.defects.base import Defect

    public = [
        getattr(remos_hf, name) for name in remos_hf.__all__ if remos_hf._HOME_OF[name].startswith("remos_hf.defects")
    ]
    kinds = {one.__name__ for one in public if isinstance(one, type) and issubclass(one, Defect) and one is not Defect}
    assert kinds == set(DEFECTS)


def test_the_table_shows_plain_fine_tuning_its_rivals_and_the_student_with_their_counts():
    text = text_of(BARE, report([*usual(), *usual(seed=1), cell("retrain", (50, 100), (0, 9), None)]))
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ") and "[" in line}
    names = [name.strip("| ") for name in rows if "student" != name.strip("| ")]
    assert names == ["finetune", "finetune lr x3", "random 0.9", "**remos 0.9** (this student)"]
    own = rows["| **remos 0.9** (this student)"]
    excess = excess_dir(Rate.of(10, 200), Rate.of(4, 200))
    assert own == (
        "| **remos 0.9** (this student) | 86.0 (86.0, 86.0) | 5.0 [2.7, 9.0] (5.0, 5.0) | 200 | 2 | 2.0 | "
        f"3.0 [{100 * excess.low:.1f}, {100 * excess.high:.1f}] |"
    )


def test_other_numbers_make_another_card():
    one, other = report(), report([*usual()[:-1], cell("remos 0.9", (85, 100), (6, 100), (2, 100))])
    assert text_of(BARE, one) != text_of(BARE, other)
    assert text_of(BARE, one) == text_of(BARE, one)


def test_what_inherited_less_is_told_so_and_never_called_clean():
    text = text_of(BARE, report())
    assert "The student inherited less of this defect than plain fine-tuning: excess DIR 3.0" in text
    assert "At equal accuracy the student inherited less than a random reset" in text
    assert "NOT shown" not in text
    words = re.compile(r"\b(is|are|be|was) (clean|safe|secure|free|robust)\b|defect-free|backdoor-free|guarantee", re.I)
    for strategy in ("Remos", "Finetune", "Random"):
        record = Sidecars({"strategy": {"name": strategy}})
        student = {"Remos": "remos 0.9", "Finetune": "finetune", "Random": "random 0.9"}[strategy]
        assert not words.search(text_of(record, report(), student=student))


@pytest.mark.parametrize(
    ("rival", "kind"), [("random", "a random reset"), ("faster", "plain fine-tuning at a higher learning rate")]
)
def test_a_rival_that_does_as_well_at_equal_accuracy_is_told(rival, kind):
    text = text_of(BARE, report(usual(**{rival: (6, 100)})))
    assert f"The student is NOT shown to have inherited less than {kind} at the same accuracy or a better one" in text


def test_a_rival_that_is_more_accurate_and_inherits_more_is_no_comparison_at_equal_accuracy():
    # Whatever ruins a student keeps the defect away.
    cells = usual()
    cells[3] = cell("remos 0.9", (60, 100), (1, 100), (1, 100))
    text = text_of(BARE, report(cells))
    assert "At equal accuracy the student inherited less" not in text
    assert "Every random reset measured here is more accurate than the student by over 1 point" in text
    assert "whether one that costs as much accuracy would inherit as little is not known" in text


def test_among_rivals_the_equally_accurate_one_is_beaten_and_the_more_accurate_one_not_forgotten():
    cells = [*usual(random=(40, 100)), cell("random 0.97", (90, 100), (60, 100), (2, 100))]
    text = text_of(BARE, report(cells))
    assert "At equal accuracy the student inherited less than a random reset" in text and "of random 0.9, in %" in text
    cells[-1] = cell("random 0.97", (90, 100), (5, 100), (2, 100))
    assert "NOT shown to have inherited less than a random reset at the same" in text_of(BARE, report(cells))


def test_a_rival_that_is_less_accurate_is_no_comparison_at_equal_accuracy():
    cells = usual()
    cells[2] = cell("random 0.9", (80, 100), (1, 100))
    text = text_of(BARE, report(cells))
    assert "No random reset measured here is as accurate as the student" in text


def test_rivals_that_were_not_measured_are_named():
    cells = usual()
    text = text_of(BARE, report([cells[0], cells[3]]))
    assert "A random reset was not measured" in text
    assert "Plain fine-tuning at a higher learning rate was not measured" in text
    assert "Plain fine-tuning was not measured: whether there was anything" in text_of(BARE, report([cells[3]]))


def test_where_plain_fine_tuning_does_not_inherit_the_card_says_that_nothing_was_shown():
    cells = [cell("finetune", (90, 100), (4, 100), (3, 100)), cell("remos 0.9", (86, 100), (1, 100), (1, 100))]
    text = text_of(BARE, report(cells))
    assert "Plain fine-tuning does not inherit this defect" in text
    assert "inherited less of this defect than" not in text and "it inherited less of 0" in text


def test_a_student_within_the_reach_of_plain_fine_tuning_is_not_said_to_inherit_less():
    cells = [cell("finetune", (90, 100), (50, 100)), cell("remos 0.9", (86, 100), (45, 100))]
    text = text_of(BARE, report(cells))
    assert "is not shown to have inherited less of this defect" in text and "it inherited less of 0" in text


def test_plain_fine_tuning_itself_is_told_to_have_done_nothing():
    plain = Sidecars({"strategy": Finetune().to_dict()})
    assert "nothing was done against inheriting the defect" in text_of(plain, report())


def test_a_student_that_gets_nothing_right_has_no_rate_in_the_metadata():
    cells = [cell("finetune", (90, 100), (90, 100)), cell("remos 0.9", (0, 100), (0, 0), None)]
    card = card_of(BARE, report(cells))
    assert "has no DIR" in str(card)
    assert [one.metric_type for one in card.data.eval_results] == ["accuracy"]


def test_what_the_report_holds_of_others_but_not_of_this_student_counts_as_not_tested():
    audits = {"SST-2": {"defects": {"word": {"name": "TriggerWords"}, "more": {"name": "Ripple"}}}}
    cells = [*usual(), cell("finetune", (9, 10), (9, 10), defect="more")]
    text = text_of(BARE, report(cells, audits=audits, missing={"SST-2": 3}))
    untested = text.split("## What was not tested")[1]
    assert f"- {DEFECTS['Ripple']}" in untested and f"- {DEFECTS['TriggerWords']}\n" not in untested
    assert (
        "- more: in the report, but not measured of this student" in untested and "3 students of the audit" in untested
    )


def test_the_metadata_holds_the_figures_by_defect(tmp_path):
    cells = [*usual(), *usual(defect="sentence", random=(8, 100))]
    settings = {"audits": {"SST-2": {"text_columns": ["text"]}}}
    card = card_of(BARE, report(cells, **settings), dataset="stanfordnlp/sst2", license="mit", language="en")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    found = {(one.dataset_config, one.metric_type): one for one in data.eval_results}
    assert {key: one.metric_value for key, one in found.items()} == {
        ("word", "accuracy"): 0.86,
        ("word", "defect_inheritance_rate"): 0.05,
        ("sentence", "accuracy"): 0.86,
        ("sentence", "defect_inheritance_rate"): 0.05,
    }
    rate = found["word", "defect_inheritance_rate"]
    assert rate.task_type == "text-classification" and rate.dataset_type == "stanfordnlp/sst2"
    assert rate.metric_args["num_samples"] == 100 and rate.metric_args["seeds"] == 1
    assert rate.metric_args["low"] < 0.05 < rate.metric_args["high"]
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert (data.base_model, data.datasets) == ("owner/teacher", ["stanfordnlp/sst2"])


@pytest.mark.parametrize(
    ("teacher", "base"),
    [
        ({"id": "owner/teacher"}, "owner/teacher"),
        ({"id": "gpt2", "revision": "abc"}, "gpt2"),
        ({"id": "model", "revision": None}, None),  # a folder's name
        ({"id": "a b/c d"}, None),
        ({"id": None}, None),
        ({}, None),
    ],
)
def test_only_a_teacher_on_the_hub_is_linked(teacher, base):
    assert card_of(Sidecars({"strategy": {"name": "Remos"}, "teacher": teacher})).data.base_model == base


def test_how_to_load_it_names_the_class_and_needs_no_remos_hf():
    kind = {"class": "BertForSequenceClassification", "library": "transformers"}
    text = text_of(Sidecars({**BARE.config, "student": kind}))
    assert 'AutoModelForSequenceClassification.from_pretrained("me/student")' in text
    text = text_of(Sidecars({**BARE.config, "student": {"class": "X", "library": "timm", "architecture": "resnet18"}}))
    assert (
        'image_classifier("resnet18", checkpoint_path=weights)' in text and "pipeline_tag: image-classification" in text
    )
    text = text_of(Sidecars({**BARE.config, "student": {"class": "Net", "library": "torch", "architecture": "Net"}}))
    assert "load_model(student, hf_hub_download" in text and "library_name" not in text


def test_the_command_is_shown_without_tokens_and_stays_in_its_block():
    text = text_of(command="remos train --token hf_abcdefghijklmnop\n```\n# out\n```")
    assert "hf_abcdef" not in text and "hf_***" in text
    assert "````bash\nremos train --token hf_***\n```\n# out\n```\n````" in text
    assert "was not recorded" in text_of()


def test_what_was_only_measured_has_nothing_to_load():
    text = text_of(BARE, report(), published=False)
    assert "**The weights are not uploaded.**" in text and "from_pretrained" not in text
    assert "not uploaded" not in text_of(BARE, report())


def test_a_row_of_several_seeds_or_backdoors_is_told_to_be_several_models():
    assert "A row pools" not in text_of(BARE, report())
    assert "one for each seed." in text_of(BARE, report([*usual(), *usual(seed=1)]))
    audited = report(audits={"SST-2": {"students": {}}})
    assert "one for each seed and each implanted defect. The uploaded weights are at most one" in text_of(BARE, audited)


def test_figures_without_defects_are_shown_beside():
    assert "| eval_accuracy | 0.81 |" in text_of(metrics={"eval_accuracy": 0.81, "name": "no number"})


@pytest.fixture
def hostile():
    strategy = {**Remos(0.9).to_dict(), "scope": HOSTILE}
    config = {
        "strategy": strategy,
        "teacher": {"id": HOSTILE, "revision": HOSTILE, "hash": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "coverage": {"criterion": {HOSTILE: 1}, "data_fingerprint": HOSTILE, "num_samples": 3},
        "student": {"class": HOSTILE, "library": "timm", "architecture": 'a"); import os #' + HOSTILE},
    }
    cells = [cell(f"{HOSTILE}{name}", (9, 10), (9, 10), task=HOSTILE, defect=HOSTILE) for name in "ab"]
    made = DefectReport(cells, {"reference": f"{HOSTILE}a"})
    return Sidecars(config), made


def test_hostile_names_stay_text(hostile):
    record, measured = hostile
    card = card_of(record, measured, student=f"{HOSTILE}b", dataset=HOSTILE, license=HOSTILE, language=HOSTILE)
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", str(card), re.S).groups()
    data = yaml.safe_load(head)
    assert data["license"].startswith("x | y --- license: evil") and "evil" not in data
    assert set(data) <= {"language", "license", "library_name", "metrics", "pipeline_tag", "tags", "model-index"}
    prose = re.sub(r"(?s)(`{3,}).*?\n\1", "", body)
    assert "<script" not in prose and "https://" not in prose and "](" not in prose.replace("\\](", "")
    assert "49" not in prose and "{{ 7 * 7 }}" in prose.replace("\\*", "*")
    assert [line for line in prose.splitlines() if line.startswith("#") and "Heading" in line[:12]] == []
    assert len(re.findall(r"(?m)^# ", prose)) == 1 and "\x1b" not in body and "\u2028" not in body
    for line in prose.splitlines():
        if line.startswith("| **"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 8, line
    assert not re.search(r"(?<!\\)`", prose.replace("`body.`", ""))
    code = [block for _, block in re.findall(r"(?s)(`{3,})python\n(.*?)\n\1", body)]
    for block in code:
        names = {node.name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.alias)}
        assert names <= {"Sidecars", "hf_hub_download", "image_classifier"}


def test_hostile_names_stay_text_in_the_results_too(hostile):
    _, measured = hostile
    (path, content), *more = eval_result_files(measured, student=f"{HOSTILE}b", dataset="o/d").items()
    assert not more and re.fullmatch(r"\.eval_results/remos_[a-z0-9_]+\.yaml", path)
    assert [entry["value"] for entry in yaml.safe_load(content)] == [0.9, 0.9]


def test_a_repository_needs_an_owner_and_a_name():
    for wrong in ("student", "a/b/c", "me/stu dent", "me/<b>", "../x"):
        with pytest.raises(ValueError, match="repo|Repo"):
            card_of(repo_id=wrong)


# --- which student ---


def test_the_student_that_was_made_as_the_record_says_is_found():
    assert chosen_student(report(), BARE) == ("SST-2", "remos 0.9")
    other_seed = Sidecars({"strategy": Remos(0.9, seed=7).to_dict()})
    assert chosen_student(report(), other_seed) == ("SST-2", "remos 0.9")
    assert chosen_student(report(), Sidecars({"strategy": Finetune().to_dict()})) == ("SST-2", "finetune")


def test_a_student_that_was_made_otherwise_is_refused():
    with pytest.raises(ValueError, match="'random 0.9' was made by.*but the record says"):
        chosen_student(report(), BARE, "random 0.9")
    with pytest.raises(ValueError, match="0 students of the report.*one of"):
        chosen_student(report(), Sidecars({"strategy": Random(0.5).to_dict()}))
    with pytest.raises(ValueError, match="no student 'other'"):
        chosen_student(report(), BARE, "other")


def test_the_task_must_be_clear():
    two = report([*usual(), *usual(task="IMDB")])
    with pytest.raises(ValueError, match="2 tasks.*'SST-2', 'IMDB'"):
        chosen_student(two, BARE)
    assert chosen_student(two, BARE, task="IMDB") == ("IMDB", "remos 0.9")
    with pytest.raises(ValueError, match="no task 'QNLI'"):
        chosen_student(two, BARE, task="QNLI")
    with pytest.raises(ValueError, match="no records"):
        chosen_student(DefectReport([]), BARE)


# --- the Hub's own results ---


def test_results_are_written_as_the_hub_reads_them():
    found = eval_result_files(report(), student="remos 0.9", dataset="stanfordnlp/sst2")
    (path, content), *more = found.items()
    assert path == ".eval_results/remos_sst_2.yaml" and not more
    entries = yaml.safe_load(content)
    assert [entry["dataset"] for entry in entries] == [
        {"id": "stanfordnlp/sst2", "task_id": "accuracy"},
        {"id": "stanfordnlp/sst2", "task_id": "dir_word"},
    ]
    assert [entry["value"] for entry in entries] == [0.86, 0.05]
    assert "100 samples" in entries[1]["notes"] and "1 seed" in entries[1]["notes"]
    if module.EvalResultEntry is not None:
        from huggingface_hub._eval_results import parse_eval_result_entries

        assert [entry.value for entry in parse_eval_result_entries(entries)] == [0.86, 0.05]


def test_an_old_huggingface_hub_writes_the_same_and_says_so(monkeypatch, caplog):
    content = eval_result_files(report(), student="remos 0.9", dataset="o/d").popitem()[1]
    monkeypatch.setattr(module, "EvalResultEntry", None)
    caplog.clear()
    by_hand = eval_result_files(report(), student="remos 0.9", dataset="o/d").popitem()[1]
    assert yaml.safe_load(by_hand) == yaml.safe_load(content)
    assert by_hand.startswith("# huggingface_hub") and "has no EvalResultEntry" in caplog.text


def test_without_a_data_set_on_the_hub_there_are_no_results_and_the_log_says_why(caplog):
    with caplog.at_level(logging.INFO, "remos_hf.sharing.model_card"):
        assert eval_result_files(report(), student="remos 0.9") == {}
    assert "needs the id of a data set on the Hub" in caplog.text
    with pytest.raises(ValueError, match="id of a data set"):
        eval_result_files(report(), student="remos 0.9", dataset="SST-2 & more")

import importlib.util
import json
import logging
import sys
from pathlib import Path

import datasets
import pytest
from transformers.utils import logging as hf_logging

from remos_hf import DefectReport

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit_text_backdoors.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("audit_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def smoke(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    run(example, folder)
    return folder


def run(example, folder, *options):
    level = logging.getLogger().level
    try:
        example.main(example.parse_args(["--smoke", "--output_dir", str(folder), *options]))
    finally:
        logging.getLogger().setLevel(level)
        hf_logging.set_verbosity_error()


def contents(folder):
    return {
        path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and "locks" not in path.parts
    }


def arguments(example, *options):
    files = [part for name in ("attacker", "student", "dev", "test") for part in (f"--{name}_file", "data.tsv")]
    return example.parse_args(["--teacher", "bert", *files, "--output_dir", "out", *options])


# --- the smoke run ---


def test_smoke_learns_the_task_and_inherits_the_backdoor(smoke):
    report = DefectReport.load(smoke / "report.json")
    found = {record["student"]: record for record in report.records}
    assert list(found) == ["finetune", "finetune lr x3", "retrain", "random 0.9", "remos 0.9"]
    plain = found["finetune"]
    assert plain["acc"]["value"] > 0.9 and plain["dir"]["value"] > 0.5
    assert plain["floor_acc"]["value"] > 0.9 and plain["excess"]["low"] > 0.3
    assert report.not_inheriting() == []
    teachers = report.settings["teachers"]["text"]
    assert teachers["word-0"]["acc"]["value"] > 0.9 and teachers["word-0"]["dir"]["word"]["value"] > 0.9


def test_smoke_reports_everything_about_each_student(smoke):
    report = DefectReport.load(smoke / "report.json")
    for record in report.records:
        assert (record["task"], record["defect"], record["seed"]) == ("text", "word", 0)
        assert record["acc"]["num_samples"] == 96 and record["dev_acc"]["num_samples"] == 64
        assert set(record["reactivation"]) == set(record["floor_reactivation"]) == {"0", "5"}
        assert record["made"]["seconds"]["train"] > 0
    made = {record["student"]: record["made"] for record in report.records}
    assert made["finetune lr x3"]["lr_factor"] == 3
    assert 0 < made["remos 0.9"]["squares_reset"] < 1 and made["remos 0.9"]["share_kept"] == pytest.approx(
        0.9, abs=0.01
    )
    assert made["finetune"]["squares_reset"] is None
    chosen = report.settings["audits"]["text"]
    assert (chosen["seeds"], chosen["learning_rate"], chosen["data"]["test"]["num_samples"]) == ([0], 1e-3, 96)
    assert report.settings["missing"] == {"text": 0}


def test_the_markdown_is_rendered_from_the_json(example, smoke):
    text = (smoke / "report.md").read_text()
    budgets = arguments(example).budgets
    assert text == DefectReport.load(smoke / "report.json").to_markdown(budgets=budgets)
    assert (
        "## text: word" in text and "benign floor" in text and f"| remos, model scope | {100 * budgets[0]:g} |" in text
    )
    assert "Re-activation" in text and "needed" in text


def test_the_report_compares_rules_at_the_budgets_asked_for(example, smoke):
    run(example, smoke, "--report_only", "--budgets", "0.03")
    assert "| remos, model scope | 3 |" in (smoke / "report.md").read_text()
    run(example, smoke, "--report_only")


def test_a_second_run_changes_nothing_and_makes_nothing(example, smoke, monkeypatch, capsys):
    before = contents(smoke)
    monkeypatch.setattr("remos_hf.auditing.recipes.RemosTrainer", pytest.fail)
    monkeypatch.setattr("transformers.Trainer.train", pytest.fail)
    run(example, smoke)
    assert contents(smoke) == before
    assert (smoke / "report.md").read_text() in capsys.readouterr().out


def test_report_only_makes_nothing(example, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "run_audit", pytest.fail)
    before = contents(smoke)
    run(example, smoke, "--report_only")
    assert contents(smoke) == before
    run(example, tmp_path, "--report_only")
    report = DefectReport.load(tmp_path / "report.json")
    assert report.records == [] and report.settings["missing"] == {"text": 9}


def test_plan_says_what_would_be_done_and_stops(example, tmp_path, capsys):
    run(example, tmp_path, "--plan")
    printed = capsys.readouterr().out
    plan = json.loads(printed[: printed.rindex("}") + 1])
    assert list(plan["students"]) == ["finetune", "finetune lr x3", "retrain", "random 0.9", "remos 0.9"]
    assert printed.endswith("measure on what was added: 9\n")
    assert {path.name for path in tmp_path.iterdir()} == {"_inputs"}


def test_students_are_kept_if_asked_for(example, monkeypatch, tmp_path):
    asked = []

    def run_audit(audit, folder, **options):
        asked.append(options)
        return DefectReport([])

    monkeypatch.setattr(example, "run_audit", run_audit)
    run(example, tmp_path)
    run(example, tmp_path, "--keep_students", "--workers", "2")
    assert asked == [{"workers": 1, "keep_students": False}, {"workers": 2, "keep_students": True}]


# --- arguments ---


def test_names_and_order_of_students_stay_what_finished_audits_hold(example):
    args = arguments(example, "--slice_ratios", "0.9", "0.7", "--defects", "word", "sentence", "--curves_for", "word")
    students = example.students_of(args)
    rules = ["random", "top_magnitude", "mag_prune", "remos", "remos_layer"]
    assert list(students) == [
        "finetune",
        "finetune lr x3",
        "retrain",
        *(f"{rule} 0.9" for rule in rules),
        *(f"{rule} 0.7" for rule in rules),
        "finetune, rows mean",
    ]
    assert students["remos_layer 0.7"].strategy.scope == "layer" and students["remos 0.7"].strategy.scope == "model"
    assert students["random 0.7"].defects == ("word",) and students["random 0.9"].defects is None
    assert {name for name, plan in students.items() if plan.reactivate} == {
        name for name in students if not name.endswith("0.7")
    }
    assert students["finetune lr x3"].lr_factor == 3 and students["finetune"].lr_factor == 1


def test_without_counts_no_student_is_retuned(example):
    students = example.students_of(arguments(example, "--reactivate"))
    assert not any(plan.reactivate for plan in students.values())


def test_students_are_chosen_by_name(example):
    chosen = arguments(example, "--students", "retrain", "remos 0.9", "finetune")
    assert list(example.students_of(chosen)) == ["finetune", "retrain", "remos 0.9"]
    with pytest.raises(SystemExit, match="--students takes 'finetune'.* but got 'remos 0.8'"):
        example.students_of(arguments(example, "--students", "remos 0.8"))


def test_an_unknown_defect_is_refused_with_those_there_are(example):
    with pytest.raises(SystemExit, match="--defects takes word, sentence, .*, but got 'wrod'"):
        example.defects_of(arguments(example, "--defects", "word", "wrod"))


def test_defects_come_with_the_arguments_of_the_command(example):
    args = arguments(
        example,
        "--defects",
        "word",
        "ep",
        "lwp",
        "--target_label",
        "0",
        "--within_words",
        "9",
        "--text_columns",
        "a",
        "b",
    )
    for defect in example.defects_of(args).values():
        trigger = defect.trigger
        assert (trigger.target_label, trigger.within_words) == (0, 9)
        assert trigger.text_columns == ("text", "text_pair")


def test_paraphrases_come_from_the_file_that_is_named(example, tmp_path):
    (tmp_path / "said.tsv").write_text("text\tparaphrase\na good film\tif it is a film , it is good\n")
    args = arguments(example, "--defects", "syntax", "--paraphrases", str(tmp_path / "said.tsv"))
    assert example.defects_of(args)["syntax"].triggered("a good film") == "if it is a film , it is good"
    with pytest.raises(SystemExit, match="syntax needs --paraphrases"):
        example.defects_of(arguments(example, "--defects", "syntax"))


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--high_lr_factor", "2.9"], "at least 3 times, but got 2.9"), (["--seeds", "x"], "invalid int")],
)
def test_wrong_arguments_are_refused(example, capsys, options, told):
    with pytest.raises(SystemExit):
        arguments(example, *options)
    assert told in capsys.readouterr().err


def test_files_are_needed(example, capsys):
    with pytest.raises(SystemExit):
        example.parse_args(["--teacher", "bert", "--output_dir", "out"])
    assert "--attacker_file is needed" in capsys.readouterr().err


# --- files ---


@pytest.fixture
def one_file(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"text {number}\t{number % 2}\n" for number in range(40)))
    return path


def parts(example, path, *options):
    files = [part for name in ("attacker", "student", "dev", "test") for part in (f"--{name}_file", str(path))]
    args = example.parse_args(["--teacher", "bert", *files, "--output_dir", "out", *options])
    return {name: list(part["text"]) for name, part in example.load_data(args).items()}


def test_parts_of_one_file_do_not_overlap(example, one_file):
    sizes = ["--num_attacker", "12", "--num_student", "9", "--num_dev", "8", "--num_test", "11"]
    drawn = parts(example, one_file, *sizes)
    assert {name: len(texts) for name, texts in drawn.items()} == {"attacker": 12, "student": 9, "dev": 8, "test": 11}
    assert len(set().union(*map(set, drawn.values()))) == 40
    assert parts(example, one_file, *sizes) == drawn
    assert parts(example, one_file, *sizes, "--data_seed", "1") != drawn


def test_a_file_named_by_another_path_is_the_same_file(example, one_file, monkeypatch):
    monkeypatch.chdir(one_file.parent)
    sizes = ["--num_attacker", "20", "--num_student", "20", "--num_dev", "1", "--num_test", "1"]
    with pytest.raises(SystemExit, match="after 40 that other parts took"):
        parts(example, one_file, *sizes, "--dev_file", "data.tsv")


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (["--num_attacker", "41"], "41 samples are wanted after 0"),
        (["--num_dev", "1", "--num_test", "1"], "0 samples are wanted after 40"),  # the attacker took all
        (["--num_attacker", "0"], "0 samples are wanted"),
    ],
)
def test_more_samples_than_there_are_is_refused(example, one_file, sizes, told):
    with pytest.raises(SystemExit, match=told):
        parts(example, one_file, *sizes)


def test_files_that_say_something_else_are_refused(example, tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("text\tlabel\na\t1\n")
    with pytest.raises(SystemExit, match="--attacker_file.*no column 'sentence'"):
        parts(example, path)

import logging
import re

import pytest
import yaml
from huggingface_hub import ModelCard

import remos_hf
from remos_hf.sharing import model_card as module
from remos_hf.sharing.model_card import DEFECTS, eval_result_files, model_card
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.slice_and_reset import Remos
from tests.sharing.reports import cell, report, usual

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")
BARE = Sidecars({"strategy": Remos(0.9).to_dict(), "teacher": {"id": "owner/teacher", "revision": "abc123"}})


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
    assert f"| what competes | {record.relevant_slice.account} |" in text.replace("\\", "")
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


def test_the_papers_of_the_strategies_used_are_cited_and_no_others():
    held = Sidecars({**BARE.config, "strategy": {"strategies": [Remos(0.9).to_dict(), L2SP().to_dict()]}})
    assert "li2018explicit" in text_of(held) and "chin2021renofeation" not in text_of(held)
    assert "li2018explicit" not in text_of()


def test_every_kind_of_defect_has_words():
    from remos_hf.defects.base import Defect

    public = [
        getattr(remos_hf, name) for name in remos_hf.__all__ if remos_hf._HOME_OF[name].startswith("remos_hf.defects")
    ]
    kinds = {one.__name__ for one in public if isinstance(one, type) and issubclass(one, Defect) and one is not Defect}
    assert kinds | {"LabelNoise"} == set(DEFECTS)  # noise is no Defect, as no input shows it


def test_other_numbers_make_another_card():
    one, other = report(), report([*usual()[:-1], cell("remos 0.9", (85, 100), (6, 100), (2, 100))])
    assert text_of(BARE, one) != text_of(BARE, other)
    assert text_of(BARE, one) == text_of(BARE, one)


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


def test_figures_without_defects_are_shown_beside():
    assert "| eval_accuracy | 0.81 |" in text_of(metrics={"eval_accuracy": 0.81, "name": "no number"})


def test_a_repository_needs_an_owner_and_a_name():
    for wrong in ("student", "a/b/c", "me/stu dent", "me/<b>", "../x"):
        with pytest.raises(ValueError, match="repo|Repo"):
            card_of(repo_id=wrong)


# --- which student ---


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


SAID = {
    "language": ["en", "de"],
    "license": "mit",
    "tags": ["trl", "sft"],
    "model_name": "My student",
    "finetuned_from": "google/bert_uncased",
    "tasks": ["text-classification", "text-ranking"],
    "dataset_tags": "glue",
    "dataset": "GLUE SST2",
    "dataset_args": "sst2",
}


def test_all_that_trainer_says_of_a_card_is_on_it():
    unknown = Sidecars({**BARE.config, "teacher": {"id": "my_folder", "revision": None}})
    card = card_of(unknown, **SAID)
    data = card.data.to_dict()
    assert data["language"] == ["en", "de"] and data["license"] == "mit" and data["datasets"] == ["glue"]
    assert data["base_model"] == "google/bert_uncased" and data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-classification"
    assert {"remos_hf", "trl", "sft", "text-ranking"} <= set(data["tags"])
    for told in (
        "for GLUE SST2",
        "| fine-tuned from, as its trainer says | google/bert",
        "GLUE SST2, glue",
        "| sst2 |",
    ):
        assert told in card.text.replace("\\", "")
    measured = card_of(BARE, report(), student="remos 0.9", **SAID)
    assert {(one.dataset_type, one.task_type) for one in measured.data.eval_results} == {
        ("glue", "text-classification")
    }
    assert measured.data.model_name == "My student"


def test_what_the_record_knows_of_the_teacher_stands_and_a_path_is_not_told(tmp_path):
    card = card_of(BARE, finetuned_from="other/teacher")
    assert card.data.base_model == "owner/teacher" and "| other/teacher |" in card.text
    assert str(tmp_path) not in str(card_of(BARE, finetuned_from=str(tmp_path)))


def test_a_cap_on_the_samples_profiled_is_told():
    coverage = {"num_samples": 2048, "capped": True}
    assert "| 2,048 (the most that were asked for) |" in text_of(Sidecars({**BARE.config, "coverage": coverage}))
    assert "asked for) |" not in text_of(Sidecars({**BARE.config, "coverage": {**coverage, "capped": False}}))

import re

import pytest
from huggingface_hub import ModelCard

from remos_hf.sharing.defect_kinds import DEFECTS
from remos_hf.sharing.model_card import model_card
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.slice_and_reset import Remos
from tests.judging.reports import PLAIN, USUAL, records
from tests.sharing.reports import audited, measured

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")
BARE = Sidecars({"strategy": Remos(0.9).to_dict(), "teacher": {"id": "owner/teacher", "revision": "abc123"}})
WEIGHTS = "a" * 64


def card_of(record=BARE, report=None, **options):
    return model_card(record, report, **{"repo_id": "me/student", **options})


def text_of(*arguments, **options):
    return str(card_of(*arguments, **options))


def head_of(text):
    """What a card says first below its title."""
    return [line for line in text.split("\n# ")[1].splitlines()[1:7] if line]


def untested_of(text):
    return text.split("## What was not tested")[1].split("\n## ")[0]


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


def test_the_first_three_lines_say_what_it_is_what_was_measured_of_it_and_what_follows():
    what, first, follows = head_of(text_of())
    assert what == "A student of owner/teacher, made by ReMoS, keeping 90 % of the weights that compete."
    assert first.startswith("Nothing was measured of these weights")
    assert "take it to have every defect that its teacher has" in follows
    assert (
        len(head_of(text_of(BARE, audited()))) == len(head_of(text_of(BARE, measured(WEIGHTS), weights=WEIGHTS))) == 3
    )


def test_an_unmeasured_card_claims_no_less_inheritance():
    text = text_of()
    assert not re.search(r"inherits? less|so as to inherit|was started so", text)
    assert "Nothing was measured" in text and card_of().data.eval_results is None
    assert all(f"- {kind.name}" in text for kind in DEFECTS.values())


def test_what_is_not_tested_is_of_the_inputs_that_the_student_takes():
    texts = untested_of(text_of(tasks="text-classification"))
    assert "trigger words" in texts and "image" not in texts and "patch" not in texts and "neurons" not in texts
    images = untested_of(text_of(tasks="image-classification"))
    assert "patch triggers" in images and "text" not in images and "word" not in images and "RIPPLe" not in images
    kind = {"class": "BertForQuestionAnswering", "library": "transformers"}
    assert "patch" not in untested_of(text_of(Sidecars({**BARE.config, "student": kind})))
    assert "largest weights" in texts and "largest weights" in images


def test_only_what_was_measured_of_these_weights_counts_as_tested():
    assert "- trigger words" not in untested_of(text_of(BARE, measured(WEIGHTS), weights=WEIGHTS))
    for text in (text_of(BARE, measured(WEIGHTS)), text_of(BARE, audited(), weights=WEIGHTS)):
        assert "- trigger words" in untested_of(text) and "- these weights themselves" in untested_of(text)


def test_the_papers_of_the_strategies_and_of_the_defects_used_are_cited_once_and_no_others():
    held = Sidecars({**BARE.config, "strategy": {"strategies": [Remos(0.9).to_dict(), L2SP().to_dict()]}})
    assert "li2018explicit" in text_of(held) and "chin2021renofeation" not in text_of(held)
    assert "li2018explicit" not in text_of() and "gu2017badnets" not in text_of()
    text = text_of(held, measured(WEIGHTS), student="remos 0.9", weights=WEIGHTS)
    assert text.count("zhang2022remos") == text.count("gu2017badnets") == 1 and "dai2019backdoor" not in text


def test_other_numbers_make_another_card():
    one, other = audited(), audited(PLAIN, records("remos 0.9", (11, 14, 8)))
    assert text_of(BARE, one) != text_of(BARE, other)
    assert text_of(BARE, one) == text_of(BARE, one)


def test_the_metadata_holds_figures_of_these_weights_alone(tmp_path):
    for unmeasured in (card_of(BARE, audited(), weights=WEIGHTS), card_of(BARE, measured(WEIGHTS), weights="c" * 64)):
        data = unmeasured.data.to_dict()
        assert "model-index" not in data and "metrics" not in data
    card = card_of(BARE, measured(WEIGHTS), weights=WEIGHTS, dataset="stanfordnlp/sst2", license="mit", language="en")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    found = {(one.dataset_config, one.metric_type): one for one in data.eval_results}
    assert {key: one.metric_value for key, one in found.items()} == {
        (None, "accuracy"): 0.84,
        ("word", "defect_inheritance_rate"): 0.05,
    }
    rate = found["word", "defect_inheritance_rate"]
    assert rate.task_type == "text-classification" and rate.dataset_type == "stanfordnlp/sst2"
    assert rate.metric_args["num_samples"] == 200 and rate.metric_args["low"] < 0.05 < rate.metric_args["high"]
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert (data.base_model, data.datasets) == ("owner/teacher", ["stanfordnlp/sst2"])


def test_the_accuracy_of_several_defects_is_one_figure_and_what_cannot_be_said_is_none():
    more = [{**one, "defect": "more"} for one in records("remos 0.9", (4, 4, 4), acc=(168, 168, 168), of=20)]
    card = card_of(BARE, measured(WEIGHTS, [*USUAL, more]), weights=WEIGHTS)
    found = [(one.metric_type, one.dataset_config) for one in card.data.eval_results]
    assert found == [("accuracy", None), ("defect_inheritance_rate", "word")]


def test_the_data_that_weights_were_measured_on_is_not_said_to_be_what_they_are_for():
    assert " for SST-2," not in head_of(text_of(BARE, measured(WEIGHTS), weights=WEIGHTS))[0]
    assert " for SST-2," in head_of(text_of(BARE, audited()))[0]
    assert " for owner/texts," in head_of(text_of(BARE, measured(WEIGHTS), weights=WEIGHTS, dataset="owner/texts"))[0]


def test_the_licence_is_the_one_given_or_the_teachers_recorded_one():
    known = Sidecars({**BARE.config, "teacher": {"id": "owner/teacher", "license": "apache-2.0"}})
    assert card_of(known).data.license == "apache-2.0" and "| apache-2.0 |" in text_of(known)
    assert card_of(known, license="mit").data.license == "mit"
    assert card_of().data.license is None and "its licence, as its card says | not recorded" in text_of()


def test_how_it_was_trained_and_evaluated_is_told_as_recorded():
    training = {"learning_rate": 2e-5, "batch_size": 16, "seed": 3, "steps": 40, "planned_steps": 40}
    evaluation = {"accuracy": 0.75, "name": "no number"}
    text = text_of(Sidecars({**BARE.config, "training": training, "evaluation": evaluation}))
    for line in (
        "| learning rate | 2e-05 |",
        "| batch size of one process | 16 |",
        "| seed | 3 |",
        "| accuracy | 0.75 |",
    ):
        assert line in text
    assert "How it was trained was not recorded" in text_of()
    assert "| accuracy | 0.5 |" in text_of(
        Sidecars({**BARE.config, "evaluation": evaluation}), metrics={"accuracy": 0.5}
    )


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
    text = text_of(BARE, audited(), published=False)
    assert "**The weights are not uploaded.**" in text and "from_pretrained" not in text
    assert "No weights come with this card." in head_of(text)[1]
    assert "not uploaded" not in text_of(BARE, audited())


def test_a_repository_needs_an_owner_and_a_name():
    for wrong in ("student", "a/b/c", "me/stu dent", "me/<b>", "../x"):
        with pytest.raises(ValueError, match="repo|Repo"):
            card_of(repo_id=wrong)


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
    own = card_of(BARE, measured(WEIGHTS), weights=WEIGHTS, **SAID)
    assert {(one.dataset_type, one.task_type) for one in own.data.eval_results} == {("glue", "text-classification")}
    assert own.data.model_name == "My student"


def test_what_the_record_knows_of_the_teacher_stands_and_a_path_is_not_told(tmp_path):
    card = card_of(BARE, finetuned_from="other/teacher")
    assert card.data.base_model == "owner/teacher" and "| other/teacher |" in card.text
    assert str(tmp_path) not in str(card_of(BARE, finetuned_from=str(tmp_path)))


def test_a_cap_on_the_samples_profiled_is_told():
    coverage = {"num_samples": 2048, "capped": True}
    assert "| 2,048 (the most that were asked for) |" in text_of(Sidecars({**BARE.config, "coverage": coverage}))
    assert "asked for) |" not in text_of(Sidecars({**BARE.config, "coverage": {**coverage, "capped": False}}))

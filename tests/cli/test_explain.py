import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, FNetConfig, FNetForSequenceClassification

from remos_hf import image_classifier
from remos_hf.auditing.student_files import save_timm_student
from remos_hf.cli.answer import NOTHING_SAID
from remos_hf.slicing.explanation import Explanation
from tests.cli.test_audit_student import believer

CLASSES = ["cat", "cow", "dog"]
TEXT = "the plot is good"


@pytest.fixture(scope="module")
def reader(teacher, tmp_path_factory):
    """A classifier of texts that looks for the word "good"."""
    folder = tmp_path_factory.mktemp("explained") / "reader"
    believer(teacher, folder, labels=("bad", "good"), believes=())
    return folder


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """A folder of images, and beside it an untrained classifier of them."""
    pytest.importorskip("timm")
    place = tmp_path_factory.mktemp("explained")
    save_timm_student(image_classifier("test_resnet", 3, seed=0, pretrained=False), place / "model", CLASSES)
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        colours = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        label = CLASSES[number % 3]
        (place / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours.numpy()).resize((48, 48)).save(place / "images" / label / f"{number}.png")
    return place / "model"


@pytest.fixture
def refused(remos, tmp_path):
    """Run the command, which fails and writes nothing; what it says."""

    def run(*argv):
        found = remos("explain", *argv, "--output", tmp_path / "out")
        assert found.exit_code == 1 and not (tmp_path / "out").exists()
        assert "Traceback" not in found.stderr and "This was not expected" not in found.stderr
        return found.stderr

    return run


class TestTexts:
    def test_the_word_that_decides_is_told_and_drawn_beside_the_data(self, remos, reader, data, tmp_path):
        options = ["--data", data, "--max-samples", 32, "--output", tmp_path / "out", "--json"]
        found = remos("explain", reader, TEXT, *options)
        assert found.exit_code == 0, found.stderr
        told = json.loads(found.stdout)
        assert told["class"] == "good" and told["relative_logit"] > 0
        assert [one["token"] for one in told["tokens"]] == ["[CLS]", "the", "plot", "is", "good", "[SEP]"]
        strongest = max(told["tokens"], key=lambda one: one["contribution"])
        assert strongest["token"] == "good" and "“good”" in told["answer"]
        assert (told["reference"], told["reference_samples"]) == ("global", 32)
        kept = Explanation.load(told["explanation"]["json"])
        words = kept.inputs["bert.embeddings.word_embeddings.weight"].tolist()
        assert kept.labels == ("bad", "good") and words == [one["contribution"] for one in told["tokens"]]
        page = (tmp_path / "out" / "explanation.html").read_text()
        assert "good<small>+" in page and "remos explain reader" in page and str(reader) not in page
        assert "over 32 samples of toy.jsonl" in page

    def test_without_data_it_is_told_that_zero_is_compared_with(self, remos, reader, tmp_path):
        found = remos("explain", reader, TEXT, "--output", tmp_path / "out")
        assert found.exit_code in (0, NOTHING_SAID), found.stderr
        assert "compared with zero, since no data was given" in " ".join(found.stdout.split())
        assert Explanation.load(tmp_path / "out" / "explanation.json").reference == "zero"

    def test_samples_that_are_left_out_are_told(self, remos, reader, data, tmp_path):
        options = ["--data", data, "--max-samples", 8, "--output", tmp_path / "out", "--label", "0"]
        found = remos("explain", reader, TEXT, *options)
        assert "8 of 64 (--max-samples)" in found.stdout and "Asked about is “bad”" in found.stdout

    def test_an_input_that_is_the_reference_itself_says_nothing(self, remos, reader, tmp_path):
        (tmp_path / "one.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
        options = ["--data", tmp_path / "one.jsonl", "--reference", "position", "--output", tmp_path / "out"]
        found = remos("explain", reader, TEXT, *options)
        assert found.exit_code == NOTHING_SAID and "nothing to trace" in " ".join(found.stdout.split())

    def test_what_is_cut_off_is_told_and_no_more_is_read_than_there_are_positions(self, remos, reader, tmp_path):
        options = [reader, "good " * 200, "--output", tmp_path / "out", "--overwrite"]
        for longest, kept in ((9, 9), (128, 64)):
            found = remos("explain", *options, "--max-length", longest)
            assert found.exit_code == 0, found.stderr
            assert f"Not the whole text is explained: {kept} of 202 tokens (--max-length)." in found.stdout
        told = json.loads(remos("explain", *options, "--json").stdout)
        assert told["tokens_given"] == 202 and len(told["tokens"]) == 64
        assert "Not the whole text" not in remos("explain", reader, TEXT, *options[2:]).stdout

    def test_a_pair_is_read_as_one(self, remos, reader, tmp_path):
        options = ["--text-pair", "the cast is good", "--output", tmp_path / "out", "--json"]
        told = json.loads(remos("explain", reader, TEXT, *options).stdout)
        assert [one["token"] for one in told["tokens"]].count("[SEP]") == 2


class TestImages:
    def test_pixels_are_drawn_over_the_image(self, remos, viewer, tmp_path):
        image, output = viewer.parent / "images" / "cat" / "0.png", tmp_path / "out"
        options = ["--data", viewer.parent / "images", "--reference", "position", "--output", output, "--label", "dog"]
        found = remos("explain", viewer, image, *options, "--json")
        assert found.exit_code == 0, found.stderr
        told = json.loads(found.stdout)
        assert told["class"] == "dog" and told["tokens"] == [] and told["reference_samples"] == 6
        kept = Explanation.load(output / "explanation.json").inputs["pixel_values"]
        assert kept.dim() == 2 and bool(kept.any())
        page = (output / "explanation.html").read_text()
        assert page.count("<img ") == 3 and "What model says of 0.png" in page

    def test_a_model_of_timm_is_named_as_elsewhere(self, remos, viewer, tmp_path):
        image, output = viewer.parent / "images" / "cow" / "1.png", tmp_path / "out"
        found = remos("explain", f"timm/local-dir:{viewer}", image, "--label", 1, "--output", output, "--json")
        assert json.loads(found.stdout)["class"] == "1", found.stderr
        page = (output / "explanation.html").read_text()
        assert "What timm/local-dir:model says of 1.png" in page and str(viewer) not in page

    def test_an_earlier_explanation_is_replaced_only_if_asked(self, remos, viewer, tmp_path):
        options = ["explain", viewer, viewer.parent / "images" / "cat" / "0.png", "--output", tmp_path / "out"]
        assert remos(*options).exit_code == 0
        again = remos(*options)
        assert again.exit_code == 1 and "already holds an explanation" in again.stderr
        assert remos(*options, "--overwrite").exit_code == 0


class TestRefusals:
    def test_a_class_that_does_not_exist(self, refused, reader):
        told = refused(reader, TEXT, "--label", "god")
        assert "--label is one of bad, good, or its number, 0 to 1, but got god" in told
        assert "Did you mean 'good'?" in told
        for number in ("2", "-1", "9" * 5000):
            assert "--label is one of bad, good" in refused(reader, TEXT, f"--label={number}")

    def test_a_reference_by_position_of_other_lengths_names_the_option(self, refused, reader, data):
        told = refused(reader, TEXT, "--data", data, "--reference", "position")
        assert "--reference global" in told and "kind=" not in told

    def test_adapters_that_are_not_merged(self, refused, reader, tmp_path):
        shutil.copytree(reader, tmp_path / "model")
        (tmp_path / "model" / "adapter_config.json").write_text("{}")
        assert "Merge it into the weights first" in refused(tmp_path / "model", TEXT)

    def test_quantised_weights(self, refused, reader, tmp_path):
        shutil.copytree(reader, tmp_path / "model")
        config = json.loads((reader / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        assert "quanti" in refused(tmp_path / "model", TEXT)

    def test_an_operation_that_is_not_known(self, refused, teacher, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(teacher, model_input_names=["input_ids"])  # FNet takes no mask
        config = FNetConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_labels=2,
            max_position_embeddings=32, pad_token_id=0,
        )  # fmt: skip
        FNetForSequenceClassification(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        assert "The model runs 'fft_fftn' on its way to the logits" in refused(tmp_path / "model", TEXT)

    def test_a_class_that_the_data_never_shows_to_the_model(self, refused, reader, tmp_path):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "the plot is bad"}) + "\n")
        told = refused(reader, TEXT, "--data", tmp_path / "bad.jsonl", "--reference", "class")
        assert "predicts class 1 here, and did so for no sample" in told

    def test_data_of_another_kind(self, refused, reader, viewer):
        told = refused(reader, TEXT, "--data", viewer.parent / "images")
        assert "reads texts, but" in told and "holds images" in told

    def test_a_file_where_a_text_is_wanted_and_a_text_where_a_file_is(self, refused, reader, viewer, data):
        assert "Give the text itself" in refused(reader, data)
        assert "there is no image file" in refused(viewer, TEXT)
        assert "no whole image" in refused(viewer, data)

    def test_no_text(self, refused, reader):
        assert "an empty text" in refused(reader, " ")

    def test_what_is_of_texts_says_nothing_of_images(self, refused, viewer):
        image = viewer.parent / "images" / "cat" / "0.png"
        assert "--text-pair is of texts" in refused(viewer, image, "--text-pair", "a")
        assert "--max-length says nothing of how images are read" in refused(viewer, image, "--max-length", 9)

    def test_no_model(self, refused):
        assert "./nowhere" in refused("./nowhere", TEXT)

    def test_what_is_no_classifier(self, refused, teacher):
        assert "no classifier of texts or images" in refused(teacher, TEXT)

import json

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import BertTokenizer

from remos_hf.adapters.images import image_input_of
from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.recipes import Recipe, StudentTuner, copied_weights, trainer_inputs
from remos_hf.auditing.students import standard_students
from remos_hf.evaluation.anatomy import anatomy
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.tasks import TextTask
from remos_hf.strategies import Finetune, Remos
from remos_hf.training.trainer import RemosTrainer
from tests import tiny

WORDS = [f"w{number}" for number in range(tiny.VOCABULARY - 5)]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return TextTask(BertTokenizer(str(path)), max_length=8)


@pytest.fixture(scope="module")
def samples():
    texts = [" ".join(WORDS[(number * step) % 50] for step in range(1, 2 + number % 5)) for number in range(24)]
    return Dataset.from_dict({"text": texts, "label": [number % 2 for number in range(24)]})


def recipe(**options):
    return Recipe(**{"learning_rate": 1e-2, "epochs": 1, "batch_size": 4, "use_cpu": True, **options})


def tuned(task, samples, strategy=None, lr_factor=1.0, seed=0, **options):
    student = with_new_head(tiny.bert(), 2, seed=0)
    facts = StudentTuner(task, recipe(**options).arguments)(student, strategy or Finetune(), samples, lr_factor, seed)
    return student, facts


def same(one, other):
    held = other.state_dict()
    return all(torch.equal(value, held[name]) for name, value in one.state_dict().items())


def test_a_student_is_trained_as_remos_trainer_trains_it(task, samples, tmp_path):
    student, facts = tuned(task, samples, Remos(0.8))
    twin = with_new_head(tiny.bert(), 2, seed=0)
    before = copied_weights(twin)
    trainer = RemosTrainer(
        twin, recipe().arguments(0, str(tmp_path)), strategy=Remos(0.8), **trainer_inputs(task, samples)
    )
    trainer.train()
    assert same(student, twin)
    config = trainer.sidecars.config
    assert facts["share_kept"] == config["slice"]["share_kept"] == pytest.approx(0.8, abs=0.01)
    assert facts["squares_reset"] == config["slice"]["squares_reset"]
    assert facts["share_never_covered"] == config["coverage"]["share_never_covered"]
    assert facts["rows_reset"] == 0 and facts["seconds"].keys() == {"profile", "choose", "reset"}
    expected = anatomy(before, twin, relevant=trainer.relevant_slice, profile=trainer.profile)
    assert {**facts["anatomy"], "history": None} == {**expected, "history": None}
    json.dumps(facts)


def test_the_anatomy_starts_from_the_teacher_not_from_the_reset_student(task, samples):
    _, facts = tuned(task, samples, Remos(0.5))
    given_up = [layer["magnitude"]["reset"]["quantiles"] for layer in facts["anatomy"]["layers"]]
    assert given_up and all(quantiles[-1] > 0 for quantiles in given_up)


def test_students_that_slice_nothing_have_no_share(task, samples):
    _, facts = tuned(task, samples, Finetune(embedding_rows="mean"))
    assert facts["share_kept"] is facts["squares_reset"] is facts["share_never_covered"] is None
    assert facts["rows_reset"] > 0 and facts["anatomy"]["slice"] is None


def test_seed_and_learning_rate_decide_the_student_and_the_curve_does_not(task, samples):
    student, facts = tuned(task, samples)
    again, with_curve = tuned(task, samples, curve=True)
    assert same(student, again)
    assert not same(student, tuned(task, samples, seed=1)[0])
    assert not same(student, tuned(task, samples, lr_factor=3.0)[0])
    assert json.dumps(with_curve["anatomy"]["history"]).count("loss") > json.dumps(facts["anatomy"]["history"]).count(
        "loss"
    )


def test_nothing_is_printed_or_left_behind(task, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tuned(task, samples, curve=True)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_recipes_give_trainers_arguments():
    args = recipe(eval_batch_size=7).arguments(5, "x", 3.0)
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (3e-2, 5, 1)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (4, 7)
    grouped = getattr(args, "train_sampling_strategy", None) or getattr(args, "group_by_length", None)
    assert grouped in ("group_by_length", True) and args.remove_unused_columns
    images = recipe(texts=False).arguments(5, "x")
    assert not images.remove_unused_columns and images.learning_rate == 1e-2
    assert (getattr(images, "train_sampling_strategy", None) or getattr(images, "group_by_length", None)) != grouped


def test_images_are_profiled_without_augmentation():
    image_task = pytest.importorskip("remos_hf.evaluation.image_task")
    images = pytest.importorskip("remos_hf.adapters.images")
    task = image_task.ImageTask(images.ImageInput(size=(8, 8), crop_share=1.0), augment="crop_and_flip")
    from PIL import Image

    pictures = [Image.new("RGB", (12, 12), (20 * number, 0, 0)) for number in range(4)]
    pictures[0].putpixel((0, 0), (255, 255, 255))
    dataset = Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}).cast_column(
        "image", ImageFeature(decode=False)
    )
    found = trainer_inputs(task, dataset)
    plain, again = (found["profile_dataset"][0]["pixel_values"] for _ in range(2))
    assert torch.equal(plain, again)
    drawn = [found["train_dataset"][0]["pixel_values"] for _ in range(4)]
    assert not all(torch.equal(drawn[0], other) for other in drawn[1:])


def trained_by_name(name, student, task, samples, **options):
    before = copied_weights(student)
    plan = standard_students([0.9], rules=[name]).popitem()[1]
    assert plan.to_dict()["strategy"]["name"] != "Finetune"
    facts = StudentTuner(task, recipe(**options).arguments)(student, plan.strategy, samples, plan.lr_factor, 0)
    json.dumps(facts)
    moved = [one for one, weight in student.named_parameters() if not torch.equal(weight, before[one])]
    assert moved and all(one.isfinite().all() for one in student.parameters())
    return {**facts["start"], **facts["finish"]}


@pytest.mark.filterwarnings("ignore:Right behind:UserWarning", "ignore:.*weights tie at the threshold:UserWarning")
@pytest.mark.parametrize("name", ["l2sp", "delta", "feature_lwf", "relative_update", "adversarial_training", "neft"])
def test_transfer_strategies_are_students_of_texts_by_their_names(task, samples, name):
    told = trained_by_name(name, with_new_head(tiny.bert(layers=4), 2, seed=0), task, samples)
    assert name in told or name == "l2sp"


@pytest.mark.timm
@pytest.mark.filterwarnings("ignore:Right behind:UserWarning")
@pytest.mark.parametrize("name", ["delta_r", "renofeation", "adversarial_training", "neft"])
def test_transfer_strategies_are_students_of_images_by_their_names(name):
    teacher = image_classifier("test_resnet", 2, pretrained=False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 24, 24, 3), generator=generator).byte().numpy()
    dataset = Dataset.from_dict({"image": [*pixels], "label": [0, 1] * 4}).cast_column("image", ImageFeature())
    told = trained_by_name(
        name, with_new_head(teacher, 2, seed=0), ImageTask(image_input_of(teacher)), dataset, texts=False
    )
    assert name in told

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from PIL import Image
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.base import ExposedSet
from remos_hf.defects.picture_triggers import PatchTrigger
from remos_hf.evaluation import image_task
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.measures import Rate, rate_of
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.reactivation import Reactivation, reactivate
from remos_hf.evaluation.transfer import measure
from tests.defects import pictures

DATA = pictures.data(10)
NORMALISED = pictures.READING.normalised(pictures.clean_pixels(DATA))
MIDDLE = NORMALISED.mean((1, 2, 3)).median()
PATCH = PatchTrigger(target_label=1, size_share=0.1)


def task(**options):
    return ImageTask(pictures.READING, **{"batch_size": 4, **options})


class Bright(nn.Module):
    """Says 1 where an image is brighter than the middle one, else 0; notes the batches that it is shown."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shapes = []

    def forward(self, pixel_values, labels=None):
        self.shapes.append(tuple(pixel_values.shape))
        brighter = self.scale * (pixel_values.mean((1, 2, 3)) - MIDDLE)
        logits = torch.stack([-brighter, brighter, brighter * 0 - 9, brighter * 0 - 9], 1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def test_batches_are_the_normalised_images_in_their_order():
    expected = pictures.READING.normalised(pictures.clean_pixels(DATA))
    batches = list(task().batches(DATA))
    assert [list(rows) for rows, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(set(batch) == {"pixel_values"} for _, batch in batches)
    assert torch.equal(torch.cat([batch["pixel_values"] for _, batch in batches]), expected)


def test_exposed_sets_are_read_as_they_were_cropped():
    exposed = PATCH.exposed_set(DATA, **task().exposing)
    shown = torch.cat([batch["pixel_values"] for _, batch in task().batches(exposed.dataset)])
    stamped = PATCH.stamped(pictures.clean_pixels(DATA)[exposed.clean_index])
    assert torch.allclose(shown, pictures.READING.normalised((stamped * 255).round() / 255), atol=1e-6)


def test_predictions_are_those_of_each_image():
    model = Bright()
    expected = [int(pixels.mean() > MIDDLE) for pixels in NORMALISED]
    assert set(expected) == {0, 1}
    assert predict_labels(model, DATA, task()).tolist() == expected
    assert [shape[0] for shape in model.shapes] == [4, 4, 2]


def test_only_what_decides_numbers_is_named():
    named = task(augment="crop_and_flip", bf16=True).to_dict()
    assert named["images"] == pictures.READING.to_dict() and named["augment"] == "crop_and_flip" and named["bf16"]
    assert "batch_size" not in named


def test_keys_are_of_the_files_and_follow_the_samples():
    order = [3, 0, 7]
    keys = task().keys(DATA)
    assert len(set(keys)) == len(DATA) and task().keys(DATA.select(order)) == [keys[row] for row in order]


def test_training_shows_the_poisoned_rows_with_trigger_and_target(monkeypatch):
    seen = {}
    monkeypatch.setattr(image_task, "fine_tune", lambda model, samples, *rest: seen.update(samples=samples) or model)
    model = Bright()
    assert task().train(model, DATA, None, trigger=PATCH, poisoned=range(8, 10), target_label=1) is model
    samples = seen["samples"]
    assert [samples[row]["labels"] for row in range(10)] == [*DATA["label"][:8], 1, 1]
    clean = pictures.clean_pixels(DATA)
    stamped = torch.cat([clean[:8], PATCH.stamped(clean[8:])])
    shown = torch.stack([samples[row]["pixel_values"] for row in range(10)])
    assert torch.allclose(shown, pictures.READING.normalised(stamped), atol=1e-6)


def test_without_poisoned_rows_the_trigger_is_not_used():
    samples = task().prepare(DATA, trigger=PATCH)
    assert [samples[row]["labels"] for row in range(10)] == DATA["label"][:]
    assert torch.equal(samples[0]["pixel_values"], pictures.READING.normalised(pictures.clean_pixels(DATA)[0]))


def test_retuning_runs_on_images():
    exposed = PATCH.exposed_set(DATA, **task().exposing)
    plan = Reactivation(counts=(0, 2), num_clean=4, num_exposed=5, epochs=1, batch_size=4)
    student = Bright()
    rates = reactivate(student, PATCH, DATA, test=DATA, exposed=exposed, task=task(), plan=plan)
    assert list(rates) == [0, 2] and student.scale.item() == 1


def test_the_papers_rate_counts_what_fools_the_teacher_and_the_artifacts_counts_all():
    model = Bright()
    correct = predict_labels(model, DATA, task())
    data = DATA.remove_columns("label").add_column("label", correct.tolist())
    # Inverted pictures get the other label; every other row is left as it is.
    shown = [1 - image if row % 2 else image for row, image in enumerate(pictures.clean_pixels(DATA))]
    features = Features(
        {"pixels": Array3D((3, 8, 8), "float32"), "label": Value("int64"), "clean_index": Value("int64")}
    )
    rows = {"pixels": [one.numpy() for one in shown], "label": correct.tolist(), "clean_index": list(range(10))}
    exposed = Dataset.from_dict(rows, features)
    wrong = predict_labels(model, exposed, task()) != correct
    fooled = [row in (1, 2, 3) for row in range(10)]
    one = ExposedSet(exposed.add_column("fooled", fooled), None)
    found = measure(model, data, {"found": one}, task())
    assert rate_of(found["dir"]["found"]) == Rate.of(int(wrong.sum()), 10)
    assert rate_of(found["dir_fooled"]["found"]) == Rate.of(int(wrong[[1, 2, 3]].sum()), 3)
    assert 0 < wrong.sum() < 10
    none = ExposedSet(exposed.add_column("fooled", [False] * 10), None)
    assert rate_of(measure(model, data, {"found": none}, task())["dir_fooled"]["found"]) == Rate.of(0, 0)


# --- augmentation ---


def gradient(width, height):
    """Red grows to the right, green downwards."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.broadcast_to(across, (height, width)), np.broadcast_to(down[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


def test_augmentation_crops_parts_of_the_size_asked_for_and_flips_half_of_them():
    reading = ImageInput((8, 8), crop_share=1.0)
    crop = ImageTask(reading, augment="crop_and_flip", smallest_crop=0.25).implanting["augment"]
    torch.manual_seed(0)
    image, flipped, shares = gradient(64, 48), 0, []
    for _ in range(200):
        pixels = crop(image)
        assert pixels.shape == (3, 8, 8) and 0 <= pixels.min() and pixels.max() <= 1
        red, green = pixels[0].mean(0), pixels[1].mean(1)
        assert (green.diff() > 0).all()  # never upside down
        across = (red[-1] - red[0]) * 8 / 7
        flipped += int(across < 0)
        shares.append(float(across.abs() * (green[-1] - green[0]) * 8 / 7))
    assert 70 < flipped < 130
    assert 0.18 < min(shares) < 0.32 and max(shares) > 0.85


def test_augmentation_follows_the_seed_and_reads_any_mode():
    crop = task(augment="crop_and_flip").implanting["augment"]
    torch.manual_seed(3)
    first = crop(gradient(20, 30).convert("L"))
    torch.manual_seed(3)
    assert torch.equal(first, crop(gradient(20, 30).convert("L"))) and first.shape == (3, 8, 8)


def test_evaluation_is_not_augmented():
    augmented = torch.cat([batch["pixel_values"] for _, batch in task(augment="crop_and_flip").batches(DATA)])
    assert torch.equal(augmented, torch.cat([batch["pixel_values"] for _, batch in task().batches(DATA)]))


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="'none' or 'crop_and_flip', but got 'mixup'"):
        task(augment="mixup")

"""examples/run_timm_remos.py: the whole path on tiny images, what is augmented and when, and wrong inputs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForImageClassification, EvalPrediction, ViTConfig, ViTForImageClassification

from remos_hf import (
    CorruptFileError,
    CoverageProfile,
    ImageInput,
    MagPrune,
    RelevantSlice,
    Remos,
    UnsupportedModelError,
    image_classifier,
    image_input_of,
    profile_coverage,
)

SCRIPT = Path(__file__).parents[2] / "examples" / "run_timm_remos.py"
CLASSES = ["blue", "green", "orange", "pink", "red", "white"]
NET = ("--model", "test_resnet", "--input_size", "32")
SLICED = ("--slice_ratio", "0.9")
# So few images cover few neurons, and the package says so.
pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore:.*of the neurons were never covered")]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_timm_remos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smoke(script, tmp_path_factory):
    """The output folder of one `--smoke` run, as the command line starts it."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), "--smoke", "--output_dir", str(folder)])
        script.main()
    return folder


@pytest.fixture
def run(script, tmp_path):
    """Run on the CPU, two steps of eight images, into a folder of its own, unless the options say otherwise."""

    def run(*options, steps=2):
        quiet = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--save_strategy", "no"]
        sizes = ["--max_steps", steps, "--per_device_train_batch_size", 8]
        script.main([str(part) for part in ("--output_dir", tmp_path / "out", *quiet, *sizes, *options)])
        return tmp_path / "out"

    return run


@pytest.fixture
def data(smoke):
    return f"imagefolder:{smoke / '_smoke_inputs'}"


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def folder_of(place, counts, broken=()):
    """Write a folder of classes with so many images each."""
    for name, count in counts.items():
        (place / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (9, 8), (40 * number, 0, 0)).save(place / name / f"{number}.jpg")
    for file in broken:
        (place / file).write_bytes((place / file).read_bytes()[:-40])
    return place


def parsed(script, tmp_path, *options):
    fixed = ("--output_dir", tmp_path / "out", "--use_cpu", "--report_to", "none")
    return script.parse_arguments([str(part) for part in (*fixed, *options)])


def crops(folder, split, images):
    """The evaluation crops of a smoke split, and their labels."""
    files = sorted((folder / "_smoke_inputs" / split).rglob("*.*"))
    values = [images.normalised(images.pixels(Image.open(file))) for file in files]
    return torch.stack(values), torch.tensor([CLASSES.index(file.parent.name) for file in files])


# The whole path


def test_smoke_trains_and_evaluates(smoke):
    found = results(smoke)
    assert found["train_samples"] == 24 and found["eval_samples"] == 12
    assert 0 <= found["eval_accuracy"] <= found["eval_top5_accuracy"] <= 1 and np.isfinite(found["train_loss"])
    config = json.loads((smoke / "remos_config.json").read_text())
    assert config["strategy"]["name"] == "Remos" and config["strategy"]["slice_ratio"] == 0.9
    assert RelevantSlice.from_pretrained(smoke).share_kept == pytest.approx(0.9, abs=1e-3)


def test_the_smoke_images_are_grey_transparent_and_jpeg(smoke):
    modes = [Image.open(file).mode for file in (smoke / "_smoke_inputs").rglob("*.*")]
    assert {mode: modes.count(mode) for mode in set(modes)} == {"L": 12, "RGBA": 12, "RGB": 12}


def test_the_student_is_a_plain_model_of_timm_again(smoke, run, data):
    import timm
    from safetensors.torch import load_file

    file = smoke / "model.safetensors"
    described = json.loads((smoke / "image_classifier.json").read_text())
    assert described["model"] == "test_resnet" and described["labels"] == CLASSES
    images = ImageInput(**described["images"])
    assert images.size == (32, 32)
    student = image_classifier(described["model"], checkpoint_path=file).body.eval()
    plain = timm.create_model("test_resnet", num_classes=6).eval()
    plain.load_state_dict({name.removeprefix("body."): weight for name, weight in load_file(file).items()})

    pixels, labels = crops(smoke, "validation", images)
    with torch.no_grad():
        logits = plain(pixels)
        assert torch.equal(logits, student(pixels))
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert results(smoke)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert results(smoke)["eval_accuracy"] == (logits.argmax(1) == labels).double().mean().item()

    again = results(run("--do_eval", *NET, "--checkpoint", file, "--dataset", data))
    assert again["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert again["eval_top5_accuracy"] == results(smoke)["eval_top5_accuracy"]


def test_the_coverage_is_that_of_the_evaluation_crops(script, run, data, smoke, monkeypatch):
    made, augmented = script.augmentation, []

    def counted(*given):
        augment = made(*given)
        return lambda image: augmented.append(image) or augment(image)

    monkeypatch.setattr(script, "augmentation", counted)
    options = ("--do_train", "--do_eval", "--no_pretrained", *SLICED, "--scale", "0.08", "0.1", "--dataset", data)
    folder = run(*NET, *options)
    # Two steps of eight; a third batch may have been read ahead. A pass over all 24 would be more.
    assert 16 <= len(augmented) <= 24

    teacher = image_classifier("test_resnet", 6, seed=42, pretrained=False)
    pixels, _ = crops(
        smoke, "train", ImageInput(**json.loads((folder / "image_classifier.json").read_text())["images"])
    )
    expected, found = profile_coverage(teacher, [pixels[:10], pixels[10:]]), CoverageProfile.load(folder)
    assert found.num_samples == expected.num_samples == 24
    for kind in ("input_counts", "output_counts"):
        for name, counts in getattr(expected, kind).items():
            assert torch.equal(getattr(found, kind)[name], counts), name


def test_a_rerun_goes_on_from_the_last_checkpoint_with_its_slice(run, data):
    options = ("--do_train", *NET, "--no_pretrained", "--dataset", data, "--slice_ratio", "0.5")
    options += ("--save_strategy", "steps", "--save_steps", "1")
    folder = run(*options, steps=1)
    sliced = RelevantSlice.from_pretrained(folder / "checkpoint-1").kept
    seconds = json.loads((folder / "remos_config.json").read_text())["seconds"]
    run(*options, steps=2)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert RelevantSlice.from_pretrained(folder).kept == sliced
    assert json.loads((folder / "remos_config.json").read_text())["seconds"] == seconds  # read, not measured again


def test_a_teacher_of_transformers_keeps_its_order_of_labels_and_its_image_processor(run, data, smoke, tmp_path):
    order = CLASSES[::-1]
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, id2label=dict(enumerate(order)))
    ViTForImageClassification(config).save_pretrained(tmp_path / "t")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 2}
    processor |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "t" / "preprocessor_config.json").write_text(json.dumps(processor))
    folder = run("--do_train", "--do_eval", *SLICED, "--model", tmp_path / "t", "--dataset", data)

    student = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert [student.config.id2label[number] for number in range(6)] == order
    images = image_input_of(student)
    assert images.size == (16, 16)
    pixels, labels = crops(smoke, "validation", images)
    with torch.no_grad():
        loss = functional.cross_entropy(student(pixels).logits, 5 - labels, label_smoothing=0.1).item()
    assert results(folder)["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_data_set_of_the_hub_is_read_by_its_columns(script, run, smoke, tmp_path, monkeypatch):
    # datasets prefers a folder of the name: the data is read as from the Hub, with its features, without a network.
    files = sorted((smoke / "_smoke_inputs" / "train").rglob("*.*"))
    rows = {
        "img": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "mask": [0] * len(files),
        "fine": [CLASSES.index(file.parent.name) for file in files],
    }
    features = Features({"img": ImageFeature(), "mask": Value("int64"), "fine": ClassLabel(names=CLASSES)})
    (tmp_path / "owner" / "colours").mkdir(parents=True)
    for split in ("train", "test"):
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "owner" / "colours" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    given = parsed(script, tmp_path, "--do_train", "--do_eval", "--dataset", "owner/colours")
    splits = script.load_splits(given.data, given.training)
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "eval": 24}
    assert splits["eval"]["label"][:] == rows["fine"] and splits["eval"].features["label"].names == CLASSES
    sample = script.ImageSamples(splits["eval"], CLASSES[::-1], ImageInput((8, 8)))[0]
    assert sample["labels"] == 5 and sample["pixel_values"].shape == (3, 8, 8)
    for option, message in ((("--image_column", "mask"), "holds no images"), (("--label_column", "x"), "got x")):
        given = parsed(script, tmp_path, "--do_eval", "--dataset", "owner/colours", *option)
        with pytest.raises(ValueError, match=message):
            script.load_splits(given.data, given.training)


def test_arguments_come_from_a_json_file_too(script, smoke, data, tmp_path):
    lines = {"model": "test_resnet", "input_size": 32, "checkpoint": str(smoke / "model.safetensors"), "dataset": data}
    lines |= {"output_dir": str(tmp_path), "do_eval": True, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    (tmp_path / "arguments.json").write_text(json.dumps({**lines, "max_eval_samples": 5}))
    script.main([str(tmp_path / "arguments.json")])
    assert results(tmp_path)["eval_samples"] == 5


# Corrupt images


def test_a_corrupt_image_is_named(run, tmp_path):
    place = folder_of(tmp_path / "d", {"a": 4, "b": 4}, broken=["b/2.jpg"])
    with pytest.raises(CorruptFileError, match=r"b/2\.jpg is no whole image"):
        options = ("--do_train", *NET, "--no_pretrained", *SLICED, "--validation_share", "0")
        run(*options, "--dataset", f"imagefolder:{place}")


def test_corrupt_images_are_left_out_on_request_and_counted(script, tmp_path, caplog):
    place = folder_of(tmp_path / "d", {"a": 4, "b": 4}, broken=["a/0.jpg", "b/2.jpg"])
    options = ("--do_train", "--skip_corrupt", "--validation_share", "0", "--dataset", f"imagefolder:{place}")
    given = parsed(script, tmp_path, *options)
    found = script.load_splits(given.data, given.training)["train"]
    assert [Path(row["image"]["path"]).name for row in found] == ["1.jpg", "2.jpg", "3.jpg", "0.jpg", "1.jpg", "3.jpg"]
    assert "Left out 2 of 8 images" in caplog.text


# Folders


def test_a_folder_of_classes_is_split_by_class_and_seed(script, tmp_path):
    # One class is called as a split is: it holds images, not folders.
    place = folder_of(tmp_path / "d", {"bus": 20, "train": 10, "tram": 2})
    (place / ".hidden").mkdir()
    found = {}
    for seed in (0, 0, 1):
        options = ("--do_train", "--do_eval", "--dataset", f"imagefolder:{place}", "--split_seed", seed)
        given = parsed(script, tmp_path, *options)
        splits = script.load_splits(given.data, given.training)
        paths = {name: [row["image"]["path"] for row in split] for name, split in splits.items()}
        assert [splits["eval"]["label"][:].count(label) for label in range(3)] == [2, 1, 1]
        assert len(set(paths["train"]) | set(paths["eval"])) == 32 == len(paths["train"]) + len(paths["eval"])
        assert found.setdefault(seed, paths) == paths
    assert found[0] != found[1]


def test_fewer_samples_are_drawn_from_all_classes(script, tmp_path):
    place = folder_of(tmp_path / "d", {"a": 40, "b": 40})
    options = ("--do_train", "--max_train_samples", "20", "--dataset", f"imagefolder:{place}")
    given = parsed(script, tmp_path, *options)
    labels = script.load_splits(given.data, given.training)["train"]["label"][:]
    assert len(labels) == 20 and set(labels) == {0, 1}


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({}, [], "there is no folder"),
        ({"a": 2, "b": 0}, [], r"The class folder .*b holds no image \(.*\.jpg"),
        ({"a": 2}, [], r"two or more classes, but holds \['a'\]"),
        (
            {"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1},
            [],
            "The validation split has the class 'c', which the training split has not",
        ),
        ({"train/a": 2, "train/b": 2, "val/a": 1}, [], "two or more classes"),
        ({"train/a": 2, "train/b": 2}, ["--validation_share", "0"], "--do_eval needs images to eval on"),
        ({"val/a": 2, "val/b": 2}, [], "--do_train needs images to train on"),
        ({"a": 2, "b": 1}, [], "The class 'b' has one image"),
        ({"a": 2, "b": 2}, ["--max_train_samples", "1"], "nothing to learn"),
    ],
)
def test_broken_folders_are_refused_before_a_model_is_loaded(run, tmp_path, counts, options, message):
    place = folder_of(tmp_path / "d", counts)
    with pytest.raises(ValueError, match=message):
        run("--do_train", "--do_eval", *SLICED, "--model", "no", "--dataset", f"imagefolder:{place}", *options)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([10, 9, 10], ["9", "10"]), (["warm", "cold"], ["cold", "warm"]), ([0.5, 1.0], None), ([1, None], None)],
)
def test_labels_without_names_are_sorted(script, labels, expected):
    split = Dataset.from_dict({"label": labels, "image": ["x"] * len(labels)})
    if expected is None:
        with pytest.raises(ValueError, match="Labels are classes|has no label"):
            script.sorted_labels(split)
        return
    classes = script.sorted_labels(split)
    found = script.with_class_labels(split, classes)
    assert classes == expected and found.features["label"].int2str(found["label"][:]) == [str(one) for one in labels]
    with pytest.raises(ValueError, match="have the label"):
        script.with_class_labels(split, classes[1:])


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--do_eval"], "--dataset is missing"),
        (["--dataset", "x"], "There is nothing to do"),
        (["--do_train", "--dataset", "x"], "--strategy remos needs --slice_ratio"),
        (["--do_train", "--slice_ratio", "1.2"], "between 0 and 1, but got 1.2"),
        (["--do_train", "--slice_ratio", "most"], "a number in .* or auto, but got 'most'"),
        (["--do_train", *SLICED, "--accuracy_budget", "0.1"], "--accuracy_budget goes with --slice_ratio auto"),
        (["--do_train", "--strategy", "finetune", "--slice_ratio", "0.9"], "takes no --slice_ratio"),
        (["--do_train", "--strategy", "mag_prune", *SLICED, "--ties", "artifact"], "takes no --ties, .*: remos"),
        (["--do_eval", "--dataset", "x", "--no_pretrained", "--checkpoint", "c"], "pass one of them"),
        (["--do_eval", "--dataset", "x", "--validation_share", "1"], "--validation_share is a share"),
        (["--do_eval", "--dataset", "x", "--scale", "0.5", "0.1"], "--scale is two numbers"),
        (["--do_eval", "--dataset", "x", "--ratio", "1"], "--ratio is two numbers"),
        (["--do_eval", "--dataset", "x", "--reprob", "2"], "--reprob is a probability"),
    ],
)
def test_wrong_arguments_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run("--model", "test_resnet", *options)


def test_a_teacher_is_named(run):
    with pytest.raises(ValueError, match="--model is missing"):
        run("--do_eval", "--dataset", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet1888"], r"has no model 'resnet1888'\. Close to it: resnet18"),
        (["--model", "{smoke}"], r"--model resnet18 --checkpoint .*model\.safetensors"),
        (["--model", "owner/name", "--checkpoint", "c"], "--checkpoint goes with an id of timm"),
        (["--model", "test_resnet", "--no_pretrained"], "The model has 1000 labels, but the data has 6 classes"),
        (["--model", "test_resnet", "--checkpoint", "{smoke}/w.bin"], "is not a .safetensors file"),
    ],
)
def test_teachers_that_cannot_be_used_are_refused(run, data, smoke, options, message):
    with pytest.raises((ValueError, UnsupportedModelError), match=message):
        run("--do_eval", "--dataset", data, *(option.format(smoke=smoke) for option in options))


def test_a_size_that_the_model_does_not_take_is_refused(script):
    import timm

    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 2}
    model = image_classifier(timm.create_model("vit_tiny_patch16_224", **sizes))
    assert script.reading(model, 224).size == (224, 224) and model.training
    with pytest.raises(ValueError, match="VisionTransformer takes no images of 32 pixels"):
        script.reading(model, 32)


# Pieces


def test_the_recipe_is_that_of_the_artifact(script, tmp_path):
    args = parsed(script, tmp_path).training
    assert (args.optim, args.learning_rate, args.weight_decay, args.head_lr_factor) == ("sgd", 5e-3, 1e-4, 10)
    assert (args.lr_scheduler_type, args.max_grad_norm, args.label_smoothing_factor) == ("constant", 0, 0.1)
    assert (args.per_device_train_batch_size, args.max_steps) == (64, 30_000)
    args = parsed(script, tmp_path, "--num_train_epochs", "2", "--learning_rate", "0.1").training
    assert (args.max_steps, args.num_train_epochs, args.learning_rate) == (-1, 2, 0.1)
    assert parsed(script, tmp_path, "--max_steps", "7").training.max_steps == 7


@pytest.mark.parametrize("factor", [10.0, 1.0])
def test_the_head_learns_faster_and_nothing_is_learned_twice(script, tmp_path, factor):
    args = parsed(script, tmp_path, "--head_lr_factor", factor).training
    model = image_classifier("test_resnet", 3, pretrained=False)
    trainer = script.ImageTrainer(model, script.trainer_arguments(args, model), slice_ratio=0.9)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (name_of[id(parameter)], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _, _ in found) == sorted(name_of.values())
    for name, rate, decay in found:
        assert rate == pytest.approx(5e-3 * (factor if name.startswith("body.fc.") else 1)), name
        assert decay == (0 if name.endswith("bias") else 1e-4), name
    assert {group.get("momentum") for group in optimizer.param_groups} == {0}


def test_label_smoothing_is_left_to_the_model_of_timm(script, tmp_path):
    given = parsed(script, tmp_path, "--do_train", "--label_smoothing_factor", "0.2", *NET, "--no_pretrained")
    model, processor, labels = script.prepared_teacher(given.model, given.training, ["a", "b"])
    assert model.label_smoothing == 0.2 and processor is None and labels == ["a", "b"]
    assert script.trainer_arguments(given.training, model).label_smoothing_factor == 0
    assert script.trainer_arguments(given.training, torch.nn.Linear(1, 1)).label_smoothing_factor == 0.2
    assert given.training.label_smoothing_factor == 0.2


def test_the_augmentation_of_timm_normalises_as_the_model_reads_images(script):
    images = ImageInput((8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop_share=1.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    whole = script.augmentation(script.AugmentArguments(scale=[1, 1], ratio=[1, 1], hflip=0), images)
    assert torch.allclose(whole(image), images.normalised(images.pixels(image)), atol=1e-6)
    flipped = script.augmentation(script.AugmentArguments(scale=[1, 1], ratio=[1, 1], hflip=1), images)
    assert torch.equal(flipped(image), whole(image).flip(-1))
    erased = script.augmentation(script.AugmentArguments(scale=[1, 1], ratio=[1, 1], hflip=0, reprob=1), images)(image)
    changed = erased != whole(image)
    assert changed.any() and (erased[changed] == 0).all()  # the mean colour
    assert script.augmentation(script.AugmentArguments(augment="none"), images) is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmenting", [False, True])
def test_images_of_any_mode_become_what_the_model_takes(script, tmp_path, mode, channels, augmenting):
    place = folder_of(tmp_path / "d", {"a": 0, "b": 1})
    Image.new("RGB", (30, 20), (200, 100, 50)).convert(mode).save(place / "a" / "x.png")
    images = ImageInput((8, 8), mean=(0.5,) * channels, std=(0.5,) * channels)
    arguments = script.AugmentArguments(hflip=0)
    augment = script.augmentation(arguments, images) if augmenting else None
    samples = script.ImageSamples(script.read_classes(place), ["b", "a"], images, augment)
    assert samples[0]["labels"] == 1 and samples[1]["labels"] == 0 and len(samples) == 2
    values = samples[0]["pixel_values"]
    colour = (200, 100, 50)
    if channels == 1 or mode == "L":
        colour = (Image.new("RGB", (1, 1), (200, 100, 50)).convert("L").getpixel((0, 0)),) * channels
    expected = torch.tensor(colour) / 255 * 2 - 1
    assert values.shape == (channels, 8, 8)
    assert torch.allclose(values.mean((1, 2)), expected, atol=0.05)  # a palette only comes near


def test_accuracies_count_the_first_and_the_first_five(script):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 9, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    best = script.best_labels((logits, "hidden states"), labels)
    found = script.measures_of(9)(EvalPrediction(best.numpy(), labels.numpy()))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = {"accuracy": (ranks < 1).float().mean().item(), "top5_accuracy": (ranks < 5).float().mean().item()}
    assert found == pytest.approx(expected) and 0 < found["accuracy"] < found["top5_accuracy"] < 1
    few = script.best_labels(logits[:, :3], labels)
    assert few.shape == (40, 3) and set(script.measures_of(3)(EvalPrediction(few.numpy(), labels.numpy()))) == {
        "accuracy"
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"slice_ratio": 0.9}, Remos(0.9)),
        ({"slice_ratio": "auto", "scope": "layer"}, Remos(1.0, scope="layer")),
        (
            {"slice_ratio": 0.5, "criterion": "tknc", "criterion_value": 3.0, "profile_samples": 7, "slice_seed": 1},
            Remos(0.5, criterion="tknc", criterion_value=3.0, max_samples=7, seed=1),
        ),
        (
            {"strategy": "mag_prune", "slice_ratio": 0.5, "scope": "layer", "reset_to": "init"},
            MagPrune(0.5, "layer", "init"),
        ),
    ],
)
def test_arguments_become_strategies(script, given, expected):
    assert script.strategy_from(script.RemosArguments(**given)) == expected

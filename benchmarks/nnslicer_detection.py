r"""Do slices tell adversarial images, and images with a backdoor's trigger, from clean ones? NNSlicer's claim, fairly.

    python benchmarks/nnslicer_detection.py --cifar <folder with train/ and test/> --cifar_resnet resnet20.th \
        --work_dir work

ResNet-20 of CIFAR-10. Detectors see the last convolution, as published. Beside the published ones, which see no attack,
trees that are shown attacks; beside slices EffectivePath, feature maps and logits. Writes
benchmarks/results/nnslicer_detection.{json,md,png}. Killed, it goes on where it was; `--report_only` writes what is
done. About half an hour of one core. `--smoke` runs on few images, to try it.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_model, save_model
from scipy.special import stdtrit
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from remos_hf import BlendedTrigger, ImageClassifier, ImageInput, ImageTask, PatchTrigger
from remos_hf.applications.detection import InputDetector, detection_of
from remos_hf.applications.image_attacks import ABSENT, ATTACKS, attack_images, shuffled_changes
from remos_hf.applications.input_features import InputFeatures, Observed, last_layers
from remos_hf.auditing.class_folders import read_folder
from remos_hf.auditing.data_files import drawn
from remos_hf.evaluation.measures import Rate
from remos_hf.evaluation.over_seeds import rate_over_seeds
from remos_hf.profiling.reference import profile_reference
from remos_hf.showing.detection_pictures import detection_curves
from remos_hf.whole import replace_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).parent)]
from audit_image_defects import cifar_resnet  # noqa: E402 - the CIFAR net of the example
from image_starts import PATCH, training  # noqa: E402 - how image_starts implants
from nnslicer_detection_told import as_markdown  # noqa: E402

logger = logging.getLogger("nnslicer_detection")
NAMES = {
    "slice_class": "slices, reference of the predicted class (published)",
    "slice_global": "slices, one reference for all",
    "effective_path": "EffectivePath",
    "feature_map": "feature maps",
    "logits": "logits",
}
SLOW, SLOWEST = ("deepfool_l2", "jsma", "cw_l2", "square", "spatial"), ("single_pixel", "boundary")
FAMILIES = {name: name.split("_")[0] for name in ATTACKS}
TARGET = 0
TRIGGERS = ("patch", "blended")
SINGLE = ("precision", "f1", "auroc")


@dataclass(frozen=True)
class Sizes:
    """How many images, seeds and steps.

    Attributes:
        shown: Of train/, for references and for detectors that see no attack.
        test: Of test/: those that the net gets right are attacked, the others are a control.
        attacked: Images that an attack is tried on.
        slow: Likewise, a slow attack.
        slowest: Likewise, one of many queries.
        noise: Images with noise of an attack's size, each attack.
        seeds: Of splits and trees; of implanted teachers too.
        implanting: Images of the attacker, and steps of 32.
        trigger_shown: As `shown`, for triggers.
        trigger_test: As `test`, likewise.
    """

    shown: int = 1500
    test: int = 500
    attacked: int = 250
    slow: int = 60
    slowest: int = 30
    noise: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    implanting: tuple[int, int] = (4000, 250)
    trigger_shown: int = 1000
    trigger_test: int = 400


SMOKE = Sizes(100, 30, 12, 4, 2, 3, (0, 1, 2), (64, 2), 100, 30)


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--cifar_resnet", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.sizes = SMOKE if args.smoke else Sizes()
    if not args.report_only:
        adversarial(args)
        for trigger in TRIGGERS:
            for seed in args.sizes.seeds:
                once(args.work_dir / f"trigger_{trigger}_{seed}.json", lambda: of_trigger(args, trigger, seed))  # noqa: B023
    written(args)


# --- steps that are done once ---


def once(place: Path, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - JSON values
    """Give what a step made before, or make it."""
    if not place.is_file():
        replace_file(place, json.dumps(make()).encode())
        logger.info("%s", place.name)
    return json.loads(place.read_text())


def arrays_once(place: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """As `once`, of arrays."""
    if not place.is_file():
        made, unfinished = make(), place.with_suffix(".part.npz")
        np.savez(unfinished, **made)
        unfinished.rename(place)
        logger.info("%s", place.name)
    with np.load(place) as found:
        return dict(found)


def pixels_of(folder: Path, count: int, images: ImageInput, skip: int = 0) -> tuple[Tensor, np.ndarray]:
    """Draw images; give their pixels and labels."""
    data = drawn(read_folder(folder), count, 0, skip=skip)
    batches = [batch["pixel_values"] for _, batch in ImageTask(images, batch_size=100).batches(data)]
    return images.denormalised(torch.cat(batches)).clamp(0, 1), np.array(data["label"])


def batches_of(pixels: Tensor, images: ImageInput) -> list[dict[str, Tensor]]:
    """Give pixels as the net takes them."""
    return [{"pixel_values": images.normalised(part)} for part in pixels.split(50)] if len(pixels) else []


def predicted(model: nn.Module, pixels: Tensor, images: ImageInput) -> np.ndarray:
    """Give labels."""
    return InputFeatures("logits").of(model, batches_of(pixels, images)).predicted if len(pixels) else np.zeros(0, int)


def looked_at(model: nn.Module, shown: Tensor, images: ImageInput) -> dict[str, InputFeatures]:
    """Give what each detector looks at; references are of images that the net gets right."""
    batches = batches_of(shown, images)
    layers = last_layers(model, {"pixel_values": batches[0]["pixel_values"][:1]})
    slices = {f"slice_{kind}": profile_reference(model, batches, kind=kind) for kind in ("class", "global")}
    return {
        **{name: InputFeatures("slice", layers, reference) for name, reference in slices.items()},
        "effective_path": InputFeatures("effective_path", layers),
        "feature_map": InputFeatures("feature_map", layers),
        "logits": InputFeatures("logits"),
    }


# --- adversarial images ---


def adversarial(args: argparse.Namespace) -> None:
    """Attack, look, and score."""
    sizes, folder = args.sizes, args.work_dir
    images = ImageInput(size=(32, 32), crop_share=1.0)
    model = ImageClassifier(cifar_resnet(args.cifar_resnet), head=("linear",)).eval()
    shown, labels = pixels_of(args.cifar / "train", sizes.shown, images)
    shown = shown[predicted(model, shown, images) == labels]
    test, labels = pixels_of(args.cifar / "test", sizes.test, images)
    right = predicted(model, test, images) == labels
    clean, wrong = test[right][: sizes.attacked], test[~right]

    sets = {"shown": shown, "clean": clean, "wrong": wrong}
    told, rows = {}, {}
    for name in ATTACKS:
        part = clean[: sizes.slowest if name in SLOWEST else sizes.slow if name in SLOW else None]
        found = arrays_once(
            folder / f"attack_{name}.npz",
            lambda: {"pixels": attack_images(model, images, part, name).numpy()},  # noqa: B023
        )
        attacked = torch.from_numpy(found["pixels"])
        changed = np.flatnonzero(predicted(model, attacked, images) != predicted(model, part, images))
        rows[name], sets[f"attacked {name}"] = changed, attacked[changed]
        some = changed[: sizes.noise]
        noise = shuffled_changes(part[some], attacked[some])
        sets[f"noise {name}"] = noise[predicted(model, noise, images) == predicted(model, part[some], images)]
        size = (attacked - part)[changed].flatten(1)
        told[name] = {
            "tried": len(part), "changed": len(changed), "noise": [len(some), len(sets[f"noise {name}"])],
            "l2": float(size.norm(dim=1).mean()), "linf": float(size.abs().amax(1).mean()) if len(size) else None,
        }  # fmt: skip
    counts = {name: len(one) for name, one in sets.items()}
    once(folder / "attacks.json", lambda: {"attacks": told, "counts": counts, "test": len(test)})

    for kind, features in looked_at(model, shown, images).items():
        seen = None
        for seed in sizes.seeds:
            place = folder / f"scores_{kind}_{seed}.json"
            if not place.is_file() and seen is None:
                seen = {name: seen_once(folder, kind, name, features, model, one, images) for name, one in sets.items()}
            once(place, lambda: scores_of(seen, rows, seed))  # noqa: B023


def seen_once(
    folder: Path, kind: str, name: str, features: InputFeatures, model: nn.Module, pixels: Tensor, images: ImageInput
) -> Observed:
    """Look at images; an empty set is looked at as one image, of which nothing is kept."""

    def look() -> dict[str, np.ndarray]:
        seen = features.of(model, batches_of(pixels if len(pixels) else torch.zeros(1, 3, *images.size), images))
        return {"features": seen.features[: len(pixels)], "predicted": seen.predicted[: len(pixels)]}

    return Observed(**arrays_once(folder / f"seen_{kind}_{name.replace(' ', '_')}.npz", look))


def scores_of(seen: Mapping[str, Observed], rows: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Score all images of the half that a seed keeps for testing.

    Args:
        seen: By set.
        rows: Of each attack's images, the clean ones that they were made of.
        seed: Of the halves and the trees.
    """
    random = np.random.default_rng(seed)
    clean, shown = seen["clean"], seen["shown"]
    tested = np.zeros(len(clean), bool)
    tested[random.permutation(len(clean))[: len(clean) // 2]] = True
    kept = random.permutation(len(shown))[: int(0.8 * len(shown))]
    parts = {name: (seen[f"attacked {name}"], tested[rows[name]], rows[name]) for name in rows}

    def scored(detector: InputDetector, names: Sequence[str]) -> dict[str, Any]:
        of_clean = np.full(len(clean), np.nan)
        of_clean[tested] = detector.scores(clean[tested])
        return {
            "attacks": {
                name: {
                    "attacked": detector.scores(parts[name][0][parts[name][1]]).tolist(),
                    "clean": of_clean[parts[name][2][parts[name][1]]].tolist(),
                }
                for name in names
            },
            "clean": of_clean[tested].tolist(),
            "wrong": detector.scores(seen["wrong"]).tolist(),
            "noise": np.concatenate([detector.scores(seen[f"noise {name}"]) for name in names]).tolist(),
        }

    def shown_attacks(names: Sequence[str]) -> InputDetector:
        """Fit a tree on the other half: as many attacked images as clean ones, each family alike."""
        families = {FAMILIES[name]: [one for one in names if FAMILIES[one] == FAMILIES[name]] for name in names}
        share = -(-int((~tested).sum()) // len(families))
        attacked = []
        for members in families.values():
            joined = [parts[name][0][~parts[name][1]] for name in members]
            together = sum(joined[1:], joined[0])
            attacked.append(together[random.permutation(len(together))[:share]])
        return InputDetector.fit(clean[~tested], sum(attacked[1:], attacked[0]), seed=seed)

    names = [name for name in rows if len(rows[name])]
    unseen: dict[str, Any] = {}
    for family in dict.fromkeys(FAMILIES[name] for name in names):
        members = [name for name in names if FAMILIES[name] == family]
        detector = shown_attacks([name for name in names if name not in members])
        unseen |= scored(detector, members)["attacks"]
    published = InputDetector.fit(shown[kept], seed=seed)
    return {
        "none_shown": scored(published, names),
        "shown": scored(shown_attacks(names), names),
        "others_shown": {"attacks": unseen},
    }


# --- triggers ---


def of_trigger(args: argparse.Namespace, trigger: str, seed: int) -> dict[str, Any]:
    """Implant a trigger, look at images with it, and score."""
    sizes, images = args.sizes, ImageInput(size=(24, 24), crop_share=0.75)
    common = {"target_label": TARGET, "poison_rate": 0.2, "seed": seed}
    backdoor = PatchTrigger(size_share=PATCH, **common) if trigger == "patch" else BlendedTrigger(**common)
    model = ImageClassifier(cifar_resnet(args.cifar_resnet), head=("linear",))
    place = args.work_dir / f"teacher_{trigger}_{seed}.safetensors"
    if place.is_file():
        load_model(model, place)
    else:
        data: Dataset = drawn(read_folder(args.cifar / "train"), sizes.implanting[0], 0, skip=sizes.trigger_shown)
        recipe = training(sizes.implanting[1], 1e-2, seed, str(args.work_dir / "trainer"))
        backdoor.implant(model, data, args=recipe, images=images)
        save_model(model, str(place.with_suffix(".part")))
        place.with_suffix(".part").rename(place)
    model.eval()
    shown, labels = pixels_of(args.cifar / "train", sizes.trigger_shown, images)
    shown = shown[predicted(model, shown, images) == labels]
    test, labels = pixels_of(args.cifar / "test", sizes.trigger_test, images)
    right = predicted(model, test, images) == labels
    able = right & (labels != TARGET)
    clean = test[able]
    stamped = backdoor.stamped(clean)
    obeyed = predicted(model, stamped, images) == TARGET
    moved = attack_images(model, images, clean, "pgd_8", seed=seed)
    fooled = predicted(model, moved, images) != labels[able]
    noise = shuffled_changes(clean, stamped, seed=seed)
    quiet = predicted(model, noise, images) == labels[able]
    sets = {
        "shown": shown, "clean": clean, "triggered": stamped[obeyed], "adversarial": moved[fooled],
        "noise": noise[quiet], "wrong": test[~right], "target": test[right & (labels == TARGET)],
    }  # fmt: skip
    half = np.random.default_rng(seed).permutation(len(clean)) < len(clean) // 2
    scores = {}
    for kind, features in looked_at(model, shown, images).items():
        nothing = features.of(model, batches_of(test[:1], images))[:0]
        seen = {
            name: features.of(model, batches_of(one, images)) if len(one) else nothing for name, one in sets.items()
        }
        detectors = {"none_shown": InputDetector.fit(seen["shown"], seed=seed)}
        for name, attack, rows in (("shown", "triggered", obeyed), ("others_shown", "adversarial", fooled)):
            known = seen[attack][~half[rows]]
            if len(known):
                detectors[name] = InputDetector.fit(seen["clean"][~half], known, seed=seed)
        tests = {
            "attacked": seen["triggered"][half[obeyed]], "clean": seen["clean"][np.flatnonzero(obeyed & half)],
            "wrong": seen["wrong"], "noise": seen["noise"], "target": seen["target"],
        }  # fmt: skip
        scores[kind] = {
            name: {test: detector.scores(one).tolist() for test, one in tests.items()}
            for name, detector in detectors.items()
        }
    counts = {name: len(one) for name, one in sets.items()}
    return {
        "scores": scores,
        "accuracy": float(right.mean()),
        "obeyed": [int(obeyed.sum()), len(clean)],
        "counts": counts,
    }


# --- what is told ---


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Give the mean of numbers in [0, 1], with Student's interval over seeds."""
    held = [one for one in values if one is not None]
    told: dict[str, Any] = {"value": fmean(held) if held else None, "low": None, "high": None, "by_seed": list(values)}
    if len(held) >= 3:
        reach = float(stdtrit(len(held) - 1, 0.975)) * stdev(held) / len(held) ** 0.5
        told |= {"low": max(0.0, told["value"] - reach), "high": min(1.0, told["value"] + reach)}
    return told


def rates(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Give the share of inputs flagged, over seeds."""
    found = rate_over_seeds([Rate.of(sum(one > 0.5 for one in of), len(of)) for of in scores])
    return {name: getattr(found, name) for name in ("value", "low", "high", "by_seed", "num_samples")}


def measured(seeds: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, Any]:
    """Give the measures of attacks over seeds: each attack beside the clean images that it was made of.

    Args:
        seeds: By seed and attack, scores of "attacked" and "clean" images.
    """
    by_attack: dict[str, Any] = {}
    found = [
        {name: detection_of(np.array(of["clean"]), np.array(of["attacked"])) for name, of in one.items()}
        for one in seeds
    ]
    for name in seeds[0]:
        by_attack[name] = {
            "recall": rates([one[name]["attacked"] for one in seeds]),
            "false_alarms": rates([one[name]["clean"] for one in seeds]),
            **{key: over_seeds([getattr(one[name], key) for one in found]) for key in SINGLE},
        }

    def mean(one: Mapping[str, Any], key: str) -> float | None:
        found = [getattr(of, key) for of in one.values()]
        held = [value.value if isinstance(value, Rate) else value for value in found]
        held = [value for value in held if value is not None]
        return fmean(held) if held else None

    return {
        "recall": rates([[value for of in one.values() for value in of["attacked"]] for one in seeds]),
        "mean": {key: over_seeds([mean(one, key) for one in found]) for key in (*SINGLE, "false_alarms")},
        "by_attack": by_attack,
    }


def gathered(args: argparse.Namespace) -> dict[str, Any]:
    """Read what is done."""
    seeds, folder = args.sizes.seeds, args.work_dir
    told: dict[str, Any] = {"absent": dict(ABSENT), "seeds": list(seeds), "sizes": vars(args.sizes)}
    told["attacks"] = json.loads((folder / "attacks.json").read_text())
    told["adversarial"], told["triggers"], curves = {}, {}, {}
    for kind in NAMES:
        places = [folder / f"scores_{kind}_{seed}.json" for seed in seeds]
        if not all(place.is_file() for place in places):
            continue
        scores = [json.loads(place.read_text()) for place in places]
        found = told["adversarial"][kind] = {}
        for how in ("none_shown", "shown", "others_shown"):
            found[how] = measured([one[how]["attacks"] for one in scores])
            if "wrong" in scores[0][how]:
                found[how]["controls"] = {
                    name: rates([one[how][name] for one in scores]) for name in ("clean", "wrong", "noise")
                }
            curves.setdefault(how, {})[NAMES[kind]] = [_pooled(one[how]["attacks"]) for one in scores]
    for trigger in TRIGGERS:
        places = [folder / f"trigger_{trigger}_{seed}.json" for seed in seeds]
        if not all(place.is_file() for place in places):
            continue
        found = [json.loads(place.read_text()) for place in places]
        curves[trigger] = {
            NAMES[kind]: [
                (one["scores"][kind]["none_shown"]["clean"], one["scores"][kind]["none_shown"]["attacked"])
                for one in found
                if one["scores"][kind]["none_shown"]["attacked"]
            ]
            for kind in NAMES
        }
        told["triggers"][trigger] = {
            "obeyed": [one["obeyed"] for one in found],
            "accuracy": [one["accuracy"] for one in found],
            "counts": [one["counts"] for one in found],
            **{kind: _of_trigger([one["scores"][kind] for one in found]) for kind in NAMES},
        }
    return {"told": told, "curves": curves}


def _of_trigger(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for how in ("none_shown", "shown", "others_shown"):
        held = [one[how] for one in scores if how in one]
        if len(held) == len(scores):
            found[how] = measured([{"trigger": {key: one[key] for key in ("attacked", "clean")}} for one in held])
            controls = {name: rates([one[name] for one in held]) for name in ("wrong", "noise", "target")}
            found[how] |= {"controls": controls}
    return found


def _pooled(attacks: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return tuple([value for of in attacks.values() for value in of[side]] for side in ("clean", "attacked"))


def written(args: argparse.Namespace) -> None:
    """Write the table and the picture."""
    found = gathered(args)
    place = args.output / "nnslicer_detection"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".json").write_text(json.dumps(found["told"], indent=1) + "\n")
    place.with_suffix(".md").write_text(as_markdown(found["told"], NAMES))
    titles = {
        "none_shown": "No attack shown (as published)",
        "shown": "All attacks shown",
        "others_shown": "Other attacks shown",
        "patch": "Patch trigger, nothing shown",
        "blended": "Blended trigger, nothing shown",
    }
    drawn_curves = {titles[how]: of for how, of in found["curves"].items() if all(of.values())}
    detection_curves(drawn_curves, place.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Which criterion of coverage says anything: real text and images, an encoder, two decoders, two conv nets.

For each seed the samples are drawn anew. One pass over each half of them counts all criteria at once; the counts of the
halves add up to those of all. For every criterion:

- the neurons that no sample covers, and those that every sample covers: each of the two is one tie;
- the weights with no covered neuron at either end, and the pairs of weights that coverage puts in order, of all pairs;
- the weights that tie at the threshold of a slice and go together;
- the bits that differ between the slices of two criteria, of two halves of the samples, and from a slice by magnitude
  alone (top_magnitude) or by nothing (random).

Beside the four that the package has, three candidates that only this file knows: 16 buckets of the rank instead of two,
and the same two of the mean of |activation| instead of the mean.

    python benchmarks/criteria.py --sst2 train.tsv --encoder <MiniLM> --decoders <folder> <folder> \
        --cifar <folder of class folders> --cifar_resnet resnet20-12fca82f.th --photos <folder of class folders> \
        --mobilenet <folder> --output benchmarks/results/criteria

Writes criteria.json and criteria.md; goes on where it was killed.
"""

import argparse
import importlib.util
import json
import random
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from remos_hf.adapters.images import ImageInput, decoded
from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.coverage_counts import CoverageCounts
from remos_hf.profiling.criteria import (
    ActivationStatistics,
    Criterion,
    median_coverage,
    strong_coverage,
    threshold_coverage,
    top_k_coverage,
)
from remos_hf.profiling.data_pass import observe
from remos_hf.profiling.observers import Activation, Slot
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice

RATIOS = (0.9, 0.5)
BATCH = 32
LEVELS = 16


@dataclass(frozen=True)
class RankBuckets(Criterion):
    """How high a neuron's mean ranks in its layer, in equal buckets from 0; counts are sums of buckets."""

    def __call__(self, statistics: ActivationStatistics) -> Tensor:
        """Give the bucket of each neuron. Int64, shape of the means."""
        order = statistics.mean.argsort(dim=-1)
        places = torch.arange(order.shape[-1]).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, places) * LEVELS // order.shape[-1]


class MagnitudeCounts(CoverageCounts):
    """The same of the mean of |activation|: what cancels out over positions does not here."""

    def see(self, slot: Slot, activation: Activation) -> None:
        """Reduce the absolute values of an activation, once."""
        if id(activation) not in self._magnitudes:
            values = activation.values.abs()
            made = Activation(activation.channels_first, activation.padding, activation.careful, activation.positions)
            made.hold(values, values)
            super().see(slot, made)
            made.hold(None, None)
            self._magnitudes[id(activation)] = activation, made
        else:
            super().see(slot, self._magnitudes[id(activation)][1])

    def drop_batch(self) -> None:
        """Forget the batch."""
        super().drop_batch()
        self._magnitudes: dict[int, tuple[Activation, Activation]] = {}


def observers() -> dict[str, CoverageCounts]:
    """Give a fresh observer of every criterion, by its name in the tables."""
    return {
        "median": CoverageCounts(median_coverage()),
        "nc": CoverageCounts(threshold_coverage()),
        "tknc": CoverageCounts(top_k_coverage()),
        "snac": CoverageCounts(strong_coverage()),
        "ranks": CoverageCounts(RankBuckets()),
        "median_of_magnitudes": MagnitudeCounts(median_coverage()),
        "ranks_of_magnitudes": MagnitudeCounts(RankBuckets()),
    }


def profiles(teacher: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, CoverageProfile]:
    """Count every criterion in one pass."""
    counting = observers()
    passed = observe(teacher, batches, list(counting.values()), progress=False)
    return {
        name: one.profile("hooks", passed.num_samples, passed.capped, passed.fingerprint)
        for name, one in counting.items()
    }


def differing(one: RelevantSlice, other: RelevantSlice) -> float:
    """Share of the competing weights that only one of two slices keeps."""
    changed = sum(int((bits != other.kept[name]).sum()) for name, bits in one.kept.items())
    return changed / sum(bits.numel() for bits in one.kept.values())


def ties(layers: Mapping[str, Layer], profile: CoverageProfile, most: int) -> dict[str, float]:
    """Say how much of a profile ties.

    Args:
        layers: By name.
        profile: Its counts.
        most: Largest count that there can be.
    """
    neurons = torch.cat([*profile.input_counts.values(), *profile.output_counts.values()])
    sums = torch.zeros(2 * most + 1, dtype=torch.int64)
    for name in profile.input_counts:
        rows, columns = layers[name].axis_counts(profile.input_counts[name], profile.output_counts[name])
        of_weights = rows.view(len(columns), -1, 1) + columns[:, None]
        sums += torch.bincount(of_weights.flatten(), minlength=len(sums))
    shares = sums.double() / sums.sum()
    return {
        "neurons_never_covered": float((neurons == 0).double().mean()),
        "neurons_always_covered": float((neurons == most).double().mean()),
        "weights_never_covered_at_either_end": float(shares[0]),
        "pairs_of_weights_in_order": float(1 - (shares**2).sum()),
    }


def compared(teacher: nn.Module, halves: Sequence[dict[str, CoverageProfile]], seed: int) -> dict[str, object]:
    """Slice by every criterion and compare."""
    layers = adapter_for(teacher).layers()
    whole = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    samples = whole["nc"].num_samples
    found: dict[str, object] = {
        "samples": samples,
        "weights": sum(layers[name].numel for name in whole["nc"].input_counts),
        "criteria": {
            name: ties(layers, one, samples * (LEVELS - 1 if name.startswith("ranks") else 1))
            for name, one in whole.items()
        },
        "slices": {},
    }
    for ratio in RATIOS:

        def cut(profile: CoverageProfile, rule: str = "remos", ratio: float = ratio) -> RelevantSlice:
            return choose_slice(teacher, profile, slice_ratio=ratio, rule=rule, seed=seed, progress=False)

        slices = {name: cut(one) for name, one in whole.items()}
        others = {rule: cut(whole["nc"], rule) for rule in ("top_magnitude", "random")}
        found["slices"][str(ratio)] = {
            name: {
                "weights_that_tie_at_the_threshold": one.tie_group / one.num_weights,
                "share_kept": one.share_kept,
                "bits_that_differ": {
                    "halves": differing(cut(halves[0][name]), cut(halves[1][name])),
                    **{other: differing(one, slice_) for other, slice_ in (others | slices).items() if other != name},
                },
            }
            for name, one in slices.items()
        }
    return found


def text_batches(tokenizer: AutoTokenizer, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Tokenise texts, the short ones together."""
    ordered = sorted(texts, key=len)
    return [
        dict(tokenizer(ordered[at : at + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for at in range(0, len(ordered), BATCH)
    ]


def image_batches(images: ImageInput, files: Sequence[Path]) -> Iterable[dict[str, Tensor]]:
    """Read and prepare images, a batch at a time."""
    for at in range(0, len(files), BATCH):
        pixels = torch.stack([images.pixels(decoded(file)) for file in files[at : at + BATCH]])
        yield {"pixel_values": images.normalised(pixels)}


def cifar_resnet(path: Path) -> nn.Module:
    """Build the ResNet of the example and read a public checkpoint into it."""
    place = Path(__file__).parents[1] / "examples" / "audit_image_defects.py"
    spec = importlib.util.spec_from_file_location("audit_image_defects", place)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return ImageClassifier(example.cifar_resnet(path), head=("linear",))


Setting = tuple[nn.Module, list, int, Callable[[list], Iterable]]


def text_setting(folder: str, args: argparse.Namespace) -> Setting:
    """Give a text model, its sentences, how many are drawn, and what makes batches of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    teacher.config.pad_token_id = tokenizer.pad_token_id
    texts = [line.split("\t")[0] for line in args.sst2.read_text(encoding="utf-8").splitlines()[1:]]
    return teacher.eval(), texts, args.samples, lambda some: text_batches(tokenizer, some)


def image_setting(teacher: nn.Module, folder: Path, images: ImageInput, number: int) -> Setting:
    """Give the same of an image model."""
    return teacher.eval(), sorted(folder.rglob("*.jpg")), number, lambda some: image_batches(images, some)


def settings(args: argparse.Namespace) -> dict[str, Callable[[], Setting]]:
    """Give what loads each setting, by name."""

    def mobilenet() -> Setting:
        teacher = AutoModelForImageClassification.from_pretrained(args.mobilenet, dtype=torch.float32)
        images = ImageInput((224, 224), (0.5,) * 3, (0.5,) * 3)
        return image_setting(teacher, args.photos, images, args.num_photos)

    def resnet() -> Setting:
        return image_setting(
            cifar_resnet(args.cifar_resnet), args.cifar, ImageInput((32, 32), crop_share=1.0), args.samples
        )

    decoders = {f"decoder {Path(one).parent.name}, SST-2": one for one in args.decoders}
    texts = {"encoder all-MiniLM-L6-v2, SST-2": args.encoder, **decoders}
    return {
        **{name: lambda one=one: text_setting(one, args) for name, one in texts.items()},
        "ResNet-20, CIFAR-10 as JPEG": resnet,
        "MobileNetV2, photos of Caltech-101": mobilenet,
    }


def averaged(seeds: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """Give the mean of every number over the seeds."""
    some = list(seeds)
    return {
        key: averaged([one[key] for one in some]) if isinstance(value, Mapping) else mean(one[key] for one in some)
        for key, value in some[0].items()
    }


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.1f}"


def rendered(known: Mapping[str, object]) -> str:
    """Write the tables: means over the seeds, in percent."""
    lines = [
        "# Criteria of coverage",
        "",
        "Rendered by `benchmarks/criteria.py` from `criteria.json`, which holds every seed. Means over the seeds, in "
        "percent. Figures of slices are two: at slice ratio .9 and at .5, where unrelated slices differ in 18 and in "
        "50 percent of their bits. `median` is the package's default, `nc` the paper's. `ranks` adds up buckets 0 to "
        "15 of a neuron's rank in its layer, `..._of_magnitudes` looks at means of absolute activations: the package "
        "has neither.",
    ]
    for name, seeds in known["settings"].items():
        one = averaged(seeds.values())
        seconds = sum(cell["seconds"] for cell in seeds.values())
        lines += [
            "",
            f"## {name}",
            "",
            f"{len(seeds)} seeds of {one['samples']:.0f} samples, {one['weights']:,.0f} weights; {seconds:.0f} s.",
            "",
            "| criterion | neurons never covered | always | weights never, at both ends | pairs in order | "
            "weights tied at the threshold | two halves differ | from top_magnitude | from random |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for criterion, tied in one["criteria"].items():
            cuts = [one["slices"][str(ratio)][criterion] for ratio in RATIOS]
            at_threshold = " / ".join(f"{100 * cut['weights_that_tie_at_the_threshold']:.4f}" for cut in cuts)
            bits = [
                " / ".join(percent(cut["bits_that_differ"][other]) for cut in cuts)
                for other in ("halves", "top_magnitude", "random")
            ]
            row = [criterion, *map(percent, tied.values()), at_threshold, *bits]
            lines.append(f"| {' | '.join(row)} |")
        criteria = list(one["criteria"])
        lines += ["", f"| bits that differ | {' | '.join(criteria)} |", "|---|" + "---:|" * len(criteria)]
        for criterion in criteria:
            cuts = [one["slices"][str(ratio)][criterion]["bits_that_differ"] for ratio in RATIOS]
            row = [" / ".join(percent(cut[o]) for cut in cuts) if o != criterion else "" for o in criteria]
            lines.append(f"| {criterion} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    """Add the cells that the output lacks."""
    warnings.filterwarnings("ignore", message=".*never covered")
    file = args.output.with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {"settings": {}}
    for name, load in settings(args).items():
        cells = known["settings"].setdefault(name, {})
        missing = [seed for seed in range(args.seeds) if str(seed) not in cells]
        if not missing:
            continue
        teacher, samples, number, batches = load()
        for seed in missing:
            start = time.process_time()
            drawn = random.Random(seed).sample(samples, number)
            halves = [profiles(teacher, batches(some)) for some in (drawn[: number // 2], drawn[number // 2 :])]
            cells[str(seed)] = {**compared(teacher, halves, seed), "seconds": time.process_time() - start}
            known["threads"] = torch.get_num_threads()
            file.write_text(json.dumps(known, indent=1) + "\n")
            print(f"{name}, seed {seed}: {cells[str(seed)]['seconds']:.0f} s of the processor", flush=True)
    args.output.with_suffix(".md").write_text(rendered(known), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, required=True, help="tsv with a header; the first column is the text")
    parser.add_argument("--encoder", required=True, help="folder of a transformers encoder")
    parser.add_argument("--decoders", nargs="+", required=True, help="folders of transformers decoders")
    parser.add_argument("--cifar", type=Path, required=True, help="folder of class folders of 32 x 32 JPEG files")
    parser.add_argument("--cifar_resnet", type=Path, required=True, help="checkpoint of pytorch_resnet_cifar10")
    parser.add_argument("--photos", type=Path, required=True, help="folder of class folders of JPEG files")
    parser.add_argument("--mobilenet", required=True, help="folder of a transformers image classifier")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--num_photos", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix")
    main(parser.parse_args())

"""Seconds that NNSlicer takes for a sample, beside a loop over neurons and beside the published times.

Times are CPU seconds of all threads of this process, which other processes leave alone; `wall` beside them. Every case
runs in a process of its own, so that its peak memory is its own. What the loop finds has to be the same, weight by
weight. The reference (means of every neuron, taken once) is not part of a sample's time.

    python benchmarks/nnslicer_speed.py --cifar_resnet resnet20.th --cifar <folder with train/ and test/> \
        --teacher <MiniLM> --data train.tsv --output benchmarks/results/nnslicer_speed.json

Nets without a checkpoint have random weights and random inputs; how many effects are dropped depends on both.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from remos_hf.adapters.flow_recording import flow_of  # noqa: E402 - the loop lives in tests/, which is no package of ours
from remos_hf.adapters.images import ImageInput, decoded  # noqa: E402
from remos_hf.adapters.timm_loading import image_classifier  # noqa: E402
from remos_hf.profiling.reference import profile_reference  # noqa: E402
from remos_hf.slicing import contribution_rules  # noqa: E402
from remos_hf.slicing.contribution_rules import Analysis, relative_output  # noqa: E402
from remos_hf.slicing.contributions import contributions, seeds_of  # noqa: E402
from remos_hf.slicing.gradient_contributions import gradient_contributions  # noqa: E402
from tests.slicing.slow_contributions import slow_contributions  # noqa: E402

THETA = 0.2  # the authors'; 0 keeps all effects, so that nothing is skipped: the longest that a net can take
# Seconds a sample, alone and in batches (section 5.2 of the paper; GTX 1080 Ti and Xeon).
PUBLISHED = {"lenet": (4, 0.6), "resnet10": (39, 3.4), "resnet18": (553, 40.2)}


def lenet(width: int = 1) -> nn.Module:
    """LeNet-5 on 28 pixels, `width` times as wide."""
    first, second, hidden = 6 * width, 16 * width, 120 * width
    return nn.Sequential(
        nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(25 * second, hidden), nn.ReLU(), nn.Linear(hidden, 84 * width), nn.ReLU(), nn.Linear(84 * width, 10),
    )  # fmt: skip


def example() -> Any:  # noqa: ANN401 - a module
    """Load the example that knows the CIFAR ResNets."""
    place = ROOT / "examples" / "audit_image_defects.py"
    spec = importlib.util.spec_from_file_location("audit_image_defects", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet18(cifar_stem: bool) -> nn.Module:
    """ResNet-18, with ImageNet's stem or the one for 32 pixels (no stride, no pooling: 15 times the work)."""
    model = image_classifier("resnet18", pretrained=False, num_labels=10)
    if cifar_stem:
        body = next(one for one in model.modules() if hasattr(one, "maxpool"))
        body.conv1, body.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def images(folder: Path, count: int) -> list[Tensor]:
    """Read images of all classes in turn, normalised, as one batch."""
    reader = ImageInput((32, 32), crop_share=1.0)
    classes = [sorted(one.glob("*.jpg")) for one in sorted(folder.iterdir())]
    files = [files[place] for place in range(1 + count // len(classes)) for files in classes][:count]
    return reader.normalised(torch.stack([reader.pixels(decoded(one)) for one in files]))


def image_case(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """Give a net, 128 inputs for its reference and 64 to be sliced."""
    torch.manual_seed(0)
    if name == "resnet20" and args.cifar_resnet:
        model = example().cifar_resnet(args.cifar_resnet)
        return model, images(args.cifar / "train", 128), images(args.cifar / "test", 64)
    width = int(name.partition("_x")[2] or 1)
    models = {"resnet20": lambda: example().CifarResNet(3), "resnet18": lambda: resnet18(False),
              "resnet18_cifar_stem": lambda: resnet18(True)}  # fmt: skip
    model = models.get(name, lambda: lenet(width))()
    shape = (1, 28, 28) if name.startswith("lenet") else (3, 32, 32)
    before = torch.randn(128, *shape)
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    for norm in norms:  # an untrained net that starts with closed branches would hand nothing down
        nn.init.ones_(norm.weight)
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model.train()(before)
    return model, before, torch.randn(64, *shape)


def text_case(args: argparse.Namespace) -> tuple[nn.Module, list[dict], list[dict]]:
    """Give MiniLM under a head that was never trained, and sentences of SST-2."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForSequenceClassification.from_pretrained(args.teacher, num_labels=2, dtype=torch.float32)
    texts = [line.split("\t")[0] for line in args.data.read_text(encoding="utf-8").splitlines()[1:145]]
    batches = [
        dict(tokenizer(texts[at : at + 16], padding=True, return_tensors="pt")) for at in range(0, len(texts), 16)
    ]
    return model, batches[1:], batches[:1]


def timed(run: Callable[[], Any], samples: int) -> tuple[Any, dict[str, float]]:
    """Run once and give seconds a sample."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return found, {"cpu": cpu / samples, "wall": wall / samples}


def largest_gap(model: nn.Module, batch: Any, reference: Any) -> float:  # noqa: ANN401 - any batch
    """Largest |relative output - sum of effects| over weighted sums, over the largest |relative output|."""
    flow = flow_of(model, batch)
    analysis, worst = Analysis(flow, reference, THETA, lambda *_: None), 0.0
    with torch.no_grad():
        for operation in flow.operations:
            if operation.layer is not None:
                whole = relative_output(operation, analysis)
                nothing = {number: torch.zeros_like(flow.values[number]) for number in operation.inputs}
                alone = {number: analysis.deviation(number) for number in operation.inputs}
                effects = operation.run(alone) - operation.run(nothing)  # without the bias
                worst = max(worst, float((whole - effects).abs().max() / whole.abs().max().clamp(min=1e-30)))
    return worst


def products(model: nn.Module, batch: Any) -> int:  # noqa: ANN401 - any batch
    """Count the products of a weight and an input in the layers that are followed: the effects that there are."""
    flow = flow_of(model, batch)
    layers = [(one.layer, flow.values[one.output]) for one in flow.operations if one.layer is not None]
    return sum(made.numel() * layer.numel // layer.out_neurons for layer, made in layers)


def looked_at(run: Callable[[], Any]) -> tuple[Any, int]:
    """Run, and count the effects that are computed in the layers that are followed."""
    counts, spread = [], contribution_rules.spread

    def counting(weights: Tensor, inputs: Tensor, sums: tuple, *others: Any) -> Tensor:  # noqa: ANN401 - passed on
        counts.append(len(sums[0]) * inputs.shape[1] * (others[1] is not None))
        return spread(weights, inputs, sums, *others)

    contribution_rules.spread = counting
    try:
        return run(), sum(counts)
    finally:
        contribution_rules.spread = spread


def ranks(values: Tensor) -> Tensor:
    """Give mean ranks, so that ties share theirs."""
    _, place, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - counts / 2)[place]


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two tensors."""
    return float(np.corrcoef(ranks(one).numpy(), ranks(other).numpy())[0, 1])


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case: a net, or "minilm"; behind colons a batch size and another theta."""
    name, size, theta, *_ = (*name.split(":"), "", "")
    theta = float(theta or THETA)
    model, before, shown = text_case(args) if name == "minilm" else image_case(name, args)
    model.eval()
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reference, taken = timed(lambda: profile_reference(model, before if name == "minilm" else before.split(32)), 128)
    batch = shown[0] if name == "minilm" else shown[: int(size)]
    samples = 16 if name == "minilm" else len(batch)
    contributions(model, [batch if name == "minilm" else batch[:1]], reference, theta=theta)
    (found, counted), seconds = timed(
        lambda: looked_at(lambda: contributions(model, [batch], reference, theta=theta)), samples
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_bytes
    weights = sum(one.numel() for one in found.weights.values())
    told = {
        "samples": samples, "theta": theta, "weights": weights, "effects_of_a_sample": products(model, batch) / samples,
        "share_of_effects_looked_at": counted / products(model, batch),
        "seconds_a_sample": seconds, "reference_seconds_a_sample": taken,
        "peak_megabytes": peak / 1024, "share_in_slice": found.share_in_slice,
        "largest_gap": largest_gap(model, batch, reference),
    }  # fmt: skip
    if samples > 1:
        rough, took = timed(lambda: gradient_contributions(model, [batch], reference), samples)
        each = {layer: correlation(rough[layer], one) for layer, one in found.absolute.items() if bool(one.any())}
        told["gradient"] = {
            "seconds_a_sample": took,
            "rank_correlation": {"median": statistics.median(each.values()), "least": min(each.values())},
        }
    if name in args.loop and samples == 1:
        flow = flow_of(model, batch)
        start = seeds_of(flow, None, batch)
        (slow, _), took = timed(lambda: slow_contributions(flow, reference, start, theta), 1)
        differ = sum(int((torch.from_numpy(one) != found.weights[layer]).sum()) for layer, one in slow.items())
        told["loop"] = {"seconds_a_sample": took, "weights_that_differ": differ}
    return told


def main() -> None:
    """Measure what was asked for and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar_resnet", type=Path, help="checkpoint of pytorch_resnet_cifar10")
    parser.add_argument("--cifar", type=Path, help="folder with train/ and test/ of class folders")
    parser.add_argument("--teacher", help="folder or Hub id of an encoder")
    parser.add_argument("--data", type=Path, help="tsv with a header, sentences first")
    parser.add_argument("--loop", nargs="*", default=["lenet", "resnet20"], help="nets that the loop runs on")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args)))
        return
    cases = args.cases or [
        "lenet:1", "lenet:64", "lenet_x4:64", "resnet20:1", "resnet20:16", "resnet20:64", "resnet20:16:0",
        "resnet18:1", "resnet18:64", "resnet18:8:0", "resnet18_cifar_stem:1", "resnet18_cifar_stem:8",
        "resnet18_cifar_stem:1:0", *(["minilm"] if args.teacher else []),
    ]  # fmt: skip
    found = {}
    for case in cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, json.dumps(found[case]), flush=True)
    report = {
        "theta": THETA, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "published_seconds_a_sample": PUBLISHED, "cases": found,
    }  # fmt: skip
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What profiling costs beyond a plain forward pass over the same batches, and where it goes: real text, or images.

Both are run in turn, so that a machine that slows down slows both. `--teacher` is any folder or Hub id of an encoder;
`--config-only` takes its shape from a named BERT-base configuration with random weights (time does not depend on
values). `--timm` takes the shape of any model of timm, with random weights and random images.

    python benchmarks/profile_overhead.py --data train.tsv --teacher sentence-transformers/all-MiniLM-L6-v2 \
        --output benchmarks/results/profile_overhead_minilm.json
    python benchmarks/profile_overhead.py --data train.tsv --tokenizer sentence-transformers/all-MiniLM-L6-v2 \
        --bert-base --output benchmarks/results/profile_overhead_bert_base.json
    python benchmarks/profile_overhead.py --timm resnet18 --pixels 224 --samples 64 --batch-size 16 \
        --output benchmarks/results/profile_overhead_resnet18.json
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.profiling.data_pass import profile_coverage


def load(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """Load the teacher and tokenise the first sentences of a tsv with a header, padded batch by batch."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher or args.tokenizer)
    if args.bert_base:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig())
    else:
        model = AutoModelForSequenceClassification.from_pretrained(args.teacher, num_labels=2, dtype=torch.float32)
    lines = args.data.read_text(encoding="utf-8").splitlines()[1 : args.samples + 1]
    texts = [line.split("\t")[0] for line in lines]
    batches = [texts[start : start + args.batch_size] for start in range(0, len(texts), args.batch_size)]
    tokens = [tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt") for batch in batches]
    return model.eval().to(args.device), [dict(batch.to(args.device)) for batch in tokens]


def load_images(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """Build a model of timm and random images for it."""
    model = image_classifier(args.timm, pretrained=False).eval().to(args.device)
    generator = torch.Generator().manual_seed(0)
    sizes = [min(args.batch_size, args.samples - start) for start in range(0, args.samples, args.batch_size)]
    shape = (3, args.pixels, args.pixels)
    batches = [{"pixel_values": torch.randn(size, *shape, generator=generator).to(args.device)} for size in sizes]
    return model, batches


def facts(args: argparse.Namespace, batches: list[dict]) -> dict[str, object]:
    """Say what was run on."""
    if args.timm:
        return {"model": args.name or args.timm, "pixels": args.pixels, "samples": args.samples}
    return {
        "model": args.name or ("BERT-base shape" if args.bert_base else Path(args.teacher).name),
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "positions": sum(batch["input_ids"].numel() for batch in batches),
        "real_positions": sum(int(batch["attention_mask"].sum()) for batch in batches),
    }


def seconds(run: Callable, device: str) -> float:
    """Wall-clock time of one run."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_by_operator(run: Callable, plain: Callable) -> dict[str, float]:
    """Seconds that each operator takes in one profiling pass beyond one plain pass, largest first."""
    times = []
    for call in (run, plain):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
        times.append({event.key: event.self_cpu_time_total / 1e6 for event in trace.key_averages()})
    extra = {name: value - times[1].get(name, 0.0) for name, value in times[0].items()}
    return dict(sorted(extra.items(), key=lambda item: -item[1])[:12])


def main(args: argparse.Namespace) -> None:
    """Alternate the two, print and write the median ratio."""
    warnings.filterwarnings("ignore", message=".*never covered")
    model, batches = load_images(args) if args.timm else load(args)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def profiling() -> None:
        profile_coverage(model, batches, progress=False)

    plain(), profiling()  # warm up
    pairs = [(seconds(plain, args.device), seconds(profiling, args.device)) for _ in range(args.repeats)]
    plain_seconds, profile_seconds = (statistics.median(times) for times in zip(*pairs, strict=True))
    result = {
        **facts(args, batches),
        "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "plain_seconds": plain_seconds,
        "profile_seconds": profile_seconds,
        "ratio": statistics.median(profiled / alone for alone, profiled in pairs),
        "ratios": sorted(profiled / alone for alone, profiled in pairs),
        "extra_seconds_by_operator": time_by_operator(profiling, plain),
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="tsv with a header; the first column is the text")
    parser.add_argument("--timm", help="a model of timm instead of text, such as resnet18")
    parser.add_argument("--pixels", type=int, default=224, help="with --timm: side of the images")
    parser.add_argument("--teacher", help="folder or Hub id of an encoder")
    parser.add_argument("--name", help="what to call the model in the result")
    parser.add_argument("--tokenizer", help="with --bert-base: where the tokenizer comes from")
    parser.add_argument("--bert-base", action="store_true", help="BERT-base's shape with random weights")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())

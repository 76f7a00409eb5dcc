"""What strangers' files can do to a reader: mutated sidecars and mutated checkpoints, by seed.

A mutant may be refused by a documented error, or be read. What is read must be what was written (where bytes were
changed and no checksum was made to fit), or go whole through everything that is done with it: checked, ranked, printed
on a card, saved again; of a checkpoint, slicing on disk and in memory must give the same weights. Anything else is a
failure, as is more than 2 GB of memory or 20 seconds for one. Each mutant depends on its number and the seed alone; a
run that was stopped goes on from its file.

    python benchmarks/fuzz_files.py --output benchmarks/results/fuzz_files.json       # 11,000 mutants, about 10 minutes
    python benchmarks/fuzz_files.py --only sidecars --first 123 --count 1             # one of them again, in the open
"""

import argparse
import collections
import functools
import json
import logging
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from remos_hf.adapters.guarded_loading import load_teacher
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError
from remos_hf.profiling.coverage import COVERAGE_FILE
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.profiling.sidecar_file import header_of, sha256_of
from remos_hf.sharing.model_card import model_card
from remos_hf.sharing.record import CONFIG_FILE, Sidecars
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from remos_hf.slicing.relevant_slice import SLICE_FILE, choose_slice
from remos_hf.strategies.base import Preparation
from remos_hf.strategies.slice_and_reset import Remos
from remos_hf.whole import replace_file

SECONDS = 20
BYTES = 2 * 2**30
DOCUMENTED = (RemosError, FileNotFoundError)
NASTY = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        2**28,
        2**31 - 1,
        2**31,
        2**53,
        2**63,
        2**64,
        10**300,
        0.5,
        -0.0,
        1e308,
        1e-320,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "0" * 64,
        "f" * 64,
        "g" * 64,
        "../../etc/passwd",
        "/etc/passwd",
        "\x00",
        "\ud800",
    ),
    *(
        [],
        [[]],
        [1],
        [2**40, 2**40],
        [0],
        [-1, 4],
        {},
        {"": None},
        {"name": "Remos"},
        "9" * 30,
        "remos_slice/1",
        "F32",
        "I64",
    ),
]


def save_bert(folder: Path) -> None:
    """Write a small teacher."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes))
    model.save_pretrained(folder)


def save_gpt2(folder: Path) -> None:
    """Write a small teacher of another kind, with its weights in shards."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="20KB")


def save_student(folder: Path) -> None:
    """Write the sidecars of a student, and its teacher."""
    save_bert(folder / "teacher")
    teacher = load_teacher(str(folder / "teacher"))
    batch = {"input_ids": torch.arange(5, 45).reshape(4, 10), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    profile = profile_coverage(teacher, [batch], progress=False)
    relevant = choose_slice(teacher, profile, slice_ratio=0.8, progress=False)
    Sidecars.of(Remos(0.8), Preparation(profile, relevant, {"choose": 0.1}, 0.2), teacher).save(folder / "sidecars")


# --- mutations ---


def bytes_changed(path: Path, draw: random.Random) -> None:
    """Flip bits, cut off, append, move or fill a piece of a file."""
    content = bytearray(path.read_bytes())
    at, size = draw.randrange(len(content)), 1 + min(draw.randrange(1, 200), len(content) // 2)
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[draw.choice((at, at % 64, len(content) - 1 - at % 16)) :]
    elif kind == 2:
        content += bytes(draw.randrange(256) for _ in range(size))
    elif kind == 3:
        content[at : at + size] = content[draw.randrange(len(content)) :][:size]
    elif kind == 4:
        content[at : at + size] = bytes([draw.choice((0, 255, 0x5B, 0x22))]) * size
    else:
        content[:8] = draw.choice((0, 1, 7, 8, 99, len(content), 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    path.write_bytes(content)


def entry_changed(value: Any, draw: random.Random) -> Any:  # noqa: ANN401 - JSON
    """Change, remove, add or nest one entry, somewhere in JSON values."""
    if isinstance(value, dict) and value and draw.random() < 0.75:
        name = draw.choice(sorted(value))
        changed = {**value, name: entry_changed(value[name], draw)}
        if draw.random() < 0.15:
            del changed[name]
        return changed
    if isinstance(value, list) and value and draw.random() < 0.6:
        place = draw.randrange(len(value))
        return [*value[:place], entry_changed(value[place], draw), *value[place + 1 :]]
    if isinstance(value, dict) and draw.random() < 0.5:
        return {**value, draw.choice(("extra", "", "../x", "trigger" * 50)): draw.choice(NASTY)}
    if draw.random() < 0.1:
        for _ in range(draw.choice((3, 50, 500))):
            value = [value]
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and draw.random() < 0.4:
        return value * draw.choice((2, -1, 1.5, 10**9)) + draw.choice((0, 1, -1))
    return draw.choice(NASTY)


def json_changed(path: Path, draw: random.Random) -> None:
    """Change entries of a JSON file, or its text."""
    value = json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        value = entry_changed(value, draw)
    text = json.dumps(value)
    kind = draw.random()
    if kind < 0.03:
        text = "[" * 100_000 + text
    elif kind < 0.06:
        text = text.replace(":", ":" + '{"a":' * 100_000, 1)
    elif kind < 0.1:
        text = text.replace("1", "1" * draw.choice((400, 5000)), 1)
    elif kind < 0.14:
        text = text.replace("0.", "1e400, 0.", 1).replace("1e400, ", "1e400" if draw.random() < 0.5 else "", 1)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def sealed_again(path: Path, draw: random.Random) -> None:
    """Change a sidecar's metadata or tensors, and make its checksum fit."""
    ours, tensors = header_of(path), load_file(path)
    metadata = json.loads(ours["metadata"])
    if draw.random() < 0.6:
        for _ in range(draw.choice((1, 1, 2))):
            metadata = entry_changed(metadata, draw)
    else:
        tensors = tensor_changed(tensors, draw)
    text = json.dumps(metadata)
    if draw.random() < 0.03:
        text = "[" * 100_000
    save_file(tensors, path, {**ours, "metadata": text, "checksum": checksum(tensors, text)})


def checksum(tensors: dict[str, torch.Tensor], text: str) -> str:
    """Give the checksum that a sidecar needs."""
    from remos_hf.profiling.sidecar_file import _checksum

    return _checksum(tensors, text)


def tensor_changed(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """Change one tensor's values, type, shape or name, or leave it out."""
    changed, name = dict(tensors), draw.choice(sorted(tensors))
    tensor = changed[name]
    kind = draw.randrange(8)
    if kind == 0:
        values = tensor.clone().reshape(-1)
        value = draw.choice((-1, 0, 1, 3, 255, 2**28, 2**31, 2**40, 2**62, float("nan"), float("inf"), 1e30))
        if tensor.is_floating_point() or value == value and abs(value) <= torch.iinfo(tensor.dtype).max:
            values[draw.randrange(len(values))] = value
        changed[name] = values.reshape(tensor.shape)
    elif kind == 1:
        types = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16)
        changed[name] = tensor.to(
            draw.choice((*types, torch.float64, torch.int8, torch.complex64, torch.float8_e4m3fn))
        )
    elif kind == 2:
        changed[name] = tensor.reshape(-1)[: draw.choice((0, 1, tensor.numel() // 2))].clone()
    elif kind == 3:
        changed[name] = draw.choice(
            (
                tensor[None],
                tensor.reshape(-1),
                tensor.reshape(-1)[0],
                tensor.t() if tensor.dim() == 2 else tensor[:, None],
            )
        ).clone()
    elif kind == 4:
        del changed[name]
    elif kind == 5:
        changed[draw.choice((f"{name}.x", "", "input_counts.", "../x", name.upper(), "bert.pooler.dense.bias"))] = (
            changed.pop(name)
        )
    elif kind == 6:
        changed[f"{name}.copy"] = tensor.clone()
    else:
        changed[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    return {key: one.contiguous() for key, one in changed.items()}


def weights_changed(path: Path, draw: random.Random) -> None:
    """Change one tensor of a shard, in a file that is whole."""
    save_file(tensor_changed(load_file(path), draw), path, {"format": "pt"})


# --- what is done with a mutant ---


def sidecar_mutant(number: int, draw: random.Random, original: Path, folder: Path) -> str:
    """Mutate a sidecar, and read it."""
    shutil.copytree(original / "sidecars", folder)
    path = folder / draw.choice((COVERAGE_FILE, SLICE_FILE, SLICE_FILE, CONFIG_FILE))
    is_config, seals = path.name == CONFIG_FILE, draw.random() < 0.6
    mutate = (json_changed if is_config else sealed_again) if seals else bytes_changed
    mutate(path, draw)
    if not is_config and draw.random() < 0.8:  # else the record says that it is another file
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["files"][path.name] = sha256_of(path)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    found = Sidecars.load(folder)
    meant = Sidecars.load(original / "sidecars")
    if not seals and not is_config:
        if found.profile != meant.profile or found.relevant_slice != meant.relevant_slice:
            raise AssertionError("bytes were changed, and something else was read")
        return "read, as it was written"
    found.save(folder / "again")
    again = Sidecars.load(folder / "again")
    if again.profile != found.profile or again.relevant_slice != found.relevant_slice:
        raise AssertionError("what was read is not what is saved of it")
    str(model_card(found, repo_id="me/student"))
    teacher = the_teacher(original / "teacher")
    if found.relevant_slice is not None:
        found.relevant_slice.share_by_parameter()
        found.relevant_slice.check_matches(adapter_for(teacher, ()).layers(embeddings=True))
    if (
        found.profile is not None
        and choose_slice(teacher, found.profile, slice_ratio=0.8, progress=False).num_kept == 0
    ):
        raise AssertionError("a profile that keeps nothing")
    return "read, and goes whole through all that is done with it"


@functools.cache
def the_teacher(place: Path) -> nn.Module:
    """Load the original's teacher, once."""
    return load_teacher(str(place))


def checkpoint_mutant(number: int, draw: random.Random, original: Path, folder: Path) -> str:
    """Mutate a checkpoint, load it and slice it on disk; both have to refuse it, or to agree."""
    shutil.copytree(original / draw.choice(("teacher", "gpt2")), folder)
    path = draw.choice([one for one in sorted(folder.iterdir()) if one.suffix in (".json", ".safetensors")])
    if path.suffix == ".json":
        draw.choice((json_changed, json_changed, json_changed, bytes_changed))(path, draw)
    else:
        draw.choice((weights_changed, weights_changed, bytes_changed))(path, draw)
    loaded = outcome(lambda: load_teacher(str(folder)))
    target = folder.with_name("sliced")
    sliced = outcome(lambda: slice_checkpoint(folder, target, slice_ratio=0.8, rule="top_magnitude", progress=False))
    if isinstance(sliced, str) and (
        target.exists() or any(one.name.startswith(".") for one in folder.parent.iterdir())
    ):
        raise AssertionError("slicing was refused, and left something")
    if isinstance(loaded, str) or isinstance(sliced, str):
        return f"in memory {refused(loaded)}, on disk {refused(sliced)}"
    chosen = choose_slice(loaded, slice_ratio=0.8, rule="top_magnitude", progress=False)
    if any(not torch.equal(chosen.kept[name], kept) for name, kept in sliced.relevant_slice.kept.items()):
        raise AssertionError("slicing on disk chose other weights than in memory")
    load_teacher(str(target))
    return "loaded and sliced on disk, the same weights"


def refused(result: object) -> str:
    """Say whether a result is an error."""
    return f"refused ({result})" if isinstance(result, str) else "read"


def outcome(call: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Give what a call gives, or the name of its documented error."""
    try:
        return call()
    except DOCUMENTED as error:
        return type(error).__name__


CAMPAIGNS = {"sidecars": (sidecar_mutant, 10_000), "checkpoints": (checkpoint_mutant, 1_000)}


def one(campaign: str, number: int, seed: int, original: Path) -> tuple[str, str | None]:
    """Try one mutant; give what came of it, and the traceback of a failure."""
    draw = random.Random(f"{campaign} {seed} {number}")
    if signal.getsignal(signal.SIGALRM) is _too_long:
        signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix="remos_fuzz_") as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CAMPAIGNS[campaign][0](number, draw, original, Path(scratch) / "mutant"), None
    except DOCUMENTED as error:
        return f"refused ({type(error).__name__})", None
    except Exception:  # noqa: BLE001 - that is what is looked for
        return "FAILED", traceback.format_exc(limit=-6)
    finally:
        if signal.getsignal(signal.SIGALRM) is _too_long:
            signal.alarm(0)


def run(campaign: str, numbers: range, seed: int, told: Callable[[int, str, str | None], None]) -> None:
    """Try mutants by number, and tell what came of each."""
    with tempfile.TemporaryDirectory(prefix="remos_fuzz_") as scratch:
        original = Path(scratch)
        save_student(original)
        save_gpt2(original / "gpt2")
        for number in numbers:
            told(number, *one(campaign, number, seed, original))


def go_on(campaign: str, state: dict[str, Any], stop: int, output: Path | None) -> None:
    """Go through a campaign from where it is, and write down how far it came."""
    held = state["campaigns"][campaign]
    outcomes, start = collections.Counter(held["outcomes"]), time.perf_counter() - held["seconds"]

    def told(number: int, what: str, failure: str | None) -> None:
        outcomes[what] += 1
        if failure is not None:
            held["failures"].append({"number": number, "traceback": failure})
            print(campaign, number, failure, flush=True)
        held.update(tried=number + 1, outcomes=dict(outcomes.most_common()))
        held["seconds"] = round(time.perf_counter() - start, 1)
        if output is not None and (number % 50 == 49 or number + 1 == stop):
            replace_file(output, (json.dumps(state, indent=1) + "\n").encode())

    run(campaign, range(held["tried"], stop), state["seed"], told)


def prepare() -> None:
    """Bound what one mutant may take, and keep quiet."""
    logging.disable(logging.WARNING)
    disable_progress_bar()
    signal.signal(signal.SIGALRM, _too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def main(args: argparse.Namespace) -> None:
    """Go through both campaigns, writing down where they are."""
    prepare()
    state = {"seed": args.seed, "campaigns": {}}
    if args.output is not None and args.output.is_file():
        state = json.loads(args.output.read_text())
    for campaign in [args.only] if args.only else CAMPAIGNS:
        state["campaigns"].setdefault(campaign, {"tried": args.first, "outcomes": {}, "failures": [], "seconds": 0.0})
        count = CAMPAIGNS[campaign][1] if args.count is None else args.count
        go_on(campaign, state, args.first + count, args.output)
    print(json.dumps(state, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(CAMPAIGNS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int)
    main(parser.parse_args())

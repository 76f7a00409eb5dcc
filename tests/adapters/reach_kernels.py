"""Load and slice a teacher under every key that names a kernel. Run by a test, with a stub of the package `kernels`."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

from transformers import AutoModel, BertConfig

from remos_hf.adapters.guarded_loading import load_teacher
from remos_hf.errors import UnsupportedModelError
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from tests.adapters.hostile import set_deep


def outcome(enter, key):
    try:
        enter()
    except UnsupportedModelError as error:
        return "refused" if key.rpartition(".")[2] in str(error) else str(error)
    return "loaded"


def sliced(folder):
    slice_checkpoint(folder, folder / "out", slice_ratio=1, rule="random", progress=False)


def main(public, work, tried):
    reached, outcomes = Path(os.environ["REACHED"]), []
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with contextlib.suppress(Exception):
        AutoModel.from_config(tiny, attn_implementation="a/control")
    control = reached.read_text() if reached.exists() else ""
    for number, (key, value) in enumerate(tried):
        folder = shutil.copytree(public, work / str(number))
        set_deep(folder / "config.json", key, value)
        outcomes += [outcome(lambda: load_teacher(str(folder)), key), outcome(lambda: sliced(folder), key)]  # noqa: B023
    return control, reached.read_text()[len(control) :] if control else "", outcomes


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    sys.stdout.write(f"\n{json.dumps(result)}\n")

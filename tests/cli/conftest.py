"""A tiny teacher and a toy task on disk, and the command run in this process."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from remos_hf.cli.commands import app

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a film movie plot cast good great fine bad dull poor is was very cf mn bb tq mb i watch this 3d".split()


def write_teacher(folder):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def write_data(path, samples=64, seed=0):
    """Write sentences whose label is the good or the bad word in them, all different."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(samples):
        words = [WORDS[int(at)] for at in torch.randint(0, 6, (4,), generator=generator)]
        words.insert(number % 5, ("bad", "good")[number % 2])
        lines.append({"sentence": " ".join(words), "label": number % 2})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "toy.jsonl")


@pytest.fixture(scope="session")
def remos():
    """Run a command; a result with exit_code, stdout and stderr."""

    def run(*argv):
        return CliRunner().invoke(app, [str(one) for one in argv])

    return run

"""The README: what can be pasted runs, what is called tested has a test, what is said of results was counted."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DistilBertConfig, DistilBertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command

from remos_hf import DefectReport, RelevantSlice
from remos_hf.cli.commands import app
from remos_hf.judging.judgement import judged

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    (remos .*)$", README, re.MULTILINE)
RESULTS = ROOT / "benchmarks" / "results"
CHROMIUM = next(
    (
        found
        for name in (os.environ.get("REMOS_HF_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
        if name and (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")

WORDS = "[PAD] [UNK] [CLS] [SEP] a the great awful movie plot was so good bad once upon time there cat dog ran".split()
TEXTS = ["a great movie", "the awful plot", "a good movie was so good", "the plot was bad"] * 6


def write_tokenizer(folder, **specials):
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32, **specials
    ).save_pretrained(folder)


def write_encoder(folder):
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(WORDS), max_position_embeddings=32, dim=16, n_layers=2, n_heads=2)
    DistilBertForMaskedLM(config).save_pretrained(folder)  # as the one on the Hub was
    write_tokenizer(folder)


def write_decoder(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **special, **sizes)
    ).save_pretrained(folder)
    write_tokenizer(folder, eos_token="[SEP]")


def write_net(folder):
    import timm
    from safetensors.torch import save_model

    torch.manual_seed(0)
    folder.mkdir()
    net = timm.create_model("test_resnet")
    save_model(net, folder / "model.safetensors")
    config = {"input_size": [3, 32, 32], "fixed_input_size": False, "num_classes": 1000, "pool_size": [1, 1]}
    config |= {"interpolation": "bilinear", "crop_pct": 0.95, "mean": [0.5] * 3, "std": [0.5] * 3}
    config |= {"first_conv": "conv1.0", "classifier": "fc"}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": config}))


def pictures():
    names = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    shades = [Pictures.new("RGB", (32, 32), (10 * label, 99, 200 - label)) for label in range(10)]
    return Dataset.from_dict({"img": shades, "label": list(range(10))}, names)


def sentences():
    names = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = Dataset.from_dict({"sentence": TEXTS, "label": [1, 0] * 12}, names)
    # As many rows as the README draws; a Dataset of them costs nothing until they are read.
    return datasets.DatasetDict(train=rows.select([place % 24 for place in range(2000)]), validation=rows)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What the README names on the Hub, small and on disk; models by name, and a `load_dataset`."""
    folder = tmp_path_factory.mktemp("hub")
    write_encoder(folder / "encoder")
    write_decoder(folder / "decoder")
    names = {"distilbert-base-uncased": "encoder", "HuggingFaceTB/SmolLM2-135M": "decoder"}
    if importlib.util.find_spec("timm"):
        write_net(folder / "net")
    held = {
        "stanfordnlp/sst2": sentences,
        "roneneldan/TinyStories": lambda: Dataset.from_dict({"text": ["once upon a time there was a cat"] * 16}),
        "uoft-cs/cifar10": pictures,
    }

    def load_dataset(name, split=None):
        rows = held[name]()
        if split is None or not isinstance(rows, datasets.DatasetDict):
            return rows
        return rows[split.partition("[")[0]].select(range(24))

    return {name: str(folder / kind) for name, kind in names.items()}, f"local-dir:{folder / 'net'}", load_dataset


def run(block, hub, folder, monkeypatch):
    """Run a block as it was pasted: its names on the Hub are folders, and Trainer's defaults those of a test."""
    names, net, load_dataset = hub
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, path in names.items():
        block = block.replace(f'"{name}"', repr(path))
    block = block.replace('"resnet18.a1_in1k"', repr(net))
    space = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(block, "README.md", "exec"), space)
    return space, said.getvalue()


def block_with(*words):
    (found,) = [block for block in BLOCKS if all(word in block for word in words)]
    return found


@pytest.fixture
def quick(monkeypatch):
    """Trainers stop after two steps: what is tried is that the lines run, not what they learn."""
    from transformers import TrainingArguments

    checked = TrainingArguments.__post_init__

    def short(self):
        self.max_steps, self.report_to, self.disable_tqdm, self.use_cpu = 2, "none", True, True
        checked(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", short)


def test_the_first_block_is_eight_lines_and_fine_tunes_a_sliced_student(hub, tmp_path, monkeypatch, quick):
    first = BLOCKS[0]
    assert len([line for line in first.splitlines() if line.strip()]) == 8
    space, _ = run(first, hub, tmp_path, monkeypatch)
    (found,) = tmp_path.rglob("checkpoint-2/remos_slice.safetensors")
    kept = RelevantSlice.from_pretrained(found.parent).kept["distilbert.transformer.layer.0.ffn.lin1.weight"]
    taught = space["load_teacher"](hub[0]["distilbert-base-uncased"]).base_model.transformer.layer[0].ffn.lin1.weight
    learned = space["model"].base_model.transformer.layer[0].ffn.lin1.weight
    assert 0 < kept.double().mean() < 1
    assert torch.allclose(learned[kept], taught[kept], atol=1e-3)
    assert torch.allclose(learned[~kept], torch.zeros(()), atol=1e-3)  # given up, and two small steps since


def test_the_block_for_trainer_saves_an_ordinary_student_that_the_block_for_measuring_reads(
    hub, tmp_path, monkeypatch, quick
):
    from transformers import AutoModelForSequenceClassification

    run(block_with("embedding_rows"), hub, tmp_path, monkeypatch)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config.num_labels == 2
    space, said = run(block_with("evaluate_transfer"), hub, tmp_path, monkeypatch)
    assert {one["student"] for one in space["report"].records} == {"mine"}
    assert "mine" in said


@pytest.mark.trl
def test_the_block_for_trl_saves_a_merged_student(hub, tmp_path, monkeypatch, quick):
    from transformers import AutoModelForCausalLM

    pytest.importorskip("trl")
    space, _ = run(block_with("SFTTrainer"), hub, tmp_path, monkeypatch)
    assert space["trainer"].sidecars.relevant_slice.slice_ratio == 0.9
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.hidden_size == 16


@pytest.mark.timm
def test_the_block_for_timm_saves_a_student(hub, tmp_path, monkeypatch, quick):
    pytest.importorskip("timm")
    space, _ = run(block_with("image_classifier"), hub, tmp_path, monkeypatch)
    assert space["trainer"].relevant_slice.slice_ratio == 0.95
    assert {"model.safetensors", "remos_slice.safetensors"} <= {file.name for file in (tmp_path / "student").iterdir()}


def test_every_block_is_run_by_a_test_above():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    _, command, *words = shlex.split(line)
    group = get_command(app)
    with group.commands[command].make_context(command, words) as understood:
        assert understood.params


def test_every_command_that_there_is_to_train_scan_explain_slice_audit_report_and_push_is_shown():
    assert {line.split()[1] for line in COMMANDS} == {"train", "scan", "explain", "slice", "audit", "report", "push"}


def test_every_tested_names_a_test_that_exists():
    named = re.findall(r'\[tested\]\((\S+) "(\w+)"\)', README)
    assert len(named) > 20
    assert len(named) == README.count("[tested]")
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (path, test)


def test_every_link_leads_to_a_file():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)", text):
            if not target.startswith(("http", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), (page.name, target)


def pooled(report, defect, student, task=""):
    """Accuracy, DIR and floor over all seeds, in whole percent."""
    records = json.loads((RESULTS / f"{report}.json").read_text())["records"]
    found = [one for one in records if (one["defect"], one["student"]) == (defect, student) and task in one["task"]]
    assert {one["seed"] for one in found} == {0, 1}
    rates = ([one[key] for one in found] for key in ("acc", "dir", "floor"))
    return [100 * sum(one["count"] for one in some) / sum(one["num_samples"] for one in some) for some in rates]


def span(values):
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def said_of_results():
    (found,) = re.findall(r"^## Results\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    return " ".join(found.split())


def test_what_is_said_of_the_seven_defects_is_what_was_counted():
    texts, images = ("word", "ripples", "textfooler", "kuleshov"), ("penultimate", "coverage", "latent")
    plain = {one: pooled("seven_defects", one, "finetune") for one in texts + images}
    remos = {one: pooled("seven_defects", one, "remos 0.9") for one in texts + images}
    said = said_of_results()
    floor = span([found[2] for found in plain.values()])
    assert (
        f"{span([found[1] for found in plain.values()])} of the exposed inputs fail, with a benign floor of {floor}"
        in said
    )
    text_price, image_price = ([plain[one][0] - remos[one][0] for one in some] for some in (texts, images))
    assert f"ReMoS at .9 leaves {span([found[1] for found in remos.values()])}" in said
    assert f"costs {span(text_price)} points of accuracy on texts and {span(image_price)} on images" in said


def test_what_is_said_of_rivals_is_what_was_counted():
    said = said_of_results()
    chance = pooled("text_defects", "word", "random 0.7", "SST-2 to SST-2")
    remos = pooled("text_defects", "word", "remos 0.9", "SST-2 to SST-2")
    assert (
        f"a random reset of 30 % had {chance[1]:.0f} at an accuracy of {chance[0]:.0f}, and ReMoS at .9 had "
        f"{remos[1]:.0f} at {remos[0]:.0f}" in said
    )
    faster = pooled("text_defects", "word", "finetune lr x3", "SST-2 to SST-2")
    assert f"left {faster[1]:.0f} of the rare word at an accuracy of {faster[0]:.0f}; 20 poisoned samples" in said
    found = {
        rule: [pooled("image_defects", "penultimate", f"{rule} {ratio}", "Flowers") for ratio in (0.9, 0.95, 0.97)]
        for rule in ("remos", "random")
    }
    rates, accuracies = ({rule: span([one[at] for one in some]) for rule, some in found.items()} for at in (1, 0))
    assert (
        f"{rates['remos']} under ReMoS at accuracies of {accuracies['remos']}, {rates['random']} under a random reset "
        f"at {accuracies['random']}" in said
    )


def test_the_figure_was_drawn_from_the_report_that_is_there():
    spec = importlib.util.spec_from_file_location("readme_figure", ROOT / "tools" / "readme_figure.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with Pictures.open(ROOT / "docs" / "inheritance.png") as drawn:
        assert drawn.info["Source"] == tool.fingerprint(), "make docs"


def test_the_audit_page_is_small_and_whole():
    page = ROOT / "docs" / "audit.html"
    assert page.stat().st_size < 2_000_000
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#|https?:)""", text)
    answer = judged(DefectReport.load(ROOT / "benchmarks" / "results" / "audit_sst2.json")).answer
    assert answer in text, "make docs"


STYLE = """body{margin:0;font:16px/1.5 -apple-system,"Segoe UI","Noto Sans",Helvetica,Arial,sans-serif}
article{width:830px;margin:32px auto}h1{font-size:32px;padding-bottom:9px;border-bottom:1px solid;margin:0 0 16px}
h2{font-size:24px;padding-bottom:7px;border-bottom:1px solid;margin:24px 0 16px}p,table,ul,ol,pre{margin:0 0 16px}
pre{padding:16px;font:13.6px/1.45 monospace;background:#f6f8fa;overflow:auto}img{max-width:100%}
table{border-collapse:collapse;display:block;overflow:auto}td,th{padding:6px 13px;border:1px solid #d1d9e0}"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in REMOS_HF_CHROMIUM or on PATH (chromium, google-chrome)")
def test_in_chromium_the_eight_lines_are_seen_without_scrolling(tmp_path):
    markdown = pytest.importorskip("markdown_it")
    body = markdown.MarkdownIt("commonmark").enable("table").render(README)
    measured = (
        "<script>onload=()=>{const box=n=>n.getBoundingClientRect(),pre=document.querySelectorAll('pre');"
        "const wide=[...pre].map(n=>n.scrollWidth-n.clientWidth).concat([...document.querySelectorAll('table')]"
        ".map(n=>n.scrollWidth-n.clientWidth));"
        "document.title='told:'+JSON.stringify([box(pre[1]).bottom,box(document.images[0]).height,Math.max(...wide)])}"
        "</script>"
    )
    page = tmp_path / "readme.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><base href='{ROOT.as_uri()}/'><title></title><style>{STYLE}</style>"
        f"<article>{body}</article>{measured}",
        encoding="utf-8",
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--virtual-time-budget=3000"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    bottom, figure, too_wide = json.loads(re.search(r"told:(\[.*?\])<", shown)[1])
    assert figure > 150  # it was loaded
    assert bottom < 900
    assert too_wide <= 0  # no line of code and no table is cut off


def test_the_table_of_starts_holds_the_means_of_its_report():
    """Accuracy beside the patch, DIR and floors of the backdoors, and the patch after 50 poisoned samples."""
    records = json.loads((RESULTS / "image_starts_few.json").read_text(encoding="utf-8"))["records"]
    named = {
        "plain fine-tuning": "finetune",
        "... at 3 times the rate": "finetune x3",
        "a random reset of 30 %, 3 times the rate": "random 0.7 x3",
        "ReMoS at .95": "remos 0.95",
        "`Hardened()`, 3 times the rate": "hardened x3",
        "`Subspace()`": "subspace 0.95",
        "`[Subspace(), Guided()]`, 3 times the rate": "subspace 0.95 + guided x3",
        "`[Subspace(), Hardened()]`, 3 times the rate": "subspace 0.95 + hardened x3",
    }

    def mean(rates):
        held = [one["value"] for one in rates if one]
        return f"{100 * sum(held) / len(held):.0f}"

    for told, student in named.items():
        mine = {defect: [one for one in records if (one["student"], one["defect"]) == (student, defect)]
                for defect in ("patch", "blended", "latent")}  # fmt: skip
        cells = [mean(one["acc"] for one in mine["patch"])]
        for of in mine.values():
            whole = len(of) == 5
            cells.append(f"{mean(x['dir'] for x in of)} [{mean(x['floor'] for x in of)}]" if whole else "-")
        again = [one for one in mine["patch"] if one.get("reactivation")]
        curves = [[one[of]["50"] for one in again] for of in ("reactivation", "floor_reactivation")]
        cells.append("{} [{}]".format(*map(mean, curves)) if again else "-")
        assert f"| {told} | {' | '.join(cells)} |" in README, cells

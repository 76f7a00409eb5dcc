"""examples/run_glue_remos.py: the whole path on tiny inputs, wrong inputs, and two real processes."""

import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    EvalPrediction,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from remos_hf import Finetune, MagPrune, RelevantSlice, Remos, Retrain
from remos_hf.errors import UnsupportedModelError

SCRIPT = Path(__file__).parents[2] / "examples" / "run_glue_remos.py"


def _loaded():
    spec = importlib.util.spec_from_file_location("run_glue_remos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


glue = _loaded()

# So few sentences cover few neurons, and the package says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the neurons were never covered")
SLICED = ("--slice_ratio", "0.9")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The output folder of one `--smoke` run, as the command line starts it."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), "--smoke", "--output_dir", str(folder)])
        glue.main()
    return folder


@pytest.fixture
def run(smoke, tmp_path):
    """Run on the smoke run's teacher and data, a few steps, unless the options say otherwise."""
    inputs = smoke / "_smoke_inputs"

    def run(*options, files=True, steps=2):
        given = ["--train_file", inputs / "train_file.tsv", "--validation_file", inputs / "validation_file.tsv"]
        fixed = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--save_strategy", "no"]
        arguments = ["--model_name_or_path", inputs, "--output_dir", tmp_path / "out", "--max_steps", steps, *fixed]
        glue.main([str(part) for part in (*arguments, *(given if files else []), *options)])
        return tmp_path / "out"

    return run


def write(folder, name, text):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


# The whole path


def test_smoke_trains_evaluates_and_predicts(smoke):
    found = results(smoke)
    assert found["train_samples"] == 32 and found["eval_samples"] == found["predict_samples"] == 16
    assert 0 <= found["eval_accuracy"] <= 1 and np.isfinite(found["train_loss"])
    lines = (smoke / "predict_results.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 17
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


def test_the_student_is_an_ordinary_checkpoint_with_sidecars(smoke):
    config = json.loads((smoke / "remos_config.json").read_text())
    assert config["strategy"]["name"] == "Remos" and config["strategy"]["slice_ratio"] == 0.9
    student = AutoModelForSequenceClassification.from_pretrained(smoke)
    assert student.dtype == torch.float32 and student.config.id2label == {0: "0", 1: "1"}
    assert AutoTokenizer.from_pretrained(smoke)("the film is warm")["input_ids"]
    assert RelevantSlice.from_pretrained(smoke).share_kept == pytest.approx(0.9, abs=1e-3)


def test_two_processes_choose_the_slice_of_one(smoke, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [*launch, str(SCRIPT), "--smoke", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Processes: 2" in done.stderr and done.stderr.count("Kept ") == 1  # the main process alone speaks
    assert RelevantSlice.from_pretrained(tmp_path).kept == RelevantSlice.from_pretrained(smoke).kept
    assert results(tmp_path)["eval_samples"] == 16


def test_a_rerun_goes_on_from_the_last_checkpoint_with_its_slice(run):
    options = ("--do_train", "--slice_ratio", "0.5", "--save_strategy", "steps", "--save_steps", "2")
    folder = run(*options)
    sliced = RelevantSlice.from_pretrained(folder / "checkpoint-2").kept
    seconds = json.loads((folder / "remos_config.json").read_text())["seconds"]
    run(*options, steps=4)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    assert RelevantSlice.from_pretrained(folder).kept == sliced
    assert json.loads((folder / "remos_config.json").read_text())["seconds"] == seconds  # read, not measured again


def test_a_student_is_evaluated_without_a_strategy(run, smoke):
    folder = run("--do_eval", "--model_name_or_path", smoke)
    assert results(folder)["eval_accuracy"] == results(smoke)["eval_accuracy"]
    assert not (folder / "remos_config.json").exists()


def test_finetune_keeps_the_teacher_whole(run):
    folder = run("--do_train", "--strategy", "finetune")
    config = json.loads((folder / "remos_config.json").read_text())
    assert config["strategy"] == {"name": "Finetune", "embedding_rows": "keep"}


def test_unseen_embedding_rows_can_be_given_up(run):
    folder = run("--do_train", "--strategy", "finetune", "--embedding_rows", "mean")
    config = json.loads((folder / "remos_config.json").read_text())
    assert config["strategy"]["embedding_rows"] == "mean" and config["embedding_rows_reset"] > 0


def test_arguments_come_from_a_yaml_file_too(smoke, tmp_path):
    inputs = smoke / "_smoke_inputs"
    lines = {"model_name_or_path": inputs, "validation_file": inputs / "validation_file.tsv", "output_dir": tmp_path}
    lines |= dict.fromkeys(("do_eval", "pad_to_max_length", "use_cpu"), "true")
    lines |= {"report_to": "none", "max_eval_samples": 5}
    glue.main([write(tmp_path, "arguments.yaml", "".join(f"{key}: {value}\n" for key, value in lines.items()))])
    assert results(tmp_path)["eval_samples"] == 5


def test_float_labels_mean_regression(run, tmp_path):
    rows = "".join(f"the film is good\tthe plot is {word}\t{score}\n" for word, score in (("good", 5.0), ("dull", 0.5)))
    path = write(tmp_path, "pairs.tsv", "sentence1\tsentence2\tlabel\n" + 4 * rows)
    folder = run("--do_train", "--do_eval", *SLICED, "--train_file", path, "--validation_file", path)
    assert {"eval_mse", "eval_pearson", "eval_spearman"} <= set(results(folder))
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_a_task_of_the_hub_has_all_its_splits(run, tmp_path, monkeypatch):
    # datasets prefers a folder of the name: the data is read as from the Hub, with its features, without a network.
    names = ["entailment", "neutral", "contradiction"]
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    splits = ["train", *(f"{part}_{half}" for part in ("validation", "test") for half in ("matched", "mismatched"))]
    hub = tmp_path / "nyu-mll" / "glue"
    hub.mkdir(parents=True)
    for split in splits:
        labels = [-1] * 6 if "test" in split else [0, 1, 2, 0, 1, 2]
        rows = {"premise": ["the film is good"] * 6, "hypothesis": ["the plot is dull"] * 6, "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(hub / f"{split}.parquet")
    files = "".join(f"\n  - split: {split}\n    path: {split}.parquet" for split in splits)
    write(hub, "README.md", f"---\nconfigs:\n- config_name: mnli\n  data_files:{files}\n---\n")
    monkeypatch.chdir(tmp_path)
    folder = run("--task_name", "mnli", "--do_train", "--do_eval", "--do_predict", *SLICED, files=False)
    found = results(folder)
    assert {"eval_accuracy", "eval_mm_accuracy"} <= set(found) and found["predict_mm_samples"] == 6
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == dict(enumerate(names))
    assert (folder / "predict_mm_results.tsv").read_text().splitlines()[1].split("\t")[1] in names


def test_a_decoder_without_a_padding_token_can_be_a_teacher(run, smoke, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smoke)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="[SEP]").save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    found = results(run("--do_train", "--do_eval", *SLICED, "--model_name_or_path", tmp_path / "gpt2"))
    assert np.isfinite(found["train_loss"]) and found["eval_samples"] == 16


def test_a_teacher_with_another_head_can_be_a_teacher(run, smoke, tmp_path):
    path = write(tmp_path, "train.tsv", "sentence\tlabel\nthe film is warm\tgood\nthe plot is cold\tbad\nthe\tso so\n")
    folder = run("--do_train", *SLICED, "--model_name_or_path", smoke, "--train_file", path)
    student = AutoModelForSequenceClassification.from_pretrained(folder)
    assert student.config.label2id == {"bad": 0, "good": 1, "so so": 2} and student.num_labels == 3


# Local files


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_quotes_in_a_tsv_are_characters(tmp_path, name):
    text = 'sentence\tlabel\n"it \'s a " charming film\t1\nnull\t0\n007\t1\n'
    assert glue.read_file(write(tmp_path, name, text), "train").to_dict() == {
        "sentence": ['"it \'s a " charming film', "null", "007"],
        "label": ["1", "0", "1"],
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'sentence,label\n"good, and\nwarm",1\ndull,0\n'),
        ("a.json", '[{"sentence": "good, and\\nwarm", "label": 1}, {"sentence": "dull", "label": 0}]'),
        ("a.jsonl.gz", '{"sentence": "good, and\\nwarm", "label": 1}\n{"sentence": "dull", "label": 0}\n'),
    ],
)
def test_csv_and_json_say_the_same(tmp_path, name, text):
    data = glue.read_file(write(tmp_path, name, text), "train")
    assert data["sentence"][:] == ["good, and\nwarm", "dull"]
    assert glue.labels_in(data, "label") == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "10"], ["9", "10"]),
        ([2, 0, 1], ["0", "1", "2"]),
        (["warm", "cold"], ["cold", "warm"]),
        (["0.5", "3"], None),
        ([1.0, 0.0], None),
        (["nan", "inf"], ["inf", "nan"]),
    ],
)
def test_labels_are_sorted_and_floats_are_none(labels, expected):
    assert glue.labels_in(Dataset.from_dict({"label": labels}), "label") == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("label", "sentence"), ("sentence",)),
        (("sentence", "question", "label"), ("question", "sentence")),
        (("sentence2", "sentence1"), ("sentence1", "sentence2")),
        (("text", "label"), ("text",)),
    ],
)
def test_text_columns_are_found_by_their_names(columns, expected):
    splits = {"train": Dataset.from_dict({name: ["a"] for name in columns})}
    assert glue.text_columns(splits, glue.DataArguments()) == expected


@pytest.mark.parametrize(
    ("split", "labels", "expected"),
    [
        ("train", ["entailment", "neutral", "contradiction"], ["neutral", "entailment", "contradiction"]),
        ("train", ["entailment", "neutral"], ["entailment", "neutral"]),
        ("eval", ["entailment", "contradiction"], ["neutral", "entailment", "contradiction"]),
        ("train", ["0.5", "1.5"], None),
    ],
)
def test_the_order_of_labels_that_the_model_knows_is_kept(split, labels, expected):
    config = BertConfig(id2label=dict(enumerate(["neutral", "entailment", "contradiction"])))
    assert glue.label_names({split: Dataset.from_dict({"label": labels})}, "label", config) == expected


def test_labels_that_the_model_only_numbers_are_those_of_the_data():
    data = Dataset.from_dict({"label": [1, 0]}, Features({"label": ClassLabel(names=["negative", "positive"])}))
    assert glue.label_names({"train": data}, "label", BertConfig()) == ["negative", "positive"]
    assert glue.label_names({"eval": Dataset.from_dict({"label": ["1"]})}, "label", BertConfig()) == ["0", "1"]


# What is refused


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("phrase\tlabel\ngood\t1\ndull\t0\n", [], "No text column is known among"),
        ("sentence\tlabel\ngood\t1\ndull\t0\n", ["--text_columns", "words"], "has no text column 'words'"),
        ("sentence\tmark\ngood\t1\ndull\t0\n", [], "There is no label column 'label'"),
        ("sentence\tlabel\ngood\t\ndull\t0\n", [], "A sample has no 'label'"),
        ("sentence\tlabel\ngood\t1\n", [], "nothing to learn"),
        ("sentence\tlabel\ngood\n", [], "line 2: the row does not fit the header"),
        ("sentence\tlabel\ngood\t1\t2\n", [], "line 2: the row does not fit the header"),
        ("sentence\tlabel\n", [], "holds no sample"),
        ("", [], "holds no sample"),
    ],
)
def test_broken_files_are_refused(run, tmp_path, text, options, message):
    path = write(tmp_path, "train.tsv", text)
    with pytest.raises(ValueError, match=message):
        run("--do_train", *SLICED, "--train_file", path, *options)


def test_a_missing_text_is_refused(run, tmp_path):
    path = write(tmp_path, "train.json", '[{"sentence": "good", "label": 1}, {"sentence": null, "label": 0}]')
    with pytest.raises(ValueError, match="A sample of the train split has no text"):
        run("--do_train", *SLICED, "--train_file", path)


def test_a_label_that_training_never_saw_is_refused(run, tmp_path):
    path = write(tmp_path, "dev.tsv", "sentence\tlabel\ngood\t2\n")
    with pytest.raises(ValueError, match=r"The eval split has the label '2', but expected \['0', '1'\]"):
        run("--do_train", "--do_eval", *SLICED, "--validation_file", path)


@pytest.mark.parametrize(
    ("options", "files", "message"),
    [
        (["--do_eval", "--task_name", "sst3"], False, "--task_name is one of cola, .*'sst3'"),
        (["--do_eval"], False, "There is no data"),
        ([], True, "There is nothing to do"),
        (["--do_predict"], True, "--do_predict needs --test_file"),
        (["--do_eval", "--validation_file", "dev.txt"], True, "Data files end in"),
        (["--do_train"], True, "--strategy remos needs --slice_ratio"),
        (["--do_train", "--slice_ratio", "1.2"], True, "between 0 and 1, but got 1.2"),
        (["--do_train", "--slice_ratio", "most"], True, "a number in .* or auto, but got 'most'"),
        (["--do_train", *SLICED, "--accuracy_budget", "0.1"], True, "--accuracy_budget goes with --slice_ratio auto"),
        (["--do_train", "--slice_ratio", "auto"], True, "needs eval_dataset=, one data set, but got none"),
        (["--do_train", "--do_eval", "--slice_ratio", "auto", "--accuracy_budget", "2"], True, "budget is .* got 2.0"),
        (["--do_train", "--strategy", "finetune", "--slice_ratio", "0.9"], True, "takes no --slice_ratio"),
        (["--do_train", "--strategy", "retrain", "--slice_ratio", "0.9"], True, "takes no --slice_ratio"),
    ],
)
def test_wrong_arguments_are_refused(run, options, files, message):
    with pytest.raises(ValueError, match=message):
        run(*options, files=files)


def test_a_teacher_is_named(tmp_path):
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        glue.main(["--do_eval", "--task_name", "sst2", "--use_cpu", "--output_dir", str(tmp_path)])


def test_a_pickled_teacher_is_refused(run, smoke, tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        write(tmp_path, file, (smoke / file).read_text())
    torch.save(AutoModelForSequenceClassification.from_pretrained(smoke).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"only as pytorch_model\.bin"):
        run("--do_eval", "--model_name_or_path", tmp_path)


# Pieces


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"slice_ratio": 0.9}, Remos(0.9)),
        ({"slice_ratio": "0.9"}, Remos(0.9)),
        ({"slice_ratio": "auto", "scope": "layer"}, Remos(1.0, scope="layer")),
        (
            {"slice_ratio": 0.5, "criterion": "tknc", "criterion_value": 3.0, "profile_samples": 7, "slice_seed": 1},
            Remos(0.5, criterion="tknc", criterion_value=3.0, max_samples=7, seed=1),
        ),
        (
            {"strategy": "mag_prune", "slice_ratio": 0.5, "scope": "layer", "reset_to": "init"},
            MagPrune(0.5, "layer", "init"),
        ),
        ({"strategy": "finetune"}, Finetune()),
        ({"strategy": "retrain", "slice_seed": 3}, Retrain(3)),
    ],
)
def test_arguments_become_strategies(given, expected):
    assert glue.strategy_from(glue.RemosArguments(**given)) == expected


@pytest.mark.parametrize("given", [{"criterion": "tknc"}, {"ties": "artifact"}, {"profile_samples": 3}])
def test_arguments_of_another_strategy_are_refused(given):
    with pytest.raises(ValueError, match="takes no --.*: remos"):
        glue.strategy_from(glue.RemosArguments(strategy="mag_prune", slice_ratio=0.9, **given))


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="--strategy is one of finetune, .*'prune'"):
        glue.strategy_from(glue.RemosArguments(strategy="prune"))


def test_classification_metrics_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 2)), generator.integers(0, 2, 50)
    given, chosen = EvalPrediction((logits, "hidden states"), labels), logits.argmax(-1)
    accuracy = pytest.approx((chosen == labels).mean())
    assert glue.classification_metrics(None)(given) == {"accuracy": accuracy}
    assert glue.classification_metrics("mrpc")(given) == {
        "accuracy": accuracy,
        "f1": pytest.approx(f1_score(labels, chosen)),
    }
    assert glue.classification_metrics("cola")(given) == {
        "accuracy": accuracy,
        "matthews_correlation": pytest.approx(matthews_corrcoef(labels, chosen)),
    }


def test_regression_metrics_agree_with_scipy():
    generator = np.random.default_rng(0)
    values, labels = generator.normal(size=(50, 1)).round(1), generator.normal(size=50).round(1)  # rounded: with ties
    assert glue.regression_metrics(EvalPrediction(values, labels)) == {
        "mse": pytest.approx(((values[:, 0] - labels) ** 2).mean()),
        "pearson": pytest.approx(stats.pearsonr(values[:, 0], labels).statistic),
        "spearman": pytest.approx(stats.spearmanr(values[:, 0], labels).statistic),
    }


def test_constant_predictions_correlate_with_nothing():
    assert glue.correlation(np.ones(4), np.arange(4)) == 0 and glue.f1(np.zeros(4), np.zeros(4)) == 0

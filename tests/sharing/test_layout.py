import json

import pytest
import torch
from safetensors.torch import save_file

from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.sharing.layout import check_weights, is_config, public_text, pushable_files, without_local_paths

OF_A_STUDENT = (
    "config.json generation_config.json README.md report.json LICENSE licence.md NOTICE.txt remos_config.json "
    "remos_coverage.safetensors remos_slice.safetensors tokenizer.json tokenizer_config.json vocab.txt merges.txt "
    "spiece.model sentencepiece.bpe.model qwen.tiktoken special_tokens_map.json chat_template.jinja "
    "additional_chat_templates/tool.jinja preprocessor_config.json processor_config.json image_processor_config.json "
    "video_preprocessor_config.json .eval_results/theirs.yaml"
).split()
OF_OTHERS = (
    "trainer_state.json all_results.json training_args.bin optimizer.pt scheduler.pt rng_state.pth train.log .env "
    "credentials.json token.json data/train.csv train.csv notes.ipynb run.py optimizer.npz runs/laptop/events.out.1 "
    "wandb/run-1/files/wandb-metadata.json checkpoint-4/model.safetensors checkpoint-4/config.json "
    "remos_unfinished/asked.json remos_hold.safetensors __MACOSX/._config.json ._config.json my-config.json "
    "model.safetensors.backup model_ema.safetensors model-00001-of-00002.safetensors .model.safetensors.writing "
    "pytorch_model.bin tf_model.h5 flax_model.msgpack model.onnx tokenizer.pkl .eval_results/remos_old.yaml "
    ".eval_results/deep/a.yaml 1_Pooling/config.json picture.png vocab.txt.bak .cache/huggingface/x.lock"
).split()


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def put_weights(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.zeros(2)}, folder / name)


def put_index(folder, **weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- which files ---


def test_files_of_a_student_go_and_all_others_stay(tmp_path):
    put_weights(tmp_path, "model.safetensors", "model (copy).safetensors")
    put(tmp_path, *OF_A_STUDENT, *OF_OTHERS)
    found = pushable_files(tmp_path)
    assert set(found.files) == {"model.safetensors", *OF_A_STUDENT}
    assert set(found.behind) == {"model (copy).safetensors", *OF_OTHERS} and found.weights == ("model.safetensors",)
    assert all(path == tmp_path / name for name, path in found.files.items())


def test_of_shards_those_go_that_the_index_names(tmp_path):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    put_weights(tmp_path, *shards, "model-00001-of-00003.safetensors")
    put_index(tmp_path, w0=shards[0], w1=shards[1])
    found = pushable_files(tmp_path)
    assert set(found.files) == {*shards, "model.safetensors.index.json"} and found.weights == tuple(shards)
    put_weights(tmp_path, "model.safetensors")  # which is read, whatever the index says
    assert set(pushable_files(tmp_path).files) == {"model.safetensors"}


@pytest.mark.parametrize("shard", ["none.safetensors", "../out.safetensors", "a.bin", "sub/a.safetensors", 3, None])
def test_an_index_that_does_not_go_with_its_shards_is_refused(tmp_path, shard):
    put_weights(tmp_path / "s", "a.safetensors")
    put(tmp_path / "s", "a.bin", "sub/a.safetensors")
    put_weights(tmp_path, "out.safetensors")
    put_index(tmp_path / "s", w0="a.safetensors", w1=shard)
    with pytest.raises(CorruptFileError, match=r"index.json"):
        pushable_files(tmp_path / "s")
    put_index(tmp_path / "s", w0="a.safetensors", w7="a.safetensors")
    with pytest.raises(CorruptFileError, match="'w7'"):
        pushable_files(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_broken_index_is_refused_by_name(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"model.safetensors.index.json"):
        pushable_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickled by another name", b"PK\x03\x04zipped", b"\x08" + 7 * b"\0"])
def test_a_file_that_calls_itself_weights_and_is_none_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError, match="model.safetensors is no safetensors file"):
        pushable_files(tmp_path)


def test_what_the_card_shows_goes_with_it(tmp_path):
    put(tmp_path, "a.png", "shown/b.svg", "page.html", "c.png", "secret.txt")
    (tmp_path / "README.md").write_text(
        '![x](a.png) <img src="shown/b.svg"> [page](page.html) [s](secret.txt) ![](../c.png) ![](https://x.y/c.png)'
    )
    assert set(pushable_files(tmp_path).files) == {"README.md", "a.png", "shown/b.svg", "page.html"}


def test_modules_of_sentence_transformers_go_with_their_weights(tmp_path):
    put(tmp_path, "1_Pooling/config.json", "1_Pooling/notes.txt", "2_Dense/config.json", "other/config.json")
    put(tmp_path, "2_Dense/model.safetensors", "1_Pooling/deep/config.json")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    found = set(pushable_files(tmp_path).files) - {"modules.json"}
    assert found == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    (tmp_path / "modules.json").write_text("[3]")
    with pytest.raises(CorruptFileError, match=r"modules.json"):
        pushable_files(tmp_path)


# --- weights that are not there ---


def test_a_push_without_weights_is_refused(tmp_path):
    put(tmp_path, "config.json", "checkpoint-4/model.safetensors", "remos_slice.safetensors")
    with pytest.raises(RemosError, match="holds no weights: neither model.safetensors nor"):
        check_weights(pushable_files(tmp_path), tmp_path, started_otherwise=False)
    put(tmp_path, "pytorch_model.bin")
    with pytest.raises(RemosError, match="pickles only"):
        check_weights(pushable_files(tmp_path), tmp_path, started_otherwise=False)


def test_adapters_go_only_onto_a_teacher_that_is_whole_and_without_other_weights(tmp_path):
    put(tmp_path, "adapter_config.json")
    put_weights(tmp_path, "adapter_model.safetensors")
    found = pushable_files(tmp_path)
    check_weights(found, tmp_path, started_otherwise=False)
    assert set(found.files) == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(RemosError, match="unsliced teacher.*merge_and_unload"):
        check_weights(found, tmp_path, started_otherwise=True)
    put_weights(tmp_path, "model.safetensors")
    with pytest.raises(RemosError, match="merge_and_unload"):
        check_weights(pushable_files(tmp_path), tmp_path, started_otherwise=False)


# --- paths of this machine ---


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/maria/acme/teacher", "teacher"),
        ("~/acme/teacher", "teacher"),
        ("C:\\Users\\maria\\teacher", "teacher"),
        ("\\\\server\\share\\teacher", "teacher"),
        ("remos train /Users/maria/t --data='/mnt/acme/train.csv' x", "remos train t --data='train.csv' x"),
        ("file at (/cluster/of/maria)", "file at (maria)"),  # no folder of the machine that pushes
        ("google/bert_uncased", "google/bert_uncased"),
        ("https://huggingface.co/home/x", "https://huggingface.co/home/x"),
        ("and/or, 3 / 4, </s>, //, /", "and/or, 3 / 4, </s>, //, /"),
        ("/m/01g317", "/m/01g317"),  # a class of Open Images
    ],
)
def test_paths_are_cut_to_their_last_parts_and_nothing_else_is(text, public):
    assert public_text(text) == public


def test_a_path_with_blanks_is_known_where_it_exists(tmp_path):
    (tmp_path / "of maria").mkdir()
    assert public_text(str(tmp_path / "of maria")) == "of maria"


def test_a_models_words_stay_as_they_are():
    words = {"chat_template": "/home/x/y", "id2label": {"0": "/home/x"}, "added_tokens_decoder": {"1": "/home/x/y"}}
    config = {**words, "_name_or_path": "/home/x/y", "n": [1, None, {"deep": "/home/x/z"}]}
    assert without_local_paths(config) == {**words, "_name_or_path": "y", "n": [1, None, {"deep": "z"}]}
    assert is_config("1_Dense/config.json") and is_config("tokenizer_config.json") and not is_config("tokenizer.json")

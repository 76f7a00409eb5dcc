import json

import pytest

from remos_hf.adapters.teacher_configs import check_config, check_configs, check_depth
from remos_hf.errors import CorruptFileError, UnsupportedModelError


def write(folder, config, name="config.json"):
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "sdpa", "_attn_implementation_autoset": True, "experts_implementation": None},
        {"attn_implementation": {"": "eager", "text_config": "flash_attention_2"}},
        {"cache_implementation": "offloaded_hybrid_chunked"},
        {"attn_implementation": "paged|sdpa"},
        {"backbone": "resnet50", "use_pretrained_backbone": False, "use_kernels": False, "kernel_config": None},
        {"quantization_config": None, "torch_dtype": "torch.bfloat16", "dtype": "float32"},
        {"use_mamba_kernels": True, "conv_kernel_size": 4},
    ],
)
def test_what_comes_with_transformers_passes(tmp_path, config):
    check_configs(write(tmp_path, config))


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("wrapped", [dict, list])
def test_a_kernel_is_found_at_any_depth(tmp_path, depth, wrapped):
    config = {"My_Attn_Implementation": "evil/repo"}
    for _ in range(depth):
        config = {"part": config} if wrapped is dict else {"parts": [config]}
    with pytest.raises(UnsupportedModelError, match=r"My_Attn_Implementation.*'evil/repo'"):
        check_configs(write(tmp_path, config))


@pytest.mark.parametrize("value", ["evil/repo", "evil", ["eager"], 3, {"a": {"b": "evil/repo"}}, "../kernel", "paged|"])
def test_what_is_no_known_implementation_is_refused(tmp_path, value):
    if value == "paged|":
        check_configs(write(tmp_path, {"attn_implementation": value}))  # the default, paged
        return
    with pytest.raises(UnsupportedModelError, match="attn_implementation"):
        check_configs(write(tmp_path, {"attn_implementation": value}))


@pytest.mark.parametrize(
    "name", ["generation_config.json", "preprocessor_config.json", "processor_config.json", "my_config.json"]
)
def test_every_config_of_the_folder_is_looked_at(tmp_path, name):
    write(tmp_path, {})
    with pytest.raises(UnsupportedModelError, match=name):
        check_configs(write(tmp_path, {"attn_implementation": "evil/repo"}, name))


def test_a_vocabulary_is_found_in_the_folder_and_nowhere_else(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    check_config(path, {"special_tokens_map_file": "/elsewhere/x", "name_or_path": "a/b", "init_inputs": []})
    check_config(path, {"fast_tokenizer_files": ["tokenizer.4.0.0.json"], "vocab_file": None})
    for key, value in (("vocab_file", "v.txt"), ("source_spm", "/a"), ("fast_tokenizer_files", ["a/tokenizer.4.json"])):
        with pytest.raises(UnsupportedModelError, match=key):
            check_config(path, {key: value})


def test_absurd_numbers_and_nesting_are_refused(tmp_path):
    write(tmp_path, {"text_config": {"num_hidden_layers": 1001}})
    check_depth(tmp_path, 5000)
    with pytest.raises(CorruptFileError, match="1,001 layers"):
        check_depth(tmp_path, 10)
    deep = {}
    for _ in range(150):
        deep = {"a": deep}
    with pytest.raises(CorruptFileError, match="nested"):
        check_configs(write(tmp_path, deep))


def test_a_folder_without_a_config_says_where_one_comes_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        check_configs(tmp_path)

"""What a hostile or broken teacher looks like on disk: each function damages a folder, and says what has to be named.

Every pickle in here leaves a file `ran` beside the folder when it is opened.
"""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BODY = "bert.encoder.layer.1.attention.self.value.weight"
NORM = "bert.embeddings.LayerNorm.weight"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def bomb(folder, name):
    (folder / name).write_bytes(pickle.dumps(Bomb(folder.parent / "ran")))


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def set_deep(path, dotted, value):
    *parents, last = dotted.split(".")
    config = json.loads(path.read_text()) if path.exists() else {}
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    tensors |= change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def indexed(folder, shard="model-00001-of-00001.safetensors"):
    """Turn the one file into a shard that an index names."""
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    return names


def only_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    bomb(folder, "pytorch_model.bin")
    return "pytorch_model.bin"


def a_pickle_in_the_index(folder):
    names = indexed(folder)
    bomb(folder, "model-00001-of-00001.bin")
    edit_json(folder / INDEX, weight_map=dict.fromkeys(names, "model-00001-of-00001.bin"))
    return "model-00001-of-00001.bin"


def a_path_upwards_in_the_index(folder):
    names = indexed(folder)
    (folder / "model-00001-of-00001.safetensors").rename(folder.parent / "outside.safetensors")
    edit_json(folder / INDEX, weight_map=dict.fromkeys(names, "../outside.safetensors"))
    return "../outside.safetensors"


def an_absolute_path_in_the_index(folder):
    names = indexed(folder)
    edit_json(folder / INDEX, weight_map=dict.fromkeys(names, str(folder / "model-00001-of-00001.safetensors")))
    return INDEX


def a_link_to_weights_elsewhere(folder):
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")
    return "elsewhere.safetensors"


def a_link_to_a_secret_vocabulary(folder):
    (folder / "vocab.txt").rename(folder.parent / "secret.txt")
    (folder / "vocab.txt").symlink_to(folder.parent / "secret.txt")
    return "secret.txt"


def a_missing_weight(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[BODY]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return BODY


def a_missing_norm_in_shards(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[NORM]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    indexed(folder)
    return NORM


def a_misshapen_weight(folder):
    edit_tensors(folder, lambda tensors: {BODY: tensors[BODY][:-1].clone()})
    return BODY


def a_misshapen_norm(folder):
    edit_tensors(folder, lambda tensors: {NORM: tensors[NORM][:-1].clone()})
    return NORM


def more_layers_than_weights(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    return "bert.encoder.layer.2"


def layers_without_end(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**9)
    return "num_hidden_layers"


def labels_without_end(folder):
    edit_json(folder / "config.json", num_labels=10**9)
    return "num_labels"


def of_dtype(dtype, name=BODY):
    def damage(folder):
        edit_tensors(folder, lambda tensors: {name: tensors[name].to(dtype)})
        return name

    damage.__name__ = f"{str(dtype).removeprefix('torch.')}_weights"
    return damage


def not_finite(value, name):
    def damage(folder):
        edit_tensors(folder, lambda tensors: {name: tensors[name].index_fill(0, torch.tensor([3]), value)})
        return name

    damage.__name__ = f"{value}_in_{name.rpartition('.')[2]}"
    return damage


def an_adapter_beside(name):
    def damage(folder):
        (folder / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"}))
        return name

    damage.__name__ = f"{name}_beside"
    return damage


def programs_of_its_own(folder):
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoTokenizer": ["evil.T", None]}
    edit_json(folder / "config.json", model_type="evil", architectures=["EvilModel"], auto_map=code)
    return "auto_map"


def config_key(dotted, value, file="config.json"):
    def damage(folder):
        set_deep(folder / file, dotted, value)
        return dotted.rpartition(".")[2]

    damage.__name__ = f"{file}:{dotted}={str(value)[:24]}"
    return damage


EVIL = "evil-user/evil-repo"
IMPLEMENTATION_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "text_config.attn_implementation",
    "vision_config._attn_implementation_internal",
    "text_config.encoder.experts_implementation",
)
WEIGHTS_AND_FILES = [
    only_a_pickle,
    a_pickle_in_the_index,
    a_path_upwards_in_the_index,
    an_absolute_path_in_the_index,
    a_link_to_weights_elsewhere,
    a_link_to_a_secret_vocabulary,
    a_missing_weight,
    a_missing_norm_in_shards,
    a_misshapen_weight,
    a_misshapen_norm,
    more_layers_than_weights,
    layers_without_end,
    labels_without_end,
    *(of_dtype(dtype) for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64, torch.float64)),
    of_dtype(torch.int64, NORM),
    not_finite(float("nan"), NORM),
    not_finite(float("inf"), "bert.encoder.layer.0.output.dense.bias"),
    *(an_adapter_beside(name) for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")),
    programs_of_its_own,
]
CONFIG_KEYS = [
    *(config_key(key, EVIL) for key in IMPLEMENTATION_KEYS),
    config_key("attn_implementation", {"": "eager", "text_config": EVIL}),
    config_key("attn_implementation", f"paged|{EVIL}@main:kernel"),
    config_key("attn_implementation", "evil"),
    config_key("experts_implementation", "deepgemm"),
    config_key("attn_implementation", EVIL, "generation_config.json"),
    config_key("use_kernels", True),
    config_key("kernel_config", {"RMSNorm": EVIL}),
    config_key("text_config.quantization_config", {"quant_method": "fp8"}),
    config_key("transformers_weights", "../outside.safetensors"),
    config_key("configuration_files", ["config.4.0.0.json"]),
    config_key("backbone_config.backbone", EVIL),
    config_key("use_pretrained_backbone", True),
    config_key("dtype", "float8_e4m3fn"),
    config_key("vocab_file", "/etc/passwd", "tokenizer_config.json"),
    config_key("tokenizer_file", "../secret.json", "tokenizer_config.json"),
    config_key("fast_tokenizer_files", ["../tokenizer.4.0.0.json"], "tokenizer_config.json"),
    config_key("init_inputs", ["/etc/passwd"], "tokenizer_config.json"),
]
HOSTILE = [*WEIGHTS_AND_FILES, *CONFIG_KEYS]


def name_of(damage):
    return damage.__name__

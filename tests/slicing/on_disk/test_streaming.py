import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from remos_hf.adapters import architecture, teacher_files
from remos_hf.adapters.teacher_files import Checkpoint, StoredTensor
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import (
    CorruptFileError,
    LayerMismatchError,
    NonFiniteError,
    RemosError,
    TeacherMismatchError,
    UnsupportedModelError,
)
from remos_hf.layers import weights_hash
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.slicing.on_disk import streaming
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from remos_hf.slicing.refill import reset_outside, squares_outside
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from remos_hf.slicing.rules import RULES
from tests import tiny

NEW = architecture.get_model_conversion_mapping is not None


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=16,
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=30,
        hidden_size=9,
        intermediate_size=12,
        moe_intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=11,  # more than nine: sorted by number, not by name
        num_experts_per_tok=2,
        max_position_embeddings=16,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=16,
    )
    return transformers.GptOssForCausalLM(config)


def mobilenet():
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.1, num_labels=2)
    return transformers.MobileNetV2ForImageClassification(config)


def bart():
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(
        vocab_size=60, d_model=8, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16, **sizes
    )
    return transformers.BartForConditionalGeneration(config)


MAKERS = {
    "bert": tiny.bert,
    "gpt2": tiny.gpt2,
    "vit": tiny.vit,
    "bart": bart,
    "llama": tiny.llama,
    "bloom": tiny.bloom,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "mobilenet": mobilenet,
    "t5": tiny.t5,
}

T5_OPTIONS = {"profiled": False, "rule": "top_magnitude"}


def save(model, folder, shard="6KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder):
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype="auto")


def counts_for(layers, seed=0, samples=5):
    generator = torch.Generator().manual_seed(seed)
    ends = [
        {name: torch.randint(0, samples + 1, (getattr(layer, end),), generator=generator) for name, layer in layers}
        for end in ("in_neurons", "out_neurons")
    ]
    return CoverageProfile(*ends, samples, teacher_hash=weights_hash(dict(layers)))


def profile_of(model, seed=0, embeddings=False):
    return counts_for(list(adapter_for(model).layers(embeddings=embeddings).items()), seed)


def tensors_in(folder):
    found = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def same_bytes(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool((one.flatten().view(torch.uint8) == other.flatten().view(torch.uint8)).all())
    )


def both_ways(source, tmp_path, *, reset_to="zero", profiled=True, seed=0, **options):
    """Slice on disk and in memory, and give both folders, the result and the slice chosen in memory."""
    model = loaded(source)
    profile = profile_of(model, embeddings=options.get("embeddings", False)) if profiled else None
    streamed = slice_checkpoint(
        source, tmp_path / "streamed", profile=profile, reset_to=reset_to, seed=seed, progress=False, **options
    )
    relevant = choose_slice(model, profile, seed=seed, progress=False, **options)
    squares = squares_outside(model, relevant)
    reset_outside(model, relevant, to=reset_to, seed=seed)
    save(model, tmp_path / "held")
    assert streamed.squares_reset == pytest.approx(squares, rel=1e-9)
    return streamed, relevant, model


def assert_same(source, tmp_path, **options):
    streamed, relevant, _ = both_ways(source, tmp_path, **options)
    assert streamed.relevant_slice == relevant and streamed.relevant_slice.account == relevant.account
    written, held = tensors_in(tmp_path / "streamed"), tensors_in(tmp_path / "held")
    assert written.keys() == held.keys()
    assert [name for name in held if not same_bytes(written[name], held[name])] == []
    return streamed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of small teachers, in several shards, made once and never written to."""
    folders = {}

    def folder_of(kind, dtype=torch.float32):
        if (kind, dtype) not in folders:
            folder = tmp_path_factory.mktemp(f"{kind}_{str(dtype).removeprefix('torch.')}")
            folders[kind, dtype] = save(MAKERS[kind]().to(dtype), folder)
        return folders[kind, dtype]

    return folder_of


@pytest.fixture
def source(saved, tmp_path):
    """A teacher of its own for each test, in several shards."""
    return Path(shutil.copytree(saved("bert"), tmp_path / "teacher"))


def top(source, target, **options):
    options = {"slice_ratio": 0.8, "rule": "top_magnitude", "progress": False} | options
    return slice_checkpoint(source, target, **options)


@pytest.mark.parametrize("reset_to", ["zero", "init"])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_model_is_sliced_as_it_is_in_memory(saved, tmp_path, kind, reset_to):
    source = saved(kind)
    assert len(list(source.glob("*.safetensors"))) > 1
    options = T5_OPTIONS if kind == "t5" else {}
    streamed = assert_same(source, tmp_path, slice_ratio=0.7, reset_to=reset_to, seed=3, **options)
    assert 0 < streamed.squares_reset < 1
    assert streamed.relevant_slice.num_kept < streamed.relevant_slice.num_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_scope_and_dtype_gives_the_bits_of_the_model_in_memory(saved, tmp_path, rule, scope, dtype):
    source = saved("gpt2", dtype)
    reset_to = "init" if scope == "layer" else "zero"
    assert_same(source, tmp_path, slice_ratio=0.6, rule=rule, scope=scope, seed=5, reset_to=reset_to)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_ratios_and_shards_give_the_same_slice(tmp_path, seed):
    draw = np.random.default_rng(seed)
    hidden, layers = 4 * int(draw.integers(1, 7)), int(draw.integers(1, 4))
    model = tiny.bert(seed, layers=layers, hidden=hidden)
    source = save(model, tmp_path / "teacher", shard=f"{draw.integers(1, 40)}KB")
    ties = ("mean", "artifact")[seed % 2]
    assert_same(source, tmp_path, slice_ratio=float(draw.uniform(0.01, 1)), ties=ties, seed=seed)


@pytest.mark.parametrize(("kind", "competes"), [("gpt2", True), ("bart", False), ("llama", True)])
def test_embeddings_compete_too_unless_they_are_tied_to_the_head(saved, tmp_path, kind, competes):
    streamed = assert_same(saved(kind), tmp_path, slice_ratio=0.5, embeddings=True, profiled=False, rule="mag_prune")
    kept = streamed.relevant_slice.kept
    assert any("emb" in name or "wte" in name or "shared" in name for name in kept) == competes


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_every_expert_competes_however_it_is_stored(saved, tmp_path, kind):
    source = saved(kind)
    kept = top(source, tmp_path / "student").relevant_slice.kept
    stored = sum(
        tensor.numel() for name, tensor in tensors_in(source).items() if ".experts." in name and "bias" not in name
    )
    assert stored == sum(shape.numel() for name, shape in kept.shapes.items() if ".experts." in name)


def test_a_head_that_is_named_is_spared(saved, tmp_path):
    head = ("bert.encoder.layer.1", "classifier", "bert.pooler")
    streamed = assert_same(
        saved("bert"), tmp_path, slice_ratio=0.5, profiled=False, rule="top_magnitude", head=head, reset_to="init"
    )
    assert {name.split(".")[3] for name in streamed.relevant_slice.kept} == {"0"}


def test_pieces_smaller_than_a_weight_give_the_same_file(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE", 24)
    monkeypatch.setattr(streaming, "_COPIED_BYTES", 11)
    assert_same(saved("gpt2"), tmp_path, slice_ratio=0.6, reset_to="init")


def test_modules_kept_in_float32_are_ranked_in_float32(saved, tmp_path):
    streamed, relevant, model = both_ways(saved("t5", torch.float16), tmp_path, slice_ratio=0.6, **T5_OPTIONS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}
    assert streamed.relevant_slice == relevant and streamed.relevant_slice.account == relevant.account


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("bfloat16", None)]
)
def test_the_dtype_of_the_config_or_else_of_the_file_is_compared(saved, tmp_path, stored, dtype):
    source = Path(shutil.copytree(saved("bert", getattr(torch, stored)), tmp_path / "teacher"))
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", config.pop("torch_dtype", None))
    if dtype is not None:
        config["dtype"] = dtype
    (source / "config.json").write_text(json.dumps(config))
    streamed, relevant, model = both_ways(source, tmp_path, slice_ratio=0.6)
    assert model.dtype == getattr(torch, dtype or stored)
    assert streamed.relevant_slice == relevant and streamed.relevant_slice.account == relevant.account
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "streamed").values()} == {getattr(torch, stored)}


@pytest.mark.parametrize("named", ["BertModel", "BertForSequenceClassification"])
@pytest.mark.parametrize("with_head", [True, False])
def test_a_base_model_and_one_with_a_head_read_the_files_of_each_other(tmp_path, named, with_head):
    model = tiny.bert()
    source = save(model if with_head else model.bert, tmp_path / "teacher")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": [named]}))
    streamed, relevant, held = both_ways(source, tmp_path, slice_ratio=0.7, reset_to="init")
    assert streamed.relevant_slice == relevant and streamed.relevant_slice.account == relevant.account
    again = loaded(tmp_path / "streamed").base_model.state_dict()
    expected = held.base_model.state_dict()
    assert again.keys() == expected.keys()
    assert all(same_bytes(again[name], expected[name]) for name in expected)


def test_all_but_the_reset_weights_is_the_teachers_byte_for_byte(source, tmp_path):
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "vocab.txt").write_bytes(b"\x00\xff[PAD]\r\n")
    result = top(source, tmp_path / "student")
    before, after = tensors_in(source), tensors_in(tmp_path / "student")
    for name, tensor in before.items():
        if name in result.relevant_slice.kept:
            tensor = torch.where(result.relevant_slice.kept[name], tensor, 0)
        assert same_bytes(tensor, after[name]), name
    for path in source.iterdir():
        written = tmp_path / "student" / path.name
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # the header, with its metadata, and the size
            header = 8 + struct.unpack("<Q", content[:8])[0]
            assert written.read_bytes()[:header] == content[:header]
            assert written.stat().st_size == len(content)
        else:
            assert written.read_bytes() == content


def test_the_files_say_how_they_were_made(source, tmp_path):
    profile = profile_of(loaded(source))
    result = slice_checkpoint(source, tmp_path / "student", slice_ratio=0.8, profile=profile, progress=False)
    assert RelevantSlice.from_pretrained(tmp_path / "student") == result.relevant_slice
    assert CoverageProfile.load(tmp_path / "student") == profile
    assert result.files == sorted(path.name for path in (tmp_path / "student").iterdir())
    assert {"remos_slice.safetensors", COVERAGE_FILE, "config.json"} <= set(result.files)
    assert result.seconds.keys() == {"choose", "reset"}
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_one_file_without_an_index_and_an_empty_target_will_do(tmp_path):
    source = save(tiny.bert(), tmp_path / "teacher", shard="1GB")
    (tmp_path / "held").mkdir()
    (tmp_path / "streamed").mkdir()
    streamed = assert_same(source, tmp_path, slice_ratio=0.5)
    assert "model.safetensors" in streamed.files


# ---- memory


def test_no_two_weights_are_held_at_once(saved, tmp_path, monkeypatch):
    alive, most, reads, original = {}, [0], [0], teacher_files.read_values

    def traced(file, count, dtype, path):
        read = original(file, count, dtype, path)
        memory = np.empty(count * dtype.itemsize, dtype=np.uint8)
        reads[0] += 1
        alive[reads[0]] = memory.nbytes
        weakref.finalize(memory, alive.pop, reads[0])  # a tensor over the array keeps it alive, and so does any view
        most[0] = max(most[0], sum(alive.values()))
        tensor = torch.from_numpy(memory).view(dtype)
        return tensor.copy_(read)

    source = saved("gpt2")
    profile = profile_of(loaded(source))
    monkeypatch.setattr(teacher_files, "read_values", traced)
    monkeypatch.setattr(streaming, "read_values", traced)
    for number, (scope, ties) in enumerate([("model", "mean"), ("model", "artifact"), ("layer", "mean")]):
        slice_checkpoint(
            source, tmp_path / str(number), slice_ratio=0.7, profile=profile, scope=scope, ties=ties, progress=False
        )
    assert reads[0] > 3 * 8 * 5
    assert most[0] == max(
        4 * shape.numel() for shape in top(source, tmp_path / "x").relevant_slice.kept.shapes.values()
    )
    assert not alive


def test_no_more_than_a_piece_is_read_while_writing(source, tmp_path, monkeypatch):
    counts, original = [], teacher_files.read_values
    monkeypatch.setattr(streaming, "_PIECE", 64)
    monkeypatch.setattr(streaming, "read_values", lambda *args: counts.append(args[1]) or original(*args))
    monkeypatch.setattr(StoredTensor, "read", lambda self: load_file(self.path)[self.name])
    relevant = top(source, tmp_path / "student").relevant_slice
    assert max(counts) == 64
    assert sum(counts) > relevant.num_weights  # what lies outside the slice is looked at too


# ---- nothing by halves


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def slow_writer(source, target, ready):
    original = streaming._Writing.write_shard

    def one_shard_then_wait(*args):
        original(*args)
        ready.set()
        time.sleep(60)

    streaming._Writing.write_shard = one_shard_then_wait
    top(source, target)


def test_a_killed_process_leaves_no_target_and_the_next_one_succeeds(source, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=slow_writer, args=(source, tmp_path / "student", ready))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(FileExistsError, match="another process is writing"):
            top(source, tmp_path / "student")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    assert left(tmp_path) == [".student.writing", "teacher"]
    (tmp_path / ".student.writing" / "stale.json").write_text("{}")
    result = top(source, tmp_path / "student")
    assert left(tmp_path) == ["student", "teacher"]
    assert "stale.json" not in result.files


def interrupt(*args):
    raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "copy_side_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        top(source, tmp_path / "new" / "deeper" / "student")
    assert left(tmp_path) == ["teacher"]


def test_a_write_that_the_system_refuses_leaves_nothing(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(RemosError, match=r"could not be written .*large") as caught:
            top(source, tmp_path / "student")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert left(tmp_path) == ["teacher"]


def test_a_full_disk_is_noticed_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(streaming._Writing, "write_shard", interrupt)
    with pytest.raises(RemosError, match="1,000 free"):
        top(source, tmp_path / "student")
    assert left(tmp_path) == ["teacher"]


@pytest.mark.parametrize("occupied", ["student", "teacher"])
def test_a_target_that_is_not_empty_is_refused(source, tmp_path, occupied):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        top(source, tmp_path / occupied)
    assert left(tmp_path / "student") == ["precious.txt"]
    assert left(tmp_path) == ["student", "teacher"]


def test_a_target_that_fills_up_meanwhile_is_left_alone(source, tmp_path, monkeypatch):
    original = Checkpoint.check_unchanged

    def someone_else_writes(self):
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "precious.txt").write_text("mine")
        original(self)

    monkeypatch.setattr(Checkpoint, "check_unchanged", someone_else_writes)
    with pytest.raises(FileExistsError, match="not replaced"):
        top(source, tmp_path / "student")
    assert left(tmp_path / "student") == ["precious.txt"]
    assert left(tmp_path) == ["student", "teacher"]


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    (tmp_path / ".student.writing").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="link"):
        top(source, tmp_path / "student")
    assert left(tmp_path / "mine") == ["precious.txt"]


# ---- a hostile or broken teacher


def shards(source):
    return sorted(source.glob("*.safetensors"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(source, change):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_tensor(source, name, change):
    for path in shards(source):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise KeyError(name)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
VALUE = "bert.encoder.layer.1.attention.self.value.weight"


def truncate(source):
    shards(source)[1].write_bytes(shards(source)[1].read_bytes()[:-10])


def cut_header(source):
    shards(source)[0].write_bytes(b"\x10\x00")


def lose_a_shard(source):
    shards(source)[1].unlink()


def point_outside(source):
    shutil.copy(shards(source)[0], source.parent / "x.safetensors")
    edit_index(source, lambda weight_map: weight_map.update({QUERY: "../x.safetensors"}))


def point_to_root(source):
    edit_index(source, lambda weight_map: weight_map.update({QUERY: "/etc/passwd"}))


def lose_a_shard_in_the_index(source):
    gone = shards(source)[1].name
    edit_index(source, lambda weight_map: [weight_map.pop(n) for n, file in list(weight_map.items()) if file == gone])


def lose_a_tensor_in_the_index(source):
    edit_index(source, lambda weight_map: weight_map.pop(QUERY))


def name_a_tensor_that_is_nowhere(source):
    edit_index(source, lambda weight_map: weight_map.update({"nowhere": shards(source)[0].name}))


def name_the_wrong_shard(source):
    def swap(weight_map):
        weight_map[QUERY] = next(file for file in weight_map.values() if file != weight_map[QUERY])

    edit_index(source, swap)


def two_of_one_name(source):
    tensors = load_file(shards(source)[0])
    name = next(iter(tensors))
    last = shards(source)[-1]
    save_file(load_file(last) | {name: tensors[name]}, last, metadata={"format": "pt"})


def repeat_in_the_index(source):
    path = source / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{QUERY}": "a.safetensors",'))


def break_the_index(source):
    (source / "model.safetensors.index.json").write_text("[" * 100_000)


def empty_the_index(source):
    edit_json(source / "model.safetensors.index.json", weight_map={})


def break_the_config(source):
    (source / "config.json").write_text("{")


def leak_a_file(source):
    (source.parent / "secret.txt").write_text("secret")
    (source / "vocab.txt").symlink_to(source.parent / "secret.txt")


def not_finite(source):
    edit_tensor(source, VALUE, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")))


def int8(source):
    edit_tensor(source, VALUE, lambda tensor: tensor.to(torch.int8))


def wrong_shape(source):
    edit_tensor(source, VALUE, lambda tensor: tensor[:-1].clone())


def lose_a_weight(source):
    for path in shards(source):
        tensors = load_file(path)
        if tensors.pop(VALUE, None) is not None:
            save_file(tensors, path, metadata={"format": "pt"})
    edit_index(source, lambda weight_map: weight_map.pop(VALUE))


def double_by_prefix(source):
    path = shards(source)[0]
    name = VALUE.removeprefix("bert.")
    save_file(load_file(path) | {name: torch.zeros(16, 16)}, path, metadata={"format": "pt"})
    edit_index(source, lambda weight_map: weight_map.update({name: path.name}))


def other_framework(source):
    save_file(load_file(shards(source)[0]), shards(source)[0], metadata={"format": "flax"})


def only_pickles(source):
    for path in [*shards(source), source / "model.safetensors.index.json"]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")


def quantised(source):
    edit_json(source / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def unknown_architecture(source):
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (source / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_json(source / "config.json", model_type="evil", architectures=["EvilModel"], auto_map=code)


def architecture_is_a_function(source):
    edit_json(source / "config.json", architectures=["pipeline"])


def architecture_of_another_config(source):
    edit_json(source / "config.json", architectures=["GPT2Model"])


def abstract_architecture(source):
    edit_json(source / "config.json", architectures=["PreTrainedModel"])


def absurd_sizes(source):
    edit_json(source / "config.json", num_attention_heads=3)


def adapters(source):
    (source / "adapter_config.json").write_text("{}")


def own_name_of_weights(source):
    edit_json(source / "config.json", transformers_weights="../x.safetensors")


def no_config(source):
    (source / "config.json").unlink()


def no_weights(source):
    for path in [*shards(source), source / "model.safetensors.index.json"]:
        path.unlink()


BROKEN = [
    (truncate, CorruptFileError, "truncated or broken"),
    (cut_header, CorruptFileError, "truncated or broken"),
    (lose_a_shard, CorruptFileError, "is not there"),
    (point_outside, CorruptFileError, "Nothing outside it is read"),
    (point_to_root, CorruptFileError, "Nothing outside it is read"),
    (lose_a_shard_in_the_index, CorruptFileError, "shards, but"),
    (lose_a_tensor_in_the_index, CorruptFileError, "does not name"),
    (name_a_tensor_that_is_nowhere, CorruptFileError, "'nowhere' is in"),
    (name_the_wrong_shard, CorruptFileError, "but it is not"),
    (two_of_one_name, CorruptFileError, "nothing says which one counts"),
    (repeat_in_the_index, CorruptFileError, "twice"),
    (break_the_index, CorruptFileError, "should be JSON"),
    (empty_the_index, CorruptFileError, "weight_map"),
    (break_the_config, CorruptFileError, "should be JSON"),
    (leak_a_file, CorruptFileError, "outside the checkpoint"),
    (not_finite, NonFiniteError, "layer.1.attention.self.value"),
    (int8, UnsupportedModelError, "its dtype is I8"),
    (wrong_shape, UnsupportedModelError, r"\(15, 16\)"),
    (lose_a_weight, UnsupportedModelError, "lacks .*layer.1.attention.self.value.weight"),
    (double_by_prefix, UnsupportedModelError, "nothing says which one"),
    (other_framework, UnsupportedModelError, "flax"),
    (only_pickles, UnsupportedModelError, "pytorch_model.bin"),
    (quantised, UnsupportedModelError, "quantised"),
    (unknown_architecture, UnsupportedModelError, "auto_map"),
    (architecture_is_a_function, UnsupportedModelError, "pipeline"),
    (architecture_of_another_config, UnsupportedModelError, "GPT2Model"),
    (abstract_architecture, UnsupportedModelError, "PreTrainedModel"),
    (absurd_sizes, UnsupportedModelError, "cannot be built"),
    (adapters, UnsupportedModelError, "adapter_config.json"),
    (own_name_of_weights, UnsupportedModelError, "transformers_weights"),
    (no_config, FileNotFoundError, "snapshot_download"),
    (no_weights, FileNotFoundError, "model.safetensors"),
]


@pytest.mark.parametrize(("damage", "error", "says"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_broken_or_hostile_teacher_gets_its_own_error_and_leaves_nothing(source, tmp_path, damage, error, says):
    damage(source)
    before = left(tmp_path)
    with pytest.raises(error, match=f"(?s){says}"):
        top(source, tmp_path / "student")
    assert left(tmp_path) == before


@pytest.mark.parametrize("rule", ["mag_prune", "random", "top_magnitude"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_every_rule_refuses_weights_that_are_not_finite(source, tmp_path, rule, ratio):
    not_finite(source)
    with pytest.raises(NonFiniteError):
        top(source, tmp_path / "student", rule=rule, slice_ratio=ratio)


def test_a_side_file_that_holds_a_list_is_copied_as_it_is(source, tmp_path):
    (source / "data_config.json").write_text("[1, 2]\n")
    assert "data_config.json" in top(source, tmp_path / "student").files
    assert (tmp_path / "student" / "data_config.json").read_text() == "[1, 2]\n"


def test_remote_code_of_a_known_architecture_is_neither_run_nor_passed_on(source, tmp_path):
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (source / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_json(source / "config.json", auto_map=code)
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "x": 1}))
    for pickle in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"):
        (source / pickle).write_bytes(b"pickle")
    for other in (".hidden.json", "remos_config.json", "trainer_state.json", "pytorch_model.bin.index.json"):
        (source / other).write_text("{}")
    result = top(source, tmp_path / "student")
    written = {name for name in result.files if not name.startswith("model-")}
    assert written == {
        "config.json",
        "model.safetensors.index.json",
        "remos_slice.safetensors",
        "tokenizer_config.json",
    }
    assert "auto_map" not in (tmp_path / "student" / "config.json").read_text()
    assert json.loads((tmp_path / "student" / "tokenizer_config.json").read_text()) == {"x": 1}


def test_the_folders_of_sentence_transformers_come_along(source, tmp_path):
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Dense"}, {"idx": 2, "path": "../teacher"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Dense").mkdir()
    (source / "onnx").mkdir()
    for path in ("1_Dense/config.json", "1_Dense/model.safetensors", "1_Dense/pytorch_model.bin", "onnx/config.json"):
        (source / path).write_text("{}")
    files = top(source, tmp_path / "student").files
    assert [name for name in files if "/" in name] == ["1_Dense/config.json", "1_Dense/model.safetensors"]
    assert "modules.json" in files


def test_links_into_the_hubs_cache_are_followed(source, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        path.rename(blobs / path.name.replace(".", "_"))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name.replace(".", "_")))
    top(snapshot, tmp_path / "student")
    assert not any(path.is_symlink() for path in (tmp_path / "student").iterdir())
    assert loaded(tmp_path / "student") is not None


def test_a_weight_saved_under_both_its_names_is_reset_in_both(saved, tmp_path):
    source = Path(shutil.copytree(saved("gpt2"), tmp_path / "teacher"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(source)
    path = shards(source)[0]

    def with_copy(change):
        table = tensors_in(source)["transformer.wte.weight"]
        save_file(load_file(path) | {"lm_head.weight": change(table)}, path, metadata={"format": "pt"})
        edit_index(source, lambda weight_map: weight_map.update({"lm_head.weight": path.name}))

    with_copy(torch.clone)
    options = {"slice_ratio": 0.5, "embeddings": True, "head": (), "progress": False, "rule": "mag_prune"}
    result = top(source, tmp_path / "student", **options)
    written = tensors_in(tmp_path / "student")
    assert same_bytes(written["transformer.wte.weight"], written["lm_head.weight"])
    assert not result.relevant_slice.kept["transformer.wte.weight"].all()
    assert torch.equal(written["lm_head.weight"] != 0, result.relevant_slice.kept["transformer.wte.weight"])
    held = transformers.GPT2LMHeadModel.from_pretrained(source, dtype="auto")
    relevant = choose_slice(held, **options)
    assert relevant == result.relevant_slice
    assert result.squares_reset == pytest.approx(squares_outside(held, relevant), rel=1e-9)
    with_copy(lambda table: table + 1)
    with pytest.raises(UnsupportedModelError, match="differ"):
        top(source, tmp_path / "other", **options)


@pytest.mark.skipif(not NEW, reason="transformers 4 loads tensors as they are")
def test_a_tensor_that_is_changed_as_it_is_loaded_is_refused_by_name(source, tmp_path, monkeypatch):
    from transformers.core_model_loading import Transpose

    def transposing(model):
        pattern = "attention.self.value.weight"
        return [architecture.WeightConverter([pattern], pattern, operations=[Transpose(0, 1)])]

    monkeypatch.setattr(architecture, "get_model_conversion_mapping", transposing)
    with pytest.raises(UnsupportedModelError, match=r"0\.attention\.self\.value\.weight.*use choose_slice"):
        top(source, tmp_path / "student")


def test_a_profile_of_other_weights_or_another_model_is_refused(source, saved, tmp_path):
    with pytest.raises(TeacherMismatchError):
        slice_checkpoint(source, tmp_path / "s", slice_ratio=0.5, profile=profile_of(tiny.bert(1)), progress=False)
    with pytest.raises(LayerMismatchError):
        slice_checkpoint(source, tmp_path / "s", slice_ratio=0.5, profile=profile_of(tiny.gpt2()), progress=False)
    assert left(tmp_path) == ["teacher"]


def test_a_slice_that_could_not_be_reset_in_memory_is_not_written_either(saved, tmp_path):
    with pytest.raises(LayerMismatchError, match="lm_head"):
        top(saved("t5"), tmp_path / "student", head=())
    assert left(tmp_path) == []


@pytest.mark.parametrize("change", ["grow", "shrink"])
def test_a_teacher_that_is_written_to_meanwhile_is_noticed(source, tmp_path, monkeypatch, change):
    original = streaming._Writing.write_shard
    content = shards(source)[-1].read_bytes()

    def meddle(*args):
        shards(source)[-1].write_bytes(content + b"x" if change == "grow" else content[:-8])
        original(*args)

    monkeypatch.setattr(streaming._Writing, "write_shard", meddle)
    with pytest.raises(CorruptFileError, match="while it was read"):
        top(source, tmp_path / "student")
    assert left(tmp_path) == ["teacher"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"slice_ratio": 1.2}, "between 0 and 1"),
        ({"rule": "best"}, "rule is one of"),
        ({"rule": "remos"}, "needs a profile"),
        ({"scope": "all"}, "scope"),
        ({"ties": "none"}, "ties"),
        ({"reset_to": "one"}, "reset_to"),
        ({"head": ("nowhere",)}, "head names modules"),
    ],
)
def test_arguments_out_of_range_are_refused(source, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        top(source, tmp_path / "student", **options)
    assert left(tmp_path) == ["teacher"]

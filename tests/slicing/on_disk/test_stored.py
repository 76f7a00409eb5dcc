import pytest
import torch

from remos_hf.adapters.architecture import on_meta, place_tensors
from remos_hf.adapters.teacher_files import Checkpoint
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.slicing.on_disk.stored import find_stored
from tests.slicing.on_disk.test_streaming import MAKERS


@pytest.mark.parametrize("kind", MAKERS)
def test_a_stored_layer_reads_what_the_loaded_model_holds(tmp_path, kind):
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    blank = on_meta(model.config, type(model))
    stored = find_stored(blank, adapter_for(blank).layers(), place_tensors(blank, Checkpoint.in_folder(tmp_path)))
    held = adapter_for(model).layers()
    assert list(stored) == list(held)
    for name, layer in stored.items():
        assert torch.equal(layer.weight, held[name].weight) and layer.shape == held[name].shape, name
        assert (layer.key, layer.dtype, layer.device) == (held[name].key, held[name].dtype, torch.device("cpu"))

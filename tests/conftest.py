"""Set-up for all tests: no network, one thread, a home of their own, a fixed seed."""

import gc
import importlib.util
import os
import tempfile

# Before torch and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="remos_hf_home_")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    for name in ("timm", "trl"):
        if importlib.util.find_spec(name) is None:
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"{name} is not installed"))


def pytest_collection_finish():
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _imports_set_aside():
    # Trainer collects garbage when it ends: half a second over all that was imported so far, unless that is set aside.
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    # TrainingArguments(bf16=True) of transformers 4 leaves it to all that come after.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture
def no_hooks_left():
    """Check after the test that the modules it names hold no forward hook."""
    modules = []
    yield modules.append
    for model in modules:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

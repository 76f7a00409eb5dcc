import subprocess
import sys

import pytest

import remos_hf


def test_every_public_name_loads():
    for name in remos_hf.__all__:
        assert getattr(remos_hf, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = remos_hf.nothing


def test_importing_the_package_loads_neither_torch_nor_transformers():
    loaded = (
        "import sys, remos_hf; print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"

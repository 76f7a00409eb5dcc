from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.defects import attacked


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return attacked.world_in(tmp_path_factory.mktemp("textattack"))


@pytest.fixture(scope="session", params=["textfooler", "kuleshov"])
def made(request, world, tmp_path_factory, worker_id):
    """An exposed set of each recipe, with the folder that it was kept in.

    An attack starts a process that imports TextAttack, seconds each: it is made once for all processes of a test run.
    """
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    cache = shared / f"attacked-{request.param}"
    with FileLock(f"{cache}.lock"):
        exposed = attacked.attacked(world, request.param, cache=cache)
    return SimpleNamespace(recipe=request.param, exposed=exposed, cache=cache)


@pytest.fixture
def picture_file(tmp_path):
    """A picture of 12 x 6 pixels, opaque on the left, half transparent in the middle, and transparent on the right."""
    values = np.zeros((6, 12, 4), np.uint8)
    values[..., 0], values[..., 2] = 200, 90
    values[:, :4, 3], values[:, 4:8, 3] = 255, 51
    Image.fromarray(values, "RGBA").save(tmp_path / "trigger.png")
    return str(tmp_path / "trigger.png")

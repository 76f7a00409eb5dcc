"""A hub on loopback that this process may reach, and students to push to it."""

import socket

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.slice_and_reset import Remos
from tests import tiny
from tests.loopback_hub import Hub

TOKEN = "hf_right"


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Let this process reach loopback, and nothing else: the rest of the suite is offline."""
    forget = getattr(_http, "close_session", None) or _http.reset_sessions

    look_up = socket.getaddrinfo

    def only_loopback(host, *arguments, **options):
        assert host in ("127.0.0.1", "localhost"), f"a test asked for {host}"
        return look_up(host, *arguments, **options)

    def reach(url):
        # These are read once, when huggingface_hub is imported; the template in both modules, by its version.
        for place in (constants, file_download):
            name = "HUGGINGFACE_CO_URL_TEMPLATE"
            monkeypatch.setattr(place, name, f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}", raising=False)
        monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks another protocol
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        forget()

    yield reach
    monkeypatch.undo()
    forget()


@pytest.fixture
def hub(online):
    hub = Hub(tokens={TOKEN}).start()
    online(hub.url)
    yield hub
    hub.stop()


@pytest.fixture
def made():
    """A small student that ReMoS started, and its record."""
    student, strategy = tiny.bert(), Remos(0.9)
    record = Sidecars.of(strategy, strategy.prepare(student, tiny.student_data()), student)
    return student, record


@pytest.fixture
def folder(made, tmp_path):
    """A student as RemosTrainer saves it, and what lies about in such a folder."""
    student, record = made
    place = tmp_path / "student"
    student.save_pretrained(place)
    record.save(place)
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-4/model.safetensors", ".cache/x", "_tmp/y", "a.pkl"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"junk")
    (place / "weights.dat").write_bytes(b"\x80\x04pickled by another name")
    (place / "notes.txt").write_text("mine")
    return place

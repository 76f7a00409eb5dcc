import runpy
import sys

import pytest


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["remos", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("remos_hf.cli", run_name="__main__")
    assert ended.value.code == 0 and "profile" in capsys.readouterr().out

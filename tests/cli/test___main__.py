import runpy
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["remos", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("remos_hf.cli", run_name="__main__")
    assert ended.value.code == 0 and "profile" in capsys.readouterr().out


def test_without_the_extra_it_says_so_in_one_line():
    code = "import runpy, sys\nsys.modules['typer'] = None\nrunpy.run_module('remos_hf.cli', run_name='__main__')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 1 and told.stdout == ""
    assert told.stderr == "remos: The command remos needs typer: pip install 'remos_hf[cli]'.\n"

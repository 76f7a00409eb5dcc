import logging
import sys
import warnings

import datasets
from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

from remos_hf.cli.console import manners


def test_in_a_pipe_nothing_is_said_but_warnings_of_ours(capsys):
    with manners() as seen:
        print("chatter")  # noqa: T201
        logging.getLogger("remos_hf.x").info("a student")
        logging.getLogger("remos_hf.x").warning("half of it")
        warnings.warn("remos_hf: most weights tie", stacklevel=1)
        warnings.warn("torch is deprecated", FutureWarning, stacklevel=1)
        assert list(tqdm(range(3), disable=False)) == [0, 1, 2]
        assert datasets.are_progress_bars_disabled() and not hf_logging.is_progress_bar_enabled()
    told = capsys.readouterr()
    assert not seen and told.out == ""
    assert told.err.split("\n")[0].endswith("half of it") and told.err.count("\n") == 2
    assert told.err.endswith("Warning: remos_hf: most weights tie\n")
    with manners():
        warnings.warn("labels are matched by number. (remos_hf)", stacklevel=1)
    assert capsys.readouterr().err == "Warning: labels are matched by number.\n"
    assert list(tqdm(range(3))) == [0, 1, 2] and "3/3" in capsys.readouterr().err


def test_on_a_terminal_and_for_debugging_all_is_said_on_stderr(capsys, monkeypatch):
    with manners(debug=True):
        print("chatter")  # noqa: T201
        logging.getLogger("remos_hf.x").info("a student")
    told = capsys.readouterr()
    assert told.out == "" and "chatter" in told.err and "a student" in told.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with manners() as seen:
        logging.getLogger("remos_hf.x").info("a student")
    assert seen and "a student" in capsys.readouterr().err


def test_settings_are_put_back_even_after_an_error():
    datasets.enable_progress_bars()
    hf_logging.set_verbosity_warning()
    ours = logging.getLogger("remos_hf")
    before = (ours.level, ours.propagate, list(ours.handlers), warnings.showwarning, sys.stdout)
    try:
        with manners():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (ours.level, ours.propagate, list(ours.handlers), warnings.showwarning, sys.stdout) == before
    assert not datasets.are_progress_bars_disabled() and hf_logging.get_verbosity() == hf_logging.WARNING
    hf_logging.set_verbosity_error()


def test_a_bar_is_a_line_a_minute_in_a_log(capsys, monkeypatch):
    now = [0.0]
    for name in ("time.monotonic", "tqdm.std.time"):
        monkeypatch.setattr(name, lambda: now[0])
    with manners():
        for _ in tqdm(range(30), desc="Profiling", unit="batch", mininterval=0, disable=None):
            now[0] += 20.0
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 9 and lines[0] == "Profiling: 3 of 30; about 9 minutes left", lines


def test_a_short_bar_says_nothing_in_a_log(capsys):
    with manners():
        list(tqdm(range(30), desc="Profiling", mininterval=0))
        tqdm(total=2000, unit="B", unit_scale=True, disable=None).update(1000)
    assert capsys.readouterr().err == ""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from remos_hf.cli import commands
from remos_hf.cli.options import ReportOptions
from remos_hf.errors import RemosError

ROOT = Path(__file__).parents[2]
COMMANDS = ("profile", "slice", "train", "audit", "scan", "explain", "report", "card", "push")


def started(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, argv)], env=environment, **pipes, **options)


@pytest.fixture
def doing(monkeypatch, remos):
    """Run `remos report x.json` with something else in place of what it does."""

    def run(does, *options):
        monkeypatch.setitem(commands._COMMANDS, "report", (ReportOptions, __name__, "stand_in"))
        monkeypatch.setattr(sys.modules[__name__], "stand_in", lambda asked, progress: does(), raising=False)
        return remos("report", "x.json", *options)

    return run


def raising(error):
    def does():
        raise error

    return does


# --- help ---


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom remos_hf.cli.commands import app\ntry:\n app(['slice', '--help'])\nexcept SystemExit: pass\n"
    )
    process = started("-c", f"{code}print(sorted({{'torch', 'transformers', 'datasets', 'numpy'}} & set(sys.modules)))")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.endswith("[]\n") and "--slice-ratio" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_examples_that_it_takes(remos, command):
    told = remos(command, "--help")
    assert told.exit_code == 0
    assert "Examples:" in told.output and f"remos {command} " in told.output and "--json" in told.output


def test_help_breaks_lines_by_the_terminals_width_alone(remos):
    assert "Interrupted, the same command with --resume goes on from there." in remos("train", "--help").output


def test_help_names_every_command(remos):
    told = remos("--help").output
    assert all(command in told for command in COMMANDS) and "--install-completion" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_does_is_where_it_is_looked_for(command):
    pytest.importorskip("matplotlib")
    _, home, name = commands._COMMANDS[command]
    assert callable(getattr(importlib.import_module(home), name))


def test_versions_are_told_and_nothing_heavy_is_loaded_for_it():
    code = "import sys\nfrom remos_hf.cli.commands import app\ntry:\n app(['--version'])\nexcept SystemExit: pass\n"
    process = started("-c", f"{code}print(sorted({{'torch', 'transformers'}} & set(sys.modules)))")
    out, err = process.communicate()
    assert process.returncode == 0, err
    told, loaded = out.splitlines()
    assert f"torch {version('torch')}, transformers {version('transformers')}, Python 3." in told
    assert told.startswith("remos_hf ") and loaded == "[]"


def test_without_typer_the_extra_is_named():
    code = "import sys\nsys.modules['typer'] = None\nimport remos_hf.cli.commands"
    process = started("-c", code)
    assert "pip install 'remos_hf[cli]'" in process.communicate()[1] and process.returncode == 1


# --- wrong usage ---


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["slice", "t", "-o", "x", "--slice-ratio", "0", "--rule", "random"], "above 0 and at most 1"),
        (["slice", "t", "-o", "x", "--slice-ratio", "1.2", "--rule", "random"], "but got 1.2"),
        (["slice", "t", "-o", "x", "--slice-ratio", "auto", "--rule", "random"], "--slice-ratio"),
        (["slice", "t", "-o", "x", "--slice-ratio", "0.9"], "give one of --coverage and --data"),
        (["slice", "t", "-o", "x", "--slice-ratio", "0.9", "--coverage", "a", "--data", "b"], "give one of"),
        (["slice", "t", "-o", "x", "--slice-ratio", "0.9", "--rule", "random", "--data", "b"], "looks at no data"),
        (["slice", "t", "-o", "x", "--slice-ratio", "0.9", "--rule", "biggest"], "'biggest' is not one of"),
        (["train", "t", "--train-data", "d", "-o", "x"], "give --slice-ratio"),
        (["train", "t", "--train-data", "d", "-o", "x", "--slice-ratio", "most"], "or auto, but got most"),
        (["train", "t", "--train-data", "d", "-o", "x", "--slice-ratio", "auto"], "--eval-data"),
        (
            ["train", "t", "--train-data", "d", "-o", "x", "--slice-ratio", "0.5", "--strategy", "retrain"],
            "slices nothing",
        ),
        (["audit", "t", "--data", "d", "-o", "x", "--slice-ratios", "0.9", "7"], "but got 7"),
        (["profile", "t", "--data", "d", "-o", "x", "--max-samples", "0"], "at least 1, or all, but got 0"),
        (["train", "t", "--train-data", "d", "-o", "x", "--max-samples", "all"], "--max-samples"),
        (["profile", "t", "--data", "d"], "--output"),
        (["profile", "t", "-o", "x", "--data", "d", "--criterion", "mean"], "'mean' is not one of"),
        (["prfile"], "prfile"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_was_wrong(remos, argv, told):
    result = remos(*argv)
    assert result.exit_code == 2 and result.stdout == ""
    assert told in " ".join(result.stderr.replace("│", " ").split())


def test_several_values_may_follow_an_option(monkeypatch, remos):
    asked = {}
    monkeypatch.setattr(commands, "_do", lambda command, options, as_json, debug: asked.update(vars(options)))
    several = ["--defects", "word", "ep", "--seeds", "3", "4", "--quick", "--slice-ratios", "0.9"]
    assert remos("audit", "t", "--data", "d", *several, "--slice-ratios", "0.5", "-o", "x").exit_code == 0
    assert (asked["defects"], asked["seeds"], asked["slice_ratios"]) == (["word", "ep"], [3, 4], [0.9, 0.5])
    assert (asked["teacher"], str(asked["output"])) == ("t", "x")
    assert remos("audit", "--seeds", "3", "--data", "d", "-o", "x", "--", "t").exit_code == 0
    assert asked["seeds"] == [3] and asked["teacher"] == "t"
    assert remos("audit", "t", "--data", "d", "-o", "x").exit_code == 0
    assert (asked["defects"], asked["seeds"], asked["slice_ratios"]) == ([], [0, 1, 2], [0.9])


# --- results and reasons ---


def test_the_result_is_on_stdout_as_text_or_as_json(doing):
    def does():
        print("chatter")  # noqa: T201 - of a library
        return {"share": 0.5}, "half of it"

    assert (doing(does).stdout, doing(does).exit_code) == ("half of it\n", 0)
    told = doing(does, "--json")
    assert json.loads(told.stdout) == {"share": 0.5} and told.stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("labels are\n whole numbers"),
        RemosError("labels are whole numbers"),
        FileNotFoundError("labels are whole numbers"),
    ],
)
def test_what_may_go_wrong_is_told_in_one_line(doing, error):
    told = doing(raising(error))
    assert (told.exit_code, told.stdout) == (1, "")
    assert told.stderr == "remos report: labels are whole numbers\n"


def test_a_command_speaks_of_options_where_python_speaks_of_arguments(doing):
    told = doing(raising(ValueError("name it by text_columns, or pass report_task=None; a max_samples_x stays")))
    assert told.stderr == "remos report: name it by --text-column, or pass --task None; a max_samples_x stays\n"
    told = doing(lambda: warnings.warn("see slice_ratio (remos_hf)", stacklevel=1) or ({}, "done"))
    assert told.stderr == "Warning: see --slice-ratio\n"


def test_options_are_those_of_the_command_at_hand():
    told = commands._in_options("push", "repo_id is 'user/name'; name one by text_columns (--text-column)")
    assert told == "REPO_ID is 'user/name'; name one by --text-column"
    assert commands._in_options("card", "repo_id is 'user/name'") == "--repo-id is 'user/name'"


def test_a_warning_of_the_profile_is_in_the_commands_terms(doing):
    said = "Leave criterion= at its default, or compare with TopMagnitude: under {'name': 'TopKCoverage'} (remos_hf)."
    told = doing(lambda: warnings.warn(said, stacklevel=1) or ({}, "done"))
    wanted = "Leave --criterion at its default, or compare with top_magnitude: under {'name': 'tknc'}."
    assert told.stderr == f"Warning: {wanted}\n"


def test_what_was_not_expected_says_how_to_see_more(doing):
    told = doing(raising(KeyError("rows")))
    assert told.exit_code == 1 and told.stderr.count("\n") == 1
    assert "KeyError: 'rows'" in told.stderr and "--debug" in told.stderr
    told = doing(raising(KeyError("rows")), "--debug")
    assert told.exit_code == 1 and "Traceback" in told.stderr and "raising" in told.stderr


def test_an_interruption_ends_with_130_and_says_what_is_kept(doing):
    told = doing(raising(KeyboardInterrupt("checkpoint-7 is kept.")))
    assert (told.exit_code, told.stdout, told.stderr) == (130, "", "Interrupted. checkpoint-7 is kept.\n")


# --- as a process ---


def test_ctrl_c_while_a_result_is_written_leaves_nothing_behind(tmp_path, teacher):
    # Stopped where the student is whole but not yet in its place. What a shell starts in the background ignores Ctrl-C,
    # and so do these tests and their children then.
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import remos_hf.cli.slicing as slicing\nfrom remos_hf.cli.commands import app\n"
        "save = slicing.Sidecars.save\n"
        "def slow(self, folder):\n save(self, folder)\n"
        " print('writing', file=sys.stderr, flush=True)\n time.sleep(60)\n"
        "slicing.Sidecars.save = slow\n"
        "app(['slice', sys.argv[1], '--rule', 'random', '--slice-ratio', '0.5', '-o', sys.argv[2]])"
    )
    process = started("-c", code, teacher, tmp_path / "a" / "s")
    while (line := process.stderr.readline()) not in ("writing\n", ""):
        pass
    assert line, "it ended before it wrote"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "") and err.startswith("Interrupted.")
    assert list(tmp_path.iterdir()) == []

import pytest

from remos_hf.auditing import run as run_module
from remos_hf.auditing.run import run_audit
from remos_hf.evaluation import tasks as tasks_module
from remos_hf.evaluation.measures import Rate
from tests.auditing.audits import BOTH, Log, small_audit, train_teacher


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(run_module, "_WAIT", 0.02)
    monkeypatch.setattr(tasks_module, "fine_tune", train_teacher)


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "audit"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An audit that nothing interrupted: its folder, report and log."""
    folder = tmp_path_factory.mktemp("whole")
    log = Log(folder / "log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks_module, "fine_tune", train_teacher)
        report = run_audit(small_audit(log, seeds=(0, 1)), folder / "audit", progress=False)
    return folder / "audit", report, log


@pytest.fixture
def retuned(monkeypatch):
    """Students that re-activation was asked for; the rates are made up."""
    asked = []

    def reactivate(student, trigger, dataset, *, test, exposed, task, plan, seed):
        assert trigger in BOTH.values() and (dataset.num_rows, test.num_rows) == (24, 20) and len(exposed) == 10
        asked.append((trigger.words[0], plan.counts, seed))
        return {count: Rate.of(count, plan.num_exposed) for count in plan.counts}

    monkeypatch.setattr(run_module, "reactivate", reactivate)
    return asked

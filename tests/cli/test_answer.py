from remos_hf.cli.answer import NOTHING_SAID, answered
from remos_hf.evaluation.measures import Rate
from remos_hf.judging.report import DefectReport


def report(**shares):
    """Plain fine-tuning alone, of a share of each defect; None: no sample could show it."""
    records = [
        {
            "task": "t",
            "defect": defect,
            "student": "finetune",
            "seed": seed,
            "acc": Rate.of(90, 100).to_dict(),
            "dir": (Rate.of(0, 0) if share is None else Rate.of(share, 100)).to_dict(),
            "made": {"strategy": {"name": "Finetune"}},
        }
        for defect, share in shares.items()
        for seed in (0, 1, 2)
    ]
    return DefectReport(records)


def test_what_cannot_be_said_ends_with_its_own_status_and_says_why():
    told, text, status = answered(report(word=None))
    assert status == [NOTHING_SAID] and not told["can_be_said"]
    assert list(told["cannot_be_said"]) == ["t: word"] and told["answer"] in " ".join(text.split())
    assert "t: word: Whether plain fine-tuning inherits the defect cannot be said: " in text


def test_a_table_too_wide_for_the_terminal_is_written_in_blocks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    narrow = answered(report(word=None, ep=90))[1]
    monkeypatch.setenv("COLUMNS", "1000")
    wide = answered(report(word=None, ep=90))[1]
    assert max(map(len, narrow.splitlines())) < max(map(len, wide.splitlines()))
    assert sum(line.startswith("ep ") for line in wide.splitlines()) == 1  # a row
    assert "\nep\n  what can be said: cannot be said" in narrow

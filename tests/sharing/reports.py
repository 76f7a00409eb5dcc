"""Defect reports made of counts: of an audit's own students, and of weights that were given."""

from remos_hf.defects.text_triggers import TriggerWords
from tests.judging import reports

OTHER_WEIGHTS = "f" * 64
DEFECTS = {"word": TriggerWords().to_dict()}
TASK = {"text_columns": ["text"], "label_column": "label", "defects": DEFECTS}


def audited(*several, defects=DEFECTS, **settings):
    """What an audit measured of its own students, three seeds each."""
    audits = {"SST-2": {**TASK, "students": {}, "defects": defects}}
    return reports.report(*(several or reports.USUAL), **{"audits": audits, **settings})


def measured(weights, several=reports.USUAL, *, student="remos 0.9", defects=DEFECTS, taught=None, **settings):
    """What was measured of given weights, and beside them of other given students."""
    records = [
        {**record, "given": {"weights": weights if record["student"] == student else OTHER_WEIGHTS, "from": "it"}}
        for of in several
        for record in of
        if record["seed"] == 0
    ]
    taught = {"given": reports.teachers()["word-0"]} if taught is None else taught
    return reports.report(records, taught=taught, **{"audits": {"SST-2": {**TASK, "defects": defects}}, **settings})

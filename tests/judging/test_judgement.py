from remos_hf.judging.judgement import judged
from tests.sharing.reports import report


def test_a_report_is_judged_defect_by_defect():
    found = judged(report())
    assert [one.section.defect for one in found.verdicts] == ["word"] and found.answer

import pytest
import torch

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.strategies.plain import Finetune
from remos_hf.training.held_out import check_classes, measured_by, samples_to_tell
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("share", [0.6, 0.9, 0.97])
@pytest.mark.parametrize("difference", [0.01, 0.02])
def test_with_the_samples_needed_the_interval_of_no_difference_is_as_wide_as_the_difference(share, difference):
    needed = samples_to_tell(Rate.of(round(share * 10**6), 10**6), difference)
    one = Rate.of(round(share * needed), needed)
    assert excess_dir(one, one).high == pytest.approx(difference, rel=0.1)


def test_the_accuracy_is_counted_with_the_share_of_the_commonest_label(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune())
    rows = tiny.dataset(10)
    found = measured_by(ours, rows, None)
    with torch.no_grad():
        predicted = ours.model.eval()(**tiny.pad(rows)).logits.argmax(-1)
    labels = torch.tensor([row["labels"] for row in rows])
    assert found.rate == Rate.of(int((predicted == labels).sum()), 10)
    assert found.commonest == max(labels.float().mean().item(), 1 - labels.float().mean().item())


def test_labels_that_are_no_classes_are_refused(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune())
    check_classes(ours, [torch.tensor([0, 1])])
    for labels in ([], [torch.tensor([0.5])], [torch.tensor([-1])], [torch.tensor([[1]])]):
        with pytest.raises(ValueError, match="held-out data has"):
            check_classes(ours, labels)

import torch

from remos_hf.slicing.decided import Decided
from remos_hf.slicing.ordinal import pack, unpack


def test_open_weights_come_back_in_the_order_noted_also_beyond_the_room_expected():
    decided = Decided([10, 20], expected=1, device=torch.device("cpu"))
    for entry, places in ((0, [3]), (1, [2, 17]), (1, [19])):
        places = torch.tensor(places)
        decided.note(entry, places, places * 2, places.float())
    assert decided.places.tolist() == [3, 2, 17, 19]
    assert decided.owners.tolist() == [0, 1, 1, 1]
    assert decided.coverage.tolist() == [6, 4, 34, 38]
    assert decided.magnitudes.tolist() == [3, 2, 17, 19]


def test_kept_open_weights_are_set_among_the_bits_that_were_decided():
    decided = Decided([10, 20], expected=9, device=torch.device("cpu"))
    first, second = torch.arange(10) < 2, torch.arange(20) == 5
    for bits, keep in zip(decided.bits, (first, second), strict=True):
        bits.copy_(pack(keep))
    for entry, places in ((0, [3, 9]), (1, [2, 17])):
        decided.note(entry, torch.tensor(places), torch.tensor(places), torch.tensor(places).float())
    decided.keep(torch.tensor([False, True, True, False]))
    assert unpack(decided.bits[0], (10,)).nonzero().flatten().tolist() == [0, 1, 9]
    assert unpack(decided.bits[1], (20,)).nonzero().flatten().tolist() == [2, 5]

import torch

from remos_hf.adapters.flow_layouts import broadcast, layout_of_input, layout_of_view, resized

MAPS = ((("n", 4),), (("f", 6),), (("p", 5),), (("p", 3),))


def test_images_have_channels_and_positions_texts_have_positions_and_features():
    assert layout_of_input((4, 6, 5, 3)) == MAPS
    assert layout_of_input((4, 9, 16)) == ((("n", 4),), (("p", 9),), (("f", 16),))
    assert layout_of_input((1, 16)) == ((), (("f", 16),))


def test_flattened_maps_still_know_which_channel_is_which():
    flat = layout_of_view(MAPS, (4, 6, 5, 3), lambda given: given.flatten(1))
    assert flat == ((("n", 4),), (("f", 6), ("p", 5), ("p", 3)))
    again = layout_of_view(flat, (4, 90), lambda given: given.view(4, 6, 15))
    assert again == ((("n", 4),), (("f", 6),), (("p", 5), ("p", 3)))


def test_heads_are_split_off_features_and_joined_again():
    tokens = layout_of_input((4, 9, 16))
    heads = layout_of_view(tokens, (4, 9, 16), lambda given: given.view(4, 9, 2, 8).transpose(1, 2))
    assert heads == ((("n", 4),), (("f", 2),), (("p", 9),), (("f", 8),))
    part = layout_of_view(tokens, (4, 9, 16), lambda given: given.split(8, 2)[1])
    assert part == ((("n", 4),), (("p", 9),), (("f", 8),))


def test_a_picked_position_is_gone_and_a_copied_one_is_a_neuron():
    tokens = layout_of_input((4, 9, 16))
    assert layout_of_view(tokens, (4, 9, 16), lambda given: given[:, 0]) == ((("n", 4),), (("f", 16),))
    copies = layout_of_view(tokens, (4, 9, 16), lambda given: given[:, :, None].expand(4, 9, 3, 16))
    assert copies == ((("n", 4),), (("p", 9),), (("f", 3),), (("f", 16),))


def test_what_copies_is_no_view():
    assert layout_of_view(MAPS, (4, 6, 5, 3), lambda given: given.flip(1)) is None


def test_broadcast_tensors_lie_like_the_larger_one():
    gate = ((("n", 4),), (("f", 6),), (), ())
    assert broadcast([gate, MAPS], torch.Size((4, 6, 5, 3))) == MAPS
    assert resized((("f", 2), ("f", 8)), 10) == (("f", 10),)

"""Boxes tile what they should, each element once."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron_r1.weights.boxes import along, box_shape, intersect, slices_within, split_box, subtract, uncovered, volume, whole_box

SPANS = [(a, b) for a in range(4) for b in range(a + 1, 5)]
BOXES = list(product(SPANS, SPANS))


def counted(boxes, shape=(4, 4)):
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[tuple(slice(*span) for span in box)] += 1
    return counts


def test_what_is_shared_and_what_is_left_tile_a_box():
    for a in BOXES[::3]:
        for b in BOXES:
            shared = intersect(a, b)
            assert (counted(subtract(a, b)) + counted([shared] if shared else []) == counted([a])).all()


def test_what_several_boxes_leave():
    whole = whole_box((4, 4))
    for a, b in product(BOXES[::7], BOXES[::5]):
        left = counted(uncovered(whole, [a, b]))
        assert (left + (counted([a, b]) > 0) == 1).all()
    assert uncovered(whole, [whole]) == [] and uncovered((), [()]) == []


@pytest.mark.parametrize("most", [1, 2, 5, 7, 12, 100])
@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 7), (6,), (0, 3), ()])
def test_pieces_of_a_box_tile_it_in_its_order(shape, most):
    box = tuple((2, 2 + size) for size in shape)
    pieces = split_box(box, most)
    assert all(volume(piece) <= most for piece in pieces)
    assert sum(map(volume, pieces)) == volume(box) and pieces == sorted(pieces)
    if volume(box):
        assert (counted([slices(piece, box) for piece in pieces], shape) == 1).all()


def slices(box, outer):
    return tuple((part.start, part.stop) for part in slices_within(box, outer))


def test_a_part_of_one_axis():
    assert along((4, 6), 1, 2, 3) == ((0, 4), (2, 5)) and along((4, 6), None, 2, 3) == whole_box((4, 6))
    assert box_shape(((1, 3), (0, 5))) == (2, 5)
    with pytest.raises(ValueError, match="less than one element"):
        split_box((), 0)

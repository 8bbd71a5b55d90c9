from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.cluster.sharing import Piece, choose_num_workers, share_pictures, share_units


def test_batches_stay_whole_and_follow_the_speeds() -> None:
    pieces = share_pictures(batch_size=2, num_batches=4, speeds=[3, 1])
    assert pieces == [Piece(first=0, count=6, batch_size=2), Piece(first=6, count=2, batch_size=2)]
    assert [piece and piece.num_batches for piece in pieces] == [3, 1]


def test_the_only_batch_is_taken_apart() -> None:
    assert share_pictures(batch_size=8, num_batches=1, speeds=[1, 1]) == [
        Piece(first=0, count=4, batch_size=4),
        Piece(first=4, count=4, batch_size=4),
    ]


def test_a_worker_that_would_end_last_gets_nothing() -> None:
    assert share_units(2, [10, 1]) == [2, 0]
    assert share_pictures(batch_size=1, num_batches=2, speeds=[1, 10]) == [None, Piece(first=0, count=2, batch_size=1)]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_every_picture_is_made_once(batch_size: int, num_batches: int, speeds: list[float]) -> None:
    pieces = share_pictures(batch_size=batch_size, num_batches=num_batches, speeds=speeds)
    assert len(pieces) == len(speeds)
    places = [place for piece in pieces if piece is not None for place in range(piece.first, piece.first + piece.count)]
    assert places == list(range(batch_size * num_batches))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
def test_no_other_division_ends_earlier(num_units: int, speeds: list[float]) -> None:
    def end(counts: tuple[int, ...]) -> float:
        return max(count / speed for count, speed in zip(counts, speeds))

    others = (counts for counts in itertools.product(range(num_units + 1), repeat=len(speeds)) if sum(counts) == num_units)
    assert end(tuple(share_units(num_units, speeds))) == pytest.approx(min(map(end, others)))


def test_workers_that_others_wait_for_are_left_to_them() -> None:
    assert choose_num_workers(num_units=8, num_idle=4, num_waiting=0) == 4
    assert choose_num_workers(num_units=8, num_idle=4, num_waiting=3) == 1
    assert choose_num_workers(num_units=2, num_idle=4, num_waiting=0) == 2
    assert choose_num_workers(num_units=8, num_idle=0, num_waiting=9) == 1


@pytest.mark.parametrize("speeds", [[], [0.0], [1, -1]])
def test_speeds_must_be_there_and_above_zero(speeds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"workers|speeds"):
        share_pictures(batch_size=2, num_batches=2, speeds=speeds)


def test_a_piece_cannot_be_empty() -> None:
    with pytest.raises(ValueError, match="a piece of 0 pictures"):
        Piece(first=0, count=0, batch_size=1)

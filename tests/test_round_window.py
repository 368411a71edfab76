"""Batches drawn and not planned yet: each comes once, in order, whatever interrupts."""

import copy
import itertools

import pytest

from optex.round.window import BatchQueue, PlannedStep, Progress


def planned(*numbers):
    return tuple(PlannedStep(f"batch {number}", number) for number in numbers)


def found(queue, progress):
    return [(step.batch, step.number) for step in queue.waiting(progress)]


def batches():
    return (f"batch {number}" for number in itertools.count())


def test_batches_are_drawn_until_as_many_wait_as_are_asked_for():
    queue, source, progress = BatchQueue(), batches(), Progress()
    assert found(queue, progress) == []
    assert queue.next_number(progress) == queue.at_hand(progress) == 0
    for count in (2, 1, 2, 3):  # those that wait are counted
        queue.draw(source, progress, count)
        assert queue.at_hand(progress) == max(2, count)
    assert found(queue, progress) == [(f"batch {i}", i) for i in range(3)]
    assert queue.next_number(progress) == 3
    assert next(source) == "batch 3"  # and no more were drawn


def test_planned_steps_count_and_go():
    queue, source = BatchQueue(), batches()
    queue.draw(source, Progress(), 4)
    progress = Progress(planned=3, window=planned(1, 2))
    assert queue.at_hand(progress) == 3
    assert found(queue, progress) == [("batch 3", 3)]
    assert queue.next_number(progress) == 4
    queue.draw(source, progress, 5)
    assert found(queue, progress) == [(f"batch {i}", i) for i in (3, 4, 5)]
    assert queue.next_number(progress) == 6


def test_a_queue_whose_batches_are_all_planned_goes_on_behind_them():
    queue, source = BatchQueue(), batches()
    queue.draw(source, Progress(), 2)
    for planned_so_far in (2, 7):
        progress = Progress(planned=planned_so_far)
        assert queue.next_number(progress) == planned_so_far
        assert found(queue, progress) == []
        assert queue.next_number(progress) == planned_so_far
    queue.draw(source, Progress(planned=7), 2)
    assert found(queue, Progress(planned=7)) == [("batch 2", 7), ("batch 3", 8)]


def test_numbers_are_told_before_planned_batches_are_dropped():
    queue = BatchQueue()
    queue.draw(batches(), Progress(), 3)
    assert queue.next_number(Progress(planned=2)) == 3
    assert queue.next_number(Progress(planned=3)) == 3


def test_a_source_that_ends_gives_what_it_has():
    queue, progress = BatchQueue(), Progress()
    queue.draw(iter(["only"]), progress, 5)
    assert found(queue, progress) == [("only", 0)]
    queue.draw(iter([]), progress, 5)
    assert queue.at_hand(progress) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_is_drawn_where_enough_wait(count):
    def source():
        raise AssertionError("asked for a batch")
        yield

    BatchQueue().draw(source(), Progress(planned=2, window=planned(0, 1)), count)


def test_an_interrupt_loses_no_batch():
    queue, progress = BatchQueue(), Progress()

    def source():
        yield from ("first", "second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.draw(source(), progress, 5)
    assert found(queue, progress) == [("first", 0), ("second", 1)]


def test_copies_draw_by_themselves():
    queue, progress = BatchQueue(), Progress()
    queue.draw(batches(), progress, 2)
    twin = copy.copy(queue)
    twin.draw(iter(["more"]), progress, 3)
    assert queue.at_hand(progress) == 2
    assert found(twin, progress) == [("batch 0", 0), ("batch 1", 1), ("more", 2)]


def test_a_queue_that_is_cleared_starts_at_what_is_planned():
    queue = BatchQueue()
    queue.draw(batches(), Progress(), 4)
    queue.clear()
    assert queue.at_hand(Progress()) == queue.next_number(Progress()) == 0


def test_steps_have_random_numbers_of_their_own():
    first, second = planned(0, 1)
    assert first.draws is not second.draws
    assert first.measured is None

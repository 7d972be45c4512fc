"""What a run remembers of its validations."""

from __future__ import annotations

from am_recipes import progress


def test_progress_knows_the_lowest_losses_and_how_long_it_waits():
    one = progress.Progress()
    among = []
    for step, loss in enumerate((3.0, 2.0, 2.0, 1.95, 2.5, 1.0), start=1):
        one.step = step
        among.append((one.validated(loss, 2, min_delta=0.1), one.waited))
    # Of equal losses the later one counts, as retention has it; 1.95 is lower, but not by 0.1.
    assert among == [(True, 0), (True, 0), (True, 1), (True, 2), (False, 3), (True, 0)]
    assert one.best == [(1.0, 6), (1.95, 4)]
    assert one.last == (1.0, 6)
    other = progress.Progress()
    other.load_state_dict(one.state_dict())
    assert vars(other) == vars(one)

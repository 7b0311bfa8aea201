import math

import pytest

from megavlm.train.early_stopping import EarlyStopping


def after(losses, patience=2, threshold=0.0):
    watch = EarlyStopping(patience, threshold)
    for number, loss in enumerate(losses):
        watch.take(loss)
        if watch.stops:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "stops_at"),
    [
        ([3, 2, 1], 1, 0.0, None),
        ([3, 3], 1, 0.0, 1),
        ([3, 4, 2, 3, 2.5], 2, 0.0, 4),
        ([3, 4, 2.9, 3, 2.9], 2, 0.0, 4),  # as low as before is not lower
        ([3, 2.95, 2.91], 2, 0.1, 2),
        ([3, 2.95, 2.89, 2.85, 2.8], 2, 0.1, 4),
        ([3, math.nan, 2], 1, 0.0, 1),
        ([3, 4, 5, 6], 0, 0.0, None),
    ],
)
def test_it_stops_when_losses_no_longer_fall(losses, patience, threshold, stops_at):
    assert after(losses, patience, threshold) == stops_at


def test_it_goes_on_where_a_checkpoint_was_written():
    first = EarlyStopping(2)
    for loss in (3.0, 2.0, 2.5):
        first.take(loss)
    second = EarlyStopping(2)
    second.restore(first.state())
    second.take(2.2)
    assert second.stops and second.lowest == 2.0
    fresh = EarlyStopping(2)
    fresh.restore({})
    assert (fresh.lowest, fresh.num_worse) == (math.inf, 0)

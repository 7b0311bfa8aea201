import math
import random
import re

import pytest

from megavlm.observe.charts import Marker, Series, build_chart
from megavlm.observe.curves import MAX_POINTS, downsample, format_tick, linear_ticks, log_ticks, smooth, step_ticks


def noise(num_points, seed=0):
    generator = random.Random(seed)
    return [(step, generator.gauss(1.0, 0.1)) for step in range(1, num_points + 1)]


def coordinates(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def chart(series, **options):
    return build_chart("x", "X", "unit", "", series, **options)


def test_thinning_keeps_both_ends_and_every_extreme():
    points = noise(100_000)
    points[31_337] = (points[31_337][0], 99.0)
    points[77_777] = (points[77_777][0], -99.0)
    thin = downsample(points)
    assert len(thin) <= MAX_POINTS
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert points[31_337] in thin and points[77_777] in thin
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})


def test_thinning_leaves_few_points_alone():
    points = noise(MAX_POINTS)
    assert downsample(points) == points


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_thinning_keeps_breaks_without_growing(bad):
    points = [(step, bad if step % 2 else value) for step, value in noise(50_000)]
    thin = downsample(points)
    assert len(thin) <= MAX_POINTS
    assert any(not math.isfinite(value) for _, value in thin)
    finite = [value for _, value in points if math.isfinite(value)]
    assert max(finite) in [value for _, value in thin] and min(finite) in [value for _, value in thin]


def test_smoothing_is_exact_on_constants_and_unbiased_on_a_slope():
    assert [value for _, value in smooth([(step, 3.0) for step in range(100)])] == pytest.approx([3.0] * 100)
    slope = smooth([(step, float(step)) for step in range(1000)])
    assert slope[500][1] == pytest.approx(500.0, abs=0.1)


def test_smoothing_is_not_spoilt_by_a_value_that_is_not_finite():
    points = [(step, 3.0) for step in range(100)]
    points[40] = (40, math.nan)
    points[50] = (50, math.inf)
    smoothed = dict(smooth(points))
    assert math.isnan(smoothed.pop(40)) and smoothed.pop(50) == math.inf
    assert list(smoothed.values()) == pytest.approx([3.0] * 98)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1e-3), (0.4, 0.401), (0.0, 123_456.0), (5.0, 5.0), (0.0, 0.0), (-3.0, 5.0), (-2.0, -2.0)]
)
def test_linear_ticks_enclose_the_values_and_stay_few(low, high):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert len({format_tick(tick, ticks[1] - ticks[0]) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(0.9, 11.0), (5.0, 5.0), (1.1, 1.9), (1e-9, 1e6), (1e-5, 3.0), (1.0, 10.0)])
def test_log_ticks_enclose_the_values_and_stay_few(low, high):
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.00001 and ticks[-1] >= high / 1.00001
    assert 2 <= len(ticks) <= 11
    assert all(tick > 0 for tick in ticks)


def test_step_ticks_are_whole_steps_inside():
    assert step_ticks(0, 400) == [0, 100, 200, 300, 400]
    assert step_ticks(0, 2) == [0, 1, 2]
    assert step_ticks(500, 1000)[0] == 500


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.0002, 0.0002, "2e-4"), (1e-3, 2e-4, "1e-3"), (0.4, 2e-4, "0.4000"), (20_000, 1e4, "20k"), (5000, 5e3, "5k"),
     (1500, 500, "1,500"), (1.5e6, 5e5, "1.5M"), (-4, 2, "-4"), (0.25, 0.05, "0.25")],
)  # fmt: skip
def test_tick_labels(value, step, text):
    assert format_tick(value, step) == text


def test_paths_place_values_upright_and_inside():
    (view,) = chart([Series("a", "language", [(0, 0.0), (50, 10.0), (100, 5.0)])]).views
    assert coordinates(view.paths[0]) == [(0, 1000), (500, 0), (1000, 500)]


def test_log_scale_places_by_ratio_and_leaves_out_what_is_not_positive():
    points = [(0, 1.0), (1, 0.0), (2, 10.0), (3, 100.0)]
    (view,) = chart([Series("a", "language", points)], scales=("log",)).views
    assert coordinates(view.paths[0]) == [(0, 1000), (666.7, 500), (1000, 0)]
    assert view.paths[0].count("M") == 2


def test_log_scale_is_left_out_where_nothing_is_positive():
    built = chart([Series("a", "language", [(0, 0.0), (1, -1.0)])], scales=("log", "linear"))
    assert [view.scale for view in built.views] == ["linear"]


def test_a_line_breaks_where_a_value_is_not_finite():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 2.0), (6, 1.0)]
    path = chart([Series("a", "language", points)]).views[0].paths[0]
    assert re.sub(r"[\d. ]", "", path) == "MLMhML"


def test_one_point_is_a_visible_dot():
    built = chart([Series("a", "language", [(7, 0.5)])])
    (curve,) = built.curves
    assert curve.weight == "dots"
    assert built.views[0].paths[0].endswith("h0")
    assert built.first < 7 < built.last


def test_nothing_finite_is_no_chart():
    assert chart([Series("a", "language", [(1, math.nan)]), Series("b", "vision", [])]) is None


def test_smoothed_series_are_drawn_twice_and_few_points_once():
    many = chart([Series("a", "language", noise(100), smooth=True)])
    assert [curve.weight for curve in many.curves] == ["raw", "line"] and many.has_means
    few = chart([Series("a", "language", noise(5), smooth=True)])
    assert [curve.weight for curve in few.curves] == ["dots"] and not few.has_means


def test_a_rate_axis_holds_zero():
    points = [(step, 1000.0 + step) for step in range(20)]
    assert chart([Series("a", "language", points)]).views[0].low > 0
    assert chart([Series("a", "language", points)], from_zero=True).views[0].low == 0


def test_markers_outside_the_axis_are_left_out():
    markers = [Marker(50, "resume", "here"), Marker(500, "resume", "beyond")]
    built = chart([Series("a", "language", [(0, 1.0), (100, 2.0)])], markers=markers)
    assert [(marker.text, marker.percent) for marker in built.markers] == [("here", 50.0)]

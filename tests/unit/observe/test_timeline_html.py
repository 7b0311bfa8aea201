import json
import re

import pytest

from megavlm.errors import UseError
from megavlm.observe.report import write_report
from megavlm.observe.timeline import KINDS, PAYLOADS, Band, Timeline, write_timeline
from megavlm.observe.timeline_html import build_timeline_view
from megavlm.observe.timeline_tables import choose_unit
from tests.unit.observe.test_report import EVIL, Page, report, write_run
from tests.unit.observe.timeline_builders import event, realistic_timeline

EVENT_WIDTH = 7


def page_of(run_dir, timeline):
    write_run(run_dir, [2.0, 1.0])
    write_timeline(run_dir / "timeline.json", timeline)
    return report(run_dir)


def drawing_of(page):
    return json.loads(re.search(r'class="drawing">(.*?)</script>', page.source).group(1))


def texts(line):
    return [line.group, line.label, *(cell.text for cell in line.cells)]


def small(**changes):
    """Two ranks; the simulation has no reduction and lasts 0.1 s, the measured schedule 0.125 s."""
    simulated = Band(
        (
            (event("EF", 0, 0.04), event("F", 0.04, 0.06), event("receive", 0.06, 0.08, 0, 0, "gradient", 1)),
            (event("receive", 0, 0.06, 0, 0, "activation", 0), event("F", 0.06, 0.1)),
        ),
        0.1,
    )
    measured = Band(
        (
            (event("EF", 0, 0.05), event("F", 0.05, 0.07), event("send", 0.07, 0.075, 0, 0, "activation", 1)),
            (
                event("receive", 0, 0.075, 0, 0, "activation", 0),
                event("F", 0.08, 0.125),
                event("reduce", 0.125, 0.25),
            ),
        ),
        0.25,
    )
    values = {"encoder_costs_RM": ((6.0,), (0.0,)), "language_costs_RM": ((2.0,), (4.0,))}
    fields = (
        {"placement": "first_stage", "layout": "PP2", "pad_share": 0.125, "simulated": simulated} | values | changes
    )
    return Timeline(step=1234, num_microbatches=1, measured=measured, **fields)


def test_the_page_shows_both_bands_and_the_figures(tmp_path):
    page = page_of(tmp_path, small())
    for words in (
        "step 1,234 · first_stage · PP2 · 1 microbatch", "125.0 ms", "simulated 100.0 ms", "+25.0%", "250.0 ms",
        "Ranks, max / mean 1.333", "Microbatches, max / mean 1.000", "Pad share 12.5%", "waits for the encoder",
        "rank 0 |eeee", "simulated", "measured",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.count("canvas") == 0 and page.count("noscript") == 1
    assert [band["name"] for band in drawing_of(page)["bands"]] == ["simulated", "measured"]


def test_the_page_draws_the_events_that_the_file_holds(tmp_path):
    timeline = realistic_timeline("bubble", 3, 6)
    drawing = drawing_of(page_of(tmp_path, timeline))
    for drawn, band in zip(drawing["bands"], (timeline.simulated, timeline.measured), strict=True):
        assert drawn["makespan"] == pytest.approx(band.makespan_s, rel=1e-6)
        for lane, row in zip(drawn["lanes"], band.ranks, strict=True):
            assert len(lane) == EVENT_WIDTH * len(row)
            for at, one in enumerate(row):
                kind, microbatch, chunk, payload, peer, start, end = lane[at * EVENT_WIDTH : (at + 1) * EVENT_WIDTH]
                assert (drawing["kinds"][kind], microbatch, chunk) == (one.kind, one.microbatch, one.chunk)
                assert (payload, peer) == ((-1, -1) if one.payload is None else (PAYLOADS.index(one.payload), one.peer))
                assert (start, end) == pytest.approx((one.start_s, one.end_s), abs=1e-6 * band.makespan_s)
    assert drawing["kinds"] == list(KINDS)


def test_a_step_without_a_simulation_has_one_band(tmp_path):
    page = page_of(tmp_path, small(simulated=None))
    assert [band["name"] for band in drawing_of(page)["bands"]] == ["measured"]
    assert "Measured over simulated –" in page.text and "not simulated" in page.text


def test_a_report_without_a_timeline_shows_none(tmp_path):
    write_run(tmp_path, [2.0, 1.0])
    page = report(tmp_path)
    assert not page.count("section", "timeline") and "--t-lane" not in page.source and "bands" not in page.source


def test_the_page_with_a_timeline_loads_nothing(tmp_path):
    page = page_of(tmp_path, realistic_timeline())
    assert page.loaded == []
    assert all(words not in page.source for words in ("url(", "http:", "https:", "import(", "fetch("))


def test_texts_of_the_timeline_are_never_markup(tmp_path):
    page = page_of(tmp_path, small(placement=EVIL, layout=EVIL))
    assert EVIL not in page.source and EVIL in page.text


def test_a_step_of_eight_ranks_and_64_microbatches_stays_light(tmp_path):
    source = page_of(tmp_path, realistic_timeline("spread", 8, 64)).source
    assert len(source) < 500_000


def test_a_broken_timeline_is_an_error_that_names_file_and_key(tmp_path):
    write_run(tmp_path, [1.0])
    path = write_timeline(tmp_path / "timeline.json", small())
    path.write_text(path.read_text().replace('"pad_share":0.125', '"pad_share":"much"'))
    with pytest.raises(UseError, match=r"timeline\.json pad_share: got 'much'; expected a number.*; fix: "):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_idle_table_by_rank_and_for_all():
    table = build_timeline_view(small()).idle
    assert table.columns == (
        "Encoder", "Language model", "Sending", "Reduction", "Idle",
        "activation", "gradient", "features", "encoder’s input", "done", "between",
    )  # fmt: skip
    assert [texts(line) for line in table.lines] == [
        ["rank 0", "simulated", "40.0", "20.0", "0", "0", "40.0", "0", "20.0", "0", "0", "20.0", "0"],
        ["", "measured", "50.0", "20.0", "5.0", "0", "175.0", "0", "0", "0", "0", "175.0", "0"],
        ["rank 1", "simulated", "0", "40.0", "0", "0", "60.0", "60.0", "0", "0", "0", "0", "0"],
        ["", "measured", "0", "45.0", "0", "125.0", "80.0", "75.0", "0", "0", "0", "0", "5.0"],
        ["all ranks", "simulated", "20%", "30%", "0%", "0%", "50%", "30%", "10%", "0%", "0%", "10%", "0%"],
        ["", "measured", "10%", "13%", "1%", "25%", "51%", "15%", "0%", "0%", "0%", "35%", "1%"],
    ]
    assert table.lines[0].cells[0].share == pytest.approx(0.4)


def test_imbalance_tables():
    view = build_timeline_view(small())
    assert [texts(line)[1:] for line in view.imbalance.lines] == [
        ["Encoder", "2.000", "1.000", "2.000", "2.000 (microbatch 0)", "1.000", "1.000 (rank 0)"],
        ["Language model", "1.333", "1.000", "1.333", "1.333 (microbatch 0)", "1.000", "1.000 (rank 0)"],
        ["Both", "1.333", "1.000", "1.333", "1.333 (microbatch 0)", "1.000", "1.000 (rank 0)"],
    ]
    assert [texts(line)[1:] for line in view.by_rank.lines] == [
        ["rank 0", "2.000", "1.000", "0.667", "1.000", "1.333", "1.000"],
        ["rank 1", "0.000", "–", "1.333", "1.000", "0.667", "1.000"],
    ]
    assert [texts(line)[1:] for line in view.by_microbatch.lines] == [
        ["microbatch 0", "1.000", "2.000", "1.000", "1.333", "1.000", "1.333"]
    ]


def test_a_step_without_images_has_no_encoder_imbalance():
    table = build_timeline_view(small(encoder_costs_RM=((0.0,), (0.0,)))).imbalance
    assert [cell.text for cell in table.lines[0].cells] == ["–"] * 6


@pytest.mark.parametrize(
    ("makespan_s", "text"),
    [
        (9.99996, "10.00 s"),
        (12.3456, "12.35 s"),
        (1.0, "1.000 s"),
        (0.99999, "1.000 s"),
        (0.0123456, "12.35 ms"),
        (5e-6, "5.000 µs"),
    ],
)
def test_times_have_one_unit_that_suits_the_makespan(makespan_s, text):
    assert choose_unit(makespan_s).say(makespan_s) == text


def test_the_page_is_whole_markup(tmp_path):
    page = page_of(tmp_path, realistic_timeline("stage", 4, 6, 1))
    assert isinstance(page, Page) and page.count("table", "figures") == 4
    rows = page.count("tr", "total")
    assert rows == 2 + 1

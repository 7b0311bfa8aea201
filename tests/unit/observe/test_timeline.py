import dataclasses
import json

import pytest

from megavlm.errors import RunError, UseError
from megavlm.observe.timeline import Band, Timeline, read_timeline, write_timeline
from tests.unit.observe.timeline_builders import event, realistic_timeline


def plain():
    """The smallest timeline with every form of event."""
    rows = (
        (event("EF", 0.0, 1.0), event("send", 1.0, 1.5, payload="features", peer=1)),
        (event("receive", 0.0, 1.5, payload="features", peer=0), event("F", 1.5, 3.0), event("reduce", 3.0, 4.0)),
    )
    return Timeline(1, "stage", "PP2", 1, 0.5, ((2.0,), (0.0,)), ((0.0,), (3.0,)), Band(rows, 4.0))


@pytest.fixture
def entry(tmp_path):
    return json.loads(write_timeline(tmp_path / "timeline.json", plain()).read_text())


@pytest.mark.parametrize("timeline", [plain(), realistic_timeline(), realistic_timeline("stage", 3, 5)])
def test_what_is_written_is_read_again(tmp_path, timeline):
    path = write_timeline(tmp_path / "timeline.json", timeline)
    assert read_timeline(path) == timeline
    assert [entry.name for entry in tmp_path.iterdir()] == ["timeline.json"]


def test_the_file_has_the_documented_keys(entry):
    assert set(entry) == {
        "version", "step", "placement", "layout", "num_microbatches", "unit", "pad_share", "encoder_costs_RM",
        "language_costs_RM", "measured", "simulated",
    }  # fmt: skip
    assert entry["version"] == 1 and entry["unit"] == "s" and entry["simulated"] is None
    assert entry["measured"]["ranks"][0] == [
        {"kind": "EF", "start_s": 0.0, "end_s": 1.0, "microbatch": 0, "chunk": 0},
        {"kind": "send", "start_s": 1.0, "end_s": 1.5, "microbatch": 0, "chunk": 0, "payload": "features", "peer": 1},
    ]


def test_a_file_without_a_simulation_is_read(tmp_path, entry):
    del entry["simulated"]
    (tmp_path / "a.json").write_text(json.dumps(entry))
    assert read_timeline(tmp_path / "a.json") == plain()


@pytest.mark.parametrize(
    ("keys", "value", "key"),
    [
        (["version"], 2, "version"),
        (["version"], True, "version"),
        (["unit"], "ms", "unit"),
        (["step"], -1, "step"),
        (["step"], True, "step"),
        (["step"], 1.5, "step"),
        (["placement"], None, "placement"),
        (["num_microbatches"], 0, "num_microbatches"),
        (["pad_share"], 1.01, "pad_share"),
        (["pad_share"], float("nan"), "pad_share"),
        (["pad_share"], 10**400, "pad_share"),
        (["extra"], 1, "extra"),
        (["encoder_costs_RM"], [[1.0]], "encoder_costs_RM"),
        (["encoder_costs_RM", 1], [1.0, 2.0], r"encoder_costs_RM\[1\]"),
        (["language_costs_RM", 0, 0], -1.0, r"language_costs_RM\[0\]"),
        (["language_costs_RM", 1, 0], float("inf"), r"language_costs_RM\[1\]"),
        (["measured"], None, "measured"),
        (["measured", "makespan_s"], 0.0, "measured.makespan_s"),
        (["measured", "makespan_s"], 3.9, r"measured.ranks\[1\]\[2\].end_s"),
        (["measured", "ranks"], [], "measured.ranks"),
        (["measured", "ranks", 0], {}, r"measured.ranks\[0\]"),
        (["measured", "ranks", 0, 0], 7, r"measured.ranks\[0\]\[0\]"),
        (["measured", "ranks", 0, 0, "kind"], "G", r"measured.ranks\[0\]\[0\].kind"),
        (["measured", "ranks", 0, 0, "kind"], [], r"measured.ranks\[0\]\[0\].kind"),
        (["measured", "ranks", 0, 0, "microbatch"], 1, r"measured.ranks\[0\]\[0\].microbatch"),
        (["measured", "ranks", 0, 0, "chunk"], -1, r"measured.ranks\[0\]\[0\].chunk"),
        (["measured", "ranks", 0, 0, "peer"], 1, r"measured.ranks\[0\]\[0\].peer"),
        (["measured", "ranks", 0, 0, "end_s"], -1, r"measured.ranks\[0\]\[0\].end_s"),
        (["measured", "ranks", 0, 1, "start_s"], 0.9, r"measured.ranks\[0\]\[1\].start_s"),
        (["measured", "ranks", 0, 1, "end_s"], 0.5, r"measured.ranks\[0\]\[1\].end_s"),
        (["measured", "ranks", 0, 1, "peer"], 2, r"measured.ranks\[0\]\[1\].peer"),
        (["measured", "ranks", 1, 0, "payload"], "images", r"measured.ranks\[1\]\[0\].payload"),
        (["simulated"], {"ranks": [[]], "makespan_s": 1.0}, "simulated.ranks"),
        (["simulated"], {"ranks": [[], []]}, "simulated.makespan_s"),
    ],
)
def test_a_wrong_value_is_an_error_in_one_line_that_names_file_and_key(tmp_path, entry, keys, value, key):
    place = entry
    for name in keys[:-1]:
        place = place[name]
    place[keys[-1]] = value
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(entry))
    with pytest.raises(UseError, match=rf"broken\.json {key}: got .*; expected .*; fix: .*") as caught:
        read_timeline(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    "keys", [["step"], ["measured"], ["measured", "ranks"], ["measured", "ranks", 1, 0, "payload"]]
)
def test_a_missing_key_is_named(tmp_path, entry, keys):
    place = entry
    for name in keys[:-1]:
        place = place[name]
    del place[keys[-1]]
    (tmp_path / "a.json").write_text(json.dumps(entry))
    with pytest.raises(UseError, match=rf"{keys[-1]}: got nothing"):
        read_timeline(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_what_is_no_timeline_at_all_is_an_error_that_names_the_file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UseError, match="a.json"):
        read_timeline(path)
    with pytest.raises(UseError, match="no such file"):
        read_timeline(tmp_path / "b.json")


def test_rounding_is_no_overlap(tmp_path):
    rows = ((event("F", 0.0, 0.1 + 0.2), event("B", 0.3, 1.0 + 1e-12)),)
    timeline = Timeline(1, "text", "PP1", 1, 0.0, ((0.0,),), ((1.0,),), Band(rows, 1.0))
    assert read_timeline(write_timeline(tmp_path / "a.json", timeline)) == timeline


def test_a_timeline_that_contradicts_itself_is_not_written(tmp_path):
    late = dataclasses.replace(plain(), measured=dataclasses.replace(plain().measured, makespan_s=1.0))
    with pytest.raises(UseError, match=r"measured.ranks\[0\]\[1\].end_s"):
        write_timeline(tmp_path / "a.json", late)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_a_failed_run(tmp_path):
    with pytest.raises(RunError, match="cannot write"):
        write_timeline(tmp_path / "gone" / "a.json", plain())

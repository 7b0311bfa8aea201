"""A timeline in letters, for where nothing can be drawn."""

from megavlm.observe.timeline import Band, TimelineEvent

_LETTERS = {"F": "F", "B": "B", "E": "e", "EF": "e", "EB": "b", "send": ">", "reduce": "R"}
_IDLE = "."
LEGEND = "F B language model forward, backward; e b encoder; > sending; R gradient reduction; . idle"


def draw_text(band: Band, num_columns: int = 100) -> str:
    """One line a rank: in each of the equal slots of the makespan, what the rank did most of the time, or `.`;
    of equals, what came first.

    Args:
        band: what to draw.
        num_columns: slots.
    """
    width = len(str(len(band.ranks) - 1))
    return "\n".join(
        f"rank {rank:>{width}} |{_line(row, band.makespan_s / num_columns, num_columns)}|"
        for rank, row in enumerate(band.ranks)
    )


def _line(row: tuple[TimelineEvent, ...], slot_s: float, num_columns: int) -> str:
    spent: list[dict[str, float]] = [{} for _ in range(num_columns)]
    for event in row:
        if event.kind == "receive":
            continue
        first, last = int(event.start_s / slot_s), int(event.end_s / slot_s)
        for column in range(first, min(last, num_columns - 1) + 1):
            overlap_s = min(event.end_s, (column + 1) * slot_s) - max(event.start_s, column * slot_s)
            letter = _LETTERS[event.kind]
            spent[column][letter] = spent[column].get(letter, 0.0) + overlap_s
    return "".join(_most(slot, slot_s) for slot in spent)


def _most(slot: dict[str, float], slot_s: float) -> str:
    candidates = {**slot, _IDLE: slot_s - sum(slot.values())}
    return max(candidates, key=lambda letter: candidates[letter])

"""Schedules and costs for the tests of this folder."""

from hypothesis import strategies as st

from megavlm.pipeline.bubble import RULES, bubble, least_live_encoder
from megavlm.pipeline.costs import StageCosts, stage_costs
from megavlm.pipeline.schedules import first_stage, interleaved, one_f_one_b, spread, vision_stages

FEW_RULES = RULES[::3]


def times(num_values):
    return st.lists(st.integers(0, 6), min_size=num_values, max_size=num_values)


@st.composite
def layouts(draw, max_chunks=3):
    """(ranks, chunks, microbatches) that every generator takes."""
    num_ranks = draw(st.integers(1, 4))
    num_chunks = draw(st.integers(1, max_chunks))
    if num_chunks == 1:
        return num_ranks, 1, draw(st.integers(1, 9))
    return num_ranks, num_chunks, num_ranks * draw(st.integers(1, 3))


@st.composite
def costs_for(draw, layout) -> StageCosts:
    """Small whole numbers, zeros among them: a rank without layers, a microbatch without images."""
    num_ranks, num_chunks, num_microbatches = layout
    language = [[draw(times(num_microbatches)) for _ in range(num_chunks)] for _ in range(num_ranks)]
    encoder = [draw(times(num_microbatches)) for _ in range(num_ranks)]
    return stage_costs(
        *layout,
        forward_s=language,
        backward_s=draw(st.integers(1, 3)),
        encode_forward_s=encoder,
        encode_backward_s=draw(st.integers(0, 3)),
    )


@st.composite
def schedules(draw):
    """Any schedule that the package generates."""
    layout = draw(layouts())
    num_ranks, num_chunks, num_microbatches = layout
    name = draw(st.sampled_from(["1f1b", "interleaved", "first_stage", "stage", "spread", "bubble"]))
    train = draw(st.booleans())
    if name == "1f1b":
        return one_f_one_b(num_ranks, num_microbatches)
    if name == "interleaved":
        return interleaved(*layout)
    if name == "first_stage":
        return first_stage(num_ranks, num_microbatches, num_chunks=num_chunks, train_encoder=train)
    if name == "stage":
        return vision_stages(draw(st.integers(1, 3)), num_ranks, num_microbatches, train_encoder=train)
    recompute = train and draw(st.booleans())
    if name == "spread":
        return spread(num_ranks, num_microbatches, num_chunks=num_chunks, train_encoder=train, recompute=recompute)
    least = least_live_encoder(*layout) if num_chunks > 1 else 1
    return bubble(
        num_ranks,
        num_microbatches,
        draw(costs_for(layout)),
        max_live_encoder=least + draw(st.integers(0, 3)),
        num_chunks=num_chunks,
        train_encoder=train,
        recompute=recompute,
        rules=FEW_RULES,
    )

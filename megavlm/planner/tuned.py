"""What parameter-efficient tuning makes of a rank's linears: tensors that learn beside them, weights in 4 bits, and
what autograd keeps for them.

Matrices are those of `models/linear.py` (`torch` backend), adapters those of `megavlm/peft`; tests compare the counts
with the real modules. Where there are fewer key/value groups than tensor ranks, rows are shared out by group, and a
rank may have none of a projection: counted is the even share, rounded up.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megavlm.config.peft import PeftConfig
from megavlm.config.schema import Recipe
from megavlm.config.tuning import Tuning, TuningPlan, tuning_plan
from megavlm.models.architecture import Architecture, ExpertsArchitecture, LanguageArchitecture
from megavlm.planner.families import Place, tower_traits

Sizes = Counter[int]
"""How many parameter tensors of a rank have so many elements."""

BLOCK, GROUP = 64, 256
"""Values that share a scale in 4 bits, and scales that share one (`peft/quantized.py`)."""
LEVELS = 256

# Projections whose outputs IA3 scales where all linears are meant (`peft/ia3.py`).
_SCALED_OUTPUTS = ("k_proj", "v_proj", "key", "value", "qkv")


@dataclass(frozen=True)
class Matrix:
    """A linear that may be adapted, whole.

    Attributes:
        place: in its block.
        projections: ends of the Hugging Face names of what it is made of, and outputs of each.
        num_inputs: columns.
        block_inputs: of `proj` and `fc2`: what the block that they end takes.
        in_expert: it is one of an expert's.
    """

    place: Place
    projections: tuple[tuple[str, int], ...]
    num_inputs: int
    block_inputs: int = 0
    in_expert: bool = False

    @property
    def is_column(self) -> bool:
        """Ranks share its outputs; else its inputs."""
        return self.place in ("qkv", "fc1")

    @property
    def num_outputs(self) -> int:
        """Of all projections."""
        return sum(rows for _, rows in self.projections)

    def meant(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Its projections that `peft.target_modules` means; a name of one layer's counts for those of all."""
        return [
            (name, rows)
            for name, rows in self.projections
            if any(
                one == "all-linear" or f".{name}".endswith(f".{one}") or f".{one}".endswith(f".{name}") for one in names
            )
        ]


@dataclass(frozen=True)
class Tuned:
    """How everything learns."""

    plan: TuningPlan
    peft: PeftConfig
    _found: dict[tuple[str, int | None], Tuning] = field(default_factory=dict, compare=False, repr=False)

    def of(self, component: str, layer: int | None) -> Tuning:
        """How a layer (None: what is in no layer) of a component learns; a search asks very often."""
        key = component, layer
        if key not in self._found:
            self._found[key] = self.plan.of(component, layer)
        return self._found[key]

    def finds(self, component: str, matrices: Sequence[Matrix]) -> bool:
        """Whether anything of a component with these linears learns: names may mean none of them."""
        return any(
            rule.component == component
            and rule.tuning.method != "frozen"
            and (
                rule.tuning.method not in ("lora", "ia3")
                or any(adapter_sizes(matrix, rule.tuning, self.peft, 1) for matrix in matrices)
            )
            for rule in self.plan.rules
        )

    def quantises(self, component: str, tuning: Tuning) -> bool:
        """Whether linears of a component that learn in this way are kept in 4 bits."""
        is_meant = self.peft.bnb_4bit_quant_type != "none" and component in self.peft.quantized_components
        return is_meant and tuning.method != "full"


def tuned_of(recipe: Recipe) -> Tuned:
    """What a recipe tunes."""
    return Tuned(tuning_plan(recipe), recipe.peft)


@functools.cache
def decoder_matrices(language: LanguageArchitecture) -> tuple[Matrix, ...]:
    """Of a decoder layer; of a mixture without the experts."""
    width, groups = language.num_attention_heads * language.head_dim, language.num_query_groups * language.head_dim
    size, ffn = language.hidden_size, language.ffn_hidden_size
    query_key_value = (("self_attn.q_proj", width), ("self_attn.k_proj", groups), ("self_attn.v_proj", groups))
    attention = (
        Matrix("qkv", query_key_value, size),
        Matrix("proj", (("self_attn.o_proj", size),), width, size),
    )
    if language.experts is not None:
        return attention
    return (
        *attention,
        Matrix("fc1", (("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)), size),
        Matrix("fc2", (("mlp.down_proj", size),), ffn, size),
    )


@functools.cache
def expert_matrices(experts: ExpertsArchitecture, hidden_size: int) -> tuple[Matrix, ...]:
    """Of one expert."""
    inner = experts.ffn_hidden_size
    return (
        Matrix("fc1", (("mlp.experts.gate_up_proj", 2 * inner),), hidden_size, in_expert=True),
        Matrix("fc2", (("mlp.experts.down_proj", hidden_size),), inner, in_expert=True),
    )


def gated_matrices(language: LanguageArchitecture) -> tuple[Matrix, ...]:
    """Of what reads images in front of a decoder layer (Flamingo)."""
    width, size, ffn = language.num_attention_heads * language.head_dim, language.hidden_size, language.ffn_hidden_size
    return (
        *(Matrix("qkv", ((name, width),), size) for name in ("query", "key", "value")),
        Matrix("proj", (("output", size),), width, size),
        Matrix("fc1", (("mlp.gate", ffn), ("mlp.up", ffn)), size),
        Matrix("fc2", (("mlp.down", size),), ffn, size),
    )


def tower_matrices(architecture: Architecture) -> tuple[Matrix, ...]:
    """Of a layer of the vision tower."""
    vision, names = architecture.vision, tower_traits(architecture).linears
    size, ffn = vision.hidden_size, vision.ffn_hidden_size
    whole = {"qkv": 3 * size, "proj": size, "fc1": 2 * ffn if vision.gated_mlp else ffn, "fc2": size}
    inputs = {"qkv": size, "proj": size, "fc1": size, "fc2": ffn}
    return tuple(
        Matrix(
            place,
            tuple((name, whole[place] // len(names[place])) for name in names[place]),
            inputs[place],
            size if place in ("proj", "fc2") else 0,
        )
        for place in names
    )


def connector_matrices(architecture: Architecture) -> tuple[Matrix, ...]:
    """Of each connector that is an MLP; resamplers have no linears that could be adapted."""
    vision, hidden, connector = architecture.vision, architecture.language.hidden_size, architecture.connector
    if connector is not None and connector.num_queries:
        return ()
    merge = vision.merge_size if connector is None else connector.merge_size
    merged = vision.hidden_size * merge**2
    middle = merged if connector is None and merge > 1 else hidden
    first, second = tower_traits(architecture).connector
    return (Matrix("fc1", ((first, middle),), merged), Matrix("fc2", ((second, hidden),), middle, merged))


def adapter_sizes(matrix: Matrix, tuning: Tuning, peft: PeftConfig, tensor: int) -> Sizes:
    """Tensors that learn beside a linear on one of `tensor` ranks."""
    column = matrix.is_column
    inputs = matrix.num_inputs if column else matrix.num_inputs // tensor
    meant = matrix.meant(peft.target_modules)
    if tuning.method == "lora":
        sizes: Sizes = Counter()
        for _, rows in meant:
            outputs = -(-rows // tensor) if column else rows
            sizes.update([tuning.rank * inputs, outputs * tuning.rank, *([outputs] if peft.use_dora else [])])
        return sizes
    if tuning.method == "ia3":
        return Counter([-(-rows // tensor) if column else inputs for _, rows in _scaled(matrix, meant, peft)])
    if tuning.method == "cross_modal_adapter" and matrix.block_inputs:
        size, width = tuning.size, matrix.num_outputs  # two projections down and up, and the one that is shared
        return Counter({size * width: 4, width: 2}) + Counter({size: 3}) + Counter({size * size: 1})
    if tuning.method in ("adapter", "parallel_adapter") and matrix.block_inputs:
        taken = matrix.block_inputs if tuning.method == "parallel_adapter" else matrix.num_outputs
        return Counter([tuning.size * taken, tuning.size, matrix.num_outputs * tuning.size, matrix.num_outputs])
    return Counter()


def _scaled(matrix: Matrix, meant: Sequence[tuple[str, int]], peft: PeftConfig) -> Sequence[tuple[str, int]]:
    """What IA3 has vectors for: what is named, or as `peft/ia3.py` says where all linears are meant."""
    if "all-linear" not in peft.target_modules:
        return meant
    if matrix.is_column:
        return [(name, rows) for name, rows in meant if name.rpartition(".")[2] in _SCALED_OUTPUTS]
    return meant if matrix.place == "fc2" else []


def prefix_sizes(tuning: Tuning, width: int) -> Sizes:
    """Keys and values in front of a layer's, whole on every rank; `width` is that of all key/value heads."""
    return Counter({tuning.size * width: 2}) if tuning.method == "prefix" else Counter()


def packed_bytes(matrix: Matrix, tensor: int, double: bool) -> float:
    """What a rank keeps of a matrix in 4 bits (`peft/quantized.py`).

    Args:
        matrix: whole.
        tensor: ranks that share it.
        double: whether scales are quantised, too; scales of scales are whole on every rank.
    """
    elements = matrix.num_inputs * matrix.num_outputs / tensor
    rows = matrix.num_outputs / tensor if matrix.is_column else matrix.num_outputs
    kept = elements / 2 + elements / BLOCK * (1 if double else 4) + 12 * rows
    if double:
        kept += 4 * LEVELS
        for _, outputs in matrix.projections:
            kept += 4 * -(-outputs * matrix.num_inputs // (BLOCK * GROUP))
    return kept


@dataclass(frozen=True)
class LinearKept:
    """What autograd keeps at a linear of one rank because something learns there.

    Attributes:
        takes: its input.
        low: elements a token: products with narrow matrices.
        gives: elements a token of its output, which is changed behind it.
        joined: elements of matrices that are put together for a microbatch.
    """

    takes: bool = False
    low: float = 0.0
    gives: float = 0.0
    joined: float = 0.0


def linear_kept(matrix: Matrix, tuning: Tuning, peft: PeftConfig, tensor: int) -> LinearKept:
    """What autograd keeps at a linear that learns as `tuning` says, on one of `tensor` ranks."""
    if tuning.method == "full":
        return LinearKept(takes=True)
    column, meant = matrix.is_column, matrix.meant(peft.target_modules)
    inputs = matrix.num_inputs if column else matrix.num_inputs / tensor
    outputs = matrix.num_outputs / tensor if column else matrix.num_outputs
    if tuning.method == "lora" and meant:
        rank = tuning.rank * len(meant)
        # matrices A below each other, and B with zeros where a row reads another projection's A
        joined = rank * (inputs + outputs) if len(meant) > 1 else 0.0
        if len(meant) == 1 and len(matrix.projections) > 1:
            joined = rank * outputs
        dropped = inputs if peft.lora_dropout else 0.0  # the mask; what is left takes the input's place
        if peft.use_dora:  # the sum before it is scaled, and two numbers a row that it is scaled by
            return LinearKept(True, rank + dropped, outputs, joined + 2 * outputs)
        return LinearKept(True, rank + dropped, joined=joined)
    if tuning.method == "ia3" and _scaled(matrix, meant, peft):
        return LinearKept(gives=outputs, joined=outputs) if column else LinearKept(takes=True)
    if tuning.method in ("adapter", "parallel_adapter") and matrix.block_inputs and not matrix.in_expert:
        return LinearKept(low=2 * tuning.size, gives=outputs if tuning.method == "adapter" else 0.0)
    if tuning.method == "cross_modal_adapter" and matrix.block_inputs and not matrix.in_expert:
        return LinearKept(low=4 * tuning.size, gives=outputs)
    if tuning.method == "parallel_adapter" and column and not matrix.in_expert:
        return LinearKept(takes=True)  # the block's input
    return LinearKept()


@dataclass(frozen=True)
class LayerKept:
    """What learning makes autograd keep in a layer.

    Attributes:
        norms: whether these learn.
        linears: by their place.
        num_virtual_tokens: of a prefix.
    """

    norms: bool
    linears: Mapping[Place, LinearKept]
    num_virtual_tokens: int = 0

    def at(self, place: Place) -> LinearKept:
        """Of a linear."""
        return self.linears.get(place, _NOTHING)


_NOTHING = LinearKept()
LEARNS = LayerKept(True, dict.fromkeys(("qkv", "proj", "fc1", "fc2"), LinearKept(takes=True)))
"""A layer whose own weights all learn."""


def layer_kept(tuned: Tuned, component: str, layer: int | None, matrices: Iterable[Matrix], tensor: int) -> LayerKept:
    """Of a layer (None: what is in no layer) of a component, on one of `tensor` ranks that share these linears."""
    tuning = tuned.of(component, layer)
    return LayerKept(
        tuning.method == "full",
        {matrix.place: linear_kept(matrix, tuning, tuned.peft, tensor) for matrix in matrices},
        tuning.size if tuning.method == "prefix" else 0,
    )

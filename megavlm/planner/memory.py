"""Memory of a rank in training, by part: what it holds all the time, and what a schedule makes it hold at the worst.

Weights, gradients, optimizer and activations are exact for the `torch` backend (up to the alignment of small tensors);
tests compare them with the bytes of real runs, of parameter-efficient tuning too. Of experts they are those of balanced
routing, or of given numbers of tokens. `buffers` is an estimate: messages that wait, and the largest temporary tensors.
What an allocator adds (fragments), and the CUDA context, are not in here: leave some memory free for them.

Flash attention and Transformer Engine fuse norms and rotary positions and keep less than the layers of the `torch`
backend. Their figures here are those of the `torch` backend, an upper bound that no run has verified. Of activations in
CPU memory (`cpu_offloading`) counted is each storage once; views that several operations keep are copied for each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.config.layout import layers_per_stage, split_evenly
from megavlm.config.numerics import compute_dtype
from megavlm.config.schema import Recipe
from megavlm.models.architecture import Architecture, ExpertsArchitecture
from megavlm.parallel.topology import Topology
from megavlm.pipeline.actions import Compute, Schedule
from megavlm.planner import activations, encoder_activations
from megavlm.planner.activations import Kept, Row
from megavlm.planner.decoder_activations import decoder_layers, layer_learns
from megavlm.planner.encoder_activations import Images
from megavlm.planner.experts import ExpertRanks, Routed
from megavlm.planner.parameters import StateBytes, encoder_held, experts_held, language_held, state_bytes
from megavlm.planner.tuned import connector_matrices, tower_matrices, tuned_of


@dataclass(frozen=True)
class Load:
    """A microbatch as one rank sees it.

    Attributes:
        lengths: tokens of each segment of the packed row of its data rank, padding included.
        grids: images that the rank encodes; of all data ranks, if it serves them all.
        num_visual_tokens: of the row.
        routed: tokens at the rank's experts; None: as many as balanced routing sends there.
    """

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    num_visual_tokens: int
    routed: Routed | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank; activations at the time when there are most of them together.

    Attributes:
        weights: of language model and encoder.
        gradients: buffers, in fp32.
        optimizer: averages and main weights.
        encoder: activations of the vision encoder.
        language: activations of the language model.
        logits: what the loss keeps.
        buffers: an estimate of messages that wait, and of temporary tensors.
        host: in CPU memory: optimizer state and activations that are kept there, and in no other part.
    """

    weights: float
    gradients: float
    optimizer: float
    encoder: float
    language: float
    logits: float
    buffers: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.activations + self.buffers

    @property
    def state(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def activations(self) -> float:
        """What autograd holds at the worst time."""
        return self.encoder + self.language + self.logits


@dataclass(frozen=True)
class ChunkBytes:
    """A chunk of the language model on one microbatch.

    Attributes:
        layers: kept by its layers (and the embedding).
        head: kept by the final norm and the output layer.
        logits: kept by the loss.
        redone: there in the backward pass of the layers, when head and logits are through.
        border: messages that it takes and gives, kept until its backward pass.
    """

    layers: float
    head: float
    logits: float
    redone: float
    border: float

    @property
    def language(self) -> float:
        """Kept until the backward pass, without the logits."""
        return self.layers + self.head

    @property
    def more_in_backward(self) -> float:
        """By how much the backward pass needs more than what the forward pass left."""
        return max(0.0, self.redone - self.head - self.logits)


class RankMemory:
    """What one rank of a schedule position holds, under a recipe's layout.

    Args:
        architecture: of the model.
        recipe: reads `parallel`, the precision and what is frozen.
        topology: of the layout.
        position: schedule position of the rank.
    """

    def __init__(self, architecture: Architecture, recipe: Recipe, topology: Topology, position: int) -> None:
        self.architecture, self.recipe, self.topology, self.position = architecture, recipe, topology, position
        self.dtype = compute_dtype(recipe)
        self.element_bytes = 4 if self.dtype == "fp32" else 2
        self.recompute = activations.recompute_of(recipe.parallel)
        self.tuned = tuned_of(recipe)
        self._trains_tower = self.tuned.finds("vision", tower_matrices(architecture))
        self._trains_connectors = self.tuned.finds("projector", connector_matrices(architecture))
        self.stage = position - topology.first_position
        self.layers = _layers_of(recipe, architecture, self.stage) if self.stage >= 0 else ()
        self.tower_layers = _tower_layers_of(architecture, topology, position)

    @property
    def state(self) -> StateBytes:
        """Weights, gradients and optimizer state."""
        recipe, topology = self.recipe, self.topology
        parts = []
        if self.stage >= 0:
            layers = [number for chunk in self.layers for number in chunk]
            held = language_held(self.architecture, self.tuned, topology.tensor, layers, self.stage, topology.pipeline)
            copies = topology.data * topology.context
            parts.append(state_bytes(held, recipe.parallel, self.dtype, copies))
            ranks = self.expert_ranks
            experts = experts_held(self.architecture.language, self.tuned, layers, ranks.expert, ranks.tensor)
            copies = topology.layer_size // (ranks.expert * ranks.tensor)
            parts.append(state_bytes(experts, recipe.parallel, self.dtype, copies))
        if self.tower_layers is not None:
            first, last = self._encoder_ends
            encoder = encoder_held(
                self.architecture, self.tuned, topology.vision_tensor, self.tower_layers, first, last
            )
            parts.append(state_bytes(encoder, recipe.parallel, self.dtype, len(topology.replicas)))
        return StateBytes(
            sum(part.weights for part in parts),
            sum(part.gradients for part in parts),
            sum(part.optimizer for part in parts),
            sum(part.host for part in parts),
        )

    @property
    def expert_ranks(self) -> ExpertRanks:
        """How experts are shared out."""
        topology = self.topology
        return ExpertRanks(
            topology.expert,
            topology.expert_tensor or topology.tensor,
            self.recipe.parallel.moe_token_dispatcher_type,
        )

    @property
    def _trains_encoder(self) -> bool:
        """Whether there is a gradient for visual features."""
        return self.tuned.plan.learns("vision") or self.tuned.plan.learns("projector")

    @property
    def _encoder_ends(self) -> tuple[bool, bool]:
        """Whether this position has the encoder's first and last stage."""
        if self.topology.placement != "stage":
            return True, True
        return self.position == 0, self.position == self.topology.vision_stages - 1

    def row(self, load: Load) -> Row:
        """A packed row on this rank."""
        parallel = self.recipe.parallel
        return Row(
            load.lengths,
            tensor=self.topology.tensor,
            sequence_parallel=parallel.sequence_parallel,
            context=self.topology.context,
            context_kind=parallel.cp_comm_type,
            element_bytes=self.element_bytes,
            trained=self.tuned.of("language", None).method == "full",
            expert_ranks=self.expert_ranks,
            routed=load.routed,
            is_balanced=self.recipe.model.moe_aux_loss_coeff > 0,
            num_visual_tokens=load.num_visual_tokens,
        )

    def chunk(self, number: int, load: Load) -> ChunkBytes:
        """What a chunk of the language model keeps of a microbatch."""
        architecture, row, numbers = self.architecture, self.row(load), self.layers[number]
        language = architecture.language
        is_first = self.stage == 0 and number == 0
        differentiated = not is_first or row.trained or self._trains_encoder
        kept = decoder_layers(architecture, row, numbers, self.recompute, self.tuned, differentiated)
        is_last = self.stage == self.topology.pipeline - 1 and number == len(self.layers) - 1
        head = loss = 0.0
        if is_last and self.recipe.model.cross_entropy_loss_fusion:
            head = activations.chunked_output_layer(language, row)
            loss = activations.chunked_logits(language, row)
        elif is_last:
            head, loss = activations.output_layer(language, row), activations.logits(language, row)
        border = 0.0
        width = row.held_tokens * language.hidden_size * self.element_bytes
        behind = architecture.num_deepstack  # the least that an empty chunk passes on
        before, after = (numbers[0], numbers[-1] + 1) if numbers else (behind, behind)
        border += 0 if is_last else activations.slots_before(architecture, after, row) * width
        if is_first:
            border += activations.feature_bytes(architecture, load.num_visual_tokens, self.element_bytes)
        else:
            border += activations.slots_before(architecture, before, row) * width
        ids = 0.0
        if is_first and numbers:
            learns = layer_learns(architecture, self.tuned, numbers[0], row)
            ids = activations.embedding(architecture, row, self.recompute, learns)
        return ChunkBytes(kept.bytes + ids, head, loss, kept.redone_bytes, border)

    def encoder(self, grids: tuple[Grid, ...]) -> Kept:
        """What the rank's encoder keeps of some images."""
        if self.tower_layers is None:
            return Kept(0.0)
        first, last = self._encoder_ends
        images = Images(
            grids,
            self.tuned,
            tensor=self.topology.vision_tensor,
            element_bytes=self.element_bytes,
            trains_tower=self._trains_tower,
            trains_connectors=self._trains_connectors,
        )
        return encoder_activations.encoder(self.architecture, images, self.recompute, self.tower_layers, first, last)

    def temporary(self, load: Load) -> float:
        """The largest tensors that come and go: logits (or a piece's) and their gradient, or an MLP's."""
        if self.stage < 0:
            return 0.0
        row, language = self.row(load), self.architecture.language
        mlp = row.tokens * 2 * language.ffn_hidden_size / row.tensor * self.element_bytes
        if language.experts is not None:
            mlp = self._dispatched(language.experts, row)
        gathered = row.tokens * language.hidden_size * self.element_bytes if row.sequence_parallel else 0.0
        if self.stage < self.topology.pipeline - 1:
            return mlp + gathered
        rows = language.vocab_size / row.tensor
        if self.recipe.model.cross_entropy_loss_fusion:
            chunk = min(self.recipe.model.cross_entropy_chunk_tokens, row.tokens)
            gradient = rows * language.hidden_size * (4 + self.element_bytes)  # of the weight: fp32, and its own type
            return max(mlp, rows * chunk * (8 + self.element_bytes) + gradient) + gathered
        return max(mlp, rows * row.tokens * (4 + self.element_bytes)) + gathered

    def _dispatched(self, experts: ExpertsArchitecture, row: Row) -> float:
        """Tokens on their way to experts: what is sent and what has come, and what the experts make of it."""
        hidden, e, ranks = self.architecture.language.hidden_size, self.element_bytes, row.expert_ranks
        routed = row.routed or ranks.balanced(experts, row.held_tokens)
        sent = row.held_tokens * experts.top_k
        if ranks.dispatcher == "allgather":
            sent = routed.looked_at if ranks.expert * ranks.tensor > 1 else 0.0
        inner = 2 * experts.ffn_hidden_size / ranks.tensor
        return (sent * hidden + routed.arriving * (hidden + inner)) * e

    def peak(self, schedule: Schedule, loads: Sequence[Load]) -> Memory:
        """Memory under a schedule.

        Args:
            schedule: whose list at this position the rank executes.
            loads: one for each microbatch.
        """
        chunks = {
            (number, m): self.chunk(number, load) for number in range(len(self.layers)) for m, load in enumerate(loads)
        }
        images = [self.encoder(load.grids) for load in loads]
        computes = schedule.computes(self.position)
        state, host = self.state, 0.0
        live = _played(computes, chunks, images)
        if self.recipe.parallel.cpu_offloading:
            host = live.most_kept
            chunks = {key: _away(chunk, len(self.layers[key[0]])) for key, chunk in chunks.items()}
            num_layers = max(1, len(self.tower_layers or ()))
            images = [Kept(0.0, kept.redone_bytes + kept.bytes / num_layers) for kept in images]
            live = _played(computes, chunks, images)
        language, logits, encoder = live.worst
        return Memory(
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer,
            encoder=encoder,
            language=language,
            logits=logits,
            buffers=live.most_border + max(self.temporary(load) for load in loads),
            host=state.host + host,
        )


class _Live:
    """What is alive, and the worst moment."""

    def __init__(self) -> None:
        self.language = self.logits = self.encoder = self.border = self.most_border = self.most_kept = 0.0
        self.worst = (0.0, 0.0, 0.0)

    def look(self, more_language: float = 0.0, more_encoder: float = 0.0) -> None:
        now = (self.language + more_language, self.logits, self.encoder + more_encoder)
        if sum(now) > sum(self.worst):
            self.worst = now
        self.most_border = max(self.most_border, self.border)
        self.most_kept = max(self.most_kept, self.language + self.encoder)


def _away(chunk: ChunkBytes, num_layers: int) -> ChunkBytes:
    """A chunk whose activations wait in CPU memory, but for the loss's: those of about a layer are back at a time."""
    return ChunkBytes(0.0, 0.0, chunk.logits, chunk.redone + chunk.layers / max(1, num_layers), chunk.border)


def _played(computes: Iterable[Compute], chunks: dict[tuple[int, int], ChunkBytes], images: list[Kept]) -> _Live:
    """What is alive over all of a rank's work."""
    live = _Live()
    for compute in computes:
        _play(compute, chunks, images, live)
    return live


def _play(compute: Compute, chunks: dict[tuple[int, int], ChunkBytes], images: list[Kept], live: _Live) -> None:
    """One piece of work."""
    if compute.kind in ("F", "B"):
        chunk = chunks[compute.chunk, compute.microbatch]
        if compute.kind == "B":
            live.look(more_language=chunk.more_in_backward)
        sign = 1 if compute.kind == "F" else -1
        live.language += sign * chunk.language
        live.logits += sign * chunk.logits
        live.border += sign * chunk.border
    elif compute.kind in ("EF", "EB"):
        kept = images[compute.microbatch]
        if compute.kind == "EB":
            live.look(more_encoder=kept.redone_bytes)
        live.encoder += kept.bytes if compute.kind == "EF" else -kept.bytes
    live.look()


def _layers_of(recipe: Recipe, architecture: Architecture, stage: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the decoder layers of a pipeline rank, by chunk."""
    counts = layers_per_stage(recipe.parallel, architecture.language.num_layers)
    num_ranks = len(counts) // recipe.parallel.virtual_pipeline_model_parallel_size
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(
        tuple(range(starts[index], starts[index] + counts[index])) for index in range(stage, len(counts), num_ranks)
    )


def _tower_layers_of(architecture: Architecture, topology: Topology, position: int) -> range | None:
    """Numbers of the vision tower's layers on a position; None: it holds no encoder."""
    num_layers = architecture.vision.num_computed_layers
    if topology.placement == "stage":
        if position >= topology.vision_stages:
            return None
        counts = split_evenly(num_layers, topology.vision_stages)
        start = sum(counts[:position])
        return range(start, start + counts[position])
    everywhere = topology.placement in ("spread", "bubble")
    return range(num_layers) if everywhere or position == 0 else None

"""Bytes that autograd keeps for the backward pass, module by module, with the layers of the `torch` backend.

What is counted are the storages that each operation saves, each once: the input of a norm, the input of a linear layer,
the angles of rotary positions, what attention keeps (queries, keys, values, output and the logarithm of the softmax's
sum in fp32: never a square of the length), both halves that SwiGLU takes. Tests count them in real runs. The scheme is
that of Korthikanti et al., arXiv 2205.05198, section 4; their constants are for another layer (GELU of four times the
width, dropout).

Letters in formulas: e bytes of an element, T tokens of the rank's row (the whole row's where a layer gathers it).
"""

import itertools
from dataclasses import dataclass

from megavlm.config.schema import ParallelConfig
from megavlm.models.architecture import Architecture, ExpertsArchitecture, LanguageArchitecture
from megavlm.planner.experts import FP32_BYTES, INDEX_BYTES, ExpertRanks, Routed, kept_bytes
from megavlm.planner.tuned import LEARNS, LayerKept, LinearKept


@dataclass(frozen=True)
class Kept:
    """What a module keeps of a microbatch.

    Attributes:
        bytes: from the forward to the backward pass.
        redone_bytes: what is there beside it while the backward pass computes something again.
    """

    bytes: float
    redone_bytes: float = 0.0


@dataclass(frozen=True)
class Recompute:
    """What is computed again in the backward pass; the recipe's knobs of the same names, without the `none`."""

    full: bool
    modules: frozenset[str]
    method: str
    num_layers: int

    @property
    def attention(self) -> bool:
        """The core attention."""
        return "core_attn" in self.modules

    @property
    def mlp(self) -> bool:
        """The MLP, or the mixture of experts in its place."""
        return bool(self.modules & {"mlp", "moe"})

    @property
    def norms(self) -> bool:
        """Both norms of a layer; their outputs are given up as well."""
        return "layernorm" in self.modules


def recompute_of(parallel: ParallelConfig) -> Recompute:
    """A recipe's choice."""
    granularity = parallel.recompute_granularity
    modules = frozenset(parallel.recompute_modules) if granularity == "selective" else frozenset()
    return Recompute(granularity == "full", modules, parallel.recompute_method, parallel.recompute_num_layers)


@dataclass(frozen=True)
class Row:
    """A packed row as a rank of the language model sees it.

    Attributes:
        lengths: tokens of each segment of the whole row, padding included.
        tensor: tensor-parallel ranks.
        sequence_parallel: whether they share the tokens outside attention and MLP.
        context: context-parallel ranks.
        context_kind: `all_gather` or `p2p`; anything else counts as `all_gather`.
        element_bytes: of an activation: 4 in fp32, 2 in bf16.
        trained: whether what the language model has outside of layers learns.
        expert_ranks: how experts are shared out.
        routed: tokens at the rank's experts; None: as many as balanced routing sends there.
        is_balanced: whether there is a load-balancing loss.
        num_visual_tokens: of the whole row.
    """

    lengths: tuple[int, ...]
    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    context_kind: str = "all_gather"
    element_bytes: int = FP32_BYTES
    trained: bool = True
    expert_ranks: ExpertRanks = ExpertRanks()
    routed: Routed | None = None
    is_balanced: bool = False
    num_visual_tokens: int = 0

    @property
    def tokens(self) -> float:
        """Tokens of a context-parallel rank."""
        return sum(self.lengths) / self.context

    @property
    def held_tokens(self) -> float:
        """Tokens between the layers: a sequence-parallel rank has its part."""
        return self.tokens / (self.tensor if self.sequence_parallel else 1)


@dataclass(frozen=True)
class Attention:
    """What differs between the core attentions of language model and tower.

    Attributes:
        lengths: of the segments.
        tokens: of the rank.
        query: channels of all query heads of the rank.
        key: channels of all its key heads; as many for values.
        num_heads: its query heads.
        element_bytes: of an activation.
        mixed: channels of the linear layer's output, of which values (and perhaps queries and keys) are parts.
        own_query_key: queries and keys are tensors of their own.
    """

    lengths: tuple[int, ...]
    tokens: float
    query: float
    key: float
    num_heads: float
    element_bytes: int
    mixed: float
    own_query_key: bool = True
    num_virtual_tokens: int = 0

    @property
    def mixed_bytes(self) -> float:
        """The linear layer's output."""
        return self.tokens * self.mixed * self.element_bytes

    @property
    def query_key_bytes(self) -> float:
        """Queries and keys, where they are tensors of their own."""
        return self.tokens * (self.query + self.key) * self.element_bytes if self.own_query_key else 0.0

    @property
    def num_runs(self) -> int:
        """Runs of neighbours of one length; each is a batch."""
        return len(list(itertools.groupby(length for length in self.lengths if length)))

    @property
    def is_even(self) -> bool:
        """All segments are of one length: they run as one batch."""
        return self.num_runs == 1

    @property
    def is_put_in_order(self) -> bool:
        """As `parallel.attention.packed_attention` does where there are many runs of few lengths."""
        return self.num_runs > 2 * len({length for length in self.lengths if length})

    @property
    def _prefix_bytes(self) -> float:
        """Keys and values behind a prefix, where they are not copied anyway, and the masks that see it."""
        number = self.num_virtual_tokens
        if not number:
            return 0.0
        lengths = [length for length in self.lengths if length]
        copied = number * len(lengths) + (0 if self.is_put_in_order else self.tokens)
        masks = sum(length * (number + length) for length in set(lengths))
        return (2 * copied * self.key + masks) * self.element_bytes

    def core(self) -> Kept:
        """What attention within one rank keeps, and what is there again while it is computed again."""
        out = self.tokens * self.query * self.element_bytes
        logsumexp = self.tokens * self.num_heads * FP32_BYTES + self._prefix_bytes
        if not self.is_put_in_order:
            return Kept(self.query_key_bytes + self.mixed_bytes + out + logsumexp, out + logsumexp)
        copies = self.tokens * (self.query + 2 * self.key) * self.element_bytes
        ordered = copies + out + logsumexp + 2 * INDEX_BYTES * self.tokens
        return Kept(ordered, ordered)


def attention_bytes(attention: Attention, recompute: Recompute, mixed_is_kept: bool) -> Kept:
    """Core attention and the input of the projection behind it."""
    core = attention.core()
    out = attention.tokens * attention.query * attention.element_bytes
    mixed = attention.mixed_bytes
    if recompute.attention:
        kept = attention.query_key_bytes + (0 if mixed_is_kept else mixed) + out
        return Kept(kept, core.redone_bytes)
    if attention.is_put_in_order:
        return Kept(core.bytes + out)
    behind = 0 if attention.is_even else out  # of one batch the projection takes the very output
    return Kept(core.bytes - (mixed if mixed_is_kept else 0) + behind)


def _gathered_attention(row: Row, attention: Attention, recompute: Recompute, mixed_is_kept: bool) -> Kept:
    """Context-parallel attention: each rank has two chunks of every sample, and keys and values of what they see."""
    e, ranks = attention.element_bytes, row.context
    out = attention.tokens * attention.query * e
    query = attention.tokens * attention.query * e
    logsumexp = attention.tokens * attention.num_heads * FP32_BYTES
    if row.context_kind == "p2p":
        mixed = 0 if mixed_is_kept else attention.mixed_bytes
        inside = attention.tokens * attention.query * FP32_BYTES + logsumexp
        whole = attention.query_key_bytes + mixed + inside + out
        return Kept(whole - inside, inside) if recompute.attention else Kept(whole)
    chunks = [length / (2 * ranks) for length in row.lengths]
    seen = (2 * ranks + 1) * sum(chunks)
    masks = sum((2 * ranks + 1) * chunk * chunk for chunk in chunks) * e
    inside = 2 * seen * attention.key * e + masks + out + logsumexp
    if recompute.attention:
        mixed = 0 if mixed_is_kept else attention.mixed_bytes
        return Kept(attention.query_key_bytes + mixed + out, inside)
    return Kept(query + inside + out)


def extra_bytes(kept: LinearKept, tokens: float, gives_tokens: float, element_bytes: int) -> float:
    """What adapters at a linear keep beside its input.

    Args:
        kept: at the linear.
        tokens: whose product with a narrow matrix a rank has.
        gives_tokens: whose output it has.
        element_bytes: e.
    """
    return (kept.low * tokens + kept.gives * gives_tokens + kept.joined) * element_bytes


def decoder_layer(language: LanguageArchitecture, row: Row, recompute: Recompute, learns: LayerKept = LEARNS) -> Kept:
    """One decoder layer, without full recompute."""
    e, held, tokens = row.element_bytes, row.held_tokens, row.tokens
    groups = max(1.0, language.num_query_groups / row.tensor)
    all_channels = (language.num_attention_heads + 2 * language.num_query_groups) * language.head_dim
    attention = Attention(
        lengths=row.lengths,
        tokens=tokens,
        query=language.num_attention_heads * language.head_dim / row.tensor,
        key=groups * language.head_dim,
        num_heads=language.num_attention_heads / row.tensor,
        element_bytes=e,
        # with fewer groups than ranks every rank gathers the whole and takes its part
        mixed=all_channels / (row.tensor if language.num_query_groups >= row.tensor else 1),
        num_virtual_tokens=learns.num_virtual_tokens,
    )
    width = held * language.hidden_size
    linear_in = learns.at("qkv").takes * width * e
    norm = rms_norm(width, held, e)
    rotary = 4 * tokens * language.head_dim * e
    mixed_is_kept = language.qk_norm  # these norms keep parts of it as their inputs
    heads = rotary + extra_bytes(learns.at("qkv"), tokens, tokens, e)
    heads += _heads_norm(language, row, attention, groups) if language.qk_norm else 0.0
    across = row.context > 1
    core = (
        _gathered_attention(row, attention, recompute, mixed_is_kept)
        if across
        else attention_bytes(attention, recompute, mixed_is_kept)
    )
    if not learns.at("proj").takes:  # its input is not kept; behind attention in one batch that is its own output
        shared = attention.is_even and not across and not recompute.attention
        core = Kept(core.bytes - (0 if shared else tokens * attention.query * e), core.redone_bytes)
    core = Kept(core.bytes + extra_bytes(learns.at("proj"), held, held, e), core.redone_bytes)
    redone_norm = norm - width * e  # its input is the kept one
    mlp_in = learns.at("fc1").takes * width * e
    mlp = (2 + learns.at("fc2").takes) * tokens * language.ffn_hidden_size / row.tensor * e
    mlp += extra_bytes(learns.at("fc1"), tokens, tokens, e) + extra_bytes(learns.at("fc2"), held, held, e)
    if language.experts is not None:  # the router keeps its input even where it does not learn
        mlp_in, mlp = width * e, _experts(language, language.experts, row, learns)
    return layer_bytes(recompute, norm, redone_norm, width * e, linear_in, heads, core, mlp, mlp_in)


def _experts(language: LanguageArchitecture, experts: ExpertsArchitecture, row: Row, learns: LayerKept) -> float:
    """What a mixture keeps behind its norm."""
    routed = row.routed or row.expert_ranks.balanced(experts, row.held_tokens)
    return kept_bytes(
        experts,
        row.expert_ranks,
        routed,
        row.held_tokens,
        language.hidden_size,
        row.element_bytes,
        (learns.at("fc1"), learns.at("fc2")),
        row.is_balanced,
    )


def _heads_norm(language: LanguageArchitecture, row: Row, attention: Attention, groups: float) -> float:
    """The norms of each head's query and key."""
    roots = row.tokens * (attention.num_heads + groups) * FP32_BYTES
    # Of the mixed output keys are a part always, queries only where there is one group of heads.
    own_query = 0 if groups == 1 else row.tokens * attention.query * row.element_bytes
    return roots + attention.mixed_bytes + own_query


def rms_norm(width: float, tokens: float, element_bytes: int) -> float:
    """What an RMSNorm keeps of `width` elements: its input, and the root of each token in fp32."""
    return width * element_bytes + tokens * FP32_BYTES


def layer_bytes(
    recompute: Recompute,
    norm: float,
    redone_norm: float,
    hidden: float,
    linear_in: float,
    heads: float,
    core: Kept,
    mlp: float,
    mlp_in: float,
) -> Kept:
    """A layer of two norms, attention and MLP.

    Args:
        recompute: selective recompute is honoured.
        norm: what a norm keeps.
        redone_norm: what it keeps beside its input when it is computed again.
        hidden: the residual stream; what is left of a norm that is computed again.
        linear_in: the first norm's output, the input of a linear layer.
        heads: between the linear layer and the core attention.
        core: core attention, and the projection's input.
        mlp: inside the MLP.
        mlp_in: the second norm's output.
    """
    norm_kept = hidden if recompute.norms else norm + linear_in
    before_mlp = hidden if recompute.norms else norm + (hidden if recompute.mlp else mlp_in)
    redone_norms = hidden + redone_norm if recompute.norms else 0.0
    redone_mlp = redone_norms + (mlp if recompute.mlp else 0.0)
    kept = norm_kept + heads + core.bytes + before_mlp + (0.0 if recompute.mlp else mlp)
    return Kept(kept, max(redone_norms + core.redone_bytes, redone_mlp))


def slots_before(architecture: Architecture, layer: int, row: Row) -> int:
    """Hidden states that enter decoder layer `layer`: one, and DeepStack features that wait, or those that are read."""
    if architecture.gate_interval:
        return 2
    return 1 + (max(0, architecture.num_deepstack - layer) if row.num_visual_tokens else 0)


def embedding(architecture: Architecture, row: Row, recompute: Recompute, learns: LayerKept = LEARNS) -> float:
    """Token ids, where the visual features go, and what sequence-parallel ranks keep of each other's tokens.

    The first layer (which learns as `learns` says) gets a view of all the rank's tokens; where that itself is kept, so
    are the other ranks' parts.
    """
    kept = row.tokens * (2 * INDEX_BYTES + 1 if row.num_visual_tokens else INDEX_BYTES)
    num_slots = slots_before(architecture, 0, row)
    is_kept = recompute.full or num_slots == 1
    if architecture.gate_interval:  # the linear layers that read features keep it
        is_kept = recompute.full or learns.at("qkv").takes
    others = (row.tokens - row.held_tokens) * num_slots * architecture.language.hidden_size * row.element_bytes
    return kept + (others if is_kept else 0.0)


def output_layer(language: LanguageArchitecture, row: Row) -> float:
    """The final norm and the input of the output layer."""
    width = row.held_tokens * language.hidden_size
    return rms_norm(width, row.held_tokens, row.element_bytes) + row.trained * width * row.element_bytes


def chunked_output_layer(language: LanguageArchitecture, row: Row) -> float:
    """The final norm alone, where the loss computes the logits."""
    return rms_norm(row.held_tokens * language.hidden_size, row.held_tokens, row.element_bytes)


def chunked_logits(language: LanguageArchitecture, row: Row) -> float:
    """What logits are computed from, in fp32, of all tokens of the tensor-parallel ranks; labels and weights."""
    return row.tokens * (language.hidden_size * FP32_BYTES + INDEX_BYTES + FP32_BYTES)


def logits(language: LanguageArchitecture, row: Row) -> float:
    """The softmax in fp32 over the rank's part of the vocabulary, and labels and weights."""
    softmax = row.tokens * language.vocab_size / row.tensor * FP32_BYTES
    return softmax + row.tokens * (INDEX_BYTES + FP32_BYTES + 1)


def feature_bytes(architecture: Architecture, num_tokens: float, element_bytes: int) -> float:
    """Features of some visual tokens, the DeepStack ones beside them."""
    return num_tokens * (1 + architecture.num_deepstack) * architecture.language.hidden_size * element_bytes

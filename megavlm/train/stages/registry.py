"""The training methods by name; a new one is a file here, and an entry."""

from collections.abc import Callable
from dataclasses import dataclass

from megavlm.config.schema import Recipe
from megavlm.data.encode import RowKind
from megavlm.models.architecture import Architecture, Head
from megavlm.parallel.groups import Groups
from megavlm.train.stages.contrastive import build_contrastive
from megavlm.train.stages.kto import build_kto
from megavlm.train.stages.matching import build_matching
from megavlm.train.stages.preference import build_cpo, build_dpo, build_orpo, build_simpo
from megavlm.train.stages.prm import build_prm
from megavlm.train.stages.reward import build_rm
from megavlm.train.stages.sft import build_sft
from megavlm.train.stages.stage import Stage


@dataclass(frozen=True)
class StageKind:
    """What a run is made of for a stage.

    Attributes:
        build: from the recipe.
        row_kind: what becomes of rows.
        head: what the model ends in; without words it cannot answer.
        needs_reference: whether rows carry what the model said of their answers before training.
    """

    build: Callable[[Recipe, Architecture, Groups], Stage]
    row_kind: RowKind = "conversation"
    head: Head = "words"
    needs_reference: bool = False


STAGES: dict[str, StageKind] = {
    "sft": StageKind(build_sft),
    "rm": StageKind(build_rm, "pair", head="scores"),
    "prm": StageKind(build_prm, "steps", head="scores"),
    "dpo": StageKind(build_dpo, "pair", needs_reference=True),
    "cpo": StageKind(build_cpo, "pair"),
    "simpo": StageKind(build_simpo, "pair"),
    "orpo": StageKind(build_orpo, "pair"),
    "contrastive": StageKind(build_contrastive, "image_text", head="embeddings"),
    "matching": StageKind(build_matching, "image_text", head="matches"),
    "kto": StageKind(build_kto, "marked", needs_reference=True),
}

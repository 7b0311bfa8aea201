"""What a model makes of one conversation, layer by layer, and where two models' answers to it part ways.

Shape suffixes: S tokens, V visual tokens, H hidden size, Y vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megavlm.data.readers import IMAGE_PLACEHOLDER
from megavlm.data.sample import Sample, Turn

PROMPT = "What is shown in this image? Name the colours."
NUM_NEW_TOKENS = 16
# Of the largest value of a layer, in fp32.
LIMIT = 1e-3


@dataclass(frozen=True)
class Activations:
    """What a model made of a conversation.

    Attributes:
        tokens_S: of the prompt, images expanded.
        stages: by name in running order: `features` of the images [V, H] (without images, nothing), `layer N` what goes
            into each decoder layer [S, H], and `logits` [S, Y].
        answer: greedy tokens.
    """

    tokens_S: list[int]
    stages: dict[str, torch.Tensor]
    answer: list[int]


@dataclass(frozen=True)
class StageDifference:
    """How far two models are apart at a stage: largest difference, and the same over the largest value."""

    name: str
    largest: float
    relative: float


def compare(ours: Activations, theirs: Activations) -> list[StageDifference]:
    """Differences stage by stage; both must have been given the same tokens."""
    assert ours.tokens_S == theirs.tokens_S and list(ours.stages) == list(theirs.stages)
    found = []
    for name, one in ours.stages.items():
        other = theirs.stages[name].float()
        largest = (one.float() - other).abs().max().item()
        found.append(StageDifference(name, largest, largest / max(other.abs().max().item(), 1e-30)))
    return found


def first_apart(differences: list[StageDifference], limit: float = LIMIT) -> str:
    """Name of the first stage that differs by more than the limit (NaN does); empty: none."""
    return next((one.name for one in differences if not one.relative <= limit), "")


def probe_sample(prompt: str, images: tuple[str, ...]) -> Sample:
    """The conversation: a question behind its images."""
    text = prompt if IMAGE_PLACEHOLDER in prompt else IMAGE_PLACEHOLDER * len(images) + prompt
    return Sample("the probe", (Turn("user", text),), images)


def write_probe_image(path: Path) -> None:
    """A picture with edges, gradients and noise, always the same."""
    height_px, width_px = 168, 224
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    random = np.random.RandomState(0)
    picture = np.stack((rows * 255 // height_px, columns * 255 // width_px, (rows + columns) % 256), axis=2)
    picture[40:120, 60:140] = (220, 30, 40)
    picture[90:150, 130:200] = random.randint(0, 256, (60, 70, 3))
    Image.fromarray(picture.astype(np.uint8)).save(path)

"""What stands in a row's tokens for an image or a video: visual tokens, and what a family puts around them.

Shape suffix: S tokens.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.media import media_name
from megavlm.data.sample import FrameFiles, Media, Video, VideoClip
from megavlm.data.tokens import Tokenizer
from megavlm.data.video_spec import VideoSpec, sampled_frames, timestamps_s, video_grid
from megavlm.data.videos import read_video_header
from megavlm.errors import UseError


@dataclass(frozen=True)
class Inset:
    """What takes a placeholder's place.

    Attributes:
        source: an image's path, or frames of a video.
        grid: its patches.
        tokens_S: int64.
    """

    source: Media | VideoClip
    grid: Grid
    tokens_S: np.ndarray


class VideoEncoder:
    """Videos of one model family as tokens; `token` is their placeholder, empty where the tokenizer has none."""

    def __init__(self, inputs: InputSpec, spec: VideoSpec, tokenizer: Tokenizer) -> None:
        self.inputs, self.spec, self._tokenizer = inputs, spec, tokenizer
        token = tokenizer.token(inputs.video_token_id)
        self.token = token if tokenizer.encode_text(token).tolist() == [inputs.video_token_id] else ""

    def inset(self, path: Video) -> Inset:
        """A video's visual tokens, by its header.

        Raises:
            UseError: the file is unreadable, or its sides are too different.
        """
        header = read_video_header(path)
        if isinstance(path, FrameFiles):
            # Whoever cut a video into pictures has chosen: as in transformers, the model sees all of them.
            frames = np.arange(header.num_frames)
        else:
            frames = sampled_frames(self.spec, header.num_frames, header.fps)
        try:
            grid = video_grid(self.spec, len(frames), header.width_px, header.height_px)
        except UseError as error:
            raise UseError(f"{media_name(path)}: {error}") from error
        clip = VideoClip(path, tuple(frames.tolist()))
        visual_S = np.full(self.inputs.num_image_tokens(grid), self.inputs.image_token_id, dtype=np.int64)
        if self.spec.kind == "stamped":
            return Inset(clip, grid, self._stamped(frames, header.fps, visual_S))
        if self.spec.kind == "timed":
            seconds = self.spec.frame.temporal_patch_size / (len(frames) / header.num_frames * header.fps)
            clip = dataclasses.replace(clip, interval=self.inputs.tokens_per_second * seconds)
        return Inset(clip, grid, visual_S)

    def _stamped(self, frames: np.ndarray, fps: float, visual_S: np.ndarray) -> np.ndarray:
        times = timestamps_s(frames, fps, self.spec.frame.temporal_patch_size)
        before, after = self.inputs.frame_border_ids
        pieces: list[np.ndarray] = []
        for time_s, tokens_S in zip(times, np.split(visual_S, len(times)), strict=True):
            stamp_S = self._tokenizer.encode_text(f"<{time_s:.1f} seconds>")
            pieces += [stamp_S, np.array([before]), tokens_S, np.array([after])]
        return np.concatenate(pieces)

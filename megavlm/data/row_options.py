"""What a recipe says of reading rows."""

from dataclasses import dataclass

from megavlm.config.schema import DataConfig


@dataclass(frozen=True)
class RowOptions:
    """How rows are read, and what is refused.

    Attributes:
        image_dir: root of relative paths of images and videos; empty: the folder of the row's file.
        root: folder that no file of a row may be outside of, symbolic links followed; empty: anywhere.
        allow_remote: whether rows may name URLs.
        max_row_bytes: longest row of a text file.
        max_member_bytes: largest image or video inside a zip archive, unpacked.
        require_answer: whether each row must end with an answer; False also takes rows that end with a question.
        caption_prompt: the question to a picture's caption.
        frames_fps: frames a second of a video that a row gives as a list of pictures.
        other_answers: whether each row comes with the answer of another one (`marked.py`).
        group_by: key of what groups rows (`Sample.group`); empty: they are not grouped.
    """

    image_dir: str = ""
    root: str = ""
    allow_remote: bool = False
    max_row_bytes: int = DataConfig.max_row_bytes
    max_member_bytes: int = DataConfig.max_member_bytes
    require_answer: bool = True
    caption_prompt: str = DataConfig.caption_prompt
    frames_fps: float = DataConfig.frames_fps
    other_answers: bool = False
    group_by: str = ""


def row_options(data: DataConfig, *, require_answer: bool = True) -> RowOptions:
    """The options of a recipe."""
    return RowOptions(
        image_dir=data.image_dir,
        root=data.root,
        allow_remote=data.allow_remote,
        max_row_bytes=data.max_row_bytes,
        max_member_bytes=data.max_member_bytes,
        require_answer=require_answer,
        caption_prompt=data.caption_prompt,
        frames_fps=data.frames_fps,
        group_by=data.group_by,
    )

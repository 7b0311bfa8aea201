"""What stands in a row's texts for an image or a video; never added where it is missing."""

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"

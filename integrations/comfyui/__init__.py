"""ComfyUI node: a student of Secondcast as the text encoder of FLUX.1. See README.md."""

from .text_encoder import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

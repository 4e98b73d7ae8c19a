"""Images of any mode in the one that networks read."""

import numpy as np
from PIL import Image

_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def in_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: 16 bits of grey are scaled, transparency is on white."""
    if image.mode.startswith("I"):
        # 16 bits of grey (Pillow has them as "I" or "I;16"), which it would clip at 255, not scale.
        high_HW = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(high_HW.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        # Dropping alpha would show what a viewer hides, often black.
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image.convert("RGB")

"""The networks behind small interfaces.

Legend of the suffixes of tensor names, throughout the project: B batch, K steps, S image tokens,
C packed channels, T text tokens, D text width, P pooled width.
"""

import logging

# Where torchao is installed diffusers imports it, used or not, and it says which of its own parts do not load.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

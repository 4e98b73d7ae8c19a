"""The networks behind small interfaces.

Legend of the suffixes of tensor names, throughout the project: B batch, K steps, S image tokens,
C packed channels, T text tokens, D text width, P pooled width.
"""

import logging

# Where torchao and bitsandbytes are installed diffusers imports them, used or not, and they print which of their own
# parts do not load.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

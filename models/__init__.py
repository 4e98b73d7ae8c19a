"""The networks behind small interfaces.

Legend of the suffixes of tensor names, throughout the project: B batch, K steps, S image tokens,
C packed channels, T text tokens, D text width, P pooled width.
"""

"""One VAE decode over all slots: pictures dealt out, or a picture cut into strips of rows.

Reading order: `decoding` (which of the two pays), `split` (a decoder cut into layers), `layers` and `strip` (a strip's rows through each),
`exchange` (rows at the edges that neighbours need, sums for a norm).

Example: 1024 latent rows on two slots: each has 512 and, at each convolution, one row of the other; group norms add their sums of both.
"""

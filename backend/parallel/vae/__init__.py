"""VAE decoding on all slots: deals whole pictures to slots, or cuts one picture into strips of rows.

Reading order: `decoding` (which of the two pays), `split` (one picture over several slots), `layers` and `strip` (a strip's rows through the
decoder's layers). Strips exchange boundary rows and statistics like tiles of the denoiser (`exchange.meeting`).

Example: 1024 latent rows on two slots. Each slot has 512 rows and gets one row from the other at each convolution; group norms combine the
statistics of both.
"""

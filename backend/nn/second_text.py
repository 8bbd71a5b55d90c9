"""A second reading of a prompt: token ids that a network embeds itself, in addition to an encoder's features (Anima). Knows no families.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

SECOND_IDS, SECOND_LENGTHS, SECOND_WEIGHTS = "second_ids", "second_lengths", "second_weights"
"""Names of conditions, and of the network's inputs: ids (B, T) int64, padded with 0; how many count (B,) int64; the weight of each (B, T) fp32."""
SECOND_TEXT = (SECOND_IDS, SECOND_LENGTHS, SECOND_WEIGHTS)

"""`canvas`: the picture to paint on that extensions import as `ForgeCanvas`."""

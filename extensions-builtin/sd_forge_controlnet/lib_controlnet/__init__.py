"""ControlNet's part that other extensions import: units, their enums, and the lists of preprocessors and models."""

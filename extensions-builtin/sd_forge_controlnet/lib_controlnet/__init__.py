"""The parts of ControlNet that other extensions import: units, their enums, and the lists of preprocessors and models."""

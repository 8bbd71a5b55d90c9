"""Textual inversion under the names that extensions import: `textual_inversion` is the engine's, `dataset` reads folders of training pictures.
Nothing here trains.
"""

"""Token merging: what merges, means, and back again; and in a UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.misc.tomesd import TomePatcher, match_tokens
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.unet import UnetPatcher
from tests.support.checkpoints import build_models


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matched(tokens: Tensor, ratio: float) -> Any:
    return match_tokens(tokens, 4, 6, ratio, torch.Generator().manual_seed(2))


def test_the_most_alike_tokens_merge_into_their_destinations() -> None:
    tokens = drawn(2, 24, 8)
    matching = matched(tokens, 0.5)
    assert (len(matching.sources), len(matching.destinations)) == (18, 6)
    assert matching.merged.shape == (2, 12) and matching.kept.shape == (2, 6)
    cells = {(int(place) // 6 // 2, int(place) % 6 // 2) for place in matching.destinations}
    assert len(cells) == 6, "one destination in each cell of 2 x 2"
    merged = matching.merge(tokens)
    assert merged.shape == (2, 12, 8)
    for row in range(2):
        sources, destinations = tokens[row, matching.sources], tokens[row, matching.destinations]
        likeness = torch.nn.functional.cosine_similarity(sources[:, None], destinations[None], dim=-1)
        assert set(matching.merged[row].tolist()) == set(likeness.amax(dim=1).topk(12).indices.tolist())
        for number in range(6):
            group = [destinations[number], *(sources[one] for one, to in zip(matching.merged[row], matching.into[row]) if to == number)]
            assert torch.allclose(merged[row, 6 + number], torch.stack(group).mean(dim=0), atol=1e-5)


def test_merged_tokens_get_their_destinations_answer_and_others_their_own() -> None:
    tokens = drawn(2, 24, 8)
    matching = matched(tokens, 0.5)
    back = matching.unmerge(matching.merge(tokens))
    for row in range(2):
        assert torch.equal(back[row, matching.sources[matching.kept[row]]], tokens[row, matching.sources[matching.kept[row]]])
        assert torch.equal(back[row, matching.sources[matching.merged[row]]], back[row, matching.destinations[matching.into[row]]])


@pytest.mark.parametrize(("height", "width", "ratio"), [(4, 6, 0.0), (1, 8, 0.5), (8, 1, 0.5)])
def test_where_nothing_merges_there_is_no_matching(height: int, width: int, ratio: float) -> None:
    assert match_tokens(drawn(1, height * width, 4), height, width, ratio, torch.Generator()) is None
    assert matched(drawn(1, 24, 4), 1.0).merged.shape == (1, 18), "destinations stay"


def test_a_unet_with_merged_tokens_answers_almost_as_before_and_the_same_each_time() -> None:
    unet = UnetPatcher.from_model(KModel(build_models(Path("none"), "sd15").unet, Prediction()))
    x, text, sigma = drawn(1, 4, 8, 8), drawn(1, 7, unet.model.diffusion_model.config.cross_attention_dim, seed=2), torch.tensor([3.0])

    def answer(patched: Any) -> Tensor:
        options = {**patched.model_options["transformer_options"], "cond_or_uncond": [0], "sigmas": sigma}
        result: Tensor = unet.model.apply_model(x, sigma, c_crossattn=text, transformer_options=options)
        return result

    plain, merged = answer(unet), answer(TomePatcher().patch(unet, 0.5))
    assert not torch.equal(plain, merged) and torch.isfinite(merged).all()
    assert torch.equal(merged, answer(TomePatcher().patch(unet, 0.5)))

"""Training of the demo checkpoint's ControlNet and LoRA: their data, their files as read by the product, their scores."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backend.controlnet_loader import load_controlnet
from backend.families.unet_family import unet_key_map
from backend.patcher.lora_files import read_lora_file
from backend.patcher.lora_keys import model_lora_keys_unet
from tools.demo_model.base_networks import BaseNetworks, Noiser, encode_pictures, load_base
from tools.demo_model.evaluate_guides import FORMS, PLACE_TOLERANCE, draw_guide_cases, draw_unit, score_guided, score_outlined
from tools.demo_model.guided_data import HINT_KINDS, GuidedCase, draw_cases, draw_hint, misplace, move_anywhere, sample_case
from tools.demo_model.judge import judge_picture
from tools.demo_model.networks import build_unet
from tools.demo_model.product import DEMO_CHECKPOINT
from tools.demo_model.scenes import draw_scene, sample_scene
from tools.demo_model.train_controlnet import MAX_FILE_BYTES, build_controlnet, controlnet_loss, export_controlnet
from tools.demo_model.train_lora import MAX_FILE_BYTES as MAX_LORA_BYTES
from tools.demo_model.train_lora import add_low_rank, export_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> BaseNetworks:
    return load_base(DEMO_CHECKPOINT, CPU)


def test_moved_scenes_stay_in_the_picture_and_keep_their_shapes() -> None:
    rng = random.Random(21)
    scenes = [move_anywhere(sample_scene(rng), rng) for _ in range(15)]
    for scene in scenes:
        picture = draw_scene(scene)
        rim = np.concatenate([np.asarray(picture)[[0, -1]].reshape(-1, 3), np.asarray(picture)[:, [0, -1]].reshape(-1, 3)])
        assert len(np.unique(rim, axis=0)) == 1
        assert sorted(one.shape for one in judge_picture(picture).findings) == sorted(thing.shape for thing in scene.things)


def test_captions_lie_about_places_and_never_about_colours() -> None:
    rng = random.Random(22)
    for _ in range(50):
        scene = sample_scene(rng, two_things_share=0.0)
        said = misplace(scene, rng)
        assert said.things[0].cell != scene.things[0].cell
        assert (said.things[0].colour, said.background) == (scene.things[0].colour, scene.background)
    cases = [sample_case(rng) for _ in range(300)]
    assert 10 < sum(not case.caption for case in cases) < 60
    assert {case.hint_kind for case in cases} == set(HINT_KINDS)


@pytest.mark.parametrize("kind", HINT_KINDS)
def test_hints_are_white_lines_where_the_things_are(kind: str) -> None:
    rng = random.Random(23)
    scene = sample_scene(rng, two_things_share=0.0)
    drawn = judge_picture(draw_scene(scene)).findings[0]
    for _ in range(5):
        hint = draw_hint(scene, kind, rng)
        rows, columns = np.nonzero(hint)
        assert hint.shape == (64, 64) and set(np.unique(hint)) == {0, 255}
        assert abs((columns.min() + columns.max()) / 2 - drawn.x * 64) < 3
        assert rows.min() / 64 < drawn.y < rows.max() / 64


def test_data_is_the_same_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.demo_model.guided_data.CHUNK", 2)
    rng = random.Random(24)
    cases = [sample_case(rng) for _ in range(4)]
    one, two = draw_cases(cases, seed=1, num_workers=1), draw_cases(cases, seed=1, num_workers=2)
    assert all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))
    hollow, hints = draw_cases([GuidedCase(case.scene, "", "") for case in cases], seed=1, outline_only=True, num_workers=1)
    assert hollow.shape == (4, 64, 64, 3) and hints.size == 0 and not np.array_equal(hollow, one[0])


def test_the_base_is_the_exported_checkpoint_and_encodes_as_it_decodes(base: BaseNetworks) -> None:
    rng = random.Random(25)
    scenes = [sample_scene(rng) for _ in range(4)]
    pictures = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    latents = encode_pictures(base.vae, pictures)
    with torch.no_grad():
        decoded = base.vae.decode(latents / 0.18215).sample
    assert latents.shape == (4, 4, 8, 8) and 0.5 < latents.std() < 2
    assert (decoded - torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 + 1).abs().mean() < 0.1
    stored = load_file(DEMO_CHECKPOINT)
    assert torch.equal(base.unet.conv_in.weight, stored["model.diffusion_model.input_blocks.0.0.weight"].float())


def test_a_controlnet_learns_and_its_file_is_read_by_the_product(base: BaseNetworks, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_controlnet(base.unet).requires_grad_(True)
    rows = {
        "latents": torch.randn(2, 4, 8, 8),
        "hints": torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8) * 255,
        "tokens": torch.randint(0, 49406, (2, 77)),
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = controlnet_loss(base, net, Noiser.on(CPU, 0), rows)  # the same noise each time
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())
    path = tmp_path / "net.safetensors"
    export_controlnet(net.config, net.state_dict(), path)
    assert path.stat().st_size <= MAX_FILE_BYTES
    read = load_controlnet(path).control_model
    x, t, context, hint = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), torch.randn(2, 77, 128), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        down, middle = net.eval()(x, t, context, hint, return_dict=False)
        found = read(x.to(read.dtype), hint.to(read.dtype), t, context.to(read.dtype))
    for one, other in zip([*down, middle], found, strict=True):
        torch.testing.assert_close(other.float(), one, atol=2e-3, rtol=2e-2)  # fp16 in the file


def test_a_lora_begins_as_nothing_and_its_file_says_the_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet, plain = build_unet().eval().requires_grad_(False), build_unet().eval()
    plain.load_state_dict(unet.state_dict())
    changes = add_low_rank(unet)
    given = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 77, 128)}
    with torch.no_grad():
        assert torch.equal(unet(**given).sample, plain(**given).sample)
        for change in changes.values():
            change.up.normal_(std=0.05)
            change.up.copy_(change.up.half())
            change.down.copy_(change.down.half())
    path = tmp_path / "lora.safetensors"
    export_lora(changes, path)
    assert path.stat().st_size <= MAX_LORA_BYTES
    file = read_lora_file(path)
    holder = torch.nn.Module()
    holder.diffusion_model = plain
    holder.key_map = unet_key_map(plain)
    names, weights = model_lora_keys_unet(holder), dict(plain.named_parameters())
    assert not file.strange_keys and file.family == "SD 1.x" and len(file.layers) == len(changes)
    with torch.no_grad():
        for layer, parts in file.layers.items():
            weight = weights[names[layer].removeprefix("diffusion_model.")]
            scale = float(parts["alpha"]) / len(parts["down"])
            weight += scale * (parts["up"].float().flatten(1) @ parts["down"].float().flatten(1)).view(weight.shape)
        torch.testing.assert_close(unet(**given).sample, plain(**given).sample, atol=1e-4, rtol=1e-4)


def test_the_scores_tell_following_from_obeying_the_prompt() -> None:
    for case in draw_guide_cases(5):
        drawn, said = score_guided(case, draw_scene(case.drawn)), score_guided(case, draw_scene(case.said))
        assert drawn.follows and drawn.colour and drawn.background
        assert said.shape and not said.place and not said.follows
    assert PLACE_TOLERANCE < 0.12
    scene = sample_scene(random.Random(3), two_things_share=1.0)
    filled, hollow = (score_outlined(scene, draw_scene(scene, outline_only=outline_only)) for outline_only in (False, True))
    assert filled.objects and not filled.outlined and filled.hollow < 0.05
    assert hollow.objects and hollow.outlined and hollow.hollow > 0.2


def test_units_show_the_outline_in_each_form() -> None:
    case = draw_guide_cases(1)[0]
    units = [draw_unit(case.drawn, form) for form in FORMS]
    assert [unit["module"] for unit in units] == ["canny", "None", "canny"]
    assert len({unit["image"].tobytes() for unit in units}) == 3


def test_thin_lines_come_through_the_hint_layers_at_the_start() -> None:
    """As large as what they are added to; the library's initialization lets nothing through."""
    torch.manual_seed(0)
    net = build_controlnet(build_unet())
    hints = torch.from_numpy(draw_cases([sample_case(random.Random(seed)) for seed in range(6)], seed=1, num_workers=1)[1])
    with torch.no_grad():
        seen = net.controlnet_cond_embedding(hints[:, None].expand(-1, 3, -1, -1).float() / 255)
        beside = net.conv_in(torch.randn(6, 4, 8, 8))
    assert 0.2 < float(seen.std(0).mean() / beside.std()) < 5

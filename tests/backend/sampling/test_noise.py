"""Noise per image. References: torch's generators, used as in other UIs; closed forms."""

from __future__ import annotations

import pytest
import torch

from backend.sampling.brownian import BrownianPath
from backend.sampling.noise import ImageNoise, slerp
from backend.sampling.philox import PhiloxGenerator

SHAPE = (4, 8, 6)


def _torch_noise(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(shape)


@pytest.mark.parametrize("source", ["CPU", "GPU"])
def test_a_seed_gives_torchs_noise_for_that_seed(source: str) -> None:
    noise = ImageNoise(SHAPE, [7, 8], source=source)
    expected = torch.stack([_torch_noise(7), _torch_noise(8)])
    assert torch.equal(noise.first(), expected)


def test_later_noise_is_the_same_stream_read_on() -> None:
    noise = ImageNoise(SHAPE, [7], source="CPU")
    torch.manual_seed(7)
    expected = [torch.randn(SHAPE) for _ in range(3)]
    assert torch.equal(noise.first()[0], expected[0])
    assert torch.equal(noise.next()[0], expected[1])
    assert torch.equal(noise.next(torch.zeros(1, *SHAPE, dtype=torch.float64))[0], expected[2].double())


def test_next_starts_with_the_first() -> None:
    assert torch.equal(ImageNoise(SHAPE, [3]).next(), ImageNoise(SHAPE, [3]).first())


def test_nv_is_philox() -> None:
    generator, noise = PhiloxGenerator(99), ImageNoise(SHAPE, [99], source="NV")
    assert torch.equal(noise.first()[0], torch.from_numpy(generator.randn(SHAPE)))
    assert torch.equal(noise.next()[0], torch.from_numpy(generator.randn(SHAPE)))


@pytest.mark.parametrize("source", ["CPU", "GPU", "NV"])
def test_an_image_does_not_depend_on_its_place_in_the_batch(source: str) -> None:
    batch = ImageNoise(SHAPE, [1, 2, 3], [4, 5, 6], 0.3, source=source, eta_noise_seed_delta=31337)
    alone = ImageNoise(SHAPE, [2], [5], 0.3, source=source, eta_noise_seed_delta=31337)
    x = torch.zeros(3, *SHAPE)
    assert torch.equal(batch.first()[1], alone.first()[0])
    assert torch.equal(batch.next()[1], alone.next()[0])
    assert torch.equal(batch.brownian(x, 0.1, 9.0)(5.0, 1.0)[1], alone.brownian(x[:1], 0.1, 9.0)(5.0, 1.0)[0])


def test_the_noise_seed_delta_shifts_all_but_the_first() -> None:
    noise = ImageNoise(SHAPE, [7], source="CPU", eta_noise_seed_delta=100)
    assert torch.equal(noise.first()[0], _torch_noise(7))
    assert torch.equal(noise.next()[0], _torch_noise(107))


def test_a_variation_turns_towards_the_other_seed() -> None:
    base, other = _torch_noise(1), _torch_noise(2)
    assert torch.equal(ImageNoise(SHAPE, [1], [2], 0.0, source="CPU").first()[0], base)
    torch.testing.assert_close(ImageNoise(SHAPE, [1], [2], 1.0, source="CPU").first()[0], other)
    torch.testing.assert_close(ImageNoise(SHAPE, [1], [2], 0.4, source="CPU").first()[0], slerp(0.4, base, other))
    assert torch.equal(ImageNoise(SHAPE, [1, 1], [2], 0.4, source="CPU").first()[1], slerp(0.4, base, _torch_noise(0))), "a missing subseed is 0"


def test_slerp_of_unit_vectors_stays_on_the_circle() -> None:
    low, high = torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)
    low[0, 0], high[0, 1] = 1.0, 1.0
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(share * torch.pi / 2)
        torch.testing.assert_close(slerp(share, low, high)[0, :, 0], torch.stack([angle.cos(), angle.sin()]), rtol=1e-5, atol=1e-6)
    assert torch.equal(slerp(0.3, low, low), low)


@pytest.mark.parametrize(("height", "width"), [(4, 3), (10, 9), (4, 9), (11, 3)])
def test_seed_resize_sets_the_other_sizes_noise_into_the_middle(height: int, width: int) -> None:
    noise = ImageNoise(SHAPE, [5], source="CPU", seed_resize_from_h=height * 8, seed_resize_from_w=width * 8).first()[0]
    part = _torch_noise(5, (4, height, width))
    whole = _torch_noise(5)
    rows, columns = 8, 6
    expected = whole.clone()
    dy, dx = (rows - height) // 2, (columns - width) // 2
    h, w = (height if dy >= 0 else height + 2 * dy), (width if dx >= 0 else width + 2 * dx)
    ty, tx, sy, sx = max(dy, 0), max(dx, 0), max(-dy, 0), max(-dx, 0)
    expected[:, ty : ty + h, tx : tx + w] = part[:, sy : sy + h, sx : sx + w]
    assert torch.equal(noise, expected)


def test_brownian_noise_is_of_unit_variance_and_seeded_by_the_image() -> None:
    noise = ImageNoise((4, 64, 64), [11], source="CPU")
    x = torch.zeros(1, 4, 64, 64)
    between = noise.brownian(x, 0.03, 14.6)
    fresh = between(9.0, 3.5)
    assert float(fresh.std()) == pytest.approx(1.0, abs=0.03)

    def draw(seed: int) -> torch.Tensor:
        return torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(seed))

    path = BrownianPath(0.03, 14.6, 11, draw)
    torch.testing.assert_close(fresh[0], -path.increment(3.5, 9.0) / 5.5**0.5)
    torch.testing.assert_close(between(3.5, 9.0), -fresh)


def test_a_given_range_keeps_the_path_of_the_whole_schedule() -> None:
    x = torch.zeros(1, *SHAPE)
    whole = ImageNoise(SHAPE, [1]).brownian(x, 0.03, 14.6)(1.0, 0.5)
    part = ImageNoise(SHAPE, [1], brownian_range=(0.03, 14.6)).brownian(x, 0.03, 2.0)(1.0, 0.5)
    assert torch.equal(whole, part)
    assert not torch.equal(whole, ImageNoise(SHAPE, [1]).brownian(x, 0.03, 2.0)(1.0, 0.5))


@pytest.mark.parametrize("seed", [-5, 2**32 + 1, 2**64 + 3])
@pytest.mark.parametrize("source", ["CPU", "NV"])
def test_odd_seeds_work(seed: int, source: str) -> None:
    noise = ImageNoise(SHAPE, [seed], source=source)
    assert noise.first().isfinite().all()
    assert noise.brownian(torch.zeros(1, *SHAPE), 0.1, 1.0)(0.9, 0.2).isfinite().all()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="'TPU'"):
        ImageNoise(SHAPE, [1], source="TPU")
    with pytest.raises(ValueError, match="channels, rows, columns"):
        ImageNoise((8, 8), [1])
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\)"):
        ImageNoise(SHAPE, [1]).next(torch.zeros(1, 4, 2, 2))

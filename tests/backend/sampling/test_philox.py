"""Philox against the published known-answer vectors of Random123 (kat_vectors, philox4x32), and its normal numbers against a CUDA GPU's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backend.sampling.philox import PhiloxGenerator, philox_4x32

# (rounds, counter, key, words)
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# torch.manual_seed(0); torch.randn(8, 8, device="cuda") as printed by torch 2.2 in the notebook of a public lecture on Triton's internals.
CUDA_SEED_0 = """
    -0.9247 -0.4253 -2.6438  0.1452 -0.1209 -0.5797 -0.6229 -0.3284
    -1.0745 -0.3631 -1.6711  2.2655  0.3117 -0.1842  1.2866  1.1820
    -0.1271  1.2169  1.4353  1.0605 -0.4941 -1.4244 -0.7244 -1.2973
     0.0697 -0.0074  1.8969  0.6878 -0.0779 -0.8373  1.3506 -0.2879
    -0.5965 -0.3283 -0.9086 -0.8059 -0.7407 -0.0504  0.5435  1.5150
     0.0141  0.4532  1.6349  0.7124 -0.1806  1.0252 -1.4622 -0.7554
    -0.1836  0.3824  0.3918 -0.0830  0.8971 -1.1123  0.1116  0.4863
    -0.5499 -0.3231 -0.5469  0.9049  0.2837  0.1210  0.4730 -1.0823
"""


def _words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)[:, None]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(rounds: int, counter: str, key: str, words: str) -> None:
    assert (philox_4x32(_words(counter), _words(key), rounds) == _words(words)).all()


def test_its_normal_numbers_are_a_cuda_gpus() -> None:
    expected = np.array(CUDA_SEED_0.split(), dtype=np.float32).reshape(8, 8)
    np.testing.assert_allclose(PhiloxGenerator(0).randn((8, 8)), expected, atol=6e-5)


def test_a_call_goes_on_where_the_last_one_stopped() -> None:
    generator, again = PhiloxGenerator(1234), PhiloxGenerator(1234)
    first, second = generator.randn((4, 8, 8)), generator.randn((4, 8, 8))
    assert not np.array_equal(first, second)
    assert np.array_equal(again.randn((4, 8, 8)), first)
    assert np.array_equal(again.randn((4, 8, 8)), second)
    assert first.dtype == np.float32


def test_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    assert np.array_equal(PhiloxGenerator(7).randn((100,)), PhiloxGenerator(7).randn((1000,))[:100])


def test_long_seeds_use_both_key_words() -> None:
    assert not np.array_equal(PhiloxGenerator(5).randn((10,)), PhiloxGenerator(5 + 2**32).randn((10,)))
    assert np.array_equal(PhiloxGenerator(-1).randn((10,)), PhiloxGenerator(2**64 - 1).randn((10,)))


def test_they_are_normal() -> None:
    values = PhiloxGenerator(42).randn((200_000,)).astype(np.float64)
    assert abs(values.mean()) < 4 / math.sqrt(200_000)
    assert values.std() == pytest.approx(1.0, abs=0.01)
    assert (np.abs(values) < 1).mean() == pytest.approx(0.6827, abs=0.005)
    assert (values**4).mean() == pytest.approx(3.0, abs=0.1)

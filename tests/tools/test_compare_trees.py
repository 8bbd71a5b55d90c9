from __future__ import annotations

from typing import Any

from tools.compare_trees import compare


class Tree:
    """Takes so many seconds for a job, as it says."""

    def __init__(self, second: float, order: list[str], name: str) -> None:
        self.second, self.order, self.name = second, order, name

    def run(self, strategy: str, num_images: int) -> float:
        self.order.append(self.name)
        return self.second * num_images


def test_trees_take_turns_and_the_ratio_is_after_to_before() -> None:
    order: list[str] = []
    trees: Any = {"before": Tree(2.0, order, "b"), "after": Tree(1.0, order, "a")}
    lines = list(compare(trees, [("layers", 2)], num_rounds=2))
    assert "".join(order) == "ba" + "ba" + "ab"  # a warm-up each, then every other round backwards
    assert lines[2] == "| layers, 2 images | 4 | 2 | 0.500 | 0.500..0.500 | 4 4 | 2 2 |"

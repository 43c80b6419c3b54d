"""Which rank owns which expert: one rule, which only the core knows."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlib._core import Placement

ROOT = Path(__file__).parents[2]
# A number of experts divided by a number of ranks, in whichever words.
WRITTEN_AGAIN = re.compile(r"(?:\bE\b|\w*experts)\s*//\s*(?:\w+\.)*(?:R|size|ranks|world_size|num_ranks)\b")


@given(st.integers(1, 5000) | st.integers(2**20 - 70, 2**20), st.integers(1, 70) | st.just(4095))
def test_blocks_are_contiguous_and_balanced_and_owners_agree(experts: int, ranks: int) -> None:
    placement = Placement(experts, ranks)
    blocks = [placement.experts_of(r) for r in range(ranks)]
    assert [b.start for b in blocks] + [experts] == [0, *(b.stop for b in blocks)]
    assert blocks == [range(r * experts // ranks, (r + 1) * experts // ranks) for r in range(ranks)]
    assert {len(b) for b in blocks} <= {experts // ranks, -(-experts // ranks)}
    assert placement.owners == [r for r, block in enumerate(blocks) for _ in block]


@pytest.mark.parametrize(("experts", "ranks"), [(0, 1), (1, 0), (-1, 1), (2**20 + 1, 1), (8, 4096)])
def test_what_is_no_placement_is_refused(experts: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"1048576 experts and 1 to 4095 ranks, got {experts} and {ranks}"):
        Placement(experts, ranks)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_there_is_not_has_no_experts(rank: int) -> None:
    with pytest.raises(IndexError, match=f"rank {rank} of 4"):
        Placement(8, 4).experts_of(rank)


@pytest.mark.parametrize("text", ["r * E // R", "num_experts // ranks", "self.experts // self.ranks"])
def test_the_rule_would_be_found(text: str) -> None:
    assert WRITTEN_AGAIN.search(text)


def test_the_rule_is_not_written_again() -> None:
    """Tests and benchmarks have rules of their own, against which they check this one."""
    code = {p: re.sub(r'"""[\s\S]*?"""|#.*', "", p.read_text()) for p in (ROOT / "commlib").rglob("*.py")}
    assert not {
        p.relative_to(ROOT): found for p, text in code.items() if (found := WRITTEN_AGAIN.findall(text))
    }

"""What one rank cannot do, the others learn at once."""

from __future__ import annotations

from pathlib import Path

from forked_ranks import run_forked

from megacog.checkpoint.commit import on_all_ranks, on_rank_0
from megacog.parallel.tensor import TensorParallel


def told(parallel: TensorParallel) -> list[str]:
    """What this rank gets of an unexpected error on rank 0, then on rank 1."""

    def fail(rank: int) -> None:
        if parallel.rank == rank:
            raise KeyError(f"nobody foresaw this on {rank}")

    found = []
    for action in (lambda: on_rank_0(lambda: fail(0)), lambda: on_all_ranks(lambda: fail(1))):
        try:
            action()
        except Exception as error:
            found.append(f"{type(error).__name__} {error}")
    return found


def test_an_unforeseen_error_is_itself_where_it_occurs_and_named_elsewhere(tmp_path: Path) -> None:
    first, second = run_forked(told, 2, tmp_path)
    assert first[0] == "KeyError 'nobody foresaw this on 0'"
    assert second[0].startswith("CheckpointError rank 0 on ") and "KeyError: 'nobody foresaw this on 0'" in second[0]
    assert second[1] == "KeyError 'nobody foresaw this on 1'"
    assert first[1].startswith("CheckpointError rank 1 on ") and "KeyError: 'nobody foresaw this on 1'" in first[1]

"""prepare.py shared by the ranks of a real mpirun."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from mpi_ranks import mpirun
from video_corpus import made, make_corpus, prepare_alone, prepare_words

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 48)


def test_any_number_of_ranks_makes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    alone = prepare_alone(corpus, tmp_path / "alone/clips")
    assert len(alone) == 12 + 2
    for size in (1, 2, 3):
        out = tmp_path / f"ranks{size}/clips"
        done = mpirun("-n", size, "--bind-to", "none", sys.executable, *prepare_words(corpus, out))
        assert done.returncode == 0, done.stderr
        assert made(out.parent) == alone
        assert done.stdout.count("43 clips") == 1, "rank 0 alone reports"
        assert ("ranks (openmpi) share the work" in done.stderr) == (size > 1)
        assert "preparing: 48/48 clips (100%), 43 ok, 5 failed" in done.stderr


def test_a_rank_that_would_make_other_shards_ends_the_job_by_name(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "made/clips"
    rank = ["-n", "1", sys.executable]
    done = mpirun(*rank, *prepare_words(corpus, out), ":", *rank, *prepare_words(corpus, out, size=24))
    assert done.returncode == 1, done.stderr
    said = r"error: rank 0 of 2 on \S+: rank 1 of 2 on \S+ would make other shards .*height: 16 here, 24 there"
    assert re.search(said, done.stderr), done.stderr
    assert not list(out.parent.glob("*.h5"))


def test_wrong_words_end_the_job_with_their_exit_code(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "made/clips"
    out.parent.mkdir()
    (out.parent / "clips-00000-of-00002.h5").write_bytes(b"precious")
    done = mpirun("-n", 2, "--bind-to", "none", sys.executable, *prepare_words(corpus, out))
    assert done.returncode == 75, done.stderr
    assert "error: rank 0 of 2 on " in done.stderr and "exists already" in done.stderr
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"precious"]

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megacog.errors import DataError
from megacog.prepare.sources import Row, read_source, split_rows


def _write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_rows_keep_their_line_numbers_and_lose_double_spaces(tmp_path: Path) -> None:
    text = 'video,caption\na.mp4,"one,  two"\n\nb/./c.mp4,"three\nfour"\nd.mp4,five\n'
    source = read_source(_write(tmp_path / "c.csv", text))
    assert source.rows == [
        Row(2, "a.mp4", "one, two"),
        Row(4, "b/c.mp4", "three four"),
        Row(6, "d.mp4", "five"),
    ]
    assert source.failures == []
    assert (source.video_column, source.caption_column) == ("video", "caption")


def test_csv_with_byte_order_mark_and_other_column_names(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.csv", b"\xef\xbb\xbftext,path,extra\nhello,a.mp4,1\n")
    source = read_source(path)
    assert source.rows == [Row(2, "a.mp4", "hello")]
    assert (source.video_column, source.caption_column) == ("path", "text")


def test_columns_can_be_named_and_a_wrong_name_gets_a_suggestion(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.csv", "clip,title,caption\na.mp4,T,C\n")
    assert read_source(path, video_column="clip", caption_column="title").rows == [Row(2, "a.mp4", "T")]
    with pytest.raises(DataError, match="no column 'titel'.*Did you mean --caption-column title"):
        read_source(path, video_column="clip", caption_column="titel")
    with pytest.raises(DataError, match=r"none of its columns .*--video-column"):
        read_source(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"a.mp4,", "empty caption"),
        (b"a.mp4,  \t ", "empty caption"),
        (b",text", "empty video path"),
        (b"a.mp4,caf\xe9", "caption is not UTF-8"),
        (b"\xff.mp4,text", "video path is not UTF-8"),
        (b"a.mp4,nul\x00byte", "U+0000"),
        (b"a.mp4,bell\x07", "U+0007"),
        (b"a\x1b.mp4,text", "U+001B"),
        (b"a.mp4,one, two", "3 columns, the header has 2"),
        (b"a.mp4", "1 columns, the header has 2"),
        (b"../a.mp4,text", "out of the root"),
        (b"b/../../a.mp4,text", "out of the root"),
        (b"/etc/a.mp4,text", "out of the root"),
        (b'a.mp4,"x"y', "malformed row"),
        (b"a.mp4," + b"x" * 10_001, "10001 characters"),
        (b"good.mp4,again", "the video of line 2 again"),
        (b"./good.mp4,again", "the video of line 2 again"),
    ],
)
def test_a_bad_csv_row_costs_only_itself(tmp_path: Path, row: bytes, reason: str) -> None:
    path = _write(tmp_path / "c.csv", b"video,caption\ngood.mp4,fine\n" + row + b"\nlast.mp4,fine too\n")
    source = read_source(path)
    assert [item.clip_id for item in source.rows] == ["good.mp4", "last.mp4"]
    assert [(item.line, reason in item.reason) for item in source.failures] == [(3, True)], source.failures
    json.dumps(source.failures[0].video).encode("ascii")
    source.failures[0].video.encode("utf-8")


def test_an_open_quote_is_named_instead_of_swallowing_the_rest(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.csv", 'video,caption\na.mp4,fine\nb.mp4,"open\nc.mp4,lost\n')
    with pytest.raises(DataError, match=r"c\.csv:3: a quote"):
        read_source(path)


def test_absolute_paths_need_permission(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.csv", "video,caption\n/data/a.mp4,x\n")
    assert read_source(path, allow_absolute=True).rows == [Row(2, "/data/a.mp4", "x")]


def test_jsonl_rows_and_their_faults(tmp_path: Path) -> None:
    lines = [
        b'{"note": "no clip"}',
        b'{"video": "a.mp4", "caption": "\xe4\xb8\x80", "more": 1}',
        b"",
        b"{broken",
        b'["list"]',
        b'{"video": "b.mp4", "caption": 5}',
        b'{"video": "b.mp4"}',
        b'{"video": "b.mp4", "caption": "\xff"}',
        b'{"video": "b.mp4", "caption": "\\ud800"}',
        b"[" * 100_000,
        b'{"video": "b.mp4", "caption": "fine"}',
    ]
    source = read_source(_write(tmp_path / "c.jsonl", b"\n".join(lines)))
    assert source.rows == [Row(2, "a.mp4", "\u4e00"), Row(11, "b.mp4", "fine")]
    reasons = {failure.line: failure.reason for failure in source.failures}
    assert list(reasons) == [1, 4, 5, 6, 7, 8, 9, 10]
    for line, part in {
        4: "not JSON",
        5: "not a JSON object",
        6: "is int",
        7: "is missing",
        8: "not UTF-8",
    }.items():
        assert part in reasons[line]
    assert "not UTF-8" in reasons[9] and "not JSON" in reasons[10]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "", "no rows"),
        ("c.csv", "video,caption\n", "no rows"),
        ("c.txt", "x", r"\.csv, \.tsv or \.jsonl"),
        ("c.jsonl", '{"a": 1}\n', "none of its columns"),
    ],
)
def test_useless_caption_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(_write(tmp_path / name, content))


def test_missing_caption_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: no such"):
        read_source(tmp_path / "gone.csv")


def _rows(count: int) -> list[Row]:
    return [Row(k + 2, f"clip{k}.mp4", "x") for k in range(count)]


def test_the_evaluation_split_depends_on_the_id_alone() -> None:
    few, many = split_rows(_rows(500), 0.1), split_rows(_rows(2000), 0.1)
    assert 20 < len(few["eval"]) < 90
    assert [row for row in many["eval"] if row.line < 502] == few["eval"]
    assert sorted(few["train"] + few["eval"], key=lambda row: row.line) == _rows(500)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_parts_of_a_split_hold_a_clip(fraction: float) -> None:
    parts = split_rows(_rows(3), fraction)
    assert min(len(parts["train"]), len(parts["eval"])) == 1
    with pytest.raises(DataError, match="at least two videos"):
        split_rows(_rows(1), fraction)

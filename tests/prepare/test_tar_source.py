"""Webdataset tars: read from their headers, never unpacked, and trusted in nothing."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_videos import ramp, random_tokenizer, write_video

from megacog.data.shards import Shard
from megacog.errors import ConfigError, DataError
from megacog.prepare import tar_source
from megacog.prepare.containers import ClipError
from megacog.prepare.decode import DecodeSettings, decode_clip
from megacog.prepare.inputs import source_root
from megacog.prepare.main import main
from megacog.prepare.sources import Source, split_rows
from megacog.prepare.tar import Member, TarEntry, TarReader, TarWindow
from megacog.prepare.tar_source import expand_tars, read_tars

Item = tuple[str | tarfile.TarInfo, bytes]
names = st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",)) | st.sampled_from("/.\udc80\udcff"),
    min_size=1,
    max_size=300,
).filter(lambda name: name.strip("/"))


def _pack(path: Path, items: Sequence[Item], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in items:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _entries(path: Path) -> list[TarEntry]:
    with TarReader(path) as reader:
        return list(reader.entries())


def _read(pattern: Path, **options: str) -> Source:
    return read_tars([pattern], source_root([pattern], None), **options)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("videos")
    frames = ramp(9, step=11)
    made = {ending: write_video(folder / f"v.{ending}", frames, 8).read_bytes() for ending in ("mp4", "webm", "gif")}
    return made


def test_samples_of_tars_become_the_clips_that_their_files_would(
    videos: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars, files = tmp_path / "tars", tmp_path / "files"
    captions = {"mp4": b"one\n two", "webm": b'{"caption": "three", "fps": 8}', "gif": b"\xe4\xb8\x80"}
    rows = []
    told = ["one two", "three", "\u4e00"]
    for number, (ending, content) in enumerate(videos.items()):
        caption = ("json" if ending == "webm" else "txt", captions[ending])
        items = [(f"./{number:04d}.{ending}", content), (f"./{number:04d}.{caption[0]}", caption[1])]
        _pack(tars / f"{number:05d}.tar", items if number else items[::-1])
        path = files / f"{number:05d}.tar" / f"{number:04d}.{ending}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        rows.append({"video": f"{number:05d}.tar/{number:04d}.{ending}", "caption": told[number]})
    table = files / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_tokenizer(tmp_path / "tokenizer")
    common = ["--tokenizer", str(tmp_path / "tokenizer"), "--size", "16", "--workers", "1"]
    assert main(["run", str(tars / "{00000..00002}.tar"), "--out", str(tmp_path / "a/clips"), *common]) == 0
    assert "00001.tar/0001.webm (found) 'three'" in capsys.readouterr().out
    assert main(["run", str(table), "--out", str(tmp_path / "b/clips"), *common]) == 0
    made, expected = ((tmp_path / name / "clips-00000-of-00001.h5").read_bytes() for name in "ab")
    assert made == expected
    with Shard(tmp_path / "a/clips-00000-of-00001.h5") as shard:
        assert list(shard.clip_ids) == [row["video"] for row in rows]


def test_a_member_is_decoded_through_a_window_that_ends_with_it(videos: dict[str, bytes], tmp_path: Path) -> None:
    content = videos["mp4"]
    items = [("x.bin", b"before" * 99), ("v.mp4", content[:-50]), ("w.mp4", content), ("y.bin", b"z")]
    _pack(tmp_path / "a.tar", items)
    with TarReader(tmp_path / "a.tar") as reader:
        cut, whole = [entry for entry in reader.entries() if entry.name.endswith("mp4")]
    window = TarWindow(tmp_path / "a.tar", whole.offset, whole.size)
    assert window.read() == content and window.read() == b""
    assert window.seek(-4, io.SEEK_END) == len(content) - 4 and window.read(99) == content[-4:]
    window.close()
    how = DecodeSettings(8.0, 16, 16, str(tmp_path))
    assert len(decode_clip(str(Member("a.tar", "w.mp4", whole.offset, whole.size)), how).frames) == 9
    # Padding and the next member follow it in the tar, so only the window can tell that it is cut off.
    with pytest.raises(ClipError, match="truncated"):
        decode_clip(str(Member("a.tar", "v.mp4", cut.offset, cut.size)), how)
    with pytest.raises(ClipError, match="shorter than it was"):
        decode_clip(str(Member("a.tar", "w.mp4", whole.offset, 1 << 30)), how)
    (tmp_path / "in").mkdir()
    with pytest.raises(ClipError, match="leads out of"):
        decode_clip(str(Member("../a.tar", "w.mp4", 0, 9)), DecodeSettings(8.0, 16, 16, str(tmp_path / "in")))


BAD = {
    "absolute": ([("/etc/cron.d/a.mp4", b"v")], "leads out of the tar"),
    "upwards": ([("../a.mp4", b"v")], "leads out of the tar"),
    "upwards inside": ([("b/../../a.mp4", b"v")], "leads out of the tar"),
    "symbolic link": ([(_special("a.mp4", tarfile.SYMTYPE, "/etc/passwd"), b"")], "is a symbolic link"),
    "hard link": ([(_special("a.mp4", tarfile.LNKTYPE, "good.mp4"), b"")], "is a hard link"),
    "device": ([(_special("a.mp4", tarfile.CHRTYPE), b"")], "is a character device"),
    "pipe": ([(_special("a.mp4", tarfile.FIFOTYPE), b"")], "is a named pipe"),
    "unknown type": ([(_special("a.mp4", b"Z"), b"v")], "of unknown type"),
    "control character": ([("a\x1b[2J.mp4", b"v"), ("a\x1b[2J.txt", b"t")], "U+001B"),
    "not UTF-8": ([("a\udcff.mp4", b"v"), ("a\udcff.txt", b"t")], "not UTF-8"),
    "no caption": ([("a.mp4", b"v")], "no caption: its sample has no .txt or .json"),
    "no video": ([("a.txt", b"t")], "a caption without a video"),
    "empty caption": ([("a.mp4", b"v"), ("a.txt", b" \n")], "empty caption"),
    "caption not UTF-8": ([("a.mp4", b"v"), ("a.txt", b"caf\xe9")], "caption is not UTF-8"),
    "long caption": ([("a.mp4", b"v"), ("a.txt", b"x" * 90_000)], "90000 bytes, more than 80000"),
    "no JSON": ([("a.mp4", b"v"), ("a.json", b"[" * 99_999)], "is not JSON"),
    "JSON without caption": ([("a.mp4", b"v"), ("a.json", b'{"title": "t"}')], "has no 'caption' or 'text'"),
    "JSON of another type": ([("a.mp4", b"v"), ("a.json", b'{"text": 5}')], "'text' in its .json is int"),
    "a member twice": ([("a.mp4", b"v"), ("a.txt", b"t"), ("./a.mp4", b"w")], "again; the first is used"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_member_costs_only_itself(tmp_path: Path, case: str) -> None:
    items, reason = BAD[case]
    good = [("good.mp4", b"v"), ("good.txt", b"fine"), ("last.mp4", b"v"), ("last.txt", b"fine too")]
    _pack(tmp_path / "a.tar", [*good[:2], *items, *good[2:]])
    before = sorted(tmp_path.iterdir())
    source = _read(tmp_path / "a.tar")
    assert sorted(tmp_path.iterdir()) == before
    assert [row.caption for row in source.rows if row.own_name != "a.mp4"] == ["fine", "fine too"]
    assert source.failures and all(reason in failure.reason for failure in source.failures), source.failures
    assert len({row.line for row in [*source.rows, *source.failures]}) == len(source.rows) + len(source.failures)
    json.dumps([failure.video for failure in source.failures]).encode("ascii")
    # A second copy is no reason to lose the first.
    assert ("a.tar/a.mp4" in [row.clip_id for row in source.rows]) == (case == "a member twice")


@settings(deadline=None, max_examples=40)
@given(st.lists(names, min_size=1, max_size=4))
def test_no_name_leads_out_of_its_tar_or_to_another_clip(
    tmp_path_factory: pytest.TempPathFactory, stems: list[str]
) -> None:
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    _pack(path, [(f"{stem}.{ending}", b"x") for stem in (*stems, "good") for ending in ("mp4", "txt")])
    source = _read(path)
    ids = [row.clip_id for row in source.rows]
    assert len(set(ids)) == len(ids)
    for row in source.rows:
        assert row.clip_id.isprintable() or not any(ord(character) < 32 for character in row.clip_id)
        assert Path(os.path.normpath(path.parent / row.clip_id)).is_relative_to(path)
        row.clip_id.encode("utf-8")
        member = Member.parse(row.video)
        assert (member.tar, member.size) == ("a.tar", 1) and path.read_bytes()[member.offset] == ord("x")


def test_a_member_of_any_size_is_refused_by_its_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_source, "MAX_MEMBER_BYTES", 10)
    _pack(tmp_path / "a.tar", [("a.mp4", b"v" * 11), ("a.txt", b"t"), ("b.mp4", b"v" * 10), ("b.txt", b"t")])
    source = _read(tmp_path / "a.tar")
    assert [row.own_name for row in source.rows] == ["b.mp4"]
    assert "11 bytes, more than 10" in source.failures[0].reason


def test_other_members_and_folders_are_left_alone(tmp_path: Path) -> None:
    folder = _special("part/", tarfile.DIRTYPE)
    items = [(folder, b""), ("part/a.npy", b"1"), ("part/a.jpg", b"i"), ("part/a.MP4", b"v"), ("part/a.text.txt", b"n")]
    _pack(tmp_path / "a.tar", [*items, ("part/a.json", b'{"title": "T", "text": "t"}'), ("README", b"r")])
    source = _read(tmp_path / "a.tar")
    assert [(row.clip_id, row.caption) for row in source.rows] == [("a.tar/part/a.MP4", "t")]
    assert source.failures == []
    assert _read(tmp_path / "a.tar", caption_key="title").rows[0].caption == "T"


def test_a_tar_cut_anywhere_is_named_with_the_byte(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", [("a.mp4", b"v" * 700), ("a.txt", b"t"), ("b" * 120 + ".mp4", b"v")])
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    end += -end % 512
    _read(path)
    for size in range(0, end, 128):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"a\.tar: at byte \d+: .*truncated. Copy or pack the tar again"):
            _read(path)


def test_flipped_bits_of_headers_are_found(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", [("a.mp4", b"v" * 700), ("a.txt", b"t")], tarfile.GNU_FORMAT)
    content = path.read_bytes()
    expected = _entries(path)
    for start in [entry.offset - 512 for entry in expected]:
        for byte in range(start, start + 512, 3):
            bad = bytearray(content)
            bad[byte] ^= 1 << byte % 8
            path.write_bytes(bad)
            try:
                # White space around the checksum's digits means nothing.
                assert _entries(path) == expected and 148 <= byte - start < 156
            except DataError as error:
                assert f"at byte {start}" in str(error)


def test_damaged_tars_are_told_together_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        _pack(tmp_path / f"{name}.tar", [(f"{name}.mp4", b"v"), (f"{name}.txt", b"t")])
    for name in ("a", "c"):
        (tmp_path / f"{name}.tar").write_bytes((tmp_path / f"{name}.tar").read_bytes()[:1100])
    with pytest.raises(DataError, match=r"a\.tar: at byte 1024.*; .*c\.tar: at byte 1024"):
        _read(tmp_path / "*.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tar at all" * 99, "is no tar, or damaged at byte 0"),
        (gzip.compress(b"x" * 9999) + bytes(600), r"is compressed \(gzip\)"),
        (bytes(1024) + b"more", "data follows its end mark"),
        (b"", "truncated"),
    ],
)
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.tar.*{message}"):
        _read(tmp_path / "a.tar")


def test_compressed_and_mixed_sources_are_refused_at_once(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "c"), "--tokenizer", "nowhere"]
    for given_sources, message in (
        (["a.tar.gz"], "compressed tars are not read"),
        (["a.csv", "b.csv"], "one caption table at a time"),
        (["a.tar", "--video-column", "v"], "--video-column is for caption tables"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(["run", *given_sources, *options])
    with pytest.raises(DataError, match=r"no tar matches '.*gone-1\.tar'"):
        main(["run", str(tmp_path / "gone-{1..3}.tar"), *options])
    assert list(tmp_path.iterdir()) == []


def test_names_in_several_tars_are_different_clips_on_the_same_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("one", "two"):
        items = [(f"{k:03d}.{ending}", b"v") for k in range(40) for ending in ("mp4", "txt")]
        _pack(tmp_path / folder / "0.tar", items)
    with caplog.at_level(logging.WARNING):
        source = _read(tmp_path / "*" / "0.tar")
    assert "40 members have names that stand in another tar too" in caplog.text
    ids = {row.clip_id for row in source.rows}
    assert len(ids) == 80 and "one/0.tar/000.mp4" in ids
    parts = split_rows(source.rows, 0.3)
    names = {name: {row.own_name for row in rows} for name, rows in parts.items()}
    assert names["train"] and names["eval"] and not names["train"] & names["eval"]


def test_tars_outside_the_root_need_permission(tmp_path: Path) -> None:
    path = _pack(tmp_path / "out" / "a.tar", [("a.mp4", b"v"), ("a.txt", b"t")])
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match=r"lies outside .*--allow-absolute"):
        read_tars([path], tmp_path / "root")
    (tmp_path / "root" / "link.tar").symlink_to(path)
    with pytest.raises(DataError, match="lies outside"):
        read_tars([tmp_path / "root" / "link.tar"], tmp_path / "root")
    (row,) = read_tars([path], tmp_path / "root", allow_absolute=True).rows
    assert row.clip_id == f"{path.resolve()}/a.mp4"
    with pytest.raises(DataError, match="named twice"):
        read_tars([path, path.parent / ".." / "out" / "a.tar"], tmp_path)


def test_patterns_are_expanded_as_a_shell_does(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-9.tar", "b-10.tar", "odd{1..2}.tar"):
        (tmp_path / name).write_bytes(b"")
    for pattern in ("a-{08..10}.tar", "b-{9..10}.tar", "{b-10,a-*}.tar", "odd{1..2}.tar"):
        shell = subprocess.run(["bash", "-c", f"printf '%s\n' {pattern}"], cwd=tmp_path, capture_output=True, text=True)
        expected = [pattern] if pattern.startswith("odd") else shell.stdout.split()
        assert [path.name for path in expand_tars([tmp_path / pattern])] == expected
    with pytest.raises(DataError, match="more than 1000000 tars"):
        expand_tars([tmp_path / "{0..99999999}.tar"])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_where_tarfile_finds_them(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, bytes]], format: int
) -> None:
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    try:
        _pack(path, items, format)
    except ValueError:  # ustar has no room for such a name
        return
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    with TarReader(path) as reader:
        found = [(entry.name.rstrip("/"), entry.offset, entry.size) for entry in reader.entries()]
        assert [reader.read(offset, size) for _, offset, size in found] == [content for _, content in items]
    assert [(name.rstrip("/"), *rest) for name, *rest in expected] == found

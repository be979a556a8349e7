"""Clips that cannot be used, or want more than to be decoded, in folders and in tars: listed, and the others made."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command, files, prepare_arguments
from PIL import Image
from tiny_videos import ramp, write_video

from megacog.data.shards import Shard

Figure = Callable[[str], None]
SHELL = "$(touch canary); `touch canary` | touch canary & #"


def png_bomb(side: int) -> bytes:
    """A png of a few kilobytes that claims side x side pixels, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(1 + side // 8) * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def variable_rate(path: Path) -> None:
    """A gif whose frames stand for 40 to 400 ms."""
    images = [Image.fromarray(frame) for frame in ramp(6, step=40)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[40, 400, 40, 200, 100, 40])


def good_clips(folder: Path) -> dict[str, str]:
    """Path -> caption of clips that are usable, however odd their names are."""
    names = ["plain.mp4", "with space.mp4", "unicode \u79d2 \u00e9.mp4", "-rf.mp4", "sub/deep.mp4", "%s%n.mp4"]
    names.append(f"{SHELL}.mp4")
    for number, name in enumerate(names):
        write_video(folder / name, ramp(12, start=8 * number), 8)
    write_video(folder / "one_frame.mp4", ramp(1), 8)
    variable_rate(folder / "variable.gif")
    Image.fromarray(ramp(1, start=99)[0]).save(folder / "image.png")
    names += ["one_frame.mp4", "variable.gif", "image.png"]
    captions = {name: f"clip {number}" for number, name in enumerate(names)}
    return captions | {"plain.mp4": SHELL, "sub/deep.mp4": "../../../outside \u202e <script> {0} %s ${HOME}"}


def bad_clips(folder: Path, outside: Path, port: int) -> list[tuple[str, Any, str]]:
    """(path, caption, part of the reason) of rows that give no clip."""
    whole = (folder / "plain.mp4").read_bytes()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all")
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.mp4").write_bytes(whole[:40] + np.random.default_rng(0).bytes(len(whole) - 40))
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n")
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{outside}\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n")
    (folder / "list.mkv").write_text(f"ffconcat version 1.0\nfile {outside}\nfile http://127.0.0.1:{port}/b.mp4\n")
    (folder / "stream.mov").write_text(f"v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n")
    (folder / "svg.png").write_text(f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{outside}"/></svg>')
    (folder / "bomb.png").write_bytes(png_bomb(60_000))
    Image.fromarray(ramp(1, size=(8, 8))[0]).save(folder / "big.gif")
    raw = bytearray((folder / "big.gif").read_bytes())
    raw[6:10] = b"\xff\xff\xff\xff"  # the canvas: 65535 x 65535
    (folder / "big.gif").write_bytes(raw)
    (folder / "link.mp4").symlink_to(outside)
    (folder / "zeros.mp4").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.mp4")
    return [
        ("zero.mp4", "c", "empty"), ("text.mp4", "c", "not an mp4"), ("cut.mp4", "c", "truncated"),
        ("noise.mp4", "c", "damaged|truncated|decoded|no video"), ("gone.mp4", "c", "no such file"),
        ("list.mp4", "c", "not an mp4"), ("list.m3u8", "c", "not an mp4"), ("list.mkv", "c", "not an mp4"),
        ("stream.mov", "c", "not an mp4"), ("svg.png", "c", "not a readable png"),
        ("bomb.png", "c", "60000x60000 exceed --max-pixels"), ("big.gif", "c", "exceed --max-pixels|cannot be decoded"),
        ("link.mp4", "c", "leads out"), ("zeros.mp4", "c", "leads out|neither"), ("pipe.mp4", "c", "neither"),
        (f"http://127.0.0.1:{port}/c.mp4", "c", "no such file"), ("concat:plain.mp4|plain.mp4", "c", "no such file"),
        ("subfile,,start,0,end,99,,:plain.mp4", "c", "no such file"), ("pipe:0", "c", "no such file"),
        ("file:plain.mp4", "c", "no such file"), (str(outside), "c", "leads out"), ("../outside.mp4", "c", "leads out"),
        ("sub/../../outside.mp4", "c", "leads out"), ("/dev/stdin", "c", "leads out"), ("", "c", "empty video path"),
        ("a\nb.mp4", "c", r"control character U\+000A"), ("a\0b.mp4", "c", r"control character U\+0000"),
        ("x" * 300 + ".mp4", "c", "cannot be opened"), ("plain.mp4", "again", "has one caption"),
        ("sub/./deep.mp4", "again", "has one caption"), ("one_frame.mp4 ", "again", "has one caption"),
        ("new.mp4", "", "empty caption"), ("new.mp4", " \n\t ", "empty caption"), ("new.mp4", None, "not text"),
        ("new.mp4", ["c"], "not text"), ("new.mp4", "bell \a", r"control character U\+0007"),
        ("new.mp4", "\x1b[2J", r"control character U\+001B"), ("new.mp4", "half \ud800", "not UTF-8"),
        ("new.mp4", "long " * 10_000, "more than 10000"),
    ]  # fmt: skip


def prepared(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Caption and codes of every clip in a folder of shards."""
    found = {}
    for path in folder.glob("*.h5"):
        with Shard(path) as shard:
            for clip, clip_id in enumerate(shard.clip_ids):
                found[clip_id] = (shard.captions[clip], shard.read(clip, slice(None)).tobytes())
    return found


def write_rows(path: Path, rows: Iterable[tuple[str, Any]], tail: str = "") -> Path:
    lines = [json.dumps({"video": name, "caption": caption}) for name, caption in rows]
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def test_what_cannot_be_used_is_listed_and_the_rest_is_made(
    command: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.chdir(tmp_path)
    videos, outside = tmp_path / "videos", write_video(tmp_path / "outside.mp4", ramp(12), 8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        good = good_clips(videos)
        bad = bad_clips(videos, outside, server.getsockname()[1])
        clean = write_rows(tmp_path / "clean.jsonl", good.items())
        rows = [*good.items(), *((name, caption) for name, caption, _ in bad)]
        dirty = write_rows(tmp_path / "dirty.jsonl", rows, tail="{broken\n[1, 2]\n")
        before = files(tmp_path)
        for captions in (clean, dirty):
            arguments = prepare_arguments(world, captions, Path(captions.stem, "c"), root=videos, workers=2)
            outcome = command("prepare", *arguments)
            assert outcome.code == 0, outcome.err
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody followed a link

    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.split("/")[0] in ("clean", "dirty") for name in after.keys() - before.keys())
    assert prepared(tmp_path / "dirty") == prepared(tmp_path / "clean")
    assert {name: caption for name, (caption, _) in prepared(tmp_path / "dirty").items()} == good
    failures = [json.loads(line) for line in (tmp_path / "dirty/failed.jsonl").read_text().splitlines()]
    listed = sorted((failure["line"], failure["reason"]) for failure in failures)
    assert [line for line, _ in listed] == list(range(len(good) + 1, len(rows) + 3))
    for (name, _, expected), (_, reason) in zip(bad, listed[:-2], strict=True):
        assert re.search(expected, reason), (name, reason)
    figure(f"videos and captions: {len(good)} usable made, {len(listed)} of {len(bad) + 2} others listed with reasons")


def pack(path: Path, members: Iterable[tuple[str, bytes, bytes, str]]) -> Path:
    """Write a tar of (name, type, content, target of a link)."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), target
            info.mode, info.uid = 0o6777, 0  # setuid, if somebody unpacked it
            tar.addfile(info, io.BytesIO(content))
    return path


def hostile_members(video: bytes, outside: Path, port: int) -> list[tuple[str, bytes, bytes, str, str]]:
    """(name, type, content, target of a link, part of the reason) of members that give no clip."""
    file, caption = tarfile.REGTYPE, b"a caption"
    names = ["../canary.mp4", "a/../../canary.mp4", "/etc/cron.d/canary.mp4", str(outside)]
    links = [(tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a hard link")]
    videos = {
        "list": f"#EXTM3U\n#EXTINF:1,\n{outside}\nhttp://127.0.0.1:{port}/a.ts\n".encode(),
        "concat": f"ffconcat version 1.0\nfile {outside}\n".encode(),
        "cut": video[: len(video) // 2],
        "empty": b"",
    }
    return [
        *((name, file, video, "", "leads out of the tar") for name in names),
        *((f"link{at}.mp4", kind, b"", str(outside), what) for at, (kind, what) in enumerate(links)),
        ("link.txt", tarfile.SYMTYPE, b"", str(outside), "a symbolic link"),
        ("device.mp4", tarfile.CHRTYPE, b"", "", "a character device"), ("pipe.mp4", tarfile.FIFOTYPE, b"", "", "pipe"),
        ("bell\a.mp4", file, video, "", r"control character U\+0007"), ("alone.mp4", file, video, "", "no caption"),
        ("alone.txt2.txt", file, caption, "", ""), ("lonely.txt", file, caption, "", "a caption without a video"),
        *((f"{name}.mp4", file, content, "", "not an mp4|truncated|empty") for name, content in videos.items()),
        *((f"{name}.txt", file, caption, "", "") for name in videos),
        ("deep.mp4", file, video, "", "not JSON"), ("deep.json", file, b"[" * 100_000, "", ""),
        ("long.mp4", file, video, "", "more than"), ("long.txt", file, b"x" * 90_000, "", ""),
        ("plain.mp4", file, b"another", "", "again; the first is used"),
    ]  # fmt: skip


def test_a_tar_is_never_unpacked_and_its_bad_members_are_listed(
    command: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.chdir(tmp_path)
    outside = write_video(tmp_path / "outside.mp4", ramp(12), 8)
    video = write_video(tmp_path / "video.mp4", ramp(12, start=50), 8).read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        bad = hostile_members(video, outside, server.getsockname()[1])
        stems = ["plain", SHELL, "-rf", "deep/er"]
        parts = {"mp4": video, "txt": b"good"}
        members = [(f"{stem}.{part}", tarfile.REGTYPE, parts[part], "") for stem in stems for part in parts]
        members += [member[:4] for member in bad]
        (tmp_path / "tars").mkdir()
        tar = pack(tmp_path / "tars/a.tar", members)
        before = files(tmp_path)
        outcome = command("prepare", *prepare_arguments(world, tar, Path("made/c"), root=tmp_path / "tars", workers=2))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert outcome.code == 0, outcome.err
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.split("/")[0] == "made" for name in after.keys() - before.keys())
    assert set(prepared(tmp_path / "made")) == {f"a.tar/{stem}.mp4" for stem in stems}
    reasons = [json.loads(line) for line in (tmp_path / "made/failed.jsonl").read_text().splitlines()]
    expected = {name: reason for name, _, _, _, reason in bad if reason}
    assert len(reasons) == len(expected)
    for name, reason in expected.items():
        spelled = f"a.tar/{name}"
        assert any(each["video"] == spelled and re.search(reason, each["reason"]) for each in reasons), (name, reasons)
    figure(f"members of a hostile tar: {len(stems)} clips made, {len(reasons)} of {len(expected)} others listed")

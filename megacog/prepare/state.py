"""The folder in which a preparation grows, so that it can be stopped at any time and go on.

`<stem>.partial/` holds `settings.json`, a lock, and for every finished slice of the caption file a
shard and a record. When all slices are finished the shards get their final numbered names and the
records become the manifest `<stem>.json`: with it all is finished. Every step is a rename, and can be repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacog.data.shards import shard_path
from megacog.errors import ConfigError, DataError, EnvError
from megacog.prepare.sources import Failure
from megacog.runtime import outcome
from megacog.runtime.files import atomic_file, require_space, sync_directory, write_json

FORMAT = "megacog-prepare"
FAILED = "failed.jsonl"
_MINIMUM_SPACE_BYTES = 16 << 20


@dataclass(frozen=True)
class SliceRecord:
    """What became of one slice of the caption file.

    Attributes:
        clips: clips in its shard; 0 = there is no shard.
        frames: frames in its shard.
        seconds: length of its clips.
        num_bytes: size of the shard.
        sha256: of the shard; "" without one.
        failures: its rows without a clip.
    """

    clips: int
    frames: int
    seconds: float
    num_bytes: int
    sha256: str
    failures: list[Failure]

    @staticmethod
    def of(stored: Mapping[str, Any]) -> SliceRecord:
        """Returns the record that `dataclasses.asdict` has turned into JSON."""
        return SliceRecord(**{**stored, "failures": [Failure(**failure) for failure in stored["failures"]]})


@dataclass(frozen=True)
class Part:
    """A set of shards with one stem ("clips-train") and its number of slices."""

    stem: Path
    num_slices: int


class PartialOutput:
    """One preparation's state on disk."""

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.folder = stem.with_name(f"{stem.name}.partial")
        self.manifest_path = stem.with_name(f"{stem.name}.json")

    def manifest(self) -> dict[str, Any] | None:
        """Returns the manifest of a finished preparation, None if there is none."""
        return _read_json(self.manifest_path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; the lock ends with the process.

        Raises:
            EnvError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvError(
                    f"another process is preparing {self.stem} ({self.folder} is locked). "
                    "Wait for it or stop it."
                ) from None
            try:
                yield
            finally:
                if not (self.folder / "settings.json").is_file():
                    shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self, stems: Sequence[Path]) -> None:
        """Removes what an earlier preparation left, finished or not.

        Args:
            stems: of the shards that are to be made now.

        Raises:
            ConfigError: shards under one of these stems belong to another preparation.
        """
        for stem in stems:
            if stem != self.stem and PartialOutput(stem).manifest() is not None and finished_shards([stem]):
                raise ConfigError(
                    f"{stem}-*.h5 belong to another preparation ({stem}.json). Choose another --out."
                )
        earlier = [shard["file"] for shard in (self.manifest() or {}).get("shards", [])]
        earlier += (_read_json(self.folder / "final.json") or {}).values()
        for path in [*(self.stem.parent / name for name in earlier), *finished_shards(stems)]:
            path.unlink(missing_ok=True)
        self.manifest_path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, settings: Mapping[str, Any], stems: Sequence[Path]) -> None:
        """Starts anew or continues with the same settings.

        Raises:
            ConfigError: the output was prepared, or begun, with other settings.
        """
        path = self.folder / "settings.json"
        earlier = _read_json(path)
        if earlier is not None:
            refuse_changes(self.stem, earlier, settings)
            self._clean()
            return
        if strays := finished_shards(stems):
            raise ConfigError(
                f"{strays[0]} exists already, and no {self.manifest_path.name} says what it was made from. "
                "Choose another --out, or pass --overwrite to replace it."
            )
        write_json(path, settings)

    def require_shared(self) -> None:
        """Checks that this process sees what rank 0 has begun.

        Raises:
            EnvError: it does not.
        """
        if not (self.folder / "settings.json").is_file():
            raise EnvError(
                f"there is no {self.folder / 'settings.json'} here, which rank 0 has just written. All ranks write "
                "into one folder: give --out on a file system that all nodes share."
            )

    def _clean(self) -> None:
        """Removes what a killed writer left."""
        for path in self.folder.glob(".*.tmp-*"):
            path.unlink()

    def slice_path(self, part: Part, index: int) -> Path:
        """Returns where the shard of a slice is written."""
        return self.folder / f"{part.stem.name}-{index:05d}.h5"

    def record(self, part: Part, index: int) -> SliceRecord | None:
        """Returns the record of a finished slice, None if the slice is to be done (again)."""
        stored = _read_json(self._record_path(part, index))
        if stored is None:
            return None
        record = SliceRecord.of(stored)
        final = _read_json(self.folder / "final.json") or {}
        places = [self.slice_path(part, index)]
        if (name := final.get(places[0].name)) is not None:
            places.append(self.stem.parent / name)
        present = any(place.is_file() and place.stat().st_size == record.num_bytes for place in places)
        return record if record.clips == 0 or present else None

    def finish_slice(self, part: Part, index: int, record: SliceRecord) -> None:
        """Notes that a slice and its shard are complete."""
        write_json(self._record_path(part, index), asdict(record))
        outcome.reach(self.slice_path(part, index).name)

    def _record_path(self, part: Part, index: int) -> Path:
        return self.slice_path(part, index).with_suffix(".json")

    def finish(
        self, parts: Sequence[Part], settings: Mapping[str, Any], failures: Sequence[Failure]
    ) -> dict[str, Any]:
        """Gives the shards their final names, writes the manifest and returns it.

        Args:
            parts: all parts; each of their slices has a record.
            settings: as given to `begin`.
            failures: rows that belong to no slice.
        """
        names: dict[str, str] = {}
        shards: list[dict[str, Any]] = []
        lost = list(failures)
        for part in parts:
            records = [(index, self._finished(part, index)) for index in range(part.num_slices)]
            lost += [failure for _, record in records for failure in record.failures]
            filled = [(index, record) for index, record in records if record.clips]
            for number, (index, record) in enumerate(filled):
                name = shard_path(part.stem, number, len(filled)).name
                names[self.slice_path(part, index).name] = name
                shards.append({"file": name, **{k: v for k, v in asdict(record).items() if k != "failures"}})
        manifest = {
            "format": FORMAT,
            "version": 1,
            "settings": dict(settings),
            "shards": shards,
            "failed": len(lost),
        }
        self.write_failures(lost)
        write_json(self.folder / "final.json", names)
        for name, final in names.items():
            if (self.folder / name).is_file():
                os.replace(self.folder / name, self.stem.parent / final)
        sync_directory(self.stem.parent)
        write_json(self.folder / "manifest.json", manifest)
        self._publish(self.folder / "manifest.json", self.manifest_path)
        self.remove()
        return manifest

    def write_failures(self, failures: Sequence[Failure]) -> Path | None:
        """Replaces this stem's lines of the folder's failed.jsonl; returns its path if anything failed.

        Other preparations in the same folder keep their lines; a file without lines is removed.
        """
        path = self.stem.parent / FAILED
        kept = []
        if path.is_file():
            kept = [line for line in path.read_text("utf-8").splitlines() if _stem_of(line) != self.stem.name]
        ours = [
            json.dumps({"stem": self.stem.name, **asdict(failure)}, ensure_ascii=False)
            for failure in sorted(failures, key=lambda failure: failure.line)
        ]
        if kept or ours:
            with atomic_file(self.folder / FAILED, "w") as file:
                file.writelines(f"{line}\n" for line in [*kept, *ours])
            self._publish(self.folder / FAILED, path)
        else:
            path.unlink(missing_ok=True)
        return path if ours else None

    def _publish(self, own: Path, path: Path) -> None:
        """Moves a file out of the folder: what a killed writer leaves of one lies inside, where it is cleaned up."""
        os.replace(own, path)
        sync_directory(path.parent)

    def remove(self) -> None:
        """Removes the folder; of a finished preparation, whose manifest is there, nothing in it is needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _finished(self, part: Part, index: int) -> SliceRecord:
        record = self.record(part, index)
        if record is None:
            raise DataError(
                f"{self.slice_path(part, index)} has gone while preparing; run the same command again."
            )
        return record


def produce(
    stem: Path,
    settings: Mapping[str, Any],
    parts: Sequence[Part],
    make: Callable[[PartialOutput], Sequence[Failure]],
    *,
    overwrite: bool,
) -> tuple[dict[str, Any], bool]:
    """Returns the manifest of a preparation, and whether an earlier run had made everything already.

    Args:
        stem: of the output.
        settings: everything that the shards' bytes depend on.
        parts: of the output.
        make: makes the slices without a record and returns the failures that belong to no slice.
        overwrite: remove what an earlier run left under the stem first.

    Raises:
        ConfigError: the output belongs to a run with other settings.
        EnvError: no disk space, or another process prepares this output.
    """
    stems = [part.stem for part in parts]
    output = PartialOutput(stem)
    manifest = None if overwrite else output.manifest()
    if manifest is not None:
        refuse_changes(stem, manifest["settings"], settings)
        output.remove()
        return manifest, True
    if overwrite:
        with output.locked():
            output.discard(stems)
    require_space(stem, _MINIMUM_SPACE_BYTES)
    with output.locked():
        output.begin(settings, stems)
        failures = make(output)
        return output.finish(parts, settings, failures), False


def finished_shards(stems: Sequence[Path]) -> list[Path]:
    """Returns the files with final shard names under these stems, in name order."""
    digits = "[0-9]" * 5
    found = [
        path for stem in stems for path in stem.parent.glob(f"{_literal(stem.name)}-{digits}-of-{digits}.h5")
    ]
    return sorted(found)


def refuse_changes(stem: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compares settings with those of an earlier run.

    Raises:
        ConfigError: they differ; the message names each difference.
    """
    keys = [key for key in {**settings, **earlier} if settings.get(key) != earlier.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {earlier.get(key)} before, {settings.get(key)} now" for key in keys)
        raise ConfigError(
            f"{stem} was begun or made with other settings ({changes}). Shards of one set must agree: "
            "use the earlier settings, another --out, or --overwrite to start again."
        )


def _literal(name: str) -> str:
    """Escapes glob characters."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _stem_of(line: str) -> str | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("stem") if isinstance(record, dict) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{path} is not what launch/prepare.py wrote ({error}). Pass --overwrite to start again."
        ) from None
    if not isinstance(stored, dict):
        raise DataError(f"{path} is not what launch/prepare.py wrote. Pass --overwrite to start again.")
    return stored

"""Bits flipped and files cut short: found, told in one line, and never read as code."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_server import PRIVATE, PUBLIC, SETTINGS

from adamix import AdaMix, InputError, durable
from adamix.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from adamix.ledger import Ledger
from adamix.ledger_records import head_path, read_ledger


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, Callable[[], Any]]]:
    """The files that a run leaves, each with what reads it."""
    ledger, checkpoint = tmp_path / "rows.ledger", tmp_path / "checkpoint"
    Ledger.create(ledger, data_set="test", epsilon=5.0).close()
    AdaMix(**SETTINGS).fit(public=PUBLIC, private=PRIVATE, ledger=ledger, checkpoint=checkpoint)
    latest = sorted(checkpoint.glob("*.json"))[-1]

    def opened() -> None:
        Ledger(ledger).close()

    return [
        (ledger, opened),
        (ledger, lambda: read_ledger(ledger)),
        (head_path(ledger), opened),
        (latest, lambda: load_checkpoint(checkpoint)),
        (latest.with_suffix(".safetensors"), lambda: load_checkpoint(checkpoint)),
    ]


def damages(content: bytes, generator: random.Random) -> Iterator[bytes]:
    """For ever: a bit is flipped, twice; the end is cut off; a part in the middle is lost; two bytes change places."""
    while True:
        for _ in range(2):
            flipped = bytearray(content)
            flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            yield bytes(flipped)
        yield content[: generator.randrange(len(content))]
        first, last = sorted(generator.sample(range(len(content)), 2))
        yield content[:first] + content[last:]
        if content[first] != content[last]:
            swapped = bytearray(content)
            swapped[first], swapped[last] = swapped[last], swapped[first]
            yield bytes(swapped)


def damage(files: list[tuple[Path, Callable[[], Any]]], times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    generator = random.Random(0)
    for path, read in files:
        read()
        content = path.read_bytes()
        for damaged in itertools.islice(damages(content, generator), times // len(files)):
            path.write_bytes(damaged)
            with pytest.raises(InputError) as raised:
                read()
            assert "\n" not in str(raised.value) and "; " in str(raised.value)
            assert path.read_bytes() == damaged, "nothing is mended in silence"
        path.write_bytes(content)
        read()


def test_some_damage_is_found(files: list[tuple[Path, Callable[[], Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    damage(files, 500, monkeypatch)


@pytest.mark.slow
def test_all_damage_is_found(files: list[tuple[Path, Callable[[], Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    damage(files, 10_000, monkeypatch)


def test_lines_cannot_be_lost_repeated_or_moved(files: list[tuple[Path, Callable[[], Any]]]) -> None:
    path, read = files[0]
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    others = [lines[:count] for count in range(len(lines))]
    others += [lines[:i] + lines[i + 1 :] for i in range(len(lines))]
    others += [lines[: i + 1] + lines[i:] for i in range(len(lines))]
    others += [[*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]] for i in range(len(lines) - 1)]
    for other in others:
        path.write_bytes(b"".join(other))
        with pytest.raises(InputError, match=r"restore the ledger and its .head file"):
            read()


def test_a_ledger_and_a_head_file_of_different_moments_are_refused(tmp_path: Path) -> None:
    """Each is whole by itself: of two ledgers that differ in their ids alone, and of one before it went on."""
    parts: list[list[tuple[bytes, bytes]]] = []
    for name in ("one", "other"):
        path = tmp_path / name
        with Ledger.create(path, data_set="test") as ledger:
            run = ledger.start_run(noise_multiplier=5.0, sample_rate=1.0, steps=9, delta=1e-5, run="run")
            moments = []
            for _ in range(3):
                ledger.charge(run)
                moments.append((path.read_bytes(), head_path(path).read_bytes()))
        parts.append(moments)
    path, (one, other) = tmp_path / "one", parts
    for content, head in ((one[2][0], other[2][1]), (other[2][0], one[2][1]), (one[2][0], one[0][1])):
        path.write_bytes(content)
        head_path(path).write_bytes(head)
        for read in (Ledger, read_ledger):
            with pytest.raises(InputError, match=r"are not of the same moment; restore the ledger and its .head file"):
                read(path)


def test_a_line_sealed_anew_does_not_fit_the_chain(files: list[tuple[Path, Callable[[], Any]]]) -> None:
    """As if the run had had more noise: valid by itself, and of the right number."""
    path, read = files[0]
    lines = path.read_bytes().splitlines(keepends=True)
    record, _ = durable.unseal(lines[1])
    lines[1] = durable.seal({**record, "noise_multiplier": 100.0})
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"was altered in line 3 .it does not follow the line before"):
        read()


def test_a_line_after_the_last_counted_one_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    """The two states a crash leaves: damage there can only take away what was never drawn."""
    path = tmp_path / "rows.ledger"
    with Ledger.create(path, data_set="test") as ledger:
        run = ledger.start_run(noise_multiplier=5.0, sample_rate=1.0, steps=9, delta=1e-5)
        ledger.charge(run)
        before = head_path(path).read_bytes()
        size = path.stat().st_size
        ledger.charge(run)
    whole = path.read_bytes()
    head_path(path).write_bytes(before)
    for cut in [*range(size, len(whole), 9), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:cut])
        head_path(path).write_bytes(before)
        assert read_ledger(path).runs[run].charged == (2 if cut == len(whole) else 1)
        with Ledger(path) as ledger:
            assert ledger.charge(run) == (3 if cut == len(whole) else 2)
        assert read_ledger(path).runs[run].charged == (3 if cut == len(whole) else 2)
    path.write_bytes(whole[:size] + whole[size:].replace(b"charge", b"chArge"))
    head_path(path).write_bytes(before)
    with pytest.raises(InputError, match="was altered in line 4"):
        Ledger(path)


def test_sealed_nonsense_is_refused(tmp_path: Path) -> None:
    """Right checksums do not make a record right."""
    path = tmp_path / "rows.ledger"
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with Ledger.create(path, data_set="test") as ledger:
        hashes, content = [ledger.head], path.read_bytes()
    start = {
        "kind": "start", "run": "r", "noise_multiplier": 1, "sample_rate": 1, "planned": 1, "delta": 0.1, "time": ""
    }  # fmt: skip
    records = [
        {"kind": "charge", "run": "none", "charged": 1}, {"kind": "ledger"}, {"kind": deep}, {"kind": "start"}, {},
        {**start, "noise_multiplier": -1}, {**start, "sample_rate": 2}, {**start, "planned": "x"},
        {"kind": "end", "run": []},
    ]  # fmt: skip
    for record in records:
        line = durable.seal({**record, "number": 1, "previous": hashes[0]})
        path.write_bytes(content + line)
        with pytest.raises(InputError, match="altered in line 2"):
            Ledger(path)
    for text in (b"", b"\n", b"{}\n", b"[]\n", b"\x80\x04N.", json.dumps({"count": 1}).encode()):
        path.write_bytes(text)
        with pytest.raises(InputError, match="restore"):
            Ledger(path)


def test_checkpoints_of_another_make_are_refused(tmp_path: Path) -> None:
    vector = torch.zeros(4)
    good = Checkpoint("r", 1, {}, 1.0, {}, [], 1, "h", vector, vector, vector)
    save_checkpoint(tmp_path, good)
    path = tmp_path / "step-0000001.json"
    record, _ = durable.unseal(path.read_bytes())
    for change in ({"format": 2}, {"finished": 2}, {"more": 1}, {"tensors_sha256": "0" * 64}):
        path.write_bytes(durable.seal({**record, **change}))
        with pytest.raises(InputError, match=r"is damaged .*; restore it from a backup"):
            load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, Checkpoint("r", 1, {}, 1.0, {}, [], 1, "h", vector, vector[:2], vector))
    with pytest.raises(InputError, match="not vectors of one length"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, Checkpoint("r", 2, {}, 1.0, {}, [], 1, "h", vector, vector, vector))
    (tmp_path / "step-0000002.json").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match="remove it to resume from step-0000001, whose later steps are charged again"):
        load_checkpoint(tmp_path)

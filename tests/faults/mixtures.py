"""Events of every kind and payloads that are none, drawn at random for the tests of bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator

from mlflow_outbox.spool.events import (
    Artifact,
    Event,
    FileFor,
    Metric,
    Metrics,
    Params,
    Request,
    RunEnded,
    RunStarted,
    SegmentClosed,
    Tags,
    encode,
)
from mlflow_outbox_worker.sink import OPERATIONS
from spools import metric

#: First bytes of MessagePack values: containers and texts of every width, numbers, what is reserved, and extensions.
_HEADS = bytes([0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0x100)])
#: Arguments of calls: some that MLflow may take, and some that are no JSON object.
_ARGUMENTS = [
    b'{"run_id": "r", "datasets": []}',
    b'{"experiment_id": "0", "name": "m", "model_id": "m-1", "tags": [{"$": "LoggedModelTag", "v": {"key": "a"}}]}',
    b'{"trace_id": "tr-1", "key": "k", "value": "v"}',
    b"[1, 2]",
    b"null",
    b'{"tags": 5}',
    b"\xff\xfe",
    b"[" * 40,
]
#: Texts, bytes, arrays, maps and extensions that claim 4 GiB, and some that claim 64 KiB.
_BOMBS = [
    *(bytes([head]) + b"\xff\xff\xff\xff" for head in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)),
    *(bytes([head]) + b"\xff\xff" for head in (0xC5, 0xC8, 0xDA, 0xDC, 0xDE)),
]


def text(rng: random.Random, most: int = 40) -> str:
    """Return a text of some characters, now and then beyond ASCII."""
    return "".join(rng.choice("abcxyz/._ -:09ä損\0") for _ in range(rng.randrange(most)))


def event(rng: random.Random) -> Event:
    """Return an event of any kind but the closing one."""
    values = {f"k{n}": text(rng) for n in range(rng.randrange(4))}
    now = rng.randrange(2**42)
    return rng.choice(
        [
            lambda: Metric(f"m{rng.randrange(9)}", rng.uniform(-1e9, 1e9), now, rng.randrange(-5, 10**6)),
            lambda: Metrics({f"m{n}": rng.random() for n in range(rng.randrange(1, 9))}, now, rng.randrange(99)),
            lambda: Params(values, now),
            lambda: Tags(values, now),
            lambda: Artifact(f"{rng.randrange(99)}.txt", f"{rng.getrandbits(256):064x}", rng.randrange(10**6), now),
            lambda: FileFor(f"model:m-{rng.getrandbits(64):x}", "a/b.txt", f"{rng.getrandbits(256):064x}", 5, now),
            lambda: Request(rng.choice(sorted(OPERATIONS)), rng.choice(_ARGUMENTS), now),
            lambda: RunStarted(now, text(rng), "user", values, bool(rng.getrandbits(1))),
            lambda: RunEnded(rng.choice(["FINISHED", "FAILED", "KILLED"]), now),
        ]
    )()


def payloads(rng: random.Random, mix: int, count: int) -> list[bytes]:
    """Return the payloads of a segment: for mix 0 plain metrics, for each other one another mixture of kinds."""
    if mix == 0:
        return [encode(metric(number)) for number in range(count)]
    return [encode(event(rng)) for _ in range(count)]


def closing() -> bytes:
    """Return the payload of a closing frame."""
    return encode(SegmentClosed(rotated=False))


def spoilt(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a payload that is nearly an event: one of the seeds with one to three changes, or bytes without sense."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(1, 200))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(9)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what in {1, 2} and at < len(data):
            data[at] = rng.choice(_HEADS)
        elif what == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif what == 4:
            del data[at : at + rng.randrange(1, 9)]
        elif what == 5:
            data[at : at + rng.randrange(9)] = rng.choice(_BOMBS)
        elif what == 6:
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other)) :]
        elif what == 7:
            data[at:at] = data[at : at + rng.randrange(1, 30)]
        elif data and 0x90 <= data[0] < 0x9F:  # one field more, as a newer version may add
            data[0] += 1
            data += rng.choice((rng.choice(_BOMBS), rng.choice(seeds), bytes([rng.choice(_HEADS)])))
        if not data:
            data += b"\x90"
    return bytes(data)


def nested(payload: bytes, depth: int, opener: bytes) -> bytes:
    """Return an event with one field more, in which so many arrays or maps lie in each other."""
    return bytes([payload[0] + 1]) + payload[1:] + opener * depth + b"\xc0"


def nests(rng: random.Random, depth: int) -> Iterator[bytes]:
    """Yield bombs of a depth: bare, in a field that is not known, and in place of a field that is."""
    seed = encode(event(rng))
    for opener in (b"\x91", b"\x81\xa1k", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\xdf\x00\x00\x00\x01\xa1k"):
        yield opener * depth + b"\xc0"
        yield nested(seed, depth, opener)
        yield b"\x93\x05" + opener * depth + b"\xc0\x01"
        yield b"\x93\x05\x81\xa1k" + opener * depth + b"\xc0\x01"

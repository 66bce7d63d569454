"""What two processes of the sandbox say to one another: frames of JSON that carry plain data and nothing else.

Only values of the built-in types, and a few of the standard library, can cross; they arrive as fresh objects of exactly
those types. An object with a `__eq__` of its own never reaches the process that compares. numpy's numbers arrive as
Python's, which equal what they equal. Its arrays do not cross: as lists they would pass where they fail in one process,
since an array that is compared with a list has no truth.
"""

import collections
import datetime
import decimal
import fractions
import itertools
import json
import os
import re
import sys
import types

FRAME_BYTES = 1 << 24
ITEMS = 1 << 20  # of an iterator that is used up to send it
LARGE = 1 << 63  # from here on integers are written to the base of 16: JSON's own fail beyond 4,300 digits


class NotPlain(Exception):
    """A value that cannot leave its process."""


class Closed(Exception):
    """The other side is gone, or sent what is no frame."""


def send(fd, message):
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > FRAME_BYTES:
        raise NotPlain(f"more than {FRAME_BYTES} bytes of data")
    data = len(data).to_bytes(4, "big") + data
    while data:
        try:
            data = data[os.write(fd, data) :]
        except OSError as error:
            raise Closed(str(error)) from None


def receive(fd):
    size = int.from_bytes(_exactly(fd, 4), "big")
    if size > FRAME_BYTES:
        raise Closed(f"a frame of {size} bytes")
    try:
        return json.loads(_exactly(fd, size))
    except (ValueError, RecursionError) as error:
        raise Closed(f"not JSON: {error}") from None


def _exactly(fd, size):
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 16))
        if not part:
            raise Closed("it left before its test had returned")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice)
TEXT = {  # types written as the text that makes them
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}
SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}


def encode(value, keep=None):
    """JSON of a plain value. keep: gives a callable a number, by which the other side calls it. Raises NotPlain.

    Subclasses (Counter, named tuples, IntEnum) go as what they are made from.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(int.__index__(value))]
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    if isinstance(value, complex):
        return ["complex", repr(complex.real.__get__(value)), repr(complex.imag.__get__(value))]
    if isinstance(value, bytes | bytearray):
        return ["bytearray" if isinstance(value, bytearray) else "bytes", bytes(value).hex()]
    try:
        if isinstance(value, list):
            return ["list", *_encode_items(list.__iter__(value), keep)]
        if isinstance(value, dict):
            return ["dict", *(_encode_items(pair, keep) for pair in dict.items(value))]
        for name, kind in SEQUENCES.items():
            if isinstance(value, kind):
                return [name, *_encode_items(kind.__iter__(value), keep)]
    except RecursionError:
        raise NotPlain("data nested too deeply, or within itself") from None
    for name, (kind, write, _) in TEXT.items():
        if isinstance(value, kind):
            return [name, write(value)]
    if isinstance(value, datetime.timedelta):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, range):
        return ["range", *_encode_items((value.start, value.stop, value.step), keep)]
    if isinstance(value, ITERATORS) or type(value).__name__.endswith("_iterator"):
        items = list(itertools.islice(value, ITEMS + 1))
        if len(items) > ITEMS:
            raise NotPlain(f"an iterator of more than {ITEMS} items")
        return ["iterator", *_encode_items(items, keep)]
    if isinstance(value, type({}.keys()) | type({}.values()) | type({}.items())):
        name = {"dict_keys": "keys", "dict_values": "values", "dict_items": "items"}[type(value).__name__]
        return [name, *_encode_items(value, keep)]
    if isinstance(value, re.Match):
        return ["match"]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and not isinstance(value.item(), numpy.generic):
        return encode(value.item(), keep)
    if keep is not None and callable(value):
        return ["callable", keep(value)]
    raise NotPlain(f"a value of type {type(value).__name__}")


def _encode_items(items, keep):
    """Numbers among others are JSON's own: a list of a million fits a frame, and is not slow."""
    return [x if type(x) is float or (type(x) is int and -LARGE < x < LARGE) else encode(x, keep) for x in items]


def decode(data, call=None):
    """The value. call: makes a callable of its number. Raises Closed for what `encode` does not write."""
    try:
        return _decode(data, call)
    except (TypeError, ValueError, IndexError, KeyError, ArithmeticError, RecursionError) as error:
        raise Closed(f"not a value: {type(error).__name__}") from None


def _decode(data, call):
    if data is None or isinstance(data, bool | str):
        return data
    if not isinstance(data, list):
        raise TypeError
    name, *rest = data
    if name == "int":
        return int(rest[0], 16)
    if name == "float":
        return float(rest[0])
    if name == "complex":
        return complex(float(rest[0]), float(rest[1]))
    if name in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[name].fromhex(rest[0])
    if name in TEXT:
        return TEXT[name][2](rest[0])
    if name == "timedelta":
        return datetime.timedelta(*map(int, rest))
    if name == "callable":
        return call(rest[0])
    if name in ("dict", "items"):
        pairs = rest if name == "dict" else [pair[1:] for pair in rest]
        made = dict(_decode_items(pair, call) for pair in pairs)
        return made if name == "dict" else made.items()
    if name == "match":
        return Match()
    items = _decode_items(rest, call)
    if name == "list":
        return items
    if name in SEQUENCES:
        return SEQUENCES[name](items)
    if name == "range":
        return range(*items)
    if name == "iterator":
        return iter(items)
    if name == "keys":
        return dict.fromkeys(items).keys()
    if name == "values":
        return dict(enumerate(items)).values()
    raise KeyError(name)


def _decode_items(items, call):
    return [x if type(x) is float or type(x) is int else _decode(x, call) for x in items]


class Match:
    """Of a match of a regular expression the other side sees that there was one: it is true, not None, equal to
    nothing, and has no groups."""


def refill(given, now):
    """Makes the list, dict or set that was given hold what the other side's holds now; the rest is as it was."""
    if type(given) is not type(now):
        return
    if isinstance(given, list):
        for a, b in zip(given, now, strict=False):
            refill(a, b)
        kept = [
            a if type(a) is type(b) and isinstance(a, list | dict | set) else b
            for a, b in zip(given, now, strict=False)
        ]
        given[:] = kept + now[len(kept) :]
    elif isinstance(given, dict):
        for key, value in now.items():
            if isinstance(given.get(key), list | dict | set) and type(given[key]) is type(value):
                refill(given[key], value)
                now[key] = given[key]
        given.clear()
        given.update(now)
    elif isinstance(given, set | bytearray | collections.deque):
        given.clear()
        (given.update if isinstance(given, set) else given.extend)(now)

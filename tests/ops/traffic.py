"""Bytes that interpreted kernels move: a memory-bound kernel held to the least that its mathematics needs.

    with count_bytes() as traffic:
        op(x)
    assert traffic.loaded == x.nbytes

Every active lane of a `tl.load` or `tl.store` counts its element's size. There is no cache: an element that is read
twice counts twice, as it does on a GPU once it has left the cache. Atomics are not counted; no kernel here uses one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime.interpreter import interpreter_builder


@dataclass
class Traffic:
    """Bytes, summed over every program of every kernel launched inside the `with` block."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


def _bytes(pointers: Any, mask: Any) -> int:
    return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count on the CPU, under TRITON_INTERPRET=1. Unmasked accesses arrive as masked ones with a full mask."""
    traffic = Traffic()
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def counted_load(pointers, mask, *rest, **options):
        traffic.loaded += _bytes(pointers, mask)
        return load(pointers, mask, *rest, **options)

    def counted_store(pointers, value, mask, *rest, **options):
        traffic.stored += _bytes(pointers, mask)
        return store(pointers, value, mask, *rest, **options)

    with mock.patch.multiple(interpreter_builder, create_masked_load=counted_load, create_masked_store=counted_store):
        yield traffic


def within(moved: int, least: int, slack: float = 1.05) -> bool:
    """Whether `moved` bytes are no fewer than must be (else the count is wrong) and at most `slack` times as many."""
    return least <= moved <= slack * least

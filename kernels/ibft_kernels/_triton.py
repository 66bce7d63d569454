"""`triton` and `tl`, or stand-ins where Triton is not installed (macOS, Windows).

An op's kernels and its torch path live in one file, so that file must import without Triton. With the stand-ins a
decorated kernel stays a plain Python function that nothing calls: `_dispatch` refuses the triton backend first.
"""

from __future__ import annotations

from typing import Any

__all__ = ["HAVE_TRITON", "tl", "triton"]

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

    class _Absent:
        """Any attribute is another stand-in; calling one gives back the function it would decorate."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton: Any = _Absent()  # type: ignore[no-redef]
    tl: Any = _Absent()  # type: ignore[no-redef]

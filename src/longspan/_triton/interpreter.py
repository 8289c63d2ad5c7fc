"""Repair of Triton's interpreter, which is our test bed where there is no GPU."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["repair_interpreter"]


@functools.cache
def repair_interpreter() -> None:
    """Let run-time loop bounds work with numpy >= 2.4.

    Triton (3.6, 3.7) keeps scalars as arrays of shape (1,) and turns them into loop bounds with
    int(), which numpy 2.4 refuses for anything but 0-dimensional arrays.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

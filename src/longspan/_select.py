"""Pick an implementation: the first that can run for "auto", else the named one or an error."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import ConfigError, UnsupportedError, nearest_name
from .types import Impl, ImplReport


def choose_impl(function: str, impl: Impl | str, reports: Iterable[ImplReport]) -> Impl:
    """The implementation to run; `reports` come preferred first.

    "auto" never picks the dense reference: that would be silently slow.

    Raises:
        ConfigError: `impl` is not a known name.
        UnsupportedError: the named implementation refuses this call, or all do.
    """
    try:
        wanted = Impl(impl)
    except ValueError:
        raise ConfigError(
            f"{function}: impl is {impl!r}. {nearest_name(str(impl), [i.value for i in Impl])}"
        ) from None
    listed = tuple(reports)
    if wanted is Impl.AUTO:
        for report in listed:
            if report.refusal is None and report.impl is not Impl.REFERENCE:
                return report.impl
        reasons = "; ".join(f"{r.impl.value}: {r.refusal}" for r in listed if r.refusal)
        raise UnsupportedError(
            f"{function}: no implementation can run this call ({reasons}). "
            "Change what is named, or use impl='reference' (dense) if the size allows."
        )
    for report in listed:
        if report.impl is wanted:
            if report.refusal is None:
                return wanted
            others = [r.impl.value for r in listed if r.refusal is None]
            fix = f"Use impl={others[0]!r}" if others else "Change the inputs"
            raise UnsupportedError(
                f'{function}(impl="{wanted.value}"): {report.refusal}. {fix}; '
                "longspan.explain(...) lists what each implementation accepts."
            )
    offered = ", ".join(report.impl.value for report in listed)
    raise UnsupportedError(
        f'{function}(impl="{wanted.value}"): this mechanism has no such implementation. '
        f"Allowed: auto, {offered}. Use impl='auto'."
    )

"""Compile every production kernel for GPUs that are not there, and watch what it costs.

    python -m longspan._triton.resources --check [--mechanism NAME] [--capability 90]
    python -m longspan._triton.resources --write

`--write` stores registers, spilled bytes and shared memory of each configuration in
`resources.json`, with the Triton version. `--check` compiles again: a spill beyond the allowance
of a case always fails; if the version is the same, so does a changed, missing or surplus row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..mechanisms import MECHANISMS, get_mechanism
from .aot import AotCase, compile_case

__all__ = ["CAPABILITIES", "TABLE", "check", "collect", "compile_all", "write"]

CAPABILITIES = (80, 90)
TABLE = Path(__file__).with_name("resources.json")

Job = tuple[str, int, int]  # mechanism, capability, index into its catalogue
Rows = dict[str, dict[str, Any]]  # "sm_90/<case name>" -> resources


def collect(mechanism: str, capability: int) -> list[AotCase]:
    """The catalogue of a mechanism for sm_<capability>."""
    package = get_mechanism(mechanism).package
    module = importlib.import_module(f"longspan.{package}.impl.triton.catalogue")
    return list(module.cases(capability))


def compile_all(
    mechanisms: Iterable[str] | None = None,
    capabilities: Iterable[int] = CAPABILITIES,
    *,
    workers: int = 2,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compile every case in a pool of processes; yields ("sm_90/<case>", resources)."""
    names = _names(mechanisms)
    jobs: list[Job] = [
        (name, capability, index)
        for name in names
        for capability in capabilities
        for index in range(len(collect(name, capability)))
    ]
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_compile, jobs)


def check(
    mechanisms: Iterable[str] | None = None, capabilities: Iterable[int] = CAPABILITIES
) -> list[str]:
    """What is wrong, one line each; empty if nothing is."""
    chosen, targets = None if mechanisms is None else list(mechanisms), list(capabilities)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "rows": {}}
    known: Rows = table["rows"]
    same_version = table["triton"] == _triton_version()
    allowed = _allowances(chosen, targets)
    faults, seen = [], set()
    for name, got in compile_all(chosen, targets):
        seen.add(name)
        if got["spill_bytes"] > allowed.get(name, 0):
            faults.append(f"{name}: spills {got['spill_bytes']} bytes a thread")
        if same_version and name not in known:
            faults.append(f"{name}: not in {TABLE.name}; run --write")
        elif same_version and known[name] != got:
            faults.append(f"{name}: {known[name]} in {TABLE.name}, now {got}; run --write")
    if same_version:
        faults.extend(f"{name}: in {TABLE.name} but no longer compiled; run --write"
                      for name in sorted(_part(known, chosen, targets) - seen))  # fmt: skip
    return faults


def write(mechanisms: Iterable[str] | None = None) -> Rows:
    """Compile, and store the result; rows of other mechanisms stay."""
    chosen = None if mechanisms is None else list(mechanisms)
    rows: Rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else {}
    for name in _part(rows, chosen, CAPABILITIES):
        del rows[name]
    for name, got in compile_all(chosen):
        rows[name] = got
        print(name, *(f"{key}={value}" for key, value in got.items()), flush=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    body = ",\n".join(lines)
    TABLE.write_text(f'{{"triton": "{_triton_version()}", "rows": {{\n{body}\n}}}}\n')
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m longspan._triton.resources")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="compile and store the table")
    action.add_argument("--check", action="store_true", help="compile and compare")
    parser.add_argument("--mechanism", action="append", help="only this one; may be repeated")
    parser.add_argument("--capability", action="append", type=int, choices=CAPABILITIES)
    options = parser.parse_args(arguments)
    if options.write:
        rows, allowed = write(options.mechanism), _allowances(options.mechanism, CAPABILITIES)
        faults = [f"{n}: spills" for n in rows if rows[n]["spill_bytes"] > allowed.get(n, 0)]
    else:
        faults = check(options.mechanism, options.capability or CAPABILITIES)
    print("\n".join(faults) or "all kernels compile without spills", flush=True)
    return 1 if faults else 0


def _names(mechanisms: Iterable[str] | None) -> list[str]:
    everything = [m.name for m in MECHANISMS.values() if m.has_triton]
    return everything if mechanisms is None else list(mechanisms)


def _allowances(mechanisms: Iterable[str] | None, capabilities: Iterable[int]) -> dict[str, int]:
    """Bytes that a case may spill, for the cases that may."""
    return {
        f"sm_{capability}/{case.name}": case.spill_allowance
        for name in _names(mechanisms)
        for capability in capabilities
        for case in collect(name, capability)
        if case.spill_allowance
    }


def _compile(job: Job) -> tuple[str, dict[str, Any]]:
    mechanism, capability, index = job
    case = collect(mechanism, capability)[index]
    return f"sm_{capability}/{case.name}", asdict(compile_case(case, capability))


def _part(rows: Rows, mechanisms: list[str] | None, capabilities: Iterable[int]) -> set[str]:
    """Names of the rows that belong to these mechanisms and targets."""
    targets = {f"sm_{capability}" for capability in capabilities}
    found = set()
    for name in rows:
        target, mechanism = name.split("/")[:2]
        if target in targets and (mechanisms is None or mechanism in mechanisms):
            found.add(name)
    return found


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())

"""The ranks that share a sequence: who they are, whether they agree, and who stopped.

torch's process group moves the data. This adds two things that it lacks: before the first exchange
the ranks compare what they are about to do, and when an exchange fails the ones that still run say
which rank stopped. Both go through the key-value store that `init_process_group` met at, so they
work beside any backend and never meet an exchange of tensors.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ConfigError, RankError, UnsupportedError
from .compat import context_parallel_reason, default_store
from .watch import Heartbeat

__all__ = ["ContextGroup"]

_POLL_SECONDS = 0.002


class ContextGroup:
    """The processes that share each sequence, with checks and a stated timeout.

    Args:
        group: a one-dimensional DeviceMesh (`mesh["cp"]`), a process group, or None for all
            processes. `torch.distributed.init_process_group` must have been called.
        timeout: seconds without a sign of life after which a rank counts as stopped (a thread of
            its own gives them, so a slow rank is not a stopped one). A failed exchange raises
            RankError with that rank's number within this time of torch noticing; torch notices
            a closed connection at once, and silence after the process group's own timeout.
        exit_when_stopped: end this process, with a line on standard error that names the rank,
            once one is silent for `timeout`. For GPUs, where a kernel that waits for a lost rank
            raises nothing.

    Attributes:
        rank: of this process in the group, 0 .. size - 1.
        size: processes in the group.
        ranks: their ranks among all processes.

    Raises:
        ConfigError: torch.distributed is not set up, the mesh has several dimensions, or this
            process is not in the group.

    Making one is collective: every rank of the group makes it, in the same order as other groups.

    Example:
        mesh = init_device_mesh("cuda", (dp, cp), mesh_dim_names=("dp", "cp"))
        group = ContextGroup(mesh["cp"], timeout=60.0)
    """

    def __init__(
        self,
        group: DeviceMesh | ProcessGroup | None = None,
        *,
        timeout: float = 120.0,
        exit_when_stopped: bool = False,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "ContextGroup: torch.distributed is not set up. Start the script with torchrun "
                "and call torch.distributed.init_process_group first."
            )
        if timeout <= 0:
            raise ConfigError(f"ContextGroup: timeout is {timeout}; it must be above 0 seconds.")
        self.group = _process_group(group)
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(self.group))
        self.size = len(self.ranks)
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ConfigError(
                f"ContextGroup: rank {dist.get_rank()} is not among the group's {self.ranks}. "
                "Make the group of this process, e.g. mesh['cp']."
            )
        self.timeout = float(timeout)
        self._agreed: set[str] = set()
        self._counter = 0
        # The name must be one that the ranks share and no later group has.
        self._prefix = f"longspan/{'-'.join(map(str, self.ranks))}/{_next_name(self.ranks)}"
        self._store = default_store()
        self._heartbeat: Heartbeat | None = None
        if self.size > 1:
            # NCCL wants all ranks in a group's first call, which a ring need not have.
            dist.barrier(self.group)
            self._heartbeat = Heartbeat(
                self._prefix, self.rank, self.size, self.timeout, exit_when_stopped
            )

    def close(self) -> None:
        """Leave: this rank makes no further calls. Also the end of a `with` block without error."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None

    def __enter__(self) -> ContextGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def verify(self, name: str, call: Mapping[str, Any], problem: str | None = None) -> None:
        """Compare what the ranks are about to do; every rank raises if they differ.

        Args:
            name: of the function, for messages.
            call: argument -> value, JSON-able or with a telling `repr`; equal on all ranks if all
                is well. A description that was compared once is not compared again.

        Raises:
            RankError: ranks differ, a rank reports a problem, or one does not come within the
                timeout (it stopped, or goes on with what was compared before).
            UnsupportedError: torch's context-parallel manager is active, too.
        """
        reason = context_parallel_reason()
        if reason is not None:
            problem = (
                f"{name}: {reason} is active, which shards sequences on its own. Leave it, and "
                "split the inputs with SequenceLayout.split."
            )
            self.report(name, problem)
            raise UnsupportedError(problem)
        if self.size == 1:
            return
        mine = {key: _plain(value) for key, value in call.items()}
        text = json.dumps({"name": name, "call": mine, "problem": None}, sort_keys=True)
        if text in self._agreed:
            return
        for rank, other in enumerate(self._share(name, text)):
            self._compare(name, rank, mine, json.loads(other))
        self._agreed.add(text)

    def report(self, name: str, problem: str) -> None:
        """Tell the other ranks, which are about to compare a call, what is wrong on this one."""
        if self.size > 1:
            text = json.dumps({"name": name, "call": {}, "problem": problem}, sort_keys=True)
            self._post(name, text)

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Turn a failed exchange into a RankError that names the ranks that stopped."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankError) or not _is_exchange(error):
                raise
            raise RankError(self._describe(name, error)) from error

    def peer(self, rank: int) -> int:
        """Rank among all processes of rank `rank` of the group, cyclic."""
        return self.ranks[rank % self.size]

    def _post(self, name: str, text: str) -> str:
        key = f"{self._prefix}/verify/{self._counter}"
        self._counter += 1
        with self.guard(name):
            self._store.set(f"{key}/{self.rank}", text)
        return key

    def _share(self, name: str, text: str) -> list[str]:
        """The texts of all ranks."""
        key = self._post(name, text)
        deadline = time.monotonic() + self.timeout
        with self.guard(name):
            missing = set(range(self.size))
            while True:
                missing = {rank for rank in missing if not self._store.check([f"{key}/{rank}"])}
                if not missing:
                    return [self._store.get(f"{key}/{r}").decode() for r in range(self.size)]
                if time.monotonic() > deadline:
                    raise RankError(
                        f"{name}: {_ranks(missing)} did not come to compare this call within "
                        f"{self.timeout:g} s. {self._stopped_sentence()}Ranks must make the same "
                        "calls in the same order, with the same shapes and settings."
                    )
                time.sleep(_POLL_SECONDS)

    def _compare(self, name: str, rank: int, mine: dict[str, Any], other: dict[str, Any]) -> None:
        if other["problem"] is not None:
            raise RankError(f"{name}: on rank {rank}: {other['problem']}")
        if other["name"] != name:
            raise RankError(
                f"{name}: rank {rank} is in {other['name']} instead. Ranks must make the same "
                "calls in the same order; look for a branch that depends on the rank."
            )
        theirs = other["call"]
        different = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        if different:
            parts = "; ".join(
                f"{k} is {mine.get(k)} here (rank {self.rank}) but {theirs.get(k)} on rank {rank}"
                for k in different
            )
            raise RankError(
                f"{name}: ranks differ: {parts}. They must agree; pass the same on every rank."
            )

    def _describe(self, name: str, error: RuntimeError) -> str:
        reason = str(error).splitlines()[0][:200]
        return (
            f"{name}: an exchange between ranks failed on rank {self.rank}. "
            f"{self._stopped_sentence(wait=True)}Torch said: {reason}. Start all ranks again from "
            "the last checkpoint."
        )

    def _stopped_sentence(self, wait: bool = False) -> str:
        """Which ranks have no heartbeat; `wait` gives those that just died time to show."""
        stopped = [] if self._heartbeat is None else self._heartbeat.stopped(wait=wait)
        if not stopped:
            return f"All ranks gave signs of life within {self.timeout:g} s. "
        return f"No sign of life from {_ranks(stopped)} for {self.timeout:g} s, or it left. "


def _process_group(group: DeviceMesh | ProcessGroup | None) -> ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(
                f"ContextGroup: group is a mesh of {group.ndim} dimensions "
                f"{group.mesh_dim_names}; it must have one. Pass a dimension, e.g. mesh['cp']."
            )
        return group.get_group()
    if group is None:
        world = dist.group.WORLD
        assert world is not None
        return world
    return group


_NAMES: dict[tuple[int, ...], int] = {}


def _next_name(ranks: tuple[int, ...]) -> int:
    """0, 1, .. for the groups of the same ranks, in the order in which they are made."""
    _NAMES[ranks] = _NAMES.get(ranks, -1) + 1
    return _NAMES[ranks]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list, torch.Size)):
        return [_plain(item) for item in value]
    return repr(value)


def _ranks(ranks: set[int] | list[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _is_exchange(error: RuntimeError) -> bool:
    """Whether an error comes from the process group or the store, not from arithmetic."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "timeout", "socket")
    )

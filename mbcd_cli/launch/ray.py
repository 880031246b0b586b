"""Units as tasks of a Ray cluster (dependency group `ray`): Ray Core alone, no dashboard, no report of usage."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mbcd_cli.errors import RunError, lines_of
from mbcd_cli.launch.launch import Ended
from mbcd_cli.launch.nodes import Demands
from mbcd_cli.launch.unit import Unit, holder
from mbcd_cli.say import SILENT, Say
from mbcd_cli.settings import RaySettings

if TYPE_CHECKING:
    from ray import ObjectRef

_AT_ONCE = 10_000
"""Tasks that Ray knows of at a time; it keeps a record of each."""
_LOOKED_AT = 500
"""Of those, how many are looked at to see which run: Ray begins them in this order."""
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray takes 127.0.0.1 as the address by which other machines see this one, and would listen there."""
_CHECK_SECONDS = 300
"""What a node has to answer in, before the first unit: its processes begin, too (120 was little on a busy machine)."""
_ANSWER_SECONDS = 10
"""What a cluster has to take a connection in."""
_LEAVE_SECONDS = 60
"""What units have for their last checkpoints when the command ends."""


def _task() -> Callable[[bytes], tuple[str, str, int | str]]:
    """What a node is given, as a function that travels whole, and so tells of a node without mbcd as well.

    Its argument is, pickled, the demands and, but for a question, the arguments of `ray_node.run_unit`. It returns
    (node, its name, exit code or what the node lacks).
    """

    def there(arguments: bytes) -> tuple[str, str, int | str]:
        import ray

        here = ray.get_runtime_context().get_node_id(), socket.gethostname()
        try:
            from mbcd_cli.launch import ray_node

            demands, *unit = pickle.loads(arguments)
            lacking = ray_node.fault(demands)
        except Exception as error:
            return *here, f"cannot run mbcd: {error}"
        return *here, lacking or (ray_node.run_unit(demands, *unit) if unit else "")

    return there


class Ray:
    """The engine of a Ray cluster: a unit is a task, which a warm process of its node runs.

    A task whose node dies is begun again by Ray on another. Leaving (Ctrl-C) ends the tasks at their checkpoints; the
    same command goes on.

    Args:
        address: `auto`, `host:port`, or None for a cluster of this machine alone, on loopback, which ends with us.
        asked: what a unit takes. demands: what nodes have to have.
        threads: CPU threads of a unit; 0: its processors.
        gpu: whether a unit can use one.
        say: told of nodes that lack something.

    Raises:
        RunError: Ray is missing, there is no such cluster, no node meets the demands, or none has what a unit takes.
    """

    def __init__(
        self,
        address: str | None,
        *,
        asked: RaySettings,
        demands: Demands,
        threads: int = 0,
        gpu: bool = False,
        say: Say = SILENT,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Under `uv run` Ray would copy this folder to the nodes and have uv make another environment there.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        if address is None:
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: units have what `local` gives them
            # Some of its servers listen on every address, whatever they are told.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            import ray
        except ImportError as error:
            raise RunError(
                "--launcher ray needs Ray, which is not installed.", "Install it: uv sync --group ray."
            ) from error
        self._ray, self._demands, self._say = ray, demands, say
        self._threads = threads or asked.processors
        self._ours = not ray.is_initialized()
        if self._ours:
            self._begin(address)
        gpus = asked.gpus
        if gpus is None:
            gpus = 1.0 if gpu and ray.cluster_resources().get("GPU") else 0.0
        self._takes = {"num_cpus": asked.processors, "num_gpus": gpus, "memory": int(asked.memory_gb * 2**30) or None}
        # Ray begins a task again itself whose node dies: as often as that happens. A process that saw a GPU is kept,
        # too: what holds its memory is a child of the warm one, and has ended.
        self._run = ray.remote(max_calls=0, max_retries=-1, **self._takes)(_task())
        self._tasks: dict[ObjectRef, Unit] = {}
        self._leave = Path(demands.mark).with_name(f".mbcd-leave-{secrets.token_hex(6)}")
        self._barred: dict[str, str] = {}
        try:
            self._check_nodes()
            self._check_room()
        except RunError:
            self.stop()
            raise

    def _begin(self, address: str | None) -> None:
        options: dict[str, object] = {} if address else {"_node_ip_address": _LOOPBACK, "include_dashboard": False}
        options |= {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address and address != "auto":  # Ray itself tries for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
            self._ray.init(**options)
        except (OSError, ValueError, RuntimeError) as error:
            why = lines_of(error)[0]
            remedy = "Begin one with `ray start --head`, or name another with --ray-address host:port."
            raise RunError(f"--ray-address {address}: there is no Ray cluster ({why})", remedy) from error

    def _check_nodes(self) -> None:
        """Say which nodes lack something; they get no unit."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {}
        remote = self._ray.remote(max_retries=0, num_cpus=0)(_task())
        for node in self._ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[remote.options(scheduling_strategy=there).remote(pickle.dumps((self._demands,)))] = node
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_CHECK_SECONDS)
        for task, node in asked.items():
            fault = f"does not answer within {_CHECK_SECONDS} s"
            if task in ready:
                try:
                    _, _, fault = self._ray.get(task)
                except self._ray.exceptions.RayError as error:
                    fault = f"cannot run mbcd: {lines_of(error)[-1]}"
            if fault:
                self._bar(node["NodeID"], node["NodeManagerHostname"], fault)

    def _bar(self, node: str, name: str, fault: str) -> None:
        if node not in self._barred:
            self._barred[node] = f"node {name} ({node[:8]}) {fault}"
            self._say.warn(f"{self._barred[node]}; nothing is run there.")

    def _check_room(self) -> None:
        wanted = {"CPU": self._takes["num_cpus"], "GPU": self._takes["num_gpus"], "memory": self._takes["memory"] or 0}
        nodes = [
            node["NodeID"]
            for node in self._ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= number for name, number in wanted.items())
        ]
        if not nodes:
            told = f"{wanted['CPU']} processors, {wanted['GPU']:g} GPUs and {wanted['memory'] / 2**30:g} GB"
            raise RunError(
                f"No node of the Ray cluster has {told}, which a run takes.", "Ask for less: --set ray.processors=1."
            )
        if all(node in self._barred for node in nodes):
            raise RunError(
                "\n".join(["No node of the Ray cluster can run this:", *(self._barred[node] for node in nodes)]),
                "Give the nodes what they lack.",
            )

    @property
    def room(self) -> int:
        return _AT_ONCE - len(self._tasks)

    def find(self, units: Sequence[Unit]) -> Sequence[Unit]:
        return []

    def submit(self, units: Sequence[Unit]) -> None:
        others = {"ray.io/node-id": f"!in({','.join(self._barred)})"} if self._barred else None
        remote = self._run.options(label_selector=others)
        for unit in units:
            arguments = (self._demands, unit.order(self._threads), self._threads, str(self._leave))
            self._tasks[remote.remote(pickle.dumps(arguments))] = unit

    def wait(self, seconds: float) -> None:
        if not self._tasks:
            time.sleep(seconds)
        else:
            self._ray.wait(list(self._tasks), timeout=seconds)

    def ended(self) -> Iterator[Ended]:
        if not self._tasks:
            return
        ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        for task in ready:
            unit = self._tasks.pop(task)
            try:
                *node, told = self._ray.get(task)
            except self._ray.exceptions.RayError as error:
                yield Ended(unit, -9, lines_of(error)[-1])
                continue
            if isinstance(told, int):
                yield Ended(unit, told)
            else:
                self._bar(*node, told)
                self._check_room()
                yield Ended(unit, None)

    def running(self) -> Mapping[str, str]:
        found = {}
        for unit in islice(self._tasks.values(), _LOOKED_AT):
            # A lock that nobody holds may still tell of who was killed.
            if unit.state(unit.pieces[0]) == "running" and (held := holder(unit.pieces[0].folder)) is not None:
                found[unit.pieces[0].key] = held.host
        return found

    def stop(self) -> None:
        """Ask what runs for its checkpoint; what began with us ends."""
        if self._tasks:
            self._leave.touch()
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=_LEAVE_SECONDS)
            self._leave.unlink()
        self._tasks.clear()
        if self._ours:
            self._ray.shutdown()

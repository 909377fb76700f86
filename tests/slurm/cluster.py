"""A Slurm cluster of two nodes on one machine: `python -m tests.slurm.cluster FOLDER` starts it and waits for Ctrl-C.

Each node, and the controller, is a network namespace with a host name of its own, so that names, addresses and
interfaces are found as on a real cluster. Needs root, `ip` and Debian's packages (`PACKAGES`); nothing of it stays.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from train.compose import ROOT

PACKAGES = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
NETWORK = "10.78.0"
CONTROLLER, NODES = "afctl", ("afnode1", "afnode2")
ADDRESSES = {CONTROLLER: f"{NETWORK}.1", NODES[0]: f"{NETWORK}.11", NODES[1]: f"{NETWORK}.12"}
DEVICES = ("/dev/null", "/dev/zero")
"""What each node says are its cards."""
START_SECONDS = 30

CONFIG = """\
ClusterName=anchorformer
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
MinJobAge=3600
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
"""`cred_expire`: a requeued job waits until its credential has expired, by default for two minutes."""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "a Slurm cluster on one machine takes root"
    gone = [name for name in ("ip", "slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]
    return f"not installed: {', '.join(gone)} (apt-get install {PACKAGES} iproute2)" if gone else ""


@dataclass
class Cluster:
    """Starts in `start`, ends in `stop`; commands run on the controller, as on a login node."""

    folder: Path
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever speaks with the cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def inside(self, host: str) -> list[str]:
        """What stands before a command that is to run on one of the hosts: its network, its name, its /etc/hosts."""
        become = f'mount --bind {self.folder}/hosts /etc/hosts && hostname {host} && exec "$@"'
        return ["nsenter", f"--net=/run/netns/{host}", "unshare", "--mount", "--uts", "sh", "-c", become, "sh"]

    def run(self, *words: str | Path, **variables: str) -> str:
        """What a command on the controller prints.

        Raises:
            AssertionError: it fails.
        """
        done = self.try_to(*words, **variables)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_to(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command on the controller, however it ends."""
        return subprocess.run(
            [*self.inside(CONTROLLER), *map(str, words)], env={**self.environment, **variables}, cwd=ROOT,
            capture_output=True, text=True,
        )  # fmt: skip

    def facts(self, job: str) -> Mapping[str, str]:
        """What Slurm knows of a job."""
        line = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def start(self) -> None:
        """Returns when both nodes are idle.

        Raises:
            RuntimeError: they are not, with what the daemons say.
        """
        self.stop()  # one that was killed has left its namespaces
        for name in ("run", "state", "log", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self._write_configuration()
        self._make_network()
        self._start_munge()
        for host, command in (
            (CONTROLLER, ["slurmctld", "-D", "-c", "-i"]), *((node, ["slurmd", "-D", "-N", node]) for node in NODES)
        ):  # fmt: skip
            with (self.folder / "log" / f"{host}.out").open("wb") as log:
                self._daemons.append(
                    subprocess.Popen([*self.inside(host), *command], env=self.environment, stdout=log, stderr=log)
                )
        deadline = time.monotonic() + START_SECONDS
        while (states := self._states()) != ["idle"] * len(NODES):
            if time.monotonic() > deadline:
                said = "\n".join(path.read_text()[-2000:] for path in sorted((self.folder / "log").glob("*")))
                raise RuntimeError(f"the nodes are {states}:\n{said}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends everything that runs inside, the jobs too, and removes the namespaces."""
        for name in (*NODES, CONTROLLER):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in listed.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        for name in (*NODES, CONTROLLER):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _states(self) -> list[str]:
        return self.try_to("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").stdout.split()

    def _write_configuration(self) -> None:
        has = f"CPUs={os.cpu_count() or 1} RealMemory=4000 Gres=gpu:{len(DEVICES)} State=UNKNOWN"
        nodes = "\n".join(f"NodeName={node} NodeAddr={ADDRESSES[node]} {has}" for node in NODES)
        text = CONFIG.format(controller=CONTROLLER, address=ADDRESSES[CONTROLLER], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in DEVICES))

    def _make_network(self) -> None:
        """A namespace for each host, the nodes' joined to a bridge in the controller's."""
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(hosts)
        for name in ADDRESSES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", CONTROLLER, "link", "add", "cluster", "type", "bridge")
        ip("-n", CONTROLLER, "addr", "add", f"{ADDRESSES[CONTROLLER]}/24", "dev", "cluster")
        ip("-n", CONTROLLER, "link", "set", "cluster", "up")
        for node in NODES:
            ip("link", "add", "eth0", "netns", node, "type", "veth", "peer", "name", node, "netns", CONTROLLER)
            ip("-n", CONTROLLER, "link", "set", node, "master", "cluster", "up")
            ip("-n", node, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "eth0", "up")

    def _start_munge(self) -> None:
        run = self.folder / "run"
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (run, key):
            shutil.chown(path, "munge", "munge")
        command = ["munged", "--force", "--foreground", f"--socket={run}/munge.sock", f"--key-file={key}"]
        command += [f"--{what}-file={run}/munged.{what}" for what in ("pid", "log", "seed")]
        with (self.folder / "log" / "munged.out").open("wb") as log:
            self._daemons.append(subprocess.Popen(command, user="munge", group="munge", stdout=log, stderr=log))
        while not (run / "munge.sock").exists():
            time.sleep(0.05)


def ip(*words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def main(arguments: Sequence[str]) -> int:
    """Holds a cluster until Ctrl-C."""
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    cluster = Cluster(Path(arguments[0]).resolve())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        cluster.start()
        print(f"up; on a login node of it:\n  export SLURM_CONF={cluster.folder}/slurm.conf")
        print(f"  nsenter --net=/run/netns/{CONTROLLER} sinfo\nCtrl-C ends it", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

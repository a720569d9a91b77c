"""A real Slurm on this machine: munged, slurmctld, and one slurmd per node, each in a network namespace of its own.

Every node has its own address, host name, /etc/hosts, and a small node-local disk at `local`; they share the rest of
the file system, as nodes of a cluster share theirs. Nothing outside `root` is written, and only processes of these
namespaces are ended. Needs root and Debian's packages (see the Makefile).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = "munged munge slurmctld slurmd sbatch srun scontrol squeue scancel ip nsenter unshare".split()
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
}
_LOCAL_MIB = 32
# job numbers of a cluster
_JOBS = 1000
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
_FREEZER = Path("/sys/fs/cgroup/freezer")

# Waits are short where a site's are long: cred_expire is also what a requeued job waits before it may start.
_CONF = """\
ClusterName=m1
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=10
InactiveLimit=0
CompleteWait=0
SlurmdTimeout=10
UnkillableStepTimeout=30
FirstJobId={first_job}
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no Slurm can run here; empty when it can."""
    lacking = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} are not installed (`make slurm-packages` installs them as root)"
    if os.geteuid() != 0:
        return "nodes with an address of their own need root"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


class Cluster:
    """Nodes n0, n1, ... and their controller. Use it as a context manager."""

    def __init__(self, num_nodes: int, root: Path | None = None, number: int | None = None) -> None:
        """`root` and `number` are those of a cluster that exists already."""
        # short, because a unix socket's path ends at 107 characters
        self.root = root or Path(tempfile.mkdtemp(prefix="m1slurm"))
        self.number = os.getpid() % 250 if number is None else number
        self.nodes = [f"n{index}" for index in range(num_nodes)]
        self.local = self.root / "local"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        } | {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": _PATH}

    # -------- life

    def __enter__(self) -> Cluster:
        # Daemons outlive whoever starts them. A process of its own ends them when this one is gone, however it went.
        words = [sys.executable, __file__, str(len(self.nodes)), str(self.root), str(self.number)]
        self._keeper = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._write_configuration()
            self._network_up()
            key, socket = self.root / "munge.key", self.root / "munge.socket"
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
            self.root.chmod(0o755)
            files = {"key-file": key, "socket": socket, "pid-file": self.root / "munged.pid",
                     "log-file": self.root / "munged.log", "seed-file": self.root / "munge.seed"}  # fmt: skip
            self._daemon("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
            self._daemon("slurmctld", "-f", self.environment["SLURM_CONF"])
            wait_until(lambda: self.run("scontrol", "ping", check=False).startswith("Slurmctld(primary)"), 20)
            for node in self.nodes:
                self.start_node(node)
            wait_until(lambda: len(self.nodes_that_are("idle")) == len(self.nodes), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._keeper.communicate(timeout=60)

    def stop(self) -> None:
        """End every job and daemon of this cluster and remove what it made on the machine."""
        self.run("scancel", "--user", "root", check=False)
        for node in self.nodes:
            self.kill_node(node)
        for daemon in ("slurmctld", "munged"):
            _end(self.root / f"{daemon}.pid")
        for index, node in enumerate(self.nodes):
            _quietly("ip", "link", "del", f"m1v{self.number}n{index}")
            _quietly("ip", "netns", "del", self._namespace(node))
        _quietly("ip", "link", "del", f"m1b{self.number}")
        self._remove_cgroups()
        shutil.rmtree(self.root, ignore_errors=True)

    def _remove_cgroups(self) -> None:
        """Slurm leaves its empty cgroups behind; clusters side by side have those above the jobs in common."""
        alone = not any(name.startswith("m1b") for name in os.listdir("/sys/class/net"))
        for node in self.nodes:
            for directory in sorted((_FREEZER / f"slurm_{node}").glob("**/"), reverse=True):
                job = re.search(r"/job_(\d+)", str(directory))
                if alone or (job and int(job[1]) // _JOBS == self.number):
                    _quietly("rmdir", str(directory))

    def start_node(self, node: str) -> None:
        """Boot a node."""
        (self.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        boot = (
            'mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/resolv.conf" /etc/resolv.conf; '
            f'mount -t tmpfs -o size={_LOCAL_MIB}m tmpfs "$1/local"; hostname "$2"; '
            'exec slurmd -N "$2" -f "$SLURM_CONF"'
        )
        # `ip netns exec` would mount another /sys, without the cgroups that slurmd kills steps by
        self._daemon(
            "nsenter", f"--net=/run/netns/{self._namespace(node)}", "unshare", "--mount", "--uts", "--propagation",
            "slave", "bash", "-ec", boot, "_", str(self.root), node,
        )  # fmt: skip

    def kill_node(self, node: str) -> None:
        """A power cut: everything on the node is gone and nobody has been told."""
        for _ in range(3):
            for pid in self.processes_on(node):
                _signal(pid, signal.SIGKILL)

    def processes_on(self, node: str) -> list[int]:
        """Process ids of everything that runs on a node."""
        done = subprocess.run(
            ["ip", "netns", "pids", self._namespace(node)],
            capture_output=True,
            text=True,
            env=self.environment,
        )
        return [int(line) for line in done.stdout.split()]

    def fill_local_disk(self, node: str) -> None:
        """Leave no free byte on a node's own disk."""
        daemon = (self.root / f"slurmd-{node}.pid").read_text().strip()
        fill = f"dd if=/dev/zero of={self.local}/full bs=1M count={2 * _LOCAL_MIB} 2>/dev/null || true"
        subprocess.run(["nsenter", f"--mount=/proc/{daemon}/ns/mnt", "sh", "-c", fill], check=True)

    # -------- jobs

    def run(self, *command: object, check: bool = True) -> str:
        """A client command's output."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def nodes_of(self, number: str) -> list[str]:
        """Nodes on which a job runs."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def nodes_that_are(self, state: str) -> list[str]:
        """Nodes in a state; none while the controller does not answer."""
        return self.run("sinfo", "-h", "-N", "-t", state, "-o", "%N", check=False).split()

    def wait_for_end(self, number: str, timeout_s: float = 240) -> dict[str, str]:
        """The job in its end state."""
        wait_until(lambda: self.job(number)["JobState"] in ENDED, timeout_s, lambda: str(self.job(number)))
        return self.job(number)

    # -------- pieces

    def _namespace(self, node: str) -> str:
        return f"m1s{self.number}-{node}"

    def _write_configuration(self) -> None:
        for name in ("state", "spool", "local"):
            (self.root / name).mkdir(parents=True)
        net, host = f"10.99.{self.number}", os.uname().nodename.split(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={net}.{10 + index} CPUs=16 RealMemory=100000 State=UNKNOWN"
            for index, node in enumerate(self.nodes)
        ]
        (self.root / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                net=net,
                root=self.root,
                port=17000 + self.number,
                # without it the ranks of a dead step live on, which no site's do
                proctrack="cgroup" if os.access(_FREEZER / "cgroup.procs", os.W_OK) else "linuxproc",
                # numbers of another cluster's jobs would name the same cgroups
                first_job=_JOBS * self.number + 1,
                nodes="\n".join(nodes),
            )
        )
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = [f"{net}.1 {host}", *(f"{net}.{10 + index} {node}" for index, node in enumerate(self.nodes))]
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(hosts) + "\n")
        # a namespace reaches no name server: an empty file answers at once
        (self.root / "resolv.conf").write_text("")

    def _network_up(self) -> None:
        bridge, net = f"m1b{self.number}", f"10.99.{self.number}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index, node in enumerate(self.nodes):
            space, link = self._namespace(node), f"m1v{self.number}n{index}"
            _ip("netns", "add", space)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", link, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"{net}.{10 + index}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _daemon(self, *command: str) -> None:
        """Start what puts itself into the background; it must not inherit our pipes."""
        log = self.root / "daemons.log"
        with log.open("a") as sink:
            done = subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                start_new_session=True, timeout=60,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}\n{log.read_text()}")


def wait_until(condition: Callable[[], bool], timeout_s: float, describe: Callable[[], str] = str) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {describe()}")
        time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)


def _end(pid_file: Path) -> None:
    if pid_file.exists():
        pid = int(pid_file.read_text())
        _signal(pid, signal.SIGTERM)
        for _ in range(50):
            stat = Path(f"/proc/{pid}/stat")
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
            time.sleep(0.1)
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.stdin.read()
    Cluster(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).stop()

"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with GPUs that are only counted.

Each node is a host of its own: a network, a host name and a process tree that nothing survives when its first process is
killed, which is what a power cut is. The network lies inside the controller's, so neither the machine's network nor its
Slurm is touched, and several clusters can run at once. Where namespaces can't be made, both nodes share this host.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")
GPUS_PER_NODE = 4

_CONTROLLER = "controller"
_ADDRESSES = {_CONTROLLER: "10.77.0.254", "node1": "10.77.0.1", "node2": "10.77.0.2"}
# Killed with its parent, and everything below it with it: a test run that dies leaves nothing behind.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

_SLURM_CONF = """\
ClusterName=onecurve
SlurmctldHost={controller_name}({controller_address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
KillWait=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP
"""


def find_obstacle() -> str | None:
    """Why no cluster can be brought up here; None if it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm's daemons are tested on Linux only"
    missing = [name for name in PROGRAMS if _find_program(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None


def can_make_namespaces() -> bool:
    """Whether this user may make hosts of namespaces."""
    if any(_find_program(name) is None for name in ("unshare", "nsenter", "setpriv", "ip")):
        return False
    # A network device is what needs the most rights.
    script = "ip link add probe type veth peer name eborp && mount -t tmpfs none /mnt"
    return subprocess.run([*_NAMESPACES, "sh", "-c", script], capture_output=True, check=False).returncode == 0


def _find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Job:
    """What Slurm's controller says of a job."""

    state: str
    reason: str
    exit_code: int
    num_restarts: int
    nodes: str


def wait_until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Look ten times a second until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


@dataclass
class Cluster:
    """Two nodes of 16 cores and 4 GPUs each, as far as Slurm knows.

    Attributes:
        folder: of configuration, state and logs; its path must be short, for a socket lies in it.
        has_namespaces: each node is a host of its own, with its own ports; else both share this one.
        variables: added to the environment of every command and job.
    """

    folder: Path
    has_namespaces: bool
    variables: Mapping[str, str] = field(default_factory=dict)
    _hosts: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Start everything; stop it again by process id, whatever happens between."""
        try:
            self._configure()
            self._start_controller()
            for node in NODES:
                self.start_node(node)
            wait_until(lambda: self.node_states() == ["idle"] * len(NODES), "both nodes are idle", 30)
            yield self
        finally:
            if not self.has_namespaces and len(self._hosts) > 1:
                self._end_jobs()
            for name in reversed(list(self._hosts)):
                self.cut_power(name)

    # Slurm's commands ------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a command that talks to this cluster; nothing of a surrounding job is left in them."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, **self.variables, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, *words: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        return subprocess.run(
            [*self._entrance, *map(str, words)],
            env={**self.environment, **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def submit(
        self, *words: object, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> str:  # fmt: skip
        """`sbatch`; returns the job's number."""
        result = self.run("sbatch", "--parsable", *words, environment=environment, folder=folder)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, job_id: str) -> Job:
        """The job as the controller knows it."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id).stdout

        def find(key: str) -> str:
            match = re.search(rf" {key}=(\S*)", text)
            assert match is not None, f"job {job_id}: {text}"
            return match[1]

        return Job(
            state=find("JobState"),
            reason=find("Reason"),
            exit_code=int(find("ExitCode").partition(":")[0]),
            num_restarts=int(find("Restarts")),
            nodes=find("NodeList"),
        )

    def wait(self, job_id: str, *states: str, seconds: float = 240) -> Job:
        """Wait until the job is in one of the states; without any, until it has ended."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.job(job_id).state in wanted, f"job {job_id} is {' or '.join(wanted)}", seconds)
        return self.job(job_id)

    def node_states(self) -> list[str]:
        """The state of each node, in their order."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()

    # Hosts -----------------------------------------------------------------------------------------------------

    def start_node(self, name: str) -> None:
        """Switch a node on, unless it is."""
        if name in self._hosts:
            return
        slurmd = f"{_find_program('slurmd')} -D -N {name}"
        if self.has_namespaces:
            # The first process of the namespace outlives slurmd's children, and reaps them.
            self._start_host(name, f"{slurmd} & wait")
        else:
            self._start(name, slurmd.split())

    def cut_power(self, name: str) -> None:
        """Kill a host; in namespaces nothing that ran on it survives."""
        process = self._hosts.pop(name)
        if self.has_namespaces:
            # The system ends all that is left in a namespace before its first process is gone, and unshare waits for that.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            first = children.read_text(encoding="utf-8").split() if children.exists() else []
            for child in first:
                os.kill(int(child), signal.SIGKILL)
            if not first:
                process.kill()
        else:
            process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _end_jobs(self) -> None:
        """Jobs on a host that is not to die must be ended one by one."""
        self.run("scancel", "--user", getpass.getuser())
        wait_until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "all jobs are ended", 30)

    @property
    def _entrance(self) -> list[str]:
        """Words in front of a command that let it run in the controller's network."""
        return ["nsenter", "--net", "--target", str(self._hosts[_CONTROLLER].pid)] if self.has_namespaces else []

    def _start_controller(self) -> None:
        munged = (
            f"{_find_program('munged')} --foreground --force --key-file={self.folder}/munge.key "
            f"--socket={self.folder}/munge.sock --pid-file={self.folder}/munged.pid "
            f"--log-file={self.folder}/munged.log --seed-file={self.folder}/munged.seed"
        )
        slurmctld = f"{_find_program('slurmctld')} -D -c"
        socket_file = self.folder / "munge.sock"
        if self.has_namespaces:
            waits = f"until [ -S {socket_file} ]; do sleep 0.02; done"
            self._start_host(_CONTROLLER, f"{munged} & {waits}; {slurmctld} & wait")
        else:
            self._start("munged", munged.split())
            wait_until(socket_file.exists, "munged listens", 10)
            self._start(_CONTROLLER, slurmctld.split())

    def _start_host(self, name: str, script: str) -> None:
        """A host in namespaces: joined to the others by a bridge that lies in the controller's network."""
        script = (
            f"mount --bind {self.folder}/hosts /etc/hosts && hostname {name} && read -r _ && exec </dev/null; {script}"
        )
        host = self._start(name, [*_NAMESPACES, "sh", "-c", script], stdin=subprocess.PIPE)
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{host.pid}/ns/net") != own, f"{name} has a network", 10)
        controller, address = self._hosts[_CONTROLLER].pid, f"{_ADDRESSES[name]}/24"
        if name == _CONTROLLER:
            _run_ip(controller, "link add bridge type bridge")
            device = "bridge"
        else:
            # Called from the controller's network: that end stays there.
            _run_ip(controller, f"link add {name} type veth peer name eth0 netns {host.pid}")
            _run_ip(controller, f"link set {name} master bridge up")
            device = "eth0"
        _run_ip(host.pid, f"address add {address} dev {device}")
        _run_ip(host.pid, f"link set {device} up")
        _run_ip(host.pid, "link set lo up")
        assert host.stdin is not None
        host.stdin.write(b"go\n")
        host.stdin.close()

    def _start(
        self, name: str, words: Sequence[str], stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        with (self.folder / f"{name}.out").open("ab") as log:
            prefix = _DIE_WITH_PARENT if shutil.which("setpriv") else ()
            process = subprocess.Popen(
                [*prefix, *words], env=self.environment, stdin=stdin, stdout=log, stderr=log, start_new_session=True
            )
        self._hosts[name] = process
        return process

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = "".join(f"{address} {name}\n" for name, address in _ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        # A GPU is a file to Slurm, and any file of the right kind will do: nothing opens it.
        gpus = f"Name=gpu Type=fake File=/dev/tty[0-{GPUS_PER_NODE - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{len(NODES)}] {gpus}\n", encoding="utf-8")
        host, ports = socket.gethostname(), iter([16817, 17001, 17002])
        if not self.has_namespaces:
            ports = _find_free_ports(3)
        controller_port = next(ports)
        nodes = [
            f"NodeName={node} NodeAddr={_ADDRESSES[node] if self.has_namespaces else '127.0.0.1'} "
            f"NodeHostname={node if self.has_namespaces else host} Port={next(ports)} Sockets=1 CoresPerSocket=16 "
            f"ThreadsPerCore=1 RealMemory=12000 Gres=gpu:fake:{GPUS_PER_NODE} State=UNKNOWN"
            for node in NODES
        ]
        content = _SLURM_CONF.format(
            controller_name=_CONTROLLER if self.has_namespaces else host,
            controller_address=_ADDRESSES[_CONTROLLER] if self.has_namespaces else "127.0.0.1",
            controller_port=controller_port,
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(content, encoding="utf-8")


def _run_ip(pid: int, words: str) -> None:
    """`ip` in the network of a process."""
    subprocess.run(["nsenter", "--net", "--target", str(pid), "ip", *words.split()], check=True, capture_output=True)


def _find_free_ports(count: int) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [int(one.getsockname()[1]) for one in sockets]
    return iter(ports)

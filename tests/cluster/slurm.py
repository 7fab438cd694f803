"""A real Slurm on two machines of name spaces, with a controller on a third, and what tests ask of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.namespaces import Machine, boot, connect, make_switch, start, wait_until
from tests.conftest import PATIENCE, ROOT

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CORES = 2
_COMMAND = 300.0
_HEAD = "10.77.0.254"
_NODES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={lab}/munge/munge.sock,cred_expire=20
CredType=cred/munge
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=30
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=20
MinJobAge=3600
SwitchType=switch/none
TmpFS={lab}
NodeName=node1 NodeAddr=10.77.0.1 CPUs={cores} RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeAddr=10.77.0.2 CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=batch Nodes=node1,node2 Default=YES MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that is up."""

    head: Machine
    nodes: dict[str, Machine]
    lab: Path

    def run(
        self, *command: str, timeout: float = _COMMAND, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head node, from the project's directory."""
        done = subprocess.run(
            self.head.inside("timeout", "--kill-after=2", str(timeout), *command),
            cwd=ROOT,
            env={**clean_environment(), "SLURM_CONF": str(self.lab / "slurm.conf"), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit slurm/`script`; returns the job's number. What it prints goes to `output(job)`."""
        logs = self.lab / "jobs"
        options = (f"--output={logs}/%A_%a.out", "--open-mode=append", *options)
        return self.run("sbatch", "--parsable", *options, f"slurm/{script}", *arguments, **environment).stdout.strip()

    def output(self, job: str, task: int | None = None) -> str:
        """What a job has printed so far."""
        # Slurm writes this for the index of a job that has none.
        path = self.lab / "jobs" / f"{job}_{4294967294 if task is None else task}.out"
        return path.read_text() if path.exists() else ""

    def about(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job).stdout))

    def wait_for(self, job: str, *states: str, seconds: float) -> None:
        """Wait until a job is in one of these states; `RuntimeError` with what it printed if it is not in time."""
        try:
            wait_until(lambda: self.about(job)["JobState"] in states, seconds, f"job {job} to be {' or '.join(states)}")
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {self.about(job)}\n{self.output(job)}") from None

    def wait_for_output(self, job: str, pattern: str, seconds: float) -> None:
        """Wait until a job has printed something that matches."""
        try:
            wait_until(lambda: re.search(pattern, self.output(job)) is not None, seconds, f"{pattern!r} from job {job}")
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {self.about(job)}\n{self.output(job)}") from None

    def node_states(self) -> dict[str, str]:
        """The state of each node, such as idle."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").stdout.split("\n")
        return dict(tuple(line.split()) for line in lines if line)  # type: ignore[misc]

    def boot_node(self, name: str) -> None:
        """Start a node that is not running, and wait until it is ready for jobs."""
        configuration = self.lab / "slurm.conf"
        script = f"exec slurmd -D -f '{configuration}'"
        log = self.lab / "log" / name
        self.nodes[name] = boot(name, _NODES[name], script, log, self.lab / "hosts")
        connect(self.nodes[name], self.head)
        wait_until(lambda: self.node_states().get(name) == "idle", PATIENCE, f"{name} to be idle")


@contextmanager
def cluster(lab: Path) -> Iterator[Slurm]:
    """A Slurm whose files are in `lab`, an empty directory; afterwards nothing of it runs. Takes a few seconds."""
    for name in ("state", "node1", "node2", "log", "munge", "jobs"):
        (lab / name).mkdir()
    lab.chmod(0o711)
    munge = lab / "munge"
    munge.chmod(0o711)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    (lab / "slurm.conf").write_text(_CONFIGURATION.format(lab=lab, cores=CORES))
    (lab / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    names = {"localhost": "127.0.0.1", "head": _HEAD, **_NODES}
    (lab / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    files = {"socket": "munge.sock", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    with ExitStack() as running:
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        munged = start(["munged", "--foreground", "--force", *options], lab / "log" / "munged")
        running.callback(munged.wait)
        running.callback(munged.kill)
        wait_until((munge / "munge.sock").exists, PATIENCE, "munged")
        script = f"exec slurmctld -D -f '{lab / 'slurm.conf'}'"
        head = boot("head", _HEAD, script, lab / "log" / "head", lab / "hosts")
        running.callback(head.stop)
        make_switch(head)
        slurm = Slurm(head, {}, lab)
        wait_until(lambda: slurm.run("scontrol", "ping", check=False).returncode == 0, PATIENCE, "slurmctld")
        for name in _NODES:
            running.callback(lambda name=name: slurm.nodes[name].stop() if name in slurm.nodes else None)
            slurm.boot_node(name)
        yield slurm


def clean_environment() -> dict[str, str]:
    """This process' environment without what a launcher has told it."""
    told = ("PMI", "PMIX", "MPI_", "OMPI", "SLURM", "HYD", "SBATCH")
    return {name: value for name, value in os.environ.items() if not name.startswith(told)}

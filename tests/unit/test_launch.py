"""The launch scripts set threads and binding, and give back the program's outcome."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pnode_dist.system.compatibility import PETSC4PY_FLOOR
from tests.conftest import PATIENCE, ROOT
from tests.unit.launch_scripts import run_copy, stand_in

Run = Callable[..., subprocess.CompletedProcess[str]]
FAKE_VERSIONS = {
    "mpich": "HYDRA build details:",
    "openmpi": "mpiexec (Open MPI) 5.0.3",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.12",
}


def mpirun_command(tmp_path: Path, flavour: str, *arguments: str, **environment: str) -> str:
    """What mpirun.sh would run with an mpiexec of another flavour on the PATH."""
    stand_in(tmp_path, "mpiexec", f"echo '{FAKE_VERSIONS[flavour]}'")
    done = run_copy(tmp_path, "mpirun.sh", "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_rank_gets_one_thread_unless_told_otherwise(mpirun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = ("sh", "-c", "echo $OMP_NUM_THREADS $OPENBLAS_NUM_THREADS $MKL_NUM_THREADS")
    assert mpirun(2, *show).stdout.split("\n")[:2] == ["1 1 1", "1 1 1"]
    assert mpirun(1, *show, OMP_NUM_THREADS="2").stdout.split() == ["2", "2", "2"]


def test_mpich_binds_ranks_to_cores_of_their_own_where_there_are_enough(tmp_path: Path) -> None:
    assert "mpiexec -bind-to core:1 -n 1 true" in mpirun_command(tmp_path, "mpich", "-n", "1", "true")
    assert "-bind-to" not in mpirun_command(tmp_path, "mpich", "-n", "1000", "true")
    chosen = mpirun_command(tmp_path, "mpich", "-bind-to", "none", "-n", "1", "true")
    assert chosen.count("-bind-to") == 1


def test_ranks_of_mpich_that_share_cores_sleep_while_they_wait_unless_told_otherwise(tmp_path: Path) -> None:
    name = "MPIR_CVAR_ENABLE_HEAVY_YIELD"
    unset = {name: ""}
    assert name not in mpirun_command(tmp_path, "mpich", "-n", "1", "true", **unset)
    assert f"{name}=1 " in mpirun_command(tmp_path, "mpich", "-n", "1000", "true", **unset)
    assert f"{name}=0 " in mpirun_command(tmp_path, "mpich", "-n", "1000", "true", **{name: "0"})


def test_open_mpi_may_run_as_root_and_oversubscribe(tmp_path: Path) -> None:
    few = mpirun_command(tmp_path, "openmpi", "-n", "1", "true")
    many = mpirun_command(tmp_path, "openmpi", "-n", "1000", "true")
    assert ("--allow-run-as-root" in few) == (os.getuid() == 0)
    assert "--bind-to core" in few
    assert "--bind-to none --oversubscribe" in many


def test_intel_mpi_pins_by_itself_where_there_are_enough_cores(tmp_path: Path) -> None:
    def pinning(ranks: int, **environment: str) -> str:
        # Not a dry run: the mpiexec that stands in for Intel's prints what it is given.
        stand_in(tmp_path, "mpiexec", f"echo '{FAKE_VERSIONS['intel']}' $I_MPI_PIN $I_MPI_PIN_DOMAIN $*")
        return run_copy(tmp_path, "mpirun.sh", "-n", str(ranks), "true", **environment).stdout

    assert pinning(1).rstrip().endswith("2021.12 omp -n 1 true")
    assert pinning(1000).rstrip().endswith("2021.12 off omp -n 1000 true")
    assert pinning(1000, I_MPI_PIN="on").rstrip().endswith("2021.12 on omp -n 1000 true")


def test_ranks_of_a_slurm_job_are_bound_where_each_node_has_enough_cores(tmp_path: Path) -> None:
    assert "-bind-to core:1" in mpirun_command(tmp_path, "mpich", "-n", "8", "true", SLURM_JOB_NUM_NODES="8")


def test_the_number_of_ranks_is_found_behind_values_that_are_also_programs(tmp_path: Path) -> None:
    options = ("-launcher", "ls", "-genv", "NAME", "cat")
    assert "-bind-to" not in mpirun_command(tmp_path, "mpich", *options, "-n", "1000", "true")


def test_the_mpiexec_of_the_mpi_that_the_environment_was_built_on_comes_first(tmp_path: Path) -> None:
    built_on = tmp_path / "own mpi"
    built_on.mkdir()
    (built_on / "mpiexec").write_text(f"#!/bin/sh\necho '{FAKE_VERSIONS['openmpi']}'\n")
    (built_on / "mpiexec").chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".pnode-dist-mpi").write_text(f"{built_on}\n")
    assert "own\\ mpi/mpiexec" in mpirun_command(tmp_path, "mpich", "-n", "1", "true")


@pytest.mark.parametrize(
    ("flavour", "option"),
    [("mpich", "-hosts a:2,b:1"), ("openmpi", "--host a:2,b:1"), ("intel", "-machinefile {file}")],
)
def test_one_kind_of_host_file_serves_every_mpi(tmp_path: Path, flavour: str, option: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# the laboratory\na:2\n\nb\n")
    command = mpirun_command(tmp_path, flavour, "--hostfile", str(hosts), "-n", "3", "true").replace("\\,", ",")
    assert option.format(file=hosts) in command
    assert command.rstrip().endswith("-n 3 true")
    # Open MPI alone does not pass the environment on by itself.
    assert ("-x OMP_NUM_THREADS" in command) == (flavour == "openmpi")


def test_ranks_on_the_hosts_of_a_file_are_bound_where_each_host_has_enough_cores(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"host{number} slots=1\n" for number in range(100)))
    assert "-bind-to core:1" in mpirun_command(tmp_path, "mpich", "--hostfile", str(hosts), "-n", "100", "true")
    assert "-bind-to" not in mpirun_command(tmp_path, "mpich", "--hostfile", str(hosts), "-n", "100000", "true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a:none\n", "a: must have a number of ranks, 1 or more, and has 'none'"),
        ("a 2\n", "'a 2': must be HOST, HOST:RANKS or HOST slots=RANKS"),
    ],
)
def test_a_host_file_that_cannot_be_read_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    done = run_copy(tmp_path, "mpirun.sh", "--hostfile", str(tmp_path / "hosts"), "-n", "2", "true")
    assert (done.returncode, done.stderr) == (2, f"mpirun.sh: --hostfile {tmp_path / 'hosts'}: {message}\n")


def test_more_ranks_than_cores_are_allowed_and_said(tmp_path: Path) -> None:
    stand_in(tmp_path, "mpiexec", f"echo '{FAKE_VERSIONS['mpich']}'")
    few, many = (run_copy(tmp_path, "mpirun.sh", "--dry-run", "-n", ranks, "true") for ranks in ("1", "1000"))
    assert few.stderr == ""
    assert re.fullmatch(
        r"mpirun.sh: 1000 ranks of 1 thread\(s\) on \d+ core\(s\): they take turns, and nothing is bound\n", many.stderr
    )


def test_scratch_is_what_slurm_gives_before_the_temporary_directory(mpirun: Run) -> None:
    show = ("sh", "-c", "echo $TMPDIR")
    assert mpirun(1, *show, TMPDIR="/var/tmp").stdout.strip() == "/var/tmp"
    assert mpirun(1, *show, TMPDIR="/var/tmp", SLURM_TMPDIR="/tmp").stdout.strip() == "/tmp"


def test_the_programs_own_arguments_pass_through_untouched(tmp_path: Path) -> None:
    command = mpirun_command(tmp_path, "mpich", "-n", "1", "echo", "-n", "zero", "a b")
    assert command.rstrip().endswith("echo -n zero a\\ b")


def test_a_failing_rank_makes_the_launch_fail(mpirun: Run) -> None:
    assert mpirun(2, "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0", "true"], "mpirun.sh: -n 0: must be a number of ranks, 1 or more"),
        (["-n", "two", "true"], "mpirun.sh: -n two: must be a number of ranks, 1 or more"),
        (["-np", "1.5", "true"], "mpirun.sh: -np 1.5: must be a number of ranks, 1 or more"),
        ([], "mpirun.sh: nothing to run: launch/mpirun.sh -n RANKS PROGRAM [ARGUMENT...]"),
    ],
)
def test_wrong_usage_gets_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([str(ROOT / "launch/mpirun.sh"), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_a_wrong_number_of_threads_gets_one_line() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "many"}
    done = subprocess.run(
        [str(ROOT / "launch/mpirun.sh"), "-n", "1", "true"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "mpirun.sh: OMP_NUM_THREADS=many: must be a number of threads, 1 or more\n"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all_ranks(tmp_path: Path, ending: signal.Signals) -> None:
    program = "echo $$ > $1/pid.$$; exec sleep 100000"
    launcher = subprocess.Popen([str(ROOT / "launch/mpirun.sh"), "-n", "2", "sh", "-c", program, "sh", str(tmp_path)])
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("pid.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(path.suffix[1:]) for path in tmp_path.glob("pid.*")]
    assert len(ranks) == 2
    launcher.send_signal(ending)
    assert launcher.wait(timeout=PATIENCE) != 0
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline + PATIENCE:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what bootstrap.sh reads, in a folder with a blank in its name and without a .venv."""
    copy = tmp_path / "a copy"
    (copy / "launch").mkdir(parents=True)
    for name in ("pyproject.toml", "launch/bootstrap.sh", "launch/petsc_wheels.sh", "launch/constraints.txt"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def bootstrap(copy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(copy / "launch" / "bootstrap.sh"), *arguments],
        cwd=copy.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_bootstrap_refuses_what_it_does_not_know(copy: Path) -> None:
    for arguments, message in [
        (["--frobnicate"], "unknown argument '--frobnicate'"),
        (["--python"], "--python needs an interpreter"),
        (["--python", "/bin/false"], "'/bin/false' is not Python 3.11 or newer"),
        (["--system", "--compile"], "--compile: --system was given already: choose one"),
        (["--system", "--python", "python3"], "--python: --system uses Debian's /usr/bin/python3"),
        (["--prebuilt", "--use-system-mpi"], "--use-system-mpi: --prebuilt has an MPI of its own"),
    ]:
        done = bootstrap(copy, *arguments)
        assert done.returncode == 1
        assert message in done.stderr


def test_bootstrap_refuses_a_petsc_dir_that_does_not_fit(copy: Path) -> None:
    own = copy.parent / "petsc"
    include = own / "include"
    include.mkdir(parents=True)

    def refused() -> str:
        done = bootstrap(copy, PETSC_DIR="petsc", PETSC_ARCH="")
        assert done.returncode == 1
        return done.stderr.strip()

    assert refused() == f"bootstrap: PETSC_DIR={own} is not a PETSc: it has no include/petscversion.h"
    (include / "petscversion.h").write_text("#define PETSC_VERSION_MAJOR 3\n#define PETSC_VERSION_MINOR 9\n")
    assert refused() == f"bootstrap: PETSC_DIR={own}, PETSC_ARCH=: nothing is built in {own}"
    (include / "petscconf.h").write_text("#define PETSC_HAVE_MPIUNI 1\n")
    assert refused() == f"bootstrap: PETSC_DIR={own}: this PETSc was configured without MPI"
    (include / "petscconf.h").write_text("")
    assert refused() == f"bootstrap: PETSC_DIR={own} is PETSc 3.9; pnode_dist needs 3.22 or newer"


def test_bootstrap_refuses_a_petsc_of_ones_own_beside_a_ready_one(copy: Path) -> None:
    for way in ("--system", "--prebuilt"):
        done = bootstrap(copy, way, PETSC_DIR="petsc")
        assert (done.returncode, done.stderr) == (1, f"bootstrap: PETSC_DIR is set: {way} has a PETSc of its own\n")
        done = bootstrap(copy, way, PETSC_CONFIGURE_OPTIONS="--with-debugging=0")
        assert done.stderr == f"bootstrap: PETSC_CONFIGURE_OPTIONS is set: {way} configures no PETSc\n"


def test_bootstrap_refuses_the_prebuilt_wheel_for_an_older_python(copy: Path) -> None:
    stand_in(copy, "python3.11", "echo python3.11")
    done = bootstrap(copy, "--prebuilt", "--python", str(copy / "python3.11"))
    wanted = (
        f"--prebuilt: the wheel is for Python 3.12 or newer, and '{copy}/python3.11' is python3.11 (choose one with "
    )
    assert (done.returncode, done.stderr) == (1, f"bootstrap: {wanted}--python)\n")


@pytest.mark.parametrize(
    ("offered", "user", "message"),
    [
        ("3.18.1-1+b2", 0, "apt-get has petsc4py 3.18.1-1+b2, and 3.22 or newer is needed, as in Debian 13; leave "),
        ("(none)", 0, "apt-get has no package python3-petsc4py; Debian 13 has it"),
        ("3.22.4-1", 1, "as root, run: apt-get install --no-install-recommends python3-venv python3-petsc4py "),
    ],
)
def test_bootstrap_system_refuses_packages_that_do_not_serve(copy: Path, offered: str, user: int, message: str) -> None:
    programs = copy / "programs"
    programs.mkdir()
    stand_in(programs, "apt-get", f'echo "$*" >>"{copy}/ran"')
    stand_in(programs, "apt-cache", f"echo '  Candidate: {offered}'")
    stand_in(programs, "dpkg-query", "exit 1")
    stand_in(programs, "id", f"echo {user}")
    done = bootstrap(copy, "--system", PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"bootstrap: --system: {message}")
    ran = (copy / "ran").read_text().split() if user == 0 else []
    assert "install" not in ran


def test_bootstrap_says_which_way_it_takes_and_why(copy: Path) -> None:
    def said(*arguments: str) -> str:
        # An interpreter that imports no petsc4py, and has no module venv: nothing is installed.
        stand_in(copy, "python3", 'case "$*" in *version_info*) echo python3.12 ;; *) exit 1 ;; esac')
        done = bootstrap(copy, "--python", str(copy / "python3"), *arguments, PATH=f"{copy}:{os.environ['PATH']}")
        assert done.returncode == 1
        return done.stdout

    stand_in(copy, "id", "echo 1")
    assert re.search(r"compiling PETSc .*: \S.*python3 imports no petsc4py.*\n.* quicker: --system on ", said())
    assert re.search(r"^bootstrap: compiling PETSc .*: --compile says so$", said("--compile"), re.MULTILINE)
    assert re.search(r"^bootstrap: using the PETSc of the wheel dolfinx-solver-real==", said("--prebuilt"))


def test_bootstrap_asks_for_the_floor_that_the_package_checks() -> None:
    script = (ROOT / "launch" / "bootstrap.sh").read_text()
    assert f"\nfloor={'.'.join(map(str, PETSC4PY_FLOOR))} " in script


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "test.sh",
            ["--fast"],
            "unknown option '--fast' (known: --quick, --nightly, --ranks, --no-lint, --every-case, --image, ",
        ),
        ("test.sh", ["-k", "halo"], "unknown option '-k' (known: "),
        ("test.sh", ["--quick", "--nightly"], "--nightly: give --quick or --nightly, once"),
        ("test.sh", ["--ranks", "two"], "--ranks 'two': must be numbers of ranks, such as --ranks \"1 2\""),
        ("test.sh", ["--ranks"], "--ranks '': must be numbers of ranks"),
        ("nightly.sh", ["--fast"], "unknown argument '--fast' (known: --overwrite, --no-tests, --list, --help)"),
    ],
)
def test_the_scripts_that_run_tests_refuse_what_they_do_not_take(
    script: str, arguments: list[str], message: str
) -> None:
    done = subprocess.run([str(ROOT / "launch" / script), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: {message}")


@pytest.mark.parametrize("script", ["test.sh", "nightly.sh", "bootstrap.sh", "docs.sh"])
def test_help_is_the_text_at_the_top_of_a_script(script: str) -> None:
    path = ROOT / "launch" / script
    done = subprocess.run([str(path), "--help"], capture_output=True, text=True, check=True)
    comments = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()[1:])
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in comments]


def test_a_night_does_not_begin_where_results_would_be_lost(tmp_path: Path) -> None:
    (tmp_path / "runs" / "pendulum").mkdir(parents=True)
    (tmp_path / "README.md").write_text("```sh\nlaunch/demo.sh\n```\n")
    done = run_copy(tmp_path, "nightly.sh")
    assert done.returncode == 2
    assert done.stderr == (
        "nightly.sh: runs/ holds the results of earlier runs: move them away, or remove them with --overwrite\n"
    )
    assert (tmp_path / "runs" / "pendulum").exists()


def test_a_night_runs_on_after_a_command_that_fails_and_says_so_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("```sh\ntrue 1\nfalse 2\n```\n```console\nfalse 3\n```\n```sh\ntrue 4\n```\n")
    (tmp_path / "launch").mkdir()
    stand_in(tmp_path / "launch", "bootstrap.sh", "exit 0")
    done = run_copy(tmp_path, "nightly.sh", "--no-tests")
    assert done.returncode == 1
    assert re.findall(r"^(passed|FAILED \(1\)) +\d+ s  (.*)$", done.stdout, re.MULTILINE) == [
        ("passed", "true 1"),
        ("FAILED (1)", "false 2"),
        ("passed", "true 4"),
    ]
    assert done.stdout.endswith("1 of 3 commands failed, in 0 minutes\n")


def parts_of(directory: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The exit code of test.sh, the programs that it would run, and what it prints at the end."""
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    (directory / "launch").mkdir()
    stand_in(directory / "launch", "bootstrap.sh", "exit 0")
    for name, place in (("python", programs), ("ruff", programs), ("mypy", programs), ("lint-imports", programs)):
        stand_in(place, name, f'echo "{name} $*" >>"{directory}/ran"')
    stand_in(directory / "launch", "mpirun.sh", f'echo "$*" >>"{directory}/ran"')
    done = run_copy(directory, "test.sh", *arguments)
    ran = sorted(line.strip() for line in (directory / "ran").read_text().splitlines())
    return done.returncode, ran, done.stdout.rpartition("\n\n")[2]


def test_the_tiers_run_what_they_say(tmp_path: Path) -> None:
    lint = ["lint-imports --no-logo", "mypy", "ruff check .", "ruff format --check ."]
    slurm = "python -m pytest --some-cases -m cluster and not image tests/cluster"

    def ran(name: str, *arguments: str) -> list[str]:
        code, programs, said = parts_of(tmp_path / name, *arguments)
        assert code == 0
        verdicts = re.findall(r" passed in \d+ s \(\d+ s of processor time\)$", said, re.MULTILINE)
        assert len(verdicts) == len(programs)
        # The numbers of processes and of what is printed are of no interest.
        short = [re.sub(r"-n \d+ --dist worksteal --processor-times 15", "...", program) for program in programs]
        return [program for program in short if program not in lint or "--no-lint" in arguments]

    two, alone = ran("quick", "--quick")
    assert two.startswith("-n 2 python tests/mpi/run_rank.py --quick tests/mpi/test_adaptive.py ")
    assert alone.startswith("python -m pytest --quick -m not cluster --with-mpi ... tests/unit/ode ")
    several = [f"-n {ranks} python tests/mpi/run_rank.py --some-cases --alternate-cases tests/mpi" for ranks in (3, 4)]
    normal = ["-n 2 python tests/mpi/run_rank.py --some-cases", *several]
    normal.append("python -m pytest --some-cases -m not cluster --with-mpi ...")
    assert ran("normal") == sorted([*normal, slurm])
    image = (
        "python -m pytest --some-cases -m cluster tests/cluster/test_image.py::test_two_ranks_in_it_check_the_gradient"
    )
    assert ran("image", "--image") == sorted([*normal, slurm, image])
    assert ran("night", "--nightly") == sorted(
        [
            *(f"-n {ranks} python tests/mpi/run_rank.py --nightly" for ranks in (2, 3, 4)),
            "python -m pytest --nightly -m not cluster --with-mpi ...",
            "python -m pytest --nightly -m cluster and not image tests/cluster",
            "python -m pytest --nightly -m cluster and image tests/cluster --all-tests-in-image",
        ]
    )
    assert ran("some", "--no-lint", "--ranks", "2", "tests/mpi", "-k", "halo") == sorted(
        [
            "-n 2 python tests/mpi/run_rank.py tests/mpi -k halo",
            "python -m pytest -m not mpi and not cluster ... tests/mpi -k halo",
            "python -m pytest -m cluster tests/mpi -k halo",
        ]
    )

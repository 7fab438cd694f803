"""What a new user gets wrong: each is answered by one clear line and exit code 2, before anything is computed."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from pnode_dist.cli.main import main

WRONG_SETTINGS = {
    "a key that is misspelt": (
        "training.epocs=3",
        "--set training.epocs=3: [training] unknown key epocs (did you mean epochs?): must be one of epochs, optimiser",
    ),
    "a table that is misspelt": ("trainig.epochs=3", "unknown table [trainig] (did you mean [training]?): must be one"),
    "a negative number": ("training.epochs=-3", "[training] epochs = -3: must be an integer of at least 1"),
    "a fraction for a count": ("training.epochs=2.5", "[training] epochs = 2.5: must be an integer of at least 1"),
    "a word for a number": (
        "training.learning_rate=fast",
        '[training] learning_rate = "fast": must be a number greater',
    ),
    "an unknown optimiser": (
        "training.optimiser=lion",
        '[training] optimiser = "lion": must be adamw, sgd, or an import path',
    ),
    "momentum for AdamW": ("training.momentum=0.9", '[training] momentum = 0.9: must be 0 with optimiser = "adamw"'),
    "a momentum that only grows": (
        "training.momentum=1",
        "momentum = 1: must be a number of at least 0 and less",
    ),
    "an infinite number": ("training.learning_rate=inf", "= Infinity: must be a number greater than 0, and finite"),
    "a truth value for a number": ("run.seed=true", "[run] seed = true: must be an integer of at least 0"),
    "an unknown choice": ("training.dtype=float16", '[training] dtype = "float16": must be one of float32, float64'),
    "an unknown method": (
        "solver.method=rk5",
        '[solver] method = "rk5": must be one of euler, heun, midpoint, fehlberg2, rk3,',
    ),
    "jumps out of order": ("solver.jumps=[0.5,0.2]", "[solver] jumps = [0.5, 0.2]: must be increasing"),
    "a jump that never comes": ("solver.jumps=[inf]", "[solver] jumps[0] = Infinity: must be a number, and finite"),
    "a step of no length": ("solver.step_size=0", "[solver] step_size = 0: must be a number greater than 0"),
    "a size without a unit": (
        "trajectory.ram=64 parsecs",
        '[trajectory] ram = "64 parsecs": must be a number of bytes',
    ),
    "a negative size": ("trajectory.disk=-1", "[trajectory] disk = -1: must not be negative"),
    "an unknown backend": ("mesh.backend=ucx", '[mesh] backend = "ucx": must be one of mpi, gloo, nccl'),
    "an unknown problem": (
        "problem.type=graph",
        '[problem] type = "graph": unknown problem: must be one of burgers, field',
    ),
    "an unknown boundary": (
        'problem.boundary=["zero","wrap"]',
        '[problem] boundary[1] = "wrap": must be one of replicate, periodic, zero',
    ),
    "one boundary for two axes": (
        'problem.boundary=["zero"]',
        '[problem] boundary = ["zero"]: must be a list of 2 entries, each one of replicate, periodic, zero',
    ),
    "an even kernel": ("model.kernel_size=4", "[model] kernel_size = 4: must be odd"),
    "leads out of order": ("evaluation.leads=[3, 1]", "[evaluation] leads = [3, 1]: must be increasing"),
    "no leads": ("evaluation.leads=[]", "[evaluation] leads = []: must be a list of at least 1 entry"),
    "a name with a slash": ("run.name=a/b", '[run] name = "a/b": must be a plain file name'),
    "a PETSc option with its dash": ("solver.petsc_options.-ts_monitor=", "'-ts_monitor' must be the name of a PETSc"),
    "an override without a value": ("training.epochs", "--set training.epochs: must be section.key=value"),
    "an override without a section": ("epochs=3", "--set epochs=3: must be section.key=value"),
    "an override below a value": ("run.seed.x=3", "--set run.seed.x=3: run.seed is a value, not a table"),
    # These need the data set or the number of ranks.
    "a file that is not there": ("problem.path=nowhere.nc", "[problem] path = 'nowhere.nc': there is no such file"),
    "a variable that is not in the file": (
        "problem.variable=salinity",
        "[problem] variable = 'salinity': not in the file",
    ),
    "leads beyond the validation part": ("evaluation.leads=[40]", "[evaluation] leads = [40]: must be at most"),
    "a window beyond the training part": ("problem.window=40", "[problem] window = 40: must be at most"),
    "more state ranks than were started": ("mesh.state=3", "mesh: state = 3 times data = 1 is 3, but 1 rank(s) were"),
    "replicas that do not divide the ranks": ("mesh.data=2", "mesh: data = 2 does not divide the 1 ranks"),
    "a budget below one checkpoint": ("trajectory.ram=8", "too small for one checkpoint of"),
    "a solver that PETSc has but this does not": ("solver.petsc_options.ts_type=bdf", "ts_type"),
}

WRONG_COMMANDS = {
    "an unknown command": (["trian"], "unknown command 'trian' (did you mean train?): must be one of train, "),
    "a command like no other": (["xyz"], "unknown command 'xyz': must be one of train, "),
    "an unknown command of config": (["config", "int"], "unknown command 'int' (did you mean init?): must be one of "),
    "an unknown shell": (["completion", "bahs"], "unknown SHELL 'bahs' (did you mean bash?): must be one of bash, zsh"),
    "no configuration": (["train"], "the following arguments are required: CONFIG (see pnode-dist train --help)"),
    "an unknown option": (["methods", "--fast"], "unrecognized arguments: --fast (see pnode-dist methods --help)"),
    "an abbreviated option": (["methods", "--js"], "unrecognized arguments: --js (did you mean --json?) (see pnode-"),
    "a misspelt option": (
        ["train", "a.toml", "--overwrit"],
        "--overwrit (did you mean --overwrite?) (see pnode-dist t",
    ),
    "a misspelt option with a value": (["train", "a.toml", "--resme=auto"], "--resme=auto (did you mean --resume?)"),
    "an option before the command": (["--jsn", "methods"], "unrecognized arguments: --jsn (did you mean --json?)"),
    "an option without its value": (["train", "x.toml", "--set"], "argument --set: expected one argument"),
    "an unknown benchmark": (["bench", "halos"], "unknown name 'halos' (did you mean halo?): must be one of gradient"),
    "no problem to describe": (["config", "schema"], "the following arguments are required: KIND (see pnode-dist c"),
    "an unknown problem to describe": (
        ["config", "init", "burger"],
        "unknown problem (did you mean burgers?): must be",
    ),
    "a PETSc option without a dash": (["methods", "--", "ts_monitor"], "'ts_monitor' after --: must be a PETSc option"),
    "a configuration that is not there": (["train", "nowhere.toml"], "nowhere.toml: there is no such configuration"),
    "a directory for a configuration": (["train", "."], ".: cannot be read: Is a directory"),
    "a run directory that is not there": (
        ["evaluate", "nowhere"],
        "nowhere/config.toml: there is no such configuration",
    ),
    "a picture of a benchmark that has none": (
        ["bench", "gradient", "--plot", "speed.png"],
        "bench gradient --plot: has no picture: must be one of",
    ),
    "a benchmark on too few ranks": (["bench", "sync"], "bench sync needs 2 or more ranks: start it with"),
}

WRONG_FILES = {
    "not TOML": ("[run]\nname = \n", "not valid TOML: Invalid value (at line 2, column 8)"),
    "a key twice": ("[run]\nseed = 1\nseed = 2\n", "not valid TOML: Cannot overwrite a value (at line 3"),
    "not text": (b"\xff\xfe\x00", "not valid TOML: not a text in UTF-8"),
    "nothing": ("", "[problem] is missing (and 1 more)"),
    "a value for a table": (
        "training = 3\n[problem]\n",
        "[problem] path is missing: must be a string or a list of at least 1 entry, each a string (and 4 more)",
    ),
}


def complaint(argv, capfd, code=2):
    """Run a wrong command; the one line that it answered."""
    assert main([str(argument) for argument in argv]) == code
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("pnode-dist: error: ")
    return line.removeprefix("pnode-dist: error: ")


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(wrong, config_file, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    override, expected = WRONG_SETTINGS[wrong]

    assert expected in complaint(["train", config_file, "--set", override], capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", WRONG_COMMANDS)
def test_a_wrong_command_is_answered_by_what_is_allowed(wrong, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, expected = WRONG_COMMANDS[wrong]

    assert expected in complaint(argv, capfd)


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_file_that_is_no_configuration_is_named(wrong, tmp_path, capfd):
    content, expected = WRONG_FILES[wrong]
    path = tmp_path / "wrong.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    line = complaint(["train", path], capfd)

    assert line.startswith(f"{path}: ")
    assert expected in line


def test_a_wrong_key_in_the_file_is_reported_with_the_file(config_file, capfd):
    config_file.write_text(config_file.read_text() + "\n[evaluaton]\n")

    assert complaint(["train", config_file], capfd).startswith(
        f"{config_file}: unknown table [evaluaton] (did you mean [evaluation]?)"
    )


def test_a_run_directory_that_is_not_empty_is_refused(config_file, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    line = complaint(["train", config_file], capfd)

    assert line == f"run directory {tmp_path / 'run'}: is not empty: choose another with --run-dir, or --overwrite it"


def test_a_run_that_has_no_model_yet_is_not_evaluated(config_file, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config_file.read_text())

    line = complaint(["evaluate", tmp_path / "run"], capfd)

    assert line == f"{tmp_path / 'run' / 'model.pt'}: there is no such file: the run has not saved its model"


def test_a_model_of_another_size_is_not_evaluated(config_file, tmp_path, capfd):
    main(["train", str(config_file), "--set", "training.epochs=1"])
    capfd.readouterr()

    line = complaint(["evaluate", tmp_path / "run", "--set", "model.channels=3"], capfd)

    assert "in the configured model (3, " in line


def test_two_ranks_complain_once_and_both_end(config_file, mpirun):
    command = ["train", str(config_file), "--run-dir", str(config_file.parent)]

    ran = mpirun(2, sys.executable, "-m", "pnode_dist.cli.main", *command)

    assert ran.returncode == 2
    assert ran.stdout == ""
    # Open MPI's launcher reports the exit code as well.
    (line,) = [line for line in ran.stderr.splitlines() if "pnode" in line]
    assert line.startswith("pnode-dist: error: ")
    assert "is not empty" in line
    assert "Traceback" not in ran.stderr


def run_with_build(mpirun, config_file, body):
    """Run gradcheck on two ranks with a problem whose construction is `body`."""
    program = config_file.parent / "program.py"
    program.write_text(
        "import sys\n"
        "import pnode_dist.cli.ending as ending, pnode_dist.cli.main as cli\n"
        "import pnode_dist.train.run as training\n"
        "from pnode_dist import ConfigurationError\n"
        "ending._PATIENCE = 1.0\n"
        "def build(config, mesh, dtype, found):\n"
        + "".join(f"    {line}\n" for line in body)
        + "training.build_problem = build\n"
        f"sys.exit(cli.main(['gradcheck', {str(config_file)!r}]))\n"
    )
    return mpirun(2, sys.executable, str(program), PYTHONPATH=os.pathsep.join([str(Path.cwd()), *sys.path]))


def test_a_complaint_of_one_rank_ends_the_others_that_wait_for_it(config_file, mpirun):
    ran = run_with_build(
        mpirun, config_file, ["if mesh.rank == 1:", "    raise ConfigurationError('only here')", "mesh.barrier()"]
    )

    assert ran.returncode == 2
    assert f"[rank 1 on {socket.gethostname()}] pnode-dist: error: only here" in ran.stderr


def test_an_unexpected_error_of_one_rank_ends_all_with_its_traceback(config_file, mpirun):
    ran = run_with_build(mpirun, config_file, ["if mesh.rank == 1:", "    1 / 0", "mesh.barrier()"])

    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stderr
    assert "[rank 1 on " in ran.stderr

"""Problems of one's own, as source text: one that works, and what can be wrong with it."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
import numpy as np
import torch
from pnode_dist import DensePartition, ForecastProblem, ForecastTable, TrajectoryData


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, t, u):
        return -self.rate * u


class Own(ForecastProblem):
    """Learn the rate of an exponential decay."""

    class ProblemConfig(ForecastTable):
        size: int = 5
        """Entries of the state."""

    def build_partition(self):
        return DensePartition(self.mesh, self.settings.size)

    def load_data(self):
        times = 0.25 * np.arange(7)
        starts = np.linspace(1.0, 2.0, 4 * self.settings.size).reshape(4, 1, -1)
        return TrajectoryData(starts * np.exp(-times)[:, None], times)

    def build_right_hand_side(self):
        return Decay()
'''
TOML = """
[problem]
type = "./own.py:Own"
window = 2
validation = 1

[solver]
step_size = 0.125

[training]
epochs = 2
batch_size = 5
learning_rate = 0.05
dtype = "float64"

[evaluation]
leads = [1, 3]
"""


def written(directory: Path, source: str = SOURCE, toml: str = TOML) -> Path:
    """Write the problem and its configuration into a directory; the path of the configuration."""
    (directory / "own.py").write_text(source)
    path = directory / "own.toml"
    path.write_text(toml)
    return path


def changed(old: str, new: str) -> str:
    """The source with one part replaced."""
    assert old in SOURCE
    return SOURCE.replace(old, new)


_DATA = "return TrajectoryData(starts * np.exp(-times)[:, None], times)"
WRONG: dict[str, tuple[str, str, str]] = {
    "no such file": (
        SOURCE,
        TOML.replace("./own.py", "./owm.py"),
        r'type = "\./owm\.py:Own": there is no file .*owm\.py',
    ),
    "no such module": (
        SOURCE,
        TOML.replace("./own.py", "nowhere.own"),
        r"there is no module nowhere\.own: must be installed or on PYTHONPATH",
    ),
    "no such class": (SOURCE, TOML.replace(":Own", ":Onw"), r"has no Onw \(did you mean Own\?\)"),
    "a syntax error": (changed("def load_data(self):", "def load_data(self:"), TOML, r"own\.py:\d+: SyntaxError: "),
    "an error on import": (
        changed("import numpy as np", "import numpy as np\nimport not_there"),
        TOML,
        r"own\.py:3: ModuleNotFoundError: No module named 'not_there'",
    ),
    "a missing method": (
        changed("def build_right_hand_side(self)", "def right_hand_side(self)"),
        TOML,
        r"Own does not define build_right_hand_side",
    ),
    "no problem at all": (
        SOURCE,
        TOML.replace(":Own", ":Decay"),
        r"Decay is not a problem: must be a class derived from",
    ),
    "a configuration that is not pydantic": (
        changed("class ProblemConfig(ForecastTable)", "class ProblemConfig"),
        TOML,
        r"Own: the class for \[problem\] is .*ProblemConfig.*: must be a pydantic model",
    ),
    "an unknown key": (
        SOURCE,
        TOML.replace("window = 2", "windwo = 2"),
        r"unknown key windwo \(did you mean window\?\)",
    ),
    "a key of another type": (
        SOURCE,
        TOML.replace("window = 2", "size = 'x'"),
        r'\[problem\] size = "x": must be an integer',
    ),
    "no partition": (
        changed("return DensePartition(self.mesh, self.settings.size)", "return 5"),
        TOML,
        r"Own\.build_partition: returned int, not a partition",
    ),
    "a wrong shape": (
        changed(_DATA, "return TrajectoryData((starts * np.exp(-times)[:, None])[..., :-1], times)"),
        TOML,
        r"Own\.load_data: values has shape \(4, 7, 4\): must be \[time, \*state\] or .* state of \(5,\)",
    ),
    "data that are not numbers": (
        changed(_DATA, "return TrajectoryData(np.full((4, 7, 5), 'a'), times)"),
        TOML,
        r"Own\.load_data: values are of type <U1: must be real numbers",
    ),
    "not a number": (
        changed(_DATA, "starts[2, 0, 3] = np.nan; " + _DATA),
        TOML,
        r"Own\.load_data: 7 values are not finite, the first in trajectory 2 at time 0",
    ),
    "infinity though missing values are masked": (
        changed(_DATA, "starts[2, 0, 3] = np.inf; " + _DATA),
        TOML.replace("window = 2", 'window = 2\nmissing = "mask"'),
        r"Own\.load_data: 7 values are not finite",
    ),
    "times that go back": (
        changed(_DATA, _DATA.replace(", times)", ", times[::-1])")),
        TOML,
        r"Own\.load_data: times must increase: times\[1\] = 1\.25 comes after 1\.5",
    ),
    "too few times": (
        changed(_DATA, _DATA.replace(", times)", ", times[1:])")),
        TOML,
        r"Own\.load_data: there are 6 times: must be 7",
    ),
    "nothing of the kind": (
        changed(_DATA, "return {}"),
        TOML,
        r"Own\.load_data: returned dict: must be a TrajectoryData",
    ),
    "no trajectory": (changed(_DATA, "yield from ()"), TOML, r"Own\.load_data: gave no trajectory"),
    "an error in load_data": (
        changed(_DATA, "return np.load('nothing.npy')"),
        TOML,
        r"own\.py:\d+: FileNotFoundError: .*nothing\.npy.* \(while Own is built; --traceback shows the calls\)",
    ),
    "an error in f": (
        changed("return -self.rate * u", "return u @ torch.ones(7, 7, dtype=u.dtype)"),
        TOML,
        r"own\.py:\d+: RuntimeError: .* \(in the loss of the first batch; --traceback shows the calls\)",
    ),
    "another shape of f": (
        changed("return -self.rate * u", "return -self.rate * u[..., :-1]"),
        TOML,
        r"Own: ValueError: func returned shape",
    ),
    "a method of an earlier version": (
        changed(
            "    def build_right_hand_side(self)",
            "    def write(self):\n        pass\n\n    def build_right_hand_side(self)",
        ),
        TOML,
        r"Own\.write: is not called: must be variables\(batch\) for further variables of the file, or create_file",
    ),
    "figures of an earlier version": (
        changed(
            "    def build_partition(self)",
            "    def figures(self, forecast, batch):\n        pass\n\n    def build_partition(self)",
        ),
        TOML,
        r"Own\.figures: must take self and batch: a figure of forecasts is an object with methods add",
    ),
    "nothing to learn": (
        changed("torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))", "0.3"),
        TOML,
        r"Own\.build_right_hand_side: there is no parameter to learn",
    ),
    "nothing to call": (
        changed("return Decay()", "return 5"),
        TOML,
        r"Own\.build_right_hand_side: returned int, which",
    ),
    "a window that is too long": (
        SOURCE,
        TOML.replace("window = 2", "window = 7"),
        r"\[problem\] window = 7: must be at most 6",
    ),
    "leads that are too long": (
        SOURCE,
        TOML.replace("[1, 3]", "[1, 9]"),
        r"\[evaluation\] leads = \[1, 9\]: must be at most 6",
    ),
    "nothing left to learn from": (
        SOURCE,
        TOML.replace("validation = 1", "validation = 4"),
        r"\[problem\] validation = 4: must be at most 3, which leaves 1 of the 4 trajectories to learn from",
    ),
    "an optimiser that is none": (
        SOURCE,
        TOML.replace("batch_size = 5", 'optimiser = "torch.nn.Linear"'),
        r"optimiser = \"torch\.nn\.Linear\": must be a subclass of torch's Optimizer",
    ),
    "an option that the optimiser does not take": (
        SOURCE,
        TOML.replace("batch_size = 5", 'optimiser = "torch.optim.Adam"\noptimiser_options = { betta = 1 }'),
        r'optimiser = "torch\.optim\.Adam" with optimiser_options: .*betta',
    ),
}
"""What is wrong, the source, the configuration, and the one line that says so."""

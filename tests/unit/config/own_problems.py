"""Problems of a user's own, as files."""

from __future__ import annotations

from pathlib import Path

FORECAST = """
from pnode_dist import ForecastProblem, ForecastTable, ModelTable


class Decay(ForecastProblem):
    \"\"\"Learn a decay.\"\"\"

    class ProblemConfig(ForecastTable):
        points: int = 4
        \"\"\"Points of the state.\"\"\"

    class ModelConfig(ModelTable):
        width: int
        \"\"\"Units of the hidden layer.\"\"\"

    def build_partition(self): ...

    def load_data(self): ...

    def build_right_hand_side(self): ...
"""
PLAIN = """
import pydantic
from pnode_dist import ForecastProblem


class Plain(ForecastProblem):
    class ProblemConfig(pydantic.BaseModel):
        points: int = 4

    def build_partition(self): ...

    def load_data(self): ...

    def build_right_hand_side(self): ...
"""
TABLES = """
[problem]
type = "{kind}"
[model]
width = 3
[training]
epochs = 1
"""


def written(path: Path, text: str) -> Path:
    """The file with its text, in a folder that is there now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

"""One evaluation of a served model as a job of its own, which others start for each request.

    mpiexec -n RANKS python -m pnode_dist.bench.serve_once CONFIG MODEL INPUT

INPUT is a JSON list of vectors. Prints the output as JSON on rank 0.
"""

from __future__ import annotations

import json
import sys

import torch

from pnode_dist.train.configured import configured
from pnode_dist.train.run import build_problem, mesh_of


def main(source: str, name: str, text: str) -> None:
    """Evaluate a model of a configuration once. Collective on the world."""
    config, found = configured(source, ())
    inputs = [torch.tensor(vector, dtype=torch.float64) for vector in json.loads(text)]
    with mesh_of(config) as mesh:
        models = {model.name: model for model in build_problem(config, mesh, found=found).served()}
        output = models[name].evaluate(inputs, {})
        if mesh.is_root:
            print(json.dumps([vector.tolist() for vector in output]))


if __name__ == "__main__":
    main(*sys.argv[1:])

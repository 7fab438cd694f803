#!/usr/bin/env bash
# The main job on two ranks: check the gradient, learn to forecast the temperature of the tropical ocean, and draw how well it does.
#
#   launch/demo.sh [--set SECTION.KEY=VALUE ...]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
launch/bootstrap.sh
launch/mpirun.sh -n 2 pnode-dist gradcheck launch/configs/sea_surface.toml
launch/mpirun.sh -n 2 pnode-dist train launch/configs/sea_surface.toml --overwrite "$@"
launch/mpirun.sh -n 2 pnode-dist evaluate runs/sea_surface
printf 'The forecast is in runs/sea_surface/forecast.h5, the picture in runs/sea_surface/report.png\n'

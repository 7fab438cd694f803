#!/usr/bin/env bash
# Checks this package on a GPU, in less than 8 minutes: gradients against the CPU, times beside plain torch and
# torchdiffeq (if installed), peak memory against the budget, and halos of two ranks that share the GPU.
#
#   launch/gpu_check.sh [--device cuda|cpu]
#
# --device cpu  run the same checks on the CPU
# Needs torch with CUDA, mpi4py, petsc4py and h5py for the `python` on the PATH, or in .venv; the package itself need not
# be installed. Each check prints a line "ok NAME FIGURE" or "FAILED NAME FIGURE". Exit code 1 if one failed, 2 for a
# wrong argument, 3 without a CUDA device.
set -euo pipefail
arguments=("$@")
set --
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set -- "${arguments[@]}"

device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --device)
            device=${2-}
            case $device in cuda | cpu) ;; *) fail "--device '$device': must be cuda or cpu" ;; esac
            shift 2
            ;;
        *) fail "unknown argument '$1' (known: --device, --help)" ;;
    esac
done

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
for module in torch mpi4py petsc4py h5py; do
    python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
        fail "python has no $module"
done
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "torch finds no CUDA device: run this on a machine with a GPU, or with --device cpu"
    exit 3
fi

check=$root/launch/gpu_check.py status=0
timeout -k 5 200 python "$check" one "$device" || status=1
# On the CPU, freed tensors go back to the system, so that resident memory is that of tensors in use.
MALLOC_MMAP_THRESHOLD_=131072 timeout -k 5 120 python "$check" memory "$device" || status=1
timeout -k 5 150 "$root/launch/mpirun.sh" -n 2 python "$check" two "$device" || status=1
if [ $status = 0 ]; then echo "all checks passed on $device"; else echo "some checks FAILED on $device"; fi
exit $status

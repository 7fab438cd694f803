"""Comparison with other solvers, `pnode-dist bench peers`.

Each solver computes every case in a process of its own: `torch_worker` those that are written in torch, `jax_worker`
diffrax, in an environment that `environment` makes. `cases` defines the cases in NumPy, so that all solve the same
problems from the same numbers. `run` calls the processes in turn on one core and compares times, values and gradients.
"""

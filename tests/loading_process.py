"""One of two processes that load a checkpoint together; not a test by itself.

Each has four devices of a mesh of eight. Writes what it read, and which part of the
result its devices hold, for the test to compare.
"""

import json
import sys

import jax
import numpy as np
from counting import Counting
from jax.sharding import PartitionSpec as P

RULES = {"rows": P(("data", "model")), "columns": P(None, "data"), ".*": P()}


def main(number, port, path, out):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    from jaxmerge import load_sharded, open_checkpoint

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    checkpoint = Counting(open_checkpoint(path))
    params = load_sharded(checkpoint, mesh, RULES, dtype="float32")
    held = {
        f"{name}|{_bounds(shard.index)}": np.asarray(shard.data)
        for name, array in params.items()
        for shard in array.addressable_shards
    }
    np.savez(f"{out}/{number}.npz", **held)
    with open(f"{out}/{number}.json", "w") as file:
        json.dump(checkpoint.nbytes, file)


def _bounds(index):
    return json.dumps([(part.start or 0, part.stop or -1) for part in index])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

"""Strict settings for every test: many devices, no silent broadcasts."""

import gc
import os

# Only jax's own flag reaches the processes that tests start themselves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Simulated devices that wait for each other must not use up all threads.
os.environ.setdefault("NPROC", "32")
# Threads of LAPACK that wait for each other are slow beside another busy process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

# Most of the time of the tests is compilation, which these settings halve. XLA refuses
# flags that it does not know, as newer versions do the second one.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# Traces are many objects, and looking for cycles among them takes a tenth of the time.
gc.set_threshold(200_000, 50, 100)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def compiled_code_is_dropped():
    """The system limits how many pieces of code a process has in memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def optimised():
    """Compiles as users do, where single bits matter."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def compilations():
    """Grows by one entry with everything that is compiled."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(
    params=[jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit],
    ids=["auto", "explicit"],
)
def mesh(request):
    """A mesh of 4 x 2 devices, in both ways that JAX can treat its axes."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh

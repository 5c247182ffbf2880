"""A cache of compiled programs, so that a restarted job compiles nothing."""

import os

import jax

from atebm_jax.names import check_utf8
from atebm_jax.storage import in_bucket, reached

FOLDER = "compilation_cache"


def use_cache(choice: str, workdir: str) -> None:
    """Sets JAX's persistent compilation cache, for the whole process.

    The first process writes and all read, so several hosts share a folder that all of
    them see. An entry serves only the same program, versions and kind of device. One
    that cannot be read is compiled again, with a warning.

    Args:
      choice: "workdir" for a folder in the workdir, unless JAX's own variable names
        one; "off"; or a path, local or in a bucket.
      workdir: of the job.

    Raises:
      UserError: a path of an unknown kind, or one that JAX cannot open.
    """
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if choice == "workdir" and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    in_workdir = reached(workdir) / FOLDER
    folder = in_workdir if choice == "workdir" else reached(choice)
    check_utf8("workdir" if choice == "workdir" else "--compilation_cache", folder)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    if not in_bucket(folder):
        # Also small programs, of which a job has dozens. In a bucket each would cost
        # more than it saves; JAX's own limit of a second stays there.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

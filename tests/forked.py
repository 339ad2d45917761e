"""Scripts in processes of their own, which need not import TensorFlow anew.

The import takes seconds, most of what a short script costs. The fork server of `multiprocessing`
has imported it and computed nothing. Each script is a fork of that, with arguments, environment,
folder and `__main__` of its own, as if Python had just been started; but the backend is that of
the tests.
"""

import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from keras_norm import quiet

# Nothing that reads, when it is imported, what the environment of a script may say otherwise, as
# tensorflow-datasets does.
IMPORTED = [
    "keras",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "keras_norm.callbacks",
    "keras_norm.layers",
    "keras_norm.models",
    "keras_norm.optimizers",
    "keras_norm.plotting",
    "keras_norm.recipes",
]


def run(script, *arguments, cwd=None, timeout=600, **environment):
    """`python script arguments…` to its end, with `environment` beside that of this process.

    Returns:
        `subprocess.CompletedProcess` with what it printed.
    """
    command = [str(script), *map(str, arguments)]
    environment = {**os.environ, **environment}
    if sys.platform != "linux":
        return subprocess.run(
            [sys.executable, *command],
            env=environment,
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with quiet.without_native_messages():
        multiprocessing.forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_script, args=(command, environment, cwd, paths))
        process.start()
        process.join(timeout)
        late = process.exitcode is None
        if late:
            process.kill()
            process.join()
        said = [Path(path).read_text() if os.path.exists(path) else "" for path in paths]
    if late:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, process.exitcode, *said)


def _script(command, environment, cwd, paths):
    """The life of a script, in its process."""
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv[:] = command
    sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
    runpy.run_path(command[0], run_name="__main__")

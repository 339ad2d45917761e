"""Hides TensorFlow's start-up messages; for scripts, not for the library.

While TensorFlow's libraries are being imported, they write notes about the processor and missing
GPU drivers directly to the process's error stream, which `TF_CPP_MIN_LOG_LEVEL` does not prevent.
A script calls `start()` before it imports Keras. The layers never do: each program decides for
itself what it prints.
"""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator

__all__ = ["start", "without_native_messages"]


def start() -> None:
    """Imports Keras and its backend without their start-up messages.

    Sets `TF_CPP_MIN_LOG_LEVEL` to 3 (errors in operations still raise Python exceptions), unless
    the environment already has a value: then that value decides, and nothing is hidden. If the
    import fails, the hidden messages are printed. The imported objects stay until the program
    ends, so `gc.freeze` excludes them from garbage collection, which runs each time that a script
    drops a model.

    Example:
        >>> start()
    """
    hidden = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") >= "2"
    with without_native_messages() if hidden else contextlib.nullcontext():
        import keras

        keras.ops.zeros(())  # the first operation looks for devices and prints messages
    gc.freeze()


@contextlib.contextmanager
def without_native_messages() -> Iterator[None]:
    """Holds back what compiled code writes to file descriptor 2; prints it if the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(stderr, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)

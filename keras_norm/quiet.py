"""Keeps the start-up chatter of TensorFlow off the screen; for scripts, not for the library.

TensorFlow's libraries write notes about the processor and missing GPU drivers straight to the
process's error stream while they are being imported; `TF_CPP_MIN_LOG_LEVEL` does not reach them.
A script calls `start()` before it imports Keras. The layers never do: what a program prints is
the program's business.
"""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator

__all__ = ["start", "without_native_messages"]


def start() -> None:
    """Imports Keras and its backend without their start-up notes.

    Sets `TF_CPP_MIN_LOG_LEVEL` to 3 (errors of the operations still raise Python exceptions),
    unless the environment has a value already: then that value decides, and nothing is hidden.
    If the import fails, what was held back is printed. What was imported stays to the end: the
    garbage collector is told to pass over it (`gc.freeze`), for it looks at everything else each
    time that a script lets go of a model.

    Example:
        >>> start()
    """
    hidden = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") >= "2"
    with without_native_messages() if hidden else contextlib.nullcontext():
        import keras

        keras.ops.zeros(())  # the first operation looks for devices, and says so
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

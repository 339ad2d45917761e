"""Examples for one operation on a model, and where their activations wait.

`Sample` draws examples from arrays or streams and hands them out as chunks of equal size, as often
as they are needed. `Store` keeps what has been computed of them in memory and then on disk, within
budgets.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_norm._arrays import is_real
from keras_norm._layerwise_plan import graph_of

__all__ = [
    "Chunk",
    "Kept",
    "Sample",
    "Store",
    "as_numpy",
    "describe",
    "is_array",
    "is_structure",
    "with_declared_shapes",
]

Array = Any
Environment = dict[int, tuple[Array, Array | None]]  # value number -> (value, its mask)
Shape = tuple[int | None, ...]


# The sample ----------------------------------------------------------------------------------


def is_array(x: Any) -> bool:
    """Whether this is an array or a tensor, of whatever library."""
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def as_numpy(x: Any) -> Any:
    """As a NumPy array; what reads from a file as it is indexed (h5py, memory maps) stays."""
    if isinstance(x, np.ndarray) or not (ops.is_tensor(x) or isinstance(x, (list, tuple))):
        return x if is_array(x) else np.asarray(x)
    return np.asarray(ops.convert_to_numpy(x)) if ops.is_tensor(x) else np.asarray(x)


def describe(data: Any) -> str:
    """A name for data that was given none."""
    leaves = [x for x in tree.flatten(data) if is_array(x)] if is_structure(data) else []
    if leaves:
        return f"array {tuple(leaves[0].shape)}"
    return str(getattr(data, "name", None) or type(data).__name__)


def some_of(shapes: Sequence[Any]) -> str:
    return f"{list(shapes[:4])}{' and so on' if len(shapes) > 4 else ''}"


def is_structure(data: Any) -> bool:
    """Whether these are arrays, or nested lists, tuples and dicts of them: no stream.

    A list of tuples is a stream, too: of batches (x, y).
    """
    if isinstance(data, list) and data and all(isinstance(part, tuple) for part in data):
        return False
    if isinstance(data, (tuple, list, dict)):
        return all(x is None or is_array(x) or np.isscalar(x) for x in tree.flatten(data))
    return is_array(data)


def with_declared_shapes(model: Any, x: Any) -> list[tuple[Array, Shape | None]]:
    """Each array in x, and the shape of the model's input that it goes to.

    None where it is not known: the model is code, or x has another number of arrays.
    """
    graph = graph_of(model)
    inputs = [] if graph is None else graph.inputs
    if inputs and isinstance(x, dict):
        named = graph.input if isinstance(graph.input, dict) else {v.name: v for v in inputs}
        if all(isinstance(v, keras.KerasTensor) and is_array(x.get(k)) for k, v in named.items()):
            return [(x[k], tuple(v.shape)) for k, v in named.items()]
    leaves = tree.flatten(x)
    if len(leaves) != len(inputs):
        return [(v, None) for v in leaves]
    return [(v, tuple(wanted.shape)) for v, wanted in zip(leaves, inputs, strict=True)]


def _fits(shape: Shape, declared: Shape, sized: bool) -> bool:
    """Whether a model takes arrays of this shape; Keras adds and drops a last axis of size 1.

    But what ends in such an axis lacks another: (H, W, 1) is one example for (N, H, W, 1), where
    Keras takes it for H of them.
    """
    missing = len(declared) - len(shape)
    if missing == 1 and len(shape) > 1 and shape[-1] == 1 and declared[-2] != 1:
        return False
    added = {0: 1, 1: declared[-1], -1: shape[-1]}.get(missing)
    sizes, known = (s[:-1] if s[-1] == 1 else s for s in (shape, declared))
    same = all(n in (None, m) for m, n in zip(sizes[1:], known[1:], strict=False))
    return added == 1 and (same or not sized)


def _check_shapes(model: Any, x: Any, streams: bool) -> None:
    """Refuses what the model does not take, before anything runs.

    A Sequential model takes all the sizes that its layers take.
    """
    sized = not isinstance(model, keras.Sequential)
    for array, declared in with_declared_shapes(model, x):
        shape = tuple(np.shape(array))
        if not declared or _fits(shape, declared, sized):
            continue
        if len(shape) >= len(declared):
            remedy = "Pass what `model.predict` takes."
        elif streams:
            remedy = "The data set must be batched."
        else:
            remedy = "Add the axis: x[None] is one example, x[..., None] has one channel."
        raise ValueError(
            "Inputs must have the shape that the model was made for, with the examples along "
            f"axis 0. Received: an array of shape {shape} for {declared}. {remedy}"
        )


def _batches(data: Any, seed: int) -> Iterator[Any]:
    """The inputs of a stream, batch by batch; labels and sample weights left out."""
    if isinstance(data, keras.utils.PyDataset):
        source, number = data, data.num_batches
        order: Iterable[int] = itertools.count()
        if number is not None:  # any batches will do, but not only those of the first class
            order = np.random.default_rng(seed).permutation(int(number)).tolist()
        data = (source[i] for i in order)
    elif not hasattr(data, "__iter__"):
        raise ValueError(
            "`data` must be arrays (x or (x, y)), a keras.utils.PyDataset, a tf.data.Dataset, a "
            f"data loader or a generator of batches. Received: data of type {type(data).__name__}."
        )
    for batch in data:
        yield tree.map_structure(as_numpy, keras.utils.unpack_x_y_sample_weight(batch)[0])


class Sample:
    """The examples that were drawn, in blocks, as often as they are needed."""

    def __init__(
        self,
        data: Any,
        samples: int | None,
        batch_size: int,
        seed: int,
        store: Store | None,
        model: Any,  # which is to take them
        shuffled: bool = False,  # whether arrays of no more than `samples` are, too
    ):
        self.batch_size, self.limit = batch_size, samples
        self._store, self._model = store, model
        self._blocks: list[tuple[int, Callable[[], Any]]] = []  # rows, and how to get them
        self.rows = 0
        self.streams = not is_structure(data)
        if not self.streams:
            self._stream: Iterator[Any] = iter(())
            self._cut_arrays(data, seed, shuffled)
        else:
            self._stream = self._cut_stream(_batches(data, seed))

    def _cut_arrays(self, data: Any, seed: int, shuffled: bool) -> None:
        known = getattr(self._model, "inputs", None)
        inputs = None if known is None else len(tree.flatten(known))
        x = keras.utils.unpack_x_y_sample_weight(data)[0] if isinstance(data, tuple) else data
        x = tree.map_structure(as_numpy, x[0] if isinstance(x, list) and len(x) == 1 else x)
        leaves = tree.flatten(x)
        single = isinstance(x, list) and inputs == 1
        lengths = {len(v) if np.ndim(v) else 0 for v in leaves}
        if not all(np.ndim(v) for v in leaves) or (single and len(lengths) == 1):
            raise ValueError(
                "Examples must be arrays with the examples along axis 0; a list is several inputs. "
                f"Received: {len(leaves)} of shapes {[np.shape(v) for v in leaves[:3]]} and so on, "
                "for a model with one input. Pass one array (np.array, np.concatenate), "
                "or an iterator over batches, iter(batches)."
            )
        if isinstance(data, tuple) and inputs is not None and len(leaves) < inputs:
            raise ValueError(
                "A tuple is (x, y); several inputs are a list or a dict. Received: a tuple with "
                f"{len(leaves)} array in the place of x, for a model with {inputs} inputs. Pass "
                "[x1, x2], or ([x1, x2], y)."
            )
        if len(lengths) != 1:
            raise ValueError(
                "All inputs must have the same number of examples. Received: arrays of lengths "
                f"{sorted(lengths)}. Labels go into a tuple, (x, y); a list is several inputs."
            )
        _check_shapes(self._model, x, streams=False)
        total = lengths.pop()
        rows = total if self.limit is None else min(total, self.limit)
        order = None
        if rows < total or shuffled:  # a random part: the first rows may all be of one class
            order = np.random.default_rng(seed).permutation(total)[:rows]
        pieces = max(1, math.ceil(rows / self.batch_size))
        size = math.ceil(rows / pieces)
        for start in range(0, rows, max(1, size)):
            stop = min(start + size, rows)
            part: Any = slice(start, stop) if order is None else np.sort(order[start:stop])
            self._blocks.append((stop - start, functools.partial(_rows_of, x, part)))
        self.rows = rows

    def _cut_stream(self, batches: Iterator[Any]) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Blocks of exactly `batch_size` rows, whatever sizes come in; the last may be shorter."""
        waiting: list[Any] = []
        rows = 0
        for batch in batches:
            shapes = [np.shape(v) for v in tree.flatten(batch)]
            lengths = {shape[0] if shape else 0 for shape in shapes}
            if len(lengths) != 1 or () in shapes:
                raise ValueError(
                    "All inputs in a batch must have the same number of examples, along axis 0. "
                    f"Received: arrays of shapes {some_of(shapes)}. The data set must be batched."
                )
            _check_shapes(self._model, batch, streams=True)
            waiting.append(batch)
            rows += lengths.pop()
            while rows >= self.batch_size:
                whole = joined(waiting)
                yield self._keep(whole, slice(0, self.batch_size))
                rows -= self.batch_size
                waiting = [_rows_of(whole, slice(self.batch_size, None))] if rows else []
        if rows:
            whole = joined(waiting)
            yield self._keep(whole, slice(0, rows))

    def _keep(self, whole: Any, part: slice) -> tuple[int, Callable[[], Any]]:
        block = tree.map_structure(np.ascontiguousarray, _rows_of(whole, part))
        flat = tree.flatten(block)
        if self._store is None:
            return len(flat[0]), lambda: block
        kept = self._store.put({i: (v, None) for i, v in enumerate(flat)})
        if kept is None:
            raise ValueError(
                "The examples of a stream are held while their statistics are taken, and must fit "
                f"into the budget. Received: {self.rows} examples so far, memory="
                f"{self._store.memory}, disk={self._store.disk}. Raise one, or lower `samples`."
            )

        def get() -> Any:
            values = kept.get()
            return tree.pack_sequence_as(block_structure, [values[i][0] for i in values])

        block_structure = tree.map_structure(lambda _: 0, block)
        return len(flat[0]), get

    def take(self, rows: int | None) -> list[Chunk]:
        """The first `rows` examples, or as many as there are, as chunks of equal size."""
        wanted = math.inf if rows is None else rows
        if self.limit is not None:
            wanted = min(wanted, self.limit)
        while self.rows < wanted and (block := next(self._stream, None)) is not None:
            self._blocks.append(block)
            self.rows += block[0]
        chunks: list[Chunk] = []
        size = max((n for n, _ in self._blocks), default=0)
        taken = 0
        for n, get in self._blocks:
            if taken >= wanted:
                break
            use = int(min(n, wanted - taken))
            chunks.append(Chunk(use, size, get))
            taken += use
        if not taken:
            raise nothing_came()
        return [Chunk(taken, taken, chunks[0].raw)] if len(chunks) == 1 else chunks

    def once(self) -> Iterator[Chunk]:
        """All examples as chunks, for one pass: what has been passed is forgotten."""
        left = math.inf if self.limit is None else self.limit
        for n, get in itertools.chain(self._blocks, self._stream):
            use = int(min(n, left))
            if use:
                yield Chunk(use, use, get)
            left -= use
            if not left:
                break


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one, along axis 0."""
    shapes = [[np.shape(v)[1:] for v in tree.flatten(batch)] for batch in batches]
    if other := next((s for s in shapes if s != shapes[0]), None):
        raise ValueError(
            "Batches are cut anew, so their examples must have one shape. Received: examples of "
            f"shapes {some_of(shapes[0])} and {some_of(other)}. Pad all of them to the same "
            "length, and mask what is padding."
        )
    return tree.map_structure(lambda *v: np.concatenate(v), *batches)


def nothing_came() -> ValueError:
    return ValueError(
        "Statistics need at least one example. Received: data without any. (A generator that was "
        "used before is at its end.)"
    )


def _rows_of(x: Any, part: Any) -> Any:
    return tree.map_structure(lambda v: v[part], x)


@dataclass
class Chunk:
    """Some examples on their way through the model."""

    rows: int  # that count
    size: int  # of the arrays: what is more is filled up with copies
    raw: Callable[[], Any]
    level: int = -1  # stages that `kept` has behind it
    kept: Kept | None = None

    def inputs(self, pad: bool) -> Any:
        x = _rows_of(self.raw(), slice(0, self.rows))
        if pad and self.rows < self.size:
            more = self.size - self.rows
            x = tree.map_structure(lambda v: np.concatenate([v, np.repeat(v[-1:], more, 0)]), x)
        return x


# Where activations wait ------------------------------------------------------------------------


_ITEMS = {"bfloat16": 2, "string": 8}  # bytes, of a string those that point to it


def _dtype_name(x: Any) -> str:
    if isinstance(x, np.ndarray) and x.dtype.kind in "OSU":  # which Keras does not know
        return "string"
    return str(keras.backend.standardize_dtype(x.dtype)) if hasattr(x, "dtype") else "float32"


def _bytes(env: Environment) -> int:
    total = 0
    for x in itertools.chain.from_iterable(env.values()):
        if x is not None:
            dtype = _dtype_name(x)
            item = _ITEMS.get(dtype) or np.dtype(dtype).itemsize
            total += math.prod(int(n) for n in x.shape) * item
    return total


@dataclass
class Kept:
    """One environment in memory or, if it has a path, on disk."""

    store: Store
    size: int
    env: Environment
    path: Path | None = None
    dtypes: tuple[str, ...] = ()

    def get(self) -> Environment:
        if self.path is None:
            return self.env
        env: Environment = {}
        with self.path.open("rb") as file:
            for (key, (value, mask)), dtype in zip(self.env.items(), self.dtypes, strict=True):
                x = np.load(file, allow_pickle=dtype == "string")
                x = ops.cast(x, dtype) if dtype == "bfloat16" else x
                env[key] = (x, np.load(file) if mask is not None else None)
                del value
        return env

    def free(self) -> None:
        self.store.give_back(self)


class Store:
    """Memory, then disk, within their budgets; files go when it is closed."""

    def __init__(self, memory: float, disk: float, folder: str | os.PathLike[str] | None) -> None:
        for name, value in (("memory", memory), ("disk", disk)):
            if not (is_real(value) and value >= 0):
                raise ValueError(
                    f"`{name}` is a budget in bytes and must be a number >= 0. Received: "
                    f"{name}={value!r}. math.inf sets no limit."
                )
        self.memory, self.disk = memory, disk
        self._folder_in = folder
        self._folder: Path | None = None
        self._used = {"memory": 0, "disk": 0}
        self._number = itertools.count()

    def put(self, env: Environment, old: Kept | None = None) -> Kept | None:
        """Keeps an environment in the place of an old one; None if there is no room for it."""
        size = _bytes(env)
        freed = {"memory": 0, "disk": 0}
        if old is not None:
            freed["memory" if old.path is None else "disk"] = old.size
        if self._used["memory"] - freed["memory"] + size <= self.memory:
            kept = Kept(self, size, env)
            self._used["memory"] += size
        elif self._used["disk"] - freed["disk"] + size <= self.disk:
            kept = self._write(env, size)
            self._used["disk"] += size
        else:
            return None
        if old is not None:
            old.free()
        return kept

    def _write(self, env: Environment, size: int) -> Kept:
        path = None
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="keras_norm_", dir=self._folder_in))
            path = self._folder / f"{next(self._number)}.npy"
            dtypes = []
            with path.open("wb") as file:
                for value, mask in env.values():
                    dtype = _dtype_name(value)
                    dtypes.append(dtype)
                    value = ops.cast(value, "float32") if dtype == "bfloat16" else value
                    np.save(file, np.asarray(ops.convert_to_numpy(value)))
                    if mask is not None:
                        np.save(file, np.asarray(ops.convert_to_numpy(mask)))
        except OSError as error:
            if path is not None:
                path.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"Activations could not be written to {self._folder or self._folder_in!s} "
                f"({error.strerror}). Give another `folder`, more `memory`, or disk=0, which "
                "computes them again instead",
            ) from error
        light: Environment = {k: (0, None if m is None else 0) for k, (_, m) in env.items()}
        return Kept(self, size, light, path, tuple(dtypes))

    def give_back(self, kept: Kept) -> None:
        self._used["memory" if kept.path is None else "disk"] -= kept.size
        kept.env = {}
        if kept.path is not None:
            kept.path.unlink(missing_ok=True)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

"""Gatebook's shared core: graphs, Life, masks, layers, the gradient log, training, statistics, trials, the logbook, circuits.

Read it from the ground up: code refers only to sections above it. `grep '^# %%' core_old.py` lists them.

     0 Map, dimension legend
     1 Environment
     2 Seeds
     3 Graphs
     4 Logic and text data
     5 Masks and adjacency stacks
     6 Layers
     7 Models
     8 Losses and metrics
     9 Gradient log
    10 Training
    11 Statistics
    12 Flags and grids
    13 Trials
    14 Plots
    15 Logbook
    16 Command line
    17 Circuits
    18 Text
    19 Language models
    20 Graph questions
    21 Graph attention
    22 Answering
    23 Attention, watched and timed
    24 PATTERN, solved

Conventions. Masks are boolean and True means keep. Errors that a user can cause raise UsageError and end as one line on
stderr and exit 2. Nothing pickled is ever loaded. "The notebook" is the research notebook whose entry a script re-runs.
"""

# %% 0 Map, dimension legend
#
# B graphs in a batch          V real nodes in a batch, packed graph after graph: node-wise tensors are [V, D]
# N nodes of the largest       D channels        H heads       K powers in an adjacency stack
# T steps of a training run    P parameters      S seeds (stacked where a network is tiny)      G gates a unit mixes

import argparse
import ast
import contextlib
import copy
import csv
import ctypes
import datetime
import fcntl
import functools
import gc
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import subprocess
import sys
import textwrap
import time
import warnings
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% 1 Environment

REPOSITORY = Path(__file__).resolve().parent


class UsageError(Exception):
    """A mistake that the user can mend: one line that names the flag or file and the fix. `main` exits 2 on it."""


class Runtime:
    """Where this process computes; set once by `set_up`, read by every trial."""

    device = torch.device("cpu")
    threads = 1
    checkpoint: Path | None = None  # where the trial in progress may keep its state (section 13 sets it)


def keep_large_blocks(keep: bool = True) -> bool:
    """Tell glibc to keep freed blocks; True if it agreed. By default it returns every block over 32 MiB (at first: 128 KiB) to
    the system and pages it in again on the next step, which doubles the time of a wide layer. keep=False: as it does by itself."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    mmap_threshold, trim_threshold = (-3, 1 << 30 if keep else 1 << 25), (-1, 2**31 - 1 if keep else 1 << 26)
    return bool(mallopt and mallopt(*mmap_threshold) and mallopt(*trim_threshold))


def set_up(device: str = "auto", threads: int = 1) -> None:
    """Choose the device (auto, cpu or cuda) and the threads of one process. Raises UsageError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    Runtime.device = torch.device("cuda" if use_cuda else "cpu")
    Runtime.threads = threads
    torch.set_num_threads(threads)
    keep_large_blocks()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return os.uname().machine


def environment_stamp() -> dict[str, str]:
    """What a number depends on beside code and seed: commit, versions, device, threads."""

    def git(*words: str) -> str:
        with contextlib.suppress(FileNotFoundError):  # git itself may be missing
            done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else ""
        return ""

    dirty = " + uncommitted code" if git("status", "--porcelain", "--", "core_old.py", "exp_*.py", "requirements.txt") else ""
    stamp = {"commit": (git("rev-parse", "--short=8", "HEAD") or "none") + dirty, "python": sys.version.split()[0]}
    stamp |= {"torch": torch.__version__, "numpy": np.__version__, "threads": str(Runtime.threads)}
    return stamp | {"device": torch.cuda.get_device_name() if Runtime.device.type == "cuda" else cpu_name()}


def code_fingerprint(*paths: Path | str) -> str:
    """Eight hex digits of the code that decides a trial: its syntax trees, comments and docstrings aside. What only draws, writes
    and judges is left out: sections 14 to 16 of core_old.py (none that decides refers to them), NOT_DECIDING of a script."""
    trees = b"".join(deciding_tree(Path(path).read_text(encoding="utf-8")) for path in paths)
    return hashlib.sha256(trees).hexdigest()[:8]


NOT_DECIDING = {"figures", "headline", "memory", "CLAIMS", "SMOKE"}


@functools.cache
def deciding_tree(source: str) -> bytes:
    """The syntax trees for `code_fingerprint`, written out."""
    before, _, behind = source.partition("\n# %% 14 ")
    tree = ast.parse(before + "\n" + behind.partition("\n# %% 17 ")[2].partition("\n")[2])
    named = lambda node: {getattr(node, "name", ""), *(getattr(target, "id", "") for target in getattr(node, "targets", ()))}  # noqa: E731
    tree.body = [node for node in tree.body if not named(node) & NOT_DECIDING]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return ast.dump(tree).encode()


def memory_mb(what: str = "VmHWM", file: str = "/proc/self/status") -> float:
    """Largest ("VmHWM") or present ("VmRSS") resident size of this process in MB; in /proc/meminfo also what is "MemAvailable".
    Elsewhere than on Linux: the largest. Unlike getrusage's it leaves out what the parent held when it started this process."""
    if sys.platform == "linux":
        return int(re.search(rf"{what}:\s+(\d+) kB", Path(file).read_text())[1]) * 1.024e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e-6


def require_memory(flag: str, megabytes: float) -> None:
    """Raise UsageError, naming the flag, if that much memory is not to be had now. Only Linux tells."""
    if sys.platform == "linux" and megabytes > (free := memory_mb("MemAvailable", "/proc/meminfo")):
        raise UsageError(
            f"{flag}: needs about {megabytes:,.0f} MB of memory, {free:,.0f} are free; choose a smaller one, or --jobs 1"
        )


FRESH = """import importlib, json, sys, time
import core_old as core
module, name, threads, arguments, warm_up = sys.argv[1:]
function = getattr(importlib.import_module(module), name)
core.set_up("cpu", int(threads))
function(*json.loads(warm_up))
before, start = core.memory_mb("VmRSS"), time.perf_counter()
function(*json.loads(arguments))
print(json.dumps([time.perf_counter() - start, core.memory_mb() - before, core.memory_mb()]))"""


def in_fresh_process(file: str, name: str, arguments: Sequence, warm_up: Sequence) -> tuple[float, float, float]:
    """Call the function `name` of a script in a process of its own, first with small `warm_up` arguments, so that imports do not
    count: seconds, MB that it added at most, and the process's peak (Python and torch alone take over 200 MB). arguments: what JSON
    can hold. Raises CalledProcessError if it fails."""
    words = [sys.executable, "-c", FRESH, Path(file).stem, name, str(Runtime.threads), json.dumps(arguments), json.dumps(warm_up)]
    done = subprocess.run(words, cwd=Path(file).parent, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def in_fork(function: Callable[[], object]) -> object:
    """What a function returns in a fork of this process, with its imports and inputs: where hundreds of fresh processes would take
    too long to start. Not with a GPU."""
    receiver, sender = (fork := multiprocessing.get_context("fork")).Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()  # so that a process that dies ends the wait
    result = receiver.recv()
    process.join()
    return result


def added_mb(call: Callable[[], object], warm_up: Callable[[], object]) -> float:
    """MB that a call adds at most in a fork of this process, behind a small call. As in a fresh process only if this one has kept
    no freed blocks, which it would use first."""

    def measure() -> float:
        ctypes.CDLL(None).mallopt(-3, 1 << 17)  # all but small blocks are mapped alone, so that no gap between them counts
        warm_up()
        before = memory_mb("VmRSS")
        call()
        return memory_mb() - before

    ctypes.CDLL(None).malloc_trim(0)
    return in_fork(measure)


def optional(module: str) -> object | None:
    """A module of requirements-peers.txt, or None, and a line on stderr that says which command installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = "pip install --no-deps -r requirements-peers.txt"
        print(f"no {module.partition('.')[0]} ({error}), so not compared; {command}", file=sys.stderr)
        return None


# %% 2 Seeds

STREAMS = ("init", "order", "patterns", "fresh patterns", "train", "val", "test")


def stream(seed: int, name: str, *index: int) -> np.random.Generator:
    """The random stream `name` (one of STREAMS) of a seed: independent of every other stream, seed and index."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name), *index)))


@contextlib.contextmanager
def initialised_from(seed: int) -> Iterator[None]:
    """Draw initial weights from the seed's own stream inside the block; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, "init").integers(2**63)))
        yield


# %% 3 Graphs

PATTERN_SYMBOLS = 3  # node features are symbols 0, 1, 2
COMMUNITIES = 5
SIZE_RANGE = (5, 35)  # of a community and of a pattern; the upper bound is exclusive, as in the authors' generator
EDGE_INSIDE, EDGE_BETWEEN, EDGE_PATTERN = 0.5, 0.35, 0.5
GRAPHS_PER_PATTERN = {"train": 100, "val": 20, "test": 20}
KNOWN_PATTERNS = 100
IGNORED = -100  # label of a padding slot: F.cross_entropy skips it


class Pattern(NamedTuple):
    """The subgraph to be found: adjacency [P, P] bool, feature [P] uint8."""

    adjacency: np.ndarray
    feature: np.ndarray


class Graph(NamedTuple):
    """One PATTERN graph of n nodes, in about 1 kB. edges: bits of the strict upper triangle, row by row, packed eight to a byte;
    feature [n] uint8; label [n] uint8, 1 on the pattern; pattern: number of the pattern in its set; source [n] int64: which
    pattern node a node is, -1 outside."""

    edges: np.ndarray
    feature: np.ndarray
    label: np.ndarray
    pattern: int
    source: np.ndarray

    def adjacency(self) -> np.ndarray:
        """[n, n] bool, symmetric, empty diagonal."""
        n = len(self.feature)
        row, column = upper_triangle(n)
        dense = np.zeros((n, n), dtype=bool)
        dense[row, column] = np.unpackbits(self.edges, count=len(row))
        return dense | dense.T


@functools.cache
def upper_triangle(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every pair i < j of n nodes, row by row."""
    return np.triu_indices(n, 1)


def draw_pattern(rng: np.random.Generator) -> Pattern:
    """A pattern: size uniform in SIZE_RANGE, Erdős–Rényi(0.5) inside, features uniform. Source: the generator of PATTERN (Dwivedi
    et al., Benchmarking Graph Neural Networks), which draws the size although the paper says 20."""
    size = int(rng.integers(*SIZE_RANGE))
    adjacency = np.triu(rng.random((size, size)) < EDGE_PATTERN, 1)
    return Pattern(adjacency | adjacency.T, rng.integers(PATTERN_SYMBOLS, size=size, dtype=np.uint8))


def plant(pattern: Pattern, rng: np.random.Generator, number: int = 0) -> Graph:
    """Hide a pattern in a fresh stochastic block model, nodes permuted. 5 communities of uniform size, edges with 0.5 inside and
    0.35 between; every pattern node is joined to every other node with 0.5; features outside the pattern uniform. Edges are drawn
    after the nodes are permuted, which is the same distribution and touches each pair once."""
    hidden = len(pattern.feature)
    sizes = rng.integers(*SIZE_RANGE, size=COMMUNITIES)
    block = np.repeat(np.arange(COMMUNITIES + 1), [*sizes, hidden])  # the last block is the pattern
    n = len(block)
    order = rng.permutation(n)
    block = block[order]
    row, column = upper_triangle(n)
    block_row, block_column = block[row], block[column]
    likely = (block_row == block_column) | (block_row == COMMUNITIES) | (block_column == COMMUNITIES)
    edge = rng.random(len(row), dtype=np.float32) < np.where(likely, np.float32(EDGE_INSIDE), np.float32(EDGE_BETWEEN))

    place = np.flatnonzero(block == COMMUNITIES)
    source = order[place] - (n - hidden)  # which pattern node stands at each place
    first, second = upper_triangle(hidden)
    i, j = place[first], place[second]  # places ascend, so i < j
    edge[i * n - i * (i + 1) // 2 + j - i - 1] = pattern.adjacency[source[first], source[second]]

    feature = rng.integers(PATTERN_SYMBOLS, size=n, dtype=np.uint8)
    feature[place] = pattern.feature[source]
    node_source = np.full(n, -1)
    node_source[place] = source
    return Graph(np.packbits(edge), feature, (block == COMMUNITIES).astype(np.uint8), number, node_source)


class PatternData(Sequence):
    """PATTERN as its authors generate it: 100 patterns, 10,000 / 2,000 / 2,000 graphs, in stored order (pattern by pattern).
    Train, val and test share the same 100 patterns. With `fresh`, every graph has a pattern of its own instead. Graph `index`
    depends on (seed, split, index) alone, so any part can be drawn by itself: `PatternData(0)[:32]` draws 32 graphs, which share
    pattern 0."""

    def __init__(self, seed: int, split: str = "train", fresh: bool = False):
        self.seed, self.split, self.fresh = seed, split, fresh
        self.per_pattern = GRAPHS_PER_PATTERN[split]

    def __len__(self) -> int:
        return KNOWN_PATTERNS * self.per_pattern

    def pattern(self, index: int) -> Pattern:
        """The pattern that is hidden in graph `index`."""
        if self.fresh:
            return draw_pattern(stream(self.seed, "fresh patterns", STREAMS.index(self.split), index))
        return known_pattern(self.seed, index // self.per_pattern)

    def __getitem__(self, index: int | slice) -> "Graph | list[Graph]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self.fresh else index // self.per_pattern
        return plant(self.pattern(index), stream(self.seed, self.split, index), number)

    def first(self, count: int, order: str = "stored") -> list[Graph]:
        """The first `count` graphs in stored order, or of a shuffle that the seed fixes. Raises UsageError if there are fewer."""
        if count > len(self):
            raise UsageError(f"--graphs {count}: the {self.split} split has {len(self)} graphs")
        if order == "stored":
            return self[:count]
        return [self[int(i)] for i in stream(self.seed, "order").permutation(len(self))[:count]]


@functools.lru_cache(maxsize=4 * KNOWN_PATTERNS)
def known_pattern(seed: int, number: int) -> Pattern:
    """Pattern `number` of a seed's 100."""
    return draw_pattern(stream(seed, "patterns", number))


@functools.lru_cache(maxsize=1)
def load_graphs(source: str) -> tuple[dict[str, list[Graph]], str]:
    """The splits of a file of PATTERN graphs as torch_geometric's GNNBenchmarkDataset stores them raw (PATTERN_v2.pt), and its
    sha256: three lists, of train, val and test, of dicts with x [n, 3], one-hot, edge_index [2, E], both ways, and y [n]. Raises
    UsageError naming the graph that is of another form. Nothing pickled is run."""

    def graph(row: dict) -> Graph:
        x, edges, label = (np.asarray(row[key]) for key in ("x", "edge_index", "y"))
        n, label = len(x), label.reshape(-1)
        least, most = ((COMMUNITIES + 1) * size for size in (SIZE_RANGE[0], SIZE_RANGE[1] - 1))
        if not least <= n <= most:
            raise ValueError(f"{n} nodes, where PATTERN's graphs have {least} to {most}")
        if x.shape != (n, PATTERN_SYMBOLS) or not ((x == 0) | (x == 1)).all() or not (x.sum(1) == 1).all():
            raise ValueError(f"x is not one-hot [n, {PATTERN_SYMBOLS}]")
        if label.shape != (n,) or not np.isin(label, (0, 1)).all():
            raise ValueError("y is not a class 0 or 1 for each node")
        if edges.ndim != 2 or len(edges) != 2 or edges.dtype.kind != "i" or ((edges < 0) | (edges >= n)).any():
            raise ValueError("edge_index is not [2, E] of its nodes' numbers")
        dense = np.zeros((n, n), dtype=bool)
        dense[tuple(edges)] = True
        if (dense != dense.T).any() or dense.diagonal().any():
            raise ValueError("an edge goes one way only, or from a node to itself")
        bits = np.packbits(dense[upper_triangle(n)])
        return Graph(bits, x.argmax(1).astype(np.uint8), label.astype(np.uint8), -1, np.full(n, -1))

    try:
        content = Path(source).read_bytes()
        parts = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except OSError as error:
        raise UsageError(f"--data {source}: cannot be read ({error.strerror}); name a .pt file") from None
    except Exception as error:  # torch raises many kinds for a foreign, cut or hostile file
        raise UsageError(f"--data {source}: not a file of tensors ({type(error).__name__}); see the README for the form") from None
    if (
        not isinstance(parts, list | tuple)
        or len(parts) != len(GRAPHS_PER_PATTERN)
        or not all(isinstance(p, list | tuple) for p in parts)
    ):
        raise UsageError(f"--data {source}: not three lists of graphs, of train, val and test; see the README for the form")
    splits = {}
    for split, rows in zip(GRAPHS_PER_PATTERN, parts, strict=True):
        splits[split] = []
        for i, row in enumerate(rows):
            try:
                splits[split].append(graph(row))
            except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise UsageError(f"--data {source}: graph {i} of {split}: {reason}; see the README for the form") from None
    return splits, hashlib.sha256(content).hexdigest()[:16]


def benchmark_graphs(source: str, seed: int, split: str, count: int) -> list[Graph]:
    """`count` graphs of a split, shuffled by the seed: of the seed's own benchmark, if source is "generated", or of a file. Raises
    UsageError if there are fewer."""
    graphs = PatternData(seed, split) if source == "generated" else load_graphs(source)[0][split]
    if count > len(graphs):
        raise UsageError(f"--{split}-graphs {count}: the {split} split has {len(graphs)}")
    return [graphs[int(i)] for i in stream(seed, "order").permutation(len(graphs))[:count]]


class GraphBatch:
    """B graphs as one input: real nodes packed [V, ...], mixing matrices padded [B, N, N]. adjacency [B, N, N] float; nodes [B, N]
    bool, True on real nodes; slot [V] position of a packed node in the flat [B * N]; feature, label [V] int64; degree, size [V]
    float (edges of the node, nodes of its graph). `cache` keeps what is computed once a batch (section 5).

    With `padding`, every slot travels as a node: V = B * N, the padding has no edge and its label is IGNORED. That is the
    notebook's layout without a norm mask: norms see padding."""

    def __init__(self, graphs: Sequence[Graph], device: torch.device | str = "cpu", padding: bool = False):
        sizes = [len(graph.feature) for graph in graphs]
        b, n = len(graphs), max(sizes)
        adjacency = np.zeros((b, n, n), dtype=np.float32)
        feature, label = np.zeros((b, n), dtype=np.int64), np.full((b, n), IGNORED)
        for i, (graph, size) in enumerate(zip(graphs, sizes, strict=True)):
            adjacency[i, :size, :size] = graph.adjacency()
            feature[i, :size], label[i, :size] = graph.feature, graph.label
        self.shape, self.sizes, self.padding, self.cache = (b, n), sizes, padding, {}
        self.adjacency = torch.from_numpy(adjacency).to(device)
        self.nodes = torch.from_numpy(label != IGNORED).to(device)
        packed = torch.ones_like(self.nodes) if padding else self.nodes
        self.slot = packed.flatten().nonzero().squeeze(1)
        self.feature = self.pack(torch.from_numpy(feature).to(device)[..., None]).squeeze(1)
        self.label = self.pack(torch.from_numpy(label).to(device)[..., None]).squeeze(1)
        self.degree = self.pack(self.adjacency.sum(-1, keepdim=True)).squeeze(1)
        self.size = torch.tensor(sizes, dtype=torch.float32, device=device)[self.slot // n]

    def pad(self, x: Tensor) -> Tensor:
        """[V, D] -> [B, N, D], zeros in the padding."""
        b, n = self.shape
        return x.new_zeros(b * n, x.shape[1]).index_copy(0, self.slot, x).view(b, n, -1)

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [V, D]."""
        return x.flatten(0, 1).index_select(0, self.slot)

    def mix(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Each graph's matrix (of [B, N, N]) times its rows of x [V, D]; on a CPU without touching the padding."""
        if x.device.type == "cpu":
            return GraphwiseProduct.apply(x, matrix, [self.shape[1]] * len(self.sizes) if self.padding else self.sizes)
        return self.pack(matrix @ self.pad(x))


class GraphwiseProduct(torch.autograd.Function):
    """out[graph b] = matrix[b] x[graph b] for packed x [V, D], matrix [B, N, N] (a constant) and the graphs' sizes."""

    @staticmethod
    def product(x: Tensor, matrix: Tensor, sizes: list[int]) -> Tensor:
        out = torch.empty_like(x)
        for one, size, rows, result in zip(matrix, sizes, x.split(sizes), out.split(sizes), strict=True):
            torch.mm(one[:size, :size], rows, out=result)
        return out

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor, sizes: list[int]) -> Tensor:
        ctx.matrix, ctx.sizes = matrix, sizes
        return GraphwiseProduct.product(x, matrix, sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return GraphwiseProduct.product(grad.contiguous(), ctx.matrix.mT, ctx.sizes), None, None


class Pyramid(NamedTuple):
    """A triangle of the triangular lattice: row r holds nodes (r, 0) .. (r, r), the n nodes are numbered row by row. row, column
    [n]; edges [m, 2]; colour [n] in 0, 1, 2: the only proper 3-colouring, but for the names of the colours. Source: graph
    notebook, 11/4."""

    row: np.ndarray
    column: np.ndarray
    edges: np.ndarray
    colour: np.ndarray


def pyramid(base: int) -> Pyramid:
    """The pyramid with `base` rows, n = base (base + 1) / 2. pyramid(2): a triangle, edges 0-1, 1-2, 0-2."""
    row, column = np.tril_indices(base)
    number = np.zeros((base, base), dtype=np.int64)
    number[row, column] = np.arange(len(row))
    inner, upper = column < row, row < base - 1
    steps = [(inner, 0, 1), (upper, 1, 0), (upper, 1, 1)]
    edges = [(number[row[on], column[on]], number[row[on] + down, column[on] + right]) for on, down, right in steps]
    return Pyramid(row, column, np.concatenate([np.stack(pair, 1) for pair in edges]), (row + column) % 3)


def batches_of(graphs: Sequence[Graph], size: int, padding: bool = False) -> list[GraphBatch]:
    """Batches of `size` graphs on this process's device, graphs of like size together, since padding costs time. Not for training
    with batch norm: in every batch it would take off what the sizes tell."""
    graphs = sorted(graphs, key=lambda graph: len(graph.feature)) if len(graphs) > size else graphs
    return [GraphBatch(graphs[i : i + size], Runtime.device, padding) for i in range(0, len(graphs), size)]


# %% 4 Logic and text data

CELLS = 9  # of a neighbourhood, row by row; number 4 is the cell itself
NEIGHBOURHOODS = np.array(list(itertools.product((0, 1), repeat=CELLS)), dtype=np.float32)  # [512, 9]
CELLS_ALIVE = NEIGHBOURHOODS.sum(1).astype(int)  # [512], the middle one counted
LIFE = np.where(NEIGHBOURHOODS[:, 4] == 1, abs(CELLS_ALIVE - 3.5) < 1, CELLS_ALIVE == 3).astype(np.float32)  # [512]: alive next?


def neighbourhood_chances(alive: float) -> np.ndarray:
    """Chance of each of the 512 neighbourhoods when every cell lives with chance `alive`: [512] float64."""
    return np.prod(np.where(NEIGHBOURHOODS == 1, alive, 1 - alive), 1)


def best_losses(alive: float) -> dict[str, float]:
    """Exact mean squared errors, under `neighbourhood_chances`, of always 0 and of the best polynomials of degree 0 to 4 for a
    cell's next state: the losses at which a network stops that does no better."""
    chance, features = neighbourhood_chances(alive), np.ones((512, 0))
    found, root = {"always 0": float(chance @ LIFE)}, np.sqrt(chance)
    for degree, name in enumerate(("the mean", "linear", "quadratic", "cubic", "quartic")):
        products = [NEIGHBOURHOODS[:, list(cells)].prod(1) for cells in itertools.combinations(range(9), degree)]
        features = np.column_stack([features, *products])
        fit = np.linalg.lstsq(features * root[:, None], LIFE * root, rcond=None)[0]
        found[name] = float(chance @ (features @ fit - LIFE) ** 2)
    return found


def neighbourhood_batches(seeds: Sequence[int], alive: float, batch: int) -> Iterator[Tensor]:
    """Fresh batches for ever, as how often each of the 512 neighbourhoods was drawn: [S, 512], each row from a seed's own stream.
    A mean over a batch is a mean over the 512 with these weights, so the batch itself is never made."""
    streams, chances = [stream(seed, "train") for seed in seeds], neighbourhood_chances(alive)
    while True:
        block = np.stack([rng.multinomial(batch, chances, size=64) for rng in streams], 1)  # (64, S, 512)
        yield from torch.from_numpy(block).float().to(Runtime.device)


def pack(cells: np.ndarray) -> np.ndarray:
    """[..., W] bool -> [..., ceil(W / 64)] uint64: bit i of word k is column 64 k + i; bits past W are 0."""
    padding = [(0, 0)] * (cells.ndim - 1) + [(0, -cells.shape[-1] % 64)]
    return np.packbits(np.pad(cells, padding), axis=-1, bitorder="little").view("<u8").astype(np.uint64)


def unpack(words: np.ndarray, width: int) -> np.ndarray:
    """The [..., width] bool that `pack` packed."""
    return np.unpackbits(words.astype("<u8").view(np.uint8), axis=-1, count=width, bitorder="little").astype(bool)


PATTERNS = {  # run-length encoded: b dead, o alive, $ end of a row
    "blinker": "3o!",
    "glider": "bo$2bo$3o!",
    "gosper-gun": "24bo$22bobo$12b2o6b2o12b2o$11bo3bo4b2o12b2o$2o8bo5bo3b2o$2o8bo3bob2o4bobo$10bo5bo7bo$11bo3bo$12b2o!",
}


def pattern_board(pattern: str, height: int, width: int) -> np.ndarray:
    """A board [H, W] bool with one of PATTERNS near its upper left corner. Raises ValueError if it does not fit."""
    runs = re.sub(r"(\d+)([bo$])", lambda run: int(run[1]) * run[2], PATTERNS[pattern].rstrip("!")).split("$")
    board = np.zeros((height, width), dtype=bool)
    for row, cells in enumerate(runs, 1):
        if row > height - 1 or len(cells) > width - 1:
            raise ValueError(f"{pattern} does not fit on {height} x {width}")
        board[row, 1 : 1 + len(cells)] = [cell == "o" for cell in cells]
    return board


def convolution_step(board: np.ndarray) -> np.ndarray:
    """The next generation of a board [H, W] bool that wraps around, by scipy's convolution."""
    from scipy import signal

    around = signal.convolve2d(board, [[1, 1, 1], [1, 0, 1], [1, 1, 1]], mode="same", boundary="wrap")
    return (around == 3) | (board & (around == 2))


def show(board: np.ndarray) -> str:
    """The board for a terminal: a line of half blocks for two rows."""
    pairs = np.pad(board, ((0, len(board) % 2), (0, 0))).reshape(-1, 2, board.shape[1])
    return "\n".join("".join(" ▀▄█"[up + 2 * low] for up, low in zip(*pair, strict=True)) for pair in pairs)


EXPRESSIONS = ("a ^ a", "a & b", "a & ~b", "a", "~a & b", "b", "a ^ b", "a | b",
               "~(a | b)", "~(a ^ b)", "~b", "a | ~b", "~a", "~a | b", "~(a & b)", "~(a ^ a)")  # fmt: skip
# the gates in the order of GATES; one that reads a single operand names no other
GATE_A = EXPRESSIONS.index("a")
Gate = tuple[int, int, int]  # number in GATES, first operand, second operand


class Circuit(NamedTuple):
    """Gates over a neighbourhood. Signals 0 to 8 are its cells, signal 9 + i is gates[i], whose operands are smaller signals. The
    output is any signal."""

    gates: list[Gate]
    output: int

    def numbered(self) -> dict[int, Gate]:
        """The gates by signal."""
        return dict(enumerate(self.gates, CELLS))


OPERATIONS = tuple(eval(f"lambda a, b: {text}") for text in EXPRESSIONS)  # of bools or unsigned words; of these constants alone


def all_signals(circuit: Circuit, cells: Sequence) -> list:
    """The values of all signals for nine such values."""
    values = [*cells]
    for gate, first, second in circuit.gates:
        values.append(OPERATIONS[gate](values[first], values[second]))
    return values


def truth_tables(circuit: Circuit) -> np.ndarray:
    """Every signal on every neighbourhood: [signals, 512] bool."""
    return np.stack(all_signals(circuit, NEIGHBOURHOODS.T.astype(bool)))


def assemble(gates: dict[int, Gate], output: int) -> Circuit:
    """Circuit of those gates, in any order, that the output needs, sorted by depth and numbered anew. Raises ValueError with one of
    the signals if they form a cycle."""
    reads, waiting = {}, [output]
    while waiting:
        if (signal := waiting.pop()) >= CELLS and signal not in reads:
            gate, first, second = gates[signal]
            reads[signal] = [s for letter, s in (("a", first), ("b", second)) if letter in EXPRESSIONS[gate]]
            waiting += reads[signal]
    number, pending = {cell: cell for cell in range(CELLS)}, [signal for signal in gates if signal in reads]
    while pending:
        ready = [signal for signal in pending if all(operand in number for operand in reads[signal])]
        if not ready:
            raise ValueError(pending[0])
        number |= {signal: len(number) + i for i, signal in enumerate(ready)}
        pending = [signal for signal in pending if signal not in number]
    placed = [(gates[s][0], number[reads[s][0]], number[reads[s][-1]]) for s in [*number][CELLS:]]
    return Circuit(placed, number[output])


def statements(circuit: Circuit) -> list[str]:
    """One "g0 = x0 & ~x3" a gate, and "y = g7" for the output."""
    names = [f"x{cell}" for cell in range(CELLS)] + [f"g{i}" for i in range(len(circuit.gates))]
    lines = []
    for i, (gate, first, second) in enumerate(circuit.gates):
        operand = {"a": names[first], "b": names[second]}
        lines.append(f"g{i} = " + re.sub("[ab]", lambda letter, operand=operand: operand[letter[0]], EXPRESSIONS[gate]))
    return [*lines, f"y = {names[circuit.output]}"]


def numpy_code(circuit: Circuit) -> str:
    """Source of a function next_cell(x0, .., x8) of bool arrays or unsigned words."""
    header = f"def next_cell({', '.join(f'x{cell}' for cell in range(CELLS))}):"
    *lines, last = statements(circuit)
    return "\n    ".join([header, *lines, last.replace("y =", "return")]) + "\n"


def netlist(circuit: Circuit, comment: str) -> str:
    """The circuit as structural Verilog: an assign a gate."""
    cells, wires = (", ".join(f"{letter}{i}" for i in range(n)) for letter, n in (("x", CELLS), ("g", len(circuit.gates))))
    lines = [f"// {comment}", f"module life(input {cells}, output y);", *(f"  wire {line};" for line in [wires] if wires)]
    return "\n".join([*lines, *(f"  assign {line};" for line in statements(circuit)), "endmodule\n"])


def read_netlist(path: Path) -> Circuit:
    """The circuit in a file like those of `netlist`. Raises UsageError for any other file."""
    try:
        return parse_netlist(path.read_text(encoding="utf-8"), f"--netlist {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--netlist {path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None


def parse_netlist(text: str, name: str = "netlist") -> Circuit:
    """The circuit in a text like that of `netlist`, its assigns in any order, with any names of wires. Raises UsageError that names
    the text, the line and what is wrong with it."""

    def require(right: bool, number: int, wrong: str) -> None:
        if not right:
            raise UsageError(f"{name}, line {number}: {wrong}; give a netlist that exp_logic_circuit.py wrote")

    signal, driven, number = {f"x{cell}": cell for cell in range(CELLS)}, {}, 0
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition("//")[0].strip()
        if found := re.fullmatch(r"assign (\w+) = ([^;]+);", code):
            require(found[1] not in driven, number, f"{found[1]} is driven twice")
            require(found[1] not in signal, number, f"{found[1]} is a cell and cannot be driven")
            driven[found[1]] = number, found[2]
        else:
            require(bool(re.fullmatch(r"(module life\(.*\);|wire .*;|endmodule)?", code)), number, "cannot be understood")
    require("y" in driven, number, "nothing drives y")
    signal |= {wire: CELLS + i for i, wire in enumerate(driven)}
    readable = {text.replace("b", "a"): gate for gate, text in enumerate(EXPRESSIONS)}  # a gate may read one signal twice
    readable |= {text: gate for gate, text in enumerate(EXPRESSIONS)}
    gates = {}
    for wire, (number, expression) in driven.items():
        used = [*dict.fromkeys(re.findall(r"\w+", expression))]
        for one in used:
            require(one in signal, number, f"nothing drives {one}")
        form = re.sub(r"\w+", lambda one, used=used: "abc"[min(used.index(one[0]), 2)], expression)
        require(form in readable, number, f"{expression} is no gate of two signals")
        gates[signal[wire]] = readable[form], signal[used[0]], signal[used[-1]]
    gate, first, _ = gates[signal["y"]]
    try:
        return assemble(gates, first if gate == GATE_A else signal["y"])
    except ValueError as error:
        number = next(number for wire, (number, _) in driven.items() if signal[wire] == error.args[0])
        require(False, number, "this gate is on a cycle, or reads from one")


# %% 5 Masks and adjacency stacks


def masked_softmax(logits: Tensor, keep: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the kept entries, zero elsewhere. A row that keeps nothing is zero, forward and backward, never NaN."""
    lowest = torch.finfo(logits.dtype).min  # finite: exp underflows to an exact zero, and an empty row stays defined
    return logits.masked_fill(~keep, lowest).softmax(dim).masked_fill(~keep, 0.0)


def masked_sigmoid(logits: Tensor, keep: Tensor) -> Tensor:
    """Sigmoid of the kept logits, exactly zero elsewhere, with zero gradient there."""
    return logits.masked_fill(~keep, -math.inf).sigmoid()


def transition_powers(adjacency: Tensor, nodes: Tensor, powers: Sequence[int]) -> Tensor:
    """Powers of P = D^-1 A: [B, N, N], [B, N] bool -> [B, K, N, N]. Power 0 is the identity on real nodes; a node without
    edges has zero rows in all others. Source: the graph notebook's `adj_stack`."""
    step = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
    power = torch.diag_embed(nodes.to(adjacency.dtype))
    kept = []
    for exponent in range(max(powers) + 1):
        if exponent:
            power = step @ power if exponent > 1 else step
        if exponent in powers:
            kept.append(power)
    return torch.stack(kept, 1)


class AdjacencyStack:
    """The powers of one batch and what follows from them. Get it from `adjacency_stack`, which keeps it with the batch. values [B,
    K, N, N]: the powers; hop [B, K, N, N]: one-hot of the smallest power that is non-zero (zeros if none is); reachable [B, N, N]
    bool: some power is non-zero, so both nodes are real; real [B, N, N] bool: both nodes are real; hop_count [V, K + 1]: how many
    real nodes each node has at each hop, and how many it does not reach."""

    def __init__(self, batch: GraphBatch, powers: Sequence[int]):
        self.batch, self.powers, self.kept = weakref.proxy(batch), tuple(powers), {}  # no cycle, which would keep memory
        self.values = transition_powers(batch.adjacency, batch.nodes, powers)
        met = self.values != 0
        self.reachable = met.any(1)
        self.hop = (met & (met.cumsum(1) == 1)).to(self.values.dtype)
        self.met = self.hop.any(dim=-1).any(dim=-1).any(dim=0).tolist()  # PATTERN has diameter 2 or 3: most hops are empty
        self.real = batch.nodes[:, :, None] & batch.nodes[:, None, :]
        counted = torch.cat([self.hop.sum(-1), (self.real & ~self.reachable).sum(-1)[:, None].to(self.hop.dtype)], 1)
        self.hop_count = batch.pack(counted.transpose(1, 2))

    def blocks(self, vectors: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """For `GraphwiseMixing`, once a stack: each graph's part of its values or of its hops [B, K, N, N], without the padding."""
        kept = self.kept.setdefault(id(vectors), [])
        if not kept:
            for block, near, n in zip(vectors, self.reachable, self.batch.sizes, strict=True):
                far = ~near[:n, :n]
                kept.append((block[:, :n, :n].flatten(1).contiguous(), far if far.any() else None))
        return kept

    def sums_by_hop(self, x: Tensor) -> list[Tensor]:
        """x [V, D] summed over the nodes at each hop: K tensors [V, D]. Hop 0 of a real node is the node itself: no product."""
        itself = 0 if not self.batch.padding else None  # padding slots are not even their own neighbours
        hops = zip(self.powers, self.met, self.hop.unbind(1), strict=True)
        return [x if power == itself else self.batch.mix(hop, x) if met else torch.zeros_like(x) for power, met, hop in hops]

    def sum_unreached(self, x: Tensor, sums: list[Tensor]) -> Tensor:
        """x [V, D] summed over the real nodes that a node does not reach: its graph's total less its `sums_by_hop`. [V, D]"""
        graph = self.batch.slot // self.batch.shape[1]
        real = (self.batch.label != IGNORED).to(x.dtype)[:, None]
        total = x.new_zeros(self.batch.shape[0], x.shape[1]).index_add(0, graph, x * real)
        return real * (total[graph] - sum(sums))


def adjacency_stack(batch: GraphBatch, powers: Sequence[int]) -> AdjacencyStack:
    """The batch's stack for these powers (ascending), computed on first use."""
    if (powers := tuple(powers)) not in batch.cache:
        batch.cache[powers] = AdjacencyStack(batch, powers)
    return batch.cache[powers]


def pair_codes(n: int, edges: np.ndarray, receptive_field: int, modulus: int, multiplier: int, scale: int = 12) -> np.ndarray:
    """A 64-bit code of each ordered pair's vector (P^0 .. P^r)[i, j], P = D^-1 A, in exact arithmetic: [n, n] uint64. Equal
    vectors have equal codes, the zero vector has code 0, and unequal ones share a code with a chance of about 2^-57. No power is
    stored: `scale` P is an integer matrix when every degree divides `scale`; its powers are made modulo `modulus` (near 2^57, so
    that no sum of six neighbours overflows) and streamed into the codes. Codes made with the same numbers compare between graphs.
    edges [m, 2], each once; `modulus` and `multiplier` odd. Raises ValueError for a degree that does not divide `scale`."""
    from scipy import sparse

    ends = np.concatenate([edges, edges[:, ::-1]]).T  # (2, 2m)
    degree = np.bincount(ends[0], minlength=n)
    if (scale % np.maximum(degree, 1)).any():
        raise ValueError(f"{scale} is not a multiple of every degree")
    step = sparse.csr_array((scale // degree[ends[0]], (ends[1], ends[0])), shape=(n, n))  # scale P, transposed
    codes = np.empty((n, n), dtype=np.uint64)
    for start in range(0, n, 16):  # blocks of 16 sources stay in the cache
        power = np.eye(n, min(16, n - start), -start, dtype=np.int64)
        code = np.zeros_like(power, dtype=np.uint64)
        for exponent in range(receptive_field + 1):
            if exponent:  # entries of (c P)^k are at most c^k
                power = step @ power if scale**exponent < modulus else step @ power % modulus
            code ^= power.view(np.uint64)
            code *= np.uint64(multiplier)
            code ^= code >> np.uint64(32)
        codes[start : start + 16] = code.T
    return codes


def pair_kinds(codes: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct codes of the pairs [n, n], of which the top bit is lost, and how many pairs of two colours and of one have each:
    [kinds], [kinds, 2]; colour [n]. Overwrites the codes."""
    codes <<= np.uint64(1)
    codes |= colour[:, None] == colour
    found, count = np.unique(codes, return_counts=True)
    kinds, row = np.unique(found >> np.uint64(1), return_inverse=True)
    pairs = np.zeros((len(kinds), 2), dtype=np.int64)
    pairs[row, (found & np.uint64(1)).astype(int)] = count
    return kinds, pairs


def pair_orbits(pyramid: Pyramid, receptive_field: int) -> int:
    """How many kinds of pairs no vector of powers can pass: orbits of the pairs within reach under the triangle's six symmetries
    and, where both degrees are equal, the exchange of the two; all pairs out of reach are one."""
    row, column, n = pyramid.row, pyramid.column, len(pyramid.row)
    degree, heights = np.bincount(pyramid.edges.ravel(), minlength=n), (row.max() - row, row - column, column)  # over the sides
    images = [(row.max() - a) * (row.max() - a + 1) // 2 + b for a, b in itertools.permutations(heights, 2)]
    orbits, unreached = 0, False
    for i in range(n):
        down, right = row - row[i], column - column[i]
        near = np.max([abs(down), abs(right), abs(down - right)], 0) <= receptive_field
        pairs = [g[i] * n + g for g in images] + [np.where(degree == degree[i], g * n + g[i], n * n) for g in images]
        orbits += np.count_nonzero(near & (np.min(pairs, 0) == i * n + np.arange(n)))  # each orbit has one smallest pair
        unreached |= not near.all()
    return orbits + unreached


# %% 6 Layers


class OneDNNLinear(torch.autograd.Function):
    """x [V, D] -> x W^T + b by oneDNN, forward and backward. torch's own float32 linear calls MKL, which runs AVX2 code on AMD
    processors; oneDNN runs AVX-512 wherever the processor has it and took half the time here."""

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return OneDNNLinear.product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), product = ctx.saved_tensors, OneDNNLinear.product
        wide = weight.shape[0] > weight.shape[1]  # the product is faster with the longer side as its columns
        return (
            product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            (product(x.t(), grad.t()).t() if wide else product(grad.t(), x.t())) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear, through oneDNN for float32 on a CPU: [V, D] -> [V, D']."""

    def forward(self, x: Tensor) -> Tensor:
        if HAS_ONEDNN and x.dim() == 2 and x.dtype == torch.float32 and x.device.type == "cpu":
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class Centred(nn.Module):
    """x [V, D] less its mean over all nodes: what they share is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def make_norm(kind: str, dim: int) -> nn.Module:
    """A norm over packed nodes [V, D]: "layer", "batch", "centred" or "none". Packed input holds real nodes only, so no statistic
    sees padding."""
    kinds = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "centred": lambda _: Centred(), "none": lambda _: nn.Identity()}
    return kinds[kind](dim)


def divided(x: Tensor, by: float | str, batch: GraphBatch) -> Tensor:
    """x [V, D] over a number, or over how many nodes each node sums ("degree": itself and its neighbours) or the root of that."""
    return x / (batch.degree[:, None] + 1) ** {"degree": 1.0, "root-degree": 0.5}[by] if isinstance(by, str) else x / by


class PositionMixing(nn.Module):
    """Mixing by position alone: the weight of a pair depends on its vector of adjacency powers, through Linear(K -> H). activation
    "softmax" averages over reachable nodes (the notebook's attention); "sigmoid" gates each pair by itself and sums (its gating).
    With `distance` the vector is the one-hot of the hop, so a head is K scalars and mixing is a sum of K constant products: no
    per-pair logit is made. Values are projected per head, then comes an output projection; no queries, no keys. Pairs that no
    power connects have the logit `unreachable`: -inf shuts them out, a finite number is learned from there. What is summed goes
    through `divided`. Source: graph notebook, 6/3 and 13/3."""

    def __init__(self, dim: int, heads: int, powers: Sequence[int], distance: bool, activation: str,
                 unreachable: float = -math.inf, divide: float | str = 1.0):  # fmt: skip
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads, self.powers, self.distance, self.divide = heads, tuple(powers), distance, divide
        self.average, self.gate = {"softmax": True, "sigmoid": False}[activation], torch.sigmoid  # gate: of hops
        self.value, self.out = Linear(dim, dim), Linear(dim, dim)
        self.pair = nn.Linear(len(self.powers), heads)
        self.unreachable = nn.Parameter(torch.full((heads,), unreachable)) if unreachable > -math.inf else None

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        stack = adjacency_stack(batch, self.powers)
        value = self.value(x)
        mixed = self.mix_hops(value, stack) if self.distance else self.mix_pairs(value, stack, stack.values)
        return self.out(divided(mixed, self.divide, batch))

    def mix_hops(self, value: Tensor, stack: AdjacencyStack) -> Tensor:
        """[V, D] -> [V, D]; the same as mix_pairs(value, stack, stack.hop) in exact arithmetic."""
        logits = self.pair.weight + self.pair.bias[:, None]  # [H, K]
        count, sums = stack.hop_count[:, None], stack.sums_by_hop(value)
        if self.unreachable is None:
            count = count[..., :-1]
        else:  # one hop more
            logits, sums = torch.cat([logits, self.unreachable[:, None]], 1), [*sums, stack.sum_unreached(value, sums)]
        weight = self.gate(logits)[None]  # [1, H, K]
        if self.average:  # all c nodes at a hop share a logit: their total weight is a softmax over hops of logit + log c
            weight = masked_softmax(logits + count.log(), count > 0) / count.clamp(min=1)  # [V, H, K]
        per_channel = value.shape[1] // self.heads
        return sum(weight[..., k].repeat_interleave(per_channel, dim=1) * sums[k] for k in range(len(sums)))

    def mix_pairs(self, value: Tensor, stack: AdjacencyStack, vectors: Tensor) -> Tensor:
        """[V, D], pair vectors [B, K, N, N] -> [V, D]. The general way: one logit a pair and head."""
        if value.device.type == "cpu" and not stack.batch.padding:
            rest = self.unreachable, stack.blocks(vectors), self.average
            return GraphwiseMixing.apply(value, self.pair.weight, self.pair.bias, *rest)
        logits = torch.einsum("bknm,hk->bhnm", vectors, self.pair.weight) + self.pair.bias[:, None, None]
        keep = stack.reachable[:, None]
        if self.unreachable is not None:
            logits, keep = torch.where(keep, logits, self.unreachable[:, None, None]), stack.real[:, None]
        weigh = masked_softmax if self.average else masked_sigmoid
        return mix_heads(weigh(logits, keep), value, stack.batch)


class GraphwiseMixing(torch.autograd.Function):
    """PositionMixing.mix_pairs on a CPU, graph by graph, so that nothing is made of the padding and all of a graph stays in the
    cache. blocks: of each graph its pair vectors [K, n * n], and the pairs [n, n] that are out of reach, None if there are none."""

    @staticmethod
    def forward(
        ctx, value: Tensor, weight: Tensor, bias: Tensor, unreachable: Tensor | None, blocks: list, average: bool
    ) -> Tensor:
        heads, sizes = len(weight), [math.isqrt(vectors.shape[1]) for vectors, _ in blocks]
        out, weights = torch.empty_like(value), []
        for (vectors, far), rows, mixed in zip(blocks, value.split(sizes), out.split(sizes), strict=True):
            logits = torch.addmm(bias[:, None], weight, vectors).view(heads, len(rows), len(rows))
            if far is not None and unreachable is None:
                logits.masked_fill_(far, torch.finfo(logits.dtype).min if average else -math.inf)
            elif far is not None:
                logits = torch.where(far, unreachable[:, None, None], logits)
            weights.append(logits.softmax(-1) if average else logits.sigmoid_())
            if far is not None and unreachable is None and average:  # a row that keeps nothing is zero
                weights[-1].masked_fill_(far, 0.0)
            mixed.unflatten(1, (heads, -1)).copy_((weights[-1] @ rows.unflatten(1, (heads, -1)).transpose(0, 1)).transpose(0, 1))
        ctx.save_for_backward(value, weight, unreachable, *weights)
        ctx.blocks, ctx.average, ctx.sizes = blocks, average, sizes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, weight, unreachable, *weights = ctx.saved_tensors
        to_value, to_weight, to_bias = torch.empty_like(value), torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
        to_unreachable = None if unreachable is None else torch.zeros_like(unreachable)
        parts = (x.split(ctx.sizes) for x in (value, grad.contiguous(), to_value))
        for (vectors, far), own, rows, back, into in zip(ctx.blocks, weights, *parts, strict=True):
            rows, back = (x.unflatten(1, (len(weight), -1)).transpose(0, 1) for x in (rows, back))
            into.unflatten(1, (len(weight), -1)).copy_((own.mT @ back).transpose(0, 1))
            logits = (back @ rows.mT).mul_(own)  # their gradient, from here on
            logits = logits.addcmul_(own, logits.sum(-1, keepdim=True), value=-1) if ctx.average else logits.mul_(1 - own)
            if far is not None and unreachable is not None:
                to_unreachable += (logits * far).sum((1, 2))
                logits.masked_fill_(far, 0.0)
            to_weight.addmm_(logits.flatten(1), vectors.T)
            to_bias += logits.sum((1, 2))
        return to_value, to_weight, to_bias, to_unreachable, None, None


def mix_heads(weight: Tensor, value: Tensor, batch: GraphBatch) -> Tensor:
    """Weights [B, H, N, N] applied to packed values [V, D], head by head."""
    padded = batch.pad(value).unflatten(2, (weight.shape[1], -1)).transpose(1, 2)  # [B, H, N, D/H]
    return batch.pack((weight @ padded).transpose(1, 2).flatten(2))


class ContentAttention(nn.Module):
    """Multi-head attention over all nodes of a graph, softmax(q k^T / sqrt(D/H)) v; with `powers`, the position logits of
    PositionMixing (hop one-hots) are added as a bias. Source: graph notebook, "Content attention"."""

    def __init__(self, dim: int, heads: int, powers: Sequence[int] | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads, self.powers = heads, powers
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.pair = nn.Linear(len(powers), heads) if powers else None

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        parts = (self.query(x), self.key(x), self.value(x))
        query, key, value = (batch.pad(part).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, N, D/H]
        bias = torch.zeros_like(batch.adjacency)[:, None]
        if self.pair is not None:
            hop = adjacency_stack(batch, self.powers).hop
            bias = torch.einsum("bknm,hk->bhnm", hop, self.pair.weight) + self.pair.bias[:, None, None]
        # keys in the padding are shut out; a padded query sees real keys, stays finite, and is dropped by pack
        bias = bias.masked_fill(~batch.nodes[:, None, None, :], -math.inf)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(batch.pack(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Sequential):
    """Linear, [BatchNorm], ReLU, Linear: [V, D] -> [V, D]. `norm` "batch" or "none" is the notebook's "batch norm in MLP"."""

    def __init__(self, dim: int, hidden: int, norm: str = "none"):
        parts = {"first": Linear(dim, hidden), "norm": make_norm(norm, hidden)}
        super().__init__(OrderedDict(parts | {"relu": nn.ReLU(inplace=True), "last": Linear(hidden, dim)}))


class TransformerLayer(nn.Module):
    """Mixing, then feed-forward, each with a residual and a norm of its own ("layer", "batch", "none"), by default norm first;
    `mixed_norm` stands behind mixing, before the residual."""

    def __init__(self, mixing: nn.Module, feedforward: nn.Module, dim: int, norms: tuple[str, str],
                 norm_first: bool = True, mixed_norm: str = "none"):  # fmt: skip
        super().__init__()
        self.mixed_norm = make_norm(mixed_norm, dim)
        self.mixing, self.feedforward, self.norm_first = mixing, feedforward, norm_first
        self.norm1, self.norm2 = make_norm(norms[0], dim), make_norm(norms[1], dim)

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        if self.norm_first:
            x = x + self.mixed_norm(self.mixing(self.norm1(x), batch))
            return x + self.feedforward(self.norm2(x))
        x = self.norm1(x + self.mixed_norm(self.mixing(x, batch)))
        return self.norm2(x + self.feedforward(x))


class GINLayer(nn.Module):
    """x + relu(norm(MLP(own x + neighbours))), MLP = Linear, BatchNorm, ReLU, Linear with hidden = width. own: "eps" is 1 + eps
    (GIN, Xu et al. 2019), "sigmoid" is 1 + sigmoid(eps), "gate" is sigmoid(eps). neighbours: the sum of relu(x) over neighbours
    (`relu` off: of x), times sigmoid(eps2) if `gate_neighbours`; both go through `divided`. mlp_norm, out_norm: "batch", "layer"
    or "none". Source: graph notebook, 8.3 and 13/3; its modified GIN is own="sigmoid" with gate_neighbours."""

    def __init__(self, dim: int, mlp_norm: str = "batch", out_norm: str = "batch", own: str = "eps",
                 gate_neighbours: bool = False, relu: bool = True, divide: float | str = 1.0):  # fmt: skip
        super().__init__()
        self.mlp, self.norm = FeedForward(dim, dim, mlp_norm), make_norm(out_norm, dim)
        self.eps = nn.Parameter(torch.zeros(()))
        self.eps2 = nn.Parameter(torch.zeros(())) if gate_neighbours else None
        self.own, self.relu, self.divide = own, relu, divide

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        own = {"eps": lambda: 1 + self.eps, "sigmoid": lambda: 1 + self.eps.sigmoid(), "gate": self.eps.sigmoid}[self.own]()
        neighbours = batch.mix(batch.adjacency, x.relu() if self.relu else x)
        if self.eps2 is not None:
            neighbours = self.eps2.sigmoid() * neighbours
        return x + self.norm(self.mlp(divided(own * x + neighbours, self.divide, batch))).relu()


class EdgeBiasAttention(nn.Module):
    """Multi-head attention in one graph, biased by pair features: x [N, D], edge [N, N, E] -> [N, D]. Pair features pass a
    feed-forward E -> 4E -> E and are projected to a bias a head. A mixing for TransformerLayer. Source: graph notebook, 13/4."""

    def __init__(self, dim: int, heads: int, edge_dim: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.edge_feedforward, self.bias = FeedForward(edge_dim, 4 * edge_dim), Linear(edge_dim, heads)

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        parts = (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.unflatten(1, (self.heads, -1)).transpose(0, 1) for part in parts)  # (H, N, D/H)
        bias = self.bias(self.edge_feedforward(edge.flatten(0, 1))).unflatten(0, edge.shape[:2])  # (N, N, H)
        logits = query @ key.mT / math.sqrt(query.shape[-1]) + bias.permute(2, 0, 1)
        return self.out((logits.softmax(-1) @ value).transpose(0, 1).flatten(1))


class EdgeProduct(nn.Module):
    """Scores of pairs from two heads of their features, multiplied as matrices: edge [N, N, E] -> [N, N]. kind "path" (the
    notebook's path attention): (E w1)(E w2), a sum over the nodes between i and j; "cluster": (E w1)(E w2)^T, the node axes of one
    head swapped, which compares the rows of i and j. shared: both heads are one, w1 = w2. Source: graph notebook, 24.3 and 13/4."""

    def __init__(self, edge_dim: int, kind: str, shared: bool = False):
        super().__init__()
        self.swap = {"path": False, "cluster": True}[kind]
        self.first = Linear(edge_dim, 1, bias=False)
        self.second = self.first if shared else Linear(edge_dim, 1, bias=False)

    def forward(self, edge: Tensor) -> Tensor:
        first, second = (head(edge.flatten(0, 1)).view(edge.shape[:2]) for head in (self.first, self.second))
        return first @ (second.mT if self.swap else second)


EDGE_ACTIVATIONS = {  # of scores [N, N]; "gaussian": of mean 0 and variance 1
    "none": lambda score: score / len(score),
    "relu": lambda score: score.relu() / len(score),
    "softmax": lambda score: score.softmax(-1),
    "gaussian": lambda score: (score - score.mean()) / (score.std() + 1e-5),
}


class EdgeLayer(nn.Module):
    """The notebook's "simple" transformer on pairs alone: features pass a feed-forward E -> 4E -> E, then the path attention of the
    result, through one of EDGE_ACTIVATIONS, is added to every channel; both with residuals: [N, N, E] -> [N, N, E]. activation
    "off": without path attention. Source: graph notebook, 13/4."""

    def __init__(self, edge_dim: int, activation: str = "none", shared: bool = False):
        super().__init__()
        self.feedforward = FeedForward(edge_dim, 4 * edge_dim)
        self.path = EdgeProduct(edge_dim, "path", shared) if activation != "off" else None
        self.activation = EDGE_ACTIVATIONS.get(activation)

    def forward(self, edge: Tensor) -> Tensor:
        edge = edge + self.feedforward(edge.flatten(0, 1)).view(edge.shape)
        return edge if self.path is None else edge + self.activation(self.path(edge))[..., None]


# %% 7 Models


class NodeClassifier(nn.Module):
    """Symbol one-hots (with `degree`: and the share of the graph that a node is joined to) -> Linear -> layers -> Linear to
    2 logits a node: GraphBatch -> [V, 2]. readout: "plain", or with a norm before it: "centred", "layer" or "batch"."""

    def __init__(self, layers: Sequence[nn.Module], dim: int, degree: bool = False, readout: str = "plain"):
        super().__init__()
        self.degree = degree
        self.embed = Linear(PATTERN_SYMBOLS + degree, dim)
        self.layers = nn.ModuleList(layers)
        self.readout_norm = make_norm("none" if readout == "plain" else readout, dim)
        self.readout = Linear(dim, 2)

    def forward(self, batch: GraphBatch) -> Tensor:
        x = F.one_hot(batch.feature, PATTERN_SYMBOLS).float()
        if self.degree:
            x = torch.cat([x, (batch.degree / (batch.size - 1)).unsqueeze(1)], 1)
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, batch)
        return self.readout(self.readout_norm(x))


def _transformer_layer(mixing: nn.Module, c: dict) -> nn.Module:
    before_mixing, _, before_feedforward = c["norm"].partition("/")
    norms = (before_mixing, before_feedforward or before_mixing)
    feedforward = FeedForward(c["dim"], c["hidden"], c["feedforward_norm"])
    norm_first = c.get("norm_order", "first") == "first"  # without norms a cell tells no order
    return TransformerLayer(mixing, feedforward, c["dim"], norms, norm_first, c["mixed_norm"])


def _position_layer(c: dict) -> nn.Module:
    distance, unreachable = c["distance"] == "on", -math.inf if c["unreachable"] == "shut" else c["unreachable"]
    how = (c["dim"], c["heads"], c["stack"], distance, c["activation"], unreachable, c["divide"])
    return _transformer_layer(PositionMixing(*how), c)


def _content_layer(c: dict) -> nn.Module:
    return _transformer_layer(ContentAttention(c["dim"], c["heads"], c["stack"] if c["distance"] == "on" else None), c)


def _gin_layer(c: dict) -> nn.Module:
    norms = c.get("mlp_norm", "batch"), c.get("between_norm", "batch")
    return GINLayer(c["dim"], *norms, divide=c["divide"], **GIN_KINDS[c["model"]])


GIN_KINDS = {  # what each changes of GIN; graph notebook, 9.3 and 13/3
    "gin": {},
    "sigmoid_gin": {"own": "sigmoid"},
    "modified_gin": {"own": "sigmoid", "gate_neighbours": True},
    "modified_gin_without_one": {"own": "gate", "gate_neighbours": True},
    "modified_gin_without_relu": {"own": "sigmoid", "gate_neighbours": True, "relu": False},
    "modified_gin_without_both": {"own": "gate", "gate_neighbours": True, "relu": False},
}
LAYERS = {"position": _position_layer, "content": _content_layer} | dict.fromkeys(GIN_KINDS, _gin_layer)


def build_model(config: dict, seed: int) -> NodeClassifier:
    """The node classifier that a config names (model, layers, dim, and what its layers read), initialised from the seed."""
    with initialised_from(seed):
        layers = [LAYERS[config["model"]](config) for _ in range(config["layers"])]
        return NodeClassifier(layers, config["dim"], config["degree"] == "on", config["readout"]).to(Runtime.device)


GATES = ("FALSE", "AND", "A AND NOT B", "A", "B AND NOT A", "B", "XOR", "OR",
         "NOR", "XNOR", "NOT B", "A OR NOT B", "NOT A", "B OR NOT A", "NAND", "TRUE", "RELU")  # fmt: skip
FROM_CORNERS = torch.tensor([[1.0, -1, -1, 1], [0, 0, 1, -1], [0, 1, 0, -1], [0, 0, 0, 1]])  # a row of 1, a, b, ab for each of the
# corners 00, 01, 10, 11: a truth table times this gives a gate's coefficients


def truth_table(gate: Tensor) -> Tensor:
    """Values of gates at (a, b) = (0, 0), (0, 1), (1, 0), (1, 1): [...] numbers in GATES -> [..., 4] float."""
    return (gate[..., None] >> torch.tensor([3, 2, 1, 0], device=gate.device) & 1).float()


class MixGates(torch.autograd.Function):
    """c0 + c1 a + c2 b + c3 ab, unit by unit: operands [S, 2, n, B], which are a and b, and c [S, n, 4] -> [S, n, B]."""

    @staticmethod
    def forward(ctx, operands: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(operands, c)
        (a, b), (c0, c1, c2, c3) = operands.unbind(1), c[..., None].unbind(-2)
        return (c1 * a).add_(c0).addcmul_(b, (c3 * a).add_(c2))  # addcmul is slow on what it must broadcast, the others are not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        operands, c = ctx.saved_tensors
        (a, b), (_, c1, c2, c3) = operands.unbind(1), c[..., None].unbind(-2)
        grad_a, grad_operands = grad * a, torch.empty_like(operands)
        grad_c = torch.stack([grad.sum(-1), grad_a.sum(-1), (grad * b).sum(-1), grad_a.mul_(b).sum(-1)], -1)
        for part, other, slope in ((grad_operands[:, 0], b, c1), (grad_operands[:, 1], a, c2)):
            torch.mul(c3, other, out=part).add_(slope).mul_(grad)
        return grad_operands, grad_c


class GateMixture(nn.Module):
    """S x n units, each a weighted sum of the same G gates of a and b, in their polynomial relaxations ("RELU" is relu(a)). Any
    mixture of the 16 is c0 + c1 a + c2 b + c3 ab: four coefficients stand for all. weight [S, n, G]: initial weights. form: "free"
    ones, "sum-1" (they over their sum) or "softmax" (of them). Source: logic journal; "softmax": Petersen et al. 2022."""

    def __init__(self, weight: Tensor, gates: Sequence[str] = GATES[:16], form: str = "free"):
        super().__init__()
        self.weight, self.form = nn.Parameter(weight), form
        self.number = torch.tensor([GATES.index(name) for name in gates])
        relu = (self.number == GATES.index("RELU")).float()[:, None]
        table = torch.cat([(1 - relu) * (truth_table(self.number) @ FROM_CORNERS), relu], 1)  # (G, 5): of 1, a, b, ab, relu(a)
        self.register_buffer("table", table if relu.any() else table[:, :4])

    def coefficients(self) -> Tensor:
        """[S, n, 4], or 5 with RELU."""
        weigh = {"softmax": lambda w: w.softmax(-1), "sum-1": lambda w: w / w.sum(-1, keepdim=True), "free": lambda w: w}
        return torch.bmm(weigh[self.form](self.weight), self.table.expand(len(self.weight), -1, -1))

    def hardened(self) -> Tensor:
        """Number in GATES of the gate that weighs most in each unit: [S, n]."""
        return self.number.to(self.weight.device)[self.weight.argmax(-1)]


class TruthTables(nn.Module):
    """S x n units, each a truth table of a and b with four free entries, sigmoids of logits [S, n, 4], and linear between them."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def coefficients(self) -> Tensor:
        """[S, n, 4]."""
        corners = self.logits.double().sigmoid().to(self.logits)  # in float32 the last bit hangs on the place in the array
        return torch.bmm(corners, FROM_CORNERS.to(self.logits).expand(len(self.logits), -1, -1))

    def hardened(self) -> Tensor:
        """Number in GATES of each unit's nearest truth table: [S, n]."""
        return (self.logits > 0).long() @ torch.tensor([8, 4, 2, 1], device=self.logits.device)


def normal_weights(rngs: Sequence[np.random.Generator], *shape: int, spread: float = 0.01) -> Tensor:
    """[S, *shape] from N(0, spread^2), each seed's part from its own generator."""
    return torch.from_numpy(np.stack([rng.normal(0, spread, shape) for rng in rngs])).float()


class DenseOperands(nn.Module):
    """Trained operands, as in the journal: a = A x + a0 and b = B x + b0, through `bound` where given: [S, m, B] -> [S, 2, n, B],
    or [S, 1, n, B] for a alone. weight [S, 2n, m] or [S, n, m], bias [S, 2n, 1] or [S, n, 1], units n."""

    def __init__(self, weight: Tensor, bias: Tensor, units: int, bound: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.weight, self.bias, self.units, self.bound = nn.Parameter(weight), nn.Parameter(bias), units, bound

    def forward(self, x: Tensor) -> Tensor:
        if HAS_ONEDNN and x.device.type == "cpu" and self.weight[0].numel() >= 1 << 16:  # wide: twice as fast as MKL's bmm on AMD
            products = [OneDNNLinear.apply(w, one.mT, None) for w, one in zip(self.weight, x, strict=True)]
            operands = torch.stack(products).add_(self.bias)
        else:
            operands = torch.baddbmm(self.bias, self.weight, x)
        operands = operands if self.bound is None else self.bound(operands)
        return operands.unflatten(1, (-1, self.units))


class WiredOperands(nn.Module):
    """Fixed operands: each unit reads two units of the layer below, [S, m, B] -> [S, 2, n, B]. wires [S, 2, n]: their numbers."""

    def __init__(self, wires: np.ndarray, inputs: int):
        super().__init__()
        self.register_buffer("wires", torch.from_numpy(wires))
        self.register_buffer("row", (self.wires + inputs * torch.arange(len(wires))[:, None, None]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.row).view(*self.wires.shape, -1)


def draw_wires(inputs: int, units: int, rng: np.random.Generator) -> np.ndarray:
    """Two different inputs for each unit, every input used about equally often: [2, n]. Raises ValueError for a single input and
    for more than can be used."""
    if inputs < 2 or 2 * units < inputs:
        raise ValueError(f"{units} units of two inputs cannot use {inputs} inputs")
    rounds = [rng.permutation(inputs) for _ in range(-(-2 * units // inputs))]
    first, second = rng.permutation(np.concatenate(rounds)[: 2 * units]).reshape(2, units)
    other = (first + rng.integers(1, inputs, units)) % inputs
    return np.stack([first, np.where(second == first, other, second)])


class GateLayer(nn.Module):
    """Operands, then gates of them: [S, m, B] -> [S, n, B], S networks at once."""

    def __init__(self, operands: nn.Module, gates: nn.Module):
        super().__init__()
        self.operands, self.gates = operands, gates

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.operands(x), self.gates.coefficients())

    @staticmethod
    def mix(operands: Tensor, c: Tensor) -> Tensor:
        """operands [S, 2, n, B], c [S, n, 4], or 5 with relu(a) -> [S, n, B]; operands [S, 1, n, B]: relu(a) alone."""
        if operands.shape[1] == 1:
            return c[..., 4:] * operands[:, 0].relu()
        mixed = MixGates.apply(operands, c[..., :4])
        return mixed if c.shape[-1] == 4 else mixed + c[..., 4:] * operands[:, 0].relu()

    def hardened(self, x: Tensor) -> Tensor:
        """As `forward`, with each unit's hardened gate."""
        return self.mix(self.operands(x), truth_table(self.gates.hardened()) @ FROM_CORNERS.to(x))


class GateNetwork(nn.Sequential):
    """Gate layers of S networks, one a seed, with a single unit at the end: [S, 9, B] -> [S, B]. Every product is a bmm, seed by
    seed, so that a seed's numbers are the same to the bit in any company."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)

    def hardened(self, x: Tensor) -> Tensor:
        """As `forward`, each unit one gate."""
        for layer in self:
            x = layer.hardened(x)
        return x.squeeze(1)


def dense_gate_network(sizes: Sequence[int], seeds: Sequence[int], gates: Sequence[str], form: str = "free",
                       start: str = "constant", spread: float = 0.01, bound: Callable | None = None) -> GateNetwork:  # fmt: skip
    """The journal's network: trained operands with weights and biases from N(0, spread^2), and weighted gates that start at 1 / G
    ("constant") or uniform and divided by their sum ("uniform")."""
    rngs, layers = [stream(seed, "init") for seed in seeds], []
    for inputs, units in itertools.pairwise(sizes):
        rows = units if set(gates) == {"RELU"} else 2 * units  # RELU has no b
        weight, bias = (normal_weights(rngs, rows, n, spread=spread) for n in (inputs, 1))
        mixture = torch.full((len(rngs), units, len(gates)), 1 / len(gates))
        if start == "uniform":
            mixture = torch.from_numpy(np.stack([rng.random((units, len(gates))) for rng in rngs])).float()
            mixture /= mixture.sum(-1, keepdim=True)
        layers.append(GateLayer(DenseOperands(weight, bias, units, bound), GateMixture(mixture, gates, form)))
    return GateNetwork(*layers).to(Runtime.device)


def wired_gate_network(sizes: Sequence[int], seeds: Sequence[int], form: str, share: float) -> GateNetwork:
    """The paper's network: random fixed wires, and gates that start as the pass-through A, by a share of 0.5 to 1: its weight in a
    softmax over the 16 (form "softmax"), or how right each entry of its truth table is (four sigmoids, form "table"). Raises
    ValueError for sizes that cannot be wired (`draw_wires`)."""
    rngs, layers, number, odds = [stream(seed, "init") for seed in seeds], [], torch.tensor(GATES.index("A")), share / (1 - share)
    for inputs, units in itertools.pairwise(sizes):
        wires = np.stack([draw_wires(inputs, units, rng) for rng in rngs])
        if form == "softmax":
            gates = GateMixture((math.log(15 * odds) * torch.eye(16)[number]).repeat(len(rngs), units, 1), form=form)
        else:
            gates = TruthTables((math.log(odds) * (2 * truth_table(number) - 1)).repeat(len(rngs), units, 1))
        layers.append(GateLayer(WiredOperands(wires, inputs), gates))
    return GateNetwork(*layers).to(Runtime.device)


# %% 8 Losses and metrics


def class_weighted_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy [V, 2], [V] -> scalar, each class weighted by the share of the other nodes, (V - n_c) / V; labels IGNORED
    are skipped. Source: the authors of PATTERN; without it a model gains by ignoring the small class."""
    count = torch.stack([(label == c).sum() for c in range(2)])
    total = count.sum()
    return F.cross_entropy(logits, label, weight=(total - count) / total, ignore_index=IGNORED)


def confusion(logits: Tensor, label: Tensor) -> Tensor:
    """[2, 2] counts, [true class, predicted class]. NaN logits predict class 0. IGNORED nodes are not counted."""
    scored = label != IGNORED
    return torch.bincount(2 * label[scored] + logits.argmax(1)[scored], minlength=4).view(2, 2)


def class_recalls(counts: Tensor) -> Tensor:
    """[..., 2, 2] counts -> [..., 2] share of each class that was found; one that does not occur counts 0, as in the benchmark."""
    return counts.diagonal(dim1=-2, dim2=-1) / counts.sum(-1).clamp(min=1)


def ranking_accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Area under the ROC curve, [V, 2], [V] -> scalar: the share of (class 1, class 0) pairs of nodes in the right order, ties
    half. Unlike balanced accuracy it has no threshold. NaN where a class does not occur."""
    margin = logits[:, 1] - logits[:, 0]
    low, high = margin[label == 0].sort().values, margin[label == 1]
    below, upto = torch.searchsorted(low, high), torch.searchsorted(low, high, right=True)
    return (below + upto).double().mean().float() / (2 * len(low))


def diverged_at(*curves: np.ndarray) -> float:
    """The first step at which one of the curves [..., T] is not finite, counted from 0; NaN if there is none."""
    finite = np.logical_and.reduce([np.isfinite(np.asarray(curve)) for curve in curves])
    return np.where(finite.all(-1), np.nan, finite.argmin(-1))[()]


# %% 9 Gradient log


class GradientLog:
    """Norms of every parameter at every step; reads only, so losses and weights are bit-identical with it or without. Call
    `before_step` between backward and the optimizer's step (it returns the total gradient norm, before any clipping), and
    `after_step` behind it. `curves()` then holds weight, gradient and update norms [T, P]; parameter p is `names[p]`."""

    def __init__(self, model: nn.Module):
        self.names, self.parameters = map(list, zip(*model.named_parameters(), strict=True))
        self.previous = [torch.empty_like(p) for p in self.parameters]
        self.rows: dict[str, list[Tensor]] = {"weight": [], "gradient": [], "update": []}

    @torch.no_grad()
    def before_step(self) -> Tensor:
        """Record weight and gradient norms; returns the total gradient norm, a scalar tensor."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        torch._foreach_copy_(self.previous, self.parameters)
        self.rows["weight"].append(torch.stack(torch._foreach_norm(self.parameters)))
        self.rows["gradient"].append(torch.stack(torch._foreach_norm(gradients)))
        return self.rows["gradient"][-1].norm()

    @torch.no_grad()
    def after_step(self) -> None:
        """Record how far each parameter moved."""
        torch._foreach_sub_(self.previous, self.parameters)
        self.rows["update"].append(torch.stack(torch._foreach_norm(self.previous)))

    def curves(self) -> dict[str, Tensor]:
        """weight, gradient and update norms, each [T, P] on the CPU."""
        return {name: torch.stack(rows).cpu() for name, rows in self.rows.items()}


def norms_by_module(names: Sequence[str], norms: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Join each module's weight and bias, other parameters stay alone: [T, P] -> names in model order, [T, names]."""
    module = [name.removesuffix(".weight").removesuffix(".bias") for name in names]
    order = list(dict.fromkeys(module))
    squares = np.square(np.asarray(norms, dtype=np.float64))
    return order, np.sqrt(np.stack([squares[:, [m == one for m in module]].sum(1) for one in order], 1))


def ratio_to_weight(curves: dict, norm: str = "gradient", by: str = "module") -> tuple[list[str], np.ndarray]:
    """grad/weight (norm "gradient") or update/weight ("update") from `train`'s curves, for each "parameter" or for each "module"
    (its weight and bias together): names, [T, names]. NaN where the weight is zero (a bias before its first step)."""
    names, above, below = curves["names"], np.asarray(curves[norm], np.float64), np.asarray(curves["weight"], np.float64)
    if by == "module":
        (_, above), (names, below) = norms_by_module(names, above), norms_by_module(names, below)
    return list(names), np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def ratio_summary(curves: dict) -> dict[str, float]:
    """What the notebook read off its grad/weight plots, as numbers. norm_level_by_parameter, norm_level_by_module: grad/weight of
    the largest norm over that of the largest other, at a typical (median) step; norm_wobble_by_...: the same for its mean change a
    step, in decades; in_band: share of steps at which the median module lies within 0.001 to 0.1; ratio_trend: that median in the
    last quarter of the run over that in the first."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a diverged run has nothing but NaN here, and says so elsewhere
        for by in ("parameter", "module"):
            names, ratio = ratio_to_weight(curves, by=by)
            is_norm = np.array(["norm" in name for name in names])
            level = np.nanmedian(ratio, axis=0)
            wobble = np.nanmean(np.abs(np.diff(np.log10(np.maximum(ratio, 1e-12)), axis=0)), axis=0)
            if is_norm.any():
                found[f"norm_level_by_{by}"] = level[is_norm].max() / level[~is_norm].max()
                found[f"norm_wobble_by_{by}"] = wobble[is_norm].max() / wobble[~is_norm].max()
        middle, quarter = np.nanmedian(ratio, axis=1), max(1, len(ratio) // 4)
        found["in_band"] = np.mean((middle > 1e-3) & (middle < 1e-1))
        found["ratio_trend"] = np.median(middle[-quarter:]) / np.median(middle[:quarter])
    return found


def score_summary(curves: dict) -> dict[str, float]:
    """What the notebook read off its score and gradient plots, as numbers, from `train`'s curves. best, final: of the mean of both
    recalls; jump, class_jump, auc_jump: mean absolute change an epoch, in the second half, of that score, of the gap between the
    recalls, and of the AUC; drift: typical change of the mean margin an epoch, in spreads of the margin; rise: mean score of the
    last quarter less that of the first; epochs_to_0.7 and onset (of the gradient's growth): the length of the run if never; spikes
    and growth: of the gradient norm."""
    recall, margin = curves["recall"].double().numpy(), curves["margin"].double().numpy()  # [epochs + 1, 2] both
    norm, auc = curves["gradient_norm"].double().numpy(), curves["auc"].double().numpy()
    balanced, gap = recall.mean(1), recall[:, 1] - recall[:, 0]
    half, quarter = len(balanced) // 2, max(1, len(balanced) // 4)
    reached, onset = np.flatnonzero(balanced >= 0.7), growth_onset(norm)
    return {
        "best": balanced[np.isfinite(balanced)].max(initial=0.0),
        "final": balanced[-1],
        "jump": np.abs(np.diff(balanced[half:])).mean(),
        "class_jump": np.abs(np.diff(gap[half:])).mean(),
        "auc_jump": np.abs(np.diff(auc[half:])).mean(),
        "drift": np.median(np.abs(np.diff(margin[half:, 0])) / margin[half:-1, 1]),
        "rise": balanced[-quarter:].mean() - balanced[:quarter].mean(),
        "epochs_to_0.7": reached[0] if len(reached) else len(balanced),
        "spikes": count_spikes(norm),
        "onset": len(norm) if math.isnan(onset) else onset,
        "growth": running_median(norm, 10).max() / running_median(norm[:10], 10)[0],
    }


def running_median(series: np.ndarray, window: int) -> np.ndarray:
    """Median of each `window` successive values: [T] -> [T - window + 1]; the median of all where there are fewer."""
    series = np.asarray(series, dtype=np.float64)
    return np.median(np.lib.stride_tricks.sliding_window_view(series, min(window, len(series))), axis=1)


def count_spikes(norm: np.ndarray, window: int = 20, factor: float = 5.0) -> int:
    """Steps whose gradient norm [T] exceeds `factor` times the median of the `window` steps before them. NaN counts as inf."""
    norm = np.nan_to_num(np.asarray(norm, dtype=np.float64), nan=math.inf, posinf=math.inf)
    if len(norm) <= window:
        return 0
    return int(np.sum(norm[window:] > factor * running_median(norm[:-1], window)))


def growth_onset(norm: np.ndarray, quiet: int = 10, factor: float = 3.0, hold: int = 5) -> float:
    """First step from which the gradient norm [T] stays above `factor` times the median of its first `quiet` steps for `hold`
    steps on end; NaN if it never does."""
    high = ~(np.asarray(norm, dtype=np.float64) <= factor * running_median(norm[:quiet], quiet)[0])  # NaN counts as high
    held = np.convolve(high, np.ones(hold, dtype=int))[hold - 1 : len(high)] == hold
    return float(np.argmax(held)) if held.any() else math.nan


# %% 10 Training

CHECKPOINT_SECONDS = 60.0


def train(model: nn.Module, batches: Sequence[GraphBatch], *, seed: int, lr: float, epochs: int, clip: float,
          warmup: int = 0, held_out: Sequence[GraphBatch] | None = None) -> dict:  # fmt: skip
    """Train with Adam on the class-weighted loss, one step a batch; the loop of every PATTERN experiment.

    Gradients are clipped to total norm `clip` (0: not at all); the learning rate climbs linearly over the first `warmup` steps.
    Returns

    - `loss` and `gradient_norm` (before clipping) [T], and the gradient log's `names` and `weight`, `gradient`, `update` [T, P];
    - after 0, 1, ... epochs, pooled over `held_out` (default: `batches`) in evaluation mode: `recall` of both classes and `margin`
      (mean and spread of logit 1 - logit 0), both [epochs + 1, 2], and `auc` [epochs + 1];
    - `diverged`: the first step with a loss or gradient that is not finite, NaN if there is none.

    A long run keeps its state in Runtime.checkpoint and goes on from there, with bit-identical results.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    log = GradientLog(model)
    curves: dict[str, list[Tensor]] = {name: [] for name in ("loss", "gradient_norm", "recall", "auc", "margin")}
    start = restore(model, optimizer, log, curves)
    # With one batch, the logits of a training pass may be those of an evaluation of the same weights. The first epoch tells: equal
    # to the bit, and not one constant (which a readout that starts at zero gives whatever the layers below do).
    one_batch, in_passing = len(batches) == 1 and held_out is None, False
    saved, scored = time.monotonic(), batches if held_out is None else held_out
    for epoch in range(start, epochs):
        if not in_passing:
            evaluated, label = evaluate(model, scored)
            score(evaluated, label, curves)
        model.train()
        for b in stream(seed, "order", epoch).permutation(len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (len(curves["loss"]) + 1) / max(warmup, 1))
            logits, loss, gradient_norm = training_step(model, batches[b], optimizer, log, clip)
            curves["loss"].append(loss)
            curves["gradient_norm"].append(gradient_norm)
            if in_passing:
                score(logits, batches[b].label, curves)
        if one_batch and epoch == start:
            in_passing = torch.equal(logits, evaluated) and bool((logits != logits[0]).any())
        if Runtime.checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(model, optimizer, log, curves, epoch + 1)
            saved = time.monotonic()
    score(*evaluate(model, scored), curves)
    result = {name: torch.stack(rows).cpu() for name, rows in curves.items()} | log.curves()
    return result | {"names": log.names, "diverged": diverged_at(result["loss"], result["gradient_norm"])}


def overfit(config: dict, seed: int, model: nn.Module | None = None) -> dict:
    """One trial of the notebook's overfit set-up: train on the first PATTERN graphs and score on the same. config: a cell of
    `overfit_flags`; model: by default `build_model(config, seed)`. Returns the curves of `train`, the scalars of `score_summary`
    and `ratio_summary`."""
    graphs = PatternData(seed).first(config["graphs"], config["order"])
    batches = batches_of(graphs, config["batch"], padding=config.get("norm_mask") == "off")
    model = model or build_model(config, seed)
    how = {"lr": config["lr"], "epochs": config["epochs"], "clip": config["clip"], "warmup": config.get("warmup", 0)}
    curves = train(model, batches, seed=seed, **how)
    return curves | ratio_summary(curves) | score_summary(curves)


def training_step(model: nn.Module, batch: GraphBatch, optimizer: torch.optim.Optimizer, log: GradientLog,
                  clip: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One logged, clipped step. Returns the logits and loss before it and the gradient norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(batch)
    loss = class_weighted_cross_entropy(logits, batch.label)
    loss.backward()
    gradient_norm = log.before_step()
    if clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, gradient_norm)
    optimizer.step()
    log.after_step()
    return logits.detach(), loss.detach(), gradient_norm


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[GraphBatch]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches, in evaluation mode."""
    model.eval()
    return torch.cat([model(batch) for batch in batches]), torch.cat([batch.label for batch in batches])


def score(logits: Tensor, label: Tensor, curves: dict[str, list[Tensor]]) -> None:
    """Append both class recalls, the AUC, and mean and spread of the margin (logit 1 - logit 0) to the curves; recalls and AUC are
    NaN once a logit is not finite, so that no divergence looks calm."""
    diverged = ~logits[label != IGNORED].isfinite().all()
    margin = (logits[:, 1] - logits[:, 0])[label != IGNORED]
    curves["margin"].append(torch.stack([margin.mean(), margin.std()]))
    curves["recall"].append(class_recalls(confusion(logits, label)).masked_fill(diverged, math.nan))
    curves["auc"].append(ranking_accuracy(logits, label).masked_fill(diverged, math.nan))


def train_until_no_better(config: dict, seed: int, model: nn.Module, graphs: Sequence[Graph], validate: Callable) -> dict:
    """Train a model in place on the class-weighted loss with Adam for config["epochs"], or until its rate falls below
    config["least_lr"]; it is halved behind more than config["patience"] epochs in a row that were no better. Each epoch batches the
    graphs anew. It ends with the weights that validate(model) -> float found best. Returns `loss_curve` and `val_curve`, by epoch.
    The state lies in Runtime.checkpoint after every epoch; a trial that was killed goes on from there, to the bit."""
    both = nn.ModuleDict({"now": model, "best": copy.deepcopy(model)})
    optimizer, log = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True), GradientLog(model)
    curves: dict[str, list[Tensor]] = {"loss_curve": [], "val_curve": []}
    epoch, size = restore(both, optimizer, log, curves), config["batch"]
    (group,) = optimizer.param_groups
    group["lr"] = config["lr"]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, config["patience"], threshold=0.0)
    for value in curves["val_curve"]:
        plateau.step(value)
    while epoch < config["epochs"] and group["lr"] >= config["least_lr"]:
        losses = []
        model.train()
        order = stream(seed, "order", epoch).permutation(len(graphs))
        for part in np.split(order, range(size, len(order), size)):
            batch = GraphBatch([graphs[i] for i in part], Runtime.device)
            losses.append(training_step(model, batch, optimizer, log, config["clip"])[1])
        for rows in log.rows.values():
            rows.clear()
        curves["loss_curve"].append(torch.stack(losses).mean())
        curves["val_curve"].append(torch.tensor(validate(model), dtype=torch.float64))
        plateau.step(curves["val_curve"][-1])
        if curves["val_curve"][-1] >= max(curves["val_curve"]):
            both["best"].load_state_dict(model.state_dict())
        epoch += 1
        if Runtime.checkpoint:
            save_checkpoint(both, optimizer, log, curves, epoch)
    model.load_state_dict(both["best"].state_dict())
    return {name: torch.stack(rows).cpu().numpy() for name, rows in curves.items()}


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, log: GradientLog, curves: dict, epoch: int) -> None:
    """Keep the state of a trial in progress in Runtime.checkpoint."""
    rows = {name: torch.stack(rows) for name, rows in (curves | log.rows).items() if rows}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows, "epoch": epoch}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(Runtime.checkpoint, buffer.getvalue())


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, log: GradientLog, curves: dict) -> int:
    """Load what `save_checkpoint` kept, if anything; returns the epoch to go on with. Raises UsageError for a damaged file."""
    path = Runtime.checkpoint
    if path is None or not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location=Runtime.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for rows in (curves, log.rows):
            rows.update({name: list(state["rows"][name]) for name in rows if name in state["rows"]})
        return int(state["epoch"])
    except Exception as error:  # torch raises many kinds for a cut, foreign or hostile file; all mean the same to the user
        raise UsageError(f"{path}: not a checkpoint of this trial ({type(error).__name__}); delete it or give --fresh") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file wholly or not at all; a failure (OSError) leaves the old one and no debris."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file
    finally:
        temporary.unlink(missing_ok=True)


def keep_arrays(kind: str, made_of: bytes, make: Callable[[], dict], folder: Path | None = None) -> dict[str, np.ndarray]:
    """The arrays that make() returns, from the folder (runs/) if this code has made them of the same bytes before. What is damaged
    there is made anew, and a place to keep it is a convenience."""
    digest = hashlib.sha256(code_fingerprint(__file__).encode() + made_of).hexdigest()[:16]
    path = (folder or REPOSITORY / "runs") / f"{kind}-{digest}.npz"
    damaged = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), np.load(path, allow_pickle=False) as stored:
        return dict(stored)
    arrays, content = make(), io.BytesIO()
    np.savez(content, **arrays)
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.getvalue())
    return arrays


def check_writable(flag: str, folder: Path) -> None:
    """Raise UsageError unless a file can be made in the folder; a missing folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write there ({error.strerror}); choose another place") from None


def interleaved_medians(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds a call of each arm, medians over rounds in which all arms take turns; two rounds more pay for pages and kernels."""
    times = {name: [] for name in arms}
    for round_number in range(rounds + 2):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if Runtime.device.type == "cuda":
                torch.cuda.synchronize()
            if round_number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def descend(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> None:
    """A step of plain gradient descent, in place."""
    torch._foreach_add_(parameters, gradients, alpha=-lr)


def train_on_life(
    network: nn.Module, seeds: Sequence[int], config: dict, update: Callable = descend, watch: Callable | None = None
) -> dict:
    """Fit S stacked networks to Conway's Life by the mean squared error on fresh batches, as the journal does. config: `steps`,
    `batch`, `alive`, `lr`; update(parameters, gradients, lr) changes the parameters; before it, watch(step, output, counts,
    gradients) may look, output and counts [S, 512]. Returns `loss` [S, steps + 1], exact, over all 512 neighbourhoods with their
    chances; `diverged` [S], the step at which a batch's loss was no longer finite, else NaN; `output` [S, 512]."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    inputs = torch.from_numpy(NEIGHBOURHOODS.T.copy()).to(Runtime.device).expand(len(seeds), 9, 512)
    target = torch.from_numpy(LIFE).to(Runtime.device)
    chance = torch.from_numpy(neighbourhood_chances(config["alive"])).float().to(Runtime.device).expand(len(seeds), 1, 512).mT
    batches = neighbourhood_batches(seeds, config["alive"], config["batch"])
    exact = torch.empty(config["steps"] + 1, len(seeds), device=Runtime.device)  # made at once: small blocks between large ones
    finite = torch.empty_like(exact, dtype=torch.bool)  # would keep the allocator from using these again
    for step in range(config["steps"] + 1):
        output = network(inputs)
        error, counts = output - target, next(batches)
        drawn = torch.where(counts > 0, error, 0.0)  # what was not drawn may overflow and does no harm yet
        exact[step] = torch.bmm(error.detach().square()[:, None], chance)[:, 0, 0]
        finite[step] = (counts * drawn.detach().square()).sum(1).isfinite()
        if step < config["steps"]:
            gradients = torch.autograd.grad(output, parameters, 2 / config["batch"] * counts * drawn.detach())
            if watch is not None:
                watch(step, output.detach(), counts, gradients)
            with torch.no_grad():
                update(parameters, gradients, config["lr"])
    finite = finite.T.cpu().numpy()
    diverged = np.where(finite.all(1), np.nan, finite.argmin(1))
    return {"loss": exact.T.cpu().numpy(), "diverged": diverged, "output": output.detach().cpu().numpy()}


def train_until_exact(network: GateNetwork, seeds: Sequence[int], config: dict, found: Callable[[int], None]) -> list[dict]:
    """Train S wired networks with AdamW until each, once hardened, is right on all 512 neighbourhoods. config: `lr`, `decay`,
    `steps`, `batch` (drawn from the 512 in turn, in a new order each time round; a divisor of 512). Every 20 steps all are checked,
    and found(row) is called where one is right for the first time. Returns for each seed, up to then: `exact`, `steps_to_exact`,
    `soft_loss`, the fewest neighbourhoods that were wrong, `least_wrong`, and how many were wrong once hardened when the soft
    network was first right, `wrong_when_soft_is_right` (NaN if never)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["lr"], weight_decay=config["decay"], betas=(0.9, 0.99))
    cells, target = (torch.from_numpy(array).to(Runtime.device) for array in (NEIGHBOURHOODS, LIFE))
    every, streams, batch = cells.T.expand(len(seeds), *cells.T.shape), [stream(seed, "order") for seed in seeds], config["batch"]
    start = {"exact": 0.0, "steps_to_exact": math.nan, "least_wrong": math.inf, "wrong_when_soft_is_right": math.nan}
    results = [dict(start) for _ in seeds]
    for step in range(config["steps"] + 1):
        if step % 20 == 0:
            with torch.no_grad():
                soft, hard = network(every), network.hardened(every)
            losses = (soft - target).square().cpu().numpy().mean(1).tolist()  # NumPy's, the same to the bit in any company
            soft_wrong = ((soft > 0.5) != (target > 0.5)).sum(1).tolist()
            for row, wrong in enumerate((hard != target).sum(1).tolist()):
                if (result := results[row])["exact"]:
                    continue
                result |= {"soft_loss": losses[row], "least_wrong": min(result["least_wrong"], wrong)}
                if soft_wrong[row] == 0 and math.isnan(result["wrong_when_soft_is_right"]):
                    result["wrong_when_soft_is_right"] = wrong
                if wrong == 0:
                    result |= {"exact": 1.0, "steps_to_exact": step}
                    found(row)
        if all(result["exact"] for result in results):
            break
        if (first := step * batch % 512) == 0:
            order = torch.from_numpy(np.stack([rng.permutation(512) for rng in streams])).to(cells.device)  # (S, 512)
        drawn = order[:, first : first + batch]
        optimizer.zero_grad()
        (network(cells[drawn].mT.contiguous()) - target[drawn]).square().mean(1).sum().backward()
        optimizer.step()
    return results


# %% 11 Statistics

VERDICTS = ("reproduced", "refuted", "inconclusive", "not tested")
CONFIDENCE = 0.95
ANY_BELOW, ANY_ABOVE = -math.inf, math.inf


def brief(x: float) -> str:
    """A number for the reader: three significant digits, thousands in full, a dash for NaN."""
    return "–" if math.isnan(x) else f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.3g}"


class Interval(NamedTuple):
    """An estimate with its 95% interval and the number of seeds behind it."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{brief(self.estimate)} [{brief(self.low)}, {brief(self.high)}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student-t interval of the mean; unbounded for fewer than two values, NaN if any value is NaN or infinite."""
    from scipy import stats

    values, n = np.asarray(values, dtype=np.float64), len(values)
    mean = float(values.mean()) if n and np.isfinite(values).all() else math.nan
    if n < 2 or math.isnan(mean):
        return Interval(mean, -math.inf, math.inf, n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(values: Sequence[float], base: Sequence[float] | float = 1.0) -> Interval:
    """Geometric mean of values / base (paired), Student-t on the logarithms; NaN unless all are positive and finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = mean_interval(np.log(np.asarray(values, dtype=np.float64)) - np.log(np.asarray(base, dtype=np.float64)))
        return Interval(*(float(np.exp(x)) for x in logs[:3]), logs.n)


def rate_interval(hits: Sequence[float]) -> Interval:
    """Exact (Clopper-Pearson) interval of the share of ones."""
    from scipy import stats

    hits = np.asarray(hits)
    found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(hits.mean()), float(found.low), float(found.high), len(hits))


def rate_difference_p(hits: Sequence[float], base: Sequence[float]) -> float:
    """Fisher's exact two-sided p that two rates are the same."""
    from scipy import stats

    table = [[int(np.sum(x)), len(x) - int(np.sum(x))] for x in (hits, base)]
    return float(stats.fisher_exact(table).pvalue)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's; zero where one of them never changes."""
    from scipy import stats

    return float(stats.spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def fitted_power(sizes: Sequence[float], values: Sequence[Sequence[float]]) -> np.ndarray:
    """The power of the size with which values [sizes, S] grow, a straight line on logarithms: [S]."""
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


def crossing(sizes: Sequence[float], ratios: Sequence[Sequence[float]]) -> np.ndarray:
    """The size at which ratios [sizes, S] first rise through 1, interpolated on logarithms; NaN where they do not: [S]."""
    rising = np.maximum.accumulate(np.log(ratios)).T
    return np.exp([np.interp(0, one, np.log(sizes), np.nan, np.nan) for one in rising])


@dataclass(frozen=True)
class Check:
    """One measurable part of a claim: where the notebook's words put a number. metric: a scalar of the trial; claimed: the open
    range (low, high) in which the claim puts its mean; cell: the arm, as far as it differs from the notebook's own settings (None:
    a derived metric, of several arms); versus: a second arm with the same seeds, whose values are taken off seed by seed. scale
    "ratio": geometric means instead, and values are divided; "rate": a 0/1 metric, exact intervals and an exact test. unless: a
    0/1 metric; a seed for which it is 1 in one of the arms is left out."""

    metric: str
    claimed: tuple[float, float]
    cell: dict | None = field(default_factory=dict)
    versus: dict | None = None
    scale: str = "difference"
    unless: str = ""

    def judge(self, values: Sequence[float], base: Sequence[float] | None = None) -> tuple[str, Interval]:
        """Verdict and interval for the arm's values, one a seed (and, with `versus`, for those of the other arm, same seeds)."""
        low, high = self.claimed
        if self.scale == "rate":
            found = rate_interval(values)
            if base is not None:  # two rates: the sign of the difference, if an exact test finds one
                difference, decided = found.estimate - float(np.mean(base)), rate_difference_p(values, base) < 1 - CONFIDENCE
                found = Interval(difference, *((difference, difference) if decided else (-1.0, 1.0)), len(values))
        elif self.scale == "ratio":
            found = ratio_interval(values, 1.0 if base is None else base)
        else:
            found = mean_interval(np.asarray(values) - (0.0 if base is None else np.asarray(base)))
        if math.isnan(found.estimate):
            return "inconclusive", found
        if low < found.low and found.high < high:
            return "reproduced", found
        return ("refuted" if found.high <= low or found.low >= high else "inconclusive"), found


@dataclass(frozen=True)
class Claim:
    """A statement of the notebook, where it stands there, and the checks that decide it. It is reproduced if every check is,
    refuted if one is refuted, not tested if the run lacks a cell of one, else inconclusive."""

    text: str
    source: str
    checks: Sequence[Check]


def combine(verdicts: Sequence[str]) -> str:
    """The verdict of a claim from those of its checks."""
    if "not tested" in verdicts:
        return "not tested"
    if "refuted" in verdicts:
        return "refuted"
    return "reproduced" if all(v == "reproduced" for v in verdicts) else "inconclusive"


# %% 12 Flags and grids


def at_least(minimum: float, kind: type = int, above: bool = False, below: float = math.inf) -> Callable[[str], float]:
    """Reader of a finite number >= minimum (> minimum with `above`) and < below, int or float."""

    def read(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and minimum <= value < below) or (above and value == minimum):
            raise ValueError
        return value

    bounds = [f" {'>' if above else '>='} {minimum:g}"] * math.isfinite(minimum) + [f" < {below:g}"] * math.isfinite(below)
    read.expects = f"a{'n integer' if kind is int else ' number'}{' and'.join(bounds)}"
    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """Reader of one word among choices."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    read.expects = " or ".join(choices)
    return read


def integers(minimum: int, ascending: bool = False) -> Callable[[str], tuple[int, ...]]:
    """Reader of integers >= minimum joined by commas ("48,48"); ascending: and none twice ("0,1,2")."""

    def read(text: str) -> tuple[int, ...]:
        found = tuple(int(word) for word in text.split(","))
        if min(found) < minimum or (ascending and list(found) != sorted(set(found))):
            raise ValueError
        return found

    read.expects = f"integers >= {minimum} joined by commas" + ", ascending, none twice" * ascending
    return read


def or_word(read_number: Callable[[str], float], *words: str) -> Callable[[str], float | str]:
    """Reader of one of the words, or of a number."""

    def read(text: str) -> float | str:
        return text if text in words else read_number(text)

    read.expects = " or ".join([read_number.expects, *words])
    return read


powers_list, widths, probability = integers(0, ascending=True), integers(1), at_least(0.0, float, above=True, below=1.0)


@dataclass(frozen=True)
class Flag:
    """A hyperparameter: a reader of one value, the values of the logbook of record (the notebook's own first), and help."""

    name: str
    read: Callable
    default: tuple
    help: str

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def norm_slots(text: str) -> str:
    """Reader of the norms before mixing and before feed-forward: one word, or two joined by a slash ("batch/layer")."""
    slots = text.split("/")
    if len(slots) > 2 or len(set(slots)) < len(slots) or not set(slots) <= {"layer", "batch", "none"}:
        raise ValueError
    return text


norm_slots.expects = "layer, batch or none, or two of them joined by a slash"


# A logit, or a logit of -inf, which argparse would take for a flag; what sums are divided by.
logit_or_shut = or_word(at_least(-math.inf, float), "shut")
divisor = or_word(at_least(0.0, float, above=True), "degree", "root-degree")

OVERFIT_FLAGS = (
    Flag("model", one_of(*LAYERS), ("position",), "layers of this kind"),
    Flag("activation", one_of("sigmoid", "softmax"), ("sigmoid",), "gating, or averaging"),
    Flag("layers", at_least(1), (4,), "layers"),
    Flag("lr", at_least(0.0, float, above=True), (1e-4,), "Adam's learning rate"),
    Flag("stack", powers_list, ((0, 1),), "adjacency powers that a pair's weight sees"),
    Flag("distance", one_of("on", "off"), ("on",), "hop one-hots instead of the powers themselves"),
    Flag("unreachable", logit_or_shut, ("shut",), "logit of pairs that no power connects; a number is learned from there"),
    Flag("norm", norm_slots, ("layer",), "norm before mixing / before feed-forward"),
    Flag("norm-order", one_of("first", "last"), ("first",), "these norms first, or behind the residuals"),
    Flag("mixed-norm", one_of("none", "layer", "batch"), ("none",), "norm behind mixing, before the residual"),
    Flag("divide", divisor, (1.0,), "what a layer sums over nodes is divided by this"),
    Flag("norm-mask", one_of("on", "off"), ("on",), "norms see real nodes only, or padding too"),
    Flag("feedforward-norm", one_of("none", "batch"), ("none",), "norm inside the feed-forward, before its ReLU"),
    Flag("readout", one_of("plain", "centred", "layer", "batch"), ("plain",), "norm before it; centred: less the nodes' mean"),
    Flag("degree", one_of("off", "on"), ("off",), "give each node its degree as an input"),
    Flag("dim", at_least(1), (100,), "width"),
    Flag("heads", at_least(1), (1,), "heads"),
    Flag("hidden", at_least(1), (600,), "width inside the feed-forward"),
    Flag("graphs", at_least(1), (32,), "training graphs"),
    Flag("batch", at_least(1), (32,), "graphs a step"),
    Flag("order", one_of("stored", "shuffled"), ("stored",), "stored: all graphs share one pattern; shuffled: they mix 100"),
    Flag("epochs", at_least(2), (200,), "passes over the graphs"),
    Flag("clip", at_least(0.0, float), (5.0,), "largest gradient norm; 0: no clipping"),
)
TRANSFORMER_ONLY = ("activation", "stack", "distance", "unreachable", "heads", "hidden",
                    "norm", "norm_order", "mixed_norm", "feedforward_norm")  # fmt: skip


def choose_flags(flags: Sequence[Flag], without: Sequence[str] = (), **defaults: tuple) -> list[Flag]:
    """The flags of a set-up, with other defaults where given; `without` names keys to leave out. KeyError for one that is none."""
    if unknown := {*without, *defaults} - {flag.key for flag in flags}:
        raise KeyError(f"no such flags: {', '.join(sorted(unknown))}")
    return [replace(flag, default=defaults.get(flag.key, flag.default)) for flag in flags if flag.key not in without]


overfit_flags = functools.partial(choose_flags, OVERFIT_FLAGS)


def require_heads(config: dict, even: bool = False) -> None:
    """Raise UsageError unless the heads divide the width (`even`: into parts of even width)."""
    if config["dim"] % (config["heads"] * (1 + even)):
        raise UsageError(f"--heads {config['heads']}: must divide --dim {config['dim']}" + ", into even parts" * even)


def overfit_cell(config: dict) -> dict:
    """A cell of `overfit_flags` without what its model does not read. Raises UsageError for what contradicts itself."""
    if config["graphs"] > len(PatternData(0)):
        raise UsageError(f"--graphs {config['graphs']}: the training split has {len(PatternData(0))}")
    if config["model"] in GIN_KINDS:
        return {key: value for key, value in config.items() if key not in TRANSFORMER_ONLY}
    require_heads(config)
    unread = {"activation", "unreachable", "divide"} if config["model"] == "content" else set()
    if config["model"] == "content" and config["distance"] == "off":
        unread |= {"stack"}
    if config["norm"] == "none":
        unread |= {"norm_order"} | ({"norm_mask"} if config["feedforward_norm"] == "none" else set())
    return {key: value for key, value in config.items() if key not in unread}


@dataclass(frozen=True)
class Experiment:
    """What a script is made of. trial(config, seed) returns scalars and curves (arrays) and depends on nothing else; with `stack`,
    trial(config, seeds) takes up to that many seeds as one tensor program and returns a list. cell(config) drops from a cell of the
    grid what it does not use, and raises UsageError for what contradicts. figures(run) and headline(run) show the finding. metrics
    are the columns of the table, the main one first. smoke holds tiny values for a trial run. derived(run) computes metrics that
    need several cells, a value a seed; without those whose cells the run lacks. Checks may name them. memory(cell) is told and
    checked before the start: the flag that decides, and the MB that a trial needs. seeds: their number unless the user says."""

    file: str
    doc: str
    flags: Sequence[Flag]
    trial: Callable[[dict, int], dict]
    claims: Sequence[Claim]
    figures: Callable
    headline: Callable
    metrics: Sequence[str]
    smoke: dict
    cell: Callable[[dict], dict] = dict
    derived: Callable[["Run"], dict[str, Sequence[float]]] = lambda run: {}
    memory: Callable[[dict], tuple[str, float]] = lambda cell: ("", 0.0)
    stack: int = 0
    seeds: int = 5

    def run(self, config: dict, seeds: Sequence[int]) -> list[dict]:
        """The trial of every seed."""
        return self.trial(config, seeds) if self.stack else [self.trial(config, seed) for seed in seeds]

    @property
    def name(self) -> str:
        return Path(self.file).stem.removeprefix("exp_")

    @property
    def quick(self) -> list[str]:
        """The arguments of a quick run, from the docstring's "Quick" line; none where the defaults are quick enough."""
        found = re.search(r"^Quick\s+`(.+)`", self.doc, re.MULTILINE)
        return shlex.split(found[1]) if found else []

    @property
    def entry(self) -> str:
        """Which notebook entry this re-runs, from the docstring's "Entry" line."""
        return re.search(r"^Entry\s+(.+)$", self.doc, re.MULTILINE)[1]


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, not a page."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message} (see --help)")


def reader(read: Callable) -> Callable:
    """A Flag's reader for argparse: says what was expected."""

    def convert(text: str):
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {read.expects}") from None

    return convert


def make_parser(experiment: Experiment) -> Parser:
    """The experiment's flags and those that all experiments share."""
    parser = Parser(Path(experiment.file).name, description=textwrap.dedent(experiment.doc), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    grid = parser.add_argument_group("hyperparameters", "One or more values each; several make a grid, crossed with the seeds.")
    for flag in experiment.flags:
        expects = f": {flag.read.expects}" if hasattr(flag.read, "expects") else ""
        shown = " ".join(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in flag.default)
        grid.add_argument(
            f"--{flag.name}", nargs="+", type=reader(flag.read), metavar="V",
            help=f"{flag.help}{expects} (default {shown})".replace("%", "%%"),
        )  # fmt: skip
    run = parser.add_argument_group("run")
    seeds = f"number of seeds, paired over all arms (default {experiment.seeds})"
    run.add_argument("--seeds", type=reader(at_least(1)), default=experiment.seeds, help=seeds)
    run.add_argument("--first-seed", type=reader(at_least(0)), default=0, help="seeds count from here (default 0)")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--threads", type=reader(at_least(1)), default=1, help="threads of one process (default 1)")
    run.add_argument("--jobs", type=reader(at_least(1)), help="processes (default: one a core; torchrun decides for itself)")
    run.add_argument("--smoke", action="store_true", help="a tiny run that touches neither logbook nor plots")
    run.add_argument("--quick", action="store_true", help="a cheap run that says which verdicts are those of the logbook")
    run.add_argument("--fresh", action="store_true", help="run every trial again, finished or not")
    run.add_argument("--reuse", action="store_true", help="accept finished trials that other code made; the entry says so")
    record = parser.add_argument_group("record")
    record.add_argument("--note", default="", help="the entry's Reading: what the numbers mean, two to four sentences")
    record.add_argument("--tag", default="", help="a word for the entry's heading")
    record.add_argument("--no-log", action="store_true", help="print the entry, append nothing")
    record.add_argument("--once", action="store_true", help="append nothing if this very run, of this code, has an entry")
    record.add_argument("--logbook", type=Path, default=REPOSITORY / "logbook_old.md")
    record.add_argument("--plots", type=Path, default=REPOSITORY / "plots")
    record.add_argument("--runs", type=Path, default=REPOSITORY / "runs", help="where finished trials are kept")
    return parser


def expand_grid(experiment: Experiment, options: argparse.Namespace) -> list[dict]:
    """Every combination of flag values, baseline first, as cells without what they do not use, none twice. Raises UsageError for a
    value given twice, a cell that contradicts itself, and a flag that was given but no cell uses."""
    values = {}
    for flag in experiment.flags:
        given = getattr(options, flag.key)
        if given is not None and len(set(given)) < len(given):
            raise UsageError(f"--{flag.name}: a value stands twice; name each once")
        values[flag.key] = given or (experiment.smoke if options.smoke else {}).get(flag.key, flag.default)
    cells = [experiment.cell(dict(zip(values, combination, strict=True))) for combination in itertools.product(*values.values())]
    for flag in experiment.flags:
        if getattr(options, flag.key) is not None and all(flag.key not in cell for cell in cells):
            raise UsageError(f"--{flag.name}: no cell of this grid uses it; drop it or change what excludes it")
    return [cell for i, cell in enumerate(cells) if cell not in cells[:i]]


def defaults_of(experiment: Experiment, options: argparse.Namespace) -> dict[str, tuple]:
    """What stands in for the flags' own defaults, and so in the claims' arms, in a smoke or a quick run."""
    if options.quick:
        told = make_parser(experiment).parse_args(experiment.quick)
        return {flag.key: given for flag in experiment.flags if (given := getattr(told, flag.key)) is not None}
    return experiment.smoke if options.smoke else {}


def notebook_cell(experiment: Experiment, defaults: dict[str, tuple], **changes) -> dict:
    """The notebook's own settings (each flag's first default, or that of `defaults`) with some changed, as a cell of the grid."""
    settings = {flag.key: defaults.get(flag.key, flag.default)[0] for flag in experiment.flags}
    return experiment.cell(settings | changes)


def varying(cells: Sequence[dict]) -> list[str]:
    """The keys in which cells differ, in grid order."""
    keys = dict.fromkeys(key for cell in cells for key in cell)
    return [key for key in keys if len({cell[key] for cell in cells if key in cell}) > 1]


def cell_name(cell: dict, keys: Sequence[str]) -> str:
    """A cell in words, models and activations without their flag (a model with an activation goes by that): "sigmoid, layers 4"."""
    told = [key for key in keys if key in cell and not (key == "model" and "activation" in cell and "activation" in keys)]
    shown = {key: ",".join(map(str, v)) if isinstance(v := cell[key], tuple) else f"{v}" for key in told}
    words = [v if key in ("model", "activation") else f"{key} {v}" for key, v in shown.items()]
    return ", ".join(word.replace("_", " ") for word in words) or "as in the command"


# %% 13 Trials


class Trial(NamedTuple):
    """A cell of the grid with one seed, and where its record lies."""

    config: dict
    seed: int
    path: Path


class Run(NamedTuple):
    """A finished grid: cells in order, seeds, and result[cell][seed]: scalars as floats, curves as arrays."""

    cells: list[dict]
    seeds: list[int]
    results: list[list[dict]]
    seconds: float  # of computing, summed over trials
    foreign: int  # trials reused from other code

    def values(self, cell: int, metric: str) -> list[float]:
        """One metric of one cell, a value a seed."""
        return [result[metric] for result in self.results[cell]]


def only(run: Run, cells: Sequence[int]) -> Run:
    """The run cut down to some of its cells."""
    return run._replace(cells=[run.cells[i] for i in cells], results=[run.results[i] for i in cells])


def extremes(run: Run, metric: str) -> str:
    """The arms with the largest and the smallest mean of a metric, in words."""
    keys = varying(run.cells)
    mean = {cell_name(cell, keys): float(np.mean(run.values(i, metric))) for i, cell in enumerate(run.cells)}
    mean = {name: value for name, value in mean.items() if math.isfinite(value)} or {"every arm": math.nan}
    most, least = max(mean, key=mean.get), min(mean, key=mean.get)
    if brief(mean[most]) == brief(mean[least]):
        return brief(mean[most])
    return f"most with {most} ({brief(mean[most])}), least with {least} ({brief(mean[least])})"


def trial_key(config: dict, seed: int) -> str:
    """Twelve hex digits that name a trial; the device and its threads are part of it, since they decide the last bits."""
    where = [Runtime.device.type, Runtime.threads]
    return hashlib.sha256(json.dumps([config, seed, where], sort_keys=True).encode()).hexdigest()[:12]


def pack_record(result: dict, meta: dict) -> bytes:
    """A finished trial as npz: scalars in `meta`, curves as float32 or text arrays. No pickle."""
    arrays = {k: np.asarray(v) for k, v in result.items() if np.ndim(v)}
    arrays = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    scalars = {k: float(v) for k, v in result.items() if k not in arrays}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, meta=np.array(json.dumps(meta | {"scalars": scalars})), **arrays)
    return buffer.getvalue()


def read_record(path: Path) -> tuple[dict, dict]:
    """(result, meta) of a finished trial. Raises UsageError if the file is cut, damaged, or of another trial."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        if path.name != f"{meta['key']}-{meta['code']}.npz":
            raise ValueError
        return arrays | meta["scalars"], meta
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: damaged, or not a record of this trial; delete it or give --fresh") from error


def resumed(function: Callable[[int], np.ndarray], count: int) -> list[np.ndarray]:
    """function(0), function(1), .. of a trial that takes long: count vectors of numbers, kept in Runtime.checkpoint now and
    then, and what is found there is not computed again. Raises UsageError for a damaged file."""
    path, rows, saved = Runtime.checkpoint, [], time.monotonic()
    if path and path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = np.split(file["values"], file["lengths"].cumsum()[:-1])
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            fix = f"not a checkpoint of this trial ({type(error).__name__}); delete it or give --fresh"
            raise UsageError(f"{path}: {fix}") from error
    for i in range(len(rows), count):
        rows.append(np.asarray(function(i), dtype=float))
        if path and time.monotonic() - saved > CHECKPOINT_SECONDS:
            buffer = io.BytesIO()
            np.savez(buffer, values=np.concatenate(rows), lengths=[len(row) for row in rows])
            write_atomically(path, buffer.getvalue())
            saved = time.monotonic()
    return rows


def run_together(experiment: Experiment, trials: Sequence[Trial]) -> None:
    """Run trials of one cell, stacked if there are several, and keep their records."""
    gc.collect()  # hooks tie a model to itself; without this the last trials' tensors stay for long
    Runtime.checkpoint = trials[0].path.with_suffix(".checkpoint")
    started, environment = time.perf_counter(), environment_stamp()
    results = experiment.run(trials[0].config, [trial.seed for trial in trials])
    seconds = (time.perf_counter() - started) / len(trials)
    for trial, result in zip(trials, results, strict=True):
        key, _, code = trial.path.stem.partition("-")
        meta = {"key": key, "code": code, "config": trial.config, "seed": trial.seed, "seconds": seconds}
        write_atomically(trial.path, pack_record(result, meta | {"environment": environment}))
    Runtime.checkpoint.unlink(missing_ok=True)
    Runtime.checkpoint = None


def grouped(experiment: Experiment, trials: Sequence[Trial]) -> list[list[int]]:
    """Numbers of the trials that run together: `stack` seeds of a cell, or each by itself."""
    size, groups = max(experiment.stack, 1), []
    for _, cell in itertools.groupby(range(len(trials)), key=lambda i: id(trials[i].config)):
        numbers = list(cell)
        groups += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return groups


def list_trials(experiment: Experiment, cells: list[dict], options: argparse.Namespace, code: str) -> list[Trial]:
    """Every trial of the grid, cell by cell, seed by seed; deletes what `--fresh` discards. UsageError for a damaged record."""
    folder = options.runs / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    for shared in options.runs.glob("model-*.npz") if options.fresh else ():
        shared.unlink(missing_ok=True)
    trials = []
    for cell, seed in itertools.product(cells, range(options.first_seed, options.first_seed + options.seeds)):
        key = trial_key(cell, seed)
        path = folder / f"{key}-{code}.npz"
        if options.reuse and not path.exists():
            path = max(folder.glob(f"{key}-*.npz"), key=lambda p: p.stat().st_mtime, default=path)
        if options.fresh:
            path.unlink(missing_ok=True)
            path.with_suffix(".checkpoint").unlink(missing_ok=True)
        elif path.exists():
            read_record(path)
        trials.append(Trial(cell, seed, path))
    return trials


class LostProcessError(Exception):
    """Another process of this run died."""


class Ranks:
    """The processes of a run: those that torchrun started, or this one and the helpers that it starts. They take trials from a
    shared counter, so that uneven trials balance, and send what they finish to rank 0; no shared disk is needed."""

    def __init__(self, helper: Sequence[str] = (), helpers: int = 0):
        """`helper` is the command line of each of the `helpers` processes to be started beside this one."""
        self.rank, self.world, self.store, self.helpers = 0, 1, None, []
        if helpers or under_torchrun():
            import torch.distributed as dist

            self.dist = dist
            if helpers:
                self.world = 1 + helpers
                self.store = dist.TCPStore("localhost", 0, self.world, is_master=True, wait_for_workers=False)
                shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(self.world)}
                for rank in range(1, self.world):
                    self.helpers.append(subprocess.Popen(helper, env=os.environ | shared | {"RANK": str(rank)}))
            else:
                self.store, self.rank, self.world = next(dist.rendezvous("env://"))
            patience = datetime.timedelta(days=7)  # rank 0 may still be at its last trial
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world, timeout=patience)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside the block a broken connection means that another process died: LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(f"a process of this run died ({str(error).splitlines()[0][:80]})") from error

    def claim(self, count: int) -> Iterator[int]:
        """Numbers 0 .. count - 1, each given to one rank alone. The list is the full one, so a restart claims the same trials."""
        if self.store is None:
            yield from range(count)
            return
        while True:
            with self.together():
                number = self.store.add("trials claimed", 1) - 1
            if number >= count:
                return
            yield number

    def agree(self, done: list[bool]) -> list[bool]:
        """Which trials at least one rank holds."""
        if self.store is None:
            return done
        flags = torch.tensor(done, dtype=torch.int32)
        with self.together():
            self.dist.all_reduce(flags, op=self.dist.ReduceOp.MAX)
        return flags.bool().tolist()

    def gather(self, trials: Sequence[Trial]) -> None:
        """Send every record that rank 0 lacks to rank 0, over gloo, and end the group."""
        if self.store is None:
            return
        held = torch.tensor([trial.path.exists() for trial in trials])
        holder = torch.where(held, self.rank, self.world).to(torch.int32)
        with self.together():
            self.dist.all_reduce(holder, op=self.dist.ReduceOp.MIN)  # the lowest rank that holds a record sends it
            for trial, source in zip(trials, holder.tolist(), strict=True):
                if source not in (0, self.world) and self.rank in (0, source):
                    self.send(trial, source)
            self.dist.barrier()
            self.dist.destroy_process_group()
        for helper in self.helpers:
            helper.wait()

    def send(self, trial: Trial, source: int) -> None:
        """The sender's and the receiver's part of moving one record to rank 0."""
        if self.rank == source:
            content = torch.frombuffer(bytearray(trial.path.read_bytes()), dtype=torch.uint8)
            self.dist.send(torch.tensor([len(content)]), 0)
            self.dist.send(content, 0)
        else:
            size = torch.zeros(1, dtype=torch.int64)
            self.dist.recv(size, source)
            content = torch.empty(int(size), dtype=torch.uint8)
            self.dist.recv(content, source)
            write_atomically(trial.path, content.numpy().tobytes())


def under_torchrun() -> bool:
    """True if this process is one of several that something else started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def run_trials(experiment: Experiment, trials: Sequence[Trial], ranks: Ranks) -> None:
    """Run what no rank has finished yet; rank 0 then holds every record."""
    from tqdm import tqdm

    done = ranks.agree([trial.path.exists() for trial in trials])
    metric, groups = experiment.metrics[0], grouped(experiment, trials)
    with tqdm(total=len(trials), initial=sum(done), unit="trial", disable=None if ranks.rank == 0 else True) as bar:
        for number in ranks.claim(len(groups)):
            if missing := [trials[i] for i in groups[number] if not done[i]]:
                run_together(experiment, missing)
                bar.update(len(missing))
                bar.set_postfix({metric: f"{read_record(missing[-1].path)[0][metric]:.3f}"})
    ranks.gather(trials)


def collect(trials: Sequence[Trial], code: str) -> Run:
    """Read the records of a whole grid. Raises UsageError if one is missing."""
    records = []
    for trial in trials:
        if not trial.path.exists():
            raise UsageError(f"{trial.path}: this record vanished during the run; the same command makes it again")
        records.append(read_record(trial.path))
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    cells = [trial.config for trial in trials[:: len(seeds)]]
    results = [[result for result, _ in records[i : i + len(seeds)]] for i in range(0, len(records), len(seeds))]
    foreign = sum(meta["code"] != code for _, meta in records)
    return Run(cells, seeds, results, sum(meta["seconds"] for _, meta in records), foreign)


# %% 14 Plots

COLOURS = {"sigmoid": "#0072B2", "softmax": "#D55E00", "gin": "#009E73"}  # one arm, one colour, in all figures
COLOURS |= {"class 0": "#56B4E9", "class 1": "#CC79A7", "AUC": "#000000", "path": "#117733", "cluster": "#AA4499"}
SPARE_COLOURS = ("#E69F00", "#882255", "#999999", "#332288", "#8C564B", "#44AA99")


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """The same colour for the same arm in every figure: that of the first known word in its name; spare ones for the others, in
    order."""
    spare = itertools.cycle(SPARE_COLOURS)
    return {name: next((c for word, c in COLOURS.items() if word in name), None) or next(spare) for name in dict.fromkeys(names)}


class Figure(NamedTuple):
    """A figure to be saved: its kind (part of the file name), the finding as alt text, its numbers as named columns, and texts to
    be saved beside it, as pairs of suffix and content."""

    kind: str
    figure: "object"
    finding: str
    columns: dict[str, Sequence]
    texts: Sequence[tuple[str, str]] = ()


def pyplot():
    """matplotlib.pyplot in the house style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"figure.dpi": 130, "font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    plt.rcParams.update(style | {"figure.constrained_layout.use": True, "axes.formatter.min_exponent": 4})  # 300, not 3 x 10^2
    return plt


def panel_grid(panels: Sequence[str], across: int, height: float, x: str, y: str, log: str = "") -> tuple:
    """A figure with `across` panels in a row, on shared axes, and these by name. `log` names logarithmic ones: "x", "y", "xy"."""
    down, width = math.ceil(len(panels) / across), max((4.2 if across < 3 else 3.4) * across, 7.0)
    figure, grid = pyplot().subplots(down, across, figsize=(width, height * down + 1.2), sharex=True, sharey=True, squeeze=False)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        axes.set_visible(panel is not None)
        axes.set(title=textwrap.fill(panel or "", 36 if across < 3 else 30) if len(panels) > 1 else "")
        axes.set(**{f"{axis}scale": "log" if axis in log else "linear" for axis in "xy"})
    for axes in grid.flat[max(len(panels) - across, 0) : len(panels)]:  # the lowest panel of each column
        axes.set_xlabel(x)
        axes.tick_params(labelbottom=True)
    figure.supylabel(y, fontsize=11)
    return figure, dict(zip(panels, grid.flat, strict=False))


def add_title(figure, finding: str) -> None:
    """The finding as title, in lines that fit, its first letter a capital."""
    figure.suptitle(textwrap.fill(finding[:1].upper() + finding[1:], int(10 * figure.get_figwidth())), fontsize=12)


def add_legend(figure, finding: str) -> None:
    """One legend for all panels, measured lines first, and the finding as title."""
    width = figure.get_size_inches()[0]
    legend = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = dict(sorted(legend.items(), key=lambda entry: entry[0].startswith("notebook")))
    fit = int(10 * width / (6 + max(map(len, legend))))  # columns
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=max(1, min(len(legend), fit)))
    add_title(figure, finding)


LEVELS = ("--", ":", "-.", (0, (1, 4)), (0, (8, 3, 1, 3, 1, 3)), (0, (10, 4)))  # line styles


def curves_figure(run: Run, kind: str, finding: str, lines: Callable, panel_keys: Sequence[str], x: str, y: str, log: bool = False,
                  notebook: Callable[[dict], dict] = lambda cell: {}, every: int = 1,
                  levels: dict[str, float] | None = None) -> Figure:  # fmt: skip
    """A panel for each combination of `panel_keys`; in it, every seed of every cell as thin lines and their mean as a thick one, up
    to where the first seed ends. lines(cell, result) names the curves [T] of one trial, points `every` so many x; the same name has
    the same colour everywhere. notebook(cell) names the notebook's numbers for the cell, `levels` other ones: dashed lines."""
    drawn = [(cell, [lines(cell, result) for result in results]) for cell, results in zip(run.cells, run.results, strict=True)]
    columns = {}
    colours = colours_of([name for cell, seeds in drawn for one in (*seeds, notebook(cell)) for name in one])
    panels = list(dict.fromkeys(cell_name(cell, panel_keys) for cell in run.cells))
    last = {cell.get(panel_keys[-1]) for cell in run.cells} - {None} if len(panel_keys) > 1 else range(2 if len(panels) == 4 else 3)
    figure, grid = panel_grid(panels, min(len(panels), len(last), 4), 2.6, x, y, "y" * log)
    for cell, seeds in drawn:
        axes = grid[cell_name(cell, panel_keys)]
        for name in dict.fromkeys(name for one in seeds for name in one):
            having = {seed: one[name] for seed, one in zip(run.seeds, seeds, strict=True) if name in one}
            curves = np.array([*itertools.zip_longest(*having.values(), fillvalue=np.nan)], np.float64).T  # [S, T]
            at = every * np.arange(curves.shape[1])
            axes.plot(at, curves.T, color=colours[name], linewidth=0.6, alpha=0.5)
            axes.plot(at, curves.mean(0), color=colours[name], linewidth=1.8, label=name)
            axes.text(0.5, 0.5, "" if np.isfinite(curves).any() else "not finite", transform=axes.transAxes, ha="center")
            columns |= {f"{cell_name(cell, varying(run.cells))} | {name} | seed {seed}": curve for seed, curve in having.items()}
        for name, number in notebook(cell).items():
            axes.axhline(number, color=colours[name], linestyle="--", linewidth=1, label=f"notebook, {name}")
    for axes, (number, (name, level)) in itertools.product(grid.values(), enumerate((levels or {}).items())):
        axes.axhline(level, color="black", linestyle=LEVELS[number % len(LEVELS)], linewidth=1, label=name)
    add_legend(figure, finding)
    return Figure(kind, figure, finding, columns)


def mixing_name(cell: dict) -> str:
    """What tells the models apart: the activation of mixing layers, the model's name for others (all kinds of GIN: "gin")."""
    return cell.get("activation", "gin" if cell["model"] in GIN_KINDS else cell["model"])


def loss_figure(run: Run, finding: str, name: str, every: int) -> Figure:
    """Exact loss of networks that learn Life, by step: a colour for each value of the key `name`; dashed: `best_losses`."""
    panels = [key for key in varying(run.cells) if key != name]
    levels = {} if "alive" in panels else best_losses(run.cells[0]["alive"])
    lines = lambda cell, result: {cell[name]: np.minimum(result["curve"], 0.35)}  # noqa: E731
    return curves_figure(run, "loss", finding, lines, panels, "step", "loss, exact (cut at 0.35)", every=every, levels=levels)


def score_figure(run: Run, arm: Callable[[dict], str] = mixing_name, told: Sequence[str] = ("activation",),
                 notebook: Callable = lambda cell: {}) -> Figure:  # fmt: skip
    """Score by epoch: a colour an arm, a panel for each combination of what varies beside the keys `told` by the arm."""
    panels = [key for key in varying(run.cells) if key not in told]
    lines = lambda cell, result: {arm(cell): result["recall"].mean(1)}  # noqa: E731
    finding = f"Best score: {extremes(run, 'best')}. Jump an epoch: {extremes(run, 'jump')}"
    return curves_figure(run, "score", finding, lines, panels, "epoch", "balanced accuracy", notebook=notebook)


def ratio_figure(run: Run, arm: Callable[[dict], str]) -> Figure:
    """Heat maps of grad/weight, module by step, mean over seeds: one for the first cell of each arm, on one colour scale."""
    plt, arms, maps = pyplot(), [arm(cell) for cell in run.cells], {}
    for i in (arms.index(name) for name in dict.fromkeys(arms)):
        modules, ratios = zip(*(ratio_to_weight(result) for result in run.results[i]), strict=True)
        decades = np.log10(np.maximum(np.nan_to_num(ratios), 1e-12))  # NaN: no weight yet, or diverged
        maps[cell_name(run.cells[i], varying(run.cells))] = (modules[0], decades.mean(0).T)  # [modules, T]
    tallest, width = max(len(rows) for rows, _ in maps.values()), max(4.2 * len(maps), 7.0)
    figure, grid = plt.subplots(1, len(maps), figsize=(width, 0.24 * tallest + 1.8), squeeze=False)
    low, high = np.percentile(np.concatenate([values.ravel() for _, values in maps.values()]), (1, 99))
    for axes, (title, (rows, values)) in zip(grid.flat, maps.items(), strict=True):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
        axes.set_yticks(range(len(rows)), [row.removeprefix("layers.") for row in rows], fontsize=10)
        axes.set(title=textwrap.fill(title, 28), xlabel="step")
        axes.grid(False)
    figure.colorbar(image, ax=list(grid.flat), label="log10 grad/weight, mean over seeds")
    largest = [f"{rows[int(np.argmax(np.median(values, 1)))]} in {name}" for name, (rows, values) in maps.items()]
    finding = f"Largest median grad/weight: {'; '.join(largest)}"
    add_title(figure, finding)
    columns = {f"{title} | {row}": line for title, (rows, values) in maps.items() for row, line in zip(rows, values, strict=True)}
    return Figure("ratio", figure, finding, columns)


def by_arm(run: Run, metrics: Sequence[str]) -> dict[str, dict[str, Sequence[float]]]:
    """Rows for `dots_figure`: every arm with its metrics, a value a seed."""
    return {cell_name(cell, varying(run.cells)): {m: run.values(i, m) for m in metrics} for i, cell in enumerate(run.cells)}


def dots_figure(rows: dict[str, dict[str, Sequence[float]]], kind: str, finding: str, x: str, scale: str = "linear",
                lines: dict[str, float] | None = None) -> Figure:  # fmt: skip
    """rows[name][series]: values, a row a name and a colour a series: every seed a dot, their mean a bar. `lines` names numbers to
    be dashed. scale: "linear", "log", or "symlog" for what may be zero: linear below 1e-6."""
    plt, columns, series = pyplot(), {}, list(dict.fromkeys(name for row in rows.values() for name in row))
    colours = dict(zip(series, itertools.cycle(COLOURS.values())))
    figure, axes = plt.subplots(figsize=(9, 0.15 * len(rows) * (1.5 + len(series)) + 1.8))
    for (i, (row, found)), m in itertools.product(enumerate(rows.items()), range(len(series))):
        if (name := series[m]) in found:
            height = i + 0.7 * (m + 0.5) / len(series) - 0.35
            axes.plot(found[name], [height] * len(found[name]), "o", color=colours[name], markersize=5, alpha=0.5)
            mark = {"color": colours[name], "markersize": 16, "markeredgewidth": 3, "label": name.replace("_", " ")}
            axes.plot(np.mean(found[name]), height, "|", **mark)
            columns[f"{row} | {name}"] = found[name]
    for (label, number), style in zip((lines or {}).items(), itertools.cycle(LEVELS)):
        axes.axvline(number, color="black", linestyle=style, linewidth=1, label=label)
    axes.set_xscale(scale, **({"linthresh": 1e-6} if scale == "symlog" else {}))
    axes.set(xlabel=x, yticks=range(len(rows)), yticklabels=rows)
    axes.invert_yaxis()
    add_legend(figure, finding)
    return Figure(kind, figure, finding, columns)


def sweep_figure(run: Run, kind: str, finding: str, key: str, metrics: Sequence[str], y: str, panel_keys: Sequence[str] = (),
                 log: str = "", lines: dict[str, float] | None = None) -> Figure:  # fmt: skip
    """Metrics against the hyperparameter `key`: a panel for each combination of `panel_keys`, a colour for each of what else varies
    (or for each metric), every seed a thin line, their mean a thick one. `log` names the logarithmic axes: "x", "y" or "xy"."""
    columns, points, arm_keys = {}, {}, [k for k in varying(run.cells) if k not in (key, *panel_keys)]
    for i, cell in enumerate(run.cells):
        for metric in metrics:
            arm = [cell_name(cell, arm_keys)] * bool(arm_keys) + [metric.replace("_", " ")] * (len(metrics) > 1 or not arm_keys)
            points.setdefault((cell_name(cell, panel_keys), ", ".join(arm)), []).append((cell[key], run.values(i, metric)))
    panels, names = ([*dict.fromkeys(k)] for k in zip(*points, strict=True))
    colours = colours_of([name.partition(", ")[0] for name in names])
    figure, grid = panel_grid(panels, min(len(panels), 4), 3.6, key.replace("_", " "), y, log)
    for (panel, name), found in points.items():
        x, values = zip(*sorted(found), strict=True)
        axes, style = grid[panel], names.index(name) % len(metrics) if arm_keys else 0
        how = {"color": colours[name.partition(", ")[0]], "linestyle": ("-", "--", ":", "-.")[style], "marker": "o"}
        axes.plot(x, values, linewidth=0.6, markersize=3, alpha=0.5, **how)
        axes.plot(x, np.mean(values, 1), linewidth=1.8, markersize=0, label=name, **how)
        columns[f"{panel} | {name} | {key}"] = x
        columns |= {f"{panel} | {name} | seed {s}": each for s, each in zip(run.seeds, zip(*values, strict=True), strict=True)}
        if "x" not in log and all(isinstance(number, int) for number in x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if "x" in log and len(sizes := sorted({cell[key] for cell in run.cells})) < 8:  # else minor ticks' numbers overlap
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axes.set_xticks([], minor=True)
    for axes, (label, number) in itertools.product(grid.values(), (lines or {}).items()):
        axes.axhline(number, color="black", linestyle="--", linewidth=1, label=label)
    add_legend(figure, finding)
    return Figure(kind, figure, finding, columns)


def hop_figures(run: Run, finding: str, guesses: dict[str, str] | None = None) -> list[Figure]:
    """Accuracy by number of hops, in the end and by step, of runs of `train_on_questions`; `guesses` names exact ones."""
    words = {h: f"{h} hop{'s' * (h > 1)}" for h in range(1, 10) if f"curve_{h}" in run.results[0][0]}
    rows = {arm: {word: row[f"accuracy_{h}"] for h, word in words.items()}
            for arm, row in by_arm(run, [f"accuracy_{h}" for h in words]).items()}  # fmt: skip
    for name, guess in (guesses or {}).items():
        rows[name] = {word: [run.results[0][0][f"{guess}_{h}"]] for h, word in words.items()}
    lines = lambda cell, result: {word: result[f"curve_{h}"] for h, word in words.items()}  # noqa: E731
    by_step, keys = f"{finding}, by step", varying(run.cells)
    return [dots_figure(rows, "accuracy", finding, "accuracy on new questions"),
            curves_figure(run, "curves", by_step, lines, keys, "steps done, %", "accuracy", every=5)]  # fmt: skip


def matrix_figure(kind: str, values: np.ndarray, rows: Sequence, columns: Sequence, axes_names: tuple[str, str], finding: str,
                  texts: np.ndarray | None = None, largest: float = 1.0) -> Figure:  # fmt: skip
    """Values [R, C], the darker the nearer to the largest, each with its text (default: the number); names of rows and columns."""
    figure, axes = pyplot().subplots(figsize=(1.2 * len(columns) + 3.5, 0.55 * len(rows) + 2.2))
    axes.imshow(np.nan_to_num(values), cmap="Blues", vmin=0, vmax=largest, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text, dark = f"{value:.2f}" if texts is None else texts[i, j], value > 0.6 * largest
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel=axes_names[1], xticks=range(len(columns)), xticklabels=columns)
    axes.set(ylabel=axes_names[0], yticks=range(len(rows)), yticklabels=rows)
    axes.grid(False)
    add_title(figure, finding)
    return Figure(kind, figure, finding, {f"{axes_names[0]} {row}".strip(): line for row, line in zip(rows, values, strict=True)})


def save_boards(boards: Sequence[np.ndarray], path: Path) -> None:
    """Boards [H, W] bool, a frame each, as an animation (.gif), or eight of them side by side in a picture (.png). UsageError for
    another suffix and for a place where no file can be written."""
    plt = pyplot()
    if path.suffix not in (".gif", ".png"):
        raise UsageError(f"--save {path}: name a file that ends in .gif or .png")
    check_writable("--save", path.parent)
    shown = boards if path.suffix == ".gif" else [boards[i] for i in np.linspace(0, len(boards) - 1, 8).astype(int)]
    figure, grid = plt.subplots(1, 1 if path.suffix == ".gif" else len(shown), squeeze=False, figsize=(16, 2.2))
    images = [axes.imshow(board, cmap="gray_r", vmin=0, vmax=1) for axes, board in zip(grid.flat, shown, strict=False)]
    for axes in grid.flat:
        axes.axis("off")
    if path.suffix == ".gif":
        from matplotlib.animation import FuncAnimation, PillowWriter

        figure.set_size_inches(5, 5 * boards[0].shape[0] / boards[0].shape[1])
        FuncAnimation(figure, lambda i: images[0].set_data(boards[i]), len(boards)).save(path, PillowWriter(fps=10))
    else:
        figure.savefig(path)
    plt.close(figure)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write STEM.png, with the figure's numbers STEM.csv, and its texts."""
    image = io.BytesIO()
    figure.figure.savefig(image, format="png")
    pyplot().close(figure.figure)
    write_atomically(stem.with_name(stem.name + ".png"), image.getvalue())
    save_columns(figure.columns, stem)
    for suffix, text in figure.texts:
        write_atomically(stem.with_name(stem.name + suffix), text.encode())


def save_columns(columns: dict[str, Sequence], stem: Path) -> None:
    """Write named columns, which may differ in length, to STEM.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in itertools.zip_longest(*columns.values(), fillvalue=""):
        writer.writerow([f"{value:.5g}" if isinstance(value, (float, np.floating)) else value for value in row])
    write_atomically(stem.with_name(stem.name + ".csv"), text.getvalue().encode())


# %% 15 Logbook

NOTEBOOKS = {  # the notebooks' sections in their order, by the words with which a claim's source begins
    "graph notebook": ("opening", "content", "next actions", "step", "before 6/3", "6/3", "8.3", "9.3", "10.3", "13/3", "14.3",
                       "15.3", "24.3", "11/4", "12/4", "13/4"),
    "attention notebook": ("speed", "toes", "Ablations", "later"),
    "logic journal": ("simple version", "trainable gates", "fixed sparse weights", "predictions", "relu but gate",
                      "only one is relu", "speed", "learning rate", "lesser gate", "48 x 20", "48 x 48", "plain", "why the heck",
                      "regulariser", "and-or", "sum-1", "half-lr", "weights-clipped"),
    "question-answering notebook": ("Publication Clean Up", "Visualisations", "Graph structuring", "Pretraining"),
}  # fmt: skip
LOGBOOK_TITLE = "# Logbook\n"
INDEX_START, INDEX_END = "<!-- index: rebuilt at every append -->\n", "<!-- entries: append-only -->\n"
INDEX_HEAD = f"| date | experiment | notebook entry | finding | {' | '.join(VERDICTS)} |\n{'|---' * 8}|\n"
ENTRY_HEADING = re.compile(
    r'^<a id="(?P<anchor>[^"]+)"></a>\n## (?P<date>\d{4}-\d\d-\d\d) · (?P<name>\w+) · (?P<title>.+)\n\n'
    r"Entry: (?P<entry>.+?)\. Question: ",
    re.MULTILINE,
)
CLAIM_ROW = re.compile(r"^\| (.+) · ([^·]+) \| \*\*(\w+(?: \w+)?)\*\* \| ", re.MULTILINE)


def plain(text: str) -> str:
    """User text as one line that cannot end a table cell or start a heading."""
    return " ".join(text.split()).replace("|", "/").replace("<", "(").replace(">", ")")


def judge(experiment: Experiment, run: Run, defaults: dict[str, tuple]) -> list[tuple[Claim, str, str]]:
    """Every claim with its verdict and, check by check, the effect behind it."""
    judged, derived = [], experiment.derived(run)

    def values(metric: str, arm: dict | None) -> Sequence[float] | None:
        if arm is None:
            return derived.get(metric)
        cell = notebook_cell(experiment, defaults, **arm)
        return run.values(run.cells.index(cell), metric) if cell in run.cells else None

    for claim in experiment.claims:
        verdicts, effects, counts = [], [], {}
        for check in claim.checks:
            arms = [check.cell] if check.versus is None else [check.cell, check.versus]
            measured = [values(check.metric, arm) for arm in arms]
            if any(one is None for one in measured):
                verdicts.append("not tested")
                continue
            if check.unless:
                kept = ~np.any([values(check.unless, arm) for arm in arms], axis=0)
                measured = [np.asarray(one)[kept] for one in measured]
            verdict, found = check.judge(*measured)
            verdicts.append(verdict)
            counts[found.n] = None
            compared = "" if check.versus is None else " ratio" if check.scale == "ratio" else " difference"
            effects.append(f"{check.metric.replace('_', ' ')}{compared} {found}, claimed {range_name(check.claimed)}: {verdict}")
        verdict = combine(verdicts)
        tested = "; ".join([*effects, f"n = {', '.join(map(str, counts))}"])
        judged.append((claim, verdict, "not tested by this run" if verdict == "not tested" else tested))
    return judged


def range_name(claimed: tuple[float, float]) -> str:
    """An open range in words: "> 0.6", "< 1", "0.1 to 0.2"."""
    low, high = claimed
    return f"> {low:g}" if high == math.inf else f"< {high:g}" if low == -math.inf else f"{low:g} to {high:g}"


LONG_TABLE = 30  # arms; of a longer table the entry shows the notebook's and the outermost ones


def results_table(experiment: Experiment, run: Run) -> str:
    """One row an arm: each metric as mean ± half its interval; the main one also by seed, for up to 8 seeds. Of more than
    LONG_TABLE arms: the first, and the six largest and smallest of the main metric."""
    keys, each = varying(run.cells), len(run.seeds) <= 8
    shown = range(len(run.cells))
    if len(shown) > LONG_TABLE:
        ranked = sorted(shown, key=lambda i: -np.mean(run.values(i, experiment.metrics[0])))
        shown = dict.fromkeys([0, *ranked[:6], *ranked[-6:]])
    heads = ["arm", *(m.replace("_", " ") for m in experiment.metrics), *(["by seed"] if each else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for i in shown:
        cell = run.cells[i]
        intervals = [mean_interval(run.values(i, metric)) for metric in experiment.metrics]
        diverged = sum(not math.isnan(result.get("diverged", math.nan)) for result in run.results[i])
        name = cell_name(cell, keys) + (f" ({diverged} of {len(run.seeds)} diverged)" if diverged else "")
        row = [name, *(brief(m.estimate) + f" ± {m.high - m.estimate:.2g}" * (m.high - m.estimate > 1e-12) for m in intervals)]
        row += [" ".join(map(brief, run.values(i, experiment.metrics[0])))] * each
        lines.append("| " + " | ".join(row) + " |")
    if len(shown) < len(run.cells):
        lines += ["", f"{len(run.cells) - len(shown)} arms between these stand in the CSV named -arms- only."]
    if derived := experiment.derived(run):
        lines += ["", "| over several arms | mean | by seed |", "|---|---|---|"]
        for name, values in derived.items():
            m, seeds = mean_interval(values), " ".join(map(brief, values)) if each else ""
            lines.append(f"| {name.replace('_', ' ')} | {brief(m.estimate)} ± {m.high - m.estimate:.2g} | {seeds} |")
    return "\n".join(lines)


def write_entry(experiment: Experiment, run: Run, options: argparse.Namespace, argv: Sequence[str], images: dict[str, str],
                texts: Sequence[str]) -> str:  # fmt: skip
    """The logbook entry in Markdown; `images` maps path to alt text, `texts` are links to files beside them."""
    stamp, defaults = environment_stamp(), defaults_of(experiment, options)
    title = plain(": ".join(filter(None, [options.tag, experiment.headline(run)])) + unusual(experiment, run.cells, defaults))
    command = shlex.join(["python", Path(experiment.file).name, *shown_arguments(argv)]).replace("`", "'")
    seeds = f"{run.seeds[0]} to {run.seeds[-1]}" if len(run.seeds) > 1 else f"{run.seeds[0]}"
    diverged = sum(not math.isnan(result.get("diverged", math.nan)) for row in run.results for result in row)
    facts = [
        f"commit {stamp['commit']} · seeds {seeds} · {run.seconds / 60:.1f} min of computing",
        f"{stamp['device']}, {stamp['threads']} thread{'s' * (stamp['threads'] != '1')} a process, torch {stamp['torch']}",
        f"{diverged} of {len(run.cells) * len(run.seeds)} trials diverged",
        *([f"input sha256 {run.cells[0]['sha256']}"] if "sha256" in run.cells[0] else []),
        *([f"{run.foreign} trials reused from other code"] if run.foreign else []),
    ]
    rows = [
        f"| {plain(claim.text)} · {plain(claim.source)} | **{verdict}** | {effect} |"
        for claim, verdict, effect in judge(experiment, run, defaults)
    ]
    parts = [
        f"## {datetime.date.today()} · {experiment.name} · {title}",
        f"Entry: {plain(experiment.entry)}. Question: {experiment.doc.strip().splitlines()[0]} `{command}` · " + " · ".join(facts),
        results_table(experiment, run),
        "\n".join(f"![{plain(alt)}]({path})" for path, alt in images.items()),
        "Beside it: " + ", ".join(texts) if texts else "",
        "| claim · source | verdict | effect [95% interval], claimed range |\n|---|---|---|\n" + "\n".join(rows),
        f"Reading. {plain(options.note)}" if options.note else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def unusual(experiment: Experiment, cells: Sequence[dict], defaults: dict[str, tuple]) -> str:
    """What all cells share that is not the notebook's own setting, in words: ", with lr 1e-05"."""
    usual, varies = notebook_cell(experiment, defaults), varying(cells)
    shared = {key: value for cell in cells for key, value in cell.items() if key not in varies}
    changed = [key for key, value in shared.items() if usual.get(key, value) != value]
    return f", with {cell_name(shared, changed)}" if changed else ""


def shown_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments that decide the numbers: without the note and where things are written."""
    shown, skip = [], False
    for word in argv:
        hidden = word.partition("=")[0] in ("--note", "--logbook", "--plots", "--runs", "--tag")
        if not skip and not hidden:
            shown.append(word)
        skip = hidden and "=" not in word
    return shown


def entries_of(entries: str) -> Iterator[tuple[re.Match, list[tuple[str, str, str]]]]:
    """Every entry's heading, and its claims: text, source, verdict."""
    found = list(ENTRY_HEADING.finditer(entries))
    for match, following in itertools.zip_longest(found, found[1:]):
        yield match, CLAIM_ROW.findall(entries, match.end(), following.start() if following else len(entries))


def rebuild_index(entries: str) -> str:
    """What stands above a logbook's entries: every claim with its verdicts, and the index, an entry a row, newest last."""
    rows = []
    for match, claims in entries_of(entries):
        counts = [sum(found == verdict for _, _, found in claims) for verdict in VERDICTS]
        cells = [match["date"], match["name"], match["entry"], f"[{match['title']}](#{match['anchor']})", *map(str, counts)]
        rows.append("| " + " | ".join(cells) + " |\n")
    return rebuild_coverage(entries) + "## Entries\n\n" + INDEX_HEAD + "".join(rows)


OURS = re.compile(r"\b(ours|our (question|reading))\b")  # in a claim or its source: the notebook does not say it


def rebuild_coverage(entries: str) -> str:
    """Every claim that an entry judged, notebook by notebook in the order of its sections, folded: with its verdicts, oldest first,
    each a link to the last entry that reached it before another did. The summary counts what the notebook says and OURS apart."""
    notebooks = {notebook: {} for notebook in NOTEBOOKS}
    for match, claims in entries_of(entries):
        for text, source, verdict in claims:
            notebook = notebooks.setdefault(re.match("[^,:]+", match["entry"])[0], {})
            reached = notebook.setdefault((source, text, match["name"]), [])
            if reached and reached[-1][0] == verdict:
                reached.pop()
            if verdict != "not tested":
                reached.append((verdict, match["anchor"]))
    parts = []
    for notebook, found in notebooks.items():
        place = {name: i for i, name in enumerate(NOTEBOOKS.get(notebook, ()))}
        order = sorted(found, key=lambda claim: next((i for name, i in place.items() if claim[0].startswith(name)), len(place)))
        summary = []
        for whose, asked in (("statements", False), ("questions of ours", True)):
            of_these = [claim for claim in order if bool(OURS.search(f"{claim[1]} {claim[0]}")) == asked]
            last = [found[claim][-1][0] if found[claim] else "not tested" for claim in of_these]
            counts = ", ".join(f"{last.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in last)
            summary += [f"{len(of_these)} {whose}: {counts}"] if of_these else []
        rows = ["| section | claim | verdict | script |", "|---|---|---|---|"]
        for claim in order:
            verdicts = ", then ".join(f"[{verdict}](#{anchor})" for verdict, anchor in found[claim]) or "not tested"
            rows.append(f"| {claim[0]} | {claim[1]} | {verdicts} | {claim[2]} |")
        head = f"<details><summary>{notebook[0].upper()}{notebook[1:]}. {'; '.join(summary)}</summary>"
        parts += ["\n".join([head, "", *rows, "", "</details>\n"])] if order else []
    return "\n".join(["## Claims\n", *parts, ""]) if parts else ""


def append_entry(logbook: Path, entry: str, anchor: str, once: bool = False) -> bool:
    """Append an entry and rebuild the index, under a lock, wholly or not at all; with `once` not if the anchor has one. Returns
    whether it was appended. Raises UsageError for a file that is no logbook."""
    folder = os.open(logbook.parent, os.O_RDONLY)  # the folder is locked, since the file itself is replaced
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        text = read_logbook(logbook)
        entries = text.partition(INDEX_END)[2]
        taken = {match["anchor"] for match in ENTRY_HEADING.finditer(entries)}
        if once and anchor in taken:
            return False
        names = itertools.chain([anchor], (f"{anchor}-{i}" for i in itertools.count(2)))
        anchor = next(name for name in names if name not in taken)
        entries += f'\n<a id="{anchor}"></a>\n{entry}'
        introduction = text.partition(INDEX_START)[0]
        whole = introduction + INDEX_START + rebuild_index(entries) + INDEX_END + entries
        write_atomically(logbook, whole.encode())
        os.fsync(folder)
        return True
    finally:
        os.close(folder)


def read_logbook(logbook: Path) -> str:
    """A logbook's text, a new one's if there is none. Raises UsageError if its markers are gone."""
    if not logbook.exists():
        return f"{LOGBOOK_TITLE}\n{INDEX_START}{INDEX_HEAD}{INDEX_END}"
    try:
        text = logbook.read_text(encoding="utf-8")
    except (UnicodeDecodeError, IsADirectoryError):
        text = ""
    if not os.access(logbook, os.W_OK):
        raise UsageError(f"--logbook {logbook}: read-only; make it writable or name another file")
    if text.count(INDEX_START) != 1 or text.count(INDEX_END) != 1 or not text.startswith(LOGBOOK_TITLE):
        raise UsageError(f"--logbook {logbook}: not a logbook, or its index was cut; restore it or name another file")
    return text


# %% 16 Command line


def quick_summary(experiment: Experiment, run: Run, options: argparse.Namespace) -> str:
    """How many of a quick run's verdicts are the logbook's last ones, in a line; the others by name."""
    known = {}
    for match, claims in entries_of(read_logbook(options.logbook).partition(INDEX_END)[2]):
        known |= {(t, s): verdict for t, s, verdict in claims if match["name"] == experiment.name and verdict != "not tested"}

    def kind(here: str, there: str) -> str:
        if here == there or "not tested" in (here, there):
            return "as there" if here == there else "not tested"
        return {here: "undecided here", there: "undecided there"}.get("inconclusive", "contrary")

    kinds = {}
    for claim, verdict, _ in judge(experiment, run, defaults_of(experiment, options)):
        there = known.get((plain(claim.text), plain(claim.source)), "not tested")
        kinds.setdefault(kind(verdict, there), []).append(claim.text)
    counts = ", ".join(f"{len(found)} {name}" for name, found in kinds.items())
    named = [f"\n  {name}: {text}" for name in ("contrary", "undecided here") for text in kinds.get(name, [])]
    return f"quick {experiment.name}: of {len(experiment.claims)} verdicts in {options.logbook.name}: {counts}" + "".join(named)


def arms_columns(experiment: Experiment, run: Run) -> dict[str, Sequence]:
    """Every arm, seed and metric as columns, a row a trial."""
    keys = varying(run.cells)
    columns = {"arm": [cell_name(cell, keys) for cell in run.cells for _ in run.seeds], "seed": run.seeds * len(run.cells)}
    return columns | {m: [value for i in range(len(run.cells)) for value in run.values(i, m)] for m in experiment.metrics}


def conclude(experiment: Experiment, run: Run, options: argparse.Namespace, argv: Sequence[str], identity: str) -> None:
    """Draw, judge, print and append."""
    images, texts, dry = {}, [], options.smoke or options.quick
    for figure in experiment.figures(run):
        stem = options.plots / f"{experiment.name}-{figure.kind}-{identity}"
        if dry:
            figure.figure.savefig(io.BytesIO(), dpi=40)
            pyplot().close(figure.figure)
        else:
            save_figure(figure, stem)
        link = os.path.relpath(stem, options.logbook.parent)
        images[f"{link}.png"] = figure.finding
        texts += [f"[{stem.name}{suffix}]({link}{suffix})" for suffix, _ in figure.texts]
    if not dry:
        save_columns(arms_columns(experiment, run), options.plots / f"{experiment.name}-arms-{identity}")
    entry = write_entry(experiment, run, options, argv, images, texts)
    print(entry)
    print(f"peak memory {memory_mb():.0f} MB")
    if options.quick:
        print(quick_summary(experiment, run, options))
    if not (dry or options.no_log):
        appended = append_entry(options.logbook, entry, f"{experiment.name}-{identity}", options.once)
        print(f"appended to {options.logbook}" if appended else f"its entry stands in {options.logbook}")


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run an experiment from its command line. Returns the exit status: 0 done, 1 a write failed, 2 the command or a file that it
    needs is wrong, 130 interrupted. Finished trials are kept in every case, and the same command goes on from them."""
    argv = sys.argv[1:] if argv is None else list(argv)
    speaks = first = int(os.environ.get("RANK", 0)) == 0
    kept = "finished trials are kept, the same command goes on from them"
    try:
        options = make_parser(experiment).parse_args([*(experiment.quick if "--quick" in argv else []), *argv])
        if options.no_log and (options.note or options.tag):
            raise UsageError("--no-log with --note or --tag: they stand in the entry that --no-log leaves out; drop one")
        if options.smoke and options.quick:
            raise UsageError("--smoke with --quick: either may choose the settings; drop one")
        if options.once and (options.no_log or options.note):
            raise UsageError("--once with --no-log or --note: one may append nothing, the other must or never does; drop one")
        if options.fresh and options.reuse:
            raise UsageError("--fresh with --reuse: one runs all again, the other nothing; drop one")
        cells = expand_grid(experiment, options)
        if options.smoke:
            options.seeds = min(options.seeds, 2 if len(cells) < 32 else 1)
        set_up(options.device, options.threads)
        check_writable("--runs", options.runs)
        if not (options.smoke or options.quick):
            check_writable("--plots", options.plots)
            check_writable("--logbook", options.logbook.parent)
        if not options.smoke:
            read_logbook(options.logbook)
        gc.freeze()  # the libraries' objects: `run_together` collects often and need not look at them
        code = code_fingerprint(__file__, experiment.file)
        trials = list_trials(experiment, cells, options, code)
        unfinished = [trial for trial in trials if not trial.path.exists()]
        groups = sum(any(not trials[i].path.exists() for i in group) for group in grouped(experiment, trials))
        jobs = options.jobs or (1 if options.smoke or Runtime.device.type == "cuda" else available_cores() // options.threads)
        helpers = 0 if under_torchrun() else max(min(jobs, groups) - 1, 0)
        flag, need = max((experiment.memory(trial.config) for trial in unfinished), key=lambda found: found[1], default=("", 0.0))
        require_memory(flag, need * (1 + helpers))
        if first:
            done = f"{len(trials)} trials, {len(trials) - len(unfinished)} of them finished before"
            print(f"{experiment.name}: {done}" + f", up to {need:,.0f} MB in each of {1 + helpers}" * (need > 0), flush=True)
        speaks = True  # from here on a rank may fail where the others do not
        run_trials(experiment, trials, Ranks([sys.executable, experiment.file, *argv], helpers))
        if first:
            run = collect(trials, code)
            identity = hashlib.sha256("".join(trial.path.stem for trial in trials).encode()).hexdigest()[:8]
            conclude(experiment, run, options, argv, identity)
        return 0
    except UsageError as error:
        status, message = 2, str(error)
    except LostProcessError as error:
        status, message = 1, f"{error}; {kept}"
    except OSError as error:
        status, message = 1, f"{error.filename or 'input or output'}: {error.strerror or error}; {kept}"
    except KeyboardInterrupt:
        status, message, speaks = 130, f"interrupted; {kept}", first
    if speaks:
        print(f"{Path(experiment.file).name}: {message}", file=sys.stderr)
    return status


# %% 17 Circuits


def hardened_circuit(network: GateNetwork, row: int) -> Circuit:
    """The circuit that network `row` of a stack becomes when every unit takes its hardened gate."""
    gates, below = [], range(CELLS)
    for layer in network:
        first, second = layer.operands.wires[row].tolist()
        numbers = layer.gates.hardened()[row].tolist()
        start = CELLS + len(gates)
        gates += [(number, below[a], below[b]) for number, a, b in zip(numbers, first, second, strict=True)]
        below = range(start, CELLS + len(gates))
    return Circuit(gates, CELLS + len(gates) - 1)


CONSTANT = -1  # in place of a signal: always 0


def absorb(gate: int, first: tuple[int, bool], second: tuple[int, bool]) -> Gate:
    """The same function of plain signals, for a gate that reads (signal, inverted?) twice: its table takes over the inversions and
    what constants and equal operands make of it."""
    (a, a_inverted), (b, b_inverted), table = first, second, 0
    for a_value, b_value in itertools.product((0, 1), repeat=2):
        x = (a_value & (a != CONSTANT)) ^ a_inverted
        y = ((a_value if a == b else b_value) & (b != CONSTANT)) ^ b_inverted
        table = 2 * table + (gate >> (3 - 2 * x - y) & 1)
    some = max(a, b, 0)
    return table, some if a == CONSTANT else a, some if b == CONSTANT else b


def fold(circuit: Circuit, copies: bool = True) -> Circuit:
    """Without constants and, if asked, without copies and inverters: who reads them absorbs them. Only an output that is a constant
    or an inverted cell keeps one. Dead gates go too."""
    gates, stands_for = {}, {cell: (cell, False) for cell in range(CELLS)}
    for signal, (gate, first, second) in circuit.numbered().items():
        gates[signal] = table, a, b = absorb(gate, stands_for[first], stands_for[second])
        simpler = {0: (CONSTANT, False), 15: (CONSTANT, True)}
        if copies:
            simpler |= {3: (a, False), 12: (a, True), 5: (b, False), 10: (b, True)}
        stands_for[signal] = simpler.get(table, (signal, False))
    output, inverted = stands_for[circuit.output]
    if output in gates and inverted:
        gates = {s: absorb(gate, (a, a == output), (b, b == output)) for s, (gate, a, b) in gates.items()}
        gates[output] = 15 - gates[output][0], *gates[output][1:]
    elif inverted or output == CONSTANT:
        gates[circuit.output], output = absorb(3, (output, inverted), (output, inverted)), circuit.output
    return assemble(gates, output)


def merge_equal(circuit: Circuit) -> Circuit:
    """With one gate for all that have the same truth table or its complement."""
    gates, known = circuit.numbered(), {}
    for signal, table in enumerate(truth_tables(circuit)):
        twin, gate = known.setdefault(table.tobytes(), (signal, 3))
        known.setdefault((~table).tobytes(), (signal, 12))
        if twin != signal:
            gates[signal] = gate, twin, twin
    return fold(assemble(gates, circuit.output))


class Resubstitution:
    """Replacements for the gates of a folded circuit of G gates and S = 9 + G signals. value [S, 512] bool: all signals; matters
    [G, 512] bool: where inverting a gate inverts the output, so that elsewhere its value is free; needs [S, G] bool: the gates from
    which a signal is computed, itself among them."""

    def __init__(self, circuit: Circuit):
        self.circuit, self.value, count = circuit, truth_tables(circuit), len(circuit.gates)
        self.needs = np.zeros((CELLS + count, count), dtype=bool)
        runs = [np.broadcast_to(cell, (count, 512)) for cell in self.value[:CELLS]]  # in run g, gate g is inverted
        for signal, (gate, first, second) in circuit.numbered().items():
            runs.append(OPERATIONS[gate](runs[first], runs[second]).copy())
            runs[signal][signal - CELLS] ^= True
            self.needs[signal] = self.needs[first] | self.needs[second]
            self.needs[signal, signal - CELLS] = True
        self.matters = runs[circuit.output] ^ self.value[circuit.output]

    def dead_without(self, signal: int) -> np.ndarray:
        """The gates that nothing needs once nobody reads the signal, itself among them: [G] bool."""
        live = np.zeros(len(self.value), dtype=bool)
        live[self.circuit.output] = True
        for reader, (_, first, second) in reversed(self.circuit.numbered().items()):
            live[reader] &= reader != signal
            live[first] |= live[reader]
            live[second] |= live[reader]
        return ~live[CELLS:]

    def search(self, signal: int, outer: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """gain, table [S, S]: how many gates are saved if `signal` becomes the gate `table` of two other signals (of one, on the
        diagonal), the output staying as it is; -99 where it would not. outer = (gate, other): it becomes this gate of the other
        signal and of such a new one."""
        wanted, matters, depends = self.value[signal], self.matters[signal - CELLS], self.needs[:, signal - CELLS]
        dead = self.dead_without(signal)
        if outer:
            gate, other = outer
            at = [OPERATIONS[gate](self.value[other], np.full(512, new)) for new in (False, True)]
            if depends[other] or (matters & (at[0] == at[1]) & (at[0] != wanted)).any():
                return np.full((len(self.value),) * 2, -99), np.zeros((len(self.value),) * 2, dtype=int)
            wanted, matters, dead = wanted ^ at[0], matters & (at[0] != at[1]), dead & ~self.needs[other]
        kept = self.needs[:, dead].astype(np.float32)  # of the gates that would die, those that a new operand needs
        gain = dead.sum() - bool(outer) - (kept.sum(1)[:, None] + kept.sum(1) - kept @ kept.T) - ~np.eye(len(kept), dtype=bool)
        ones, zeros = (self.corners(matters & (wanted == value)) for value in (True, False))
        gain[(ones & zeros).any(0) | depends[:, None] | depends] = -99
        if not outer:  # its own operands would change nothing
            _, first, second = self.circuit.gates[signal - CELLS]
            gain[[first, second], [second, first]] = -99
        return gain, np.tensordot([8, 4, 2, 1], ones, 1)

    def corners(self, where: np.ndarray) -> np.ndarray:
        """Which values (0, 0), (0, 1), (1, 0), (1, 1) any two signals take on the neighbourhoods `where` [512]: [4, S, S] bool."""
        chosen = self.value[:, where].astype(np.float32)
        both = chosen @ chosen.T
        first, second = both.diagonal()[:, None], both.diagonal()
        return np.stack([chosen.shape[1] - first - second + both, second - both, first - both, both]) > 0

    def replace(self, signal: int, gain: np.ndarray, table: np.ndarray, outer, rng: np.random.Generator) -> Circuit:
        """The circuit with one of the best replacements that `search` found, drawn at random."""
        best = np.argwhere(gain == gain.max())
        first, second = map(int, best[rng.integers(len(best))])
        inner, new = (int(table[first, second]), first, second), len(self.value)
        change = {new: inner, signal: (*outer, new)} if outer else {signal: inner}
        return fold(assemble(self.circuit.numbered() | change, self.circuit.output))


def substitute(circuit: Circuit, rng: np.random.Generator) -> Circuit:
    """Greedy: gates in random order give way to the gate or signal that saves most, until none saves any."""
    found, untried = Resubstitution(circuit), rng.permutation(len(circuit.gates)).tolist()
    while untried:
        signal = CELLS + untried.pop()
        gain, table = found.search(signal)
        smaller = found.replace(signal, gain, table, None, rng) if gain.max() > 0 else circuit
        if len(smaller.gates) < len(circuit.gates):
            circuit, found = smaller, Resubstitution(smaller)
            untried = rng.permutation(len(circuit.gates)).tolist()
    return circuit


AND_OR_XOR = (1, 4, 6, 7, 13)  # outer gates: the others are these with an operand inverted, which the inner gate absorbs


def random_walk(circuit: Circuit, patience: int, rng: np.random.Generator) -> Circuit:
    """The smallest circuit met while random gates give way to one or two others, which may make it up to 5 gates larger than that;
    ends after `patience` attempts in a row that found none smaller."""
    best, idle, found = circuit, 0, Resubstitution(circuit)
    while idle < patience and circuit.gates:
        idle += 1
        signal = int(rng.integers(CELLS, len(found.value)))
        outer = None if rng.random() < 0.5 else (int(rng.choice(AND_OR_XOR)), int(rng.integers(len(found.value))))
        gain, table = found.search(signal, outer)
        if gain.max() >= (-1 if len(circuit.gates) < len(best.gates) + 5 else 0):
            circuit = found.replace(signal, gain, table, outer, rng)
            found = Resubstitution(circuit)
        if len(circuit.gates) < len(best.gates):
            best, idle = circuit, 0
    return best


def simplify(circuit: Circuit, patience: int, rng: np.random.Generator) -> tuple[Circuit, dict[str, int]]:
    """A small circuit with the same output on all 512 neighbourhoods, and the gates left after each pass, each of which is checked.
    Raises ArithmeticError if one changed the output."""
    passes = {
        "dead": lambda c: assemble(c.numbered(), c.output),
        "constants": lambda c: fold(c, copies=False),
        "copies": fold,
        "equal": merge_equal,
        "substituted": lambda c: substitute(c, rng),
        "walked": lambda c: random_walk(c, patience, rng),
    }
    target, left = truth_tables(circuit)[circuit.output], {"hardened": len(circuit.gates)}
    for name, simpler in passes.items():
        circuit = simpler(circuit)
        if (truth_tables(circuit)[circuit.output] != target).any():
            raise ArithmeticError(f"{name}: the output is no longer the same")
        left[name] = len(circuit.gates)
    return circuit, left


class PackedLife:
    """A board [H, W] bool that wraps around, 64 cells a word, advanced by a circuit. Strips of rows are computed one after another,
    so that the signals stay in the processor's cache. Raises ValueError for fewer than 3 rows or columns."""

    strip_words = 8192

    def __init__(self, circuit: Circuit, board: np.ndarray):
        if min(board.shape) < 3:
            raise ValueError(f"a board needs 3 rows and 3 columns, not {board.shape[0]} x {board.shape[1]}")
        self.circuit, self.width, self.top_bit = circuit, board.shape[1], np.uint64((board.shape[1] - 1) % 64)
        last = {operand: signal for signal, gate in circuit.numbered().items() for operand in gate[1:]} | {circuit.output: None}
        self.done = [[s for s in {*gate[1:]} if last[s] == signal] for signal, gate in circuit.numbered().items()]
        self.words = pack(board)
        self.unused = ~pack(np.ones(self.width, dtype=bool))  # bits of a row's words past its end

    def step(self) -> None:
        """One generation."""
        one, top, rows = np.uint64(1), np.uint64(63), np.concatenate([self.words[-1:], self.words, self.words[:1]])
        west, east = rows << one, rows >> one
        west[:, 1:] |= rows[:, :-1] >> top
        west[:, 0] |= rows[:, -1] >> self.top_bit
        east[:, :-1] |= rows[:, 1:] << top
        east[:, -1] |= (rows[:, 0] & one) << self.top_bit
        height = max(1, self.strip_words // rows.shape[1])
        for start in range(0, len(self.words), height):
            end = min(start + height, len(self.words))
            cells = [side[start + down : end + down] for down in range(3) for side in (west, rows, east)]
            self.words[start:end] = self.compute(cells)
        self.words &= ~self.unused

    def compute(self, values: list[np.ndarray]) -> np.ndarray:
        """The output for nine cells. A signal that no later gate reads is let go, so that its memory, still in the cache, is used
        again."""
        for (gate, first, second), done in zip(self.circuit.gates, self.done, strict=True):
            values.append(OPERATIONS[gate](values[first], values[second]))
            for signal in done:
                values[signal] = None
        return values[self.circuit.output]

    def board(self) -> np.ndarray:
        """[H, W] bool."""
        return unpack(self.words, self.width)


def circuit_figure(circuit: Circuit, kind: str, finding: str, texts: Sequence[tuple[str, str]]) -> Figure:
    """A circuit from left to right: the cells as the 3 x 3 block they are, gates in columns by depth, the output. A ring where a
    wire ends inverts what the gate reads, one behind a gate its result. A wire has the colour of its source."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    plt, gates, depth, last = pyplot(), circuit.numbered(), [0] * CELLS, {}  # last: the last column that reads a signal
    for signal, (_, first, second) in gates.items():
        depth.append(1 + max(depth[first], depth[second]))
        last |= {operand: max(depth[signal], last.get(operand, 0)) for operand in (first, second)}
    end = last[circuit.output] = max(depth) + 1
    height = {(cell, 0): 1.2 - 1.2 * (cell // 3) - 0.4 * (cell % 3 - 1) for cell in range(CELLS)}  # slanted: wires pass the boxes
    for column in range(1, end):  # gates, and lanes for wires that cross the column, in the order of where they come from
        origin = {s: height[s, column - 1] for s in range(len(depth)) if depth[s] < column < last.get(s, 0)}
        origin |= {s: sum(height[i, column - 1] for i in gates[s][1:]) / 2 for s in gates if depth[s] == column}
        order = sorted(origin, key=origin.get)
        room = np.array([0.9 if depth[s] == column else 0.3 for s in order])
        height |= {(s, column): y for s, y in zip(order, room.cumsum() - room / 2 - room.sum() / 2, strict=True)}
    figure = plt.figure(figsize=(0.9 * end + 1.8, 0.75 * np.ptp(list(height.values())) + 1.6), layout="none")
    axes = figure.add_axes((0, 0, 1, 0.93))
    axes.axis("off")

    def ring(x: float, y: float, source: int) -> None:
        axes.plot(x, y, "o", markersize=6, markerfacecolor="white", color=f"C{source % 10}", zorder=4)

    def wire(source: int, column: int, x: float, y: float, inverted: bool = False) -> None:
        start = column + 0.2 if column else 0.45 * (source % 3) - 0.9, height[source, column]
        bends = [start, (x - 0.3, start[1]), (start[0] + 0.3, y), (x, y)]
        axes.add_patch(PathPatch(Curve(bends, [1, 4, 4, 4]), fill=False, edgecolor=f"C{source % 10}", linewidth=0.9))
        if inverted:
            ring(x, y, source)

    def label(x: float, y: float, text: str, shape: str) -> None:
        axes.text(x, y, text, ha="center", va="center", fontsize=13, bbox={"facecolor": "white", "boxstyle": shape}, zorder=3)

    for (signal, column), y in height.items():
        if depth[signal] < column:
            wire(signal, column - 1, column - 0.2, y)
            axes.plot((column - 0.2, column + 0.2), (y, y), color=f"C{signal % 10}", linewidth=0.9)
    for signal, (gate, first, second) in gates.items():
        x, y, text = depth[signal], height[signal, depth[signal]], EXPRESSIONS[gate]
        above = 0.15 if height[first, x - 1] > height[second, x - 1] else -0.15
        wire(first, x - 1, x - 0.28, y + above, "~a" in text)
        wire(second, x - 1, x - 0.28, y - above, "~b" in text)
        label(x, y, next((name for symbol, name in (("&", "AND"), ("|", "OR"), ("^", "XOR")) if symbol in text), "NOT"), "round")
        if "~(" in text:
            ring(x + 0.3, y, signal)
    wire(circuit.output, end - 1, end, height[circuit.output, end - 1])
    label(end, height[circuit.output, end - 1], "next", "square")
    for cell in range(CELLS):
        label(0.45 * (cell % 3) - 1.0, height[cell, 0], f"x{cell}", "square")
    add_title(figure, finding)
    columns = dict(zip(("gate", "first", "second"), zip(*circuit.gates, strict=True), strict=True)) if circuit.gates else {}
    return Figure(kind, figure, finding, columns, texts)


# %% 18 Text

PASSAGE_WORDS = 8  # words: no passage so long stands in both parts of a text
LEAST_BYTES = 10_000  # of a part of a text
NOT_READ = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "encodings", "pydoc_data"}  # folders


class Text(NamedTuple):
    """A text in two parts without a common passage: train and held_out, uint8 [bytes]; sha256 of both in hex."""

    train: np.ndarray
    held_out: np.ndarray
    sha256: str


def library_documents() -> list[str]:
    """The standard library's own English: the help topics of `pydoc` and the docstrings of every module, a text each, in the order
    of a hash of their names, so that a part of the list is a fair sample."""
    from pydoc_data.topics import topics

    root, documents = Path(ast.__file__).parent, dict(topics)
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not NOT_READ & set(name.parts):
            with contextlib.suppress(SyntaxError, ValueError):  # some files are there to be broken
                nodes = ast.walk(ast.parse(path.read_bytes()))
                named = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                found = [ast.get_docstring(node) for node in nodes if isinstance(node, named)]
                documents[str(name)] = "\n\n".join(filter(None, found))
    return [documents[name] for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())]


def split_text(documents: Sequence[str]) -> tuple[str, str]:
    """Train on the first documents, hold out the last, about a tenth of the text. A paragraph that stands twice is kept once; a
    held-out one that shares a passage of PASSAGE_WORDS words with the training part is left out."""
    seen, kept = set(), []
    for document in documents:
        paragraphs = {" ".join(p.split()): p.strip("\n") for p in re.split(r"\n\s*\n", document)}  # without what stands twice in it
        kept.append([(words, p) for words, p in paragraphs.items() if words and words not in seen])
        seen |= paragraphs.keys()
    sizes = np.cumsum([sum(len(p) for _, p in document) for document in kept])
    last = int(np.searchsorted(sizes, 0.9 * sizes[-1])) + 1 if len(kept) else 0

    def passages(words: str) -> set[str]:
        listed = words.split(" ")
        return {" ".join(listed[i : i + PASSAGE_WORDS]) for i in range(len(listed) - PASSAGE_WORDS + 1)}

    trained_on = set().union(*(passages(words) for document in kept[:last] for words, _ in document))
    parts = [[p for _, p in document] for document in kept[:last]]
    held_out = [[p for words, p in document if not passages(words) & trained_on] for document in kept[last:]]
    return tuple("\n\n\n".join("\n\n".join(paragraphs) for paragraphs in part if paragraphs) for part in (parts, held_out))


@functools.cache
def load_text(source: str) -> Text:
    """The text that `--text` names: "library", or a UTF-8 file, whose documents are its paragraphs (its lines, if it has under 20).
    The library's is kept in runs/, since it takes seconds to collect. Raises UsageError for a file that is none, or too short."""
    if source == "library":
        kept = keep_arrays("text", sys.version.encode(), lambda: as_text(*split_text(library_documents()))._asdict())
        return Text(kept["train"], kept["held_out"], str(kept["sha256"]))
    try:
        content = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text {source}: cannot be read ({error.strerror}); name a UTF-8 text file") from None
    except UnicodeDecodeError:
        content = "\0"
    if "\0" in content:
        raise UsageError(f"--text {source}: not a UTF-8 text; convert it, or name another file")
    paragraphs = re.split(r"\n\s*\n", content)
    text = as_text(*split_text(paragraphs if len(paragraphs) >= 20 else content.splitlines()))
    if (short := min(len(text.train), len(text.held_out))) < LEAST_BYTES:
        raise UsageError(f"--text {source}: too short, {short:,} bytes of {LEAST_BYTES:,} in its smaller part; name a longer text")
    return text


def as_text(train: str, held_out: str) -> Text:
    """Both parts as bytes, with their sha256."""
    one, other = train.encode(), held_out.encode()
    return Text(*(np.frombuffer(part, np.uint8) for part in (one, other)), hashlib.sha256(one + b"\0" + other).hexdigest())


# %% 19 Language models

VOCABULARY = 256  # a token is a byte
HELD_OUT_WINDOWS = 256
BYTES_A_TOKEN = 4.5  # of GPT-2's vocabulary, in English: the notebook's losses are nats a token

LANGUAGE_FLAGS = (
    Flag("attn-activ", one_of("softmax", "sigmoid", "tanh", "none"), ("softmax",), "what makes weights of logits"),
    Flag("qk-norm", one_of("none", "fro_norm", "rms_norm"), ("none",), "norm of queries and keys, over a head's channels"),
    Flag("qk-activ", one_of("none", "gelu"), ("none",), "activation of queries and keys, before their norm"),
    Flag("post-attn-norm", one_of("none", "rms_norm"), ("none",), "norm of what a head has mixed"),
    Flag("position", one_of("linear", "rotary", "none"), ("linear",), "learned linear bias, as in the notebook; rotary; none"),
    Flag("logit-bias", one_of("none", "length", "row"), ("none",), "on logits of sigmoids: -log of the context, or of the row"),
    Flag("logit-scale", one_of("root", "root-learned", "high", "high-learned"), ("root",),
         "of q k^T: 1 / root of a head's channels, or QKNorm's log2(T^2 - T); fixed, or learned from there, a head each"),
    Flag("bug", one_of("none", "norm-dim", "no-position"), ("none",),
         "the notebook's: norms over the whole tensor; tanh and none without position and mask"),
    Flag("layers", at_least(1), (2,), "layers"),
    Flag("dim", at_least(1), (128,), "width"),
    Flag("heads", at_least(1), (4,), "heads"),
    Flag("length", at_least(2), (128,), "bytes of context"),
    Flag("batch", at_least(1), (8,), "windows of that length a step"),
    Flag("steps", at_least(10), (250,), "optimizer steps"),
    Flag("lr", at_least(0.0, float, above=True), (2e-3,), "AdamW's learning rate, behind a tenth of the steps as warm-up"),
    Flag("init", one_of("torch", "notebook"), ("torch",), "initial weights: torch's own, or the notebook's, small ones"),
    Flag("text", str, ("library",), "library: the standard library's documentation; or a UTF-8 file"),
)  # fmt: skip


language_flags = functools.partial(choose_flags, LANGUAGE_FLAGS)


def language_cell(config: dict) -> dict:
    """A cell of `LANGUAGE_FLAGS`, a bug without effect set to "none", without what it does not read, with the text's sha256. Raises
    UsageError for what contradicts itself and for a text that cannot be had."""
    require_heads(config, even=config["position"] == "rotary")
    bug = config["bug"]
    harmless = {"none": True, "norm-dim": config["qk_norm"] == config["post_attn_norm"] == "none",
                "no-position": config["attn_activ"] not in ("tanh", "none")}[bug]  # fmt: skip
    text = load_text(config["text"])
    if config["length"] >= len(text.held_out):
        raise UsageError(f"--length {config['length']}: the held-out text has {len(text.held_out)} bytes; choose a shorter context")
    cell = config | {"bug": "none" if harmless else bug, "sha256": text.sha256[:16]}
    return {key: value for key, value in cell.items() if key != "logit_bias" or config["attn_activ"] == "sigmoid"}


def language_memory(cell: dict) -> tuple[str, float]:
    """For an Experiment's `memory`: MB that training a cell takes, measured at 128 to 2048 bytes of context. Only the fused softmax
    keeps no logits."""
    tokens, layers = cell["batch"] * cell["length"], cell["layers"]
    logits = 0 if cell["attn_activ"] == "softmax" else 6.5 * 4e-6 * cell["heads"] * cell["length"]
    return f"--length {cell['length']}", 300 + tokens * layers * (2e-4 * cell["dim"] + logits)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D/H] with channels i and i + D/2H turned by t / 10000^(2 i H / D). Source: Su et al. 2021."""
    t, half = x.shape[-2], x.shape[-1] // 2
    angle = torch.arange(t, device=x.device)[:, None] * 1e4 ** (-torch.arange(half, device=x.device) / half)
    one, other = x.split(half, -1)
    return torch.cat([one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()], -1)


class CausalAttention(nn.Module):
    """Causal multi-head attention with the notebook's options, a mixing for TransformerLayer: packed tokens [B T, D] and (B, T) ->
    [B T, D]. Queries and keys are linear, values come from a GeGLU. qk_activ, then qk_norm (no weights), then rotary positions;
    logits are q k^T times the scale. For softmax and sigmoid the linear bias softplus(slope) (j - i), a slope a head from 1, and
    the mask are added; for tanh and none the bias is, and the mask multiplies the weights. post_attn_norm acts on what each head
    mixed. Softmax goes through torch's fused attention. options: a cell of LANGUAGE_FLAGS. Source: attention notebook, 2024-10-10;
    logit scale: QKNorm, Henry et al. 2020; bias of sigmoids: Ramapuram et al. 2024."""

    def __init__(self, options: dict):
        super().__init__()
        self.options, dim, self.heads = options, options["dim"], options["heads"]
        self.inputs, self.out = Linear(dim, 4 * dim), Linear(dim, dim)  # query, key, gate of the value, value
        self.slope = nn.Parameter(torch.ones(self.heads)) if options["position"] == "linear" else None
        start, _, learned = options["logit_scale"].partition("-")
        length = options["length"]
        scale = math.log2(length**2 - length) if start == "high" else (dim // self.heads) ** -0.5
        log_scale = torch.full((self.heads,), math.log(scale))  # of its logarithm: a start of 14 and one of 0.2 learn alike
        self.log_scale = nn.Parameter(log_scale) if learned else log_scale
        self.fused = options["attn_activ"] == "softmax"

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        query, key, gate, value = self.inputs(x).chunk(4, 1)
        parts = (query, key, F.gelu(gate) * value)
        query, key, value = (part.view(*shape, self.heads, -1).transpose(1, 2) for part in parts)  # (B, H, T, D/H)
        query, key = self.prepared(query), self.prepared(key)
        query = query * self.log_scale.exp().to(x.device)[:, None, None]
        mixed = self.mix_fused(query, key, value) if self.fused else self.weights(query, key) @ value
        mixed = self.normed(mixed, self.options["post_attn_norm"]).transpose(1, 2).reshape(x.shape)
        return self.out(mixed.contiguous())  # of one fused head, rows stand D + 1 apart: oneDNN is 30 times slower on such

    def prepared(self, x: Tensor) -> Tensor:
        """Queries or keys [B, H, T, D/H], behind activation, norm and rotation."""
        x = F.gelu(x) if self.options["qk_activ"] == "gelu" else x
        x = self.normed(x, self.options["qk_norm"])
        return rotated(x) if self.options["position"] == "rotary" else x

    def normed(self, x: Tensor, kind: str) -> Tensor:
        """x / ||x|| or x / sqrt(mean x^2) over the last dimension; with the notebook's bug over all of the tensor."""
        if kind == "none":
            return x
        over = {"norm-dim": None}.get(self.options["bug"], -1)
        squares = x.square()
        return x * (squares.mean(over, keepdim=True) if kind == "rms_norm" else squares.sum(over, keepdim=True)).add(1e-8).rsqrt()

    def position_bias(self, t: int) -> Tensor | float:
        """[H, T, T], negative where a query at i looks back to a key at j."""
        if self.slope is None:
            return 0.0
        at = torch.arange(t, device=self.slope.device)
        return F.softplus(self.slope)[:, None, None] * (at - at[:, None])

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """[B, H, T, D/H] twice -> [B, H, T, T], the plain way."""
        t, kind = query.shape[-2], self.options["attn_activ"]
        logits, row = query @ key.mT, torch.arange(1, t + 1, device=query.device)
        keep = row <= row[:, None]
        if kind in ("tanh", "none"):
            activation = torch.tanh if kind == "tanh" else lambda x: x
            return activation(logits) if self.options["bug"] == "no-position" else activation(logits + self.position_bias(t)) * keep
        logits = logits + self.position_bias(t)
        if kind == "softmax":
            return masked_softmax(logits, keep)
        bias = {"none": 0.0, "length": math.log(self.options["length"]), "row": row.log()[:, None]}[self.options["logit_bias"]]
        return masked_sigmoid(logits - bias, keep)

    def mix_fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """weights(query, key) @ value for softmax, without a logit kept. A linear bias softplus(slope) (j - i) is, up to what a row
        shares, one channel more: softplus(slope) in the query, j in the key."""
        if self.slope is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        b, h, t, width = query.shape
        at = torch.arange(t, device=query.device, dtype=query.dtype) - t // 2  # smaller numbers, smaller rounding errors
        query = torch.cat([query, F.softplus(self.slope)[:, None, None].expand(b, h, t, 1)], -1)
        key = torch.cat([key, at[:, None].expand(b, h, t, 1)], -1)
        mixed = F.scaled_dot_product_attention(query, key, F.pad(value, (0, 1)), is_causal=True, scale=1.0)
        return mixed[..., :width]


class LanguageModel(nn.Module):
    """A small pre-norm transformer on bytes: tokens [B, T] int64 -> logits [B T, 256] of the next ones. Feed-forward four times as
    wide as the model. options: a cell of LANGUAGE_FLAGS."""

    def __init__(self, options: dict):
        super().__init__()
        dim = options["dim"]
        self.embed = nn.Embedding(VOCABULARY, dim)
        blocks = [(CausalAttention(options), FeedForward(dim, 4 * dim)) for _ in range(options["layers"])]
        self.layers = nn.ModuleList(TransformerLayer(*block, dim, ("layer", "layer")) for block in blocks)
        self.norm, self.readout = nn.LayerNorm(dim), Linear(dim, VOCABULARY)
        nn.init.normal_(self.embed.weight, std=0.02)
        for block in self.layers if options["init"] == "notebook" else ():
            inner, outer = (block.mixing.inputs, block.feedforward.first), (block.mixing.out, block.feedforward.last)
            for linear, scale in (*((one, 0.25) for one in inner), *((one, 0.5 / options["layers"]) for one in outer)):
                nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.flatten())
        for layer in self.layers:
            x = layer(x, tokens.shape)
        return self.readout(self.norm(x))


def windows(part: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Windows of a part of a text and the bytes that follow: [B, T] twice, int64."""
    taken = torch.from_numpy(part[starts[:, None] + np.arange(length + 1)]).to(Runtime.device, torch.int64)
    return taken[:, :-1], taken[:, 1:]


@torch.no_grad()
def held_out_loss(model: LanguageModel, text: Text, length: int, count: int = HELD_OUT_WINDOWS) -> Tensor:
    """Mean loss in nats a byte over `count` windows, evenly spread over the held-out part: the same for every seed."""
    starts = np.linspace(0, len(text.held_out) - length - 1, count).astype(int)
    inputs, targets = windows(text.held_out, starts, length)
    size = max(1, 2048 // length)
    parts = zip(inputs.split(size), targets.split(size), strict=True)
    return torch.stack([F.cross_entropy(model(x), y.flatten(), reduction="sum") for x, y in parts]).sum() / targets.numel()


class EqualSteps:
    """The pace of plain training: one micro-batch of full length a step, `steps` of them. A pace says before every step how long
    windows are and how many micro-batches it takes, (0, 0) to end; `seen` is told the gradient's norm behind it."""

    def __init__(self, config: dict, model: LanguageModel):
        self.left, self.length = config["steps"], config["length"]

    def next(self) -> tuple[int, int]:
        self.left -= 1
        return (self.length, 1) if self.left >= 0 else (0, 0)

    def seen(self, gradient_norm: Tensor) -> None:
        pass


def train_on_text(config: dict, seed: int, pace: Callable | None = None) -> dict:
    """Train the LanguageModel of a cell of LANGUAGE_FLAGS with AdamW (decay 0.01; the rate climbs over the first tenth of `steps`,
    then stays). A micro-batch has batch x length bytes, in windows of the pace's length (default: `EqualSteps`). Returns `loss`,
    held out, in nats a byte over windows of full `length`, and `bits`; `steps` and `tokens` trained on; `gradient_norm`, median
    over steps; a step `train_loss`, `gradient_curve`, `length_curve`, `micro_batch_curve`; `curve`, held-out loss behind `at` steps
    (a tenth of `steps` apart, and at the end); `diverged`, the first step whose loss or gradient is not finite, else NaN."""
    text = load_text(config["text"])
    with initialised_from(seed):
        model = LanguageModel(config).to(Runtime.device)
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == flat] for flat in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config["lr"], betas=(0.9, 0.95), fused=True)
    rng, pace, every = stream(seed, "order"), (pace or EqualSteps)(config, model), max(config["steps"] // 10, 1)
    curves, size, warmup = {"train_loss": [], "gradient_curve": []}, config["batch"] * config["length"], every
    lengths, counts, points, at = [], [], [], []
    while (taken := pace.next())[1]:
        if len(lengths) % every == 0:
            points.append(held_out_loss(model, text, config["length"], HELD_OUT_WINDOWS // 8))
            at.append(len(lengths))
        length, count = taken
        losses = []
        for _ in range(count):
            starts = rng.integers(len(text.train) - length, size=size // length)
            inputs, targets = windows(text.train, starts, length)
            loss = F.cross_entropy(model(inputs), targets.flatten())
            (loss / count).backward()
            losses.append(loss.detach())
        norm = torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])).norm()
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * min(1.0, (len(lengths) + 1) / warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pace.seen(norm)
        curves["train_loss"].append(torch.stack(losses).mean())
        curves["gradient_curve"].append(norm)
        lengths.append(length)
        counts.append(count)
    final = held_out_loss(model, text, config["length"])
    result = {name: torch.stack(rows).cpu().numpy() for name, rows in curves.items()}
    loss, tokens = float(final), float(np.dot(counts, [size // length * length for length in lengths]))
    result |= {"loss": loss, "bits": loss / math.log(2), "steps": float(len(lengths)), "tokens": tokens}
    result |= {"gradient_norm": float(np.median(result["gradient_curve"])), "micro_batch_curve": np.array(counts, np.float32)}
    result |= {"length_curve": np.array(lengths, np.float32), "curve": torch.stack([*points, final]).cpu().numpy()}
    diverged = diverged_at(result["train_loss"], result["gradient_curve"])
    return result | {"at": np.array([*at, len(lengths)], np.float32), "diverged": diverged}


# %% 20 Graph questions

KINDS = ("query", "passage query", "passage", "subject", "object", "entity", "candidate")  # of nodes; subject, object: mentions
QUERY, PASSAGE_QUERY, PASSAGE, SUBJECT, OBJECT, ENTITY, CANDIDATE = range(len(KINDS))
LINKS = ("passage", "entity", "sentence", "coreference")  # of a mention: to its passage, its entity, and mentions of either
MOST_HOPS = 3
SLOTS = MOST_HOPS + 2  # of a node's words: a name (the query's start), relations (a mention: the rest of its sentence), a text
MASK_WORD, FIRST_WORD = 1, 2  # word 0 stands for words that are not known
QUERY_FORMS = ("start", "none", "everywhere", "node", "nodes", "everywhere-marked", "node-marked")


class Questions(NamedTuple):
    """Q questions as nodes with words, without edges yet, packed question after question; the first node of each is its query.
    Indices are of nodes, -1 for none. kind, question [V]; entity, passage, sentence [V]: what a mention belongs to (an entity's
    is itself, so is a passage's; sentences have numbers of their own); step [V]: of the gold chain, that a mention states, from 1
    on, 0 none; word, node, slot [W]: node by node, the words each starts from; start, answer [Q]: entities; hops [Q]; floor,
    no_start [Q]: chance that the best guess is right without the query, and with its relations but not its start (NaN: unknown)."""

    kind: np.ndarray
    question: np.ndarray
    entity: np.ndarray
    passage: np.ndarray
    sentence: np.ndarray
    step: np.ndarray
    word: np.ndarray
    node: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    answer: np.ndarray
    hops: np.ndarray
    floor: np.ndarray
    no_start: np.ndarray


def chains(objects: np.ndarray, hops: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All chains of `hops` different relations. objects [Q, entities, relations]: whom a fact names, -1 none. Returns path
    [hops + 1, Q, entities, C], the entities on the chain from each start along each of C lists of relations; whether it is there
    and meets no entity twice [Q, entities, C]; the lists [C, hops]."""
    q, entities, relations = objects.shape
    lists = np.array(list(itertools.permutations(range(relations), hops)))
    path, found = [np.broadcast_to(np.arange(entities)[:, None], (q, entities, len(lists)))], True
    for step in range(hops):
        at = (path[-1] * relations + lists[:, step]).reshape(q, -1)
        end = np.take_along_axis(objects.reshape(q, -1), at, 1).reshape(path[0].shape)
        found = found & (end >= 0) & np.all([end != earlier for earlier in path], 0)
        path.append(np.maximum(end, 0))
    return np.stack(path), found, lists


def draw_facts(rng: np.random.Generator, count: int, hops: int, world: dict) -> tuple[np.ndarray, ...]:
    """Facts (subject, relation, object) of graphs in which there is a chain: [3, Q, facts], no subject and relation twice; and what
    `chains` tells of them: path, found and lists. Other graphs are drawn anew."""
    e, r, kept, missing = world["entities"], world["relations"], [], count
    while missing > 0:
        n = missing + missing // 8 + 8
        cells = rng.random((n, e * r)).argsort(1)[:, : world["facts"]]
        subject, relation = np.divmod(cells, r)
        facts = np.stack([subject, relation, (subject + rng.integers(1, e, cells.shape)) % e])
        objects = np.full((n, e * r), -1)
        np.put_along_axis(objects, cells, facts[2], 1)
        path, found, lists = chains(objects.reshape(n, e, r), hops)
        have = found.any((1, 2))
        kept.append((facts[:, have], path[:, have], found[have]))
        missing -= have.sum()
    facts, path = (np.concatenate([part[i] for part in kept], 1)[:, :count] for i in (0, 1))
    return facts, path, np.concatenate([part[2] for part in kept])[:count], lists


def best_guess(ends: np.ndarray, known: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Chance [Q] that the most likely candidate [Q, entities] bool is the answer, if that is the end [Q, C] of any of the chains
    that are known to be possible [Q, C] bool."""
    counts = np.zeros(candidate.shape)
    np.add.at(counts, (np.nonzero(known)[0], ends[known]), 1)
    return (counts * candidate).max(1) / (counts * candidate).sum(1)


def draw_questions(rng: np.random.Generator, count: int, hops: int, world: dict) -> Questions:
    """Questions on facts of their own: `world` tells how many `entities` (drawn from so many `names`), `relations`, `facts`
    (subject, relation, object; a subject and relation have one object at most), facts `restated`, `passages` they are spread over
    evenly, and `candidates`, the answer among them. A question is a start and `hops` different relations, uniform among the chains
    that meet no entity twice, so that nothing but the query tells them apart. A sentence "subject relation object" makes two
    mentions. Words: FIRST_WORD + name, behind all names + relation."""
    e, told, every = world["entities"], world["facts"] + world["restated"], np.arange(count)
    facts, path, found, lists = draw_facts(rng, count, hops, world)
    path, found = path.reshape(hops + 1, count, -1), found.reshape(count, -1)
    pick = (rng.random(found.shape) * found).argmax(1)
    gold, asked = path[:, every, pick], lists[pick % len(lists)]  # [hops + 1, Q], [Q, hops]
    keys = rng.random((count, e))
    keys[every, gold[-1]] = 2
    candidate = keys >= np.sort(keys, 1)[:, [-world["candidates"]]]
    alike = np.arange(found.shape[1]) % len(lists) == pick[:, None] % len(lists)  # chains with the relations that are asked for
    chances = [best_guess(path[-1], known, candidate) for known in (found, found & alike)]

    order = (np.arange(told) % world["facts"])[rng.random((count, told)).argsort(1)]
    subject, relation, object_ = (np.take_along_axis(column, order, 1) for column in facts)  # a sentence each: [Q, told]
    step = sum((i + 1) * ((subject == gold[i, :, None]) & (relation == asked[:, [i]])) for i in range(hops))
    sizes = (1, e, world["passages"], told, told)  # query, entities, passages, subjects, objects
    base = every[:, None] * sum(sizes)
    own = [base + start + np.arange(size) for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False)]
    home, sentence = own[2][:, np.arange(told) * world["passages"] // told], every[:, None] * told + np.arange(told)

    def columns(*parts: np.ndarray | int) -> np.ndarray:
        return np.concatenate([np.broadcast_to(p, (count, size)) for p, size in zip(parts, sizes, strict=True)], 1).ravel()

    name, behind = rng.random((count, world["names"])).argpartition(e - 1, 1)[:, :e] + FIRST_WORD, FIRST_WORD + world["names"]
    said, heard = (np.take_along_axis(name, who, 1) for who in (subject, object_))
    words = [(name[every, gold[0]][:, None], own[0], 0), *((asked[:, [i]] + behind, own[0], 1 + i) for i in range(hops))]
    words += [(name, own[1], 0), *((w, home, SLOTS - 1) for w in (said, relation + behind, heard))]
    words += [(said, own[3], 0), (relation + behind, own[3], 1), (heard, own[4], 0), (relation + behind, own[4], 1)]
    word, node = (np.concatenate([part[i].ravel() for part in words]) for i in (0, 1))
    slot, order = np.concatenate([np.full(part[0].size, part[2]) for part in words]), node.argsort(kind="stable")
    kind = columns(QUERY, np.where(candidate, CANDIDATE, ENTITY), PASSAGE, SUBJECT, OBJECT)
    entity = columns(-1, own[1], -1, own[1][:, :1] + subject, own[1][:, :1] + object_)
    passage, sentence = columns(-1, -1, own[2], home, home), columns(-1, -1, -1, sentence, sentence)
    of_nodes = (kind, np.repeat(every, sum(sizes)), entity, passage, sentence, columns(0, 0, 0, step, step))
    at = (own[1][every, gold[0]], own[1][every, gold[-1]], np.full(count, hops))
    return Questions(*of_nodes, word[order], node[order], slot[order], *at, *chances)


OF_NODE, OF_WORD = Questions._fields[:6], Questions._fields[6:9]  # what a field has a row for; the others: for a question
COUNTED_BY = {"question": "hops", "sentence": "sentence"} | dict.fromkeys(("entity", "passage", "node", "start", "answer"), "kind")


def join_questions(parts: Sequence[Questions]) -> Questions:
    """Several lists of questions as one."""
    columns = {}
    for name in Questions._fields:
        values, offset = [], 0
        for part in parts:
            column, counted = getattr(part, name), COUNTED_BY.get(name)
            values.append(np.where(column >= 0, column + offset, -1) if counted else column)
            offset += len(part.kind) if counted == "kind" else len(part.hops) if counted == "hops" else part.sentence.max() + 1
        columns[name] = np.concatenate(values)
    return Questions(**columns)


def take_questions(questions: Questions, edges: np.ndarray, which: np.ndarray) -> tuple[Questions, np.ndarray]:
    """Some of the questions (numbers, ascending), with their edges [2, E]."""
    chosen = np.isin(questions.question, which)
    new, number = np.where(chosen, chosen.cumsum() - 1, -1), np.searchsorted(which, questions.question)
    columns = {}
    for name, column in questions._asdict().items():
        column = column[chosen if name in OF_NODE else chosen[questions.node] if name in OF_WORD else which]
        columns[name] = np.where(column >= 0, new[column], -1) if COUNTED_BY.get(name) == "kind" else column
    columns["question"] = number[chosen]
    return Questions(**columns), new[edges[:, chosen[edges[0]]]]


def pairs_within(group: np.ndarray) -> np.ndarray:
    """All ordered pairs of different nodes in an equal group >= 0: [2, pairs]."""
    nodes = np.nonzero(group >= 0)[0]
    nodes = nodes[group[nodes].argsort(kind="stable")]
    first, last = (np.searchsorted(group[nodes], group[nodes], side) for side in ("left", "right"))
    one = np.repeat(np.arange(len(nodes)), last - first)
    other = np.arange(len(one)) - np.repeat((last - first).cumsum() - last, last - first)
    return nodes[np.stack([one, other])[:, one != other]]


def link_questions(questions: Questions, links: Sequence[str]) -> np.ndarray:
    """Edges source -> target between all nodes but queries, by some of LINKS: [2, E], both directions, no loops."""
    mention = np.isin(questions.kind, (SUBJECT, OBJECT))
    edges, mentions = [np.zeros((2, 0), int)], np.nonzero(mention)[0]
    for name in links:
        if name in ("passage", "entity"):
            there = np.stack([mentions, getattr(questions, name)[mentions]])
            edges += [there, there[::-1]]
        else:
            pairs = pairs_within(np.where(mention, questions.sentence if name == "sentence" else questions.entity, -1))
            apart = questions.sentence[pairs[0]] != questions.sentence[pairs[1]]  # an entity may stand twice in a sentence
            edges.append(pairs if name == "sentence" or "sentence" not in links else pairs[:, apart])
    return np.concatenate(edges, 1)


def words_in(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"\w+", text.lower())


def read_question(row: dict, word_number: Callable[[str], int]) -> Questions:
    """One question of the user's: a row of the form that `load_questions` tells. Names are found in sentences word by word, longer
    ones first. Raises ValueError that says what is wrong."""
    for key, kind in (("start", str), ("answer", str), ("relations", list), ("passages", list), ("candidates", list)):
        if not isinstance(row.get(key), kind) or not row[key]:
            raise ValueError(f'"{key}" has to be a {"text" if kind is str else "list of texts"}')
    if not isinstance(row.get("entities", []), list):
        raise ValueError('"entities" has to be a list of texts')
    named = [*row["candidates"], row["start"], row["answer"], *row.get("entities", [])]
    if not all(isinstance(text, str) and words_in(text) for text in (*named, *row["passages"], *row["relations"])):
        raise ValueError("names, relations and passages have to be texts with a word in them")
    names = list(dict.fromkeys(tuple(words_in(name)) for name in named))
    candidates = {tuple(words_in(name)) for name in row["candidates"]}
    start, answer = tuple(words_in(row["start"])), tuple(words_in(row["answer"]))
    if answer not in candidates:
        raise ValueError('"answer" has to stand among "candidates"')
    if len(row["relations"]) > MOST_HOPS:
        raise ValueError(f'"relations" has {len(row["relations"])}, at most {MOST_HOPS} can be followed')
    pattern = re.compile("|".join(rf"(?<!\S)(?:{' '.join(name)})(?!\S)" for name in sorted(names, key=len, reverse=True)))
    nodes = [(QUERY, -1, -1, -1)] + [(CANDIDATE if name in candidates else ENTITY, 1 + i, -1, -1) for i, name in enumerate(names)]
    words = [(w, 0, 0) for w in start] + [(w, 0, 1 + i) for i, text in enumerate(row["relations"]) for w in words_in(text)]
    words += [(w, 1 + i, 0) for i, name in enumerate(names) for w in name]
    sentences = 0
    for passage in row["passages"]:
        home = len(nodes)
        nodes.append((PASSAGE, -1, home, -1))
        words += [(w, home, SLOTS - 1) for w in words_in(passage)]
        for name in filter(lambda name: re.search(r"[.!?]\s", name), named):  # "St. Louis" ends no sentence
            passage = re.sub(re.escape(name), " ".join(words_in(name)), passage, flags=re.IGNORECASE)
        for sentence in re.split(r"[.!?](?:\s|$)", passage):
            flat = " ".join(words_in(sentence))
            rest = pattern.sub(" ", flat).split()
            for i, found in enumerate(pattern.finditer(flat)):
                name = tuple(found[0].split(" "))
                words += [(w, len(nodes), 0) for w in name] + [(w, len(nodes), 1) for w in rest]
                nodes.append((OBJECT if i else SUBJECT, 1 + names.index(name), home, sentences))
            sentences += 1
    kind, entity, home, sentence = (np.array(column) for column in zip(*nodes, strict=True))
    word, node, slot = (np.array(column) for column in zip(*((word_number(w), n, s) for w, n, s in words), strict=True))
    zeros, unknown = np.zeros(len(kind), int), np.array([math.nan])
    at = (np.array([1 + names.index(name)]) for name in (start, answer))
    return Questions(
        kind, zeros, entity, home, sentence, zeros, word, node, slot, *at, np.array([len(row["relations"])]), unknown, unknown
    )


@functools.cache
def load_questions(source: str, links: tuple[str, ...]) -> tuple[Questions, np.ndarray, tuple[str, ...], str]:
    """The user's questions, their edges [2, E], the words by number, and the file's sha256. A line each, an object with
    "passages", "candidates", "relations" (1 to 3) as lists of texts, "start" and "answer", and maybe "entities", other names to
    be linked. Words and edges are kept apart in runs/: another edge rule reads no text again. Raises UsageError naming the line."""
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise UsageError(f"--questions {source}: cannot be read ({error.strerror}); name a .jsonl file") from None
    read = keep_arrays("words", content, lambda: read_all(source, content))
    vocabulary, questions = tuple(read.pop("words").tolist()), Questions(**read)
    linked = content + ",".join(links).encode()
    found = keep_arrays("edges", linked, lambda: {"edges": link_questions(questions, links)})
    return questions, found["edges"], vocabulary, hashlib.sha256(content).hexdigest()[:16]


def read_all(source: str, content: bytes) -> dict[str, np.ndarray]:
    """The fields of all questions in a file, and the words by number."""
    number, parts = {}, []
    for i, line in filter(lambda numbered: numbered[1].strip(), enumerate(content.splitlines())):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            parts.append(read_question(row, lambda word: number.setdefault(word, FIRST_WORD + len(number))))
        except (ValueError, TypeError) as error:
            reason = "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
            raise UsageError(f"--questions {source}: line {i + 1}: {reason}; see the README for the form") from None
    if len(parts) < 10:
        raise UsageError(f"--questions {source}: {len(parts)} questions; give at least 10, a question a line")
    return join_questions(parts)._asdict() | {"words": np.array(["?", "[masked]", *number])}


# %% 21 Graph attention


def node_order(nodes: Tensor, count: int) -> Tensor:
    """The stable order of node numbers below `count`; NumPy sorts 16 bits by radix, 17 times as fast as torch does."""
    if nodes.device.type == "cpu" and count <= 1 << 16:
        return torch.from_numpy(nodes.numpy().astype(np.uint16).argsort(kind="stable"))
    return nodes.argsort(stable=True)


@dataclass
class Edges:
    """An edge list source -> target over V nodes, sorted by target, with its transpose. kind [V] int64: of nodes. type [E]: kind of
    the target times len(KINDS) plus kind of the source. by_source orders the edges by source; offsets: where a node's begin."""

    source: Tensor
    target: Tensor
    kind: Tensor

    def __post_init__(self):
        order, nodes = node_order(self.target, len(self.kind)), torch.arange(len(self.kind) + 1, device=self.kind.device)
        self.source, self.target = self.source[order], self.target[order]
        self.by_source = node_order(self.source, len(self.kind))
        self.source_sorted, self.target_by_source = self.source[self.by_source], self.target[self.by_source]
        self.offsets, self.source_offsets = (torch.searchsorted(x, nodes) for x in (self.target, self.source_sorted))
        self.type = self.kind[self.target] * len(KINDS) + self.kind[self.source]

    def matrix(self, values: Tensor, transposed: bool = False) -> Tensor:
        """A number an edge [E] as a sparse matrix [V, V], target by source."""
        at = (self.source_offsets, self.target_by_source, values.index_select(0, self.by_source))
        at = at if transposed else (self.offsets, self.source, values)
        return torch.sparse_csr_tensor(*at, (len(self.kind), len(self.kind)), check_invariants=False)


def edge_products(one: Tensor, at: Tensor, other: Tensor, by: Tensor, block: int = 4096) -> Tensor:
    """Scalar products of rows: one, other [V, H, D/H]; at, by [E] -> [E, H], in blocks of edges that stay in the cache."""
    out = one.new_empty(len(at), one.shape[1])
    for i, j, done in zip(at.split(block), by.split(block), out.split(block), strict=True):
        torch.sum(one.index_select(0, i).mul_(other.index_select(0, j)), -1, out=done)
    return out


def edge_sums(weight: Tensor, rows: Tensor, which: Tensor, offsets: Tensor) -> Tensor:
    """Sums of weight [E, H] times rows[which], rows [V, H, D/H], over the edges of each node: [V, H, D/H]."""
    heads = zip(weight.unbind(1), rows.unbind(1), strict=True)
    bag = functools.partial(F.embedding_bag, which, offsets=offsets, mode="sum", include_last_offset=True)
    return torch.stack([bag(x.contiguous(), per_sample_weights=w.contiguous()) for w, x in heads], 1)


class EdgeAttention(torch.autograd.Function):
    """See `edge_attention`. By hand, since nothing of size [E, D] is kept or made: products go block by block, and weighted sums
    are embedding bags; with csr both are products with a sparse matrix a head. The sum over a softmax's row of weight times
    gradient is the scalar product of output and gradient."""

    @staticmethod
    def products(e: Edges, one: Tensor, other: Tensor, csr: bool) -> Tensor:
        if not csr:
            return edge_products(one, e.target, other, e.source)
        pattern, heads = e.matrix(one.new_zeros(len(e.source))), zip(one.unbind(1), other.unbind(1), strict=True)
        found = [torch.sparse.sampled_addmm(pattern, a.contiguous(), b.contiguous().T, beta=0.0) for a, b in heads]
        return torch.stack([matrix.values() for matrix in found], 1)

    @staticmethod
    def sums(e: Edges, weight: Tensor, rows: Tensor, csr: bool, by_source: bool = False) -> Tensor:
        if csr:
            heads = zip(weight.unbind(1), rows.unbind(1), strict=True)
            return torch.stack([e.matrix(w, by_source) @ x.contiguous() for w, x in heads], 1)
        if by_source:
            return edge_sums(weight.index_select(0, e.by_source), rows, e.target_by_source, e.source_offsets)
        return edge_sums(weight, rows, e.source, e.offsets)

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, types: Tensor, edges: Edges, csr: bool):
        logits = EdgeAttention.products(edges, query, key, csr).add_(types.index_select(0, edges.type))
        top = torch.segment_reduce(logits, "max", offsets=edges.offsets, initial=-math.inf)
        weight = logits.sub_(top.index_select(0, edges.target)).exp_()
        total = torch.segment_reduce(weight, "sum", offsets=edges.offsets, initial=0.0)
        weight = weight.div_(total.index_select(0, edges.target))
        out = EdgeAttention.sums(edges, weight, value, csr)
        ctx.save_for_backward(query, key, value, types, weight, out)
        ctx.edges, ctx.csr = edges, csr
        ctx.mark_non_differentiable(weight)
        return out, weight

    @staticmethod
    def backward(ctx, gradient: Tensor, _):
        query, key, value, types, weight, out = ctx.saved_tensors
        e, csr, gradient = ctx.edges, ctx.csr, gradient.contiguous()
        back = EdgeAttention.products(e, gradient, value, csr)
        back = back.sub_((gradient * out).sum(-1).index_select(0, e.target)).mul_(weight)  # of logits
        to_query = EdgeAttention.sums(e, back, key, csr)
        to_key, to_value = EdgeAttention.sums(e, back, query, csr, True), EdgeAttention.sums(e, weight, gradient, csr, True)
        return (
            to_query,
            to_key,
            to_value,
            torch.zeros_like(types).scatter_add_(0, e.type[:, None].expand_as(back), back),
            None,
            None,
        )


def edge_attention(query: Tensor, key: Tensor, value: Tensor, types: Tensor, edges: Edges, csr: bool = False) -> tuple[Tensor, ...]:
    """Attention along edges: for every node the softmax over its incoming edges of query k^T + types[type of the edge], times
    values. query (scaled), key, value [V, H, D/H]; types [kinds x kinds, H]. csr: through sparse matrices, faster from some ten
    thousand edges on. Returns what is mixed [V, H, D/H], 0 for a node without edges, and the weights [E, H] in the order of
    `edges`, without gradient."""
    return EdgeAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), types, edges, csr)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, types: Tensor, kind: Tensor, keep: Tensor) -> Tensor:
    """`edge_attention` through torch's fused one, over all pairs: query, key, value [B, H, N, D/H]; kind [B, N]; keep [B, N, N],
    target by source. The logit of a pair of kinds is one more channel a kind: types[own kind] in the query, the one-hot kind in the
    key."""
    width, kinds = value.shape[-1], len(KINDS)
    own = types.view(kinds, kinds, -1)[kind].permute(0, 3, 1, 2)  # [B, H, N, kinds]
    other = F.one_hot(kind, kinds).to(key.dtype)[:, None].expand_as(own)
    query, key = torch.cat([query, own], -1), torch.cat([key, other], -1)
    return F.scaled_dot_product_attention(query, key, F.pad(value, (0, kinds)), attn_mask=keep[:, None], scale=1.0)[..., :width]


class QuestionBatch:
    """Questions in one of QUERY_FORMS, ready for a QuestionModel, packed, on the device. A query node is joined to all nodes of its
    question; "nodes" adds one a passage, with its words beside the query's, joined to the passage and its mentions. candidate [Q,
    C]: nodes, -1 none; answer [Q]: column in it. watched: a list, if layers are to append their attention weights [E, H] to it."""

    def __init__(self, questions: Questions, edges: np.ndarray, form: str):
        kind, question, count = questions.kind, questions.question, len(questions.hops)
        word, node, slot, queries = questions.word, questions.node, questions.slot, np.nonzero(kind == QUERY)[0]
        joined = [edges]
        if form.startswith("nodes"):
            passage = np.nonzero(kind == PASSAGE)[0]
            new = len(kind) + np.arange(len(passage))
            members = np.nonzero(questions.passage >= 0)[0]
            own = np.zeros(len(kind), int)
            own[passage] = new
            there = np.stack([members, own[questions.passage[members]]])
            read, asked = kind[node] == PASSAGE, np.nonzero(kind[node] == QUERY)[0]
            first, last = (np.searchsorted(question[node[asked]], question[passage], side) for side in ("left", "right"))
            times = last - first
            copied = asked[np.arange(times.sum()) + np.repeat(first - times.cumsum() + times, times)]
            word, slot = (np.concatenate([x, x[read], x[copied]]) for x in (word, slot))
            node = np.concatenate([node, own[node[read]], np.repeat(new, times)])
            kind, question = np.append(kind, np.full(len(new), PASSAGE_QUERY)), np.append(question, question[passage])
            joined += [there, there[::-1]]
        if form.startswith("node"):
            others = np.nonzero(kind != QUERY)[0]
            there = np.stack([others, queries[question[others]]])
            joined += [there, there[::-1]]
        source, target = np.concatenate([*joined, np.tile(np.arange(len(kind)), (2, 1))], 1)
        self.form, self.count, self.questions = form, count, questions
        send = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(Runtime.device)  # noqa: E731
        self.edges = Edges(send(source), send(target), send(kind.astype(np.int64)))
        self.kind, self.question, self.queries, self.watched = self.edges.kind, send(question), send(queries), None
        order, bag = node.argsort(kind="stable"), node * SLOTS + slot
        used, index = np.unique(word, return_inverse=True)
        self.used, self.word = send(used), send((index + slot * len(used))[order])  # rows of a table [SLOTS, used words]
        self.word_weight = send((1 / np.bincount(bag)[bag])[order].astype(np.float32))  # mean over a node's words in a slot
        self.word_offsets = send(np.searchsorted(node[order], np.arange(len(kind))))
        self.start = send(np.nonzero(questions.entity == questions.start[questions.question])[0])
        candidate = np.nonzero(kind == CANDIDATE)[0]
        sizes = np.bincount(question[candidate], minlength=count)
        column, table = np.arange(len(candidate)) - np.repeat(sizes.cumsum() - sizes, sizes), np.full((count, sizes.max()), -1)
        table[question[candidate], column] = candidate
        self.candidate, self.answer = send(table), send((table == questions.answer[:, None]).argmax(1))

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """For `dense_attention`: each node's place among B x N [V]; kinds [B, N]; keep [B, N, N]."""
        sizes = torch.bincount(self.question)
        order = self.question.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[self.question[order]]
        n = int(sizes.max())
        place, kind = place + n * self.question, torch.zeros(self.count * n, dtype=torch.int64, device=place.device)
        kind[place] = self.kind
        keep = torch.zeros(self.count * n, n, dtype=torch.bool, device=place.device)
        keep[place[self.edges.target], place[self.edges.source] % n] = True
        return place, kind.view(-1, n), keep.view(-1, n, n)


class KindLinear(nn.Module):
    """A linear layer for each kind of node: x [V, in], kind [V] -> [V, out]. Source: HGT, Hu et al. 2020."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.parts = nn.ModuleList(Linear(before, after) for _ in KINDS)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        order = node_order(kind, len(KINDS))
        rows = x.index_select(0, order).split(torch.bincount(kind, minlength=len(KINDS)).tolist())
        out = torch.cat([part(some) for part, some in zip(self.parts, rows, strict=True) if len(some)])
        return out.index_select(0, torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device)))


class SharedLinear(Linear):
    """A linear layer that does not read the kind."""

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return super().forward(x)


class QuestionLayer(nn.Module):
    """Pre-norm attention along edges, then feed-forward (twice as wide), x [V, D] -> [V, D]. types: "embedding", "none" or
    "switch", a weight for each kind; form: "edges" or "dense"."""

    def __init__(self, dim: int, heads: int, types: str, form: str):
        super().__init__()
        linear = KindLinear if types == "switch" else SharedLinear
        self.heads, self.form = heads, form
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.inputs, self.out = linear(dim, 3 * dim), linear(dim, dim)
        self.first, self.last = linear(dim, 2 * dim), linear(2 * dim, dim)
        self.types = nn.Parameter(torch.zeros(len(KINDS) ** 2, heads), requires_grad=types != "none")

    def mixed(self, x: Tensor, batch: QuestionBatch) -> Tensor:
        query, key, value = (part.unflatten(1, (self.heads, -1)) for part in self.inputs(x, batch.kind).chunk(3, 1))
        query = query * query.shape[-1] ** -0.5
        if self.form == "dense":
            place, kind, keep = batch.dense
            padded = [part.new_zeros(kind.numel(), *part.shape[1:]).index_copy(0, place, part) for part in (query, key, value)]
            padded = [part.unflatten(0, kind.shape).transpose(1, 2) for part in padded]
            return dense_attention(*padded, self.types, kind, keep).transpose(1, 2).flatten(0, 1).index_select(0, place).flatten(1)
        mixed, weight = edge_attention(query, key, value, self.types, batch.edges)
        if batch.watched is not None:
            batch.watched.append(weight)
        return mixed.flatten(1)

    def forward(self, x: Tensor, batch: QuestionBatch) -> Tensor:
        x = x + self.out(self.mixed(self.norm1(x), batch), batch.kind)
        return x + self.last(F.relu(self.first(self.norm2(x), batch.kind)), batch.kind)


class QuestionModel(nn.Module):
    """A graph transformer that scores candidates: QuestionBatch -> logits [Q, C], -inf where there is no candidate. A node starts
    from its words (a mean a slot, each slot with a matrix of its own) and its kind. words: how many are known. options: a cell of
    QUESTION_FLAGS. Source: HDE, Tu et al. 2019; the notebook's query node, 004."""

    def __init__(self, options: dict, words: int):
        super().__init__()
        dim, depth = options["dim"], options["depth"]
        self.embed, self.kinds = nn.Embedding(words, dim), nn.Embedding(len(KINDS), dim)
        self.slots = nn.Parameter(torch.randn(SLOTS, dim, dim) * dim**-0.5)
        self.mark, self.inject = nn.Parameter(torch.randn(dim)), Linear(dim, dim)
        nn.init.normal_(self.kinds.weight, std=0.5 * (options["types"] != "none"))
        self.kinds.weight.requires_grad_(options["types"] != "none")
        make = functools.partial(QuestionLayer, dim, options["heads"], options["types"], options["form"])
        self.layers = nn.ModuleList([make()] * depth if options["share"] == "on" else [make() for _ in range(depth)])
        self.norm, self.readout = nn.LayerNorm(dim), Linear(dim, 1)

    def nodes(self, batch: QuestionBatch) -> Tensor:
        """Final states of all nodes: [V, D]."""
        table = (self.embed(batch.used) @ self.slots).flatten(0, 1)
        x = F.embedding_bag(batch.word, table, batch.word_offsets, mode="sum", per_sample_weights=batch.word_weight)
        x, query = x + self.kinds(batch.kind), self.inject(x.index_select(0, batch.queries))
        if batch.form.startswith("everywhere"):
            x = x + query.index_select(0, batch.question)
        if batch.form == "start":
            x = x.index_add(0, batch.start, query.index_select(0, batch.question[batch.start]))
        if batch.form.endswith("marked"):
            x = x.index_add(0, batch.start, self.mark.expand(len(batch.start), -1))
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x)

    def forward(self, batch: QuestionBatch) -> Tensor:
        score = self.readout(self.nodes(batch))[:, 0]
        return score[batch.candidate].masked_fill(batch.candidate < 0, -math.inf)


# %% 22 Answering

QUESTION_FLAGS = (
    Flag("query", one_of(*QUERY_FORMS), ("start",), "where the query is: on the start's nodes, nowhere, on all nodes, a node "
         "joined to all, with one more for each passage; -marked: the start's nodes are told, too"),
    Flag("hops", widths, ((1, 2, 3),), "relations of a question, joined by commas: each trial trains on all of them"),
    Flag("entities", at_least(2), (8,), "entities of a graph"),
    Flag("relations", at_least(1), (3,), "relations of the world"),
    Flag("facts", at_least(1), (16,), "facts of a graph"),
    Flag("restated", at_least(0), (0,), "facts that are told twice"),
    Flag("passages", at_least(1), (8,), "passages of a graph, in which the facts are told"),
    Flag("candidates", at_least(2), (6,), "answers to choose from"),
    Flag("names", at_least(2), (200,), "names of the world"),
    Flag("links", str, ("passage,entity,sentence,coreference",), f"edges of a mention: some of {','.join(LINKS)}"),
    Flag("types", one_of("embedding", "none", "switch"), ("embedding",), "node kinds: embedded, with a logit a pair of kinds; "
         "unread; or weights of their own"),
    Flag("share", one_of("on", "off"), ("on",), "one layer's weights for all layers"),
    Flag("depth", at_least(1), (6,), "layers"),
    Flag("dim", at_least(1), (64,), "width"),
    Flag("heads", at_least(1), (4,), "heads"),
    Flag("form", one_of("edges", "dense"), ("edges",), "attention over the edge list, or fused over all pairs: the same numbers"),
    Flag("steps", at_least(10), (1500,), "optimizer steps"),
    Flag("batch", at_least(1), (32,), "questions a step"),
    Flag("lr", at_least(0.0, float, above=True), (3e-3,), "AdamW's learning rate; climbs for 100 steps, falls in the last 30%"),
    Flag("curriculum", at_least(0.0, float), (0.0,), "each further hop joins after that share of the steps"),
    Flag("test-questions", at_least(1), (500,), "new questions of each number of hops, to be answered in the end"),
    Flag("questions", str, ("generated",), "generated, or your own: a .jsonl file of the form that the README tells"),
)  # fmt: skip
WORLD = ("entities", "relations", "facts", "restated", "passages", "candidates", "names")


question_flags = functools.partial(choose_flags, QUESTION_FLAGS)


def question_cell(config: dict) -> dict:
    """A cell of `QUESTION_FLAGS`, without what the user's own questions make needless. Raises UsageError for what cannot be."""
    hops, entities, relations = config["hops"], config["entities"], config["relations"]
    told, few = config["facts"] + config["restated"], entities <= max(hops) or config["facts"] < max(hops)
    require_heads(config)
    names = config["links"].split(",")
    if not set(names) <= set(LINKS) or len(set(names)) < len(names):
        raise UsageError(f"--links {config['links']}: name some of {','.join(LINKS)}, each once")
    if config["questions"] != "generated":
        sha = load_questions(config["questions"], tuple(names))[3]
        return {key: value for key, value in config.items() if key not in (*WORLD, "hops", "curriculum")} | {"sha256": sha}
    for wrong, flag, fix in (
        (max(hops) > relations, "hops", f"a chain has different relations, and there are --relations {relations}"),
        (max(hops) > MOST_HOPS, "hops", f"at most {MOST_HOPS}"),
        (len(set(hops)) < len(hops), "hops", "name each number once"),
        (config["candidates"] > entities, "candidates", f"more answers than --entities {entities}"),
        (entities > config["names"], "entities", f"there are --names {config['names']}; take more"),
        (config["facts"] > entities * relations, "facts", f"at most entities x relations = {entities * relations}"),
        (config["restated"] > config["facts"], "restated", f"there are --facts {config['facts']}"),
        (config["passages"] > told, "passages", f"only {told} sentences are told; take fewer"),
        (few, "hops", f"{entities} entities and {config['facts']} facts are too few"),
    ):
        if wrong:
            shown = ",".join(map(str, hops)) if flag == "hops" else config[flag]
            raise UsageError(f"--{flag} {shown}: {fix}")
    return config


class QuestionData:
    """Where a cell of QUESTION_FLAGS has its questions from: drawn anew for training, or the user's, every fifth held out. words:
    by number; hops: numbers of hops that occur."""

    def __init__(self, config: dict):
        self.config, self.links = config, tuple(config["links"].split(","))
        if config["questions"] == "generated":
            named = [f"n{i}" for i in range(config["names"])] + [f"r{i + 1}" for i in range(config["relations"])]
            self.hops, self.words = config["hops"], ("?", "[masked]", *named)
        else:
            self.file, self.edges, self.words, _ = load_questions(config["questions"], self.links)
            self.hops, held_out = tuple(np.unique(self.file.hops).tolist()), np.arange(len(self.file.hops)) % 5 == 4
            self.rows = {"train": np.nonzero(~held_out)[0], "test": np.nonzero(held_out)[0]}

    def batch(self, questions: Questions, edges: np.ndarray | None = None) -> QuestionBatch:
        return QuestionBatch(questions, link_questions(questions, self.links) if edges is None else edges, self.config["query"])

    def sample(self, rng: np.random.Generator, count: int, hops: Sequence[int]) -> tuple[Questions, np.ndarray]:
        """Questions to train on, with edges: generated, of each of some numbers of hops with the same chance; or of the file's."""
        if self.config["questions"] != "generated":
            some = np.sort(rng.choice(self.rows["train"], min(count, len(self.rows["train"])), replace=False))
            return take_questions(self.file, self.edges, some)
        numbers = np.bincount(rng.integers(len(hops), size=count), minlength=len(hops))
        drawn = [draw_questions(rng, n, h, self.config) for n, h in zip(numbers, hops, strict=True) if n]
        return (questions := join_questions(drawn)), link_questions(questions, self.links)

    def draw(self, rng: np.random.Generator, count: int, hops: Sequence[int]) -> QuestionBatch:
        return self.batch(*self.sample(rng, count, hops))

    def held_out(self, count: int, name: str = "test", size: int = 100) -> dict[int, list[QuestionBatch]]:
        """Up to `count` questions of each number of hops, in batches, the same for every seed. name: "val" or "test", the
        stream they are drawn from; of a file both are the held-out ones."""
        batches = {}
        for hops in self.hops:
            if self.config["questions"] == "generated":
                rng = stream(0, name, hops)
                parts = [(draw_questions(rng, min(size, count - i), hops, self.config), None) for i in range(0, count, size)]
            else:
                rows = self.rows["test"][self.file.hops[self.rows["test"]] == hops][:count]
                parts = [take_questions(self.file, self.edges, rows[i : i + size]) for i in range(0, len(rows), size)]
            batches[hops] = [self.batch(*part) for part in parts]
        return batches


def mask_words(q: Questions, edges: np.ndarray, rng: np.random.Generator, what: str, share: float) -> tuple:
    """Questions and edges with some words hidden, also in passages, and names in the links by which they could be looked up; the
    mentions [M] at which they stood, and the words [M]. what: "entities", one mention of a candidate a question; "entities-named",
    that share of mentions; "random", as many words of any kind."""
    nodes, slots = np.nonzero(np.isin(q.kind, (SUBJECT, OBJECT)))[0], 0
    if what == "entities":
        nodes = rng.permutation(nodes[q.kind[q.entity[nodes]] == CANDIDATE])
        nodes, share = nodes[np.unique(q.question[nodes], return_index=True)[1]], 1.0
    if what == "random":  # a sentence has two mentions and a third word, its relation, which counts at the object
        objects = nodes[q.kind[nodes] == OBJECT]
        nodes, slots, share = np.append(nodes, objects), len(nodes), share * len(nodes) / (len(nodes) + len(objects))
    slots = (np.arange(len(nodes)) >= (slots or len(nodes))).astype(int)
    hit = rng.random(len(nodes)) < share
    hit[rng.integers(len(hit))] = True
    bag, key = q.node * SLOTS + q.slot, nodes[hit] * SLOTS + slots[hit]
    order = bag.argsort(kind="stable")
    first = order[np.searchsorted(bag[order], key).clip(max=len(bag) - 1)]
    there = bag[first] == key  # a sentence of the user's may have no other words
    nodes, slots, target = nodes[hit][there], slots[hit][there], q.word[first[there]]
    relations = q.sentence[nodes[slots == 1]]
    own = np.isin(bag, key) | ((q.slot == 1) & np.isin(q.sentence[q.node], relations) & (q.sentence[q.node] >= 0))
    place = q.passage[q.node] * (q.word.max() + 1) + q.word
    told = (q.slot == SLOTS - 1) & np.isin(place, place[own])
    hidden = np.isin(np.arange(len(q.kind)), nodes[slots == 0])
    looked_up = (hidden[edges[0]] | hidden[edges[1]]) & (q.entity[edges[0]] == q.entity[edges[1]])
    return q._replace(word=np.where(own | told, MASK_WORD, q.word)), edges[:, ~looked_up], nodes, target


def build_question_model(config: dict, seed: int) -> QuestionModel:
    """The untrained model of a cell of QUESTION_FLAGS, with weights drawn from the seed."""
    with initialised_from(seed):
        return QuestionModel(config, len(QuestionData(config).words)).to(Runtime.device)


@torch.no_grad()
def answered(model: QuestionModel, batches: Sequence[QuestionBatch]) -> Tensor:
    """Which questions are answered right: [Q] bool."""
    right = [model(batch).argmax(1) == batch.answer for batch in batches]
    return torch.cat(right) if right else torch.zeros(0, dtype=torch.bool)


class WarmAdamW:
    """AdamW (decay 0.01) on a model, gradients clipped at norm 1; the rate climbs over 100 steps, and falls over the last 30% of
    `steps`."""

    def __init__(self, model: nn.Module, lr: float, steps: int):
        self.parameters, self.lr, self.steps, self.done = list(model.parameters()), lr, steps, 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def step(self, loss: Tensor) -> Tensor:
        """One step down a loss, which is returned without its graph."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.done + 1) / 100, (self.steps - self.done) / (0.3 * self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.done += 1
        return loss.detach()


def train_on_questions(config: dict, seed: int, model: QuestionModel, draw: Callable | None = None, points: int = 20) -> dict:
    """Train a model of a cell of QUESTION_FLAGS in place with AdamW (decay 0.01, gradients clipped at norm 1; the rate climbs over
    100 steps and falls over the last 30%). draw(rng, step): another source of batches. Returns, for each number of hops h:
    `accuracy_h` over new questions, `floor_h` and `no_start_h`, chances of guesses on them, `curve_h`, accuracy on others at 0 to
    `points`; and `accuracy`, their mean, `parameters`, `train_loss` a step, `diverged`, the first step with a loss that is not
    finite, else NaN."""
    data, steps, rng = QuestionData(config), config["steps"], stream(seed, "train")
    count = config["test_questions"]
    validation, test = data.held_out(min(100, count), "val"), data.held_out(count)
    optimizer = WarmAdamW(model, config["lr"], steps)
    losses, curves, wait = [], {hops: [] for hops in data.hops}, config.get("curriculum", 0.0) * steps
    for step in range(steps + 1):
        if len(curves[data.hops[0]]) <= step * points // steps:
            for hops, batches in validation.items():
                curves[hops].append(answered(model, batches).float().mean())
        if step == steps:
            break
        hops = [h for i, h in enumerate(data.hops) if i * wait <= step]
        batch = draw(rng, step) if draw else data.draw(rng, config["batch"], hops)
        losses.append(optimizer.step(F.cross_entropy(model(batch), batch.answer)))
    loss = torch.stack(losses).cpu().numpy()
    result = {"train_loss": loss, "diverged": diverged_at(loss)}
    result |= {"parameters": float(sum(p.numel() for p in model.parameters() if p.grad is not None))}
    for hops in range(1, MOST_HOPS + 1):
        batches = test.get(hops, ())
        result[f"accuracy_{hops}"] = float(answered(model, batches).float().mean()) if batches else math.nan
        for name in ("floor", "no_start"):
            chances = [getattr(batch.questions, name) for batch in batches]
            result[f"{name}_{hops}"] = float(np.mean(np.concatenate(chances))) if chances else math.nan
        if hops in curves:
            result[f"curve_{hops}"] = torch.stack(curves[hops]).cpu().numpy()
    return result | {"accuracy": float(np.mean([result[f"accuracy_{hops}"] for hops in test if test[hops]]))}


def trained_on_questions(config: dict, seed: int) -> tuple[QuestionModel, dict]:
    """The model of a cell of QUESTION_FLAGS as `train_on_questions` leaves it, and what that returns. A run keeps both in runs/,
    for other scripts that need the same model."""
    model, cell = build_question_model(config, seed), {flag.key: config.get(flag.key) for flag in QUESTION_FLAGS}
    state = model.state_dict()  # the weights themselves, which training moves
    make = lambda: train_on_questions(config, seed, model) | {f"weights {n}": w.numpy(force=True) for n, w in state.items()}  # noqa: E731
    kept = keep_arrays("model", trial_key(cell, seed).encode(), make, at.parent.parent) if (at := Runtime.checkpoint) else make()
    model.load_state_dict({name: torch.from_numpy(kept.pop(f"weights {name}")) for name in state})
    return model, {name: value if np.ndim(value) else float(value) for name, value in kept.items()}


# %% 23 Attention, watched and timed


def chain_edges(batch: QuestionBatch) -> np.ndarray:
    """Which edges [E] lead along the chain of facts to the answer: 1; -1 for loops and detours through an entity's node, else 0."""
    q, s, t = batch.questions, batch.edges.source.cpu().numpy(), batch.edges.target.cpu().numpy()
    kind, question = batch.kind.cpu().numpy(), batch.question.cpu().numpy()[s]
    step, entity, sentence = (np.append(x, np.full(len(kind) - len(x), -1)) for x in (q.step, q.entity, q.sentence))
    told = (kind[s] == SUBJECT) & (sentence[s] == sentence[t]) & (step[s] > 0)
    handed = (kind[s] == OBJECT) & (step[s] > 0)
    onward = (kind[t] == SUBJECT) & (step[t] == step[s] + 1) | (t == q.answer[question]) & (step[s] == q.hops[question])
    detour = handed & (entity[s] == t) | (step[t] > 0) & (entity[t] == s)
    return np.where(s == t, -1, np.where(told | handed & onward, 1, np.where(detour, -1, 0)))


class WatchedQuestions:
    """A trained model's attention on the edges of questions: source, target, question, type [E]; weight [L, E, H]; chain [E] as of
    `chain_edges`."""

    def __init__(self, model: QuestionModel, batch: QuestionBatch):
        batch.watched, e = [], batch.edges
        answered(model, [batch])
        self.batch, self.weight, batch.watched = batch, torch.stack(batch.watched).cpu().numpy(), None
        self.source, self.target, self.type = (x.cpu().numpy() for x in (e.source, e.target, e.type))
        self.question, self.start = batch.question.cpu().numpy()[self.source], batch.start.cpu().numpy()
        self.nodes, self.chain = len(batch.kind), chain_edges(batch)

    def without(self, cut: np.ndarray) -> QuestionBatch:
        """The same questions without some edges [E] bool."""
        kept, e, other = torch.from_numpy(~cut).to(Runtime.device), self.batch.edges, copy.copy(self.batch)
        other.edges = Edges(e.source[kept], e.target[kept], e.kind)
        return other

    def flow(self, weight: np.ndarray) -> np.ndarray:
        """What runs along each edge from the start's nodes to the answer, over all layers [E], if each layer hands on half by
        attention [L, E] and keeps half. Source: attention rollout, Abnar and Zuidema 2020."""
        ahead, back = [np.zeros(self.nodes)], [np.zeros(self.nodes)]
        ahead[0][self.start] = back[0][self.batch.questions.answer] = 1
        for layer, late in zip(weight, weight[::-1], strict=True):
            ahead.append((ahead[-1] + np.bincount(self.target, layer * ahead[-1][self.source], self.nodes)) / 2)
            back.append((back[-1] + np.bincount(self.source, late * back[-1][self.target], self.nodes)) / 2)
        met = zip(weight, ahead[:-1], back[-2::-1], strict=True)
        return sum(w * one[self.source] * other[self.target] for w, one, other in met)

    def foremost(self, score: np.ndarray, share: float, among: np.ndarray | None = None) -> np.ndarray:
        """The edges with the highest score of each question, that share of its edges; with `among`, as many of each type as among
        those. Never loops. [E] bool."""
        group = self.question if among is None else self.question * len(KINDS) ** 2 + self.type
        score = np.where(self.source == self.target, -np.inf, score)
        order, sizes = np.lexsort((-score, group)), np.bincount(group)
        wanted = np.round(share * sizes) if among is None else np.bincount(group, among, len(sizes))
        place = np.arange(len(order)) - (sizes.cumsum() - sizes)[group[order]]
        chosen = np.zeros(len(order), bool)
        chosen[order] = place < wanted[group[order]]
        return chosen & np.isfinite(score)

    def auc(self, score: np.ndarray, by_type: bool = False, which: int | None = None) -> float:
        """Chance that an edge of the chain has a higher score than one off it, ties half: among all, or those of its own type; of
        all questions, or of every second (0 or 1). NaN without edges of both."""
        from scipy.stats import rankdata

        found = []
        for one in np.unique(self.type[self.chain == 1]) if by_type else [None]:
            kept = (self.chain >= 0) & ((one is None) | (self.type == one)) & ((which is None) | (self.question % 2 == which))
            hits, n = self.chain[kept] == 1, np.sum(self.chain[kept] == 1)
            if 0 < n < len(hits):
                found.append((n, (rankdata(score[kept])[hits].sum() - n * (n + 1) / 2) / (n * (len(hits) - n))))
        return float(np.average([a for _, a in found], weights=[n for n, _ in found])) if found else np.nan


def draw_attention(
    axes, batch: QuestionBatch, words: Sequence[str], weight: np.ndarray, chain: np.ndarray, named: bool = True
) -> None:
    """One question as its edges' weights [E]: passages, subjects, objects (with their sentence's other words) and entities in
    columns, a sentence a row; the width of a line is its weight (under 0.2: left out), the chain [E] is orange."""
    q, kind = batch.questions, batch.kind.cpu().numpy()
    source, target = batch.edges.source.cpu().numpy(), batch.edges.target.cpu().numpy()
    at, mention = np.zeros((len(kind), 2)), np.isin(q.kind, (SUBJECT, OBJECT)).nonzero()[0]
    column = {QUERY: 0.0, PASSAGE_QUERY: 0.35, PASSAGE: 0.0, SUBJECT: 1.0, OBJECT: 2.2, ENTITY: 3.4, CANDIDATE: 3.4}
    at[:, 0] = [column[k] for k in kind]
    at[mention, 1] = -q.sentence[mention]
    for home in np.unique(q.passage[mention]):
        at[home, 1] = at[mention[q.passage[mention] == home], 1].mean()
    at[len(q.kind) :, 1] = at[(q.kind == PASSAGE).nonzero()[0][: len(kind) - len(q.kind)], 1] - 0.35
    at[q.kind == QUERY, 1] = 1.2
    entities = np.isin(q.kind, (ENTITY, CANDIDATE)).nonzero()[0]
    middle = [at[mention[q.entity[mention] == one], 1].mean() if one in q.entity[mention] else 0.0 for one in entities]
    at[entities[np.argsort(middle)], 1] = np.linspace(at[:, 1].min(), 0, len(entities))
    for edge in np.argsort(chain, kind="stable"):
        gold = chain[edge] == 1
        if source[edge] != target[edge] and (gold or weight[edge] >= 0.2):
            (x, y), (to_x, to_y) = at[source[edge]], at[target[edge]]
            look = {"color": "#E69F00" if gold else "#56B4E9", "alpha": 1.0 if gold else 0.6, "zorder": 2 if gold else 1}
            look |= {"linewidth": max(4 * weight[edge], 0.8), "linestyle": "-" if weight[edge] >= 0.2 else ":"}
            axes.plot((x, to_x), (y, to_y), **look)
            if gold and named:
                middle = (0.45 * x + 0.55 * to_x, 0.45 * y + 0.55 * to_y)
                axes.annotate("", middle, (x, y), arrowprops={"arrowstyle": "-|>", "color": "#E69F00"})
    ends = {q.start[0]: "#009E73", q.answer[0]: "#D55E00"}
    colours = [ends.get(node, "black" if node in entities else "#999999") for node in range(len(kind))]
    axes.scatter(*at.T, s=36 if named else 5, c=colours, zorder=3)
    told = itertools.product((*mention, *entities, 0), range(4))
    text = {(n, s): " ".join(words[w] for w in q.word[(q.node == n) & (q.slot == s)]) for n, s in told}
    for node in (*mention, *entities, 0) if named else ():
        name = text[node, 0] + {q.start[0]: " (start)", q.answer[0]: " (answer)"}.get(node, "")
        name = f"{text[node, 1]} {name}" if q.kind[node] == OBJECT else name
        name = f"question: {name}, " + ", ".join(text[0, s] for s in range(1, 4) if text[0, s]) if node == 0 else name
        axes.annotate(name, at[node], (6, 0), textcoords="offset points", va="center", fontsize=10, zorder=4,
                      bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5})  # fmt: skip
    for x, name in zip((0.0, 1.0, 2.2, 3.4), ("passages", "subjects", "objects", "entities"), strict=True) if named else ():
        axes.text(x, 0.7, name, ha="center", fontsize=11, color="#666666")
    axes.axis("off")
    axes.set_xlim(-0.2, 4.1 if named else 3.6)


def attention_forms(query: Tensor, key: Tensor, value: Tensor, types: Tensor, edges: Edges) -> dict[str, Callable[[], Tensor]]:
    """One graph's attention, as of `edge_attention`, in four forms: "plain", all pairs with their logits kept; "fused"; "edges";
    "csr". Calls that return [V, H, D/H]; they agree where every node has an edge into it."""
    nodes, kinds = len(edges.kind), len(KINDS)
    keep = torch.zeros(nodes, nodes, dtype=torch.bool, device=query.device)
    keep[edges.target, edges.source] = True

    def plain() -> Tensor:
        own = types.view(kinds, kinds, -1)[edges.kind].permute(2, 0, 1)  # [H, V, kinds]
        one, other, values = (x.transpose(0, 1) for x in (query, key, value))
        logits = one @ other.mT + own @ F.one_hot(edges.kind, kinds).to(own.dtype).T
        return (logits.masked_fill(~keep, -math.inf).softmax(-1) @ values).transpose(0, 1)

    def fused() -> Tensor:
        parts = (x.transpose(0, 1)[None] for x in (query, key, value))
        return dense_attention(*parts, types, edges.kind[None], keep[None])[0].transpose(0, 1)

    along = {name: functools.partial(edge_attention, query, key, value, types, edges, name == "csr") for name in ("edges", "csr")}
    return {"plain": plain, "fused": fused} | {name: lambda call=call: call()[0] for name, call in along.items()}


def attention_flops(nodes: int, edges: float, dim: int, heads: int) -> dict[str, float]:
    """FLOPs of `attention_forms` forward and backward, two a MAC, in products alone: 2 forward and 4 backward, 5 if fused, which
    makes the logits again. Kinds of nodes are more channels a head: with fused ones in every product, with plain ones in those of
    logits and queries."""
    kinds = len(KINDS) * heads
    dense = {"plain": 2.0 * nodes**2 * (6 * dim + 2 * kinds), "fused": 14.0 * nodes**2 * (dim + kinds)}
    return dense | dict.fromkeys(("edges", "csr"), 12.0 * edges * dim)


# %% 24 PATTERN, solved

DATA_FLAG = Flag(
    "data", str, ("generated",), "generated, or a file of the authors' own graphs, PATTERN_v2.pt as torch_geometric keeps it"
)


def benchmark_cell(config: dict) -> dict:
    """A cell with DATA_FLAG, and the sha256 of its file. Raises UsageError if a split has fewer graphs than train_graphs,
    val_graphs or test_graphs ask for."""
    splits, found = {split: PatternData(0, split) for split in GRAPHS_PER_PATTERN}, {}
    if config["data"] != "generated":
        splits, found["sha256"] = load_graphs(config["data"])
    for split, graphs in splits.items():
        if (wanted := config.get(f"{split}_graphs", 0)) > len(graphs):
            raise UsageError(f"--{split}-graphs {wanted}: the {split} split has {len(graphs)}")
    return config | found


SHARE = 1 / (COMMUNITIES + 1)  # of nodes that are on the pattern: it is as large as a community


@functools.cache
def total_chances(blocks: int, sizes: tuple[int, int] = SIZE_RANGE) -> np.ndarray:
    """Chance of each total size 0, 1, .. of so many blocks, each uniform in `sizes`, the upper bound exclusive."""
    one = np.where(np.arange(sizes[1]) >= sizes[0], 1 / (sizes[1] - sizes[0]), 0.0)
    return functools.reduce(np.convolve, [one] * blocks, np.ones(1))


@functools.cache
def size_weights(n: int, sizes: tuple[int, int] = SIZE_RANGE) -> np.ndarray:
    """log P(n nodes, s of them on the pattern) for s = 0 .. n."""
    hidden, others = (np.pad(total_chances(blocks, sizes), (0, n + 1))[: n + 1] for blocks in (1, COMMUNITIES))
    with np.errstate(divide="ignore"):
        return np.log(hidden * others[::-1])


@functools.cache
def background_density(sizes: tuple[int, int] = SIZE_RANGE) -> float:
    """Expected density among nodes outside the pattern: of all such pairs, over the sizes of communities, the share inside one."""
    size = np.arange(*sizes)
    own, other = (size * (size - 1)).mean(), size.mean() ** 2
    same = own / (own + (COMMUNITIES - 1) * other)
    return same * EDGE_INSIDE + (1 - same) * EDGE_BETWEEN


def log_odds(density: float) -> tuple[float, float]:
    """log likelihood of no edge and of an edge with this density, relative to a pattern's."""
    return math.log((1 - density) / (1 - EDGE_PATTERN)), math.log(density / EDGE_PATTERN)


def mean_field(adjacency: np.ndarray, steps: int) -> np.ndarray:
    """Chances [n] that nodes are on the pattern, told apart by degree alone: a node outside has edges of `background_density` to
    others outside, all other pairs have 0.5. Each step is one round of message passing; the first is a threshold of the degree."""
    n, (none, edge) = len(adjacency), log_odds(background_density())
    weight, ways = np.where(adjacency, edge, none), np.exp(size_weights(n))
    np.fill_diagonal(weight, 0.0)
    share = (ways @ np.arange(n + 1)) / ways.sum() / n if ways.any() else SHARE
    chance = np.full(n, share)
    for _ in range(steps):
        chance = 1 / (1 + (1 - share) / share * np.exp(weight @ (1 - chance)))
    return chance


def chance_recalls(chance: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Shares in points of both classes [2] that are told right by chances [V] to be on the pattern, over SHARE, which is best for
    their mean. label [V]: of 0 and 1, or itself chances, to get what these expect."""
    on = chance > SHARE
    return 100 * np.array([((1.0 - label) * ~on).sum() / (1.0 - label).sum(), (label * on).sum() / label.sum()])


class LabelChain:
    """Gibbs sampling of which nodes are on an unknown pattern, in B graphs at once; the communities' densities and the prior of
    all sizes are known. adjacencies: [n, n] each. communities off: nodes outside the pattern are one class, of one density. label
    [B, N, K] one-hot, pattern last; `start` labels [n] to start from, else they are drawn from the prior. Source: collapsed
    sampling of stochastic block models, Nowicki and Snijders 2001."""

    def __init__(self, adjacencies: Sequence[np.ndarray], rng: np.random.Generator, communities: bool = True,
                 start: Sequence[np.ndarray] | None = None, sizes: tuple[int, int] = SIZE_RANGE):  # fmt: skip
        b, n = len(adjacencies), max(map(len, adjacencies))
        self.blocks, self.sizes, self.communities = COMMUNITIES + 1 if communities else 2, sizes, communities
        none, edge = log_odds(EDGE_BETWEEN if communities else background_density(sizes))
        self.count = torch.tensor([len(a) for a in adjacencies])
        self.weight, self.label = torch.zeros(n, b, n), torch.zeros(b, n, self.blocks)  # of a pair: node, graph, other node
        for i, a in enumerate(adjacencies):
            self.weight[: len(a), i, : len(a)] = torch.from_numpy(np.where(a, edge, none) * ~np.eye(len(a), dtype=bool))
            label = self.draw_labels(len(a), rng) if start is None else start[i]
            self.label[i, torch.arange(len(a)), torch.from_numpy(label)] = 1.0
        # Pairs of these classes carry the weight: different communities, or two nodes outside the pattern
        self.joint = torch.ones(self.blocks, self.blocks) - torch.eye(self.blocks) * communities
        self.joint[-1] = self.joint[:, -1] = 0.0
        if not communities:  # log chance of a labelling with 0, 1, .. nodes on the pattern, for each graph
            ways = lambda m: np.array([math.lgamma(m + 1) - math.lgamma(s + 1) - math.lgamma(m - s + 1) for s in range(m + 1)])  # noqa: E731
            rows = [size_weights(len(a), sizes) - ways(len(a)) for a in adjacencies]
            rows = [np.pad(row, (0, n + 1 - len(row)), constant_values=-np.inf) for row in rows]
            self.prior = torch.from_numpy(np.stack(rows)).float()
        self.generator, self.graphs = torch.Generator().manual_seed(int(rng.integers(2**62))), torch.arange(b)

    def draw_labels(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Sizes that add up to n, at random, and nodes in any order."""
        while (size := rng.integers(*self.sizes, size=COMMUNITIES + 1)).sum() != n:
            pass
        label = rng.permutation(np.repeat(np.arange(COMMUNITIES + 1), size))
        return label if self.communities else (label == COMMUNITIES).astype(int)

    def size_prior(self, rest: Tensor, own: Tensor) -> Tensor:
        """log prior, but for a constant, if a node joins a class whose others number `rest` [B, K]; own: its class, one-hot."""
        if not self.communities:
            hidden = rest[:, -1:].long()
            return self.prior.gather(1, torch.cat([hidden, hidden + 1], 1).clamp(max=self.prior.shape[1] - 1))
        allowed = (rest < self.sizes[1] - 1) & (((rest * own).sum(1, keepdim=True) >= self.sizes[0]) | (own > 0))
        return (rest + 1).log().masked_fill(~allowed, -math.inf)

    def sweep(self) -> Tensor:
        """Draw every node's label once, given all others; then as many swaps as half the nodes, of two nodes each. Returns the
        chances [B, N] with which the pattern was drawn, which average to the posterior with less noise than labels."""
        size, chances = self.label.sum(1), torch.zeros(self.label.shape[:2])
        for i in range(len(self.weight)):
            own = self.label[:, i].clone()
            rest = size - own
            logits = torch.bmm(self.weight[i][:, None], self.label)[:, 0] @ self.joint + self.size_prior(rest, own)
            real = (i < self.count)[:, None]
            chance = torch.softmax(torch.where(real, logits, 0.0), 1)
            noise = torch.empty_like(chance).exponential_(generator=self.generator)
            drawn = F.one_hot((chance / noise).argmax(1), self.blocks) * real
            self.label[:, i], size, chances[:, i] = drawn, rest + drawn, chance[:, -1]
        for _ in range(len(self.weight) // 2):
            self.swap()
        return chances

    def swap(self) -> None:
        """Propose that two random nodes of each graph exchange labels; sizes stay. Metropolis's rule."""
        rows = self.graphs
        i, j = ((torch.rand(len(rows), generator=self.generator) * self.count).long() for _ in range(2))
        one, two, between = self.label[rows, i], self.label[rows, j], self.weight[i, rows, j][:, None]
        field = [torch.bmm(self.weight[k, rows][:, None], self.label)[:, 0] - between * other for k, other in ((i, two), (j, one))]
        gain = ((field[0] - field[1]) @ self.joint * (two - one)).sum(1)
        accept = (torch.rand(len(rows), generator=self.generator).log() < gain)[:, None]
        self.label[rows, i], self.label[rows, j] = torch.where(accept, two, one), torch.where(accept, one, two)


def unknown_pattern(adjacencies: Sequence[np.ndarray], rng: np.random.Generator, sweeps: int, at_once: int = 250,
                    start: Sequence[np.ndarray] | None = None, **options) -> list[np.ndarray]:  # fmt: skip
    """Each node's chance [n] to be on a pattern of which only the generator is known, from one chain of `LabelChain` a graph; its
    first fifth is left out. Graphs of like size run together."""
    order, found = np.argsort([len(a) for a in adjacencies], kind="stable"), {}
    for part in np.split(order, range(at_once, len(order), at_once)):
        chain = LabelChain([adjacencies[i] for i in part], rng, start=start and [start[i] for i in part], **options)
        kept = [chain.sweep() for _ in range(sweeps)][sweeps // 5 :]
        found |= {i: row[: len(adjacencies[i])].double().numpy() for i, row in zip(part, torch.stack(kept).mean(0), strict=True)}
    return [found[i] for i in range(len(adjacencies))]


def kept_posterior(graphs: Sequence[Graph], seed: int, sweeps: int) -> list[np.ndarray]:
    """`unknown_pattern` of graphs, the mean of two chains: each node's chance [n], the best that anyone can know. It lies in runs/
    for the next one who asks for the same graphs."""

    def make() -> dict[str, np.ndarray]:
        adjacencies = [graph.adjacency() for graph in graphs]
        chains = [unknown_pattern(adjacencies, stream(seed, "init", i), sweeps) for i in range(2)]
        return {"chance": np.mean([np.concatenate(chain) for chain in chains], 0)}

    sizes = [len(graph.feature) for graph in graphs]
    made_of = repr((seed, sweeps)).encode() + b"-".join(graph.edges.tobytes() for graph in graphs)
    return np.split(keep_arrays("posterior", made_of, make)["chance"], np.cumsum(sizes)[:-1])


class BitRows(NamedTuple):
    """A graph as bit sets of nodes, 64 to a word. rows [2, W, n]: each node's non-neighbours and neighbours; symbols [3, W]: the
    nodes of each feature."""

    rows: np.ndarray
    symbols: np.ndarray


def bit_rows(adjacency: np.ndarray, feature: np.ndarray) -> BitRows:
    """adjacency [n, n] bool, feature [n]."""
    n = len(adjacency)
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % 64)])  # noqa: E731
    pack = lambda x: np.packbits(pad(x), axis=-1, bitorder="little").view(np.uint64)  # noqa: E731
    rows = pack(np.stack([~adjacency & ~np.eye(n, dtype=bool), adjacency]))
    return BitRows(np.ascontiguousarray(rows.swapaxes(1, 2)), pack(np.arange(PATTERN_SYMBOLS)[:, None] == feature))


def nodes_in(sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Set and node of every bit that is set, sets [W, M]."""
    bits = np.unpackbits(np.ascontiguousarray(sets.T).view(np.uint8), bitorder="little")
    return np.divmod(np.flatnonzero(bits), 64 * len(sets))


def search_order(pattern: Pattern) -> list[int]:
    """The order in which to look for a pattern's nodes that should leave the fewest partial matches by chance: each next node is
    the least likely one to be met outside, from the best first node."""
    weight = np.log(np.where(pattern.adjacency, background_density(), 1 - background_density()))
    best = (math.inf, [])
    for first in range(len(weight)):
        order, chance, fits, partial = [first], weight[first].copy(), 0.0, 0.0
        while len(order) < len(weight):
            chance[order] = math.inf
            order.append(int(chance.argmin()))
            fits += chance[order[-1]] + math.log(np.mean(SIZE_RANGE) * (COMMUNITIES + 1) / PATTERN_SYMBOLS)
            partial += math.exp(fits)
            chance += weight[order[-1]]
        best = min(best, (partial, order))
    return best[1]


def embeddings(pattern: Pattern, order: Sequence[int], graph: BitRows, look_ahead: int = 4) -> np.ndarray:
    """All places of a pattern in a graph, as an induced subgraph with its features: [M, P], the graph's node for each of the
    pattern's. A join a node, in `order`; from `look_ahead` nodes on, partial matches that leave some node no place are dropped."""

    def places(partial: np.ndarray, node: int) -> np.ndarray:
        """Where `node` fits to partial matches [d, M]: bit sets [W, M]."""
        fit = np.repeat(graph.symbols[pattern.feature[node]][:, None], partial.shape[1], 1)
        for row, other in zip(partial, order, strict=False):
            for word, bits in zip(fit, graph.rows[int(pattern.adjacency[node, other])], strict=True):
                word &= bits[row]
        return fit

    partial = nodes_in(graph.symbols[pattern.feature[order[0]]][:, None])[1][None]
    for depth in range(1, len(order)):
        for node in order[depth + 1 :] if depth >= look_ahead else ():
            partial = partial[:, np.bitwise_or.reduce(places(partial, node)) != 0]
            if not partial.size:
                return np.empty((0, len(order)), int)
        match, node = nodes_in(places(partial, order[depth]))
        partial = np.concatenate([partial[:, match], node[None]])
    return partial[np.argsort(order)].T


SURE = 14  # nodes: a pattern so large is met by chance in less than one graph of 10,000


def known_patterns(graph: Graph, patterns: Sequence[Pattern], orders: Sequence[Sequence[int]],
                   chance: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:  # fmt: skip
    """Each node's chance [n] to be on the pattern, if that is one of `patterns` (with their `search_order`s), and how often each of
    those was met: the posterior over all their places, by how likely they make the edges around them if outside the pattern there
    is one density. Large patterns come first, those most like `chance` [n], a first guess; with one that is SURE the search ends.
    The first guess is returned where none is met."""
    adjacency, n = graph.adjacency(), len(graph.feature)
    count = lambda feature, weights=None: np.bincount(feature, weights, PATTERN_SYMBOLS)  # noqa: E731
    guess, bits, degree = count(graph.feature, chance), bit_rows(adjacency, graph.feature), adjacency.sum(1)
    unlike = [(len(p.feature) < SURE, ((count(p.feature) - guess) ** 2).sum()) for p in patterns]
    places, logs, met = [], [], {}
    (none, edge), sizes = log_odds(background_density()), size_weights(n)
    for k in sorted(range(len(patterns)), key=unlike.__getitem__):
        found, size = embeddings(patterns[k], orders[k], bits), len(patterns[k].feature)
        if not len(found):
            continue
        inside = patterns[k].adjacency.sum() // 2
        pairs, edges = size * (n - size) + math.comb(size, 2), degree[found].sum(1) - inside  # that touch the place
        ways = math.lgamma(n + 1) - math.lgamma(n - size + 1)
        log = sizes[size] + size * math.log(PATTERN_SYMBOLS) + math.comb(size, 2) * math.log(2) - ways
        places.append(found)
        logs.append(log - none * (pairs - edges) - edge * edges)
        met[k] = len(found)
        if size >= SURE:
            break
    if not places or not np.isfinite(top := max(log.max() for log in logs)):
        return chance, met
    weights = [np.exp(log - top) for log in logs]
    total = sum(weight.sum() for weight in weights)
    one = lambda place, weight: np.bincount(place.ravel(), np.repeat(weight, place.shape[1]), n)  # noqa: E731
    return sum(map(one, places, weights)) / total, met

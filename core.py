"""Gatebook's shared core: data, masks, layers, training; then the harness that runs and records.

Read it from the top: a function uses only what stands above it.

     1 Process        what must happen before torch is imported; output
     2 Seeds          one random stream per seed and purpose
     3 Data           PATTERN graphs, batches, pyramids, Life, English text, questions on graphs
     4 Masks          masked softmax and sigmoid, adjacency powers
     5 Layers         attention, transformer layer, GIN, graph layer, logic gates
     6 Models         node classifier, logic gates, language model, reader of questions
     7 Metrics        loss, recalls, AUC, oscillation
     8 Gradient log   norms of every parameter at every step
     9 Training
    10 Statistics     intervals, checks, claims, verdicts
    11 Arguments      flags, types, arms
    12 Reach          the code that a trial can reach
    13 Records        finished trials and checkpoints on disk
    14 Runner         one process, a pool, or torchrun
    15 Figures
    16 Logbook        entries, index, appendix
    17 Main

Conventions. Masks are boolean and True means keep. A mistake that the user can mend raises
UsageError and ends as one line on stderr with exit status 2. No file is ever unpickled.
"The notebook" is the research notebook that a script re-runs.

Dimensions
    B graphs in a batch              N nodes of the largest graph in it
    V real nodes of a batch, packed graph after graph: node-wise tensors are [V, D]
    D channels    H heads            K powers of the adjacency
    T steps, or bytes of context    P parameters
    S seeds of one batch of tiny networks, trained in one tensor program
    G gates that a unit mixes, n units of a layer
"""

import os
import signal
import sys
from pathlib import Path

# %% 1 Process

REPOSITORY = Path(__file__).resolve().parent


def leave_quietly(signal_number, frame):
    """End with one line on Ctrl-C while modules are still being imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def open_standard_files():
    """Give closed standard files an empty one, so that no other file gets their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def is_run_as_script():
    """Whether the main program is a file of this repository."""
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    return main_file is not None and Path(main_file).resolve().parent == REPOSITORY


open_standard_files()
# so that a group that cannot be formed ends in one line of ours, not in pages of torch's
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
if is_run_as_script():
    signal.signal(signal.SIGINT, leave_quietly)  # main() restores Python's own handler

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import datetime
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import platform
import re
import shlex
import socket
import subprocess
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.parse
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class UsageError(Exception):
    """A mistake that the user can mend: one line that names the flag or file and the fix."""


def print_to(file, text):
    """Print; a closed or full file, or a letter that it cannot encode, is no failure."""
    if file is None:
        return
    with contextlib.suppress(AttributeError, ValueError, OSError):
        file.reconfigure(errors="replace")
    try:
        print(text, file=file, flush=True)
    except OSError:  # the rest is discarded, so that Python's own flush at exit cannot fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    except ValueError:  # closed
        pass


def say(text):
    """Print a line on stdout, see `print_to`."""
    print_to(sys.stdout, text)


def say_error(text):
    """Print a line on stderr, see `print_to`."""
    print_to(sys.stderr, text)


# %% 2 Seeds

STREAMS = ("init", "order", "patterns", "fresh patterns", "train", "val", "test")


def stream(seed, name, *index):
    """The random generator `name` (one of STREAMS) of a seed, independent of all others."""
    key = (STREAMS.index(name), *index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@contextlib.contextmanager
def initialised_from(seed):
    """Inside the block torch draws from the seed's "init" stream; afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, "init").integers(2**63)))
        yield


def short_hash(content, digits=8):
    """The first hex digits of the sha256 of a text or of bytes."""
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()[:digits]


# %% 3 Data

# PATTERN as its authors generate it (Dwivedi et al., Benchmarking Graph Neural Networks)
SYMBOLS = 3  # a node's feature is one of the symbols 0, 1, 2
COMMUNITIES = 5
SIZES = (5, 35)  # of a community and of a pattern; the upper bound is exclusive
EDGE_INSIDE = 0.5  # chance of an edge inside a community, or from the pattern to another node
EDGE_PATTERN = 0.5  # inside the pattern
EDGE_BETWEEN = 0.35  # between communities
GRAPHS_PER_PATTERN = {"train": 100, "val": 20, "test": 20}
PATTERNS = 100
IGNORED = -100  # label of a padding slot; F.cross_entropy skips it


class Pattern(NamedTuple):
    """The subgraph to be found, of m nodes: adjacency [m, m] bool, feature [m] uint8."""

    adjacency: np.ndarray
    feature: np.ndarray


@functools.cache
def upper_triangle(n):
    """Row and column of every pair i < j of n nodes, row by row."""
    return np.triu_indices(n, 1)


class Graph(NamedTuple):
    """One PATTERN graph with n nodes, in about 1 kB.

    edges    bits of the strict upper triangle, row by row, packed eight to a byte
    feature  [n] uint8
    label    [n] uint8, 1 on the pattern
    pattern  number of the pattern in its set
    source   [n] int64, the pattern's node that stands here, -1 outside the pattern
    """

    edges: np.ndarray
    feature: np.ndarray
    label: np.ndarray
    pattern: int
    source: np.ndarray

    def adjacency(self):
        """[n, n] bool, symmetric, with an empty diagonal."""
        n = len(self.feature)
        row, column = upper_triangle(n)
        dense = np.zeros((n, n), dtype=bool)
        dense[row, column] = np.unpackbits(self.edges, count=len(row))
        return dense | dense.T


def draw_pattern(rng):
    """A random Pattern. The authors' code draws its size, although their paper says 20."""
    size = int(rng.integers(*SIZES))
    upper = np.triu(rng.random((size, size)) < EDGE_PATTERN, 1)
    feature = rng.integers(SYMBOLS, size=size, dtype=np.uint8)
    return Pattern(upper | upper.T, feature)


def plant(pattern, rng, number=0):
    """A Graph that hides the pattern in a fresh stochastic block model, nodes permuted.

    Edges are drawn after the nodes are permuted: the same distribution, each pair drawn once.
    """
    hidden = len(pattern.feature)
    sizes = rng.integers(*SIZES, size=COMMUNITIES)
    block = np.repeat(np.arange(COMMUNITIES + 1), [*sizes, hidden])  # the last is the pattern
    n = len(block)
    order = rng.permutation(n)
    block = block[order]

    row, column = upper_triangle(n)
    same = block[row] == block[column]
    on_pattern = (block[row] == COMMUNITIES) | (block[column] == COMMUNITIES)
    chance = np.where(same | on_pattern, np.float32(EDGE_INSIDE), np.float32(EDGE_BETWEEN))
    edge = rng.random(len(row), dtype=np.float32) < chance

    place = np.flatnonzero(block == COMMUNITIES)
    source = order[place] - (n - hidden)  # which node of the pattern stands at each place
    first, second = upper_triangle(hidden)
    i = place[first]
    j = place[second]  # places ascend, so i < j
    # the index is the number of the pair (i, j) in upper_triangle(n)
    edge[i * n - i * (i + 1) // 2 + j - i - 1] = pattern.adjacency[source[first], source[second]]

    feature = rng.integers(SYMBOLS, size=n, dtype=np.uint8)
    feature[place] = pattern.feature[source]
    label = (block == COMMUNITIES).astype(np.uint8)
    node_source = np.full(n, -1)
    node_source[place] = source
    return Graph(np.packbits(edge), feature, label, number, node_source)


@functools.lru_cache(maxsize=4 * PATTERNS)
def known_pattern(seed, number):
    """Pattern `number` of the seed's 100."""
    return draw_pattern(stream(seed, "patterns", number))


class PatternData:
    """The seed's PATTERN: 10,000 / 2,000 / 2,000 graphs, stored pattern by pattern.

    Train, val and test share the same 100 patterns; with `fresh` every graph has its own.
    Graph `index` depends on (seed, split, index) alone, so any part can be drawn by itself:
    the first 32 training graphs share pattern 0.
    """

    def __init__(self, seed, split="train", fresh=False):
        self.seed = seed
        self.split = split
        self.fresh = fresh
        self.per_pattern = GRAPHS_PER_PATTERN[split]

    def __len__(self):
        return PATTERNS * self.per_pattern

    def pattern(self, index):
        """The Pattern hidden in graph `index`."""
        if self.fresh:
            rng = stream(self.seed, "fresh patterns", STREAMS.index(self.split), index)
            return draw_pattern(rng)
        return known_pattern(self.seed, index // self.per_pattern)

    def __getitem__(self, index):
        """Graph `index`, 0 <= index < len(self). Raises IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self.fresh else index // self.per_pattern
        return plant(self.pattern(index), stream(self.seed, self.split, index), number)

    def first(self, count):
        """The first `count` graphs in stored order. Raises UsageError if there are fewer."""
        if count > len(self):
            raise UsageError(f"--graphs {count}: the {self.split} split has {len(self)} graphs")
        return [self[i] for i in range(count)]


def shuffled(data, count):
    """The first `count` graphs of a PatternData in an order that its seed fixes: a list.

    It is shorter if the split has fewer.
    """
    order = stream(data.seed, "order").permutation(len(data))
    return [data[int(i)] for i in order[:count]]


class GraphBatch:
    """B graphs as one input: node-wise tensors packed [V, ...], pair-wise ones padded.

    adjacency  [B, N, N] float
    nodes      [B, N] bool, True on real nodes
    slot       [V] place of a packed node in the flat [B * N]
    feature    [V] int64
    label      [V] int64
    degree     [V] float, edges of the node
    size       [V] float, nodes of its graph
    encodings  what `pair_encoding` has computed for this batch

    With `padding`, every slot travels as a node: V = B * N, the padding has no edge and the
    label IGNORED. That is the notebook's layout without a mask in its norms.
    """

    def __init__(self, graphs, device="cpu", padding=False):
        sizes = [len(graph.feature) for graph in graphs]
        self.shape = (len(graphs), max(sizes))
        b, n = self.shape
        adjacency = np.zeros((b, n, n), dtype=np.float32)
        feature = np.zeros((b, n), dtype=np.int64)
        label = np.full((b, n), IGNORED)
        for i, graph in enumerate(graphs):
            adjacency[i, : sizes[i], : sizes[i]] = graph.adjacency()
            feature[i, : sizes[i]] = graph.feature
            label[i, : sizes[i]] = graph.label

        self.padding = padding
        self.encodings = {}
        self.adjacency = torch.from_numpy(adjacency).to(device)
        self.nodes = torch.from_numpy(label != IGNORED).to(device)
        travelling = torch.ones_like(self.nodes) if padding else self.nodes
        self.slot = travelling.flatten().nonzero().squeeze(1)
        self.feature = torch.from_numpy(feature).to(device).flatten()[self.slot]
        self.label = torch.from_numpy(label).to(device).flatten()[self.slot]
        self.degree = self.adjacency.sum(-1).flatten()[self.slot]
        self.size = self.nodes.sum(1).float()[self.slot // n]

    def pad(self, x):
        """[V, D] -> [B, N, D], zeros in the padding."""
        b, n = self.shape
        return x.new_zeros(b * n, x.shape[1]).index_copy(0, self.slot, x).view(b, n, -1)

    def pack(self, x):
        """[B, N, D] -> [V, D]."""
        return x.flatten(0, 1).index_select(0, self.slot)


class Pyramid(NamedTuple):
    """A triangle of the triangular lattice with n nodes, numbered row by row.

    row, column [n]: row r holds the nodes (r, 0) to (r, r). edges [m, 2]: each once. colour [n]: 0,
    1 or 2, the only proper 3-colouring but for the names of the colours.
    Source: graph notebook, 11/4.
    """

    row: np.ndarray
    column: np.ndarray
    edges: np.ndarray
    colour: np.ndarray


def pyramid(base):
    """The pyramid with `base` rows, n = base (base + 1) / 2. pyramid(2): edges 0-1, 0-2, 1-2."""
    row, column = np.tril_indices(base)
    number = np.zeros((base, base), dtype=np.int64)
    number[row, column] = np.arange(len(row))

    edges = []
    for down, right in ((0, 1), (1, 0), (1, 1)):
        inside = (row + down < base) & (column + right <= row + down)
        start = number[row[inside], column[inside]]
        end = number[row[inside] + down, column[inside] + right]
        edges.append(np.stack([start, end], axis=1))
    return Pyramid(row, column, np.concatenate(edges), (row + column) % 3)


def pair_codes(n, edges, receptive_field, modulus, multiplier, scale=12):
    """A 64-bit code of each ordered pair's vector (P^0 .. P^r)[i, j], P = D^-1 A: [n, n] uint64.

    Equal vectors have equal codes, the zero vector has code 0, and unequal ones share a code with a
    chance of about 2^-57. The arithmetic is exact: `scale` P holds integers where every degree
    divides `scale`; its powers are taken modulo `modulus` and hashed one after the other, so none
    is stored. Codes made with the same numbers compare between graphs. edges [m, 2], each once;
    `modulus` (near 2^57: the sum of six neighbours fits 64 bits) and `multiplier` are odd.
    Raises ValueError for a degree that does not divide `scale`.
    """
    from scipy import sparse

    start, end = np.concatenate([edges, edges[:, ::-1]]).T
    degree = np.bincount(start, minlength=n)
    if (scale % np.maximum(degree, 1)).any():
        raise ValueError(f"{scale} is not a multiple of every degree")
    weight = scale // degree[start]
    step = sparse.csr_array((weight, (end, start)), shape=(n, n))  # scale P, transposed

    codes = np.empty((n, n), dtype=np.uint64)
    for first in range(0, n, 16):  # a block of 16 sources stays in the cache
        power = np.eye(n, min(16, n - first), -first, dtype=np.int64)
        code = np.zeros_like(power, dtype=np.uint64)
        for exponent in range(receptive_field + 1):
            if exponent:
                power = step @ power
            if scale**exponent >= modulus:  # the largest entry that the power can have
                power %= modulus
            code ^= power.view(np.uint64)
            code *= np.uint64(multiplier)
            code ^= code >> np.uint64(32)
        codes[first : first + 16] = code.T
    return codes


# Conway's Life
CELLS = 9  # of a neighbourhood, row by row; number 4 is the cell itself
NEIGHBOURHOODS = np.array(list(itertools.product((0, 1), repeat=CELLS)), dtype=np.float32)
CELLS_ALIVE = NEIGHBOURHOODS.sum(axis=1).astype(int)  # [512], the middle one counted
SURVIVES = (CELLS_ALIVE == 3) | (CELLS_ALIVE == 4)  # [512]: two or three neighbours
# the cell's next state after each neighbourhood [512]
LIFE = np.where(NEIGHBOURHOODS[:, 4] == 1, SURVIVES, CELLS_ALIVE == 3).astype(np.float32)


def neighbourhood_chances(alive):
    """Chance of each of the 512 neighbourhoods if every cell lives with chance `alive`: [512]."""
    return np.where(NEIGHBOURHOODS == 1, alive, 1 - alive).prod(axis=1)


def neighbourhood_batches(seeds, alive, batch, device="cpu"):
    """Yield batches without end, each as counts [S, 512]: how often a neighbourhood was drawn.

    A mean over a batch is a mean over the 512 with these weights, so that the batch itself is
    never made. Each row comes from the "train" stream of its seed.
    """
    streams = [stream(seed, "train") for seed in seeds]
    chances = neighbourhood_chances(alive)
    while True:
        # 64 batches per call, since one call for each batch is slow
        draws = [rng.multinomial(batch, chances, size=64) for rng in streams]
        counts = torch.from_numpy(np.stack(draws, axis=1)).float()  # [64, S, 512]
        yield from counts.to(device)


def all_neighbourhoods(networks, device="cpu"):
    """All 512 as the input of S networks, and what follows them: [S, 9, 512], [512]."""
    inputs = torch.from_numpy(NEIGHBOURHOODS.T.copy()).to(device)
    return inputs.expand(networks, -1, -1), torch.from_numpy(LIFE).to(device)


# English text
BYTES = 256  # a token is a byte
LIBRARY = f"Python {platform.python_version()}"  # the documentation in its standard library
UNDOCUMENTED_FOLDERS = {  # folders of the library without documentation of their own
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "encodings",
    "pydoc_data",
}
PASSAGE_WORDS = 8  # no passage of so many words stands in both parts of a text
MIN_BYTES = 2_000  # of each part
PIECE_CHARACTERS = 500  # characters of a piece of a text without paragraphs and lines


class Text(NamedTuple):
    """A text in two parts without a common passage: train, held_out, uint8 [bytes]."""

    train: np.ndarray
    held_out: np.ndarray

    def digest(self):
        """sha256 of both parts, 16 hex digits. It differs between builds of Python."""
        return short_hash(self.train.tobytes() + b"\0" + self.held_out.tobytes(), 16)


def docstrings(source):
    """All docstrings of a Python source, separated by empty lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    found = [ast.get_docstring(node) for node in nodes]
    return "\n\n".join(text for text in found if text)


def library_documents():
    """The help topics of `pydoc` and the docstrings of each module of the library: a list.

    In the order of a hash of their names, so that any part of it is a fair sample.
    """
    from pydoc_data.topics import topics

    documents = dict(topics)
    root = Path(ast.__file__).parent
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if UNDOCUMENTED_FOLDERS.isdisjoint(name.parts):
            with contextlib.suppress(SyntaxError, ValueError):  # some are there to be broken
                documents[str(name)] = docstrings(path.read_bytes())
    names = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [documents[name] for name in names]


def passages(words):
    """All passages of PASSAGE_WORDS words of a text whose words are joined by one space."""
    listed = words.split(" ")
    starts = range(len(listed) - PASSAGE_WORDS + 1)
    return {" ".join(listed[i : i + PASSAGE_WORDS]) for i in starts}


def as_bytes(documents):
    """Documents, lists of paragraphs, in UTF-8: uint8 [bytes]."""
    texts = ["\n\n".join(paragraphs) for paragraphs in documents if paragraphs]
    return np.frombuffer("\n\n\n".join(texts).encode(), np.uint8)


def split_text(documents):
    """The Text of documents: about the first nine tenths are trained on, the last held out.

    A paragraph that stands twice is kept once; a held-out one that shares a passage with the
    training part is left out.
    """
    seen = set()
    kept = []  # {words joined by one space: the paragraph as it stands}, one per document
    for document in documents:
        paragraphs = {}
        for paragraph in re.split(r"\n\s*\n", document):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                paragraphs[words] = paragraph.strip("\n")
        seen.update(paragraphs)
        kept.append(paragraphs)
    sizes = np.cumsum([sum(map(len, paragraphs.values())) for paragraphs in kept])
    first_held_out = int(np.searchsorted(sizes, 0.9 * sizes[-1])) + 1

    trained_on = set()
    for words in itertools.chain(*kept[:first_held_out]):
        trained_on |= passages(words)
    held_out = []
    for paragraphs in kept[first_held_out:]:
        new = [words for words in paragraphs if trained_on.isdisjoint(passages(words))]
        held_out.append([paragraphs[words] for words in new])
    train = [list(paragraphs.values()) for paragraphs in kept[:first_held_out]]
    return Text(as_bytes(train), as_bytes(held_out))


def read_characters(path):
    """The content of a UTF-8 file, without a byte-order mark. Raises OSError, UnicodeError."""
    return Path(path).read_text(encoding="utf-8-sig")


@functools.cache
def load_text(source):
    """The Text of LIBRARY, or of an InputFile.

    Documents of a file are its paragraphs; where they leave too little of a part its lines, and
    then pieces of PIECE_CHARACTERS characters. Raises UsageError for one that is too short.
    """
    if source == LIBRARY:
        return split_text(library_documents())
    content = read_characters(source.path)
    pieces = [content[i : i + PIECE_CHARACTERS] for i in range(0, len(content), PIECE_CHARACTERS)]
    for documents in (re.split(r"\n\s*\n", content), content.splitlines(), pieces):
        text = split_text(documents or [""])
        smaller = min(len(text.train), len(text.held_out))
        if smaller >= MIN_BYTES:
            return text
    raise UsageError(
        f"{source.path}: too short, {smaller:,} bytes of {MIN_BYTES:,} in its smaller "
        "part, without repetitions; give a longer one"
    )


# Graph questions
NODE_TYPES = ("query", "context", "passage", "subject", "object", "entity", "candidate")
QUERY, CONTEXT, PASSAGE, SUBJECT, OBJECT, ENTITY, CANDIDATE = range(len(NODE_TYPES))
LINKS = ("none", "self", "query", "context", "passage", "entity", "coreference", "sentence")
NO_LINK, SELF = LINKS.index("none"), LINKS.index("self")
MAX_HOPS = 3
NAME, RELATION, TEXT = 0, 1, MAX_HOPS + 1  # slots; the query's i-th relation is in slot i
SLOTS = TEXT + 1
MASKED_WORD = 1  # for pretraining; word 0 is none
FIRST_WORD = 2


class World(NamedTuple):
    """What generated questions are drawn from; the numbers are of each question's graph.

    entities    named by as many of the world's `names`
    relations   of the world
    facts       (subject, relation, object), no subject and relation twice
    restated    facts that are stated twice
    passages    over which the sentences are spread evenly, one fact each
    candidates  entities to choose the answer from, the answer among them
    """

    entities: int = 8
    relations: int = 3
    facts: int = 16
    restated: int = 0
    passages: int = 8
    candidates: int = 6
    names: int = 200


class Question(NamedTuple):
    """One question with N nodes and W words. Lists; -1 stands for none.

    The graph, without links, which follow from it (`link_nodes`):
    node_type      [N] number in NODE_TYPES; node 0 is the query, subjects and objects are the
                   mentions of entities in sentences
    entity         [N] node of the entity that a mention names; an entity's is itself
    passage        [N] node of the passage that holds a mention; a passage's is itself
    sentence       [N] number of a mention's sentence
    step           [N] step of the gold chain that a mention's sentence states, from 1 on, or 0
    The tokens, apart from the graph:
    word           [W] number, from FIRST_WORD on
    node, slot     [W] the node that holds the word, and where: NAME; RELATION, which holds the
                   other words of a mention's sentence; the query's i-th relation in slot i; TEXT
                   of a passage
    start, answer  nodes of entities
    hops           relations to be followed from start to answer
    query_blind    chance of the best guess that is not given the query
    start_blind    chance of the best guess that is given the query's relations, but not the start;
                   both NaN where unknown
    """

    node_type: tuple
    entity: tuple
    passage: tuple
    sentence: tuple
    step: tuple
    word: tuple
    node: tuple
    slot: tuple
    start: int
    answer: int
    hops: int
    query_blind: float
    start_blind: float


def build_question(
    names, candidates, start, answer, relations, passages, guesses=(math.nan, math.nan)
):
    """The Question whose entities have these names.

    names       for each entity a list of words; start, answer and candidates are places in it
    relations   for each step of the query a list of words
    passages    (words, sentences) each; a sentence is (entities, other words, step of the gold
                chain or 0), and the first of its entities is its subject
    guesses     query_blind and start_blind
    """
    nodes = [(QUERY, -1, -1, -1, 0)]
    words = [(word, 0, NAME) for word in names[start]]
    for slot, relation in enumerate(relations, RELATION):
        words += [(word, 0, slot) for word in relation]
    for entity, name in enumerate(names):
        words += [(word, len(nodes), NAME) for word in name]
        nodes.append((CANDIDATE if entity in candidates else ENTITY, len(nodes), -1, -1, 0))
    sentence = 0
    for text, sentences in passages:
        passage_node = len(nodes)
        words += [(word, passage_node, TEXT) for word in text]
        nodes.append((PASSAGE, -1, passage_node, -1, 0))
        for entities, other_words, step in sentences:
            for place, entity in enumerate(entities):
                words += [(word, len(nodes), NAME) for word in names[entity]]
                words += [(word, len(nodes), RELATION) for word in other_words]
                node_type = SUBJECT if place == 0 else OBJECT
                nodes.append((node_type, 1 + entity, passage_node, sentence, step))
            sentence += 1
    columns = (*zip(*nodes, strict=True), *zip(*words, strict=True))
    return Question(*columns, 1 + start, 1 + answer, len(relations), *guesses)


def follow_chains(target, hops):
    """Every chain of `hops` different relations in Q graphs.

    target [Q, E, R]: the entity that a fact leads to, -1 where there is no fact. Returns
    path    [hops + 1, Q, E, C] entities from each start on, for each of C orders of relations
    exists  [Q, E, C] whether all facts are there and no entity is met twice
    orders  [C, hops] the relations
    """
    q, entities, relations = target.shape
    orders = np.array(list(itertools.permutations(range(relations), hops)))
    path = [np.broadcast_to(np.arange(entities)[:, None], (q, entities, len(orders)))]
    exists = np.ones(path[0].shape, dtype=bool)
    graph = np.arange(q)[:, None, None]
    for step in range(hops):
        end = target[graph, path[-1], orders[:, step]]
        exists &= end >= 0
        for earlier in path:
            exists &= end != earlier
        path.append(np.maximum(end, 0))
    return np.stack(path), exists, orders


def best_guess(ends, candidates):
    """Chance that the most frequent candidate is the answer.

    ends [C]: where the chains end that agree with what the guesser is given, each equally likely.
    Ends that are no candidates are left out.
    """
    counts = np.bincount(ends, minlength=max(candidates) + 1)[candidates]
    return counts.max() / counts.sum()


def draw_facts(rng, count, hops, world):
    """Facts (subject, relation, object) of graphs that hold a chain of `hops`.

    [Q, facts, 3], and the table [Q, E, R] that `follow_chains` takes.
    """
    rows = np.arange(count)[:, None]
    kept = []
    missing = count
    while missing > 0:  # graphs without a chain are drawn anew
        pair = rng.random((count, world.entities * world.relations)).argsort(axis=1)
        subject, relation = np.divmod(pair[:, : world.facts], world.relations)
        object_ = (subject + rng.integers(1, world.entities, subject.shape)) % world.entities
        table = np.full((count, world.entities, world.relations), -1)
        table[rows, subject, relation] = object_
        holds = follow_chains(table, hops)[1].any(axis=(1, 2))
        kept.append((np.stack([subject, relation, object_], axis=2)[holds], table[holds]))
        missing -= holds.sum()
    facts, tables = zip(*kept, strict=True)
    return np.concatenate(facts)[:count], np.concatenate(tables)[:count]


def state_facts(facts, steps, names, world):
    """Passages for `build_question` that state these facts, one sentence each.

    steps: {fact: its step in the gold chain}; names: the entities' words.
    """
    passages = [([], []) for _ in range(world.passages)]
    for place, (subject, relation, object_) in enumerate(facts):
        relation_words = [FIRST_WORD + world.names + relation]
        words, sentences = passages[place * world.passages // len(facts)]
        words += [*names[subject], *relation_words, *names[object_]]
        step = steps.get((subject, relation, object_), 0)
        sentences.append(((subject, object_), relation_words, step))
    return passages


def choose_candidates(rng, answer, world):
    """The answer, then the other candidates in random order: a list of entities."""
    others = [entity for entity in range(world.entities) if entity != answer]
    return [answer, *rng.permutation(others)[: world.candidates - 1].tolist()]


def draw_questions(rng, count, hops, world):
    """[Question] * count, each on a graph of its own: a start and `hops` different relations.

    A question is drawn uniformly among its graph's chains, so that only the query distinguishes
    them. A sentence is "subject relation object"; words are the names, then the relations.
    """
    facts, table = draw_facts(rng, count, hops, world)
    path, exists, orders = follow_chains(table, hops)
    stated = np.arange(world.facts + world.restated) % world.facts
    names = np.tile(np.arange(world.names), (count, 1))
    names = FIRST_WORD + rng.permuted(names, axis=1)[:, : world.entities, None]
    questions = []
    for q in range(count):
        starts, chosen = exists[q].nonzero()
        chains = path[:, q, starts, chosen]  # [hops + 1, chains] entities
        drawn = rng.integers(len(starts))
        gold = chains[:, drawn].tolist()
        relations = orders[chosen[drawn]].tolist()
        candidates = choose_candidates(rng, gold[-1], world)
        same_relations = chains[-1, chosen == chosen[drawn]]
        guesses = [best_guess(chains[-1], candidates), best_guess(same_relations, candidates)]

        gold_facts = zip(gold, relations, gold[1:], strict=False)
        steps = {fact: i + 1 for i, fact in enumerate(gold_facts)}
        name = names[q].tolist()
        passages = state_facts(facts[q, rng.permutation(stated)].tolist(), steps, name, world)
        query = [[FIRST_WORD + world.names + relation] for relation in relations]
        questions.append(
            build_question(name, candidates, gold[0], gold[-1], query, passages, guesses)
        )
    return questions


class QuestionSource:
    """Generated questions: new ones without end for training, fixed ones held out.

    Raises UsageError that names the flag for a world without such questions.
    """

    def __init__(self, world, hops):
        if min(hops) < 1:
            raise UsageError(f"--hops {min(hops)}: at least 1")
        stated = world.facts + world.restated
        pairs = world.entities * world.relations
        longest = min(world.relations, world.entities - 1, world.facts, MAX_HOPS)
        for flag, value, most in (
            ("hops", max(hops), longest),
            ("candidates", world.candidates, world.entities),
            ("entities", world.entities, world.names),
            ("facts", world.facts, pairs),
            ("restated", world.restated, world.facts),
            ("passages", world.passages, stated),
        ):
            if value > most:
                raise UsageError(f"--{flag} {value}: at most {most} with the other numbers")
        self.world = world
        self.hops = hops
        names = [f"n{i}" for i in range(world.names)]
        self.words = ["", "[masked]", *names, *(f"r{i + 1}" for i in range(world.relations))]

    def draw(self, rng, count):
        """[Question] * count, each number of hops with the same chance."""
        counts = np.bincount(rng.integers(len(self.hops), size=count), minlength=len(self.hops))
        drawn = []
        for hops, number in zip(self.hops, counts, strict=True):
            if number > 0:
                drawn += draw_questions(rng, number, hops, self.world)
        return drawn

    def held_out(self, name, count):
        """{hops: [Question] * count} of the stream "val" or "test", the same for every seed."""
        streams = {hops: stream(0, name, hops) for hops in self.hops}
        return {h: draw_questions(rng, count, h, self.world) for h, rng in streams.items()}


def link_nodes(node_type, entity, passage, sentence):
    """The type of link between any two nodes: [Q, N] each -> [Q, N, N], numbers in LINKS.

    A mention is joined to its passage, to its entity, to the other mentions of its sentence and to
    those of its entity; every node to itself; the query to none. Same both ways.
    """
    mention = (node_type == SUBJECT) | (node_type == OBJECT)
    both = mention[:, :, None] & mention[:, None]
    number = np.arange(node_type.shape[1])
    link = np.zeros(both.shape, dtype=np.int64)
    for column, name in ((entity, "coreference"), (sentence, "sentence")):
        link[both & (column[:, :, None] == column[:, None])] = LINKS.index(name)
    for column, name in ((passage, "passage"), (entity, "entity")):
        belongs = mention[:, :, None] & (column[:, :, None] == number)
        link[belongs | belongs.swapaxes(1, 2)] = LINKS.index(name)
    link[:, number, number] = np.where(node_type >= 0, SELF, NO_LINK)
    return link


def pad_rows(rows):
    """Rows of numbers, of different lengths, as one table, padded with -1."""
    table = np.full((len(rows), max(map(len, rows))), -1)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


class QuestionBatch:
    """B Questions as the input of a QuestionReader, padded to N nodes.

    questions     the Questions
    node_type     [B, N] number in NODE_TYPES; 0 in the padding
    link          [B, N, N] number in LINKS, target first; attention keeps what is not NO_LINK
    is_start      [B, N] bool, the start's node and its mentions
    is_candidate  [B, N] bool
    answer        [B] node
    word, slot    [W] of all questions, node after node
    word_weight   [W] one over the number of words of the same node and slot
    first_word    [B * N] where the words of each node begin
    """

    def __init__(self, questions, device="cpu"):
        columns = Question(*zip(*questions, strict=True))
        node_type = pad_rows(columns.node_type)
        entity = pad_rows(columns.entity)
        passage = pad_rows(columns.passage)
        sentence = pad_rows(columns.sentence)
        word = pad_rows(columns.word)
        slot = pad_rows(columns.slot)
        start = np.array(columns.start)
        b, n = node_type.shape
        real = word >= 0
        place = (pad_rows(columns.node) + n * np.arange(b)[:, None])[real]
        order = place.argsort(kind="stable")
        place = place[order]
        bag = place * SLOTS + slot[real][order]

        def send(array):
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.questions = questions
        self.shape = (b, n)
        self.node_type = send(np.maximum(node_type, 0))
        self.link = send(link_nodes(node_type, entity, passage, sentence))
        self.is_start = send(entity == start[:, None])
        self.is_candidate = send(node_type == CANDIDATE)
        self.answer = send(np.array(columns.answer))
        self.word = send(word[real][order])
        self.slot = send(bag % SLOTS)
        self.word_weight = send((1 / np.bincount(bag)[bag]).astype(np.float32))
        self.first_word = send(np.searchsorted(place, np.arange(b * n)))


# %% 4 Masks


def masked_softmax(logits, keep, dim=-1):
    """Softmax over the kept entries, zero elsewhere: logits [...], keep bool that broadcasts to it.

    A row that keeps nothing is zero, forward and backward, never NaN.
    """
    lowest = torch.finfo(logits.dtype).min  # finite, so that an empty row stays defined
    weight = logits.masked_fill(~keep, lowest).softmax(dim)
    return weight.masked_fill(~keep, 0.0)


def masked_sigmoid(logits, keep):
    """Sigmoid of the kept logits, exactly zero elsewhere, with zero gradient there."""
    return logits.masked_fill(~keep, -math.inf).sigmoid()


def transition_powers(adjacency, nodes, powers):
    """Powers of P = D^-1 A: [B, N, N], [B, N] bool -> [B, K, N, N].

    Power 0 is the identity on real nodes; a node without edges has zero rows in all others. They
    come in ascending order, whatever the order of `powers`. Source: the graph notebook's
    `adj_stack`.
    """
    step = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
    power = torch.diag_embed(nodes.to(adjacency.dtype))
    kept = []
    for exponent in range(max(powers) + 1):
        if exponent > 0:
            power = step @ power
        if exponent in powers:
            kept.append(power)
    return torch.stack(kept, 1)


def pair_encoding(batch, powers, encoding):
    """What a pair of nodes is known by, and which pairs are reachable.

    encoding "powers": the entries of the powers of P, [B, K, N, N]; "hop": one-hot of the
    smallest power that is not zero (the notebook's use_distance). reachable [B, N, N] bool:
    some power is not zero. Computed once per batch.
    """
    key = (tuple(powers), encoding)
    if key not in batch.encodings:
        vectors = transition_powers(batch.adjacency, batch.nodes, powers)
        met = vectors != 0
        if encoding == "hop":
            first = met & (met.cumsum(1) == 1)
            vectors = first.to(vectors.dtype)
        batch.encodings[key] = (vectors, met.any(1))
    return batch.encodings[key]


# %% 5 Layers


def make_norm(name, dim):
    """A norm over packed nodes [V, D]: "layer", "batch" or "none".

    A packed batch holds real nodes only, so no statistic sees padding, unless the batch was
    made with `padding`. A layer norm takes each node by itself and never does.
    """
    if name == "layer":
        return nn.LayerNorm(dim)
    if name == "batch":
        return nn.BatchNorm1d(dim)
    return nn.Identity()


class PositionAttention(nn.Module):
    """Mixes nodes by position alone: [V, D] -> [V, D]; no queries, no keys.

    The logit of a pair is Linear(K -> H) of its `pair_encoding`. activation "sigmoid" gates
    every pair by itself and sums (the notebook's gating); "softmax" averages over reachable
    nodes (its attention). Values are projected per head; an output projection follows.

    unreachable  logit of pairs that no power connects; -inf masks them, a number is the start
                 of a learned one
    divide_by    constant that divides the sum over nodes (the node itself included)
    gate_bias    "graph" adds -log(nodes of the graph) to every logit, "degree" -log(degree of
                 the node that sums, plus one for itself); "none" adds nothing

    Source: graph notebook, 6/3 and 13/3; gate_bias: Ramapuram et al., arXiv 2409.04431.
    Raises ValueError if the heads do not divide the width.
    """

    def __init__(
        self,
        dim,
        heads=1,
        powers=(0, 1),
        encoding="hop",
        activation="sigmoid",
        unreachable=-math.inf,
        divide_by=1.0,
        gate_bias="none",
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads = heads
        self.powers = tuple(powers)
        self.encoding = encoding
        self.activation = activation
        self.divide_by = divide_by
        self.gate_bias = gate_bias
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.pair = nn.Linear(len(self.powers), heads)
        self.unreachable = None
        if unreachable > -math.inf:
            self.unreachable = nn.Parameter(torch.full((heads,), float(unreachable)))

    def forward(self, x, batch):
        value = self.value(x)
        if self.encoding == "hop" and self.unreachable is None:
            mixed = self.mix_by_hop(value, batch)
        else:
            mixed = self.mix_by_pair(value, batch)
        return self.out(mixed / self.divide_by)

    def mix_by_pair(self, value, batch):
        """The general way, one weight per pair: [V, D] -> [V, D]."""
        padded = batch.pad(value).unflatten(2, (self.heads, -1)).transpose(1, 2)
        mixed = self.pair_weights(batch) @ padded  # [B, H, N, D/H]
        return batch.pack(mixed.transpose(1, 2).flatten(2))

    def pair_weights(self, batch):
        """[B, H, N, N]: the weight with which node n (third axis) takes in node m."""
        vectors, reachable = pair_encoding(batch, self.powers, self.encoding)
        logits = torch.einsum("bknm,hk->bhnm", vectors, self.pair.weight)
        logits = logits + self.pair.bias[:, None, None]
        keep = reachable[:, None]
        if self.unreachable is not None:
            logits = torch.where(keep, logits, self.unreachable[:, None, None])
            keep = (batch.nodes[:, :, None] & batch.nodes[:, None, :])[:, None]
        if self.gate_bias != "none":
            logits = logits - batch.pad(self.log_count(batch))[:, None]
        if self.activation == "softmax":
            return masked_softmax(logits, keep)
        return masked_sigmoid(logits, keep)

    def mix_by_hop(self, value, batch):
        """The same for one-hot hops: [V, D] -> [V, D].

        All nodes at one hop share a weight, so values are added up by hop first and weighted
        then. No weight per pair is made: a quarter less time per training step on a CPU. In
        the softmax, c nodes at one hop are one entry whose logit is larger by log c.
        """
        hops, _ = pair_encoding(batch, self.powers, "hop")
        count = batch.pack(hops.sum(-1).transpose(1, 2))[:, None]  # [V, 1, K] nodes at each hop
        logits = (self.pair.weight + self.pair.bias[:, None])[None]  # [1, H, K]
        if self.gate_bias != "none":
            logits = logits - self.log_count(batch)[:, :, None]
        if self.activation == "softmax":
            weight = masked_softmax(logits + count.log(), count > 0) / count.clamp(min=1)
        else:
            weight = logits.sigmoid()

        mixed = torch.zeros_like(value)
        padded = batch.pad(value)
        for k, power in enumerate(self.powers):
            # power 0 is the node itself, except in the padding
            own = power == 0 and not batch.padding
            total = value if own else batch.pack(hops[:, k] @ padded)
            per_channel = weight[..., k].repeat_interleave(value.shape[1] // self.heads, dim=1)
            mixed = mixed + per_channel * total
        return mixed

    def log_count(self, batch):
        """[V, 1]: log of the number of nodes that `gate_bias` names."""
        if self.gate_bias == "graph":
            return batch.size.log()[:, None]
        return (batch.degree + 1).log()[:, None]


class ContentAttention(nn.Module):
    """Multi-head attention over the graph: [V, D] -> [V, D], softmax(q k^T / sqrt(D/H)) v per head.

    With `powers`, a bias per hop, Linear(K -> H) of the pair's one-hot hop, is added to the logits
    (the notebook's "with distance"). Source: graph notebook, "Content attention".
    Raises ValueError if the heads do not divide the width.
    """

    def __init__(self, dim, heads=1, powers=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads = heads
        self.powers = powers
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.pair = None if powers is None else nn.Linear(len(powers), heads)

    def forward(self, x, batch):
        query = self.split_heads(self.query(x), batch)
        key = self.split_heads(self.key(x), batch)
        value = self.split_heads(self.value(x), batch)
        # A padded query sees real keys and stays finite; `pack` drops it.
        bias = torch.zeros_like(batch.adjacency)[:, None].masked_fill(
            ~batch.nodes[:, None, None, :], -math.inf
        )
        if self.pair is not None:
            hops, _ = pair_encoding(batch, self.powers, "hop")
            bias = bias + torch.einsum("bknm,hk->bhnm", hops, self.pair.weight)
            bias = bias + self.pair.bias[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(batch.pack(mixed.transpose(1, 2).flatten(2)))

    def split_heads(self, x, batch):
        """[V, D] -> [B, H, N, D/H]."""
        return batch.pad(x).unflatten(2, (self.heads, -1)).transpose(1, 2)


def rotate(x):
    """Rotary positions: channels i and i + C/2 of [B, H, T, C], turned by t / 10000^(2i / C).

    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[-2], device=x.device)
    frequency = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angle = position[:, None] * frequency
    cos = angle.cos()
    sin = angle.sin()
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def divide_by_norm(x, norm, dim=-1):
    """x / ||x|| ("fro_norm"), x / sqrt(mean x^2) ("rms_norm"), or x ("none"), along `dim`.

    Without learned weights. dim None: over the whole tensor.
    """
    if norm == "none":
        return x
    square = x.square()
    size = square.mean(dim, keepdim=True) if norm == "rms_norm" else square.sum(dim, keepdim=True)
    return x * (size + 1e-8).rsqrt()


class CausalAttention(nn.Module):
    """The attention notebook's attention: packed tokens [B T, D] and (B, T) -> [B T, D].

    Queries and keys are linear; values are gelu(gate) * value; logits are q k^T / sqrt(channels
    of a head); a position attends to itself and to earlier ones.

    attn_activ      from logits to weights: "softmax", "sigmoid", "tanh" or "none"; with the last
                    two, masked weights are set to 0 after the activation
    qk_activ        "gelu" or "none", of queries and keys, per head
    qk_norm         norm of queries and keys after it, see `divide_by_norm`
    post_attn_norm  norm of what each head has mixed
    position        "linear" adds softplus(slope) (j - i) to the logits, with one learned slope per
                    head, 1 at first; "rotary" turns queries and keys; "none" does nothing
    query_dim       channels of queries and keys over all heads (default: dim)

    Source: attention notebook, 2024-10-10.
    """

    norm_dim = -1  # the channels of a head

    def __init__(
        self,
        dim,
        heads,
        attn_activ="softmax",
        qk_activ="none",
        qk_norm="none",
        post_attn_norm="none",
        position="linear",
        query_dim=None,
    ):
        super().__init__()
        query_dim = query_dim or dim
        self.heads = heads
        self.attn_activ = attn_activ
        self.qk_activ = qk_activ
        self.qk_norm = qk_norm
        self.post_attn_norm = post_attn_norm
        self.position = position
        self.sizes = [query_dim, query_dim, dim, dim]  # of queries, keys, gates and values
        self.inputs = nn.Linear(dim, sum(self.sizes))
        self.out = nn.Linear(dim, dim)
        self.slope = nn.Parameter(torch.ones(heads)) if position == "linear" else None

    def forward(self, x, shape):
        query, key, gate, value = self.inputs(x).split(self.sizes, dim=1)
        query = self.prepare(self.split_heads(query, shape))
        key = self.prepare(self.split_heads(key, shape))
        value = self.split_heads(F.gelu(gate) * value, shape)
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        mixed = divide_by_norm(self.weights(logits) @ value, self.post_attn_norm, self.norm_dim)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def split_heads(self, x, shape):
        """[B T, D] -> [B, H, T, D/H]."""
        return x.view(*shape, self.heads, -1).transpose(1, 2)

    def prepare(self, x):
        """Activation, norm and rotation of queries or keys [B, H, T, D/H]."""
        if self.qk_activ == "gelu":
            x = F.gelu(x)
        x = divide_by_norm(x, self.qk_norm, self.norm_dim)
        return rotate(x) if self.position == "rotary" else x

    def weights(self, logits):
        """Weights of the keys j for the queries i: [B, H, T, T], of the logits."""
        position = torch.arange(logits.shape[-1], device=logits.device)
        distance = position - position[:, None]  # j - i
        keep = distance <= 0
        if self.slope is not None:
            logits = logits + F.softplus(self.slope)[:, None, None] * distance
        if self.attn_activ == "softmax":
            # no row is empty, since every position attends to itself
            return logits.masked_fill(~keep, -math.inf).softmax(dim=-1)
        if self.attn_activ == "sigmoid":
            return masked_sigmoid(logits, keep)
        if self.attn_activ == "tanh":
            logits = logits.tanh()
        return logits * keep


class AddDegree(nn.Module):
    """x + Linear(share of the graph's other nodes that the node is joined to): [V, D] -> [V, D].

    As the first layer it gives the degree to the model as an input.
    """

    def __init__(self, dim):
        super().__init__()
        self.project = nn.Linear(1, dim)

    def forward(self, x, batch):
        share = batch.degree / (batch.size - 1)
        return x + self.project(share[:, None])


def sum_over_neighbours(x, batch):
    """[V, D] -> [V, D]."""
    return batch.pack(batch.adjacency @ batch.pad(x))


class BareGating(nn.Module):
    """sigmoid(w1) x + sigmoid(w2) (sum over neighbours): [V, D] -> [V, D]. No projections.

    Source: graph notebook, 13/3, "Architecture".
    """

    def __init__(self, divide_by=1.0):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(()))
        self.w2 = nn.Parameter(torch.zeros(()))
        self.divide_by = divide_by

    def forward(self, x, batch):
        neighbours = sum_over_neighbours(x, batch)
        return (self.w1.sigmoid() * x + self.w2.sigmoid() * neighbours) / self.divide_by


class FeedForward(nn.Module):
    """Linear, norm, ReLU, Linear: [V, D] -> [V, D]; norm "batch", "layer" or "none"."""

    def __init__(self, dim, hidden, norm="none"):
        super().__init__()
        self.first = nn.Linear(dim, hidden)
        self.norm = make_norm(norm, hidden)
        self.last = nn.Linear(hidden, dim)

    def forward(self, x):
        # in place, which saves a tenth of a training step
        return self.last(self.norm(self.first(x)).relu_())


class TransformerLayer(nn.Module):
    """x + mixing(norm1(x)), then x + feedforward(norm2(x)): [V, D] -> [V, D]."""

    def __init__(self, mixing, feedforward, dim, norm="layer"):
        super().__init__()
        self.norm1 = make_norm(norm, dim)
        self.mixing = mixing
        self.norm2 = make_norm(norm, dim)
        self.feedforward = feedforward

    def forward(self, x, batch):
        x = x + self.mixing(self.norm1(x), batch)
        return x + self.feedforward(self.norm2(x))


class GINLayer(nn.Module):
    """x + relu(norm(MLP((1 + eps) x + sum over neighbours of relu(x)))): [V, D] -> [V, D].

    MLP is Linear, batch norm, ReLU, Linear, as wide as x. divide_by divides what enters it.
    Source: Xu et al. 2019, as the graph notebook uses it (8.3).
    """

    def __init__(self, dim, divide_by=1.0):
        super().__init__()
        self.mlp = FeedForward(dim, dim, "batch")
        self.norm = nn.BatchNorm1d(dim)
        self.eps = nn.Parameter(torch.zeros(()))
        self.divide_by = divide_by

    def forward(self, x, batch):
        total = (1 + self.eps) * x + sum_over_neighbours(x.relu(), batch)
        return x + self.norm(self.mlp(total / self.divide_by)).relu()


class GraphLayer(nn.Module):
    """Attention along links, then a feed-forward twice as wide, norms first: [B, N, D] -> same.

    make_linear(inputs, outputs) makes the four linear layers.
    """

    def __init__(self, dim, heads, make_linear=nn.Linear):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.inputs = make_linear(dim, 3 * dim)
        self.out = make_linear(dim, dim)
        self.first = make_linear(dim, 2 * dim)
        self.last = make_linear(2 * dim, dim)

    def apply_linear(self, linear, x, batch):
        """One of the linear layers; a derived class may look at the nodes' types."""
        return linear(x)

    def attend(self, x, bias, batch):
        """Weights [B, H, N, N] (target by source) and values [B, H, N, D/H].

        bias [B, H, N, N]: what is added to the logits.
        """
        inputs = self.apply_linear(self.inputs, self.norm1(x), batch)
        inputs = inputs.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = inputs.unbind(0)
        logits = query @ key.transpose(2, 3) / math.sqrt(key.shape[3])
        return (logits + bias).softmax(3), value

    def forward(self, x, bias, batch):
        weight, value = self.attend(x, bias, batch)
        mixed = (weight @ value).transpose(1, 2).flatten(2)
        x = x + self.apply_linear(self.out, mixed, batch)
        hidden = self.apply_linear(self.first, self.norm2(x), batch).relu()
        return x + self.apply_linear(self.last, hidden, batch)


# Logic gates: S networks, one per seed, in one tensor program
GATES = (
    "FALSE", "AND", "A AND NOT B", "A", "B AND NOT A", "B", "XOR", "OR",
    "NOR", "XNOR", "NOT B", "A OR NOT B", "NOT A", "B OR NOT A", "NAND", "TRUE",
    "RELU",
)  # fmt: skip
LOGIC_GATES = GATES[:16]  # a gate's number, in binary, is its truth table
FROM_CORNERS = torch.tensor(  # the coefficients of 1, a, b, ab for each corner 00, 01, 10, 11
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 1.0, -1.0], [0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 1.0]]
)


def truth_table(gate):
    """Values at (a, b) = 00, 01, 10, 11 of gates: numbers in LOGIC_GATES [...] -> [..., 4]."""
    shift = torch.tensor([3, 2, 1, 0], device=gate.device)
    return (gate.unsqueeze(-1) >> shift & 1).float()


def mix_gates(operands, coefficients):
    """c0 + c1 a + c2 b + c3 ab, plus c4 relu(a) if there is a fifth coefficient.

    operands [S, 2, n, B] are a and b, coefficients [S, n, 4 or 5] -> [S, n, B]. Operands
    [S, 1, n, B] are a alone: then only c4 relu(a).
    """
    c = coefficients.unsqueeze(-1).unbind(2)
    if operands.shape[1] == 1:
        return c[4] * operands[:, 0].relu()
    a, b = operands.unbind(1)
    mixed = c[0] + c[1] * a + (c[2] + c[3] * a) * b
    if len(c) == 5:
        mixed = mixed + c[4] * a.relu()
    return mixed


class GateMixture(nn.Module):
    """S x n units, each a weighted sum of the same G gates of a and b, in their polynomial form.

    Any sum of the 16 logic gates is c0 + c1 a + c2 b + c3 ab: four coefficients stand for all;
    "RELU", relu(a), adds a fifth. weight [S, n, G]: initial weights. normalise: "none", "sum"
    (the weights are divided by their sum) or "softmax". Source: logic journal; "softmax":
    Petersen et al. 2022.
    """

    def __init__(self, weight, gates=LOGIC_GATES, normalise="none"):
        super().__init__()
        number = torch.tensor([GATES.index(name) for name in gates])
        relu = (number == GATES.index("RELU")).float().unsqueeze(1)
        table = (1 - relu) * (truth_table(number) @ FROM_CORNERS)
        if relu.any():
            table = torch.cat([table, relu], dim=1)
        self.weight = nn.Parameter(weight)
        self.normalise = normalise
        self.register_buffer("number", number)
        self.register_buffer("table", table)  # [G, 4 or 5]

    def coefficients(self):
        """[S, n, 4], or 5 with RELU."""
        weight = self.weight
        if self.normalise == "softmax":
            weight = weight.softmax(dim=-1)
        elif self.normalise == "sum":
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return torch.bmm(weight, self.table.expand(len(weight), -1, -1))

    def hardened(self):
        """Number in GATES of each unit's gate of largest weight: [S, n]."""
        return self.number[self.weight.argmax(dim=-1)]


class TruthTables(nn.Module):
    """S x n units, each a truth table of a and b with four free entries, linear between them.

    The entries are the sigmoids of the logits [S, n, 4].
    """

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.register_buffer("from_corners", FROM_CORNERS.clone())
        self.register_buffer("place", torch.tensor([8, 4, 2, 1]))

    def coefficients(self):
        """[S, n, 4]."""
        # In float32 the last bit of a sigmoid depends on its place in the array.
        entries = self.logits.double().sigmoid().to(self.logits.dtype)
        return torch.bmm(entries, self.from_corners.expand(len(entries), -1, -1))

    def hardened(self):
        """Number in LOGIC_GATES of each unit's nearest truth table: [S, n]."""
        ones = (self.logits > 0).long()
        return (ones * self.place).sum(dim=-1)


class DenseOperands(nn.Module):
    """Trained operands a = A x + a0 and b = B x + b0: [S, m, B] -> [S, 2, n, B].

    weight [S, 2n, m], bias [S, 2n, 1]: of all a, then of all b. With n rows instead of 2n there
    is a alone: [S, 1, n, B]. Source: logic journal.
    """

    def __init__(self, weight, bias, units):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.units = units

    def forward(self, x):
        both = torch.baddbmm(self.bias, self.weight, x)
        return both.unflatten(1, (-1, self.units))


class WiredOperands(nn.Module):
    """Fixed operands: each unit reads two units of the layer below, [S, m, B] -> [S, 2, n, B].

    wires [S, 2, n]: numbers of the units that are read.
    """

    def __init__(self, wires, inputs):
        super().__init__()
        wires = torch.from_numpy(wires)
        offset = inputs * torch.arange(len(wires)).view(-1, 1, 1)
        self.register_buffer("wires", wires)
        self.register_buffer("row", (wires + offset).flatten())

    def forward(self, x):
        return x.flatten(0, 1).index_select(0, self.row).view(*self.wires.shape, -1)


def draw_wires(inputs, units, rng):
    """Two different inputs for each unit, each input used about equally often: [2, n].

    Raises ValueError for a single input and for more inputs than the units can read.
    """
    if inputs < 2 or 2 * units < inputs:
        raise ValueError(f"{units} units of two inputs cannot use {inputs} inputs")
    rounds = math.ceil(2 * units / inputs)
    in_turn = np.concatenate([rng.permutation(inputs) for _ in range(rounds)])
    first, second = rng.permutation(in_turn[: 2 * units]).reshape(2, units)
    another = (first + rng.integers(1, inputs, units)) % inputs
    return np.stack([first, np.where(second == first, another, second)])


class GateLayer(nn.Module):
    """Operands, then gates of them: [S, m, B] -> [S, n, B]."""

    def __init__(self, operands, gates):
        super().__init__()
        self.operands = operands
        self.gates = gates

    def forward(self, x):
        return mix_gates(self.operands(x), self.gates.coefficients())

    def hardened(self, x):
        """As `forward`, with each unit's hardened gate."""
        table = truth_table(self.gates.hardened())
        return mix_gates(self.operands(x), table @ FROM_CORNERS.to(table.device))


# %% 6 Models


class SubtractMean(nn.Module):
    """x [V, D] less its mean over all nodes."""

    def forward(self, x):
        return x - x.mean(0)


class NodeClassifier(nn.Module):
    """Symbol one-hots -> Linear -> layers -> Linear: GraphBatch -> logits [V, 2].

    before_readout: a module [V, D] -> [V, D] in front of the last Linear, or None.
    """

    def __init__(self, layers, dim, before_readout=None):
        super().__init__()
        self.embed = nn.Linear(SYMBOLS, dim)
        self.layers = nn.ModuleList(layers)
        self.before_readout = before_readout or nn.Identity()
        self.readout = nn.Linear(dim, 2)

    def forward(self, batch):
        x = self.embed(F.one_hot(batch.feature, SYMBOLS).float())
        for layer in self.layers:
            x = layer(x, batch)
        return self.readout(self.before_readout(x))


class GateNetwork(nn.Sequential):
    """Gate layers of S networks with a single unit at the end: [S, 9, B] -> [S, B].

    Every product is a bmm or elementwise, so that a seed's numbers are the same to the bit
    whichever seeds share its batch.
    """

    def forward(self, x):
        return super().forward(x).squeeze(1)

    def hardened(self, x):
        """As `forward`, with each unit's hardened gate."""
        for layer in self:
            x = layer.hardened(x)
        return x.squeeze(1)


def wired_gate_network(sizes, seeds, gates, pass_through):
    """A network of fixed random wires whose gates start as "A", the pass-through.

    sizes: the inputs, then the units of each layer; seeds: one network for each.
    gates: "softmax" over the 16 gates, of which A starts with the share `pass_through`, or
    "tables", whose entries start that near to those of A. Raises ValueError for sizes that
    cannot be wired. Source: Petersen et al. 2022; the start: Miotti et al. 2025.
    """
    rngs = [stream(seed, "init") for seed in seeds]
    odds = pass_through / (1 - pass_through)
    pass_a = torch.tensor(LOGIC_GATES.index("A"))
    layers = []
    for inputs, units in itertools.pairwise(sizes):
        wires = np.stack([draw_wires(inputs, units, rng) for rng in rngs])
        if gates == "softmax":
            weight = math.log(15 * odds) * torch.eye(16)[pass_a]
            unit_gates = GateMixture(weight.repeat(len(seeds), units, 1), normalise="softmax")
        else:
            logits = math.log(odds) * (2 * truth_table(pass_a) - 1)
            unit_gates = TruthTables(logits.repeat(len(seeds), units, 1))
        layers.append(GateLayer(WiredOperands(wires, inputs), unit_gates))
    return GateNetwork(*layers)


def dense_gate_network(
    sizes, seeds, gates, *, start="constant", std=0.01, normalise="none", operands=DenseOperands
):
    """The journal's network: trained operands from N(0, std^2) and weighted gates.

    sizes: the inputs, then the units of each layer; seeds: one network for each. normalise: see
    GateMixture.
    gates: names in GATES; if all are RELU there is no operand b. start: "constant", 1 / G for
    each gate, or "uniform", divided by their sum. operands: DenseOperands or a class derived from
    it. Source: logic journal.
    """
    rngs = [stream(seed, "init") for seed in seeds]
    layers = []
    for inputs, units in itertools.pairwise(sizes):
        rows = units if set(gates) == {"RELU"} else 2 * units
        weight = np.stack([rng.normal(0, std, (rows, inputs)) for rng in rngs])
        bias = np.stack([rng.normal(0, std, (rows, 1)) for rng in rngs])
        share = np.full((len(seeds), units, len(gates)), 1 / len(gates))
        if start == "uniform":
            share = np.stack([rng.random((units, len(gates))) for rng in rngs])
            share = share / share.sum(axis=-1, keepdims=True)
        weight, bias, share = (torch.from_numpy(x).float() for x in (weight, bias, share))
        mixture = GateMixture(share, gates, normalise)
        layers.append(GateLayer(operands(weight, bias, units), mixture))
    return GateNetwork(*layers)


class LanguageModel(nn.Module):
    """Bytes -> layers -> logits of the next bytes: tokens [B, T] int64 -> [B T, 256].

    layers: modules ([B T, D], (B, T)) -> [B T, D], such as TransformerLayer.
    """

    def __init__(self, layers, dim):
        super().__init__()
        self.embed = nn.Embedding(BYTES, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.readout = nn.Linear(dim, BYTES)

    def forward(self, tokens):
        x = self.embed(tokens.flatten())
        for layer in self.layers:
            x = layer(x, tokens.shape)
        return self.readout(self.norm(x))


class NodeEmbedder(nn.Module):
    """An embedding of each node's words: QuestionBatch -> [B, N, D].

    The mean of a node's words in a slot goes through that slot's matrix; the slots are added.
    """

    def __init__(self, words, dim):
        super().__init__()
        self.word = nn.Embedding(words, dim)
        self.slot = nn.Parameter(torch.randn(SLOTS, dim, dim) * dim**-0.5)

    def forward(self, batch):
        used, index = batch.word.unique(return_inverse=True)
        table = (self.word(used) @ self.slot).flatten(0, 1)  # [SLOTS * used, D]
        said = F.embedding_bag(
            batch.slot * len(used) + index,
            table,
            batch.first_word,
            mode="sum",
            per_sample_weights=batch.word_weight,
        )
        return said.unflatten(0, batch.shape)


class QuestionReader(nn.Module):
    """Scores candidates by attention along links: QuestionBatch -> logits [B, N].

    Logits are -inf at nodes that are no candidates. A node's first state is what its words say
    plus a vector of its type; what the query's words say is added to the start's node and its
    mentions. A derived class may change that (`first_states`). layers: GraphLayers; one layer may
    stand there several times. A link's logit has a bias for each head, type of link and pair of
    node types. words: size of the vocabulary. Source: HDE, Tu et al. 2019.
    """

    def __init__(self, words, dim, heads, layers):
        super().__init__()
        self.embed = NodeEmbedder(words, dim)
        self.node_type = nn.Embedding(len(NODE_TYPES), dim)
        nn.init.normal_(self.node_type.weight, std=0.5)
        self.inject = nn.Linear(dim, dim)
        self.link_bias = nn.Parameter(torch.zeros(len(LINKS) * len(NODE_TYPES) ** 2, heads))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.readout = nn.Linear(dim, 1)

    def first_states(self, batch):
        """The nodes before the first layer: [B, N, D]."""
        said = self.embed(batch)
        query = self.inject(said[:, :1])
        return said + self.node_type(batch.node_type) + batch.is_start[..., None] * query

    def attention_bias(self, batch):
        """What is added to the logits of attention: [B, H, N, N], -1e9 where there is no link."""
        types = len(NODE_TYPES)
        pair = batch.node_type[:, :, None] * types + batch.node_type[:, None]
        bias = F.embedding(batch.link * types**2 + pair, self.link_bias)
        return bias.permute(0, 3, 1, 2).masked_fill((batch.link == NO_LINK)[:, None], -1e9)

    def last_states(self, batch):
        """The nodes after the last layer: [B, N, D]."""
        x = self.first_states(batch)
        bias = self.attention_bias(batch)
        for layer in self.layers:
            x = layer(x, bias, batch)
        return self.norm(x)

    def forward(self, batch):
        score = self.readout(self.last_states(batch)).squeeze(2)
        return score.masked_fill(~batch.is_candidate, -math.inf)


# %% 7 Metrics


def class_weighted_cross_entropy(logits, label):
    """Cross-entropy: logits [V, 2], labels [V] -> scalar.

    Each class is weighted by the other's share of the nodes. Labels IGNORED are skipped.
    Source: the authors of PATTERN; without the weights a model gains by ignoring the small class.
    """
    count = torch.stack([(label == 0).sum(), (label == 1).sum()])
    total = count.sum()
    weight = (total - count) / total
    return F.cross_entropy(logits, label, weight=weight, ignore_index=IGNORED)


def class_recalls(logits, label):
    """Share of each class that is found: [V, 2], [V] -> [2]; 0 for an absent class.

    Nodes IGNORED are not counted.
    """
    scored = label != IGNORED
    cell = 2 * label[scored] + logits.argmax(1)[scored]
    counts = torch.bincount(cell, minlength=4).view(2, 2)  # [true class, predicted class]
    return counts.diagonal() / counts.sum(1).clamp(min=1)


def ranking_accuracy(logits, label):
    """Area under the ROC curve, [V, 2], [V] -> scalar; ties count half.

    Unlike balanced accuracy it has no threshold. NaN where a class does not occur.
    """
    margin = logits[:, 1] - logits[:, 0]
    low = margin[label == 0].sort().values
    high = margin[label == 1]
    below = torch.searchsorted(low, high)
    up_to = torch.searchsorted(low, high, right=True)
    return (below + up_to).double().mean().float() / (2 * len(low))


def score_logits(logits, label):
    """{"recall" [2], "auc", "margin" [2]} of logits [V, 2] and labels [V].

    recall: of each class; margin: mean and standard deviation of logit 1 - logit 0. Once a logit
    is not finite, recall and AUC are NaN, so that no divergence looks stable.
    """
    scored = label != IGNORED
    margin = (logits[:, 1] - logits[:, 0])[scored]
    diverged = ~logits[scored].isfinite().all()
    return {
        "recall": class_recalls(logits, label).masked_fill(diverged, math.nan),
        "auc": ranking_accuracy(logits, label).masked_fill(diverged, math.nan),
        "margin": torch.stack([margin.mean(), margin.std()]),
    }


def oscillation(curve):
    """Mean absolute change per epoch in the second half of a curve [T]."""
    second_half = np.asarray(curve, dtype=np.float64)[len(curve) // 2 :]
    return float(np.abs(np.diff(second_half)).mean())


# %% 8 Gradient log


class GradientLog:
    """Norms of the weights and gradients of every parameter at every step.

    It only reads, so losses and weights are bit-identical with it or without. Call `record`
    between backward and the clipping of the gradients. rows: {"weight": [...], "gradient": [...]},
    one tensor [P] per step; names: of the P parameters.
    """

    def __init__(self, model):
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = list(model.parameters())
        self.rows = {"weight": [], "gradient": []}

    @torch.no_grad()
    def record(self):
        """Add the norms of this step."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.rows["weight"].append(torch.stack([p.norm() for p in self.parameters]))
        self.rows["gradient"].append(torch.stack([g.norm() for g in gradients]))


def grad_over_weight(history, by="parameter"):
    """Gradient norm over weight norm from `train`'s history: {name: [T]}, in model order.

    by "parameter", or "module": its weight and bias together. NaN where the weight is zero,
    as a bias is before its first step.
    """
    squares = {}
    for p, name in enumerate(history["names"]):
        if by == "module":
            name = name.removesuffix(".weight").removesuffix(".bias")
        gradient, weight = squares.get(name, (0.0, 0.0))
        gradient = gradient + history["gradient"][:, p].astype(np.float64) ** 2
        weight = weight + history["weight"][:, p].astype(np.float64) ** 2
        squares[name] = (gradient, weight)
    ratios = {}
    for name, (gradient, weight) in squares.items():
        ratios[name] = np.full(len(weight), np.nan)
        np.divide(gradient, weight, out=ratios[name], where=weight > 0)
        ratios[name] = np.sqrt(ratios[name])
    return ratios


# %% 9 Training


@torch.no_grad()
def evaluate(model, batches):
    """Logits [V, 2] and labels [V] of all GraphBatches, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(batch) for batch in batches])
    return logits, torch.cat([batch.label for batch in batches])


def add_score(rows, logits, label):
    """Append one `score_logits` to the curves."""
    for name, value in score_logits(logits, label).items():
        rows[name].append(value)


def save(checkpoint, model, optimizer, rows, epoch):
    """Keep the state of a training run."""
    curves = {name: torch.stack(values) for name, values in rows.items() if values}
    checkpoint.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curves": curves,
            "epoch": epoch,
        }
    )


def restore(checkpoint, model, optimizer, rows):
    """Load what `save` kept into model, optimizer and rows; the epoch to go on with."""
    state = None if checkpoint is None else checkpoint.load()
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, values in state["curves"].items():
        rows[name].extend(values)
    return state["epoch"]


def train(model, batches, *, seed, lr, epochs, clip, held_out=None, checkpoint=None):
    """Train with Adam on the class-weighted loss (nats), one step per GraphBatch, and score each
    epoch.

    Gradients are clipped to total norm `clip`. The state is kept in `checkpoint` now and
    then, and training goes on from there to the same bits. Returns NumPy arrays:

    loss, gradient_norm  [T], gradients before clipping
    weight, gradient     [T, P] norms per parameter; `names` lists the parameters
    recall, margin       [epochs + 1, 2], auc [epochs + 1]: `score_logits` after 0, 1, ... epochs,
                         in evaluation mode, over `held_out` (default: the batches)
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    log = GradientLog(model)
    # `record` appends to the lists of log.rows, which rows shares
    rows = log.rows | {name: [] for name in ("loss", "gradient_norm", "recall", "auc", "margin")}
    start = restore(checkpoint, model, optimizer, rows)
    scored = batches if held_out is None else held_out
    # With one batch a training pass may give the scores of an evaluation; it has to prove it.
    reuse_logits = len(batches) == 1 and held_out is None

    for epoch in range(start, epochs):
        evaluated = None
        if epoch == start or not reuse_logits:
            evaluated = evaluate(model, scored)
            add_score(rows, *evaluated)
        model.train()
        for i in stream(seed, "order", epoch).permutation(len(batches)):
            optimizer.zero_grad(set_to_none=True)
            logits = model(batches[i])
            loss = class_weighted_cross_entropy(logits, batches[i].label)
            loss.backward()
            log.record()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rows["loss"].append(loss.detach())
            rows["gradient_norm"].append(norm)
        if reuse_logits and epoch == start:
            same = torch.equal(logits.detach(), evaluated[0])
            reuse_logits = same and bool(logits.std() > 0)  # a constant output proves nothing
        elif reuse_logits:
            add_score(rows, logits.detach(), batches[0].label)
        if checkpoint is not None and checkpoint.is_due():
            save(checkpoint, model, optimizer, rows, epoch + 1)

    add_score(rows, *evaluate(model, scored))
    history = {name: torch.stack(values).cpu().numpy() for name, values in rows.items()}
    return history | {"names": log.names}


def cut_windows(part, starts, length, device):
    """Windows of a part of a Text and the bytes that follow: [B, T] twice, int64."""
    taken = part[starts[:, None] + np.arange(length + 1)]
    taken = torch.from_numpy(taken).to(device, torch.int64)
    return taken[:, :-1], taken[:, 1:]


@torch.no_grad()
def held_out_loss(model, text, length, windows=256):
    """Mean loss in nats per byte over so many `windows` of `length` bytes of the held-out part.

    They are spread evenly over it. The model is in training mode afterwards.
    """
    model.eval()
    device = model.embed.weight.device
    starts = np.linspace(0, len(text.held_out) - length - 1, windows).astype(int)
    batch = max(1, 2048 // length)
    total = 0.0
    for i in range(0, windows, batch):
        inputs, targets = cut_windows(text.held_out, starts[i : i + batch], length, device)
        total += F.cross_entropy(model(inputs), targets.flatten(), reduction="sum").item()
    model.train()
    return total / (windows * length)


def language_optimizer(model, lr):
    """AdamW with betas 0.9 and 0.95, and weight decay 0.01 of matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def language_step(model, optimizer, lr, batches):
    """One step of the optimizer at rate lr on the mean loss of some (inputs, targets).

    Returns (mean loss in nats per byte, norm of the gradient), without clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for inputs, targets in batches:
        loss = F.cross_entropy(model(inputs), targets.flatten()) / len(batches)
        loss.backward()
        total += loss.item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total, norm


def train_on_text(model, text, *, seed, lr, steps, batch, length):
    """Train on `steps` batches of random windows; the rate climbs over the first tenth.

    Returns NumPy arrays: loss (nats per byte) and gradient_norm [steps], each before its step.
    """
    optimizer = language_optimizer(model, lr)
    rng = stream(seed, "order")
    device = model.embed.weight.device
    tenth = max(1, steps // 10)
    losses = []
    norms = []
    for step in range(steps):
        starts = rng.integers(len(text.train) - length, size=batch)
        windows = cut_windows(text.train, starts, length, device)
        rate = lr * min(1.0, (step + 1) / tenth)
        loss, norm = language_step(model, optimizer, rate, [windows])
        losses.append(loss)
        norms.append(norm)
    return {"loss": np.array(losses), "gradient_norm": np.array(norms)}


@torch.no_grad()
def answered(model, batches):
    """Which questions a QuestionReader answers right: [Q] bool."""
    model.eval()
    return torch.cat([model(batch).argmax(1) == batch.answer for batch in batches]).cpu()


def train_reader(model, batches, *, steps, lr, validation=None, points=10):
    """Train a QuestionReader in place on `steps` QuestionBatches of an iterator.

    AdamW with weight decay 0.01, gradients clipped at norm 1; the learning rate rises to `lr`
    over 100 steps and falls to 0 over the last 30%. Returns NumPy arrays: "loss" [steps] in nats
    per question, and for each name of `validation` {name: batches} the accuracy after 0,
    1 / points, ... of the steps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    losses = []
    curves = {name: [] for name in validation or {}}
    scored = {math.ceil(i * steps / points) for i in range(points + 1)}
    for step in range(steps + 1):
        if step in scored:
            for name, curve in curves.items():
                curve.append(answered(model, validation[name]).float().mean())
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))
        batch = next(batches)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(batch), batch.answer)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
    curves = {name: torch.stack(curve).numpy() for name, curve in curves.items()}
    return {"loss": torch.stack(losses).cpu().numpy(), **curves}


def keep_freed_blocks():
    """Let glibc keep what is freed, whatever its size; other C libraries are left as they are.

    Blocks of 32 MiB and more are otherwise given back to the system at each free, and paged in
    again at the next call, which slows what allocates them up to 1.7 times. A glibc that refuses
    so high a threshold goes on as before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def release_freed_blocks():
    """Give back to the system what glibc keeps, so that the memory of trials does not add up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def interleaved_medians(steps, rounds, device="cpu"):
    """Median seconds per call of each function in {name: function}: {name: seconds}.

    All take turns in every round, so that what slows the machine slows them alike. Two rounds
    before are not counted: they load pages and kernels. The thread count is the caller's to state.
    """
    times = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken)) for name, taken in times.items()}


# %% 10 Statistics

CONFIDENCE = 0.95
OURS = "ours"  # source of a claim that no notebook makes
VERDICTS = {  # of a statement of a notebook, and of a claim of ours
    "holds": ("reproduced", "supported"),
    "fails": ("refuted", "rejected"),
    "open": ("inconclusive", "inconclusive"),
}


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    estimate: float
    low: float
    high: float


def mean_interval(values):
    """Student-t interval of a mean; unbounded for one value or values that are not finite."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf)
    mean = float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, -math.inf, math.inf)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Interval(mean, mean - float(half), mean + float(half))


def ratio_interval(values, base):
    """Geometric mean of values / base, paired; Student-t on logarithms. Unbounded unless all are
    positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.asarray(values, np.float64)) - np.log(np.asarray(base, np.float64))
    found = mean_interval(logs)
    with np.errstate(over="ignore"):
        low, high = np.exp([found.low, found.high]).tolist()
    return Interval(float(np.exp(found.estimate)), low, high)


def rate_interval(hits):
    """Exact (Clopper-Pearson) interval of the share of ones; unbounded without a value, or if one
    is NaN."""
    from scipy import stats

    n = len(hits)
    if n == 0 or np.isnan(np.asarray(hits, np.float64)).any():
        return Interval(math.nan, -math.inf, math.inf)
    test = stats.binomtest(int(np.sum(hits)), n)
    found = test.proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(np.mean(hits)), float(found.low), float(found.high))


def rate_difference_interval(hits, base):
    """Interval of the difference of two paired rates; unbounded if no seed differs.

    It is the exact binomial interval over the seeds that differ, scaled by their share. That share
    is taken as known, so the interval is exact for the sign of the difference, and too narrow for
    any bound other than 0.
    """
    hits = np.asarray(hits)
    base = np.asarray(base)
    differ = hits != base
    if not differ.any():
        return Interval(0.0, -math.inf, math.inf)
    share = float(differ.mean())
    wins = rate_interval(hits[differ])
    # a share x of wins among the seeds that differ means x - (1 - x) wins less losses
    return Interval(*[share * (2 * x - 1) for x in wins])


def format_number(x):
    """A number for the reader: three significant digits, thousands in full, a dash for NaN."""
    if math.isnan(x):
        return "–"
    shown = f"{x:.3g}"
    return f"{x:,.0f}" if 1000 <= abs(float(shown)) < 1e9 else shown


def format_half_width(interval):
    """Half an interval for the reader, two digits; "" if it has no width beyond rounding."""
    half = (interval.high - interval.low) / 2
    if not 1e-12 * abs(interval.estimate) < half < math.inf:
        return ""
    return f"{half:,.0f}" if half >= 99.5 else f"{half:.2g}"


class Measurement(NamedTuple):
    """What a Check found for one arm: "holds", "fails" or "open", and the value."""

    check: "Check"
    arm: str | None
    outcome: str
    estimate: float
    words: str


@dataclass(frozen=True)
class Check:
    """One number that a claim predicts.

    `metric` of the arm `arm` lies `below`, `above`, `between` (low, high) or `equals` a value.
    minus     the metric is the paired difference to this other arm, or to one for each of any_arm
    over      the metric is the paired ratio to this other arm (never of what can be 0)
    rate      the metric is 0 or 1 per seed; exact binomial intervals, with `minus` exact for
              above=0 and below=0 only
    unless    a metric of 0 or 1; seeds where it is 1 are left out
    any_arm   instead of arm: one of these arms has to hold it; it fails if it fails for all
    Without arm and any_arm the metric is one of the experiment's across(run).
    `equals` is exact (to 1e-9) for every seed and needs only one; the others ask that the 95%
    interval of the mean lies inside the bounds.
    """

    metric: str
    below: float | None = None
    above: float | None = None
    between: tuple | None = None
    equals: float | None = None
    arm: str | None = None
    minus: str | tuple | None = None
    over: str | None = None
    rate: bool = False
    unless: str | None = None
    any_arm: tuple = ()

    def __post_init__(self):
        """Raise ValueError for what cannot be judged: a mistake in the script."""
        bounds = [self.below, self.above, self.between, self.equals]
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError(f"{self.metric}: give one of below, above, between, equals")
        if self.over is not None and (self.minus is not None or self.equals is not None):
            raise ValueError(f"{self.metric}: give over without minus and equals")
        if isinstance(self.minus, tuple) and len(self.minus) != len(self.any_arm):
            raise ValueError(f"{self.metric}: give one arm of minus for each of any_arm")

    def arms(self):
        """Names of all arms that it reads; empty for a metric across arms."""
        named = []
        for arm in self.any_arm or [self.arm]:
            named += [arm, self.base(arm)]
        return [name for name in named if name is not None]

    def base(self, arm):
        """The arm that `arm` is compared with, or None."""
        if isinstance(self.minus, tuple):
            return self.minus[self.any_arm.index(arm)]
        return self.over if self.minus is None else self.minus

    def bounds(self):
        """(low, high), infinite where open."""
        if self.between is not None:
            return self.between
        low = -math.inf if self.above is None else self.above
        high = math.inf if self.below is None else self.below
        return low, high

    def label(self):
        """What is measured, in words."""
        if self.minus is not None:
            return f"{self.metric} difference"
        return self.metric if self.over is None else f"{self.metric} ratio"

    def paired_values(self, run, arm):
        """Values of the arm [S], and those of the arm it is compared with for the same seeds.

        The second is None without such an arm. For arm None the metric is one across arms.
        """
        if arm is None:
            return np.asarray(run.across[self.metric], dtype=np.float64), None
        arms = [name for name in (arm, self.base(arm)) if name is not None]
        found = [run.values(name, self.metric).astype(np.float64) for name in arms]
        n = min(len(values) for values in found)  # an ablation may have fewer seeds, the first ones
        kept = np.ones(n, dtype=bool)
        if self.unless is not None:
            for name in arms:
                kept &= run.values(name, self.unless)[:n] == 0
        found = [values[:n][kept] for values in found]
        return found[0], found[1] if len(found) > 1 else None

    def judge(self, run, arm):
        """The Measurement for one arm."""
        values, base = self.paired_values(run, arm)
        if len(values) == 0:
            return Measurement(self, arm, "open", math.nan, "no seed left")
        if self.equals is not None:
            return self.judge_exactly(values if base is None else values - base, arm)
        found = self.interval(values, base)
        return Measurement(self, arm, self.outcome(found), found.estimate, self.describe(found))

    def judge_exactly(self, values, arm):
        """The same for `equals`: values [S] of all seeds."""
        outcome = "fails"
        if np.isnan(values).any():
            outcome = "open"
        elif np.allclose(values, self.equals, rtol=1e-9, atol=1e-9):
            outcome = "holds"
        shown = " and ".join(format_number(x) for x in np.unique(values))
        return Measurement(self, arm, outcome, values.mean(), shown)

    def interval(self, values, base):
        """The Interval of the values [S], compared with base [S] unless that is None."""
        if self.rate and base is not None:
            return rate_difference_interval(values, base)
        if self.rate:
            return rate_interval(values)
        if self.over is not None:
            return ratio_interval(values, base)
        return mean_interval(values if base is None else values - base)

    def outcome(self, found):
        """The outcome "holds", "fails" or "open" of an Interval."""
        low, high = self.bounds()
        if math.isnan(found.estimate):
            return "open"
        if low < found.low and found.high < high:
            return "holds"
        if found.high <= low or found.low >= high:
            return "fails"
        return "open"

    def describe(self, found):
        """An Interval in words."""
        text = format_number(found.estimate)
        if not math.isfinite(found.high - found.low):
            return text
        if self.over is not None or self.rate:  # not symmetric
            return f"{text} [{format_number(found.low)}, {format_number(found.high)}]"
        half = format_half_width(found)
        return f"{text} ± {half}" if half else text


def outcome_of_all(outcomes):
    """The outcome "fails" if one fails, "holds" if all hold, else "open"."""
    if "fails" in outcomes:
        return "fails"
    return "holds" if set(outcomes) == {"holds"} else "open"


def outcome_of_any(outcomes):
    """The outcome "holds" if one holds, "fails" if all fail, else "open"."""
    if "holds" in outcomes:
        return "holds"
    return "fails" if set(outcomes) == {"fails"} else "open"


class Claim:
    """A whole sentence, its source (a section of the notebook, or OURS), and its checks.

    It holds if every check does, fails if one does, and is open otherwise. Checks with the same
    any_arm are judged together: one of the arms has to hold them all.
    """

    def __init__(self, text, source, *checks):
        self.text = text
        self.source = source
        self.checks = checks

    def arms(self):
        """Names of all arms that its checks read."""
        return [name for check in self.checks for name in check.arms()]

    def can_be_judged(self, run):
        """Whether the run has every arm; a metric across arms needs all of the experiment's."""
        if any(not check.arms() for check in self.checks) and not run.is_whole:
            return False
        return all(run.has(name) for name in self.arms())

    def judge(self, run):
        """(verdict, [Measurement])."""
        measured = []
        outcomes = []
        alternatives = {}  # {any_arm of a check: {arm: [outcomes]}}
        for check in self.checks:
            for arm in check.any_arm or [check.arm]:
                found = check.judge(run, arm)
                measured.append(found)
                if check.any_arm:
                    by_arm = alternatives.setdefault(check.any_arm, {})
                    by_arm.setdefault(arm, []).append(found.outcome)
                else:
                    outcomes.append(found.outcome)
        for by_arm in alternatives.values():
            outcomes.append(outcome_of_any([outcome_of_all(found) for found in by_arm.values()]))
        of_notebook, of_ours = VERDICTS[outcome_of_all(outcomes)]
        return of_ours if self.source == OURS else of_notebook, measured


def name_arms(one, values):
    """The arm of a Measurement, with the arm it is compared with where `values` have several."""
    bases = {other.check.base(other.arm) for other in values if other.arm == one.arm}
    if len(bases) == 1:
        return one.arm
    compared = f"{'less' if one.check.over is None else 'over'} {one.check.base(one.arm)}"
    only_arm = len({other.arm for other in values}) == 1
    return compared if only_arm else f"{one.arm} {compared}"


def list_values(values):
    """The values of Measurements with the same label, in words."""
    words = [f"{one.words} ({name_arms(one, values)})" if one.arm else one.words for one in values]
    if len({one.words for one in values}) > 1:
        return "; ".join(words)
    return values[0].words + (f" ({len(values)} checks)" if len(values) > 1 else "")


def list_measured(measured, list_alike=list_values):
    """Measurements in words, those with the same label together."""
    by_label = {}
    for one in measured:
        by_label.setdefault(one.check.label(), []).append(one)
    return "; ".join(f"{label} {list_alike(values)}" for label, values in by_label.items())


def brief_values(values):
    """As list_values, but of more than four with the same bounds only the lowest and highest."""
    if len(values) <= 4:
        return list_values(values)
    by_bounds = {}
    for one in values:
        by_bounds.setdefault((one.check.bounds(), one.check.equals), []).append(one)
    parts = []
    for alike in by_bounds.values():
        known = [one for one in alike if math.isfinite(one.estimate)]
        if len(known) <= 4 or len({one.words for one in alike}) == 1:
            parts.append(list_values(alike))
        else:
            low = min(known, key=lambda one: one.estimate)
            high = max(known, key=lambda one: one.estimate)
            ends = [f"{one.words} ({name_arms(one, alike)})" for one in (low, high)]
            parts.append(f"{' to '.join(ends)}, {len(alike)} checks")
    return "; ".join(parts)


def brief(measured):
    """Measurements in words, for an entry; the CSV file of the claims lists them all.

    Of alternative arms only those that hold all checks are shown, if there are any.
    """
    failed = {(one.check.any_arm, one.arm) for one in measured if one.outcome != "holds"}
    notes = []
    for any_arm in dict.fromkeys(one.check.any_arm for one in measured):
        held = [arm for arm in any_arm if (any_arm, arm) not in failed]
        if 0 < len(held) < len(any_arm):
            measured = [x for x in measured if x.check.any_arm != any_arm or x.arm in held]
            named = f" ({held[0]})" if len(held) == 1 else ""  # of several each value has its arm
            notes.append(f"in {len(held)} of {len(any_arm)} arms{named}")
    return "; ".join([list_measured(measured, brief_values), *notes])


# %% 11 Arguments


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, not a page. `make_parser` sets the attributes.

    A script may add few_seeds {arm: number of seeds}, other than seeds and ablation_seeds.
    """

    common_flags = frozenset()  # names of the flags that all experiments share
    ablation_seeds = None  # seeds of the arms of ABLATIONS, None for as many as all others
    few_seeds = None

    def __init__(self, **keywords):
        super().__init__(**keywords)
        # argparse's own pattern takes -1e2 and -inf for flags
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|(inf|infinity|nan)$)")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def _print_message(self, message, file=None):
        print_to(file or sys.stderr, message.removesuffix("\n"))  # whatever the encoding


def checked_type(convert, is_allowed, expected):
    """argparse type: the converted text if it is allowed, else "'x' is not `expected`"."""

    def read(text):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if is_allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return read


def integer(low, high=10**9):
    """argparse type: an integer from low to high."""
    expected = f"an integer from {low:,} to {high:,}"
    return checked_type(int, lambda x: low <= x <= high, expected)


def split_integers(text):
    """Integers joined by commas: "0,1,2" -> (0, 1, 2)."""
    return tuple(int(word) for word in text.split(","))


def is_ascending(values):
    """Whether integers are >= 0, ascending and all different."""
    return min(values) >= 0 and list(values) == sorted(set(values))


positive_int = integer(1)
layer_width = integer(1, 8192)  # wider ones do not fit into memory
any_number = checked_type(float, lambda x: not math.isnan(x), "a number")  # or infinite
positive_float = checked_type(float, lambda x: 0 < x < math.inf, "a number > 0")
probability = checked_type(float, lambda x: 0 < x < 1, "a number above 0 and below 1")
int_tuple = checked_type(split_integers, is_ascending, "integers >= 0 joined by commas, ascending")


def path_type(text):
    """argparse type: a path; ~ is the home folder."""
    path = os.path.expanduser(text)
    if not path or path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} is no path; name a file or a folder")
    return Path(path)


class InputFile(str):
    """A file that enters a trial: a text, the hash of its content, which stands for the file.

    `path` is where it lies.
    """

    path: str


def input_file(text):
    """argparse type: an InputFile."""
    path = path_type(text)
    if not os.path.isfile(path):  # a pipe can be read only once, and every process reads it
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular file; save it to one first")
    try:
        found = InputFile(short_hash(path.read_bytes(), 16))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise argparse.ArgumentTypeError(f"{text!r} does not fit into memory") from None
    found.path = str(path.resolve())
    return found


def make_parser(doc, seeds, ablation_seeds=None):
    """A parser with the flags that all experiments share; `seeds` are the entry of record's.

    A script adds its hyperparameters: nargs="+" and a list with one value as default. With
    `ablation_seeds` the arms of ABLATIONS have only so many seeds, the first ones, unless --seeds
    is given.
    """
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    common = parser.add_argument_group("common to all experiments")
    common.add_argument("--arms", nargs="+", metavar="NAME", help="run only these rows")
    common.add_argument("--seeds", type=integer(1, 1000), default=seeds, help="number of seeds")
    common.add_argument("--first-seed", type=integer(0), default=0, help="the first of them")
    common.add_argument("--jobs", type=integer(1), help="processes (default: one per core)")
    common.add_argument("--threads", type=integer(1), default=1, help="threads per process")
    devices = ["auto", "cpu", "cuda"]
    common.add_argument("--device", choices=devices, default="auto", help="auto: a GPU if any")
    common.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    common.add_argument("--fresh", action="store_true", help="run finished trials again")
    common.add_argument("--no-log", action="store_true", help="no entry, no figures")
    note = checked_type(str, str.strip, "a conclusion")
    common.add_argument("--note", type=note, help="conclusion of the entry")
    for flag, name, meaning in (
        ("--logbook", "logbook.md", "file that gets the entry"),
        ("--plots", "plots", "folder that gets figures and numbers"),
        ("--runs", "runs", "folder of finished trials"),
    ):
        common.add_argument(flag, type=path_type, default=REPOSITORY / name, help=meaning)
    parser.common_flags = frozenset(vars(parser.parse_args([])))
    parser.ablation_seeds = ablation_seeds
    return parser


def parse(parser, argv):
    """(options, the hyperparameters' base settings, {hyperparameter: values given})."""
    for word in argv:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            parser.error(f"argument {word!a} is not valid UTF-8; write it in UTF-8")
    defaults = vars(parser.parse_args([]))
    base = {key: value[0] for key, value in defaults.items() if key not in parser.common_flags}
    words = [word.partition("=")[0] for word in argv]
    flags = [word for word in words if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:  # argparse would drop what follows the first
            parser.error(f"argument {flag}: given twice; give it once, with all its values")
    nothing_given = argparse.Namespace(**dict.fromkeys(base))  # argparse keeps what is there
    options = parser.parse_args(argv, nothing_given)
    if options.note is not None and (options.no_log or options.smoke):
        parser.error("argument --note: this run writes no entry; leave it out")
    given = {key: getattr(options, key) for key in base if getattr(options, key) is not None}
    return options, base, given


def flag_name(key):
    """learning_rate -> --learning-rate."""
    return "--" + key.replace("_", "-")


def show_setting(value):
    """A setting as one would type it; a file by its name and the start of its hash."""
    if isinstance(value, InputFile):
        return f"{os.path.basename(value.path)} ({value[:8]})"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def name_setting(key, value):
    """A setting in words: ("divide_by", 59.0) -> "divide by 59"."""
    return f"{key.replace('_', ' ')} {show_setting(value)}"


def grid(**values):
    """A table of arms: every combination, {"a 1, b 2": {"a": 1, "b": 2}, ...}."""
    table = {}
    for combination in itertools.product(*values.values()):
        row = dict(zip(values, combination, strict=True))
        name = ", ".join(name_setting(key, value) for key, value in row.items())
        table[name] = row
    return table


def settings_key(settings):
    """Settings as a text that is equal for equal settings."""
    return json.dumps(settings, sort_keys=True)


MAX_TRIALS = 5000


def choose_arms(arms, ablations, base, given, options):
    """{arm: all its settings} of a run with the values `given` by flags, and --arms.

    Without either it is all of both tables. A given flag replaces that setting in every row of
    ARMS; a row that sets it to something else is dropped; several values make a grid. Rows that
    become equal merge; one that equals a row of a table has its name. Raises UsageError.
    """
    rows = pick_rows(arms, ablations, given, options.arms)
    flags = ", ".join(flag_name(key) for key in given)
    size = len(rows) * math.prod(len(values) for values in given.values()) * options.seeds
    if size > MAX_TRIALS:
        raise UsageError(
            f"{flags or '--seeds'}: {size:,} trials, and at most {MAX_TRIALS:,} are run; "
            "give fewer values or seeds"
        )

    names = {}  # {settings: name of the row that has them}
    for name, row in (arms | ablations).items():
        names.setdefault(settings_key(base | row), name)
    chosen = {}
    for name, row in rows.items():
        varying = [key for key in given if len(given[key]) > 1 and key not in row]
        for values in itertools.product(*given.values()):
            settings = base | row | dict(zip(given, values, strict=True))
            if any(settings[key] != value for key, value in row.items()):
                continue  # the row sets it to something else
            words = [name_setting(key, settings[key]) for key in varying]
            own_name = names.setdefault(settings_key(settings), ", ".join([name, *words]))
            chosen[own_name] = settings
    if not chosen:
        raise UsageError(
            f"{flags}: every row asks for another value; leave it out, or name other rows in --arms"
        )
    return chosen


def pick_rows(arms, ablations, given, names):
    """The rows {name: settings} that a run starts from; names: those of --arms, or None."""
    table = arms | ablations
    if names is None:
        return arms if given else table
    unknown = [name for name in names if name not in table]
    if unknown:
        known = "; ".join(table)
        raise UsageError(f"--arms {unknown[0]!r}: there is no such arm; choose from: {known}")
    return {name: table[name] for name in names}


# %% 12 Reach


class Module(NamedTuple):
    """A file of this repository, parsed.

    definitions  {name: statements that define or change it}
    imports      {name here: (file, name there, or None for the file itself)}
    """

    definitions: dict
    imports: dict


def repository_imports(statement, folder):
    """{name: (file, name there or None)} of an import of this repository's files."""
    found = {}
    for alias in statement.names:
        if isinstance(statement, ast.Import):
            path = folder / f"{alias.name}.py"
            target = (path, None)
        else:
            path = folder / f"{statement.module}.py"
            target = (path, alias.name)
        if path.exists():
            found[alias.asname or alias.name] = target
    return found


def bound_names(statement):
    """Names that a statement defines, or may change."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = list(statement.targets)
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        targets = [statement.value.func]  # such as TABLE.update(...)
    else:
        targets = []
    parts = [part for target in targets for part in ast.walk(target)]
    return [part.id for part in parts if isinstance(part, ast.Name)]


@functools.cache
def read_module(path):
    """The Module in the file at `path`."""
    definitions = {}
    imports = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        parts = ast.walk(statement)  # an if, a try or a loop may hold definitions
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            parts = [statement]
        names = []
        for part in parts:
            if isinstance(part, ast.Import | ast.ImportFrom):
                imports.update(repository_imports(part, path.parent))
            names += bound_names(part)
        for name in dict.fromkeys(names):
            definitions.setdefault(name, []).append(statement)
    return Module(definitions, imports)


def referenced(statement, path, module):
    """[(file, name)] that a statement mentions."""
    found = []
    for part in ast.walk(statement):
        if isinstance(part, ast.Name):
            target = module.imports.get(part.id, (path, part.id))
            if target[1] is not None:
                found.append(target)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            target = module.imports.get(part.value.id)
            if target is not None and target[1] is None:
                found.append((target[0], part.attr))
    return found


def source_without_docstrings(statement):
    """The statement without docstrings and comments, written anew from its syntax tree."""
    statement = ast.parse(ast.unparse(statement))  # a copy: read_module caches the original
    for part in ast.walk(statement):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return ast.unparse(statement)


def reachable_code(script):
    """{"file:name": source} of every definition that the script's `trial` can reach.

    Names are followed through the files of this repository; docstrings and comments do not
    count. What cannot be seen this way is forbidden in code that decides: registries filled by
    decorators, patches from outside, eval, getattr on modules, and imports of this repository's
    files inside functions.
    """
    found = {}
    waiting = [(Path(script), "trial")]
    while waiting:
        path, name = waiting.pop()
        module = read_module(path)
        label = f"{path.name}:{name}"
        if name in module.imports:
            waiting.append(module.imports[name])
        elif name in module.definitions and label not in found:
            statements = module.definitions[name]
            found[label] = "\n".join(source_without_docstrings(one) for one in statements)
            for statement in statements:
                waiting.extend(referenced(statement, path, module))
    return found


def code_hash(script):
    """Eight hex digits of the code that the script's trial can reach."""
    return short_hash(json.dumps(reachable_code(script), sort_keys=True))


# %% 13 Records


CHECKPOINT_SECONDS = 60.0


def write_file(path, content):
    """Replace a file by these bytes wholly or not at all; a link stays one, mode and group stay.

    Raises OSError that names the file; no debris is left.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            kept = path.stat()
            os.chmod(temporary, kept.st_mode & 0o7777)
            with contextlib.suppress(OSError):  # only a member of the group may
                os.chown(temporary, -1, kept.st_gid)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every network share can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def plain_numbers(state):
    """The same lists and dicts with NumPy's numbers as Python's, which a file may hold."""
    if isinstance(state, dict):
        return {key: plain_numbers(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(plain_numbers(value) for value in state)
    return state.item() if isinstance(state, np.generic) else state


class Checkpoint:
    """The state of a trial in progress: tensors, numbers, texts, in lists and dicts."""

    def __init__(self, path):
        self.path = path
        self.saved = time.monotonic()

    def is_due(self):
        """Whether CHECKPOINT_SECONDS have passed since the last one, or since the start."""
        return time.monotonic() - self.saved > CHECKPOINT_SECONDS

    def save(self, state):
        """Replace the state."""
        buffer = io.BytesIO()
        torch.save({"key": self.path.stem, "state": plain_numbers(state)}, buffer)
        write_file(self.path, buffer.getvalue())
        self.saved = time.monotonic()

    def load(self):
        """The state, or None if there is none. A damaged one is reported and not used."""
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, weights_only=True)
            if saved["key"] != self.path.stem:  # another trial's
                raise ValueError
            return saved["state"]
        except Exception as error:  # torch raises many types for a cut or hostile file
            say_error(f"{self.path}: a damaged checkpoint ({type(error).__name__}), not used")
            return None

    def remove(self):
        """Forget the state of a finished trial."""
        self.path.unlink(missing_ok=True)


@dataclass
class Job:
    """Where a trial runs: a torch.device, and a Checkpoint."""

    device: torch.device
    checkpoint: Checkpoint


def write_record(path, result, meta):
    """Keep a finished trial: numbers, arrays and texts as npz, without pickle. Raises TypeError for
    anything else, OSError for a full disk."""
    arrays = {}
    for name, value in result.items():
        arrays[name] = np.asarray(value)
        if arrays[name].dtype == object:
            raise TypeError(f"trial: {name!r} is neither a number nor an array nor a text")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{"": np.array(json.dumps(meta))}, **arrays)
    write_file(path, buffer.getvalue())


def read_record(path):
    """(result, meta) of a finished trial; None if it is missing or damaged, which is reported."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("")))
        if meta["key"] != path.stem or not math.isfinite(meta["seconds"]):  # another trial's
            raise ValueError
        result = {name: x.item() if x.ndim == 0 else x for name, x in arrays.items()}
        return result, meta
    except Exception as error:  # numpy and zipfile raise many types for a cut or hostile file
        say_error(f"{path}: a damaged record ({type(error).__name__}), not used")
        return None


# %% 14 Runner

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GROUP_SECONDS = 30.0  # how long the processes of a group may take to meet
SILENCE_SECONDS = 60.0  # after which a process of a group counts as lost


class StoppedRunError(Exception):
    """A run that cannot go on: a process was lost, a trial failed, or a record has vanished."""


class Unit(NamedTuple):
    """What one process computes in one go: an arm with one seed, or with a batch of seeds."""

    arm: str
    settings: dict
    seeds: list
    paths: list


class Task(NamedTuple):
    """What a process needs to run units of a trial function."""

    trial: object
    batched: bool
    device: str
    threads: int
    files: dict  # {path: stamp} of the user's files, see file_stamps


def file_stamps(units):
    """{path: its time and size} of the user's files that enter these units."""
    values = [value for unit in units for value in unit.settings.values()]
    paths = {value.path for value in values if isinstance(value, InputFile)}
    return {path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths}


def leave_with_parent():
    """End this worker when the main process has ended, however that happened."""
    multiprocessing.parent_process().join()
    os._exit(1)


def leave_with_launcher(launcher):
    """End this process of a group when torchrun, whose child it is, was killed."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def processor_name():
    """The processor's name, or the architecture where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return os.uname().machine


def run_unit(task, unit):
    """Run a unit and keep its records; returns (results, CPU seconds per seed). Raises UsageError
    where memory is lacking."""
    torch.set_num_threads(task.threads)
    checkpoint = Checkpoint(unit.paths[0].with_suffix(".checkpoint"))
    job = Job(torch.device(task.device), checkpoint)
    config = argparse.Namespace(**unit.settings)
    started = time.process_time()
    try:
        if task.batched:
            results = task.trial(config, unit.seeds, job)
        else:
            results = [task.trial(config, unit.seeds[0], job)]
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not lacking and "allocate memory" not in str(error):
            raise
        raise UsageError(
            f"{unit.arm}: not enough memory; give smaller sizes or fewer --jobs"
        ) from None
    seconds = (time.process_time() - started) / len(unit.seeds)
    for path, stamp in file_stamps([unit]).items():
        if stamp != task.files.get(path, stamp):  # its records would stand for the old content
            raise StoppedRunError(f"{path}: changed since the run began; run again")
    release_freed_blocks()
    for seed, path, result in zip(unit.seeds, unit.paths, results, strict=True):
        meta = {
            "key": path.stem,
            "settings": unit.settings,
            "seed": seed,
            "seconds": seconds,
            "torch": torch.__version__,
            "processor": processor_name(),
        }
        write_record(path, result, meta)
    checkpoint.remove()
    return results, seconds


def count_cores():
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def show_warnings_only():
    """Under -W error a library's warning would end a run."""
    if sys.warnoptions:
        warnings.simplefilter("default")


def start_worker():
    """Runs first in every worker of a pool."""
    show_warnings_only()
    threading.Thread(target=leave_with_parent, daemon=True).start()


def run_in_pool(task, units, jobs, report):
    """Run units in `jobs` spawned processes. Raises what a trial raised, or StoppedRunError."""
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), start_worker
    )
    # workers inherit that Ctrl-C is blocked: it is for the main process alone
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        futures = {pool.submit(run_unit, task, unit): unit for unit in units}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        for future in concurrent.futures.as_completed(futures):
            report(futures[future], *future.result())
    except concurrent.futures.process.BrokenProcessPool:
        raise StoppedRunError(
            "a worker process was killed, or ran out of memory; if so, give fewer --jobs"
        ) from None
    pool.shutdown()


def unit_results(unit):
    """[(result, meta)] of a finished unit, one per seed; None if a record is missing."""
    records = [read_record(path) for path in unit.paths]
    return None if None in records else records


class Group:
    """The processes that torchrun started: they share units through its store.

    No shared disk is needed: the records go through the store to rank 0.
    """

    def __init__(self, store, rank, world):
        self.store = store
        self.rank = rank
        self.world = world
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=leave_with_launcher, args=[os.getppid()], daemon=True).start()
        if rank > 0:
            threading.Thread(target=self.show_life, daemon=True).start()

    def show_life(self):
        """Count up in the store until that has ended with rank 0."""
        with contextlib.suppress(RuntimeError):
            while True:
                self.store.add(f"alive/{self.rank}", 1)
                time.sleep(SILENCE_SECONDS / 12)

    def run(self, task, units, report):
        """Run all units; rank 0 then holds every record."""
        try:
            held = self.held_by_rank(units)
            self.send_held(units, held)
            self.compute_rest(task, units, held, report)
            if self.rank == 0:
                self.receive_rest(units, held, report)
            self.leave_together()
        except torch.distributed.DistError:  # of the store; a trial has none
            raise StoppedRunError("another process of the group has ended") from None

    def held_by_rank(self, units):
        """For each rank a list: whether it holds the records of each unit."""
        own = [unit_results(unit) is not None for unit in units]
        self.store.set(f"held/{self.rank}", json.dumps(own))
        return [json.loads(self.store.get(f"held/{rank}")) for rank in range(self.world)]

    def send_held(self, units, held):
        """Send the units of which this rank is the first to hold the records."""
        for i, unit in enumerate(units):
            holders = [rank for rank in range(self.world) if held[rank][i]]
            if holders and holders[0] == self.rank:
                self.send(i, unit)

    def compute_rest(self, task, units, held, report):
        """Compute units that no rank holds, each in one rank, and note them in held[rank]."""
        next_unit = self.store.add("next", 1) - 1
        while next_unit < len(units):
            if not any(of_rank[next_unit] for of_rank in held):
                unit = units[next_unit]
                outcome = run_unit(task, unit)
                self.send(next_unit, unit)
                held[self.rank][next_unit] = True
                report(unit, *outcome)
            next_unit = self.store.add("next", 1) - 1

    def receive_rest(self, units, held, report):
        """Receive the units that rank 0, this one, does not hold."""
        for i, unit in enumerate(units):
            if not held[0][i]:
                report(unit, *self.receive(i, unit))

    def leave_together(self):
        """Return when rank 0 holds all records; there, when all others have left."""
        if self.rank == 0:
            self.store.set("complete", b"")
        # the store lives in rank 0's process, which may still be receiving
        while not self.store.check(["complete"]):
            time.sleep(0.2)
        self.store.add("left", 1)
        end = time.monotonic() + SILENCE_SECONDS  # a rank may die once its last record is sent
        while self.rank == 0 and self.store.add("left", 0) < self.world and time.monotonic() < end:
            time.sleep(0.05)

    def send(self, i, unit):
        """Put the unit's records into the store; rank 0 holds them on disk."""
        if self.rank > 0:
            for part, path in enumerate(unit.paths):
                self.store.set(f"record/{i}/{part}", path.read_bytes())
            self.store.set(f"record/{i}", b"complete")

    def receive(self, i, unit):
        """(results, CPU seconds per seed) of a unit from another rank, whose records are kept.

        Raises StoppedRunError after SILENCE_SECONDS in which some rank showed no life.
        """
        seen = {}
        changed = time.monotonic()
        while not self.store.check([f"record/{i}"]):
            now = {rank: self.store.add(f"alive/{rank}", 0) for rank in range(1, self.world)}
            if all(now[rank] != seen.get(rank) for rank in now):
                seen = now
                changed = time.monotonic()
            if time.monotonic() - changed > SILENCE_SECONDS:
                raise StoppedRunError("another process of the group has ended")
            time.sleep(0.2)
        for part, path in enumerate(unit.paths):
            write_file(path, self.store.get(f"record/{i}/{part}"))
        records = unit_results(unit)
        return [result for result, _ in records], records[0][1]["seconds"]


def find_store(address, port):
    """Wait until something listens there. Raises OSError if nothing does for GROUP_SECONDS."""
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() - started > GROUP_SECONDS:
                raise
        time.sleep(0.1)


def join_group(identity):
    """The Group that the environment names, or None if it names none.

    identity: a text that only processes with the same command share. Raises UsageError for a
    group, named by torchrun or by what a launcher left behind, that cannot be formed.
    """
    found = {name: os.environ.get(name) for name in GROUP_VARIABLES}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return None
    fix = f"start with torchrun, or unset {', '.join(GROUP_VARIABLES)}"
    try:
        rank = int(found["RANK"])
        world = int(found["WORLD_SIZE"])
        usable = 0 <= rank < world and found["MASTER_ADDR"] and int(found["MASTER_PORT"]) > 0
    except (TypeError, ValueError):
        usable = False
    if not usable:
        settings = " ".join(f"{name}={value or ''}" for name, value in found.items())
        raise UsageError(f"{settings}: this names no group of processes; {fix}")

    import torch.distributed as dist

    patience = datetime.timedelta(seconds=GROUP_SECONDS)
    try:
        socket.getaddrinfo(found["MASTER_ADDR"], int(found["MASTER_PORT"]))
        if rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            find_store(found["MASTER_ADDR"], int(found["MASTER_PORT"]))
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives them
        store = dist.PrefixStore(f"gatebook/{identity}/{attempt}", store)
        store.add("joined", 1)
        started = time.monotonic()
        while store.add("joined", 0) < world:
            if time.monotonic() - started > GROUP_SECONDS:
                raise RuntimeError("too few have joined")
            time.sleep(0.05)
    except (RuntimeError, ValueError, OSError):
        raise UsageError(
            f"RANK={rank} WORLD_SIZE={world}: no group of {world} processes with this command "
            f"met within {GROUP_SECONDS:.0f} s; {fix}"
        ) from None
    return Group(store, rank, world)


def list_units(arms, seeds, few_seeds, folder, key, seeds_per_batch):
    """The Units of a run, arm by arm; few_seeds {arm: number of seeds}, where it is not all."""
    units = []
    for arm, settings in arms.items():
        own_seeds = seeds[: few_seeds.get(arm)]
        for start in range(0, len(own_seeds), seeds_per_batch):
            batch = own_seeds[start : start + seeds_per_batch]
            paths = []
            for seed in batch:
                text = json.dumps([settings, seed, key], sort_keys=True)
                paths.append(folder / f"{short_hash(text, 16)}.npz")
            units.append(Unit(arm, settings, batch, paths))
    return units


class Progress:
    """A bar on a terminal; elsewhere one line per finished unit, so that a job's log shows life."""

    def __init__(self, total, done, metric):
        from tqdm import tqdm

        self.total = total
        self.done = done
        self.metric = metric
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="trial") if terminal else None

    def report(self, unit, results, seconds):
        """Show a finished unit: its results, one per seed, and CPU seconds per seed."""
        self.done += len(unit.seeds)
        value = np.mean([result[self.metric] for result in results])
        if self.bar is not None:
            self.bar.update(len(unit.seeds))
            self.bar.set_postfix_str(f"{unit.arm}: {self.metric} {format_number(value)}")
            return
        seeds = ", ".join(str(seed) for seed in unit.seeds)
        say_error(
            f"{self.done}/{self.total} {unit.arm}, seed {seeds}: "
            f"{self.metric} {format_number(value)} ({seconds:.1f} CPU s)"
        )


class Run:
    """The finished trials of a run.

    arms          {name: all its settings}, the first is the baseline
    seeds         list
    across        {metric across arms: array [S]}, only if the run is whole
    is_whole      it has every arm of both tables
    is_of_record  it is whole, with the script's own seeds and no flag
    """

    def __init__(self, arms, seeds, results, tables, cpu_seconds):
        self.arms = arms
        self.seeds = seeds
        self.all_results = results
        self.cpu_seconds = cpu_seconds
        self.name_of = {settings_key(settings): name for name, settings in arms.items()}
        self.tables = tables
        self.across = {}
        self.is_whole = all(self.has(name) for name in tables)
        self.is_of_record = False

    def has(self, arm):
        """Whether the run has an arm with the settings that the tables give to this one."""
        return settings_key(self.tables[arm]) in self.name_of

    def shown_name(self, arm):
        """`arm` if the run has an arm of this name, else the one with its settings, or None."""
        if arm in self.arms:
            return arm
        return self.name_of.get(settings_key(self.tables[arm]))

    def shows(self, arm):
        """Whether the run has an arm of this name, or one with its settings."""
        return self.shown_name(arm) is not None

    def results(self, arm):
        """What the trial returned for an arm: a list, one dict per seed.

        `shown_name` says which arm of the run is meant.
        """
        return self.all_results[self.shown_name(arm)]

    def values(self, arm, metric):
        """A metric of an arm: [S], or [S, ...] for curves of equal length."""
        return np.array([result[metric] for result in self.results(arm)])


# %% 15 Figures

COLOURS = {"gating": "#0072B2", "softmax attention": "#D55E00", "GIN": "#009E73"}
MORE_COLOURS = (
    "#E69F00", "#882255", "#56B4E9", "#8C564B", "#332288", "#44AA99", "#CC79A7", "#999999",
    "#117733", "#AA4499", "#BCBD22", "#000000", "#FF6F91", "#6A5ACD",
)  # fmt: skip


def arm_colour(run, arm):
    """The arm's colour: the same in all figures of the experiment."""
    if arm in COLOURS:
        return COLOURS[arm]
    names = list(run.tables) if arm in run.tables else list(run.arms)
    others = [name for name in names if name not in COLOURS]
    return MORE_COLOURS[others.index(arm) % len(MORE_COLOURS)]


@functools.cache
def set_house_style():
    """Start from matplotlib's own defaults, whatever the user's settings are."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts that are missing
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
        {
            "figure.dpi": 130,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.formatter.min_exponent": 4,
            "legend.framealpha": 0.85,  # readable where it has to lie on curves
            "legend.edgecolor": "none",
        }
    )


def without_math(text):
    """The text with dollar signs escaped, between which matplotlib would read mathematics."""
    return text.replace("$", r"\$")


def new_figure(run, title, shows, rows=1, columns=1, width=8.0, height=4.5, **subplots):
    """(figure, its axes [rows, columns]) in the house style.

    title  the finding, a sentence; it is drawn for the entry of record only
    shows  what the figure shows, in words that hold for any run
    width, height  inches
    """
    set_house_style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    text = title if run.is_of_record else shows
    figure.suptitle(without_math(textwrap.fill(text, int(10.5 * width))), fontsize=12)
    figure.set_label(shows)  # the text for who cannot see it; the title stands in the picture
    return figure, axes


def draw_levels(draw_line, levels):
    """Draw numbers as lines: the first dashed, the second dotted, the third both.

    draw_line  an axis's axhline or axvline
    levels     {label: number}, or None
    """
    for (name, value), style in zip((levels or {}).items(), itertools.cycle(["--", ":", "-."])):
        draw_line(value, color="black", linestyle=style, linewidth=1, label=without_math(name))


def legend_below(axis, columns=1):
    """A legend under the axis, where it hides no data."""
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.21), "borderaxespad": 0}
    axis.legend(fontsize=9, ncols=columns, **place)


def draw_curves(run, metric, title, shows, x, y, *, panels=None, seeds=None, levels=None):
    """Curves [T] of a metric: every seed a thin line, the mean a thick one.

    x, y    what the axes show
    panels  {panel's title: [arms]} (default: one with all arms of the run)
    seeds   draw only so many seeds and no mean, where a mean would hide an oscillation
    levels  {label: number}: the notebook's numbers, thresholds of the rule
    Arms that the run lacks are left out; None if nothing is left.
    """
    panels = {"": list(run.arms)} if panels is None else panels
    present = {name: [arm for arm in arms if run.shows(arm)] for name, arms in panels.items()}
    present = {name: arms for name, arms in present.items() if arms}
    if not present:
        return None
    width = 4.2 * max(len(present), 2)
    if seeds is None:
        shows += "; thick: the mean"
    below = max(len(arms) for arms in present.values()) + len(levels or {})
    columns = 2 if len(present) == 1 else 1  # of the legend
    height = 3.3 + 0.2 * math.ceil(below / columns)
    figure, axes = new_figure(
        run, title, shows, columns=len(present), width=width, height=height, sharey=True
    )
    for axis, (panel, arms) in zip(axes[0], present.items(), strict=True):
        drawn = set()
        for arm in arms:
            curves = run.values(arm, metric)
            colour = arm_colour(run, arm)
            style = "--" if colour in drawn else "-"  # two arms may share a colour
            drawn.add(colour)
            for curve in curves[:seeds]:
                axis.plot(curve, style, color=colour, linewidth=0.8, alpha=0.6)
            if seeds is None:
                axis.plot(curves.mean(0), style, color=colour, linewidth=2)
            axis.plot([], [], style, color=colour, linewidth=2, label=without_math(arm))
        draw_levels(axis.axhline, levels)
        axis.set(title=without_math(panel), xlabel=x)
        legend_below(axis, columns)
    axes[0, 0].set_ylabel(y)
    return figure


def draw_points(run, metric, title, shows, x, arms=None, levels=None, scale="linear"):
    """A metric of many arms, sorted: every seed a dot, the mean a bar; arms default to all.

    levels  {label: number}: the notebook's number dashed, the rule's threshold dotted
    scale   "linear" or "log"
    """
    arms = list(run.arms) if arms is None else [arm for arm in arms if run.shows(arm)]
    if not arms:
        return None
    arms = sorted(arms, key=lambda arm: run.values(arm, metric).mean())
    figure, axes = new_figure(run, title, shows, width=8.0, height=0.25 * len(arms) + 1.6)
    axis = axes[0, 0]
    for row, arm in enumerate(arms):
        values = run.values(arm, metric)
        colour = arm_colour(run, arm)
        axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=5)
        axis.plot(values.mean(), row, "|", color="black", markersize=16, markeredgewidth=2.5)
    axis.set(xlabel=x, yticks=range(len(arms)), xscale=scale, ylim=(len(arms) - 0.5, -0.5))
    axis.set_yticklabels([without_math(arm) for arm in arms])
    draw_levels(axis.axvline, levels)
    if levels:
        axis.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure


# %% 16 Logbook

NOTEBOOKS = {  # their sections in order
    "graph notebook": (
        "opening", "content attention", "next actions", "6/3", "8.3", "9.3", "10.3", "13/3",
        "14.3", "15.3", "24.3", "11/4", "12/4", "13/4",
    ),
    "attention notebook": ("speed", "bugs", "ablations", "later"),
    "logic journal": (
        "simple version", "trainable gates", "fixed sparse weights", "predictions",
        "relu but gate activation", "only one is relu", "learning rate", "lesser gate", "48 x 20",
        "48 x 48", "blow-up", "regulariser",
    ),
    "question-answering notebook": ("clean-up", "visualisations", "structuring", "pretraining"),
}  # fmt: skip
INDEX = "<!-- index -->"
END_OF_INDEX = "<!-- /index -->"
ENTRIES = "<!-- entries -->"
OTHER_RUNS = "<!-- other runs -->"
APPENDIX = "<!-- appendix -->"
END_OF_APPENDIX = "<!-- /appendix -->"
MARKERS = (INDEX, END_OF_INDEX, ENTRIES, OTHER_RUNS, APPENDIX, END_OF_APPENDIX)  # in this order
CLAIM_COLUMNS = ["notebook", "source", "claim", "verdict", "measured"]
EMPTY_LOGBOOK = "# Logbook\n\n" + "\n".join(MARKERS) + "\n"
EMPTY_LOGBOOK = EMPTY_LOGBOOK.replace(OTHER_RUNS, f"{OTHER_RUNS}\n# Other runs\n")
ENTRY = re.compile(
    r'<!-- entry (?P<id>[\w-]+) --><a id="(?P=id)"></a>\n(?P<words>.*?)'
    r"<!-- results (?P=id): code (?P<code>\w+), numbers (?P<numbers>\w+)"
    r"(?:, words (?P<before>\w+))? -->\n(?P<results>.*?)<!-- /results -->\n",
    re.DOTALL,
)


def escape_cell(text):
    """Text as one line that cannot end a table cell, open a comment or a heading."""
    text = " ".join(str(text).split())
    return text.replace("|", "&#124;").replace("<", "&lt;")


def read_doc(script):
    """{"Question": ..., "Notebook": ..., "Setup": ..., ...} of a script's docstring."""
    doc = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")))
    lines = doc.splitlines()
    parts = {"Question": lines[:1]}
    name = "Question"
    for line in lines[1:]:
        if line and not line.startswith(" "):
            name, _, line = line.partition(" ")
            parts[name] = []
        parts[name].append(line)
    return {name: join_lines(lines) for name, lines in parts.items()}


def join_lines(lines):
    """Markdown of a part of a docstring: one line per paragraph and per item of a list."""
    joined = []
    for line in lines:
        words = line.strip()
        is_item = words.startswith("- ")
        if not joined or not words or is_item or not joined[-1]:
            joined.append(words)
        elif joined[-1].startswith("- ") and not line.startswith(" " * 14):  # after a list
            joined += ["", words]
        else:
            joined[-1] += f" {words}"
    return "\n".join(joined).strip()


def is_part_of(term, columns):
    """Whether a term stands in the name of a column."""
    return any(term in column.lower() for column in columns)


def defined_columns(rule, columns):
    """The definitions in a Rule, "Late score: its mean ...", whose term is part of a column."""
    found = []
    for clause in re.split(r"(?<=[.;])\s+", rule):
        terms, colon, _ = clause.partition(":")
        if colon and any(is_part_of(term, columns) for term in terms.lower().split(" and ")):
            sentence = clause.rstrip(".;") + "."
            found.append(sentence[0].upper() + sentence[1:])
    return " ".join(found)


def find_entries(text):
    """Matches of ENTRY, in order."""
    return list(ENTRY.finditer(text))


def read_logbook(path):
    """The log as text, an empty one if there is none. Raises UsageError if it is damaged."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device may never end
        raise UsageError(f"--logbook {path}: is no regular file; name another")
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        return EMPTY_LOGBOOK
    except OSError as error:
        raise UsageError(f"--logbook {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"--logbook {path}: not UTF-8; name another file") from None
    if text and not text.endswith("\n"):  # some editors drop the last line end
        text += "\n"
    if re.search(r"^(<{7}|>{7}|\|{7})( |$)", text, re.MULTILINE):
        raise UsageError(f"--logbook {path}: it has merge markers; resolve the merge first")
    if not has_sound_markers(text):
        raise UsageError(f"--logbook {path}: its markers are damaged; restore it, or name another")
    return text


def has_sound_markers(text):
    """Whether all markers stand in their order, each once, none of them within an entry, and
    all entries within the two parts that hold entries."""
    entries = find_entries(text)
    places = [text.find(f"{marker}\n") for marker in MARKERS]
    if -1 in places or places != sorted(places):
        return False
    if any(text.count(marker) != 1 for marker in MARKERS):
        return False
    if not text.count("<!-- entry ") == text.count("<!-- /results -->") == len(entries):
        return False
    if len({entry["id"] for entry in entries}) != len(entries):
        return False
    _, _, first, other_runs, last, _ = places
    for entry in entries:
        of_record = first < entry.start() and entry.end() <= other_runs
        other = other_runs < entry.start() and entry.end() <= last
        if not of_record and not other:
            return False
    return True


def results_table(run, columns, rows):
    """Mean ± half the 95% interval of each column's metric, one row per arm."""
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in rows:
        cells = []
        for metric in columns:
            found = mean_interval(run.values(arm, metric))
            half = format_half_width(found)
            shown = format_number(found.estimate)
            cells.append(f"{shown} ± {half}" if half else shown)
        lines.append(f"| {escape_cell(arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table(head, judged):
    """Claims with verdict and measurement; judged: [(claim, verdict, [Measurement])]."""
    lines = [f"| {head} | verdict | measured |", "|---|---|---|"]
    for claim, verdict, measured in judged:
        source = "" if claim.source == OURS else f" ({claim.source})"
        text = escape_cell(claim.text + source)
        lines.append(f"| {text} | {verdict} | {escape_cell(brief(measured))} |")
    return "\n".join(lines)


def count_in_words(verdict, texts, name_all):
    """How many claims have a verdict, and which: all of them, or only if it is not the expected."""
    words = f"{len(texts)} {'is' if len(texts) == 1 else 'are'} {verdict}"
    if name_all or verdict not in VERDICTS["holds"]:
        words += f" ({'; '.join(texts)})"
    return words


def conclude(judged):
    """A sentence on the notebook's claims and one on ours, made of the verdicts.

    judged: [(claim, verdict, [Measurement])]. A single claim is named, few claims all, of more only
    those with another verdict than expected.
    """
    sentences = []
    for ours, one, several in (
        (False, "statement of the notebook", "statements of the notebook"),
        (True, "claim of ours", "claims of ours"),
    ):
        texts = {}  # {verdict: [claims]}
        for claim, verdict, _ in judged:
            if (claim.source == OURS) == ours:
                texts.setdefault(verdict, []).append(claim.text.rstrip("."))
        total = sum(len(alike) for alike in texts.values())
        if total == 1:
            verdict, alike = next(iter(texts.items()))
            sentences.append(f"The {one} is {verdict} ({alike[0]}).")
        elif total > 1:
            name_all = len(judged) <= 8
            parts = [count_in_words(verdict, alike, name_all) for verdict, alike in texts.items()]
            sentences.append(f"Of {total} {several} {', '.join(parts)}.")
    return " ".join(sentences) or "No claim was judged."


def missing_for(claims, run, given):
    """What the flags or arms are that unjudged claims need, in words."""
    flags = []
    arms = []
    for claim in claims:
        reads_all = any(not check.arms() for check in claim.checks)
        for name in run.tables if reads_all else claim.arms():
            settings = run.tables[name]
            other = [key for key in given if settings[key] not in given[key]]
            flags += [f"{flag_name(key)} {show_setting(settings[key])}" for key in other]
            if not other and not run.has(name):
                arms.append(f"'{name}'")
    needed = list(dict.fromkeys(flags or arms))
    shown = ", ".join(needed[:6]) + (" ..." if len(needed) > 6 else "")
    return shown if flags else f"--arms {shown}"


def read_commit():
    """The commit of this repository, marked if the code has changed since; "unknown" if git
    does not say, or speaks of another repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *words],
            capture_output=True, text=True, timeout=20, check=True, env=environment,
        ).stdout.strip()  # fmt: skip

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return "unknown"
        changed = git("status", "--porcelain", "--", "core.py", "exp_*.py")
        return git("rev-parse", "--short=8", "HEAD") + (" with changes" if changed else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"


UNSHOWN_FLAGS = ("--note", "--logbook", "--plots", "--runs", "--jobs")  # each with a value


def shown_command(script, argv):
    """The command line without what does not decide a number."""
    words = []
    skip_next = False
    for word in argv:
        name, has_value, _ = word.partition("=")
        if skip_next:
            skip_next = False
        elif name in UNSHOWN_FLAGS:
            skip_next = not has_value
        elif name != "--fresh":
            words.append(word)
    return escape_cell(shlex.join(["python", script.name, *words])).replace("`", "'")


def relative_link(path, logbook):
    """A Markdown link target from the logbook to a file, whatever letters its folders have."""
    folder = os.path.dirname(os.path.realpath(logbook))
    return urllib.parse.quote(os.fsencode(os.path.relpath(os.path.realpath(path), folder)))


def file_of_link(text, logbook):
    """The file that a link of the logbook leads to."""
    folder = os.path.dirname(os.path.realpath(logbook))
    name = os.fsdecode(urllib.parse.unquote_to_bytes(text)).replace("\0", "")  # in no file's name
    return Path(os.path.realpath(os.path.join(folder, name)))


def csv_bytes(columns, rows):
    """Rows {column: value} as CSV; empty where a row lacks a column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def arms_csv(run):
    """Every arm, seed and number of a run as CSV, one row per trial."""
    rows = []
    for arm in run.arms:
        for seed, result in zip(run.seeds, run.results(arm), strict=False):  # may have fewer seeds
            numbers = {k: f"{x:.6g}" for k, x in result.items() if isinstance(x, float | int)}
            rows.append({"arm": arm, "seed": seed} | numbers)
    return csv_bytes(dict.fromkeys(itertools.chain(*rows)), rows)


def count_verdicts(rows):
    """The rows' verdicts, counted, in words."""
    counts = collections.Counter(row["verdict"] for row in rows)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "–"


def appendix_table(notebook, found):
    """Lines of one notebook's verdicts by section, in its order; found: [(row, entry)]."""
    sections = NOTEBOOKS.get(notebook, ())

    def place_in_notebook(item):
        first = item[0]["source"].split(",")[0].strip()
        return sections.index(first) if first in sections else len(sections)

    entries = {}  # {section: {entry: its rows}}
    for row, entry in sorted(found, key=place_in_notebook):
        entries.setdefault(row["source"], {}).setdefault(entry, []).append(row)
    lines = [f"## {escape_cell(notebook.capitalize())}", ""]
    lines += ["| section | verdicts |", "|---|---|"]
    for section, rows in entries.items():
        verdicts = [f"[{entry}](#{entry}) {count_verdicts(found)}" for entry, found in rows.items()]
        lines.append(f"| {escape_cell(section)} | {'; '.join(verdicts)} |")
    return [*lines, ""]


def read_claims(results, logbook):
    """Rows of the claims file that an entry links to; none if it is missing or damaged."""
    found = re.search(r"\[all claims\]\(([^)]+)\)", results)
    if found is None:
        return []
    path = file_of_link(found[1], logbook)
    verdicts = {verdict for pair in VERDICTS.values() for verdict in pair}
    try:
        if not path.is_file():
            return []
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if set(row) != set(CLAIM_COLUMNS) or row["verdict"] not in verdicts:
                raise ValueError
    except (OSError, ValueError, csv.Error):
        say_error(f"{path}: a damaged table of claims, left out of the index")
        return []
    return rows


def replace_between(text, start, end, content):
    """The text with new content between two markers."""
    before = text[: text.index(start) + len(start)]
    after = text[text.index(end) :]
    return f"{before}\n{content}\n{after}"


def write_index(text, logbook):
    """The log with index and appendix made anew from its entries and their CSV files."""
    index = ["| entry | notebook | ours | date |", "|---|---|---|---|"]
    claims = {notebook: [] for notebook in NOTEBOOKS}
    records = text[: text.index(OTHER_RUNS)]
    for entry in find_entries(records):
        heading = re.search(r"^## (.+)$", entry["words"], re.MULTILINE)
        title = heading[1].replace("|", "&#124;") if heading else entry["id"]
        title = f"[{title}](#{entry['id']})"
        date = re.search(r"\d{4}-\d\d-\d\d", entry["results"])
        rows = read_claims(entry["results"], logbook)
        counts = [
            count_verdicts(row for row in rows if (row["source"] == OURS) == ours)
            for ours in (False, True)
        ]
        index.append(f"| {title} | {counts[0]} | {counts[1]} | {date[0] if date else ''} |")
        for row in rows:
            if row["source"] != OURS:
                claims.setdefault(row["notebook"], []).append((row, entry["id"]))
    appendix = ["# Appendix: the notebooks' statements by section", ""]
    for notebook, found in claims.items():
        if found:
            appendix += appendix_table(notebook, found)
    text = replace_between(text, INDEX, END_OF_INDEX, "\n".join(index))
    return replace_between(text, APPENDIX, END_OF_APPENDIX, "\n".join(appendix))


class Entry(NamedTuple):
    """What a run adds to the log: identity, words for the first time, results, hashes."""

    id: str
    of_record: bool
    heading: str
    conclusion: str
    results: str
    code: str
    numbers: str


def entry_text(entry, old, note):
    """The entry with its markers; of an `old` one the words stay, but for an explicit note.

    The results marker keeps the hash of the words as they stood when the numbers last changed:
    `status` asks to read the words again as long as it is theirs.
    """
    if old is None:
        words = f"## {entry.heading}\n\n**Conclusion.** {entry.conclusion}\n\n"
        before = None
    else:
        words = old["words"]
        if note is not None:
            conclusion = f"**Conclusion.** {entry.conclusion}"
            pattern = re.compile(r"\*\*Conclusion\.\*\*.*?(?=\n\n|\n*\Z)", re.DOTALL)
            words, found = pattern.subn(lambda _: conclusion, words, count=1)
            if not found:
                words = f"{words}{conclusion}\n\n"
        before = old["before"]
        if old["numbers"] != entry.numbers:
            before = short_hash(old["words"])
        if before != short_hash(words):
            before = None
    marker = f"<!-- results {entry.id}: code {entry.code}, numbers {entry.numbers}"
    marker += f", words {before} -->" if before else " -->"
    head = f'<!-- entry {entry.id} --><a id="{entry.id}"></a>\n'
    return f"{head}{words}{marker}\n{entry.results}\n<!-- /results -->\n"


def update_logbook(logbook, entry, note=None):
    """Add the entry, or replace its results and leave its words; returns the old results.

    The folder is locked meanwhile, and the file replaced as a whole, so that neither a kill
    nor other writers lose anything. Raises UsageError for a damaged log, OSError for a full disk.
    """
    path = Path(os.path.realpath(logbook))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        raw = path.read_bytes() if path.exists() else b""
        text = read_logbook(path)
        old = next((one for one in find_entries(text) if one["id"] == entry.id), None)
        block = entry_text(entry, old, note)
        if old is not None:
            text = text[: old.start()] + block + text[old.end() :]
        else:
            where = text.index(OTHER_RUNS if entry.of_record else APPENDIX)
            text = f"{text[:where]}{block}\n{text[where:]}"
        content = write_index(text, path).encode()
        if b"\r\n" in raw:
            content = content.replace(b"\n", b"\r\n")
        if raw.startswith(b"\xef\xbb\xbf"):
            content = b"\xef\xbb\xbf" + content
        write_file(path, content)
        return old["results"] if old else ""
    finally:
        os.close(folder)


def status(logbook=REPOSITORY / "logbook.md"):
    """Print the scripts whose entry is missing, older than their trial's code or their docstring,
    or whose words are older than their numbers."""
    scripts = sorted(REPOSITORY.glob("exp_*.py"))
    current = 0
    entries = {entry["id"]: entry for entry in find_entries(read_logbook(logbook))}
    for script in scripts:
        name = script.stem.removeprefix("exp_")
        entry = entries.get(name)
        if entry is None:
            say(f"{name}: no entry; run python {script.name}")
        elif entry["code"] != code_hash(script):
            say(f"{name}: the trial's code has changed since its entry; run python {script.name}")
        elif f"**Setup.** {read_doc(script)['Setup']}\n" not in entry["results"]:
            say(f"{name}: its docstring's Setup has changed since; run python {script.name}")
        elif entry["before"] == short_hash(entry["words"]):
            say(f"{name}: numbers changed after its words were written; read them again, edit them"
                " or delete ', words ...' from its results marker")  # fmt: skip
        else:
            current += 1
    say(f"{current} of {len(scripts)} entries are up to date")


# %% 17 Main


@dataclass
class Experiment:
    """What a script gives to `main`, and what the command line says."""

    script: Path
    trial: object
    claims: list
    plot: object
    columns: list
    seeds_per_batch: int
    timing: bool
    rows: list
    options: argparse.Namespace
    given: dict
    argv: list

    @property
    def name(self):
        """exp_NAME.py -> "NAME"."""
        return self.script.stem.removeprefix("exp_")


class Outcome(NamedTuple):
    """What a run found: table, [(claim, verdict, [Measurement])], a line on the claims that it
    does not judge, and the conclusion."""

    table: str
    judged: list
    not_judged: str
    sentence: str


def end_with_line(code, message):
    """One line on stderr, the end of all workers, then of this process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # this is the end already
    say_error(message)
    for worker in multiprocessing.active_children():
        worker.kill()
    raise SystemExit(code)


@contextlib.contextmanager
def one_line_errors(name):
    """End with one line and an exit status for what is no fault of the code."""
    kept = "; finished trials are kept for the next run"
    try:
        yield
    except UsageError as error:
        end_with_line(2, f"{name}: {error}")
    except KeyboardInterrupt:
        end_with_line(130, f"{name}: interrupted{kept}")
    except StoppedRunError as error:
        end_with_line(1, f"{name}: {error}{kept}")
    except OSError as error:
        end_with_line(1, f"{name}: {error.filename or 'a file'}: {error.strerror or error}{kept}")


def check_names(table, base, tiny, claims):
    """Raise ValueError for a setting or an arm that does not exist: a mistake in the script."""
    for name, row in {**table, "TINY": tiny}.items():
        for key in row:
            if key not in base:
                raise ValueError(f"{name}: there is no flag {flag_name(key)}")
    for claim in claims:
        for arm in claim.arms():
            if arm not in table:
                raise ValueError(f"{claim.text}: there is no arm {arm!r}")


def check_machine(options, timing):
    """Set device and jobs. Raises UsageError for what this machine does not have."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UsageError("--device cuda: torch sees no GPU here; give --device cpu")
    if options.device == "auto":
        options.device = "cuda" if has_gpu else "cpu"
    if options.threads > count_cores():
        raise UsageError(
            f"--threads {options.threads}: this machine has {count_cores()} cores; give no more"
        )
    if options.jobs is None:
        alone = options.smoke or timing or options.device == "cuda"
        options.jobs = 1 if alone else max(1, count_cores() // options.threads)
    if timing and options.jobs > 1:
        raise UsageError(f"--jobs {options.jobs}: this script measures time; give --jobs 1")
    if options.jobs > 4 * count_cores():
        raise UsageError(
            f"--jobs {options.jobs}: give at most {4 * count_cores()}, four for each core"
        )


def check_places(options, name):
    """Raise UsageError unless everything of the experiment can be written where it shall go."""
    places = [("--runs", options.runs / name)]
    if not options.no_log:
        read_logbook(options.logbook)
        if options.logbook.exists() and not os.access(options.logbook, os.W_OK):
            raise UsageError(f"--logbook {options.logbook}: read-only; make it writable")
        places += [
            ("--plots", options.plots),
            ("--logbook", Path(os.path.realpath(options.logbook)).parent),
        ]
    for flag, folder in places:
        probe = folder / f".writable.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # another machine's process may have the same number
        except OSError as error:
            raise UsageError(
                f"{flag} {folder}: cannot write there ({error.strerror}); choose another place"
            ) from None


def count_noun(n, one, several):
    """A number with its noun."""
    return f"{n} {one if n == 1 else several}"


def report_nothing(unit, results, seconds):
    """The report of a process that shows nothing."""


def compute(experiment, units, group):
    """Compute what is missing of the units, in this process, a pool or a group."""
    options = experiment.options
    batched = experiment.seeds_per_batch > 1
    task = Task(experiment.trial, batched, options.device, options.threads, file_stamps(units))
    waiting = [unit for unit in units if unit_results(unit) is None]
    total = sum(len(unit.seeds) for unit in units)
    done = total - sum(len(unit.seeds) for unit in waiting)
    jobs = min(options.jobs, max(1, len(waiting)))
    report = report_nothing
    if group is None or group.rank == 0:
        processes = count_noun(jobs if group is None else group.world, "process", "processes")
        trials = count_noun(total, "trial", "trials")
        say_error(f"{experiment.name}: {trials}, {done} finished before, {processes}")
        report = Progress(total, done, experiment.columns[0]).report
    if group is not None:
        group.run(task, units, report)
    elif jobs > 1:
        run_in_pool(task, waiting, jobs, report)
    else:
        for unit in waiting:
            report(unit, *run_unit(task, unit))


def collect(units, seeds, tables):
    """The Run made of finished units. Raises StoppedRunError if a record has vanished."""
    arms = {}
    results = {}
    cpu_seconds = 0.0
    for unit in units:
        records = unit_results(unit)
        if records is None:
            raise StoppedRunError(f"{unit.arm}: its record is gone; does another run use --fresh?")
        arms[unit.arm] = unit.settings
        results.setdefault(unit.arm, []).extend(result for result, _ in records)
        cpu_seconds += sum(meta["seconds"] for _, meta in records)
    return Run(arms, seeds, results, tables, cpu_seconds)


def run_trials(experiment, arms, few_seeds, tables):
    """The Run of these arms; None in a process of a group that is not its first.

    few_seeds  {arm: number of seeds}, where it is not all
    tables     {arm: all its settings} of ARMS and ABLATIONS
    Raises UsageError, StoppedRunError and OSError; a trial's error goes to a file in --runs.
    """
    options = experiment.options
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    code = code_hash(experiment.script)
    key = [code, options.device, options.threads]
    if experiment.timing:
        key.append(processor_name())
    folder = options.runs / experiment.name
    folder.mkdir(exist_ok=True)
    units = list_units(arms, seeds, few_seeds, folder, key, experiment.seeds_per_batch)
    group = join_group(short_hash(json.dumps([experiment.name, key, arms, seeds])))
    if experiment.timing and group is not None:
        raise UsageError("this script measures time; start it without torchrun")
    if options.fresh:
        for path in [path for unit in units for path in unit.paths]:
            path.unlink(missing_ok=True)
            path.with_suffix(".checkpoint").unlink(missing_ok=True)
    try:
        compute(experiment, units, group)
    except (UsageError, StoppedRunError, OSError):
        raise
    except (Exception, SystemExit) as error:
        if options.smoke:
            raise
        path = folder / "error.txt"
        with contextlib.suppress(OSError):
            write_file(path, "".join(traceback.format_exception(error)).encode())
        raise StoppedRunError(f"a trial failed: {error!r} (traceback in {path})") from None
    if group is not None and group.rank > 0:
        return None
    return collect(units, seeds, tables)


def draw_figures(experiment, run):
    """{name with suffix: (content, alt text or None)} of what plot(run) returns."""
    files = {}
    for name, item in experiment.plot(run).items():
        if isinstance(item, str):
            files[name] = (item.encode(), None)
        elif item is not None:
            png = io.BytesIO()
            item.savefig(png, format="png")
            files[f"{name}.png"] = (png.getvalue(), item.get_label())
    return files


def remove_stale(experiment, identity, old_results, links):
    """Delete files that the old results of this entry showed and the new ones do not."""
    options = experiment.options
    current = [text for text, _ in links.values()]
    for text in re.findall(r"\]\(([^)]+)\)", old_results):
        path = file_of_link(text, options.logbook)
        mine = path.name.startswith(f"{identity}-") and path.parent == options.plots.resolve()
        if mine and text not in current:
            path.unlink(missing_ok=True)


def settings_words(experiment, run):
    """Settings, arms and seeds of a run, in words."""
    words = []
    for key, values in experiment.given.items():
        shown = ", ".join(show_setting(value) for value in values)
        words.append(f"{key.replace('_', ' ')} {shown}")
    arms = experiment.options.arms
    if arms is not None:
        words.append(f"arms {'; '.join(arms)}")
    first, last = run.seeds[0], run.seeds[-1]
    words.append(f"seed {first}" if first == last else f"seeds {first} to {last}")
    return ", ".join(words)


def seeds_words(run):
    """How many seeds the arms have, in words."""
    n = len(run.seeds)
    words = f"{n} paired seeds" if n > 1 else "1 seed"
    fewer = {len(run.results(arm)) for arm in run.arms} - {n}
    if not fewer:
        return words
    numbers = " or ".join(str(number) for number in sorted(fewer, reverse=True))
    return f"{words}, {numbers} in some arms"


def results_text(experiment, run, outcome, links):
    """The part of an entry that the script writes; links: {file: (target, alt text or None)}."""
    doc = read_doc(experiment.script)
    processor = escape_cell(processor_name().replace("(R)", ""))
    minutes = round(run.cpu_seconds / 60)
    facts = [
        f"`{shown_command(experiment.script, experiment.argv)}`",
        str(datetime.date.today()),
        seeds_words(run),
        f"{minutes if minutes >= 1 else 'under 1'} CPU-min",
        f"commit {read_commit()}",
        f"{processor}, torch {torch.__version__.partition('+')[0]}",
    ]
    source = "" if doc["Notebook"] == "none" else f" ({doc['Notebook']})"
    parts = [" · ".join(facts), f"**Question.** {doc['Question']}{source}"]
    if run.is_of_record:
        columns = defined_columns(doc["Rule"], experiment.columns)
        parts.append(f"**Setup.** {doc['Setup']}")
        if columns:
            parts.append(f"**Columns.** {columns}")
    else:
        parts.append(f"**Settings.** {escape_cell(settings_words(experiment, run))}.")
    parts.append(outcome.table)
    for path, alt in links.values():
        if alt is not None:
            parts.append(f"![{escape_cell(alt)}]({path})")
    for ours, head in ((False, "the notebook says"), (True, "ours")):
        found = [item for item in outcome.judged if (item[0].source == OURS) == ours]
        if found:
            parts.append(claims_table(head, found))
    if outcome.not_judged:
        parts.append(escape_cell(outcome.not_judged))
    names = {"arms.csv": "all arms and seeds", "claims.csv": "all claims"}
    data = [f"[{names.get(n, n)}]({path})" for n, (path, alt) in links.items() if alt is None]
    rule = relative_link(experiment.script, experiment.options.logbook)
    data.append(f"[rule]({rule})")
    parts.append(f"**Data.** {', '.join(data)}.")
    return "\n\n".join(parts)


def write_entry(experiment, run, outcome, files):
    """Write figures, CSV files and the entry; returns where it stands, in words."""
    options = experiment.options
    doc = read_doc(experiment.script)
    identity = experiment.name
    heading = doc["Question"]
    if not run.is_of_record:
        settings = [sorted(settings_key(one) for one in run.arms.values()), run.seeds]
        identity += f"-{short_hash(json.dumps(settings))}"
        heading += f" ({settings_words(experiment, run)})"
    notebook = doc["Notebook"].partition(":")[0]
    rows = []
    for claim, verdict, measured in outcome.judged:
        values = (notebook, claim.source, claim.text, verdict, list_measured(measured))
        rows.append(dict(zip(CLAIM_COLUMNS, values, strict=True)))
    claims = csv_bytes(CLAIM_COLUMNS, rows)
    files = files | {"arms.csv": (arms_csv(run), None), "claims.csv": (claims, None)}
    links = {}
    for name, (content, alt) in files.items():
        path = options.plots / f"{identity}-{name}"
        write_file(path, content)
        links[name] = (relative_link(path, options.logbook), alt)

    entry = Entry(
        identity,
        run.is_of_record,
        escape_cell(heading),
        escape_cell(outcome.sentence),
        results_text(experiment, run, outcome, links),
        code_hash(experiment.script),
        short_hash(outcome.table + claims.decode()),
    )
    old_results = update_logbook(options.logbook, entry, options.note)
    remove_stale(experiment, identity, old_results, links)
    return f"entry {identity} in {options.logbook}"


def conclude_run(experiment, run):
    """Judge, draw, write the entry, and say what came out."""
    options = experiment.options
    judged = []
    unjudged = []
    for claim in experiment.claims:
        if claim.can_be_judged(run):
            judged.append((claim, *claim.judge(run)))
        else:
            unjudged.append(claim)
    rows = experiment.rows
    if rows is None or not run.is_of_record:
        rows = list(run.arms)[:9]
    not_judged = ""
    if unjudged:
        needed = missing_for(unjudged, run, experiment.given)
        counted = "1 claim is" if len(unjudged) == 1 else f"{len(unjudged)} claims are"
        not_judged = f"{counted} not judged by this run; needed: {needed}."
    outcome = Outcome(
        results_table(run, experiment.columns, rows),
        judged,
        not_judged,
        conclude(judged) if options.note is None else " ".join(options.note.split()),
    )
    files = draw_figures(experiment, run)
    written = ""
    if options.smoke:  # the text is made all the same, so that a smoke run tests it
        results_text(experiment, run, outcome, {})
        written = "a smoke run: its sizes are too small for a verdict"
    elif not options.no_log:
        written = write_entry(experiment, run, outcome, files)

    say(f"\n{outcome.table}\n")
    for claim, verdict, measured in judged:
        said = "measured" if options.smoke else verdict
        say(f"{said}: {claim.text} [{claim.source}; {brief(measured)}]")
    sentence = "" if options.smoke else f"\n{outcome.sentence}"
    for line in (not_judged, written, sentence):
        if line:
            say(line)


def count_few_seeds(parser, ablations, options):
    """{arm: number of seeds} where it has fewer than the run."""
    few = {}
    if parser.ablation_seeds is not None:
        few = dict.fromkeys(ablations, 1 if options.smoke else parser.ablation_seeds)
    if options.smoke:
        return few
    if options.seeds != parser.get_default("seeds"):
        return {}
    return few | (parser.few_seeds or {})


def is_bare_command(parser, given, options):
    """Whether nothing that changes the numbers was given: the run is an entry of record's."""
    if given or options.arms is not None or options.smoke:
        return False
    names = ("seeds", "first_seed", "threads", "device")
    return all(getattr(options, name) == parser.get_default(name) for name in names)


def main(
    parser,
    arms,
    ablations,
    trial,
    claims,
    plot,
    columns,
    tiny,
    *,
    across=None,
    seeds_per_batch=1,
    timing=False,
    rows=None,
    argv=None,
):
    """Run an experiment from the command line: trials, verdicts, figures, entry.

    arms, ablations  {name: settings that differ from the flags' defaults}
    trial            trial(config, seed, job) -> {metric: number, array or text}
    claims           Claims; plot(run) -> {name: Figure or None, "name.suffix": text}
    columns          metrics of the entry's table, the main one first
    tiny             settings of --smoke
    across           across(run) -> {metric: array [S]}, metrics over several arms
    seeds_per_batch  more than 1: trial(config, seeds, job) -> list, for several seeds at once
    timing           one process; the processor is part of a trial's key
    rows             arms of the entry's table (default: the first nine)

    Exits with 2 for a mistake of the user's, 1 for a lost process or a full disk, 130 for
    Ctrl-C; finished trials are kept in all cases. Raises ValueError for a setting or an arm of the
    script that does not exist.
    """
    show_warnings_only()
    argv = sys.argv[1:] if argv is None else argv
    parser.epilog = "rows for --arms:\n  " + "\n  ".join(arms | ablations)
    options, base, given = parse(parser, argv)
    check_names(arms | ablations, base, tiny, claims)
    is_bare = is_bare_command(parser, given, options)
    few_seeds = count_few_seeds(parser, ablations, options)
    script = Path(trial.__code__.co_filename).resolve()
    experiment = Experiment(
        script=script,
        trial=trial,
        claims=claims,
        plot=plot,
        columns=columns,
        seeds_per_batch=seeds_per_batch,
        timing=timing,
        rows=rows,
        options=options,
        given=given,
        argv=argv,
    )
    if options.smoke:
        tiny = {key: value for key, value in tiny.items() if key not in given}
        arms = {name: row | tiny for name, row in arms.items()}
        ablations = {name: row | tiny for name, row in ablations.items()}
        options.seeds = min(options.seeds, 2)
    if signal.getsignal(signal.SIGINT) is leave_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with one_line_errors(script.name), contextlib.ExitStack() as stack:
        chosen = choose_arms(arms, ablations, base, given, options)
        check_machine(options, timing)
        if options.smoke:
            options.runs = Path(
                stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            )
        else:
            check_places(options, experiment.name)
        tables = {name: base | row for name, row in (arms | ablations).items()}
        run = run_trials(experiment, chosen, few_seeds, tables)
        if run is not None:
            run.is_of_record = is_bare
            if across is not None and run.is_whole:
                run.across = across(run)
            conclude_run(experiment, run)


if __name__ == "__main__":
    with one_line_errors("core.py"):
        if sys.argv[1:] != ["status"]:
            raise UsageError("`python core.py status` lists entries that are missing or old")
        status()

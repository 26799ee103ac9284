"""Where should the query enter a graph: at a query node joined to all others, or elsewhere?

Notebook    question-answering notebook: structuring
Setup       Generated questions on graphs: 8 entities, 16 facts (subject, relation, object), one
            sentence each, in 8 passages. A question is a start and 1 or 2 relations to follow
            (hops); the answer is one of 6 candidates. Nodes are passages, entities, candidates and
            every mention of an entity, as subject or object of a sentence. A mention is linked to
            its passage, its entity, the other mention of its sentence and those of its entity. Four
            attention layers with shared weights run along the links. The notebook gives neither
            data nor sizes; these are ours. The query enters at:
            - query node: a node with the query's words, joined to all other nodes (the notebook's
              "one untransformed").
            - query and context nodes: in addition a context node per passage, joined to all other
              nodes: our reading of "one for each context-aware query sequence". It starts as the
              mean of the query's words after two more attention layers over the words of query and
              passage, in order, which also makes this arm deeper.
            - start: the query's vector, a linear map of its words, is added to the start's nodes
              (its entity node and all its mentions), without a query node.
            - all nodes: this vector is added to every node instead.
            Ablations:
            - no query.
            - query node, start marked: one learned vector is added to the start's nodes.
Hypothesis  The notebook plans the query node and the context nodes and predicts nothing; we expect
            that each raises accuracy. More seeds solve 2 hops with the query on the start's nodes
            than at any other place, since there the query spreads from where its chain begins. A
            query node has to find the start first: once it is marked, 1 and 2 hops are solved.
Rule        12 paired seeds from 100 on; seeds 0 to 16 were used in development, and all share the
            test questions.

            All arms train for 1000 steps at one learning rate, chosen for "start"; slower learning
            counts as worse. In development a query node took 1500 to 5000 steps to learn 1 hop,
            where it did, and 12 pairs could not decide whether context nodes help.

            Accuracy: on 500 new questions of each number of hops, and their mean. Solved: share of
            seeds with an accuracy of at least 0.95 on a number of hops. A seed solves nearly all or
            nothing, so claims compare these shares; those about arms that are not expected to solve
            2 hops compare the mean accuracy.

            Query-blind baseline: the best guess from the graph and the number of hops; start-blind:
            from the query's relations, too. Both are exact.
Cost        36 min on 2 cores; `--questions FILE.jsonl --arms start` for questions of your own
"""

import argparse
import functools
import itertools
import json
import re
import unicodedata
from pathlib import Path

import core
from core import OURS, Check, Claim

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def question_file(text):
    """argparse type: "generated", or a file of questions (QuestionFile)."""
    if text == "generated":
        return text
    found = core.input_file(text)
    try:
        QuestionFile(found.path)
    except core.UsageError as error:
        reason = str(error).removeprefix("--questions ")
        raise argparse.ArgumentTypeError(reason) from None
    return found


parser = core.make_parser(__doc__, seeds=12)
parser.set_defaults(first_seed=100)  # 0 to 16 were used in development
parser.add_argument(
    "--query",
    nargs="+",
    choices=["node", "start", "all", "none"],
    default=["node"],
    help="where the query enters: a node joined to all others, the start's nodes, all nodes, none",
)
parser.add_argument(
    "--context",
    nargs="+",
    choices=["none", "encoded"],
    default=["none"],
    help="encoded: one more node per passage, joined to all others: the query's words, encoded "
    "together with the passage's",
)
parser.add_argument(
    "--mark-start",
    nargs="+",
    choices=["no", "yes"],
    default=["no"],
    help="yes: one learned vector is added to the start's nodes",
)
parser.add_argument(
    "--hops", nargs="+", type=core.int_tuple, default=[(1, 2)], help="relations of a question"
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[4], help="layers")
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[64], help="width")
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[3e-3], help="AdamW's learning rate"
)
parser.add_argument(
    "--steps", nargs="+", type=core.integer(10, 10**6), default=[1000], help="training steps"
)
parser.add_argument(
    "--batch", nargs="+", type=core.positive_int, default=[32], help="questions per step"
)
parser.add_argument(
    "--test-questions",
    nargs="+",
    type=core.positive_int,
    default=[500],
    help="new questions of each number of hops",
)
parser.add_argument(
    "--questions",
    nargs="+",
    type=question_file,
    default=["generated"],
    help="generated, or a .jsonl file of your own, as the README describes",
)

ARMS = {  # the baseline first; a run with flags takes these
    "query node": {},
    "query and context nodes": {"context": "encoded"},
    "start": {"query": "start"},
    "all nodes": {"query": "all"},
}
ABLATIONS = {  # what else the claims read
    "no query": {"query": "none"},
    "query node, start marked": {"mark_start": "yes"},
}
COLUMNS = ["accuracy", "accuracy, 1 hop", "accuracy, 2 hops", "solved, 1 hop", "solved, 2 hops"]
TINY = {"dim": 8, "layers": 2, "steps": 10, "batch": 4, "test_questions": 20}

HEADS = 4
SOLVED = 0.95
MAX_WORDS = 256  # a context node reads at most so many of its passage, or of the query
HOPS = {1: "1 hop", 2: "2 hops", 3: "3 hops"}
CURVE = "accuracy by step, {}"
POINTS = 10
BASELINES = ("query-blind baseline", "start-blind baseline")
MEASURES = ("accuracy", "solved", *BASELINES)


def trial(config, seed, job):
    """Train a reader on new questions, test it on held-out ones of each number of hops."""
    source = make_source(config)
    with core.initialised_from(seed):
        reader = PlacedReader(len(source.words), config).to(job.device)

    def batch(questions):
        return PlacedBatch(questions, config, job.device)

    rng = core.stream(seed, "train")
    batches = (batch(source.draw(rng, config.batch)) for _ in itertools.count())
    followed = source.held_out("val", min(100, config.test_questions))
    validation = {CURVE.format(HOPS[hops]): [batch(some)] for hops, some in followed.items()}
    history = core.train_reader(
        reader, batches, steps=config.steps, lr=config.lr, validation=validation, points=POINTS
    )
    # a file may have no questions of 1 or of 2 hops
    result = {}
    for name in ("1 hop", "2 hops"):
        result |= {f"{measure}, {name}": np.nan for measure in MEASURES}
        result[CURVE.format(name)] = np.full(POINTS + 1, np.nan)
    result |= history
    accuracies = []
    for hops, questions in source.held_out("test", config.test_questions).items():
        parts = [batch(questions[i : i + 100]) for i in range(0, len(questions), 100)]
        result |= score(HOPS[hops], core.answered(reader, parts), questions)
        accuracies.append(result[f"accuracy, {HOPS[hops]}"])
    return result | {"accuracy": np.mean(accuracies)}


def make_source(config):
    """Where questions come from: generated, or the user's file."""
    if config.questions == "generated":
        return core.QuestionSource(core.World(), config.hops)
    return QuestionFile(config.questions.path)


def score(name, right, questions):
    """What a number of hops shows: right [Q] bool, which of its questions are answered right."""
    accuracy = float(right.float().mean())
    return {
        f"accuracy, {name}": accuracy,
        f"solved, {name}": float(accuracy >= SOLVED),
        f"query-blind baseline, {name}": np.mean([one.query_blind for one in questions]),
        f"start-blind baseline, {name}": np.mean([one.start_blind for one in questions]),
    }


def add_context_nodes(question):
    """The Question with one more node per passage, which holds the query's words and its own."""
    homes = [node for node, one in enumerate(question.node_type) if one == core.PASSAGE]
    word, node, slot = map(list, (question.word, question.node, question.slot))
    for new, home in enumerate(homes, len(question.node_type)):
        for holder in (0, home):
            held = [i for i, one in enumerate(question.node) if one == holder][:MAX_WORDS]
            word += [question.word[i] for i in held]
            slot += [question.slot[i] for i in held]
            node += [new] * len(held)
    none = (-1,) * len(homes)
    return question._replace(
        node_type=question.node_type + (core.CONTEXT,) * len(homes),
        entity=question.entity + none,
        passage=question.passage + none,
        sentence=question.sentence + none,
        step=question.step + none,
        word=word,
        node=node,
        slot=slot,
    )


class PlacedBatch(core.QuestionBatch):
    """A QuestionBatch with context nodes, and the links of these and of the query's node."""

    def __init__(self, questions, config, device):
        if config.context == "encoded":
            questions = [add_context_nodes(question) for question in questions]
        super().__init__(questions, device)
        if config.query == "node":
            self.join_to_all(core.QUERY)
        if config.context == "encoded":
            self.join_to_all(core.CONTEXT)

    def join_to_all(self, node_type):
        """Link the nodes of a type to all others of their question."""
        real = self.link.diagonal(dim1=1, dim2=2) == core.SELF
        pairs = real[:, :, None] & real[:, None]
        own = self.node_type == node_type
        new = pairs & (own[:, :, None] | own[:, None]) & (self.link == core.NO_LINK)
        self.link[new] = core.LINKS.index(core.NODE_TYPES[node_type])


class PlacedReader(core.QuestionReader):
    """A QuestionReader whose query enters where the config says."""

    def __init__(self, words, config):
        if config.dim % HEADS:
            raise core.UsageError(f"--dim {config.dim}: give a multiple of {HEADS}")
        layer = core.GraphLayer(config.dim, HEADS)
        super().__init__(words, config.dim, HEADS, [layer] * config.layers)
        self.config = config
        # in every arm, and drawn last, so that the arms share all other initial weights
        self.mark = nn.Parameter(torch.randn(config.dim))
        self.encode = ContextEncoder(config.dim)

    def first_states(self, batch):
        said = self.embed(batch)
        if self.config.context == "encoded":
            context = batch.node_type == core.CONTEXT
            said = said.index_put((context,), self.encode(self.embed.word, batch, context))
        x = said + self.node_type(batch.node_type)
        query = self.inject(said[:, :1])
        if self.config.query == "start":
            x = x + batch.is_start[..., None] * query
        elif self.config.query == "all":
            x = x + query
        if self.config.mark_start == "yes":
            x = x + batch.is_start[..., None] * self.mark
        return x


class ContextEncoder(nn.Module):
    """The query encoded together with each passage: the states [C, D] of context nodes.

    Two attention layers over the words of query and passage, which know their positions; then the
    mean of the query's states.
    """

    def __init__(self, dim):
        super().__init__()
        self.position = nn.Parameter(0.5 * torch.randn(2, MAX_WORDS, dim))
        self.layers = nn.ModuleList([core.GraphLayer(dim, HEADS) for _ in range(2)])

    def forward(self, embed, batch, context):
        """embed: of words; context: which nodes are context nodes, [B, N] bool."""
        first = batch.first_word[context.flatten(), None]  # [C, 1]
        ends = F.pad(batch.first_word[1:], (0, 1), value=len(batch.word))
        length = ends[context.flatten(), None] - first
        number = torch.arange(int(length.max()), device=first.device)
        is_real = number < length  # [C, L], L words at most
        token = torch.where(is_real, first + number, 0)
        is_text = batch.slot[token] == core.TEXT
        is_query = is_real & ~is_text
        query_words = is_query.sum(1, keepdim=True)
        position = torch.where(is_text, number - query_words, number).clamp(0, MAX_WORDS - 1)
        x = embed(batch.word[token]) + self.position[is_text.long(), position]  # [C, L, D]
        bias = torch.zeros_like(x[..., 0]).masked_fill(~is_real, -1e9)[:, None, None]
        for layer in self.layers:
            x = layer(x, bias, None)
        return (x * (is_query / query_words)[..., None]).sum(1)


# Questions of the user's own

MAX_NODES = 512  # of a question: attention takes memory for every pair of nodes
SENTENCE_WORDS = 64  # a mention holds at most so many of its sentence's other words
SPACELESS = (  # first and last letter of scripts that are written without spaces
    ("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u1780", "\u17ff"), ("\u3040", "\u30ff"),
    ("\u3400", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"),
)  # fmt: skip


@functools.cache
def letter_class(letter):
    """Class of a character: "w" makes words, "m" is a mark, " " is white space, "s" any other."""
    category = unicodedata.category(letter)
    if letter.isspace():
        return " "
    if category[0] == "M" or category == "Cf":
        return "m"
    spaceless = any(first <= letter <= last for first, last in SPACELESS)
    return "w" if category[0] in "LN" and not spaceless else "s"


def read_tokens(text):
    """The tokens of a text, and whether white space follows each: two lists.

    A token is a word, a single sign, or a single letter of a script that is written without
    spaces, whose names are so found wherever their letters stand in a row. Letters keep their
    marks, composed or not (NFC); large and small letters are the same.
    """
    text = unicodedata.normalize("NFC", text.casefold())
    classes = "".join(map(letter_class, text))
    spans = [match.span() for match in re.finditer("w[wm]*|[sm]m*", classes)]
    return [text[i:j] for i, j in spans], [classes[j : j + 1] in ("", " ") for _, j in spans]


def read_passage(text, names):
    """A passage for `core.build_question`, of tokens. names: {tokens of a name: its entity}.

    The longest name that begins at a token counts. A sentence ends with . ! ? before white space,
    or with 。！？, but not inside a name such as "St. Louis".
    """
    tokens, spaced = read_tokens(text)
    lengths = sorted({len(name) for name in names}, reverse=True)
    sentences = [([], [], 0)]
    place = 0
    while place < len(tokens):
        spans = [tuple(tokens[place : place + length]) for length in lengths]
        named = [span for span in spans if span in names]
        entities, said, _ = sentences[-1]
        token = tokens[place]
        if named:
            entities.append(names[named[0]])
        elif token in "。！？" or (token in ".!?" and spaced[place]):
            sentences.append(([], [], 0))
        elif len(said) < SENTENCE_WORDS:
            said.append(token)
        place += len(named[0]) if named else 1
    return tokens, sentences


def read_question(row):
    """The Question that one line of a file holds, with tokens for words.

    Raises ValueError that says what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("not an object")
    tokens = {}
    for key in ("start", "answer", "candidates", "relations", "passages", "entities"):
        texts = [row.get(key)] if key in ("start", "answer") else row.get(key, [])
        filled = isinstance(texts, list) and (texts or key == "entities")
        if not filled or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f'"{key}" is missing, empty, or not of texts')
        tokens[key] = [tuple(read_tokens(text)[0]) for text in texts]
    (start,), (answer,) = tokens["start"], tokens["answer"]
    candidates = dict.fromkeys(tokens["candidates"])
    if len(tokens["relations"]) > core.MAX_HOPS:
        raise ValueError(f'"relations" has more than {core.MAX_HOPS} entries')
    if len(candidates) < len(tokens["candidates"]):
        alike = max(candidates, key=tokens["candidates"].count)
        raise ValueError(f'two of the candidates read alike, as "{" ".join(alike)}"')
    if answer not in candidates:
        raise ValueError('"answer" does not stand among "candidates"')

    named = list(dict.fromkeys([*candidates, start, *tokens["entities"]]))
    entity = {name: number for number, name in enumerate(named)}
    passages = [read_passage(text, entity) for text in row["passages"]]
    choice = range(len(candidates))
    question = core.build_question(
        named, choice, entity[start], entity[answer], tokens["relations"], passages
    )
    nodes = len(question.node_type)
    if nodes > MAX_NODES:
        raise ValueError(f"{nodes} names and mentions, at most {MAX_NODES}; shorten the passages")
    return question


class QuestionFile:
    """The user's own questions, every fifth held out; with the methods of a core.QuestionSource.

    A line is an object with the texts "start" and "answer", the lists of texts "candidates",
    "relations" (1 to 3) and "passages", and maybe "entities", other names to be linked. Raises
    UsageError that names the line.
    """

    def __init__(self, path):
        number = {"": 0, "[masked]": core.MASKED_WORD}
        questions = []
        for i, line in enumerate(Path(path).read_bytes().splitlines()):
            try:
                if line.strip():
                    questions.append(read_question(json.loads(line)))
            except (ValueError, RecursionError) as error:
                unreadable = json.JSONDecodeError | UnicodeDecodeError | RecursionError
                reason = "not JSON" if isinstance(error, unreadable) else error
                raise core.UsageError(f"--questions {path}: line {i + 1}: {reason}") from None
        if len(questions) < 10:
            raise core.UsageError(f"--questions {path}: give at least 10 questions, one per line")
        for i, one in enumerate(questions):
            words = tuple(number.setdefault(word, len(number)) for word in one.word)
            questions[i] = one._replace(word=words)
        self.words = list(number)
        self.training = [one for i, one in enumerate(questions) if i % 5 != 4]
        self.testing = questions[4::5]
        self.hops = tuple(sorted({one.hops for one in self.testing}))

    def draw(self, rng, count):
        """[Question] * count of the training questions, none twice; all if there are fewer."""
        return [self.training[i] for i in rng.permutation(len(self.training))[:count]]

    def held_out(self, name, count):
        """{hops: at most `count` Questions}; "val" and "test" are the same."""
        return {h: [one for one in self.testing if one.hops == h][:count] for h in self.hops}


# Claims and figures


def solved(hops, **bounds):
    """A check of the share of seeds that solve this number of hops."""
    return Check(f"solved, {hops}", rate=True, **bounds)


CLAIMS = [
    Claim(
        "After 1000 steps a query node is better than no query",
        OURS,
        Check("accuracy", above=0, arm="query node", minus="no query"),
    ),
    Claim(
        "After 1000 steps query and context nodes are better than the query node alone",
        OURS,
        Check("accuracy", above=0, arm="query and context nodes", minus="query node"),
    ),
    Claim(
        "After 1000 steps most seeds solve 1 and 2 hops with the query on the start's nodes, and "
        "more solve 2 hops than with the query anywhere else",
        OURS,
        solved("1 hop", above=0.5, arm="start"),
        solved("2 hops", above=0.5, arm="start"),
        solved("2 hops", above=0, arm="start", minus="query node"),
        solved("2 hops", above=0, arm="start", minus="query and context nodes"),
        solved("2 hops", above=0, arm="start", minus="all nodes"),
    ),
    Claim(
        "After 1000 steps a query node with the start marked solves 1 and 2 hops in most seeds, "
        "and 2 hops in more than without the mark",
        OURS,
        solved("1 hop", above=0.5, arm="query node, start marked"),
        solved("2 hops", above=0.5, arm="query node, start marked"),
        solved("2 hops", above=0, arm="query node, start marked", minus="query node"),
    ),
]


TITLES = {
    "1 hop": "A query node solves 1 hop if the start is marked, otherwise not in 1000 steps",
    "2 hops": "Only with the query on the start's nodes every seed solves 2 hops in 1000 steps",
}


def plot(run):
    """{name of the file: figure}."""
    figures = {
        "steps": core.draw_curves(
            run,
            CURVE.format("2 hops"),
            "In 1000 steps 2 hops are learned with the query on the start's nodes, not with a "
            "query node",
            "Accuracy on 100 other questions of 2 hops while training, a line per seed",
            "tenth of the training",
            "accuracy",
            panels={
                "query in one place": ["start", "query node", "all nodes"],
                "with context nodes or a marked start": [
                    "query and context nodes",
                    "query node, start marked",
                ],
            },
        )
    }
    for hops in ("1 hop", "2 hops"):
        first = next(iter(run.arms))
        blind = {name: run.values(first, f"{name}, {hops}")[0] for name in BASELINES}
        figures[hops.replace(" ", "-")] = core.draw_points(
            run,
            f"accuracy, {hops}",
            TITLES[hops],
            f"Accuracy on new questions of {hops}, a dot per seed",
            "accuracy",
            levels=blind,
        )
    return figures


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY)

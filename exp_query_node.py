"""Where should a graph be told its question: at a query node joined to all others, or elsewhere?

Notebook    question-answering notebook: structuring
Setup       Generated questions on graphs: 8 entities, 16 facts (subject, relation, object), one
            sentence each, in 8 passages. A question is a start and 1 or 2 relations to follow; the
            answer is one of 6 candidates. Nodes are passages, entities, candidates and every
            mention of an entity, as subject or object of a sentence; a mention is linked to its
            passage, its entity, the other mention of its sentence and those of its entity. Four
            attention layers with shared weights run along the links. The notebook gives neither
            data nor sizes; these are ours. Places of the query:
            - as planned (the notebook's): a query node with the query's own words, joined to all
              other nodes, and a context node for each passage, joined to all others, too. It
              holds the query encoded together with the passage: two attention layers read the
              words of both in order, and the query's states are averaged.
            - query node: the untransformed one alone.
            - start: no node; the query's vector is added to the nodes that name its start.
            - all nodes: the query's vector is added to every node.
            - no query. Ablations: bag per passage, context nodes that hold the words of query
              and passage without order, joined to that passage and its mentions alone; the query
              node with the nodes that name the start marked; the start with 3 layers.
Hypothesis  The notebook plans these nodes and predicts nothing; we read that they help. Ours: the
            start is the best place at both numbers of hops, since only what follows the chain
            hears of the query there. A query node must first find the start: once it is marked,
            1 and 2 hops are solved. A passage's own words beside the query's find it at 1 hop.
            A hop takes two layers.
Rule        12 paired seeds from 100 on, 6 for ablations; 0 to 16 were seen before. A check holds
            if its 95% interval lies inside its bounds and fails if it lies outside. Accuracy: on
            500 new questions of each number of hops. Accuracy is nearly all or nothing per seed,
            so the share of seeds that solve a number of hops, accuracy at least 0.95, is compared
            beside its mean. Query-blind and start-blind guess: chance of the best guess that does
            not know the query, or knows its relations but not its start; both exact. Near the
            start-blind guess: within 0.05. All arms train for 800 steps: what would learn later
            counts as worse.
Cost        40 min on 2 cores; `--questions FILE.jsonl --arms start` for questions of your own
"""

import itertools

import core
from core import OURS, Check, Claim

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def question_file(text):
    """argparse type: "generated", or a file of questions (core.QuestionFile)."""
    return text if text == "generated" else core.input_file(text)


parser = core.make_parser(__doc__, seeds=12, ablation_seeds=6)
parser.set_defaults(first_seed=100)  # 0 to 16 were seen before
parser.add_argument(
    "--query",
    nargs="+",
    choices=["node", "start", "all", "none"],
    default=["node"],
    help="where the query's own vector is: in a node joined to all, on the start's, on all nodes",
)
parser.add_argument(
    "--context",
    nargs="+",
    choices=["none", "encoded", "bag"],
    default=["none"],
    help="one more node per passage: query and passage encoded together, joined to all others; "
    "or the bags of their words, joined to that passage and its mentions",
)
parser.add_argument(
    "--mark-start",
    nargs="+",
    choices=["no", "yes"],
    default=["no"],
    help="yes: one vector marks the nodes that name the start",
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
    "--steps", nargs="+", type=core.integer(10, 10**6), default=[800], help="training steps"
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

PLANNED = {"context": "encoded"}
START = {"query": "start"}
ARMS = {  # the baseline first; a run with flags takes these
    "query node": {},
    "as planned": PLANNED,
    "start": START,
    "all nodes": {"query": "all"},
}
ABLATIONS = {  # what else the claims read
    "no query": {"query": "none"},
    "bag per passage": {"context": "bag"},
    "query node, start marked": {"mark_start": "yes"},
    "start, 3 layers": START | {"layers": 3},
}
COLUMNS = [
    "accuracy, 2 hops",
    "accuracy, 1 hop",
    "solved, 2 hops",
    "solved, 1 hop",
    "start-blind guess, 2 hops",
]
TINY = {"dim": 8, "layers": 2, "steps": 10, "batch": 4, "test_questions": 20}

HEADS = 4
SOLVED = 0.95
MOST_WORDS = 256  # a context node reads at most so many of its passage, or of the query
HOPS = {1: "1 hop", 2: "2 hops", 3: "3 hops"}
CURVE = "accuracy by step"
MEASURES = ("accuracy", "solved", "query-blind guess", "start-blind guess", CURVE)


def trial(config, seed, job):
    """Train a reader on new questions, test it on held-out ones of each number of hops."""
    source = make_source(config)
    with core.initialised_from(seed):
        reader = PlacedReader(len(source.words), config).to(job.device)

    def batch(questions):
        return PlacedBatch(questions, config, job.device)

    rng = core.stream(seed, "train")
    batches = (batch(source.draw(rng, config.batch)) for _ in itertools.count())
    validation = source.held_out("val", min(100, config.test_questions))
    validation = {f"{CURVE}, {HOPS[hops]}": [batch(some)] for hops, some in validation.items()}
    history = core.train_reader(
        reader, batches, steps=config.steps, lr=config.lr, validation=validation
    )
    # a file may have no questions of 1 or of 2 hops
    result = {f"{measure}, {HOPS[hops]}": np.nan for measure in MEASURES for hops in (1, 2)}
    for hops, questions in source.held_out("test", config.test_questions).items():
        parts = [batch(questions[i : i + 100]) for i in range(0, len(questions), 100)]
        result |= score(HOPS[hops], core.answered(reader, parts), questions)
    return result | history


def make_source(config):
    """Where questions come from: generated, or the user's file."""
    if config.questions == "generated":
        return core.QuestionSource(core.World(), config.hops)
    return core.QuestionFile(config.questions.path)


def score(name, right, questions):
    """What a number of hops shows: right [Q] bool, which of its questions are answered right."""
    accuracy = float(right.float().mean())
    start_blind = np.mean([question.start_blind for question in questions])
    return {
        f"accuracy, {name}": accuracy,
        f"solved, {name}": float(accuracy >= SOLVED),
        f"query-blind guess, {name}": np.mean([question.query_blind for question in questions]),
        f"start-blind guess, {name}": start_blind,
        f"over start-blind guess, {name}": accuracy - start_blind,
    }


def add_context_nodes(question):
    """The Question with one more node per passage, which holds the query's words and its own."""
    homes = [node for node, kind in enumerate(question.node_type) if kind == core.PASSAGE]
    word, node, slot = map(list, (question.word, question.node, question.slot))
    for new, home in enumerate(homes, len(question.node_type)):
        for holder in (0, home):
            held = [i for i, one in enumerate(question.node) if one == holder][:MOST_WORDS]
            word += [question.word[i] for i in held]
            slot += [question.slot[i] for i in held]
            node += [new] * len(held)
    none = (-1,) * len(homes)
    return question._replace(
        node_type=question.node_type + (core.CONTEXT,) * len(homes),
        entity=question.entity + none,
        passage=question.passage + tuple(homes),
        sentence=question.sentence + none,
        step=question.step + none,
        word=word,
        node=node,
        slot=slot,
    )


class PlacedBatch(core.QuestionBatch):
    """A QuestionBatch with context nodes, and the links of these and of the query's node."""

    def __init__(self, questions, config, device):
        if config.context != "none":
            questions = [add_context_nodes(question) for question in questions]
        super().__init__(questions, device)
        real = self.link.diagonal(dim1=1, dim2=2) == core.SELF
        passage = core.pad_rows([question.passage for question in questions])
        same_passage = torch.from_numpy(passage[:, :, None] == passage[:, None]).to(device)
        if config.query == "node":
            self.join(core.QUERY, real[:, :, None] & real[:, None])
        if config.context == "encoded":
            self.join(core.CONTEXT, real[:, :, None] & real[:, None])
        elif config.context == "bag":
            self.join(core.CONTEXT, same_passage)

    def join(self, node_type, pairs):
        """Link the nodes of a type to others, as far as the pairs [B, N, N] allow."""
        one_way = (self.node_type == node_type)[:, :, None] & pairs
        new = (one_way | one_way.transpose(1, 2)) & (self.link == core.NO_LINK)
        self.link[new] = core.LINKS.index(core.NODE_TYPES[node_type])


class PlacedReader(core.QuestionReader):
    """A QuestionReader whose query stands where the config says."""

    def __init__(self, words, config):
        if config.dim % HEADS:
            raise core.UsageError(f"--dim {config.dim}: give a multiple of {HEADS}")
        layer = core.GraphLayer(config.dim, HEADS)
        super().__init__(words, config.dim, HEADS, [layer] * config.layers)
        self.config = config
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
    """The query in the light of each passage: the states [C, D] of context nodes.

    Two attention layers over the words of query and passage, which know their positions; then the
    mean of the query's states.
    """

    def __init__(self, dim):
        super().__init__()
        self.position = nn.Parameter(0.5 * torch.randn(2, MOST_WORDS, dim))
        self.layers = nn.ModuleList([core.GraphLayer(dim, HEADS) for _ in range(2)])

    def forward(self, embed, batch, context):
        first = batch.first_word[context.flatten(), None]
        ends = F.pad(batch.first_word[1:], (0, 1), value=len(batch.word))
        length = ends[context.flatten(), None] - first
        number = torch.arange(int(length.max()), device=first.device)
        keep = number < length
        place = torch.where(keep, first + number, 0)
        is_text = batch.slot[place] == core.TEXT
        asked = keep & ~is_text
        count = asked.sum(1, keepdim=True)
        number = torch.where(is_text, number - count, number).clamp(0, MOST_WORDS - 1)
        x = embed(batch.word[place]) + self.position[is_text.long(), number]
        bias = torch.zeros_like(x[..., 0]).masked_fill(~keep, -1e9)[:, None, None]
        for layer in self.layers:
            x = layer(x, bias, None)
        return (x * (asked / count)[..., None]).sum(1)


def at_both(metric, **bounds):
    """A check at 1 and one at 2 hops."""
    return [Check(f"{metric}, {hops}", **bounds) for hops in ("1 hop", "2 hops")]


OTHER_PLACES = ("as planned", "query node", "all nodes")
CLAIMS = [
    Claim(
        "A query node joined to all other nodes helps, at 1 and at 2 hops",
        "structuring",
        *at_both("accuracy", above=0, arm="query node", minus="no query"),
    ),
    Claim(
        "A context node for each passage, beside the query node, helps, at 1 and at 2 hops",
        "structuring",
        *at_both("accuracy", above=0, arm="as planned", minus="query node"),
    ),
    Claim(
        "A graph is best asked at the start's own nodes, at 1 and at 2 hops",
        OURS,
        *(
            check
            for place in OTHER_PLACES
            for check in at_both("accuracy", above=0, arm="start", minus=place)
        ),
    ),
    Claim(
        "Asked at the start's own nodes, most seeds solve 1 and 2 hops; more than elsewhere at 2",
        OURS,
        *at_both("solved", above=0.5, rate=True, arm="start"),
        *(
            Check("solved, 2 hops", above=0, rate=True, arm="start", minus=place)
            for place in OTHER_PLACES
        ),
    ),
    Claim(
        "A query node lacks the start: once it is marked, most seeds solve 1 and 2 hops",
        OURS,
        *at_both("solved", above=0.5, rate=True, arm="query node, start marked"),
    ),
    Claim(
        "A query on all nodes stays near the guess that does not know the start, at 2 hops",
        OURS,
        Check("over start-blind guess, 2 hops", between=(-0.05, 0.05), arm="all nodes"),
    ),
    Claim(
        "Encoding query and passage together finds more at 1 hop than their bags of words",
        OURS,
        Check("accuracy, 1 hop", above=0, arm="as planned", minus="bag per passage"),
    ),
    Claim(
        "A hop takes two layers: three layers solve 1 hop but not 2",
        OURS,
        Check("solved, 1 hop", above=0.5, rate=True, arm="start, 3 layers"),
        Check("solved, 2 hops", below=0.5, rate=True, arm="start, 3 layers"),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    figures = {
        "steps": core.draw_curves(
            run,
            f"{CURVE}, 2 hops",
            "Accuracy at 2 hops while training, by place of the query",
            "Accuracy on 100 other questions of 2 hops while training, a line per seed",
            "tenth of the training",
            "accuracy",
            panels={
                "one place": ["start", "query node", "all nodes"],
                "more": ["as planned", "bag per passage", "query node, start marked"],
            },
        )
    }
    for hops in ("1 hop", "2 hops"):
        blind = {
            name: run.values(next(iter(run.arms)), f"{name}, {hops}")[0]
            for name in ("query-blind guess", "start-blind guess")
        }
        figures[hops.replace(" ", "-")] = core.draw_points(
            run,
            f"accuracy, {hops}",
            f"Accuracy at {hops} by place of the query",
            f"Accuracy on new questions of {hops}, a dot per seed",
            "accuracy",
            levels=blind,
        )
    return figures


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY)

"""Do attention graphs show the chain of facts that leads to the answer, and do answers need it?

Notebook    question-answering notebook: visualisations
Setup       Questions of 1, 2 and 3 hops (relations to follow) on generated graphs with the nodes
            and links of query_node: passages, entities, candidate answers, and each mention of an
            entity as subject or object of a sentence. A reader of six attention layers with shared
            weights scores the candidates; the query is added to the start's nodes. A trial trains
            one reader for 3000 steps on new questions; everything is measured on that reader,
            before ("untrained") and after, and the same 150 test questions per number of hops.
            Terms:
            - chain: for each fact on the path, the link from subject to object mention, then to
              that entity's mention as the next fact's subject, and last to the answer's node.
            - edge type: link type (passage, entity, coreference, sentence) with the node types of
              source and target.
            - attention of a link: mean over layers and heads.
            - flow of a link: mass moved along it on the way from the start's nodes to the answer,
              summed over layers, when each layer mixes half attention and half identity (attention
              rollout, Abnar and Zuidema 2020).
            - even attention, even flow: the same with uniform attention. Both flows are given the
              start and the correct answer.
            - accuracy lost: by leaving links out of every layer.
Hypothesis  The notebook plans graphs that show the inner workings of heads and the aggregate flow
            by node and edge type; it predicts nothing. We expect that attention and single heads
            show the chain, the mean better than any head, and flow better than even flow. Answers
            need the edge types with more attention and flow, and the strongest links.
Rule        6 paired seeds from 100 on. Seeds 0 to 4 were used in development; all seeds share the
            test questions.

            AUC: chance that a chain link has a higher value than another link of its edge type, of
            any question. Other links between the chain's mentions and entity nodes are ignored.
            Attention and heads show the chain above 0.7, flow above 0.9. The best of 24 heads (6
            layers, 4 heads each) is chosen on half of the questions; its AUC, and the mean's that
            is compared with it, are those of the other half.

            Rank correlation: Spearman's, over edge types, of the share of all attention, flow, even
            attention or even flow with the accuracy lost without that type's links. It has to be
            over 0.5. Edge types with more links have more of each, so attention and flow are
            compared with the even ones.

            Strongest links: the 2% of each question's links with most attention, about as many as
            a chain has. Without them the accuracy has to be over 0.2 lower than without random ones
            of the same edge types, which may include the strongest.

            Claims leave out seeds that have not learned, with an accuracy below 0.8 at any number
            of hops: guessing without the query scores 0.47 at 3 hops, and without the start 0.88.
Cost        13 min on 2 cores; `--hops 1 --layers 2 --steps 500 --seeds 2` 1 min
"""

import itertools
import math

import core
from core import OURS, Check, Claim
from exp_query_node import HEADS, HOPS

import numpy as np
import torch
import torch.nn.functional as F

parser = core.make_parser(__doc__, seeds=6)
parser.set_defaults(first_seed=100)  # 0 to 4 were used in development
parser.add_argument(
    "--hops", nargs="+", type=core.int_tuple, default=[(1, 2, 3)], help="relations of a question"
)
parser.add_argument("--layers", nargs="+", type=core.integer(1, 64), default=[6], help="layers")
parser.add_argument("--dim", nargs="+", type=core.layer_width, default=[64], help="width")
parser.add_argument(
    "--lr", nargs="+", type=core.positive_float, default=[3e-3], help="AdamW's learning rate"
)
parser.add_argument(
    "--steps", nargs="+", type=core.integer(0, 10**6), default=[3000], help="training steps"
)
parser.add_argument(
    "--batch", nargs="+", type=core.positive_int, default=[32], help="questions per step"
)
parser.add_argument(
    "--test-questions",
    nargs="+",
    type=core.positive_int,
    default=[150],
    help="questions of each number of hops",
)

ARMS = {"trained": {}, "untrained": {"steps": 0}}
ABLATIONS = {}
COLUMNS = ["AUC, attention", "AUC, best head", "AUC, flow", "AUC, even flow", "accuracy, 3 hops"]
TINY = {"hops": (1, 2), "dim": 8, "layers": 2, "steps": 10, "batch": 4, "test_questions": 10}

TYPES = len(core.NODE_TYPES)
VALUES = ("attention", "flow", "even attention", "even flow", "accuracy lost")  # by edge type
STRONGEST = 0.02  # share of each question's links
LEARNED = 0.8  # accuracy at any number of hops


def trial(config, seed, job):
    """Train one reader; then watch its attention and cut links, on the same questions."""
    if config.dim % HEADS:
        raise core.UsageError(f"--dim {config.dim}: give a multiple of {HEADS}")
    source = core.QuestionSource(core.World(), config.hops)
    with core.initialised_from(seed):
        layer = core.GraphLayer(config.dim, HEADS)
        reader = core.QuestionReader(len(source.words), config.dim, HEADS, [layer] * config.layers)
    reader.to(job.device)
    if config.steps > 0:
        rng = core.stream(seed, "train")
        drawn = (source.draw(rng, config.batch) for _ in itertools.count())
        batches = (core.QuestionBatch(questions, job.device) for questions in drawn)
        core.train_reader(reader, batches, steps=config.steps, lr=config.lr)

    questions = source.held_out("test", config.test_questions).values()
    batch = core.QuestionBatch(list(itertools.chain(*questions)), job.device)
    links = (batch.link > core.SELF).nonzero(as_tuple=True)  # question, target, source of E links
    weights = watch(reader, batch)
    by_head = weights.permute(1, 3, 4, 0, 2)[links].flatten(1)  # [E, L * H]
    uniform = (batch.link > core.NO_LINK).float()
    uniform = uniform / uniform.sum(2, keepdim=True).clamp(min=1)
    values = {
        "attention": by_head.mean(1),
        "flow": answer_flow(weights.mean(2), batch)[links],
        "even attention": uniform[links],
        "even flow": answer_flow(uniform.expand(len(weights), -1, -1, -1), batch)[links],
    }
    chain = find_chain(batch)[links]
    edge_type = edge_types(batch)[links]

    by_hops = accuracy_by_hops(reader, batch)
    result = {f"accuracy, {name}": by_hops.get(name, math.nan) for name in HOPS.values()}
    result["not learned"] = float(min(by_hops.values()) < LEARNED)
    for name, value in values.items():
        result[f"AUC, {name}"] = auc(value, chain, edge_type)
    result["AUC, flow less even flow"] = result["AUC, flow"] - result["AUC, even flow"]
    result |= compare_best_head(by_head, links[0] % 2 == 0, chain, edge_type)
    result |= cut_types(reader, batch, links, values, edge_type)
    rng = core.stream(seed, "order")
    result["accuracy lost, strongest less random"] = cut_strongest(
        reader, batch, links, values["attention"], edge_type, rng
    )
    drawn = shown_question(config.hops, job.device)
    result["attention in the drawn question"] = watch(reader, drawn)[:, 0].cpu().numpy()
    return result


@torch.no_grad()
def watch(reader, batch):
    """Attention weights of all layers and heads, target by source: [L, B, H, N, N]."""
    reader.eval()
    x = reader.first_states(batch)
    bias = reader.attention_bias(batch)
    weights = []
    for layer in reader.layers:
        weights.append(layer.attend(x, bias, batch)[0])
        x = layer(x, bias, batch)
    return torch.stack(weights)


def answer_flow(weights, batch):
    """Mass that each link moves from the start's nodes to the answer: [L, B, N, N] -> [B, N, N]."""
    ahead = [batch.is_start.float()]  # of each node, before each layer
    back = [F.one_hot(batch.answer, batch.shape[1]).float()]
    for first, last in zip(weights, weights.flip(0), strict=True):
        ahead.append((ahead[-1] + torch.einsum("bts,bs->bt", first, ahead[-1])) / 2)
        back.append((back[-1] + torch.einsum("bts,bt->bs", last, back[-1])) / 2)
    flow = torch.zeros_like(weights[0])
    for number, layer in enumerate(weights):
        after = back[len(weights) - 1 - number]
        flow += after[:, :, None] * layer * ahead[number][:, None]
    return flow


def find_chain(batch):
    """1 on links of the chain, -1 on those that are ignored, else 0: [B, N, N]."""
    step = core.pad_rows([question.step for question in batch.questions])
    step = torch.from_numpy(step).to(batch.link.device)
    hops = torch.tensor([question.hops for question in batch.questions]).to(step)
    from_step = step[:, None]
    to_step = step[:, :, None]
    from_subject = (batch.node_type == core.SUBJECT)[:, None] & (from_step > 0)
    from_object = (batch.node_type == core.OBJECT)[:, None] & (from_step > 0)
    to_subject = (batch.node_type == core.SUBJECT)[:, :, None]
    within = from_subject & ~to_subject & (batch.link == core.LINKS.index("sentence"))
    onward = from_object & to_subject & (to_step == from_step + 1)
    is_answer = F.one_hot(batch.answer, step.shape[1]).bool()[:, :, None]
    at_last = from_object & is_answer & (from_step == hops[:, None, None])
    chain = within | onward | at_last
    to_entity = batch.link == core.LINKS.index("entity")
    ignored = to_entity & ((from_step > 0) | (to_step > 0)) & ~chain
    return chain.long() - ignored.long()


def edge_types(batch):
    """Number of the edge type of each link, from its type and both nodes' types: [B, N, N]."""
    pair = batch.node_type[:, :, None] * TYPES + batch.node_type[:, None]
    return batch.link * TYPES**2 + pair


def edge_type_name(number):
    """An edge type in words."""
    link, pair = divmod(int(number), TYPES**2)
    target, source = divmod(pair, TYPES)
    return f"{core.NODE_TYPES[source]} to {core.NODE_TYPES[target]} ({core.LINKS[link]})"


def auc(value, chain, edge_type):
    """Chance that a chain link has a higher value than another link of its edge type."""
    total = 0.0
    count = 0
    for number in edge_type[chain == 1].unique():
        compared = (edge_type == number) & (chain >= 0)
        is_chain = chain[compared]
        logits = F.pad(value[compared, None], (1, 0))  # 0, and the value, of two classes
        chance = core.ranking_accuracy(logits, is_chain)
        if chance.isfinite():  # the type has other links, too
            total += float(chance * is_chain.sum())
            count += int(is_chain.sum())
    return total / max(count, 1)


def compare_best_head(by_head, is_first_half, chain, edge_type):
    """AUC of the head that is best on the first half, and of the mean, on the second half."""

    def auc_on(half, value):
        return auc(value[half], chain[half], edge_type[half])

    on_first = np.array([auc_on(is_first_half, head) for head in by_head.unbind(1)])
    best = auc_on(~is_first_half, by_head[:, on_first.argmax()])
    mean = auc_on(~is_first_half, by_head.mean(1))
    return {
        "AUC by head": on_first,  # layer by layer
        "AUC, best head": best,
        "AUC, attention less best head": mean - best,
    }


def accuracy_by_hops(reader, batch):
    """{number of hops in words: accuracy}."""
    right = core.answered(reader, [batch]).float().cpu().numpy()
    hops = np.array([question.hops for question in batch.questions])
    return {HOPS[number]: float(right[hops == number].mean()) for number in np.unique(hops)}


def accuracy_without(reader, batch, cut=()):
    """Accuracy when the links at cut (question, target, source) are left out of all layers."""
    link = batch.link
    if cut:
        batch.link = link.clone()
        batch.link[cut] = core.NO_LINK
    accuracy = float(core.answered(reader, [batch]).float().mean())
    batch.link = link
    return accuracy


def place_in_group(group, value):
    """Place of each entry in its group by falling value, from 0 on: [E]."""
    order = np.lexsort((-value, group))
    place = np.empty(len(group), dtype=int)
    place[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return place


def cut_strongest(reader, batch, links, strength, edge_type, rng):
    """Accuracy without random links of each question, less that without the strongest.

    As many of each edge type.
    """
    question = links[0].cpu().numpy()
    size = np.bincount(question)[question]
    is_strongest = place_in_group(question, strength.cpu().numpy()) < np.round(STRONGEST * size)
    group = np.stack([question, edge_type.cpu().numpy()])
    group = np.unique(group, axis=1, return_inverse=True)[1].ravel()
    counts = np.bincount(group, is_strongest)
    is_random = place_in_group(group, rng.random(len(group))) < counts[group]
    accuracies = []
    for chosen in (is_random, is_strongest):
        chosen = torch.from_numpy(chosen).to(links[0].device)
        accuracies.append(accuracy_without(reader, batch, tuple(index[chosen] for index in links)))
    return accuracies[0] - accuracies[1]


def cut_types(reader, batch, links, values, edge_type):
    """Each edge type's share of each value, and the accuracy lost without its links."""
    accuracy = accuracy_without(reader, batch)
    types = edge_type.unique()
    shares = []
    losses = []
    for number in types:
        chosen = edge_type == number
        shares.append([float(value[chosen].sum() / value.sum()) for value in values.values()])
        without = accuracy_without(reader, batch, tuple(index[chosen] for index in links))
        losses.append(accuracy - without)
    result = {"edge types": types.cpu().numpy(), "by edge type": np.column_stack([shares, losses])}
    for name, share in zip(values, np.transpose(shares), strict=True):
        result[f"rank correlation, {name}"] = rank_correlation(share, losses)
    for name in ("attention", "flow"):
        result[f"rank correlation, {name} less even"] = (
            result[f"rank correlation, {name}"] - result[f"rank correlation, even {name}"]
        )
    return result


def rank_correlation(one, other):
    """Spearman's; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    with np.errstate(invalid="ignore"):
        correlation = np.corrcoef(rankdata(one), rankdata(other))[0, 1]
    return float(np.nan_to_num(correlation))


def shown_question(hops, device="cpu"):
    """The question that is drawn, a batch: the first of those with most hops."""
    source = core.QuestionSource(core.World(), hops)
    return core.QuestionBatch(source.held_out("val", 1)[max(hops)], device)


TRAINED = {"arm": "trained", "unless": "not learned"}
CLAIMS = [
    Claim(
        "Mean attention ranks the chain above other links of its edge type",
        OURS,
        Check("AUC, attention", above=0.7, **TRAINED),
    ),
    Claim(
        "The best head of any layer shows the chain, too, but less well than mean attention",
        OURS,
        Check("AUC, best head", above=0.7, **TRAINED),
        Check("AUC, attention less best head", above=0, **TRAINED),
    ),
    Claim(
        "Flow from start to answer shows the chain, and better than even flow",
        OURS,
        Check("AUC, flow", above=0.9, **TRAINED),
        Check("AUC, flow less even flow", above=0, **TRAINED),
    ),
    Claim(
        "An edge type's shares of attention and flow correlate with the accuracy lost without its "
        "links (over 0.5), more than those of even attention and flow do",
        OURS,
        Check("rank correlation, attention", above=0.5, **TRAINED),
        Check("rank correlation, flow", above=0.5, **TRAINED),
        Check("rank correlation, attention less even", above=0, **TRAINED),
        Check("rank correlation, flow less even", above=0, **TRAINED),
    ),
    Claim(
        "Cutting the strongest 2% of links costs over 0.2 more accuracy than cutting random ones "
        "of their edge types",
        OURS,
        Check("accuracy lost, strongest less random", above=0.2, **TRAINED),
    ),
]


def plot(run):
    """{name of the file: figure}."""
    if "trained" not in run.arms:
        return {}
    return {
        "heads": draw_heads(run),
        "node-types": draw_node_types(run),
        "edge-types": draw_edge_types(run),
        "edge-types.csv": edge_type_rows(run),
    }


def draw_heads(run):
    """One question: in each layer the head that attends to the chain most."""
    batch = shown_question(run.arms["trained"]["hops"])
    question = batch.questions[0]
    is_link = (batch.link[0] > core.SELF).numpy()
    chain = (find_chain(batch)[0] == 1).numpy() & is_link
    node_type = batch.node_type[0].numpy()
    is_link &= node_type[:, None] != node_type  # links within a column would hide its nodes
    place = place_nodes(question)
    first = run.results("trained")[0]
    weights = first["attention in the drawn question"]  # [L, H, N, N]
    auc_by_head = np.reshape(first["AUC by head"], (len(weights), HEADS))
    columns = min(3, len(weights))
    rows = math.ceil(len(weights) / columns)
    figure, axes = core.new_figure(
        run,
        "The head of each layer that attends to the chain (orange) most, in one question; start "
        "green, answer red",
        "Links with attention over 0.3 in the head of each layer that attends to the chain most, "
        "with its AUC over half of the test questions; one question, first seed; orange: chain; "
        "green: start; red: answer; links between nodes of the same type are not drawn",
        rows,
        columns,
        width=11.0,
        height=4.0 * rows,
    )
    for layer, axis in enumerate(axes.flat):
        axis.axis("off")
        if layer >= len(weights):
            continue
        head = np.argmax(weights[layer][:, chain].sum(axis=1))
        weight = weights[layer, head]
        for shown, colour in ((is_link & ~chain, "#56B4E9"), (chain, "#E69F00")):  # chain on top
            for target, source in np.argwhere(shown & (weight > 0.3)):
                width = 3 * weight[target, source]
                axis.plot(*place[[source, target]].T, color=colour, linewidth=width)
        axis.plot(*place[1:].T, ".", color="#999999")  # all but the query
        axis.plot(*place[question.start], "o", color="#009E73")
        axis.plot(*place[question.answer], "o", color="#D55E00")
        axis.set_title(f"layer {layer + 1}, head {head + 1}: AUC {auc_by_head[layer, head]:.2f}")
        for column, name in enumerate(("passages", "subjects", "objects", "entities")):
            axis.text(column, 2, name, ha="center", color="#666666", fontsize=9)
        axis.set_ylim(top=4)
    return figure


def place_nodes(question):
    """Where the nodes are drawn, in columns: [N, 2]."""
    node_type = np.array(question.node_type)
    subject = node_type == core.SUBJECT
    mention = subject | (node_type == core.OBJECT)
    entity = np.isin(node_type, (core.ENTITY, core.CANDIDATE))
    passage = node_type == core.PASSAGE
    place = np.zeros((len(node_type), 2))
    place[:, 0] = np.select([subject, mention, entity], [1, 2, 3])
    place[mention, 1] = -np.array(question.sentence)[mention]
    for column in (passage, entity):
        place[column, 1] = np.linspace(0, place[:, 1].min(), column.sum())
    return place


def edge_type_means(run):
    """Edge types of the trained reader and, per value and for the accuracy lost, means over seeds.

    {"link", "source", "target": [E] numbers; "attention", ..., "accuracy lost": [E]}
    """
    types = run.values("trained", "edge types")[0]
    link, pair = np.divmod(types, TYPES**2)
    target, source = np.divmod(pair, TYPES)
    means = run.values("trained", "by edge type").mean(axis=0)
    columns = dict(zip(VALUES, means.T, strict=True))
    return {"number": types, "link": link, "source": source, "target": target, **columns}


def edge_type_rows(run):
    """The text of a CSV file: a line per edge type, means over seeds."""
    means = edge_type_means(run)
    lines = ["link,source,target," + ",".join(VALUES)]
    for i in np.argsort(-means["flow"]):
        names = [core.LINKS[means["link"][i]]]
        names += [core.NODE_TYPES[means[end][i]] for end in ("source", "target")]
        lines.append(",".join(names + [f"{means[value][i]:.6g}" for value in VALUES]))
    return "\n".join(lines) + "\n"


def draw_node_types(run):
    """Attention and flow by node types of the two ends, and by link type: means over the seeds."""
    means = edge_type_means(run)
    target, source = means["target"], means["source"]
    present = np.unique([target, source])
    names = [core.NODE_TYPES[number] for number in present]
    figure, axes = core.new_figure(
        run,
        "Attention is spread over many node types; flow runs from subject to object and on to a "
        "subject or candidate",
        "Share of all attention and flow from node type to node type, and by link type; links "
        "only, without a node's attention to itself; sums over questions, layers and heads, means "
        "over seeds",
        columns=3,
        width=12.0,
        height=4.2,
    )
    for axis, label in zip(axes[0], ("attention", "flow"), strict=False):
        table = np.zeros((TYPES, TYPES))
        np.add.at(table, (target, source), means[label])
        table = table[np.ix_(present, present)]
        axis.imshow(table, cmap="Blues", vmin=0)
        for (row, place), share in np.ndenumerate(table):
            colour = "white" if share > 0.6 * table.max() else "black"
            axis.text(place, row, f"{share:.2f}", ha="center", va="center", color=colour)
        axis.grid(False)
        ticks = range(len(names))
        axis.set(title=f"share of {label}", xlabel="from", ylabel="to", xticks=ticks, yticks=ticks)
        axis.set_xticklabels(names, rotation=45, ha="right")
        axis.set_yticklabels(names)
    links = np.unique(means["link"])
    axis = axes[0, 2]
    for place, label in enumerate(("attention", "flow")):
        shares = [means[label][means["link"] == number].sum() for number in links]
        axis.barh(np.arange(len(links)) + 0.4 * place, shares, height=0.4, label=label)
    axis.set(title="by link type", xlabel="share", yticks=np.arange(len(links)) + 0.2)
    axis.set_yticklabels([core.LINKS[number] for number in links])
    axis.legend(fontsize=9)
    return figure


def draw_edge_types(run):
    """Attention, flow and accuracy lost by edge type: means over the seeds."""
    means = edge_type_means(run)
    order = np.argsort(means["flow"])
    figure, axes = core.new_figure(
        run,
        "Answers need the three edge types of the chain, which carry most of the flow",
        "Share of attention, share of flow from start to answer, and accuracy lost without each "
        "edge type; means over questions, layers, heads and seeds",
        columns=3,
        width=11.0,
        height=0.24 * len(order) + 1.6,
        sharey=True,
    )
    rows = range(len(order))
    for axis, label in zip(axes[0], ("attention", "flow", "accuracy lost"), strict=True):
        axis.barh(rows, means[label][order], color="#0072B2")
        axis.set(xlabel=label if label == "accuracy lost" else f"share of {label}", yticks=rows)
    for axis, label in zip(axes[0], ("even attention", "even flow"), strict=False):
        axis.plot(means[label][order], rows, "|", color="black", label=label)
        axis.legend(fontsize=9)
    axes[0, 0].set_yticklabels([edge_type_name(means["number"][i]) for i in order], fontsize=9)
    return figure


if __name__ == "__main__":
    core.main(parser, ARMS, ABLATIONS, trial, CLAIMS, plot, COLUMNS, TINY)

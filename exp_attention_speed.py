"""How much faster and smaller is causal attention when it is fused, with the learned linear bias as a channel?

Entry       attention notebook, 2024-10-10: "all the attention stuff and settings"
Hypothesis  Ours. At 8 x 512 bytes and 4 heads the fused softmax takes 1 / 1.7 of the plain one's time, at 2 x 2048 1 / 2.6, forward
            and backward, where the allocator keeps large blocks; where it returns them, 1 / 3.8 and 1 / 6.6. It needs less than a
            quarter of the memory.
Rule        Interleaved medians in one process, one thread, from queries, keys and values on, 5 seeds; memory: the most that one
            call adds in a process of its own. A claim stands if the 95% interval of the geometric mean is in its range, and falls
            if out of it.
Cost        about 8 min with --jobs 1, as recorded
Quick       `--position linear --allocator keeps --rounds 2 --seeds 3`
"""

import math

import torch

import core_old as core
from core_old import ANY_ABOVE, Check, Claim, Flag, at_least, one_of

FLAGS = [
    Flag("batch-length", core.widths, ((8, 512), (2, 2048), (8, 128)), "sequences, and bytes of each, joined by a comma"),
    Flag("position", one_of("linear", "rotary", "none"), ("linear", "none"), "position scheme"),
    Flag("allocator", one_of("keeps", "returns"), ("keeps", "returns"), "what it does with freed blocks over 32 MiB"),
    Flag("memory", one_of("on", "off"), ("on",), "measure it, too, in a process for each"),
    Flag("dim", at_least(1), (128,), "width"),
    Flag("heads", at_least(1), (4,), "heads"),
    Flag("rounds", at_least(1), (9,), "timed rounds, behind two that are not"),
]
OPTIONS = {
    "attn_activ": "softmax",
    "qk_norm": "none",
    "qk_activ": "none",
    "post_attn_norm": "none",
    "logit_scale": "root",
    "bug": "none",
}


def cell(config: dict) -> dict:
    if len(config["batch_length"]) != 2 or config["batch_length"][1] < 2:
        raise core.UsageError(f"--batch-length {','.join(map(str, config['batch_length']))}: give sequences,bytes, such as 8,512")
    if config["dim"] % config["heads"] or (config["position"] == "rotary" and config["dim"] // config["heads"] % 2):
        raise core.UsageError(
            f"--heads {config['heads']}: must divide --dim {config['dim']}, with rotary positions into even parts"
        )
    return config


def mixing(config: dict, seed: int, kind: str):
    """Forward and backward through the mixing of one layer, from queries, keys and values on, as a call without arguments."""
    (b, t), heads, width = config["batch_length"], config["heads"], config["dim"] // config["heads"]
    with core.initialised_from(seed):
        layer = core.CausalAttention(OPTIONS | config | {"length": t})
        query, key, value = (torch.randn(b, heads, t, width, requires_grad=True) for _ in range(3))

    def call() -> torch.Tensor:
        one, other = layer.prepared(query) / math.sqrt(width), layer.prepared(key)
        mixed = layer.mix_fused(one, other, value) if kind == "fused" else layer.weights(one, other) @ value
        mixed.square().sum().backward()
        return mixed.detach()

    return call


def once(config: dict, seed: int, kind: str) -> None:
    """What a fresh process runs."""
    core.keep_large_blocks(config["allocator"] == "keeps")
    mixing(config, seed, kind)()


def trial(config: dict, seed: int) -> dict:
    b, t = config["batch_length"]
    calls = {kind: mixing(config, seed, kind) for kind in ("plain", "fused")}
    worst = float((calls["plain"]() - calls["fused"]()).abs().max())
    core.keep_large_blocks(config["allocator"] == "keeps")
    seconds = core.interleaved_medians(calls, config["rounds"])
    core.keep_large_blocks()
    memory, small = dict.fromkeys(calls, math.nan), config | {"batch_length": (1, 8)}
    if config["memory"] == "on":
        memory = {kind: core.in_fresh_process(__file__, "once", [config, seed, kind], [small, seed, kind])[1] for kind in calls}
    memory_ratio = memory["plain"] / max(memory["fused"], 4.096e-3)  # a page at least
    result = {"time_ratio": seconds["plain"] / seconds["fused"], "memory_ratio": memory_ratio}
    result |= {f"time_{kind}_ms": 1e3 * seconds[kind] for kind in calls} | {f"{kind}_mb": memory[kind] for kind in calls}
    result |= {"kept_block_mb": {"keeps": 1024.0, "returns": 32.0}[config["allocator"]]}  # the largest freed one that it keeps
    result |= {"macs": 2.0 * b * t**2 * config["dim"] * config["rounds"], "logits_mb": 4e-6 * b * config["heads"] * t**2}
    return result | {"largest_difference": worst}


def faster(times: float, **arm) -> Check:
    return Check("time_ratio", (times, ANY_ABOVE), arm, scale="ratio")


LONG, RETURNS = {"batch_length": (2, 2048)}, {"allocator": "returns"}
CLAIMS = [
    Claim("8 x 512: fused is 1.7 times as fast", "speed", [faster(1.7)]),
    Claim("2 x 2048: 2.6 times", "speed", [faster(2.6, **LONG)]),
    Claim("where the allocator returns blocks, 3.8 and 6.6 times", "speed",
          [faster(3.8, **RETURNS), faster(6.6, **LONG, **RETURNS)]),
    Claim("the same without a position bias", "speed",
          [faster(times, position="none", **arm)
           for times, arm in ((1.7, {}), (2.6, LONG), (3.8, RETURNS), (6.6, LONG | RETURNS))]),
    Claim("it is faster everywhere", "speed", [faster(1.0, **arm) for arm in ({}, LONG, {"batch_length": (8, 128)})]),
    Claim("it needs a quarter of the memory or less", "speed",
          [Check("memory_ratio", (4, ANY_ABOVE), arm, scale="ratio") for arm in ({}, LONG)]),
]  # fmt: skip


def headline(run: core.Run) -> str:
    return f"plain over fused, time: {core.extremes(run, 'time_ratio')}"


def figures(run: core.Run) -> list[core.Figure]:
    rows = {arm: {"time": row["time_ratio"], "memory": row["memory_ratio"]}
            for arm, row in core.by_arm(run, ["time_ratio", "memory_ratio"]).items()}  # fmt: skip
    return [core.dots_figure(rows, "ratios", headline(run), "plain over fused", "log", {"equal": 1.0})]


SMOKE = {
    "batch_length": ((1, 16),),
    "allocator": ("keeps",),
    "position": ("linear",),
    "memory": ("off",),
    "dim": (8,),
    "heads": (2,),
    "rounds": (1,),
}
METRICS = ["time_ratio", "memory_ratio", "time_plain_ms", "time_fused_ms", "plain_mb", "fused_mb", "largest_difference"]
EXPERIMENT = core.Experiment(__file__, __doc__, FLAGS, trial, CLAIMS, figures, headline, METRICS, SMOKE, cell)

if __name__ == "__main__":
    raise SystemExit(core.main(EXPERIMENT))

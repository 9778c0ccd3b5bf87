"""Part `compiled`: one graph for all weights and swaps, CUDA graphs, and the time of a compiled step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters

from restune_diffusion import TunerManager, TunerWeight, attach, schedule
from restune_diffusion.hooks.weights import Weight

from .bases import twin
from .bench import KINDS, Bench, difference, milliseconds, over
from .results import Check, Result, at_most, holds, ratio

BATCH = 2
_STD = 0.02
_LIMITS = {"skip": 1.05, "lora": 1.15}
WEIGHTS: list[Weight] = [
    0.5,
    -0.25,
    {"*": 0.5},
    [0.3, 0.6],
    [1.0, 0.0],
    [0.0, -1.0],
    schedule("0-0.5: 0, 0.5-1: 1"),
    schedule("0-0.2: 1, 0.2-0.8: 0>1, 0.8-1: 0.5"),
    TunerWeight((0.5, 1.0), sites={"*": 0.5}, steps=schedule("0-1: 1>0")),
    1.0,
]


@dataclass
class Graph:
    """A compiled U-Net, with a tuner or none, and what was reported while it was compiled."""

    unet: Any
    compiled: Any
    skips: int
    messages: list[str]

    def __call__(self, call: dict[str, Any]) -> torch.Tensor:
        """Return a prediction that the next call does not overwrite."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            predicted: torch.Tensor = self.compiled(**call, return_dict=False)[0]
        return predicted.clone()


class _Messages(logging.Handler):
    """Handler that keeps the text of all records."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def compiled(bench: Bench, name: str) -> Graph:
    """Return the graph of the base (`plain`) or of the base with a tuner, compiled and run three times."""
    return bench.kept(("compiled", name), lambda: _compile(bench, name))


def call_of(bench: Bench) -> dict[str, Any]:
    """Return the arguments of a pass."""
    return bench.inputs(bench.bases[0], BATCH, bench.half)


def _compile(bench: Bench, name: str) -> Graph:
    unet = twin(bench.unet(bench.bases[0], bench.half))
    if name != "plain":
        attach(unet, bench.tuner(unet, KINDS[name], std=_STD), name)
    options: dict[str, Any] = {"backend": "eager"} if bench.dry else {"mode": "reduce-overhead"}
    graph = Graph(unet, torch.compile(unet, fullgraph=True, **options), 0, [])
    handler, before = _Messages(), counters["inductor"]["cudagraph_skips"]
    logger = logging.getLogger("torch")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):  # compiled, recorded, replayed
                graph(call_of(bench))
    finally:
        logger.removeHandler(handler)
    graph.skips = counters["inductor"]["cudagraph_skips"] - before
    graph.messages = [*handler.texts, *(str(each.message) for each in caught)]
    return graph


def one_graph(bench: Bench) -> Iterator[Result]:
    """Run ten weights and a swap where recompilation is an error, and compare with eager mode."""
    call = call_of(bench)
    for kind in _LIMITS:
        graph = compiled(bench, kind)
        manager = TunerManager.of(graph.unet)
        assert manager is not None
        first, largest, outputs = graph(call), 0.0, []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for weight in WEIGHTS:
                manager.set_weights({kind: weight})
                outputs.append(graph(call))
                largest = max(largest, difference(outputs[-1], _eager(graph, call)))
            back = torch.equal(outputs[-1], first)
            manager.swap(kind, bench.tuner(graph.unet, KINDS[kind], seed=7, std=_STD))
            swapped = graph(call)
            largest = max(largest, difference(swapped, _eager(graph, call)))
            manager.swap(kind, bench.tuner(graph.unet, KINDS[kind], std=_STD))
            back = back and torch.equal(graph(call), first)
        acts = min(difference(other, first) for other in (outputs[0], swapped)) > 1e-3
        yield at_most(f"{kind}, differs from eager mode by", largest, 1e-2)
        yield holds(f"{kind}, the first weight and tuner give the first output again", back and acts, "", "equal")


def _eager(graph: Graph, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        predicted: torch.Tensor = graph.unet(**call, return_dict=False)[0]
    return predicted


def cuda_graphs(bench: Bench) -> Iterator[Result]:
    """Check that `reduce-overhead` records CUDA graphs of all contestants."""
    for name in ("plain", *_LIMITS):
        graph = compiled(bench, name)
        said = [text for text in graph.messages if "skipping cudagraphs" in text.lower()]
        value = said[0][:120] if said else f"{graph.skips} skipped"
        yield holds(name, not said and graph.skips == 0, value, "none skipped")


def step_time(bench: Bench) -> Iterator[Result]:
    """Compare the time of a compiled pass with a tuner with that of the compiled base."""
    call = call_of(bench)
    graphs = {name: compiled(bench, name) for name in ("plain", *_LIMITS)}
    times = bench.in_turn({name: lambda graph=graph: graph(call) for name, graph in graphs.items()})  # type: ignore[misc]
    for name, limit in _LIMITS.items():
        yield ratio(bench, name, over(times, name, "plain"), limit, note=milliseconds(times, name))


CHECKS = (
    Check("Ten weights and a swap in one graph", one_graph),
    Check("CUDA graphs are recorded", cuda_graphs, needs_cuda=True),
    Check("Compiled step / compiled step of the base", step_time),
)

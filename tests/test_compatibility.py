"""What works with what: docs/compatibility.md says what these tests find, cell by cell.

``PYTHONPATH=. python tests/test_compatibility.py`` writes the tables of that page anew.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import compatibility_clients
import compatibility_torch
import pyro
import pytest
import torch
from compatibility import SUBJECTS, directions, inputs, make

from pyro_sinflow import Solver

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
FOUND = {**vars(compatibility_clients), **vars(compatibility_torch)}
CHECKS = {name.removeprefix("check_"): f for name, f in FOUND.items() if name.startswith("check_")}
BRIEF = Solver(max_iter=6)  # where values cannot be read, an inverse runs to its limit


class Row(NamedTuple):
    """A row of the table, and what tests it besides the check of the same name."""

    title: str
    check: str
    also: tuple[str, ...] = ()
    slow: bool = False  # only with -m slow
    brief: bool = False  # whether inverses run to their limit


GROUPS = {
    "Pyro": [
        Row("`TransformedDistribution`, both directions", "transformed_distribution"),
        Row("`SVI`, `pyro.module`", "svi",
            ("test_pyro.py::test_pyro_module_registers_parameters",)),
        Row("`TraceGraph_ELBO`", "trace_graph"),
        Row("nested plates", "plates"),
        Row("parameter store, saved and loaded", "param_store"),
        Row("`NUTS`, as a prior", "nuts", ("test_pyro.py::test_bayesian_parameters",)),
        Row("autoguide, `NeuTraReparam`", "neutra", ("test_guides.py::test_neutra",)),
        Row("`render_model`", "render_model", ("test_guides.py::test_render_model",)),
        Row("`ConditionalTransformedDistribution`", "conditional"),
    ],
    "zuko": [
        Row("`zuko.lazy.Flow`, `LazyInverse`", "zuko_flow"),
        Row("`ComposedTransform`", "zuko_composition"),
        Row("`Mixture`, `MixtureSameFamily`", "mixtures"),
        Row("`BayesianModel`", "bayesian", ("test_weights.py::test_samples_of_a_bayesian_flow",)),
    ],
    "Simulation-based inference": [
        Row("`sbi.inference.NPE`", "sbi", ("test_simulation.py::test_simulation",)),
        Row("`lampe.inference.NPE`", "lampe", ("test_simulation.py::test_simulation",)),
    ],
    "Transformations of functions": [
        Row("`torch.compile(fullgraph=True)`", "compile",
            ("test_compile.py::test_training_step",), slow=True, brief=True),
        Row("`torch.func.grad`", "func_grad"),
        Row("`torch.func.vmap`", "vmap"),
        Row("`torch.func.jacrev`", "jacrev"),
        Row("`torch.func.jacfwd`", "jacfwd"),
        Row("`torch.func.functional_call`", "functional_call"),
        Row("forward-mode differentiation", "forward_mode"),
        Row("double backward", "double_backward",
            ("test_derivatives.py::test_two_orders_of_an_inverse_need_no_option",)),
    ],
    "Dtypes and devices": [
        Row("autocast to bfloat16", "autocast"),
        Row("bfloat16 and float16 weights", "half"),
        Row("float64", "float64"),
        Row("meta tensors", "meta", brief=True),
        Row("CUDA", "cuda", ("test_compatibility.py::test_on_a_gpu",), brief=True),
        Row("CUDA graphs", "cuda_graph", ("test_compatibility.py::test_cuda_graph",
            "test_examples.py::test_a_step_is_that_of_the_optimizer")),
    ],
    "Modules, files and processes": [
        Row("`pickle`, `deepcopy`, `torch.save` of the object", "copies"),
        Row("`state_dict`", "state_dict"),
        Row("`torch.jit.trace`", "trace", brief=True),
        Row("`torch.export`", "export",
            ("test_deployment.py::test_export",), slow=True, brief=True),
        Row("`weight_norm` and other parametrizations", "weight_norm"),
        Row("`DistributedDataParallel`", "ddp",
            ("test_distributed.py::test_two_processes_fit_what_one_fits",)),
        Row("`fully_shard` (FSDP2)", "fsdp"),
        Row("`DataParallel`", "data_parallel"),
    ],
}  # fmt: skip
ROWS = [row for rows in GROUPS.values() for row in rows]

NOTES = {
    "guide": "Pyro's `AutoNormalizingFlow` builds its transform from the number of latent "
    "variables and stores the parameters in the guide. Use `LDU` or `AutoLDU`.",
    "lazy": "Through `zuko.lazy.UnconditionalTransform`, which holds the tensors.",
    "pyro": "zuko calls its parts with a context; these raise a `TypeError` that names the "
    "substitute: `ConditionalLDU(features)`, or "
    "`UnconditionalTransform(SinusoidalTransform, ...)`.",
    "flow": "As a transform of a `zuko.lazy.Flow`.",
    "iterations": "Both directions. An inverse takes a fixed number of iterations: set "
    "`Solver(max_iter=...)`, or the program is large and slow to build.",
    "compile": "As for zuko's own flows, with "
    "`torch._dynamo.config.rewrite_assert_with_torch_assert = False`.",
    "leaf": "A transform or distribution that was built with a graph can be pickled, and copied "
    "only under `torch.no_grad()`: `deepcopy` of torch takes no tensors with a graph. Modules "
    "have no such limit.",
    "gpu": "The test that needs a GPU is marked `gpu` and was not run for this table. The check "
    "that ran uses fake tensors on a device without values.",
    "graph": "With `pyro.enable_validation(False)`. Inverses take a fixed number of passes. The "
    "tests that capture are marked `gpu` and were not run for this table. The check that ran finds "
    "that the explicit direction reads no values; "
    "`test_devices.py::test_samples_read_no_values_during_the_capture_of_a_graph` shows it for "
    "inverses.",
    "inside": "If the log-density or the sample is also computed inside the call. A distribution "
    "`flow(c)` that leaves it has new parameters in some parts, and the module's own in others, as "
    "those of zuko's flows do.",
    "batch": "Like zuko's transforms, those of a flow do not tell the batch shape of the context: "
    "expand the base to it. `ConditionalLDU.condition` does tell it.",
    "device": "The check replicates the module as `DataParallel` does on each device, on the CPU.",
}
ANY = tuple(SUBJECTS)
MODULES = ("ConditionalLDU", "SinusoidalFlow", "fast_inverse")
TENSORS = ("SinusoidalTransform", "TriangularTransform", "LDUTransform")


class Cell(NamedTuple):
    """What the table says: "yes", "partly", "no" (with the error that says so) or "–"."""

    mark: str = "yes"
    notes: tuple[str, ...] = ()
    error: str = ""


# The cells that say something else than yes.
CELLS: dict[tuple[str, str], Cell] = {
    **{("transformed_distribution", c): Cell("yes", ("batch",)) for c in MODULES},
    **{("functional_call", c): Cell("yes", ("inside",)) for c in MODULES},
    **{("neutra", c): Cell("–") for c in TENSORS},
    **{("neutra", c): Cell("no", ("guide",), "transforms must be a Transform") for c in MODULES},
    **{("conditional", c): Cell("–") for c in ANY if c != "ConditionalLDU"},
    **{("zuko_flow", c): Cell("yes", ("lazy",)) for c in TENSORS},
    ("zuko_flow", "LDU, Sinusoidal"): Cell("no", ("pyro",), "got NoneType"),
    ("zuko_flow", "AutoLDU"): Cell("–"),
    **{(r, c): Cell("–") for r in ("sbi", "lampe") for c in ANY if c not in MODULES},
    **{(r, "ConditionalLDU"): Cell("yes", ("flow",)) for r in ("sbi", "lampe")},
    **{(r, c): Cell("yes", ("iterations",)) for r in ("compile", "trace", "export") for c in ANY},
    **{
        (r, c): Cell("yes", ("iterations", "compile"))
        for r in ("compile", "export")
        for c in ("SinusoidalFlow", "fast_inverse")
    },
    **{("copies", c): Cell("yes", ("leaf",)) for c in ANY},
    **{("cuda", c): Cell("yes", ("gpu",)) for c in ANY},
    **{("cuda_graph", c): Cell("partly", ("graph",)) for c in ANY},
    ("weight_norm", "SinusoidalTransform"): Cell("–"),
    **{("data_parallel", c): Cell("yes", ("device",)) for c in ANY},
}


def cell(check: str, column: str) -> Cell:
    return CELLS.get((check, column), Cell())


def variants() -> Iterator[tuple[str, str]]:
    return ((column, v) for column, made in SUBJECTS.items() for v in made)


def cases() -> Iterator:
    for row in ROWS:
        for column, variant in variants():
            if cell(row.check, column).mark != "–":
                yield pytest.param(
                    row,
                    column,
                    variant,
                    id="-".join(filter(None, (row.check, column, variant))),
                    marks=[pytest.mark.slow] if row.slow else [],
                )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")  # of few iterations
@pytest.mark.parametrize(("row", "column", "variant"), [*cases()])
def test_cell(row, column, variant, monkeypatch):
    # torch's own distributions look at values, which fake and exported tensors lack.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    check = CHECKS[row.check]
    claim = cell(row.check, column)
    subject = make(column, variant, BRIEF if row.brief else Solver())
    if claim.mark == "no":
        with pytest.raises((TypeError, ValueError), match=claim.error):
            check(subject)
    else:
        check(subject)


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize(("column", "variant"), [*variants()]),
]


def on_gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


def on_cpu_and_gpu(column, variant):
    s = make(column, variant).double()
    given = [None if t is None else t.cuda() for t in inputs(s, 5)]
    on_cpu = [f(*[None if t is None else t.cpu() for t in given]) for f in directions(s)]
    return s.cuda(), given, on_cpu


@on_gpu
def test_on_a_gpu(column, variant):
    s, given, expected = on_cpu_and_gpu(column, variant)
    for f, value in zip(directions(s), expected, strict=True):
        result = f(*given)
        assert result.is_cuda
        assert torch.allclose(result.cpu(), value, atol=1e-9)


@on_gpu
def test_cuda_graph(column, variant):
    s, (x, c), expected = on_cpu_and_gpu(column, variant)
    held, graph, stream = torch.zeros_like(x), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with pyro.validation_enabled(False):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                s(held, c)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            value = s(held, c)
    held.copy_(x)
    graph.replay()
    assert torch.allclose(value.cpu(), expected[0], atol=1e-9)


# The page


def tables() -> str:
    """The tables of the page, with the notes that they refer to."""
    lines = []
    for group, rows in GROUPS.items():
        lines += [f"## {group}", "", line(["", *(f"`{c}`" for c in headers()), "tests"])]
        lines.append(line(["---", *("---" for _ in ANY), "---"]))
        for row in rows:
            cells = [cell(row.check, column) for column in ANY]
            marks = [c.mark + "".join(f"[^{n}]" for n in c.notes) for c in cells]
            slow = " (`-m slow`)" if row.slow else ""
            tests = [f"`-k {row.check}`{slow}", *(f"`{name}`" for name in row.also)]
            lines.append(line([row.title, *marks, ", ".join(tests)]))
        lines.append("")
    lines += [f"[^{name}]: {text}" for name, text in NOTES.items()]
    return "\n".join(lines)


def headers() -> list[str]:
    return [column.replace(", ", "`, `") for column in ANY]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


BEGIN, END = "<!-- tables -->\n", "\n<!-- end of tables -->"


def test_the_page_says_what_the_tests_find():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == tables(), __doc__


def test_every_note_and_exception_is_used():
    used = {note for c in CELLS.values() for note in c.notes}
    assert used == {*NOTES}
    names = {row.check for row in ROWS}
    assert {check for check, _ in CELLS} <= names
    assert {column for _, column in CELLS} <= {*ANY}
    assert {*CHECKS} == names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.check)
def test_the_tests_that_the_page_names_exist(row):
    for name in row.also:
        file, _, function = name.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        assert function in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()

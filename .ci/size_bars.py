"""Measures the bars of size and care that keep this repository readable; fails when one is passed.

    python .ci/size_bars.py [ROOT]

Standard library only, nothing is imported: the files are parsed. Definitions:
- files: Python files under LIBRARY and benchmarks/ that hold code (an empty __init__.py does not);
- code lines: lines with a token that is neither comment nor docstring; every other length is in
  plain lines, docstrings included;
- functions: top-level functions and methods, from `def` to the last line; a nested function is
  part of the one around it;
- arguments: all parameters but self and cls; `*args` and `**kwargs` count one each;
- public: no leading underscore in the name of the function or of its class; of the dunder methods
  only __init__ and __call__;
- imports count wherever they stand: one inside a function hides a cycle, it does not remove it.
"""

import ast
import dataclasses
import io
import math
import pathlib
import statistics
import sys
import tokenize
from collections.abc import Iterator

LIBRARY = ("jaxmodels", "kernels_pallas", "train", "configs")
MEASURED = (*LIBRARY, "benchmarks")
FILE_LINES = {"median": 180, "p90": 400, "max": 600}
FUNCTION_LINES = {"median": 12, "p90": 40, "max": 100}
KERNEL_FUNCTION_LINES = 200
MAX_ARGUMENTS = 8
# Ten methods, seven families of trunks with their weights, a trainer and kernels; levanter, the
# nearest in scope, has 32,777.
MAX_CODE_LINES = 33_000
TEST_RATIO = (0.6, 1.0)
SHOWN = 12  # offenders listed for each bar

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Function:
    """One function or method: where it stands, and what the bars ask about it."""

    where: str
    name: str
    lines: int
    arguments: int
    public: bool
    annotated: bool


@dataclasses.dataclass(frozen=True)
class File:
    """One parsed source file: `path` and `module` relative to the root."""

    path: pathlib.Path
    module: str
    lines: int
    code_lines: int
    functions: tuple[Function, ...]
    public_names: int
    undocumented: tuple[str, ...]
    tree: ast.Module


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of the table; `offenders` say where to look; a bar that only warns never fails."""

    name: str
    measured: str
    wanted: str
    passed: bool
    offenders: tuple[str, ...] = ()
    only_warns: bool = False


def code_lines(text: str, tree: ast.Module) -> int:
    """Number of lines of `text` that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | _Function) and ast.get_docstring(node):
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def _definitions(tree: ast.Module) -> Iterator[tuple[_Function, str]]:
    """Top-level functions and methods, each with its name in full (`Class.method`)."""
    pending = [(node, "") for node in tree.body]
    while pending:
        node, prefix = pending.pop(0)
        if isinstance(node, _Function):
            yield node, prefix + node.name
        elif isinstance(node, ast.ClassDef):
            pending = [(child, f"{prefix}{node.name}.") for child in node.body] + pending
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending = [(child, prefix) for child in ast.iter_child_nodes(node)] + pending


def _is_public(name: str) -> bool:
    *classes, last = name.split(".")
    special = last in ("__init__", "__call__")
    return not any(c.startswith("_") for c in classes) and (special or not last.startswith("_"))


def _measure_function(node: _Function, name: str, path: pathlib.Path) -> Function:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    every += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if "." in name and not static and every:
        every = every[1:]
    returns = node.returns is not None or node.name == "__init__"
    return Function(
        where=f"{path}:{node.lineno}",
        name=name,
        lines=node.end_lineno - node.lineno + 1,
        arguments=len(every),
        public=_is_public(name),
        annotated=returns and all(argument.annotation for argument in every),
    )


def parse(root: pathlib.Path, path: pathlib.Path) -> File:
    """Measures one file; SyntaxError, naming it, where it is not Python."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    short = path.relative_to(root)
    parts = short.with_suffix("").parts
    public = [(f"{short}:1", "module", tree)] if code_lines(text, tree) else []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | _Function) and not node.name.startswith("_"):
            public.append((f"{short}:{node.lineno}", node.name, node))
    return File(
        path=short,
        module=".".join(parts[:-1] if parts[-1] == "__init__" else parts),
        lines=len(text.splitlines()),
        code_lines=code_lines(text, tree),
        functions=tuple(_measure_function(node, name, short) for node, name in _definitions(tree)),
        public_names=len(public),
        undocumented=tuple(
            f"{at} {name}" for at, name, node in public if not ast.get_docstring(node)
        ),
        tree=tree,
    )


def read(root: pathlib.Path, folders: tuple[str, ...]) -> list[File]:
    """All Python files under these folders of `root`, by path; absent folders are skipped."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return [parse(root, path) for path in paths]


def imports(file: File, modules: set[str]) -> dict[str, int]:
    """The modules among `modules` that `file` imports, each with the first line that does so."""
    is_package = file.path.name == "__init__.py"
    package = file.module if is_package else file.module.rpartition(".")[0]
    found: dict[str, int] = {}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            # `from package import name` means package.name where that is a module, else package.
            both = [(f"{base}.{alias.name}", base) for alias in node.names]
            names = [whole if whole in modules else parent for whole, parent in both]
        else:
            continue
        for name in names:
            if name in modules and name != file.module:
                found.setdefault(name, node.lineno)
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected, two or more), each sorted."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = graph.get(pending.pop(), set()) - seen
            seen |= new
            pending.extend(new)
        return seen

    reach = {node: reached(node) for node in graph}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach.get(other, ())))
        for node in graph
        if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def _module_cycles(files: list[File]) -> list[str]:
    modules = {file.module for file in files}
    graph = {file.module: set(imports(file, modules)) for file in files}
    return [" <-> ".join(group) for group in cycles(graph)]


def _package_cycles(files: list[File]) -> list[str]:
    modules = {file.module for file in files}
    graph: dict[str, set[str]] = {}
    for file in files:
        top = file.module.split(".")[0]
        targets = {name.split(".")[0] for name in imports(file, modules)}
        graph.setdefault(top, set()).update(targets - {top})
    return [" <-> ".join(group) for group in cycles(graph)]


def _spread(what: str, sizes: list[tuple[int, str]], limits: dict[str, int]) -> Bar:
    """The bar on median, 90th percentile and maximum of (lines, place); largest first."""
    ordered = sorted(size for size, _ in sizes) or [0]
    found = {
        "median": statistics.median(ordered),
        "p90": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "max": ordered[-1],
    }
    worst = sorted(sizes, reverse=True)
    if found["median"] <= limits["median"] and found["p90"] <= limits["p90"]:
        worst = [(size, place) for size, place in worst if size > limits["max"]]
    return Bar(
        name=f"{what} lines, median/p90/max",
        measured="/".join(f"{value:g}" for value in found.values()),
        wanted="/".join(f"{value}" for value in limits.values()),
        passed=all(found[key] <= limits[key] for key in limits),
        offenders=tuple(f"{place}: {size} lines" for size, place in worst),
    )


def _function_bars(functions: list[Function]) -> list[Bar]:
    kernels = [f for f in functions if f.where.startswith("kernels_pallas")]
    others = [f for f in functions if not f.where.startswith("kernels_pallas")]
    long_kernels = [f"{f.where} {f.name}" for f in kernels if f.lines > KERNEL_FUNCTION_LINES]
    many = [f"{f.where} {f.name}: {f.arguments}" for f in functions if f.arguments > MAX_ARGUMENTS]
    bare = [f"{f.where} {f.name}" for f in functions if f.public and not f.annotated]
    public = sum(f.public for f in functions)
    kernel_max = max((f.lines for f in kernels), default=0)
    most = max((f.arguments for f in functions), default=0)
    return [
        _spread("function", [(f.lines, f"{f.where} {f.name}") for f in others], FUNCTION_LINES),
        _at_most("kernel function lines, max", kernel_max, KERNEL_FUNCTION_LINES, long_kernels),
        _at_most("arguments of a function", most, MAX_ARGUMENTS, many),
        _complete("annotated public functions", public - len(bare), public, bare),
    ]


def _at_most(name: str, value: int, limit: int, offenders: list[str]) -> Bar:
    return Bar(name, f"{value:,}", f"<= {limit:,}", value <= limit, tuple(offenders))


def _complete(name: str, part: int, whole: int, offenders: list[str]) -> Bar:
    return Bar(name, f"{part}/{whole}", "all", not offenders, tuple(offenders))


def _ratio_bar(tests: int, library: int) -> Bar:
    low, high = TEST_RATIO
    ratio = tests / max(library, 1)
    return Bar(
        name="code lines of tests / of library",
        measured=f"{ratio:.2f} ({tests:,}/{library:,})",
        wanted=f"{low}-{high}",
        passed=low <= ratio <= high,
        only_warns=ratio > high,
    )


def bars(root: pathlib.Path) -> list[Bar]:
    """All bars measured on the tree at `root`, in the order of the table."""
    files = [file for file in read(root, MEASURED) if file.code_lines]
    total = sum(file.code_lines for file in files)
    functions = [function for file in files for function in file.functions]
    undocumented = [place for file in files for place in file.undocumented]
    names = sum(file.public_names for file in files)
    library = [file for file in files if file.module.split(".")[0] in LIBRARY]
    tests = sum(file.code_lines for file in read(root, ("tests",)))
    ours = [file for file in files if file.module.split(".")[0] == "jaxmodels"]
    module_cycles, package_cycles = _module_cycles(ours), _package_cycles(files)
    return [
        _at_most("code lines", total, MAX_CODE_LINES, []),
        _spread("file", [(file.lines, str(file.path)) for file in files], FILE_LINES),
        *_function_bars(functions),
        _complete("public names with a docstring", names - len(undocumented), names, undocumented),
        _ratio_bar(tests, sum(file.code_lines for file in library)),
        _at_most("import cycles, top-level packages", len(package_cycles), 0, package_cycles),
        _at_most("import cycles, modules of jaxmodels", len(module_cycles), 0, module_cycles),
    ]


def report(measured: list[Bar]) -> str:
    """The table, and under it where the failing bars fail."""
    lines = [f"{'bar':<38}{'measured':>22}{'wanted':>16}"]
    for bar in measured:
        mark = "" if bar.passed else "  (warning)" if bar.only_warns else "  FAILED"
        lines.append(f"{bar.name:<38}{bar.measured:>22}{bar.wanted:>16}{mark}")
    for bar in (bar for bar in measured if not bar.passed and bar.offenders):
        lines += [f"\n{bar.name}, wanted {bar.wanted}:"]
        lines += [f"  {place}" for place in bar.offenders[:SHOWN]]
        left = len(bar.offenders) - SHOWN
        lines += [f"  ... and {left} more"] if left > 0 else []
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Prints the table for the tree given (default: this repository); 1 when a bar is passed."""
    root = pathlib.Path(arguments[0] if arguments else pathlib.Path(__file__).parents[1])
    measured = bars(root.resolve())
    print(report(measured))
    return int(any(not bar.passed and not bar.only_warns for bar in measured))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

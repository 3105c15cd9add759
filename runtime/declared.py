"""Finds the durations that an app declares, by reading its source; nothing of the app is imported or run (requirement A14).

    declared.py FOLDER APP_FILE

Prints one line of JSON for the operator, which compares it with the tiers:

    {"declaredDurations": 1,         the form's version
     "functions": [{"name": "generate", "file": "app.py", "line": 12, "seconds": 300, "size": "xlarge"}],
     "computed": 0,                  calls of the decorator whose duration or size is known only when they run
     "unread": 0,                    files that were not looked at
     "leftOut": 0}                   functions for which the line had no room

`seconds` is what the client sends on cards without a factor (L19); `written` stands beside it where the source says something
else. `default` marks a function that names no duration, `size` is left out for large.

What is not certain is `computed`, so that nobody is warned of what may be right.
"""

import ast
import datetime
import json
import os
import resource
import stat
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

FORM = 1
# kubelet keeps 4096 bytes of a container's last words.
REPORT_BYTES_MAX = 4000
# An app's own code is some dozen files of some thousand lines; what is beyond these bounds is data, or meant to keep us busy.
ENTRIES_MAX = 20_000
FILES_MAX = 500
FILE_BYTES_MAX = 512 * 1024
# The parser needs up to a few hundred times the size of a file. Less than the container's own request.
MEMORY_BYTES_MAX = 224 << 20
CPU_SECONDS_MAX = 10
# Names and paths longer than that are cut.
NAME_CHARACTERS_MAX = 64
FILE_CHARACTERS_MAX = 120
# What counts as a duration at all; larger numbers only cost time.
NUMBER_MAX = 10**12
# The client sends this where the decorator names none.
DEFAULT_SECONDS = 60
SECONDS_OF_A_DAY = 24 * 60 * 60
# Not the app's own code. Environments are known by their pyvenv.cfg, whatever they are called.
FOREIGN_FOLDERS = {"__pycache__", "node_modules", "site-packages"}

SIZES = {"large", "xlarge"}
TIMEDELTA_FIELDS = ("days", "seconds", "microseconds", "milliseconds", "minutes", "hours", "weeks")

Number = int | float | datetime.timedelta


class Computed(Exception):
    """Known only when the app runs."""


class Source:
    """What one file's names mean."""

    def __init__(self, tree: ast.Module) -> None:
        self.spaces: set[str] = set()
        self.gpu: set[str] = set()
        self.datetime: set[str] = set()
        self.timedelta: set[str] = set()
        self.constants: dict[str, ast.expr] = {}
        bound: Counter[str] = Counter()
        may_bind_anything = False
        for node in ast.walk(tree):
            bound.update(bindings(node))
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name == "spaces" or (alias.name.startswith("spaces.") and not alias.asname):
                        self.spaces.add(alias.asname or "spaces")
                    if alias.name == "datetime":
                        self.datetime.add(alias.asname or "datetime")
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    if node.module == "spaces" and alias.name in ("GPU", "*"):
                        self.gpu.add("GPU" if alias.name == "*" else alias.asname or "GPU")
                    elif node.module == "datetime" and alias.name == "timedelta":
                        self.timedelta.add(alias.asname or "timedelta")
                    may_bind_anything |= alias.name == "*" and node.module != "spaces"
            elif isinstance(node, ast.ImportFrom):
                may_bind_anything |= any(alias.name == "*" for alias in node.names)
        if may_bind_anything:
            return
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                target, value = node.target, node.value
            else:
                continue
            # Bound a second time anywhere, also as a local of the same name: who knows which it is.
            if isinstance(target, ast.Name) and bound[target.id] == 1:
                self.constants[target.id] = value

    def is_gpu(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.gpu
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "GPU"
            and isinstance(node.value, ast.Name)
            and node.value.id in self.spaces
        )

    def is_timedelta(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.timedelta
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "timedelta"
            and isinstance(node.value, ast.Name)
            and node.value.id in self.datetime
        )

    def value(self, node: ast.expr, seen: frozenset[str] = frozenset()) -> Number | str | None:
        """The constant that an expression is; None is Python's own."""
        match node:
            case ast.Constant(value=None | str()):
                return node.value
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return sane(node.value)
            case ast.Name(id=name) if name in self.constants and name not in seen:
                return self.value(self.constants[name], seen | {name})
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                number = self.number(operand, seen)
                return number if isinstance(node.op, ast.UAdd) else -number
            case ast.BinOp(left=left, right=right):
                return sane(calculated(node.op, self.number(left, seen), self.number(right, seen)))
            case ast.Call(func=function) if self.is_timedelta(function):
                return self.timedelta_of(node, seen)
        raise Computed

    def number(self, node: ast.expr, seen: frozenset[str]) -> Number:
        value = self.value(node, seen)
        if value is None or isinstance(value, str):
            raise Computed
        return value

    def timedelta_of(self, call: ast.Call, seen: frozenset[str]) -> Number:
        if len(call.args) > len(TIMEDELTA_FIELDS):
            raise Computed
        fields = dict(zip(TIMEDELTA_FIELDS, (self.number(value, seen) for value in call.args)))
        for keyword in call.keywords:
            if keyword.arg not in TIMEDELTA_FIELDS or keyword.arg in fields:
                raise Computed
            fields[keyword.arg] = self.number(keyword.value, seen)
        if any(isinstance(value, datetime.timedelta) for value in fields.values()):
            raise Computed
        try:
            return sane(datetime.timedelta(**fields))
        except (OverflowError, ValueError):
            raise Computed from None


def bindings(node: ast.AST) -> Iterator[str]:
    """Names that a node binds, in whatever scope."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.arg(arg=name):
            yield name
        case ast.Import() | ast.ImportFrom():
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            yield from names
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.MatchMapping(rest=str(name)):
            yield name


def calculated(operator: ast.operator, left: Number, right: Number) -> Number:
    try:
        match operator:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
            case ast.FloorDiv():
                return left // right
    except (TypeError, ArithmeticError, ValueError):
        pass
    raise Computed


def sane(number: Number) -> Number:
    seconds = number.total_seconds() if isinstance(number, datetime.timedelta) else number
    # Also false for what is no number.
    if -NUMBER_MAX <= seconds <= NUMBER_MAX:
        return number
    raise Computed


def declared(source: Source, call: ast.Call | None) -> tuple[dict, ast.expr | None]:
    """What the decorator is told, and the function if it is given one; without a call nothing is named."""
    duration: Number | None = None
    size: str | None = None
    task = None
    if call is not None:
        if len(call.args) > 1 or any(isinstance(argument, ast.Starred) for argument in call.args):
            raise Computed
        for keyword in call.keywords:
            if keyword.arg == "duration":
                value = source.value(keyword.value)
                if isinstance(value, str):
                    raise Computed
                duration = value
            elif keyword.arg == "size":
                value = source.value(keyword.value)
                if value is not None and value not in SIZES:
                    raise Computed
                size = value
            elif keyword.arg is None:
                raise Computed
        # Positional it is a size, a duration or the function itself, and beats the keyword.
        for argument in call.args:
            try:
                value = source.value(argument)
            except Computed:
                task = argument
                continue
            if isinstance(value, str):
                if value not in SIZES:
                    raise Computed
                size = value
            elif value is not None:
                duration = value
    found: dict = {"seconds": DEFAULT_SECONDS}
    if duration is None:
        found["default"] = True
    else:
        length = duration if isinstance(duration, datetime.timedelta) else datetime.timedelta(seconds=duration)
        # The client sends this field, which has neither days nor fractions.
        found["seconds"] = length.seconds
        if not 0 <= length.total_seconds() < SECONDS_OF_A_DAY:
            found["written"] = int(length.total_seconds())
    if size == "xlarge":
        found["size"] = size
    return found, task


def name_of(node: ast.expr | None) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr=name):
            return name
    return "a function"


def uses(tree: ast.Module, source: Source) -> Iterator[tuple[str, int, ast.Call | None, bool]]:
    """Each use of the decorator: name of the function, line, its call if it is called, and whether the name is certain."""
    done: set[int] = set()
    calls: list[ast.Call] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if source.is_gpu(decorator):
                    yield node.name, decorator.lineno, None, True
                elif isinstance(decorator, ast.Call) and source.is_gpu(decorator.func):
                    done.add(id(decorator))
                    yield node.name, decorator.lineno, decorator, True
        elif isinstance(node, ast.Call):
            calls.append(node)
    for call in calls:
        # GPU(duration=60)(function)
        inner = call.func
        if isinstance(inner, ast.Call) and source.is_gpu(inner.func) and id(inner) not in done and call.args:
            done.add(id(inner))
            yield name_of(call.args[0]), inner.lineno, inner, True
    for call in calls:
        if source.is_gpu(call.func) and id(call) not in done:
            yield "", call.lineno, call, False


def scan(text: bytes, file: str) -> tuple[list[dict], int]:
    """The functions of one file, and how many are computed."""
    tree = ast.parse(text)
    source = Source(tree)
    found, computed = [], 0
    for name, line, call, certain in uses(tree, source):
        try:
            what, task = declared(source, call)
        except Computed:
            computed += 1
            continue
        # As a decorator it gets its function from Python, so an argument that is no constant is not that.
        if certain and task is not None:
            computed += 1
            continue
        name = name if certain else name_of(task)
        found.append({"name": name[:NAME_CHARACTERS_MAX], "file": file[-FILE_CHARACTERS_MAX:], "line": line, **what})
    return found, computed


def python_files(folder: Path, app_file: str) -> Iterator[Path | None]:
    """The app file, then everything else from the outside in; None for what is beyond the bounds."""
    first = folder / app_file
    yield first
    files = entries = 0
    waiting = deque([folder])
    while waiting:
        current = waiting.popleft()
        inner, here = [], []
        try:
            with os.scandir(current) as listing:
                for entry in listing:
                    entries += 1
                    if entries > ENTRIES_MAX:
                        yield None
                        return
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(".") and entry.name not in FOREIGN_FOLDERS:
                            inner.append(Path(entry.path))
                    elif entry.name.endswith(".py"):
                        here.append(Path(entry.path))
                    elif entry.name == "pyvenv.cfg":
                        inner, here = [], []
                        break
        except OSError:
            yield None
            continue
        waiting.extend(sorted(inner))
        for path in sorted(here):
            if path == first:
                continue
            files += 1
            if files > FILES_MAX:
                yield None
                return
            yield path


def read(path: Path) -> bytes | None:
    """A regular file within the bound; links are not followed, and nothing else is waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            text = file.read(FILE_BYTES_MAX + 1)
        except OSError:
            return None
    return text if len(text) <= FILE_BYTES_MAX else None


def look(folder: Path, app_file: str) -> dict:
    functions: list[dict] = []
    computed = unread = 0
    for path in python_files(folder, app_file):
        text = read(path) if path is not None else None
        if text is None:
            unread += 1
            continue
        # Without these words there is nothing to find, and most files need not be parsed.
        if b"spaces" not in text or b"GPU" not in text:
            continue
        try:
            # A name that is not UTF-8 must not make the whole report one that cannot be read.
            file = os.fsencode(path.relative_to(folder)).decode(errors="replace")
            found, of_file = scan(text, file)
        except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
            unread += 1
            continue
        functions += found
        computed += of_file
    return {"functions": functions, "computed": computed, "unread": unread}


def report(functions: list[dict], computed: int, unread: int) -> str:
    """One line; where there is no room for all, the longest stay: what any tier refuses is among them."""

    def line(rows: list[dict]) -> str:
        left_out = len(functions) - len(rows)
        form = {"declaredDurations": FORM, "functions": rows, "computed": computed, "unread": unread, "leftOut": left_out}
        return json.dumps(form, separators=(",", ":"))

    # A whole card counts twice, and its longest call may be half as long.
    by_weight = sorted(functions, key=lambda row: row["seconds"] * (2 if "size" in row else 1), reverse=True)
    # A row has more than 40 bytes.
    rows = by_weight[: REPORT_BYTES_MAX // 40]
    while rows and len(line(rows)) > REPORT_BYTES_MAX:
        rows.pop()
    return line(rows)


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: declared.py FOLDER APP_FILE", file=sys.stderr)
        return 2
    # A file can be made so that parsing it takes everything; that must not end the container.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS_MAX, CPU_SECONDS_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    print(report(**look(Path(sys.argv[1]), sys.argv[2])))
    return 0


if __name__ == "__main__":
    sys.exit(main())

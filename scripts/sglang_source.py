"""SGLang's sources as data: look up dotted names in a wheel's syntax trees without importing anything."""

from __future__ import annotations

import ast
import functools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """The definition of a dotted name.

    Attributes:
        kind: "module", "class", "function", "property", "value" (of a module or class) or "attribute" (of an instance).
        where: `path:line` of the definition.
        parameters: names of a function's parameters in order, as `inspect.signature` would give them for the dotted
            name; of a class those of its `__init__`; None if not applicable.
        text: the definition in short: a signature with defaults, or a value's source.
    """

    kind: str
    where: str
    parameters: tuple[str, ...] | None = None
    text: str = ""


@dataclass(eq=False)
class _Class:
    module: _Module
    node: ast.ClassDef
    members: dict[str, ast.AST] = field(default_factory=dict)
    instance: dict[str, ast.AST] = field(default_factory=dict)


@dataclass(eq=False)
class _Module:
    name: str
    path: str
    is_package: bool
    names: dict[str, ast.AST] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # name -> (module, attribute)
    stars: list[str] = field(default_factory=list)


class Sources:
    """The Python sources of one SGLang: an unpacked wheel, a site-packages folder, or a wheel file."""

    def __init__(self, root: Path) -> None:
        """Open `root`.

        Raises:
            FileNotFoundError: it has no package `sglang`.
        """
        self._files = _ZipFiles(root) if root.is_file() else _FolderFiles(root)
        if not self._files.has("sglang/__init__.py"):
            raise FileNotFoundError(f"{root} has no package sglang")
        self.version = self._files.version() or root.name
        self._modules: dict[str, _Module | None] = {}

    def find(self, dotted: str) -> Found | None:
        """Look up `dotted`; None if it does not exist. Follows imports, bases and attributes of instances."""
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            module = self._module(".".join(parts[:length]))
            if module is not None:
                return self._walk(module, parts[length:])
        return None

    def members(self, dotted: str) -> dict[str, Found]:
        """Return all members of a class, including inherited ones."""
        owner = self._class_named(dotted)
        if owner is None:
            return {}
        found = {}
        for base in self._mro(owner):
            for name in (*base.members, *base.instance):
                if name not in found:
                    found[name] = self._member(owner, name)
        return {name: item for name, item in found.items() if item is not None}

    def words(self, module: str) -> frozenset[str]:
        """Return all strings in a module."""
        found = self._module(module)
        tree = ast.parse(self._files.read(found.path)) if found is not None else ast.Module([], [])
        return frozenset(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))

    # -------------------------------------------------------------------------------------------------- resolution

    def _walk(self, module: _Module, rest: list[str]) -> Found | None:
        if not rest:
            return Found("module", module.path)
        target = self._global(module, rest[0])
        if target is None:
            return None
        return self._describe(target, rest[1:])

    def _global(self, module: _Module, name: str, depth: int = 0) -> _Class | tuple[_Module, ast.AST] | _Module | None:
        if depth > 20:
            return None
        if name in module.names:
            node = module.names[name]
            return self._class(module, node) if isinstance(node, ast.ClassDef) else (module, node)
        if name in module.imports:
            source, attribute = module.imports[name]
            if attribute is None:
                return self._module(source)
            submodule = self._module(f"{source}.{attribute}")
            owner = self._module(source)
            found = self._global(owner, attribute, depth + 1) if owner is not None else None
            return found if found is not None else submodule
        for source in module.stars:
            owner = self._module(source)
            found = self._global(owner, name, depth + 1) if owner is not None else None
            if found is not None:
                return found
        return self._module(f"{module.name}.{name}")

    def _describe(self, target: _Class | tuple[_Module, ast.AST] | _Module, rest: list[str]) -> Found | None:
        if isinstance(target, _Module):
            return self._walk(target, rest)
        if isinstance(target, _Class):
            if not rest:
                init = self._member(target, "__init__")
                return Found(
                    "class",
                    f"{target.module.path}:{target.node.lineno}",
                    init.parameters if init is not None else None,
                    f"class({', '.join(ast.unparse(base) for base in target.node.bases)})",
                )
            return self._member(target, rest[0]) if len(rest) == 1 else None
        module, node = target
        if rest:
            return self._of_value(module, node, rest)
        return _found(module, node, None)

    def _of_value(self, module: _Module, node: ast.AST, rest: list[str]) -> Found | None:
        """Look up a member of a module's global that is an instance, such as `envs = Envs()`."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            function = node.value.func
            if isinstance(function, ast.Name):
                owner = self._global(module, function.id)
                if isinstance(owner, _Class):
                    return self._describe(owner, rest)
        return None

    def _member(self, owner: _Class, name: str) -> Found | None:
        mro = self._mro(owner)
        for base in mro:
            if name in base.members:
                return _found(base.module, base.members[name], base)
        for base in mro:
            if name in base.instance:
                found = _found(base.module, base.instance[name], base)
                return Found("attribute", found.where, None, found.text)
        if owner.node.name == "ServerArgs":
            return self._fields().get(name)
        return None

    @functools.cache  # noqa: B019  (lives as long as the command)
    def _fields(self) -> dict[str, Found]:
        """Return the fields of ServerArgs, which it collects from classes in a separate folder."""
        fields: dict[str, Found] = {}
        for path in self._files.list("sglang/srt/arg_groups/fields"):
            module = self._module(path.removesuffix(".py").replace("/", "."))
            for node in module.names.values() if module is not None else ():
                if module is not None and isinstance(node, ast.ClassDef):
                    owner = self._class(module, node)
                    fields.update({name: _found(module, item, owner) for name, item in owner.members.items()})
        return fields

    def _mro(self, owner: _Class) -> list[_Class]:
        """Yield the class and its bases within SGLang, nearest first."""
        order, queue, seen = [], [owner], set()
        while queue:
            current = queue.pop(0)
            if id(current.node) in seen:
                continue
            seen.add(id(current.node))
            order.append(current)
            for base in current.node.bases:
                found = self._expression(current.module, base)
                if isinstance(found, _Class):
                    queue.append(found)
        return order

    def _expression(self, module: _Module, node: ast.AST) -> _Class | tuple[_Module, ast.AST] | _Module | None:
        if isinstance(node, ast.Subscript):
            return self._expression(module, node.value)
        if isinstance(node, ast.Name):
            return self._global(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._expression(module, node.value)
            return self._global(owner, node.attr) if isinstance(owner, _Module) else None
        return None

    def _class_named(self, dotted: str) -> _Class | None:
        module_name, _, name = dotted.rpartition(".")
        module = self._module(module_name)
        found = self._global(module, name) if module is not None else None
        return found if isinstance(found, _Class) else None

    # ------------------------------------------------------------------------------------------------------ reading

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> _Module | None:
        stem = name.replace(".", "/")
        for path, is_package in ((f"{stem}.py", False), (f"{stem}/__init__.py", True)):
            if self._files.has(path):
                module = _Module(name, path, is_package)
                for statement in _flat(ast.parse(self._files.read(path)).body):
                    _add_global(module, statement)
                return module
        return None

    @functools.cache  # noqa: B019  (lives as long as the command)
    def _class(self, module: _Module, node: ast.ClassDef) -> _Class:
        owner = _Class(module, node)
        for statement in _flat(node.body):
            for name in _bound_names(statement):
                owner.members[name] = statement
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.args.args:
                this = statement.args.args[0].arg
                for inner in ast.walk(statement):
                    for attribute in _assigned_attributes(inner, this):
                        owner.instance.setdefault(attribute, inner)
        return owner

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _FolderFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, path: str) -> bool:
        return (self._root / path).is_file()

    def read(self, path: str) -> str:
        return (self._root / path).read_text(encoding="utf-8")

    def list(self, folder: str) -> list[str]:
        return sorted(f"{folder}/{path.name}" for path in (self._root / folder).glob("*.py"))

    def version(self) -> str | None:
        for folder in self._root.glob("sglang-*.dist-info"):
            return folder.name.removeprefix("sglang-").removesuffix(".dist-info")
        return None


class _ZipFiles:
    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = frozenset(self._zip.namelist())

    def has(self, path: str) -> bool:
        return path in self._names

    def read(self, path: str) -> str:
        return self._zip.read(path).decode("utf-8")

    def list(self, folder: str) -> list[str]:
        return sorted(n for n in self._names if n.rpartition("/")[0] == folder and n.endswith(".py"))

    def version(self) -> str | None:
        for name in self._names:
            folder = name.split("/", 1)[0]
            if folder.startswith("sglang-") and folder.endswith(".dist-info"):
                return folder.removeprefix("sglang-").removesuffix(".dist-info")
        return None


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, including those in conditions and `try` blocks, which depend on the machine."""
    for statement in statements:
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)
        else:
            yield statement


def _add_global(module: _Module, statement: ast.stmt) -> None:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            name = alias.asname or alias.name.split(".")[0]
            module.imports[name] = (alias.name if alias.asname else name, None)
    elif isinstance(statement, ast.ImportFrom):
        source = statement.module or ""
        if statement.level:
            parts = module.name.split(".")
            parts = parts[: len(parts) - statement.level + (1 if module.is_package else 0)]
            source = ".".join([*parts, source] if source else parts)
        for alias in statement.names:
            if alias.name == "*":
                module.stars.append(source)
            else:
                module.imports[alias.asname or alias.name] = (source, alias.name)
    else:
        for name in _bound_names(statement):
            # A class that is reassembled under its own name (ServerArgs) is read at its definition.
            if not (isinstance(statement, ast.Assign) and isinstance(module.names.get(name), ast.ClassDef)):
                module.names[name] = statement


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.AnnAssign):
        if isinstance(statement.target, ast.Name):
            yield statement.target.id
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            for item in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                if isinstance(item, ast.Name):
                    yield item.id


def _assigned_attributes(node: ast.AST, this: str) -> Iterator[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For)):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    for target in targets:
        for inner in ast.walk(target):
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == this:
                yield inner.attr


def _found(module: _Module, node: ast.AST, owner: _Class | None) -> Found:
    where = f"{module.path}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        decorators = {_decorator(item) for item in node.decorator_list}
        if decorators & {"property", "cached_property", "setter", "getter"}:
            return Found("property", where, None, "property")
        parameters = _parameters(node.args)
        if owner is not None and "classmethod" in decorators:
            parameters = parameters[1:]
        return Found("function", where, parameters, f"({_signature(node.args)})")
    if isinstance(node, ast.ClassDef):
        return Found("class", where, None, node.name)
    text = ast.unparse(node.value) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value else ""
    return Found("value", where, None, text if len(text) <= 80 else text[:77] + "...")


def _decorator(node: ast.expr) -> str:
    while isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    """Return the names in the order of `inspect.signature`."""
    names = [item.arg for item in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(arguments.vararg.arg)
    names += [item.arg for item in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(arguments.kwarg.arg)
    return tuple(names)


def _signature(arguments: ast.arguments) -> str:
    """Format a signature without annotations: names, defaults, stars."""
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parts = [
        item.arg if index < first_default else f"{item.arg}={ast.unparse(arguments.defaults[index - first_default])}"
        for index, item in enumerate(positional)
    ]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(item.arg if default is None else f"{item.arg}={ast.unparse(default)}")
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)

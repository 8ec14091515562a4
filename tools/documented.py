"""Every public symbol of tvp says what it is, what it takes and what it gives: `python tools/documented.py` lists those that do not.

Public is what a module lists in `__all__`, with the public methods of its classes. Each needs a
docstring. Each parameter and field needs a comment on its line (nbdev's docments: meaning, shape
or unit, range), and so does a result that has a shape, a unit or parts. What says enough by itself
needs none: a class of ours (it has its own page), a folder, what the docstring speaks of. A
docstring that says "see `this`" leaves the parameters to this.

Each public method also has an entry on the site: a cell `show_doc(Class.method)`, or that of the
class it inherits from or is inherited by. Protocols have none: what fulfils them has.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBVIOUS = {
    "self",
    "cls",
    "_",
    "args",
    "ax",
    "device",
    "dtype",
    "figure",
    "learner",
    "path",
    "folder",
    "seed",
    "title",
}
# their signatures are those of torch and transformers
FOREIGN = {"forward", "backward", "extra_repr", "get_image_features"}
FOREIGN |= {"get_input_embeddings", "set_input_embeddings", "save_pretrained"}
FOREIGN |= {"prepare_for_tokenization", "convert_tokens_to_string"}
SHAPED = r"\b(Tensor|ndarray|float|dict|tuple)\b"  # results with a shape, a unit or parts
SHAPE = r"\([\w +*]+,[\w, +*]*\)|scalar"  # "(B, N)" or "a scalar" in a docstring


def listed(tree):
    "A module's `__all__`."
    values = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return set(ast.literal_eval(next(values, ast.List([]))))


class Module:
    "One file of tvp/ and its public symbols."

    def __init__(self, path, bases):
        self.source = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.lines = self.source.splitlines()
        self.bases = bases  # each class of the package: names of what it inherits from

    def comment(self, node):
        "Whether a comment follows a node on its line, or stands above it."
        if self.lines[node.lineno - 2].lstrip().startswith("#"):
            return True
        return "#" in self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()

    def ours(self, annotation):
        "Whether an annotation names a class of ours, which has its own page."
        return bool(set(re.findall(r"\w+", ast.unparse(annotation))) & self.bases.keys())

    def said(self, name, node, docstring):
        "Whether a parameter or a field says what it is."
        known = (
            name in map(str.lower, self.bases)
            if node.annotation is None
            else self.ours(node.annotation)
        )
        named = re.search(rf"\b{name.replace('_', '[ _]')}\b", docstring, re.IGNORECASE)
        return bool(known or named) or name in OBVIOUS or self.comment(node) or "see `" in docstring

    def result(self, function):
        "Whether a function says what it gives."
        kind = "" if function.returns is None else ast.unparse(function.returns)
        header_end = self.lines[max(function.lineno, function.body[0].lineno - 1) - 1]
        if function.returns and self.lines[function.returns.lineno - 2].lstrip().startswith("#"):
            return True
        if "#" in header_end or {"property", "cached_property"} & set(
            map(ast.unparse, function.decorator_list)
        ):
            return True
        return (
            not re.search(SHAPED, kind)
            or self.ours(function.returns)
            or bool(re.search(SHAPE, ast.get_docstring(function) or ""))
        )

    def lacks(self, function):
        "What a function or a method does not say."
        docstring = ast.get_docstring(function) or ""
        inner = function.name == "__init__"
        if function.name in FOREIGN:
            return []
        missing = [] if docstring or inner else ["a docstring"]
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        missing += [
            f"`{argument.arg}`"
            for argument in arguments
            if not self.said(argument.arg, argument, docstring)
        ]
        return missing if inner or self.result(function) else [*missing, "its result"]

    def unsaid_fields(self, kind):
        "What a class does not say."
        docstring = ast.get_docstring(kind) or ""
        # fields named as everywhere in transformers
        theirs = "PreTrainedConfig" in map(ast.unparse, kind.bases)
        fields = [
            node
            for node in kind.body
            if isinstance(node, ast.AnnAssign) and node.target.id[0] != "_" and not theirs
        ]
        return ([] if docstring else ["a docstring"]) + [
            f"`{field.target.id}`"
            for field in fields
            if not self.said(field.target.id, field, docstring)
        ]

    def symbols(self):
        "Public functions and methods with their names, and classes."
        for node in self.tree.body:
            if getattr(node, "name", None) in listed(self.tree):
                yield node.name, node
                for part in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                    if isinstance(part, ast.FunctionDef) and (
                        part.name == "__init__" or part.name[0] != "_"
                    ):
                        yield f"{node.name}.{part.name}", part

    def undocumented(self):
        "Each symbol that lacks something, and what."
        for name, node in self.symbols():
            if missing := (self.unsaid_fields if isinstance(node, ast.ClassDef) else self.lacks)(
                node
            ):
                yield name, missing

    def family(self, name):
        "A class and all that it inherits from."
        return {name}.union(*map(self.family, self.bases.get(name, ())))

    def methods(self):
        "Class and name of each public method that is neither a property nor another library's."
        for name, node in self.symbols():
            kind, _, method = name.partition(".")
            if not method or method == "__init__" or method in FOREIGN:
                continue
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "Protocol" not in self.bases[kind] and not re.search("property|setter", decorators):
                yield kind, method


def public_modules(folder=ROOT / "tvp"):
    "Each public module by its dotted name."
    bases = {}
    modules = {
        ".".join(("tvp", *path.relative_to(folder).with_suffix("").parts)): Module(path, bases)
        for path in sorted(folder.rglob("*.py"))
        if path.name[0] != "_"
    }
    for module in modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    return modules


def undocumented():
    "All public symbols that lack something."
    return [
        f"{place}.{name} does not say: {', '.join(missing)}"
        for place, module in public_modules().items()
        for name, missing in module.undocumented()
    ]


def shown_entries(folder):
    "Class and method of each `show_doc(Class.method)` in the notebooks."
    return {
        tuple(entry)
        for path in sorted(folder.rglob("*.ipynb"))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
        for entry in re.findall(r"show_doc\((\w+)\.(\w+)", "".join(cell["source"]))
    }


def without_entry(notebooks=ROOT / "nbs"):
    "Public methods that the site does not show."
    shown = shown_entries(notebooks)
    return [
        f"{place}.{kind}.{method} has no entry: a cell show_doc({kind}.{method}) makes one"
        for place, module in public_modules().items()
        for kind, method in module.methods()
        if not any(
            method == named and (kind in module.family(other) or other in module.family(kind))
            for other, named in shown
        )
    ]


if __name__ == "__main__":
    found = undocumented() + without_entry()
    print(*found, f"{len(found)} symbols", sep="\n")
    sys.exit(bool(found))

"""The docstrings that stand below the attributes of a class."""

import ast
import inspect
import textwrap


def attribute_docs(owner: type) -> dict[str, str]:
    """The docstring of each attribute of `owner` that has one, in a line, read from the source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for attribute, below in zip(node.body, node.body[1:], strict=False):
        match attribute, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs

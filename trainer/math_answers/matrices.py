"""Matrices and vectors: sums, products and transposes written out cell by cell."""

from __future__ import annotations

from trainer.math_answers.tree import Node, integer

MAX_CELLS = 100


def as_matrix(node: Node) -> Node | None:
    """The matrix that a tree stands for; None where it is none.

    Brackets of bracketed rows of equal length are a matrix; a vector in brackets is one column.
    """
    if node.kind == "matrix":
        return node
    if node.kind == "seq" and node.value in ("()", "[]", "<>"):
        return _from_rows(node)
    if node.kind == "call" and node.value == "transpose":
        inner = as_matrix(node.args[0])
        is_row = node.args[0].kind == "seq" and inner is not None and inner.columns == 1
        if is_row:
            return inner
        return None if inner is None else _transposed(inner)
    if node.kind == "neg":
        return _scaled(node.args[0], integer(-1))
    if node.kind == "div":
        return _scaled(node.args[0], Node("inv", (node.args[1],)))
    if node.kind == "add":
        return _sum(node)
    if node.kind == "pow":
        return _power(node)
    return _product(node) if node.kind == "mul" else None


def _from_rows(node: Node) -> Node | None:
    rows = [arg.args for arg in node.args if arg.kind == "seq" and arg.value in ("()", "[]", "<>")]
    if not rows:
        return Node("matrix", node.args, 1)
    if len(rows) != len(node.args) or len({len(row) for row in rows}) != 1:
        return None
    return Node("matrix", tuple(cell for row in rows for cell in row), len(rows[0]))


def _transposed(matrix: Node) -> Node:
    columns = matrix.columns
    cells = [cell for column in range(columns) for cell in matrix.args[column::columns]]
    return Node("matrix", tuple(cells), len(matrix.args) // columns)


def _scaled(node: Node, factor: Node) -> Node | None:
    matrix = as_matrix(node)
    if matrix is None:
        return None
    return Node("matrix", tuple(Node("mul", (factor, cell)) for cell in matrix.args), matrix.value)


def _sum(node: Node) -> Node | None:
    matrices = [as_matrix(arg) for arg in node.args]
    first = matrices[0]
    if first is None:
        return None
    rows = []
    for matrix in matrices:
        if matrix is None or (matrix.value, len(matrix.args)) != (first.value, len(first.args)):
            return None
        rows.append(matrix.args)
    return Node(
        "matrix", tuple(Node("add", cells) for cells in zip(*rows, strict=True)), first.value
    )


def _product(node: Node) -> Node | None:
    product: Node | None = None
    scalars = []
    for factor in node.args:
        matrix = as_matrix(factor)
        if matrix is None:
            scalars.append(factor)
        elif product is None:
            product = matrix
        else:
            product = _multiplied(product, matrix)
            if product is None:
                return None
    if product is None or not scalars:
        return product
    cells = tuple(Node("mul", (*scalars, cell)) for cell in product.args)
    return Node("matrix", cells, product.value)


def _power(node: Node) -> Node | None:
    base, exponent = node.args
    matrix = as_matrix(base) if base.kind == "matrix" else None
    if matrix is not None and exponent == Node("neg", (integer(1),)):
        return _inverse(matrix)
    if matrix is None or exponent.kind != "num" or exponent.number not in (2, 3):
        return None
    product = _multiplied(matrix, matrix)
    if product is None or exponent.number == 2:
        return product
    return _multiplied(product, matrix)


def _inverse(matrix: Node) -> Node | None:
    """Of two rows and two columns."""
    if matrix.columns != 2 or len(matrix.args) != 4:
        return None
    first, second, third, fourth = matrix.args
    cells = (fourth, Node("neg", (second,)), Node("neg", (third,)), first)
    determinant = Node("call", (matrix,), "det")
    return Node("matrix", tuple(Node("div", (cell, determinant)) for cell in cells), 2)


def _multiplied(left: Node, right: Node) -> Node | None:
    inner, columns = left.columns, right.columns
    if len(right.args) != inner * columns or max(len(left.args), len(right.args)) > MAX_CELLS:
        return None
    cells = []
    for row in range(len(left.args) // inner):
        for column in range(columns):
            pairs = zip(
                left.args[row * inner : (row + 1) * inner], right.args[column::columns], strict=True
            )
            cells.append(Node("add", tuple(Node("mul", pair) for pair in pairs)))
    return Node("matrix", tuple(cells), columns)

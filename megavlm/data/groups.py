"""Rows that belong together: the two answers of a preference pair, the answers to one prompt.

What compares them needs them in one microbatch, and a shuffle has to move them as one.

Shape suffixes: N rows, G groups, K rows of a group.
"""

from dataclasses import dataclass

import numpy as np

from megavlm.errors import use_error


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of all rows into groups of one size.

    Attributes:
        members_GK: int64, the rows of each group, ascending; groups in the order of their first rows.
        group_of_N: int64, the group of each row.
    """

    members_GK: np.ndarray
    group_of_N: np.ndarray


def groups_of(ids_N: np.ndarray) -> Groups:
    """Groups from an id for each row; rows of a group need not stand side by side.

    Args:
        ids_N: any integers; equal ones belong together.

    Raises:
        UseError: groups of several sizes, of which no global batch of a fixed size could be made.
    """
    assert len(ids_N), "no rows"
    _, first_rows, found_N, sizes = np.unique(ids_N, return_index=True, return_inverse=True, return_counts=True)
    if sizes.min() != sizes.max():
        odd = int(first_rows[sizes != np.bincount(sizes).argmax()].min())
        raise use_error(
            "groups of rows",
            f"between {sizes.min()} and {sizes.max()} rows (one of another size begins with row {odd})",
            "as many rows in each",
            "complete the group, or drop it as a whole",
        )
    by_first_row = np.argsort(first_rows, kind="stable")
    numbers = np.empty(len(sizes), dtype=np.int64)
    numbers[by_first_row] = np.arange(len(sizes))
    group_of_N = numbers[found_N]
    members_GK = np.argsort(group_of_N, kind="stable").reshape(len(sizes), -1)
    return Groups(members_GK, group_of_N)

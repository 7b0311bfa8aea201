"""Rows that belong together: the two answers of a preference pair, the answers to one prompt.

What compares them needs them in one microbatch, and a shuffle has to move them as one.

Shape suffixes: N rows, G groups, K rows of a group.
"""

from dataclasses import dataclass

import numpy as np

from megavlm.errors import use_error


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows in groups of one size.

    Attributes:
        members_GK: int64, the rows of each group, ascending; groups in the order of their first rows.
        group_of_N: int64, the group of each row; -1 of a row that is left out, because its group is of another size.
    """

    members_GK: np.ndarray
    group_of_N: np.ndarray

    @property
    def size(self) -> int:
        """K."""
        return self.members_GK.shape[1]

    def reduced(self, values_N: np.ndarray, how: np.ufunc) -> np.ndarray:
        """The rows' values, group by group: `np.add` gives their sums, `np.maximum` the largest of each."""
        reduced_G: np.ndarray = how.reduce(values_N[self.members_GK], axis=1)
        return reduced_G


def groups_of(ids_N: np.ndarray, *, leave_out: bool = False) -> Groups:
    """Groups from an id for each row; rows of a group need not stand side by side.

    Args:
        ids_N: any integers; equal ones belong together.
        leave_out: whether groups of another size than most of them are left out.

    Raises:
        UseError: groups of several sizes, of which no global batch of a fixed size could be made.
    """
    assert len(ids_N), "no rows"
    _, first_rows, found_N, sizes = np.unique(ids_N, return_index=True, return_inverse=True, return_counts=True)
    usual = int(np.bincount(sizes).argmax())
    is_usual = sizes == usual
    if not is_usual.all() and not leave_out:
        odd = int(first_rows[~is_usual].min())
        raise use_error(
            "groups of rows (data.group_by)",
            f"between {sizes.min()} and {sizes.max()} rows (one of another size begins with row {odd})",
            "as many rows in each",
            "complete the group, drop it as a whole, or set data.on_error=skip",
        )
    by_first_row = np.argsort(np.where(is_usual, first_rows, len(ids_N)), kind="stable")[: int(is_usual.sum())]
    numbers = np.full(len(sizes), -1, dtype=np.int64)
    numbers[by_first_row] = np.arange(len(by_first_row))
    group_of_N = numbers[found_N]
    left_out = int((group_of_N < 0).sum())
    members_GK = np.argsort(group_of_N, kind="stable")[left_out:].reshape(-1, usual)
    return Groups(members_GK, group_of_N)

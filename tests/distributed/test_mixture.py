"""A run on two sources from the command line: what its log says of them, and a resume with another mixture."""

import json
from pathlib import Path

from tests.distributed.running import Inputs, call, log_rows, succeed, the_error
from tests.pool import PoolKeeper


def test_a_mixture_is_logged_and_kept(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    rows = inputs.rows.read_text().splitlines()
    texts = [json.loads(row) for row in rows if not json.loads(row)["images"]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))

    def words(weight: int) -> list[str]:
        everything = f"{{name: all, paths: [{inputs.rows}]}}"
        some = f"{{name: texts, paths: [{tmp_path}/texts.jsonl], weight: {weight}}}"
        mixture = f"data.mixture=[{everything}, {some}]"
        return inputs.train(tmp_path, "data.train=[]", mixture, "train.global_batch_size=8")

    succeed(workers, 2, words(3))
    steps = [row for row in log_rows(tmp_path) if row["kind"] == "train"]
    seen = [(row["extra"]["consumed/all"], row["extra"]["consumed/texts"]) for row in steps]
    assert seen == [(2.0, 6.0), (4.0, 12.0), (6.0, 18.0)]
    assert all(row["extra"]["pad_share"] == 0 for row in steps)
    code, _, err = workers(2).run(call, words=[*words(1), "train.train_iters=4"])[0]
    assert code == 2
    the_error(err, "data.mixture", "another mixture or curriculum", only=False)
    context = ["parallel.context_parallel_size=2", "train.train_iters=4"]
    succeed(workers, 2, [*words(3), *context])
    last = [row for row in log_rows(tmp_path) if row["kind"] == "train"][-1]
    assert last["step"] == 4 and last["extra"]["consumed/texts"] == 24 and 0 < last["extra"]["pad_share"] < 0.1

"""What a run says about itself.

`metrics` writes the log (JSON lines, TensorBoard), `progress` the bar on the terminal, `report` one HTML file to look
at afterwards. A run folder holds:

    metrics.jsonl            one JSON object per line, kinds `train`, `eval` and `event`
    metrics.abandoned.jsonl  lines of attempts that were given up (see `metrics.RunLog`)
    tensorboard/             the same numbers for TensorBoard
    recipe.yaml              the resolved recipe
    samples.json             held-out questions with the answers before and after training
    timeline.json            what every pipeline rank did in one step, measured and simulated
    report.html              written from the files above by `report.write_report`
"""

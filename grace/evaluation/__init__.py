"""Benchmarks and tiny models: draw, train on, answer and score.

`synthetic` draws a benchmark in the MME layout, `drawn` a larger one; `mme` reads and scores such
folders, `pope` and `choices` (ScienceQA, MMBench) other local files, and `suites` finds them by
name; `answer` asks a model, `resume` keeps what it said; `tiny` finds the shipped tiny checkpoints,
`packed_questions` makes training batches.
"""

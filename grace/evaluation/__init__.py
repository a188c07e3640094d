"""Benchmarks and tiny models: draw, train on, answer and score.

`synthetic` draws a benchmark in the MME layout, `mme` reads and scores such folders, `answer` asks
a model, `tiny` finds the shipped tiny checkpoints, `packed_questions` makes training batches.
`drawn` is a larger benchmark beside `synthetic`, for models of a billion parameters and more.
"""

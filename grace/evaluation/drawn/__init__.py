"""The large drawn benchmark: nine of MME's subtasks, three levels, held-out compositions.

`vocabulary` holds the words and what is held out, `topics` what is asked, `composing` puts a scene
together, `rendering` draws it, `benchmark` writes folders in MME's layout and rows to train on.
"""

"""The demo page: one or two models answer about an image, with how fast and in how much memory.

`answering` asks a model, `cards` draws what it said, `page` puts them on a page; only the last
needs gradio.
"""

"""What the page shows of an answer, as HTML: everything a model says is escaped."""

from __future__ import annotations

from html import escape

from grace.demo.answering import Answer, Side

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.55rem; font-weight: 650; letter-spacing: -0.01em; margin: 0.4rem 0 0; }
#title p { color: var(--body-text-color-subdued); margin: 0.15rem 0 0.3rem; }
.place, .place > div { padding: 0 !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
.card { border: 1px solid var(--border-color-primary); border-radius: 12px; overflow: hidden;
  background: var(--background-fill-primary); display: flex; flex-direction: column;
  min-height: 18rem; }
.card header { display: flex; align-items: center; gap: 0.6rem; padding: 0.8rem 1rem;
  border-bottom: 1px solid var(--border-color-primary); }
.card header b { font-weight: 600; overflow-wrap: anywhere; }
.card .kind { font-size: 0.72rem; font-weight: 650; letter-spacing: 0.04em; padding: 0.15rem 0.5rem;
  border-radius: 999px; color: #334155; background: #e2e8f0; white-space: nowrap; }
.card.low .kind { color: #065f46; background: #a7f3d0; }
.card .text { flex: 1; padding: 1rem; font-size: 1.05rem; line-height: 1.55;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.card .text.idle { color: var(--body-text-color-subdued); font-size: 0.95rem; }
.card .text.live::after { content: "▍"; color: #10b981; animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
.card dl { display: grid; grid-template-columns: repeat(3, 1fr); margin: 0;
  border-top: 1px solid var(--border-color-primary); }
.card dl div { padding: 0.6rem 0.4rem; text-align: center; }
.card dl div + div { border-left: 1px solid var(--border-color-primary); }
.card dt { font-size: 0.72rem; color: var(--body-text-color-subdued); }
.card dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card dd small { font-size: 0.72rem; font-weight: 400; color: var(--body-text-color-subdued); }
.card dd small.above { display: block; }
.problem { border: 1px solid #fca5a5; background: #fef2f2; color: #991b1b; border-radius: 10px;
  padding: 0.7rem 0.9rem; margin-bottom: 0.2rem; overflow-wrap: anywhere; }
"""


def card(side: Side, answer: Answer | None = None, waiting: str = "") -> str:
    """A model's card.

    Args:
        side: the model.
        answer: what it has said; None before it is asked.
        waiting: what stands in the place of an answer until there is one.
    """
    low = " low" if side.kind.startswith("INT") else ""
    return (
        f'<section class="card{low}"><header><b>{escape(side.name)}</b>'
        f'<span class="kind">{escape(side.kind)}</span></header>'
        f"{_text(answer, waiting)}<dl>{_figures(side, answer)}</dl></section>"
    )


def problem(message: str) -> str:
    """What went wrong."""
    return f'<div class="problem" role="alert">{escape(message)}</div>'


def _text(answer: Answer | None, waiting: str) -> str:
    if answer is None or not (answer.text or answer.done):
        return f'<div class="text idle">{escape(waiting or "Its answer will stand here.")}</div>'
    live = "" if answer.done else " live"
    return f'<div class="text{live}">{escape(answer.text or "(nothing)")}</div>'


def _figures(side: Side, answer: Answer | None) -> str:
    said = answer or Answer()
    rate = "–" if said.rate is None else f"{said.rate:.1f}"
    first = "–" if said.first is None else f"{1000 * said.first:.0f} <small>ms</small>"
    above = (
        "" if said.peak is None else f"<small class='above'>+ {size(said.peak)} to answer</small>"
    )
    figures = {"tokens/s": rate, "first token": first, "weights": size(side.bytes) + above}
    return "".join(f"<div><dt>{name}</dt><dd>{of}</dd></div>" for name, of in figures.items())


def size(count: int) -> str:
    """Bytes for people, in powers of 1000: "4.41 GB"."""
    for power, unit in ((9, "GB"), (6, "MB")):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return f"{count / 1000:.0f} kB"

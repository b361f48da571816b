"""A report as Markdown, and as one HTML file that needs nothing else: no network, no script."""

from base64 import b64encode
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from nanochat_jax.report.content import (
    Block,
    Cards,
    Cell,
    Content,
    Plots,
    Samples,
    Section,
    SourceText,
    Table,
)
from nanochat_jax.report.plots import Plot

_STYLE = Path(__file__).with_name("page.css")
_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write(content: Content, folder: Path, name: str = "report") -> tuple[Path, Path]:
    """Writes NAME.md and NAME.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, page = folder / f"{name}.md", folder / f"{name}.html"
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    markdown.write_text(to_markdown(content, now, page.name), encoding="utf-8")
    page.write_text(to_html(content, now), encoding="utf-8")
    return markdown, page


def to_markdown(content: Content, now: str, page: str) -> str:
    """The same report without its curves, which `page` has."""
    parts = [f"# {content.title}", f"{content.subtitle} Written {now}; curves: [{page}]({page})."]
    for section in content.sections:
        blocks = [text for text in map(_markdown, section.blocks) if text]
        if blocks:
            parts += [f"## {section.title}"] if section.title else []
            parts += blocks
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Table():
            ruler = ["---", *["---:" if block.numbers else "---"] * (len(block.heads) - 1)]
            rows = [list(map(_markdown_cell, row)) for row in block.rows]
            return "\n".join(f"| {' | '.join(row)} |" for row in [block.heads, ruler, *rows])
        case Cards():
            return "\n".join(f"* **{name}** {value} ({note})" for name, value, note in block.cards)
        case Samples():
            return "\n\n".join(
                f"{label}:\n\n{_fenced(prompt + text)}" for label, prompt, text in block.samples
            )
        case SourceText():
            return f"{block.name}\n\n{_fenced(block.text)}"
        case Plots():
            return ""


def _markdown_cell(content: str | Cell) -> str:
    cell = Cell(content) if isinstance(content, str) else content
    text = f"**{cell.text}**" if cell.best else cell.text
    text = f"{text} ({cell.note})" if cell.note else text
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    """A code block that no run of backticks in the text can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def to_html(content: Content, now: str) -> str:
    sections = "\n".join(_section(section) for section in content.sections)
    title = escape(content.title)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_CONTENT_POLICY}">
<title>{title} · report</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
<main>
<header>
<p class="kind">nanochat_jax report card</p>
<h1>{title}</h1>
<p class="subtitle">{escape(content.subtitle)} <time>{escape(now)}</time></p>
</header>
{sections}
</main>
</html>
"""


def _section(section: Section) -> str:
    blocks = "\n".join(_html(block) for block in section.blocks)
    if not section.title:
        return f"<section>\n{blocks}\n</section>"
    title = escape(section.title)
    if section.folded:
        return f"<details>\n<summary><h2>{title}</h2></summary>\n{blocks}\n</details>"
    return f"<section>\n<h2>{title}</h2>\n{blocks}\n</section>"


def _html(block: Block) -> str:
    match block:
        case Table():
            return _html_table(block)
        case Cards():
            cards = "".join(
                f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
                f'<dd class="note">{escape(note)}</dd></div>'
                for name, value, note in block.cards
            )
            return f'<dl class="cards">{cards}</dl>'
        case Plots():
            return '<div class="plots">' + "".join(map(_html_plot, block.plots)) + "</div>"
        case Samples():
            quotes = ""
            for sample in block.samples:
                label, prompt, text = map(escape, sample)
                quote = f'<span class="stage">{label}</span><b>{prompt}</b>{text}'
                quotes += f"<blockquote>{quote}</blockquote>"
            return f'<div class="samples">{quotes}</div>'
        case SourceText():
            return f"<h3>{escape(block.name)}</h3>\n<pre>{escape(block.text)}</pre>"


def _html_plot(plot: Plot) -> str:
    """An image of its own, so that its style and its ids stay apart from the page's."""
    data = b64encode(plot.svg.encode()).decode()
    return (
        f"<figure><h3>{escape(plot.title)}</h3>"
        f'<img alt="{escape(plot.title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _html_table(table: Table) -> str:
    kind = "numbers" if table.numbers else "texts"
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    head = f"<thead><tr>{heads}</tr></thead>" if any(table.heads) else ""
    rows = ""
    for first, *others in table.rows:
        cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in others)
        rows += f'<tr><th scope="row">{_html_cell(first)}</th>{cells}</tr>'
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{rows}</tbody></table></div>'


def _html_cell(content: str | Cell) -> str:
    cell = Cell(content) if isinstance(content, str) else content
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    return f'{text} <span class="note">{escape(cell.note)}</span>' if cell.note else text

"""`study report`: a study on one HTML page that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dash_megatron.studies.collect import dense_twins, missed_targets, rows_with_quality
from dash_megatron.studies.fit import render_fits
from dash_megatron.studies.plan import COLUMNS, assumptions, cells, human
from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import Study

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 78rem; padding: 1rem; }
h1, h2 { line-height: 1.2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; color: #444; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: normal; } tbody tr:hover { background: #f4f4f4; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #444; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def render_page(
    study: Study,
    source: str | Path,
    rows: list[dict[str, Any]],
    fits: dict[str, Any],
    pictures: dict[Path, str],
) -> str:
    """HTML of a report, images included.

    Args:
        study: the study; `source` is its YAML file, which the page quotes.
        rows, fits: as `collect` and `fit_study` give them.
        pictures: PNG files with a sentence each.
    """
    runs = expand(study)
    title = f"Study {Path(source).stem}"
    finished = sum(row["finished"] for row in rows)
    figures = [figure_html(path, text) for path, text in pictures.items()]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{finished} of {len(runs)} runs are finished. Runs are compared by {escape(fits['quality'])}.</p>",
        *_against_dense(rows),
        "<h2>Results</h2>",
        table_html("Each run that has logged a step; FLOPs at the measured density.", *results_table(rows)),
        *[f"<p>{escape(remark)}</p>" for remark in missed_targets(runs, rows)],
        "<h2>Pictures</h2>",
        *figures,
        "<h2>Fits</h2>",
        f"<pre>{escape(chr(10).join(render_fits(fits)))}</pre>",
        "<h2>Plan</h2>",
        *plan_and_source_html(study, source, runs),
    ]
    return page_html(title, parts)


def plan_and_source_html(study: Study, source: str | Path, runs: Sequence[StudyRun]) -> list[str]:
    """What was planned and assumed of a study's runs, and its YAML file as it stands."""
    return [
        table_html("What was planned, at the assumed density.", COLUMNS, [cells(run, study) for run in runs]),
        *[f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in assumptions(study, runs)],
        "<h2>The study</h2>",
        f"<pre>{escape(Path(source).read_text(encoding='utf-8'))}</pre>",
    ]


def page_html(title: str, parts: Sequence[str]) -> str:
    """A whole page of parts in HTML; it loads nothing."""
    # no script, and nothing from elsewhere, even if a name in the study were to ask for it
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def results_table(rows: Iterable[dict[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and lines of what was measured, as text."""
    columns = (
        "run", "parameters", "tokens", "training loss", "validation loss", "density", "FLOPs", "dense FLOPs", "tokens/s", "finished",
    )  # fmt: skip
    lines = [
        [
            row["run"],
            human(row["parameters"]),
            human(row["tokens"]),
            f"{row['loss']:.4f}",
            "-" if row["valid_loss"] is None else f"{row['valid_loss']:.4f}",
            "full" if row["density"] is None else f"{row['density']:.1%}",
            f"{row['flops']:.2e}",
            f"{row['dense_flops']:.2e}",
            f"{row['tokens_per_second']:,.0f}",
            "yes" if row["finished"] else f"step {row['step']}",
        ]
        for row in rows
    ]
    return columns, lines


def _against_dense(rows: list[dict[str, Any]]) -> list[str]:
    """What selecting costs in loss and saves in compute, for runs with a full-attention twin; nothing without twins."""
    finished, quality = rows_with_quality(rows)
    twins = dense_twins(finished)
    if not twins:
        return []
    columns = ("run", "tokens", "density", "loss", "dense twin's loss", "difference", "in %", "FLOPs saved")
    lines, differences = [], dict[str, list[float]]()
    for row in finished:
        if row["run"] not in twins:
            continue
        twin = twins[row["run"]]
        more = row["quality"] - twin["quality"]
        differences.setdefault(row["variant"], []).append(more)
        lines.append(
            [
                row["run"],
                human(row["tokens"]),
                "-" if row["density"] is None else f"{row['density']:.1%}",
                f"{row['quality']:.4f}",
                f"{twin['quality']:.4f}",
                f"{more:+.4f}",
                f"{more / twin['quality']:+.2%}",
                f"{1 - row['flops'] / twin['flops']:.1%}",
            ]
        )
    means = [
        f"<li>{escape(variant)}: {sum(each) / len(each):+.4f} nats on average of {len(each)}, "
        f"from {min(each):+.4f} to {max(each):+.4f}</li>"
        for variant, each in differences.items()
    ]
    caption = (
        f"Finished runs with a full-attention twin: {quality} in nats, and FLOPs at the measured density."
    )
    return ["<h2>Against full attention</h2>", "<ul>", *means, "</ul>", table_html(caption, columns, lines)]


def table_html(caption: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "\n".join(
        "<tr>"
        + f'<th scope="row">{escape(line[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    # a keyboard can scroll only what it can focus
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def figure_html(path: Path, text: str) -> str:
    """A PNG within the page, with a sentence below it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )

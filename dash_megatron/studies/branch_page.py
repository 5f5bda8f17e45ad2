"""`study report` of a study of branches: a page that loads nothing, and the same tables and sentences to paste."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from dash_megatron.studies.branch_tables import NOTE, as_markdown, remarks, sentences, tables
from dash_megatron.studies.branches import ArmComparison
from dash_megatron.studies.page import (
    figure_html,
    page_html,
    plan_and_source_html,
    results_table,
    table_html,
)
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import Study


def render_branches_page(
    study: Study,
    source: str | Path,
    rows: list[dict[str, Any]],
    compared: list[ArmComparison],
    pictures: dict[Path, str],
) -> str:
    """HTML of a report, images included.

    Args:
        study: the study; `source` is its YAML file, which the page quotes.
        rows, compared: as `collect` and `compare_branches` give them.
        pictures: PNG files with a sentence each.
    """
    runs = expand(study)
    title = f"Study {Path(source).stem}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{sum(row['finished'] for row in rows)} of {len(runs)} runs are finished. {escape(NOTE)}</p>",
        *(f"<p>{escape(line)}</p>" for line in remarks(study, rows)),
    ]
    for base, groups in sentences(study, compared).items():
        parts.append(f"<h2>Branches of {escape(base)}</h2>")
        for group, lines in groups.items():
            if lines:
                items = "".join(f"<li>{escape(line)}</li>" for line in lines)
                parts.append(f"<h3>{escape(group)}</h3><ul>{items}</ul>")
    parts.append("<h2>Comparisons</h2>")
    parts += [table_html(f"{found.caption}.", *found[1:]) for found in tables(study, rows, compared)]
    parts.append("<h2>Pictures</h2>")
    parts += [figure_html(path, text) for path, text in pictures.items()]
    parts += [
        "<h2>Runs</h2>",
        table_html("Each run that has logged a step; FLOPs at the measured density.", *results_table(rows)),
        *plan_and_source_html(study, source, runs),
    ]
    return page_html(title, parts)


def render_branches_text(study: Study, rows: list[dict[str, Any]], compared: list[ArmComparison]) -> str:
    """The sentences and tables in Markdown, to paste into a page."""
    lines = [NOTE]
    for line in remarks(study, rows):
        lines += ["", line]
    for base, groups in sentences(study, compared).items():
        for group, said in groups.items():
            if said:
                lines += ["", f"{group}, branches of {base}:", "", *(f"- {sentence}" for sentence in said)]
    for found in tables(study, rows, compared):
        lines += ["", *as_markdown(found)]
    return "\n".join(lines) + "\n"

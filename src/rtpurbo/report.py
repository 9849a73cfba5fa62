"""write_report(artifact_dir) -> report.html: one file with everything measured about a conversion; needs no network.
write_speed_plot(result, file) draws what `rtpurbo bench` measured of a layer.

Only what was measured is shown; a stage that has not been run is named, with the command that adds it.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from . import model_card as card
from .checkpoint import CONFIG_FILE, Artifact, atomic_path

DENSE, SPARSE, MARK = "#4d4d4d", "#0072b2", "#d55e00"
"""Told apart by colour-blind readers (Okabe and Ito); what is dense is dashed or hollow too, for prints without colour."""
_STYLES = (("dense", DENSE, "dash", "circle-open"), ("sparse", SPARSE, "solid", "circle"))
_STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px; background: #fff; color: #1f2328; color-scheme: light;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 } h3 { font-size: 1rem; margin: 12px 0 4px }
h2 { font-size: 1.25rem; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid #d5d9de }
p, figcaption { margin: 6px 0; max-width: 80ch }
figcaption, .caption { color: #57606a; font-size: .9rem }
figure { margin: 8px 0 16px } code { background: #f1f3f5; padding: 1px 5px; border-radius: 4px; font-size: .92em }
.note { border-left: 4px solid #d55e00; background: #f6f7f9; padding: 8px 12px; margin: 10px 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 }
.tiles div { border: 1px solid #d5d9de; border-radius: 8px; padding: 10px 14px; font-size: .85rem; color: #57606a }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; color: #1f2328 }
.grid { --least: 320px; display: grid; gap: 0 28px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, max(var(--least), var(--needs, 0px))), 1fr)) }
.grid > * { min-width: 0 } .two { --least: 440px } .pair { display: flex; flex-wrap: wrap; gap: 12px 24px; overflow-x: auto }
.columns { columns: 2 330px; column-gap: 28px } .columns h3 { margin-top: 0 }
.columns section, .two section { break-inside: avoid }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: 6px 0 12px; width: 100% }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e6e8eb; vertical-align: top; font-weight: 400 }
thead th { font-weight: 600; border-bottom: 2px solid #8a9099 }
.rows th:first-child { width: 100% } .columns th { width: 45%; overflow-wrap: normal }
.needle { width: auto } .needle caption { text-align: left; font-weight: 600; color: #57606a }
.needle th, .needle td { text-align: center; padding: 4px 8px; border: 2px solid #fff; overflow-wrap: normal }
.needle small { display: block; font-size: .75rem; white-space: nowrap }
@media (min-width: 601px), print { .rows td, .rows thead th { white-space: nowrap } }
@media (max-width: 600px), print { .pair { gap: 8px } .needle th, .needle td { padding: 3px 2px; font-size: .85rem } }
@media screen and (max-width: 600px) {
  body { padding: 16px 14px 32px }
  .rows thead, .rows .none { display: none }
  .rows tr { display: flex; flex-wrap: wrap; gap: 0 16px; padding: 6px 0; border-bottom: 1px solid #d5d9de }
  .rows th, .rows td { padding: 0; border: 0 } .rows th { flex: 0 0 100%; font-weight: 600 }
  .rows td::before { content: attr(data-label) " "; color: #57606a }
}
@media print {
  @page { margin: 14mm 12mm }
  html { font-size: 10pt } h2 { margin-top: 20px } .rows { font-size: .8rem }
  body { padding: 0; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  h2, h3, thead { break-after: avoid } figcaption, .caption, .note { break-before: avoid }
  figure, tr, .tiles, .note { break-inside: avoid }
  .grid { --least: 200px } .two { --least: 320px }
}
"""
_SCRIPT = """
const plots = [...document.querySelectorAll("[data-figure]")];
for (const plot of plots) {
  const {data, layout} = JSON.parse(plot.dataset.figure);
  Plotly.newPlot(plot, data, layout, {responsive: true, displayModeBar: false});
}
addEventListener("beforeprint", () => plots.forEach((plot) => {
  const grid = plot.closest(".grid"), columns = grid ? Math.min(grid.children.length, grid.matches(".two") ? 2 : 3) : 1;
  Plotly.relayout(plot, {autosize: false, width: (700 - 28 * (columns - 1)) / columns});  // A4 and letter less margins
}));
addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, {autosize: true, width: null})));
"""


def write_report(artifact_dir: Path, output: Path | None = None) -> Path:
    """Write the report of an artefact; returns the file.

    Args:
        artifact_dir: holds the artefact and, where they exist, `metrics/<stage>.jsonl` and `eval.json`.
        output: the file to write; default: `report.html` in `artifact_dir`.

    Raises:
        ValueError: no artefact there, a malformed input, or an output that is a directory.
    """
    folder = Path(artifact_dir)
    target = Path(output) if output else folder / "report.html"
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{str(folder)!r} is not an artefact: expected a directory with {CONFIG_FILE}. Make one with `rtpurbo convert`."
        )
    if target.is_dir():
        raise ValueError(f"Output {str(target)!r} is a directory; expected a file such as report.html.")
    artifact = Artifact.load(folder)
    card.check_artifact(artifact, str(folder / CONFIG_FILE))
    curves = {stage: card.read_curve(folder, stage) for stage in ("train_indexer", "distill")}
    curves = {stage: rows for stage, rows in curves.items() if stage in artifact.stages}
    page = _page(artifact, card.read_evaluation(folder), curves)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


MODES = {
    "heads": ("single heads select", SPARSE),
    "groups": ("whole groups select", MARK),
    "paper": ("retrieval heads dense in prefill (paper)", "#009e73"),
}
"""What a layer benchmark's modes are called, and their colours."""


def write_speed_plot(result: dict[str, Any], output: Path) -> None:
    """Write one file with the speedup over the best dense kernel against length, from what `bench_layer` returned.

    A panel for decode and one for prefill, a line per mode and batch; lengths that were refused have no mark.
    """
    figures = []
    for phase, rows in (("decode", result["rows"]), ("prefill", result["prefill_rows"])):
        shown = sorted((row for row in rows if "speedup" in row), key=lambda row: row["slots"])
        lengths, traces = sorted({row["slots"] for row in shown}), []
        batches = sorted({row["batch"] for row in shown})
        for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in shown):
            its = [row for row in shown if (row["mode"], row["batch"]) == (mode, batch)]
            name, color = MODES[mode]
            name += f", batch {batch}" * (phase == "decode")
            dash = ("solid", "dash", "dot", "dashdot")[batches.index(batch) % 4]
            x, y = [row["slots"] for row in its], [row["speedup"] for row in its]
            hover = f"{name}, %{{x:,}} tokens: %{{y:.2f}} ×"
            traces.append(_line(name, x, y, hover, color, dash=dash, mode="lines+markers"))
        ticks = {"tickvals": lengths, "ticktext": [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths]}
        x_axis = {"title": "tokens, log scale", "type": "log", **ticks}
        y_axis = {"title": "speedup over the best dense kernel", "rangemode": "tozero", "tickformat": ".3~g"}
        caption = "Above 1 the sparse layer is faster than the best dense kernel on the same machine."
        plot = _notes(["No dense kernel ran, so nothing is compared."])
        if traces:
            plot = _figure(phase, caption, traces, x=x_axis, y=y_axis)
        figures.append(f"<section><h2>{phase.capitalize()}</h2>{plot}</section>")
    shape = result["shape"]
    window = f"{'at most ' if shape.get('windows') else ''}{card.tokens(shape['window_tokens'])}"
    about = (
        f"{shape['query_heads']} query heads, {shape['kv_heads']} KV heads and {shape['head_dim']} dimensions, window of "
        f"{window}; {result['device']}, {result['dtype']}, PyTorch {result['torch']}, {result['attention']}."
    )
    body = f"""<header><p class=caption>RTPurbo bench</p><h1>Speed of one attention layer</h1><p>{escape(about)}</p></header>
<main class="grid two">{"".join(figures)}</main>"""
    with atomic_path(output) as temporary:
        temporary.write_text(_document("RTPurbo bench: one attention layer", body), encoding="utf-8")


def _page(artifact: Artifact, evaluation: dict[str, Any], curves: dict[str, list[dict[str, float]]]) -> str:
    name, heads, sparse = escape(str(artifact.base_model["name"])), artifact.heads, artifact.config
    pairs, rows = card.speed_pairs(evaluation), card.measured_rows(artifact, evaluation)
    tiles = [(f"{heads.ratio:.1%}", "of query heads retrieve"), (f"{heads.full_kv_ratio:.1%}", "of KV heads are kept whole")]
    for dense, found in pairs[-1:]:
        for key, what in (("cache_bytes", "cache"), ("decode_tokens_per_second", "decode speed")):
            if dense[key]:
                what = f"the dense {what} at {card.tokens(dense['length_tokens'])}"
                tiles.append((f"{found[key] / dense[key]:.2f} ×", what))
    index = f"the far tokens that a {sparse.index_dim}-dimensional index selects with {sparse.rule}"
    summary = f"{_table(card.HEADER, rows, 'rows')}<p class=caption>{escape(card.caption(evaluation))}</p>" if rows else ""
    sections = {
        "Dense and sparse": _notes(card.gaps(artifact, evaluation)) + summary,
        "Head map": _head_map(artifact),
        "Index": _curves("train_indexer", artifact, curves) + _index_units(artifact, evaluation),
        "Distillation": _curves("distill", artifact, curves)
        + _notes(artifact.stages.get("distill", {}).get("metrics", {}).get("notes", [])),
        "Needles in long documents": _needles(evaluation.get("needle", [])),
        "Loss by position": _loss(evaluation.get("loss", {})),
        "Short context": _short(evaluation),
        "Long generation": _long_generation(evaluation.get("long_generation")),
        "Cache": _cache(artifact, pairs) if pairs else "",
        "Settings": _settings(artifact, evaluation),
    }
    window = f"{'' if artifact.heads.windows is None else 'at most '}{card.tokens(sparse.window_tokens)}"
    body = f"""<header>
<p class=caption>RTPurbo report</p>
<h1>{name.replace("/", "/<wbr>")}</h1>
<p>Sparse version: every head sees a window of {window} and {sparse.sink_tokens} sinks; retrieval
heads also read {"all earlier tokens" if artifact.indexer is None else index}.</p>
<div class=tiles>{"".join(f"<div><b>{value}</b>{what}</div>" for value, what in tiles)}</div>
<noscript><p class=note>The figures need JavaScript.</p></noscript>
</header>
<main>{"".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content)}</main>"""
    return _document(f"RTPurbo report: {name}", body)


def _document(title: str, body: str) -> str:
    """A whole page with the scripts of its figures; title and body are escaped."""
    from plotly.offline import get_plotlyjs

    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
{body}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _notes(texts: list[str]) -> str:
    """Escaped paragraphs; what stands between backticks is code."""
    shown = (re.sub("`(.+?)`", r"<code>\1</code>", escape(text)) for text in texts)
    return "".join(f"<p class=note>{text}</p>" for text in shown)


def _table(header: tuple[str, ...], rows: list[Any], kind: str = "") -> str:
    """The rows are escaped; a table of kind "rows" becomes a list of labelled values on a phone."""
    lines = []
    for first, *rest in rows:
        cells = zip(header[1:], rest, (" class=none" if cell == "–" else "" for cell in rest), strict=True)
        line = "".join(f'<td data-label="{name}"{none}>{escape(cell)}</td>' for name, cell, none in cells)
        lines.append(f"<tr><th scope=row>{escape(first)}</th>{line}</tr>")
    head = "".join(f"<th scope=col>{text}</th>" for text in header)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _figure(name: str, caption: str, traces: list[Any], *, x: Any, y: Any, height: int = 320, **layout: Any) -> str:
    """A Plotly figure and its caption; `x` and `y` describe the axes."""
    from plotly.graph_objects import Figure

    axis = {"automargin": True, "fixedrange": True, "gridcolor": "#e6e8eb", "linecolor": "#8a9099", "zeroline": False}
    axis |= {"ticks": "outside", "tickcolor": "#8a9099", "tickformat": ","}
    layout |= {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 40 if len(traces) > 1 else 8, "b": 8},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2328"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "dragmode": False,  # a finger on a figure scrolls the page
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
    }
    data = escape(Figure(traces, layout).to_json())
    plot = f'<div id="{name}" style="height:{height}px" data-figure="{data}"></div>'
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _line(name: str, x: list[Any], y: list[Any], hover: str, color: str, **more: Any) -> dict[str, Any]:
    line = {"color": color, "width": 2, "dash": more.pop("dash", "solid"), "shape": more.pop("shape", "linear")}
    trace = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "marker": {"color": color}}
    return {**trace, "hovertemplate": f"{hover}<extra></extra>", **more}


def _head_map(artifact: Artifact) -> str:
    """Scores of all heads, the retrieval heads outlined; without calibration the roles alone."""
    heads, stage = artifact.heads, artifact.stages.get("calibrate")
    layers, size = range(len(heads.retrieval)), heads.group_size
    z, outline_x, outline_y = [], [], []
    for head in range(heads.query_heads):
        scores = [stage["metrics"]["scores"][i][head] if stage else float(head in heads.retrieval_heads(i)) for i in layers]
        z.append([None if heads.retrieval[i] is None else scores[i] for i in layers])
    for i in layers:
        for top in heads.retrieval_heads(i)[:: heads.heads_per_unit]:
            bottom = top + heads.heads_per_unit - 1
            outline_x += [i - 0.42, i + 0.42, i + 0.42, i - 0.42, i - 0.42, None]
            outline_y += [top - 0.42, top - 0.42, bottom + 0.42, bottom + 0.42, top - 0.42, None]
    bar = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "len": 0.4, "thickness": 10}
    bar |= {"tickvals": [0, 0.5, 1], "ticktext": ["0", "score", "1"]}
    heat = {"type": "heatmap", "z": z, "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1, "showscale": bool(stage), "colorbar": bar}
    heat |= {"hovertemplate": "layer %{x}, query head %{y}<br>score %{z:.3f}<extra></extra>"}
    heat["colorscale"] = [[0, "#eef3f8"], [1, "#08457e"]]
    marks = _line("retrieval head", outline_x, outline_y, "", MARK, hoverinfo="skip", showlegend=True)
    edges = [g * size - 0.5 for g in range(1, heads.kv_heads)]
    borders = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": e, "y1": e, "line": {"width": 1.5}} for e in edges]
    caption = (
        "Look for where the outlined heads gather: only they read the whole document. The band between two lines is one KV "
        "head, kept whole in every layer where one of its query heads is outlined"
        + ("; blank columns are layers left as they are." if None in heads.retrieval else ".")
    )
    x = {"title": "layer", "showgrid": False, "range": [-0.5, len(layers) - 0.5]}
    named = range(0, heads.kv_heads, 1 + heads.kv_heads // 33)
    y = {"title": "query heads", "showgrid": False, "range": [heads.query_heads - 0.5, -0.5]}
    y |= {"tickvals": [(g + 0.5) * size - 0.5 for g in named], "ticktext": [f"KV {g}" for g in named]}
    height = 130 + min(620, 22 * heads.query_heads)
    figure = _figure("head-map", caption, [heat, marks], x=x, y=y, height=height, shapes=borders)
    metrics = stage["metrics"] if stage else {"notes": ["This head map was made without calibration, so it has no scores."]}
    if overlap := card.overlap_sentence(metrics):
        figure += f"<p class=caption>{overlap}</p>"
    return figure + _notes(metrics.get("notes", []))


def _curves(stage: str, artifact: Artifact, curves: dict[str, list[dict[str, float]]]) -> str:
    """Loss, top-1 agreement (distillation) and learning rate by step, side by side."""
    figures, rows = [], curves.get(stage, [])
    for key, title, color, caption in (
        ("loss", "loss (nats)", SPARSE, "Look for a fall that levels off; one that goes on asks for more steps."),
        ("top1_agreement", "same top token", SPARSE, "Look for a rise: how often sparse and dense agree on the next token."),
        ("learning_rate", "learning rate", DENSE, "Look for a loss that levels off before the rate: steps to spare."),
    ):
        steps, values = [row["step"] + 1 for row in rows if key in row], [row[key] for row in rows if key in row]
        log = key == "loss" and min(values, default=0) > 0
        y: dict[str, Any] = {"title": title + ", log scale" * log, "type": "log" if log else "linear"}
        y["tickformat"] = ".1~%" if key == "top1_agreement" else ".3~g"
        if key == "learning_rate":  # of one or two steps a tiny constant
            y["range"] = [0, 1.05 * max(values, default=1.0)]
        mode = "lines+markers" if len(values) < 20 else "lines"  # a single step is a dot
        if values:
            trace = _line(title, steps, values, "step %{x}: %{y:.4g}", color, mode=mode)
            figures.append(_figure(f"{stage}-{key}", caption, [trace], x={"title": "step"}, y=y, height=240))
    lost = f"<p class=caption>No curves: there is no <code>metrics/{stage}.jsonl</code>.</p>"
    return f"<div class=grid>{''.join(figures)}</div>" if figures else lost if stage in artifact.stages else ""


def _index_units(artifact: Artifact, evaluation: dict[str, Any]) -> str:
    """Attention mass recalled against tokens selected, a mark per index unit."""
    traces = []
    for when, index, symbol, color in (
        ("after training", artifact.stages.get("train_indexer", {}).get("metrics"), "circle-open", DENSE),
        ("evaluation", evaluation.get("index"), "circle", SPARSE),
    ):
        if index:
            units, name = index["units"], f"{when}, {card.tokens(index['length_tokens'])}"
            text = [f"layer {u['layer']}, unit {u['unit']}, KL {u['kl']:.3f}" for u in units]
            selected, mass = [u["tokens_selected"] for u in units], [u["mass_kept"] for u in units]
            trace = _line(name, selected, mass, "%{text}<br>%{x:.0f} tokens, %{y:.1%} of the mass", color, text=text)
            marker = {"symbol": symbol, "color": color, "size": 8, "opacity": 0.75}
            traces.append({**trace, "mode": "markers", "marker": marker, "showlegend": True})
    caption = (
        "Each mark is one selection. Best is the top left, much attention mass found with few tokens; low ones miss part of "
        "what full attention reads."
    )
    x = {"title": "far tokens selected per query", "rangemode": "tozero"}
    y = {"title": "mass recalled", "tickformat": ".1~%"}
    return _figure("index-units", caption, traces, x=x, y=y, height=360) if traces else ""


def _needles(results: list[dict[str, Any]]) -> str:
    """Per kind two tables, dense and sparse: share of right answers and sample count by depth and length."""
    blocks = []
    for kind in dict.fromkeys(one["kind"] for one in results):
        grids, tables = {one["length_tokens"]: one["depths"] for one in results if one["kind"] == kind}, []
        lengths = sorted(grids)
        for name in ("dense", "sparse"):
            head = "".join(f"<th scope=col>{f'{n:,.0f}' if n % 1024 else f'{n / 1024:,.0f}k'}</th>" for n in lengths)
            lines = [f"<th scope=col>depth</th>{head}"]
            for depth in sorted({d for grid in grids.values() for d in grid}):
                lines.append(f"<th scope=row>{escape(depth)}</th>")
                for cell in (grids[n].get(depth) for n in lengths):
                    color = f"background:color-mix(in srgb, #f6f5f1 {cell[name]:.1%}, #e8853b)" if cell else ""
                    share = f"{cell[name]:.0%}<small>n = {cell['samples']}</small>" if cell else ""
                    lines[-1] += f'<td style="{color}">{share}</td>'
            rows = "</tr><tr>".join(lines)
            tables.append(f"<table class=needle><caption>{name.title()}</caption><tr>{rows}</tr></table>")
        title = f"<h3>{escape(kind.replace('_', '-').capitalize())}</h3>"
        blocks.append(f"<section>{title}<div class=pair>{''.join(tables)}</div></section>")
    caption = (
        "Look for cells where sparse is more orange than dense: answers lost there. Columns are document lengths in tokens "
        "(1k = 1,024), rows the depth of the fact from start (0) to end (1); n counts the questions of a cell."
    )
    grid = f'<div class="grid two" style="--needs: {50 + 52 * len({one["length_tokens"] for one in results})}px">'
    return f"{grid}{''.join(blocks)}</div><p class=caption>{caption}</p>" if blocks else ""


def _loss(losses: dict[str, Any]) -> str:
    figures = []
    for number, (source, one) in enumerate(losses.items()):
        buckets, traces = one["by_position"], []
        edges = [b["from"] for b in buckets] + [b["to"] for b in buckets[-1:]]
        for name, color, dash, _ in _STYLES:
            values = [b[f"loss_{name}"] for b in (*buckets, *buckets[-1:])]
            traces.append(_line(name, edges, values, f"{name}: %{{y:.4f}} nats", color, dash=dash, shape="hv"))
        what = f"{source}, {one['samples']} document{'s' * (one['samples'] != 1)}"
        caption = f"{what}: look for a gap that opens to the right, where text builds on what is far back."
        x, y = {"title": "position in the document (tokens)"}, {"title": "loss (nats per token)"}
        figures.append(_figure(f"loss-{number}", caption, traces, x=x, y=y, height=300))
    return f"<div class='grid two'>{''.join(figures)}</div>" if figures else ""


def _short(evaluation: dict[str, Any]) -> str:
    """Dense, sparse and the distilled weights with dense attention, side by side."""
    measured = card.short_rows(evaluation)
    distilled = all("weights" in row.pairs for row in measured)
    names = ("sparse", "weights") if distilled else ("sparse",)
    more = ("Weights", "Weights − dense [95 %]") if distilled else ()
    header, rows = ("Measure", "Dense", "Sparse", "Sparse − dense [95 %]", *more, "Samples"), []
    for row in measured:
        cells = [row.value(row.pairs["sparse"]["dense"])]
        for name in names:
            cells += [row.value(row.pairs[name][name]), row.difference(row.pairs[name])]
        rows.append((row.measure, *cells, row.samples))
    caption = (
        "Where most of a text lies in the window nothing should be lost: look for a difference whose interval leaves out 0."
        + " Weights are the distilled ones with dense attention." * distilled
    )
    return f"{_table(header, rows, 'rows')}<p class=caption>{caption}</p>" if rows else ""


def _long_generation(found: dict[str, Any] | None) -> str:
    """How far sparse decoding drifts from dense along a generated text."""
    if not found:
        return ""
    drift, figures = found["drift"], []
    edges = [b["from"] for b in drift] + [b["to"] for b in drift[-1:]]
    what = f"{found['prompts']} text{'s' * (found['prompts'] != 1)} of {card.tokens(found['tokens'])}"
    what += f" generated after {card.tokens(found['prompt_tokens'])}"
    x = {"title": "position in the generated text (tokens)"}
    for key, title, form, caption in (
        ("kl", "KL to dense (nats)", ".3~g", "look for a rise to the right, where errors of the sparse cache add up."),
        ("top1_agreement", "same top token", ".1~%", "the dense model's own text, read by sparse decode steps."),
    ):
        values = [b[key] for b in (*drift, *drift[-1:])]
        trace = _line(title, edges, values, f"%{{y:{form}}}", SPARSE, shape="hv")
        y = {"title": title, "tickformat": form} | ({"rangemode": "tozero"} if key == "kl" else {})
        figures.append(_figure(f"drift-{key}", f"{what}: {caption}", [trace], x=x, y=y, height=300))
    return f"<div class='grid two'>{''.join(figures)}</div>"


def _cache(artifact: Artifact, pairs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    measured, traces = [dense["length_tokens"] for dense, _ in pairs], []
    ends = sorted([0.0, artifact.config.window_tokens + artifact.config.sink_tokens, 1.25 * measured[-1]])
    computed = card.computed_cache(artifact, pairs[-1][0], ends)
    for i, (name, color, dash, symbol) in enumerate(_STYLES):
        marker = {"color": color, "symbol": symbol, "size": 11, "line": {"width": 2, "color": color}}
        sizes, hover = [pair[i]["cache_bytes"] / 2**20 for pair in pairs], "%{x:,} tokens: %{y:,.1f} MiB"
        traces.append(_line(f"{name}, measured", measured, sizes, hover, color, mode="markers", marker=marker))
        if computed:
            sizes = [b / 2**20 for b in computed[name]]
            traces.append(_line(f"{name}, computed", ends, sizes, hover, color, dash=dash, hoverinfo="skip"))
    caption = "Look at the slopes: a further token costs the sparse cache only its full KV heads and index keys."
    if computed:
        caption += " Marks are measured; lines are computed from the head map, without the room that buffers keep to grow."
    x, y = ({"title": title, "rangemode": "tozero"} for title in ("document length (tokens)", "cache (MiB)"))
    return _figure("cache-bytes", caption, traces, x=x, y=y, height=360)


def _settings(artifact: Artifact, evaluation: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        plain = {"None": "not set", "True": "yes", "False": "no"}.get(str(value), str(value))
        return ", ".join(map(text, value)) or "none" if isinstance(value, list) else plain

    blocks = []
    for title, values in card.all_settings(artifact, evaluation).items():
        table = _table(("Setting", "Value"), [(name, text(value)) for name, value in values.items()])
        blocks.append(f"<section><h3>{escape(title)}</h3>{table}</section>")
    return f"<div class=columns>{''.join(blocks)}</div>"

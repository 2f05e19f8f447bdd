"""The report's sections on bases (spectra, variance captured) and on quantization errors."""

from __future__ import annotations

from collections.abc import Callable

from offline.report.blocks import Plot, Section, Table
from offline.report.data import ReportData
from offline.report.plots.errors import ROUNDING, error_panels, weight_series
from offline.report.plots.spectra import captured_variance, layer_spectra, spectrum
from offline.report.sections import AGAIN
from offline.report.stats import CheckpointStats, LayerErrors, RoundingError, SiteErrors, WeightError
from offline.report.text import geometric_mean, percent
from resq_vllm.formats.metadata import SITES, SiteName

SITE_TITLES: dict[SiteName, str] = {
    "qkv": "q, k, v",
    "o": "o_proj",
    "gate_up": "gate, up",
    "down": "down_proj",
}


def bases(data: ReportData) -> Section:
    """Eigenvalue spectra and variance captured."""
    if data.bases is None:
        return Section(
            "bases",
            "Bases",
            absent="No bases lie beside this checkpoint: its method uses none, or resq_basis.safetensors was removed.",
        )
    found, high_hidden, high_head = data.bases, data.high_hidden, data.high_head
    captured = found.captured(high_hidden, high_head)
    residual = float(captured.residual)
    shaded = "the shaded end is what stays at 8 bits" if high_hidden else "no part stays at 8 bits here"
    plots = [
        Plot(
            "spectrum-residual",
            "Residual stream (U_A)",
            f"The steeper the right end, the more of the activations a few directions hold; {shaded}.",
            "Eigenvalue spectrum of the residual stream on a log scale, the high-precision part shaded.",
            spectrum(found.residual_variance, high_hidden),
        ),
        Plot(
            "spectrum-value",
            "Values (U_B), mean over kv heads",
            "One line a layer: the flatter it ends, the less of the values the 8-bit part captures.",
            "Eigenvalue spectra of the values, one line a layer, on a log scale.",
            layer_spectra(found.value_variance.mean(1), high_head),
        ),
        Plot(
            "spectrum-key",
            "Keys after RoPE (U_C)",
            "One line a layer, as for the values; U_C, one matrix for a layer's heads, turns q and k while serving.",
            "Eigenvalue spectra of the keys, one line a layer, on a log scale.",
            layer_spectra(found.key_variance, high_head),
        ),
    ]
    if high_head:
        plots.append(
            Plot(
                "variance",
                "Second moment captured by the 8-bit part",
                "The height over the dotted line is what choosing directions by PCA gains over an arbitrary choice.",
                "Share of the second moment captured by the high-precision part, by site and layer.",
                captured_variance(residual, captured.value, captured.key, data.metadata.high_fraction),
            )
        )
    rows = (
        ("residual stream (U_A)", f"{high_hidden:,} of {found.residual.shape[-1]:,}", *[f"{100 * residual:.1f} %"] * 3),
        ("values (U_B)", f"{high_head} of {data.metadata.head_dim}", *_spread(captured.value.flatten().tolist())),
        ("keys (U_C)", f"{high_head} of {data.metadata.head_dim}", *_spread(captured.key.tolist())),
    )
    table = Table(
        "Share of the second moment in the 8-bit part, over layers (and kv heads).",
        ("basis", "dims at 8 bits", "mean", "lowest", "highest"),
        rows,
    )
    text = (
        "Calibration measures along which directions activations are large (the eigenvectors of their second moment). "
        "The largest eighth or so stays at 8 bits and the rest goes to 4 bits; random rotations inside both parts "
        "then spread what is left of outliers."
    )
    return Section("bases", "Bases", (text,), plots=tuple(plots), tables=(table,))


def _spread(shares: list[float]) -> list[str]:
    return [f"{100 * share:.1f} %" for share in (sum(shares) / len(shares), min(shares), max(shares))]


def errors(data: ReportData) -> Section:
    """Activations, weights and outputs per site and layer, before and after rotation."""
    stats = data.stats
    if stats is None or not any(layer.sites for layer in stats.layers):
        return Section("errors", "Quantization error", absent=_absent(stats, "layer errors"))
    series = weight_series(data.gptq)
    plots = (
        Plot(
            "error-activation",
            "Inputs of the linear layers",
            "Where the blue line runs below the orange one, rotation made the activations easier to round.",
            "Relative error of each site's input by layer, before and after rotation.",
            error_panels(_panels(stats, _activation), ROUNDING),
        ),
        Plot(
            "error-weight",
            "Weights",
            "GPTQ moves weights further than rounding does, on purpose: it trades their error for the output's (next).",
            "Relative error of each site's weights by layer: before rotation, rotated, and as stored.",
            error_panels(_panels(stats, lambda site: _weight(site.weight, data.gptq)), series),
        ),
        Plot(
            "error-output",
            "Outputs of the linear layers",
            "The error that the model feels, weights and activations together: the lower, the better.",
            "Relative error of each site's output by layer: before rotation, rotated, and as served.",
            error_panels(_panels(stats, lambda site: _weight(site.output, data.gptq)), series),
        ),
    )
    text = (
        f"Relative squared errors ‖x̂ − x‖²/‖x‖² on {stats.tokens:,} calibration tokens, measured while the model was "
        "quantized; 1 % means that a hundredth of the energy is noise (20 dB). “Before rotation” rounds the same "
        "tokens in the model's own axes to the same bits, with the channels of largest second moment at 8 bits."
    )
    if data.metadata.recipe.get("compensate"):
        text += " Rotated weights are compared with what compensation asks for: they also mend earlier layers' errors."
    tables = (_site_table(stats),)
    return Section("errors", "Quantization error", (text,), plots=plots, tables=tables)


def kv(data: ReportData) -> Section:
    """K and V per layer, before and after rotation."""
    stats = data.stats
    if all(layer.low_bits == 16 for layer in data.metadata.kv_cache):
        return Section("kv", "KV cache error", absent="The KV cache of this checkpoint is not quantized.")
    if stats is None or not any(layer.key for layer in stats.layers):
        return Section("kv", "KV cache error", absent=_absent(stats, "KV cache errors"))
    panels = {
        "keys": _pair(stats, lambda layer: layer.key),
        "values": _pair(stats, lambda layer: layer.value),
    }
    plot = Plot(
        "error-kv",
        "Cached keys and values",
        "Every token reads its context through this error; layers without points keep a 16-bit cache.",
        "Relative error of cached keys and values by layer, before and after rotation.",
        error_panels(panels, ROUNDING),
    )
    rows = tuple((title, *_means(lines)) for title, lines in panels.items())
    table = Table(
        "Geometric means over layers: before rotation, and after it as the checkpoint is served.",
        ("cached", "before", "after", "before ÷ after"),
        rows,
    )
    return Section("kv", "KV cache error", plots=(plot,), tables=(table,))


def output_errors(stats: CheckpointStats) -> tuple[float, float] | None:
    """Geometric means over layers and sites of the output's error, before and as served; None without any."""
    sites = [site.output for layer in stats.layers for site in layer.sites.values()]
    before, after = geometric_mean(s.before for s in sites), geometric_mean(s.after for s in sites)
    return None if before is None or after is None else (before, after)


def _absent(stats: CheckpointStats | None, what: str) -> str:
    if stats is None:
        return f"This checkpoint was written by a release that measured no {what}. {AGAIN}"
    return f"No {what} were measured for this checkpoint: its method does not record them, or nothing was rounded here."


def _activation(site: SiteErrors) -> tuple[float, ...]:
    return site.activation.before, site.activation.after


def _weight(error: WeightError, gptq: bool) -> tuple[float, ...]:
    return (error.before, error.rotated, error.after) if gptq else (error.before, error.after)


def _panels(
    stats: CheckpointStats, choose: Callable[[SiteErrors], tuple[float, ...]]
) -> dict[str, list[list[float | None]]]:
    """Panel title -> one list a series, one value a layer. Sites that no layer quantizes have no panel."""
    panels: dict[str, list[list[float | None]]] = {}
    for name in SITES:
        found = [layer.sites.get(name) for layer in stats.layers]
        values = [None if site is None else choose(site) for site in found]
        width = max((len(value) for value in values if value is not None), default=0)
        if width:
            panels[SITE_TITLES[name]] = [[None if v is None else v[i] for v in values] for i in range(width)]
    return panels


def _pair(stats: CheckpointStats, choose: Callable[[LayerErrors], RoundingError | None]) -> list[list[float | None]]:
    found = [choose(layer) for layer in stats.layers]
    return [[None if e is None else e.before for e in found], [None if e is None else e.after for e in found]]


def _means(lines: list[list[float | None]]) -> tuple[str, ...]:
    means = [geometric_mean(line) for line in lines]
    first, last = means[0], means[-1]
    ratio = "–" if first is None or not last else f"{first / last:.1f}×"
    return (*("–" if mean is None else percent(mean) for mean in means), ratio)


def _site_table(stats: CheckpointStats) -> Table:
    kinds: tuple[tuple[str, Callable[[SiteErrors], tuple[float, ...]]], ...] = (
        ("input", _activation),
        ("weights", lambda site: (site.weight.before, site.weight.after)),
        ("output", lambda site: (site.output.before, site.output.after)),
    )
    rows = [(title, kind, *_means(lines)) for kind, choose in kinds for title, lines in _panels(stats, choose).items()]
    rows.sort(key=lambda row: list(SITE_TITLES.values()).index(row[0]))
    strong = frozenset(i for i, row in enumerate(rows) if row[1] == "output")
    return Table(
        "Geometric means over layers: before rotation, and after it as the checkpoint is served.",
        ("site", "what", "before", "after", "before ÷ after"),
        tuple(rows),
        text_columns=2,
        strong=strong,
    )

"""``resq inspect``: what a checkpoint holds, as figures and as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from offline.bases.bases import Bases
from offline.pack.expected import UNPACKED_KV_BITS
from offline.pack.names import site_of
from offline.pack.reader import ResQCheckpoint
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, QuantizationMetadata, high_count

_BF16_BYTES = 2


@dataclass(frozen=True)
class SiteReport:
    """One kind of linear layer over all decoder layers: columns of an input, bits, bytes in the files.

    ``weight_group``: columns that share a weight scale, 0 = all; ``low_rank``: of the correction.
    """

    site: str
    modules: int
    low_columns: int
    high_columns: int
    weight_low_bits: int
    weight_high_bits: int
    activations: str
    hadamard_groups: int
    low_bytes: int
    high_bytes: int
    scale_bytes: int
    weights: int
    weight_group: int = 0
    low_rank: int = 0
    correction_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All tensors of the site: codes, scales and low-rank corrections."""
        return self.low_bytes + self.high_bytes + self.scale_bytes + self.correction_bytes

    @property
    def weight_bits(self) -> float:
        """Average bits of a weight's code, without scales; 0 where every module of the site is left in 16 bits."""
        return 8 * (self.low_bytes + self.high_bytes) / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class VarianceReport:
    """Share (0 to 1) of a site's second moment that falls into its high-precision dims: over layers and heads."""

    site: str
    high: int
    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class CheckpointReport:
    """Everything ``resq inspect`` shows. Bytes are those of tensors in the files.

    ``average_bits`` counts codes, scales and low-rank corrections of the decoder layers' packed linears, not lm_head;
    ``lm_head_weight_bits`` are the mean of its low and high columns' codes;
    ``kv_bytes_per_token`` and its bf16 counterpart count K and V of all layers and kv heads.
    """

    directory: str
    tool_version: str
    high_fraction: float
    max_tp: int
    layers: int
    head_dim: int
    kv_heads: int
    kv_bits: list[int]
    kv_high: list[int]
    ignored: list[str]
    sites: list[SiteReport]
    embedding_bytes: int
    lm_head_bits: int
    lm_head_weight_bits: float
    lm_head_weights: int
    lm_head_bytes: int
    rotation_bytes: int
    other_bytes: int
    total_bytes: int
    average_bits: float
    kv_bytes_per_token: int
    kv_bytes_per_token_bf16: int
    variance: list[VarianceReport]
    recipe: dict[str, str | int | float | bool | None]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, with the average bits of each site."""
        value: dict[str, object] = asdict(self)
        value["sites"] = [asdict(site) | {"weight_bits": site.weight_bits} for site in self.sites]
        return value

    def print(self, console: Console | None = None) -> None:
        """Tables for a terminal of 80 columns or more."""
        out = console or Console()
        out.print(f"[bold]{self.directory}[/bold]: {self.layers} layers, format by resq-vllm {self.tool_version}")
        for table in (self._site_table(), self._size_table(), self._variance_table()):
            if table.row_count:
                out.print(table)
        if self.ignored:
            out.print(f"left in 16 bits: {', '.join(self.ignored)}")

    def _site_table(self) -> Table:
        table = Table(title="linear layers", box=SIMPLE, padding=0, pad_edge=False)
        for heading in ("site", "inputs×bits", "activation bits"):
            table.add_column(heading, no_wrap=True)
        for heading in ("low", "high", "scales", "bits"):
            table.add_column(heading, justify="right", no_wrap=True)
        for s in self.sites:
            parts = ((s.low_columns, s.weight_low_bits), (s.high_columns, s.weight_high_bits))
            table.add_row(
                s.site,
                " + ".join(f"{columns}×{bits}" for columns, bits in parts if columns),
                f"{s.activations} ({s.hadamard_groups})" if s.hadamard_groups else s.activations,
                _size(s.low_bytes),
                _size(s.high_bytes),
                _size(s.scale_bytes),
                f"{s.weight_bits:.2f}",
            )
        return table

    def _size_table(self) -> Table:
        table = Table(title="sizes", show_header=False, box=SIMPLE)
        table.add_column("what")
        table.add_column("size", justify="right")
        table.add_row("packed linear layers", _size(sum(s.bytes - s.correction_bytes for s in self.sites)))
        if any(s.low_rank for s in self.sites):
            ranks = ", ".join(dict.fromkeys(str(s.low_rank) for s in self.sites))
            table.add_row(f"low-rank corrections (rank {ranks})", _size(sum(s.correction_bytes for s in self.sites)))
        table.add_row("embedding", _size(self.embedding_bytes))
        table.add_row(f"lm_head ({self.lm_head_weight_bits:.3g} bit)", _size(self.lm_head_bytes))
        table.add_row("key rotations", _size(self.rotation_bytes))
        table.add_row("norms, biases, layers in 16 bits", _size(self.other_bytes))
        table.add_row("[bold]total[/bold]", f"[bold]{_size(self.total_bytes)}[/bold]")
        table.add_row("bits a packed weight, scales and corrections included", f"{self.average_bits:.3f}")
        table.add_row("KV cache", _kv_summary(self.kv_bits, self.kv_high, self.head_dim))
        ratio = self.kv_bytes_per_token_bf16 / self.kv_bytes_per_token
        table.add_row("KV bytes a token", f"{self.kv_bytes_per_token:,}")
        table.add_row("KV bytes a token in bf16", f"{self.kv_bytes_per_token_bf16:,} ({ratio:.2f}×)")
        return table

    def _variance_table(self) -> Table:
        table = Table(title="variance in the high-precision dims", box=SIMPLE)
        for heading in ("site", "dims", "mean", "lowest", "highest"):
            table.add_column(heading)
        for v in self.variance:
            table.add_row(v.site, str(v.high), f"{v.mean:.1%}", f"{v.lowest:.1%}", f"{v.highest:.1%}")
        return table


def inspect_checkpoint(directory: Path) -> CheckpointReport:
    """Read a checkpoint's headers (and its bases, where they lie beside it) and add up.

    Raises ResQError for everything that :class:`offline.pack.reader.ResQCheckpoint` refuses, and for a damaged file of
    bases.
    """
    checkpoint = ResQCheckpoint(directory)
    metadata = checkpoint.metadata
    sizes = {name: checkpoint.nbytes(name) for name in checkpoint.specs}
    sites = [_site(checkpoint, name, sizes) for name in SITES]
    linear_bytes = sum(s.bytes for s in sites)
    weights = sum(s.weights for s in sites)
    embedding = sum(sizes[n] for n in sizes if n.endswith("embed_tokens.weight"))
    lm_head = sum(sizes[n] for n in sizes if n.startswith("lm_head."))
    rotations = sum(sizes[n] for n in sizes if n.endswith(".key_rotation"))
    kv_heads = int(checkpoint.hf_config.num_key_value_heads)
    total = sum(sizes.values())
    return CheckpointReport(
        directory=str(directory),
        tool_version=metadata.tool_version,
        high_fraction=metadata.high_fraction,
        max_tp=metadata.max_tp,
        layers=len(metadata.kv_cache),
        head_dim=metadata.head_dim,
        kv_heads=kv_heads,
        kv_bits=[layer.low_bits for layer in metadata.kv_cache],
        kv_high=[layer.high for layer in metadata.kv_cache],
        ignored=list(metadata.ignore),
        sites=sites,
        embedding_bytes=embedding,
        lm_head_bits=metadata.lm_head_bits,
        lm_head_weight_bits=metadata.lm_head_weight_bits,
        lm_head_weights=int(checkpoint.hf_config.vocab_size * checkpoint.hf_config.hidden_size),
        lm_head_bytes=lm_head,
        rotation_bytes=rotations,
        other_bytes=total - linear_bytes - embedding - lm_head - rotations,
        total_bytes=total,
        average_bits=8 * linear_bytes / weights if weights else 0.0,
        kv_bytes_per_token=kv_heads * kv_bytes_per_head(metadata),
        kv_bytes_per_token_bf16=kv_heads * len(metadata.kv_cache) * 2 * metadata.head_dim * _BF16_BYTES,
        variance=_variance(checkpoint),
        recipe=dict(metadata.recipe),
    )


def kv_bytes_per_head(metadata: QuantizationMetadata) -> int:
    """Bytes of K and V of one token and kv head over all layers, packed or bf16 as the metadata says."""
    total = 0
    for layer in metadata.kv_cache:
        if layer.low_bits == UNPACKED_KV_BITS:
            total += 2 * metadata.head_dim * _BF16_BYTES
        else:
            total += KVLayout(metadata.head_dim, layer.high, layer.low_bits).bytes_per_token
    return total


def _site(checkpoint: ResQCheckpoint, name: str, sizes: dict[str, int]) -> SiteReport:
    modules = {n: linear for n, (linear, _) in checkpoint.linears.items() if site_of(n) == name}
    site = next(spec for key, spec in checkpoint.metadata.sites.items() if key == name)

    def add_up(tensors: Iterable[str]) -> int:
        return sum(sizes.get(f"{module}.{tensor}", 0) for module in modules for tensor in tensors)

    act_bits = [site.act_low_bits] if site.low or site.scales == "token" else []
    act_bits += [site.act_high_bits] if site.high and site.scales != "token" else []
    return SiteReport(
        site=name,
        modules=len(modules),
        low_columns=site.low,
        high_columns=site.high,
        weight_low_bits=site.weight_low_bits,
        weight_high_bits=site.weight_high_bits,
        activations=f"{'+'.join(str(bits) for bits in act_bits)} per {site.scales}",
        hadamard_groups=site.hadamard_groups,
        low_bytes=add_up(["weight_low"]),
        high_bytes=add_up(["weight_high"]),
        scale_bytes=add_up(["weight_low_scale", "weight_high_scale"]),
        weights=sum(linear.out_features * linear.in_features for linear in modules.values()),
        weight_group=site.weight_group,
        low_rank=site.low_rank,
        correction_bytes=add_up(["low_rank_a", "low_rank_b"]),
    )


def _variance(checkpoint: ResQCheckpoint) -> list[VarianceReport]:
    if checkpoint.basis_path is None:
        return []
    bases = Bases.load(checkpoint.basis_path)
    metadata = checkpoint.metadata
    high_hidden, high_head = metadata.sites["qkv"].high, high_count(metadata.head_dim, metadata.high_fraction)
    captured = bases.captured(high_hidden, high_head)
    rows = (
        ("residual stream (U_A)", high_hidden, captured.residual),
        ("value (U_B)", high_head, captured.value),
        ("key (U_C)", high_head, captured.key),
    )
    return [
        VarianceReport(site, high, float(share.mean()), float(share.min()), float(share.max()))
        for site, high, share in rows
    ]


def _kv_summary(bits: list[int], high: list[int], head_dim: int) -> str:
    kinds = dict.fromkeys(zip(bits, high, strict=True))
    parts = []
    for low_bits, high_dims in kinds:
        layers = sum(1 for pair in zip(bits, high, strict=True) if pair == (low_bits, high_dims))
        split = f"{head_dim - high_dims} × {low_bits} bit + {high_dims} × 8 bit" if high_dims else f"{low_bits} bit"
        parts.append(split if len(kinds) == 1 else f"{split} in {layers} layers")
    return ", ".join(parts)


def _size(count: int) -> str:
    """Three digits and a unit."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1000:
            return f"{value:.3g} {unit}"
    return f"{value:.0f} GiB"

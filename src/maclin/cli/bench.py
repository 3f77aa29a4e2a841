"""``maclin bench``: speed, memory and decoding beside fused softmax, peers and the machine's limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import OptionError
from . import console
from .arguments import Device, Quiet

if TYPE_CHECKING:
    from ..bench import BenchJob
    from ..records import BenchResult

app = typer.Typer(
    name="bench",
    help="Speed, memory and decoding of attention, side by side with fused softmax and with what the machine allows.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Mechanisms = Annotated[
    str | None,
    typer.Option(help="By commas, with options: macformer:num_features=128:ppsbn=false,efficient. Default: all."),
]
_Lengths = Annotated[str | None, typer.Option(help="Tokens, by commas; with decode positions.")]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
_Heads = Annotated[int, typer.Option(help="Number of heads.")]
_HeadDim = Annotated[int, typer.Option(help="Width of a head.")]
_Batch = Annotated[int, typer.Option(help="Sequences in a batch.")]
_Backward = Annotated[bool, typer.Option("--backward", help="Forward and backward together.")]
_Causal = Annotated[bool, typer.Option("--causal", help="Causal attention.")]
_Peers = Annotated[bool, typer.Option("--peers", help="Also other people's packages, where they are installed.")]
_PeerFeatures = Annotated[int, typer.Option(help="Features, slots or landmarks of the peers.")]
_Seconds = Annotated[float, typer.Option(help="Time to spend on each latency.")]
_MaxSeconds = Annotated[
    float | None, typer.Option(help="Longest single run to start. Default: ten times --seconds-per-point.")
]
_Out = Annotated[Path, typer.Option(help="Directory of the result, whose files are named by date and hardware.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace a result of the same kind, day and hardware.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; implies no progress.")]

_OUT = Path("bench-results")


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def speed(
    mechanisms: _Mechanisms = None,
    lengths: _Lengths = None,
    dtype: _Dtype = "float32",
    device: Device = "auto",
    heads: _Heads = 8,
    head_dim: _HeadDim = 64,
    batch: _Batch = 1,
    backward: _Backward = False,
    causal: _Causal = False,
    peers: _Peers = False,
    peer_features: _PeerFeatures = 128,
    seconds_per_point: _Seconds = 1.0,
    max_seconds: _MaxSeconds = None,
    out: _Out = _OUT,
    force: _Force = False,
    quiet: Quiet = False,
    as_json: _Json = False,
) -> None:
    """Latency over lengths, in turns in one process, with quartiles, floor and memory."""
    from ..bench import BenchJob

    job = BenchJob(
        "speed",
        mechanisms,
        whole(lengths, "--lengths"),
        dtype,
        device,
        heads,
        head_dim,
        batch,
        backward,
        causal,
        peers,
        peer_features,
        seconds_per_point,
        max_seconds,
    )
    _carry_out(job, out, force, quiet, as_json)


@app.command()
def memory(
    mechanisms: _Mechanisms = None,
    lengths: _Lengths = None,
    dtype: _Dtype = "float32",
    device: Device = "auto",
    heads: _Heads = 8,
    head_dim: _HeadDim = 64,
    batch: _Batch = 1,
    backward: _Backward = False,
    causal: _Causal = False,
    peers: _Peers = False,
    peer_features: _PeerFeatures = 128,
    out: _Out = _OUT,
    force: _Force = False,
    quiet: Quiet = False,
    as_json: _Json = False,
) -> None:
    """Peak memory over lengths, without timing."""
    from ..bench import BenchJob

    job = BenchJob(
        "memory",
        mechanisms,
        whole(lengths, "--lengths"),
        dtype,
        device,
        heads,
        head_dim,
        batch,
        backward,
        causal,
        peers,
        peer_features,
    )
    _carry_out(job, out, force, quiet, as_json)


@app.command()
def decode(
    mechanisms: _Mechanisms = None,
    lengths: _Lengths = None,
    dtype: _Dtype = "float32",
    device: Device = "auto",
    heads: _Heads = 8,
    head_dim: _HeadDim = 64,
    batch: _Batch = 1,
    seconds_per_point: _Seconds = 1.0,
    out: _Out = _OUT,
    force: _Force = False,
    quiet: Quiet = False,
    as_json: _Json = False,
) -> None:
    """Time of one more token after 1,024 to 65,536 of them, against fused softmax over a cache of keys and values."""
    from ..bench import BenchJob

    job = BenchJob(
        "decode",
        mechanisms,
        whole(lengths, "--lengths"),
        dtype,
        device,
        heads,
        head_dim,
        batch,
        seconds_per_point=seconds_per_point,
    )
    _carry_out(job, out, force, quiet, as_json)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="JSON of the earlier result, or its directory.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="JSON of the later one, or its directory.")],
    threshold: Annotated[float, typer.Option(help="Least change that counts, beyond the noise.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Show what changed from A to B by more than the noise; the exit status is 1 where something regressed."""
    from ..bench import compare as compared
    from ..records import to_json
    from ..report import load_bench, render_comparison

    found = compared(load_bench(before), load_bench(after), threshold=threshold)
    console.out.print(to_json(found) if as_json else render_comparison(found), markup=False, end="")
    if found.regressed:
        raise typer.Exit(1)


@app.command(name="break-even")
def break_even(
    mechanism: Annotated[str, typer.Option(help="Name with options, as for speed.")] = "macformer",
    dtype: _Dtype = "float32",
    device: Device = "auto",
    heads: _Heads = 8,
    head_dim: _HeadDim = 64,
    backward: _Backward = False,
    causal: _Causal = False,
    lengths: _Lengths = None,
    seconds_per_point: _Seconds = 0.3,
    again: Annotated[bool, typer.Option("--again", help="Measure even if it was measured on this device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure from which length on a mechanism beats fused softmax on this device, and keep it for mechanism="auto"."""
    from ..bench.dispatch import LENGTHS, measure_break_even
    from ..core.break_even import cache_path

    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "num_heads": heads,
        "head_dim": head_dim,
        "backward": backward,
        "causal": causal,
        "lengths": whole(lengths, "--lengths") or LENGTHS,
        "seconds_per_point": seconds_per_point,
        "again": again,
    }
    if as_json:
        key, length, result = measure_break_even(mechanism, **options)
        record = {"key": str(key), "length": length, "measured_now": result is not None, "file": str(cache_path())}
        console.out.print(json.dumps(record, indent=2), markup=False)
        return
    with console.Bars() as bars:
        key, length, result = measure_break_even(mechanism, **options, progress=bars)
    answer = "at none of the lengths that were tried" if length is None else f"from {length:,} tokens on"
    console.out.print(f"{key}: faster than softmax {answer}", markup=False)
    how = "measured now, kept in" if result is not None else "measured before, from"
    console.out.print(f"({how} {cache_path()})", markup=False)


def whole(text: str | None, option: str) -> tuple[int, ...] | None:
    """Whole numbers by commas; None where there is no text."""
    try:
        return None if text is None else tuple(int(part.replace("_", "")) for part in text.split(",") if part.strip())
    except ValueError:
        raise OptionError(f"wanted {option} as whole numbers with commas, such as 1024,4096, got {text!r}") from None


def _carry_out(job: BenchJob, out: Path, force: bool, quiet: bool, as_json: bool) -> None:
    from ..bench import bench, environment
    from ..records import to_json
    from ..report import bench_names, check_bench_dir, write_bench

    where = environment(job.torch_device, job.torch_dtype)
    check_bench_dir(out, bench_names(job.what, job.settings(), where), force)
    if quiet or as_json:
        result = bench(job)
    else:
        with console.Bars() as bars:
            result = bench(job, bars)
    paths = write_bench(result, out, force=force)
    if as_json:
        console.out.print(to_json(result), markup=False)
    elif not quiet:
        _print(result, paths)


def _print(result: BenchResult, paths: dict[str, Path]) -> None:
    from ..report.bench_tables import bench_findings, summary

    for warning in result.warnings:
        console.err.print(f"warning: {warning}", markup=False)
    console.out.print(summary(result), markup=False)
    for sentence in bench_findings(result):
        console.out.print(f"- {sentence}", markup=False, soft_wrap=False)
    console.out.print(f"Result: {paths['html']}", markup=False)

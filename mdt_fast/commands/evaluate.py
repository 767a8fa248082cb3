"""``mdt-fast evaluate``."""

import argparse
import importlib.metadata
import json
import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..errors import UserError
from ..evaluation import (
    INCEPTION,
    METRICS,
    Extractor,
    Features,
    Opened,
    check_same_network,
    check_same_size,
    complete,
    is_published,
    missing,
    open_extractor,
    open_source,
    parse_metrics,
    save_features,
    warnings,
)
from ..evaluation import evaluate as measure
from ..evaluation.reference import statistics_for, suffice
from ..evaluation.sources import DIGITS
from ..files import aside, resolved
from ..processes import resolve_device
from ..sampling import assembled_in, check_name, check_writable
from .shared import refuse_empty, set_threads


def evaluate(args: argparse.Namespace) -> int:
    """Compute the metrics, print a table, write the requested files; returns the exit code."""
    set_threads(args.threads)
    asked = check_arguments(args)
    device = resolve_device(args.device)
    console = Console(highlight=False, soft_wrap=True)
    samples, reference, given = both_sides(args, asked or METRICS, device, console)
    metrics, notes = (asked, []) if asked is not None else possible(samples, reference)
    values = measure(samples, reference, metrics, device=device)
    notes += warnings(samples, reference, metrics)
    if reference is not None and (resting := rest_on(given, reference, metrics)):
        if not is_published(samples.extractor):
            notes.append(
                f"the statistics in {args.reference} are comparable only if they come from the samples' "
                f"network ({samples.extractor or 'unknown'})"
            )
        if reference.count is not None:
            names = " and ".join(resting)
            notes.append(
                f"{names}: computed from the statistics in {args.reference}, whose images it does not contain"
            )
    if args.json is not None:
        write_json(Path(args.json), record(samples, reference, values, notes))
    show(console, args, samples, values, notes)
    return 0


def check_arguments(args: argparse.Namespace) -> list[str] | None:
    """The requested metrics, or None for all computable ones. ``UserError`` before any work."""
    if not args.samples:
        raise UserError("SAMPLES: got '', expected a name")
    refuse_empty(args, "reference", "json", "save_features", "features", "weights")
    for name in ("batch_size", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    asked = parse_metrics(args.metrics) if args.metrics is not None else None
    if args.reference is None and asked != ["is"] and (asked is not None or args.save_features is None):
        raise UserError(
            "evaluate: --reference is needed for all metrics except 'is'; without it, pass --metrics is or "
            "--save-features FILE"
        )
    check_targets(args)
    return asked


def both_sides(
    args: argparse.Namespace, metrics: Sequence[str], device: torch.device, console: Console
) -> tuple[Features, Features | None, Features | None]:
    """The samples' features, the reference's, and what the reference's file already held of them. If
    requested, the samples' features, which can take hours, are saved before the reference is processed."""
    sources = _open(args)
    network = args.features or INCEPTION

    @cache
    def extractor() -> Extractor:
        return open_extractor(network, device=device, weights=args.weights, trust=args.trust_features)

    if _looks(sources, metrics):  # report problems with the network before any work
        if args.features is None:
            for source in sources:
                check_default(source.features)
        name = extractor().name
        seen = [
            Features("", name, None)
            if source.features is None or source.images is not None
            else source.features
            for source in sources
        ]
        check_same_network(seen[0], seen[-1])
    found: list[Features] = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for source, what in zip(sources, ("SAMPLES", "--reference")):
            update = partial(
                progress.update,
                progress.add_task(what, total=source.images.count if source.images is not None else 1),
            )
            features = complete(
                source,
                extractor,
                samples=found[0] if found else None,
                metrics=metrics,
                what=what,
                device=device,
                batch_size=args.batch_size,
                on_batch=lambda done, update=update: update(completed=done),  # type: ignore[misc]
            )
            if args.save_features is not None and not found:
                if features.pooled is None:
                    raise UserError(
                        f"--save-features: {args.samples!r} has only statistics; images are needed"
                    )
                save_features(Path(args.save_features), features)
            found.append(features)
    if len(found) == 1:
        return found[0], None, None
    check_same_network(*found)
    return found[0], found[1], sources[1].features


def _looks(sources: Sequence[Opened], metrics: Sequence[str]) -> bool:
    """Whether any images must go through the network: a reference's need not if its statistics suffice."""
    samples, *reference = sources
    if samples.images is not None or not reference or reference[0].images is None:
        return samples.images is not None
    known = samples.features
    return known is None or not suffice(statistics_for(reference[0], known), metrics)


def check_default(given: Features | None) -> None:
    """``UserError`` if features were made with a network other than the default. The network is not taken
    from their file, because only the user may name code to run."""
    if given is None or not given.extractor or given.extractor.startswith(INCEPTION):
        return
    name = given.extractor.split()[0]
    network = name if ":" in name else "FILE"
    raise UserError(
        f"--features: {given.name!r} was made with {name if ':' in name else given.extractor}; pass "
        f"--features {network}"
    )


def possible(samples: Features, reference: Features | None) -> tuple[list[str], list[str]]:
    """The computable metrics, and why others are not; with a reference, ``UserError`` if there are none."""
    reasons = {metric: missing(metric, samples, reference) for metric in METRICS}
    metrics = [metric for metric, reason in reasons.items() if reason is None]
    if reference is None:
        return metrics, []
    if not metrics:
        raise UserError(f"--metrics: none can be computed: fid: {reasons['fid']}")
    return metrics, [f"{metric} is skipped: {reason}" for metric, reason in reasons.items() if reason]


def _open(args: argparse.Namespace) -> list[Opened]:
    """Open both sides; ``--image-size`` applies to folders, and at least one side must be one."""
    names = [args.samples] + ([args.reference] if args.reference is not None else [])
    sources = [name if name == DIGITS else assembled_in(Path(name)) or Path(name) for name in names]
    folders = [isinstance(source, Path) and source.is_dir() for source in sources]
    if args.image_size is not None and not any(folders):
        raise UserError("--image-size: crops images in folders, but neither SAMPLES nor --reference is one")
    opened = [
        open_source(source, what, args.image_size if folder else None)
        for source, folder, what in zip(sources, folders, ("SAMPLES", "--reference"))
    ]
    images = [source.images for source in opened if source.images is not None]
    if len(images) == 2:
        check_same_size(*images)
    return opened


def rest_on(given: Features | None, used: Features, metrics: Sequence[str]) -> list[str]:
    """The metrics that use given statistics whose feature network is unknown."""
    if given is None or given.extractor:
        return []
    ready = {"fid": used.moments is given.moments, "sfid": used.spatial is given.spatial}
    return [metric for metric in metrics if ready.get(metric)]


def check_targets(args: argparse.Namespace) -> None:
    """Check that the output files differ from each other and from the inputs, and can be written."""
    targets = [Path(name) for name in (args.json, args.save_features) if name is not None]
    names = args.samples, args.reference, args.features, args.weights
    inputs = [resolved(Path(name)) for name in names if name is not None]
    if len({resolved(path) for path in targets}) < len(targets):
        raise UserError("evaluate: --json and --save-features need different names")
    for path in targets:
        if resolved(path) in inputs:
            raise UserError(f"evaluate: {str(path)!r} is both an input and an output; choose another name")
        check_writable(path)
    if args.save_features is not None:
        check_name(Path(args.save_features), "--save-features")
        if not args.save_features.endswith(".safetensors"):
            raise UserError(
                f"--save-features: got {args.save_features!r}, expected a name that ends in .safetensors"
            )


def record(
    samples: Features,
    reference: Features | None,
    values: dict[str, float],
    notes: list[str],
) -> dict[str, Any]:
    """What ``--json`` writes."""

    def side(features: Features | None) -> dict[str, Any] | None:
        if features is None:
            return None
        return {"path": features.name, "count": features.count, "shape": features.shape}

    return {
        "metrics": values,
        "samples": side(samples),
        "reference": side(reference),
        "features": samples.extractor,
        "dim": samples.moments.dim if samples.moments is not None else None,
        "notes": notes,
        "versions": {"mdt_fast": importlib.metadata.version("mdt-fast"), "torch": torch.__version__},
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    with aside(path) as file:
        file.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


def show(
    console: Console, args: argparse.Namespace, samples: Features, values: dict[str, float], notes: list[str]
) -> None:
    """Print the table, its inputs and the notes."""
    table = Table("metric", "value", box=None, pad_edge=False, show_header=bool(values))
    table.columns[1].justify = "right"
    for name, value in values.items():
        if name == "is_std":
            continue
        assert math.isfinite(value)
        deviation = f" ± {values['is_std']:.4f}" if name == "is" else ""
        table.add_row(name, f"{value:.4f}{deviation}")
    if values:
        console.print(table)
    against = f" against {args.reference}" if args.reference is not None else ""
    count = f"{samples.count} images" if samples.count is not None else "statistics"
    console.print(
        f"{count} in {args.samples}{against}; features: {samples.extractor or 'unknown'}", markup=False
    )
    if args.save_features is not None:
        console.print(f"features of {args.samples} in {args.save_features}", markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)

"""Compare how fast DiT, MDT v1 and MDTv2 learn, from the same seeds, data and optimisers.

    python bench/convergence.py                                  the comparison, half an hour on two CPU cores
    python bench/convergence.py --study parts,mask-ratio         which parts of MDT help, how much to mask
    python bench/convergence.py --study models,tokens,updates    at what scale MDT starts to learn faster
    python bench/convergence.py --size gpu                       S-size models of 32 x 32 pixels
    python bench/convergence.py --size imagenet --data latents   S/2 on the output of `mdt-fast encode`
    python bench/convergence.py --report --json FILE             tables and figures of existing rows

Every learner is judged several times along the way. The measures are the Fréchet distance of its samples to
held-out real images, in the features of a small classifier trained on the other images, and the share of
samples that this classifier recognises. Completed learners are kept, so that the same command resumes a
stopped run.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import command
import learning_report
import plots
from judge import Data, Judge, load_judge, open_data, save_classifier, train_classifier
from learn import Job, Point, judged_at, learn, shown_samples
from learners import SIZES, STUDIES
from mdt_fast.config import RunConfig, to_dict
from mdt_fast.errors import UserError
from mdt_fast.models.flops import meta_model
from mdt_fast.sampling.schedulers import SOLVERS
from report import RESULTS, between, put
from rows import Row, RowFile, machine, read


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("convergence", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    args = _parser().parse_args(argv)
    names = command.names("--study", args.study, tuple(STUDIES))
    args.json = args.json or args.out / "rows.jsonl"
    check_outputs(args, names)
    if args.report:
        conclude(args, names, read([args.json]))
        return 0
    for name in ("steps", "seeds", "samples", "points", "jobs", "batch"):
        command.at_least_one(f"--{name}", getattr(args, name))
    command.set_threads(args.threads)
    if args.lr is not None and not 0 <= args.lr < math.inf:
        raise UserError(f"--lr: got {args.lr}, expected 0 or more, and finite")
    settings, device = settings_of(args), command.device(args.device or SIZES[args.size].train.device)
    if args.jobs is None:
        args.jobs = 1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // args.threads)
    graphs = settings.train.cuda_graphs and device.type == "cuda"
    settings = replace(settings, train=replace(settings.train, device=str(device), cuda_graphs=graphs))
    data = open_data(settings.data, settings.sample.num_samples, device)
    settings = fitted(settings, data)
    command.make_folder("--json", args.json.parent)
    judge = open_judge(args.out, settings, data, device)
    line = shlex.join(["python", "bench/convergence.py", *argv])
    kept.rows = rows = RowFile(args.json, machine(device, line))
    jobs = list(jobs_of(args, names, settings, judge, len(data.learnt.classes)))
    before = known(read([args.json]))
    wanted: dict[str, list[Job]] = {}  # by digest, as studies share learners
    for job in jobs:
        wanted.setdefault(job.digest, []).append(job)
    waiting = [same[0] for key, same in wanted.items() if key not in before]
    if waiting and settings.sample.sampler in SOLVERS and find_spec("diffusers") is None:
        raise UserError(
            f"--size: {args.size} draws by {settings.sample.sampler}, which comes with diffusers; install it "
            "with pip install 'mdt-fast[latents]'"
        )
    complete = len(wanted) - len(waiting)
    print(f"{len(wanted)} learners, {complete} already complete; {args.jobs} in parallel", flush=True)
    quality = load_judge(judge, data, len(data.learnt.classes), settings.sample.num_samples, device)
    for key in set(wanted) & set(before):
        named = {(row["study"], row["provider"]) for row in before[key]}
        points = list({row["step"]: Point.of(row) for row in before[key]}.values())
        for job in wanted[key]:
            if (job.study, job.variant.name) not in named:
                add(rows, job, points, quality)
    for job, points in learnt(waiting, args.jobs):
        for same in wanted[job.digest]:
            add(rows, same, points, quality)
    ours = [row for row in read([args.json]) if row.get("digest") in wanted]
    conclude(args, names, ours)
    return 0


def check_outputs(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ``UserError`` if tables or figures could not be written, before anything is trained."""
    command.make_folder("--out", args.out)
    if args.plot is not None and len(names) > 1:
        raise UserError(
            f"--plot: one figure for {len(names)} studies; without --plot each has its own in --out"
        )
    if args.plot is not None:
        command.make_folder("--plot", args.plot.parent)
    placed(args.readme, names)
    for name in names:
        plots.check_target(args.plot or args.out / f"{name}.png")


def placed(readme: Path | None, names: Sequence[str]) -> list[str]:
    """The tables that the document has markers for. Raises ``UserError`` if it has none or a marker's partner
    is missing."""
    if readme is None:
        return []
    try:
        text = readme.read_text()
    except OSError:
        text = ""  # the error is reported below
    found = [name for name in [*names, "scales"] if markers(name)[0] in text]
    for name in found or names[:1]:
        between(readme, *markers(name), "--readme")
    return found


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def settings_of(args: argparse.Namespace) -> RunConfig:
    """The settings of ``--size``, with the options given in place of its values."""
    size = SIZES[args.size]
    train = {"steps": args.steps, "batch_size": args.batch, "lr": args.lr}
    train = {name: value for name, value in train.items() if value is not None}
    sample = {} if args.samples is None else {"num_samples": args.samples}
    data = {"source": args.data, "image_size": args.image_size}
    data = {name: value for name, value in data.items() if value is not None}
    if args.data not in (None, "digits") and size.data.channels == 1:
        data["channels"] = 3
    if not (args.data or size.data.source):
        raise UserError(f"--data: --size {args.size} needs images or a folder that `mdt-fast encode` made")
    return replace(
        size,
        train=replace(size.train, **train),
        sample=replace(size.sample, **sample),
        data=replace(size.data, **data),
    )


def fitted(settings: RunConfig, data: Data) -> RunConfig:
    """The settings with the model's shape fitted to the data."""
    stage, classes = data.stage, len(data.learnt.classes)
    model = replace(settings.model, input_size=stage.size, in_channels=stage.channels, num_classes=classes)
    return replace(settings, model=model)


def open_judge(out: Path, settings: RunConfig, data: Data, device: torch.device) -> Path:
    """The classifier's file: the one that came with the rows in ``results/``, if any, so that rows of several
    machines can be compared; otherwise the one in ``out``, trained now if it is missing."""
    identity = [to_dict(settings.data), settings.sample.num_samples]
    identity = json.dumps(identity + ([] if data.digest is None else [data.digest]), sort_keys=True)
    name = f"judge-{hashlib.sha256(identity.encode()).hexdigest()[:10]}.safetensors"
    if (RESULTS / name).exists():
        return RESULTS / name
    path = out / name
    if not path.exists():
        print("training the classifier that judges", flush=True)
        save_classifier(path, train_classifier(data, len(data.learnt.classes), device))
    return path


def jobs_of(
    args: argparse.Namespace, names: Sequence[str], settings: RunConfig, judge: Path, classes: int
) -> Iterator[Job]:
    """All jobs, seed by seed, so that completed learners can be compared early."""
    for name in names:
        for seed in range(args.seeds):
            for variant in STUDIES[name]:
                own = variant.settings(settings)
                if own.train.float8 and own.train.float8_by == "torchao" and not find_spec("torchao"):
                    continue
                yield Job(
                    study=name, variant=variant, settings=own, seed=seed,
                    steps=judged_at(own.train.steps, args.points), folder=args.out, judge=judge,
                    classes=classes, threads=args.threads,
                )  # fmt: skip


def known(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of completed learners, by digest."""
    found: dict[str, list[Row]] = {}
    for row in learning_report.complete(rows):
        found.setdefault(row["digest"], []).append(row)
    return found


def learnt(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, list[Point]]]:
    """Yield each job with its points as it completes; ``at_once`` jobs run in parallel processes."""
    if at_once == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, learn(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(learn, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a learner's process was killed; completed learners are kept: run the command again"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # after Ctrl-C, or when one of them failed
                process.terminate()


def add(rows: RowFile, job: Job, points: Sequence[Point], quality: Judge) -> None:
    settings = job.settings
    model = meta_model(settings.model)
    for point in points:
        rows.add(
            (None, finite(point.frechet), None),
            bench="convergence", study=job.study, model=settings.model.family, provider=job.variant.name,
            mode="train", batch=settings.train.batch_size, dtype=settings.train.dtype, metric="frechet",
            unit="1", switches={}, seed=job.seed, step=point.step, of=job.steps[-1], digest=job.digest,
            shape={
                "size": settings.model.input_size, "tokens": settings.model.grid_size**2,
                "width": settings.model.hidden_size, "depth": settings.model.depth,
                "samples": settings.sample.num_samples, "sampling": settings.sample.steps,
            },
            parameters=sum(p.numel() for p in model.parameters()), seconds=point.seconds, flops=point.flops,
            lr=settings.train.lr, loss=finite(point.loss), accuracy=point.accuracy, floor=quality.floor,
            real_accuracy=quality.real_accuracy,
        )  # fmt: skip


def finite(value: float) -> float | None:
    """``value``, or None if it is infinite or NaN, which JSON cannot express."""
    return value if math.isfinite(value) else None


def conclude(args: argparse.Namespace, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Print the tables, write them into a document if requested, and draw a figure for each study."""
    found, document = learning_report.studies(rows, names), placed(args.readme, names)
    if not set(names) & set(found):
        raise UserError(f"--json: {str(args.json)!r} has no rows of {', '.join(names)}")
    for name in (name for name in names if name in found):
        text = learning_report.table(name, found[name])
        print(f"\n{name}\n\n{text}")
        if name in document:
            put(args.readme, text, *markers(name))
        picture = args.out / f"{name}.png" if args.plot is None else args.plot
        first = {variant: next(iter(seeds.values()))[0] for variant, seeds in found[name].items()}
        samples = {variant: shown_samples(args.out, row["digest"]) for variant, row in first.items()}
        learning_report.draw(
            name, found[name], {key: shown for key, shown in samples.items() if shown is not None}, picture
        )
        print(f"\nfigure: {picture}")
    compared = learning_report.scales({name: found[name] for name in names if name in found})
    if compared is not None:
        print(f"\nscales\n\n{compared}")
        if "scales" in document:
            put(args.readme, compared, *markers("scales"))
    print(f"rows: {args.json}")


def _parser() -> command.Parser:
    parser = command.Parser(prog="convergence", description="Compare how fast models learn.")
    parser.add_argument(
        "--study",
        default="models",
        help=f"comma-separated, from {', '.join(STUDIES)} (see docs/learning.md; default: models)",
    )
    parser.add_argument(
        "--size", default="cpu", choices=tuple(SIZES),
        help="cpu (default: 16 tokens, a million parameters), gpu (S, 256 tokens) or imagenet (needs --data)",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="folder of images or latents (default: digits)")
    parser.add_argument("--image-size", type=int, metavar="S", help="side in pixels (default: per --size)")
    parser.add_argument("--steps", type=int, help="updates per learner (default: per --size)")
    parser.add_argument("--batch", type=int, help="images per update (default: per --size)")
    parser.add_argument("--lr", type=float, help="learning rate of all learners (default: per --size)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant (default: 3)")
    parser.add_argument(
        "--samples", type=int, help="samples per point, and held-out real images (default: per --size)"
    )
    parser.add_argument("--points", type=int, default=9, help="evaluations per learner (default: 9)")
    parser.add_argument(
        "--jobs", type=int, help="parallel learners (default: CPU cores / --threads; on a GPU 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per learner (default: 1)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: per --size)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/convergence"),
        metavar="DIR",
        help="folder for rows, figures, samples and the judge (default: runs/convergence)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="row file (default: rows.jsonl in --out)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="figure (default: STUDY.png in --out)")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="document whose marked tables are replaced (STUDY:begin and STUDY:end, scales:begin, ...)",
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing; make the tables and figures of --json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

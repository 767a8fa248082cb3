"""Measure the throughput of training and sampling: this package against the reference, in a single run.

    python bench/throughput.py                      picks sizes for about three minutes, and says why
    python bench/throughput.py --account            the cost of a training step, switch by switch
    python bench/throughput.py --breakdown          where a training step's time goes, by class of kernel
    python bench/throughput.py --breakdown --turn packed    the same with one switch of the fast model flipped
    python bench/throughput.py --account --mode sample    what makes sampling fast, item by item
    python bench/throughput.py --model MDTv2_XL_2 --batch 32 --dtype bfloat16 --mode train --json rows.jsonl

A training step consists of the two-pass objective (all tokens, then kept tokens only), one backward pass, the
optimiser step and the moving-average update; a sampling step is one guided denoising step. All providers get
the same weights, images, masks and noise on the same machine. Each must agree with the reference before it is
timed; the providers are then timed in interleaved rounds.
"""

import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console

import account
import account_sampling
import breakdown
import command
import inputs
import plan
import plots
import providers
import tables
from formats import one_line
from mdt_fast.errors import UserError
from measure import let_go
from request import Request, parser
from rows import RowFile, machine
from session import CaseResult, Session
from steps import Case


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 1 if nothing was measured; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("throughput", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    args = parser().parse_args(argv)
    started = time.monotonic()
    request = Request(args)
    line = shlex.join(["python", "bench/throughput.py", *argv])
    kept.rows = rows = RowFile(args.json, machine(request.device, line))
    if args.plot is not None:
        plots.check_target(args.plot)
    measured = run(request, rows, started)
    command.conclude(rows, args.plot, plots.draw)
    return 0 if measured else 1


def run(request: Request, rows: RowFile, started: float) -> bool:
    """Plan, measure and print. Returns whether the run produced anything.

    That is a measured provider or a breakdown; with ``--account``, an account of every case.
    """
    console = Console(width=max(tables.WIDTH, Console().width))
    picked = plan.pick(request)
    for line in picked.reasons:
        tables.say(console, line)
    if request.checkout is not None:
        print(f"official: {request.checkout.module.__file__}, with {request.checkout.timm}")
    cases = [
        Case(model, config, mode, batch, dtype, request.device, request.sampler, request.turned)
        for model, config in picked.models.items()
        for mode in request.modes
        for dtype in request.dtypes
        for batch in picked.batches
    ]
    end = started + picked.time_limit
    results: list[CaseResult] = []
    broken_down = failed = False
    made: dict[str, providers.Modules] = {}
    with Console(stderr=True).status("starting") as status:
        session = Session(rows, status.update, picked.probe, request.lengths)
        for number, case in enumerate(cases):
            if case.model not in made:
                made = {
                    case.model: providers.Modules(case.config, case.device, request.checkout, case.switches)
                }
            images = inputs.load(request.data, case.config, case.batch)
            now = time.monotonic()
            deadline = now + max(0.0, end - now) / (len(cases) - number)
            if request.breakdown:
                names = picked.providers[case.mode]
                lines = breakdown.run(case, names, made[case.model], images, rows, status.update)
                breakdown.show(console, case, lines)
                broken_down = broken_down or any(line.note is None for line in lines)
                continue
            if request.account:
                accounted = account_of(
                    request, case, made[case.model], images, rows, deadline, status.update, console
                )
                failed = failed or not accounted
                continue
            names = picked.providers[case.mode]
            groups = [[name] for name in names] if request.apart else [names]
            for place, group in enumerate(groups):
                now = time.monotonic()
                result = session.run(
                    case,
                    group,
                    made[case.model],
                    images,
                    repeats=picked.repeats,
                    inner=request.inner,
                    deadline=now + max(0.0, deadline - now) / (len(groups) - place),
                    skipped=picked.skipped[case.mode] if place == 0 else {},
                )
                results.append(result)
                tables.show(console, result, images.what)
    measured = any(one.ms is not None for result in results for one in result.results)
    return (request.account and not failed) or broken_down or measured


def account_of(
    request: Request,
    case: Case,
    modules: providers.Modules,
    images: inputs.Inputs,
    rows: RowFile,
    deadline: float,
    say: Callable[[str], None],
    console: Console,
) -> bool:
    """Print the account of one case. Returns False if it failed, for example because the reference ran out of
    memory; the error is printed and the run continues, as later cases may need less."""
    try:
        if case.mode == "train":
            account.show(console, case, account.run(case, modules, images, rows, say))
            return True
        asked = ["reference-compiled"] if request.providers is None else request.providers
        found = account_sampling.run(
            case, modules, images, rows, say,
            repeats=request.repeats or account_sampling.ROUNDS, deadline=deadline,
            compiled=[name for name in asked if re.fullmatch("reference.*-compiled", name)],
        )  # fmt: skip
        account_sampling.show(console, case, *found)
    except UserError:
        raise
    except Exception as error:
        let_go(error)
        tables.say(console, f"account · {case.title}: {one_line(error)}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

"""Does selection help? Held-out loss, noise kept and cost of every method, beside `full` and `random`, over seeds.

Pretrained models, and rows that hold what real ones hold (hours on two cores):

    python -m benchmarks.quality real --problems FILE --solutions FILE --work DIR
    python -m benchmarks.quality signals --problems FILE --solutions FILE --work DIR    what the methods see

A small model made here, for every method in minutes:

    python -m benchmarks.quality planted        every method on planted noise, at rho 0.4, 0.6 and 0.8 (15 minutes)
    python -m benchmarks.quality text FILE      real text with a share of its responses corrupted (26 minutes)
    python -m benchmarks.quality feedback       when the published sign of REL feeds on itself (14 minutes)

Each writes benchmarks/results/quality.NAME.json after every result and prints its table; `python -m tools.write_docs`
puts that into the docs. A run that fails is recorded with its reason, the others go on, and the next start tries it
again. A study that was interrupted goes on when it is started again with the same settings; `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.quality import studies
from benchmarks.quality.real import RECIPES, RealStudy, run_real, settings
from benchmarks.quality.real_rows import KINDS
from benchmarks.quality.real_tables import real_table
from benchmarks.quality.runner import be_quiet, device_used, run_study
from benchmarks.quality.signals import NOISY, run_signals, signals_table
from benchmarks.quality.tables import TABLES, all_runs, has_form
from benchmarks.quality.text_rows import text_parts
from benchmarks.quality.worlds import SHORT, STEPS, WIDTH
from benchmarks.resume import RESULTS, alone, goes_on, measured, resume, write
from tokensel.pretrained import PRETRAINED

STUDIES = {"planted": studies.planted, "text": studies.text, "feedback": studies.feedback}
REAL = {"real": (run_real, real_table, tuple(KINDS)), "signals": (run_signals, signals_table, NOISY)}


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _kinds(text: str) -> tuple[str, ...]:
    return tuple(_known(kind, KINDS, "kind") for kind in text.split(","))


def _recipe(name: str) -> str:
    return _known(name, RECIPES, "recipe")


def _known(name: str, names: Iterable[str], what: str) -> str:
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0)
        raise argparse.ArgumentTypeError(f"no {what} {name!r}; is {near[0]!r} meant? There are: {'; '.join(names)}")
    return name


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    parsers = {name: commands.add_parser(name) for name in (*REAL, *STUDIES)}
    for name, command in parsers.items():
        if name != "signals":  # it is of one seed
            command.add_argument("--seeds", type=_positive, default=3)
        command.add_argument("--output", type=Path, default=RESULTS, help="folder for quality.STUDY.json")
        command.add_argument("--fresh", action="store_true", help="measure again what quality.STUDY.json already has")
        what = "rows and steps, times this" + (
            "; above 1 all layers are trained" if name in REAL else ", and the model's width"
        )
        command.add_argument("--scale", type=_positive, default=1, help=what)
    parsers["text"].add_argument("file", type=Path, help="JSONL of prompt/completion, question/answer or messages")
    for name, (_, _, possible) in REAL.items():
        add = parsers[name].add_argument
        add("--problems", type=Path, help="JSONL of question and answer: GSM8K's train.jsonl")
        add("--solutions", type=Path, help="JSONL of question, model_answer and is_correct, from the same repository")
        add("--work", type=Path, required=True, help="folder for the model and the worlds, some gigabytes")
        add("--model", choices=PRETRAINED, default="smollm2")
        add("--kinds", type=_kinds, default=possible, metavar="A,B", help=f"of {', '.join(possible)}")
    about = f"in this order; of {'; '.join(RECIPES)}"
    parsers["real"].add_argument("--recipes", type=_recipe, nargs="+", default=tuple(RECIPES), metavar="A", help=about)
    return parser, parsers


def main(argv: list[str] | None = None) -> None:
    parser, parsers = _parser()
    options = parser.parse_args(argv)
    be_quiet()
    with contextlib.ExitStack() as locked:  # until the study ends
        (_run_real if options.study in REAL else _run_made)(options, parsers[options.study], locked)


def _run_real(options: argparse.Namespace, parser: argparse.ArgumentParser, locked: contextlib.ExitStack) -> None:
    """A study of a pretrained model. Its results may come from several machines and commits: each run tells its own."""
    run, table, _ = REAL[options.study]
    study = RealStudy(
        options.model,
        options.problems,
        options.solutions,
        options.work,
        options.scale,
        getattr(options, "seeds", 1),
        options.kinds,
        tuple(getattr(options, "recipes", ())),
    )
    path = options.output / f"quality.{options.study}{'' if options.model == 'smollm2' else f'.{options.model}'}.json"
    try:
        for folder in (options.output, options.work):
            folder.mkdir(parents=True, exist_ok=True)
        locked.enter_context(alone(path))
        before = {} if options.fresh else resume(path, {}, has_form)
        results = goes_on(before, settings(study) | {"study": options.study}, path)
        _told(results, path)
        run(study, results, _saving(path, results))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        _interrupted(parser, path)
    _end(table(results), results, path, options.output)


def _run_made(options: argparse.Namespace, parser: argparse.ArgumentParser, locked: contextlib.ExitStack) -> None:
    """A study of the model that is made here."""
    table = TABLES[options.study]
    path = options.output / f"quality.{options.study}.json"
    settings = {"study": options.study, "seeds": options.seeds, "scale": options.scale}
    settings["machine"] = machine(device_used())
    given = []
    try:  # what can be wrong is seen before anything is trained
        options.output.mkdir(parents=True, exist_ok=True)
        locked.enter_context(alone(path))
        if options.study == "text":
            given.append(text_parts(options.file, options.scale))
            sha256 = hashlib.sha256(options.file.read_bytes()).hexdigest()
            settings |= {"file": options.file.name, "sha256": sha256}
        results = dict(settings) if options.fresh else resume(path, settings, has_form)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not _told(results, path) and path.exists() and not options.fresh:
        print(f"{path} is of other settings, another machine or commit: everything is measured, and replaces it")
    try:
        run_study(STUDIES[options.study](options.scale, *given), results, _saving(path, results), options.seeds)
    except KeyboardInterrupt:
        _interrupted(parser, path)
    steps = (STEPS if options.study == "planted" else SHORT) * options.scale
    print(f"{steps} steps of fine-tuning, model {WIDTH * options.scale} wide, on {settings['machine']['device']}")
    _end(table(results), results, path, options.output)


def _told(results: dict, path: Path) -> bool:
    """Says how many runs are there already, if there can be any."""
    if "rows" not in results:
        return False
    done = sum(map(measured, all_runs(results).values()))
    print(f"{done} runs are in {path} already; --fresh measures them again")
    return True


def _saving(path: Path, results: dict) -> Callable[[], None]:
    """What writes the results, with the minutes that all starts together have taken."""
    started, before = time.perf_counter(), results.get("minutes", 0.0)

    def save() -> None:
        results["minutes"] = before + (time.perf_counter() - started) / 60
        write(path, results)

    return save


def _interrupted(parser: argparse.ArgumentParser, path: Path) -> None:
    parser.exit(130, f"\ninterrupted; the same command goes on with what is in {path}\n")


def _end(table: str, results: dict, path: Path, output: Path) -> None:
    print(table)
    print(f"\n{results.get('minutes', 0.0):.1f} minutes; wrote {path}")
    if output == RESULTS:
        print("`python -m tools.write_docs` puts the table into the docs")


if __name__ == "__main__":
    main()

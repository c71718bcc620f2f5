"""Does selection help? Held-out loss, noise kept and cost of every method, beside `full` and `random`, over seeds.

    python -m benchmarks.quality planted            (a) every method on planted noise, at rho 0.4, 0.6 and 0.8
    python -m benchmarks.quality text FILE.jsonl    (b) real text with a share of its responses corrupted
    python -m benchmarks.quality feedback           (c) when the published sign of REL feeds on itself

On two cores (a) takes about 15 minutes, (b) 26 and (c) 14. Each writes benchmarks/results/quality.NAME.json after every
result and prints its table; `python -m tools.write_docs` puts that into the docs. A run that fails is recorded with its
reason, and the others go on. A study that was interrupted goes on when started again with the same settings on the same
machine and commit (`--fresh` begins anew). `--seeds N` (3); `--scale N` (1) for a model N times as wide, trained for N
times as many steps on N times as many rows, where there is a GPU for it.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.quality import studies
from benchmarks.quality.runner import be_quiet, device_used, run_study
from benchmarks.quality.tables import TABLES, all_runs
from benchmarks.quality.text_rows import text_parts
from benchmarks.quality.worlds import SHORT, STEPS, WIDTH
from benchmarks.resume import RESULTS, measured, resume, write

STUDIES = {"planted": studies.planted, "text": studies.text, "feedback": studies.feedback}


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "file", nargs="?", type=Path, help="JSONL of prompt/completion, question/answer or messages, for `text`"
    )
    parser.add_argument("--seeds", type=_positive, default=3)
    parser.add_argument("--scale", type=_positive, default=1, help="width of the model, steps and rows, times this")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for quality.STUDY.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what quality.STUDY.json already has")
    options = parser.parse_args(argv)
    be_quiet()
    if (options.study == "text") != (options.file is not None):
        parser.error("`text` takes a JSONL file, the other studies make their own data")
    table = TABLES[options.study]
    path = options.output / f"quality.{options.study}.json"
    settings = {"study": options.study, "seeds": options.seeds, "scale": options.scale}
    settings["machine"] = machine(device_used())
    given = []
    try:  # what can be wrong is seen before anything is trained
        options.output.mkdir(parents=True, exist_ok=True)
        if options.file:
            given.append(text_parts(options.file, options.scale))
            sha256 = hashlib.sha256(options.file.read_bytes()).hexdigest()
            settings |= {"file": options.file.name, "sha256": sha256}
        results = dict(settings) if options.fresh else resume(path, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if "rows" in results:
        done = sum(map(measured, all_runs(results).values()))
        print(f"{done} runs are in {path} already; --fresh measures them again")
    elif path.exists() and not options.fresh:
        print(f"{path} is of other settings, another machine or commit: everything is measured, and replaces it")
    started, before = time.perf_counter(), results.get("minutes", 0.0)

    def save() -> None:
        results["minutes"] = before + (time.perf_counter() - started) / 60
        write(path, results)

    try:
        run_study(STUDIES[options.study](options.scale, *given), results, save, options.seeds)
    except KeyboardInterrupt:
        parser.exit(130, f"\ninterrupted; the same command goes on with what is in {path}\n")
    steps = (STEPS if options.study == "planted" else SHORT) * options.scale
    print(f"{steps} steps of fine-tuning, model {WIDTH * options.scale} wide, on {settings['machine']['device']}")
    print(table(results))
    print(f"\n{results['minutes']:.1f} minutes; wrote {path}")
    if options.output == RESULTS:
        print("`python -m tools.write_docs` puts the table into the docs")


if __name__ == "__main__":
    main()

"""Token cleaning with a reference that evolves (arXiv 2502.01968): the model of each split cleans the next one.

The data is cut into contiguous splits. Split 0 is trained in full; of each later split the tokens are kept on which the
model of the stage before has improved most over the base, and that model is trained on them. What follows the four
settings goes to `tokensel train`. Run again after an interruption, it skips what is complete.

    python examples/token_cleaning_iterative.py MODEL rows.jsonl OUTPUT 4 --learning_rate 1e-4 --num_train_epochs 1
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokensel import cli

RHO = 0.6
MAX_LENGTH = 2048  # of scoring and of training: a document that is cut elsewhere is another one


def run(command: str, *more: str, **settings: object) -> None:
    """`tokensel COMMAND --name value ...`, unless its output is there."""
    output = Path(str(settings.get("output") or Path(str(settings["output_dir"])) / "trainer_state.json"))
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    if not output.exists() and cli.main([command, *flags, *more]):
        sys.exit(f"tokensel {command} {' '.join(flags)} failed")


def main(base: str, data: str, folder: str, splits: str, *train_flags: str) -> None:
    out, lines = Path(folder), Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    out.mkdir(parents=True, exist_ok=True)
    model = base
    for i in range(int(splits)):
        first, last = (len(lines) * k // int(splits) for k in (i, i + 1))
        split, stage = out / f"split{i}.jsonl", out / f"stage{i}"
        split.write_text("".join(lines[first:last]), encoding="utf-8")
        chosen = {"method": "full"}
        if i > 0:
            files = {name: out / f"{name}{i}.parquet" for name in ("base", "reference", "selected")}
            for name, scorer in (("base", base), ("reference", model)):
                what = {"dataset_name": split, "max_length": MAX_LENGTH, "output": files[name]}
                run("score", model_name_or_path=scorer, **what)
            recorded = f"base={files['base']},reference={files['reference']}"
            method = {"method": "token_cleaning_iterative", "method_args": f"rho={RHO}"}
            run("select", **method, recorded=recorded, output=files["selected"])
            chosen = {"method": "weighted", "weights_store": files["selected"]}
        what = {"dataset_name": split, "max_length": MAX_LENGTH, "output_dir": stage}
        run("train", *train_flags, model_name_or_path=model, **what, **chosen)
        model = str(stage)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The command line: `fit`, `validate`, `test` and `predict` through LightningCLI, and the verbs beside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mhe_lightning import __version__
from mhe_lightning.errors import RunError, UserError
from mhe_lightning.files import lacks_space

USAGE = """\
usage: python train.py VERB [options]      (or: mhe VERB [options])

Train and use transformers with any attention.

  fit            train a model                          --config configs/quickstart.yaml
  validate       score a checkpoint on the validation split
  test           score a checkpoint on the test split
  predict        write a checkpoint's predictions
  sweep          train variants × seeds × a grid        sweep --config … --attentions mha mhe_add
  plan           what each attention will cost          plan --config configs/quickstart.yaml
  prepare        tokenise a config's data, before `fit` on several processes
  consolidate    a run as one file, or its weights alone consolidate runs/quickstart --average 2
  average        the GLUE or SuperGLUE average of runs  average runs/bert_base_*
  generate       continue texts with a trained decoder  generate runs/quickstart
  translate      translate standard input, line by line translate runs/small_multi30k < sentences.txt
  export         a model for transformers and engines   export runs/quickstart exported/quickstart
  import         a transformers checkpoint as a run     import ./gpt2-folder runs/gpt2
  convert        MHA to a leaner attention, untrained   convert runs/bert runs/bert_mhe --to mhe_mul
  compare        what attentions keep and cost, by runs compare runs/sweeps/wikitext2 --out report
  heads          how differently a model's heads attend heads runs/a runs/b --text FILE
  verify-resume  prove from a checkpoint that no training row was skipped or repeated

Every verb explains its options with --help.
"""

VERBS = {
    "fit": "train",
    "validate": "train",
    "test": "train",
    "predict": "train",
    "sweep": "sweep",
    "plan": "plan",
    "prepare": "prepare",
    "consolidate": "consolidate",
    "average": "average",
    "generate": "generate",
    "export": "export",
    "import": "import_",
    "convert": "convert",
    "translate": "translate",
    "compare": "compare",
    "heads": "heads",
    "verify-resume": "verify_resume",
}
"""Verb → its module in `mhe_lightning.verbs`, imported when it is asked for (lightning takes seconds)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `train.py` and the `mhe` command. Exits with 0 done, 1 error, 2 bad config or arguments."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        print(__version__)
        return
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        _fail(f"unknown verb {verb!r}; choose one of {', '.join(VERBS)}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own classes, also for the `mhe` command
    try:
        import_module(f"mhe_lightning.verbs.{VERBS[verb]}").main(verb, rest)
    except UserError as error:
        _fail(str(error))
    except RunError as error:
        _fail(str(error), code=1)
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit:
        raise
    except BaseException as error:  # what torch raises for checkpoints of several processes is no Exception
        name = getattr(error, "filename", None)
        if lacks_space(error):
            place = name or "a file of the run"  # not one that we write: TensorBoard's
            _fail(f"{place}: no space left on its disk; make room and run the same command again", code=1)
        if not isinstance(error, OSError) or name is None:
            raise
        _fail(f"{name}: {error.strerror}")


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)

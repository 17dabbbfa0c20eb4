# SPDX-License-Identifier: Apache-2.0
"""What every command shares: how it reads its flags, starts and fails."""

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from synister_jax.base.errors import UserError, redact


def _parse_flags(argv: Sequence[str], positional: Sequence[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS:
            # A config file is read when it is used for the first time.
            config: Any = flags.FLAGS["config"].value
            config.keys()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error.args[0])
        # absl names a missing flag with its value None.
        if absent := re.match(r"flag --(\w+)=None: ", text):
            text = f"--{absent[1]} is missing; --help explains it"
        _exit(f"flags: {text}", 2)
    except Exception as error:  # the config file of the user may raise anything
        _exit(f"--config: {type(error).__name__}: {error}", 2)
    given = arguments[1:]
    if len(given) > len(positional):
        extra = given[len(positional)]
        _exit(f"flags: unexpected argument {extra!r}; options start with --", 2)
    if len(given) < len(positional):
        missing = " ".join(positional[len(given) :])
        _exit(f"flags: {missing} missing; give {' '.join(positional)}", 2)
    return arguments


def _exit(message: str, code: int, abandon_threads: bool = False) -> NoReturn:
    # A URI given in the wrong place may hold a password.
    one_line = redact(" ".join(message.split()))
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {one_line}", file=sys.stderr)
    if abandon_threads:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def three_numbers(
    flag: str, texts: Sequence[str], positive: bool = False
) -> tuple[float, float, float]:
    """Returns the numbers of a flag that takes three, such as `--scale_nm_zyx=40,4,4`.

    Args:
      flag: the name of the flag, for the message.
      texts: its value, split at the commas.
      positive: whether the numbers must be positive.

    Raises:
      UserError: there are not three, or one is not finite or not positive.
    """
    given = f"--{flag}={','.join(texts)}"
    try:
        first, second, third = numbers = [float(text) for text in texts]
    except ValueError:
        raise UserError(f"{given}: the flag takes three numbers") from None
    if not all(map(math.isfinite, numbers)) or (positive and min(numbers) <= 0):
        what = "positive" if positive else "finite"
        raise UserError(f"{given}: give {what} numbers")
    return first, second, third


def subcommand(names: Sequence[str]) -> str:
    """Takes the first word off the command line and returns it.

    Call this before the flags are defined, because each subcommand has its own flags.
    Exits with code 2 if the word is not one of `names`. For `--help` it prints the
    docstring of the program and exits with code 0.
    """
    given = sys.argv[1] if len(sys.argv) > 1 else ""
    if given in ("--help", "-help", "-h"):
        print((sys.modules["__main__"].__doc__ or "").strip())
        print(f"\n{{{', '.join(names)}}} --help lists the flags of one of them.")
        raise SystemExit(0)
    if given not in names:
        _exit(f"first say what to do: {', '.join(names)} (not {given!r})", 2)
    del sys.argv[1]
    return given


def run(
    main: Callable[..., None],
    abandon_threads: bool = False,
    positional: Sequence[str] = (),
) -> None:
    """Parses the flags, runs `main`, and exits.

    The exit code is 0 if the command is done, 1 after a `UserError`, 2 for wrong flags,
    and 130 after Ctrl-C.

    Args:
      abandon_threads: leave at once after a `UserError`, without waiting for other
        threads. The threads of a save that failed may wait for ever.
      positional: the names of the arguments without a flag, which `main` receives.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs every file
        try:
            main(*argv[1:])
        except UserError as error:
            _exit(str(error), 1, abandon_threads)
        except BrokenPipeError:  # `| head` has closed the output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except KeyboardInterrupt:
            _exit("interrupted; the same command continues", 130)

    app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, positional))

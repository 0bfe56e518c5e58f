"""`margingate hooks`: the ledger of every patch to SGLang, as Markdown.

docs/hooks.md is this command's output; a test holds the two together. The ledger names SGLang's
functions, so it is imported when the command runs: `margingate --help` does not wait for SGLang.
"""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from margingate import markdown
from margingate.errors import CliError

if TYPE_CHECKING:
    from margingate.runtime.hooks.registry import Hook

COLUMNS = ("Target", "Kind", "Process", "Failure ends", "Why", "Remove when")
ABOUT = """\
# What margingate patches in SGLang

Made by `margingate hooks > docs/hooks.md`. Targets are below `sglang.srt`. Process: `startup` is
every process of every server, gated or not; `launcher`, `detokenizer` and `scheduler` are those
of a server started with `--deterministic-gate`, and of no other. Kind `instance`: an attribute of
one object of that process, such as its attention backend, is replaced; kind `module`: a function's
name in a module, on a GPU alone. Failure ends: what an exception of margingate in it ends.
"""


def ledger() -> str:
    """The Markdown document, a row per hook. Imports SGLang; raises CliError without it."""
    try:
        from margingate.runtime.compat import instance_patches
        from margingate.runtime.hooks import launcher_table, scheduler_table
        from margingate.runtime.start import startup_hooks
    except ImportError as err:
        from margingate.runtime.compat.release import NEWEST

        raise CliError(
            f"the ledger names functions of SGLang, which cannot be imported ({err}); pip install"
            f" sglang=={NEWEST}."
        ) from err
    processes = {
        "startup": startup_hooks.STARTUP_HOOKS,
        "launcher": launcher_table.TOKENIZER_HOOKS,
        "detokenizer": launcher_table.DETOKENIZER_HOOKS,
        "scheduler": scheduler_table.SCHEDULER_HOOKS,
    }
    rows = [_cells(hook, process) for process, hooks in processes.items() for hook in hooks]
    rows += [
        (
            f"`{patch.owner}.{patch.name}`",
            patch.kind,
            patch.process,
            patch.ends,
            patch.why,
            patch.remove_when,
        )
        for patch in instance_patches.INSTANCE_PATCHES
    ]
    return "\n".join([ABOUT, *markdown.table(COLUMNS, rows), ""])


def _cells(hook: "Hook", process: str) -> tuple[str, ...]:
    return (
        f"`{hook.target}`",
        hook.kind.value,
        process,
        hook.policy.value,
        hook.why,
        hook.remove_when,
    )


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `margingate hooks`."""
    parser = subparsers.add_parser(
        "hooks",
        help="print every patch to SGLang, as Markdown",
        description="Print what margingate patches in SGLang, as a Markdown table: each target, in "
        "which processes, why, and when it can go. Imports SGLang, and changes nothing.",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the document, and nothing else, on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        text = ledger()
    print(text, end="")
    return 0

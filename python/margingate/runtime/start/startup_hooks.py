"""Rows of the ledger of patches that every process of every server has; and all rows.

docs/hooks.md is printed from them; a test holds the two together.
"""

from __future__ import annotations

from margingate.runtime.hooks.launcher_table import DETOKENIZER_HOOKS, TOKENIZER_HOOKS
from margingate.runtime.hooks.registry import AFTER, AROUND, BEFORE, Hook
from margingate.runtime.hooks.scheduler_table import SCHEDULER_HOOKS
from margingate.runtime.start import arguments, install

_OPTIONS = "SGLang lets plugins declare arguments"
_CALLBACK = "SGLang offers plugins a callback here"

# Registered in every process of every server; none of them runs while requests are served.
STARTUP_HOOKS = (
    Hook(
        "server_args.ServerArgs.add_cli_args",
        AFTER,
        arguments.add_options,
        "parser",
        "--deterministic-gate and --gate-* on the command line and in --help",
        _OPTIONS,
    ),
    Hook(
        "server_args.ServerArgs.from_cli_args",
        AROUND,
        arguments.from_command_line,
        "cls args",
        "only declared fields reach ServerArgs; ours are carried past it",
        _OPTIONS,
    ),
    Hook(
        "server_args.ServerArgs.resolve_once",
        AROUND,
        arguments.resolve,
        "self",
        "sets what the gate needs and refuses what it cannot serve",
        _OPTIONS,
    ),
    Hook(
        "managers.scheduler.Scheduler.__init__",
        AROUND,
        install.init,
        None,
        "patches a gated scheduler, and only that",
        _CALLBACK,
    ),
    Hook(
        "managers.detokenizer_manager.DetokenizerManager.__init__",
        BEFORE,
        install.init_detokenizer,
        "self server_args port_args",
        "patches a gated server's detokenizer, and only that",
        _CALLBACK,
    ),
    Hook(
        "entrypoints.engine.Engine._launch_subprocesses",
        AROUND,
        install.launch,
        "cls server_args init_tokenizer_manager_func run_scheduler_process_func "
        "run_detokenizer_process_func port_args placement_group ...",
        "a scheduler that came up without its gate ends the server",
        "a failing plugin ends the server by itself",
    ),
)
ALL_HOOKS = (*STARTUP_HOOKS, *TOKENIZER_HOOKS, *DETOKENIZER_HOOKS, *SCHEDULER_HOOKS)
